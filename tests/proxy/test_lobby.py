"""Who arrives waits in turn, in time, and in nobody's way."""

from __future__ import annotations

import math
import os
import select
import socket
import time
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from pgguard.proxy import lobby as module
from pgguard.proxy.lobby import Lobby

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Round:
    """Takes the place of the sweep: an epoll that is asked when the test says so."""

    def __init__(self) -> None:
        self.epoll = select.epoll()
        self.watched: dict[int, Callable[[int], None]] = {}

    def watch(self, fd: int, events: int, on_event: Callable[[int], None]) -> None:
        self.epoll.register(fd, events)
        self.watched[fd] = on_event

    def unwatch(self, fd: int) -> None:
        self.epoll.unregister(fd)
        del self.watched[fd]

    def go(self) -> int:
        """A round; how many events there were."""
        events = self.epoll.poll(0)
        for fd, mask in events:
            self.watched[fd](mask)
        return len(events)


@pytest.fixture
def round_() -> Iterator[Round]:
    found = Round()
    yield found
    found.epoll.close()


@pytest.fixture
def lobby(round_: Round) -> Iterator[Lobby]:
    found = Lobby(round_)
    found.open()
    yield found
    found.close()
    assert not round_.watched


@pytest.fixture
def ready() -> Iterator[list[socket.socket]]:
    """Sockets that can be written to."""
    pairs = [socket.socketpair() for _ in range(100)]
    yield [one for one, _ in pairs]
    for pair in pairs:
        for sock in pair:
            sock.close()


def test_however_many_wait_they_are_one_event_and_take_a_slice_of_time(
    lobby: Lobby, round_: Round, ready: list[socket.socket]
) -> None:
    served: list[int] = []

    def serve(fd: int) -> Callable[[int], None]:
        def work(_: int) -> None:
            ends = time.monotonic() + module._SLICE
            while time.monotonic() < ends:
                pass
            served.append(fd)
            lobby.unwatch(fd)

        return work

    for sock in ready:
        lobby.watch(sock.fileno(), select.EPOLLOUT, serve(sock.fileno()))
    assert round_.go() == 1
    assert len(served) == module._EVENTS, "no more are begun when the slice is over"
    while round_.go():
        pass
    assert sorted(served) == sorted(sock.fileno() for sock in ready), "each once"


def test_what_one_raises_costs_nobody_else_anything(lobby: Lobby, round_: Round, ready: list[socket.socket]) -> None:
    served: list[int] = []

    def fail(_: int) -> None:
        served.append(0)
        raise ZeroDivisionError

    lobby.in_turn(lambda: fail(0))
    lobby.in_turn(lambda: served.append(1))
    lobby.watch(ready[0].fileno(), select.EPOLLOUT, fail)
    lobby.watch(ready[1].fileno(), select.EPOLLOUT | select.EPOLLET, served.append)
    while len(served) < 4:
        round_.go()
    assert served.count(1) == 1
    assert select.EPOLLOUT in served


def test_turns_come_in_their_order_and_not_at_once(lobby: Lobby, round_: Round) -> None:
    served: list[int] = []
    lobby.in_turn(lambda: lobby.in_turn(lambda: served.append(2)))
    lobby.in_turn(lambda: served.append(1))
    assert served == []
    while round_.go():
        pass
    assert served == [1, 2]
    assert not round_.go(), "it rings no more"


def test_one_that_is_watched_no_more_is_not_told(lobby: Lobby, round_: Round, ready: list[socket.socket]) -> None:
    told: list[int] = []
    first, second = (sock.fileno() for sock in ready[:2])

    def tell(fd: int, other: int) -> Callable[[int], None]:
        def on_event(_: int) -> None:
            told.append(fd)
            lobby.unwatch(other)

        return on_event

    for fd, other in (first, second), (second, first):
        lobby.watch(fd, select.EPOLLOUT, tell(fd, other))
    round_.go()
    round_.go()
    assert len(set(told)) == 1
    lobby.unwatch(first)
    lobby.unwatch(second)
    lobby.unwatch(second)
    assert not round_.go()


def test_it_can_be_watched_for_something_else(lobby: Lobby, round_: Round, ready: list[socket.socket]) -> None:
    told: list[str] = []
    lobby.watch(ready[0].fileno(), select.EPOLLIN, lambda _: told.append("in"))
    assert not round_.go()
    lobby.watch(ready[0].fileno(), select.EPOLLOUT | select.EPOLLET, lambda _: told.append("out"))
    round_.go()
    assert told == ["out"]


async def test_who_is_late(lobby: Lobby, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock) -> None:
    del autojump_clock
    nursery.start_soon(lobby.run)
    began = trio.current_time()
    late: list[tuple[str, float]] = []

    def tell(who: str) -> Callable[[], None]:
        return lambda: late.append((who, trio.current_time() - began))

    for who, seconds in ("first", 3.0), ("second", 1.0), ("third", 3.0), ("in time", 1.0), ("again", 1.0):
        lobby.give(who, seconds, tell(who))
    lobby.lift("in time")
    lobby.lift("in time")
    await trio.sleep(0.5)
    lobby.give("again", 1.0, tell("again"))
    lobby.give("failing", 0.1, lambda: 1 / 0)  # type: ignore[arg-type]
    await trio.sleep(10)
    assert [(who, round(seconds, 1)) for who, seconds in late] == [
        ("second", 1.0),
        ("again", 1.5),
        ("first", 3.0),
        ("third", 3.0),
    ]
    assert lobby._waits_until == math.inf
    nursery.cancel_scope.cancel()


async def test_who_comes_and_goes_wakes_nobody(lobby: Lobby, nursery: trio.Nursery) -> None:
    """The one task that keeps the time waits on for the first of them, who is in time."""
    nursery.start_soon(lobby.run)
    lobby.give(0, 60.0, lambda: None)
    await trio.testing.wait_all_tasks_blocked()
    waits = lobby._sooner
    for who in range(1000):
        lobby.give(who, 60.0, lambda: None)
        lobby.lift(who)
    await trio.testing.wait_all_tasks_blocked()
    assert lobby._sooner is waits
    assert not waits.is_set()
    nursery.cancel_scope.cancel()


def test_one_that_has_not_been_opened_leaves_nothing(round_: Round) -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - how many
    lobby = Lobby(round_)
    lobby.close()
    del lobby
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
