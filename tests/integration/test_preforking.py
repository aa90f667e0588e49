"""Servers that fork their workers: what a pool opened too early does there, who did it, and that the cure works."""

from __future__ import annotations

import http.client
import re
import shutil
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Thread
from typing import TYPE_CHECKING

import pytest

from tests.integration.running import PROGRAMS, Program, every_transport, interpreter, named, running
from tests.servers import not_installed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from tests.conftest import StartGuard
    from tests.guard_process import Fault, GuardProcess
    from tests.servers import Address, Transport

pytestmark = pytest.mark.parametrize("server", ["embedded"], indirect=True, scope="session")

LIBPQ = re.compile(r"message type 0x[0-9a-f]{2} arrived from server while idle")
CORRECT_REQUESTS = 10_000


@dataclass(slots=True)
class Load:
    """What became of some HTTP requests, each of which asks to be told its own number."""

    answered: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    """Another's answer, an error page, or none in time."""


class WebServer:
    """A running web server with two workers, known by what it writes to its log: where it listens, and who they are."""

    def __init__(self, program: Program, listening: str, booted: str) -> None:
        self.program = program
        self.workers = {int(pid) for pid in program.wait_for(booted, count=2)}
        [port] = program.wait_for(listening)
        self._port = int(port)

    @property
    def master(self) -> int:
        return self.program.pid

    def load(
        self,
        requests: int,
        *,
        clients: int = 8,
        seconds: float = 60.0,
        patience: float = 10.0,
        enough: Callable[[], bool] = lambda: False,
    ) -> Load:
        """Send requests from several clients at once, until there are enough or the time is over.

        Args:
            requests: how many.
            clients: how many of them are on their way at once.
            seconds: after which no more are sent.
            patience: seconds to wait for an answer, as a worker whose answer another one has read may never give one.
            enough: whether there need be no more of them.
        """
        load = Load()
        numbers = iter(range(1, requests + 1))
        deadline = time.monotonic() + seconds

        def ask_on() -> None:
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=patience)
            for number in numbers:
                if time.monotonic() > deadline or enough():
                    break
                try:
                    connection.request("GET", f"/?{number}")
                    answer = connection.getresponse().read().decode()
                except (OSError, http.client.HTTPException) as error:
                    answer = repr(error)
                    connection.close()
                if answer == str(number):
                    load.answered.append(number)
                else:
                    load.wrong.append(f"{number}: {answer}")
            connection.close()

        threads = [Thread(target=ask_on) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return load


@contextmanager
def puma(settings: str, address: Address, directory: Path) -> Iterator[WebServer]:
    interpreter("ruby", "-rpg", "-rsequel", "-rpuma")
    command = shutil.which("puma") or not_installed("Puma")
    # It prints some of what it says to standard output, which nobody reads, and its library to standard error.
    settings_file, application = PROGRAMS / "puma" / f"{settings}.rb", PROGRAMS / "puma" / "config.ru"
    shell = ("sh", "-c", 'exec "$0" -C "$@" >&2', command, settings_file, application)
    with running(shell, address, directory) as program:
        yield WebServer(program, r"Listening on http://127\.0\.0\.1:(\d+)", r"Worker \d \(PID: (\d+)\) booted")


@contextmanager
def gunicorn(worker: Sequence[str], settings: str | None, address: Address, directory: Path) -> Iterator[WebServer]:
    config = str(PROGRAMS / f"{settings}.py") if settings else "/dev/null"
    command = (sys.executable, "-m", "gunicorn", "--config", config, "--preload", "--bind", "127.0.0.1:0")
    options = ("--workers", "2", *worker, "--chdir", str(PROGRAMS), "--timeout", "60", "gunicorn_app:application")
    with running([*command, *options], address, directory) as program:
        yield WebServer(program, r"Listening at: http://127\.0\.0\.1:(\d+)", r"Booting worker with pid: (\d+)")


def named_by_the_kernel(guard: GuardProcess) -> set[int]:
    """The processes that the kernel has named as sharing a connection, thread and all."""
    return {
        culprit["pid"]
        for fault in guard.faults("shared-by-processes")
        for culprit in fault["culprits"]
        if culprit["evidence"] == culprit["tid_evidence"] == "kernel-sender" and culprit["role"] != "owner"
    }


@dataclass(slots=True)
class Misuse:
    """What a guard found of a pool that workers share."""

    shared: list[Fault]
    log: str
    """The server's."""
    complete: bool
    """Whether all of it has shown."""


def misuse(server: WebServer, guard: GuardProcess, *conditions: Callable[[], object]) -> Misuse:
    """Send a few hundred requests, and more if not all of it has shown yet."""
    complete, shared = False, []
    for _ in range(8):
        server.load(300, seconds=3, patience=1)
        shared = guard.faults("shared-by-processes")
        everybody = server.workers <= named(shared) and named(shared, "owner") == {server.master}
        if complete := everybody and all(shown() for shown in conditions):
            break
    assert all(fault["severity"] == "error" for fault in shared)
    assert named(shared, "owner") <= {server.master}
    return Misuse(shared, server.program.log, complete)


def first_complete(trial: Callable[[], Misuse]) -> Misuse:
    """Start the server anew until all has shown.

    What becomes of a shared connection is chance. The first error to hit it may end it, and then there is no sharing
    left to be seen.
    """
    found = trial()
    for _ in range(3):
        if found.complete:
            break
        found = trial()
    assert found.complete, f"not all of the sharing has shown: {found.shared}\n{found.log}"
    return found


def errors(guard: GuardProcess) -> list[Fault]:
    """Stop the guard, so that nothing is still to come, and return what it calls an error."""
    guard.stop()
    return [fault for fault in guard.faults() if fault["severity"] == "error"]


@every_transport
def test_puma_workers_with_the_masters_pool_are_named(
    start_guard: StartGuard, transport: Transport, tmp_path: Path
) -> None:
    def trial() -> Misuse:
        guard = start_guard()
        with puma("preloaded", guard.at(transport), tmp_path) as server:
            return misuse(
                server,
                guard,
                lambda: LIBPQ.search(server.program.log),  # what its users see, and search for
                lambda: transport != "probed" or server.workers <= named_by_the_kernel(guard),
            )

    shared = first_complete(trial).shared
    names = {culprit["thread_name"] for fault in shared for culprit in fault["culprits"]} - {None}
    assert any(name.startswith("puma srv tp") for name in names), names
    assert "before_fork" in shared[0]["advice"]["text"]


def test_puma_that_disconnects_before_it_forks_is_left_alone(
    guard: GuardProcess, transport: Transport, tmp_path: Path
) -> None:
    with puma("corrected", guard.at(transport), tmp_path) as server:
        load = server.load(CORRECT_REQUESTS)
    assert load.wrong == []
    assert len(load.answered) == CORRECT_REQUESTS
    assert errors(guard) == []


WORKERS = [
    pytest.param(["--worker-class", "sync"], id="sync"),
    pytest.param(["--worker-class", "gthread", "--threads", "5"], id="gthread"),
]


@every_transport
@pytest.mark.parametrize("worker", WORKERS)
def test_gunicorn_workers_with_the_preloaded_engine_are_named(
    worker: list[str], start_guard: StartGuard, transport: Transport, tmp_path: Path
) -> None:
    def trial() -> Misuse:
        guard = start_guard()
        with gunicorn(worker, None, guard.at(transport), tmp_path) as server:
            return misuse(server, guard, lambda: transport != "probed" or server.workers <= named_by_the_kernel(guard))

    assert "post_fork" in first_complete(trial).shared[0]["advice"]["text"]


@pytest.mark.parametrize("worker", WORKERS[1:])
def test_gunicorn_that_disposes_of_the_engine_after_the_fork_is_left_alone(
    worker: list[str], guard: GuardProcess, transport: Transport, tmp_path: Path
) -> None:
    with gunicorn(worker, "gunicorn_corrected", guard.at(transport), tmp_path) as server:
        load = server.load(1000)
    assert load.wrong == []
    assert len(load.answered) == 1000
    assert errors(guard) == []
