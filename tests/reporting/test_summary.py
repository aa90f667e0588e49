"""The last words of a guard."""

from __future__ import annotations

import pytest

from pgguard.faults.catalogue import Severity
from pgguard.faults.docket import Count
from pgguard.faults.policy import Action
from pgguard.reporting.summary import summary_lines
from pgguard.session.verdicts import Kind

SHARED = Count(Kind.SHARED_BY_PROCESSES, Severity.ERROR, Action.LOGGED, 2, 41)
REJECTED = Count(Kind.SHARED_BY_PROCESSES, Severity.ERROR, Action.REJECTED, 1, 0)
VIOLATION = Count(Kind.PROTOCOL_VIOLATION, Severity.ERROR, Action.LOGGED, 3, 0)
CLOSED = Count(Kind.UNCLEAN_CLOSE, Severity.WARNING, Action.LOGGED, 1, 0)
UNTRACKED = Count(Kind.UNTRACKED, Severity.INFO, Action.LOGGED, 1, 0)


@pytest.mark.parametrize(
    ("sessions", "counts", "lines"),
    [
        (0, [], ["pgguard: 0 sessions, no faults"]),
        (1, [CLOSED], ["pgguard: 1 session, 1 warning", "pgguard: warnings: unclean-close"]),
        (
            12,
            [SHARED, REJECTED, VIOLATION, CLOSED, UNTRACKED],
            [
                "pgguard: 12 sessions, 6 errors, 1 warning, 1 notice",
                "pgguard: errors: shared-by-processes (3 faults, seen 44 times) and protocol-violation (3)",
                "pgguard: warnings: unclean-close",
                "pgguard: notices: untracked",
            ],
        ),
    ],
)
def test_summaries(sessions: int, counts: list[Count], lines: list[str]) -> None:
    assert summary_lines(sessions, counts) == lines
