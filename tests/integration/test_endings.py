"""Connections that end without Terminate: who did it, as far as that can be known, how, and what to change."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from tests.integration.running import PROGRAMS, every_transport, named, running
from tests.servers import not_installed

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import StartGuard
    from tests.guard_process import Fault, GuardProcess
    from tests.servers import Transport

pytestmark = pytest.mark.parametrize("server", ["embedded"], indirect=True, scope="session")

ENDINGS = {
    "closes": ("which is still running, closed its connection without Terminate", "no longer had the socket open"),
    "shuts_down": ("which is still running, shut its connection down without Terminate", "still has the socket open"),
    "exits": ("exited with status 3, and its connection ended without Terminate", "exited by itself"),
    "is_killed": ("was killed by SIGKILL, and its connection ended without Terminate", "out-of-memory killer"),
    "is_asked_to_end": ("was killed by SIGTERM, and its connection ended without Terminate", "Nothing closed"),
    "crashes": ("was killed by SIGSEGV, and its connection ended without Terminate", "core dump"),
    "ends_unseen": ("exited or was killed, and its connection ended without Terminate", "If it was killed:"),
}
"""By what the program does, what the summary and the advice say."""
LIVES = (0.0, 1.0, 4.0, 10.0)
"""Seconds for which a connection lives, in one attempt after the other to have the guard see in time who has it."""


def closers(fault: Fault) -> list[tuple[int, str]]:
    return [(one["pid"], one["evidence"]) for one in fault["culprits"] if one["role"] == "closer"]


@every_transport
def test_how_a_process_and_its_connection_have_ended(
    start_guard: StartGuard, transport: Transport, tmp_path: Path
) -> None:
    guard = start_guard(unlimited=True)  # of an ending that was tried before
    for ending, (summary, advice) in ENDINGS.items():
        pid, fault = end_seen(ending, guard, transport, tmp_path)
        # The end of a stream has no sender that the kernel could name.
        assert closers(fault) == [(pid, "sole-holder")]
        assert fault["summary"].startswith(f"pid {pid} (python")
        assert summary in fault["summary"]
        assert advice in fault["advice"]["text"]
        assert fault["severity"] == "warning"
    assert {fault["kind"] for fault in guard.faults()} == {"unclean-close"}


def end_seen(ending: str, guard: GuardProcess, transport: Transport, directory: Path) -> tuple[int, Fault]:
    """Have a program end its connection, once more and later if the guard hadn't the time to see it alone with it.

    Or to see what became of it. Less is recorded then, but nothing that isn't so.

    Returns:
        The pid of the process that did it, and what is recorded of that.
    """
    command: list[str | Path] = [sys.executable, PROGRAMS / "endings.py", ending]
    for attempt, seconds in enumerate(LIVES):
        before = len(guard.faults("unclean-close"))
        with running(command, guard.at(transport), directory, f"{ending}-{attempt}") as program:
            pid: int = program.read()["pid"]
            time.sleep(seconds)
            program.go_on()
            fault = guard.wait_for("unclean-close", count=before + 1)[-1]
        # What a process was isn't known if it was gone when the guard looked, and how it ended may not be either.
        if (pid, "sole-holder") in closers(fault) and fault["summary"].startswith(f"pid {pid} ("):
            return pid, fault
        assert closers(fault) in ([], [(pid, "socket-holder")], [(pid, "sole-holder")])
        assert named([fault]) <= {pid}
    pytest.fail(f"its end was never seen in time, however long it had lived: {guard.faults()}")


@every_transport
def test_who_had_inherited_the_connection_is_the_last_and_not_to_blame(
    guard: GuardProcess, transport: Transport, tmp_path: Path
) -> None:
    with running([sys.executable, PROGRAMS / "endings.py", "is_inherited"], guard.at(transport), tmp_path) as program:
        pid = program.read()["pid"]
        program.wait()
        time.sleep(3)  # what happened lately counts
        program.go_on()
        [fault] = guard.wait_for("unclean-close")
    assert closers(fault) == [(pid, "socket-holder")]
    assert named([fault], "owner") == {program.pid}
    assert "had inherited it through a fork" in fault["advice"]["text"]


@pytest.mark.parametrize("transport", ["unix"], indirect=True)
def test_a_session_that_was_rejected_has_not_ended_uncleanly_as_well(
    start_guard: StartGuard, transport: Transport, tmp_path: Path
) -> None:
    guard = start_guard("--mode", "reject")
    command: list[str | Path] = [sys.executable, PROGRAMS / "shared_connection.py", "in_turn"]
    with running(command, guard.at(transport), tmp_path) as program:
        program.wait()
    [fault] = guard.wait_for("shared-by-processes")
    assert fault["action"] == "rejected"
    guard.assert_no_faults(except_kinds={"shared-by-processes", "inherited-connection"})


@pytest.mark.skipif(os.geteuid() != 0, reason="it takes root to cut another process's connection")
@pytest.mark.parametrize("transport", ["tcp"], indirect=True)
def test_a_connection_that_was_cut_in_between_was_closed_by_nobody(
    guard: GuardProcess, transport: Transport, tmp_path: Path
) -> None:
    """As a firewall does: both ends get a reset."""
    if shutil.which("ss") is None:
        not_installed("ss")
    address = guard.at(transport)
    with running([sys.executable, PROGRAMS / "endings.py", "exits"], address, tmp_path) as program:
        pid = program.read()["pid"]
        cut = ["ss", "--kill", "--no-header", "--tcp", "dport", "=", f":{address.port}"]
        done = subprocess.run(cut, check=False, capture_output=True, text=True)
        if not done.stdout:
            not_installed(f"a kernel that ends connections on demand ({done.stderr})")
        [fault] = guard.wait_for("unclean-close")
    assert closers(fault) == []
    assert named([fault], "owner") == {pid}
    assert "was reset by something in between" in fault["summary"]
    assert "Something in between" in fault["advice"]["text"]
