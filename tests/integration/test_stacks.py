"""The lines of code: of both sides, and where the connection was opened."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest

from pgguard.attribution.stacks import find_py_spy
from tests.integration.running import PROGRAMS, every_transport, running
from tests.servers import not_installed

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import StartGuard
    from tests.guard_process import Fault
    from tests.servers import Transport

pytestmark = pytest.mark.parametrize("server", ["embedded"], indirect=True, scope="session")

PROGRAM = PROGRAMS / "two_sides.py"


def own_calls(stack: list[dict[str, Any]] | None, file: str = str(PROGRAM)) -> list[str]:
    """The functions of the application's own, the innermost first."""
    calls = [frame for frame in stack or () if frame["application"]]
    assert all(frame["file"] == file for frame in calls)
    return [frame["function"] for frame in calls]


@every_transport
def test_a_report_shows_both_sides_and_where_the_connection_was_opened(
    start_guard: StartGuard, transport: Transport, tmp_path: Path
) -> None:
    if find_py_spy() is None:
        not_installed("py-spy")
    guard = start_guard("--evidence-budget", "3")  # a busy machine takes long for what is to be shown in any case
    with running((sys.executable, PROGRAM), guard.at(transport), tmp_path) as program:
        said = program.read()
        [fault, *_] = guard.wait_for("shared-by-processes")
    guard.stop()
    sides: dict[int, Fault] = {one["pid"]: one for one in fault["culprits"] if one["role"] in {"intruder", "requester"}}
    assert set(sides) == {said["parent"], said["child"]}
    assert own_calls(sides[said["child"]]["stack"]) == ["ask", "load_user", "main", "<module>"]
    assert own_calls(sides[said["parent"]]["stack"]) == ["ask", "save_order", "main", "<module>"]
    [opened, *others] = fault["story"]
    assert (opened["event"], opened["pid"]) == ("opened", said["parent"])
    assert own_calls(opened["stack"]) == ["open_shop", "main", "<module>"]
    assert all(one["stack"] is None for one in others)
    assert "; seen at two_sides.py:" in fault["summary"]
    assert "> #" in guard.stderr
    assert "opened at two_sides.py:" in guard.stderr


@pytest.mark.parametrize("transport", ["unix"], indirect=True)
def test_a_program_that_is_in_no_file_is_the_applications_all_the_same(
    start_guard: StartGuard, transport: Transport, tmp_path: Path
) -> None:
    if find_py_spy() is None:
        not_installed("py-spy")
    guard = start_guard("--evidence-budget", "3")
    with running((sys.executable, "-c", PROGRAM.read_text()), guard.at(transport), tmp_path) as program:
        said = program.read()
        [fault, *_] = guard.wait_for("shared-by-processes")
    guard.stop()
    sides: dict[int, Fault] = {one["pid"]: one for one in fault["culprits"] if one["role"] in {"intruder", "requester"}}
    assert own_calls(sides[said["child"]]["stack"], "<string>") == ["ask", "load_user", "main", "<module>"]
    assert own_calls(sides[said["parent"]]["stack"], "<string>") == ["ask", "save_order", "main", "<module>"]
    assert own_calls(fault["story"][0]["stack"], "<string>") == ["open_shop", "main", "<module>"]
    assert "; seen at <string>:" in fault["summary"]
