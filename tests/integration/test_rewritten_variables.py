"""Real drivers take what ``pgguard run`` makes of a variable, and arrive: with the user, the database and the rest.

Each variable names a server that isn't there, and demands TLS of it. What stands for the guard is a real server.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg
import psycopg
import psycopg2
import pytest
import sqlalchemy
from psycopg import pq
from sqlalchemy.ext.asyncio import create_async_engine

from pgguard.launch.environment import Rewritten, rewrite, write_files
from pgguard.proxy.addresses import Address, TcpAddress, UnixAddress, Upstream
from tests.integration.running import interpreter
from tests.languages import node_directory
from tests.servers import not_installed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tests.servers import Server

pytestmark = pytest.mark.parametrize("server", ["embedded"], indirect=True)

DB = TcpAddress("db.invalid", 5432)
SOCKET = UnixAddress("/srv/not there", 5432)
ASK = "SELECT current_user || ' ' || current_database() || ' ' || current_setting('application_name')"
ANSWER = "postgres postgres it is me"
SECONDS = 60

URL = "://postgres:p%40ss%2Fword@db.invalid/postgres?application_name=it%20is%20me"
TLS = "&sslmode=verify-full&sslrootcert=system&channel_binding=require&sslnegotiation=direct&gssencmode=require"
LIBPQ = [
    f"postgresql{URL}{TLS}",
    "postgres:///postgres?host=db.invalid&user=postgres&application_name=it is me&sslmode=require".replace(" ", "%20"),
    "host=db.invalid user=postgres dbname=postgres application_name='it is me' sslmode=verify-full sslrootcert=system",
    "hostaddr=192.0.2.1 dbname=postgres user=postgres application_name='it is me' requiressl=1",
    "postgresql://postgres@%2Fsrv%2Fnot%20there/postgres?application_name=it%20is%20me&requirepeer=nobody",
    "postgresql://postgres@/postgres?host=/srv/not%20there&application_name=it%20is%20me",
]


def rewritten(environment: Mapping[str, str], server: Server, directory: Path, *, unix: bool = False) -> Rewritten:
    """An environment in which everything leads to the server that stands for the guard."""
    before = {"HOME": "/nowhere", "PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", **environment}
    guard: list[Address] = [
        UnixAddress(server.unix.host, server.unix.port) if unix else TcpAddress(server.tcp.host, server.tcp.port)
    ]
    known = frozenset({"192.0.2.1"})
    in_socket = any("/srv/not" in value or "%2Fsrv" in value for value in environment.values())
    upstream = Upstream((SOCKET if in_socket else DB,), 10.0)
    result = rewrite(before, upstream, guard, directory=directory, resolve=lambda _: known)
    assert set(result.names) >= {name for name in environment if name.startswith("URL")}
    write_files(result.files)
    return result


@pytest.fixture(autouse=True)
def _without_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("PG"):
            monkeypatch.delenv(name)


def run(command: Sequence[object], environment: Mapping[str, str]) -> list[str]:
    words = [str(word) for word in command]
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=SECONDS, env=dict(environment))
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
@pytest.mark.parametrize("text", LIBPQ)
def test_libpq(text: str, unix: bool, server: Server, tmp_path: Path) -> None:
    led = rewritten({"URL": text}, server, tmp_path, unix=unix).environment["URL"]
    with psycopg.connect(led) as connection:
        row = connection.execute(ASK).fetchone()
    assert row == (ANSWER,)
    with psycopg2.connect(led) as old:
        assert old.get_dsn_parameters()["user"] == "postgres"
    old.close()


@pytest.mark.parametrize(
    "variables",
    [
        {"PGHOST": "db.invalid", "PGSSLMODE": "require", "PGREQUIRESSL": "1", "PGCHANNELBINDING": "require"},
        {"PGHOSTADDR": "192.0.2.1", "PGPORT": "5432", "PGSSLMODE": "verify-full", "PGSSLROOTCERT": "system"},
        {"PGHOST": "db.invalid", "PGSSLNEGOTIATION": "direct", "PGSSLMODE": "require", "PGGSSENCMODE": "require"},
        {"PGHOST": "db.invalid", "PGSSLCERTMODE": "require", "PGREQUIREPEER": "nobody"},
        {},
    ],
)
def test_libpqs_variables(variables: dict[str, str], server: Server, tmp_path: Path) -> None:
    """With psql as it comes with the server: nothing is set is one of the cases."""
    own = {"PGUSER": "postgres", "PGDATABASE": "postgres", "PGAPPNAME": "it is me"}
    psql = [server.bindir / "psql", "-XAtc", ASK]
    for unix in (False, True):
        result = rewritten(variables | own, server, tmp_path, unix=unix)
        assert run(psql, result.environment) == [ANSWER]


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://192.0.2.7/x",
        "host=192.0.2.7 dbname=x",
        "hostaddr=192.0.2.7 dbname=x",
        "postgresql:///x?host=/srv/elsewhere",
        "postgresql:///x?port=5433",
        "port=5433 dbname=x",
    ],
)
def test_libpq_goes_where_it_went_with_what_leads_elsewhere(
    text: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {"PGHOST": "192.0.2.1", "OTHER": text}
    led = rewritten(before, server, tmp_path).environment

    def place(environment: Mapping[str, str]) -> tuple[bytes, bytes]:
        with monkeypatch.context() as patched:
            for name in ("PGHOST", "PGPORT"):
                if name in environment:
                    patched.setenv(name, environment[name])
            connection = pq.PGconn.connect_start(environment["OTHER"].encode())
        found = connection.hostaddr or connection.host, connection.port
        connection.finish()
        return found

    assert place(led) == place(before)
    assert place(led | {"OTHER": text}) != place(before)


SERVICE = """\
[main]
host=db.invalid
user=postgres
dbname=postgres
application_name=it is me
sslmode=verify-full
sslrootcert=system

[other]
host=192.0.2.2
"""


@pytest.mark.parametrize("variables", [{"PGSERVICE": "main"}, {"URL": "postgresql://?service=main"}])
@pytest.mark.parametrize("where", ["PGSERVICEFILE", "HOME"])
def test_services(variables: dict[str, str], where: str, server: Server, tmp_path: Path) -> None:
    """Programs that know no other way to the server than ``service=main`` arrive too, as on a command line."""
    own = tmp_path / ".pg_service.conf"
    own.write_text(SERVICE)
    environment = variables | {where: str(own if where == "PGSERVICEFILE" else tmp_path)}
    (tmp_path / "private").mkdir()
    result = rewritten(environment | {"PGHOST": "192.0.2.3"}, server, tmp_path / "private")
    for conninfo in (result.environment.get("URL", ""), "service=main", "postgresql:///?service=main"):
        assert run([server.bindir / "psql", "-XAtc", ASK, conninfo], result.environment) == [ANSWER]


@pytest.mark.parametrize("host", ["db.invalid", "*"])
def test_a_password_is_found(host: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server asks for none here, but libpq has it ready; so has asyncpg, which looks in the same file."""
    passwords = tmp_path / ".pgpass"
    passwords.write_text(f"other:5432:*:*:wrong\n{host}:5432:postgres:postgres:se\\:cret\n*:*:*:*:wrong too\n")
    passwords.chmod(0o600)
    (tmp_path / "private").mkdir()
    environment = {"URL": f"postgresql{URL.replace(':p%40ss%2Fword', '')}", "HOME": str(tmp_path)}
    result = rewritten(environment, server, tmp_path / "private")
    monkeypatch.setenv("PGPASSFILE", result.environment["PGPASSFILE"])
    with psycopg.connect(result.environment["URL"]) as connection:
        assert connection.info.password == "se:cret"


def test_asyncpg(server: Server, tmp_path: Path) -> None:
    settings = URL.partition("?")[0]
    before = {
        "URL": f"postgresql{settings}?sslmode=require&application_name=it%20is%20me",
        "URL2": "postgres://postgres@/postgres?host=db.invalid&application_name=it%20is%20me&ssl=require",
    }
    led = rewritten(before, server, tmp_path).environment

    async def ask(dsn: str) -> object:
        connection = await asyncpg.connect(dsn)
        try:
            return await connection.fetchval(ASK)
        finally:
            await connection.close()

    for name in before:
        assert asyncio.run(ask(led[name])) == ANSWER


def test_sqlalchemy(server: Server, tmp_path: Path) -> None:
    settings = URL.partition("?")[0]
    before = {
        "URL1": f"postgresql+psycopg{URL}{TLS}",
        "URL2": f"postgresql+psycopg2{URL}&sslmode=require",
        "URL3": f"postgresql+pg8000{settings}",
        "URL4": "postgresql+psycopg://postgres@/postgres?host=db.invalid:5432&application_name=it+is+me",
        "URL5": "postgresql+psycopg2://postgres:a/b@db.invalid/postgres?application_name=it+is+me",
    }
    led = rewritten(before, server, tmp_path).environment
    for name, text in before.items():
        url, original = sqlalchemy.make_url(led[name]), sqlalchemy.make_url(text)
        same = ("drivername", "username", "password", "database")
        assert [getattr(url, one) for one in same] == [getattr(original, one) for one in same]
        engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)
        with engine.connect() as connection:
            answer = connection.scalar(sqlalchemy.text(ASK))
        assert answer == (ANSWER if "pg8000" not in text else "postgres postgres "), name


def test_sqlalchemy_with_asyncpg(server: Server, tmp_path: Path) -> None:
    before = {
        "URL1": f"postgresql+asyncpg{URL.partition('?')[0]}?ssl=require",
        "URL2": "postgresql+asyncpg://postgres@/postgres?host=db.invalid&port=5432&ssl=verify-full",
        "URL3": "postgresql+asyncpg://postgres@/postgres?host=/srv/not%20there",
    }

    async def ask(url: str) -> object:
        engine = create_async_engine(url, poolclass=sqlalchemy.NullPool)
        async with engine.connect() as connection:
            return await connection.scalar(sqlalchemy.text(ASK))

    for name, text in before.items():
        led = rewritten({name: text}, server, tmp_path).environment[name]
        assert asyncio.run(ask(led)) == "postgres postgres "


def test_node(server: Server, tmp_path: Path) -> None:
    """node-postgres takes ``ssl=false`` for true."""
    before = {
        "URL1": f"postgres{URL}&sslmode=require",
        "URL2": f"postgres{URL}&ssl=true",
        "URL3": f"postgres{URL}&sslmode=no-verify&ssl=1",
        "URL4": "postgres://postgres@/postgres?host=db.invalid&application_name=it%20is%20me",
        "DB_HOST": "db.invalid",
        "DB_PORT": "5432",
        "DB_SSL": "true",
    }
    script = f"""
        const {{Client}} = require('pg'), postgres = require('postgres'), ask = {json.dumps(ASK)}
        async function main() {{
          for (const name of ['URL1', 'URL2', 'URL3', 'URL4', '']) {{
            const {{DB_HOST: host, DB_PORT: port, DB_SSL: ssl}} = process.env
            const apart = {{host, port: Number(port), ssl: JSON.parse(ssl), user: 'postgres', database: 'postgres',
              application_name: 'it is me'}}
            const client = new Client(name ? {{connectionString: process.env[name]}} : apart)
            await client.connect()
            console.log(Object.values((await client.query(ask)).rows[0])[0])
            await client.end()
          }}
          for (const name of ['URL1', 'URL2']) {{
            const sql = postgres(process.env[name])
            console.log(Object.values((await sql.unsafe(ask))[0])[0])
            await sql.end()
          }}
        }}
        main().catch(error => {{ console.error(error); process.exit(1) }})"""
    result = rewritten(before, server, tmp_path)
    command = ["sh", "-c", 'cd "$0" && exec node -e "$1"', node_directory(), script]
    assert run(command, result.environment) == [ANSWER] * 7


def test_java(server: Server, tmp_path: Path) -> None:
    jar = Path("/usr/share/java/postgresql.jar")
    if shutil.which("java") is None or not jar.exists():
        not_installed("Java with libpostgresql-jdbc-java")
    own = "user=postgres&password=x&ApplicationName=it%20is%20me"
    before = {
        "URL1": f"jdbc:postgresql://db.invalid/postgres?ssl=true&{own}",
        "URL2": f"jdbc:postgresql://db.invalid:5432/postgres?{own}&sslmode=verify-full&sslrootcert=/x&gssEncMode=require",
        "URL3": f"jdbc:postgresql://192.0.2.1/postgres?ssl&{own}&targetServerType=primary",
    }
    source = tmp_path / "Ask.java"
    source.write_text(f"""
        public class Ask {{
          public static void main(String[] names) throws Exception {{
            for (String name : names)
              try (var c = java.sql.DriverManager.getConnection(System.getenv(name)); var s = c.createStatement();
                   var r = s.executeQuery({json.dumps(ASK)})) {{
                r.next();
                System.out.println(r.getString(1));
              }}
          }}
        }}""")
    result = rewritten(before, server, tmp_path)
    assert run(["java", "-XX:TieredStopAtLevel=1", "-cp", jar, source, *before], result.environment) == [ANSWER] * 3


def test_php(server: Server, tmp_path: Path) -> None:
    php = interpreter("php", "-dextension=pdo_pgsql")
    before = {
        "URL1": "pgsql:host=db.invalid;dbname=postgres;user=postgres;application_name='it is me';sslmode=require",
        "URL2": "pgsql:dbname=postgres host=db.invalid port=5432 user=postgres application_name='it is me'",
    }
    script = (
        f"foreach (['URL1', 'URL2'] as $n) echo (new PDO(getenv($n)))->query({json.dumps(ASK)})->fetch()[0], \"\\n\";"
    )
    result = rewritten(before, server, tmp_path)
    assert run([php, "-r", script], result.environment) == [ANSWER] * 2


def test_perl(server: Server, tmp_path: Path) -> None:
    perl = interpreter("perl", "-MDBD::Pg")
    before = {
        "URL1": "dbi:Pg:dbname=postgres;host=db.invalid;sslmode=require;application_name='it is me';user=postgres",
        "URL2": "DBI:Pg(PrintError=>0):db=postgres host=db.invalid port=5432 application_name='it is me' user=postgres",
    }
    ask = f"DBI->connect($ENV{{$_}}, '', '', {{RaiseError => 1}})->selectrow_array(q({ASK}))"
    script = f'print {ask}, "\\n" for qw(URL1 URL2)'
    result = rewritten(before, server, tmp_path)
    assert run([perl, "-MDBI", "-e", script], result.environment) == [ANSWER] * 2


def test_ruby(server: Server, tmp_path: Path) -> None:
    ruby = interpreter("ruby", "-rpg")
    before = {"URL": f"postgresql{URL}&sslmode=require", "URL2": LIBPQ[2]}
    script = f"%w[URL URL2].each {{ |n| puts PG.connect(ENV[n]).exec({json.dumps(ASK)}).getvalue(0, 0) }}"
    result = rewritten(before, server, tmp_path)
    assert run([ruby, "-rpg", "-e", script], result.environment) == [ANSWER] * 2


EVERY_WAY = """
import os, psycopg
url = os.environ["SQLALCHEMY_DATABASE_URI"].replace("+asyncpg", "")
apart = {"host": os.environ["DB_HOST"], "port": os.environ["DB_PORT"], "user": "postgres"}
for how in ({"conninfo": url}, apart, {}, {"conninfo": "service=main"}):
    with psycopg.connect(**how) as connection:
        print(connection.info.port)
print(os.environ["REDIS_HOST"], os.environ["OTHER_URL"])
"""


def test_everything_that_a_command_has_leads_it_through_the_guard(server: Server, tmp_path: Path) -> None:
    """Four ways to the server, and two variables that lead elsewhere, through ``pgguard run`` itself."""
    there = f"localhost:{server.tcp.port}"
    services = tmp_path / "services"
    services.write_text(f"[main]\nhost=127.0.0.1\nport={server.tcp.port}\nuser=postgres\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")} | {
        "SQLALCHEMY_DATABASE_URI": f"postgresql+asyncpg://postgres@{there}/postgres",
        "DB_HOST": "localhost",
        "DB_PORT": str(server.tcp.port),
        "PGHOST": "127.0.0.1",
        "PGPORT": str(server.tcp.port),
        "PGUSER": "postgres",
        "PGSERVICEFILE": str(services),
        "REDIS_HOST": "localhost",
        "OTHER_URL": "postgresql://other:1/x",
    }
    command = [sys.executable, "-m", "pgguard", "run", "--", sys.executable, "-c", EVERY_WAY]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=SECONDS, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    *ports, others = done.stdout.splitlines()
    assert len(ports) == 4
    assert len(set(ports)) == 1
    assert str(server.tcp.port) not in ports
    assert others == "localhost postgresql://other:1/x"
    led = "DB_HOST, DB_PORT, PGPORT, PGSERVICEFILE, SQLALCHEMY_DATABASE_URI"
    assert f"; rewritten for the command: {led}\n" in done.stderr
    assert "pgguard: 4 sessions, no faults\n" in done.stderr
