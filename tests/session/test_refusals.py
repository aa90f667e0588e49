"""connection-exhaustion: the server has no slot for a login, and says itself for which limit, if it is PostgreSQL."""

from __future__ import annotations

import pytest

from pgguard.identity import Sender
from pgguard.session.refusals import Replication, replication_asked
from pgguard.session.tracker import Tracker
from pgguard.session.verdicts import Direction, Kind, Limit, Refusal, Verdict
from tests.session.protocol import BACKEND, MODEL, Conversation, error, kinds, message

FULL = error("FATAL", "53300")


def refused(routine: str | None, text: str = "non", **parameters: str) -> Verdict:
    """The verdict on a login that was refused by that function of the server's, in those words."""
    tracker = Tracker({"user": "app", "database": "shop"} | parameters)
    fields = ["SFATAL", "VFATAL", "C53300", f"M{text}", "Fproc.c", "L1", *([f"R{routine}"] if routine else [])]
    data = message("E", "".join(f"{field}\0" for field in [*fields, ""]).encode())
    assert tracker.backend(data, 0, len(data)) == 0
    assert tracker.verdict is not None
    assert tracker.verdict.kind is Kind.CONNECTION_EXHAUSTION
    return tracker.verdict


@pytest.mark.parametrize("script", ["", "< R", "< R > p", "< NR > p < R"])
def test_login_that_is_refused_for_want_of_a_slot(script: str) -> None:
    """At once, as max_connections is; or after the password, as a role's and a database's limits are."""
    conversation = Conversation(login=False)
    conversation.talk(script)
    [verdict] = conversation.backend(FULL)
    assert verdict.kind is Kind.CONNECTION_EXHAUSTION
    assert verdict.message is not None
    assert (verdict.message.direction, verdict.message.name) == (Direction.BACKEND, "ErrorResponse")
    assert verdict.message.size == len(FULL)
    assert (verdict.intruder, verdict.requesters) == (None, (MODEL,))
    assert (verdict.open_request, verdict.open_transaction, verdict.libpq) == (False, False, None)


@pytest.mark.parametrize(
    ("routine", "refusal", "why"),
    [
        ("InitProcess", Refusal(Limit.SERVER), "all its slots are taken (max_connections)"),
        ("ProcessStartupPacket", Refusal(Limit.SERVER), "all its slots are taken (max_connections)"),
        ("BackendInitialize", Refusal(Limit.SERVER), "all its slots are taken (max_connections)"),
        (
            "InitPostgres",
            Refusal(Limit.RESERVED),
            ("all its slots are taken, except reserved ones (superuser_reserved_connections, reserved_connections)"),
        ),
        (
            "InitializeSessionUserId",
            Refusal(Limit.ROLE, "app"),
            'role "app" has as many connections as its CONNECTION LIMIT allows',
        ),
        (
            "CheckMyDatabase",
            Refusal(Limit.DATABASE, "shop"),
            'database "shop" has as many connections as its CONNECTION LIMIT allows',
        ),
    ],
)
def test_the_function_that_refuses_says_for_which_limit_whatever_the_language(
    routine: str, refusal: Refusal, why: str
) -> None:
    verdict = refused(routine, "tut mir leid, schon zu viele Verbindungen")
    assert verdict.refusal == refusal
    assert verdict.reason == f"the server refused the connection: {why}"


def test_a_long_translated_text_does_not_hide_the_function() -> None:
    text = "слишком много подключений для роли " + 62 * "я"
    assert refused("InitializeSessionUserId", text).refusal == Refusal(Limit.ROLE, "app")


@pytest.mark.parametrize("routine", [None, "kiwi_fe_error", "InitProcess2", ""])
def test_whoever_names_no_function_of_postgresqls_does_not_say_which_limit(routine: str | None) -> None:
    """Odyssey, which uses the SQLSTATE for limits of its own, and whatever imitates the server."""
    verdict = refused(routine, "too many tcp connections")
    assert verdict.refusal == Refusal(None)
    assert verdict.reason == (
        'the server refused the connection: "too many tcp connections" (it doesn\'t say which limit it means)'
    )


def test_a_database_that_is_not_named_is_the_users_own() -> None:
    assert refused("CheckMyDatabase", database="").refusal == Refusal(Limit.DATABASE, "app")


def test_a_wal_sender_has_a_limit_of_its_own() -> None:
    text = "Anzahl angeforderter Standby-Verbindungen überschreitet »max_wal_senders« (aktuell 2)"
    assert refused("InitProcess", text, replication="true").refusal == Refusal(Limit.WAL_SENDERS)
    # Up to 11 it had none, and the server has left in which of both it is.
    assert refused("InitProcess", "sorry, too many clients already", replication="database").refusal == Refusal(None)
    assert refused("InitProcess", "sorry, too many clients already", replication="false").refusal == Refusal(
        Limit.SERVER
    )


@pytest.mark.parametrize(
    ("value", "asked"),
    [
        ("database", Replication.LOGICAL),
        ("DATABASE", Replication.NONE),
        *((value, Replication.PHYSICAL) for value in ("true", "TRUE", "t", "yes", "y", "on", "1")),
        *((value, Replication.NONE) for value in ("", "false", "no", "off", "0", "o", "11", "truely")),
    ],
)
def test_what_a_replication_parameter_asks_for(value: str, asked: Replication) -> None:
    assert replication_asked(value) is asked


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


TEXT = b"Ecould not fork new process for connection: Resource temporarily unavailable\n\0"


@pytest.mark.parametrize("text", [TEXT, b"E\xc3\xa4 could not fork\n\0"])
@pytest.mark.parametrize("size", [1, 4, 5, 7, 100])
def test_a_refusal_in_the_words_of_protocol_2_is_no_torn_message(text: bytes, size: int) -> None:
    """PostgreSQL speaks so still, when it can't start a backend; the text is all that comes, in whatever pieces."""
    conversation = Conversation(login=False)
    for at in range(0, len(text), size):
        assert conversation.backend(text[at : at + size]) == []
    assert conversation.tracker.over
    assert conversation.tracker.goodbye
    assert conversation.tracker.lost is None
    assert conversation.tracker.backend_eof(0) == []


def test_the_same_bytes_after_login_are_a_torn_message() -> None:
    conversation = Conversation()
    conversation.backend(TEXT)
    [verdict] = conversation.tracker.backend_eof(len(TEXT))
    assert verdict.kind is Kind.PROTOCOL_VIOLATION
