"""Where the server is that a command uses, and where a guard listens for it, when nobody has said so."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pgguard.faults.text import listed
from pgguard.launch.environment import named_servers
from pgguard.proxy.addresses import UnixAddress, parse_upstream
from pgguard.proxy.errors import ConfigurationError, NotPostgresError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pgguard.proxy.addresses import Address
    from pgguard.proxy.settings import Settings

_URL: Final = "DATABASE_URL"
_PLACES: Final = ("PGHOST", "PGHOSTADDR", "PGPORT", "PGSERVICE")
"""Variables of libpq that say where a server is."""
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
    if not settings.upstream and (url := _database_url()):
        changed["upstream"] = url
    upstream = parse_upstream(changed.get("upstream", settings.upstream))
    if not settings.upstream and not changed and not any(map(os.environ.get, _PLACES)):
        _expect_local(upstream.addresses)
    if "listen" not in settings.model_fields_set:
        ports = [address.port for address in upstream.addresses if isinstance(address, UnixAddress)]
        changed["listen"] = [f"unix:{directory}:{ports[0]}" if ports else _A_FREE_PORT]
    return settings.model_copy(update=changed)


def _database_url() -> str | None:
    """What ``DATABASE_URL`` says, unless that is another database's. Raises ConfigurationError."""
    url = os.environ.get(_URL)
    if not url:
        return None
    try:
        parse_upstream(url)
    except NotPostgresError:
        return None
    except ConfigurationError as error:
        raise ConfigurationError(str(error).replace("--upstream", _URL)) from None
    return url


def _expect_local(addresses: Sequence[Address]) -> None:
    """Take libpq's own default for where the server is only if there is a socket: else nobody has thought of it."""
    if all(isinstance(address, UnixAddress) for address in addresses):
        return
    named = [f"{name} names {where}" for name, where in named_servers(os.environ)]
    raise ConfigurationError(
        "nothing says where PostgreSQL is: set DATABASE_URL or PGHOST, as your application needs it, or name the "
        f"server: --upstream postgresql://HOST:PORT{f' ({listed(named)})' if named else ''}"
    )
