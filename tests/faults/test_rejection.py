"""What psql shows when a session is rejected."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgguard.attribution.findings import Findings
from pgguard.faults.conclude import AT_ONCE
from pgguard.faults.policy import Action
from pgguard.faults.rejection import rejection
from pgguard.identity import Sender
from pgguard.session.verdicts import Kind, Verdict
from tests.faults.samples import KERNEL, MASTER, OUTSTANDING, OVERLAP, WORKER_0, fault, process, verdict


def test_a_client_is_told_what_happened_who_did_it_and_what_to_change() -> None:
    told = rejection(fault(action=Action.REJECTED))
    assert told.message == (
        "pgguard: terminating connection: pid 4867 (puma: cluster worker 1) sent Query "
        "while the answer to pid 4866 was outstanding"
    )
    assert told.detail == (
        "This is shared-by-processes: two processes use one connection. "
        "Request 41 was outstanding: SELECT $1 AS pid (sent by pid 4866). "
        "pid 4866 (puma: cluster worker 0) used this connection before. "
        "pid 4864 (puma 6.4.2 (tcp://0.0.0.0:9292) [app]) opened this connection. "
        "The session was closed and its query cancelled (pgguard fault 7)."
    )
    assert told.hint.startswith("Close the pool before forking. A connection belongs to the process that opened it;")


def test_holders_are_told_in_number() -> None:
    inherited = verdict(Kind.INHERITED_CONNECTION)
    detail = rejection(fault(inherited, KERNEL)).detail
    assert "worker 0) and pid 4867 (puma: cluster worker 1) have this connection open as well." in detail
    detail = rejection(fault(inherited, replace(KERNEL, holders=(MASTER, WORKER_0)))).detail
    assert "pid 4866 (puma: cluster worker 0) has this connection open as well." in detail


def test_a_process_is_told_of_once_with_all_that_it_did() -> None:
    threads = tuple(Sender(4864, tid) for tid in (4864, 4865))
    detail = rejection(fault(replace(OVERLAP, requesters=threads), replace(KERNEL, opener=MASTER))).detail
    assert "pid 4864 (puma 6.4.2 (tcp://0.0.0.0:9292) [app]) opened this connection and used it before." in detail
    assert detail.count("pid 4864 (") == 1


def test_nothing_is_said_to_be_cancelled_that_was_not_running() -> None:
    detail = rejection(fault(replace(OVERLAP, requests=()))).detail
    assert "The session was closed (pgguard fault 7)." in detail


@given(st.text(), st.binary(max_size=40))
def test_the_texts_fit_into_an_error_response(title: str, sql: bytes) -> None:
    """Fields end with a NUL, and logs are read by the line: one line each, and nothing unprintable."""
    worker = process(4867, 4864, title)
    what = replace(OVERLAP, requests=(replace(OUTSTANDING, sql=sql),))
    told = rejection(fault(what, Findings(opener=worker, holders=(worker,), senders={4867: worker})))
    assert all(text.isprintable() for text in told)


@pytest.mark.parametrize("kind", Kind)
def test_every_kind_can_be_put_into_words(kind: Kind) -> None:
    told = rejection(fault(verdict(kind), Findings()))
    assert told.message.startswith("pgguard: ")
    assert f"This is {kind}: " in told.detail


@pytest.mark.parametrize(
    ("what", "findings", "message", "detail"),
    [
        (
            verdict(Kind.FOREIGN_TERMINATE, intruder=Sender(4867)),
            KERNEL,
            "pgguard: terminating connection: pid 4867 (puma: cluster worker 1) sent Terminate on the connection",
            "This is foreign-terminate: a process ended a connection that another process has open.",
        ),
        (
            verdict(
                Kind.SHARED_BY_THREADS,
                AT_ONCE,
                intruder=Sender(4866, 2, sampled=True),
                requesters=(Sender(4866, 1, sampled=True),),
            ),
            KERNEL,
            f"pgguard: terminating connection: threads 2 and 1 of pid 4866 (puma: cluster worker 0) {AT_ONCE}",
            "pid 4866 (puma: cluster worker 0) used this connection before.",
        ),
        (
            verdict(Kind.LEAKED_CONNECTION, "the connection has outlived the process that opened it"),
            replace(KERNEL, holders=(WORKER_0,)),
            "pgguard: terminating connection: the connection has outlived pid 4864",
            "pid 4866 (puma: cluster worker 0) has this connection open as well.",
        ),
        (
            verdict(Kind.IDLE_IN_TRANSACTION, "has left a transaction idle for more than 60 s"),
            replace(KERNEL, holders=(MASTER,)),
            "pgguard: terminating connection: pid 4864 (puma 6.4.2 (tcp://0.0.0.0:9292) [app]) has left",
            "This is idle-in-transaction: a transaction sits idle.",
        ),
    ],
)
def test_each_kind_says_who_and_what_in_the_message(
    what: Verdict, findings: Findings, message: str, detail: str
) -> None:
    told = rejection(fault(what, findings, action=Action.REJECTED))
    assert told.message.startswith(message)
    assert detail in told.detail
    assert told.hint


def test_a_client_known_by_its_own_account_alone_is_not_told_to_itself() -> None:
    told = rejection(fault(verdict(Kind.IDLE_IN_TRANSACTION, "sits"), Findings(declared={"application_name": "app"})))
    assert told.message == "pgguard: terminating connection: the client sits"
