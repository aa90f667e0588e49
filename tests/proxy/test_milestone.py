"""What happens once: whoever waits for it is woken, before it has happened and afterwards."""

from __future__ import annotations

import trio

from pgguard.proxy.milestone import Milestone


async def test_those_who_wait_are_woken() -> None:
    milestone = Milestone()
    woken = []

    async def wait(number: int) -> None:
        await milestone.wait()
        woken.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(2):
            nursery.start_soon(wait, number)
        await trio.testing.wait_all_tasks_blocked()
        assert not milestone.is_set()
        milestone.set()
        milestone.set()  # again: it stays so
    assert milestone.is_set()
    assert sorted(woken) == [0, 1]


async def test_what_has_happened_is_not_waited_for() -> None:
    milestone, other = Milestone(), Milestone()
    milestone.set()
    with trio.testing.assert_checkpoints():
        await milestone.wait()
    assert not other.is_set()  # though what has happened is one for all
    with trio.move_on_after(0) as waiting:
        await other.wait()
    assert waiting.cancelled_caught
    assert not other.is_set()
