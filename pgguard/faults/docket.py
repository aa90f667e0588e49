"""Repeats and causes: a fault is recorded in full at first, after that briefly and not too often, and counted always.

*Repeats.* A fault that its application commits at all, it commits thousands of times. What makes two faults of one
session the same is their kind and the processes that the kernel named, in whichever roles: two workers fighting over a
connection are one fault, whoever interrupts whom. All of that is known before any evidence is taken, so nothing has to
be held to learn that there is nothing new. A repeat says that the fault it repeats has come again; message, summary and
culprits are that one's, unless it has its own.

A refused login is a session of its own, and there are as many as its client tries: its fault is the server's, known by
the limit for which it was refused, on whichever session; after a while it is looked into anew, as others may hold the
connections by then.

*Causes.* What is the same for a person is one cause, on however many sessions and by however many processes: the kind,
the programs in their roles (command lines without their numbers) and the advice. The first :data:`FULL_RECORDS` faults
of a cause within :data:`FULL_INTERVAL` are recorded in full. All others are repeats, of which one is recorded now and
then: at most one a second while the cause is new, and the less often the longer it has gone on. What isn't recorded is
counted, and the next record of its cause says how much that was. So what is recorded depends on how many causes there
are, and neither on how many sessions nor on how often it happens.

Of more than :data:`CAUSES` at once, those that come on top are one cause for each kind and severity.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, NamedTuple

from pgguard.faults.fault import Fault, Role
from pgguard.session.verdicts import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pgguard.faults.catalogue import Severity
    from pgguard.faults.fault import Culprit, SessionFacts
    from pgguard.faults.policy import Action
    from pgguard.session.verdicts import MessageSeen, Refusal, Verdict

RECORD_INTERVAL: Final = 1.0
"""Seconds between two records of one cause's repeats, at least."""
SHARE_OF_AGE: Final = 1 / 60
"""Of the time for which a cause has gone on: as long it is between two records of its repeats, when that is more."""
FULL_RECORDS: Final = 5
FULL_INTERVAL: Final = 3600.0
"""Faults of one cause that are recorded in full, and the seconds after which as many are again."""
ENDS: Final = 5
"""Sessions in that time at whose end what was suppressed of the cause is accounted for at once."""
CAUSES: Final = 256
"""Causes that are known at once."""
FORGOTTEN_AFTER: Final = 600.0
"""Seconds after which a cause that hasn't come again makes room for another, when there are so many."""

FAULTS_PER_SESSION: Final = 64
"""Faults of one session that repeats are told by. A job runner whose connection every child uses makes a new one
with each child: beyond this many, the one that has been quiet for longest is forgotten, and is news if it comes
back."""
FAULTS: Final = 4096
"""The same for all sessions together."""

SET_BACK: Final = 10.0
"""Seconds by which a fault may be older than one that was taken note of before, unless the clock has been set back."""
RENEWAL: Final = 60.0
"""Seconds after which a refusal that comes again is looked into once more."""
_SERVER: Final = 0
"""Stands for the session of what is no single session's; those count from 1."""
_COMMAND: Final = 512
"""Characters of a command line by which a program is known."""
_NUMBER: Final = re.compile(r"\d+")


class Count(NamedTuple):
    """How often something happened: recorded or not, every time counts."""

    kind: Kind
    severity: Severity
    action: Action
    faults: int
    """First times, in one session by the same processes."""
    repeats: int


class Instance(NamedTuple):
    """What a repeat says of itself, where it isn't what it repeats."""

    session: SessionFacts
    message: MessageSeen | None
    summary: str
    culprits: tuple[Culprit, ...]


class Entered(NamedTuple):
    """A fault that has been taken note of."""

    fault: Fault
    """With the number of the record that tells of it: its own, or the first one's of its cause."""
    records: tuple[Fault, ...]
    """What is to be recorded now, in order; nothing if too much of the cause has been recorded already."""


class _Key(NamedTuple):
    kind: Kind
    pids: frozenset[int]
    settled: bool
    refusal: Refusal | None
    graver: bool
    """An answer was not only left unread, but something sent on top of it."""


class _CauseKey(NamedTuple):
    kind: Kind
    severity: Severity
    refusal: Refusal | None = None
    programs: frozenset[tuple[Role, str]] | None = None
    """``None``: those that come on top."""
    advice: str = ""


@dataclass(slots=True, eq=False)
class _Case:
    """One fault of one session."""

    standing: Fault
    """As it was the first time, without what no repeat needs."""
    cause: _CauseKey


class _Unrecorded(NamedTuple):
    """A repeat that was suppressed."""

    of: Fault
    instance: Callable[[], Instance | None] | None
    at: float


@dataclass(slots=True, eq=False)
class _Cause:
    number: int
    began: float
    """When it began to be recorded in full, lately."""
    first: int = 0
    """The number of its first record since then."""
    full: int = 0
    ends: int = 0
    recorded_at: float = 0.0
    seen_at: float = 0.0
    suppressed: int = 0
    last: _Unrecorded | None = None
    """The last one of those."""

    def see(self, at: float) -> None:
        """It has come again; if it has gone on for long enough, it is told in full once more."""
        self.seen_at = at
        if _passed(self.began, at) >= FULL_INTERVAL:
            self.renew(at)

    def renew(self, at: float) -> None:
        """Begin anew to record it in full."""
        self.began = at
        self.full = self.ends = 0

    def is_due(self, at: float, interval: float) -> bool:
        """Whether a repeat may be recorded."""
        pause = max(interval, (self.recorded_at - self.began) * SHARE_OF_AGE)
        return _passed(self.recorded_at, at) >= pause

    def suppress(self, of: Fault, instance: Callable[[], Instance | None] | None, at: float) -> None:
        """Count one that isn't recorded."""
        self.suppressed += 1
        self.last = _Unrecorded(of, instance, at)

    def note_record(self, at: float) -> int:
        """Take note that one is being recorded; returns how many were suppressed since the last one."""
        suppressed, self.suppressed, self.last = self.suppressed, 0, None
        self.recorded_at = at if _passed(self.recorded_at, at) > 0 else self.recorded_at
        return suppressed


class Docket:
    """Numbers the records, knows what has been recorded, and counts.

    Memory is bounded by :data:`FAULTS` and :data:`CAUSES`; :meth:`close` forgets a session.

    Args:
        interval: Seconds between two records of one cause's repeats, at least.
    """

    def __init__(self, *, interval: float = RECORD_INTERVAL) -> None:
        self._interval = interval
        self._last_id = 0
        self._last_cause = 0
        self._sessions: dict[int, OrderedDict[_Key, _Case]] = {}
        self._cases: OrderedDict[tuple[int, _Key], None] = OrderedDict()
        """All sessions' together, the one first that has been quiet for longest."""
        self._causes: OrderedDict[_CauseKey, _Cause] = OrderedDict()
        """The one first that has been quiet for longest."""
        self._counts: dict[tuple[Kind, Severity, Action], tuple[int, int]] = {}

    def known(self, session_id: int, verdict: Verdict, *, at: float) -> Fault | None:
        """The fault as it was the first time, if it has been; what was done then is to be done now.

        Args:
            session_id: The session.
            verdict: The fault.
            at: Seconds since the epoch.
        """
        cases = self._sessions.get(_place(session_id, verdict))
        case = None if cases is None else cases.get(_key(verdict))
        if case is None or (verdict.refusal is not None and _passed(case.standing.at, at) >= RENEWAL):
            return None
        return case.standing

    def enter(self, verdict: Verdict, fault: Fault) -> Entered:
        """Take note of a fault that is not :meth:`known`: give it its number and its cause's, and say what to record.

        Args:
            verdict: What the session core says.
            fault: All that there is to be said of it, but for those numbers.
        """
        key = _cause_key(verdict, fault)
        key, cause, forgotten = self._cause(key, fault.at)
        self._count(fault, faults=1)
        records = list(forgotten)
        if cause.full < FULL_RECORDS:
            suppressed = cause.note_record(fault.at)
            fault = replace(fault, id=self._next_id(), cause=cause.number, suppressed=suppressed)
            cause.first = cause.first if cause.full else fault.id
            cause.full += 1
            records.append(fault)
            standing = _brief(fault)
        else:
            fault = replace(fault, id=cause.first, cause=cause.number)
            standing = _brief(replace(fault, repeat_of=cause.first))
            if cause.is_due(fault.at, self._interval):
                record = self._record(cause, _Unrecorded(standing, None, fault.at), fault.at)
                fault = replace(fault, id=record.id)
                records.append(record)
            else:
                cause.suppress(standing, None, fault.at)
        self._keep(_place(fault.session.id, verdict), _key(verdict), _Case(replace(standing, shares=None), key))
        return Entered(fault, tuple(records))

    def equate(self, session_id: int, verdict: Verdict, concluded: Verdict) -> None:
        """Know a fault by ``verdict`` too, which evidence has shown to be one that is :meth:`known`.

        Args:
            session_id: The session.
            verdict: What the session core said.
            concluded: What the evidence made of it, and the fault is known by.

        Raises:
            KeyError: The fault is not known.
        """
        place = _place(session_id, verdict)
        self._keep(place, _key(verdict), self._sessions[place][_key(concluded)])

    def repeat(
        self, session_id: int, verdict: Verdict, *, at: float, instance: Callable[[], Instance | None] | None = None
    ) -> Fault | None:
        """Count a fault that is :meth:`known` once more.

        Args:
            session_id: The session.
            verdict: The fault.
            at: Seconds since the epoch.
            instance: Says what its record is to say of itself, and is asked only if it is recorded, now or later on.
                Without it, or if it says nothing, all is as the first time.

        Returns:
            The record to be made of it, or ``None`` if the last one of its cause is too recent.

        Raises:
            KeyError: The fault is not known.
        """
        key, place = _key(verdict), _place(session_id, verdict)
        cases = self._sessions[place]
        case = cases[key]
        cases.move_to_end(key)
        self._cases.move_to_end((place, key))
        self._count(case.standing, repeats=1)
        cause = self._causes.get(case.cause) or self._recall(case, at)
        self._causes.move_to_end(case.cause)
        cause.see(at)
        if cause.is_due(at, self._interval):
            return self._record(cause, _Unrecorded(case.standing, instance, at), at)
        cause.suppress(case.standing, instance, at)
        return None

    def close(self, session_id: int, *, at: float) -> list[Fault]:
        """Forget a session that has ended; returns records that account for what was suppressed.

        Of a few sessions that is done at once, and of others when it is time for a record of their cause: see
        :meth:`settle`.
        """
        cases = self._sessions.pop(session_id, None)
        if cases is None:
            return []
        records = []
        for key, case in cases.items():
            self._cases.pop((session_id, key), None)
            cause = self._causes.get(case.cause)
            if cause is not None and cause.suppressed and (cause.ends < ENDS or cause.is_due(at, self._interval)):
                cause.ends += 1
                records += self._settle(cause, at)
        return records

    def forget(self, session_id: int, pid: int) -> None:
        """Take the faults of a session for news that are by this process: its pid has become another's."""
        cases = self._sessions.get(session_id, OrderedDict())
        for key in [key for key in cases if pid in key.pids]:
            del cases[key]
            del self._cases[session_id, key]
        if not cases:
            self._sessions.pop(session_id, None)

    def settle(self, *, at: float) -> list[Fault]:
        """Account for what was suppressed of causes of which a record is due; to be called now and then."""
        due = [cause for cause in self._causes.values() if cause.suppressed and cause.is_due(at, self._interval)]
        return [record for cause in due for record in self._settle(cause, at)]

    def close_all(self, *, at: float) -> list[Fault]:
        """Account for everything that was suppressed, and forget every session, as the guard ends."""
        self._sessions.clear()
        self._cases.clear()
        return [record for cause in self._causes.values() for record in self._settle(cause, at)]

    def renew(self, *, at: float) -> None:
        """Take each fault for news, and record it in full, as what is done about faults has changed."""
        self._sessions.clear()
        self._cases.clear()
        for cause in self._causes.values():
            cause.renew(at)

    def counts(self) -> list[Count]:
        """What has happened since the guard started, the gravest first."""
        counts = [Count(*key, *value) for key, value in self._counts.items()]
        return sorted(counts, key=lambda count: -count.severity.rank)

    def _next_id(self) -> int:
        self._last_id += 1
        return self._last_id

    # Faults of sessions

    def _keep(self, place: int, key: _Key, case: _Case) -> None:
        cases = self._sessions.setdefault(place, OrderedDict())
        cases[key] = case
        cases.move_to_end(key)
        self._cases[place, key] = None
        self._cases.move_to_end((place, key))
        if len(cases) > FAULTS_PER_SESSION:
            del self._cases[place, cases.popitem(last=False)[0]]
        if len(self._cases) > FAULTS:
            (place, key), _ = self._cases.popitem(last=False)
            del self._sessions[place][key]
            if not self._sessions[place]:
                del self._sessions[place]

    # Causes

    def _cause(self, key: _CauseKey, at: float) -> tuple[_CauseKey, _Cause, Iterable[Fault]]:
        """A cause that has come, known or new; and what is to be recorded of one that made room for it."""
        forgotten: list[Fault] = []
        if key not in self._causes and len(self._causes) >= CAUSES:
            quietest = next(iter(self._causes))
            if _passed(self._causes[quietest].seen_at, at) < FORGOTTEN_AFTER:
                key = _CauseKey(key.kind, key.severity)
            else:
                forgotten = self._settle(self._causes.pop(quietest), at)
        cause = self._causes.pop(key, None) or self._new_cause(at)
        self._causes[key] = cause
        cause.see(at)
        return key, cause, forgotten

    def _recall(self, case: _Case, at: float) -> _Cause:
        """A cause that has made room for others, and of which a session still has a fault."""
        if len(self._causes) >= CAUSES:
            case.cause = _CauseKey(case.standing.kind, case.standing.severity)
        cause = self._causes.setdefault(case.cause, self._new_cause(at))
        cause.first = cause.first or case.standing.repeat_of or case.standing.id
        return cause

    def _new_cause(self, at: float) -> _Cause:
        self._last_cause += 1
        return _Cause(self._last_cause, at)

    def _settle(self, cause: _Cause, at: float) -> list[Fault]:
        """Account for what was suppressed: the last of it becomes a record and stands for itself."""
        if cause.last is None:
            return []
        cause.suppressed -= 1
        return [self._record(cause, cause.last, at)]

    def _record(self, cause: _Cause, what: _Unrecorded, at: float) -> Fault:
        """The record of a repeat, made at a time that may be later than the repeat's."""
        fault = replace(
            what.of,
            id=self._next_id(),
            at=what.at,
            cause=cause.number,
            repeat_of=what.of.repeat_of or what.of.id,
            suppressed=cause.note_record(at),
        )
        instance = None if what.instance is None else what.instance()
        return fault if instance is None else replace(fault, unnamed=0, **instance._asdict())

    def _count(self, fault: Fault, *, faults: int = 0, repeats: int = 0) -> None:
        key = (fault.kind, fault.severity, fault.action)
        before = self._counts.get(key, (0, 0))
        self._counts[key] = (before[0] + faults, before[1] + repeats)


def _passed(since: float, at: float) -> float:
    """Seconds from one time to another, which may be a little earlier, as faults that are looked into take their time.

    If it is far earlier the clock has been set back, and it isn't known how long that was.
    """
    return math.inf if at < since - SET_BACK else at - since


def _brief(fault: Fault) -> Fault:
    """A fault without what no repeat of it says."""
    culprits = tuple(replace(culprit, stack=None, stack_problem=None) for culprit in fault.culprits)
    return replace(fault, culprits=culprits, requests=(), story=())


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


def _cause_key(verdict: Verdict, fault: Fault) -> _CauseKey:
    roles = {(culprit.role, _program(culprit)) for culprit in fault.culprits}
    # Which of many workers only has the connection open, and which of them uses it, makes no difference.
    users = {program for role, program in roles if role is not Role.HOLDER}
    programs = frozenset(one for one in roles if one[0] is not Role.HOLDER or one[1] not in users)
    return _CauseKey(fault.kind, fault.severity, verdict.refusal, programs, fault.advice.title)


def _program(culprit: Culprit) -> str:
    """What a process runs, without the numbers by which its siblings differ; empty if it isn't known."""
    if culprit.process is not None:
        text = " ".join(culprit.process.cmdline)[:_COMMAND] or culprit.process.name
    else:
        text = " ".join((culprit.declared or {}).values())[:_COMMAND]
    return _NUMBER.sub("#", text)
