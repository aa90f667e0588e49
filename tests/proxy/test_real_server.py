"""What takes a real PostgreSQL, and real clients, to be believed."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest

if TYPE_CHECKING:
    from tests.conftest import StartGuard
    from tests.guard_process import GuardProcess
    from tests.servers import Server, Transport

SLEEPERS = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%%pg_sleep(61)%%' AND pid <> pg_backend_pid()"


def sleepers(server: Server) -> int:
    """Backends that are busy with what the test has started."""
    with psycopg.connect(server.unix.conninfo) as connection:
        row = connection.execute(SLEEPERS + " AND state = 'active'").fetchone()
        assert row is not None
        return int(row[0])


def wait_for_sleepers(server: Server, number: int) -> None:
    deadline = time.monotonic() + 30
    while sleepers(server) != number:
        assert time.monotonic() < deadline, f"there are {sleepers(server)}"
        time.sleep(0.02)


def test_a_rejected_session_leaves_no_query_running(
    server: Server, start_guard: StartGuard, transport: Transport
) -> None:
    guard = start_guard("--mode", "reject")
    connection = psycopg.connect(guard.at(transport).conninfo, autocommit=True)
    connection.pgconn.send_query(b"SELECT pg_sleep(61)")
    wait_for_sleepers(server, 1)
    with open(connection.fileno(), "wb", closefd=False, buffering=0) as socket:
        socket.write(b"Q\0\0\0\x0eSELECT 1\0\0")
        result = connection.pgconn.get_result()
        assert result is not None
        assert result.error_field(psycopg.pq.DiagnosticField.SQLSTATE) == b"08P01"
        assert result.error_field(psycopg.pq.DiagnosticField.MESSAGE_HINT)
    wait_for_sleepers(server, 0)
    connection.close()
    assert [fault["action"] for fault in guard.faults("request-while-busy")] == ["rejected"]


@pytest.mark.parametrize("at_once", [False, True], ids=["at the deadline", "by a second signal"])
def test_what_is_cut_off_leaves_no_query_running(
    server: Server, start_guard: StartGuard, transport: Transport, tmp_path: Path, at_once: bool
) -> None:
    config = tmp_path / "pgguard.toml"
    config.write_text(f"shutdown_timeout = {60 if at_once else 0.1}\n")
    guard = start_guard("--config", str(config))
    busy = [psycopg.connect(guard.at(transport).conninfo, autocommit=True) for _ in range(3)]
    for connection in busy:
        connection.pgconn.send_query(b"SELECT pg_sleep(61)")
    wait_for_sleepers(server, 3)
    with psycopg.connect(guard.at(transport).conninfo, autocommit=True) as idle:
        idle.execute("SELECT 1")
        if at_once:
            os.kill(guard.pid, signal.SIGTERM)
            deadline = time.monotonic() + 30
            while "waiting up to" not in guard.stderr:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        began = time.monotonic()
        guard.stop()
        assert time.monotonic() - began < 10
        wait_for_sleepers(server, 0)
    for connection in busy:
        connection.close()


def test_what_finishes_in_time_is_not_cancelled(guard: GuardProcess, transport: Transport) -> None:
    with psycopg.connect(guard.at(transport).conninfo, autocommit=True) as connection:
        connection.pgconn.send_query(b"SELECT 42 FROM pg_sleep(1)")
        os.kill(guard.pid, signal.SIGTERM)
        result = connection.pgconn.get_result()
        assert result is not None
        assert result.get_value(0, 0) == b"42"
        while connection.pgconn.get_result() is not None:
            pass
    assert guard._process.wait(30) == 0


@pytest.mark.parametrize("version", ["3.0", "3.2"])
def test_psql_cancels_with_ctrl_c(
    version: str, server: Server, guard: GuardProcess, transport: Transport, tmp_path: Path
) -> None:
    """With the long keys of protocol 3.2 as well, where this libpq speaks it."""
    environ = guard.at(transport).environ() | {"PGMAXPROTOCOLVERSION": version}
    command: list[str | Path] = [server.bindir / "psql", "-X", "-c", "SELECT pg_sleep(61)"]
    with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, cwd=tmp_path) as psql:
        wait_for_sleepers(server, 1)
        psql.send_signal(signal.SIGINT)
        _, said = psql.communicate(timeout=30)
    assert b"canceling statement due to user request" in said
    wait_for_sleepers(server, 0)
    guard.assert_no_faults()


def test_psycopg_cancels(server: Server, guard: GuardProcess, transport: Transport) -> None:
    with psycopg.connect(guard.at(transport).conninfo, autocommit=True) as connection:
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(connection.execute, "SELECT pg_sleep(61)")
            wait_for_sleepers(server, 1)
            connection.cancel_safe(timeout=5)
            with pytest.raises(psycopg.errors.QueryCanceled):
                running.result(30)
        assert connection.execute("SELECT 1").fetchone() == (1,)
    guard.assert_no_faults()


def test_a_large_row(guard: GuardProcess, transport: Transport) -> None:
    before = high_water_mark(guard)
    with psycopg.connect(guard.at(transport).conninfo) as connection:
        with connection.cursor(binary=True) as cursor:
            row = cursor.execute("SELECT repeat('x', 40000000)::bytea").fetchone()
        assert row is not None
        assert row[0] == b"x" * 40_000_000
    assert high_water_mark(guard) - before < 20_000_000
    guard.assert_no_faults()


def high_water_mark(guard: GuardProcess) -> int:
    status = Path(f"/proc/{guard.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def test_a_storm_of_connections_beside_a_steady_one(
    server: Server, guard: GuardProcess, transport: Transport, tmp_path: Path
) -> None:
    """``pgbench -C`` connects anew for each transaction."""
    script = tmp_path / "script.sql"
    script.write_text("SELECT 1;\n")
    command: list[str | Path] = [server.bindir / "pgbench", "-n", "-C", "-c", "8", "-j", "2", "-t", "15", "-f", script]
    slowest = 0.0
    done = threading.Event()

    def steady() -> None:
        nonlocal slowest
        with psycopg.connect(guard.at(transport).conninfo, autocommit=True) as connection:
            while not done.is_set():
                started = time.monotonic()
                connection.execute("SELECT 1")
                slowest = max(slowest, time.monotonic() - started)

    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(steady)
        try:
            storm = subprocess.run(
                command, env=guard.at(transport).environ(), capture_output=True, timeout=60, check=True
            )
        finally:
            done.set()
        beside.result(30)
    assert b"actually processed: 120/120" in storm.stdout
    assert slowest < 1
    guard.assert_no_faults()
