"""Who is named in which role, with which thread, doing what; and the story of the socket."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from pgguard.attribution.evidence import Driver, Evidence, Process
from pgguard.attribution.findings import Findings, Share
from pgguard.attribution.frames import Frame
from pgguard.attribution.runtime import Language, Runtime
from pgguard.attribution.stacks import Stacks
from pgguard.attribution.threads import Sleep, Waiting, Waits
from pgguard.faults.conclude import AT_ONCE
from pgguard.faults.culprits import find_culprits, foremost, known_processes, sender_evidence, tell_story
from pgguard.faults.fault import Chapter, Culprit, Event, Role
from pgguard.identity import Sender
from pgguard.reporting.record import to_record
from pgguard.session.verdicts import AFTER_END, Kind, Limit, Refusal, Verdict
from tests.faults.samples import (
    DATA_ROW,
    FACTS,
    KERNEL,
    MASTER,
    OUTSTANDING,
    OVERLAP,
    QUERY,
    TERMINATE,
    WORKER_0,
    WORKER_1,
    asleep,
    fault,
    process,
    verdict,
    waiting,
)

INTRUDER, REQUESTER, OWNER, HOLDER, CLOSER = Role.INTRUDER, Role.REQUESTER, Role.OWNER, Role.HOLDER, Role.CLOSER
KERNEL_SENDER, SOLE, HOLDS, SAMPLE, ONLY, UNKNOWN, DECLARED = (
    Evidence.KERNEL_SENDER,
    Evidence.SOLE_HOLDER,
    Evidence.SOCKET_HOLDER,
    Evidence.THREAD_SAMPLE,
    Evidence.ONLY_THREAD,
    Evidence.UNKNOWN,
    Evidence.DECLARED,
)

ALONE = Findings(opener=MASTER, opener_evidence=SOLE, holders=(MASTER,), driver=Driver.LIBPQ)
SHARED = Findings(opener=MASTER, opener_evidence=SOLE, holders=(MASTER, WORKER_0), driver=Driver.LIBPQ)
BUSY = verdict(Kind.REQUEST_WHILE_BUSY, message=QUERY, requests=(OUTSTANDING,), open_request=True)
GOODBYE = verdict(Kind.FOREIGN_TERMINATE, message=TERMINATE)
IDLE = verdict(Kind.IDLE_IN_TRANSACTION)

Short = tuple[Role, int | None, int | None, Evidence, Evidence | None]


def short(culprits: tuple[Culprit, ...]) -> list[Short]:
    return [(c.role, c.pid, c.tid, c.evidence, c.tid_evidence) for c in culprits]


def only(*processes: Process) -> dict[int, Sleep]:
    return {one.pid: asleep(one) for one in processes}


THREADS = [
    pytest.param(
        OVERLAP,
        KERNEL,
        [
            (INTRUDER, 4867, 4880, KERNEL_SENDER, KERNEL_SENDER),
            (REQUESTER, 4866, 4871, KERNEL_SENDER, KERNEL_SENDER),
            (OWNER, 4864, None, SOLE, None),
            (HOLDER, 4864, None, HOLDS, None),
        ],
        id="the kernel has named the threads",
    ),
    pytest.param(
        replace(OVERLAP, intruder=Sender(4867), requesters=(Sender(4866),)),
        replace(KERNEL, waits=Waits((waiting(WORKER_1, 4881), waiting(WORKER_0, 4872)))),
        [
            (INTRUDER, 4867, 4881, KERNEL_SENDER, SAMPLE),
            (REQUESTER, 4866, 4872, KERNEL_SENDER, SAMPLE),
            (OWNER, 4864, None, SOLE, None),
            (HOLDER, 4864, None, HOLDS, None),
        ],
        id="the kernel has named the processes, and one thread of each waits",
    ),
    pytest.param(
        replace(OVERLAP, intruder=Sender(4867), requesters=(Sender(4866),)),
        replace(KERNEL, only_threads=only(WORKER_0, WORKER_1, MASTER)),
        [
            (INTRUDER, 4867, 4867, KERNEL_SENDER, ONLY),
            (REQUESTER, 4866, 4866, KERNEL_SENDER, ONLY),
            (OWNER, 4864, None, SOLE, None),
            (HOLDER, 4864, 4864, HOLDS, ONLY),
        ],
        id="processes with one thread each; who opened it is about long ago",
    ),
    pytest.param(
        BUSY,
        replace(ALONE, waits=Waits((waiting(MASTER, 4871), waiting(MASTER, 4872)))),
        [(INTRUDER, 4864, None, SOLE, None), (OWNER, 4864, None, SOLE, None)],
        id="two threads of the intruder's wait: neither is picked",
    ),
    pytest.param(
        BUSY,
        replace(
            ALONE,
            waits=Waits((waiting(MASTER, 4871), waiting(MASTER, 4872))),
            before=frozenset({asleep(MASTER, 4871)}),
        ),
        [(INTRUDER, 4864, 4872, SOLE, SAMPLE), (OWNER, 4864, None, SOLE, None)],
        id="two threads of the intruder's wait: the one that has begun to is meant",
    ),
    pytest.param(
        BUSY,
        replace(ALONE, waits=Waits((waiting(MASTER, 4871, others=2),)), only_threads={}),
        [(INTRUDER, 4864, None, SOLE, None), (OWNER, 4864, None, SOLE, None)],
        id="an event loop waits whoever asks",
    ),
    pytest.param(
        BUSY,
        replace(ALONE, waits=Waits((waiting(MASTER, 4871, readable=False, writable=True),))),
        [(INTRUDER, 4864, None, SOLE, None), (OWNER, 4864, None, SOLE, None)],
        id="a thread that writes doesn't wait for the answer",
    ),
    pytest.param(
        replace(
            BUSY,
            intruder=Sender(4864, sampled=True),
            requesters=(Sender(4864, 4871, sampled=True),),
        ),
        ALONE,
        [
            (INTRUDER, 4864, None, SOLE, None),
            (REQUESTER, 4864, 4871, SAMPLE, SAMPLE),
            (OWNER, 4864, None, SOLE, None),
        ],
        id="a sampled thread, and the opener that is known as such alone",
    ),
    pytest.param(
        verdict(
            Kind.SHARED_BY_THREADS,
            AT_ONCE,
            requesters=(Sender(4864, 4871, sampled=True), Sender(4864, 4872, sampled=True)),
        ),
        ALONE,
        [
            (REQUESTER, 4864, 4871, SAMPLE, SAMPLE),
            (REQUESTER, 4864, 4872, SAMPLE, SAMPLE),
            (OWNER, 4864, None, SOLE, None),
        ],
        id="two threads that wait at once, neither of them known to be the last",
    ),
    pytest.param(
        replace(
            verdict(
                Kind.SHARED_BY_THREADS,
                AT_ONCE,
                requesters=(Sender(4864, 4871, sampled=True), Sender(4864, 4872, sampled=True)),
            ),
            message=QUERY,
        ),
        ALONE,
        [
            (REQUESTER, 4864, 4871, SAMPLE, SAMPLE),
            (REQUESTER, 4864, 4872, SAMPLE, SAMPLE),
            (OWNER, 4864, None, SOLE, None),
        ],
        id="a request brought it to light: that nobody is the last makes no third one the intruder",
    ),
]


READS = waiting(MASTER, 4871, call="recvfrom")
ASLEEP = replace(ALONE, waits=Waits((READS,)), throughout=frozenset({READS.sleep}))
SENT = asleep(MASTER, 4872)
BEHIND_ONE_THAT_SLEEPS = verdict(
    Kind.SHARED_BY_THREADS, message=QUERY, requesters=(Sender(4864, 4871, sampled=True),), open_request=True
)
THREADS += [
    pytest.param(
        replace(BEHIND_ONE_THAT_SLEEPS, intruder=Sender(4864)),
        replace(ASLEEP, restless={4864: {4872: SENT}}),
        [
            (INTRUDER, 4864, 4872, KERNEL_SENDER, ONLY),
            (REQUESTER, 4864, 4871, SAMPLE, SAMPLE),
            (OWNER, 4864, None, SOLE, None),
        ],
        id="the only thread that has run since another one fell asleep",
    ),
    pytest.param(
        BEHIND_ONE_THAT_SLEEPS,
        replace(ASLEEP, restless={4864: {4872: SENT, 4873: None}}),
        [
            (INTRUDER, 4864, None, SOLE, None),
            (REQUESTER, 4864, 4871, SAMPLE, SAMPLE),
            (OWNER, 4864, None, SOLE, None),
        ],
        id="one of two threads that have run since",
    ),
    pytest.param(
        replace(verdict(Kind.REQUEST_WHILE_BUSY, message=QUERY, open_request=True), intruder=Sender(4864)),
        replace(ASLEEP, throughout=frozenset(), driver=Driver.PYTHON),
        [(INTRUDER, 4864, None, KERNEL_SENDER, None), (OWNER, 4864, None, SOLE, None)],
        id="who waits for the last answer need not have asked once more",
    ),
]


@pytest.mark.parametrize(("what", "findings", "roles"), THREADS)
def test_threads_are_named_where_that_is_known_and_nowhere_else(
    what: Verdict, findings: Findings, roles: list[Short]
) -> None:
    assert short(find_culprits(what, findings)) == roles


GOODBYES = [
    pytest.param(
        replace(GOODBYE, intruder=Sender(4866, 4866), requesters=(Sender(4864, 4864),)),
        SHARED,
        [
            (INTRUDER, 4866, 4866, KERNEL_SENDER, KERNEL_SENDER),
            (REQUESTER, 4864, 4864, KERNEL_SENDER, KERNEL_SENDER),
            (OWNER, 4864, None, SOLE, None),
        ],
        id="named by the kernel",
    ),
    pytest.param(
        GOODBYE,
        replace(ALONE, departed=(WORKER_0,)),
        [(INTRUDER, 4866, None, HOLDS, None), (OWNER, 4864, None, SOLE, None), (HOLDER, 4864, None, SOLE, None)],
        id="the one that has let go of it",
    ),
    pytest.param(
        GOODBYE,
        replace(ALONE, departed=(WORKER_0, WORKER_1)),
        [(INTRUDER, None, None, UNKNOWN, None), (OWNER, 4864, None, SOLE, None), (HOLDER, 4864, None, SOLE, None)],
        id="two have let go of it: neither is picked",
    ),
    pytest.param(
        GOODBYE,
        ALONE,
        [(INTRUDER, None, None, UNKNOWN, None), (OWNER, 4864, None, SOLE, None), (HOLDER, 4864, None, SOLE, None)],
        id="nobody is known to have: the only holder is the victim",
    ),
]


BEHIND_THE_END = verdict(Kind.SHARED_BY_PROCESSES, AFTER_END, message=QUERY, requesters=(Sender(4864, sampled=True),))
GOODBYES += [
    pytest.param(
        BEHIND_THE_END,
        Findings(opener=MASTER, opener_evidence=SOLE, survivors=(WORKER_0,)),
        [(INTRUDER, 4866, None, HOLDS, None), (OWNER, 4864, None, SOLE, None)],
        id="behind the opener's, the only other one that had the connection open",
    ),
    pytest.param(
        BEHIND_THE_END,
        Findings(opener=MASTER, opener_evidence=SOLE, holders=(WORKER_0,)),
        [(INTRUDER, None, None, UNKNOWN, None), (OWNER, 4864, None, SOLE, None), (HOLDER, 4866, None, SOLE, None)],
        id="who has it open then need not be the one that has gone on",
    ),
]


@pytest.mark.parametrize(("what", "findings", "roles"), GOODBYES)
def test_of_a_goodbye_the_one_that_has_left_is_named(what: Verdict, findings: Findings, roles: list[Short]) -> None:
    assert short(find_culprits(what, findings)) == roles


OTHERS = [
    pytest.param(
        verdict(Kind.LEAKED_CONNECTION),
        replace(KERNEL, holders=(WORKER_0, WORKER_1)),
        [(OWNER, 4864, None, SOLE, None), (HOLDER, 4866, None, HOLDS, None), (HOLDER, 4867, None, HOLDS, None)],
        id="leaked: the owner that is gone, and the heirs",
    ),
    pytest.param(
        IDLE, ALONE, [(OWNER, 4864, None, SOLE, None), (HOLDER, 4864, None, SOLE, None)], id="idle: whose it is"
    ),
    pytest.param(
        verdict(Kind.CONNECTION_EXHAUSTION, message=DATA_ROW),
        ALONE,
        [(OWNER, 4864, None, SOLE, None), (HOLDER, 4864, None, SOLE, None)],
        id="exhausted: who was refused, and no intruder",
    ),
    pytest.param(
        verdict(Kind.UNCLEAN_CLOSE, requesters=(Sender(4864, sampled=True),)),
        ALONE,
        [(CLOSER, 4864, None, SOLE, None), (OWNER, 4864, None, SOLE, None)],
        id="closed: the opener that was introduced is no second one",
    ),
    pytest.param(
        verdict(Kind.UNCLEAN_CLOSE, intruder=Sender(4866, 4866, sampled=True), requests=(OUTSTANDING,)),
        Findings(senders={4866: WORKER_0}, only_threads=only(WORKER_0)),
        [(CLOSER, 4866, 4866, HOLDS, ONLY)],
        id="closed: the one that has sent, which says nothing of how it is known to have closed",
    ),
    pytest.param(
        verdict(Kind.UNCLEAN_CLOSE, message=TERMINATE, intruder=Sender(4866, 4871), open_request=True),
        KERNEL,
        [
            (CLOSER, 4866, 4871, KERNEL_SENDER, KERNEL_SENDER),
            (OWNER, 4864, None, SOLE, None),
            (HOLDER, 4864, None, HOLDS, None),
            (HOLDER, 4867, None, HOLDS, None),
        ],
        id="closed: whoever said Terminate in the middle of COPY data",
    ),
]


@pytest.mark.parametrize(("what", "findings", "roles"), OTHERS)
def test_kinds_without_an_offending_message(what: Verdict, findings: Findings, roles: list[Short]) -> None:
    assert short(find_culprits(what, findings)) == roles


def test_of_a_refusal_those_are_named_who_hold_the_most_and_who_was_refused() -> None:
    full = verdict(Kind.CONNECTION_EXHAUSTION, message=DATA_ROW, refusal=Refusal(Limit.SERVER))
    shares = (Share(WORKER_1, 9, evidence=HOLDS), Share(None, 3), Share(MASTER, 2, evidence=SOLE))
    culprits = find_culprits(replace(full, requesters=(Sender(4864, 4864),)), replace(ALONE, shares=shares))
    assert short(culprits) == [
        (OWNER, 4864, None, SOLE, None),
        (HOLDER, 4867, None, HOLDS, None),
        (HOLDER, 4864, None, SOLE, None),
    ]


def test_a_record_names_eight_beside_the_owner_and_counts_the_others() -> None:
    holders = [replace(WORKER_0, pid=5000 + n) for n in range(12)]
    shared = replace(KERNEL, holders=tuple(holders))
    named, more = foremost(find_culprits(OVERLAP, shared))
    assert [c.role for c in named] == [INTRUDER, REQUESTER, OWNER, *[HOLDER] * 6]
    assert more == 6
    assert to_record(fault(OVERLAP, shared))["more_culprits"] == 6
    assert to_record(fault(OVERLAP, KERNEL))["more_culprits"] == 0


def test_a_client_that_can_not_be_looked_at_is_named_by_its_own_account() -> None:
    [culprit] = find_culprits(IDLE, Findings(declared={"pid": "31", "application_name": "app"}))
    assert short((culprit,)) == [(OWNER, 31, None, DECLARED, None)]
    assert culprit.declared == {"pid": "31", "application_name": "app"}
    assert culprit.process is None


@pytest.mark.parametrize("pid", ["", "4867; DROP", "²", "-1", "0x10"])
def test_a_declared_pid_that_is_no_number_is_nobodys(pid: str) -> None:
    [culprit] = find_culprits(IDLE, Findings(declared={"pid": pid}))
    assert (culprit.pid, culprit.evidence) == (None, DECLARED)


def test_what_a_client_declares_does_not_stand_beside_what_is_known() -> None:
    assert DECLARED not in {c.evidence for c in find_culprits(IDLE, replace(ALONE, declared={"pid": "1"}))}


def test_an_intruder_that_is_not_known_leaves_room_for_what_the_client_declares() -> None:
    culprits = find_culprits(BUSY, Findings(declared={"controller": "users"}))
    assert short(culprits) == [(INTRUDER, None, None, UNKNOWN, None), (OWNER, None, None, DECLARED, None)]


@pytest.mark.parametrize("what", [OVERLAP, BUSY, GOODBYE, IDLE, verdict(Kind.UNCLEAN_CLOSE)])
def test_nobody_is_named_twice_in_one_role(what: Verdict) -> None:
    """However the evidence overlaps; and who stands as a doer isn't listed as a bystander too."""
    senders = [None, Sender(4866), Sender(4866, 4866), Sender(4866, 4871, sampled=True), Sender(4864, sampled=True)]
    waits = (waiting(WORKER_0, 4871), waiting(WORKER_0, 4866), waiting(MASTER))
    found = [SHARED, replace(SHARED, waits=Waits(waits)), replace(ALONE, departed=(WORKER_0,)), KERNEL]
    for intruder, first, second, findings in product(senders, senders, senders, found):
        requesters = tuple(one for one in (first, second) if one is not None)
        culprits = find_culprits(replace(what, intruder=intruder, requesters=requesters), findings)
        named = [(c.role, c.pid, c.tid) for c in culprits]
        assert len(named) == len(set(named))
        doers = {c.pid for c in culprits if c.role in (INTRUDER, CLOSER, REQUESTER)}
        assert doers.isdisjoint(c.pid for c in culprits if c.role is HOLDER)


def test_a_requester_without_a_thread_adds_nothing_to_one_with() -> None:
    what = replace(OVERLAP, requesters=(Sender(4866, 4871), Sender(4866), Sender(4867)))
    assert [c.pid for c in find_culprits(what, KERNEL) if c.role is REQUESTER] == [4866]


# What threads were doing

PHP, RUBY, PYTHON = Runtime(Language.PHP), Runtime(Language.RUBY), Runtime(Language.PYTHON)
POLLING = waiting(WORKER_0, 4871, name="puma srv tp 001", call="ppoll")
FRAMES = (Frame("fetch", "/app/a.py", 7), Frame("handle", "/app/b.py", 20))


def doing(findings: Findings, sender: Sender | None = None) -> Culprit:
    return find_culprits(replace(OVERLAP, intruder=sender or Sender(4866, 4871)), findings)[0]


def test_a_thread_that_waits_is_described_by_name_call_and_stack() -> None:
    culprit = doing(
        replace(
            KERNEL, waits=Waits((POLLING,)), stacks=Stacks({POLLING.sleep: FRAMES}), runtimes={WORKER_0.pid: PYTHON}
        )
    )
    assert (culprit.thread_name, culprit.system_call, culprit.runtime) == ("puma srv tp 001", "ppoll", PYTHON)
    assert (culprit.stack, culprit.stack_problem) == (FRAMES, None)


def test_an_only_thread_is_described_in_its_sleep() -> None:
    culprit = doing(
        replace(
            KERNEL,
            only_threads=only(WORKER_0),
            stacks=Stacks({asleep(WORKER_0): FRAMES}),
            runtimes={WORKER_0.pid: PYTHON},
        ),
        Sender(4866),
    )
    assert (culprit.tid, culprit.tid_evidence, culprit.system_call) == (4866, ONLY, None)
    assert (culprit.thread_name, culprit.stack) == ("ruby", FRAMES)


def test_the_stack_of_another_sleep_is_nobodys() -> None:
    """The thread has run since: what it did then isn't what it does."""
    earlier = waiting(WORKER_0, 4871, switches=0)
    culprit = doing(
        replace(
            KERNEL, waits=Waits((POLLING,)), stacks=Stacks({earlier.sleep: FRAMES}), runtimes={WORKER_0.pid: PYTHON}
        )
    )
    assert culprit.stack is None


def test_a_thread_that_was_read_when_it_waited_again_is_described_as_it_waited_then() -> None:
    """Name, call and stack are of the same moment."""
    again = waiting(WORKER_0, 4871, name="puma srv tp 009", call="recvfrom", switches=5)
    stacks = Stacks({again.sleep: FRAMES}, again={(4866, 4871): again})
    culprit = doing(replace(KERNEL, waits=Waits((POLLING,)), stacks=stacks, runtimes={WORKER_0.pid: PYTHON}))
    assert (culprit.thread_name, culprit.system_call) == ("puma srv tp 009", "recvfrom")
    assert (culprit.stack, culprit.stack_problem) == (FRAMES, None)


def test_the_story_says_what_the_opener_was_doing() -> None:
    opened, *others = tell_story(replace(KERNEL, opening_stack=FRAMES), FACTS.opened_at)
    assert (opened.event, opened.stack) == (Event.OPENED, FRAMES)
    assert others
    assert all(chapter.stack is None for chapter in others)


@pytest.mark.parametrize(
    ("runtime", "problems", "problem"),
    [
        (PYTHON, {WORKER_0.pid: "py-spy is not installed"}, "py-spy is not installed"),
        (PYTHON, {WORKER_1.pid: "py-spy is not installed"}, "there was no time to read it"),
        (PYTHON, {}, "there was no time to read it"),
        (RUBY, {WORKER_0.pid: "it can't be asked"}, "it can't be asked"),
        (PHP, {WORKER_0.pid: "it is neither Python nor Ruby"}, None),
        (None, {WORKER_0.pid: "it is neither Python nor Ruby"}, None),
    ],
)
def test_why_there_is_no_stack_is_said_of_python_and_ruby_alone(
    runtime: Runtime | None, problems: dict[int, str], problem: str | None
) -> None:
    runtimes = {} if runtime is None else {WORKER_0.pid: runtime}
    culprit = doing(replace(KERNEL, waits=Waits((POLLING,)), stacks=Stacks({}, problems), runtimes=runtimes))
    assert (culprit.stack, culprit.stack_problem) == (None, problem)


def test_a_thread_is_called_what_its_own_language_calls_it() -> None:
    """The kernel keeps 15 bytes of a name."""
    found = replace(KERNEL, waits=Waits((POLLING,)), stacks=Stacks({}, names={POLLING.sleep: "sidekiq/processor 12"}))
    assert doing(found).thread_name == "sidekiq/processor 12"
    assert doing(replace(KERNEL, waits=Waits((POLLING,)))).thread_name == POLLING.name


def test_only_a_main_thread_has_its_processes_name() -> None:
    assert doing(KERNEL, Sender(4866, 4866)).thread_name == "ruby"
    assert doing(KERNEL, Sender(4866, 4871)).thread_name is None


@pytest.mark.parametrize(
    ("sender", "evidence"),
    [
        (Sender(4866), KERNEL_SENDER),
        (Sender(4866, 4871), KERNEL_SENDER),
        (Sender(4866, 4871, sampled=True), SAMPLE),
        (Sender(4864, sampled=True), SOLE),
    ],
)
def test_how_a_sender_is_known(sender: Sender, evidence: Evidence) -> None:
    assert sender_evidence(sender, ALONE) is evidence


def test_of_a_reused_pid_the_present_process_is_known() -> None:
    """The opener has ended, and one of its pid is among the holders."""
    reused = process(MASTER.pid, 1, "another", age=0.5)
    assert known_processes(replace(ALONE, holders=(reused,)))[MASTER.pid] is reused


# The story

OPENED_AT = FACTS.opened_at
OPENED = Chapter(Event.OPENED, OPENED_AT, 4864, None, SOLE)
STRANGER = process(90, 1, "stranger", age=3600)
GRANDCHILD = process(4870, 4866, "grandchild", age=3)


def inherited(who: Process, parent: int | None, evidence: Evidence = HOLDS) -> Chapter:
    return Chapter(Event.INHERITED, who.started_at, who.pid, parent, evidence)


def left(pid: int) -> Chapter:
    return Chapter(Event.LEFT, None, pid, None, HOLDS)


STORIES = [
    pytest.param(Findings(), (), id="nothing is known"),
    pytest.param(ALONE, (OPENED,), id="nothing has happened"),
    pytest.param(
        KERNEL, (OPENED, inherited(WORKER_0, 4864), inherited(WORKER_1, 4864)), id="two children, the older one first"
    ),
    pytest.param(
        replace(KERNEL, holders=(MASTER, GRANDCHILD, WORKER_0)),
        (OPENED, inherited(WORKER_0, 4864), inherited(GRANDCHILD, 4866)),
        id="a child's child",
    ),
    pytest.param(
        replace(KERNEL, holders=(MASTER, GRANDCHILD)),
        (OPENED, inherited(GRANDCHILD, None)),
        id="a child's child, and it isn't known that the child had it",
    ),
    pytest.param(
        replace(KERNEL, holders=(MASTER,), departed=(WORKER_0,)),
        (OPENED, inherited(WORKER_0, 4864, SOLE), left(4866)),
        id="a child that has let go of it",
    ),
    pytest.param(
        replace(KERNEL, holders=(WORKER_0,)),
        (OPENED, inherited(WORKER_0, 4864, SOLE), left(4864)),
        id="the opener is gone",
    ),
    pytest.param(
        replace(KERNEL, holders=None, departed=(WORKER_0,)),
        (OPENED, inherited(WORKER_0, 4864), left(4866)),
        id="that the opener isn't seen is nothing where nobody can be",
    ),
    pytest.param(
        replace(KERNEL, holders=(MASTER, STRANGER)),
        (OPENED, Chapter(Event.RECEIVED, None, 90, None, HOLDS)),
        id="handed to a process that is older than the connection",
    ),
    pytest.param(
        Findings(holders=(STRANGER, WORKER_0)),
        (inherited(WORKER_0, None),),
        id="an elder may have opened it where the opener isn't known",
    ),
]


@pytest.mark.parametrize(("findings", "story"), STORIES)
def test_the_story_of_the_socket(findings: Findings, story: tuple[Chapter, ...]) -> None:
    assert tell_story(findings, OPENED_AT) == story


def test_an_opener_that_is_but_a_pid_has_opened_it_and_is_the_owner() -> None:
    """The kernel has named it when the connection was accepted, and nobody could look at it yet, or any more."""
    unseen = Findings(connected=(4864, None), holders=(WORKER_0,), holders_complete=False)
    assert tell_story(unseen, OPENED_AT) == (
        Chapter(Event.OPENED, OPENED_AT, 4864, None, KERNEL_SENDER),
        inherited(WORKER_0, 4864),
        left(4864),
    )
    assert short(find_culprits(IDLE, unseen)) == [
        (OWNER, 4864, None, KERNEL_SENDER, None),
        (HOLDER, WORKER_0.pid, None, HOLDS, None),
    ]
    over_tcp = replace(unseen, connected=(4864, 4870))
    assert short(find_culprits(IDLE, over_tcp))[0] == (OWNER, 4864, 4870, KERNEL_SENDER, KERNEL_SENDER)


def test_an_heir_is_not_the_owner_if_the_kernel_has_named_another() -> None:
    heir = Findings(connected=(4864, 4864), opener=None, holders=(WORKER_0,))
    assert [c.pid for c in find_culprits(IDLE, heir) if c.role is OWNER] == [4864]


def test_the_opener_itself_has_not_inherited_what_it_opened() -> None:
    """Young as it may be: it connects as soon as it has started."""
    young = process(4864, 1, "script", age=12.5)
    assert tell_story(replace(ALONE, opener=young, holders=(young,)), OPENED_AT) == (
        Chapter(Event.OPENED, OPENED_AT, 4864, None, SOLE),
    )


def test_an_unused_waiting_thread_of_nobody_is_not_named() -> None:
    """A thread of a process that has no role stays out of the record."""
    other: Waiting = waiting(STRANGER)
    assert STRANGER.pid not in {c.pid for c in find_culprits(BUSY, replace(ALONE, waits=Waits((other,))))}


UNREAD = verdict(Kind.UNREAD_ANSWER, requesters=(Sender(4866, 4871),))


def test_who_left_an_answer_unread_is_named_with_what_it_does_instead() -> None:
    elsewhere = asleep(WORKER_0, 4871)
    found = replace(KERNEL, sleeps={(4866, 4871): elsewhere}, calls={elsewhere: "clock_nanosleep"})
    first = find_culprits(UNREAD, found)[0]
    assert (first.role, first.pid, first.tid, first.system_call) == (REQUESTER, 4866, 4871, "clock_nanosleep")


def test_the_only_holder_is_named_with_what_its_only_thread_does_instead() -> None:
    found = replace(ALONE, only_threads={4864: asleep(MASTER)}, calls={asleep(MASTER): "futex"})
    last = find_culprits(verdict(Kind.UNREAD_ANSWER), found)[-1]
    assert (last.role, last.pid, last.tid, last.system_call) == (HOLDER, 4864, 4864, "futex")


def test_the_opener_that_sends_on_top_of_its_own_answer_intrudes_on_nobody() -> None:
    on_top = replace(UNREAD, message=QUERY, intruder=Sender(4864, 4870), requesters=(Sender(4864, 4864),))
    assert [(c.role, c.tid) for c in find_culprits(on_top, ALONE)][:2] == [(REQUESTER, 4870), (REQUESTER, 4864)]
    unnamed = replace(UNREAD, message=QUERY, requesters=())
    assert find_culprits(unnamed, ALONE)[0].role is REQUESTER
    heir = replace(on_top, intruder=Sender(4866, 4871))
    assert find_culprits(heir, KERNEL)[0].role is INTRUDER
