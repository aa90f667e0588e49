"""One connection used by two threads of a process: found, whatever the language; and what only looks like it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.integration.running import PROGRAMS, interpreter, named, running, threads_named
from tests.servers import not_installed

if TYPE_CHECKING:
    from tests.guard_process import GuardProcess
    from tests.servers import Transport

pytestmark = pytest.mark.parametrize("server", ["embedded"], indirect=True, scope="session")

TIMES = 10


@pytest.fixture(scope="module")
def c_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program in C, compiled and linked to libpq."""
    compiler, pg_config = shutil.which("gcc"), shutil.which("pg_config")
    if compiler is None or pg_config is None:
        not_installed("gcc or libpq-dev")
    headers, libraries = (
        subprocess.run([pg_config, option], check=True, capture_output=True, text=True).stdout.strip()
        for option in ("--includedir", "--libdir")
    )
    if not (Path(headers) / "libpq-fe.h").exists():
        not_installed("libpq-dev")
    program = tmp_path_factory.mktemp("c") / "threads_sharing"
    source = PROGRAMS / "threads_sharing.c"
    command = [compiler, "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{headers}", "-o", str(program), str(source)]
    subprocess.run([*command, f"-L{libraries}", "-lpq"], check=True)
    return program


@pytest.fixture(params=["c", "ruby", "python"])
def sharing_threads(request: pytest.FixtureRequest) -> list[str | Path]:
    """The command of a program whose two threads overlap on one connection."""
    if request.param == "c":
        return [request.getfixturevalue("c_program")]
    if request.param == "ruby":
        return [interpreter("ruby", "-rpg"), PROGRAMS / "threads_sharing.rb"]
    return [sys.executable, PROGRAMS / "threads_sharing.py"]


def test_two_threads_that_overlap_are_both_named_every_time(
    sharing_threads: list[str | Path], guard: GuardProcess, transport: Transport, tmp_path: Path
) -> None:
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


def test_two_threads_whose_requests_are_on_their_way_at_once_are_an_error(
    guard: GuardProcess, transport: Transport, tmp_path: Path
) -> None:
    """In pg8000 only one of them reads: the other waits for a lock, so that it may not be told who it is."""
    command = (sys.executable, PROGRAMS / "threads_pg8000.py")
    with running(command, guard.at(transport), tmp_path) as program:
        assert program.wait() == 0, program.log
        pid = program.pid
    guard.stop()
    found = [fault for fault in guard.faults() if fault["kind"] in {"shared-by-threads", "request-while-busy"}]
    assert found, guard.faults()
    assert found[0]["severity"] == "error"
    assert named(found) == {pid}


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
