"""What the server sends that nobody asked for: logged, ignored, dropped or the end of the session."""

from __future__ import annotations

import struct

import pytest
import trio

from tests.proxy.conftest import House, plain_and_encrypted, running
from tests.proxy.fake_backend import FakeBackend
from tests.proxy.messages import (
    ANSWER,
    BACKEND_PID,
    COLUMNS,
    FAILED,
    ONE_ROW,
    READY,
    SECRET,
    SELECTED,
    TERMINATE,
    cancel_request,
    message,
    query,
    row,
)

pytestmark = plain_and_encrypted

STRAY = row(bytes(range(100)))
PARSE = message("P", b"s\0select 1\0\0\0") + message("S")
EXISTS = message("E", b'SERROR\0VERROR\0C42P05\0Mprepared statement "s" already exists\0\0') + READY


async def test_a_row_description_while_idle_is_recorded_in_libpqs_words(house: House) -> None:
    client, server = await house.session()
    await server.send(COLUMNS)
    await client.expect(COLUMNS)
    await house.recorded("message-while-idle")
    fault = house.faults[0]
    assert fault.libpq == "message type 0x54 arrived from server while idle"
    assert fault.session.backend_pid == BACKEND_PID


async def test_one_answer_twice(house: House) -> None:
    """The second one belongs to nobody; the client gets it in log mode, every byte, and the session lives on."""
    client, server = await house.session()
    await client.send(query("select 1"))
    await server.expect(query("select 1"))
    await server.send(ANSWER + ANSWER)
    await client.expect(ANSWER + ANSWER)
    assert set(house.kinds) == {"message-while-idle"}
    await client.send(query("select 2"))
    await server.expect(query("select 2"))
    await server.send(ANSWER)
    await client.expect(ANSWER)


async def test_an_answer_cut_short(house: House) -> None:
    """ReadyForQuery without CommandComplete: the answer can't be one to that request."""
    client, server = await house.session()
    await client.send(query("select 1"))
    await server.expect(query("select 1"))
    await server.send(COLUMNS + ONE_ROW + READY)
    await client.expect(COLUMNS + ONE_ROW + READY)
    await house.recorded("unexpected-response")


async def test_an_error_that_contradicts_what_the_session_has_done(house: House) -> None:
    """Another client of a pooler's has made a statement of this name."""
    client, server = await house.session()
    await client.send(PARSE)
    await server.expect(PARSE)
    await server.send(EXISTS)
    await client.expect(EXISTS)
    await house.recorded("session-state-lost")


async def test_an_ignored_kind_is_not_recorded(backend: FakeBackend) -> None:
    async with running(backend, mode="reject", kinds={"message-while-idle": "ignore"}) as house:
        client, server = await house.session()
        await server.send(COLUMNS)
        await client.expect(COLUMNS)
        await client.send(query("select 1"))
        await server.expect(query("select 1"))
        await server.send(ANSWER)
        await client.expect(ANSWER)
        assert house.kinds == []


@pytest.mark.parametrize("size", [1, 3, 5, 7, 1000, 100_000], ids=lambda size: f"chunks of {size}")
async def test_drop_swallows_the_stray_message_and_nothing_else(backend: FakeBackend, size: int) -> None:
    """However the bytes are cut up, alone or in one chunk with good ones."""
    notice = message("N", b"SNOTICE\0MHello\0\0")
    async with running(backend, kinds={"message-while-idle": "drop"}) as house:
        client, server = await house.session()
        large = row(bytes(250_000)) if size > 10 else STRAY
        data = notice + STRAY + notice + large
        for start in range(0, len(data), size):
            await server.send(data[start : start + size])
            if size < 10:
                await trio.lowlevel.checkpoint()
        await client.expect(notice + notice)
        await client.send(query("select 1"))
        await server.expect(query("select 1"))
        await server.send(ANSWER + STRAY + notice)
        await client.expect(ANSWER + notice)
        await client.nothing()
        assert {fault.action for fault in house.faults} == {"dropped"}


async def test_reject_tells_the_client_and_closes_both_connections(backend: FakeBackend) -> None:
    async with running(backend, mode="reject") as house:
        client, server = await house.session()
        await server.send(STRAY)
        error = await client.message()
        assert error.fields["S"] == error.fields["V"] == "FATAL"
        assert error.fields["C"] == "08P01"
        assert {"M", "D", "H"} <= error.fields.keys()
        assert await client.rest() == READY
        assert await server.rest() == b""
        await client.close()
        await house.empty()
        assert [fault.action for fault in house.faults] == ["rejected"]


@pytest.mark.parametrize(
    ("kind", "request_", "answer"),
    [
        pytest.param("unexpected-response", query("select 1"), COLUMNS + ONE_ROW + READY, id="unexpected-response"),
        pytest.param("session-state-lost", PARSE, EXISTS, id="session-state-lost"),
    ],
)
async def test_what_an_answer_shows_can_be_rejected_too(
    backend: FakeBackend, kind: str, request_: bytes, answer: bytes
) -> None:
    async with running(backend, kinds={kind: "reject"}) as house:
        client, server = await house.session()
        await client.send(request_)
        await server.expect(request_)
        await server.send(answer)
        said = await client.rest()
        assert b"C08P01" in said
        assert await server.rest() == b""
        await client.close()
        await house.empty()
        assert [(str(fault.kind), str(fault.action)) for fault in house.faults] == [(kind, "rejected")]


async def test_a_rejected_request_never_reaches_the_server_and_what_runs_there_is_cancelled(
    backend: FakeBackend,
) -> None:
    async with running(backend, mode="reject") as house:
        client, server = await house.session()
        await client.send(query("select pg_sleep(60)"))
        await server.expect(query("select pg_sleep(60)"))
        await client.send(message("p", b"out of place\0"))
        assert (await client.message()).fields["C"] == "08P01"
        assert await server.rest() == b""
        canceller = await backend.accept()
        assert await canceller.packet() == cancel_request(BACKEND_PID, SECRET)
        await canceller.close()
        assert await client.rest() == FAILED


async def test_the_driver_of_a_rejected_client_may_clean_up_and_is_told_again(backend: FakeBackend) -> None:
    """Or its user would see that the clean-up has failed, and nothing else: a transaction's, and then a pool's."""
    async with running(backend, kinds={"request-while-busy": "reject"}) as house:
        client, server = await house.session()
        await client.send(query("select pg_sleep(60)"))
        await server.expect(query("select pg_sleep(60)"))
        await client.send(query("select 1"))
        error = await client.message()
        await client.expect(FAILED)
        await client.send(query("rollback"))
        assert await client.message() == error
        await client.expect(FAILED)
        await client.send(message("P", b"\0reset all\0\0\0") + message("S"))
        assert await client.message() == error
        assert await client.rest() == FAILED
        assert await server.rest() == b""
        await client.close()
        await house.empty()
        assert house.kinds == ["request-while-busy"]


async def test_the_stream_of_a_rejected_client_does_not_end_while_it_is_sending(backend: FakeBackend) -> None:
    """What libpq is told in a COPY it reads at the end, and not even then if it could not send so far."""
    async with running(backend, mode="reject") as house:
        client, server = await house.session()
        await client.send(query("copy x from stdin"))
        await server.expect(query("copy x from stdin"))
        await server.send(message("G", bytes(3)))
        await client.expect(message("G", bytes(3)))
        await client.send(message("p", b"out of place\0"))
        assert (await client.message()).fields["C"] == "08P01"
        await client.expect(FAILED)
        with trio.move_on_after(1.5):  # longer than it waits for one that is silent
            while True:
                await client.send(message("d", b"1\n"))
                await client.nothing(0.02)
        assert await client.rest() == b""
        await client.close()
        await house.empty()


async def test_a_warning_rejects_nobody(backend: FakeBackend) -> None:
    async with running(backend, mode="reject", idle_in_transaction=0.05) as house:
        client, server = await house.session()
        await client.send(query("begin"))
        await server.expect(query("begin"))
        await server.send(message("C", b"BEGIN\0") + message("Z", b"T"))
        await house.recorded("idle-in-transaction")
        await client.send(query("commit"))
        await server.expect(query("commit"))
        assert [fault.action for fault in house.faults] == ["logged"]


@pytest.mark.parametrize("size", [10, 100_000])
async def test_what_a_rejected_client_goes_on_sending_is_thrown_away(backend: FakeBackend, size: int) -> None:
    """It neither follows the rejected bytes to the server nor is judged together with them."""
    async with running(backend, kinds={"request-while-busy": "reject"}) as house:
        client, server = await house.session()
        await client.send(query("select pg_sleep(60)"))
        await server.expect(query("select pg_sleep(60)"))
        await client.send(query("x" * size))
        assert (await client.message()).fields["C"] == "08P01"
        await client.expect(FAILED)
        for _ in range(3):
            await client.send(message("d", b"x" * size))
        await client.send(TERMINATE)
        assert await server.rest() == b""
        assert await client.rest() == b""
        await client.close()
        await house.empty()
        assert house.kinds == ["request-while-busy"]


async def test_a_rejection_waits_for_the_end_of_the_message_that_the_client_is_being_sent(
    backend: FakeBackend,
) -> None:
    """A client that is in the middle of a large DataRow would take an ErrorResponse for a part of it."""
    large = row(bytes(3_000_000))
    async with running(backend, mode="reject") as house:
        client, server = await house.session()
        await client.send(query("select large"))
        await server.expect(query("select large"))
        await server.send(COLUMNS + large[:1_000_000])
        await client.expect(COLUMNS + large[:1_000_000])
        await client.send(message("p", b"out of place\0"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.send, large[1_000_000:] + SELECTED + READY)
            await client.expect(large[1_000_000:])
            assert (await client.message()).fields["C"] == "08P01"
            assert await client.rest() == FAILED
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("who", ["client", "server"])
async def test_a_connection_lost_while_a_rejection_waits_hurts_nobody_else(
    backend: FakeBackend, who: str, how: str
) -> None:
    large = row(bytes(30_000_000))
    async with running(backend, mode="reject") as house:
        other_client, other_server = await house.session()
        client, server = await house.session()
        await client.send(query("select large"))
        await server.expect(query("select large"))
        await server.send(COLUMNS + large[:1_000_000])
        await client.expect(COLUMNS + large[:1_000_000])
        await client.send(message("p", b"out of place\0"))
        await house.recorded("protocol-violation")
        peer = client if who == "client" else server
        await (peer.reset() if how == "reset" else peer.close())
        if who == "client":
            with pytest.raises(trio.BrokenResourceError):
                await server.send(large * 3)
        else:
            # In the middle of a message there is no place for another.
            assert await client.rest() == b""
            await client.close()
        await other_client.send(query("select 1"))
        await other_server.expect(query("select 1"))
        await other_server.send(ANSWER)
        await other_client.expect(ANSWER)
        await other_client.reset()
        await house.empty()


async def test_a_guard_that_ends_while_a_rejection_waits(backend: FakeBackend) -> None:
    """The session is closed under the task that waits for the end of the message."""
    async with running(backend, mode="reject", shutdown_timeout=0) as house:
        client, server = await house.session()
        await client.send(query("select large"))
        await server.expect(query("select large"))
        await server.send(COLUMNS + struct.pack("!cI", b"D", 1000))
        await client.receive(len(COLUMNS) + 5)
        await client.send(message("p", b"out of place\0"))
        await house.recorded("protocol-violation")
        house.guard.stop()
        assert await client.rest() == b""
        await house.empty()
