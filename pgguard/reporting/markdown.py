"""Markdown for an issue, or for the summary of a job: GitHub's flavour, https://github.github.com/gfm/.

Each cause with a verdict, a sequence diagram (Mermaid), who did what, the last requests, stacks folded away, and what
to change. The whole fits in what it is for: the gravest causes stand in it in full, then others in brief, and of the
rest it says how many there are.

What processes call themselves, and what they send, is other people's text. In prose each character that means something
is escaped; what GitHub makes links of afterwards, in the text that readers see, whatever escapes it had (mentions of
people and teams, numbers of issues, mail addresses), stands in code. Code and quoted text stand between more backticks
than there are in them.
"""

from __future__ import annotations

import re
from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from pgguard.attribution.runtime import Language
from pgguard.faults.catalogue import CATALOGUE
from pgguard.faults.text import counted, listed, printable, shorten
from pgguard.reporting.mermaid import diagram
from pgguard.reporting.words import (
    clock,
    code_lines,
    done,
    extent,
    opened_at,
    recent_requests,
    sent_by,
    session_words,
    share_words,
    sides,
    stack_lines,
    where_to_look,
    with_tabs,
)
from pgguard.session.verdicts import OUTSTANDING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pgguard.faults.catalogue import Advice
    from pgguard.faults.fault import Fault
    from pgguard.reporting.recorded import RecordedCause, Recording

COMMENT: Final = 65_536
"""Characters that a comment, or the description of an issue, may have on GitHub."""
STEP_SUMMARY: Final = 1 << 20
"""Bytes that a step may add to the summary of a job on GitHub."""

_ROWS: Final = 32
"""Causes in the table at the beginning, and processes in one of connections."""
_DIAGRAMS: Final = 16
"""Causes that get a diagram, each of which a browser draws anew."""
_TAIL: Final = 500
"""Characters that are kept for what is said of causes that are left out."""
_SQL_LENGTH: Final = 200
_HEADLINE: Final = 1000
_CELL: Final = 120

_LANGUAGES: Final = {
    Language.DOTNET: "csharp",
    Language.GO: "go",
    Language.JAVA: "java",
    Language.NODE: "js",
    Language.PERL: "perl",
    Language.PHP: "php",
    Language.PYTHON: "python",
    Language.RUBY: "ruby",
}
"""What code is called by whoever colours it."""
_IN_CODE: Final = r"(?:[@$]|\bGH-\d+|\#\d+)+"
"""What GitHub makes something of that has been escaped, too: mentions and addresses, formulas, issues."""
_SPECIAL: Final = re.compile(
    rf"""
    (?P<code>{_IN_CODE})
    | [\\`*\[\]<>&|~\#!{{}}^]                  # means something anywhere
    | (?<![^\W_])_ | _(?![^\W_])               # emphasis, but not between letters
    | :(?=//) | (?<=\bmailto): | (?<=\bxmpp):  # addresses
    | (?<=\bwww)\.
    | ^[-+=]                                   # a list, a rule, a heading
    """,
    re.VERBOSE | re.IGNORECASE,
)
_NUMBERED: Final = re.compile(r"^(\d{1,9})(?=[.)])")
"""What begins a list, at the beginning of a line."""
_BACKTICKS: Final = re.compile("`+")
_URL: Final = re.compile(r"https?://[\w.~:/?#@!$&'()*+,;=%-]+", re.ASCII)


def prose(text: str) -> str:
    """Other people's text, in one line, as a part of a sentence."""
    escaped = _SPECIAL.sub(_escaped, printable(text).strip())
    return _NUMBERED.sub(r"\1\\", escaped)


def _escaped(found: re.Match[str]) -> str:
    return code(found.group()) if found["code"] else f"\\{found.group()}"


def code(text: str) -> str:
    """The same as code within a line; empty if it is. In a table, :func:`_cell` is to be asked for."""
    text = printable(text)
    if not text.strip():
        return ""
    fence = "`" * (_most_backticks(text) + 1)
    padding = " " if text[0] in "` " or text[-1] in "` " else ""
    return f"{fence}{padding}{text}{padding}{fence}"


def block(lines: Sequence[str], language: str = "") -> list[str]:
    """Lines of code, or of quoted text, in a block of their own."""
    shown = [with_tabs(line) for line in lines]
    fence = "`" * max(3, max(map(_most_backticks, shown), default=0) + 1)
    return [f"{fence}{language}", *shown, fence]


def _most_backticks(text: str) -> int:
    return max((len(run) for run in _BACKTICKS.findall(text)), default=0)


def _cell(text: str) -> str:
    # A table takes the backslash away before it looks for code.
    return code(shorten(text, _CELL)).replace("|", r"\|")


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def to_markdown(recording: Recording, *, limit: int = COMMENT, size: Callable[[str], int] = len) -> str:
    """A recording as Markdown.

    Args:
        recording: What has been recorded.
        limit: How large it may be; what has no room is counted.
        size: How large a text is: by default, in characters.
    """
    parts = [_text(_head(recording))]
    room = limit - size(parts[0]) - _TAIL
    left_out: Counter[str] = Counter()
    for n, cause in enumerate(recording.causes):
        if left_out:
            left_out[cause.kind] += 1
            continue
        fault = cause.fault
        for told in (_in_full(n + 1, cause, fault, with_diagram=n < _DIAGRAMS), _in_brief(n + 1, cause, fault)):
            part = _text(told)
            if size(part) <= room:
                parts.append(part)
                room -= size(part)
                break
        else:
            left_out[cause.kind] += 1
    if left_out:
        parts.append(_text(_tail(left_out)))
    return "\n".join(parts)


def _text(lines: Iterator[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _head(recording: Recording) -> Iterator[str]:
    if not recording.times or recording.first_at is None or recording.last_at is None:
        yield "## pgguard: no faults"
        return
    causes = counted(len(recording.causes), "cause")
    yield f"## pgguard: {counted(recording.times, 'fault')} from {causes}"
    yield ""
    runs = f", in {counted(recording.runs, 'run')} of the guard" if recording.runs > 1 else ""
    yield f"Seen {_when(recording.first_at, recording.last_at)}{runs}."
    yield ""
    yield _row("", "kind", "times", "sessions", "processes", "what happened")
    yield _row("---", "---", "---:", "---:", "---:", "---")
    for n, cause in enumerate(recording.causes[:_ROWS], 1):
        counts = (str(cause.times), str(cause.sessions), str(cause.processes))
        yield _row(f"{n}. {cause.severity}", code(cause.kind), *counts, CATALOGUE[cause.kind].title)
    if len(recording.causes) > _ROWS:
        yield _row("", "", "", "", "", f"and {counted(len(recording.causes) - _ROWS, 'more cause')}")


def _tail(left_out: Counter[str]) -> Iterator[str]:
    kinds = [f"{code(kind)} {number}" for kind, number in left_out.most_common()]
    yield f"There is no room here for {counted(sum(left_out.values()), 'more cause')}: {listed(kinds)}."


def _stamp(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _when(first_at: float, last_at: float) -> str:
    first, last = _stamp(first_at), _stamp(last_at)
    return f"at {first}" if first == last else f"between {first} and {last}"


def _in_brief(n: int, cause: RecordedCause, fault: Fault) -> Iterator[str]:
    yield f"### {n}. {cause.severity}: {CATALOGUE[cause.kind].title} ({code(cause.kind)})"
    yield ""
    yield prose(shorten(fault.headline, _HEADLINE))
    yield ""
    how_far = extent(cause.times, cause.sessions, cause.processes)
    yield f"It came {how_far}, {_when(cause.first_at, cause.last_at)}; {done(fault)}."
    yield ""
    yield f"**What to change:** {prose(fault.advice.title)}. See {code(f'pgguard explain {cause.kind}')}."


def _in_full(n: int, cause: RecordedCause, fault: Fault, *, with_diagram: bool) -> Iterator[str]:
    *beginning, _, _ = _in_brief(n, cause, fault)
    yield from beginning
    if with_diagram and (drawn := diagram(fault)) is not None:
        yield ""
        yield from block(drawn.lines, "mermaid")
        if drawn.unknown:
            yield ""
            yield f"*{prose(' '.join(drawn.unknown))}*"
    yield from _who(fault)
    yield from _requests(fault)
    yield from _connections(fault)
    if fault.libpq is not None:
        yield ""
        yield f"**What to look for in {where_to_look(fault.kind)}:** {code(fault.libpq)}"
    yield ""
    yield from _advice(fault.advice, _language(fault))
    if fault.tracing is not None:
        yield ""
        yield f"**To see which code it was:** {prose(fault.tracing.text)}"
        yield ""
        yield from block(code_lines(fault.tracing.code), _language(fault))
        yield from _links(fault.tracing.sources)


def _who(fault: Fault) -> Iterator[str]:
    told = sides(fault)
    yield ""
    yield "**Who:**"
    yield ""
    for side in told:
        yield f"- {prose(side.text)}"
        yield from (f"  - {prose(fact)}" for fact in side.facts)
    yield f"- Session {fault.session.id}: {prose(session_words(fault.session))}"
    for side in told:
        pid = None if side.culprit is None else side.culprit.pid
        whose = "" if pid is None else f" of pid {pid}"
        if side.stack:
            yield from _folded(f"Stack{whose}", [line.text for line in stack_lines(side.stack)])
        if side.opening:
            lines = [opened_at(side.opening), *(line.text for line in stack_lines(side.opening))]
            yield from _folded(f"Stack{whose} when it opened the connection", lines)


def _folded(summary: str, lines: Sequence[str]) -> Iterator[str]:
    """Lines that are shown on demand; the summary has nobody else's text in it."""
    yield ""
    yield f"<details><summary>{summary}</summary>"
    yield ""
    yield from block(lines, "text")
    yield ""
    yield "</details>"


def _requests(fault: Fault) -> Iterator[str]:
    if not fault.requests:
        return
    yield ""
    yield "**Recent requests:**"
    yield ""
    yield _row("request", "at", "sent by", "messages", "state", "SQL")
    yield _row("---:", "---", "---", "---", "---", "---")
    for request in recent_requests(fault):
        state = f"**{request.state}**" if request.state in OUTSTANDING else str(request.state)
        sql = "" if request.sql is None else shorten(" ".join(request.sql.split()), _SQL_LENGTH)
        cells = (sent_by(request), _cell(request.messages), state, _cell(sql))
        yield _row(str(request.n), clock(request.at), *cells)


def _connections(fault: Fault) -> Iterator[str]:
    if not fault.shares:
        return
    yield ""
    yield "**Connections through this guard that count toward the limit:**"
    yield ""
    yield _row("connections", "whose")
    yield _row("---:", "---")
    for share in fault.shares[:_ROWS]:
        yield _row(str(share.connections), prose(share_words(share)))
    if more := fault.shares[_ROWS:]:
        yield _row(str(sum(share.connections for share in more)), f"{len(more)} other processes")


def _advice(advice: Advice, language: str) -> Iterator[str]:
    yield f"**What to change:** {prose(advice.title)}. {prose(advice.text)}"
    if advice.code is not None:
        yield ""
        yield from block(code_lines(advice.code), language)
    yield from _links(advice.sources)


def _links(sources: Sequence[str]) -> Iterator[str]:
    if sources:
        yield ""
        yield "\n".join(f"- See {f'<{url}>' if _URL.fullmatch(url) else code(url)}" for url in sources)


def _language(fault: Fault) -> str:
    """Whose code is advised, as far as that is known."""
    runtimes = [culprit.runtime for culprit in fault.culprits if culprit.runtime is not None]
    languages = {runtime.language for runtime in runtimes if runtime.language is not None}
    return _LANGUAGES[languages.pop()] if len(languages) == 1 else ""
