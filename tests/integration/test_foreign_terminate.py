"""A child that says goodbye to the server on its parent's connection: named, or kept from doing harm."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.running import PROGRAMS, every_transport, interpreter, named, named_transport, running

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import StartGuard
    from tests.guard_process import Fault, GuardProcess
    from tests.servers import Server, Transport

pytestmark = pytest.mark.parametrize("server", ["embedded"], indirect=True, scope="session")

LONG_ENOUGH = "0.6"
"""Seconds that a child lives, for a guard that isn't told who sends to look who has the socket."""

EXITING = pytest.mark.parametrize("terminating_child", ["perl", "ruby"], indirect=True)
"""Those whose children need only exit: the others close the connection themselves, and it is the same from then on."""


@pytest.fixture(params=["perl", "ruby", "psycopg2", "psycopg"])
def terminating_child(request: pytest.FixtureRequest) -> list[str | Path]:
    """The command of a program whose child takes its parent's connection down; it wants to know how long it lives."""
    if request.param == "perl":
        return [interpreter("perl", "-MDBD::Pg"), PROGRAMS / "terminating_child.pl"]
    if request.param == "ruby":
        return [interpreter("ruby", "-rpg"), PROGRAMS / "terminating_child.rb"]
    return [sys.executable, PROGRAMS / "terminating_child.py", str(request.param)]


def errors(guard: GuardProcess) -> list[Fault]:
    return [fault for fault in guard.faults() if fault["severity"] == "error"]


@every_transport
def test_the_child_is_named(
    terminating_child: list[str | Path], start_guard: StartGuard, transport: Transport, tmp_path: Path
) -> None:
    found: list[Fault] = []
    said: dict[str, Any] = {}
    for _ in range(1 if transport != "sampled" else 5):  # a busy guard may come to look when the child has gone
        guard = start_guard("--mode", "log")
        with running([*terminating_child, LONG_ENOUGH], guard.at(transport), tmp_path) as program:
            said = program.read()
            assert said["alive"] == 0, "the parent's connection is gone"
        guard.stop()
        if found := guard.faults("foreign-terminate"):
            break
    [fault] = found
    assert fault["severity"] == "error"
    assert fault["action"] == "logged"
    assert fault["message"]["name"] == "Terminate"
    assert said["child"] in named([fault])
    assert said["parent"] in named([fault])
    if transport != "sampled":
        assert named([fault], "intruder") == {said["child"]}


@EXITING
@named_transport
def test_a_child_that_exits_at_once_does_not_go_unnoticed(
    terminating_child: list[str | Path], guard: GuardProcess, transport: Transport, tmp_path: Path
) -> None:
    with running([*terminating_child, "0"], guard.at(transport), tmp_path) as program:
        said = program.read()
    guard.stop()
    [fault] = guard.faults("foreign-terminate")
    assert fault["severity"] == "error"
    assert said["parent"] in named([fault])
    assert named([fault], "intruder") == {said["child"]}


@EXITING
@every_transport
def test_a_dropped_goodbye_leaves_the_parent_its_connection(
    terminating_child: list[str | Path], start_guard: StartGuard, transport: Transport, tmp_path: Path
) -> None:
    configuration = tmp_path / "pgguard.toml"
    configuration.write_text('[kinds]\nforeign-terminate = "drop"\n')
    found: list[Fault] = []
    alive = status = None
    for attempt in range(1 if transport != "sampled" else 5):  # a busy guard may come to look when the child has gone
        guard = start_guard("--config", str(configuration))
        with running([*terminating_child, LONG_ENOUGH], guard.at(transport), tmp_path, f"{attempt}") as program:
            alive = program.read()["alive"]
            status = program.wait()
        guard.stop()
        found = errors(guard)
        if alive:
            break
    assert (alive, status) == (1, 0)
    [fault] = found
    assert (fault["kind"], fault["action"]) == ("foreign-terminate", "dropped")


@every_transport
@pytest.mark.parametrize("scenario", ["parent_closes", "daemon_closes"])
def test_a_goodbye_by_whoever_the_connection_belongs_to_is_left_alone(
    scenario: str, guard: GuardProcess, transport: Transport, tmp_path: Path
) -> None:
    command = (sys.executable, PROGRAMS / "rightful_goodbye.py", scenario)
    with running(command, guard.at(transport), tmp_path) as program:
        program.read()
        assert program.wait() == 0, program.log
    guard.stop()
    assert guard.faults("foreign-terminate") == []
    assert errors(guard) == []


@every_transport
def test_pg_basebackup_is_left_alone(server: Server, guard: GuardProcess, transport: Transport, tmp_path: Path) -> None:
    """Its child, which streams the WAL, says goodbye on the parent's connection as it exits, when that isn't needed.

    Nothing is lost by it, so that nobody can call it an error.
    """
    backup = ("-D", tmp_path / "backup", "-X", "stream", "-c", "fast", "--no-sync")
    environment = guard.at(transport).environ()
    subprocess.run([server.bindir / "pg_basebackup", *backup], env=environment, check=True, timeout=60)
    guard.stop()
    assert errors(guard) == []
