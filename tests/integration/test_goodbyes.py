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
)

if TYPE_CHECKING:
    from pathlib import Path

    from tests.guard_process import Fault, GuardProcess
    from tests.servers import Transport

pytestmark = pytest.mark.parametrize("server", ["embedded"], indirect=True, scope="session")

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
    with running(program(language, scenario, request), guard.at(transport), directory) as played:
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
@pytest.mark.parametrize("scenario", ["forgotten", "twice", "launcher", "released"])
def test_a_goodbye_that_harms_nobody_is_left_alone(
    scenario: str, guard: GuardProcess, transport: Transport, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    play("psycopg2", scenario, guard, transport, tmp_path, request)
    assert errors(guard) == []
