"""A rejection reaches the human: what each driver shows of it, in every state that it may be found in."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from tests.guard_process import UNLIMITED, running_guard
from tests.integration.intruder import Intruder, require_intruders
from tests.integration.running import PROGRAMS, Program, interpreter, running
from tests.languages import go_program, node_directory
from tests.servers import not_installed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.guard_process import Fault, GuardProcess
    from tests.servers import Server

pytestmark = pytest.mark.parametrize("server", ["embedded"], indirect=True, scope="session")

_REJECTED = PROGRAMS / "rejected"
_PGJDBC = Path("/usr/share/java/postgresql.jar")
_SECONDS = 40.0

OUT_OF_PLACE = b"p\0\0\0\x09evil\0"
"""An intruder's password, when nobody has asked for one."""
HALF_A_HEADER = b"p\0"
"""With the program's own request behind it no message at all: it is that request which is rejected."""

STATES = ("query", "extended", "rows", "copy", "idle", "transaction", "torn")
"""In a simple query, an extended one, in the middle of rows and of a COPY FROM STDIN; between two requests, within a
transaction and without; and as it sends a request itself."""
_WITHOUT_COPY = tuple(state for state in STATES if state != "copy")
_BUSY = {"query": "pg_sleep(60)", "extended": "pg_sleep(60)", "rows": "rows_sent"}


@dataclass(frozen=True)
class Shown:
    """What a driver shows of a rejection, which is everything unless something else is said."""

    error: str
    """Its class."""
    states: tuple[str, ...] = STATES
    in_text: bool = False
    """Detail and hint are in the error's text, and have no place of their own."""
    unseen: tuple[str, ...] = ()
    """The states in which it shows nothing, unless it asks for something before it has read what it is sent."""


EVERYTHING = {
    "psycopg": Shown("ProtocolViolation"),
    "psycopg2": Shown("ProtocolViolation", ("query", "rows", "copy", "idle", "transaction", "torn")),
    "pg8000": Shown("DatabaseError", _WITHOUT_COPY),
    # It reads what comes while it is idle, and throws it away: all that it knows later is that it is closed.
    "asyncpg": Shown("ProtocolViolationError", unseen=("idle", "transaction")),
    "ruby-pg": Shown("PG::ProtocolViolation"),
    "DBD::Pg": Shown("die", in_text=True),
    "PDO": Shown("PDOException", _WITHOUT_COPY, in_text=True),
    # While it is idle, it raises the event "error".
    "node-postgres": Shown("DatabaseError", _WITHOUT_COPY),
    # While it is idle, it connects anew.
    "postgres.js": Shown(
        "PostgresError", tuple(s for s in STATES if s not in ("transaction", "copy")), unseen=("idle",)
    ),
    "pgjdbc": Shown("PSQLException"),
    # It keeps nothing of a FATAL that answers its Parse or Bind: errRecover() in its error.go.
    "lib/pq": Shown("*pq.Error", _WITHOUT_COPY, unseen=("extended",)),
}


def command(driver: str, directory: Path) -> list[str | Path]:
    match driver:
        case "ruby-pg":
            return [interpreter("ruby", "-rpg"), _REJECTED / "ruby.rb"]
        case "DBD::Pg":
            return [interpreter("perl", "-MDBD::Pg"), _REJECTED / "perl.pl"]
        case "PDO":
            php = shutil.which("php") or not_installed("php-cli")
            if b"pdo_pgsql" not in subprocess.run([php, "-m"], capture_output=True, check=True).stdout:
                not_installed("php-pgsql")
            return [php, _REJECTED / "php.php"]
        case "node-postgres" | "postgres.js":
            script = shutil.copy(_REJECTED / "node.js", node_directory() / "rejected.js")
            return ["node", script, {"node-postgres": "pg"}.get(driver, driver)]
        case "pgjdbc":
            if shutil.which("java") is None or not _PGJDBC.exists():
                not_installed("Java with libpostgresql-jdbc-java")
            return ["java", "-cp", _PGJDBC, _REJECTED / "Rejected.java"]
        case "lib/pq":
            return [go_program(_REJECTED / "go", directory)]
        case _:
            return [sys.executable, _REJECTED / "python.py", driver]


@pytest.fixture(scope="module")
def rejecting(server: Server) -> Iterator[GuardProcess]:
    require_intruders()
    # Of who intrudes, which is the tests' own process, it isn't known each time all that it runs, and so what it needs.
    with running_guard(server.unix, "--mode", "reject", program=UNLIMITED) as guard:
        yield guard


@pytest.fixture
def watched(server: Server) -> Iterator[psycopg.Connection]:
    """The server itself, to see what runs there; with what the programs use."""
    with psycopg.connect(server.unix.conninfo, autocommit=True) as connection:
        connection.execute("CREATE TABLE copied (n int)")
        connection.execute("CREATE SEQUENCE rows_sent")
        yield connection
        for pid in running_queries(connection, "pg_sleep"):  # of a test that has failed
            connection.execute("SELECT pg_terminate_backend(%s, 10000)", (pid,))
        connection.execute("DROP TABLE copied")
        connection.execute("DROP SEQUENCE rows_sent")


def running_queries(watched: psycopg.Connection, text: str) -> list[int]:
    active = "SELECT pid FROM pg_stat_activity WHERE state = 'active' AND query LIKE %s AND pid <> pg_backend_pid()"
    return [pid for (pid,) in watched.execute(active, (f"%{text}%",)).fetchall()]


def backends(watched: psycopg.Connection) -> set[int]:
    """The processes of the server that serve other sessions."""
    others = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
    return {pid for (pid,) in watched.execute(others).fetchall()}


def until(condition: Any) -> None:
    deadline = time.monotonic() + _SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def rejected(guard: GuardProcess) -> list[Fault]:
    return [fault for fault in guard.faults() if fault["action"] == "rejected"]


def be_rejected(
    program: Program, state: str, guard: GuardProcess, intruder: Intruder, watched: psycopg.Connection
) -> tuple[Any, Fault]:
    """Have a program rejected that is about to be in a state; gives what it has to say, and the fault."""
    before = len(rejected(guard))
    assert program.read() == {"state": state}, program.log
    if busy := _BUSY.get(state):
        until(lambda: running_queries(watched, busy))
    if state == "rows":
        sent = "SELECT last_value FROM rows_sent"
        until(lambda: (watched.execute(sent).fetchone() or (0,))[0] > 20)
    serving = backends(watched)
    assert serving
    intruder.send(HALF_A_HEADER if state == "torn" else OUT_OF_PLACE)
    if state not in {"torn", *_BUSY}:
        # The record of a cause that is known may come a second later, when nobody waits for the client any more.
        until(lambda: not serving & backends(watched))
    if state not in _BUSY:
        program.go_on()
    said = program.read()
    until(lambda: len(rejected(guard)) > before)  # of a cause that is known, in a second at most
    [fault] = rejected(guard)[before:]
    # What ran on the server has been cancelled, and both connections are closed.
    until(lambda: fault["session"]["backend_pid"] not in backends(watched))
    return said, fault


def assert_refers_to(guard: GuardProcess, fault: Fault, text: str) -> None:
    """What a client is told names the fault's own record, or if that was to come later, the first one of its cause."""
    [number] = set(re.findall(r"\(pgguard fault (\d+)\)", text))
    assert int(number) in {fault["id"], guard.first_of_cause(fault)["id"]}


@pytest.mark.parametrize("driver", EVERYTHING)
def test_a_driver_shows_what_happened_who_did_it_and_what_to_change(
    driver: str, rejecting: GuardProcess, watched: psycopg.Connection, tmp_path: Path
) -> None:
    expected = EVERYTHING[driver]
    program_and_states = [*command(driver, tmp_path), *expected.states]
    with running(program_and_states, rejecting.tcp, tmp_path) as program:
        intruder = Intruder(program.pid, rejecting.tcp)
        for state in expected.states:
            said, fault = be_rejected(program, state, rejecting, intruder, watched)
            if state in expected.unseen:
                continue
            if any(fault["summary"] in event for event in said.get("events", [])):
                continue
            assert said["class"] == expected.error, said
            assert said["sqlstate"] == "08P01", str(said)
            assert fault["summary"] in said["text"]
            assert_refers_to(rejecting, fault, said["text" if expected.in_text else "detail"])
            advice = rejecting.first_of_cause(fault)["advice"]
            assert advice["title"] in said["text" if expected.in_text else "hint"]
            # The connection is closed, and nobody hangs who tries to use it.
            if driver != "postgres.js":
                assert None not in said["again"]
                assert "pgguard" not in said["again"][-1]
        assert program.wait() == 0, program.log


@pytest.mark.parametrize("program", ["psql", "pgbench"])
def test_the_servers_own_programs_show_it(
    program: str, server: Server, rejecting: GuardProcess, watched: psycopg.Connection, tmp_path: Path
) -> None:
    script = tmp_path / "script.sql"
    script.write_text("SELECT pg_sleep(60);\n")
    options = {"psql": ["-X", "-v", "VERBOSITY=verbose"], "pgbench": ["-n", "-t", "1"]}[program]
    with running([server.bindir / program, *options, "-f", script], rejecting.tcp, tmp_path) as started:
        before = len(rejected(rejecting))
        until(lambda: running_queries(watched, "pg_sleep(60)"))
        Intruder(started.pid, rejecting.tcp).send(OUT_OF_PLACE)
        started.wait()
    until(lambda: len(rejected(rejecting)) > before)
    [fault] = rejected(rejecting)[before:]
    assert fault["summary"] in started.log
    assert_refers_to(rejecting, fault, started.log)
    assert rejecting.first_of_cause(fault)["advice"]["title"] in started.log
    assert program == "pgbench" or "08P01" in started.log


def test_a_rejection_that_nothing_is_known_about_is_shown_all_the_same(
    server: Server, watched: psycopg.Connection, tmp_path: Path
) -> None:
    require_intruders()
    with running_guard(server.unix, "--mode", "reject", "--attribution", "off") as guard:
        states = EVERYTHING["psycopg2"].states
        with running([*command("psycopg2", tmp_path), *states], guard.tcp, tmp_path) as program:
            intruder = Intruder(program.pid, guard.tcp)
            for state in states:
                said, fault = be_rejected(program, state, guard, intruder, watched)
                assert [culprit for culprit in fault["culprits"] if culprit["pid"] is not None] == []
                assert (said["class"], said["sqlstate"]) == ("ProtocolViolation", "08P01")
                assert fault["summary"] in said["text"]
            assert program.wait() == 0, program.log


POOLS = [
    "psycopg_pool",
    "asyncpg's pool",
    "SQLAlchemy, psycopg",
    "SQLAlchemy, psycopg2",
    "SQLAlchemy, asyncpg",
    "SQLAlchemy, pg8000",
    "Sequel",
    "pg-pool",
]
AT_ONCE = {"psycopg_pool", "asyncpg's pool", "SQLAlchemy, psycopg2"}
"""Pools that discard the connection as it is given back; others find out when they hand it out once more."""


def pool_command(pool: str) -> list[str | Path]:
    match pool:
        case "Sequel":
            return [interpreter("ruby", "-rpg", "-rsequel"), _REJECTED / "sequel.rb"]
        case "pg-pool":
            script = shutil.copy(_REJECTED / "pg_pool.js", node_directory() / "pg_pool.js")
            return ["node", script]
        case _:
            return [sys.executable, _REJECTED / "pools.py", pool]


@pytest.mark.parametrize("pool", POOLS)
def test_a_pool_shows_it_and_lets_the_connection_go(
    pool: str, rejecting: GuardProcess, watched: psycopg.Connection, tmp_path: Path
) -> None:
    with running(pool_command(pool), rejecting.tcp, tmp_path) as program:
        said, fault = be_rejected(program, "query", rejecting, Intruder(program.pid, rejecting.tcp), watched)
        assert program.wait() == 0, program.log
    assert fault["summary"] in said["text"]
    # In the end it does; and as long as the connection is there, it goes on to say why.
    assert len(said["afterwards"]) < (1 if pool in AT_ONCE else 100)
