"""Recorded conversations that have been mutated at random: each has a number, by which it is the same again."""

from __future__ import annotations

import gc
import os
import random
import signal
import time
import traceback
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.fuzz.corpus import conversations
from tests.fuzz.mutations import Mutator
from tests.fuzz.player import APART, BOTH, SLICED, WHOLE, check_once
from tests.fuzz.script import cut_anywhere, cut_in_bytes, encode, joined

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pgguard.session.verdicts import Kind
    from tests.fuzz.script import Step

_SECONDS: Final = 5
"""Of processor time that a conversation may take."""
_WARM: Final = 0.2
"""Of all conversations, until memory has to have come to rest."""
_WAYS: Final = (WHOLE, WHOLE, SLICED, APART, BOTH)
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


class TooLong(Exception):
    """A conversation takes too long."""


@dataclass
class Account:
    """What has come of many conversations."""

    conversations: int = 0
    faultless: int = 0
    """Those without a verdict."""
    seconds: float = 0.0
    verdicts: Counter[Kind] = field(default_factory=Counter)
    failed: list[tuple[int, str]] = field(default_factory=list)
    """The number of each that failed, and why."""
    grown: float = 0.0
    """Megabytes by which memory has grown since it had to have come to rest."""


class Many:
    """Makes the conversations of one seed.

    Args:
        seed: Of all that is left to chance.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._rng = random.Random()
        self._originals = conversations()
        self._mutator = Mutator(self._rng, self._originals)

    def conversation(self, number: int) -> list[Step]:
        """The one of this number, cut at random."""
        rng = self._rng
        rng.seed(self._seed << 40 | number)
        steps = self._mutator.mutate(rng.choice(self._originals))
        if rng.random() < 0.3:
            return steps
        together = joined(steps)
        return list(cut_in_bytes(together) if rng.random() < 0.02 else cut_anywhere(together, rng))

    def play(self, number: int) -> Counter[Kind]:
        """Play the one of this number, and look whether it is in order."""
        return check_once(self.conversation(number), _WAYS[number % len(_WAYS)])


def play_many(seed: int, first: int, number: int, *, seconds: float | None = None) -> Account:
    """Play so many conversations, or as many as there is time for."""
    many = Many(seed)
    account = Account()
    began = time.monotonic()
    warm = 0.0
    with _alarm():
        for n in range(first, first + number):
            if seconds is not None and time.monotonic() - began > seconds:
                break
            signal.setitimer(signal.ITIMER_VIRTUAL, _SECONDS)
            try:
                found = many.play(n)
            except Exception:
                account.failed.append((n, traceback.format_exc()))
            else:
                account.verdicts += found
                account.faultless += not found
            account.conversations += 1
            if account.conversations == int(number * _WARM):
                warm = _megabytes()
    account.seconds = time.monotonic() - began
    account.grown = _megabytes() - warm if warm else 0.0
    return account


@contextmanager
def _alarm() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGVTALRM, ring)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _megabytes() -> float:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE / 1_000_000


def keep(seed: int, number: int, directory: Path) -> Path:
    """Write a conversation to a file."""
    path = directory / f"failed-{seed}-{number}"
    path.write_bytes(encode(Many(seed).conversation(number)))
    return path
