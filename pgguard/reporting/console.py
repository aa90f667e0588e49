"""The report for people: each fault on the terminal as it happens, in the manner of a ThreadSanitizer report.

Both sides of it, how the socket came to be shared, what went on before, what to change; and a line beginning with
``SUMMARY: pgguard:`` that is always in one piece and plain, to be found with grep.

What processes call themselves, and what they send, is other people's text: everything passes through
:func:`~pgguard.faults.text.printable`, so that no escape sequence reaches the terminal.
"""

from __future__ import annotations

import contextlib
import io
import os
import queue
import re
import select
import textwrap
import threading
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from pgguard.attribution.evidence import Evidence
from pgguard.faults.catalogue import CATALOGUE, Severity
from pgguard.faults.fault import Culprit, Fault, Request, Role, rfc3339
from pgguard.faults.policy import Action
from pgguard.faults.text import listed, named, printable, shorten
from pgguard.reporting.sinks import SinkError
from pgguard.session.verdicts import OUTSTANDING, Direction, Kind, Party, RequestState

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pgguard.attribution.findings import Share
    from pgguard.faults.catalogue import Advice
    from pgguard.faults.fault import SessionFacts

BACKLOG: Final = 256
"""Reports that wait to be printed, at most."""
CLOSE_DEADLINE: Final = 2.0
"""Seconds that closing waits for standard error to take what is left."""
CROWD: Final = 16
"""Reports that wait to be printed from which on a fault is printed as its summary line alone."""
SHARE: Final = 0.2
"""Of a processor, what it takes at most to make reports, each of which takes some 10 ms: the relay's thread shares the
interpreter with the one that makes them."""
PLAIN_WIDTH: Final = 120
"""Columns where standard error is not a terminal, unless ``COLUMNS`` says otherwise."""

_COLUMNS: Final = re.compile(r"[1-9][0-9]{0,8}")
_WIDEST: Final = 1000
"""Columns, at most: lines are filled up to there while they are made."""
_TRAILING_SPACE: Final = re.compile(r" +$", re.MULTILINE)
_SQL_LENGTH: Final = 200
_COMMAND_LENGTH: Final = 160
_FRAMES: Final = 8
"""Calls of a stack that are printed, the innermost ones."""

_ROWS: Final = 16
"""Processes whose connections are printed, those with the most of them."""

_STYLES: Final = {Severity.ERROR: "bold red", Severity.WARNING: "bold yellow", Severity.INFO: "bold cyan"}

_ROLES: Final = {
    Role.INTRUDER: "Intruder",
    Role.CLOSER: "Ended by",
    Role.REQUESTER: "Used by",
    Role.OWNER: "Opened by",
    Role.HOLDER: "Also open in",
}

_EVIDENCE: Final = {
    Evidence.KERNEL_SENDER: "the kernel named it as the sender",
    Evidence.SOLE_HOLDER: "the only process with the socket open",
    Evidence.THREAD_SAMPLE: "seen waiting on the socket",
    Evidence.SOCKET_HOLDER: "has, or had, the socket open",
    Evidence.ONLY_THREAD: "its only thread",
    Evidence.DECLARED: "by its own account",
    Evidence.UNKNOWN: "not known for certain",
}

_ACTIONS: Final = {
    Action.LOGGED: "logged, the session goes on",
    Action.REJECTED: "session rejected",
    Action.DROPPED: "message dropped, the session goes on",
}
_LOGGED_AND_OVER: Final = "logged, the session has ended"


def summary_line(fault: Fault) -> str:
    """The line for grep: ``SUMMARY: pgguard: KIND: …``, with the fault's number and, for a repeat, of which.

    Of a stranger of whom no process is known, as of a port scan from elsewhere, it says the address.
    """
    number = f"fault {fault.id}" if fault.repeat_of is None else f"fault {fault.id}, again {fault.repeat_of}"
    if fault.suppressed:
        number += f", {fault.suppressed} more not printed"
    session = f"session {fault.session.id}"
    if fault.by is Party.STRANGER and not fault.culprits and fault.session.client is not None:
        session += f" from {fault.session.client}"
    return printable(f"SUMMARY: pgguard: {fault.kind}: {fault.summary} ({number}, {session})")


def render(fault: Fault) -> RenderableType:
    """The report of a fault that is not a repeat, without its summary line."""
    style = _STYLES[fault.severity]
    title = CATALOGUE[fault.kind].title
    head = Text.assemble((f"pgguard: {fault.severity.upper()}: {fault.kind}", style), f": {title}")
    done = _LOGGED_AND_OVER if fault.over and fault.action is Action.LOGGED else _ACTIONS[fault.action]
    what = f"{fault.summary} ({rfc3339(fault.at)}; {done})"
    parts: list[RenderableType] = [head, _indented(_text(what))]
    parts.extend(_section("Who", _sides(fault)))
    parts.extend(_section(f"Session {fault.session.id}", [_text(_session(fault.session))]))
    lineage = fault.shares is None and len({c.pid for c in fault.culprits if c.process is not None}) > 1
    if lineage:
        parts.extend(_section("How the socket came to be shared", _lineage(fault)))
    if fault.requests:
        parts.extend(_section("Recent requests", [_timeline(fault)]))
    if fault.libpq is not None:
        parts.extend(_section("What libpq prints for this, to search logs for", [_text(fault.libpq)]))
    if fault.shares:
        parts.extend(_section("Connections that count and go through this guard", [_shares(fault.shares)]))
    parts.extend(_section("What to change", _advice(fault.advice)))
    return Group(*parts)


def print_fault(console: Console, fault: Fault) -> None:
    """Print a fault: a report and its summary line, or for a repeat and for information the summary line alone."""
    if fault.repeat_of is None and fault.severity is not Severity.INFO:
        console.rule(style="dim", characters="=")
        console.print(render(fault), highlight=False, crop=False)
        console.print()
    # Neither wrapped nor cropped nor coloured, whatever the width.
    console.out(summary_line(fault), highlight=False)


def _section(title: str, body: list[RenderableType]) -> Iterator[RenderableType]:
    yield Text("")
    yield _indented(Text(f"{printable(title)}:", style="bold"))
    # What is not to be wrapped is not to be cropped either, as padding does.
    yield from (part if isinstance(part, Text) and part.no_wrap else _indented(part, 4) for part in body)


def _indented(part: RenderableType, by: int = 2) -> RenderableType:
    return Padding(part, (0, 0, 0, by))


def _text(text: str, style: str = "") -> Text:
    return Text(printable(text), style=style, overflow="fold")


def _sides(fault: Fault) -> list[RenderableType]:
    """Who did what, one after the other, each with how that is known."""
    sides: list[RenderableType] = []
    if fault.by is Party.SERVER:
        sides.append(_text("The server, or what stands between it and the guard; nobody on the client's side."))
    for culprit in fault.culprits:
        if culprit.role is Role.HOLDER:
            continue
        sides.append(_text(f"{_ROLES[culprit.role]}: {_culprit(culprit)}"))
        sides.extend(_indented(_text(deed)) for deed in _deeds(fault, culprit))
    holders = [_who(culprit) for culprit in fault.culprits if culprit.role is Role.HOLDER]
    if holders and fault.shares is None:  # otherwise there is a table of them
        sides.append(_text(f"{_ROLES[Role.HOLDER]}: {listed(holders)}"))
    if fault.unnamed and fault.shares is None:
        sides.append(_text(f"And {fault.unnamed} more"))
    if not sides:
        sides.append(_text("not known: the kernel named no sender, and no process was found to have the socket open"))
    return sides


def _deeds(fault: Fault, culprit: Culprit) -> Iterator[str]:
    message = fault.message
    if message is not None and message.direction is Direction.FRONTEND and _sent_it(fault, culprit):
        yield f"sent {message.name}, {message.size} bytes, at {_clock(fault.at)}"
    own = [request for request in fault.requests if request.pid == culprit.pid]
    if culprit.role is Role.REQUESTER:
        told = [request for request in own if request.state in OUTSTANDING]
    else:
        told = own[-1:] if culprit.role is Role.INTRUDER and not _sent_it(fault, culprit) else []
    for request in told:
        yield f"its request {request.n}, sent at {_clock(request.at)}, was {_STATES[request.state]}"
    process = culprit.process
    if process is not None and culprit.role is not Role.OWNER:
        command = " ".join(process.cmdline).strip() or process.name
        yield f"command: {shorten(command, _COMMAND_LENGTH)}"
    if process is not None and process.namespace_pid is not None:
        yield f"in its own container it is pid {process.namespace_pid}"
    if culprit.system_call is not None:
        # Of an unread answer it is told where its client is, whatever it waits for there.
        waiting = "" if fault.kind is Kind.UNREAD_ANSWER else ", waiting for this connection"
        yield f"blocked in {culprit.system_call}{waiting}"
    for n, frame in enumerate((culprit.stack or ())[:_FRAMES]):
        yield f"#{n} {frame.function} {frame.file}:{frame.line}"
    if culprit.stack_problem is not None:
        yield f"no stack: {culprit.stack_problem}"
    for key, value in (culprit.declared or {}).items():
        yield f"{key}: {value}"


def _sent_it(fault: Fault, culprit: Culprit) -> bool:
    """Whether a culprit, in this role, is the one that sent the message."""
    sender = fault.sent_by
    if sender is None or culprit.role not in (Role.INTRUDER, Role.REQUESTER, Role.CLOSER):
        return culprit.role is Role.INTRUDER
    return culprit.pid == sender.pid and (sender.tid is None or culprit.tid in (None, sender.tid))


_STATES: Final = {
    RequestState.WAITING: "waiting for its answer",
    RequestState.ANSWERING: "being answered",
    RequestState.ANSWERED: "answered",
    RequestState.FAILED: "failed",
    RequestState.SKIPPED: "skipped",
}


def _culprit(culprit: Culprit) -> str:
    if culprit.evidence is Evidence.DECLARED:
        return f"a client that can't be looked at: {_EVIDENCE[culprit.evidence]}"
    if culprit.pid is None:
        return "not known which process"
    then = "at that time, " if culprit.role is Role.OWNER else ""
    thread = ""
    if culprit.tid_evidence not in {None, culprit.evidence, Evidence.ONLY_THREAD}:
        thread = f"; the thread: {_EVIDENCE[culprit.tid_evidence]}"
    return f"{_who(culprit)}: {then}{_EVIDENCE[culprit.evidence]}{thread}"


def _who(culprit: Culprit) -> str:
    if culprit.pid is None:
        return "a process not known"
    who = named(culprit.pid, culprit.process)
    if culprit.tid is None or (culprit.tid == culprit.pid and culprit.tid_evidence is Evidence.ONLY_THREAD):
        return who
    name = "" if culprit.thread_name is None else f' "{culprit.thread_name}"'
    return f"{who}, thread {culprit.tid}{name}"


def _session(session: SessionFacts) -> str:
    user = "not logged in" if session.user is None else f"user {session.user}"
    database = "" if session.database is None else f", database {session.database}"
    application = "" if not session.application_name else f', application_name "{session.application_name}"'
    transport = "a Unix socket" if session.transport == "unix" else "TCP"
    client = "" if session.client is None else f" from {session.client}"
    backend = "" if session.backend_pid is None else f", backend pid {session.backend_pid}"
    tls = " with TLS" if session.tls else ""
    return f"{user}{database}{application}, over {transport}{tls}{client}{backend}, opened {rfc3339(session.opened_at)}"


def _lineage(fault: Fault) -> list[RenderableType]:
    """The processes as a forest of parents and children."""
    processes = {c.process.pid: c.process for c in fault.culprits if c.process is not None}
    owner = next((c.pid for c in fault.culprits if c.role is Role.OWNER), None)
    holding = {c.pid for c in fault.culprits if c.role is Role.HOLDER}
    trees: dict[int, Tree] = {}
    roots: list[RenderableType] = []
    for process in sorted(processes.values(), key=lambda p: (p.started, p.pid)):
        parent = None if process.ppid is None else trees.get(process.ppid)
        facts = [f"started {_clock(process.started_at)}"]
        if process.pid == owner:
            facts.append(f"opened the connection {_clock(fault.session.opened_at)}")
        elif parent is not None:
            facts.append("got the socket with the fork")
        if process.pid in holding:
            facts.append("has it open")
        child = "" if process.ppid is None else f", child of {process.ppid}"
        label = _text(f"{named(process.pid, process)}{child}: {', '.join(facts)}")
        if parent is None:
            trees[process.pid] = Tree(label, guide_style="dim")
            roots.append(trees[process.pid])
        else:
            trees[process.pid] = parent.add(label)
    return roots


def _shares(shares: Sequence[Share]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for share in shares[:_ROWS]:
        who = "not known" if share.process is None else named(share.process.pid, share.process)
        doing = [f"{share.idle} idle"] if share.idle else []
        doing += [f"{share.idle_in_transaction} idle in a transaction"] if share.idle_in_transaction else []
        table.add_row(_text(str(share.connections)), _text(": ".join([who, *([listed(doing)] if doing else [])])))
    if more := shares[_ROWS:]:
        table.add_row(_text(str(sum(share.connections for share in more))), _text(f"{len(more)} other processes"))
    return table


def _advice(advice: Advice) -> list[RenderableType]:
    """Prose, code to be pasted, and where that is from."""
    parts: list[RenderableType] = [_text(f"{advice.title}. {advice.text}")]
    if advice.code is not None:
        code = textwrap.indent(advice.code.rstrip(), " " * 6)
        parts += [Text(""), Text(code, no_wrap=True, overflow="ignore"), Text("")]
    parts.extend(_text(f"See {source}", style="dim") for source in advice.sources)
    return parts


def _timeline(fault: Fault) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", no_wrap=True)
    for _ in range(4):
        table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for request in fault.requests:
        table.add_row(
            _text(f"#{request.n}"),
            _text(_clock(request.at)),
            _text(_sent_by(request)),
            _text(shorten(request.messages, 12)),
            _text(request.state, style="bold" if request.state in OUTSTANDING else ""),
            _text("" if request.sql is None else shorten(" ".join(request.sql.split()), _SQL_LENGTH)),
        )
    return table


def _sent_by(request: Request) -> str:
    if request.pid is None:
        return ""
    return f"pid {request.pid}" if request.tid is None else f"pid {request.pid}, thread {request.tid}"


def _clock(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%H:%M:%S.%f")


def wanted_width() -> int | None:
    """How many columns ``COLUMNS`` asks for; ``None`` if it doesn't, or not in a number."""
    columns = os.environ.get("COLUMNS", "")
    return min(int(columns), _WIDEST) if _COLUMNS.fullmatch(columns) else None


class ConsoleSink:
    """Prints faults to a file descriptor, from a thread of its own.

    A terminal or a pipe that nobody reads thus holds up no session. Faults for which there is no room in the backlog
    are counted, and how many they were is printed as soon as it can be. When many come at once, a few reports are
    printed, and summary lines of the others.

    Args:
        fd: Where to print; it is not closed.
        width: Columns; by default those of the terminal, or 120 where there is none.
        wait: Begin the thread, and print, at :meth:`start`, and not at once.
    """

    def __init__(self, fd: int, *, width: int | None = None, wait: bool = False) -> None:
        self._fd = fd
        self._terminal = os.isatty(fd)
        self._buffer = io.StringIO()
        self._console = Console(
            file=self._buffer,
            force_terminal=self._terminal,
            width=width or (None if self._terminal else wanted_width() or PLAIN_WIDTH),
            legacy_windows=False,
        )
        self._queue: queue.Queue[Fault | str | None] = queue.Queue(BACKLOG)
        self._dropped = 0
        self._dropped_said = 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pgguard console", daemon=True)
        if not wait:
            self.start()

    def start(self) -> None:
        """Begin to print, unless that has been done."""
        if self._thread.ident is None:
            self._thread.start()

    def record(self, fault: Fault) -> None:
        """Have a fault printed; returns at once.

        Raises:
            SinkError: Printing has failed for good: the terminal was hung up, or nobody can read the pipe any more.
        """
        if self._thread.ident is not None and not self._thread.is_alive():
            raise SinkError("reports can't be printed any more")
        self._put(summary_line(fault) if self._queue.qsize() >= CROWD else fault)

    def say(self, text: str) -> None:
        """Have a line printed as it is, between the reports; returns at once, and never raises."""
        self._put(text)

    def _put(self, what: Fault | str) -> None:
        try:
            self._queue.put_nowait(what)
        except queue.Full:
            self._dropped += 1

    def close(self, *, deadline: float = CLOSE_DEADLINE) -> None:
        """Wait until everything is printed, ``deadline`` seconds at most; what is left then is not printed."""
        until = time.monotonic() + deadline
        self._closing.set()
        self.start()
        try:
            self._queue.put(None, timeout=deadline if self._thread.is_alive() else 0)
        except queue.Full:
            return
        self._thread.join(max(0.0, until - time.monotonic()))

    def _run(self) -> None:
        # EPIPE, EIO after a hangup, EBADF: there is nobody left to print for.
        with contextlib.suppress(OSError):
            while (what := self._queue.get()) is not None:
                began = time.thread_time()
                try:
                    self._print(what)
                except Exception as error:
                    self._buffer.truncate(self._buffer.seek(0))
                    name = type(error).__name__
                    self._console.out(f"pgguard: a report can't be printed in full: {name}", highlight=False)
                    if isinstance(what, Fault):
                        with contextlib.suppress(Exception):
                            print_fault(self._console, what.outlined())
                self._flush()
                if isinstance(what, Fault):
                    self._closing.wait((time.thread_time() - began) * (1 / SHARE - 1))
            self._flush()

    def _print(self, what: Fault | str) -> None:
        if isinstance(what, str):
            self._buffer.write(f"{what}\n")
        else:
            print_fault(self._console, what)

    def _flush(self) -> None:
        if unsaid := self._dropped - self._dropped_said:
            self._console.out(f"pgguard: {unsaid} reports were left out, as nobody read those before", highlight=False)
            self._dropped_said += unsaid
        text = self._buffer.getvalue()
        self._buffer.seek(0)
        self._buffer.truncate()
        if not self._terminal:
            text = _TRAILING_SPACE.sub("", text)
        data = text.encode("utf-8", "replace")
        while data:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:
                # Whoever shares the descriptor has made it non-blocking.
                ready = select.poll()
                ready.register(self._fd, select.POLLOUT)
                ready.poll()
