"""Addresses of PostgreSQL that aren't in the environment: in Django's settings, in other plugins' fixtures.

Nothing of theirs is imported here: who doesn't use them hasn't got them.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final, Protocol
from urllib.parse import quote

if TYPE_CHECKING:
    import pytest

_ENGINES: Final = ("postgresql", "postgis")
"""What a Django backend's name ends with, also one that is made of another, if it speaks with PostgreSQL."""
_EXECUTORS: Final = "pytest_postgresql.executor"
"""Where pytest-postgresql has what its fixtures ``postgresql_proc`` and ``postgresql_noproc`` are."""
_TLS: Final = ("sslrootcert", "sslcert", "sslkey", "sslcertmode", "sslnegotiation", "channel_binding")
"""What can't hold on the way to the guard, among the options of a Django database."""
_DEMANDS: Final = frozenset({"require", "verify-ca", "verify-full"})


class Lead(Protocol):
    """Puts a guard in front of a server; returns where that is: a host, or a Unix socket's directory, and a port."""

    def __call__(self, host: str, port: str) -> tuple[str, int]:
        """Do so."""


def lead_django(lead: Lead) -> None:
    """Lead the databases of Django's settings to a guard, unless those are the environment's.

    To be called before the first of them is connected to, when Django has been set up. Nothing happens without it.
    """
    conf = sys.modules.get("django.conf")
    if conf is None or not conf.settings.configured:
        return
    for database in getattr(conf.settings, "DATABASES", {}).values():
        options = database.get("OPTIONS") or {}
        if not str(database.get("ENGINE", "")).endswith(_ENGINES) or "service" in options:
            continue
        if host := str(database.get("HOST") or ""):
            database["HOST"], port = lead(host, str(database.get("PORT") or ""))
            database["PORT"] = str(port)
            for name in _TLS:
                options.pop(name, None)
            if options.get("sslmode") in _DEMANDS:
                options["sslmode"] = "disable"


def lead_executor(fixture: pytest.FixtureDef[Any], value: object, lead: Lead) -> None:
    """Lead whoever uses a fixture of pytest-postgresql's that is a server to a guard; any other is left alone."""
    executor: Any = value
    if not type(value).__module__.startswith(_EXECUTORS) or not hasattr(value, "port"):
        return
    before = executor.host, executor.port

    def leave() -> None:
        executor.host, executor.port = before

    executor.host, executor.port = lead(str(executor.host or "localhost"), str(executor.port))
    # It goes before the fixture's own, which ends the server.
    fixture.addfinalizer(leave)


def conninfo(host: str, port: str) -> str:
    """A connection string for a host, or several, or a Unix socket's directory, and their ports."""
    ports = f"&port={quote(port, safe='')}" if port else ""
    return f"postgresql:///?host={quote(host, safe='')}{ports}"


def parted(address: str) -> tuple[str, int]:
    """The host, or the directory, and the port of an address as the guard says it."""
    host, _, port = address.partition(", ")[0].removeprefix("unix:").rpartition(":")
    return host.strip("[]"), int(port)
