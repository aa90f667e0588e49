"""The JSON shape of a record: the one that the file of faults has, and that everything else is made of."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pgguard.attribution.evidence import Process
    from pgguard.attribution.findings import Share
    from pgguard.attribution.frames import Frame
    from pgguard.attribution.runtime import Runtime
    from pgguard.faults.advice.tracing import Tracing
    from pgguard.faults.catalogue import Advice
    from pgguard.faults.fault import Chapter, Culprit, Fault, Request, SessionFacts, Spread
    from pgguard.session.verdicts import MessageSeen


def to_record(fault: Fault) -> dict[str, Any]:
    """A fault as a JSON object: strings, numbers, booleans, ``None``, lists and dicts alone."""
    return {
        "id": fault.id,
        "at": rfc3339(fault.at),
        "run": fault.run,
        "cause": fault.cause,
        "kind": fault.kind.value,
        "severity": fault.severity.value,
        "action": fault.action.value,
        "repeat_of": fault.repeat_of,
        "suppressed": fault.suppressed,
        "so_far": None if fault.spread is None else _spread_record(fault.spread),
        "summary": fault.headline,
        "reason": fault.reason,
        "by": fault.by.value,
        "over": fault.over,
        "session": session_record(fault.session),
        "message": _message_record(fault.message),
        "sent_by": None if fault.sent_by is None else {"pid": fault.sent_by.pid, "tid": fault.sent_by.tid},
        "libpq": fault.libpq,
        "culprits": [_culprit_record(culprit) for culprit in fault.culprits],
        "more_culprits": fault.unnamed,
        "requests": [_request_record(request) for request in fault.requests],
        "story": [_chapter_record(chapter) for chapter in fault.story],
        "limit": None if fault.limit is None else fault.limit.value,
        "connections": None if fault.shares is None else [_share_record(share) for share in fault.shares],
        "advice": None if fault.repeat_of is not None else _advice_record(fault.advice),
        "tracing": None if fault.repeat_of is not None or fault.tracing is None else _tracing_record(fault.tracing),
    }


def rfc3339(at: float) -> str:
    """Seconds since the epoch as RFC 3339, UTC, with microseconds and ``Z``."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _advice_record(advice: Advice) -> dict[str, Any]:
    return {**advice._asdict(), "sources": list(advice.sources)}


def _tracing_record(tracing: Tracing) -> dict[str, Any]:
    return {**tracing._asdict(), "sources": list(tracing.sources)}


def _spread_record(spread: Spread) -> dict[str, Any]:
    return {**spread._asdict(), "since": rfc3339(spread.since)}


def session_record(session: SessionFacts) -> dict[str, Any]:
    """A session as a JSON object, of a fault or of a :class:`pgguard.proxy.overview.SessionSnapshot`."""
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
        "through": session.through,
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
        "process": process_record(culprit.process),
        "runtime": _runtime_record(culprit.runtime),
        "thread_name": culprit.thread_name,
        "system_call": culprit.system_call,
        "stack": _stack_record(culprit.stack),
        "stack_problem": culprit.stack_problem,
        "declared": None if culprit.declared is None else dict(culprit.declared),
    }


def process_record(process: Process | None) -> dict[str, Any] | None:
    """A process as a JSON object, likewise; ``None`` if it isn't known. Its pid stands beside it, in what names it."""
    if process is None:
        return None
    return {
        "name": process.name,
        "cmdline": list(process.cmdline),
        "ppid": process.ppid,
        "namespace_pid": process.namespace_pid,
        "started_at": rfc3339(process.started_at),
        "container": None if process.container is None else process.container._asdict(),
        "pod": None if process.pod is None else process.pod._asdict(),
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
        "stack": _stack_record(chapter.stack),
    }


def _stack_record(frames: tuple[Frame, ...] | None) -> list[dict[str, Any]] | None:
    return None if frames is None else [frame._asdict() for frame in frames]


def _share_record(share: Share) -> dict[str, Any]:
    return {
        "pid": None if share.process is None else share.process.pid,
        "process": process_record(share.process),
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
        "at_rest": request.at_rest,
    }
