"""When the guard was awake: what happened while it wasn't, it can only have learned of too late.

The kernel names senders by their pids. A pid is looked at within milliseconds, and no pid is given again as soon as
that: the kernel goes through all the others first (``alloc_pid()`` in ``kernel/pid.c``). But a guard that was stopped,
in a container that was frozen, on a machine that was suspended, or very busy, reads what came in meanwhile when its
sender may be long gone, and the pid another's. So whoever began while the guard wasn't awake isn't taken for the sender
of what is read just after that.
"""

from __future__ import annotations

import threading
import time
from typing import Final

from pgguard.attribution.processes import TICKS_PER_SECOND

BEAT: Final = 0.25
"""Seconds from one beat to the next."""
_ASLEEP: Final = 1.0
"""Seconds without a beat from which on the guard counts as not awake: in that time no host gives out all its pids."""
_AFTERWARDS: Final = 1.0
"""Seconds after that in which what came in meanwhile is read, and its senders are looked at."""


class Vigil:
    """Knows when the guard was awake. Thread-safe. Times are seconds of CLOCK_BOOTTIME, which goes on in a suspend."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last_beat: float | None = None
        """``None``: nobody says when it is awake, and so it is taken to be."""
        self._slept: tuple[float, float] = (0.0, 0.0)
        """From when to when it wasn't awake the last time."""

    def beat(self) -> None:
        """Say that the guard is awake; to be called every :data:`BEAT` seconds, on the thread that reads."""
        with self._lock:
            now = _now()
            if self._last_beat is not None and now - self._last_beat > _ASLEEP:
                self._slept = (self._last_beat, now)
            self._last_beat = now

    def saw_begin(self, started: int) -> bool:
        """Whether a process is certainly the one whose pid the kernel has named with what has just been read.

        Args:
            started: As in :class:`~pgguard.attribution.evidence.Process`.
        """
        with self._lock:
            now, last_beat, (since, until) = _now(), self._last_beat, self._slept
        # Start times are known to the tick.
        earliest, latest = started / TICKS_PER_SECOND, (started + 1) / TICKS_PER_SECOND
        if last_beat is not None and now - last_beat > _ASLEEP:
            return latest < last_beat
        return now - until > _AFTERWARDS or latest < since or earliest > until


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
