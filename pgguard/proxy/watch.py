"""The watch over what no message shows: who inherits connections, who outlives them, who waits, who does nothing.

Each watch is a task that looks again and again and has a session judged in which it has found something. What it costs
hardly grows with the number of sessions: heirs are looked for among new processes, for all sessions together; and for
threads that wait it looks at a few sessions at a time, the less often the longer it has found nothing.
"""

from __future__ import annotations

import heapq
import logging
import time
from typing import TYPE_CHECKING, Final

import trio

from pgguard.faults.conclude import AT_ONCE, readers
from pgguard.session.verdicts import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pgguard.attribution.holders import Holders
    from pgguard.attribution.threads import Waiting, Waits
    from pgguard.attribution.witness import Opening, Witness
    from pgguard.proxy.session import ProxiedSession
    from pgguard.session.verdicts import Verdict

_HEIRS_INTERVAL: Final = 0.6
_EARLY_INTERVAL: Final = 0.1
_EARLY: Final = 2.0
"""Seconds after a connection is opened in which it is looked at more often: a server that opens it before it forks
does so soon."""
_LASTING: Final = 0.2
"""Seconds for which a process must have a socket open to count as its heir: a child on its way to exec() has it open
for less."""
_ORPHANED: Final = 0.5
"""Seconds after the end of its opener after which a connection counts as leaked: the last to close is not always first
to end."""

_READERS_INTERVAL: Final = 0.05
_BUSY_AT_A_TIME: Final = 6
_IDLE_AT_A_TIME: Final = 2
"""Sessions of which it is looked at once who waits, while an answer is due and while none is."""
_READERS_SHARE: Final = 0.1
"""Of the time, that is spent on looking at who waits for answers."""
_READERS_PAUSE: Final = 0.15
"""Seconds between two rounds of it at most, however long they take on a busy machine."""
_CONTESTED_INTERVAL: Final = 0.1
"""Seconds between two looks at a contested session, at most."""
_READERS_RARELY: Final = 2.0
"""Seconds between two looks at one session when nothing has been found in it for long."""

_IDLE_INTERVAL: Final = 1.0
_IDLE_PRECISION: Final = 0.1
"""Of the threshold, by which a transaction is reported late at most."""

logger = logging.getLogger(__name__)


class Watch:
    """Watches the sessions of a guard.

    Args:
        sessions: those that are open, by their numbers.
        accuse: has a verdict ruled on; returns False if it can't now.
    """

    def __init__(
        self, sessions: Mapping[int, ProxiedSession], *, accuse: Callable[[ProxiedSession, Verdict], bool]
    ) -> None:
        self._sessions = sessions
        self._accuse = accuse
        self._last_arrival = 0.0
        self._arrived = trio.Event()

    def arrival(self) -> None:
        """A client has come, and may soon fork."""
        self._last_arrival = time.time()
        self._arrived.set()

    # Heirs

    async def over_heirs(self, witness: Witness) -> None:
        """Look who has inherited connections, and who has outlived them; until cancelled."""
        while True:
            if time.time() - self._last_arrival >= _EARLY:
                self._arrived = trio.Event()
                with trio.move_on_after(_HEIRS_INTERVAL - _EARLY_INTERVAL):
                    await self._arrived.wait()
            await trio.sleep(_EARLY_INTERVAL)
            watched = {s.opening.inode: s for s in self._sessions.values() if s.opening and s.opening.inode}
            if not watched:
                continue
            openings = {inode: s.opening for inode, s in watched.items() if s.opening}
            at = time.time()
            try:
                found, orphaned = await trio.to_thread.run_sync(
                    _look_at_heirs, witness, openings, abandon_on_cancel=True
                )
                for inode, holders in found.items():
                    self._note_holders(watched[inode], holders, at)
                    self._note_orphan(watched[inode], holders, orphaned=inode in orphaned)
            except Exception:
                logger.exception("who has the connections open could not be found out")

    def _note_holders(self, session: ProxiedSession, holders: Holders, at: float) -> None:
        heirs = holders.lasting(_LASTING)
        session.sightings.note_holders(holders.processes, heirs)
        opener = session.opening and session.opening.opener
        if opener and holders.complete and [process.pid for process in holders.processes] == [opener.pid]:
            session.sightings.alone_until = at
        lasting = frozenset(process.pid for process in heirs)
        session.client.contested = len(lasting) > 1 and not session.names_senders
        if len(lasting) > 1 and not lasting <= session.sightings.holders_told:
            reason = f"{len(lasting)} processes have the connection's socket open"
            if self._accuse(session, session.concern(Kind.INHERITED_CONNECTION, reason)):
                session.sightings.holders_told |= lasting

    def _note_orphan(self, session: ProxiedSession, holders: Holders, *, orphaned: bool) -> None:
        now = trio.current_time()
        if not orphaned:
            session.sightings.orphaned_since = None
        elif session.sightings.orphaned_since is None:
            session.sightings.orphaned_since = now
        elif now - session.sightings.orphaned_since >= _ORPHANED and holders.lasting(_LASTING):
            verdict = session.concern(Kind.LEAKED_CONNECTION, "the connection has outlived the process that opened it")
            if self._accuse(session, verdict):
                session.sightings.orphaned_since = float("inf")

    # Threads

    async def over_readers(self, witness: Witness) -> None:
        """Look whether several threads wait for one answer; until cancelled."""
        pause = _READERS_INTERVAL
        while True:
            await trio.sleep(pause)
            began = time.monotonic()
            for session in self._due():
                try:
                    await self._look_at_readers(witness, session)
                except Exception:
                    logger.exception("session %d: who waits for answers could not be found out", session.id)
            took = time.monotonic() - began
            pause = min(_READERS_PAUSE, max(_READERS_INTERVAL, took / _READERS_SHARE))

    def _due(self) -> list[ProxiedSession]:
        """The sessions that it is time to look at, those first that have waited for it the longest."""
        now = trio.current_time()
        busy: list[ProxiedSession] = []
        idle: list[ProxiedSession] = []
        for session in self._sessions.values():
            tracker = session.tracker
            if tracker is None or session.parked:
                continue
            if not tracker.idle and session.sightings.look_next <= now:
                busy.append(session)
            elif tracker.idle and session.sightings.watch_next <= now:
                idle.append(session)
        return [
            *heapq.nsmallest(_BUSY_AT_A_TIME, busy, key=lambda session: session.sightings.look_next),
            *heapq.nsmallest(_IDLE_AT_A_TIME, idle, key=lambda session: session.sightings.watch_next),
        ]

    async def _look_at_readers(self, witness: Witness, session: ProxiedSession) -> None:
        opening, tracker = session.opening, session.tracker
        if opening is None or opening.opener is None or tracker is None:
            return
        processes = session.sightings.holders or (opening.opener,)
        longest = _CONTESTED_INTERVAL if session.client.contested else _READERS_RARELY
        state = tracker.idle, tracker.requests
        if not tracker.idle:
            session.sightings.looks += 1
            pause = min(longest, _READERS_INTERVAL * 2 ** (session.sightings.looks // 4))
            session.sightings.look_next = trio.current_time() + pause
            waits, blocked = await trio.to_thread.run_sync(witness.look, opening, processes, abandon_on_cancel=True)
            self._note_readers(session, waits, blocked)
        elif not session.client.outgoing:
            young = time.time() - session.opened_at < _EARLY
            session.sightings.watch_next = trio.current_time() + (_READERS_INTERVAL if young else longest)
            watchers = await trio.to_thread.run_sync(witness.watchers, opening, processes, abandon_on_cancel=True)
            if state == (tracker.idle, tracker.requests):
                session.sightings.watchers = watchers

    def _note_readers(self, session: ProxiedSession, waits: Waits, blocked: tuple[Waiting, ...]) -> None:
        before, session.sightings.asleep = session.sightings.asleep, frozenset(one.sleep for one in waits.threads)
        session.sightings.waits = waits
        opening, tracker = session.opening, session.tracker
        language = None if opening is None else opening.runtime.language
        found = readers(blocked, before, watchers=session.sightings.watchers, language=language)
        if found is None or tracker is None or tracker.idle:
            return
        self._accuse(
            session,
            tracker.judge_readers(found.kind, AT_ONCE, intruder=found.intruder, requesters=found.requesters),
        )

    # Transactions

    async def over_transactions(self, threshold: float) -> None:
        """Look which transactions sit idle for more than ``threshold`` seconds; until cancelled. 0: for ever."""
        if not threshold:
            return
        interval = min(_IDLE_INTERVAL, threshold * _IDLE_PRECISION)
        while True:
            await trio.sleep(interval)
            now = trio.current_time()
            for session in list(self._sessions.values()):
                self._note_idleness(session, now, threshold)

    def _note_idleness(self, session: ProxiedSession, now: float, threshold: float) -> None:
        tracker = session.tracker
        if tracker is None or not tracker.in_transaction or not tracker.idle:
            session.sightings.idle_since = None
        elif session.sightings.idle_since is None or session.sightings.idle_since[0] != tracker.requests:
            session.sightings.idle_since = tracker.requests, now
            session.sightings.idleness_told = False
        elif now - session.sightings.idle_since[1] >= threshold and not session.sightings.idleness_told:
            reason = f"has left a transaction idle for more than {threshold:g} s"
            session.sightings.idleness_told = self._accuse(session, session.concern(Kind.IDLE_IN_TRANSACTION, reason))


def _look_at_heirs(witness: Witness, openings: Mapping[int, Opening]) -> tuple[dict[int, Holders], set[int]]:
    """Find out who has sockets open, and which of these have outlived their opener; in a worker thread."""
    found = witness.watch(openings)
    orphaned = set()
    for inode, holders in found.items():
        opener = openings[inode].opener
        left = opener is not None and all(process.pid != opener.pid for process in holders.processes)
        if left and holders.processes and opener is not None and witness.is_gone(opener):
            orphaned.add(inode)
    return found, orphaned
