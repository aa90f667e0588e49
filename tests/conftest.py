"""Fixtures for tests against real servers."""

from __future__ import annotations

import fcntl
import functools
import os
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Protocol, cast

import pytest
from hypothesis import HealthCheck, settings

from pgguard.attribution import scout
from pgguard.attribution.ebpf.probe import ProbeUnavailable
from pgguard.attribution.transparency import start
from pgguard.compiled import form
from tests import warm
from tests.guard_process import LIMITED, UNLIMITED, GuardProcess, running_guard
from tests.servers import REQUIRE_ALL, Server, Transport, installations, not_installed, running_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

collect_ignore = ["integration/programs"]
"""What tests run, also as tests, but not of pgguard."""

_INSTALLATIONS = installations()

_WITH_THE_SYSTEM = ("soak", "integration", "pytest_plugin", "tls", "proxy", "attribution")
"""The rooms whose tests may ask the kernel, those with the longest first."""
_LONGEST_FIRST = (*_WITH_THE_SYSTEM, "cli", "fuzz", "session", "secrets", "reporting")
"""All rooms with a file that takes seconds."""
_PROGRAMS = {
    "multiprocessing",
    "subprocess",
    "tests.attribution.puppets",
    "tests.guard_process",
    "tests.integration.running",
    "tests.proxy.spawned",
}
"""The modules that start other programs."""
_RUNNING = {"puppet", "server", "pytester"}
"""The fixtures that are some."""
_AGAIN = 2


_FORM = os.environ.get("PGGUARD_TESTED_FORM")
"""``compiled`` or ``pure``, if the tests must run in this form."""


def pytest_configure() -> None:
    """Test what is meant to be tested; and keep bytecode, even where that isn't the custom, as many guards are started.

    Raises:
        pytest.UsageError: Other sources than these would be tested, or another form than is wanted.
    """
    found = form()
    if found.stale or (found.compiled and found.pure) or _FORM not in {None, "compiled" if found.compiled else "pure"}:
        raise pytest.UsageError(
            f"pgguard is {found}: install it anew, with PGGUARD_BUILD={_FORM or 'pure or compiled'}"
        )
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False


# How long an example takes is the machine's affair.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
# What CI says depends on the change alone. Who runs the tests by hand tries other examples each time.
settings.register_profile("ci", settings.get_profile("busy"), derandomize=True, database=None)
settings.load_profile("ci" if REQUIRE_ALL else "busy")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run a test again that has failed, at most twice, if other programs take part in it.

    Who of them runs when is up to the kernel, and on a busy machine a guard can come too late to see what it sees on
    any other. This is a net for that, and no excuse: a test waits for events, and what it expects holds whoever runs
    when. What fails every time fails, each failure is shown, and their number in a run is bounded: pyproject.toml.

    Tests of rooms that do no I/O have one chance only; so have those whose clock is their own, one that hangs, and
    those that say so, as they try something else each time.
    """
    # What takes longest begins first, so that in the end no worker is left alone with it.
    items.sort(key=lambda item: _rank(item.path.parent.name))
    for item in items:
        if _is_up_to_the_system(item) and item.get_closest_marker("flaky") is None:
            item.add_marker(pytest.mark.flaky(reruns=_AGAIN, reruns_delay=1, rerun_except="^Failed: Timeout"))


def _rank(room: str) -> int:
    return _LONGEST_FIRST.index(room) if room in _LONGEST_FIRST else len(_LONGEST_FIRST)


def _is_up_to_the_system(item: pytest.Item) -> bool:
    if not isinstance(item, pytest.Function) or item.path.parent.name not in _WITH_THE_SYSTEM:
        return False
    if "autojump_clock" in item.fixturenames:
        return False
    used = [getattr(one, "__module__", getattr(one, "__name__", "")) for one in vars(item.module).values()]
    return not _RUNNING.isdisjoint(item.fixturenames) or not _PROGRAMS.isdisjoint(used)


class StartGuard(Protocol):
    """Starts a guard in front of the server under test, with more options for ``pgguard serve``.

    ``unlimited``: it records every fault in full, however often its cause comes.
    """

    def __call__(self, *options: str, unlimited: bool = False) -> GuardProcess: ...


@pytest.fixture(scope="session", autouse=True)
def _scout() -> Iterator[None]:
    """The child that looks into other processes' directories is there all the time, so that no test has left it."""
    scout.start()
    yield
    scout.close()


@pytest.fixture(scope="session", autouse=True)
def _warm() -> Iterator[None]:
    """The processes that start guards are ended with the tests."""
    yield
    warm.close()


@pytest.fixture(scope="session")
def _heated() -> None:
    """The one that starts the guards of most tests is there before any test, so that no test has left it."""
    warm.heat()


@pytest.fixture
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Of the tests that use this, one runs at a time, whatever workers there are: some crowd the machine for others."""
    with (tmp_path_factory.getbasetemp().parent / "alone").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def _servers() -> Iterator[Callable[[Path], Server]]:
    """Starts a server when it is asked for, and keeps it: a worker's files come back to each version in turn."""
    with ExitStack() as stack:
        yield functools.cache(lambda bindir: stack.enter_context(running_server(bindir)))


@pytest.fixture(scope="session", params=_INSTALLATIONS)
def server(request: pytest.FixtureRequest, _servers: Callable[[Path], Server]) -> Server:
    """A running PostgreSQL, in turn of each version that is installed."""
    bindir = _INSTALLATIONS[request.param]
    if bindir is None:
        not_installed(f"{request.param} PostgreSQL")
    return _servers(bindir)


@pytest.fixture(params=["tcp", "unix"])
def transport(request: pytest.FixtureRequest) -> Transport:
    """How the client reaches the guard."""
    if request.param == "probed":
        try:
            start([], insist=False)[0].close()
        except ProbeUnavailable as unavailable:
            pytest.skip(str(unavailable))
    return cast("Transport", request.param)


@pytest.fixture
def start_guard(server: Server, _heated: None, request: pytest.FixtureRequest) -> Iterator[StartGuard]:
    """Start guards that are stopped, and have to end well, when the test is over."""
    sampled = "transport" in request.fixturenames and request.getfixturevalue("transport") == "sampled"
    # Nobody but root has what is taken away.
    probe = not sampled or os.geteuid() != 0
    with ExitStack() as stack:

        def start(*options: str, unlimited: bool = False) -> GuardProcess:
            program = UNLIMITED if unlimited else LIMITED
            return stack.enter_context(running_guard(server.unix, *options, probe=probe, program=program))

        yield start


@pytest.fixture
def guard(start_guard: StartGuard) -> GuardProcess:
    """A guard in ``log`` mode in front of the server under test."""
    return start_guard("--mode", "log")
