"""Whether two addresses are one server's: by the names that this host, and the DNS, have for it."""

from __future__ import annotations

import ipaddress
import os
import socket
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from pgguard.proxy.addresses import Address, TcpAddress, UnixAddress

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pgguard.proxy.addresses import Upstream

_HERE: Final = "localhost"
_LOOPBACK: Final = frozenset({_HERE, "127.0.0.1", "::1", "0.0.0.0", "::"})  # noqa: S104 - as a destination
"""What leads to this host itself. The other addresses of 127.0.0.0/8 don't: each may be another server's."""
_PATIENCE: Final = 2.0
"""Seconds for all names together to be resolved."""


class Resolver:
    """Asks the system for the addresses of names, each once, and for so long in total.

    Args:
        seconds: After that no name has an address any more.
    """

    def __init__(self, seconds: float = _PATIENCE) -> None:
        self._seconds = seconds
        self._deadline: float | None = None
        self._known: dict[str, frozenset[str]] = {}

    def __call__(self, host: str) -> frozenset[str]:
        """The addresses of a name; none if it has none, or there is no answer in time."""
        if host not in self._known:
            self._known[host] = self._ask(host)
        return self._known[host]

    def _ask(self, host: str) -> frozenset[str]:
        now = time.monotonic()
        self._deadline = self._deadline or now + self._seconds
        found: set[str] = set()

        def ask() -> None:
            with suppress(OSError, UnicodeError):
                found.update(str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM))

        # Nobody can take back a question to the DNS: a thread that waits for its answer is left to itself.
        thread = threading.Thread(target=ask, daemon=True, name="pgguard-resolver")
        with suppress(RuntimeError):  # the system lets no further thread start
            thread.start()
            thread.join(max(0.0, self._deadline - now))
        return frozenset() if thread.is_alive() else frozenset(found)


class Server:
    """The server that the guard is in front of, as others may name it.

    Args:
        upstream: Its addresses.
        resolve: Gives the addresses of a name.
    """

    def __init__(self, upstream: Upstream, resolve: Callable[[str], frozenset[str]]) -> None:
        self._addresses = upstream.addresses
        self._resolve = resolve

    def is_at(self, addresses: Sequence[Address]) -> bool:
        """Whether whoever goes to these addresses, in order, goes where the guard goes.

        All of them have to be the server's. Where the guard has several to choose from, it takes the first that
        answers: so that one has to be among them. One of the others alone may be a standby, which is meant as such.
        """
        if not addresses or not all(any(self._same(one, own) for own in self._addresses) for one in addresses):
            return False
        return any(self._same(one, self._addresses[0]) for one in addresses)

    def has(self, address: Address) -> bool:
        """Whether an address is any of the server's."""
        return any(self._same(address, own) for own in self._addresses)

    def may_be_at(self, address: Address) -> bool:
        """Whether an address may be the server's, and nobody knows: one is a Unix socket, the other a port of here."""
        return any(
            address.port == own.port
            and {type(address), type(own)} == {TcpAddress, UnixAddress}
            and all(_plain(one.host) == _HERE for one in (address, own) if isinstance(one, TcpAddress))
            for own in self._addresses
        )

    def on(self, host: str) -> Address | None:
        """The server's address on a host, or in the directory of a socket; ``None`` if it has none there."""
        for own in self._addresses:
            named = UnixAddress if host.startswith(("/", "@")) else TcpAddress
            if self._same(named(host, own.port), own):
                return own
        return None

    def _same(self, one: Address, other: Address) -> bool:
        if one.port != other.port:
            return False
        if isinstance(one, UnixAddress) or isinstance(other, UnixAddress):
            return isinstance(one, UnixAddress) and isinstance(other, UnixAddress) and _is_same_socket(one, other)
        return self._is_same_host(one, other)

    def _is_same_host(self, one: TcpAddress, other: TcpAddress) -> bool:
        names = _plain(one.host), _plain(other.host)
        if names[0] == names[1]:
            return True
        found = [{name} if name == _HERE or is_address(name) else self._addresses_of(name) for name in names]
        return not found[0].isdisjoint(found[1])

    def _addresses_of(self, name: str) -> set[str]:
        return {_plain(address) for address in self._resolve(name)}


def _is_same_socket(one: UnixAddress, other: UnixAddress) -> bool:
    if "@" in {one.directory[:1], other.directory[:1]}:
        return one.directory == other.directory
    return os.path.realpath(one.directory) == os.path.realpath(other.directory)  # /var/run is a link to /run


def _plain(host: str) -> str:
    """A host by the one of its names or spellings that it is compared by."""
    host = host.lower().rstrip(".") or host
    with suppress(ValueError):
        address = ipaddress.ip_address(host)
        host = str(getattr(address, "ipv4_mapped", None) or address)
    return _HERE if host in _LOOPBACK else host


def is_address(host: str) -> bool:
    """Whether a host is a number, and no name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
