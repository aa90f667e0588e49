"""Secrets in what may be a shell's script, and in the scripts that are quoted within it.

A title, a message or an argument may be one: its words are looked at as those of a command line are. Quotes within
quotes are taken off one by one, so that what a program will get in the end is what is looked at.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

from pgguard.secrets.options import secret_parts
from pgguard.secrets.values import named_spans

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pgguard.secrets.shapes import Span

_WORD: Final = re.compile(
    r"""(?:[^\s\\'"`;|&()]|\\.|\\\Z|'[^']*+(?:'|\Z)|"(?:[^"\\]|\\.)*+\\?(?:"|\Z)|`)++""", re.DOTALL
)
_STRETCH: Final = re.compile(r"\S+")
_OPENING: Final = "\\\"'`({["
_CLOSING: Final = "\\\"'`)}],;"
_NEW_COMMAND: Final = re.compile(r"[;|&()\n]")
_QUOTED: Final = re.compile(
    r"""'(?P<single>[^']*+)'?|"(?P<double>(?:[^"\\]|\\.)*+)\\?"?|\\(?P<escaped>.)|(?P<plain>.)""", re.DOTALL
)
_ESCAPED: Final = re.compile(r"\\(?P<escaped>[$`\"\\\n])|(?P<plain>.)", re.DOTALL)
_DEPTH: Final = 3
"""Scripts within scripts that are looked into."""


class _Word(NamedTuple):
    """A word as a program gets it."""

    text: str
    places: Sequence[int]
    """Where each of its characters stands in the script."""
    end: int

    def span(self, start: int, end: int) -> Span:
        """Where a piece of it stands in the script."""
        return self.places[start], self.places[end - 1] + 1


def script_spans(text: str, *, cut: bool) -> Iterator[Span]:
    """Where in a script, a title or any other text a secret stands behind its option, or within a quoted script.

    Args:
        text: the script.
        cut: it is only the beginning of one, so that its last word may be.
    """
    if "-" in text:  # whatever the quotes are
        words = [_bare(text, *found.span()) for found in _STRETCH.finditer(text)]
        yield from _command_spans(words, cut=cut and not text[-1:].isspace())
    yield from _script_spans(text, _DEPTH, cut=cut)


def _bare(text: str, start: int, end: int) -> _Word:
    """A word without what it may be quoted or put in brackets by."""
    stretch = text[start:end]
    rest = stretch.lstrip(_OPENING)
    word = rest.rstrip(_CLOSING)
    if not word:
        return _plain(text, start, end)
    start += len(stretch) - len(rest)
    return _plain(text, start, start + len(word))


def _script_spans(text: str, depth: int, *, cut: bool) -> Iterator[Span]:
    command: list[_Word] = []
    for found in _WORD.finditer(text):
        start, end = found.span()
        if command and _NEW_COMMAND.search(text, command[-1].end, start):
            yield from _command_spans(command)
            command = []
        word = _unquoted(text, start, end)
        command.append(word)
        if depth and len(word.text) < end - start and text[start] not in "{[":
            ends = cut and end == len(text)
            for inner in (*named_spans(word.text, cut=ends), *_script_spans(word.text, depth - 1, cut=ends)):
                yield word.span(*inner)
    yield from _command_spans(command, cut=cut and bool(command) and command[-1].end == len(text))


def _command_spans(words: list[_Word], *, cut: bool = False) -> Iterator[Span]:
    for number, offset in secret_parts([word.text for word in words], positional=False, cut=cut):
        if offset < len(words[number].text):
            yield words[number].span(offset, len(words[number].text))


def _plain(text: str, start: int, end: int) -> _Word:
    return _Word(text[start:end], range(start, end), end)


def _unquoted(text: str, start: int, end: int) -> _Word:
    """A word without its quotes: "Quoting" in the POSIX shell's grammar."""
    word = text[start:end]
    if not any(sign in word for sign in "'\"\\"):
        return _plain(text, start, end)
    places: list[int] = []
    for piece in _QUOTED.finditer(text, start, end):
        if piece["double"] is not None:
            places.extend(
                inner.start("plain") if inner["escaped"] is None else inner.start("escaped")
                for inner in _ESCAPED.finditer(text, *piece.span("double"))
            )
        else:
            places.extend(range(*piece.span(piece.lastgroup or 0)))
    return _Word("".join(text[place] for place in places), places, end)
