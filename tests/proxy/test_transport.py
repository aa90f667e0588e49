"""TLS without a socket: what comes out is what went in, however it is cut, and whose it is."""

from __future__ import annotations

import ssl
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgguard.identity import Sender
from pgguard.proxy.transport import Handshake, HandshakeFailed
from tests.proxy.tls_peers import HOST, Peer, client_context, server_context

PARENT, CHILD = Sender(1, 1), Sender(2, 2)
VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("server_side", [False, True])
def test_what_is_said_is_heard_on_both_sides(version: ssl.TLSVersion, server_side: bool) -> None:
    server = server_context(version)
    peer = Peer(server_side=True, context=server) if server_side else Peer(server_side=False, guards=server)
    assert peer.tls.open(peer.say(b"to the guard")) == b"to the guard"
    assert peer.hear(peer.tls.seal(b"from the guard")) == b"from the guard"
    assert peer.tls.ssl_object.version() == version.name.replace("_", ".")
    assert not peer.tls.words()
    assert not peer.tls.is_over


def test_all_that_has_come_is_returned_at_once_however_much_it_is() -> None:
    peer = Peer(server_side=False)
    data = bytes(range(256)) * 4000
    assert peer.tls.open(peer.say(data)) == data
    assert peer.tls.halfway == 0
    assert peer.hear(peer.tls.seal(data)) == data


def test_what_is_large_takes_no_larger_buffers() -> None:
    """OpenSSL's only ever grow: what a session once was sent at once it would keep room for."""
    peer = Peer(server_side=False)
    raw = peer.say(bytes(1 << 20))
    give, written = peer.tls._give, []

    def watched(data: bytes) -> int:
        written.append(len(data))
        return give(data)

    peer.tls._give = watched
    assert len(peer.tls.open(raw)) == 1 << 20
    assert max(written) <= 16384 + 2048 + 5


@given(cuts=st.lists(st.integers(0, 40_000), max_size=12), sizes=st.lists(st.integers(1, 20_000), max_size=4))
@settings(max_examples=60, deadline=None)
def test_a_record_is_whose_bytes_have_completed_it(cuts: list[int], sizes: list[int]) -> None:
    """However records are torn, and by whomever they were sent."""
    peer = Peer(server_side=False)
    messages = [bytes([n + 1]) * size for n, size in enumerate(sizes)]
    raw, ends = b"", []
    for message in messages:
        raw += peer.say(message)
        ends.append(len(raw))
    borders = sorted({0, len(raw), *(cut for cut in cuts if cut < len(raw))})
    heard: list[tuple[bytes, Sender]] = []
    at = 0
    for n, (begin, end) in enumerate(pairwise(borders)):
        sender = (PARENT, CHILD)[n % 2]
        data = peer.tls.open(raw[begin:end], sender)
        heard.append((data, sender))
        at += len(data)
        assert at == _plain(raw, end)
    assert b"".join(data for data, _ in heard) == b"".join(messages)
    assert peer.tls.failure is None
    assert peer.tls.halfway == 0


def _plain(raw: bytes, end: int) -> int:
    """How much is said in the records that are whole in front of a position."""
    pos = said = 0
    while pos + 5 <= end:
        stop = pos + 5 + int.from_bytes(raw[pos + 3 : pos + 5], "big")
        if stop > end:
            break
        said += stop - pos - 5 - 17
        pos = stop
    return said


def test_who_began_a_record_that_somebody_else_has_completed_is_said() -> None:
    peer = Peer(server_side=False)
    raw = peer.say(b"one") + peer.say(b"two")
    assert peer.tls.open(raw[:3], PARENT) == b""
    assert [(peer.tls.open(raw[begin:end], CHILD), peer.tls.mixed) for begin, end in pairwise((3, 10, 30, 50))] == [
        (b"", None),
        (b"one", PARENT),
        (b"two", None),
    ]


def test_a_record_of_one_whose_sender_is_not_known_all_the_time_is_nobody_elses() -> None:
    peer = Peer(server_side=False)
    raw = peer.say(b"one")
    peer.tls.open(raw[:3], None)
    assert peer.tls.open(raw[3:], CHILD) == b"one"
    assert peer.tls.mixed is None


def test_a_record_that_says_nothing_to_whoever_reads_changes_nothing() -> None:
    """A session ticket comes behind the handshake, and looks like what the server has to say: RFC 8446, 4.6.1."""
    peer = Peer(server_side=True, context=server_context(tickets=2))
    tickets = peer.outgoing.read()
    border = 5 + int.from_bytes(tickets[3:5], "big")
    assert len(tickets) > border > 5, "two of them"
    assert peer.tls.open(b"") == b""
    for ticket in (tickets[:border], tickets[border:]):
        assert peer.tls.open(ticket) == b""
    assert not peer.tls.words()
    assert not peer.tls.is_over
    assert peer.tls.open(peer.say(b"from the server")) == b"from the server"
    assert peer.hear(peer.tls.seal(b"from the guard")) == b"from the guard"


@pytest.mark.parametrize("version", VERSIONS)
def test_a_number_that_was_used_before_breaks_the_stream(version: ssl.TLSVersion) -> None:
    """As two processes do that inherited one session; both are told what PostgreSQL would tell them."""
    peer = Peer(server_side=False, guards=server_context(version))
    first, second, third = peer.say(b"parent"), peer.say(b"more"), peer.say(b"last")
    assert peer.tls.open(first, PARENT) == b"parent"
    assert peer.tls.open(second + first + third, CHILD) == b"more"
    failure = peer.tls.failure
    assert failure is not None
    assert failure.reason == "decryption failed or bad record mac"
    assert (failure.is_told, failure.size, failure.sender, failure.begun_by) == (False, len(first), CHILD, None)
    assert peer.tls.is_over
    assert not peer.tls.is_closed
    assert peer.tls.open(third) == b""
    assert peer.tls.seal(b"too late") == b""
    with pytest.raises(ssl.SSLError, match="bad record mac"):
        peer.hear(peer.tls.words())


@pytest.mark.parametrize(
    ("version", "cipher", "is_known"),
    [
        (ssl.TLSVersion.TLSv1_3, "ECDHE-ECDSA-AES256-GCM-SHA384", True),
        (ssl.TLSVersion.TLSv1_2, "ECDHE-ECDSA-AES256-GCM-SHA384", True),
        (ssl.TLSVersion.TLSv1_2, "ECDHE-ECDSA-CHACHA20-POLY1305", True),
        (ssl.TLSVersion.TLSv1_2, "ECDHE-ECDSA-AES128-SHA256", False),
    ],
)
def test_by_its_length_a_record_says_no_more_than_so_much(version: ssl.TLSVersion, cipher: str, is_known: bool) -> None:
    """Also when it can't be decrypted."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = version
    context.set_ciphers(cipher)
    peer = Peer(server_side=False, context=context)
    raw = peer.say(b"12345")
    for _ in range(2):
        assert len(raw) <= peer.tls.longest_record(5)
        assert peer.tls.says_no_more_than(5, raw + raw)
        assert peer.tls.says_no_more_than(4, raw) is not is_known
        peer.tls.open(raw + raw)
    assert peer.tls.failure is not None


def test_a_record_that_two_have_sent_parts_of_and_that_is_broken_names_both() -> None:
    peer = Peer(server_side=False)
    raw = peer.say(b"one")
    peer.tls.open(raw[:10], PARENT)
    peer.tls.open(bytes(20), CHILD)
    assert peer.tls.failure is not None
    assert (peer.tls.failure.sender, peer.tls.failure.begun_by) == (CHILD, PARENT)


def test_an_alert_is_told_from_a_failure_of_ones_own() -> None:
    peer = Peer(server_side=False)
    sealed = peer.tls.seal(b"one")
    peer.hear(sealed)
    with pytest.raises(ssl.SSLError, match=r"(?i)decryption failed or bad record mac"):
        peer.hear(sealed)
    assert peer.tls.open(peer.outgoing.read(), CHILD) == b""
    failure = peer.tls.failure
    assert failure is not None
    assert failure.is_told
    assert failure.reason.endswith("alert bad record mac")


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\n", bytes(5), b"\x17\x03\x03\xff\xff", b"Q\0\0\0\x0eselect 1\0"]
)
def test_what_is_no_record_is_found_at_once(garbage: bytes) -> None:
    peer = Peer(server_side=False)
    assert peer.tls.open(peer.say(b"one") + garbage) == b"one"
    assert peer.tls.failure is not None


def test_an_end_is_clean_if_it_is_said() -> None:
    peer = Peer(server_side=False)
    assert peer.tls.open(peer.say(b"one") + peer.end(), CHILD) == b"one"
    assert peer.tls.is_closed
    assert peer.tls.closed_by == CHILD
    assert peer.tls.failure is None
    assert peer.hear(peer.tls.seal(b"two")) == b"two", "it has ended its own stream, and not the other"
    assert peer.tls.farewell()
    assert peer.tls.farewell() == b""
    assert peer.tls.seal(b"three") == b""


def test_who_has_said_farewell_still_hears() -> None:
    peer = Peer(server_side=False)
    farewell = peer.tls.farewell()
    assert peer.tls.open(peer.say(b"one")) == b"one"
    assert peer.hear(farewell) == b""
    assert peer.tls.open(peer.end()) == b""
    assert peer.tls.is_closed


# How much has been read


@given(
    sizes=st.lists(st.integers(1, 40_000), min_size=1, max_size=4),
    before=st.integers(0, 9),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_what_has_been_read_is_known_by_the_record(sizes: list[int], before: int, data: st.DataObject) -> None:
    peer = Peer(server_side=False, before=before)
    sealed = [peer.tls.seal(bytes(size)) for size in sizes]
    raw = b"".join(sealed)
    unread = data.draw(st.integers(0, len(raw)))
    read = len(peer.hear(raw[: len(raw) - unread]))
    assert peer.tls.unread(unread) == sum(sizes) - read
    sent = peer.tls._sent
    assert peer.tls.unread_at((sent - unread) % (1 << 32)) == sum(sizes) - read


def test_what_was_said_long_ago_counts_as_read() -> None:
    peer = Peer(server_side=False)
    for _ in range(100):
        peer.tls.seal(b"something")
    assert peer.tls.unread(100 * 31) == 16 * 9


# Handshakes


def test_what_comes_behind_a_handshake_is_there_when_it_is_done() -> None:
    """A client needn't wait before it says something: in the same packet as the end of its handshake, and one more."""
    client = Handshake(client_context(), server_side=False, hostname=HOST)
    server = Handshake(server_context(), server_side=True)
    words = client.hear(server.hear(client.hear(), PARENT))
    assert client.is_done
    raw = words + client.tls.seal(b"startup") + client.tls.seal(b"more")
    assert server.hear(raw[:-9], PARENT) == b""
    assert server.is_done
    assert server.tls.open(b"", PARENT) == b"startup"
    assert server.tls.open(raw[-9:], CHILD) == b"more"
    assert server.tls.mixed == PARENT


@pytest.mark.parametrize("size", [1, 7])
def test_a_handshake_may_come_in_any_pieces(size: int) -> None:
    client = Handshake(client_context(), server_side=False, hostname=HOST)
    server = Handshake(server_context(), server_side=True)
    to_server, to_client = client.hear(), b""
    while not (client.is_done and server.is_done):
        for at in range(0, len(to_server), size):
            to_client += server.hear(to_server[at : at + size])
        to_server = b""
        for at in range(0, len(to_client), size):
            to_server += client.hear(to_client[at : at + size])
        to_client = b""
    assert server.tls.open(client.tls.seal(b"startup")) == b"startup"


def test_a_certificate_that_is_not_trusted_is_said_to_both() -> None:
    client = Handshake(client_context(trusts=False), server_side=False, hostname=HOST)
    server = Handshake(server_context(), server_side=True)
    words = server.hear(client.hear())
    with pytest.raises(HandshakeFailed, match=r"certificate verify failed: self.signed certificate") as failed:
        client.hear(words)
    assert isinstance(failed.value.error, ssl.SSLCertVerificationError)
    with pytest.raises(HandshakeFailed, match="alert unknown ca"):
        server.hear(failed.value.words)


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n", bytes(64), b"\x16\x03\x01\xff\xff" + bytes(64)])
def test_what_is_no_handshake_is_found_at_once(garbage: bytes) -> None:
    with pytest.raises(HandshakeFailed):
        Handshake(server_context(), server_side=True).hear(garbage)
