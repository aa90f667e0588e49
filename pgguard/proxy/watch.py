"""The watch over what no message shows: who inherits connections, who outlives them, who waits, who does nothing.

Each watch is a task that looks again and again and has a session judged in which it has found something. What it costs
doesn't grow with the number of sessions that are idle: heirs are looked for among new processes, for all sessions
together, and the other watches go through the sessions that are in use. Who has a session's socket open is looked at
again only while that is not its opener alone. Whatever there is to look at, a watch takes a
share of a processor in the long run: when a round has cost too much, it is longer until the next.

*In use* is a session that is new, or whose client has sent something since a watch has last found it at rest. The
relay says so (:meth:`Watch.stir`), once: a watch that finds a session at rest forgets it, and has its client attended
to, so that it is told of what comes next. A watch that has nothing to look at sleeps until then.

Who waits on a connection when no answer is due is looked at when it has just come to rest. It may change afterwards
with nothing being sent, as a thread begins to wait for notifications: so some of the sessions that are at rest are
looked at again each second, as many however many there are, in turns.
"""

from __future__ import annotations

import heapq
import math
import time
from dataclasses import replace
from enum import Enum
from functools import partial
from itertools import islice, takewhile
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import trio

from pgguard.attribution.holders import LASTING, NOBODY, sole_holder
from pgguard.attribution.threads import Thread, Waiting, Waits
from pgguard.faults.conclude import AT_ONCE, readers
from pgguard.faults.docket import TICK
from pgguard.faults.heirs import PATIENCE, SERVERS_PATIENCE, judge_heirs
from pgguard.faults.orphans import is_used
from pgguard.proxy import looking
from pgguard.proxy.losses import Loss, note, spared
from pgguard.proxy.turns import GLANCES, Allowance, Stint, timed
from pgguard.session.verdicts import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from pgguard.attribution.evidence import Process
    from pgguard.attribution.holders import Holders, Holding
    from pgguard.attribution.threads import Sleep
    from pgguard.attribution.witness import Opening, Witness
    from pgguard.proxy.session import ProxiedSession
    from pgguard.session.tracker import Tracker
    from pgguard.session.verdicts import Verdict

_HEIRS_INTERVAL: Final = 0.6
_EARLY_INTERVAL: Final = 0.1
_HEIRS_SHARE: Final = 0.05
_HEIRS_SAVINGS: Final = 0.1
"""Of a processor, what looking for heirs takes in the long run at most; and seconds of it that may be taken at once, so
that new connections are looked at as often as is meant, beside many processes that come and go."""
_HOLDS_AT_A_TIME: Final = 1500
"""Connections that processes have open, each counted for each process, that are looked at in one round: about 20 ms."""
_EARLY: Final = 2.0
"""Seconds after a connection is opened in which it is looked at more often: a server that opens it before it forks
does so soon."""
_OVER: Final = 256
"""Sessions that are over after which attribution is told so, if there is nothing else to be looked at."""
_OPENERS: Final = 1024
"""Processes of which it is remembered that a child has followed the advice."""
UNUSED: Final = 5.0
"""Seconds after which a connection whose opener has ended, and which nobody has used since, counts as leaked: the last
to close is not always first to end, and a daemon that has been handed it may take a while to begin."""

LEFT_OPEN: Final = "the connection was still open when %s had ended"
"""Why a connection counts as leaked that outlives what it belongs to: the command of ``pgguard run``, or tests."""

_READERS_INTERVAL: Final = 0.05
_EARLY_READERS_INTERVAL: Final = 0.01
"""While a connection is new, and so its threads may have begun to share it just now. Where the kernel names the threads
that send, that tells as well, and there is no hurry."""
_EARLY_READERS: Final = 64
"""Sessions up to which that makes a difference: with more of them there always are new ones."""
_BUSY_AT_A_TIME: Final = 6
_IDLE_AT_A_TIME: Final = 2
"""Sessions of which it is looked at once who waits, while an answer is due and while none is."""
_CALM_INTERVAL: Final = 1.0
"""Seconds between two looks at who waits on sessions that have been at rest for a while, :data:`_IDLE_AT_A_TIME`."""
_READERS_SHARE: Final = 0.1
_READERS_SAVINGS: Final = 0.5
"""The same for looking at who waits for answers."""
_READERS_ROUND: Final = 0.005
"""Seconds of it after which no other session is looked at in the same round."""
_CONTESTED_INTERVAL: Final = 0.1
"""Seconds between two looks at a contested session, at most."""
_READERS_RARELY: Final = 2.0
"""Seconds between two looks at one session when nothing has been found in it for long."""
_LOOKS: Final = 64
"""Looks after which it has been for long."""

_SOLITUDE: Final = 1.0
_YOUNG_SOLITUDE: Final = 0.005
"""Seconds for which a process that has been seen to have a single thread is taken to have no other: less when it has
connected just now."""
_SOLITARY: Final = 4096
"""Processes of which that is remembered."""

_IDLE_INTERVAL: Final = 1.0
_IDLE_PRECISION: Final = 0.1
"""Of the threshold, by which a transaction is reported late at most."""


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
        self._solitary: dict[tuple[int, int], tuple[bool, float]] = {}
        """By pid and start, whether a process is taken to have a single thread, and until when."""
        self._settled_parents: dict[tuple[int, int], set[int]] = {}
        """By an opener's pid and start, the pids of those who have had a child that opened connections of its own and
        left the inherited ones alone; the opener that was asked about last is the last one."""
        self._last_arrival = -math.inf
        self._arrived = trio.Event()
        self._unfiled: dict[ProxiedSession, None] = {}
        """Those of which the watch over heirs doesn't know yet who opened them."""
        self._filed: dict[int, ProxiedSession] = {}
        """The others, as far as their clients' sockets are known, by the sockets' inodes; for worker threads too."""
        self._shared: dict[int, ProxiedSession] = {}
        """Those of them of which it is looked at again and again who has them open: not the opener alone."""
        self._kept: dict[int, float] = {}
        """The inodes of those that attribution is to be told to watch, and when their connections were opened."""
        self._over: list[int] = []
        """The inodes of those that it need not watch any more."""
        self._active: dict[ProxiedSession, None] = {}
        """Those that are in use, for the watch over readers, of whom it is known who opened them, or that it can't be
        known: most are gone before that when many come and go."""
        self._calm: dict[ProxiedSession, float] = {}
        """Those that it has found at rest, and when it last did, or looked at them again; the first first."""
        self._active_stirred = trio.Event()
        self._idleness = 0.0
        """Seconds for which a transaction may sit idle; 0: for ever."""
        self._idleness_limited = trio.Event()
        self._moved: dict[ProxiedSession, None] = {}
        """Those that are in use, for the watch over transactions."""
        self._sitting: dict[ProxiedSession, float] = {}
        """Those that it has found idle in a transaction, and since when; the first first. Times are seconds for which
        transactions have been looked at."""
        self._transactions_stirred = trio.Event()

    def arrival(self) -> None:
        """A client has come, and may soon fork."""
        self._last_arrival = time.monotonic()

    def enter(self, session: ProxiedSession) -> None:
        """A session begins."""
        self._unfiled[session] = None
        self._arrived.set()
        self.stir(session)

    def stir(self, session: ProxiedSession) -> None:
        """A session's client has sent something: it is in use, and the watches look at it."""
        if session.opening_known.is_set() or session.client_socket is None:
            self._calm.pop(session, None)
            self._active[session] = None
            self._active_stirred.set()
        if self._idleness:
            self._moved[session] = None
            self._transactions_stirred.set()

    def leave(self, session: ProxiedSession) -> None:
        """A session is over."""
        watched: dict[ProxiedSession, Any]
        for watched in (self._unfiled, self._active, self._calm, self._moved, self._sitting):
            watched.pop(session, None)
        inode = None if session.opening is None else session.opening.inode
        if inode is not None and self._filed.get(inode) is session:
            del self._filed[inode]
            self._shared.pop(inode, None)
            if self._kept.pop(inode, None) is None:
                self._over.append(inode)

    # Heirs

    async def over_heirs(self, witness: Witness) -> None:
        """Look who has inherited connections, and who has outlived them; until cancelled."""
        allowance, pause = Allowance(_HEIRS_SHARE, _HEIRS_SAVINGS), _EARLY_INTERVAL
        while True:
            self._arrived = trio.Event()
            if not self._unfiled and time.monotonic() - self._last_arrival >= _EARLY:
                with trio.move_on_after(max(pause, _HEIRS_INTERVAL) if self._filed else math.inf):
                    await self._arrived.wait()
                    await trio.sleep(pause)
            else:
                await trio.sleep(pause)
            allowance.spend(await self._look_for_heirs(witness))
            pause = max(_EARLY_INTERVAL, allowance.seconds_without())

    async def _look_for_heirs(self, witness: Witness) -> float:
        """Look once, if there may be something to see; return what it has cost in seconds."""
        self._file()
        if not (self._shared or self._kept or len(self._over) >= _OVER or (self._filed and witness.has_news())):
            return 0.0
        watched = self._heirs_due()
        suspects = frozenset(inode for inode, session in watched.items() if self._may_be_leaked(session))
        keep, self._kept = self._kept, {}
        over, self._over = self._over, []
        now = trio.current_time()
        try:
            (found, have_opened, orphans), seconds = await looking.look(
                timed, partial(_look_at_heirs, witness, tuple(watched), suspects, self._filed, keep, over)
            )
        except BaseException:
            self._kept |= {inode: opened for inode, opened in keep.items() if inode in self._filed}
            self._over += over
            raise
        stint = Stint()
        for inode, holders in found.items():
            session = self._filed.get(inode)
            if session is None:
                continue
            session.sightings.holders_looked = now
            with spared(Loss.EVIDENCE, session):
                self._note_holders(session, holders)
            with spared(Loss.EVIDENCE, session):
                self._note_heirs(session, holders, have_opened)
            with spared(Loss.EVIDENCE, session):
                self._note_orphan(session, holders, orphans.get(inode))
            await stint.rest()
        return seconds + stint.spent

    def _file(self) -> None:
        """Take those in of whom it is known by now who opened them, or that it can't be known."""
        for session in [one for one in self._unfiled if one.opening_known.is_set() or one.client_socket is None]:
            del self._unfiled[session]
            opening = session.opening
            if opening is None or opening.inode is None:
                continue
            self._filed[opening.inode] = session
            self._kept[opening.inode] = opening.client.opened
            with spared(Loss.EVIDENCE, session):
                self._note_holders(session, opening.holders)
            opening.holders = NOBODY
        if not self._unfiled:
            self._unfiled.clear()  # a dict that has become empty keeps its table, which is as large as it ever was

    def _heirs_due(self) -> dict[int, ProxiedSession]:
        """As many sessions, by inode, as are looked at in one round: those first that have waited the longest."""
        due: dict[int, ProxiedSession] = {}
        holds = 0
        for inode, session in sorted(self._shared.items(), key=lambda one: one[1].sightings.holders_looked):
            holds += max(1, len(session.sightings.holders))
            if due and holds > _HOLDS_AT_A_TIME:
                break
            due[inode] = session
        return due

    def _note_holders(self, session: ProxiedSession, holders: Holders) -> None:
        opening, processes = session.opening, holders.processes
        if opening is None or opening.inode is None or session.done.is_set():
            return
        # It need not be looked again as long as nobody is seen to have it open, or the opener alone is: who comes by it
        # then is a new process. But who else has it open may let go of it, and then or before that the opener may end.
        if not processes or (len(processes) == 1 and _is_opener(processes[0], opening)):
            self._shared.pop(opening.inode, None)
        else:
            self._shared[opening.inode] = session
        heirs = tuple(
            holding.process
            for holding in holders.holdings
            if holding.seen - holding.since >= LASTING or _is_opener(holding.process, opening)
        )
        if heirs == processes:
            heirs = processes  # of nearly every session they are the same, its opener
        session.sightings.note_holders(processes, heirs)
        if processes:
            session.last_sole_holder = sole_holder(holders)
        session.client.contest(len(heirs) > 1 and not session.names_senders)
        if len(heirs) > 1 and session.tracker is not None:
            session.tracker.expect_readers()

    def _note_heirs(self, session: ProxiedSession, holders: Holders, have_opened: frozenset[int]) -> None:
        lasting = {process.pid for process in holders.lasting(LASTING)}
        opening, tracker, sightings = session.opening, session.tracker, session.sightings
        if len(lasting) < 2 or opening is None:
            return
        opener = opening.opener and opening.opener.pid
        followed = self._followers(opening)
        found = judge_heirs(
            (
                holding
                for holding in holders.holdings
                if holding.process.pid in lasting and holding.process.pid != opener
            ),
            used_by=() if tracker is None else tracker.senders.pids,
            have_opened=have_opened,
            settled_parents=followed,
            patience=PATIENCE if opening.runtime.server is None else SERVERS_PATIENCE,
        )
        followed |= found.parents
        warns = not found.idle <= sightings.idle_told
        if not warns and found.settled <= sightings.settled_told:
            return
        news = found.idle - sightings.idle_told if warns else found.settled - sightings.settled_told
        since = max((_had_since(one, session) for one in holders.holdings if one.process.pid in news), default=None)
        reason = f"{len(lasting)} processes have the connection's socket open"
        verdict = replace(session.concern(Kind.INHERITED_CONNECTION, reason), settled=not warns, since=since)
        if not self._accuse(session, verdict):
            return
        if warns:
            sightings.idle_told |= found.idle
        else:
            sightings.settled_told |= found.settled

    def _followers(self, opening: Opening) -> set[int]:
        """The processes that have had a child that followed the advice, of one opener's connections; to be added to."""
        opener = opening.opener
        if opener is None:
            return set()
        key = opener.pid, opener.started
        followers = self._settled_parents.pop(key, set())
        self._settled_parents[key] = followers
        if len(self._settled_parents) > _OPENERS:
            del self._settled_parents[next(iter(self._settled_parents))]
        return followers

    @staticmethod
    def _may_be_leaked(session: ProxiedSession) -> bool:
        """Whether nobody has used a connection since its opener ended, for long enough."""
        since = session.sightings.unused_since
        return since is not None and trio.current_time() - since[1] >= UNUSED and not session.sightings.leak_told

    def _note_orphan(self, session: ProxiedSession, holders: Holders, orphan: _Orphan | None) -> None:
        tracker, sightings = session.tracker, session.sightings
        if orphan is None or tracker is None:
            sightings.unused_since = None
            return
        unused = sightings.unused_since is not None and sightings.unused_since[0] == tracker.requests
        if not unused or orphan is _Orphan.WAITED_FOR:
            sightings.unused_since = tracker.requests, trio.current_time()
        elif orphan is _Orphan.LEFT_ALONE and holders.lasting(LASTING):
            if is_used(holders.processes, tracker.senders.pids, tracker.requests_seen()):
                return
            idleness = f"has not been used for more than {UNUSED:g} s"
            reason = f"the connection has outlived the process that opened it, and {idleness}"
            sightings.leak_told = self._accuse(session, session.concern(Kind.LEAKED_CONNECTION, reason))

    def leave_open(self, session: ProxiedSession, over: str) -> bool:
        """Have a session judged that is still open although what it belongs to is over.

        Returns False if it can't be now, or is over itself.
        """
        sightings = session.sightings
        sightings.leak_told = sightings.leak_told or self._accuse(
            session, session.concern(Kind.LEAKED_CONNECTION, LEFT_OPEN % over)
        )
        return sightings.leak_told

    # Threads

    async def over_readers(self, witness: Witness) -> None:
        """Look whether several threads wait for one answer; until cancelled."""
        allowance, pause, calm_next = Allowance(_READERS_SHARE, _READERS_SAVINGS), _READERS_INTERVAL, -math.inf
        while True:
            if not self._active:
                self._active.clear()  # it keeps its table otherwise, which is large behind a storm
                self._active_stirred = trio.Event()
                calm_due = next(iter(self._calm.values()), math.inf) + _READERS_RARELY
                with trio.move_on_at(max(calm_due, calm_next)):
                    await self._active_stirred.wait()
            await trio.sleep(pause)
            due, cost = await self._due(witness)
            now = trio.current_time()
            if now >= calm_next and not due:
                due = self._due_calm(witness, now)
                calm_next = now + _CALM_INTERVAL
            if due:
                cost += await self._look_at_readers(witness, due)
            interval = _EARLY_READERS_INTERVAL if self._may_just_share() else _READERS_INTERVAL
            allowance.spend(cost)
            pause = max(interval, allowance.seconds_without())

    def _may_just_share(self) -> bool:
        """Whether threads may have begun just now to share a connection, and only a look tells."""
        early = time.monotonic() - self._last_arrival < _EARLY and len(self._sessions) <= _EARLY_READERS
        return early and not all(session.names_threads for session in self._active)

    async def _due(self, witness: Witness) -> tuple[list[ProxiedSession], float]:
        """Those in use that it is time to look at, those first that have waited for it the longest; and its cost."""
        now, stint = trio.current_time(), Stint()
        busy: list[ProxiedSession] = []
        idle: list[ProxiedSession] = []
        for n, session in enumerate(list(self._active)):
            if not n % GLANCES:
                await stint.rest()
            tracker, sightings = session.tracker, session.sightings
            if tracker is None:
                self._active.pop(session, None)
                continue
            # Most have been looked at a moment ago, whether an answer is due by now or not.
            if (sightings.watch_next > now and sightings.look_next > now) or session.client.waits:
                continue
            try:
                is_idle = tracker.idle
                if (sightings.watch_next if is_idle else sightings.look_next) <= now:
                    solitary_until = self._solitary_until(witness, session, now)
                    if solitary_until > now:
                        sightings.look_next = sightings.watch_next = solitary_until
                        if is_idle:
                            self._come_to_rest(session, now)
                    else:
                        (idle if is_idle else busy).append(session)
            except Exception:
                note(Loss.EVIDENCE, session)
                sightings.look_next = sightings.watch_next = now + _READERS_RARELY
        chosen = [
            (session.sightings.look_next, session)
            for session in heapq.nsmallest(_BUSY_AT_A_TIME, busy, key=lambda session: session.sightings.look_next)
        ]
        chosen += [
            (session.sightings.watch_next, session)
            for session in heapq.nsmallest(_IDLE_AT_A_TIME, idle, key=lambda session: session.sightings.watch_next)
        ]
        # There may not be the time for all of them.
        return [session for _, session in sorted(chosen, key=lambda one: one[0])], stint.spent

    def _due_calm(self, witness: Witness, now: float) -> list[ProxiedSession]:
        """Some of those at rest that it is time to look at again."""
        due: list[ProxiedSession] = []
        for session, at in list(islice(self._calm.items(), _IDLE_AT_A_TIME)):
            if at + _READERS_RARELY > now:
                break
            del self._calm[session]
            if session.tracker is None:
                continue
            self._calm[session] = now
            with spared(Loss.EVIDENCE, session):
                if session.tracker.idle and self._solitary_until(witness, session, now) <= now:
                    due.append(session)
        return due

    def _come_to_rest(self, session: ProxiedSession, now: float) -> None:
        """A session is at rest, and it is known who waits on it; but not of a new one, where that may change soon."""
        if session.done.is_set() or time.monotonic() - session.arrived < _EARLY:
            return
        self._active.pop(session, None)
        self._calm.pop(session, None)
        self._calm[session] = now  # one object for all of a round
        session.client.attend()

    def _solitary_until(self, witness: Witness, session: ProxiedSession, now: float) -> float:
        """Until when a single thread is taken to be all that can wait on a connection; a time in the past: it isn't."""
        opener = None if session.opening is None else session.opening.opener
        young = time.monotonic() - session.arrived < _EARLY
        until = now + (_YOUNG_SOLITUDE if young else _SOLITUDE)
        if opener is None:
            return until
        if len(session.sightings.holders) > 1:
            return 0.0
        key = opener.pid, opener.started
        known = self._solitary.get(key)
        if known is None or known[1] <= now:
            if len(self._solitary) > _SOLITARY:
                self._solitary.clear()
            known = self._solitary[key] = witness.has_one_thread(opener), until
        return known[1] if known[0] else 0.0

    async def _look_at_readers(self, witness: Witness, due: list[ProxiedSession]) -> float:
        """Look at some sessions, as far as there is time; return what it has cost in seconds."""
        looks = []
        for session in due:
            opening, tracker, sightings = session.opening, session.tracker, session.sightings
            if opening is None or opening.opener is None or tracker is None or session.client.outgoing:
                continue
            look = _Look(opening, sightings.holders or (opening.opener,), tracker.idle, not session.names_threads)
            looks.append((session, tracker, tracker.requests, look))
        # One change of threads for all: each takes the interpreter's lock from the relay.
        found, seconds = await looking.look(timed, _look_at_threads, witness, [look for *_, look in looks])
        for (session, tracker, requests, look), seen in zip(looks, found, strict=False):
            self._look_again_later(session, idle=look.idle)
            with spared(Loss.EVIDENCE, session):
                self._note_threads(session, tracker, requests, look, seen)
                if look.idle and session.tracker is tracker and tracker.idle and tracker.requests == requests:
                    self._come_to_rest(session, trio.current_time())
        return seconds

    @staticmethod
    def _look_again_later(session: ProxiedSession, *, idle: bool) -> None:
        sightings = session.sightings
        longest = _CONTESTED_INTERVAL if session.client.contested else _READERS_RARELY
        if idle:
            young = time.monotonic() - session.arrived < _EARLY
            sightings.watch_next = trio.current_time() + (_READERS_INTERVAL if young else longest)
        else:
            sightings.looks = min(sightings.looks + 1, _LOOKS)
            pause = min(longest, _READERS_INTERVAL * 2 ** (sightings.looks // 4))
            sightings.look_next = trio.current_time() + pause

    def _note_threads(
        self, session: ProxiedSession, tracker: Tracker, requests: int, look: _Look, seen: _Seen | None
    ) -> None:
        if seen is None or session.done.is_set():
            return
        if look.idle and tracker.idle and tracker.requests == requests:
            session.sightings.watchers = seen.watchers
        elif not look.idle:
            # Who was asleep then has sent nothing since, if nothing was on its way that the guard hasn't seen.
            known = tracker.requests == requests and session.client.is_drained
            session.sightings.throughout = seen.throughout(session.transport) if known else frozenset()
            self._note_readers(session, seen.waits, seen.blocked)

    def _note_readers(self, session: ProxiedSession, waits: Waits, blocked: tuple[Waiting, ...]) -> None:
        before, session.sightings.asleep = session.sightings.asleep, frozenset(one.sleep for one in waits.threads)
        session.sightings.waits = waits
        opening, tracker = session.opening, session.tracker
        language = None if opening is None else opening.runtime.language
        found = readers(blocked, before, watchers=session.sightings.watchers, language=language)
        if found is None or tracker is None or tracker.idle:
            return
        verdict = tracker.judge_readers(found.kind, AT_ONCE, intruder=found.intruder, requesters=found.requesters)
        self._accuse(session, session.dated(verdict))

    # Transactions

    def limit_idleness(self, threshold: float) -> None:
        """Let transactions sit idle for that many seconds from now on; 0, and at first: for ever."""
        if threshold and not self._idleness:
            self._moved = dict.fromkeys(self._sessions.values())  # of which nobody has taken note meanwhile
        self._idleness = threshold
        self._idleness_limited.set()
        self._transactions_stirred.set()

    async def over_transactions(self) -> None:
        """Look which transactions sit idle for longer than they may; until cancelled.

        Time in which nobody looked, as the guard was stopped or the machine suspended, doesn't count: what a client has
        sent meanwhile hasn't been read.
        """
        looked_for, looked = 0.0, trio.current_time()
        while True:
            self._idleness_limited = trio.Event()
            threshold = self._idleness
            if threshold and not self._moved and not self._sitting:
                self._moved.clear()  # likewise
                self._transactions_stirred = trio.Event()
                await self._transactions_stirred.wait()
                continue
            interval = min(_IDLE_INTERVAL, threshold * _IDLE_PRECISION) if threshold else math.inf
            with trio.move_on_after(interval):
                await self._idleness_limited.wait()
                continue
            now = trio.current_time()
            looked_for, looked = looked_for + min(now - looked, 2 * interval), now
            await self._look_at_transactions(looked_for, threshold)

    async def _look_at_transactions(self, now: float, threshold: float) -> None:
        stint = Stint()
        for n, session in enumerate(list(self._moved)):
            with spared(Loss.EVIDENCE, session):
                self._note_idleness(session, now)
            if not n % GLANCES:
                await stint.rest()
        for n, (session, _) in enumerate(list(takewhile(lambda one: now - one[1] >= threshold, self._sitting.items()))):
            with spared(Loss.EVIDENCE, session):
                self._note_long_idleness(session, threshold)
            if not n % GLANCES:
                await stint.rest()

    def _note_idleness(self, session: ProxiedSession, now: float) -> None:
        """See whether a session that is in use, or has been, sits idle in a transaction by now."""
        tracker, sightings = session.tracker, session.sightings
        if session not in self._moved or session.client.waits:
            return
        if tracker is None or not tracker.in_transaction or not tracker.idle:
            sightings.idle_behind = None
            self._sitting.pop(session, None)
        elif sightings.idle_behind != tracker.requests:
            sightings.idle_behind = tracker.requests
            self._sitting.pop(session, None)
            self._sitting[session] = now
        if tracker is None or tracker.idle:
            del self._moved[session]
            session.client.attend()

    def _note_long_idleness(self, session: ProxiedSession, threshold: float) -> None:
        if session.tracker is None:
            self._sitting.pop(session, None)
        elif session in self._sitting and session not in self._moved and session.client.is_drained:
            reason = f"has left a transaction idle for more than {threshold:g} s"
            if self._accuse(session, session.concern(Kind.IDLE_IN_TRANSACTION, reason)):
                self._sitting.pop(session, None)
        # Otherwise it has sent something, which is about to be read.


def _had_since(holding: Holding, session: ProxiedSession) -> float:
    """When a process has got a connection, in seconds since the epoch: at its start, unless it is older."""
    process = holding.process
    if process.started_at >= session.opened_at - TICK:
        return max(process.started_at, session.opened_at)
    return time.time() - (time.monotonic() - holding.since)


def _is_opener(process: Process, opening: Opening) -> bool:
    """Whether a process has opened a connection, or nobody is known to have."""
    opener = opening.opener
    if opener is None:
        return opening.connected is None
    return (process.pid, process.started) == (opener.pid, opener.started)


class _Look(NamedTuple):
    """What is to be looked at: who waits on one connection."""

    opening: Opening
    processes: tuple[Process, ...]
    idle: bool
    """No answer is due."""
    sleeps: bool
    """The kernel doesn't name the threads that send: who sleeps can't be one of them."""


class _Seen(NamedTuple):
    """What has been seen."""

    watchers: frozenset[Thread] = frozenset()
    """Those that wait although no answer is due."""
    waits: Waits = Waits()
    """Otherwise: those that wait."""
    blocked: tuple[Waiting, ...] = ()
    """Those of them that are blocked reading at the same moment."""
    sleeps: frozenset[Sleep] = frozenset()
    """Where somebody waits in the only process that has the connection open: the sleeps of all its threads."""

    def throughout(self, transport: Literal["tcp", "unix"]) -> frozenset[Sleep]:
        """The sleeps whose threads have sent nothing since, if they are in them still when a small message has come."""
        if transport != "unix":
            return self.sleeps
        return self.sleeps | {one.when_read_from for one in self.waits.threads if one.sleep in self.sleeps}


def _look_at_threads(witness: Witness, looks: list[_Look]) -> list[_Seen | None]:
    """See who waits on some connections: who although no answer is due, or else who, and who is blocked at once.

    In a worker thread. ``None`` of those that can't be looked at; what there is no time for is left out at the end.
    """
    seen: list[_Seen | None] = []
    ends = time.thread_time() + _READERS_ROUND
    for look in looks:
        if time.thread_time() > ends:
            break
        try:
            seen.append(_look_at(witness, look))
        except Exception:
            note(Loss.EVIDENCE)
            seen.append(None)
    return seen


def _look_at(witness: Witness, look: _Look) -> _Seen:
    opening, processes = look.opening, look.processes
    if look.idle:
        return _Seen(witness.watchers(opening, processes))
    waits, blocked = witness.look(opening, processes)
    alone = look.sleeps and len(processes) == 1 and waits.threads
    return _Seen(frozenset(), waits, blocked, witness.sleeps(processes[0]) if alone else frozenset())


class _Orphan(Enum):
    """What is seen of a connection that has outlived its opener."""

    SEEN = "it was not looked at any closer"
    WAITED_FOR = "a thread waits for something to come on it"
    LEFT_ALONE = "no thread does"


def _look_at_heirs(
    witness: Witness,
    inodes: Collection[int],
    suspects: Collection[int],
    sessions: Mapping[int, ProxiedSession],
    keep: Mapping[int, float],
    over: Collection[int],
) -> tuple[dict[int, Holders], frozenset[int], dict[int, _Orphan]]:
    """Find out who has sockets open, who has connections of its own, and which sockets have outlived their opener.

    In a worker thread. Of the ``suspects`` among these last it is looked at whether somebody waits on them. For the
    other arguments, and for which sockets are found, see :meth:`Witness.watch`; ``sessions`` are all by their sockets.
    """
    found = witness.watch(inodes, keep=keep, over=over, age=LASTING)
    have_opened = witness.have_opened(process for holders in found.values() for process in holders.processes)
    known = {
        inode: session.opening
        for inode in found
        if (session := sessions.get(inode)) is not None and session.opening is not None
    }
    orphans = {
        inode: _Orphan.SEEN
        for inode, opening in known.items()
        if found[inode].processes and witness.has_lost_opener(opening, found[inode].processes)
    }
    for inode in orphans.keys() & suspects:
        waits, _ = witness.look(known[inode], found[inode].processes)
        waited_for = any(one.readable for one in waits.threads)
        orphans[inode] = _Orphan.WAITED_FOR if waited_for else _Orphan.LEFT_ALONE
    return found, have_opened, orphans
