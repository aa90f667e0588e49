"""What fails costs what it was for; it is told once, and counted."""
# ruff: noqa: ARG001 - a clock has to be among a test's own arguments

from __future__ import annotations

import itertools
import struct
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio
import trio.lowlevel

from pgguard.proxy import losses
from pgguard.proxy.losses import Loss, keep_going, note, remarks, spared
from pgguard.proxy.session import ProxiedSession
from pgguard.reporting.log import BoundedLog

if TYPE_CHECKING:
    from trio.testing import MockClock

SESSION = ProxiedSession(7, transport="tcp", client_name=None, client_socket=None, opened_at=0)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has failed yet."""
    monkeypatch.setattr(losses, "_times", type(losses._times)())
    monkeypatch.setattr(losses, "_said", {})


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What the guard's log says."""
    lines: list[str] = []
    log = BoundedLog(lines.append)
    losses.logger.addHandler(log)
    yield lines
    losses.logger.removeHandler(log)


def fail(error: BaseException) -> None:
    raise error


# Some errors are Python's own, and no line of the guard's raises them.
ERRORS = [
    MemoryError("no more"),
    OSError(24, "Too many open files"),
    RecursionError("too deep"),
    struct.error("too short"),
    KeyError("missing"),
    ExceptionGroup("several", [ValueError("one of them")]),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_exception_is_told_with_its_traceback_once_and_counted(said: list[str], error: Exception) -> None:
    for _ in range(1000):
        with spared(Loss.EVIDENCE, SESSION):
            fail(error)
    [line] = said
    assert line.startswith(f"pgguard: session 7: {Loss.EVIDENCE.value}\n")
    assert "Traceback" in line
    [remark] = remarks()
    assert remark.endswith(", 1000 times")


def test_how_often_it_has_come_is_told_at_intervals(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("pgguard.proxy.losses.time.monotonic", lambda: now)
    for _ in range(3):
        for _ in range(100):
            with spared(Loss.SENDER):
                fail(KeyError("x"))
        now += 61
    assert [line.splitlines()[0] for line in said] == [
        f"pgguard: {Loss.SENDER.value}",
        f"pgguard: {Loss.SENDER.value}, 100 more times: KeyError: 'x'",
        f"pgguard: {Loss.SENDER.value}, 100 more times: KeyError: 'x'",
    ]
    assert sum("Traceback" in line for line in said) == 1


def test_exceptions_of_several_types_are_told_apart(said: list[str]) -> None:
    for error in (KeyError("x"), ValueError("y"), KeyError("z")):
        with spared(Loss.RECORD):
            fail(error)
    assert len(said) == 2
    assert len(remarks()) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), GeneratorExit()], ids=repr)
def test_what_is_no_exception_goes_through(said: list[str], error: BaseException) -> None:
    with pytest.raises(type(error)), spared(Loss.STEP):
        fail(error)
    assert said == []


async def test_a_cancellation_goes_through() -> None:
    async def spare() -> None:
        with spared(Loss.STEP):
            await trio.sleep_forever()

    for task in spare, partial(keep_going, trio.sleep_forever):
        with trio.move_on_after(0) as scope:
            await task()
        assert scope.cancelled_caught
    assert remarks() == []


def test_a_log_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses.logger, "error", lambda *_, **__: fail(OSError("full")))
    with spared(Loss.STEP):
        fail(ValueError("x"))
    note(Loss.STEP)


@pytest.fixture
def began() -> list[float]:
    return []


@pytest.fixture
def task(began: list[float]) -> Callable[[int], Awaitable[None]]:
    """Fails at once, until it has been begun that often."""

    async def run(times: int) -> None:
        began.append(trio.current_time())
        await trio.lowlevel.checkpoint()
        if len(began) < times:
            raise ValueError("x")

    return run


async def test_a_task_that_fails_at_once_each_time_is_begun_ever_more_rarely(
    task: Callable[[int], Awaitable[None]], began: list[float], autojump_clock: MockClock
) -> None:
    await keep_going(task, 12)
    pauses = [round(after - before, 6) for before, after in itertools.pairwise(began)]
    assert pauses[0] == pytest.approx(losses._PAUSE)
    assert pauses == sorted(pauses)
    assert pauses[-1] == pytest.approx(losses._LONGEST_PAUSE)
    assert remarks()[0].endswith(", 11 times")


async def test_a_task_that_has_worked_for_long_is_begun_anew_at_once(autojump_clock: MockClock) -> None:
    began = []

    async def run() -> None:
        began.append(trio.current_time())
        if len(began) == 8:
            return
        if len(began) == 7:
            await trio.sleep(2 * losses._STEADY)
        raise ValueError("x")

    await keep_going(run)
    assert began[-1] - began[-2] == pytest.approx(2 * losses._STEADY + losses._PAUSE)
