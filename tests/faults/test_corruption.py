"""A TLS stream that fails its integrity check: when it is two processes, and when it certainly isn't."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from pgguard.attribution.evidence import Driver, Evidence
from pgguard.attribution.findings import Findings
from pgguard.faults.conclude import conclude
from pgguard.faults.fault import Role
from pgguard.identity import Sender
from pgguard.session.libpq import BAD_RECORD, CLOSED, CLOSED_BY_TLS
from pgguard.session.verdicts import TLS_ALERT, TLS_RECORD, Direction, Kind, MessageSeen, Verdict
from tests.faults.samples import FACTS, KERNEL, MASTER, TERMINATE, WORKER_0, WORKER_1, fault, process, verdict

if TYPE_CHECKING:
    from pgguard.attribution.evidence import Process

RECORD = MessageSeen(Direction.FRONTEND, None, TLS_RECORD, 61)
ALERT = MessageSeen(Direction.FRONTEND, None, TLS_ALERT, 24)
REASON = "a TLS record failed its integrity check (decryption failed or bad record mac)"
FIRST, OTHER_THREAD = Sender(4866, 4871), Sender(4866, 4872)
SECOND, OPENER = Sender(4867, 4880), Sender(4864, 4864)
ALONE = Findings(opener=MASTER, holders=(WORKER_0,), driver=Driver.LIBPQ, senders={4866: WORKER_0})


def corruption(
    intruder: Sender | None, *requesters: Sender, message: MessageSeen = RECORD, reason: str = REASON
) -> Verdict:
    return verdict(
        Kind.TLS_CORRUPTION,
        reason,
        message=message,
        intruder=intruder,
        requesters=requesters,
        libpq=BAD_RECORD,
        ends=True,
    )


def test_two_processes_are_both_named_and_what_libpq_prints_and_what_to_do_about_a_fork() -> None:
    found = fault(corruption(SECOND, FIRST))
    roles = [(culprit.role, culprit.pid, culprit.tid, culprit.evidence) for culprit in found.culprits]
    assert roles[:2] == [
        (Role.INTRUDER, 4867, 4880, Evidence.KERNEL_SENDER),
        (Role.REQUESTER, 4866, 4871, Evidence.KERNEL_SENDER),
    ]
    assert found.summary == (
        "pid 4867 (puma: cluster worker 1) and pid 4866 (puma: cluster worker 0) use one TLS session: " + REASON
    )
    assert found.libpq == BAD_RECORD
    assert found.sent_by == SECOND
    assert found.over
    assert "fork" in found.advice.title


def test_the_opener_is_not_the_intruder_though_it_is_its_record_that_fails() -> None:
    concluded = conclude(corruption(OPENER, SECOND, FIRST), KERNEL)
    assert concluded is not None
    assert (concluded.intruder, concluded.requesters, concluded.author) == (SECOND, (OPENER, FIRST), OPENER)


def test_where_nobody_is_named_those_are_who_have_it_open_and_none_of_them_is_accused() -> None:
    found = fault(corruption(None), replace(KERNEL, senders={}))
    assert [(culprit.role, culprit.pid) for culprit in found.culprits] == [
        (Role.INTRUDER, None),
        (Role.OWNER, 4864),
        (Role.HOLDER, 4864),
        (Role.HOLDER, 4866),
        (Role.HOLDER, 4867),
    ]
    assert found.summary.endswith(f"have one TLS session open: {REASON}")


def test_who_is_left_is_not_accused_of_what_takes_two() -> None:
    """Whoever the other one was may have ended by now."""
    found = fault(corruption(None), replace(ALONE, senders={}))
    assert found.kind is Kind.TLS_CORRUPTION
    assert found.culprits[0].pid is None


def test_a_process_that_has_it_alone_and_that_alone_has_sent_shares_it_with_nobody() -> None:
    concluded = conclude(corruption(FIRST), ALONE)
    assert concluded is not None
    assert (concluded.kind, concluded.requesters) == (Kind.PROTOCOL_VIOLATION, ())
    assert fault(concluded, ALONE).summary == f"pid 4866 (puma: cluster worker 0): {REASON}"


def test_an_heir_that_has_not_been_named_is_enough_for_a_doubt() -> None:
    concluded = conclude(corruption(FIRST), replace(ALONE, holders=(WORKER_0, WORKER_1)))
    assert concluded is not None
    assert concluded.kind is Kind.TLS_CORRUPTION


@pytest.mark.parametrize(
    ("driver", "kind"), [(Driver.LIBPQ, Kind.SHARED_BY_THREADS), (Driver.PGX, Kind.PROTOCOL_VIOLATION)]
)
def test_two_threads_of_one_process_share_it_where_threads_tell(driver: Driver, kind: Kind) -> None:
    concluded = conclude(corruption(FIRST, OTHER_THREAD), replace(ALONE, driver=driver))
    assert concluded is not None
    assert concluded.kind is kind
    if kind is Kind.SHARED_BY_THREADS:
        assert fault(concluded, ALONE).summary.startswith("threads 4871 and 4872 of pid 4866")


def test_what_a_client_alone_finds_corrupt_is_nobodys_fault() -> None:
    assert conclude(corruption(None, FIRST, message=ALERT), ALONE) is None
    assert conclude(corruption(None, message=ALERT), ALONE) is None
    left = replace(ALONE, departed=(WORKER_1,))
    assert conclude(corruption(None, message=ALERT), left) is not None, "another one had it open until a moment ago"
    concluded = conclude(corruption(SECOND, FIRST, message=ALERT), KERNEL)
    assert concluded is not None
    assert concluded.kind is Kind.TLS_CORRUPTION


@pytest.mark.parametrize(
    ("who", "holders", "is_fault"),
    [
        pytest.param(OPENER, (MASTER,), False, id="its heir has let go of it"),
        pytest.param(OPENER, (), False, id="and it has, too, by now"),
        pytest.param(OPENER, None, False, id="nobody knows who has it"),
        pytest.param(OPENER, (MASTER, WORKER_0), True, id="its heir has it"),
        pytest.param(OPENER, (WORKER_0,), True, id="its heir alone has it"),
        pytest.param(FIRST, (WORKER_0, MASTER), True, id="an heir's, whose parent has it"),
        pytest.param(None, (MASTER,), False, id="it isn't known whose, and one has it"),
        pytest.param(None, (MASTER, WORKER_0), True, id="and two have it"),
    ],
)
def test_a_goodbye_that_can_not_be_read_harms_whoever_else_has_it_open(
    who: Sender | None, holders: tuple[Process, ...] | None, is_fault: bool
) -> None:
    requesters = () if who is None else (SECOND,)
    found = replace(KERNEL, holders=holders)
    short = replace(corruption(who, *requesters), parting=True)
    assert (conclude(short, found) is not None) is is_fault
    assert conclude(replace(short, parting=False), found) is not None


def test_pg_basebackups_child_ends_what_its_parent_is_done_with() -> None:
    backup = process(4864, 1, name="pg_basebackup")
    found = replace(KERNEL, opener=backup, holders=(backup, WORKER_0))
    assert conclude(replace(corruption(FIRST, OPENER), parting=True), found) is None


def test_of_a_client_that_can_not_be_looked_at_nobody_is_named() -> None:
    found = fault(corruption(None), Findings())
    assert found.kind is Kind.TLS_CORRUPTION
    assert [culprit.pid for culprit in found.culprits] == [None]
    assert found.summary == REASON


@pytest.mark.parametrize(("tls", "text"), [(False, CLOSED), (True, CLOSED_BY_TLS)])
def test_with_tls_libpq_says_otherwise_that_a_connection_is_closed(tls: bool, text: str) -> None:
    ended = verdict(Kind.FOREIGN_TERMINATE, message=TERMINATE, intruder=SECOND, libpq=CLOSED)
    assert fault(ended, facts=replace(FACTS, tls=tls)).libpq == text
