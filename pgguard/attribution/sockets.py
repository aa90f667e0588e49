"""From a socket that the guard has accepted to the inode of the socket at its other end.

The inode is what ``/proc/PID/fd`` shows, in every process that has that socket open. The kernel is asked for exactly
one socket through sock_diag(7), which takes 20 µs however many there are; ``/proc/net/tcp`` and a netlink dump take
milliseconds. The structures are those of ``linux/inet_diag.h`` and ``linux/unix_diag.h``.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, Self

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_NLMSG_ERROR = 2
_ALL_STATES = 0xFFFFFFFF
_NO_COOKIE = b"\xff" * 8
_UDIAG_SHOW_PEER = 4
_UNIX_DIAG_PEER = 2
_UDIAG_SHOW_RQLEN = 16
_UNIX_DIAG_RQLEN = 4

_HEADER = struct.Struct("=IHHII")
"""``struct nlmsghdr``: length, type, flags, sequence number, port."""
_ERROR = struct.Struct("=i")
"""The beginning of ``struct nlmsgerr``: an errno, negated."""
_INET_REQUEST = struct.Struct("=BBBxI2s2s16s16sI8s")
"""``struct inet_diag_req_v2``: family, protocol, extensions, states, then the socket: its own port, its peer's, its
own address, its peer's, interface, cookie."""
_INET_ANSWER = struct.Struct("=4x2s2s16s16s12x4xI8xI")
"""``struct inet_diag_msg``: its own port, its peer's, its own address, its peer's, the bytes that it has received
and nobody has read, inode."""
_UNIX_REQUEST = struct.Struct("=BxxxIII8s")
"""``struct unix_diag_req``: family, states, inode, what to show, cookie."""
_UNIX_ANSWER_SIZE = 16
"""``struct unix_diag_msg``, which attributes follow."""
_ATTRIBUTE = struct.Struct("=HHI")
"""``struct nlattr``: length, type; then the first 32 bits of the one attribute that is asked for: an inode; or of
``struct unix_diag_rqlen``, what has been received and not read, in bytes."""

_TCP, _TCP_INFO = socket.IPPROTO_TCP, socket.TCP_INFO
_LAST_DATA_SENT = struct.Struct("=I")
_LAST_DATA_SENT_OFFSET = 44
"""Of ``tcpi_last_data_sent`` in ``struct tcp_info``, ``linux/tcp.h``: milliseconds since data was last sent, or since
the connection was made if none was."""

_DEADLINE = 1.0
"""Seconds. The kernel answers before ``send`` returns; this is for a kernel that doesn't."""


class Connected(Protocol):
    """What is asked of a connected socket: of a :class:`socket.socket`, or what the guard has of one."""

    def fileno(self) -> int:
        """Tell its descriptor."""

    def getsockname(self) -> Any:
        """Tell its own address: a tuple, unless it is a Unix one."""

    def getpeername(self) -> Any:
        """Tell that of its other end."""

    def getsockopt(self, level: int, option: int, size: int, /) -> bytes:
        """Tell an option that has so many bytes."""


class TcpClient(NamedTuple):
    """The client's end of an accepted TCP connection, as the guard's end names it."""

    address: bytes
    """The client's, 4 or 16 bytes in network order."""
    port: int
    guard_address: bytes
    guard_port: int
    interface: int
    """The index of the interface that a link-local address belongs to, else 0."""
    opened: float
    """When it was connected, in seconds of CLOCK_BOOTTIME, the clock of process start times."""
    connected_by: int | None = None
    """The pid that called connect(2), if the kernel's probe has said it."""
    connected_on: int | None = None
    """The thread that did."""

    @property
    def connected(self) -> tuple[int, int | None] | None:
        """The process and the thread that the kernel has named as those that called connect(2)."""
        return None if self.connected_by is None else (self.connected_by, self.connected_on)


class UnixClient(NamedTuple):
    """The client's end of an accepted Unix connection, as the guard's end names it."""

    guard_inode: int
    """The accepted socket's own inode."""
    connected_by: int | None
    """The pid that called connect(2), ``SO_PEERCRED``; ``None`` if it has none in the guard's pid namespace."""
    opened: float
    """When it was accepted, in seconds of CLOCK_BOOTTIME."""

    @property
    def connected(self) -> tuple[int, int | None] | None:
        """As of a :class:`TcpClient`; the kernel doesn't say which thread it was."""
        return None if self.connected_by is None else (self.connected_by, None)


ClientSocket = TcpClient | UnixClient


def peer_pid(accepted: Connected) -> int:
    """The pid that called connect(2) at the far end of a Unix socket; 0 if the guard's pid namespace has none for it.

    Raises:
        OSError: it can't be asked.
    """
    pid, _, _ = struct.unpack("=iII", accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(pid)


def peer_user(connected: Connected) -> int:
    """The uid of who called listen(2) at the far end of a Unix socket. Raises OSError: it can't be asked."""
    _, uid, _ = struct.unpack("=iII", connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(uid)


def client_socket(
    accepted: Connected,
    peer: tuple[Any, ...] | None = None,
    connected: tuple[int | None, int | None] = (None, None),
    own: tuple[Any, ...] | None = None,
) -> ClientSocket:
    """Describe the far end of a socket that has just been accepted and not been written to. Doesn't block.

    Args:
        accepted: the socket.
        peer: its client's address, where accept(2) has told it.
        connected: the process and the thread that have connected it, if it is a TCP one and the kernel has named them.
        own: the guard's address of it, if it is a TCP one and that is known.

    Raises:
        OSError: the connection is already gone (ENOTCONN); where ``peer`` is given, that doesn't show.
    """
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    # A Unix socket's address is no tuple; its family the socket would look up as a member of an enumeration.
    guard = accepted.getsockname() if own is None else own
    if not isinstance(guard, tuple):
        return UnixClient(os.fstat(accepted.fileno()).st_ino, peer_pid(accepted) or None, now)
    client = accepted.getpeername() if peer is None else peer
    # A connection may have waited to be accepted for longer than its client took to fork.
    info = accepted.getsockopt(_TCP, _TCP_INFO, _LAST_DATA_SENT_OFFSET + 4)
    milliseconds: int = _LAST_DATA_SENT.unpack_from(info, _LAST_DATA_SENT_OFFSET)[0]
    return TcpClient(
        _packed(client[0]),
        client[1],
        _packed(guard[0]),
        guard[1],
        0 if len(client) == 2 else client[3],  # of IPv4 there is none
        now - milliseconds / 1000,
        *connected,
    )


@lru_cache(maxsize=256)  # many connections are from, and to, the same: 37 bytes each
def _packed(host: str) -> bytes:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.inet_pton(family, host.partition("%")[0])


class SockDiag:
    """A netlink socket to ask the kernel about sockets; a context manager, not to be shared between threads.

    Opening one takes 10 µs, so it is opened for each batch of questions and kept for none.

    Raises:
        OSError: from any of its methods: this kernel or sandbox doesn't offer sock_diag, or didn't answer within
            a second (TimeoutError).
    """

    def __init__(self) -> None:
        self._netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG)
        self._netlink.settimeout(_DEADLINE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._netlink.close()

    def client_inode(self, client: ClientSocket) -> int | None:
        """Find the inode of the client's socket.

        ``None`` if the client is on another host or in another network namespace, or has closed its socket; or if
        the kernel was built without this kind of sock_diag, which answers alike.
        """
        if isinstance(client, UnixClient):
            return self._unix_attribute(client.guard_inode, _UDIAG_SHOW_PEER, _UNIX_DIAG_PEER) or None
        found = self._tcp_socket(client)
        return None if found is None else found[0]

    def unread(self, client: ClientSocket, inode: int) -> int | None:
        """How many bytes the client's socket has received that nobody has read from it.

        Exact at the moment of the answer, for sockets that the sender probe watches as well. What is on the way, or
        didn't fit, isn't counted; the end of the stream counts as a byte over TCP.

        Args:
            client: whose socket it is.
            inode: what :meth:`client_inode` has said. ``None`` is returned if it isn't that socket any more, or can't
                be found, for one of the reasons given there.
        """
        if isinstance(client, UnixClient):
            return self._unix_attribute(inode, _UDIAG_SHOW_RQLEN, _UNIX_DIAG_RQLEN)
        found = self._tcp_socket(client)
        return None if found is None or found[0] != inode else found[1]

    def _tcp_socket(self, client: TcpClient) -> tuple[int, int] | None:
        """The inode of the client's socket, and what lies unread in it."""
        # Where no connection matches, the kernel falls back to a listener on the client's address and port.
        return self._inet_socket(
            (client.address, client.port), (client.guard_address, client.guard_port), client.interface
        )

    def listener_inode(self, address: bytes, port: int) -> int | None:
        """Find the inode of the socket that accepts connections to an address of this host, whatever it is bound to.

        Args:
            address: 4 or 16 bytes in network order.
            port: the port.

        Returns:
            ``None`` if nothing listens there, in this network namespace.
        """
        found = self._inet_socket((address, port), (bytes(len(address)), 0), 0)
        return None if found is None else found[0]

    def _inet_socket(self, own: tuple[bytes, int], peer: tuple[bytes, int], interface: int) -> tuple[int, int] | None:
        """The inode of a TCP socket of exactly these ports, by its own address and its peer's; and what is unread."""
        # To the kernel an IPv4-mapped address is the IPv4 address, whichever family either end's socket has.
        family = socket.AF_INET if len(own[0]) == 4 else socket.AF_INET6
        ports = own[1].to_bytes(2, "big"), peer[1].to_bytes(2, "big")
        answer = self._ask(
            _INET_REQUEST.pack(
                family, socket.IPPROTO_TCP, 0, _ALL_STATES, *ports, own[0], peer[0], interface, _NO_COOKIE
            )
        )
        if answer is None:
            return None
        port, peer_port, _, _, unread, inode = _INET_ANSWER.unpack_from(answer)
        if (port, peer_port) != ports:
            return None
        # A connection that its owner has closed lives on without an inode until the last byte is acknowledged.
        return (inode, unread) if inode else None

    def _unix_attribute(self, inode: int, show: int, attribute: int) -> int | None:
        answer = self._ask(_UNIX_REQUEST.pack(socket.AF_UNIX, _ALL_STATES, inode, show, _NO_COOKIE))
        if answer is None or len(answer) < _UNIX_ANSWER_SIZE + _ATTRIBUTE.size:
            return None
        _, kind, value = _ATTRIBUTE.unpack_from(answer, _UNIX_ANSWER_SIZE)
        return int(value) if kind == attribute else None

    def _ask(self, request: bytes) -> bytes | None:
        header = _HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 0, 0)
        self._netlink.send(header + request)
        answer = self._netlink.recv(8192)
        length, kind, _, _, _ = _HEADER.unpack_from(answer)
        body = answer[_HEADER.size : length]
        if kind != _NLMSG_ERROR:
            return body
        number = -_ERROR.unpack_from(body)[0]
        if number == errno.ENOENT:
            return None
        raise OSError(number, f"sock_diag: {os.strerror(number)}")
