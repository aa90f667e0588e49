"""A server that dies in the middle of a message: not its client's fault, and the end of the session."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest

from tests.guard_process import Fault, GuardProcess, running_guard
from tests.integration.running import PROGRAMS, Program, named, running
from tests.proxy.messages import query, startup
from tests.servers import Server, installations, not_installed, running_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_SECONDS = 40.0
_POLLS = ("7 ", "271 ")
"""poll(2) and ppoll(2) in /proc/PID/syscall."""


@pytest.fixture(scope="module")
def mortal() -> Iterator[Server]:
    """A server of the tests' own: it starts anew, and ends all sessions, when a process of its is killed."""
    bindir = next((bindir for bindir in installations().values() if bindir is not None), None)
    if bindir is None:
        not_installed("PostgreSQL")
    with running_server(bindir) as server:
        yield server


def _until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def _is_up(server: Server) -> bool:
    with suppress(psycopg.OperationalError), psycopg.connect(server.unix.conninfo, connect_timeout=int(_SECONDS)):
        return True
    return False


def _stuffed(server: Server, backend: int) -> bool:
    """Whether a backend is in the middle of a message, as its client doesn't read."""
    with psycopg.connect(server.unix.conninfo) as connection:
        [wait] = connection.execute("SELECT wait_event FROM pg_stat_activity WHERE pid = %s", (backend,))
    return wait == ("ClientWrite",)


def _asks_and_waits(server: Server, program: Program) -> int:
    backend = program.read()["backend"]
    _until(lambda: _stuffed(server, backend), f"backend {backend} never filled the buffers")
    return int(backend)


def _assert_it_was_the_servers(guard: GuardProcess, program: Program, fault: Fault) -> None:
    assert fault["severity"] == "error"
    assert fault["action"] == "logged"
    assert fault["reason"].startswith("the server's stream ended ")
    assert fault["reason"].endswith(" bytes before the end of a DataRow message")
    assert fault["summary"] == fault["reason"]
    assert fault["libpq"] == "server closed the connection unexpectedly"
    assert fault["advice"]["title"] == "Look into the server's log at this time"
    assert "driver" not in fault["advice"]["text"]
    assert named([fault], "intruder") == set()
    assert all(culprit["pid"] is not None for culprit in fault["culprits"])
    assert named([fault]) <= {program.pid}
    for culprit in fault["culprits"]:
        assert (culprit["stack"], culprit["system_call"], culprit["stack_problem"]) == (None, None, None)
    _until(lambda: "SUMMARY: pgguard: protocol-violation" in guard.stderr, "it was never printed")
    assert "logged only; the session has ended" in " ".join(guard.stderr.split())
    assert "the session goes on" not in " ".join(guard.stderr.split())
    assert [fault["kind"] for fault in guard.faults()] == ["protocol-violation"]


@pytest.mark.parametrize("mode", ["log", "reject"])
def test_killed_in_the_middle_of_a_row(mortal: Server, tmp_path: Path, mode: str) -> None:
    with running_guard(mortal.unix, "--mode", mode) as guard:
        command = [sys.executable, str(PROGRAMS / "reads_late.py")]
        with running(command, guard.tcp, tmp_path) as program:
            backend = _asks_and_waits(mortal, program)
            os.kill(backend, signal.SIGSTOP)
            program.go_on()
            # It has read what there was, and waits for the rest.
            syscall = Path(f"/proc/{program.pid}/syscall")
            _until(lambda: syscall.read_text().startswith(_POLLS), "the client never came to wait")
            os.kill(backend, signal.SIGKILL)
            assert "server closed the connection unexpectedly" in str(program.read()["error"])
            [fault] = guard.wait_for("protocol-violation")
            _assert_it_was_the_servers(guard, program, fault)
    _until(lambda: _is_up(mortal), "the server never came back")


def test_told_to_end_in_the_middle_of_a_row(server: Server, guard: GuardProcess, tmp_path: Path) -> None:
    """A server that can't get rid of what it has to say ends without saying that it does."""
    with running([sys.executable, PROGRAMS / "reads_late.py"], guard.tcp, tmp_path) as program:
        backend = _asks_and_waits(server, program)
        with psycopg.connect(server.unix.conninfo) as connection:
            connection.execute("SELECT pg_terminate_backend(%s)", (backend,))
        program.go_on()
        assert "server closed the connection unexpectedly" in str(program.read()["error"])
        [fault] = guard.wait_for("protocol-violation")
        _assert_it_was_the_servers(guard, program, fault)


def test_a_client_that_reads_late_is_silent(server: Server, guard: GuardProcess, tmp_path: Path) -> None:
    with running([sys.executable, PROGRAMS / "reads_late.py"], guard.tcp, tmp_path) as program:
        _asks_and_waits(server, program)
        program.go_on()
        assert str(program.read()["error"]) == ""
        program.wait()
    guard.assert_no_faults(except_kinds={"unclean-close"})


def test_a_client_that_has_gone_first_is_not_left_by_the_server(guard: GuardProcess) -> None:
    """The server, told to look whether its client is still there, gives up in the middle of a message."""
    packet = startup((3, 0), user="postgres", options="-c client_connection_check_interval=20ms")
    with socket.create_connection((guard.tcp.host, guard.tcp.port), timeout=_SECONDS) as client:
        client.sendall(packet + query("SELECT repeat('x', 10000), generate_series(1, 100000000)"))
        received = 0
        while received < 1_000_000:
            received += len(client.recv(65536))
        client.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):
            while client.recv(65536):
                pass
    guard.wait_for("unclean-close")
    guard.stop()
    assert [fault["kind"] for fault in guard.faults()] == ["unclean-close"]
