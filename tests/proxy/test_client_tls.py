"""TLS with clients: what they ask for in which way, and get, is what PostgreSQL 17 would give them."""

from __future__ import annotations

import logging
import signal
import socket
import ssl
from typing import TYPE_CHECKING, cast

import pytest
import trio

from pgguard.reporting.record import to_record
from tests.proxy.conftest import House, backend, running, until
from tests.proxy.fake_backend import converse, part
from tests.proxy.messages import (
    GSSENC_REQUEST,
    LOGGED_IN,
    SSL_REQUEST,
    TERMINATE,
    Client,
    cancel_request,
    message,
    query,
    startup,
)
from tests.proxy.spawned import spawned
from tests.proxy.tls_backend import encrypt
from tests.proxy.tls_client import TlsStream, connect_tls
from tests.tls.certificates import Authority

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.proxy.fake_backend import BackendConnection, FakeBackend

__all__ = ["backend"]

UNSUPPORTED = message("E", b"SFATAL\0C0A000\0Munsupported frontend protocol 1234.5679: server supports 3.0 to 3.0\0\0")


@pytest.fixture
async def house(backend: FakeBackend) -> AsyncIterator[House]:
    """A guard that offers TLS."""
    async with running(backend, tls_cert="self-signed") as house:
        yield house


async def let_in(house: House, client: Client, packet: bytes = b"") -> BackendConnection:
    if packet == b"":
        packet = startup()
        await client.send(packet)
    server = await house.backend.accept()
    assert await server.log_in() == packet
    await client.expect(LOGGED_IN)
    return server


@pytest.mark.parametrize(
    ("direct", "alpn"), [(False, None), (False, "postgresql"), (False, "http/1.1"), (True, "postgresql")]
)
async def test_a_session_by_tls(house: House, direct: bool, alpn: str | None) -> None:
    client, stream = await connect_tls(house, direct=direct, alpn=alpn)
    assert stream.tls.version() == "TLSv1.3"
    server = await let_in(house, client)
    await converse(client, server)
    [session] = house.guard._sessions.values()
    assert session.facts().tls
    await part(client, server)
    await house.empty()
    assert house.kinds == []


async def test_the_start_may_come_with_the_last_of_the_handshake(house: House) -> None:
    packet = startup() + query("select 1")
    client, _ = await connect_tls(house, behind=packet)
    server = await house.backend.accept()
    await server.expect(packet)
    await server.send(LOGGED_IN)
    await client.expect(LOGGED_IN)


async def test_a_handshake_that_comes_in_small_pieces(house: House) -> None:
    plain = await house.connect()
    for n in range(len(SSL_REQUEST)):
        await plain.send(SSL_REQUEST[n : n + 1])
    await plain.expect(b"S")
    stream = TlsStream(plain.stream)
    await stream.shake_hands(at_a_time=7)
    await let_in(house, Client(cast("trio.SocketStream", stream)))


async def test_gssapi_is_declined_and_tls_is_not(house: House) -> None:
    plain = await house.connect()
    await plain.send(GSSENC_REQUEST)
    await plain.expect(b"N")
    await plain.send(SSL_REQUEST)
    await plain.expect(b"S")
    stream = TlsStream(plain.stream)
    await stream.shake_hands()
    await let_in(house, Client(cast("trio.SocketStream", stream)))
    assert house.kinds == []


async def test_who_asks_for_none_needs_none(house: House) -> None:
    client, server = await house.session()
    await converse(client, server)
    [session] = house.guard._sessions.values()
    assert not session.facts().tls


async def test_a_handshake_may_stand_behind_the_request_at_once(house: House) -> None:
    """As with PostgreSQL 17: it is the handshake, or nothing."""
    plain = await house.connect()
    stream = TlsStream(plain.stream)
    await plain.send(SSL_REQUEST + stream.hello())
    answer = await plain.stream.receive_some(1 << 20)
    assert answer[:1] == b"S"
    await stream.shake_hands(heard=answer[1:])
    await let_in(house, Client(cast("trio.SocketStream", stream)))
    assert house.kinds == []


async def test_what_is_stuffed_behind_the_request_is_not_taken_for_encrypted(house: House) -> None:
    """CVE-2021-23214. It is nothing that anybody says, and nothing of it reaches the server."""
    plain = await house.connect()
    await plain.send(SSL_REQUEST + startup())
    assert await plain.rest() == b"S"
    await house.backend.accept_nobody()
    await house.recorded("protocol-violation")
    assert house.faults[0].reason.endswith(f" and {len(startup())} bytes more without waiting for the answer")


async def test_what_is_no_handshake_ends_it(house: House, caplog: pytest.LogCaptureFixture) -> None:
    for said in startup(), b"GET / HTTP/1.1\r\n\r\n":
        plain = await house.connect()
        await plain.send(SSL_REQUEST)
        await plain.expect(b"S")
        await plain.send(said)
        assert await plain.rest() == b""
    await house.backend.accept_nobody()
    first, second = (message for message in caplog.messages if "no TLS with 127.0.0.1:" in message)
    assert first.endswith(": wrong version number (that was no TLS)")
    assert second.endswith(": http request (that was HTTP)")
    assert house.kinds == []


async def test_a_health_check_that_sees_that_there_is_tls(house: House, caplog: pytest.LogCaptureFixture) -> None:
    """As the one of the container's image."""
    plain = await house.connect()
    await plain.send(SSL_REQUEST)
    await plain.expect(b"S")
    await plain.send(TERMINATE)
    assert await plain.rest() == b""
    assert (house.kinds, caplog.messages) == ([], [])


async def test_a_connection_that_begins_with_tls_has_to_say_what_for(house: House) -> None:
    client, stream = await connect_tls(house, direct=True)
    assert await client.rest() == b""
    assert stream.is_closed
    await house.backend.accept_nobody()
    await house.recorded("protocol-violation")
    [fault] = house.faults
    assert (fault.severity, fault.session.tls) == ("info", True)
    assert "(ALPN)" in fault.reason


@pytest.mark.parametrize("request_", [SSL_REQUEST, GSSENC_REQUEST], ids=["SSLRequest", "GSSENCRequest"])
async def test_no_encryption_can_be_had_within_tls(house: House, request_: bytes) -> None:
    """The server says so; what it is asked without TLS it declines once."""
    client, stream = await connect_tls(house)
    await client.send(request_)
    server = await house.backend.accept()
    await server.expect(request_)
    await server.send(b"N")
    await server.expect(request_)
    await server.send(UNSUPPORTED)
    await server.close()
    assert await client.rest() == UNSUPPORTED
    assert stream.is_closed
    await house.recorded("protocol-violation")
    assert house.faults[0].reason.endswith(" although it has TLS")


@pytest.mark.parametrize("answer", [UNSUPPORTED, b"N", b"", b"a reset"])
async def test_a_server_that_has_tls_too_is_asked_within_it(
    tmp_path: Path, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    """What isn't a refusal isn't passed on."""
    monkeypatch.setattr("pgguard.proxy.upstream._REFUSAL_TIMEOUT", 1.0)
    pair = Authority(tmp_path, "authority").issue("server", "server")
    where = f"host=127.0.0.1 port={backend.port} sslmode=require"
    async with running(backend, upstream=where, tls_cert="self-signed") as house:
        client, _ = await connect_tls(house)
        await client.send(SSL_REQUEST)
        server = await encrypt(backend, pair)
        await server.expect(SSL_REQUEST)
        if answer == b"a reset":
            await server.stream.transport_stream.aclose()  # type: ignore[attr-defined]
        else:
            await server.send(answer)
        if answer != b"N":
            await server.close()
        said = await client.message()
    assert said.fields["M"].endswith("3.0 to 3.0" if answer == UNSUPPORTED else "3.0 to 3.2")


async def test_after_a_direct_handshake_more_is_declined_once(house: House) -> None:
    client, _ = await connect_tls(house, direct=True, alpn="postgresql")
    for request in SSL_REQUEST, GSSENC_REQUEST:
        await client.send(request)
        await client.expect(b"N")
    await let_in(house, client)
    other, _ = await connect_tls(house, direct=True, alpn="postgresql")
    await other.send(SSL_REQUEST + b"more")
    await other.expect(b"N")
    assert "received unencrypted data" in (await other.message()).fields["M"]
    await house.recorded("protocol-violation")


async def test_over_a_unix_socket_there_is_none(house: House) -> None:
    client = await house.connect(unix=True)
    await client.send(SSL_REQUEST)
    await client.expect(b"N")
    await let_in(house, client)
    direct = await house.connect(unix=True)
    await direct.send(TlsStream(direct.stream, alpn="postgresql").hello())
    assert await direct.rest() == b""


async def test_a_cancel_request_by_tls(house: House) -> None:
    packet = cancel_request(4711, b"key!")
    client, stream = await connect_tls(house)
    await client.send(packet)
    server = await house.backend.accept()
    assert await server.packet() == packet
    await server.close()
    assert await client.rest() == b""
    assert stream.is_closed


@pytest.mark.parametrize("half", ["close_notify", "tcp"])
async def test_a_client_that_has_ended_its_side_is_told_by_tls_when_the_server_ends(house: House, half: str) -> None:
    client, stream = await connect_tls(house)
    server = await let_in(house, client)
    if half == "tcp":
        await stream.stream.send_eof()
    else:
        await stream.end()
    assert await server.rest() == b""
    await server.close()
    assert await client.rest() == b""
    assert stream.is_closed


async def test_who_can_not_be_connected_is_told_by_tls() -> None:
    async with running(tls_cert="self-signed", upstream="host=127.0.0.1 port=1") as house:
        client, stream = await connect_tls(house)
        await client.send(startup())
        assert (await client.message()).fields["C"] == "08001"
        assert await client.rest() == b""
        assert stream.is_closed
        await stream.aclose()


async def test_one_that_is_refused_may_leave_the_last_unread(caplog: pytest.LogCaptureFixture) -> None:
    """As libpq does: it closes when it has got the error, and TLS has said one thing more."""
    caplog.set_level(logging.INFO)
    async with running(tls_cert="self-signed", upstream="host=127.0.0.1 port=1") as house:
        client, _ = await connect_tls(house)
        await client.send(startup())
        await client.rest()
        await client.reset()
        await until(lambda: not house.guard._roster.arriving)
    assert not [said for said in caplog.messages if "reset" in said]


async def test_a_client_that_leaves_in_its_handshake(house: House) -> None:
    plain = await house.connect()
    await plain.send(SSL_REQUEST)
    await plain.expect(b"S")
    await plain.send(TlsStream(plain.stream).hello()[:100])
    await plain.close()
    await until(lambda: not house.guard._roster.arriving)
    assert house.kinds == []


async def test_a_client_that_says_nothing_in_time(backend: FakeBackend) -> None:
    async with running(backend, tls_cert="self-signed", startup_timeout=0.2) as house:
        plain = await house.connect()
        await plain.send(SSL_REQUEST)
        await plain.expect(b"S")
        stream = TlsStream(plain.stream)
        await stream.shake_hands()
        client = Client(cast("trio.SocketStream", stream))
        assert await client.rest() == b""
        await until(lambda: not house.guard._roster.arriving)


async def test_one_that_does_not_trust_the_certificate(house: House, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        await connect_tls(house, context=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    await until(lambda: bool(caplog.messages))
    [said] = caplog.messages
    assert "alert unknown ca (it doesn't trust the certificate that it is shown: " in said
    assert house.kinds == []


async def test_the_record_says_that_there_was_tls(house: House) -> None:
    client, _ = await connect_tls(house)
    server = await let_in(house, client)
    await server.send(b"D\0\0\0\x06\0\0")
    await house.recorded("message-while-idle")
    assert to_record(house.faults[0])["session"]["tls"] is True


async def test_a_renewed_certificate_is_for_new_sessions(tmp_path: Path, backend: FakeBackend) -> None:
    authority = Authority(tmp_path, "authority")
    pair = authority.issue("server", "before")
    options = ("--tls-cert", str(pair.cert), "--tls-key", str(pair.key), "--attribution", "off")
    with spawned(f"host=127.0.0.1 port={backend.port}", *options, cwd=tmp_path) as guard:
        guard.wait_for(r"clients are offered TLS over TCP, with the certificate of before, valid until ()")
        before = await shown(guard.port)
        client = await Client.connect(guard.port)
        await client.send(SSL_REQUEST)
        await client.expect(b"S")
        authority.issue("server", "after")
        guard.signal(signal.SIGHUP)
        guard.wait_for(r"SIGHUP: new clients are shown the certificate of after, valid until ()")
        after = await shown(guard.port)
        assert before != after
        stream = TlsStream(client.stream)  # who has been answered already gets what it was to get
        await stream.shake_hands()
        assert stream.tls.getpeercert(binary_form=True) in {before, after}
        await stream.aclose()
        pair.key.chmod(0o644)
        guard.signal(signal.SIGHUP)
        guard.wait_for(r"SIGHUP: new clients are shown the old certificate: --tls-cert: the private key ()")
        assert await shown(guard.port) == after
        guard.signal(signal.SIGTERM)
        guard.end()


async def shown(port: int) -> bytes | None:
    """The certificate that a client is shown."""

    def look() -> bytes | None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
            sock.sendall(SSL_REQUEST)
            assert sock.recv(1) == b"S"
            with context.wrap_socket(sock) as encrypted:
                return encrypted.getpeercert(binary_form=True)

    return await trio.to_thread.run_sync(look)
