"""The start-up phase: what real clients say first, and all else that knocks at a port."""

from __future__ import annotations

import ssl
import struct

import pytest
import trio

from tests.proxy.conftest import House, running
from tests.proxy.fake_backend import FakeBackend
from tests.proxy.messages import (
    ANSWER,
    GSSENC_REQUEST,
    LOGGED_IN,
    SSL_REQUEST,
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


@pytest.mark.parametrize("request_", [SSL_REQUEST, GSSENC_REQUEST], ids=["SSLRequest", "GSSENCRequest"])
async def test_the_second_request_of_a_kind_is_no_protocol_version(house: House, request_: bytes) -> None:
    client = await house.connect()
    await client.send(request_)
    await client.expect(b"N")
    await client.send(request_)
    assert (await client.message()).fields["C"] == "0A000"
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
        struct.pack("!I", 11_000) + bytes(10_996),
        struct.pack("!I", 7) + bytes(3),
    ],
    ids=["HTTP", "SSH", "zeros", "ones", "11 kB", "too short"],
)
@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
async def test_garbage_is_refused_in_the_protocols_words_and_costs_the_server_nothing(
    house: House, garbage: bytes, unix: bool
) -> None:
    client = await house.connect(unix=unix)
    await client.send(garbage)
    error = await client.message()
    assert error.fields["C"] == "08P01"
    assert error.fields["M"] == "pgguard: invalid length of startup packet"
    assert await client.rest() == b""
    await house.backend.accept_nobody()
    assert house.kinds == ["protocol-violation"]


async def test_garbage_behind_an_answered_request(house: House) -> None:
    """Such as the TLS of a client that has overlooked the N."""
    client = await house.connect()
    await client.send(SSL_REQUEST)
    await client.expect(b"N")
    await client.send(b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03")
    assert (await client.message()).fields["C"] == "08P01"


async def test_tls_at_once_is_left_unanswered_and_explained_in_the_log(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    """As by PostgreSQL without TLS: a TLS client can read no ErrorResponse."""
    raw = await trio.open_tcp_stream("127.0.0.1", house.port)
    context = ssl.create_default_context()
    context.set_alpn_protocols(["postgresql"])
    with pytest.raises((trio.BrokenResourceError, ssl.SSLError)):
        await trio.SSLStream(raw, context, server_hostname="localhost").do_handshake()
    await raw.aclose()
    assert "sslmode=disable or prefer" in caplog.text
    assert house.kinds == []


@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
@pytest.mark.parametrize("said", [b"", b"\0\0", startup()[:-1], SSL_REQUEST + startup()[:20]])
async def test_a_client_that_says_too_little_is_let_go(backend: FakeBackend, said: bytes, unix: bool) -> None:
    async with running(backend, startup_timeout=0.1) as house:
        client = await house.connect(unix=unix)
        await client.send(said)
        assert await client.rest() in {b"", b"N"}
        await backend.accept_nobody()


async def test_a_trickle_does_not_put_the_deadline_off(backend: FakeBackend) -> None:
    async with running(backend, startup_timeout=0.2) as house:
        client = await house.connect()
        with pytest.raises(trio.BrokenResourceError), trio.fail_after(2):
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
            with trio.fail_after(1):
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
