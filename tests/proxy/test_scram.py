"""What is edited of a login between two connections, and that nothing else is, however it is torn."""

from __future__ import annotations

import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgguard.proxy.scram import Login, stands_between
from tests.proxy.messages import LOGGED_IN, message
from tests.wire.test_sasl import offer, response

OFFER = offer(b"SCRAM-SHA-256-PLUS", b"SCRAM-SHA-256")
EDITED = offer(b"SCRAM-SHA-256")
CONTINUE = message("R", struct.pack("!I", 11) + b"r=nonce,s=salt,i=4096")
FINAL = message("R", struct.pack("!I", 12) + b"v=signature")
NEGOTIATE = message("v", struct.pack("!II", 3 << 16, 0))
NOTICE = message("N", b"SWARNING\0C01000\0Mhm\0\0")
DOWNGRADE = message(
    "E", b"SFATAL\0VFATAL\0C28000\0MSCRAM channel binding negotiation error\0Rread_client_first_message\0\0"
)
OTHER = message("E", b"SFATAL\0VFATAL\0C28P01\0Mno\0\0")
UNBOUND = response(b"SCRAM-SHA-256", b"n,,n=,r=nonce")
UNOFFERED = response(b"SCRAM-SHA-256", b"y,,n=,r=nonce")


@pytest.mark.parametrize(("shown", "server", "between"), [
    (None, None, False),
    (b"ours", None, False),
    (None, b"theirs", True),
    (b"ours", b"theirs", True),
    (b"theirs", b"theirs", False),
])  # fmt: skip
def test_where_the_guard_stands_between(shown: bytes | None, server: bytes | None, between: bool) -> None:
    assert stands_between(shown, server) is between


@pytest.mark.parametrize("before", [b"", NEGOTIATE, NOTICE, NEGOTIATE + NOTICE])
def test_the_offer_is_edited_and_nothing_behind_it(before: bytes) -> None:
    login = Login()
    assert login.from_server(before + OFFER) == before + EDITED
    login.from_client(UNBOUND)
    assert not login.is_over
    assert login.from_server(CONTINUE + OFFER) == CONTINUE + OFFER
    assert login.is_over


@pytest.mark.parametrize(
    "answer",
    [
        LOGGED_IN,
        offer(b"SCRAM-SHA-256"),
        offer(b"SCRAM-SHA-256-PLUS"),
        message("R", struct.pack("!I", 3)),
        message("R", struct.pack("!I", 10)[:3]),
        message("R", struct.pack("!I", 10) + bytes(2000)),
        DOWNGRADE,
        b"Eno more connections\n\0",
        b"HTTP/1.1 400 Bad Request\r\n",
        b"v\xff\xff\xff\xffx",
    ],
    ids=[
        "no password",
        "no PLUS",
        "PLUS alone",
        "cleartext",
        "too short",
        "too long",
        "refused",
        "2",
        "HTTP",
        "broken",
    ],
)
def test_other_answers_are_left_alone(answer: bytes) -> None:
    login = Login()
    assert login.from_server(answer + OFFER) == answer + OFFER
    assert login.is_over


def test_a_refusal_for_the_channel_is_told_in_words_that_say_what_to_set() -> None:
    login = Login()
    login.from_server(OFFER)
    login.from_client(UNOFFERED)
    said = login.from_server(DOWNGRADE)
    assert login.is_over
    fields = {part[:1]: part[1:].decode() for part in said[5:].split(b"\0") if part}
    assert len(said) == 1 + int.from_bytes(said[1:5], "big")
    assert (fields[b"V"], fields[b"C"]) == ("FATAL", "28000")
    assert fields[b"M"].startswith("pgguard: ")
    assert "channel_binding=disable" in fields[b"M"]
    assert fields[b"D"].endswith(": SCRAM channel binding negotiation error")
    assert "--tls-cert" in fields[b"H"]


@pytest.mark.parametrize(("said", "answer"), [
    (UNBOUND, DOWNGRADE),
    (response(b"OAUTHBEARER", b"y,,"), DOWNGRADE),
    (b"", DOWNGRADE),
    (UNOFFERED[:20], DOWNGRADE),
    (UNOFFERED, OTHER),
    (UNOFFERED, CONTINUE + DOWNGRADE),
    (UNOFFERED, b"E\x7f\xff\xff\xff" + DOWNGRADE),
])  # fmt: skip
def test_other_refusals_are_the_servers_own(said: bytes, answer: bytes) -> None:
    login = Login()
    login.from_server(OFFER)
    login.from_client(said)
    assert login.from_server(answer) == answer
    assert login.is_over


def test_what_a_client_sends_before_it_is_asked_is_no_choice() -> None:
    login = Login()
    login.from_client(b"the rest of a StartupMessage")
    login.from_server(OFFER)
    login.from_client(UNOFFERED[:1])
    login.from_client(UNOFFERED[1:] + b"more" * 100)
    assert login.from_server(DOWNGRADE) != DOWNGRADE


@pytest.mark.parametrize("cut", [1, 5, 8, len(OFFER) - 1])
def test_what_is_kept_of_an_offer_is_passed_on_if_the_stream_ends(cut: int) -> None:
    login = Login()
    assert login.from_server(NOTICE + OFFER[:cut]) == NOTICE
    assert login.leave() == OFFER[:cut]
    assert login.is_over
    assert login.leave() == b""


def _played(chunks: list[bytes], said: bytes) -> bytes:
    login = Login()
    received = b""
    for chunk in chunks:
        received += login.from_server(chunk) if not login.is_over else chunk
        if received.endswith(EDITED):
            login.from_client(said)
    return received + login.leave()


@given(
    before=st.lists(st.sampled_from([NEGOTIATE, NOTICE]), max_size=2).map(b"".join),
    answer=st.sampled_from([OFFER, offer(b"SCRAM-SHA-256"), LOGGED_IN, OTHER, b"E", b""]),
    then=st.sampled_from([CONTINUE + FINAL + LOGGED_IN, DOWNGRADE, OTHER, b"R", b""]),
    said=st.sampled_from([UNBOUND, UNOFFERED]),
    cuts=st.sets(st.integers(1, 200)),
)
def test_it_doesnt_matter_how_it_is_torn(
    before: bytes, answer: bytes, then: bytes, said: bytes, cuts: set[int]
) -> None:
    whole = before + answer
    at = [0, *sorted(cut for cut in cuts if cut < len(whole)), len(whole)]
    torn = [whole[begin:end] for begin, end in pairwise(at)]
    behind = [then[n : n + 1] for n in range(len(then))]
    assert _played([*torn, *behind], said) == _played([whole, then], said)
