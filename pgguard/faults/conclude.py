"""What the evidence makes of a verdict: the session core sees the wire alone, and not who reads from it.

*Several wait for one answer.* Of two threads that are blocked reading one socket at the same moment, one is going to be
given the other's answer. No driver that pipelines or multiplexes has two threads read, so this is certain whatever the
driver, and it is how libpq's clients betray themselves: PQexec of a second thread doesn't send at first, it reads up
the answer that the first one waits for (``PQexecStart()`` in ``fe-exec.c``). On the wire nothing overlaps then. Within
one process a thread that only polls may leave the reading to whose turn it is, holding a lock: it counts if it polls as
libpq itself does, or as Ruby does for all of libpq's waits, unless it waits when no answer is due as well.

*A thread waits for its answer, and another one of its process asks.* Where the kernel names processes and no threads,
or nobody: A thread that has been asleep, blocked reading this socket, since a moment when all that had been sent was
known, hasn't sent what came afterwards. If its process alone has the connection open, another thread of that has; and
in the middle of the first one's wait, unless that one waits when no answer is due as well and so may read for others.

*Somebody says Terminate on another process's connection.* It does harm only to a process that has the connection still
open, and then whatever the one that says it has done before. Where the kernel doesn't name who said it, it can only
have been another process than the opener if the opener leaves the socket open
(:meth:`pgguard.attribution.witness.Witness.stays`) and another one has, or had, it open.

*The opener's own message shows the sharing.* The process that opened a connection has a right to it. Where it is its
message that comes out of turn, or it that is seen to wait beside another, the intruder is whoever else has used the
connection, the latest first.

*A TLS stream that fails its integrity check.* Two processes that use one TLS session bring that about, and so do two
threads that use it at once, as OpenSSL's are not locked. Where the kernel has named who sent, and it was one process
alone that nobody else shares the connection with, it was neither, or the threads: where it isn't the threads of a
runtime that moves what it does from one to the other, with a lock. If it is the client that has found corrupt what it
was sent, then nobody has done anything wrong. A record as short as a Terminate most likely is one: who says goodbye on
a connection that somebody else has used up to its end has lost nothing by it. It is a fault as long as another process
has the connection open, and loses that.

*The opener says Terminate, as it may, and somebody goes on.* That one has shared the connection, whether or not it had
used it before. Where the kernel doesn't name who goes on, it is certainly not the opener if that has let go; and who
else it is, is known if there was one other process when it had. Who has the connection open afterwards says nothing, as
libpq closes it when it finds the end.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NamedTuple

from pgguard.attribution.runtime import Language
from pgguard.faults.catalogue import OVERLAP
from pgguard.identity import Sender
from pgguard.session.verdicts import AFTER_END, TLS_ALERT, Kind

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from pgguard.attribution.evidence import Process
    from pgguard.attribution.findings import Findings
    from pgguard.attribution.threads import Sleep, Thread, Waiting
    from pgguard.session.verdicts import Verdict

HARMLESS_GOODBYES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "pg_basebackup": "the child that streams the WAL runs its parent's exit handler, disconnect_atexit(), when the "
        "backup is complete; the parent has no more use for its connection then, and closes it (pg_basebackup.c)",
    }
)
"""Programs whose children's Terminate is known to do no harm, by the name of the process that opened the connection."""


_BY_PROCESSES: Final = frozenset({Kind.SHARED_BY_PROCESSES, Kind.TLS_CORRUPTION})

AT_ONCE: Final = "waited for an answer on one connection at the same time"
"""The reason of a verdict on those who read from one connection: what they did."""


class Readers(NamedTuple):
    """Who reads from one connection at the same time."""

    kind: Kind
    intruder: Sender | None
    """The one that came last, if that is known."""
    requesters: tuple[Sender, ...]
    """The others."""


def readers(
    blocked: Collection[Waiting],
    before: Collection[Sleep],
    *,
    watchers: Collection[Thread] = (),
    language: Language | None = None,
) -> Readers | None:
    """Tell which fault threads amount to that were blocked on one connection at once; ``None`` if it is none.

    Args:
        blocked: the threads.
        before: those of their sleeps that they were in already when they were looked at earlier.
        watchers: the threads that wait whether or not an answer is due.
        language: the process's, or that of the one that opened the connection.
    """
    kind = Kind.SHARED_BY_PROCESSES
    if len({one.thread.pid for one in blocked}) == 1:
        kind = Kind.SHARED_BY_THREADS
        polls = language is Language.RUBY
        blocked = [
            one for one in blocked if one.within_libpq or not one.polls or (polls and one.thread not in watchers)
        ]
    if len(blocked) < 2:
        return None
    fresh = [one for one in blocked if one.sleep not in before]
    last = _sender(fresh[0]) if len(fresh) == 1 else None
    return Readers(kind, last, tuple(sender for one in blocked if (sender := _sender(one)) != last))


def _sender(waiting: Waiting) -> Sender:
    return Sender(waiting.thread.pid, waiting.thread.tid, sampled=True)


def conclude(verdict: Verdict, findings: Findings) -> Verdict | None:
    """Return what the verdict is in the light of the evidence; ``None`` if it is no fault."""
    concluded = _weigh(verdict, findings)
    return None if concluded is None else _spare_the_opener(concluded, findings.opener_pid)


def _weigh(verdict: Verdict, findings: Findings) -> Verdict | None:
    match verdict.kind:
        case Kind.REQUEST_WHILE_BUSY:
            return _overlap(verdict, findings)
        case Kind.FOREIGN_TERMINATE:
            return verdict if _is_foreign(verdict, findings) else None
        case Kind.SHARED_BY_PROCESSES if verdict.reason == AFTER_END:
            return verdict if _goes_on(verdict, findings) else None
        case Kind.TLS_CORRUPTION:
            return _corruption(verdict, findings)
        case _:
            return verdict


def _spare_the_opener(verdict: Verdict, opener: int | None) -> Verdict:
    """Who opened the connection has a right to it, and somebody else hasn't."""
    if verdict.kind not in _BY_PROCESSES or opener is None:
        return verdict
    intruder = verdict.intruder
    if intruder is None:
        if verdict.reason != AT_ONCE or all(sender.pid != opener for sender in verdict.requesters):
            return verdict
    elif intruder.pid != opener:
        return verdict
    others = [sender for sender in verdict.requesters if sender.pid != opener]
    other = _latest(others, verdict) if verdict.reason == AT_ONCE else next(iter(others), None)
    if other is None and not others:
        return verdict
    rest = tuple(sender for sender in verdict.requesters if sender != other)
    requesters = rest if intruder is None else (intruder, *rest)
    sender = None if verdict.message is None else intruder
    since = verdict.since if sender is None else _last_use(other, verdict)
    return replace(verdict, intruder=other, requesters=requesters, sender=sender, since=since)


def _last_use(sender: Sender | None, verdict: Verdict) -> float | None:
    """When another process used the connection, which the opener's message has only shown."""
    if sender is None:
        return None
    sent = [one.at for one in verdict.requests if one.sender is not None and one.sender.pid == sender.pid]
    return max(sent, default=None)


def _latest(senders: Sequence[Sender], verdict: Verdict) -> Sender | None:
    """Which of them has sent last, if that is known."""
    pids = {sender.pid for sender in senders}
    if len(pids) > 1:
        last = (request.sender.pid for request in reversed(verdict.requests) if request.sender is not None)
        pids = set(next(([pid] for pid in last if pid in pids), []))
    return next((sender for sender in senders if sender.pid in pids), None)


def _overlap(verdict: Verdict, findings: Findings) -> Verdict:
    blocked = [one for one in findings.waiting if one.blocked]
    found = readers(blocked, findings.before, watchers=findings.watchers, language=findings.language)
    if found is not None:
        return replace(verdict, kind=found.kind, reason=AT_ONCE, intruder=found.intruder, requesters=found.requesters)
    intruder, requester = verdict.intruder, next(iter(verdict.requesters), None)
    two_threads = (
        intruder is not None
        and requester is not None
        and intruder.pid == requester.pid
        and None not in (intruder.tid, requester.tid)
        and intruder.tid != requester.tid
    )
    overlap = OVERLAP[findings.driver]
    if overlap.may or not overlap.threads_tell:
        return verdict
    if two_threads:
        return replace(verdict, kind=Kind.SHARED_BY_THREADS)
    sleeper = _sleeper(verdict, findings)
    if sleeper is not None:
        return replace(verdict, kind=Kind.SHARED_BY_THREADS, requesters=(_sender(sleeper),))
    return verdict


def _sleeper(verdict: Verdict, findings: Findings) -> Waiting | None:
    """The thread that has been waiting for its answer since before the request was sent, which so is another one's."""
    sole = findings.sole_holder
    if sole is None or (verdict.intruder is not None and verdict.intruder[:2] != (sole.pid, None)):
        return None
    asleep = [one for one in findings.waiting if one.blocked and one.sleep in findings.throughout]
    if len(asleep) != 1 or asleep[0].thread in findings.watchers:
        return None
    return asleep[0] if findings.restless.get(sole.pid) else None


def _corruption(verdict: Verdict, findings: Findings) -> Verdict | None:
    if verdict.parting and not _harms_somebody(verdict, findings):
        return None
    named = [sender for sender in (verdict.intruder, *verdict.requesters) if sender is not None]
    kernel_names = bool(named) and not any(sender.sampled for sender in named)
    had_it = (*(findings.holders or ()), *findings.departed)
    pids = {sender.pid for sender in named} | {process.pid for process in had_it}
    is_told = verdict.message is not None and verdict.message.name == TLS_ALERT
    if len(pids) > 1 or not (kernel_names or (is_told and findings.sole_holder is not None)):
        return verdict
    if len({sender.tid for sender in named if sender.tid is not None}) > 1 and OVERLAP[findings.driver].threads_tell:
        return replace(verdict, kind=Kind.SHARED_BY_THREADS)
    return None if is_told else replace(verdict, kind=Kind.PROTOCOL_VIOLATION, requesters=())


def _harms_somebody(verdict: Verdict, findings: Findings) -> bool:
    """Whether another process than who has ended the session is seen to have the connection open."""
    holders = {holder.pid for holder in findings.holders or ()}
    if _is_harmless(findings):
        return False
    return len(holders) > 1 if verdict.intruder is None else bool(holders - {verdict.intruder.pid})


def _is_foreign(verdict: Verdict, findings: Findings) -> bool:
    if findings.opener_pid is None or _is_harmless(findings):
        return False
    if verdict.intruder is not None:
        return any(holder.pid != verdict.intruder.pid for holder in findings.holders or ())
    return findings.opener_stays and bool(heirs(findings))


def _goes_on(verdict: Verdict, findings: Findings) -> bool:
    """Whether it is another process than the opener that uses a connection which has been ended."""
    if _is_harmless(findings):
        return False
    if verdict.intruder is not None:
        return True
    opener, holders = findings.opener_pid, findings.holders or ()
    left = opener is not None and all(holder.pid != opener for holder in holders)
    return left and bool(findings.survivors or holders)


def heirs(findings: Findings) -> tuple[Process, ...]:
    """The processes other than the opener that have the connection open, or had lately."""
    return tuple(one for one in (*(findings.holders or ()), *findings.departed) if one.pid != findings.opener_pid)


def _is_harmless(findings: Findings) -> bool:
    known = (findings.opener, *(findings.holders or ()))
    return any(one.name in HARMLESS_GOODBYES for one in known if one is not None and one.pid == findings.opener_pid)
