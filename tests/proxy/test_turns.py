"""Work that many sessions bring about at once: in which order it is done, and what others get to do meanwhile."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
import trio

from pgguard.proxy.turns import SLICE, Allowance, Desk, Stint, Turns, Urgency, timed

if TYPE_CHECKING:
    from collections.abc import Callable

    from trio.testing import MockClock


class Rounds(trio.abc.Instrument):
    """Counts the rounds of trio's loop."""

    def __init__(self) -> None:
        self.number = 0

    def after_io_wait(self, timeout: float) -> None:
        del timeout
        self.number += 1


@pytest.fixture
async def rounds() -> Rounds:
    rounds = Rounds()
    trio.lowlevel.add_instrument(rounds)
    return rounds


@pytest.mark.parametrize("number", [1, 2, 50])
async def test_one_turn_is_taken_in_each_round_of_the_loop(rounds: Rounds, number: int) -> None:
    """However many come at once, and also where nobody has waited before."""
    turns, taken = Turns(), list[int]()

    async def work() -> None:
        async with turns.turn(Urgency.MESSAGE):
            taken.append(rounds.number)

    async with trio.open_nursery() as nursery:
        for _ in range(number):
            nursery.start_soon(work)
    assert len(set(taken)) == len(taken) == number


async def test_others_have_their_turn_in_between() -> None:
    turns, order = Turns(), list[str]()

    async def work() -> None:
        async with turns.turn(Urgency.MESSAGE):
            order.append("work")

    async def sweep() -> None:
        for _ in range(30):
            order.append("sweep")
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(sweep)
        for _ in range(20):
            nursery.start_soon(work)
    assert "work,work,work" not in ",".join(order)


async def test_the_most_urgent_comes_first_and_then_who_has_waited_longer() -> None:
    turns, order = Turns(), list[str]()

    async def work(urgency: Urgency, name: str) -> None:
        async with turns.turn(urgency):
            order.append(name)

    async with trio.open_nursery() as nursery, turns.turn(Urgency.MESSAGE):
        for name in ("end 1", "end 2", "goodbye 1", "message 1", "goodbye 2", "message 2"):
            nursery.start_soon(work, Urgency[name.split()[0].upper()], name)
            await trio.testing.wait_all_tasks_blocked()
    assert order == ["message 1", "message 2", "goodbye 1", "goodbye 2", "end 1", "end 2"]


async def test_a_turn_that_fails_or_is_cancelled_is_passed_on(autojump_clock: MockClock) -> None:
    del autojump_clock
    turns = Turns()
    with pytest.raises(ZeroDivisionError):
        async with turns.turn(Urgency.END):
            raise ZeroDivisionError
    with trio.CancelScope() as scope:
        scope.cancel()
        async with turns.turn(Urgency.END):
            raise AssertionError
    async with turns.turn(Urgency.END):
        with trio.move_on_after(1):
            async with turns.turn(Urgency.END):
                raise AssertionError
    with trio.fail_after(1):
        async with turns.turn(Urgency.END):
            pass


async def occupied(nursery: trio.Nursery, desk: Desk) -> trio.Event:
    """Take a place, and keep it until the event."""
    leave = trio.Event()

    async def stay() -> None:
        async with desk.place(Urgency.END) as served:
            assert served
            await leave.wait()

    nursery.start_soon(stay)
    await trio.testing.wait_all_tasks_blocked()
    return leave


async def test_a_desk_serves_some_and_lets_some_wait_and_no_more(nursery: trio.Nursery) -> None:
    desk, served = Desk(1, 2), list[str]()
    leave = await occupied(nursery, desk)

    def crowded() -> bool:
        return desk.is_crowded

    assert crowded() is False

    async def ask(urgency: Urgency, name: str, insist: bool) -> None:
        async with desk.place(urgency, insist=insist) as is_served:
            served.append(name if is_served else f"not {name}")

    for urgency, name, insist in (
        (Urgency.END, "end 1", False),
        (Urgency.END, "end 2", False),
        (Urgency.END, "end 3", False),
        (Urgency.END, "end 4", True),
        (Urgency.MESSAGE, "message 1", False),
    ):
        nursery.start_soon(ask, urgency, name, insist)
        await trio.testing.wait_all_tasks_blocked()
    assert served == ["not end 3"]
    assert crowded() is True
    leave.set()
    await trio.testing.wait_all_tasks_blocked()
    assert served[1:] == ["message 1", "end 1", "end 2", "end 4"]
    assert crowded() is False


async def test_who_stops_waiting_at_a_desk_takes_no_place(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    del autojump_clock
    desk = Desk(1, 2)
    leave = await occupied(nursery, desk)
    with trio.move_on_after(1):
        async with desk.place(Urgency.MESSAGE):
            raise AssertionError
    leave.set()
    with trio.fail_after(1):
        async with desk.place(Urgency.END) as served:
            assert served


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets time pass."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def passes(seconds: float) -> None:
        now[0] += seconds

    return passes


def test_an_allowance_is_saved_and_spent(clock: Callable[[float], None]) -> None:
    allowance = Allowance(0.1, 1.0)
    assert allowance.has_any()
    allowance.spend(2.0)
    assert not allowance.has_any()
    assert allowance.seconds_without() == pytest.approx(10.0)
    clock(9.0)
    assert not allowance.has_any()
    assert allowance.seconds_without() == pytest.approx(1.0)
    clock(2.0)
    assert allowance.has_any()
    clock(1000.0)
    assert allowance.has_any()
    allowance.spend(1.1)
    assert not allowance.has_any()


async def test_a_stint_rests_when_it_has_lasted_for_a_slice(rounds: Rounds) -> None:
    stint = Stint()
    began, number = time.monotonic(), rounds.number
    rested: list[bool] = []
    while time.monotonic() - began < 5 * SLICE or not any(rested):
        rested.append(await stint.rest())
    assert 1 <= sum(rested) == rounds.number - number <= 5


async def test_a_stint_takes_what_it_works_and_not_what_others_do(nursery: trio.Nursery) -> None:
    stint = Stint()

    def work() -> None:
        began = time.thread_time()
        while time.thread_time() - began < 0.05:
            pass

    async def others() -> None:
        work()

    nursery.start_soon(others)
    while not await stint.rest():
        pass
    assert stint.spent < 0.04
    work()
    assert stint.spent >= 0.05


def test_what_a_thread_takes_is_counted_without_its_sleep() -> None:
    value, seconds = timed(time.sleep, 0.2)
    assert value is None
    assert 0 <= seconds < 0.1
