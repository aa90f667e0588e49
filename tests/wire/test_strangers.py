"""What comes to the wrong port is told by how it begins."""

from __future__ import annotations

import pytest

from pgguard.wire.strangers import recognize


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"GET / HTTP/1.1\r\n", "HTTP"),
        (b"OPTIONS * HTTP/1.1\r\n", "HTTP"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "HTTP/2"),
        (b"\x16\x03\x01\x00\xc4\x01", "a TLS hello"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "SSH"),
        (b"PROXY UNKNOWN\r\n", "the PROXY protocol"),
        (b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c", "the PROXY protocol"),
        (b"*1\r\n$4\r\nPING\r\n", "Redis"),
        (b"PING\r\n", "Redis"),
        (b"EHLO mail.example\r\n", "SMTP"),
        (b"\0\0\0\x85\xffSMBr", "SMB"),
        (b"\0\0\0\x85\xfeSMB@", "SMB"),
        (b"\x03\0\0\x13\x0e\xe0", "RDP"),
        (b"AMQP\0\0\x09\x01", "AMQP"),
        (b"\x10\x10\0\x04MQTT\x04", "MQTT"),
        (b"a secret that is long", "the bytes 61 20 73 65"),
        (b"\r\n\r\n", "the bytes 0d 0a 0d 0a"),
        (bytes(4), "the bytes 00 00 00 00"),
        (b"\x16", "the bytes 16"),
        (b"GETTING", "the bytes 47 45 54 54"),
    ],
)
def test_recognize(data: bytes, name: str) -> None:
    assert recognize(data) == recognize(bytearray(data)) == name
