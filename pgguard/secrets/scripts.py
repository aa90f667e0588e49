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
_COMMAND: Final = re.compile(r"(?P<words>[^|;&\n]+)(?P<end>[|;&\n]|$)")
_READS_A_SECRET: Final = re.compile(
    r"\bchpasswd\b|\s--?(?:[a-z]+-)*stdin\b|\s--with-token\b|\s--passphrase-fd\b|\bsmbpasswd\s|\bkinit\s"
)
_SUDO: Final = re.compile(r"\bsudo\s")
_READS: Final = re.compile(r"\s-[A-Za-z]*S\b")
_SAYS: Final = re.compile(r"(?<![\w-])(?:echo|printf)\s+(?:-[A-Za-z]+\s+)*")
_HERE: Final = re.compile(r"<<<\s*")
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


def script_spans(text: str, *, command: bool, cut: bool) -> Iterator[Span]:
    """Where in a script, a title or any other text a secret stands behind its option, or within a quoted script.

    Args:
        text: the script.
        command: it is one, or a title: the name of a secret without a dash, too, is followed by the secret.
        cut: it is only the beginning of one, so that its last word may be.
    """
    if command or "-" in text:  # whatever the quotes are
        words = [_bare(text, *found.span()) for found in _STRETCH.finditer(text)]
        yield from _command_spans(words, positional=command, cut=cut and not text[-1:].isspace())
    yield from _script_spans(text, _DEPTH, positional=command, cut=cut)
    if cut or "|" in text or "<<<" in text:
        yield from _piped_spans(text, cut=cut)


def _bare(text: str, start: int, end: int) -> _Word:
    """A word without what it may be quoted or put in brackets by."""
    stretch = text[start:end]
    rest = stretch.lstrip(_OPENING)
    word = rest.rstrip(_CLOSING)
    if not word:
        return _plain(text, start, end)
    start += len(stretch) - len(rest)
    return _plain(text, start, start + len(word))


def _script_spans(text: str, depth: int, *, positional: bool = False, cut: bool) -> Iterator[Span]:
    command: list[_Word] = []
    for found in _WORD.finditer(text):
        start, end = found.span()
        if command and _NEW_COMMAND.search(text, command[-1].end, start):
            yield from _command_spans(command, positional=positional)
            command = []
        word = _unquoted(text, start, end)
        command.append(word)
        if depth and len(word.text) < end - start and text[start] not in "{[":
            ends = cut and end == len(text)
            for inner in (*named_spans(word.text, cut=ends), *_script_spans(word.text, depth - 1, cut=ends)):
                yield word.span(*inner)
    ends = cut and bool(command) and command[-1].end == len(text)
    yield from _command_spans(command, positional=positional, cut=ends)


def _command_spans(words: list[_Word], *, positional: bool, cut: bool = False) -> Iterator[Span]:
    for number, offset in secret_parts([word.text for word in words], positional=positional, cut=cut):
        if offset < len(words[number].text):
            yield words[number].span(offset, len(words[number].text))


def _piped_spans(text: str, *, cut: bool) -> Iterator[Span]:
    """What a command is given to read that reads a secret: ``echo X | sudo -S …``, ``… --password-stdin <<< X``.

    Of a text that is cut off it isn't known what follows.
    """
    before: re.Match[str] | None = None
    for command in _COMMAND.finditer(text):
        if (cut and command.end() == len(text)) or _reads_a_secret(text, *command.span("words")):
            if (here := _HERE.search(text, *command.span("words"))) is not None:
                yield here.end(), command.end("words")
            yield from _said(text, before)
        before = command
    if cut and before is not None:
        yield from _said(text, before, last=True)


def _reads_a_secret(text: str, start: int, end: int) -> bool:
    if _READS_A_SECRET.search(text, start, end) is not None:
        return True
    sudo = _SUDO.search(text, start, end)
    return sudo is not None and _READS.search(text, sudo.end() - 1, end) is not None


def _said(text: str, command: re.Match[str] | None, *, last: bool = False) -> Iterator[Span]:
    """What a command says that writes to the next one."""
    if command is None or not (command["end"] == "|" or (last and command.end() == len(text))):
        return
    said = _SAYS.search(text, *command.span("words"))
    if said is not None:
        yield said.end(), command.end("words")


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
