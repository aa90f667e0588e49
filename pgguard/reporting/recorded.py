"""Recorded faults, by cause: what every report on a file of faults is made of.

*Which causes.* Within one run of the guard a record says which cause it is of. A file may hold several runs, each with
numbers of its own: a record says which run it is from, or, if it is an older version's, a run begins where the numbers
begin anew. The same kind by the same programs in another run, with the same advice, is the same cause: whoever runs
the tests ten times has one thing to mend. An older version's records that don't say their cause are grouped in this
way alone.

*How often.* A cause has come as often as its records and what was suppressed between them say, or more often if a
repeat says so: the file may have begun before, or have been cut.

*What is wrong with the file* is said, and the rest is read: a line that a full disk or a killed guard has left torn,
also if the next run has gone on behind it; what isn't a record; a compressed file that ends too early.

Memory is bounded by the number of causes and the size of one record of each: lines are read one by one, and one is
kept of each cause, :data:`KEPT` bytes of the gravest in all.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections import Counter, OrderedDict, deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from pgguard.attribution.evidence import Evidence
from pgguard.faults.catalogue import Severity
from pgguard.faults.causes import program
from pgguard.faults.fault import Event, Role
from pgguard.faults.policy import Action
from pgguard.faults.text import counted
from pgguard.reporting.jsonl import encode
from pgguard.reporting.readback import (
    MOST,
    NoRecordError,
    essentials,
    from_record,
    number_of,
    process_of,
    session_of,
    text_of,
    time_of,
)
from pgguard.reporting.record import to_record
from pgguard.session.verdicts import Kind

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from pgguard.attribution.evidence import Process
    from pgguard.faults.fault import Fault, SessionFacts

STANDARD_INPUT: Final = Path("-")
CAUSES: Final = 5000
"""Causes that are told apart; what comes on top is counted by its kind."""
KEPT: Final = 64 << 20
"""Bytes of records that are kept in full."""
LONGEST: Final = 16 << 20
"""Bytes of a line that may be a record."""
SESSIONS: Final = 256
"""Sessions that are told of one by one, of each severity."""
_MORE_SESSIONS: Final = 10_000
_INSTANCES: Final = 256
"""Sessions and processes of one cause in one run that are told apart here; a repeat says how many it has counted."""
_NUMBERS: Final = 2 * CAUSES
"""Numbers of causes that are remembered."""
_ALIKE: Final = 16
"""Causes by one name, the latest ones, of which another run's may be one."""
_TROUBLES: Final = 20
"""Lines with which something is wrong that are told of one by one."""
_MARKS: Final = 64
"""Faults of one session that are told of one by one."""
_GZIP: Final = b"\x1f\x8b"
_BEGINNING: Final = b'{"id":'
"""How a record begins."""
_BEGINNINGS: Final = 64
"""Places in a torn line where one is looked for."""
_ITS_OWN: Final = frozenset({Kind.UNREAD_ANSWER, Kind.IDLE_IN_TRANSACTION, Kind.LEAKED_CONNECTION})
"""Kinds that are the opener's own doing if nobody else takes part."""
TICK: Final = 0.02
"""Seconds by which a process's start, which the kernel counts in ticks, can seem to be too early."""
_INVOLVED: Final = frozenset({"intruder", "requester", "closer"})
_KNOWN: Final = _INVOLVED | {"owner"}
"""Roles of which it matters how they are known."""
_OUTLINE: Final = ("id", "run", "at", "cause", "kind", "severity", "action", "summary", "reason", "session")


class RecordingError(Exception):
    """There is nothing to be read; the message is one line that says what to change."""


class _Key(NamedTuple):
    """What a cause is known by in whichever run."""

    kind: Kind
    severity: Severity
    limit: str
    doer: str
    opener: str


class Mark(NamedTuple):
    """One fault of a session."""

    at: float
    severity: Severity
    kind: Kind
    pid: int | None
    """Who did it, or the first of them, if that is known."""


@dataclass(slots=True)
class Presence:
    """A process that had a session's connection; times are seconds since the epoch."""

    pid: int
    process: Process | None
    since: float
    """From when on it is known to have had it."""
    until: float
    """The last time that it is known to have had it."""
    left: bool = False
    """It is known to have let go of it then."""
    opened: bool = False
    """It has opened it."""


@dataclass(slots=True)
class RecordedSession:
    """A session in which something went wrong; times are seconds since the epoch."""

    run: int
    """Counts the guard's runs in the file, from 1."""
    facts: SessionFacts
    severity: Severity
    """The gravest."""
    last_at: float
    times: int = 0
    """Records that name it."""
    over: bool = False
    """It has ended with the last of them."""
    marks: list[Mark] = field(default_factory=list)
    """Its faults, the first ones."""
    processes: dict[int, Presence] = field(default_factory=dict)
    """By pid, those that are known to have had it."""


@dataclass(slots=True, eq=False)
class RecordedCause:
    """One cause; times are seconds since the epoch."""

    number: int
    """Counts the causes of the file in the order in which they came, from 1."""
    kind: Kind
    severity: Severity
    line: bytes
    """The record of its first fault, without its line feed; or of the first that is there of it."""
    advice: str | None
    """The title of its advice, if that is known."""
    in_full: bool
    """The record says all that was known: it isn't a repeat's, nor cut down because there are so many."""
    first_at: float
    last_at: float
    times: int = 0
    sessions: int = 0
    """How many it has come on."""
    processes: int = 0
    """How many are known to have done it, or suffered it."""
    runs: int = 0
    """Runs of the guard in which it has come."""
    actions: Counter[Action] = field(default_factory=Counter)
    """What has been done about those that were recorded."""

    @property
    def record(self) -> dict[str, Any]:
        """That record; it is read anew each time."""
        return _object(self.line)

    @property
    def fault(self) -> Fault:
        """Its fault; it is made anew each time."""
        return from_record(self.record)


class KindCount(NamedTuple):
    """How often one kind has come."""

    severity: Severity
    kind: Kind
    times: int


@dataclass(frozen=True, slots=True)
class Recording:
    """What there is in a file of faults; times are seconds since the epoch."""

    name: str
    """What people call the file."""
    causes: tuple[RecordedCause, ...]
    """The gravest first, and of those that are as grave the most frequent."""
    counts: tuple[KindCount, ...]
    """The gravest first; those of causes that aren't told apart among them."""
    sessions: tuple[RecordedSession, ...]
    """In the order in which they were opened; of very many those with the gravest faults."""
    more_sessions: int
    """How many there are besides, counted up to 10,000."""
    records: int
    runs: int
    first_at: float | None
    """When the first fault was seen; ``None`` if there was none."""
    last_at: float | None
    stack_problems: tuple[tuple[str, int], ...]
    """Why there was no stack of a thread, and how often, the most frequent first."""
    evidence: frozenset[Evidence]
    """How they are known who did it, suffered it, or opened the connection, in some of the causes."""
    troubles: tuple[str, ...]
    """What is wrong with the file, a clause each, which says in which line."""

    @property
    def times(self) -> int:
        """How many faults there were."""
        return sum(count.times for count in self.counts)


@dataclass(slots=True)
class _Instance:
    """A cause in one run."""

    cause: RecordedCause
    counted: int = 0
    """How often it has come by its records."""
    told: int = 0
    """How often it has come."""
    sessions: set[int] = field(default_factory=set)
    told_sessions: int = 0
    pids: set[int] = field(default_factory=set)
    told_processes: int = 0


@dataclass(slots=True)
class _Run:
    """A run of the guard, by whose numbers records are told apart."""

    number: int
    last_id: int = -1


class Gatherer:
    """Groups records as they come. It is also a sink: a guard in the same process can hand its faults to it.

    Args:
        name: What people call the source.
        kept: Bytes of records that are kept in full; :data:`KEPT` by default.
    """

    def __init__(self, name: str, *, kept: int | None = None) -> None:
        self.name = name
        self._limit = KEPT if kept is None else kept
        self._causes: list[RecordedCause] = []
        self._by_key: dict[_Key, list[RecordedCause]] = {}
        self._latest: dict[RecordedCause, int] = {}
        """The run in which each has come last."""
        self._instances: OrderedDict[tuple[int, int], _Instance] = OrderedDict()
        """By run and the cause's number in it; the one first that has been quiet for longest."""
        self._runs: OrderedDict[str, _Run] = OrderedDict()
        self._nameless = _Run(0)
        """The run of an older version that is being read."""
        self._last_run = 0
        self._counts: Counter[tuple[Severity, Kind]] = Counter()
        self._kept: dict[Severity, deque[RecordedCause]] = {severity: deque() for severity in Severity}
        """Causes whose records are kept in full, in the order in which they came."""
        self._kept_bytes = 0
        self._sessions: dict[Severity, dict[tuple[int, int], RecordedSession]] = {one: {} for one in Severity}
        self._more_sessions: set[tuple[int, int]] = set()
        self._records = 0
        self._first_at: float | None = None
        self._last_at: float | None = None
        self._stack_problems: Counter[str] = Counter()
        self._evidence: set[Evidence] = set()
        self._troubles: list[str] = []
        self._more_troubles = 0

    def __str__(self) -> str:
        return "the report"

    def record(self, fault: Fault) -> None:
        """Take a fault."""
        self.gather(fault)

    def gather(self, fault: Fault) -> bytes:
        """Take a fault; returns its record as a line, without its line feed."""
        line = encode(fault).rstrip(b"\n")
        self._add(to_record(fault), line)
        return line

    def cause_of(self, number: int) -> RecordedCause | None:
        """The cause that has this number in the last run; ``None`` if there is none, or it is forgotten."""
        instance = self._instances.get((self._last_run, number))
        return None if instance is None else instance.cause

    def close(self) -> None:
        """Nothing needs to be let go of."""

    def take(self, line: bytes, number: int, *, whole: bool = True) -> None:
        """Take a line of a file; what is wrong with it is kept, to be said.

        Args:
            line: It, with or without its line feed.
            number: Its number in the file, from 1.
            whole: It ended with a line feed, or had been cut off.
        """
        line = line.strip(b" \t\r\n")
        if not line:
            return
        try:
            self._add(_object(line), line)
        except NoRecordError as error:
            rest = _rest(line)
            if rest is not None:
                self._add(_object(rest), rest)
                self.complain(f"line {number}: the record at its beginning is cut off, and left out")
            elif not whole:
                self.complain(f"line {number}, the last one, is cut off, and left out")
            else:
                self.complain(f"line {number} is left out: {error}")

    def complain(self, problem: str) -> None:
        """Take note of what is wrong with the file."""
        if len(self._troubles) < _TROUBLES:
            self._troubles.append(problem)
        else:
            self._more_troubles += 1

    @property
    def records(self) -> int:
        """How many there were so far."""
        return self._records

    def recording(self) -> Recording:
        """All that there was so far."""
        told = sorted(self._causes, key=lambda one: (-one.severity.rank, -one.times, one.first_at))
        counts = sorted(self._counts.items(), key=lambda item: (-item[0][0].rank, -item[1]))
        sessions = [session for rank in self._sessions.values() for session in rank.values()]
        troubles = list(self._troubles)
        if self._more_troubles:
            troubles.append(f"so it is with {counted(self._more_troubles, 'more line')}")
        return Recording(
            name=self.name,
            causes=tuple(told),
            counts=tuple(KindCount(*key, times) for key, times in counts),
            sessions=tuple(sorted(sessions, key=lambda one: (one.facts.opened_at, one.run, one.facts.id))),
            more_sessions=len(self._more_sessions),
            records=self._records,
            runs=self._last_run,
            first_at=self._first_at,
            last_at=self._last_at,
            stack_problems=tuple(self._stack_problems.most_common()),
            evidence=frozenset(self._evidence),
            troubles=tuple(troubles),
        )

    def _add(self, record: Mapping[str, Any], line: bytes) -> None:
        """Count a record. Raises NoRecordError, with nothing changed."""
        number, at, kind, severity = essentials(record)
        run = self._run(record, number)
        self._records += 1
        self._first_at = at if self._first_at is None else min(at, self._first_at)
        self._last_at = at if self._last_at is None else max(at, self._last_at)
        people = [one for one in _list(record.get("culprits")) if isinstance(one, dict)]
        suppressed = number_of(record.get("suppressed")) or 0
        instance = self._instance(run, record, people, kind, severity, at, line)
        times = 1 + suppressed
        if instance is not None:
            times = self._count(instance, record, people, suppressed, at)
            cause = instance.cause
            cause.last_at = max(at, cause.last_at)
            cause.actions[_action(record)] += 1
        self._counts[severity, kind] = min(self._counts[severity, kind] + times, MOST)
        self._note_session(run, record, people, kind, severity, at)

    # Which run, and which cause of it

    def _run(self, record: Mapping[str, Any], number: int) -> int:
        name = text_of(record.get("run"))
        if name is None:
            if number <= self._nameless.last_id or not self._nameless.number:
                self._nameless = _Run(self._next_run())
            self._nameless.last_id = number
            return self._nameless.number
        run = self._runs.get(name)
        if run is None:
            run = self._runs[name] = _Run(self._next_run())
            if len(self._runs) > _NUMBERS:
                self._runs.popitem(last=False)
        return run.number

    def _next_run(self) -> int:
        self._last_run += 1
        return self._last_run

    def _instance(
        self,
        run: int,
        record: Mapping[str, Any],
        people: list[dict[str, Any]],
        kind: Kind,
        severity: Severity,
        at: float,
        line: bytes,
    ) -> _Instance | None:
        """The cause that a record is of, in its run; ``None`` if there are too many."""
        number = number_of(record.get("cause")) or 0
        place = (run, number)
        instance = self._instances.get(place) if number else None
        if instance is not None and (instance.cause.kind, instance.cause.severity) == (kind, severity):
            self._instances.move_to_end(place)
            return instance
        cause = self._cause(run, record, people, kind, severity, at, line)
        if cause is None:
            return None
        if not number:
            # An older version's; what is known of its causes by their names alone has numbers that nobody has given.
            place = (run, -cause.number)
            instance = self._instances.get(place)
            if instance is not None:
                self._instances.move_to_end(place)
                return instance
        instance = self._instances[place] = _Instance(cause)
        cause.runs += self._latest.get(cause) != run
        self._latest[cause] = run
        if len(self._instances) > _NUMBERS:
            self._instances.popitem(last=False)
        return instance

    def _cause(
        self,
        run: int,
        record: Mapping[str, Any],
        people: list[dict[str, Any]],
        kind: Kind,
        severity: Severity,
        at: float,
        line: bytes,
    ) -> RecordedCause | None:
        """The cause by that name, if it can be the one: a new one if there is none. ``None``: there are too many."""
        key = _key(record, people, kind, severity)
        advice = _title(record)
        in_full = number_of(record.get("repeat_of")) is None
        by_name = number_of(record.get("cause")) is None
        for cause in self._by_key.get(key, [])[-_ALIKE:]:
            is_another = not by_name and self._latest.get(cause) == run
            if is_another or (None not in (advice, cause.advice) and advice != cause.advice):
                continue
            if in_full and cause.advice is None:
                self._let_go(cause)
                self._keep(cause, line)
                cause.advice, cause.in_full = advice, True
            return cause
        if len(self._causes) >= CAUSES:
            return None
        cause = RecordedCause(len(self._causes) + 1, kind, severity, line, advice, in_full, at, at)
        self._causes.append(cause)
        self._by_key.setdefault(key, []).append(cause)
        self._keep(cause, line)
        self._note_evidence(people)
        return cause

    def _keep(self, cause: RecordedCause, line: bytes) -> None:
        """Keep a cause's record, if need be at the expense of others that are less grave, or have come after it."""
        cause.line = line
        self._kept_bytes += len(line)
        self._kept[cause.severity].append(cause)
        while self._kept_bytes > self._limit:
            kept = next(kept for _, kept in sorted(self._kept.items(), key=lambda item: item[0].rank) if kept)
            last = kept[-1]
            self._let_go(last)
            last.line, last.in_full = _outline(last.line), False

    def _let_go(self, cause: RecordedCause) -> None:
        kept = self._kept[cause.severity]
        if kept and kept[-1] is cause:
            kept.pop()
        elif cause in kept:
            kept.remove(cause)
        else:
            return
        self._kept_bytes -= len(cause.line)

    def _note_evidence(self, people: list[dict[str, Any]]) -> None:
        for one in people:
            problem = text_of(one.get("stack_problem"))
            if problem is not None and (problem in self._stack_problems or len(self._stack_problems) < _TROUBLES):
                self._stack_problems[problem] += 1
            if text_of(one.get("role")) in _KNOWN and text_of(one.get("evidence")) in _EVIDENCE:
                self._evidence.add(Evidence(one["evidence"]))

    # How often, and where

    @staticmethod
    def _count(
        instance: _Instance, record: Mapping[str, Any], people: list[dict[str, Any]], suppressed: int, at: float
    ) -> int:
        """Count it; returns how many more times that is."""
        cause = instance.cause
        spread = record.get("so_far")
        so_far = spread if isinstance(spread, dict) else {}
        session = record.get("session")
        number = number_of(session.get("id")) if isinstance(session, dict) else None
        if number is not None and len(instance.sessions) < _INSTANCES:
            instance.sessions.add(number)
        for one in people:
            pid = number_of(one.get("pid"))
            if pid is not None and text_of(one.get("role")) in _INVOLVED and len(instance.pids) < _INSTANCES:
                instance.pids.add(pid)
        instance.counted = min(instance.counted + 1 + suppressed, MOST)
        times = max(instance.counted, instance.told, number_of(so_far.get("times")) or 0)
        sessions = max(len(instance.sessions), instance.told_sessions, number_of(so_far.get("sessions")) or 0)
        processes = max(len(instance.pids), instance.told_processes, number_of(so_far.get("processes")) or 0)
        since = time_of(so_far.get("since"))
        cause.first_at = min(at, cause.first_at, at if since is None else since)
        more = times - instance.told
        cause.times += more
        cause.sessions += sessions - instance.told_sessions
        cause.processes += processes - instance.told_processes
        instance.told, instance.told_sessions, instance.told_processes = times, sessions, processes
        return more

    def _note_session(
        self,
        run: int,
        record: Mapping[str, Any],
        people: list[dict[str, Any]],
        kind: Kind,
        severity: Severity,
        at: float,
    ) -> None:
        said = record.get("session")
        number = number_of(said.get("id")) if isinstance(said, dict) else None
        if number is None:
            return
        place = (run, number)
        known = next((one for one in self._sessions.values() if place in one), None)
        if known is None:
            session = RecordedSession(run, session_of(record, at), severity, at)
        else:
            session = known[place]
            if severity.rank > session.severity.rank:
                del known[place]
                session.severity, known = severity, None
        if known is None:
            rank = self._sessions[severity]
            if len(rank) >= SESSIONS:
                if len(self._more_sessions) < _MORE_SESSIONS:
                    self._more_sessions.add(place)
                return
            rank[place] = session
        session.times += 1
        session.last_at = max(at, session.last_at)
        session.over = session.over or record.get("over") is True or _action(record) is Action.REJECTED
        doer = next((number_of(one.get("pid")) for one in people if text_of(one.get("role")) in _INVOLVED), None)
        if len(session.marks) < _MARKS:
            session.marks.append(Mark(at, severity, kind, doer))
        if kind is not Kind.CONNECTION_EXHAUSTION:
            _note_processes(session, record, people, at)


_EVIDENCE: Final = frozenset(evidence.value for evidence in Evidence)


def _note_processes(
    session: RecordedSession, record: Mapping[str, Any], people: list[dict[str, Any]], at: float
) -> None:
    """Take note of who is known to have had the connection, and when."""
    pids = {number_of(one.get("pid")) for one in people} | session.processes.keys()
    for one in people:
        pid = number_of(one.get("pid"))
        if pid is None or len(session.processes) >= _INSTANCES:
            continue
        presence = session.processes.get(pid)
        owner = one.get("role") == Role.OWNER.value
        if presence is None:
            process = process_of(pid, one.get("process"))
            since = min(session.facts.opened_at, at) if owner else _inherited_at(process, pids, session) or at
            presence = session.processes[pid] = Presence(pid, process, since, since)
        presence.opened = presence.opened or owner
        # Whoever has only opened it may have let go of it long ago.
        if not owner and not presence.left:
            presence.until = max(presence.until, at)
    for chapter in _list(record.get("story")):
        said = chapter if isinstance(chapter, dict) else {}
        time, pid = time_of(said.get("at")), number_of(said.get("pid"))
        presence = None if pid is None else session.processes.get(pid)
        if presence is None or time is None:
            continue
        if said.get("event") == Event.LEFT.value:
            presence.left, presence.until = True, max(presence.since, time)
        else:
            presence.since = min(time, presence.until)


def _inherited_at(process: Process | None, pids: Collection[int | None], session: RecordedSession) -> float | None:
    """When a process has inherited the connection, as the child of one that had it; ``None`` if it isn't one."""
    is_heir = process is not None and process.ppid in pids and process.started_at >= session.facts.opened_at - TICK
    return process.started_at if process is not None and is_heir else None


def read_recording(path: Path) -> Recording:
    """Read a file that ``--faults`` has written, or that has been compressed with gzip since.

    Args:
        path: The file, or a FIFO or whatever can be read; ``-``: standard input.

    Raises:
        RecordingError: It can't be read, or no line of it is a record.
    """
    gatherer = Gatherer("standard input" if path == STANDARD_INPUT else str(path))
    read = 0
    try:
        with _opened(path) as stream:
            for number, line, whole in _lines(stream):
                read = number
                if len(line) > LONGEST:
                    gatherer.complain(f"line {number} is left out: it is longer than {LONGEST >> 20} MiB")
                else:
                    gatherer.take(line, number, whole=whole)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        gatherer.complain(f"it ends too early, or is damaged, behind line {read}: it can't be decompressed any further")
    except OSError as error:
        problem = os.strerror(error.errno) if error.errno is not None else str(error)
        if not gatherer.records:
            raise RecordingError(f"can't read {gatherer.name}: {problem}") from error
        gatherer.complain(f"it can't be read behind line {read}: {problem}")
    recording = gatherer.recording()
    if recording.troubles and not recording.records:
        raise RecordingError(
            f"{recording.name}: no line of it is a record of a fault: {recording.troubles[0]}; name a file that "
            "--faults has written"
        )
    return recording


@contextmanager
def _opened(path: Path) -> Iterator[_Lines]:
    with os.fdopen(0, "rb", closefd=False) if path == STANDARD_INPUT else path.open("rb") as stream:
        if not stream.peek(len(_GZIP)).startswith(_GZIP):
            yield stream
            return
        with gzip.open(stream) as inner:
            yield inner


class _Lines(Protocol):
    def readline(self, size: int, /) -> bytes: ...


def _lines(stream: _Lines) -> Iterator[tuple[int, bytes, bool]]:
    """Lines with their numbers, and whether they end with a line feed; of one that is too long the beginning."""
    number = 0
    while line := stream.readline(LONGEST + 1):
        number += 1
        whole = line.endswith(b"\n")
        if not whole and len(line) > LONGEST:
            while (rest := stream.readline(LONGEST)) and not rest.endswith(b"\n"):
                pass
        yield number, line, whole


def _object(line: bytes) -> dict[str, Any]:
    """The JSON object that stands in a line. Raises NoRecordError."""
    try:
        found = json.loads(line.decode("utf-8-sig", "replace"))
    except json.JSONDecodeError as error:
        raise NoRecordError(f"it isn't JSON: {error.msg} at character {error.pos + 1}") from error
    except (ValueError, RecursionError) as error:
        raise NoRecordError("it isn't JSON that can be read: too large a number, or too deep") from error
    if not isinstance(found, dict):
        raise NoRecordError("it is no JSON object")
    return found


def _rest(line: bytes) -> bytes | None:
    """The record that stands behind a torn one; ``None`` if there is none."""
    start = 0
    for _ in range(_BEGINNINGS):
        start = line.find(_BEGINNING, start + 1)
        if start < 0:
            return None
        try:
            essentials(_object(line[start:]))
        except NoRecordError:
            continue
        return line[start:]
    return None


def _outline(line: bytes) -> bytes:
    """A record without what takes much room."""
    record = _object(line)
    kept = {key: record.get(key) for key in _OUTLINE}
    for key, value in kept.items():
        if isinstance(value, str):
            kept[key] = value[:1000]
    session = kept["session"]
    if isinstance(session, dict):
        kept["session"] = {key: value[:100] if isinstance(value, str) else value for key, value in session.items()}
    return json.dumps(kept).encode()


def _key(record: Mapping[str, Any], people: list[dict[str, Any]], kind: Kind, severity: Severity) -> _Key:
    """What a cause is known by; the rule is that of :mod:`pgguard.faults.causes`, as far as a record tells."""
    owner = next((one for one in people if one.get("role") == Role.OWNER.value), None)
    limit = text_of(record.get("limit")) or ""
    if kind is Kind.CONNECTION_EXHAUSTION:
        holder = next((one for one in people if one.get("role") == Role.HOLDER.value), None)
        session = record.get("session")
        server = text_of(session.get("through")) if isinstance(session, dict) else None
        limit = "server" if limit == "reserved" else limit
        return _Key(kind, severity, limit if server is None else f"{limit} of {server}", _program(holder), "")
    doer = next((one for one in people if text_of(one.get("role")) in ("intruder", "closer")), None)
    if doer is None:
        rightful = [one for one in people if text_of(one.get("role")) in ("requester", "holder")]
        others = [one for one in rightful if owner is None or one.get("pid") != owner.get("pid")]
        doer = others[0] if others else (owner if kind in _ITS_OWN else None)
    return _Key(kind, severity, limit, _program(doer), _program(owner))


def _program(culprit: Mapping[str, Any] | None) -> str:
    process = None if culprit is None else culprit.get("process")
    if not isinstance(process, dict):
        return ""
    return program([one for one in _list(process.get("cmdline")) if isinstance(one, str)])


def _title(record: Mapping[str, Any]) -> str | None:
    advice = record.get("advice")
    return text_of(advice.get("title")) if isinstance(advice, dict) else None


def _action(record: Mapping[str, Any]) -> Action:
    return next((action for action in Action if action == record.get("action")), Action.LOGGED)


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
