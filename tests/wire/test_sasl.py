"""What is read of SASL in a login, and how AuthenticationSASL is edited."""

from __future__ import annotations

import struct

import pytest

from pgguard.wire.sasl import Channel, authentication_code, channel_of, without_binding


def message(type_: str, body: bytes) -> bytes:
    return type_.encode() + struct.pack("!I", 4 + len(body)) + body


def offer(*mechanisms: bytes) -> bytes:
    return message("R", struct.pack("!I", 10) + b"".join(one + b"\0" for one in mechanisms) + b"\0")


def response(mechanism: bytes, data: bytes | None) -> bytes:
    size = -1 if data is None else len(data)
    return message("p", mechanism + b"\0" + struct.pack("!i", size) + (data or b""))


@pytest.mark.parametrize(("offered", "left"), [
    ((b"SCRAM-SHA-256-PLUS", b"SCRAM-SHA-256"), (b"SCRAM-SHA-256",)),
    ((b"SCRAM-SHA-256", b"SCRAM-SHA-256-PLUS"), (b"SCRAM-SHA-256",)),
    ((b"SCRAM-SHA-256-PLUS", b"SCRAM-SHA-256", b"OAUTHBEARER"), (b"SCRAM-SHA-256", b"OAUTHBEARER")),
    ((b"SCRAM-SHA-256",), (b"SCRAM-SHA-256",)),
    ((b"OAUTHBEARER",), (b"OAUTHBEARER",)),
    ((b"SCRAM-SHA-256-PLUS",), (b"SCRAM-SHA-256-PLUS",)),
    ((), ()),
])  # fmt: skip
def test_the_mechanism_that_binds_is_taken_out_unless_it_is_the_only_one(
    offered: tuple[bytes, ...], left: tuple[bytes, ...]
) -> None:
    assert without_binding(offer(*offered)) == offer(*left)


def test_what_authentication_is_about() -> None:
    assert authentication_code(offer(b"SCRAM-SHA-256")) == 10
    assert authentication_code(message("R", bytes(4))) == 0


@pytest.mark.parametrize(("said", "channel"), [
    (response(b"SCRAM-SHA-256", b"n,,n=,r=nonce"), Channel.UNBOUND),
    (response(b"SCRAM-SHA-256", b"y,,n=,r=nonce"), Channel.UNOFFERED),
    (response(b"SCRAM-SHA-256-PLUS", b"p=tls-server-end-point,,n=,r=nonce"), Channel.BOUND),
    (response(b"SCRAM-SHA-256", b"y,,n=,r=nonce")[:24], Channel.UNOFFERED),
    (response(b"SCRAM-SHA-256", b"y,,n=,r=nonce")[:23], None),
    (response(b"SCRAM-SHA-256", b"x"), None),
    (response(b"SCRAM-SHA-256", None), None),
    (response(b"OAUTHBEARER", b"y,,"), None),
    (message("p", b"password\0"), None),
    (b"", None),
])  # fmt: skip
def test_what_a_client_says_of_its_channel(said: bytes, channel: Channel | None) -> None:
    assert channel_of(said) is channel
