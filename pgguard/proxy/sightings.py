"""What has been seen, from time to time, of the processes behind one session."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Final

from pgguard.attribution.threads import Waits

if TYPE_CHECKING:
    from pgguard.attribution.evidence import Process
    from pgguard.attribution.threads import Sleep, Thread

_LATELY: Final = 2.0
"""Seconds after which a process that has let go of a connection has nothing to do any more with what happens to it."""

# An empty frozenset takes 216 bytes, and isn't the same as any other: there are thousands of sessions.
_NOBODY: Final[frozenset[int]] = frozenset()
_NO_SLEEPS: Final[frozenset[Sleep]] = frozenset()
_NO_THREADS: Final[frozenset[Thread]] = frozenset()
_NO_WAITS: Final = Waits()


class Sightings:
    """Written by the watch (:mod:`pgguard.proxy.watch`) and the sampling of requests, read by investigations.

    Times are trio's, unless said otherwise.
    """

    __slots__ = (
        "_lasting",
        "_let_go",
        "_looked",
        "asleep",
        "holders",
        "holders_looked",
        "idle_behind",
        "idle_told",
        "leak_told",
        "loiterers",
        "look_next",
        "looks",
        "sampled_asleep",
        "settled_told",
        "survivors",
        "throughout",
        "unused_since",
        "waits",
        "watch_next",
        "watchers",
    )

    def __init__(self) -> None:
        self.holders: tuple[Process, ...] = ()
        """The processes that had the client's socket open when that was last looked at."""
        self.holders_looked = 0.0
        """When that was."""
        self.survivors: tuple[Process, ...] = ()
        """Who went on to have it open when the connection had been ended, and the opener had let go."""
        self._lasting: tuple[Process, ...] = ()
        """Those that had it open for longer than on the way to exec()."""
        self._let_go: tuple[tuple[Process, float], ...] = ()
        """Those that had once, lately, and when they may have let go of it."""
        self._looked = -math.inf
        """When it was last looked who had, in seconds of time.monotonic()."""
        self.idle_told: frozenset[int] = _NOBODY
        self.settled_told: frozenset[int] = _NOBODY
        """The pids of the heirs that an inherited-connection has been recorded for: of those that had done nothing, and
        of those that had connections of their own."""
        self.asleep: frozenset[Sleep] = _NO_SLEEPS
        """The threads that were blocked on the socket when that was last looked at."""
        self.sampled_asleep: frozenset[Sleep] = _NO_SLEEPS
        """The same, when a request was last sampled."""
        self.loiterers: frozenset[Thread] = _NO_THREADS
        """Those of them that no answer was due to."""
        self.waits = _NO_WAITS
        """The same, with all that was seen of them."""
        self.throughout: frozenset[Sleep] = _NO_SLEEPS
        """The sleeps that the threads of its only process were in when nothing that they had sent was left unread."""
        self.watchers: frozenset[Thread] = _NO_THREADS
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
        keys = {(process.pid, process.started) for process in lasting}
        # When it was looked at long ago, it isn't known when they let go, but that was seen soon after it.
        since = max(self._looked, now - _LATELY / 2)
        gone = [(one, since) for one in self._lasting if (one.pid, one.started) not in keys]
        gone += [(one, at) for one, at in self._let_go if (one.pid, one.started) not in keys and now - at < _LATELY]
        self.holders, self._lasting, self._let_go, self._looked = holders, lasting, tuple(gone), now

    def late_holders(self) -> tuple[Process, ...]:
        """Who had the client's socket open lately, whether or not they have it still."""
        now = time.monotonic()
        return (*self._lasting, *(process for process, at in self._let_go if now - at < _LATELY))
