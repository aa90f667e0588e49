"""What a server may do to its clients other than serve them: a table, and a server that does what its rows say.

Each row is played directly and through a guard: the same bytes have to come, and the same end. Where a server ends a
connection without a word, between two messages, the guard says so in its place.
"""

from __future__ import annotations

import random
import socket
import struct
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Literal

from tests.integration.bare import SECONDS
from tests.proxy.messages import (
    COLUMNS,
    GSSENC_REQUEST,
    LOGGED_IN,
    ONE_ROW,
    READY,
    SELECTED,
    SSL_REQUEST,
    cancel_request,
    message,
    row,
)
from tests.servers import Address

_DOING = Literal["closes", "resets", "is silent"]


@dataclass(frozen=True, slots=True)
class Trouble:
    """One row: what a server says, and what it does then."""

    name: str
    says: bytes = b""
    """When it has been sent a StartupMessage; or a query, if it has let its client in."""
    then: _DOING = "closes"
    unread: bool = False
    """It doesn't read what it has been sent: as it ends, the kernel resets the connection."""
    lets_in: bool = False
    kind: str | None = None
    """The fault that is recorded of it, the server's."""
    kept: int = 0
    """So many bytes at the end don't make a header: the guard keeps them while more may come."""
    words: bool = False
    """The guard says in its place that it has ended the connection."""


def error(severity: str, sqlstate: str, text: str) -> bytes:
    fields = (b"S" + severity.encode(), b"V" + severity.encode(), b"C" + sqlstate.encode(), b"M" + text.encode())
    return message("E", b"".join(field + b"\0" for field in fields) + b"\0")


def _random(seed: int) -> bytes:
    return random.Random(seed).randbytes(300)


def _framed(kind: str, length: int, body: bytes = b"") -> bytes:
    return kind.encode() + struct.pack("!I", length) + body


_VIOLATION: Final = "protocol-violation"
_UNEXPECTED: Final = "unexpected-response"
_SASL: Final = message("R", struct.pack("!I", 10) + b"SCRAM-SHA-256\0\0")
_OLD: Final = b"EFATAL:  sorry, too many clients already\n\0"
_NO_FORK: Final = b"Ecould not fork new process for connection: Resource temporarily unavailable\n\0"
"""``report_fork_failure_to_client()`` in ``postmaster.c``: protocol 2's form, since no protocol has been agreed on."""
_HTTP: Final = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
_MYSQL: Final = b"J\0\0\0\n5.7.44\0\x08\0\0\0abcdefgh\0\xff\xf7\x08\x02\0\x7f\x80\x15\0\0\0\0\0\0\0\0\0\0ijklmnopqrst\0"

TROUBLES: Final = (
    # Before anybody has logged in.
    Trouble("ends without a word", words=True),
    Trouble("resets without a word", then="resets", words=True),
    Trouble("says nothing", then="is silent"),
    Trouble("asks for a password, and says no more", _SASL, "is silent"),
    Trouble("asks for a password, and ends", _SASL, words=True),
    Trouble("turns away: starting up", error("FATAL", "57P03", "the database system is starting up")),
    Trouble("turns away: shutting down", error("FATAL", "57P03", "the database system is shutting down")),
    Trouble("turns away: recovery", error("FATAL", "57P03", "the database system is in recovery mode")),
    Trouble("turns away: pg_hba", error("FATAL", "28000", "pg_hba.conf rejects connection for host")),
    Trouble(
        "turns away: no slots", error("FATAL", "53300", "sorry, too many clients already"), kind="connection-exhaustion"
    ),
    Trouble("turns away in a language", message("E", b"S\xd0\x92\xd0\x90\xd0\x96\xd0\x9d\xd0\x9e\0C57P03\0Mnyet\0\0")),
    Trouble("turns away, and stays", error("FATAL", "57P03", "the database system is starting up"), "is silent"),
    Trouble("turns away as protocol 2 does", _OLD),
    Trouble("turns away as protocol 2 does, unread", _OLD, unread=True),
    Trouble("turns away as protocol 2 does, and stays", _OLD, "is silent"),
    Trouble("can't fork", _NO_FORK),
    Trouble("can't fork, unread", _NO_FORK, unread=True),
    Trouble("can't fork, and resets", _NO_FORK, "resets"),
    Trouble("turns away in part", error("FATAL", "57P03", "x" * 300)[:200], kind=_VIOLATION),
    Trouble("begins to turn away", error("FATAL", "57P03", "x" * 300)[:20], kind=_VIOLATION),
    Trouble("negotiates", message("v", struct.pack("!II", 0, 0)) + LOGGED_IN, "is silent"),
    Trouble("negotiates for a version from the future", message("v", struct.pack("!II", 9999, 0)), "is silent"),
    Trouble("negotiates about less than nothing", message("v", struct.pack("!Ii", 0, -1)), "is silent"),
    Trouble("negotiates too briefly", message("v", b"\0\0"), "is silent", kind=_VIOLATION),
    Trouble("wants an authentication that nobody knows", message("R", struct.pack("!I", 4711)), "is silent"),
    Trouble("authenticates too briefly", message("R"), "is silent", kind=_VIOLATION),
    Trouble("authenticates at length", _framed("R", 0x7FFFFFFF, bytes(100)), kind=_VIOLATION),
    Trouble("speaks HTTP", _HTTP, kind=_VIOLATION),
    Trouble("speaks HTTP, and waits", _HTTP, "is silent", kind=_VIOLATION),
    Trouble("speaks SSH", b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n", unread=True, kind=_VIOLATION),
    Trouble("speaks SMTP", b"220 mail.example ESMTP Postfix\r\n", unread=True, kind=_VIOLATION),
    Trouble("speaks MySQL", _MYSQL, kind=_VIOLATION),
    Trouble("speaks TLS", b"\x15\x03\x03\0\x02\x02\x28", kind=_VIOLATION),
    *(Trouble(f"speaks nothing, {seed}", _random(seed), kind=_VIOLATION) for seed in range(4)),
    Trouble("answers before it lets in", COLUMNS, "is silent", kind=_UNEXPECTED),
    Trouble("lets in, and ends", LOGGED_IN, words=True),
    Trouble("lets in, and resets", LOGGED_IN, "resets", words=True),
    Trouble("lets in, and ends with a notice", LOGGED_IN + b"N" + error("WARNING", "57P02", "crash")[1:], words=True),
    Trouble("lets in, and says goodbye", LOGGED_IN + error("FATAL", "57P05", "idle-session timeout")),
    # In the middle of an answer.
    Trouble("does not answer", then="is silent", lets_in=True),
    Trouble("does not answer, and ends", lets_in=True, words=True),
    Trouble("does not answer, and resets", then="resets", lets_in=True, words=True),
    Trouble("falls silent between two messages", COLUMNS + ONE_ROW, "is silent", lets_in=True),
    Trouble("falls silent in a message", COLUMNS + ONE_ROW + row(bytes(500))[:100], "is silent", lets_in=True),
    Trouble("falls silent in a header", COLUMNS + ONE_ROW + b"D\0", "is silent", lets_in=True, kept=2),
    Trouble("ends between two messages", COLUMNS + ONE_ROW, lets_in=True, words=True),
    Trouble("ends in a message", COLUMNS + ONE_ROW + row(bytes(500))[:100], lets_in=True, kind=_VIOLATION),
    Trouble("ends in a header", COLUMNS + ONE_ROW + b"D\0", lets_in=True, kind=_VIOLATION),
    Trouble("goes with a word", COLUMNS + error("FATAL", "57P01", "administrator command"), lets_in=True),
    Trouble("goes with a word, and stays", COLUMNS + error("PANIC", "XX000", "corrupt"), "is silent", lets_in=True),
    Trouble(
        "fails, and goes with a word",
        error("ERROR", "57014", "cancelled") + error("FATAL", "57P01", "end"),
        lets_in=True,
    ),
    Trouble("answers, and ends", COLUMNS + ONE_ROW + SELECTED + READY, lets_in=True, words=True),
    Trouble("sends a row of no length", COLUMNS + _framed("D", 0), "is silent", lets_in=True, kind=_VIOLATION),
    Trouble("sends a row of less", COLUMNS + _framed("D", 3), "is silent", lets_in=True, kind=_VIOLATION),
    Trouble("sends a row of 2 GB", COLUMNS + _framed("D", 0x7FFFFFFF, bytes(5000)), "is silent", lets_in=True),
    Trouble("sends a row of 4 GB", COLUMNS + _framed("D", 0xFFFFFFFF, bytes(50)), lets_in=True, kind=_VIOLATION),
    Trouble("is long ready", COLUMNS + _framed("Z", 100, bytes(96)), "is silent", lets_in=True, kind=_VIOLATION),
    Trouble("is ready for nothing", COLUMNS + _framed("Z", 4), "is silent", lets_in=True, kind=_VIOLATION),
    Trouble("completes at length", COLUMNS + _framed("C", 0x01000000, bytes(50)), lets_in=True, kind=_VIOLATION),
    Trouble("says what nobody knows", COLUMNS + message("?", b"what"), "is silent", lets_in=True, kind=_VIOLATION),
    *(
        Trouble(f"goes mad, {seed}", COLUMNS + b"\xff" + _random(seed), lets_in=True, kind=_VIOLATION)
        for seed in range(2)
    ),
)


class TroubledServer:
    """Does to each client what the row says whose number its user is called by."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.address = Address("127.0.0.1", self._listener.getsockname()[1])
        self._kept: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in self._kept:
            sock.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.settimeout(SECONDS)
            self._kept.append(sock)
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with suppress(OSError):
            while (packet := _startup(sock)) in {SSL_REQUEST, GSSENC_REQUEST}:
                sock.recv(len(packet))
                sock.sendall(b"N")
            if is_mark(packet):
                sock.close()
                return
            fields = packet[8:].split(b"\0")
            trouble = TROUBLES[int(fields[fields.index(b"user") + 1])]
            if not trouble.unread:
                sock.recv(len(packet))
            if trouble.lets_in:
                sock.sendall(LOGGED_IN)
                sock.recv(65536)
            sock.sendall(trouble.says)
            if trouble.then == "resets":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if trouble.then == "is silent":
                sock.settimeout(None)
                while sock.recv(65536):  # until its client has gone
                    pass
            sock.close()


def is_mark(packet: bytes) -> bool:
    """Whether it is a CancelRequest, as which a guard finds out that it isn't in front of itself."""
    return packet[4:8] == cancel_request(0, b"")[4:8]


def accept(listener: socket.socket) -> socket.socket:
    """Accept the next client that wants to log in, without TLS; a guard's mark is ignored, as a server does."""
    listener.settimeout(SECONDS)
    while True:
        sock, _ = listener.accept()
        sock.settimeout(SECONDS)
        with suppress(ConnectionResetError):
            if _startup(sock) == SSL_REQUEST:
                sock.recv(len(SSL_REQUEST))
                sock.sendall(b"N")
            if not is_mark(_startup(sock)):
                return sock
        sock.close()


def _startup(sock: socket.socket) -> bytes:
    """A whole packet of the start-up phase, which stays unread."""
    while True:
        data = sock.recv(65536, socket.MSG_PEEK)
        if not data:
            raise ConnectionResetError
        if len(data) >= 4 and len(data) >= int.from_bytes(data[:4], "big"):
            return data
