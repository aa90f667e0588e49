"""One line on each fault: who did what to whom."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from pgguard.attribution.fates import State
from pgguard.faults.conclude import AT_ONCE
from pgguard.faults.fault import Culprit, Role
from pgguard.faults.text import all_named, listed, named
from pgguard.session.verdicts import OUTSTANDING, TLS_ALERT, TLS_RECORD, Kind, Party, Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pgguard.attribution.fates import Fate
    from pgguard.attribution.findings import Findings, Share, Slots


_ITS_OPENER: Final = "the process that opened it"
_SHARES: Final = 3
"""Processes of which a summary says how many connections each has."""


def summarize(verdict: Verdict, findings: Findings, culprits: tuple[Culprit, ...]) -> str:
    """Say what happened in one line; other people's text may be in it."""
    write = _SUMMARIES.get(verdict.kind)
    return verdict.reason if write is None else write(verdict, findings, culprits)


def _message(verdict: Verdict) -> str:
    return "bytes" if verdict.message is None else verdict.message.name


def _who(culprits: tuple[Culprit, ...]) -> str:
    """The intruder, or whichever stands first, or ``the client``."""
    first = culprits[0] if culprits else None
    return "the client" if first is None or first.pid is None else named(first.pid, first.process)


def _shared_by_processes(verdict: Verdict, findings: Findings, culprits: tuple[Culprit, ...]) -> str:
    if verdict.reason == AT_ONCE:
        return f"{_readers(culprits)} {verdict.reason}"
    return _used_out_of_turn(verdict, findings, culprits)


def _shared_by_threads(verdict: Verdict, _: Findings, culprits: tuple[Culprit, ...]) -> str:
    if verdict.reason == AT_ONCE:
        return f"{_readers(culprits)} {verdict.reason}"
    if verdict.message is not None and verdict.message.name in (TLS_RECORD, TLS_ALERT):
        return f"{_readers(culprits)} use one TLS session: {verdict.reason}"
    intruder, requester = (
        next((f"thread {one.tid}" for one in culprits if one.role is role and one.tid is not None), None)
        for role in (Role.INTRUDER, Role.REQUESTER)
    )
    outstanding = f"while the answer to {requester or 'another thread'} was outstanding"
    return f"{intruder or 'a thread'} of {_who(culprits)} sent {_message(verdict)} {outstanding}"


def _used_out_of_turn(verdict: Verdict, _: Findings, culprits: tuple[Culprit, ...]) -> str:
    # The reason says "another process" of the one whose turn it was, which is the first requester.
    reason = verdict.reason
    sender, intruder = verdict.sender, verdict.intruder
    if sender is not None and intruder is not None:
        owner = next((named(c.pid, c.process) for c in culprits if c.pid == sender.pid), f"pid {sender.pid}")
        reason = reason.replace("another process", f"pid {intruder.pid}")
        shown = f"pid {sender.pid} sent {_message(verdict)} {reason}"
        return f"{_who(culprits)} uses the connection that {owner} opened: {shown}"
    if verdict.requesters:
        reason = reason.replace("another process", f"pid {verdict.requesters[0].pid}")
    return f"{_who(culprits)} sent {_message(verdict)} {reason}"


def _readers(culprits: tuple[Culprit, ...]) -> str:
    """Processes, each with those of its threads that are meant."""
    threads: dict[int, list[str]] = {}
    names: dict[int, str] = {}
    for culprit in culprits:
        if culprit.pid is not None and culprit.role in (Role.INTRUDER, Role.REQUESTER):
            names[culprit.pid] = named(culprit.pid, culprit.process)
            threads.setdefault(culprit.pid, []).extend([] if culprit.tid is None else [str(culprit.tid)])
    return listed([_threads_of(name, threads[pid]) for pid, name in names.items()])


def _threads_of(name: str, threads: Sequence[str]) -> str:
    if not threads:
        return name
    return f"thread{'' if len(threads) == 1 else 's'} {listed(threads)} of {name}"


def _busy(verdict: Verdict, findings: Findings, culprits: tuple[Culprit, ...]) -> str:
    busy = next((request.n for request in verdict.requests if request.state in OUTSTANDING), None)
    last = "its last request" if busy is None else f"request {busy}"
    who = _who(culprits)
    if culprits and culprits[0].pid is None and len(findings.holders or ()) > 1:
        pids = listed([str(holder.pid) for holder in findings.holders or ()])
        who = f"one of pids {pids}, which share the connection,"
    return f"{who} sent {_message(verdict)} before the answer to {last} was complete"


def _unread(verdict: Verdict, findings: Findings, culprits: tuple[Culprit, ...]) -> str:
    if verdict.message is not None:
        return f"{_who(culprits)} sent {_message(verdict)} {verdict.reason}"
    who = _who(culprits) if culprits and culprits[0].role is Role.REQUESTER else _owner(findings)
    return f"{who} {verdict.reason}"


def _violation(verdict: Verdict, _: Findings, culprits: tuple[Culprit, ...]) -> str:
    is_known = verdict.intruder is not None or (verdict.by is Party.STRANGER and bool(culprits))
    if not is_known:
        return verdict.reason
    who, did = _who(culprits), verdict.reason.removeprefix("the client ")
    return f"{who}: {did}" if did == verdict.reason else f"{who} {did}"


def _corrupt(verdict: Verdict, findings: Findings, culprits: tuple[Culprit, ...]) -> str:
    users = {
        culprit.pid: named(culprit.pid, culprit.process)
        for culprit in culprits
        if culprit.pid is not None and culprit.role in (Role.INTRUDER, Role.REQUESTER)
    }
    holders = findings.holders or ()
    if len(users) < 2 and len(holders) > 1:
        return f"{all_named(holders)} have one TLS session open: {verdict.reason}"
    return f"{listed(list(users.values()))} use one TLS session: {verdict.reason}" if len(users) > 1 else verdict.reason


def _ended(verdict: Verdict, findings: Findings, culprits: tuple[Culprit, ...]) -> str:
    owner = _opener(findings) or "another process"
    what = "Terminate" if verdict.message is None else verdict.message.name
    if not culprits or culprits[0].pid is None:
        return f"a process other than {owner}, which opened the connection, sent {what} on it"
    return f"{_who(culprits)} sent {what} on the connection that {owner} opened"


def _leaked(verdict: Verdict, findings: Findings, _: tuple[Culprit, ...]) -> str:
    heirs = findings.holders or ()
    owner = _opener(findings)
    has = f": {all_named(heirs)} {'has' if len(heirs) == 1 else 'have'} it open" if heirs else ""
    what = verdict.reason
    if owner is not None and _ITS_OPENER in what:
        what = what.replace(_ITS_OPENER, f"{owner}, which opened it")
    elif owner is not None:
        what = what.replace("the connection", f"the connection that {owner} opened", 1)
    return f"{what}{has}"


def _owner(findings: Findings) -> str:
    """Whose connection it is: of the only process that has it open, otherwise of the one that opened it."""
    sole = findings.sole_holder
    return (_opener(findings) or "the client") if sole is None else named(sole.pid, sole)


def _opener(findings: Findings) -> str | None:
    pid = findings.opener_pid
    return None if pid is None else named(pid, findings.opener)


def _idle(verdict: Verdict, findings: Findings, _: tuple[Culprit, ...]) -> str:
    return f"{_owner(findings)} {verdict.reason}"


def _exhausted(verdict: Verdict, findings: Findings, _: tuple[Culprit, ...]) -> str:
    said = verdict.reason.replace("the connection", f"{_owner(findings)} a connection", 1)
    shares = findings.shares or ()
    named_shares = [_share(share) for share in shares[:_SHARES]]
    if len(shares) > _SHARES:
        more = shares[_SHARES:]
        rest = f"{len(more)} other {'process has' if len(more) == 1 else 'processes have'}"
        named_shares.append(f"{rest} {sum(share.connections for share in more)}")
    if shares:
        said += f"; of the connections through this guard that count toward the limit, {listed(named_shares)}"
    elif findings.shares is not None:
        said += "; no connection that counts toward the limit goes through this guard"
    slots = findings.slots
    if slots is not None and slots.idle_in_transaction:
        said += f"; {_some(slots.idle_in_transaction, slots)} sat idle in a transaction"
    elif slots is not None and slots.idle:
        said += f"; {_some(slots.idle, slots)} sat idle"
    return said


def _some(number: int, slots: Slots) -> str:
    return f"all {number}" if 1 < number == slots.connections else f"{number} of the {slots.connections}"


def _share(share: Share) -> str:
    if share.process is None:
        return f"clients that could not be identified have {share.connections}"
    return f"{named(share.process.pid, share.process)} has {share.connections}"


def _inherited(verdict: Verdict, findings: Findings, culprits: tuple[Culprit, ...]) -> str:
    if verdict.intruder is not None:
        return _used_out_of_turn(verdict, findings, culprits)
    opener = _opener(findings)
    heirs = [h for h in findings.holders or () if h.pid != findings.opener_pid]
    if not heirs:
        return "more than one process has the connection's socket open"
    end = ""
    if verdict.settled:
        one = len(heirs) == 1
        end = f", which {'has' if one else 'have'} not used it and {'has its' if one else 'have their'} own"
    names = all_named(heirs)
    if opener is None:
        return f"one connection is open in {names}{end}"
    return f"the connection that {opener} opened is also open in {names}{end}"


def _end(who: str, fate: Fate | None) -> str:
    """How a process and its connection have ended."""
    ended = "its connection ended"
    if fate is None:
        return f"the connection of {who} ended"
    match fate.state:
        case State.ALIVE if fate.has_socket:
            return f"{who}, which is still running, shut its connection down"
        case State.ALIVE:
            return f"{who}, which is still running, closed its connection"
        case State.EXITED:
            return f"{who} exited with status {fate.code}, and {ended}"
        case State.KILLED:
            return f"{who} was killed by {_signal(fate.code)}, and {ended}"
        case State.ENDED:
            return f"{who} exited or was killed, and {ended}"


def _signal(number: int | None) -> str:
    try:
        return signal.Signals(number or 0).name
    except ValueError:
        return f"signal {number}"


def _closed(verdict: Verdict, findings: Findings, culprits: tuple[Culprit, ...]) -> str:
    closer = _who(culprits) if culprits and culprits[0].role is Role.CLOSER else None
    if verdict.message is not None:
        cut_short = "sent Terminate in the middle of COPY data, which the server throws away"
        return verdict.reason if closer is None else f"{closer} {cut_short}"
    when = verdict.reason.partition(", ")[2]
    if closer is not None:
        return f"{_end(closer, findings.fate)} without Terminate, {when}"
    owner = _opener(findings)
    if owner is not None:
        cut = findings.was_reset and findings.fate is not None and findings.fate.has_socket
        ended = "was reset by something in between," if cut else "ended"
        return f"the connection that {owner} opened {ended} without Terminate, {when}"
    return f"the client's side ended without Terminate, {when}"


_SUMMARIES: Final = MappingProxyType[Kind, Callable[["Verdict", "Findings", tuple[Culprit, ...]], str]](
    {
        Kind.SHARED_BY_PROCESSES: _shared_by_processes,
        Kind.SHARED_BY_THREADS: _shared_by_threads,
        Kind.REQUEST_WHILE_BUSY: _busy,
        Kind.UNREAD_ANSWER: _unread,
        Kind.INHERITED_CONNECTION: _inherited,
        Kind.FOREIGN_TERMINATE: _ended,
        Kind.UNCLEAN_CLOSE: _closed,
        Kind.IDLE_IN_TRANSACTION: _idle,
        Kind.LEAKED_CONNECTION: _leaked,
        Kind.CONNECTION_EXHAUSTION: _exhausted,
        Kind.PROTOCOL_VIOLATION: _violation,
        Kind.TLS_CORRUPTION: _corrupt,
    }
)
"""Of the other kinds, the reason says it all."""
