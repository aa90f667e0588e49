"""``pgguard explain``: what a kind of fault means, how it comes about, and how to fix it in which framework."""

from __future__ import annotations

import re
import sys
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pgguard.faults.advice import advice_for, advised, closing, exhaustion
from pgguard.faults.catalogue import CATALOGUE, Severity, kind_hint
from pgguard.faults.policy import KindAction
from pgguard.proxy.errors import ConfigurationError
from pgguard.reporting.console import wanted_width
from pgguard.session import libpq
from pgguard.session.verdicts import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pgguard.attribution.runtime import Runtime
    from pgguard.faults.catalogue import Advice, Entry

PLAIN_WIDTH: Final = 80
"""Columns where standard output is not a terminal, unless ``COLUMNS`` says otherwise."""

_TRAILING_SPACE: Final = re.compile(r" +$", re.MULTILINE)

_STYLES: Final = {Severity.ERROR: "bold red", Severity.WARNING: "bold yellow", Severity.INFO: "bold cyan"}

_ACTIONS: Final = {
    KindAction.LOG: "record it, and let the session go on",
    KindAction.REJECT: "end the session with an error that says what happened",
    KindAction.IGNORE: "take no notice of it",
    KindAction.DROP: "swallow the message, and let the session go on",
}

_LIBPQ: Final = {
    Kind.MESSAGE_WHILE_IDLE: libpq.while_idle("T"),
    Kind.SHARED_BY_PROCESSES: libpq.while_idle("T"),
    Kind.SHARED_BY_THREADS: libpq.while_idle("T"),
    Kind.UNREAD_ANSWER: libpq.IN_PROGRESS,
    Kind.UNEXPECTED_RESPONSE: libpq.while_busy("D", function_call=False),
    Kind.FOREIGN_TERMINATE: libpq.CLOSED,
    Kind.CONNECTION_EXHAUSTION: "FATAL:  sorry, too many clients already",
    Kind.PROTOCOL_VIOLATION: libpq.lost_synchronization("D", 1 << 30),
}
"""For each kind that has one an example of what libpq prints for it, or passes on from the server."""

_CASES: Final[Mapping[Kind, Mapping[str, Advice]]] = MappingProxyType(
    {Kind.UNCLEAN_CLOSE: closing.CASES, Kind.CONNECTION_EXHAUSTION: exhaustion.CASES}
)
"""Advice by what has come to be known of a fault, besides that by what the processes run."""


def explain(kind: str | None) -> int:
    """Print what is known about a kind of fault, or a list of all kinds; return the exit status.

    Text is wrapped to the terminal's width, or to ``COLUMNS``; code and URLs never are, so that they can be copied.

    Raises:
        ConfigurationError: There is no such kind.
    """
    entry = None if kind is None else CATALOGUE[_kind(kind)]
    terminal = sys.stdout.isatty()
    console = Console(
        force_terminal=terminal, width=wanted_width() or (None if terminal else PLAIN_WIDTH), legacy_windows=False
    )
    with console.capture() as printed:
        if entry is None:
            _print_kinds(console)
        else:
            _print_entry(console, entry)
    text = printed.get()
    sys.stdout.write(text if terminal else _TRAILING_SPACE.sub("", text))
    return 0


def _kind(name: str) -> Kind:
    try:
        return Kind(name)
    except ValueError:
        raise ConfigurationError(f"there is no kind of fault {name!r}: {kind_hint(name)}") from None


def _print_kinds(console: Console) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for entry in CATALOGUE.values():
        table.add_row(
            Text(entry.kind, style="bold"), Text(entry.severity, style=_STYLES[entry.severity]), Text(entry.title)
        )
    console.print(table)
    console.print()
    _paragraph(console, "pgguard explain KIND says what a kind means, how it comes about and how to fix it.")


def _print_entry(console: Console, entry: Entry) -> None:
    _line(console, Text.assemble((entry.kind, _STYLES[entry.severity]), f": {entry.title}"))
    _section(console, "Severity", entry.severity_rule)
    _section(console, "What it means", entry.meaning)
    _section(console, "How it comes about", entry.cause)
    if (text := _LIBPQ.get(entry.kind)) is not None:
        _section(console, "What libpq prints, to search logs for")
        _verbatim(console, text)
    _section(console, "What to change", f"{entry.advice.title}. {entry.advice.text}", *entry.fixes)
    _sources(console, entry.advice)
    for heading, advice in _fixes(entry.kind):
        _section(console, heading, f"{advice.title}. {advice.text}")
        if advice.code is not None:
            console.print()
            _verbatim(console, advice.code)
        _sources(console, advice)
    _section(
        console,
        "What pgguard can do about it",
        f"In mode log it is recorded; in mode reject {_in_mode_reject(entry)}, unless the configuration file says "
        "otherwise:",
    )
    console.print()
    _verbatim(console, "\n".join(_settings(entry)))


def _in_mode_reject(entry: Entry) -> str:
    if not entry.can_reject or Severity.ERROR not in entry.severity_rule:
        return "likewise"
    always = entry.severity_rule == Severity.ERROR
    return "its session is ended" if always else "its session is ended where it is an error"


def _fixes(kind: Kind) -> Iterator[tuple[str, Advice]]:
    """The special advice there is for a kind, each once, under what it is for."""
    yield from _CASES.get(kind, {}).items()
    general = advice_for(kind, ())
    said: set[Advice] = {general}
    for runtime in advised(kind):
        advice = advice_for(kind, [runtime])
        if advice not in said:
            said.add(advice)
            yield _heading(runtime), advice


def _heading(runtime: Runtime) -> str:
    names = [*sorted(runtime.libraries), *([runtime.server] if runtime.server is not None else [])]
    return f"{runtime.language}: {' with '.join(names)}" if names else f"{runtime.language}"


def _settings(entry: Entry) -> Iterator[str]:
    actions = [KindAction.LOG, KindAction.REJECT, KindAction.IGNORE, KindAction.DROP]
    possible = {KindAction.LOG, KindAction.IGNORE}
    possible |= {KindAction.REJECT} if entry.can_reject else set()
    possible |= {KindAction.DROP} if entry.can_drop else set()
    yield "# pgguard.toml"
    yield "[kinds]"
    settings = [(f'{entry.kind} = "{action}"', action) for action in actions if action in possible]
    width = max(len(setting) for setting, _ in settings)
    default = True
    for setting, action in settings:
        yield f"{'' if default else '# '}{setting:{width + (2 if default else 0)}}  # {_ACTIONS[action]}"
        default = False


def _section(console: Console, heading: str, *paragraphs: str) -> None:
    console.print()
    _line(console, Text(f"{heading}:", style="bold"))
    for paragraph in paragraphs:
        _paragraph(console, paragraph, indent=2)


def _sources(console: Console, advice: Advice) -> None:
    if advice.sources:
        console.print()
    for source in advice.sources:
        _verbatim(console, f"See {source}", indent=2)


def _line(console: Console, text: Text) -> None:
    console.print(text, highlight=False)


def _paragraph(console: Console, text: str, *, indent: int = 0) -> None:
    console.print(Padding(Text(text), (0, 0, 0, indent)), highlight=False)


def _verbatim(console: Console, text: str, *, indent: int = 4) -> None:
    """Print lines as they are, whatever the width."""
    for line in text.splitlines():
        console.print(Text(f"{' ' * indent}{line}".rstrip()), soft_wrap=True, highlight=False)
