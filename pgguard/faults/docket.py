"""A fault is recorded in full at first, after that briefly and not too often, and counted always.

*Repeats.* A fault that its application commits at all, it commits thousands of times. What makes two faults of one
session the same is their kind and the processes that the kernel named, in whichever roles: two workers fighting over a
connection are one fault, whoever interrupts whom. All of that is known before any evidence is taken, so nothing has to
be held to learn that there is nothing new. A repeat says that the fault it repeats has come again; message, summary and
culprits are that one's, unless it has its own.

A refused login is a session of its own, and there are as many as its client tries: its fault is the server's, known by
the limit for which it was refused, on whichever session; after a while it is looked into anew, as others may hold the
connections by then.

*Causes.* On other sessions the same is a repeat too: :mod:`pgguard.faults.causes`. Where the kernel has named those who
did it, and what they run is known, it is known before any evidence is taken that a fault is of a cause that has been
recorded: such a fault is :meth:`familiar <Docket.familiar>`.

*Explained.* What another fault of the same session explains isn't told: :data:`EXPLAINED_BY`.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NamedTuple

from pgguard.faults.causes import (
    FULL_RECORDS,
    RECORD_INTERVAL,
    Cause,
    Causes,
    Unrecorded,
    brief,
    cause_key,
    involved,
    passed,
)
from pgguard.faults.policy import Action
from pgguard.session.verdicts import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pgguard.faults.catalogue import Severity
    from pgguard.faults.causes import Instance, Told
    from pgguard.faults.fault import Fault
    from pgguard.session.verdicts import Refusal, Verdict

FAULTS_PER_SESSION: Final = 64
"""Faults of one session that repeats are told by. A job runner whose connection every child uses makes a new one
with each child: beyond this many, the one that has been quiet for longest is forgotten, and is news if it comes
back."""
FAULTS: Final = 4096
"""The same for all sessions together."""
FAMILIES: Final = 1024
"""Sets of programs that are known to commit a fault of a certain cause."""

RENEWAL: Final = 60.0
"""Seconds after which a refusal that comes again is looked into once more."""
_SERVER: Final = 0
"""Stands for the session of what is no single session's; those count from 1."""

EXPLAINED_BY: Final[Mapping[Kind, frozenset[Kind]]] = MappingProxyType(
    {
        Kind.INHERITED_CONNECTION: frozenset({Kind.SHARED_BY_PROCESSES, Kind.FOREIGN_TERMINATE, Kind.TLS_CORRUPTION}),
        Kind.UNREAD_ANSWER: frozenset({Kind.SHARED_BY_PROCESSES, Kind.SHARED_BY_THREADS}),
        Kind.UNCLEAN_CLOSE: frozenset({Kind.SHARED_BY_PROCESSES, Kind.FOREIGN_TERMINATE, Kind.TLS_CORRUPTION}),
        Kind.REQUEST_WHILE_BUSY: frozenset({Kind.SHARED_BY_PROCESSES, Kind.SHARED_BY_THREADS}),
    }
)
"""By kind, of which other faults of its session it is a consequence that goes without saying: who shares a connection
has inherited it, leaves answers unread that another one has asked for, rightly says no goodbye on it, and asks again
when another one has read the answer. But work that is lost when it ends is told."""
TICK: Final = 0.02
"""Seconds by which a process's start, which the kernel counts in ticks, can seem to be too early."""
UNDECIDED: Final = frozenset({Kind.REQUEST_WHILE_BUSY})
"""Of those, the kinds of which evidence may make another one, and so has to be taken first."""


class Count(NamedTuple):
    """How often something happened: recorded or not, every time counts."""

    kind: Kind
    severity: Severity
    action: Action
    faults: int
    """First times, in one session by the same processes."""
    repeats: int


class Entered(NamedTuple):
    """A fault that has been taken note of."""

    fault: Fault
    """With the number of the record that tells of it: its own, or the first one's of its cause."""
    records: tuple[Fault, ...]
    """What is to be recorded now, in order; nothing if too much of the cause has been recorded already."""


class Occurrence(NamedTuple):
    """One time that a fault has come, whether it is recorded or not; times are seconds since the epoch."""

    fault: Fault
    """What is known of it. The record that tells of it is its own, or the one that it repeats."""
    since: float
    """When was done what it is about, at the earliest."""
    until: float
    """The same, at the latest."""


class Family(NamedTuple):
    """What is known of a fault before any evidence is taken, if that is enough to know its cause."""

    kind: Kind
    severity: Severity
    settled: bool
    graver: bool
    programs: tuple[str, ...]
    """What those run who did it and who opened the connection."""
    process: tuple[int, int] | None = None
    """Of what nobody has sent: which process opened the connection, by its pid and its start."""


class _Key(NamedTuple):
    kind: Kind
    pids: frozenset[int]
    settled: bool
    refusal: Refusal | None
    graver: bool
    """An answer was not only left unread, but something sent on top of it."""


@dataclass(slots=True, eq=False)
class _Case:
    """One fault of one session."""

    standing: Fault
    """As it was the first time, without what no repeat needs."""
    cause: Cause
    is_own: bool
    """It is this session's: else each record of it has to say of which session and by whom it is."""
    is_over: bool = False
    """It is news if it comes again: what is done about faults has changed, or a process that did it is gone, and who
    has its pid by now does something else."""


class Docket:
    """Numbers the records, knows what has been recorded, and counts.

    Memory is bounded by :data:`FAULTS` and :data:`~pgguard.faults.causes.CAUSES`; :meth:`close` forgets a session.

    Args:
        interval: Seconds between two records of one cause's repeats, at least.
    """

    def __init__(self, *, interval: float = RECORD_INTERVAL) -> None:
        self._sessions: dict[int, OrderedDict[_Key, _Case]] = {}
        self._cases: OrderedDict[tuple[int, _Key], None] = OrderedDict()
        """All sessions' together, the one first that has been quiet for longest."""
        self._causes = Causes(interval)
        self._families: OrderedDict[Family, Cause] = OrderedDict()
        """The one first that has come least lately."""
        self._counts: dict[tuple[Kind, Severity, Action], tuple[int, int]] = {}
        self._explained: dict[int, set[_Key]] = {}
        """By session, the faults of which evidence has shown that another one explains them."""
        self._heard: Callable[[Occurrence], None] | None = None

    def tell(self, heard: Callable[[Occurrence], None]) -> None:
        """Have somebody told of each time that a fault comes from now on, before it is recorded."""
        self._heard = heard

    def known(self, session_id: int, verdict: Verdict, *, at: float) -> Fault | None:
        """The fault as it was the first time, if it has been; what was done then is to be done now.

        Args:
            session_id: The session.
            verdict: The fault.
            at: Seconds since the epoch.
        """
        cases = self._sessions.get(_place(session_id, verdict))
        case = None if cases is None else cases.get(_key(verdict))
        if case is None or case.is_over or (verdict.refusal is not None and passed(case.standing.at, at) >= RENEWAL):
            return None
        return case.standing

    def is_explained(self, session_id: int, verdict: Verdict) -> bool:
        """Whether another fault of its session explains this one, so that there is no need to tell of it.

        Args:
            session_id: The session.
            verdict: The fault, in the light of the evidence.
        """
        explanations = EXPLAINED_BY.get(verdict.kind)
        undone = verdict.open_request or verdict.open_transaction or verdict.message is not None
        if explanations is None or (verdict.kind is Kind.UNCLEAN_CLOSE and undone):
            return False
        return any(case.standing.kind in explanations for case in self._sessions.get(session_id, {}).values())

    def is_surely_explained(self, session_id: int, verdict: Verdict) -> bool:
        """The same of a fault of which no evidence has been taken, if that needn't be."""
        undecided = verdict.kind in UNDECIDED and _key(verdict) not in self._explained.get(session_id, ())
        return not undecided and self.is_explained(session_id, verdict)

    def explain(self, session_id: int, verdict: Verdict) -> None:
        """Know by what the session core has said that a fault is explained, as evidence has shown."""
        if verdict.kind in UNDECIDED and session_id in self._sessions:
            explained = self._explained.setdefault(session_id, set())
            if len(explained) < FAULTS_PER_SESSION:
                explained.add(_key(verdict))

    def enter(self, verdict: Verdict, fault: Fault, *families: Family) -> Entered:
        """Take note of a fault that is not :meth:`known`: give it its number and its cause's, and say what to record.

        Args:
            verdict: What the session core says.
            fault: All that there is to be said of it, but for those numbers.
            families: What is, or was, known of it without evidence, so that its like is :meth:`familiar`.
        """
        key = cause_key(verdict, fault)
        cause, forgotten = self._causes.come(key, involved(fault.culprits), fault.at)
        self._count(fault, faults=1)
        self._note_session(cause, _place(fault.session.id, verdict))
        cause.times += 1
        cause.note_culprits(fault.culprits)
        records = list(forgotten)
        if cause.full < FULL_RECORDS:
            fault = self._causes.record_in_full(cause, key, fault)
            records.append(fault)
            standing = brief(fault)
        else:
            fault = replace(fault, id=_first(cause), cause=cause.number)
            self._causes.tell_by(cause, key, fault)
            standing = brief(replace(fault, repeat_of=fault.id))
            record = self._causes.record(cause, Unrecorded(standing, fault.at))
            if record is not None:
                fault = replace(fault, id=record.id)
                records.append(record)
        is_own = verdict.refusal is None
        self._keep(
            _place(fault.session.id, verdict), _key(verdict), _Case(replace(standing, shares=None), cause, is_own)
        )
        for family in families:
            self._families[family] = cause
            self._families.move_to_end(family)
            if len(self._families) > FAMILIES:
                self._families.popitem(last=False)
        self._tell(fault, verdict, fault.at)
        return Entered(fault, tuple(records))

    def complete(self, fault: Fault) -> None:
        """Know the first fault of a cause by where in the application it was, if that has come to light since."""
        for cause in self._causes:
            if cause.number == fault.cause and cause.standing is not None and cause.standing.id == fault.id:
                cause.standing = replace(cause.standing, place=fault.place)

    def is_new(self, verdict: Verdict, fault: Fault) -> bool:
        """Whether a fault is going to be recorded in full if it is entered. Any thread may ask."""
        cause = self._causes.foresee(cause_key(verdict, fault), involved(fault.culprits))
        return cause is None or cause.full < FULL_RECORDS

    def causes_of(self, session_id: int) -> tuple[int, ...]:
        """The numbers of the causes that a session has had faults of, as far as it is remembered."""
        cases = self._sessions.get(session_id)
        return () if cases is None else tuple(dict.fromkeys(case.cause.number for case in cases.values()))

    def has_any(self, kind: Kind) -> bool:
        """Whether a cause of this kind is known."""
        return any(cause.standing is not None and cause.standing.kind is kind for cause in self._causes)

    def familiar(self, family: Family) -> Fault | None:
        """The first fault of the cause that this one is of too, if that can be told without evidence."""
        cause = self._families.get(family)
        if cause is None or not self._causes.is_known(cause) or cause.full < FULL_RECORDS:
            return None
        return cause.standing

    def enter_familiar(
        self, session_id: int, verdict: Verdict, family: Family, *, at: float, instance: Callable[[], Instance]
    ) -> Fault | None:
        """Take note of a fault that is not :meth:`known` in its session, but :meth:`familiar`, and is only logged.

        Args:
            session_id: The session.
            verdict: The fault.
            family: What it is familiar by.
            at: Seconds since the epoch.
            instance: Tells what its record is to say of itself, and is called when there is one.

        Returns:
            The record to be made of it, or ``None`` if the last one of its cause is too recent.

        Raises:
            KeyError: It isn't familiar.
        """
        first = self.familiar(family)
        if first is None:
            raise KeyError(family)
        self._families.move_to_end(family)
        cause = self._causes.come_again(self._families[family], first, at)
        standing = replace(first, shares=None, action=Action.LOGGED)
        self._count(standing, faults=1)
        self._note_session(cause, session_id)
        cause.note_pids(_key(verdict).pids)
        cause.times += 1
        self._keep(session_id, _key(verdict), _Case(standing, cause, is_own=False))
        self._tell(standing, verdict, at)
        return self._causes.record(cause, Unrecorded(standing, at, instance))

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
        self,
        session_id: int,
        verdict: Verdict,
        *,
        at: float,
        instance: Callable[[], Instance] | None = None,
        by_others: bool = False,
    ) -> Fault | None:
        """Count a fault that is :meth:`known` once more.

        Args:
            session_id: The session.
            verdict: The fault.
            at: Seconds since the epoch.
            instance: Tells what its record is to say of itself, if the first time wasn't on this session or it may be
                by others. It is called when there is a record, now or later on.
            by_others: Who does it this time may not be who did it the first time.

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
        case.cause = cause = self._causes.come_again(case.cause, case.standing, at)
        cause.times += 1
        cause.sessions += place == _SERVER
        self._tell(case.standing, verdict, at)
        described = by_others or not case.is_own
        return self._causes.record(cause, Unrecorded(case.standing, at, instance if described else None))

    def close(self, session_id: int, *, at: float) -> list[Fault]:
        """Forget a session that has ended; returns records that account for what was suppressed.

        Of a few sessions that is done at once, and of others when it is time for a record of their cause: see
        :meth:`settle`.
        """
        self._explained.pop(session_id, None)
        cases = self._sessions.pop(session_id, None)
        if cases is None:
            return []
        records = []
        for key, case in cases.items():
            self._cases.pop((session_id, key), None)
            if self._causes.is_known(case.cause):
                records += self._causes.account_at_end(case.cause, at)
        return records

    def forget(self, session_id: int, pid: int) -> None:
        """Take the faults of a session for news that are by this process: its pid has become another's."""
        cases = self._sessions.get(session_id, OrderedDict())
        for key in [key for key in cases if pid in key.pids]:
            cases[key] = replace(cases[key], is_over=True)
        explained = self._explained.get(session_id, set())
        explained -= {key for key in explained if pid in key.pids}

    def settle(self, *, at: float) -> list[Fault]:
        """Account for what was suppressed of causes of which a record is due; to be called now and then."""
        return self._causes.account_for_due(at)

    def close_all(self, *, at: float) -> list[Fault]:
        """Account for everything that was suppressed, and forget every session, as the guard ends."""
        self._sessions.clear()
        self._cases.clear()
        self._explained.clear()
        return [record for cause in self._causes for record in self._causes.account(cause, at)]

    def renew(self) -> None:
        """Look into each session's faults anew, as what is done about them has changed."""
        # They are kept, as a session counts once toward its cause.
        for cases in self._sessions.values():
            for key, case in cases.items():
                cases[key] = replace(case, is_over=True)
        self._families.clear()
        self._explained.clear()

    def begin_anew(self, *, at: float) -> list[Fault]:
        """Take every fault for news from now on, and its cause too; returns records that account for what there was.

        Numbers go on, and so do the counts.
        """
        records = [record for cause in self._causes for record in self._causes.account(cause, at)]
        self._causes.forget()
        self.renew()
        return records

    def counts(self) -> list[Count]:
        """What has happened since the guard started, the gravest first."""
        counts = [Count(*key, *value) for key, value in self._counts.items()]
        return sorted(counts, key=lambda count: -count.severity.rank)

    def causes(self) -> list[Told]:
        """The causes that are remembered, the gravest first."""
        return self._causes.told()

    def _note_session(self, cause: Cause, place: int) -> None:
        """Count a session that hasn't had a fault of the cause before."""
        if place == _SERVER or all(case.cause is not cause for case in self._sessions.get(place, {}).values()):
            cause.sessions += 1

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

    def _tell(self, fault: Fault, verdict: Verdict, at: float) -> None:
        if self._heard is not None:
            since = at if verdict.since is None else min(verdict.since, at)
            # Of what a process has inherited it is known by its start when that was.
            inexact = verdict.since is not None and verdict.kind is Kind.INHERITED_CONNECTION
            self._heard(Occurrence(fault, since, min(since + TICK, at) if inexact else since))

    def _count(self, fault: Fault, *, faults: int = 0, repeats: int = 0) -> None:
        key = (fault.kind, fault.severity, fault.action)
        before = self._counts.get(key, (0, 0))
        self._counts[key] = (before[0] + faults, before[1] + repeats)


def _first(cause: Cause) -> int:
    """The number of the record that tells of a cause in full."""
    standing = cause.standing
    return 0 if standing is None else standing.repeat_of or standing.id


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
