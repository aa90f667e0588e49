"""From a verdict to a ruling: evidence, fault, policy, record.

What the verdict is about is held meanwhile, and nothing else. What evidence can't be had within the budget is left out
of the record; whatever fails here, the session gets its bytes.
"""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from pgguard.faults.build import build_fault, build_instance
from pgguard.faults.catalogue import severity_of
from pgguard.faults.conclude import AT_ONCE, conclude, heirs, readers
from pgguard.faults.policy import Action, KindAction, Policy
from pgguard.faults.rejection import SQLSTATE, rejection
from pgguard.proxy.investigation import EVIDENCE_BUDGET, Evidence, Investigation, known_at_once
from pgguard.proxy.rollcall import call_roll
from pgguard.session.verdicts import AFTER_END, Kind, Sender, Verdict
from pgguard.wire.fields import build_error_response

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pgguard.attribution.evidence import Process
    from pgguard.attribution.findings import Findings
    from pgguard.attribution.witness import Witness
    from pgguard.faults.docket import Docket
    from pgguard.faults.fault import Fault
    from pgguard.faults.sql import SqlMode
    from pgguard.proxy.rollcall import Counted
    from pgguard.proxy.session import ProxiedSession
    from pgguard.reporting.sinks import Fanout
    from pgguard.session.verdicts import Refusal

_SAMPLING_BUDGET: Final = 0.004
"""Seconds for which a request is held back until its sender is seen to wait for the answer."""
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

_STRANGERS: Final = 1024
"""Processes that may wait to be looked at."""
_INVESTIGATIONS: Final = 4
"""Threads that take evidence at the same time."""

_GOODBYE_BUDGET: Final = 1.0
"""Seconds for which a Terminate may be held until it is seen whether somebody else has the connection open.

Nobody waits for an answer to it. Looking takes a millisecond, unless the processors are busy with something else."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ruling:
    """What is to be done with the message that a verdict is about."""

    action: Action | None
    """``None``: it is no fault, or the configuration ignores it."""
    response: bytes | None = None
    """The ErrorResponse for a client that is rejected."""


class _Allowance:
    """Keeps the sampling of contested sessions from taking the processor from all others."""

    def __init__(self) -> None:
        self._left = _SAMPLING_SAVINGS
        self._at = time.monotonic()

    def has_any(self) -> bool:
        """Whether a request may be sampled now."""
        now = time.monotonic()
        self._left = min(_SAMPLING_SAVINGS, self._left + (now - self._at) * _SAMPLING_SHARE)
        self._at = now
        return self._left > 0

    def spend(self, seconds: float) -> None:
        """Account for a sample."""
        self._left -= seconds


def _is_doubtful(verdict: Verdict) -> bool:
    """Whether evidence may show that it is no fault: known or not, it is looked into then."""
    unnamed = verdict.intruder is None and verdict.reason == AFTER_END
    return verdict.kind is Kind.FOREIGN_TERMINATE or unnamed


class Judge:
    """Rules on verdicts and has the faults recorded, one record before the ruling is out.

    Args:
        policy: what is done about which fault.
        sql_mode: how SQL text appears in records.
        docket: numbers, counts, and knows repeats.
        sinks: where records go.
        witness: attribution; ``None`` when it is off.
        sessions: the sessions that are open.
    """

    def __init__(
        self,
        *,
        policy: Policy,
        sql_mode: SqlMode,
        docket: Docket,
        sinks: Fanout,
        witness: Witness | None,
        sessions: Callable[[], Iterable[ProxiedSession]],
    ) -> None:
        self._policy = policy
        self._sql_mode = sql_mode
        self._docket = docket
        self._sinks = sinks
        self._witness = witness
        self._sessions = sessions
        self._threads = trio.CapacityLimiter(_INVESTIGATIONS)
        # They wait for processes to end, and must not keep anybody waiting who is in a hurry.
        self._waiting_threads = trio.CapacityLimiter(_INVESTIGATIONS)
        self._allowance = _Allowance()
        self._strangers_send, self._strangers = trio.open_memory_channel[tuple["ProxiedSession", int]](_STRANGERS)
        self._refusals: dict[Refusal, list[tuple[ProxiedSession, Verdict]]] = {}
        """By what is being looked into, the sessions that have been refused for the same reason meanwhile."""

    def is_repeat(self, session: ProxiedSession, verdict: Verdict, now: float) -> bool:
        """Deal with a verdict for which nothing needs to be held: it is ignored, or logged and known.

        Returns True if that was so; the message is then to be forwarded. Never raises.
        """
        if self._ignores(verdict.kind):
            return True
        if _is_doubtful(verdict):
            return False
        if verdict.refusal is not None and verdict.refusal in self._refusals:
            self._refusals[verdict.refusal].append((session, verdict))
            return True
        known = self._docket.known(session.id, verdict, at=now)
        if known is None or known.action is not Action.LOGGED:
            if verdict.refusal is not None:
                self._refusals[verdict.refusal] = []
            return False
        with self._spared(session):
            self._count_again(session, verdict, now)
        return True

    async def rule(self, session: ProxiedSession, verdict: Verdict) -> Ruling:
        """Take evidence, decide, record. Never raises but for cancellation."""
        if self._ignores(verdict.kind):
            return Ruling(None)
        now = time.time()
        try:
            if not _is_doubtful(verdict) and self._docket.known(session.id, verdict, at=now) is not None:
                return self._repeat(session, verdict, now)
            findings = await self._findings(session, verdict)
            concluded = conclude(verdict, findings)
            if concluded is None or self._ignores(concluded.kind):
                return Ruling(None)
            if self._docket.known(session.id, concluded, at=now) is not None:
                self._record(self._docket.equate(session.id, verdict, concluded, at=now))
                return self._repeat(session, concluded, now)
            if concluded.kind in _BY_SEVERAL and session.tracker is not None:
                session.tracker.expect_readers()
            ruling = self._enter(session, concluded, findings, now)
            if ruling.action is not None:
                self._record(self._docket.equate(session.id, verdict, concluded, at=now))
        except Exception:
            logger.exception("session %d: a verdict of %s could not be ruled on", session.id, verdict.kind)
            return Ruling(Action.LOGGED)
        finally:
            if verdict.refusal is not None:
                self._count_meanwhile(verdict.refusal)
        return ruling

    def _count_meanwhile(self, refusal: Refusal) -> None:
        """Count the sessions that were refused while the first one was looked into."""
        now = time.time()
        for session, verdict in self._refusals.pop(refusal, ()):
            with self._spared(session):
                if self._docket.known(session.id, verdict, at=now) is not None:
                    self._count_again(session, verdict, now)

    def meet(self, session: ProxiedSession, sender: Sender | None) -> None:
        """Have a process looked at that sends for the first time: it may be on its way out. Doesn't wait for it."""
        kernel_account = session.kernel_account
        if self._witness is None or sender is None or kernel_account is None or not session.meets(sender.pid):
            return
        opener = kernel_account.account.opener
        if opener is not None and opener.pid == sender.pid:
            return  # it is looked at as such
        # If there are more of them than this, those are looked at that a verdict is about.
        with suppress(trio.WouldBlock):
            self._strangers_send.send_nowait((session, sender.pid))

    async def look_at_strangers(self, witness: Witness) -> None:
        """Look at the processes that have been met, until cancelled."""
        async for first in self._strangers:
            met = [first]
            with suppress(trio.WouldBlock):
                while True:
                    met.append(self._strangers.receive_nowait())
            pids = {pid for _, pid in met}
            try:
                found = await trio.to_thread.run_sync(_look_at, witness, pids, abandon_on_cancel=True)
            except Exception:
                logger.exception("who sends could not be looked at")
                continue
            for session, pid in met:
                if pid in found and pid not in session.senders:
                    session.remember({pid: found[pid]})

    async def sample(self, session: ProxiedSession) -> Verdict | None:
        """Find out who has sent the request that is held of a contested session: the sender at its client's end.

        Returns:
            A verdict, if another process is seen to wait on the connection as well. Never raises but for cancellation.
        """
        session.client.sender = None
        witness, opening, tracker = self._witness, session.opening, session.tracker
        if witness is None or opening is None or tracker is None or not self._allowance.has_any():
            return None
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
        try:
            with trio.move_on_after(EVIDENCE_BUDGET) as limit:
                sample, blocked = await trio.to_thread.run_sync(look, limiter=self._threads, abandon_on_cancel=True)
        except Exception:
            logger.exception("session %d: who has sent could not be found out", session.id)
            return None
        self._allowance.spend(time.monotonic() - began)
        if limit.cancelled_caught:
            return None
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
        if sample.pid is not None:
            session.client.sender = Sender(sample.pid, sample.tid, sampled=True)
        found = readers(blocked, before, watchers=session.sightings.watchers, language=opening.runtime.language)
        if found is None or session.tracker is not tracker:
            return None
        return tracker.judge_readers(
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
        witness, tracker = self._witness, session.afterwards
        if witness is None or tracker is None:
            return False
        await session.opening_known.wait()
        opening = session.opening
        if opening is None:
            return False
        if tracker.terminator is not None and tracker.senders.is_strange(tracker.terminator):
            return False
        try:
            findings = await trio.to_thread.run_sync(
                witness.findings, opening, limiter=self._threads, abandon_on_cancel=True
            )
        except Exception:
            logger.exception("session %d: who has it open could not be found out", session.id)
            return False
        others = heirs(findings)
        if findings.opener_pid is not None and len(others) == len(findings.holders or ()):
            session.sightings.survivors = others
        return bool(others) if tracker.terminated else len(findings.holders or ()) > 1

    def lost(self, session: ProxiedSession, reason: str, now: float) -> None:
        """Record that a session is no longer followed. Never raises."""
        verdict = Verdict(kind=Kind.UNTRACKED, reason=reason, message=None, requests=())
        with self._spared(session):
            self._enter(session, verdict, known_at_once(session), now)

    def closed(self, session: ProxiedSession) -> None:
        """Account for what was suppressed of a session that has ended, and forget it. Never raises."""
        with self._spared(session):
            for fault in self._docket.close(session.id, at=time.time()):
                self._record(fault)

    @staticmethod
    @contextmanager
    def _spared(session: ProxiedSession) -> Iterator[None]:
        """What goes wrong with a record is no affair of its session's."""
        try:
            yield
        except Exception:
            logger.exception("session %d: a fault could not be recorded", session.id)

    def _ignores(self, kind: Kind) -> bool:
        return self._policy.per_kind.get(kind) is KindAction.IGNORE

    # Evidence

    async def _findings(self, session: ProxiedSession, verdict: Verdict) -> Findings:
        """What can be found out within the budget. What goes wrong meanwhile is left out, and changes no ruling."""
        evidence = Evidence(known_at_once(session))
        try:
            await self._investigate(session, verdict, evidence)
        except Exception:
            logger.exception("session %d: evidence of %s could not be taken", session.id, verdict.kind)
        evidence.keep(session)
        return evidence.findings

    async def _investigate(self, session: ProxiedSession, verdict: Verdict, evidence: Evidence) -> None:
        if verdict.kind is Kind.LEAKED_CONNECTION:
            # It is they who have brought it about.
            holders = session.sightings.holders or None
            evidence.findings = replace(evidence.findings, holders=holders, holders_complete=False)
        witness = self._witness
        if witness is None:
            return
        counted: tuple[Counted, ...] = ()
        budget = EVIDENCE_BUDGET
        if verdict.kind is Kind.CONNECTION_EXHAUSTION:
            counted = call_roll(session, verdict.refusal, self._sessions())
            budget = _ROLL_CALL_BUDGET
            with trio.move_on_after(budget):
                for one in counted:
                    await one.session.opening_known.wait()
        elif verdict.kind is Kind.UNCLEAN_CLOSE:
            budget = _ENDED_BUDGET
        threads = self._threads if verdict.kind is not Kind.UNCLEAN_CLOSE else self._waiting_threads
        doubtful = _is_doubtful(verdict)
        if session.connected is not None and (session.opening is None or doubtful):
            # With evidence of its own: if it comes too late, it goes on beside the next look.
            first = Evidence(evidence.findings)
            look = Investigation(witness, session, verdict, first, counted).look_at_named
            try:
                with trio.move_on_after(_GOODBYE_BUDGET if doubtful else EVIDENCE_BUDGET):
                    await trio.to_thread.run_sync(look, limiter=self._threads, abandon_on_cancel=True)
            finally:
                evidence.findings, evidence.met = first.findings, dict(first.met)
        investigation = Investigation(witness, session, verdict, evidence, counted)
        with trio.move_on_after(budget):
            if session.opening is None:
                await session.opening_known.wait()
                investigation.note_known()
            await trio.to_thread.run_sync(investigation.run, limiter=threads, abandon_on_cancel=True)

    # Rulings and records

    def _repeat(self, session: ProxiedSession, verdict: Verdict, now: float) -> Ruling:
        """Count a fault that is known once more, and do as was done then."""
        known = self._docket.known(session.id, verdict, at=now)
        self._count_again(session, verdict, now)
        return Ruling(None) if known is None else self._ruling(known)

    def _count_again(self, session: ProxiedSession, verdict: Verdict, now: float) -> None:
        instance = None
        if verdict.refusal is not None:
            instance = build_instance(verdict, session.facts(), known_at_once(session))
        self._record(self._docket.repeat(session.id, verdict, at=now, instance=instance))

    def _enter(self, session: ProxiedSession, verdict: Verdict, findings: Findings, now: float) -> Ruling:
        action = self._policy.decide(verdict.kind, severity_of(verdict, findings.driver))
        if action is None:
            return Ruling(None)
        if action is Action.REJECTED and verdict.ends:
            action = Action.LOGGED
        fault = build_fault(
            verdict,
            session.facts(),
            findings,
            fault_id=self._docket.next_id(),
            at=now,
            action=action,
            sql_mode=self._sql_mode,
        )
        forgotten = self._docket.enter(verdict, fault)
        self._record(forgotten)
        self._record(fault)
        return self._ruling(fault)

    @staticmethod
    def _ruling(fault: Fault) -> Ruling:
        if fault.action is not Action.REJECTED:
            return Ruling(fault.action)
        message, detail, hint = rejection(fault)
        return Ruling(fault.action, build_error_response(message, sqlstate=SQLSTATE, detail=detail, hint=hint))

    def _record(self, fault: Fault | None) -> None:
        if fault is not None:
            self._sinks.record(fault)


def _look_at(witness: Witness, pids: Iterable[int]) -> dict[int, Process]:
    """Look at processes, in a worker thread; those that are gone are left out."""
    return {pid: process for pid in pids if (process := witness.sender(pid)) is not None}
