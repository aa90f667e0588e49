"""A guard that has as many clients as it has descriptors for: the next ones are told, and nothing else suffers."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from tests.guard_process import running_guard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.guard_process import GuardProcess
    from tests.servers import Server, Transport

DESCRIPTORS = 90
_SECONDS = 40.0

Connection = psycopg.Connection[Any]


def connect(guard: GuardProcess, transport: Transport) -> Connection:
    return psycopg.connect(guard.at(transport).conninfo, autocommit=True, connect_timeout=20)


@contextmanager
def filled(guard: GuardProcess, transport: Transport) -> Iterator[list[Connection]]:
    """Connections for all that the guard has room for."""
    with ExitStack() as stack:
        connections = []
        while True:
            try:
                connection = connect(guard, transport)
            except psycopg.OperationalError:
                break
            connections.append(stack.enter_context(connection))
        assert len(connections) >= 10
        yield connections


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)


@pytest.fixture
def guard(server: Server) -> Iterator[GuardProcess]:
    program = ["prlimit", f"--nofile={DESCRIPTORS}", sys.executable, "-m", "pgguard"]
    with running_guard(server.unix, "--mode", "reject", program=program) as running:
        yield running


def test_clients_are_told_what_to_raise(guard: GuardProcess, transport: Transport) -> None:
    """Every one of many who come at once; who is there goes on, and who leaves makes room."""
    before = guard.descriptors
    refusals: list[psycopg.OperationalError] = []

    def try_to() -> None:
        with pytest.raises(psycopg.OperationalError) as raised:
            connect(guard, transport).close()
        refusals.append(raised.value)

    with filled(guard, transport) as connections:
        crowd = [threading.Thread(target=try_to) for _ in range(60)]
        for one in crowd:
            one.start()
        for connection in connections:
            assert connection.execute("select 1").fetchone() == (1,)
        for one in crowd:
            one.join(_SECONDS)
        assert len(refusals) == len(crowd)
        for refusal in refusals:
            assert "FATAL:  pgguard: too many connections: the limit of 90 open files leaves room for only" in str(
                refusal
            )
            assert "LimitNOFILE=" in str(refusal)
            assert "is running" not in str(refusal)
        connections[0].close()
        until(lambda: can_connect(guard, transport))
    until(lambda: guard.descriptors <= before)
    guard.assert_no_faults()
    assert guard.stderr.count("clients are turned away: ") == 1


def can_connect(guard: GuardProcess, transport: Transport) -> bool:
    try:
        connect(guard, transport).close()
    except psycopg.OperationalError:
        return False
    return True


def test_queries_can_be_cancelled(guard: GuardProcess, transport: Transport) -> None:
    with filled(guard, transport) as connections:
        ended: list[str | None] = []

        def sleep() -> None:
            try:
                connections[0].execute("select pg_sleep(60)")
            except psycopg.errors.QueryCanceled as error:
                ended.append(error.sqlstate)

        sleeper = threading.Thread(target=sleep)
        sleeper.start()
        until(
            lambda: (
                connections[1].execute("select count(*) from pg_stat_activity where wait_event = 'PgSleep'").fetchone()
                == (1,)
            )
        )
        connections[0].cancel_safe()
        sleeper.join(_SECONDS)
        assert ended == ["57014"]


def test_faults_are_recorded_with_their_evidence(guard: GuardProcess, transport: Transport) -> None:
    """And rejected: there are descriptors left to look at processes with, and to cancel what runs."""
    with filled(guard, transport) as connections:
        for connection in connections[:10]:
            plain = socket.socket(fileno=os.dup(connection.fileno()))
            with plain:
                plain.setblocking(True)
                plain.settimeout(_SECONDS)
                plain.sendall(b"p\0\0\0\x05x")
                assert b"08P01" in plain.recv(65536)
        faults = guard.wait_for("protocol-violation", count=1)
        assert faults[0]["action"] == "rejected"
        assert {culprit["pid"] for culprit in faults[0]["culprits"]} == {os.getpid()}
        assert faults[0]["culprits"][0]["process"]["cmdline"]
    guard.stop()
    found = guard.faults("protocol-violation")
    assert len(found) + sum(fault["suppressed"] for fault in found) == 10


def test_who_says_nothing_keeps_nobody_from_being_told(guard: GuardProcess, transport: Transport) -> None:
    with filled(guard, transport), ExitStack() as stack:
        address = guard.at(transport)
        for _ in range(40):
            silent = stack.enter_context(socket.socket(socket.AF_UNIX if transport == "unix" else socket.AF_INET))
            silent.connect(
                f"{address.host}/.s.PGSQL.{address.port}" if transport == "unix" else (address.host, address.port)
            )
        with pytest.raises(psycopg.OperationalError, match="too many connections"):
            connect(guard, transport)


def test_it_says_how_many_there_is_room_for(guard: GuardProcess) -> None:
    assert "pgguard: the limit of 90 open files leaves room for only " in guard.stderr
