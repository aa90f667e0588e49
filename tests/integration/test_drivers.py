"""Correct clients of every kind: through the guard they get what they get without it, and it says nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.guard_process import GuardProcess
    from tests.servers import Address, Server, Transport

PROGRAMS = Path(__file__).parent / "programs"
SECONDS = 60


def run(address: Address, *command: str | Path) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(
        command, check=False, env=address.environ(), stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stderr.decode(errors='replace')}"
    return done


def current_lsn(connection: psycopg.Connection) -> str:
    """How far the WAL has been written."""
    row = connection.execute("SELECT pg_current_wal_lsn()").fetchone()
    assert row is not None
    return str(row[0])


@pytest.fixture
def address(guard: GuardProcess, transport: Transport) -> Address:
    """Where the guard accepts connections, over the transport under test."""
    return guard.at(transport)


@pytest.fixture(scope="module")
def pgbench_tables(server: Server) -> Server:
    run(server.unix, server.bindir / "pgbench", "--initialize", "--quiet")
    return server


@pytest.fixture
def published_table(server: Server) -> Iterator[str]:
    """A table, and a publication of the same name."""
    with psycopg.connect(server.unix.conninfo, autocommit=True) as connection:
        connection.execute("CREATE TABLE published (n int PRIMARY KEY, name text)")
        connection.execute("CREATE PUBLICATION published FOR TABLE published")
        yield "published"
        connection.execute("DROP PUBLICATION published")
        connection.execute("DROP TABLE published")


@pytest.mark.parametrize("program", ["psycopg", "psycopg2", "asyncpg", "pg8000"])
def test_python_driver(program: str, server: Server, guard: GuardProcess, address: Address) -> None:
    command = (sys.executable, "-W", "error", PROGRAMS / f"{program}_session.py")
    directly = run(server.tcp, *command)
    assert len(directly.stdout.splitlines()) > 5
    assert run(address, *command).stdout == directly.stdout
    guard.assert_no_faults()


def test_logical_replication_with_psycopg2(guard: GuardProcess, address: Address) -> None:
    done = run(address, sys.executable, PROGRAMS / "psycopg2_replication.py")
    assert done.stdout == b"replicated 20 rows in 1 transaction\n"
    guard.assert_no_faults()


def test_psql(server: Server, guard: GuardProcess, address: Address) -> None:
    command = (server.bindir / "psql", "-X", "-f", PROGRAMS / "psql_session.sql")

    def said(address: Address) -> tuple[bytes, bytes]:
        done = run(address, *command)
        # A notification names the backend that sent it.
        return re.sub(rb"PID \d+", b"PID", done.stdout), done.stderr

    output, errors = said(server.tcp)
    assert b"Asynchronous notification" in output
    assert errors.count(b"ERROR") == 4
    assert said(address) == (output, errors)
    guard.assert_no_faults()


@pytest.mark.parametrize("protocol", ["simple", "extended", "prepared"])
def test_pgbench(protocol: str, pgbench_tables: Server, guard: GuardProcess, address: Address) -> None:
    workload = ("-n", "-c", "4", "-j", "2", "-t", "50", "-M", protocol)
    done = run(address, pgbench_tables.bindir / "pgbench", *workload)
    assert b"actually processed: 200/200" in done.stdout
    guard.assert_no_faults()


@pytest.mark.parametrize("protocol", ["extended", "prepared"])
def test_pgbench_pipelines(protocol: str, pgbench_tables: Server, guard: GuardProcess, address: Address) -> None:
    """Requests sent without waiting for answers, by a driver that is allowed to."""
    workload = ("-n", "-c", "4", "-t", "200", "-M", protocol, "-f", PROGRAMS / "pgbench_pipeline.sql")
    done = run(address, pgbench_tables.bindir / "pgbench", *workload)
    assert b"actually processed: 800/800" in done.stdout
    guard.assert_no_faults()


def test_pg_dump(pgbench_tables: Server, guard: GuardProcess, address: Address) -> None:
    def dump(address: Address) -> list[bytes]:
        lines = run(address, pgbench_tables.bindir / "pg_dump").stdout.splitlines()
        # Newer releases fence the dump with a random key.
        return [line for line in lines if not line.startswith((b"\\restrict", b"\\unrestrict"))]

    directly = dump(pgbench_tables.tcp)
    assert len(directly) > 100_000
    assert dump(address) == directly
    guard.assert_no_faults()


def test_pg_dump_in_parallel(pgbench_tables: Server, guard: GuardProcess, address: Address, tmp_path: Path) -> None:
    """It forks its workers while it is connected, and they connect for themselves: the fork alone is remarked on."""
    run(address, pgbench_tables.bindir / "pg_dump", "--format=directory", "--jobs=2", f"--file={tmp_path / 'dump'}")
    assert (tmp_path / "dump" / "toc.dat").exists()
    guard.assert_no_faults(except_kinds={"inherited-connection"})


def test_pg_recvlogical(server: Server, published_table: str, guard: GuardProcess, address: Address) -> None:
    recvlogical = (server.bindir / "pg_recvlogical", "--slot", "recvlogical", "--dbname", "postgres")
    options = ("--option", "proto_version=1", "--option", f"publication_names={published_table}")
    run(address, *recvlogical, "--create-slot", "--plugin", "pgoutput")
    try:
        with psycopg.connect(server.unix.conninfo, autocommit=True) as connection:
            connection.execute("INSERT INTO published SELECT n, 'row ' || n FROM generate_series(1, 500) AS n")
            end = current_lsn(connection)
        done = run(address, *recvlogical, "--start", "--no-loop", f"--endpos={end}", *options, "--file=-")
    finally:
        run(address, *recvlogical, "--drop-slot")
    assert done.stdout.count(b"row ") == 500
    guard.assert_no_faults()


def test_pg_receivewal(server: Server, guard: GuardProcess, address: Address, tmp_path: Path) -> None:
    receivewal = (server.bindir / "pg_receivewal", "--slot", "receivewal")
    with psycopg.connect(server.unix.conninfo, autocommit=True) as connection:
        connection.execute("SELECT pg_create_physical_replication_slot('receivewal', immediately_reserve => true)")
        connection.execute("CREATE TABLE written AS SELECT generate_series(1, 10000)")
        end = current_lsn(connection)
        # It ends when it has got more than that, which the server writes by itself only now and then.
        connection.execute("DROP TABLE written")
        try:
            run(address, *receivewal, "--no-loop", "--no-sync", f"--endpos={end}", "--directory", tmp_path)
        finally:
            run(address, *receivewal, "--drop-slot")
    assert any(path.stat().st_size for path in tmp_path.iterdir())
    guard.assert_no_faults()


@pytest.mark.parametrize("method", ["stream", "fetch"])
def test_pg_basebackup(method: str, server: Server, guard: GuardProcess, address: Address, tmp_path: Path) -> None:
    """With ``stream`` it opens a connection, forks, and leaves it to the child: a hand-over, and no error."""
    target = tmp_path / "backup"
    run(address, server.bindir / "pg_basebackup", "-D", target, "-X", method, "-c", "fast", "--no-sync")
    manifest = json.loads((target / "backup_manifest").read_bytes())
    assert len(manifest["Files"]) > 500
    assert all((target / file["Path"]).stat().st_size == file["Size"] for file in manifest["Files"])
    guard.assert_no_faults(except_kinds={"inherited-connection"} if method == "stream" else ())
