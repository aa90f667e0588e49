"""What becomes of a guard's connections to the server, by its settings: what becomes of libpq's with the same."""

from __future__ import annotations

import itertools
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio

from pgguard.proxy.errors import ConfigurationError
from tests.proxy.conftest import running
from tests.servers import Address
from tests.tls.certificates import KEY_PASSWORD
from tests.tls.servers import Outcome, outcome
from tests.tls.test_sslmodes import MODES, SHOWN

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.tls.servers import Papers, TlsServer

_CLIENT: Final[Mapping[str, str]] = {"user": "certified", "sslmode": "require"}
_CERTIFICATES: Final[Mapping[str, Mapping[str, str]]] = {
    "its own": {"sslcert": "client.crt", "sslkey": "client.key"},
    "with a passphrase": {"sslcert": "locked.crt", "sslkey": "locked.key", "sslpassword": KEY_PASSWORD},
    "a stranger's": {"sslcert": "foreign.crt", "sslkey": "foreign.key"},
    "expired": {"sslcert": "late.crt", "sslkey": "late.key"},
    "none": {},
    "not shown": {"sslcert": "client.crt", "sslkey": "client.key", "sslcertmode": "disable"},
    "shown on demand": {"sslcert": "client.crt", "sslkey": "client.key", "sslcertmode": "require"},
    "wrong passphrase": {"sslcert": "locked.crt", "sslkey": "locked.key", "sslpassword": "wrong"},
    "another's key": {"sslcert": "client.crt", "sslkey": "late.key"},
}
_OTHERS: Final[Mapping[str, Mapping[str, str]]] = {
    "nobody revoked": {"sslmode": "verify-ca", "sslrootcert": "authority.crt", "sslcrl": "nobody.crl"},
    "the server revoked": {"sslmode": "verify-ca", "sslrootcert": "authority.crt", "sslcrl": "server.crl"},
    "TLS 1.2": {"sslmode": "require", "ssl_max_protocol_version": "TLSv1.2"},
    "TLS 1.3": {"sslmode": "require", "ssl_min_protocol_version": "TLSv1.3"},
    "no version": {"sslmode": "require", "ssl_min_protocol_version": "TLSv1.3", "ssl_max_protocol_version": "TLSv1.2"},
    "a number for its name": {"sslmode": "verify-full", "sslrootcert": "authority.crt", "host": "127.0.0.1"},
    "its name": {"sslmode": "verify-full", "sslrootcert": "authority.crt", "host": "localhost"},
    "its name and number": {
        "sslmode": "verify-full",
        "sslrootcert": "authority.crt",
        "host": "localhost",
        "hostaddr": "127.0.0.1",
    },
    "another name": {
        "sslmode": "verify-full",
        "sslrootcert": "authority.crt",
        "host": "elsewhere.example",
        "hostaddr": "127.0.0.1",
    },
    "no name": {"sslmode": "verify-ca", "sslrootcert": "authority.crt", "sslsni": "0", "host": "localhost"},
    "the system's roots": {"sslrootcert": "system"},
    "the system's roots, weakly": {"sslrootcert": "system", "sslmode": "require"},
    "direct": {"sslmode": "require", "sslnegotiation": "direct"},
    "direct, verified": {"sslmode": "verify-full", "sslnegotiation": "direct", "sslrootcert": "authority.crt"},
    "direct, weakly": {"sslmode": "prefer", "sslnegotiation": "direct"},
}


def _settings(row: Mapping[str, str], server: TlsServer, papers: Papers) -> dict[str, str]:
    files = {"sslrootcert", "sslcert", "sslkey", "sslcrl"}
    where = {"host": server.tcp.host, "port": str(server.tcp.port)}
    return where | {
        name: str(papers.directory / value) if name in files and value != "system" else value
        for name, value in row.items()
    }


async def _guarded(settings: Mapping[str, str], user: str) -> Outcome:
    """What becomes of a client's connection, that is plain, through a guard with these settings."""
    conninfo = " ".join(f"{name}='{value}'" for name, value in settings.items() if name != "user")
    try:
        async with running(upstream=conninfo, listen=["127.0.0.1:0"]) as house:
            connect: Any = partial(outcome, Address("127.0.0.1", house.port), sslmode="disable", user=user)
            return await trio.to_thread.run_sync(connect)
    except ConfigurationError as error:
        return Outcome(None, None, str(error))


async def _assert_alike(row: Mapping[str, str], server: TlsServer, papers: Papers) -> tuple[Outcome, Outcome]:
    settings = _settings(row, server, papers)
    user = row.get("user", "postgres")
    directly = await trio.to_thread.run_sync(partial(outcome, server.tcp, **(settings | {"user": user})))
    guarded = await _guarded(settings, user)
    assert guarded.server_tls is directly.server_tls, (row, directly, guarded)
    if not directly.is_made:
        assert "pgguard: " in guarded.said or "--upstream: " in guarded.said or directly.said in guarded.said
    return directly, guarded


@pytest.mark.parametrize("shown", SHOWN)
async def test_modes(shown: str | None, reference: TlsServer, papers: Papers) -> None:
    reference.show(None if shown is None else getattr(papers, shown))
    roots = ({}, {"sslrootcert": "authority.crt"}) if shown == "server" else ({"sslrootcert": "authority.crt"},)
    for mode, more in itertools.product(MODES, roots):
        await _assert_alike({"sslmode": mode} | more, reference, papers)


@pytest.mark.parametrize("user", ["tls_only", "plain_only"])
async def test_what_the_server_insists_on(user: str, tls_server: TlsServer, papers: Papers) -> None:
    for mode in MODES[:4]:
        await _assert_alike({"sslmode": mode, "user": user}, tls_server, papers)


@pytest.mark.parametrize("certificate", _CERTIFICATES)
async def test_client_certificates(certificate: str, tls_server: TlsServer, papers: Papers) -> None:
    await _assert_alike({**_CLIENT, **_CERTIFICATES[certificate]}, tls_server, papers)


@pytest.mark.parametrize("name", _OTHERS)
async def test_other_settings(name: str, tls_server: TlsServer, papers: Papers) -> None:
    await _assert_alike(_OTHERS[name], tls_server, papers)
