"""A session of psycopg2, which knows the simple protocol alone."""

from __future__ import annotations

import io
import select
import threading
import time
from contextlib import closing

import psycopg2
import psycopg2.extensions

Connection = psycopg2.extensions.connection


def queries(connection: Connection) -> None:
    with connection, connection.cursor() as cursor:
        cursor.execute("SELECT 1; SELECT %s", ("two",))
        print("last of several", cursor.fetchall())
        cursor.execute("CREATE TEMP TABLE words (n int, word text)")
        cursor.executemany("INSERT INTO words VALUES (%s, %s)", [(n, f"word {n}") for n in range(100)])
        cursor.execute("SELECT count(*), max(word) FROM words")
        print("inserted", cursor.fetchone())


def copy(connection: Connection) -> None:
    with connection, connection.cursor() as cursor:
        cursor.copy_expert("COPY words FROM STDIN", io.StringIO("".join(f"{n}\tmore\n" for n in range(10000))))
        out = io.StringIO()
        cursor.copy_expert("COPY words TO STDOUT", out)
        print("copied", len(out.getvalue()))


def named_cursor(connection: Connection) -> None:
    with connection, connection.cursor("numbers") as cursor:
        cursor.itersize = 50
        cursor.execute("SELECT generate_series(1, 500)")
        print("cursor", sum(row[0] for row in cursor))


def cancel(connection: Connection) -> None:
    """Cancel from another thread, which is what psycopg2's documentation suggests."""

    def cancel_it() -> None:
        asleep = "SELECT wait_event = 'PgSleep' FROM pg_stat_activity WHERE pid = %s"
        with closing(psycopg2.connect("")) as other, other.cursor() as cursor:
            other.autocommit = True
            cursor.execute(asleep, (connection.info.backend_pid,))
            until = time.monotonic() + 60
            while cursor.fetchone() != (True,) and time.monotonic() < until:
                # One that comes before the server has begun with it cancels nothing.
                time.sleep(0.02)
                cursor.execute(asleep, (connection.info.backend_pid,))
        connection.cancel()

    thread = threading.Thread(target=cancel_it)
    thread.start()
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_sleep(300)")
    except psycopg2.errors.QueryCanceled as error:
        print("cancelled", error.pgcode)
    thread.join()
    connection.rollback()


def notifications(connection: Connection) -> None:
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute("LISTEN news")
        with closing(psycopg2.connect("")) as other, other, other.cursor() as sender:
            sender.execute("SELECT pg_notify('news', n::text) FROM generate_series(1, 3) AS n")
        while len(connection.notifies) < 3:
            if not select.select([connection], [], [], 10)[0]:
                break
            connection.poll()
        print("notified", [notify.payload for notify in connection.notifies])
    connection.autocommit = False


def main() -> None:
    with closing(psycopg2.connect("")) as connection:
        for part in (queries, copy, named_cursor, cancel, notifications):
            part(connection)


if __name__ == "__main__":
    main()
