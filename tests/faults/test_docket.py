"""Repeats: in full once, rate-limited after that, counted always."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgguard.attribution.evidence import Driver
from pgguard.faults.catalogue import Severity
from pgguard.faults.docket import FAULTS_PER_SESSION, RENEWAL, Docket, Instance
from pgguard.faults.fault import Fault
from pgguard.faults.policy import Action
from pgguard.session.verdicts import Kind, Limit, Refusal, Sender, Verdict
from tests.faults.samples import FACTS, KERNEL, NOW, OVERLAP, QUERY, fault, verdict


def enter(docket: Docket, what: Verdict = OVERLAP, *, session: int = 3, at: float = NOW) -> Fault:
    first = fault(what, facts=replace(FACTS, id=session), id=docket.next_id(), at=at)
    docket.enter(what, first)
    return first


SWAPPED = replace(OVERLAP, intruder=OVERLAP.requesters[0], requesters=(Sender(4867, 4880),))
OTHER_THREAD = replace(OVERLAP, intruder=Sender(4867, 4999))


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
    assert [record.session.id for record in docket.close_all(at=NOW)] == [3, 4]
    assert docket.close_all(at=NOW) == []


def test_a_fault_that_is_not_known_can_not_repeat() -> None:
    with pytest.raises(KeyError):
        Docket().repeat(3, OVERLAP, at=NOW)


def test_memory_is_bounded_though_every_child_makes_a_new_fault() -> None:
    """A job runner forks for each job, for weeks, and each child uses the one connection."""
    docket = Docket()
    enter(docket)
    docket.repeat(3, OVERLAP, at=NOW)
    settled = []
    for pid in range(10_000, 10_000 + FAULTS_PER_SESSION):
        what = replace(OVERLAP, intruder=Sender(pid))
        settled.append(docket.enter(what, fault(what, KERNEL, id=docket.next_id())))
    # The oldest went, and its suppressed repeat was not lost with it.
    assert [record.repeat_of for record in settled if record is not None] == [1]
    assert settled[-1] is not None
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
    docket.enter(busy, fault(busy, replace(KERNEL, driver=Driver.NODE), id=docket.next_id()))
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
        if docket.known(3, OVERLAP, at=NOW) is None:
            records.append(enter(docket, at=now))
        elif (record := docket.repeat(3, OVERLAP, at=now)) is not None:
            records.append(record)
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
    assert docket.equate(3, BUSY, OVERLAP, at=NOW) is None
    known = docket.known(3, BUSY, at=NOW)
    assert known is not None
    assert (known.id, known.kind) == (first.id, Kind.SHARED_BY_PROCESSES)
    again = docket.repeat(3, BUSY, at=NOW + 2)
    assert again is not None
    assert (again.repeat_of, again.kind) == (first.id, Kind.SHARED_BY_PROCESSES)


def test_one_fault_by_two_names_is_rate_limited_counted_and_settled_once() -> None:
    docket = Docket()
    enter(docket)
    docket.equate(3, BUSY, OVERLAP, at=NOW)
    for what in (BUSY, OVERLAP, BUSY):
        assert docket.repeat(3, what, at=NOW + 0.5) is None
    (last,) = docket.close(3, at=NOW + 0.6)
    assert (last.repeat_of, last.suppressed) == (1, 2)
    assert docket.counts() == [(Kind.SHARED_BY_PROCESSES, Severity.ERROR, Action.LOGGED, 1, 3)]


def test_a_fault_equated_with_itself_stays_one() -> None:
    docket = Docket()
    enter(docket)
    assert docket.equate(3, OVERLAP, OVERLAP, at=NOW) is None
    assert docket.known(3, OVERLAP, at=NOW) is not None


def test_a_fault_can_not_be_equated_with_one_that_is_not_known() -> None:
    docket = Docket()
    enter(docket)
    with pytest.raises(KeyError):
        docket.equate(3, OVERLAP, BUSY, at=NOW)
    with pytest.raises(KeyError):
        docket.equate(4, BUSY, OVERLAP, at=NOW)


def test_a_fault_by_another_name_counts_against_the_bound_but_is_settled_with_its_last_name() -> None:
    docket = Docket()
    enter(docket)
    docket.equate(3, BUSY, OVERLAP, at=NOW)
    docket.repeat(3, BUSY, at=NOW)
    settled = []
    for pid in range(10_000, 10_000 + FAULTS_PER_SESSION):
        what = replace(OVERLAP, intruder=Sender(pid))
        settled.append(docket.enter(what, fault(what, KERNEL, id=docket.next_id())))
    assert [record.repeat_of for record in settled if record is not None] == [1]
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
    again = docket.repeat(9, FULL, at=NOW + 2, instance=AGAIN)
    assert again is not None
    assert (again.repeat_of, again.session.id, again.summary, again.culprits) == (first.id, 9, "again", ())
    assert again.reason == first.reason
    assert again.advice == first.advice


def test_a_refusal_is_looked_into_anew_after_a_while_and_nothing_uncounted() -> None:
    docket = Docket()
    enter(docket, FULL)
    docket.repeat(9, FULL, at=NOW + 0.5, instance=AGAIN)
    assert docket.known(9, FULL, at=NOW + RENEWAL - 1) is not None
    assert docket.known(9, FULL, at=NOW + RENEWAL) is None
    anew = fault(FULL, id=docket.next_id(), at=NOW + RENEWAL)
    left = docket.enter(FULL, anew)
    assert left is not None
    assert (left.repeat_of, left.suppressed) == (1, 0)
    assert [(count.faults, count.repeats) for count in docket.counts()] == [(2, 1)]


def test_what_was_suppressed_of_a_refusal_is_accounted_for_when_other_sessions_end() -> None:
    docket = Docket(interval=1.0)
    enter(docket, FULL)
    for _ in range(3):
        assert docket.repeat(9, FULL, at=NOW + 0.5, instance=AGAIN) is None
    assert docket.close(9, at=NOW + 0.6) == []
    [last] = docket.close(17, at=NOW + 1)
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
