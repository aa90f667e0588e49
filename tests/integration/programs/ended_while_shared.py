"""A parent whose child has inherited its connection, and opened its own, finds that the server has ended it."""

from __future__ import annotations

import json
import os
import sys

import psycopg


def main() -> None:
    connection = psycopg.connect("", autocommit=True)
    orders, order = os.pipe()
    answer, answers = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(order)
        with psycopg.connect("", autocommit=True) as own:
            own.execute("SELECT 1")
            os.write(answers, b"1")
            os.read(orders, 1)  # until the parent ends it
            os.write(answers, str(own.execute("SELECT 1").fetchall()[0][0]).encode())
        os._exit(0)
    os.close(orders)
    os.read(answer, 1)
    print(json.dumps({"backend": connection.info.backend_pid}), flush=True)
    sys.stdin.readline()
    sqlstate = None
    try:
        connection.execute("SELECT 1")
    except psycopg.OperationalError as error:
        sqlstate = error.sqlstate
    connection.close()
    with psycopg.connect("", autocommit=True) as again:
        os.close(order)
        said = int(os.read(answer, 1))
        os.waitpid(child, 0)
        [row] = again.execute("SELECT 1").fetchall()
    print(json.dumps({"sqlstate": sqlstate, "child": said, "again": row[0]}), flush=True)


if __name__ == "__main__":
    main()
