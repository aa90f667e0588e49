"""Text without its secrets: known by their own shape, by the place they have in a URL or a login, or by their name.

Other people's text comes in every notation and in several within each other: a conninfo string in a shell script in an
argument, JSON in a header. None is parsed. What a secret is preceded by is looked for, and where its end is in doubt
more is hidden rather than less: up to the last quote or ``@`` that can end it, or to the end of the text, which may
have been cut off within it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from pgguard.secrets.encoded import encoded_spans
from pgguard.secrets.escapes import unescaped
from pgguard.secrets.scripts import script_spans
from pgguard.secrets.shapes import shaped_spans
from pgguard.secrets.urls import login_spans, passfile_spans, url_spans
from pgguard.secrets.values import named_spans

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pgguard.secrets.shapes import Span

HIDDEN: Final = "***"
"""Stands for each secret."""
_DEPTH: Final = 2
"""Texts that are encoded, or full of escapes, within one that is, which are looked into."""
_LOGIN: Final = re.compile(r"://|passw|^(?!unix:).*:.*@", re.IGNORECASE | re.DOTALL)


def may_hold_a_password(text: str) -> bool:
    """Whether a password may stand in what was given for something else, or mistyped, where no end of it is certain."""
    return _LOGIN.search(text) is not None


def redact(text: str, *, command: bool = False, cut: bool = False) -> str:
    """Text of any kind, without its secrets.

    Args:
        text: Other people's text: an argument, a title, a script, a name, a message.
        command: It is a command, a script or a title, in which what follows the name of a secret is one.
        cut: It is only the beginning of a text, so that a secret at its end may be there in part.

    Returns:
        The text with ``***`` for each secret; the same if it has none.
    """
    return hide(text, _spans(text, command=command, cut=cut, depth=_DEPTH))


def redact_structure(text: str, *, cut: bool = False) -> str:
    """Text without the secrets that are known by their shape or place alone; arguments as of :func:`redact`."""
    return hide(text, _structural_spans(text, cut=cut, depth=_DEPTH))


def hide(text: str, spans: Iterable[Span]) -> str:
    """Text with ``***`` in the place of each span; spans that overlap or touch are one."""
    said: list[str] = []
    done = 0
    hidden = False
    for start, end in sorted(spans):
        if start >= end or end <= done:
            continue
        if start > done or not hidden:
            said += [text[done:start], HIDDEN]
        done, hidden = end, True
    return "".join([*said, text[done:]]) if said else text


def _spans(text: str, *, command: bool = False, cut: bool, depth: int) -> Iterator[Span]:
    yield from _structural_spans(text, cut=cut, depth=depth)
    yield from named_spans(text, cut=cut)
    yield from script_spans(text, command=command, cut=cut)
    if depth and (plain := unescaped(text)) is not None:
        for span in _spans(plain.text, cut=cut, depth=depth - 1):
            yield plain.span(*span)


def _structural_spans(text: str, *, cut: bool, depth: int) -> Iterator[Span]:
    def holds_secret(plain: str, is_cut: bool) -> bool:
        return any(start < end for start, end in _spans(plain, cut=is_cut, depth=depth - 1))

    yield from shaped_spans(text)
    if depth:
        yield from encoded_spans(text, holds_secret, cut=cut)
    yield from url_spans(text, cut=cut)
    if "@" in text or cut:
        yield from login_spans(text, cut=cut)
    yield from passfile_spans(text)
