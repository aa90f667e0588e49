"""A session of psycopg 3: what it saw goes to standard output, the same for every correct connection."""

from __future__ import annotations

import time

import psycopg
from psycopg import errors


def pipeline(connection: psycopg.Connection) -> None:
    with connection.pipeline():
        cursors = [connection.execute("SELECT %s::int * 2", (n,)) for n in range(200)]
        print("pipeline", sum(row[0] for cursor in cursors for row in cursor))
    try:
        with connection.pipeline():
            connection.execute("SELECT 1")
            connection.execute("SELECT 1 / 0")
            connection.execute("SELECT 2")
    except errors.DivisionByZero as error:
        print("pipeline failed", error.sqlstate)
    connection.rollback()


def copy(connection: psycopg.Connection) -> None:
    connection.execute("CREATE TEMP TABLE words (n int, word text)")
    with connection.cursor() as cursor:
        with cursor.copy("COPY words FROM STDIN") as rows:
            for n in range(5000):
                rows.write_row((n, "word" * (n % 50)))
        with cursor.copy("COPY words TO STDOUT (FORMAT binary)") as rows:
            print("copied", sum(len(block) for block in rows))
        try:
            with cursor.copy("COPY words FROM STDIN") as rows:
                rows.write_row(("too", "many", 1 / 0))
        except ZeroDivisionError:
            connection.rollback()
    print("after a given-up COPY", connection.execute("SELECT 1").fetchone())
    try:
        with connection.cursor() as cursor, cursor.copy("COPY nowhere FROM STDIN") as rows:
            rows.write(b"no\n")
    except errors.UndefinedTable as error:
        print("copy refused", error.sqlstate)
    connection.rollback()
    connection.execute("CREATE TEMP TABLE numbers (n int)")
    try:
        with connection.cursor() as cursor, cursor.copy("COPY numbers FROM STDIN") as rows:
            for _ in range(1000):
                rows.write(b"not a number\n" * 100)
    except errors.InvalidTextRepresentation as error:
        print("copy failed under way", error.sqlstate)
    connection.rollback()


def cancel(connection: psycopg.Connection) -> None:
    connection.execute("SET LOCAL statement_timeout = '120s'")
    connection.pgconn.send_query(b"SELECT pg_sleep(300)")
    asleep = "SELECT wait_event = 'PgSleep' FROM pg_stat_activity WHERE pid = %s"
    with psycopg.connect("", autocommit=True) as other:
        # One that comes before the server has begun with it cancels nothing.
        until = time.monotonic() + 60
        while other.execute(asleep, (connection.info.backend_pid,)).fetchone() != (True,):
            assert time.monotonic() < until
            time.sleep(0.02)
    connection.cancel_safe()
    while result := connection.pgconn.get_result():
        print("cancelled", result.error_field(psycopg.pq.DiagnosticField.SQLSTATE))
    connection.rollback()


def notifications(connection: psycopg.Connection) -> None:
    connection.autocommit = True
    connection.execute("LISTEN news")
    with psycopg.connect("", autocommit=True) as other:
        for n in range(3):
            other.execute("SELECT pg_notify('news', %s)", (str(n),))
    print("notified", [notify.payload for notify in connection.notifies(timeout=10, stop_after=3)])
    connection.autocommit = False


def server_side_cursor(connection: psycopg.Connection) -> None:
    with connection.cursor("numbers", scrollable=True) as cursor:
        cursor.itersize = 100
        cursor.execute("SELECT generate_series(1, 1000)")
        print("cursor", sum(row[0] for row in cursor))
        cursor.scroll(10, mode="absolute")
        print("scrolled", cursor.fetchone())
    connection.commit()


def errors_in_transactions(connection: psycopg.Connection) -> None:
    try:
        connection.execute("SELECT nonsense")
    except errors.UndefinedColumn as error:
        print("failed", error.sqlstate)
    try:
        connection.execute("SELECT 1")
    except errors.InFailedSqlTransaction as error:
        print("still failed", error.sqlstate)
    connection.rollback()
    try:
        with connection.transaction():
            connection.execute("CREATE TEMP TABLE deferred (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
            connection.execute("INSERT INTO deferred VALUES (1), (1)")
    except errors.UniqueViolation as error:
        print("commit failed", error.sqlstate)


def large_values(connection: psycopg.Connection) -> None:
    megabytes = b"\x00\xff" * (8 << 20)
    row = connection.execute("SELECT %b::bytea, length(%b::bytea)", (megabytes, megabytes), binary=True).fetchone()
    print("large", row is not None and row[0] == megabytes and row[1])
    connection.rollback()


def main() -> None:
    with psycopg.connect("", prepare_threshold=2) as connection:
        for part in (pipeline, copy, cancel, notifications, server_side_cursor, errors_in_transactions, large_values):
            part(connection)
        for n in range(5):
            connection.execute("SELECT %s::int", (n,))
        print("prepared", connection.execute("SELECT count(*) FROM pg_prepared_statements").fetchone())


if __name__ == "__main__":
    main()
