"""Looks that hang are begun again, and take nobody's place."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
import trio

from pgguard.attribution import hangs
from pgguard.attribution.hangs import reading
from pgguard.proxy import looking
from pgguard.proxy.looking import look, over_hangs
from tests.proxy.conftest import until

if TYPE_CHECKING:
    from collections.abc import Iterator

_NOBODY = 1 << 30
"""A pid that no process has."""


class Trap:
    """Something that hangs whoever looks at it while it isn't known to do so."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.looks = 0

    def look(self, answer: str) -> str:
        self.looks += 1
        try:
            with reading(_NOBODY):
                self.open.wait()
        except TimeoutError:
            return answer
        return "it was let go"


@pytest.fixture
def trap(monkeypatch: pytest.MonkeyPatch) -> Iterator[Trap]:
    monkeypatch.setattr(hangs, "PATIENCE", 0.05)
    monkeypatch.setattr(looking, "_INTERVAL", 0.02)
    trap = Trap()
    yield trap
    trap.open.set()


async def test_it_is_begun_again_without_what_hangs(trap: Trap, caplog: pytest.LogCaptureFixture) -> None:
    limiter = trio.CapacityLimiter(1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(over_hangs)
        for _ in range(3):
            assert await look(trap.look, "answer", limiter=limiter) == "answer"
        assert trap.looks == 4
        assert limiter.total_tokens == 2, "the one that hangs takes nobody's place"
        trap.open.set()
        await until(lambda: limiter.total_tokens == 1)
        assert await look(trap.look, "answer", limiter=limiter) == "it was let go"
        nursery.cancel_scope.cancel()
    complaint = f"pid {_NOBODY} can't be looked at: reading its files in /proc hangs"
    assert caplog.messages.count(complaint) == 1


async def test_one_that_was_given_up_in_time_takes_nobodys_place_either(trap: Trap) -> None:
    limiter = trio.CapacityLimiter(1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(over_hangs)
        with trio.move_on_after(0.01):
            await look(trap.look, "answer", limiter=limiter)
        assert await look(trap.look, "answer", limiter=limiter) == "answer"
        trap.open.set()
        await until(lambda: limiter.total_tokens == 1)
        nursery.cancel_scope.cancel()


async def test_what_is_slow_and_does_not_hang_is_waited_for(trap: Trap) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(over_hangs)

        def compute() -> str:
            trap.open.wait(0.3)
            return "done"

        assert await look(compute) == "done"
        nursery.cancel_scope.cancel()


async def test_an_error_is_the_callers() -> None:
    def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        await look(fail)
