"""Where arriving clients wait: for something to come or to be taken, for their turn, for their time to run out.

The sockets of those that aren't sessions yet are in an epoll of their own, which stands in the sweep's as one
descriptor: epoll(7). So however many arrive at once, all of them together are one event in each round of the sweep,
and get a slice of its time, in the order in which they have become ready; sessions have their turn in between.

Deadlines: of all that have been given the same time for something, who began first is due first. So for each length of
time there is one dict, and one that is met costs no more than to be taken out of it. A single task waits for the next.
"""

from __future__ import annotations

import math
import os
import select
import time
from collections import deque
from typing import TYPE_CHECKING, Final

import trio

from pgguard.proxy.losses import Loss, note

if TYPE_CHECKING:
    from collections.abc import Callable

    from pgguard.proxy.unread import Watching

_SLICE: Final = 0.0005
"""Seconds in each round of the sweep for those who arrive: as long as it takes to introduce two or three."""
_EVENTS: Final = 4
"""Events that are dealt with before it is looked at the clock."""


class Lobby:
    """Tells whoever waits in it what has come about: a callback is called in the sweep's round, and must not block.

    What it raises is noted, and costs nobody else anything. For trio's thread alone.

    Args:
        sweep: has the epoll around it.
    """

    def __init__(self, sweep: Watching) -> None:
        self._sweep = sweep
        self._epoll = select.epoll()
        self._watched: dict[int, Callable[[int], None]] = {}
        self._turns: deque[Callable[[], None]] = deque()
        """What is to be done when it is its turn, behind what is ready by then."""
        self._bell: int
        """A descriptor that says in the epoll, as long as it counts something, that there are some."""
        self._due: dict[float, dict[object, tuple[float, Callable[[], None]]]] = {}
        """By how many seconds somebody was given, who, until when, and what is to be done then; the first first."""
        self._given: dict[object, float] = {}
        """How many seconds each was given."""
        self._slice_ends = self._waits_until = math.inf
        self._sooner = trio.Event()
        self._is_open = False

    def open(self) -> None:
        """Begin to look after who waits. Raises OSError."""
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._is_open = True
        self._epoll.register(self._bell, select.EPOLLIN)
        self._sweep.watch(self._epoll.fileno(), select.EPOLLIN, self._work)

    def close(self) -> None:
        """Forget who waits. Nothing happens if that has been done, or it has not been opened."""
        if self._is_open:
            self._is_open = False
            self._sweep.unwatch(self._epoll.fileno())
            self._epoll.close()
            os.close(self._bell)
            self._watched.clear()
            self._turns.clear()
            self._due.clear()
            self._given.clear()

    @property
    def has_time(self) -> bool:
        """Whether there is some left in this round, for who has several things to do."""
        return time.monotonic() < self._slice_ends

    # Sockets

    def watch(self, fd: int, events: int, on_event: Callable[[int], None]) -> None:
        """Have somebody told of what happens to a descriptor, or of something else from now on. Raises OSError."""
        if fd in self._watched:
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)
        self._watched[fd] = on_event

    def unwatch(self, fd: int) -> None:
        """Tell nothing more of it; nothing happens if it isn't watched. To be called before it is closed."""
        if self._watched.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    # Turns

    def in_turn(self, function: Callable[[], None]) -> None:
        """Have something done when it is its turn: not now, where somebody else is being dealt with."""
        if not self._turns:
            os.eventfd_write(self._bell, 1)
        self._turns.append(function)

    def _work(self, _: int) -> None:
        """Deal with what has come about, for a slice of time."""
        self._slice_ends = time.monotonic() + _SLICE
        while True:
            events = self._epoll.poll(0, _EVENTS)
            for fd, mask in events:
                if fd == self._bell:
                    self._take_turn()
                    continue
                on_event = self._watched.get(fd)
                if on_event is not None:  # else it has been done with by an earlier event
                    try:
                        on_event(mask)
                    except Exception:
                        note(Loss.STEP)
            # What becomes ready meanwhile is told in the next round, as it stands in the sweep's epoll.
            if len(events) < _EVENTS or not self.has_time or not self._is_open:
                return

    def _take_turn(self) -> None:
        if self._turns:
            try:
                self._turns.popleft()()
            except Exception:
                note(Loss.STEP)
        if not self._turns:
            os.eventfd_read(self._bell)

    # Deadlines

    def give(self, who: object, seconds: float, on_late: Callable[[], None]) -> None:
        """Give somebody so much time from now on, instead of what is left, and have something done when it is over."""
        self.lift(who)
        until = trio.current_time() + seconds
        self._due.setdefault(seconds, {})[who] = until, on_late
        self._given[who] = seconds
        if until < self._waits_until:
            self._waits_until = until
            self._sooner.set()

    def limits(self, who: object) -> bool:
        """Whether somebody has been given some time, and it isn't over."""
        return who in self._given

    def lift(self, who: object) -> None:
        """Let somebody have as much time as it takes."""
        seconds = self._given.pop(who, None)
        if seconds is not None:
            del self._due[seconds][who]

    async def run(self) -> None:
        """Do what is to be done when somebody's time is over; until cancelled."""
        while True:
            self._sooner = trio.Event()
            with trio.move_on_at(self._waits_until) as limit:
                await self._sooner.wait()
            if limit.cancelled_caught:  # whom that was for may have been lifted from it: that wakes nobody
                self._end_what_is_over()
                firsts = [next(iter(waiting.values())) for waiting in self._due.values() if waiting]
                self._waits_until = min((until for until, _ in firsts), default=math.inf)

    def _end_what_is_over(self) -> None:
        now = trio.current_time()
        for waiting in list(self._due.values()):
            while waiting:
                who, (until, on_late) = next(iter(waiting.items()))
                if until > now:
                    break
                self.lift(who)
                try:
                    on_late()
                except Exception:
                    note(Loss.STEP)
