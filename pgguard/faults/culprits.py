"""Who is a culprit, in which role, and by what evidence.

``intruder``
    The sender of the offending message, where it is known; or if that is who opened the connection, and has a right to
    it, the latest other one that has used it. Where the sender isn't known, but the client sent the message: the one
    process that has the socket open, if there is exactly one, and it doesn't take two; of a Terminate, the one that has
    had it open and hasn't any more; of what comes behind the opener's Terminate, the only one that still had it open
    then; otherwise an intruder without a pid, and the holders say among whom to look.
``requester``
    Every other sender on the connection, the one whose turn it was first.
``closer``
    The sender of a Terminate that came in the middle of COPY data, where it is known; and of a connection that ended
    without Terminate who closed it, or was ended with it. The end of a stream has no sender that the kernel could name,
    and it is the *last* process with the socket open that brings it about, so one is named only if no second process is
    known to have opened, used or held the connection: by ``sole-holder`` if it was alone with it when that was last
    looked at, otherwise by ``socket-holder``. If the opener had let go before, it is the only one that had the socket
    open then. With two processes or none there is no closer: they stand in their other roles; and neither is there
    one if the process lives and has the socket open, and the connection was reset: something in between did that.
``owner``
    The process that opened the connection. Of a client that can't be looked at, what it says about itself.
``holder``
    Every process that has the socket open and doesn't stand above as intruder, closer or requester. An owner that
    still has it open is a holder as well: that is what a fork looks like. Of a connection-exhaustion, every process
    that has other connections open that count toward the limit, those with the most of them first.

At most :data:`MOST` of them are named beside the owner.

A thread is named where the kernel named it; where it was seen to wait for an answer on this connection, or several of
its process were but this one alone had begun to; or where its process has no other, or none that has run since the
request before. Who waits for the last answer isn't taken for the one that has asked once more, unless it uses libpq.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from pgguard.attribution.declared import declared
from pgguard.attribution.evidence import Driver, Evidence, Process
from pgguard.attribution.runtime import Language
from pgguard.faults.conclude import AT_ONCE
from pgguard.faults.fault import Chapter, Culprit, Event, Role
from pgguard.identity import Sender
from pgguard.session.verdicts import AFTER_END, Direction, Kind, Party

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pgguard.attribution.findings import Findings
    from pgguard.attribution.frames import Frame
    from pgguard.attribution.threads import Sleep, Waiting
    from pgguard.session.verdicts import RequestSeen, Verdict

MOST: Final = 8
"""Culprits that a record names beside the owner."""
CHAPTERS: Final = 32
"""Processes that a story tells of, the first to have it: a preforking server can have hundreds of workers."""
_KERNEL: Final = Evidence.KERNEL_SENDER
_LEGIBLE: Final = frozenset({Language.PYTHON, Language.RUBY})
"""Languages whose stacks can be read."""
_TOO_LATE: Final = "there was no time to read it"
_TICK: Final = 0.02
"""Seconds. Of a process that started within a tick of the connection's opening it isn't certain that it is older."""


def sender_evidence(sender: Sender, findings: Findings) -> Evidence:
    """How it is known who sent."""
    if not sender.sampled:
        return Evidence.KERNEL_SENDER
    if sender.tid is None and sender.pid == findings.opener_pid:
        return _opener_evidence(findings)  # it is known to have used the connection first, whatever it sent
    return Evidence.THREAD_SAMPLE


def find_culprits(verdict: Verdict, findings: Findings) -> tuple[Culprit, ...]:
    """Who did it first, then whom it was done to, then who else has the connection open."""
    return _Bench(verdict, findings).culprits()


def foremost(culprits: Sequence[Culprit]) -> tuple[tuple[Culprit, ...], int]:
    """Those whom a record names, and how many there are besides."""
    named = [n for n, culprit in enumerate(culprits) if culprit.role is not Role.OWNER][:MOST]
    kept = tuple(culprit for n, culprit in enumerate(culprits) if n in named or culprit.role is Role.OWNER)
    return kept, len(culprits) - len(kept)


class _Bench:
    def __init__(self, verdict: Verdict, findings: Findings) -> None:
        self._verdict = verdict
        self._findings = findings
        self._known = known_processes(findings)
        self._holders = findings.holders or ()
        self._waiting: dict[int, list[Waiting]] = {}
        """By pid, its threads that wait to read from the connection and for nothing else."""
        for one in findings.waiting:
            self._waiting.setdefault(one.thread.pid, []).append(one)

    def culprits(self) -> tuple[Culprit, ...]:
        verdict, findings = self._verdict, self._findings
        culprits: list[Culprit] = []
        requesters = [sender for sender in verdict.requesters if verdict.intruder or not self._only_opened(sender)]
        if verdict.refusal is not None and findings.opener is not None:
            # Nobody has made a request but for the login.
            requesters = [sender for sender in requesters if sender.pid != findings.opener.pid]
        if verdict.kind is Kind.UNCLEAN_CLOSE and verdict.message is not None and verdict.intruder is not None:
            culprits.append(self._sender(Role.CLOSER, verdict.intruder))
        elif verdict.kind is Kind.UNCLEAN_CLOSE:
            closer = self._closer()
            if closer is not None:
                culprits.append(closer)
            elif verdict.intruder is not None:
                # The last to send, which need not have been the last to close.
                requesters.insert(0, verdict.intruder)
        elif verdict.intruder is not None:
            culprits.append(self._sender(self._user(verdict.intruder.pid), verdict.intruder))
        elif _client_did_it(verdict) and verdict.reason != AT_ONCE:
            culprits.append(self._unnamed_intruder())
        threads = {culprit.pid for culprit in culprits} | {
            sender.pid for sender in requesters if sender.tid is not None
        }
        culprits.extend(
            self._sender(Role.REQUESTER, sender)
            for sender in dict.fromkeys(requesters)
            if sender.tid is not None or sender.pid not in threads
        )
        active = {culprit.pid for culprit in culprits}
        culprits.extend(self._owner())
        if verdict.refusal is not None:
            culprits.extend(
                self._process(Role.HOLDER, share.process, share.evidence)
                for share in findings.shares or ()
                if share.process is not None
            )
        else:
            evidence = Evidence.SOCKET_HOLDER if findings.sole_holder is None else Evidence.SOLE_HOLDER
            culprits.extend(
                self._process(Role.HOLDER, holder, evidence) for holder in self._holders if holder.pid not in active
            )
        if not any(culprit.pid for culprit in culprits) and findings.declared:
            culprits.append(_declared(findings))
        return tuple(map(self._quoted, culprits))

    def _quoted(self, culprit: Culprit) -> Culprit:
        """A culprit with what its own requests say of themselves."""
        if culprit.pid is None or culprit.role in {Role.OWNER, Role.HOLDER}:
            return culprit
        own = declared(None, (text for one in self._verdict.requests if (text := _text_of(one, culprit)) is not None))
        return replace(culprit, declared=own) if own else culprit

    def _owner(self) -> Iterator[Culprit]:
        opener, connected = self._findings.opener, self._findings.connected
        if connected is not None:
            pid, tid = connected
            runtime = self._findings.runtimes.get(pid)
            tid_evidence = None if tid is None else _KERNEL
            yield Culprit(Role.OWNER, pid, tid, _KERNEL, opener, tid_evidence=tid_evidence, runtime=runtime)
        elif opener is not None:
            yield self._process(Role.OWNER, opener, self._findings.opener_evidence)

    def _only_opened(self, sender: Sender) -> bool:
        """Whether all that is known of a sender is that it opened the connection."""
        return sender.sampled and sender.tid is None and sender.pid == self._findings.opener_pid

    def _user(self, pid: int) -> Role:
        """The role of the one that has sent: the opener that hasn't read its last answer intrudes on nobody."""
        own = self._verdict.kind is Kind.UNREAD_ANSWER and self._findings.opener_pid == pid
        return Role.REQUESTER if own else Role.INTRUDER

    def _unnamed_intruder(self) -> Culprit:
        departed = self._findings.departed
        if self._verdict.kind is Kind.FOREIGN_TERMINATE:
            if len(departed) == 1:
                return self._process(Role.INTRUDER, departed[0], Evidence.SOCKET_HOLDER)
        elif self._verdict.reason == AFTER_END:
            if len(survivors := self._findings.survivors) == 1:
                return self._process(Role.INTRUDER, survivors[0], Evidence.SOCKET_HOLDER)
        elif self._verdict.kind is Kind.TLS_CORRUPTION:
            pass  # it takes two, and who is left has as much right to it
        elif (sole := self._findings.sole_holder) is not None:
            return self._process(self._user(sole.pid), sole, Evidence.SOLE_HOLDER)
        return Culprit(Role.INTRUDER, None, None, Evidence.UNKNOWN, None)

    def _sender(self, role: Role, sender: Sender) -> Culprit:
        evidence = sender_evidence(sender, self._findings)
        process = self._known.get(sender.pid)
        if sender.tid is not None:
            return self._thread(role, sender.pid, process, evidence, sender.tid, evidence)
        return self._of(role, sender.pid, process, evidence)

    def _process(self, role: Role, process: Process, evidence: Evidence) -> Culprit:
        return self._of(role, process.pid, process, evidence)

    def _of(self, role: Role, pid: int, process: Process | None, evidence: Evidence) -> Culprit:
        """A process, with the thread that is meant if that can be told. Who opened it is about a time long ago."""
        restless = self._findings.restless.get(pid)
        if role is Role.INTRUDER and restless:
            # Another thread than the one that waits: which, is known only if no other has run meanwhile.
            if len(restless) == 1:
                return self._thread(role, pid, process, evidence, next(iter(restless)), Evidence.ONLY_THREAD)
        elif role is not Role.OWNER:
            waiting = self._waiting.get(pid, [])
            fresh = [one for one in waiting if one.sleep not in self._findings.before]
            author = self._verdict.author
            sent = role is Role.INTRUDER if author is None else pid == author.pid
            meant = fresh if sent and len(waiting) > 1 else waiting
            only = self._findings.only_threads.get(pid)
            if len(meant) == 1 and (only is not None or len(waiting) > 1 or not self._may_be_the_requester(role)):
                return self._thread(role, pid, process, evidence, meant[0].thread.tid, Evidence.THREAD_SAMPLE)
            if only is not None and not waiting:
                return self._thread(role, pid, process, evidence, only.thread.tid, Evidence.ONLY_THREAD)
        return Culprit(role, pid, None, evidence, process, runtime=self._findings.runtimes.get(pid))

    def _may_be_the_requester(self, role: Role) -> bool:
        """Whether who waits may have sent the request that is being answered, and another one what is judged.

        With libpq both would wait: see :mod:`pgguard.faults.conclude`.
        """
        busy = self._verdict.kind is Kind.REQUEST_WHILE_BUSY
        return role is Role.INTRUDER and busy and self._findings.driver is not Driver.LIBPQ

    def _thread(
        self, role: Role, pid: int, process: Process | None, evidence: Evidence, tid: int, tid_evidence: Evidence
    ) -> Culprit:
        findings = self._findings
        waiting = findings.stacks.again.get((pid, tid))
        if waiting is None:
            waits = findings.waits.threads
            waiting = next((one for one in waits if (one.thread.pid, one.thread.tid) == (pid, tid)), None)
        only = findings.sleeps.get((pid, tid)) or findings.only_threads.get(pid)
        name = waiting.name if waiting is not None else findings.thread_names.get((pid, tid))
        if name is None and tid == pid and process is not None:
            name = process.name  # comm(5) of a process is that of its main thread
        sleep = waiting.sleep if waiting is not None else only or findings.restless.get(pid, {}).get(tid)
        stack, problem = self._stack(pid, sleep)
        if sleep is not None:
            name = findings.stacks.names.get(sleep, name)
        return Culprit(
            role,
            pid,
            tid,
            evidence,
            process,
            tid_evidence=tid_evidence,
            thread_name=name,
            system_call=waiting.call if waiting is not None else None if only is None else findings.calls.get(only),
            stack=stack,
            stack_problem=problem,
            runtime=findings.runtimes.get(pid),
        )

    def _stack(self, pid: int, sleep: Sleep | None) -> tuple[tuple[Frame, ...] | None, str | None]:
        findings = self._findings
        frames = None if sleep is None else findings.stacks.frames.get(sleep)
        if frames is not None:
            return frames, None
        runtime = findings.runtimes.get(pid)
        if self._verdict.by is not Party.CLIENT or runtime is None or runtime.language not in _LEGIBLE:
            return None, None
        return None, findings.stacks.problems.get(pid, _TOO_LATE)

    def _closer(self) -> Culprit | None:
        findings = self._findings
        pid = last_holder(self._verdict, findings)
        fate = findings.fate
        cut_off = findings.was_reset and fate is not None and fate.has_socket
        if pid is None or cut_off:
            return None
        alone = findings.sole_holder or findings.last_sole_holder
        was_alone = alone is not None and alone.pid == pid
        evidence = Evidence.SOLE_HOLDER if was_alone else Evidence.SOCKET_HOLDER
        return self._of(Role.CLOSER, pid, self._known.get(pid), evidence)


def _text_of(request: RequestSeen, culprit: Culprit) -> bytes | None:
    """The text of a request that a culprit has sent, if there is all of it."""
    sender = request.sender
    if sender is None or request.sql_cut or sender.pid != culprit.pid:
        return None
    is_own = sender.tid is None or culprit.tid is None or sender.tid == culprit.tid
    return request.sql if is_own else None


def last_holder(verdict: Verdict, findings: Findings) -> int | None:
    """The pid of the only process that can have had a connection open when it ended, if there is but one.

    Args:
        verdict: on the connection's end.
        findings: what is known.
    """
    opener = findings.opener_pid
    last = {process.pid for process in (*findings.departed, *(findings.holders or ()))}
    if opener is not None and last and opener not in last:
        # It had let go before, so that it isn't the last.
        return last.pop() if len(last) == 1 else None
    pids = set(known_processes(findings)) | {sender.pid for sender in verdict.requesters}
    pids.update(request.sender.pid for request in verdict.requests if request.sender is not None)
    if verdict.intruder is not None:
        pids.add(verdict.intruder.pid)
    if opener is not None:
        pids.add(opener)
    return pids.pop() if len(pids) == 1 else None


def known_processes(findings: Findings) -> dict[int, Process]:
    """Every process that was looked at, by pid.

    Should a pid have been reused, the present process wins over the remembered opener.
    """
    known: dict[int, Process] = {}
    if findings.opener is not None:
        known[findings.opener.pid] = findings.opener
    known.update((process.pid, process) for process in findings.departed)
    known.update((process.pid, process) for process in findings.survivors)
    known.update((process.pid, process) for process in findings.holders or ())
    known.update(findings.senders)
    return known


def _opener_evidence(findings: Findings) -> Evidence:
    return findings.opener_evidence if findings.connected is None else _KERNEL


def _client_did_it(verdict: Verdict) -> bool:
    message = verdict.message
    return verdict.by is Party.CLIENT and message is not None and message.direction is Direction.FRONTEND


def _declared(findings: Findings) -> Culprit:
    """The client of a session whose process can't be looked at: on another host, where its pid means something."""
    pid = findings.declared.get("pid", "")
    number = int(pid) if pid.isascii() and pid.isdigit() else None
    return Culprit(Role.OWNER, number, None, Evidence.DECLARED, None, declared=findings.declared)


def tell_story(findings: Findings, opened_at: float) -> tuple[Chapter, ...]:
    """How the socket came to be where it is: who opened it, who inherited it from whom, who has let go of it.

    Args:
        findings: what is known.
        opened_at: when the connection was opened, in seconds since the epoch.
    """
    opener = findings.opener_pid
    chapters = []
    if opener is not None:
        evidence = _opener_evidence(findings)
        chapters.append(Chapter(Event.OPENED, opened_at, opener, None, evidence, findings.opening_stack))
    holders = findings.holders or ()
    had_it = {process.pid for process in (*holders, *findings.departed)} | ({opener} if opener is not None else set())
    evidence = Evidence.SOCKET_HOLDER if findings.sole_holder is None else Evidence.SOLE_HOLDER
    others = {process.pid: process for process in (*findings.departed, *holders) if process.pid != opener}
    for process in sorted(others.values(), key=lambda process: process.started)[:CHAPTERS]:
        if process.started_at < opened_at - _TICK:
            if opener is not None:  # otherwise it may have opened it itself
                chapters.append(Chapter(Event.RECEIVED, None, process.pid, None, evidence))
        else:
            parent = process.ppid if process.ppid in had_it else None
            chapters.append(Chapter(Event.INHERITED, process.started_at, process.pid, parent, evidence))
    gone = {process.pid for process in findings.departed}
    if opener is not None and findings.holders is not None and all(opener != holder.pid for holder in holders):
        gone.add(opener)
    chapters.extend(Chapter(Event.LEFT, None, pid, None, Evidence.SOCKET_HOLDER) for pid in sorted(gone)[:CHAPTERS])
    return tuple(chapters)
