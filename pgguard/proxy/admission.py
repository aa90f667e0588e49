"""How many clients may be here at once: as many as there are descriptors for, less some that are kept back.

A session takes two descriptors, its client's and its server's. What a process may have open is limited: RLIMIT_NOFILE,
getrlimit(2). Whoever comes last must not get the last of them. So sessions are counted, and those that are over the
count are told so. What is kept back is for

- evidence, which opens files in ``/proc``, sockets to ask the kernel, and pipes to py-spy: without it, a fault that
  comes when the guard is full would be nobody's;
- the file of faults, should it be opened anew;
- telling clients that there is no room, some at a time, and passing on the cancel requests among them.

What is counted is what sessions take, not what is open: that costs nothing, however many there are.
"""

from __future__ import annotations

import os
import resource
from typing import TYPE_CHECKING, Final

from pgguard.proxy.remedies import HOW_TO_RAISE
from pgguard.wire.fields import build_error_response

if TYPE_CHECKING:
    from collections.abc import Callable

_EACH: Final = 2
"""Descriptors of a session: its client's and its server's."""
_KEPT_BACK: Final = 48
"""Descriptors that aren't for sessions."""
_KEPT_FOR_EVIDENCE: Final = 80
"""And as many more where evidence is taken: for the threads that take some at the same time, each with a few files of
``/proc``, a socket, and py-spy's pipes."""
_SHARE: Final = 3
"""Where the limit is low, the part of what there is that is kept back: a third."""
_TURNED_AWAY: Final = 16
"""Clients that are told at the same time that there is no room, at most."""
_SQLSTATE: Final = "53300"
"""``too_many_connections``: PostgreSQL documentation, appendix A."""


class Admission:
    """Counts who is here.

    Args:
        evidence: descriptors are kept back for attribution too.
        extras: how many descriptors sessions have beyond their two.
    """

    def __init__(self, *, evidence: bool, extras: Callable[[], int]) -> None:
        self._kept_back = _KEPT_BACK + (_KEPT_FOR_EVIDENCE if evidence else 0)
        self._extras = extras
        self._others = 0
        self._sessions = 0

    def count_others(self) -> None:
        """See how many descriptors are open before anybody is admitted: they are the guard's own."""
        try:
            self._others = len(os.listdir("/proc/self/fd")) - 1  # noqa: PTH208 - less the one that listed them
        except OSError:
            self._others = self.limit  # there isn't even one for that

    def keep_back(self, descriptors: int) -> None:
        """Keep so many more from sessions, for something that goes on beside them."""
        self._kept_back += descriptors

    @property
    def limit(self) -> int:
        """Descriptors that the process may have open now: prlimit(1) can change it at any time."""
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return soft

    @property
    def capacity(self) -> int:
        """How many sessions there can be at once."""
        return max(0, self._for_sessions() // _EACH)

    @property
    def turned_away_at_once(self) -> int:
        """How many clients may be told at the same time that there is no room: each takes as much as a session."""
        kept_back = self.limit - self._others - self._for_sessions()
        return max(1, min(_TURNED_AWAY, kept_back // (2 * _EACH)))

    def has_room(self, descriptors: int = _EACH) -> bool:
        """Whether sessions may take so many descriptors more."""
        return self._sessions * _EACH + self._extras() + descriptors <= self._for_sessions()

    def admit(self) -> None:
        """Count one more, for whom there :meth:`has_room`."""
        self._sessions += 1

    def vacate(self) -> None:
        """Count one less, whose descriptors are closed."""
        self._sessions -= 1

    def why_full(self) -> str:
        """Why there is no room: a clause."""
        capacity = self.capacity
        sessions = "session" if capacity == 1 else "sessions"
        return f"the limit of {self.limit} open files leaves room for only {capacity} {sessions} at once"

    def _for_sessions(self) -> int:
        there = self.limit - self._others
        return there - min(self._kept_back, there // _SHARE)


def too_many(why: str, hint: str = HOW_TO_RAISE) -> bytes:
    """What a client is told that this host has no room for.

    Args:
        why: there is none.
        hint: what to change.
    """
    return build_error_response(f"pgguard: too many connections: {why}", sqlstate=_SQLSTATE, hint=hint)
