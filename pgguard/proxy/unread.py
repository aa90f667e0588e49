"""Answers that nobody has read: what the wire doesn't show, and the client's receive queue does.

*When it is looked.* A session that makes a request is put on a list. Once its answer has been complete for a moment,
the kernel is asked how much lies unread in the client's socket. If the answer has been read to its end, as nearly
always, the session leaves the list until its next request. So what this costs depends on how many sessions are in use;
a session that is idle costs nothing, and one that is busy without a pause isn't looked at.

*What is unread.* All positions are in the server's stream, of which the session core knows where the last answer begins
and ends. So a notification, notice or parameter that came behind the answer and isn't read is no answer; nor is a
ReadyForQuery alone, which some client may leave to be read with the next answer.

*A warning* takes an answer of which nothing has been read, by a client that has been at rest for as long as the
threshold says: all its threads slept and none waited for this socket (:mod:`pgguard.attribution.attention`). Whoever
has begun to read is reading, however slowly; whoever runs may come to it; who is stopped can't. Time in which the guard
didn't look, as it was stopped itself for one, doesn't count either.

*An error* takes a request that was sent while part of the last answer was still unread, by a client whose driver never
sends before it has read. It has to be certain that the client hadn't read when it sent: it may well do so at once
behind it, and take the old answer for the new one.

- Over a Unix socket the guard's end is written to be told when the client reads: see :class:`ReadingAlarm`. So it is
  certain, for answers that had been found unread before, some tens of milliseconds after their end.
- Otherwise the queue is looked at once more, before the request is forwarded. What is still there wasn't read. A client
  that reads at once isn't convicted: it can't be told from one that has read before.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import select
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from pgguard.attribution.attention import Attention
from pgguard.attribution.evidence import Driver
from pgguard.faults.catalogue import OVERLAP
from pgguard.session import libpq

if TYPE_CHECKING:
    from collections.abc import Callable

    from pgguard.attribution.evidence import Process
    from pgguard.attribution.witness import Opening, Witness
    from pgguard.proxy.session import End, ProxiedSession
    from pgguard.session.tracker import Tracker
    from pgguard.session.verdicts import Verdict

_TICK: Final = 0.025
"""Seconds between two rounds of looking, while there is something to look at."""
_FIRST: Final = 0.025
"""Seconds from when an answer is seen to be complete to the first look whether it has been read: one tick."""
_AT_A_TIME: Final = 32
"""Sessions that are looked at in one round: those that have waited the longest come first."""
_INTERVAL: Final = 0.5
_SHARE: Final = 0.1
"""Seconds between two looks at an answer that lies unread, and their share of the threshold: the less counts."""
_LEAST_INTERVAL: Final = 0.05
_RARELY: Final = 10.0
"""Seconds between two looks, in the end, at an answer that has been reported."""

_READY_SIZE: Final = 6
"""Bytes of a ReadyForQuery."""
_WORK: Final = frozenset("QFPBDE")
"""Messages whose answers somebody wants: Close and Sync have none that would be missed."""
_SIMPLE: Final = frozenset("QF")
_SIOCOUTQNSD: Final = 0x894B
"""``linux/sockios.h``: bytes in a TCP socket's send queue that haven't been sent, for want of room at the other end."""

logger = logging.getLogger(__name__)


class ReadingAlarm:
    """Tells when a client takes something out of its end of a Unix connection.

    Whenever it has read a message of the kernel's to its end, the sender's socket reports that it can be written to,
    even if it could be before: ``unix_write_space()`` in ``net/unix/af_unix.c``, for as long as less than a quarter of
    the socket's buffer is full. An epoll set that is to be told of edges has an event then, and hands events out in the
    order in which they came. So a client that has read and then sent is told from one that has sent and then read,
    whenever the guard gets to look. A second descriptor of the same socket keeps the two events apart.

    Args:
        epoll: the set.
        alarms: those that there are, by their descriptors; it adds itself.
        end: the guard's end.

    Raises:
        OSError: there are no descriptors left.
    """

    def __init__(self, epoll: select.epoll, alarms: dict[int, ReadingAlarm], end: End) -> None:
        self._epoll = epoll
        self._alarms = alarms
        self._fd = os.dup(end.fd)
        self.events = 0
        """How often it has gone off: once when it was set, and then when something was read."""
        alarms[self._fd] = self
        epoll.register(self._fd, select.EPOLLOUT | select.EPOLLET)

    def close(self) -> None:
        """Watch no more."""
        del self._alarms[self._fd]
        if not self._epoll.closed:
            self._epoll.unregister(self._fd)
        os.close(self._fd)


@dataclass(slots=True)
class Leftover:
    """What is known of the last answer of a session that is on the list; times are trio's."""

    requests: int
    """Which answer: how many requests the client had made."""
    since: float
    """When it was first seen to be complete."""
    next: float
    """When to look again."""
    looked: float
    """When it was last looked at."""
    looks: int = 0
    read: int = -1
    """Up to where in the server's stream the client had read then; -1: it hasn't been looked yet."""
    size: int = 0
    """Bytes of the answer that were unread then."""
    silence: float = 0.0
    """Seconds for which the client has been seen to do nothing about it."""
    told: bool = False
    alarm: ReadingAlarm | None = None
    undisturbed: int | None = None
    """How often the alarm had gone off when the answer was last seen to lie unread."""

    @property
    def is_untouched(self) -> bool:
        """Whether the client certainly hasn't read since the answer was last seen to lie unread."""
        return self.alarm is not None and self.undisturbed == self.alarm.events

    def close(self) -> None:
        """Forget it."""
        if self.alarm is not None:
            self.alarm.close()
            self.alarm = None


class _Look(NamedTuple):
    session: ProxiedSession
    tracker: Tracker
    leftover: Leftover
    opening: Opening
    holders: tuple[Process, ...]
    position: int
    """The server's stream's, when it was looked."""
    events: int
    """The alarm's, likewise."""
    closely: bool
    """It lay unread at the last look: see also what the client does."""


class UnreadWatch:
    """Watches for answers that are left unread, in all sessions of a guard.

    Args:
        threshold: seconds after which a whole answer that lies unread is reported; 0: never.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._interval = min(_INTERVAL, max(_LEAST_INTERVAL, threshold * _SHARE)) if threshold else _INTERVAL
        self._accuse: Callable[[ProxiedSession, Verdict], bool]
        self._set_alarm: Callable[[End], ReadingAlarm]
        self._witness: Witness | None = None
        self._listed: dict[int, ProxiedSession] = {}
        self._stirred = trio.Event()

    def stir(self, session: ProxiedSession) -> None:
        """A session is making a request: its answer is to be looked after."""
        if self._witness is not None:
            self._listed[session.id] = session
            self._stirred.set()

    async def run(
        self,
        witness: Witness,
        *,
        accuse: Callable[[ProxiedSession, Verdict], bool],
        set_alarm: Callable[[End], ReadingAlarm],
    ) -> None:
        """Look at what has been answered; until cancelled.

        Args:
            witness: attribution.
            accuse: has a verdict ruled on; returns False if it can't now.
            set_alarm: makes an alarm for the guard's end of a Unix connection; raises OSError.
        """
        self._witness, self._accuse, self._set_alarm = witness, accuse, set_alarm
        while True:
            if not self._listed:
                self._stirred = trio.Event()
                await self._stirred.wait()
            await trio.sleep(_TICK)
            due = self._due(trio.current_time())
            if due:
                try:
                    await self._look(witness, due)
                except Exception:
                    logger.exception("whether answers have been read could not be found out")

    def _due(self, now: float) -> list[_Look]:
        """What it is time to look at, that first which has waited the longest."""
        due: list[_Look] = []
        for session in list(self._listed.values()):
            tracker, opening = session.tracker, session.opening
            if session.done.is_set() or session.draining or tracker is None or (opening and opening.inode is None):
                self._forget(session)
                continue
            if opening is None or session.client.waits or not tracker.at_rest:
                continue
            leftover = session.leftover
            if leftover is None or leftover.requests != tracker.requests:
                if leftover is not None:
                    leftover.close()
                leftover = session.leftover = Leftover(tracker.requests, since=now, next=now + _FIRST, looked=now)
            if leftover.next <= now:
                holders = session.sightings.holders or (() if opening.opener is None else (opening.opener,))
                events = 0 if leftover.alarm is None else leftover.alarm.events
                closely = leftover.size > 0
                due.append(_Look(session, tracker, leftover, opening, holders, tracker.position, events, closely))
        due.sort(key=lambda look: look.leftover.next)
        return due[:_AT_A_TIME]

    def _forget(self, session: ProxiedSession) -> None:
        """Take a session off the list."""
        self._listed.pop(session.id, None)
        if session.leftover is not None:
            session.leftover.close()
            session.leftover = None

    async def _look(self, witness: Witness, due: list[_Look]) -> None:
        sizes, attentions = await trio.to_thread.run_sync(_see, witness, due, abandon_on_cancel=True)
        now = trio.current_time()
        for look, size, attention in zip(due, sizes, attentions, strict=True):
            session, tracker, leftover = look.session, look.tracker, look.leftover
            if session.leftover is not leftover or leftover.requests != tracker.requests or not tracker.at_rest:
                continue
            if size is None:
                self._forget(session)
            elif tracker.position == look.position:  # else something came meanwhile: the next round will tell
                self._note(look, size + _waiting(session.client), attention, now)

    def _note(self, look: _Look, unread: int, attention: Attention, now: float) -> None:
        session, tracker, leftover = look.session, look.tracker, look.leftover
        read = tracker.position - unread
        size = tracker.answer_ended - _READY_SIZE - read
        if size <= 0:
            # Read to its end. The next request puts it on the list again.
            self._forget(session)
            session.client.attentive = True
            return
        passed = min(now - leftover.looked, 2 * self._interval)
        if attention is Attention.STOPPED or (leftover.size and leftover.read != read):
            leftover.silence = 0.0
        elif attention is Attention.ELSEWHERE or not look.closely:
            leftover.silence += passed
        leftover.looked, leftover.read, leftover.size = (
            now,
            read,
            min(size, tracker.answer_ended - tracker.answer_began),
        )
        leftover.looks += 1
        leftover.undisturbed = look.events or None
        pause = self._interval
        if leftover.looks == 1:
            pause = _TICK
            session.client.attentive = True  # what it sends next it may send on top of it
            if session.transport == "unix":
                with contextlib.suppress(OSError):
                    leftover.alarm = self._set_alarm(session.client)
        elif leftover.told:
            pause = min(_RARELY, leftover.looks * self._interval)
        leftover.next = now + pause
        if self._threshold and leftover.silence >= self._threshold and not leftover.told:
            idle = attention is Attention.ELSEWHERE and read <= tracker.answer_began
            if idle and not tracker.pipelines and _is_wanted(tracker):
                leftover.told = self._accuse(session, self._abandoned(session, tracker, leftover))

    def _abandoned(self, session: ProxiedSession, tracker: Tracker, leftover: Leftover) -> Verdict:
        driver = session.driver
        return tracker.judge_unread(
            f"has left an answer of {leftover.size} bytes unread for more than {self._threshold:g} s",
            sender=None,
            libpq=libpq.IN_PROGRESS if driver is Driver.LIBPQ else None,
        )

    # When the next request comes

    def is_suspect(self, session: ProxiedSession, code: int) -> bool:
        """Whether a request, a message of this type, may have been sent on top of an answer by one who never may.

        A driver that may pipeline may also do so; it then proves that it does.
        """
        tracker, leftover = session.tracker, session.leftover
        if tracker is None or leftover is None or not leftover.size or not tracker.at_rest:
            return False
        last = tracker.last_request
        if leftover.requests != tracker.requests or last is None or not _is_wanted(tracker):
            return False
        sender, before = session.client.sender, last.sender
        if sender is not None and before is not None and sender.pid != before.pid:
            return False  # they share the connection, which is worse
        driver = session.driver
        if OVERLAP[driver].may:
            return False
        # In its pipeline mode libpq sends extended queries on top of each other's answers, and nothing else.
        return driver is not Driver.LIBPQ or bool(_SIMPLE & {chr(code), last.messages[0]})

    @staticmethod
    def is_untouched(session: ProxiedSession) -> bool:
        """Whether the client of a suspect session certainly hadn't read when it sent: it needs no look then."""
        tracker, leftover = session.tracker, session.leftover
        if tracker is None or leftover is None or not leftover.is_untouched:
            return False
        # Of what the kernel holds in one piece it doesn't tell that part has been read.
        return tracker.position == tracker.answer_ended

    async def is_still_unread(self, session: ProxiedSession) -> bool:
        """Look whether part of the last answer lies unread still, now that the next request has been sent."""
        tracker, leftover, opening, witness = session.tracker, session.leftover, session.opening, self._witness
        if tracker is None or leftover is None or opening is None or witness is None:
            return False
        position = tracker.position
        holders = session.sightings.holders
        try:
            [size] = await trio.to_thread.run_sync(witness.unread, [(opening, holders)], abandon_on_cancel=True)
        except Exception:
            logger.exception("session %d: whether the last answer has been read could not be found out", session.id)
            return False
        if size is None or tracker.position != position or session.leftover is not leftover:
            return False
        leftover.size = tracker.answer_ended - _READY_SIZE - (position - size - _waiting(session.client))
        return leftover.size > 0

    def sent_on_top(self, session: ProxiedSession, tracker: Tracker, pending: bytes) -> Verdict:
        """Say that a request has been sent on top of an answer, which has been seen to be so."""
        leftover = session.leftover
        size, seconds = (0, 0.0) if leftover is None else (leftover.size, trio.current_time() - leftover.since)
        reason = f"on top of {size} bytes of the last answer, which had lain unread for {seconds:.1f} s"
        return tracker.judge_unread(reason, sender=session.client.sender, pending=pending, libpq=None)


def _is_wanted(tracker: Tracker) -> bool:
    last = tracker.last_request
    return last is not None and not _WORK.isdisjoint(last.messages)


def _waiting(client: End) -> int:
    """Bytes for the client that it has no room for."""
    unsent = 0
    if client.session.transport == "tcp":
        unsent = struct.unpack("i", fcntl.ioctl(client.fd, _SIOCOUTQNSD, bytes(4)))[0]
    return len(client.outgoing) + unsent


def _see(witness: Witness, looks: list[_Look]) -> tuple[list[int | None], list[Attention]]:
    """Look what lies unread, and what those do who left it; in a worker thread."""
    sizes = witness.unread([(look.opening, look.holders) for look in looks])
    attentions = [
        witness.attention(look.opening, look.holders) if look.closely and size else Attention.UNKNOWN
        for look, size in zip(looks, sizes, strict=True)
    ]
    return sizes, attentions
