"""From a verdict, and what attribution found out about it, to a fault; who it is about is said by :mod:`.culprits`.

Here other people's text passes from what is known to what is told, and leaves its secrets behind: SQL, command lines,
titles and names of processes and threads, what a client says of itself, and what is quoted in a reason. So whoever
shows a fault, wherever, has none to hide.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from pgguard.attribution.declared import RAILS_KEYS, SEQUEL_KEYS, SQLCOMMENTER_KEYS
from pgguard.attribution.evidence import Driver, Evidence
from pgguard.attribution.findings import Findings
from pgguard.attribution.frames import place
from pgguard.faults.advice import advice_for
from pgguard.faults.advice.closing import COPY_ADVICE, advice_on_closing
from pgguard.faults.advice.exhaustion import advice_on_exhaustion
from pgguard.faults.advice.tracing import tracing_for
from pgguard.faults.catalogue import CATALOGUE, SERVERS_ADVICE, SETTLED_ADVICE, STRANGERS_ADVICE, severity_of
from pgguard.faults.causes import Instance, program
from pgguard.faults.culprits import find_culprits, foremost, sender_evidence, tell_story
from pgguard.faults.docket import Family
from pgguard.faults.fault import OUTLINED, Chapter, Culprit, Fault, Request, Role
from pgguard.faults.policy import Action
from pgguard.faults.sql import SqlMode, SqlText
from pgguard.faults.summaries import summarize
from pgguard.faults.text import DECLARED_LENGTH, discreet, discreet_setting, printable, shorten
from pgguard.secrets.commands import redact_name
from pgguard.secrets.names import is_secret_name
from pgguard.secrets.text import HIDDEN, redact
from pgguard.session.libpq import CLOSED, CLOSED_BY_TLS
from pgguard.session.verdicts import Direction, Kind, Party, Verdict

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pgguard.attribution.findings import Share
    from pgguard.attribution.frames import Frame
    from pgguard.attribution.runtime import Runtime
    from pgguard.faults.advice.tracing import Tracing
    from pgguard.faults.catalogue import Advice, Severity
    from pgguard.faults.fault import SessionFacts
    from pgguard.session.verdicts import RequestSeen


_LINE: Final = 1000
"""Characters of a summary, at most: twice what eight named processes take."""
_PLACE: Final = 200
"""Characters of a place in the application, at most."""
_MAY_BE_LIBPQ: Final = frozenset({Driver.LIBPQ, Driver.UNKNOWN})
"""Drivers whose users may find libpq's texts in their logs."""
_LIBRARIES_KEYS: Final = SQLCOMMENTER_KEYS | RAILS_KEYS | SEQUEL_KEYS | {"application_name"}
_BY_NOBODY: Final = frozenset({Kind.UNCLEAN_CLOSE, Kind.IDLE_IN_TRANSACTION})
"""Kinds of fault that are what a process leaves undone on all its connections."""
_OTHERS_ADVICE: Final = {Party.SERVER: SERVERS_ADVICE, Party.STRANGER: STRANGERS_ADVICE}


def build_fault(
    verdict: Verdict,
    facts: SessionFacts,
    findings: Findings,
    *,
    fault_id: int = 0,
    at: float,
    action: Action,
    sql_mode: SqlMode,
) -> Fault:
    """The full record of a fault.

    Args:
        verdict: What the session core says, and :func:`pgguard.faults.conclude.conclude` has left of it.
        facts: The session that it says it of.
        findings: What attribution knows about the session's client at this moment.
        fault_id: The record's number; by default :meth:`pgguard.faults.docket.Docket.enter` gives it one.
        at: Seconds since the epoch.
        action: What is being done about it.
        sql_mode: How SQL text may appear.
    """
    verdict = _verdict(verdict)
    culprits, unnamed = _culprits(verdict, findings, sql_mode)
    return Fault(
        id=fault_id,
        at=at,
        kind=verdict.kind,
        severity=severity_of(verdict, findings.driver),
        action=action,
        repeat_of=None,
        suppressed=0,
        summary=_in_one_line(summarize(verdict, findings, culprits)),
        place=_place(culprits),
        reason=_in_one_line(verdict.reason),
        session=_session(facts),
        message=verdict.message,
        libpq=_libpq(verdict, findings, facts),
        culprits=culprits,
        sent_by=verdict.author if verdict.message is not None else None,
        requests=tuple(_request(request, findings, sql_mode) for request in verdict.requests),
        advice=_advice(verdict, findings, culprits),
        story=tuple(map(_chapter, tell_story(findings, facts.opened_at))),
        shares=None if findings.shares is None else tuple(map(_share, findings.shares)),
        limit=None if verdict.refusal is None else verdict.refusal.limit,
        unnamed=unnamed,
        by=verdict.by,
        over=_is_over(verdict, action),
        tracing=_tracing(verdict, culprits),
    )


def plain_fault(verdict: Verdict, facts: SessionFacts, *, at: float, severity: Severity, action: Action) -> Fault:
    """The record of a fault of which :func:`build_fault` can't be made, for whatever reason: what can't go wrong.

    It says what kind of fault it is, of which session, which message shows it, what is done about it, and who the
    kernel has named. Arguments as above, and the severity.
    """
    entry = CATALOGUE[verdict.kind]
    intruder = verdict.intruder
    culprits: tuple[Culprit, ...] = ()
    if intruder is not None and not intruder.sampled:
        culprits = (Culprit(Role.INTRUDER, intruder.pid, intruder.tid, Evidence.KERNEL_SENDER, None),)
    return Fault(
        id=0,
        at=at,
        kind=verdict.kind,
        severity=severity,
        action=action,
        repeat_of=None,
        suppressed=0,
        summary=OUTLINED,
        reason=OUTLINED,
        session=discreet_facts(facts),
        message=verdict.message,
        libpq=None,
        culprits=culprits,
        sent_by=verdict.author if verdict.message is not None else None,
        requests=(),
        advice=entry.advice,
        by=verdict.by,
        over=_is_over(verdict, action),
    )


def build_instance(verdict: Verdict, facts: SessionFacts, findings: Findings, *, sql_mode: SqlMode) -> Instance:
    """What the record of a repeat says that stands for another session than the first; arguments as above."""
    verdict = _verdict(verdict)
    culprits, unnamed = _culprits(verdict, findings, sql_mode)
    summary = _in_one_line(summarize(verdict, findings, culprits))
    return Instance(_session(facts), verdict.message, summary, culprits, unnamed)


def _in_one_line(text: str) -> str:
    """What is said of a fault: a line that can be shown, however long the names in it are that others have chosen."""
    return shorten(printable(text), _LINE)


def plain_instance(verdict: Verdict, facts: SessionFacts) -> Instance:
    """The same, of what :func:`build_instance` can't tell; nothing can go wrong with it."""
    return Instance(discreet_facts(facts), verdict.message, OUTLINED, ())


def family_of(verdict: Verdict, findings: Findings) -> Family | None:
    """What is known of a fault before evidence is taken, if that is enough to know what its cause is.

    It is if the kernel has named everybody who has sent, and it is known what those run who did it and who opened the
    connection.

    Args:
        verdict: What the session core says, unless evidence may make something else of it.
        findings: What is known without looking.
    """
    intruder = verdict.intruder
    if intruder is None or findings.opener is None:
        return None
    senders = (intruder, *verdict.requesters)
    if any(sender.sampled for sender in senders) or intruder.pid not in findings.senders:
        return None
    programs = (program(findings.senders[intruder.pid].cmdline), program(findings.opener.cmdline))
    if not all(programs):
        return None
    graver = verdict.kind is Kind.UNREAD_ANSWER and verdict.message is not None
    return Family(verdict.kind, severity_of(verdict, findings.driver), verdict.settled, graver, programs)


def likeness_of(verdict: Verdict, findings: Findings) -> Family | None:
    """What faults that come at the same moment have in common if what is found out about one holds for the others.

    It is their family, where the opener is taken for who opened the connection, and of connections that nobody has sent
    on for the fault the process that opened them all.

    Args:
        verdict: What the session core says.
        findings: What is known without looking.
    """
    opener = findings.opener
    if opener is None:
        return None
    if verdict.intruder is not None:
        return family_of(verdict, replace(findings, senders={opener.pid: opener, **findings.senders}))
    if verdict.kind not in _BY_NOBODY or any(sender.pid != opener.pid for sender in verdict.requesters):
        return None
    severity = severity_of(verdict, findings.driver)
    programs = (program(opener.cmdline),)
    return Family(
        verdict.kind, severity, verdict.settled, graver=False, programs=programs, process=(opener.pid, opener.started)
    )


def _libpq(verdict: Verdict, findings: Findings, facts: SessionFacts) -> str | None:
    """What libpq prints: of another driver's users only what it repeats after the server, as they all do."""
    repeats = verdict.kind is Kind.SESSION_STATE_LOST
    if not repeats and findings.driver not in _MAY_BE_LIBPQ:
        return None
    return CLOSED_BY_TLS if facts.tls and verdict.libpq == CLOSED else verdict.libpq


def _verdict(verdict: Verdict) -> Verdict:
    """A verdict without the secrets in what it quotes: names of statements, a server's words."""
    libpq = None if verdict.libpq is None else redact(verdict.libpq)
    return replace(verdict, reason=redact(verdict.reason), libpq=libpq)


def _culprits(verdict: Verdict, findings: Findings, sql_mode: SqlMode) -> tuple[tuple[Culprit, ...], int]:
    """The culprits whom a record names, as they may be shown, and how many there are besides."""
    culprits, unnamed = foremost(find_culprits(verdict, findings))
    return tuple(_culprit(culprit, sql_mode) for culprit in culprits), unnamed


def _culprit(culprit: Culprit, sql_mode: SqlMode) -> Culprit:
    return replace(
        culprit,
        process=None if culprit.process is None else discreet(culprit.process),
        thread_name=None if culprit.thread_name is None else redact_name(culprit.thread_name),
        stack=_stack(culprit.stack),
        declared=None if culprit.declared is None else _declared(culprit.declared, sql_mode),
    )


def _chapter(chapter: Chapter) -> Chapter:
    return chapter if chapter.stack is None else replace(chapter, stack=_stack(chapter.stack))


def _stack(frames: tuple[Frame, ...] | None) -> tuple[Frame, ...] | None:
    return None if frames is None else tuple(map(_frame, frames))


def _place(culprits: tuple[Culprit, ...]) -> str | None:
    """Where in the application the one was that did it; of another one it says nothing, as the summary is about it."""
    found = None if not culprits or culprits[0].stack is None else place(culprits[0].stack)
    return None if found is None else shorten(printable(found), _PLACE)


def _tracing(verdict: Verdict, culprits: tuple[Culprit, ...]) -> Tracing | None:
    """How to see which code it was next time, if nothing says it of the one that did it."""
    first = culprits[0] if culprits else None
    if first is None or first.runtime is None or first.declared or first.stack is not None:
        return None
    return tracing_for(verdict.kind, first.runtime)


def _frame(frame: Frame) -> Frame:
    return frame._replace(function=redact(frame.function), file=redact(frame.file))


def _declared(declared: Mapping[str, str], sql_mode: SqlMode) -> dict[str, str]:
    """What a client says of itself. Where no SQL is to be shown, of its comments only what libraries write there is."""
    return {
        redact(key): HIDDEN if is_secret_name(key) else discreet_setting(value, DECLARED_LENGTH) or ""
        for key, value in declared.items()
        if sql_mode is not SqlMode.NONE or key in _LIBRARIES_KEYS
    }


def _session(facts: SessionFacts) -> SessionFacts:
    return replace(
        facts,
        user=discreet_setting(facts.user),
        database=discreet_setting(facts.database),
        application_name=discreet_setting(facts.application_name),
    )


def discreet_facts(facts: SessionFacts) -> SessionFacts:
    """A session's facts as they may be shown: without the secrets in what a client has set. Raises nothing.

    If these can't be told, all that the client has set is left out.
    """
    try:
        return _session(facts)
    except Exception:
        return replace(facts, user=None, database=None, application_name=None)


def _share(share: Share) -> Share:
    return share if share.process is None else share._replace(process=discreet(share.process))


def _is_over(verdict: Verdict, action: Action) -> bool:
    """Whether the session ends with a fault, whatever else is done about it."""
    message = verdict.message
    says_goodbye = message is not None and message.direction is Direction.FRONTEND and message.type == "X"
    return action is not Action.DROPPED and (verdict.ends or says_goodbye)


def _advice(verdict: Verdict, findings: Findings, culprits: tuple[Culprit, ...]) -> Advice:
    if verdict.kind is Kind.PROTOCOL_VIOLATION and (advice := _OTHERS_ADVICE.get(verdict.by)) is not None:
        return advice
    if verdict.settled:
        return SETTLED_ADVICE
    return _clients_advice(verdict, findings, culprits)


def _clients_advice(verdict: Verdict, findings: Findings, culprits: tuple[Culprit, ...]) -> Advice:
    """Where requests overlap and several processes have the socket open, it is they who are to be kept apart."""
    shared = verdict.kind is Kind.REQUEST_WHILE_BUSY and len(findings.holders or ()) > 1
    known = [culprit for culprit in culprits if culprit.runtime is not None]
    # Those who hold the connections can give some back, rather than who was refused one.
    holders = [culprit for culprit in known if culprit.role is Role.HOLDER] if verdict.refusal else []
    runtimes: dict[int, Runtime] = {
        culprit.pid: culprit.runtime
        for culprit in holders or known
        if culprit.pid is not None and culprit.runtime is not None
    }
    if verdict.kind is Kind.UNCLEAN_CLOSE:
        return _advice_on_closing(verdict, findings, culprits, tuple(runtimes.values()))
    if verdict.refusal is not None:
        return advice_on_exhaustion(verdict.refusal.limit, findings.slots, tuple(runtimes.values()))
    return advice_for(Kind.SHARED_BY_PROCESSES if shared else verdict.kind, tuple(runtimes.values()))


def _advice_on_closing(
    verdict: Verdict, findings: Findings, culprits: tuple[Culprit, ...], runtimes: tuple[Runtime, ...]
) -> Advice:
    if verdict.message is not None:
        return COPY_ADVICE
    closer = next((culprit.pid for culprit in culprits if culprit.role is Role.CLOSER), None)
    is_heir = closer is not None and findings.opener_pid not in (None, closer)
    return advice_on_closing(findings.fate, was_reset=findings.was_reset, is_heir=is_heir, runtimes=runtimes)


def _request(seen: RequestSeen, findings: Findings, sql_mode: SqlMode) -> Request:
    sender = seen.sender
    return Request(
        n=seen.n,
        at=seen.at,
        messages=seen.messages,
        text=SqlText(seen.sql, sql_mode, cut=seen.sql_cut),
        pid=None if sender is None else sender.pid,
        tid=None if sender is None else sender.tid,
        evidence=None if sender is None else sender_evidence(sender, findings),
        state=seen.state,
        at_rest=seen.at_rest,
    )
