"""Finds out who opened new connections, at a pace that leaves the relay its time.

Most often nobody asks who opened a connection, and it may be gone before anybody does. But the opener is best known
soon after it has connected: later on it may have ended, or others may hold the connection as well. So

- while few come, each is looked at as it comes;
- when many come, those are looked at together that are there still, a few times a second: one walk through ``/proc``
  tells about all of them, and what the walks take of a processor is bounded. One that comes and goes meanwhile costs
  next to nothing;
- a session that somebody waits to know about is looked at now;
- a session that is over, and had nothing wrong with it, isn't looked at any more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from pgguard.attribution.holders import sole_holder
from pgguard.proxy import looking
from pgguard.proxy.losses import Loss, note, spared
from pgguard.proxy.turns import Allowance, Stint, timed

if TYPE_CHECKING:
    from collections.abc import Callable

    from pgguard.attribution.witness import Witness
    from pgguard.proxy.session import ProxiedSession

_AT_ONCE: Final = 2048
"""Sessions that are looked at together, at most: a walk through all processes takes hardly longer for many."""
_SHARE: Final = 0.005
_SAVINGS: Final = 0.04
"""Of a processor, what looking at each as it comes takes in the long run; and seconds of it that it may take at once:
enough for a hundred."""
_PAUSE: Final = 0.3
_LONGEST_PAUSE: Final = 1.0
"""Seconds after which those are looked at who have come meanwhile: longer, if the last look has taken long."""


class Registrar:
    """Finds out who opened the sessions that are enrolled, and tells them: their ``opening_known`` is set then.

    Args:
        witness: attribution.
        known: is told of each session that isn't over then.
        give_way: has :meth:`run` go on soon.
    """

    def __init__(
        self, witness: Witness, *, known: Callable[[ProxiedSession], None], give_way: Callable[[], None]
    ) -> None:
        self._witness = witness
        self._known = known
        self._give_way = give_way
        self._waiting: dict[int, ProxiedSession] = {}
        """Those that are to be looked at, by their numbers; the first first."""
        self._wanted: dict[int, ProxiedSession] = {}
        """Those of them that somebody waits to know about."""
        self._changed = trio.Event()
        self._is_idle = False
        """It waits for the next one to come."""
        self._allowance = Allowance(_SHARE, _SAVINGS)
        self._on_want = self._want  # one for all sessions, of 64 bytes

    def enroll(self, session: ProxiedSession) -> None:
        """Have it found out who opened a session, which has a client socket to look up."""
        self._waiting[session.id] = session
        session.want_opening = self._on_want
        if self._is_idle:
            self._changed.set()
            self._give_way()

    def strike_off(self, session: ProxiedSession) -> None:
        """A session is over: nobody asks any more, unless somebody has done so already."""
        if session.id not in self._wanted and self._waiting.pop(session.id, None) is not None:
            session.opening_known.set()

    async def run(self) -> None:
        """Look at those that come, until cancelled."""
        while True:
            await self._until_it_is_time()
            sessions = self._next()
            try:
                await self._find_openers(sessions)
            finally:
                for session in sessions:
                    if not session.opening_known.is_set():
                        self._tell(session)

    def _want(self, session: ProxiedSession) -> None:
        """Somebody waits to know about a session."""
        if self._waiting.get(session.id) is session:
            self._wanted[session.id] = session
            self._changed.set()
            self._give_way()

    async def _until_it_is_time(self) -> None:
        while not self._wanted and not (self._waiting and self._allowance.has_any()):
            self._changed = trio.Event()
            if not self._waiting:
                self._waiting.clear()  # it keeps its table otherwise, which is large behind a storm
                self._is_idle = True
                await self._changed.wait()
                self._is_idle = False
                continue
            seconds = min(max(_PAUSE, self._allowance.seconds_without()), _LONGEST_PAUSE)
            with trio.move_on_after(seconds) as limit:
                await self._changed.wait()
            if limit.cancelled_caught and self._waiting:
                return

    def _next(self) -> list[ProxiedSession]:
        """Take out those who are next: whom somebody waits to know about, and the others if there is time for them."""
        chosen = dict(self._wanted)
        self._wanted.clear()
        if not chosen or self._allowance.has_any():
            for number, session in self._waiting.items():
                if len(chosen) >= _AT_ONCE:
                    break
                chosen[number] = session
        for number in chosen:
            del self._waiting[number]
        return list(chosen.values())

    async def _find_openers(self, sessions: list[ProxiedSession]) -> None:
        clients = [session.client_socket for session in sessions if session.client_socket is not None]
        try:
            openings, spent = await looking.look(timed, self._witness.opened_many, clients)
        except Exception:
            note(Loss.OPENER)
            return
        self._allowance.spend(spent)
        stint = Stint()
        for session, opening in zip(sessions, openings, strict=True):
            with spared(Loss.OPENER, session):
                session.opening = opening
                session.last_sole_holder = sole_holder(opening.holders)
                session.tell_tracker()
            self._tell(session)
            await stint.rest()

    def _tell(self, session: ProxiedSession) -> None:
        """It is known who opened a session, or that it can't be known."""
        session.opening_known.set()
        if not session.done.is_set():
            with spared(Loss.EVIDENCE, session):
                self._known(session)
