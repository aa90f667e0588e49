"""Refused logins: counted whoever comes and whenever, looked into once, and not before it is known who is there."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import pytest
import trio

from pgguard.attribution.witness import Opening, Witness
from tests.proxy.conftest import running, until
from tests.proxy.messages import SECONDS, message, startup

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from pgguard.attribution.sockets import ClientSocket
    from tests.proxy.conftest import House
    from tests.proxy.fake_backend import FakeBackend
    from tests.proxy.messages import Client

REFUSAL = message("E", b"SFATAL\0VFATAL\0C53300\0Msorry\0Fproc.c\0L1\0RInitProcess\0\0")


class SlowWitness(Witness):
    """Finds out who has opened connections only when the test lets it."""

    def __init__(self) -> None:
        super().__init__()
        self.may_look = threading.Event()

    def opened_many(self, clients: Sequence[ClientSocket]) -> list[Opening]:
        assert self.may_look.wait(SECONDS)
        return super().opened_many(clients)


@pytest.fixture
def witness() -> SlowWitness:
    return SlowWitness()


@pytest.fixture
async def house(backend: FakeBackend, witness: SlowWitness, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[House]:
    monkeypatch.setattr("pgguard.proxy.judge._ROLL_CALL_BUDGET", SECONDS)
    async with running(backend, witness=witness) as house:
        yield house
        witness.may_look.set()


async def be_refused(house: House) -> Client:
    client = await house.connect(unix=True)
    await client.send(startup())
    server = await house.backend.accept()
    await server.packet()
    await server.send(REFUSAL)
    await server.close()
    return client


async def test_connections_are_attributed_before_they_are_counted(house: House, witness: SlowWitness) -> None:
    for _ in range(3):
        await house.session(unix=True)
    client = await be_refused(house)
    await client.nothing()
    assert house.faults == []
    witness.may_look.set()
    await client.expect(REFUSAL)
    [fault] = house.faults
    assert fault.shares is not None
    assert [(share.process and share.process.pid, share.connections) for share in fault.shares] == [(os.getpid(), 3)]


async def test_who_is_refused_meanwhile_is_not_kept_waiting_and_is_counted(house: House, witness: SlowWitness) -> None:
    await house.session(unix=True)
    first = await be_refused(house)
    await first.nothing()
    for _ in range(5):
        client = await be_refused(house)
        await client.expect(REFUSAL)
    assert house.faults == []
    witness.may_look.set()
    await first.expect(REFUSAL)
    await until(lambda: [(count.faults, count.repeats) for count in house.docket.counts()] == [(1, 5)])
    assert house.faults[0].repeat_of is None


async def test_a_refusal_that_nobody_can_be_found_out_about_in_time_is_recorded_all_the_same(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgguard.proxy.judge._ROLL_CALL_BUDGET", 0.05)
    await house.session(unix=True)
    client = await be_refused(house)
    await client.expect(REFUSAL)
    await house.recorded("connection-exhaustion")
    assert house.faults[0].limit == "server"
    await trio.lowlevel.checkpoint()


async def test_without_attribution_the_limit_is_said(backend: FakeBackend) -> None:
    async with running(backend) as house:
        await house.session()
        client = await be_refused(house)
        await client.expect(REFUSAL)
        await house.recorded("connection-exhaustion")
        assert (house.faults[0].limit, house.faults[0].shares) == ("server", None)
