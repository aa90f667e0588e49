"""What only a client's driver may excuse waits, in mode reject, until that is known: and not for ever."""

from __future__ import annotations

import threading
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from pgguard.attribution.evidence import Driver
from pgguard.attribution.runtime import Runtime
from pgguard.attribution.witness import Opening, Witness
from tests.proxy.conftest import running, until
from tests.proxy.fake_backend import converse
from tests.proxy.messages import ANSWER, FAILED, SECONDS, query

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from pgguard.attribution.sockets import ClientSocket
    from pgguard.proxy.milestone import Milestone
    from pgguard.proxy.session import ProxiedSession
    from tests.proxy.conftest import House
    from tests.proxy.fake_backend import BackendConnection, FakeBackend
    from tests.proxy.messages import Client


class LateWitness(Witness):
    """Tells what speaks on connections when the test lets it, and what the test says."""

    def __init__(self, driver: Driver) -> None:
        super().__init__()
        self.may_tell = threading.Event()
        self._driver = driver

    def opened_many(self, clients: Sequence[ClientSocket]) -> list[Opening]:
        assert self.may_tell.wait(SECONDS)
        openings = super().opened_many(clients)
        return [replace(opening, driver=self._driver, runtime=Runtime()) for opening in openings]


@asynccontextmanager
async def guarded(backend: FakeBackend, witness: LateWitness, **settings: Any) -> AsyncIterator[House]:
    try:
        async with running(backend, witness=witness, **({"mode": "reject"} | settings)) as house:
            yield house
    finally:
        witness.may_tell.set()


async def ask_twice(house: House) -> tuple[Client, BackendConnection, ProxiedSession]:
    """A request on top of another one, by one and the same process: whether that is a fault, the driver decides."""
    client, server = await house.session(unix=True)
    [session] = house.guard._sessions.values()
    await client.send(query("select pg_sleep(60)"))
    await server.expect(query("select pg_sleep(60)"))
    await client.send(query("select 1"))
    return client, server, session


async def answer_both(client: Client, server: BackendConnection) -> None:
    await server.expect(query("select 1"))
    await server.send(ANSWER + ANSWER)
    await client.expect(ANSWER + ANSWER)
    await converse(client, server)


NO_TIME: Any = {"evidence_budget": 0.0}


def is_waited_for(milestone: Milestone) -> bool:
    event = milestone._event
    return event is not None and event.statistics().tasks_waiting > 0


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The look at the driver has all the time that a test may take; NO_TIME is for the others, which come too late."""
    monkeypatch.setattr("pgguard.proxy.judge._DRIVER_BUDGET", SECONDS)


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("driver", [Driver.LIBPQ, Driver.PYTHON])
async def test_one_that_may_not_pipeline_is_rejected_however_late_it_is_known(
    backend: FakeBackend, driver: Driver
) -> None:
    witness = LateWitness(driver)
    async with guarded(backend, witness, **NO_TIME) as house:
        client, server, session = await ask_twice(house)
        await until(lambda: is_waited_for(session.opening_known))
        await server.nothing()
        assert house.kinds == []
        witness.may_tell.set()
        assert (await client.message()).fields["C"] == "08P01"
        assert await client.rest() == FAILED
        assert await server.rest() == b""
        assert [(fault.kind, fault.severity, fault.action) for fault in house.faults] == [
            ("request-while-busy", "error", "rejected")
        ]


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("driver", [Driver.NODE, Driver.UNKNOWN])
async def test_one_that_may_goes_on_with_what_it_has_sent(backend: FakeBackend, driver: Driver) -> None:
    witness = LateWitness(driver)
    async with guarded(backend, witness, **NO_TIME) as house:
        client, server, session = await ask_twice(house)
        await until(lambda: is_waited_for(session.opening_known))
        witness.may_tell.set()
        await answer_both(client, server)
        assert [(fault.kind, fault.severity, fault.action) for fault in house.faults] == [
            ("request-while-busy", "warning", "logged")
        ]


async def test_one_that_never_becomes_known_is_let_go_on(backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgguard.proxy.judge._DRIVER_BUDGET", 0.05)
    async with guarded(backend, LateWitness(Driver.LIBPQ), evidence_budget=0.25) as house:
        client, server, _ = await ask_twice(house)
        await answer_both(client, server)
        assert [(fault.kind, fault.severity, fault.action) for fault in house.faults] == [
            ("request-while-busy", "warning", "logged")
        ]


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize(
    ("settings", "rejected"),
    [({"mode": "log"}, False), ({"kinds": {"request-while-busy": "reject"}}, True)],
    ids=["logged in any case", "rejected in any case"],
)
async def test_nobody_waits_for_a_driver_that_decides_nothing(
    backend: FakeBackend, settings: dict[str, object], rejected: bool
) -> None:
    async with guarded(backend, LateWitness(Driver.LIBPQ), **NO_TIME, **settings) as house:
        client, server, _ = await ask_twice(house)
        if rejected:
            assert (await client.message()).fields["C"] == "08P01"
        else:
            await answer_both(client, server)
