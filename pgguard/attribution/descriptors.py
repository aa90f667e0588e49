"""Which processes there are, and which sockets one of them has open: ``/proc`` and ``/proc/PID/fd``.

``fd`` is a directory of the process's user's, and root too takes CAP_DAC_READ_SEARCH to enter that of another one. What
it shows is also in ``/proc/PID/fdinfo``, a file for each descriptor, which is for everybody who may trace the process:
``proc_fdinfo_permission()`` in ``fs/proc/fd.c``, since Linux 5.14. It takes three times as long, and is for whoever has
CAP_SYS_PTRACE alone.
"""
# ruff: noqa: PTH115, PTH123, PTH208 - a Path object for each descriptor would double the time that a walk takes

from __future__ import annotations

import errno
import functools
import os
import re
import socket
from collections.abc import Callable, Collection

from pgguard.attribution.hangs import reading
from pgguard.attribution.processes import read_stat

_DESCRIPTORS = 65_536
"""Of one process that are looked at. Those of most have a limit of 1024; a process can have a million open, to take the
guard's time."""


_LIMIT = 256
"""Bytes of what is said of a descriptor, at most: what is looked for stands at the beginning."""
_SOCKET = "socket:["
"""What the link of a descriptor begins with that is a socket, before its inode: proc_pid_fd(5)."""
_DETAILS = re.compile(rb"^mnt_id:\t(\d+)\nino:\t(\d+)$", re.MULTILINE)
"""In ``/proc/PID/fdinfo/FD``: the mount of the file's file system, and its inode. proc_pid_fdinfo(5)."""
_link: Callable[[str], str] = os.readlink
_SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


def is_shortage(error: OSError) -> bool:
    """Whether something can't be looked at now for lack of descriptors or memory: whatever is there is still there."""
    return error.errno in _SHORTAGES


def list_processes() -> dict[int, int]:
    """List the pids of all processes, each with the inode of its directory in ``/proc``.

    The kernel makes that up when it first lists the process, and drops it with the process, so that another inode
    means that the pid has been reused: ``proc_fill_cache`` and ``proc_flush_pid`` in ``fs/proc/base.c``. (It may also
    change under memory pressure.) It costs no system call, as reading the start time would.

    Empty where ``/proc`` can't be read.

    Raises:
        OSError: it can't be read now: see :func:`is_shortage`.
    """
    try:
        with os.scandir("/proc") as entries:
            return {int(entry.name): entry.inode() for entry in entries if entry.name.isdigit()}
    except OSError as error:
        if is_shortage(error):
            raise
        return {}


def list_children(pid: int) -> list[int]:
    """List the children of a process, zombies among them; empty if that can't be seen, or it is gone.

    The kernel lists them by the thread that forked them: ``/proc/PID/task/TID/children``, proc_tid_children(5).
    """
    children: list[int] = []
    try:
        for tid in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{tid}/children", "rb") as file:
                children += map(int, file.read().split())
    except OSError:
        pass
    return children


def is_fork(pid: int, other: int) -> bool:
    """Whether one process is a fork of the other, or both are of a third, and none has executed a program since.

    They run the same file then, and it is mapped at the same address, which execve(2) chooses at random:
    ``randomize_va_space``, proc_sys_kernel(5). False too if that can't be seen, as of a zombie.
    """
    try:
        return _image(pid) == _image(other)
    except OSError:
        return False


def _image(pid: int) -> tuple[bytes, str]:
    """Where a process's program is mapped, with the file's device and inode, and what it is called. Raises OSError.

    The file itself isn't touched: it may be in a file system that never answers.
    """
    with reading(pid), open(f"/proc/{pid}/maps", "rb") as file:
        return file.readline(), os.readlink(f"/proc/{pid}/exe")


def find_sockets(pid: int, inodes: Collection[int]) -> dict[int, int]:
    """Look for sockets among the descriptors of a process.

    Args:
        pid: the process; one that is gone, or has no files by its nature, has none of the sockets.
        inodes: the inodes to look for, in a set or dict.

    Returns:
        By inode, one descriptor for each of the sockets that the process has open.

    Raises:
        PermissionError: the process may have sockets open, but it can't be looked at; or it has more descriptors than
            are looked at, and not all of the sockets are among the latest.
        OSError: it can't be looked at now: see :func:`is_shortage`.
    """
    found = {}
    directory, name_of = f"/proc/{pid}/fd", _link
    try:
        try:
            fds = os.listdir(directory)
        except PermissionError:
            directory, name_of = f"/proc/{pid}/fdinfo", _name_by_details
            fds = os.listdir(directory)
        # A connection that is asked about is most often the latest, and descriptors are listed in ascending order.
        for fd in reversed(fds[-_DESCRIPTORS:]):
            try:
                link = name_of(f"{directory}/{fd}")
            except FileNotFoundError:
                continue
            # The length of _SOCKET, written out: what begins so is told from other links faster than by startswith().
            if link[:8] == _SOCKET and (inode := int(link[8:-1])) in inodes:
                found[inode] = int(fd)
            # With nothing to look for one link is read all the same: root without CAP_SYS_PTRACE may list, not read.
            if len(found) == len(inodes):
                break
    except (FileNotFoundError, ProcessLookupError):
        return {}
    except PermissionError:
        stat = read_stat(pid)
        if stat is None or stat.holds_no_files:
            return {}
        raise
    if len(fds) > _DESCRIPTORS and len(found) < len(inodes):
        raise PermissionError(errno.E2BIG, "it has too many open files to look at")
    return found


def has_socket(pid: int, fd: int, inode: int) -> bool:
    """See whether a descriptor is the socket, at this very moment; False too if that can't be seen.

    It takes no descriptor of the guard's own.
    """
    try:
        return _link(f"/proc/{pid}/fd/{fd}") == link_to(inode)
    except PermissionError:
        pass
    except OSError:
        return False
    try:
        return _name_by_details(f"/proc/{pid}/fdinfo/{fd}") == link_to(inode)
    except OSError:
        return False


def _name_by_details(path: str) -> str:
    """The same of a socket, by ``/proc/PID/fdinfo/FD``; empty for anything else.

    Raises:
        PermissionError: it isn't shown, or the kernel is older than Linux 5.14.
        OSError: there is no such descriptor.
    """
    with open(path, "rb") as file:
        found = _DETAILS.search(file.read(_LIMIT))
    if found is None:
        raise PermissionError(errno.EPERM, "the kernel doesn't tell inodes here")
    return link_to(int(found[2])) if int(found[1]) == _mount_of_sockets() else ""


@functools.cache
def _mount_of_sockets() -> int:
    """The number of the mount that all sockets are in, of the whole system: ``sock_mnt`` in ``net/socket.c``."""
    with socket.socket(socket.AF_UNIX) as any_socket, open(f"/proc/self/fdinfo/{any_socket.fileno()}", "rb") as file:
        found = _DETAILS.search(file.read(_LIMIT))
    return int(found[1]) if found is not None else -1


def link_to(inode: int) -> str:
    """Return what the link of a descriptor says that is this socket: proc_pid_fd(5)."""
    return f"{_SOCKET}{inode}]"
