"""The start-up phase with one client: from accept to a StartupMessage that the server is to get.

SSLRequest and GSSENCRequest are answered ``N``, one of each as PostgreSQL takes them; a CancelRequest is relayed; what
is no start-up packet is refused. Nothing is read beyond the StartupMessage, and no upstream connection is made before
it is whole, so that garbage costs the server nothing.
"""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from pgguard.attribution.senders import CREDENTIALS_SPACE, sender_pid
from pgguard.session.verdicts import Direction, Kind, MessageSeen, Sender, Verdict
from pgguard.wire.fields import build_error_response
from pgguard.wire.startup import (
    TLS_HANDSHAKE,
    InvalidStartupPacket,
    PacketKind,
    StartupPacket,
    parse_startup,
    startup_bytes_missing,
)

if TYPE_CHECKING:
    from pgguard.proxy.kernel_senders import KernelSenders
    from pgguard.proxy.session import ProxiedSession

_ENCRYPTION: Final = frozenset({PacketKind.SSL_REQUEST, PacketKind.GSSENC_REQUEST})
_FAREWELL: Final = 2.0
"""Seconds for a client that is refused to read why."""

logger = logging.getLogger(__name__)


class Greeting(NamedTuple):
    """What a client has asked for, a StartupMessage or a CancelRequest, and who it was if the kernel said so."""

    packet: StartupPacket
    sender: Sender | None


class Refused(Exception):
    """The client is to be told no.

    Args:
        response: the ErrorResponse.
        verdict: what is to be recorded of it, if anything is.
    """

    def __init__(self, response: bytes, verdict: Verdict | None = None) -> None:
        super().__init__()
        self.response = response
        self.verdict = verdict


async def greet(
    sock: trio.socket.SocketType, session: ProxiedSession, *, senders: KernelSenders | None = None
) -> Greeting | None:
    """Talk to a client until it has said what it wants.

    Args:
        sock: the accepted socket.
        session: the session that it is to become.
        senders: who sends on TCP.

    Returns:
        ``None`` if there is nobody to answer: it has gone, or speaks TLS to a port that doesn't, which PostgreSQL
        without TLS leaves unanswered as well.

    Raises:
        Refused: what it sent is no start-up packet, or not in this place.
    """
    data = bytearray()
    sender: Sender | None = None
    answered: set[PacketKind] = set()
    while True:
        try:
            packet = parse_startup(data)
        except InvalidStartupPacket as error:
            raise _no_startup_packet(str(error), data, sender) from error
        if packet is None:
            chunk, pid = await _receive(sock, startup_bytes_missing(data), has_credentials=session.has_credentials)
            if pid is not None:
                sender = Sender(pid)
            elif chunk and senders is not None and session.kernel_account is not None:
                sender = senders.pieces(session.kernel_account, len(chunk))[-1][1]
            if not chunk:
                if data:
                    logger.info("session %d: %s left an incomplete startup packet", session.id, session.client_name)
                return None
            data += chunk
            if data[0] == TLS_HANDSHAKE and not answered:
                logger.warning(
                    "session %d: the client speaks TLS at once, which pgguard doesn't offer: "
                    "connect with sslmode=disable or prefer, and without sslnegotiation=direct",
                    session.id,
                )
                return None
            continue
        if packet.kind not in _ENCRYPTION:
            return Greeting(packet, sender)
        if packet.kind in answered:
            raise Refused(_unsupported_version(packet))
        answered.add(packet.kind)
        await trio.SocketStream(sock).send_all(b"N")
        data.clear()


async def _receive(sock: trio.socket.SocketType, size: int, *, has_credentials: bool) -> tuple[bytes, int | None]:
    try:
        if not has_credentials:
            return await sock.recv(size), None
        chunk, ancillary, _, _ = await sock.recvmsg(size, CREDENTIALS_SPACE)
    except OSError as error:
        if error.errno in (errno.ECONNRESET, errno.ETIMEDOUT):
            return b"", None
        raise
    return chunk, sender_pid(ancillary[0][2]) if ancillary else None


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


def _no_startup_packet(text: str, data: bytearray, sender: Sender | None) -> Refused:
    """Refuse what PostgreSQL only logs: a client that speaks something else may show its user an answer."""
    response = build_error_response(
        f"pgguard: {text}",
        sqlstate="08P01",
        detail="The first bytes on this connection are no PostgreSQL startup packet.",
        hint="This port speaks PostgreSQL's frontend/backend protocol. Check what the client was told to connect to.",
    )
    verdict = Verdict(
        kind=Kind.PROTOCOL_VIOLATION,
        reason=f"{text}: the connection began with {bytes(data[:4]).hex(' ')}",
        message=MessageSeen(Direction.FRONTEND, None, "StartupMessage", len(data)),
        requests=(),
        intruder=sender,
    )
    return Refused(response, verdict)


def _unsupported_version(packet: StartupPacket) -> bytes:
    major, minor = packet.version
    return build_error_response(
        f"pgguard: unsupported frontend protocol {major}.{minor}: server supports 3.0 to 3.2",
        sqlstate="0A000",
        detail=f"{packet.kind.value} came a second time, where PostgreSQL takes its code for a protocol version.",
    )
