"""A fault, as it is recorded and reported."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, Literal

from pgguard.session.verdicts import Party

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pgguard.attribution.evidence import Evidence, Process
    from pgguard.attribution.findings import Share
    from pgguard.attribution.runtime import Runtime
    from pgguard.attribution.stacks import Frame
    from pgguard.faults.catalogue import Advice, Severity
    from pgguard.faults.policy import Action
    from pgguard.faults.sql import SqlText
    from pgguard.session.verdicts import Kind, Limit, MessageSeen, RequestState, Sender


OUTLINED: Final = "nothing more can be said of it, as something failed in the guard, whose log says what"
"""The summary and the reason of a fault of which the rest couldn't be told."""


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
    """Has its socket open; of a connection-exhaustion, has others open that count."""


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


@dataclass(frozen=True, slots=True)
class Culprit:
    """One process, or one of its threads, in one role; who is in two roles is there twice."""

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
    """What a client says of itself that can't be looked at."""


class Event(StrEnum):
    """What happened to the client's socket."""

    OPENED = "opened"
    INHERITED = "inherited"
    """A fork took it along."""
    RECEIVED = "received"
    """By a process that is older than the connection: it was handed over, through ``SCM_RIGHTS`` for one."""
    LEFT = "left"
    """A process that had it open has not any more."""


@dataclass(frozen=True, slots=True)
class Chapter:
    """One event in the story of the client's socket."""

    event: Event
    at: float | None
    """Seconds since the epoch; ``None`` where that is not known."""
    pid: int
    parent: int | None
    """Of whom the process that inherited it was forked, as far as that one is known to have had it."""
    evidence: Evidence


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

    @property
    def sql(self) -> str | None:
        """Its text as it may be shown."""
        return self.text.shown()


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
    """The id of the first record of the same fault, or of its cause, in the sense of :mod:`pgguard.faults.docket`; its
    requests, stacks, story and advice aren't repeated."""
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
    """Who had how many of the connections open that count; of kinds that it matters for."""
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

    def outlined(self) -> Fault:
        """The same fault without what has been found out about it: what is left can be told in any case."""
        session = replace(self.session, user=None, database=None, application_name=None)
        return replace(
            self, summary=OUTLINED, reason=OUTLINED, session=session, culprits=(), requests=(), story=(), shares=None
        )

    def to_record(self) -> dict[str, Any]:
        """The fault as a JSON object: strings, numbers, booleans, ``None``, lists and dicts alone."""
        return {
            "id": self.id,
            "at": rfc3339(self.at),
            "cause": self.cause,
            "kind": self.kind.value,
            "severity": self.severity.value,
            "action": self.action.value,
            "repeat_of": self.repeat_of,
            "suppressed": self.suppressed,
            "summary": self.summary,
            "reason": self.reason,
            "session": _session_record(self.session),
            "message": _message_record(self.message),
            "sent_by": None if self.sent_by is None else {"pid": self.sent_by.pid, "tid": self.sent_by.tid},
            "libpq": self.libpq,
            "culprits": [_culprit_record(culprit) for culprit in self.culprits],
            "more_culprits": self.unnamed,
            "requests": [_request_record(request) for request in self.requests],
            "story": [_chapter_record(chapter) for chapter in self.story],
            "limit": None if self.limit is None else self.limit.value,
            "connections": None if self.shares is None else [_share_record(share) for share in self.shares],
            "advice": None if self.repeat_of is not None else _advice_record(self.advice),
        }


def rfc3339(at: float) -> str:
    """Seconds since the epoch as RFC 3339, UTC, with microseconds and ``Z``."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _advice_record(advice: Advice) -> dict[str, Any]:
    return {**advice._asdict(), "sources": list(advice.sources)}


def _session_record(session: SessionFacts) -> dict[str, Any]:
    return {
        "id": session.id,
        "user": session.user,
        "database": session.database,
        "application_name": session.application_name,
        "transport": session.transport,
        "client": session.client,
        "backend_pid": session.backend_pid,
        "opened_at": rfc3339(session.opened_at),
        "tls": session.tls,
    }


def _message_record(message: MessageSeen | None) -> dict[str, Any] | None:
    if message is None:
        return None
    return {
        "direction": message.direction.value,
        "type": message.type,
        "code": None if message.type is None else f"0x{ord(message.type):02x}",
        "name": message.name,
        "size": message.size,
    }


def _culprit_record(culprit: Culprit) -> dict[str, Any]:
    return {
        "role": culprit.role.value,
        "pid": culprit.pid,
        "tid": culprit.tid,
        "evidence": culprit.evidence.value,
        "tid_evidence": None if culprit.tid_evidence is None else culprit.tid_evidence.value,
        "process": _process_record(culprit.process),
        "runtime": _runtime_record(culprit.runtime),
        "thread_name": culprit.thread_name,
        "system_call": culprit.system_call,
        "stack": None if culprit.stack is None else [frame._asdict() for frame in culprit.stack],
        "stack_problem": culprit.stack_problem,
        "declared": None if culprit.declared is None else dict(culprit.declared),
    }


def _process_record(process: Process | None) -> dict[str, Any] | None:
    if process is None:
        return None
    return {
        "name": process.name,
        "cmdline": list(process.cmdline),
        "ppid": process.ppid,
        "namespace_pid": process.namespace_pid,
        "started_at": rfc3339(process.started_at),
    }


def _runtime_record(runtime: Runtime | None) -> dict[str, Any] | None:
    if runtime is None or runtime.language is None:
        return None
    return {
        "language": runtime.language.value,
        "server": None if runtime.server is None else runtime.server.value,
        "libraries": sorted(library.value for library in runtime.libraries),
    }


def _chapter_record(chapter: Chapter) -> dict[str, Any]:
    return {
        "event": chapter.event.value,
        "at": None if chapter.at is None else rfc3339(chapter.at),
        "pid": chapter.pid,
        "from": chapter.parent,
        "evidence": chapter.evidence.value,
    }


def _share_record(share: Share) -> dict[str, Any]:
    return {
        "pid": None if share.process is None else share.process.pid,
        "process": _process_record(share.process),
        "count": share.connections,
        "idle": share.idle,
        "idle_in_transaction": share.idle_in_transaction,
    }


def _request_record(request: Request) -> dict[str, Any]:
    return {
        "n": request.n,
        "at": rfc3339(request.at),
        "messages": request.messages,
        "sql": request.sql,
        "pid": request.pid,
        "tid": request.tid,
        "evidence": None if request.evidence is None else request.evidence.value,
        "state": request.state.value,
    }
