"""Whatever leads to the server leads to the guard afterwards, and nothing else in a value has changed."""

from __future__ import annotations

import pytest

from pgguard.proxy.addresses import Address, TcpAddress
from tests.launch.surroundings import DB, GUARD, GUARD_ON_UNIX, HERE, SOCKET, value

TO_TCP = [
    # schemes
    ("postgresql://db.internal", "postgresql://127.0.0.1:40123"),
    ("postgres://app:pw@db.internal:5432/app", "postgres://app:pw@127.0.0.1:40123/app"),
    ("postgresql+asyncpg://app@db.internal/app", "postgresql+asyncpg://app@127.0.0.1:40123/app"),
    ("postgresql+psycopg2://app@db.internal/app", "postgresql+psycopg2://app@127.0.0.1:40123/app"),
    ("postgis://app@db.internal/app", "postgis://app@127.0.0.1:40123/app"),
    ("ecto://app:pw@db.internal/app", "ecto://app:pw@127.0.0.1:40123/app"),
    ("db+postgresql://app@db.internal/app", "db+postgresql://app@127.0.0.1:40123/app"),
    ("sqla+postgresql+psycopg://app@db.internal/app", "sqla+postgresql+psycopg://app@127.0.0.1:40123/app"),
    ("POSTGRESQL://db.internal/app", "POSTGRESQL://127.0.0.1:40123/app"),
    ("cockroachdb://root@db.internal:5432/app", "cockroachdb://root@127.0.0.1:40123/app"),
    ("jdbc:postgresql://db.internal/app?user=a&password=b", "jdbc:postgresql://127.0.0.1:40123/app?user=a&password=b"),
    ("jdbc:otel:postgresql://db.internal:5432/app", "jdbc:otel:postgresql://127.0.0.1:40123/app"),
    ("jdbc:pgsql://db.internal/app", "jdbc:pgsql://127.0.0.1:40123/app"),
    ("r2dbc:pool:postgresql://app:pw@db.internal/app", "r2dbc:pool:postgresql://app:pw@127.0.0.1:40123/app"),
    ("vertx-reactive:postgresql://db.internal:5432/app", "vertx-reactive:postgresql://127.0.0.1:40123/app"),
    ("jdbc:aws-wrapper:postgresql://db.internal/app", "jdbc:aws-wrapper:postgresql://127.0.0.1:40123/app"),
    ("pdo-pgsql://app@db.internal/app", "pdo-pgsql://app@127.0.0.1:40123/app"),
    ("pgx5://app@db.internal/app", "pgx5://app@127.0.0.1:40123/app"),
    ("asyncpg://app@db.internal/app", "asyncpg://app@127.0.0.1:40123/app"),
    ("r2dbcs:postgresql://app:pw@db.internal/app", "r2dbc:postgresql://app:pw@127.0.0.1:40123/app"),
    # hosts
    ("postgresql://DB.Internal./app", "postgresql://127.0.0.1:40123/app"),
    ("postgresql://10.0.0.5/app", "postgresql://127.0.0.1:40123/app"),
    ("postgresql://[::ffff:10.0.0.5]:5432/app", "postgresql://127.0.0.1:40123/app"),
    ("postgresql://db:5432/app", "postgresql://127.0.0.1:40123/app"),
    ("postgresql://app@/app?host=db.internal", "postgresql://app@/app?host=127.0.0.1&port=40123"),
    ("postgresql://app@/app?port=5432&x=1&host=db", "postgresql://app@/app?port=40123&x=1&host=127.0.0.1"),
    ("postgresql:///app?host=db.internal:5432&a=b", "postgresql:///app?host=127.0.0.1:40123&a=b"),
    ("postgresql://app@:5432/app?host=db", "postgresql://app@/app?host=127.0.0.1&port=40123"),
    ("postgresql://?hostaddr=10.0.0.5", "postgresql://?hostaddr=127.0.0.1&port=40123"),
    ("postgresql://db.internal/app?hostaddr=10.0.0.5", "postgresql://127.0.0.1:40123/app"),
    ("postgresql://ignored/app?host=db.internal", "postgresql://127.0.0.1:40123/app?host=127.0.0.1"),
    # user, password, database, parameters
    ("postgresql://a%40b:p%2Fw%40%25@db.internal/d%20b", "postgresql://a%40b:p%2Fw%40%25@127.0.0.1:40123/d%20b"),
    ("postgresql://app:p@w@db.internal/app", "postgresql://app:p@w@127.0.0.1:40123/app"),
    ("postgresql://app:p/w@db.internal/app", "postgresql://app:p/w@127.0.0.1:40123/app"),
    ("postgresql://app:p?w@db.internal/app", "postgresql://app:p?w@127.0.0.1:40123/app"),
    ("postgresql://app:1?w@db.internal/app", "postgresql://app:1?w@127.0.0.1:40123/app"),
    ("postgresql://app:1#w@db.internal/app", "postgresql://app:1#w@127.0.0.1:40123/app"),
    ("postgresql://app:p w@db.internal/app", "postgresql://app:p w@127.0.0.1:40123/app"),
    ("postgresql://db.internal?user=a@b&x=y", "postgresql://127.0.0.1:40123?user=a@b&x=y"),
    (
        "postgresql://db.internal/app?options=-c%20x%3Dy&&application_name=a+b&keepalives#here",
        "postgresql://127.0.0.1:40123/app?options=-c%20x%3Dy&&application_name=a+b&keepalives#here",
    ),
    # libpq's connection strings, and data source names
    ("host=db.internal dbname=app", "host=127.0.0.1 port=40123 dbname=app"),
    ("dbname=app host=db port=5432 user=a", "dbname=app host=127.0.0.1 port=40123 user=a"),
    (
        " host = 'db.internal'  password='it\\'s = x' dbname=a ",
        " host = 127.0.0.1 port=40123  password='it\\'s = x' dbname=a ",
    ),
    ("hostaddr=10.0.0.5 dbname=app", "hostaddr=127.0.0.1 port=40123 dbname=app"),
    ("host=db hostaddr=10.0.0.5 port=5432", "host=127.0.0.1 port=40123"),
    ("host=db sslmode=verify-full sslrootcert=/x user=a", "host=127.0.0.1 port=40123 sslmode=disable user=a"),
    (
        "host=db user=gorm password=gorm; dbname=gorm port=5432 TimeZone=Asia/Shanghai",
        "host=127.0.0.1 user=gorm password=gorm; dbname=gorm port=40123 TimeZone=Asia/Shanghai",
    ),
    ("host=db dbname=a password=x;", "host=127.0.0.1 port=40123 dbname=a password=x;"),
    ("pgsql:host=db;dbname=app;sslmode=require", "pgsql:host=127.0.0.1;port=40123;dbname=app;sslmode=disable"),
    ("pgsql:host=db port=5432 dbname=app", "pgsql:host=127.0.0.1 port=40123 dbname=app"),
    ("dbi:Pg:dbname=app;host=db;port=5432", "dbi:Pg:dbname=app;host=127.0.0.1;port=40123"),
    ("DBI:Pg(RaiseError=>1):host=db", "DBI:Pg(RaiseError=>1):host=127.0.0.1;port=40123"),
    # Npgsql's and ODBC's
    (
        'Host=db.internal;Port=5432;Username=app;Password="a;b";Database=app',
        'Host=127.0.0.1;Port=40123;Username=app;Password="a;b";Database=app',
    ),
    ("Host=db;Username=app;Database=app;", "Host=127.0.0.1;Port=40123;Username=app;Database=app;"),
    ("Server=db;Port=5432;User Id=app;Ssl Mode=Require", "Server=127.0.0.1;Port=40123;User Id=app;Ssl Mode=Disable"),
    (
        "Server=db; Database=a; Search Path=x; SSL Mode=VerifyFull; Root Certificate=/c; Trust Server Certificate=true",
        "Server=127.0.0.1;Port=40123; Database=a; Search Path=x; SSL Mode=Disable; Trust Server Certificate=true",
    ),
    ("Host=db:5432;Username=a;Password=b", "Host=127.0.0.1:40123;Username=a;Password=b"),
    (
        "Driver={PostgreSQL Unicode};Server=db;Database=app;Uid=a;Pwd={p;w};SSLmode=require",
        "Driver={PostgreSQL Unicode};Server=127.0.0.1;Port=40123;Database=app;Uid=a;Pwd={p;w};SSLmode=disable",
    ),
    ("host=db;port=5432;database=app", "host=127.0.0.1;port=40123;database=app"),
    # bare addresses
    ("db.internal:5432", "127.0.0.1:40123"),
    ("tcp://10.0.0.5:5432", "tcp://127.0.0.1:40123"),
    ("db:5432, redis:6379", "127.0.0.1:40123, redis:6379"),
    # within other text
    (
        '{"url": "postgres:\\/\\/a:\\u0062@db\\/app?sslmode=require", "n": 1.50}',
        '{"url": "postgres:\\/\\/a:b@127.0.0.1:40123\\/app?sslmode=disable", "n": 1.50}',
    ),
    (
        '[{"host": "db", "port": 5432, "password": "x", "ssl": true}, {"host": "redis", "port": 5432}]',
        '[{"host": "127.0.0.1", "port": 40123, "password": "x", "ssl": false}, {"host": "redis", "port": 5432}]',
    ),
    (
        '{"a": {"hostname": "db.internal", "port": "5432", "uri": "postgres://db.internal:5432/x"}}',
        '{"a": {"hostname": "127.0.0.1", "port": "40123", "uri": "postgres://127.0.0.1:40123/x"}}',
    ),
    (
        "postgres://a@db/x, postgres://b@other/y;redis://db:5432/0 mysql://db:5432/z",
        "postgres://a@127.0.0.1:40123/x, postgres://b@other/y;redis://db:5432/0 mysql://db:5432/z",
    ),
    (
        "-Xmx1g -Dspring.datasource.url=jdbc:postgresql://db/app?user=x&ssl=true -Dx=y",
        "-Xmx1g -Dspring.datasource.url=jdbc:postgresql://127.0.0.1:40123/app?user=x -Dx=y",
    ),
    ("psql 'postgresql://a:b c@db/app' -X", "psql 'postgresql://a:b c@127.0.0.1:40123/app' -X"),
    ("(see postgresql://db/app).", "(see postgresql://127.0.0.1:40123/app)."),
    ('"postgresql://db/app"', '"postgresql://127.0.0.1:40123/app"'),
    ("  postgresql://db/app\n", "  postgresql://127.0.0.1:40123/app\n"),
]


@pytest.mark.parametrize(("before", "after"), TO_TCP)
def test_what_leads_to_the_server_leads_to_the_guard(before: str, after: str) -> None:
    assert value(before) == after


PARAMETERS = [
    ("postgresql", "sslmode=require&x=1", "sslmode=disable&x=1"),
    ("postgresql", "x=1&sslmode=verify-full", "x=1&sslmode=disable"),
    ("postgresql", "sslmode=no-verify", "sslmode=disable"),
    ("postgresql", "sslmode=prefer", "sslmode=prefer"),
    ("postgresql", "sslmode=allow&sslnegotiation=postgres", None),
    (
        "postgresql",
        "sslmode=require&sslrootcert=system&sslnegotiation=direct&channel_binding=require",
        "sslmode=disable",
    ),
    ("postgresql", "sslcert=c&sslkey=k&sslcertmode=require&requiressl=1", ""),
    ("postgresql", "sslcertmode=allow&requiressl=0&channel_binding=prefer&gssencmode=prefer", None),
    ("postgresql", "gssencmode=require", "gssencmode=disable"),
    ("postgresql", "target_session_attrs=read-write&load_balance_hosts=random&requirepeer=postgres", None),
    ("postgresql", "sslpassword=x&sslsni=0&ssl_min_protocol_version=TLSv1.3&sslcrl=f", None),
    ("postgresql+asyncpg", "ssl=require&prepared_statement_cache_size=0", "prepared_statement_cache_size=0"),
    ("postgresql+asyncpg", "ssl=prefer", None),
    ("postgres", "ssl=true", ""),
    ("postgres", "ssl=1&sslmode=no-verify", "sslmode=disable"),
    ("postgres", "ssl=0&pool=3", None),
    ("postgres", "tlsmode=require", "tlsmode=disable"),
    ("jdbc:postgresql", "ssl", ""),
    ("jdbc:postgresql", "ssl=true&sslfactory=x.Y&user=u", "sslfactory=x.Y&user=u"),
    (
        "jdbc:postgresql",
        "sslmode=verify-full&channelBinding=require&gssEncMode=require",
        "sslmode=disable&gssEncMode=disable",
    ),
    ("r2dbc:postgresql", "sslMode=verify_full&sslRootCert=f", "sslMode=disable"),
    # SQLAlchemy, for one, lets a value hold a space
    ("postgresql+psycopg2", "options=-c a.b=c -d&sslmode=require&x=y z", "options=-c a.b=c -d&sslmode=disable&x=y z"),
    ("postgresql", "x=y see http://db?a=b&sslmode=require", None),
]
"""By the URL's scheme, what becomes of parameters; ``None``: they are left byte for byte."""


@pytest.mark.parametrize(("scheme", "before", "after"), PARAMETERS)
def test_parameters_that_cant_hold_go_and_others_stay(scheme: str, before: str, after: str | None) -> None:
    after = before if after is None else after
    assert value(f"{scheme}://db/a?{before}") == f"{scheme}://127.0.0.1:40123/a{'?' if after else ''}{after}"


@pytest.mark.parametrize(
    "text",
    [
        # another host, another port
        "postgresql://db.example/app",
        "postgresql://db.internal:5433/app?sslmode=require",
        "postgresql://10.0.0.6/app",
        "postgresql://localhost/app",
        "postgresql://app@/app?host=/srv/pg",
        "postgresql:///app",
        "cockroachdb://root@db.internal/app",
        "jdbc:postgresql:app",
        "host=db.internal port=5433 dbname=app sslmode=require",
        "Host=db.internal;Port=5433;Username=app",
        "db.internal:5433",
        # another database
        "mysql://app@db.internal:5432/app",
        "redis://db.internal:5432/0",
        "amqp://db.internal:5432",
        "http://db.internal:5432/",
        "jdbc:mysql://db.internal:5432/app",
        "jdbc:tc:postgresql:15:///db.internal",
        "jdbc:tc:postgresql:15://db.internal/app",
        "jdbc:tc:postgresql://db.internal/app",
        "jdbc:yugabytedb://db.internal/app",
        "mysql:host=db.internal;port=5432;dbname=app",
        "Server=db.internal;Database=app;User Id=app;Password=x",
        "Server=db.internal;Database=app;Uid=app;Pwd=x",
        "Server=db.internal;Database=app;User Id=sa;Password=x;TrustServerCertificate=true;Max Pool Size=3",
        "Data Source=db.internal;Initial Catalog=app;Trust Server Certificate=true;Encrypt=true",
        "Server=db.internal;User=app;Password=x;Maximum Pool Size=3;SslMode=Required",
        "Driver={MySQL ODBC 8.0};Server=db.internal;Port=5432",
        "Server=tcp:db.internal,5432;Database=app",
        # not an address, or not of a connection
        "db.internal",
        "5432",
        "",
        "postgres:5432",
        "127.0.0.1:5432:5432",
        "db.internal:5432:app:app:secret",
        "host=db.internal user=app",
        "host=db.internal interval=5",
        "postgresql",
        "postgresql://",
        "postgresql:// db.internal",
        "postgresql://app:db.internal",
        "postgresql://db.internal:5432/pass@db.internal/app",
        "postgresql://a:5/p@db.internal/app",
        "postgresql://[db.internal/app",
        "postgresql://db.internal:5432x/app",
        "postgresql://db.internal:99999/app",
        "mypostgresql://db.internal/app",
        "git+ssh://git@db.internal:5432/postgresql.git",
        "https://x/?next=/postgresql://db.internal/",
        "apache/postgresql://db.internal/app",
        '{"host": "db.internal"}',
        '{"host": "db.internal", "port": 5433}',
        '{"host": "db.internal", "other": {"port": 5432}}',
        '{"host": "db.internal", "port": 5432',
        '["db.internal", 5432]',
        "[1, 2",
        # several servers, of which one is another's
        "postgresql://db.internal,db.example/app",
        "postgresql://db.internal,db.internal:5433/app?target_session_attrs=primary",
        "host=db.internal,db.example dbname=app",
        "postgresql://app@/app?host=db.internal&host=other",
    ],
)
def test_what_leads_elsewhere_is_left_byte_for_byte(text: str) -> None:
    assert value(text) == text


LOOPBACK = ["localhost", "LOCALHOST", "127.0.0.1", "[::1]", "0.0.0.0", "mine", "[::ffff:127.0.0.1]", "[0:0::1]"]


@pytest.mark.parametrize("host", LOOPBACK)
@pytest.mark.parametrize("upstream", [TcpAddress(host.strip("[]"), 5432) for host in LOOPBACK])
def test_this_host_is_one_by_all_its_names(host: str, upstream: Address) -> None:
    assert value(f"postgresql://{host}:5432/app", upstream) == "postgresql://127.0.0.1:40123/app"


@pytest.mark.parametrize("host", ["127.0.0.2", "127.0.1.1", "192.168.0.1", "[::2]", "host.docker.internal"])
def test_other_addresses_may_be_other_servers(host: str) -> None:
    assert value(f"postgresql://{host}/app", HERE) == f"postgresql://{host}/app"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("postgresql:///app?host=/srv/pg", "postgresql:///app?host=127.0.0.1&port=40123"),
        ("postgresql://%2Fsrv%2Fpg/app", "postgresql://127.0.0.1:40123/app"),
        ("postgresql://app@%2fsrv%2fpg:5432/app?x=y", "postgresql://app@127.0.0.1:40123/app?x=y"),
        ("postgresql://localhost/app?host=/srv/pg", "postgresql://127.0.0.1:40123/app?host=127.0.0.1"),
        ("host=/srv/pg/ dbname=app", "host=127.0.0.1 port=40123 dbname=app"),
        ("Host=/srv/pg;Username=a", "Host=127.0.0.1;Port=40123;Username=a"),
    ],
)
def test_a_socket_of_the_server_can_lead_to_a_guard_on_tcp(before: str, after: str) -> None:
    assert value(before, SOCKET) == after


@pytest.mark.parametrize("guards", [(GUARD, GUARD_ON_UNIX), (GUARD_ON_UNIX, GUARD), (GUARD_ON_UNIX,)])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("postgresql:///app?host=/srv/pg&x=y", "postgresql:///app?host=/run/guard%20dir&port=6000&x=y"),
        ("postgresql://%2Fsrv%2Fpg/app", "postgresql://%2Frun%2Fguard%20dir:6000/app"),
        ("host=/srv/pg dbname=app requirepeer=postgres", "host='/run/guard dir' port=6000 dbname=app"),
        ("Host=/srv/pg;Username=a", "Host=/run/guard dir;Port=6000;Username=a"),
    ],
)
def test_a_socket_leads_to_a_socket_if_the_guard_has_one(before: str, after: str, guards: tuple[Address, ...]) -> None:
    assert value(before, SOCKET, guard=guards) == after


@pytest.mark.parametrize("text", ["postgresql://localhost/app", "postgresql://localhost:5432/app", "localhost:5432"])
def test_a_socket_and_a_port_are_two_servers_as_far_as_is_known(text: str) -> None:
    assert value(text, SOCKET) == text
    socket = "postgresql:///app?host=/srv/pg"
    assert value(socket, HERE) == socket


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("postgresql://u:p@db.internal/app", "postgresql://u:p@/app?host=/run/guard%20dir&port=6000"),
        ("postgresql://db/a?x=y#z", "postgresql:///a?x=y&host=/run/guard%20dir&port=6000#z"),
        ("host=db.internal dbname=app", "host='/run/guard dir' port=6000 dbname=app"),
        ("hostaddr=10.0.0.5 dbname=app", "host='/run/guard dir' port=6000 dbname=app"),
    ],
)
def test_a_guard_may_be_on_a_socket_alone(before: str, after: str) -> None:
    assert value(before, guard=[GUARD_ON_UNIX]) == after


@pytest.mark.parametrize("text", ["jdbc:postgresql://db.internal/app", "db.internal:5432"])
def test_what_knows_no_sockets_is_left_where_the_guard_has_nothing_else(text: str) -> None:
    assert value(text, guard=[GUARD_ON_UNIX]) == text


@pytest.mark.parametrize(
    ("guard", "after"),
    [
        (TcpAddress("::1", 40123), "postgresql://[::1]:40123/app"),
        (TcpAddress("0.0.0.0", 40123), "postgresql://127.0.0.1:40123/app"),
        (TcpAddress("::", 40123), "postgresql://[::1]:40123/app"),
    ],
)
def test_a_guard_may_listen_on_other_addresses(guard: TcpAddress, after: str) -> None:
    assert value("postgresql://db.internal/app", guard=[guard]) == after


CLUSTER = (DB, TcpAddress("standby", 5433))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("postgresql://db.internal,standby:5433/app?target_session_attrs=any", "?target_session_attrs=any"),
        ("postgresql://standby:5433,db.internal/app", ""),
        ("postgresql://db:5432/app", ""),
    ],
)
def test_several_servers_become_one_guard(before: str, after: str) -> None:
    assert value(before, *CLUSTER) == f"postgresql://127.0.0.1:40123/app{after}"


def test_parameters_of_several_servers_become_one() -> None:
    both = "postgresql:///app?host=db.internal&x=y&host=standby&port=5432&port=5433"
    assert value(both, *CLUSTER) == "postgresql:///app?host=127.0.0.1&x=y&port=40123"
    both = "host=db.internal,standby hostaddr=10.0.0.5, port=5432,5433 dbname=app"
    assert value(both, *CLUSTER) == "host=127.0.0.1 port=40123 dbname=app"


@pytest.mark.parametrize("text", ["postgresql://standby:5433/app", "postgresql://db.internal,other/app"])
def test_one_of_several_servers_that_the_guard_prefers_another_to_is_left(text: str) -> None:
    assert value(text, *CLUSTER) == text


@pytest.mark.parametrize("name", ["ConnectionStrings__Postgres", "NPGSQL_CONNECTION"])
def test_a_name_can_say_whose_a_connection_string_is(name: str) -> None:
    text = "Server=db.internal;Database=app;User Id=app"
    assert value(text, name=name) == "Server=127.0.0.1;Port=40123;Database=app;User Id=app"


@pytest.mark.parametrize(
    "text",
    [
        "a" * 120_000,
        "a+" * 60_000,
        "jdbc:" + "a:" * 60_000,
        "postgresql://" * 9_000,
        "postgresql://" + "@" * 120_000,
        "postgresql://db.example?" + "&" * 120_000,
        "a=" * 60_000,
        "a=b " * 30_000,
        "a=b;" * 30_000,
        "a='" * 40_000,
        'a="' * 40_000,
        " " * 120_000,
        "a:1 " * 30_000,
        "[" * 120_000,
        "{" + '"a":1,' * 20_000,
        "://" * 40_000,
    ],
    ids=lambda text: text[:24],
)
@pytest.mark.timeout(20)
def test_long_values_take_no_time(text: str) -> None:
    assert value(text) == text
