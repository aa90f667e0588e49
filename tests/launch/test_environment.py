"""Which variables of an environment are rewritten, which are left, and what is said about it."""

from __future__ import annotations

import socket
import stat
import time
from typing import TYPE_CHECKING

import pytest

from pgguard.launch import places
from pgguard.launch.environment import named_servers, rewrite, write_files
from pgguard.launch.places import Resolver
from pgguard.proxy.addresses import TcpAddress, UnixAddress, Upstream
from pgguard.proxy.errors import ConfigurationError
from tests.launch.surroundings import DB, GUARD, GUARD_ON_UNIX, HERE, PRIVATE, SOCKET, rewritten

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pgguard.proxy.addresses import Address

URL = "postgresql://app:S3CRET@db.internal/app"
LED = "postgresql://app:S3CRET@127.0.0.1:40123/app"
TO_GUARD = {"PGHOST": "127.0.0.1", "PGPORT": "40123"}


def changes(
    environment: dict[str, str],
    *,
    guard: Sequence[Address] = (GUARD,),
    add: Sequence[str] = (),
    keep: Sequence[str] = (),
) -> dict[str, str | None]:
    """The variables that differ, with what they are now."""
    result = rewritten(environment, guard=guard, add=add, keep=keep)
    return {name: result.environment.get(name) for name in result.names}


def test_every_variable_is_looked_at_whatever_it_is_called() -> None:
    names = ("DATABASE_URL", "SQLALCHEMY_DATABASE_URI", "POSTGRES_URL", "lower case", "X", "PGGUARD_UPSTREAM")
    others = {"PATH": "/bin", "REPLICA_URL": "postgresql://other/app", "EMPTY": "", "REDIS_URL": "redis://db.internal"}
    assert changes(dict.fromkeys(names, URL) | others) == dict.fromkeys(names, LED)


def test_libpqs_variables_that_lead_to_the_server() -> None:
    assert changes({"PGHOST": "db.internal", "PGPORT": "5432", "PGUSER": "app", "PGDATABASE": "app"}) == TO_GUARD
    assert changes({"PGHOST": "db"}) == TO_GUARD
    assert changes({"PGHOSTADDR": "10.0.0.5"}) == TO_GUARD | {"PGHOSTADDR": None}
    assert changes({"PGHOST": "certificate-name", "PGHOSTADDR": "10.0.0.5"}) == TO_GUARD | {"PGHOSTADDR": None}


def test_libpqs_defaults_that_lead_to_the_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing has to be set: a program that only uses libpq's defaults would have gone there."""
    monkeypatch.setattr("pgguard.proxy.addresses.SOCKET_DIRECTORIES", (str(tmp_path),))
    here = {"DATABASE_URL": "postgresql:///app"}
    led = {"DATABASE_URL": "postgresql://127.0.0.1:40123/app"}
    for environment, upstream in (({}, HERE), ({"PGPORT": "5433"}, TcpAddress("localhost", 5433))):
        result = rewritten(environment | here, upstream)
        assert result.environment.items() >= (TO_GUARD | led).items()
    result = rewritten({"PGPORT": "5433"} | here, HERE)
    assert result.names == ()


def test_a_url_without_a_place_follows_libpqs_variables_to_a_socket(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Active Record would find none in a parameter, and Go none in the place of the host."""
    monkeypatch.setattr("pgguard.proxy.addresses.SOCKET_DIRECTORIES", (str(tmp_path),))
    (tmp_path / ".s.PGSQL.5432").touch()
    here = UnixAddress(str(tmp_path), 5432)
    environment = {"URL": "postgresql://app:pw@/app?pool=5"}
    on_unix = {"PGHOST": "/run/guard dir", "PGPORT": "6000"}
    result = rewritten(environment, here, guard=[GUARD_ON_UNIX])
    assert {name: result.environment[name] for name in result.names} == on_unix
    written = {"URL": "postgresql://app:pw@/app?pool=5&host=/run/guard%20dir&port=6000"}
    for kwargs, also in (({"keep": ["PGHOST"]}, {}), ({"add": ["URL"]}, on_unix)):
        result = rewritten(environment, here, guard=[GUARD_ON_UNIX], **kwargs)
        assert {name: result.environment[name] for name in result.names} == written | also
    result = rewritten({"URL": "postgresql:///app?port=5432"}, here, guard=[GUARD_ON_UNIX])
    assert result.environment["URL"] == "postgresql:///app?port=6000&host=/run/guard%20dir"


def test_nothing_that_leads_elsewhere_is_touched() -> None:
    environment = {
        "PGHOST": "other",
        "PGSSLMODE": "verify-full",
        "PGSSLROOTCERT": "system",
        "PGCHANNELBINDING": "require",
        "DATABASE_URL": "mysql://db.internal:5432/app",
    }
    result = rewritten(environment)
    assert result.names == ()
    assert result.line == "no variable of the command is rewritten"
    assert result.remarks == (
        (
            "PGHOST leads to another server than db.internal:5432: add --env PGHOST to have programs that use libpq's "
            "variables reach the guard"
        ),
    )


def test_programs_with_libpqs_defaults_arrive_if_nothing_else_would() -> None:
    result = rewritten({"PATH": "/bin"})
    assert {name: result.environment[name] for name in result.names} == TO_GUARD
    assert result.line == (
        "nothing in the environment leads to db.internal:5432, so libpq's defaults are set; rewritten for the command: "
        "PGHOST, PGPORT"
    )
    # They go where they went if something else is there that leads to the server.
    assert changes({"DATABASE_URL": URL}) == {"DATABASE_URL": LED}


def test_what_is_said_is_one_line_without_secrets() -> None:
    environment = {"B": URL, "A\x1b[2J": URL, "PGHOST": "db", "PGHOSTADDR": "10.0.0.5"}
    result = rewritten(environment)
    assert result.line == "rewritten for the command: A\\x1b[2J, B, PGHOST, PGPORT; removed: PGHOSTADDR"


@pytest.mark.parametrize(
    ("host", "port"),
    [
        ("DB_HOST", "DB_PORT"),
        ("POSTGRES_HOST", "POSTGRES_PORT"),
        ("DATABASE_HOSTNAME", "DATABASE_PORT"),
        ("APP_PRIMARY_DB_HOST", "APP_PRIMARY_DB_PORT"),
        ("RDS_HOSTNAME", "RDS_PORT"),
        ("POSTGRES_SERVICE_HOST", "POSTGRES_SERVICE_PORT"),
        ("POSTGRES_PORT_5432_TCP_ADDR", "POSTGRES_PORT_5432_TCP_PORT"),
        ("DATABASE__HOST", "DATABASE__PORT"),
        ("DBHOST", "DBPORT"),
        ("dbHost", "dbPort"),
        ("db.host", "db.port"),
        ("POSTGRES_SERVER", "POSTGRES_PORT"),
    ],
)
def test_a_host_and_its_port_are_led_together(host: str, port: str) -> None:
    led = {host: "127.0.0.1", port: "40123"}
    assert changes({host: "db.internal", port: "5432"}) == led
    assert changes({host: "10.0.0.5", port: "5432", "DATABASE_URL": URL}) == led | {"DATABASE_URL": LED}
    for others in (
        {host: "db.internal", port: "5433"},
        {host: "other", port: "5432"},
        {host: "db.internal"},
        {port: "5432"},
        {host: "db.internal", port: ""},
        {host: "db.internal", port: "5432/tcp"},
    ):
        assert changes(others | {"PGHOST": "other"}) == {}, others


@pytest.mark.parametrize(
    "environment",
    [
        {"HOST": "localhost", "PORT": "5432"},
        {"REDIS_HOST": "localhost"},
        {"REDIS_HOST": "localhost", "REDIS_PORT": "6379"},
        {"PORT": "5432"},
        {"LISTEN_HOST": "0.0.0.0", "LISTEN_PORT": "5432"},
        {"REDIS_HOST": "localhost", "DB_PORT": "5432"},
        {"HOSTNAME": "localhost", "PORT": "5432"},
        {"SSH_CONNECTION": "127.0.0.1 5432 127.0.0.1 22"},
        {"DB_HOST": "localhost:5432 localhost", "DB_PORT": "5432"},
    ],
)
def test_a_host_or_a_port_alone_proves_nothing(environment: dict[str, str]) -> None:
    result = rewritten(environment | {"PGHOST": "other"}, HERE)
    assert result.names == ()


def test_what_demands_tls_beside_a_host_and_its_port() -> None:
    environment = {"DB_HOST": "db", "DB_PORT": "5432"}
    demands = {
        "DB_SSLMODE": "verify-full",
        "DB_SSL": "True",
        "DB_SSL_MODE": "REQUIRE",
        "DB_TLS": "on",
        "DB_USE_SSL": "1",
    }
    led = {"DB_SSLMODE": "disable", "DB_SSL": "False", "DB_SSL_MODE": "DISABLE", "DB_TLS": "off", "DB_USE_SSL": "0"}
    assert changes(environment | demands) == {"DB_HOST": "127.0.0.1", "DB_PORT": "40123"} | led
    harmless = {"DB_SSLMODE": "prefer", "DB_SSL": "0", "OTHER_SSLMODE": "require", "SSL": "true", "DB_TLS": "/ca.pem"}
    assert changes({"DB_HOST": "db", "DB_PORT": "5432"} | harmless).keys() == {"DB_HOST", "DB_PORT"}


def test_what_demands_tls_beside_an_address_in_one() -> None:
    environment = {"GF_DATABASE_HOST": "db:5432", "GF_DATABASE_SSL_MODE": "require", "OTHER_SSL_MODE": "require"}
    assert changes(environment) == {"GF_DATABASE_HOST": "127.0.0.1:40123", "GF_DATABASE_SSL_MODE": "disable"}
    assert changes(environment, keep=["GF_DATABASE_SSL_MODE"]).keys() == {"GF_DATABASE_HOST"}


def test_a_port_may_stand_there_by_another_name_too() -> None:
    environment = {"DB_SERVICE_HOST": "db", "DB_SERVICE_PORT": "5432", "DB_SERVICE_PORT_SQL": "5432"}
    led = {"DB_SERVICE_HOST": "127.0.0.1", "DB_SERVICE_PORT": "40123", "DB_SERVICE_PORT_SQL": "40123"}
    assert changes(environment | {"DB_SERVICE_PORT_METRICS": "9187"}) == led


def test_it_is_said_if_a_program_may_listen_there_itself() -> None:
    result = rewritten({"HOST": "db", "PORT": "5432", "DATABASE_URL": URL})
    assert result.names == ("DATABASE_URL",)
    said = "HOST and PORT aren't led to the guard, as a program may listen there itself: add --env HOST if it connects "
    assert result.remarks == (f"{said}there",)
    assert rewritten({"HOST": "0.0.0.0", "PORT": "5432", "DATABASE_URL": URL}, HERE).remarks == ()


def test_a_host_may_be_the_directory_of_a_socket() -> None:
    environment = {"DB_HOST": "/srv/pg", "DB_PORT": "5432", "PGHOST": "/srv/pg"}
    result = rewritten(environment, SOCKET, guard=[GUARD, GUARD_ON_UNIX])
    assert {name: result.environment[name] for name in result.names} == {
        "DB_HOST": "/run/guard dir",
        "DB_PORT": "6000",
        "PGHOST": "/run/guard dir",
        "PGPORT": "6000",
    }


def test_it_is_said_if_a_host_is_left_because_its_port_isnt_there() -> None:
    result = rewritten({"DB_HOST": "db.internal", "REDIS_HOST": "db.internal", "DATABASE_URL": URL})
    assert result.names == ("DATABASE_URL",)
    assert result.remarks == (
        (
            "DB_HOST isn't led to the guard: it names the server, but DB_PORT, which would name its port, is not set; "
            "add --env DB_HOST to set both, if the application reads DB_PORT, or --listen 127.0.0.2:5432 to keep the "
            "port"
        ),
    )


def test_a_host_alone_is_led_to_a_guard_with_the_servers_port() -> None:
    environment = {"DB_HOST": "db.internal", "REDIS_HOST": "db.internal", "OTHER_DB_HOST": "other", "PGHOST": "other"}
    assert changes(environment, guard=[GUARD, TcpAddress("127.0.0.2", 5432)]) == {"DB_HOST": "127.0.0.2"}
    sockets = {"DB_HOST": "/srv/pg", "PGHOST": "other"}
    result = rewritten(sockets, SOCKET, guard=[UnixAddress("/run/guard", 5432)])
    assert (result.names, result.environment["DB_HOST"], result.remarks) == (("DB_HOST",), "/run/guard", ())
    result = rewritten(sockets, SOCKET, guard=[GUARD_ON_UNIX])
    assert result.names == ()
    assert result.remarks[0].startswith("DB_HOST isn't led to the guard")


def test_it_is_said_if_a_value_names_other_servers_too() -> None:
    several = "postgresql://db.internal,db.example/app?password=S3CRET"
    result = rewritten({"DATABASE_URL": several, "OTHER": URL})
    assert result.names == ("OTHER",)
    assert result.remarks == (
        (
            "DATABASE_URL isn't led to the guard: it names other servers besides db.internal:5432; add --env "
            "DATABASE_URL to lead it to the guard all the same"
        ),
    )
    assert changes({"DATABASE_URL": several}, add=["DATABASE_URL"]) == {
        "DATABASE_URL": "postgresql://127.0.0.1:40123/app?password=S3CRET"
    }


def test_it_is_said_if_a_socket_and_a_port_may_be_one_server() -> None:
    result = rewritten(
        {"URL": "postgresql://localhost:5432/app", "OTHER": "postgresql://db:5432/app", "PGHOST": "/srv/pg"}, SOCKET
    )
    assert result.names == ("PGHOST", "PGPORT")
    assert result.remarks == (
        (
            "URL isn't led to the guard: it leads to localhost:5432, and it isn't known whether that is the server at "
            "unix:/srv/pg:5432; add --env URL if it is"
        ),
    )
    result = rewritten({"URL": "postgresql:///app?host=/srv/pg&port=5432", "PGHOST": "::1"}, HERE)
    assert result.names == ("PGHOST", "PGPORT")
    assert len(result.remarks) == 1


def test_it_is_said_if_a_value_cant_lead_to_a_socket() -> None:
    environment = {"URL": "jdbc:postgresql://db.internal/app", "PGHOST": "db"}
    result = rewritten(environment, guard=[GUARD_ON_UNIX])
    assert result.names == ("PGHOST", "PGPORT")
    assert result.remarks == ("URL is a JDBC URL, which can't lead to a Unix socket: add --listen 127.0.0.1:0",)
    with pytest.raises(ConfigurationError, match="--env URL: URL is a JDBC URL, which can't"):
        rewritten(environment, guard=[GUARD_ON_UNIX], add=["URL"])


def test_what_libpqs_variables_demand_of_every_connection() -> None:
    demands = {
        "PGSSLMODE": "verify-full",
        "PGREQUIRESSL": "1",
        "PGSSLNEGOTIATION": "direct",
        "PGSSLCERTMODE": "require",
        "PGCHANNELBINDING": "require",
        "PGGSSENCMODE": "require",
        "PGSSLROOTCERT": "/etc/ca.pem",
    }
    gone = dict.fromkeys(demands) | {"PGSSLMODE": "disable", "PGGSSENCMODE": "disable"}
    assert changes({"PGHOST": "db"} | demands) == TO_GUARD | gone
    assert changes({"DATABASE_URL": URL} | demands) == {"DATABASE_URL": LED} | gone
    holds = {
        "PGSSLMODE": "prefer",
        "PGREQUIRESSL": "0",
        "PGSSLNEGOTIATION": "postgres",
        "PGSSLCERTMODE": "allow",
        "PGCHANNELBINDING": "prefer",
        "PGGSSENCMODE": "prefer",
        "PGREQUIREPEER": "postgres",
        "PGTARGETSESSIONATTRS": "read-write",
        "PGLOADBALANCEHOSTS": "random",
        "PGSSLCERT": "/c",
        "PGSSLKEY": "/k",
        "PGREQUIREAUTH": "scram-sha-256",
    }
    assert changes({"PGHOST": "db"} | holds) == TO_GUARD
    assert changes({"PGHOST": "db"} | holds, guard=[GUARD_ON_UNIX])["PGREQUIREPEER"] is None


def test_it_is_said_if_others_lose_what_libpqs_variables_demand() -> None:
    environment = {
        "DATABASE_URL": URL,
        "REPORTS_URL": "postgresql://other/reports",
        "PGSSLMODE": "verify-full",
        "PGSSLROOTCERT": "/etc/ca.pem",
    }
    result = rewritten(environment)
    assert result.names == ("DATABASE_URL", "PGSSLMODE")
    assert result.remarks == (
        (
            "PGSSLMODE is disable for the command, and so for REPORTS_URL, which leads to another server, too, unless "
            "it has an sslmode of its own"
        ),
    )
    # No mode can be weaker than that which the system's certificates ask for.
    assert changes(environment | {"PGSSLROOTCERT": "system"}).keys() == {"DATABASE_URL", "PGSSLMODE", "PGSSLROOTCERT"}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("postgresql://u:p@other/x?sslmode=require", "postgresql://u:p@other:5432/x?sslmode=require"),
        ("postgresql://other,[::2],10.0.0.9/x", "postgresql://other:5432,[::2]:5432,10.0.0.9:5432/x"),
        ("postgresql:///x?host=/srv/pg", "postgresql:///x?host=/srv/pg&port=5432"),
        ("postgresql://:5433/x", "postgresql://:5433/x?host=db.internal"),
        ("postgresql:///x?port=5433&a=b", "postgresql:///x?port=5433&a=b&host=db.internal"),
        ("host=other dbname=x sslmode=require", "host=other port=5432 dbname=x sslmode=require"),
        ("hostaddr=10.0.0.9 dbname=x", "hostaddr=10.0.0.9 port=5432 dbname=x"),
        ("port=5433 dbname=x", "port=5433 dbname=x host=db.internal"),
        ('{"a": "postgres:\\/\\/other\\/x"}', '{"a": "postgres:\\/\\/other:5432\\/x"}'),
        ('["postgres://other/x"]', '["postgres://other:5432/x"]'),
        ("postgres://db/x,postgres://other/x", "postgres://127.0.0.1:40123/x,postgres://other:5432/x"),
        ("postgresql://other:5432/x", None),
        ("postgresql://other:/x?port=5432", None),
        ("host=other port=5432 dbname=x", None),
        ("jdbc:postgresql://other/x", None),
        ("Host=other;Username=x", None),
        ("mysql://other/x", None),
    ],
)
def test_what_leads_elsewhere_still_does_though_libpqs_variables_have_changed(before: str, after: str | None) -> None:
    """What says no port would be taken to the guard's, and what says no host to the guard's host."""
    result = rewritten({"PGHOST": "db.internal", "OTHER": before})
    assert result.environment["OTHER"] == (before if after is None else after)
    if after is not None:
        assert result.line.endswith("; made to lead where it did, although PGPORT has changed: OTHER")
    assert rewritten({"PGHOST": "db.internal", "OTHER": before}, keep=["OTHER"]).environment["OTHER"] == before
    assert rewritten({"PGHOST": "elsewhere", "OTHER": before.replace("db", "x")}).names == ()


def test_what_is_to_be_kept_is_kept() -> None:
    environment = {
        "DATABASE_URL": URL,
        "OTHER_URL": URL,
        "PGHOST": "db",
        "DB_HOST": "db",
        "DB_PORT": "5432",
        "PGSSLMODE": "require",
    }
    led = {"OTHER_URL": LED}
    assert changes(environment, keep=["DATABASE_URL", "PGHOST", "DB_PORT", "PGSSLMODE", "UNSET"]) == led
    assert changes({"DATABASE_URL": URL}, keep=["DATABASE_URL"]) == {}


@pytest.mark.parametrize(
    ("environment", "add", "led"),
    [
        (
            {"URL": "postgresql://other/app?sslmode=require"},
            ["URL"],
            {"URL": "postgresql://127.0.0.1:40123/app?sslmode=disable"},
        ),
        ({"X": "Server=other;User Id=app"}, ["X"], {"X": "Server=127.0.0.1;Port=40123;User Id=app"}),
        ({"X": "host=other user=app"}, ["X"], {"X": "host=127.0.0.1 port=40123 user=app"}),
        ({"X": "other:1"}, ["X"], {"X": "127.0.0.1:40123"}),
        ({"DB_HOST": "other", "DB_PORT": "1"}, ["DB_HOST"], {"DB_HOST": "127.0.0.1", "DB_PORT": "40123"}),
        ({"DB_HOST": "other"}, ["DB_HOST"], {"DB_HOST": "127.0.0.1", "DB_PORT": "40123"}),
        ({"WHERE": "other", "HOW": "1"}, ["WHERE", "HOW"], {"WHERE": "127.0.0.1", "HOW": "40123"}),
        ({"HOST": "other", "PORT": "1"}, ["HOST"], {"HOST": "127.0.0.1", "PORT": "40123"}),
        ({"DB_PORT": "1"}, ["DB_PORT"], {"DB_PORT": "40123"}),
        ({"PGHOST": "other"}, ["PGHOST"], TO_GUARD),
        ({"DATABASE_URL": URL}, ["PGHOST"], TO_GUARD | {"DATABASE_URL": LED}),
    ],
)
def test_a_variable_is_added_by_its_name(environment: dict[str, str], add: list[str], led: dict[str, str]) -> None:
    """What it leads to makes no difference, nor does what else may be written so."""
    environment = {"PGHOST": "other"} | environment
    assert changes(environment, add=add) == led
    assert changes(environment).keys() <= {"DATABASE_URL"}


@pytest.mark.parametrize(
    ("environment", "add", "keep", "says"),
    [
        ({}, ["DATABASE_URL"], [], "--env DATABASE_URL: DATABASE_URL is not set: set it as for a run without pgguard"),
        (
            {"DATABASE_URL": ""},
            ["DATABASE_URI"],
            [],
            "--env DATABASE_URI: DATABASE_URI is not set: did you mean DATABAS",
        ),
        ({}, ["X=S3CRET"], [], "--env X: give the name of a variable alone, without a value"),
        ({}, [], ["X=S3CRET"], "--keep-env X: give the name of a variable alone, without a value"),
        (
            {"X": "S3CRET in words"},
            ["X"],
            [],
            "--env X: its value is not understood: it may be a PostgreSQL URL, a con",
        ),
        ({"X": "mysql://S3CRET@db/x"}, ["X"], [], "--env X: its value is not understood"),
        ({"X": ""}, ["X"], [], "--env X: its value is not understood"),
        (
            {"WHERE": "db"},
            ["WHERE"],
            [],
            "--env WHERE: it holds a host, but it isn't known which variable holds its port",
        ),
        ({"X": URL}, ["X"], ["X"], "--env X and --keep-env X contradict each other: leave one of them out"),
    ],
)
def test_what_cant_be_added_says_why(environment: dict[str, str], add: list[str], keep: list[str], says: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        rewritten(environment, add=add, keep=keep)
    assert str(raised.value).startswith(says)
    assert "S3CRET" not in str(raised.value)


def test_the_environment_that_is_given_is_left_alone() -> None:
    environment = {"DATABASE_URL": URL}
    rewritten(environment)
    assert environment == {"DATABASE_URL": URL}


def test_names_are_resolved_by_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(host: str, *_: object, **__: object) -> list[tuple[object, ...]]:
        if host == "known":
            return [(0, 0, 0, "", ("10.0.0.5", 0))]
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    environment = {"A": "postgresql://known/app", "B": "postgresql://unknown/app", "C": "postgresql://known:1/app"}
    result = rewrite(environment, Upstream((DB, TcpAddress("10.0.0.5", 5432))[1:], 10), [GUARD], directory=PRIVATE)
    assert result.names == ("A",)


def test_it_is_not_waited_for_a_name_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(3600))
    resolver = Resolver(0.05)
    assert resolver("one") == frozenset()
    assert resolver("two") == resolver("one") == frozenset()


def test_names_are_not_resolved_where_the_port_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places.Resolver, "__call__", lambda *_: pytest.fail("resolved"))
    environment = {"A": "postgresql://a:1/app", "B": "postgresql://10.0.0.6:5432/app", "PGHOST": "10.0.0.7"}
    result = rewrite(environment, Upstream((TcpAddress("10.0.0.5", 5432),), 10), [GUARD], directory=PRIVATE)
    assert result.names == ()


def test_files_are_for_their_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_files({path: b"S3CRET"})
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_bytes() == b"S3CRET"
    with pytest.raises(FileExistsError):
        write_files({path: b""})


def test_servers_that_variables_name_can_be_listed() -> None:
    environment = {"A": URL, "B": "mysql://x/y", "C": "host=a,b port=1 dbname=x", "D": "db:5432", "HOME": "/nowhere"}
    assert named_servers(environment) == [("A", (DB,)), ("C", (TcpAddress("a", 1), TcpAddress("b", 1)))]


@pytest.mark.parametrize("url", ["postgresql://app:123?4@other/x", "postgresql://app:123#4@other/x"])
def test_no_part_of_a_password_is_taken_for_a_port(url: str) -> None:
    """It would be shown."""
    assert named_servers({"URL": url, "HOME": "/nowhere"}) == [("URL", (TcpAddress("other", 5432),))]
    assert named_servers({"URL": "postgresql://app:123/4@other/x", "HOME": "/nowhere"}) == []
