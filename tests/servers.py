"""Real PostgreSQL servers to test against: which there are, and one of each, running."""

from __future__ import annotations

import os
import socket
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

import pytest
from psycopg.conninfo import make_conninfo

from pgguard.demo.postgres import NotInstalledError, embedded_bindir, running_cluster

if TYPE_CHECKING:
    from collections.abc import Iterator

Transport = Literal["tcp", "probed", "sampled", "unix"]
"""How a client reaches the guard: over TCP, where the kernel names senders if it can; where it certainly does; where it
certainly doesn't; or over a Unix socket."""

_USER = "postgres"
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "max_connections": "100",
    "wal_level": "logical",
    "max_wal_senders": "10",
    "max_replication_slots": "10",
}


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server, or a guard in front of one, accepts connections."""

    host: str
    """An address, or the directory of a Unix socket."""
    port: int

    @property
    def conninfo(self) -> str:
        return make_conninfo(host=self.host, port=self.port, user=_USER, dbname=_USER)

    def environ(self) -> dict[str, str]:
        """The environment for a client, without anything about PostgreSQL that the tests were started with."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        own = {"PGHOST": self.host, "PGPORT": str(self.port), "PGUSER": _USER, "PGDATABASE": _USER}
        return inherited | own | {"LC_ALL": "C.UTF-8"}


@dataclass(frozen=True, slots=True)
class Server:
    """A running PostgreSQL with a cluster of its own, and the client programs of the same version."""

    bindir: Path
    tcp: Address
    unix: Address

    def at(self, transport: Transport) -> Address:
        return self.unix if transport == "unix" else self.tcp


def installations() -> dict[str, Path | None]:
    """The PostgreSQL installations to test against, by name: the embedded one and Debian's; ``None`` if not there."""
    try:
        embedded = embedded_bindir()
    except NotInstalledError:
        embedded = None
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    debian = {f"debian-{postgres.parts[-3]}": postgres.parent for postgres in found}
    return {"embedded": embedded, **(debian or {"debian": None})}


REQUIRE_ALL = os.environ.get("PGGUARD_REQUIRE_ALL") == "1"
"""Everything has to be there that tests need, and what they make up is the same each time: for CI."""


def needs(what: str, *, found: object) -> pytest.MarkDecorator:
    """A mark for a test that needs it: skip it if it wasn't found; let it fail where everything has to be there."""
    return pytest.mark.skipif(not found and not REQUIRE_ALL, reason=f"{what} is not installed")


def is_open_to_others() -> bool:
    """Whether other users can run what is installed here: it may be in somebody's home directory."""
    return all(directory.stat().st_mode & 0o001 for directory in Path(sys.executable).parents)


def not_installed(what: str) -> NoReturn:
    """Skip the test that needs it; fail where PGGUARD_REQUIRE_ALL says that everything has to be there, as in CI."""
    if REQUIRE_ALL:
        pytest.fail(f"{what} is not installed")
    pytest.skip(f"{what} is not installed")


@contextmanager
def running_server(bindir: Path) -> Iterator[Server]:
    """Run a server of that installation, on a free port of the loopback address and on a Unix socket."""
    with running_cluster(bindir, port=free_port(), settings=_SETTINGS, timeout=60) as cluster:
        tcp = Address("127.0.0.1", cluster.port)
        yield Server(cluster.bindir, tcp, Address(str(cluster.socket_dir), cluster.port))


def free_port() -> int:
    """A port of the loopback address that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
