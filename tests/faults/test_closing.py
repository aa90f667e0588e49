"""Advice on connections that ended without Terminate: by what has become of the process."""

from __future__ import annotations

import signal
from dataclasses import replace

import pytest

from pgguard.attribution.evidence import Evidence
from pgguard.attribution.fates import Fate, State
from pgguard.attribution.findings import Findings
from pgguard.attribution.runtime import Language, Library, Runtime, Server
from pgguard.faults.advice import advice_for
from pgguard.faults.advice.closing import advice_on_closing
from pgguard.faults.catalogue import CATALOGUE
from pgguard.identity import Sender
from pgguard.session.verdicts import Direction, Kind, MessageSeen
from tests.faults.samples import MASTER, WORKER_0, fault, verdict

GENERAL = CATALOGUE[Kind.UNCLEAN_CLOSE].advice
SEQUEL = Runtime(Language.RUBY, None, frozenset({Library.SEQUEL}))
CLOSED = verdict(Kind.UNCLEAN_CLOSE, "the client's side ended without Terminate, between two requests")
ALONE = Findings(opener=MASTER, opener_evidence=Evidence.KERNEL_SENDER, connected=(4864, 4864), last_sole_holder=MASTER)
OPEN = Fate(State.ALIVE, None, has_socket=True)


@pytest.mark.parametrize(
    ("fate", "was_reset", "says"),
    [
        (Fate(State.ALIVE, None, has_socket=False), False, "no longer had the socket open"),
        (Fate(State.ALIVE, None, has_socket=False), True, "no longer had the socket open"),
        (OPEN, False, "shutdown(2)"),
        (OPEN, True, "Something in between"),
        (Fate(State.EXITED, 0), False, "exited by itself"),
        (Fate(State.KILLED, signal.SIGKILL), False, "out-of-memory killer"),
        (Fate(State.KILLED, signal.SIGTERM), False, "Install a handler"),
        (Fate(State.KILLED, 64), False, "Install a handler"),
        (Fate(State.KILLED, signal.SIGSEGV), False, "core dump"),
    ],
)
def test_each_end_has_its_own(fate: Fate, was_reset: bool, says: str) -> None:
    advice = advice_on_closing(fate, was_reset=was_reset, is_heir=False, runtimes=())
    assert says in advice.text
    assert advice != GENERAL


@pytest.mark.parametrize("fate", [None, Fate(State.ENDED), Fate(State.ALIVE, None, None)])
def test_where_the_end_is_not_known_all_are_said(fate: Fate | None) -> None:
    assert advice_on_closing(fate, was_reset=False, is_heir=False, runtimes=()) == GENERAL
    assert all(case in GENERAL.text for case in ("If it was killed", "If it exited", "If it is still running"))


@pytest.mark.parametrize("fate", [Fate(State.EXITED, 0), Fate(State.ENDED)])
def test_an_heir_that_leaves_is_not_to_close_what_was_not_its_own(fate: Fate) -> None:
    advice = advice_on_closing(fate, was_reset=False, is_heir=True, runtimes=(SEQUEL,))
    inherited = advice_for(Kind.INHERITED_CONNECTION, (SEQUEL,))
    assert (advice.title, advice.code) == (inherited.title, inherited.code)
    assert "which is right for a connection that isn't its own" in advice.text


def test_an_end_has_no_sender() -> None:
    """Though the kernel has named who opened the connection and who sent on it last."""
    record = fault(replace(CLOSED, intruder=Sender(4864, 4864)), replace(ALONE, senders={4864: MASTER}))
    [closer, owner] = record.culprits
    assert (closer.pid, closer.evidence) == (4864, Evidence.SOLE_HOLDER)
    assert (owner.pid, owner.evidence) == (4864, Evidence.KERNEL_SENDER)


def test_what_was_cut_off_in_between_was_closed_by_nobody() -> None:
    cut = replace(ALONE, fate=OPEN, was_reset=True)
    assert [culprit.role for culprit in fault(CLOSED, cut).culprits] == ["owner"]
    assert "was reset by something in between" in fault(CLOSED, cut).summary
    assert [culprit.role for culprit in fault(CLOSED, replace(cut, was_reset=False)).culprits] == ["closer", "owner"]


def test_an_heir_that_was_the_last_is_told_from_the_opener() -> None:
    heir = replace(ALONE, departed=(WORKER_0,), fate=Fate(State.EXITED, 0))
    record = fault(CLOSED, heir)
    assert [(culprit.role, culprit.pid) for culprit in record.culprits] == [("closer", 4866), ("owner", 4864)]
    assert "had inherited it through a fork" in record.advice.text
    assert "exited with status 0" in record.summary


def test_a_goodbye_in_the_middle_of_a_copy_is_another_matter() -> None:
    terminate = MessageSeen(Direction.FRONTEND, "X", "Terminate", 5)
    assert "COPY" in fault(replace(CLOSED, message=terminate, intruder=Sender(4864)), ALONE).advice.title


@pytest.mark.parametrize("fate", [Fate(State.EXITED, 0), Fate(State.ENDED)])
@pytest.mark.parametrize(
    ("server", "hook"),
    [(Server.CELERY, "worker_process_shutdown"), (Server.RQ, "perform_job"), (Server.UWSGI, "uwsgi.atexit")],
)
def test_of_a_servers_child_that_leaves_at_once_the_hook_is_said_that_closes_what_it_opened(
    server: Server, hook: str, fate: Fate
) -> None:
    shown = Runtime(Language.PYTHON, server, frozenset({Library.SQLALCHEMY}))
    advice = advice_on_closing(fate, was_reset=False, is_heir=False, runtimes=[shown])
    assert advice.code is not None
    assert hook in advice.code
    assert "engine.dispose()" in advice.code
    assert advice.title == "Close connections on the way out"
