"""libpq's files know the server at the guard's address too, and say everything else as before."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from pgguard.launch.files import Login, Services, led_passwords
from pgguard.proxy.addresses import TcpAddress
from tests.launch.surroundings import GUARD, GUARD_ON_UNIX, PRIVATE, rewritten

if TYPE_CHECKING:
    from pathlib import Path

SERVICES = """\
# those of the team
[main]
host=db.internal
dbname=app
password=S3CRET
sslmode=verify-full
sslrootcert=system

 [reports]
 host=other
sslmode=require
[by-address]
hostaddr=10.0.0.5
port=5432
[defaults]
user=app
[main]
host=never
"""

LED = """\
# those of the team
[main]
host=127.0.0.1
port=40123
dbname=app
password=S3CRET
sslmode=disable

 [reports]
 host=other
sslmode=require
[by-address]
hostaddr=127.0.0.1
port=40123
[defaults]
user=app
[main]
host=never
"""

PASSWORDS = """\
# host:port:database:user:password
other:5432:*:app:1
db.internal:5432:app:app:S3\\:CRET
*:5432:*:app:2
db.internal:*:*:*:3
*:*:*:*:4
"""


@pytest.fixture
def service_file(tmp_path: Path) -> Path:
    path = tmp_path / "services"
    path.write_text(SERVICES)
    path.chmod(0o600)
    return path


def test_a_service_that_leads_to_the_server_does_so_in_a_copy_of_its_file(service_file: Path) -> None:
    """All services of the file, as a program may name any of them; ``PGHOST`` would come behind what they say."""
    environment = {"PGSERVICEFILE": str(service_file), "PGSERVICE": "main", "PGUSER": "x"}
    result = rewritten(environment)
    copy = PRIVATE / "pg_service.conf"
    assert result.files == {copy: LED.encode()}
    assert result.names == ("PGSERVICEFILE",)
    assert result.environment["PGSERVICEFILE"] == str(copy)
    assert result.line == "rewritten for the command: PGSERVICEFILE"
    assert service_file.read_text() == SERVICES


def test_the_users_own_service_file_is_found(tmp_path: Path) -> None:
    own = tmp_path / ".pg_service.conf"
    own.write_text("[main]\nhost=db\n")
    result = rewritten({"HOME": str(tmp_path), "URL": "postgresql:///app?service=main"})
    assert result.environment["URL"] == "postgresql://127.0.0.1:40123/app?service=main"
    assert list(result.files.values()) == [b"[main]\nhost=127.0.0.1\nport=40123\n"]


def test_of_the_systems_services_those_are_copied_that_lead_to_the_server(tmp_path: Path, service_file: Path) -> None:
    (tmp_path / "pg_service.conf").write_text("[theirs]\nhost=db\n[main]\nhost=db\n[unrelated]\nhost=x")
    environment = {"PGSYSCONFDIR": str(tmp_path), "PGSERVICEFILE": str(service_file), "PGSERVICE": "theirs"}
    result = rewritten(environment)
    assert list(result.files.values()) == [f"{LED}\n[theirs]\nhost=127.0.0.1\nport=40123".encode()]


@pytest.mark.parametrize(
    "environment",
    [
        {"PGSERVICE": "reports"},
        {"PGSERVICE": "nowhere"},
        {"PGSERVICE": "directory"},
        {"PGSERVICE": "main", "PGSERVICEFILE": "/nowhere/at/all"},
    ],
)
def test_other_services_are_left(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / ".pg_service.conf").write_text("[reports]\nhost=other\n[directory]\nldap://x/y\nhost=db\n")
    result = rewritten({"HOME": str(tmp_path)} | environment)
    assert result.names == ()
    assert not result.files


def test_services_can_be_kept_or_added(service_file: Path) -> None:
    environment = {"PGSERVICEFILE": str(service_file), "PGSERVICE": "main"}
    assert rewritten(environment, keep=["PGSERVICEFILE"]).names == ()
    kept = rewritten(environment, keep=["PGSERVICE"])
    assert b"[main]\nhost=db.internal" in kept.files[PRIVATE / "pg_service.conf"]
    assert rewritten(environment | {"PGHOST": "db"}, keep=["PGSERVICE"]).environment["PGHOST"] == "127.0.0.1"
    added = rewritten(environment | {"PGSERVICE": "reports"}, add=["PGSERVICE"])
    assert b" [reports]\n host=127.0.0.1\nport=40123\nsslmode=disable\n" in added.files[PRIVATE / "pg_service.conf"]


def test_a_service_file_that_others_can_write_is_not_believed(service_file: Path) -> None:
    service_file.chmod(0o666)
    assert rewritten({"PGSERVICEFILE": str(service_file), "PGSERVICE": "main"}).names == ()


def test_other_services_still_lead_where_they_did_though_libpqs_variables_have_changed(service_file: Path) -> None:
    environment = {"PGSERVICEFILE": str(service_file), "PGHOST": "db"}
    led = rewritten(environment).files[PRIVATE / "pg_service.conf"]
    assert b" [reports]\n host=other\nport=5432\nsslmode=require\n" in led
    assert b"[defaults]\nuser=app\nhost=127.0.0.1\nport=40123\n" in led


def test_services_that_nobody_speaks_of_are_left(tmp_path: Path) -> None:
    (tmp_path / ".pg_service.conf").write_text(SERVICES)
    result = rewritten({"HOME": str(tmp_path), "PGHOST": "db"})
    assert result.names == ("PGHOST", "PGPORT")


def test_of_a_setting_that_a_service_has_twice_the_first_counts(tmp_path: Path) -> None:
    """As in ``parseServiceFile()``."""
    path = tmp_path / "services"
    path.write_text("[a]\nport=1\nhost=x\nport=2\n#host=z\nhost=y\n")
    assert Services({"PGSERVICEFILE": str(path)}).settings("a") == {"host": "x", "port": "1"}


def test_a_password_is_found_at_the_guards_address_too() -> None:
    led = led_passwords(PASSWORDS, [Login("db.internal", "5432")], GUARD)
    assert led == (
        "# host:port:database:user:password\n"
        "other:5432:*:app:1\n"
        "db.internal:5432:app:app:S3\\:CRET\n"
        "127.0.0.1:40123:app:app:S3\\:CRET\n"
        "*:5432:*:app:2\n"
        "127.0.0.1:40123:*:app:2\n"
        "db.internal:*:*:*:3\n"
        "127.0.0.1:40123:*:*:3\n"
        "*:*:*:*:4\n"
    )
    assert led_passwords(PASSWORDS, [Login("db.internal", "5432")], TcpAddress("::1", 1)) != led


@pytest.mark.parametrize("text", ["", "*:*:*:*:x\n", "other:5432:*:*:x", "db.internal:5433:*:*:x", "nonsense\n::::"])
def test_a_password_file_is_left_if_it_says_nothing_about_the_server(text: str) -> None:
    assert led_passwords(text, [Login("db.internal", "5432")], GUARD) is None


@pytest.mark.parametrize(
    ("entry", "login", "led"),
    [
        ("localhost:5432:*:*:x", Login("", "5432"), "127.0.0.1:40123:*:*:x"),
        ("localhost:5432:*:*:x", Login("/var/run/postgresql", "5432"), "127.0.0.1:40123:*:*:x"),
        ("/srv/pg:5432:*:*:x", Login("/srv/pg", "5432"), "127.0.0.1:40123:*:*:x"),
        ("\\:\\:1:5432:*:*:x", Login("::1", "5432"), "127.0.0.1:40123:*:*:x"),
    ],
)
def test_a_password_file_may_know_the_server_by_other_names(entry: str, login: Login, led: str) -> None:
    assert led_passwords(entry, [login], GUARD) == f"{entry}\n{led}"


def test_addresses_are_escaped_in_a_password_file() -> None:
    login = Login("a", "1")
    assert led_passwords("a:1:*:*:x", [login], TcpAddress("::1", 2)) == "a:1:*:*:x\n\\:\\:1:2:*:*:x"
    assert led_passwords("a:1:*:*:x", [login], GUARD_ON_UNIX) == "a:1:*:*:x\n/run/guard dir:6000:*:*:x"


@pytest.mark.parametrize("variable", ["HOME", "PGPASSFILE"])
def test_the_command_gets_a_password_file_of_its_own(variable: str, tmp_path: Path) -> None:
    path = tmp_path / ".pgpass"
    path.write_text(PASSWORDS)
    path.chmod(0o600)
    environment = {variable: str(tmp_path if variable == "HOME" else path), "URL": "postgresql://app@db.internal/app"}
    result = rewritten(environment)
    copy = PRIVATE / "pgpass"
    assert result.environment["PGPASSFILE"] == str(copy)
    assert list(result.files) == [copy]
    assert b"\n127.0.0.1:40123:app:app:S3\\:CRET\n" in result.files[copy]
    assert rewritten(environment, keep=["PGPASSFILE"]).names == ("URL",)
    # The name by which the client knows the server is what counts, and not what else it is called.
    assert rewritten(environment | {"URL": "postgresql://app@10.0.0.5/app"}).files[copy].count(b"127.0.0.1") == 1


def test_a_connection_can_have_a_password_file_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "own"
    path.write_text(PASSWORDS)
    path.chmod(0o600)
    services = tmp_path / "services"
    services.write_text(f"[a]\nhost=db.internal\npassfile={path}\n")
    environment = {
        "PGHOST": "other",
        "PGSERVICEFILE": str(services),
        "URL": f"postgresql://db.internal/app?passfile={path}&x=y",
        "STRING": f"host=db.internal passfile={path} dbname=app",
        "NPGSQL": f"Host=db.internal;Username=app;Passfile={path}",
        "ELSEWHERE": f"host=other passfile={path} dbname=app",
        "NO_FILE": "host=db.internal passfile=/nowhere dbname=app",
    }
    result = rewritten(environment)
    copy = PRIVATE / "pgpass-0"
    assert result.files.keys() == {copy, PRIVATE / "pg_service.conf"}
    assert b"\n127.0.0.1:40123:app:app:S3\\:CRET\n" in result.files[copy]
    assert f"passfile={copy}".encode() in result.files[PRIVATE / "pg_service.conf"]
    for name in ("URL", "STRING", "NPGSQL"):
        assert f"assfile={copy}" in result.environment[name]
    assert result.environment["NO_FILE"] == "host=127.0.0.1 port=40123 passfile=/nowhere dbname=app"
    assert "PGPASSFILE" not in result.environment


@pytest.mark.parametrize("mode", [0o640, 0o604])
def test_a_password_file_that_libpq_would_ignore_is_ignored(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "pgpass"
    path.write_text(PASSWORDS)
    path.chmod(mode)
    assert not rewritten({"PGPASSFILE": str(path), "PGHOST": "db.internal"}).files


@pytest.mark.timeout(20)
def test_nothing_is_waited_for_that_isnt_a_file(tmp_path: Path) -> None:
    for name in ("passwords", "services"):
        os.mkfifo(tmp_path / name)
    environment = {"PGPASSFILE": str(tmp_path / "passwords"), "PGSERVICEFILE": str(tmp_path / "services")}
    assert rewritten(environment | {"PGHOST": "db"}).names == ("PGHOST", "PGPORT")
