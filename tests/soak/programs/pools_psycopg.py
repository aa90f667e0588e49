"""psycopg's pool, in threads or in tasks, as the argument says."""

from __future__ import annotations

import asyncio
import sys

import psycopg
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from tests.soak.programs.playing import Step, digest
from tests.soak.programs.pooling import SIZE, in_tasks, in_threads, lists_of


def psycopg_threads() -> None:
    settings = {"autocommit": True, "prepare_threshold": 2, "cursor_factory": psycopg.RawCursor}
    with ConnectionPool("", min_size=1, max_size=SIZE, kwargs=settings, timeout=120) as pool:

        def do(step: Step) -> object:
            with pool.connection() as connection:
                try:
                    return [digest(connection.execute(step["sql"], values or None)) for values in lists_of(step)]
                except psycopg.Error as error:
                    return error.sqlstate

        in_threads(do)


async def psycopg_tasks() -> None:
    settings = {"autocommit": True, "prepare_threshold": 2, "cursor_factory": psycopg.AsyncRawCursor}
    async with AsyncConnectionPool("", min_size=1, max_size=SIZE, kwargs=settings, timeout=120, open=False) as pool:

        async def do(step: Step) -> object:
            async with pool.connection() as connection:
                try:
                    got = []
                    for values in lists_of(step):
                        cursor = await connection.execute(step["sql"], values or None)
                        got.append(digest(await cursor.fetchall()))
                except psycopg.Error as error:
                    return error.sqlstate
                return got

        await in_tasks(do)


if __name__ == "__main__":
    if sys.argv[1] == "threads":
        psycopg_threads()
    else:
        asyncio.run(psycopg_tasks())
