"""The two ends of a session: their sockets, what is on its way between them, and how far each has come.

The relay (:mod:`pgguard.proxy.relay`) moves the bytes, and what ends a session (:mod:`pgguard.proxy.endings`,
:mod:`pgguard.proxy.aftermath`) says what becomes of its ends. Others may say what they want to be told of, or have
found out, by the methods here.
"""

from __future__ import annotations

import array
import fcntl
import socket
import termios
from collections import deque
from enum import Enum
from typing import TYPE_CHECKING, Final, Protocol, final

if TYPE_CHECKING:
    from mypy_extensions import i64

    from pgguard.identity import Sender
    from pgguard.proxy.kernel_senders import TcpAccount
    from pgguard.proxy.session import ProxiedSession
    from pgguard.proxy.transport import Tls
    from pgguard.session.tracker import Tracker

CHUNK: Final = 128 * 1024
"""Bytes read at once at most, and so the most that one direction of a session buffers. That less comes mostly costs
nothing: what is left of a chunk goes back to where it was taken from (2.03 µs for a send and a receive of 75 bytes,
asked for as 128 KiB or as 480 bytes)."""

ATTENTIVE: Final = 1
"""A client's request is of interest, as nobody watches what is at rest, or as the last answer lies unread; or the
server's first answer is."""
CONTESTED: Final = 2
"""Several have the client's end open, and the kernel doesn't say who of them sends: that is found out before a request
is forwarded."""
LOGIN: Final = 4
"""It is seen how a login goes, as something may be edited of it: :mod:`pgguard.proxy.scram`."""


class Phase(Enum):
    """How far a session has come, from when it is in the sweep."""

    RELAYED = "what one side sends is passed on to the other"
    CONDEMNED = "it is rejected, and out of the sweep until its client is at the end of the message it is being sent"
    REJECTED = "the server's side is closed; the client gets what waits for it, and is heard until it ends too"
    ENDED = "the server's side is closed; the client gets what waits for it"
    LINGERING = "its client has been sent everything, and the end of the stream: what it still sends is for nobody"
    CLOSED = "both sockets are closed"


class Reading(Enum):
    """How far an end's own stream has come, and what it waits for if it isn't read."""

    OPEN = "it is read whenever it has something, as long as its peer has room for that"
    HELD = "what it has sent is being looked into or ruled on, or waits for the answer in front of it to be read"
    QUEUED = "what it has sent waits for its turn"
    CHOKED = "it waits for the server to answer what it has been sent"
    ENDING = "its stream has ended, and that is being ruled on"
    ENDED = "its stream has ended"


class Writing(Enum):
    """Whether an end can be written to."""

    OPEN = "it can, now or when there is room"
    BROKEN = "nothing more can be written to it"
    GONE = "its connection was reset: it can't be read any more either"


_AT_ITS_END: Final = (Reading.ENDING, Reading.ENDED)


class Socket(Protocol):
    """What the relay does with a socket, which never blocks: see :class:`pgguard.proxy.sockets.Stream`."""

    def fileno(self) -> int:
        """Tell its descriptor."""

    def receive(self, size: int, /) -> bytes | None:
        """Receive so many bytes at most; none: the stream has ended; ``None``: nothing has come."""

    def receive_named(self, size: int, /) -> tuple[bytes, int] | None:
        """The same, with the pid of who has sent them: 0 if it has none here, -1 if the kernel doesn't say who."""

    def send(self, data: bytes, begin: int, stop: int, /) -> int:
        """Send as much of ``data[begin:stop]`` as there is room for; returns how much that was."""

    def shutdown(self, how: int, /) -> None:
        """End the stream to the other side."""

    def close(self) -> None:
        """Close it."""

    def setsockopt(self, level: int, option: int, value: int | bytes, /) -> None:
        """Set an option."""

    def getsockopt(self, level: int, option: int, /) -> int:
        """Tell an option."""


@final
class Flow:
    """What the relay knows of a session: its two ends, how far it has come, and what follows it."""

    __slots__ = ("client", "phase", "server", "tracker")

    client: End
    server: End

    def __init__(self) -> None:
        self.tracker: Tracker | None = None
        """``None`` when it isn't followed, or not any more."""
        self.phase = Phase.RELAYED


@final
class End:
    """One of a session's two sockets. The relay reads it and writes it; nobody else does while it is in the sweep."""

    __slots__ = (
        "failure",
        "fd",
        "flow",
        "heed",
        "held",
        "interest",
        "is_client",
        "kernel_account",
        "late",
        "names_senders",
        "outgoing",
        "peer",
        "pid",
        "pieces",
        "reading",
        "receive_from",
        "receive_named_from",
        "send_to",
        "sender",
        "session",
        "sock",
        "swallow",
        "tls",
        "writing",
        "written",
    )

    peer: End

    def __init__(
        self,
        session: ProxiedSession,
        flow: Flow,
        sock: Socket,
        *,
        is_client: bool,
        names_senders: bool = False,
        kernel_account: TcpAccount | None = None,
        sender: Sender | None = None,
        tls: Tls | None = None,
    ) -> None:
        # What every message has to do with comes first: compiled, it lies side by side, in few cache lines.
        self.is_client = is_client
        self.names_senders = names_senders
        """The kernel says with every read who sent it."""
        self.late = False
        """The relay has been late for what was read from it: answers are kept apart, where several read them."""
        self.tls = tls
        """What its bytes are encrypted with; ``None`` when they are plain."""
        self.sock = sock
        self.receive_from = type(sock).receive
        self.receive_named_from = type(sock).receive_named
        self.send_to = type(sock).send
        """Methods of its socket's class, for what the relay does with each message: to look them up there would take as
        long as a receive or a send takes beside the system call."""
        self.writing = Writing.OPEN
        self.outgoing = b""
        """Bytes that its socket had no room for, from :attr:`written` on, encrypted if they are to be. While there are
        any, its peer isn't read."""
        self.reading = Reading.OPEN
        self.flow = flow
        self.kernel_account = kernel_account
        """The kernel says who sent what was read, in this account."""
        self.sender = sender
        """Who has sent what was read last, as far as that is known."""
        self.held = b""
        """Bytes read from it that can't be judged, or that wait for a ruling."""
        self.heed: i64 = 0
        """Why what comes next isn't simply passed on: :data:`ATTENTIVE`, :data:`CONTESTED`, :data:`LOGIN`."""
        self.swallow: i64 = 0
        """Bytes of a dropped message that are still to come."""

        self.session = session
        self.fd = sock.fileno()
        self.pid: i64 = -1
        """Whom the kernel has named last as it was read, where it does: see :meth:`Socket.receive_named`."""
        self.pieces: deque[tuple[bytes, Sender | None]] | None = None
        """Bytes of other senders, read behind :attr:`held`; ``None`` before there are any, for its 760 bytes."""
        self.written = 0
        """How many of :attr:`outgoing` have been written since."""
        self.failure: int | None = None
        """The system's number for why nothing more will come from it, unless it has ended its stream."""
        self.interest: i64 = -1
        """The epoll events that it is registered for; -1: it isn't."""

    # What others want to know of it, or have found out

    def attend(self) -> None:
        """Have the request that comes next looked at."""
        self.heed |= ATTENTIVE

    def contest(self, several: bool) -> None:
        """Say whether several have it open of whom the kernel doesn't say who sends."""
        self.heed = self.heed | CONTESTED if several else self.heed & ~CONTESTED

    def watch_login(self, watched: bool) -> None:
        """Say whether it is to be seen how its login goes on."""
        self.heed = self.heed | LOGIN if watched else self.heed & ~LOGIN

    @property
    def contested(self) -> bool:
        """Whether it is found out who sends before a request is forwarded."""
        return self.heed & CONTESTED != 0

    @property
    def waits(self) -> bool:
        """Whether it isn't read, for a reason of its own: what it has sent is held, or its end is."""
        return self.reading is not Reading.OPEN and self.reading is not Reading.ENDED

    @property
    def eof(self) -> bool:
        """Whether nothing more will come from it."""
        return self.reading in _AT_ITS_END

    @property
    def unsent(self) -> int:
        """How many bytes wait for room in its socket."""
        return len(self.outgoing) - self.written

    @property
    def is_drained(self) -> bool:
        """Whether everything that has come from it has been read, and judged. A system call."""
        if self.held or self.pieces or (self.tls is not None and (self.tls.halfway or self.tls.unopened)):
            return False
        unread = array.array("i", [0])
        fcntl.ioctl(self.fd, termios.FIONREAD, unread)  # tcp(7), unix(7)
        return not unread[0]

    def wants(self, event: int) -> bool:
        """Whether it is registered for this one."""
        return self.interest > 0 and self.interest & event != 0

    @property
    def is_stuffed(self) -> bool:
        """Whether so much waits for room in its socket that TLS must not have more to say to it, for what it sends."""
        return self.tls is not None and self.unsent > 2 * CHUNK

    # What comes from it

    def receive(self, size: int) -> bytes | None:
        """Receive about so many bytes at most; none: its stream has ended; ``None``: nothing has come.

        Raises:
            OSError: it is broken.
        """
        data = self.sock.receive(size)
        if self.tls is None or not data:
            return data
        data = self.tls.open(data)
        return data if data or self.tls.is_over else None

    # What goes to it

    def append(self, data: bytes | memoryview) -> None:
        """Have something more sent to it when there is room for that."""
        self.append_raw(data if self.tls is None else self.tls.seal(data))

    def append_raw(self, data: bytes | memoryview) -> None:
        """The same, of what is encrypted already."""
        self.outgoing = self.outgoing[self.written :] + data
        self.written = 0

    def write(self) -> None:
        """Write what waits, as far as there is room.

        Raises:
            OSError: it is broken.
        """
        self.written += self.sock.send(self.outgoing, self.written, len(self.outgoing))
        if self.written == len(self.outgoing):
            self.drop_outgoing()

    def drop_outgoing(self) -> None:
        """Nothing waits to be written any more."""
        self.outgoing = b""
        self.written = 0

    def end_writing(self, *, cleanly: bool = True) -> None:
        """End the stream to it, when everything has been written.

        Args:
            cleanly: say so with TLS as well; otherwise it looks as if it had been cut off.

        Raises:
            OSError: it is broken.
        """
        if self.tls is not None and cleanly:
            words = self.tls.farewell()
            if words:
                self.sock.send(words, 0, len(words))
        self.sock.shutdown(socket.SHUT_WR)

    # Its own stream

    def end_stream(self) -> None:
        """Nothing more will come from it."""
        self.reading = Reading.ENDED
