"""The log on the terminal: bounded whatever the number of sessions, counted, and safe to look at."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

from pgguard.reporting.log import KINDS, SAID, SUMMARY_INTERVAL, WINDOW, BoundedLog

if TYPE_CHECKING:
    from collections.abc import Iterator


class Stage:
    """A log whose clock the test moves."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.now = 1000.0
        self.handler = BoundedLog(self.said.append, clock=lambda: self.now)
        self.logger = logging.getLogger("pgguard.test_log")
        self.logger.setLevel(logging.INFO)
        self.logger.propagate = False
        self.logger.addHandler(self.handler)


@pytest.fixture
def stage() -> Iterator[Stage]:
    stage = Stage()
    yield stage
    stage.logger.removeHandler(stage.handler)


def fail() -> None:
    raise ZeroDivisionError("no\nway")


def test_what_is_said_once_is_said(stage: Stage) -> None:
    stage.logger.info("ready on %s", "127.0.0.1:6544")
    stage.logger.warning("session %d: %s", 7, "it has gone")
    assert stage.said == ["pgguard: ready on 127.0.0.1:6544", "pgguard: session 7: it has gone"]
    stage.handler.settle()
    stage.handler.close()
    assert len(stage.said) == 2


def test_what_happens_to_every_session_is_said_a_few_times_and_counted(stage: Stage) -> None:
    for session in range(1, 10_001):
        stage.logger.warning("session %d: could not connect", session)
        stage.now += 0.001
        stage.handler.settle()
    assert stage.said[:SAID] == [f"pgguard: session {n}: could not connect" for n in range(1, SAID + 1)]
    assert len(stage.said) <= SAID + 1
    stage.now += SUMMARY_INTERVAL
    stage.handler.settle()
    stage.handler.close()
    counted = [int(line.split()[1]) for line in stage.said[SAID:]]
    assert sum(counted) == 10_000 - SAID
    assert stage.said[-1].endswith("s, the last: session 10000: could not connect")


def test_what_goes_on_for_a_day_is_counted_at_longer_and_longer_intervals(stage: Stage) -> None:
    times = 24 * 360
    for _ in range(times):
        stage.logger.warning("session %d: could not connect", 1)
        stage.now += 10
        stage.handler.settle()
    assert SAID < len(stage.said) < 24 * 60
    stage.handler.close()
    assert sum(1 if "more time" not in line else int(line.split()[1]) for line in stage.said) == times


def test_another_line_has_its_own_count(stage: Stage) -> None:
    for session in range(100):
        stage.logger.warning("session %d: could not connect", session)
    stage.logger.info("session %d: said nothing in time", 7)
    assert stage.said[-1] == "pgguard: session 7: said nothing in time"


def test_after_an_hour_it_is_said_again(stage: Stage) -> None:
    for _ in range(SAID):
        stage.logger.warning("session %d: could not connect", 1)
    stage.now += WINDOW
    stage.logger.warning("session %d: could not connect", 2)
    assert stage.said[-1] == "pgguard: session 2: could not connect"


def test_a_traceback_is_said_once_and_counted(stage: Stage) -> None:
    for session in range(1, 101):
        try:
            fail()
        except ZeroDivisionError:
            stage.logger.exception("session %d: the tracker failed", session)
    first, *others = stage.said
    assert first.startswith("pgguard: session 1: the tracker failed\n  Traceback (most recent call last):\n")
    assert first.endswith("ZeroDivisionError: no\n  way")
    assert others[0] == "pgguard: session 2: the tracker failed: ZeroDivisionError: no\n  way"
    assert len(others) == SAID - 1
    stage.handler.close()
    assert stage.said[-1] == (
        f"pgguard: {100 - SAID} more times in 0 s, the last: session 100: the tracker failed: ZeroDivisionError: no way"
    )


def test_an_exception_from_another_place_has_its_own_traceback(stage: Stage) -> None:
    for function in (fail, lambda: 1 // 0, fail):
        try:
            function()
        except ZeroDivisionError:
            stage.logger.exception("session %d: the tracker failed", 1)
    assert [line.count("Traceback") for line in stage.said] == [1, 1, 0]


def test_what_the_command_says_of_itself_is_said_whole(stage: Stage) -> None:
    logger = logging.getLogger("pgguard.cli.serve")
    logger.addHandler(stage.handler)
    try:
        for n in range(50):
            logger.warning("reloaded: %s", n)
    finally:
        logger.removeHandler(stage.handler)
    assert len(stage.said) == 50


def test_kinds_of_lines_are_bounded(stage: Stage) -> None:
    for n in range(3 * KINDS):
        stage.logger.warning(f"line {n}")  # noqa: G004 - as a careless library would
    assert len(stage.handler._remarks) == KINDS + 1
    assert len(stage.said) == KINDS + SAID


def test_nothing_that_is_said_does_harm_on_a_terminal(stage: Stage) -> None:
    stage.logger.warning("%s", "a\x1b[2J\u202eb\u2028c\x85d\x7f password=hunter2")
    assert stage.said == ["pgguard: a\\x1b[2J\\u202eb\\u2028c\\x85d\\x7f password=***"]


@pytest.mark.parametrize("name", ["pgguard.cli", "pgguard.cli.serve", "pgguard.proxy"])
def test_an_exception_is_said_with_what_has_failed_whoever_says_it(name: str) -> None:
    said: list[str] = []
    with pytest.raises(ZeroDivisionError) as raised:
        fail()
    failed = (raised.type, raised.value, raised.tb)
    BoundedLog(said.append).emit(logging.LogRecord(name, logging.ERROR, "", 0, "nothing changed", (), failed))
    [text] = said
    assert text.startswith("pgguard: nothing changed\n  Traceback (most recent call last):\n")
    assert "ZeroDivisionError: no\n  way" in text
