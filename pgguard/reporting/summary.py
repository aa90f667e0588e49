"""The last words of a guard: how many sessions it saw, and what went wrong in them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pgguard.faults.catalogue import Severity
from pgguard.faults.text import counted, listed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pgguard.faults.docket import Count
    from pgguard.session.verdicts import Kind


def summary_lines(sessions: int, counts: Sequence[Count]) -> list[str]:
    """One line on the whole and one on each severity.

    For example::

    pgguard: 12 sessions, 2 errors, 1 warning
    pgguard: errors: shared-by-processes (2 faults, seen 43 times)
    pgguard: warnings: unclean-close
    """
    totals = dict.fromkeys(sorted(Severity, key=lambda severity: -severity.rank), 0)
    for count in counts:
        totals[count.severity] += count.faults
    found = [counted(total, _NAMES[severity]) for severity, total in totals.items() if total]
    lines = [", ".join([f"pgguard: {counted(sessions, 'session')}", *(found or ["no faults"])])]
    lines.extend(
        f"pgguard: {_NAMES[severity]}s: {listed(_kinds(counts, severity))}"
        for severity, total in totals.items()
        if total
    )
    return lines


_NAMES = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "notice"}


def _kinds(counts: Sequence[Count], severity: Severity) -> list[str]:
    faults: dict[Kind, int] = {}
    times: dict[Kind, int] = {}
    for count in counts:
        if count.severity is severity:
            faults[count.kind] = faults.get(count.kind, 0) + count.faults
            times[count.kind] = times.get(count.kind, 0) + count.faults + count.repeats
    return [_kind(kind, faults[kind], times[kind]) for kind in faults]


def _kind(kind: Kind, faults: int, times: int) -> str:
    if times > faults:
        return f"{kind} ({counted(faults, 'fault')}, seen {times} times)"
    return kind if faults == 1 else f"{kind} ({faults})"
