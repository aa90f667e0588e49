"""``pgguard run --ruby-stacks``: Ruby's lines of code, of both sides, and of where the connection was opened."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.running import PROGRAMS, interpreter, named_transport, running, running_redis
from tests.integration.test_preforking import WebServer
from tests.proxy.conftest import short_directory
from tests.servers import not_installed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from tests.conftest import StartGuard
    from tests.guard_process import Fault
    from tests.integration.running import Program
    from tests.servers import Server, Transport

__all__ = ["short_directory"]

pytestmark = pytest.mark.parametrize("server", ["embedded"], indirect=True, scope="session")
over_unix = pytest.mark.parametrize("transport", ["unix"], indirect=True)
over_tcp = pytest.mark.parametrize("transport", ["probed"], indirect=True)

SECONDS = 40.0


class Run:
    """A command behind a guard of its own, and what that has recorded."""

    def __init__(self, program: Program, records: Path) -> None:
        self.program = program
        self._records = records

    def faults(self, kind: str) -> list[Fault]:
        lines = self._records.read_text().split("\n")[:-1] if self._records.exists() else []
        return [fault for fault in map(json.loads, lines) if fault["kind"] == kind]

    def wait_for(self, kind: str, is_it: Callable[[Fault], object] = bool) -> Fault:
        deadline = time.monotonic() + SECONDS
        while not (found := [fault for fault in self.faults(kind) if is_it(fault)]):
            assert time.monotonic() < deadline, f"{self.faults(kind)}\n{self.program.log}"
            time.sleep(0.02)
        return found[0]


@contextmanager
def run(
    command: Sequence[str | Path], server: Server, transport: Transport, directory: Path, *options: str
) -> Iterator[Run]:
    records = directory / "faults.jsonl"
    # A busy machine takes long for what is to be shown in any case.
    guarded = [sys.executable, "-m", "pgguard", "run", "--evidence-budget", "3", "--faults", str(records), *options]
    # A guard that is killed leaves what it has made; and the path of a Unix socket has at most 107 bytes, unix(7).
    with (
        tempfile.TemporaryDirectory(prefix="pgguard-test-") as temporary,
        running(
            [*guarded, "--", *command], server.at(transport), directory, cwd=directory, environ={"TMPDIR": temporary}
        ) as program,
    ):
        yield Run(program, records)


def own_calls(stack: list[dict[str, Any]] | None, file: str) -> list[str]:
    """The application's own calls, the innermost first."""
    calls = [frame for frame in stack or () if frame["application"]]
    assert all(frame["file"] == file for frame in calls)
    return [frame["function"] for frame in calls]


@named_transport
def test_both_sides_and_where_the_connection_was_opened_are_shown(
    server: Server, transport: Transport, tmp_path: Path
) -> None:
    file = PROGRAMS / "two_sides.rb"
    command = (interpreter("ruby", "-rpg"), file)
    with run(command, server, transport, tmp_path, "--ruby-stacks") as guarded:
        said = guarded.program.read()
        fault = guarded.wait_for("shared-by-processes")
        guarded.program.go_on()
        assert guarded.program.wait() == 66
        log = guarded.program.log
    sides = {one["pid"]: one for one in fault["culprits"] if one["role"] in {"intruder", "requester"}}
    assert set(sides) == {said["parent"], said["child"]}
    assert own_calls(sides[said["child"]]["stack"], str(file)) == [
        "ask",
        "load_user",
        "block in main",
        "main",
        "<main>",
    ]
    assert own_calls(sides[said["parent"]]["stack"], str(file)) == ["ask", "save_order", "main", "<main>"]
    opened, *others = fault["story"]
    assert (opened["event"], opened["pid"]) == ("opened", said["parent"])
    assert own_calls(opened["stack"], str(file)) == ["open_shop", "main", "<main>"]
    assert all(one["stack"] is None for one in others)
    assert "; seen at two_sides.rb:" in fault["summary"]
    assert "opened at two_sides.rb:" in log
    assert log.count("pgguard_ruby_stacks.rb") == 2, "at the beginning and in the end it is said what was added"


@contextmanager
def puma(server: Server, transport: Transport, directory: Path) -> Iterator[tuple[Run, WebServer]]:
    interpreter("ruby", "-rpg", "-rsequel", "-rpuma")
    command = shutil.which("puma") or not_installed("Puma")
    settings, application = PROGRAMS / "puma" / "preloaded.rb", PROGRAMS / "puma" / "config.ru"
    shell = ("sh", "-c", 'exec "$0" -C "$@" >&2', command, settings, application)
    with run(shell, server, transport, directory, "--ruby-stacks") as guarded:
        yield (
            guarded,
            WebServer(guarded.program, r"Listening on http://127\.0\.0\.1:(\d+)", r"Worker \d \(PID: (\d+)\) booted"),
        )


@over_tcp
def test_a_worker_of_puma_is_shown_in_the_application(server: Server, transport: Transport, tmp_path: Path) -> None:
    file = str(PROGRAMS / "puma" / "config.ru")

    def shows(fault: Fault) -> bool:
        stacks = [one["stack"] for one in fault["culprits"] if one["thread_name"] and one["stack"]]
        return any(own_calls(stack, file) for stack in stacks)

    found: list[Fault] = []
    for trial in range(4):  # a thread that has been given another's answer has moved on, and is not seen
        directory = tmp_path / str(trial)
        directory.mkdir()
        with puma(server, transport, directory) as (guarded, web):
            web.load(2400, seconds=24, patience=1, enough=lambda: bool(guarded.faults("shared-by-processes")))
            guarded.wait_for("shared-by-processes")
            found = [*guarded.faults("shared-by-processes"), *guarded.faults("inherited-connection")]
            log = guarded.program.log
        assert "WARNING" not in log, "Puma warns of threads that are there when it forks"
        opened = [one["stack"] for fault in found for one in fault["story"] or () if one["event"] == "opened"]
        if any(shows(fault) for fault in found) and any("block in <main>" in own_calls(one, file) for one in opened):
            return
    pytest.fail(f"no stacks: {found}")


@over_unix
def test_two_threads_on_one_connection_are_shown(server: Server, transport: Transport, tmp_path: Path) -> None:
    file = PROGRAMS / "threads_sharing.rb"
    with run((interpreter("ruby", "-rpg"), file), server, transport, tmp_path, "--ruby-stacks") as guarded:
        said = guarded.program.read()
        fault = guarded.wait_for("shared-by-threads")
    threads = {one["tid"]: one for one in fault["culprits"] if one["role"] != "owner"}
    assert set(threads) == {said["first"], said["second"]}
    assert all(own_calls(one["stack"], str(file))[:1] == ["block (3 levels) in <main>"] for one in threads.values())


@over_tcp
def test_threads_of_sidekiq_are_shown_in_their_jobs(
    server: Server, transport: Transport, tmp_path: Path, short_directory: Path
) -> None:
    interpreter("ruby", "-rpg", "-rsidekiq")
    command = shutil.which("sidekiq") or not_installed("Sidekiq")
    file = PROGRAMS / "sidekiq_jobs.rb"
    with running_redis(short_directory) as url:
        jobs = ("env", f"REDIS_URL={url}", command, "--concurrency", "3", "--require", file)
        with run(jobs, server, transport, tmp_path, "--ruby-stacks") as guarded:
            fault = guarded.wait_for("shared-by-threads")
    culprits = [one for one in fault["culprits"] if one["role"] != "owner"]
    assert len(culprits) > 1
    assert all(own_calls(one["stack"], str(file)) == ["total", "perform"] for one in culprits)


@over_unix
def test_without_the_option_it_is_said_what_would_show_them(
    start_guard: StartGuard, transport: Transport, tmp_path: Path
) -> None:
    guard = start_guard("--evidence-budget", "3")
    with running((interpreter("ruby", "-rpg"), PROGRAMS / "two_sides.rb"), guard.at(transport), tmp_path) as program:
        program.read()
        [fault, *_] = guard.wait_for("shared-by-processes")
    problems = {(one["stack"], one["stack_problem"]) for one in fault["culprits"] if one["role"] != "owner"}
    assert problems == {(None, "Ruby's stacks are read if pgguard run --ruby-stacks starts the program")}
    assert "RUBYOPT" not in os.environ
