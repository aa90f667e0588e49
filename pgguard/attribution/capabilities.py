"""What attribution this host allows, found out by trying it on ourselves."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass

from pgguard.attribution.descriptors import find_sockets, link_to, list_processes
from pgguard.attribution.processes import read_process
from pgguard.attribution.sockets import SockDiag, client_socket


@dataclass(frozen=True, slots=True)
class Capability:
    """One thing that attribution needs, and whether it can be had."""

    name: str
    available: bool
    essential: bool
    """Without it, no client of one kind of socket at least can be found."""
    explanation: str
    """What it is for; where it isn't available, what is wrong and what to do about it. A clause, for after a colon."""


def check() -> tuple[Capability, ...]:
    """Try everything that attribution needs from this host. Takes some milliseconds.

    What is found holds for the calling process: it depends on its user, capabilities, namespaces and sandbox.
    """
    netlink = "allow AF_NETLINK sockets in the guard's sandbox, or load the kernel module"
    return (
        _check("/proc", _try_proc, "names processes", "mount the /proc of the guard's own pid namespace"),
        _check("sock_diag for TCP", _try_tcp, "finds a client's TCP socket", f"{netlink} tcp_diag"),
        _check("sock_diag for Unix sockets", _try_unix, "finds a client's Unix socket", f"{netlink} unix_diag"),
        _check_other_users(),
    )


def _check(name: str, attempt: Callable[[], bool], purpose: str, remedy: str) -> Capability:
    try:
        available = attempt()
        complaint = "does not find what is certainly there"
    except OSError as error:
        available = False
        complaint = error.strerror or str(error)
    return Capability(name, available, True, purpose if available else f"{complaint}; {remedy}")


def _try_proc() -> bool:
    with socket.socket() as probe:
        inode = os.fstat(probe.fileno()).st_ino
        found = find_sockets(os.getpid(), {link_to(inode): inode})
        return inode in found and read_process(os.getpid()) is not None


def _try_tcp() -> bool:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return _try_connection(listener, socket.create_connection(listener.getsockname(), timeout=1))


def _try_unix() -> bool:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind("")  # an abstract address of the kernel's choice: unix(7), autobind
        listener.listen(1)
        client.connect(listener.getsockname())
        return _try_connection(listener, client)


def _try_connection(listener: socket.socket, client: socket.socket) -> bool:
    listener.settimeout(1)
    with client, listener.accept()[0] as accepted, SockDiag() as diag:
        return diag.client_inode(client_socket(accepted)) == os.fstat(client.fileno()).st_ino


def _check_other_users() -> Capability:
    name = "other users' processes"
    pids = list_processes()
    unreadable = sum(not _readable(pid) for pid in pids)
    # Every pid namespace has a process 1, and nobody but root may look at it under hidepid: proc(5).
    if 1 not in pids:
        return Capability(
            name,
            False,
            False,
            "/proc hides them (hidepid), so that nobody can be shown to be alone with a connection; run the guard as "
            "root, or with the group that /proc is mounted with (gid=)",
        )
    if unreadable:
        return Capability(
            name,
            False,
            False,
            f"{unreadable} can't be looked at; unless every client runs as the guard's user, run the guard as root "
            "with CAP_SYS_PTRACE",
        )
    return Capability(name, True, False, "finds clients of any user")


def _readable(pid: int) -> bool:
    try:
        find_sockets(pid, {})
    except PermissionError:
        return False
    return True
