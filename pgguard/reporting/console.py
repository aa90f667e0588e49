"""The report for people: each cause on the terminal as it shows, in the manner of a ThreadSanitizer report.

Both sides of it, how the socket came to be shared, what went on before, what to change; and a line beginning with
``SUMMARY: pgguard:`` that is always in one piece and plain, to be found with grep. When the cause comes again there is
one such line now and then, which says how far it has spread.

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
from collections import OrderedDict, deque
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, NamedTuple

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from pgguard.attribution.evidence import Evidence
from pgguard.attribution.frames import place, short_path
from pgguard.faults.catalogue import CATALOGUE, Severity
from pgguard.faults.causes import CAUSES
from pgguard.faults.docket import EXPLAINED_BY
from pgguard.faults.fault import Culprit, Fault, Request, Role
from pgguard.faults.policy import Action
from pgguard.faults.text import counted, listed, named, printable, process_label, shorten
from pgguard.reporting.record import rfc3339
from pgguard.reporting.width import wanted_width
from pgguard.session.verdicts import OUTSTANDING, Direction, Kind, Party, RequestState

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import ConsoleOptions, RenderResult

    from pgguard.attribution.evidence import Process
    from pgguard.attribution.findings import Share
    from pgguard.attribution.frames import Frame
    from pgguard.faults.advice.tracing import Tracing
    from pgguard.faults.catalogue import Advice
    from pgguard.faults.fault import SessionFacts, Spread

BACKLOG: Final = 256
"""Reports that wait to be printed, at most."""
CLOSE_DEADLINE: Final = 2.0
"""Seconds that closing waits for standard error to take what is left."""
CROWD: Final = 16
"""Reports that wait to be printed from which on a fault is printed as its summary line alone."""
AGAIN: Final = (1.0, 10.0, 60.0, 600.0)
"""Seconds from one line about a cause to the next, the last of them for as long as it goes on."""
PATIENCE: Final = 1.0
"""Seconds for which a report waits that may be about the beginning of something graver alone, which tells of it too."""
SHARE: Final = 0.2
"""Of a processor, what it takes at most to make reports, each of which takes some 10 ms: the relay's thread shares the
interpreter with the one that makes them."""
PLAIN_WIDTH: Final = 120
"""Columns where standard error is not a terminal, unless ``COLUMNS`` says otherwise."""

_NARROWEST: Final = 40
"""Columns that a report takes at least. A narrower terminal breaks its lines itself, so that nothing is lost."""
_TREE_WIDTH: Final = 60
"""Columns from which on parents and children are shown as a tree: its branches take four for each generation."""
_SQL_WIDTH: Final = 24
"""Columns that a table of requests has left for their SQL at least: where there are fewer, each request is a block."""

_TRAILING_SPACE: Final = re.compile(r" +$", re.MULTILINE)
_SQL_LENGTH: Final = 200
_COMMAND_LENGTH: Final = 160
_NAME_LENGTH: Final = 100
"""Characters of a name that a client has chosen. A server keeps 63 of them, but is sent as many as somebody likes."""
_PLACE_LENGTH: Final = 200
"""Characters of a file's name in a stack, and of what a client says of itself."""
_TICK: Final = 0.02
"""Seconds by which a process's start, which the kernel counts in ticks, can seem to be too early."""
_FRAMES: Final = 8
"""Calls of a stack that are printed, the innermost ones, where none is the application's own."""
_INNERMOST: Final = 2
_OWN_FRAMES: Final = 5
"""Otherwise: so many of the innermost ones, and of the application's own."""

_REQUESTS: Final = 5
"""Requests that are printed at least, the latest ones: of those before, the ones that are still to be answered."""
_GIVEN: Final = 64
"""Pieces of advice that are remembered as printed."""
_GIVEN_FOR: Final = 600.0
"""Seconds for which whoever reads a report is expected to find the advice in another one."""
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

_BEGINNINGS: Final = frozenset({Kind.INHERITED_CONNECTION})
"""Kinds that are mostly followed by a graver one, which explains them: a child that has inherited a connection uses it,
and then its parent does."""
_TRESPASSES: Final = frozenset(
    {Kind.SHARED_BY_PROCESSES, Kind.SHARED_BY_THREADS, Kind.INHERITED_CONNECTION, Kind.FOREIGN_TERMINATE}
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


def summary_line(fault: Fault) -> str:
    """The line for grep: ``SUMMARY: pgguard: KIND: …``, with the fault's number; of a repeat, how far it has spread.

    Of a stranger of whom no process is known, as of a port scan from elsewhere, it says the address.
    """
    session = f"session {fault.session.id}"
    if fault.by is Party.STRANGER and not fault.culprits and fault.session.client is not None:
        session += f" from {fault.session.client}"
    if fault.repeat_of is None:
        return printable(f"SUMMARY: pgguard: {fault.kind}: {fault.headline} (fault {fault.id}, {session})")
    how_far = "" if fault.spread is None else f": {_spread(fault.spread)}"
    return printable(
        f"SUMMARY: pgguard: {fault.kind}: fault {fault.repeat_of} again{how_far} (fault {fault.id}, {session})"
    )


def _spread(spread: Spread) -> str:
    parts = [counted(spread.sessions - 1, "more session")] if spread.sessions > 1 else []
    if spread.processes > 1:
        parts.append(counted(spread.processes, "process", "processes"))
    since = datetime.fromtimestamp(spread.since, UTC).strftime("%H:%M:%S")
    where = f"{', '.join(parts)}; " if parts else ""
    return f"{where}{counted(spread.times, 'time')} since {since}"


class Given:
    """The advice that has been printed lately, so that the same isn't printed in full again."""

    def __init__(self) -> None:
        self._given: OrderedDict[tuple[str, str | None], tuple[int, str, float]] = OrderedDict()
        """By title and code: the fault that it was printed with, its text, and when."""

    def find(self, advice: Advice) -> tuple[int, str] | None:
        """The number of the fault that it was printed with, and what its text says besides."""
        number, text, since = self._given.get((advice.title, advice.code), (0, "", 0.0))
        if not number or time.monotonic() - since > _GIVEN_FOR:
            return None
        before, now = _sentences(text), _sentences(advice.text)
        new = [sentence for sentence in now if sentence not in before]
        return (number, " ".join(new)) if len(new) <= len(now) / 2 else None

    def note(self, fault: Fault) -> None:
        """Take note of a fault that is printed with its advice, unless that only refers to another one's."""
        if self.find(fault.advice) is None:
            key = (fault.advice.title, fault.advice.code)
            self._given[key] = (fault.id, fault.advice.text, time.monotonic())
            self._given.move_to_end(key)
            if len(self._given) > _GIVEN:
                self._given.popitem(last=False)


def _sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.:]) ", text)


def render(fault: Fault, given: Given | None = None) -> RenderableType:
    """The report of a fault that is not a repeat, without its summary line.

    Whatever the width, everything is there: what has no room beside something else stands below it.

    Args:
        fault: It.
        given: The advice that there is no need to print again; by default none.
    """
    style = _STYLES[fault.severity]
    title = CATALOGUE[fault.kind].title
    head = Text.assemble((f"pgguard: {fault.severity.upper()}: {fault.kind}", style), f": {title}")
    done = _LOGGED_AND_OVER if fault.over and fault.action is Action.LOGGED else _ACTIONS[fault.action]
    what = f"{fault.headline} ({rfc3339(fault.at)}; {done})"
    parts: list[RenderableType] = [head, _indented(_text(what))]
    parts.extend(_section("Who", _sides(fault)))
    parts.extend(_section(f"Session {fault.session.id}", [_text(_session(fault.session))]))
    lineage = fault.shares is None and len({c.pid for c in fault.culprits if c.process is not None}) > 1
    if lineage:
        parts.extend(_section("How the socket came to be shared", [_Lineage(fault)]))
    if fault.requests:
        latest = len(fault.requests) - _REQUESTS
        told = [one for n, one in enumerate(fault.requests) if n >= latest or one.state in OUTSTANDING]
        parts.extend(_section("Recent requests", [_Timeline(told)]))
    if fault.libpq is not None:
        # Every driver passes the server's own error on.
        whose = "your logs" if fault.kind is Kind.SESSION_STATE_LOST else "the logs of clients that use libpq"
        parts.extend(_section(f"What to look for in {whose}", [_text(fault.libpq)]))
    if fault.shares:
        parts.extend(_section("Connections through this guard that count toward the limit", [_shares(fault.shares)]))
    parts.extend(_section("What to change", _advice(fault.advice, given or Given())))
    if fault.tracing is not None:
        parts.extend(_section("To see which code it was", _tracing(fault.tracing)))
    return _AtLeast(_NARROWEST, Group(*parts))


class _AtLeast:
    """Renders something in so many columns at least."""

    def __init__(self, columns: int, part: RenderableType) -> None:
        self._columns = columns
        self._part = part

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from console.render(self._part, options.update(width=max(options.max_width, self._columns)))


def print_fault(console: Console, fault: Fault, given: Given | None = None) -> None:
    """Print a fault: a report and its summary line, or for a repeat and for information the line alone.

    Args:
        console: Where.
        fault: It.
        given: The advice that there is no need to print again: by default none. That of this fault is added.
    """
    if fault.repeat_of is None and fault.severity is not Severity.INFO:
        console.rule(style="dim", characters="=")
        console.print(render(fault, given), highlight=False, crop=False)
        console.print()
        if given is not None:
            given.note(fault)
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
        sides.append(_text("This came from the server, or from something in front of it, and not from the client."))
    culprits = [culprit for culprit in fault.culprits if culprit.role is not Role.HOLDER]
    # Of a connection-exhaustion there is a table of those that hold others.
    holders = [one for one in fault.culprits if one.role is Role.HOLDER] if fault.shares is None else []
    holding = {holder.pid for holder in holders}
    owner = next((culprit for culprit in culprits if culprit.role is Role.OWNER), None)
    told: set[int] = set()
    opened: set[int | None] = set()
    for culprit in culprits:
        if culprit is owner and culprit.pid in told:
            continue
        facts: list[str] = []
        if culprit.pid is not None and culprit.pid not in told:
            told.add(culprit.pid)
            if owner is not None and culprit is not owner and owner.pid == culprit.pid:
                facts.append(_opened(owner, culprit))
            if culprit.pid in holding:
                facts.append("still has the connection open")
            facts += _process(culprit)
        sides.append(_text(f"{_role(fault, culprit)}: {_culprit(culprit)}"))
        sides.extend(_indented(_text(line)) for line in (*_deeds(fault, culprit), *facts, *_activity(fault, culprit)))
        sides.extend(_indented(line) for line in _stack(culprit.stack or ()))
        if owner is not None and culprit.pid == owner.pid and owner.pid not in opened:
            opened.add(owner.pid)
            sides.extend(_indented(line) for line in _opened_at(fault))
    # Of those who do nothing with it the main thread tells nothing.
    idle = [replace(one, tid=None) if one.tid == one.pid else one for one in holders]
    others = [_who(holder) for holder in idle if holder.pid not in told]
    if others:
        sides.append(_text(f"{_ROLES[Role.HOLDER]}: {listed(others)}"))
    if fault.unnamed and fault.shares is None:
        sides.append(_text(f"And {fault.unnamed} more process{'' if fault.unnamed == 1 else 'es'}"))
    if not sides:
        sides.append(
            _text(
                "Nobody could be identified: the kernel named no sender, and no process was seen with the socket open."
            )
        )
    return sides


def _role(fault: Fault, culprit: Culprit) -> str:
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
        yield f"sent {message.name}, {message.size} bytes, at {_clock(fault.at)}"
    own = _own_requests(fault, culprit)
    if culprit.role is Role.REQUESTER:
        told = [request for request in own if request.state in OUTSTANDING]
    else:
        told = own[-1:] if culprit.role is Role.INTRUDER and not _sent_it(fault, culprit) else []
    for request in told:
        yield f"its request {request.n}, sent at {_clock(request.at)}, was {_STATES[request.state]}"


def _process(culprit: Culprit) -> Iterator[str]:
    process = culprit.process
    if process is not None and culprit.role is not Role.OWNER:
        command = " ".join(process.cmdline).strip() or process.name
        if command != process_label(process):
            yield f"command: {shorten(command, _COMMAND_LENGTH)}"
    if process is not None and process.namespace_pid is not None:
        yield f"in its own container it is pid {process.namespace_pid}"


def _activity(fault: Fault, culprit: Culprit) -> Iterator[str]:
    """What a thread is doing, and what a client says of itself."""
    if culprit.system_call is not None:
        # Of an unread answer it is told where its client is, whatever it waits for there.
        waiting = "" if fault.kind is Kind.UNREAD_ANSWER else ", waiting for this connection"
        yield f"blocked in {culprit.system_call}{waiting}"
    opening_shown = culprit.pid == _opener(fault) and any(chapter.stack for chapter in fault.story)
    if culprit.stack_problem is not None and not opening_shown:
        yield f"no stack: {culprit.stack_problem}"
    said = (culprit.declared or {}).items()
    pairs = [f"{shorten(key, _NAME_LENGTH)}: {shorten(value, _PLACE_LENGTH)}" for key, value in said]
    if pairs and culprit.evidence is not Evidence.DECLARED:
        yield f"says about itself in an SQL comment: {', '.join(pairs)}"
    else:
        yield from pairs


def _opened_at(fault: Fault) -> Iterator[Text]:
    """What the opener was doing when it opened the connection."""
    stack = next((chapter.stack for chapter in fault.story if chapter.stack), None)
    if stack is not None:
        where = place(stack)
        yield _text("opened at:" if where is None else f"opened at {shorten(where, _PLACE_LENGTH)}:")
        yield from _stack(stack)


def _stack(frames: Sequence[Frame]) -> Iterator[Text]:
    """The calls of a stack that tell most: the innermost ones, and the application's own, which are marked."""
    own = [n for n, frame in enumerate(frames) if frame.application][:_OWN_FRAMES]
    if own:
        shown = sorted({*range(_INNERMOST), own[0] - 1, *own} & set(range(len(frames))))
    else:
        shown = list(range(min(_FRAMES, len(frames))))
    before = -1
    for n in shown:
        if n > before + 1:
            yield _text(f"  … {counted(n - before - 1, 'call')} in libraries", style="dim")
        frame, before = frames[n], n
        call = f"#{n} {shorten(frame.function, _NAME_LENGTH)} {shorten(short_path(frame), _PLACE_LENGTH)}:{frame.line}"
        yield _text(f"> {call}", style="bold") if frame.application else _text(f"  {call}")


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
    RequestState.FAILED: "answered with an error",
    RequestState.SKIPPED: "skipped",
}


def _culprit(culprit: Culprit) -> str:
    if culprit.evidence is Evidence.DECLARED:
        return "a client whose process can't be seen from here. It says about itself:"
    if culprit.pid is None:
        return _UNIDENTIFIED
    evidence = (_OPENERS_EVIDENCE if culprit.role is Role.OWNER else _EVIDENCE)[culprit.evidence]
    thread = None if culprit.tid_evidence == culprit.evidence else culprit.tid_evidence
    known = "" if thread not in _THREADS_EVIDENCE else f"; {_THREADS_EVIDENCE[thread]}"
    return f"{_who(culprit)}: {evidence}{known}"


def _who(culprit: Culprit) -> str:
    if culprit.pid is None:
        return _UNIDENTIFIED
    who = named(culprit.pid, culprit.process)
    if culprit.tid is None or (culprit.tid == culprit.pid and culprit.tid_evidence is Evidence.ONLY_THREAD):
        return who
    # The main thread is called what its process is.
    named_apart = culprit.thread_name is not None and culprit.tid != culprit.pid
    name = f' "{culprit.thread_name}"' if named_apart else ""
    return f"{who}, thread {culprit.tid}{name}"


def _session(session: SessionFacts) -> str:
    user = "unknown user" if session.user is None else f"user {shorten(session.user, _NAME_LENGTH)}"
    database = "" if session.database is None else f", database {shorten(session.database, _NAME_LENGTH)}"
    name = session.application_name
    application = f', application_name "{shorten(name, _NAME_LENGTH)}"' if name else ""
    transport = "a Unix socket" if session.transport == "unix" else "TCP"
    client = "" if session.client is None else f" from {session.client}"
    backend = "" if session.backend_pid is None else f", backend pid {session.backend_pid}"
    tls = " with TLS" if session.tls else ""
    return f"{user}{database}{application}, over {transport}{tls}{client}{backend}, opened {rfc3339(session.opened_at)}"


class _Lineage:
    """The processes as a forest of parents and children; where that is too broad, one below the other."""

    def __init__(self, fault: Fault) -> None:
        self._fault = fault
        processes = {c.process.pid: c.process for c in fault.culprits if c.process is not None}
        self._processes = sorted(processes.values(), key=lambda process: (process.started, process.pid))
        self._owner = next((c.pid for c in fault.culprits if c.role is Role.OWNER), None)
        self._holding = {c.pid for c in fault.culprits if c.role is Role.HOLDER}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        as_tree = options.max_width >= _TREE_WIDTH
        trees: dict[int, Tree] = {}
        roots: list[Tree] = []
        for process in self._processes:
            parent = None if process.ppid is None else trees.get(process.ppid)
            label = self._label(process, forked=parent is not None, as_tree=as_tree)
            if parent is None or not as_tree:
                trees[process.pid] = Tree(label, guide_style="dim")
                roots.append(trees[process.pid])
            else:
                trees[process.pid] = parent.add(label)
        yield from roots

    def _label(self, process: Process, *, forked: bool, as_tree: bool) -> Text:
        opened_at, since = self._fault.session.opened_at, _clock(process.started_at)
        is_heir = process.pid != self._owner and forked and process.started_at >= opened_at - _TICK
        facts = [f"inherited the socket at {since}" if is_heir else f"started at {since}"]
        if process.pid == self._owner:
            facts.append(f"opened the connection at {_clock(opened_at)}")
        if process.pid in self._holding:
            facts.append("has it open")
        # The tree shows whose child it is.
        child = "" if process.ppid is None or (forked and as_tree) else f", child of {process.ppid}"
        return _text(f"{named(process.pid, process)}{child}: {', '.join(facts)}")


def _shares(shares: Sequence[Share]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for share in shares[:_ROWS]:
        who = named(share.process.pid, share.process) if share.process else "clients that could not be identified"
        doing = [f"{share.idle} idle"] if share.idle else []
        doing += [f"{share.idle_in_transaction} idle in a transaction"] if share.idle_in_transaction else []
        table.add_row(_text(str(share.connections)), _text(": ".join([who, *([listed(doing)] if doing else [])])))
    if more := shares[_ROWS:]:
        table.add_row(_text(str(sum(share.connections for share in more))), _text(f"{len(more)} other processes"))
    return table


def _advice(advice: Advice, given: Given) -> list[RenderableType]:
    """Prose, code to be pasted, and where that is from; code and URLs are never wrapped, so that they can be copied."""
    if (before := given.find(advice)) is not None:
        number, more = before
        return [_text(f"{advice.title}: see fault {number}. {more}".rstrip())]
    parts: list[RenderableType] = [_text(f"{advice.title}. {advice.text}")]
    if advice.code is not None:
        code = textwrap.indent(advice.code.rstrip(), " " * 6)
        parts += [Text(""), Text(code, no_wrap=True, overflow="ignore"), Text("")]
    parts.extend(Text(f"    See {source}", style="dim", no_wrap=True, overflow="ignore") for source in advice.sources)
    return parts


def _tracing(tracing: Tracing) -> list[RenderableType]:
    """The same on how to see which code it was."""
    code = textwrap.indent(tracing.code.rstrip(), " " * 6)
    parts: list[RenderableType] = [_text(tracing.text), Text(""), Text(code, no_wrap=True, overflow="ignore"), Text("")]
    parts.extend(Text(f"    See {source}", style="dim", no_wrap=True, overflow="ignore") for source in tracing.sources)
    return parts


class _Timeline:
    """The last requests: a table if it is broad enough, otherwise a block for each."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._rows = [(_facts(request), _sql(request)) for request in requests]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = zip(*(facts for facts, _ in self._rows), strict=True)
        widths = [max(cell_len(fact.plain) for fact in column) for column in columns]
        if sum(width + 2 for width in widths) + _SQL_WIDTH <= options.max_width:
            yield self._table(len(widths))
        else:
            yield from self._blocks()

    def _table(self, facts: int) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_column(justify="right", no_wrap=True)
        for _ in range(facts - 1):
            table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for row, sql in self._rows:
            table.add_row(*row, sql)
        return table

    def _blocks(self) -> Iterator[RenderableType]:
        for (number, *facts), sql in self._rows:
            told = Text(", ").join(fact for fact in facts if fact)
            yield Text.assemble(number, " ", told, overflow="fold")
            if sql:
                yield _indented(sql)


def _facts(request: Request) -> list[Text]:
    return [
        _text(f"#{request.n}"),
        _text(_clock(request.at)),
        _text(_sent_by(request)),
        _text(shorten(request.messages, 12)),
        _text(request.state, style="bold" if request.state in OUTSTANDING else ""),
    ]


def _sql(request: Request) -> Text:
    return _text("" if request.sql is None else shorten(" ".join(request.sql.split()), _SQL_LENGTH))


def _sent_by(request: Request) -> str:
    if request.pid is None:
        return ""
    return f"pid {request.pid}" if request.tid is None else f"pid {request.pid}, thread {request.tid}"


def _clock(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%H:%M:%S.%f")


@dataclass(slots=True)
class _Spreading:
    """A cause that has been printed, and may come again."""

    due: float
    """When the next line about it may be printed, on the monotonic clock."""
    step: int = 0
    """How many there have been."""
    latest: Fault | None = None
    """What that line is to tell of, if there is anything new."""


class _Waiting(NamedTuple):
    """A fault whose report waits for a graver one."""

    due: float
    """When it is printed, on the monotonic clock, if nothing has come by then that explains it."""
    fault: Fault

    def is_explained(self, by: Fault) -> bool:
        """Whether another fault explains it: of the same session, or of another one that the same process opened."""
        if by.kind not in EXPLAINED_BY[self.fault.kind]:
            return False
        opener = _opener(self.fault)
        return by.session.id == self.fault.session.id or (opener is not None and opener == _opener(by))


def _opener(fault: Fault) -> int | None:
    return next((culprit.pid for culprit in fault.culprits if culprit.role is Role.OWNER), None)


class ConsoleSink:
    """Prints faults to a file descriptor, from a thread of its own.

    A terminal or a pipe that nobody reads thus holds up no session. Faults for which there is no room in the backlog
    are counted, and how many they were is printed as soon as it can be; so is what could not be printed, and why: a
    disk that is full has room again some day, and a reader that has gone may come back. When many come at once, a few
    reports are printed, and summary lines of the others. Of repeats the latest of each cause is printed now and then
    (:data:`AGAIN`); those that come as the guard ends are not: its last lines tell of them. What turns out to be the
    beginning of something graver within :data:`PATIENCE` gets its summary line alone.

    Args:
        fd: Where to print; it is not closed.
        width: Columns; by default those of the terminal, or 120 where there is none.
        again: Seconds from one line about a cause to the next, the last of them for as long as it goes on.
        wait: Begin the thread, and print, at :meth:`start`, and not at once.
    """

    def __init__(
        self, fd: int, *, width: int | None = None, again: Sequence[float] = AGAIN, wait: bool = False
    ) -> None:
        self._fd = fd
        self._again = again
        self._terminal = os.isatty(fd)
        self._buffer = io.StringIO()
        self._console = Console(
            file=self._buffer,
            force_terminal=self._terminal,
            width=width or (None if self._terminal else wanted_width() or PLAIN_WIDTH),
            legacy_windows=False,
        )
        self._queue: queue.Queue[Fault | str | None] = queue.Queue(BACKLOG)
        self._spreading: OrderedDict[int, _Spreading] = OrderedDict()
        """By cause; the one first that has been quiet for longest."""
        self._waiting: deque[_Waiting] = deque()
        self._next_ones: deque[Fault | _Waiting | str | None] = deque()
        """What is to be printed before anything else; of what waits for something graver the summary line."""
        self._given = Given()
        self._dropped = 0
        self._dropped_said = 0
        self._unprinted = 0
        """Texts that could not be printed since one could."""
        self._problem = ""
        """Why."""
        self._torn = False
        """The last of them was, in part."""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pgguard console", daemon=True)
        if not wait:
            self.start()

    def __str__(self) -> str:
        return "standard error"

    def start(self) -> None:
        """Begin to print, unless that has been done."""
        if self._thread.ident is None:
            self._thread.start()

    def record(self, fault: Fault) -> None:
        """Have a fault printed; returns at once, and never raises."""
        crowded = self._queue.qsize() >= CROWD
        self._put(summary_line(fault) if crowded and fault.repeat_of is None else fault)

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
        while (what := self._next()) is not None:
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

    def _next(self) -> Fault | _Waiting | str | None:
        """What is to be printed next: waits for it. ``None``: nothing more."""
        while not self._next_ones:
            now = time.monotonic()
            due = [one for one in self._spreading.values() if one.latest is not None]
            first = min(due, key=lambda one: one.due, default=None)
            times = [one.due for one in (first, *self._waiting) if one is not None]
            if self._waiting and self._waiting[0].due <= now:
                self._next_ones.append(self._waiting.popleft().fault)
            elif first is not None and first.due <= now:
                latest, first.latest = first.latest, None
                first.step += 1
                first.due = now + self._again[min(first.step, len(self._again) - 1)]
                self._next_ones.append(latest)
            else:
                with contextlib.suppress(queue.Empty):
                    self._take(self._queue.get(timeout=None if not times else min(times) - now))
        return self._next_ones.popleft()

    def _take(self, what: Fault | str | None) -> None:
        """Take what has come: print it next, or later, or nothing of it."""
        if not isinstance(what, Fault):
            # What is said is said behind what has happened before.
            self._next_ones.extend(one.fault for one in self._waiting)
            self._waiting.clear()
            self._next_ones.append(what)
        elif not self._is_for_later(what):
            self._next_ones.extend(one for one in self._waiting if one.is_explained(what))
            self._waiting = deque(one for one in self._waiting if not one.is_explained(what))
            if what.kind in _BEGINNINGS and what.severity is not Severity.INFO:
                self._waiting.append(_Waiting(time.monotonic() + PATIENCE, what))
            else:
                self._next_ones.append(what)

    def _is_for_later(self, fault: Fault) -> bool:
        """Whether it is a repeat, which is kept until it is time for a line about its cause."""
        known = self._spreading.pop(fault.cause, None) or _Spreading(time.monotonic() + self._again[0])
        self._spreading[fault.cause] = known
        if len(self._spreading) > CAUSES:
            self._spreading.popitem(last=False)
        if fault.repeat_of is None:
            return False
        known.latest = fault
        return True

    def _print(self, what: Fault | _Waiting | str) -> None:
        if isinstance(what, str):
            self._buffer.write(f"{what}\n")
        elif isinstance(what, _Waiting):
            self._buffer.write(f"{summary_line(what.fault)}\n")
        else:
            print_fault(self._console, what, self._given)

    def _flush(self) -> None:
        if unsaid := self._dropped - self._dropped_said:
            left_out = f"{counted(unsaid, 'report')} left out, because standard error wasn't being read"
            self._console.out(f"pgguard: {left_out}", highlight=False)
            self._dropped_said += unsaid
        text = self._buffer.getvalue()
        self._buffer.seek(0)
        self._buffer.truncate()
        if not self._terminal:
            text = _TRAILING_SPACE.sub("", text)
        before = "\n" if self._torn else ""
        if self._unprinted:
            missing = counted(self._unprinted, "report or line", "reports or lines")
            before += f"pgguard: {missing} could not be printed here: {self._problem}\n"
        data = f"{before}{text}".encode("utf-8", "replace")
        left = data
        try:
            while left:
                left = self._write(left)
        except OSError as error:
            # ENOSPC, EIO after a hangup, EPIPE, EBADF
            if written := data[: len(data) - len(left)]:
                self._torn = not written.endswith(b"\n")
            self._unprinted += bool(text)
            self._problem = error.strerror or str(error)
        else:
            self._torn, self._unprinted = False, 0

    def _write(self, data: bytes) -> bytes:
        """Write some, and return the rest; waits until some can be written. Raises OSError."""
        try:
            return data[os.write(self._fd, data) :]
        except BlockingIOError:
            # Whoever shares the descriptor has made it non-blocking.
            ready = select.poll()
            ready.register(self._fd, select.POLLOUT)
            ready.poll()
            return data
