"""Repeats and causes: in full at first, rate-limited after that, counted always."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgguard.attribution.evidence import Driver, Process
from pgguard.attribution.findings import Findings, Share, Slots
from pgguard.attribution.frames import Frame
from pgguard.attribution.stacks import Stacks
from pgguard.faults.build import build_instance, family_of, likeness_of
from pgguard.faults.catalogue import Severity
from pgguard.faults.causes import ALIKE, CAUSES, ENDS, FORGOTTEN_AFTER, FULL_RECORDS, PROCESSES, Instance, program
from pgguard.faults.conclude import AT_ONCE
from pgguard.faults.culprits import MOST
from pgguard.faults.docket import EXPLAINED_BY, FAMILIES, FAULTS, FAULTS_PER_SESSION, RENEWAL, Docket
from pgguard.faults.fault import Fault, Role, Spread
from pgguard.faults.policy import Action
from pgguard.faults.sql import SqlMode
from pgguard.identity import Sender
from pgguard.reporting.record import to_record
from pgguard.session.verdicts import Kind, Limit, Party, Refusal, Verdict
from tests.faults.samples import (
    FACTS,
    KERNEL,
    MASTER,
    NOW,
    OVERLAP,
    QUERY,
    WORKER_0,
    WORKER_1,
    asleep,
    fault,
    process,
    verdict,
)


def enter(
    docket: Docket, what: Verdict = OVERLAP, *, session: int = 3, at: float = NOW, findings: Findings = KERNEL
) -> Fault:
    first = fault(what, findings, facts=replace(FACTS, id=session), at=at)
    return docket.enter(what, first).fault


SWAPPED = replace(OVERLAP, intruder=OVERLAP.requesters[0], requesters=(Sender(4867, 4880),))
OTHER_THREAD = replace(OVERLAP, intruder=Sender(4867, 4999))


def test_a_cause_is_told_of_with_the_place_that_comes_to_light_later() -> None:
    docket = Docket()
    first, other = enter(docket), enter(docket, verdict(Kind.IDLE_IN_TRANSACTION))
    docket.complete(replace(first, place="app.py:7 in load_user"))
    places = {told.fault.id: told.fault.place for told in docket.causes()}
    assert places == {first.id: "app.py:7 in load_user", other.id: None}
    again = docket.repeat(3, OVERLAP, at=NOW + 60)
    assert again is not None
    assert (again.repeat_of, again.place) == (first.id, None)


@pytest.mark.parametrize("again", [OVERLAP, SWAPPED, OTHER_THREAD, replace(OVERLAP, message=None, requests=())])
def test_the_same_kind_session_and_processes_are_a_repeat(again: Verdict) -> None:
    docket = Docket()
    first = enter(docket)
    known = docket.known(3, again, at=NOW)
    assert known is not None
    assert known.id == first.id
    assert known.action is first.action


@pytest.mark.parametrize(
    ("session", "other"),
    [
        (4, OVERLAP),
        (3, replace(OVERLAP, kind=Kind.INHERITED_CONNECTION)),
        (3, replace(OVERLAP, settled=True)),
        (3, replace(OVERLAP, intruder=Sender(4868, 4868))),
        (3, replace(OVERLAP, requesters=(*OVERLAP.requesters, Sender(4868)))),
        (3, replace(OVERLAP, intruder=None)),
    ],
)
def test_anything_else_is_news(session: int, other: Verdict) -> None:
    docket = Docket()
    enter(docket)
    assert docket.known(session, other, at=NOW) is None


def test_a_repeat_points_to_the_first_and_leaves_out_its_requests() -> None:
    docket = Docket()
    first = enter(docket)
    again = docket.repeat(3, replace(OVERLAP, message=replace(QUERY, size=99)), at=NOW + 1)
    assert again is not None
    assert (again.id, again.repeat_of, again.suppressed, again.at) == (2, 1, 0, NOW + 1)
    assert again.requests == ()
    assert again.message == QUERY
    assert (again.summary, again.culprits, again.advice) == (first.summary, first.culprits, first.advice)


def test_the_records_of_one_run_have_its_name() -> None:
    docket, another = Docket(), Docket()
    first = enter(docket)
    again = docket.repeat(3, OVERLAP, at=NOW + 60)
    assert again is not None
    assert first.run == again.run != enter(another).run
    assert first.run is not None


def test_repeats_are_rate_limited_and_the_next_record_says_how_many_there_were() -> None:
    docket = Docket(interval=1.0)
    enter(docket)
    times = [0.1, 0.2, 0.99, 1.0, 1.5, 1.9, 3.0]
    records = [docket.repeat(3, OVERLAP, at=NOW + time) for time in times]
    assert [record and (record.id, record.suppressed) for record in records] == [
        None,
        None,
        None,
        (2, 3),
        None,
        None,
        (3, 2),
    ]


def test_a_clock_that_is_set_back_suppresses_nothing_for_ever() -> None:
    docket = Docket()
    enter(docket)
    assert docket.repeat(3, OVERLAP, at=NOW - 3600) is not None


@pytest.mark.parametrize("forward", [86400.0, 56 * 365 * 86400.0])
def test_nor_does_one_that_is_set_forward(forward: float) -> None:
    """A machine whose clock begins in 1970 sets it as soon as it has a network."""
    docket = Docket(interval=1.0)
    enter(docket)
    later = NOW + forward
    assert docket.repeat(3, OVERLAP, at=later) is not None
    assert docket.repeat(3, OVERLAP, at=later + 1) is not None


def test_closing_a_session_accounts_for_what_was_suppressed_and_forgets_it() -> None:
    docket = Docket()
    enter(docket)
    for _ in range(5):
        assert docket.repeat(3, OVERLAP, at=NOW + 0.5) is None
    (last,) = docket.close(3, at=NOW + 0.6)
    # One of the five became this record, four stand behind it.
    assert (last.id, last.repeat_of, last.suppressed) == (2, 1, 4)
    assert docket.known(3, OVERLAP, at=NOW) is None
    assert docket.close(3, at=NOW + 0.7) == []


def test_a_session_without_suppressed_repeats_closes_without_a_word() -> None:
    docket = Docket()
    enter(docket)
    assert docket.close(3, at=NOW) == []
    assert docket.close(99, at=NOW) == []


def test_the_end_of_the_guard_closes_every_session() -> None:
    docket = Docket()
    for session in (3, 4):
        enter(docket, session=session)
        docket.repeat(session, OVERLAP, at=NOW)
    [last] = docket.close_all(at=NOW)
    assert (last.session.id, last.repeat_of, last.suppressed) == (4, 1, 2), "the one of session 3 stands in session 4's"
    assert docket.close_all(at=NOW) == []
    assert docket.known(3, OVERLAP, at=NOW) is None


def test_a_fault_that_is_not_known_can_not_repeat() -> None:
    with pytest.raises(KeyError):
        Docket().repeat(3, OVERLAP, at=NOW)


def test_memory_is_bounded_though_every_child_makes_a_new_fault() -> None:
    """A job runner forks for each job, for weeks, and each child uses the one connection."""
    docket = Docket()
    enter(docket)
    docket.repeat(3, OVERLAP, at=NOW)
    for pid in range(10_000, 10_000 + FAULTS_PER_SESSION):
        enter(docket, replace(OVERLAP, intruder=Sender(pid)))
    assert docket.known(3, OVERLAP, at=NOW) is None
    assert docket.known(3, replace(OVERLAP, intruder=Sender(10_000)), at=NOW) is not None


def test_a_fault_that_keeps_repeating_is_not_the_one_that_is_forgotten() -> None:
    docket = Docket()
    enter(docket)
    for pid in range(10_000, 10_000 + FAULTS_PER_SESSION):
        docket.repeat(3, OVERLAP, at=NOW)
        enter(docket, replace(OVERLAP, intruder=Sender(pid)))
    assert docket.known(3, OVERLAP, at=NOW) is not None


def test_every_time_is_counted_and_the_gravest_come_first() -> None:
    docket = Docket()
    busy = verdict(Kind.REQUEST_WHILE_BUSY)
    enter(docket, busy, findings=replace(KERNEL, driver=Driver.NODE))
    enter(docket)
    enter(docket, session=4)
    for _ in range(10):
        docket.repeat(3, OVERLAP, at=NOW)
    docket.close_all(at=NOW)
    assert docket.counts() == [
        (Kind.SHARED_BY_PROCESSES, Severity.ERROR, Action.LOGGED, 2, 10),
        (Kind.REQUEST_WHILE_BUSY, Severity.WARNING, Action.LOGGED, 1, 0),
    ]


@given(st.lists(st.floats(0, 2, allow_nan=False), max_size=60), st.integers(0, 60))
def test_nothing_is_ever_lost(gaps: list[float], closed_after: int) -> None:
    """Records and what they say was suppressed add up to what happened, wherever the session ends."""
    docket = Docket()
    records: list[Fault] = []
    now = NOW
    for number, gap in enumerate(gaps):
        now += gap
        if number == closed_after:
            records += docket.close(3, at=now)
        records += recorded(docket, OVERLAP, 3, now)
    records += docket.close_all(at=now)
    assert sum(1 + record.suppressed for record in records) == len(gaps)
    assert sorted(record.id for record in records) == list(range(1, len(records) + 1))
    assert sum(count.faults + count.repeats for count in docket.counts()) == len(gaps)


BUSY = verdict(Kind.REQUEST_WHILE_BUSY, intruder=Sender(4867, 4880), requesters=(Sender(4866, 4871),))


def test_what_evidence_has_shown_to_be_a_known_fault_is_known_from_then_on() -> None:
    """The session core says request-while-busy each time; only the first time it takes evidence to know better."""
    docket = Docket()
    first = enter(docket)
    assert docket.known(3, BUSY, at=NOW) is None
    docket.equate(3, BUSY, OVERLAP)
    known = docket.known(3, BUSY, at=NOW)
    assert known is not None
    assert (known.id, known.kind) == (first.id, Kind.SHARED_BY_PROCESSES)
    again = docket.repeat(3, BUSY, at=NOW + 2)
    assert again is not None
    assert (again.repeat_of, again.kind) == (first.id, Kind.SHARED_BY_PROCESSES)


def test_one_fault_by_two_names_is_rate_limited_counted_and_settled_once() -> None:
    docket = Docket()
    enter(docket)
    docket.equate(3, BUSY, OVERLAP)
    for what in (BUSY, OVERLAP, BUSY):
        assert docket.repeat(3, what, at=NOW + 0.5) is None
    (last,) = docket.close(3, at=NOW + 0.6)
    assert (last.repeat_of, last.suppressed) == (1, 2)
    assert docket.counts() == [(Kind.SHARED_BY_PROCESSES, Severity.ERROR, Action.LOGGED, 1, 3)]


def test_a_fault_equated_with_itself_stays_one() -> None:
    docket = Docket()
    enter(docket)
    docket.equate(3, OVERLAP, OVERLAP)
    assert docket.known(3, OVERLAP, at=NOW) is not None


def test_a_fault_can_not_be_equated_with_one_that_is_not_known() -> None:
    docket = Docket()
    enter(docket)
    with pytest.raises(KeyError):
        docket.equate(3, OVERLAP, BUSY)
    with pytest.raises(KeyError):
        docket.equate(4, BUSY, OVERLAP)


def test_a_fault_by_another_name_counts_against_the_bound() -> None:
    docket = Docket()
    enter(docket)
    docket.equate(3, BUSY, OVERLAP)
    for pid in range(10_000, 10_000 + FAULTS_PER_SESSION):
        enter(docket, replace(OVERLAP, intruder=Sender(pid)))
    assert docket.known(3, BUSY, at=NOW) is None


# Refusals: of no session, and renewed

FULL = verdict(Kind.CONNECTION_EXHAUSTION, refusal=Refusal(Limit.ROLE, "app"))
AGAIN = Instance(replace(FACTS, id=9), None, "again", ())


def test_a_refusal_is_known_on_every_session_by_its_limit_whoever_was_refused() -> None:
    docket = Docket()
    first = enter(docket, FULL)
    known = docket.known(4, replace(FULL, requesters=(Sender(1),)), at=NOW + 1)
    assert known is not None
    assert known.id == first.id
    for other in (Refusal(Limit.ROLE, "other"), Refusal(Limit.SERVER), Refusal(None)):
        assert docket.known(3, replace(FULL, refusal=other), at=NOW) is None
    docket.close(3, at=NOW)
    assert docket.known(4, FULL, at=NOW) is not None, "its session has ended, the server is still full"


def test_a_refusal_that_comes_again_says_whom_it_is_about() -> None:
    docket = Docket()
    first = enter(docket, FULL)
    again = docket.repeat(9, FULL, at=NOW + 2, instance=lambda: AGAIN)
    assert again is not None
    assert (again.repeat_of, again.session.id, again.summary, again.culprits) == (first.id, 9, "again", ())
    assert again.reason == first.reason
    assert again.advice == first.advice


def test_nothing_is_made_up_for_a_repeat_that_is_only_counted() -> None:
    """A thousand clients are refused: what it takes to say who they are is spent on the few that are recorded."""
    docket, made = Docket(), []

    def make(number: int) -> Instance:
        made.append(number)
        return AGAIN

    enter(docket, FULL)
    for n in range(100):
        assert docket.repeat(n, FULL, at=NOW + 0.5, instance=partial(make, n)) is None
    assert made == []
    [last] = docket.settle(at=NOW + 1)
    assert (made, last.suppressed, last.summary) == ([99], 99, "again")


def test_a_repeat_says_whom_it_is_by_where_that_may_be_others_than_the_first_time() -> None:
    """A pid that comes back after a while may be another process's."""
    docket = Docket()
    first = enter(docket)
    again = docket.repeat(3, OVERLAP, at=NOW + 1, instance=lambda: AGAIN)
    assert again is not None
    assert (again.summary, again.culprits) == (first.summary, first.culprits)
    again = docket.repeat(3, OVERLAP, at=NOW + 3, instance=lambda: AGAIN, by_others=True)
    assert again is not None
    assert (again.repeat_of, again.summary, again.culprits) == (first.id, "again", ())


def test_what_a_process_has_done_is_news_of_another_one_that_has_its_pid_by_now() -> None:
    docket = Docket()
    enter(docket)
    docket.forget(4, 4867)
    docket.forget(3, 1)
    assert docket.known(3, OVERLAP, at=NOW) is not None
    docket.forget(3, 4867)
    assert docket.known(3, OVERLAP, at=NOW) is None
    enter(docket)
    assert docket.known(3, OVERLAP, at=NOW) is not None
    [told] = docket.causes()
    assert (told.spread.times, told.spread.sessions) == (2, 1), "it is the same session as before"


def test_a_refusal_is_looked_into_anew_after_a_while_and_nothing_uncounted() -> None:
    docket = Docket()
    enter(docket, FULL)
    docket.repeat(9, FULL, at=NOW + 0.5, instance=lambda: AGAIN)
    assert docket.known(9, FULL, at=NOW + RENEWAL - 1) is not None
    assert docket.known(9, FULL, at=NOW + RENEWAL) is None
    [anew] = docket.enter(FULL, fault(FULL, at=NOW + RENEWAL)).records
    assert (anew.id, anew.repeat_of, anew.suppressed) == (2, 1, 1)
    assert anew.summary == fault(FULL).summary, "it is looked into anew, and says what was found"
    assert [(count.faults, count.repeats) for count in docket.counts()] == [(2, 1)]


def test_what_was_suppressed_is_accounted_for_when_it_is_time_to() -> None:
    docket = Docket(interval=1.0)
    enter(docket, FULL)
    for _ in range(3):
        assert docket.repeat(9, FULL, at=NOW + 0.5, instance=lambda: AGAIN) is None
    assert docket.close(9, at=NOW + 0.6) == []
    assert docket.settle(at=NOW + 0.9) == []
    [last] = docket.settle(at=NOW + 1)
    assert last.at == NOW + 0.5, "it says when it was"
    assert (last.repeat_of, last.suppressed, last.session.id) == (1, 2, 9)
    assert docket.close_all(at=NOW + 5) == []


def test_refusals_do_not_pile_up() -> None:
    docket = Docket()
    for n in range(FAULTS_PER_SESSION + 1):
        enter(docket, replace(FULL, refusal=Refusal(Limit.ROLE, str(n))))
    assert docket.known(3, replace(FULL, refusal=Refusal(Limit.ROLE, "0")), at=NOW) is None
    assert docket.known(3, replace(FULL, refusal=Refusal(Limit.ROLE, "1")), at=NOW) is not None


def test_what_is_sent_on_top_of_an_unread_answer_is_no_repeat_of_its_lying_there() -> None:
    """A warning must not keep an error from being rejected."""
    left = verdict(Kind.UNREAD_ANSWER, requesters=(Sender(4866),))
    on_top = replace(left, message=QUERY)
    docket = Docket()
    enter(docket, left)
    assert docket.known(3, left, at=NOW) is not None
    assert docket.known(3, on_top, at=NOW) is None
    enter(docket, on_top)
    assert [count.severity for count in docket.counts()] == [Severity.ERROR, Severity.WARNING]


# Causes, over all sessions

STRANGER = verdict(Kind.PROTOCOL_VIOLATION, by=Party.STRANGER, ends=True)


def recorded(docket: Docket, what: Verdict, session: int, at: float, findings: Findings = KERNEL) -> tuple[Fault, ...]:
    """As the judge does: take note of a fault, whether it is news or not."""
    if docket.known(session, what, at=at) is None:
        return docket.enter(what, fault(what, findings, facts=replace(FACTS, id=session), at=at)).records
    again = docket.repeat(session, what, at=at)
    return () if again is None else (again,)


def test_a_storm_of_sessions_is_recorded_by_its_cause() -> None:
    """Eight bytes of nonsense on each of two thousand connections made 3.2 MB of records in eight seconds."""
    docket = Docket()
    records: list[Fault] = []
    for session in range(1, 2001):
        at = NOW + session * 0.004
        records += recorded(docket, STRANGER, session, at, Findings())
        records += docket.close(session, at=at)
        records += docket.settle(at=at)
    assert len(records) <= FULL_RECORDS + 8 + ENDS
    assert sum(len(json.dumps(to_record(record))) for record in records) < 32_000
    records += docket.close_all(at=NOW + 9)
    assert sum(1 + record.suppressed for record in records) == 2000
    assert [count.faults for count in docket.counts()] == [2000]
    assert [record.id for record in records] == list(range(1, len(records) + 1))
    assert {record.cause for record in records} == {1}
    assert [record.repeat_of for record in records] == [None] * FULL_RECORDS + [1] * (len(records) - FULL_RECORDS)
    assert docket._sessions == {}


def test_what_has_been_looked_into_for_longer_and_so_comes_late_is_no_news() -> None:
    """A fault is as old as its verdict, and evidence takes its time, of some more than of others."""
    docket = Docket()
    records: list[Fault] = []
    for session in range(1, 501):
        records += recorded(docket, STRANGER, session, NOW + session * 0.01 - session % 7 * 0.1, Findings())
    assert len(records) <= FULL_RECORDS + 5
    later = docket.known(500, STRANGER, at=NOW)
    assert later is not None
    assert recorded(docket, replace(FULL, requesters=()), 1, NOW + 1) != ()
    assert docket.known(7, FULL, at=NOW + 0.5) is not None


def test_a_thousand_sessions_that_repeat_are_recorded_no_more_often_than_one() -> None:
    docket = Docket()
    records: list[Fault] = []
    for second in range(1, 11):
        for session in range(1, 1001):
            records += recorded(docket, OVERLAP, session, NOW + second + session / 1001)
    assert len(records) <= FULL_RECORDS + 10
    for session in range(1, 1001):
        records += docket.close(session, at=NOW + 11)
    assert len(records) <= FULL_RECORDS + 10 + ENDS + 1
    records += docket.close_all(at=NOW + 12)
    assert sum(1 + record.suppressed for record in records) == 10_000


def test_a_cause_that_goes_on_for_hours_is_recorded_less_and_less_often() -> None:
    docket = Docket()
    times = [second for second in range(3 * 3600) if recorded(docket, OVERLAP, 3, NOW + second)]
    assert times[:60] == list(range(60))
    assert len(times) < 400
    assert max(later - earlier for earlier, later in itertools.pairwise(times)) <= 3 * 60 + 1


def test_a_repeat_on_another_session_says_which_and_by_whom() -> None:
    docket = Docket()
    for session in range(1, FULL_RECORDS + 1):
        enter(docket, session=session)
    worker = process(5000, 4864, "puma: cluster worker 7: 4864 [app]")
    what = replace(OVERLAP, intruder=Sender(5000, 5000))
    stack = (Frame("work", "app.py", 7),)
    findings = replace(KERNEL, senders={4866: WORKER_0, 5000: worker}, stacks=Stacks({asleep(worker): stack}, {}))
    [again] = recorded(docket, what, 99, NOW + 1, findings)
    assert (again.cause, again.repeat_of, again.suppressed) == (1, 1, 0)
    assert again.session.id == 99
    assert again.summary.startswith("pid 5000 (puma: cluster worker 7) sent Query")
    assert again.culprits[0].pid == 5000
    assert (again.requests, again.story) == ((), ())
    assert all(culprit.stack is None and culprit.stack_problem is None for culprit in again.culprits)
    assert to_record(again)["advice"] is None


CONVERTING = process(4999, 4866, "convert", "/srv/in/holiday.png", "/srv/out/holiday.jpg")
MAILING = {**KERNEL.senders, 4868: process(4868, 4864, "mailer: outgoing")}
OTHERS = replace(KERNEL, senders={4866: WORKER_0, 4867: process(4867, 4864, "sidekiq 7 [app]")})


@pytest.mark.parametrize(
    ("what", "findings", "cause"),
    [
        (OVERLAP, KERNEL, 1),
        (replace(OVERLAP, intruder=Sender(9)), replace(KERNEL, senders={4866: WORKER_0, 9: WORKER_1}), 1),
        (OVERLAP, OTHERS, 2),
        (replace(OVERLAP, kind=Kind.SHARED_BY_THREADS), KERNEL, 2),
        # Who was there before is another one each time.
        (replace(OVERLAP, intruder=OVERLAP.requesters[0], requesters=(Sender(4867, 4880),)), OTHERS, 1),
        (replace(OVERLAP, requesters=(*OVERLAP.requesters, Sender(4868))), replace(KERNEL, senders=MAILING), 1),
        (OVERLAP, replace(KERNEL, opener=WORKER_0), 2),
        # Those who read from it at once have all done it, if it isn't known who came last.
        (replace(OVERLAP, reason=AT_ONCE, intruder=None, requesters=(Sender(4867), Sender(4866))), KERNEL, 1),
        (replace(OVERLAP, reason=AT_ONCE, intruder=None, requesters=(Sender(4864), Sender(4866))), KERNEL, 1),
        # So is who else has the socket open: a subprocess that has nothing to do with it, or many, or nobody seen.
        (OVERLAP, replace(KERNEL, holders=(MASTER, WORKER_0, WORKER_1, CONVERTING)), 1),
        (OVERLAP, replace(KERNEL, holders=None), 1),
        # Nothing but the processes is known, or nothing but the kind.
        (OVERLAP, Findings(), 1),
        (replace(OVERLAP, intruder=Sender(8), requesters=(Sender(9),)), Findings(), 2),
    ],
)
def test_a_cause_is_a_kind_by_the_same_programs_in_the_same_roles(
    what: Verdict, findings: Findings, cause: int
) -> None:
    docket = Docket()
    assert enter(docket).cause == 1
    assert enter(docket, what, session=4, findings=findings).cause == cause


def test_a_warning_of_one_cause_keeps_no_error_from_being_told_in_full() -> None:
    docket = Docket()
    left = verdict(Kind.UNCLEAN_CLOSE, requesters=(Sender(4866),))
    for session in range(1, 10):
        enter(docket, left, session=session)
    [first] = recorded(docket, replace(left, open_request=True), 10, NOW)
    assert (first.severity, first.repeat_of) == (Severity.ERROR, None)


def test_what_is_not_recorded_is_acted_on_and_told_by_the_first_of_its_cause() -> None:
    docket = Docket()
    rejected = fault(action=Action.REJECTED)
    for session in (1, 2):
        docket.enter(OVERLAP, replace(rejected, session=replace(FACTS, id=session)))
    entered = docket.enter(OVERLAP, replace(rejected, session=replace(FACTS, id=50)))
    assert entered.records == ()
    assert (entered.fault.id, entered.fault.action, entered.fault.session.id) == (1, Action.REJECTED, 50)
    assert entered.fault.requests, "the client is told what was outstanding"
    known = docket.known(50, OVERLAP, at=NOW)
    assert known is not None
    assert known.action is Action.REJECTED


def test_what_is_done_for_the_first_time_is_recorded_at_once() -> None:
    docket = Docket()
    enter(docket)
    rejected = fault(action=Action.REJECTED, facts=replace(FACTS, id=9))
    [record] = docket.enter(OVERLAP, rejected).records
    assert (record.action, record.repeat_of) == (Action.REJECTED, 1)
    assert docket.enter(OVERLAP, replace(rejected, session=replace(FACTS, id=10))).records == ()


def test_when_what_is_done_changes_every_fault_is_ruled_on_anew() -> None:
    docket = Docket()
    for session in range(1, 20):
        enter(docket, session=session)
    docket.renew()
    assert docket.known(3, OVERLAP, at=NOW) is None
    rejected = fault(facts=replace(FACTS, id=3), action=Action.REJECTED, at=NOW + 1)
    [anew] = docket.enter(OVERLAP, rejected).records
    assert (anew.repeat_of, anew.suppressed, anew.action) == (1, 18, Action.REJECTED)
    [told] = docket.causes()
    assert (told.spread.times, told.spread.sessions) == (20, 19)


def run_by(n: int, *, pid: int = 1) -> Findings:
    """Of the ``n``-th program, whose name has no number in it."""
    who = process(pid, None, "".join(chr(ord("a") + int(digit)) for digit in str(n)))
    return Findings(opener=who, senders={pid: who})


BY_ONE = verdict(Kind.MESSAGE_WHILE_IDLE, intruder=Sender(1))


def test_causes_are_bounded_whatever_programs_call_themselves() -> None:
    """A client can call itself anew on each connection."""
    docket = Docket()
    records: list[Fault] = []
    for n in range(3000):
        records += recorded(docket, BY_ONE, n, NOW + n * 0.001, run_by(n))
        records += docket.close(n, at=NOW + n * 0.001)
    assert len(docket._causes) == CAUSES + 1
    assert len(records) <= CAUSES + FULL_RECORDS + 3 + ENDS
    overflow = records[-1].cause
    assert [record.cause for record in records].count(overflow) >= FULL_RECORDS
    records += docket.close_all(at=NOW + 4)
    assert sum(1 + record.suppressed for record in records) == 3000
    assert [count.faults for count in docket.counts()] == [3000]


def test_a_cause_that_has_been_quiet_makes_room_and_loses_nothing() -> None:
    docket = Docket()
    enter(docket, BY_ONE, findings=run_by(0))
    docket.repeat(3, BY_ONE, at=NOW + 0.5)
    for n in range(1, CAUSES):
        enter(docket, BY_ONE, session=100 + n, findings=run_by(n))
    later = NOW + 0.5 + FORGOTTEN_AFTER
    last, news = docket.enter(BY_ONE, fault(BY_ONE, run_by(CAUSES), facts=replace(FACTS, id=9), at=later)).records
    assert (last.cause, last.repeat_of, last.suppressed) == (1, 1, 0)
    assert (news.cause, news.repeat_of) == (CAUSES + 1, None)
    assert len(docket._causes) == CAUSES
    # Its session goes on with it all the same, among those that are too many.
    again = docket.repeat(3, BY_ONE, at=later)
    assert again is None or again.repeat_of == 1
    again = docket.repeat(3, BY_ONE, at=later + 1)
    assert again is not None
    assert again.repeat_of == 1
    assert len(docket._causes) == CAUSES + 1


def test_what_is_known_of_all_sessions_together_is_bounded() -> None:
    docket = Docket()
    what = fault()
    for session in range(1, FAULTS + 11):
        docket.enter(OVERLAP, replace(what, session=replace(FACTS, id=session)))
    assert len(docket._sessions) == len(docket._cases) == FAULTS
    assert docket.known(10, OVERLAP, at=NOW) is None
    assert docket.known(11, OVERLAP, at=NOW) is not None
    for session in range(1, FAULTS + 11):
        docket.close(session, at=NOW)
    assert docket._sessions == {}
    assert not docket._cases


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["fault", "fault", "fault", "close", "settle", "renew"]),
            st.integers(1, 12),
            st.integers(0, 3),
            st.floats(-1, 90, allow_nan=False),
        ),
        max_size=80,
    )
)
def test_nothing_is_lost_whatever_sessions_and_causes_there_are(steps: list[tuple[str, int, int, float]]) -> None:
    docket = Docket()
    records: list[Fault] = []
    now, happened = NOW, 0
    for what, session, which, gap in steps:
        now += gap
        if what == "close":
            records += docket.close(session, at=now)
        elif what == "settle":
            records += docket.settle(at=now)
        elif what == "renew":
            docket.renew()
        else:
            happened += 1
            who = Sender(which + 1)
            records += recorded(docket, replace(BY_ONE, intruder=who), session, now, run_by(which, pid=who.pid))
    records += docket.close_all(at=now)
    assert sum(1 + record.suppressed for record in records) == happened
    assert [record.id for record in records] == list(range(1, len(records) + 1))
    assert sum(count.faults + count.repeats for count in docket.counts()) == happened
    firsts = {record.id for record in records if record.repeat_of is None}
    assert {record.repeat_of for record in records} <= firsts | {None}


def test_faults_that_are_ruled_on_out_of_order_are_recorded_no_more_often() -> None:
    docket = Docket()
    records = [
        record
        for session in range(1, 101)
        for record in docket.enter(OVERLAP, fault(facts=replace(FACTS, id=session), at=NOW - session / 1000)).records
    ]
    assert len(records) == FULL_RECORDS


# How far a cause has spread


def by_worker(pid: int) -> tuple[Verdict, Findings]:
    """A fault of one more worker."""
    worker = process(pid, 4864, f"puma: cluster worker {pid}: 4864 [app]")
    return replace(OVERLAP, intruder=Sender(pid)), replace(KERNEL, senders={4866: WORKER_0, pid: worker})


def test_a_repeat_says_how_often_its_cause_has_come_in_how_many_sessions_and_by_how_many_processes() -> None:
    docket = Docket()
    first = enter(docket)
    assert first.spread is None
    for session in range(4, 14):
        what, findings = by_worker(5000 + session)
        enter(docket, what, session=session, findings=findings)
        docket.repeat(session, what, at=NOW)
    again = docket.repeat(3, OVERLAP, at=NOW + 1)
    assert again is not None
    # The first two processes, and one more for each session.
    assert again.spread == Spread(times=22, sessions=11, processes=12, since=NOW)
    [told] = docket.causes()
    assert (told.fault.id, told.spread) == (1, again.spread)


def test_one_session_is_counted_once_whoever_does_it_there() -> None:
    docket = Docket()
    for pid in range(5000, 5010):
        what, findings = by_worker(pid)
        enter(docket, what, findings=findings)
    [told] = docket.causes()
    assert (told.spread.sessions, told.spread.processes, told.spread.times) == (1, 11, 10)


def test_the_processes_of_a_cause_are_not_counted_without_end() -> None:
    docket = Docket()
    for pid in range(5000, 5000 + PROCESSES + 10):
        what, findings = by_worker(pid)
        enter(docket, what, session=pid, findings=findings)
    [told] = docket.causes()
    assert (told.spread.sessions, told.spread.processes) == (PROCESSES + 10, PROCESSES)


def test_each_refusal_is_a_session_of_its_own() -> None:
    docket = Docket()
    enter(docket, FULL)
    for session in range(4, 9):
        docket.repeat(session, FULL, at=NOW, instance=lambda: AGAIN)
    [told] = docket.causes()
    assert (told.spread.times, told.spread.sessions) == (6, 6)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("puma: cluster worker 1: 4864 [app]", "puma: cluster worker 12: 4864 [app]", True),
        ("rq: worker 3f2504e0-4f89-11d3-9a0c-0305e82c3301", "rq: worker 9b2c3d4e-5f60-4a1b-8c9d-0e1f2a3b4c5d", True),
        ("python job.py --id=9f86d081884c7d65", "python job.py --id=60303ae22b998861", True),
        ("python worker.py --queue=mail", "python worker.py --queue=billing", False),
        ("python facade.py", "python decade.py", False),
        ("sidekiq 7.1 app [3 of 5 busy]", "sidekiq 7.1 app [0 of 5 busy]", True),
    ],
)
def test_a_program_is_known_by_what_its_siblings_share(one: str, other: str, same: bool) -> None:
    assert (program([one]) == program([other])) is same


@pytest.mark.parametrize(
    "siblings",
    [
        ["worker-a3f", "worker-9be2", "worker-12", "worker-a3f9c2b1d4"],
        ["/tmp/tmpx3k_9abq/config.ini", "/tmp/tmpabcdefgh/config.ini", "/tmp/tmp______ab/config.ini"],
        ["run /tmp/tmp.Xb3kQzRt9w", "run /tmp/tmp.abcdefghij"],
        ["celery@web-6d4cf56db6-bhtqp", "celery@web-7f9c8b5d4-x2x9z"],
        ["report-28471234-bhtqp", "report-28471295-x2x9z"],
        ["fluent-bh4qp", "fluent-x2x9z"],
        ["01ARZ3NDEKTSV4RRFFQ69G5FAV", "01BX5ZZKBKACTAV9WEVGEMMVS0"],
        ["job V1StGXR8Z5jdHi6BmyT", "job 9fK2ab7LqW3xZp0RtYu"],
        ["--bind=127.0.0.1:8000", "--bind=127.0.0.1:49152"],
        ["worker of web1.example.org", "worker of web22.example.org"],
    ],
)
def test_names_that_are_made_at_random_tell_no_programs_apart(siblings: list[str]) -> None:
    assert len({program(["python", one]) for one in siblings}) == 1


@pytest.mark.parametrize(
    "others",
    [
        ["python db.py", "python web.py", "python h2o.py", "python k8s.py", "python s3fs.py", "python x86.py"],
        ["python /tmp/template.py", "python /tmp/tmpfiles.py", "python /tmp/import.py", "python /tmp/a.py"],
        ["php-fpm: pool www", "php-fpm: pool api"],
        ["gunicorn: master [app]", "gunicorn: worker [app]"],
        ["celery-worker", "celery-beats", "celery-https"],
        ["mail: processing", "billing: processing"],
        ["processing mail", "processing bills"],
    ],
)
def test_words_tell_programs_apart(others: list[str]) -> None:
    assert len({program([one]) for one in others}) == len(others)


@pytest.mark.parametrize(
    "titles",
    [
        [
            "rq:worker:7a3f9c2b1d4e4f5a: *** Listening on default...",
            "rq:worker:7a3f9c2b1d4e4f5a: Forked 4711 at 1795348327",
            "rq:worker:9b2c3d4e5f604a1b: Processing shop.tasks.send_mail from default since 1795348327",
        ],
        [
            "resque-2.6.0: Waiting for default",
            "resque-2.6.0: Forked 4711 at 1795348327",
            "resque-2.6.0: Processing default since 1795348327 [SendMail]",
        ],
        ["sidekiq 7.1.2 shop [3 of 5 busy]", "sidekiq 7.1.2 shop [0 of 5 busy] stopping"],
        ["solid-queue-worker(1.0.0): waiting for jobs in *", "solid-queue-worker(1.0.0): performing 3 jobs in *"],
    ],
)
def test_what_a_process_says_that_it_is_doing_makes_it_no_other_program(titles: list[str]) -> None:
    assert len({program([title]) for title in titles}) == 1
    [same] = {program([title]) for title in titles}
    assert same


def test_long_command_lines_are_told_apart_by_their_end_too() -> None:
    """A class path comes first, and what is run behind it."""
    java = ["java", "-Xmx2g", "-cp", ":".join(f"/opt/shop/lib/{name}.jar" for name in ("jdbc", "slf", "netty") * 40)]
    assert program([*java, "org.example.Orders"]) != program([*java, "org.example.Invoices"])
    assert len(program([*java, "org.example.Orders"])) < 1000


# Faults of which not all is known


def by(pid: int, *cmdline: str) -> tuple[Verdict, Findings]:
    """A fault of one process, or of one that was gone before its command line could be read."""
    who = process(pid, 4864, *cmdline)
    return replace(OVERLAP, intruder=Sender(pid)), replace(KERNEL, senders={4866: WORKER_0, pid: who})


GONE = (replace(OVERLAP, intruder=Sender(5000)), replace(KERNEL, senders={4866: WORKER_0}))


@pytest.mark.parametrize(
    ("what", "findings"),
    [
        GONE,
        by(5000),  # a zombie
        (replace(OVERLAP, intruder=None), KERNEL),  # one of those who have it open
        (OVERLAP, replace(KERNEL, opener=None)),
    ],
)
def test_what_is_less_known_is_no_cause_of_its_own(what: Verdict, findings: Findings) -> None:
    docket = Docket()
    enter(docket)
    [again] = recorded(docket, what, 4, NOW + 1, findings)
    assert (again.cause, again.repeat_of) == (1, 1)
    other = docket.enter(replace(what, kind=Kind.FOREIGN_TERMINATE), fault(replace(what, kind=Kind.FOREIGN_TERMINATE)))
    assert other.fault.cause == 2, "another kind"


def test_advice_that_nothing_special_is_known_for_makes_no_cause_of_its_own() -> None:
    """The runtimes were not looked at in time."""
    docket = Docket()
    special = fault()
    special = replace(special, advice=special.advice._replace(title="Reconnect after forking"))
    docket.enter(OVERLAP, special)
    assert enter(docket, session=4).cause == 1
    copy = replace(special, session=replace(FACTS, id=5), advice=special.advice._replace(title="Do something else"))
    assert docket.enter(OVERLAP, copy).fault.cause == 2


@pytest.mark.parametrize(
    ("what", "findings"),
    [
        GONE,
        by(5000),
        (replace(OVERLAP, intruder=None), KERNEL),
        (OVERLAP, replace(KERNEL, opener=None)),
        (OVERLAP, Findings()),  # nothing, but by the same processes
    ],
)
def test_nor_is_what_is_better_known_than_the_first_was(what: Verdict, findings: Findings) -> None:
    """On a busy machine there was no time to look at the first one's process."""
    docket = Docket()
    [first] = recorded(docket, what, 3, NOW, findings)
    [again] = recorded(docket, OVERLAP, 4, NOW + 1)
    assert (first.cause, first.repeat_of, again.cause, again.repeat_of) == (1, None, 1, first.id)
    assert (again.requests, again.story) == ((), ())
    [told] = docket.causes()
    assert (told.fault.id, told.fault.summary) == (first.id, again.summary), "the end tells of it what is known by then"
    assert (told.spread.times, told.spread.sessions) == (2, 2)
    # Both sessions go on with the one cause, and what is known even less of is no other one.
    for session, of in ((3, what), (4, OVERLAP)):
        repeated = docket.repeat(session, of, at=NOW + 3 + session)
        assert repeated is not None
        assert (repeated.cause, repeated.repeat_of) == (1, 1)
    assert enter(docket, what, session=5, findings=findings).cause == 1
    assert enter(docket, session=6, findings=OTHERS).cause == 2, "that is another program"


def test_what_evidence_tells_of_a_repeat_makes_its_like_familiar() -> None:
    assert FAMILY is not None
    docket = Docket()
    enter(docket, GONE[0], findings=GONE[1])
    docket.enter(OVERLAP, fault(facts=replace(FACTS, id=4)), FAMILY)
    standing = docket.familiar(FAMILY)
    assert standing is not None
    assert standing.id == 1
    docket.enter_familiar(5, replace(OVERLAP, intruder=Sender(6000)), FAMILY, at=NOW, instance=lambda: AGAIN)
    [told] = docket.causes()
    assert (told.spread.times, told.spread.sessions) == (3, 3)


def test_what_may_be_of_several_causes_is_counted_with_the_one_that_came_last_and_names_none_of_its_culprits() -> None:
    docket = Docket()
    assert enter(docket).cause == 1
    assert enter(docket, session=4, findings=OTHERS).cause == 2
    [again] = recorded(docket, GONE[0], 5, NOW + 1, GONE[1])
    assert (again.cause, again.repeat_of) == (2, 2)
    assert [one.process for one in again.culprits if one.role is Role.INTRUDER] == [None]
    assert docket.causes()[0].fault.summary != again.summary
    enter(docket, session=6)
    assert enter(docket, replace(OVERLAP, intruder=Sender(5001)), session=7, findings=GONE[1]).cause == 1


def test_what_has_nothing_in_common_is_not_taken_for_the_same_though_nothing_speaks_against_it() -> None:
    docket = Docket()
    assert enter(docket, GONE[0], findings=GONE[1]).cause == 1
    opened_by_nobody_known = replace(OVERLAP, intruder=Sender(7000), requesters=(Sender(7001),))
    findings = Findings(senders={7000: process(7000, 1, "sidekiq 7 [app]")})
    assert enter(docket, opened_by_nobody_known, session=4, findings=findings).cause == 2


@pytest.mark.parametrize("kind", [Kind.UNREAD_ANSWER, Kind.IDLE_IN_TRANSACTION])
def test_what_the_opener_does_itself_is_not_what_another_one_does_with_its_connection(kind: Kind) -> None:
    docket = Docket()
    own = verdict(kind, requesters=(Sender(4864),))
    assert enter(docket, own).cause == 1
    assert enter(docket, replace(own, requesters=(Sender(4866),)), session=4).cause == 2


PROGRAMS = ("puma: cluster worker [app]", "sidekiq [app]", "mailer")
KNOWN_OR_NOT = st.tuples(
    st.integers(0, 2), st.integers(0, 1), st.booleans(), st.booleans(), st.booleans(), st.integers(1, 6)
)


@given(st.lists(KNOWN_OR_NOT, max_size=30))
def test_no_cause_is_told_in_full_twice_in_whichever_order_more_and_less_is_known_of_it(
    faults: list[tuple[int, int, bool, bool, bool, int]],
) -> None:
    """There are no more full records than causes, whatever is known of each fault but for its pids."""
    docket = Docket()
    records: list[Fault] = []
    for at, (doer, opener, doer_known, opener_known, advice_known, session) in enumerate(faults):
        opened = process(100 + opener, 1, ("puma", "unicorn")[opener])
        did = process(200 + doer, 100 + opener, PROGRAMS[doer])
        what = replace(OVERLAP, intruder=Sender(did.pid), requesters=(Sender(opened.pid),))
        findings = Findings(
            opener=opened if opener_known else None, senders={did.pid: did} if doer_known else {}, driver=Driver.LIBPQ
        )
        one = fault(what, findings, facts=replace(FACTS, id=session), at=NOW + at)
        if advice_known:
            one = replace(one, advice=one.advice._replace(title="Reconnect after forking"))
        if docket.known(session, what, at=NOW + at) is None:
            records += docket.enter(what, one).records
        else:
            again = docket.repeat(session, what, at=NOW + at)
            records += () if again is None else (again,)
    records += docket.close_all(at=NOW + 100)
    full = [record for record in records if record.repeat_of is None]
    assert len(full) <= len({(doer, opener) for doer, opener, *_ in faults})
    assert len({record.cause for record in full}) == len(full)
    assert sum(1 + record.suppressed for record in records) == len(faults)
    assert sum(count.faults + count.repeats for count in docket.counts()) == len(faults)
    assert sum(told.spread.times for told in docket.causes()) == len(faults)
    assert {record.repeat_of for record in records} <= {record.id for record in full} | {None}
    assert {record.cause for record in records} == {record.cause for record in full}


def test_a_stranger_is_not_taken_for_somebody_who_is_known() -> None:
    docket = Docket()
    assert enter(docket, BY_ONE, findings=run_by(0)).cause == 1
    assert enter(docket, verdict(Kind.MESSAGE_WHILE_IDLE), session=4, findings=Findings()).cause == 2


def test_a_client_that_is_elsewhere_is_known_by_what_stays_the_same_of_what_it_says() -> None:
    docket, remote = Docket(), verdict(Kind.MESSAGE_WHILE_IDLE)
    for session, route in enumerate(("users", "orders", "basket"), start=1):
        said = {"application_name": f"shop-{session}", "route": route, "traceparent": f"00-5bd66ef509{session}-01"}
        assert enter(docket, remote, session=session, findings=Findings(declared=said)).cause == 1
    assert enter(docket, remote, session=9, findings=Findings(declared={"application_name": "mailer"})).cause == 2


HEIRS = verdict(Kind.INHERITED_CONNECTION)


def test_whoever_inherits_a_connection_is_one_cause_by_the_oldest_of_them() -> None:
    docket = Docket()
    later = process(4900, 4864, "puma: cluster worker 9: 4864 [app]", age=1)
    assert enter(docket, HEIRS, findings=replace(KERNEL, holders=(MASTER, WORKER_0))).cause == 1
    helper = replace(CONVERTING, started=later.started + 1)
    for session, holders in enumerate([(WORKER_1, later), (helper, WORKER_1, MASTER), (MASTER, later)], start=4):
        assert enter(docket, HEIRS, session=session, findings=replace(KERNEL, holders=holders)).cause == 1
    sidekiq = process(4901, 4864, "sidekiq 7 [app]", age=1)
    assert enter(docket, HEIRS, session=9, findings=replace(KERNEL, holders=(MASTER, sidekiq))).cause == 2


def full_by(*holders: Process, opener: Process = WORKER_0) -> Findings:
    shares = tuple(Share(holder, 9 - n) for n, holder in enumerate(holders))
    return Findings(opener=opener, shares=shares, slots=Slots(10, 0, 0))


def test_a_server_that_is_full_is_one_cause_by_who_has_the_most_connections() -> None:
    docket = Docket()
    psql = process(6000, 1, "psql", "shop")
    at = NOW
    for holders, opener, cause in (
        ((WORKER_0, WORKER_1, psql), psql, 1),
        ((WORKER_1, psql), WORKER_0, 1),
        ((WORKER_1,), WORKER_1, 1),
        ((), WORKER_1, 1),
        ((psql, WORKER_0), WORKER_0, 2),
    ):
        at += RENEWAL
        assert docket.known(3, FULL, at=at) is None, "it is looked into anew"
        assert docket.enter(FULL, fault(FULL, full_by(*holders, opener=opener), at=at)).fault.cause == cause
    other = replace(FULL, refusal=Refusal(Limit.SERVER))
    assert docket.enter(other, fault(other, full_by(psql), at=at)).fault.cause == 3
    # While others knock, the reserved slots are taken too.
    reserved = replace(FULL, refusal=Refusal(Limit.RESERVED))
    assert docket.enter(reserved, fault(reserved, full_by(psql), at=at)).fault.cause == 3


def test_a_program_that_calls_itself_anew_each_time_is_told_in_full_a_few_times() -> None:
    docket = Docket()
    records: list[Fault] = []
    for n in range(100):
        name = "".join(chr(ord("a") + int(digit)) for digit in str(n))
        what, findings = by(5000 + n, f"job {name}")
        records += recorded(docket, what, 100 + n, NOW, findings)
    assert len([record for record in records if record.repeat_of is None]) == ALIKE + 1
    assert len(docket._causes) == ALIKE + 1
    other = replace(OVERLAP, kind=Kind.FOREIGN_TERMINATE)
    assert docket.enter(other, fault(other)).fault.repeat_of is None, "another kind is told in full"
    elsewhere = replace(KERNEL, opener=process(1000, 1, "unicorn master"))
    assert docket.enter(OVERLAP, fault(findings=elsewhere)).fault.repeat_of is None, "and so is what another has opened"


# Faults whose cause is known before evidence is taken

FAMILY = family_of(OVERLAP, KERNEL)


def test_a_fault_of_a_known_cause_is_familiar_on_another_session() -> None:
    assert FAMILY is not None
    docket = Docket()
    assert docket.familiar(FAMILY) is None
    first = docket.enter(OVERLAP, fault(), FAMILY).fault
    standing = docket.familiar(FAMILY)
    assert standing is not None
    assert standing.id == first.id
    facts = replace(FACTS, id=9)
    what = replace(OVERLAP, intruder=Sender(5000))
    findings = replace(KERNEL, senders={4866: WORKER_0, 5000: process(5000, 4864, WORKER_1.cmdline[0])})
    assert family_of(what, findings) == FAMILY
    told = build_instance(what, facts, findings, sql_mode=SqlMode.NONE)
    record = docket.enter_familiar(9, what, FAMILY, at=NOW + 1, instance=lambda: told)
    assert record is not None
    assert (record.cause, record.repeat_of, record.session.id) == (1, 1, 9)
    assert record.culprits[0].pid == 5000
    assert record.spread == Spread(times=2, sessions=2, processes=3, since=NOW)
    known = docket.known(9, what, at=NOW + 1)
    assert known is not None
    assert known.action is first.action
    later = docket.repeat(9, what, at=NOW + 2, instance=lambda: told)
    assert later is not None
    assert (later.repeat_of, later.session.id, later.culprits) == (1, 9, record.culprits)
    assert [(count.faults, count.repeats) for count in docket.counts()] == [(2, 1)]


def test_a_repeat_that_leaves_culprits_out_says_how_many() -> None:
    assert FAMILY is not None
    docket = Docket()
    docket.enter(OVERLAP, fault(), FAMILY)
    what = replace(OVERLAP, requesters=tuple(Sender(pid) for pid in range(5000, 5020)))
    told = build_instance(what, FACTS, KERNEL, sql_mode=SqlMode.NONE)
    record = docket.enter_familiar(9, what, FAMILY, at=NOW + 1, instance=lambda: told)
    assert record is not None
    assert len([one for one in record.culprits if one.role is not Role.OWNER]) == MOST
    # The intruder, those twenty, and three who have it open, one of whom is the intruder.
    assert len(record.culprits) + record.unnamed == 1 + 20 + 1 + 2


def test_a_familiar_fault_is_logged_though_the_first_of_its_cause_was_rejected() -> None:
    """The settings have changed meanwhile: nothing is rejected any more."""
    assert FAMILY is not None
    docket = Docket()
    docket.enter(OVERLAP, fault(action=Action.REJECTED), FAMILY)
    docket.renew()
    docket.enter(OVERLAP, fault(facts=replace(FACTS, id=8), at=NOW + 1), FAMILY)
    record = docket.enter_familiar(9, OVERLAP, FAMILY, at=NOW + 2, instance=lambda: AGAIN)
    known = docket.known(9, OVERLAP, at=NOW + 2)
    assert record is not None
    assert known is not None
    assert (record.action, known.action) == (Action.LOGGED, Action.LOGGED)
    assert {count.action: count.faults for count in docket.counts()} == {Action.REJECTED: 1, Action.LOGGED: 2}


def test_processes_are_counted_of_which_nothing_is_recorded() -> None:
    """Sixty jobs in a second are sixty processes."""
    assert FAMILY is not None
    docket = Docket()
    docket.enter(OVERLAP, fault(), FAMILY)
    for pid in range(5000, 5060):
        docket.enter_familiar(3, replace(OVERLAP, intruder=Sender(pid)), FAMILY, at=NOW, instance=lambda: AGAIN)
    [told] = docket.causes()
    assert (told.spread.times, told.spread.sessions, told.spread.processes) == (61, 1, 62)


@pytest.mark.parametrize(
    ("what", "findings"),
    [
        (replace(OVERLAP, intruder=None), KERNEL),
        (replace(OVERLAP, intruder=Sender(4867, 4880, sampled=True)), KERNEL),
        (replace(OVERLAP, requesters=(Sender(4866, 4871, sampled=True),)), KERNEL),
        (OVERLAP, replace(KERNEL, senders={4866: WORKER_0})),
        (OVERLAP, replace(KERNEL, senders={4866: WORKER_0, 4867: process(4867, 4864)})),
        (OVERLAP, replace(KERNEL, opener=None)),
    ],
)
def test_nothing_is_familiar_unless_it_is_known_who_has_sent_and_what_did_it(what: Verdict, findings: Findings) -> None:
    assert family_of(what, findings) is None


def test_another_program_is_another_family() -> None:
    other = replace(KERNEL, senders={4866: WORKER_0, 4867: process(4867, 4864, "sidekiq 7 [app]")})
    assert family_of(OVERLAP, other) not in (None, FAMILY)
    assert family_of(replace(OVERLAP, kind=Kind.UNREAD_ANSWER), KERNEL) != FAMILY


def test_families_are_bounded() -> None:
    assert FAMILY is not None
    docket = Docket()
    for n in range(FAMILIES + 10):
        docket.enter(OVERLAP, fault(facts=replace(FACTS, id=n + 1)), FAMILY._replace(programs=(str(n),)))
    assert docket.familiar(FAMILY._replace(programs=("9",))) is None
    assert docket.familiar(FAMILY._replace(programs=("10",))) is not None


# Faults that are alike, though it isn't known of each by whom it is


def test_what_one_does_that_opened_its_connections_itself_is_alike_on_all_of_them() -> None:
    own = Verdict(kind=Kind.REQUEST_WHILE_BUSY, reason="…", message=None, requests=(), intruder=Sender(4866))
    findings = replace(KERNEL, opener=WORKER_0, senders={})
    assert family_of(own, findings) is None
    assert likeness_of(own, findings) is not None
    assert likeness_of(own, replace(findings, opener=process(4866, 1, "python another.py"))) != likeness_of(
        own, findings
    )
    assert likeness_of(replace(own, intruder=Sender(5000)), findings) is None, "nobody has looked at that one"
    assert likeness_of(replace(own, intruder=Sender(4866, sampled=True)), findings) is None
    assert likeness_of(own, replace(findings, opener=None)) is None


@pytest.mark.parametrize("kind", [Kind.UNCLEAN_CLOSE, Kind.IDLE_IN_TRANSACTION])
def test_what_a_process_leaves_undone_is_alike_on_all_its_connections(kind: Kind) -> None:
    undone = Verdict(kind=kind, reason="…", message=None, requests=(), requesters=(Sender(4866),))
    findings = replace(KERNEL, opener=WORKER_0, senders={})
    likeness = likeness_of(undone, findings)
    assert likeness is not None
    assert family_of(undone, findings) is None, "who ended it has to be found out"
    assert likeness == likeness_of(replace(undone, requesters=()), findings)
    twin = replace(WORKER_0, started=WORKER_0.started + 1)
    assert likeness_of(undone, replace(findings, opener=twin)) != likeness
    assert likeness_of(replace(undone, requesters=(Sender(5000),)), findings) is None
    assert likeness_of(replace(undone, kind=Kind.INHERITED_CONNECTION), findings) is None
    if kind is Kind.UNCLEAN_CLOSE:
        assert likeness_of(replace(undone, open_request=True), findings) != likeness, "it is graver"


# What another fault of the session explains


@pytest.mark.parametrize(
    ("kind", "by"), [(kind, by) for kind, several in EXPLAINED_BY.items() for by in sorted(several)]
)
def test_what_another_fault_of_its_session_explains_is_known_to_be(kind: Kind, by: Kind) -> None:
    docket, what = Docket(), verdict(kind)
    assert not docket.is_explained(3, what)
    enter(docket, replace(OVERLAP, kind=by))
    assert docket.is_explained(3, what)
    assert not docket.is_explained(4, what), "another session"
    assert not docket.is_explained(3, verdict(Kind.PROTOCOL_VIOLATION)), "another fault"
    docket.close(3, at=NOW)
    assert not docket.is_explained(3, what)


def test_whoever_lost_its_answer_to_another_one_asks_again_which_is_explained_once_evidence_has_shown_it() -> None:
    """Evidence may make more of a request while another is outstanding than that: threads that share it, too."""
    docket = Docket()
    docket.explain(3, BUSY)
    assert not docket.is_surely_explained(3, BUSY), "nothing has been told that would explain it"
    enter(docket)
    assert not docket.is_surely_explained(3, BUSY)
    assert docket.is_explained(3, BUSY)
    docket.explain(3, BUSY)
    assert docket.is_surely_explained(3, BUSY)
    for other in (replace(BUSY, intruder=Sender(5000)), replace(BUSY, kind=Kind.SHARED_BY_THREADS)):
        assert not docket.is_surely_explained(3, other)
    assert not docket.is_surely_explained(4, BUSY), "another session"
    inherited = replace(OVERLAP, kind=Kind.INHERITED_CONNECTION)
    assert docket.is_surely_explained(3, inherited), "of which evidence makes nothing else"
    docket.forget(3, 4867)
    assert not docket.is_surely_explained(3, BUSY), "its pid is another one's by now"
    docket.explain(3, BUSY)
    docket.renew()
    assert not docket.is_surely_explained(3, BUSY)
    docket.explain(3, BUSY)
    docket.close(3, at=NOW)
    assert docket._explained == {}
    enter(docket, BUSY, session=9)
    assert not docket.is_explained(9, verdict(Kind.SHARED_BY_PROCESSES)), "not the other way round"


def test_what_is_explained_is_remembered_of_so_many_processes_only() -> None:
    docket = Docket()
    enter(docket)
    for pid in range(5000, 5000 + FAULTS_PER_SESSION + 5):
        docket.explain(3, replace(BUSY, intruder=Sender(pid)))
    assert len(docket._explained[3]) == FAULTS_PER_SESSION


@pytest.mark.parametrize("left", [{"open_request": True}, {"open_transaction": True}, {"message": QUERY}])
def test_what_a_shared_connection_leaves_undone_at_its_end_is_told(left: dict[str, Any]) -> None:
    docket = Docket()
    enter(docket)
    assert not docket.is_explained(3, verdict(Kind.UNCLEAN_CLOSE, **left))


def test_it_is_known_beforehand_whether_a_fault_is_going_to_be_recorded_in_full() -> None:
    docket = Docket()
    next_one = replace(fault(), session=replace(FACTS, id=2))
    assert (docket.is_new(OVERLAP, next_one), docket.has_any(OVERLAP.kind)) == (True, False)
    enter(docket, session=1)
    assert (docket.is_new(OVERLAP, next_one), docket.has_any(OVERLAP.kind)) == (False, True)
    assert docket.is_new(OVERLAP, fault(OVERLAP, OTHERS))
    assert not docket.has_any(Kind.UNREAD_ANSWER)


def test_a_repeat_does_not_say_where_the_first_one_was_seen() -> None:
    """Nobody has looked where it is this time."""
    docket = Docket()
    [first] = docket.enter(OVERLAP, fault(OVERLAP, KERNEL, place="app.py:7 in work")).records
    again = docket.repeat(first.session.id, OVERLAP, at=NOW + 1)
    assert again is not None
    assert (first.headline, again.headline) == (f"{first.summary}; seen at app.py:7 in work", first.summary)


def heard_by(docket: Docket) -> list[tuple[int, float, float]]:
    """What it tells of each time: the record that tells of it, and between which times it was done."""
    heard: list[tuple[int, float, float]] = []
    docket.tell(lambda one: heard.append((one.fault.repeat_of or one.fault.id, one.since, one.until)))
    return heard


def test_each_time_is_told_whether_it_is_recorded_or_not() -> None:
    docket = Docket()
    heard = heard_by(docket)
    enter(docket)
    assert docket.repeat(3, SWAPPED, at=NOW + 0.1) is None
    enter(docket, session=4, at=NOW + 0.2)
    family = family_of(OVERLAP, KERNEL)
    assert family is not None
    docket.enter(OVERLAP, fault(OVERLAP, KERNEL, facts=replace(FACTS, id=5), at=NOW + 0.3), family)
    instance = partial(build_instance, OVERLAP, FACTS, KERNEL, sql_mode=SqlMode.NORMALIZED)
    assert docket.enter_familiar(6, OVERLAP, family, at=NOW + 0.4, instance=instance) is None
    assert heard == [(1, NOW + n / 10, NOW + n / 10) for n in range(5)]


@pytest.mark.parametrize(
    ("kind", "since", "expected"),
    [
        (Kind.IDLE_IN_TRANSACTION, NOW - 60, (NOW - 60, NOW - 60)),
        # A process's start is known to the clock tick.
        (Kind.INHERITED_CONNECTION, NOW - 2, (NOW - 2, NOW - 1.98)),
        (Kind.INHERITED_CONNECTION, NOW - 0.01, (NOW - 0.01, NOW)),
        (Kind.INHERITED_CONNECTION, None, (NOW, NOW)),
        # The clock has been set back.
        (Kind.UNREAD_ANSWER, NOW + 60, (NOW, NOW)),
    ],
)
def test_what_is_noticed_late_is_told_with_the_time_when_it_was_done(
    kind: Kind, since: float | None, expected: tuple[float, float]
) -> None:
    docket = Docket()
    heard = heard_by(docket)
    enter(docket, replace(verdict(kind), since=since))
    assert [one[1:] for one in heard] == [expected]


def test_beginning_anew_makes_everything_news_and_loses_nothing() -> None:
    docket = Docket()
    heard = heard_by(docket)
    first = enter(docket)
    assert docket.repeat(3, OVERLAP, at=NOW) is None
    [rest] = docket.begin_anew(at=NOW + 1)
    assert (rest.repeat_of, rest.suppressed) == (first.id, 0)
    assert docket.known(3, OVERLAP, at=NOW + 1) is None
    assert docket.causes() == []
    again = enter(docket, at=NOW + 2)
    assert (again.repeat_of, again.id, again.cause) == (None, 3, 2)
    assert [told.spread.times for told in docket.causes()] == [1]
    assert sum(count.faults + count.repeats for count in docket.counts()) == 3
    assert [one[0] for one in heard] == [1, 1, 3]


def test_what_was_known_as_it_begins_anew_is_still_counted() -> None:
    docket = Docket()
    heard = heard_by(docket)
    first = enter(docket)
    assert docket.known(3, OVERLAP, at=NOW) is not None
    assert docket.begin_anew(at=NOW) == []
    docket.repeat(3, OVERLAP, at=NOW)
    assert heard == [(first.id, NOW, NOW)] * 2
