"""Connections that outlive the attention of whoever opened them: killed, forgotten, idle, or too many."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import pytest

from tests.integration.running import PROGRAMS, every_transport, named, running

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import StartGuard
    from tests.guard_process import Fault, GuardProcess
    from tests.servers import Transport

pytestmark = pytest.mark.parametrize("server", ["embedded"], indirect=True, scope="session")

BYSTANDER = (sys.executable, PROGRAMS / "bystander.py")
LIVES = (0.0, 0.5, 1.0)
"""Seconds for which a program does it, in one attempt after the other: one of them does it for two."""


def kill_while(doing: str, guard: GuardProcess, transport: Transport, directory: Path) -> Fault:
    """Kill a program while it does that, and return what is recorded of it, checked for naming it.

    Once more and later if the guard hadn't yet looked at the process: the kernel has named it all the same.
    """
    for number, seconds in enumerate(LIVES, 1):
        with running([*BYSTANDER, doing], guard.at(transport), directory, f"{doing}-{number}") as program:
            pid = program.read()["pid"]
            time.sleep(seconds)
            program.kill()
            fault = guard.wait_for("unclean-close", count=number)[-1]
        [closer] = [culprit for culprit in fault["culprits"] if culprit["role"] == "closer"]
        assert closer["pid"] == pid
        assert f"pid {pid}" in fault["summary"]
        if closer["process"] is not None:
            assert closer["process"]["name"].startswith("python")
            assert closer["process"]["cmdline"][1:] == [str(BYSTANDER[1]), doing]
            return fault
    pytest.fail(f"it was never looked at in time, however long it ran: {guard.faults()}")


def test_a_killed_process_is_named_though_it_is_gone(guard: GuardProcess, transport: Transport, tmp_path: Path) -> None:
    assert kill_while("idle", guard, transport, tmp_path)["severity"] == "warning"


@pytest.mark.parametrize("doing", ["transaction", "request"])
def test_killed_in_the_middle_of_something_is_an_error(
    doing: str, guard: GuardProcess, transport: Transport, tmp_path: Path
) -> None:
    assert kill_while(doing, guard, transport, tmp_path)["severity"] == "error"


def test_a_transaction_that_sits_idle_is_remarked_on(
    start_guard: StartGuard, transport: Transport, tmp_path: Path
) -> None:
    guard = start_guard("--idle-in-transaction", "1")
    with running([*BYSTANDER, "transaction"], guard.at(transport), tmp_path) as program:
        pid = program.read()["pid"]
        [fault] = guard.wait_for("idle-in-transaction")
        program.go_on()
        assert program.wait() == 0, program.log
    assert fault["severity"] == "warning"
    assert pid in named([fault])
    assert fault["requests"], "what it asked last"
    guard.assert_no_faults(except_kinds={"idle-in-transaction"})


@pytest.mark.parametrize("doing", ["idle", "request"])
def test_who_is_not_in_a_transaction_or_not_idle_is_left_alone(
    doing: str, start_guard: StartGuard, tmp_path: Path
) -> None:
    guard = start_guard("--idle-in-transaction", "0.2")
    with running([*BYSTANDER, doing], guard.tcp, tmp_path) as program:
        program.read()
        with pytest.raises(AssertionError, match="no idle-in-transaction"):
            guard.wait_for("idle-in-transaction", timeout=1)


@every_transport
def test_a_connection_that_outlives_its_process_is_named_with_who_keeps_it(
    guard: GuardProcess, transport: Transport, tmp_path: Path
) -> None:
    with running([*BYSTANDER, "leak"], guard.at(transport), tmp_path) as program:
        said = program.read()
        assert program.wait() == 0, program.log
        [fault] = guard.wait_for("leaked-connection")
        assert fault["severity"] == "warning"
        assert named([fault], "owner") == {said["pid"]}
        assert named([fault], "holder") == {said["child"]}
        [owner] = [culprit for culprit in fault["culprits"] if culprit["role"] == "owner"]
        assert owner["process"]["cmdline"][1:] == [str(BYSTANDER[1]), "leak"], "known though it is gone"
