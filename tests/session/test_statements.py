"""Session state that is lost: the server's error contradicts what this session has done to a prepared statement."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pgguard.session.quiet import Effect, judge
from pgguard.session.verdicts import Direction, Kind, Verdict
from tests.session.protocol import Conversation, bind, close, describe, error, kinds, message, parse, query

if TYPE_CHECKING:
    from collections.abc import Callable

EXISTS = error(sqlstate="42P05")
GONE = error(sqlstate="26000")
READY = message("Z", b"I")
SYNC = message("S")


class Session(Conversation):
    """Says what a driver says, and answers as a server does that has no objection."""

    def prepare(self, name: str, sql: str = "SELECT 1") -> None:
        self.frontend(parse(sql, name) + SYNC)
        self.backend("1Z")

    def execute(self, name: str, portal: str = "") -> None:
        self.frontend(bind(name, portal) + message("E", portal.encode() + b"\0\0\0\0\0") + SYNC)
        self.backend("2CZ")

    def say(self, sql: str) -> None:
        self.frontend(query(sql))
        self.backend("CZ")

    def refused(self, request: bytes, refusal: bytes) -> list[Verdict]:
        """What is said of it when the first of these messages is refused."""
        self.frontend(request + SYNC)
        return self.backend(refusal + READY)


@pytest.fixture
def session() -> Session:
    return Session()


class TestOfAnother:
    """A name that this session never made is taken: 42P05."""

    def test_is_told(self, session: Session) -> None:
        [verdict] = session.refused(parse("SELECT 1", "_pg3_0"), EXISTS)
        assert verdict.kind is Kind.SESSION_STATE_LOST
        assert (
            verdict.reason
            == 'the server says that prepared statement "_pg3_0" already exists, but this session never made it'
        )
        assert verdict.libpq == 'prepared statement "_pg3_0" already exists'
        assert verdict.message is not None
        assert (verdict.message.direction, verdict.message.name) == (Direction.BACKEND, "ErrorResponse")
        assert (verdict.intruder, verdict.open_request) == (None, True)
        assert session.tracker.idle, "the error is taken as any other"
        assert kinds(session.backend("C")) == [Kind.MESSAGE_WHILE_IDLE]

    def test_is_told_of_one_that_was_closed(self, session: Session) -> None:
        session.prepare("s")
        session.frontend(close("s") + SYNC)
        session.backend("3Z")
        [verdict] = session.refused(parse("SELECT 1", "s"), EXISTS)
        assert verdict.reason.endswith("but this session has closed it")

    @pytest.mark.parametrize("before", [
        "SELECT 1",
        "BEGIN",
        "SET search_path TO app; SELECT count(*) FROM t WHERE a IN (1, 2)",
        "INSERT INTO \"users\" (\"name\", n) VALUES ('deallocate all; prepare s', now()) RETURNING \"id\"",
        "/*controller='a',pid='7'*/ UPDATE t SET a = coalesce(b, 'it''s'), prepared = true",
        "DELETE FROM t WHERE pg_catalog.lower(c) = d -- (deallocate)",
        "CREATE TABLE IF NOT EXISTS t (a varchar(10) PRIMARY KEY, b int REFERENCES u (b), CHECK (a > b))",
        "DECLARE c CURSOR FOR SELECT max(a) FROM t; FETCH 10 FROM c",
        "WITH RECURSIVE t (n) AS (VALUES (1) UNION ALL SELECT n + 1 FROM t) SELECT sum(n) OVER (ORDER BY n) FROM t",
        "INSERT INTO t VALUES (1) ON CONFLICT (a) DO NOTHING",
    ])  # fmt: skip
    def test_is_told_behind_texts_that_leave_names_alone(self, session: Session, before: str) -> None:
        session.say(before)
        session.frontend(parse(before) + bind() + message("E", b"\0\0\0\0\0") + SYNC)
        session.backend("12CZ")
        assert kinds(session.refused(parse("SELECT 1", "s"), EXISTS)) == [Kind.SESSION_STATE_LOST]

    def test_is_told_in_a_pipeline(self, session: Session) -> None:
        session.frontend(parse("SELECT 1", "a") + bind("a") + parse("SELECT 2", "b") + bind("b") + SYNC)
        assert kinds(session.backend("12" + "") + session.backend(EXISTS + READY)) == [Kind.SESSION_STATE_LOST]

    @pytest.mark.parametrize("chunk", [1, 7])
    def test_is_told_however_the_error_is_cut(self, session: Session, chunk: int) -> None:
        session.frontend(parse("SELECT 1", "s") + SYNC)
        data = EXISTS + READY
        found = [v for i in range(0, len(data), chunk) for v in session.backend(data[i : i + chunk])]
        assert kinds(found) == [Kind.SESSION_STATE_LOST]


class TestItsOwn:
    """A name that this session made, and has not closed, is gone: 26000."""

    @pytest.mark.parametrize("use", [bind("s"), describe("s"), bind("s", "portal")])
    def test_is_told(self, session: Session, use: bytes) -> None:
        session.prepare("s")
        session.execute("s")
        [verdict] = session.refused(use, GONE)
        assert verdict.kind is Kind.SESSION_STATE_LOST
        assert verdict.reason == (
            'the server says that prepared statement "s" does not exist, but this session made it and has not closed it'
        )
        assert verdict.libpq == 'prepared statement "s" does not exist'

    def test_is_told_of_the_unnamed_one(self, session: Session) -> None:
        """As asyncpg does without its cache of statements: Parse and Describe up to a Sync, then Bind and Execute."""
        session.prepare("", "SELECT app.report($1)")
        [verdict] = session.refused(bind(), GONE)
        assert verdict.reason == (
            "the server says that the unnamed prepared statement does not exist, "
            "but this session made it and has not closed it"
        )
        assert verdict.libpq == "unnamed prepared statement does not exist"

    def test_is_told_of_one_that_was_made_again(self, session: Session) -> None:
        session.say("DEALLOCATE ALL")
        session.prepare("s")
        assert kinds(session.refused(bind("s"), GONE)) == [Kind.SESSION_STATE_LOST]

    def test_is_told_although_another_was_deallocated(self, session: Session) -> None:
        """As psycopg makes room in its cache that way."""
        session.prepare("s")
        session.prepare("t")
        session.say('DEALLOCATE "t"')
        assert kinds(session.refused(bind("s"), GONE)) == [Kind.SESSION_STATE_LOST]

    def test_is_told_in_a_session_that_has_said_much(self, session: Session) -> None:
        for n in range(90):
            session.say(f"SELECT app.f({n})")
        session.prepare("s")
        session.say("SELECT 1")
        assert kinds(session.refused(bind("s"), GONE)) == [Kind.SESSION_STATE_LOST]

    def test_is_told_of_a_name_by_as_much_as_the_server_looks_at(self, session: Session) -> None:
        session.prepare("n" * 63 + "a")
        assert kinds(session.refused(bind("n" * 63 + "b"), GONE)) == [Kind.SESSION_STATE_LOST]


UNSURE = [
    "DEALLOCATE ALL",
    "deallocate prepare all",
    "DEALLOCATE s",
    'DEALLOCATE PREPARE "s";',
    "DISCARD ALL",
    "SELECT 1; DISCARD ALL",
    "PREPARE s AS SELECT 1",
    "PREPARE s (int) AS SELECT $1",
    "EXECUTE other",
    "EXPLAIN ANALYZE EXECUTE other",
    "CREATE TEMP TABLE t AS EXECUTE other",
    "DO $$ BEGIN EXECUTE 'DEALLOCATE ALL'; END $$",
    "DO 'BEGIN EXECUTE ''DEALLOCATE ALL''; END'",
    "CALL tidy_up()",
    "SELECT tidy_up()",
    "SELECT app.tidy_up(1)",
    'SELECT "tidy_up" ()',
    "SELECT * FROM tidy_up() AS t(a)",
    "WITH t AS (SELECT tidy_up()) SELECT 1",
    "INSERT INTO t (a) VALUES (tidy_up())",
    "SELECT query_to_xml('DEALLOCATE ALL', true, true, '')",
    "/* a comment */ DEALLOCATE s",
    "-- a comment\nDISCARD ALL",
    "SELECT 'a\\' || tidy_up() --'",
    "SELECT $a$ x $a$ || tidy_up()",
    "SELECT 1 /* /* */ */; DISCARD ALL",
    "SELECT '" + "x" * 2000 + "'",
    "CREATE FUNCTION f() RETURNS int LANGUAGE sql BEGIN ATOMIC SELECT 1; END",
    "LOAD 'tidy'",
]


class TestUnsure:
    """Whatever may have made a name, or dropped it, leaves an error about it without a meaning."""

    @pytest.mark.parametrize("text", UNSURE)
    def test_by_a_simple_query(self, text: str) -> None:
        session = Session()
        session.prepare("s")
        session.say(text)
        assert session.refused(bind("s"), GONE) == []
        session = Session()
        session.say(text)
        assert session.refused(parse("SELECT 1", "s"), EXISTS) == []

    @pytest.mark.parametrize("text", UNSURE)
    def test_by_a_prepared_text_each_time_it_is_executed(self, text: str) -> None:
        session = Session()
        session.prepare("text", text)
        session.prepare("s")
        session.execute("text")
        assert session.refused(bind("s"), GONE) == []
        assert session.refused(parse("SELECT 1", "t"), EXISTS) == []

    def test_by_a_text_that_is_only_prepared_is_none(self, session: Session) -> None:
        session.prepare("s")
        session.prepare("text", "DEALLOCATE ALL")
        assert kinds(session.refused(bind("s"), GONE)) == [Kind.SESSION_STATE_LOST]

    def test_by_a_text_on_its_way(self, session: Session) -> None:
        """The statement was made before, and the answer to that comes afterwards."""
        session.frontend(parse("SELECT 1", "s") + SYNC)
        session.frontend(query("DEALLOCATE ALL"))
        session.backend("1ZCZ")
        assert session.refused(bind("s"), GONE) == []

    def test_by_a_function_call(self, session: Session) -> None:
        session.prepare("s")
        session.talk("> F < VZ")
        assert session.refused(bind("s"), GONE) == []

    def test_by_what_lasts(self, session: Session) -> None:
        """A function that was made, for a trigger it may be, is called where no text says so."""
        session.say("CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN EXECUTE 'DEALLOCATE ALL'; END $$")
        session.prepare("s")
        session.say("INSERT INTO t VALUES (1)")
        assert session.refused(bind("s"), GONE) == []

    @pytest.mark.parametrize("declare", ["DECLARE c CURSOR FOR SELECT tidy_up() FROM t", None])
    def test_by_a_portal_that_goes_on_later(self, session: Session, declare: str | None) -> None:
        if declare is not None:
            session.say(declare)
        else:
            session.prepare("text", "SELECT tidy_up() FROM t")
            session.execute("text", "portal")
        session.prepare("s")
        session.say("FETCH c")
        assert session.refused(bind("s"), GONE) == []

    def test_of_one_that_was_never_made_is_the_applications(self, session: Session) -> None:
        assert session.refused(bind("s"), GONE) == []
        assert session.refused(describe("s"), GONE) == []
        assert session.refused(bind(), GONE) == []

    def test_of_one_that_was_closed_is_the_applications(self, session: Session) -> None:
        session.prepare("s")
        session.frontend(close("s") + SYNC)
        session.backend("3Z")
        assert session.refused(bind("s"), GONE) == []

    def test_of_one_that_is_there_is_the_applications(self, session: Session) -> None:
        session.prepare("s")
        assert session.refused(parse("SELECT 2", "s"), EXISTS) == []

    def test_of_one_whose_parse_failed_is_the_applications(self, session: Session) -> None:
        session.refused(parse("SELEKT 1", "s"), error())
        assert session.refused(bind("s"), GONE) == []
        assert session.refused(parse("SELECT 1", "s"), EXISTS) == []

    def test_of_one_whose_parse_was_discarded_is_the_applications(self, session: Session) -> None:
        session.frontend(bind("nothing") + parse("SELECT 1", "s") + SYNC)
        session.backend(GONE + READY)
        assert session.refused(bind("s"), GONE) == []

    def test_of_one_whose_close_was_discarded_is_the_applications(self, session: Session) -> None:
        session.prepare("s")
        session.frontend(bind("nothing") + close("s") + SYNC)
        session.backend(GONE + READY)
        assert session.refused(parse("SELECT 1", "s"), EXISTS) == []

    @pytest.mark.parametrize("drops", [query("SELECT 1"), parse("SELECT 2"), close()])
    def test_of_the_unnamed_one_that_was_dropped(self, session: Session, drops: bytes) -> None:
        session.prepare("")
        session.frontend(drops + SYNC)
        session.backend({"Q": "CZZ", "P": "EZ", "C": "3Z"}[chr(drops[0])])
        assert session.refused(bind(), GONE) == []

    def test_of_one_that_was_forgotten(self, session: Session) -> None:
        """The table is bounded."""
        for n in range(300):
            session.prepare(f"s{n}")
        assert kinds(session.refused(bind("s299"), GONE)) == [Kind.SESSION_STATE_LOST], "that one is known"
        assert session.refused(parse("SELECT 1", "s0"), EXISTS) == []
        assert session.refused(parse("SELECT 1", "new"), EXISTS) == []
        assert session.refused(bind("s1"), GONE) == []

    def test_in_a_session_that_has_said_much_and_prepared_nothing(self, session: Session) -> None:
        """Not to be looked at for ever, what it has said is not all known."""
        for n in range(300):
            session.say(f"SELECT count(*) FROM t WHERE a = {n}")
        assert session.refused(parse("SELECT 1", "s"), EXISTS) == []

    @pytest.mark.parametrize("sqlstate", ["26000", "42P05"])
    @pytest.mark.parametrize("text", ["EXECUTE s", "PREPARE s AS SELECT 1", "DEALLOCATE s"])
    def test_by_texts_that_the_error_is_about(self, session: Session, text: str, sqlstate: str) -> None:
        session.prepare("s")
        session.frontend(query(text))
        assert session.backend(error(sqlstate=sqlstate) + READY) == []
        session.prepare("text", text)
        session.frontend(bind("text") + message("E", b"\0\0\0\0\0") + SYNC)
        assert session.backend("2") + session.backend(error(sqlstate=sqlstate) + READY) == []

    @pytest.mark.parametrize("refusal", [error(sqlstate="34000"), error(sqlstate="42P03"), error(sqlstate="25P02")])
    def test_other_errors_say_nothing_about_statements(self, session: Session, refusal: bytes) -> None:
        session.prepare("s")
        assert session.refused(bind("s"), refusal) == []
        assert session.refused(parse("SELECT 1", "t"), refusal) == []

    def test_end_of_the_session_says_nothing_about_them(self, session: Session) -> None:
        session.prepare("s")
        assert session.refused(bind("s"), error("FATAL", "26000")) == []


@pytest.mark.parametrize(("text", "name"), [
    ("DEALLOCATE s", b"s"),
    ("deallocate Mixed", b"mixed"),
    ('  DEALLOCATE PREPARE "Mixed ""name""" ;', b'Mixed "name"'),
    ("PREPARE s (int, text) AS SELECT $1", b"s"),
    ("PREPARE s AS SELECT 1", b"s"),
])  # fmt: skip
def test_texts_that_say_which_name_they_mean(text: str, name: bytes) -> None:
    assert judge(text.encode()) == (Effect.ONE_NAME, name)


@pytest.mark.parametrize(
    "text", ["DEALLOCATE ALL", "DEALLOCATE s; DEALLOCATE t", "PREPARE TRANSACTION 's'", "DEALLOCATE", "DEALLOCATE s t"]
)
def test_texts_that_may_mean_any(text: str) -> None:
    assert judge(text.encode()).effect is Effect.ANY


class Server:
    """What a backend does with prepared statements, and what it answers; it knows nothing of what is certain."""

    def __init__(self, chance: Callable[[], bool]) -> None:
        self._chance = chance
        self._texts: dict[str, str] = {}
        self._bound = ""

    def answer(self, request: list[tuple[str, str, str]]) -> bytes:
        """Take messages up to a Sync, or a Query alone: what it says."""
        said = b""
        for letter, name, text in request:
            answer = self._take(letter, name, text)
            said += answer
            if answer[:1] == b"E":
                break
        return said + READY

    def _take(self, letter: str, name: str, text: str) -> bytes:
        if letter == "Q":
            self._texts.pop("", None)
            return self._run(text) or message("C", b"DONE\0")
        if letter == "P":
            if not name:
                self._texts.pop("", None)
            elif name in self._texts:
                return EXISTS
            if text == "SELEKT":
                return error()
            self._texts[name] = text
            return message("1")
        if letter == "C":
            self._texts.pop(name, None)
            return message("3")
        if letter == "E":
            return self._run(self._bound) or message("C", b"DONE\0")
        if name not in self._texts:
            return GONE
        self._bound = self._texts[name]
        return message("2") if letter == "B" else message("t", b"\0\0") + message("n")

    def _run(self, text: str) -> bytes | None:
        verb, _, name = text.partition(" ")
        if text in {"DEALLOCATE ALL", "DISCARD ALL"} or (text == "SELECT f()" and self._chance()):
            self._texts = {"": self._texts[""]} if "" in self._texts else {}
        elif text == "SELECT f()":
            self._texts.setdefault("a", "SELECT 1")
        elif verb == "PREPARE":
            if name[0] in self._texts:
                return EXISTS
            self._texts[name[0]] = "SELECT 1"
        elif verb in {"DEALLOCATE", "EXECUTE"}:
            if name not in self._texts:
                return GONE
            if verb == "DEALLOCATE":
                del self._texts[name]
            elif not self._texts[name].startswith(verb):
                return self._run(self._texts[name])
        return None


TEXTS = ["SELECT 1", "SELECT 1", "BEGIN", "SELEKT", "DEALLOCATE a", "DEALLOCATE ALL", "DISCARD ALL", "SELECT f()"]
TEXTS += ["PREPARE a AS SELECT 1", "EXECUTE a", "EXECUTE b"]


@st.composite
def requests(draw: st.DrawFn) -> list[tuple[str, str, str]]:
    texts = st.sampled_from(TEXTS)
    if draw(st.integers(0, 3)) == 0:
        return [("Q", "", draw(texts.filter(lambda text: text != "SELEKT")))]
    letters = draw(st.sampled_from(["P", "B", "BE", "PBE", "PBEPBE", "C", "D", "CP", "CPB", "PD", "BECB"]))
    return [(letter, draw(st.sampled_from(["a", "a", "b", ""])), draw(texts)) for letter in letters]


def spelled(request: list[tuple[str, str, str]]) -> bytes:
    said = b""
    for letter, name, text in request:
        match letter:
            case "Q":
                said += query(text)
            case "P":
                said += parse(text, name)
            case "E":
                said += message("E", b"\0\0\0\0\0")
            case _:
                said += {"B": bind, "C": close, "D": describe}[letter](name)
    return said if request[0][0] == "Q" else said + SYNC


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), st.lists(requests(), max_size=14))
def test_a_server_that_keeps_its_session_never_contradicts_it(
    data: st.DataObject, talk: list[list[tuple[str, str, str]]]
) -> None:
    """Whatever the client does by messages and by texts, pipelined or not, mistaken or not."""
    server, session = Server(lambda: data.draw(st.booleans())), Session()
    waiting: deque[list[tuple[str, str, str]]] = deque()
    answered = st.sampled_from([True, True, False])
    for request in talk:
        session.frontend(spelled(request))
        waiting.append(request)
        while waiting and bool(data.draw(answered)):
            assert Kind.SESSION_STATE_LOST not in kinds(session.backend(server.answer(waiting.popleft())))
    while waiting:
        assert Kind.SESSION_STATE_LOST not in kinds(session.backend(server.answer(waiting.popleft())))
    assert set(kinds(session.verdicts)) <= {Kind.REQUEST_WHILE_BUSY}, "a Query in a pipeline"
    assert session.tracker.idle


@pytest.mark.parametrize("word", ["a", "1", "\xe9"])
def test_a_long_word_takes_no_longer_to_look_at_than_its_length_asks_for(word: str) -> None:
    """It is looked at on the relay's own thread. Looked at anew from each of its bytes on, this one took 6 s."""
    began = time.process_time()
    assert judge(f"select {word * 20_000}".encode()).effect is Effect.NONE
    assert time.process_time() - began < 2
