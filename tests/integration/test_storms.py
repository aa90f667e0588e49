"""Many connections that are misused at one moment, by real processes: no fault is lost, and a bystander is served."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psycopg
import pytest

from tests.integration.running import PROGRAMS, named_transport, running

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.conftest import StartGuard
    from tests.guard_process import GuardProcess
    from tests.servers import Address, Server, Transport

pytestmark = pytest.mark.parametrize("server", ["embedded"], indirect=True, scope="session")

MANY = 60
"""Connections; the server under test has 100 slots."""
LONGEST = 20.0
"""Seconds for which a bystander may wait, on a machine that is busy with other tests."""


class Bystander(threading.Thread):
    """Asks on a connection of its own, and measures how long the answers take."""

    def __init__(self, address: Address) -> None:
        super().__init__()
        self._connection = psycopg.connect(address.conninfo, autocommit=True)
        self._over = threading.Event()
        self.took: list[float] = []

    def run(self) -> None:
        with self._connection:
            while not self._over.wait(0.005):
                began = time.monotonic()
                self._connection.execute("SELECT 1")
                self.took.append(time.monotonic() - began)

    def stop(self) -> None:
        self._over.set()
        self.join()


@contextmanager
def bystander(address: Address) -> Iterator[Bystander]:
    one = Bystander(address)
    one.start()
    try:
        yield one
    finally:
        one.stop()


@pytest.fixture(autouse=True)
def _leave_the_server_as_it_was(server: Server, start_guard: StartGuard) -> Iterator[None]:
    """End what still runs for clients that are gone, which keeps slots, and which the guards would wait for."""
    assert callable(start_guard)  # whose guards are stopped after that
    yield
    others = "FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
    deadline = time.monotonic() + 30
    with psycopg.connect(server.unix.conninfo, autocommit=True) as connection:
        connection.execute(f"SELECT pg_terminate_backend(pid) {others}")
        while connection.execute(f"SELECT 1 {others}").fetchone():
            assert time.monotonic() < deadline
            time.sleep(0.02)


def times(guard: GuardProcess, kind: str) -> int:
    """How many faults of a kind have been recorded, those that were only counted with the next one included."""
    return sum(1 + fault["suppressed"] for fault in guard.faults(kind))


def wait_for_all(guard: GuardProcess, kind: str) -> None:
    deadline = time.monotonic() + 60
    while times(guard, kind) < MANY:
        assert time.monotonic() < deadline, f"{times(guard, kind)} of {MANY}: {guard.stderr}"
        time.sleep(0.05)


@named_transport
@pytest.mark.parametrize(
    ("storm", "kind"),
    [("busy", "request-while-busy"), ("killed", "unclean-close"), ("transaction", "idle-in-transaction")],
)
def test_none_of_many_faults_at_once_is_lost_and_a_bystander_is_served(
    start_guard: StartGuard, transport: Transport, tmp_path: Path, storm: str, kind: str
) -> None:
    guard = start_guard("--idle-in-transaction", "1")
    address = guard.at(transport)
    command: list[str | Path] = [sys.executable, PROGRAMS / "storm.py", storm, str(MANY)]
    with bystander(address) as other, running(command, address, tmp_path) as program:
        program.read()
        program.go_on()
        wait_for_all(guard, kind)
    assert max(other.took) < LONGEST


@pytest.mark.parametrize("transport", ["unix"], indirect=True)
@pytest.mark.parametrize(("storm", "kind"), [("busy", "request-while-busy"), ("terminate", "foreign-terminate")])
def test_all_of_many_sessions_are_rejected_at_once(
    start_guard: StartGuard, transport: Transport, tmp_path: Path, storm: str, kind: str
) -> None:
    # How grave it is depends on the driver, which a busy guard has had no time to look for.
    (tmp_path / "guard.toml").write_text('mode = "reject"\n[kinds]\nrequest-while-busy = "reject"\n')
    guard = start_guard("--config", str(tmp_path / "guard.toml"))
    address = guard.at(transport)
    command: list[str | Path] = [sys.executable, PROGRAMS / "storm.py", storm, str(MANY)]
    with (
        bystander(address) as other,
        running(command, address, tmp_path, environ={"STORM_SECONDS": "60"}) as program,
    ):
        program.read()
        program.go_on()
        assert program.read()["ended"] == MANY
        wait_for_all(guard, kind)
    assert {fault["action"] for fault in guard.faults(kind)} == {"rejected"}
    assert max(other.took) < LONGEST


@pytest.mark.parametrize("transport", ["sampled", "unix"], indirect=True)
def test_many_goodbyes_at_once_are_nobodys_fault(start_guard: StartGuard, transport: Transport, tmp_path: Path) -> None:
    guard = start_guard()
    address = guard.at(transport)
    command: list[str | Path] = [sys.executable, PROGRAMS / "storm.py", "goodbye", str(MANY)]
    with bystander(address) as other, running(command, address, tmp_path) as program:
        program.read()
        program.go_on()
        program.read()
    assert max(other.took) < LONGEST
    guard.assert_no_faults()
