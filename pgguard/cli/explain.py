"""``pgguard explain``: what a kind of fault means, how it happens, and how to fix it in which framework."""

from __future__ import annotations

import os
import re
import sys
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.padding import Padding
from rich.pager import SystemPager
from rich.table import Table
from rich.text import Text

from pgguard.attribution.runtime import Language, Library
from pgguard.cli.entry import unwinding
from pgguard.faults.advice import advice_for, advised_software, closing, exhaustion, runtime_with
from pgguard.faults.advice.tracing import tracing_for
from pgguard.faults.catalogue import CATALOGUE, Severity, kind_hint
from pgguard.faults.policy import KindAction
from pgguard.faults.text import nearest
from pgguard.proxy.errors import ConfigurationError
from pgguard.reporting.width import wanted_width
from pgguard.session import libpq
from pgguard.session.verdicts import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pgguard.attribution.runtime import Runtime
    from pgguard.faults.advice import Software
    from pgguard.faults.catalogue import Advice, Entry

PLAIN_WIDTH: Final = 80
"""Columns where standard output is not a terminal, unless ``COLUMNS`` says otherwise."""

_TRAILING_SPACE: Final = re.compile(r" +$", re.MULTILINE)

_STYLES: Final = {Severity.ERROR: "bold red", Severity.WARNING: "bold yellow", Severity.INFO: "bold cyan"}

_ACTIONS: Final = {
    KindAction.LOG: "only record it",
    KindAction.REJECT: "end the session with an error",
    KindAction.IGNORE: "don't even record it",
    KindAction.DROP: "drop the message, and let the session go on",
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
    Kind.TLS_CORRUPTION: libpq.BAD_RECORD,
}
"""For each kind that has one an example of what libpq prints for it, or passes on from the server."""

_CASES: Final[Mapping[Kind, Mapping[str, Advice]]] = MappingProxyType(
    {Kind.UNCLEAN_CLOSE: closing.CASES, Kind.CONNECTION_EXHAUSTION: exhaustion.CASES}
)
"""Advice by what has come to be known of a fault, besides that by what the processes run."""

_ALSO_CALLED: Final[Mapping[str, Software]] = MappingProxyType(
    {
        "node": Language.NODE,
        "golang": Language.GO,
        "javascript": Language.NODE,
        "rails": Library.ACTIVE_RECORD,
        "psycopg3": Library.PSYCOPG,
        "dbi": Library.DBD_PG,
        "pdo": Library.PDO_PGSQL,
    }
)
"""Other names for what there is advice for, in lower case."""


def explain(kind: str | None, software: Sequence[str] = ()) -> int:
    """Print what is known about a kind of fault, or a list of all kinds; return the exit status.

    Text is wrapped to the terminal's width, or to ``COLUMNS``; code and URLs never are, so that they can be copied.
    What is more than a screen goes to the pager, as git's output does.

    Args:
        kind: The kind; ``None``: list them all.
        software: What the application runs: the advice is for that, then, and is all that is printed.

    Raises:
        ConfigurationError: There is no such kind, or nothing is known of such software.
    """
    if software and kind is None:
        raise ConfigurationError(f"--for needs a kind of fault: pgguard explain KIND --for {software[0]}")
    entry = None if kind is None else CATALOGUE[_kind(kind)]
    runtime = _runtime(software) if software else None
    terminal = sys.stdout.isatty()
    console = Console(
        force_terminal=terminal, width=wanted_width() or (None if terminal else PLAIN_WIDTH), legacy_windows=False
    )
    with console.capture() as printed:
        if entry is None:
            _print_kinds(console)
        elif runtime is None:
            _print_entry(console, entry)
        else:
            _print_advice(console, entry, runtime)
    text = printed.get()
    if not terminal:
        sys.stdout.write(_TRAILING_SPACE.sub("", text))
    elif text.count("\n") < console.height:
        sys.stdout.write(text)
    else:
        # What git sets: less ends at once where all fits, leaves the text on the screen, and shows colours.
        os.environ.setdefault("LESS", "FRX")
        with unwinding():
            SystemPager().show(text)
    return 0


def _kind(name: str) -> Kind:
    try:
        return Kind(name)
    except ValueError:
        raise ConfigurationError(f"there is no kind of fault {name!r}: {kind_hint(name)}") from None


def software_names() -> list[str]:
    """What ``--for`` can be given, by its own name."""
    return sorted(advised_software(), key=str.lower)


def _runtime(names: Sequence[str]) -> Runtime:
    """A process that runs all of what is named."""
    languages = advised_software()
    by_name = {_letters(str(what)): what for what in languages}
    by_name |= {name: what for name, what in _ALSO_CALLED.items() if what in languages}
    software: list[Software] = []
    for name in names:
        if (what := by_name.get(_letters(name))) is None:
            close = nearest(name, [*map(str, languages), *_ALSO_CALLED])
            hint = f"did you mean {close}?" if close else f"choose from {', '.join(software_names())}"
            raise ConfigurationError(f"--for {name}: there is no advice for that: {hint}")
        software.append(what)
    first, *others = dict.fromkeys(languages[what] for what in software)
    if others:
        raise ConfigurationError(f"--for: one process doesn't run both {first} and {others[0]}: ask for one at a time")
    return runtime_with(software, languages)


def _letters(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.lower())


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
    _paragraph(
        console,
        "Run pgguard explain KIND to see what a kind means, how it happens and how to fix it. Add --for FRAMEWORK for "
        "code to paste.",
    )


def _print_entry(console: Console, entry: Entry) -> None:
    _line(console, Text.assemble((entry.kind, _STYLES[entry.severity]), f": {entry.title}"))
    _section(console, "Severity", entry.severity_rule)
    _section(console, "What it means", entry.meaning)
    _section(console, "How it happens", entry.cause)
    if (text := _LIBPQ.get(entry.kind)) is not None:
        _section(console, "What to look for in the logs of clients that use libpq")
        _verbatim(console, text)
    _section(console, "What to change", f"{entry.advice.title}. {entry.advice.text}")
    _items(console, entry.fixes)
    _sources(console, entry.advice.sources)
    for case, advice in _CASES.get(entry.kind, {}).items():
        _print_fix(console, case, advice)
    _print_software(console, entry.kind)
    _section(
        console,
        "What pgguard does about it",
        f"Mode log records it. Mode reject {_in_mode_reject(entry)}. The configuration file can say otherwise:",
    )
    console.print()
    _verbatim(console, "\n".join(_settings(entry)))


def _in_mode_reject(entry: Entry) -> str:
    if not entry.can_reject or Severity.ERROR not in entry.severity_rule:
        return "does the same"
    always = entry.severity_rule == Severity.ERROR
    return "also ends the session" if always else "also ends the session if it is an error"


def _print_advice(console: Console, entry: Entry, runtime: Runtime) -> None:
    """What to change in the software at hand."""
    _line(console, Text.assemble((entry.kind, _STYLES[entry.severity]), f": {entry.title}"))
    _section(console, "What it means", entry.meaning)
    advice = advice_for(entry.kind, [runtime])
    if advice == entry.advice:
        _section(console, "What to change", f"{advice.title}. {advice.text}")
        _items(console, entry.fixes)
        _sources(console, advice.sources)
    else:
        _print_fix(console, f"What to change in {_heading(runtime)}", advice)
    if (tracing := tracing_for(entry.kind, runtime)) is not None:
        _print_instructions(console, "To see in a report which code it was", *tracing)
    if not (runtime.server or runtime.libraries):
        _print_software(console, entry.kind, runtime.language)


def _print_fix(console: Console, heading: str, advice: Advice) -> None:
    _print_instructions(console, heading, f"{advice.title}. {advice.text}", advice.code, advice.sources)


def _print_instructions(console: Console, heading: str, text: str, code: str | None, sources: Sequence[str]) -> None:
    _section(console, heading, text)
    if code is not None:
        console.print()
        _verbatim(console, code)
    _sources(console, sources)


def _print_software(console: Console, kind: Kind, language: Language | None = None) -> None:
    """List what there is special advice for, of one language or of all."""
    by_language: dict[Language, list[str]] = {}
    for what, its in advised_software(kind).items():
        if language in {None, its}:
            by_language.setdefault(its, [])
            if what is not its:
                by_language[its].append(str(what))
    if not by_language or (language is not None and not any(by_language.values())):
        return
    _section(console, f"For code to paste, run pgguard explain {kind} --for NAME, where NAME is one of")
    for its, names in sorted(by_language.items()):
        listed = ", ".join([*([its] if language is None else []), *sorted(names, key=str.lower)])
        _paragraph(console, listed, indent=2)


def _heading(runtime: Runtime) -> str:
    names = [*sorted(runtime.libraries), *([runtime.server] if runtime.server is not None else [])]
    return " with ".join(names) if names else f"{runtime.language}"


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


def _section(console: Console, heading: str, paragraph: str | None = None) -> None:
    console.print()
    _line(console, Text(f"{heading}:", style="bold"))
    if paragraph is not None:
        _paragraph(console, paragraph, indent=2)


def _items(console: Console, items: Sequence[str]) -> None:
    """Print what else there is to say, each behind a hyphen."""
    for item in items:
        table = Table.grid(padding=(0, 1, 0, 0))
        table.add_row("-", Text(item))
        console.print(Padding(table, (0, 0, 0, 2)), highlight=False)


def _sources(console: Console, sources: Sequence[str]) -> None:
    if sources:
        console.print()
    for source in sources:
        _verbatim(console, f"See {source}", indent=2)


def _line(console: Console, text: Text) -> None:
    console.print(text, highlight=False)


def _paragraph(console: Console, text: str, *, indent: int = 0) -> None:
    console.print(Padding(Text(text), (0, 0, 0, indent)), highlight=False)


def _verbatim(console: Console, text: str, *, indent: int = 4) -> None:
    """Print lines as they are, whatever the width."""
    for line in text.splitlines():
        console.print(Text(f"{' ' * indent}{line}".rstrip()), soft_wrap=True, highlight=False)
