"""A fault in words, for whatever shows it to people: who did what and how that is known, what became of it.

Plain text, which holds what others have chosen: names, command lines, comments of their SQL. Whoever shows it makes it
harmless where it is shown: on the terminal with :func:`pgguard.faults.text.printable`.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, NamedTuple

from pgguard.attribution.evidence import Evidence
from pgguard.attribution.frames import place, short_path
from pgguard.faults.causes import program
from pgguard.faults.fault import Culprit, Fault, Role
from pgguard.faults.policy import Action
from pgguard.faults.text import counted, listed, named, printable, process_label, shorten
from pgguard.reporting.record import rfc3339
from pgguard.session.verdicts import OUTSTANDING, Direction, Kind, Party, RequestState

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pgguard.attribution.evidence import Process
    from pgguard.attribution.findings import Share
    from pgguard.attribution.frames import Frame
    from pgguard.faults.fault import Request, SessionFacts, Spread

NAME_LENGTH: Final = 100
"""Characters of a name that a client has chosen. A server keeps 63 of them, but is sent as many as somebody likes."""
PLACE_LENGTH: Final = 200
"""Characters of a file's name in a stack, and of what a client says of itself."""

_COMMAND_LENGTH: Final = 160
_CONTAINER_LENGTH: Final = 12
"""Characters of a container's id: as many as docker and crictl show."""
_FRAMES: Final = 8
"""Calls of a stack that are told, the innermost ones, where none is the application's own."""
_INNERMOST: Final = 2
_OWN_FRAMES: Final = 5
"""Otherwise: so many of the innermost ones, and of the application's own."""
_REQUESTS: Final = 5
"""Requests that are told at least, the latest ones: of those before, the ones that are still to be answered."""

_ROLES: Final = {
    Role.INTRUDER: "Intruder",
    Role.CLOSER: "Ended by",
    Role.REQUESTER: "Used by",
    Role.OWNER: "Opened by",
    Role.HOLDER: "Also open in",
}
_TRESPASSES: Final = frozenset(
    {
        Kind.SHARED_BY_PROCESSES,
        Kind.SHARED_BY_THREADS,
        Kind.INHERITED_CONNECTION,
        Kind.FOREIGN_TERMINATE,
        Kind.TLS_CORRUPTION,
    }
)
"""Kinds whose intruder has no business on the connection. That of others has misused what may well be its own."""
_SENT_BY: Final = "Sent by"
_ASKED_BY: Final = "Requested by"
"""Of a connection that was refused, who wanted it."""

_EVIDENCE: Final = {
    Evidence.KERNEL_SENDER: "the kernel named it as the sender",
    Evidence.SOLE_HOLDER: "it is the only process with the socket open",
    Evidence.THREAD_SAMPLE: "it was seen waiting on the socket",
    Evidence.SOCKET_HOLDER: "it has, or had, the socket open",
    Evidence.ONLY_THREAD: "it has no other thread",
    Evidence.DECLARED: "it says so itself",
    Evidence.UNKNOWN: "this is not certain",
}
_OPENERS_EVIDENCE: Final = {
    **_EVIDENCE,
    Evidence.KERNEL_SENDER: "the kernel named it when it connected",
    Evidence.SOLE_HOLDER: "it was the only process with the socket open then",
    Evidence.THREAD_SAMPLE: "it was seen waiting on the socket then",
    Evidence.SOCKET_HOLDER: "it had the socket open then",
}
_THREADS_EVIDENCE: Final = {
    Evidence.KERNEL_SENDER: "the kernel named the thread too",
    Evidence.THREAD_SAMPLE: "the thread was seen waiting on the socket",
}
_UNIDENTIFIED: Final = "a process that could not be identified"

_ACTIONS: Final = {
    Action.LOGGED: "logged only",
    Action.REJECTED: "session rejected",
    Action.DROPPED: "message dropped",
}
_LOGGED_AND_OVER: Final = "logged only; the session has ended"

_STATES: Final = {
    RequestState.WAITING: "waiting for its answer",
    RequestState.ANSWERING: "being answered",
    RequestState.ANSWERED: "answered",
    RequestState.FAILED: "answered with an error",
    RequestState.SKIPPED: "skipped",
}


class StackLine(NamedTuple):
    """A line that tells of one call of a stack, or of several that are left out."""

    text: str
    application: bool = False
    """It is the application's own code."""
    gap: bool = False
    """It stands for calls that are left out."""


class Side(NamedTuple):
    """One of those who took part, as it is told: or a sentence about who did."""

    text: str
    """Who: ``Intruder: pid 4867 (puma: cluster worker 1): the kernel named it as the sender``."""
    facts: tuple[str, ...] = ()
    """What it did and does, a clause each."""
    culprit: Culprit | None = None
    """``None``: nobody in particular."""
    opening: tuple[Frame, ...] = ()
    """What it was doing when it opened the connection, the innermost call first, if it did and that was looked at."""

    @property
    def stack(self) -> tuple[Frame, ...]:
        """What its thread was doing, the innermost call first."""
        return () if self.culprit is None else self.culprit.stack or ()


def sides(fault: Fault) -> list[Side]:
    """Who did what, one after the other, each with how that is known."""
    told: list[Side] = []
    if fault.by is Party.SERVER:
        told.append(Side("This came from the server, or from something in front of it, and not from the client."))
    culprits = [culprit for culprit in fault.culprits if culprit.role is not Role.HOLDER]
    # Of a connection-exhaustion there is a table of those that hold others.
    holders = [one for one in fault.culprits if one.role is Role.HOLDER] if fault.shares is None else []
    holding = {holder.pid for holder in holders}
    owner = next((culprit for culprit in culprits if culprit.role is Role.OWNER), None)
    seen: set[int] = set()
    opened: set[int | None] = set()
    for culprit in culprits:
        if culprit is owner and culprit.pid in seen:
            continue
        facts = list(_deeds(fault, culprit))
        if culprit.pid is not None and culprit.pid not in seen:
            seen.add(culprit.pid)
            if owner is not None and culprit is not owner and owner.pid == culprit.pid:
                facts.append(_opened(owner, culprit))
            if culprit.pid in holding:
                facts.append("still has the connection open")
            facts += _process(culprit)
        facts += _activity(fault, culprit)
        opening: tuple[Frame, ...] = ()
        if owner is not None and culprit.pid == owner.pid and owner.pid not in opened:
            opened.add(owner.pid)
            opening = opening_stack(fault)
        told.append(Side(f"{role_of(fault, culprit)}: {_culprit(culprit)}", tuple(facts), culprit, opening))
    # Of those who do nothing with it the main thread tells nothing.
    idle = [replace(one, tid=None) if one.tid == one.pid else one for one in holders]
    others = [who(holder) for holder in idle if holder.pid not in seen]
    if others:
        told.append(Side(f"{_ROLES[Role.HOLDER]}: {listed(others)}"))
    if fault.unnamed and fault.shares is None:
        told.append(Side(f"And {counted(fault.unnamed, 'more process', 'more processes')}"))
    if not told:
        told.append(
            Side(
                "Nobody could be identified: the kernel named no sender, and no process was seen with the socket open."
            )
        )
    return told


def role_of(fault: Fault, culprit: Culprit) -> str:
    """What a culprit has to do with a fault: ``Intruder``, for example."""
    if culprit.role is Role.INTRUDER and fault.kind not in _TRESPASSES:
        return _SENT_BY
    if culprit.role is Role.OWNER and fault.kind is Kind.CONNECTION_EXHAUSTION:
        return _ASKED_BY
    return _ROLES[culprit.role]


def _opened(owner: Culprit, culprit: Culprit) -> str:
    """That a culprit is the opener as well, and how that is known."""
    thread = "" if owner.tid is None or owner.tid == culprit.tid else f" in thread {owner.tid}"
    return f"opened the connection{thread}: {_OPENERS_EVIDENCE[owner.evidence]}"


def _own_requests(fault: Fault, culprit: Culprit) -> list[Request]:
    """The requests that a culprit has sent: its thread's, where that is known."""
    own = [request for request in fault.requests if request.pid == culprit.pid and culprit.pid is not None]
    if culprit.tid is None:
        return own
    threads = {one.tid for one in fault.culprits if one.pid == culprit.pid and one.role is not Role.OWNER}
    return [one for one in own if one.tid == culprit.tid or (one.tid is None and len(threads) == 1)]


def _deeds(fault: Fault, culprit: Culprit) -> Iterator[str]:
    message = fault.message
    if message is not None and message.direction is Direction.FRONTEND and _sent_it(fault, culprit):
        yield f"sent {message.name}, {message.size} bytes, at {clock(fault.at)}"
    own = _own_requests(fault, culprit)
    if culprit.role is Role.REQUESTER:
        told = [request for request in own if request.state in OUTSTANDING]
    else:
        told = own[-1:] if culprit.role is Role.INTRUDER and not _sent_it(fault, culprit) else []
    for request in told:
        yield f"its request {request.n}, sent at {clock(request.at)}, was {_STATES[request.state]}"


def _process(culprit: Culprit) -> Iterator[str]:
    process = culprit.process
    if process is not None and culprit.role is not Role.OWNER:
        command = " ".join(process.cmdline).strip() or process.name
        if command != process_label(process):
            yield f"command: {shorten(command, _COMMAND_LENGTH)}"
    if process is not None and process.namespace_pid is not None:
        yield f"in its own container it is pid {process.namespace_pid}"
    if process is not None and (where := _where(process)):
        yield f"runs in {where}"


def _where(process: Process) -> str:
    """The container and the pod of a process; empty if none is known."""
    container, pod = process.container, process.pod
    parts = []
    if container is not None:
        runtime = "" if container.runtime is None else f" ({container.runtime})"
        parts.append(f"container {container.id[:_CONTAINER_LENGTH]}{runtime}")
    if pod is not None:
        name = f"with uid {pod.uid}" if pod.name is None else "/".join(filter(None, (pod.namespace, pod.name)))
        parts.append(f"pod {shorten(name, NAME_LENGTH)}")
    return ", ".join(parts)


def _activity(fault: Fault, culprit: Culprit) -> Iterator[str]:
    """What a thread is doing, and what a client says of itself."""
    if culprit.system_call is not None:
        # Of an unread answer it is told where its client is, whatever it waits for there.
        waiting = "" if fault.kind is Kind.UNREAD_ANSWER else ", waiting for this connection"
        yield f"blocked in {culprit.system_call}{waiting}"
    opening_shown = culprit.pid == opener_of(fault) and opening_stack(fault)
    if culprit.stack_problem is not None and not opening_shown:
        yield f"no stack: {culprit.stack_problem}"
    said = (culprit.declared or {}).items()
    pairs = [f"{shorten(key, NAME_LENGTH)}: {shorten(value, PLACE_LENGTH)}" for key, value in said]
    if pairs and culprit.evidence is not Evidence.DECLARED:
        yield f"says about itself in an SQL comment: {', '.join(pairs)}"
    else:
        yield from pairs


def _sent_it(fault: Fault, culprit: Culprit) -> bool:
    """Whether a culprit, in this role, is the one that sent the message."""
    sender = fault.sent_by
    if sender is None or culprit.role not in (Role.INTRUDER, Role.REQUESTER, Role.CLOSER):
        return culprit.role is Role.INTRUDER
    return culprit.pid == sender.pid and (sender.tid is None or culprit.tid in (None, sender.tid))


def _culprit(culprit: Culprit) -> str:
    if culprit.evidence is Evidence.DECLARED:
        return "a client whose process can't be seen from here. It says about itself:"
    if culprit.pid is None:
        return _UNIDENTIFIED
    return f"{who(culprit)}: {known_by(culprit)}"


def known_by(culprit: Culprit) -> str:
    """How a culprit is known, and its thread: ``the kernel named it as the sender``."""
    evidence = (_OPENERS_EVIDENCE if culprit.role is Role.OWNER else _EVIDENCE)[culprit.evidence]
    thread = None if culprit.tid_evidence == culprit.evidence else culprit.tid_evidence
    return evidence if thread not in _THREADS_EVIDENCE else f"{evidence}; {_THREADS_EVIDENCE[thread]}"


def who(culprit: Culprit) -> str:
    """A culprit by pid, program and thread: ``pid 4867 (puma: cluster worker 1), thread 4880 "puma srv tp 002"``."""
    if culprit.pid is None:
        return _UNIDENTIFIED
    process = named(culprit.pid, culprit.process)
    if culprit.tid is None or (culprit.tid == culprit.pid and culprit.tid_evidence is Evidence.ONLY_THREAD):
        return process
    # The main thread is called what its process is.
    named_apart = culprit.thread_name is not None and culprit.tid != culprit.pid
    name = f' "{culprit.thread_name}"' if named_apart else ""
    return f"{process}, thread {culprit.tid}{name}"


def programs(fault: Fault) -> tuple[str, str]:
    """The program of the process that did it, and of the one that opened the connection; empty if it isn't known.

    Without what tells processes apart that run the same, so that they are the same in each run of an application.
    """
    known = [(culprit.role is Role.OWNER, culprit.process) for culprit in fault.culprits if culprit.process is not None]
    doer = next((process for is_owner, process in known if not is_owner), None)
    opener = next((process for is_owner, process in known if is_owner), None)
    return ("" if doer is None else program(doer.cmdline), "" if opener is None else program(opener.cmdline))


def opener_of(fault: Fault) -> int | None:
    """The process that opened the connection."""
    return next((culprit.pid for culprit in fault.culprits if culprit.role is Role.OWNER), None)


def opening_stack(fault: Fault) -> tuple[Frame, ...]:
    """What the thread was doing that opened the connection, if that was looked at; the innermost call first."""
    return next((chapter.stack for chapter in fault.story if chapter.stack), ())


def opened_at(opening: Sequence[Frame]) -> str:
    """The heading of the stack of whoever opened the connection: ``opened at app.py:27 in connect:``."""
    where = place(opening)
    return "opened at:" if where is None else f"opened at {shorten(where, PLACE_LENGTH)}:"


def stack_lines(frames: Sequence[Frame]) -> Iterator[StackLine]:
    """The calls of a stack that tell most: the innermost ones, and the application's own, which are marked."""
    own = [n for n, frame in enumerate(frames) if frame.application][:_OWN_FRAMES]
    if own:
        shown = sorted({*range(_INNERMOST), own[0] - 1, *own} & set(range(len(frames))))
    else:
        shown = list(range(min(_FRAMES, len(frames))))
    before = -1
    for n in shown:
        if n > before + 1:
            yield StackLine(f"  … {counted(n - before - 1, 'call')} in libraries", gap=True)
        frame, before = frames[n], n
        call = f"#{n} {shorten(frame.function, NAME_LENGTH)} {shorten(short_path(frame), PLACE_LENGTH)}:{frame.line}"
        yield StackLine(f"{'>' if frame.application else ' '} {call}", application=frame.application)


def recent_requests(fault: Fault) -> list[Request]:
    """The requests that are worth telling, oldest first."""
    latest = len(fault.requests) - _REQUESTS
    return [one for n, one in enumerate(fault.requests) if n >= latest or one.state in OUTSTANDING]


def done(fault: Fault) -> str:
    """What has been done about a fault: ``logged only``."""
    return _LOGGED_AND_OVER if fault.over and fault.action is Action.LOGGED else _ACTIONS[fault.action]


def spread_words(spread: Spread) -> str:
    """How far a cause has spread: ``2 more sessions, 4 processes; 43 times since 11:52:07``."""
    parts = [counted(spread.sessions - 1, "more session")] if spread.sessions > 1 else []
    if spread.processes > 1:
        parts.append(counted(spread.processes, "process", "processes"))
    since = datetime.fromtimestamp(spread.since, UTC).strftime("%H:%M:%S")
    where = f"{', '.join(parts)}; " if parts else ""
    return f"{where}{counted(spread.times, 'time')} since {since}"


def extent(times: int, sessions: int, processes: int) -> str:
    """How often something came, and where: ``43 times in 11 sessions, 4 processes involved``; ``once``."""
    words = "once" if times == 1 else f"{times} times"
    if sessions > 1:
        words += f" in {sessions} sessions"
    if processes > 1:
        words += f", {processes} processes involved"
    return words


def session_words(session: SessionFacts) -> str:
    """What a session is known by."""
    user = "unknown user" if session.user is None else f"user {shorten(session.user, NAME_LENGTH)}"
    database = "" if session.database is None else f", database {shorten(session.database, NAME_LENGTH)}"
    name = session.application_name
    application = f', application_name "{shorten(name, NAME_LENGTH)}"' if name else ""
    transport = "a Unix socket" if session.transport == "unix" else "TCP"
    client = "" if session.client is None else f" from {session.client}"
    backend = "" if session.backend_pid is None else f", backend pid {session.backend_pid}"
    tls = " with TLS" if session.tls else ""
    through = "" if session.through is None else f", through {shorten(session.through, NAME_LENGTH)}"
    said = f"{user}{database}{application}{through}"
    return f"{said}, over {transport}{tls}{client}{backend}, opened {rfc3339(session.opened_at)}"


def share_words(share: Share) -> str:
    """Who holds connections, and what they are doing: ``pid 7 (python3 app.py): 3 idle``."""
    holder = named(share.process.pid, share.process) if share.process else "clients that could not be identified"
    doing = [f"{share.idle} idle"] if share.idle else []
    doing += [f"{share.idle_in_transaction} idle in a transaction"] if share.idle_in_transaction else []
    return ": ".join([holder, *([listed(doing)] if doing else [])])


def sent_by(request: Request) -> str:
    """Who has sent a request: empty if it isn't known."""
    if request.pid is None:
        return ""
    return f"pid {request.pid}" if request.tid is None else f"pid {request.pid}, thread {request.tid}"


def clock(at: float) -> str:
    """The time of the day, UTC, of seconds since the epoch."""
    return datetime.fromtimestamp(at, UTC).strftime("%H:%M:%S.%f")


def code_lines(code: str) -> list[str]:
    """The lines of code to be pasted; unlike all else here, they can be shown as they are."""
    return [with_tabs(line) for line in code.rstrip().split("\n")]


def with_tabs(line: str) -> str:
    """A line of code that can be shown: with its tabs, and whatever else isn't printable spelled out."""
    return "\t".join(map(printable, line.split("\t")))


def where_to_look(kind: Kind) -> str:
    """Whose logs have the text that libpq prints, which a fault's ``libpq`` is."""
    # Every driver passes the server's own error on.
    return "your logs" if kind is Kind.SESSION_STATE_LOST else "the logs of clients that use libpq"
