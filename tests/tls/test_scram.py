"""SCRAM, with TLS on either side of the guard, on both or none, and with the channel bound or not, with many drivers.

It works as it does directly with a server that has TLS or hasn't, or the client is told what to set.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import shutil
import ssl
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import asyncpg
import pg8000.dbapi
import psycopg2
import pytest

from tests.languages import node_directory
from tests.servers import not_installed
from tests.tls.servers import PASSWORD, outcome

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.servers import Address
    from tests.tls.conftest import StartTlsGuard
    from tests.tls.servers import Papers

PROGRAMS = Path(__file__).parent / "programs"
_JDBC = Path("/usr/share/java/postgresql.jar")
SOLUTION: Final = "set channel_binding=disable in the client"


class Way(NamedTuple):
    """What there is on either side of a guard."""

    client: bool
    """TLS to the client."""
    server: bool
    """TLS to the server."""
    same: bool = False
    """The client is shown the server's own certificate."""

    @property
    def refuses_y(self) -> bool:
        """A client is refused that could have bound its channel, and says that it wasn't offered to."""
        return self.client and self.server and not self.same


WAYS: Final = [Way(False, False), Way(False, True), Way(True, False), Way(True, True), Way(True, True, same=True)]


@pytest.fixture(scope="module")
def at(kept_guard: StartTlsGuard, papers: Papers) -> Callable[[Way], Address]:
    """Where there is a guard of that kind."""

    def find(way: Way) -> Address:
        shown = papers.server if way.same else papers.renewed
        upstream = "sslmode=require" if way.server else "sslmode=disable"
        return kept_guard(upstream, shown if way.client else None).tcp

    return find


def _mode(way: Way) -> Literal["require", "disable"]:
    return "require" if way.client else "disable"


@pytest.mark.parametrize("way", WAYS)
def test_libpq(way: Way, at: Callable[[Way], Address]) -> None:
    login = functools.partial(outcome, at(way), user="scram", password=PASSWORD, sslmode=_mode(way))
    assert login(channel_binding="disable").is_made
    preferred = login(channel_binding="prefer")
    assert preferred.is_made is not way.refuses_y
    assert (SOLUTION in preferred.said) is way.refuses_y
    required = login(channel_binding="require")
    assert required.is_made is way.same
    if not way.client:
        assert "SSL" in required.said
    elif not way.same:
        assert "channel binding is required" in required.said
    # By default it goes on without TLS where it is refused with it.
    default = login(channel_binding="prefer", sslmode="prefer")
    assert default.is_made
    assert default.tls is (way.client and not way.refuses_y)
    assert login(channel_binding="require", sslmode="prefer").is_made is way.same
    wrong = login(channel_binding="disable", password="wrong")
    assert "password authentication failed" in wrong.said


@pytest.mark.parametrize("way", WAYS)
def test_psycopg2(way: Way, at: Callable[[Way], Address]) -> None:
    address = at(way)
    login = functools.partial(
        psycopg2.connect,
        host=address.host,
        port=address.port,
        user="scram",
        password=PASSWORD,
        dbname="postgres",
        sslmode=_mode(way),
    )
    login(channel_binding="disable").close()
    if not way.refuses_y:
        login().close()
        return
    with pytest.raises(psycopg2.OperationalError, match=SOLUTION):
        login()


@pytest.mark.parametrize("way", WAYS)
def test_asyncpg(way: Way, at: Callable[[Way], Address]) -> None:
    """It never binds its channel, and says so."""
    address = at(way)

    async def ask() -> int:
        connection = await asyncpg.connect(
            host=address.host,
            port=address.port,
            user="scram",
            password=PASSWORD,
            database="postgres",
            ssl=_mode(way),
        )
        try:
            return int(await connection.fetchval("SELECT 42"))
        finally:
            await connection.close()

    assert asyncio.run(ask()) == 42


@pytest.mark.parametrize("way", WAYS)
def test_pg8000(way: Way, at: Callable[[Way], Address]) -> None:
    """It binds its channel whenever it is offered to, and says that it could have if it isn't."""
    address = at(way)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if way.client else False
    if isinstance(context, ssl.SSLContext):
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    login = functools.partial(
        pg8000.dbapi.connect,
        user="scram",
        host=address.host,
        port=address.port,
        password=PASSWORD,
        database="postgres",
        ssl_context=context,
    )
    if not way.refuses_y:
        login().close()
        return
    with pytest.raises(pg8000.dbapi.DatabaseError, match=SOLUTION):
        login()


def test_node_postgres(at: Callable[[Way], Address], tmp_path: Path) -> None:
    modules = node_directory()
    targets = [(way, bound) for way in WAYS for bound in (False, True)]
    asked = [{"port": at(way).port, "tls": way.client, "bound": bound} for way, bound in targets]
    environ = os.environ | {"PGHOST": "127.0.0.1", "PGUSER": "scram", "PGPASSWORD": PASSWORD}
    done = subprocess.run(
        ["node", PROGRAMS / "scram.js", json.dumps(asked)],
        cwd=tmp_path,
        env=environ | {"NODE_PATH": str(modules / "node_modules")},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    # It says that it could have bound its channel if it is to, also where it has none.
    expected = [bound and way.server and not way.same for way, bound in targets]
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert [SOLUTION in str(one) for one in said] == expected, done.stdout + done.stderr
    assert all(refused or one == 42 for one, refused in zip(said, expected, strict=True))


def test_pgjdbc(at: Callable[[Way], Address]) -> None:
    java = shutil.which("java")
    if java is None or not _JDBC.exists():
        not_installed("Java with libpostgresql-jdbc-java")
    targets = [f"{at(way).port}:{_mode(way)}" for way in WAYS]
    done = subprocess.run(
        [java, "-XX:TieredStopAtLevel=1", "-cp", _JDBC, PROGRAMS / "Scram.java", *targets],
        env=os.environ | {"PGHOST": "127.0.0.1", "PGUSER": "scram", "PGPASSWORD": PASSWORD},
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    assert done.stdout.splitlines() == ["42"] * len(WAYS), done.stdout + done.stderr
