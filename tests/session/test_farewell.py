"""What a client is sent last, in each state, and what is taken for a request of one that has been sent it."""

from __future__ import annotations

import pytest

from pgguard.session.farewell import asks, farewell
from pgguard.session.tracker import Tracker
from tests.proxy.messages import ANSWER, LOGGED_IN, message, query

ERROR = message("E", b"SFATAL\0\0")
IDLE = ERROR + message("Z", b"I")
FAILED = ERROR + message("Z", b"E")


def tracker(*said: bytes) -> Tracker:
    """A session in which the server has said the first of these, the client the second, and so on."""
    it = Tracker({"user": "someone"})
    for n, data in enumerate(said):
        buffer = data
        if n % 2:
            it.frontend(buffer, 0, len(buffer), None, 0.0)
        else:
            it.backend(buffer, 0, len(buffer))
    return it


PARSED = message("P", b"\0select 1\0\0\0") + message("D", b"S\0") + message("H")
COPYING = message("G", bytes(3))


@pytest.mark.parametrize(
    ("session", "asked", "words"),
    [
        pytest.param(tracker(), None, ERROR, id="login: nobody expects ReadyForQuery behind an error"),
        pytest.param(tracker(LOGGED_IN), None, IDLE, id="idle"),
        pytest.param(tracker(LOGGED_IN, query("begin"), message("C", b"BEGIN\0") + message("Z", b"T")), None, IDLE),
        pytest.param(tracker(LOGGED_IN), "Q", FAILED, id="its own request"),
        pytest.param(tracker(LOGGED_IN), "X", IDLE, id="its Terminate, which has no answer"),
        pytest.param(tracker(LOGGED_IN, query("select 1")), None, FAILED, id="query"),
        pytest.param(tracker(LOGGED_IN, query("select 1"), ANSWER), None, IDLE, id="answered"),
        pytest.param(tracker(LOGGED_IN, query("select 1"), ANSWER[:20]), "p", FAILED, id="half answered"),
        pytest.param(tracker(LOGGED_IN, PARSED), None, FAILED, id="extended query"),
        pytest.param(tracker(LOGGED_IN, PARSED), "B", FAILED, id="in the middle of an extended query"),
        pytest.param(tracker(LOGGED_IN, query("copy x from stdin"), COPYING), None, FAILED, id="copy"),
        pytest.param(tracker(LOGGED_IN, query("copy x from stdin"), COPYING), "d", FAILED, id="its copy data"),
    ],
)
def test_the_form_is_that_of_an_answer_to_what_the_client_waits_for(
    session: Tracker, asked: str | None, words: bytes
) -> None:
    last = farewell(session, ERROR, asked)
    assert last.words == words
    assert (last.again > 0) is (words == FAILED)


def test_it_is_repeated_for_the_clean_up_of_a_transaction_and_of_a_pool() -> None:
    last = farewell(tracker(LOGGED_IN, query("select 1")), ERROR)
    again = last.repeated()
    assert again is not None
    assert again.words == last.words
    assert again.repeated() is None


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (query("rollback"), True),
        (message("P", b"\0rollback\0\0\0") + message("B", bytes(8)) + message("E", bytes(5)) + message("S"), True),
        (message("S"), True),
        (query("rollback") + message("X"), True),
        (message("X"), False),
        (message("d", b"1\n"), False),
        (message("c") + message("S"), False),
        (query("rollback")[:-1], False),
        (query("rollback") + b"Q", False),
        (b"SELECT", False),
        (b"Q\0\0\0\0", False),
        (b"", False),
    ],
)
def test_only_whole_requests_are_answered_again(data: bytes, expected: bool) -> None:
    assert asks(data) is expected
