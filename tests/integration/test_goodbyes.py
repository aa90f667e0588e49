"""A goodbye while somebody else has the connection open, whoever says it and whatever they did before."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from tests.integration.running import (
    PROGRAMS,
    compiled,
    every_transport,
    interpreter,
    named,
    named_transport,
    running,
    sampled_transport,
)

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import StartGuard
    from tests.guard_process import Fault, GuardProcess
    from tests.servers import Transport

pytestmark = pytest.mark.parametrize("server", ["embedded"], indirect=True, scope="session")

PAUSES = {"sampled": "1.8", "probed": "0.2", "unix": "0.2"}
"""Seconds between events. A guard that isn't told who sends looks who is there every 0.6 s, and 0.2 s after a goodbye;
after 2 s who has done nothing is a fault."""
LANGUAGES = ["php-pdo", "php-pgsql", "ruby", "perl", "c"]
"""Those whose interpreters or libraries are not part of the test environment."""


def program(language: str, scenario: str, request: pytest.FixtureRequest) -> list[str | Path]:
    """The command of the program in that language, or with that Python driver, which plays the scenario."""
    if language.startswith("php-"):
        return [interpreter("php"), PROGRAMS / "goodbye.php", scenario, language.removeprefix("php-")]
    if language == "ruby":
        return [interpreter("ruby", "-rpg"), PROGRAMS / "goodbye.rb", scenario]
    if language == "perl":
        return [interpreter("perl", "-MDBD::Pg"), PROGRAMS / "goodbye.pl", scenario]
    if language == "c":
        return [request.getfixturevalue("c_program"), scenario]
    return [sys.executable, PROGRAMS / "goodbye.py", scenario, language]


@pytest.fixture(scope="module")
def c_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program in C."""
    return compiled("goodbye.c", tmp_path_factory.mktemp("c"))


def errors(guard: GuardProcess) -> list[Fault]:
    return [fault for fault in guard.faults() if fault["severity"] == "error"]


def play(
    language: str,
    scenario: str,
    guard: GuardProcess,
    transport: Transport,
    directory: Path,
    request: pytest.FixtureRequest,
) -> dict[str, int]:
    """Play a scenario and stop the guard, so that its record is complete."""
    pause = {"PAUSE": PAUSES[transport]}
    with running(program(language, scenario, request), guard.at(transport), directory, environ=pause) as played:
        said = played.read()
        played.wait()
    guard.stop()
    return said


def assert_ended_by_the_child(guard: GuardProcess, said: dict[str, int], transport: Transport) -> None:
    assert said["alive"] == 0, "the parent's connection is gone"
    [fault] = guard.faults("foreign-terminate")
    assert fault["severity"] == "error"
    assert fault["message"]["name"] == "Terminate"
    assert said["parent"] in named([fault], "owner")
    if transport != "sampled":
        assert named([fault], "intruder") == {said["child"]}
    assert named([fault], "intruder") <= {said["child"]}


def assert_used_after_its_end(guard: GuardProcess, said: dict[str, int]) -> None:
    assert said["alive"] == 0, "the connection had been ended"
    [fault] = guard.faults("shared-by-processes")
    assert (fault["severity"], fault["action"]) == ("error", "logged")
    assert fault["reason"] == "after another process had ended the session"
    assert fault["message"]["name"] in {"Query", "Parse"}
    assert named([fault], "intruder") == {said["child"]}
    assert said["parent"] in named([fault], "owner")
    assert f"pid {said['child']}" in fault["summary"]
    assert f"pid {said['parent']}" in fault["summary"]
    assert guard.faults("foreign-terminate") == []


@every_transport
@pytest.mark.parametrize("scenario", ["last_user", "between_turns"])
def test_a_child_that_was_the_last_to_use_the_connection_ends_its_parents(
    scenario: str, guard: GuardProcess, transport: Transport, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    said = play("psycopg2", scenario, guard, transport, tmp_path, request)
    assert_ended_by_the_child(guard, said, transport)


@named_transport
@pytest.mark.parametrize("language", [*LANGUAGES, "psycopg"])
def test_so_it_does_in_every_language(
    language: str, guard: GuardProcess, transport: Transport, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    said = play(language, "last_user", guard, transport, tmp_path, request)
    assert_ended_by_the_child(guard, said, transport)


@every_transport
@pytest.mark.parametrize("scenario", ["daemon", "late_daemon"])
def test_a_child_that_goes_on_with_what_its_parent_has_ended_is_named(
    scenario: str, guard: GuardProcess, transport: Transport, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    said = play("psycopg2", scenario, guard, transport, tmp_path, request)
    assert_used_after_its_end(guard, said)


@named_transport
@pytest.mark.parametrize("scenario", ["hasty_daemon", "heir_of_many"])
def test_so_it_is_while_the_server_ends_the_session_and_among_several_children(
    scenario: str, guard: GuardProcess, transport: Transport, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    said = play("psycopg2", scenario, guard, transport, tmp_path, request)
    assert_used_after_its_end(guard, said)


@sampled_transport
def test_of_several_children_nobody_knows_which_it_is_that_goes_on(
    guard: GuardProcess, transport: Transport, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    said = play("psycopg2", "heir_of_many", guard, transport, tmp_path, request)
    [fault] = guard.faults("shared-by-processes")
    assert named([fault], "intruder") == set()
    assert said["parent"] in named([fault], "owner")


@named_transport
def test_what_has_ended_is_not_rejected(start_guard: StartGuard, transport: Transport, tmp_path: Path) -> None:
    """Nothing is left to be."""
    guard = start_guard("--mode", "reject")
    command = (sys.executable, PROGRAMS / "goodbye.py", "daemon", "psycopg2")
    with running(command, guard.at(transport), tmp_path, environ={"PAUSE": PAUSES[transport]}) as program:
        said = program.read()
        program.wait()
    guard.stop()
    assert_used_after_its_end(guard, said)


@named_transport
@pytest.mark.parametrize("language", [*LANGUAGES, "psycopg"])
def test_so_it_is_in_every_language(
    language: str, guard: GuardProcess, transport: Transport, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    said = play(language, "daemon", guard, transport, tmp_path, request)
    assert_used_after_its_end(guard, said)


@every_transport
@pytest.mark.parametrize("scenario", ["forgotten", "twice", "launcher", "released"])
def test_a_goodbye_that_harms_nobody_is_left_alone(
    scenario: str, guard: GuardProcess, transport: Transport, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    play("psycopg2", scenario, guard, transport, tmp_path, request)
    assert errors(guard) == []
