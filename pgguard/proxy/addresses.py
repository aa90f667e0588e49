"""Where the guard listens and where PostgreSQL is, read from what users write."""

from __future__ import annotations

import ipaddress
import os
import re
import shlex
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from psycopg import pq

from pgguard.attribution.trust import TRUST_REMEDY, distrust_path
from pgguard.proxy.conninfo import read_connection_string
from pgguard.proxy.errors import ConfigurationError
from pgguard.proxy.server_tls import ServerTls, SslMode, TlsSettings, read_tls

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

DEFAULT_PORT: Final = 5432
_TO_CONNECT: Final = 10.0
"""Seconds for an address to accept a connection where nothing is said of it: libpq would wait for as long as the system
does, which is minutes."""
SOCKET_DIRECTORIES: Final = ("/var/run/postgresql", "/tmp")  # noqa: S108 - where Debian's and PostgreSQL's own libpq look
_ATTRIBUTES: Final = frozenset({"read-write", "read-only", "primary", "standby", "prefer-standby"})
"""What ``target_session_attrs`` may ask for, but for ``any``: "Parameter Key Words" in the chapter on libpq."""
_NO_HOST: Final = re.compile(r"[@/?#\s]")
_SUN_PATH_LIMIT: Final = 107  # unix(7): sun_path, less its terminator


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A host name or address and a port."""

    host: str
    port: int
    named: str | None = field(default=None, compare=False)
    """By which name it is known, where the host is a number that was given beside it (``hostaddr``): nothing if there
    is none. ``None``: by the host."""

    @property
    def certified_name(self) -> str:
        """The name that its certificate has to be for; empty if nobody has said one."""
        return self.host if self.named is None else self.named

    def __str__(self) -> str:
        return written(self.host, self.port)


def written(host: str, port: int) -> str:
    """A host and a port, as one writes them."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A directory and the port that names the socket in it; an abstract name begins with ``@``."""

    directory: str
    port: int

    @property
    def path(self) -> str:
        """The socket's path, or its abstract name with the leading NUL."""
        path = f"{self.directory}/.s.PGSQL.{self.port}"
        return "\0" + path[1:] if path.startswith("@") else path

    def __str__(self) -> str:
        return f"unix:{self.directory}:{self.port}"


Address = TcpAddress | UnixAddress


@dataclass(frozen=True, slots=True)
class Upstream:
    """Where PostgreSQL is: addresses to try in order."""

    addresses: tuple[Address, ...]
    connect_timeout: float | None
    """Seconds for each address, TLS included, as they were given. ``None``: what has accepted a connection is waited
    for without end, as libpq does."""
    tls: ServerTls | None = field(default=None, compare=False)
    """How connections over TCP are encrypted; ``None``: they aren't."""
    peer: str = ""
    """The user that a server on a Unix socket has to run as: ``requirepeer``; nothing: any."""
    remark: str | None = None
    """What was made of what the user wrote, where that has to be said."""

    @property
    def seconds_to_connect(self) -> float:
        """For each address to accept a connection."""
        return _TO_CONNECT if self.connect_timeout is None else self.connect_timeout

    def __str__(self) -> str:
        return ", ".join(map(str, self.addresses))


def parse_listen(text: str) -> Address:
    """Read ``HOST:PORT``, ``[IPV6]:PORT``, ``unix:DIR`` or ``unix:DIR:PORT``.

    Raises:
        ConfigurationError: it is none of these.
    """
    if text.startswith("unix:"):
        directory, colon, port = text.removeprefix("unix:").rpartition(":")
        if not colon:
            directory, port = port, str(DEFAULT_PORT)
        if not directory:
            raise ConfigurationError(f"--listen {text}: name the socket's directory, as in unix:/run/pgguard:5432")
        unix = UnixAddress(directory, _port(port, f"--listen {text}", may_be_shown=False))
        if len(os.fsencode(unix.path)) > _SUN_PATH_LIMIT:
            raise ConfigurationError(
                f"--listen {text}: the socket's path is too long for the system: use a shorter DIR"
            )
        return unix
    return _parse_tcp(text, f"--listen {text}", "HOST:PORT or unix:DIR[:PORT], as in 127.0.0.1:6544")


def parse_admin(text: str) -> TcpAddress:
    """Read ``HOST:PORT`` or ``[IPV6]:PORT``, of ``--admin``.

    Raises:
        ConfigurationError: it is neither.
    """
    return _parse_tcp(text, f"--admin {text}", "HOST:PORT, as in 127.0.0.1:9187")


def _parse_tcp(text: str, where: str, form: str) -> TcpAddress:
    """Read an address; ``form`` is what it looks like. Raises ConfigurationError."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or "/" in text or (host.startswith("[") and not host.endswith("]")):
        raise ConfigurationError(f"{where}: write {form}")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ConfigurationError(f"{where}: put the IPv6 address in brackets, as in [::1]:6544")
    return TcpAddress(host.strip("[]"), _port(port, where, may_be_shown=False))


_DIGITS: Final = 10
"""Of a number, at most: what a C int has, in decimal."""


def _port(text: str, where: str, *, may_be_shown: bool) -> int:
    # A number of thousands of digits isn't even read.
    if not text.isascii() or not text.isdigit() or len(text) > _DIGITS or int(text) > 65535:
        shown = repr(text) if may_be_shown else "the port"
        raise ConfigurationError(f"{where}: {shown} is not a port number: write one from 0 to 65535")
    return int(text)


def _checked_host(host: str) -> str:
    """Refuse what can't be a host and may hold a password, before it can get into a message."""
    if _NO_HOST.search(host):
        raise ConfigurationError(
            "--upstream: the host can only be a name or an address: leave out the user, and anything else"
        )
    if ":" in host:
        try:
            ipaddress.ip_address(host.partition("%")[0])
        except ValueError:
            raise ConfigurationError("--upstream: the host has a colon in it: write the port as port=PORT") from None
    return host


def parse_upstream(conninfo: str) -> Upstream:
    """Read a libpq connection string or URI, or another library's, with libpq's variables and defaults behind it.

    Only where the server is matters; user, database and password are each client's own.

    Raises:
        ConfigurationError: it can't be read, or a file that it names can't. The message holds no password.
    """
    read = read_connection_string(conninfo)
    given = read.settings
    # What libpq takes for granted depends on both: sslmode is verify-full with sslrootcert=system.
    with _variable("PGSERVICE", given.pop("service", None)), _variable("PGSSLROOTCERT", given.get("sslrootcert")):
        defaults = _defaults()
    settings = defaults | given
    tls = read_tls(settings)
    addresses = tuple(addresses_of(settings, may_be_shown=not read.may_hold_secrets))
    keys = "--upstream: pgguard ignores sslkeylogfile" if settings.get("sslkeylogfile") else None
    remarks = filter(None, (read.remark, keys, _remark_on_attributes(settings.get("target_session_attrs", ""))))
    timeout = _connect_timeout(settings, may_be_shown=not read.may_hold_secrets)
    return Upstream(
        addresses,
        timeout,
        _tls_to(addresses, tls),
        settings.get("requirepeer") or "",
        "; ".join(remarks) or None,
    )


def _tls_to(addresses: Sequence[Address], settings: TlsSettings) -> ServerTls | None:
    """What it takes for TLS to these addresses. Raises ConfigurationError."""
    over_tcp = [address for address in addresses if isinstance(address, TcpAddress)]
    if settings.mode is SslMode.DISABLE or not over_tcp:
        return None
    if settings.mode is SslMode.VERIFY_FULL and not all(address.certified_name for address in over_tcp):
        raise ConfigurationError(
            "--upstream: sslmode=verify-full checks the server's name, and there is only its address (hostaddr): give "
            "its name, too, as host=NAME"
        )
    return ServerTls(settings)


def unused_database_url(upstream: Upstream, listening: Sequence[Address]) -> str | None:
    """What to say if ``DATABASE_URL`` names another PostgreSQL than the guard's, which hasn't been told where it is.

    Nothing if it names the guard, as it should for the guard's clients, or another database's server. A sentence
    without its stop; no user, password or database is in it.
    """
    text = os.environ.get("DATABASE_URL", "")
    try:
        given = read_connection_string(text).settings if text else {}
        given.pop("service", None)
        addresses = tuple(addresses_of(given, may_be_shown=False)) if given else ()
    except ConfigurationError:
        return None  # it isn't PostgreSQL's, or nobody can connect with it
    places = {_place(address) for address in addresses}
    if not places or places == set(map(_place, upstream.addresses)) or places <= set(map(_place, listening)):
        return None
    return (
        f"DATABASE_URL is set, but pgguard serve doesn't use it. To guard the server in DATABASE_URL instead of "
        f"{upstream}, add --upstream {conninfo_of(addresses)}"
    )


def _place(address: Address) -> Address:
    """An address by one of the names that it goes by on this host."""
    if isinstance(address, TcpAddress) and address.host in {"localhost", "127.0.0.1", "::1", "0.0.0.0"}:  # noqa: S104 - compared
        return TcpAddress("localhost", address.port)
    return address


def conninfo_of(addresses: Sequence[Address]) -> str:
    """What ``--upstream`` takes for these addresses, to be typed into a shell."""
    hosts = [address.host if isinstance(address, TcpAddress) else address.directory for address in addresses]
    if all(isinstance(address, TcpAddress) for address in addresses):
        return f"postgresql://{','.join(map(str, addresses))}"
    ports = ",".join(str(address.port) for address in addresses)
    return shlex.quote(f"host={','.join(hosts)} port={ports}")


def _remark_on_attributes(wanted: str) -> str | None:
    """What is to be said of a wish that only a login could fulfil, which is each client's own."""
    if wanted not in _ATTRIBUTES:
        return None
    return (
        f"--upstream: target_session_attrs={wanted} can't be checked without logging in, so pgguard ignores it and "
        "uses the first host that accepts connections: name only hosts that fit"
    )


def _defaults() -> dict[str, str]:
    """What libpq would fill in from its ``PG*`` variables and, where one is named, a service file."""
    if "PGSERVICE" in os.environ:
        _trust_service_files()
        _check_service()
    options = pq.Conninfo.get_defaults()
    return {option.keyword.decode(): os.fsdecode(option.val) for option in options if option.val}


@contextmanager
def _variable(name: str, value: str | None) -> Iterator[None]:
    """Let libpq know something of what was given, if it was, for its defaults: of that it looks at variables alone."""
    if value is None:
        yield
        return
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _trust_service_files() -> None:
    """See to it that nobody else says where the server is, in what libpq takes for its service files.

    "The Connection Service File" in the chapter on libpq.
    """
    places = [Path(os.environ.get("PGSERVICEFILE") or "~/.pg_service.conf")]
    if "PGSYSCONFDIR" in os.environ:
        places.append(Path(os.environ["PGSYSCONFDIR"], "pg_service.conf"))
    for path in places:
        reason = None
        with suppress(OSError, RuntimeError):  # it isn't there, or nobody knows where that is: libpq will say so
            reason = distrust_path(path.expanduser())
        if reason is not None:
            raise ConfigurationError(f"--upstream: the service file {path} is not read: {reason}: {TRUST_REMEDY}")


def _check_service() -> None:
    """See to it that there is such a service: asked for defaults alone, libpq passes over one that it can't find."""
    # Of a connection string that it can read libpq takes over all settings before it refuses this one.
    attempt = pq.PGconn.connect_start(b"sslmode=''")
    try:
        if all(option.val is None for option in attempt.info if option.keyword == b"sslmode"):
            raise ConfigurationError(f"--upstream: {attempt.get_error_message().strip()}")
    finally:
        attempt.finish()


def addresses_of(settings: Mapping[str, str], *, may_be_shown: bool) -> Iterator[Address]:
    """Where the hosts and ports of a connection string's settings lead, in order; none is libpq's default.

    Args:
        settings: By libpq's keywords: ``host``, ``hostaddr`` and ``port``, each for several servers if it has commas.
        may_be_shown: No password can be in them.

    Raises:
        ConfigurationError: They can't be read.
    """
    hosts = _hosts(settings)
    ports = (settings.get("port") or str(DEFAULT_PORT)).split(",")
    if len(ports) == 1:
        ports *= len(hosts)
    if len(ports) != len(hosts):
        raise ConfigurationError(
            f"--upstream: {len(ports)} ports for {len(hosts)} hosts: give one port, or one for each host"
        )
    for (host, name), text in zip(hosts, ports, strict=True):
        port = _port(text or str(DEFAULT_PORT), "--upstream", may_be_shown=may_be_shown)
        if host.startswith(("/", "@")):
            yield UnixAddress(host, port)
        elif host:
            yield TcpAddress(_checked_host(host), port, None if name is None else _checked_host(name))
        else:
            yield _default_address(port)


def _hosts(settings: Mapping[str, str]) -> list[tuple[str, str | None]]:
    """The hosts in order, each by its address where that is given: ``connectOptions2()`` in ``fe-connect.c``.

    Beside an address stands the host's name, or nothing if it isn't given.
    """
    hosts = (settings.get("host") or "").split(",")
    addresses = (settings.get("hostaddr") or "").split(",")
    if not any(addresses):
        return [(host, None) for host in hosts]
    if any(hosts) and len(hosts) != len(addresses):
        raise ConfigurationError(
            f"--upstream: {len(addresses)} addresses (hostaddr) for {len(hosts)} hosts: give one for each host"
        )
    for address in filter(None, addresses):
        try:
            ipaddress.ip_address(address)
        except ValueError:
            raise ConfigurationError("--upstream: hostaddr is not an IP address: give a name as host=NAME") from None
    names = hosts if any(hosts) else [""] * len(addresses)
    return [
        (address, "" if name.startswith(("/", "@")) else name) if address else (name, None)
        for address, name in zip(addresses, names, strict=True)
    ]


def _default_address(port: int) -> Address:
    """The socket that libpq would use where no host is given, or TCP to this host if there is no such socket."""
    for directory in SOCKET_DIRECTORIES:
        address = UnixAddress(directory, port)
        if Path(address.path).exists():
            return address
    return TcpAddress("localhost", port)


def _connect_timeout(settings: dict[str, str], *, may_be_shown: bool) -> float | None:
    """Seconds as ``connect_timeout`` says; 0, negative or nothing stands for no limit, as in libpq."""
    text = settings.get("connect_timeout", "0")
    try:
        seconds = int(text if len(text) <= _DIGITS else "")
    except ValueError:
        shown = f"connect_timeout={text}" if may_be_shown else "connect_timeout"
        raise ConfigurationError(f"--upstream: {shown} is not a number of seconds") from None
    return float(seconds) if seconds > 0 else None
