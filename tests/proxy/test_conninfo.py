"""Other libraries' URLs are understood, and no password gets into a message, whatever is wrong with it."""

from __future__ import annotations

import os
import sys
import traceback

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from pgguard.cli.main import main
from pgguard.proxy.addresses import Address, TcpAddress, UnixAddress, parse_listen, parse_upstream
from pgguard.proxy.errors import ConfigurationError
from pgguard.proxy.settings import load_settings


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("PG"):
            monkeypatch.delenv(name)


DB = TcpAddress("db.example", 6000)


@pytest.mark.parametrize(
    ("url", "address", "unused"),
    [
        ("postgresql://app:S3CRET@db.example:6000/app", DB, None),
        ("postgres://app:S3CRET@db.example:6000/app?sslmode=prefer&connect_timeout=3", DB, None),
        ("postgresql://db.example:6000/app?user=app&password=S3CRET", DB, None),
        (
            "postgresql+asyncpg://app:S3CRET@db.example:6000/app",
            DB,
            None,
        ),
        ("postgresql+psycopg2://db.example:6000", DB, None),
        ("postgres+psycopg://app:S3CRET@db.example:6000/", DB, None),
        ("postgis://app:S3CRET@db.example:6000/app", DB, None),
        ("PgSQL://db.example:6000", DB, None),
        ("jdbc:postgresql://db.example:6000/app", DB, None),
        (
            "jdbc:postgresql://db.example:6000/app?user=app&password=S3CRET&ssl=false",
            DB,
            None,
        ),
        ("jdbc:postgresql://db.example:6000/?currentSchema=x&connectTimeout=3", DB, "currentSchema"),
        ("jdbc:postgresql:app?password=S3CRET", TcpAddress("localhost", 5432), None),
        ("jdbc:postgresql:/", TcpAddress("localhost", 5432), None),
        ("postgresql://app:S3CRET@db.example:6000/app?pool=5&timeout=5000", DB, "pool and timeout"),
        (
            "postgresql://app:S3CRET@db.example:6000/app?schema=public&connection_limit=5&pgbouncer=true",
            DB,
            "schema, connection_limit and pgbouncer",
        ),
        ("postgresql://app:S3@CRET@db.example:6000/app", DB, None),
        ("postgresql://app:S3?CRET@db.example:6000/app", DB, None),
        ("postgresql://app:SE%2FCR%40ET@db.example:6000/app", DB, None),
        ("postgresql+asyncpg://app:S3CRET@/app?host=/run/pg&port=6000", UnixAddress("/run/pg", 6000), None),
        ("postgresql+asyncpg://app@%2Frun%2Fpg:6000/app", UnixAddress("/run/pg", 6000), None),
    ],
)
def test_urls_of_other_libraries_are_understood(url: str, address: Address, unused: str | None) -> None:
    """What is said of them is what may matter and isn't used: user, password and database are never the guard's."""
    upstream = parse_upstream(url)
    assert upstream.addresses == (address,)
    assert "S3CRET" not in repr(upstream)
    assert upstream.remark == (None if unused is None else f"--upstream: pgguard ignores {unused}")


@pytest.mark.parametrize(
    "url",
    ["postgresql://app:S3CRET@db.example/app", "postgres://db.example/?user=app&password=x", "host=db.example", ""],
)
def test_nothing_is_said_of_libpqs_own_forms(url: str) -> None:
    assert parse_upstream(url).remark is None


def test_what_a_url_says_about_the_server_is_kept() -> None:
    url = "jdbc:postgresql://a:1,b:2,[::1]/app?connectTimeout=3&targetServerType=primary&sslmode=disable"
    upstream = parse_upstream(url)
    assert upstream.addresses == (TcpAddress("a", 1), TcpAddress("b", 2), TcpAddress("::1", 5432))
    assert upstream.connect_timeout == 3


@pytest.mark.parametrize("value", ["true", "require", "1", "no-verify"])
@pytest.mark.parametrize("scheme", ["postgresql", "jdbc:postgresql", "postgresql+asyncpg"])
def test_a_url_that_insists_on_tls_is_not_taken_without(scheme: str, value: str) -> None:
    tls = parse_upstream(f"{scheme}://db.example/app?ssl={value}").tls
    assert tls is not None
    assert not tls.settings.may_be_plain


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("mysql://app:S3CRET@db/app", "--upstream: mysql: is not a PostgreSQL URL: write postgresql://HOST:PORT"),
        ("jdbc:mysql://app:S3CRET@db/app", "--upstream: jdbc:mysql: is not a PostgreSQL URL"),
        (
            "postgresql://app:S3/CRET@db/app",
            "it isn't clear where the password ends: write @ in it as %40 and / as %2F",
        ),
        ("postgresql://app:S3CRET@db/app?user=a@b", "it isn't clear where the password ends"),
        ("postgresql://app:S3CRET", "the port is not a port number"),
        ("postgresql://app:S3CRET@db:port/app", "the port is not a port number"),
        ("postgresql://app:S3CRET@[::1/app", 'matching "]" in IPv6 host address: write postgresql://HOST:PORT'),
        ("postgresql://db/app?S3CRET", "the URL's parameters must be NAME=VALUE"),
        (
            "postgresql://app:S3CRET@db/app?connect_timout=3",
            "there is no parameter connect_timout: did you mean connect_t",
        ),
        (
            "postgresql://app:S3CRET@db/app?host=a&host=b",
            "host is given twice: give several values separated by commas",
        ),
        (
            "app:S3CRET@db:5432/app",
            '--upstream: a "=" is missing: write postgresql://HOST:PORT, or host=HOST port=PORT',
        ),
        ("host=db password=my S3CRET", '--upstream: a "=" is missing: write'),
        ("host=db password='S3CRET", "unterminated quoted string in connection info string: write"),
        ("host=db password=my S3CRET=x", "invalid connection option: write"),
        ("host=app:S3CRET@db", "the host can only be a name or an address"),
        ("host=app:S3CRET", "the host has a colon in it: write the port as port=PORT"),
        ("host=db port=x password=S3CRET", "the port is not a port number"),
        ("host=db sslpassword=my S3CRET", '--upstream: a "=" is missing: write'),
        ("host=db passwort=S3CRET", "invalid connection option: write"),
        ("hostaddr=S3CRET", "hostaddr is not an IP address: give a name as host=NAME"),
        ("host=db hostaddr=192.0.2.1,S3CRET", "2 addresses (hostaddr) for 1 hosts: give one for each host"),
        ("password=x connect_timeout=S3CRET", "connect_timeout is not a number of seconds"),
        (
            "postgresql://app:S3CRET%zz@db/app",
            "a % in the URL isn't followed by two hexadecimal digits: write % itself as %25",
        ),
        ("postgresql://db/S3CRET%2?user=x", "write % itself as %25"),
        ("postgresql://db/app?password=S3CRET%00", "write % itself as %25"),
    ],
)
def test_what_can_not_be_read_is_refused_without_its_password(text: str, says: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        parse_upstream(text)
    assert says in str(raised.value)
    assert "S3CRET" not in str(raised.value)
    assert "S3CRET" not in "".join(traceback.format_exception(raised.value))


_WITHOUT_HOST = "postgresql://app:{}"
_TEMPLATES = (
    _WITHOUT_HOST,
    "postgresql://app:{}@db:5432/app?x=y",
    "postgresql://app:{}@db",
    "postgresql://app:{}@a:1,b:2/app",
    "postgresql+asyncpg://app:{}@db/app",
    "jdbc:postgresql://app:{}@db/app",
    "mysql://app:{}@db/app",
    "postgresql://db/app?password={}&user=app",
    "jdbc:postgresql://db/app?user=app&password={}",
    "jdbc:postgresql:app?password={}",
    "host=db password={} user=app",
    "host=db password='{}' user=app",
    "host=db sslpassword={}",
    "password={}",
    "app:{}@db:5432/app",
    "host=app:{}@db",
    "host=postgresql://app:{}@db/app",
)
_MARK = "S3CR3T"
_passwords = st.text("xyz1 =:/@?#%&,'\"\\[]+;.-_~é", max_size=12).map(lambda text: f"{_MARK}{text}{_MARK}")


@given(st.sampled_from(_TEMPLATES), _passwords)
@example("postgresql://app:{}@db", f"{_MARK}@x?y@{_MARK}")
@example("postgresql://app:{}@db/app", f"{_MARK}?x@{_MARK}?y")
@example("postgresql://db/app?password={}", f"x&{_MARK}=y")
@example("host=db password={}", f"x {_MARK}='")
@example("host=db password='{}'", f"x' {_MARK}")
def test_no_password_is_in_any_message(template: str, password: str) -> None:
    assume(template != _WITHOUT_HOST or "@" not in password)  # what is behind it would be the host
    text = template.format(password)
    try:
        upstream = load_settings({"upstream": text}, None).server()
    except ConfigurationError as error:
        said = "".join(traceback.format_exception(error))
    else:
        said = f"{upstream} {upstream!r}"
    assert _MARK not in said


@pytest.mark.parametrize("template", _TEMPLATES)
@pytest.mark.parametrize("password", ["S3CR3T", "x S3CR3T/@'S3CR3T"])
@pytest.mark.parametrize("where", [["--listen"], ["--mode"], ["--config"], ["--attribution"], ["--upstream"], []])
def test_no_password_is_in_what_the_command_line_complains_of(
    template: str, password: str, where: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if where == ["--upstream"]:
        where = ["--mode", "no such", *where]
    monkeypatch.setattr(sys, "argv", ["pgguard", "serve", *where, template.format(password)])
    with pytest.raises(SystemExit) as raised:
        main()
    said = capfd.readouterr()
    assert raised.value.code == 2
    assert "S3CR3T" not in said.out + said.err


def test_an_abstract_sockets_name_is_no_password() -> None:
    with pytest.raises(ConfigurationError, match="unix:@name:x"):
        parse_listen("unix:@name:x")
