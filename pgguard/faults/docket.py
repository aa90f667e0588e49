"""Repeats: a fault is recorded in full once, and after that briefly, not too often, and counted always.

A repeat says that the fault it repeats has come again; message, summary and culprits are that one's, unless it has its
own.

A refused login is a session of its own, and there are as many as its client tries: its fault is the server's, known by
the limit for which it was refused, on whichever session; after a while it is looked into anew, as others may hold the
connections by then.

A fault that its application commits at all, it commits thousands of times. What makes two faults the same is their
kind, their session and the processes that the kernel named, in whichever roles: two workers fighting over a connection
are one fault, whoever interrupts whom. All of that is known before any evidence is taken, so nothing has to
be held to learn that there is nothing new.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, NamedTuple

from pgguard.faults.fault import Fault
from pgguard.session.verdicts import Kind

if TYPE_CHECKING:
    from pgguard.faults.catalogue import Severity
    from pgguard.faults.fault import Culprit, SessionFacts
    from pgguard.faults.policy import Action
    from pgguard.session.verdicts import MessageSeen, Refusal, Verdict

RECORD_INTERVAL: Final = 1.0
"""Seconds between two records of one fault, at least."""
FAULTS_PER_SESSION: Final = 64
"""Faults of one session that repeats are told by. A job runner whose connection every child uses makes a new one
with each child: beyond this many, the one that has been quiet for longest is forgotten, and recorded in full again
if it comes back."""


RENEWAL: Final = 60.0
"""Seconds after which a refusal that comes again is recorded in full once more."""
_SERVER: Final = 0
"""Stands for the session of what is no single session's; those count from 1."""


class Count(NamedTuple):
    """How often something happened: recorded or not, every time counts."""

    kind: Kind
    severity: Severity
    action: Action
    faults: int
    """First times: records in full."""
    repeats: int


class Instance(NamedTuple):
    """What a repeat says of itself, where it isn't what it repeats."""

    session: SessionFacts
    message: MessageSeen | None
    summary: str
    culprits: tuple[Culprit, ...]


class _Key(NamedTuple):
    kind: Kind
    pids: frozenset[int]
    settled: bool
    refusal: Refusal | None
    graver: bool
    """An answer was not only left unread, but something sent on top of it."""


@dataclass(slots=True, eq=False)
class _Case:
    first: Fault
    """Without its requests, which no repeat needs."""
    recorded_at: float
    suppressed: int = 0
    last: Instance | None = None
    """The last repeat, if it says something of itself."""

    def repeat(self, fault_id: int, at: float) -> Fault:
        """The record of a repeat that happened just now."""
        fault = replace(
            self.first,
            id=fault_id,
            at=at,
            repeat_of=self.first.id,
            suppressed=self.suppressed,
        )
        if self.last is not None:
            fault = replace(fault, shares=None, unnamed=0, **self.last._asdict())
        self.recorded_at = at
        self.suppressed = 0
        return fault


class Docket:
    """Numbers the records, knows what has been recorded, and counts.

    Memory is bounded by the sessions that have had a fault and are still open: :meth:`close` forgets one.

    Args:
        interval: Seconds between two records of one fault, at least.
    """

    def __init__(self, *, interval: float = RECORD_INTERVAL) -> None:
        self._interval = interval
        self._last_id = 0
        self._sessions: dict[int, OrderedDict[_Key, _Case]] = {}
        self._counts: dict[tuple[Kind, Severity, Action], tuple[int, int]] = {}

    def next_id(self) -> int:
        """The number of the next record, from 1."""
        self._last_id += 1
        return self._last_id

    def known(self, session_id: int, verdict: Verdict, *, at: float) -> Fault | None:
        """The first record of this fault, if it has been recorded; what was done then is to be done now.

        Args:
            session_id: The session.
            verdict: The fault.
            at: Seconds since the epoch.
        """
        cases = self._sessions.get(_place(session_id, verdict))
        case = None if cases is None else cases.get(_key(verdict))
        if case is None or (verdict.refusal is not None and not 0 <= at - case.first.at < RENEWAL):
            return None
        return case.first

    def enter(self, verdict: Verdict, fault: Fault) -> Fault | None:
        """Take note of a fault that is not :meth:`known` and is being recorded in full.

        Returns:
            A last repeat of the fault that is forgotten in its stead, to be recorded too, if there is one and some
            of it was suppressed.
        """
        case = _Case(replace(fault, requests=(), story=()), fault.at)
        self._count(fault, faults=1)
        return self._keep(_place(fault.session.id, verdict), _key(verdict), case, fault.at)

    def equate(self, session_id: int, verdict: Verdict, concluded: Verdict, *, at: float) -> Fault | None:
        """Know a fault by ``verdict`` too, which evidence has shown to be one that is :meth:`known`.

        Args:
            session_id: The session.
            verdict: What the session core said.
            concluded: What the evidence made of it, and the fault is known by.
            at: Seconds since the epoch.

        Returns:
            As :meth:`enter` does.

        Raises:
            KeyError: The fault is not known.
        """
        place = _place(session_id, verdict)
        return self._keep(place, _key(verdict), self._sessions[place][_key(concluded)], at)

    def _keep(self, place: int, key: _Key, case: _Case, at: float) -> Fault | None:
        cases = self._sessions.setdefault(place, OrderedDict())
        forgotten = cases.pop(key, None)
        cases[key] = case
        if len(cases) > FAULTS_PER_SESSION:
            _, forgotten = cases.popitem(last=False)
        if forgotten is None:
            return None
        # Known by another name too, it isn't forgotten yet.
        return None if forgotten in cases.values() else self._settle(forgotten, at)

    def repeat(self, session_id: int, verdict: Verdict, *, at: float, instance: Instance | None = None) -> Fault | None:
        """Count a fault that is :meth:`known` once more.

        Args:
            session_id: The session.
            verdict: The fault.
            at: Seconds since the epoch.
            instance: What its record is to say of itself; without it, all is as the first time.

        Returns:
            The record to be made of it, or ``None`` if the last one is too recent.

        Raises:
            KeyError: The fault is not known.
        """
        key = _key(verdict)
        cases = self._sessions[_place(session_id, verdict)]
        case = cases[key]
        cases.move_to_end(key)
        self._count(case.first, repeats=1)
        case.last = instance
        if 0 <= at - case.recorded_at < self._interval:
            case.suppressed += 1
            return None
        return case.repeat(self.next_id(), at)

    def close(self, session_id: int, *, at: float) -> list[Fault]:
        """Forget a session that has ended; returns the records that account for what was suppressed.

        Of what is no single session's, what was suppressed longer than the interval ago is accounted for too.
        """
        cases: OrderedDict[_Key, _Case] = self._sessions.pop(session_id, OrderedDict())
        quiet = [case for case in self._sessions.get(_SERVER, {}).values() if at - case.recorded_at >= self._interval]
        return [fault for case in (*cases.values(), *quiet) if (fault := self._settle(case, at)) is not None]

    def close_all(self, *, at: float) -> list[Fault]:
        """:meth:`close` every session, as the guard ends."""
        return [fault for session_id in list(self._sessions) for fault in self.close(session_id, at=at)]

    def counts(self) -> list[Count]:
        """What has happened since the guard started, the gravest first."""
        counts = [Count(*key, *value) for key, value in self._counts.items()]
        return sorted(counts, key=lambda count: -count.severity.rank)

    def _settle(self, case: _Case, at: float) -> Fault | None:
        """Account for what was suppressed: the last of it becomes a record and stands for itself."""
        if not case.suppressed:
            return None
        case.suppressed -= 1
        return case.repeat(self.next_id(), at)

    def _count(self, fault: Fault, *, faults: int = 0, repeats: int = 0) -> None:
        key = (fault.kind, fault.severity, fault.action)
        before = self._counts.get(key, (0, 0))
        self._counts[key] = (before[0] + faults, before[1] + repeats)


def _place(session_id: int, verdict: Verdict) -> int:
    return session_id if verdict.refusal is None else _SERVER


def _key(verdict: Verdict) -> _Key:
    if verdict.refusal is not None:
        return _Key(verdict.kind, frozenset(), verdict.settled, verdict.refusal, graver=False)
    pids = {sender.pid for sender in verdict.requesters}
    if verdict.intruder is not None:
        pids.add(verdict.intruder.pid)
    graver = verdict.kind is Kind.UNREAD_ANSWER and verdict.message is not None
    return _Key(verdict.kind, frozenset(pids), verdict.settled, None, graver)
