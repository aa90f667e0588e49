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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from pgguard.faults.catalogue import CATALOGUE, Severity
from pgguard.faults.causes import CAUSES
from pgguard.faults.docket import EXPLAINED_BY
from pgguard.faults.fault import Fault, Role
from pgguard.faults.text import counted, named, printable, shorten
from pgguard.reporting.record import rfc3339
from pgguard.reporting.width import wanted_width
from pgguard.reporting.words import (
    clock,
    code_lines,
    done,
    opened_at,
    opener_of,
    recent_requests,
    sent_by,
    session_words,
    share_words,
    sides,
    spread_words,
    stack_lines,
    where_to_look,
)
from pgguard.session.verdicts import OUTSTANDING, Kind, Party

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.console import ConsoleOptions, RenderResult

    from pgguard.attribution.evidence import Process
    from pgguard.attribution.findings import Share
    from pgguard.attribution.frames import Frame
    from pgguard.faults.advice.tracing import Tracing
    from pgguard.faults.catalogue import Advice
    from pgguard.faults.fault import Request

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
_TICK: Final = 0.02
"""Seconds by which a process's start, which the kernel counts in ticks, can seem to be too early."""
_GIVEN: Final = 64
"""Pieces of advice that are remembered as printed."""
_GIVEN_FOR: Final = 600.0
"""Seconds for which whoever reads a report is expected to find the advice in another one."""
_ROWS: Final = 16
"""Processes whose connections are printed, those with the most of them."""

_STYLES: Final = {Severity.ERROR: "bold red", Severity.WARNING: "bold yellow", Severity.INFO: "bold cyan"}

_BEGINNINGS: Final = frozenset({Kind.INHERITED_CONNECTION})
"""Kinds that are mostly followed by a graver one, which explains them: a child that has inherited a connection uses it,
and then its parent does."""


def summary_line(fault: Fault) -> str:
    """The line for grep: ``SUMMARY: pgguard: KIND: …``, with the fault's number; of a repeat, how far it has spread.

    Of a stranger of whom no process is known, as of a port scan from elsewhere, it says the address.
    """
    through = "" if fault.session.through is None else f" through {fault.session.through}"
    session = f"session {fault.session.id}{through}"
    if fault.by is Party.STRANGER and not fault.culprits and fault.session.client is not None:
        session += f" from {fault.session.client}"
    if fault.repeat_of is None:
        return printable(f"SUMMARY: pgguard: {fault.kind}: {fault.headline} (fault {fault.id}, {session})")
    how_far = "" if fault.spread is None else f": {spread_words(fault.spread)}"
    return printable(
        f"SUMMARY: pgguard: {fault.kind}: fault {fault.repeat_of} again{how_far} (fault {fault.id}, {session})"
    )


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
    what = f"{fault.headline} ({rfc3339(fault.at)}; {done(fault)})"
    parts: list[RenderableType] = [head, _indented(_text(what))]
    parts.extend(_section("Who", _sides(fault)))
    parts.extend(_section(f"Session {fault.session.id}", [_text(session_words(fault.session))]))
    lineage = fault.shares is None and len({c.pid for c in fault.culprits if c.process is not None}) > 1
    if lineage:
        parts.extend(_section("How the socket came to be shared", [_Lineage(fault)]))
    if fault.requests:
        parts.extend(_section("Recent requests", [_Timeline(recent_requests(fault))]))
    if fault.libpq is not None:
        parts.extend(_section(f"What to look for in {where_to_look(fault.kind)}", [_text(fault.libpq)]))
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


def report_of(fault: Fault, given: Given | None = None, *, terminal: bool = False, width: int | None = None) -> str:
    """What :func:`print_fault` prints: lines that end without blanks, and in colour if it is for a terminal.

    Args:
        fault: It.
        given: The advice that there is no need to print again.
        terminal: It is for one.
        width: Columns: by default those of the terminal, or 120.
    """
    console = _console(terminal=terminal, width=width)
    _in_any_case(console, fault, lambda: print_fault(console, fault, given), terminal=terminal)
    return _taken(console, terminal=terminal)


def reports_of(faults: Sequence[Fault], *, terminal: bool = False, width: int | None = None) -> str:
    """The reports of faults one after the other, as :class:`ConsoleSink` prints those that it knows at once.

    Args:
        faults: The first ones of causes.
        terminal: As in :func:`report_of`.
        width: Likewise.
    """
    given = Given()
    return "".join(
        f"{summary_line(fault)}\n"
        if fault.kind in _BEGINNINGS and any(_Waiting(0.0, fault).is_explained(other) for other in faults)
        else report_of(fault, given, terminal=terminal, width=width)
        for fault in faults
    )


def _in_any_case(console: Console, fault: Fault, tell: Callable[[], None], *, terminal: bool) -> None:
    """Tell of a fault, or print what can be told of it whatever stands in it; never raises."""
    try:
        tell()
    except Exception as error:
        _taken(console, terminal=terminal)
        console.out(f"pgguard: a report can't be printed in full: {type(error).__name__}", highlight=False)
        with contextlib.suppress(Exception):
            print_fault(console, fault.outlined())


def _console(*, terminal: bool, width: int | None = None) -> Console:
    """What prints into memory, for a terminal or for something else."""
    return Console(
        file=io.StringIO(),
        force_terminal=terminal,
        width=width or (None if terminal else wanted_width() or PLAIN_WIDTH),
        legacy_windows=False,
    )


def _taken(console: Console, *, terminal: bool) -> str:
    """What a console has printed into memory since that was taken last."""
    buffer = console.file
    assert isinstance(buffer, io.StringIO)  # noqa: S101 - it has been made with one
    text = buffer.getvalue()
    buffer.seek(0)
    buffer.truncate()
    return text if terminal else _TRAILING_SPACE.sub("", text)


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
    parts: list[RenderableType] = []
    for side in sides(fault):
        parts.append(_text(side.text))
        parts.extend(_indented(_text(fact)) for fact in side.facts)
        parts.extend(_indented(line) for line in _stack(side.stack))
        if side.opening:
            parts.append(_indented(_text(opened_at(side.opening))))
            parts.extend(_indented(line) for line in _stack(side.opening))
    return parts


def _stack(frames: Sequence[Frame]) -> Iterator[Text]:
    for line in stack_lines(frames):
        yield _text(line.text, style="dim" if line.gap else "bold" if line.application else "")


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
        opened_at, since = self._fault.session.opened_at, clock(process.started_at)
        is_heir = process.pid != self._owner and forked and process.started_at >= opened_at - _TICK
        facts = [f"inherited the socket at {since}" if is_heir else f"started at {since}"]
        if process.pid == self._owner:
            facts.append(f"opened the connection at {clock(opened_at)}")
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
        table.add_row(_text(str(share.connections)), _text(share_words(share)))
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
        parts.extend(_code(advice.code))
    parts.extend(_sources(advice.sources))
    return parts


def _tracing(tracing: Tracing) -> list[RenderableType]:
    """The same on how to see which code it was."""
    return [_text(tracing.text), *_code(tracing.code), *_sources(tracing.sources)]


def _code(code: str) -> list[RenderableType]:
    indented = textwrap.indent("\n".join(code_lines(code)), " " * 6)
    return [Text(""), Text(indented, no_wrap=True, overflow="ignore"), Text("")]


def _sources(sources: Sequence[str]) -> Iterator[RenderableType]:
    for source in sources:
        yield Text(f"    See {printable(source)}", style="dim", no_wrap=True, overflow="ignore")


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
        _text(clock(request.at)),
        _text(sent_by(request)),
        _text(shorten(request.messages, 12)),
        _text(request.state, style="bold" if request.state in OUTSTANDING else ""),
    ]


def _sql(request: Request) -> Text:
    return _text("" if request.sql is None else shorten(" ".join(request.sql.split()), _SQL_LENGTH))


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
        opener = opener_of(self.fault)
        return by.session.id == self.fault.session.id or (opener is not None and opener == opener_of(by))


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
        self._console = _console(terminal=self._terminal, width=width)
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
            self._print(what)
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
            self._console.file.write(f"{what}\n")
        else:
            fault = what.fault if isinstance(what, _Waiting) else what
            _in_any_case(self._console, fault, lambda: self._tell(what), terminal=self._terminal)

    def _tell(self, what: Fault | _Waiting) -> None:
        if isinstance(what, _Waiting):
            self._console.file.write(f"{summary_line(what.fault)}\n")
        else:
            print_fault(self._console, what, self._given)

    def _flush(self) -> None:
        if unsaid := self._dropped - self._dropped_said:
            left_out = f"{counted(unsaid, 'report')} left out, because standard error wasn't being read"
            self._console.out(f"pgguard: {left_out}", highlight=False)
            self._dropped_said += unsaid
        text = _taken(self._console, terminal=self._terminal)
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
