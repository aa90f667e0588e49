"""Causes: what is the same for a person, on however many sessions and by however many processes it comes.

A cause is a kind of fault, the programs in their roles (command lines without what is different in each process) and
the advice. Its first fault is recorded in full. All later ones are repeats, of which one is recorded now and then: at
most one a second while the cause is new, and the less often the longer it has gone on. What isn't recorded is counted,
and the next record of its cause says how much that was. So what is recorded depends on how many causes there are, and
neither on how many sessions nor on how often it happens.

*Which programs.* Two count: the one that did it and the one that opened the connection. Who did it is the intruder or
the closer; where there is neither, whoever sent the request; where nobody did, the oldest process that has inherited
the socket. Whoever else has used the connection, or has its socket open, is different from one time to the next. A
refused login is about who holds the connections: the process with the most of them, whoever it is that was refused.

*What isn't known.* A process may be gone before it is looked at, and a busy machine leaves no time to look. A program
that isn't known is no other program: two faults are of one cause if nothing that is known of the one contradicts what
is known of the other, and one thing at least is known to be the same: the program that did it, the one that opened the
connection, or a process that took part. It makes no difference of which of them more is known. If less is known of the
first, it has been recorded in full all the same. From then on the cause is known by all that a later one shows as well:
at the end it is told by that one, and whatever contradicts that is another cause. Of several causes that a fault may be
of, it is counted with the one that has come last. Its record names nobody who isn't known of itself.

*How many.* Of more than :data:`CAUSES` at once, and of more than :data:`ALIKE` that differ in the program that did it
alone, those that come on top are one cause for each kind and severity.
"""

from __future__ import annotations

import math
import re
import secrets
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, NamedTuple

from pgguard.attribution.evidence import Evidence
from pgguard.faults.catalogue import CATALOGUE
from pgguard.faults.fault import Fault, Role, Spread
from pgguard.faults.text import title
from pgguard.session.verdicts import Kind, Limit, Refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

    from pgguard.faults.catalogue import Severity
    from pgguard.faults.fault import Culprit, SessionFacts
    from pgguard.faults.policy import Action
    from pgguard.session.verdicts import MessageSeen, Verdict

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
ALIKE: Final = 8
"""The same, of those that differ in the program that did it alone: jobs that are called by their names, say."""
FORGOTTEN_AFTER: Final = 600.0
"""Seconds after which a cause that hasn't come again makes room for another, when there are so many."""
PROCESSES: Final = 1024
"""Processes of a cause that are told apart: from then on no more are counted."""

_RUN_BYTES: Final = 6
"""Of a random name: a file of faults holds those of a few thousand runs at most."""
_SET_BACK: Final = 10.0
"""Seconds by which a fault may be older than one that was taken note of before, unless the clock has been set back."""
_LONGEST_GAP: Final = 3600.0
"""Seconds between two records of a cause from which on it hasn't gone on, or the clock has been set forward."""
_COMMAND: Final = 512
"""Characters of a command line by which a program is known: its beginning and its end, where a Java class stands."""
_RANDOM: Final = "[bcdfghjklmnpqrstvwxz2456789]"
"""What Kubernetes makes names of (``SafeEncodeString()`` in apimachinery's ``util/rand``): no word is, for want of a
vowel."""
_OWN: Final = re.compile(
    r"(?<![0-9a-z])(?:"
    r"tmp[0-9a-z_]{8}\b|tmp\.[0-9a-z]{6,}"  # a temporary file: Python's tempfile, mktemp(1)
    r"|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"  # a job's UUID
    rf"|(?:{_RANDOM}{{8,10}}|\d{{6,}})-{_RANDOM}{{5}}"  # a pod of a deployment, or of a job
    rf"|(?<=-)(?=[a-z]*\d){_RANDOM}{{5}}"  # a pod of any other kind
    r"|(?=[a-f]*\d)[0-9a-f]{3,}"  # the beginning of a digest, an address
    r"|(?=[a-z]*\d+[a-z]+\d)[0-9a-z]{4,}"  # any other token in which letters and digits take turns
    r")(?![0-9a-z])"
    r"|\d+",
    re.IGNORECASE,
)
"""What differs between processes that run the same."""
_OWN_NAMES: Final = ("application_name", "application", "framework", "db_driver")
"""Of what a client declares, what is the same with each request."""
_INVOLVED: Final = frozenset({Role.INTRUDER, Role.REQUESTER, Role.CLOSER})
"""Roles of those who do what is wrong, or suffer it."""
_DOERS: Final = (Role.INTRUDER, Role.CLOSER, Role.REQUESTER, Role.HOLDER)
"""Roles of those who do it, where several are known the first."""
_ITS_OWN: Final = frozenset({Kind.UNREAD_ANSWER, Kind.IDLE_IN_TRANSACTION, Kind.LEAKED_CONNECTION})
"""Kinds of faults that are whoever's that has sent the requests, if that is the opener too."""
_RIGHTFUL: Final = frozenset({Role.REQUESTER, Role.HOLDER})
"""Roles of those of them who do nothing wrong if they have opened the connection."""


class Instance(NamedTuple):
    """What a repeat says of itself, where it isn't what it repeats."""

    session: SessionFacts
    message: MessageSeen | None
    summary: str
    culprits: tuple[Culprit, ...]
    unnamed: int = 0
    """How many more culprits there are."""


class CauseKey(NamedTuple):
    """What a cause is known by."""

    kind: Kind
    severity: Severity
    refusal: Refusal | None = None
    doer: str = ""
    """The program that did it; empty if it isn't known, or nobody did."""
    opener: str = ""
    """The program that opened the connection; empty if it isn't known."""
    advice: str = ""
    rest: bool = False
    """Those that come on top."""

    def is_like(self, other: CauseKey) -> bool:
        """Whether another one differs from this in the program that did it alone."""
        return self._is_of(other) and (self.opener, self.advice) == (other.opener, other.advice)

    def is_part_of(self, known: CauseKey) -> bool:
        """Whether all that is known of this one is known of another as well."""
        return (
            self._is_of(known)
            and self.doer in ("", known.doer)
            and self.opener in ("", known.opener)
            and self.advice in (known.advice, self._usual_advice)
        )

    def is_one_with(self, other: CauseKey) -> bool:
        """Whether something is known to be the same of both, and nothing to be different."""
        same = self.refusal is not None or "" != self.doer == other.doer or "" != self.opener == other.opener
        return same and not self.contradicts(other)

    def contradicts(self, other: CauseKey) -> bool:
        """Whether something is known of both, and is different."""
        return not self._is_of(other) or not self.is_part_of(self.with_more(other))

    def with_more(self, other: CauseKey) -> CauseKey:
        """All that is known of this one or another; where that is different, what is known of the other."""
        advice = self.advice if other.advice == self._usual_advice else other.advice
        return self._replace(doer=other.doer or self.doer, opener=other.opener or self.opener, advice=advice)

    @property
    def _usual_advice(self) -> str:
        """What is advised as long as nothing special is known."""
        return CATALOGUE[self.kind].advice.title

    def _is_of(self, other: CauseKey) -> bool:
        return (
            self.kind is other.kind
            and self.severity is other.severity
            and self.refusal == other.refusal
            and self.rest == other.rest
        )


class Told(NamedTuple):
    """A cause, as it is told at the end."""

    fault: Fault
    """Its first one, or the first of which more is known by the number of that, without what no repeat says."""
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
    key: CauseKey
    """All that is known of it by now."""
    began: float
    """When it came first."""
    standing: Fault | None = None
    """Its first fault, as it is recorded, without what no repeat says; or the first one of which more is known, by the
    number of the first."""
    standing_key: CauseKey | None = None
    """What is known of that one."""
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

    def note_culprits(self, culprits: tuple[Culprit, ...]) -> None:
        """Take note of the processes that a fault names."""
        self.note_pids(involved(culprits))

    def note_pids(self, pids: Iterable[int]) -> None:
        """Take note of processes that have done it, or suffered it."""
        for pid in pids:
            if len(self.pids) < PROCESSES:
                self.pids.add(pid)

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
        self._run = secrets.token_hex(_RUN_BYTES)
        self._last_id = 0
        self._last_number = 0
        self._causes: OrderedDict[CauseKey, Cause] = OrderedDict()
        """The one first that has been quiet for longest."""

    def __len__(self) -> int:
        return len(self._causes)

    def __iter__(self) -> Iterator[Cause]:
        return iter(self._causes.values())

    def forget(self) -> None:
        """Remember none of them any more; their numbers aren't given to others."""
        self._causes.clear()

    def is_known(self, cause: Cause) -> bool:
        """Whether a cause is remembered."""
        return self._causes.get(cause.key) is cause

    def foresee(self, key: CauseKey, pids: Collection[int]) -> Cause | None:
        """The cause that one by this name and by these processes would be taken for, if it is remembered.

        Any thread may ask.
        """
        return self._causes.get(key) or self._causes.get(self._place(key, pids))

    def come(self, key: CauseKey, pids: Collection[int], at: float) -> tuple[Cause, list[Fault]]:
        """A cause has come, known or new.

        Args:
            key: What it is known by.
            pids: The processes that have done it, or suffered it.
            at: Seconds since the epoch.

        Returns:
            The cause: if there are too many, another one; and what is to be recorded of one that has made room for it.
        """
        forgotten: list[Fault] = []
        place = key if key in self._causes else self._place(key, pids)
        if place not in self._causes and not place.rest and len(self._causes) >= CAUSES:
            quietest = next(iter(self._causes))
            if passed(self._causes[quietest].seen_at, at) < FORGOTTEN_AFTER:
                place = _rest(key.kind, key.severity)
            else:
                forgotten = self.account(self._causes.pop(quietest), at)
        cause = self._causes.get(place)
        if cause is None:
            cause = self._causes[place] = self._new(place, at)
        elif not place.rest:
            self._learn(cause, key)
        self._causes.move_to_end(cause.key)
        cause.seen_at = at
        return cause, forgotten

    def come_again(self, cause: Cause, standing: Fault, at: float) -> Cause:
        """The cause of a fault that a session has committed before has come again; it may have been forgotten since.

        Returns:
            The cause by now.
        """
        if not self.is_known(cause):
            key = cause.key
            if key not in self._causes and len(self._causes) >= CAUSES:
                key = _rest(standing.kind, standing.severity)
            known = self._causes.get(key)
            if known is None:
                known = self._causes[key] = self._new(key, at)
                # What it repeats has been recorded.
                known.full, known.standing, known.standing_key, known.sessions = FULL_RECORDS, standing, key, 1
            cause = known
        self._causes.move_to_end(cause.key)
        cause.seen_at = at
        return cause

    def record_in_full(self, cause: Cause, key: CauseKey, fault: Fault) -> Fault:
        """The record of a fault that is the first of its cause; ``key`` is what is known of it."""
        suppressed = cause.note_record(fault.at)
        fault = replace(fault, id=self._next_id(), cause=cause.number, suppressed=suppressed, run=self._run)
        cause.actions.add(fault.action)
        if cause.standing is None:
            cause.standing, cause.standing_key = brief(fault), key
        cause.full += 1
        return fault

    def tell_by(self, cause: Cause, key: CauseKey, fault: Fault) -> None:
        """Tell a cause at the end by a repeat of it, if more is known of that than of the one that it was told by."""
        standing, before = cause.standing, cause.standing_key
        if standing is None or before is None or key == before or not before.is_part_of(key):
            return
        place = fault.place or standing.place
        cause.standing = replace(brief(fault), id=standing.id, repeat_of=standing.repeat_of, place=place)
        cause.standing_key = key

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

    def _place(self, key: CauseKey, pids: Collection[int]) -> CauseKey:
        """What a cause is known by that has not come by this name: more may be known of it, or less.

        Of those that it may be, the last one that has come, and rather one of which more is known.
        """
        names = list(self._causes)  # at once, as another thread may ask
        alike = [one for one in reversed(names) if key.is_one_with(one) or self._is_by(one, pids, key)]
        if alike:
            return next((one for one in alike if key.is_part_of(one)), alike[0])
        return _rest(key.kind, key.severity) if sum(map(key.is_like, names)) >= ALIKE else key

    def _is_by(self, name: CauseKey, pids: Collection[int], key: CauseKey) -> bool:
        """Whether a cause is by some of these processes too, and nothing that is known speaks against its being one."""
        if name.rest or name.contradicts(key):
            return False
        cause = self._causes.get(name)
        return cause is not None and not cause.pids.isdisjoint(pids)

    def _learn(self, cause: Cause, key: CauseKey) -> None:
        """Know a cause by what is known of one more fault of it as well."""
        more = cause.key.with_more(key)
        if more != cause.key and more not in self._causes:
            del self._causes[cause.key]
            cause.key = more
            self._causes[more] = cause

    def _new(self, key: CauseKey, at: float) -> Cause:
        self._last_number += 1
        return Cause(self._last_number, key, at)

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
            place=None,
            run=self._run,
        )
        cause.actions.add(fault.action)
        if what.instance is not None:
            fault = replace(fault, **what.instance()._asdict())
            cause.note_culprits(fault.culprits)
        return replace(fault, spread=cause.spread)


def passed(since: float, at: float) -> float:
    """Seconds from one time to another, which may be a little earlier, as faults that are looked into take their time.

    If it is far earlier the clock has been set back, and it isn't known how long that was.
    """
    return math.inf if at < since - _SET_BACK else at - since


def involved(culprits: Iterable[Culprit]) -> list[int]:
    """The processes that have done it, or suffered it."""
    return [one.pid for one in culprits if one.pid is not None and one.role in _INVOLVED]


def brief(fault: Fault) -> Fault:
    """A fault without what no repeat of it says."""
    culprits = tuple(replace(culprit, stack=None, stack_problem=None) for culprit in fault.culprits)
    return replace(fault, culprits=culprits, requests=(), story=())


def cause_key(verdict: Verdict, fault: Fault) -> CauseKey:
    """What the cause of a fault is known by."""
    if verdict.refusal is not None:
        # It is about those who have the connections: whoever was refused one, and whatever they do with them just now.
        return CauseKey(fault.kind, fault.severity, _shortage(verdict.refusal), _doer(verdict, fault.culprits, None))
    owner = next((culprit for culprit in fault.culprits if culprit.role is Role.OWNER), None)
    opener = "" if owner is None else _program_of(owner)
    doer = _doer(verdict, fault.culprits, owner)
    return CauseKey(fault.kind, fault.severity, None, doer, opener, fault.advice.title)


def _shortage(refusal: Refusal) -> Refusal:
    """What there is too little of: who is refused a slot that isn't reserved, or every slot, depends on the moment."""
    return refusal._replace(limit=Limit.SERVER) if refusal.limit is Limit.RESERVED else refusal


def _rest(kind: Kind, severity: Severity) -> CauseKey:
    return CauseKey(kind, severity, rest=True)


def _doer(verdict: Verdict, culprits: Sequence[Culprit], owner: Culprit | None) -> str:
    """What did it; empty if that isn't known, or nobody did."""
    for role in _DOERS:
        found = [one for one in culprits if one.role is role]
        if not found:
            continue
        if role in _RIGHTFUL:
            found = [one for one in found if owner is None or one.pid != owner.pid]
            if not found and role is Role.REQUESTER:
                # Whoever has opened the connection may use it, and who does it is another one then.
                return _program_of(owner) if owner is not None and verdict.kind in _ITS_OWN else ""
        if found:
            oldest = role is Role.HOLDER and verdict.refusal is None
            return _program_of(min(found, key=_start) if oldest else found[0])
    return ""


def _start(culprit: Culprit) -> int:
    return 0 if culprit.process is None else culprit.process.started


def _program_of(culprit: Culprit) -> str:
    """What a culprit runs, or says that it does; empty if that isn't known.

    Of a process that has ended there may be only its name left, which all programs of one language can share.
    """
    if culprit.process is not None:
        return program(culprit.process.cmdline)
    declared = (culprit.declared or {}) if culprit.evidence is Evidence.DECLARED else {}
    return program([declared[name] for name in _OWN_NAMES if name in declared])


def program(cmdline: Sequence[str]) -> str:
    """What a process runs, without that by which its siblings differ; empty if it isn't known."""
    command = title(cmdline) or " ".join(cmdline)
    if len(command) > _COMMAND:
        command = f"{command[: _COMMAND // 2]} {command[-_COMMAND // 2 :]}"
    return _OWN.sub("#", command.strip())
