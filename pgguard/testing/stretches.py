"""Which stretch of time a fault belongs to: that in which was done what it is about, whenever it was noticed.

A test's set-up, its call and its teardown are stretches, and so is what lies between two tests. They follow each other
without a gap. Times are seconds since the epoch, by the guard's own clock: the guard ends one and begins the next, when
it has judged everything that had come by then.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

KEPT: Final = 1 << 17
"""Stretches that are remembered, at least: of what belongs to an earlier one it isn't known any more to which."""

_FORKS: Final = 4096
"""Forks of which it is remembered when they were."""
_FORKING: Final = 0.01
"""Seconds between the moment in which a process is about to fork and its child's start."""


class Stretches:
    """Stretches by their numbers.

    Args:
        number: The first one's.
        at: When it begins.
    """

    def __init__(self, number: int, at: float) -> None:
        self._numbers = [number]
        self._begun = [at]
        self._forks: deque[float] = deque(maxlen=_FORKS)

    @property
    def current(self) -> int:
        """The number of the one that goes on."""
        return self._numbers[-1]

    def begin(self, number: int, at: float) -> None:
        """Begin another one, with which the last one ends. A clock that has been set back stands still meanwhile."""
        self._numbers.append(number)
        self._begun.append(max(at, self._begun[-1]))
        if len(self._numbers) > 2 * KEPT:
            del self._numbers[:KEPT], self._begun[:KEPT]

    def note_forks(self, forks: Iterable[float]) -> None:
        """Know when the tests' process has forked."""
        self._forks.extend(forks)

    def of(self, since: float, until: float, *, forked: bool = False) -> int | None:
        """The one that something belongs to which was done between two times; ``None`` if that isn't certain.

        Args:
            since: The first of them.
            until: The other one.
            forked: It was done as the tests' process forked: if that was in one of several stretches alone, it is that
                one.
        """
        first, last = self._place(since), self._place(until)
        if first != last and forked:
            places = {self._place(at) for at in self._forks if since - _FORKING <= at <= until}
            first = last = places.pop() if len(places) == 1 else 0
        return self._numbers[last - 1] if first == last > 0 else None

    def _place(self, at: float) -> int:
        return bisect_right(self._begun, at)
