"""Connecting to one address, a step at a time: no step waits for anything.

A host is connected to that is given by its number, or a Unix socket. A name has to be looked up first, and may stand
for several addresses: see :mod:`pgguard.proxy.upstream`.
"""

from __future__ import annotations

import errno
import functools
import ipaddress
import os
import socket
from contextlib import suppress
from enum import Enum
from typing import Final

from pgguard.proxy.addresses import Address, UnixAddress

BACKLOG_PAUSE: Final = 0.01
"""Seconds to wait for room in the backlog of a Unix socket."""


class Progress(Enum):
    """How far a connection has come."""

    MADE = "it is there"
    UNDER_WAY = "it is there, or has failed, when the socket is writable"
    NO_ROOM = "the server's backlog is full: it is to be tried again after a pause"


def is_direct(address: Address) -> bool:
    """Whether nothing has to be looked up to connect to it."""
    return isinstance(address, UnixAddress) or family_of(address.host) is not None


def is_on_this_host(address: Address) -> bool:
    """Whether it is certain that a server at an address shares this host's processors.

    A name that has to be looked up isn't, but for ``localhost``: RFC 6761.
    """
    if isinstance(address, UnixAddress) or address.host == "localhost":
        return True
    family = family_of(address.host)
    if family is None:
        return False
    if ipaddress.ip_address(address.host).is_loopback:
        return True
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
        # Sends nothing. The kernel reaches an address of its own from that very address.
        sock.connect((address.host, address.port))
        return bool(sock.getsockname()[0] == sock.getpeername()[0])
    return False


@functools.cache
def family_of(host: str) -> socket.AddressFamily | None:
    """The kind of a host's address; ``None`` if it is a name, or is of a certain interface: it has to be looked up."""
    try:
        number = ipaddress.ip_address(host)
    except ValueError:
        return None
    if number.version == 4:
        return socket.AF_INET
    return None if "%" in host else socket.AF_INET6


class Dial:
    """A connection that is being made.

    Args:
        address: where to; one that :func:`is_direct`.

    Raises:
        OSError: there is no descriptor for it.
    """

    __slots__ = ("_is_begun", "_target", "sock")

    def __init__(self, address: Address) -> None:
        self._target: str | tuple[str, int]
        if isinstance(address, UnixAddress):
            family, self._target = socket.AF_UNIX, address.path
        else:
            family, self._target = family_of(address.host) or socket.AF_INET, (address.host, address.port)
        self.sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._is_begun = False

    def close(self) -> None:
        """Give it up."""
        self.sock.close()

    def step(self) -> Progress:
        """Come as far as can be without waiting. Raises OSError: it can't be connected to."""
        sock = self.sock
        if sock.family == socket.AF_UNIX:
            error = sock.connect_ex(self._target)
            # Nothing has been begun, as it has with TCP: the server's backlog is full, connect(2).
            if error == errno.EAGAIN:
                return Progress.NO_ROOM
        elif self._is_begun:
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        else:
            error = sock.connect_ex(self._target)
            if error == errno.EINPROGRESS:
                # On one host it is connected by now: it is asked once more before it is waited for.
                error = sock.connect_ex(self._target)
            if error == errno.EALREADY:
                self._is_begun = True
                return Progress.UNDER_WAY
        if error not in (0, errno.EISCONN):
            raise OSError(error, os.strerror(error))
        if sock.family != socket.AF_UNIX:
            # What PostgreSQL and libpq set on each connection: a peer that vanished is found out in the end.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return Progress.MADE
