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
        self._line: dict[int, Callable[[], None]] = {}
        """Who waits, and what is to be called when it is in; the first first."""
        self._has_line = trio.Event()

    def ask(self, number: int, is_in: Callable[[], None]) -> bool:
        """Ask to be let in.

        Args:
            number: a session's.
            is_in: is called when one is let in that isn't at once. It must not block, nor come back to the gate.

        Returns:
            Whether one is let in at once, or is in already.
        """
        if number in self._inside:
            return True
        if len(self._inside) < _AT_ONCE:  # nobody waits then
            self._inside[number] = trio.current_time()
            return True
        self._line[number] = is_in
        self._has_line.set()
        return False

    async def enter(self, number: int) -> None:
        """:meth:`ask`, and wait for it; no checkpoint if nobody has to wait."""
        turn = trio.Event()
        if not self.ask(number, turn.set):
            try:
                await turn.wait()
            except BaseException:
                self.leave(number)
                raise

    def leave(self, number: int) -> None:
        """The server has answered, or the client is gone. Does nothing the second time."""
        if self._inside.pop(number, None) is None:
            self._line.pop(number, None)
        while self._line and len(self._inside) < _AT_ONCE:
            following = next(iter(self._line))
            self._inside[following] = trio.current_time()
            self._line.pop(following)()

    async def keep(self) -> None:
        """See to it that who isn't answered keeps nobody waiting, until cancelled."""
        while True:
            if not self._line:
                self._has_line = trio.Event()
                await self._has_line.wait()
                continue
            oldest, since = next(iter(self._inside.items()))
            await trio.sleep_until(since + _PATIENCE)
            if self._line and self._inside.get(oldest) == since:
                self.leave(oldest)
                self._is_slow()
