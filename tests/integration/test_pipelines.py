"""Pipelines of very many messages: what ends without a guard ends with one, in as little memory as ever."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg
import psycopg
import pytest

if TYPE_CHECKING:
    from tests.guard_process import GuardProcess
    from tests.servers import Address, Server, Transport

SYNC = b"S\0\0\0\4"
READY = b"Z\0\0\0\5I"
BATCH = b"P\0\0\0\10\0\0\0\0" + b"B\0\0\0\14\0\0\0\0\0\0\0\0" + b"E\0\0\0\11\0\0\0\0\0"
BATCH_ANSWER = b"1\0\0\0\4" + b"2\0\0\0\4" + b"I\0\0\0\4"
SECONDS = 60.0
STUCK = 15.0
"""Seconds without a byte's getting any further, after which nothing will."""
MEGABYTE = 1_000_000


def connected(address: Address) -> socket.socket:
    """A client that has logged in, and whose writes and reads block."""
    if address.host.startswith("/"):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(f"{address.host}/.s.PGSQL.{address.port}")
    else:
        sock = socket.create_connection((address.host, address.port))
    sock.settimeout(SECONDS)
    body = b"user\0postgres\0database\0postgres\0\0"
    sock.sendall(struct.pack("!IHH", len(body) + 8, 3, 0) + body)
    answer = b""
    while not answer.endswith(READY):
        answer += sock.recv(65536)
    return sock


def sends_all_before_it_reads(address: Address, number: int, request: bytes, answer: bytes) -> bool:
    """Whether a program ends that sends many requests and reads only then: False if it comes no further."""
    with connected(address) as sock:
        left = memoryview(request * number)
        sock.settimeout(STUCK)
        try:
            while left:
                left = left[sock.send(left) :]
        except TimeoutError:
            return False
        missing = number * len(answer)
        sock.settimeout(SECONDS)
        while missing:
            data = sock.recv(min(missing, 1 << 20))
            assert data
            missing -= len(data)
    return True


@pytest.mark.parametrize(
    ("transport", "number", "request_", "answer"),
    [
        pytest.param("tcp", 300_000, SYNC, READY, id="syncs-tcp"),
        pytest.param("unix", 15_000, SYNC, READY, id="syncs-unix"),
        pytest.param("tcp", 25_000, BATCH + SYNC, BATCH_ANSWER + READY, id="requests-tcp"),
        pytest.param("unix", 3_000, BATCH + SYNC, BATCH_ANSWER + READY, id="requests-unix"),
        pytest.param("tcp", 1, BATCH * 25_000 + SYNC, BATCH_ANSWER * 25_000 + READY, id="one request-tcp"),
        pytest.param("unix", 1, BATCH * 3_000 + SYNC, BATCH_ANSWER * 3_000 + READY, id="one request-unix"),
    ],
)
def test_a_program_that_reads_only_when_it_has_sent_all(
    server: Server, guard: GuardProcess, transport: Transport, number: int, request_: bytes, answer: bytes
) -> None:
    """What it can send at once without a guard, as nearly always so much, it can send with one."""
    if not sends_all_before_it_reads(server.at(transport), number, request_, answer):
        return
    assert sends_all_before_it_reads(guard.at(transport), number, request_, answer)
    guard.assert_no_faults(except_kinds=["unclean-close"])


def test_psycopg_and_asyncpg_send_100000_messages(guard: GuardProcess) -> None:
    """In one pipeline without a Sync, in one with many, and in a batch."""
    rows = [(n,) for n in range(20_000)]
    with psycopg.connect(guard.tcp.conninfo, autocommit=True) as connection:
        connection.execute("CREATE TEMP TABLE numbers (n integer)")
        with connection.cursor() as cursor:
            cursor.executemany("INSERT INTO numbers VALUES (%s)", rows)
        with connection.pipeline() as pipeline:
            cursors = []
            for n in range(5_000):
                cursors.append(connection.execute("SELECT %s::integer", (n,)))
                pipeline.sync()
        assert [cursor.fetchone() for cursor in cursors] == [(n,) for n in range(5_000)]
        found = connection.execute("SELECT count(*), sum(n) FROM numbers").fetchone()
        assert found == (20_000, sum(range(20_000)))

    async def batch() -> None:
        connection = await asyncpg.connect(host=guard.tcp.host, port=guard.tcp.port, user="postgres")
        try:
            await connection.execute("CREATE TEMP TABLE numbers (n integer)")
            await connection.executemany("INSERT INTO numbers VALUES ($1)", rows)
            assert await connection.fetchval("SELECT sum(n) FROM numbers") == sum(range(20_000))
        finally:
            await connection.close()

    asyncio.run(batch())
    guard.assert_no_faults()


@pytest.mark.parametrize("server", ["embedded"], indirect=True, scope="session")
def test_clients_that_pipeline_and_read_nothing_take_no_memory(guard: GuardProcess) -> None:
    """Ten of them, until nothing more can be sent; and others are served meanwhile."""
    before = resident(guard.pid)
    clients = [connected(guard.tcp) for _ in range(10)]
    threads = [threading.Thread(target=stuff, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    with psycopg.connect(guard.tcp.conninfo) as connection:
        while any(thread.is_alive() for thread in threads):
            assert connection.execute("SELECT 1").fetchone() == (1,)
            time.sleep(0.01)
    assert resident(guard.pid) - before < 60 * MEGABYTE
    for client in clients:
        client.close()


def stuff(client: socket.socket) -> None:
    client.settimeout(2)
    try:
        while True:
            client.sendall(SYNC * 10_000)
    except TimeoutError:
        pass


def resident(pid: int) -> int:
    """Bytes of memory that a process has taken at most."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
