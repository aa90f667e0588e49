"""Taking the evidence that a verdict is ruled on, in a worker thread and against the clock."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from pgguard.attribution.declared import declared
from pgguard.attribution.evidence import Driver
from pgguard.attribution.findings import Findings
from pgguard.attribution.ruby.pipes import NOT_ASKED
from pgguard.attribution.runtime import Language
from pgguard.attribution.stacks import Stacks, Wanted
from pgguard.attribution.threads import Waits
from pgguard.faults.build import build_fault
from pgguard.faults.conclude import conclude
from pgguard.faults.culprits import MOST, known_processes, last_holder
from pgguard.faults.policy import Action
from pgguard.faults.sql import SqlMode
from pgguard.proxy.losses import Loss, spared
from pgguard.proxy.rollcall import count
from pgguard.session.verdicts import AFTER_END, Direction, Kind, Party

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pgguard.attribution.evidence import Process
    from pgguard.attribution.stacks import StackReader
    from pgguard.attribution.threads import Sleep
    from pgguard.attribution.witness import Opening, Witness
    from pgguard.faults.docket import Docket
    from pgguard.faults.fault import Fault
    from pgguard.proxy.postponed import LateStacks
    from pgguard.proxy.rollcall import Counted
    from pgguard.proxy.session import ProxiedSession
    from pgguard.session.verdicts import Verdict

_WAITING_BUDGET: Final = 0.005
"""Seconds for which a culprit is given to come from its send to its wait."""
_STAYING_BUDGET: Final = 0.02
"""Seconds for which a process is given to close a connection that it has said Terminate on."""
_SMALL: Final = 16384
"""Bytes of a message that are read at once: far less than a socket's buffer."""
_ENDING_BUDGET: Final = 0.15
"""Seconds for which a process that has closed a connection is given to end as well: an interpreter that ends closes its
sockets a moment before."""
_DESCRIBED: Final = 6
"""Processes of which it is looked at what they run and what their only thread does."""
_LAST_WORDS: Final = 0.01
"""Seconds that are left, when the stacks have been read, for what was found to be taken over."""
_STACKED: Final = 2
"""Processes whose stacks are read, both sides of a fault: more of them at once would have none in time."""
_NOT_AMONG_THEM: Final = "only two processes' stacks are read for a fault"
_COMING_BUDGET: Final = 0.03
"""Seconds for which a culprit is given to come to its wait where stacks are read anyway, which takes as long."""
_RETURNING: Final = 0.5
"""Of the budget, for how long a thread that has got its answer is given to wait for the connection again."""

_SHOWN_BY_EVIDENCE: Final = frozenset({Kind.REQUEST_WHILE_BUSY, Kind.FOREIGN_TERMINATE})
"""Kinds that evidence may make another one of, or none at all."""
_READ_BY_CLIENTS: Final = frozenset(Kind) - {
    Kind.UNCLEAN_CLOSE,
    Kind.CONNECTION_EXHAUSTION,
    Kind.IDLE_IN_TRANSACTION,
    Kind.UNTRACKED,
}
"""Kinds for which it matters which threads wait on the connection."""


@dataclass(slots=True)
class Evidence:
    """What an investigation has found so far; read whole by whoever stops waiting for it.

    The investigation writes here and nowhere else: it may go on when nobody waits for it any more.
    """

    findings: Findings
    met: dict[int, Process] = field(default_factory=dict)
    """By pid, the senders that it has looked at for the first time."""
    asleep: frozenset[Sleep] = frozenset()
    """The threads that it has seen to be blocked on the connection."""
    late: LateStacks | None = None
    """Where those stacks are put that there was no time for; ``None``: they are left out."""

    def keep(self, session: ProxiedSession) -> None:
        """Remember with the session what matters later on too. On trio's thread."""
        session.remember(dict(self.met))
        session.sightings.asleep |= self.asleep


def known_at_once(session: ProxiedSession, verdict: Verdict) -> Findings:
    """What is known of a session's client without looking: who opened it too, where the kernel has named that."""
    senders = dict(session.senders)
    opening = session.opening
    # When there is time for a look it may be forgotten who had it open, and the opener would pass for the only one.
    departed = session.sightings.late_holders() if verdict.kind is Kind.UNCLEAN_CLOSE else ()
    if opening is None:
        return Findings(connected=session.connected, senders=senders, driver=session.driver, departed=departed)
    runtimes = {} if opening.opener is None else {opening.opener.pid: opening.runtime}
    heirs = _seen_heirs(session, verdict)
    return Findings(
        opener=opening.opener,
        opener_evidence=opening.evidence,
        connected=opening.connected,
        holders=heirs or None,
        holders_complete=not heirs,
        senders=senders,
        driver=session.driver,
        runtimes=runtimes,
        last_sole_holder=session.last_sole_holder,
        survivors=session.sightings.survivors,
        departed=departed,
        opening_stack=session.opening_stack,
    )


def _seen_heirs(session: ProxiedSession, verdict: Verdict) -> tuple[Process, ...]:
    """Who has an inherited connection open: that was seen a moment ago, as without it there would be no verdict."""
    return session.sightings.holders if verdict.kind is Kind.INHERITED_CONNECTION else ()


class Investigation:
    """Looks at the processes behind one session.

    What is quick and matters most comes first, so that it is there even if the rest comes too late.

    Args:
        witness: attribution.
        session: the session; what the verdict is about is held.
        verdict: what is being judged.
        evidence: where what is found is put, piece by piece.
        counted: of a connection-exhaustion, the sessions that count toward the limit.
        budget: seconds in which it has to be done, from its beginning.
        docket: knows the causes that need no stacks any more.
        account: is told how much of a processor's time reading stacks takes.
    """

    def __init__(
        self,
        witness: Witness,
        session: ProxiedSession,
        verdict: Verdict,
        evidence: Evidence,
        counted: Sequence[Counted],
        budget: float,
        docket: Docket,
        account: Callable[[float], None],
    ) -> None:
        self._witness = witness
        self._session = session
        self._verdict = verdict
        self._evidence = evidence
        self._counted = counted
        self._budget = budget
        self._docket = docket
        self._account = account
        self._late = evidence.late
        self._is_early = False
        self._ends = time.monotonic() + budget
        self._since: float | None = None
        self._stacks = True

    def begin(self, since: float | None, *, stacks: bool = True) -> None:
        """Set it up: the time for it begins now.

        Args:
            since: where others wait to have theirs taken, when the verdict fell, in seconds of time.monotonic(). What
                has been seen for any of them since then holds for this one as well, and nothing is waited for.
            stacks: whether there may be stacks.
        """
        self._ends = time.monotonic() + self._budget
        self._since = since
        self._stacks = stacks and since is None and self._verdict.by is Party.CLIENT
        is_certain = self._verdict.kind not in _SHOWN_BY_EVIDENCE and self._verdict.reason != AFTER_END
        self._is_early = self._stacks and is_certain and not self._docket.has_any(self._verdict.kind)

    def note_known(self) -> None:
        """Take over what is known by now of the session's client without looking."""
        findings, known = self._findings, known_at_once(self._session, self._verdict)
        self._findings = replace(
            known,
            senders={**self._evidence.met, **known.senders},
            departed=tuple(dict.fromkeys((*findings.departed, *known.departed))),
            holders=findings.holders,
            holders_complete=findings.holders_complete,
            thread_names=findings.thread_names,
        )

    def look_at_named(self) -> None:
        """Look at the processes that the kernel has named, as the opener or as senders: it takes a millisecond at most.

        How many others there are on the machine makes no difference, so that this is there when they all have started
        a moment ago, or nobody has had the time yet to find out who opened the connection.
        """
        self._look_at_senders()
        client, connected = self._session.client_socket, self._session.connected
        if client is None or connected is None:
            return
        intruder = self._verdict.intruder
        heirs = _seen_heirs(self._session, self._verdict)
        named = [connected[0], *self._named(), *(process.pid for process in heirs[: MOST + 1])]
        holders = self._witness.holding(client, named, since=self._since)
        opening = self._session.opening
        if not holders and intruder is not None and opening is not None:
            # For want of descriptors nothing may be to be seen, but for what was seen before.
            holders = self._witness.still_holding(opening)
        # That somebody is alone with the connection can't be seen like this.
        if any(intruder is None or holder.pid != intruder.pid for holder in holders):
            self._findings = replace(self._findings, holders=holders, holders_complete=False)

    def investigate(self) -> None:
        """Look at everything, until there is nothing more to be found or the time is up."""
        opening = self._session.opening
        unnamed = self._verdict.kind is Kind.FOREIGN_TERMINATE and self._verdict.intruder is None
        if unnamed and opening is not None and self._witness.has_closed(opening):
            return
        # Whoever says goodbye on its way out is gone in a moment.
        heirs = self._witness.heirs_of(opening) if unnamed and opening is not None else ()
        self.look_at_named()
        if opening is None:
            return
        with self._witness.stack_reader(opening, self._account) as reader:
            if self._is_early:
                # It takes longer than all the rest, and is done beside it where it is going to be told for certain.
                for process, tids in self._named_threads()[:_STACKED]:
                    reader.begin(process, tids)
                if self._late is not None:
                    self._late.begin()
            self._look_around(opening, unnamed=unnamed, heirs=heirs)
            # What is ruled on by now isn't news any more.
            if self._stacks and ((self._late is not None and self._late.is_awaited) or self._is_news()):
                self._look_at_stacks(reader)

    def _look_around(self, opening: Opening, *, unnamed: bool, heirs: Sequence[Process]) -> None:
        self._look_at_holders(opening)
        if unnamed:
            self._look_for_the_closer(opening, heirs)
        if self._verdict.kind is Kind.UNCLEAN_CLOSE:
            self._look_at_the_closer(opening)
        if self._verdict.kind is Kind.TLS_CORRUPTION:  # who has found it may have given up by now
            self._findings = replace(self._findings, departed=self._gone(self._session.sightings.late_holders()))
        if self._verdict.kind is Kind.CONNECTION_EXHAUSTION:
            self._count_connections()
        if self._verdict.by is Party.CLIENT:
            self._look_at_threads(opening)
        self._look_at_programs()

    def _is_news(self) -> bool:
        """Whether it is the first fault of its cause; if that can't be told, it may be."""
        found, is_news = self._findings, True
        with spared(Loss.EVIDENCE, self._session):
            concluded = conclude(self._verdict, found)
            is_news = False
            if concluded is not None:
                is_news = self._docket.is_new(concluded, self._outline(concluded, found))
        return is_news

    def _outline(self, verdict: Verdict, findings: Findings) -> Fault:
        """The fault, as far as its cause depends on it."""
        facts = self._session.facts()
        return build_fault(verdict, facts, findings, at=0.0, action=Action.LOGGED, sql_mode=SqlMode.NONE)

    @property
    def _findings(self) -> Findings:
        return self._evidence.findings

    @_findings.setter
    def _findings(self, findings: Findings) -> None:
        self._evidence.findings = findings

    def _look_at_senders(self) -> None:
        for pid in self._named():
            if pid not in self._session.senders:
                process = self._witness.sender(pid)
                if process is not None:
                    self._evidence.met[pid] = process
        self.note_known()
        self._findings = replace(self._findings, thread_names=self._thread_names())

    def _thread_names(self) -> dict[tuple[int, int], str]:
        names = {}
        for sender in (self._verdict.intruder, *self._verdict.requesters):
            if sender is not None and sender.tid is not None:
                name = self._witness.thread_name(sender.pid, sender.tid)
                if name is not None:
                    names[sender.pid, sender.tid] = name
        return names

    def _look_at_holders(self, opening: Opening) -> None:
        session = self._session
        protocol = session.protocol
        # Of a text that was cut off the end isn't known, where comments stand.
        requests = self._verdict.requests
        texts = [request.sql for request in requests if request.sql is not None and not request.sql_cut]
        self._findings = replace(
            self._witness.findings(opening, tuple(self._findings.senders.values()), since=self._since),
            before=session.sightings.asleep,
            throughout=session.sightings.throughout if self._is_small() else frozenset(),
            watchers=session.sightings.watchers,
            survivors=session.sightings.survivors,
            departed=self._findings.departed,
            last_sole_holder=session.last_sole_holder,
            opening_stack=session.opening_stack,
            declared=declared(None if protocol is None else protocol.application_name, texts),
            driver=self._driver(),
            runtimes=self._findings.runtimes,
            thread_names=self._findings.thread_names,
        )

    def _driver(self) -> Driver:
        """What speaks on the connection, unless one of its threads reads whatever comes: pg8000 has none that does."""
        driver = self._findings.driver
        return Driver.UNKNOWN if driver is Driver.PYTHON and self._session.sightings.watchers else driver

    def _look_for_the_closer(self, opening: Opening, heirs: Sequence[Process]) -> None:
        """Somebody has said Terminate, and it isn't known who."""
        libpq = self._findings.driver is Driver.LIBPQ
        stays = libpq and self._witness.stays(opening, seconds=_STAYING_BUDGET)
        departed = self._gone((*self._session.sightings.late_holders(), *heirs))
        self._findings = replace(self._findings, opener_stays=stays, departed=departed)

    def _look_at_the_closer(self, opening: Opening) -> None:
        """Find out what has become of who had a connection open that has ended, and tell it from being cut off."""
        departed = self._gone((*self._findings.departed, *self._session.sightings.late_holders()))
        self._findings = replace(self._findings, departed=departed, was_reset=self._session.client_gone)
        pid = last_holder(self._verdict, self._findings)
        if pid is not None and self._verdict.message is None:
            process = known_processes(self._findings).get(pid)
            since = time.monotonic() if self._since is None else self._since
            seconds = max(0.0, since + _ENDING_BUDGET - time.monotonic())
            fate = self._witness.fate(opening, pid, process, seconds=seconds)
            self._findings = replace(self._findings, fate=fate)

    def _gone(self, once: Sequence[Process]) -> tuple[Process, ...]:
        """Those of the processes that had the socket open once and haven't any more."""
        still = {process.pid for process in self._findings.holders or ()}
        return tuple({process.pid: process for process in once if process.pid not in still}.values())

    def _count_connections(self) -> None:
        shares, slots = count(self._witness, self._counted)
        self._findings = replace(self._findings, shares=shares, slots=slots)

    def _look_at_threads(self, opening: Opening) -> None:
        holders = self._findings.holders or ()
        if self._verdict.kind in _READ_BY_CLIENTS and holders:
            budget = _COMING_BUDGET if self._is_early and self._awaits_answer() else _WAITING_BUDGET
            seconds = budget if self._since is None else 0.0
            waits = self._witness.waits(opening, holders, enough=self._is_enough, seconds=seconds)
            self._evidence.asleep |= {one.sleep for one in waits.threads}
            self._findings = replace(self._findings, waits=self._with_earlier(waits))
            if self._verdict.kind is Kind.REQUEST_WHILE_BUSY and any(
                one.sleep in self._findings.throughout for one in waits.threads
            ):
                self._look_who_has_run()
        involved = {process.pid: process for process in holders}
        involved |= {pid: process for pid, process in self._findings.senders.items() if pid in self._named()}
        only = self._witness.only_threads(list(involved.values())[:_DESCRIBED])
        self._findings = replace(self._findings, only_threads=only)
        if self._verdict.kind is Kind.UNREAD_ANSWER:
            self._look_elsewhere()

    def _look_elsewhere(self) -> None:
        """See what the threads do that have sent and don't read."""
        processes = known_processes(self._findings)
        senders = [sender for sender in (self._verdict.intruder, *self._verdict.requesters) if sender is not None]
        sleeps = self._witness.sleeps_by_thread(
            (processes[sender.pid], sender.tid)
            for sender in dict.fromkeys(senders)
            if sender.tid is not None and sender.pid in processes
        )
        calls = self._witness.system_calls([*sleeps.values(), *self._findings.only_threads.values()])
        self._findings = replace(self._findings, sleeps=sleeps, calls=calls)

    def _is_small(self) -> bool:
        """Whether the message that is judged has been read at once, and left the client's socket room to write."""
        message = self._verdict.message
        return message is not None and message.size <= _SMALL

    def _look_who_has_run(self) -> None:
        """A thread has been asleep since before a request was sent, which so is another one's."""
        sole = self._findings.sole_holder
        if sole is not None:
            restless = self._witness.restless(sole, self._findings.throughout)
            names = {(sole.pid, tid): name for tid in restless if (name := self._witness.thread_name(sole.pid, tid))}
            self._findings = replace(
                self._findings,
                restless={sole.pid: restless},
                thread_names={**self._findings.thread_names, **names},
            )

    def _with_earlier(self, waits: Waits) -> Waits:
        """Add the threads that the verdict names and that waited a moment ago, if they don't any more."""
        seen = {(one.thread.pid, one.thread.tid) for one in waits.threads}
        named = {(sender.pid, sender.tid) for sender in (self._verdict.intruder, *self._verdict.requesters) if sender}
        earlier = [
            one for one in self._session.sightings.waits.threads if (one.thread.pid, one.thread.tid) in named - seen
        ]
        return Waits((*waits.threads, *earlier), waits.obstacles)

    def _named(self) -> list[int]:
        senders = (self._verdict.intruder, *self._verdict.requesters)
        return list(dict.fromkeys(sender.pid for sender in senders if sender is not None))

    def _is_enough(self, waits: Waits) -> bool:
        """Whether those have come to wait of whom that is to be expected."""
        verdict = self._verdict
        if verdict.message is None or verdict.kind not in (Kind.SHARED_BY_PROCESSES, Kind.REQUEST_WHILE_BUSY):
            return True
        waiting = [one for one in waits.threads if one.readable]
        if verdict.intruder is None or verdict.kind is Kind.REQUEST_WHILE_BUSY:
            return len(waiting) > 1
        return any(one.thread.pid == verdict.intruder.pid for one in waiting)

    def _look_at_programs(self) -> None:
        known = known_processes(self._findings)
        known |= {share.process.pid: share.process for share in self._findings.shares or () if share.process}
        order = dict.fromkeys([*self._named(), *known])
        described = [known[pid] for pid in order if pid in known][:_DESCRIBED]
        runtimes = {**self._findings.runtimes, **self._witness.runtimes(described)}
        self._findings = replace(self._findings, runtimes=runtimes)
        if not self._witness.asks_ruby:
            ruby = [pid for pid, runtime in runtimes.items() if runtime.language is Language.RUBY]
            self._findings = replace(self._findings, stacks=Stacks(problems=dict.fromkeys(ruby, NOT_ASKED)))

    def _look_at_stacks(self, reader: StackReader) -> None:
        wanted = self._wanted()
        if not wanted:
            return
        until = self._ends - _LAST_WORDS
        returning = self._ends - self._budget * (1 - _RETURNING) if self._awaits_answer() else 0.0
        others = known_processes(self._findings).keys() - {process.pid for process, _ in wanted}
        problems = {**dict.fromkeys(others, _NOT_AMONG_THEM), **self._findings.stacks.problems}
        for stacks in reader.read(wanted, until=until, returning=returning):
            self._note_stacks(stacks, problems)
        # Who was on its way to its sleep before is in it by now.
        unseen = [process for process, _ in wanted if process.pid not in self._findings.only_threads]
        only = {**self._findings.only_threads, **self._witness.only_threads(unseen)}
        self._findings = replace(self._findings, only_threads=only)
        late = self._late
        if late is None:
            return
        if late.is_wanted and reader.has_any_left:
            late.begin()
            until = self._ends + late.seconds - _LAST_WORDS
            for stacks in reader.read_on(until=until, is_wanted=lambda: late.is_wanted):
                self._note_stacks(stacks, problems)
        late.deliver(self._findings.stacks)

    def _note_stacks(self, stacks: Stacks, problems: Mapping[int, str]) -> None:
        told = replace(stacks, problems={**problems, **stacks.problems})
        self._findings = replace(self._findings, stacks=told)

    def _awaits_answer(self) -> bool:
        """Whether the message that is judged is one that its sender waits for an answer to."""
        message = self._verdict.message
        return message is not None and message.direction is Direction.FRONTEND and message.type != "X"

    def _named_threads(self) -> list[tuple[Process, list[int]]]:
        """The processes that the verdict names, who did it first, with those of their threads that it names."""
        known = known_processes(self._findings)
        senders = [sender for sender in (self._verdict.intruder, *self._verdict.requesters) if sender is not None]
        return [
            (known[pid], [one.tid for one in senders if one.pid == pid and one.tid is not None])
            for pid in self._named()
            if pid in known
        ]

    def _wanted(self) -> list[Wanted]:
        """Whose stacks are of interest: those of both sides, and of who else waits, or has nothing else to do."""
        findings = self._findings
        known = known_processes(findings)
        wanted: dict[int, dict[int, Sleep | None]] = {}
        for process, tids in self._named_threads():
            is_alone = not tids and self._witness.has_one_thread(process)  # a first thread has its process's number
            wanted[process.pid] = dict.fromkeys([process.pid] if is_alone else tids)
        seen = [one.sleep for one in findings.waiting]
        seen += [sleep for threads in findings.restless.values() for sleep in threads.values() if sleep is not None]
        seen += [*findings.sleeps.values(), *findings.only_threads.values()]
        for sleep in seen:
            threads, tid = wanted.setdefault(sleep.thread.pid, {}), sleep.thread.tid
            threads[tid] = threads.get(tid) or sleep
        return [Wanted(known[pid], threads) for pid, threads in wanted.items() if threads and pid in known][:_STACKED]
