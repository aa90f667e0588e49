"""Several threads, or tasks, on one connection in ways that are correct: one of them, named by its argument."""

from __future__ import annotations

import asyncio
import select
import sys
import threading
from collections.abc import Callable

import asyncpg
import psycopg
import psycopg2
from psycopg import pq

ROUNDS = 10


def in_two_threads(work: Callable[[str], None]) -> None:
    failures: list[BaseException] = []

    def guarded(name: str) -> None:
        try:
            work(name)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=guarded, args=(name,)) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def psycopg2_locks() -> None:
    """A connection of psycopg2 has a lock: who comes second waits for the first one's answer to be complete."""
    connection = psycopg2.connect("")
    connection.autocommit = True

    def work(name: str) -> None:
        with connection.cursor() as cursor:
            for _ in range(ROUNDS):
                cursor.execute("SELECT %s FROM pg_sleep(0.02)", (name,))
                assert cursor.fetchall() == [(name,)]

    in_two_threads(work)
    connection.close()


def psycopg_pipeline() -> None:
    """Two threads feed one pipeline: their requests are on their way at once, and that is what it is for."""
    with psycopg.connect("", autocommit=True) as connection, connection.pipeline() as pipeline:
        cursors: dict[str, list[psycopg.Cursor]] = {"first": [], "second": []}

        def work(name: str) -> None:
            for _ in range(ROUNDS):
                cursors[name].append(connection.execute("SELECT %s FROM pg_sleep(0.02)", (name,)))

        in_two_threads(work)
        pipeline.sync()
        for name, asked in cursors.items():
            assert [cursor.fetchone() for cursor in asked] == [(name,)] * ROUNDS


def asyncpg_pool() -> None:
    """More tasks than connections: each connection is used by one after the other."""

    async def use() -> None:
        async with asyncpg.create_pool(min_size=2, max_size=3) as pool:
            numbers = await asyncio.gather(*(pool.fetchval("SELECT $1::int FROM pg_sleep(0.01)", n) for n in range(60)))
        assert numbers == list(range(60))

    asyncio.run(use())


def notification_watcher() -> None:
    """A thread waits for notifications with select(), and reads them, or uses the connection, only under a mutex.

    So both threads wait for the socket while an answer is outstanding, and yet only one reads it.
    """
    connection, other = pq.PGconn.connect(b""), pq.PGconn.connect(b"")
    mutex = threading.Lock()
    news: list[bytes] = []

    def collect() -> None:
        while notification := connection.notifies():
            news.append(notification.extra)

    def watch() -> None:
        while b"the end" not in news:
            # It isn't told whose the bytes are: an answer wakes it as well, and keeps waking it until it is read.
            select.select([connection.socket], [], [], 10)
            with mutex:
                connection.consume_input()
                collect()

    connection.exec_(b"LISTEN news")
    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(ROUNDS):
        with mutex:
            assert connection.exec_(b"SELECT 'mine' FROM pg_sleep(0.03)").get_value(0, 0) == b"mine"
            collect()
        other.exec_(b"NOTIFY news, 'one more'")
    other.exec_(b"NOTIFY news, 'the end'")
    watcher.join()
    assert news == [b"one more"] * ROUNDS + [b"the end"]
    other.finish()
    connection.finish()


SCENARIOS = {
    scenario.__name__: scenario for scenario in (psycopg2_locks, psycopg_pipeline, asyncpg_pool, notification_watcher)
}

if __name__ == "__main__":
    SCENARIOS[sys.argv[1]]()
