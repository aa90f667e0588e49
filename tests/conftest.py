"""Fixtures for tests against real servers."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Protocol, cast

import pytest

from pgguard.attribution import scout
from pgguard.attribution.ebpf.probe import ProbeUnavailable
from pgguard.attribution.transparency import start
from tests.guard_process import LIMITED, UNLIMITED, GuardProcess, running_guard
from tests.servers import Server, Transport, installations, not_installed, running_server

if TYPE_CHECKING:
    from collections.abc import Iterator

_INSTALLATIONS = installations()


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


@pytest.fixture(scope="session", params=_INSTALLATIONS)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A running PostgreSQL, in turn of each version that is installed."""
    bindir = _INSTALLATIONS[request.param]
    if bindir is None:
        not_installed(f"{request.param} PostgreSQL")
    with running_server(bindir) as running:
        yield running


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
def start_guard(server: Server, request: pytest.FixtureRequest) -> Iterator[StartGuard]:
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
