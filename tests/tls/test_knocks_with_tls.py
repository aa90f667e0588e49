"""Before login a client can't tell a guard that offers TLS from PostgreSQL that does, whatever it says and when."""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import psycopg
import pytest

from tests.proxy.messages import GSSENC_REQUEST, SSL_REQUEST, TERMINATE, cancel_request, query, startup
from tests.tls.conftest import tls_guard

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.guard_process import GuardProcess
    from tests.servers import Address
    from tests.tls.servers import Papers, TlsServer

_SECONDS: Final = 30.0
_SINCE_17: Final = 170_000
_OWN: Final = re.compile(rb"(?<=\0)[FLR][^\0]+\0|(?<=E\0\0)..(?=SFATAL)", re.DOTALL)
"""Of an ErrorResponse: its length, and where in the server's source it is from."""
_GUARDS: Final = b"received unencrypted data"
"""Words that the guard says itself. What else there is it has the server say."""


class Client:
    """A client, and what it gets."""

    def __init__(self, address: Address) -> None:
        self.sock = socket.create_connection((address.host, address.port), timeout=_SECONDS)
        self.got: list[object] = []

    def say(self, data: bytes, expect: int = 0) -> None:
        self.sock.sendall(data)
        if expect:
            self.got.append(self.sock.recv(expect))

    def ask(self) -> None:
        """Ask for TLS, and get it."""
        self.say(SSL_REQUEST, 1)
        self.shake_hands()

    def shake_hands(self, alpn: str = "", version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.maximum_version = version
        if alpn:
            context.set_alpn_protocols(["http/1.1", alpn])
        self.sock = context.wrap_socket(self.sock, server_hostname="anything.example")
        self.got.append((self.sock.version(), self.sock.selected_alpn_protocol()))

    def end(self) -> None:
        """Get what is left, to a clean end of the stream."""
        received = b""
        while data := self.sock.recv(65536):
            received += data
        self.got.append(_OWN.sub(b"", received) if _GUARDS in received else received)


def _stuffed(client: Client) -> None:
    client.say(SSL_REQUEST + startup(user="postgres"))


def _hello_behind(client: Client) -> None:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    hello = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        hello.do_handshake()
    client.say(SSL_REQUEST + outgoing.read(), 1)
    client.sock.shutdown(socket.SHUT_WR)
    client.got.append(client.sock.recv(3))
    while client.sock.recv(65536):
        pass


def _bad_record(client: Client) -> None:
    client.say(SSL_REQUEST, 1)
    client.say(b"\x16\3\1\0\x04abcd")


def _goodbye(client: Client) -> None:
    client.say(SSL_REQUEST, 1)
    client.say(TERMINATE)


def _within(data: bytes) -> Callable[[Client], None]:
    def knock(client: Client) -> None:
        client.ask()
        client.say(data)

    return knock


def _at_once(
    data: bytes, alpn: str = "postgresql", version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
) -> Callable[[Client], None]:
    def knock(client: Client) -> None:
        client.shake_hands(alpn, version)
        if data:
            client.say(data)

    return knock


def _declined(client: Client) -> None:
    client.shake_hands("postgresql")
    client.say(SSL_REQUEST, 1)
    client.say(SSL_REQUEST)


KNOCKS: Final = {
    "a start behind SSLRequest": _stuffed,
    "a hello behind SSLRequest": _hello_behind,
    "a record that is none": _bad_record,
    "a goodbye instead of a handshake": _goodbye,
    "SSLRequest within TLS": _within(SSL_REQUEST),
    "GSSENCRequest within TLS": _within(GSSENC_REQUEST),
    "HTTP within TLS": _within(b"GET / HTTP/1.1\r\n\r\n"),
    "a hello within TLS": _within(b"\x16\3\1\0\5abcde"),
    "a query within TLS": _within(query("select 1")),
    "a cancel request within TLS": _within(cancel_request(1, b"abcd")),
    "TLS at once": _at_once(b"\0\0\0\1"),
    "TLS at once, for nothing": _at_once(b"", ""),
    "TLS 1.2 at once, for nothing": _at_once(b"", "", ssl.TLSVersion.TLSv1_2),
    "TLS at once, then SSLRequest twice": _declined,
    "TLS at once, then SSLRequest with more behind it": _at_once(SSL_REQUEST + b"more"),
}


@pytest.fixture(scope="module")
def guard(tls_server: TlsServer, papers: Papers) -> Iterator[GuardProcess]:
    with tls_guard(tls_server, "sslmode=require", papers.server) as guard:
        yield guard


@pytest.mark.parametrize("knock", KNOCKS.values(), ids=KNOCKS)
def test_a_client_can_not_tell_it_from_the_server(
    tls_server: TlsServer, guard: GuardProcess, knock: Callable[[Client], None]
) -> None:
    with psycopg.connect(tls_server.conninfo) as connection:
        if connection.info.server_version < _SINCE_17:
            pytest.skip("a PostgreSQL before 17 has no direct TLS")
    found = []
    for address in tls_server.tcp, guard.tcp:
        client = Client(address)
        knock(client)
        client.end()
        client.sock.close()
        found.append(client.got)
    assert found[0] == found[1]
