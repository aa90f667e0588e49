"""From a verdict to a ruling: evidence, fault, policy, record.

The session in question is parked meanwhile, and it alone. What evidence can't be had within the budget is left out of
the record; whatever fails here, the session gets its bytes.
"""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import trio

from pgguard.attribution.evidence import Findings
from pgguard.faults.build import build_fault
from pgguard.faults.catalogue import severity_of
from pgguard.faults.policy import Action, KindAction, Policy
from pgguard.faults.rejection import SQLSTATE, rejection
from pgguard.session.verdicts import Kind, Verdict
from pgguard.wire.fields import build_error_response

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pgguard.attribution.witness import Witness
    from pgguard.faults.docket import Docket
    from pgguard.faults.fault import Fault
    from pgguard.faults.sql import SqlMode
    from pgguard.proxy.session import ProxiedSession
    from pgguard.reporting.sinks import Fanout

EVIDENCE_BUDGET: Final = 0.05
"""Seconds for which a session may be parked while evidence is taken."""
_INVESTIGATIONS: Final = 4
"""Threads that take evidence at the same time."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ruling:
    """What is to be done with the message that a verdict is about."""

    action: Action | None
    """``None``: the configuration ignores it."""
    response: bytes | None = None
    """The ErrorResponse for a client that is rejected."""


@dataclass(slots=True)
class _Evidence:
    """What an investigation has found so far; read whole by whoever stops waiting for it."""

    findings: Findings = field(default_factory=Findings)


class Judge:
    """Rules on verdicts and has the faults recorded, one record before the ruling is out.

    Args:
        policy: what is done about which fault.
        sql_mode: how SQL text appears in records.
        docket: numbers, counts, and knows repeats.
        sinks: where records go.
        witness: attribution; ``None`` when it is off.
    """

    def __init__(
        self, *, policy: Policy, sql_mode: SqlMode, docket: Docket, sinks: Fanout, witness: Witness | None
    ) -> None:
        self._policy = policy
        self._sql_mode = sql_mode
        self._docket = docket
        self._sinks = sinks
        self._witness = witness
        self._threads = trio.CapacityLimiter(_INVESTIGATIONS)

    def is_repeat(self, session: ProxiedSession, verdict: Verdict, now: float) -> bool:
        """Deal with a verdict for which the session needn't be parked: it is ignored, or logged and known.

        Returns True if that was so; the message is then to be forwarded. Never raises.
        """
        if self._ignores(verdict.kind):
            return True
        known = self._docket.known(session.id, verdict)
        if known is None or known.action is not Action.LOGGED:
            return False
        with self._spared(session):
            self._record(self._docket.repeat(session.id, verdict, at=now))
        return True

    async def rule(self, session: ProxiedSession, verdict: Verdict) -> Ruling:
        """Take evidence, decide, record. Never raises but for cancellation."""
        if self._ignores(verdict.kind):
            return Ruling(None)
        now = time.time()
        try:
            known = self._docket.known(session.id, verdict)
            if known is not None:
                self._record(self._docket.repeat(session.id, verdict, at=now))
                return self._ruling(known)
            findings = await self._findings(session, verdict)
            return self._enter(session, verdict, findings, now)
        except Exception:
            logger.exception("session %d: a verdict of %s could not be ruled on", session.id, verdict.kind)
            return Ruling(Action.LOGGED)

    async def inherited(self, session: ProxiedSession, heirs: int) -> None:
        """Record that several processes have a session's socket open, whether or not they use it."""
        tracker = session.protocol
        verdict = Verdict(
            kind=Kind.INHERITED_CONNECTION,
            reason=f"{heirs} processes have the connection's socket open",
            message=None,
            requests=() if tracker is None else tracker.requests_seen(),
        )
        if self._ignores(verdict.kind):
            return
        findings = await self._findings(session, verdict)
        if findings.holders is not None and len(findings.holders) > 1:
            self._enter(session, verdict, findings, time.time())

    def lost(self, session: ProxiedSession, reason: str, now: float) -> None:
        """Record that a session is no longer followed. Never raises."""
        verdict = Verdict(kind=Kind.UNTRACKED, reason=reason, message=None, requests=())
        with self._spared(session):
            self._enter(session, verdict, _at_once(session), now)

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
        evidence = _Evidence(_at_once(session))
        witness = self._witness
        if witness is None:
            return evidence.findings
        with trio.move_on_after(EVIDENCE_BUDGET):
            if session.opening is None:
                await session.opening_known.wait()
                evidence.findings = _at_once(session)
            await trio.to_thread.run_sync(
                _investigate, witness, session, verdict, evidence, limiter=self._threads, abandon_on_cancel=True
            )
        return evidence.findings

    # Rulings and records

    def _enter(self, session: ProxiedSession, verdict: Verdict, findings: Findings, now: float) -> Ruling:
        action = self._policy.decide(verdict.kind, severity_of(verdict, findings.driver))
        if action is None:
            return Ruling(None)
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


def _investigate(witness: Witness, session: ProxiedSession, verdict: Verdict, evidence: _Evidence) -> None:
    """Look at the processes that sent, then at all that have the socket open; in a worker thread.

    Who sent comes first, being quick, so that it is there even if the holders come too late.
    """
    senders = [verdict.intruder, *verdict.requesters]
    for sender in senders:
        if sender is not None and sender.pid not in session.senders:
            process = witness.sender(sender.pid)
            if process is not None:
                session.senders[sender.pid] = process
    opening = session.opening
    if opening is None:
        return
    evidence.findings = _at_once(session)
    evidence.findings = witness.findings(opening, tuple(session.senders.values()))


def _at_once(session: ProxiedSession) -> Findings:
    """What is known without looking."""
    senders = dict(session.senders)
    opening = session.opening
    if opening is None:
        return Findings(senders=senders)
    return Findings(opener=opening.opener, opener_evidence=opening.evidence, senders=senders, driver=opening.driver)
