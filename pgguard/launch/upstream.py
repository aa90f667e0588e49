"""Where the server is that a command uses, and where a guard listens for it, when nobody has said so."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pgguard.launch.environment import named_servers
from pgguard.proxy.addresses import UnixAddress, conninfo_of, parse_upstream
from pgguard.proxy.errors import ConfigurationError, NotPostgresError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pgguard.proxy.addresses import Address, Upstream
    from pgguard.proxy.settings import Settings

_URL: Final = "DATABASE_URL"
_PLACES: Final = ("PGHOST", "PGHOSTADDR", "PGPORT", "PGSERVICE")
"""Variables of libpq that say where a server is."""
_TLS_VARIABLES: Final = {
    "sslmode": "PGSSLMODE",
    "sslnegotiation": "PGSSLNEGOTIATION",
    "sslcertmode": "PGSSLCERTMODE",
    "ssl_min_protocol_version": "PGSSLMINPROTOCOLVERSION",
    "ssl_max_protocol_version": "PGSSLMAXPROTOCOLVERSION",
    "sslrootcert": "PGSSLROOTCERT",
    "sslcrldir": "PGSSLCRLDIR",
    "sslcrl": "PGSSLCRL",
    "sslcert": "PGSSLCERT",
    "sslkey": "PGSSLKEY",
}
_VARIABLES: Final = _TLS_VARIABLES | {
    "gssencmode": "PGGSSENCMODE",
    "connect_timeout": "PGCONNECT_TIMEOUT",
    "service": "PGSERVICE",
    "hostaddr": "PGHOSTADDR",
    "port": "PGPORT",
    "host": "PGHOST",
}
"""By a word in what is wrong, which of libpq's variables may have said it."""
_ANYWHERE: Final = frozenset({*_TLS_VARIABLES, "gssencmode", "connect_timeout"})
"""Those that count too where something else says where the server is, unless it says them itself."""
_WORD: Final = re.compile(r"\w+")
_UNREADABLE: Final = ('a "=" is missing', 'missing "="', "invalid connection option")
_SHOWN: Final = 3
"""Servers that are named, at most, to somebody who has to choose."""
_A_FREE_PORT: Final = "127.0.0.1:0"
_PREFIX: Final = "pgguard-"
_SHORT: Final = 88
"""Bytes of a directory's name that leave room for a socket's in it: unix(7), ``sun_path``."""


@contextmanager
def private_directory() -> Iterator[Path]:
    """A directory that only this user can enter, with a name short enough for a socket in it; it goes with the context.

    Raises:
        ConfigurationError: None can be made.
    """
    try:
        name = tempfile.mkdtemp(prefix=_PREFIX)
        if len(os.fsencode(name)) > _SHORT:
            Path(name).rmdir()
            name = tempfile.mkdtemp(prefix=_PREFIX, dir="/tmp")
    except OSError as error:
        raise ConfigurationError(f"no temporary directory can be made: {error.strerror}: set TMPDIR") from error
    try:
        yield Path(name)
    finally:
        shutil.rmtree(name, ignore_errors=True)


def located(settings: Settings, directory: Path) -> Settings:
    """Say where the server is, and where the guard listens, as far as the settings don't.

    The server is the one in ``DATABASE_URL``, or else libpq's variables and defaults say where it is. The guard takes a
    free port of 127.0.0.1. But if the server is connected to over a Unix socket, it listens on one, in a directory that
    only this user can enter: a server may let in whoever comes over its socket by the user that they are (``peer``
    authentication), for which it would take the guard's, while anybody on this host can connect to a port.

    Args:
        settings: What has been said.
        directory: That directory.

    Raises:
        ConfigurationError: Nothing says where the server is, or not so that it can be understood.
    """
    changed: dict[str, Any] = {}
    if settings.upstream:
        upstream = _read(settings.upstream, "--upstream")
    elif (found := _in_database_url()) is not None:
        changed["upstream"], upstream = found
    else:
        upstream = _read("", "libpq's variables")
        if not any(map(os.environ.get, _PLACES)):
            _expect_local(upstream.addresses)
    if "listen" not in settings.model_fields_set:
        ports = [address.port for address in upstream.addresses if isinstance(address, UnixAddress)]
        changed["listen"] = [f"unix:{directory}:{ports[0]}" if ports else _A_FREE_PORT]
    return settings.model_copy(update=changed)


def _in_database_url() -> tuple[str, Upstream] | None:
    """What ``DATABASE_URL`` says, unless that is another database's. Raises ConfigurationError."""
    url = os.environ.get(_URL)
    if not url:
        return None
    try:
        return url, _read(url, _URL)
    except NotPostgresError:
        return None


def _read(text: str, name: str) -> Upstream:
    """Read where the server is; what can't be read is said of what has said it, as libpq's variables stand behind it.

    Args:
        text: What has been said; empty if they alone say it.
        name: What it was said in.
    """
    try:
        return parse_upstream(text)
    except NotPostgresError:
        raise
    except ConfigurationError as error:
        said = str(error).removeprefix("--upstream: ")
        blamed = (
            variable
            for keyword, variable in _VARIABLES.items()
            if keyword in said and os.environ.get(variable) and (not text or keyword in _ANYWHERE - _words(text))
        )
        raise ConfigurationError(f"{next(blamed, name)}: {_with_remedy(said, text)}") from None


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text))


def _with_remedy(said: str, text: str) -> str:
    """What is wrong with a text, and what to do if libpq alone doesn't understand it."""
    there = [addresses for _, addresses in named_servers({"": text})]
    if len(there) != 1 or not said.startswith(_UNREADABLE):
        return said
    return f"{said.partition(': write ')[0]}: add --upstream {conninfo_of(there[0])}"


def _expect_local(addresses: Sequence[Address]) -> None:
    """Take libpq's own default for where the server is only if there is a socket: else nobody has thought of it."""
    if all(isinstance(address, UnixAddress) for address in addresses):
        return
    named = [f"--upstream {conninfo_of(there)}, where {name} leads" for name, there in named_servers(os.environ)]
    raise ConfigurationError(
        "nothing says where PostgreSQL is: set DATABASE_URL or PGHOST, as your application needs it, or name the "
        f"server: {', or '.join(named[:_SHOWN]) or '--upstream postgresql://HOST:PORT'}"
    )
