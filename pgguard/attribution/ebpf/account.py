# SPDX-License-Identifier: Apache-2.0
"""Whose bytes these are: the events of connections, applied to what is read from them. No I/O, and no clock.

The rules, all of which follow from what :mod:`programs` says of events:

1. ``SENDING`` is true by itself: the bytes from one position in the stream to another are one thread's. It takes no
   other event to be so, and no other makes it wrong, be they missing, late, or of another kind.
2. Bytes that no such event covers have no sender: ``None``, which means unknown. That is so for bytes whose sender was
   skipped by the kernel, whose event was lost, or of which the program couldn't be sure. As positions are absolute,
   what is unknown shifts nothing: what comes behind is as certain as ever, and there is nothing to re-align.
3. An event counts only if its connection's first sequence number is the one that the guard's own end was established
   with. A container may have a connection of exactly the same addresses, to somewhere else.
4. A thread that goes on sending is not reported each time: how far it has come is written to one place, and when that
   is read before the events are, all who have sent something in front of there have been reported. It is added to the
   stretch that was reported last, and to no other. So an event that is lost *here*, by whatever error, would name
   somebody wrongly, and its account is told: nobody goes on in it then until the next report.

**Who calls what, when.** What is told of bytes is there before the bytes are. So after reading from a connection, and
before asking for senders, call :meth:`Accounts.catch_up`. If it is the other way around, more is unknown; nothing is
wrong.

**What is assumed.** Every byte of the stream is read, once, and counted. A client's urgent data (``MSG_OOB``), which no
PostgreSQL client sends, would be taken out of the stream: set ``SO_OOBINLINE`` on the accepted socket to rule it out.
"""

from __future__ import annotations

import errno
import os
from collections import Counter, OrderedDict, deque
from typing import TYPE_CHECKING, Final, Protocol, final

from pgguard.attribution.ebpf.programs import Kind
from pgguard.attribution.ebpf.ring import Event
from pgguard.identity import Sender

if TYPE_CHECKING:
    from collections.abc import Callable

    from mypy_extensions import i64

Segment = tuple[int, Sender | None]
"""A number of bytes in a row, and who sent them; ``None`` if that isn't known for certain."""

_OPENED: Final = int(Kind.OPENED)
_ACCEPTED: Final = int(Kind.ACCEPTED)
_UNWATCHED: Final = int(Kind.UNWATCHED)
_SENDING: Final = int(Kind.SENDING)
_UNCERTAIN: Final = int(Kind.UNCERTAIN)
_WATCHED: Final = int(Kind.WATCHED)
_BLOCKING: Final = int(Kind.BLOCKING)

_SENDS: Final = (_SENDING, _UNCERTAIN)

_EARLY_CONNECTIONS = 2048
_EARLY_EVENTS = 32
"""Connections, and events of each, that are kept for a connection to be accepted; beyond that, senders are unknown. A
client that waits to be accepted sends a startup packet, and waits for the answer."""


_RUNS = 2048
"""Stretches of the stream that are told apart before they are read. Two that send by turns can bring about any number
while the guard has a reason not to read; the senders of what is behind that are unknown, but for the last one."""
_UNREAD_EVENTS = 64
"""Sends on top of something unread that are remembered until they are read: of a client that pipelines, say, whose next
ones say nothing new."""
_LOOKS: Final = 3
"""Times that it is looked how far a sender has gone on, as long as another one turns out to have been reported."""
_MODULO = (1 << 32) - 1


class Reports(Protocol):
    """The kernel's reports, as :class:`~pgguard.attribution.ebpf.probe.SenderProbe` has them."""

    @property
    def read(self) -> Callable[[], list[Event]]:
        """Takes the events that there are."""

    @property
    def reached(self) -> Callable[[int], int]:
        """By ticket, tells up to where the one had gone on who had been reported last."""

    @property
    def glance(self) -> Callable[[int], int]:
        """Tells the same if all events have been taken; -1 otherwise."""


@final
class Account:
    """One connection's: see the module for the rules.

    Args:
        origin: see the attribute.
    """

    __slots__ = (
        "_earlier",
        "_pid",
        "_position",
        "_start",
        "_stop",
        "_tid",
        "_unread_sends",
        "contradictions",
        "cookie",
        "first_answer",
        "opener",
        "origin",
        "problem",
        "sender",
        "ticket",
    )

    def __init__(self, origin: int | None = None) -> None:
        self.origin = origin
        """The sequence number of its first byte; ``None`` if it isn't known, and nothing will be."""
        self._position: i64 = 0
        """Of the next byte to be read."""
        self._start: i64 = 0
        self._stop: i64 = 0
        """Where the last stretch of the stream begins and ends of which it is known whose it is. A client that waits
        for its answers has no more than that one to be read, and while it is the same thread it makes no object."""
        self._pid: i64 = 0
        self._tid: i64 = 0
        self.sender: Sender | None = None
        """Whose that stretch is: one object for as long as it is the same thread."""
        self.ticket = 0
        """Under which the kernel says how far that one has gone on; 0: it isn't the one that was reported last."""
        self._earlier: deque[tuple[int, int, Sender | None]] | None = None
        """The stretches in front of it that haven't been read, in order, once there have been any."""
        self.opener: Sender | None = None
        """Who called connect(2); ``None`` if that isn't known."""
        self.problem: int | None = None
        """The errno for which the kernel doesn't watch this connection, whose senders then all are unknown."""
        self.cookie: int | None = None
        """Under which the probe watches the connection."""
        self.first_answer: int | None = None
        """The sequence number of the guard's first byte; ``None`` if it isn't known."""
        self._unread_sends: deque[tuple[int, int, int]] | None = None
        """Sends by those that hadn't read all that they had received: where in the stream, how far they had read, and
        what they had received; once there have been any."""
        self.contradictions = 0
        """How often two threads were said to have sent the same bytes, as it happens if something that is assumed
        doesn't hold (:mod:`programs`). Those that are still to be read are unknown then."""

    def apply(self, event: Event) -> None:
        """Take an event of this connection into account, in the order in which they were read."""
        position, size, kind, tid, pid, origin, ticket, _, read, received, reached = event
        if origin != self.origin:
            return
        if kind == _SENDING:
            self._end_last(reached)
            if read != received:
                self._note_unread(position, read, received)
            self._add(position, position + size, pid, tid)
            if pid:
                self.ticket = ticket
        elif kind == _UNCERTAIN:
            self._end_last(reached)
        elif kind == _ACCEPTED:
            self.first_answer = read
        elif kind == _OPENED:
            self.opener = Sender(pid, tid) if pid else None
        elif kind == _UNWATCHED:
            self.problem = size
        elif kind == _WATCHED:
            self.cookie = position
        elif kind == _BLOCKING:
            self.problem = errno.EWOULDBLOCK

    def go_on(self, ticket: int, reached: i64) -> None:
        """Have the last stretch go on up to a position, if it is still the one that a ticket was for."""
        if ticket and ticket == self.ticket and reached > self._stop:
            self._stop = reached

    def leave_out(self) -> None:
        """A report wasn't applied: nobody is known to go on behind the last stretch until there is another."""
        self.ticket = 0

    def _end_last(self, reached: i64) -> None:
        """Somebody else is reported: the last one has gone on up to there, and no further."""
        self.go_on(self.ticket, reached)
        self.ticket = 0

    def _note_unread(self, position: int, read: int, received: int) -> None:
        if self._unread_sends is None:
            self._unread_sends = deque(maxlen=_UNREAD_EVENTS)
        self._unread_sends.append((position, read, received))

    def _add(self, start: i64, stop: i64, pid: i64, tid: i64) -> None:
        if self._stop > start and self._stop > self._position:
            self._contradict(start)
        if not pid:  # a thread that the guard's pid namespace doesn't have
            return
        if pid == self._pid and tid == self._tid:
            # A client that is not read may send a million small messages: they are one stretch, and one object's.
            if self._stop == start:
                self._stop = stop
                return
            self._keep_last()
        else:
            self._keep_last()
            opener = self.opener
            known = opener is not None and opener.pid == pid and opener.tid == tid
            self._pid, self._tid, self.sender = pid, tid, opener if known else Sender(pid, tid)
        self._start, self._stop = start, stop

    def _keep_last(self) -> None:
        """Make room for another stretch; if they are too many, the last one is left out."""
        if self._stop > self._position:
            if self._earlier is None:
                self._earlier = deque()
            if len(self._earlier) < _RUNS - 1:
                self._earlier.append((self._start, self._stop, self.sender))

    def _contradict(self, position: i64) -> None:
        """Forget what is said of the bytes from a position on."""
        self.contradictions += 1
        while self._stop > position:
            if self._start < position:
                self._stop = position
            elif self._earlier:
                self._start, self._stop, self.sender = self._earlier.pop()
                if self.sender is not None:
                    self._pid, self._tid = self.sender.pid, self.sender.tid or 0
            else:
                self._stop = self._start = 0

    def covers(self, length: i64) -> bool:
        """Whether something has been said of the last of the next ``length`` bytes, or of what is behind it."""
        return self._stop >= self._position + length

    def unread(self) -> tuple[int, int] | None:
        """What lay unread when the byte that is to be read next was sent, if it was the first of a send.

        Returns:
            How far its sender had read, and how far received: positions in what the guard has sent, modulo 2**32.
            ``None`` if it had read everything, or that isn't known.
        """
        unread = self._unread_sends
        if not unread:
            return None
        while unread and unread[0][0] < self._position:
            unread.popleft()
        if not unread or unread[0][0] != self._position or self.first_answer is None:
            return None
        _, read, received = unread.popleft()
        return read - self.first_answer & _MODULO, received - self.first_answer & _MODULO

    def take(self, length: i64) -> bool:
        """Tell whether the next bytes that were read, ``length`` of them, are all one's.

        Returns:
            True if they are :attr:`sender`'s, and have been counted. If it is False, :meth:`split` has to tell.
        """
        stop = self._position + length
        if self._earlier or self._start > self._position or self._stop < stop:
            return False
        self._position = stop
        return True

    def split(self, length: i64) -> list[Segment]:
        """Tell who sent the next bytes that were read, ``length`` of them.

        Returns:
            Segments of that length together, neighbours having different senders; none if the length is 0. A sender is
            the same object for as long as it is the same thread.
        """
        position: int = self._position
        end: int = position + length
        self._position = end
        segments: list[Segment] = []
        earlier = self._earlier
        while position < end:
            start, stop, sender = earlier[0] if earlier else (self._start, self._stop, self.sender)
            if start >= end or (not earlier and stop <= position):
                break
            if start > position:
                _append(segments, start - position, None)
                position = start
            if stop > position:
                _append(segments, min(stop, end) - position, sender)
                position = min(stop, end)
            if earlier and stop <= end:
                earlier.popleft()
        if position < end:
            _append(segments, end - position, None)
        return segments


def _append(segments: list[Segment], length: int, sender: Sender | None) -> None:
    if segments and segments[-1][1] == sender:
        segments[-1] = segments[-1][0] + length, sender
    else:
        segments.append((length, sender))


_REASONS = {
    errno.E2BIG: "because the map of watched sockets was full",
    errno.EWOULDBLOCK: "because the client's socket blocks",
    errno.ENOMEM: "because TCP had reached its memory limit",
    errno.EBUSY: "because another BPF program was watching the socket",
    errno.EOPNOTSUPP: "because the socket was not plain TCP",
}
"""Why the kernel doesn't watch a connection, by :attr:`Account.problem`."""


@final
class Tally:
    """What became of all connections so far."""

    def __init__(self) -> None:
        self.watched = 0
        """Connections of which the kernel has told who sends."""
        self.unwatched: Counter[int] = Counter()
        """Those of this host's that it hasn't, or not to the end, by :attr:`Account.problem`."""
        self.contradictions = 0
        """As of an :class:`Account`, of all of them."""

    def count(self, account: Account) -> None:
        """Take an account in that is at its end."""
        self.contradictions += account.contradictions
        if account.problem is not None:
            self.unwatched[account.problem] += 1
        elif account.cookie is not None:
            self.watched += 1

    def remarks(self, lost: int) -> list[str]:
        """Say what wasn't known: clauses, none if there is nothing to be said.

        Args:
            lost: how many events were.
        """
        remarks = []
        if self.unwatched:
            all_in_all = self.watched + self.unwatched.total()
            reasons = [
                f"{count} {_REASONS.get(why, f'({os.strerror(why)})')}" for why, count in self.unwatched.most_common()
            ]
            remarks.append(
                f"on {self.unwatched.total()} of {all_in_all} TCP connections the kernel did not say who sent: "
                + ", ".join(reasons)
            )
        if lost:
            remarks.append(
                f"the kernel's reports came too fast, and {lost} got lost: who sent those bytes is not known"
            )
        if self.contradictions:
            remarks.append(
                f"{self.contradictions} of the kernel's reports contradicted others: the senders named may be wrong"
            )
        return remarks


@final
class Accounts:
    """The accounts of all connections, by their keys (:func:`~pgguard.attribution.ebpf.probe.connection_key`).

    Args:
        reports: what they are made of; nobody else reads them.
    """

    __slots__ = ("_early", "_glance", "_open", "_reached", "_read")

    def __init__(self, reports: Reports) -> None:
        self._read = reports.read
        self._reached = reports.reached
        self._glance = reports.glance
        self._open: dict[bytes, Account] = {}
        """Those whose origin is known."""
        self._early: OrderedDict[bytes, list[Event]] = OrderedDict()
        """Events of connections that weren't accepted yet, oldest first."""

    def feed(self) -> None:
        """Apply the events that there are, each to its connection's account.

        Raises:
            Exception: what one of them has led to; the others have been applied.
        """
        failure: Exception | None = None
        for event in self._read():
            try:
                account = self._open.get(event[7])
                if account is not None and account.origin == event[5]:
                    account.apply(event)
                else:
                    self._keep(event)
            except Exception as error:
                failure = error
                self._leave_out(event[7])
        if failure is not None:
            raise failure

    def catch_up(self, account: Account) -> None:
        """Take into account all that has been reported of what has been read from a connection.

        Costs an eighth of a microsecond where it is somebody known who goes on.
        """
        ticket = account.ticket
        reached = self._glance(ticket)
        if reached >= 0:
            account.go_on(ticket, reached)
            return
        for _ in range(_LOOKS):
            ticket = account.ticket
            reached = self._reached(ticket) if ticket else 0
            self.feed()
            account.go_on(ticket, reached)
            if account.ticket == ticket:
                break

    def open(self, key: bytes) -> Account:
        """Begin the account of a connection that was accepted; what was reported of it before counts.

        Call it after accepting, and :meth:`feed` before it. If another account of the same key is open
        still, its connection is over, and it gets no more events.
        """
        early = self._early.pop(key, ())
        self._open.pop(key, None)
        origin: int | None = None
        for event in early:
            if event[2] == _ACCEPTED:
                origin = event[5]
        account = Account(origin)
        if origin is not None:
            self._open[key] = account
            for n, event in enumerate(early, 1):
                if n == _EARLY_EVENTS:
                    account.leave_out()  # in front of it others may have been
                account.apply(event)
        return account

    def close(self, key: bytes, account: Account) -> None:
        """End an account; nothing happens if a later connection has taken its place."""
        found = self._open.get(key)
        if found is account:
            del self._open[key]
        elif found is None:
            self._early.pop(key, None)

    def _leave_out(self, key: bytes) -> None:
        """An event of a connection couldn't be dealt with."""
        account = self._open.get(key)
        if account is not None:
            account.leave_out()
        self._early.pop(key, None)

    def _keep(self, event: Event) -> None:
        kind, origin, key = event[2], event[5], event[7]
        events = self._early.get(key)
        if events is None:
            self._early[key] = [event]
            if len(self._early) > _EARLY_CONNECTIONS:
                self._early.popitem(last=False)
            return
        if kind == _OPENED:
            # A new connection: what is there already is of one that was never accepted, or of one elsewhere. The
            # guard's own end may have been reported by another processor, and read, before this event was ready.
            events[:] = [early for early in events if early[5] == origin]
            self._early.move_to_end(key)
        if len(events) < _EARLY_EVENTS:
            events.append(event)
        elif kind in _SENDS and events[-1][2] in _SENDS:  # what is left out then is unknown
            events[-1] = event
