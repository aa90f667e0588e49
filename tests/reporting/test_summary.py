"""The last words of a guard."""

from __future__ import annotations

from dataclasses import replace

from pgguard.attribution.evidence import Driver
from pgguard.faults.catalogue import Severity
from pgguard.faults.causes import Told
from pgguard.faults.docket import Count
from pgguard.faults.fault import Spread
from pgguard.faults.policy import Action
from pgguard.reporting.summary import summary_lines
from pgguard.session.verdicts import Kind
from tests.faults.samples import KERNEL, NOW, fault, verdict

SHARED = Count(Kind.SHARED_BY_PROCESSES, Severity.ERROR, Action.LOGGED, 11, 32)
REJECTED = Count(Kind.SHARED_BY_PROCESSES, Severity.ERROR, Action.REJECTED, 1, 0)
CLOSED = Count(Kind.UNCLEAN_CLOSE, Severity.WARNING, Action.LOGGED, 1, 0)
BY_WORKERS = Told(fault(id=1), Spread(44, 11, 4, NOW))
BUSY = replace(fault(verdict(Kind.REQUEST_WHILE_BUSY), replace(KERNEL, driver=Driver.NODE), id=7), summary="it was")
ONCE = Told(replace(BUSY, kind=Kind.UNCLEAN_CLOSE), Spread(1, 1, 1, NOW))


def test_no_faults() -> None:
    assert summary_lines(0, [], []) == ["pgguard: 0 sessions, no faults"]
    assert summary_lines(1, [], []) == ["pgguard: 1 session, no faults"]


def test_of_a_file_of_faults_it_is_not_known_how_many_sessions_there_were() -> None:
    assert summary_lines(None, [], []) == ["pgguard: no faults"]
    assert summary_lines(None, [CLOSED], [ONCE], more_causes=2)[0] == "pgguard: 1 fault from 3 causes"


def test_each_cause_has_a_line_that_says_how_far_it_has_spread() -> None:
    what, how_far = BY_WORKERS.fault.summary, "44 times in 11 sessions, 4 processes involved"
    assert summary_lines(12, [SHARED, REJECTED, CLOSED], [BY_WORKERS, ONCE]) == [
        "pgguard: 12 sessions, 45 faults from 2 causes",
        f"pgguard: error: shared-by-processes, {how_far}: {what} (fault 1)",
        "pgguard: warning: unclean-close, once: it was (fault 7)",
    ]


def test_what_is_not_told_by_its_cause_is_counted_all_the_same() -> None:
    """There were too many causes, or too many to give each a line."""
    causes = [Told(replace(BY_WORKERS.fault, id=n), Spread(2, 1, 1, NOW)) for n in range(1, 21)]
    happened = [SHARED._replace(faults=40, repeats=5), CLOSED]
    lines = summary_lines(50, happened, causes)
    assert lines[0] == "pgguard: 50 sessions, 46 faults from 20 causes"
    assert [line.rpartition("(")[2] for line in lines[1:-1]] == [f"fault {n})" for n in range(1, 13)]
    assert lines[-1] == "pgguard: and from other causes: shared-by-processes 21 times and unclean-close once"


def test_nothing_that_others_say_moves_the_cursor() -> None:
    told = Told(replace(BY_WORKERS.fault, summary="pid 1 (\x1b[2J\u202etxt\nb) sent"), Spread(1, 1, 1, NOW))
    for line in summary_lines(1, [CLOSED], [told]):
        assert line.isprintable()
