"""Annotations for GitHub Actions, as workflow commands on standard output: one a cause, the gravest first.

https://docs.github.com/en/actions/reference/workflows-and-actions/workflow-commands. A step may make ten of each level;
whatever is beyond that is silently left out, so it isn't said here at all.

The runner takes every line for a command that begins with two colons, and, from its beginnings, every line with
``##[`` in it. What others say stands in commands alone, escaped as the toolkit does it (``command.ts`` in
``@actions/core``), so that it can neither end one nor begin another.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final, NamedTuple

from pgguard.faults.catalogue import CATALOGUE, Severity
from pgguard.faults.text import printable, shorten
from pgguard.reporting.places import places
from pgguard.reporting.words import extent, sides

if TYPE_CHECKING:
    from pgguard.faults.fault import Fault
    from pgguard.reporting.places import Sources
    from pgguard.reporting.recorded import RecordedCause, Recording

EACH: Final = 10
"""Annotations of one level that a step may make."""

_COMMANDS: Final = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "notice"}
_LINE: Final = 1000
"""Characters of a line in an annotation, at most: it has room for a few of them."""


class Annotations(NamedTuple):
    """What is to be printed, and what is left out."""

    text: str
    left_out: int
    """Causes that a step may not annotate any more."""


def to_github(recording: Recording, sources: Sources) -> Annotations:
    """The causes of a recording as annotations.

    Args:
        recording: What has been recorded.
        sources: Where the application's sources are: files there are annotated in their line, the other causes in none.
    """
    made: Counter[Severity] = Counter()
    lines: list[str] = []
    for cause in recording.causes:
        made[cause.severity] += 1
        if made[cause.severity] <= EACH:
            lines.append(_annotation(cause, cause.fault, sources))
    return Annotations("".join(f"{line}\n" for line in lines), len(recording.causes) - len(lines))


def harmless(line: str) -> str:
    """A line for the log that begins with the guard's own words, and may go on with others': no command is in it."""
    return line.replace("##[", "## [")


def _annotation(cause: RecordedCause, fault: Fault, sources: Sources) -> str:
    properties = {"title": f"{cause.kind}: {CATALOGUE[cause.kind].title}"}
    for place in places(fault):
        if (file := sources.relative(place.frame.file)) is not None:
            properties = {"file": file, "line": str(max(place.frame.line, 1))} | properties
            break
    given = ",".join(f"{name}={_property(printable(value))}" for name, value in properties.items())
    return f"::{_COMMANDS[cause.severity]} {given}::{_data(_told(cause, fault))}"


def _told(cause: RecordedCause, fault: Fault) -> str:
    who = [side.text for side in sides(fault)]
    how_far = f"It came {extent(cause.times, cause.sessions, cause.processes)}."
    advice = f"What to change: {fault.advice.title}. {fault.advice.text}"
    return "\n".join(printable(shorten(line, _LINE)) for line in (fault.headline, how_far, *who, advice))


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
