"""The sweep: one trio task that has the sockets of all established sessions relayed, through an epoll of its own.

A wake-up, an epoll_ctl and a task switch for each read are what make a proxy slow. So the sockets stay registered, and
as long as there is something to do on any of them, or comes within a moment, the relay (:mod:`pgguard.proxy.relay`)
goes on with it, synchronously. When there isn't, the task goes back to trio to sleep until one is ready. It yields to
trio's other tasks after :data:`_LATEST` seconds, whatever the load, and sooner while one of them can run, or somebody
waits for one (:meth:`Sweep.begin_errand`).

What it waits for is waited for in one place: a wait in its own epoll costs 5 µs, and one in trio's ten times as much.
How long it waits at most decides as well: below the kernel's tick, of 4 ms mostly, a timer has to be set anew for each
wait, at 2.7 µs (epoll_wait(2) with 1 ms) or 1.3 (2 ms). So each wait is given :data:`_TICK` seconds, in which things
may happen that only trio hears of: a thread has finished, a signal has come, or a deadline has passed. Who can't wait
for as long as all that says so (:meth:`Sweep.hurry`).
"""

from __future__ import annotations

import math
import os
import select
import time
from typing import TYPE_CHECKING, Final

import trio

from pgguard.proxy.judging import Judging
from pgguard.proxy.relay import Relay
from pgguard.proxy.sockets import Epoll
from pgguard.proxy.unread import ReadingAlarm

if TYPE_CHECKING:
    from collections.abc import Callable

    from pgguard.proxy.ends import End
    from pgguard.proxy.figures import Durations
    from pgguard.proxy.judge import Judge
    from pgguard.proxy.kernel_senders import KernelSenders
    from pgguard.proxy.session import ProxiedSession
    from pgguard.proxy.unread import UnreadWatch
    from pgguard.session.verdicts import Verdict

_TURN: Final = 0.001
"""Seconds after which trio's other tasks get a turn if one of them is due, and can run or is waited for."""
_TICK: Final = 0.004
"""Seconds after which they get one if one of them is waited for, or nothing has come for as long."""
_LATEST: Final = 0.04
"""Seconds after which they get one in any case. A turn takes 4 µs with nothing to do, and 130 where other programs have
used the caches meanwhile. Of a client that asks without a pause, more than one transaction in a hundred would wait for
one in each tick, and one in four hundred with fifty a second."""
_SLICE: Final = 0.00025
"""Seconds for which messages are followed before others get their turn."""


class Sweep:
    """Has the bytes of all sessions moved that have been added to it.

    Args:
        judge: rules on verdicts.
        cancel: starts to cancel what a session's backend is doing, without waiting for it.
        answered: is told of every session that the server has begun to answer.
        closed: is told of every session whose sockets have been closed.
        stirred: is told of a session whose client sends something for the first time since it was attended to.
        unread: looks after what has been answered.
        added: counts for how long what comes has to wait.
    """

    def __init__(
        self,
        judge: Judge,
        *,
        added: Durations,
        cancel: Callable[[ProxiedSession], None],
        answered: Callable[[ProxiedSession], None],
        closed: Callable[[ProxiedSession], None],
        stirred: Callable[[ProxiedSession], None],
        unread: UnreadWatch,
    ) -> None:
        self._epoll = Epoll()
        self._asleep = False
        self._wake: int
        """A descriptor in the epoll that says by its edges that something waits for its turn."""
        self._relay = Relay(self._epoll, wake=self._wake_up, seconds=_SLICE)
        self._judging = Judging(
            self._relay, judge, unread, cancel=cancel, answered=answered, closed=closed, stirred=stirred
        )
        self._endings = self._judging.endings
        self._relay.hand_on_to(self._judging, self._endings)
        self._added = added
        self._left = math.inf
        """When trio's other tasks got their turn, if there was more to do; times are those of time.monotonic()."""
        self._alarms: set[ReadingAlarm] = set()
        """What tells that a client has read."""

    async def run(self) -> None:
        """Sweep until cancelled; then every session that is left is closed."""
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self._epoll.register(self._wake, select.EPOLLIN | select.EPOLLET, self._wake)
            async with trio.open_nursery() as nursery:
                self._judging.open(nursery)
                while True:
                    self._asleep = True
                    await trio.lowlevel.wait_readable(self._epoll.fileno())
                    self._asleep = False
                    self._left = math.inf
                    while self._take_turn():
                        await trio.lowlevel.checkpoint()
        finally:
            for session in self._endings.sessions:
                if self._endings.aftermath.stopping:
                    self._endings.aftermath.cut_off(session)
                self._endings.finish(session)
            self._epoll.close()
            os.close(self._wake)
            self._judging.close()

    def _take_turn(self) -> bool:
        """Have bytes moved until it is trio's other tasks' turn; False if there is nothing to do any more."""
        now = time.monotonic()
        is_busy = self._relay.run(now + self._patience(), patience=_TICK)
        if self._relay.took:
            self._added.note(self._relay.took + max(0.0, now - self._left))
        self._left = time.monotonic()
        return is_busy

    def _patience(self) -> float:
        """For how many seconds trio's other tasks may be kept waiting."""
        others = trio.lowlevel.current_statistics()
        if not others.tasks_runnable and not self._relay.is_waited_for:
            return _LATEST
        due = 0.0 if others.tasks_runnable else others.seconds_to_next_deadline
        return min(_TICK, max(_TURN, due))

    @property
    def passed_on(self) -> tuple[int, int]:
        """Bytes that have been passed on so far: those of clients, and those of servers."""
        return self._relay.from_clients, self._relay.from_servers

    def _wake_up(self) -> None:
        if self._asleep:
            os.eventfd_write(self._wake, 1)

    # What others have it do

    def name_senders(self, senders: KernelSenders) -> None:
        """Have the kernel say who sends on TCP, from now on."""
        self._relay.name_senders(senders)

    def add(self, session: ProxiedSession, startup: bytes, answer: bytes) -> None:
        """Take a session over.

        Args:
            session: it.
            startup: what is still to be sent to the server of its StartupMessage.
            answer: what has been read of what the server has said to that.
        """
        if self._epoll.closed:  # the guard was cancelled while the session was being set up
            self._endings.finish(session)
            return
        self._endings.begin(session)
        self._relay.begin(session.flow, startup, answer)

    def finish(self, session: ProxiedSession) -> None:
        """Close both sockets of a session; nothing happens if they are closed already."""
        self._endings.finish(session)

    def accuse(self, session: ProxiedSession, verdict: Verdict) -> bool:
        """Have a verdict ruled on that no message has brought about. Nothing is held for it.

        Returns False, and nothing is done, if another one about the session is being ruled on, or it is over.
        """
        return self._judging.accuse(session, verdict)

    def dismiss(self, session: ProxiedSession, farewell: bytes) -> None:
        """Close a session now, telling the client why if it isn't in the middle of a message. Doesn't wait for it.

        What the server is still doing for it is cancelled.
        """
        self._endings.dismiss(session, farewell)

    def make_room(self) -> bool:
        """End a session that is over and is only listened to; False if there is none."""
        return self._endings.aftermath.make_room()

    def stop_lingering(self) -> None:
        """Close the sessions that are over already, and from now on wait for none that is."""
        self._endings.aftermath.stop_lingering(self._endings.sessions)

    # Whose turn it is

    def hurry(self) -> None:
        """Don't keep trio's other tasks waiting for a moment: a client waits for one of them."""
        self._relay.hurry()

    def give_way(self) -> None:
        """Let trio's other tasks have their turn as soon as what has come is served."""
        self._relay.give_way()

    def begin_errand(self) -> None:
        """A task of trio's has been begun that somebody waits for: they get a turn in each tick, until it has ended."""
        self._relay.begin_errand()

    def end_errand(self) -> None:
        """It has ended."""
        self._relay.end_errand()

    async def come_round(self) -> None:
        """Wait until everything has been read that had come when this was called, and judged as far as is no work.

        A session is left out whose peer has no room for what it sends.
        """
        await self.pass_mark()
        queued = self._relay.queued()
        while not queued.isdisjoint(self._relay.queued()):
            await self.pass_mark()

    async def pass_mark(self) -> None:
        """Wait for one's turn in the epoll, which hands out what is ready in the order in which that came."""
        self.hurry()
        mark = os.eventfd(1, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        passed = trio.Event()
        try:
            self.watch(mark, select.EPOLLIN | select.EPOLLET, lambda _: passed.set())
            await passed.wait()
        finally:
            self.unwatch(mark)
            os.close(mark)

    # What isn't a session's own

    def watch(self, fd: int, events: int, on_event: Callable[[int], None]) -> None:
        """Have the epoll watch another descriptor, too, until :meth:`unwatch`.

        Args:
            fd: the descriptor, which belongs to the caller, and is closed only after that.
            events: what of: ``select.EPOLL…``.
            on_event: is called in the sweep's round with each mask of events, in the order in which they came. It must
                not block, and can't be a coroutine. What it raises is noted, and costs only what it was about.

        Raises:
            OSError: it can't be watched: epoll_ctl(2).
            ValueError: the sweep has ended.
        """
        self._relay.watch(fd, events, on_event)

    def unwatch(self, fd: int) -> None:
        """Watch a descriptor no more; nothing happens if it isn't watched. No event that has come is told any more."""
        if self._relay.unwatch(fd) and not self._epoll.closed:
            self._epoll.unregister(fd)

    def set_alarm(self, client: End) -> ReadingAlarm:
        """Be told when a client takes something out of its end of a Unix connection. Raises OSError."""
        return ReadingAlarm(self, self._alarms, client)

    def alarms(self) -> int:
        """How many descriptors sessions have beyond their two."""
        return len(self._alarms)
