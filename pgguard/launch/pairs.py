"""Names of a host and of the port that goes with it, as applications call them: ``DB_HOST`` and ``DB_PORT``.

A pair leads to the server if its host is the server's *and* its port is: nothing else listens there, whatever the names
say. A host without its port proves nothing, nor does a port without its host, so neither is touched alone. Of bare
``HOST`` and ``PORT`` it isn't known whether a program connects there or listens there itself; in an object with other
settings beside them it is.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

from pgguard.launch.fields import disabled, in_the_letters_of, plain_name
from pgguard.launch.places import is_address
from pgguard.proxy.addresses import UnixAddress

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pgguard.proxy.addresses import Address

_WORDS: Final = ("HOSTNAME", "HOST_NAME", "HOST", "SERVER", "ADDRESS", "ADDR", "ENDPOINT")
_PLAIN_HOST: Final = re.compile(r"[\w.-]*[A-Za-z\d]|[/@][^\s,;]*")
_ANYWHERE: Final = frozenset({"0.0.0.0", "::", "[::]"})  # noqa: S104 - compared
"""What a program listens on, and doesn't connect to."""
_PORT: Final = re.compile(r"\d{1,5}")
_TLS: Final = ("SSLMODE", "SSL_MODE", "SSL", "USE_SSL", "SSL_ENABLED", "REQUIRE_SSL", "TLS")
"""What goes with a host and its port, and can demand TLS."""
_OFF: Final = {"true": "false", "on": "off", "yes": "no", "1": "0", "enabled": "disabled"}
_MODES: Final = frozenset({"require", "required", "verifyca", "verifyfull", "noverify"})


class Pair(NamedTuple):
    """The names of a host and its port."""

    host: str
    port: str


def port_name(host: str) -> str | None:
    """What the port is called that goes with what is called so; ``None`` if that isn't a host's name."""
    for word in _WORDS:
        for end, port in ((word, "PORT"), (word.lower(), "port"), (word.capitalize(), "Port")):
            if host.endswith(end):
                return host[: -len(end)] + port
    return None


def is_bare(pair: Pair) -> bool:
    """Whether names say only what they are, and not of what."""
    return not pair.port[: -len("port")].strip("_-.")


def is_host(value: str) -> bool:
    """Whether a value is a host that a program can connect to, or the directory of a socket, and nothing more."""
    if value in _ANYWHERE:
        return False
    return _PLAIN_HOST.fullmatch(value) is not None or is_address(value.strip("[]"))


def is_port(value: str) -> bool:
    """Whether a value is the number of a port."""
    return _PORT.fullmatch(value) is not None


def pairs(values: Mapping[str, str]) -> Iterator[Pair]:
    """The pairs among values by their names, bare ones too."""
    for name, value in values.items():
        port = port_name(name)
        if port is not None and is_host(value) and is_port(values.get(port, "")):
            yield Pair(name, port)


def led_pair(values: Mapping[str, str], pair: Pair, to: Address) -> dict[str, str]:
    """New values for a pair, and for what goes with it: the port by other names, and what demands TLS.

    Kubernetes gives a service's port once more by its own name: ``DB_SERVICE_PORT_SQL``.
    """
    port = values[pair.port]
    same = [name for name, value in values.items() if name.startswith(f"{pair.port}_") and value == port]
    changed = dict.fromkeys([pair.port, *same], str(to.port))
    changed[pair.host] = to.directory if isinstance(to, UnixAddress) else to.host
    return changed | without_tls(values, pair.port)


def without_tls(values: Mapping[str, str], port: str) -> dict[str, str]:
    """New values for what demands TLS and goes with a port of that name, as ``DB_SSLMODE`` does with ``DB_PORT``."""
    changed = {}
    for word in _TLS:
        for spelling in (word, word.lower(), word.capitalize()):
            name = port[: -len("port")] + spelling
            value = values.get(name, "")
            plain = plain_name(value)
            if plain in _MODES:
                changed[name] = disabled(value)
            elif plain in _OFF:
                changed[name] = in_the_letters_of(value, _OFF[plain])
    return changed
