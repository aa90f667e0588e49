"""Which driver speaks on a connection, told of real ones; and what is an error with one is a warning with another."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pgguard.attribution.drivers import driver_of, tell_driver
from pgguard.attribution.evidence import Driver
from pgguard.attribution.runtime import Library, Runtime, runtime_of
from pgguard.wire.startup import RECEIVE_BUFFER, PacketKind, StartupPacket, parse_startup
from tests.integration.running import PROGRAMS, interpreter, named, running
from tests.languages import go_program, node_directory
from tests.servers import Address, not_installed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.guard_process import GuardProcess
    from tests.servers import Transport

_SECONDS = 30
_PGJDBC = Path("/usr/share/java/postgresql.jar")

_PYTHON = {
    "psycopg": "import psycopg; psycopg.connect()",
    "psycopg2": "import psycopg2; psycopg2.connect('')",
    "psycopg beside asyncpg": "import asyncpg, psycopg; psycopg.connect()",
    "asyncpg": "import asyncio, asyncpg; asyncio.run(asyncpg.connect(ssl=False))",
    "asyncpg beside psycopg": "import asyncio, asyncpg, psycopg; asyncio.run(asyncpg.connect(ssl=False))",
    "pg8000": (
        "import os, pg8000.dbapi as it\n"
        "it.connect(os.environ['PGUSER'], os.environ['PGHOST'], os.environ['PGDATABASE'], os.environ['PGPORT'],"
        " application_name='x')"
    ),
}


def _python(which: str) -> list[str | Path]:
    return [sys.executable, "-c", _PYTHON[which]]


def _node(script: str) -> list[str | Path]:
    directory = node_directory()
    return ["sh", "-c", 'cd "$0" && exec node -e "$1"', directory, script]


def _java(tmp_path: Path) -> list[str | Path]:
    if shutil.which("java") is None or not _PGJDBC.exists():
        not_installed("Java with libpostgresql-jdbc-java")
    source = tmp_path / "Connect.java"
    source.write_text(
        "class Connect { public static void main(String[] a) throws Exception {"
        ' java.sql.DriverManager.getConnection("jdbc:postgresql://" + System.getenv("PGHOST") + ":"'
        ' + System.getenv("PGPORT") + "/d?user=u"); } }'
    )
    return ["java", "-cp", _PGJDBC, source]


def _command(which: str, tmp_path: Path) -> Sequence[str | Path]:
    match which:
        case "psql":
            return [shutil.which("psql") or not_installed("psql"), "-c", "SELECT 1"]
        case "ruby-pg":
            return [interpreter("ruby", "-rpg"), "-rpg", "-e", "PG.connect"]
        case "DBD::Pg":
            return [interpreter("perl", "-MDBD::Pg"), "-MDBI", "-e", "DBI->connect('dbi:Pg:')"]
        case "node-postgres":
            return _node("new (require('pg').Client)({application_name: 'x', statement_timeout: 5}).connect()")
        case "node-postgres as it comes":
            return _node("new (require('pg').Client)().connect()")
        case "postgres.js":
            return _node("require('postgres')()`SELECT 1`.execute()")
        case "postgres.js by another name":
            return _node("require('postgres')({connection: {application_name: 'x'}})`SELECT 1`.execute()")
        case "lib/pq":
            return [go_program(PROGRAMS / "go", tmp_path)]
        case "pgjdbc":
            return _java(tmp_path)
        case _:
            return _python(which)


@contextmanager
def _connecting(command: Sequence[str | Path]) -> Iterator[tuple[int, StartupPacket]]:
    """Run a program up to its StartupMessage; gives its pid and that."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(_SECONDS)
        address = Address(*listener.getsockname())
        process = subprocess.Popen(command, env=address.environ(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        with process:
            try:
                connection, _ = listener.accept()
                with connection:
                    connection.settimeout(_SECONDS)
                    yield process.pid, _startup(connection)
            finally:
                process.kill()


def _startup(connection: socket.socket) -> StartupPacket:
    while True:
        data = b""
        while (packet := parse_startup(data)) is None:
            more = connection.recv(RECEIVE_BUFFER)
            assert more, f"it ended behind {data!r}"
            data += more
        if packet.kind is PacketKind.STARTUP_MESSAGE:
            return packet
        connection.sendall(b"N")


REAL = {
    "psql": Driver.LIBPQ,
    "psycopg": Driver.LIBPQ,
    "psycopg2": Driver.LIBPQ,
    "psycopg beside asyncpg": Driver.LIBPQ,
    "ruby-pg": Driver.LIBPQ,
    "DBD::Pg": Driver.LIBPQ,
    "asyncpg": Driver.ASYNCPG,
    "asyncpg beside psycopg": Driver.ASYNCPG,
    "pg8000": Driver.PYTHON,
    "node-postgres": Driver.NODE_POSTGRES,
    "node-postgres as it comes": Driver.NODE_POSTGRES,
    "postgres.js": Driver.POSTGRES_JS,
    "postgres.js by another name": Driver.POSTGRES_JS,
    "lib/pq": Driver.LIB_PQ,
    "pgjdbc": Driver.PGJDBC,
}
TELL_WITHOUT_THE_PROCESS = {"asyncpg", "asyncpg beside psycopg", "postgres.js", "lib/pq", "pgjdbc"}


@pytest.mark.parametrize("which", REAL)
def test_a_real_driver_is_told_by_what_it_runs_and_says(which: str, tmp_path: Path) -> None:
    with _connecting(_command(which, tmp_path)) as (pid, packet):
        runtime = runtime_of(pid)
        assert tell_driver(driver_of(pid), runtime, packet.parameters) is REAL[which], packet
    if which == "lib/pq":
        assert Library.LIB_PQ in runtime.libraries
    if "postgres" in which:
        assert {Library.NODE_POSTGRES, Library.POSTGRES_JS} <= runtime.libraries


@pytest.mark.parametrize("which", REAL)
def test_on_another_host_a_driver_is_told_only_by_what_no_other_says(which: str, tmp_path: Path) -> None:
    with _connecting(_command(which, tmp_path)) as (_, packet):
        told = tell_driver(Driver.UNKNOWN, Runtime(), packet.parameters)
    assert told is (REAL[which] if which in TELL_WITHOUT_THE_PROCESS else Driver.UNKNOWN)


RELAYED = ["node-postgres", "postgres.js", "lib/pq", "pgjdbc"]


@pytest.mark.parametrize("which", RELAYED)
def test_a_relay_that_has_libpq_is_not_taken_for_what_speaks_through_it(which: str, tmp_path: Path) -> None:
    """As a guard in front of a guard: it has libpq loaded, and passes on what postgres.js may pipeline."""
    with _connecting(_command(which, tmp_path)) as (_, packet):
        told = tell_driver(Driver.LIBPQ, Runtime(), packet.parameters)
    assert told is (REAL[which] if which in TELL_WITHOUT_THE_PROCESS else Driver.UNKNOWN)


# What it is good for


@pytest.mark.parametrize("server", ["embedded"], indirect=True, scope="session")
class TestGo:
    def test_lib_pq_that_asks_before_it_has_read_the_answer_is_in_error(
        self, guard: GuardProcess, transport: Transport, tmp_path: Path
    ) -> None:
        """Its goroutine may have moved to another thread meanwhile, so no thread is accused."""
        program = go_program(PROGRAMS / "go", tmp_path)
        with running([program, "within"], guard.at(transport), tmp_path) as started:
            [fault] = guard.wait_for("request-while-busy", timeout=_SECONDS)
            assert started.wait() == 0
        assert fault["severity"] == "error"
        assert named([fault]) == {started.pid}
        assert guard.faults("shared-by-threads") == []

    def test_lib_pq_that_reads_the_answer_first_is_left_alone(
        self, guard: GuardProcess, transport: Transport, tmp_path: Path
    ) -> None:
        program = go_program(PROGRAMS / "go", tmp_path)
        with running([program], guard.at(transport), tmp_path) as started:
            assert started.wait() == 0
        guard.assert_no_faults()
