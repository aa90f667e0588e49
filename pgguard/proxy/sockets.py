"""What the relay has the kernel do: sockets and an epoll that cost little, as they do no more than it takes.

This is the pure form. Where pgguard is compiled, ``sockets.c`` stands in its place, beside this file: the same classes
and functions, with the same errors.
"""

from __future__ import annotations

import select
import socket
import sys
from typing import TYPE_CHECKING, Any, Final, final, overload

from pgguard.attribution.senders import CREDENTIALS_SPACE

if TYPE_CHECKING:
    from pgguard.proxy.listeners import Peer

_PID: Final = 4
"""Bytes of what ``struct ucred`` begins with: unix(7)."""


@final
class Epoll:
    """What the sweep waits with: it says of each event whose it is."""

    __slots__ = ("_epoll", "_whose")

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._whose: dict[int, object] = {}

    def register(self, fd: int, eventmask: int, whose: object, /) -> None:
        """Report a descriptor's events, each with an object. Raises OSError: epoll_ctl(2)."""
        self._epoll.register(fd, eventmask)
        self._whose[fd] = whose

    def modify(self, fd: int, eventmask: int, /) -> None:
        """Report others of it. Raises OSError: epoll_ctl(2)."""
        self._epoll.modify(fd, eventmask)

    def unregister(self, fd: int, /) -> None:
        """Report none any more. Raises OSError: epoll_ctl(2)."""
        self._epoll.unregister(fd)
        self._whose.pop(fd, None)

    def poll(self, timeout: float, maxevents: int, /) -> list[Any]:
        """Wait for events.

        In C a signal ends the wait when its handler has run, and it is the only call by which other threads get the
        interpreter's lock, also when nothing is waited for.

        Args:
            timeout: for how many seconds at most; less than 0: until there are any.
            maxevents: how many are reported at most; in C no more than 256.

        Returns:
            By turns, the object that a descriptor was registered with, and what it is ready for, ``select.EPOLL…``. The
            object is ``None`` if the descriptor isn't registered any more: its file was closed here, and is open
            elsewhere (epoll(7)).
        """
        events: list[Any] = []
        for fd, mask in self._epoll.poll(timeout, maxevents):
            events += (self._whose.get(fd), mask)
        return events

    def fileno(self) -> int:
        """Tell its own descriptor. Raises ValueError: it is closed."""
        return self._epoll.fileno()

    def close(self) -> None:
        """Close it; nothing happens if it is closed."""
        self._epoll.close()
        self._whose.clear()

    @property
    def closed(self) -> bool:
        """Whether it is."""
        return self._epoll.closed


@final
class Stream:
    """A stream socket that never blocks.

    Args:
        sock: its descriptor is taken from it, and belongs to this object from then on.
    """

    __slots__ = ("_sock",)

    def __init__(self, sock: socket.socket, /) -> None:
        self._sock = socket.socket(sock.family, sock.type, sock.proto, sock.detach())
        self._sock.setblocking(False)

    def receive(self, size: int, /) -> bytes | None:
        """Receive so many bytes at most; none: the stream has ended; ``None``: nothing has come.

        Raises:
            OSError: it is broken: recv(2).
        """
        try:
            return self._sock.recv(size)
        except BlockingIOError:
            return None

    def receive_named(self, size: int, /) -> tuple[bytes, int] | None:
        """The same, with the pid of who has sent them: 0 if it has none here, -1 if the kernel doesn't say who.

        See :mod:`pgguard.attribution.senders`.
        """
        try:
            data, ancillary, _, _ = self._sock.recvmsg(size, CREDENTIALS_SPACE)
        except BlockingIOError:
            return None
        return data, int.from_bytes(ancillary[0][2][:_PID], sys.byteorder) if ancillary else -1

    def send(self, data: bytes, begin: int, stop: int, /) -> int:
        """Send ``data[begin:stop]``; returns how many bytes there was room for.

        Raises:
            OSError: it is broken: send(2).
            ValueError: there are no such bytes.
        """
        if not 0 <= begin <= stop <= len(data):
            raise ValueError("there are no such bytes")
        try:
            return self._sock.send(memoryview(data)[begin:stop])
        except BlockingIOError:
            return 0

    def connect_ex(self, target: str | tuple[str | int, ...], /) -> int:
        """Connect it to the path of a Unix socket, or to a host by its number and a port: connect(2), its errno."""
        return self._sock.connect_ex(target)

    def fileno(self) -> int:
        """Tell its descriptor; -1 when it is closed."""
        return self._sock.fileno()

    def shutdown(self, how: int, /) -> None:
        """End the stream to the other side: :meth:`socket.socket.shutdown`."""
        self._sock.shutdown(how)

    def setsockopt(self, level: int, option: int, value: int | bytes, /) -> None:
        """Set an option: :meth:`socket.socket.setsockopt`."""
        self._sock.setsockopt(level, option, value)

    @overload
    def getsockopt(self, level: int, option: int, /) -> int: ...

    @overload
    def getsockopt(self, level: int, option: int, size: int, /) -> bytes: ...

    def getsockopt(self, level: int, option: int, size: int = 0, /) -> int | bytes:
        """Tell an option: :meth:`socket.socket.getsockopt`."""
        return self._sock.getsockopt(level, option, size) if size else self._sock.getsockopt(level, option)

    def getsockname(self) -> Any:
        """Tell its own address: a host and a port, and more with IPv6; of a Unix socket a string of no meaning."""
        return self._sock.getsockname()

    def getpeername(self) -> Any:
        """Tell the address of its other end, likewise. Raises OSError: it is gone."""
        return self._sock.getpeername()

    def detach(self) -> int:
        """Tell its descriptor, which belongs to the caller from then on."""
        return self._sock.detach()

    def close(self) -> None:
        """Close it; nothing happens if it is closed."""
        self._sock.close()


def accept(listener: socket.socket, /) -> tuple[Stream, Peer] | None:
    """Accept a connection, and tell where it comes from; ``None``: there is none.

    Args:
        listener: a socket that doesn't block.

    Raises:
        OSError: accept(2).
    """
    try:
        sock, peer = listener.accept()
    except BlockingIOError:
        return None
    return Stream(sock), peer


def unconnected(family: int, /) -> Stream:
    """Make a stream that is to be connected. Raises OSError: there is no descriptor for it."""
    return Stream(socket.socket(family, socket.SOCK_STREAM))
