"""Who is named in which role, and what the record looks like."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from pgguard.attribution.evidence import Driver, Evidence
from pgguard.attribution.findings import Findings, Share, Slots
from pgguard.attribution.frames import Frame
from pgguard.attribution.runtime import Language, Library, Runtime, Server
from pgguard.attribution.stacks import Stacks
from pgguard.attribution.threads import Waits
from pgguard.faults.advice.exhaustion import advice_on_exhaustion
from pgguard.faults.build import plain_fault
from pgguard.faults.catalogue import CATALOGUE, SERVERS_ADVICE, SETTLED_ADVICE, Severity
from pgguard.faults.conclude import AT_ONCE
from pgguard.faults.fault import Role
from pgguard.faults.policy import Action
from pgguard.faults.sql import SqlMode
from pgguard.identity import Sender
from pgguard.reporting.record import rfc3339, to_record
from pgguard.session.verdicts import Direction, Kind, Limit, MessageSeen, Party, Refusal, RequestState, Verdict
from tests.faults.samples import (
    DATA_ROW,
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
    fault,
    process,
    verdict,
    waiting,
)

KERNEL_SENDER, SOLE, HOLDS, UNKNOWN = (
    Evidence.KERNEL_SENDER,
    Evidence.SOLE_HOLDER,
    Evidence.SOCKET_HOLDER,
    Evidence.UNKNOWN,
)
INTRUDER, REQUESTER, OWNER, HOLDER, CLOSER = Role.INTRUDER, Role.REQUESTER, Role.OWNER, Role.HOLDER, Role.CLOSER

NOTHING = Findings()
ALONE = Findings(opener=MASTER, opener_evidence=SOLE, holders=(MASTER,), driver=Driver.LIBPQ)
SHARED_UNSEEN = Findings(opener=MASTER, opener_evidence=SOLE, holders=(MASTER, WORKER_0))
KNOWN_SENDER = Findings(senders={4866: WORKER_0})

BUSY = verdict(Kind.REQUEST_WHILE_BUSY, message=QUERY, requests=(OUTSTANDING,), open_request=True)
BUSY_SEEN = replace(BUSY, intruder=Sender(4866, 4871))
POLLING = waiting(MASTER, 4870, name="puma srv tp 001")
WAITS = Waits((POLLING,))
STACKS = Stacks({POLLING.sleep: (Frame("fetch", "/app/a.py", 7),)})
PUMA = Runtime(Language.RUBY, Server.PUMA, frozenset({Library.RAILS, Library.ACTIVE_RECORD}))

ENDED = "the client's side ended without Terminate, "
CLOSED = replace(verdict(Kind.UNCLEAN_CLOSE), reason=ENDED + "between two requests")
CUT_SHORT = verdict(
    Kind.UNCLEAN_CLOSE,
    "Terminate came in the middle of COPY data",
    message=TERMINATE,
    intruder=Sender(4864),
    open_request=True,
)


@pytest.mark.parametrize(
    ("what", "findings", "roles"),
    [
        pytest.param(
            OVERLAP,
            KERNEL,
            [
                (INTRUDER, 4867, 4880, KERNEL_SENDER),
                (REQUESTER, 4866, 4871, KERNEL_SENDER),
                (OWNER, 4864, None, SOLE),
                (HOLDER, 4864, None, HOLDS),
            ],
            id="the kernel names both sides; only the owner is a holder besides",
        ),
        pytest.param(
            OVERLAP,
            NOTHING,
            [(INTRUDER, 4867, 4880, KERNEL_SENDER), (REQUESTER, 4866, 4871, KERNEL_SENDER)],
            id="nothing but the kernel's word",
        ),
        pytest.param(
            BUSY, ALONE, [(INTRUDER, 4864, None, SOLE), (OWNER, 4864, None, SOLE)], id="unseen: the only holder sent it"
        ),
        pytest.param(
            BUSY,
            SHARED_UNSEEN,
            [
                (INTRUDER, None, None, UNKNOWN),
                (OWNER, 4864, None, SOLE),
                (HOLDER, 4864, None, HOLDS),
                (HOLDER, 4866, None, HOLDS),
            ],
            id="unseen, two holders: nobody is picked",
        ),
        pytest.param(BUSY, NOTHING, [(INTRUDER, None, None, UNKNOWN)], id="unseen, holders not known"),
        pytest.param(
            verdict(Kind.MESSAGE_WHILE_IDLE, message=DATA_ROW),
            ALONE,
            [(OWNER, 4864, None, SOLE), (HOLDER, 4864, None, SOLE)],
            id="the server did it: no client is an intruder",
        ),
        pytest.param(
            verdict(Kind.INHERITED_CONNECTION),
            SHARED_UNSEEN,
            [(OWNER, 4864, None, SOLE), (HOLDER, 4864, None, HOLDS), (HOLDER, 4866, None, HOLDS)],
            id="inherited and unused: no intruder",
        ),
        pytest.param(
            CLOSED, ALONE, [(CLOSER, 4864, None, SOLE), (OWNER, 4864, None, SOLE)], id="closed by the only holder"
        ),
        pytest.param(
            replace(CLOSED, intruder=Sender(4866)),
            KNOWN_SENDER,
            [(CLOSER, 4866, None, HOLDS)],
            id="closed, and one process is all that was ever seen",
        ),
        pytest.param(
            replace(CLOSED, intruder=Sender(4866), requesters=(Sender(4867),)),
            KNOWN_SENDER,
            [(REQUESTER, 4866, None, KERNEL_SENDER), (REQUESTER, 4867, None, KERNEL_SENDER)],
            id="closed after two used it: the last to send need not be the last to close",
        ),
        pytest.param(
            replace(CLOSED, requests=(OUTSTANDING,)),
            ALONE,
            [(OWNER, 4864, None, SOLE), (HOLDER, 4864, None, SOLE)],
            id="closed, and an earlier request came from another process than the holder",
        ),
        pytest.param(CLOSED, NOTHING, [], id="closed by nobody knows whom"),
    ],
)
def test_roles(what: Verdict, findings: Findings, roles: list[tuple[Role, int | None, int | None, Evidence]]) -> None:
    """Attribution never guesses: a pid stands only where its evidence does."""
    culprits = fault(what, findings).culprits
    assert [(c.role, c.pid, c.tid, c.evidence) for c in culprits] == roles


@pytest.mark.parametrize("action", Action)
def test_that_a_session_is_over_is_known_even_where_nothing_else_can_be_told(action: Action) -> None:
    goodbye = verdict(Kind.FOREIGN_TERMINATE, message=TERMINATE)
    for what, over in (
        (goodbye, action is not Action.DROPPED),
        (replace(CLOSED, ends=True), action is not Action.DROPPED),
        (OVERLAP, False),
    ):
        assert fault(what, action=action).over is over
        assert plain_fault(what, FACTS, at=NOW, severity=Severity.ERROR, action=action).over is over


def test_a_sender_that_could_not_be_looked_at_is_named_by_its_pid_alone() -> None:
    built = fault(OVERLAP, replace(KERNEL, senders={}, holders=None))
    assert built.culprits[0].process is None
    assert built.summary.startswith("pid 4867 sent Query")


LEAK = verdict(
    Kind.LEAKED_CONNECTION,
    "the connection has outlived the process that opened it, and has not been used for more than 5 s",
)
FULL = verdict(
    Kind.CONNECTION_EXHAUSTION,
    "the server refused the connection: all its slots are taken",
    refusal=Refusal(Limit.SERVER),
)

SUMMARIES = [
    (OVERLAP, KERNEL, "pid 4867 (puma: cluster worker 1) sent Query while the answer to pid 4866 was outstanding"),
    (
        replace(OVERLAP, reason="after another process had used the connection in between"),
        KERNEL,
        "pid 4867 (puma: cluster worker 1) sent Query after pid 4866 had used the connection in between",
    ),
    (
        replace(
            OVERLAP,
            reason="after another process had used the connection in between",
            requesters=(Sender(4864),),
            sender=Sender(4864),
        ),
        KERNEL,
        (
            "pid 4867 (puma: cluster worker 1) uses the connection that pid 4864"
            " (puma 6.4.2 (tcp://0.0.0.0:9292) [app]) opened: pid 4864 sent Query"
            " after pid 4867 had used the connection in between"
        ),
    ),
    (
        replace(OVERLAP, reason="in the middle of another process's Query"),
        KERNEL,
        "pid 4867 (puma: cluster worker 1) sent Query in the middle of pid 4866's Query",
    ),
    (
        replace(OVERLAP, kind=Kind.INHERITED_CONNECTION, reason="on a connection that another process had used"),
        KERNEL,
        "pid 4867 (puma: cluster worker 1) sent Query on a connection that pid 4866 had used",
    ),
    (
        verdict(Kind.INHERITED_CONNECTION),
        KERNEL,
        (
            "the connection that pid 4864 (puma 6.4.2 (tcp://0.0.0.0:9292) [app]) opened is also open in"
            " pid 4866 (puma: cluster worker 0) and pid 4867 (puma: cluster worker 1)"
        ),
    ),
    (
        verdict(Kind.INHERITED_CONNECTION),
        Findings(holders=(WORKER_0, WORKER_1)),
        "one connection is open in pid 4866 (puma: cluster worker 0) and pid 4867 (puma: cluster worker 1)",
    ),
    (verdict(Kind.INHERITED_CONNECTION), NOTHING, "more than one process has the connection's socket open"),
    (
        BUSY_SEEN,
        KERNEL,
        "pid 4866 (puma: cluster worker 0) sent Query before the answer to request 41 was complete",
    ),
    (BUSY, NOTHING, "the client sent Query before the answer to request 41 was complete"),
    (
        verdict(Kind.MESSAGE_WHILE_IDLE, "the server sent DataRow while no request was outstanding", message=DATA_ROW),
        KERNEL,
        "the server sent DataRow while no request was outstanding",
    ),
    (
        verdict(Kind.PROTOCOL_VIOLATION, "the client sent Bind with an impossible length of 2", intruder=Sender(4867)),
        KERNEL,
        "pid 4867 (puma: cluster worker 1) sent Bind with an impossible length of 2",
    ),
    (
        replace(CLOSED, open_request=True, reason=ENDED + "in the middle of a request"),
        ALONE,
        (
            "the connection of pid 4864 (puma 6.4.2 (tcp://0.0.0.0:9292) [app])"
            " ended without Terminate, in the middle of a request"
        ),
    ),
    (
        replace(CLOSED, open_transaction=True, reason=ENDED + "with a transaction open"),
        SHARED_UNSEEN,
        (
            "the connection that pid 4864 (puma 6.4.2 (tcp://0.0.0.0:9292) [app]) opened ended without Terminate,"
            " with a transaction open"
        ),
    ),
    (CLOSED, NOTHING, "the client's side ended without Terminate, between two requests"),
    (
        CUT_SHORT,
        ALONE,
        (
            "pid 4864 (puma 6.4.2 (tcp://0.0.0.0:9292) [app]) sent Terminate in the middle of COPY data, "
            "which the server throws away"
        ),
    ),
    (replace(CUT_SHORT, intruder=None), SHARED_UNSEEN, "Terminate came in the middle of COPY data"),
    (
        BUSY,
        SHARED_UNSEEN,
        (
            "one of pids 4864 and 4866, which share the connection, "
            "sent Query before the answer to request 41 was complete"
        ),
    ),
    (
        replace(OVERLAP, kind=Kind.SHARED_BY_THREADS, intruder=Sender(4866, 4880)),
        KERNEL,
        "thread 4880 of pid 4866 (puma: cluster worker 0) sent Query while the answer to thread 4871 was outstanding",
    ),
    (
        verdict(
            Kind.SHARED_BY_THREADS,
            AT_ONCE,
            intruder=Sender(4866, 4880, sampled=True),
            requesters=(Sender(4866, 4871, sampled=True),),
        ),
        KERNEL,
        f"threads 4880 and 4871 of pid 4866 (puma: cluster worker 0) {AT_ONCE}",
    ),
    (
        verdict(
            Kind.SHARED_BY_THREADS,
            AT_ONCE,
            requesters=(Sender(4866, 4871, sampled=True), Sender(4866, 4880, sampled=True)),
        ),
        KERNEL,
        f"threads 4871 and 4880 of pid 4866 (puma: cluster worker 0) {AT_ONCE}",
    ),
    (
        verdict(
            Kind.SHARED_BY_PROCESSES,
            AT_ONCE,
            intruder=Sender(4867, 4880, sampled=True),
            requesters=(Sender(4866, 4871, sampled=True),),
        ),
        KERNEL,
        (
            "thread 4880 of pid 4867 (puma: cluster worker 1) and thread 4871 of pid 4866 (puma: cluster worker 0)"
            f" {AT_ONCE}"
        ),
    ),
    (
        verdict(
            Kind.SHARED_BY_PROCESSES,
            AT_ONCE,
            intruder=Sender(4867, sampled=True),
            requesters=(Sender(4866, sampled=True),),
        ),
        KERNEL,
        f"pid 4867 (puma: cluster worker 1) and pid 4866 (puma: cluster worker 0) {AT_ONCE}",
    ),
    (
        verdict(Kind.FOREIGN_TERMINATE, message=TERMINATE, intruder=Sender(4867)),
        KERNEL,
        (
            "pid 4867 (puma: cluster worker 1) sent Terminate on the connection that"
            " pid 4864 (puma 6.4.2 (tcp://0.0.0.0:9292) [app]) opened"
        ),
    ),
    (
        verdict(Kind.FOREIGN_TERMINATE, message=TERMINATE),
        replace(ALONE, departed=(WORKER_0,)),
        (
            "pid 4866 (puma: cluster worker 0) sent Terminate on the connection that"
            " pid 4864 (puma 6.4.2 (tcp://0.0.0.0:9292) [app]) opened"
        ),
    ),
    (
        verdict(Kind.FOREIGN_TERMINATE, message=TERMINATE),
        ALONE,
        (
            "a process other than pid 4864 (puma 6.4.2 (tcp://0.0.0.0:9292) [app]),"
            " which opened the connection, sent Terminate on it"
        ),
    ),
    (
        LEAK,
        replace(KERNEL, holders=(WORKER_0,)),
        (
            "the connection has outlived pid 4864 (puma 6.4.2 (tcp://0.0.0.0:9292) [app]), which opened it, and has not"
            " been used for more than 5 s: pid 4866 (puma: cluster worker 0) has it open"
        ),
    ),
    (
        LEAK,
        replace(KERNEL, holders=(WORKER_0, WORKER_1)),
        (
            "the connection has outlived pid 4864 (puma 6.4.2 (tcp://0.0.0.0:9292) [app]), which opened it, and has not"
            " been used for more than 5 s: pid 4866 (puma: cluster worker 0) and pid 4867 (puma: cluster worker 1) have"
            " it open"
        ),
    ),
    (LEAK, NOTHING, "the connection has outlived the process that opened it, and has not been used for more than 5 s"),
    (
        verdict(Kind.IDLE_IN_TRANSACTION, "has left a transaction idle for more than 60 s"),
        ALONE,
        "pid 4864 (puma 6.4.2 (tcp://0.0.0.0:9292) [app]) has left a transaction idle for more than 60 s",
    ),
    (
        verdict(Kind.IDLE_IN_TRANSACTION, "has left a transaction idle for more than 60 s"),
        replace(ALONE, holders=(WORKER_0,)),
        "pid 4866 (puma: cluster worker 0) has left a transaction idle for more than 60 s",
    ),
    (
        verdict(Kind.IDLE_IN_TRANSACTION, "has left a transaction idle for more than 60 s"),
        NOTHING,
        "the client has left a transaction idle for more than 60 s",
    ),
    (
        verdict(Kind.UNREAD_ANSWER, "has left an answer of 7 bytes unread for more than 5 s"),
        ALONE,
        "pid 4864 (puma 6.4.2 (tcp://0.0.0.0:9292) [app]) has left an answer of 7 bytes unread for more than 5 s",
    ),
    (
        verdict(Kind.UNREAD_ANSWER, "has left an answer of 7 bytes unread for more than 5 s"),
        NOTHING,
        "the client has left an answer of 7 bytes unread for more than 5 s",
    ),
    (
        verdict(
            Kind.UNREAD_ANSWER,
            "has left an answer of 7 bytes unread for more than 5 s",
            requesters=(Sender(4866, 4871),),
        ),
        KERNEL,
        "pid 4866 (puma: cluster worker 0) has left an answer of 7 bytes unread for more than 5 s",
    ),
    (
        verdict(
            Kind.UNREAD_ANSWER,
            "on top of 7 bytes of the last answer, which had lain unread for 0.2 s",
            message=QUERY,
            intruder=Sender(4867, 4880),
        ),
        KERNEL,
        (
            "pid 4867 (puma: cluster worker 1) sent Query on top of 7 bytes of the last answer, which had lain unread"
            " for 0.2 s"
        ),
    ),
    (
        FULL,
        replace(KERNEL, opener=WORKER_1, holders=(WORKER_1,), shares=(Share(WORKER_0, 12), Share(None, 3))),
        (
            "the server refused pid 4867 (puma: cluster worker 1) a connection: all its slots are taken; of the"
            " connections through this guard that count toward the limit, pid 4866 (puma: cluster worker 0) has 12 and"
            " clients that could not be identified have 3"
        ),
    ),
    (
        FULL,
        replace(NOTHING, shares=tuple(Share(WORKER_1, n) for n in (5, 4, 3, 2, 1)), slots=Slots(15, 9, 0)),
        (
            "the server refused the client a connection: all its slots are taken; of the connections through this"
            " guard that count toward the limit, pid 4867 (puma: cluster worker 1) has 5, pid 4867 (puma: cluster"
            " worker 1) has 4, pid 4867 (puma: cluster worker 1) has 3 and 2 other processes have 3; 9 of the 15"
            " sat idle"
        ),
    ),
    (
        FULL,
        replace(NOTHING, shares=(Share(WORKER_1, 3),), slots=Slots(3, 1, 2)),
        (
            "the server refused the client a connection: all its slots are taken; of the connections through this"
            " guard that count toward the limit, pid 4867 (puma: cluster worker 1) has 3; 2 of the 3 sat idle in a"
            " transaction"
        ),
    ),
    (FULL, NOTHING, "the server refused the client a connection: all its slots are taken"),
    (
        FULL,
        replace(NOTHING, shares=(), slots=Slots(0, 0, 0)),
        (
            "the server refused the client a connection: all its slots are taken;"
            " no connection that counts toward the limit goes through this guard"
        ),
    ),
    (verdict(Kind.UNTRACKED, "the session is encrypted with GSS"), KERNEL, "the session is encrypted with GSS"),
]


@pytest.mark.parametrize(("what", "findings", "summary"), SUMMARIES)
def test_summaries_say_who_did_what_to_whom(what: Verdict, findings: Findings, summary: str) -> None:
    assert fault(what, findings).summary == summary


def test_a_summary_is_one_printable_line_whatever_a_process_calls_itself() -> None:
    nasty = process(4867, 4864, "evil\n\x1b[2J worker")
    built = fault(OVERLAP, replace(KERNEL, senders={4867: nasty}))
    assert built.summary.startswith("pid 4867 (evil\\n\\x1b[2J worker) sent")


def test_severity_depends_on_the_driver() -> None:
    assert fault(BUSY, replace(ALONE, driver=Driver.NODE)).severity is Severity.WARNING
    assert fault(BUSY, ALONE).severity is Severity.ERROR


def test_the_record_is_the_one_of_the_contract() -> None:
    """Key by key, in the contract's order; dashboards read this."""
    built = fault(OVERLAP, replace(KERNEL, holders=(WORKER_0, WORKER_1), opener=None))
    record = to_record(built)
    assert json.loads(json.dumps(record)) == record
    assert record == {
        "id": 7,
        "at": "2026-11-22T11:52:07.120402Z",
        "run": None,
        "cause": 0,
        "kind": "shared-by-processes",
        "severity": "error",
        "action": "logged",
        "repeat_of": None,
        "suppressed": 0,
        "so_far": None,
        "summary": "pid 4867 (puma: cluster worker 1) sent Query while the answer to pid 4866 was outstanding",
        "reason": "while the answer to another process was outstanding",
        "by": "client",
        "over": False,
        "session": {
            "id": 3,
            "user": "app",
            "database": "app",
            "application_name": "puma",
            "transport": "tcp",
            "client": "127.0.0.1:53984",
            "backend_pid": 4865,
            "opened_at": "2026-11-22T11:51:54.620402Z",
            "tls": False,
            "through": None,
        },
        "message": {"direction": "frontend", "type": "Q", "code": "0x51", "name": "Query", "size": 61},
        "sent_by": {"pid": 4867, "tid": 4880},
        "libpq": "message type 0x54 arrived from server while idle",
        "culprits": [
            {
                "role": "intruder",
                "pid": 4867,
                "tid": 4880,
                "evidence": "kernel-sender",
                "process": {
                    "name": "ruby",
                    "cmdline": ["puma: cluster worker 1: 4864 [app]"],
                    "ppid": 4864,
                    "namespace_pid": None,
                    "started_at": "2026-11-22T11:51:59.120402Z",
                    "container": None,
                    "pod": None,
                },
                "tid_evidence": "kernel-sender",
                "runtime": None,
                "thread_name": None,
                "system_call": None,
                "stack": None,
                "stack_problem": None,
                "declared": None,
            },
            {
                "role": "requester",
                "pid": 4866,
                "tid": 4871,
                "evidence": "kernel-sender",
                "process": {
                    "name": "ruby",
                    "cmdline": ["puma: cluster worker 0: 4864 [app]"],
                    "ppid": 4864,
                    "namespace_pid": None,
                    "started_at": "2026-11-22T11:51:58.120402Z",
                    "container": None,
                    "pod": None,
                },
                "tid_evidence": "kernel-sender",
                "runtime": None,
                "thread_name": None,
                "system_call": None,
                "stack": None,
                "stack_problem": None,
                "declared": None,
            },
        ],
        "more_culprits": 0,
        "requests": [
            {
                "n": 41,
                "at": "2026-11-22T11:52:07.119402Z",
                "messages": "Q",
                "sql": "SELECT $1 AS pid",
                "pid": 4866,
                "tid": 4871,
                "evidence": "kernel-sender",
                "state": "answering",
                "at_rest": None,
            }
        ],
        "story": [
            {
                "event": "inherited",
                "at": "2026-11-22T11:51:58.120402Z",
                "pid": 4866,
                "from": None,
                "evidence": "socket-holder",
                "stack": None,
            },
            {
                "event": "inherited",
                "at": "2026-11-22T11:51:59.120402Z",
                "pid": 4867,
                "from": None,
                "evidence": "socket-holder",
                "stack": None,
            },
        ],
        "limit": None,
        "connections": None,
        "advice": {
            "title": built.advice.title,
            "text": built.advice.text,
            "code": None,
            "sources": ["https://www.postgresql.org/docs/current/libpq-connect.html"],
        },
        "tracing": None,
    }
    assert list(record) == [
        *(
            "id",
            "at",
            "run",
            "cause",
            "kind",
            "severity",
            "action",
            "repeat_of",
            "suppressed",
            "so_far",
            "summary",
            "reason",
            "by",
            "over",
            "session",
        ),
        *("message", "sent_by", "libpq", "culprits", "more_culprits", "requests", "story", "limit", "connections"),
        "advice",
        "tracing",
    ]
    assert list(record["culprits"][0]) == [
        *("role", "pid", "tid", "evidence", "tid_evidence", "process", "runtime", "thread_name", "system_call"),
        *("stack", "stack_problem", "declared"),
    ]


def test_the_record_says_what_a_thread_was_doing_and_how_that_is_known() -> None:
    record = to_record(fault(BUSY, replace(ALONE, waits=WAITS, stacks=STACKS, runtimes={4864: PUMA})))
    culprit = record["culprits"][0]
    assert json.loads(json.dumps(record)) == record
    assert {key: culprit[key] for key in ("tid", "evidence", "tid_evidence", "thread_name", "system_call")} == {
        "tid": 4870,
        "evidence": "sole-holder",
        "tid_evidence": "thread-sample",
        "thread_name": "puma srv tp 001",
        "system_call": "poll",
    }
    assert culprit["runtime"] == {"language": "Ruby", "server": "Puma", "libraries": ["Active Record", "Rails"]}
    assert culprit["stack"] == [{"function": "fetch", "file": "/app/a.py", "line": 7, "application": False}]
    assert culprit["stack_problem"] is None


LIBRARYS = Frame("wait", "/venv/lib/python3.12/site-packages/psycopg/waiting.py", 9)
OWN = Frame("load_user", "/srv/app.py", 23, application=True)
MAIN = Frame("<module>", "/srv/app.py", 60, application=True)


def stacked(*frames: Frame, pid: int = 4867) -> Findings:
    who = {4866: WORKER_0, 4867: WORKER_1}[pid]
    one = waiting(who, {4866: 4871, 4867: 4880}[pid])
    return replace(KERNEL, waits=Waits((one,)), stacks=Stacks({one.sleep: frames}))


def test_the_summary_says_where_in_the_application_the_first_one_was_seen() -> None:
    seen = fault(OVERLAP, stacked(LIBRARYS, OWN, MAIN))
    assert to_record(seen)["summary"] == f"{fault(OVERLAP, KERNEL).summary}; seen at app.py:23 in load_user"
    assert [frame["application"] for frame in to_record(seen)["culprits"][0]["stack"]] == [False, True, True]


@pytest.mark.parametrize(
    "findings", [stacked(LIBRARYS), stacked(LIBRARYS, OWN, pid=4866), stacked()], ids=["nowhere", "another", "nothing"]
)
def test_it_says_nothing_where_that_is_not_known(findings: Findings) -> None:
    assert to_record(fault(OVERLAP, findings))["summary"] == fault(OVERLAP, KERNEL).summary


def test_the_record_says_where_the_connection_was_opened() -> None:
    story = to_record(fault(OVERLAP, replace(KERNEL, opening_stack=(LIBRARYS, MAIN))))["story"]
    assert story[0]["stack"] == [LIBRARYS._asdict(), MAIN._asdict()]
    assert [chapter["stack"] for chapter in story[1:]] == [None] * (len(story) - 1)
    assert to_record(fault(OVERLAP, KERNEL))["story"][0]["stack"] is None


def test_the_record_says_who_has_how_many_connections() -> None:
    full = verdict(Kind.CONNECTION_EXHAUSTION)
    record = to_record(fault(full, replace(ALONE, shares=(Share(MASTER, 90), Share(None, 2)))))
    assert [(share["pid"], share["count"]) for share in record["connections"]] == [(4864, 90), (None, 2)]
    assert record["connections"][0]["process"]["name"] == "ruby"
    assert record["connections"][1]["process"] is None
    assert to_record(fault(full, replace(ALONE, shares=())))["connections"] == []


def test_advice_on_a_refusal_is_for_those_who_hold_the_connections() -> None:
    """What runs in the process that was refused one says nothing about theirs."""
    refused, holder = (
        Runtime(Language.PYTHON, None, frozenset({Library.PSYCOPG, *more})) for more in ((Library.SQLALCHEMY,), ())
    )
    shares = (Share(WORKER_1, 9, idle_in_transaction=9, evidence=Evidence.SOLE_HOLDER),)
    held = replace(ALONE, shares=shares, slots=Slots(9, 0, 9), runtimes={4864: refused, 4867: holder})
    built = fault(FULL, held).advice
    assert built == advice_on_exhaustion(Limit.SERVER, held.slots, (holder,))
    assert built != advice_on_exhaustion(Limit.SERVER, held.slots, (refused,))
    assert fault(FULL, replace(held, runtimes={4864: refused})).advice == advice_on_exhaustion(
        Limit.SERVER, held.slots, (refused,)
    )


def test_the_record_names_a_process_in_a_container_by_both_its_pids() -> None:
    inside = replace(WORKER_1, namespace_pid=17)
    record = to_record(fault(OVERLAP, replace(KERNEL, senders={4866: WORKER_0, 4867: inside})))
    assert [culprit["process"]["namespace_pid"] for culprit in record["culprits"][:2]] == [17, None]


def test_the_record_says_what_a_client_declared_that_can_not_be_looked_at() -> None:
    said = Findings(declared={"pid": "31", "controller": "users"})
    [culprit] = to_record(fault(verdict(Kind.IDLE_IN_TRANSACTION), said))["culprits"]
    assert (culprit["pid"], culprit["evidence"], culprit["process"]) == (31, "declared", None)
    assert culprit["declared"] == {"pid": "31", "controller": "users"}


@pytest.mark.parametrize(
    ("sender", "evidence"),
    [
        (Sender(4866, 4871), "kernel-sender"),
        (Sender(4866), "kernel-sender"),
        (Sender(4866, 4871, sampled=True), "thread-sample"),
        (Sender(4864, sampled=True), "sole-holder"),
        (None, None),
    ],
)
def test_each_request_says_how_its_sender_is_known(sender: Sender | None, evidence: str | None) -> None:
    record = to_record(fault(replace(BUSY, requests=(replace(OUTSTANDING, sender=sender),)), ALONE))
    assert record["requests"][0]["evidence"] == evidence


def test_what_is_not_known_is_null() -> None:
    facts = replace(FACTS, user=None, database=None, application_name=None, client=None, backend_pid=None)
    seen = replace(OUTSTANDING, sql=None, sender=None, state=RequestState.WAITING)
    startup = MessageSeen(Direction.FRONTEND, None, "StartupMessage", 84)
    record = to_record(fault(replace(BUSY, message=startup, requests=(seen,)), NOTHING, facts=facts))
    assert record["message"] == {
        "direction": "frontend",
        "type": None,
        "code": None,
        "name": "StartupMessage",
        "size": 84,
    }
    assert record["session"]["user"] is None
    assert record["culprits"] == [
        {
            "role": "intruder",
            "pid": None,
            "tid": None,
            "evidence": "unknown",
            "tid_evidence": None,
            "process": None,
            "runtime": None,
            "thread_name": None,
            "system_call": None,
            "stack": None,
            "stack_problem": None,
            "declared": None,
        }
    ]
    assert (record["story"], record["connections"]) == ([], None)
    assert record["requests"][0]["sql"] is None
    assert record["requests"][0]["pid"] is None
    assert record["requests"][0]["evidence"] is None
    assert to_record(fault(CLOSED, NOTHING))["message"] is None


def test_no_password_of_a_command_line_is_recorded() -> None:
    psql = process(4867, 4864, "psql", "postgresql://app:s3cret@db/app", name="psql")
    for mode in SqlMode:
        record = to_record(fault(OVERLAP, replace(KERNEL, senders={4867: psql}), sql_mode=mode, action=Action.REJECTED))
        assert "s3cret" not in json.dumps(record)


@pytest.mark.parametrize(
    ("at", "text"),
    [(NOW, "2026-11-22T11:52:07.120402Z"), (0.0, "1970-01-01T00:00:00.000000Z")],
)
def test_times_have_microseconds_and_z(at: float, text: str) -> None:
    assert rfc3339(at) == text


def test_requests_that_overlap_on_a_shared_connection_are_advised_about_sharing() -> None:
    shared, alone = fault(BUSY, SHARED_UNSEEN), fault(BUSY, ALONE)
    assert shared.advice == fault(OVERLAP, KERNEL).advice
    assert alone.advice != shared.advice


def test_a_torn_message_of_the_servers_accuses_nobody_and_looks_at_the_server() -> None:
    reason = "the server's stream ended 505 bytes before the end of a DataRow message"
    torn = verdict(Kind.PROTOCOL_VIOLATION, reason, message=DATA_ROW, by=Party.SERVER, ends=True)
    built = fault(replace(torn, requests=(OUTSTANDING,), requesters=(Sender(4866, 4871),)), KERNEL)
    assert built.summary == reason
    assert built.severity is Severity.ERROR
    assert built.over
    assert {culprit.role for culprit in built.culprits} == {REQUESTER, OWNER, HOLDER}
    assert built.advice == SERVERS_ADVICE
    unnamed = fault(replace(torn, message=None), ALONE)
    assert {culprit.role for culprit in unnamed.culprits} == {OWNER, HOLDER}


@pytest.mark.parametrize("message", [QUERY, None])
def test_a_torn_message_of_the_clients_is_its_own_doing(message: MessageSeen | None) -> None:
    built = fault(verdict(Kind.PROTOCOL_VIOLATION, message=message, intruder=Sender(4866)), KERNEL)
    assert [culprit.pid for culprit in built.culprits if culprit.role is INTRUDER] == [4866]
    assert built.advice == CATALOGUE[Kind.PROTOCOL_VIOLATION].advice


@pytest.mark.parametrize("driver", Driver)
def test_what_libpq_prints_is_not_told_of_another_driver(driver: Driver) -> None:
    shown = fault(OVERLAP, replace(KERNEL, driver=driver)).libpq
    assert shown == (OVERLAP.libpq if driver in {Driver.LIBPQ, Driver.UNKNOWN} else None)
    assert OVERLAP.libpq


def test_of_heirs_that_have_followed_the_advice_nothing_more_is_asked() -> None:
    inherited = verdict(Kind.INHERITED_CONNECTION)
    assert fault(replace(inherited, settled=True), KERNEL).advice == SETTLED_ADVICE
    assert fault(inherited, KERNEL).advice != SETTLED_ADVICE


def test_the_summary_says_that_the_heirs_have_others_of_their_own() -> None:
    inherited = replace(verdict(Kind.INHERITED_CONNECTION), settled=True)
    told = fault(inherited, replace(KERNEL, opener=MASTER, holders=(MASTER, WORKER_0))).summary
    assert told.endswith("(puma: cluster worker 0), which has not used it and has its own")
    told = fault(inherited, replace(KERNEL, opener=MASTER, holders=(MASTER, WORKER_0, WORKER_1))).summary
    assert told.endswith("(puma: cluster worker 1), which have not used it and have their own")
