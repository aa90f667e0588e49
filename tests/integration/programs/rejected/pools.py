"""Is rejected on a connection from a pool, in a transaction, and then uses the pool until it works again.

Says when it is busy, as what error the user sees the rejection, and those of the attempts afterwards.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable

import asyncpg
import sqlalchemy
from psycopg_pool import ConnectionPool
from sqlalchemy.ext.asyncio import create_async_engine

SLEEP = "SELECT pg_sleep(60)"
ATTEMPTS = 100
PAUSE = 0.05

Use = Callable[[str], None]
AsyncUse = Callable[[str], Awaitable[None]]


def tell(error: BaseException, afterwards: list[str]) -> None:
    print(json.dumps({"text": str(error), "afterwards": afterwards}), flush=True)


def busy() -> None:
    print(json.dumps({"state": "query"}), flush=True)


def be_rejected(use: Use) -> None:
    use("SELECT 1")
    busy()
    try:
        use(SLEEP)
    except Exception as error:
        afterwards: list[str] = []
        while len(afterwards) < ATTEMPTS and (failure := outcome(use)):
            afterwards.append(failure)
            time.sleep(PAUSE)
        tell(error, afterwards)


def outcome(use: Use) -> str | None:
    try:
        use("SELECT 1")
    except Exception as error:
        return str(error)
    return None


async def be_rejected_asynchronously(use: AsyncUse) -> None:
    await use("SELECT 1")
    busy()
    try:
        await use(SLEEP)
    except Exception as error:
        afterwards: list[str] = []
        while len(afterwards) < ATTEMPTS and (failure := await async_outcome(use)):
            afterwards.append(failure)
            await asyncio.sleep(PAUSE)
        tell(error, afterwards)


async def async_outcome(use: AsyncUse) -> str | None:
    try:
        await use("SELECT 1")
    except Exception as error:
        return str(error)
    return None


def psycopg_pool() -> None:
    with ConnectionPool("", min_size=1, max_size=1) as pool:

        def use(sql: str) -> None:
            with pool.connection() as connection:
                connection.execute(sql)

        be_rejected(use)


async def asyncpg_pool() -> None:
    async with asyncpg.create_pool(min_size=1, max_size=1, ssl=False) as pool:

        async def use(sql: str) -> None:
            async with pool.acquire() as connection, connection.transaction():
                await connection.execute(sql)

        await be_rejected_asynchronously(use)


def url(driver: str) -> sqlalchemy.URL:
    where = [os.environ[name] for name in ("PGUSER", "PGHOST", "PGPORT", "PGDATABASE")]
    return sqlalchemy.make_url("postgresql+{}://{}@{}:{}/{}".format(driver, *where))


def engine(driver: str) -> None:
    engine = sqlalchemy.create_engine(url(driver), pool_size=1, max_overflow=0)

    def use(sql: str) -> None:
        with engine.begin() as connection:
            connection.execute(sqlalchemy.text(sql))

    be_rejected(use)


async def async_engine() -> None:
    engine = create_async_engine(url("asyncpg"), pool_size=1, max_overflow=0)

    async def use(sql: str) -> None:
        async with engine.begin() as connection:
            await connection.execute(sqlalchemy.text(sql))

    await be_rejected_asynchronously(use)


match sys.argv[1:]:
    case ["psycopg_pool"]:
        psycopg_pool()
    case ["asyncpg's pool"]:
        asyncio.run(asyncpg_pool())
    case ["SQLAlchemy, asyncpg"]:
        asyncio.run(async_engine())
    case [name]:
        engine(name.removeprefix("SQLAlchemy, "))
