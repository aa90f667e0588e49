"""A guard that stands in front of itself: found however that came about, and it multiplies no connections."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import pytest
import trio

from tests.proxy.conftest import running, until
from tests.proxy.fake_backend import converse
from tests.proxy.messages import SECONDS, Client, startup
from tests.proxy.spawned import run, spawned
from tests.servers import not_installed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.proxy.fake_backend import FakeBackend


def free_port(host: str = "127.0.0.1") -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("listen", "host"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("127.0.0.1", "localhost"),
        ("127.0.0.1", "0"),
        ("127.0.0.1", "0.0.0.0"),
        ("127.0.0.1", "127.1"),
        ("127.0.0.1", "::ffff:127.0.0.1"),
        ("127.0.0.1", "192.0.2.1,127.0.0.1"),
        ("127.0.0.2", "127.0.0.2"),
        ("0.0.0.0", "127.0.0.3"),
        ("0.0.0.0", socket.gethostname()),
        ("::1", "::1"),
        ("::1", "::"),
        ("::", "::1"),
    ],
)
async def test_by_whatever_name_it_goes(listen: str, host: str) -> None:
    port = free_port(listen)
    address = f"[{listen}]:{port}" if ":" in listen else f"{listen}:{port}"
    async with running(upstream=f"host={host} port={port}", listen=[address]) as house:
        found = await house.guard.find_loop()
    assert found is not None
    assert found.startswith("--upstream ")
    assert found.endswith(": that is where pgguard itself listens: name PostgreSQL's own address")


@pytest.mark.parametrize("how", ["plain", "symlink", "dots", "abstract"])
async def test_by_whatever_path_it_goes(short_directory: Path, how: str) -> None:
    (short_directory / "link").symlink_to(short_directory)
    directory = f"@{short_directory}" if how == "abstract" else str(short_directory)
    spelled = {"symlink": f"{directory}/link", "dots": f"{directory}/link/../{short_directory.name}/."}
    upstream = f"host={spelled.get(how, directory)} port=7"
    async with running(upstream=upstream, listen=[f"unix:{directory}:7"]) as house:
        found = await house.guard.find_loop()
    assert found is not None
    assert "that is where pgguard itself listens" in found


async def test_the_same_port_on_another_address_is_another_server(backend: FakeBackend) -> None:
    """It gets a CancelRequest for the pid of nobody, which servers ignore; clients' own are passed on as ever."""
    async with running(backend, listen=[f"127.0.0.2:{backend.port}"]) as house:
        found: list[str | None] = []

        async def look() -> None:
            found.append(await house.guard.find_loop())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            await backend.close_mark()
        assert found == [None]


@pytest.mark.parametrize("server", ["away", "silent", "garbage"])
async def test_a_server_that_does_not_answer_is_no_loop(
    backend: FakeBackend, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgguard.proxy.loops._SECONDS", 0.3)
    async with running(backend) as house:
        if server == "away":
            backend.close()
        async with trio.open_nursery() as nursery:
            if server == "garbage":

                @nursery.start_soon
                async def talk() -> None:
                    sock, _ = await backend._socket.accept()
                    await sock.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                    sock.close()

            with trio.fail_after(SECONDS):
                assert await house.guard.find_loop() is None


def test_it_does_not_start(tmp_path: Path) -> None:
    port = free_port()
    ended = run("serve", "--upstream", f"host=localhost port={port}", "--listen", f"127.0.0.1:{port}", cwd=tmp_path)
    assert ended.returncode == 2
    lines = ended.stderr.splitlines()
    assert lines[-1] == (
        f"pgguard: --upstream localhost:{port}: that is where pgguard itself listens: name PostgreSQL's own address"
    )
    assert "Traceback" not in ended.stderr
    assert "ready on" not in ended.stderr


@pytest.mark.parametrize("guards", [2, 3])
async def test_a_ring_of_guards(backend: FakeBackend, tmp_path: Path, guards: int) -> None:
    """The one that would close it doesn't start, and names the one before it; the others go on."""
    last = free_port()
    with spawned(f"host=127.0.0.1 port={last}", cwd=tmp_path) as first:
        if guards == 2:
            await closes_ring(first.port, last, first.pid, tmp_path)
        else:
            with spawned(f"host=127.0.0.1 port={first.port}", cwd=tmp_path) as second:
                await closes_ring(second.port, last, first.pid, tmp_path)
                second.signal(signal.SIGTERM)
                second.end()
        client = await Client.connect(first.port)
        backend.keep(client)
        await client.send(startup())
        assert (await client.message()).fields["M"].endswith(": Connection refused")
        first.signal(signal.SIGTERM)
        first.end()


async def closes_ring(upstream: int, port: int, before: int, cwd: Path) -> None:
    arguments = "serve", "--upstream", f"host=127.0.0.1 port={upstream}", "--listen", f"127.0.0.1:{port}"
    ended = await trio.to_thread.run_sync(lambda: run(*arguments, cwd=cwd))
    assert ended.returncode == 2, ended.stderr
    said = ended.stderr.splitlines()[-1]
    assert f"it leads back to 127.0.0.1:{port}, where pgguard itself listens, through pid {before} (" in said
    assert "ready on" not in ended.stderr


class Forwarder:
    """Passes connections on, to whatever port it is told to at the moment."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.connections = 0
        self.port = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listener.socket.getsockname()[1]
        task_status.started()
        await trio.serve_listeners(self._forward, [listener])

    async def _forward(self, client: trio.SocketStream) -> None:
        self.connections += 1
        try:
            server = await trio.open_tcp_stream("127.0.0.1", self.target)
        except OSError:
            await client.aclose()
            return
        async with client, server, trio.open_nursery() as nursery:
            nursery.start_soon(self._pump, client, server)
            nursery.start_soon(self._pump, server, client)

    @staticmethod
    async def _pump(source: trio.SocketStream, sink: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for data in source:
                await sink.send_all(data)
            await sink.send_eof()


async def test_one_that_comes_about_later(backend: FakeBackend, nursery: trio.Nursery, tmp_path: Path) -> None:
    """Clients are told, connections stay few, and when it is gone the guard serves again by itself."""
    forwarder = Forwarder(backend.port)
    await nursery.start(forwarder.run)
    with spawned(f"host=127.0.0.1 port={forwarder.port} sslmode=disable", cwd=tmp_path) as guard:
        await converse(*await backend.session(guard.port))
        before = forwarder.connections
        forwarder.target = guard.port
        for _ in range(3):
            client = await Client.connect(guard.port)
            backend.keep(client)
            await client.send(startup())
            fields = (await client.message()).fields
            assert fields["C"] == "08001"
            assert f"leads back to 127.0.0.1:{guard.port}, where pgguard itself listens" in fields["M"]
        assert forwarder.connections - before < 400
        await trio.to_thread.run_sync(guard.wait_for, "clients are refused until this is corrected: ")
        await until(lambda: guard.descriptors() < 40)
        forwarder.target = backend.port
        await trio.sleep(1.1)
        await converse(*await backend.session(guard.port))
        nursery.cancel_scope.cancel()
        guard.signal(signal.SIGTERM)
        guard.end()


async def test_cancel_requests_in_a_loop(backend: FakeBackend, nursery: trio.Nursery, tmp_path: Path) -> None:
    """They need no login to go round."""
    forwarder = Forwarder(backend.port)
    await nursery.start(forwarder.run)
    with spawned(f"host=127.0.0.1 port={forwarder.port} sslmode=disable", cwd=tmp_path) as guard:
        await backend.close_mark()
        forwarder.target = guard.port
        before = forwarder.connections
        client = await Client.connect(guard.port)
        backend.keep(client)
        await client.send(bytes.fromhex("00000010 04d2162e 00000001 12345678"))
        await trio.to_thread.run_sync(guard.wait_for, "clients are refused until this is corrected: ")
        await client.close()
        assert forwarder.connections - before < 400
        await until(lambda: guard.descriptors() < 40)
        nursery.cancel_scope.cancel()
        guard.signal(signal.SIGTERM)
        guard.end()


@contextmanager
def pooler(directory: Path, target: int) -> Iterator[int]:
    """A pgbouncer in front of a port; yields its own. It refuses to run as root."""
    program = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
    if program is None:
        not_installed("pgbouncer")
    port = free_port()
    directory.chmod(0o755)
    configuration = directory / "pgbouncer.ini"
    configuration.write_text(
        f"[databases]\n* = host=127.0.0.1 port={target} user=postgres\n[pgbouncer]\nlisten_addr = 127.0.0.1\n"
        f"listen_port = {port}\nunix_socket_dir =\nauth_type = any\nserver_connect_timeout = 1\n"
        "server_login_retry = 1\nclient_login_timeout = 4\n"
    )
    user = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"] if os.geteuid() == 0 else []
    with subprocess.Popen([*user, program, "-q", str(configuration)]) as process:
        try:
            yield port
        finally:
            process.kill()


async def test_by_way_of_a_pooler_which_passes_no_mark_on(short_directory: Path) -> None:
    """It logs in on its own account. One login after the other comes round, as it makes no second one meanwhile.

    Clients get its own words when it has given up; one a second goes on to come round for as long as it is waited for.
    """
    port = free_port()
    with pooler(short_directory, port) as upstream:
        where = f"host=127.0.0.1 port={upstream}"
        with spawned(where, cwd=short_directory, listen=f"127.0.0.1:{port}") as guard:
            before = guard.descriptors()
            most = 0
            clients = [await Client.connect(port) for _ in range(10)]
            for client in clients:
                await client.send(startup(user="postgres", database="postgres"))
            said: list[bytes] = []

            async def listen(client: Client) -> None:
                said.append(await client.rest())
                await client.close()

            async with trio.open_nursery() as listening:
                for client in clients:
                    listening.start_soon(listen, client)
                while len(said) < len(clients):
                    most = max(most, guard.descriptors())
                    await trio.sleep(0.02)
            assert all(b"08P01" in words and b"(server down)" in words for words in said), said
            assert most <= before + 2 * len(clients) + 2 * 8
            await until(lambda: guard.descriptors() <= before + 2 * 8)
            for _ in range(2):
                guard.signal(signal.SIGTERM)
                await trio.sleep(0.2)
            guard.end()
