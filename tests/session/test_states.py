"""The state tables against the protocol chapter, and the tracker against the tables: every state with every message."""

from __future__ import annotations

import pytest

from pgguard.session.states import ANSWERS, ASYNCHRONOUS, CAN_BECOME_COPY, COPY_IN, IN_COPY_IN, OWED, Owes
from pgguard.session.verdicts import Direction, Kind
from pgguard.wire import messages
from tests.session.protocol import BACKEND, FRONTEND, IN_TRANSACTION, Conversation, error, kinds

RESULTS = {Owes.PAID, Owes.SKIP}

REACHED = {
    Owes.NOTHING: "",
    Owes.QUERY: "> Q",
    Owes.QUERY_ROWS: "> Q < T",
    Owes.QUERY_COPY_IN: "> Q < G",
    Owes.QUERY_COPY_OUT: "> Q < H",
    Owes.QUERY_COPY_BOTH: "> Q < W",
    Owes.QUERY_COPIED: "> Q < Hc",
    Owes.QUERY_COPIED_BOTH: "> Q < Wc",
    Owes.QUERY_MORE: "> Q < C",
    Owes.FUNCTION_CALL: "> F",
    Owes.PARSE: "> P",
    Owes.BIND: "> B",
    Owes.CLOSE: "> C",
    Owes.DESCRIBE_STATEMENT: "> *",
    Owes.DESCRIBE_PORTAL: "> D",
    Owes.EXECUTE: "> E",
    Owes.EXECUTE_ROWS: "> E < D",
    Owes.EXECUTE_COPY_IN: "> E < G",
    Owes.EXECUTE_COPY_OUT: "> E < H",
    Owes.EXECUTE_COPIED: "> E < Hc",
    Owes.SYNC: "> S",
    Owes.MAYBE_SYNC: "> E < G > S < E",
    Owes.READY: "> Q < E",
}
"""How each state of the head is reached after the login; LOGIN is where a session begins."""

LEFT = {
    Owes.PAID: "",
    Owes.QUERY_ROWS: "CZ",
    Owes.QUERY_COPY_IN: "CZ",
    Owes.QUERY_COPY_OUT: "cCZ",
    Owes.QUERY_COPY_BOTH: "cCZ",
    Owes.QUERY_COPIED: "CZ",
    Owes.QUERY_COPIED_BOTH: "CZ",
    Owes.QUERY_MORE: "Z",
    Owes.DESCRIBE_PORTAL: "n",
    Owes.EXECUTE_ROWS: "C",
    Owes.EXECUTE_COPY_IN: "C",
    Owes.EXECUTE_COPY_OUT: "cC",
    Owes.EXECUTE_COPIED: "C",
    Owes.READY: "Z",
    Owes.LOGIN: "Z",
}
"""From each state that an answer leads to, the rest of the answer, after which nothing is owed."""


def in_state(state: Owes) -> Conversation:
    if state is Owes.LOGIN:
        return Conversation(login=False)
    conversation = Conversation()
    assert conversation.talk(REACHED[state]) == []
    assert conversation.tracker.idle is (state in {Owes.NOTHING, Owes.MAYBE_SYNC})
    return conversation


def test_states_all_have_a_row() -> None:
    """A state without a row would refuse everything; COPY_END is a mark, never a head."""
    assert set(ANSWERS) == set(Owes) - RESULTS - {Owes.COPY_END}
    assert set(REACHED) == set(ANSWERS) - {Owes.LOGIN}


def test_tables_speak_of_known_messages() -> None:
    backend = {message.type for message in messages.BACKEND}
    frontend = {message.type for message in messages.FRONTEND}
    assert {letter for row in ANSWERS.values() for letter in row} | ASYNCHRONOUS == backend
    assert set(OWED) | IN_COPY_IN | {"p"} == frontend
    assert COPY_IN <= CAN_BECOME_COPY


def test_every_result_is_left_as_the_tables_say() -> None:
    assert {follows for row in ANSWERS.values() for follows in row.values()} == set(LEFT) | {Owes.SKIP}


@pytest.mark.parametrize("letter", BACKEND)
@pytest.mark.parametrize("state", ANSWERS)
def test_backend_message_in_every_state(state: Owes, letter: str) -> None:
    """What the row has leads where the row says; what it hasn't is a verdict, and leaves the state as it was."""
    conversation = in_state(state)
    verdicts = conversation.backend(letter)
    row = ANSWERS[state]
    if letter in ASYNCHRONOUS:
        assert verdicts == []
        if LEFT.get(state):
            assert conversation.backend(LEFT[state]) == []
            assert conversation.tracker.idle
    elif state is Owes.LOGIN and letter == "E":
        assert verdicts == []
        assert conversation.tracker.goodbye
    elif letter not in row:
        # A Sync in doubt steps aside, and nothing is left.
        unasked = state in {Owes.NOTHING, Owes.MAYBE_SYNC}
        idle = unasked or state is Owes.LOGIN
        assert kinds(verdicts) == [Kind.MESSAGE_WHILE_IDLE if unasked else Kind.UNEXPECTED_RESPONSE]
        assert verdicts[0].message is not None
        assert verdicts[0].message.type == letter
        assert verdicts[0].open_request is not idle
        assert conversation.tracker.idle is (idle or letter == "Z")
    elif row[letter] is Owes.SKIP:
        assert verdicts == []
        assert conversation.tracker.idle
        assert conversation.talk("> PBE S < Z > Q < CZ") == [], "up to the Sync everything is discarded"
    else:
        assert verdicts == []
        assert conversation.backend(LEFT[row[letter]]) == []
        assert conversation.tracker.idle


@pytest.mark.parametrize("state", ANSWERS)
@pytest.mark.parametrize("severity", ["FATAL", "PANIC"])
def test_server_may_end_the_session_in_every_state(state: Owes, severity: str) -> None:
    conversation = in_state(state)
    assert conversation.backend(error(severity, "57P01")) == []
    assert conversation.tracker.goodbye
    assert conversation.tracker.idle
    assert conversation.tracker.frontend_eof(0) == []


COPYING = {Owes.QUERY_COPY_IN, Owes.QUERY_COPY_BOTH, Owes.EXECUTE_COPY_IN}
SIMPLE = {state for state in Owes if state.name.startswith("QUERY") or state in {Owes.FUNCTION_CALL, Owes.READY}}


def allowed(state: Owes, letter: str) -> Kind | None:
    """The rules for what a client may send, stated apart from the code that follows them."""
    if letter in "HX":
        return None
    if letter == "p":
        return None if state is Owes.LOGIN else Kind.PROTOCOL_VIOLATION
    if letter in "dcf":
        may_copy = state in {Owes.EXECUTE, Owes.EXECUTE_COPY_IN} or (
            state in SIMPLE and state is not Owes.FUNCTION_CALL
        )
        return None if may_copy or state is Owes.MAYBE_SYNC else Kind.PROTOCOL_VIOLATION
    if state in COPYING:
        return None if letter == "S" else Kind.PROTOCOL_VIOLATION
    if state in {Owes.NOTHING, Owes.LOGIN, Owes.MAYBE_SYNC}:
        return None
    if state in SIMPLE or (letter in "QF" and state is Owes.SYNC):
        return Kind.REQUEST_WHILE_BUSY
    return None  # extended messages without a Sync or Flush behind them have asked for no answer


@pytest.mark.parametrize("letter", [*FRONTEND, "*"])
@pytest.mark.parametrize("state", ANSWERS)
def test_frontend_message_in_every_state(state: Owes, letter: str) -> None:
    conversation = in_state(state)
    verdicts = conversation.frontend(letter)
    expected = allowed(state, letter)
    assert kinds(verdicts) == ([] if expected is None else [expected])
    terminated: bool = conversation.tracker.terminated
    assert terminated is (letter == "X")


@pytest.mark.parametrize(("letter", "answer"), [("Q", "CZ"), ("F", "VZ"), ("P", "1"), ("B", "2"), ("C", "3"),
                                                ("D", "n"), ("*", "tT"), ("E", "C"), ("S", "Z")])  # fmt: skip
def test_every_request_is_owed_its_answer(letter: str, answer: str) -> None:
    conversation = Conversation()
    conversation.frontend(letter)
    idle = [conversation.tracker.idle]
    assert conversation.backend(answer) == []
    idle.append(conversation.tracker.idle)
    assert idle == [False, True]
    assert kinds(conversation.backend(answer)) == [Kind.MESSAGE_WHILE_IDLE] * len(answer), "once, not twice"


@pytest.mark.parametrize("letter", "HdcfpX")
def test_what_has_no_answer_is_owed_none(letter: str) -> None:
    conversation = Conversation()
    conversation.frontend(letter)
    assert conversation.tracker.idle


@pytest.mark.parametrize("status", "ITE")
def test_transaction_status_is_the_last_ready_for_querys(status: str) -> None:
    conversation = Conversation()
    conversation.talk("> Q < C")
    assert conversation.tracker.transaction_status == "I"
    conversation.backend(IN_TRANSACTION.replace(b"T", status.encode()))
    assert conversation.tracker.transaction_status == status


def test_directions_are_not_mixed_up() -> None:
    """D is a Describe one way and a DataRow the other; both tables are asked in the right direction."""
    conversation = Conversation()
    assert kinds(conversation.backend("D")) == [Kind.MESSAGE_WHILE_IDLE]
    [verdict] = conversation.verdicts
    assert verdict.message is not None
    assert (verdict.message.direction, verdict.message.name) == (Direction.BACKEND, "DataRow")
    assert conversation.frontend("D") == []
