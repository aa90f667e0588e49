"""A server that isn't there, refuses, says nothing, or speaks nonsense: nobody is blamed, and the guard lives on."""

from __future__ import annotations

import re
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Final

import psycopg
import pytest

from tests.guard_process import Fault, GuardProcess, running_guard
from tests.integration.bare import SECONDS, USER, Bare, Words, words
from tests.integration.mortal import mortal_server
from tests.integration.troubles import TROUBLES, Trouble, TroubledServer, accept
from tests.proxy.messages import LOGGED_IN, READY, TERMINATE, query
from tests.servers import Address, installations, not_installed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.servers import Server, Transport

_AT_ONCE: Final = 8
_QUIET: Final = 0.3
"""Seconds in which nothing comes where nothing is to come."""
_OWN: Final = re.compile(r"port \d+|::1|localhost|127\.0\.0\.1")


@pytest.fixture(scope="module")
def troubled() -> Iterator[TroubledServer]:
    with closing(TroubledServer()) as server:
        yield server


def _play(address: Address, trouble: Trouble, kept: int = 0) -> tuple[bytes, str]:
    """Everything that a client gets, and whether its connection ends."""
    user = str(TROUBLES.index(trouble))
    with closing(Bare.logged_in(address, user=user) if trouble.lets_in else Bare(address, user=user)) as client:
        if trouble.lets_in:
            client.send(query("SELECT 1"))
        if trouble.then == "is silent":
            received = client.receive(len(trouble.says) - kept)
            more, end = client.outcome(_QUIET)
            if trouble.lets_in:
                client.send(TERMINATE)
            return received + more, end
        received, end = client.outcome()
        return received, "ends" if end in {"fin", "reset"} else end


def _play_all(address: Address, troubles: list[Trouble], *, guarded: bool) -> list[tuple[bytes, str]]:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        kept = [trouble.kept if guarded else 0 for trouble in troubles]
        return list(pool.map(partial(_play, address), troubles, kept))


def _compare(address: Address, directly: list[tuple[bytes, str]], troubles: list[Trouble]) -> None:
    guarded = _play_all(address, troubles, guarded=True)
    for trouble, outcome, (received, end) in zip(troubles, directly, guarded, strict=True):
        assert outcome[0] == trouble.says, trouble.name
        if trouble.words:
            assert received.startswith(trouble.says), trouble.name
            [own] = words(received[len(trouble.says) :])
            assert (own.severity, own.sqlstate) == ("FATAL", "08006"), trouble.name
            assert own.text.startswith("pgguard: the server at ")
            assert (outcome[1], end) == ("ends", "ends"), trouble.name
        else:
            assert (received + outcome[0][len(outcome[0]) - trouble.kept :], end) == outcome, trouble.name


def _times(faults: list[Fault]) -> Counter[str]:
    times: Counter[str] = Counter()
    for fault in faults:
        times[fault["kind"]] += 1 + fault["suppressed"]
    return times


def test_a_client_gets_what_it_would_without_the_guard(troubled: TroubledServer) -> None:
    troubles = list(TROUBLES)
    directly = _play_all(troubled.address, troubles, guarded=False)
    with running_guard(troubled.address) as guard:
        for transport in ("tcp", "unix"):
            _compare(guard.at(transport), directly, troubles)
        _still_asks(guard)
        guard.stop()
        for fault in guard.faults():
            assert fault["reason"].startswith("the server") or fault["kind"] == "connection-exhaustion", fault
            blamed = [culprit for culprit in fault["culprits"] if culprit["role"] in {"intruder", "closer"}]
            assert not blamed, fault
        recorded = [fault for fault in guard.faults() if fault["severity"] != "info"]
    expected = Counter(trouble.kind for trouble in troubles if trouble.kind is not None)
    assert expected.keys() == {fault["kind"] for fault in recorded}
    # One message may make nonsense of what is behind it, too.
    assert all(_times(recorded)[kind] >= 2 * times for kind, times in expected.items())
    silent = {str(n) for n, trouble in enumerate(troubles) if trouble.kind is None}
    assert not [fault for fault in recorded if fault["session"]["user"] in silent]


def _still_asks(guard: GuardProcess) -> None:
    """The guard lives: a client still gets through to the server."""
    fine = next(trouble for trouble in TROUBLES if trouble.name == "answers, and ends")
    received, _ = _play(guard.tcp, fine)
    assert received.startswith(fine.says)


def test_what_is_no_fault_is_not_rejected(troubled: TroubledServer) -> None:
    troubles = [trouble for trouble in TROUBLES if trouble.kind is None]
    directly = _play_all(troubled.address, troubles, guarded=False)
    with running_guard(troubled.address, "--mode", "reject") as guard:
        _compare(guard.tcp, directly, troubles)
        guard.assert_no_faults()


def test_libpq_says_what_it_would_without_the_guard(troubled: TroubledServer) -> None:
    troubles = [
        trouble
        for trouble in TROUBLES
        if trouble.then == "closes" and not (trouble.lets_in or trouble.words or trouble.says.startswith(LOGGED_IN))
    ]
    with running_guard(troubled.address) as guard:
        for trouble in troubles:
            directly, guarded = (_complaint(address, trouble) for address in (troubled.address, guard.tcp))
            assert guarded == directly, trouble.name


def _complaint(address: Address, trouble: Trouble) -> str:
    conninfo = psycopg.conninfo.make_conninfo(address.conninfo, user=str(TROUBLES.index(trouble)), gssencmode="disable")
    with pytest.raises(psycopg.OperationalError) as raised:
        psycopg.connect(conninfo, connect_timeout=int(SECONDS)).close()
    return _OWN.sub("*", str(raised.value))


def test_a_server_that_is_silent_is_waited_for(troubled: TroubledServer, tmp_path: Path) -> None:
    """As without the guard: it has a time-out for clients that don't say who they are, and none for servers."""
    config = tmp_path / "pgguard.toml"
    config.write_text("startup_timeout = 0.5\nunread_answer = 0.5\nidle_in_transaction = 0.5\n")
    silent = [trouble for trouble in TROUBLES if trouble.then == "is silent" and trouble.kind is None]
    with running_guard(troubled.address, "--config", str(config)) as guard:
        clients = []
        for trouble in silent:
            user = str(TROUBLES.index(trouble))
            client = Bare.logged_in(guard.tcp, user=user) if trouble.lets_in else Bare(guard.tcp, user=user)
            clients.append(client)
            if trouble.lets_in:
                client.send(query("SELECT 1"))
            assert client.receive(len(trouble.says) - trouble.kept) == trouble.says[: len(trouble.says) - trouble.kept]
        time.sleep(2)
        for trouble, client in zip(silent, clients, strict=True):
            assert client.outcome(_QUIET / 10) == (b"", "none"), trouble.name
            client.send(TERMINATE)
            client.close()
        guard.assert_no_faults()


# Not there


def _refused(guard: GuardProcess, transport: Transport = "tcp") -> Words:
    with closing(Bare(guard.at(transport))) as client:
        [said] = words(client.rest())
    return said


def _assert_unavailable(guard: GuardProcess, why: str) -> None:
    for transport in ("tcp", "unix"):
        said = _refused(guard, transport)
        assert (said.severity, said.sqlstate) == ("FATAL", "08001")
        assert said.text.startswith("pgguard: could not connect to the server: ")
        assert why in said.text
    with pytest.raises(psycopg.OperationalError, match="pgguard: could not connect to the server"):
        psycopg.connect(guard.tcp.conninfo).close()


@pytest.mark.parametrize("where", ["nowhere.invalid", "::1", "unix"])
def test_a_server_that_is_not_there(where: str, tmp_path: Path) -> None:
    """And is told apart by why: no such name, nobody listens, no socket."""
    with socket.socket(socket.AF_INET6 if where == "::1" else socket.AF_INET) as down:
        down.bind(("::1" if where == "::1" else "127.0.0.1", 0))
        port = down.getsockname()[1]
        upstream = Address(str(tmp_path) if where == "unix" else where, port)
        why = {"::1": "Connection refused", "unix": "No such file or directory"}.get(where, ": ")
        with running_guard(upstream) as guard:
            _assert_unavailable(guard, why)
            guard.assert_no_faults()


def test_a_server_that_comes_back_at_its_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = Address("127.0.0.1", listener.getsockname()[1])
    with running_guard(address) as guard:
        _assert_unavailable(guard, "Connection refused")
        with (
            socket.create_server(("127.0.0.1", address.port)) as listener,
            closing(Bare(guard.tcp)) as client,
            accept(listener) as server,
        ):
            server.sendall(LOGGED_IN)
            assert client.until(READY) == LOGGED_IN
            client.send(TERMINATE)
        _assert_unavailable(guard, "Connection refused")
        guard.assert_no_faults()


@pytest.fixture
def deaf() -> Iterator[Address]:
    """A host that leaves SYNs unanswered: its backlog is full, and it takes nobody out of it."""
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for sock in (first, second):
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        yield Address("127.0.0.1", full.getsockname()[1])


def test_a_host_that_can_not_be_reached(deaf: Address) -> None:
    """Each host is given ``connect_timeout``; the client is told when none is left."""
    with running_guard(f"host={deaf.host} port={deaf.port} connect_timeout=1") as guard:
        _assert_unavailable(guard, f"{deaf.host}:{deaf.port}: no answer within 1 s")
        guard.assert_no_faults()


@pytest.mark.parametrize("settings", ["", "connect_timeout=1 sslmode=disable"])
def test_a_server_that_takes_connections_out_of_its_backlog_late(settings: str) -> None:
    """A stopped postmaster: the kernel has accepted in its place, so the client waits, as it does without the guard."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = Address("127.0.0.1", listener.getsockname()[1])
        with running_guard(f"host={address.host} port={address.port} {settings}") as guard:
            with closing(Bare(guard.tcp)) as client:
                time.sleep(1.5)
                assert client.outcome(_QUIET) == (b"", "none")
                with accept(listener) as server:
                    server.sendall(LOGGED_IN)
                    client.socket.settimeout(SECONDS)
                    assert client.until(READY) == LOGGED_IN
                    client.send(TERMINATE)
                    client.close()
                    while server.recv(65536):
                        pass
            guard.assert_no_faults()


def test_the_next_of_several_hosts_is_taken(server: Server, deaf: Address) -> None:
    """One refuses, one doesn't answer, and the one that was there first takes over again when it is back."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        first = listener.getsockname()[1]
    ports = f"{first},{deaf.port},{server.tcp.port}"
    with running_guard(f"host=127.0.0.1,127.0.0.1,127.0.0.1 port={ports} connect_timeout=1") as guard:
        with psycopg.connect(guard.tcp.conninfo) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
            with (
                socket.create_server(("127.0.0.1", first)) as listener,
                closing(Bare(guard.tcp)) as client,
                accept(listener) as other,
            ):
                other.sendall(LOGGED_IN)
                assert client.until(READY) == LOGGED_IN
                client.send(TERMINATE)
            assert connection.execute("SELECT 1").fetchone() == (1,)
        with psycopg.connect(guard.unix.conninfo) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
        guard.assert_no_faults()


def test_a_host_that_turns_everybody_away_is_passed_over_as_by_libpq(server: Server, troubled: TroubledServer) -> None:
    """The first one is starting up; the second one doesn't know the user, which tells that it was asked."""
    user = next(n for n, trouble in enumerate(TROUBLES) if trouble.name == "turns away: starting up")
    hosts = f"host=127.0.0.1,127.0.0.1 port={troubled.address.port},{server.tcp.port}"
    with running_guard(hosts) as guard:
        for where in (hosts, guard.tcp.conninfo, guard.unix.conninfo):
            with pytest.raises(psycopg.OperationalError, match=f'role "{user}" does not exist'):
                psycopg.connect(where, user=str(user), dbname="postgres", gssencmode="disable").close()
        guard.assert_no_faults()


# Real ones that refuse


def test_a_server_that_turns_clients_away(tmp_path: Path) -> None:
    """By pg_hba.conf, as it is full, and as it is a standby that isn't open yet."""
    bindir = next((bindir for bindir in installations().values() if bindir is not None), None)
    if bindir is None:
        not_installed("PostgreSQL")
    settings = {"max_connections": "5", "superuser_reserved_connections": "0", "hot_standby": "off"}
    with mortal_server(bindir, settings) as mortal, running_guard(mortal.server.unix) as guard:
        data = tmp_path.joinpath(mortal.server.unix.host, "data")
        with psycopg.connect(mortal.server.unix.conninfo, autocommit=True) as connection:
            connection.execute("CREATE ROLE barred LOGIN")
            connection.execute("CREATE ROLE locked NOLOGIN")
            hba = data / "pg_hba.conf"
            hba.write_text("local all barred reject\n" + hba.read_text())
            connection.execute("SELECT pg_reload_conf()")
            _wait_for("28000", mortal.server.unix, user="barred")
        _assert_turned_away_alike(mortal.server, guard, "28000", user="barred")
        _assert_turned_away_alike(mortal.server, guard, "28000", user="locked")
        guard_faults = guard.faults()
        assert guard_faults == []
        clients = [Bare.logged_in(mortal.server.unix) for _ in range(5)]
        _assert_turned_away_alike(mortal.server, guard, "53300")
        for client in clients:
            client.send(TERMINATE)
            assert client.rest() == b""
            client.close()
        _serves(guard)
        mortal.stop()
        (data / "standby.signal").touch(mode=0o600)
        mortal.start(wait=False)
        _wait_for("57P03", mortal.server.unix, text="not accepting connections")
        _assert_turned_away_alike(mortal.server, guard, "57P03")
        mortal.stop()
        (data / "standby.signal").unlink()
        mortal.start()
        _serves(guard)
        guard.stop()
        assert {fault["kind"] for fault in guard.faults()} == {"connection-exhaustion"}


def _told(address: Address, user: str) -> list[Words]:
    with closing(Bare(address, user=user)) as client:
        return words(client.rest())


def _wait_for(sqlstate: str, address: Address, user: str = USER, text: str = "") -> None:
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            [said] = _told(address, user)
        except (FileNotFoundError, ConnectionRefusedError):
            said = None
        if said is not None and said.sqlstate == sqlstate and text in said.text:
            return
        assert time.monotonic() < deadline, said
        time.sleep(0.02)


def _assert_turned_away_alike(server: Server, guard: GuardProcess, sqlstate: str, user: str = USER) -> None:
    directly = _told(server.unix, user)
    assert [said.sqlstate for said in directly] == [sqlstate]
    for transport in ("tcp", "unix"):
        assert _told(guard.at(transport), user) == directly


def _serves(guard: GuardProcess) -> None:
    for address in (guard.tcp, guard.unix):
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                psycopg.connect(address.conninfo).close()
            except psycopg.OperationalError:
                assert time.monotonic() < deadline, guard.stderr
                time.sleep(0.02)
            else:
                break


def test_a_server_that_can_not_fork() -> None:
    """It says so in the form of protocol 2, since none has been agreed on; libpq shows that, and it is no fault."""
    bindir = next((bindir for bindir in installations().values() if bindir is not None), None)
    if bindir is None:
        not_installed("PostgreSQL")
    with mortal_server(bindir) as mortal, running_guard(mortal.server.unix, "--mode", "reject") as guard:
        with psycopg.connect(guard.tcp.conninfo) as before:
            limit = mortal.limit_processes("0")
            for address in (mortal.server.unix, guard.tcp, guard.unix):
                with pytest.raises(psycopg.OperationalError, match="could not fork new process for connection: "):
                    psycopg.connect(address.conninfo, sslmode="disable").close()
            mortal.limit_processes(limit)
            assert before.execute("SELECT 1").fetchone() == (1,)
        _serves(guard)
        guard.assert_no_faults()
