"""Leaves answers unread, or reads them late, with real drivers; see each scenario.

Says ``{}`` when the answer has been abandoned, waits for a line, and says what came of it, as JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import sys
import time
from typing import Any

import asyncpg
import psycopg
import psycopg2
import psycopg2.extensions


class Alarm(Exception):
    """Raised from outside, in the middle of whatever is going on."""


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def wait() -> None:
    say()
    sys.stdin.readline()


def raise_in(seconds: float) -> None:
    def ring(*_: object) -> None:
        raise Alarm

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def psycopg_alarm() -> None:
    """Psycopg refuses the next query, and the answer lies where it is."""
    connection = psycopg.connect("", autocommit=True)
    raise_in(0.2)
    with contextlib.suppress(Alarm):
        connection.execute("SELECT pg_sleep(0.5)")
    wait()
    try:
        connection.execute("SELECT 2")
        say(error="")
    except psycopg.Error as error:
        say(error=str(error))
    connection.close()


def psycopg2_abandoned() -> None:
    """What psycopg2's asynchronous connection has been asked is never polled for."""
    connection = psycopg2.connect("", async_=True)
    wait_psycopg2(connection)
    connection.cursor().execute("SELECT 1")
    wait()
    say()


def wait_psycopg2(connection: Any) -> None:
    while (state := connection.poll()) != psycopg2.extensions.POLL_OK:
        reading = [connection] if state == psycopg2.extensions.POLL_READ else []
        writing = [connection] if state == psycopg2.extensions.POLL_WRITE else []
        select.select(reading, writing, [])


# Who reads late


def psycopg_stream() -> None:
    """Takes its rows one by one, and its time with each; what is left lies in the socket."""
    connection = psycopg.connect("", autocommit=True)
    rows = connection.cursor().stream("SELECT repeat('x', 1000) FROM generate_series(1, 200)")
    next(rows)
    wait()
    say(rows=1 + sum(1 for _ in rows))
    connection.execute("SELECT 1")
    connection.close()


def psycopg_pipeline() -> None:
    connection = psycopg.connect("", autocommit=True)
    with connection.pipeline() as pipeline:
        cursors = [connection.execute("SELECT %s", (n,)) for n in range(5)]
        pipeline.sync()
        cursors += [connection.execute("SELECT %s", (n,)) for n in range(5)]
        wait()
        cursors += [connection.execute("SELECT %s", (n,)) for n in range(5)]
    say(rows=sum(len(cursor.fetchall()) for cursor in cursors))
    connection.close()


def server_side_cursors() -> None:
    """Between two fetches nothing is left."""
    first, second = psycopg.connect(""), psycopg2.connect("")
    cursors: list[Any] = [first.cursor("one"), second.cursor("two")]
    for cursor in cursors:
        cursor.itersize = 10
        cursor.execute("SELECT generate_series(1, 100)")
        cursor.fetchone()
    wait()
    say(rows=sum(len(cursor.fetchall()) for cursor in cursors))
    first.close()
    second.close()


def listener() -> None:
    """Has been told something, and is in no hurry to hear it; then it asks."""
    connection = psycopg.connect("", autocommit=True)
    connection.execute("LISTEN channel")
    with psycopg.connect("", autocommit=True) as other:
        for n in range(20):
            other.execute(f"NOTIFY channel, '{n}'")
    wait()
    connection.execute("SELECT 1")
    say(rows=len(list(connection.notifies(timeout=0.1))))
    connection.close()


def asyncpg_sleeps() -> None:
    """An event loop in which a task calls time.sleep(), and reads nothing meanwhile."""
    asyncio.run(late_asyncpg(sys.stdin.readline))


def asyncpg_computes() -> None:
    asyncio.run(late_asyncpg(compute))


def compute() -> None:
    ends = time.monotonic() + 2.0
    while time.monotonic() < ends:
        pass
    sys.stdin.readline()


async def late_asyncpg(blocks: Any) -> None:
    connection = await asyncpg.connect(host=os.environ["PGHOST"], port=int(os.environ["PGPORT"]))
    task = asyncio.create_task(connection.fetch("SELECT pg_sleep(0.05)"))
    await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    say()
    blocks()
    say(rows=len(await task))
    await connection.fetch("SELECT 1")
    await connection.close()


if __name__ == "__main__":
    globals()[sys.argv[1]]()
