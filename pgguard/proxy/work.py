"""What has been begun and isn't finished, so that whoever wants to know what came of it can wait for that."""

from __future__ import annotations

import trio


class Work:
    """Pieces of work by the numbers that they were begun with; for trio's thread alone."""

    def __init__(self) -> None:
        self._last = 0
        self._begun: set[int] = set()
        self._waiting = trio.lowlevel.ParkingLot()

    def begin(self) -> int:
        """Begin a piece of work; returns its number, to :meth:`end` it by."""
        self._last += 1
        self._begun.add(self._last)
        return self._last

    def end(self, number: int) -> None:
        """End a piece of work."""
        self._begun.discard(number)
        if self._waiting:
            self._waiting.unpark_all()

    async def until_done(self) -> None:
        """Wait until everything is done that had been begun when this was called. No checkpoint if that is so."""
        last = self._last
        while any(number <= last for number in self._begun):
            await self._waiting.park()
