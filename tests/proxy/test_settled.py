"""Whoever asks whether everything has been judged is told so when it has, and waits for nothing else."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from pgguard.attribution.witness import Witness
from tests.proxy.conftest import running
from tests.proxy.messages import ANSWER, SECONDS, query, startup

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from pgguard.attribution.findings import Findings
    from tests.proxy.conftest import House
    from tests.proxy.fake_backend import FakeBackend

both = pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])


@pytest.fixture
async def house(backend: FakeBackend) -> AsyncIterator[House]:
    async with running(backend) as house:
        yield house


async def settled(house: House) -> None:
    with trio.fail_after(SECONDS):
        await house.guard.settled()


@both
async def test_what_has_been_sent_has_been_judged(house: House, *, unix: bool) -> None:
    sessions = [await house.session(unix=unix) for _ in range(3)]
    for n, (client, _) in enumerate(sessions, 1):
        await client.send(query("select 1") + query("select 2"))
        await settled(house)
        assert house.kinds.count("request-while-busy") == min(n, 1)
        assert sum(one.faults + one.repeats for one in house.docket.counts()) == n


@both
async def test_a_connection_that_has_been_closed_has_been_judged(house: House, *, unix: bool) -> None:
    client, server = await house.session(unix=unix)
    await client.send(query("select 1"))
    await server.expect(query("select 1"))
    await client.close()
    await settled(house)
    assert house.kinds == ["unclean-close"]


@both
async def test_who_has_just_come_has_been_heard(house: House, *, unix: bool) -> None:
    for n in range(1, 10):
        client = await house.connect(unix=unix)
        await client.send(query("select 1"))
        await settled(house)
        assert [(one.kind, one.faults + one.repeats) for one in house.docket.counts()] == [("protocol-violation", n)]


async def test_who_says_nothing_is_not_waited_for(house: House) -> None:
    await house.session()
    await house.connect()
    half = await house.connect()
    await half.send(startup()[:5])
    waiting, _ = await house.session()
    await waiting.send(query("select 1"))
    for _ in range(3):
        await settled(house)
    assert house.kinds == []


async def test_who_goes_on_and_on_is_not_waited_for(house: House) -> None:
    client, server = await house.session()
    going = True

    async def answer() -> None:
        while True:  # until who asks has had the last one
            await server.expect(query("select 1"))
            await server.send(ANSWER)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer)

        async def ask() -> None:
            while going:
                await client.send(query("select 1"))
                await client.expect(ANSWER)
            nursery.cancel_scope.cancel()

        nursery.start_soon(ask)
        for _ in range(20):
            await settled(house)
        going = False
    assert house.kinds == []


class SlowWitness(Witness):
    """Looks at who has a connection open only when the test lets it."""

    def __init__(self) -> None:
        super().__init__()
        self.may_look = threading.Event()
        self.looks = threading.Event()

    def findings(self, *args: Any, **more: Any) -> Findings:
        self.looks.set()
        assert self.may_look.wait(SECONDS)
        return super().findings(*args, **more)


async def test_a_fault_that_is_being_looked_into_is_waited_for_and_the_next_one_is_not(backend: FakeBackend) -> None:
    witness = SlowWitness()
    async with running(backend, witness=witness) as house:
        client, server = await house.session(unix=True)
        await client.send(query("select 1") + query("select 2"))
        await server.expect(query("select 1"))
        order: list[str] = []

        async def ask(name: str) -> None:
            await settled(house)
            order.append(name)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, "asked")
            await trio.to_thread.run_sync(witness.looks.wait, SECONDS)
            await trio.testing.wait_all_tasks_blocked()
            assert (order, house.kinds) == ([], [])
            witness.may_look.set()
        assert house.kinds == ["request-while-busy"]
