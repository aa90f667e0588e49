"""Whatever is called beyond the relay may raise: bytes, sessions, the guard and the record stand it.

Which calls that are is found out by watching the plays below run (:mod:`tests.proxy.crossings`). Then each is made to
fail, once and every time, in the shortest play in which it is made. What none of them comes across, and nothing
protects where it stands, is an omission, and fails as well.
"""

from __future__ import annotations

import ast
import errno
import os
import socket
import ssl
import struct
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, cast

import psycopg
import pytest
import trio

import pgguard
from pgguard.attribution.ebpf.probe import SenderProbe, connection_key
from pgguard.attribution.ebpf.programs import Kind as Report
from pgguard.attribution.ebpf.ring import Event
from pgguard.attribution.witness import Witness
from pgguard.compiled import form
from pgguard.proxy import losses
from pgguard.proxy.ends import Phase
from pgguard.proxy.session import ProxiedSession
from pgguard.proxy.sockets import accept
from tests.proxy.conftest import House, running
from tests.proxy.crossings import Crossing, Injected, Watcher, failing, unprotected_sites
from tests.proxy.fake_backend import BackendConnection, FakeBackend
from tests.proxy.messages import (
    ANSWER,
    COLUMNS,
    GSSENC_REQUEST,
    LOGGED_IN,
    READY,
    SECONDS,
    SELECTED,
    SSL_REQUEST,
    TERMINATE,
    Client,
    cancel_request,
    message,
    query,
    startup,
)
from tests.proxy.test_scram import EDITED, OFFER, UNBOUND
from tests.proxy.tls_client import connect_tls
from tests.proxy.tls_peers import Peer as TlsPeer
from tests.servers import Address, Server, installations, not_installed, running_server

if TYPE_CHECKING:
    from types import CodeType

ORIGIN: Final = 7
FIRST, SECOND, THIRD = query("select 1"), query("select 2"), query("select 3")
IN_TRANSACTION: Final = SELECTED + message("Z", b"T")
REFUSAL: Final = message("E", b"SFATAL\0VFATAL\0C53300\0Msorry\0Fproc.c\0L1\0RInitProcess\0\0")
LET_GO: Final = message("E", b"SFATAL\0VFATAL\0C57P01\0Mterminating connection\0\0")

SYNC: Final = message("S")

UNTRACKED: Final = "untracked"
SEEN_ON_THE_WIRE: Final = {
    "message-while-idle",
    "unexpected-response",
    "request-while-busy",
    "protocol-violation",
    "connection-exhaustion",
}
"""Kinds for which it need not even be known who sends."""

SHORT: Final = {
    "watch._EARLY_INTERVAL": 0.01,
    "watch._HEIRS_INTERVAL": 0.02,
    "watch._LASTING": 0.0,
    "watch._READERS_INTERVAL": 0.01,
    "watch._YOUNG_SOLITUDE": 0.0,
    "watch._SOLITUDE": 0.0,
    "watch.UNUSED": 0.02,
    "watch.PATIENCE": 0.0,
    "watch.SERVERS_PATIENCE": 0.0,
    "watch._IDLE_INTERVAL": 0.01,
    "unread._TICK": 0.005,
    "unread._TICK_REPORTED": 0.005,
    "unread._FIRST": 0.005,
    "unread._FIRST_REPORTED": 0.005,
    "unread._LEAST_INTERVAL": 0.005,
    "aftermath._ALONE": 0.01,
    "declined._SECOND_TRY": 0.02,
    "aftermath._LINGER": 0.05,
    "judging._APART": 0.01,
    "aftermath._SILENCE": 0.02,
    "aftermath._HEARING": 0.1,
    "investigation._WAITING_BUDGET": 0.001,
    "investigation._COMING_BUDGET": 0.001,
    "investigation._RETURNING": 0.0,
    "investigation._STAYING_BUDGET": 0.001,
    "investigation._ENDING_BUDGET": 0.001,
    "reception._LAST_CANCEL": 0.05,
    "registrar._PAUSE": 0.01,
    "registrar._LONGEST_PAUSE": 0.01,
    "judge._SAMPLING_BUDGET": 0.002,
    "losses._PAUSE": 0.01,
}
"""How long things take in the guard, so that a scenario is over soon."""


class Probe:
    """Reports who sends as the test says."""

    limits: tuple[str, ...] = ()
    lost = 0

    def __init__(self) -> None:
        self._events: list[Event] = []
        self.went: list[int] = []
        """By ticket, of which the first is 1, how far its sender has gone on."""

    def say(
        self,
        key: bytes,
        kind: Report,
        who: int,
        position: int = 0,
        size: int = 0,
        read: int = 0,
        received: int = 0,
        *,
        ticket: int = 0,
    ) -> None:
        reached = self.went[ticket - 1] if ticket else 0
        self._events.append((position, size, kind, who, who, ORIGIN, ticket, key, read, received, reached))

    def read(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def reached(self, ticket: int) -> int:
        return self.went[ticket - 1]

    def glance(self, ticket: int) -> int:
        return -1 if self._events else self.went[ticket - 1] if ticket else 0

    def add(self, *_: Any) -> None:
        pass

    def release(self, _: int) -> None:
        pass


class NamedClient(Client):
    """A client of which the kernel says who sends."""

    def __init__(self, stream: trio.SocketStream, key: bytes, probe: Probe) -> None:
        super().__init__(stream)
        self.key = key
        self.probe = probe
        self.probe.went.append(0)
        self.ticket = len(self.probe.went)
        self.sender = 0
        self.sent = 0

    async def send(self, data: bytes, *who: int) -> None:
        """Send; with several senders, a part of it each."""
        size = len(data) // max(1, len(who))
        for n, pid in enumerate(who or (os.getpid(),)):
            last = n + 1 >= len(who)
            part = len(data) - n * size if last else size
            if pid != self.sender:
                self.probe.say(self.key, Report.SENDING, pid, self.sent, part, ticket=self.ticket)
                self.sender = pid
            self.sent += part
            self.probe.went[self.ticket - 1] = self.sent
        await super().send(data)


@dataclass
class Stage:
    """What a scenario works with, and what it has come to."""

    house: House
    child: int
    """A process that has the sockets open that it was given: an heir."""
    probe: Probe | None
    patch: pytest.MonkeyPatch
    patience: float
    """Seconds to wait for what may not come."""
    heard: list[bytes] = field(default_factory=list)
    """What clients and servers got, one after the other."""

    async def connect(self, *, unix: bool = False) -> Client:
        if unix or self.probe is None:
            return await self.house.connect(unix=unix)
        sock = trio.socket.socket()
        await sock.bind(("127.0.0.1", 0))
        here, there = sock.getsockname(), ("127.0.0.1", self.house.port)
        accepted = SimpleNamespace(getpeername=lambda: here, getsockname=lambda: there)
        key = connection_key(cast("socket.socket", accepted))
        self.probe.say(key, Report.OPENED, os.getpid())
        self.probe.say(key, Report.ACCEPTED, os.getpid(), read=1)
        self.probe.say(key, Report.WATCHED, os.getpid(), position=1)
        await sock.connect(there)
        client = NamedClient(trio.SocketStream(sock), key, self.probe)
        self.house.backend.keep(client)
        return client

    async def session(self, *, unix: bool = False) -> tuple[Client, BackendConnection]:
        client = await self.connect(unix=unix)
        await client.send(startup())
        server = await self.house.backend.accept()
        await server.log_in()
        await self.hears(client, LOGGED_IN)
        return client, server

    async def hears(self, who: Client | BackendConnection, expected: bytes) -> None:
        await who.expect(expected)
        self.heard.append(expected)

    async def ends(self, who: Client | BackendConnection) -> None:
        """It gets the end of its stream, and nothing before."""
        assert await who.rest() == b""

    async def converse(self, client: Client, server: BackendConnection, request: bytes = FIRST) -> None:
        await client.send(request)
        await self.hears(server, request)
        await server.send(ANSWER)
        await self.hears(client, ANSWER)

    async def recorded(self, *kinds: str) -> None:
        """Wait until a fault of one of these kinds has been entered; that needs no evidence of some, and comes then.

        Whether it has been recorded is looked at in the end.
        """
        seconds = SECONDS if SEEN_ON_THE_WIRE & {*kinds} else self.patience
        await self.until(lambda: bool({*kinds, UNTRACKED} & self.entered), seconds)

    @property
    def entered(self) -> set[str]:
        """The kinds of faults that have been counted or recorded."""
        return {str(count.kind) for count in self.house.docket.counts()} | {*self.house.kinds}

    async def until(self, condition: Callable[[], bool], seconds: float | None = None) -> None:
        """Wait, but not for long: something may have failed."""
        with trio.move_on_after(self.patience if seconds is None else seconds):
            while not condition():  # noqa: ASYNC110 - nobody is told
                await trio.sleep(0.002)

    @property
    def is_untracked(self) -> bool:
        return UNTRACKED in self.house.kinds


Scenario = Callable[[Stage], Awaitable[None]]


@dataclass(frozen=True)
class Play:
    """A scenario, and the guard that it takes."""

    scenario: Scenario
    probe: bool
    witness: bool
    settings: dict[str, Any]

    def __str__(self) -> str:
        return self.scenario.__name__


PLAYS: Final[list[Play]] = []


def play(*, probe: bool = False, witness: bool = True, **settings: Any) -> Callable[[Scenario], Scenario]:
    def register(scenario: Scenario) -> Scenario:
        PLAYS.append(Play(scenario, probe, witness, settings))
        return scenario

    return register


@play(witness=False)
async def without_attribution(stage: Stage) -> None:
    client, server = await stage.session()
    await stage.converse(client, server)
    await server.send(COLUMNS)
    await stage.hears(client, COLUMNS)
    await stage.converse(client, server)
    await server.send(COLUMNS[:3])
    await server.send(COLUMNS[3:])
    await stage.hears(client, COLUMNS)
    other, its_server = await stage.session()
    nonsense = b"\0\0\0\0\0" * 3
    for _ in range(2):
        await its_server.send(nonsense)
        await stage.hears(other, nonsense)
    await client.send(TERMINATE)
    await stage.hears(server, TERMINATE)
    await server.close()
    await stage.ends(client)


@play(witness=False)
async def more_than_is_kept_account_of(stage: Stage) -> None:
    """A client asks more than the ledger holds, and isn't read until some of it has been answered."""
    for name, value in {"FEW": 2, "_MOST_ENTRIES": 8, "_MOST_REQUESTS": 8}.items():
        stage.patch.setattr(f"pgguard.session.session.{name}", value)
    stage.patch.setattr("pgguard.proxy.relay.FEW", 2)
    for name in "_REQUESTS_AT_ONCE", "_REQUESTS_IN_DEPTH", "_ANSWERS_AT_ONCE":
        stage.patch.setattr(f"pgguard.proxy.relay.{name}", 3)
    client, server = await stage.session()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.send, SYNC * 40)
        for _ in range(10):
            await stage.hears(server, SYNC * 4)
            await server.send(READY * 4)
        await stage.hears(client, READY * 40)
    await stage.converse(client, server)


@play(probe=True)
async def two_processes(stage: Stage) -> None:
    """Two processes use a connection in turns, at once, in one chunk, and one of them ends it."""
    client, server = await stage.session()
    assert isinstance(client, NamedClient)
    await client.send(FIRST)
    await stage.hears(server, FIRST)
    await client.send(SECOND, stage.child)
    await stage.hears(server, SECOND)
    await stage.recorded("shared-by-processes")
    await server.send(ANSWER + ANSWER)
    await stage.hears(client, ANSWER + ANSWER)
    await stage.converse(client, server)
    await client.send(SECOND + THIRD, os.getpid(), stage.child)
    await stage.hears(server, SECOND + THIRD)
    await server.send(ANSWER + ANSWER)
    await stage.hears(client, ANSWER + ANSWER)
    assert stage.probe is not None
    stage.probe.say(client.key, Report.UNWATCHED, 0, size=errno.E2BIG)
    await stage.converse(client, server)


@play(probe=True)
async def two_processes_in_the_end(stage: Stage) -> None:
    """One of them ends the connection, and the other goes on."""
    client, server = await stage.session()
    assert isinstance(client, NamedClient)
    with heir(client) as child:
        await client.send(TERMINATE)
        await stage.hears(server, TERMINATE)
        await server.close()
        await stage.ends(client)
        await stage.until(lambda: bool(stage.house.guard._sweep._endings.aftermath._listened))
        await client.send(FIRST, child)
        await stage.recorded("shared-by-processes")
    client, server = await stage.session()
    assert isinstance(client, NamedClient)
    await client.send(TERMINATE, stage.child)
    await stage.hears(server, TERMINATE)
    await server.close()
    await stage.ends(client)


@play(probe=True, mode="reject")
async def two_processes_rejected(stage: Stage) -> None:
    client, server = await stage.session()
    assert isinstance(client, NamedClient)
    await client.send(FIRST)
    await stage.hears(server, FIRST)
    await server.send(COLUMNS[:7])
    await client.send(SECOND, stage.child)
    await stage.recorded("shared-by-processes", "request-while-busy")
    if "shared-by-processes" not in stage.entered | {UNTRACKED}:
        await server.expect(SECOND)  # that it is another process's isn't known
        return
    await server.send(COLUMNS[7:])
    await _is_rejected(stage, client, server, COLUMNS, SECOND)


async def _is_rejected(stage: Stage, client: Client, server: BackendConnection, before: bytes, withheld: bytes) -> None:
    """The client is told so, and the server doesn't get the message, unless the session isn't followed any more."""
    if stage.is_untracked:
        if "rejected" not in {str(fault.action) for fault in stage.house.faults}:
            await server.expect(withheld)
        return
    await client.expect(before)
    told = await client.message()
    assert told.fields["C"] == "08P01"
    await client.send(query("rollback"))
    assert await server.rest() == b""
    actions = {str(fault.action) for fault in stage.house.faults if fault.kind != "unclean-close"}
    assert actions <= {"rejected"}


@play(mode="reject")
async def out_of_place_rejected(stage: Stage) -> None:
    client, server = await stage.session(unix=True)
    await client.send(FIRST)
    await stage.hears(server, FIRST)
    out_of_place = message("p", b"out of place\0")
    await client.send(out_of_place)
    await _is_rejected(stage, client, server, b"", out_of_place)


@play(kinds={"message-while-idle": "drop"})
async def dropped(stage: Stage) -> None:
    client, server = await stage.session(unix=True)
    for _ in range(2):
        await server.send(COLUMNS)
        await stage.recorded("message-while-idle")
        if stage.is_untracked or "message-while-idle" not in stage.entered:
            return
    await stage.converse(client, server)


@play()
async def an_heir(stage: Stage) -> None:
    """Somebody inherits a connection, over a Unix socket, and over TCP; the server ends one, the client another."""
    client, server = await stage.session()
    with heir(client), heir(client):
        await stage.recorded("inherited-connection")
        session = max(stage.house.guard._sessions.values(), key=lambda one: one.id)
        session.client.contest(True)
        await stage.converse(client, server)
        await stage.converse(client, server)
        await client.send(TERMINATE)
        await stage.hears(server, TERMINATE)
        await server.close()
        await stage.ends(client)
        await stage.until(lambda: session.phase is Phase.LINGERING)
        await client.send(FIRST)


@contextmanager
def heir(client: Client) -> Iterator[int]:
    """A process that has a client's socket open as well."""
    fd = client.stream.socket.fileno()
    process = subprocess.Popen(["sleep", "60"], pass_fds=[fd], stdin=subprocess.DEVNULL)
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


RECORD: Final = 22
"""Bytes that a record of TLS 1.3 has beyond what it says."""


@dataclass
class Encrypted:
    """A session with TLS on both sides, of which the handshakes are over."""

    stage: Stage
    client: NamedClient
    server: BackendConnection
    theirs: TlsPeer
    """What the client speaks TLS with."""
    servers: TlsPeer

    async def client_hears(self, expected: bytes) -> None:
        assert self.theirs.hear(await self.client.receive(len(expected) + RECORD)) == expected
        self.stage.heard.append(expected)

    async def server_hears(self, expected: bytes) -> None:
        assert self.servers.hear(await self.server.receive(len(expected) + RECORD)) == expected
        self.stage.heard.append(expected)

    async def server_sends(self, data: bytes) -> None:
        await self.server.send(self.servers.say(data))

    async def converse(self) -> None:
        await self.client.send(self.theirs.say(FIRST))
        await self.server_hears(FIRST)
        await self.server_sends(ANSWER)
        await self.client_hears(ANSWER)


async def encrypted(stage: Stage, *, logs_in: bool = True) -> Encrypted:
    theirs, servers = TlsPeer(server_side=False), TlsPeer(server_side=True)
    connect = ProxiedSession.connect

    def connecting(session: ProxiedSession, *args: Any, **kwargs: Any) -> None:
        connect(session, *args, **kwargs | {"client_tls": theirs.tls, "server_tls": servers.tls})

    with stage.patch.context() as patch:
        patch.setattr("pgguard.proxy.session.ProxiedSession.connect", connecting)
        client = await stage.connect()
        await client.send(startup())
        server = await stage.house.backend.accept()
        assert isinstance(client, NamedClient)
        session = Encrypted(stage, client, server, theirs, servers)
        await session.server_hears(startup())
    if logs_in:
        await session.server_sends(LOGGED_IN)
        await session.client_hears(LOGGED_IN)
        await session.converse()
    return session


@play(probe=True)
async def by_scram_with_tls(stage: Stage) -> None:
    """What is edited of a login comes in pieces."""
    session = await encrypted(stage, logs_in=False)
    await session.server_sends(OFFER[:7])
    await session.server_sends(OFFER[7:])
    await session.client_hears(EDITED)
    await session.client.send(session.theirs.say(UNBOUND[:3]))
    await session.client.send(session.theirs.say(UNBOUND[3:]))
    await session.server_hears(UNBOUND)
    await session.server_sends(LOGGED_IN)
    await session.client_hears(LOGGED_IN)
    await session.converse()
    other = await encrypted(stage, logs_in=False)
    await other.server_sends(OFFER[:7])
    await other.server.close()
    await other.client_hears(OFFER[:7])


@play(tls_cert="self-signed")
async def arriving_with_tls(stage: Stage) -> None:
    client, _ = await connect_tls(stage.house)
    await client.send(startup())
    server = await stage.house.backend.accept()
    await server.log_in()
    await stage.hears(client, LOGGED_IN)
    await stage.converse(client, server)
    plain = await stage.house.connect()
    await plain.send(SSL_REQUEST)
    await stage.hears(plain, b"S")
    await plain.send(startup())
    await stage.ends(plain)


@play(probe=True)
async def two_processes_with_tls(stage: Stage) -> None:
    """They send parts of one record, or one record each; or one has sent what the other has, and the stream breaks."""
    session = await encrypted(stage)
    raw = session.theirs.say(FIRST)
    await session.client.send(raw, os.getpid(), stage.child)
    await session.server_hears(FIRST)
    await stage.recorded("shared-by-processes")
    await session.server_sends(ANSWER)
    await session.client_hears(ANSWER)
    other = await encrypted(stage)
    await other.client.send(other.theirs.say(FIRST) + other.theirs.say(FIRST), os.getpid(), stage.child)
    await other.server_hears(FIRST)
    await other.server_sends(ANSWER)
    await other.client_hears(ANSWER)
    await other.server_hears(FIRST)
    await other.server_sends(LET_GO)
    await other.server.close()
    await other.client_hears(LET_GO)
    await session.client.send(raw, stage.child)
    await stage.ends(session.server)
    await session.server.close()
    await stage.recorded("tls-corruption")
    with pytest.raises(ssl.SSLError, match="bad record mac"):
        session.theirs.hear(await session.client.rest())


@play(probe=True)
async def two_processes_in_the_end_with_tls(stage: Stage) -> None:
    """One of them ends the connection, and the other goes on with a record that can't be read; or only ends TLS."""
    session = await encrypted(stage)
    with heir(session.client) as child:
        await session.client.send(session.theirs.say(TERMINATE) + session.theirs.end())
        await session.server_hears(TERMINATE)
        await session.server.close()
        await session.client.rest()
        await stage.until(lambda: bool(stage.house.guard._sweep._endings.aftermath._listened))
        await session.client.send(bytes([23, 3, 3, 0, 50]) + bytes(50), child)
        await stage.recorded("shared-by-processes")
    other = await encrypted(stage)
    await other.client.send(other.theirs.end(), stage.child)
    await stage.recorded("foreign-terminate", "unclean-close")
    await other.server.rest()
    await other.server.close()


@play(probe=True, mode="reject")
async def out_of_place_rejected_with_tls(stage: Stage) -> None:
    session = await encrypted(stage)
    await session.client.send(session.theirs.say(FIRST))
    await session.server_hears(FIRST)
    await session.server_sends(COLUMNS[:7])
    await session.client_hears(COLUMNS[:7])
    await session.client.send(session.theirs.say(message("p", b"out of place\0")))
    await stage.until(lambda: bool(stage.entered))
    await session.server_sends(COLUMNS[7:])
    if "rejected" not in {str(fault.action) for fault in stage.house.faults}:
        await session.client.close()
    await session.server.rest()


@play(idle_in_transaction=0.02)
async def ends_of_all_kinds(stage: Stage) -> None:
    client, server = await stage.session()
    await client.send(FIRST)
    await stage.hears(server, FIRST)
    await server.send(IN_TRANSACTION)
    await stage.hears(client, IN_TRANSACTION)
    await stage.recorded("idle-in-transaction")
    await client.close()
    await stage.ends(server)
    await server.close()
    client, server = await stage.session(unix=True)
    await server.close()
    await client.rest()
    await client.close()
    client, server = await stage.session(unix=True)
    await server.send(LET_GO)
    await stage.hears(client, LET_GO)
    await server.close()
    await stage.ends(client)
    client, server = await stage.session()
    await client.send(FIRST)
    await stage.hears(server, FIRST)
    await client.reset()
    await stage.ends(server)
    await server.close()
    await stage.recorded("unclean-close")


@play(unread_answer=0.03)
async def an_answer_unread(stage: Stage) -> None:
    client, server = await stage.session(unix=True)
    await client.send(FIRST)
    await stage.hears(server, FIRST)
    await server.send(ANSWER)
    with heir(client):
        await stage.recorded("unread-answer")
    sessions = stage.house.guard._sessions.values()
    unread = max(sessions, key=lambda one: one.id)
    other, its_server = await stage.session()
    asks = max(sessions, key=lambda one: one.id)
    await stage.until(lambda: asks.opening is not None)
    await other.send(FIRST)
    await stage.hears(its_server, FIRST)
    looks = 0 if unread.leftover is None else unread.leftover.looks
    await stage.until(lambda: unread.leftover is None or unread.leftover.looks > looks + 1)
    await its_server.send(ANSWER)
    await stage.hears(other, ANSWER)
    await client.send(SECOND)
    await stage.hears(server, SECOND)
    await server.send(ANSWER)
    await stage.hears(client, ANSWER + ANSWER)
    client, server = await stage.session()
    await client.send(FIRST)
    await stage.hears(server, FIRST)
    await server.send(ANSWER)
    await trio.sleep(0.03)
    await stage.hears(client, ANSWER)


@play(probe=True, unread_answer=0.03)
async def sent_on_top(stage: Stage) -> None:
    """The kernel says that an answer lay unread when the next request was sent."""
    client, server = await stage.session()
    assert isinstance(client, NamedClient)
    assert stage.probe is not None
    stage.patch.setattr("pgguard.proxy.unread.OVERLAP", NO_OVERLAP)
    await client.send(FIRST)
    await stage.hears(server, FIRST)
    await server.send(ANSWER)
    await trio.sleep(0.01)
    sent = len(LOGGED_IN) + 1
    stage.probe.say(
        client.key, Report.SENDING, os.getpid(), client.sent, len(SECOND), read=sent, received=sent + len(ANSWER)
    )
    await Client.send(client, SECOND)
    client.sent += len(SECOND)
    await stage.hears(server, SECOND)
    await server.send(ANSWER)
    await stage.hears(client, ANSWER + ANSWER)


class _NoOverlap(dict[Any, Any]):
    def __missing__(self, _: Any) -> Any:
        return SimpleNamespace(may=False, threads_tell=True)


NO_OVERLAP: Final = _NoOverlap()


@play()
async def late_for_two_answers(stage: Stage) -> None:
    """The relay has been late, and several read."""
    client, server = await stage.session(unix=True)
    [session] = [one for one in stage.house.guard._sessions.values() if one.transport == "unix"]
    if session.tracker is not None:
        session.tracker.several_read = True
    stage.patch.setattr("pgguard.proxy.lateness._LATE", -1)
    await client.send(FIRST)
    await stage.hears(server, FIRST)
    await server.send(ANSWER + ANSWER)
    await stage.hears(client, ANSWER + ANSWER)


@play()
async def refused_for_want_of_slots(stage: Stage) -> None:
    holder, its_server = await stage.session()
    session = max(stage.house.guard._sessions.values(), key=lambda one: one.id)
    stage.patch.setattr("pgguard.proxy.judge._ROLL_CALL_BUDGET", 1.0)  # a look that is watched takes much longer
    with heir(holder):
        await stage.until(lambda: session.opening is not None and bool(session.sightings.holders))
        for _ in range(2):
            client = await stage.connect()
            await client.send(startup())
            server = await stage.house.backend.accept()
            await server.packet()
            await server.send(REFUSAL)
            await server.close()
            await stage.hears(client, REFUSAL)
            await stage.ends(client)
        await stage.recorded("connection-exhaustion")
        await stage.converse(holder, its_server)


@play(probe=True)
async def arrivals_of_all_kinds(stage: Stage) -> None:
    for first in (b"GET / HTTP/1.1\r\n\r\n", TERMINATE + TERMINATE, message("Q", b"select 1\0"), b"\x16\3\1"):
        client = await stage.connect()
        await client.send(first)
        await stage.ends(client)
    client = await stage.connect(unix=True)
    await client.send(b"GET / HTTP/1.1\r\n\r\n")
    await stage.ends(client)
    client = await stage.connect()
    await client.send(SSL_REQUEST)
    await stage.hears(client, b"N")
    await client.close()
    await stage.until(lambda: bool(stage.house.guard._receptions[None].declined._told))
    client = await stage.connect()
    await client.send(SSL_REQUEST)
    await stage.hears(client, b"N")
    await client.send(GSSENC_REQUEST)
    await stage.hears(client, b"N")
    await client.send(startup())
    server = await stage.house.backend.accept()
    await server.log_in()
    await stage.hears(client, LOGGED_IN)
    await stage.converse(client, server)
    canceller = await stage.connect()
    await canceller.send(cancel_request(1, b"abcd"))
    cancelled = await stage.house.backend.accept()
    await stage.hears(cancelled, cancel_request(1, b"abcd"))
    await cancelled.close()
    await stage.ends(canceller)
    client = await stage.connect()
    await client.send(startup((2, 0)))
    server = await stage.house.backend.accept()
    await stage.hears(server, startup((2, 0)))
    await server.close()
    await stage.ends(client)


@play(probe=True)
async def arrivals_that_come_to_nothing(stage: Stage) -> None:
    """The server isn't there; there is no room, for one after the other; there is no descriptor. One says nothing."""

    def fail(number: int) -> Callable[..., Any]:
        def failing(*_: Any) -> Any:
            raise OSError(number, os.strerror(number))

        return failing

    async def is_told(client: Client, sqlstate: str) -> None:
        assert (await client.message()).fields["C"] == sqlstate
        await stage.ends(client)

    with stage.patch.context() as patch:
        patch.setattr("pgguard.proxy.dialling.Dial.step", fail(errno.ECONNREFUSED))
        client = await stage.connect()
        await client.send(startup())
        await is_told(client, "08001")
    with stage.patch.context() as patch:
        patch.setattr("pgguard.proxy.admission.Admission.turned_away_at_once", 1)
        patch.setattr("pgguard.proxy.admission.Admission._for_sessions", lambda _: 0)
        patch.setattr("pgguard.proxy.door._GRACE", 0.02)
        patch.setattr("pgguard.proxy.door._LOOK", 0.01)
        silent = await stage.connect()
        client = await stage.connect()
        await stage.ends(silent)
        await client.send(startup())
        await is_told(client, "53300")
    with stage.patch.context() as patch:

        def accepting(listener: socket.socket) -> Any:
            door = stage.house.guard._door
            return fail(errno.EMFILE)() if door._in_hand else accept(listener)

        patch.setattr("pgguard.proxy.door.accept", accepting)
        client = await stage.connect()
        await client.send(startup())
        await is_told(client, "53300")
        await client.close()
    await stage.connect()


# Running them


@contextmanager
def sleeping() -> Iterator[int]:
    """A process that does nothing."""
    process = subprocess.Popen(["sleep", "600"], stdin=subprocess.DEVNULL)
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


@asynccontextmanager
async def staged(one: Play, child: int, patience: float) -> AsyncIterator[Stage]:
    backend = FakeBackend()
    await backend.listen()
    witness = Witness() if one.witness else None
    settings = {"shutdown_timeout": 0} | one.settings
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SHORT.items():
            patch.setattr(f"pgguard.proxy.{name}", value, raising=False)
        try:
            async with running(backend, witness=witness, **settings) as house:
                probe = Probe() if one.probe else None
                if probe is not None:
                    house.guard.use_probe(cast("SenderProbe", probe))
                yield Stage(house, child, probe, patch, patience)
        finally:
            await backend.close_all()


async def perform(
    one: Play, child: int, patience: float = 0.3, around: AbstractContextManager[Any] | None = None
) -> Stage:
    """Have a play performed beside a session that has nothing to do with it; the guard ends as it should.

    Args:
        one: the play.
        child: a process.
        patience: seconds to wait for what may not come.
        around: what is entered when the guard begins to serve.
    """
    async with staged(one, child, patience) as stage:
        with around or nullcontext():
            await _perform(one, stage)
    return stage


async def _perform(one: Play, stage: Stage) -> None:
    house = stage.house
    before = _tasks()
    bystander, its_server = await stage.session()
    await stage.converse(bystander, its_server)
    await one.scenario(stage)
    await stage.converse(bystander, its_server)
    assert before <= _tasks(), "a task has ended"
    house.guard.stop()
    with trio.fail_after(10):
        while _tasks():  # noqa: ASYNC110 - nobody is told
            await trio.sleep(0.001)


def _tasks() -> set[trio.lowlevel.Task]:
    """The guard's own that go on until it ends."""

    def walk(task: trio.lowlevel.Task) -> Iterator[trio.lowlevel.Task]:
        yield task
        for nursery in task.child_nurseries:
            for one in nursery.child_tasks:
                yield from walk(one)

    root = trio.lowlevel.current_root_task()
    assert root is not None
    lasting = ("Guard.serve", "Sweep.run", "Reception.run", "keep_going")
    return {task for task in walk(root) if task.name.endswith(lasting)}


@dataclass
class Rehearsal:
    """A play as it is when nothing fails."""

    play: Play
    heard: list[bytes]
    kinds: set[str]
    watcher: Watcher
    seconds: float
    """How long it took."""


@pytest.fixture(autouse=True)
def _no_socket_is_left_open() -> None:
    """What fails to be closed stays open."""


@pytest.fixture(scope="module")
def child() -> Iterator[int]:
    with sleeping() as pid:
        yield pid


@pytest.fixture(scope="module")
def rehearsals(child: int) -> list[Rehearsal]:
    """Each play, watched."""
    found = []
    for one in PLAYS:
        watcher = Watcher()
        began = time.monotonic()
        stage = trio.run(perform, one, child, SECONDS, watcher.watching())
        found.append(Rehearsal(one, stage.heard, set(stage.house.kinds), watcher, time.monotonic() - began))
    return found


@contextmanager
def nothing_working(rehearsals: list[Rehearsal]) -> Iterator[None]:
    """All that is called beyond the relay fails, always."""
    everything = {pair: code for rehearsal in rehearsals for pair, code in rehearsal.watcher.crossings.items()}
    with ExitStack() as stack:
        for n, (crossing, code) in enumerate(sorted(everything.items(), key=str)):
            stack.enter_context(failing(crossing, code, ERRORS[n % len(ERRORS)], once=False))
        before = losses._times.total()
        yield
        assert losses._times.total() - before >= 5


def test_everything_may_fail_at_once_and_for_ever(rehearsals: list[Rehearsal], child: int) -> None:
    """Nothing is recorded then, but every byte gets through, and the guard ends well."""

    async def converse(stage: Stage) -> None:
        for unix in (False, True):
            client, server = await stage.session(unix=unix)
            for _ in range(3):
                await stage.converse(client, server)
            await server.send(COLUMNS)
            await stage.hears(client, COLUMNS)
            await client.send(TERMINATE)
            await stage.hears(server, TERMINATE)
            await server.close()
            await stage.ends(client)

    with nothing_working(rehearsals):
        trio.run(perform, Play(converse, probe=True, witness=True, settings={}), child)


def test_a_real_client_and_a_real_server_notice_nothing(rehearsals: list[Rehearsal]) -> None:
    bindir = next((bindir for bindir in installations().values() if bindir is not None), None)
    if bindir is None:
        not_installed("PostgreSQL")

    async def through_the_guard(server: Server) -> list[Any]:
        async with running(witness=Witness(), upstream=server.unix.conninfo) as house:
            addresses = [Address("127.0.0.1", house.port), Address(str(Path(house.unix).parent), 1)]
            return [await trio.to_thread.run_sync(work, address) for address in addresses]

    with running_server(bindir) as server:
        with nothing_working(rehearsals):
            found = trio.run(through_the_guard, server)
        assert found == [work(server.unix)] * 2


def work(address: Address) -> list[Any]:
    """Ask for rows, with and without a prepared statement, make an error, copy, and roll back: what comes of it."""
    with psycopg.connect(address.conninfo) as connection:
        rows: list[Any] = connection.execute("select n, repeat('x', n) from generate_series(1, 2000) n").fetchall()
        for n in range(3):
            rows += connection.execute("select %s + 1", (n,), prepare=True).fetchall()
        with pytest.raises(psycopg.errors.DivisionByZero):
            connection.execute("select 1 / 0")
        connection.rollback()
        connection.execute("create temporary table t (n int)")
        with connection.cursor().copy("copy t from stdin") as copy:
            for n in range(5000):
                copy.write_row((n,))
        return rows + connection.execute("select sum(n), count(*) from t").fetchall()


RELAYING: Final = {
    "proxy.aftermath",
    "proxy.arrival",
    "proxy.endings",
    "proxy.guard",
    "proxy.judging",
    "proxy.reception",
    "proxy.relay",
    "proxy.roster",
    "proxy.sweep",
}
"""Where exceptions are all said. In a worker thread one may come when nobody waits for it any more."""

ERRORS: Final = (
    OSError(errno.EMFILE, os.strerror(errno.EMFILE)),
    KeyError("injected"),
    MemoryError("injected"),
    RecursionError("injected"),
    struct.error("injected"),
    Injected("injected"),
)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("once", [True, False], ids=["once", "always"])
def test_whatever_is_called_beyond_the_relay_may_fail(rehearsals: list[Rehearsal], child: int, once: bool) -> None:
    crossings: dict[Crossing, list[tuple[Rehearsal, CodeType]]] = {}
    # What becomes of a rejection depends on what else is known in time, so those plays are for what no other makes.
    for rehearsal in sorted(rehearsals, key=lambda one: (one.play.settings.get("mode") == "reject", one.seconds)):
        for crossing, code in rehearsal.watcher.crossings.items():
            crossings.setdefault(crossing, []).append((rehearsal, code))
    assert len(crossings) > 100
    problems = []
    for n, crossing in enumerate(sorted(crossings, key=str)):
        error = ERRORS[(n + once) % len(ERRORS)]
        for rehearsal, code in crossings[crossing]:
            problem = attempt(crossing, code, rehearsal, child, error, once=once)
            if problem != NOT_MADE:
                break
        else:
            continue
        if problem is not None:
            problems.append(f"{crossing} [{rehearsal.play}, {error!r}]: {problem}")
    assert not problems, f"{len(problems)} of {len(crossings)}:\n" + "\n".join(problems)


NOT_MADE: Final = "the call was not made"


def attempt(
    crossing: Crossing, code: CodeType, rehearsal: Rehearsal, child: int, error: Exception, *, once: bool
) -> str | None:
    """Perform a play with a failure; what goes wrong with it, if anything does."""
    before = losses._times.total()
    try:
        with failing(crossing, code, error, once=once) as raised:
            stage = trio.run(perform, rehearsal.play, child)
    except BaseException as problem:
        if isinstance(problem, KeyboardInterrupt):
            raise
        return repr(problem)
    if not raised:
        return NOT_MADE  # it depends on what processes did meanwhile; nothing has failed
    kinds = set(stage.house.kinds)
    if stage.heard != rehearsal.heard and UNTRACKED not in kinds:
        return "other bytes have come"
    missing = (rehearsal.kinds & SEEN_ON_THE_WIRE) - kinds
    if crossing.callee[0].startswith("reporting"):
        missing = set()  # it is the record itself that nobody takes
    if missing and UNTRACKED not in kinds:
        return f"not recorded: {missing}"
    foreseen = isinstance(error, OSError) and crossing.callee == ("proxy.unread", "ReadingAlarm.__init__")
    said = losses._times.total() > before
    if not said and not foreseen and crossing.caller is not None and crossing.caller[0] in RELAYING:
        return "nobody has said so"
    return None


STARTS: Final = {
    "proxy.addresses",
    "proxy.certificates",
    "proxy.conninfo",
    "proxy.settings",
    "proxy.listeners",
    "proxy.offer",
    "proxy.shortcut",
}
"""What is done before there is a session, where an exception is to end the guard: with a message."""
STARTING: Final = {"__init__", "listen", "use_probe", "find_loop"}
"""The functions of others that are called then alone."""
ASKING: Final = {
    "reload",
    "follow",
    "of",
    "remarks",
    "renew_certificate",
    "read_server_files",
    "figures",
    "overview",
    "unnamed",
    "why_not_ready",
    "server_answers",
}
"""Those that others call, and protect themselves from: on SIGHUP, where nothing is changed then, in the end, and when
somebody wants to know how it is."""


def test_every_call_that_may_cross_fails_above_or_is_protected_where_it_stands(rehearsals: list[Rehearsal]) -> None:
    """A call that is new is one of these, or the tests above have to come across it.

    Of compiled code nobody sees which lines run: what holds of it when it isn't compiled holds of it then.
    """
    run = {line for rehearsal in rehearsals for line in rehearsal.watcher.lines}
    left = [
        site
        for site in unprotected_sites()
        if site.module not in STARTS | {name.removeprefix("pgguard.") for name in form().compiled}
        and site.function not in STARTING | ASKING
        and run.isdisjoint((site.module, n) for n in range(site.line, site.last_line + 1))
    ]
    assert not left, "\n".join(map(str, left))


def test_whatever_catches_exceptions_of_all_kinds_says_what_they_cost() -> None:
    """There is one place that knows: :mod:`pgguard.proxy.losses`."""
    left = [
        f"{path.name}:{handler.lineno}"
        for path in (Path(pgguard.__file__).parent / "proxy").glob("*.py")
        for handler in ast.walk(ast.parse(path.read_text()))
        if isinstance(handler, ast.ExceptHandler)
        and isinstance(handler.type, ast.Name)
        and handler.type.id == "Exception"
        and not any(name in ast.unparse(handler) for name in ("note(", "_note_unless_gone(", "_lose_", "raise"))
    ]
    assert not left, left
