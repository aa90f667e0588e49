"""connection-exhaustion: the server has no slot for a login, and that is told from everything that looks like it."""

from __future__ import annotations

import pytest

from pgguard.session.verdicts import Direction, Kind, Sender
from tests.session.protocol import BACKEND, MODEL, Conversation, error, kinds

FULL = error("FATAL", "53300")


@pytest.mark.parametrize("script", ["", "< R", "< R > p", "< NR > p < R"])
def test_login_that_is_refused_for_want_of_a_slot(script: str) -> None:
    """At once, as max_connections is; or after the password, as a role's and a database's limits are."""
    conversation = Conversation(login=False)
    conversation.talk(script)
    [verdict] = conversation.backend(FULL)
    assert verdict.kind is Kind.CONNECTION_EXHAUSTION
    assert verdict.reason == "the server refused the connection for want of a slot"
    assert verdict.message is not None
    assert (verdict.message.direction, verdict.message.name) == (Direction.BACKEND, "ErrorResponse")
    assert verdict.message.size == len(FULL)
    assert (verdict.intruder, verdict.requesters) == (None, (MODEL,))
    assert (verdict.open_request, verdict.open_transaction, verdict.libpq) == (False, False, None)


def test_refusal_reaches_the_client_and_ends_the_session() -> None:
    """Overruled, it is what it would have been: the server's goodbye, told once, and the client owes no Terminate."""
    conversation = Conversation(login=False)
    conversation.backend(FULL)
    assert conversation.tracker.goodbye
    assert conversation.tracker.over
    assert conversation.held(Direction.BACKEND) == 0
    assert conversation.tracker.idle
    assert conversation.tracker.backend_eof(0) == []
    assert conversation.tracker.frontend_eof(0) == []


def test_refusal_that_comes_byte_by_byte_is_told_once() -> None:
    conversation = Conversation(login=False)
    assert kinds([v for byte in FULL for v in conversation.backend(bytes([byte]))]) == [Kind.CONNECTION_EXHAUSTION]


@pytest.mark.parametrize("sqlstate", ["28P01", "3D000", "57P03", "53400", "28000"])
def test_login_that_is_refused_for_another_reason_is_no_exhaustion(sqlstate: str) -> None:
    conversation = Conversation(login=False)
    assert conversation.backend(error("FATAL", sqlstate)) == []
    assert conversation.tracker.goodbye


@pytest.mark.parametrize("script", ["> Q", "> Q < TD", "> PBES < 1"])
@pytest.mark.parametrize("severity", ["ERROR", "FATAL"])
def test_other_errors_with_that_sqlstate_are_an_answer(script: str, severity: str) -> None:
    """A function of dblink's or postgres_fdw's that finds another server full says so in its own session."""
    conversation = Conversation()
    conversation.talk(script)
    assert conversation.backend(error(severity, "53300")) == []


def test_idle_session_that_is_ended_with_that_sqlstate_is_told_goodbye() -> None:
    conversation = Conversation()
    assert conversation.backend(FULL) == []
    assert conversation.tracker.goodbye


def test_login_that_had_a_slot_is_in_order() -> None:
    conversation = Conversation(Sender(1, 1), login=False)
    assert conversation.backend(b"".join(BACKEND[letter] for letter in "RSSKZ")) == []
