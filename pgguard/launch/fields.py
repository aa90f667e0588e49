"""Settings of a connection, ``NAME=VALUE`` in whichever notation, and what becomes of each when it leads elsewhere.

What the guard's client can't have any more is taken away: on the way to a guard on this host there is no TLS and no
GSSAPI encryption, and nobody's certificate to check. Everything else is left as it stands, byte for byte.

==========================  ===========================================================================================
setting                     what becomes of it, and why
==========================  ===========================================================================================
sslmode, tlsmode            ``disable`` where it demands TLS. Not taken away: some drivers demand TLS if nothing is said
                            (lib/pq). ``disable``, ``allow`` and ``prefer`` hold as they are.
ssl                         taken away where it demands TLS: no value of it means "no TLS" to all drivers. To
                            node-postgres ``ssl=false`` is true, and asyncpg knows words that pgjdbc doesn't.
sslrootcert, sslcert,       taken away: node-postgres and others demand TLS where they are given; and libpq refuses
sslkey, their like          ``sslrootcert=system`` beside ``sslmode=disable``.
sslcertmode, requiressl,    taken away where they demand TLS: without them it is not.
sslnegotiation,
channel_binding
gssencmode                  ``disable`` where it demands encryption.
hostaddr                    taken away where a host is named too; the guard's address where it stands alone.
requirepeer                 taken away if the guard is on a Unix socket: its user is not the server's.
target_session_attrs,       left: what they ask for is the server's to fulfil, through the guard as without it.
load_balance_hosts
==========================  ===========================================================================================

Sources: "Parameter Key Words" in the chapter on libpq; the documentation of pgjdbc, Npgsql, asyncpg, psqlodbc, Prisma
and R2DBC for theirs; ``ConnectionParameters`` of node-postgres and ``pg-connection-string``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from pgguard.proxy.addresses import Address, UnixAddress

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

_BETWEEN: Final = re.compile(r"[\s_-]+")
_NO_TLS: Final = frozenset({"", "disable", "disabled", "allow", "prefer", "preferred", "false", "0", "off", "no"})
"""Of ``sslmode`` and ``ssl``, in any driver: what doesn't insist on TLS."""
_MODES: Final = frozenset({"sslmode", "tlsmode"})
_GSS_MODES: Final = frozenset({"gssencmode", "gssencryptionmode"})
_CERTIFICATES: Final = frozenset(
    {"sslrootcert", "sslcert", "sslkey", "sslca", "rootcertificate", "sslcertificate", "sslrootcertificate"}
)
_SAID: Final = frozenset({"host", "hostaddr", "port", "service", "passfile"})
_DEMANDS: Final = {
    "channelbinding": "require",
    "sslnegotiation": "direct",
    "sslcertmode": "require",
    "requiressl": "1",
}
"""What is taken away if it has this value."""


@dataclass(frozen=True, slots=True)
class Field:
    """One setting as it stands in a text, or a stretch of text that is none."""

    before: str
    """What separates it from the one before."""
    head: str
    """What stands in front of its value, ``NAME=``; all of it if it has none."""
    raw: str
    """Its value, as it stands there."""
    name: str
    """Empty for what is no setting."""
    value: str | None
    """``None``: it has none."""

    @property
    def text(self) -> str:
        """All of it, but for what separates it from others."""
        return self.head + self.raw


@dataclass(frozen=True, slots=True)
class Style:
    """A notation."""

    separator: str
    """Between two settings."""
    encode: Callable[[str], str]
    """A value as it is written in it."""
    names: Mapping[str, str]
    """By what it calls them, without case and what stands between words: ``host``, ``hostaddr``, ``port``."""
    host: str = "host"
    """What a new one is called."""
    port: str = "port"

    def key(self, field: Field) -> str:
        """A setting's name, as this module knows it."""
        plain = plain_name(field.name)
        return self.names.get(plain, plain)

    def new(self, name: str, value: str) -> Field:
        """A setting that wasn't there."""
        return Field(self.separator, f"{name}=", self.encode(value), name, value)

    def with_value(self, field: Field, value: str) -> Field:
        """A setting with another value."""
        head = field.head if field.value is not None else f"{field.head}="
        return replace(field, head=head, raw=self.encode(value), value=value)


def plain_name(name: str) -> str:
    """A setting's name without case and what stands between its words: ``SSL Mode``, ``sslMode``, ``ssl-mode``."""
    return _BETWEEN.sub("", name).lower()


def insists(name: str, value: str | None) -> bool:
    """Whether a setting of that :func:`plain_name` demands TLS by its value; of no value, ``true`` is meant."""
    if value is None:
        return True
    return (name in _MODES or name == "ssl") and plain_name(value) not in _NO_TLS


def disabled(value: str) -> str:
    """``disable``, as it is to stand in the place of a value."""
    return in_the_letters_of(value, "disable")


def in_the_letters_of(value: str, word: str) -> str:
    """A word in capital letters, or with one at its beginning, if the value has them so in whose place it stands."""
    if value.isupper():
        return word.upper()
    return word.capitalize() if value[:1].isupper() else word


def text_of(fields: Sequence[Field]) -> str:
    """Settings one after the other; the first without what would separate it from one before."""
    return "".join(field.text if n == 0 else field.before + field.text for n, field in enumerate(fields))


def holding(field: Field, style: Style, to: Address) -> Field | None:
    """What becomes of a setting that doesn't say where the server is; ``None`` if it is taken away."""
    key = style.key(field)
    if not field.name or (field.value is None and key != "ssl"):
        return field
    if key in _CERTIFICATES or (key == "ssl" and insists(key, field.value)):
        return None
    if key == "requirepeer":
        return None if isinstance(to, UnixAddress) else field
    value = field.value or ""
    if key in _MODES and insists(key, value):
        return style.with_value(field, disabled(value))
    if key in _GSS_MODES and plain_name(value) == "require":
        return style.with_value(field, disabled(value))
    return None if key in _DEMANDS and plain_name(value) == _DEMANDS[key] else field


def led(
    fields: Sequence[Field], style: Style, to: Address, also: Mapping[str, str], *, elsewhere: bool = False
) -> list[Field]:
    """Settings that lead to the guard.

    Args:
        fields: Those that led to the server.
        style: Their notation.
        to: The guard's address.
        also: Other settings that are to have other values, if they are there.
        elsewhere: Host and port stand in front of the settings as well, as in a URL: none has to be added.
    """
    host = to.directory if isinstance(to, UnixAddress) else to.host
    keys = [style.key(field) for field in fields]
    by_address = not elsewhere and "host" not in keys
    done: set[str] = set()
    result: list[Field] = []
    for field, key in zip(fields, keys, strict=True):
        if key in also:
            result.append(style.with_value(field, also[key]))
            continue
        if key not in {"host", "hostaddr", "port"}:
            result.extend(filter(None, [holding(field, style, to)]))
            continue
        if key == "hostaddr":
            if by_address and "host" not in done:
                done.add("host")
                named = replace(style.new(style.host, host), before=field.before)
                result.append(named if isinstance(to, UnixAddress) else style.with_value(field, host))
            continue
        if key in done:
            continue  # one for each of several servers
        done.add(key)
        if key == "port":
            result.append(style.with_value(field, str(to.port)))
        elif _has_port(field.value or "") and "port" not in keys:
            done.add("port")
            result.append(style.with_value(field, f"[{host}]:{to.port}" if ":" in host else f"{host}:{to.port}"))
        else:
            result.append(style.with_value(field, host))
    if not elsewhere:
        result = _completed(result, style, host, str(to.port), done)
    return result


def _has_port(host: str) -> bool:
    """Whether a host has its port behind a colon, as in SQLAlchemy's and Npgsql's settings."""
    return re.search(r"(?:^|\])[^:\[\]]*:\d+(?:,|$)", host) is not None


def _completed(fields: list[Field], style: Style, host: str, port: str, done: Collection[str]) -> list[Field]:
    """Settings with a host and a port, the port behind the host."""
    if "host" not in done:
        fields = [*fields, style.new(style.host, host)]
    if "port" not in done:
        at = next(n for n, field in enumerate(fields, 1) if style.key(field) in {"host", "hostaddr"})
        fields = [*fields[:at], style.new(style.port, port), *fields[at:]]
    return fields


def pinned(fields: Sequence[Field], style: Style, addresses: Sequence[Address], said: Collection[str]) -> list[Field]:
    """Settings that say in full where they lead now.

    Args:
        fields: Those that leave some of it to defaults.
        style: Their notation.
        addresses: Where they lead.
        said: What of that is said, here or in front of the settings, as :func:`hosts_and_ports` calls it.
    """
    hosts = ",".join(one.directory if isinstance(one, UnixAddress) else one.host for one in addresses)
    ports = ",".join(str(one.port) for one in addresses)
    done = {"host" if key == "hostaddr" else key for key in said}
    return _completed(list(fields), style, hosts, ports, done)


def hosts_and_ports(fields: Sequence[Field], style: Style) -> dict[str, str]:
    """What settings say about where the server is, ``host``, ``hostaddr``, ``port`` and ``service``, and ``passfile``.

    Several of one kind are several servers, as in SQLAlchemy's URLs. A port behind a host's colon is a ``port``.
    """
    found: dict[str, list[str]] = {}
    for field in fields:
        key = style.key(field)
        if key in _SAID and field.value is not None:
            found.setdefault(key, []).append(field.value)
    said = {key: ",".join(values) for key, values in found.items()}
    if _has_port(said.get("host", "")) and "port" not in said:
        pairs = [split_port(one) for one in said["host"].split(",")]
        said["host"] = ",".join(host for host, _ in pairs)
        said["port"] = ",".join(port for _, port in pairs)
    return said


def split_port(text: str) -> tuple[str, str]:
    """A host, without the brackets of an IPv6 address, and the port behind it; an empty one if there is none."""
    if text.startswith("["):
        host, _, port = text[1:].partition("]")
        return host, port.removeprefix(":")
    host, _, port = text.partition(":")
    return host, port
