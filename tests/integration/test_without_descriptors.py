"""With its descriptors used up, a guard can hardly look at anybody; what it has seen it records, and acts on."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import struct
import subprocess
from typing import TYPE_CHECKING

import psycopg
import pytest

from tests.guard_process import running_guard
from tests.servers import installations, not_installed, running_server

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.guard_process import GuardProcess
    from tests.servers import Server, Transport

SESSIONS = 10
BODY = b"select 1\0"
REQUEST = b"Q" + struct.pack("!I", len(BODY) + 4) + BODY
TERMINATE = b"X" + struct.pack("!I", 4)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Any one will do."""
    bindir = next((bindir for bindir in installations().values() if bindir is not None), None)
    if bindir is None:
        not_installed("PostgreSQL")
    with running_server(bindir) as running:
        yield running


@contextlib.contextmanager
def sessions(guard: GuardProcess, transport: Transport) -> Iterator[list[psycopg.Connection]]:
    """Some sessions of which the guard knows who has opened them."""
    with contextlib.ExitStack() as stack:
        connections = []
        for _ in range(2 * SESSIONS + 1):
            connection = psycopg.connect(guard.at(transport).conninfo, autocommit=True)
            stack.callback(connection.close)
            connections.append(connection)
        # It finds that out in the order in which they come, and has for the last when it tells of its heir.
        last = connections.pop()
        with subprocess.Popen(["sleep", "60"], pass_fds=[last.fileno()]) as heir:
            stack.callback(heir.wait)
            stack.callback(heir.kill)
            guard.wait_for("inherited-connection")
            heir.kill()
        yield connections


def use_up(guard: GuardProcess) -> None:
    """Let a guard open nothing any more: whatever it has open is beyond its limit."""
    resource.prlimit(guard.pid, resource.RLIMIT_NOFILE, (3, 3))


def in_child(connection: psycopg.Connection, data: bytes) -> None:
    """Have a forked child send on a connection."""
    pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException):
            socket.socket(fileno=connection.fileno()).sendall(data)
        os._exit(0)
    os.waitpid(pid, 0)


def overlap(connection: psycopg.Connection) -> None:
    """Let a child send while its parent waits for an answer."""
    connection.pgconn.send_query(b"select pg_sleep(0.2)")
    in_child(connection, REQUEST)


def end(connection: psycopg.Connection) -> None:
    """Let a child say goodbye on its parent's connection."""
    in_child(connection, TERMINATE)
    with contextlib.suppress(psycopg.OperationalError):
        connection.pgconn.send_query(b"select 2")


def is_rejected(connection: psycopg.Connection) -> bool:
    """Whether the first that the parent hears is that its session is over."""
    result = connection.pgconn.get_result()
    return result is not None and result.error_field(psycopg.pq.DiagnosticField.SQLSTATE) == b"08P01"


@pytest.mark.parametrize("transport", ["unix", "probed"])
@pytest.mark.parametrize("mode", ["log", "reject"])
def test_every_fault_is_recorded_and_acted_on(server: Server, transport: Transport, mode: str) -> None:
    with running_guard(server.unix, "--mode", mode) as guard:
        if transport == "probed" and "here: kernel senders on TCP" in guard.stderr:
            pytest.skip("the kernel doesn't say who sends on TCP")
        rejected = []
        with sessions(guard, transport) as connections:
            use_up(guard)
            for n, connection in enumerate(connections):
                (overlap if n < SESSIONS else end)(connection)
                rejected.append(is_rejected(connection))
        assert rejected == [mode == "reject"] * 2 * SESSIONS
        guard.stop(failures=True)
        for kind in "shared-by-processes", "foreign-terminate":
            faults = guard.faults(kind)
            assert sum(1 + fault["suppressed"] for fault in faults) >= SESSIONS, kind
            assert {fault["action"] for fault in faults} == {"rejected" if mode == "reject" else "logged"}
