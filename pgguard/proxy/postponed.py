"""Records on their way to the sinks, in the order of their numbers; one may wait for stacks that come late.

py-spy takes long on a busy machine, and a session isn't held for longer than the budget for evidence. But a thread
that waits for its answer, or sleeps elsewhere, is often still in the same sleep long after the session has gone on. So
when a stack is still missing, the ruling goes out and the fault is known at once, and only its record waits, for
:data:`LATE` at most, while the look goes on.

*Never a later moment's.* A thread that has gone on does something else. A stack counts that is of the sleep in which
the thread was seen before the ruling: a sleep has a number. Some drivers wake now and then and wait again, in another
sleep (:mod:`pgguard.attribution.stacks`). What is read of such a thread counts if nothing has passed on the connection
since the verdict but the request that it was about: then it waits for the same.

*In order.* What is recorded meanwhile waits behind it, as it may be a repeat of it. If that is much, nothing waits.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Self

import trio

from pgguard.attribution.stacks import MOVED_ON
from pgguard.proxy.losses import Loss, spared
from pgguard.session.verdicts import Direction

if TYPE_CHECKING:
    from collections.abc import Callable

    from pgguard.attribution.stacks import Stacks
    from pgguard.faults.fault import Fault
    from pgguard.proxy.ends import Phase
    from pgguard.proxy.session import ProxiedSession
    from pgguard.proxy.work import Work
    from pgguard.reporting.sinks import Fanout
    from pgguard.session.tracker import Tracker
    from pgguard.session.verdicts import Verdict

LATE: Final = 1.0
"""Seconds for which a record waits at most."""
_TIMES_BUDGET: Final = 4
"""The same, as a multiple of the budget for evidence: whoever allows no time for it doesn't want to wait either."""
_MOST: Final = 64
"""Records that wait at once."""


@dataclass(frozen=True, slots=True)
class _Traffic:
    """How far a session has come."""

    tracker: Tracker
    phase: Phase
    position: int
    """Bytes that have come from the server."""
    requests: int

    @classmethod
    def of(cls, session: ProxiedSession) -> Self | None:
        """``None`` if it isn't followed."""
        tracker = session.tracker
        return None if tracker is None else cls(tracker, session.phase, tracker.position, tracker.requests)

    def is_followed_by(self, now: _Traffic | None, *, held: int) -> bool:
        """Whether nothing has passed since, but for so many requests that were held."""
        return now is not None and replace(now, requests=self.requests) == self and now.requests <= self.requests + held


class LateStacks:
    """Stacks that a look goes on to read when the time for evidence is over.

    It is made on trio's thread, as a context manager that is left when the ruling is out. The look's thread, which
    nobody waits for by then, calls :meth:`begin`, :meth:`deliver` and :meth:`end`. What it brings is put down on trio's
    thread.

    Args:
        session: the session that is judged.
        verdict: what it is judged for.
        budget: seconds that there are for evidence.
    """

    def __init__(self, session: ProxiedSession, verdict: Verdict, budget: float) -> None:
        self.seconds = min(LATE, _TIMES_BUDGET * budget)
        """For how long a look may go on; 0: not at all."""
        self.is_wanted = self.seconds > 0
        """Whether it is to go on. Any thread may ask."""
        self.is_awaited = False
        """A record waits for them. Any thread may ask."""
        self.over = trio.Event()
        """Nothing more comes."""
        self._session = session
        self._traffic = _Traffic.of(session)
        message = verdict.message
        self._held = int(message is not None and message.direction is Direction.FRONTEND)
        self._stacks: Stacks | None = None
        self._goes_on = False
        self.threads: trio.CapacityLimiter | None = None
        """Those of which one looks."""
        self._has_room = False
        self._token = trio.lowlevel.current_trio_token()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.is_wanted = self.is_awaited

    # In the look's thread

    def begin(self) -> None:
        """Say that stacks may be missing when the time is over, and that it is worth going on."""
        self._goes_on = True

    def deliver(self, stacks: Stacks) -> None:
        """Hand over all that has been found by now."""
        self._soon(self._take, stacks)

    def end(self) -> None:
        """Say that nothing more comes, whether or not anything has come."""
        self._soon(self._end)

    def _soon(self, function: Callable[..., None], *arguments: object) -> None:
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(function, *arguments)

    # On trio's thread

    @property
    def are_missing(self) -> bool:
        """Whether a look goes on to read some."""
        return self._goes_on and self.is_wanted and not self.over.is_set()

    def keep(self) -> None:
        """Have the look go on, and make room for another one beside it: it does next to nothing but wait."""
        self.is_awaited = True
        if self.threads is not None:
            self.threads.total_tokens += 1
            self._has_room = True

    def leave_off(self) -> None:
        """Have the look end soon, as nobody waits for it any more."""
        self.is_wanted = self.is_awaited = False
        self.over.set()

    def added_to(self, found: Stacks) -> Stacks:
        """What was found in time, and what has come since that is certain to be of the same moment."""
        stacks, before = self._stacks, self._traffic
        if stacks is None:
            return found
        if before is not None and before.is_followed_by(_Traffic.of(self._session), held=self._held):
            return stacks
        later = stacks.again.keys() - found.again.keys()
        again = {thread: waiting for thread, waiting in stacks.again.items() if thread not in later}
        return replace(
            stacks, again=again, problems={**dict.fromkeys((pid for pid, _ in later), MOVED_ON), **stacks.problems}
        )

    def _take(self, stacks: Stacks) -> None:
        self._stacks = stacks

    def _end(self) -> None:
        self.over.set()
        if self.threads is not None and self._has_room:
            self.threads.total_tokens -= 1
            self._has_room = False


@dataclass(slots=True, eq=False)
class _Waiting:
    """A record that hasn't been written."""

    session: ProxiedSession | None
    fault: Fault
    work: int
    """The number of the work that is done when it has been written."""
    late: LateStacks | None = None
    """What it waits for; ``None``: for those in front of it alone."""
    complete: Callable[[Fault], Fault] | None = None
    until: float = 0.0
    """In seconds of trio's clock."""


class Outbox:
    """Hands records on to the sinks, each at once, unless one in front of it waits for its stacks.

    None is lost, and none is written twice: whatever ends :meth:`run`, those that wait are written then. No method
    raises what comes from a sink, or from ``complete``.

    Args:
        sinks: where they go.
        work: where those that wait are taken note of.
    """

    def __init__(self, sinks: Fanout, work: Work) -> None:
        self._sinks = sinks
        self._work = work
        self._waiting: deque[_Waiting] = deque()
        self._come = trio.Event()
        self._is_running = False

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits."""
        return not self._waiting

    def put(self, session: ProxiedSession | None, fault: Fault) -> None:
        """Record a fault, behind those that wait."""
        self._waiting.append(_Waiting(session, fault, self._work.begin()))
        if self._waiting[0].late is None or len(self._waiting) > _MOST:
            self.flush()

    def postpone(
        self, session: ProxiedSession, fault: Fault, late: LateStacks, complete: Callable[[Fault], Fault]
    ) -> None:
        """Record a fault when its stacks have come, or won't come in time.

        Args:
            session: whose it is.
            fault: as it is known now.
            late: what it waits for, already kept.
            complete: returns the fault as it is to be recorded.
        """
        until = trio.current_time() + late.seconds
        self._waiting.append(_Waiting(session, fault, self._work.begin(), late, complete, until))
        if not self._is_running:
            self.flush()
        self._come.set()

    async def run(self) -> None:
        """See to those that wait, until cancelled."""
        self._is_running = True
        try:
            while True:
                self._write_those_that_are_due()
                if self._waiting and (late := self._waiting[0].late) is not None:
                    with trio.move_on_at(self._waiting[0].until):
                        await late.over.wait()
                else:
                    self._come = trio.Event()
                    await self._come.wait()
        finally:
            self._is_running = False
            self.flush()

    def flush(self) -> None:
        """Write whatever waits, as it is by now."""
        while self._waiting:
            self._write(self._waiting.popleft())

    def _write_those_that_are_due(self) -> None:
        while self._waiting:
            late = self._waiting[0].late
            if late is not None and not late.over.is_set() and trio.current_time() < self._waiting[0].until:
                return
            self._write(self._waiting.popleft())

    def _write(self, one: _Waiting) -> None:
        fault = one.fault
        if one.late is not None:
            one.late.leave_off()
        if one.complete is not None:
            with spared(Loss.RECORD, one.session):
                fault = one.complete(fault)
        with spared(Loss.SINKS, one.session):
            self._sinks.record(fault)
        self._work.end(one.work)
