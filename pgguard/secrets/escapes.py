r"""Text in which characters are written as escapes, as it is read in the end: ``p\u0061ssword``, ``&#112;assword``."""

from __future__ import annotations

import re
from bisect import bisect_left
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pgguard.secrets.shapes import Span

_ESCAPE: Final = re.compile(
    r"""
    \\{1,8}(?:u(?P<u>[0-9a-f]{4}) | u\{0{0,4}(?P<braced>[0-9a-f]{1,6})\} | x(?P<x>[0-9a-f]{2})
      | U000(?P<U>[0-9a-f]{5}))                                                  # JSON, JavaScript, Python, YAML, C
    | &\#(?:0{0,4}(?P<decimal>\d{2,6}) | x0{0,4}(?P<hexadecimal>[0-9a-f]{2,5}));  # HTML, XML
    """,
    re.VERBOSE | re.IGNORECASE,
)
_LAST: Final = 0x10FFFF


class Unescaped(NamedTuple):
    """A text without escapes, and where it has been taken from."""

    text: str
    pieces: Sequence[tuple[int, int]]
    """Where stretches of it begin, and where they stood in the text as it was; each as far as the next one."""

    def span(self, start: int, end: int) -> Span:
        """Where a piece of it stood, with all of its escapes."""
        return self._place(start), self._end(end)

    def _place(self, at: int) -> int:
        begins, stood = self.pieces[bisect_left(self.pieces, (at + 1, 0)) - 1]
        return stood + at - begins

    def _end(self, at: int) -> int:
        # Whatever stood between what it ends with and what follows belonged to an escape.
        return self._place(at) if at < len(self.text) else self.pieces[-1][1]


def unescaped(text: str) -> Unescaped | None:
    """The text with each escape as the character that it stands for; ``None`` if there is none."""
    if "\\" not in text and "&#" not in text:
        return None
    said: list[str] = []
    pieces: list[tuple[int, int]] = []
    length = done = 0
    for found in _ESCAPE.finditer(text):
        before = text[done : found.start()]
        pieces += [(length, done), (length + len(before), found.start())]
        said += [before, _character(found)]
        length += len(before) + 1
        done = found.end()
    if not said:
        return None
    said.append(text[done:])
    length += len(text) - done
    return Unescaped("".join(said), [*pieces, (length - len(text) + done, done), (length, len(text))])


def _character(escape: re.Match[str]) -> str:
    digits = escape[escape.lastgroup or 0]
    return chr(min(int(digits, 10 if escape.lastgroup == "decimal" else 16), _LAST))
