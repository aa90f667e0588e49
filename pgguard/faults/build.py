"""From a verdict, and what attribution found out about it, to a fault.

Who is a culprit in which role:

``intruder``
    The sender of the offending message, as the kernel named it. Where it named nobody but the client sent the message:
    the one process that has the socket open, if there is exactly one; otherwise an intruder without a pid, and the
    holders say among whom to look.
``requester``
    Every other process that has sent on the connection, the one whose turn it was first.
``closer``
    Of a connection that ended without Terminate. The end of a stream has no sender, and it is the *last* process with
    the socket open that brings it about, so one is named only if no second process is known to have opened, used or
    held the connection: by ``sole-holder`` if the holders are this process alone, otherwise by what ties it to the
    connection as its opener, or as the only sender. With two processes or none there is no closer: they stand in
    their other roles.
``owner``
    The process that opened the connection.
``holder``
    Every process that has the socket open and doesn't stand above as intruder, closer or requester. An owner that
    still has it open is a holder as well: that is what a fork looks like.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pgguard.attribution.evidence import Evidence, Findings, Process
from pgguard.faults.catalogue import CATALOGUE, severity_of
from pgguard.faults.fault import Culprit, Fault, Request, Role
from pgguard.faults.sql import SqlMode, sql_text
from pgguard.faults.text import listed, named, printable
from pgguard.session.verdicts import Direction, Kind, RequestState, Sender, Verdict

if TYPE_CHECKING:
    from pgguard.faults.catalogue import Advice
    from pgguard.faults.fault import SessionFacts
    from pgguard.faults.policy import Action
    from pgguard.session.verdicts import RequestSeen

OUTSTANDING: Final = frozenset({RequestState.WAITING, RequestState.ANSWERING})
"""The states of a request that the server still owes an answer to."""


def build_fault(
    verdict: Verdict,
    facts: SessionFacts,
    findings: Findings,
    *,
    fault_id: int,
    at: float,
    action: Action,
    sql_mode: SqlMode,
) -> Fault:
    """The full record of a fault.

    Args:
        verdict: What the session core says.
        facts: The session that it says it of.
        findings: What attribution knows about the session's client at this moment.
        fault_id: The record's number.
        at: Seconds since the epoch.
        action: What is being done about it.
        sql_mode: How SQL text may appear.
    """
    known = _known_processes(findings)
    culprits = _culprits(verdict, findings, known)
    return Fault(
        id=fault_id,
        at=at,
        kind=verdict.kind,
        severity=severity_of(verdict, findings.driver),
        action=action,
        repeat_of=None,
        suppressed=0,
        summary=printable(_summary(verdict, findings, culprits)),
        reason=printable(verdict.reason),
        session=facts,
        message=verdict.message,
        libpq=verdict.libpq,
        culprits=culprits,
        requests=tuple(_request(request, sql_mode) for request in verdict.requests),
        advice=_advice(verdict, findings),
    )


def _advice(verdict: Verdict, findings: Findings) -> Advice:
    """Where requests overlap and several processes have the socket open, it is they who are to be kept apart."""
    shared = verdict.kind is Kind.REQUEST_WHILE_BUSY and len(findings.holders or ()) > 1
    return CATALOGUE[Kind.SHARED_BY_PROCESSES if shared else verdict.kind].advice


def _request(seen: RequestSeen, sql_mode: SqlMode) -> Request:
    pid, tid = seen.sender or (None, None)
    return Request(
        n=seen.n,
        at=seen.at,
        messages=seen.messages,
        sql=sql_text(seen.sql, sql_mode, cut=seen.sql_cut),
        pid=pid,
        tid=tid,
        state=seen.state,
    )


def _known_processes(findings: Findings) -> dict[int, Process]:
    """Every process that was looked at, by pid.

    Should a pid have been reused, the present process wins over the remembered opener.
    """
    known: dict[int, Process] = {}
    if findings.opener is not None:
        known[findings.opener.pid] = findings.opener
    known.update((process.pid, process) for process in findings.holders or ())
    known.update(findings.senders)
    return known


def _culprits(verdict: Verdict, findings: Findings, known: dict[int, Process]) -> tuple[Culprit, ...]:
    def sent(role: Role, sender: Sender) -> Culprit:
        return Culprit(role, sender.pid, sender.tid, Evidence.KERNEL_SENDER, known.get(sender.pid))

    holders = findings.holders or ()
    culprits: list[Culprit] = []
    requesters = list(verdict.requesters)
    if verdict.kind is Kind.UNCLEAN_CLOSE:
        closer = _closer(verdict, findings, known)
        if closer is not None:
            culprits.append(closer)
        elif verdict.intruder is not None:
            # The last to send, which need not have been the last to close.
            requesters.insert(0, verdict.intruder)
    elif verdict.intruder is not None:
        culprits.append(sent(Role.INTRUDER, verdict.intruder))
    elif _client_did_it(verdict):
        if len(holders) == 1:
            culprits.append(Culprit(Role.INTRUDER, holders[0].pid, None, Evidence.SOLE_HOLDER, holders[0]))
        else:
            culprits.append(Culprit(Role.INTRUDER, None, None, Evidence.UNKNOWN, None))
    culprits.extend(sent(Role.REQUESTER, sender) for sender in dict.fromkeys(requesters))
    active = {culprit.pid for culprit in culprits}
    if findings.opener is not None:
        culprits.append(Culprit(Role.OWNER, findings.opener.pid, None, findings.opener_evidence, findings.opener))
    evidence = Evidence.SOLE_HOLDER if len(holders) == 1 else Evidence.SOCKET_HOLDER
    culprits.extend(
        Culprit(Role.HOLDER, holder.pid, None, evidence, holder) for holder in holders if holder.pid not in active
    )
    return tuple(culprits)


def _client_did_it(verdict: Verdict) -> bool:
    return verdict.message is not None and verdict.message.direction is Direction.FRONTEND


def _closer(verdict: Verdict, findings: Findings, known: dict[int, Process]) -> Culprit | None:
    pids = set(known) | {sender.pid for sender in verdict.requesters}
    pids.update(request.sender.pid for request in verdict.requests if request.sender is not None)
    if verdict.intruder is not None:
        pids.add(verdict.intruder.pid)
    if len(pids) != 1:
        return None
    pid = pids.pop()
    if findings.holders is not None and len(findings.holders) == 1:
        evidence = Evidence.SOLE_HOLDER
    elif findings.opener is not None and findings.opener.pid == pid:
        evidence = findings.opener_evidence
    else:
        evidence = Evidence.KERNEL_SENDER
    return Culprit(Role.CLOSER, pid, None, evidence, known.get(pid))


# The summary


def _summary(verdict: Verdict, findings: Findings, culprits: tuple[Culprit, ...]) -> str:
    match verdict.kind:
        case Kind.SHARED_BY_PROCESSES:
            return _used_out_of_turn(verdict, culprits)
        case Kind.INHERITED_CONNECTION if verdict.intruder is not None:
            return _used_out_of_turn(verdict, culprits)
        case Kind.INHERITED_CONNECTION:
            return _inherited(findings)
        case Kind.REQUEST_WHILE_BUSY:
            busy = next((request.n for request in verdict.requests if request.state in OUTSTANDING), None)
            last = "its last request" if busy is None else f"request {busy}"
            who = _who(culprits)
            if culprits and culprits[0].pid is None and len(findings.holders or ()) > 1:
                pids = listed([str(holder.pid) for holder in findings.holders or ()])
                who = f"one of the processes {pids}, which share the connection,"
            return f"{who} sent {_message(verdict)} before the answer to {last} was complete"
        case Kind.UNCLEAN_CLOSE:
            return _closed(verdict, findings, culprits)
        case Kind.PROTOCOL_VIOLATION if verdict.intruder is not None:
            return f"{_who(culprits)}: {verdict.reason}"
        case _:
            return verdict.reason


def _message(verdict: Verdict) -> str:
    return "bytes" if verdict.message is None else verdict.message.name


def _who(culprits: tuple[Culprit, ...]) -> str:
    """The intruder, or whichever stands first, or ``the client``."""
    first = culprits[0] if culprits else None
    return "the client" if first is None or first.pid is None else named(first.pid, first.process)


def _used_out_of_turn(verdict: Verdict, culprits: tuple[Culprit, ...]) -> str:
    # The reason says "another process" of the one whose turn it was, which is the first requester.
    reason = verdict.reason
    if verdict.requesters:
        reason = reason.replace("another process", f"pid {verdict.requesters[0].pid}")
    return f"{_who(culprits)} sent {_message(verdict)} {reason}"


def _inherited(findings: Findings) -> str:
    opener = findings.opener
    heirs = [h for h in findings.holders or () if opener is None or h.pid != opener.pid]
    if not heirs:
        return "more than one process has the connection's socket open"
    names = listed([named(h.pid, h) for h in heirs])
    have = "has" if len(heirs) == 1 else "have"
    if opener is None:
        return f"{names} {have} one connection's socket open"
    return f"{names} {have} the connection open that {named(opener.pid, opener)} opened"


def _closed(verdict: Verdict, findings: Findings, culprits: tuple[Culprit, ...]) -> str:
    when = verdict.reason.partition(", ")[2]
    if culprits and culprits[0].role is Role.CLOSER:
        return f"{_who(culprits)} closed its connection without Terminate, {when}"
    if findings.opener is not None:
        owner = named(findings.opener.pid, findings.opener)
        return f"the connection that {owner} opened ended without Terminate, {when}"
    return f"the client's side ended without Terminate, {when}"
