"""Servers and guards with TLS, started once for all tests that a worker runs here."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Protocol

import pytest

from tests.guard_process import GuardProcess, running_guard
from tests.servers import not_installed
from tests.tls.servers import all_papers, bindirs, running_tls_server

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.tls.certificates import Pair
    from tests.tls.servers import Papers, TlsServer


@pytest.fixture(scope="session", autouse=True)
def _no_files_of_ones_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """libpq, and a guard, find no certificates in the home directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session")
def papers() -> Iterator[Papers]:
    """All certificates."""
    with all_papers() as papers:
        yield papers


@pytest.fixture(scope="session")
def tls_server(papers: Papers) -> Iterator[TlsServer]:
    """A server that offers TLS, with a certificate that is in order."""
    for bindir in bindirs().values():
        with running_tls_server(bindir, papers, papers.server) as server:
            yield server
        return
    not_installed("a PostgreSQL with OpenSSL")


@pytest.fixture(scope="session")
def reference(papers: Papers) -> Iterator[TlsServer]:
    """Another one, which a test may have offer anything, to compare a guard with."""
    for bindir in bindirs().values():
        with running_tls_server(bindir, papers, None) as server:
            yield server
        return
    not_installed("a PostgreSQL with OpenSSL")


class StartTlsGuard(Protocol):
    """Starts a guard, or returns one that has been started with the same options.

    ``upstream``: settings of its connections to the server. ``shown``: the certificate that its clients are shown.
    """

    def __call__(self, upstream: str = ..., shown: Pair | None = ..., *options: str) -> GuardProcess: ...


@pytest.fixture(scope="session")
def kept_guard(tls_server: TlsServer, _heated: None) -> Iterator[StartTlsGuard]:
    """Keeps guards in front of the server for all tests."""
    kept: dict[tuple[object, ...], GuardProcess] = {}
    with ExitStack() as stack:

        def start(upstream: str = "sslmode=require", shown: Pair | None = None, *options: str) -> GuardProcess:
            if (upstream, shown, options) not in kept:
                guard = tls_guard(tls_server, upstream, shown, *options)
                kept[upstream, shown, options] = stack.enter_context(guard)
            return kept[upstream, shown, options]

        yield start


@contextmanager
def tls_guard(
    server: TlsServer, upstream: str, shown: Pair | None, *options: str, probe: bool = True
) -> Iterator[GuardProcess]:
    """Run a guard in front of a server; see :class:`StartTlsGuard`."""
    where = f"host={server.tcp.host} port={server.tcp.port} {upstream}"
    offer = ("--tls-cert", str(shown.cert), "--tls-key", str(shown.key)) if shown else ()
    with running_guard(where, *offer, *options, probe=probe) as guard:
        yield guard
