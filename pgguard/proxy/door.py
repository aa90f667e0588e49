"""Where clients come in: accepted as fast as they come, and admitted or turned away.

Clients that come at once wait in a listening socket's backlog, which holds no more than ``net.core.somaxconn``:
listen(2). Of what is beyond that the kernel drops the SYN, which TCP sends again after a second and more; over a Unix
socket connect(2) fails with EAGAIN. So several are taken out of it at a time.

Should descriptors run out though they are counted (:mod:`pgguard.proxy.admission`), as those of the whole system do
(``file-max``, proc_sys_fs(5)), there are some in hand. They are given up for as long as it takes to tell a client.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import socket
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

import trio

from pgguard.proxy.admission import too_many
from pgguard.proxy.greeting import as_plain
from pgguard.proxy.remedies import is_exhaustion, remedy

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from pgguard.proxy.admission import Admission
    from pgguard.proxy.listeners import Listener

_AT_A_TIME: Final = 4
"""Clients that are let in before everybody else has a turn: each takes a good part of a millisecond to introduce, and
so come some thousands a second, more than a server lets in."""
_PAUSE: Final = 0.1
"""Seconds to wait when nobody can be accepted, not even to be told why."""
_COMPLAINTS: Final = 60.0
"""Seconds between two complaints that there is no room."""
_GRACE: Final = 0.25
"""Seconds that a client has to say who it is, and to read that there is no room, if another one waits to be told."""
_IN_HAND: Final = 2
"""Descriptors to tell a client with: its own, and one to pass a cancel request on."""

logger = logging.getLogger(__name__)


class Door:
    """Accepts clients.

    Args:
        admission: says whether there is room.
        make_room: ends what is kept for evidence alone; returns False if there is nothing.
        receive: takes a client in, which has been admitted.
        turn_away: tells a client that wasn't, with what it is to be told. Both close its socket and raise nothing.
    """

    def __init__(
        self,
        admission: Admission,
        *,
        make_room: Callable[[], bool],
        receive: Callable[[trio.socket.SocketType, Listener], Awaitable[None]],
        turn_away: Callable[[trio.socket.SocketType, Listener, bytes], Awaitable[None]],
    ) -> None:
        self._admission = admission
        self._make_room = make_room
        self._receive = receive
        self._turn_away = turn_away
        self._turning_away: dict[trio.CancelScope, float] = {}
        """Those that are being told that there is no room, since when; the first first."""
        self._changed = trio.Event()
        self._quiet_until = -math.inf
        self._in_hand: list[int] = []

    def take_in_hand(self) -> None:
        """Get the descriptors that are needed when there are none. Raises OSError."""
        while len(self._in_hand) < _IN_HAND:
            self._in_hand.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))

    def give_up(self) -> None:
        """Close them."""
        while self._in_hand:
            os.close(self._in_hand.pop())

    def somebody_left(self) -> None:
        """There may be room again."""
        self._changed.set()

    async def open(self, listener: Listener, nursery: trio.Nursery) -> None:
        """Let clients in until cancelled.

        Args:
            listener: where they come.
            nursery: of the tasks that receive them, or turn them away.
        """
        while True:
            if not self._can_answer():
                await trio.lowlevel.wait_readable(listener.socket)
                await self._until_it_can_be_answered()
            try:
                sock, _ = await listener.socket.accept()
                self._let_in(sock, listener, nursery)
                for _ in range(_AT_A_TIME - 1):
                    if not self._can_answer():
                        break
                    self._let_in(_accept_at_once(listener.socket), listener, nursery)
            except BlockingIOError:
                continue  # those were all
            except OSError as error:
                if is_exhaustion(error.errno):
                    await self._without_descriptors(listener, error)
                # Anything else is about the one connection, which is gone: accept(2), "Error handling".

    def _has_room(self) -> bool:
        return self._admission.has_room() or (self._make_room() and self._admission.has_room())

    def _can_answer(self) -> bool:
        return len(self._turning_away) < self._admission.turned_away_at_once or self._has_room()

    async def _until_it_can_be_answered(self) -> None:
        """Wait until there is room for a client, or for telling it that there is none."""
        while not self._can_answer():
            longest, since = next(iter(self._turning_away.items()))
            if self._changed.is_set():
                self._changed = trio.Event()
            with trio.move_on_at(since + _GRACE) as limit:
                await self._changed.wait()
            if limit.cancelled_caught:
                self._turning_away.pop(longest, None)
                longest.cancel()

    def _let_in(self, sock: trio.socket.SocketType, listener: Listener, nursery: trio.Nursery) -> None:
        if self._has_room():
            self._admission.admit()
            nursery.start_soon(self._receive, sock, listener)
            return
        why = self._admission.why_full()
        self._complain(f"clients are turned away: {why}", errno.EMFILE)
        scope = trio.CancelScope()
        self._turning_away[scope] = trio.current_time()
        nursery.start_soon(self._send_off, scope, sock, listener, too_many(why))

    async def _send_off(
        self, scope: trio.CancelScope, sock: trio.socket.SocketType, listener: Listener, response: bytes
    ) -> None:
        try:
            with scope:
                await self._turn_away(sock, listener, response)
        finally:
            self._turning_away.pop(scope, None)
            self._changed.set()

    async def _without_descriptors(self, listener: Listener, error: OSError) -> None:
        """Tell one client that there is no descriptor for it, with those in hand."""
        number = error.errno or 0
        why = os.strerror(number)
        self._complain(f"can't accept connections: {why}", number)
        with self._given_up():
            try:
                sock = _accept_at_once(listener.socket)
            except OSError:
                await trio.sleep(_PAUSE)
            else:
                await self._turn_away(sock, listener, too_many(why, remedy(number)))

    @contextmanager
    def _given_up(self) -> Iterator[None]:
        self.give_up()
        try:
            yield
        finally:
            with suppress(OSError):  # next time, perhaps
                self.take_in_hand()

    def _complain(self, what: str, number: int) -> None:
        if trio.current_time() >= self._quiet_until:
            self._quiet_until = trio.current_time() + _COMPLAINTS
            logger.error("%s. %s", what, remedy(number))


def _accept_at_once(listener: trio.socket.SocketType) -> trio.socket.SocketType:
    """Accept a client that is there already. Raises OSError: BlockingIOError if there is none."""
    sock, _ = as_plain(listener, socket.socket.accept)
    return trio.socket.from_stdlib_socket(sock)
