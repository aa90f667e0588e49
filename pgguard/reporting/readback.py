"""A fault from its record: what :func:`pgguard.reporting.record.to_record` has written, read back.

A file of faults may be old, cut, or somebody's own work. So whatever isn't there, or isn't what it ought to be, is
taken for unknown; only without a number, a time, a kind and a severity there is no fault.
"""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, TypeVar

from pgguard.attribution.evidence import Container, Evidence, Pod, Process
from pgguard.attribution.findings import Share
from pgguard.attribution.frames import Frame
from pgguard.attribution.runtime import Language, Library, Runtime, Server
from pgguard.faults.advice.tracing import Tracing
from pgguard.faults.catalogue import CATALOGUE, Advice, Severity
from pgguard.faults.fault import Chapter, Culprit, Event, Fault, Request, Role, SessionFacts, Spread
from pgguard.faults.policy import Action
from pgguard.faults.sql import SqlText
from pgguard.identity import Sender
from pgguard.session.verdicts import Direction, Kind, Limit, MessageSeen, Party, RequestState

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_Named = TypeVar("_Named", bound=StrEnum)
_Made = TypeVar("_Made")

MOST: Final = 10**12
"""A number that is larger counts nothing."""
_CLOCK_TICKS: Final = 100
"""A second has so many: ``sysconf(_SC_CLK_TCK)`` of every Linux."""


class NoRecordError(ValueError):
    """It is no record of a fault; the message is a clause that says why."""


def from_record(record: Mapping[str, Any]) -> Fault:
    """The fault that a record tells of.

    Its summary has the place in the application in it, which isn't told apart, and its requests' SQL is what may be
    shown of it.

    Raises:
        NoRecordError: There is no fault in it.
    """
    number, at, kind, severity = essentials(record)
    repeat_of, advice = number_of(record.get("repeat_of")), _object(record.get("advice"))
    summary = text_of(record.get("summary"))
    return Fault(
        id=number,
        at=at,
        kind=kind,
        severity=severity,
        action=_named(Action, record.get("action")) or Action.LOGGED,
        repeat_of=repeat_of,
        suppressed=number_of(record.get("suppressed")) or 0,
        summary=CATALOGUE[kind].title if summary is None else summary,
        reason=text_of(record.get("reason")) or "",
        session=session_of(record, at),
        message=_message(_object(record.get("message"))),
        libpq=text_of(record.get("libpq")),
        culprits=_each(record.get("culprits"), _culprit),
        requests=_each(record.get("requests"), _request),
        advice=CATALOGUE[kind].advice if advice is None else _advice(advice),
        story=_each(record.get("story"), _chapter),
        shares=None if record.get("connections") is None else _each(record["connections"], _share),
        limit=_named(Limit, record.get("limit")),
        unnamed=number_of(record.get("more_culprits")) or 0,
        by=_named(Party, record.get("by")) or Party.CLIENT,
        over=record.get("over") is True,
        sent_by=_sender(_object(record.get("sent_by"))),
        cause=number_of(record.get("cause")) or 0,
        spread=_spread(_object(record.get("so_far")), at),
        tracing=_tracing(_object(record.get("tracing"))),
        run=text_of(record.get("run")),
    )


def essentials(record: Mapping[str, Any]) -> tuple[int, float, Kind, Severity]:
    """What every record has: its number, its time in seconds since the epoch, its kind and its severity.

    Raises:
        NoRecordError: It doesn't.
    """
    number, at = number_of(record.get("id")), time_of(record.get("at"))
    kind, severity = _named(Kind, record.get("kind")), _named(Severity, record.get("severity"))
    if number is None:
        raise NoRecordError(_lacks(record, "id"))
    if at is None:
        raise NoRecordError(_lacks(record, "at"))
    if kind is None:
        raise NoRecordError(_lacks(record, "kind"))
    if severity is None:
        raise NoRecordError(_lacks(record, "severity"))
    return number, at, kind, severity


def _lacks(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if value is None:
        return f"it has no {key!r}"
    if key == "kind" and isinstance(value, str):
        return f"there is no kind of fault {value[:40]!r} in this version of pgguard"
    return f"its {key!r} makes no sense"


def text_of(value: object) -> str | None:
    """A text; ``None`` if it is none."""
    return value if isinstance(value, str) else None


def number_of(value: object) -> int | None:
    """A number that counts something, or names it; ``None`` if it is none."""
    return value if type(value) is int and 0 <= value <= MOST else None


def time_of(value: object) -> float | None:
    """Seconds since the epoch of a time in RFC 3339; ``None`` if it is none."""
    if not isinstance(value, str):
        return None
    try:
        time = datetime.fromisoformat(value)
        seconds = (time if time.tzinfo is not None else time.replace(tzinfo=UTC)).timestamp()
        # It is going to be shown in UTC: at either end of the calendar that can be another year.
        datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError):
        return None
    return seconds


def process_of(pid: int | None, value: object) -> Process | None:
    """The process of this pid, of which a record says something; ``None`` if it doesn't."""
    said = _object(value)
    if pid is None or said is None:
        return None
    started_at, cmdline = time_of(said.get("started_at")) or 0.0, said.get("cmdline")
    return Process(
        pid=pid,
        started=round(started_at * _CLOCK_TICKS),
        started_at=started_at,
        name=text_of(said.get("name")) or "",
        cmdline=tuple(one for one in cmdline if isinstance(one, str)) if isinstance(cmdline, list) else (),
        ppid=number_of(said.get("ppid")),
        namespace_pid=number_of(said.get("namespace_pid")),
        container=_container(_object(said.get("container"))),
        pod=_pod(_object(said.get("pod"))),
    )


def _container(said: dict[str, Any] | None) -> Container | None:
    number = None if said is None else text_of(said.get("id"))
    return None if said is None or number is None else Container(number, text_of(said.get("runtime")))


def _pod(said: dict[str, Any] | None) -> Pod | None:
    return None if said is None else Pod(*(text_of(said.get(key)) for key in Pod._fields))


def session_of(record: Mapping[str, Any], at: float) -> SessionFacts:
    """The session of a record that has been made at this time: number 0 if it doesn't say which."""
    said = _object(record.get("session")) or {}
    opened_at = time_of(said.get("opened_at"))
    return SessionFacts(
        id=number_of(said.get("id")) or 0,
        user=text_of(said.get("user")),
        database=text_of(said.get("database")),
        application_name=text_of(said.get("application_name")),
        transport="unix" if said.get("transport") == "unix" else "tcp",
        client=text_of(said.get("client")),
        backend_pid=number_of(said.get("backend_pid")),
        opened_at=at if opened_at is None else opened_at,
        tls=said.get("tls") is True,
        through=text_of(said.get("through")),
    )


def _object(value: object) -> dict[str, Any] | None:
    return value if isinstance(value, dict) else None


def _each(values: object, make: Callable[[dict[str, Any]], _Made | None]) -> tuple[_Made, ...]:
    if not isinstance(values, list):
        return ()
    made = (make(value) for value in values if isinstance(value, dict))
    return tuple(one for one in made if one is not None)


def _named(names: type[_Named], value: object) -> _Named | None:
    return next((name for name in names if name == value), None)


def _message(said: dict[str, Any] | None) -> MessageSeen | None:
    direction = None if said is None else _named(Direction, said.get("direction"))
    if said is None or direction is None:
        return None
    name = text_of(said.get("name")) or "a message of unknown type"
    return MessageSeen(direction, text_of(said.get("type")), name, number_of(said.get("size")) or 0)


def _sender(said: dict[str, Any] | None) -> Sender | None:
    pid = None if said is None else number_of(said.get("pid"))
    return None if said is None or pid is None else Sender(pid, number_of(said.get("tid")))


def _culprit(said: dict[str, Any]) -> Culprit | None:
    role = _named(Role, said.get("role"))
    if role is None:
        return None
    pid, declared, stack = number_of(said.get("pid")), _object(said.get("declared")), said.get("stack")
    texts = {key: value for key, value in (declared or {}).items() if isinstance(value, str)}
    return Culprit(
        role=role,
        pid=pid,
        tid=number_of(said.get("tid")),
        evidence=_named(Evidence, said.get("evidence")) or Evidence.UNKNOWN,
        process=process_of(pid, said.get("process")),
        tid_evidence=_named(Evidence, said.get("tid_evidence")),
        thread_name=text_of(said.get("thread_name")),
        system_call=text_of(said.get("system_call")),
        stack=None if stack is None else _each(stack, _frame),
        stack_problem=text_of(said.get("stack_problem")),
        runtime=_runtime(_object(said.get("runtime"))),
        declared=texts or None,
    )


def _frame(said: dict[str, Any]) -> Frame:
    file, function = text_of(said.get("file")) or "", text_of(said.get("function")) or ""
    return Frame(function, file, number_of(said.get("line")) or 0, said.get("application") is True)


def _runtime(said: dict[str, Any] | None) -> Runtime | None:
    language = None if said is None else _named(Language, said.get("language"))
    if said is None or language is None:
        return None
    names = said.get("libraries")
    libraries = [_named(Library, name) for name in names] if isinstance(names, list) else []
    known = frozenset(library for library in libraries if library is not None)
    return Runtime(language, _named(Server, said.get("server")), known)


def _request(said: dict[str, Any]) -> Request | None:
    n, at, state = number_of(said.get("n")), time_of(said.get("at")), _named(RequestState, said.get("state"))
    if n is None or at is None or state is None:
        return None
    sql, at_rest = text_of(said.get("sql")), said.get("at_rest")
    return Request(
        n=n,
        at=at,
        messages=text_of(said.get("messages")) or "",
        text=SqlText.of(sql),
        pid=number_of(said.get("pid")),
        tid=number_of(said.get("tid")),
        evidence=_named(Evidence, said.get("evidence")),
        state=state,
        at_rest=at_rest if isinstance(at_rest, bool) else None,
    )


def _chapter(said: dict[str, Any]) -> Chapter | None:
    event, pid, stack = _named(Event, said.get("event")), number_of(said.get("pid")), said.get("stack")
    if event is None or pid is None:
        return None
    return Chapter(
        event=event,
        at=time_of(said.get("at")),
        pid=pid,
        parent=number_of(said.get("from")),
        evidence=_named(Evidence, said.get("evidence")) or Evidence.UNKNOWN,
        stack=None if stack is None else _each(stack, _frame),
    )


def _share(said: dict[str, Any]) -> Share:
    process = process_of(number_of(said.get("pid")), said.get("process"))
    count, idle = number_of(said.get("count")) or 0, number_of(said.get("idle")) or 0
    return Share(process, count, idle, number_of(said.get("idle_in_transaction")) or 0)


def _spread(said: dict[str, Any] | None, at: float) -> Spread | None:
    if said is None:
        return None
    times, sessions, processes = (number_of(said.get(key)) or 0 for key in ("times", "sessions", "processes"))
    since = time_of(said.get("since"))
    return Spread(times, sessions, processes, at if since is None else since)


def _advice(said: dict[str, Any]) -> Advice:
    title, advised = text_of(said.get("title")) or "", text_of(said.get("text")) or ""
    return Advice(title, advised, text_of(said.get("code")), _texts(said.get("sources")))


def _tracing(said: dict[str, Any] | None) -> Tracing | None:
    if said is None:
        return None
    return Tracing(text_of(said.get("text")) or "", text_of(said.get("code")) or "", _texts(said.get("sources")))


def _texts(values: object) -> tuple[str, ...]:
    return tuple(value for value in values if isinstance(value, str)) if isinstance(values, list) else ()
