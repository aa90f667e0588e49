"""Whatever a URL or a connection string says besides where the server is, the real parsers read as before."""

from __future__ import annotations

import json
import string
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, quote, urlsplit

import sqlalchemy
from hypothesis import assume, given
from hypothesis import strategies as st
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tests.launch.surroundings import rewritten, value

if TYPE_CHECKING:
    from collections.abc import Mapping

SERVERS = ("db.internal", "db.internal:5432", "DB.INTERNAL", "10.0.0.5", "db:5432", "db")
LED = "127.0.0.1:40123"
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)
"""A user, a password, a database, a value: anything that can stand in a variable."""
NAMES = st.text(string.ascii_lowercase + "_", min_size=1, max_size=12).filter(
    lambda name: not name.startswith(("ssl", "host", "port", "service", "require", "channel", "gss", "tls"))
)
KEPT = {
    "application_name": TEXT,
    "options": TEXT,
    "connect_timeout": st.integers(1, 99).map(str),
    "target_session_attrs": st.sampled_from(["any", "read-write", "prefer-standby"]),
    "sslmode": st.sampled_from(["disable", "allow", "prefer"]),
    "sslpassword": TEXT,
    "fallback_application_name": TEXT,
    "client_encoding": st.just("utf-8"),
}
"""Of libpq's settings, some that hold whatever the address is."""
kept = st.fixed_dictionaries({}, optional=KEPT)


def encoded(text: str) -> str:
    return quote(text, safe="")


def query_of(parameters: Mapping[str, str]) -> str:
    return "&".join(f"{name}={encoded(one)}" for name, one in parameters.items())


@given(TEXT, TEXT, TEXT, kept, st.sampled_from(SERVERS), st.sampled_from(["postgresql", "postgres"]))
def test_libpqs_urls(user: str, password: str, database: str, settings: dict[str, str], at: str, scheme: str) -> None:
    url = f"{scheme}://{encoded(user)}:{encoded(password)}@{at}/{encoded(database)}?{query_of(settings)}"
    before, after = conninfo_to_dict(url), conninfo_to_dict(led := value(url))
    assert (after.pop("host"), after.pop("port")) == ("127.0.0.1", "40123")
    before.pop("host"), before.pop("port", None)
    assert after == before
    assert led.replace(LED, at) == url.rstrip("?") or not settings


@given(TEXT, TEXT, TEXT, kept, st.sampled_from(["db.internal", "10.0.0.5", "db"]))
def test_libpqs_connection_strings(
    user: str, password: str, database: str, settings: dict[str, str], host: str
) -> None:
    text = make_conninfo("", user=user, password=password, host=host, dbname=database, **settings)
    before, after = conninfo_to_dict(text), conninfo_to_dict(value(text))
    assert after == before | {"host": "127.0.0.1", "port": "40123"}


@given(TEXT, TEXT, TEXT, st.dictionaries(NAMES, TEXT, max_size=3), st.sampled_from(SERVERS))
def test_sqlalchemys_urls(user: str, password: str, database: str, query: dict[str, str], at: str) -> None:
    host, _, port = at.partition(":")
    url = sqlalchemy.URL.create(
        "postgresql+asyncpg", user, password, host, int(port) if port else None, database, query
    )
    text = url.render_as_string(hide_password=False)
    assume(sqlalchemy.make_url(text) == url)  # it doesn't quote all that can be in a database's name
    assert sqlalchemy.make_url(value(text)) == url.set(host="127.0.0.1", port=40123)


@given(TEXT, TEXT, TEXT, st.dictionaries(NAMES, TEXT, max_size=3), st.sampled_from(SERVERS), TEXT)
def test_urls_as_python_takes_them_apart(
    user: str, password: str, database: str, query: dict[str, str], at: str, fragment: str
) -> None:
    url = (
        f"postgis://{encoded(user)}:{encoded(password)}@{at}/{encoded(database)}?{query_of(query)}#{encoded(fragment)}"
    )
    before, after = urlsplit(url), urlsplit(value(url))
    assert (after.hostname, after.port) == ("127.0.0.1", 40123)
    assert (after.scheme, after.username, after.password, after.path, after.fragment) == (
        before.scheme,
        before.username,
        before.password,
        before.path,
        before.fragment,
    )
    assert parse_qsl(after.query, keep_blank_values=True) == parse_qsl(before.query, keep_blank_values=True)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(JSON, TEXT, st.booleans(), st.sampled_from([None, 1]), st.booleans())
def test_json(other: object, password: str, ascii_only: bool, indent: int | None, slashes: bool) -> None:
    document = {
        "other": other,
        "url": f"postgres://a:{encoded(password)}@db.internal/x?ssl=true",
        "list": [{"host": "db.internal", "port": 5432, "password": password}],
    }
    text = json.dumps(document, ensure_ascii=ascii_only, indent=indent)
    text = text.replace("/", "\\/") if slashes else text
    led = value(text)
    assert json.loads(led) == {
        "other": other,
        "url": f"postgres://a:{encoded(password)}@{LED}/x",
        "list": [{"host": "127.0.0.1", "port": 40123, "password": password}],
    }


HOSTS = st.sampled_from(["db.internal", "10.0.0.5", "db", "other", "10.0.0.6", "localhost", "mine", "xn--db-internal"])
PORTS = st.sampled_from([None, 5432, 5433, 15432, 543])
FORMS = st.sampled_from(
    [
        "postgresql://u:p@{host}{:port}/x",
        "jdbc:postgresql://{host}{:port}/x?user=u",
        "host={host}{ port=} dbname=x",
        "Host={host}{;Port=};Username=u",
        "pgsql:host={host}{;port=};dbname=x",
        '["postgres://u@{host}{:port}/x"]',
        "-Durl=postgresql://u@{host}{:port}/x -Dx=y",
    ]
)


@given(FORMS, HOSTS, PORTS)
def test_it_is_led_to_the_guard_if_host_and_port_are_the_servers_and_else_left(
    form: str, host: str, port: int | None
) -> None:
    def written(host: str, port: int | None) -> str:
        text = form.replace("{host}", host)
        for mark, name in (("{:port}", ":"), ("{ port=}", " port="), ("{;Port=}", ";Port="), ("{;port=}", ";port=")):
            text = text.replace(mark, "" if port is None else f"{name}{port}")
        return text

    is_the_servers = host in {"db.internal", "10.0.0.5", "db"} and port in {None, 5432}
    assert value(written(host, port)) == (written("127.0.0.1", 40123) if is_the_servers else written(host, port))


FRAGMENTS = st.sampled_from(
    [
        *"@:/?#[]{}=&;, '\"\\%\n",
        "postgresql://",
        "jdbc:",
        "host=",
        "port=5432",
        "db.internal",
        ":5432",
        "dbname=x",
        "%2F",
    ]
) | st.text(max_size=3)


@given(st.lists(FRAGMENTS, max_size=12).map("".join))
def test_nothing_makes_it_fail_and_what_is_done_twice_is_done_once(text: str) -> None:
    """What it has led to the guard doesn't lead to the server any more."""
    assume("\0" not in text)
    led = value(text)
    assert value(led) == led


@given(st.dictionaries(TEXT.filter(lambda name: "=" not in name), TEXT, max_size=6))
def test_an_environment_without_an_address_stays_as_it_is(environment: dict[str, str]) -> None:
    environment["PGHOST"] = "other"
    assert rewritten(environment).names == ()
