"""What a verdict tells: the requests with their text and state, and the words that libpq has for the symptom."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pgguard.identity import Sender
from pgguard.session import libpq
from pgguard.session.verdicts import Kind, RequestState
from pgguard.wire.messages import TEXT_LIMIT
from tests.session.protocol import DESCRIBE_STATEMENT, Conversation, bind, message, parse, query

if TYPE_CHECKING:
    from collections.abc import Callable


def states(conversation: Conversation) -> list[RequestState]:
    return [request.state for request in conversation.tracker.requests_seen()]


class TestText:
    def test_of_a_query(self) -> None:
        conversation = Conversation()
        conversation.frontend(query("SELECT 1"))
        [request] = conversation.tracker.requests_seen()
        assert (request.sql, request.sql_cut, request.messages) == (b"SELECT 1", False, "Q")

    @pytest.mark.parametrize("build", [query, parse])
    @pytest.mark.parametrize("length", [TEXT_LIMIT - 1, TEXT_LIMIT, 5 * TEXT_LIMIT])
    def test_is_kept_up_to_a_limit(self, build: Callable[[str], bytes], length: int) -> None:
        """The terminator has to be within it for the text to count as whole."""
        conversation = Conversation()
        conversation.frontend(build("x" * length))
        [request] = conversation.tracker.requests_seen()
        assert request.sql == b"x" * min(length, TEXT_LIMIT)
        assert request.sql_cut is (length >= TEXT_LIMIT)

    def test_of_a_prepared_statement_by_its_name(self) -> None:
        conversation = Conversation()
        conversation.frontend(parse("SELECT $1", "one") + parse("SELECT $2", "two") + message("S"))
        conversation.backend("11Z")
        conversation.frontend(bind("two"))
        conversation.frontend("ES")
        conversation.frontend(bind("one"))
        assert [request.sql for request in conversation.tracker.requests_seen()] == [
            b"SELECT $1",
            b"SELECT $2",
            b"SELECT $1",
        ]

    def test_of_the_unnamed_statement_is_that_of_its_last_parse(self) -> None:
        conversation = Conversation()
        conversation.frontend(parse("SELECT 1") + message("S") + parse("SELECT 2") + message("S"))
        conversation.backend("1Z1Z")
        conversation.frontend(bind())
        assert conversation.tracker.requests_seen()[-1].sql == b"SELECT 2"

    def test_of_an_unknown_statement_is_not_known(self) -> None:
        """PREPARE in SQL is not seen, and nothing is made up."""
        conversation = Conversation()
        conversation.frontend(bind("prepared_in_sql"))
        assert conversation.tracker.requests_seen()[0].sql is None

    @pytest.mark.parametrize(
        ("second", "answer"),
        [("PS", "EZ"), ("P", "E"), ("PPS", "EZ"), ("PPS", "1EZ")],
        ids=["", "no Sync", "two", "one"],
    )
    def test_of_a_refused_parse_is_forgotten(self, second: str, answer: str) -> None:
        """Its name may still stand for the statement before it, of which the text is not kept."""
        conversation = Conversation()
        conversation.frontend(parse("SELECT 1", "name") + message("S"))
        conversation.backend("1Z")
        texts = iter(["SELECT 3", "SELECT 2"] if len(second) == 3 else ["SELECT 2"])
        for letter in second:
            conversation.frontend(parse(next(texts), "name") if letter == "P" else message("S"))
        conversation.backend(answer)
        conversation.frontend(message("S"))
        conversation.frontend(bind("name"))
        assert conversation.tracker.requests_seen()[-1].sql is None

    def test_of_a_parse_that_is_skipped_is_forgotten_too(self) -> None:
        conversation = Conversation()
        conversation.frontend(parse("SELECT 1", "name") + message("S"))
        conversation.backend("1Z")
        conversation.talk("> BE < E")
        conversation.frontend(parse("SELECT 2", "name") + message("S"))
        conversation.backend("Z")
        conversation.frontend(bind("name"))
        assert conversation.tracker.requests_seen()[-1].sql == b"SELECT 1"

    def test_of_many_statements_is_bounded(self) -> None:
        """The oldest are forgotten."""
        conversation = Conversation()
        for i in range(1000):
            conversation.frontend(parse(f"SELECT {i}", f"s{i}") + message("S"))
            conversation.backend("1Z")
        conversation.frontend(bind("s0") + message("S") + bind("s999") + message("S"))
        first, last = conversation.tracker.requests_seen()[-2:]
        assert (first.sql, last.sql) == (None, b"SELECT 999")

    def test_of_many_statements_in_one_request_is_bounded(self) -> None:
        conversation = Conversation()
        for i in range(1000):
            conversation.frontend(parse(f"SELECT {i}", f"s{i}"))
        conversation.frontend(bind("s999"))
        conversation.frontend("S")
        conversation.backend("1" * 1000 + "2Z")
        conversation.frontend(bind("s999") + message("S") + bind("s100") + message("S"))
        assert [request.sql for request in conversation.tracker.requests_seen()] == [
            b"SELECT 0",
            b"SELECT 999",
            None,
        ]

    def test_of_a_name_longer_than_is_looked_at(self) -> None:
        conversation = Conversation()
        assert conversation.frontend(parse("SELECT 1", "n" * 2000)) == []
        assert conversation.frontend(bind("n" * 2000)) == []
        assert conversation.tracker.requests_seen()[0].sql is None


class TestRequests:
    def test_are_counted_with_their_time(self) -> None:
        conversation = Conversation()
        conversation.now = 17.5
        conversation.talk("> Q < CZ > PBES")
        assert [(r.n, r.at, r.messages) for r in conversation.tracker.requests_seen()] == [
            (1, 17.5, "Q"),
            (2, 17.5, "PBES"),
        ]

    def test_say_whether_everything_before_them_had_been_answered(self) -> None:
        conversation = Conversation()
        conversation.talk("> Q < CZ > Q > PBES < CZ > Q < 12CZ CZ > Q < CZ > H")
        conversation.talk("> PBE")
        seen = conversation.tracker.requests_seen()
        assert [request.at_rest for request in seen] == [True, True, False, False, True, True]

    def test_of_many_messages_are_cut(self) -> None:
        conversation = Conversation()
        conversation.frontend("PBE" * 20)
        [request] = conversation.tracker.requests_seen()
        assert request.messages == ("PBE" * 20)[:32] + "…"

    def test_of_the_past_are_a_few(self) -> None:
        conversation = Conversation()
        conversation.talk("> Q < CZ" * 20)
        assert [request.n for request in conversation.tracker.requests_seen()] == list(range(13, 21))

    def test_outstanding_are_shown_from_the_first_on(self) -> None:
        """In a deep pipeline the one that is being answered is what matters, and then the latest."""
        conversation = Conversation()
        conversation.frontend("PBES" * 100)
        conversation.backend("12CZ" * 10 + "1")
        requests = conversation.tracker.requests_seen()
        assert requests[0].n == 11
        assert [request.n for request in requests[-8:]] == list(range(93, 101))
        assert len(requests) <= 24
        assert [request.state for request in requests] == [
            RequestState.ANSWERING,
            *[RequestState.WAITING] * (len(requests) - 1),
        ]

    @pytest.mark.parametrize(("script", "expected"), [
        ("> Q", "waiting"),
        ("> Q < T", "answering"),
        ("> Q < TDC", "answering"),
        ("> Q < TDCZ", "answered"),
        ("> Q < E", "failed"),
        ("> Q < TDEZ", "failed"),
        ("> PBES", "waiting"),
        ("> PBES < 1", "answering"),
        ("> ES < D", "answering"),
        ("> PBES < 12C", "answering"),
        ("> PBES < 12CZ", "answered"),
        ("> PBE < 12C", "answered"),
        ("> PBES < 1E", "failed"),
        ("> PBES < 12CEZ", "failed"),
        ("> F < V", "answering"),
        ("> Q < Gd", "answering"),
    ])  # fmt: skip
    def test_states(self, script: str, expected: str) -> None:
        conversation = Conversation()
        conversation.talk(script)
        assert states(conversation) == [expected]

    def test_discarded_by_the_server(self) -> None:
        conversation = Conversation()
        conversation.talk("> PBE < E > Q")
        assert states(conversation) == ["failed", "skipped"]

    def test_in_a_pipeline(self) -> None:
        conversation = Conversation()
        conversation.talk("> PBES PBES PBES < 12CZ 1E")
        assert states(conversation) == ["answered", "failed", "waiting"]


class TestWordsOfLibpq:
    def test_for_each_type_while_idle(self) -> None:
        for letter in "TDCZ123ItnsVGHWdcRKv":
            [verdict] = Conversation().backend(letter)
            assert verdict.libpq == f"message type 0x{ord(letter):02x} arrived from server while idle"

    @pytest.mark.parametrize(("script", "letter", "text"), [
        ("> Q", "D", 'server sent data ("D" message) without prior row description ("T" message)'),
        ("> Q", "s", 'unexpected response from server; first received character was "s"'),
        ("> P", "V", 'unexpected response from server; first received character was "V"'),
        ("> P", "C", None),
        ("> F", "T", "protocol error: id=0x54"),
        ("> F < V", "V", 'unexpected response from server; first received character was "V"'),
        ("", "?", "message type 0x3f arrived from server while idle"),
        ("> Q", "?", 'unexpected response from server; first received character was "?"'),
    ])  # fmt: skip
    def test_while_busy(self, script: str, letter: str, text: str | None) -> None:
        conversation = Conversation()
        conversation.talk(script)
        [verdict] = conversation.backend(message("?", b"1") if letter == "?" else letter)
        assert verdict.libpq == text

    def test_during_the_login_it_has_none_that_is_certain(self) -> None:
        [verdict] = Conversation(login=False).backend("T")
        assert verdict.libpq is None
        assert verdict.reason.endswith("the answer to the login")

    @pytest.mark.parametrize(("header", "text"), [
        (b"D\0\0\0\x03", 'lost synchronization with server: got message type "D", length 3'),
        (b"D\xff\xff\xff\xff", 'lost synchronization with server: got message type "D", length -1'),
        (b"C\0\0\x75\x31", 'lost synchronization with server: got message type "C", length 30001'),
        (b"?\0\0\x75\x31", 'lost synchronization with server: got message type "?", length 30001'),
    ])  # fmt: skip
    def test_for_lengths(self, header: bytes, text: str) -> None:
        [verdict] = Conversation().backend(header)
        assert verdict.libpq == text

    def test_are_the_servers_where_the_client_is_at_fault(self) -> None:
        assert Conversation().frontend(b"?\0\0\0\x04")[0].libpq == "invalid frontend message type 63"
        assert Conversation().frontend("p")[0].libpq == "invalid frontend message type 112"
        conversation = Conversation()
        conversation.talk("> Q < G")
        assert conversation.frontend("Q")[0].libpq == "unexpected message type 0x51 during COPY from stdin"

    @pytest.mark.parametrize(("sql", "answer"), [
        ("SELECT 1", "T"),
        ("  (select 1)", "T"),
        ("VALUES (1)", "T"),
        ("SHOW work_mem", "T"),
        ("EXPLAIN DELETE FROM t", "T"),
        ("SELECT 1 INTO t", None),
        ("INSERT INTO t VALUES (1)", "C"),
        ("UPDATE t SET a = 1 RETURNING a", "T"),
        ("BEGIN;", "C"),
        ("set a = 1", "C"),
        ("WITH x AS (SELECT 1) SELECT 1", None),
        ("CALL p()", None),
        ("COPY t FROM STDIN", None),
        ("", None),
    ])  # fmt: skip
    def test_for_the_answer_that_will_come(self, sql: str, answer: str | None) -> None:
        """It goes to a process that is idle; what can't be told from the text's first word is left out."""
        conversation = Conversation(Sender(1))
        conversation.frontend("Q")
        [verdict] = conversation.frontend(query(sql), Sender(2))
        assert verdict.kind is Kind.SHARED_BY_PROCESSES
        expected = None if answer is None else f"message type 0x{ord(answer):02x} arrived from server while idle"
        assert verdict.libpq == expected

    def test_for_the_answer_to_each_extended_message(self) -> None:
        assert [libpq.first_answer(letter, None) for letter in "PBCSFEdX"] == [
            "1",
            "2",
            "3",
            "Z",
            "V",
            None,
            None,
            None,
        ]

    def test_of_a_describe_are_left_out(self) -> None:
        conversation = Conversation(Sender(1))
        conversation.frontend("Q")
        assert conversation.frontend(DESCRIBE_STATEMENT, Sender(2))[0].libpq is None


class TestReasons:
    @pytest.mark.parametrize(("script", "reason"), [
        ("< D", "the server sent DataRow while no request was outstanding"),
        ("> PBE < C", "the server sent CommandComplete, which can't belong to the answer to request 1 (PBE)"),
        ("> Q Q", "Query was sent before the answer to request 1 (Q) was complete"),
        ("> d", "the client sent CopyData although no COPY was in progress"),
        ("> p", "the client sent PasswordMessage although no authentication was in progress"),
        ("> Q < G > P", "the client sent Parse while the server expected COPY data"),
    ])  # fmt: skip
    def test_are_clauses(self, script: str, reason: str) -> None:
        [verdict] = Conversation().talk(script)
        assert verdict.reason == reason

    def test_of_malformed_messages_name_the_length(self) -> None:
        assert (
            Conversation().frontend(b"Q\xff\xff\xff\xff")[0].reason
            == "the client sent Query with an impossible length of -1"
        )
        assert Conversation().frontend(b"?\0\0\0\x04")[0].reason == "the client sent a message of unknown type '?'"
        [verdict] = Conversation().frontend(message("C", b"?x\0"))
        assert verdict.reason == "the client sent Close with neither a statement nor a portal to act on"
