"""Passwords by their place: in URLs, in ``user:password@host``, in the lines of libpq's password file."""

from __future__ import annotations

import re
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
_RUN: Final = re.compile(r"\S*")
_LINE: Final = re.compile(r"[^\n\r]*")
_OPENED: Final = re.compile(r"(?P<quote>[\"'`])(?:[\w.+-]+[:=])*[\w.+-]*\Z")
_PORT: Final = re.compile(r"(?:\d{1,5}|\*|\$?\{?PORT\}?|)(?=[/,?#\s'\"`)\]};>\\&|]|%2F|%3F|$)")


def url_spans(text: str, *, cut: bool) -> Iterator[Span]:
    """Passwords of URLs, up to the last ``@`` that can end them: one may hold what should have been encoded."""
    for authority, at in _URLS:
        for found in authority.finditer(text):
            if found["colon"] is not None:
                span = _url_password(text, found, at, cut=cut)
                if span is not None:
                    yield span
            elif found["web"] and (found["at"] is not None or (cut and found.end() == len(text))):
                yield found.span("user")  # a token, more often than not


def _url_password(text: str, found: re.Match[str], at: re.Pattern[str], *, cut: bool) -> Span | None:
    """Where the password stands that may follow the beginning of a URL."""
    start = found.end()
    end = _url_ends(text, found.start(), start)
    last = _last(at, text, start, end)
    if last is not None:
        return start, end if cut and end == len(text) else last  # another @ may follow
    if _PORT.match(text, start) or found["user"].startswith("["):
        # Cut off, it may go on, and be no port.
        return (start, end) if cut and end == len(text) else None
    line = _LINE.match(text, end)
    return start, _last(at, text, end, end if line is None else line.end()) or end


def _url_ends(text: str, start: int, at: int) -> int:
    """Where a URL ends that is begun at ``start`` and known up to ``at``: with its quotation, or at the next space."""
    opened = _OPENED.search(text[max(0, start - NAME_LENGTH) : start + 1])
    closing = None if opened is None else rest_of_quotation(opened["quote"]).match(text, at)
    return _run_ends(text, at) if closing is None else closing.end() - 1


def _run_ends(text: str, at: int) -> int:
    run = _RUN.match(text, at)
    return at if run is None else run.end()


def _last(pattern: re.Pattern[str], text: str, start: int, end: int) -> int | None:
    last = None
    for found in pattern.finditer(text, start, end):
        last = found.start()
    return last


_LOGIN: Final = re.compile(r"(?<![\w/.@:-])(?!unix:[@/])[A-Za-z_][\w.+-]*:(?!\s|(?:\\*/){2}|:\w*@[>@?])")
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
