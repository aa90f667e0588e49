"""A server with TLS that does what a test says."""

from __future__ import annotations

import ssl
from contextlib import suppress
from typing import TYPE_CHECKING

import trio

from tests.proxy.fake_backend import BackendConnection, FakeBackend
from tests.proxy.messages import SECONDS, SSL_REQUEST

if TYPE_CHECKING:
    import socket

    from tests.tls.certificates import Pair


def showing(pair: Pair, *, alpn: bool = True, most: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
    """What it takes to show a certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.cert, pair.key)
    context.maximum_version = most
    if alpn:
        context.set_alpn_protocols(["postgresql"])
    return context


async def shake_hands(server: BackendConnection, context: ssl.SSLContext) -> ssl.SSLObject:
    """Speak TLS from now on."""
    plain = server.stream
    stream = trio.SSLStream(plain, context, server_side=True, https_compatible=True)
    try:
        await stream.do_handshake()
    except trio.BrokenResourceError:
        with suppress(trio.BrokenResourceError):
            await plain.send_all(stream._outgoing.read())  # the alert, which trio doesn't send
        await plain.aclose()
        raise
    server.stream = stream  # type: ignore[assignment]
    found = stream._ssl_object
    assert isinstance(found, ssl.SSLObject)
    return found


async def encrypt(backend: FakeBackend, pair: Pair, **more: object) -> BackendConnection:
    """Accept a connection, and have it encrypted."""
    server = await backend.accept()
    await _offer(server, showing(pair, **more))  # type: ignore[arg-type]
    return server


async def _offer(server: BackendConnection, context: ssl.SSLContext) -> None:
    await server.expect(SSL_REQUEST)
    await server.send(b"S")
    await shake_hands(server, context)


class TlsBackend(FakeBackend):
    """One that has TLS, behind a guard whose clients have it as well, with whatever a test plays.

    Args:
        pair: what it shows.
    """

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.encrypts = True
        self._context = showing(pair)

    @property
    def settings(self) -> dict[str, str]:
        upstream = f"host=127.0.0.1 port={self.port} sslmode=require connect_timeout=5"
        return {"upstream": upstream, "tls_cert": "self-signed"}

    async def accept(self) -> BackendConnection:
        server = await super().accept()
        await _offer(server, self._context)
        return server


def answer_once(listener: socket.socket, answer: bytes, context: ssl.SSLContext) -> None:
    """Answer one request for TLS, and do as that says."""
    with listener.accept()[0] as server:
        server.settimeout(SECONDS)
        assert server.recv(8) == SSL_REQUEST
        server.sendall(answer)
        if answer == b"S":
            with context.wrap_socket(server, server_side=True) as encrypted:
                assert encrypted.recv(1) == b""
