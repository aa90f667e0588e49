"""The Unix socket of a server on this host that the guard has been told to reach over TCP: it takes less CPU time.

Nothing is concluded from names and ports, which another server may have: the process that listens on the Unix socket
has to have the TCP listener open, too. Where that can't be seen, nothing is said.
"""

from __future__ import annotations

import ipaddress
import socket
from typing import TYPE_CHECKING

from pgguard.attribution.descriptors import find_sockets
from pgguard.attribution.sockets import SockDiag, peer_pid
from pgguard.proxy.addresses import SOCKET_DIRECTORIES, TcpAddress, UnixAddress, conninfo_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pgguard.proxy.addresses import Upstream


def shortcut(upstream: Upstream) -> UnixAddress | None:
    """Look for the Unix socket of the server at a loopback address. Takes a millisecond, but for the resolver.

    Returns:
        Where it is, if this process can connect to it, and it is certain that it is the same server's; else ``None``.
        That is certain where this process may see what files the server has open, and both are in one pid namespace.
    """
    if len(upstream.addresses) != 1:
        return None
    [address] = upstream.addresses
    if not isinstance(address, TcpAddress):
        return None
    try:
        listeners = _listeners(address)
        return next(_sockets_of_their_process(listeners, address.port), None) if listeners else None
    except OSError:
        return None


def advice_on(found: UnixAddress, setting: str) -> str:
    """What to do about it: an imperative.

    Args:
        found: The socket.
        setting: What says where the server is.
    """
    return f"use {setting} {conninfo_of([found])}, if the server's pg_hba.conf lets its clients log in there"


def _listeners(address: TcpAddress) -> set[int]:
    """The inodes of what listens at a loopback address, or at all those that a name has; none if one is no such."""
    found = set()
    with SockDiag() as kernel:
        for _, _, _, _, target in socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM):
            ip = ipaddress.ip_address(str(target[0]).partition("%")[0])
            if not ip.is_loopback:
                return set()
            inode = kernel.listener_inode(ip.packed, address.port)
            if inode is not None:
                found.add(inode)
    return found


def _sockets_of_their_process(listeners: set[int], port: int) -> Iterator[UnixAddress]:
    for directory in SOCKET_DIRECTORIES:
        address = UnixAddress(directory, port)
        pid = _listening_process(address)
        if pid and len(find_sockets(pid, listeners)) == len(listeners):
            yield address


def _listening_process(address: UnixAddress) -> int:
    """The pid that listens on a Unix socket; 0 if nobody does, or it isn't in this pid namespace."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setblocking(False)
        try:
            sock.connect(address.path)
        except OSError:
            return 0
        return peer_pid(sock)
