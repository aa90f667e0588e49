"""Who began while the guard slept isn't taken for the sender of what it then reads."""

from __future__ import annotations

import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from pgguard.attribution import vigil
from pgguard.attribution.processes import TICKS_PER_SECOND, read_process
from pgguard.attribution.vigil import BEAT, Vigil
from pgguard.attribution.witness import Witness

if TYPE_CHECKING:
    from collections.abc import Iterator


class Clock:
    """Shows what it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(vigil, "_now", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def began(at: float) -> int:
    return int(at * TICKS_PER_SECOND)


def awake(clock: Clock, vigil: Vigil, until: float) -> None:
    while clock.now < until:
        vigil.beat()
        clock.now += BEAT


def test_of_a_guard_that_is_awake_everybody_is_believed(clock: Clock) -> None:
    vigil = Vigil()
    assert vigil.saw_begin(began(1000)), "nobody has said yet that it is awake"
    awake(clock, vigil, 1010)
    for at in (1, 999, 1005, 1009.9, 1010):
        assert vigil.saw_begin(began(at))


def test_who_began_while_it_slept_is_not_believed_just_after_that(clock: Clock) -> None:
    vigil = Vigil()
    awake(clock, vigil, 1010)
    clock.now = 1020
    for awoken in (False, True):
        # Before the beat too: what has come in may be read first.
        if awoken:
            vigil.beat()
        assert vigil.saw_begin(began(1009))
        assert not vigil.saw_begin(began(1011))
        assert not vigil.saw_begin(began(1019.99))
    clock.now = 1020.2
    vigil.beat()
    assert vigil.saw_begin(began(1020.1))
    assert not vigil.saw_begin(began(1015))
    awake(clock, vigil, 1022)
    assert vigil.saw_begin(began(1015)), "what it sends now, the guard has read at once"


def test_a_beat_that_is_a_little_late_is_no_sleep(clock: Clock) -> None:
    vigil = Vigil()
    awake(clock, vigil, 1010)
    clock.now += 0.6
    vigil.beat()
    assert vigil.saw_begin(began(1010.3))


@pytest.fixture
def sleeper() -> Iterator[int]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process.pid
        process.kill()


def test_a_witness_that_has_slept_names_nobody_who_began_meanwhile(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, sleeper: int
) -> None:
    process = read_process(sleeper)
    assert process is not None
    witness = Witness()
    clock.now = process.started / TICKS_PER_SECOND - 5
    witness.stay_awake()
    clock.now += 10
    assert witness.sender(sleeper) is None
    witness.stay_awake()
    assert witness.sender(sleeper) is None
    clock.now += 0.5
    witness.stay_awake()
    clock.now += 0.6
    assert witness.sender(sleeper) is not None
    monkeypatch.undo()
    assert abs(vigil._now() - time.clock_gettime(time.CLOCK_BOOTTIME)) < 60
