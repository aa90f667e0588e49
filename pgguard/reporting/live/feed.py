"""What is new: recorded faults, and numbers once a second, kept for a while and handed to whoever follows.

Everybody who follows has a queue of its own, which is bounded: who doesn't keep up is dropped. Whoever comes back says
what it got last, and is handed what it has missed, or told how much of that is gone.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict, deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from pgguard.faults.fault import Spread
from pgguard.faults.text import shorten
from pgguard.reporting.recorded import Gatherer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pgguard.faults.catalogue import Severity
    from pgguard.faults.fault import Fault, SessionFacts
    from pgguard.session.verdicts import Kind

KEPT: Final = 10_000
"""Records that are kept."""
KEPT_BYTES: Final = 16 << 20
"""Bytes of them, at most."""
_CAUSES_BYTES: Final = 8 << 20
"""Bytes of records of causes that are kept in full."""
QUEUE: Final = 256
"""Events that wait for one who follows, at most, beyond those that were there when it came."""
FOLLOWERS: Final = 16
"""Who may follow at the same time."""
HISTORY: Final = 600
"""Seconds for which numbers are kept."""
CAUSES: Final = 4096
"""Causes that are remembered."""
_SESSIONS: Final = 64
"""Sessions of each, the latest ones."""
_DIGITS: Final = 15
AT_ONCE: Final = 2 << 20
"""Bytes of records that are handed out at once, at most."""
_SUMMARY: Final = 600
"""Characters of what is said of one."""


class Record(NamedTuple):
    """A recorded fault."""

    place: int
    """Counts the records, from 1."""
    cause: int
    line: bytes
    """Its JSON."""


@dataclass(slots=True, eq=False)
class KnownCause:
    """A cause of which something has been recorded; times are seconds since the epoch."""

    number: int
    fault: int
    """The number of its first record."""
    kind: Kind
    severity: Severity
    summary: str
    first_at: float
    last_at: float
    spread: Spread
    """How far it had spread by its last record."""
    sessions: OrderedDict[int, SessionFacts] = field(default_factory=OrderedDict)
    """Those that records of it name, the latest ones, whether they are over or not."""


class Event(NamedTuple):
    """Something that is sent to whoever follows."""

    name: str
    data: bytes
    """JSON in one line."""
    place: int | None = None
    """Of a record."""


class Follower:
    """Somebody who is told what is new; iterated over, it tells it.

    Args:
        before: What was there when it came.
    """

    def __init__(self, before: list[Event]) -> None:
        self._before = deque(before)
        self._send, self._receive = trio.open_memory_channel[Event](QUEUE)

    def __aiter__(self) -> Follower:
        """Follow."""
        return self

    async def __anext__(self) -> Event:
        """Wait for what is next; the end is when it is dropped, or the guard ends."""
        if self._before:
            return self._before.popleft()
        return await self._receive.__anext__()

    def tell(self, event: Event) -> bool:
        """Hand it something more; False if it doesn't keep up, and gets nothing any more."""
        try:
            self._send.send_nowait(event)
        except trio.WouldBlock:
            self.end()
            return False
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return False
        return True

    def end(self) -> None:
        """Tell it nothing any more, but for what it has been told."""
        self._send.close()


class Feed:
    """A sink: keeps what is recorded, as far as there is room, and hands it on.

    Args:
        name: What people call its source.
    """

    def __init__(self, name: str) -> None:
        self.gatherer = Gatherer(name, kept=_CAUSES_BYTES)
        """By cause, for drawings and reports."""
        self.run = secrets.token_hex(6)
        """A random name, by which a number of :class:`Record` is known to be one of this feed's."""
        self.has_followers = trio.Event()
        """Somebody follows; it is another event when nobody does any more."""
        self._records: deque[Record] = deque()
        self._bytes = 0
        self._last = 0
        self._causes: OrderedDict[int, KnownCause] = OrderedDict()
        """By their numbers, the one first of which nothing has been recorded for longest."""
        self._figures: deque[Event] = deque(maxlen=HISTORY)
        self._followers: set[Follower] = set()
        self.dropped = 0
        """How many followers were dropped because they didn't keep up."""

    def __str__(self) -> str:
        return "the live page"

    # A sink

    def record(self, fault: Fault) -> None:
        """Take a fault, and hand it on."""
        line = self.gatherer.gather(fault)
        self._last += 1
        record = Record(self._last, fault.cause, line)
        self._records.append(record)
        self._bytes += len(line)
        while len(self._records) > KEPT or (self._bytes > KEPT_BYTES and len(self._records) > 1):
            self._bytes -= len(self._records.popleft().line)
        self._note_cause(fault)
        self._tell(_event(record))

    def close(self) -> None:
        """Tell followers nothing any more."""
        for follower in self._followers:
            follower.end()

    def _note_cause(self, fault: Fault) -> None:
        cause = self._causes.get(fault.cause)
        if cause is None:
            summary = shorten(fault.headline, _SUMMARY)
            first = fault.at if fault.spread is None else fault.spread.since
            spread = Spread(1, 1, 0, first)
            number = fault.repeat_of or fault.id
            cause = self._causes[fault.cause] = KnownCause(
                fault.cause, number, fault.kind, fault.severity, summary, first, fault.at, spread
            )
            if len(self._causes) > CAUSES:
                self._causes.popitem(last=False)
        self._causes.move_to_end(fault.cause)
        cause.last_at = max(cause.last_at, fault.at)
        if fault.spread is not None:
            cause.spread = fault.spread
        cause.sessions[fault.session.id] = fault.session
        cause.sessions.move_to_end(fault.session.id)
        if len(cause.sessions) > _SESSIONS:
            cause.sessions.popitem(last=False)

    # Who follows

    @property
    def is_full(self) -> bool:
        """Whether nobody else may follow for now."""
        return len(self._followers) >= FOLLOWERS

    @contextmanager
    def followed(self, last: str | None) -> Iterator[Follower]:
        """Follow.

        Args:
            last: The identifier of the last record that was got, of this feed or of another; ``None`` if that wasn't
                any: then nothing is told that was there before, but for numbers.
        """
        follower = Follower([*self._figures, *self._missed(last)])
        self._followers.add(follower)
        self.has_followers.set()
        try:
            yield follower
        finally:
            follower.end()
            self._followers.discard(follower)
            if not self._followers:
                self.has_followers = trio.Event()

    def _missed(self, last: str | None) -> list[Event]:
        """What has been recorded since, and in front of it how much of that isn't there any more."""
        if last is None:
            return []
        place = self.place_of(last)
        missed = [record for record in self._records if record.place > place]
        gone = self._last - place - len(missed)
        told = [Event("gap", b'{"gone":%d}' % gone)] if gone > 0 else []
        return [*told, *map(_event, missed)]

    def tell_figures(self, data: bytes) -> None:
        """Hand on numbers, and keep them."""
        event = Event("figures", data)
        self._figures.append(event)
        self._tell(event)

    def _tell(self, event: Event) -> None:
        for follower in list(self._followers):
            if not follower.tell(event):
                self._followers.discard(follower)
                self.dropped += 1

    # What is kept

    def identifier(self, place: int) -> str:
        """What a record is called in a stream of events."""
        return f"{self.run}:{place}"

    def place_of(self, identifier: str) -> int:
        """The place of the record that is called that; 0 if it is none of this feed's."""
        run, _, number = identifier.partition(":")
        is_place = run == self.run and number.isascii() and number.isdigit() and len(number) <= _DIGITS
        return int(number) if is_place else 0

    @property
    def gone(self) -> int:
        """How many records aren't kept any more."""
        return self._last - len(self._records)

    @property
    def last(self) -> int:
        """The place of the last record."""
        return self._last

    def records(self, *, behind: int, limit: int, cause: int | None, newest: bool) -> tuple[list[Record], bool]:
        """Some of the records that are kept, in their order, and whether there are more.

        Args:
            behind: Only those with a larger place.
            limit: How many, at most, and of :data:`AT_ONCE` bytes if they are several.
            cause: Only those of this cause; ``None``: of any.
            newest: If there are more, the last ones instead of the first.
        """
        found: list[Record] = []
        size, has_more = 0, False
        for record in reversed(self._records) if newest else self._records:
            if record.place <= behind:
                if newest:
                    break
                continue
            if cause is None or record.cause == cause:
                size += len(record.line)
                has_more = len(found) >= limit or (size > AT_ONCE and bool(found))
                if has_more:
                    break
                found.append(record)
        return found[::-1] if newest else found, has_more

    @property
    def causes(self) -> list[KnownCause]:
        """Those of which something has been recorded."""
        return list(self._causes.values())

    def cause(self, number: int) -> KnownCause | None:
        """The cause of this number; ``None`` if there is none, or it is forgotten."""
        return self._causes.get(number)


def _event(record: Record) -> Event:
    return Event("fault", record.line, record.place)
