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
import select
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from pgguard.proxy.admission import too_many
from pgguard.proxy.remedies import is_exhaustion, remedy
from pgguard.proxy.sockets import accept

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pgguard.proxy.admission import Admission
    from pgguard.proxy.arrival import Arrival
    from pgguard.proxy.listeners import Listener, Peer
    from pgguard.proxy.lobby import Lobby
    from pgguard.proxy.reception import Reception
    from pgguard.proxy.sockets import Stream

_AT_A_TIME: Final = 4
"""Clients that are let in before others have a turn who have come before."""
_PAUSE: Final = 0.1
"""Seconds to wait when nobody can be accepted, not even to be told why."""
_COMPLAINTS: Final = 60.0
"""Seconds between two complaints that there is no room."""
_GRACE: Final = 0.25
"""Seconds that a client has to say who it is, and to read that there is no room, if another one waits to be told."""
_LOOK: Final = 0.05
"""Seconds between two looks whether one has had them."""
_IN_HAND: Final = 2
"""Descriptors to tell a client with: its own, and one to pass a cancel request on."""

logger = logging.getLogger(__name__)


class Door:
    """Accepts clients.

    Args:
        admission: says whether there is room.
        make_room: ends what is kept for evidence alone; returns False if there is nothing.
        lobby: tells when somebody has come.
    """

    def __init__(self, admission: Admission, *, make_room: Callable[[], bool], lobby: Lobby) -> None:
        self._admission = admission
        self._make_room = make_room
        self._lobby = lobby
        self._listeners: dict[Listener, Reception] = {}
        self._is_shut = False
        """Nobody is accepted until there is room for that again."""
        self._is_short = False
        """Or until somebody has been told that there are no descriptors."""
        self._turning_away: dict[Arrival, float] = {}
        """Those that are being told that there is no room, since when; the first first."""
        self._quiet_until = -math.inf
        self._in_hand: list[int] = []

    def take_in_hand(self) -> None:
        """Get the descriptors that are needed when there are none. Raises OSError."""
        while len(self._in_hand) < _IN_HAND:
            self._in_hand.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))

    def _give_up(self) -> None:
        while self._in_hand:
            os.close(self._in_hand.pop())

    def open(self, listeners: Mapping[Listener, Reception]) -> None:
        """Let clients in from now on. Raises OSError: the lobby has no room for that.

        Args:
            listeners: where they come, each with what takes them in, those that have been admitted and those that are
                only to be told why not.
        """
        self._listeners |= listeners
        self._unlock()

    def close(self) -> None:
        """Let nobody in any more. Nothing happens the second time."""
        self._lock()
        self._lobby.lift(self)
        self._listeners.clear()
        self._give_up()

    @property
    def is_open(self) -> bool:
        """Whether it lets clients in, or at least tells them that there is no room."""
        return bool(self._listeners) and not self._is_shut

    def somebody_left(self) -> None:
        """There may be room again."""
        if self._is_shut and not self._is_short:
            self._look_again()

    def _unlock(self) -> None:
        self._is_shut = False
        self._lobby.lift(self)
        for listener in self._listeners:
            self._lobby.watch(listener.socket.fileno(), select.EPOLLIN, partial(self._answer, listener))

    def _lock(self) -> None:
        self._is_shut = True
        for listener in self._listeners:
            self._lobby.unwatch(listener.socket.fileno())

    def _answer(self, listener: Listener, _: int) -> None:
        """Let in who has come, or tell it that there is no room."""
        for _ in range(_AT_A_TIME):
            has_room = self._admission.has_room() or self._makes_room()
            if not has_room and not self._can_tell:
                self._lock()
                self._lobby.give(self, _LOOK, self._look_again)
                return
            try:
                accepted = accept(listener.socket)
            except OSError as error:
                if is_exhaustion(error.errno):
                    self._do_without_descriptors(listener, error)
                    return
                continue  # it is about the one connection, which is gone: accept(2), "Error handling"
            if accepted is None:
                return  # those were all
            self._let_in(*accepted, listener, has_room=has_room)
            if not self._lobby.has_time:
                return

    def _makes_room(self) -> bool:
        """Whether there is room for one more when something has been ended for that."""
        return self._make_room() and self._admission.has_room()

    @property
    def _can_tell(self) -> bool:
        """Whether one more can be told that there is no room."""
        return len(self._turning_away) < self._admission.turned_away_at_once

    def _let_in(self, sock: Stream, peer: Peer, listener: Listener, *, has_room: bool) -> None:
        if has_room:
            self._admission.admit()
            if self._listeners[listener].receive(sock, peer, listener) is None:
                self._admission.vacate()
            return
        why = self._admission.why_full()
        self._complain(f"clients are turned away: {why}", errno.EMFILE)
        arrival = self._listeners[listener].receive(sock, peer, listener, too_many(why), self._note_told)
        if arrival is not None and not arrival.is_over:
            self._turning_away[arrival] = trio.current_time()

    def _note_told(self, arrival: Arrival) -> None:
        if self._turning_away.pop(arrival, None) is not None:
            self.somebody_left()

    def _look_again(self) -> None:
        """Open again if there is room for a client, or for telling it that there is none."""
        now = trio.current_time()
        while not self._can_tell and not self._admission.has_room() and not self._makes_room():
            longest, since = next(iter(self._turning_away.items()))
            if now < since + _GRACE:
                self._lobby.give(self, _LOOK, self._look_again)
                return
            del self._turning_away[longest]
            longest.leave()
        self._unlock()

    def _do_without_descriptors(self, listener: Listener, error: OSError) -> None:
        """Tell one client that there is no descriptor for it, with those in hand, and then open again."""
        number = error.errno or 0
        why = os.strerror(number)
        self._complain(f"can't accept connections: {why}", number)
        self._lock()
        self._is_short = True
        self._give_up()
        try:
            accepted = accept(listener.socket)
        except OSError:
            accepted = None
        if accepted is None:
            self._lobby.give(self, _PAUSE, self._recover)
            return
        words = too_many(why, remedy(number))
        if self._listeners[listener].receive(*accepted, listener, words, self._recover) is None:
            self._recover()

    def _recover(self, _: Arrival | None = None) -> None:
        self._is_short = False
        if self._listeners:  # else it has been closed meanwhile
            with suppress(OSError):  # next time, perhaps
                self.take_in_hand()
            self._unlock()

    def _complain(self, what: str, number: int) -> None:
        if trio.current_time() >= self._quiet_until:
            self._quiet_until = trio.current_time() + _COMPLAINTS
            logger.error("%s. %s", what, remedy(number))
