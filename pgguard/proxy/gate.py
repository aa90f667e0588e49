"""What keeps a burst of clients from overrunning the server.

A server's backlog is short: PostgreSQL's is twice ``max_connections`` (``StreamServerPort()`` in ``pqcomm.c``), and the
kernel drops the SYNs of whoever finds it full, to be sent again after one second, then two and four. So a burst that
the server would get through in a second, one after the other, takes it a minute, and some give up. Only so many clients
are therefore between asking for a connection to the server and having a first answer from it; the others wait here, in
their order, and get through as fast as the server answers.

A server that takes its time, to look a name up for one, is not to keep them waiting in turn: after a second a client
doesn't count any more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from collections.abc import Callable

_AT_ONCE: Final = 64
"""Clients that are on their way to the server: fewer than its backlog holds, more than it can work on."""
_PATIENCE: Final = 1.0
"""Seconds for which it may be that one of them keeps another waiting: as long as the first SYN has for its answer."""


class Gate:
    """Lets clients through to the server, in the order in which they come.

    Args:
        is_slow: is called when the server has left one of them without an answer for a second, and others wait.
    """

    def __init__(self, is_slow: Callable[[], None]) -> None:
        self._is_slow = is_slow
        self._inside: dict[int, float] = {}
        """When each has gone in, in seconds of trio's clock; the first first."""
        self._turn = trio.Lock()
        """Whoever has it is the next one to go in."""
        self._left = trio.Event()

    async def enter(self, number: int) -> None:
        """Wait for one's turn; no checkpoint if nobody has to wait.

        Args:
            number: a session's.
        """
        if len(self._inside) < _AT_ONCE and not self._turn.locked():
            self._inside[number] = trio.current_time()
            return
        async with self._turn:
            while len(self._inside) >= _AT_ONCE:
                oldest = next(iter(self._inside))
                self._left = trio.Event()
                with trio.move_on_at(self._inside[oldest] + _PATIENCE) as limit:
                    await self._left.wait()
                if limit.cancelled_caught:
                    self.leave(oldest)
                    self._is_slow()
            self._inside[number] = trio.current_time()

    def leave(self, number: int) -> None:
        """The server has answered, or the client is gone. Does nothing the second time."""
        if self._inside.pop(number, None) is not None:
            self._left.set()
