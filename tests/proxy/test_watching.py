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


async def test_trios_other_tasks_have_their_turn_after_a_moment_and_sooner_while_a_client_waits_for_one(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = house.guard._sweep
    [reception] = house.guard._receptions.values()
    turns: list[float] = []

    def run(until: float, *, patience: float) -> bool:
        assert patience == 100
        turns.append(until - time.monotonic())
        return False

    def take_turn() -> float:
        with monkeypatch.context() as patch:
            patch.setattr(sweep, "_relay", SimpleNamespace(run=run, took=0.0))
            patch.setattr("pgguard.proxy.sweep._TICK", 100.0)
            patch.setattr("pgguard.proxy.sweep._LATEST", 400.0)
            assert not sweep._take_turn()
        return turns.pop()

    async def errand(_held: End) -> None:
        begun.set()
        await done.wait()

    assert 100 < take_turn() <= 400
    await house.session()
    [session] = house.guard._sessions.values()
    for start in (reception.start, partial(sweep._judging.start, session)):
        begun, done = trio.Event(), trio.Event()
        start(errand, session.client)
        await begun.wait()
        assert 0 < take_turn() <= 100
        done.set()
        await wait_all_tasks_blocked()
        assert 100 < take_turn() <= 400
