"""How SQL text appears in records: with its literals replaced, verbatim, or not at all; never with a password.

The text is whatever a client sent: possibly cut off, in an encoding that isn't known here, not necessarily valid.
What matters is that no literal is ever mistaken for something else, so the tokens are those of PostgreSQL's own
scanner (``src/backend/parser/scan.l``; its names stand beside the patterns), and where a literal's end is in doubt
the text is cut off before it:

* a literal, quoted identifier or comment that isn't closed;
* a backslash before a quote in a plain string, which ends there or not depending on ``standard_conforming_strings``;
* a backslash after a character outside ASCII in an ``E''`` string: in SJIS, Big5, GBK and their kin the backslash can
  be that character's second byte (PostgreSQL documentation, "Character Set Support").

What a secret looks like is known by :mod:`pgguard.secrets`. A statement that names one, as a column, an option, a
setting or within a literal, shows none of its strings in mode ``full`` either: in which of them the secret is, it takes
a parser to say (``INSERT INTO users (name, password) VALUES …``, ``set_config('app.token', …)``, ``'…' AS password``).
Bare words are hidden where they stand for one: ``SET app.password = hunter2``, ``ALTER ROLE joe PASSWORD hunter2``.

Libraries don't serve here: sqlglot splits ``1_000`` into a literal and a name, swallows what follows EXECUTE and yields
nothing for text that is cut off, which is the usual case; libpg_query (pglast) takes valid, whole statements alone.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import TYPE_CHECKING, Final, NamedTuple

from pgguard.secrets.names import NAME_LENGTH, STEM, is_secret_name, mentions_secret, word_list
from pgguard.secrets.text import HIDDEN, redact, redact_structure

if TYPE_CHECKING:
    from collections.abc import Iterator


class SqlMode(StrEnum):
    """How SQL text appears in records."""

    NORMALIZED = "normalized"
    """Literals are replaced by parameters, comments left out."""
    FULL = "full"
    """Verbatim, save for what looks like a secret, or may be one."""
    NONE = "none"


ELLIPSIS: Final = "…"
_HIDDEN_LITERAL: Final = f"'{HIDDEN}'"

_LITERAL, _PARAMETER, _NAME, _QUOTED, _COMMENT, _SPACE, _OTHER = (
    "literal",
    "parameter",
    "name",
    "quoted",
    "comment",
    "space",
    "other",
)

# Characters outside ASCII count as letters: ident_start and ident_cont.
_START = r"[A-Za-z_\u0080-\U0010ffff]"
_CONT = r"[A-Za-z_0-9$\u0080-\U0010ffff]"
_CONT_NO_DOLLAR = r"[A-Za-z_0-9\u0080-\U0010ffff]"  # dolq_cont
_TAG = rf"\$(?:{_START}{_CONT_NO_DOLLAR}*+)?\$"  # dolqdelim
# quotecontinue: a literal goes on in the next quotes when a line break, and otherwise only space and comments, lies
# between.
_CONTINUED = r"(?:[ \t\f\v]|--[^\n\r]*+)*+[\n\r](?:[ \t\n\r\f\v]|--[^\n\r]*+[\n\r])*+"
_PLAIN = r"'[^']*+(?:''[^']*+)*+'"
_ESCAPED = r"'[^'\\]*+(?:(?:''|\\.)[^'\\]*+)*+'"

_TOKEN: Final = re.compile(
    rf"""
    (?P<space>[ \t\n\r\f\v]++)
    | (?P<name>(?![eEbBxXnN]'|[uU]&['"]){_START}{_CONT}*+)                                # identifier
    | (?P<comment>--[^\n\r]*+)
    | (?P<escaped>[eE]{_ESCAPED}(?:{_CONTINUED}{_ESCAPED})*+)                           # xe
    | (?P<plain>(?:[bBxXnN]|[uU]&)?{_PLAIN}(?:{_CONTINUED}{_PLAIN})*+)                  # xb, xh, xn, xus, xq
    | (?P<dollar>(?P<tag>{_TAG}).*?(?P=tag))                                            # xdolq
    | (?P<quoted>(?:[uU]&)?"[^"]*+(?:""[^"]*+)*+")                                      # xd, xui
    | (?P<unclosed>(?:[eEbBxXnN]|[uU]&)?'|(?:[uU]&)?"|{_TAG})
    | (?P<parameter>\$\d++)                                                             # param
    | (?P<number>\.?\d(?:[eE][+-](?=\d)|{_CONT_NO_DOLLAR}|\.(?!\.))*+)                  # integer, numeric, real, …junk
    | (?P<other>.)                                                                      # self, operators
    """,
    re.VERBOSE | re.DOTALL,
)
_COMMENT_EDGE: Final = re.compile(r"/\*|\*/")  # xcstart and xcstop: comments nest

_BACKSLASH_QUOTE: Final = re.compile(r"(?<!\\)(?:\\\\)*+\\'")
_WIDE_BACKSLASH: Final = re.compile(r"[^\x00-\x7f]\\")

_SEPARATORS: Final = frozenset("=<>!~:")
_COMMANDS: Final = frozenset({"alter", "create", "reset", "set"})
"""What statements begin with in which a word that is given for a secret is one, and no column."""
_QUERIES: Final = frozenset({"call", "delete", "insert", "merge", "select", "table", "update", "values", "with"})
_ROLES: Final = frozenset({"group", "role", "user"})
_NO_VALUES: Final = word_list("""
    all and any array as between case cast coalesce current_setting current_user default distinct else end excluded
    exists false from in is isnull like lower md5 new not notnull now null nullif old on or row select set similar some
    then trim true upper user when where with crypt digest encode encrypt gen_random_bytes gen_random_uuid gen_salt hmac
    sha224 sha256 sha384 sha512 pgp_sym_encrypt pgp_sym_decrypt returning
""")
"""Words that a secret is compared with or set to in an expression, and that are none."""
_CRYPTOGRAPHY: Final = word_list("""
    crypt decrypt decrypt_iv digest encrypt encrypt_iv hmac md5 pgp_pub_decrypt pgp_pub_decrypt_bytea pgp_sym_decrypt
    pgp_sym_decrypt_bytea pgp_sym_encrypt pgp_sym_encrypt_bytea sha224 sha256 sha384 sha512
""")
"""Functions that passwords and keys are given to: pgcrypto's, "Binary String Functions" and md5()."""
_UNICODE_ESCAPE: Final = re.compile(
    r"(?P<mark>[^\w\s'\"+])(?:(?P=mark)|\+(?P<six>[0-9a-fA-F]{6})|(?P<four>[0-9a-fA-F]{4}))"
)
_ESCAPE: Final = re.compile(
    r"\\(?:x(?P<hex>[0-9a-fA-F]{1,2})|(?P<octal>[0-7]{1,3})|u(?P<four>[0-9a-fA-F]{4})|U(?P<eight>[0-9a-fA-F]{8})|(?P<c>.))",
    re.DOTALL,
)


class _Token(NamedTuple):
    what: str
    text: str


class SqlText:
    """A text that is made presentable when it is shown for the first time, as that takes time and few ever are.

    Arguments as of :func:`sql_text`.
    """

    __slots__ = ("_cut", "_mode", "_shown", "_sql")

    def __init__(self, sql: bytes | None, mode: SqlMode, *, cut: bool) -> None:
        self._sql = sql
        self._mode = mode
        self._cut = cut
        self._shown: str | None = None

    @classmethod
    def of(cls, shown: str | None) -> SqlText:
        """A text that has been made presentable before."""
        text = cls(None if shown is None else shown.encode("utf-8", "replace"), SqlMode.FULL, cut=False)
        text._shown = shown
        return text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SqlText) and self._what() == other._what()

    def __hash__(self) -> int:
        return hash(self._what())

    def _what(self) -> tuple[bytes | None, SqlMode, bool]:
        return self._sql, self._mode, self._cut

    def shown(self) -> str | None:
        """The text as it may be shown, or ``None``."""
        if self._shown is None:
            self._shown = sql_text(self._sql, self._mode, cut=self._cut)
        return self._shown


def sql_text(sql: bytes | None, mode: SqlMode, *, cut: bool = False) -> str | None:
    """What a record may say of a request's SQL.

    Args:
        sql: The text as sent, in the client's encoding; taken for UTF-8, what isn't is replaced.
        mode: How much of it may be said.
        cut: ``sql`` is only the beginning of the text.

    Returns:
        The text, ending in ``…`` when it was cut off, here or before; ``None`` in mode ``none`` or if there is none.
    """
    if sql is None or mode is SqlMode.NONE:
        return None
    text = sql.decode("utf-8", "replace")
    tokens = list(_tokens(text))
    rest = text[sum(len(token.text) for token in tokens) :]
    statements = list(_statements(tokens))
    if mode is SqlMode.NORMALIZED:
        said = _normalized(statements)
        cut = cut or bool(rest)
    else:
        said = "".join(map(_without_secrets, statements))
        if rest and (statements[-1].names_secret or _may_hold_secret(rest)):
            cut = True
        else:
            said += rest
    said = redact_structure(said, cut=cut)
    return said + ELLIPSIS if cut else said


def _tokens(text: str) -> Iterator[_Token]:
    """The tokens up to the first whose end is in doubt."""
    at = 0
    while at < len(text):
        if text.startswith("/*", at):
            end = _comment_end(text, at)
            if end is None:
                return
            yield _Token(_COMMENT, text[at:end])
            at = end
            continue
        match = _TOKEN.match(text, at)
        # The last alternative takes any character.
        assert match is not None  # noqa: S101
        token = match.group()
        # `tag` ends before `dollar` does, so lastgroup is always an alternative.
        match match.lastgroup:
            case "unclosed":
                return
            case "plain" if _BACKSLASH_QUOTE.search(token):
                return
            case "escaped" if _WIDE_BACKSLASH.search(token):
                return
            case "escaped" | "plain" | "dollar" | "number":
                yield _Token(_LITERAL, token)
            case what:
                yield _Token(str(what), token)
        at = match.end()


def _comment_end(text: str, start: int) -> int | None:
    depth = 0
    for edge in _COMMENT_EDGE.finditer(text, start):
        depth += 1 if edge.group() == "/*" else -1
        if depth == 0:
            return edge.end()
    return None


class _Statement(NamedTuple):
    """A statement's tokens, its semicolon included."""

    tokens: list[_Token]
    secrets: list[bool]
    """For each token, whether it is a secret because of what stands before it."""
    names_secret: bool
    """One of its names or strings does."""


def _statements(tokens: list[_Token]) -> Iterator[_Statement]:
    """The statements of a text; at least one."""
    start = 0
    for n, token in enumerate(tokens):
        if token == (_OTHER, ";"):
            yield _statement(tokens[start : n + 1])
            start = n + 1
    yield _statement(tokens[start:])


def _statement(tokens: list[_Token]) -> _Statement:
    text = "".join(token.text for token in tokens)
    encrypts = any(_calls_cryptography(tokens))
    if STEM.search(text) is None and "\\" not in text:
        return _Statement(tokens, [False] * len(tokens), names_secret=encrypts)
    names_secret = encrypts or any(
        is_secret_name(token.text) if token.what in {_NAME, _QUOTED} else mentions_secret(content)
        for token in tokens
        if token.what in {_NAME, _QUOTED, _LITERAL}
        for content in _contents(token.text)
    )
    return _Statement(tokens, _Secrets(tokens).found(), names_secret)


def _calls_cryptography(tokens: list[_Token]) -> Iterator[bool]:
    """Whether each bracket that is opened is that of a call of a function that takes passwords or keys."""
    before = ""
    for token in tokens:
        if token == (_OTHER, "("):
            yield before in _CRYPTOGRAPHY
        if token.what not in {_SPACE, _COMMENT}:
            before = token.text.strip('"').lower()


def _normalized(statements: list[_Statement]) -> str:
    """Literals as parameters, numbered on from the highest there is; space and comments as one space."""
    tokens = [token for statement in statements for token in statement.tokens]
    secrets = [secret for statement in statements for secret in statement.secrets]
    last = max((int(token.text[1:]) for token in tokens if token.what == _PARAMETER), default=0)
    said: list[str] = []
    before = False
    for token, secret in zip(tokens, secrets, strict=True):
        if token.what in {_SPACE, _COMMENT} and not secret:
            if said and said[-1] != " ":
                said.append(" ")
        elif token.what == _LITERAL or secret:
            if not (before and secret):  # a bare word of several tokens is one
                last += 1
                said.append(f"${last}")
        else:
            said.append(_shown(token))
        before = secret
    return "".join(said).rstrip(" ")


def _without_secrets(statement: _Statement) -> str:
    said: list[str] = []
    hidden = False
    for token, secret in zip(statement.tokens, statement.secrets, strict=True):
        string = token.what == _LITERAL and not token.text[0].isdigit() and token.text[0] != "."
        hide = secret or (string and (statement.names_secret or _holds_secret(token.text)))
        if hide:
            if not hidden:
                said.append(_HIDDEN_LITERAL)
        elif token.what == _COMMENT and (mentions_secret(token.text) or redact(token.text) != token.text):
            said.append("/* … */")
        else:
            said.append(_shown(token))
        hidden = secret
    return "".join(said)


def _shown(token: _Token) -> str:
    """A token that is no literal; a name in quotes may hold anything."""
    if token.what == _QUOTED and _holds_secret(token.text):
        return f'"{HIDDEN}"'
    return token.text


def _holds_secret(literal: str) -> bool:
    return any(redact(content) != content for content in _contents(literal))


def _may_hold_secret(rest: str) -> bool:
    """Whether what goes on, maybe, behind the end of the text holds a secret, or the beginning of one."""
    return any(mentions_secret(content) or redact(content, cut=True) != content for content in _contents(rest))


def _contents(literal: str) -> Iterator[str]:
    """What stands in a literal: as it is written, and as the server reads it."""
    yield literal
    if "''" in literal:
        yield literal.replace("''", "'")
    if literal[:1] in "eE" and "\\" in literal:
        yield _ESCAPE.sub(_unescaped, literal)
    elif literal[:2].lower() == "u&":
        yield _UNICODE_ESCAPE.sub(_unescaped, literal)


def _unescaped(escape: re.Match[str]) -> str:
    """The character that an escape stands for."""
    groups = escape.groupdict()
    if (octal := groups.get("octal")) is not None:
        return chr(int(octal, 8))
    for name in ("hex", "four", "six", "eight"):
        if (digits := groups.get(name)) is not None:
            return chr(min(int(digits, 16), 0x10FFFF))
    return str(groups.get("c") or groups.get("mark"))


class _Secrets:
    """Finds the tokens of a statement that stand where a secret is expected.

    That is behind a name like PASSWORD, and an operator or nothing: ``PASSWORD '…'``, ``password = …``, ``SET app.token
    TO …``. Without an operator a bare word is one in ALTER ROLE and its kin alone.
    """

    def __init__(self, tokens: list[_Token]) -> None:
        self._tokens = tokens
        words = [token.text.lower() for token in tokens if token.what == _NAME]
        # EXPLAIN and the like may stand before it.
        begins = next((n for n, word in enumerate(words) if word in _COMMANDS | _QUERIES), len(words))
        self._command = next((word for word in words[begins : begins + 1] if word in _COMMANDS), None)
        self._role = self._command in {"alter", "create"} and not _ROLES.isdisjoint(words[begins + 1 : begins + 2])
        self._expected = False
        self._separated = False
        self._name = ""

    def found(self) -> list[bool]:
        """For each token, whether it is one."""
        return list(map(self._is_secret, range(len(self._tokens))))

    def _is_secret(self, n: int) -> bool:
        token = self._tokens[n]
        if token.what in {_SPACE, _COMMENT}:
            self._name = ""
            if self._glued == ";":
                return True
            self._glued = None
            return False
        if self._glued is not None:
            if token.what == _OTHER and token.text in self._glued:
                self._glued = None
            else:
                return True
        if self._expected:
            return self._is_value(n, token)
        self._note(token)
        return False

    _glued: str | None = None
    """Within a bare word that is a secret: the signs that end it, if space doesn't."""

    def _is_value(self, n: int, token: _Token) -> bool:
        """Whether a token is a secret where one is expected."""
        if token.what == _OTHER and token.text == ":" and self._follows(n, ":"):
            self._expected = False  # a cast
            return False
        if token.what == _OTHER and token.text in _SEPARATORS:
            self._separated = True
            return False
        if token.what == _OTHER and token.text in "([":
            return False
        if token.what == _NAME and token.text.lower() == "to" and not self._separated:
            self._separated = True
            return False
        if token.what == _LITERAL and not token.text[:1].isdigit():
            self._expected = False
            return True
        self._expected = False
        ends = token.what == _PARAMETER or (token.what == _OTHER and token.text in ",);.")
        bare = self._separated or self._role
        if ends or not (bare or token.what in {_LITERAL, _QUOTED}) or self._is_expression(n, token):
            self._note(token)
            return False
        # The whole of what a SET gives, of others what stands in one piece.
        self._glued = ";" if self._command == "set" and self._separated else ",;)"
        return True

    def _is_expression(self, n: int, token: _Token) -> bool:
        """Whether a word is a column that holds such secrets itself, or a part of SQL."""
        if token.what != _NAME:
            return False
        if token.text.lower() in _NO_VALUES:
            return True
        last = token
        for after in range(n + 1, len(self._tokens)):
            part = self._tokens[after]
            if part.what not in {_NAME, _QUOTED} and part != (_OTHER, "."):
                break
            last = part
        return last.what in {_NAME, _QUOTED} and is_secret_name(last.text) and self._command is None

    def _follows(self, n: int, text: str) -> bool:
        return n + 1 < len(self._tokens) and self._tokens[n + 1].text == text

    def _note(self, token: _Token) -> None:
        """Take a token that is no secret: if it names one, that is expected next."""
        if token.what in {_NAME, _QUOTED}:
            # What it is the name of stands in its last parts, of which there may be any number.
            self._name = self._name[-NAME_LENGTH:] + token.text
        elif token == (_OTHER, "."):
            self._name += "."
            return
        else:
            self._name = ""
            return
        by = self._before == "identified" and token.text.lower() == "by"
        self._before = token.text.lower()
        self._expected = by or is_secret_name(self._name)
        self._separated = by

    _before = ""
    """The last name."""
