"""asyncpg, one connection, all that it can."""

from __future__ import annotations

import asyncio
import io

import asyncpg

from tests.soak.programs.playing import Step, channel_of, digest, given, values_of, write


class Player:
    def __init__(self, connection: asyncpg.Connection, beside: asyncpg.Connection) -> None:
        self._connection = connection
        self._beside = beside

    async def do(self, step: Step) -> object:
        method = getattr(self, step["do"], self.rows)
        return await method(step)

    async def fetch(self, sql: str, values: list[str]) -> object:
        try:
            return digest(await self._connection.fetch(sql, *values))
        except asyncpg.PostgresError as error:
            return error.sqlstate

    async def execute(self, sql: str) -> object:
        try:
            return await self._connection.execute(sql)
        except asyncpg.PostgresError as error:
            return error.sqlstate

    async def rows(self, step: Step) -> object:
        return await self.fetch(step["sql"], values_of(step))

    async def prepared(self, step: Step) -> object:
        statement = await self._connection.prepare(step["sql"])
        return [digest(await statement.fetch(*values)) for values in step["lists"]]

    async def transaction(self, step: Step) -> object:
        return [await self.execute(sql) for sql in step["statements"]]

    async def copy(self, step: Step) -> object:
        await self._connection.execute("DROP TABLE IF EXISTS copied; CREATE TEMP TABLE copied (n int, word text)")
        records = [(int(n), word) for n, word in step["rows"]]
        into = await self._connection.copy_records_to_table("copied", records=records)
        out = io.BytesIO()
        await self._connection.copy_from_query("SELECT * FROM copied ORDER BY 1", output=out)
        return [into, digest([line] for line in out.getvalue().splitlines())]

    async def cursor(self, step: Step) -> object:
        async with self._connection.transaction():
            return digest([row async for row in self._connection.cursor(step["sql"], prefetch=step["size"])])

    async def cancel(self, _: Step) -> object:
        """Asyncpg's time-outs send a CancelRequest."""
        try:
            await self._connection.execute("SELECT pg_sleep(60)", timeout=0.3)
        except TimeoutError:
            return "timed out"
        return "slept"

    async def notify(self, step: Step) -> object:
        channel = channel_of(step)
        got: asyncio.Queue[object] = asyncio.Queue()

        def take(*arguments: object) -> None:
            got.put_nowait(arguments[-1])

        await self._connection.add_listener(channel, take)
        for payload in step["payloads"]:
            await self._beside.execute("SELECT pg_notify($1, $2)", channel, payload)
        payloads = [await asyncio.wait_for(got.get(), 60) for _ in step["payloads"]]
        await self._connection.remove_listener(channel, take)
        return payloads


async def main() -> None:
    connection, beside = await asyncpg.connect(), await asyncpg.connect()
    connection.add_log_listener(lambda *_: None)
    player = Player(connection, beside)
    for step in given():
        write(step, await player.do(step))
    await connection.close()
    await beside.close()


if __name__ == "__main__":
    asyncio.run(main())
