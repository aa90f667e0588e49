"""A client that speaks TLS, and says exactly what the test says, also in the handshake."""

from __future__ import annotations

import ssl
from contextlib import suppress
from typing import TYPE_CHECKING, cast

import trio
import trio.lowlevel

from tests.proxy.messages import SECONDS, SSL_REQUEST, Client

if TYPE_CHECKING:
    from tests.proxy.conftest import House


class TlsStream:
    """As much of a stream as :class:`tests.proxy.messages.Peer` needs, with TLS on top of another one's.

    Args:
        stream: that.
        alpn: the protocols that it offers.
        pair: the files of its own certificate and key.
        name: the server's, which is told it.
        context: instead of one that checks nothing.
    """

    def __init__(
        self,
        stream: trio.SocketStream,
        *,
        alpn: str | None = None,
        name: str = "anything.example",
        context: ssl.SSLContext | None = None,
    ) -> None:
        if context is None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if alpn is not None:
            context.set_alpn_protocols([alpn])
        self.stream = stream
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=name)
        self.is_closed = False
        """The server has said by TLS that it will send no more."""

    def hello(self) -> bytes:
        """What it begins with."""
        with suppress(ssl.SSLWantReadError):
            self.tls.do_handshake()
        return self._outgoing.read()

    async def shake_hands(self, *, at_a_time: int = 1 << 20, behind: bytes = b"", heard: bytes = b"") -> None:
        """Go on with the handshake to its end.

        Args:
            at_a_time: bytes of it that are sent at once.
            behind: what is sent with the last of it.
            heard: what has been received of it.
        """
        self._incoming.write(heard)
        with trio.fail_after(SECONDS):
            while True:
                try:
                    self.tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    await self._send(at_a_time)
                    data = await self.stream.receive_some(65536)
                    assert data, "the connection ended in the handshake"
                    self._incoming.write(data)
                except ssl.SSLError:
                    await self._send()  # it says why
                    raise
            if behind:
                self.tls.write(behind)
            await self._send(at_a_time)

    async def _send(self, at_a_time: int = 1 << 20) -> None:
        data = self._outgoing.read()
        for n in range(0, len(data), at_a_time):
            await self.stream.send_all(data[n : n + at_a_time])
            if at_a_time < len(data):
                await trio.lowlevel.checkpoint()

    async def send_all(self, data: bytes) -> None:
        self.tls.write(data)
        await self._send()

    async def end(self) -> None:
        """Say that no more will come."""
        with suppress(ssl.SSLWantReadError):
            self.tls.unwrap()
        await self._send()

    async def receive_some(self, size: int) -> bytes:
        while True:
            try:
                data = self.tls.read(size)
            except ssl.SSLWantReadError:
                pass
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                data = b""
            else:
                if data:
                    return data
            if self._incoming.eof:
                return b""
            raw = await self.stream.receive_some(65536)
            if raw:
                self._incoming.write(raw)
            else:
                self._incoming.write_eof()
                self.is_closed = self._has_been_closed()

    def _has_been_closed(self) -> bool:
        try:
            return not self.tls.read(1)
        except ssl.SSLZeroReturnError:
            return True
        except ssl.SSLError:
            return False

    def setsockopt(self, level: int, option: int, value: int | bytes) -> None:
        self.stream.setsockopt(level, option, value)

    async def aclose(self) -> None:
        await self.stream.aclose()


async def connect_tls(
    house: House,
    *,
    direct: bool = False,
    alpn: str | None = None,
    context: ssl.SSLContext | None = None,
    behind: bytes = b"",
) -> tuple[Client, TlsStream]:
    """A client of a guard's that has TLS.

    Args:
        house: has the guard.
        direct: it begins with the handshake.
        alpn: what it calls what follows.
        context: how it checks the guard.
        behind: what it says with the last of its handshake.
    """
    return await start_tls(await house.connect(), direct=direct, alpn=alpn, context=context, behind=behind)


async def start_tls(
    plain: Client,
    *,
    direct: bool = False,
    alpn: str | None = None,
    context: ssl.SSLContext | None = None,
    behind: bytes = b"",
) -> tuple[Client, TlsStream]:
    """:func:`connect_tls`, by a client that has said nothing yet."""
    if not direct:
        await plain.send(SSL_REQUEST)
        await plain.expect(b"S")
    stream = TlsStream(plain.stream, alpn=alpn, context=context)
    await stream.shake_hands(behind=behind)
    return Client(cast("trio.SocketStream", stream)), stream
