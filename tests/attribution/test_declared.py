from __future__ import annotations

import time
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pgguard.attribution.declared import declared


def _declared(*statements: bytes) -> dict[str, str]:
    return dict(declared(None, statements))


@pytest.mark.parametrize(
    ("statement", "pairs"),
    [
        pytest.param(
            b"SELECT 1 /*controller='users',pid='4867'*/", {"controller": "users", "pid": "4867"}, id="at the end"
        ),
        pytest.param(b"/*pid='4867'*/ SELECT 1", {"pid": "4867"}, id="at the beginning"),
        pytest.param(b" \n/*pid='4867'*/SELECT 1", {"pid": "4867"}, id="after blanks"),
        pytest.param(b"SELECT 1 /*pid='4867'*/ ;\n", {"pid": "4867"}, id="before a semicolon"),
        pytest.param(b"SELECT 1; /*pid='4867'*/", {"pid": "4867"}, id="after a semicolon"),
        pytest.param(b"SELECT 1/*pid='4867'*/\0", {"pid": "4867"}, id="before the end of the string"),
        pytest.param(b"/*pid='4867'*/", {"pid": "4867"}, id="nothing else"),
        pytest.param(
            # The specification's own example.
            b"SELECT * FROM FOO /*action='%2Fparam*d',controller='index,'framework='spring',"
            b"traceparent='00-5bd66ef5095369c7b0d1f8f4bd33716a-c532cb4098ac3dd2-01',"
            b"tracestate='congo%3Dt61rcWkgMzE%2Crojo%3D00f067aa0ba902b7'*/",
            {},
            id="the specification's example, which has a misprint",
        ),
        pytest.param(
            b"SELECT * FROM FOO /*action='%2Fparam*d',controller='index',framework='spring',"
            b"tracestate='congo%3Dt61rcWkgMzE%2Crojo%3D00f067aa0ba902b7'*/",
            {
                "action": "/param*d",
                "controller": "index",
                "framework": "spring",
                "tracestate": "congo=t61rcWkgMzE,rojo=00f067aa0ba902b7",
            },
            id="the specification's example, without it",
        ),
        pytest.param(b"SELECT 1 /*name='O\\'Reilly',k='a%20b'*/", {"name": "O'Reilly", "k": "a b"}, id="escapes"),
        pytest.param(b"SELECT 1 /*k='%FF\xff'*/", {"k": "\ufffd\ufffd"}, id="no UTF-8"),
        pytest.param(b"SELECT 1 /*a=''*/", {"a": ""}, id="an empty value"),
        pytest.param(
            b"SELECT 1 /*application:App,controller:users,action:show*/",
            {"application": "App", "controller": "users", "action": "show"},
            id="QueryLogs",
        ),
        pytest.param(
            b"/*job:Admin::CleanUp,line:/app/models/user.rb:12:in `block in find'*/ SELECT 1",
            {"job": "Admin::CleanUp", "line": "/app/models/user.rb:12:in `block in find'"},
            id="Marginalia",
        ),
        pytest.param(
            b"SELECT 1 /* slow */ /*application:App*/ /*traceparent='00-5b'*/",
            {"application": "App", "traceparent": "00-5b"},
            id="several in a row",
        ),
        pytest.param(b"/*+ SeqScan(a) */ /*pid='1'*/ SELECT 1", {"pid": "1"}, id="after a hint"),
        pytest.param(b"/*pid='1',k='1'*/ SELECT 1 /*pid='2'*/", {"pid": "2", "k": "1"}, id="at both ends"),
        pytest.param(b"SELECT '--' /*\n*/ -- x\n/*pid='1'*/", {"pid": "1"}, id="after a line that ended in a comment"),
    ],
)
def test_what_a_comment_declares(statement: bytes, pairs: dict[str, str]) -> None:
    assert _declared(statement) == pairs


@pytest.mark.parametrize(
    "statement",
    [
        b"",
        b"SELECT 1",
        b"/* fetch users */ SELECT 1",
        b"SELECT 1 /* fetch users */",
        b"SELECT 1 /*fetch_users*/",
        b"SELECT 1 /*todo:faster*/",
        b"SELECT 1 /*see https://example.com/a?pid=1*/",
        b"SELECT 1 /*https://example.com/*/",
        b"SELECT * FROM t WHERE a = 1 /* and b = '2' */",
        b"SELECT * FROM t WHERE a = 1 /* b='2' */",
        b"SELECT * FROM t WHERE a = 1 /*b = '2'*/",
        b"/*+ Set(enable_seqscan 'off') */ SELECT 1",
        b"/*!40101 pid='1'*/ SELECT 1",
        b"SELECT '/*pid=''1''*/'",
        b"SELECT '/*pid=1*/",
        b"SELECT \"/*pid='1'*/\"",
        b"DO $$ /*pid='1'*/ $$",
        b"DO $$ BEGIN END /*pid='1'*/$$",
        b"SELECT '/*pid=', '1'*/",
        b"SELECT 1 -- /*pid='1'*/",
        b"-- /*pid='1'*/ SELECT 1",
        b"/* outer /*pid='1'*/ */ SELECT 1",
        b"SELECT 1 /* outer /*pid='1'*/ */",
        b"SELECT 1 /*pid='1'*/ + 1",
        b"SELECT 1 /*pid='1'",
        b"/*pid='1'",
        b"SELECT 1 pid='1'*/",
        b"/*/",
        b"/**/",
        b"*/",
        b"SELECT 1 /*pid='1*/",
        b"SELECT 1 /*pid='1',*/",
        b"SELECT 1 /*pid='1' ,k='2'*/",
        b"SELECT 1 /*pid='1'k='2'*/",
        b"SELECT 1 /*pid:1,*/",
        b"SELECT 1 /*pid:1,no pair*/",
        b"SELECT 1 /*pid: 1*/",
        b"SELECT 1 /*pid:*/",
    ],
)
def test_what_declares_nothing(statement: bytes) -> None:
    assert _declared(statement) == {}


def test_the_latest_statement_that_declares_something_wins_as_a_whole() -> None:
    statements = [b"SELECT 1 /*pid='1',controller='a'*/", b"SELECT 2 /*pid='2'*/", b"SELECT 3 /* nothing */", b"COMMIT"]
    assert _declared(*statements) == {"pid": "2"}


def test_the_application_name_is_what_the_session_says() -> None:
    assert declared("puma", []) == {"application_name": "puma"}
    assert declared("puma", [b"SELECT 1 /*application_name='x',pid='1'*/"]) == {"application_name": "puma", "pid": "1"}
    assert declared("", [b"SELECT 1"]) == {}


def test_no_more_is_looked_at_than_a_few_kilobytes() -> None:
    far = b"x" * 5000
    assert _declared(b"/*a='" + far + b"'*/ SELECT 1") == {}
    assert _declared(b"SELECT 1 /*a='" + far + b"'*/") == {}
    assert _declared(b"SELECT 1 /*" + b",".join(b"k%d='v'" % n for n in range(100)) + b"*/") == {}
    assert _declared(b" " * 5000 + b"/*pid='1'*/ SELECT 1") == {}
    before = time.monotonic()
    _declared(*[b"/*" * 5_000_000, b"*/" * 5_000_000, b"/*a='" + b"\\" * 5_000_000, b"\\'" * 5_000_000 + b"*/"])
    assert time.monotonic() - before < 2


_KEYS = st.text(min_size=1, max_size=20)
_VALUES = st.text(max_size=40)


def _sqlcommenter(pairs: dict[str, str], safe: str) -> bytes:
    """Serialise as the specification says: URL-encode, escape, quote, concatenate."""

    def value(text: str) -> str:
        return quote(text, safe=safe).replace("'", "\\'")

    return ",".join(f"{quote(k, safe='')}='{value(v)}'" for k, v in sorted(pairs.items())).encode()


@given(
    st.dictionaries(_KEYS, _VALUES, min_size=1, max_size=5),
    st.sampled_from(["", "'", "'()!~-._"]),
    st.sampled_from([b"SELECT 1 /*%b*/", b"/*%b*/ SELECT '/*'", b"SELECT $$ /* $$ /*%b*/;", b"SELECT '*/' /*%b*/\n"]),
)
@example({"\\'": "\\'"}, "'", b"SELECT 1 /*%b*/")
def test_what_the_specification_serialises_is_read_back(pairs: dict[str, str], safe: str, statement: bytes) -> None:
    comment = _sqlcommenter(pairs, safe)
    # A key that is some hundred bytes long when it is encoded isn't anybody's.
    if all(len(quote(key, safe="")) <= 128 for key in pairs):
        assert _declared(statement.replace(b"%b", comment)) == pairs


@given(st.text(st.characters(exclude_characters="'", exclude_categories=["Cs"])))
@example("/*pid=1*/")
@example("/*pid:1*/")
def test_a_literal_declares_nothing(text: str) -> None:
    assert _declared(b"SELECT '%b'" % text.encode()) == {}
    assert _declared(b"SELECT $x$%b$x$" % text.encode()) == {}


_PIECES = st.sampled_from(
    [b"/*", b"*/", b"'", b"\\", b",", b":", b"=", b"--", b"\n", b" ", b";", b"pid", b"pid='1'", b"pid:1", b"%", b"\0"]
)


@given(st.lists(st.lists(_PIECES | st.binary(max_size=3), max_size=12).map(b"".join), max_size=3))
def test_whatever_is_sent_it_says_something_readable_or_nothing(statements: list[bytes]) -> None:
    for key, value in declared(None, statements).items():
        assert key
        assert isinstance(value, str)
        assert any(b"/*" in statement and b"*/" in statement for statement in statements)
