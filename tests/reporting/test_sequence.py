"""The sequence of one fault: what is known in its order, and nothing that isn't."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

import pytest

from pgguard.attribution.evidence import Evidence
from pgguard.faults.fault import Chapter, Event, Request, Role
from pgguard.faults.policy import Action
from pgguard.faults.sql import SqlText
from pgguard.identity import Sender
from pgguard.reporting.jsonl import encode
from pgguard.reporting.readback import from_record
from pgguard.reporting.sequence import LANES, Gap, LaneKind, Sequence, What, duration, sequence_of
from pgguard.session.verdicts import Kind, RequestState
from tests.faults.samples import DATA_ROW, KERNEL, NOW, OVERLAP, TERMINATE, fault, process, verdict
from tests.reporting.test_hostile_text import HOSTILE, hostile_faults

if TYPE_CHECKING:
    from pgguard.faults.fault import Fault

FORKED = (
    Chapter(Event.OPENED, NOW - 12.5, 4864, None, Evidence.SOLE_HOLDER),
    Chapter(Event.INHERITED, NOW - 9, 4866, 4864, Evidence.SOCKET_HOLDER),
    Chapter(Event.INHERITED, NOW - 8, 4867, 4864, Evidence.SOCKET_HOLDER),
)


def request(
    n: int, ago: float, state: RequestState = RequestState.ANSWERED, *, pid: int = 4866, at_rest: bool | None = True
) -> Request:
    text = SqlText.of(f"SELECT {n}")
    return Request(
        n, NOW - ago, "Q", text, pid, {4866: 4871, 4867: 4880}[pid], Evidence.KERNEL_SENDER, state, at_rest=at_rest
    )


def told(what: Fault) -> list[str]:
    """What is told, a line each: the lanes by their numbers."""
    sequence = sequence_of(what)
    return [line(sequence, item) for item in sequence.items]


def line(sequence: Sequence, item: object) -> str:
    if isinstance(item, Gap):
        return f"… {item.seconds:.1f} s"
    assert not isinstance(item, Sequence)
    step = next(one for one in sequence.steps if one is item)
    names = [lane.name.removeprefix("pid ") for lane in sequence.lanes]
    source = "" if step.source is None else names[step.source]
    mark = " !" if step.offending else ""
    return f"{source}>{','.join(names[n] for n in step.targets)}: {step.text}{mark}"


def test_the_story_of_a_shared_connection_in_order() -> None:
    requests = (request(1, 7, pid=4867), request(2, 0.5), request(3, 0.001, RequestState.ANSWERING))
    assert told(fault(story=FORKED, requests=requests)) == [
        "4864>PostgreSQL: connects",
        "… 3.5 s",
        "4864>4866: inherits the open connection",
        "… 1.0 s",
        "4864>4867: inherits the open connection",
        "… 1.0 s",
        "4867>PostgreSQL: sends request 1: Query",
        "PostgreSQL>4867,4864,4866: the answer to request 1",
        "… 6.5 s",
        "4866>PostgreSQL: sends request 2: Query",
        "PostgreSQL>4866,4864,4867: the answer to request 2",
        "… 0.5 s",
        "4866>PostgreSQL: sends request 3: Query",
        "4867>PostgreSQL: sends Query !",
        ">4866,4867: from here on, whoever reads first gets the next answer, no matter whose it is",
    ]


def test_who_has_used_it_and_let_go_of_it_had_inherited_it_too() -> None:
    """Nobody had looked who has it while it did."""
    assert told(fault(story=FORKED[:2]))[:4] == [
        "4864>PostgreSQL: connects",
        "… 3.5 s",
        "4864>4866: inherits the open connection",
        "… 1.0 s",
    ]
    assert "4864>4867: inherits the open connection" in told(fault(story=FORKED[:2]))
    # One that is older than the connection has it by another way, and so may one whose parent never had it.
    for changes in ({"started_at": NOW - 20}, {"ppid": 1}):
        one = fault(story=FORKED[:2])
        others = [
            replace(who, process=replace(who.process, **changes)) if who.pid == 4867 and who.process else who
            for who in one.culprits
        ]
        assert "4864>4867: inherits the open connection" not in told(replace(one, culprits=tuple(others)))


def test_when_a_process_was_forked_is_known_to_a_tick_of_the_clock_only() -> None:
    """It began in that tick, and had before it sent anything."""
    early = Chapter(Event.INHERITED, NOW - 1.0, 4866, 4864, Evidence.SOCKET_HOLDER)
    requests = (request(1, 0.997), request(2, 0.9))
    steps = sequence_of(fault(story=(FORKED[0], early), requests=requests)).steps
    [_, fork] = [step for step in steps if step.what is What.INHERITED]
    assert (fork.at, fork.roughly) == (NOW - 0.997, True)
    late = sequence_of(fault(story=(FORKED[0], early), requests=requests[1:]))
    [_, fork] = [step for step in late.steps if step.what is What.INHERITED]
    assert fork.at == pytest.approx(NOW - 0.98)
    assert late.time(fork).startswith("by +")
    assert any("up to 20.0 ms before" in sentence for sentence in late.unknown)


def test_lanes_are_those_who_took_part_the_opener_first_and_the_intruder_last() -> None:
    sequence = sequence_of(fault(story=FORKED))
    assert [lane.title for lane in sequence.lanes] == [
        "pid 4864 (puma 6.4.2 (tcp://0.0.0.0:9292) [app])",
        "pid 4866 (puma: cluster worker 0), thread 4871",
        "pid 4867 (puma: cluster worker 1), thread 4880",
        "pgguard (stands in between)",
        "PostgreSQL (backend pid 4865)",
    ]
    assert sequence.lanes[2].roles == (Role.INTRUDER,)


def test_two_threads_of_one_process_have_a_lane_each() -> None:
    threads = replace(OVERLAP, kind=Kind.SHARED_BY_THREADS, intruder=Sender(4866, 4999))
    lanes = [(lane.pid, lane.tid) for lane in sequence_of(fault(threads)).lanes if lane.kind is LaneKind.CLIENT]
    assert (4866, 4871) in lanes
    assert (4866, 4999) in lanes


@pytest.mark.parametrize(
    ("opener", "threads", "connects"),
    [
        pytest.param(4866, [4866, 4871, 4999], 4866, id="a third one opened it"),
        pytest.param(4871, [4871, 4999], 4871, id="one of the two opened it"),
        pytest.param(None, [None, 4871, 4999], None, id="it isn't known which opened it"),
    ],
)
def test_the_thread_that_opened_the_connection_is_none_of_those_that_use_it(
    opener: int | None, threads: list[int | None], connects: int | None
) -> None:
    shared = fault(replace(OVERLAP, kind=Kind.SHARED_BY_THREADS, intruder=Sender(4866, 4999)))
    used = tuple(one for one in shared.culprits if one.role is not Role.OWNER)
    owner = next(one for one in shared.culprits if one.role is Role.OWNER)
    sequence = sequence_of(replace(shared, culprits=(*used, replace(owner, pid=4866, tid=opener)), story=()))
    lanes = [lane for lane in sequence.lanes if lane.pid == 4866]
    assert [lane.tid for lane in lanes] == threads
    [opened] = [step for step in sequence.steps if step.what is What.OPENED]
    assert opened.source is not None
    assert sequence.lanes[opened.source].tid == connects
    assert [lane.tid for lane in lanes if Role.OWNER in lane.roles] == [connects]


@pytest.mark.parametrize("thread", [4864, 4999], ids=["its main thread", "another one"])
def test_a_process_forks_and_it_is_not_known_which_of_its_threads(thread: int) -> None:
    sent = replace(request(1, 11), pid=4864, tid=thread)
    sequence = sequence_of(fault(story=FORKED, requests=(sent, request(2, 0.5))))
    [first, _] = [step for step in sequence.steps if step.what is What.INHERITED]
    who = sequence.sentence(first).partition(" forks ")[0]
    assert who.startswith("pid 4864 (puma")
    assert "thread" not in who


def test_where_the_order_of_answers_is_not_known_none_is_drawn() -> None:
    """An older record says only what had become of each request by the time of the fault."""
    old = (request(1, 3, at_rest=None), request(2, 2, RequestState.FAILED, at_rest=None))
    sequence = sequence_of(fault(verdict(Kind.IDLE_IN_TRANSACTION), requests=old))
    assert not [step for step in sequence.steps if step.what is What.ANSWER]
    details = [step.detail for step in sequence.steps if step.what is What.REQUEST]
    assert details == ["answered by the time of the fault", "answered with an error by the time of the fault"]
    assert any("order" in sentence for sentence in sequence.unknown)


def test_of_what_was_pipelined_the_order_of_answers_is_not_known() -> None:
    requests = (request(1, 3), request(2, 2, at_rest=False), request(3, 1))
    steps = sequence_of(fault(verdict(Kind.IDLE_IN_TRANSACTION), requests=requests)).steps
    kinds = [(step.what, step.n) for step in steps if step.what in (What.REQUEST, What.ANSWER)]
    assert kinds == [
        (What.REQUEST, 1),
        (What.REQUEST, 2),
        (What.ANSWER, 1),
        (What.ANSWER, 2),
        (What.REQUEST, 3),
        (What.ANSWER, 3),
    ], "both had come before the third"
    late = sequence_of(fault(verdict(Kind.IDLE_IN_TRANSACTION), requests=requests[:2])).steps
    assert not [step for step in late if step.what is What.ANSWER]


def test_an_answer_goes_to_the_one_process_that_has_the_connection() -> None:
    alone = replace(KERNEL, holders=(KERNEL.senders[4866],), opener=KERNEL.senders[4866])
    requests = (request(1, 1), request(2, 0.5))
    steps = sequence_of(fault(verdict(Kind.IDLE_IN_TRANSACTION), alone, requests=requests)).steps
    assert [len(step.targets) for step in steps if step.what is What.ANSWER] == [1, 1]


def test_nobody_is_made_up_where_nobody_is_known() -> None:
    unknown = fault(
        replace(OVERLAP, intruder=None, requesters=(), requests=()), replace(KERNEL, opener=None, holders=None)
    )
    sequence = sequence_of(replace(unknown, culprits=(), story=()))
    assert [lane.kind for lane in sequence.lanes] == [LaneKind.UNKNOWN, LaneKind.GUARD, LaneKind.SERVER]
    offence = next(step for step in sequence.steps if step.offending)
    assert sequence.sentence(offence).startswith("the client (from 127.0.0.1:53984), not identified sends Query")


@pytest.mark.parametrize(
    ("action", "stopped", "says"),
    [
        (Action.LOGGED, False, "the session has ended with this"),
        (Action.REJECTED, True, "pgguard ends the session with an error that says who did it"),
        (Action.DROPPED, True, "pgguard has dropped the message, and the session goes on"),
    ],
)
def test_what_was_done_about_it_is_its_end(action: Action, stopped: bool, says: str) -> None:
    steps = sequence_of(fault(verdict(Kind.FOREIGN_TERMINATE, message=TERMINATE), action=action)).steps
    assert next(step.stopped for step in steps if step.offending) is stopped
    assert steps[-1].text.startswith(says)


def test_a_message_of_the_servers_comes_from_there() -> None:
    sequence = sequence_of(fault(verdict(Kind.MESSAGE_WHILE_IDLE, message=DATA_ROW)))
    offence = next(step for step in sequence.steps if step.offending)
    assert (offence.source, offence.text) == (sequence.server, "sends DataRow")


def test_a_fault_without_a_message_is_a_moment() -> None:
    steps = sequence_of(fault(verdict(Kind.UNCLEAN_CLOSE, "ended without Terminate"))).steps
    assert [(step.what, step.text, step.at) for step in steps if step.offending] == [
        (What.FAULT, "ended without Terminate", NOW)
    ]


def test_of_very_many_processes_the_others_share_a_lane() -> None:
    crowd = tuple(process(5000 + n, 4864, "worker") for n in range(40))
    story = (FORKED[0], *(Chapter(Event.INHERITED, NOW - 5, one.pid, 4864, Evidence.SOCKET_HOLDER) for one in crowd))
    sequence = sequence_of(fault(story=story))
    assert len(sequence.lanes) == LANES + 3
    assert sequence.lanes[LANES].kind is LaneKind.OTHERS
    assert {4864, 4866, 4867} <= {lane.pid for lane in sequence.lanes}, "those who matter have their own"


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_it_is_the_same_of_a_fault_and_of_its_record(text: str) -> None:
    for what in islice(hostile_faults(text), 2, None, 4):
        sequence = sequence_of(from_record(json.loads(encode(what))))
        assert sequence.lanes == sequence_of(what).lanes
        assert all(len(sequence.sentence(step)) < 5_000 for step in sequence.steps)
        assert all(0 <= n < len(sequence.lanes) for step in sequence.steps for n in step.targets)


@pytest.mark.parametrize(
    ("seconds", "says"),
    [
        (0.00012, "0.1 ms"),
        (0.25, "250.0 ms"),
        (12.5, "12.50 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
        (200_000, "2 days 7 h"),
    ],
)
def test_time_spans_are_said_as_people_say_them(seconds: float, says: str) -> None:
    assert duration(seconds) == says
