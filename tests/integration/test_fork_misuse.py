"""One connection used by two processes: found, and both of them named, on either transport."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.guard_process import Fault, GuardProcess
    from tests.servers import Address, Transport
import pytest

from pgguard.faults.heirs import PATIENCE
from tests.integration.running import every_transport, named_transport, sampled_transport

pytestmark = pytest.mark.parametrize("server", ["embedded"], indirect=True, scope="session")

PROGRAM = Path(__file__).parent / "programs" / "shared_connection.py"


@contextmanager
def scenario(name: str, address: Address, *, before: Sequence[str] = ()) -> Iterator[list[int]]:
    """Play a scenario to its end, and yield its processes, parent first, while all of them still hold the socket.

    Args:
        name: the scenario's.
        address: where it connects to.
        before: what the command begins with, if not with the interpreter.
    """
    program = subprocess.Popen(
        [*before, sys.executable, PROGRAM, name],
        env=address.environ(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with program:
        try:
            assert program.stdin is not None
            assert program.stdout is not None
            pids = json.loads(program.stdout.readline())
            assert program.stdout.readline() == "done\n"
            yield pids
            program.stdin.close()
            assert program.wait(30) == 0
        finally:
            program.kill()


def play(name: str, guard: GuardProcess, transport: Transport) -> list[int]:
    """Play a scenario and stop the guard, so that its record is complete."""
    with scenario(name, guard.at(transport)) as pids:
        pass
    guard.stop()
    return pids


def culprits(fault: Fault) -> dict[str, list[tuple[int | None, str]]]:
    """The pids and evidence of each role."""
    roles: dict[str, list[tuple[int | None, str]]] = {}
    for culprit in fault["culprits"]:
        roles.setdefault(culprit["role"], []).append((culprit["pid"], culprit["evidence"]))
    return roles


def pids_named(fault: Fault) -> set[int]:
    return {culprit["pid"] for culprit in fault["culprits"]} - {None}


@named_transport
def test_overlapping_requests_name_intruder_and_requester(guard: GuardProcess, transport: Transport) -> None:
    parent, child = play("overlapping", guard, transport)

    first, *others = guard.faults("shared-by-processes")
    assert first["severity"] == "error"
    assert first["action"] == "logged"
    assert first["repeat_of"] is None
    assert (child, "kernel-sender") in culprits(first)["intruder"]
    assert (parent, "kernel-sender") in culprits(first)["requester"]
    assert f"pid {child}" in first["summary"]
    assert f"pid {parent}" in first["summary"]
    assert first["session"]["transport"] == ("unix" if transport == "unix" else "tcp")
    assert first["message"]["name"] == "Query"
    assert first["libpq"] == "message type 0x54 arrived from server while idle"

    asked = {request["pid"]: request for request in first["requests"]}
    assert "pg_sleep" in asked[parent]["sql"]
    assert asked[parent]["state"] in {"waiting", "answering"}
    assert "0.3" not in asked[parent]["sql"], "literals are replaced by default"

    # Three rounds: the child intrudes three times, and the parent, coming back, twice.
    assert all(other["repeat_of"] == first["id"] for other in others)
    assert 1 + sum(1 + other["suppressed"] for other in others) >= 5, "no repeat goes uncounted"


@named_transport
def test_each_culprit_is_described_as_it_was(guard: GuardProcess, transport: Transport) -> None:
    """Name, command line and parent come from /proc, so that a report can be read when the processes are gone."""
    parent, _ = play("overlapping", guard, transport)
    [process] = [
        culprit["process"]
        for culprit in guard.faults("shared-by-processes")[0]["culprits"]
        if culprit["role"] == "intruder"
    ]
    assert process["cmdline"][1:] == [str(PROGRAM), "overlapping"]
    assert process["ppid"] == parent


@sampled_transport
def test_overlapping_requests_of_nobody_knows_whom_name_everyone_who_has_the_socket(
    guard: GuardProcess, transport: Transport
) -> None:
    """Nobody says there who sent what, so no single process is accused; but that libpq never overlaps is certain."""
    parent, child = play("overlapping", guard, transport)
    first = guard.faults("request-while-busy")[0]
    assert first["severity"] == "error"
    assert first["session"]["transport"] == "tcp"
    assert culprits(first)["intruder"] == [(None, "unknown")]
    assert set(culprits(first)["holder"]) == {(parent, "socket-holder"), (child, "socket-holder")}
    assert pids_named(first) == {parent, child}
    assert guard.faults("shared-by-processes") == []


@named_transport
def test_taking_perfect_turns_is_an_error(guard: GuardProcess, transport: Transport) -> None:
    """Nothing overlaps, so only the sender's identity can tell."""
    parent, child = play("in_turn", guard, transport)
    inherited = guard.faults("inherited-connection")[0]
    shared = guard.faults("shared-by-processes")[0]
    assert inherited["severity"] == "warning"
    assert inherited["id"] < shared["id"]
    assert child in pids_named(inherited)
    assert shared["severity"] == "error"
    assert culprits(shared)["intruder"] == [(child, "kernel-sender")], "the parent has opened it, and has a right to it"
    assert (parent, "kernel-sender") in culprits(shared)["requester"]
    assert shared["sent_by"]["pid"] == parent, "whose message shows it"
    assert f"pid {child} (" in shared["summary"].split(" uses the connection that ")[0]


@every_transport
def test_a_parent_that_listens_is_never_the_intruder_on_what_it_opened(
    guard: GuardProcess, transport: Transport
) -> None:
    """Its child queries while it waits for notifications, and it asks something itself afterwards."""
    parent, child = play("listening", guard, transport)
    shared = guard.faults("shared-by-processes")
    assert shared or transport == "sampled", "only who is told who sends can tell that"
    assert [culprits(fault)["intruder"][0][0] for fault in shared] == [child] * len(shared)
    assert all(parent in pids_named(fault) for fault in shared)
    assert all(parent not in dict(culprits(fault).get("intruder", [])) for fault in guard.faults())


@sampled_transport
def test_taking_perfect_turns_unnoticed_is_seen_as_an_inherited_connection(
    guard: GuardProcess, transport: Transport
) -> None:
    with scenario("in_turn", guard.at(transport)) as pids:
        found = guard.wait_for("inherited-connection")
        assert pids_named(found[-1]) == set(pids)
    guard.assert_no_faults(except_kinds={"inherited-connection"})


@named_transport
def test_a_third_process_is_an_error(guard: GuardProcess, transport: Transport) -> None:
    parent, first, second = play("third_process", guard, transport)
    shared = guard.faults("shared-by-processes")[0]
    assert culprits(shared)["intruder"] == [(second, "kernel-sender")]
    assert {first, parent} <= pids_named(shared)


@sampled_transport
def test_a_third_process_that_nobody_names_is_among_the_holders(guard: GuardProcess, transport: Transport) -> None:
    with scenario("third_process", guard.at(transport)) as pids:
        # Who is seen to have it later than the other one is told of anew.
        found = guard.wait_for("inherited-connection")
        if pids_named(found[-1]) != set(pids):
            found = guard.wait_for("inherited-connection", count=len(found) + 1)
        assert pids_named(found[-1]) == set(pids), json.dumps(found)


@every_transport
def test_a_hand_over_is_only_a_warning(guard: GuardProcess, transport: Transport) -> None:
    """pg_basebackup does it: an error here would end correct programs in ``reject`` mode."""
    with scenario("handed_over", guard.at(transport)) as (parent, child):
        found = guard.wait_for("inherited-connection")
        assert found[-1]["severity"] == "warning"
        assert pids_named(found[-1]) == {parent, child}, json.dumps(found)
        named = {culprit["pid"] for culprit in found[0]["culprits"] if culprit["evidence"] == "kernel-sender"}
        assert named == (set() if transport == "sampled" else {parent, child})
    guard.assert_no_faults(except_kinds={"inherited-connection"})


def test_the_corrected_program_goes_unmentioned(guard: GuardProcess, transport: Transport) -> None:
    play("connect_after_fork", guard, transport)
    guard.assert_no_faults()


@every_transport
def test_heirs_that_forget_the_connection_and_open_their_own_are_only_mentioned(
    guard: GuardProcess, transport: Transport
) -> None:
    with scenario("forgotten", guard.at(transport)) as (parent, idle, *active):
        found = guard.wait_for("inherited-connection")
        time.sleep(2 * PATIENCE)
    guard.stop()
    assert {fault["severity"] for fault in guard.faults()} == {"info"}
    assert {fault["kind"] for fault in guard.faults()} == {"inherited-connection"}
    assert pids_named(found[0]) == {parent, idle, *active}
    assert "not used it" in found[0]["summary"]
    assert "What to change" not in guard.stderr, "a line is enough"


@every_transport
def test_an_heir_that_does_nothing_is_warned_of(guard: GuardProcess, transport: Transport) -> None:
    with scenario("idle_heir", guard.at(transport)) as (parent, child):
        [found] = guard.wait_for("inherited-connection")
    assert found["severity"] == "warning"
    assert pids_named(found) == {parent, child}, json.dumps(found)


@named_transport
def test_an_heir_with_connections_of_its_own_that_uses_this_one_is_told_anew(
    guard: GuardProcess, transport: Transport
) -> None:
    with scenario("forgotten_and_used", guard.at(transport)) as (parent, child):
        guard.wait_for("inherited-connection")
        os.kill(parent, signal.SIGUSR1)
        found = guard.wait_for("inherited-connection", count=2)
    assert [fault["severity"] for fault in found] == ["info", "warning"]
    assert culprits(found[1])["intruder"] == [(child, "kernel-sender")]
