"""A guard that has given up its rights names whom it named before; and one that has become another user does."""

from __future__ import annotations

import os
import pwd
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pgguard.attribution.privileges import Right
from pgguard.attribution.stacks import find_py_spy
from tests.integration.running import PROGRAMS, every_transport, running, sampled_transport, threads_named
from tests.integration.test_fork_misuse import culprits, pids_named, scenario
from tests.servers import is_open_to_others, not_installed

if TYPE_CHECKING:
    from tests.conftest import StartGuard
    from tests.guard_process import Fault, GuardProcess
    from tests.servers import Transport

pytestmark = [
    pytest.mark.parametrize("server", ["embedded"], indirect=True, scope="session"),
    pytest.mark.skipif(
        os.geteuid() != 0 or not is_open_to_others(),
        reason="it takes root's rights to give them up, and an installation that others can run",
    ),
    pytest.mark.parametrize("user", ["root", "nobody"]),
]
"""The programs are root's own, which nobody may look at without the rights that are kept."""


def guard_of(user: str, start_guard: StartGuard) -> GuardProcess:
    guard = start_guard(*(() if user == "root" else ("--user", user)))
    status = dict(line.split(":\t") for line in Path(f"/proc/{guard.pid}/status").read_text().splitlines())
    assert status["Uid"].split() == [str(pwd.getpwnam(user).pw_uid)] * 4
    assert int(status["CapEff"], 16) == 1 << Right.CAP_DAC_READ_SEARCH | 1 << Right.CAP_SYS_PTRACE
    return guard


@every_transport
def test_the_processes_that_share_a_connection_are_named(
    user: str, start_guard: StartGuard, transport: Transport
) -> None:
    guard = guard_of(user, start_guard)
    seen: list[Fault] = []
    for n in range(1, 6):  # a busy machine may leave no time to look
        with scenario("in_turn", guard.at(transport)) as (parent, child):
            inherited = guard.wait_for("inherited-connection", count=n)
            if transport != "sampled":
                shared = guard.wait_for("shared-by-processes")[0]
                if n == 1:
                    assert culprits(shared)["intruder"] == [(child, "kernel-sender")]
                    assert (parent, "kernel-sender") in culprits(shared)["owner"]
        seen = [fault for fault in inherited if pids_named(fault) == {parent, child}]
        if seen:
            break
    assert seen
    assert all(culprit["process"]["cmdline"] for culprit in seen[0]["culprits"])
    runtimes = [culprit["runtime"] for fault in guard.faults() for culprit in fault["culprits"] if culprit["runtime"]]
    assert {runtime["language"] for runtime in runtimes} == {"Python"}


@sampled_transport
def test_threads_are_seen_in_the_act_with_what_they_do(
    user: str, start_guard: StartGuard, transport: Transport, tmp_path: Path
) -> None:
    """By their system calls, by the sets that they poll, which are in their memory, and by their stacks."""
    if find_py_spy() is None:
        not_installed("py-spy")
    for _ in range(8):  # a busy machine may leave no time for stacks, and of the first fault alone there are any
        guard = guard_of(user, start_guard)
        with running((sys.executable, PROGRAMS / "threads_sharing.py"), guard.at(transport), tmp_path) as program:
            said = program.read()
            program.wait()
        [fault, *_] = guard.wait_for("shared-by-threads")
        guard.stop()
        assert {said["first"], said["second"]} <= threads_named([fault])
        assert {culprit["system_call"] for culprit in fault["culprits"]} & {"poll", "ppoll"}
        if any(culprit["stack"] for culprit in fault["culprits"]):
            return
    pytest.fail("no stack of any thread was read")
