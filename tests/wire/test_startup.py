"""Start-up packets: each kind is told from the others, whole, and nothing oversized is waited for."""

from __future__ import annotations

import struct
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgguard.wire.startup import (
    MAX_STARTUP_PACKET_LENGTH,
    CancelKey,
    InvalidStartupPacket,
    PacketKind,
    parse_backend_key_data,
    parse_startup,
)


def packet(code: int, body: bytes = b"") -> bytes:
    return struct.pack("!II", 8 + len(body), code) + body


STARTUP = packet(3 << 16, b"user\0app\0database\0orders\0application_name\0puma\0\0")


@pytest.mark.parametrize(("data", "kind"), [
    (STARTUP, PacketKind.STARTUP_MESSAGE),
    (packet(80877103), PacketKind.SSL_REQUEST),
    (packet(80877104), PacketKind.GSSENC_REQUEST),
    (packet(80877102, b"\0\0\0\1abcd"), PacketKind.CANCEL_REQUEST),
    (packet(80877102, b"\0\0\0\1" + b"k" * 256), PacketKind.CANCEL_REQUEST),
    (packet(2 << 16, b"old"), PacketKind.STARTUP_MESSAGE),
])  # fmt: skip
def test_kinds(data: bytes, kind: PacketKind) -> None:
    parsed = parse_startup(data)
    assert parsed is not None
    assert (parsed.kind, parsed.packet) == (kind, data)


def test_parameters_and_version() -> None:
    parsed = parse_startup(bytearray(STARTUP))
    assert parsed is not None
    assert parsed.version == (3, 0)
    assert parsed.parameters == {"user": "app", "database": "orders", "application_name": "puma"}


def test_protocol_3_2() -> None:
    parsed = parse_startup(packet((3 << 16) | 2, b"user\0app\0\0"))
    assert parsed is not None
    assert parsed.version == (3, 2)


@pytest.mark.parametrize(
    ("body", "parameters"),
    [
        (b"", {}),
        (b"\0", {}),
        (b"user", {}),
        (b"user\0app", {"user": "app"}),
        (b"user\0a\xff\0options\0\0\0", {"user": "a\N{REPLACEMENT CHARACTER}", "options": ""}),
    ],
)
def test_malformed_parameters_are_left_to_the_server(body: bytes, parameters: dict[str, str]) -> None:
    parsed = parse_startup(packet(3 << 16, body))
    assert parsed is not None
    assert parsed.parameters == parameters


@pytest.mark.parametrize(("size", "shared"), [(100, True), (5000, False)])
def test_parameters_of_equal_packets_are_kept_once(size: int, shared: bool) -> None:
    """Those of all sessions of a pool; but nobody has many kilobytes kept that nobody else sends."""
    body = b"user\0a\0options\0" + b"x" * size + b"\0\0"
    first, second = parse_startup(packet(3 << 16, body)), parse_startup(packet(3 << 16, body))
    assert first is not None
    assert second is not None
    assert first.parameters == second.parameters
    assert (first.parameters is second.parameters) == shared
    with pytest.raises(TypeError):
        first.parameters["user"] = "b"  # type: ignore[index]


@pytest.mark.parametrize("size", range(len(STARTUP)))
def test_incomplete_packets_are_waited_for(size: int) -> None:
    assert parse_startup(STARTUP[:size]) is None


def test_what_stands_behind_is_left_alone() -> None:
    """SSLRequest, or a Query sent before the login is complete, may come in one read with the packet."""
    parsed = parse_startup(STARTUP + b"Q\0\0\0")
    assert parsed is not None
    assert parsed.packet == STARTUP


@pytest.mark.parametrize("length", [0, 7, 4 + MAX_STARTUP_PACKET_LENGTH + 1, 0xFFFFFFFF, 0x16030100, 0x47455420])
def test_lengths_that_postgresql_refuses(length: int) -> None:
    """Among them a TLS ClientHello and ``GET``: they are refused at the fourth byte, not waited for."""
    with pytest.raises(InvalidStartupPacket, match="invalid length of startup packet"):
        parse_startup(struct.pack("!I", length))


@pytest.mark.parametrize("length", [8, 4 + MAX_STARTUP_PACKET_LENGTH])
def test_lengths_that_postgresql_takes(length: int) -> None:
    assert parse_startup(struct.pack("!I", length)) is None


@given(st.binary(max_size=64))
def test_any_bytes_are_parsed_refused_or_waited_for(data: bytes) -> None:
    try:
        parsed = parse_startup(data)
    except InvalidStartupPacket:
        return
    if parsed is not None:
        assert data.startswith(parsed.packet)
        assert isinstance(parsed.parameters, Mapping)


@given(st.integers(0, 0xFFFFFFFF), st.binary(min_size=4, max_size=256))
def test_cancel_key_and_request(backend_pid: int, secret: bytes) -> None:
    """What the server gave out is what a CancelRequest quotes, at any length of the secret."""
    key = parse_backend_key_data(struct.pack("!I", backend_pid) + secret)
    assert key == CancelKey(backend_pid, secret)
    parsed = parse_startup(key.packet)
    assert parsed is not None
    assert parsed.kind is PacketKind.CANCEL_REQUEST
    assert parsed.packet[8:] == struct.pack("!I", backend_pid) + secret
