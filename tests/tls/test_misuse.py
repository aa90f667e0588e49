"""Misuse of every kind is found with TLS on both sides, as it is without; and correct programs are left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import psycopg
import pytest

from tests.integration.running import PROGRAMS, named, running, threads_named
from tests.proxy.messages import READY, TERMINATE, query
from tests.tls.bare import TlsClient
from tests.tls.conftest import tls_guard
from tests.tls.servers import TlsAddress

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.guard_process import Fault, GuardProcess
    from tests.integration.running import Program
    from tests.servers import Address
    from tests.tls.servers import Papers, TlsServer

_PAUSE: Final = {True: "0.2", False: "1.8"}
"""Seconds between events, see test_goodbyes.py: by whether the kernel says who sends."""


@pytest.fixture
def guard(tls_server: TlsServer, papers: Papers, request: pytest.FixtureRequest) -> Iterator[GuardProcess]:
    """A guard of the test's own; by default the kernel tells it who sends, if it can."""
    probe = request.getfixturevalue("probe") if "probe" in request.fixturenames else True
    options = ("--unread-answer", "0.7", "--idle-in-transaction", "0.5")
    with tls_guard(tls_server, "sslmode=require", papers.server, *options, probe=probe) as guard:
        yield guard


both = pytest.mark.parametrize("probe", [True, False], ids=["probed", "sampled"])


def address_of(guard: GuardProcess) -> Address:
    return TlsAddress(guard.tcp.host, guard.tcp.port)


def command(program: str, *arguments: str) -> list[str | Path]:
    return [sys.executable, PROGRAMS / program, *arguments]


@contextmanager
def scenario(name: str, guard: GuardProcess) -> Iterator[list[int]]:
    """Play a scenario of shared_connection.py, and yield its processes, parent first, while they are all there.

    It may fail for them: whoever comes second on a TLS session loses it.
    """
    with subprocess.Popen(
        command("shared_connection.py", name),
        env=address_of(guard).environ(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as program:
        try:
            assert program.stdout is not None
            pids = json.loads(program.stdout.readline())
            program.stdout.readline()
            yield pids
        finally:
            os.killpg(program.pid, signal.SIGKILL)


def roles(fault: Fault) -> dict[str, set[int]]:
    return {role: named([fault], role) for role in {culprit["role"] for culprit in fault["culprits"]}}


def only(guard: GuardProcess, kind: str, *, and_kinds: set[str] = frozenset()) -> Fault:  # type: ignore[assignment]
    """The one fault of a kind, when the guard has been stopped; there is none of another one."""
    guard.wait_for(kind)
    guard.stop()
    assert {fault["kind"] for fault in guard.faults()} <= {kind} | and_kinds, guard.faults()
    fault = guard.faults(kind)[0]
    assert fault["session"]["tls"] is True
    return fault


# Two processes


@both
@pytest.mark.parametrize("name", ["in_turn", "third_process"])
def test_two_processes_that_use_one_session(name: str, probe: bool, guard: GuardProcess) -> None:
    with scenario(name, guard) as (parent, *children):
        fault = only(guard, "tls-corruption", and_kinds={"inherited-connection"})
    users = {parent, *children[:1]} if name == "in_turn" else set(children)
    assert fault["severity"] == "error"
    assert parent not in roles(fault).get("intruder", set()), "it has opened it"
    assert users <= named([fault])
    if probe:
        evidence = {culprit["pid"]: culprit["evidence"] for culprit in fault["culprits"]}
        assert all(evidence[pid] == "kernel-sender" for pid in users)
    assert "bad record mac" in fault["libpq"]


@both
def test_a_hand_over_is_only_a_warning(probe: bool, guard: GuardProcess) -> None:
    with scenario("handed_over", guard) as (parent, child):
        [fault, *_] = guard.wait_for("inherited-connection")
        assert named([fault]) == {parent, child}
        assert fault["severity"] == "warning"
        evidence = {culprit["evidence"] for culprit in fault["culprits"]}
        assert ("kernel-sender" in evidence) is probe
    guard.assert_no_faults(except_kinds={"inherited-connection", "unclean-close"})


def test_who_connects_after_the_fork_is_left_alone(guard: GuardProcess) -> None:
    done = subprocess.run(
        command("shared_connection.py", "connect_after_fork"),
        env=address_of(guard).environ(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "done" in done.stdout
    guard.assert_no_faults()


@both
def test_a_child_that_ends_its_parents_session(probe: bool, guard: GuardProcess, tmp_path: Path) -> None:
    said = _goodbye("last_user", guard, tmp_path, probe=probe)
    fault = only(guard, "foreign-terminate", and_kinds={"inherited-connection", "shared-by-processes"})
    assert said["parent"] in named([fault], "owner")
    assert named([fault], "intruder") == ({said["child"]} if probe else named([fault], "intruder") & {said["child"]})


@both
def test_a_child_that_goes_on_with_what_its_parent_has_ended(probe: bool, guard: GuardProcess, tmp_path: Path) -> None:
    said = _goodbye("daemon", guard, tmp_path, probe=probe)
    fault = only(guard, "shared-by-processes", and_kinds={"inherited-connection"})
    assert fault["reason"] == "after another process had ended the session"
    assert named([fault], "intruder") == {said["child"]}


@pytest.mark.parametrize(
    ("name", "probe"),
    [("forgotten", True), ("twice", True), ("released", True), ("launcher", True), ("launcher", False)],
)
def test_a_goodbye_that_harms_nobody_is_left_alone(name: str, probe: bool, guard: GuardProcess, tmp_path: Path) -> None:
    """Though TLS may make it unreadable: whoever has used the connection in between has used up its numbers."""
    _goodbye(name, guard, tmp_path, probe=probe)
    guard.stop()
    assert [fault for fault in guard.faults() if fault["severity"] == "error"] == []


def _goodbye(name: str, guard: GuardProcess, directory: Path, *, probe: bool) -> dict[str, int]:
    pause = {"PAUSE": _PAUSE[probe]}
    with running(command("goodbye.py", name, "psycopg2"), address_of(guard), directory, environ=pause) as program:
        said = program.read()
        program.wait()
    assert said["alive"] == 0
    return said


@both
def test_pg_basebackup(probe: bool, guard: GuardProcess, tls_server: TlsServer, tmp_path: Path) -> None:
    """It leaves a connection to its child, which says goodbye on another one when its parent is done with that."""
    del probe
    program, target = tls_server.bindir / "pg_basebackup", tmp_path / "backup"
    subprocess.run(
        [program, "-D", target, "-X", "stream", "-c", "fast", "--no-sync"],
        env=address_of(guard).environ(),
        capture_output=True,
        check=True,
        timeout=60,
    )
    guard.assert_no_faults(except_kinds={"inherited-connection"})


def test_a_connection_that_outlives_who_has_opened_it(guard: GuardProcess, tmp_path: Path) -> None:
    with _started(guard, tmp_path, "bystander.py", "leak") as program:
        said = program.read()
        program.wait()
        [fault] = guard.wait_for("leaked-connection")
    assert (named([fault], "owner"), named([fault], "holder")) == ({said["pid"]}, {said["child"]})
    assert fault["session"]["tls"] is True


# One process


@contextmanager
def _started(guard: GuardProcess, directory: Path, *what: str) -> Iterator[Program]:
    with running(command(*what), address_of(guard), directory) as program:
        yield program


@both
def test_two_threads(probe: bool, guard: GuardProcess, tmp_path: Path) -> None:
    with _started(guard, tmp_path, "threads_sharing.py") as program:
        said = program.read()
        program.wait()
        found = guard.wait_for("shared-by-threads")
    assert {said["first"], said["second"]} <= threads_named(found) or not probe
    assert named(found) == {said["pid"]}
    guard.stop()
    assert guard.faults("tls-corruption") == []


@both
def test_an_answer_that_is_left_unread(probe: bool, guard: GuardProcess, tmp_path: Path) -> None:
    del probe
    with _started(guard, tmp_path, "abandoned_answer.py", "psycopg_alarm") as program:
        program.read()
        [fault] = guard.wait_for("unread-answer")
        assert named([fault]) == {program.pid}
        assert fault["session"]["tls"] is True


@pytest.mark.parametrize("name", ["psycopg_stream", "psycopg_pipeline", "server_side_cursors", "listener"])
def test_who_reads_late_is_left_alone(name: str, guard: GuardProcess, tmp_path: Path) -> None:
    with _started(guard, tmp_path, "abandoned_answer.py", name) as program:
        program.read()
        program.go_on()
        assert program.read()["rows"]
        program.wait()
    guard.assert_no_faults()


def test_a_transaction_that_sits_idle(guard: GuardProcess) -> None:
    with psycopg.connect(address_of(guard).conninfo, sslmode="require") as connection:
        connection.execute("SELECT 1")
        guard.wait_for("idle-in-transaction")


@pytest.mark.parametrize("ending", ["exits", "closes", "is_killed"])
def test_an_end_without_a_word(ending: str, guard: GuardProcess, tmp_path: Path) -> None:
    with _started(guard, tmp_path, "endings.py", ending) as program:
        said = program.read()
        program.go_on()
        fault = only(guard, "unclean-close")
        assert named([fault], "closer") == {said["pid"]}


def test_copy_data_that_is_cut_short(guard: GuardProcess, tmp_path: Path) -> None:
    with _started(guard, tmp_path, "copy_cut_short.py", "cut") as program:
        program.wait()
        fault = only(guard, "unclean-close")
    assert (fault["severity"], fault["message"]["name"]) == ("error", "Terminate")


def test_requests_on_top_of_each_other(guard: GuardProcess) -> None:
    client = TlsClient(guard.tcp)
    client.log_in()
    client.send(query("SELECT pg_sleep(0.2)"))
    client.send(query("SELECT 1"))
    said = b""
    while said.count(READY) < 2:
        said += client.until(READY)
    client.send(TERMINATE)
    client.close()
    fault = only(guard, "request-while-busy")
    assert fault["message"]["name"] == "Query"


def test_what_is_no_message(guard: GuardProcess) -> None:
    client = TlsClient(guard.tcp)
    client.log_in()
    client.send(b"\0\0\0\0\0garbage")
    client.rest()
    client.close()
    fault = only(guard, "protocol-violation", and_kinds={"unclean-close", "untracked"})
    assert fault["severity"] == "error"


def test_more_connections_than_there_may_be(guard: GuardProcess, tmp_path: Path) -> None:
    with _started(guard, tmp_path, "connections.py", "2", "idle", "user=few") as program:
        said = program.read()
        with _started(guard, tmp_path, "connections.py", "2", "retry", "user=few") as other:
            assert other.read()["refused"] == 2
            other.go_on()
        [fault, *_] = guard.wait_for("connection-exhaustion")
        assert said["pid"] in named([fault], "holder")
        program.go_on()
        program.wait()


@pytest.mark.parametrize(("set_to", "action"), [("reject", "rejected"), ("drop", "logged")])
def test_a_child_that_ends_its_parents_session_can_be_rejected_and_not_dropped(
    set_to: str, action: str, tls_server: TlsServer, papers: Papers, tmp_path: Path
) -> None:
    """It has ended TLS as well, so the session wouldn't live on."""
    config = tmp_path / "pgguard.toml"
    config.write_text(f"[kinds]\nforeign-terminate = '{set_to}'\n")
    with tls_guard(tls_server, "sslmode=require", papers.server, "--config", str(config)) as guard:
        said = _goodbye("last_user", guard, tmp_path, probe=True)
        only(guard, "foreign-terminate", and_kinds={"inherited-connection", "shared-by-processes"})
        [fault] = guard.faults("foreign-terminate")
    assert fault["action"] == action
    assert named([fault], "intruder") == {said["child"]}


def test_two_threads_are_rejected(tls_server: TlsServer, papers: Papers, tmp_path: Path) -> None:
    with (
        tls_guard(tls_server, "sslmode=require", papers.server, "--mode", "reject") as guard,
        _started(guard, tmp_path, "threads_sharing.py") as program,
    ):
        said = program.read()
        [fault, *_] = guard.wait_for("shared-by-threads")
        program.wait()
    assert fault["action"] == "rejected"
    assert named([fault]) == {said["pid"]}


def test_what_is_sent_on_top_of_an_unread_answer_is_rejected(tls_server: TlsServer, papers: Papers) -> None:
    options = ("--mode", "reject", "--unread-answer", "0.3")
    with tls_guard(tls_server, "sslmode=require", papers.server, *options) as guard:
        client = TlsClient(guard.tcp)
        client.log_in()
        client.send(query("SELECT 1"))
        guard.wait_for("unread-answer")
        client.send(query("SELECT 2"))
        faults = guard.wait_for("unread-answer", count=2)
        assert b"C08P01" in client.rest()
        client.close()
    assert [fault["action"] for fault in faults] == ["logged", "rejected"]


def test_without_attribution_nobody_is_named(tls_server: TlsServer, papers: Papers, tmp_path: Path) -> None:
    options = ("--attribution", "off", "--mode", "reject")
    with tls_guard(tls_server, "sslmode=require", papers.server, *options) as guard:
        with scenario("in_turn", guard):
            [corruption] = guard.wait_for("tls-corruption")
        _goodbye("launcher", guard, tmp_path, probe=True)  # a session that is used as it may be, and then left
        client = TlsClient(guard.tcp)
        client.log_in()
        client.send(b"\0\0\0\0\0garbage")
        assert b"C08P01" in client.rest()
        client.close()
        [violation] = guard.wait_for("protocol-violation")
        guard.stop()
        assert len(guard.faults("tls-corruption")) == 1
    assert (corruption["action"], violation["action"]) == ("logged", "rejected")
    assert named([corruption, violation]) == set()


def test_reject_mode_tells_the_client(tls_server: TlsServer, papers: Papers) -> None:
    with tls_guard(tls_server, "sslmode=require", papers.server, "--mode", "reject") as guard:
        client = TlsClient(guard.tcp)
        client.log_in()
        client.send(b"\0\0\0\0\0garbage")
        said = client.rest()
        assert b"C08P01" in said
        assert guard.wait_for("protocol-violation")[0]["action"] == "rejected"
        client.close()
