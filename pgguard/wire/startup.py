"""The untyped packets of the start-up phase.

Source: "Start-up" in "Message Flow" (protocol-flow) and ``ProcessStartupPacket()`` in ``backend_startup.c``.
"""

from __future__ import annotations

from enum import Enum
from functools import lru_cache
from struct import Struct
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_STARTUP_PACKET_LENGTH: Final = 10_000
"""Bytes behind the length word: ``libpq/pqcomm.h``."""

RECEIVE_BUFFER: Final = 8192
"""Bytes that PostgreSQL takes from a socket at once, ``PQ_RECV_BUFFER_SIZE`` in ``pqcomm.c``. What of them it doesn't
want is thrown away when it closes; if there are more, the kernel resets the connection."""

DECLINED: Final = b"N"
"""The answer to a request for encryption that there is none: SSLRequest and GSSENCRequest in "Message Flow"."""

ACCEPTED: Final = b"S"
"""The answer to SSLRequest that a TLS handshake may follow."""

TLS_HANDSHAKE: Final = 0x16
"""The first byte of a TLS ClientHello: TLS without SSLRequest, ``sslnegotiation=direct``."""

PROTOCOL: Final = "postgresql"
"""What follows TLS, as both sides agree in the handshake (ALPN): "SSL Session Encryption" in "Message Flow"."""

_CANCEL_REQUEST_CODE: Final = 80877102
_SSL_REQUEST_CODE: Final = 80877103
_GSSENC_REQUEST_CODE: Final = 80877104

_VERSIONS: Final = frozenset({*range(1, 10), _CANCEL_REQUEST_CODE >> 16})
"""Major versions: 1 and 2 were, 3 is, and what 1234 asks for aren't versions ("Message Formats")."""

_SHARED: Final = 512
"""Bytes of a packet at most whose parameters are shared with those of equal ones; what clients send has about 100."""

_HEAD: Final = Struct("!II")
_INT32: Final = Struct("!I")

SSL_REQUEST: Final = _HEAD.pack(_HEAD.size, _SSL_REQUEST_CODE)
"""An SSLRequest."""


class InvalidStartupPacket(ValueError):
    """The bytes are no start-up packet that PostgreSQL would take; the text is PostgreSQL's own."""


class PacketKind(Enum):
    """What a start-up packet asks for, by its name in the documentation."""

    STARTUP_MESSAGE = "StartupMessage"
    CANCEL_REQUEST = "CancelRequest"
    SSL_REQUEST = "SSLRequest"
    GSSENC_REQUEST = "GSSENCRequest"


_KINDS: Final = {
    _CANCEL_REQUEST_CODE: PacketKind.CANCEL_REQUEST,
    _SSL_REQUEST_CODE: PacketKind.SSL_REQUEST,
    _GSSENC_REQUEST_CODE: PacketKind.GSSENC_REQUEST,
}


class StartupPacket(NamedTuple):
    """A complete packet of the start-up phase."""

    kind: PacketKind
    packet: bytes
    """All of its bytes, to be passed on untouched."""
    code: int
    """The request code, or the protocol version as ``major << 16 | minor``."""

    @property
    def version(self) -> tuple[int, int]:
        """The protocol version, major and minor."""
        return self.code >> 16, self.code & 0xFFFF

    @property
    def encrypts(self) -> bool:
        """Whether it asks for encryption."""
        return self.kind in (PacketKind.SSL_REQUEST, PacketKind.GSSENC_REQUEST)

    @property
    def is_postgres(self) -> bool:
        """Whether it can be somebody's who speaks PostgreSQL's protocol, of whatever version or to come."""
        return self.version[0] in _VERSIONS

    @property
    def parameters(self) -> Mapping[str, str]:
        """The parameters of a StartupMessage, in order; what is malformed is left for the server to refuse."""
        # The sessions of a pool have the same: 600 bytes each.
        return (_shared_parameters if len(self.packet) <= _SHARED else _parameters)(self.packet)


def _parameters(packet: bytes) -> Mapping[str, str]:
    fields = packet[_HEAD.size :].split(b"\0")
    names, values = fields[::2], fields[1::2]
    return MappingProxyType(
        {
            name.decode("utf-8", "replace"): value.decode("utf-8", "replace")
            for name, value in zip(names, values, strict=False)
            if name
        }
    )


_shared_parameters = lru_cache(maxsize=512)(_parameters)


def parse_startup(data: bytes | bytearray) -> StartupPacket | None:
    """Take a start-up packet from the front of ``data``; ``None`` while it is incomplete.

    Raises:
        InvalidStartupPacket: the length word is not one that PostgreSQL would go on reading behind.
    """
    if len(data) < 4:
        return None
    length = int.from_bytes(data[:4], "big")
    if not _HEAD.size <= length <= _INT32.size + MAX_STARTUP_PACKET_LENGTH:
        raise InvalidStartupPacket("invalid length of startup packet")
    if len(data) < length:
        return None
    packet = bytes(data[:length])
    code = _HEAD.unpack_from(packet)[1]
    return StartupPacket(_KINDS.get(code, PacketKind.STARTUP_MESSAGE), packet, code)


class CancelKey(NamedTuple):
    """What a CancelRequest must quote: the content of BackendKeyData."""

    backend_pid: int
    secret: bytes
    """4 bytes; since protocol 3.2 up to 256."""

    @property
    def packet(self) -> bytes:
        """The CancelRequest packet for this key."""
        return b"".join(
            (
                _HEAD.pack(12 + len(self.secret), _CANCEL_REQUEST_CODE),
                _INT32.pack(self.backend_pid),
                self.secret,
            )
        )


def parse_backend_key_data(body: bytes | bytearray) -> CancelKey:
    """Read a BackendKeyData body, which must be whole."""
    return CancelKey(_INT32.unpack_from(body)[0], bytes(body[4:]))
