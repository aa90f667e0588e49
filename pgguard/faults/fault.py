"""A fault, as it is recorded and reported."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from pgguard.session.verdicts import Party

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pgguard.attribution.evidence import Evidence, Process
    from pgguard.attribution.findings import Share
    from pgguard.attribution.frames import Frame
    from pgguard.attribution.runtime import Runtime
    from pgguard.faults.advice.tracing import Tracing
    from pgguard.faults.catalogue import Advice, Severity
    from pgguard.faults.policy import Action
    from pgguard.faults.sql import SqlText
    from pgguard.identity import Sender
    from pgguard.session.verdicts import Kind, Limit, MessageSeen, RequestState


OUTLINED: Final = "the details are missing because of an internal error; pgguard's log has more"
"""The summary and the reason of a fault whose details couldn't be put together."""


class Role(StrEnum):
    """What a process has to do with a fault."""

    INTRUDER = "intruder"
    """Used the connection out of turn."""
    CLOSER = "closer"
    """Ended it."""
    REQUESTER = "requester"
    """Sent the request being answered, or had the connection before."""
    OWNER = "owner"
    """Opened it."""
    HOLDER = "holder"
    """Has its socket open; of a connection-exhaustion, has other connections open that count toward the limit."""


@dataclass(frozen=True, slots=True)
class SessionFacts:
    """What a session is known by; times are seconds since the epoch."""

    id: int
    user: str | None
    database: str | None
    application_name: str | None
    transport: Literal["tcp", "unix"]
    client: str | None
    """The client's address, ``host:port``; ``None`` for a Unix socket, whose clients have none."""
    backend_pid: int | None
    opened_at: float
    tls: bool
    """Between the client and the guard."""
    through: str | None = None
    """The name of the database in the configuration file whose listener the client has come to; ``None``: the guard is
    in front of one server alone."""


@dataclass(frozen=True, slots=True)
class Culprit:
    """One process, or one of its threads, in one role; a process in two roles is there twice."""

    role: Role
    pid: int | None
    """``None`` when somebody was in this role and it is not known who."""
    tid: int | None
    evidence: Evidence
    """How the process is known."""
    process: Process | None
    tid_evidence: Evidence | None = None
    """How the thread is known."""
    thread_name: str | None = None
    system_call: str | None = None
    """What the thread was blocked in."""
    stack: tuple[Frame, ...] | None = None
    """What the thread was doing, the innermost call first."""
    stack_problem: str | None = None
    """Why there is no stack, where there could be one."""
    runtime: Runtime | None = None
    """What the process runs."""
    declared: Mapping[str, str] | None = None
    """What a client says about itself: if its process can't be looked at, or in the comments of its requests."""


class Event(StrEnum):
    """What happened to the client's socket."""

    OPENED = "opened"
    INHERITED = "inherited"
    """A process inherited it through a fork."""
    RECEIVED = "received"
    """A process that is older than the connection got it: handed over, for example through ``SCM_RIGHTS``."""
    LEFT = "left"
    """A process that had it open no longer has."""


@dataclass(frozen=True, slots=True)
class Chapter:
    """One event in the story of the client's socket."""

    event: Event
    at: float | None
    """Seconds since the epoch; ``None`` where that is not known."""
    pid: int
    parent: int | None
    """The parent that the process inherited it from, if that is known to have had it open."""
    evidence: Evidence
    stack: tuple[Frame, ...] | None = None
    """What the thread was doing that opened it while it did, the innermost call first, if that was looked at."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request of the session's recent past."""

    n: int
    at: float
    messages: str
    text: SqlText = field(repr=False)
    pid: int | None
    tid: int | None
    evidence: Evidence | None
    """How its sender is known."""
    state: RequestState
    at_rest: bool | None = None
    """Whether every answer before it was complete when it came; ``None`` if that isn't known."""

    @property
    def sql(self) -> str | None:
        """Its text as it may be shown."""
        return self.text.shown()


class Spread(NamedTuple):
    """How far a cause has spread by the time of a record."""

    times: int
    """How often it has come."""
    sessions: int
    processes: int
    """How many processes are known to have done it, or suffered it."""
    since: float
    """When it came first, in seconds since the epoch."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: what happened, who did it, and what to change. There is no secret in it: see :mod:`.build`."""

    id: int
    """Counts the guard's records, from 1."""
    at: float
    """Seconds since the epoch."""
    kind: Kind
    severity: Severity
    action: Action
    repeat_of: int | None
    """The id of the first record of its cause, in the sense of :mod:`pgguard.faults.causes`, whose requests, stacks,
    story and advice aren't repeated."""
    suppressed: int
    """Faults of this cause, on whichever session, that were counted and not recorded since its last record."""
    summary: str
    """One line: who did what to whom."""
    reason: str
    """What was seen, in the protocol's words."""
    session: SessionFacts
    message: MessageSeen | None
    libpq: str | None
    """What libpq prints for the symptom, where it has a text for it and the client may be libpq."""
    culprits: tuple[Culprit, ...]
    """Who used the connection out of turn or ended it first, those who only have it open last."""
    requests: tuple[Request, ...]
    """Oldest first."""
    advice: Advice
    story: tuple[Chapter, ...] = ()
    """How the socket came to be where it is, oldest first."""
    shares: tuple[Share, ...] | None = None
    """How many of the connections that count each process had open; of a connection-exhaustion."""
    limit: Limit | None = None
    """Of a connection-exhaustion, which limit it was; ``None`` where the server doesn't say."""
    unnamed: int = 0
    """How many more culprits there are."""
    by: Party = Party.CLIENT
    over: bool = False
    """The session has ended with it."""
    sent_by: Sender | None = None
    """Who sent the message, where that is known."""
    cause: int = 0
    """The number of its cause: counts those of one run of the guard, from 1."""
    spread: Spread | None = None
    """Of a repeat, how far its cause has spread."""
    tracing: Tracing | None = None
    """How to have requests say which code sends them, where no stack says it."""
    place: str | None = None
    """Where in the application the first culprit was that was seen there: ``app.py:23 in load_user``."""
    run: str | None = None
    """Which run of the guard has recorded it: its number, its session's and its cause's count that one's alone."""

    @property
    def headline(self) -> str:
        """The summary, with the place in the application."""
        return self.summary if self.place is None else f"{self.summary}; seen at {self.place}"

    def outlined(self) -> Fault:
        """The same fault without what has been found out about it: what is left can be told in any case."""
        session = replace(self.session, user=None, database=None, application_name=None)
        return replace(
            self,
            summary=OUTLINED,
            place=None,
            reason=OUTLINED,
            session=session,
            culprits=(),
            requests=(),
            story=(),
            shares=None,
        )
