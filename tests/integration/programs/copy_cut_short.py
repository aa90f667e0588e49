"""COPY FROM STDIN, and the connection is closed in the middle of the rows, or when they are complete."""

from __future__ import annotations

import sys

import psycopg


def main(how: str) -> None:
    connection = psycopg.connect("", autocommit=True)
    connection.execute("CREATE TABLE IF NOT EXISTS cut_short (a int)")
    libpq = connection.pgconn
    libpq.exec_(b"COPY cut_short FROM STDIN")
    if how != "nothing":
        libpq.put_copy_data(b"1\n2\n")
        libpq.flush()
    if how == "done":
        libpq.put_copy_end()
    elif how == "failed":
        libpq.put_copy_end(b"enough")
    elif how == "refused":
        libpq.put_copy_data(b"no number\n" + b"3\n" * 20_000)
        libpq.put_copy_end()
        libpq.get_result()
    libpq.finish()  # says Terminate


if __name__ == "__main__":
    main(sys.argv[1])
