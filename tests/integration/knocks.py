"""What may come in before a client has logged in, as a table, and what PostgreSQL makes of it.

From ``ProcessStartupPacket()`` and its callers: ``postmaster.c`` in PostgreSQL 15, ``backend_startup.c`` since 17.
Each row is tried against a server and against a guard in front of it: the same bytes have to come back, and the same
end. What stands in a row beside what is sent says only where to stop waiting.
"""

from __future__ import annotations

import socket
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from tests.proxy.messages import (
    GSSENC_REQUEST,
    SSL_REQUEST,
    TERMINATE,
    cancel_request,
    message,
    query,
    startup,
)

if TYPE_CHECKING:
    from tests.servers import Address

End = Literal["fin", "reset", "none"]

SECONDS: Final = 40.0
"""How long anything that has to come may take."""
QUIET: Final = 0.2
"""For how long nothing comes where nothing is to come."""


@dataclass(frozen=True, slots=True)
class Shut:
    """The client has no more to send, and says so: shutdown(2)."""


@dataclass(frozen=True, slots=True)
class Wait:
    """The client waits until these bytes have come, the last of what has."""

    until: bytes


@dataclass(frozen=True, slots=True)
class Knock:
    """One row: what a client does, one step after the other, and how it ends."""

    name: str
    steps: tuple[bytes | Wait | Shut, ...]
    end: End
    """``fin``: the server closes. ``reset``: likewise, with something of the client's unread. ``none``: it waits."""
    says: bytes = b""
    """What has to be in the answer; empty: there is none."""
    since: int = 0
    """The first major version of PostgreSQL that does so."""
    gss: bool = False
    """GSSAPI encryption is asked for, which a server may offer over TCP, but not over a Unix socket."""


USER: Final = "postgres"
NOBODY: Final = 4711
READY: Final = message("Z", b"I")
HTTP: Final = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
HELLO: Final = b"\x16\x03\x01\x00\xc4\x01\x00\x00\xc0\x03\x03" + bytes(range(189))
START: Final = startup(user=USER, database=USER)
CANCEL: Final = cancel_request(NOBODY, b"key!")
STUFFED: Final = b"received unencrypted data after"
UNSUPPORTED: Final = b"unsupported frontend protocol"
LAYOUT: Final = b"invalid startup packet layout: expected terminator as last byte"
SHUT: Final = Shut()
NO: Final = Wait(b"N")


def _packet(body: bytes) -> bytes:
    return struct.pack("!I", 4 + len(body)) + body


def _version(major: int, minor: int, body: bytes = b"user\0postgres\0\0") -> bytes:
    return _packet(struct.pack("!HH", major, minor) + body)


def _start(**parameters: str) -> bytes:
    return startup((3, 0), **parameters)


def _longest() -> bytes:
    """A packet of the greatest length that there is; longer than what PostgreSQL reads at once."""
    packet = _start(user=USER, application_name="x", options="")
    return _start(user=USER, application_name="x", options=" " * (10_004 - len(packet)))


def _encryption(name: str, request: bytes, *, gss: bool) -> tuple[Knock, ...]:
    """What comes with and behind a request for encryption that is declined."""
    refused = UNSUPPORTED + b" 1234.56"
    return (
        Knock(name, (request, NO), "none", b"N", gss=gss),
        Knock(f"{name} byte by byte", (*(bytes([byte]) for byte in request), NO), "none", b"N", gss=gss),
        Knock(f"{name}, and the end", (request, SHUT), "fin", b"N", gss=gss),
        Knock(f"{name}, and the end after the answer", (request, NO, SHUT), "fin", b"N", gss=gss),
        Knock(f"{name}, then a start", (request, NO, START), "none", READY, gss=gss),
        Knock(f"{name}, then itself", (request, NO, request), "fin", refused, gss=gss),
        Knock(f"{name}, then itself and a start", (request, NO, request + START), "fin", refused, gss=gss),
        Knock(f"{name}, then HTTP", (request, NO, HTTP), "fin", b"N", gss=gss),
        Knock(f"{name}, then a TLS hello", (request, NO, HELLO), "fin", b"N", gss=gss),
        Knock(f"{name}, then a TLS hello's first byte", (request, NO, HELLO[:1]), "none", b"N", gss=gss),
        Knock(f"{name}, then part of a length", (request, NO, b"\0\0", SHUT), "fin", b"N", gss=gss),
        Knock(f"{name}, then Terminate", (request, NO, TERMINATE), "fin", b"N", gss=gss),
        Knock(f"{name}, then a CancelRequest", (request, NO, CANCEL), "fin", b"N", gss=gss),
        Knock(f"{name}, then protocol 2", (request, NO, _version(2, 0)), "fin", UNSUPPORTED, gss=gss),
        Knock(f"{name} with a byte behind it", (request + b"x",), "fin", STUFFED, gss=gss),
        Knock(f"{name} with a start behind it", (request + START,), "fin", STUFFED, gss=gss),
        Knock(f"{name} with itself behind it", (request + request,), "fin", STUFFED, gss=gss),
        Knock(f"{name} with a TLS hello behind it", (request + HELLO,), "fin", STUFFED, gss=gss),
        Knock(f"{name} with a full buffer", (request + b"x" * 8184,), "fin", STUFFED, gss=gss),
        Knock(f"{name} that is longer", (_packet(request[4:] + bytes(100)), NO), "none", b"N", gss=gss),
    )


def _both(name: str, first: bytes, second: bytes) -> tuple[Knock, ...]:
    """One request for encryption after the other."""
    refused = UNSUPPORTED + b" 1234.56"
    both = (first, NO, second, Wait(b"NN"))
    return (
        Knock(name, both, "none", b"NN", gss=True),
        Knock(f"{name}, then a start", (*both, START), "none", READY, gss=True),
        Knock(f"{name}, then the first", (*both, first), "fin", refused, gss=True),
        Knock(f"{name}, then the second", (*both, second), "fin", refused, gss=True),
        Knock(f"{name} with a start behind it", (first, NO, second + START), "fin", STUFFED, gss=True),
        Knock(f"{name} at once", (first + second,), "fin", STUFFED, gss=True),
    )


KNOCKS: Final = (
    # Nothing, or too little.
    Knock("nothing", (), "none"),
    Knock("nothing, and the end", (SHUT,), "fin"),
    *(Knock(f"{size} bytes of a length", (bytes(size),), "none") for size in (1, 3)),
    *(Knock(f"{size} bytes of a length, and the end", (bytes(size), SHUT), "fin") for size in (1, 3)),
    Knock("a length alone", (START[:4],), "none"),
    Knock("a length alone, and the end", (START[:4], SHUT), "fin"),
    Knock("all but one byte", (START[:-1],), "none"),
    Knock("all but one byte, and the end", (START[:-1], SHUT), "fin"),
    # The length word.
    *(
        Knock(f"a length of {length:#x}", (struct.pack("!I", length),), "fin")
        for length in (0, 3, 4, 7, 10_005, 20_000, 0x7FFFFFFF, 0x80000000, 0x80000003, 0x80000004, 0xFFFFFFFF)
    ),
    Knock("a length of 8", (struct.pack("!I", 8),), "none"),
    Knock("a length of 10004", (struct.pack("!I", 10_004),), "none"),
    Knock("the longest packet", (_longest(),), "none", READY),
    # What isn't the protocol's.
    Knock("HTTP", (HTTP,), "fin"),
    Knock("a long HTTP request", (HTTP[:-2] + b"Cookie: " + b"x" * 20_000 + b"\r\n\r\n",), "reset"),
    Knock("HTTP/2", (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",), "fin"),
    Knock("SSH", (b"SSH-2.0-OpenSSH_9.2\r\n",), "fin"),
    Knock("Redis", (b"*1\r\n$4\r\nPING\r\n",), "fin"),
    Knock("SMB", (b"\0\0\0\x14\xffSMBr" + bytes(11),), "fin", b"unsupported frontend protocol 65363.19778"),
    Knock("an end of line", (b"\r\n\r\n",), "fin"),
    Knock("a character", (b"x",), "none"),
    Knock("zeros", (bytes(100),), "fin"),
    Knock("8192 bytes of nothing", (b"x" * 8192,), "fin"),
    Knock("8193 bytes of nothing", (b"x" * 8193,), "reset"),
    # TLS at once. Servers before 17 take its first four bytes for a length; those since then look at the first alone.
    Knock("a TLS hello", (HELLO,), "fin"),
    Knock("a TLS hello, and the end", (HELLO, SHUT), "fin"),
    Knock("a TLS hello's first byte", (HELLO[:1],), "fin", since=17),
    # Messages that come later.
    Knock("Terminate", (TERMINATE,), "fin"),
    Knock("Terminate, and the end", (TERMINATE, SHUT), "fin"),
    Knock("Query", (query("select 1"),), "fin"),
    Knock("PasswordMessage", (message("p", b"secret\0"),), "fin"),
    # Encryption.
    *_encryption("SSLRequest", SSL_REQUEST, gss=False),
    *_encryption("GSSENCRequest", GSSENC_REQUEST, gss=True),
    *_both("SSLRequest, then GSSENCRequest", SSL_REQUEST, GSSENC_REQUEST),
    *_both("GSSENCRequest, then SSLRequest", GSSENC_REQUEST, SSL_REQUEST),
    # CancelRequests: for backends that there aren't.
    Knock("CancelRequest", (CANCEL,), "fin"),
    Knock("CancelRequest, and the end", (CANCEL, SHUT), "fin"),
    Knock("CancelRequest for nobody", (cancel_request(0, b"key!"),), "fin"),
    *(
        Knock(f"CancelRequest with a key of {size} bytes", (cancel_request(NOBODY, bytes(size)),), "fin")
        for size in (0, 3, 5, 32, 256, 257, 9000)
    ),
    Knock("CancelRequest without a process", (_packet(CANCEL[4:8]),), "fin"),
    Knock("CancelRequest with bytes behind it", (CANCEL + b"x" * 100,), "fin"),
    Knock("CancelRequest with many bytes behind it", (CANCEL + b"x" * 20_000,), "reset"),
    Knock("CancelRequest that isn't whole", (CANCEL[:-1],), "none"),
    Knock("CancelRequest that isn't whole, and the end", (CANCEL[:-1], SHUT), "fin"),
    # Versions.
    *(Knock(f"protocol 3.{minor}", (_version(3, minor),), "none", READY) for minor in (0, 1, 2, 3, 9999, 65535)),
    *(
        Knock(f"protocol {major}.{minor}", (_version(major, minor),), "fin", UNSUPPORTED)
        for major, minor in ((0, 0), (1, 0), (2, 0), (2, 65535), (4, 0), (1234, 0), (1234, 5681), (65535, 65535))
    ),
    Knock("protocol 2 as it was", (_packet(struct.pack("!HH", 2, 0) + bytes(288)),), "fin", UNSUPPORTED),
    # Parameters.
    Knock("a start", (START,), "none", READY),
    Knock("a start byte by byte", tuple(bytes([byte]) for byte in START), "none", READY),
    Knock("a start, and Terminate behind it", (START + TERMINATE,), "fin", READY),
    Knock("a start, a query and Terminate", (START + query("select 1") + TERMINATE,), "fin", b"SELECT 1"),
    Knock("a start, and the end", (START, SHUT), "fin", READY),
    Knock("a start, a query, and the end", (START + query("select 1"), SHUT), "fin", b"SELECT 1"),
    Knock("a start, then HTTP", (START, Wait(READY), HTTP), "fin", READY),
    Knock("no database", (_start(user=USER),), "none", READY),
    Knock("an empty database", (_start(user=USER, database=""),), "none", READY),
    Knock("another database", (_start(user=USER, database="nowhere"),), "fin", b'"nowhere" does not exist'),
    Knock("another user", (_start(user="nobody"),), "fin", b'role "nobody" does not exist'),
    Knock("another user, and a query", (_start(user="nobody") + query("select 1"),), "fin", b"does not exist"),
    Knock("a long name", (_start(user="x" * 100),), "fin", b"does not exist"),
    Knock("no user", (_start(database=USER),), "fin", b"no PostgreSQL user name specified"),
    Knock("an empty user", (_start(user="", database=USER),), "fin", b"no PostgreSQL user name specified"),
    Knock("no parameters", (_version(3, 0, b"\0"),), "fin", b"no PostgreSQL user name specified"),
    Knock("a version alone", (_version(3, 0, b""),), "fin", LAYOUT),
    Knock("no terminator", (_version(3, 0, b"user\0postgres\0"),), "fin", LAYOUT),
    Knock("no value", (_version(3, 0, b"user\0"),), "fin", LAYOUT),
    Knock("a last name without an end", (_version(3, 0, b"user\0postgres\0database"),), "fin", LAYOUT),
    Knock("bytes behind the terminator", (_version(3, 0, b"user\0postgres\0\0database\0x\0\0"),), "fin", LAYOUT),
    Knock("a user twice", (_version(3, 0, b"user\0nobody\0user\0postgres\0\0"),), "none", READY),
    Knock("a user that isn't UTF-8", (_version(3, 0, b"user\0\xff\xfe\0\0"),), "fin", b"does not exist"),
    Knock("replication=bad", (_start(user=USER, replication="bad"),), "fin", b'invalid value for parameter "repl'),
    *(
        Knock(f"replication={value}", (_start(user=USER, replication=value),), "none", READY)
        for value in ("false", "true", "database")
    ),
    Knock("an unknown setting", (_start(user=USER, no_such_setting="1"),), "fin", b"unrecognized configuration"),
    Knock("a setting's wrong value", (_start(user=USER, geqo="perhaps"),), "fin", b"requires a Boolean value"),
    Knock("options", (_start(user=USER, options="-c geqo=off"),), "none", READY),
    Knock("unknown options", (_start(user=USER, options="--no-such-option"),), "fin", b"FATAL"),
    Knock("a protocol option", (_start(user=USER, **{"_pq_.nothing": "1"}),), "none", READY),
    Knock(
        "protocol options, and 3.9999", (_version(3, 9999, b"user\0postgres\0_pq_.a\0\0_pq_.b\0x\0\0"),), "none", READY
    ),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a client gets."""

    received: bytes
    """All bytes; of a BackendKeyData message, which is different each time, only where it stands."""
    end: End


def knock_at(address: Address, knock: Knock) -> Outcome:
    """Do what a row says, and wait for what has to come."""
    received = bytearray()
    with _connect(address) as sock:
        for step in knock.steps:
            match step:
                case bytes():
                    try:
                        sock.sendall(step)
                    except (BrokenPipeError, ConnectionResetError):  # it isn't told again in reading
                        return Outcome(_masked(received), "reset")
                    if len(step) == 1:
                        time.sleep(0.001)  # so that it travels alone
                case Shut():
                    sock.shutdown(socket.SHUT_WR)
                case Wait(until):
                    while not received.endswith(until):
                        received += _some(sock, f"{until!r} after {bytes(received)!r}")
        if knock.end == "none":
            while knock.says not in _masked(received):
                received += _some(sock, f"{knock.says!r} after {bytes(received)!r}")
            sock.settimeout(QUIET)
            try:
                more = sock.recv(65536)
            except TimeoutError:
                return Outcome(_masked(received), "none")
            return Outcome(_masked(received + more), "none" if more else "fin")
        try:
            while data := sock.recv(65536):
                received += data
        except ConnectionResetError:
            return Outcome(_masked(received), "reset")
        return Outcome(_masked(received), "fin")


def _connect(address: Address) -> socket.socket:
    if address.host.startswith("/"):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(SECONDS)
        sock.connect(f"{address.host}/.s.PGSQL.{address.port}")
        return sock
    sock = socket.create_connection((address.host, address.port), timeout=SECONDS)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _some(sock: socket.socket, what: str) -> bytes:
    data = sock.recv(65536)
    assert data, f"the connection ended, without {what}"
    return data


def _masked(received: bytes | bytearray) -> bytes:
    masked = bytearray(received)
    at = masked.find(b"K\0\0\0")
    if at >= 0:
        size = int.from_bytes(masked[at + 1 : at + 5], "big")
        masked[at + 5 : at + 1 + size] = b"*" * len(masked[at + 5 : at + 1 + size])
    return bytes(masked)
