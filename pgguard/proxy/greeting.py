"""The start-up phase with one client: from accept to a StartupMessage that the server is to get.

A client can't tell it from PostgreSQL's own, ``ProcessStartupPacket()`` and its callers, of a server that offers no
encryption:

- SSLRequest and GSSENCRequest are answered ``N``, one of each.
- A whole StartupMessage or CancelRequest goes to the server, which decides about it, whatever it says.
- What the server is to refuse in words is answered in its own: a request for encryption that comes again, or with bytes
  behind it that didn't wait for the answer. :mod:`pgguard.proxy.guard` asks it.
- Whatever can't be a start-up packet is read, as far as PostgreSQL reads it. Then the connection is closed without an
  answer, and the server hears nothing of it. PostgreSQL says so in its log alone.

What is not PostgreSQL's protocol at all is recorded for information; what is, but has no place here, as an error.
A client that closes, or says Terminate, before it has said who it is, has changed its mind: that is neither.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import socket
import sys
import termios
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

import trio

from pgguard.attribution.senders import CREDENTIALS_SPACE, sender_pid
from pgguard.identity import Sender
from pgguard.proxy.losses import Loss, note
from pgguard.proxy.upstream import DECLINED
from pgguard.session.verdicts import Direction, Kind, MessageSeen, Party, Verdict
from pgguard.wire.fields import build_error_response
from pgguard.wire.messages import FRONTEND, HEADER_SIZE, by_code, parse_header
from pgguard.wire.startup import (
    RECEIVE_BUFFER,
    TLS_HANDSHAKE,
    InvalidStartupPacket,
    PacketKind,
    StartupPacket,
    parse_startup,
    startup_bytes_missing,
)
from pgguard.wire.strangers import recognize

if TYPE_CHECKING:
    from collections.abc import Callable

    from pgguard.proxy.kernel_senders import KernelSenders
    from pgguard.proxy.session import ProxiedSession

_FAREWELL: Final = 2.0
"""Seconds for a client that is refused to read why."""
_TERMINATE: Final = "X"
_FIRST: Final = (1 << 24) - 1
"""What can be the length of a message that somebody begins with; text would make a larger one."""
_MESSAGES: Final = by_code(FRONTEND)
_NO_TLS: Final = "but this port offers no TLS"
_NO_DIRECT_TLS: Final = f"{_NO_TLS}: connect with sslmode=disable or prefer, and without sslnegotiation=direct"
_ALPN: Final = b"\x0apostgresql"
"""As PostgreSQL's clients name their protocol in a TLS hello: "SSL Session Encryption" in the protocol chapter."""

T = TypeVar("T")

logger = logging.getLogger(__name__)


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


class Dismissed(Exception):
    """The client gets no answer.

    Args:
        verdict: what is to be recorded of it, if anything is.
        insists_on: the encryption that it has asked for, if it left when it had read that there is none.
    """

    def __init__(self, verdict: Verdict | None = None, *, insists_on: PacketKind | None = None) -> None:
        super().__init__()
        self.insists_on = insists_on
        self.verdict = verdict


async def greet(
    sock: trio.socket.SocketType, session: ProxiedSession, *, senders: KernelSenders | None = None
) -> Greeting:
    """Talk to a client until it has said what it wants.

    Args:
        sock: the accepted socket.
        session: the session that it is to become.
        senders: who sends on TCP.

    Raises:
        Dismissed: it has gone, or what it sent is no start-up packet.
    """
    data = bytearray()
    sender: Sender | None = None
    declined: dict[PacketKind, bytes] = {}
    while True:
        try:
            packet = parse_startup(data)
        except InvalidStartupPacket:
            data += _already_there(sock, RECEIVE_BUFFER - len(data))
            raise Dismissed(_no_startup_packet(data, sender, declined)) from None
        if packet is None:
            missing = startup_bytes_missing(data)
            chunk, credentials = await _receive(sock, missing, has_credentials=session.has_credentials)
            if chunk:
                sender = _sender(session, chunk, credentials, senders) or sender
            if not chunk:
                if data:
                    logger.info("session %d: the client left after an incomplete startup packet", session.id)
                    raise Dismissed
                turned_down = chunk is not None and declined and as_plain(sock, _has_read_all)
                raise Dismissed(insists_on=next(reversed(declined)) if turned_down else None)
            data += chunk
            if data[0] == TLS_HANDSHAKE and not declined:
                # Servers before PostgreSQL 17 wait for three bytes more.
                data += _already_there(sock, RECEIVE_BUFFER - len(data))
                raise Dismissed(_no_startup_packet(data, sender, declined))
            continue
        before = tuple(declined.values())
        if packet.kind is PacketKind.STARTUP_MESSAGE:
            return Greeting(packet, sender, before, verdict=None if packet.is_postgres else _stranger(data))
        behind = _already_there(sock, RECEIVE_BUFFER - len(data))
        if packet.kind is PacketKind.CANCEL_REQUEST:
            return Greeting(packet, sender, before)
        again = packet.kind in declined
        if behind or again:
            verdict = _out_of_place(packet, None if again else len(behind), sender)
            return Greeting(packet, sender, before, behind, again, verdict)
        declined[packet.kind] = packet.packet
        try:
            await trio.SocketStream(sock).send_all(DECLINED)
        except trio.BrokenResourceError:
            raise Dismissed from None
        data.clear()


def _sender(
    session: ProxiedSession, chunk: bytes, credentials: bytes | None, senders: KernelSenders | None
) -> Sender | None:
    """Who has sent a chunk that has just been read, if the kernel says so."""
    account = session.kernel_account
    try:
        if credentials is not None:
            pid = sender_pid(credentials)
            return None if pid is None else Sender(pid)
        if senders is not None and account is not None and not account.is_lost:
            return senders.pieces(account, len(chunk))[-1][1]
    except Exception:
        note(Loss.SENDER, session)
        if account is not None:
            account.is_lost = True
    return None


async def _receive(
    sock: trio.socket.SocketType, size: int, *, has_credentials: bool
) -> tuple[bytes | None, bytes | None]:
    """What comes next, and whose it is; no bytes: the client has closed, ``None``: it is gone, or didn't read all."""
    try:
        if not has_credentials:
            return await sock.recv(size), None
        chunk, ancillary, _, _ = await sock.recvmsg(size, CREDENTIALS_SPACE)
    except OSError as error:
        if error.errno in (errno.ECONNRESET, errno.ETIMEDOUT):
            return None, None
        raise
    return chunk, ancillary[0][2] if ancillary else None


def _has_read_all(sock: socket.socket) -> bool:
    """Whether a client that has closed its side had read all that was sent to it.

    If it closes with something unread, the kernel resets the connection: that isn't seen here. What hadn't come yet
    when it closed isn't acknowledged: SIOCOUTQ in tcp(7). On a Unix socket there is no way in between.
    """
    if sock.family == socket.AF_UNIX:
        return True
    return not int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


def _already_there(sock: trio.socket.SocketType, size: int) -> bytes:
    """Read what has come already, and wait for nothing."""
    try:
        return as_plain(sock, lambda plain: plain.recv(size, socket.MSG_DONTWAIT)) if size > 0 else b""
    except OSError:
        return b""


def as_plain(sock: trio.socket.SocketType, function: Callable[[socket.socket], T]) -> T:
    """Do something with a socket that trio has and keeps."""
    plain = socket.socket(fileno=sock.fileno())
    try:
        return function(plain)
    finally:
        plain.detach()


async def send_last(sock: trio.socket.SocketType, response: bytes) -> None:
    """Send a client the last thing that it gets, and give it a moment to read it and to close."""
    with trio.move_on_after(_FAREWELL):
        try:
            stream = trio.SocketStream(sock)
            await stream.send_all(response)
            await stream.send_eof()
            while await stream.receive_some(65536):
                pass
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return


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


def _no_startup_packet(data: bytearray, sender: Sender | None, declined: dict[PacketKind, bytes]) -> Verdict | None:
    message = _message(data)
    if message is None:
        return _stranger(data, went_on=bool(declined))
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


def _message(data: bytearray) -> MessageSeen | None:
    """The message of a later phase that the bytes begin with, if they do."""
    if len(data) < HEADER_SIZE:
        return None
    code, length = parse_header(data, 0)
    message = _MESSAGES[code]
    if not message.least <= length <= min(message.most, _FIRST):
        return None
    return MessageSeen(Direction.FRONTEND, chr(code), message.name, 1 + length)


def _stranger(data: bytearray, *, went_on: bool = False) -> Verdict:
    what = recognize(data)
    began = "went on" if went_on else "began"
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


def _out_of_place(packet: StartupPacket, behind: int | None, sender: Sender | None) -> Verdict:
    name = packet.kind.value
    what = "a second time" if behind is None else f"and {behind} bytes more without waiting for the answer"
    return Verdict(
        kind=Kind.PROTOCOL_VIOLATION,
        reason=f"the client sent {name} {what}",
        message=MessageSeen(Direction.FRONTEND, None, name, len(packet.packet)),
        requests=(),
        intruder=sender,
        ends=True,
    )
