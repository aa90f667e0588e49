"""What keeps a burst of clients from overrunning the server.

A server's backlog is short: PostgreSQL's is twice ``max_connections`` (``StreamServerPort()`` in ``pqcomm.c``), and the
kernel drops the SYNs of whoever finds it full, to be sent again after one second, then two and four. So a burst that
the server would get through in a second, one after the other, takes it a minute, and some give up. Only so many clients
are therefore between asking for a connection to the server and having a first answer from it; the others wait here, in
their order, and get through as fast as the server answers.

A server on the guard's own host needs the same processors. Each client that is let through is one more process of the
server's that wants one, and whoever is connected already waits behind them all. So there it is no more than keep the
processors busy: the last of a burst has its answer as early as with any number of them.

A server that takes its time, to look a name up for one, is not to keep them waiting in turn: a client that has been
inside for longer than an answer can take to be made doesn't count any more.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from collections.abc import Callable

_AT_ONCE: Final = 64
"""Clients that are on their way to a server elsewhere: fewer than its backlog holds, more than it can work on."""
_PATIENCE: Final = 1.0
"""Seconds for which one of them may keep another waiting: as long as the first SYN has for its answer."""
_PROCESSES: Final = 2
"""Clients that are on their way to a server on this host, at least: one for each processor where there are more."""
_PROCESS_PATIENCE: Final = 0.1
"""Seconds for which one of those may: a process needs some milliseconds of processor to answer. One that takes longer
waits for something else."""
_SILENCE: Final = 1.0
"""Seconds after which it is odd that nobody has had an answer while it was waited for."""


class Gate:
    """Lets clients through to the server, in the order in which they come.

    Args:
        is_slow: is called when nobody has had a quick answer for a second, and clients wait.
        shares_processors: whether the server runs on this host.
    """

    def __init__(self, is_slow: Callable[[], None], *, shares_processors: bool) -> None:
        self._is_slow = is_slow
        processes = max(_PROCESSES, len(os.sched_getaffinity(0)))
        self._at_once = min(processes, _AT_ONCE) if shares_processors else _AT_ONCE
        self._patience = _PROCESS_PATIENCE if shares_processors else _PATIENCE
        self._inside: dict[int, float] = {}
        """When each has gone in, in seconds of trio's clock; the first first."""
        self._line: dict[int, Callable[[], None]] = {}
        """Who waits, and what is to be called when it is in; the first first."""
        self._has_line = trio.Event()
        self._answered = 0.0
        """When somebody who is inside had an answer, or was the first to come in."""

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
        if len(self._inside) < self._at_once:  # nobody waits then
            now = trio.current_time()
            if not self._inside:
                self._answered = now
            self._inside[number] = now
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
        if number in self._inside:
            self._answered = trio.current_time()
            self._let_out(number)
        else:
            self._line.pop(number, None)

    def _let_out(self, number: int) -> None:
        del self._inside[number]
        while self._line and len(self._inside) < self._at_once:
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
            await trio.sleep_until(since + self._patience)
            if self._line and self._inside.get(oldest) == since:
                self._let_out(oldest)
                if trio.current_time() - self._answered >= _SILENCE:
                    self._is_slow()
