"""A connection that outlives its opener: handed to a daemon, or leaked to a process that doesn't know of it."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from pgguard.proxy.watch import UNUSED
from tests.integration.running import PROGRAMS, named, named_transport, running, sampled_transport

if TYPE_CHECKING:
    from pathlib import Path

    from tests.guard_process import GuardProcess
    from tests.integration.running import Program
    from tests.servers import Address, Transport

pytestmark = pytest.mark.parametrize("server", ["embedded"], indirect=True, scope="session")

HANDED_OVER = (("0.1", "0"), ("2", "0"), ("0.5", "1"))
"""When the daemon first uses the connection, and for how long its opener stays: in the last case past that."""


def start(
    stack: ExitStack, address: Address, directory: Path, after: str, stays: str
) -> tuple[Program, dict[str, int]]:
    command: list[str | Path] = [sys.executable, PROGRAMS / "daemon.py", after, stays]
    program = stack.enter_context(running(command, address, directory, f"{after}-{stays}"))
    return program, program.read()


@named_transport
def test_a_connection_is_leaked_to_a_daemon_that_never_uses_it_and_handed_to_one_that_does(
    guard: GuardProcess, transport: Transport, tmp_path: Path
) -> None:
    """However late that is, and however long it lies idle then. Openers are known though they exited at once."""
    address = guard.at(transport)
    with ExitStack() as stack:
        programs = [start(stack, address, tmp_path, *when)[0] for when in HANDED_OVER]
        leaks = {
            said["opener"]: said["daemon"] for _, said in (start(stack, address, tmp_path, "never", n) for n in "01")
        }
        faults = guard.wait_for("leaked-connection", count=2, timeout=30)
        for fault in faults:
            [opener] = named([fault], "owner")
            assert named([fault], "holder") == {leaks[opener]}
            assert fault["severity"] == "warning"
            assert f"outlived pid {opener}" in fault["summary"]
            assert f"pid {leaks[opener]} (python" in fault["summary"]
        assert named(faults, "owner") == set(leaks)
        for program in programs:
            program.go_on()
        time.sleep(1)
    assert {fault["kind"] for fault in guard.faults()} <= {"inherited-connection", "leaked-connection", "unclean-close"}
    assert len(guard.faults("leaked-connection")) == len(leaks)


@sampled_transport
def test_where_nobody_saw_who_opened_it_a_daemon_is_not_taken_for_its_opener(
    guard: GuardProcess, transport: Transport, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        started = [start(stack, guard.at(transport), tmp_path, *when) for when in (*HANDED_OVER, ("never", "0"))]
        time.sleep(UNUSED + 2)
        for program, _ in started:
            program.go_on()
        daemons = {said["daemon"] for _, said in started}
        guard.assert_no_faults(except_kinds={"inherited-connection", "leaked-connection"})
        assert daemons.isdisjoint(named(guard.faults(), "owner"))
        # Found or not: whether anybody saw the opener is a matter of milliseconds.
        assert named(guard.faults("leaked-connection"), "holder") <= {started[-1][1]["daemon"]}
