# ruff: noqa: ARG001, ARG002 - a clock has to be among a test's own arguments, and a fake takes what the real one does
"""Answers that are left unread, by real processes: told when they have lain for long, or something is sent on top."""

from __future__ import annotations

import errno
import os
import signal
from collections import Counter
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio
import trio.testing

from pgguard.attribution.attention import Attention
from pgguard.attribution.ebpf.probe import ProbeUnavailable, SenderProbe
from pgguard.attribution.evidence import Driver
from pgguard.attribution.witness import Witness
from pgguard.identity import Sender
from pgguard.proxy import unread
from pgguard.proxy.session import ProxiedSession
from pgguard.session.verdicts import Kind
from tests.attribution.puppets import THREADS, Puppet
from tests.proxy.conftest import running, until
from tests.proxy.messages import ANSWER, COLUMNS, LOGGED_IN, READY, SSL_REQUEST, message, query, startup
from tests.proxy.test_watch import Stage, feed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from trio.testing import MockClock

    from tests.proxy.conftest import House
    from tests.proxy.fake_backend import BackendConnection, FakeBackend

THRESHOLD = 0.3
FIRST, SECOND = query("select 1"), query("select 2")
NOTIFICATION = message("A", b"\0\0\1\0channel\0\0")

CLIENT = f"""
def take(size):
    while size:
        size -= len(c.recv(size))

def ask_and_take():
    c.sendall({SECOND!r})
    take({len(ANSWER)})

def take_and_ask():
    take({len(ANSWER)})
    c.sendall({SECOND!r})
"""

either_transport = pytest.mark.parametrize("transport", ["tcp", "unix"])


@pytest.fixture
def puppet() -> Iterator[Puppet]:
    with Puppet() as puppet:
        yield puppet


class Scene:
    """A process that has a session through a guard."""

    def __init__(self, house: House, puppet: Puppet) -> None:
        self.house = house
        self.puppet = puppet
        self.server: BackendConnection

    async def do(self, code: str) -> Any:
        return await trio.to_thread.run_sync(self.puppet.do, code)

    async def log_in(self, transport: str, *before: bytes) -> None:
        await self.do(THREADS + CLIENT)
        await self.connect(transport, *before)
        self.server = await self.house.backend.accept()
        await self.server.log_in()
        await self.do(f"take({len(LOGGED_IN)})")
        await self.session.opening_known.wait()

    async def connect(self, transport: str, *before: bytes) -> None:
        if transport == "unix":
            await self.do(f"c = socket.socket(socket.AF_UNIX); c.connect({self.house.unix!r})")
        else:
            await self.do(f"c = socket.create_connection(('127.0.0.1', {self.house.port}))")
        for request in before:
            await self.do(f"c.sendall({request!r}); take(1)")
        await self.do(f"c.sendall({startup()!r})")

    @property
    def session(self) -> ProxiedSession:
        [session] = self.house.guard._sessions.values()
        return session

    async def ask(self, request: bytes = FIRST, answer: bytes = ANSWER) -> None:
        """It asks, is answered, and hasn't read anything yet."""
        await self.do(f"c.sendall({request!r})")
        await self.server.expect(request)
        await self.server.send(answer)

    async def lies_unread(self) -> None:
        """Wait until the guard has noticed."""
        await until(lambda: self.is_last() and self.leftover is not None and self.leftover.undisturbed is not None)

    async def is_seen_unread(self) -> None:
        await until(lambda: self.is_last() and self.leftover is not None and self.leftover.size > 0)

    def is_last(self) -> bool:
        """Whether what lies unread is the last answer."""
        leftover, tracker = self.leftover, self.session.tracker
        return leftover is not None and tracker is not None and leftover.requests == tracker.requests

    async def is_seen_read(self) -> None:
        """Wait until the guard has looked, and has nothing more to look at."""
        await until(lambda: not self.house.guard._unread._listed)

    @property
    def leftover(self) -> unread.Leftover | None:
        return self.session.leftover

    async def is_not_told(self) -> None:
        """For three times as long as it takes to tell."""
        await trio.sleep(3 * THRESHOLD)
        assert self.house.kinds == []


@asynccontextmanager
async def playing(backend: FakeBackend, puppet: Puppet, transport: str, **settings: Any) -> AsyncIterator[Scene]:
    with ExitStack() as stack:
        probe = stack.enter_context(probing()) if transport == "probed" else None
        async with running(backend, witness=Witness(), **({"unread_answer": THRESHOLD} | settings)) as house:
            if probe is not None:
                probe.add(*house.guard.tcp_listeners()[0])
                house.guard.use_probe(probe)
            scene = Scene(house, puppet)
            await scene.log_in(transport)
            yield scene


def probing() -> SenderProbe:
    try:
        return SenderProbe([], blocking=True)
    except ProbeUnavailable as unavailable:
        pytest.skip(str(unavailable))


# A warning, in time


@either_transport
async def test_an_answer_that_nobody_reads_is_told_with_what_its_client_does_instead(
    backend: FakeBackend, puppet: Puppet, transport: str
) -> None:
    async with playing(backend, puppet, transport) as scene:
        await scene.ask()
        await scene.house.recorded("unread-answer")
        [fault] = scene.house.faults
        assert fault.severity == "warning"
        size = len(ANSWER) - len(READY)
        assert fault.reason == f"has left an answer of {size} bytes unread for more than {THRESHOLD:g} s"
        assert fault.summary.startswith(f"pid {puppet.pid}")
        assert fault.message is None
        assert fault.libpq is None
        [named] = [one for one in fault.culprits if one.role in ("requester", "holder")]
        assert (named.pid, named.tid, named.system_call) == (puppet.pid, puppet.pid, "read")
        assert named.role == ("requester" if transport == "unix" else "holder")


async def test_one_answer_is_told_once_and_the_next_one_again(backend: FakeBackend, puppet: Puppet) -> None:
    async with playing(backend, puppet, "tcp") as scene:
        await scene.ask()
        await scene.house.recorded("unread-answer")
        await trio.sleep(2 * THRESHOLD)
        await scene.do(f"take({len(ANSWER)})")
        await scene.ask()
        await until(lambda: scene.house.docket.counts()[0].repeats == 1)
        assert len({fault.id for fault in scene.house.faults if fault.repeat_of is None}) == 1


# Silence for who reads, however late


@either_transport
@pytest.mark.parametrize("answer", [ANSWER, ANSWER + NOTIFICATION * 3], ids=["alone", "before notifications"])
async def test_what_is_read_is_looked_at_once_and_then_no_more(
    backend: FakeBackend, puppet: Puppet, transport: str, answer: bytes
) -> None:
    """A notification that lies there is no answer, whoever is in no hurry to read it."""
    async with playing(backend, puppet, transport) as scene:
        for _ in range(2):
            await scene.ask(answer=answer)
            await scene.do(f"take({len(ANSWER)})")
            await scene.is_seen_read()
            assert scene.leftover is None
            await scene.is_not_told()
            await scene.do(f"take({len(answer) - len(ANSWER)})")


@either_transport
async def test_who_has_begun_to_read_is_reading(backend: FakeBackend, puppet: Puppet, transport: str) -> None:
    async with playing(backend, puppet, transport) as scene:
        await scene.ask()
        await scene.do("take(1)")
        await scene.is_not_told()


@either_transport
async def test_a_ready_for_query_that_is_left_is_no_answer(
    backend: FakeBackend, puppet: Puppet, transport: str
) -> None:
    async with playing(backend, puppet, transport) as scene:
        await scene.ask()
        await scene.do(f"take({len(ANSWER) - len(READY)})")
        await scene.is_seen_read()
        await scene.is_not_told()


@pytest.mark.parametrize(
    ("request_", "answer"),
    [
        (message("C", b"Sname\0") + message("S"), message("3") + READY),
        (message("S"), READY),
    ],
)
async def test_an_answer_that_nobody_would_miss_is_not_told(
    backend: FakeBackend, puppet: Puppet, request_: bytes, answer: bytes
) -> None:
    async with playing(backend, puppet, "tcp") as scene:
        await scene.ask(request_, answer)
        await scene.is_not_told()


@pytest.mark.parametrize("stop", [signal.SIGSTOP, signal.SIGTSTP])
async def test_who_is_stopped_is_not_told_and_gets_all_its_time_anew(
    backend: FakeBackend, puppet: Puppet, stop: signal.Signals
) -> None:
    async with playing(backend, puppet, "tcp") as scene:
        await scene.ask()
        os.kill(puppet.pid, stop)
        await scene.is_not_told()
        leftover = scene.leftover
        assert leftover is not None
        await until(lambda: leftover.silence == 0)
        os.kill(puppet.pid, signal.SIGCONT)
        await scene.house.recorded("unread-answer")


@either_transport
async def test_an_event_loop_that_is_kept_busy_is_not_told(
    backend: FakeBackend, puppet: Puppet, transport: str
) -> None:
    """As asyncio's is when a task calls time.sleep(): it has the socket in its set, and will read."""
    async with playing(backend, puppet, transport) as scene:
        await scene.do("loop = select.epoll(); loop.register(c, select.EPOLLIN)")
        await scene.ask()
        await scene.is_not_told()


@either_transport
async def test_who_has_asked_on_several_connections_and_awaits_another_one_first_is_not_told(
    backend: FakeBackend, puppet: Puppet, transport: str
) -> None:
    """As a program that asks all shards at once and reads their answers in turn."""
    async with playing(backend, puppet, transport) as scene:
        [session] = scene.house.guard._sessions.values()
        await scene.do("first = c")
        await scene.connect(transport)
        slow = await scene.house.backend.accept()
        await slow.log_in()
        await scene.do(f"take({len(LOGGED_IN)}); c.sendall({FIRST!r})")
        await slow.expect(FIRST)
        await scene.do(f"first.sendall({FIRST!r})")
        await scene.server.expect(FIRST)
        await scene.server.send(ANSWER)
        await scene.is_not_told()
        assert session.leftover is not None
        await slow.send(ANSWER)
        await scene.do(f"take({len(ANSWER)})")
        await scene.house.recorded("unread-answer")
        assert scene.house.faults[0].session.id == session.id


async def test_who_computes_is_not_told(backend: FakeBackend, puppet: Puppet) -> None:
    async with playing(backend, puppet, "tcp") as scene:
        await scene.ask()
        await scene.do("start(spin)")
        await scene.is_not_told()


async def test_without_a_threshold_nothing_is_told(backend: FakeBackend, puppet: Puppet) -> None:
    async with playing(backend, puppet, "tcp", unread_answer=0) as scene:
        await scene.ask()
        await scene.is_not_told()


@either_transport
async def test_who_has_closed_the_connection_is_not_told(backend: FakeBackend, puppet: Puppet, transport: str) -> None:
    async with playing(backend, puppet, transport) as scene:
        await scene.ask()
        await scene.is_seen_unread()
        await scene.do("c.close()")
        await until(lambda: "unclean-close" in scene.house.kinds)
        await trio.sleep(2 * THRESHOLD)
        assert "unread-answer" not in scene.house.kinds


async def test_a_session_that_was_seen_to_pipeline_is_not_told(backend: FakeBackend, puppet: Puppet) -> None:
    extended = message("P", b"\0select 1\0\0\0") + message("B", bytes(8)) + message("E", bytes(5)) + message("S")
    answer = message("1") + message("2") + message("C", b"SELECT 0\0") + READY
    async with playing(backend, puppet, "tcp") as scene:
        await scene.ask(extended + extended, answer + answer)
        await scene.is_not_told()


# An error, when something is sent on top


@either_transport
async def test_a_request_that_is_sent_on_top_is_an_error_before_it_is_forwarded(
    backend: FakeBackend, puppet: Puppet, transport: str
) -> None:
    async with playing(backend, puppet, transport, unread_answer=60) as scene:
        await scene.ask()
        await scene.lies_unread() if transport == "unix" else await scene.is_seen_unread()
        await scene.do(f"c.sendall({SECOND!r})")
        await scene.house.recorded("unread-answer")
        [fault] = scene.house.faults
        assert fault.severity == "error"
        assert fault.message is not None
        assert (fault.message.name, fault.message.size) == ("Query", len(SECOND))
        assert fault.reason.startswith(f"on top of {len(ANSWER) - len(READY)} bytes of the last answer")
        assert fault.summary.startswith(f"pid {puppet.pid}")
        assert [one.role for one in fault.culprits][:2] == ["requester", "owner"]
        await scene.server.expect(SECOND)


@either_transport
async def test_in_reject_mode_it_is_not_forwarded(backend: FakeBackend, puppet: Puppet, transport: str) -> None:
    async with playing(backend, puppet, transport, unread_answer=60, mode="reject") as scene:
        await scene.ask()
        await scene.lies_unread() if transport == "unix" else await scene.is_seen_unread()
        await scene.do(f"c.sendall({SECOND!r})")
        await scene.house.recorded("unread-answer")
        assert scene.house.faults[0].action == "rejected"
        assert await scene.server.rest() == b""
        await scene.do(f"take({len(ANSWER)})")
        assert "on top of" in await scene.do("c.recv(65536).decode(errors='replace')")


async def test_over_a_unix_socket_who_reads_at_once_behind_its_request_is_convicted_every_time(
    backend: FakeBackend, puppet: Puppet
) -> None:
    """The answer is gone from the queue before the guard has the request."""
    async with playing(backend, puppet, "unix", unread_answer=60) as scene:
        await scene.ask()
        for times in range(1, 11):
            await scene.lies_unread()
            await scene.do("ask_and_take()")
            await scene.server.expect(SECOND)
            await scene.server.send(ANSWER)
            assert sum(count.faults + count.repeats for count in scene.house.docket.counts()) == times
        assert {fault.kind for fault in scene.house.faults} == {"unread-answer"}


@either_transport
async def test_who_reads_late_and_then_sends_is_never_convicted(
    backend: FakeBackend, puppet: Puppet, transport: str
) -> None:
    async with playing(backend, puppet, transport, unread_answer=60) as scene:
        await scene.ask()
        for _ in range(10):
            await scene.lies_unread() if transport == "unix" else await scene.is_seen_unread()
            await scene.do("take_and_ask()")
            await scene.server.expect(SECOND)
            await scene.server.send(ANSWER)
        assert scene.house.kinds == []


async def test_where_the_kernel_reports_it_no_silence_is_too_short(backend: FakeBackend, puppet: Puppet) -> None:
    """Nothing has been looked at by then, and the answer is gone from the queue before the guard has the request."""
    async with playing(backend, puppet, "probed", unread_answer=60) as scene:
        for declined in range(2):
            if declined:  # what it was told before it logged in counts, too
                await scene.do("c.close()")
                await scene.house.empty()
                await scene.log_in("probed", SSL_REQUEST)
            await scene.ask()
            for times in range(1, 11):
                await scene.do(f"len(c.recv({len(ANSWER)}, socket.MSG_PEEK | socket.MSG_WAITALL))")
                await scene.do("ask_and_take()")
                await scene.server.expect(SECOND)
                await scene.server.send(ANSWER)
                counts = {str(count.kind): count.faults + count.repeats for count in scene.house.docket.counts()}
                assert counts["unread-answer"] == times + 10 * declined


async def test_where_the_kernel_reports_it_who_has_read_is_never_convicted(
    backend: FakeBackend, puppet: Puppet
) -> None:
    async with playing(backend, puppet, "probed", unread_answer=60) as scene:
        await scene.ask(answer=ANSWER + NOTIFICATION)
        for _ in range(10):
            await scene.do(f"len(c.recv({len(ANSWER)}, socket.MSG_PEEK | socket.MSG_WAITALL))")
            await scene.do("take_and_ask()")
            await scene.server.expect(SECOND)
            await scene.server.send(ANSWER)
            await scene.do(f"take({len(NOTIFICATION)})")
            await scene.do(f"take({len(ANSWER) - len(READY)})")
            await scene.do(f"c.sendall({SECOND!r})")  # the ReadyForQuery alone is left
            await scene.server.expect(SECOND)
            await scene.do(f"take({len(READY)})")
            await scene.server.send(ANSWER + NOTIFICATION)
        assert scene.house.kinds == []


@either_transport
async def test_an_error_is_told_though_the_warning_has_been(
    backend: FakeBackend, puppet: Puppet, transport: str
) -> None:
    async with playing(backend, puppet, transport) as scene:
        await scene.ask()
        await scene.house.recorded("unread-answer")
        await scene.do(f"c.sendall({SECOND!r})")
        await scene.house.recorded("unread-answer", "unread-answer")
        assert [(str(fault.severity), fault.repeat_of) for fault in scene.house.faults] == [
            ("warning", None),
            ("error", None),
        ]


async def test_over_tcp_what_has_been_read_meanwhile_is_forwarded_without_a_word(
    backend: FakeBackend, puppet: Puppet
) -> None:
    async with playing(backend, puppet, "tcp", unread_answer=60) as scene:
        await scene.ask()
        await scene.is_seen_unread()
        await scene.do(f"take({len(ANSWER)}); c.sendall({SECOND + SECOND!r})")
        await scene.server.expect(SECOND + SECOND)
        assert "unread-answer" not in scene.house.kinds


# Whom it may concern

PARSE = message("P", b"\0select 1\0\0\0") + message("S")
CLOSE = message("C", b"Sname\0") + message("S")
DESCRIBE = message("D", b"S\0") + message("S")
ANSWERS = {
    FIRST: ANSWER,
    PARSE: message("1") + READY,
    CLOSE: message("3") + READY,
    DESCRIBE: message("t", b"\0\0") + COLUMNS + READY,
}


@pytest.fixture
def stage() -> Iterator[Stage]:
    with ExitStack() as stack:
        yield Stage(stack)


def is_suspect(session: ProxiedSession, last: bytes, now: str) -> bool:
    """Whether a session with an unread answer to ``last`` is suspect when it sends ``now``."""
    feed(session, last)
    assert session.tracker is not None
    answer = ANSWERS[last]
    session.tracker.backend(answer, 0, len(answer))
    session.leftover = unread.Leftover(session.tracker.requests, since=0.0, next=0.0, looked=0.0, size=10)
    return unread.UnreadWatch(5.0).is_suspect(session, ord(now))


@pytest.mark.parametrize(
    ("driver", "last", "now", "suspect"),
    [
        (Driver.PYTHON, FIRST, "Q", True),
        (Driver.PYTHON, PARSE, "P", True),
        (Driver.PYTHON, CLOSE, "P", False),
        (Driver.PYTHON, DESCRIBE, "B", False),
        (Driver.PYTHON, DESCRIBE, "P", True),
        (Driver.PYTHON, PARSE, "B", True),
        (Driver.LIB_PQ, DESCRIBE, "B", True),
        (Driver.LIB_PQ, FIRST, "P", True),
        (Driver.LIB_PQ, PARSE, "B", True),
        (Driver.LIBPQ, FIRST, "Q", True),
        (Driver.LIBPQ, FIRST, "P", True),
        (Driver.LIBPQ, PARSE, "Q", True),
        (Driver.LIBPQ, PARSE, "P", False),
        (Driver.NODE, FIRST, "Q", False),
        (Driver.POSTGRES_JS, FIRST, "Q", False),
        (Driver.PGX, PARSE, "P", False),
        (Driver.UNKNOWN, FIRST, "Q", False),
    ],
)
def test_only_who_never_sends_before_it_has_read_is_suspect(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, driver: Driver, last: bytes, now: str, *, suspect: bool
) -> None:
    monkeypatch.setattr(ProxiedSession, "driver", driver)
    assert is_suspect(stage.session(), last, now) is suspect


def test_another_process_that_sends_is_told_as_one_that_shares_the_connection(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ProxiedSession, "driver", Driver.PYTHON)
    for sender, suspect in ((Sender(7, 7), True), (Sender(7, 8), True), (Sender(8, 8), False)):
        session = stage.session()
        session.client.sender = sender
        assert session.tracker is not None
        session.tracker.frontend(b"", 0, 0, Sender(7, 7), 0.0)
        data = FIRST
        session.tracker.frontend(data, 0, len(data), Sender(7, 7), 0.0)
        answer = ANSWER
        session.tracker.backend(answer, 0, len(answer))
        session.leftover = unread.Leftover(1, since=0.0, next=0.0, looked=0.0, size=10)
        assert unread.UnreadWatch(5.0).is_suspect(session, ord("Q")) is suspect


async def test_a_request_on_top_of_an_answer_is_about_the_time_when_that_was_left(stage: Stage) -> None:
    session = stage.session()
    tracker = session.tracker
    assert tracker is not None
    for at, asked in ((5.0, FIRST), (7.0, PARSE)):
        data = asked
        tracker.frontend(data, 0, len(data), Sender(7, 7), at)
        answer = ANSWERS[asked]
        tracker.backend(answer, 0, len(answer))
    verdict = unread.UnreadWatch(5.0).sent_on_top(session, tracker, unread.Unread(10), FIRST)
    assert verdict.since == 7.0


class Full:
    """An epoll set that has no room for another descriptor."""

    def watch(self, fd: int, events: int, on_event: Callable[[int], None]) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def unwatch(self, fd: int) -> None:
        raise AssertionError


async def test_an_alarm_that_can_not_be_set_keeps_no_descriptor_and_is_not_counted(stage: Stage) -> None:
    session = stage.session()
    alarms: set[unread.ReadingAlarm] = set()
    spare = os.dup(session.client.fd)
    os.close(spare)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        unread.ReadingAlarm(Full(), alarms, session.client)
    assert not alarms
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        os.fstat(spare)


# How time is counted, in trio's own


class Onlooker:
    """A witness that sees what the test says."""

    def __init__(self) -> None:
        self.size: int | None = len(ANSWER)
        self.attention = Attention.ELSEWHERE
        self.looks = 0
        self.rounds: list[int] = []

    def unread(self, looks: list[Any]) -> list[int | None]:
        self.looks += len(looks)
        self.rounds.append(len(looks))
        return [self.size] * len(looks)

    def see(self, *_: Any) -> Attention:
        return self.attention


async def at_once(function: Callable[..., Any], *args: Any, **_: Any) -> Any:
    """The clock doesn't wait for threads."""
    return function(*args)


@pytest.fixture
async def watched(
    stage: Stage, autojump_clock: MockClock, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> tuple[ProxiedSession, Onlooker]:
    """A session whose answer lies unread, under a watch with a threshold of ten seconds."""
    monkeypatch.setattr(trio.to_thread, "run_sync", at_once)
    onlooker = Onlooker()
    witness = cast("Witness", SimpleNamespace(unread=onlooker.unread, attention=onlooker.see))
    watch = unread.UnreadWatch(10.0)
    nursery.start_soon(partial(watch.run, witness, accuse=stage.accuse, set_alarm=no_alarm))
    await trio.testing.wait_all_tasks_blocked()
    session = stage.session()
    session.transport = "unix"  # so that nothing is added that the kernel would say of a TCP socket
    session.client.sock.send(ANSWER, 0, len(ANSWER))
    feed(session, FIRST)
    watch.stir(session)
    assert session.tracker is not None
    answer = ANSWER
    session.tracker.backend(answer, 0, len(answer))
    return session, onlooker


def no_alarm(_: Any) -> Any:
    raise OSError


async def test_what_a_round_takes_does_not_grow_with_how_many_have_just_been_used(
    stage: Stage, autojump_clock: MockClock, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trio.to_thread, "run_sync", at_once)
    monkeypatch.setattr(unread, "_IN_A_ROUND", 8)
    monkeypatch.setattr(unread, "_AT_A_TIME", 4)
    monkeypatch.setattr(unread, "_CLOSELY", 2)
    onlooker = Onlooker()
    witness = cast("Witness", SimpleNamespace(unread=onlooker.unread, attention=onlooker.see))
    watch = unread.UnreadWatch(10.0)
    gone_through: Counter[float] = Counter()
    due_look = watch._due_look

    def counted(session: ProxiedSession, now: float) -> Any:
        gone_through[trio.current_time()] += 1
        return due_look(session, now)

    monkeypatch.setattr(watch, "_due_look", counted)
    nursery.start_soon(partial(watch.run, witness, accuse=stage.accuse, set_alarm=no_alarm))
    await trio.testing.wait_all_tasks_blocked()
    sessions = [stage.session() for _ in range(40)]
    for session in sessions:
        session.transport = "unix"
        session.client.sock.send(ANSWER, 0, len(ANSWER))
        feed(session, FIRST)
        watch.stir(session)
        assert session.tracker is not None
        session.tracker.backend(ANSWER, 0, len(ANSWER))
    await trio.sleep(5)
    assert max(gone_through.values()) <= 8
    assert onlooker.rounds[0] == 4, "nothing is known of any"
    assert max(onlooker.rounds[-20:]) == 2, "what lies unread is looked at closely"
    assert all(session.leftover is not None and session.leftover.looks > 1 for session in sessions), "each has its turn"
    await trio.sleep(15)
    assert {verdict.kind for verdict in stage.accused} == {Kind.UNREAD_ANSWER}
    assert len(stage.accused) == len(sessions)


async def test_it_is_told_when_it_is_time(
    stage: Stage, watched: tuple[ProxiedSession, Onlooker], autojump_clock: MockClock
) -> None:
    await trio.sleep(9.5)
    assert stage.accused == []
    await trio.sleep(1.5)
    [verdict] = stage.accused
    assert verdict.reason == f"has left an answer of {len(ANSWER) - len(READY)} bytes unread for more than 10 s"
    assert verdict.libpq == "another command is already in progress"
    looks = watched[1].looks
    await trio.sleep(600)
    assert len(stage.accused) == 1
    assert watched[1].looks - looks < 120


@pytest.mark.parametrize(("attention", "lost"), [(Attention.RUNS, 0), (Attention.READS, 0), (Attention.STOPPED, 8)])
async def test_time_in_which_it_may_have_read_does_not_count(
    stage: Stage,
    watched: tuple[ProxiedSession, Onlooker],
    autojump_clock: MockClock,
    attention: Attention,
    lost: float,
) -> None:
    await trio.sleep(8)
    watched[1].attention = attention
    await trio.sleep(100)
    assert stage.accused == []
    watched[1].attention = Attention.ELSEWHERE
    await trio.sleep(1 + lost)
    assert stage.accused == []
    await trio.sleep(2)
    assert len(stage.accused) == 1


async def test_time_in_which_the_guard_was_stopped_does_not_count(
    stage: Stage, watched: tuple[ProxiedSession, Onlooker], autojump_clock: MockClock
) -> None:
    """As when a laptop wakes up whose clock has gone on: both have had no time."""
    await trio.sleep(8)
    autojump_clock.jump(3600)
    await trio.sleep(0.6)
    assert stage.accused == []
    await trio.sleep(3)
    assert len(stage.accused) == 1


async def test_a_client_that_goes_on_reading_is_not_told_however_slowly(
    stage: Stage, watched: tuple[ProxiedSession, Onlooker], autojump_clock: MockClock
) -> None:
    for size in range(len(ANSWER) - 1, len(READY), -10):
        watched[1].size = size
        await trio.sleep(60)
    watched[1].size = 0
    await trio.sleep(60)
    looks = watched[1].looks
    await trio.sleep(60)
    assert stage.accused == []
    assert watched[1].looks == looks


async def test_it_is_told_later_if_the_session_is_being_judged(
    stage: Stage, watched: tuple[ProxiedSession, Onlooker], autojump_clock: MockClock
) -> None:
    stage.ready = False
    await trio.sleep(30)
    assert stage.accused == []
    stage.ready = True
    await trio.sleep(1)
    assert len(stage.accused) == 1
