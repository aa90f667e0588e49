# SPDX-License-Identifier: Apache-2.0
"""How far the kernel has come, as it says in memory that it shares with the guard: see :mod:`ring`, which has it.

This is the pure form. Where pgguard is compiled, ``progress.c`` stands in its place, beside this file: the same class
and function. There a look is five times as quick, and it is taken at nearly each request.
"""

from __future__ import annotations

import platform
import threading
from typing import TYPE_CHECKING, Final, final

from pgguard.attribution.ebpf.programs import TICKET_SHIFT, TICKETS, WORD_SHIFT

if TYPE_CHECKING:
    from mmap import mmap

_WORD: Final = (1 << WORD_SHIFT) - 1
_CONNECTIONS: Final = (1 << 64 - WORD_SHIFT) - 1

_WEAKLY_ORDERED: Final = platform.machine() != "x86_64"
_barrier: Final = threading.Lock()


def fence() -> None:
    """Keep what is read from shared memory behind this from being read in front of it."""
    if _WEAKLY_ORDERED:
        for _ in range(2):  # a lock taken and released, twice: the barriers that Python has to offer
            with _barrier:
                pass


@final
class Progress:
    """Tells how far the kernel has come, which goes on meanwhile. What is read behind a call is as new as what it says.

    Nothing of it may be called after :meth:`close`, which is noticed where memory would be read: a ValueError.

    Args:
        producer: begins with the position up to which there are events.
        words: how far senders go on that have been reported, if the kernel says so: :data:`TICKETS` words.
    """

    __slots__ = ("_by_ticket", "_produced", "taken")

    def __init__(self, producer: mmap, words: mmap | None = None, /) -> None:
        # One 8-byte load each: CPython copies an item of a memoryview with a memcpy of constant size.
        self._produced = memoryview(producer)[:8].cast("q")
        self._by_ticket = None if words is None else memoryview(words)[: 8 * TICKETS].cast("q")
        self.taken = 0
        """The position up to which all events have been taken; -1: there are some in front of it that haven't."""

    def produced(self) -> int:
        """Up to which position there are events."""
        produced: int = self._produced[0]
        fence()
        return produced

    def reached(self, ticket: int, /) -> int:
        """Up to which position the one had gone on who had been reported last under a ticket; 0: it isn't known.

        Call it before events are taken. What is taken then has all reports of those who sent up to there.
        """
        if self._by_ticket is None:
            return 0
        word = self._by_ticket[ticket & TICKETS - 1]
        # Another connection may have been given the ticket's word since.
        if word >> WORD_SHIFT & _CONNECTIONS != ticket >> TICKET_SHIFT:
            return 0
        fence()
        return word & _WORD

    def glance(self, ticket: int, /) -> int:
        """Tell the same of a ticket, or of none, 0, if all events have been taken; -1: that comes first."""
        reached = self.reached(ticket) if ticket else 0
        return reached if self._produced[0] == self.taken else -1

    def close(self) -> None:
        """Let go of the memory; nothing can be told then."""
        self._produced.release()
        if self._by_ticket is not None:
            self._by_ticket.release()
