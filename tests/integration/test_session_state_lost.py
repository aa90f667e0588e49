"""A pooler behind the guard swaps the server's sessions: what a client has prepared is gone, or another's is there."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg
import psycopg
import pytest

from pgguard.session.quiet import KNOWN
from tests.guard_process import GuardProcess, running_guard
from tests.servers import Address, not_installed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.servers import Server

pytestmark = pytest.mark.parametrize("server", ["embedded"], indirect=True, scope="session")

KIND = "session-state-lost"
_SECONDS = 40.0


@contextmanager
def pgbouncer(server: Server, **settings: str) -> Iterator[Address]:
    """Run pgbouncer in front of a server, in transaction mode; it refuses to run as root."""
    program = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
    if program is None:
        not_installed("pgbouncer")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = Address("127.0.0.1", probe.getsockname()[1])
    lines = {
        "listen_addr": address.host,
        "listen_port": str(address.port),
        "unix_socket_dir": "",
        "auth_type": "any",
        "pool_mode": "transaction",
        "default_pool_size": "1",
        "ignore_startup_parameters": "extra_float_digits",
        **settings,
    }
    with tempfile.TemporaryDirectory(prefix="pgguard-test-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        configuration = directory / "pgbouncer.ini"
        configuration.write_text(
            f"[databases]\n* = host={server.tcp.host} port={server.tcp.port} user=postgres\n[pgbouncer]\n"
            + "".join(f"{key} = {value}\n" for key, value in lines.items())
        )
        command = [program, "-q", str(configuration)]
        if os.geteuid() == 0:
            command = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", *command]
        with (directory / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
            try:
                _wait_for(address, process, directory / "log")
                yield address
            finally:
                process.kill()


def _wait_for(address: Address, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _SECONDS
    while True:
        try:
            psycopg.connect(address.conninfo).close()
        except psycopg.OperationalError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        else:
            return


@contextmanager
def guarded(server: Server, **settings: str) -> Iterator[GuardProcess]:
    """A guard in front of a pgbouncer."""
    with pgbouncer(server, **settings) as pooler, running_guard(pooler, "--mode", "reject") as guard:
        yield guard


def connect(guard: GuardProcess, *, threshold: int | None = 0) -> psycopg.Connection:
    return psycopg.connect(guard.unix.conninfo, autocommit=True, prepare_threshold=threshold)


def ask(connection: psycopg.Connection) -> None:
    assert connection.execute("SELECT %s::int", (1,)).fetchone() == (1,)


def test_a_statement_that_another_client_has_made(server: Server) -> None:
    """Both call theirs _pg3_0, and have one server session in turn."""
    with guarded(server) as guard, closing(connect(guard)) as first, closing(connect(guard)) as second:
        ask(first)
        with pytest.raises(psycopg.errors.DuplicatePreparedStatement) as raised:
            ask(second)
        [fault] = guard.wait_for(KIND)
        assert (fault["severity"], fault["action"]) == ("warning", "logged")
        assert fault["libpq"] in str(raised.value)
        assert 'prepared statement "_pg3_0" already exists, but this session never made it' in fault["summary"]
        assert (fault["message"]["direction"], fault["message"]["name"]) == ("backend", "ErrorResponse")
        assert "max_prepared_statements" in fault["advice"]["text"]
        ask(first)
        assert len(guard.faults()) == 1


def test_a_statement_that_is_gone(server: Server) -> None:
    """The other client's transaction has the server session that it was made in."""
    with (
        guarded(server, default_pool_size="2") as guard,
        closing(connect(guard)) as first,
        closing(connect(guard)) as second,
    ):
        ask(first)
        second.pgconn.exec_(b"BEGIN")
        with pytest.raises(psycopg.errors.InvalidSqlStatementName):
            ask(first)
        [fault] = guard.wait_for(KIND)
        assert 'prepared statement "_pg3_0" does not exist' in fault["libpq"]
        assert "but this session made it and has not closed it" in fault["summary"]
        assert len(guard.faults()) == 1


def test_asyncpg(server: Server) -> None:
    async def run(guard: GuardProcess) -> None:
        url = f"postgresql://postgres@127.0.0.1:{guard.tcp.port}/postgres"
        first, second = await asyncpg.connect(url), await asyncpg.connect(url)
        try:
            assert await first.fetchval("SELECT $1::int", 1) == 1
            await second.execute("BEGIN")
            with pytest.raises(asyncpg.InvalidSQLStatementNameError):
                await first.fetchval("SELECT $1::int", 1)
        finally:
            first.terminate()
            second.terminate()

    with guarded(server, default_pool_size="2") as guard:
        asyncio.run(run(guard))
        [fault] = guard.wait_for(KIND)
        assert 'prepared statement "__asyncpg_stmt_' in fault["libpq"]


@pytest.mark.parametrize(("mode", "threshold"), [("session", 0), ("transaction", None)])
def test_a_pooler_that_keeps_sessions_and_a_client_that_prepares_nothing_are_silent(
    server: Server, mode: str, threshold: int | None
) -> None:
    with (
        guarded(server, default_pool_size="2", pool_mode=mode) as guard,
        closing(connect(guard, threshold=threshold)) as first,
        closing(connect(guard, threshold=threshold)) as second,
    ):
        ask(first)
        ask(second)
        with second.transaction():
            ask(first)
            ask(second)
    guard.assert_no_faults()


@pytest.mark.parametrize("drops", [
    "DISCARD ALL",
    "DEALLOCATE ALL",
    'DEALLOCATE "own"',
    "DO $$ BEGIN EXECUTE 'DEALLOCATE ALL'; END $$",
    "SELECT drops_all()",
    "SELECT 1 /* " + "x" * 2000 + " */; DISCARD PLANS; DEALLOCATE ALL",
])  # fmt: skip
def test_a_client_that_drops_its_statements_by_sql_is_silent(server: Server, drops: str) -> None:
    """And asks for them all the same: that is its own mistake."""
    with psycopg.connect(server.unix.conninfo, autocommit=True) as elsewhere:
        elsewhere.execute(
            "CREATE OR REPLACE FUNCTION drops_all() RETURNS void LANGUAGE plpgsql "
            "AS $$ BEGIN EXECUTE 'DEALLOCATE ALL'; END $$"
        )
    with running_guard(server.unix) as guard, closing(connect(guard)) as connection:
        libpq = connection.pgconn
        assert libpq.prepare(b"own", b"SELECT 1").status == psycopg.pq.ExecStatus.COMMAND_OK
        assert libpq.exec_(drops.encode()).status != psycopg.pq.ExecStatus.FATAL_ERROR
        result = libpq.exec_prepared(b"own", [])
        assert result.error_field(psycopg.pq.DiagnosticField.SQLSTATE) == b"26000"
        libpq.exec_(b"PREPARE other AS SELECT 1")
        result = libpq.prepare(b"other", b"SELECT 1")
        assert result.error_field(psycopg.pq.DiagnosticField.SQLSTATE) == b"42P05"
        for text in (b"EXECUTE nothing", b"DEALLOCATE nothing"):
            assert libpq.exec_(text).error_field(psycopg.pq.DiagnosticField.SQLSTATE) == b"26000"
        libpq.reset()
        result = libpq.exec_prepared(b"own", [])
        assert result.error_field(psycopg.pq.DiagnosticField.SQLSTATE) == b"26000"
        assert libpq.prepare(b"own", b"SELECT 1").status == psycopg.pq.ExecStatus.COMMAND_OK
    guard.assert_no_faults()


def test_what_is_taken_for_postgresqls_own_is(server: Server) -> None:
    """Whoever calls a function that isn't may call one that drops statements."""
    with psycopg.connect(server.unix.conninfo) as connection:
        own = connection.execute(
            "SELECT proname FROM pg_proc WHERE pronamespace = 'pg_catalog'::regnamespace "
            "UNION SELECT typname FROM pg_type WHERE typnamespace = 'pg_catalog'::regnamespace "
            "UNION SELECT word FROM pg_get_keywords()"
        ).fetchall()
    assert {name.encode() for (name,) in own} >= KNOWN
