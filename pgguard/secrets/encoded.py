"""Secrets in a text that is encoded as a whole: base64, or hexadecimal digits, of a setting, a URL, a header.

Nothing is told by how it looks: it is decoded, and if that yields a text with a secret in it, all of it is one.
"""

from __future__ import annotations

import binascii
import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pgguard.secrets.shapes import Span

_LEAST: Final = 12
"""Characters of what is decoded: nine bytes, or six."""
_RUN: Final = re.compile(rf"[A-Za-z0-9+/_-]{{{_LEAST},}}+={{0,2}}")
_PIECE: Final = re.compile(rf"[A-Za-z0-9]{{{_LEAST},}}+={{0,2}}")
"""What may be such a text where the other signs don't belong to it: in a path, or behind a name."""
_HEXADECIMAL: Final = re.compile(r"(?:0x|x)?(?P<digits>(?:[0-9a-fA-F]{2})+)[0-9a-fA-F]?")
_WRAPPED: Final = 60
"""Characters of a line behind which it goes on in the next one: base64(1) has 76 of them, PEM 64."""
_BREAK: Final = re.compile(r"\r?\n[ \t]*")
_UNPRINTABLE: Final = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")
_STANDARD: Final = str.maketrans("-_", "+/")
_TORN: Final = 3
"""Bytes at the end that may be the beginning of a character, where it was cut off."""


def encoded_spans(text: str, holds_secret: Callable[[str, bool], bool], *, cut: bool) -> Iterator[Span]:
    """Where texts stand that hold a secret when they are decoded.

    Args:
        text: where they stand.
        holds_secret: whether a text holds a secret, and whether that is only the beginning of one.
        cut: it is only the beginning of a text.
    """
    for start, end in _runs(text):
        ends = cut and end == len(text)
        run = _BREAK.sub("", text[start:end])
        if any(holds_secret(plain, ends) for plain in _decoded(run)):
            yield start, end
            continue
        for piece in _PIECE.finditer(text, start, end):
            if piece.span() != (start, end) and any(holds_secret(plain, ends) for plain in _decoded(piece.group())):
                yield piece.span()


def _runs(text: str) -> Iterator[Span]:
    """Each run of letters, digits and signs; one that is wrapped into lines is one."""
    begun: Span | None = None
    for found in _RUN.finditer(text):
        start, end = found.span()
        if begun is not None:
            gap = _BREAK.match(text, begun[1])
            if gap is None or gap.end() != start:
                yield begun
                begun = None
        begun = (start if begun is None else begun[0], end)
        if len(found.group()) < _WRAPPED:
            yield begun
            begun = None
    if begun is not None:
        yield begun


def _decoded(run: str) -> Iterator[str]:
    """The texts that a run may stand for."""
    digits = _HEXADECIMAL.fullmatch(run)
    if digits is not None:
        yield from _text(bytes.fromhex(digits["digits"]))
    body = run.rstrip("=").translate(_STANDARD)
    body = body[: len(body) - (len(body) % 4 == 1)]
    yield from _text(binascii.a2b_base64(body + "=" * (-len(body) % 4)))


def _text(data: bytes) -> Iterator[str]:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        if error.start < len(data) - _TORN:
            return
        text = data[: error.start].decode()
    if not _UNPRINTABLE.search(text):
        yield text
