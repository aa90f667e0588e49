"""Other protocols, told by how their clients begin: for what is said of whoever comes to the wrong port.

Nothing is decided by it. Sources: RFC 9110 and 9113 (HTTP), RFC 4253 (SSH), RFC 8446 (TLS), RFC 5321 (SMTP), the Redis
serialization protocol, HAProxy's PROXY protocol, [MS-SMB2], ITU-T T.123 (TPKT, in which RDP comes), AMQP 0-9-1, MQTT.
"""

from __future__ import annotations

import re
from typing import Final

_SHOWN: Final = 4
"""Bytes that are shown of what can't be told: as many as tell protocols apart, too few to give away a password."""

_SIGNS: Final = (
    ("HTTP/2", re.compile(rb"PRI \* HTTP/2")),
    ("HTTP", re.compile(rb"(?:GET|HEAD|POST|PUT|DELETE|OPTIONS|PATCH|CONNECT|TRACE) ")),
    ("a TLS hello", re.compile(rb"\x16\x03[\x00-\x04]")),
    ("SSH", re.compile(rb"SSH-")),
    ("the PROXY protocol", re.compile(rb"PROXY (?:TCP|UNKNOWN)|\r\n\r\n\x00\r\nQUIT\n")),
    ("Redis", re.compile(rb"\*\d+\r\n\$|(?:PING|INFO|AUTH .*)\r?\n")),
    ("SMTP", re.compile(rb"(?:EHLO|HELO) ", re.IGNORECASE)),
    ("SMB", re.compile(rb"\x00.{3}[\xfe\xff]SMB", re.DOTALL)),
    ("RDP", re.compile(rb"\x03\x00\x00")),
    ("AMQP", re.compile(rb"AMQP")),
    ("MQTT", re.compile(rb"\x10.{1,4}\x00\x04MQTT", re.DOTALL)),
)


def recognize(data: bytes | bytearray) -> str:
    """What somebody who doesn't speak PostgreSQL's protocol has begun with: a protocol's name, or the first bytes."""
    for name, sign in _SIGNS:
        if sign.match(data):
            return name
    return f"the bytes {bytes(data[:_SHOWN]).hex(' ')}"
