"""Clients in other network namespaces of this host, as those in containers are.

Such a client reaches the guard through a virtual Ethernet pair or a bridge, and its socket belongs to its own network
namespace, where alone sock_diag(7) finds it: network_namespaces(7). Its inode is unique all the same, because the
sockets of all namespaces are files of one file system (``sock_mnt`` in ``net/socket.c``), and so whoever has it open is
found like anybody else.

**Which namespaces there are** is told by ``/proc/PID/ns/net`` of every process. Reading that link takes the same rights
as reading ``/proc/PID/fd``, so a namespace that isn't seen is one whose processes couldn't be named either.

**What is believed.** Only a socket with exactly the addresses and ports of the guard's own end, turned around. Where
addresses are translated on the way, as for ports that docker publishes, none has them, and the client stays unknown.
Private addresses are not unique: where two namespaces have such a socket, neither is believed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from pgguard.attribution.descriptors import list_processes
from pgguard.attribution.privileges import Right, raised
from pgguard.attribution.sockets import ClientSocket, SockDiag, TcpClient

T = TypeVar("T")
_Candidates = list[tuple[str, list[int]]]
"""Namespaces, each by what its links say and with some of its processes."""

_CLONE_NEWNET = 0x40000000
"""``linux/sched.h``."""

_FRESH = 0.2
"""Seconds for which a list of namespaces is used again. What makes one needs longer until something connects."""

_LIMIT = 64
"""Namespaces that are asked about one connection, unless told otherwise."""

_SECONDS = 0.05
"""The time that is spent on all of them, unless told otherwise."""

_MEMBERS = 4
"""Processes that are remembered of each namespace, as ways in, in case that some of them end."""

TABLE_LIMIT = 1 << 20
"""Bytes of a table of sockets that are read: some seven thousand sockets, for which the kernel takes 10 ms and more."""

_MAPPED = bytes(10) + b"\xff\xff"
"""What an IPv4 address is preceded by as an IPv6 one: RFC 4291, section 2.5.5.2."""


class NetworkNamespaces:
    """Finds the sockets of clients, wherever on this host they are. Thread-safe; one for a guard.

    Args:
        limit: how many namespaces other than the guard's own are asked at most. Those that have had clients come first,
            then those of the youngest processes.
        seconds: how long they are asked at most, in each call. The one that is being asked is waited for.
    """

    def __init__(self, limit: int = _LIMIT, seconds: float = _SECONDS) -> None:
        self._limit = limit
        self._seconds = seconds
        self._lock = threading.Lock()
        self._listed: dict[str, list[int]] = {}
        self._listed_at = -_FRESH
        self._popular: dict[str, None] = {}
        """Namespaces in which clients were found, the latest last."""

    def client_inodes(self, clients: Sequence[ClientSocket]) -> list[int | None]:
        """Find the inodes of the clients' sockets; in the order of ``clients``. Raises nothing.

        Each is ``None`` for the reasons that :meth:`SockDiag.client_inode` has, other network namespaces excepted; and
        if it can't be told, because sock_diag isn't offered or several sockets fit.

        It is for worker threads. For clients in the guard's own network namespace it costs what sock_diag does. Only
        a TCP client that isn't there, and hasn't connected to a loopback address, is looked for in others. That takes
        0.3 ms and 50 µs for each namespace; and 5 µs for each process, five times a second at most, to see which
        namespaces there are. See :func:`find_in_namespace` for what it takes without CAP_SYS_ADMIN.
        """
        inodes = _ask_own(clients)
        missing = {
            n: client
            for n, client in enumerate(clients)
            if inodes[n] is None and isinstance(client, TcpClient) and not _is_loopback(client)
        }
        candidates = self._candidates() if missing else []
        if candidates:
            with contextlib.suppress(RuntimeError):  # no thread can be started
                found = in_a_new_thread(lambda: self._search(candidates, list(missing.values())))
                for n, inode in zip(missing, found, strict=True):
                    inodes[n] = inode
        return inodes

    def unread(self, clients: Sequence[tuple[ClientSocket, int, Sequence[int]]]) -> list[int | None]:
        """See how many bytes lie unread in the clients' sockets; in the order of ``clients``. Raises nothing.

        ``None`` where that can't be told, or the socket isn't there any more: see :meth:`SockDiag.unread`. It is for
        worker threads, and takes 20 µs a client, and for each other network namespace that there are clients in what it
        takes to look there: see :func:`find_in_namespace`.

        Args:
            clients: whose sockets, with their inodes, and with the pids of processes in the same network namespace.
        """
        found: list[int | None] = [None] * len(clients)
        with contextlib.suppress(OSError), SockDiag() as diag:
            found = [diag.unread(client, inode) for client, inode, _ in clients]
        own = _namespace_of(os.getpid())
        elsewhere: dict[str, dict[int, tuple[int, TcpClient, int]]] = {}
        for n, (client, inode, pids) in enumerate(clients):
            if found[n] is None and isinstance(client, TcpClient) and not _is_loopback(client):
                for pid in pids:
                    namespace = _namespace_of(pid)
                    if namespace not in (None, own):
                        elsewhere.setdefault(str(namespace), {})[n] = pid, client, inode
                        break
        for looks in elsewhere.values():
            with contextlib.suppress(RuntimeError):  # no thread can be started
                unread = in_a_new_thread(partial(_unread_in_namespace, list(looks.values())))
                for n, size in zip(looks, unread, strict=True):
                    found[n] = size
        return found

    def _search(self, candidates: _Candidates, clients: Sequence[TcpClient]) -> list[int | None]:
        """Look for clients in other namespaces, in a thread that changes its own."""
        deadline = time.monotonic() + self._seconds
        found: list[set[int]] = [set() for _ in clients]
        for namespace, pids in candidates:
            if time.monotonic() > deadline:
                break
            inodes = find_in_namespace(pids, clients)
            for several, inode in zip(found, inodes, strict=True):
                if inode is not None:
                    several.add(inode)
                    self._prefer(namespace)
        return [inodes.pop() if len(inodes) == 1 else None for inodes in found]

    def _candidates(self) -> _Candidates:
        """List the namespaces to ask, each with some of its processes, the most promising first."""
        with self._lock:
            now = time.monotonic()
            if now - self._listed_at >= _FRESH:
                self._listed = _list_namespaces()
                self._listed_at = now
                self._popular = {namespace: None for namespace in self._popular if namespace in self._listed}
            order = dict.fromkeys([*reversed(self._popular), *self._listed])
            return [(namespace, self._listed[namespace]) for namespace in order][: self._limit]

    def _prefer(self, namespace: str) -> None:
        with self._lock:
            self._popular.pop(namespace, None)
            if namespace in self._listed:
                self._popular[namespace] = None


def find_in_namespace(pids: Sequence[int], clients: Sequence[TcpClient]) -> list[int | None]:
    """Find the inodes of clients' sockets in one network namespace; in the order of ``clients``. Raises nothing.

    With CAP_SYS_ADMIN sock_diag is asked there, and the calling thread stays in that namespace. Without it the
    namespace's table of sockets is read, which takes milliseconds: the kernel goes through those of all namespaces.

    Args:
        pids: some processes in it; the first one that is still there is the way in.
        clients: to look for.
    """
    for pid in pids:
        for find in ask_in_namespace, read_tables:
            with contextlib.suppress(OSError):
                return find(pid, clients)
    return [None] * len(clients)


def ask_in_namespace(pid: int, clients: Sequence[TcpClient]) -> list[int | None]:
    """Ask sock_diag in the network namespace of a process; in the order of ``clients``.

    The calling thread stays in that namespace: run it :func:`in_a_new_thread`.

    Raises:
        FileNotFoundError: there is no such process any more.
        PermissionError: the guard has no ptrace rights over it, or no CAP_SYS_ADMIN: setns(2).
        OSError: sock_diag isn't offered there, or didn't answer within a second.
    """
    return _within(pid, lambda diag: [_everywhere(client, diag.client_inode) for client in clients])


def _within(pid: int, ask: Callable[[SockDiag], T]) -> T:
    """Ask sock_diag in the network namespace of a process, in which the calling thread stays. Raises OSError."""
    namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _enter(namespace)
    finally:
        os.close(namespace)
    with SockDiag() as diag:
        return ask(diag)


def _unread_in_namespace(looks: Sequence[tuple[int, TcpClient, int]]) -> list[int | None]:
    """As :meth:`SockDiag.unread`, in the network namespace of some processes, in which the calling thread may stay.

    Args:
        looks: processes in it, each with a client's socket and its inode.
    """

    def ask(diag: SockDiag) -> list[int | None]:
        return [_everywhere(client, partial(diag.unread, inode=inode)) for _, client, inode in looks]

    pid = looks[0][0]
    with contextlib.suppress(OSError):
        return _within(pid, ask)
    with contextlib.suppress(OSError):
        found = _read_tables(pid, [client for _, client, _ in looks])
        return [
            one[1] if one is not None and one[0] == inode else None
            for one, (*_, inode) in zip(found, looks, strict=True)
        ]
    return [None] * len(looks)


def in_a_new_thread(function: Callable[[], T]) -> T:
    """Return what ``function`` returns, or raise what it raises, in a thread of its own, which has ended by then.

    A thread's network namespace is its own, so wherever it ends up, nothing has to be put back.

    Raises:
        RuntimeError: no thread can be started.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="pgguard netns") as executor:
        return executor.submit(function).result()


def read_tables(pid: int, clients: Sequence[TcpClient]) -> list[int | None]:
    """Read the sockets of the network namespace of a process from ``/proc/PID/net``; in the order of ``clients``.

    The form of the tables is that of ``tcp4_seq_show`` in ``net/ipv4/tcp_ipv4.c`` and ``tcp6_seq_show`` in
    ``net/ipv6/tcp_ipv6.c``: line number, own address, peer's address, state, queues, timer, retransmissions, user,
    time-out, inode. A link-local address is compared without its interface, which they don't show.

    Raises:
        OSError: they can't be read, or the process is gone.
    """
    return [None if found is None else found[0] for found in _read_tables(pid, clients)]


def _read_tables(pid: int, clients: Sequence[TcpClient]) -> list[tuple[int, int] | None]:
    """As :func:`read_tables`; each inode with the number of bytes that lie unread in the socket."""
    # Who connects to a mapped address has an IPv6 socket, listed as such, for what is IPv4 on the wire.
    wanted: dict[bytes, int] = {}
    for n, client in enumerate(clients):
        address, guard_address = _unmapped(client.address), _unmapped(client.guard_address)
        wanted[_ends(address, client.port, guard_address, client.guard_port)] = n
        if len(address) == 4:
            wanted[_ends(_MAPPED + address, client.port, _MAPPED + guard_address, client.guard_port)] = n
    sockets: list[tuple[int, int] | None] = [None] * len(clients)
    for name in "tcp", "tcp6":
        with contextlib.suppress(FileNotFoundError), Path(f"/proc/{pid}/net/{name}").open("rb") as file:
            lines, _, _ = file.read(TABLE_LIMIT).rpartition(b"\n")  # the last one may be cut off
            for line in lines.splitlines()[1:]:
                fields = line.split(maxsplit=10)
                if len(fields) > 9 and (n := wanted.get(b"%b %b" % (fields[1], fields[2]), -1)) >= 0:
                    inode, unread = int(fields[9]), int(fields[4].partition(b":")[2], 16)
                    sockets[n] = (inode, unread) if inode else None
    Path(f"/proc/{pid}/net/tcp").stat()  # raises if the process has ended meanwhile, or before
    return sockets


def _ask_own(clients: Sequence[ClientSocket]) -> list[int | None]:
    try:
        with SockDiag() as diag:
            return [diag.client_inode(client) for client in clients]
    except OSError:
        return [None] * len(clients)


def _everywhere(client: TcpClient, ask: Callable[[TcpClient], int | None]) -> int | None:
    """Ask for a client in the calling thread's namespace, whose interfaces have other numbers than the guard's."""
    if not client.interface:
        return ask(client)
    found = {ask(client._replace(interface=index)) for index, _ in socket.if_nameindex()} - {None}
    return found.pop() if len(found) == 1 else None


def _enter(namespace: int) -> None:
    """Have the calling thread enter a network namespace: setns(2). Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)  # os.setns came with Python 3.12
    with raised(Right.CAP_SYS_ADMIN):
        if libc.setns(namespace, _CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


def _list_namespaces() -> dict[str, list[int]]:
    """List the network namespaces other than the guard's own, each with some processes, that of the youngest first."""
    # Not that of the calling thread, should that be elsewhere, but where the guard accepts connections.
    own = _namespace_of(os.getpid())
    namespaces: dict[str, list[int]] = {}
    for pid in sorted(list_processes(), reverse=True):
        namespace = _namespace_of(pid)
        if namespace is not None and namespace != own:
            members = namespaces.setdefault(namespace, [])
            if len(members) < _MEMBERS:
                members.append(pid)
    return namespaces


def _namespace_of(pid: int) -> str | None:
    """Return what identifies a process's network namespace; ``None`` if it is gone or can't be looked at."""
    try:
        return os.readlink(f"/proc/{pid}/ns/net")  # noqa: PTH115 - a Path for each process would double the time
    except OSError:
        return None


def _is_loopback(client: TcpClient) -> bool:
    """True if both ends of the connection are in one network namespace: a loopback interface leads nowhere else."""
    address = _unmapped(client.address)
    return address[0] == 127 if len(address) == 4 else address == bytes(15) + b"\1"


def _unmapped(address: bytes) -> bytes:
    return address.removeprefix(_MAPPED) if len(address) == 16 else address


def _ends(address: bytes, port: int, peer: bytes, peer_port: int) -> bytes:
    """Write both ends of a connection as the tables do."""
    return f"{_hexadecimal(address)}:{port:04X} {_hexadecimal(peer)}:{peer_port:04X}".encode()


def _hexadecimal(address: bytes) -> str:
    """Write an address as the tables do: each four bytes as a number in the machine's own byte order."""
    words = (int.from_bytes(address[n : n + 4], sys.byteorder) for n in range(0, len(address), 4))
    return "".join(f"{word:08X}" for word in words)
