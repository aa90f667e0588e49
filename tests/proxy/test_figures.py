"""What a guard counts, for whoever watches it from outside."""

from __future__ import annotations

import errno
import os
import socket
from typing import TYPE_CHECKING

import pytest
import trio

from pgguard.attribution.findings import Activity
from pgguard.proxy.dialling import Dial
from pgguard.proxy.figures import BOUNDS, Durations, Turnaway
from pgguard.proxy.losses import Loss, losses, spared
from pgguard.wire.fields import build_error_response
from tests.proxy.conftest import running, until
from tests.proxy.fake_backend import part
from tests.proxy.messages import (
    COLUMNS,
    ONE_ROW,
    READY,
    SECONDS,
    SELECTED,
    SSL_REQUEST,
    TERMINATE,
    Client,
    message,
    query,
    startup,
)

if TYPE_CHECKING:
    from tests.proxy.conftest import House
    from tests.proxy.fake_backend import FakeBackend

BEGUN = message("C", b"BEGIN\0") + message("Z", b"T")
FAREWELL = build_error_response("no", sqlstate="28P01")
ANSWER = COLUMNS + ONE_ROW + SELECTED + READY


@pytest.mark.parametrize(
    ("seconds", "bucket"),
    [(0.0, 0), (0.9e-6, 0), (1.0e-6, 1), (1.9e-6, 1), (2.0e-6, 2), (1e-3, 10), (BOUNDS[-1], len(BOUNDS)), (1e9, 24)],
)
def test_a_duration_goes_into_the_first_bucket_that_it_is_shorter_than(seconds: float, bucket: int) -> None:
    durations = Durations()
    durations.note(seconds)
    measured = durations.measured()
    assert measured.times.index(1) == bucket
    assert sum(measured.times) == 1
    assert measured.seconds == seconds
    assert bucket == len(BOUNDS) or seconds < BOUNDS[bucket]
    assert bucket == 0 or seconds >= BOUNDS[bucket - 1] * 0.999


async def test_sessions_requests_and_bytes_are_counted_also_of_those_that_are_over(house: House) -> None:
    none = await house.guard.figures()
    assert (none.clients, none.introduced, none.requests, none.from_clients, none.from_servers) == (0, 0, 0, 0, 0)
    client, server = await house.session()
    other, its_server = await house.session(unix=True)
    before = await house.guard.figures()
    for _ in range(3):
        await client.send(query("select 1"))
        await server.expect(query("select 1"))
        await server.send(ANSWER)
        await client.expect(ANSWER)
    await other.send(query("begin"))
    await its_server.expect(query("begin"))
    await its_server.send(BEGUN)
    await other.expect(BEGUN)
    seen = await house.guard.figures()
    assert (seen.clients, seen.introduced, seen.requests) == (2, 2, 4)
    assert tuple(now - then for now, then in zip(seen.messages, before.messages, strict=True)) == (3 + 1, 3 * 4 + 2)
    assert seen.from_clients - before.from_clients == 3 * len(query("select 1")) + len(query("begin"))
    assert seen.from_servers - before.from_servers == 3 * len(ANSWER) + len(BEGUN)
    assert {what: count for what, count in seen.open.items() if count} == {
        Activity.IDLE: 1,
        Activity.IDLE_IN_TRANSACTION: 1,
    }
    assert sum(seen.added.times) > 0
    assert seen.added.seconds > 0
    await part(client, server)
    await until(lambda: len(house.guard.snapshot()) == 1)
    after = await house.guard.figures()
    assert (after.requests, sum(after.open.values())) == (4, 1)
    assert after.messages == (seen.messages[0] + 1, seen.messages[1])  # Terminate
    assert not any(after.turned_away.values())


async def test_what_is_held_back_is_counted_once(house: House) -> None:
    client, server = await house.session()
    before = await house.guard.figures()
    asked = query("select 1")
    await client.send(asked[:3])
    await client.send(asked[3:])
    await server.expect(asked)
    assert (await house.guard.figures()).from_clients - before.from_clients == len(asked)


async def turned_away(house: House) -> set[Turnaway]:
    """Wait until a client has been turned away, and return why those have been that have."""
    with trio.fail_after(SECONDS):
        while True:
            seen = (await house.guard.figures()).turned_away
            if why := {one for one, times in seen.items() if times}:
                return why
            await trio.sleep(0.005)


async def test_it_is_counted_why_clients_are_turned_away(backend: FakeBackend) -> None:
    async with running(backend, startup_timeout=0.2) as house:
        stranger = await house.connect()
        await stranger.send(b"GET / HTTP/1.0\r\n\r\n")
        assert await turned_away(house) == {Turnaway.NO_POSTGRESQL}
    async with running(backend, startup_timeout=0.2) as house:
        await house.connect()
        assert await turned_away(house) == {Turnaway.LATE}
        assert house.guard.server_answers == {}
    async with running(backend) as house:
        client = await house.connect()
        await client.send(startup())
        await (await backend.accept()).log_in(FAREWELL)
        await backend.close_all()
        assert await turned_away(house) == {Turnaway.LOGIN}
        assert house.guard.server_answers == {None: True}
    async with running() as house:
        client = await Client.connect(house.port)
        await client.send(startup())
        assert await turned_away(house) == {Turnaway.NO_SERVER}
        assert house.guard.server_answers == {None: False}
        await client.close()
    async with running(backend) as house:
        client = await house.connect()
        await client.send(SSL_REQUEST)
        await client.expect(b"N")
        await client.close()
        assert await turned_away(house) == {Turnaway.ENCRYPTION}


async def test_who_is_refused_in_its_first_step_and_stays_is_not_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it wants is there when it is accepted, and the server refuses connections."""
    monkeypatch.setattr("pgguard.proxy.arrival._FAREWELL", 0.05)
    async with running(startup_timeout=0.2) as house:
        sock = socket.create_connection(("127.0.0.1", house.port))
        sock.sendall(startup())
        client = Client(trio.SocketStream(trio.socket.from_stdlib_socket(sock)))
        assert (await client.message()).fields["C"] == "08001"
        assert await client.rest() == b""
        await until(lambda: not house.guard._roster.arriving)
        assert await turned_away(house) == {Turnaway.NO_SERVER}
        await client.close()


async def test_a_client_that_has_only_looked_who_is_there_is_not_turned_away(backend: FakeBackend) -> None:
    async with running(backend) as house:
        for words in b"", SSL_REQUEST + TERMINATE:
            client = await house.connect()
            await client.send(words)
            await client.close()
        await until(lambda: house.guard.sessions == 2)
        await house.guard.settled()
        assert not any((await house.guard.figures()).turned_away.values())


async def test_that_this_host_has_no_ports_left_is_not_the_servers_doing(
    backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(_: Dial) -> None:
        raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))

    monkeypatch.setattr(Dial, "step", step)
    async with running(backend) as house:
        client = await house.connect()
        await client.send(startup())
        assert await turned_away(house) == {Turnaway.NO_ROOM}
        assert house.guard.server_answers == {}


def test_internal_errors_are_counted_by_what_they_cost() -> None:
    before = losses()
    with spared(Loss.TIDINESS):
        int("x")
    after = losses()
    assert after[Loss.TIDINESS] - before[Loss.TIDINESS] == 1
    assert {loss for loss in Loss if after[loss] != before[loss]} == {Loss.TIDINESS}
