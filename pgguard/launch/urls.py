"""URLs of PostgreSQL within other text: where each begins and ends, where it leads, and how to lead it elsewhere.

What is read is what drivers agree on. Where they don't, it is what at least one of them takes for an address: a
password may hold ``/``, as SQLAlchemy lets it, and a ``?``, as libpq does.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Final
from urllib.parse import quote, unquote

from pgguard.launch.connection import Connection
from pgguard.launch.fields import Field, Style, hosts_and_ports, led, pinned, split_port, text_of
from pgguard.proxy.addresses import Address, UnixAddress
from pgguard.proxy.conninfo import SCHEMES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pgguard.launch.connection import Edit

_DRIVERS: Final = ("asyncpg", "pdo-pgsql", "pdo_pgsql", "pgx", "pgx4", "pgx5", "psycopg", "psycopg2")
"""Drivers by whose names URLs are called: those of Tortoise, Doctrine and golang-migrate."""
_PORTS: Final = {"cockroach": 26257, "cockroachdb": 26257, "crdb": 26257, "redshift": 5439, "yugabytedb": 5433}
"""Databases that speak PostgreSQL's protocol on a port of their own."""
_NAMES: Final = "|".join(sorted({*SCHEMES, *_DRIVERS, *_PORTS}, key=len, reverse=True))
_START: Final = re.compile(
    r"(?<![\w.+:/@-])(?P<prefix>(?:(?P<api>jdbc|r2dbcs?):)?(?:[a-z][\w-]*:)*?)"
    rf"(?P<scheme>(?:[a-z][\w.-]*\+)*(?P<name>{_NAMES})(?:\+[\w.-]+)*):(?P<slashes>//)?",
    re.IGNORECASE,
)
_NEXT: Final = re.compile(r"[\s,;|]+(?=(?:(?:jdbc|r2dbcs?):)?[a-z][\w.+-]*:(?://|\w+://))", re.IGNORECASE)
"""What separates a URL from the next one in a list."""
_STOP: Final = re.compile(r"[\s\"'`<>|\\]")
_SPACE: Final = re.compile(r"\s")
_MORE: Final = re.compile(r"\s[^&:/]*&[\w.-]+=\S*")
_QUOTES: Final = "\"'`"
_TRAILING: Final = ",;.)]}"
_PLACE: Final = re.compile(r"(?:\[[^\[\]]*\]|[^:@\[\]\s&=]*)(?::\d*)?")
_OWN_SERVER: Final = ":tc:"
"""Testcontainers starts a server of its own for what its name stands for in the place of a host."""

_QUERY: Final = Style("&", lambda value: quote(value, safe="/:[]"), {})


def urls(text: str) -> Iterator[Connection]:
    """The URLs of PostgreSQL in a text, in order."""
    done = 0
    for start in _START.finditer(text):
        if start.start() < done or not _is_one(start):
            continue
        done = _end(text, start)
        if (found := _read(text[start.start() : done], start)) is not None:
            yield found


def _is_one(start: re.Match[str]) -> bool:
    if start["api"] and _OWN_SERVER in start["prefix"].lower():
        return False
    return start["slashes"] is not None or start["api"] is not None


def _end(text: str, start: re.Match[str]) -> int:
    """Where a URL ends: with what it is quoted in, before the next one of a list, or at a space.

    One that the text begins with may have a space in its password, which then ends with an ``@``, or in a parameter,
    which another one follows then.
    """
    begin, known = start.span()
    quoted = text[begin - 1] if begin and text[begin - 1] in _QUOTES else None
    if quoted is not None and (closing := text.find(quoted, known)) >= 0:
        return closing
    following = _NEXT.search(text, known)
    limit = len(text) if following is None else following.start()
    if text[:begin].strip():
        stop = _STOP.search(text, known, limit)
        end = limit if stop is None else stop.start()
        while end > known and text[end - 1] in _TRAILING:
            end -= 1
        return end
    at = max(text.rfind("@", known, limit), known)
    space = _SPACE.search(text, known, limit)
    if space is not None and space.start() < at:
        space = _SPACE.search(text, at, limit)
    end = limit if space is None else space.start()
    while "?" in text[known:end] and (more := _MORE.match(text, end, limit)) is not None:
        end = more.end()
    return end


def _read(url: str, start: re.Match[str]) -> Connection | None:
    api, name = (start["api"] or "").lower(), start["name"].lower()
    behind = start.end() - start.start()
    hosts_start, hosts_end = behind, behind
    if start["slashes"] is not None:
        found = _hosts(url, behind)
        if found is None:
            return None
        hosts_start, hosts_end = found
    hash_at = url.find("#", hosts_end)
    end = len(url) if hash_at < 0 else hash_at
    mark = url.find("?", hosts_end, end)
    path_end = end if mark < 0 else mark
    fields = [] if mark < 0 else _fields(url[mark + 1 : end])
    hosts = url[hosts_start:hosts_end]
    said = _said(hosts) | hosts_and_ports(fields, _QUERY)
    if name in _PORTS:
        said.setdefault("port", str(_PORTS[name]))
    in_query = any(_QUERY.key(field) in {"host", "hostaddr"} for field in fields)
    has_host = any(host for host, _ in map(split_port, hosts.split(",")))
    encoded_directory = hosts[:3].lower() in {"%2f", "%40"}

    def changed(place: str, fields: Sequence[Field], *, led: bool) -> list[Edit]:
        scheme, path, query = url[:behind], url[hosts_end:path_end], text_of(fields)
        if led and api == "r2dbcs":
            scheme = scheme[:5] + scheme[6:]
        if start["slashes"] is None:
            scheme, path = f"{scheme}//", "/" + path.removeprefix("/")
        written = f"{scheme}{url[behind:hosts_start]}{place}{path}{'?' if query else ''}{query}{url[end:]}"
        return [(start.start(), start.start() + len(url), written)]

    def lead(to: Address, also: Mapping[str, str]) -> list[Edit]:
        on_unix = isinstance(to, UnixAddress) and (in_query or not encoded_directory)
        elsewhere = not on_unix and (has_host or not in_query)
        return changed(_place(to) if elsewhere else "", led(fields, _QUERY, to, also, elsewhere=elsewhere), led=True)

    def pin(addresses: Sequence[Address]) -> list[Edit]:
        if in_query or not has_host:
            return changed(hosts, pinned(fields, _QUERY, addresses, said), led=False)
        places = zip(hosts.split(","), addresses, strict=True)
        return changed(",".join(f"{place}:{address.port}" for place, address in places), fields, led=False)

    what = f"{api.upper()} URL" if api else "URL"
    if api:
        return Connection(said, lead, what, own_defaults=True, tcp_only=True)
    return Connection(said, lead, what, pin=pin)


def _hosts(url: str, start: int) -> tuple[int, int] | None:
    """Where the hosts begin and end in what stands behind the slashes; ``None`` if nothing there can be one.

    Credentials reach to the last ``@`` in front of a ``/``, as they may hold a ``?``; or to the first one behind it, if
    nothing in front can be a host: they may hold a ``/``, too.
    """
    slash = _first_of(url, "/", start)
    at = url.rfind("@", start, slash)
    for begin in (at + 1, start):
        end = _first_of(url, "/?#", begin)
        if begin >= start and _are_places(url[begin:end]):
            # "u:1/2@h/db": is it a host with a port, or a user with a password?
            unclear = ":" in url[start:end] and "@" in url[end : _first_of(url, "?", end)]
            return None if unclear else (begin, end)
    begin = url.find("@", slash) + 1
    end = _first_of(url, "/?#", begin)
    return (begin, end) if begin and _are_places(url[begin:end]) else None


def _first_of(text: str, characters: str, start: int) -> int:
    return min((at for at in (text.find(one, start) for one in characters) if at >= 0), default=len(text))


def _are_places(text: str) -> bool:
    return all(_PLACE.fullmatch(one) for one in text.split(","))


def _said(hosts: str) -> dict[str, str]:
    """What the hosts of a URL say, by libpq's keywords."""
    pairs = [split_port(one) for one in hosts.split(",")]
    said = {}
    if any(host for host, _ in pairs):
        said["host"] = ",".join(unquote(host) for host, _ in pairs)
    if any(port for _, port in pairs):
        said["port"] = ",".join(port for _, port in pairs)
    return said


def _fields(query: str) -> list[Field]:
    fields = []
    for n, pair in enumerate(query.split("&")):
        name, equals, value = pair.partition("=")
        field = Field("&" if n else "", f"{name}{equals}", value, unquote(name), unquote(value))
        fields.append(field if equals else replace(field, value=None))
    return fields


def _place(to: Address) -> str:
    if isinstance(to, UnixAddress):
        return f"{quote(to.directory, safe='')}:{to.port}"
    return str(to)
