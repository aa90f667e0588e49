"""Who has sent, told by who has just begun to wait: with real processes, threads and sockets."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pgguard.attribution.processes import read_process
from pgguard.attribution.sampling import Sample, sample_sender
from pgguard.attribution.threads import Obstacle, Thread, Waits, waiting_threads
from tests.attribution.puppets import THREADS

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from pgguard.attribution.evidence import Process
    from pgguard.attribution.threads import Sleep
    from tests.attribution.puppets import Puppet

NOBODY: frozenset[Sleep] = frozenset()
BRIEFLY = 0.05
"""Seconds to look for what isn't to be found."""


class Shared:
    """One connection, a parent that has opened it and a child that has inherited it, each with threads to command."""

    def __init__(self, client: Puppet) -> None:
        self.client = client
        client.do(THREADS)
        self.inode: int = client.do("os.fstat(c.fileno()).st_ino")
        self.child: int = client.do("fork_puppet()")
        self.processes: list[Process] = []
        for pid in (client.pid, self.child):
            process = read_process(pid)
            assert process is not None
            self.processes.append(process)

    def wait(self, code: str = "poll(c)", *, child: bool = False) -> int:
        """Have a new thread run ``code``, and return its tid once it waits on the connection."""
        before = {one.sleep for one in self.look().threads}
        tid: int = self.client.do(f"order({self.child}, {code!r})" if child else f"start(lambda: {code})")
        until(lambda: any(one.thread.tid == tid and one.sleep not in before for one in self.look().threads))
        return tid

    def look(self) -> Waits:
        return waiting_threads(self.processes, self.inode, seconds=5)

    def asleep(self) -> frozenset[Sleep]:
        return frozenset(one.sleep for one in self.look().threads)

    def sample(
        self,
        before: frozenset[Sleep] = NOBODY,
        seconds: float = 5.0,
        busy: Collection[tuple[int, int | None]] = (),
        watchers: Collection[Thread] = (),
    ) -> Sample:
        """By default until it is certain, since the thread that has just taken an order may run still."""
        return sample_sender(self.processes, self.inode, before=before, busy=busy, watchers=watchers, seconds=seconds)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture
def shared(puppet: Callable[[], Puppet]) -> Iterator[Shared]:
    client = puppet()
    with socket.create_server(("127.0.0.1", 0)) as listener, client.connect(listener):
        yield Shared(client)


def who(sample: Sample) -> tuple[int, int | None] | None:
    return None if sample.pid is None else (sample.pid, sample.tid)


@pytest.mark.parametrize("child", [False, True])
@pytest.mark.parametrize("code", ["poll(c)", "c.recv(1)", "poll(c, waker)"])
def test_the_one_that_has_begun_to_wait_is_the_sender(shared: Shared, code: str, child: bool) -> None:
    """Whichever process it is, and however it waits: as libpq does, plainly, or as Ruby does."""
    tid = shared.wait(code, child=child)
    assert who(shared.sample()) == (shared.child if child else shared.client.pid, tid)


def test_a_select_is_a_beginning_to_wait_as_well(shared: Shared) -> None:
    tid = shared.wait("select.select([c], [], [])")
    assert who(shared.sample()) == (shared.client.pid, tid)


def test_of_one_that_waited_before_and_one_that_waits_since_the_new_one_is_the_sender(shared: Shared) -> None:
    shared.wait("poll(c)")
    before = shared.asleep()
    tid = shared.wait("poll(c)", child=True)
    assert who(shared.sample(before)) == (shared.child, tid)


def test_of_two_that_have_begun_to_wait_neither_is_picked(shared: Shared) -> None:
    """Either may have sent, and the other has sent something else that is still on its way."""
    shared.wait("poll(c)")
    shared.wait("poll(c)", child=True)
    assert who(shared.sample(seconds=BRIEFLY)) is None
    assert len(shared.sample().waits.threads) == 2


def test_one_that_waited_already_has_not_sent(shared: Shared) -> None:
    shared.wait("poll(c)", child=True)
    assert who(shared.sample(shared.asleep(), seconds=BRIEFLY)) is None


def test_one_that_an_answer_is_due_to_has_not_sent(shared: Shared) -> None:
    """It wakes for every part of its answer, and so it is found in another sleep each time."""
    busy = shared.wait("poll(c)", child=True)
    assert who(shared.sample(seconds=BRIEFLY, busy={(shared.child, busy)})) is None
    tid = shared.wait("poll(c)")
    assert who(shared.sample(busy={(shared.child, busy)})) == (shared.client.pid, tid)


def test_one_in_an_event_loop_is_not_named(shared: Shared) -> None:
    """It waits whether or not an answer is due to it."""
    shared.wait("epoll(c, other)", child=True)
    assert who(shared.sample(seconds=BRIEFLY)) is None


def test_one_in_an_event_loop_makes_the_other_uncertain(shared: Shared) -> None:
    """It may have sent before it went back to its loop, just as the one that waits for this alone."""
    shared.wait("epoll(c, other)", child=True)
    shared.wait("poll(c)")
    assert who(shared.sample(seconds=BRIEFLY)) is None


def test_one_that_was_in_its_event_loop_all_the_time_makes_nothing_uncertain(shared: Shared) -> None:
    shared.wait("epoll(c, other)", child=True)
    before = shared.asleep()
    tid = shared.wait("poll(c)")
    assert who(shared.sample(before)) == (shared.client.pid, tid)


def test_one_that_waits_to_write_has_not_sent_all_of_it(shared: Shared) -> None:
    shared.client.do("fill(c)")
    shared.client.do("start(lambda: c.send(bytes(1 << 20)))")
    assert who(shared.sample(seconds=BRIEFLY)) is None


def test_nobody_is_named_where_not_everybody_can_be_seen(shared: Shared) -> None:
    """The sender may be the thread that isn't seen."""
    shared.wait("poll(c)")

    def partly(*_: object) -> Waits:
        waits = shared.look()
        return Waits(waits.threads, {shared.child: Obstacle.IO_URING})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pgguard.attribution.sampling.waiting_threads", partly)
        assert who(shared.sample(seconds=BRIEFLY)) is None


def test_one_whose_neighbour_runs_is_not_named(shared: Shared) -> None:
    """The one that runs may have sent, and not have come to its wait yet."""
    shared.client.do(f"order({shared.child}, 'spin()')")
    shared.wait("poll(c)")
    assert who(shared.sample(seconds=BRIEFLY)) is None


def test_one_whose_own_process_runs_is_named_without_its_thread(shared: Shared) -> None:
    """Nobody else can have sent than this process; another thread of it can."""
    shared.client.do("start(spin)")
    shared.wait("poll(c)")
    until(lambda: who(shared.sample(seconds=BRIEFLY)) == (shared.client.pid, None))  # with a spinner time may be short


def test_a_watcher_is_not_named(shared: Shared) -> None:
    """It waits whether or not it has sent anything."""
    shared.wait("poll(c)")
    watcher = shared.sample(seconds=BRIEFLY).waits.threads[0].thread
    assert who(shared.sample(seconds=BRIEFLY, watchers={watcher})) is None


def test_a_thread_that_comes_to_wait_a_little_later_is_awaited(shared: Shared) -> None:
    """It is often seen between its send and its wait."""
    shared.client.do("start(lambda: (time.sleep(0.05), poll(c)))")
    started = time.monotonic()
    sample = shared.sample(seconds=50.0)
    assert sample.pid == shared.client.pid
    assert time.monotonic() - started < 40.0, "it stops as soon as somebody waits"


@pytest.mark.parametrize("seconds", [0.0, 0.02])
def test_it_gives_up_in_time_when_nobody_comes_to_wait(shared: Shared, seconds: float) -> None:
    started = time.monotonic()
    sample = shared.sample(seconds=seconds)
    assert (who(sample), sample.waits.threads) == (None, ())
    assert seconds <= time.monotonic() - started < seconds + 5


def test_processes_that_are_gone_are_nobody(shared: Shared) -> None:
    shared.client.do(f"release({shared.child})")
    tid = shared.wait("poll(c)")
    assert who(shared.sample()) == (shared.client.pid, tid)


# Blocked at the same moment


def test_two_that_read_at_the_same_moment_are_both_blocked(shared: Shared) -> None:
    first, second = shared.wait("poll(c)"), shared.wait("c.recv(1)", child=True)
    blocked = shared.sample().blocked
    assert {(one.thread.pid, one.thread.tid) for one in blocked} == {
        (shared.client.pid, first),
        (shared.child, second),
    }


def test_two_threads_of_one_process_are_blocked_too(shared: Shared) -> None:
    tids = {shared.wait("poll(c)"), shared.wait("poll(c, waker)")}
    assert {one.thread.tid for one in shared.sample().blocked} == tids


def test_one_alone_is_blocked_with_nobody(shared: Shared) -> None:
    shared.wait("poll(c)")
    assert shared.sample().blocked == ()


@pytest.mark.parametrize(
    "code",
    [
        "select.select([c], [], [])",
        "epoll(c)",
        "epoll(c, other)",
        "poll(c, other)",
        "poll(c, events=select.POLLOUT | 0)",
    ],
)
def test_one_that_watches_is_not_blocked(shared: Shared, code: str) -> None:
    """select(2) and epoll_wait(2) are how a program waits for notifications, or for whatever comes."""
    if "POLLOUT" in code:
        shared.client.do("fill(c)")
        shared.client.do(f"start(lambda: {code})")
    else:
        shared.wait(code)
    shared.wait("poll(c)", child=True)
    assert shared.sample().blocked == ()


def test_one_that_has_run_since_it_was_seen_was_not_blocked_at_the_same_moment(shared: Shared) -> None:
    """They are looked at one after the other: what is true of each need not have been true of both at once."""
    shared.wait("poll(c)")
    tid = shared.wait("c.recv(1, socket.MSG_PEEK)", child=True)
    sample = shared.sample()
    assert len(sample.blocked) == 2
    shared.client.do(f"order({shared.child}, 'c.shutdown(socket.SHUT_RD)')")
    until(lambda: not Path(f"/proc/{shared.child}/task/{tid}").exists())
    assert not sample.blocked


def test_sampling_leaves_nothing_open(shared: Shared) -> None:
    shared.wait("poll(c)")
    before = len(list(Path("/proc/self/fd").iterdir()))
    shared.sample(seconds=0.01)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
