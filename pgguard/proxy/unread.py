"""Answers that nobody has read: what the wire doesn't show, and the client's receive queue does.

*When it is looked.* A session that makes a request is put on a list. Once its answer has been complete for a moment,
the kernel is asked how much lies unread in the client's socket. If the answer has been read to its end, as nearly
always, the session leaves the list until its next request. So what this costs depends on how many sessions are in use;
a session that is idle costs nothing, and one that is busy without a pause isn't looked at.

*What is unread.* All positions are in the server's stream, of which the session core knows where the last answer begins
and ends. The kernel counts the bytes that a connection carries; how many of the server's are in them, if they are
encrypted, :meth:`pgguard.proxy.transport.Tls.unread` knows. So a notification, notice or parameter that came behind the
answer and isn't read is no answer; nor is a ReadyForQuery alone, which some client may leave to be read with the next
answer.

*A warning* takes an answer of which nothing has been read, by a client that has been at rest for as long as the
threshold says: all its threads slept and none waited for this socket (:mod:`pgguard.attribution.attention`). Whoever
has begun to read is reading, however slowly; whoever runs may come to it; who is stopped can't; and who awaits an
answer on another connection may have asked on several at once, and read one after the other. Time in which the guard
didn't look, as it was stopped itself for one, doesn't count either.

*An error* takes a request that was sent while part of the last answer was still unread, by a client whose driver never
sends before it has read. It has to be certain that the client hadn't read when it sent: it may well do so at once
behind it, and take the old answer for the new one.

- Over a Unix socket the guard's end is told, in order, when the client reads and when it sends: see
  :class:`ReadingAlarm`. So it is certain, for answers that had been found unread before, some tens of milliseconds
  after their end.
- Over TCP the kernel reports with each send, where it can, how far its sender had read. So it is certain, of every
  request, however short the silence.
- Otherwise the queue is looked at once more, before the request is forwarded. What is still there wasn't read. A client
  that reads at once isn't convicted: it can't be told from one that has read before.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import struct
import termios
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import trio

from pgguard.attribution.attention import Attention
from pgguard.attribution.evidence import Driver
from pgguard.faults.catalogue import OVERLAP
from pgguard.identity import Sender
from pgguard.proxy import looking
from pgguard.proxy.losses import Loss, note, spared
from pgguard.proxy.turns import GLANCES, Stint, timed
from pgguard.session import libpq
from pgguard.session.states import WANTED
from pgguard.wire.messages import READY_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable

    from pgguard.attribution.evidence import Process
    from pgguard.attribution.witness import Opening, Witness
    from pgguard.proxy.ends import End
    from pgguard.proxy.session import ProxiedSession
    from pgguard.session.tracker import Tracker
    from pgguard.session.verdicts import Verdict

_TICK: Final = 0.025
_TICK_REPORTED: Final = 0.1
"""Seconds between two rounds of looking, while there is something to look at; and where the kernel reports of each send
what was unread, of all that is looked at, so that only a warning takes a look."""
_FIRST: Final = 0.025
"""Seconds from when an answer is seen to be complete to the first look whether it has been read: one tick."""
_FIRST_REPORTED: Final = 0.25
"""The same where the kernel reports what was unread."""
_AT_A_TIME: Final = 256
"""Sessions that are looked at in one round, by one job of a thread: ten thousand that have just been used have all had
their turn within seconds."""
_CLOSELY: Final = 8
"""For how many of them one counts that is looked at closely: also who could read it is, then."""
_IN_A_ROUND: Final = 512
"""Sessions of which it is seen in one round whether it is time to look at them: so that what a round takes doesn't grow
with how many have just been used."""
_SHARE_OF_PROCESSOR: Final = 0.05
"""Of a processor, what looking takes at most."""
_INTERVAL: Final = 0.5
_SHARE: Final = 0.1
"""Seconds between two looks at an answer that lies unread, and their share of the threshold: the less counts."""
_LEAST_INTERVAL: Final = 0.05
_RARELY: Final = 10.0
"""Seconds between two looks, in the end, at an answer that has been reported."""

_PEEKS: Final = 0.001
"""Seconds between two looks whether an answer has been read that another one waits behind."""

_SIMPLE: Final = frozenset("QF")
_BIND: Final = "B"
_DESCRIBED: Final = frozenset("DS")
"""The messages of a request that asks only what a statement is like."""
_SIOCOUTQNSD: Final = 0x894B
"""``linux/sockios.h``: bytes in a TCP socket's send queue that haven't been sent, as the other end has no room."""

_Asking = dict[int, list[Sender]]
"""By pid, those that await an answer."""

_MODULO: Final = (1 << 32) - 1
"""What sequence numbers of TCP are counted by, less one."""


class Watching(Protocol):
    """What has an epoll that watches other descriptors too."""

    def watch(self, fd: int, events: int, on_event: Callable[[int], None]) -> None:
        """Have a descriptor watched. Raises OSError."""

    def unwatch(self, fd: int) -> None:
        """Watch it no more."""


class ReadingAlarm:
    """Tells when a client takes something out of its end of a Unix connection.

    Whenever it has read a message of the kernel's to its end, the sender's socket reports that it can be written to,
    even if it could be before: ``unix_write_space()`` in ``net/unix/af_unix.c``, for as long as less than a quarter of
    the socket's buffer is full. An epoll set that is to be told of edges has an event then, and hands events out in the
    order in which they came. So a client that has read and then sent is told from one that has sent and then read,
    whenever the guard gets to look. A second descriptor of the same socket keeps the two events apart.

    Args:
        watching: has the set.
        alarms: those that there are; it adds itself.
        end: the guard's end.

    Raises:
        OSError: there are no descriptors left, or no room in the set: epoll_ctl(2).
    """

    def __init__(self, watching: Watching, alarms: set[ReadingAlarm], end: End) -> None:
        self._watching = watching
        self._alarms = alarms
        self._fd = os.dup(end.fd)
        self.events = 0
        """How often it has gone off: once when it was set, and then when something was read."""
        try:
            watching.watch(self._fd, select.EPOLLOUT | select.EPOLLET, self._go_off)
        except BaseException:
            os.close(self._fd)
            raise
        alarms.add(self)

    def _go_off(self, _: int) -> None:
        self.events += 1

    def close(self) -> None:
        """Watch no more."""
        self._alarms.discard(self)
        self._watching.unwatch(self._fd)
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


class Unread(NamedTuple):
    """What was unread when a request was sent."""

    size: int
    """Bytes of the last answer."""
    arrived: bool = True
    """All of that answer lay in the client's socket; otherwise part of it was still on its way."""


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
        self.limit(threshold)
        self._accuse: Callable[[ProxiedSession, Verdict], bool]
        self._set_alarm: Callable[[End], ReadingAlarm]
        self._witness: Witness | None = None
        self._listed: dict[int, ProxiedSession] = {}
        """By number: first whose turn is next."""
        self._unknown: dict[int, ProxiedSession] = {}
        """Those that are to be listed when it is known who opened them, by number."""
        self._asking: _Asking | None = None
        """Who awaits an answer, if that has been found out since others had their turn."""
        self._stirred = trio.Event()

    def limit(self, threshold: float) -> None:
        """Report what lies unread for that many seconds from now on; 0: never."""
        self._threshold = threshold
        self._interval = min(_INTERVAL, max(_LEAST_INTERVAL, threshold * _SHARE)) if threshold else _INTERVAL

    def stir(self, session: ProxiedSession) -> None:
        """A session is making a request: its answer is to be looked after, when it is known who opened it."""
        if self._witness is None:
            return
        if session.opening_known.is_set() or session.client_socket is None:
            self._unknown.pop(session.id, None)
            self._listed[session.id] = session
            self._stirred.set()
        else:
            self._unknown[session.id] = session

    def leave(self, session: ProxiedSession) -> None:
        """A session is over."""
        self._listed.pop(session.id, None)
        self._unknown.pop(session.id, None)

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
        cost = 0.0
        while True:
            if not self._listed:
                self._listed.clear()  # it keeps its table otherwise, which is large behind a storm
                self._stirred = trio.Event()
                await self._stirred.wait()
            await trio.sleep(max(self._tick(), cost / _SHARE_OF_PROCESSOR))
            due, cost = await self._due(trio.current_time())
            if due:
                cost += await self._look(witness, due)

    def _tick(self) -> float:
        """Seconds until the next round."""
        whose_turn_is_next = islice(self._listed.values(), _IN_A_ROUND)
        reported = all(session.names_threads for session in whose_turn_is_next)
        return min(_TICK_REPORTED, self._interval) if reported else _TICK

    async def _due(self, now: float) -> tuple[list[_Look], float]:
        """What it is time to look at; and what finding it has cost.

        All sessions on the list have their turn, one after the other: who has had it is the last again.
        """
        due: list[_Look] = []
        stint = Stint()
        work = 0
        for n, session in enumerate(list(islice(self._listed.values(), _IN_A_ROUND))):
            if not n % GLANCES:
                await stint.rest()
            if self._listed.pop(session.id, None) is None:
                continue  # it has been forgotten meanwhile
            self._listed[session.id] = session
            try:
                look = self._due_look(session, now)
            except Exception:
                note(Loss.EVIDENCE, session)
                self._forget(session)
            else:
                if look is not None:
                    due.append(look)
                    work += _CLOSELY if look.closely else 1
                    if work >= _AT_A_TIME:
                        break
        return due, stint.spent

    def _due_look(self, session: ProxiedSession, now: float) -> _Look | None:
        """What is to be looked at of a session now, if anything is."""
        tracker, opening = session.tracker, session.opening
        if session.done.is_set() or session.draining or tracker is None or (opening and opening.inode is None):
            self._forget(session)
            return None
        if opening is None or session.client.waits or not tracker.at_rest:
            return None
        leftover = session.leftover
        if leftover is None or leftover.requests != tracker.requests:
            if leftover is not None:
                leftover.close()
            leftover = session.leftover = Leftover(
                tracker.requests, since=now, next=now + self._first(session), looked=now
            )
        if leftover.next > now:
            return None
        if _has_all_been_read(session):
            self._settle(session)
            return None
        holders = session.sightings.holders or (() if opening.opener is None else (opening.opener,))
        events = 0 if leftover.alarm is None else leftover.alarm.events
        return _Look(session, tracker, leftover, opening, holders, tracker.position, events, leftover.size > 0)

    def _first(self, session: ProxiedSession) -> float:
        return min(_FIRST_REPORTED, self._interval) if session.names_threads else _FIRST

    def _forget(self, session: ProxiedSession) -> None:
        """Take a session off the list."""
        self._listed.pop(session.id, None)
        leftover, session.leftover = session.leftover, None
        if leftover is not None:
            with spared(Loss.TIDINESS, session):
                leftover.close()

    def _settle(self, session: ProxiedSession) -> None:
        """The last answer has been read to its end: the next request puts the session on the list again."""
        self._forget(session)
        session.client.attend()

    async def _look(self, witness: Witness, due: list[_Look]) -> float:
        """Look at what lies unread; return what it has cost in seconds."""
        try:
            (sizes, attentions), seconds = await looking.look(timed, _see, witness, due)
        except Exception:
            for look in due:  # each is looked at again when it makes its next request
                self._forget(look.session)
            raise
        now, stint = trio.current_time(), Stint()
        self._asking = None
        for look, size, attention in zip(due, sizes, attentions, strict=True):
            try:
                self._take_in(look, size, attention, now)
            except Exception:
                note(Loss.EVIDENCE, look.session)
                self._forget(look.session)
            if await stint.rest():
                self._asking = None
        return seconds + stint.spent

    def _take_in(self, look: _Look, size: int | None, attention: Attention, now: float) -> None:
        session, tracker, leftover = look.session, look.tracker, look.leftover
        if session.leftover is not leftover or leftover.requests != tracker.requests or not tracker.at_rest:
            return
        if size is None:
            self._forget(session)
        elif tracker.position == look.position:  # else something came meanwhile: the next round will tell
            self._note(look, _meant(session, size + _waiting(session.client)), attention, now)

    def _note(self, look: _Look, unread: int, attention: Attention, now: float) -> None:
        session, tracker, leftover = look.session, look.tracker, look.leftover
        read = tracker.position - unread
        size = _size(tracker, read)
        if not size:
            self._settle(session)
            return
        passed = min(now - leftover.looked, 2 * self._interval)
        if attention is Attention.STOPPED or (leftover.size and leftover.read != read):
            leftover.silence = 0.0
        elif look.closely and self._awaits_another(session):
            pass  # it may well read this one when it has got the other
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
            session.client.attend()  # what it sends next it may send on top of it
            if session.transport == "unix":
                with contextlib.suppress(OSError):  # there are no descriptors to spare
                    leftover.alarm = self._set_alarm(session.client)
        elif leftover.told:
            pause = min(_RARELY, leftover.looks * self._interval)
        leftover.next = now + pause
        if self._threshold and leftover.silence >= self._threshold and not leftover.told:
            idle = attention is Attention.ELSEWHERE and read <= tracker.answer_began
            if idle and not tracker.pipelines and _is_wanted(tracker):
                leftover.told = self._accuse(session, self._abandoned(session, tracker, leftover))

    def _awaits_another(self, session: ProxiedSession) -> bool:
        """Whether the client awaits an answer on another connection, as one does that asks several servers at once.

        Its own session is at rest, and so isn't among those on which one is awaited.
        """
        asker = _asker(session)
        if asker is None:
            return False
        if self._asking is None:
            self._asking = self._find_asking()
        return any(_is_same(asker, other) for other in self._asking.get(asker.pid, ()))

    def _find_asking(self) -> _Asking:
        asking: _Asking = {}
        for session in chain(self._listed.values(), self._unknown.values()):
            try:
                if session.tracker is not None and not session.tracker.at_rest and not session.done.is_set():
                    asker = _asker(session)
                    if asker is not None:
                        asking.setdefault(asker.pid, []).append(asker)
            except Exception:
                note(Loss.EVIDENCE, session)
        return asking

    def _abandoned(self, session: ProxiedSession, tracker: Tracker, leftover: Leftover) -> Verdict:
        driver = session.driver
        verdict = tracker.judge_unread(
            f"has left an answer of {leftover.size} bytes unread for more than {self._threshold:g} s",
            sender=None,
            libpq=libpq.IN_PROGRESS if driver is Driver.LIBPQ else None,
        )
        return session.dated(verdict)

    # When the next request comes

    @staticmethod
    def is_suspect(session: ProxiedSession, code: int) -> bool:
        """Whether a request, a message of this type, must not be sent before the last answer has been read.

        It may be where the client's driver may pipeline, and the last answer may be left where nobody wants it.
        """
        tracker = session.tracker
        last = None if tracker is None else tracker.last_request
        if tracker is None or last is None or not tracker.at_rest or not _is_wanted(tracker):
            return False
        sender, before = session.client.sender, last.sender
        if sender is not None and before is not None and sender.pid != before.pid:
            return False  # they share the connection, which is worse
        driver = session.driver
        if OVERLAP[driver].may:
            return False
        if driver is Driver.PYTHON and chr(code) == _BIND and _DESCRIBED.issuperset(last.messages):
            # pg8000 writes the Bind before it reads what was described, and a long one leaves its buffer at once:
            # CoreConnection.execute_unnamed().
            return False
        # In its pipeline mode libpq sends extended queries on top of each other's answers, and nothing else.
        return driver is not Driver.LIBPQ or bool(_SIMPLE & {chr(code), last.messages[0]})

    @staticmethod
    def known_unread(session: ProxiedSession) -> Unread | None:
        """How many bytes of the last answer were unread when the request was sent that has just been read.

        ``None`` if it takes a look to find out what certainly was.
        """
        tracker, leftover, account = session.tracker, session.leftover, session.kernel_account
        if tracker is None:
            return None
        if account is not None and account.is_kept and session.client.sender is not None:
            return _unread_at(account.unread, session, tracker)
        if leftover is None or leftover.requests != tracker.requests or not leftover.is_untouched:
            return None
        # Of what the kernel holds in one piece it doesn't tell that part has been read.
        return Unread(leftover.size) if tracker.position == tracker.answer_ended else None

    @staticmethod
    def was_seen_unread(session: ProxiedSession) -> bool:
        """Whether part of the last answer lay unread when that was last looked at."""
        tracker, leftover = session.tracker, session.leftover
        if tracker is None or leftover is None:
            return False
        return leftover.requests == tracker.requests and leftover.size > 0

    async def until_read(self, session: ProxiedSession, seconds: float) -> None:
        """Wait until a client has read all that it has been sent, for ``seconds`` at most."""
        with trio.move_on_after(seconds):
            while not session.done.is_set() and await self._has_unread(session):  # noqa: ASYNC110 - nobody is called back
                await trio.sleep(_PEEKS)

    async def _has_unread(self, session: ProxiedSession) -> bool:
        if session.transport == "unix":
            return not _has_all_been_read(session)
        opening, witness = session.opening, self._witness
        if opening is None or witness is None:
            return False
        look = [(opening, session.sightings.holders)]
        try:
            [size] = await looking.look(witness.unread, look)
        except Exception:
            note(Loss.EVIDENCE, session)
            return False
        if session.done.is_set():
            return False  # its descriptor may be another's by now
        return size is not None and size + _waiting(session.client) > 0

    async def still_unread(self, session: ProxiedSession) -> Unread:
        """Look how much of the last answer lies unread still, now that the next request has been sent."""
        tracker, leftover, opening, witness = session.tracker, session.leftover, session.opening, self._witness
        if tracker is None or leftover is None or opening is None or witness is None:
            return Unread(0)
        position = tracker.position
        look = [(opening, session.sightings.holders)]
        try:
            [size] = await looking.look(witness.unread, look)
        except Exception:
            note(Loss.EVIDENCE, session)
            return Unread(0)
        if size is None or session.done.is_set() or tracker.position != position or session.leftover is not leftover:
            return Unread(0)
        return Unread(_size(tracker, position - _meant(session, size + _waiting(session.client))))

    def sent_on_top(self, session: ProxiedSession, tracker: Tracker, unread: Unread, pending: bytes) -> Verdict:
        """Say that a request has been sent on top of an answer.

        Args:
            session: the session.
            tracker: what follows it.
            unread: how much of the answer was unread.
            pending: the request, from its beginning on.
        """
        if not unread.arrived:
            return tracker.judge_hidden_overlap(sender=session.client.sender, pending=pending)
        leftover = session.leftover
        since = ""
        if leftover is not None and leftover.requests == tracker.requests:
            since = f" for {trio.current_time() - leftover.since:.1f} s"
        reason = f"on top of {unread.size} bytes of the last answer, which lay unread{since}"
        # Whoever has left it unread did that, and not whoever comes upon it.
        return session.dated(tracker.judge_unread(reason, sender=session.client.sender, pending=pending, libpq=None))


def _unread_at(unread: tuple[int, int] | None, session: ProxiedSession, tracker: Tracker) -> Unread:
    """How much of the last answer hadn't been read, by the kernel's account of a send."""
    if unread is None:
        return Unread(0)
    tls = session.client.tls
    if tls is not None:
        read, received = (tracker.position - tls.unread_at(position) - tracker.answer_ended for position in unread)
    else:
        read, received = (_signed(position - session.preamble - tracker.answer_ended) for position in unread)
    return Unread(_size(tracker, tracker.answer_ended + read), arrived=received >= 0)


def _meant(session: ProxiedSession, size: int) -> int:
    """How many bytes of the server's are in the last ones that its client was sent."""
    tls = session.client.tls
    return size if tls is None else tls.unread(size)


def _signed(number: int) -> int:
    """What a small difference is that has been taken modulo 2**32."""
    number &= _MODULO
    return number - _MODULO - 1 if number >> 31 else number


def _size(tracker: Tracker, read: int) -> int:
    """How many bytes of the last answer lie beyond a position; its ReadyForQuery doesn't count."""
    return max(0, min(tracker.answer_ended - READY_SIZE - read, tracker.answer_ended - tracker.answer_began))


def _asker(session: ProxiedSession) -> Sender | None:
    """Who made the last request, as far as the kernel has named it; else the process that opened the connection."""
    last = None if session.tracker is None else session.tracker.last_request
    if last is not None and last.sender is not None:
        return last.sender
    opening = session.opening
    return None if opening is None or opening.opener is None else Sender(opening.opener.pid)


def _is_same(one: Sender, other: Sender) -> bool:
    """Whether two of one process may be one thread: where the threads aren't known, they may."""
    return None in (one.tid, other.tid) or one.tid == other.tid


def _is_wanted(tracker: Tracker) -> bool:
    last = tracker.last_request
    return last is not None and not WANTED.isdisjoint(last.messages)


def _waiting(client: End) -> int:
    """Bytes for the client that it has no room for."""
    unsent = _queued(client, _SIOCOUTQNSD) if client.session.transport == "tcp" else 0
    return client.unsent + unsent


def _has_all_been_read(session: ProxiedSession) -> bool:
    """Whether a client has certainly read everything, as the guard's end of a Unix connection shows in a microsecond.

    What is sent over one belongs to its sender until it has been read: unix(7), SIOCOUTQ.
    """
    client = session.client
    return session.transport == "unix" and not client.outgoing and _queued(client, termios.TIOCOUTQ) == 0


def _queued(client: End, request: int) -> int:
    """Ask how many bytes are in some state on their way to a client."""
    size: int = struct.unpack("i", fcntl.ioctl(client.fd, request, bytes(4)))[0]
    return size


def _see(witness: Witness, looks: list[_Look]) -> tuple[list[int | None], list[Attention]]:
    """Look what lies unread, and what those do who left it; in a worker thread."""
    sizes = witness.unread([(look.opening, look.holders) for look in looks])
    attentions = [
        witness.attention(look.opening, look.holders) if look.closely and size else Attention.UNKNOWN
        for look, size in zip(looks, sizes, strict=True)
    ]
    return sizes, attentions
