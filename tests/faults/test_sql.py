"""SQL in records: no literal gets out when it is normalized, and no password ever."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgguard.faults.sql import SqlMode, SqlText, sql_text

NORMALIZED, FULL, NONE = SqlMode.NORMALIZED, SqlMode.FULL, SqlMode.NONE


@pytest.mark.parametrize(
    ("sql", "normalized"),
    [
        ("SELECT 4866 AS pid", "SELECT $1 AS pid"),
        ("SELECT 'a', 'it''s', E'x\\'y', N'n'", "SELECT $1, $2, $3, $4"),
        ("SELECT B'01', X'ff', U&'d\\0061t' UESCAPE '!'", "SELECT $1, $2, $3 UESCAPE $4"),
        ("SELECT $$a 'b' $$, $tag$ $$ $tag$, $é$ x $é$", "SELECT $1, $2, $3"),
        ("SELECT -1, +2.5, 1e-5, .5, 5., 1_000, 0xFF, 0o17", "SELECT -$1, +$2, $3, $4, $5, $6, $7, $8"),
        ("SELECT 12$$x$$", "SELECT $1$2"),
        ("SELECT 'a'\n  -- more\n  'b', 1", "SELECT $1, $2"),
        ("SELECT E'a'\n'b\\'c', 1", "SELECT $1, $2"),
        ("UPDATE t SET a = $2, b = 'x' WHERE c = $1", "UPDATE t SET a = $2, b = $3 WHERE c = $1"),
        ('SELECT "it\'s", "q""id", U&"d\\0061" FROM t1', 'SELECT "it\'s", "q""id", U&"d\\0061" FROM t1'),
        ("SELECT a[1:2], b::text, c || 'x'", "SELECT a[$1:$2], b::text, c || $3"),
        ("SELECT a$1, x1, _2 FROM t", "SELECT a$1, x1, _2 FROM t"),
        ("SELECT 1 -- hidden\n, /* /* h */ idden */ 2", "SELECT $1 , $2"),
        ("/*pid='7',controller='x'*/ SELECT 1 /* end */", "SELECT $1"),
        ("SELECT\n\t1;  SELECT 2 ;", "SELECT $1; SELECT $2 ;"),
        ("CALL p('a'); EXPLAIN SELECT 'b'; SHOW x", "CALL p($1); EXPLAIN SELECT $2; SHOW x"),
        ("EXECUTE p('a', 2)", "EXECUTE p($1, $2)"),
        ("SELECT 'C:\\\\', 'x'", "SELECT $1, $2"),
        ("", ""),
        ("  ", ""),
    ],
)
def test_literals_become_parameters(sql: str, normalized: str) -> None:
    assert sql_text(sql.encode(), NORMALIZED) == normalized
    assert sql_text(sql.encode(), FULL) == sql


@pytest.mark.parametrize(
    ("sql", "normalized"),
    [
        ("SELECT 'abc", "SELECT…"),
        ("SELECT a, E'ab\\'c", "SELECT a,…"),
        ("SELECT $x$ abc $y$", "SELECT…"),
        ('SELECT "abc', "SELECT…"),
        ("SELECT 1 /* abc", "SELECT $1…"),
        ("SELECT /* a /* b */ c", "SELECT…"),
        ("SELECT U&'abc", "SELECT…"),
        ("SELECT 'a' 'b", "SELECT $1…"),
        # With standard_conforming_strings off the first literal goes on after the quote, and `abc` is in the second.
        ("SELECT 'it\\'s', 'abc'", "SELECT…"),
        ("SELECT 1, 'C:\\', 'abc'", "SELECT $1,…"),
    ],
)
def test_where_a_literal_ends_is_never_guessed(sql: str, normalized: str) -> None:
    assert sql_text(sql.encode(), NORMALIZED) == normalized


def test_a_backslash_that_may_be_half_a_character_ends_nothing() -> None:
    """In SJIS the second byte of 表 is a backslash, so that E'表' is complete and what follows is outside."""
    sql = "SELECT 1, E'表', 'secret'".encode("sjis")
    assert sql_text(sql, NORMALIZED) == "SELECT $1,…"


def test_text_that_was_cut_off_before_says_so() -> None:
    assert sql_text(b"SELECT 'a', b", NORMALIZED, cut=True) == "SELECT $1, b…"
    assert sql_text(b"SELECT 'a', b", FULL, cut=True) == "SELECT 'a', b…"


def test_none_says_nothing() -> None:
    assert sql_text(b"SELECT 1", NONE) is None
    assert sql_text(None, FULL) is None


def test_bytes_that_are_not_utf8_are_replaced() -> None:
    assert sql_text(b"SELECT \xff, 'x'", NORMALIZED) == "SELECT \ufffd, $1"


@pytest.mark.parametrize(
    ("sql", "full"),
    [
        ("CREATE ROLE r LOGIN PASSWORD 's3cret'", "CREATE ROLE r LOGIN PASSWORD '***'"),
        ("alter user r with encrypted password E's3\\'cret' valid", "alter user r with encrypted password '***' valid"),
        ("ALTER GROUP r PASSWORD /* now */ $$s3cret$$", "ALTER GROUP r PASSWORD /* now */ '***'"),
        ('ALTER ROLE r PASSWORD "s3cret"', "ALTER ROLE r PASSWORD '***'"),
        ("ALTER ROLE r PASSWORD NULL", "ALTER ROLE r PASSWORD NULL"),
        (
            "CREATE USER MAPPING FOR u SERVER s OPTIONS (user 'u', password 's3cret')",
            "CREATE USER MAPPING FOR u SERVER s OPTIONS (user '***', password '***')",
        ),
        ("ALTER USER MAPPING FOR u SERVER s OPTIONS (SET \"password\" 's3cret')", None),
        ("CREATE SUBSCRIPTION s CONNECTION 'host=h password=s3cret' PUBLICATION p", None),
        ("SELECT dblink_connect('postgresql://u:s3cret@h/db')", "SELECT dblink_connect('***')"),
        ("SELECT * FROM dblink('dbname=d PASSWORD = ''s3cret''', 'SELECT 1')", None),
        ("DO $$ BEGIN ALTER ROLE r PASSWORD 's3cret'; END $$", "DO '***'"),
        ("SELECT id FROM users WHERE password = 's3cret'", "SELECT id FROM users WHERE password = '***'"),
        ("SET app.password TO 's3cret'", "SET app.password TO '***'"),
        ("SELECT 1 -- password: s3cret\n, 2", "SELECT 1 /* … */\n, 2"),
        ("ALTER ROLE r PASSWORD 's3cret", "ALTER ROLE r PASSWORD …"),
        ("SELECT dblink_connect('postgresql://u:s3cret", "SELECT dblink_connect(…"),
        ("SELECT 'it\\'s'; ALTER ROLE r PASSWORD 's3cret'", "SELECT …"),
    ],
)
def test_passwords_are_never_recorded(sql: str, full: str | None) -> None:
    shown = sql_text(sql.encode(), FULL)
    if full is not None:
        assert shown == full
    normalized = sql_text(sql.encode(), NORMALIZED)
    assert shown is not None
    assert normalized is not None
    assert "s3cret" not in shown + normalized


@pytest.mark.parametrize(
    "sql", ["SELECT 'abc", "SELECT 'it\\'s', 1", "SELECT password, 1 FROM t", "SELECT 'http://h/'"]
)
def test_full_is_verbatim_where_no_password_can_be(sql: str) -> None:
    assert sql_text(sql.encode(), FULL) == sql


# A secret that no grammar of numbers, names or escapes could produce by accident.
SECRET = "Geheimnis"
_padding = st.text(st.sampled_from('ab1 $_%;-\n\u00e9"*/(),'), max_size=6)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _escaped(text: str) -> str:
    return "E'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


@st.composite
def literals(draw: st.DrawFn) -> str:
    """Any literal of PostgreSQL's with the secret in it."""
    inside = draw(_padding) + SECRET + draw(_padding)
    form = draw(st.sampled_from(["plain", "escaped", "prefixed", "dollar", "continued", "doubled"]))
    match form:
        case "plain":
            return _quoted(inside)
        case "doubled":
            return _quoted(f"'{inside}'")
        case "escaped":
            return _escaped(draw(st.sampled_from(["", "'", "\\", "\\'"])) + inside.replace("\u00e9", "e"))
        case "prefixed":
            return draw(st.sampled_from(["B", "b", "X", "N", "U&", "u&"])) + _quoted(inside)
        case "continued":
            return _quoted("a") + draw(st.sampled_from(["\n", " \n\t", " -- ' \n "])) + _quoted(inside)
        case _:
            tag = draw(st.sampled_from(["$$", "$a$", "$a1_$", "$é$"]))
            return f"{tag}{inside.replace('$', '')}{tag}"


_between = st.sampled_from(
    [
        *(", ", " ", "\n", "\n\n", " = ", "::text ", " || ", " AND x > 12 ", ";", "(", ")", " foo ", " a$b ", "[1:2]"),
        *(
            ' "id" ',
            ' "it\'s" ',
            "/* ' */",
            "-- '\n",
            " $1 ",
            " 1.5e3 ",
            " 12",
            " -",
            " E",
            " 'x' ",
            " $ ",
            "@",
            " \\ ",
        ),
    ]
)


@st.composite
def statements(draw: st.DrawFn) -> str:
    parts = draw(st.lists(st.tuples(_between, st.none() | literals()), min_size=1, max_size=6))
    # A literal begins where no name or number could take its first characters into itself.
    return "SELECT " + "".join(f"{between} {literal or ''} " for between, literal in parts)


@given(statements(), st.data())
def test_no_literal_gets_out_of_normalized_text(sql: str, data: st.DataObject) -> None:
    """Whole, or cut off anywhere: not one piece of the secret that could be told from chance."""
    encoded = sql.encode()
    end = data.draw(st.integers(0, len(encoded)))
    for text, cut in ((encoded, False), (encoded[:end], True)):
        shown = sql_text(text, NORMALIZED, cut=cut)
        assert shown is not None
        assert not any(SECRET[:n] in shown for n in range(3, len(SECRET) + 1))


@given(st.binary(max_size=60), st.sampled_from([NORMALIZED, FULL]))
def test_any_bytes_give_some_text(sql: bytes, mode: SqlMode) -> None:
    assert sql_text(sql, mode) is not None


@given(statements())
def test_normalizing_twice_changes_nothing(sql: str) -> None:
    """What comes out is free of literals by its own rules."""
    once = sql_text(sql.encode(), NORMALIZED)
    assert once is not None
    assert sql_text(once.encode(), NORMALIZED) == once


@given(st.sampled_from(["PASSWORD ", "password = ", '"password" ', "PASSWORD/**/"]), literals())
def test_no_password_gets_out_of_full_text(before: str, literal: str) -> None:
    shown = sql_text(f"ALTER ROLE r {before}{literal} VALID".encode(), FULL)
    assert shown is not None
    assert SECRET not in shown


def test_parameters_are_numbered_after_the_highest() -> None:
    shown = sql_text(b"SELECT $7, 'a', $2, 'b'", NORMALIZED)
    assert shown is not None
    assert re.findall(r"\d+", shown) == ["7", "8", "2", "9"]


def test_a_text_is_made_presentable_when_it_is_shown_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes milliseconds, and of most faults no text is ever shown."""
    made: list[bytes | None] = []

    def counting(sql: bytes | None, mode: SqlMode, *, cut: bool = False) -> str | None:
        made.append(sql)
        return sql_text(sql, mode, cut=cut)

    monkeypatch.setattr("pgguard.faults.sql.sql_text", counting)
    text = SqlText(b"SELECT 'x'", SqlMode.NORMALIZED, cut=False)
    assert text == SqlText(b"SELECT 'x'", SqlMode.NORMALIZED, cut=False)
    assert text != SqlText(b"SELECT 'x'", SqlMode.FULL, cut=False)
    assert made == []
    assert "x'" not in repr(text)
    assert (text.shown(), text.shown()) == ("SELECT $1", "SELECT $1")
    assert made == [b"SELECT 'x'"]
    assert SqlText(None, SqlMode.FULL, cut=False).shown() is None
