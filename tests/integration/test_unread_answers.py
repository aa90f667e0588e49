"""Answers that real drivers leave unread: found, by whom, on every transport; and who only reads late is left alone."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from tests.integration.running import PROGRAMS, compiled, every_transport, interpreter, named_transport, running
from tests.languages import go_program

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import StartGuard
    from tests.guard_process import Fault, GuardProcess
    from tests.integration.running import Program
    from tests.servers import Transport

pytestmark = pytest.mark.parametrize("server", ["embedded"], indirect=True, scope="session")

THRESHOLD = 0.7


def start(start_guard: StartGuard, *options: str) -> GuardProcess:
    return start_guard("--mode", "log", "--unread-answer", str(THRESHOLD), *options)


def python(scenario: str) -> list[str | Path]:
    return [sys.executable, PROGRAMS / "abandoned_answer.py", scenario]


def pg8000(scenario: str) -> list[str | Path]:
    return [sys.executable, PROGRAMS / "abandoned_pg8000.py", scenario]


def of_process(faults: list[Fault], pid: int) -> list[Fault]:
    return [fault for fault in faults if any(culprit["pid"] == pid for culprit in fault["culprits"])]


def rest(program: Program) -> dict[str, object]:
    """Let it go on, and hear what came of it."""
    program.go_on()
    return dict(program.read())


LEFT: dict[str, tuple[Callable[[Path], list[str | Path]], str | None]] = {
    "psycopg": (lambda _: python("psycopg_alarm"), "another command is already in progress"),
    "psycopg2": (lambda _: python("psycopg2_abandoned"), None),
    "libpq": (lambda directory: [compiled("abandoned_answer.c", directory)], "another command is already in progress"),
    "ruby": (
        lambda _: [interpreter("ruby", "-rpg"), PROGRAMS / "abandoned_answer.rb"],
        "another command is already in progress",
    ),
    "pg8000": (lambda _: pg8000("alarm"), None),
}


@pytest.mark.parametrize(
    ("driver", "transport"),
    [
        *(("libpq", transport) for transport in ("probed", "sampled", "unix")),
        ("psycopg", "probed"),
        ("psycopg2", "sampled"),
        ("ruby", "unix"),
        ("pg8000", "sampled"),
    ],
    indirect=["transport"],
)
def test_an_answer_that_a_driver_has_abandoned_is_found_before_somebody_gets_it(
    driver: str, start_guard: StartGuard, transport: Transport, tmp_path: Path
) -> None:
    command, says = LEFT[driver]
    guard = start(start_guard)
    with running(command(tmp_path), guard.at(transport), tmp_path) as program:
        program.read()
        [fault] = guard.wait_for("unread-answer")
        assert fault["severity"] == "warning"
        assert fault["message"] is None
        assert fault["summary"].startswith(f"pid {program.pid} ")
        assert fault["libpq"] == (None if driver == "pg8000" else "another command is already in progress")
        assert {culprit["pid"] for culprit in fault["culprits"]} == {program.pid}
        # Ruby's Timeout has a thread of its own, and nobody says which one has sent.
        assert driver == "ruby" or any(culprit["system_call"] for culprit in fault["culprits"])
        assert fault["advice"]["title"]
        if says is not None:
            assert says in str(rest(program)["error"])


@named_transport
def test_after_a_timeout_pg8000_is_off_by_one_and_every_query_on_top_is_an_error(
    start_guard: StartGuard, transport: Transport, tmp_path: Path
) -> None:
    guard = start(start_guard)
    with running(pg8000("alarm"), guard.at(transport), tmp_path) as program:
        program.read()
        guard.wait_for("unread-answer")
        assert rest(program) == {"got": [["", "first"]]}
        program.read()
        time.sleep(0.3)  # so that it is found to lie there
        assert rest(program) == {"got": [["second"]]}
        errors = [fault for fault in guard.wait_for("unread-answer", count=2) if fault["severity"] == "error"]
        assert errors[0]["reason"].startswith("on top of ")
        assert errors[0]["message"]["name"] == "Query"
        assert of_process(errors, program.pid) == errors


def test_what_is_sent_on_top_is_rejected_before_it_gets_another_ones_answer(
    start_guard: StartGuard, tmp_path: Path
) -> None:
    guard = start_guard("--mode", "reject", "--unread-answer", str(THRESHOLD))
    with running(pg8000("alarm"), guard.unix, tmp_path) as program:
        program.read()
        guard.wait_for("unread-answer")
        program.go_on()
        guard.wait_for("unread-answer", count=2)
    assert [fault["action"] for fault in guard.faults("unread-answer")][:2] == ["logged", "rejected"]


@pytest.fixture(scope="module")
def go_abandoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return go_program(PROGRAMS / "go_abandoned", tmp_path_factory.mktemp("go"))


@every_transport
def test_a_query_on_top_of_rows_that_lib_pq_has_not_read_is_an_error(
    go_abandoned: Path, start_guard: StartGuard, transport: Transport, tmp_path: Path
) -> None:
    """And one behind rows that were closed is none."""
    guard = start(start_guard)
    found = set()
    with ExitStack() as stack:
        programs = {
            how: stack.enter_context(running([go_abandoned, how], guard.at(transport), tmp_path, how))
            for how in ("within", "goroutines", "closed")
        }
        for how, program in programs.items():
            said = str(program.read()["error"])
            assert said == "<nil>" if how == "closed" else "unexpected Parse response 'D'" in said
            program.wait()
        errors = [fault for fault in guard.wait_for("unread-answer", count=2) if fault["severity"] == "error"]
        for error in errors:
            assert error["message"]["name"] == "Parse"
            assert error["advice"]["title"].startswith("Read the rows to the end")
            found |= {culprit["pid"] for culprit in error["culprits"]}
    assert found == {programs[how].pid for how in ("within", "goroutines")}


LATE = {
    "psycopg_stream": 200,
    "psycopg_pipeline": 15,
    "server_side_cursors": 198,
    "listener": 20,
    "asyncpg_sleeps": 1,
    "asyncpg_computes": 1,
}


@every_transport
def test_who_reads_late_or_closes_the_connection_is_left_alone(
    start_guard: StartGuard, transport: Transport, tmp_path: Path
) -> None:
    guard = start(start_guard)
    with ExitStack() as stack:
        commands = {scenario: python(scenario) for scenario in LATE} | {"pg8000": pg8000("correct")}
        programs = {
            name: stack.enter_context(running(command, guard.at(transport), tmp_path, name))
            for name, command in commands.items()
        }
        for program in programs.values():
            program.read()
        time.sleep(3 * THRESHOLD)
        for name, program in programs.items():
            said = rest(program)
            assert said == {"got": [["second"]]} if name == "pg8000" else said == {"rows": LATE[name]}
            assert program.wait() == 0, program.log
    guard.stop()
    # pg8000 closes with a request open, as it should.
    assert {fault["kind"] for fault in guard.faults()} <= {"unclean-close", "idle-in-transaction"}


def test_who_is_stopped_is_left_alone(start_guard: StartGuard, transport: Transport, tmp_path: Path) -> None:
    guard = start(start_guard)
    with running(pg8000("alarm"), guard.at(transport), tmp_path) as program:
        program.read()
        os.kill(program.pid, signal.SIGSTOP)
        time.sleep(3 * THRESHOLD)
        before = guard.faults("unread-answer")
        os.kill(program.pid, signal.SIGCONT)
        assert before == []
