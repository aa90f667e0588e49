"""What the relay tells others: events of descriptors that aren't a session's own, and which sessions are used."""

from __future__ import annotations

import select
import socket
import time
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from pgguard.proxy import losses
from tests.proxy.conftest import until
from tests.proxy.messages import ANSWER, query

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pgguard.proxy.ends import End
    from pgguard.proxy.session import ProxiedSession
    from tests.proxy.conftest import House


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with ExitStack() as stack:
        near, far = socket.socketpair()
        yield stack.enter_context(near), stack.enter_context(far)


async def test_whoever_watches_a_descriptor_is_told_of_its_events(
    house: House, pair: tuple[socket.socket, socket.socket]
) -> None:
    near, far = pair
    sweep = house.guard._sweep
    masks: list[int] = []

    def on_event(mask: int) -> None:
        masks.append(mask)
        if mask & select.EPOLLIN:
            near.recv(1)

    sweep.watch(near.fileno(), select.EPOLLIN, on_event)
    far.send(b"x")
    await until(lambda: masks == [select.EPOLLIN])
    far.send(b"y")
    await until(lambda: masks == [select.EPOLLIN, select.EPOLLIN])
    sweep.unwatch(near.fileno())
    sweep.unwatch(near.fileno())
    far.send(b"z")
    await house.guard.settled()
    assert len(masks) == 2


def _is_long(told: list[int], length: int) -> bool:
    return len(told) == length


async def test_what_is_wrong_with_one_that_is_told_costs_nobody_anything(
    house: House, pair: tuple[socket.socket, socket.socket]
) -> None:
    near, far = pair
    told: list[int] = []

    def on_event(mask: int) -> None:
        near.recv(1)
        told.append(mask)
        raise KeyError("injected")

    before = losses._times.total()
    house.guard._sweep.watch(near.fileno(), select.EPOLLIN, on_event)
    client, server = await house.session()
    for number in (1, 2):
        far.send(b"x")
        await client.send(query("select 1"))
        await server.expect(query("select 1"))
        await server.send(ANSWER)
        await client.expect(ANSWER)
        await until(partial(_is_long, told, number))
    assert losses._times.total() == before + 2
    house.guard._sweep.unwatch(near.fileno())


async def test_the_watches_are_told_when_a_session_is_used_that_has_been_at_rest(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, server = await house.session()
    [session] = house.guard._sessions.values()
    assert session in house.guard._watch._active
    told: list[ProxiedSession] = []
    monkeypatch.setattr(house.guard._sweep._judging, "_stirred", told.append)

    async def converse() -> None:
        await client.send(query("select 1"))
        await server.expect(query("select 1"))
        await server.send(ANSWER)
        await client.expect(ANSWER)

    session.client.attend()
    await converse()
    await converse()
    assert told == [session]
    session.client.attend()
    await server.send(b"N\0\0\0\5\0")
    await client.expect(b"N\0\0\0\5\0")
    assert told == [session]
    await converse()
    assert told == [session, session]


async def test_trios_other_tasks_have_their_turn_after_a_moment_and_sooner_while_one_of_them_is_waited_for(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = house.guard._sweep
    [reception] = house.guard._receptions.values()
    turns: list[float] = []

    def take_turn() -> float:
        def run(until: float, *, patience: float) -> bool:
            assert patience == 100
            turns.append(until - time.monotonic())
            return False

        relay = SimpleNamespace(run=run, took=0.0, is_waited_for=sweep._relay.is_waited_for)
        with monkeypatch.context() as patch:
            patch.setattr(sweep, "_relay", relay)
            patch.setattr("pgguard.proxy.sweep._TURN", 10.0)
            patch.setattr("pgguard.proxy.sweep._TICK", 100.0)
            patch.setattr("pgguard.proxy.sweep._LATEST", 400.0)
            with trio.CancelScope(deadline=trio.current_time() + 50):  # noqa: ASYNC100 - there is a deadline
                assert not sweep._take_turn()
        return turns.pop()

    async def errand(_held: End) -> None:
        begun.set()
        await done.wait()

    await house.session()
    [session] = house.guard._sessions.values()
    await wait_all_tasks_blocked()
    assert 100 < take_turn() <= 400
    for start in (reception.start, partial(sweep._judging.start, session)):
        begun, done = trio.Event(), trio.Event()
        start(errand, session.client)
        assert 0 < take_turn() <= 10  # it can run
        await begun.wait()
        await wait_all_tasks_blocked()
        assert 0 < take_turn() <= 50  # something is due by then
        done.set()
        await wait_all_tasks_blocked()
        assert 100 < take_turn() <= 400


async def test_who_is_waited_for_has_the_turn_that_goes_on_end(
    house: House, pair: tuple[socket.socket, socket.socket]
) -> None:
    """However much there is to do, and however long the turn was to last."""
    near, far = pair
    relay = house.guard._sweep._relay
    far.send(b"there is something to be read, each time")
    for ends in (relay.give_way, relay.begin_errand):
        rounds = 0

        def be_told(_mask: int) -> None:
            nonlocal rounds
            rounds += 1
            if rounds == 3:
                ends()  # noqa: B023 - it is called here alone

        relay.watch(near.fileno(), select.EPOLLIN, be_told)
        assert relay.run(time.monotonic() + 60, patience=60)
        assert rounds == 3
        house.guard._sweep.unwatch(near.fileno())
    relay.end_errand()
