"""The guard as a whole: memory, descriptors, signals, and what it says."""

from __future__ import annotations

import fcntl
import json
import os
import re
import resource
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from tests.proxy.conftest import at_rest, until
from tests.proxy.fake_backend import converse
from tests.proxy.messages import (
    ANSWER,
    COLUMNS,
    LOGGED_IN,
    READY,
    SECONDS,
    SELECTED,
    TERMINATE,
    Client,
    Peer,
    message,
    query,
    startup,
)
from tests.proxy.spawned import Spawned, run, spawned

if TYPE_CHECKING:
    from tests.proxy.fake_backend import BackendConnection, FakeBackend

MB = 1_000_000


def upstream(backend: FakeBackend) -> str:
    return f"host=127.0.0.1 port={backend.port} sslmode=disable"


async def connect(guard: Spawned, backend: FakeBackend) -> Client:
    return await backend.connect(guard.port)


async def session(guard: Spawned, backend: FakeBackend) -> tuple[Client, BackendConnection]:
    return await backend.session(guard.port)


@pytest.mark.parametrize("direction", ["DataRow", "CopyData"])
async def test_a_message_of_a_gigabyte_passes_in_bounded_memory(
    backend: FakeBackend, direction: str, tmp_path: Path
) -> None:
    size = (1000 if direction == "DataRow" else 300) * MB
    with spawned(upstream(backend), cwd=tmp_path) as guard:
        client, server = await session(guard, backend)
        before = guard.resident()
        await client.send(query("anything"))
        await server.expect(query("anything"))
        sender: Peer = server
        receiver: Peer = client
        if direction == "DataRow":
            await server.send(COLUMNS)
            await client.expect(COLUMNS)
            header = message("D")[:1] + (size + 4).to_bytes(4, "big")
        else:
            sender, receiver = receiver, sender
            await server.send(message("G", b"\0\0\0"))
            await client.expect(message("G", b"\0\0\0"))
            header = message("d")[:1] + (size + 4).to_bytes(4, "big")

        async def send() -> None:
            await sender.send(header)
            for _ in range(size // MB):
                await sender.send(bytes(MB))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await receiver.expect(header)
            left = size
            while left:
                left -= len(await receiver.receive(min(left, MB)))
        assert guard.resident() - before < 20 * MB
        if direction == "CopyData":
            await client.send(message("c"))
            await server.expect(message("c"))
        await server.send(SELECTED + READY)
        await client.expect(SELECTED + READY)
        await client.send(TERMINATE)
        await client.close()
        await server.close()
        guard.signal(signal.SIGTERM)
        assert "1 session, no faults" in guard.end()


async def test_what_is_not_read_is_not_kept(backend: FakeBackend, tmp_path: Path) -> None:
    """Twenty clients that read nothing while their servers send without end."""
    with spawned(upstream(backend), cwd=tmp_path) as guard:
        before = guard.resident()
        data = COLUMNS + message("D", bytes(50 * MB))
        with trio.move_on_after(3):
            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    client, server = await session(guard, backend)
                    await client.send(query("select large"))
                    nursery.start_soon(server.stream.send_all, data)
        assert guard.resident() - before < 30 * MB
        await at_rest(guard.cpu_seconds)


async def test_four_hundred_sessions_at_once_leave_nothing_behind(backend: FakeBackend, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
    try:
        with spawned(upstream(backend), cwd=tmp_path) as guard:
            client, server = await session(guard, backend)
            before = guard.descriptors()
            clients: list[Client] = []
            servers: list[BackendConnection] = []

            async def arrive() -> None:
                one = await connect(guard, backend)
                clients.append(one)
                await one.send(startup())
                await one.expect(LOGGED_IN)

            async def answer() -> None:
                for _ in range(400):
                    servers.append(await backend.accept())
                    await servers[-1].log_in()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(answer)
                for _ in range(400):
                    nursery.start_soon(arrive)
                for _ in range(20):
                    with trio.fail_after(SECONDS):
                        await converse(client, server)
            assert guard.descriptors() >= 800
            for number, one in enumerate(clients):
                if number % 3 == 0:
                    await one.send(TERMINATE)
                await (one.reset() if number % 3 == 1 else one.close())
            for each in servers:
                await each.rest()
                await each.close()
            await until(lambda: guard.descriptors() <= before)
            await converse(client, server)
            await client.close()
            await server.close()
            guard.signal(signal.SIGTERM)
            assert "401 sessions" in guard.end()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_out_of_descriptors(backend: FakeBackend, tmp_path: Path) -> None:
    """Those who are connected go on, it is said once, and when descriptors are free again so are the doors."""
    with spawned(upstream(backend), "--attribution", "off", cwd=tmp_path, descriptors=32) as guard:
        client, server = await session(guard, backend)
        crowd = [await connect(guard, backend) for _ in range(40)]
        guard.wait_for(
            "turned away: the limit of 32 open files leaves room for only [3-9] sessions at once. Raise the limit"
        )
        for _ in range(20):
            await converse(client, server)
        await at_rest(guard.cpu_seconds)
        for one in crowd:
            await one.close()
        newcomer, its_server = await session(guard, backend)
        await converse(newcomer, its_server)
        for peer in (newcomer, its_server, client, server):
            await peer.close()
        guard.signal(signal.SIGTERM)
        assert guard.end().count("clients are turned away") == 1


async def test_a_limit_without_room_for_anybody(backend: FakeBackend, tmp_path: Path) -> None:
    options = "serve", "--upstream", upstream(backend), "--attribution", "off", "--listen", "127.0.0.1:0"
    ended = await trio.to_thread.run_sync(lambda: run(*options, cwd=tmp_path, descriptors=15))
    assert ended.returncode == 2
    assert "Raise the limit of open files for pgguard" in ended.stderr
    assert "Traceback" not in ended.stderr


# Signals


async def test_sigterm_with_nobody_there(backend: FakeBackend, short_directory: Path) -> None:
    with spawned(upstream(backend), "--listen", f"unix:{short_directory}:1", cwd=short_directory) as guard:
        assert (short_directory / ".s.PGSQL.1").is_socket()
        started = time.monotonic()
        guard.signal(signal.SIGTERM)
        assert "0 sessions, no faults" in guard.end()
        assert time.monotonic() - started < 3
        assert not (short_directory / ".s.PGSQL.1").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_lets_sessions_finish_and_nobody_in(
    backend: FakeBackend, tmp_path: Path, number: signal.Signals
) -> None:
    with spawned(upstream(backend), cwd=tmp_path) as guard:
        client, server = await session(guard, backend)
        await client.send(query("select pg_sleep(1)"))
        await server.expect(query("select pg_sleep(1)"))
        guard.signal(number)
        guard.wait_for("waiting up to 8 s for 1 session to finish")
        with pytest.raises(OSError, match="all attempts to connect"):
            await connect(guard, backend)
        await server.send(ANSWER)
        await client.expect(ANSWER)
        await client.send(TERMINATE)
        await client.close()
        await server.close()
        started = time.monotonic()
        guard.end()
        assert time.monotonic() - started < 3


async def test_sessions_that_do_not_finish_are_told(backend: FakeBackend, tmp_path: Path) -> None:
    """One that is idle, one that is waiting for an answer; and one in the middle of a message, where nothing fits."""
    (tmp_path / "pgguard.toml").write_text("shutdown_timeout = 0.3\n")
    with spawned(upstream(backend), cwd=tmp_path) as guard:
        idle, _ = await session(guard, backend)
        waiting, busy = await session(guard, backend)
        await waiting.send(query("select pg_sleep(60)"))
        await busy.expect(query("select pg_sleep(60)"))
        reading, torn = await session(guard, backend)
        await reading.send(query("select large"))
        await torn.send(COLUMNS + message("D", bytes(100))[:50])
        await reading.receive(len(COLUMNS) + 50)
        silent = await connect(guard, backend)
        guard.signal(signal.SIGTERM)
        for client in (idle, waiting):
            error = await client.message()
            assert error.fields["C"] == "57P01"
            assert error.fields["M"].startswith("pgguard: ")
            assert await client.rest() == b""
        assert await reading.rest() == b""
        assert await silent.rest() == b""
        guard.end()


async def test_a_second_signal_ends_it_at_once(backend: FakeBackend, short_directory: Path) -> None:
    with spawned(upstream(backend), "--listen", f"unix:{short_directory}:1", cwd=short_directory) as guard:
        client, server = await session(guard, backend)
        guard.signal(signal.SIGTERM)
        guard.wait_for("waiting up to 8 s")
        started = time.monotonic()
        guard.signal(signal.SIGTERM)
        guard.end()
        assert time.monotonic() - started < 3
        assert await client.rest() == b""
        assert await server.rest() == b""
        assert not (short_directory / ".s.PGSQL.1").exists()


# Where faults and words go


async def test_a_full_disk_is_said_once_and_costs_nothing(backend: FakeBackend, tmp_path: Path) -> None:
    with spawned(upstream(backend), "--faults", "/dev/full", cwd=tmp_path) as guard:
        for _ in range(3):
            client, server = await session(guard, backend)
            await server.send(COLUMNS)
            await client.expect(COLUMNS)
            await converse(client, server)
            await client.close()
            await server.rest()
            await server.close()
        guard.signal(signal.SIGTERM)
        said = guard.end()
        assert said.count("No space left on device") == 1


async def test_what_a_full_disk_has_no_room_for_is_recorded_when_it_has(backend: FakeBackend, tmp_path: Path) -> None:
    """The disk is full when its file may not grow: setrlimit(2), RLIMIT_FSIZE."""
    faults = tmp_path / "faults.jsonl"
    with spawned(upstream(backend), "--faults", str(faults), cwd=tmp_path) as guard:
        _, hard = resource.prlimit(guard.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(guard.pid, resource.RLIMIT_FSIZE, (5000, hard))
        for _ in range(4):
            client, server = await session(guard, backend)
            await server.send(COLUMNS)
            await client.expect(COLUMNS)
            await client.close()
            await server.rest()
            await server.close()
        guard.wait_for("faults are kept until they can be written: can't append faults to .*: File too large()")
        assert faults.stat().st_size == 5000
        resource.prlimit(guard.pid, resource.RLIMIT_FSIZE, (hard, hard))
        await until(lambda: faults.read_text().count("message-while-idle") >= 4 and faults.read_text().endswith("\n"))
        guard.signal(signal.SIGTERM)
        said = guard.end()
    records = [json.loads(line) for line in faults.read_text().splitlines()]
    assert [record["id"] for record in records] == list(range(1, len(records) + 1))
    assert "could not be written" not in said


async def test_standard_error_that_nobody_reads_holds_up_nothing(backend: FakeBackend, tmp_path: Path) -> None:
    """Neither the reports nor the log, and not the end either."""
    with spawned(upstream(backend), cwd=tmp_path) as guard:
        fcntl.fcntl(guard.process.stderr or 0, fcntl.F_SETPIPE_SZ, 4096)
        client, server = await session(guard, backend)
        for _ in range(30):  # the first of them say more than the pipe holds
            other, its_server = await session(guard, backend)
            await its_server.send(COLUMNS)
            await other.expect(COLUMNS)
            await its_server.close()
            assert (await other.message()).fields["C"] == "08006"
            await other.close()
            with trio.fail_after(SECONDS):
                await converse(client, server)
        await client.close()
        await server.close()
        started = time.monotonic()
        guard.signal(signal.SIGTERM)
        with trio.fail_after(10):
            await until(lambda: os.waitid(os.P_PID, guard.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None)
        assert time.monotonic() - started < 5
        guard.end()


def test_a_storm_of_strangers_fills_neither_the_file_nor_the_screen(tmp_path: Path) -> None:
    """Each connects, sends eight bytes of nonsense and goes: 3.2 MB of records in eight seconds."""
    faults = tmp_path / "faults.jsonl"
    with spawned("host=127.0.0.1 port=1", "--faults", str(faults), cwd=tmp_path) as guard:
        began = time.monotonic()
        for _ in range(500):
            with socket.create_connection(("127.0.0.1", guard.port)) as sock:
                sock.sendall(b"nonsense")
                assert sock.recv(1) == b""
        seconds = time.monotonic() - began
        guard.signal(signal.SIGTERM)
        said = guard.end()
    records = [json.loads(line) for line in faults.read_text().splitlines()]
    assert sum(1 + record["suppressed"] for record in records) == 500
    causes = {record["cause"] for record in records}
    assert len(causes) <= 3, "one, or by whether it was found out in time which program it is"
    assert len(records) <= len(causes) * (5 + seconds + 5 + 2)
    assert "pgguard: 500 sessions, 500 faults from " in said
    assert len(said.splitlines()) < len(records) + 20


async def test_a_server_that_is_not_there_is_said_a_few_times_and_counted(tmp_path: Path) -> None:
    with spawned("host=127.0.0.1 port=1", cwd=tmp_path) as guard:
        for _ in range(100):
            client = await Client.connect(guard.port)
            await client.send(startup())
            assert (await client.message()).fields["C"] == "08001"
            await client.close()
        guard.signal(signal.SIGTERM)
        said = guard.end()
    lines = [line for line in said.splitlines() if "could not connect" in line]
    counted = [int(found[1]) for line in lines if (found := re.match(r"pgguard: (\d+) more times? in", line))]
    assert len(lines) < 20
    assert len(lines) - len(counted) + sum(counted) == 100


async def test_standard_error_that_is_closed_ends_nothing(backend: FakeBackend, tmp_path: Path) -> None:
    with spawned(upstream(backend), cwd=tmp_path) as guard:
        guard.hang_up()
        client, server = await session(guard, backend)
        await server.send(COLUMNS)
        await client.expect(COLUMNS)
        await converse(client, server)
        await client.close()
        await server.close()
        guard.signal(signal.SIGTERM)
        assert guard.status() == 0


async def test_a_client_that_is_killed(backend: FakeBackend, tmp_path: Path) -> None:
    with spawned(upstream(backend), cwd=tmp_path) as guard:
        pid = os.fork()
        if pid == 0:
            with socket.create_connection(("127.0.0.1", guard.port)) as sock:
                sock.sendall(startup() + query("select pg_sleep(60)"))
                signal.pause()
            os._exit(0)
        try:
            server = await backend.accept()
            await server.log_in()
            await server.expect(query("select pg_sleep(60)"))
        finally:
            os.kill(pid, signal.SIGKILL)
            await trio.to_thread.run_sync(os.waitpid, pid, 0)
        assert await server.rest() == b""
        await server.close()
        guard.wait_for("SUMMARY: pgguard: unclean-close")
        guard.signal(signal.SIGTERM)
        guard.end()


@pytest.mark.parametrize("by", ["option", "environment", "file"])
async def test_it_says_where_a_url_leads_and_no_password(backend: FakeBackend, tmp_path: Path, by: str) -> None:
    backend.close()
    url = f"postgresql+asyncpg://app:s3cret@127.0.0.1:{backend.port}/app?password=s3cret"
    in_environment = url if by == "environment" else ""
    if by == "file":
        (tmp_path / "pgguard.toml").write_text(f'upstream = "{url}"\n')
    given = url if by == "option" else None
    with spawned(given, cwd=tmp_path, PGPASSWORD="s3cret", PGGUARD_UPSTREAM=in_environment) as guard:
        source = rf"; settings are from {tmp_path}/pgguard\.toml" if by == "file" else ""
        guard.wait_for(rf"pgguard: PostgreSQL is at 127\.0\.0\.1:{backend.port}{source}\npgguard: ready on ")
        client = await Client.connect(guard.port)
        await client.send(startup())
        refusal = (await client.message()).fields["M"]
        assert refusal == f"pgguard: could not connect to the server: 127.0.0.1:{backend.port}: Connection refused"
        await client.close()
        guard.wait_for("Connection refused")
        assert b"s3cret" not in guard._said
