"""Where the server is that a command uses: what says so, in which order, and what is said if it can't be understood."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pgguard.launch.upstream import located
from pgguard.proxy.addresses import Address, TcpAddress, UnixAddress
from pgguard.proxy.errors import ConfigurationError
from pgguard.proxy.settings import Settings

DIRECTORY = Path("/nowhere/private")


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in os.environ:
        if name.startswith("PG") or name == "DATABASE_URL":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("pgguard.proxy.addresses.SOCKET_DIRECTORIES", (str(tmp_path),))


def set_all(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("given", "variables", "address"),
    [
        ("postgresql://a:1", {"DATABASE_URL": "postgresql://b:2/x", "PGHOST": "c", "PGPORT": "3"}, TcpAddress("a", 1)),
        ("", {"DATABASE_URL": "postgresql://b:2/x", "PGHOST": "c", "PGPORT": "3"}, TcpAddress("b", 2)),
        ("", {"DATABASE_URL": "postgresql+asyncpg://u:p@b/x"}, TcpAddress("b", 5432)),
        ("", {"DATABASE_URL": "", "PGHOST": "c", "PGPORT": "3"}, TcpAddress("c", 3)),
        ("", {"DATABASE_URL": "mysql://b:2/x", "PGHOST": "c"}, TcpAddress("c", 5432)),
        ("", {"DATABASE_URL": "sqlite:///x", "PGHOST": "/srv/pg"}, UnixAddress("/srv/pg", 5432)),
        ("", {"DATABASE_URL": "postgresql:///x", "PGHOST": "c"}, TcpAddress("c", 5432)),
        ("", {"PGPORT": "3"}, TcpAddress("localhost", 3)),
    ],
)
def test_what_says_where_the_server_is(
    given: str, variables: dict[str, str], address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_all(monkeypatch, variables)
    assert located(Settings(upstream=given), DIRECTORY).server().addresses == (address,)


def test_a_service_says_where_the_server_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".pg_service.conf").write_text("[main]\nhost=c\nport=3\n")
    set_all(monkeypatch, {"PGSERVICE": "main", "PGHOST": "d", "PGSERVICEFILE": str(tmp_path / ".pg_service.conf")})
    assert located(Settings(), DIRECTORY).server().addresses == (TcpAddress("c", 3),)


def test_libpqs_default_is_taken_if_there_is_such_a_socket(tmp_path: Path) -> None:
    (tmp_path / ".s.PGSQL.5432").touch()
    settings = located(Settings(), DIRECTORY)
    assert settings.server().addresses == (UnixAddress(str(tmp_path), 5432),)
    assert settings.listen == [f"unix:{DIRECTORY}:5432"]


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        (
            {},
            "set DATABASE_URL or PGHOST, as your application needs it, or name the server: --upstream postgresql://HOST",
        ),
        ({"DATABASE_URL": "sqlite:///x"}, "nothing says where PostgreSQL is"),
        (
            {"SQLALCHEMY_DATABASE_URI": "postgresql://u:S3CRET@db/x"},
            "name the server: --upstream postgresql://db:5432, where SQLALCHEMY_DATABASE_URI leads",
        ),
        (
            {"A": "host=a dbname=x", "B": "postgresql:///x?host=/srv/a%20b"},
            "--upstream postgresql://a:5432, where A leads, or --upstream 'host=/srv/a b port=5432', where B leads",
        ),
        ({"DATABASE_URL": "postgresql://u:S3CRET@b:x/y", "PGPORT": "3"}, "DATABASE_URL: the port is not a port number"),
        ({"DATABASE_URL": "postgresql://b/y?sslmode=on"}, "DATABASE_URL: there is no such sslmode"),
        ({"DATABASE_URL": "postgresql://b/y", "PGSSLMODE": "on"}, "PGSSLMODE: there is no such sslmode"),
        (
            {"DATABASE_URL": "postgresql://b/y?sslcert=/nowhere"},
            "DATABASE_URL: sslcert: the certificate in /nowhere can",
        ),
        ({"DATABASE_URL": "postgresql://b/y", "PGSSLCERTMODE": "no"}, "PGSSLCERTMODE: there is no such sslcertmode"),
        (
            {"DATABASE_URL": "Host=b;Port=6000;Username=u;Password=S3CRET"},
            "DATABASE_URL: invalid connection option: add --upstream postgresql://b:6000",
        ),
        ({"PGHOST": "c", "PGPORT": "x"}, "PGPORT: 'x' is not a port number"),
        ({"PGHOST": "c", "PGSSLMODE": "verify-full"}, "PGSSLMODE: sslmode=verify-full needs root certificates"),
        ({"PGHOST": "c", "PGSSLROOTCERT": "/nowhere"}, "PGSSLROOTCERT: sslrootcert: the root certificates in /nowhere"),
        ({"PGHOST": "c", "PGGSSENCMODE": "require"}, "PGGSSENCMODE: gssencmode=require asks for GSSAPI"),
        ({"PGHOSTADDR": "c"}, "PGHOSTADDR: hostaddr is not an IP address"),
        ({"PGHOST": "a,b", "PGPORT": "1,2,3"}, "PGPORT: 3 ports for 2 hosts"),
        ({"PGHOST": "c", "PGCONNECT_TIMEOUT": "x"}, "PGCONNECT_TIMEOUT: connect_timeout=x is not a number"),
        ({"PGSERVICE": "nowhere", "PGSERVICEFILE": os.devnull}, "PGSERVICE: "),
    ],
    ids=lambda _: "case",  # pytest's own variable has a test's name in it
)
def test_what_says_it_wrongly_is_named(variables: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, variables)
    with pytest.raises(ConfigurationError) as raised:
        located(Settings(), DIRECTORY)
    assert says in str(raised.value)
    assert "S3CRET" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_upstream_that_is_given_is_to_blame_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPORT", "3")
    with pytest.raises(ConfigurationError, match=r"^--upstream: 'x' is not a port number"):
        located(Settings(upstream="host=a port=x"), DIRECTORY)
