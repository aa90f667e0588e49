"""Connects with one of Python's drivers once for each state that is named, and is rejected there.

Says of each when it is there, and then as what error the user sees it; see tests/integration/test_rejections.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import asyncpg
import pg8000.dbapi
import psycopg
import psycopg2

SLEEP = "SELECT pg_sleep(60)"
ROWS = "SELECT repeat('x', 8000), nextval('rows_sent'), pg_sleep(0.01) FROM generate_series(1, 6000)"
LINES = "2\n" * 1000


def arrived(state: str) -> None:
    print(json.dumps({"state": state}), flush=True)


def wait() -> None:
    sys.stdin.readline()


def tell(error: BaseException, used_again: list[str | None]) -> None:
    said: dict[str, object] = {"class": type(error).__qualname__, "text": str(error), "again": used_again}
    if isinstance(error, psycopg.Error | psycopg2.Error):
        diag = error.diag
        said |= {"sqlstate": diag.sqlstate, "detail": diag.message_detail, "hint": diag.message_hint}
    elif isinstance(error, asyncpg.PostgresError):
        said |= {"sqlstate": error.sqlstate, "detail": error.detail, "hint": error.hint}
    elif isinstance(error, pg8000.dbapi.DatabaseError):
        [fields] = error.args
        said |= {"text": fields["M"], "sqlstate": fields["C"], "detail": fields["D"], "hint": fields["H"]}
    print(json.dumps(said), flush=True)


def outcome(use: Callable[[], object]) -> str | None:
    try:
        use()
    except Exception as error:
        return str(error)
    return None


class Lines:
    """A file with more to copy than fits into any buffer, at whose second line everything waits for the test."""

    def __init__(self, line: str | bytes) -> None:
        self._line = line
        self._number = 0

    def read(self, size: int = -1) -> str | bytes:
        del size
        self._number += 1
        if self._number == 2:
            arrived("copy")
            wait()
        return self._line if self._number < 3000 else self._line[:0]


class Psycopg:
    parameters = "%s::int"

    def connect(self) -> Any:
        return psycopg.connect(autocommit=True)

    def execute(self, connection: Any, sql: str, *arguments: object) -> None:
        connection.execute(sql, arguments or None, binary=bool(arguments))

    def copy(self, connection: Any) -> None:
        lines = Lines(LINES)
        with connection.cursor().copy("COPY copied FROM STDIN") as copy:
            while line := lines.read():
                copy.write(line)


class Psycopg2:
    parameters = None

    def connect(self) -> Any:
        connection = psycopg2.connect("")
        connection.autocommit = True
        return connection

    def execute(self, connection: Any, sql: str) -> None:
        with connection.cursor() as cursor:
            cursor.execute(sql)

    def copy(self, connection: Any) -> None:
        with connection.cursor() as cursor:
            cursor.copy_expert("COPY copied FROM STDIN", Lines(LINES), size=len(LINES))


class Pg8000:
    parameters = "%s::int"

    def connect(self) -> Any:
        where = {"host": os.environ["PGHOST"], "port": int(os.environ["PGPORT"])}
        connection = pg8000.dbapi.connect(os.environ["PGUSER"], database=os.environ["PGDATABASE"], **where)
        connection.autocommit = True
        return connection

    def execute(self, connection: Any, sql: str, *arguments: object) -> None:
        connection.cursor().execute(sql, arguments)

    copy = None
    """It reads nothing before it has sent everything."""


def be_rejected(driver: Any, state: str) -> None:
    connection = driver.connect()
    try:
        if state == "transaction":
            driver.execute(connection, "BEGIN")
        if state != "copy":
            arrived(state)
        if state in ("idle", "transaction", "torn"):
            wait()
        match state:
            case "extended":
                driver.execute(connection, f"SELECT pg_sleep(60), {driver.parameters}", 1)
            case "copy":
                driver.copy(connection)
            case _:
                driver.execute(connection, {"query": SLEEP, "rows": ROWS}.get(state, "SELECT 2"))
    except Exception as error:
        tell(error, [outcome(lambda: driver.execute(connection, "SELECT 3")) for _ in range(3)])
    else:
        raise AssertionError(f"{state}: it has not been rejected")


async def be_rejected_by_asyncpg(state: str) -> None:
    connection = await asyncpg.connect(ssl=False)

    async def lines() -> AsyncIterator[bytes]:
        yield b"1\n"
        arrived("copy")
        await asyncio.to_thread(wait)
        for _ in range(3000):
            yield LINES.encode()
            await asyncio.sleep(0)

    async def use() -> str | None:
        try:
            await connection.execute("SELECT 3")
        except Exception as error:
            return str(error)
        return None

    try:
        if state == "transaction":
            await connection.execute("BEGIN")
        if state != "copy":
            arrived(state)
        if state in ("idle", "transaction", "torn"):
            await asyncio.to_thread(wait)
        match state:
            case "extended" | "rows":
                await connection.fetch(
                    ROWS if state == "rows" else "SELECT pg_sleep(60), $1::int", *[1][state == "rows" :]
                )
            case "copy":
                await connection.copy_to_table("copied", source=lines())
            case _:
                await connection.execute(SLEEP if state == "query" else "SELECT 2")
    except Exception as error:
        tell(error, [await use() for _ in range(3)])
    else:
        raise AssertionError(f"{state}: it has not been rejected")


def main(name: str, *states: str) -> None:
    drivers = {"psycopg": Psycopg, "psycopg2": Psycopg2, "pg8000": Pg8000}
    for state in states:
        if name == "asyncpg":
            asyncio.run(be_rejected_by_asyncpg(state))
        else:
            be_rejected(drivers[name](), state)


main(*sys.argv[1:])
