"""One connection used by two threads of a process: found, whatever the language; and what only looks like it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.running import PROGRAMS, compiled, every_transport, interpreter, running, threads_named

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import StartGuard
    from tests.guard_process import Fault, GuardProcess
    from tests.servers import Transport

pytestmark = [
    pytest.mark.parametrize("server", ["embedded"], indirect=True, scope="session"),
    pytest.mark.usefixtures("alone"),
]

TIMES = 10


@pytest.fixture(scope="module")
def c_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program in C."""
    return compiled("threads_sharing.c", tmp_path_factory.mktemp("c"))


@pytest.fixture(params=["c", "ruby", "python"])
def sharing_threads(request: pytest.FixtureRequest) -> list[str | Path]:
    """The command of a program whose two threads overlap on one connection."""
    if request.param == "c":
        return [request.getfixturevalue("c_program")]
    if request.param == "ruby":
        return [interpreter("ruby", "-rpg"), PROGRAMS / "threads_sharing.rb"]
    return [sys.executable, PROGRAMS / "threads_sharing.py"]


def test_two_threads_that_overlap_are_both_named_every_time(
    sharing_threads: list[str | Path], start_guard: StartGuard, transport: Transport, tmp_path: Path
) -> None:
    guard = start_guard("--mode", "log", unlimited=True)
    played = []
    for _ in range(TIMES // 2):
        with (
            running(sharing_threads, guard.at(transport), tmp_path, "one") as one,
            running(sharing_threads, guard.at(transport), tmp_path, "other") as other,
        ):
            played += [one.read(), other.read()]
            for program in (one, other):
                program.wait()  # however it ends
    guard.stop()
    for said in played:
        shared = [
            fault
            for fault in guard.faults("shared-by-threads")
            if any(culprit["pid"] == said["pid"] for culprit in fault["culprits"])
        ]
        assert shared, f"nothing about {said}: {guard.faults()}"
        assert {said["first"], said["second"]} <= threads_named(shared)
        assert all(fault["severity"] == "error" for fault in shared)
    assert guard.faults("shared-by-processes") == []


@every_transport
def test_a_thread_that_asks_while_another_one_sleeps_in_its_read(
    start_guard: StartGuard, transport: Transport, tmp_path: Path
) -> None:
    """In pg8000 only one of them reads: the other waits for a lock. It is known by being the only one that has run."""
    command = (sys.executable, PROGRAMS / "threads_pg8000.py")
    found: list[Fault] = []
    said: dict[str, Any] = {}
    for _ in range(5):  # a busy guard may come to look when the thread has woken
        guard = start_guard("--mode", "log")
        with running(command, guard.at(transport), tmp_path) as program:
            said = program.read()
            assert program.wait() == 0, program.log
        guard.stop()
        found = [fault for fault in guard.faults() if fault["kind"] in ("shared-by-threads", "request-while-busy")]
        if [fault["kind"] for fault in found] == ["shared-by-threads"]:
            break
    [fault] = found
    assert fault["kind"] == "shared-by-threads"
    assert fault["severity"] == "error"
    threads = {culprit["role"]: (culprit["pid"], culprit["tid"]) for culprit in fault["culprits"]}
    assert threads["requester"] == (said["pid"], said["first"])
    assert threads["intruder"] in {(said["pid"], said["second"]), (said["pid"], None)}
    assert f"thread {said['first']}" in fault["summary"]


@every_transport
@pytest.mark.parametrize(("manner", "kinds"), [("in_turn", set()), ("pipelined", {"request-while-busy"})])
def test_a_thread_that_reads_for_the_others_is_no_victim_of_theirs(
    manner: str, kinds: set[str], guard: GuardProcess, transport: Transport, tmp_path: Path
) -> None:
    """It sleeps on its own account. Whether requests may overlap then is up to a driver that nobody knows."""
    command = (sys.executable, PROGRAMS / "reader_thread.py", manner)
    with running(command, guard.at(transport), tmp_path) as program:
        assert program.wait() == 0, program.log
    guard.stop()
    assert {fault["kind"] for fault in guard.faults()} == kinds
    assert {fault["severity"] for fault in guard.faults()} <= {"warning"}


@pytest.mark.parametrize("scenario", ["psycopg2_locks", "psycopg_pipeline", "asyncpg_pool", "notification_watcher"])
def test_threads_that_keep_out_of_each_others_way_are_left_alone(
    scenario: str, guard: GuardProcess, transport: Transport, tmp_path: Path
) -> None:
    """As is pgbench that pipelines, in test_drivers.py."""
    command = (sys.executable, PROGRAMS / "threads_correct.py", scenario)
    with running(command, guard.at(transport), tmp_path) as program:
        assert program.wait() == 0, program.log
    guard.stop()
    assert [fault for fault in guard.faults() if fault["severity"] == "error"] == []
