"""What has been seen, from time to time, of the processes behind one session."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from pgguard.attribution.threads import Waits

if TYPE_CHECKING:
    from pgguard.attribution.evidence import Process
    from pgguard.attribution.threads import Sleep, Thread

_LATELY: Final = 2.0
"""Seconds after which a process that has let go of a connection has nothing to do any more with what happens to it."""


class Sightings:
    """Written by the watch (:mod:`pgguard.proxy.watch`) and the sampling of requests, read by investigations.

    Times are trio's, unless said otherwise.
    """

    def __init__(self) -> None:
        self.holders: tuple[Process, ...] = ()
        """The processes that had the client's socket open when that was last looked at."""
        self.holders_looked = 0.0
        """When that was."""
        self.survivors: tuple[Process, ...] = ()
        """Who went on to have it open when the connection had been ended, and the opener had let go."""
        self._lately: dict[tuple[int, int], tuple[Process, float]] = {}
        self.idle_told: frozenset[int] = frozenset()
        self.settled_told: frozenset[int] = frozenset()
        """The pids of the heirs that an inherited-connection has been recorded for: of those that had done nothing, and
        of those that had connections of their own."""
        self.asleep: frozenset[Sleep] = frozenset()
        """The threads that were blocked on the socket when that was last looked at."""
        self.sampled_asleep: frozenset[Sleep] = frozenset()
        """The same, when a request was last sampled."""
        self.loiterers: frozenset[Thread] = frozenset()
        """Those of them that no answer was due to."""
        self.waits = Waits()
        """The same, with all that was seen of them."""
        self.throughout: frozenset[Sleep] = frozenset()
        """The sleeps that the threads of its only process were in when nothing that they had sent was left unread."""
        self.watchers: frozenset[Thread] = frozenset()
        """The threads that wait on the socket even when no answer is due."""
        self.look_next = 0.0
        """When to look again, whether several threads wait for one answer."""
        self.looks = 0
        """How often that was looked at."""
        self.watch_next = 0.0
        """When to look again, who waits when no answer is due."""
        self.unused_since: tuple[int, float] | None = None
        """Since when nobody has used it, behind the request of this number, whose opener is known to have ended."""
        self.leak_told = False
        self.idle_behind: int | None = None
        """The number of the request behind which it was last found idle in a transaction."""

    def note_holders(self, holders: tuple[Process, ...], lasting: tuple[Process, ...]) -> None:
        """Take note of who has the client's socket open now, and who of them for longer than on the way to exec()."""
        now = time.monotonic()
        self.holders = holders
        self._lately |= {(process.pid, process.started): (process, now) for process in lasting}
        self._lately = {key: seen for key, seen in self._lately.items() if now - seen[1] < _LATELY}

    def late_holders(self) -> tuple[Process, ...]:
        """Who had the client's socket open lately, whether or not they have it still."""
        return tuple(process for process, _ in self._lately.values())
