"""A fault, as it is recorded and reported."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

from pgguard.faults.text import redact_command

if TYPE_CHECKING:
    from pgguard.attribution.evidence import Evidence, Process
    from pgguard.faults.catalogue import Advice, Severity
    from pgguard.faults.policy import Action
    from pgguard.session.verdicts import Kind, MessageSeen, RequestState


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
    """Has its socket open."""


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
    """One process in one role; a process in two roles is there twice."""

    role: Role
    pid: int | None
    """``None`` when somebody was in this role and it is not known who."""
    tid: int | None
    evidence: Evidence
    process: Process | None


@dataclass(frozen=True, slots=True)
class Request:
    """A request of the session's recent past, its text as it may be shown."""

    n: int
    at: float
    messages: str
    sql: str | None
    pid: int | None
    tid: int | None
    state: RequestState


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: what happened, who did it, and what to change."""

    id: int
    """Counts the guard's records, from 1."""
    at: float
    """Seconds since the epoch."""
    kind: Kind
    severity: Severity
    action: Action
    repeat_of: int | None
    """The id of the first record of this kind, session and culprits; its requests are not repeated."""
    suppressed: int
    """Repeats since the last record of this fault that were counted and not recorded."""
    summary: str
    """One line: who did what to whom."""
    reason: str
    """What was seen, in the protocol's words."""
    session: SessionFacts
    message: MessageSeen | None
    libpq: str | None
    """What libpq prints for the symptom, where it has a text for it."""
    culprits: tuple[Culprit, ...]
    """Who used the connection out of turn or ended it first, those who only have it open last."""
    requests: tuple[Request, ...]
    """Oldest first."""
    advice: Advice

    def to_record(self) -> dict[str, Any]:
        """The fault as a JSON object: strings, numbers, booleans, ``None``, lists and dicts alone, and no passwords."""
        return {
            "id": self.id,
            "at": rfc3339(self.at),
            "kind": self.kind.value,
            "severity": self.severity.value,
            "action": self.action.value,
            "repeat_of": self.repeat_of,
            "suppressed": self.suppressed,
            "summary": self.summary,
            "reason": self.reason,
            "session": _session_record(self.session),
            "message": _message_record(self.message),
            "libpq": self.libpq,
            "culprits": [_culprit_record(culprit) for culprit in self.culprits],
            "requests": [_request_record(request) for request in self.requests],
            "advice": self.advice._asdict(),
        }


def rfc3339(at: float) -> str:
    """Seconds since the epoch as RFC 3339, UTC, with microseconds and ``Z``."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


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
        "process": _process_record(culprit.process),
        # Nothing samples threads and stacks yet: not known.
        "thread_name": None,
        "stack": None,
    }


def _process_record(process: Process | None) -> dict[str, Any] | None:
    if process is None:
        return None
    return {
        "name": process.name,
        "cmdline": redact_command(process.cmdline),
        "ppid": process.ppid,
        "started_at": rfc3339(process.started_at),
    }


def _request_record(request: Request) -> dict[str, Any]:
    return {
        "n": request.n,
        "at": rfc3339(request.at),
        "messages": request.messages,
        "sql": request.sql,
        "pid": request.pid,
        "tid": request.tid,
        "state": request.state.value,
    }
