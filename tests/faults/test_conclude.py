"""What evidence makes of a verdict: what each rule convicts, and the nearest legitimate thing that it spares."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from pgguard.attribution.evidence import Driver, Evidence
from pgguard.attribution.findings import Findings
from pgguard.attribution.runtime import Language
from pgguard.attribution.threads import Obstacle, Waits
from pgguard.faults.catalogue import OVERLAP as OVERLAPPING
from pgguard.faults.conclude import AT_ONCE, HARMLESS_GOODBYES, conclude, readers
from pgguard.identity import Sender
from pgguard.session.verdicts import AFTER_END, Kind, RequestState
from tests.faults.samples import (
    FACTS,
    KERNEL,
    MASTER,
    NOW,
    OUTSTANDING,
    OVERLAP,
    QUERY,
    TERMINATE,
    WORKER_0,
    WORKER_1,
    process,
    verdict,
    waiting,
)

if TYPE_CHECKING:
    from pgguard.attribution.evidence import Process
    from pgguard.attribution.threads import Sleep, Waiting
    from pgguard.session.verdicts import RequestSeen, Verdict

FIRST = waiting(WORKER_0, 4871)
SECOND = waiting(WORKER_0, 4872)
ELSEWHERE = waiting(WORKER_1, 4880)


def sampled(one: Waiting) -> Sender:
    return Sender(one.thread.pid, one.thread.tid, sampled=True)


# Who reads at the same time


@pytest.mark.parametrize(
    ("blocked", "before", "kind", "intruder", "requesters"),
    [
        pytest.param((FIRST, SECOND), (FIRST,), Kind.SHARED_BY_THREADS, SECOND, (FIRST,), id="who came last"),
        pytest.param((SECOND, FIRST), (FIRST,), Kind.SHARED_BY_THREADS, SECOND, (FIRST,), id="in whatever order"),
        pytest.param((FIRST, SECOND), (), Kind.SHARED_BY_THREADS, None, (FIRST, SECOND), id="both are new"),
        pytest.param(
            (FIRST, SECOND), (FIRST, SECOND), Kind.SHARED_BY_THREADS, None, (FIRST, SECOND), id="neither is new"
        ),
        pytest.param(
            (FIRST, ELSEWHERE), (FIRST,), Kind.SHARED_BY_PROCESSES, ELSEWHERE, (FIRST,), id="of two processes"
        ),
        pytest.param(
            (FIRST, SECOND, ELSEWHERE),
            (FIRST, ELSEWHERE),
            Kind.SHARED_BY_PROCESSES,
            SECOND,
            (FIRST, ELSEWHERE),
            id="two threads, and a third one in another process",
        ),
        pytest.param(
            (FIRST, SECOND, ELSEWHERE),
            (FIRST,),
            Kind.SHARED_BY_PROCESSES,
            None,
            (FIRST, SECOND, ELSEWHERE),
            id="two of three are new",
        ),
    ],
)
def test_several_that_read_at_once_are_a_fault(
    blocked: tuple[Waiting, ...],
    before: tuple[Waiting, ...],
    kind: Kind,
    intruder: Waiting | None,
    requesters: tuple[Waiting, ...],
) -> None:
    found = readers(blocked, {one.sleep for one in before})
    assert found is not None
    assert found.kind is kind
    assert found.intruder == (None if intruder is None else sampled(intruder))
    assert found.requesters == tuple(sampled(one) for one in requesters)


def test_one_that_woke_and_waits_again_is_the_last_to_come() -> None:
    """The same thread in another sleep: it has run in between, so it may have sent."""
    again = waiting(WORKER_0, 4871, switches=2)
    found = readers((again, SECOND), {FIRST.sleep, SECOND.sleep})
    assert found is not None
    assert found.intruder == sampled(again)


@pytest.mark.parametrize("blocked", [(), (FIRST,)])
def test_fewer_than_two_readers_are_no_fault(blocked: tuple[Waiting, ...]) -> None:
    assert readers(blocked, ()) is None


# Requests that overlap

BUSY = verdict(
    Kind.REQUEST_WHILE_BUSY,
    "Query was sent before the answer to request 41 (Q) was complete",
    message=QUERY,
    requests=(OUTSTANDING,),
    open_request=True,
)
BY_TWO_THREADS = replace(BUSY, intruder=Sender(4866, 4872), requesters=(Sender(4866, 4871),))


def seen(
    *threads: Waiting, driver: Driver = Driver.NODE, before: tuple[Sleep, ...] = (), unsure: tuple[int, ...] = ()
) -> Findings:
    obstacles = dict.fromkeys(unsure, Obstacle.NOT_PERMITTED)
    holders = (WORKER_0, WORKER_1)
    return Findings(
        opener=WORKER_0,
        opener_evidence=Evidence.SOLE_HOLDER,
        holders=holders,
        driver=driver,
        waits=Waits(threads, obstacles),
        before=frozenset(before),
    )


def concluded(what: Verdict, findings: Findings) -> Verdict:
    conclusion = conclude(what, findings)
    assert conclusion is not None
    return conclusion


@pytest.mark.parametrize("driver", Driver)
def test_two_that_are_blocked_reading_are_convicted_whatever_the_driver(driver: Driver) -> None:
    found = concluded(BUSY, seen(FIRST, SECOND, driver=driver, before=(FIRST.sleep,)))
    assert (found.kind, found.reason) == (Kind.SHARED_BY_THREADS, AT_ONCE)
    assert (found.intruder, found.requesters) == (sampled(SECOND), (sampled(FIRST),))
    assert (found.message, found.requests, found.open_request) == (QUERY, (OUTSTANDING,), True)


def test_two_processes_that_are_blocked_reading_are_convicted() -> None:
    assert concluded(BUSY, seen(FIRST, ELSEWHERE)).kind is Kind.SHARED_BY_PROCESSES


def test_what_can_not_be_seen_does_not_clear_those_that_can() -> None:
    assert concluded(BUSY, seen(FIRST, SECOND, unsure=(WORKER_1.pid,))).kind is Kind.SHARED_BY_THREADS


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(waiting(WORKER_0, 4872, call="epoll_wait"), id="an event loop with the socket alone in its set"),
        pytest.param(waiting(WORKER_0, 4872, call="epoll_pwait2", others=3), id="an event loop"),
        pytest.param(waiting(WORKER_0, 4872, call="select"), id="a thread that watches for notifications"),
        pytest.param(waiting(WORKER_0, 4872, call="pselect6"), id="the same by another name"),
        pytest.param(waiting(WORKER_0, 4872, others=1), id="a poll that something else ends as well"),
        pytest.param(waiting(WORKER_0, 4872, call="sendto", readable=False, writable=True), id="a thread that writes"),
    ],
)
def test_a_second_thread_that_need_not_take_the_answer_convicts_nobody(other: Waiting) -> None:
    assert conclude(BUSY, seen(FIRST, other)) == BUSY


def test_one_thread_that_waits_convicts_nobody() -> None:
    """A pipelining driver has one reader."""
    assert conclude(BUSY, seen(FIRST)) == BUSY
    assert conclude(BUSY, seen()) == BUSY


@pytest.mark.parametrize("driver", Driver)
def test_requests_of_two_threads_are_a_fault_where_the_driver_multiplexes_none(driver: Driver) -> None:
    found = concluded(BY_TWO_THREADS, seen(driver=driver))
    if OVERLAPPING[driver].may or driver is Driver.LIB_PQ:  # whose goroutines move between threads
        assert found == BY_TWO_THREADS
    else:
        assert found == replace(BY_TWO_THREADS, kind=Kind.SHARED_BY_THREADS)


@pytest.mark.parametrize(
    ("intruder", "requesters"),
    [
        pytest.param(Sender(4866, 4871), (Sender(4866, 4871),), id="the same thread"),
        pytest.param(Sender(4866, 4872), (Sender(4866),), id="one thread isn't known"),
        pytest.param(Sender(4866), (Sender(4866, 4871),), id="the other isn't known"),
        pytest.param(Sender(4867, 4880), (Sender(4866, 4871),), id="two processes are the session core's affair"),
        pytest.param(Sender(4866, 4872), (), id="nobody else has sent"),
        pytest.param(None, (Sender(4866, 4871),), id="the sender isn't known"),
    ],
)
def test_what_may_be_one_threads_own_doing_stays_what_it_is(
    intruder: Sender | None, requesters: tuple[Sender, ...]
) -> None:
    what = replace(BUSY, intruder=intruder, requesters=requesters)
    assert conclude(what, seen(driver=Driver.LIBPQ)) == what


ASLEEP = replace(
    seen(waiting(WORKER_0, 4871, call="recvfrom", within_libpq=False), driver=Driver.PYTHON),
    holders=(WORKER_0,),
    throughout=frozenset({FIRST.sleep}),
    restless={4866: {4872: None}},
)
"""A thread is blocked in recv(2), as it was before the request was sent; another one of its process has run."""


@pytest.mark.parametrize("intruder", [None, Sender(4866)])
def test_who_sleeps_throughout_has_not_sent_and_another_thread_has(intruder: Sender | None) -> None:
    what = replace(BUSY, intruder=intruder)
    found = concluded(what, ASLEEP)
    assert found == replace(what, kind=Kind.SHARED_BY_THREADS, requesters=(sampled(FIRST),))


@pytest.mark.parametrize(
    ("what", "findings"),
    [
        pytest.param(BUSY, replace(ASLEEP, throughout=frozenset()), id="it isn't known since when it sleeps"),
        pytest.param(
            BUSY,
            replace(ASLEEP, throughout=frozenset({waiting(WORKER_0, 4871, switches=2).sleep})),
            id="it has run since it was seen",
        ),
        pytest.param(BUSY, replace(ASLEEP, waits=Waits()), id="it doesn't wait on this connection"),
        pytest.param(BUSY, replace(ASLEEP, watchers=frozenset({FIRST.thread})), id="it reads for others"),
        pytest.param(
            BUSY,
            replace(ASLEEP, waits=Waits((waiting(WORKER_0, 4871, call="epoll_wait", others=2),))),
            id="it waits for other things as well",
        ),
        pytest.param(BUSY, replace(ASLEEP, holders=(WORKER_0, WORKER_1)), id="another process may have sent"),
        pytest.param(BUSY, replace(ASLEEP, holders_complete=False), id="another process may be there"),
        pytest.param(BUSY, replace(ASLEEP, restless={4866: {}}), id="no other thread can have sent"),
        pytest.param(BUSY, replace(ASLEEP, restless={}), id="it wasn't looked at who else can have sent"),
        pytest.param(replace(BUSY, intruder=Sender(4866, 4872)), ASLEEP, id="the kernel has named the thread"),
        pytest.param(replace(BUSY, intruder=Sender(4867)), ASLEEP, id="the kernel has named another process"),
    ],
)
def test_who_may_have_sent_convicts_no_other_thread(what: Verdict, findings: Findings) -> None:
    assert conclude(what, findings) == what


@pytest.mark.parametrize("driver", Driver)
def test_a_sleeping_thread_convicts_no_other_where_the_driver_may_overlap_or_threads_tell_nothing(
    driver: Driver,
) -> None:
    found = concluded(BUSY, replace(ASLEEP, driver=driver))
    overlap = OVERLAPPING[driver]
    assert (found.kind is Kind.SHARED_BY_THREADS) is (not overlap.may and overlap.threads_tell)


# Terminate

OPENED = FACTS.opened_at
OPENER = replace(MASTER, name="ruby")
CHILD = process(4866, 4864, "worker", age=9)

GOODBYE = verdict(Kind.FOREIGN_TERMINATE, message=TERMINATE)


def asked(sender: Sender | None) -> tuple[RequestSeen, ...]:
    return (replace(OUTSTANDING, sender=sender, state=RequestState.ANSWERED),)


STAYED = Findings(
    opener=OPENER,
    opener_evidence=Evidence.SOLE_HOLDER,
    holders=(OPENER,),
    driver=Driver.LIBPQ,
    opener_stays=True,
    departed=(CHILD,),
)
"""The opener sleeps and has the socket open still; its child, which had inherited it, has not any more."""


@pytest.mark.parametrize(
    ("requests", "findings"),
    [
        pytest.param((), STAYED, id="there has been no request"),
        pytest.param(asked(None), STAYED, id="nobody knows who asked last"),
        pytest.param(asked(Sender(4864, 4864, sampled=True)), STAYED, id="the opener asked last"),
        pytest.param(asked(Sender(4866, 4866, sampled=True)), STAYED, id="the child asked last"),
        pytest.param((), replace(STAYED, holders=(OPENER, CHILD), departed=()), id="the child is there still"),
    ],
)
def test_a_goodbye_of_nobody_knows_whom_is_foreign_whatever_has_been(
    requests: tuple[RequestSeen, ...], findings: Findings
) -> None:
    what = replace(GOODBYE, requests=requests)
    assert conclude(what, findings) == what


@pytest.mark.parametrize(
    "findings",
    [
        pytest.param(replace(STAYED, opener_stays=False), id="the opener closes the connection, or may"),
        pytest.param(replace(STAYED, opener=None), id="the opener is not known"),
        pytest.param(Findings(), id="nothing is known"),
        pytest.param(replace(STAYED, departed=()), id="nobody else is known to have had it open"),
        pytest.param(replace(STAYED, opener=replace(OPENER, name="pg_basebackup")), id="a program that does no harm"),
    ],
)
def test_a_goodbye_that_may_be_rightful_is_no_fault(findings: Findings) -> None:
    assert conclude(GOODBYE, findings) is None


NAMED = replace(GOODBYE, intruder=Sender(4866, 4866), requesters=(Sender(4864, 4864),))


@pytest.mark.parametrize(
    ("holders", "foreign"),
    [
        pytest.param((OPENER, CHILD), True, id="the opener has it open"),
        pytest.param((OPENER,), True, id="the opener has it open, and the child not any more"),
        pytest.param((CHILD, WORKER_1), True, id="another child has it open"),
        pytest.param((CHILD,), False, id="nobody else has it open"),
        pytest.param((), False, id="nobody has it open"),
        pytest.param(None, False, id="it isn't known who has it open"),
    ],
)
def test_a_goodbye_of_a_named_process_does_harm_only_to_another_that_has_it_open(
    holders: tuple[Process, ...] | None, foreign: bool
) -> None:
    assert (conclude(NAMED, replace(STAYED, holders=holders, opener_stays=False)) is not None) is foreign


@pytest.mark.parametrize("name", HARMLESS_GOODBYES)
def test_a_named_child_of_a_program_known_to_do_no_harm_is_spared(name: str) -> None:
    findings = replace(STAYED, opener=replace(OPENER, name=name), holders=(OPENER, CHILD))
    assert conclude(NAMED, findings) is None
    assert conclude(NAMED, replace(findings, opener=replace(OPENER, name=f"not_{name}"))) == NAMED


def test_a_named_goodbye_where_it_is_not_known_who_opened_the_connection_is_no_fault() -> None:
    assert conclude(NAMED, replace(STAYED, opener=None)) is None


def test_a_named_goodbye_is_foreign_if_nothing_but_the_openers_pid_is_known() -> None:
    """The kernel has named it, and there was no time to look at it."""
    unseen = replace(STAYED, opener=None, connected=(OPENER.pid, OPENER.pid), opener_stays=False)
    assert conclude(NAMED, replace(unseen, holders=(WORKER_1, CHILD))) == NAMED
    assert conclude(NAMED, replace(unseen, holders=(CHILD,))) is None
    assert conclude(NAMED, replace(unseen, holders=None)) is None


@pytest.mark.parametrize("name", HARMLESS_GOODBYES)
def test_a_program_known_to_do_no_harm_is_spared_if_it_is_known_as_a_holder_alone(name: str) -> None:
    unseen = replace(STAYED, opener=None, connected=(OPENER.pid, OPENER.pid))
    assert conclude(NAMED, replace(unseen, holders=(replace(OPENER, name=name), CHILD))) is None


# Everything else


@pytest.mark.parametrize("kind", sorted(set(Kind) - {Kind.REQUEST_WHILE_BUSY, Kind.FOREIGN_TERMINATE}))
def test_evidence_changes_no_other_verdict(kind: Kind) -> None:
    what = replace(OVERLAP, kind=kind)
    for findings in (Findings(), KERNEL, seen(FIRST, SECOND, ELSEWHERE)):
        assert conclude(what, findings) == what


def test_a_thread_that_only_polls_leaves_the_reading_to_whose_turn_it_is() -> None:
    """It may watch for notifications, and hold a lock when it reads, as the one does that waits within libpq."""
    watcher = waiting(OPENER, 11, within_libpq=False)
    assert readers([waiting(OPENER, 12), watcher], []) is None


def test_ruby_waits_for_libpq_with_a_poll_of_its_own() -> None:
    several = [waiting(OPENER, tid, call="ppoll", within_libpq=False) for tid in (11, 12)]
    found = readers(several, [], language=Language.RUBY)
    assert found is not None
    assert found.kind is Kind.SHARED_BY_THREADS
    assert readers(several, [], language=Language.PYTHON) is None


def test_a_ruby_thread_that_waits_when_no_answer_is_due_is_a_watcher() -> None:
    several = [waiting(OPENER, tid, call="ppoll", within_libpq=False) for tid in (11, 12)]
    assert readers(several, [], language=Language.RUBY, watchers={several[0].thread}) is None


def test_of_two_processes_even_one_that_polls_is_no_bystander() -> None:
    """The contract's words: unless the former user is seen waiting on the socket meanwhile."""
    found = readers([waiting(OPENER, 11), waiting(CHILD, 12, within_libpq=False)], [])
    assert found is not None
    assert found.kind is Kind.SHARED_BY_PROCESSES


def test_threads_that_read_without_polling_count_whatever_the_driver() -> None:
    several = [waiting(OPENER, tid, call="recvfrom", within_libpq=False) for tid in (11, 12)]
    assert readers(several, []) is not None


def test_a_goodbye_on_a_connection_that_no_other_process_ever_had_is_not_foreign() -> None:
    """A driver may leave the socket open when it has said Terminate, and its process may sleep then."""
    alone = replace(STAYED, holders=(OPENER,), departed=())
    assert conclude(replace(GOODBYE, requests=()), alone) is None


# Behind the end

GOES_ON = verdict(Kind.SHARED_BY_PROCESSES, AFTER_END, message=QUERY, requesters=(Sender(4864, sampled=True),))


def test_who_is_named_and_goes_on_behind_anothers_goodbye_shares_the_connection() -> None:
    what = replace(GOES_ON, intruder=Sender(4866, 4866))
    assert conclude(what, Findings()) == what
    assert conclude(what, Findings(opener=replace(OPENER, name="pg_basebackup"))) is None


@pytest.mark.parametrize(
    ("findings", "convicts"),
    [
        pytest.param(Findings(opener=OPENER, holders=(CHILD,)), True, id="the opener has let go"),
        pytest.param(Findings(opener=OPENER, survivors=(CHILD,)), True, id="and so has the other one"),
        pytest.param(Findings(opener=OPENER, holders=(CHILD, WORKER_1)), True, id="there are two others"),
        pytest.param(Findings(opener=OPENER, holders=(OPENER,), survivors=(CHILD,)), False, id="the opener hasn't"),
        pytest.param(Findings(opener=OPENER, holders=(OPENER, CHILD)), False, id="it may be the opener itself"),
        pytest.param(Findings(opener=OPENER), False, id="nobody else is known to have had it open"),
        pytest.param(Findings(holders=(CHILD,)), False, id="the opener isn't known"),
        pytest.param(
            Findings(opener=replace(OPENER, name="pg_basebackup"), holders=(CHILD,)),
            False,
            id="a program that does no harm",
        ),
    ],
)
def test_who_is_not_known_and_goes_on_is_another_than_the_opener_if_that_has_let_go(
    findings: Findings, convicts: bool
) -> None:
    assert conclude(GOES_ON, findings) == (GOES_ON if convicts else None)


class TestTheOpener:
    """It has a right to its connection: it is never the intruder, even where its own message shows the sharing."""

    OPENS = Sender(4864, 4864)
    FORMER = Sender(4866, 4866)
    LATEST = Sender(4867, 4880)
    KNOWN = Findings(opener=OPENER, holders=(OPENER, CHILD))
    RETURNS = verdict(
        Kind.SHARED_BY_PROCESSES,
        "after another process had used the connection in between",
        message=QUERY,
        intruder=OPENS,
        requesters=(LATEST, FORMER),
    )

    def test_that_sends_again_has_been_intruded_upon_by_whoever_used_it_last(self) -> None:
        found = concluded(self.RETURNS, self.KNOWN)
        assert (found.intruder, found.requesters) == (self.LATEST, (self.OPENS, self.FORMER))
        assert (found.author, found.message) == (self.OPENS, QUERY), "it was the opener that sent it all the same"

    def test_is_known_by_its_pid_alone(self) -> None:
        assert concluded(self.RETURNS, Findings(connected=(4864, None))).intruder == self.LATEST

    @pytest.mark.parametrize(
        ("what", "findings"),
        [
            pytest.param(RETURNS, Findings(), id="who opened it isn't known"),
            pytest.param(replace(RETURNS, intruder=FORMER, requesters=(OPENS,)), KNOWN, id="another has sent"),
            pytest.param(replace(RETURNS, kind=Kind.PROTOCOL_VIOLATION), KNOWN, id="it is about the message itself"),
        ],
    )
    def test_otherwise_who_sent_is_the_intruder(self, what: Verdict, findings: Findings) -> None:
        assert conclude(what, findings) == what

    def test_that_waits_beside_another_leaves_only_the_other(self) -> None:
        """A parent that LISTENs, and a child that queries: who came last need not be known."""
        parent, child = Sender(4864, 4864, sampled=True), Sender(4867, 4880, sampled=True)
        at_once = verdict(Kind.SHARED_BY_PROCESSES, AT_ONCE, requesters=(parent, child))
        found = concluded(at_once, self.KNOWN)
        assert (found.intruder, found.requesters, found.author) == (child, (parent,), child)
        found = concluded(replace(at_once, intruder=parent, requesters=(child,)), self.KNOWN)
        assert (found.intruder, found.requesters) == (child, (parent,))

    def test_that_waits_beside_several_leaves_the_one_that_asked_last(self) -> None:
        parent, one, other = (Sender(pid, sampled=True) for pid in (4864, 4866, 4867))
        at_once = verdict(Kind.SHARED_BY_PROCESSES, AT_ONCE, intruder=parent, requesters=(one, other))
        assert concluded(at_once, self.KNOWN).intruder is None, "nothing tells which of them"
        asked = replace(at_once, requests=(OUTSTANDING, replace(OUTSTANDING, n=42, sender=self.LATEST)))
        found = concluded(asked, self.KNOWN)
        assert (found.intruder, found.requesters) == (other, (parent, one))

    def test_whose_threads_wait_at_once_is_judged_by_its_threads(self) -> None:
        at_once = verdict(Kind.SHARED_BY_THREADS, AT_ONCE, intruder=self.OPENS, requesters=(Sender(4864, 9),))
        assert conclude(at_once, self.KNOWN) == at_once


def test_what_the_openers_message_shows_was_done_when_the_other_process_used_the_connection() -> None:
    opener = Sender(4864, 4864)
    asked = (
        replace(OUTSTANDING, n=39, at=NOW - 9, state=RequestState.ANSWERED),
        replace(OUTSTANDING, n=40, at=NOW - 5, state=RequestState.ANSWERED),
        replace(OUTSTANDING, n=41, at=NOW - 4, sender=opener, state=RequestState.ANSWERED),
    )
    by_opener = replace(OVERLAP, intruder=opener, requesters=(Sender(4866, 4871),), requests=asked)
    assert concluded(by_opener, KERNEL).since == NOW - 5
    # So long ago that it isn't known any more when; and what it is the intruder's own message that shows.
    assert concluded(replace(by_opener, requests=asked[2:]), KERNEL).since is None
    assert concluded(replace(OVERLAP, requests=asked), KERNEL).since is None
