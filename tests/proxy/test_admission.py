"""How many there is room for, and what those are told that there is none for."""

from __future__ import annotations

import errno
import os
import select
import socket
from typing import TYPE_CHECKING, Any

import pytest
import trio

from pgguard.proxy.admission import Admission
from pgguard.proxy.sockets import accept
from tests.proxy.conftest import running, until
from tests.proxy.messages import SSL_REQUEST, startup

if TYPE_CHECKING:
    from tests.proxy.conftest import House
    from tests.proxy.fake_backend import FakeBackend


@pytest.mark.parametrize("evidence", [False, True])
@pytest.mark.parametrize("limit", [24, 64, 256, 1024, 20_000, 1_048_576])
def test_what_is_kept_back(limit: int, evidence: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are many, more than a hundred; where there are few, a third."""
    monkeypatch.setattr(Admission, "limit", limit)
    admission = Admission(evidence=evidence, extras=lambda: 0)
    admission._others = 15
    reserve = limit - 15 - 2 * admission.capacity
    assert reserve in range(min(128 if evidence else 48, (limit - 15) // 3), min(128, limit - 15) + 2)
    assert 4 * admission.turned_away_at_once <= max(4, reserve)
    admitted = 0
    while admission.has_room():
        admission.admit()
        admitted += 1
    assert admitted == admission.capacity
    admission.vacate()
    assert admission.has_room()
    admission.admit()
    assert not admission.has_room()


def test_what_sessions_have_beyond_their_two_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Admission, "limit", 99)
    extras = 0
    admission = Admission(evidence=False, extras=lambda: extras)
    while admission.has_room():
        admission.admit()
    admission.vacate()
    assert admission.has_room()
    extras = 1
    assert not admission.has_room()


@pytest.mark.parametrize("number", [errno.ENFILE, errno.EMFILE])
@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
async def test_a_system_without_descriptors(
    house: House, number: int, unix: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the guard has in hand is enough to say so, to one after the other."""

    def without_descriptors(sock: socket.socket) -> Any:
        if house.guard._door._in_hand and select.select([sock], [], [], 0)[0]:
            raise OSError(number, os.strerror(number))
        return accept(sock)

    with monkeypatch.context() as patch:
        patch.setattr("pgguard.proxy.door.accept", without_descriptors)
        for _ in range(3):
            client = await house.connect(unix=unix)
            await client.send(SSL_REQUEST)
            await client.expect(b"N")
            await client.send(startup())
            fields = (await client.message()).fields
            assert (fields["S"], fields["C"]) == ("FATAL", "53300")
            assert fields["M"] == f"pgguard: too many connections: {os.strerror(number)}"
            assert ("fs.file-max" if number == errno.ENFILE else "LimitNOFILE=") in fields["H"]
            assert await client.rest() == b""
            await client.close()
    await house.session(unix=unix)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
async def test_no_descriptor_for_the_server(house: House, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It isn't the server that is the matter."""

    def fail(*_: object) -> None:
        raise OSError(number, "")

    client = await house.connect()
    with monkeypatch.context() as patch:
        patch.setattr("pgguard.proxy.dialling.Dial.step", fail)
        await client.send(startup())
        fields = (await client.message()).fields
        assert fields["C"] == "53300"
        where = f"127.0.0.1:{house.backend.port}"
        assert fields["M"] == f"pgguard: too many connections: {where}: {os.strerror(number)}"
        assert "Check that PostgreSQL is running" not in fields["H"]
    await house.session()


async def test_who_is_listened_to_makes_room(backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that is over, and is kept only to hear who goes on with it, keeps nobody out."""

    async def is_shared(*_: object) -> bool:
        return True

    monkeypatch.setattr("pgguard.proxy.judge.Judge.is_shared", is_shared)
    async with running(backend) as house:
        client, server = await house.session()
        await server.close()
        assert (await client.message()).fields["C"] == "08006"
        await until(lambda: bool(house.guard._sweep._endings.aftermath._listened))
        monkeypatch.setattr(Admission, "_for_sessions", lambda _: 2)
        await house.session()
        assert await client.rest() == b""
        refused = await house.connect()
        await refused.send(startup())
        assert (await refused.message()).fields["C"] == "53300"
        await trio.lowlevel.checkpoint()
