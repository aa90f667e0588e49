"""What the kernel says of senders on TCP, put to use: each piece of a read has its own, and no byte pays for it."""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
import time
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from pgguard.attribution.ebpf.probe import ProbeUnavailable, SenderProbe
from pgguard.attribution.ebpf.programs import Kind, Way
from pgguard.attribution.ebpf.ring import Event
from pgguard.attribution.evidence import Process
from pgguard.attribution.processes import read_process
from pgguard.attribution.witness import Witness
from pgguard.faults.policy import KindAction
from pgguard.identity import Sender
from pgguard.proxy.kernel_senders import KernelSenders
from pgguard.proxy.session import ProxiedSession
from pgguard.secrets.commands import redact_command
from tests.proxy.conftest import House, running, until
from tests.proxy.fake_backend import BackendConnection, FakeBackend
from tests.proxy.messages import (
    ANSWER,
    LOGGED_IN,
    SECONDS,
    SECRET,
    SSL_REQUEST,
    TERMINATE,
    Client,
    cancel_request,
    message,
    query,
    startup,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from pgguard.proxy.judge import Ruling
    from pgguard.session.verdicts import Verdict

PARENT = Sender(4866, 4866)
CHILD = Sender(4867, 4880)
OTHER = Sender(4868, 4868)
THREAD = Sender(4866, 4900)

Part = tuple[bytes, Sender | None]


class Reports:
    """Stands in for the probe: it reports what the test says that somebody has sent."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._positions: dict[bytes, int] = {}
        self._senders: dict[bytes, Sender] = {}
        self._reached: list[int] = []
        """By ticket, of which the first is 1."""
        self._tickets: dict[bytes, int] = {}

    def add(self, host: str, port: int) -> None:
        """Every address is watched."""

    def read(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def reached(self, ticket: int) -> int:
        return self._reached[ticket - 1]

    def glance(self, ticket: int) -> int:
        return -1 if self._events else self._reached[ticket - 1] if ticket else 0

    def accepted(self, key: bytes, *, opener: Sender | None = PARENT) -> None:
        """The guard's own end is there, and whose the other is is known if the probe sees that one too."""
        self._positions[key] = 0
        self._senders.pop(key, None)
        self._reached.append(0)
        self._tickets[key] = len(self._reached)
        if opener is not None:
            self._report(key, Kind.OPENED, 0, 0, opener)
        self._report(key, Kind.ACCEPTED, 0, 0, PARENT)

    def sent(self, key: bytes, size: int, sender: Sender | None) -> None:
        """So many bytes are this one's; unless it is ``None``, of which there is no report."""
        if sender is None:
            self._senders.pop(key, None)
        elif sender != self._senders.get(key):
            self._senders[key] = sender
            self._report(key, Kind.SENDING, self._positions[key], size, sender)
        self._positions[key] += size
        if sender is not None:
            self._reached[self._tickets[key] - 1] = self._positions[key]

    def _report(self, key: bytes, kind: Kind, position: int, size: int, sender: Sender) -> None:
        assert sender.tid is not None
        ticket = self._tickets[key]
        reached = self._reached[ticket - 1]
        self._events.append((position, size, kind, sender.tid, sender.pid, 1, ticket, key, 0, 0, reached))


class Told(Client):
    """A client of which it is reported who sends."""

    key: bytes
    reports: Reports

    async def say(self, *parts: Part) -> None:
        """Send what several have to say, at once."""
        for data, sender in parts:
            self.reports.sent(self.key, len(data), sender)
        await self.send(b"".join(data for data, _ in parts))


class ToldHouse:
    """A guard that is told who sends."""

    def __init__(self, house: House, reports: Reports) -> None:
        self.house = house
        self.reports = reports

    async def connect(self, *, opener: Sender | None = PARENT) -> Told:
        sock = trio.socket.socket()
        await sock.bind(("127.0.0.1", 0))
        address = bytes(10) + b"\xff\xff" + bytes([127, 0, 0, 1])
        key = address + address + struct.pack("!HH", sock.getsockname()[1], self.house.port)
        self.reports.accepted(key, opener=opener)
        await sock.connect(("127.0.0.1", self.house.port))
        client = Told(trio.SocketStream(sock))
        client.key, client.reports = key, self.reports
        self.house.backend.keep(client)
        return client

    async def session(self, *, opener: Sender | None = PARENT) -> tuple[Told, BackendConnection]:
        """A session that the parent has opened, and has logged in."""
        client = await self.connect(opener=opener)
        await client.say((startup(), opener))
        server = await self.house.backend.accept()
        await server.log_in()
        await client.expect(LOGGED_IN)
        return client, server

    @property
    def senders(self) -> KernelSenders:
        senders = self.house.guard._roster.senders
        assert senders is not None
        return senders

    @property
    def only_session(self) -> ProxiedSession:
        [session] = self.house.guard._sessions.values()
        return session

    def requesters(self) -> list[Sender | None]:
        """Who has made the session's latest requests."""
        tracker = self.only_session.tracker
        assert tracker is not None
        return [request.sender for request in tracker.requests_seen()]


@asynccontextmanager
async def told(backend: FakeBackend, **options: Any) -> AsyncIterator[ToldHouse]:
    async with running(backend, **options) as house:
        reports = Reports()
        house.guard.use_probe(cast("SenderProbe", reports))
        yield ToldHouse(house, reports)


@asynccontextmanager
async def fresh(**options: Any) -> AsyncIterator[ToldHouse]:
    """One for each example, where a fixture would be one for all of them."""
    backend = FakeBackend()
    await backend.listen()
    try:
        async with told(backend, **options) as house:
            yield house
    finally:
        with trio.CancelScope(shield=True):
            await backend.close_all()


class Bench:
    """Keeps verdicts from being ruled on until the test says so."""

    def __init__(self, house: ToldHouse, monkeypatch: pytest.MonkeyPatch) -> None:
        judge = house.house.guard._judge
        rule = judge.rule
        self.waiting: list[Verdict] = []
        self._allowed = trio.Semaphore(0)

        async def wait_and_rule(session: ProxiedSession, verdict: Verdict) -> Ruling:
            self.waiting.append(verdict)
            await self._allowed.acquire()
            self.waiting.remove(verdict)
            return await rule(session, verdict)

        monkeypatch.setattr(judge, "rule", wait_and_rule)

    async def verdict(self) -> Verdict:
        await until(lambda: bool(self.waiting))
        return self.waiting[0]

    async def go_on(self) -> None:
        verdict = await self.verdict()
        self._allowed.release()
        await until(lambda: verdict not in self.waiting)


def asked(who: str) -> bytes:
    return query(f"select '{who}'")


def roles(house: ToldHouse, kind: str) -> list[set[tuple[str, int | None, int | None]]]:
    return [
        {(str(one.role), one.pid, one.tid) for one in fault.culprits}
        for fault in house.house.faults
        if fault.kind == kind and fault.repeat_of is None
    ]


# Whose is what


async def test_each_message_of_one_read_has_its_own_sender(backend: FakeBackend) -> None:
    whose = [PARENT, CHILD, OTHER, CHILD, PARENT, THREAD, PARENT]
    async with told(backend) as house:
        client, server = await house.session()
        parts: list[Part] = [(asked(str(number)), sender) for number, sender in enumerate(whose)]
        await client.say(*parts)
        await server.expect(b"".join(data for data, _ in parts))
        assert house.requesters() == whose
        assert house.house.faults[0].requests[0].pid == PARENT.pid


async def test_several_messages_of_each_are_told_apart_where_one_ends_and_the_other_begins(
    backend: FakeBackend,
) -> None:
    async with told(backend) as house:
        client, server = await house.session()
        parts: list[Part] = [(asked("p") * 3, PARENT), (asked("c") * 2, CHILD), (asked("p"), PARENT)]
        await client.say(*parts)
        await server.expect(b"".join(data for data, _ in parts))
        assert house.requesters() == [PARENT] * 3 + [CHILD] * 2 + [PARENT]


async def test_the_verdict_falls_on_who_sent_the_message_and_on_nobody_behind_it(backend: FakeBackend) -> None:
    async with told(backend) as house:
        client, server = await house.session()
        parts: list[Part] = [(asked("parent"), PARENT), (asked("child"), CHILD), (asked("again"), PARENT)]
        await client.say(*parts)
        await server.expect(b"".join(data for data, _ in parts))
        await until(lambda: "shared-by-processes" in house.house.kinds)
        first = next(fault for fault in house.house.faults if fault.kind == "shared-by-processes")
        assert {(str(one.role), one.pid, one.tid) for one in first.culprits} == {
            ("intruder", CHILD.pid, CHILD.tid),
            ("requester", PARENT.pid, PARENT.tid),
        }
        assert {str(one.evidence) for one in first.culprits} == {"kernel-sender"}
        assert first.message is not None
        assert first.message.size == len(asked("child"))


async def test_threads_of_one_process_that_pipeline_are_told_apart_and_no_processes(backend: FakeBackend) -> None:
    async with told(backend) as house:
        client, server = await house.session()
        batch = message("P", b"\0select 1\0\0\0") + message("B", b"\0\0\0\0\0\0\0\0") + message("E", b"\0\0\0\0\0")
        parts: list[Part] = [(batch + message("S"), PARENT), (batch + message("S"), THREAD)]
        await client.say(*parts)
        await server.expect(b"".join(data for data, _ in parts))
        assert house.requesters() == [PARENT, THREAD]
        assert "shared-by-processes" not in house.house.kinds
        assert "inherited-connection" not in house.house.kinds


async def test_taking_turns_in_separate_reads(backend: FakeBackend) -> None:
    async with told(backend) as house:
        client, server = await house.session()
        for sender in (PARENT, CHILD, PARENT):
            await client.say((asked("x"), sender))
            await server.expect(asked("x"))
            await server.send(ANSWER)
            await client.expect(ANSWER)
        assert house.house.kinds == ["inherited-connection", "shared-by-processes"]
        assert ("intruder", PARENT.pid, PARENT.tid) in roles(house, "shared-by-processes")[0]


@pytest.mark.parametrize("shared", [True, False])
async def test_who_asks_again_without_an_answer_is_told_unless_the_connection_is_known_to_be_shared(
    backend: FakeBackend, monkeypatch: pytest.MonkeyPatch, *, shared: bool
) -> None:
    """Another process has read the answer, then; that is looked into once, and holds nobody up again."""
    async with told(backend) as house:
        client, server = await house.session()
        senders = (PARENT, CHILD, PARENT) if shared else (PARENT,)
        for sender in senders:
            await client.say((asked("x"), sender))
            await server.expect(asked("x"))
            await server.send(ANSWER)
            await client.expect(ANSWER)
        for _ in range(2):
            await client.say((asked("x"), PARENT))
            await server.expect(asked("x"))
        told_of = ["inherited-connection", "shared-by-processes"] if shared else ["request-while-busy"]
        assert house.house.kinds == told_of
        assert {str(count.kind) for count in house.house.docket.counts()} == set(told_of)
        looked_into: list[Any] = []
        monkeypatch.setattr(house.house.guard._judge, "rule_surely", lambda *what: looked_into.append(what))
        await client.say((asked("x"), PARENT))
        await server.expect(asked("x"))
        assert looked_into == []


async def test_bytes_of_nobody_known_are_nobodys_fault(backend: FakeBackend) -> None:
    async with told(backend) as house:
        client, server = await house.session()
        for sender in (PARENT, None, PARENT, None):
            await client.say((asked("x"), sender))
            await server.expect(asked("x"))
            await server.send(ANSWER)
            await client.expect(ANSWER)
        batch = message("P", b"\0select 1\0\0\0") + message("S")
        await client.say((batch, PARENT), (batch, None), (batch, PARENT))
        await server.expect(batch * 3)
        assert house.requesters()[-3:] == [PARENT, None, PARENT]
        assert house.house.kinds == []


@pytest.mark.parametrize("at", range(1, len(asked("parent"))))
async def test_a_message_torn_between_two_processes_is_whole_and_both_are_named(backend: FakeBackend, at: int) -> None:
    async with told(backend) as house:
        client, server = await house.session()
        whole = asked("parent")
        await client.say((whole[:at], PARENT), (whole[at:], CHILD))
        await server.expect(whole)
        await until(lambda: "shared-by-processes" in house.house.kinds)
        [fault] = house.house.faults
        assert fault.reason == "in the middle of another process's Query"
        assert {(str(one.role), one.pid) for one in fault.culprits} == {
            ("intruder", CHILD.pid),
            ("requester", PARENT.pid),
        }


@pytest.mark.parametrize("at", [1, 4, 5, 6, 10])
async def test_a_message_torn_between_known_and_unknown_is_whole_and_no_fault(backend: FakeBackend, at: int) -> None:
    async with told(backend) as house:
        client, server = await house.session()
        whole = asked("parent")
        await client.say((whole[:at], PARENT), (whole[at:], None), (whole[:at], None), (whole[at:], PARENT))
        await server.expect(whole * 2)
        assert "shared-by-processes" not in house.house.kinds


async def test_a_sender_that_is_torn_over_two_reads_is_still_one(backend: FakeBackend) -> None:
    async with told(backend) as house:
        client, server = await house.session()
        whole = asked("p")
        client.reports.sent(client.key, len(whole), PARENT)
        await client.send(whole[:3])
        await trio.sleep(0.02)
        await client.send(whole[3:])
        await server.expect(whole)
        assert house.requesters() == [PARENT]
        assert house.house.kinds == []


async def test_the_login_has_its_own_senders(backend: FakeBackend) -> None:
    """An SSLRequest of one process, the StartupMessage of another: what is said later is compared to the latter."""
    async with told(backend) as house:
        client = await house.connect()
        await client.say((SSL_REQUEST, CHILD))
        await client.expect(b"N")
        await client.say((startup(), PARENT))
        server = await backend.accept()
        await server.log_in()
        await client.expect(LOGGED_IN)
        await client.say((asked("p"), PARENT))
        await server.expect(asked("p"))
        assert house.house.kinds == []
        await server.send(ANSWER)
        await client.expect(ANSWER)
        await client.say((asked("c"), CHILD))
        await server.expect(asked("c"))
        assert house.house.kinds == ["inherited-connection"]


# Behind a verdict


async def test_what_stands_behind_a_verdict_waits_and_goes_on_in_order_with_its_own_senders(
    backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    whose = [PARENT, CHILD, OTHER, PARENT]
    async with told(backend) as house:
        bench = Bench(house, monkeypatch)
        client, server = await house.session()
        parts: list[Part] = [(asked(str(number)), sender) for number, sender in enumerate(whose)]
        await client.say(*parts)
        await client.say((asked("later"), OTHER))
        await server.expect(asked("0"))
        for number, intruder in enumerate(whose[1:], 1):
            verdict = await bench.verdict()
            assert verdict.intruder == intruder
            await server.nothing()
            assert house.requesters() == whose[:number]
            await bench.go_on()
            await server.expect(asked(str(number)))
        await server.expect(asked("later"))  # of who is known by now
        assert house.requesters() == [*whose, OTHER]
        assert not house.only_session.client.pieces
        assert not house.only_session.client.waits


async def test_the_servers_answers_come_through_while_pieces_wait(
    backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with told(backend) as house:
        bench = Bench(house, monkeypatch)
        client, server = await house.session()
        await client.say((asked("0"), PARENT), (asked("1"), CHILD), (asked("2"), CHILD))
        await server.expect(asked("0"))
        await bench.verdict()
        await server.send(ANSWER)
        await client.expect(ANSWER)
        await bench.go_on()
        await bench.go_on()
        await server.expect(asked("1") + asked("2"))
        await server.send(ANSWER * 2)
        await client.expect(ANSWER * 2)


async def test_a_repeat_in_the_middle_of_pieces_holds_nobody_up(backend: FakeBackend) -> None:
    """Known faults are counted without holding anything: three hundred of them in one read."""
    async with told(backend) as house:
        client, server = await house.session()
        parts: list[Part] = [(asked("x"), sender) for _ in range(300) for sender in (PARENT, CHILD)]
        await client.say(*parts)
        await server.expect(asked("x") * 600)
        first = [str(fault.kind) for fault in house.house.faults if fault.repeat_of is None]
        assert "shared-by-processes" in first
        assert len(first) <= 4


async def test_rejected_in_the_middle_of_pieces_nothing_behind_it_is_forwarded(backend: FakeBackend) -> None:
    async with told(backend, mode="reject") as house:
        client, server = await house.session()
        await client.say((asked("0"), PARENT), (asked("1"), CHILD), (asked("2"), PARENT), (asked("3"), OTHER))
        cancelling = await backend.accept()
        assert (await cancelling.packet()) == cancel_request(4711, SECRET)
        await cancelling.close()
        assert await server.rest() == asked("0")
        said = await client.message()
        assert said.type == "E"
        assert f"pid {CHILD.pid}" in " ".join(said.fields.values())
        assert house.house.kinds == ["shared-by-processes"]
        await client.close()
        await house.house.empty()
        assert house.senders._accounts._open == {}


async def test_dropped_in_the_middle_of_pieces_the_rest_goes_on(
    backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgguard.proxy.judge.conclude", lambda verdict, _: verdict)  # without looking at anybody
    async with told(backend, kinds={"foreign-terminate": {"action": KindAction.DROP}}) as house:
        client, server = await house.session()
        await client.say((asked("0"), PARENT), (TERMINATE, CHILD), (asked("1"), PARENT), (asked("2"), PARENT))
        await server.expect(asked("0") + asked("1") + asked("2"))
        [fault] = [fault for fault in house.house.faults if fault.kind == "foreign-terminate"]
        assert str(fault.action) == "dropped"
        assert ("intruder", CHILD.pid, CHILD.tid) in roles(house, "foreign-terminate")[0]
        assert house.requesters() == [PARENT] * 3
        await server.send(ANSWER * 3)
        await client.expect(ANSWER * 3)


@pytest.mark.parametrize("at", range(1, 5))
async def test_a_dropped_message_in_two_reads_is_swallowed_whole(
    backend: FakeBackend, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    monkeypatch.setattr("pgguard.proxy.judge.conclude", lambda verdict, _: verdict)  # without looking at anybody
    async with told(backend, kinds={"foreign-terminate": {"action": KindAction.DROP}}) as house:
        client, server = await house.session()
        await client.say((asked("0"), PARENT), (TERMINATE[:at], CHILD))
        await trio.sleep(0.02)
        await client.say((TERMINATE[at:], CHILD), (asked("1"), PARENT))
        await server.expect(asked("0") + asked("1"))
        assert house.house.kinds.count("foreign-terminate") == 1


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
async def test_a_client_that_is_gone_leaves_its_pieces_to_the_server(
    backend: FakeBackend, monkeypatch: pytest.MonkeyPatch, reset: bool
) -> None:
    async with told(backend) as house:
        bench = Bench(house, monkeypatch)
        client, server = await house.session()
        await client.say((asked("0"), PARENT), (asked("1"), CHILD), (asked("2"), PARENT), (TERMINATE, PARENT))
        await server.expect(asked("0"))
        await bench.verdict()
        await (client.reset() if reset else client.close())
        monkeypatch.undo()
        bench._allowed.release()
        bench._allowed.release()
        assert await server.rest() == asked("1") + asked("2") + TERMINATE
        await server.close()
        await house.house.empty()
        assert house.senders._accounts._open == {}


async def test_a_server_that_is_gone_while_pieces_wait_ends_the_session(
    backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with told(backend) as house:
        bench = Bench(house, monkeypatch)
        client, server = await house.session()
        await client.say((asked("0"), PARENT), (asked("1"), CHILD), (asked("2"), PARENT))
        await server.expect(asked("0"))
        await bench.verdict()
        await server.close()
        monkeypatch.undo()
        bench._allowed.release()
        await client.rest()
        await client.close()
        await house.house.empty()
        assert house.senders._accounts._open == {}


async def test_a_torn_end_behind_pieces_is_named(backend: FakeBackend) -> None:
    async with told(backend) as house:
        client, server = await house.session()
        await client.say((asked("0"), PARENT), (asked("1")[:9], THREAD))
        await client.close()
        assert await server.rest() == asked("0") + asked("1")[:9]
        await house.house.recorded("protocol-violation", "unclean-close")
        assert ("intruder", THREAD.pid, THREAD.tid) in roles(house, "protocol-violation")[0]


# Bytes

MESSAGES = st.lists(
    st.sampled_from(
        [
            query("select 1"),
            query("x" * 300),
            query(""),
            message("P", b"\0select $1\0\0\0"),
            message("B", b"\0\0\0\0\0\0\0\0"),
            message("E", b"\0\0\0\0\0"),
            message("S"),
            message("H"),
            message("d", bytes(range(256))),
            message("c"),
        ]
    ),
    min_size=1,
    max_size=20,
)
WHOSE = st.sampled_from([PARENT, CHILD, OTHER, THREAD, None])
RUNS = st.lists(st.tuples(st.integers(1, 60), WHOSE), max_size=30)


def in_runs(data: bytes, runs: Sequence[tuple[int, Sender | None]]) -> list[Part]:
    """Give the data to senders in turn, so many bytes each, and the rest to the last."""
    parts: list[Part] = []
    for size, sender in runs:
        parts.append((data[:size], sender))
        data = data[size:]
    return [part for part in [*parts, (data, PARENT)] if part[0]]


@settings(max_examples=60, deadline=None)
@given(messages=MESSAGES, runs=RUNS, together=st.integers(1, 10))
async def test_however_many_send_and_wherever_they_interrupt_each_other_every_byte_is_forwarded(
    messages: list[bytes], runs: list[tuple[int, Sender | None]], together: int
) -> None:
    data = b"".join(messages)
    async with fresh() as house:
        client, server = await house.session()
        parts = in_runs(data, runs)
        for first in range(0, len(parts), together):
            await client.say(*parts[first : first + together])
        await server.expect(data)
        await client.send(TERMINATE)
        await server.expect(TERMINATE)


@settings(max_examples=30, deadline=None)
@given(data=st.binary(min_size=1, max_size=2000), runs=RUNS)
async def test_garbage_of_several_senders_is_forwarded_too(data: bytes, runs: list[tuple[int, Sender | None]]) -> None:
    async with fresh() as house:
        client, server = await house.session()
        await client.say(*in_runs(data, runs))
        await client.close()
        assert await server.rest() == data


async def test_large_reads_of_many_senders_in_front_of_a_slow_server_arrive_whole(backend: FakeBackend) -> None:
    """More than the sockets have room for, so that pieces wait behind bytes that wait."""
    rng = random.Random(4)
    async with told(backend) as house:
        client, server = await house.session()
        parts: list[Part] = [
            (query("x" * rng.choice([1, 100, 9000, 200_000])), rng.choice([PARENT, CHILD, OTHER, None]))
            for _ in range(200)
        ]
        data = b"".join(part for part, _ in parts)

        async def send() -> None:
            for first in range(0, len(parts), 8):
                await client.say(*parts[first : first + 8])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await trio.sleep(0.3)
            assert len(house.only_session.server.outgoing) <= 256 * 1024
            await server.expect(data)
        assert not house.only_session.client.pieces


# Accounts


async def test_the_account_ends_with_the_session_however_it_ends(backend: FakeBackend) -> None:
    async def full(house: ToldHouse) -> None:
        client, server = await house.session()
        await client.say((asked("0"), PARENT), (asked("1"), CHILD), (TERMINATE, CHILD))
        await client.close()
        await server.rest()
        await server.close()

    async def silent(house: ToldHouse) -> None:
        await (await house.connect()).close()

    async def incomplete(house: ToldHouse) -> None:
        client = await house.connect()
        await client.say((startup()[:7], PARENT))
        await client.close()

    async def reset(house: ToldHouse) -> None:
        client = await house.connect()
        await client.say((startup()[:7], PARENT))
        await client.reset()

    async def garbage(house: ToldHouse) -> None:
        client = await house.connect()
        await client.say((b"GET / HTTP/1.1\r\n", PARENT))
        await client.rest()
        await client.close()

    async def tls(house: ToldHouse) -> None:
        client = await house.connect()
        await client.say((b"\x16\x03\x01\x02\x00\x01\x00\x01", PARENT))
        await client.rest()
        await client.close()

    async def cancelling(house: ToldHouse) -> None:
        client = await house.connect()
        await client.say((cancel_request(1, SECRET), PARENT))
        server = await house.house.backend.accept()
        await server.packet()
        await server.close()
        await client.rest()
        await client.close()

    async def too_late(house: ToldHouse) -> None:
        client = await house.connect()
        await client.rest()
        await client.close()

    ways: list[Callable[[ToldHouse], Any]] = [full, silent, incomplete, reset, garbage, tls, cancelling, too_late]
    async with told(backend, startup_timeout=0.2) as house:
        for number in range(80):
            await ways[number % len(ways)](house)
        await house.house.empty()
        await until(lambda: house.senders._accounts._open == {})


async def test_an_account_does_not_stay_when_the_upstream_is_not_there(backend: FakeBackend) -> None:
    async with told(backend) as house:
        backend.close()
        client = await house.connect()
        await client.say((startup(), PARENT))
        assert (await client.message()).type == "E"
        await client.close()
        await until(lambda: house.senders._accounts._open == {})


async def test_an_account_does_not_stay_of_a_client_that_is_gone_before_it_is_asked_who_it_is(
    backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reset between the opening of its account and the look at its address."""

    def gone(*_: object, **__: object) -> None:
        raise OSError(107, "Transport endpoint is not connected")

    async with told(backend) as house:
        monkeypatch.setattr("pgguard.proxy.roster.client_socket", gone)
        client = await house.connect()
        await client.close()
        await until(lambda: house.house.guard.sessions == 1 and not house.senders._accounts._open)


async def test_a_client_that_the_probe_does_not_see_is_not_taken_for_one_whose_senders_are_named(
    backend: FakeBackend,
) -> None:
    """In another cgroup tree, or on another host: the guard's own end is reported, and nothing else ever is."""
    async with told(backend) as house:
        client, server = await house.session(opener=None)
        await client.say((asked("x"), None))
        await server.expect(asked("x"))
        assert not house.only_session.names_senders
        assert house.house.kinds == []


# With the kernel itself


@pytest.fixture
def probed() -> None:
    """Skip what takes the probe, where it can't be had."""
    try:
        SenderProbe([]).close()
    except ProbeUnavailable as unavailable:
        pytest.skip(str(unavailable))


def in_child(sock: socket.socket, data: bytes) -> int:
    """Let a forked child send, and return its pid when it has ended."""
    pid = os.fork()
    if pid == 0:
        try:
            sock.sendall(data)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    return pid


def plain(client: Client) -> socket.socket:
    """The same connection in a socket that blocks the test, guard and all, until it has sent."""
    return socket.socket(fileno=os.dup(client.stream.socket.fileno()))


@pytest.mark.usefixtures("probed")
async def test_one_read_with_bytes_of_a_parent_its_child_and_its_thread(house: House) -> None:
    """The guard runs in this thread, and so can't read before all have sent."""
    tids: list[int] = []

    def on_thread() -> None:
        tids.append(threading.get_native_id())
        sock.send(asked("thread"))

    with SenderProbe(house.guard.tcp_listeners()) as probe:
        house.guard.use_probe(probe)
        client, server = await house.session()
        me = Sender(os.getpid(), threading.get_native_id())
        with plain(client) as sock:
            sock.send(asked("parent"))
            pid = in_child(sock, asked("child") + asked("again"))
            thread = threading.Thread(target=on_thread)
            thread.start()
            thread.join()
            sock.send(asked("parent"))
        await server.expect(asked("parent") + asked("child") + asked("again") + asked("thread") + asked("parent"))
        [session] = house.guard._sessions.values()
        assert session.tracker is not None
        child = Sender(pid, pid)
        senders = [request.sender for request in session.tracker.requests_seen()]
        assert senders == [me, child, child, Sender(os.getpid(), tids[0]), me]
        first = house.faults[0]
        assert first.kind == "shared-by-processes"
        assert {(str(one.role), one.pid, one.tid) for one in first.culprits} == {
            ("intruder", pid, pid),
            ("requester", me.pid, me.tid),
        }


@pytest.mark.usefixtures("probed")
async def test_a_session_that_was_there_before_the_probe_is_unknown_and_works(house: House) -> None:
    client, server = await house.session()
    with SenderProbe(house.guard.tcp_listeners()) as probe:
        house.guard.use_probe(probe)
        for _ in range(3):
            with plain(client) as sock:
                in_child(sock, asked("child"))
                sock.send(asked("parent"))
            await server.expect(asked("child") + asked("parent"))
            await server.send(ANSWER * 2)
            await client.expect(ANSWER * 2)
        [session] = house.guard._sessions.values()
        assert not session.names_senders
        assert "shared-by-processes" not in house.kinds
        await client.send(TERMINATE)
        await client.close()
        await server.expect(TERMINATE)
        await server.close()
        await house.empty()


@pytest.mark.usefixtures("probed")
async def test_a_client_that_connected_before_the_probe_and_is_accepted_after_it_is_unknown_and_works(
    house: House,
) -> None:
    sock = socket.create_connection(("127.0.0.1", house.port))  # the guard can't have accepted yet
    with SenderProbe(house.guard.tcp_listeners()) as probe:
        house.guard.use_probe(probe)
        sock.setblocking(False)
        client = Client(trio.SocketStream(trio.socket.from_stdlib_socket(sock)))
        house.backend.keep(client)
        await client.send(startup())
        server = await house.backend.accept()
        await server.log_in()
        await client.expect(LOGGED_IN)
        for _ in range(3):
            await client.send(asked("x"))
            await server.expect(asked("x"))
            await server.send(ANSWER)
            await client.expect(ANSWER)
        [session] = house.guard._sessions.values()
        assert session.kernel_account is not None
        assert not session.names_senders
        assert session.client.sender is None
        assert house.kinds == []
        await client.close()
        await server.rest()
        await server.close()
        await house.empty()


@pytest.mark.usefixtures("probed")
async def test_many_connections_leave_no_account_and_no_event_behind(house: House) -> None:
    with SenderProbe(house.guard.tcp_listeners()) as probe:
        house.guard.use_probe(probe)
        senders = house.guard._roster.senders
        assert senders is not None
        for number in range(150):
            if number % 3 == 0:
                client, server = await house.session()
                await client.send(asked("x"))
                await server.expect(asked("x"))
                await client.send(TERMINATE)
                await client.close()
                await server.rest()
                await server.close()
            else:
                client = await house.connect()
                await client.send(startup()[: number % 3 * 3])
                await (client.reset() if number % 2 else client.close())
        await house.empty()
        await until(lambda: senders._accounts._open == {})
        senders.feed()
        assert len(senders._accounts._early) == 0
        assert probe.lost == 0


@pytest.mark.usefixtures("probed")
async def test_a_client_that_a_map_has_no_room_for_is_unknown_and_works_and_is_counted(house: House) -> None:
    with SenderProbe(house.guard.tcp_listeners(), max_connections=1, way=Way.MAP) as probe:
        house.guard.use_probe(probe)
        first, other = await house.session()
        client, server = await house.session()
        with plain(client) as sock:
            in_child(sock, asked("child"))
            sock.send(asked("parent"))
        await server.expect(asked("child") + asked("parent"))
        watched, unwatched = house.guard._sessions.values()
        assert watched.names_senders
        assert not unwatched.names_senders
        assert "shared-by-processes" not in house.kinds
        await first.nothing()
        # Of a map, what it can't do is said at the end as at the start.
        assert house.guard.remarks() == list(probe.limits)
        for end in (first, other, client, server):
            await end.close()
        await house.empty()
        assert house.guard.remarks() == [
            *probe.limits,
            "on 1 of 2 TCP connections the kernel did not say who sent: 1 because the map of watched sockets was full",
        ]


def test_what_was_seen_of_senders_is_kept_of_the_latest_alone() -> None:
    session = ProxiedSession(1, transport="tcp", client_name="here:1", client_socket=None, opened_at=0.0)
    for pid in range(1000, 2000):
        assert session.meets(pid)
        assert not session.meets(pid)
        session.remember({pid: Process(pid, pid, 0.0, "app", ("app",), 1)})
    assert list(session.senders) == list(range(1744, 2000))
    assert len(session._met or {}) <= 256


def test_a_pid_that_has_been_silent_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    session = ProxiedSession(1, transport="unix", client_name=None, client_socket=None, opened_at=0.0)
    assert session.meets(7)
    now += 0.9
    assert not session.meets(7)
    now += 0.9
    assert not session.meets(7), "it has sent meanwhile"
    now += 1.1
    assert session.meets(7)


async def test_a_pid_that_another_process_has_by_now_names_that_one_or_nobody(
    backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job runner whose connection all its jobs use, for so long that pids come again."""
    pid = os.getpid()
    job, me = Sender(pid, pid), read_process(pid)
    assert me is not None
    first = replace(me, started=me.started - 1, name="first", cmdline=("the-first-job",))
    async with told(backend, witness=Witness(), evidence_budget=1.0) as house:
        client, server = await house.session()

        async def take_turns(who: Sender) -> None:
            await client.say((asked("job"), who))
            await server.expect(asked("job"))
            await server.send(ANSWER)
            await client.expect(ANSWER)

        monkeypatch.setattr(Witness, "sender", lambda _, named: first if named == pid else None)
        for who in (job, PARENT, job, PARENT):
            await take_turns(who)
        await until(lambda: "shared-by-processes" in house.house.kinds)
        await until(lambda: house.only_session.senders.get(pid) == first)
        await house.house.guard.settled()  # what is looked at later on is another process
        told_before = len(house.house.faults)
        assert "the-first-job" in repr(house.house.faults)
        monkeypatch.undo()

        def named() -> set[tuple[str, ...] | None]:
            culprits = [culprit for one in house.house.faults[told_before:] for culprit in one.culprits]
            return {None if one.process is None else one.process.cmdline for one in culprits if one.pid == pid}

        with monkeypatch.context() as a_while_later, trio.fail_after(SECONDS):
            a_while_later.setattr("pgguard.proxy.session._FRESH", 0.0)
            while not named():
                await take_turns(job)
                await take_turns(PARENT)
                await trio.sleep(0.01)
        shown = tuple(redact_command(me.cmdline))  # what is random in a path may look like a secret
        assert named() <= {shown, None}, "the one that has the pid now, or nobody where there was no time to look"
        await until(lambda: house.only_session.senders.get(pid) == me)
        await client.close()
        await server.close()
        await house.house.empty()
