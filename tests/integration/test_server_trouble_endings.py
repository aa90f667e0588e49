"""A server that ends sessions, or itself: clients are told what they would be without it, and nobody is blamed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, Final

import psycopg
import pytest

from tests.guard_process import GuardProcess, running_guard
from tests.integration.bare import SECONDS, Bare, Words, words
from tests.integration.mortal import MODES, Mortal, mortal_server
from tests.integration.running import PROGRAMS, running
from tests.proxy.messages import message, query
from tests.servers import installations, not_installed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.servers import Address, Server, Transport

_INSTALLATIONS: Final = installations()
_GUARDS_OWN: Final = "pgguard: the server at "
_SETTINGS: Final = {"max_connections": "100", "wal_level": "logical"}


@pytest.fixture(scope="module", params=_INSTALLATIONS)
def mortal(request: pytest.FixtureRequest) -> Iterator[Mortal]:
    """A server of the tests' own, in turn of each version that is installed."""
    bindir = _INSTALLATIONS[request.param]
    if bindir is None:
        not_installed(f"{request.param} PostgreSQL")
    with mortal_server(bindir, _SETTINGS) as mortal:
        with psycopg.connect(mortal.server.unix.conninfo) as connection:
            connection.execute("CREATE TABLE copied (n int)")
            connection.execute("CREATE TABLE locked (n int)")
        yield mortal


@pytest.fixture(scope="module")
def surviving(mortal: Mortal) -> Iterator[GuardProcess]:
    """One guard that lives through all that happens to its server; each test leaves it with a server that runs.

    One of the servers it reaches over a Unix socket, which is another one each time that the server starts.
    """
    upstream = mortal.server.tcp if _version(mortal.server) % 2 else mortal.server.unix
    with running_guard(upstream) as guard:
        yield guard


# What a session may be doing


def _idle(client: Bare) -> None:
    client.ask("SELECT 1")


def _listening(client: Bare) -> None:
    client.ask("LISTEN news")


def _in_transaction(client: Bare) -> None:
    client.ask("BEGIN; INSERT INTO copied VALUES (1)", message("Z", b"T"))


def _in_failed_transaction(client: Bare) -> None:
    client.ask("BEGIN", message("Z", b"T"))
    client.ask("SELECT 1 / 0", message("Z", b"E"))


def _active(client: Bare) -> None:
    client.send(query("SELECT pg_sleep(600)"))


def _active_extended(client: Bare) -> None:
    """Prepared, bound, and executed, with more behind it."""
    client.send(
        message("P", b"\0SELECT pg_sleep(600)\0\0\0")
        + message("B", bytes(8))
        + message("E", bytes(5))
        + message("S")
        + message("P", b"\0SELECT 2\0\0\0")
        + message("S")
    )


def _copying_in(client: Bare) -> None:
    client.ask("COPY copied FROM STDIN", message("G", b"\0\0\1\0\0"))
    client.send(message("d", b"1\n2\n"))


def _copying_out(client: Bare) -> None:
    client.send(query("COPY (SELECT n, pg_sleep(0.01) FROM generate_series(1, 100000) AS n) TO STDOUT"))


_STATES: Final[dict[str, Callable[[Bare], None]]] = {
    state.__name__.removeprefix("_"): state
    for state in (
        _idle,
        _listening,
        _in_transaction,
        _in_failed_transaction,
        _active,
        _active_extended,
        _copying_in,
        _copying_out,
    )
}
_WAYS: Final = ("tcp", "unix", "guarded tcp", "guarded unix")
_ENTERED: Final = """
    SELECT count(*) FROM pg_stat_activity WHERE application_name = 'state' AND (
      wait_event = 'PgSleep' AND query LIKE ANY (ARRAY['SELECT pg_sleep(600)', 'COPY (SELECT%'])
      OR wait_event = 'ClientRead' AND query LIKE ANY (ARRAY['COPY copied%', 'SELECT 1%', 'LISTEN%', 'BEGIN%'])
    )"""


class Stage:
    """Sessions in all states, through the guard and directly, over each transport."""

    def __init__(self, server: Server, guard: GuardProcess) -> None:
        self._server = server
        self._clients: dict[tuple[str, str], Bare] = {}
        for way in _WAYS:
            transport: Transport = "unix" if way.endswith("unix") else "tcp"
            address = (guard if way.startswith("guarded") else server).at(transport)
            for name, enter in _STATES.items():
                client = Bare.logged_in(address, application_name="state")
                enter(client)
                self._clients[name, way] = client
        _until(lambda: self._count(_ENTERED) == len(self._clients), "not all came to do what they should")

    def _count(self, sql: str) -> int:
        with psycopg.connect(self._server.unix.conninfo) as connection:
            row = connection.execute(sql).fetchone()
        assert row is not None
        return int(row[0])

    def terminate(self) -> None:
        self._count("SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = 'state'")

    def assert_all_are_told_the_same(self, sqlstate: str | None) -> None:
        """Wait for all connections to end, and compare what was said to them last.

        Where the server says nothing that ends a session, the guard does, with 08006.
        """
        said = {key: words(client.rest()) for key, client in self._clients.items()}
        for client in self._clients.values():
            client.close()
        for name in _STATES:
            for transport in ("tcp", "unix"):
                directly, guarded = said[name, transport], said[name, f"guarded {transport}"]
                if not directly or directly[-1].severity != "FATAL":
                    own = guarded.pop()
                    assert (own.severity, own.sqlstate) == ("FATAL", "08006"), name
                    assert own.text.startswith(_GUARDS_OWN)
                assert guarded == directly, f"{name} over {transport}"
                assert sqlstate is None or (directly and directly[-1].sqlstate == sqlstate), f"{name}: {directly}"


def _until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def _refused(address: Address) -> Words:
    """What a client is told that isn't let in."""
    with closing(Bare(address)) as client:
        [said] = words(client.rest())
    return said


def _serves(mortal: Mortal, guard: GuardProcess) -> None:
    """The guard lives on, serves the next client, and has recorded nothing that it didn't before."""
    mortal.wait_accepts()
    for address in (guard.tcp, guard.unix):
        with psycopg.connect(address.conninfo) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
    assert guard.faults() == []
    assert "Traceback" not in guard.stderr


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_server_that_is_shut_down_and_started_again(mortal: Mortal, surviving: GuardProcess, mode: str) -> None:
    stage = Stage(mortal.server, surviving)
    postmaster = mortal.signal(MODES[mode])
    stage.assert_all_are_told_the_same("57P01" if mode == "fast" else None)
    mortal.wait_ended(postmaster)
    said = _refused(surviving.tcp)
    assert said.sqlstate == "08001"
    assert said.text.startswith("pgguard: could not connect to the server: ")
    mortal.start()
    _serves(mortal, surviving)


def test_a_server_that_is_shut_down_when_all_have_gone(mortal: Mortal, surviving: GuardProcess) -> None:
    """Smart shutdown: who is there stays, and who comes is turned away, through the guard as without it."""
    addresses = [mortal.server.tcp, mortal.server.unix, surviving.tcp, surviving.unix]
    clients = [Bare.logged_in(address) for address in addresses]
    postmaster = mortal.signal(MODES["smart"])
    _until(lambda: _refused(mortal.server.unix).sqlstate == "57P03", "it never turned anybody away")
    said = {_refused(address) for address in addresses}
    assert len(said) == 1
    assert said.pop().text == "the database system is shutting down"
    for client in clients:
        assert b"SELECT 1" in client.ask("SELECT 1")
    for client in clients:
        client.send(message("X"))
        assert client.rest() == b""
        client.close()
    mortal.wait_ended(postmaster)
    mortal.start()
    _serves(mortal, surviving)


def test_a_postmaster_that_is_killed(mortal: Mortal, surviving: GuardProcess) -> None:
    """Its backends end as they notice: some say so, and some don't."""
    stage = Stage(mortal.server, surviving)
    mortal.wait_ended(mortal.signal(signal.SIGKILL))
    stage.assert_all_are_told_the_same(None)
    mortal.start()
    _serves(mortal, surviving)


def test_a_backend_that_is_killed(mortal: Mortal, surviving: GuardProcess) -> None:
    """The server ends all others, with a warning (57P02), and starts anew by itself."""
    stage = Stage(mortal.server, surviving)
    with psycopg.connect(surviving.tcp.conninfo, autocommit=True) as victim:
        os.kill(victim.info.backend_pid, signal.SIGKILL)
        with pytest.raises(psycopg.OperationalError) as raised:
            victim.execute("SELECT 1")
    assert raised.value.sqlstate in {"08006", None}
    stage.assert_all_are_told_the_same(None)
    _serves(mortal, surviving)


def test_sessions_that_are_terminated(mortal: Mortal, surviving: GuardProcess) -> None:
    stage = Stage(mortal.server, surviving)
    stage.terminate()
    stage.assert_all_are_told_the_same("57P01")
    _serves(mortal, surviving)


_LIMITS: Final = (
    # a setting, the first version that knows it, what the session does then, and what it is told
    ("SET idle_session_timeout = '300ms'", 14, None, "57P05"),
    ("SET idle_in_transaction_session_timeout = '300ms'", 10, "BEGIN", "25P03"),
    ("SET idle_in_transaction_session_timeout = '300ms'", 10, "BEGIN; SELECT 1 / 0", "25P03"),
    ("SET transaction_timeout = '300ms'", 17, "BEGIN; SELECT pg_sleep(600)", "25P04"),
)


def test_a_limit_that_ends_a_session(mortal: Mortal, surviving: GuardProcess) -> None:
    version = _version(mortal.server)
    for setting, since, statement, sqlstate in _LIMITS:
        if version < since:
            continue
        clients = [Bare.logged_in(address) for address in (mortal.server.tcp, surviving.tcp, surviving.unix)]
        for client in clients:
            client.ask(setting)
            if statement is not None:
                client.send(query(statement))
        said = [words(client.rest()) for client in clients]
        for client in clients:
            client.close()
        assert said == said[:1] * 3, setting
        assert said[0][-1].sqlstate == sqlstate
    _serves(mortal, surviving)


def _version(server: Server) -> int:
    with psycopg.connect(server.unix.conninfo) as connection:
        return connection.info.server_version // 10_000


_STATEMENTS: Final = {
    "statement_timeout": ("SELECT pg_sleep(600)", "57014"),
    "lock_timeout": ("SELECT * FROM locked", "55P03"),
    "pg_cancel_backend": ("SELECT pg_sleep(600)", "57014"),
}


@pytest.mark.parametrize("limit", _STATEMENTS)
def test_a_limit_that_ends_a_statement(mortal: Mortal, surviving: GuardProcess, limit: str) -> None:
    """And not the session."""
    statement, sqlstate = _STATEMENTS[limit]
    said = []
    with psycopg.connect(mortal.server.unix.conninfo) as holder:
        holder.execute("LOCK TABLE locked")
        for address in (mortal.server.tcp, surviving.tcp, surviving.unix):
            with psycopg.connect(address.conninfo, autocommit=True) as client:
                if limit.endswith("_timeout"):
                    client.execute(f"SET {limit} = '300ms'")
                client.pgconn.send_query(statement.encode())
                client.pgconn.flush()
                if limit == "pg_cancel_backend":
                    _cancel(mortal.server, client.info.backend_pid)
                result = client.pgconn.get_result()
                assert result is not None
                said.append(result.error_field(psycopg.pq.DiagnosticField.SQLSTATE))
                assert client.pgconn.get_result() is None
                assert client.execute("SELECT 1").fetchone() == (1,)
    assert said == [sqlstate.encode()] * 3
    _serves(mortal, surviving)


def _cancel(server: Server, backend: int) -> None:
    asleep = "SELECT wait_event = 'PgSleep' FROM pg_stat_activity WHERE pid = %s"
    with psycopg.connect(server.unix.conninfo, autocommit=True) as other:
        _until(lambda: other.execute(asleep, (backend,)).fetchone() == (True,), "it never slept")
        other.execute("SELECT pg_cancel_backend(%s)", (backend,))


def test_a_database_that_is_dropped(mortal: Mortal, surviving: GuardProcess) -> None:
    said = []
    with psycopg.connect(mortal.server.unix.conninfo, autocommit=True) as connection:
        connection.execute("CREATE DATABASE doomed")
        clients = [
            Bare.logged_in(address, database="doomed") for address in (mortal.server.tcp, surviving.tcp, surviving.unix)
        ]
        connection.execute("DROP DATABASE doomed WITH (FORCE)")
        for client in clients:
            said.append(words(client.rest()))
            client.close()
    assert said == [[said[0][0]]] * 3
    assert said[0][0].sqlstate == "57P01"
    _serves(mortal, surviving)


@pytest.mark.parametrize("mode", MODES)
def test_a_standby_is_told_as_it_would_be(mortal: Mortal, surviving: GuardProcess, tmp_path: Path, mode: str) -> None:
    """A server that shuts down sends its standbys all that there is first, and ends the stream without an error."""
    programs = []
    for n, address in enumerate((mortal.server.tcp, surviving.tcp, surviving.unix)):
        directory = tmp_path / str(n)
        directory.mkdir()
        command: list[str | Path] = [mortal.server.bindir / "pg_receivewal", "--no-loop", "-D", directory]
        with (directory / "stderr").open("wb") as stderr:
            programs.append(subprocess.Popen(command, env=address.environ(), stdin=subprocess.DEVNULL, stderr=stderr))
    try:
        with psycopg.connect(mortal.server.unix.conninfo, autocommit=True) as connection:
            streaming = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'"
            _until(lambda: connection.execute(streaming).fetchone() == (3,), "they never came to stream")
        postmaster = mortal.signal(MODES[mode])
        statuses = [program.wait(SECONDS) for program in programs]
    finally:
        for program in programs:
            program.kill()
            program.wait()
    mortal.wait_ended(postmaster)
    said = [(tmp_path / str(n) / "stderr").read_text() for n in range(3)]
    assert statuses == [1, 1, 1]
    if mode == "immediate":
        assert "server closed the connection unexpectedly" in said[0]
        assert all(_GUARDS_OWN in guarded for guarded in said[1:])
    else:
        assert "replication stream was terminated before stop point" in said[0]
        assert said == said[:1] * 3
    mortal.start()
    _serves(mortal, surviving)


def test_a_driver_shows_what_it_would_without_the_guard(mortal: Mortal, surviving: GuardProcess) -> None:
    said = []
    for address in (mortal.server.tcp, surviving.tcp, surviving.unix):
        with psycopg.connect(address.conninfo, autocommit=True) as client:
            with psycopg.connect(mortal.server.unix.conninfo) as other:
                other.execute("SELECT pg_terminate_backend(%s)", (client.info.backend_pid,))
            with pytest.raises(psycopg.OperationalError) as raised:
                client.execute("SELECT 1")
            said.append((type(raised.value).__name__, raised.value.sqlstate, str(raised.value)))
    assert said == said[:1] * 3
    assert said[0][1] == "57P01"
    _serves(mortal, surviving)


@pytest.mark.parametrize("transport", ["tcp", "unix"])
def test_a_shared_session_that_the_server_ends(
    mortal: Mortal, surviving: GuardProcess, tmp_path: Path, transport: Transport
) -> None:
    """A child has inherited it, and opened one of its own: it is neither's fault, and the parent connects anew."""
    before = len(surviving.faults())
    with running([sys.executable, PROGRAMS / "ended_while_shared.py"], surviving.at(transport), tmp_path) as program:
        backend = program.read()["backend"]
        with psycopg.connect(mortal.server.unix.conninfo) as other:
            other.execute("SELECT pg_terminate_backend(%s)", (backend,))
        program.go_on()
        assert program.read() == {"sqlstate": "57P01", "child": 1, "again": 1}
        assert program.wait() == 0
    found = [(fault["kind"], fault["severity"]) for fault in surviving.faults()[before:]]
    assert set(found) <= {("inherited-connection", "info")}
