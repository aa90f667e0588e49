"""The report as text: what the console prints while a guard runs and as it ends, from the file."""

from __future__ import annotations

import re
from dataclasses import replace

from pgguard.faults.advice.tracing import Tracing
from pgguard.faults.catalogue import Advice
from pgguard.faults.fault import Spread
from pgguard.reporting.console import report_of
from pgguard.reporting.text import IN_FULL, to_text
from pgguard.session.verdicts import Kind
from tests.faults.samples import NOW, fault, verdict
from tests.reporting.gathered import causes, recorded

IDLE = replace(fault(verdict(Kind.IDLE_IN_TRANSACTION)), id=1, cause=1, run="0")
SHARED = replace(fault(), id=2, cause=2, run="0")
AGAIN = replace(SHARED, id=3, repeat_of=2, suppressed=40, spread=Spread(43, 11, 4, NOW))


def test_each_cause_is_told_as_the_console_tells_it_the_gravest_first_and_then_the_summary() -> None:
    told = list(to_text(recorded(IDLE, SHARED, AGAIN), terminal=False))
    assert told[:2] == [f"{report_of(SHARED)}\n", f"{report_of(IDLE)}\n"]
    told_of = SHARED.summary
    assert told[2].splitlines() == [
        "pgguard: 44 faults from 2 causes",
        f"pgguard: error: shared-by-processes, 43 times in 11 sessions, 4 processes involved: {told_of} (fault 2)",
        f"pgguard: warning: idle-in-transaction, once: {IDLE.summary} (fault 1)",
    ]


def test_no_faults_are_a_result() -> None:
    assert list(to_text(recorded(), terminal=False)) == ["pgguard: no faults\n"]


def test_a_cause_of_which_the_file_has_only_repeats_is_told_by_one() -> None:
    [told, _] = to_text(recorded(AGAIN), terminal=False)
    assert "pgguard: ERROR: shared-by-processes: two processes use one connection\n" in told
    assert f"SUMMARY: pgguard: shared-by-processes: {SHARED.summary} (fault 3, session 3)\n" in told


def test_colours_are_for_terminals_and_lines_as_long_as_they_may_be() -> None:
    recording = recorded(SHARED)
    assert "\x1b[" in "".join(to_text(recording, terminal=True, width=100))
    plain = "".join(to_text(recording, terminal=False, width=60))
    assert "\x1b[" not in plain
    report = plain.partition("SUMMARY")[0]
    assert max(len(line) for line in report.splitlines() if "http" not in line) == 60
    assert not re.search(r" $", plain, re.MULTILINE)


def test_of_very_many_causes_the_gravest_are_told() -> None:
    [*told, more, summary] = to_text(recorded(*causes(IN_FULL + 4)), terminal=False)
    assert len(told) == IN_FULL
    assert more == "pgguard: 4 more causes not shown here\n\n"
    assert summary.startswith(f"pgguard: {IN_FULL + 4} faults from {IN_FULL + 4} causes\n")


def test_nothing_that_a_file_says_moves_the_cursor() -> None:
    """The advice in it may be anybody's too."""
    text = "\x1b[2J\x9b\u202e\r\x07\u2028\udcff"
    advice = Advice(text, text, f"{text}\n\t{text}", (text,))
    hostile = replace(
        SHARED, summary=text, reason=text, libpq=text, advice=advice, tracing=Tracing(text, text, (text,))
    )
    shown = "".join(to_text(recorded(hostile), terminal=False))
    assert all(line.replace("\t", "").isprintable() for line in shown.split("\n"))
    assert shown.count(r"\x1b[2J\x9b\u202e\r\x07\u2028\udcff") > 8
