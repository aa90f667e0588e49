"""A second user for the connection of any program: the test itself, which takes a copy of its socket."""

from __future__ import annotations

import ctypes
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from tests.servers import not_installed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.servers import Address

_PIDFD_GETFD = 438
"""Its number on every architecture: pidfd_getfd(2), Linux 5.6."""


class Intruder:
    """Sends on connections of a program's, as a process that has inherited them could.

    Args:
        pid: the program, which the test has started.
        address: where its connections lead, over TCP.
    """

    def __init__(self, pid: int, address: Address) -> None:
        self._pid = pid
        self._peer = (address.host, address.port)
        self._known: set[object] = set()

    def send(self, data: bytes) -> None:
        """Send on the only connection of which none has been used here before."""
        [connection] = self._fresh_connections()
        with connection:
            self._known.add(connection.getsockname())
            connection.sendall(data)

    def _fresh_connections(self) -> list[socket.socket]:
        found: dict[object, socket.socket] = {}
        for connection in self._sockets():
            name = _name(connection, self._peer)
            if name is None or name in self._known or name in found:
                connection.close()
            else:
                found[name] = connection
        return list(found.values())

    def _sockets(self) -> Iterator[socket.socket]:
        pidfd = os.pidfd_open(self._pid)
        try:
            for fd in Path(f"/proc/{self._pid}/fd").iterdir():
                try:
                    is_socket = str(fd.readlink()).startswith("socket:")
                except FileNotFoundError:
                    continue
                if not is_socket:
                    continue
                copy = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, pidfd, int(fd.name), 0)
                if copy >= 0:
                    yield socket.socket(fileno=copy)
        finally:
            os.close(pidfd)


def _name(connection: socket.socket, peer: tuple[str, int]) -> object:
    """Its own address, if it is connected to that peer."""
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return None
    try:
        host, port = connection.getpeername()[:2]
    except OSError:
        return None
    return connection.getsockname() if (host.removeprefix("::ffff:"), port) == peer else None


def require_intruders() -> None:
    """Skip the test where the kernel, or a seccomp filter, doesn't let a process copy its child's descriptors."""
    pidfd = os.pidfd_open(os.getpid())
    try:
        copy = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, pidfd, 0, 0)
        if copy < 0:
            not_installed("pidfd_getfd(2)")
        os.close(copy)
    finally:
        os.close(pidfd)
