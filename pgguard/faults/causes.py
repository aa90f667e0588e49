"""Causes: what is the same for a person, on however many sessions and by however many processes it comes.

A cause is a kind of fault, the programs in their roles (command lines without what is different in each process) and
the advice. Its first fault is recorded in full. All later ones are repeats, of which one is recorded now and then: at
most one a second while the cause is new, and the less often the longer it has gone on. What isn't recorded is counted,
and the next record of its cause says how much that was. So what is recorded depends on how many causes there are, and
neither on how many sessions nor on how often it happens.

Of more than :data:`CAUSES` at once, those that come on top are one cause for each kind and severity.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, NamedTuple

from pgguard.faults.fault import Fault, Role, Spread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pgguard.faults.catalogue import Severity
    from pgguard.faults.fault import Culprit, SessionFacts
    from pgguard.faults.policy import Action
    from pgguard.session.verdicts import Kind, MessageSeen, Refusal, Verdict

RECORD_INTERVAL: Final = 1.0
"""Seconds between two records of one cause's repeats, at least."""
SHARE_OF_AGE: Final = 1 / 60
"""Of the time for which a cause has gone on: as long it is between two records of its repeats, when that is more."""
FULL_RECORDS: Final = 1
"""Faults of one cause that are recorded in full."""
ENDS: Final = 5
"""Sessions at whose end what was suppressed of a cause is accounted for at once."""
CAUSES: Final = 256
"""Causes that are known at once."""
FORGOTTEN_AFTER: Final = 600.0
"""Seconds after which a cause that hasn't come again makes room for another, when there are so many."""
PROCESSES: Final = 1024
"""Processes of a cause that are told apart: from then on no more are counted."""

_SET_BACK: Final = 10.0
"""Seconds by which a fault may be older than one that was taken note of before, unless the clock has been set back."""
_LONGEST_GAP: Final = 3600.0
"""Seconds between two records of a cause from which on it hasn't gone on, or the clock has been set forward."""
_COMMAND: Final = 512
"""Characters of a command line by which a program is known."""
_OWN: Final = re.compile(
    r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b"  # a job's UUID
    r"|\b(?=[a-f]*\d)[0-9a-f]{6,}\b"  # the beginning of a digest, an address
    r"|\d+",
    re.IGNORECASE,
)
"""What differs between processes that run the same."""
_INVOLVED: Final = frozenset({Role.INTRUDER, Role.REQUESTER, Role.CLOSER})
"""Roles of those who do what is wrong, or suffer it."""


class Instance(NamedTuple):
    """What a repeat says of itself, where it isn't what it repeats."""

    session: SessionFacts
    message: MessageSeen | None
    summary: str
    culprits: tuple[Culprit, ...]


class CauseKey(NamedTuple):
    """What a cause is known by."""

    kind: Kind
    severity: Severity
    refusal: Refusal | None = None
    programs: frozenset[tuple[Role, str]] | None = None
    """``None``: those that come on top."""
    advice: str = ""


class Told(NamedTuple):
    """A cause, as it is told at the end."""

    fault: Fault
    """Its first one, without what no repeat says."""
    spread: Spread


class Unrecorded(NamedTuple):
    """A repeat that has not been recorded, or not yet."""

    of: Fault
    """What it repeats."""
    at: float
    instance: Callable[[], Instance] | None = None
    """Tells what it says of itself: made only when it is recorded."""


@dataclass(slots=True, eq=False)
class Cause:
    """One cause; times are seconds since the epoch."""

    number: int
    began: float
    """When it came first."""
    standing: Fault | None = None
    """Its first fault, as it is recorded, without what no repeat says."""
    full: int = 0
    """How many have been recorded in full."""
    ends: int = 0
    """Sessions at whose end it was accounted for at once."""
    times: int = 0
    sessions: int = 0
    pids: set[int] = field(default_factory=set)
    actions: set[Action] = field(default_factory=set)
    """What has been done about those that have been recorded."""
    recorded_at: float = -math.inf
    age: float = 0.0
    """Seconds for which it has gone on, as far as they are known to have passed: clocks are set, by years at times."""
    seen_at: float = 0.0
    suppressed: int = 0
    last: Unrecorded | None = None
    """The last one of those."""

    @property
    def spread(self) -> Spread:
        """How far it has spread by now."""
        return Spread(self.times, self.sessions, len(self.pids), self.began)

    def note_pids(self, culprits: tuple[Culprit, ...]) -> None:
        """Take note of the processes that a fault names."""
        for culprit in culprits:
            if culprit.pid is not None and culprit.role in _INVOLVED and len(self.pids) < PROCESSES:
                self.pids.add(culprit.pid)

    def is_due(self, at: float, interval: float) -> bool:
        """Whether a repeat may be recorded."""
        pause = max(interval, self.age * SHARE_OF_AGE)
        return passed(self.recorded_at, at) >= pause

    def suppress(self, what: Unrecorded) -> None:
        """Count one that isn't recorded."""
        self.suppressed += 1
        self.last = what

    def note_record(self, at: float) -> int:
        """Take note that one is being recorded; returns how many were suppressed since the last one."""
        suppressed, self.suppressed, self.last = self.suppressed, 0, None
        gap = passed(self.recorded_at, at)
        if gap > 0:
            self.age += gap if gap <= _LONGEST_GAP else 0.0
            self.recorded_at = at
        return suppressed


class Causes:
    """All causes of one run of the guard, of which those are remembered that have come lately.

    Args:
        interval: Seconds between two records of one cause's repeats, at least.
    """

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._last_id = 0
        self._last_number = 0
        self._causes: OrderedDict[CauseKey, Cause] = OrderedDict()
        """The one first that has been quiet for longest."""

    def __len__(self) -> int:
        return len(self._causes)

    def __iter__(self) -> Iterator[Cause]:
        return iter(self._causes.values())

    def find(self, key: CauseKey) -> Cause | None:
        """A cause, if it is remembered."""
        return self._causes.get(key)

    def come(self, key: CauseKey, at: float) -> tuple[CauseKey, Cause, list[Fault]]:
        """A cause has come, known or new.

        Returns:
            What it is known by: if there are too many, another key than was asked for; the cause; and what is to be
            recorded of one that has made room for it.
        """
        forgotten: list[Fault] = []
        if key not in self._causes and len(self._causes) >= CAUSES:
            quietest = next(iter(self._causes))
            if passed(self._causes[quietest].seen_at, at) < FORGOTTEN_AFTER:
                key = CauseKey(key.kind, key.severity)
            else:
                forgotten = self.account(self._causes.pop(quietest), at)
        cause = self._causes.get(key)
        if cause is None:
            cause = self._causes[key] = self._new(at)
        self._causes.move_to_end(key)
        cause.seen_at = at
        return key, cause, forgotten

    def come_again(self, key: CauseKey, standing: Fault, at: float) -> tuple[CauseKey, Cause]:
        """The cause of a fault that a session has committed before has come again; it may have been forgotten since.

        Returns:
            What it is known by now, and the cause.
        """
        cause = self._causes.get(key)
        if cause is None:
            if len(self._causes) >= CAUSES:
                key = CauseKey(standing.kind, standing.severity)
            cause = self._causes.get(key)
            if cause is None:
                cause = self._causes[key] = self._new(at)
                # What it repeats has been recorded.
                cause.full, cause.standing, cause.sessions = FULL_RECORDS, standing, 1
        self._causes.move_to_end(key)
        cause.seen_at = at
        return key, cause

    def record_in_full(self, cause: Cause, fault: Fault) -> Fault:
        """The record of a fault that is the first of its cause."""
        suppressed = cause.note_record(fault.at)
        fault = replace(fault, id=self._next_id(), cause=cause.number, suppressed=suppressed)
        cause.actions.add(fault.action)
        cause.standing = cause.standing or brief(fault)
        cause.full += 1
        return fault

    def record(self, cause: Cause, what: Unrecorded) -> Fault | None:
        """The record of a repeat, if one may be made of its cause now; otherwise it is counted.

        It may when something has been done about it that no record of its cause tells of yet.
        """
        if what.of.action not in cause.actions or cause.is_due(what.at, self._interval):
            return self._record(cause, what, what.at)
        cause.suppress(what)
        return None

    def account(self, cause: Cause, at: float) -> list[Fault]:
        """Account for what was suppressed: the last of it becomes a record and stands for itself."""
        if cause.last is None:
            return []
        cause.suppressed -= 1
        return [self._record(cause, cause.last, at)]

    def account_at_end(self, cause: Cause, at: float) -> list[Fault]:
        """Account for what was suppressed as a session ends, of which that is done of a few at once."""
        if not cause.suppressed or (cause.ends >= ENDS and not cause.is_due(at, self._interval)):
            return []
        cause.ends += 1
        return self.account(cause, at)

    def account_for_due(self, at: float) -> list[Fault]:
        """Account for what was suppressed of causes of which a record is due."""
        due = [cause for cause in self if cause.suppressed and cause.is_due(at, self._interval)]
        return [record for cause in due for record in self.account(cause, at)]

    def told(self) -> list[Told]:
        """What they have come to, the gravest first, and of those that are as grave the most frequent."""
        told = [Told(cause.standing, cause.spread) for cause in self if cause.standing is not None]
        return sorted(told, key=lambda one: (-one.fault.severity.rank, -one.spread.times))

    def _new(self, at: float) -> Cause:
        self._last_number += 1
        return Cause(self._last_number, at)

    def _next_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def _record(self, cause: Cause, what: Unrecorded, at: float) -> Fault:
        """The record of a repeat, made at a time that may be later than the repeat's."""
        fault = replace(
            what.of,
            id=self._next_id(),
            at=what.at,
            cause=cause.number,
            repeat_of=what.of.repeat_of or what.of.id,
            suppressed=cause.note_record(at),
        )
        cause.actions.add(fault.action)
        if what.instance is not None:
            fault = replace(fault, unnamed=0, **what.instance()._asdict())
            cause.note_pids(fault.culprits)
        return replace(fault, spread=cause.spread)


def passed(since: float, at: float) -> float:
    """Seconds from one time to another, which may be a little earlier, as faults that are looked into take their time.

    If it is far earlier the clock has been set back, and it isn't known how long that was.
    """
    return math.inf if at < since - _SET_BACK else at - since


def brief(fault: Fault) -> Fault:
    """A fault without what no repeat of it says."""
    culprits = tuple(replace(culprit, stack=None, stack_problem=None) for culprit in fault.culprits)
    return replace(fault, culprits=culprits, requests=(), story=())


def cause_key(verdict: Verdict, fault: Fault) -> CauseKey:
    """What the cause of a fault is known by."""
    roles = {(culprit.role, _program_of(culprit)) for culprit in fault.culprits}
    # Which of many workers only has the connection open, and which of them uses it, makes no difference.
    users = {program for role, program in roles if role is not Role.HOLDER}
    programs = frozenset(one for one in roles if one[0] is not Role.HOLDER or one[1] not in users)
    return CauseKey(fault.kind, fault.severity, verdict.refusal, programs, fault.advice.title)


def _program_of(culprit: Culprit) -> str:
    if culprit.process is not None:
        return program(" ".join(culprit.process.cmdline)[:_COMMAND] or culprit.process.name)
    return program(" ".join((culprit.declared or {}).values())[:_COMMAND])


def program(command: str) -> str:
    """What a process runs, without that by which its siblings differ; empty if it isn't known."""
    return _OWN.sub("#", command[:_COMMAND])
