"""Every way for a connection to end, on either side and in every phase."""

from __future__ import annotations

import errno
import os
import socket

import pytest
import trio

from pgguard.proxy.aftermath import _LINGER
from tests.proxy.conftest import House, fail_to_read, until
from tests.proxy.messages import (
    ANSWER,
    COLUMNS,
    LOGGED_IN,
    ONE_ROW,
    READY,
    SELECTED,
    TERMINATE,
    Peer,
    message,
    query,
    row,
    startup,
)

GOODBYE = message("E", b"SFATAL\0VFATAL\0C57P01\0Mterminating connection due to administrator command\0\0")

both_transports = pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
either_way = pytest.mark.parametrize("how", ["close", "reset"])


async def end(peer: Peer, how: str) -> None:
    await (peer.reset() if how == "reset" else peer.close())


@both_transports
async def test_terminate(house: House, unix: bool) -> None:
    client, server = await house.session(unix=unix)
    await client.send(TERMINATE)
    await client.close()
    assert await server.rest() == TERMINATE
    await server.close()
    await house.empty()
    assert house.kinds == []


@both_transports
async def test_a_client_that_has_said_all_still_gets_its_answer(house: House, unix: bool) -> None:
    client, server = await house.session(unix=unix)
    await client.send(query("select 1"))
    await client.stream.send_eof()
    assert await server.rest() == query("select 1")
    await server.send(ANSWER)
    await server.close()
    assert await client.rest() == ANSWER
    await client.close()
    await house.empty()


@pytest.mark.parametrize(("unix", "how"), [(False, "close"), (False, "reset"), (True, "close")])
async def test_a_client_that_goes_while_idle(house: House, unix: bool, how: str) -> None:
    client, server = await house.session(unix=unix)
    await client.send(query("select 1"))
    await server.expect(query("select 1"))
    await server.send(ANSWER)
    await client.expect(ANSWER)
    await end(client, how)
    assert await server.rest() == b""
    await server.close()
    await house.empty()
    assert house.kinds == ["unclean-close"]


@both_transports
async def test_a_client_that_goes_leaves_what_it_has_sent(house: House, unix: bool) -> None:
    """What it had written before it went gets to the server, as it would without a guard."""
    client, server = await house.session(unix=unix)
    requests = query("x" * 25_000_000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.send, requests)
        await server.receive(1_000_000)
        nursery.start_soon(server.receive, len(requests) - 1_000_000)
    await client.close()
    assert await server.rest() == b""


async def test_a_client_that_abandons_its_login(house: House) -> None:
    """It had not read that it was logged in, so it owes nobody a Terminate."""
    client, server = await house.session()
    await client.reset()
    assert await server.rest() == b""
    await server.close()
    await house.empty()
    assert house.kinds == []


@either_way
async def test_a_client_that_goes_while_it_is_answered(house: House, how: str) -> None:
    client, server = await house.session()
    await client.send(query("select large"))
    await server.expect(query("select large"))
    await server.send(COLUMNS + ONE_ROW)
    await client.expect(COLUMNS)
    await end(client, how)
    with pytest.raises(trio.BrokenResourceError):
        await server.send(ONE_ROW * 3_000_000)
    await server.close()
    await house.empty()
    assert house.kinds == ["unclean-close"]
    assert house.faults[0].severity == "error"


@either_way
@pytest.mark.parametrize("sent", [b"", startup()[:3], startup()[:-1], startup()], ids=["nothing", "3", "most", "all"])
async def test_a_client_that_goes_while_it_logs_in(house: House, sent: bytes, how: str) -> None:
    client = await house.connect()
    await client.send(sent)
    if sent == startup():
        server = await house.backend.accept()
        assert await server.packet() == sent
        await end(client, how)
        assert await server.rest() == b""
        await server.close()
    else:
        await end(client, how)
    await house.empty()
    assert house.kinds == []


@either_way
async def test_a_server_that_goes_while_idle(house: House, how: str) -> None:
    client, server = await house.session()
    await end(server, how)
    error = await client.message()
    assert error.fields["C"] == "08006"
    assert error.fields["M"].startswith("pgguard: the server at 127.0.0.1:")
    assert "shut down at once (pg_ctl stop -m immediate)" in error.fields["D"]
    assert await client.rest() == b""
    await client.close()
    await house.empty()


async def test_a_server_that_nothing_is_heard_of_any_more(house: House) -> None:
    """The kernel says so when its keepalive probes have gone unanswered; it is no crash of the server's."""
    client, server = await house.session()
    [session] = house.guard._sessions.values()
    fail_to_read(session.server, TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)))
    await server.send(READY)
    error = await client.message()
    assert error.fields["C"] == "08006"
    assert error.fields["D"].startswith(
        "About the connection the system says: Connection timed out. The server's host "
    )
    assert await client.rest() == b""


@both_transports
@either_way
async def test_a_server_that_goes_in_the_middle_of_an_answer(house: House, unix: bool, how: str) -> None:
    client, server = await house.session(unix=unix)
    await client.send(query("select 1"))
    await server.expect(query("select 1"))
    await server.send(COLUMNS + ONE_ROW)
    await client.expect(COLUMNS + ONE_ROW)
    await end(server, how)
    assert (await client.message()).fields["C"] == "08006"
    assert await client.rest() == b""


@pytest.mark.parametrize("size", [3, 1000])
async def test_a_server_that_goes_in_the_middle_of_a_message(house: House, size: int) -> None:
    """There is no place for an ErrorResponse: the client gets the torn message, and the fault is recorded."""
    client, server = await house.session()
    await client.send(query("select 1"))
    await server.expect(query("select 1"))
    await server.send(COLUMNS + row(bytes(2000))[:size])
    await server.close()
    assert await client.rest() == COLUMNS + row(bytes(2000))[:size]
    assert house.kinds == ["protocol-violation"]


async def test_a_server_that_says_goodbye(house: House) -> None:
    """Its own words are the last that the client gets."""
    client, server = await house.session()
    await server.send(GOODBYE)
    await server.close()
    assert await client.rest() == GOODBYE
    assert house.kinds == []


async def test_a_server_that_goes_before_anybody_has_logged_in(house: House) -> None:
    client = await house.connect()
    await client.send(startup())
    server = await house.backend.accept()
    await server.packet()
    await server.close()
    assert (await client.message()).fields["C"] == "08006"
    assert await client.rest() == b""


async def test_a_server_that_refuses_connections(house: House) -> None:
    house.backend.close()
    client = await house.connect()
    await client.send(startup())
    error = await client.message()
    assert error.fields["C"] == "08001"
    assert error.fields["M"].startswith("pgguard: could not connect to the server: 127.0.0.1:")
    assert error.fields["M"].endswith("Connection refused")
    assert await client.rest() == b""


async def test_a_server_that_never_answers(house: House) -> None:
    """Its client waits, as it would without a guard, and can go whenever it likes."""
    client = await house.connect()
    await client.send(startup())
    server = await house.backend.accept()
    await server.packet()
    await client.nothing()
    await client.close()
    assert await server.rest() == b""
    await server.close()
    await house.empty()


@pytest.fixture
def doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether clients that have ended their streams are there is asked early and often."""
    monkeypatch.setattr("pgguard.proxy.endings._CHECKED_AFTER", 0.1)
    monkeypatch.setattr("pgguard.proxy.endings._CHECK_SECONDS", 1)


@pytest.mark.usefixtures("doubt")
@pytest.mark.parametrize("phase", ["logs in", "is answered", "has said goodbye"])
async def test_a_client_that_is_gone_is_not_kept_for_a_server_that_is_silent(house: House, phase: str) -> None:
    """Over TCP its end looks like that of a client that has only said all; the kernel is asked to find out."""
    if phase == "logs in":
        client = await house.connect()
        await client.send(startup())
        server = await house.backend.accept()
        await server.packet()
    else:
        client, server = await house.session()
        await client.send(query("select 1"))
        await server.expect(query("select 1"))
        if phase == "has said goodbye":
            await client.send(TERMINATE)
    # How long the kernel keeps what is left of a socket that was closed before its peer's was: tcp(7).
    client.stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_LINGER2, 1)
    await client.close()
    await house.empty()
    await server.rest()


@pytest.mark.usefixtures("doubt")
async def test_a_client_that_has_said_all_is_kept_for_as_long_as_it_waits(house: House) -> None:
    client, server = await house.session()
    client.stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_LINGER2, 1)
    await client.send(query("select 1"))
    await client.stream.send_eof()
    assert await server.rest() == query("select 1")
    await client.nothing(4)
    await server.send(ANSWER)
    await server.close()
    assert await client.rest() == ANSWER


async def test_a_slow_client_gets_all_that_the_server_had_said_before_it_went(house: House) -> None:
    """Longer than it is given to close its side, as long as there is something left to read."""
    client, server = await house.session()
    await client.send(query("select large"))
    await server.expect(query("select large"))
    answer = COLUMNS + row(bytes(12_000_000)) + SELECTED + READY
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.send, answer)
        await until(lambda: bool(next(iter(house.guard._sessions.values())).client.outgoing))
        taken = await client.receive(6_000_000)
    await server.close()
    await trio.sleep(_LINGER + 0.2)
    taken += await client.receive(len(answer) - len(taken))
    assert taken == answer
    assert (await client.message()).fields["C"] == "08006"


async def test_that_a_server_has_gone_is_said_in_the_log(house: House, caplog: pytest.LogCaptureFixture) -> None:
    client, server = await house.session()
    await server.close()
    await client.rest()
    assert f"session 1: the server at 127.0.0.1:{house.backend.port} closed the connection" in caplog.text


async def test_a_client_that_only_looks_whether_it_can_log_in(house: House) -> None:
    """As HAProxy's pgsql-check does every two seconds, and may under trust."""
    client, server = await house.session()
    await client.close()
    assert await server.rest() == b""
    await server.close()
    await house.empty()
    assert house.kinds == []


@pytest.mark.parametrize("asks", [False, True])
async def test_a_client_that_stays_or_asks_has_not_only_looked(
    house: House, monkeypatch: pytest.MonkeyPatch, asks: bool
) -> None:
    client, server = await house.session()
    if asks:
        await client.send(query("select 1"))
        await server.expect(query("select 1"))
        await server.send(ANSWER)
        await client.expect(ANSWER)
    else:
        monkeypatch.setattr("pgguard.proxy.endings._HEALTH_CHECK", 0.0)
    await client.close()
    await house.recorded("unclean-close")


async def test_a_client_that_is_gone_before_its_login_was_answered(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end may be read after the answer has been written: that hits nobody, and the kernel says so."""
    monkeypatch.setattr("pgguard.proxy.endings._HEALTH_CHECK", 0.0)
    client = await house.connect()
    await client.send(startup())
    server = await house.backend.accept()
    await server.packet()
    [session] = house.guard._sessions.values()
    house.guard._sweep._relay.disarm(session.client)  # as if its end were still in the queue of the epoll
    await client.close()
    await server.send(LOGGED_IN)
    await until(lambda: session.protocol is not None and session.protocol.logged_in)
    house.guard._sweep._relay.arm(session.client)
    assert await server.rest() == b""
    await server.close()
    await house.empty()
    assert house.kinds == []
