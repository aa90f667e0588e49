"""Connection strings that are no URLs: libpq's, those of PDO and DBI, of Npgsql and ODBC; and ``HOST:PORT``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from pgguard.launch.connection import Connection
from pgguard.launch.fields import Field, Style, hosts_and_ports, led, pinned, plain_name, text_of
from pgguard.proxy.addresses import UnixAddress

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pgguard.launch.connection import Edit, Lead
    from pgguard.proxy.addresses import Address

_WORD: Final = r"\s*(?P<head>(?P<name>[A-Za-z_][\w.]*)\s*=\s*)"
_QUOTED: Final = r"'(?:[^'\\]|\\.)*'"
_SETTING: Final = re.compile(rf"{_WORD}(?P<raw>{_QUOTED}|(?:[^\s\\']|\\.)(?:[^\s\\]|\\.)*|)", re.DOTALL)
_DRIVER: Final = re.compile(r"\s*(?:pgsql:|dbi:Pg(?:\([^()]*\))?:)", re.IGNORECASE)
"""What PDO's and DBI's data source names begin with."""
_DRIVER_SETTING: Final = re.compile(rf"[\s;]*{_WORD}(?P<raw>{_QUOTED}|[^\s;]*)", re.DOTALL)
_REST: Final = re.compile(r"[\s;]*")
_ESCAPED: Final = re.compile(r"\\(.)", re.DOTALL)
_PLAIN: Final = re.compile(r"[^\s'\\]+")
_LOCATES: Final = frozenset({"host", "hostaddr", "service"})

_PAIR: Final = re.compile(
    r"(?P<before>[\s;]*)(?P<head>(?P<name>[A-Za-z][^=;]*)=\s*)"
    r"(?P<raw>\"(?:[^\"]|\"\")*\"|'(?:[^']|'')*'|\{(?:[^}]|\}\})*\}|[^;]*)\s*(?=;|\Z)"
)
_POSTGRESQL: Final = re.compile(r"postgres|npgsql|psqlodbc|pgsql", re.IGNORECASE)
_NPGSQLS_OWN: Final = frozenset(
    map(
        plain_name,
        (
            "Search Path",
            "Include Error Detail",
            "Include Realm",
            "Kerberos Service Name",
            "Max Auto Prepare",
            "Multiplexing",
            "Passfile",
            "Root Certificate",
            "Target Session Attributes",
            "Tcp Keepalive",
            "Channel Binding",
            "dbname",
        ),
    )
)
"""What tells a string without a port from one of MySQL's or of SQL Server's, which use the same words otherwise."""
_ALIASES: Final = {"server": "host", "servername": "host", "datasource": "host"}

_HOST_PORT: Final = re.compile(
    r"(?:tcp://)?(?P<place>(?P<host>\[[0-9A-Fa-f:.]+(?:%\w+)?\]|\w[\w.-]*):(?P<port>\d{1,5}))/?"
)
_ITEM: Final = re.compile(r"[^\s,;]+")


def _quote(value: str) -> str:
    """A value as libpq takes it: "Keyword/Value Connection Strings"."""
    if _PLAIN.fullmatch(value):
        return value
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


_LIBPQ: Final = Style(" ", _quote, {})
_DSN: Final = Style(";", _quote, {})


def libpq_string(text: str, *, sure: bool = False) -> Connection | None:
    """The address in ``host=… port=… dbname=…``, or in a data source name of PDO or DBI; ``None`` if it is none.

    Args:
        text: All of it.
        sure: It is one if it looks like one. Otherwise it has to say something that others don't say so: other
            software has hosts, too.
    """
    driver = _DRIVER.match(text)
    start = 0 if driver is None else driver.end()
    found = _settings(text, start, _SETTING if driver is None else _DRIVER_SETTING)
    if found is None:
        return None
    fields, end = found
    names = {field.name.lower() for field in fields}
    located = bool(names & {"host", "hostaddr"})
    known = "dbname" in names or "service" in names or (located and bool(names & {"port", "sslmode"}))
    if not (known or driver or (sure and located)):
        return None
    style = _LIBPQ if driver is None else _DSN
    start += len(fields[0].before)
    said = hosts_and_ports(fields, style)

    def pin(addresses: Sequence[Address]) -> list[Edit]:
        return [(start, end, text_of(pinned(fields, style, addresses, said)))]

    return Connection(said, _leader(fields, style, start, end), "connection string", pin=pin)


def _settings(text: str, start: int, setting: re.Pattern[str]) -> tuple[list[Field], int] | None:
    """All of a text's settings, and where the last one ends; ``None`` if it holds anything else, or none."""
    fields: list[Field] = []
    while match := setting.match(text, start):
        raw = match["raw"]
        value = _ESCAPED.sub(r"\1", raw[1:-1] if raw[:1] == "'" else raw)
        before = text[start : match.start("head")]
        fields.append(Field(before, match["head"], raw, match["name"], value))
        start = match.end()
    rest = _REST.match(text, start)
    return (fields, start) if fields and rest is not None and rest.end() == len(text) else None


def _leader(fields: Sequence[Field], style: Style, start: int, end: int) -> Lead:
    def lead(to: Address, also: Mapping[str, str]) -> list[Edit]:
        return [(start, end, text_of(led(fields, style, to, also)))]

    return lead


def driver_string(text: str, *, name: str = "", sure: bool = False) -> Connection | None:
    """The address in ``Host=…;Port=…;Username=…``, Npgsql's form, which is ODBC's too; ``None`` if it is none.

    Others write so too. It is PostgreSQL's if it says so: by its driver, by what only Npgsql knows, by a port, which
    then shows whose it is; by Npgsql's own words for host and user; or if the variable's name says so.

    Args:
        text: All of it.
        name: What the variable is called.
        sure: It is PostgreSQL's.
    """
    if ";" not in text and not sure:
        return None
    fields: list[Field] = []
    at = 0
    while match := _PAIR.match(text, at):
        raw = match["raw"].rstrip()
        fields.append(Field(match["before"], match["head"], raw, match["name"].strip(), _unquoted(raw)))
        at = match.start("raw") + len(raw)
    rest = _REST.match(text, at)
    if rest is None or rest.end() != len(text):
        return None
    style = _driver_style(fields)
    said = hosts_and_ports(fields, style)
    if "host" not in said or not (sure or _is_postgresqls(fields, name, said)):
        return None
    lead = _leader(fields, style, len(fields[0].before), at)
    return Connection(said, lead, "connection string", own_defaults=True)


def _driver_style(fields: Sequence[Field]) -> Style:
    lower = all(field.name.islower() for field in fields)
    return Style(";", _encode, _ALIASES, *(("host", "port") if lower else ("Host", "Port")))


def _encode(value: str) -> str:
    return f'"{value}"' if ";" in value or value != value.strip() else value


def _unquoted(raw: str) -> str:
    if raw[:1] in {'"', "'"}:
        return raw[1:-1].replace(raw[0] * 2, raw[0])
    return raw[1:-1].replace("}}", "}") if raw.startswith("{") else raw


def _is_postgresqls(fields: Sequence[Field], name: str, said: dict[str, str]) -> bool:
    by_name = {plain_name(field.name): field.value or "" for field in fields}
    driver = by_name.get("driver", by_name.get("provider"))
    if driver is not None:
        return _POSTGRESQL.search(driver) is not None
    if "port" in said or _POSTGRESQL.search(name):
        return True
    return bool(_NPGSQLS_OWN & by_name.keys()) or {"host", "username"} <= by_name.keys()


def places(text: str) -> Iterator[Connection]:
    """Each ``HOST:PORT`` of a text that consists of such alone, with or without ``tcp://`` in front of it."""
    found = [_HOST_PORT.fullmatch(text, *item.span()) for item in _ITEM.finditer(text)]
    if not all(found):
        return
    for place in filter(None, found):
        said = {"host": place["host"].strip("[]"), "port": place["port"]}
        yield Connection(said, _placer(*place.span("place")), "HOST:PORT", own_defaults=True, tcp_only=True)


def _placer(start: int, end: int) -> Lead:
    def lead(to: Address, _: Mapping[str, str]) -> list[Edit]:
        return [] if isinstance(to, UnixAddress) else [(start, end, str(to))]

    return lead
