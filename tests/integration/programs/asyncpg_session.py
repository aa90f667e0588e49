"""A session of asyncpg, which speaks the extended protocol by itself: pool, COPY, cursors, timeouts."""

from __future__ import annotations

import asyncio
import io

import asyncpg


async def pooled(pool: asyncpg.Pool) -> None:
    async def square(n: int) -> int:
        return int(await pool.fetchval("SELECT $1::int * $1::int", n))

    print("pooled", sum(await asyncio.gather(*(square(n) for n in range(200)))))


async def prepared(connection: asyncpg.Connection) -> None:
    statement = await connection.prepare("SELECT $1::text || $2::text")
    print("prepared", [await statement.fetchval("a", str(n)) for n in range(3)])
    await connection.execute("CREATE TEMP TABLE numbers (n int, name text)")
    await connection.executemany("INSERT INTO numbers VALUES ($1, $2)", [(n, str(n)) for n in range(1000)])
    print("many", await connection.fetchval("SELECT count(*) FROM numbers"))


async def copy(connection: asyncpg.Connection) -> None:
    records = [(n, "x" * (n % 100)) for n in range(5000)]
    print("copied in", await connection.copy_records_to_table("numbers", records=records))
    out = io.BytesIO()
    print("copied out", await connection.copy_from_query("SELECT n FROM numbers ORDER BY n", output=out))
    print("bytes", len(out.getvalue()))


async def cursor(connection: asyncpg.Connection) -> None:
    async with connection.transaction():
        rows = connection.cursor("SELECT generate_series(1, 500)", prefetch=50)
        print("cursor", sum([row[0] async for row in rows]))


async def failures(connection: asyncpg.Connection) -> None:
    try:
        await connection.fetch("SELECT 1 / $1::int", 0)
    except asyncpg.DivisionByZeroError as error:
        print("failed", error.sqlstate)
    try:
        async with connection.transaction():
            await connection.execute("SELECT nonsense")
    except asyncpg.UndefinedColumnError as error:
        print("transaction failed", error.sqlstate)
    try:
        await connection.execute("SELECT pg_sleep(30)", timeout=0.3)
    except TimeoutError:
        print("timed out")
    print("afterwards", await connection.fetchval("SELECT 1"))


async def notifications(connection: asyncpg.Connection, other: asyncpg.Connection) -> None:
    payloads: asyncio.Queue[object] = asyncio.Queue()
    await connection.add_listener("news", lambda *arguments: payloads.put_nowait(arguments[-1]))
    await other.execute("SELECT pg_notify('news', n::text) FROM generate_series(1, 3) AS n")
    print("notified", [await asyncio.wait_for(payloads.get(), 10) for _ in range(3)])


async def main() -> None:
    async with asyncpg.create_pool(min_size=4, max_size=4) as pool:
        await pooled(pool)
    connection, other = await asyncpg.connect(), await asyncpg.connect()
    for part in (prepared, copy, cursor, failures):
        await part(connection)
    await notifications(connection, other)
    await connection.close()
    await other.close()


if __name__ == "__main__":
    asyncio.run(main())
