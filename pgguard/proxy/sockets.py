"""What the relay has the kernel do: sockets and an epoll that cost little, as they do no more than it takes.

This is the pure form. Where pgguard is compiled, ``sockets.c`` stands in its place, beside this file: the same classes,
with the same errors.
"""

from __future__ import annotations

import select
import sys
from typing import TYPE_CHECKING, Final, final

from pgguard.attribution.senders import CREDENTIALS_SPACE

if TYPE_CHECKING:
    import socket

_PID: Final = 4
"""Bytes of what ``struct ucred`` begins with: unix(7)."""

Epoll = select.epoll
"""What the sweep waits with. In C it has no more of it than ``register``, ``modify``, ``unregister``, ``fileno``,
``close``, ``closed`` and ``poll(timeout, maxevents)``, which returns 256 events at most. A signal ends the wait there,
when its handler has run: nothing is returned then. And it is the only call by which other threads get the interpreter's
lock, also when nothing is waited for."""


@final
class Stream:
    """A connected stream socket that never blocks.

    Args:
        sock: it, which belongs to this object from then on.
    """

    __slots__ = ("_sock",)

    def __init__(self, sock: socket.socket, /) -> None:
        self._sock = sock

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

    def fileno(self) -> int:
        """Tell its descriptor; -1 when it is closed."""
        return self._sock.fileno()

    def shutdown(self, how: int, /) -> None:
        """End the stream to the other side: :meth:`socket.socket.shutdown`."""
        self._sock.shutdown(how)

    def setsockopt(self, level: int, option: int, value: int | bytes, /) -> None:
        """Set an option: :meth:`socket.socket.setsockopt`."""
        self._sock.setsockopt(level, option, value)

    def getsockopt(self, level: int, option: int, /) -> int:
        """Tell an option: :meth:`socket.socket.getsockopt`."""
        return self._sock.getsockopt(level, option)

    def close(self) -> None:
        """Close it; nothing happens if it is closed."""
        self._sock.close()
