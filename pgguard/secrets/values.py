"""Secrets by their name: what stands behind it, in whichever notation, and where that ends."""

from __future__ import annotations

import re
from bisect import bisect_left
from typing import TYPE_CHECKING, Final

from pgguard.secrets.names import NAME_LENGTH, STEM, is_secret_name
from pgguard.secrets.quotes import rest_of_quotation

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pgguard.secrets.shapes import Span

_NAME: Final = re.compile(r"[\w.%-]*")
_NO_NAME: Final = re.compile(r"[^\w.%-]")
_ENCODED: Final = re.compile(r"%(?:25)*3[ad]", re.IGNORECASE)
_TWO_WORDS: Final = re.compile(r"(?<!\w)([^\W\d]\w*) \Z")
_SET: Final = re.compile(r"\bset\s+(?:(?:session|local)\s+)?\Z", re.IGNORECASE)
_ROLE: Final = re.compile(r"\b(?:alter|create)\s+(?:role|user|group)\b", re.IGNORECASE)

_BEHIND: Final = re.compile(
    r"""
    (?P<close>[\\"'`\])}]{0,8})
    (?: \s{0,16}(?P<colon>:(?!:)=?)\s{0,16}
      | \s{0,16}(?P<sign>[!~|?+*<>^&-]{0,2}=[=>~]{0,2}|<-|:=)\s{0,16}
      | (?P<pair>,?\s{0,16}\\*["']?\bvalue\\*["']?\s{0,4}[:=]\s{0,16})
      | (?P<call>\s?\(\s{0,16})(?=(?:[en]|u&)?\\*["'`])
      | (?P<next>,\s{0,16})(?=(?:[en]|u&)?\\*["'`])
      | (?P<bare>\s{1,16})(?=(?:[en]|u&)?\\*["'`]|\$\w*\$)
      | (?P<word>\s{1,16})(?=\S)
    )""",
    re.VERBOSE | re.IGNORECASE,
)
"""What stands between the name of a secret and the secret."""
_TAG: Final = re.compile(r"(?:\s[^<>]{0,200})?>")

_ODBC: Final = frozenset({"password", "pwd"})
"""Keywords of ``Server=…;Pwd=…``, where a value ends with a semicolon and not with a space."""
_NOTHING: Final = re.compile(r"\*{3}|\$\d{1,3}|\?|%s|null|none|true|false|yes|no|on|off|…", re.IGNORECASE)
"""What stands in for a secret, or says that there is none."""
_PORT: Final = re.compile(r"\d{1,5}(?!\w)")
"""What stands behind the path of a Unix socket: ``/run/pwd:5432``."""
_METHODS: Final = re.compile(r"trust|md5|peer|ident|basic|digest|reject|cert|ldap|pam|gss|scram-sha-256", re.IGNORECASE)
"""Ways to authenticate: what ``auth=`` may be followed by that is none."""


def named_spans(text: str, *, cut: bool) -> Iterator[Span]:
    """What stands behind the name of a secret: ``NAME=…``, ``"NAME": …``, ``NAME '…'``, ``NAME: …`` and so on.

    Args:
        text: where it stands.
        cut: it is only the beginning of a text: what ends with it may be the beginning of something else.
    """
    quotes = _Quotes(text)
    position = 0
    while (stem := STEM.search(text, position)) is not None:
        start = _name_begins(text, stem.start(), position)
        end = _end_of(_NAME, text, stem.end())
        encoded = _ENCODED.search(text, start, end)
        name_ends = end if encoded is None else encoded.start()
        position = end
        name = text[start:name_ends]
        if not (is_secret_name(name) or _is_two_words(text, start, name) or name.lower() == "identified"):
            continue
        if encoded is None:
            value = _value(text, start, end, quotes, cut=cut)
        else:
            value = encoded.end(), _Value(text, "&", quotes).end(encoded.end())
        if value is not None:
            yield value
            position = max(position, value[1])


def _name_begins(text: str, at: int, floor: int) -> int:
    """Where a name begins that has a letter at ``at``."""
    floor = max(floor, at - NAME_LENGTH)
    found = _NO_NAME.search(text[floor:at][::-1])
    return floor if found is None else at - found.start()


def _is_two_words(text: str, start: int, name: str) -> bool:
    """Whether it is the second half of a name: ``Access Key=…``."""
    before = _TWO_WORDS.search(text[max(0, start - NAME_LENGTH) : start])
    return before is not None and name.lower() in {"key", "code", "word", "phrase"} and is_secret_name(before[1] + name)


def _value(text: str, start: int, end: int, quotes: _Quotes, *, cut: bool) -> Span | None:
    """Where the secret stands that ``text[start:end]`` is the name of."""
    name = text[start:end].lower()
    before = text[max(0, start - NAME_LENGTH) : start].rstrip(" \t\r\n\"'`\\")[-1:]
    if before == "<" and (tag := _TAG.match(text, end)) is not None:
        closing = text.find("<", tag.end())
        return tag.end(), len(text) if closing < 0 else closing
    behind = _BEHIND.match(text, end)
    if behind is None or (behind["next"] is not None and not behind["close"].strip("\\])}")):
        return None
    at: int | None = behind.end() if behind["word"] is None else _behind_a_word(text, start, behind.end(), name)
    if at is None:
        return None
    if before == "/" and behind["colon"] == ":":
        port = _PORT.match(text, at)
        if port is not None and not (cut and port.end() == len(text)):
            return None
    line = behind["colon"] == ":" or (behind["pair"] or "").rstrip().endswith(":")
    line = line or (before == ";" and name in _ODBC)
    ends = _Value(text, before, quotes).end(at, line=line)
    raw = text[at:ends].strip("\"'`\\")
    if not raw:
        return None
    if cut and ends == len(text):
        return at, ends
    value = raw.strip(" \t,;)]}\"'`\\")
    if _NOTHING.fullmatch(value) or (name.endswith("auth") and _METHODS.fullmatch(value)):
        return None
    return at, ends


_TO: Final = re.compile(r"to\s+", re.IGNORECASE)
_BY: Final = re.compile(r"(?:with\s+\S+\s+)?by\s+", re.IGNORECASE)


def _behind_a_word(text: str, start: int, at: int, name: str) -> int | None:
    """Where a bare word begins that is a secret by SQL's grammar: ``SET … TO …``, ``ALTER ROLE … PASSWORD …``."""
    if name == "identified":
        found = _BY.match(text, at)
        return None if found is None else found.end()
    before = text[max(0, start - 512) : start]
    if (found := _TO.match(text, at)) is not None and _SET.search(before):
        return found.end()
    return at if name == "password" and _ROLE.search(before) else None


_PREFIX: Final = re.compile(r"(?:[BEFNRUbefnru]|[uU]&)?(?P<quote>\\*[\"'`])")
_NESTED: Final = re.compile(r"""'"'"'|'\\''|"'"'"|"\\""|\\*(?:"'){2,}|\\*(?:'"){2,}""")
"""A quote within a shell's quotes: those that a value is in are told from those that it is made of by nobody."""
_BRACKET: Final = re.compile(r"\$?[({\[]")
_BRACKETS: Final = {
    opening: re.compile(rf"(?P<open>\{opening})|\{closing}(?!\{closing})") for opening, closing in ("()", "[]", "{}")
}
"""By the opening one, what opens and closes; ODBC doubles a closing one to mean it."""
_BRACES: Final = re.compile(r"\$?\{(?:[^}]|\}\})*+\}")
"""A value of ODBC's: nothing is opened within it."""
_DOLLAR: Final = re.compile(r"\$\w*\$")
_BLOCK: Final = re.compile(r"[|>][+-]?\d?[ \t]*(?:\\n|\n)")
_PLAIN: Final = re.compile(r"(?:\\.|[^\s\\\"'`&;,)\]}])++", re.DOTALL)
_OPENING: Final = {")": {"(", ","}, "]": {"[", ","}, "}": {"{", ","}}
"""By what ends a list or a mapping, what may stand in front of the name of what is in it."""
_END: Final = re.compile(r"[\\\"'`)\]},;]{0,64}+(?:\s|$)")
_DELIMITED: Final = re.compile(r"\s|$|[,;:)\]}&|<>.+]")
_AFTER_AMPERSAND: Final = re.compile(r"&[\w.%-]+=")
_AFTER_SEMICOLON: Final = re.compile(r";(?:[\w.\s-]++=|\s*+$)")
_AFTER_COMMA: Final = re.compile(r",\s*[\\\"':]*[\w.-]+[\\\"']*\s*(?:=|:)")


class _Quotes:
    """Where the quotes of a text are."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._places: dict[str, list[int]] = {}

    def before(self, quote: str, at: int) -> int:
        """How many of one kind there are in front of a place."""
        places = self._places.get(quote)
        if places is None:
            places = self._places[quote] = [n for n, sign in enumerate(self._text) if sign == quote]
        return bisect_left(places, at)


class _Value:
    """Finds the end of a value.

    Args:
        text: Where it stands.
        before: What stands before its name: it says what ends a value without quotes.
        quotes: Where the text's are.
    """

    def __init__(self, text: str, before: str, quotes: _Quotes) -> None:
        self._text = text
        self._quotes = quotes
        self._listed = before != "" and before in ",{(["
        self._before = before

    def end(self, at: int, *, line: bool = False) -> int:
        """The end of the value that begins at ``at``; with ``line`` it goes on, without quotes, to its line's end."""
        whole = self._whole(at, line=line)
        if whole is not None:
            return whole
        text = self._text
        if _BRACKET.match(text, at):
            at, line = self._balanced(at), False
        prefix = _PREFIX.match(text, at)
        first = at
        if prefix is not None:
            at = self._quoted_until = self._closed(prefix["quote"], prefix.end())
            line = False
        while at < len(text):
            sign = text[at]
            if sign.isspace():
                if not line or sign in "\r\n":
                    return at
                at += 1
            elif sign in "\"'`":
                if at > first and self._is_closing(sign, first, at):
                    return at
                at = self._closed(sign, at + 1)
            elif sign in "&;,)]}":
                if self._is_over(sign, at):
                    return at
                at += 1
            elif prefix is not None and at == self._quoted_until and _DELIMITED.match(text, at):
                return at
            else:
                at = _end_of(_PLAIN, text, at) if _PLAIN.match(text, at) else at + 1
        return at

    def _whole(self, at: int, *, line: bool) -> int | None:
        """The end of a value that is quoted in a way of its own."""
        text = self._text
        for quotation, find in ((_NESTED, text.rfind), (_DOLLAR, text.find)):
            if (opening := quotation.match(text, at)) is not None:
                closing = find(opening.group(), opening.end())
                return len(text) if closing < 0 else closing + len(opening.group())
        return len(text) if line and _BLOCK.match(text, at) else None

    _quoted_until = -1
    """The end of the quotation that a value begins with."""

    def _closed(self, quote: str, at: int) -> int:
        """The end of a quotation, its closing quote included; the end of the text if it has none."""
        text = self._text
        closing = rest_of_quotation(quote).match(text, at)
        return len(text) if closing is None else closing.end()

    def _balanced(self, at: int) -> int:
        """Where the bracket is closed that is opened at ``at``; the end of the text if it isn't."""
        if self._before == ";" and (braces := _BRACES.match(self._text, at)) is not None:
            return braces.end()
        opening = self._text.find(self._text[at : at + 2].lstrip("$")[0], at)
        depth = 0
        for bracket in _BRACKETS[self._text[opening]].finditer(self._text, opening):
            depth += 1 if bracket["open"] else -1
            if depth == 0:
                return bracket.end()
        return len(self._text)

    def _is_closing(self, quote: str, first: int, at: int) -> bool:
        """Whether a quote ends what the value is within, rather than to begin a part of the value."""
        return self._quotes.before(quote, first) % 2 == 1 and _END.match(self._text, at) is not None

    def _is_over(self, sign: str, at: int) -> bool:
        """Whether a sign ends a value without quotes."""
        text = self._text
        if at == self._quoted_until:
            return True
        if sign == "&":
            return self._before != "" and self._before in "?&" and _AFTER_AMPERSAND.match(text, at) is not None
        if sign == ";":
            return self._before == ";" and _AFTER_SEMICOLON.match(text, at) is not None
        if sign == ",":
            return self._listed and _AFTER_COMMA.match(text, at) is not None
        return self._before in _OPENING[sign] and _END.match(text, at) is not None


def _end_of(pattern: re.Pattern[str], text: str, at: int) -> int:
    found = pattern.match(text, at)
    return at if found is None else found.end()
