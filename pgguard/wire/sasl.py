"""SASL in a login: the mechanisms that the server offers, and what the client's first message says of its channel.

Sources: "SASL Authentication" (sasl-authentication) in the protocol chapter; AuthenticationSASL and SASLInitialResponse
in "Message Formats"; RFC 5802, section 7, for the first byte of a SCRAM message, ``gs2-cbind-flag``.
"""

from __future__ import annotations

from enum import Enum
from struct import Struct
from typing import Final

from pgguard.wire.messages import HEADER_SIZE

AUTHENTICATION: Final = ord("R")
"""The type of AuthenticationSASL, and of all else that the server says of authentication."""
SASL: Final = 10
"""What AuthenticationSASL begins with, an Int32."""
SASL_HEAD: Final = HEADER_SIZE + 4
"""Bytes of it before the mechanisms."""
BINDING: Final = b"SCRAM-SHA-256-PLUS"
"""The mechanism that binds a login to its TLS channel, by the certificate that the client has been shown."""

_INT32: Final = Struct("!I")


class Channel(Enum):
    """What a client says of its TLS channel as it begins SCRAM."""

    UNBOUND = "n"
    """It doesn't bind it."""
    UNOFFERED = "y"
    """It would, but takes the server for one that can't."""
    BOUND = "p"
    """It binds it."""


def authentication_code(message: bytes) -> int:
    """What an Authentication message is about, of which so much is there (:data:`SASL_HEAD`)."""
    return int(_INT32.unpack_from(message, HEADER_SIZE)[0])


def without_binding(message: bytes) -> bytes:
    """AuthenticationSASL without the mechanism that binds the channel; the same message, if no other one is in it."""
    mechanisms = message[SASL_HEAD:].split(b"\0")
    kept = [mechanism for mechanism in mechanisms if mechanism != BINDING]
    if len(kept) == len(mechanisms) or not any(kept):
        return message
    body = _INT32.pack(SASL) + b"\0".join(kept)
    return message[:1] + _INT32.pack(len(body) + 4) + body


def channel_of(message: bytes) -> Channel | None:
    """What SASLInitialResponse says of the channel; ``None``: it isn't SCRAM's.

    Args:
        message: From its type byte on; as much of it as says so is enough.
    """
    mechanism, _, rest = message[HEADER_SIZE:].partition(b"\0")
    if not mechanism.startswith(b"SCRAM-"):
        return None
    flag = rest[4:5].decode("latin-1")
    return Channel(flag) if flag in {one.value for one in Channel} else None
