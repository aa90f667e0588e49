"""After a verdict: overruled, swallowed or lost; and what is said when a stream ends."""

from __future__ import annotations

import pytest

from pgguard.identity import Sender
from pgguard.session.tracker import Tracker
from pgguard.session.verdicts import Direction, Kind, Party, RequestState
from pgguard.wire.messages import HEADER_SIZE
from tests.session.protocol import (
    BACKEND,
    FRONTEND,
    IN_TRANSACTION,
    LOGIN,
    MODEL,
    Conversation,
    error,
    kinds,
    message,
    query,
)


def logged_in() -> Tracker:
    tracker = Tracker({"user": "app"}, MODEL)
    assert tracker.backend(LOGIN, 0, len(LOGIN)) == len(LOGIN)
    return tracker


class TestVerdicts:
    def test_stop_at_the_offending_message(self) -> None:
        """What stands in front of it is in order, and what stands behind it has not been looked at."""
        tracker = logged_in()
        chunk = BACKEND["N"] + BACKEND["D"] + BACKEND["C"]
        at = len(BACKEND["N"])
        assert tracker.backend(chunk, 0, len(chunk)) == at
        assert tracker.verdict is not None
        assert tracker.verdict.start == at
        assert tracker.verdict.message is not None
        assert tracker.verdict.message.name == "DataRow"

    def test_fall_again_unless_ruled_on(self) -> None:
        """A message is not let through by being presented twice."""
        tracker = logged_in()
        chunk = BACKEND["C"]
        for _ in range(2):
            assert tracker.backend(chunk, 0, len(chunk)) == 0
            assert tracker.verdict is not None


class TestOverrule:
    def test_is_for_one_message(self) -> None:
        tracker = logged_in()
        chunk = BACKEND["D"] + BACKEND["C"]
        assert tracker.backend(chunk, 0, len(chunk)) == 0
        tracker.overrule()
        assert tracker.verdict is None
        assert tracker.backend(chunk, 0, len(chunk)) == len(BACKEND["D"])
        assert tracker.verdict is not None

    @pytest.mark.parametrize("letter", "DTC1Zt")
    def test_stray_message_leaves_the_request_alone(self, letter: str) -> None:
        """In front of an answer it is passed over, and the answer then fits."""
        conversation = Conversation()
        assert kinds(conversation.backend(letter)) == [Kind.MESSAGE_WHILE_IDLE]
        assert conversation.talk("> PBES < 12CZ") == []

    def test_ready_for_query_ends_the_request(self) -> None:
        """Whatever it left out, a server that is ready answers no more of it: the count is right again."""
        conversation = Conversation()
        assert kinds(conversation.talk("> PBDES < 1Z")) == [Kind.UNEXPECTED_RESPONSE]
        assert conversation.tracker.idle
        assert conversation.talk("> Q < TDCZ") == []

    def test_ready_for_query_ends_only_the_first_request(self) -> None:
        conversation = Conversation()
        assert kinds(conversation.talk("> PBES PBES < 1Z")) == [Kind.UNEXPECTED_RESPONSE]
        assert conversation.backend("12CZ") == []
        assert conversation.tracker.idle

    def test_request_while_busy_is_answered_in_turn(self) -> None:
        conversation = Conversation()
        assert kinds(conversation.talk("> Q Q Q")) == [Kind.REQUEST_WHILE_BUSY] * 2
        assert conversation.backend("TDCZ CZ EZ".replace(" ", "")) == []
        assert conversation.tracker.idle
        states = [request.state for request in conversation.tracker.requests_seen()]
        assert states == [RequestState.ANSWERED, RequestState.ANSWERED, RequestState.FAILED]

    def test_copy_data_out_of_place_change_nothing(self) -> None:
        conversation = Conversation()
        assert kinds(conversation.frontend("d")) == [Kind.PROTOCOL_VIOLATION]
        assert conversation.talk("> Q < TDCZ") == []

    @pytest.mark.parametrize(("direction", "data"), [
        (Direction.FRONTEND, message("S", b"x")),
        (Direction.FRONTEND, message("C", b"?name\0")),
        (Direction.FRONTEND, message("D", b"?name\0")),
        (Direction.BACKEND, message("3", b"x")),
        (Direction.BACKEND, message("S")),
    ])  # fmt: skip
    def test_malformed_message_that_can_be_framed(self, direction: Direction, data: bytes) -> None:
        """The next message is found all the same, so the session is still followed."""
        conversation = Conversation()
        if direction is Direction.BACKEND:
            conversation.frontend("C")
        assert kinds(conversation.feed(direction, data, MODEL)) == [Kind.PROTOCOL_VIOLATION]
        assert conversation.tracker.lost is None

    def test_malformed_messages_take_their_effect(self) -> None:
        conversation = Conversation()
        conversation.frontend("Q")
        assert kinds(conversation.backend(message("C") + message("Z"))) == [Kind.PROTOCOL_VIOLATION] * 2
        assert conversation.tracker.idle
        assert conversation.tracker.transaction_status == "I", "it has none, so the last stands"

    def test_message_that_is_malformed_and_undue_is_one_fault(self) -> None:
        conversation = Conversation()
        assert kinds(conversation.backend(message("Z"))) == [Kind.PROTOCOL_VIOLATION]

    def test_unknown_type_of_the_servers(self) -> None:
        """As libpq does, skip it by its length."""
        conversation = Conversation()
        [verdict] = conversation.backend(message("?", b"new") + BACKEND["N"])
        assert verdict.kind is Kind.PROTOCOL_VIOLATION
        assert verdict.libpq == "message type 0x3f arrived from server while idle"
        assert conversation.talk("> Q < TDCZ") == []

    @pytest.mark.parametrize("letter", ["W", "K"])
    def test_message_that_is_cut_while_it_is_overruled(self, letter: str) -> None:
        """A verdict that falls on a header alone, whose message then takes long to come, is one verdict."""
        conversation = Conversation(login=letter == "W")
        if letter == "W":
            conversation.frontend("Q")
        stray = message(letter, bytes(400))
        data = stray if letter == "K" else message("W", b"")
        found = [verdict for byte in data for verdict in conversation.backend(bytes([byte]))]
        assert kinds(found) == [Kind.PROTOCOL_VIOLATION]


class TestSwallow:
    @pytest.mark.parametrize("chunked", [False, True])
    def test_servers_message(self, *, chunked: bool) -> None:
        """It never happened, however it comes; and in the middle of it no message could be put."""
        tracker = logged_in()
        stray = message("D", bytes(300))
        chunk = stray + BACKEND["N"]
        stop = 20 if chunked else len(chunk)
        assert tracker.backend(chunk, 0, stop) == 0
        tracker.swallow()
        assert tracker.verdict is None
        assert tracker.backend(chunk, 0, stop) == stop
        assert (tracker.backend_rest == 0) is (not chunked)
        if chunked:
            assert tracker.backend(chunk, stop, len(chunk)) == len(chunk)
        assert tracker.verdict is None
        assert tracker.idle

    def test_clients_terminate(self) -> None:
        """The session lives on, and its owner's next message is judged as if nothing had been."""
        tracker = logged_in()
        child = Sender(200)
        terminate = message("X")
        assert tracker.frontend(terminate, 0, 5, child, 0.0) == 0
        tracker.swallow()
        assert tracker.frontend(terminate, 0, 5, child, 0.0) == 5
        assert not tracker.terminated
        select = query("SELECT 1")
        assert tracker.frontend(select, 0, len(select), MODEL, 0.0) == len(select)
        assert not tracker.idle

    def test_without_a_verdict(self) -> None:
        with pytest.raises(ValueError, match="no message"):
            logged_in().swallow()

    def test_message_of_which_a_part_is_forwarded(self) -> None:
        """Half a message can't be taken back."""
        tracker = logged_in()
        insert = query("x" * 5000)
        assert tracker.frontend(insert, 0, 2000, MODEL, 0.0) == 2000
        assert tracker.frontend(insert, 0, 100, Sender(200), 0.0) == 0
        with pytest.raises(ValueError, match="in part"):
            tracker.swallow()


class TestLost:
    @pytest.mark.parametrize(("direction", "header"), [
        (Direction.FRONTEND, b"?\0\0\0\x04"),
        (Direction.FRONTEND, b"Q\0\0\0\x03"),
        (Direction.FRONTEND, b"Q\x7f\xff\xff\xff"),
        (Direction.FRONTEND, b"S\0\0\x27\x11"),
        (Direction.BACKEND, b"D\0\0\0\x03"),
        (Direction.BACKEND, b"D\xff\xff\xff\xff"),
        (Direction.BACKEND, b"?\0\1\0\0"),
    ])  # fmt: skip
    def test_when_the_next_message_cannot_be_found(self, direction: Direction, header: bytes) -> None:
        conversation = Conversation()
        [verdict] = conversation.feed(direction, header, MODEL)
        assert verdict.kind is Kind.PROTOCOL_VIOLATION
        assert conversation.tracker.lost is not None
        assert conversation.held(direction) == len(header), "nothing of it has been passed as being in order"


class TestEndOfTheClientsStream:
    @pytest.mark.parametrize("script", ["> X", "> Q X < TD", "> PBES X"])
    def test_behind_terminate(self, script: str) -> None:
        conversation = Conversation()
        conversation.talk(script)
        assert conversation.tracker.frontend_eof(0) == []

    def test_behind_the_servers_goodbye(self) -> None:
        conversation = Conversation()
        conversation.backend(error("FATAL", "57P01"))
        assert conversation.tracker.frontend_eof(0) == []

    def test_behind_the_end_of_the_servers_stream(self) -> None:
        """A server that crashes, or has shut down a replication, says nothing; its client did nothing wrong."""
        conversation = Conversation()
        conversation.talk("> Q < WdC")
        assert conversation.tracker.backend_eof(0) == []
        assert conversation.tracker.frontend_eof(0) == []

    @pytest.mark.parametrize("script", ["", "< R", "< R > p"])
    def test_login_abandoned(self, script: str) -> None:
        conversation = Conversation(login=False)
        conversation.talk(script)
        assert conversation.tracker.frontend_eof(0) == []

    @pytest.mark.parametrize(("script", "request_open", "transaction_open", "when"), [
        ("", False, False, "between two requests"),
        ("> Q < TDCZ", False, False, "between two requests"),
        ("> Q", True, False, "in the middle of a request"),
        ("> PBES < 12", True, False, "in the middle of a request"),
        ("> PBES < 12C", False, False, "with no work in progress, before its last messages were answered"),
        ("> CS", False, False, "with no work in progress, before its last messages were answered"),
        ("> PDH < 1", False, False, "with no work in progress, before its last messages were answered"),
        ("> S", False, False, "with no work in progress, before its last messages were answered"),
        ("> CS PBES < 3Z", True, False, "in the middle of a request"),
        ("> F", True, False, "in the middle of a request"),
        ("> Q < Gd", True, False, "in the middle of a request"),
        ("> Q < W", True, False, "in the middle of a request"),
        ("> Q < EZ", False, False, "between two requests"),
        ("> PBE < E", False, False, "between two requests"),
        ("> Q < C", True, False, "in the middle of a request"),
    ])  # fmt: skip
    def test_without_terminate(self, script: str, when: str, *, request_open: bool, transaction_open: bool) -> None:
        conversation = Conversation()
        conversation.talk(script)
        [verdict] = conversation.tracker.frontend_eof(0)
        assert verdict.kind is Kind.UNCLEAN_CLOSE
        assert verdict.reason == f"the client's side ended without Terminate, {when}"
        assert (verdict.open_request, verdict.open_transaction) == (request_open, transaction_open)
        assert (verdict.message, verdict.intruder, verdict.requesters) == (None, MODEL, ())

    def test_with_a_transaction_open(self) -> None:
        conversation = Conversation()
        conversation.talk("> Q < C")
        conversation.backend(IN_TRANSACTION)
        [verdict] = conversation.tracker.frontend_eof(0)
        assert verdict.reason.endswith("with a transaction open")
        assert (verdict.open_request, verdict.open_transaction) == (False, True)

    @pytest.mark.parametrize(("sent", "where"), [
        (3, "the client's stream ended 3 bytes into a message"),
        (1500, "the client's stream ended 3506 bytes before the end of a Query message"),
    ])  # fmt: skip
    def test_in_the_middle_of_a_message(self, sent: int, where: str) -> None:
        conversation = Conversation()
        conversation.frontend(query("x" * 5000)[:sent])
        torn, close = conversation.tracker.frontend_eof(conversation.held(Direction.FRONTEND))
        assert (torn.kind, torn.reason) == (Kind.PROTOCOL_VIOLATION, where)
        assert (close.kind, close.open_request) == (Kind.UNCLEAN_CLOSE, True)

    @pytest.mark.parametrize(("script", "expected"), [
        ("", []),
        ("> Q < TDCZ", [(Kind.UNCLEAN_CLOSE, False)]),
        ("> Q < TD", [(Kind.UNCLEAN_CLOSE, True)]),
        ("> Q", [(Kind.UNCLEAN_CLOSE, True)]),
        ("> Q < Wdd", []),
        ("> Q < Wdcd", []),
    ])  # fmt: skip
    def test_by_reset(self, script: str, expected: list[tuple[Kind, bool]]) -> None:
        """A socket closed with bytes unread is reset: an abandoned login, or a stream that is being replicated."""
        conversation = Conversation()
        conversation.talk(script)
        verdicts = conversation.tracker.frontend_eof(0, reset=True)
        assert [(verdict.kind, verdict.open_request) for verdict in verdicts] == expected


class TestTerminateInTheMiddleOfCopyData:
    """The server throws the rows away: unexpected message type 0x58 during COPY from stdin, says its log."""

    REASON = "Terminate came in the middle of COPY data, which the server throws away"

    @pytest.mark.parametrize("script", [
        "> Q < G > d",
        "> Q < TDC G > dddH",
        "> Q < G > dc < C G > d",
        "> PBE H < 12G > d",
        "> PBDES < 12nG > dS",
        "> Q d < G",
    ])  # fmt: skip
    def test_is_an_unclean_close_with_work_open(self, script: str) -> None:
        conversation = Conversation()
        conversation.talk(script)
        [verdict] = conversation.frontend("X")
        assert (verdict.kind, verdict.reason, verdict.intruder) == (Kind.UNCLEAN_CLOSE, self.REASON, MODEL)
        assert verdict.open_request
        assert verdict.message is not None
        assert (verdict.message.name, verdict.message.size) == ("Terminate", 5)
        assert verdict.libpq is None, "it is the server's log that says something, and the client has gone"
        assert conversation.tracker.terminated
        assert conversation.tracker.frontend_eof(0) == [], "it is told once"

    @pytest.mark.parametrize("script", [
        "> Q < G",
        "> Q d",
        "> Q < G > dc",
        "> Q < G > ddf",
        "> Q < G > dc < C",
        "> Q < G > dc < CZ",
        "> Q < G > dc < C G",
        "> Q < G > d < E",
        "> Q < G > d < EZ > d",
        "> Q < G > d < EZ > Q < G",
        "> PBES < 12G > dcS",
        "> PBES < 12G > d < E",
        "> Q < W > d",
        "> Q < Wd > dd < d",
        "> Q < Hd",
        "> Q < TD",
    ])  # fmt: skip
    def test_is_a_clean_close_elsewhere(self, script: str) -> None:
        """No rows on their way, their end said, the COPY failed already, or a stream of replication."""
        conversation = Conversation()
        assert conversation.talk(script + "> X") == []

    @pytest.mark.parametrize("cut", [1, 4])
    def test_torn_over_two_chunks_is_one_fault(self, cut: int) -> None:
        conversation = Conversation()
        conversation.talk("> Q < G > d")
        assert conversation.frontend(FRONTEND["X"][:cut]) == []
        assert kinds(conversation.frontend(FRONTEND["X"][cut:])) == [Kind.UNCLEAN_CLOSE]

    def test_from_a_process_that_had_no_right_to_it_is_that_alone(self) -> None:
        conversation = Conversation()
        conversation.talk("> Q < G > d")
        assert kinds(conversation.frontend("X", Sender(200))) == [Kind.FOREIGN_TERMINATE]

    def test_from_nobody_knows_whom_is_asked_about_first(self) -> None:
        """It may be found to be the opener's, and is its unclean close then."""
        conversation = Conversation(None)
        conversation.tracker.introduce(Sender(100, sampled=True), asks_goodbye=True)
        conversation.talk("> Q < G > d")
        assert kinds(conversation.frontend("X")) == [Kind.FOREIGN_TERMINATE, Kind.UNCLEAN_CLOSE]


class TestEndOfTheServersStream:
    @pytest.mark.parametrize("script", ["", "> Q", "> Q < TD"])
    def test_between_messages(self, script: str) -> None:
        """That a server is gone is no fault of the client's use of it."""
        conversation = Conversation()
        conversation.talk(script)
        assert conversation.tracker.backend_eof(0) == []

    def test_in_the_middle_of_a_message(self) -> None:
        conversation = Conversation()
        conversation.talk("> Q < T")
        conversation.backend(message("D", bytes(1000))[:500])
        [verdict] = conversation.tracker.backend_eof(0)
        assert verdict.kind is Kind.PROTOCOL_VIOLATION
        assert verdict.reason == "the server's stream ended 505 bytes before the end of a DataRow message"
        assert (verdict.by, verdict.ends, verdict.intruder) == (Party.SERVER, True, None)

    @pytest.mark.parametrize("how", ["Terminate", "end", "reset"])
    def test_in_the_middle_of_a_message_to_a_client_that_has_gone(self, how: str) -> None:
        """A server that looks whether its client is still there gives up wherever it is."""
        conversation = Conversation()
        conversation.talk("> Q < T")
        conversation.backend(message("D", bytes(1000))[:500])
        if how == "Terminate":
            conversation.frontend("X")
        else:
            conversation.tracker.frontend_eof(0, reset=how == "reset")
        assert conversation.tracker.backend_eof(0) == []

    @pytest.mark.parametrize("cut", [5, 100])
    def test_in_the_middle_of_a_message_of_type_zero(self, cut: int) -> None:
        """It is one like any other that isn't known, however it comes in pieces."""
        conversation = Conversation()
        strange = message("\0", bytes(1000))
        assert kinds(conversation.backend(strange[:cut])) == [Kind.PROTOCOL_VIOLATION]
        conversation.backend(strange[cut:500])
        [verdict] = conversation.tracker.backend_eof(0)
        assert verdict.message is not None
        assert verdict.message.size == len(strange)
        assert verdict.reason.startswith("the server's stream ended 505 bytes before the end of a")

    def test_in_the_middle_of_a_header(self) -> None:
        conversation = Conversation()
        conversation.backend(b"N\0")
        [verdict] = conversation.tracker.backend_eof(conversation.held(Direction.BACKEND))
        assert verdict.reason == "the server's stream ended 2 bytes into a message"
        assert (verdict.by, verdict.ends, verdict.intruder) == (Party.SERVER, True, None)


@pytest.mark.parametrize(
    ("script", "sent", "kind"),
    [
        ("", BACKEND["D"], Kind.MESSAGE_WHILE_IDLE),
        ("> Q", BACKEND["1"], Kind.UNEXPECTED_RESPONSE),
        ("> Q", message("?"), Kind.PROTOCOL_VIOLATION),
        ("> Q", message("Z"), Kind.PROTOCOL_VIOLATION),
    ],
)
def test_what_the_server_sends_is_its_own_doing(script: str, sent: bytes, kind: Kind) -> None:
    conversation = Conversation()
    conversation.talk(script)
    [verdict] = conversation.backend(sent)
    assert (verdict.kind, verdict.by, verdict.ends, verdict.intruder) == (kind, Party.SERVER, False, None)


def test_what_the_client_sends_and_leaves_undone_is_the_clients() -> None:
    conversation = Conversation()
    [sent] = conversation.frontend(message("?"))
    assert (sent.kind, sent.by, sent.ends) == (Kind.PROTOCOL_VIOLATION, Party.CLIENT, False)
    conversation.frontend(query("x" * 5000)[:1500])
    for verdict in conversation.tracker.frontend_eof(0):
        assert (verdict.by, verdict.ends) == (Party.CLIENT, True)


def test_a_connection_refused_for_want_of_slots_is_over_and_not_the_servers_doing() -> None:
    [verdict] = Conversation(login=False).backend(message("E", b"SFATAL\0VFATAL\0C53300\0\0"))
    assert (verdict.kind, verdict.by, verdict.ends) == (Kind.CONNECTION_EXHAUSTION, Party.CLIENT, True)


@pytest.mark.parametrize("letter", sorted(FRONTEND.keys() | {"F", "p", "f"}))
@pytest.mark.parametrize("behind", [b"", b"\xff"])
def test_a_message_without_a_body_may_be_overruled_at_the_end_of_a_chunk(letter: str, behind: bytes) -> None:
    tracker = Conversation().tracker
    chunk, done = message(letter) + behind, 0
    for _ in range(3):
        done = tracker.frontend(chunk, 0, HEADER_SIZE, None, 0.0)
        if done == HEADER_SIZE:
            break
        assert tracker.verdict is not None
        tracker.overrule()
    assert done == HEADER_SIZE
    assert tracker.lost is None
