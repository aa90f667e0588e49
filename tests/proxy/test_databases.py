"""Several servers behind one guard, each with its own listeners."""

from __future__ import annotations

import json
import re
import signal
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import trio

from pgguard.faults.docket import Docket
from pgguard.proxy.errors import ConfigurationError
from pgguard.proxy.guard import Guard
from pgguard.proxy.settings import Reloaded, Settings, load_settings, reload_settings
from pgguard.reporting.sinks import Fanout
from tests.proxy.conftest import ListSink, until
from tests.proxy.fake_backend import FakeBackend, converse, part
from tests.proxy.messages import (
    BACKEND_PID,
    COLUMNS,
    SECRET,
    Client,
    cancel_request,
    message,
    query,
    startup,
)
from tests.proxy.spawned import run, spawned

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


class Street:
    """A guard in front of several fake servers."""

    def __init__(self, guard: Guard, backends: dict[str, FakeBackend], sink: ListSink, docket: Docket) -> None:
        self.guard = guard
        self.backends = backends
        self.faults = sink.faults
        self.docket = docket
        self.ports = {front.name: front.addresses[0].port for front in guard.fronts}

    async def connect(self, name: str) -> Client:
        return await self.backends[name].connect(self.ports[name])

    async def refused(self, name: str) -> None:
        """A client is refused for want of slots."""
        client = await self.connect(name)
        await client.send(startup())
        server = await self.backends[name].accept()
        await server.packet()
        fields = b"SFATAL\0VFATAL\0C53300\0Msorry, too many clients already\0RInitProcess\0\0"
        await server.send(message("E", fields))
        await server.close()
        await client.rest()
        await client.close()


@asynccontextmanager
async def street(shared: dict[str, Any] | None = None, /, **databases: dict[str, Any]) -> AsyncIterator[Street]:
    """Run a guard in front of servers without TLS, unless their entries say otherwise.

    Args:
        shared: settings of all.
        databases: those of each.
    """
    backends = {name: FakeBackend() for name in databases}
    for backend in backends.values():
        await backend.listen()
    entries = [
        {
            "name": name,
            "listen": "127.0.0.1:0",
            **more,
            "upstream": f"host=127.0.0.1 port={backends[name].port} {more.get('upstream', 'sslmode=disable')}",
        }
        for name, more in databases.items()
    ]
    sink, docket = ListSink(), Docket()
    settings = Settings.model_validate({"databases": entries, "shutdown_timeout": 1, **(shared or {})})
    guard = Guard(settings, sinks=Fanout([sink], complain=print), docket=docket, witness=None)
    await guard.listen()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(guard.serve)
        try:
            yield Street(guard, backends, sink, docket)
        finally:
            nursery.cancel_scope.cancel()
    for backend in backends.values():
        await backend.close_all()


async def test_each_client_comes_to_the_server_behind_its_listener() -> None:
    async with street(orders={}, users={}) as there:
        sessions = {name: await there.backends[name].session(port) for name, port in there.ports.items() if name}
        for client, server in sessions.values():
            await converse(client, server)
        assert [(one.facts.id, one.facts.through) for one in there.guard.snapshot()] == [(1, "orders"), (2, "users")]
        for client, server in sessions.values():
            await part(client, server)
        await until(lambda: not there.guard.snapshot())


async def test_a_cancel_request_goes_where_its_session_is() -> None:
    async with street(orders={}, users={}) as there:
        client = await there.connect("users")
        await client.send(cancel_request(BACKEND_PID, SECRET))
        server = await there.backends["users"].accept()
        assert await server.packet() == cancel_request(BACKEND_PID, SECRET)
        await server.close()
        await there.backends["orders"].accept_nobody()


async def test_a_query_of_a_session_that_is_cut_off_is_cancelled_on_its_own_server() -> None:
    async with street(orders={}, users={"mode": "reject"}) as there:
        client, server = await there.backends["users"].session(there.ports["users"])
        await client.send(query("select 1"))
        await server.expect(query("select 1"))
        await server.send(message("3"))
        assert (await client.message()).fields["C"] == "08P01"
        canceller = await there.backends["users"].accept()
        assert await canceller.packet() == cancel_request(BACKEND_PID, SECRET)
        await canceller.close()


async def test_each_has_its_own_policy_and_each_fault_says_where_it_was() -> None:
    kinds = {"message-while-idle": "ignore"}
    async with street(orders={}, users={"mode": "reject"}, audit={"mode": "reject", "kinds": kinds}) as there:
        for name in there.backends:
            client, server = await there.backends[name].session(there.ports[name])
            await server.send(COLUMNS)
            if name == "users":
                assert (await client.message()).fields["C"] == "08P01"
            else:
                await client.expect(COLUMNS)
        await until(lambda: len(there.faults) == 2)
        assert [(one.session.through, str(one.action)) for one in there.faults] == [
            ("orders", "logged"),
            ("users", "rejected"),
        ]


async def test_one_server_that_is_full_is_not_the_other_one() -> None:
    """The same limit of another server is another cause; of the same it is the same, though nobody knows who."""
    async with street(orders={}, users={}) as there:
        for name in ("orders", "users", "orders"):
            await there.refused(name)
        await there.guard.settled()
        exhausted = [one for one in there.docket.causes() if one.fault.kind == "connection-exhaustion"]
        assert sorted((one.fault.session.through, one.spread.times) for one in exhausted) == [
            ("orders", 2),
            ("users", 1),
        ]


async def test_a_server_that_is_down_is_one_alone() -> None:
    async with street(orders={}, users={}) as there:
        there.backends["users"].close()
        client = await there.connect("users")
        await client.send(startup())
        assert "Connection refused" in (await client.message()).fields["M"]
        assert there.guard.server_answers == {"users": False}
        _, server = await there.backends["orders"].session(there.ports["orders"])
        assert server is not None
        assert there.guard.server_answers == {"users": False, "orders": True}


async def test_from_one_listener_to_another_is_no_loop() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    chained = {"upstream": f"host=127.0.0.1 port={port}"}

    async def ignore_marks(backend: FakeBackend) -> None:
        for _ in range(2):  # of each database one comes here
            await backend.close_mark()

    users = {"listen": f"127.0.0.1:{port}"}
    async with street(orders=chained, users=users) as there, trio.open_nursery() as nursery:
        nursery.start_soon(ignore_marks, there.backends["users"])
        assert await there.guard.find_loop() is None


def config(directory: Path, backends: dict[str, FakeBackend], more: str = "", each: str = "") -> None:
    entries = [
        f'[[databases]]\nname = "{name}"\nlisten = "127.0.0.1:0"\n{each}\n'
        f'upstream = "host=127.0.0.1 port={one.port} sslmode=disable"\n'
        for name, one in backends.items()
    ]
    (directory / "pgguard.toml").write_text(f"{more}\n{''.join(entries)}")


async def test_a_process_with_two(backend: FakeBackend, tmp_path: Path) -> None:
    """What it says as it starts, of a fault, when it is told to reload, and in the end."""
    other = FakeBackend()
    await other.listen()
    backends = {"orders": backend, "users": other}
    first = 'shutdown_timeout = 0.1\nattribution = "off"\nfaults = "faults.jsonl"'
    config(tmp_path, backends, first)
    with spawned(None, listen=None, cwd=tmp_path) as guard:
        port = int(guard.wait_for(r"database users: clients of 127\.0\.0\.1:(\d+) come to PostgreSQL at "))
        _, server = await other.session(port)
        await server.send(COLUMNS)
        guard.wait_for(r"SUMMARY: pgguard: message-while-idle: .* \(fault 1, session 1 through users\)()")
        config(tmp_path, backends | {"new": other}, first.replace("0.1", "0.2"), 'mode = "reject"')
        guard.signal(signal.SIGHUP)
        guard.wait_for(r"databases.users.mode is now reject \(was not set\)()")
        guard.wait_for("databases.new is new: restart pgguard to open it()")
        client, server = await other.session(port)
        await server.send(COLUMNS)
        assert (await client.message()).fields["C"] == "08P01"
        guard.signal(signal.SIGTERM)
        said = guard.end()
    assert "pgguard: 2 databases; settings are from " in said
    assert f"come to PostgreSQL at 127.0.0.1:{backend.port}\n" in said
    assert "(fault 1, through users)\n" in said
    records = [json.loads(line) for line in (tmp_path / "faults.jsonl").read_text().splitlines()]
    assert {one["session"]["through"] for one in records} == {"users"}
    await other.close_all()


def test_a_loop_through_one_of_them(tmp_path: Path) -> None:
    (tmp_path / "pgguard.toml").write_text(
        '[[databases]]\nname = "a"\nupstream = "host=127.0.0.1 port=6599"\nlisten = "127.0.0.1:6598"\n'
        '[[databases]]\nname = "b"\nupstream = "host=127.0.0.1 port=6598"\nlisten = "127.0.0.1:6599"\n'
    )
    done = run("serve", cwd=tmp_path)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]  # a guard that is found out late has said that it is ready
    assert re.match(r"pgguard: databases\.[ab]\.upstream 127\.0\.0\.1:659\d: .*where pgguard itself listens", last)


ENTRY = '[[databases]]\nname = "{}"\nupstream = "{}"\nlisten = "{}"\n'
A = ENTRY.format("a", "host=h", "127.0.0.1:1")


def checked() -> None:
    settings = load_settings({}, None)
    settings.policies()
    settings.fronts()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (ENTRY.format("a b", "host=h", "127.0.0.1:1"), "databases.1.name should be a name of letters, digits"),
        (ENTRY.format("", "host=h", "127.0.0.1:1"), "databases.1.name should be a name of letters"),
        (ENTRY.format("b", "", "127.0.0.1:1"), "databases.b.upstream should say where PostgreSQL is"),
        (A + ENTRY.format("b", "host", "127.0.0.1:1"), 'databases.b: upstream: missing "=" after "host"'),
        (A + ENTRY.format("b", "host=h", "6544"), "databases.b: listen 6544: write HOST:PORT"),
        (A + ENTRY.format("a", "host=h", "127.0.0.1:2"), "databases.a: there are two of this name"),
        (A + ENTRY.format("b", "host=h", "127.0.0.1:1"), "databases.b: listen 127.0.0.1:1: a listens there too"),
        (A + 'mode = "rejetc"', "databases.a.mode should be 'log' or 'reject', not 'rejetc': did you mean reject?"),
        (A + 'upsteram = "x"', "databases.a.upsteram: there is no such setting: did you mean upstream?"),
        (A + 'sql = "none"', "databases.a.sql: there is no such setting: remove it. The settings are kinds, listen,"),
        (A + 'kinds = {unclean-close = "drop"}', "databases.a.kinds: unclean-close can't be dropped"),
        (A + 'kinds = {unclean-clsoe = "log"}', "databases.a.kinds.unclean-clsoe: there is no such kind of fault: did"),
        (A + "listen = 5", "it is not valid TOML"),
        ('[[databases]]\nname = "a"\nlisten = "127.0.0.1:1"', "databases.a.upstream is missing: each of [[databases]]"),
        ('[[databases]]\nupstream = "host=h"\nlisten = "127.0.0.1:1"', "databases.1.name is missing: each of"),
        ("databases = 5", "databases should be a table for each database, as in [[databases]], not 5"),
        ("databases = [5]", "databases.1 should be a table for each database, as in [[databases]], not 5"),
        ("[databases]\nname = 'a'", "databases should be a table for each database, as in [[databases]]"),
        (f"upstream = 'host=h'\n{A}", "pgguard.toml: upstream: [[databases]] says it for each database: leave it out"),
        (f"listen = '127.0.0.1:1'\n{A}", "pgguard.toml: listen: [[databases]] says it for each database"),
        (ENTRY.format("a", "host=h\\u0000", "127.0.0.1:1"), "databases holds a NUL character"),
        (ENTRY.format("a", "host=h password=hunter2 x", "127.0.0.1:1"), 'databases.a: upstream: a "=" is missing'),
    ],
)
def test_an_entry_that_is_wrong(text: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pgguard.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError) as raised:
        checked()
    said = str(raised.value)
    assert says in said
    assert "\n" not in said
    assert "hunter2" not in said


def test_a_listener_that_can_not_be_opened_is_named_as_it_is_written(tmp_path: Path) -> None:
    text = "[[databases]]\nname = 'audit'\nupstream = 'host=127.0.0.1 port=1'\nlisten = 'unix:/no/such'\n"
    (tmp_path / "pgguard.toml").write_text(text)
    done = run("serve", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "pgguard: databases.audit.listen unix:/no/such:5432: No such file or directory: create"
    )


def test_what_is_typed_contradicts_them(tmp_path: Path) -> None:
    (tmp_path / "pgguard.toml").write_text(A)
    for name, value in (("upstream", "host=h"), ("listen", ["127.0.0.1:1"])):
        settings = load_settings({name: value}, tmp_path / "pgguard.toml")
        with pytest.raises(ConfigurationError) as raised:
            settings.fronts()
        assert str(raised.value).startswith(f"--{name} or PGGUARD_{name.upper()}: [[databases]] says it for each")


def test_kinds_of_all_hold_for_each_but_for_its_own(tmp_path: Path) -> None:
    (tmp_path / "pgguard.toml").write_text(
        'mode = "reject"\nkinds = {unclean-close = "ignore", untracked = "ignore"}\n'
        + A
        + 'mode = "log"\nkinds = {untracked = "log"}\n'
    )
    [(name, policy)] = load_settings({}, tmp_path / "pgguard.toml").policies().items()
    assert name == "a"
    assert policy.mode == "log"
    assert {str(kind): str(action) for kind, action in policy.per_kind.items()} == {
        "unclean-close": "ignore",
        "untracked": "log",
    }


def reloaded(directory: Path, before: str, after: str) -> Reloaded:
    file = directory / "pgguard.toml"
    file.write_text(before)
    current = load_settings({}, file)
    file.write_text(after)
    return reload_settings(current, {}, file)


def test_what_a_reload_changes_and_what_it_says_of_the_rest(tmp_path: Path) -> None:
    b = ENTRY.format("b", "host=h", "127.0.0.1:2")
    after = ENTRY.format("a", "host=other", "127.0.0.1:3") + 'mode = "reject"\nkinds = {untracked = "ignore"}\n'
    settings, remarks = reloaded(tmp_path, A + b, after + ENTRY.format("c", "host=h", "127.0.0.1:4"))
    assert [(one.name, one.upstream, one.mode) for one in settings.databases] == [
        ("a", "host=h", "reject"),
        ("b", "host=h", None),
    ]
    assert remarks == [
        "databases.a.mode is now reject (was not set)",
        "databases.a.kinds.untracked is now ignore (was not set)",
        "databases.a.upstream stays as it is: restart pgguard to change it",
        "databases.a.listen stays as it is: restart pgguard to change it",
        "databases.b stays: restart pgguard to close it",
        "databases.c is new: restart pgguard to open it",
    ]
    assert reloaded(tmp_path, A + b, A + b).remarks == []
