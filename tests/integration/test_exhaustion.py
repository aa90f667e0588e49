"""Connections that a server refuses: for which limit, who holds those that count, and what it costs to be refused."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from pgguard.demo.postgres import running_cluster
from tests.guard_process import running_guard
from tests.integration.running import PROGRAMS, every_transport, running
from tests.servers import Address

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.guard_process import Fault, GuardProcess
    from tests.integration.running import Program
    from tests.servers import Server, Transport

unix_alone = pytest.mark.parametrize("transport", ["unix"], indirect=True)
on_one_server = pytest.mark.parametrize("server", ["embedded"], indirect=True, scope="session")
SLOTS = 8
RESERVED = 2
PREPARE = """
CREATE ROLE app LOGIN;
CREATE ROLE replica LOGIN REPLICATION;
CREATE ROLE limited LOGIN CONNECTION LIMIT 3;
CREATE DATABASE small CONNECTION LIMIT 3;
CREATE DATABASE other;
"""


@pytest.fixture(scope="module")
def small(server: Server) -> Iterator[Address]:
    """A server with few slots, and limits of all kinds."""
    settings = {
        "max_connections": str(SLOTS),
        "superuser_reserved_connections": str(RESERVED),
        "wal_level": "replica",
        "max_wal_senders": "1",
    }
    with running_cluster(server.bindir, settings=settings, timeout=60) as cluster:
        with psycopg.connect(cluster.conninfo, autocommit=True) as connection:
            for statement in PREPARE.strip().splitlines():
                connection.execute(statement)
        yield Address(str(cluster.socket_dir), cluster.port)


class Stage:
    """A guard in front of the small server, and programs that hold connections through it."""

    def __init__(self, guard: GuardProcess, address: Address, directory: Path, stack: ExitStack) -> None:
        self.guard = guard
        self.address = address
        self._directory = directory
        self._stack = stack
        self._running: list[Program] = []

    def run(self, *arguments: str) -> tuple[Program, dict[str, Any]]:
        name = str(len(self._running))
        command: list[str | Path] = [sys.executable, PROGRAMS / "connections.py", *arguments]
        program = self._stack.enter_context(running(command, self.address, self._directory, name))
        self._running.append(program)
        return program, program.read()

    def keep(self, count: int, how: str = "idle", **where: str) -> int:
        """Have another process hold that many connections; returns its pid."""
        _, said = self.run(str(count), how, *(f"{key}={value}" for key, value in where.items()))
        return int(said["pid"])

    def end(self) -> None:
        """Have all programs close what they hold."""
        for program in self._running:
            program.go_on()
            assert program.wait() == 0, program.log

    def refused(self, **where: str) -> Fault:
        """Be refused a connection; returns what is recorded of that, which is all that is recorded."""
        conninfo = psycopg.conninfo.make_conninfo(self.address.conninfo, **where)
        with pytest.raises(psycopg.OperationalError, match=r"too many|reserved|exceeds"):
            psycopg.connect(conninfo).close()
        [fault] = self.guard.wait_for("connection-exhaustion")
        assert [one["kind"] for one in self.guard.faults()] == ["connection-exhaustion"]
        return fault


@contextmanager
def staged(upstream: Address, transport: Transport, directory: Path) -> Iterator[Stage]:
    with running_guard(upstream, probe=transport != "sampled") as guard, ExitStack() as stack:
        yield Stage(guard, guard.at(transport), directory, stack)


@pytest.fixture
def stage(small: Address, transport: Transport, tmp_path: Path) -> Iterator[Stage]:
    with psycopg.connect(small.conninfo, autocommit=True) as connection:
        others = (
            "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' OR backend_type = 'walsender'"
        )
        deadline = time.monotonic() + 30
        while connection.execute(others).fetchall() != [(1,)]:
            assert time.monotonic() < deadline, "the test before has left connections"
            time.sleep(0.02)
    with staged(small, transport, tmp_path) as stage:
        yield stage


def held(fault: Fault) -> dict[int | None, int]:
    return {entry["pid"]: entry["count"] for entry in fault["connections"]}


def holders(fault: Fault) -> list[int]:
    return [culprit["pid"] for culprit in fault["culprits"] if culprit["role"] == "holder"]


def assert_names(fault: Fault, limit: str, *counts: tuple[int, int]) -> None:
    """A fault says which limit it was, and who holds how many that count, the most first."""
    assert fault["severity"] == "error"
    assert fault["limit"] == limit
    assert held(fault) == dict(counts)
    assert holders(fault) == [pid for pid, _ in counts]
    assert all(culprit["process"] for culprit in fault["culprits"])
    for pid, count in counts:
        assert f"pid {pid} (python" in fault["summary"]
        assert f"has {count}" in fault["summary"]


@on_one_server
@every_transport
def test_all_slots(stage: Stage) -> None:
    many, few = stage.keep(5, user="app"), stage.keep(SLOTS - 5)
    fault = stage.refused()
    assert_names(fault, "server", (many, 5), (few, SLOTS - 5))
    assert "all its slots are taken (max_connections)" in fault["summary"]
    assert f"all {SLOTS} sat idle" in fault["summary"]
    evidence = {culprit["evidence"] for culprit in fault["culprits"] if culprit["role"] == "holder"}
    assert evidence == {"sole-holder"}


@unix_alone
def test_reserved_slots(stage: Stage) -> None:
    pid = stage.keep(SLOTS - RESERVED, user="app")
    fault = stage.refused(user="app")
    assert_names(fault, "reserved", (pid, SLOTS - RESERVED))
    assert "except reserved ones" in fault["summary"]
    assert "superuser_reserved_connections" in fault["advice"]["text"]


@unix_alone
def test_a_roles_limit_counts_this_roles_connections_alone(stage: Stage) -> None:
    stage.keep(2, user="app")
    one, two = stage.keep(2, user="limited"), stage.keep(1, user="limited", dbname="other")
    fault = stage.refused(user="limited")
    assert_names(fault, "role", (one, 2), (two, 1))
    assert 'role "limited" has as many connections as its CONNECTION LIMIT allows' in fault["summary"]
    assert "ALTER ROLE" in fault["advice"]["text"]


@unix_alone
def test_a_databases_limit_counts_this_databases_connections_alone(stage: Stage) -> None:
    stage.keep(2, user="app")
    one, two = stage.keep(2, user="app", dbname="small"), stage.keep(1, user="limited", dbname="small")
    fault = stage.refused(user="app", dbname="small")
    assert_names(fault, "database", (one, 2), (two, 1))
    assert 'database "small" has as many connections as its CONNECTION LIMIT allows' in fault["summary"]
    assert "ALTER DATABASE" in fault["advice"]["text"]


@unix_alone
def test_replication_connections(stage: Stage) -> None:
    stage.keep(2, user="app")
    pid = stage.keep(1, user="replica", replication="database", dbname="postgres")
    fault = stage.refused(user="replica", replication="true")
    assert_names(fault, "wal-senders", (pid, 1))
    assert "max_wal_senders" in fault["advice"]["text"]


@on_one_server
@unix_alone
def test_transactions_that_sit_idle_are_what_is_to_be_ended(stage: Stage) -> None:
    stuck, idle = stage.keep(5, "transaction", user="app"), stage.keep(SLOTS - 5)
    fault = stage.refused()
    assert_names(fault, "server", (stuck, 5), (idle, SLOTS - 5))
    assert f"5 of the {SLOTS} sat idle in a transaction" in fault["summary"]
    assert [entry["idle_in_transaction"] for entry in fault["connections"]] == [5, 0]
    assert [entry["idle"] for entry in fault["connections"]] == [0, SLOTS - 5]
    assert "sat idle in a transaction" in fault["advice"]["text"]
    assert "autocommit" in fault["advice"]["text"]


@on_one_server
@unix_alone
def test_a_server_that_is_not_full_refuses_nobody(stage: Stage) -> None:
    stage.keep(RESERVED, user="limited")
    stage.keep(SLOTS - RESERVED - 1 - RESERVED, user="app")
    psycopg.connect(psycopg.conninfo.make_conninfo(stage.address.conninfo, user="app")).close()
    stage.end()
    stage.guard.assert_no_faults()


@on_one_server
@unix_alone
def test_refused_again_and_again_is_counted_and_looked_into_once(stage: Stage) -> None:
    pid = stage.keep(SLOTS)
    _, said = stage.run("100", "retry")
    stage.end()
    assert said["refused"] == 100
    faults = stage.guard.wait_for("connection-exhaustion")
    first, *repeats = faults
    assert_names(first, "server", (pid, SLOTS))
    stage.guard.stop()
    repeats = stage.guard.faults("connection-exhaustion")[1:]
    assert {repeat["repeat_of"] for repeat in repeats} == {first["id"]}
    assert 1 + sum(1 + repeat["suppressed"] for repeat in repeats) == 100
    assert len(repeats) < 50
    for repeat in repeats:
        assert repeat["session"]["id"] != first["session"]["id"]
        assert {culprit["role"] for culprit in repeat["culprits"]} <= {"owner", "requester"}
        assert repeat["connections"] is None
