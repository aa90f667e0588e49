"""Who opened a connection is known from when it was made, however busy the machine is and whatever else runs on it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, cast

import pytest

from tests.integration.running import PROGRAMS, named, named_transport, running

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import StartGuard
    from tests.servers import Transport

pytestmark = [
    pytest.mark.parametrize("server", ["embedded"], indirect=True, scope="session"),
    pytest.mark.usefixtures("alone"),
]

TIMES = 12


@named_transport
def test_of_a_dozen_forks_right_after_connecting_every_opener_is_known(
    start_guard: StartGuard, transport: Transport, tmp_path: Path
) -> None:
    """The child's query is an inheritor's first: the verdict falls while the opener is still being looked for."""
    guard = start_guard("--mode", "log", unlimited=True)
    command = (sys.executable, PROGRAMS / "forks_at_once.py", str(TIMES), "query")
    with running(command, guard.at(transport), tmp_path) as program:
        said = program.read()
        children = cast("list[int]", said["children"])
        faults = [fault for fault in guard.wait_for("inherited-connection", count=TIMES) if named([fault], "intruder")]
    assert {pid for fault in faults for pid in named([fault], "intruder")} == set(children)
    owners = [
        {(culprit["pid"], culprit["evidence"]) for culprit in fault["culprits"] if culprit["role"] == "owner"}
        for fault in faults
    ]
    assert owners == [{(said["parent"], "kernel-sender")}] * TIMES


@named_transport
@pytest.mark.parametrize(("mode", "action"), [("log", "logged"), ("reject", "rejected")])
def test_of_a_dozen_goodbyes_right_after_connecting_every_one_is_foreign(
    mode: str, action: str, start_guard: StartGuard, transport: Transport, tmp_path: Path
) -> None:
    guard = start_guard("--mode", mode, unlimited=True)
    command = (sys.executable, PROGRAMS / "forks_at_once.py", str(TIMES), "terminate")
    with running(command, guard.at(transport), tmp_path) as program:
        said = program.read()
        faults = guard.wait_for("foreign-terminate", count=TIMES)
    assert named(faults, "intruder") == set(cast("list[int]", said["children"]))
    assert named(faults, "owner") == {said["parent"]}
    assert [fault["action"] for fault in faults] == [action] * TIMES
