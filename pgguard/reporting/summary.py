"""The last words of a guard: how many sessions it saw, and what went wrong in them, by cause."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from pgguard.faults.text import counted, listed, printable
from pgguard.reporting.words import extent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pgguard.faults.catalogue import Severity
    from pgguard.faults.causes import Told
    from pgguard.faults.docket import Count
    from pgguard.session.verdicts import Kind

_TOLD: Final = 12
"""Causes that get a line of their own."""


def summary_lines(
    sessions: int | None, counts: Sequence[Count], causes: Sequence[Told], *, more_causes: int = 0
) -> list[str]:
    """One line on the whole, and one on each cause, the gravest first.

    Args:
        sessions: How many there were; ``None`` if that isn't known.
        counts: How often each kind came.
        causes: The gravest first.
        more_causes: How many there are besides, of which nothing is known but what is counted.

    For example::

        pgguard: 12 sessions, 44 faults from 2 causes
        pgguard: error: shared-by-processes, 43 times in 11 sessions, 4 processes involved: pid 4867 … (fault 1)
        pgguard: warning: unclean-close, once: … (fault 7)
    """
    happened: Counter[tuple[Severity, Kind]] = Counter()
    for count in counts:
        happened[count.severity, count.kind] += count.faults + count.repeats
    if not happened:
        return [f"pgguard: {_before(sessions)}no faults"]
    lines = [_line(cause) for cause in causes[:_TOLD]]
    for cause in causes[:_TOLD]:
        happened[cause.fault.severity, cause.fault.kind] -= cause.spread.times
    others = [f"{kind} {extent(times, 1, 1)}" for (_, kind), times in happened.items() if times > 0]
    if others:
        lines.append(f"pgguard: and from other causes: {listed(others)}")
    return [_whole(sessions, counts, len(causes) + more_causes), *lines]


def _whole(sessions: int | None, counts: Sequence[Count], causes: int) -> str:
    faults = counted(sum(count.faults + count.repeats for count in counts), "fault")
    return f"pgguard: {_before(sessions)}{faults} from {counted(causes, 'cause')}"


def _before(sessions: int | None) -> str:
    return "" if sessions is None else f"{counted(sessions, 'session')}, "


def _line(cause: Told) -> str:
    fault, spread = cause.fault, cause.spread
    how_far = extent(spread.times, spread.sessions, spread.processes)
    through = "" if fault.session.through is None else f", through {fault.session.through}"
    return printable(
        f"pgguard: {fault.severity}: {fault.kind}, {how_far}: {fault.headline} (fault {fault.id}{through})"
    )
