"""From a verdict to a ruling: evidence, fault, policy, record.

What the verdict is about is held meanwhile, and nothing else. Evidence that can't be collected within the budget is
left out of the record; whatever fails on the way costs what it was for (:mod:`pgguard.proxy.losses`), and neither the
record nor the ruling.
"""

from __future__ import annotations

import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from pgguard.attribution.findings import Findings
from pgguard.faults.build import build_fault, build_instance, family_of, likeness_of, plain_fault, plain_instance
from pgguard.faults.catalogue import CATALOGUE, Severity, severity_of
from pgguard.faults.conclude import AT_ONCE, conclude, heirs, readers
from pgguard.faults.docket import Entered, Family
from pgguard.faults.fault import SessionFacts
from pgguard.faults.policy import Action, Policy
from pgguard.faults.rejection import PLAIN_REJECTION, SQLSTATE, rejection
from pgguard.identity import Sender
from pgguard.proxy import looking
from pgguard.proxy.alike import Alike, Waiting
from pgguard.proxy.investigation import Evidence, Investigation, known_at_once
from pgguard.proxy.losses import Loss, note, spared
from pgguard.proxy.postponed import LateStacks, Outbox
from pgguard.proxy.rollcall import call_roll
from pgguard.proxy.turns import Allowance, Desk, Stint, Turns, Urgency, timed
from pgguard.proxy.work import Work
from pgguard.session.verdicts import AFTER_END, Kind, Verdict
from pgguard.wire.fields import build_error_response

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from pgguard.attribution.evidence import Driver, Process
    from pgguard.attribution.witness import Witness
    from pgguard.faults.causes import Instance
    from pgguard.faults.docket import Docket
    from pgguard.faults.fault import Fault
    from pgguard.faults.sql import SqlMode
    from pgguard.proxy.alike import Likeness
    from pgguard.proxy.figures import Durations
    from pgguard.proxy.rollcall import Counted
    from pgguard.proxy.session import ProxiedSession
    from pgguard.reporting.sinks import Fanout

_SAMPLING_BUDGET: Final = 0.004
"""Seconds for which a request is held back until its sender is seen to wait for the answer."""
_SAMPLING_LIMIT: Final = 0.05
"""The same, where looking itself takes long: the processors are busy with something else."""
_SAMPLING_SHARE: Final = 0.1
"""Of the time, that is spent on sampling in the long run at most, for all contested sessions together."""
_SAMPLING_SAVINGS: Final = 1.0
"""Seconds of sampling that may be taken at once."""
_ROLL_CALL_BUDGET: Final = 0.25
"""Seconds to find out who has opened the connections that have just been opened, before they are counted, and seconds
to count them: a refusal is looked into once, and nobody but the client that it is about waits meanwhile."""
_ENDED_BUDGET: Final = 0.25
"""Seconds to look at a connection that has ended: nobody is left to wait for it but the server."""
_BY_SEVERAL: Final = frozenset({Kind.SHARED_BY_PROCESSES, Kind.SHARED_BY_THREADS})

_SHOWN_BY_EVIDENCE: Final = frozenset({Kind.REQUEST_WHILE_BUSY, Kind.FOREIGN_TERMINATE})
"""Kinds of which evidence makes another one, or none at all."""

_OPENERS: Final = 64
"""Processes that are looked at once more of those who opened connections on which faults were alike."""
_OPENERS_BUDGET: Final = 0.25
"""Seconds for that: nobody waits but the records."""

_STRANGERS: Final = 1024
"""Processes that may wait to be looked at."""
_INVESTIGATIONS: Final = 2
"""Threads that take evidence at the same time. They take turns with the relay in the interpreter, so that more of them
would keep it waiting for longer each time, and be no quicker: what they do is rarely to wait."""
_SETTLING: Final = 1.0
"""Seconds between two looks whether it is time to account for what was suppressed."""
_LINE: Final = 32
"""Verdicts of one urgency that may wait for one of them. Whoever comes then is ruled on without: its evidence would
come too late, or be about what has changed meanwhile."""
_PATIENCE: Final = 1.0
"""Seconds for which a verdict waits for its evidence to be taken where nothing is held, or nobody waits for it."""
_EVIDENCE_SHARE: Final = 0.2
_EVIDENCE_SAVINGS: Final = 0.5
"""Of a processor, what evidence takes in the long run at most, for all sessions together; and seconds of it that it may
take at once."""
_STACKS_SHARE: Final = 0.1
_STACKS_SAVINGS: Final = 1.0
"""The same for reading stacks, a program of its own that takes longer than all the rest."""

_DRIVER_BUDGET: Final = 1.0
"""Seconds for which a request may be held until its client's driver is known, if that decides on its rejection."""

_GOODBYE_BUDGET: Final = 1.0
"""Seconds for which a Terminate may be held until it is seen whether somebody else has the connection open.

Nobody waits for an answer to it. Looking takes a millisecond, unless the processors are busy with something else."""

_PLAIN_RESPONSE: Final = build_error_response(PLAIN_REJECTION, sqlstate=SQLSTATE)
"""For a client that is rejected, where nothing more can be said."""


@dataclass(frozen=True, slots=True)
class Ruling:
    """What is to be done with the message that a verdict is about."""

    action: Action | None
    """``None``: it is no fault, or the configuration ignores it."""
    response: bytes | None = None
    """The ErrorResponse for a client that is rejected."""


def _is_doubtful(verdict: Verdict) -> bool:
    """Whether evidence may show that it is no fault: known or not, it is looked into then."""
    unnamed = verdict.intruder is None and verdict.reason == AFTER_END
    return verdict.kind is Kind.FOREIGN_TERMINATE or unnamed or verdict.parting


def _urgency(verdict: Verdict) -> Urgency:
    if verdict.ends or verdict.message is None:
        return Urgency.END
    return Urgency.GOODBYE if verdict.kind is Kind.FOREIGN_TERMINATE else Urgency.MESSAGE


class Judge:
    """Rules on verdicts and has the faults recorded before the ruling is out, but for one whose stacks are still read.

    Args:
        policies: what is done about which fault, by the name of the database.
        sql_mode: how SQL text appears in records.
        docket: numbers, counts, and knows repeats.
        sinks: where records go.
        witness: attribution; ``None`` when it is off.
        sessions: the sessions that are open.
        evidence_budget: seconds for which a session may be held while a fault is looked into; 0 for none.
        took: counts how long that takes.
    """

    def __init__(
        self,
        *,
        policies: Mapping[str | None, Policy],
        sql_mode: SqlMode,
        docket: Docket,
        sinks: Fanout,
        witness: Witness | None,
        sessions: Callable[[], Iterable[ProxiedSession]],
        evidence_budget: float,
        took: Durations,
    ) -> None:
        self._rules = {name: _Rules.of(policy) for name, policy in policies.items()}
        self._sql_mode = sql_mode
        self._docket = docket
        self.work = Work()
        """What is to be finished before a fault is known, counted and recorded."""
        self._records = Outbox(sinks, self.work)
        self._witness = witness
        self._sessions = sessions
        self._evidence_budget = evidence_budget
        self._took = took
        self._turns = Turns()
        self._threads = trio.CapacityLimiter(_INVESTIGATIONS)
        self._desk = Desk(_INVESTIGATIONS, _LINE)
        # They wait for processes to end, and must not keep anybody waiting who is in a hurry.
        self._waiting_threads = trio.CapacityLimiter(_INVESTIGATIONS)
        self._waiting_desk = Desk(_INVESTIGATIONS, _LINE)
        self._evidence = Allowance(_EVIDENCE_SHARE, _EVIDENCE_SAVINGS)
        self._stacks = Allowance(_STACKS_SHARE, _STACKS_SAVINGS)
        self._taken: deque[float] = deque()
        self._taken_by_stacks: deque[float] = deque()
        """What looks have taken that is not accounted for yet, and what reading stacks has, in seconds."""
        self._sampling = Allowance(_SAMPLING_SHARE, _SAMPLING_SAVINGS)
        self._strangers_send, self._strangers = trio.open_memory_channel[
            tuple["ProxiedSession", int, "Process | None"]
        ](_STRANGERS)
        self._alike = Alike()
        self._uncounted: deque[tuple[deque[Waiting], Likeness | None, int]] = deque()
        """What has been looked into, with those that waited for it, and the number of the work that is to be done."""
        self._has_uncounted = trio.Event()

    def follow(self, policies: Mapping[str | None, Policy], sql_mode: SqlMode, evidence_budget: float) -> None:
        """Go on by other settings. If another policy is among them, faults that are known are news again."""
        rules = {name: _Rules.of(policy) for name, policy in policies.items()}
        if rules != self._rules:
            self._docket.renew()
        self._rules = rules
        self._sql_mode = sql_mode
        self._evidence_budget = evidence_budget

    def is_repeat(self, session: ProxiedSession, verdict: Verdict, now: float) -> bool:
        """Deal with a verdict for which nothing needs to be held: it is ignored, or logged and known.

        Returns True if that was so; the message is then to be forwarded. Never raises.
        """
        verdict = _placed(session, verdict)
        if self._ignores(session, verdict.kind) or self._is_explained(
            session, verdict, self._docket.is_surely_explained
        ):
            return True
        if _is_doubtful(verdict):
            return False
        known = self._known(session, verdict, now)
        if known is None:
            one = self._seen_at_once(session, verdict, now)
            return one is not None and (self._is_familiar(one) or self._joins(one, self._likeness(one)))
        if known.action is not Action.LOGGED:
            return False
        self._count_again(session, verdict, now)
        return True

    async def rule(self, session: ProxiedSession, verdict: Verdict) -> Ruling:
        """Take evidence; then decide and record, when it is its turn. Never raises but for cancellation."""
        verdict = _placed(session, verdict)
        if self._ignores(session, verdict.kind):
            return Ruling(None)
        now, began = time.time(), time.monotonic()
        urgency = _urgency(verdict)
        known = None if _is_doubtful(verdict) else self._known(session, verdict, now)
        if known is not None:
            async with self._turns.turn(urgency):
                return self._repeat(session, verdict, known, now)
        one = self._seen_at_once(session, verdict, now)
        likeness = None if one is None else self._likeness(one)
        if one is not None and self._joins(one, likeness):
            return Ruling(Action.LOGGED)
        waiting: deque[Waiting] = deque()
        try:
            with self._late_stacks(session, verdict) as late, self._alike.leading(likeness) as waiting:
                findings = await self._findings(session, verdict, urgency, began, late)
                self._took.note(time.monotonic() - began)
                async with self._turns.turn(urgency):
                    return self._decide(session, verdict, findings, now, likeness, late)
        finally:
            if waiting:
                # The first one doesn't wait for it, nor does who is cancelled.
                self._uncounted.append((waiting, likeness, self.work.begin()))
                self._has_uncounted.set()

    def _late_stacks(self, session: ProxiedSession, verdict: Verdict) -> LateStacks:
        """What may come when the time for evidence is over; nothing while a record waits for others."""
        return LateStacks(session, verdict, self._evidence_budget if self._records.is_empty else 0.0)

    def _decide(
        self,
        session: ProxiedSession,
        verdict: Verdict,
        findings: Findings,
        now: float,
        likeness: Likeness | None,
        late: LateStacks,
    ) -> Ruling:
        """Decide on a verdict in the light of the evidence, and record it."""
        concluded = self._conclude(session, verdict, findings)
        if concluded is None or self._ignores(session, concluded.kind):
            return Ruling(None)
        if self._is_explained(session, concluded, self._docket.is_explained):
            with spared(Loss.MEMORY, session):
                self._docket.explain(session.id, verdict)
            return Ruling(None)
        known = self._known(session, concluded, now)
        if known is not None:
            self._equate(session, verdict, concluded)
            return self._repeat(session, concluded, known, now)
        self._expect_readers(session, concluded)
        ruling = self._enter(session, concluded, findings, now, likeness, late)
        if ruling.action is not None:
            self._equate(session, verdict, concluded)
        return ruling

    async def rule_surely(self, session: ProxiedSession, verdict: Verdict) -> Ruling:
        """:meth:`rule`, or if that fails, rule on the verdict by itself. Never raises but for cancellation."""
        work = self.work.begin()
        try:
            return await self._rule_surely(session, verdict)
        finally:
            self.work.end(work)

    async def _rule_surely(self, session: ProxiedSession, verdict: Verdict) -> Ruling:
        try:
            return await self.rule(session, verdict)
        except Exception:
            note(Loss.EVIDENCE, session)
        findings, verdict = _least_known(session), _placed(session, verdict)
        concluded = None if self._ignores(session, verdict.kind) else self._conclude(session, verdict, findings)
        if concluded is None or self._ignores(session, concluded.kind):
            return Ruling(None)
        try:
            return self._enter(session, concluded, findings, time.time())
        except Exception:
            note(Loss.RECORD, session)
            return Ruling(None)

    # Those that are like one that is being looked into

    def _seen_at_once(self, session: ProxiedSession, verdict: Verdict, now: float) -> Waiting | None:
        """What can be said of a verdict without looking; ``None`` if that isn't even whether it is a fault."""
        if _is_doubtful(verdict):
            return None
        findings = _known_at_once(session, verdict)
        concluded = self._conclude(session, verdict, findings)
        return None if concluded is None else Waiting(session, verdict, concluded, findings, now)

    def _likeness(self, one: Waiting) -> Likeness | None:
        """What a fault has in common with others, so that only one of them need be looked into. Never raises.

        There is nothing unless it is to be logged, whatever comes to light.
        """
        verdict = one.verdict
        if verdict.refusal is not None:
            return verdict.refusal
        if not verdict.ends and verdict.kind not in self._rules[one.session.through].only_logged:
            return None
        if verdict.kind in _SHOWN_BY_EVIDENCE and not self._desk.is_crowded:
            return None  # each may be something else, and there is time to look
        try:
            return likeness_of(one.concluded, one.findings)
        except Exception:
            note(Loss.MEMORY, one.session)
            return None

    def _joins(self, one: Waiting, likeness: Likeness | None) -> bool:
        """Have a fault wait for one that is like it, if one is being looked into; it is counted in any case then."""
        return likeness is not None and self._alike.join(likeness, one)

    async def count_waiting(self) -> None:
        """Count the faults that were like one that has been looked into, whenever there are some; until cancelled."""
        while True:
            await self._has_uncounted.wait()
            self._has_uncounted = trio.Event()
            stint = Stint()
            while self._uncounted:
                waiting, likeness, work = self._uncounted[0]
                openers = await self._look_at_openers(waiting)
                while waiting:
                    self._count_one(waiting.popleft(), likeness, openers)
                    await stint.rest()
                self._uncounted.popleft()
                self.work.end(work)

    def count_rest(self) -> None:
        """The same at once, of all that are left as the guard ends."""
        while self._uncounted:
            waiting, likeness, work = self._uncounted.popleft()
            while waiting:
                self._count_one(waiting.popleft(), likeness, {})
            self.work.end(work)

    async def _look_at_openers(self, waiting: deque[Waiting]) -> dict[int, Process]:
        """Who has the pids by now of those who opened connections and have sent: others than then, if any do."""
        pids = {
            one.findings.opener.pid
            for one in waiting
            if one.findings.opener is not None and one.verdict.intruder is not None
        }
        found: dict[int, Process] = {}
        if self._witness is not None and pids:
            with spared(Loss.SENDER), trio.move_on_after(_OPENERS_BUDGET):
                found = await looking.look(_look_at, self._witness, sorted(pids)[:_OPENERS])
        return found

    def _count_one(self, one: Waiting, likeness: Likeness | None, openers: dict[int, Process]) -> None:
        """Count a fault that has waited for one that is like it. Never raises."""
        session, verdict, concluded, findings, at = one
        with spared(Loss.MEMORY, session):
            self._alike.release()
        with spared(Loss.RECORD, session):
            opener = findings.opener
            if verdict.refusal is not None:
                findings = _known_at_once(session, verdict)  # of who was refused more may be known by now
            elif opener is not None and opener.pid in openers:
                findings = replace(findings, senders={opener.pid: openers[opener.pid], **findings.senders})
            if self._is_explained(session, concluded, self._docket.is_explained):
                pass
            elif self._known(session, verdict, at) is not None:
                self._count_again(session, verdict, at)
            elif isinstance(likeness, Family) and self._docket.familiar(likeness) is not None:
                self._enter_familiar(one._replace(findings=findings), likeness)
            else:
                # It has been let go on, whatever the settings are by now.
                self._enter(session, concluded, findings, at, action=Action.LOGGED)
        if session.done.is_set():
            self.closed(session)

    def meet(self, session: ProxiedSession, sender: Sender | None) -> None:
        """Have a process looked at that sends for the first time, or again after a while. Doesn't wait for it.

        Over TCP, where a verdict may come long after, it may be on its way out. Whoever has been looked at before isn't
        taken for the same until that is known again: its pid may have become another's.
        """
        if self._witness is None or sender is None or not session.meets(sender.pid):
            return
        before = session.forget(sender.pid)
        if before is None:
            kernel_account = session.kernel_account
            opener = None if kernel_account is None else kernel_account.account.opener
            if kernel_account is None or (opener is not None and opener.pid == sender.pid):
                return  # it is looked at when a verdict is about it, or as the opener
        # If there are more of them than this, those are looked at that a verdict is about.
        with suppress(trio.WouldBlock):
            self._strangers_send.send_nowait((session, sender.pid, before))

    async def look_at_strangers(self, witness: Witness) -> None:
        """Look at the processes that have been met, until cancelled."""
        async for first in self._strangers:
            met = [first]
            with suppress(trio.WouldBlock):
                while True:
                    met.append(self._strangers.receive_nowait())
            pids = {pid for _, pid, _ in met}
            try:
                found = await looking.look(_look_at, witness, pids)
            except Exception:
                note(Loss.SENDER)
                continue
            for session, pid, before in met:
                process = session.senders.get(pid, found.get(pid))
                if process is not None:
                    session.remember({pid: process})
                if before is not None and (process is None or process.started != before.started):
                    with spared(Loss.MEMORY, session):
                        self._docket.forget(session.id, pid)

    async def sample(self, session: ProxiedSession) -> tuple[Sender | None, Verdict | None]:
        """Find out who has sent the request that is held of a contested session.

        Returns:
            Who, if that is known; and a verdict, if another process is seen to wait on the connection as well. Never
            raises but for cancellation.
        """
        try:
            return await self._sample(session)
        except Exception:
            note(Loss.SENDER, session)
            return None, None

    async def _sample(self, session: ProxiedSession) -> tuple[Sender | None, Verdict | None]:
        witness, opening, tracker = self._witness, session.opening, session.tracker
        if witness is None or opening is None or tracker is None or not self._sampling.has_any():
            return None, None
        began = time.monotonic()
        due = {
            (request.sender.pid, request.sender.tid)
            for request in tracker.ledger.outstanding()
            if request.sender is not None
        }
        look = partial(
            witness.sample,
            opening,
            session.sightings.holders,
            before=session.sightings.sampled_asleep,
            busy=due,
            watchers=session.sightings.watchers | session.sightings.loiterers,
            seconds=_SAMPLING_BUDGET,
        )
        with trio.move_on_after(_SAMPLING_LIMIT) as limit:
            sample, blocked = await looking.look(look, limiter=self._threads)
        self._sampling.spend(time.monotonic() - began)
        if limit.cancelled_caught:
            return None, None
        before, session.sightings.asleep = session.sightings.asleep, sample.asleep
        session.sightings.sampled_asleep = sample.asleep
        session.sightings.waits = sample.waits
        if sample.pid is not None:
            due.add((sample.pid, sample.tid))
        # Somebody whose answer another one has read goes on waiting for it, and wakes whenever there is something.
        session.sightings.loiterers = frozenset(
            one.thread
            for one in sample.waits.threads
            if due.isdisjoint({(one.thread.pid, one.thread.tid), (one.thread.pid, None)})
        )
        sender = None if sample.pid is None else Sender(sample.pid, sample.tid, sampled=True)
        found = readers(blocked, before, watchers=session.sightings.watchers, language=opening.runtime.language)
        if found is None or session.tracker is not tracker:
            return sender, None
        return sender, tracker.judge_readers(
            found.kind,
            AT_ONCE,
            intruder=found.intruder,
            requesters=found.requesters,
            pending=session.client.held,
        )

    async def is_shared(self, session: ProxiedSession) -> bool:
        """Find out whether somebody can use a connection that somebody else has ended.

        Of one that the opener has ended, or nobody knows who, that is any other process that has it open; of one that
        the server has ended, it takes two. If another process than the opener has ended it, that is a fault by itself.
        Never raises but for cancellation.
        """
        try:
            return await self._is_shared(session)
        except Exception:
            note(Loss.EVIDENCE, session)
            return False

    async def _is_shared(self, session: ProxiedSession) -> bool:
        witness, tracker = self._witness, session.afterwards
        if witness is None or tracker is None or not tracker.logged_in:
            return False  # nobody can have meant to use a connection that has never been good for anything
        await session.wait_for_opening()
        opening = session.opening
        if opening is None:
            return False
        if tracker.terminator is not None and tracker.senders.is_strange(tracker.terminator):
            return False
        since = time.monotonic()
        async with self._desk.place(Urgency.END, insist=True):
            look = partial(witness.findings, opening, since=since if self._desk.is_crowded else None)
            findings = await looking.look(look, limiter=self._threads)
        others = heirs(findings)
        if findings.opener_pid is not None and len(others) == len(findings.holders or ()):
            session.sightings.survivors = others
        return bool(others) if tracker.terminated else len(findings.holders or ()) > 1

    def lost(self, session: ProxiedSession, reason: str, now: float) -> None:
        """Record that a session is no longer followed. Never raises."""
        verdict = Verdict(kind=Kind.UNTRACKED, reason=reason, message=None, requests=())
        with spared(Loss.RECORD, session):
            self._enter(session, verdict, _known_at_once(session, verdict), now)

    async def settled(self) -> None:
        """Wait until the faults are known, counted and recorded that were being judged when this was called."""
        # A ruling leaves faults to be counted, and both leave records to be written.
        for _ in range(3):
            await trio.lowlevel.checkpoint()
            await self.work.until_done()

    def closed(self, session: ProxiedSession) -> None:
        """Account for what was suppressed of a session that has ended, and forget it. Never raises."""
        try:
            for fault in self._docket.close(session.id, at=time.time()):
                self._record(session, fault)
        except Exception:
            note(Loss.RECORD, session)

    async def settle_accounts(self) -> None:
        """Account for what was suppressed whenever it is time to; until cancelled."""
        while True:
            await trio.sleep(_SETTLING)
            for fault in self._docket.settle(at=time.time()):
                self._record(None, fault)

    async def write_what_waits(self) -> None:
        """Write the records that have waited for their stacks; until cancelled, when none waits any more."""
        await self._records.run()

    def _ignores(self, session: ProxiedSession, kind: Kind) -> bool:
        return self._action(session, kind, Severity.ERROR) is None

    def _action(self, session: ProxiedSession, kind: Kind, severity: Severity) -> Action | None:
        """What is done about a fault of a session; ``None``: nothing."""
        return _possible(self._rules[session.through].actions[kind, severity], session, kind)

    # Evidence

    async def _findings(
        self, session: ProxiedSession, verdict: Verdict, urgency: Urgency, began: float, late: LateStacks
    ) -> Findings:
        """What can be found out within the budget. What goes wrong meanwhile is left out, and changes no ruling."""
        evidence = Evidence(_known_at_once(session, verdict), late=late)
        with spared(Loss.EVIDENCE, session):
            await self._investigate(session, verdict, evidence, urgency, began)
        with spared(Loss.EVIDENCE, session):
            evidence.keep(session)
        return evidence.findings

    async def _investigate(
        self, session: ProxiedSession, verdict: Verdict, evidence: Evidence, urgency: Urgency, began: float
    ) -> None:
        if verdict.kind is Kind.LEAKED_CONNECTION:
            # It is they who have brought it about.
            holders = session.sightings.holders or None
            evidence.findings = replace(evidence.findings, holders=holders, holders_complete=False)
        witness = self._witness
        if witness is None:
            return
        if self._depends_on_the_driver(session, verdict):
            with trio.move_on_after(_DRIVER_BUDGET):
                await session.wait_for_opening()
            evidence.findings = _known_at_once(session, verdict)  # which it rests on if there is no time for a look
        counted: tuple[Counted, ...] = ()
        budget = self._evidence_budget
        if verdict.kind is Kind.CONNECTION_EXHAUSTION:
            counted = call_roll(session, verdict.refusal, self._sessions())
            budget = _ROLL_CALL_BUDGET
            for one in counted:
                one.session.ask_for_opening()  # all are looked up together
            with trio.move_on_after(budget):
                for one in counted:
                    await one.session.wait_for_opening()
        elif verdict.kind is Kind.UNCLEAN_CLOSE:
            budget = _ENDED_BUDGET
        doubtful = _is_doubtful(verdict)
        if session.connected is not None and (session.opening is None or doubtful):
            # With evidence of its own: if it comes too late, it goes on beside the next look.
            first = Evidence(evidence.findings)
            look = self._investigation(session, verdict, first, witness)
            try:
                with trio.move_on_after(_GOODBYE_BUDGET if doubtful else self._evidence_budget):
                    async with self._desk.place(urgency, insist=doubtful) as served:
                        if served:
                            look.begin(began if self._desk.is_crowded else None)
                            await self._look(look.look_at_named, self._threads)
            finally:
                evidence.findings, evidence.met = first.findings, dict(first.met)
        investigation = self._investigation(session, verdict, evidence, witness, counted)
        waits = verdict.kind is Kind.UNCLEAN_CLOSE
        desk, threads = (self._waiting_desk, self._waiting_threads) if waits else (self._desk, self._threads)
        # Whether it is a fault at all shows only now.
        insist = doubtful and (session.connected is None or verdict.intruder is None)
        with trio.move_on_after(budget if urgency is Urgency.MESSAGE else _PATIENCE) as limit:
            if session.opening is None:
                await session.wait_for_opening()
                investigation.note_known()
            async with desk.place(urgency, insist=insist) as served:
                if served and (insist or self._evidence.has_any()):
                    limit.deadline = min(limit.deadline, trio.current_time() + budget)
                    investigation.begin(began if desk.is_crowded else None, stacks=self._stacks.has_any())
                    await self._look(investigation.investigate, threads, evidence.late)

    def _investigation(
        self,
        session: ProxiedSession,
        verdict: Verdict,
        evidence: Evidence,
        witness: Witness,
        counted: tuple[Counted, ...] = (),
    ) -> Investigation:
        return Investigation(
            witness,
            session,
            verdict,
            evidence,
            counted,
            self._evidence_budget,
            docket=self._docket,
            account=self._taken_by_stacks.append,
        )

    def _depends_on_the_driver(self, session: ProxiedSession, verdict: Verdict) -> bool:
        """Whether a session is to be ended unless its driver, which isn't known yet, may do what it did."""
        if verdict.kind is not Kind.REQUEST_WHILE_BUSY or session.opening is not None:
            return False
        grave, mild = (self._action(session, verdict.kind, one) for one in (Severity.ERROR, Severity.WARNING))
        return grave is Action.REJECTED and mild is not Action.REJECTED

    async def _look(
        self, look: Callable[[], None], threads: trio.CapacityLimiter, late: LateStacks | None = None
    ) -> None:
        """Have a worker thread look at something, and account for what that takes. Given up, it goes on by itself."""

        def run() -> None:
            try:
                _, seconds = timed(look)
                self._taken.append(seconds)
            finally:
                if late is not None:
                    late.end()

        if late is not None:
            late.threads = threads
        try:
            await looking.look(run, limiter=threads)
        finally:
            while self._taken_by_stacks:
                self._stacks.spend(self._taken_by_stacks.popleft())
            while self._taken:
                self._evidence.spend(self._taken.popleft())

    # Rulings and records

    def _known(self, session: ProxiedSession, verdict: Verdict, now: float) -> Fault | None:
        """The first record of a fault that has been recorded."""
        try:
            return self._docket.known(session.id, verdict, at=now)
        except Exception:
            note(Loss.MEMORY, session)
            return None

    def _is_explained(
        self, session: ProxiedSession, verdict: Verdict, by_docket: Callable[[int, Verdict], bool]
    ) -> bool:
        """Whether there is no need to tell of such a fault, nor to do anything about it, as another one explains it."""
        is_explained = False
        with spared(Loss.MEMORY, session):
            is_explained = by_docket(session.id, verdict)
        actions = {self._action(session, verdict.kind, severity) for severity in Severity}
        return is_explained and actions <= {None, Action.LOGGED}

    def _is_familiar(self, one: Waiting) -> bool:
        """Deal with a fault that is news of its session, and of a cause that has been recorded.

        Returns True if it can be told without evidence that it is, and the fault is logged: its message is then to be
        forwarded. Never raises.
        """
        if one.verdict.kind in _SHOWN_BY_EVIDENCE or one.verdict.refusal is not None:
            return False
        try:
            family = family_of(one.concluded, one.findings)
            if family is None or self._docket.familiar(family) is None:
                return False
            if self._action(one.session, family.kind, family.severity) is not Action.LOGGED:
                return False
            self._enter_familiar(one, family)
        except Exception:
            note(Loss.MEMORY, one.session)
            return False
        return True

    def _enter_familiar(self, one: Waiting, family: Family) -> None:
        """Take note of a fault of a cause that has been recorded. Raises what the docket does, and nothing is noted."""
        session, verdict, concluded, findings, at = one
        instance = partial(self._instance, session, verdict, findings)
        record = self._docket.enter_familiar(session.id, concluded, family, at=at, instance=instance)
        self._expect_readers(session, concluded)
        self._equate(session, verdict, concluded)
        self._record(session, record)

    @staticmethod
    def _expect_readers(session: ProxiedSession, verdict: Verdict) -> None:
        """Several read from a connection that several use."""
        if verdict.kind in _BY_SEVERAL and session.tracker is not None:
            with spared(Loss.STEP, session):
                session.tracker.expect_readers()

    def _instance(self, session: ProxiedSession, verdict: Verdict, findings: Findings | None) -> Instance:
        """What the record of a repeat says of itself, by what was known then, or is known by now. Never raises."""
        try:
            if findings is None:
                findings = _known_at_once(session, verdict)
            concluded = self._conclude(session, verdict, findings) or verdict
            return build_instance(concluded, _facts(session), findings, sql_mode=self._sql_mode)
        except Exception:
            note(Loss.RECORD, session)
            return plain_instance(verdict, _facts(session))

    def _equate(self, session: ProxiedSession, verdict: Verdict, concluded: Verdict) -> None:
        """Know a fault by what the session core has said as well."""
        with spared(Loss.MEMORY, session):
            self._docket.equate(session.id, verdict, concluded)

    @staticmethod
    def _conclude(session: ProxiedSession, verdict: Verdict, findings: Findings) -> Verdict | None:
        """What the verdict is in the light of the evidence; ``None`` if it is no fault."""
        try:
            return conclude(verdict, findings)
        except Exception:
            note(Loss.CONCLUSION, session)
        if _is_doubtful(verdict):
            return None
        if verdict.intruder is not None and verdict.intruder.pid == findings.opener_pid:
            return replace(verdict, intruder=None, requesters=())  # not the opener, and so not known
        return verdict

    def _repeat(self, session: ProxiedSession, verdict: Verdict, known: Fault, now: float) -> Ruling:
        """Count a fault that is known once more, and do as was done then."""
        self._count_again(session, verdict, now)
        return self._ruling(session, known)

    def _count_again(self, session: ProxiedSession, verdict: Verdict, now: float) -> None:
        with spared(Loss.RECORD, session):
            # Later on their pids may be others'. Of who was refused more may be known by then.
            findings = _known_at_once(session, verdict) if verdict.refusal is None else None
            instance = partial(self._instance, session, verdict, findings)
            by_others = _is_by_others(session, verdict)
            record = self._docket.repeat(session.id, verdict, at=now, instance=instance, by_others=by_others)
            self._record(session, record)

    def _enter(
        self,
        session: ProxiedSession,
        verdict: Verdict,
        findings: Findings,
        now: float,
        likeness: Likeness | None = None,
        late: LateStacks | None = None,
        *,
        action: Action | None = None,
    ) -> Ruling:
        """Record a fault. The action is what is to be done by the settings, unless something has been done already."""
        severity = _severity(session, verdict, findings.driver)
        action = action or self._action(session, verdict.kind, severity)
        if action is None:
            return Ruling(None)
        if action is Action.REJECTED and verdict.ends:
            action = Action.LOGGED
        try:
            fault = build_fault(verdict, _facts(session), findings, at=now, action=action, sql_mode=self._sql_mode)
        except Exception:
            note(Loss.RECORD, session)
            fault = plain_fault(verdict, _facts(session), at=now, severity=severity, action=action)
        entered = Entered(fault, (fault,))
        with spared(Loss.MEMORY, session):
            entered = self._docket.enter(verdict, fault, *self._families(session, verdict, findings, likeness))
        for record in entered.records:
            is_first = record is entered.fault and record.repeat_of is None
            # Who is rejected, or waits on such a connection, is told so, and does something else.
            may_wait = is_first and record.action is not Action.REJECTED
            if may_wait and late is not None and late.are_missing:
                late.keep()
                complete = partial(self._complete, session, verdict, findings, late, self._sql_mode)
                self._records.postpone(session, record, late, complete)
            else:
                self._record(session, record)
        return self._ruling(session, entered.fault)

    def _complete(
        self,
        session: ProxiedSession,
        verdict: Verdict,
        findings: Findings,
        late: LateStacks,
        sql_mode: SqlMode,
        fault: Fault,
    ) -> Fault:
        """A fault with the stacks that have come since it was entered."""
        findings = replace(findings, stacks=late.added_to(findings.stacks))
        facts = _facts(session)
        again = build_fault(verdict, facts, findings, at=fault.at, action=fault.action, sql_mode=sql_mode)
        fault = replace(fault, culprits=again.culprits, place=again.place, tracing=again.tracing)
        with spared(Loss.MEMORY, session):
            self._docket.complete(fault)
        return fault

    @staticmethod
    def _families(
        session: ProxiedSession, verdict: Verdict, findings: Findings, likeness: Likeness | None
    ) -> set[Family]:
        """What others are to be familiar by that are like a fault."""
        families = set()
        with spared(Loss.MEMORY, session):
            family = family_of(verdict, findings)
            if family is not None:
                families.add(family)
        # It is of another kind if the evidence has shown what those don't know that wait.
        if isinstance(likeness, Family) and likeness.kind is verdict.kind:
            families.add(likeness)
        return families

    @staticmethod
    def _ruling(session: ProxiedSession, fault: Fault) -> Ruling:
        if fault.action is not Action.REJECTED:
            return Ruling(_possible(fault.action, session, fault.kind))
        try:
            message, detail, hint = rejection(fault)
            response = build_error_response(message, sqlstate=SQLSTATE, detail=detail, hint=hint)
        except Exception:
            note(Loss.WORDS, session)
            response = _PLAIN_RESPONSE
        return Ruling(fault.action, response)

    def _record(self, session: ProxiedSession | None, fault: Fault | None) -> None:
        if fault is not None:
            self._records.put(session, fault)


def _possible(action: Action | None, session: ProxiedSession, kind: Kind) -> Action | None:
    """What can be done: whoever says Terminate on a TLS session has ended that, too, and nothing keeps it alive."""
    is_over = kind is Kind.FOREIGN_TERMINATE and session.is_encrypted
    return Action.LOGGED if action is Action.DROPPED and is_over else action


class _Rules(NamedTuple):
    """A policy, worked out."""

    actions: Mapping[tuple[Kind, Severity], Action | None]
    """What is done about which fault; ``None``: nothing."""
    only_logged: frozenset[Kind]

    @classmethod
    def of(cls, policy: Policy) -> _Rules:
        actions = {(kind, severity): policy.decide(kind, severity) for kind in Kind for severity in Severity}
        return cls(actions, _only_logged(actions))


def _placed(session: ProxiedSession, verdict: Verdict) -> Verdict:
    """A verdict that says of which server's limit it is, if it is about one and there are several."""
    refusal = verdict.refusal
    if refusal is None or refusal.server == session.through:
        return verdict
    return replace(verdict, refusal=refusal._replace(server=session.through))


def _only_logged(actions: Mapping[tuple[Kind, Severity], Action | None]) -> frozenset[Kind]:
    """The kinds of verdicts about which nothing is done but that they are recorded, whatever evidence makes of them."""
    logged = {kind for kind in Kind if {actions[kind, severity] for severity in Severity} <= {None, Action.LOGGED}}
    return frozenset(logged if logged >= _BY_SEVERAL else logged - {Kind.REQUEST_WHILE_BUSY})


def _severity(session: ProxiedSession, verdict: Verdict, driver: Driver) -> Severity:
    """How grave a fault is; where that can't be told of this one, as its kind is, or could be at least."""
    try:
        return severity_of(verdict, driver)
    except Exception:
        note(Loss.CONCLUSION, session)
        return Severity.WARNING if verdict.kind is Kind.REQUEST_WHILE_BUSY else CATALOGUE[verdict.kind].severity


def _least_known(session: ProxiedSession) -> Findings:
    try:
        return Findings(connected=session.connected)
    except Exception:
        note(Loss.OPENER, session)
        return Findings()


def _known_at_once(session: ProxiedSession, verdict: Verdict) -> Findings:
    try:
        return known_at_once(session, verdict)
    except Exception:
        note(Loss.EVIDENCE, session)
        return _least_known(session)


def _is_by_others(session: ProxiedSession, verdict: Verdict) -> bool:
    """Whether a fault that is known may be by others this time: a pid that comes back may be another process's."""
    senders = (verdict.intruder, *verdict.requesters)
    return any(one is not None and not one.sampled and one.pid not in session.senders for one in senders)


def _facts(session: ProxiedSession) -> SessionFacts:
    """What records say of a session, or as much of it as can be said in any case."""
    try:
        return session.facts()
    except Exception:
        note(Loss.RECORD, session)
        return SessionFacts(
            id=session.id,
            user=None,
            database=None,
            application_name=None,
            transport=session.transport,
            client=session.client_name,
            backend_pid=None,
            opened_at=session.opened_at,
            tls=session.is_encrypted,
            through=session.through,
        )


def _look_at(witness: Witness, pids: Iterable[int]) -> dict[int, Process]:
    """Look at processes, in a worker thread; those that are gone are left out."""
    found = {}
    for pid in pids:
        with spared(Loss.SENDER):
            process = witness.sender(pid)
            if process is not None:
                found[pid] = process
    return found
