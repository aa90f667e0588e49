"""A client that is a socket with TLS on it, and no driver: it says exactly what a test says."""

from __future__ import annotations

import socket
import ssl
from contextlib import suppress
from typing import TYPE_CHECKING

from tests.integration.bare import SECONDS, USER
from tests.proxy.messages import READY, SSL_REQUEST, query, startup

if TYPE_CHECKING:
    from tests.servers import Address


def context(alpn: str | None = "postgresql", version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    """What a client shakes hands with that checks nothing."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname = False
    made.verify_mode = ssl.CERT_NONE
    if alpn is not None:
        made.set_alpn_protocols([alpn])
    if version is not None:
        made.minimum_version = made.maximum_version = version
    return made


class TlsClient:
    """A connection with TLS, in which every record that is sent is in the test's hands.

    Args:
        address: where it connects to.
        version: of TLS; by default the latest that both have.
    """

    def __init__(self, address: Address, version: ssl.TLSVersion | None = None) -> None:
        self.socket = socket.create_connection((address.host, address.port), timeout=SECONDS)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context(version=version).wrap_bio(self._incoming, self._outgoing)
        self._received = bytearray()

    def request(self) -> None:
        """Ask for TLS, and be told that there is some."""
        self.socket.sendall(SSL_REQUEST)
        assert self.socket.recv(1) == b"S"

    def hello(self) -> bytes:
        """The first that is to be sent of the handshake."""
        with suppress(ssl.SSLWantReadError):
            self.tls.do_handshake()
        return self._outgoing.read()

    def shake_hands(self) -> None:
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                self.socket.sendall(self._outgoing.read())
                self._listen()
            else:
                self.socket.sendall(self._outgoing.read())
                return

    def log_in(self) -> None:
        self.request()
        self.shake_hands()
        self.send(startup(user=USER, database=USER))
        self.until(READY)

    def sealed(self, data: bytes) -> bytes:
        """What these bytes are when they are encrypted, to be sent by whoever asks for it."""
        self.tls.write(data)
        return self._outgoing.read()

    def farewell(self) -> bytes:
        """A ``close_notify``, to be sent."""
        with suppress(ssl.SSLError):
            self.tls.unwrap()
        return self._outgoing.read()

    def send(self, data: bytes) -> None:
        self.socket.sendall(self.sealed(data))

    def ask(self, sql: str) -> bytes:
        self.send(query(sql))
        return self.until(READY)

    def until(self, end: bytes) -> bytes:
        """Everything that comes until it ends like that."""
        while not self._received.endswith(end):
            try:
                data = self.tls.read(65536)
            except ssl.SSLWantReadError:
                self._listen()
                continue
            assert data, f"the connection ended after {bytes(self._received)!r}"
            self._received += data
        taken = bytes(self._received)
        self._received.clear()
        return taken

    def rest(self) -> bytes:
        """Everything that comes until the end of the stream, encrypted or not; what can't be read is left out."""
        while True:
            try:
                data = self.socket.recv(65536)
            except ConnectionResetError:
                break
            if not data:
                break
            self._incoming.write(data)
            try:
                while data := self.tls.read(65536):
                    self._received += data
            except ssl.SSLError:
                continue
        return bytes(self._received)

    def close(self) -> None:
        self.socket.close()

    def _listen(self) -> None:
        data = self.socket.recv(65536)
        assert data, f"the connection ended after {bytes(self._received)!r}"
        self._incoming.write(data)
