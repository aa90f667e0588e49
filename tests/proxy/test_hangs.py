"""Clients that make whoever looks at them hang: the guard looks at others, and ends when it is told to."""

from __future__ import annotations

import signal
from pathlib import Path

import trio

from tests.attribution.puppets import Puppet
from tests.hung_files import hung_files
from tests.proxy.fake_backend import FakeBackend
from tests.proxy.messages import ANSWER, COLUMNS, LOGGED_IN, Client, query, startup
from tests.proxy.spawned import Spawned, spawned


async def _log_in(guard: Spawned, backend: FakeBackend, puppet: Puppet) -> None:
    """Have a process log in."""
    hello = startup().hex()
    puppet.do(f"c = socket.create_connection(('127.0.0.1', {guard.port})); c.sendall(bytes.fromhex('{hello}'))")
    server = await backend.accept()
    await server.log_in()
    assert puppet.do(f"c.recv({len(LOGGED_IN)}, socket.MSG_WAITALL).hex()") == LOGGED_IN.hex()


async def test_a_working_directory_that_never_answers(
    backend: FakeBackend, tmp_path: Path, short_directory: Path
) -> None:
    """Each of several processes in it is looked at as it connects; and who isn't in it is looked at all the same."""
    faults = tmp_path / "faults.jsonl"
    with (
        hung_files(short_directory) as files,
        Puppet() as first,
        Puppet() as second,
        spawned(f"host=127.0.0.1 port={backend.port} sslmode=disable", "--faults", str(faults), cwd=tmp_path) as guard,
    ):
        for puppet in first, second:
            # It must not look for modules there itself.
            puppet.do(f"sys.path[:] = [path for path in sys.path if path]; os.chdir({str(files.directory)!r})")
            await _log_in(guard, backend, puppet)
        await trio.to_thread.run_sync(files.wait_until_asked)
        client = await Client.connect(guard.port)
        await client.send(startup() + query("select 1"))
        server = await backend.accept()
        await server.log_in()
        await server.expect(query("select 1"))
        await server.send(ANSWER)
        await client.expect(LOGGED_IN + ANSWER)
        await server.send(COLUMNS)
        await client.expect(COLUMNS)
        guard.wait_for("SUMMARY: pgguard: message-while-idle: ")
        await client.close()
        await server.close()
        guard.signal(signal.SIGTERM)
        guard.signal(signal.SIGTERM)
        said = guard.end()
    assert "opened the connection: the kernel named it when it connected" in said or "Opened by: pid " in said
