"""How SQL text appears in records: with its literals replaced, verbatim, or not at all; never with a password.

The text is whatever a client sent: possibly cut off, in an encoding that isn't known here, not necessarily valid.
What matters is that no literal is ever mistaken for something else, so the tokens are those of PostgreSQL's own
scanner (``src/backend/parser/scan.l``; its names stand beside the patterns), and where a literal's end is in doubt
the text is cut off before it:

* a literal, quoted identifier or comment that isn't closed;
* a backslash before a quote in a plain string, which ends there or not depending on ``standard_conforming_strings``;
* a backslash after a character outside ASCII in an ``E''`` string: in SJIS, Big5, GBK and their kin the backslash can
  be that character's second byte (PostgreSQL documentation, "Character Set Support").

Libraries don't serve here: sqlglot splits ``1_000`` into a literal and a name, swallows what follows EXECUTE and yields
nothing for text that is cut off, which is the usual case; libpg_query (pglast) takes valid, whole statements alone.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator


class SqlMode(StrEnum):
    """How SQL text appears in records."""

    NORMALIZED = "normalized"
    """Literals are replaced by parameters, comments left out."""
    FULL = "full"
    """Verbatim, save for literals and comments that look as if they held a password."""
    NONE = "none"


ELLIPSIS: Final = "…"
HIDDEN: Final = "'***'"

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

_SECRET_NAME: Final = re.compile(r'(?:[uU]&)?"?\w*passw(?:or)?d\w*"?', re.IGNORECASE)
_SECRET_TEXT: Final = re.compile(r"passw|://[^\s/:@']*:[^\s/]*@", re.IGNORECASE)
_SECRET_BEGUN: Final = re.compile(r"passw|://[^\s/:@']*:", re.IGNORECASE)
_BETWEEN_NAME_AND_VALUE: Final = frozenset({"=", ">", ":", "to", "("})


class _Token(NamedTuple):
    what: str
    text: str


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
    cut_here = sum(len(token.text) for token in tokens)
    if mode is SqlMode.NORMALIZED:
        said = _normalized(tokens)
        cut = cut or cut_here < len(text)
    else:
        said = _without_secrets(tokens)
        rest = text[cut_here:]
        if rest and (_SECRET_BEGUN.search(rest) or _secret_expected(tokens)):
            cut = True
        else:
            said += rest
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


def _normalized(tokens: list[_Token]) -> str:
    """Literals as parameters, numbered on from the highest there is; space and comments as one space."""
    last = max((int(token.text[1:]) for token in tokens if token.what == _PARAMETER), default=0)
    said: list[str] = []
    for token, secret in zip(tokens, _secrets(tokens), strict=True):
        if token.what in {_SPACE, _COMMENT}:
            if said and said[-1] != " ":
                said.append(" ")
        elif token.what == _LITERAL or secret:
            last += 1
            said.append(f"${last}")
        else:
            said.append(token.text)
    return "".join(said).rstrip(" ")


def _without_secrets(tokens: list[_Token]) -> str:
    said: list[str] = []
    for token, secret in zip(tokens, _secrets(tokens), strict=True):
        if secret:
            said.append(HIDDEN)
        elif token.what == _COMMENT and _SECRET_TEXT.search(token.text):
            said.append("/* … */")
        else:
            said.append(token.text)
    return "".join(said)


def _secrets(tokens: list[_Token]) -> Iterator[bool]:
    """For each token, whether it is a password or a literal that may hold one.

    That is what follows a name like PASSWORD (``CREATE ROLE … PASSWORD '…'``, ``OPTIONS (password '…')``), and any
    literal with such a name or a URI's password in it: a subscription's or dblink's connection string, a DO block that
    alters a role.
    """
    expected = False
    for token in tokens:
        value = token.what in {_LITERAL, _QUOTED}
        yield value and (expected or (token.what == _LITERAL and _SECRET_TEXT.search(token.text) is not None))
        expected = _expects_secret(token, expected=expected)


def _secret_expected(tokens: list[_Token]) -> bool:
    """Whether what comes after these tokens would be a password."""
    expected = False
    for token in tokens:
        expected = _expects_secret(token, expected=expected)
    return expected


def _expects_secret(token: _Token, *, expected: bool) -> bool:
    if token.what in {_SPACE, _COMMENT} or token.text.lower() in _BETWEEN_NAME_AND_VALUE:
        return expected
    return token.what in {_NAME, _QUOTED} and _SECRET_NAME.fullmatch(token.text) is not None
