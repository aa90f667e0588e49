"""The start-up phase: what real clients say first, and all else that knocks at a port."""

from __future__ import annotations

import struct

import pytest
import trio

from tests.proxy.conftest import House, running
from tests.proxy.fake_backend import FakeBackend
from tests.proxy.messages import (
    ANSWER,
    GSSENC_REQUEST,
    LOGGED_IN,
    SECONDS,
    SSL_REQUEST,
    TERMINATE,
    Client,
    cancel_request,
    message,
    query,
    startup,
)

HTTP = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    "packet",
    [
        startup(user="someone", database="somewhere", application_name="ä", options="-c geqo=off"),
        startup((3, 2), user="someone"),
        startup((3, 9), user="someone", **{"_pq_.unknown": "1"}),
        struct.pack("!IHH", 8, 3, 0),
    ],
    ids=["3.0", "3.2", "3.9", "no parameters"],
)
async def test_the_server_gets_the_packet_as_it_was_sent(house: House, packet: bytes) -> None:
    client = await house.connect()
    await client.send(packet)
    server = await house.backend.accept()
    assert await server.log_in() == packet
    await client.expect(LOGGED_IN)


async def test_what_follows_the_packet_at_once_is_not_lost(house: House) -> None:
    client = await house.connect()
    await client.send(startup() + message("p", b"password\0") + query("select 1"))
    server = await house.backend.accept()
    await server.expect(startup() + message("p", b"password\0") + query("select 1"))


@pytest.mark.parametrize(
    "requests", [[SSL_REQUEST], [GSSENC_REQUEST], [GSSENC_REQUEST, SSL_REQUEST], [SSL_REQUEST, GSSENC_REQUEST]]
)
async def test_encryption_is_declined_once_of_each_kind(house: House, requests: list[bytes]) -> None:
    client = await house.connect()
    for request in requests:
        await client.send(request)
        await client.expect(b"N")
    await client.send(startup())
    server = await house.backend.accept()
    assert await server.log_in() == startup()


both_requests = pytest.mark.parametrize("request_", [SSL_REQUEST, GSSENC_REQUEST], ids=["SSLRequest", "GSSENCRequest"])
"""For what is the same of both."""


@both_requests
@pytest.mark.parametrize("before", [[], [SSL_REQUEST], [GSSENC_REQUEST]])
async def test_the_server_refuses_a_second_request_itself(house: House, request_: bytes, before: list[bytes]) -> None:
    first = [request for request in before if request != request_] + [request_]
    client = await house.connect()
    for request in first:
        await client.send(request)
        await client.expect(b"N")
    await client.send(request_)
    server = await house.backend.accept()
    for request in first:
        await server.expect(request)
        await server.send(b"N")
    await server.expect(request_)
    await server.send(message("E", b"its own words"))
    await server.close()
    assert await client.rest() == message("E", b"its own words")
    await house.recorded("protocol-violation")
    assert house.faults[0].reason.endswith(" a second time")


@both_requests
async def test_the_server_refuses_what_is_stuffed_behind_a_request_itself(house: House, request_: bytes) -> None:
    client = await house.connect()
    await client.send(request_ + startup())
    server = await house.backend.accept()
    await server.expect(request_ + startup())
    await server.send(b"N")
    await server.send(message("E", b"its own words"))
    await server.close()
    assert await client.rest() == b"N" + message("E", b"its own words")
    await house.recorded("protocol-violation")
    assert house.faults[0].reason.endswith(f" and {len(startup())} bytes more without waiting for the answer")


@both_requests
@pytest.mark.parametrize("offer", [b"S", b"G"])
@pytest.mark.parametrize(("stuffed", "says"), [(True, "received unencrypted data"), (False, "unsupported frontend")])
async def test_a_server_that_offers_encryption_is_none_of_the_clients_business(
    house: House, request_: bytes, offer: bytes, stuffed: bool, says: str
) -> None:
    client = await house.connect()
    if not stuffed:
        await client.send(request_)
        await client.expect(b"N")
    await client.send(request_ + b"x" * stuffed)
    server = await house.backend.accept()
    await server.expect(request_)
    await server.send(offer)
    if stuffed:
        await client.expect(b"N")
    assert says in (await client.message()).fields["M"]
    assert await client.rest() == b""


async def test_protocol_2_is_passed_on_and_not_followed(house: House) -> None:
    packet = struct.pack("!IHH", 296, 2, 0) + bytes(288)
    client = await house.connect()
    await client.send(packet)
    server = await house.backend.accept()
    assert await server.packet() == packet
    await server.send(b"Eno\0")
    await client.expect(b"Eno\0")
    assert house.kinds == ["untracked"]


@pytest.mark.parametrize("secret", [b"key!", bytes(range(256))], ids=["4 bytes", "256 bytes"])
async def test_a_cancel_request_is_relayed_untouched(house: House, secret: bytes) -> None:
    packet = cancel_request(4711, secret)
    client = await house.connect()
    await client.send(packet)
    server = await house.backend.accept()
    assert await server.packet() == packet
    await client.nothing()  # libpq waits until the server has taken it
    await server.close()
    assert await client.rest() == b""
    assert house.kinds == []


@pytest.mark.parametrize(
    "garbage",
    [
        HTTP,
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\0" * 100,
        b"\xff" * 100,
        struct.pack("!I", 11_000) + bytes(8_000),
        struct.pack("!I", 7) + bytes(3),
        b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03",
    ],
    ids=["HTTP", "SSH", "zeros", "ones", "8 kB", "too short", "TLS"],
)
@pytest.mark.parametrize("declined", [[], [SSL_REQUEST], [GSSENC_REQUEST, SSL_REQUEST]], ids=["at once", "SSL", "both"])
@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
async def test_garbage_is_left_without_a_word_and_costs_the_server_nothing(
    house: House, garbage: bytes, declined: list[bytes], unix: bool
) -> None:
    client = await house.connect(unix=unix)
    for request in declined:
        await client.send(request)
        await client.expect(b"N")
    await client.send(garbage)
    assert await client.rest() == b""
    await house.backend.accept_nobody()
    await house.recorded("protocol-violation")
    [fault] = house.faults
    assert (fault.severity, fault.action, fault.over) == ("info", "logged", True)
    assert fault.reason.startswith(f"the connection {'went on' if declined else 'began'} with ")


@pytest.mark.parametrize("declined", [[], [SSL_REQUEST]], ids=["at once", "SSL"])
async def test_a_goodbye_before_the_start_is_nothing(house: House, declined: list[bytes]) -> None:
    """As node-postgres says it when it is ended before it is connected."""
    client = await house.connect()
    for request in declined:
        await client.send(request)
        await client.expect(b"N")
    await client.send(TERMINATE)
    assert await client.rest() == b""
    await house.backend.accept_nobody()
    assert house.kinds == []


async def test_a_message_before_the_start_is_an_error_and_left_without_a_word(backend: FakeBackend) -> None:
    async with running(backend, mode="reject") as house:
        client = await house.connect()
        await client.send(query("select 1"))
        assert await client.rest() == b""
        await house.recorded("protocol-violation")
        [fault] = house.faults
        assert (fault.severity, fault.action, fault.over) == ("error", "logged", True)
        assert fault.message is not None
        assert fault.message.name == "Query"


async def test_another_protocol_that_looks_like_a_start_is_for_the_server_to_refuse(house: House) -> None:
    packet = b"\0\0\0\x14\xffSMBr" + bytes(11)
    client = await house.connect()
    await client.send(packet)
    server = await house.backend.accept()
    assert await server.packet() == packet
    await server.send(message("E", b"its own words"))
    await server.close()
    assert await client.rest() == message("E", b"its own words")
    await house.recorded("protocol-violation")
    assert house.faults[0].severity == "info"
    assert house.faults[0].reason == "the connection began with SMB, not with PostgreSQL's startup packet"


@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
@pytest.mark.parametrize("said", [b"", b"\0\0", startup()[:-1], SSL_REQUEST])
async def test_a_client_that_says_too_little_is_let_go(backend: FakeBackend, said: bytes, unix: bool) -> None:
    async with running(backend, startup_timeout=0.1) as house:
        client = await house.connect(unix=unix)
        await client.send(said)
        assert await client.rest() in {b"", b"N"}
        await backend.accept_nobody()


async def test_a_trickle_does_not_put_the_deadline_off(backend: FakeBackend) -> None:
    async with running(backend, startup_timeout=0.2) as house:
        client = await house.connect()
        with pytest.raises(trio.BrokenResourceError), trio.fail_after(SECONDS / 3):
            await _trickle(client, startup(user="x" * 1000))


async def test_the_deadline_is_for_the_start_alone(backend: FakeBackend) -> None:
    """A user may take long to type a password."""
    async with running(backend, startup_timeout=0.1) as house:
        client = await house.connect()
        await client.send(startup())
        server = await backend.accept()
        await server.packet()
        await client.nothing(0.3)
        await server.send(LOGGED_IN)
        await client.expect(LOGGED_IN)


async def test_whatever_knocks_other_sessions_go_on(house: House) -> None:
    client, server = await house.session()
    async with trio.open_nursery() as nursery:
        for said in [b"", HTTP, b"\x16\x03\x01", SSL_REQUEST * 3, startup()[:5], bytes(20_000)] * 20:
            nursery.start_soon(_knock, house, said)
        for _ in range(50):
            with trio.fail_after(SECONDS):
                await client.send(query("select 1"))
                await server.expect(query("select 1"))
                await server.send(ANSWER)
                await client.expect(ANSWER)


async def _knock(house: House, said: bytes) -> None:
    client = await house.connect()
    await client.send(said)
    with trio.move_on_after(0.1):
        await client.rest()
    await client.close()


async def _trickle(client: Client, data: bytes) -> None:
    for byte in data:
        await client.send(bytes([byte]))
        await trio.sleep(0.03)
