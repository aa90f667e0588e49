"""Stacks that come when the session has gone on: the ruling doesn't wait for them; the record does, for a moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from pgguard.attribution.frames import Frame
from pgguard.attribution.stacks import MOVED_ON, Stacks, find_py_spy
from pgguard.attribution.threads import Sleep, Thread, Waiting
from pgguard.attribution.witness import Witness
from pgguard.faults.fault import Role
from pgguard.proxy.postponed import LateStacks, Outbox
from pgguard.proxy.session import ProxiedSession
from pgguard.proxy.work import Work
from pgguard.reporting.sinks import Fanout
from pgguard.session.tracker import Tracker
from tests.attribution.puppets import Puppet
from tests.faults.samples import OVERLAP
from tests.faults.samples import fault as sample
from tests.proxy.conftest import ListSink, running, until
from tests.proxy.messages import ANSWER, LOGGED_IN, SECONDS, query, startup
from tests.servers import Address, needs

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from pgguard.faults.fault import Culprit, Fault
    from pgguard.session.verdicts import Verdict
    from tests.proxy.conftest import House
    from tests.proxy.fake_backend import BackendConnection, FakeBackend
    from tests.servers import Server

FIRST, SECOND, THIRD = query("select pg_sleep(60)"), query("select 2"), query("select 3")
BUDGET = 1.0
"""Seconds in which also a busy machine finds out everything but stacks."""

needs_py_spy = needs("py-spy", found=find_py_spy())

_CLIENT = f"""
import select, threading, time
connection = socket.socket(socket.AF_UNIX)
def read(size): return connection.recv(size)
def log_in(path):
    connection.connect(path)
    connection.sendall({startup()!r})
    left = {len(LOGGED_IN)}
    while left: left -= len(read(left))
def save_order(): connection.sendall({FIRST!r}); read({len(ANSWER)})
def load_user(): connection.sendall({SECOND!r}); read({len(ANSWER)})
def and_then():
    load_user()
    something_else()
def something_else(): connection.sendall({THIRD!r}); read({len(ANSWER)})
def doze():
    connection.sendall({SECOND!r})
    while not select.select([connection], [], [], 0.1)[0]: pass
def start(target):
    threading.Thread(target=target, daemon=True).start()
"""


class SlowPySpy:
    """A py-spy that doesn't begin before it is let."""

    def __init__(self, directory: Path) -> None:
        self._may_begin = directory / "begin"
        self.path = directory / "py-spy"
        self.path.write_text(
            f'#!/bin/sh\nwhile ! [ -e {self._may_begin} ]; do /bin/sleep 0.02; done\nexec {find_py_spy()} "$@"\n'
        )
        self.path.chmod(0o755)

    def let(self) -> None:
        self._may_begin.touch()


@pytest.fixture
def py_spy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SlowPySpy:
    slow = SlowPySpy(tmp_path)
    monkeypatch.setattr("pgguard.attribution.stacks.find_py_spy", lambda: str(slow.path))
    monkeypatch.setattr("pgguard.proxy.openers.find_py_spy", lambda: None)
    monkeypatch.setattr("pgguard.proxy.postponed.LATE", SECONDS)
    monkeypatch.setattr("pgguard.proxy.postponed._TIMES_BUDGET", 1000)
    return slow


@pytest.fixture
def application() -> Iterator[Puppet]:
    with Puppet() as puppet:
        puppet.do(_CLIENT)
        yield puppet


@dataclass
class Misuse:
    """A connection that two processes use at once, each in a thread of its own."""

    house: House
    application: Puppet
    server: BackendConnection
    child: int

    @property
    def faults(self) -> list[Fault]:
        """What tells of it in full; that both are seen to wait for answers repeats it."""
        told = [fault for fault in self.house.faults if fault.kind == "shared-by-processes"]
        return [fault for fault in told if fault.repeat_of is None]

    @property
    def is_entered(self) -> bool:
        return any(count.kind == "shared-by-processes" for count in self.house.docket.counts())

    async def recorded(self) -> dict[int | None, Culprit]:
        """Who shared it, by pid, when that is recorded."""
        await until(lambda: bool(self.faults))
        [fault] = self.faults
        return {one.pid: one for one in fault.culprits if one.role in {"intruder", "requester"}}


@asynccontextmanager
async def misused(
    backend: FakeBackend, application: Puppet, does: str = "load_user", **settings: Any
) -> AsyncIterator[Misuse]:
    """Have a child use a connection while its parent waits for an answer.

    Args:
        backend: the server.
        application: the parent.
        does: what the child does.
        settings: the guard's.
    """

    async def do(code: str) -> Any:
        return await trio.to_thread.run_sync(application.do, code)

    settings = {"evidence_budget": BUDGET} | settings
    async with running(backend, witness=Witness(), **settings) as house:
        async with trio.open_nursery() as arriving:
            arriving.start_soon(do, f"log_in({house.unix!r})")
            server = await backend.accept()
            await server.log_in()
        await until(lambda: all(one.opening is not None for one in house.guard._sessions.values()))
        await do("start(save_order)")
        await server.expect(FIRST)
        child = await do(f"fork(lambda: start({does}))")
        yield Misuse(house, application, server, child)


def calls(culprit: Culprit) -> list[str]:
    return [frame.function for frame in culprit.stack or ()][:2]


@needs_py_spy
async def test_the_message_goes_on_at_once_and_the_record_has_the_stacks_that_come_later(
    backend: FakeBackend, application: Puppet, py_spy: SlowPySpy
) -> None:
    async with misused(backend, application) as misuse:
        await misuse.server.expect(SECOND)
        assert misuse.faults == []
        assert misuse.is_entered
        py_spy.let()
        sides = await misuse.recorded()
        assert calls(sides[misuse.child]) == ["read", "load_user"]
        assert calls(sides[application.pid]) == ["read", "save_order"]
        [cause] = [told for told in misuse.house.docket.causes() if told.fault.kind == "shared-by-processes"]
        assert cause.fault.headline == misuse.faults[0].headline


@needs_py_spy
async def test_one_that_wakes_now_and_then_is_seen_too_as_long_as_nothing_passes(
    backend: FakeBackend, application: Puppet, py_spy: SlowPySpy
) -> None:
    async with misused(backend, application, "doze") as misuse:
        await misuse.server.expect(SECOND)
        await trio.sleep(0.2)
        assert misuse.faults == []
        py_spy.let()
        sides = await misuse.recorded()
        assert calls(sides[misuse.child])[:1] == ["doze"]


@needs_py_spy
@pytest.mark.usefixtures("py_spy")
async def test_of_threads_that_have_gone_on_nothing_is_told_and_the_record_does_not_wait(
    backend: FakeBackend, application: Puppet
) -> None:
    async with misused(backend, application) as misuse:
        await misuse.server.expect(SECOND)
        await misuse.server.send(ANSWER + ANSWER)
        sides = await misuse.recorded()
        assert {one.stack for one in sides.values()} == {None}
        assert {one.stack_problem for one in sides.values()} == {MOVED_ON}


@needs_py_spy
async def test_what_a_thread_does_that_waits_again_for_something_else_is_not_told(
    backend: FakeBackend, application: Puppet, py_spy: SlowPySpy
) -> None:
    async with misused(backend, application, "and_then") as misuse:
        await misuse.server.expect(SECOND)
        await misuse.server.send(ANSWER + ANSWER)
        await misuse.server.expect(THIRD)
        py_spy.let()
        sides = await misuse.recorded()
        assert sides[misuse.child].stack is None
        assert sides[misuse.child].stack_problem is not None


@needs_py_spy
@pytest.mark.parametrize("stops", [True, False])
async def test_the_record_is_there_when_the_guard_has_ended(
    stops: bool, backend: FakeBackend, application: Puppet, py_spy: SlowPySpy
) -> None:
    async with misused(backend, application, shutdown_timeout=0) as misuse:
        await misuse.server.expect(SECOND)
        assert misuse.faults == []
        if stops:
            misuse.house.guard.stop()
            await misuse.recorded()
    [fault] = misuse.faults
    assert {one.pid for one in fault.culprits} == {application.pid, misuse.child}
    py_spy.let()


@needs_py_spy
async def test_what_is_recorded_meanwhile_comes_behind_it(
    backend: FakeBackend, application: Puppet, py_spy: SlowPySpy
) -> None:
    async with misused(backend, application) as misuse:
        await misuse.server.expect(SECOND)
        client, server = await misuse.house.session()
        await client.send(FIRST)
        await server.expect(FIRST)
        await client.send(SECOND)
        await server.expect(SECOND)
        kinds = {"shared-by-processes", "request-while-busy"}
        await until(lambda: kinds <= {str(count.kind) for count in misuse.house.docket.counts()})
        assert misuse.house.faults == []
        py_spy.let()
        await until(lambda: kinds <= {*misuse.house.kinds})
        numbers = [fault.id for fault in misuse.house.faults]
        assert numbers == sorted(set(numbers))
        assert misuse.house.kinds.index("shared-by-processes") < misuse.house.kinds.index("request-while-busy")


@needs_py_spy
@pytest.mark.usefixtures("py_spy")
async def test_the_record_of_a_rejection_does_not_wait(backend: FakeBackend, application: Puppet) -> None:
    async with misused(backend, application, mode="reject") as misuse:
        assert await misuse.server.rest() == b""
        [fault] = misuse.faults
        assert fault.action == "rejected"
        assert {one.stack for one in fault.culprits} == {None}


@needs_py_spy
@pytest.mark.usefixtures("py_spy")
async def test_without_a_budget_nothing_waits(backend: FakeBackend, application: Puppet) -> None:
    async with misused(backend, application, evidence_budget=0.0) as misuse:
        await misuse.server.expect(SECOND)
        assert [fault.kind for fault in misuse.house.faults if fault.kind != "inherited-connection"] != []


_PROGRAM = """
import os, sys
import psycopg
def save_order(): connection.execute("SELECT pg_sleep(20)")
def load_user(): connection.execute("SELECT 2")
connection = psycopg.connect(sys.argv[1], autocommit=True)
if os.fork():
    save_order()
else:
    sys.stdin.readline()
    load_user()
"""


@contextmanager
def started(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program, which is killed in the end with all its children."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        try:
            yield process
        finally:
            os.killpg(process.pid, signal.SIGKILL)


@needs_py_spy
@pytest.mark.parametrize("server", ["embedded"], indirect=True, scope="session")
async def test_of_a_real_driver_during_a_long_query(server: Server, py_spy: SlowPySpy, tmp_path: Path) -> None:
    """Psycopg 3 wakes ten times a second."""
    program = tmp_path / "shop.py"
    program.write_text(_PROGRAM)
    settings: dict[str, Any] = {"upstream": server.unix.conninfo, "evidence_budget": BUDGET, "shutdown_timeout": 0}
    async with running(witness=Witness(), **settings) as house:

        def is_busy() -> bool:
            trackers = [one.tracker for one in house.guard._sessions.values() if one.tracker is not None]
            return any(one.logged_in and not one.idle for one in trackers)

        address = Address(str(Path(house.unix).parent), 1)
        with started(sys.executable, str(program), address.conninfo) as process:
            await until(is_busy)
            assert process.stdin is not None
            process.stdin.write(b"\n")
            process.stdin.flush()
            await until(lambda: bool(house.docket.counts()))
            assert house.faults == []
            py_spy.let()
            await until(lambda: bool(house.faults))
    fault = house.faults[0]
    sides = {one.role: [frame.function for frame in one.stack or () if frame.application] for one in fault.culprits}
    assert sides[Role.INTRUDER] == ["load_user", "<module>"]
    assert sides[Role.REQUESTER] == ["save_order", "<module>"]
    assert fault.headline.endswith("; seen at shop.py:5 in load_user")
    assert house.docket.causes()[0].fault.headline == fault.headline


# The outbox by itself

THREAD = Thread(4000, 1, 4001, 2)
SLEEP, ANOTHER = Sleep(THREAD, 10), Sleep(THREAD, 12)
FRAMES = (Frame("load_user", "/srv/app.py", 7, application=True),)


def a_session() -> ProxiedSession:
    session = ProxiedSession(1, transport="unix", client_name=None, client_socket=None, opened_at=0.0)
    session.flow.tracker = tracker = Tracker({"user": "app"})
    tracker.position, tracker.requests = 100, 2
    return session


def fault(number: int) -> Fault:
    return replace(sample(), id=number)


@pytest.fixture
def sink() -> ListSink:
    return ListSink()


@asynccontextmanager
async def outbox(sink: ListSink) -> AsyncIterator[Outbox]:
    box = Outbox(Fanout([sink], complain=print), Work())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(box.run)
        await trio.testing.wait_all_tasks_blocked()
        yield box
        nursery.cancel_scope.cancel()


def kept(budget: float = 5.0) -> LateStacks:
    """What a record waits for."""
    with LateStacks(a_session(), OVERLAP, budget) as late:
        late.begin()
        assert late.are_missing
        late.keep()
    return late


def completed(one: Fault) -> Fault:
    return replace(one, place="app.py:7 in load_user")


def written(sink: ListSink) -> list[tuple[int, bool]]:
    """The records' numbers, and whether they are complete."""
    return [(one.id, one.place is not None) for one in sink.faults]


async def test_nothing_waits_behind_nothing(sink: ListSink) -> None:
    async with outbox(sink) as box:
        box.put(None, fault(1))
        assert written(sink) == [(1, False)]


async def test_those_behind_are_written_with_it(sink: ListSink) -> None:
    async with outbox(sink) as box:
        late = kept()
        box.postpone(a_session(), fault(1), late, completed)
        box.put(None, fault(2))
        another = kept()
        box.postpone(a_session(), fault(3), another, completed)
        box.put(None, fault(4))
        assert written(sink) == []
        another.end()
        await trio.testing.wait_all_tasks_blocked()
        assert written(sink) == []
        late.end()
        await until(lambda: len(sink.faults) == 4)
        assert written(sink) == [(1, True), (2, False), (3, True), (4, False)]
        assert box.is_empty
        assert not late.is_wanted


async def test_when_the_time_is_over_it_is_written(sink: ListSink) -> None:
    async with outbox(sink) as box:
        began = time.monotonic()
        late = kept(0.02)
        box.postpone(a_session(), fault(1), late, completed)
        await until(lambda: written(sink) == [(1, True)])
        assert time.monotonic() - began >= late.seconds == 0.08
        assert not late.is_wanted, "the look ends"


async def test_it_waits_a_second_at_most() -> None:
    assert LateStacks(a_session(), OVERLAP, 5.0).seconds == 1.0
    assert LateStacks(a_session(), OVERLAP, 0.0).seconds == 0.0


async def test_if_much_comes_meanwhile_nothing_waits(sink: ListSink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgguard.proxy.postponed._MOST", 3)
    async with outbox(sink) as box:
        box.postpone(a_session(), fault(1), kept(), completed)
        for number in 2, 3, 4, 5:
            box.put(None, fault(number))
        assert written(sink) == [(1, True), (2, False), (3, False), (4, False), (5, False)]


async def test_what_waits_is_written_in_the_end_and_nothing_waits_any_more(sink: ListSink) -> None:
    async with outbox(sink) as box:
        box.postpone(a_session(), fault(1), kept(), completed)
        box.put(None, fault(2))
    assert written(sink) == [(1, True), (2, False)]
    box.postpone(a_session(), fault(3), kept(), completed)
    assert written(sink)[2:] == [(3, True)]


async def test_what_can_not_be_completed_is_written_as_it_is(sink: ListSink) -> None:
    def fail(_: Fault) -> Fault:
        raise RuntimeError

    async with outbox(sink) as box:
        late = kept()
        box.postpone(a_session(), fault(1), late, fail)
        late.end()
        await until(lambda: written(sink) == [(1, False)])


async def test_a_look_that_nobody_waits_for_ends() -> None:
    with LateStacks(a_session(), OVERLAP, 1.0) as late:
        late.begin()
    assert not late.is_wanted


async def test_a_look_that_is_over_is_not_waited_for() -> None:
    with LateStacks(a_session(), OVERLAP, 1.0) as late:
        late.begin()
        late.end()
        await late.over.wait()
        assert not late.are_missing


async def test_there_is_room_for_another_look_meanwhile() -> None:
    threads = trio.CapacityLimiter(2)
    with LateStacks(a_session(), OVERLAP, 1.0) as late:
        late.threads = threads
        late.begin()
        late.keep()
    assert threads.total_tokens == 3
    for _ in range(2):
        late.end()
    await late.over.wait()
    assert threads.total_tokens == 2


WITHOUT_MESSAGE = replace(OVERLAP, message=None)


@pytest.mark.parametrize(
    ("what", "passed", "counts"),
    [
        (OVERLAP, {}, True),
        pytest.param(OVERLAP, {"requests": 3}, True, id="the one that was held"),
        pytest.param(OVERLAP, {"requests": 4}, False, id="another request"),
        pytest.param(OVERLAP, {"position": 101}, False, id="the server's"),
        pytest.param(WITHOUT_MESSAGE, {"requests": 3}, False, id="a request, where none was held"),
    ],
)
async def test_where_something_has_passed_only_the_same_sleep_counts(
    what: Verdict, passed: dict[str, int], counts: bool
) -> None:
    session = a_session()
    late = LateStacks(session, what, 1.0)
    waiting = Waiting(ANOTHER, "web", "poll", readable=True, writable=False, others=0)
    late.deliver(Stacks({SLEEP: FRAMES, ANOTHER: FRAMES}, again={(4000, 4001): waiting}))
    late.end()
    await late.over.wait()
    for name, value in passed.items():
        setattr(session.tracker, name, value)
    found = late.added_to(Stacks())
    assert found.frames[SLEEP] == FRAMES
    expected = ({(4000, 4001): waiting}, {}) if counts else ({}, {4000: MOVED_ON})
    assert (found.again, found.problems) == expected


async def test_nothing_but_the_same_sleep_counts_in_a_session_that_is_not_followed_any_more() -> None:
    session = a_session()
    late = LateStacks(session, OVERLAP, 1.0)
    late.deliver(
        Stacks(
            {ANOTHER: FRAMES},
            again={(4000, 4001): Waiting(ANOTHER, "web", "poll", readable=True, writable=False, others=0)},
        )
    )
    late.end()
    await late.over.wait()
    session.flow.tracker = None
    assert late.added_to(Stacks()).again == {}
