"""What a session is kept account of stays small, whatever its client or server sends, and however much of it."""

from __future__ import annotations

import struct
import tracemalloc
from itertools import islice
from typing import TYPE_CHECKING

import pytest

from pgguard.session.session import _MOST_REQUESTS, _MOST_UNASKED
from pgguard.session.verdicts import Kind
from tests.session.protocol import BACKEND, FRONTEND, Conversation, bind, close, kinds, message, parse, query

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pgguard.session.tracker import Tracker

MEGABYTE = 1_000_000
CHUNK = 64
"""Messages that come together."""
UNFLUSHED = 8192 // 5
"""Answers that PostgreSQL holds back at most as long as nobody asks for them."""


def pipeline(conversation: Conversation, messages: Iterator[bytes] | list[bytes]) -> int:
    """Send messages without reading, until the ledger is full; returns how many."""
    waiting = iter(messages)
    sent = 0
    while conversation.tracker.fullness() < 1:
        chunk = list(islice(waiting, CHUNK))
        if not chunk:
            break
        conversation.frontend(b"".join(chunk))
        conversation.verdicts.clear()
        sent += len(chunk)
    return sent


def endless(*messages: bytes, most: int = 400_000) -> Iterator[bytes]:
    for _ in range(most // len(messages)):
        yield from messages


@pytest.mark.parametrize(
    "messages",
    [
        pytest.param([FRONTEND["S"]], id="syncs"),
        pytest.param([query("")], id="empty queries"),
        pytest.param([query("select '" + "x" * 900 + "'")], id="queries"),
        pytest.param([FRONTEND[letter] for letter in "PBES"], id="requests"),
        pytest.param([parse("select '" + "x" * 900 + "'"), FRONTEND["S"]], id="texts"),
        pytest.param([FRONTEND[letter] for letter in "BE"], id="executions without a Sync"),
        pytest.param([parse("select 1")], id="texts without a Sync"),
        pytest.param([parse("x" * 1000, "statement")], id="long texts without a Sync"),
        pytest.param([close("statement"), FRONTEND["H"]], id="closes and flushes"),
        pytest.param([query("copy t from stdin"), *[FRONTEND["c"]] * 1000], id="ends of copies"),
    ],
)
def test_what_is_pipelined_and_not_answered(messages: list[bytes]) -> None:
    """It is full at some time, and takes a megabyte or two until then."""
    conversation = Conversation()
    tracemalloc.start()
    try:
        sent = pipeline(conversation, endless(*messages))
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert conversation.tracker.fullness() >= 1
    assert sent >= _MOST_REQUESTS
    assert taken < 3 * MEGABYTE


def test_it_is_read_again_when_some_is_answered() -> None:
    conversation = Conversation()
    sent = pipeline(conversation, endless(FRONTEND["S"]))
    fullness = conversation.tracker.fullness()
    conversation.backend(BACKEND["Z"] * 100)
    assert 0.5 < conversation.tracker.fullness() < fullness
    conversation.backend(BACKEND["Z"] * (sent - 100))
    assert conversation.tracker.fullness() == 0
    assert conversation.tracker.idle
    assert conversation.verdicts == []


@pytest.mark.parametrize("answers", [UNFLUSHED, 512 * 1024 // 5])
def test_it_is_not_full_where_the_server_may_wait_for_more(answers: int) -> None:
    """As long as nobody has asked for answers, a server may hold back as many as fit into its buffer."""
    conversation = Conversation()
    assert pipeline(conversation, endless(*[FRONTEND["B"], FRONTEND["E"]], most=answers + 2)) >= answers
    assert conversation.tracker.fullness() < 1
    conversation.frontend("S")
    conversation.backend((BACKEND["2"] + BACKEND["C"]) * (answers // 2 + 1))
    conversation.backend("Z")
    assert conversation.tracker.idle
    assert conversation.verdicts == []


@pytest.mark.parametrize(("answered", "found"), [(2000, [Kind.REQUEST_WHILE_BUSY]), (2001, [])])
def test_what_is_alike_is_kept_once_and_flushed_all_the_same(answered: int, found: list[Kind]) -> None:
    """A simple Query behind what was flushed is sent on top of that, and behind what wasn't, it is not."""
    conversation = Conversation()
    conversation.frontend("BE" * 3000)
    assert conversation.tracker.fullness() > 0
    conversation.backend("2C" * 1000)
    conversation.frontend("BEH" + "BE" * 3000)
    assert conversation.tracker.fullness() > 0
    conversation.backend("2C" * answered)
    conversation.frontend("Q")
    assert kinds(conversation.verdicts) == found


@pytest.mark.parametrize(("answered", "found"), [(99, [Kind.REQUEST_WHILE_BUSY]), (100, [])])
def test_what_was_flushed_is_known_when_much_of_it_has_been_answered(answered: int, found: list[Kind]) -> None:
    conversation = Conversation()
    conversation.frontend("BE" * 100 + "H" + "BE" * 20)
    conversation.backend("2C" * answered)
    conversation.frontend("Q")
    assert kinds(conversation.verdicts) == found


def test_a_copy_is_never_full() -> None:
    """The server reads data until the client ends them, and answers none of the Syncs in front of that."""
    conversation = Conversation()
    conversation.talk("> PBES < 12G")
    tracemalloc.start()
    try:
        for _ in range(500):
            conversation.frontend("dS" * 100)
            assert conversation.tracker.fullness() < 1
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken < MEGABYTE
    conversation.talk("> cS < CZ > PBES < 12CZ")
    assert conversation.verdicts == []
    assert conversation.tracker.idle


def test_a_copy_that_failed_under_any_number_of_syncs() -> None:
    """The server may have answered each of them."""
    conversation = Conversation()
    conversation.talk("> PBES < 12G")
    for _ in range(100):
        conversation.frontend("S" * 100)
    conversation.backend("E")
    conversation.backend("Z" * 10_000)
    assert conversation.verdicts == []


def named_statements(conversation: Conversation, number: int) -> Tracker:
    for n in range(number):
        name = f"statement_{n}" + "x" * 40
        conversation.frontend(parse("select " + "x" * 500, name) + bind(name) + FRONTEND["E"] + FRONTEND["S"])
        conversation.backend("12CZ")
    return conversation.tracker


def test_prepared_statements_without_end() -> None:
    conversation = Conversation()
    tracemalloc.start()
    try:
        named_statements(conversation, 10_000)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken < MEGABYTE
    assert conversation.verdicts == []


@pytest.mark.parametrize("letter", ["N", "S", "A"])
def test_what_the_server_sends_unasked_leaves_nothing(letter: str) -> None:
    """Notices, parameters, and notifications."""
    conversation = Conversation()
    tracemalloc.start()
    try:
        for n in range(2000):
            conversation.backend(BACKEND[letter] + message("S", b"application_name\0" + b"x" * 63 + b"%d\0" % n))
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken < MEGABYTE / 10
    assert conversation.verdicts == []


def test_a_message_of_a_gigabyte_leaves_nothing() -> None:
    """A row of the server's, and copy data of the client's, pass in pieces."""
    conversation = Conversation()
    conversation.talk("> Q < T")
    size = 1_000_000_000
    head = b"D" + struct.pack("!I", size) + bytes(65_531)
    assert conversation.backend(head) == []
    piece = bytes(1 << 20)
    left = size + 1 - len(head)
    tracker = conversation.tracker
    while left:
        assert tracker.backend_rest == left
        stop = min(left, len(piece))
        assert tracker.backend(piece, 0, stop) == stop
        left -= stop
    conversation.backend("CZ")
    assert conversation.verdicts == []


def test_most_that_is_asked_for_by_nobody_is_what_stands_in_the_ledger() -> None:
    conversation = Conversation()
    pipeline(conversation, endless(FRONTEND["B"], FRONTEND["E"]))
    assert conversation.tracker.ledger.count <= _MOST_UNASKED + CHUNK


def test_of_what_has_been_paid_little_is_kept_while_more_is_owed() -> None:
    """A client that never waits for its last answer leaves one in the ledger at any time."""
    conversation = Conversation()
    conversation.frontend("S" * 3)
    for _ in range(1000):
        conversation.frontend("S")
        conversation.backend("Z")
    ledger = conversation.tracker.ledger
    assert ledger.count == 3
    assert len(ledger.entries) < 100
    conversation.backend("ZZZ")
    assert conversation.tracker.idle
    assert not ledger.entries
    assert conversation.verdicts == []


def test_an_idle_session_takes_little_memory() -> None:
    """What only some sessions need is made when it is needed."""
    number = 100
    tracemalloc.start()
    try:
        sessions = [Conversation().tracker for _ in range(number)]
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert all(session.logged_in for session in sessions)
    assert taken < number * 2000
