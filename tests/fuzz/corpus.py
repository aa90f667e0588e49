"""The conversations that are kept: recorded ones, and the smallest that ever failed."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tests.fuzz.script import Step, decode

DIRECTORY: Final = Path(__file__).parent / "corpus"


def files() -> list[Path]:
    """All of them, in the same order each time."""
    return sorted(DIRECTORY.iterdir())


def conversations() -> list[list[Step]]:
    """The same, read."""
    return [decode(path.read_bytes()) for path in files()]
