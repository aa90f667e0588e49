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

**Who calls what, when.** The events about bytes are there before the bytes are. So after reading from connections,
and before asking for senders, call :meth:`Accounts.feed` with all that ``SenderProbe.read()`` returns, once for them
all. If it is the other way around, more is unknown; nothing is wrong.

**What is assumed.** Every byte of the stream is read, once, and counted. A client's urgent data (``MSG_OOB``), which no
PostgreSQL client sends, would be taken out of the stream: set ``SO_OOBINLINE`` on the accepted socket to rule it out.
"""

from __future__ import annotations

import errno
import os
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable

from pgguard.attribution.ebpf.programs import Kind
from pgguard.attribution.ebpf.ring import Event
from pgguard.identity import Sender

Segment = tuple[int, Sender | None]
"""A number of bytes in a row, and who sent them; ``None`` if that isn't known for certain."""

_SENDING = int(Kind.SENDING)
_EARLY_CONNECTIONS = 2048
_EARLY_EVENTS = 32
"""Connections, and events of each, that are kept for a connection to be accepted; beyond that, senders are unknown. A
client that waits to be accepted sends a startup packet, and waits for the answer."""


_RUNS = 2048
"""Stretches of the stream that are told apart before they are read. Two that send by turns can bring about any number
while the guard has a reason not to read; the senders of what is behind that are unknown."""
_UNREAD_EVENTS = 64
"""Sends on top of something unread that are remembered until they are read: of a client that pipelines, say, whose next
ones say nothing new."""
_MODULO = (1 << 32) - 1


class Account:
    """One connection's: see the module for the rules.

    Args:
        origin: see the attribute.
    """

    def __init__(self, origin: int | None = None) -> None:
        self.origin = origin
        """The sequence number of its first byte; ``None`` if it isn't known, and nothing will be."""
        self._position = 0
        """Of the next byte to be read."""
        self._runs: deque[tuple[int, int, Sender]] = deque()
        """Where stretches of the stream begin and end, and whose they are, in order."""
        self._latest: Sender | None = None
        """The last that is known to have sent: one object for as long as it is the same thread."""
        self.opener: Sender | None = None
        """Who called connect(2); ``None`` if that isn't known."""
        self.problem: int | None = None
        """The errno for which the kernel doesn't watch this connection, whose senders then all are unknown."""
        self.cookie: int | None = None
        """Under which the probe watches the connection."""
        self.first_answer: int | None = None
        """The sequence number of the guard's first byte; ``None`` if it isn't known."""
        self.unread_sends: deque[tuple[int, int, int]] = deque(maxlen=_UNREAD_EVENTS)
        """Sends by those that hadn't read all that they had received: where in the stream, how far they had read, and
        what they had received."""
        self.contradictions = 0
        """How often two threads were said to have sent the same bytes, as it happens if something that is assumed
        doesn't hold (:mod:`programs`). Those that are still to be read are unknown then."""

    def apply(self, event: Event) -> None:
        """Take an event of this connection into account, in the order in which they were read."""
        if event.origin != self.origin:
            return
        if event.kind == _SENDING:
            if self._runs and self._runs[-1][1] > event.position:
                self._contradict(event.position)
            if event.read != event.received:
                self.unread_sends.append((event.position, event.read, event.received))
            if event.pid:  # else a thread that the guard's pid namespace doesn't have
                self._add(event.position, event.position + event.size, event.pid, event.tid)
        elif event.kind == Kind.ACCEPTED:
            self.first_answer = event.read
        elif event.kind == Kind.OPENED:
            self.opener = Sender(event.pid, event.tid) if event.pid else None
        elif event.kind == Kind.UNWATCHED:
            self.problem = event.size
        elif event.kind == Kind.WATCHED:
            self.cookie = event.position
        elif event.kind == Kind.BLOCKING:
            self.problem = errno.EWOULDBLOCK

    def _add(self, start: int, stop: int, pid: int, tid: int) -> None:
        sender = self._latest
        if sender is None or sender.pid != pid or sender.tid != tid:
            sender = self._latest = Sender(pid, tid)
        # A client that is not read may send a million small messages: they are one stretch, and one object's.
        if self._runs and self._runs[-1][2] is sender and self._runs[-1][1] == start:
            self._runs[-1] = self._runs[-1][0], stop, sender
        elif len(self._runs) < _RUNS:
            self._runs.append((start, stop, sender))

    def covers(self, length: int) -> bool:
        """Whether something has been said of the last of the next ``length`` bytes, or of what is behind it."""
        return bool(self._runs) and self._runs[-1][1] >= self._position + length

    def unread(self) -> tuple[int, int] | None:
        """What lay unread when the byte that is to be read next was sent, if it was the first of a send.

        Returns:
            How far its sender had read, and how far received: positions in what the guard has sent, modulo 2**32.
            ``None`` if it had read everything, or that isn't known.
        """
        unread = self.unread_sends
        while unread and unread[0][0] < self._position:
            unread.popleft()
        if not unread or unread[0][0] != self._position or self.first_answer is None:
            return None
        _, read, received = unread.popleft()
        return read - self.first_answer & _MODULO, received - self.first_answer & _MODULO

    def split(self, length: int) -> list[Segment]:
        """Tell who sent the next bytes that were read, ``length`` of them.

        Returns:
            Segments of that length together, neighbours having different senders; none if the length is 0. A sender is
            the same object for as long as it is the same thread.
        """
        position = self._position
        self._position = end = position + length
        segments: list[Segment] = []
        runs = self._runs
        while runs and position < end:
            start, stop, sender = runs[0]
            if start >= end:
                break
            if start > position:
                _append(segments, start - position, None)
                position = start
            if stop <= end:
                runs.popleft()
            if stop > position:
                stop = min(stop, end)
                _append(segments, stop - position, sender)
                position = stop
        if position < end:
            _append(segments, end - position, None)
        return segments

    def _contradict(self, position: int) -> None:
        """Forget what is said of the bytes from a position on."""
        self.contradictions += 1
        while self._runs and self._runs[-1][1] > position:
            start, _, sender = self._runs.pop()
            if start < position:
                self._runs.append((start, position, sender))


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


class Accounts:
    """The accounts of all connections, by their keys (:func:`~pgguard.attribution.ebpf.probe.connection_key`)."""

    def __init__(self) -> None:
        self._open: dict[bytes, tuple[int, Account]] = {}
        """With their origins."""
        self._early: OrderedDict[bytes, list[Event]] = OrderedDict()
        """Events of connections that weren't accepted yet, oldest first."""

    def feed(self, events: Iterable[Event]) -> None:
        """Apply events, each to its connection's account."""
        for event in events:
            found = self._open.get(event.key)
            if found is not None and found[0] == event.origin:
                found[1].apply(event)
            else:
                self._keep(event)

    def open(self, key: bytes) -> Account:
        """Begin the account of a connection that was accepted; what was reported of it before counts.

        Call it after accepting and then feeding all events that there are. If another account of the same key is open
        still, its connection is over, and it gets no more events.
        """
        early = self._early.pop(key, [])
        self._open.pop(key, None)
        origin = next((event.origin for event in reversed(early) if event.kind == Kind.ACCEPTED), None)
        account = Account(origin)
        if origin is not None:
            self._open[key] = origin, account
            for event in early:
                account.apply(event)
        return account

    def close(self, key: bytes, account: Account) -> None:
        """End an account; nothing happens if a later connection has taken its place."""
        found = self._open.get(key)
        if found is not None and found[1] is account:
            del self._open[key]
        elif found is None:
            self._early.pop(key, None)

    def _keep(self, event: Event) -> None:
        events = self._early.setdefault(event.key, [])
        if event.kind == Kind.OPENED:
            # A new connection: what is there already is of one that was never accepted, or of one elsewhere. The
            # guard's own end may have been reported by another processor, and read, before this event was ready.
            events[:] = [early for early in events if early.origin == event.origin]
            self._early.move_to_end(event.key)
        if len(events) < _EARLY_EVENTS:  # what is left out then is unknown
            events.append(event)
        while len(self._early) > _EARLY_CONNECTIONS:
            self._early.popitem(last=False)
