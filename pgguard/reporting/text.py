"""The report of a recording as text: what the console prints while a guard runs, and as it ends.

Each cause in full, the gravest first, and the summary. Of very many the later ones are told in a line.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from pgguard.faults.causes import Told
from pgguard.faults.docket import Count
from pgguard.faults.fault import Spread
from pgguard.faults.policy import Action
from pgguard.faults.text import counted
from pgguard.reporting.console import Given, report_of
from pgguard.reporting.summary import summary_lines

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pgguard.faults.fault import Fault
    from pgguard.reporting.recorded import RecordedCause, Recording

IN_FULL: Final = 256
"""Causes that are told in full: as many as a guard knows at once."""


def to_text(recording: Recording, *, terminal: bool, width: int | None = None) -> Iterator[str]:
    """A recording as text, a piece for each cause, and one for the summary.

    Args:
        recording: What has been recorded.
        terminal: Whether it is for a terminal, in colour; its width is that of the terminal then.
        width: Columns; by default those of the terminal, or of ``COLUMNS``, or 120 where there is neither.
    """
    given = Given()
    told: list[Told] = []
    for cause in recording.causes[:IN_FULL]:
        fault = first_of(cause)
        told.append(Told(fault, Spread(cause.times, cause.sessions, cause.processes, cause.first_at)))
        yield report_of(fault, given, terminal=terminal, width=width) + "\n"
    more = len(recording.causes) - len(told)
    if more:
        yield f"pgguard: {counted(more, 'more cause')} not shown here\n\n"
    counts = [Count(count.kind, count.severity, Action.LOGGED, count.times, 0) for count in recording.counts]
    yield "".join(f"{line}\n" for line in summary_lines(None, counts, told, more_causes=more))


def first_of(cause: RecordedCause) -> Fault:
    """The first fault of a cause. Where the file has nothing but repeats of it, one of those stands for it."""
    return replace(cause.fault, repeat_of=None)
