"""A client that sends more, or smaller messages, than anybody would: it is bounded, in order, and its own affair."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
import trio

from pgguard.proxy.ends import Reading
from pgguard.session.session import _MOST_REQUESTS
from tests.proxy.conftest import House, until
from tests.proxy.messages import ANSWER, READY, TERMINATE, message, query
from tests.proxy.test_relay import stuff, unread

if TYPE_CHECKING:
    from tests.proxy.fake_backend import BackendConnection
    from tests.proxy.messages import Client, Peer

SYNC = message("S")
FLUSH = message("H")
STORM = 25_000
"""Small messages that fit into one chunk."""


async def converse(client: Client, server: BackendConnection) -> None:
    await client.send(query("select 1"))
    await server.expect(query("select 1"))
    await server.send(ANSWER)
    await client.expect(ANSWER)


@pytest.fixture
def _in_short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """However quick the machine is, others get their turn as often as they can."""
    monkeypatch.setattr("pgguard.proxy.sweep._SLICE", 0.0)
    monkeypatch.setattr("pgguard.proxy.sweep._LATEST", 0.0)


async def both(stormy: Peer, data: bytes, client: Client) -> int:
    """Have a storm and somebody's request there when the guard, which runs on this thread, gets to look.

    Returns how much of the storm there was room for.
    """
    sent = os.write(stormy.stream.socket.fileno(), data)
    await client.send(query("select 1"))
    return sent


@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
async def test_a_client_that_pipelines_and_is_not_answered_is_not_read(house: House, unix: bool) -> None:
    """What it has sent is with the kernel; when the server answers, everything goes on, and arrives in order."""
    client, server = await house.session(unix=unix)
    [session] = house.guard._sessions.values()
    assert session.tracker is not None
    sent = await stuff(client, memoryview(SYNC * 10_000_000))
    whole, torn = divmod(sent, len(SYNC))
    assert session.client.waits
    assert session.tracker.ledger.count < 2 * _MOST_REQUESTS
    assert len(session.client.held) < 200_000
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.expect, READY * whole)
        for _ in range(whole // 1000):
            await server.expect(SYNC * 1000)
            await server.send(READY * 1000)
        await server.expect(SYNC * (whole % 1000))
        await server.send(READY * (whole % 1000))
    if torn:
        await client.send(SYNC[torn:])
        await server.expect(SYNC)
        await server.send(READY)
        await client.expect(READY)
    await converse(client, server)
    await until(lambda: not session.client.waits)
    assert house.kinds == []


async def test_a_client_that_is_not_read_may_go(house: House) -> None:
    """Its session ends when the server has answered what it was sent, though nobody reads that any more."""
    client, server = await house.session()
    await stuff(client, memoryview(SYNC * 10_000_000))
    await client.reset()
    with trio.fail_after(30), suppress(trio.BrokenResourceError):
        while data := await server.stream.receive_some(5000):
            await server.stream.send_all(READY * (len(data) // 5))
    await server.close()
    await house.empty()


async def test_a_server_that_goes_ends_a_session_whose_client_is_not_read(house: House) -> None:
    client, server = await house.session()
    await stuff(client, memoryview(SYNC * 10_000_000))
    await server.close()
    await client.message()
    await client.close()
    await house.empty()


async def test_a_client_that_waits_is_not_read_though_the_tracker_is_lost(house: House) -> None:
    """Then nobody counts any more, and it is read again."""
    client, server = await house.session()
    [session] = house.guard._sessions.values()
    await stuff(client, memoryview(SYNC * 10_000_000))
    assert session.client.reading is Reading.CHOKED
    await server.send(b"\xff" * 20)
    await until(lambda: not session.client.waits)
    await client.expect(b"\xff" * 20)
    await server.receive(10 * _MOST_REQUESTS * len(SYNC))
    assert house.kinds == ["protocol-violation", "untracked"]


@pytest.mark.parametrize("storm", [FLUSH, message("d", b"1\n"), query("x")], ids=["flush", "copy", "query"])
@pytest.mark.usefixtures("_in_short_turns")
async def test_others_come_in_between(house: House, storm: bytes) -> None:
    """A chunk of thousands of messages is followed in slices, be they in order or one known fault after the other."""
    stormy_client, stormy_server = await house.session()
    client, server = await house.session()
    if storm[:1] == b"d":
        await stormy_client.send(query("copy t from stdin"))
        await stormy_server.expect(query("copy t from stdin"))
        await stormy_server.send(message("G", b"\0\0\0"))
        await stormy_client.expect(message("G", b"\0\0\0"))
    elif storm[:1] == b"Q":
        await stormy_client.send(storm * 2)  # from now on the fault is known
        await stormy_server.expect(storm * 2)
        await stormy_server.send(ANSWER * 2)
        await stormy_client.expect(ANSWER * 2)
    number = 2000 if storm[:1] == b"Q" else 20_000
    data = storm * number
    sent = await both(stormy_client, data, client)
    await server.expect(query("select 1"))
    assert unread(stormy_server) < sent
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stormy_client.send, data[sent:])
        nursery.start_soon(stormy_client.expect, ANSWER * number * (storm[:1] == b"Q"))
        for _ in range(number // 500):
            await stormy_server.expect(storm * 500)
            await stormy_server.send(ANSWER * 500 * (storm[:1] == b"Q"))
    await server.send(ANSWER)
    await client.expect(ANSWER)


@pytest.mark.usefixtures("_in_short_turns")
async def test_others_come_in_between_what_a_server_sends(house: House) -> None:
    stormy_client, stormy_server = await house.session()
    client, server = await house.session()
    await stormy_client.send(query("select 1"))
    await stormy_server.expect(query("select 1"))
    data = (message("C", b"INSERT 0 1\0")) * 7000
    sent = await both(stormy_server, data, client)
    await server.expect(query("select 1"))
    assert unread(stormy_client) < sent
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stormy_server.send, data[sent:])
        await stormy_client.expect(data)
    await stormy_server.send(READY)
    await stormy_client.expect(READY)
    assert house.kinds == []


async def test_a_goodbye_at_the_end_of_a_storm(house: House) -> None:
    """What is left of a chunk is followed though its sender has gone; the session ends cleanly."""
    client, server = await house.session()
    storm = FLUSH * STORM
    await client.send(storm + TERMINATE)
    await client.close()
    assert await server.rest() == storm + TERMINATE
    await server.close()
    await house.empty()
    assert house.kinds == []


CROWD = 100
"""Three times as many as are read before it is found out that somebody is to be judged."""


@pytest.mark.parametrize("storm", ["ask", "go"])
@pytest.mark.usefixtures("_in_short_turns")
async def test_who_interrupts_or_goes_stands_in_line(house: House, storm: str) -> None:
    """A process asks on all of its connections out of turn, or is killed: a bystander is served at once."""
    crowd = [await house.session() for _ in range(CROWD)]
    for client, server in crowd:
        await client.send(query("select 1"))
        await server.expect(query("select 1"))
    client, server = await house.session()
    stormy_ones = sorted(house.guard._sessions.values(), key=lambda one: one.id)[:CROWD]
    trackers = [one.protocol for one in stormy_ones if one.protocol is not None]
    assert len(trackers) == CROWD
    for stormy, _ in crowd:
        if storm == "ask":
            os.write(stormy.stream.socket.fileno(), query("select 2"))
        else:
            stormy.stream.socket.close()
    await client.send(query("select 1"))
    await server.expect(query("select 1"))
    followed = [one for one in trackers if one.requests > 1 or one.verdict is not None or one.left]
    assert len(followed) < CROWD // 2
    await server.send(ANSWER)
    await client.expect(ANSWER)
    await until(lambda: sum(one.faults for one in house.docket.counts()) == CROWD)
