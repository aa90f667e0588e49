"""The start-up phase with one client: from its first byte to a StartupMessage that the server is to get. No I/O.

A client can't tell it from PostgreSQL's own, ``ProcessStartupPacket()`` and its callers, of a server that offers no
encryption, or TLS alone:

- SSLRequest and GSSENCRequest are answered ``N``, one of each. Where TLS is offered, SSLRequest is answered ``S``. A
  handshake follows, with what has come behind the request: so bytes that aren't one can't be smuggled into what is
  encrypted (CVE-2021-23214), as in ``secure_open_server()`` of PostgreSQL 17. Neither request has a place after that.
- Where TLS is offered, a connection may also begin with the handshake, as in ``ProcessSSLStartup()`` of PostgreSQL 17.
  Then it has to be agreed in it (ALPN) that PostgreSQL's protocol follows; otherwise it is over. Requests for more
  encryption are answered ``N`` as before. (To a hello with other protocols alone, version 17 answers with an alert.
  Here none is agreed on then, as in all versions before, which does no harm behind SSLRequest.)
- A whole StartupMessage or CancelRequest goes to the server, which decides about it, whatever it says.
- What the server is to refuse in words is answered in its own: a request for encryption that comes again, or with bytes
  behind it that didn't wait for the answer. :func:`pgguard.proxy.upstream.ask` has it say so.
- Whatever can't be a start-up packet is read, as far as PostgreSQL reads it. Then the connection is closed without an
  answer, and the server hears nothing of it. PostgreSQL says so in its log alone.

What is not PostgreSQL's protocol at all is recorded for information; what is, but has no place here, as an error.
A client that closes, or says Terminate, before it has said who it is, has changed its mind: that is neither.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple

from pgguard.session.verdicts import Direction, Kind, MessageSeen, Party, Verdict
from pgguard.wire.fields import build_error_response
from pgguard.wire.messages import FRONTEND, HEADER_SIZE, by_code, parse_header
from pgguard.wire.startup import (
    DECLINED,
    PROTOCOL,
    TLS_HANDSHAKE,
    InvalidStartupPacket,
    PacketKind,
    StartupPacket,
    parse_startup,
)
from pgguard.wire.strangers import recognize

if TYPE_CHECKING:
    from pgguard.identity import Sender

_TERMINATE: Final = "X"
_FIRST: Final = (1 << 24) - 1
"""What can be the length of a message that somebody begins with; text would make a larger one."""
_MESSAGES: Final = by_code(FRONTEND)
_NO_TLS: Final = "but this port offers no TLS"
_NO_DIRECT_TLS: Final = f"{_NO_TLS}: connect with sslmode=disable or prefer, and without sslnegotiation=direct"
_NO_ALPN: Final = (
    "but not with PostgreSQL's: its clients say so in the hello (ALPN) with sslnegotiation=direct, or send SSLRequest "
    "first"
)
_HAS_TLS: Final = "although it has TLS"
_AGAIN: Final = "a second time"
_ALPN: Final = bytes([len(PROTOCOL)]) + PROTOCOL.encode()
"""As PostgreSQL's clients name their protocol in a TLS hello: "SSL Session Encryption" in the protocol chapter."""


class Step(Enum):
    """What comes next in a conversation that isn't over."""

    LISTEN = "the client has more to say"
    DECLINE = "it is answered that there is no encryption, and has more to say then"


class Encryption(NamedTuple):
    """The client goes on with a TLS handshake, and what it says next is what comes out of that."""

    request: StartupPacket | None
    """The SSLRequest, which is to be answered that there is TLS; ``None``: it has begun with the handshake."""
    begun: bytes
    """What has been heard of the handshake."""
    sender: Sender | None
    """Who has asked for it, if the kernel said so."""

    @property
    def failed(self) -> Dismissal:
        """What comes of it if that is no handshake, or one that fails."""
        if self.request is None or not self.begun:
            return Dismissal()
        return Dismissal(_out_of_place(self.request, _behind(len(self.begun)), self.sender))

    @property
    def without_protocol(self) -> Dismissal:
        """What comes of it if it isn't agreed that PostgreSQL's protocol follows, and nothing has said so before."""
        return Dismissal(_stranger(self.begun, instead=_NO_ALPN))


class Greeting(NamedTuple):
    """What a client has asked for, and who it was if the kernel said so."""

    packet: StartupPacket
    """A StartupMessage or a CancelRequest, which the server is to get; or a request for encryption, which it is to
    refuse, after ``before`` and with ``behind``."""
    sender: Sender | None
    before: tuple[bytes, ...] = ()
    """The requests for encryption that have been declined, in order."""
    behind: bytes = b""
    """What came behind the packet without waiting for the answer."""
    again: bool = False
    """Encryption of this kind has been declined before."""
    verdict: Verdict | None = None
    """What is to be recorded of it, if anything is."""


class Dismissal(NamedTuple):
    """The client gets no answer."""

    verdict: Verdict | None = None
    """What is to be recorded of it, if anything is."""
    insists_on: PacketKind | None = None
    """The encryption that it has asked for, if it left when it had read that there is none."""


class Conversation:
    """What has been said by one client so far.

    It is fed what has been read, as much at a time as PostgreSQL takes from a socket at once
    (:data:`~pgguard.wire.startup.RECEIVE_BUFFER`).

    Args:
        offers_tls: the client can have TLS.
    """

    __slots__ = ("_data", "_declined", "_encryption", "_offers_tls", "_sender")

    def __init__(self, *, offers_tls: bool = False) -> None:
        self._data = b""
        """What is still to be understood."""
        self._declined: dict[PacketKind, bytes] = {}
        self._offers_tls = offers_tls
        self._encryption: Encryption | None = None
        """How the client has come to have TLS."""
        self._sender: Sender | None = None

    @property
    def declined(self) -> int:
        """How many requests for encryption have been declined."""
        return len(self._declined)

    @property
    def is_encrypted(self) -> bool:
        """Whether the client has TLS, or is about to."""
        return self._encryption is not None

    @property
    def is_halfway(self) -> bool:
        """Whether it has begun a packet, and not ended it."""
        return bool(self._data)

    def hear(self, chunk: bytes, sender: Sender | None) -> Greeting | Dismissal | Encryption | Step:
        """Take in what a client has said, ``chunk``, and who has, if that is known: what comes of it."""
        self._sender = sender = sender or self._sender
        data = self._data = self._data + chunk if self._data else chunk
        if data[0] == TLS_HANDSHAKE and self._offers_tls and not self._declined and self._encryption is None:
            return self._encrypted(None, data)
        try:
            packet = parse_startup(data)
        except InvalidStartupPacket:
            return self._dismissal()
        if packet is None:
            # To TLS, servers before PostgreSQL 17 listen for three bytes more.
            return self._dismissal() if data[0] == TLS_HANDSHAKE and not self._declined else Step.LISTEN
        before = tuple(self._declined.values())
        behind = data[len(packet.packet) :]
        if packet.kind is PacketKind.STARTUP_MESSAGE:
            verdict = None if packet.is_postgres else _stranger(data)
            return Greeting(packet, sender, before, behind, verdict=verdict)
        if packet.kind is PacketKind.CANCEL_REQUEST:
            return Greeting(packet, sender, before)
        has_tls = self._encryption is not None and self._encryption.request is not None
        again = has_tls or packet.kind in self._declined
        if packet.kind is PacketKind.SSL_REQUEST and self._offers_tls and self._encryption is None and not again:
            return self._encrypted(packet, behind)
        if behind or again:
            what = _HAS_TLS if has_tls else _AGAIN if again else _behind(len(behind))
            return Greeting(packet, sender, before, behind, again, _out_of_place(packet, what, sender))
        self._declined[packet.kind] = packet.packet
        self._data = b""
        return Step.DECLINE

    def _encrypted(self, request: StartupPacket | None, begun: bytes) -> Encryption:
        self._data = b""
        self._encryption = Encryption(request, begun, self._sender)
        return self._encryption

    def _dismissal(self) -> Dismissal:
        went_on = self.is_encrypted or bool(self._declined)
        instead = _HAS_TLS if self.is_encrypted and self._data[0] == TLS_HANDSHAKE else ""
        return Dismissal(_no_startup_packet(self._data, self._sender, went_on=went_on, instead=instead))

    def end(self, *, has_read_all: bool) -> Dismissal:
        """The client has closed; whether it had read then what it had been sent."""
        insists = has_read_all and self._declined and not self._data and self._encryption is None
        return Dismissal(insists_on=next(reversed(self._declined)) if insists else None)


def refusal(greeting: Greeting) -> bytes:
    """What PostgreSQL says to a request for encryption out of place, in place of a server that would offer some."""
    kind = greeting.packet.kind
    if not greeting.again:
        what = "SSL request" if kind is PacketKind.SSL_REQUEST else "GSSAPI encryption request"
        return DECLINED + build_error_response(
            f"received unencrypted data after {what}",
            sqlstate="08P01",
            detail="This could be either a client-software bug or evidence of an attempted man-in-the-middle attack.",
        )
    major, minor = greeting.packet.version
    return build_error_response(
        f"unsupported frontend protocol {major}.{minor}: server supports 3.0 to 3.2", sqlstate="0A000"
    )


# What is said of it


def _no_startup_packet(data: bytes, sender: Sender | None, *, went_on: bool, instead: str) -> Verdict | None:
    message = _message(data)
    if message is None:
        return _stranger(data, went_on=went_on, instead=instead)
    if message.type == _TERMINATE:
        return None
    return Verdict(
        kind=Kind.PROTOCOL_VIOLATION,
        reason=f"the client sent {message.name} as its first message, instead of a startup packet",
        message=message,
        requests=(),
        intruder=sender,
        ends=True,
    )


def _message(data: bytes) -> MessageSeen | None:
    """The message of a later phase that the bytes begin with, if they do."""
    if len(data) < HEADER_SIZE:
        return None
    code, length = parse_header(bytes(data[:HEADER_SIZE]), 0)
    message = _MESSAGES[code]
    if not message.least <= length <= min(message.most, _FIRST):
        return None
    return MessageSeen(Direction.FRONTEND, chr(code), message.name, 1 + length)


def _stranger(data: bytes, *, went_on: bool = False, instead: str = "") -> Verdict:
    what = recognize(data)
    began = "went on" if went_on else "began"
    if not instead:
        instead = "not with PostgreSQL's startup packet"
        if data[0] == TLS_HANDSHAKE:
            instead = _NO_DIRECT_TLS if _ALPN in data else _NO_TLS
            if went_on:
                instead = "although it had been told that there is no TLS"
    return Verdict(
        kind=Kind.PROTOCOL_VIOLATION,
        reason=f"the connection {began} with {what}, {instead}",
        message=None,
        requests=(),
        by=Party.STRANGER,
        ends=True,
    )


def _behind(size: int) -> str:
    return f"and {size} bytes more without waiting for the answer"


def _out_of_place(packet: StartupPacket, what: str, sender: Sender | None) -> Verdict:
    name = packet.kind.value
    return Verdict(
        kind=Kind.PROTOCOL_VIOLATION,
        reason=f"the client sent {name} {what}",
        message=MessageSeen(Direction.FRONTEND, None, name, len(packet.packet)),
        requests=(),
        intruder=sender,
        ends=True,
    )
