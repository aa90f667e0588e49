"""Clients that do to TLS whatever they like: see :mod:`tests.fuzz.hostile`."""

from __future__ import annotations

import socket
import ssl
import struct
from contextlib import contextmanager, suppress
from random import Random
from typing import TYPE_CHECKING, Final

from tests.fuzz.hostile import QUIET, Report, attack_in_rounds, close, cut
from tests.integration.bare import USER
from tests.proxy.messages import GSSENC_REQUEST, SSL_REQUEST, TERMINATE, query, startup
from tests.tls.bare import TlsClient, context

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.guard_process import GuardProcess
    from tests.servers import Address

_STARTUP: Final = startup(user=USER, database=USER)
_NEW_CIPHER: Final = bytes.fromhex("1403030001 01")
_VERSIONS: Final = (None, ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)


def attack_tls(guard: GuardProcess, seed: int, seconds: float) -> Report:
    """Have hostile clients misuse the TLS of a guard, in front of a real server."""

    def attack(number: int, report: Report) -> None:
        del report
        rng = Random(seed << 32 | number)
        with suppress(OSError, AssertionError):  # ssl.SSLError is an OSError
            rng.choice(_ATTACKS)(guard.tcp, rng)

    return attack_in_rounds(guard, attack, seconds, user=USER)


@contextmanager
def _client(address: Address, rng: Random) -> Iterator[TlsClient]:
    client = TlsClient(address, rng.choice(_VERSIONS))
    client.socket.settimeout(QUIET)
    try:
        yield client
    finally:
        close(client.socket, reset=rng.random() < 0.5)


def _see(client: TlsClient) -> None:
    """Read what comes, for a moment."""
    with suppress(TimeoutError):
        client.rest()


def _mutated(data: bytes, rng: Random) -> bytes:
    """The same with something changed, cut off, doubled or put in."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(5):
            case 0:
                changed[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del changed[at:]
            case 2:
                changed[at:at] = rng.randbytes(rng.choice((1, 5, 300)))
            case 3:
                changed[at:at] = changed[at : at + rng.randrange(100)]
            case _ if len(changed) > 5:
                changed[3:5] = struct.pack("!H", rng.choice((0, 1, 0x4000, 0x4801, 0xFFFF)))
    return bytes(changed)


# Before there is TLS


def _something_else(address: Address, rng: Random) -> None:
    """What comes behind an SSLRequest is no handshake; sometimes it doesn't wait for the answer."""
    said = rng.choice(
        (
            _STARTUP,
            b"GET / HTTP/1.1\r\n\r\n",
            SSL_REQUEST,
            GSSENC_REQUEST,
            rng.randbytes(rng.randrange(1, 600)),
            b"\x16\x03\x01\xff\xff" + bytes(rng.choice((0, 70_000))),
            b"\x16\x03\x01\x00\x00" * rng.choice((1, 3000)),
            b"\x15\x03\x01\x00\x02\x02\x28",
            b"\x80\x2e\x01\x00\x02",
        )
    )
    with _client(address, rng) as client:
        if rng.random() < 0.5:
            client.request()
            client.socket.sendall(said)
        else:
            client.socket.sendall(SSL_REQUEST + said)
        _see(client)


def _odd_hello(address: Address, rng: Random) -> None:
    """A hello that has been changed, cut into pieces, or both; with SSLRequest, along with it, or without."""
    with _client(address, rng) as client:
        hello = client.hello()
        if rng.random() < 0.7:
            hello = _mutated(hello, rng)
        elif rng.random() < 0.5:  # its message is spread over as many records as it has bytes
            hello = b"".join(b"\x16\x03\x01\x00\x01" + hello[n : n + 1] for n in range(5, len(hello)))
        match rng.randrange(3):
            case 0:
                client.request()
            case 1:
                hello = SSL_REQUEST + hello
        for piece in cut(hello, rng):
            client.socket.sendall(piece)
        _see(client)


def _early(address: Address, rng: Random) -> None:
    """It doesn't wait for the handshake's end before it says something, or says that it has new keys."""
    with _client(address, rng) as client:
        client.request()
        data = rng.randbytes(rng.choice((1, 100, 16_000)))
        more = rng.choice((b"\x17\x03\x03" + struct.pack("!H", len(data)) + data, _NEW_CIPHER * rng.choice((1, 5000))))
        client.socket.sendall(client.hello() + more)
        _see(client)


def _other_protocol(address: Address, rng: Random) -> None:
    """Direct TLS, in which somebody is to speak something else."""
    made = context(rng.choice((None, "h2", "postgres", "x" * 255)), rng.choice(_VERSIONS))
    sock = socket.create_connection((address.host, address.port), timeout=QUIET)
    with sock, made.wrap_socket(sock) as tls:
        tls.sendall(_STARTUP)
        while tls.recv(65536):
            pass


def _gone(address: Address, rng: Random) -> None:
    """It goes in the middle of the handshake, or as soon as that is over."""
    with _client(address, rng) as client:
        client.request()
        match rng.randrange(4):
            case 0:
                client.socket.sendall(client.hello())
            case 1:
                client.shake_hands()
            case 2:
                client.shake_hands()
                client.socket.sendall(client.farewell())
            case _:
                client.shake_hands()
                client.send(_STARTUP[: rng.randrange(len(_STARTUP))])


# When there is


@contextmanager
def _logged_in(address: Address, rng: Random) -> Iterator[TlsClient]:
    with _client(address, rng) as client:
        client.socket.settimeout(20 * QUIET)
        client.log_in()
        client.socket.settimeout(QUIET)
        yield client


def _corrupt(address: Address, rng: Random) -> None:
    """A record that has been changed on its way, or comes twice."""
    with _logged_in(address, rng) as client:
        record = client.sealed(query("SELECT 1"))
        client.socket.sendall(rng.choice((_mutated(record, rng), record * 2, record[:-1] + b"\0" + record)))
        _see(client)


def _torn(address: Address, rng: Random) -> None:
    """Records in pieces, and sometimes not all of the last one."""
    with _logged_in(address, rng) as client:
        data = client.sealed(query(f"SELECT '{'x' * rng.choice((1, 40_000))}'") * rng.choice((1, 5)))
        for piece in cut(data[: len(data) - rng.choice((0, 0, 1, 7))], rng):
            client.socket.sendall(piece)
        _see(client)


def _plain(address: Address, rng: Random) -> None:
    """It goes on without TLS."""
    with _logged_in(address, rng) as client:
        client.socket.sendall(rng.choice((query("SELECT 1"), TERMINATE, _STARTUP, b"\x17\x03\x03\xff\xff")))
        _see(client)


def _farewell(address: Address, rng: Random) -> None:
    """It says that no more will come, somewhere, and sometimes something does."""
    with _logged_in(address, rng) as client:
        data = client.sealed(query("SELECT repeat('x', 100000)") * rng.randrange(4) + TERMINATE * rng.randrange(2))
        more = client.sealed(query("SELECT 1"))
        client.socket.sendall(data + client.farewell() + more * rng.randrange(2))
        if rng.random() < 0.5:
            client.socket.shutdown(socket.SHUT_WR)
        _see(client)


def _byte_by_byte(address: Address, rng: Random) -> None:
    """Each byte is a record of its own."""
    with _client(address, rng) as client:
        client.request()
        client.shake_hands()
        data = _STARTUP + query("SELECT 1") * rng.choice((1, 20))
        client.socket.sendall(b"".join(client.sealed(bytes([byte])) for byte in data))
        _see(client)


def _unread(address: Address, rng: Random) -> None:
    """It asks for much, and reads none of it."""
    with _logged_in(address, rng) as client, suppress(TimeoutError):
        size, times = rng.choice(((10, 2000), (1_000_000, 20), (1_000_000, 1)))
        client.send(query(f"SELECT repeat('x', {size})") * times)


_ATTACKS: Final[tuple[Callable[[Address, Random], None], ...]] = (
    *(_something_else, _odd_hello, _odd_hello, _odd_hello, _early, _other_protocol, _gone),
    *(_corrupt, _corrupt, _torn, _plain, _farewell, _byte_by_byte, _unread),
)
