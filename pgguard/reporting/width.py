"""How broad what is printed may be, as the environment says. It imports nothing that takes time."""

from __future__ import annotations

import os
from typing import Final

WIDEST: Final = 1000
"""Columns, at most: lines are filled up to there while they are made."""

_SIZES: Final = ("COLUMNS", "LINES", "TERMINAL_WIDTH")
"""Variables that say how large the terminal is; rich and typer read them too, but fail where they aren't numbers."""


def wanted_width() -> int | None:
    """How many columns ``COLUMNS`` asks for; ``None`` if it doesn't, or not in a number."""
    return _size(os.environ.get("COLUMNS", ""))


def tidy_environment() -> None:
    """Take variables away that are no sizes, and set those that are too large to the largest."""
    for name in _SIZES:
        if name in os.environ:
            size = _size(os.environ[name])
            if size is None:
                del os.environ[name]
            else:
                os.environ[name] = str(size)


def _size(text: str) -> int | None:
    # int() takes what isdigit() doesn't, and the other way round.
    if not (text.isascii() and text.isdigit()) or len(text) > 9 or text[0] == "0":
        return None
    return min(int(text), WIDEST)
