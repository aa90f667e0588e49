"""asyncpg's pool."""

from __future__ import annotations

import asyncio

import asyncpg

from tests.soak.programs.playing import Step, digest
from tests.soak.programs.pooling import SIZE, in_tasks, lists_of


async def asyncpg_tasks() -> None:
    async with asyncpg.create_pool(min_size=1, max_size=SIZE, command_timeout=120) as pool:

        async def do(step: Step) -> object:
            try:
                return [digest(await pool.fetch(step["sql"], *values)) for values in lists_of(step)]
            except asyncpg.PostgresError as error:
                return error.sqlstate

        await in_tasks(do)


if __name__ == "__main__":
    asyncio.run(asyncpg_tasks())
