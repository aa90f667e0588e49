"""What comes of what a client says first, without a socket: whatever pieces it comes in, and whoever sends it."""

from __future__ import annotations

import struct

import pytest

from pgguard.identity import Sender
from pgguard.proxy.greeting import Conversation, Dismissal, Encryption, Greeting, Step
from pgguard.wire.startup import PacketKind
from tests.proxy.messages import GSSENC_REQUEST, SSL_REQUEST, TERMINATE, cancel_request, message, query, startup

LISTEN, DECLINE = Step.LISTEN, Step.DECLINE
PID = Sender(7)
NO_DIRECT_TLS = "but this port offers no TLS: connect with sslmode=disable or prefer, and without sslnegotiation=direct"
TOLD = "although it had been told that there is no TLS"


def outcome(*said: bytes | None, tls: bool = False) -> list[str]:
    """What came of each chunk, in a word; ``None``: the client closes, and has read everything."""
    conversation = Conversation(offers_tls=tls)
    found = []
    for chunk in said:
        what = conversation.end(has_read_all=True) if chunk is None else conversation.hear(chunk, PID)
        if isinstance(what, Step):
            found.append(what.name)
        elif isinstance(what, Dismissal):
            reason = "" if what.verdict is None else f": {what.verdict.reason}"
            insists = "" if what.insists_on is None else f" insists on {what.insists_on.value}"
            found.append(f"dismissed{insists}{reason}")
        elif isinstance(what, Encryption):
            assert conversation.is_encrypted
            begun = f" + {len(what.begun)}" if what.begun else ""
            found.append(f"{'TLS' if what.request is None else what.request.kind.value}{begun}")
        else:
            reason = "" if what.verdict is None else f": {what.verdict.reason}"
            behind = f" + {len(what.behind)}" if what.behind else ""
            found.append(f"{what.packet.kind.value} after {len(what.before)}{behind}{reason}")
    return found


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ([startup()], ["StartupMessage after 0"]),
        ([startup()[:3], startup()[3:9], startup()[9:]], ["LISTEN", "LISTEN", "StartupMessage after 0"]),
        ([startup() + query("x")], [f"StartupMessage after 0 + {len(query('x'))}"]),
        ([SSL_REQUEST, startup()], ["DECLINE", "StartupMessage after 1"]),
        ([SSL_REQUEST[:4], SSL_REQUEST[4:], GSSENC_REQUEST, startup()],
         ["LISTEN", "DECLINE", "DECLINE", "StartupMessage after 2"]),
        ([SSL_REQUEST, SSL_REQUEST], ["DECLINE", "SSLRequest after 1: the client sent SSLRequest a second time"]),
        ([GSSENC_REQUEST, SSL_REQUEST, GSSENC_REQUEST],
         ["DECLINE", "DECLINE", "GSSENCRequest after 2: the client sent GSSENCRequest a second time"]),
        ([SSL_REQUEST + b"xyz"],
         ["SSLRequest after 0 + 3: the client sent SSLRequest and 3 bytes more without waiting for the answer"]),
        ([cancel_request(1, b"key!")], ["CancelRequest after 0"]),
        ([cancel_request(1, b"key!") + b"more"], ["CancelRequest after 0"]),
        ([SSL_REQUEST, cancel_request(1, b"key!")], ["DECLINE", "CancelRequest after 1"]),
        ([struct.pack("!IHH", 8, 2, 0)], ["StartupMessage after 0"]),
        ([b"\0\0\0\x14\xffSMBr" + bytes(11)],
         ["StartupMessage after 0: the connection began with SMB, not with PostgreSQL's startup packet"]),
        ([None], ["dismissed"]),
        ([startup()[:5], None], ["LISTEN", "dismissed"]),
        ([SSL_REQUEST, None], ["DECLINE", "dismissed insists on SSLRequest"]),
        ([GSSENC_REQUEST, SSL_REQUEST, None], ["DECLINE", "DECLINE", "dismissed insists on SSLRequest"]),
        ([SSL_REQUEST, startup()[:5], None], ["DECLINE", "LISTEN", "dismissed"]),
        ([TERMINATE], ["dismissed"]),
        ([SSL_REQUEST, TERMINATE], ["DECLINE", "dismissed"]),
        ([query("x")], ["dismissed: the client sent Query as its first message, instead of a startup packet"]),
        ([b"GET / HTTP/1.1\r\n\r\n"],
         ["dismissed: the connection began with HTTP, not with PostgreSQL's startup packet"]),
        ([SSL_REQUEST, b"GET / HTTP/1.1\r\n\r\n"],
         ["DECLINE", "dismissed: the connection went on with HTTP, not with PostgreSQL's startup packet"]),
        ([b"\x16\3\1"], ["dismissed: the connection began with a TLS hello, but this port offers no TLS"]),
        ([b"\x16"], ["dismissed: the connection began with the bytes 16, but this port offers no TLS"]),
        ([b"\x16\3\1\0\xff\x0apostgresql"],
         [f"dismissed: the connection began with a TLS hello, {NO_DIRECT_TLS}"]),
        ([SSL_REQUEST, b"\x16\3\1\0\xff"],
         ["DECLINE", f"dismissed: the connection went on with a TLS hello, {TOLD}"]),
        ([b"\0\0\0\7\0\0\0"],
         ["dismissed: the connection began with the bytes 00 00 00 07, not with PostgreSQL's startup packet"]),
    ],
)  # fmt: skip
def test_what_comes_of_it(said: list[bytes | None], expected: list[str]) -> None:
    assert outcome(*said) == expected


_BY_TLS = "although it has TLS"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ([startup()], ["StartupMessage after 0"]),
        ([SSL_REQUEST, startup()], ["SSLRequest", "StartupMessage after 0"]),
        ([SSL_REQUEST[:7], SSL_REQUEST[7:], startup()], ["LISTEN", "SSLRequest", "StartupMessage after 0"]),
        ([GSSENC_REQUEST, SSL_REQUEST, startup()], ["DECLINE", "SSLRequest", "StartupMessage after 1"]),
        ([SSL_REQUEST + b"xyz"], ["SSLRequest + 3"]),
        ([GSSENC_REQUEST + b"xyz"],
         ["GSSENCRequest after 0 + 3: the client sent GSSENCRequest and 3 bytes more without waiting for the answer"]),
        ([SSL_REQUEST, SSL_REQUEST],
         ["SSLRequest", f"SSLRequest after 0: the client sent SSLRequest {_BY_TLS}"]),
        ([SSL_REQUEST, GSSENC_REQUEST],
         ["SSLRequest", f"GSSENCRequest after 0: the client sent GSSENCRequest {_BY_TLS}"]),
        ([SSL_REQUEST, cancel_request(1, b"key!")], ["SSLRequest", "CancelRequest after 0"]),
        ([SSL_REQUEST, None], ["SSLRequest", "dismissed"]),
        ([GSSENC_REQUEST, SSL_REQUEST, None], ["DECLINE", "SSLRequest", "dismissed"]),
        ([GSSENC_REQUEST, None], ["DECLINE", "dismissed insists on GSSENCRequest"]),
        ([SSL_REQUEST, b"\x16\3\1\0\xff"],
         ["SSLRequest", "dismissed: the connection went on with a TLS hello, although it has TLS"]),
        ([SSL_REQUEST, b"GET / HTTP/1.1\r\n\r\n"],
         ["SSLRequest", "dismissed: the connection went on with HTTP, not with PostgreSQL's startup packet"]),
        ([b"\x16"], ["TLS + 1"]),
        ([b"\x16\3\1\0\xff", startup()], ["TLS + 5", "StartupMessage after 0"]),
        ([b"\x16\3\1", SSL_REQUEST, GSSENC_REQUEST, startup()],
         ["TLS + 3", "DECLINE", "DECLINE", "StartupMessage after 2"]),
        ([b"\x16\3\1", SSL_REQUEST, SSL_REQUEST],
         ["TLS + 3", "DECLINE", "SSLRequest after 1: the client sent SSLRequest a second time"]),
        ([GSSENC_REQUEST, b"\x16\3\1\0\xff"],
         ["DECLINE", f"dismissed: the connection went on with a TLS hello, {TOLD}"]),
        ([b"\0\0\0\7\0\0\0"],
         ["dismissed: the connection began with the bytes 00 00 00 07, not with PostgreSQL's startup packet"]),
    ],
)  # fmt: skip
def test_what_comes_of_it_where_there_is_tls(said: list[bytes | None], expected: list[str]) -> None:
    """What comes out of the handshake is what is said next."""
    assert outcome(*said, tls=True) == expected


def test_what_comes_of_a_handshake_that_is_none() -> None:
    stuffed = Conversation(offers_tls=True).hear(SSL_REQUEST + startup(), PID)
    assert isinstance(stuffed, Encryption)
    assert stuffed.failed.verdict is not None
    assert stuffed.failed.verdict.intruder == PID
    assert stuffed.failed.verdict.reason.endswith(f" and {len(startup())} bytes more without waiting for the answer")
    waited = Conversation(offers_tls=True).hear(SSL_REQUEST, PID)
    assert isinstance(waited, Encryption)
    assert waited.failed.verdict is None
    direct = Conversation(offers_tls=True).hear(b"\x16\3\1\0\xff", PID)
    assert isinstance(direct, Encryption)
    assert direct.failed.verdict is None
    assert direct.without_protocol.verdict is not None
    assert "ALPN" in direct.without_protocol.verdict.reason


@pytest.mark.parametrize("said", [startup(user="someone", x="y"), cancel_request(1, bytes(range(256)))])
def test_every_way_to_cut_it_in_two_comes_to_the_same(said: bytes) -> None:
    whole = Conversation().hear(said, PID)
    for at in range(1, len(said)):
        conversation = Conversation()
        assert conversation.hear(said[:at], PID) is LISTEN
        assert conversation.hear(said[at:], PID) == whole


def test_the_packet_is_left_as_it_was_sent() -> None:
    found = Conversation().hear(startup(user="ä") + b"rest", PID)
    assert isinstance(found, Greeting)
    assert (found.packet.packet, found.behind, found.sender) == (startup(user="ä"), b"rest", PID)


def test_who_sends_is_the_last_that_is_known() -> None:
    conversation = Conversation()
    conversation.hear(SSL_REQUEST, PID)
    found = conversation.hear(startup(), None)
    assert isinstance(found, Greeting)
    assert found.sender == PID
    assert found.before == (SSL_REQUEST,)
    conversation = Conversation()
    conversation.hear(startup()[:5], PID)
    found = conversation.hear(startup()[5:], Sender(8))
    assert isinstance(found, Greeting)
    assert found.sender == Sender(8)


def test_a_second_request_is_one_of_its_kind_alone() -> None:
    conversation = Conversation()
    assert [conversation.hear(one, None) for one in (SSL_REQUEST, GSSENC_REQUEST)] == [DECLINE, DECLINE]
    found = conversation.hear(SSL_REQUEST, None)
    assert isinstance(found, Greeting)
    assert (found.again, found.packet.kind, found.before) == (
        True,
        PacketKind.SSL_REQUEST,
        (SSL_REQUEST, GSSENC_REQUEST),
    )


def test_what_has_been_said_of_a_query_names_who_sent_it() -> None:
    found = Conversation().hear(message("Q", b"select 1\0"), PID)
    assert isinstance(found, Dismissal)
    assert found.verdict is not None
    assert found.verdict.intruder == PID
