"""What no message shows: transactions that sit idle, sockets that are inherited, openers that end, several readers."""

# ruff: noqa: ARG001 - a clock has to be among a test's own arguments

from __future__ import annotations

import socket
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio

from pgguard.attribution.evidence import Driver, Evidence, Process
from pgguard.attribution.holders import Holders, Holding
from pgguard.attribution.runtime import Runtime, Server
from pgguard.attribution.sockets import TcpClient
from pgguard.attribution.threads import Sleep, Thread, Waiting, Waits
from pgguard.attribution.witness import Opening, Witness
from pgguard.identity import Sender
from pgguard.proxy.ends import ATTENTIVE, Reading
from pgguard.proxy.losses import keep_going
from pgguard.proxy.session import ProxiedSession
from pgguard.proxy.sockets import Stream
from pgguard.proxy.watch import Watch
from pgguard.session.tracker import Tracker
from pgguard.session.verdicts import Kind
from tests.proxy.conftest import plain_and_encrypted, running, until
from tests.proxy.messages import ANSWER, LOGGED_IN, SELECTED, message, query

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

    from trio.testing import MockClock

    from pgguard.session.verdicts import Verdict
    from tests.proxy.conftest import House
    from tests.proxy.fake_backend import BackendConnection, FakeBackend
    from tests.proxy.messages import Client

IN_TRANSACTION = message("Z", b"T")
FAILED_TRANSACTION = message("Z", b"E")
IDLE = message("Z", b"I")


def process(pid: int) -> Process:
    return Process(pid, pid, 0.0, "app", ("app",), 1)


PARENT, CHILD, OTHER = process(100), process(101), process(102)


class Stage:
    """A watch, the sessions that it watches, and those that it has accused."""

    def __init__(self, stack: ExitStack) -> None:
        self.accused: list[Verdict] = []
        self.ready = True
        """Whether a session can be judged now."""
        self.sessions: dict[int, ProxiedSession] = {}
        self.clients: dict[int, socket.socket] = {}
        """The clients' ends, by the sessions' numbers."""
        self.watch = Watch(self.sessions, accuse=self.accuse)
        self._stack = stack

    def accuse(self, _: ProxiedSession, verdict: Verdict) -> bool:
        if self.ready:
            self.accused.append(verdict)
        return self.ready

    @property
    def kinds(self) -> list[Kind]:
        return [verdict.kind for verdict in self.accused]

    def session(self, *, opener: Process | None = PARENT) -> ProxiedSession:
        number = len(self.sessions) + 1
        session = ProxiedSession(number, transport="tcp", client_name="here:1", client_socket=None, opened_at=0.0)
        tracker = Tracker({"user": "app"})
        tracker.backend(LOGGED_IN, 0, len(LOGGED_IN))
        (client, self.clients[number]), (server, other) = socket.socketpair(), socket.socketpair()
        for sock in (self.clients[number], other):
            self._stack.enter_context(sock)
        ends = [self._stack.enter_context(closing(Stream(sock))) for sock in (client, server)]
        session.connect(ends[0], ends[1], tracker)
        address = TcpClient(bytes(4), 1, bytes(4), 2, 0, 0.0)
        evidence = Evidence.UNKNOWN if opener is None else Evidence.SOLE_HOLDER
        session.opening = Opening(address, number, opener, evidence, Holders(), Driver.LIBPQ, Runtime())
        self.sessions[number] = session
        _stages[session] = self
        self.watch.enter(session)
        return session


@pytest.fixture
def stage() -> Iterator[Stage]:
    with ExitStack() as stack:
        yield Stage(stack)
    _stages.clear()


_stages: dict[ProxiedSession, Stage] = {}


def is_contested(session: ProxiedSession) -> bool:
    return session.client.contested


def ask(session: ProxiedSession) -> None:
    feed(session, query("select 1"))


def answer(session: ProxiedSession, ready: bytes) -> None:
    data = SELECTED + ready
    assert session.tracker is not None
    session.tracker.backend(data, 0, len(data))


def use(session: ProxiedSession, sender: Sender | None, *, at: float = 1000.0) -> None:
    """Have a request sent and answered."""
    assert session.tracker is not None
    stir(session)
    data = query("select 1")
    if session.tracker.frontend(data, 0, len(data), sender, at) != len(data):
        session.tracker.overrule()
        session.tracker.frontend(data, 0, len(data), sender, at)
    answer(session, IDLE)


def feed(session: ProxiedSession, data: bytes) -> None:
    assert session.tracker is not None
    stir(session)
    session.tracker.frontend(data, 0, len(data), None, 0.0)


def stir(session: ProxiedSession) -> None:
    """Do as the relay does with what a client sends."""
    if session.client.heed & ATTENTIVE:
        session.client.heed &= ~ATTENTIVE
        _stages[session].watch.stir(session)


# Transactions, in trio's own time


@pytest.fixture
async def transactions(stage: Stage, autojump_clock: MockClock, nursery: trio.Nursery) -> Stage:
    """A watch for transactions that sit idle for ten seconds."""
    stage.watch.limit_idleness(10)
    nursery.start_soon(stage.watch.over_transactions)
    return stage


@pytest.mark.parametrize("ready", [IN_TRANSACTION, FAILED_TRANSACTION])
async def test_a_transaction_that_sits_idle_is_told_when_it_is_time(
    transactions: Stage, ready: bytes, autojump_clock: MockClock
) -> None:
    session = transactions.session()
    ask(session)
    answer(session, ready)
    await trio.sleep(9.5)
    assert transactions.kinds == []
    await trio.sleep(3)
    [verdict] = transactions.accused
    assert verdict.kind is Kind.IDLE_IN_TRANSACTION
    assert verdict.reason == "has left a transaction idle for more than 10 s"
    assert verdict.open_transaction
    assert not verdict.open_request
    assert [request.n for request in verdict.requests] == [1]


async def test_one_stretch_is_told_once_and_the_next_one_again(transactions: Stage, autojump_clock: MockClock) -> None:
    session = transactions.session()
    for stretch in (1, 2, 3):
        ask(session)
        answer(session, IN_TRANSACTION)
        await trio.sleep(100)
        assert transactions.kinds == [Kind.IDLE_IN_TRANSACTION] * stretch


async def test_no_time_counts_in_which_the_guard_was_stopped(transactions: Stage, autojump_clock: MockClock) -> None:
    session = transactions.session()
    ask(session)
    answer(session, IN_TRANSACTION)
    await trio.sleep(3)
    autojump_clock.jump(1000)
    await trio.sleep(3)
    assert transactions.kinds == []
    await trio.sleep(6)
    assert transactions.kinds == [Kind.IDLE_IN_TRANSACTION]


async def test_a_client_that_has_sent_what_is_still_to_be_read_does_not_sit_idle(
    transactions: Stage, autojump_clock: MockClock
) -> None:
    session = transactions.session()
    ask(session)
    answer(session, IN_TRANSACTION)
    transactions.clients[session.id].send(query("select 1"))
    await trio.sleep(30)
    assert transactions.kinds == []
    session.client.receive(1 << 16)
    await trio.sleep(3)
    assert transactions.kinds == [Kind.IDLE_IN_TRANSACTION]


@pytest.mark.parametrize("ready", [IDLE, b""])
async def test_a_session_that_is_idle_or_busy_is_not_in_a_transaction_that_sits_idle(
    transactions: Stage, ready: bytes, autojump_clock: MockClock
) -> None:
    session = transactions.session()
    ask(session)
    if ready:
        answer(session, ready)
    await trio.sleep(100)
    assert transactions.kinds == []


async def test_a_transaction_that_goes_on_is_not_idle(transactions: Stage, autojump_clock: MockClock) -> None:
    session = transactions.session()
    for _ in range(20):
        ask(session)
        answer(session, IN_TRANSACTION)
        await trio.sleep(8)
    assert transactions.kinds == []


async def test_a_query_that_takes_long_is_not_idle(transactions: Stage, autojump_clock: MockClock) -> None:
    session = transactions.session()
    ask(session)
    answer(session, IN_TRANSACTION)
    ask(session)
    await trio.sleep(100)
    answer(session, IN_TRANSACTION)
    await trio.sleep(8)
    assert transactions.kinds == []


async def test_a_transaction_that_ends_in_time_is_not_told(transactions: Stage, autojump_clock: MockClock) -> None:
    session = transactions.session()
    for _ in range(5):
        ask(session)
        answer(session, IN_TRANSACTION)
        await trio.sleep(8)
        ask(session)
        answer(session, IDLE)
        await trio.sleep(100)
    assert transactions.kinds == []


async def test_a_session_that_is_not_followed_has_no_transactions(
    transactions: Stage, autojump_clock: MockClock
) -> None:
    session = transactions.session()
    ask(session)
    answer(session, IN_TRANSACTION)
    await trio.sleep(5)
    session.flow.tracker = None
    await trio.sleep(100)
    assert transactions.kinds == []


async def test_a_session_that_can_not_be_judged_now_is_told_later(
    transactions: Stage, autojump_clock: MockClock
) -> None:
    transactions.ready = False
    session = transactions.session()
    ask(session)
    answer(session, IN_TRANSACTION)
    await trio.sleep(100)
    assert transactions.kinds == []
    transactions.ready = True
    await trio.sleep(2)
    assert transactions.kinds == [Kind.IDLE_IN_TRANSACTION]


async def test_with_a_threshold_of_0_no_transaction_is_too_long(stage: Stage, autojump_clock: MockClock) -> None:
    session = stage.session()
    ask(session)
    answer(session, IN_TRANSACTION)
    with trio.move_on_after(10_000) as limit:
        await stage.watch.over_transactions()
    assert limit.cancelled_caught
    assert stage.kinds == []


async def test_a_threshold_that_changes_holds_from_then_on(transactions: Stage, autojump_clock: MockClock) -> None:
    session = transactions.session()
    ask(session)
    answer(session, IN_TRANSACTION)
    transactions.watch.limit_idleness(0)
    await trio.sleep(1000)
    assert transactions.kinds == []
    transactions.watch.limit_idleness(2000)
    await trio.sleep(1900)
    assert transactions.kinds == []
    transactions.watch.limit_idleness(5)
    await trio.sleep(1)
    assert transactions.kinds == [Kind.IDLE_IN_TRANSACTION]


# Heirs and orphans, told by a witness that says what the test says


class Scripted:
    """A witness for whom every socket is open where the test says."""

    def __init__(self) -> None:
        self.holders: dict[Process, float] = {}
        """Since when; as with the real one, in seconds since whenever."""
        self.complete = True
        self.gone: set[Process] = set()
        self.waits = Waits()
        self.watching: frozenset[Thread] = frozenset()
        self.have_own: set[Process] = set()
        """Those that have opened connections of their own."""
        self.solitary: set[Process] = set()
        """Those with a single thread."""
        self.fails = False
        self.seen: dict[Process, float] = {}
        """The holders when they were last looked at."""
        self.kept: set[int] = set()
        self.looks = 0
        """Sockets of which it was looked at who has them open."""
        self.looked: list[Collection[Process]] = []
        self.glances = 0
        """Looks at whether a process has a single thread, and at who waits while no answer is due."""

    def has_news(self) -> bool:
        return self.holders != self.seen

    def watch(
        self, inodes: Iterable[int], *, keep: Mapping[int, float], over: Iterable[int], age: float
    ) -> dict[int, Holders]:
        assert age
        if self.fails:
            raise RuntimeError("injected")
        self.kept = (self.kept | keep.keys()) - set(over)
        asked = set(inodes) | keep.keys() if self.holders == self.seen else self.kept | set(inodes)
        self.seen = dict(self.holders)
        self.looks += len(asked)
        holdings = tuple(Holding(one, since, trio.current_time()) for one, since in self.holders.items())
        return {inode: Holders(holdings, self.complete and bool(holdings)) for inode in asked}

    def have_opened(self, processes: Iterable[Process]) -> frozenset[int]:
        return frozenset(process.pid for process in processes if process in self.have_own)

    def has_lost_opener(self, opening: Opening, holders: Collection[Process]) -> bool:
        return opening.opener is not None and opening.opener not in holders and opening.opener in self.gone

    def has_one_thread(self, process: Process) -> bool:
        self.glances += 1
        return process in self.solitary

    def watchers(self, _: Opening, __: Collection[Process]) -> frozenset[Thread]:
        self.glances += 1
        return self.watching

    def sleeps(self, process: Process) -> frozenset[Sleep]:
        return frozenset(one.sleep for one in self.waits.threads if one.thread.pid == process.pid)

    def look(self, _: Opening, processes: Collection[Process]) -> tuple[Waits, tuple[Waiting, ...]]:
        self.looked.append(tuple(processes))
        if self.fails:
            raise RuntimeError("injected")
        blocked = tuple(one for one in self.waits.threads if one.blocked)
        return self.waits, blocked if len(blocked) > 1 else ()


async def at_once(function: Callable[..., Any], *args: Any, **_: Any) -> Any:
    """Instead of a worker thread, for which trio's own time would not wait."""
    await trio.lowlevel.checkpoint()
    return function(*args)


@pytest.fixture
async def witness(
    stage: Stage,
    autojump_clock: MockClock,
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
) -> Scripted:
    """Of a stage that watches for heirs and readers."""
    monkeypatch.setattr(trio.to_thread, "run_sync", at_once)
    witness = Scripted()
    nursery.start_soon(keep_going, stage.watch.over_heirs, cast("Witness", witness))
    nursery.start_soon(keep_going, stage.watch.over_readers, cast("Witness", witness))
    return witness


async def test_a_connection_that_two_processes_have_open_for_a_while_is_inherited(
    stage: Stage, witness: Scripted, autojump_clock: MockClock
) -> None:
    session = stage.session()
    witness.holders = {PARENT: 0.0}
    await trio.sleep(5)
    assert stage.kinds == []
    assert not is_contested(session)
    witness.holders[CHILD] = trio.current_time()
    await trio.sleep(5)
    [verdict] = stage.accused
    assert (verdict.kind, verdict.intruder) == (Kind.INHERITED_CONNECTION, None)
    assert verdict.reason == "2 processes have the connection's socket open"
    assert is_contested(session)
    assert session.sightings.holders == (PARENT, CHILD)


async def test_an_heir_that_was_found_before_the_session_was_known_is_told_all_the_same(
    stage: Stage, witness: Scripted, autojump_clock: MockClock
) -> None:
    witness.holders = {PARENT: 0.0, CHILD: 0.0}
    witness.seen = dict(witness.holders)
    session = stage.session()
    await trio.sleep(5)
    assert is_contested(session)


async def test_one_inheritance_is_told_once_and_the_next_heir_again(
    stage: Stage, witness: Scripted, autojump_clock: MockClock
) -> None:
    stage.session()
    witness.holders = {PARENT: 0.0, CHILD: 0.0}
    await trio.sleep(20)
    assert len(stage.accused) == 1
    witness.holders[OTHER] = trio.current_time()
    await trio.sleep(20)
    assert [verdict.reason[0] for verdict in stage.accused] == ["2", "3"]
    del witness.holders[OTHER]
    await trio.sleep(20)
    assert len(stage.accused) == 2


def settled(stage: Stage) -> list[bool]:
    """Of what it has been accused of, whether the heirs had connections of their own."""
    assert set(stage.kinds) <= {Kind.INHERITED_CONNECTION}
    return [verdict.settled for verdict in stage.accused]


async def test_an_heir_that_opens_a_connection_of_its_own_in_time_is_only_mentioned(
    stage: Stage, witness: Scripted, autojump_clock: MockClock
) -> None:
    stage.session()
    witness.holders = {PARENT: trio.current_time(), CHILD: trio.current_time()}
    await trio.sleep(1.5)
    assert settled(stage) == []
    witness.have_own = {CHILD}
    await trio.sleep(20)
    assert settled(stage) == [True]


async def test_an_heir_that_does_nothing_for_too_long_is_warned_of_and_mentioned_when_it_does(
    stage: Stage, witness: Scripted, autojump_clock: MockClock
) -> None:
    stage.session()
    witness.holders = {PARENT: trio.current_time(), CHILD: trio.current_time()}
    await trio.sleep(4)
    assert settled(stage) == [False]
    witness.have_own = {CHILD}
    await trio.sleep(20)
    assert settled(stage) == [False, True]


async def test_a_worker_of_a_server_is_given_longer(stage: Stage, witness: Scripted, autojump_clock: MockClock) -> None:
    session = stage.session()
    assert session.opening is not None
    session.opening = replace(session.opening, runtime=Runtime(server=Server.CELERY))
    witness.holders = {PARENT: trio.current_time(), CHILD: trio.current_time()}
    await trio.sleep(8)
    assert settled(stage) == []
    await trio.sleep(4)
    assert settled(stage) == [False]


async def test_an_heir_whose_sibling_follows_the_advice_is_not_suspected(
    stage: Stage, witness: Scripted, autojump_clock: MockClock
) -> None:
    """A pool's worker that has had nothing to do yet; even when the sibling is gone."""
    stage.session()
    stage.session()
    witness.holders = dict.fromkeys((PARENT, CHILD, OTHER), trio.current_time())
    witness.have_own = {CHILD}
    await trio.sleep(20)
    del witness.holders[CHILD]
    await trio.sleep(20)
    assert settled(stage) == [True, True]


async def test_an_heir_that_has_used_the_connection_is_not_the_watchs_affair(
    stage: Stage, witness: Scripted, autojump_clock: MockClock
) -> None:
    """The session core speaks up with its first message."""
    session = stage.session()
    assert session.tracker is not None
    data = query("select 1")
    session.tracker.frontend(data, 0, len(data), Sender(CHILD.pid), 0.0)
    witness.holders = {PARENT: trio.current_time(), CHILD: trio.current_time()}
    witness.have_own = {CHILD}
    await trio.sleep(20)
    assert settled(stage) == []


async def test_a_child_on_its_way_to_another_program_is_no_heir(
    stage: Stage, witness: Scripted, autojump_clock: MockClock
) -> None:
    session = stage.session()
    witness.holders = {PARENT: 0.0}
    for _ in range(20):
        witness.holders[CHILD] = trio.current_time() + 1000  # never seen for long
        await trio.sleep(0.5)
        del witness.holders[CHILD]
        await trio.sleep(0.5)
    assert stage.kinds == []
    assert not is_contested(session)


async def test_a_connection_is_contested_only_as_long_as_several_have_it_open(
    stage: Stage, witness: Scripted, autojump_clock: MockClock
) -> None:
    session = stage.session()
    witness.holders = {PARENT: 0.0, CHILD: 0.0}
    await trio.sleep(5)
    assert is_contested(session)
    del witness.holders[PARENT]
    await trio.sleep(5)
    assert not is_contested(session)


async def test_an_heir_is_told_when_the_session_can_be_judged_again(
    stage: Stage, witness: Scripted, autojump_clock: MockClock
) -> None:
    stage.session()
    stage.ready = False
    witness.holders = {PARENT: 0.0, CHILD: 0.0}
    await trio.sleep(5)
    stage.ready = True
    await trio.sleep(5)
    assert stage.kinds == [Kind.INHERITED_CONNECTION]


async def test_a_connection_whose_opener_has_ended_and_that_nobody_uses_is_leaked_once(
    stage: Stage, witness: Scripted, autojump_clock: MockClock
) -> None:
    stage.session()
    witness.holders = {CHILD: 0.0}
    witness.gone = {PARENT}
    await trio.sleep(4.9)
    assert stage.kinds == []
    await trio.sleep(100)
    [verdict] = stage.accused
    assert (verdict.kind, verdict.reason) == (
        Kind.LEAKED_CONNECTION,
        "the connection has outlived the process that opened it, and has not been used for more than 5 s",
    )


@pytest.mark.parametrize(
    ("holders", "gone"),
    [
        pytest.param({PARENT: 0.0}, {PARENT}, id="seen a moment after its end"),
        pytest.param({CHILD: 0.0}, set(), id="the opener has only closed it"),
        pytest.param({}, {PARENT}, id="nobody has it open: it is about to end"),
        pytest.param({CHILD: 1e9}, {PARENT}, id="who has it open is about to let go of it"),
    ],
)
async def test_a_connection_is_not_leaked(
    stage: Stage, witness: Scripted, holders: dict[Process, float], gone: set[Process], autojump_clock: MockClock
) -> None:
    stage.session()
    witness.holders, witness.gone = holders, gone
    await trio.sleep(100)
    assert stage.kinds == []


async def test_a_connection_whose_last_holder_ends_a_moment_later_is_not_leaked(
    stage: Stage, witness: Scripted, autojump_clock: MockClock
) -> None:
    """A server is told to stop, and its workers follow."""
    stage.session()
    witness.holders, witness.gone = {CHILD: 0.0}, {PARENT}
    await trio.sleep(4.5)
    witness.holders = {}
    await trio.sleep(100)
    assert stage.kinds == []


@pytest.mark.parametrize("sender", [Sender(101, 101), None])
async def test_a_connection_that_was_handed_to_who_has_it_open_is_not_leaked(
    stage: Stage, witness: Scripted, sender: Sender | None, autojump_clock: MockClock
) -> None:
    """It may lie idle for as long as it likes, once it was used; and who has sent need not be known."""
    session = stage.session()
    witness.holders, witness.gone = {CHILD: 0.0}, {PARENT}
    await trio.sleep(3)
    use(session, sender)
    await trio.sleep(100)
    assert stage.kinds == []


async def test_what_the_opener_asked_before_it_had_heirs_is_no_use_by_them(
    stage: Stage, witness: Scripted, autojump_clock: MockClock
) -> None:
    session = stage.session()
    use(session, None, at=CHILD.started_at - 1)
    witness.holders, witness.gone = {CHILD: 0.0}, {PARENT}
    await trio.sleep(100)
    assert stage.kinds == [Kind.LEAKED_CONNECTION]


async def test_a_connection_is_leaked_when_whom_it_was_handed_to_has_ended_as_well(
    stage: Stage, witness: Scripted, autojump_clock: MockClock
) -> None:
    session = stage.session()
    witness.holders, witness.gone = {CHILD: 0.0, OTHER: 0.0}, {PARENT}
    use(session, Sender(101, 101))
    await trio.sleep(100)
    kinds = [kind for kind in stage.kinds if kind is not Kind.INHERITED_CONNECTION]
    assert kinds == []
    del witness.holders[CHILD]
    await trio.sleep(100)
    kinds = [kind for kind in stage.kinds if kind is not Kind.INHERITED_CONNECTION]
    assert kinds == [Kind.LEAKED_CONNECTION]


async def test_a_connection_that_an_heir_waits_on_is_not_leaked(
    stage: Stage, witness: Scripted, autojump_clock: MockClock
) -> None:
    """Its opener has said LISTEN, and left the rest to a child."""
    stage.session()
    witness.waits = Waits((reader(CHILD, 1),))
    witness.holders, witness.gone = {CHILD: 0.0}, {PARENT}
    await trio.sleep(100)
    assert stage.kinds == []
    witness.waits = Waits()
    await trio.sleep(100)
    assert stage.kinds == [Kind.LEAKED_CONNECTION]


async def test_of_a_session_that_is_not_followed_it_is_not_known_whether_it_is_used(
    stage: Stage, witness: Scripted, autojump_clock: MockClock
) -> None:
    stage.session().flow.tracker = None
    witness.holders, witness.gone = {CHILD: 0.0}, {PARENT}
    await trio.sleep(100)
    assert stage.kinds == []


async def test_where_the_opener_is_not_known_nobody_has_outlived_it(
    stage: Stage, witness: Scripted, autojump_clock: MockClock
) -> None:
    stage.session(opener=None)
    witness.holders = {CHILD: 0.0}
    await trio.sleep(100)
    assert stage.kinds == []


# Readers


def reader(who: Process, tid: int, *, switches: int = 1, **changes: Any) -> Waiting:
    sleep = Sleep(Thread(who.pid, who.started, tid, who.started), switches)
    given: dict[str, Any] = {"name": "app", "call": "poll", "readable": True, "writable": False, "others": 0}
    given["within_libpq"] = True
    return Waiting(sleep, **(given | changes))


async def test_two_threads_that_wait_for_one_answer_are_accused(
    stage: Stage, witness: Scripted, autojump_clock: MockClock
) -> None:
    session = stage.session()
    ask(session)
    witness.waits = Waits((reader(PARENT, 1),))
    await trio.sleep(1)
    assert stage.kinds == []
    witness.waits = Waits((reader(PARENT, 1), reader(PARENT, 2)))
    await trio.sleep(5)
    verdict = stage.accused[0]
    assert verdict.kind is Kind.SHARED_BY_THREADS
    assert verdict.intruder is not None
    assert (verdict.intruder.pid, verdict.intruder.tid, verdict.intruder.sampled) == (100, 2, True)
    assert [sender.tid for sender in verdict.requesters] == [1]
    assert verdict.open_request


def throughout(session: ProxiedSession) -> frozenset[Sleep]:
    return session.sightings.throughout


async def test_who_sleeps_is_remembered_as_long_as_nothing_is_left_unread(
    stage: Stage, witness: Scripted, autojump_clock: MockClock
) -> None:
    """Otherwise it may have sent before it fell asleep what the guard is yet to read."""
    session = stage.session()
    ask(session)
    waiting = reader(PARENT, 1)
    witness.waits = Waits((waiting,))
    await trio.sleep(1)
    assert throughout(session) == {waiting.sleep}
    stage.clients[session.id].send(query("select 2"))
    await trio.sleep(5)
    assert throughout(session) == set()
    session.client.receive(4096)
    await trio.sleep(5)
    assert throughout(session) == {waiting.sleep}
    session.client.held = b"Q"
    await trio.sleep(5)
    assert throughout(session) == set()


async def test_who_sleeps_is_not_remembered_if_somebody_has_asked_meanwhile(
    stage: Stage, witness: Scripted, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = stage.session()
    ask(session)
    witness.waits = Waits((reader(PARENT, 1),))

    def sleeps(process: Process) -> frozenset[Sleep]:
        answer(session, IDLE)
        ask(session)
        return Scripted.sleeps(witness, process)

    monkeypatch.setattr(witness, "sleeps", sleeps)
    await trio.sleep(5)
    assert witness.looked
    assert throughout(session) == set()


async def test_nobody_needs_to_know_who_sleeps_where_several_processes_or_the_kernel_tell(
    stage: Stage, witness: Scripted, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = stage.session()
    ask(session)
    witness.waits = Waits((reader(PARENT, 1),))
    monkeypatch.setattr(ProxiedSession, "names_threads", True)
    await trio.sleep(1)
    assert witness.looked
    assert throughout(session) == set()
    monkeypatch.setattr(ProxiedSession, "names_threads", False)
    witness.holders = {PARENT: 0.0, CHILD: 0.0}
    await trio.sleep(5)
    assert throughout(session) == set()


async def test_readers_are_looked_for_among_all_that_have_the_socket_open(
    stage: Stage, witness: Scripted, autojump_clock: MockClock
) -> None:
    session = stage.session()
    witness.holders = {PARENT: 0.0, CHILD: 0.0}
    await trio.sleep(5)
    ask(session)
    witness.waits = Waits((reader(PARENT, 1), reader(CHILD, 2)))
    await trio.sleep(5)
    assert witness.looked[-1] == (PARENT, CHILD)
    assert Kind.SHARED_BY_PROCESSES in stage.kinds


async def test_nobody_is_looked_at_while_no_answer_is_due(
    stage: Stage, witness: Scripted, autojump_clock: MockClock
) -> None:
    """Whoever waits on an idle connection waits for notifications."""
    session = stage.session()
    witness.waits = Waits((reader(PARENT, 1), reader(PARENT, 2)))
    await trio.sleep(100)
    assert witness.looked == []
    ask(session)
    session.client.reading = Reading.HELD
    await trio.sleep(100)
    assert witness.looked == []
    session.client.reading, session.flow.tracker = Reading.OPEN, None
    await trio.sleep(100)
    assert (witness.looked, stage.kinds) == ([], [])


async def test_a_long_query_is_looked_at_less_and_less_often(
    stage: Stage, witness: Scripted, autojump_clock: MockClock
) -> None:
    ask(stage.session())
    await trio.sleep(10)
    often = len(witness.looked)
    await trio.sleep(100)
    assert often > 10
    assert len(witness.looked) - often <= 55


async def test_it_is_looked_more_often_when_a_client_has_just_come(
    stage: Stage, witness: Scripted, autojump_clock: MockClock
) -> None:
    ask(stage.session())
    witness.solitary = {PARENT}
    await trio.sleep(1)
    quiet, witness.glances = witness.glances, 0
    stage.watch.arrival()
    await trio.sleep(1)
    assert witness.glances > 2 * quiet > 0


@pytest.mark.parametrize("fails", [True, False])
async def test_a_watch_goes_on_when_a_look_fails(
    stage: Stage, witness: Scripted, fails: bool, autojump_clock: MockClock
) -> None:
    ask(stage.session())
    witness.fails = fails
    await trio.sleep(10)
    witness.fails = False
    witness.holders = {PARENT: 0.0, CHILD: 0.0}
    witness.waits = Waits((reader(PARENT, 1), reader(PARENT, 2)))
    await trio.sleep(20)
    assert {Kind.INHERITED_CONNECTION, Kind.SHARED_BY_THREADS} <= set(stage.kinds)


async def test_a_session_that_has_been_looked_at_very_often_is_looked_at_still(
    stage: Stage, witness: Scripted, autojump_clock: MockClock
) -> None:
    session = stage.session()
    ask(session)
    session.sightings.looks = 5000
    witness.waits = Waits((reader(PARENT, 1), reader(PARENT, 2)))
    await trio.sleep(10)
    assert set(stage.kinds) == {Kind.SHARED_BY_THREADS}


# What it costs


async def test_what_is_done_a_second_does_not_depend_on_how_many_sessions_are_idle(
    stage: Stage, witness: Scripted, autojump_clock: MockClock
) -> None:
    stage.watch.limit_idleness(10)
    witness.holders = {PARENT: 0.0}
    done: list[int] = []
    for more in (20, 380):
        for _ in range(more):
            session = stage.session()
            session.arrived -= 10
            use(session, None)
        await trio.sleep(60)
        witness.glances = witness.looks = 0
        await trio.sleep(60)
        assert witness.looks == 0
        done.append(witness.glances)
    assert 0 < done[1] <= done[0] * 1.1


async def test_a_process_is_asked_once_for_all_of_its_sessions_whether_it_has_one_thread(
    stage: Stage, witness: Scripted, autojump_clock: MockClock
) -> None:
    for _ in range(30):
        session = stage.session()
        session.arrived -= 10
        ask(session)
    await trio.sleep(1.9)
    assert witness.looked
    assert 0 < witness.glances <= 2


async def test_who_waits_on_a_session_that_is_idle_is_noticed_all_the_same(
    stage: Stage, witness: Scripted, autojump_clock: MockClock
) -> None:
    sessions = [stage.session() for _ in range(20)]
    for session in sessions:
        session.arrived -= 10
        use(session, None)
    await trio.sleep(60)
    witness.watching = frozenset({reader(PARENT, 1).thread})
    await trio.sleep(60)
    assert all(session.sightings.watchers for session in sessions)


# In a guard


async def begin(client: Client, server: BackendConnection) -> None:
    await client.send(query("begin"))
    await server.expect(query("begin"))
    await server.send(SELECTED + IN_TRANSACTION)
    await client.expect(SELECTED + IN_TRANSACTION)


async def converse(client: Client, server: BackendConnection) -> None:
    await client.send(query("select 1"))
    await server.expect(query("select 1"))
    await server.send(ANSWER)
    await client.expect(ANSWER)


@pytest.mark.parametrize("attributed", [True, False])
@pytest.mark.parametrize("unix", [True, False])
async def test_an_idle_transaction_is_recorded_with_attribution_and_without(
    backend: FakeBackend, attributed: bool, unix: bool
) -> None:
    witness = Witness() if attributed else None
    async with running(backend, witness=witness, idle_in_transaction=0.05) as house:
        client, server = await house.session(unix=unix)
        await begin(client, server)
        await house.recorded("idle-in-transaction")
        [fault] = house.faults
        assert fault.action == "logged"
        assert fault.requests[-1].sql == "begin"
        await converse(client, server)
        await client.nothing(0.2)
        assert house.kinds == ["idle-in-transaction"]


async def test_the_next_idle_transaction_of_a_session_is_a_repeat(backend: FakeBackend) -> None:
    async with running(backend, idle_in_transaction=0.05) as house:
        client, server = await house.session()
        for count in (1, 2, 3):
            await begin(client, server)
            await until(lambda count=count: [one.faults + one.repeats for one in house.docket.counts()] == [count])  # type: ignore[misc]
        assert [(one.faults, one.repeats) for one in house.docket.counts()] == [(1, 2)]


@plain_and_encrypted
async def test_an_idle_transaction_can_be_rejected(backend: FakeBackend) -> None:
    async with running(backend, idle_in_transaction=0.05, kinds={"idle-in-transaction": "reject"}) as house:
        client, server = await house.session()
        await begin(client, server)
        error = (await client.message()).fields
        assert (error["S"], error["C"]) == ("FATAL", "08P01")
        assert "has left a transaction idle for more than 0.05 s" in error["M"]
        assert await client.rest() == IDLE
        assert await server.rest() == b""
        await client.close()
        await house.empty()


async def concerned(house: House) -> tuple[ProxiedSession, Verdict]:
    """The only session, and something that is wrong with it."""
    [session] = house.guard._sessions.values()
    return session, session.concern(Kind.INHERITED_CONNECTION, "2 processes have the connection's socket open")


def delayed_rulings(house: House, monkeypatch: pytest.MonkeyPatch) -> trio.Event:
    """Have every ruling wait for an event."""
    go_on = trio.Event()
    judge = house.guard._judge
    rule = judge.rule

    async def wait(*args: Any) -> Any:
        await go_on.wait()
        return await rule(*args)

    monkeypatch.setattr(judge, "rule", wait, raising=False)
    return go_on


async def test_an_accused_session_goes_on_while_it_is_ruled_on(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    client, server = await house.session()
    session, verdict = await concerned(house)
    go_on = delayed_rulings(house, monkeypatch)
    assert house.guard._sweep.accuse(session, verdict)
    await converse(client, server)
    assert house.kinds == []
    go_on.set()
    await house.recorded("inherited-connection")


@plain_and_encrypted
async def test_an_accused_session_is_rejected_if_the_configuration_says_so(backend: FakeBackend) -> None:
    async with running(backend, kinds={"inherited-connection": "reject"}) as house:
        client, server = await house.session()
        session, verdict = await concerned(house)
        assert house.guard._sweep.accuse(session, verdict)
        error = (await client.message()).fields
        assert error["C"] == "08P01"
        assert error["D"].startswith("This is inherited-connection")
        assert await server.rest() == b""
        assert await client.rest() == IDLE
        await client.close()
        await house.empty()
        assert [str(fault.action) for fault in house.faults] == ["rejected"]


@plain_and_encrypted
async def test_a_session_rejected_in_the_middle_of_an_answer_gets_to_the_end_of_a_message(backend: FakeBackend) -> None:
    async with running(backend, kinds={"inherited-connection": "reject"}) as house:
        client, server = await house.session()
        await client.send(query("select 1"))
        await server.expect(query("select 1"))
        await server.send(ANSWER[:20])
        await client.expect(ANSWER[:20])
        session, verdict = await concerned(house)
        assert house.guard._sweep.accuse(session, verdict)
        await house.recorded("inherited-connection")
        rest = len(message("T", b"")) + int.from_bytes(ANSWER[1:5], "big") - 4 - 20
        await server.send(ANSWER[20:])
        await client.expect(ANSWER[20 : 20 + rest])
        assert (await client.message()).fields["C"] == "08P01"


async def test_accusing_a_session_that_is_accused_already_does_nothing(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, server = await house.session()
    go_on = delayed_rulings(house, monkeypatch)
    session, verdict = await concerned(house)
    assert house.guard._sweep.accuse(session, verdict)
    assert not house.guard._sweep.accuse(session, verdict)
    go_on.set()
    await converse(client, server)
    await house.recorded("inherited-connection")


async def test_accusing_a_session_that_drains_does_nothing(house: House) -> None:
    client, server = await house.session()
    session, verdict = await concerned(house)
    await server.close()
    await until(lambda: session.draining)
    assert not house.guard._sweep.accuse(session, verdict)
    await client.rest()
    assert house.kinds == []


async def test_accusing_a_session_that_is_gone_does_nothing(house: House) -> None:
    client, server = await house.session()
    session, verdict = await concerned(house)
    await client.send(message("X"))
    await client.close()
    assert await server.rest() == message("X")
    await server.close()
    await house.empty()
    assert not house.guard._sweep.accuse(session, verdict)
    assert house.kinds == []


async def test_a_client_that_goes_while_it_is_accused_leaves_nothing_behind(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = delayed_rulings(house, monkeypatch)
    client, server = await house.session()
    session, verdict = await concerned(house)
    assert house.guard._sweep.accuse(session, verdict)
    await client.send(message("X"))
    await client.close()
    assert await server.rest() == message("X")
    await server.close()
    await house.empty()
    go_on.set()
    await house.recorded("inherited-connection")
    await until(lambda: not house.docket._sessions)


async def test_a_process_with_a_single_thread_is_hardly_looked_at(
    stage: Stage, witness: Scripted, autojump_clock: MockClock
) -> None:
    """Nothing can be found there, until it has another."""
    session = stage.session()
    ask(session)
    witness.solitary = {PARENT}
    await trio.sleep(10)
    assert witness.looked == []
    witness.solitary = set()
    await trio.sleep(2)
    assert witness.looked != []
