"""Every byte, untouched and in order, in bounded memory."""

from __future__ import annotations

import array
import fcntl
import os
import subprocess
import sys
import termios
import time
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from pgguard.attribution.witness import Witness
from pgguard.proxy.ends import CHUNK as _CHUNK
from pgguard.proxy.lateness import Lateness
from pgguard.wire.messages import LOOK_LIMIT
from tests.proxy.conftest import House, at_rest, running, until
from tests.proxy.fake_backend import FakeBackend
from tests.proxy.messages import ANSWER, COLUMNS, READY, SECONDS, SELECTED, TERMINATE, Peer, message, query, row

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

PARSE = message("P", b"\0select $1\0\0\0")
BIND = message("B", b"\0\0\0\0\0\1\0\0\0\1x\0\0")
DESCRIBE = message("D", b"P\0")
EXECUTE = message("E", b"\0\0\0\0\0")
SYNC = message("S")
BATCH = PARSE + BIND + DESCRIBE + EXECUTE + SYNC
BATCH_ANSWER = message("1") + message("2") + ANSWER

REQUESTS_AND_ANSWERS = st.lists(
    st.sampled_from(
        [
            (BATCH, BATCH_ANSWER),
            (PARSE + SYNC, message("E", b"SERROR\0VERROR\0C42601\0Mno\0\0") + READY),
            (BATCH + BATCH, BATCH_ANSWER + message("N", b"SNOTICE\0Mhello\0\0") + BATCH_ANSWER),
            (PARSE + BIND + message("E", b"\0\0\0\0\0") + SYNC, message("1") + message("2") + SELECTED + READY),
        ]
    ),
    min_size=1,
    max_size=8,
)
CUTS = st.lists(st.integers(1, 400), max_size=12)


def cut(data: bytes, sizes: list[int]) -> Iterator[bytes]:
    """Cut data into pieces of these sizes, and the rest."""
    places = [0, *(place for place in accumulate(sizes) if place < len(data)), len(data)]
    for start, end in pairwise(places):
        yield data[start:end]


async def send_in_pieces(peer: Peer, data: bytes, sizes: list[int]) -> None:
    for piece in cut(data, sizes):
        await peer.send(piece)
        await trio.lowlevel.checkpoint()


@settings(max_examples=20, deadline=None)
@given(conversation=REQUESTS_AND_ANSWERS, cuts=CUTS, answer_cuts=CUTS)
async def test_however_the_bytes_are_cut_up(
    conversation: list[tuple[bytes, bytes]], cuts: list[int], answer_cuts: list[int]
) -> None:
    """A whole pipeline arrives as it was sent, both ways at once, and there is nothing wrong with it."""
    requests = b"".join(request for request, _ in conversation)
    answers = b"".join(answer for _, answer in conversation)
    async for house in fresh_house():
        client, server = await house.session()
        await send_in_pieces(client, requests, cuts)
        await server.expect(requests)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_in_pieces, server, answers, answer_cuts)
            nursery.start_soon(send_in_pieces, client, BATCH, cuts)
        await client.expect(answers)
        await server.expect(BATCH)
        await server.send(BATCH_ANSWER)
        await client.expect(BATCH_ANSWER)
        await client.send(TERMINATE)
        await server.expect(TERMINATE)
        assert house.kinds == []


@settings(max_examples=20, deadline=None)
@given(
    data=st.binary(min_size=5, max_size=4000),
    answer=st.binary(min_size=5, max_size=4000),
    cuts=CUTS,
)
async def test_garbage_is_forwarded_all_the_same(data: bytes, answer: bytes, cuts: list[int]) -> None:
    """What begins with no message type at all is a protocol-violation, the session is followed no more, and goes on."""
    data = b"\xff" + data
    async for house in fresh_house():
        client, server = await house.session()
        await send_in_pieces(client, data, cuts)
        await server.expect(data)
        await send_in_pieces(server, answer, cuts)
        await client.expect(answer)
        await client.send(data)
        await server.expect(data)
        assert house.kinds == ["protocol-violation", "untracked"]


@settings(max_examples=20, deadline=None)
@given(data=st.binary(max_size=4000), cuts=CUTS)
async def test_any_bytes_of_the_server_reach_the_client(data: bytes, cuts: list[int]) -> None:
    """Even those that were too few to be judged, once the stream is over."""
    async for house in fresh_house():
        client, server = await house.session()
        await send_in_pieces(server, data, cuts)
        await server.close()
        received = await client.rest()
        assert received[: len(data)] == data


@settings(max_examples=20, deadline=None)
@given(data=st.binary(max_size=4000), cuts=CUTS)
async def test_any_bytes_of_the_client_reach_the_server(data: bytes, cuts: list[int]) -> None:
    async for house in fresh_house():
        client, server = await house.session()
        await send_in_pieces(client, data, cuts)
        await client.stream.send_eof()
        assert await server.rest() == data


async def fresh_house() -> AsyncIterator[House]:
    """One guard for each example, where a fixture would be one for all of them."""
    backend = FakeBackend()
    await backend.listen()
    try:
        async with running(backend) as house:
            yield house
    finally:
        with trio.CancelScope(shield=True):
            await backend.close_all()


async def stuff(peer: Peer, data: memoryview) -> int:
    """Send until nothing more goes through, for lack of a reader; returns how much did."""
    sent = 0
    while True:
        with trio.move_on_after(0.2) as limit:
            await trio.lowlevel.wait_writable(peer.stream.socket)
        if limit.cancelled_caught:
            return sent
        try:
            sent += await peer.stream.socket.send(data[sent : sent + 65536])
        except BlockingIOError:
            continue
        assert sent < len(data), "there is no end to what goes through"


@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
async def test_a_client_that_does_not_read_stops_its_server(house: House, unix: bool) -> None:
    """The guard keeps one chunk, the kernel what it has room for, and the rest stays with the server."""
    client, server = await house.session(unix=unix)
    await client.send(query("select large"))
    await server.expect(query("select large"))
    data = memoryview(COLUMNS + row(bytes(40_000_000)))
    sent = await stuff(server, data)
    (session,) = house.guard._sessions.values()
    assert 0 < len(session.client.outgoing) <= _CHUNK + LOOK_LIMIT
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.stream.send_all, data[sent:])
        assert await client.receive(len(data)) == data
    assert not session.client.outgoing
    await server.send(SELECTED + READY)
    await client.expect(SELECTED + READY)
    assert house.kinds == []


@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
async def test_a_server_that_does_not_read_stops_its_client(house: House, unix: bool) -> None:
    client, server = await house.session(unix=unix)
    await client.send(query("copy t from stdin"))
    await server.expect(query("copy t from stdin"))
    await server.send(message("G", b"\0\0\0"))
    await client.expect(message("G", b"\0\0\0"))
    data = memoryview(message("d", bytes(40_000_000)))
    sent = await stuff(client, data)
    (session,) = house.guard._sessions.values()
    assert 0 < len(session.server.outgoing) <= _CHUNK + LOOK_LIMIT
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.stream.send_all, data[sent:])
        assert await server.receive(len(data)) == data
    assert not session.server.outgoing
    assert house.kinds == []


async def test_a_stuffed_session_holds_up_no_other(house: House) -> None:
    client, server = await house.session()
    await client.send(query("select large"))
    await server.expect(query("select large"))
    await stuff(server, memoryview(COLUMNS + row(bytes(40_000_000))))
    other_client, other_server = await house.session()
    for _ in range(20):
        with trio.fail_after(SECONDS):
            await other_client.send(query("select 1"))
            await other_server.expect(query("select 1"))
            await other_server.send(ANSWER)
            await other_client.expect(ANSWER)


async def test_a_client_that_goes_frees_a_session_that_is_stuffed_both_ways(house: House) -> None:
    """The server reads no more requests before it has got rid of its answers, and nobody will ever read those."""
    client, server = await house.session()
    await client.send(query("select large"))
    await server.expect(query("select large"))
    answer = memoryview(COLUMNS + row(bytes(40_000_000)))
    sent = await stuff(server, answer)
    await stuff(client, memoryview(query("x" * 40_000_000)))
    await client.reset()
    with trio.fail_after(SECONDS):
        await server.stream.send_all(answer[sent:])
    await server.rest()
    await house.empty()


async def test_a_session_with_nothing_to_do_takes_no_time(house: House) -> None:
    """Half closed, held or stuffed: nothing is reported of it again and again."""
    half_closed, its_server = await house.session()
    await half_closed.send(query("select pg_sleep(60)"))
    await half_closed.stream.send_eof()
    await its_server.expect(query("select pg_sleep(60)"))
    gone, server_of_gone = await house.session(unix=True)
    await gone.send(query("select pg_sleep(60)"))
    await server_of_gone.expect(query("select pg_sleep(60)"))
    stuffed, _ = await house.session(unix=True)
    await stuff(stuffed, memoryview(query("x" * 40_000_000)))
    await stuffed.close()
    reader, writer = await house.session()
    await reader.send(query("select large"))
    await stuff(writer, memoryview(COLUMNS + row(bytes(40_000_000))))
    await writer.reset()
    await until(lambda: len(house.guard.snapshot()) == 4)
    await at_rest(time.process_time)


@pytest.mark.parametrize("action", ["log", "ignore"])
async def test_a_storm_of_faults_in_one_session(backend: FakeBackend, action: str) -> None:
    """Every byte arrives in order and every fault is counted, however many there are in one chunk."""
    async with running(backend, kinds={"request-while-busy": action}) as house:
        client, server = await house.session()
        await client.send(query("select 1") * 3000)
        for _ in range(6):
            await server.expect(query("select 1") * 500)
            await server.send(ANSWER * 500)
            await client.expect(ANSWER * 500)
        await client.close()
        await server.close()
        await house.empty()
    seen = sum(1 + fault.suppressed for fault in house.faults if fault.kind == "request-while-busy")
    assert seen == (2999 if action == "log" else 0)


# Several readers


def unread(client: Peer) -> int:
    size = array.array("i", [0])
    fcntl.ioctl(client.stream.socket.fileno(), termios.FIONREAD, size)
    return size[0]


@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
async def test_a_relay_that_is_late_lets_answers_reach_several_readers_one_by_one(
    backend: FakeBackend, unix: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever of them reads first would swallow both, and the other wait for ever."""
    monkeypatch.setattr("pgguard.proxy.judging._APART", 1000.0)
    monkeypatch.setattr(Lateness, "has_grown", lambda _: True)
    async with running(backend, witness=Witness()) as house:
        client, server = await house.session(unix=unix)
        [session] = house.guard._sessions.values()
        await session.opening_known.wait()
        assert session.tracker is not None
        session.tracker.expect_readers()
        for number in range(3):
            await client.send(query(f"select {number}"))
            await server.expect(query(f"select {number}"))
        await server.send(ANSWER * 2)
        await until(lambda: session.server.waits)
        await server.send(ANSWER)
        for _ in range(3):
            await until(lambda: unread(client) == len(ANSWER))
            await client.expect(ANSWER)
        await until(lambda: not session.server.waits)


@pytest.mark.parametrize("size", [1, 4, 5])
async def test_a_message_that_is_cut_behind_an_answer_reaches_several_readers(
    backend: FakeBackend, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What can't be judged yet is nothing that could be kept from the answer: the rest of it is to be read."""
    monkeypatch.setattr(Lateness, "has_grown", lambda _: True)
    async with running(backend, witness=Witness()) as house:
        client, server = await house.session()
        [session] = house.guard._sessions.values()
        assert session.tracker is not None
        session.tracker.expect_readers()
        for number in range(2):
            await client.send(query(f"select {number}"))
            await server.expect(query(f"select {number}"))
        ready = message("Z", b"I")
        await server.send(ANSWER + ready[:size])
        await client.expect(ANSWER)
        await server.send(ready[size:])
        await client.expect(ready)


@pytest.mark.parametrize(("late", "several"), [(False, True), (True, False)])
async def test_answers_that_come_together_are_passed_on_together(
    house: House, late: bool, several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they would be without a relay; and where one alone reads it makes no difference."""
    monkeypatch.setattr(Lateness, "has_grown", lambda _: late)
    client, server = await house.session()
    [session] = house.guard._sessions.values()
    assert session.tracker is not None
    if several:
        session.tracker.expect_readers()
    for number in range(3):
        await client.send(query(f"select {number}"))
        await server.expect(query(f"select {number}"))
    await server.send(ANSWER * 3)
    await until(lambda: unread(client) == len(ANSWER) * 3)
    assert not session.server.waits
    await client.expect(ANSWER * 3)


async def test_who_does_not_read_is_waited_for_no_longer_than_a_moment(
    backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lateness, "has_grown", lambda _: True)
    async with running(backend, witness=Witness()) as house:
        client, server = await house.session(unix=True)
        [session] = house.guard._sessions.values()
        assert session.tracker is not None
        session.tracker.expect_readers()
        await client.send(query("select 1") + query("select 2"))
        await server.expect(query("select 1") + query("select 2"))
        await server.send(ANSWER * 2)
        await until(lambda: unread(client) == len(ANSWER) * 2)


async def test_a_thread_that_is_kept_from_running_is_late() -> None:
    """It shares one processor with a process that never sleeps."""

    def measure() -> list[bool]:
        processors = os.sched_getaffinity(0)
        one = min(processors)
        os.sched_setaffinity(0, {one})  # of this thread alone
        rival = subprocess.Popen(
            [sys.executable, "-c", f"import os; os.sched_setaffinity(0, {{{one}}})\nwhile 1: pass"]
        )
        lateness = Lateness()
        try:
            assert not lateness.has_grown()
            deadline = time.monotonic() + SECONDS
            while not (late := lateness.has_grown()) and time.monotonic() < deadline:
                sum(range(200_000))
            return [late]
        finally:
            lateness.close()
            rival.kill()
            rival.wait()
            os.sched_setaffinity(0, processors)

    assert await trio.to_thread.run_sync(measure) == [True]
