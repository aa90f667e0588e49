"""What keeps work that many sessions bring about at once from holding up all others.

A thousand sessions can be misused at one moment: a process that has a thousand connections is killed, or forks. Each
of them costs trio's thread a millisecond for its ruling and record, and worker threads several for evidence. So

- rulings take turns: trio's thread works on one between two turns of the sweep, the most urgent first (:class:`Turns`);
- a few threads take evidence, for whoever is most urgent, and who comes when too many wait goes without
  (:class:`Desk`);
- what looking costs is bounded over time (:class:`Allowance`). It is the processor's time that counts: on a machine
  that is busy with something else a look takes longer, and costs no more;
- what goes through all sessions lets others have their turn in between (:class:`Stint`).
"""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from enum import IntEnum
from typing import TYPE_CHECKING, Final, TypeVar, TypeVarTuple

import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

SLICE: Final = 0.001
"""Seconds for which trio's thread does such work at a time."""
GLANCES: Final = 64
"""Sessions that are glanced at before it is looked at the clock: a glance takes less than that does."""


_SOON: Final = 0.001


class Urgency(IntEnum):
    """What waits for a ruling, the most urgent first."""

    MESSAGE = 0
    """A message of a client that waits for the answer."""
    GOODBYE = 1
    """A message that nobody waits for an answer to."""
    END = 2
    """The end of a session; or nothing of the client's at all."""


class _Places:
    """Places for which tasks wait, the most urgent first, and of those who has waited for longest."""

    def __init__(self, places: int) -> None:
        self._free = places
        self._lots = {urgency: trio.lowlevel.ParkingLot() for urgency in Urgency}

    def _pass_on(self) -> None:
        """Give up one's place to the next."""
        for lot in self._lots.values():
            if lot:
                lot.unpark()
                return
        self._free += 1


class Turns(_Places):
    """Lets tasks do what keeps trio's thread busy one at a time, and all other tasks have their turn in between.

    Whoever has its turn is to come to its next checkpoint soon, and ends its turn by leaving the context.
    """

    def __init__(self) -> None:
        super().__init__(1)

    async def come(self) -> None:
        """Wait for a round of trio's loop in which nobody else comes, to do something short in what is left of it.

        Always a checkpoint. Nothing is kept from others behind it, so whatever one waits for then holds up nobody.
        """
        async with self.turn(Urgency.END):
            pass

    @asynccontextmanager
    async def turn(self, urgency: Urgency) -> AsyncIterator[None]:
        """Wait for one's turn: first comes who is more urgent, and then who has waited longer.

        Always a checkpoint, also where nobody else waits: trio's thread works on one turn in each round of its loop.
        """
        await self._take(urgency)
        try:
            yield
        finally:
            self._pass_on()

    async def _take(self, urgency: Urgency) -> None:
        if not self._free:
            await self._lots[urgency].park()
            return
        self._free -= 1
        try:
            await trio.lowlevel.checkpoint()
        except BaseException:
            self._pass_on()
            raise


class Allowance:
    """Bounds over time what something costs: a share of it, and what has been saved.

    Args:
        share: of a processor, in the long run.
        savings: seconds that may be spent at once when nothing has been for long.
    """

    def __init__(self, share: float, savings: float) -> None:
        self._share = share
        self._savings = self._left = savings
        self._at = time.monotonic()

    def has_any(self) -> bool:
        """Whether something may be spent now."""
        return not self.seconds_without()

    def seconds_without(self) -> float:
        """How long it is until something may be spent."""
        now = time.monotonic()
        self._left = min(self._savings, self._left + (now - self._at) * self._share)
        self._at = now
        return 0.0 if self._left > 0 else max(_SOON, -self._left / self._share)

    def spend(self, seconds: float) -> None:
        """Account for what was spent."""
        self._left -= seconds


class Desk(_Places):
    """Where evidence is asked for: a few are served at a time, the most urgent first.

    Args:
        places: how many are served at a time.
        line: how many of one urgency may wait; who comes when there are as many goes without.
    """

    def __init__(self, places: int, line: int) -> None:
        super().__init__(places)
        self._line = line

    @property
    def is_crowded(self) -> bool:
        """Whether somebody waits."""
        return any(self._lots.values())

    @asynccontextmanager
    async def place(self, urgency: Urgency, *, insist: bool = False) -> AsyncIterator[bool]:
        """Wait to be served.

        Args:
            urgency: who is more urgent comes first.
            insist: wait however many others do.

        Yields:
            False if there are too many already, and one isn't served.
        """
        lot = self._lots[urgency]
        if self._free:
            self._free -= 1
        elif insist or len(lot) < self._line:
            await lot.park()
        else:
            yield False
            return
        try:
            yield True
        finally:
            self._pass_on()


class Stint:
    """A piece of work on trio's thread that lets others have their turn after each :data:`SLICE`."""

    def __init__(self) -> None:
        self._ends = time.monotonic() + SLICE
        self._began = time.thread_time()
        self._spent = 0.0

    @property
    def spent(self) -> float:
        """How much of the processor's time it has taken so far, in seconds; that of others isn't counted."""
        return self._spent + time.thread_time() - self._began

    async def rest(self) -> bool:
        """Let trio's other tasks have their turn, if it is time; otherwise this is no checkpoint.

        Returns:
            Whether it was time, and things may have changed.
        """
        if time.monotonic() < self._ends:
            return False
        self._spent = self.spent
        await trio.lowlevel.checkpoint()
        self._began = time.thread_time()
        self._ends = time.monotonic() + SLICE
        return True


def timed(function: Callable[[*Ts], T], *args: *Ts) -> tuple[T, float]:
    """Call a function; return also how much of the processor's time this thread has spent on it, in seconds."""
    began = time.thread_time()
    result = function(*args)
    return result, time.thread_time() - began
