"""Passwords by their place: in URLs, in ``user:password@host``, in the lines of libpq's password file."""

from __future__ import annotations

import re
from bisect import bisect_left
from typing import TYPE_CHECKING, Final

from pgguard.secrets.names import NAME_LENGTH
from pgguard.secrets.quotes import rest_of_quotation

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pgguard.secrets.shapes import Span


def _authority(colon: str, slash: str, at: str, user: str) -> re.Pattern[str]:
    return re.compile(
        rf"(?:(?P<web>https?)|[\w+.-]|%2B){colon}(?:{slash}){{2}}(?P<user>{user})(?:(?P<colon>{colon})|(?P<at>{at}))?",
        re.IGNORECASE,
    )


_URLS: Final = (
    (_authority(":", r"\\*/", "@", r"[^\s/?#:@\"'`\\]*"), re.compile("@")),
    (
        _authority("%(?:25)*3A", "%(?:25)*2F", "%(?:25)*40", r"(?:[^\s/?#:@\"'`\\%&]|%(?!(?:25)*(?:3A|40|2F)))*"),
        re.compile("%(?:25)*40|@"),
    ),
)
"""Beginnings of URLs, up to the colon in front of a password or the ``@`` without one, and what ends the password: as
they are, and percent-encoded within another."""
_SPACE: Final = re.compile(r"\s")
_LINE_END: Final = re.compile(r"[\n\r]")
_OPENED: Final = re.compile(r"(?P<quote>[\"'`])(?:[\w.+-]+[:=])*[\w.+-]*\Z")
_PORT: Final = re.compile(r"(?:\d{1,5}|\*|\$?\{?PORT\}?|)(?=[/,?#\s'\"`)\]};>\\&|]|%2F|%3F|$)")


def url_spans(text: str, *, cut: bool) -> Iterator[Span]:
    """Passwords of URLs, up to the last ``@`` that can end them: one may hold what should have been encoded."""
    for authority, at in _URLS:
        found = list(authority.finditer(text))
        urls = _Urls(text, at, cut=cut) if found else None
        for url in found:
            if url["colon"] is not None and urls is not None:
                span = urls.password(url)
                if span is not None:
                    yield span
            elif url["web"] and (url["at"] is not None or (cut and url.end() == len(text))):
                yield url.span("user")  # a token, more often than not


class _Urls:
    """Finds out where the passwords of URLs end. There may be very many in a text, which is looked through only once.

    Args:
        text: Where they stand.
        at: What ends a password.
        cut: The text is only the beginning of one.
    """

    def __init__(self, text: str, at: re.Pattern[str], *, cut: bool) -> None:
        self._text = text
        self._cut = cut
        self._ats = [found.start() for found in at.finditer(text)]
        self._spaces = [found.start() for found in _SPACE.finditer(text)]
        self._line_ends = [found.start() for found in _LINE_END.finditer(text)]
        self._quotations: dict[str, Span] = {}
        """By its quote, the quotation that was looked at last; one without an end goes to behind the text's."""

    def password(self, url: re.Match[str]) -> Span | None:
        """Where the password stands that may follow the beginning of a URL."""
        text = self._text
        start = url.end()
        end = self._url_ends(url.start(), start)
        last = self._last_at(start, end)
        if last is not None:
            return start, end if self._cut and end == len(text) else last  # another @ may follow
        if _PORT.match(text, start) or url["user"].startswith("["):
            # Cut off, it may go on, and be no port.
            return (start, end) if self._cut and end == len(text) else None
        return start, self._last_at(end, self._next(self._line_ends, end)) or end

    def _url_ends(self, start: int, at: int) -> int:
        """Where a URL ends that is begun at ``start`` and known up to ``at``: with its quotation, or at a space."""
        opened = _OPENED.search(self._text[max(0, start - NAME_LENGTH) : start + 1])
        closed = None if opened is None else self._quotation_ends(opened["quote"], at)
        return self._next(self._spaces, at) if closed is None else closed

    def _quotation_ends(self, quote: str, at: int) -> int | None:
        begins, ends = self._quotations.get(quote, (0, -1))
        if not begins <= at <= ends:
            closing = rest_of_quotation(quote).match(self._text, at)
            ends = len(self._text) + 1 if closing is None else closing.end() - 1
            self._quotations[quote] = at, ends
        return None if ends > len(self._text) else ends

    def _next(self, places: list[int], at: int) -> int:
        n = bisect_left(places, at)
        return places[n] if n < len(places) else len(self._text)

    def _last_at(self, start: int, end: int) -> int | None:
        n = bisect_left(self._ats, end)
        return self._ats[n - 1] if n and self._ats[n - 1] >= start else None


_LOGIN: Final = re.compile(r"(?<![\w/.@:+-])(?!unix:[@/])[A-Za-z_+][\w.+-]*:(?!\s|(?:\\*/){2}|:\w*@[>@?])")
_STRETCH: Final = re.compile(r"\S+")


def login_spans(text: str, *, cut: bool) -> Iterator[Span]:
    """Passwords of ``user:password@host``. A path, or the name of an abstract socket, is none."""
    for stretch in _STRETCH.finditer(text):
        last = stretch.group().rfind("@") + stretch.start()
        if cut and stretch.end() == len(text):
            last = len(text)  # there may be one to come
        if last > stretch.start():
            found = _LOGIN.search(text, stretch.start(), last)
            if found is not None:
                yield found.end(), last


_PASSFILE: Final = re.compile(
    r"(?<![^\s\"'`=])[^\s:\"'`=]+:(?:\d{2,5}|\*):[^\s:]+:[^\s:]+:(?P<password>(?:\\.|[^\s:\\])+)(?![^\s\"'`])"
)
"""A line of libpq's password file: host, port, database, user, password."""


def passfile_spans(text: str) -> Iterator[Span]:
    """Passwords of lines as libpq's password file has them."""
    for found in _PASSFILE.finditer(text):
        yield found.span("password")
