"""The kernel tells of every process that is forked, as it is: its proc connector, so that nobody has to look for them.

A netlink socket gets an event for each fork before the child has run: ``proc_fork_connector()`` in
``drivers/connector/cn_proc.c``, called by ``copy_process()`` in ``kernel/fork.c``. So whoever has something from the
child, and reads the events then, knows of it. The event names the parent, which ``/proc`` doesn't any more when that
has ended; but for ``CLONE_PARENT``, see clone(2), where it names the parent of both.

**What it takes**: a kernel with CONFIG_PROC_EVENTS; the host's own network, pid and user namespaces, as pids are given
as those there; CAP_NET_ADMIN, before Linux 6.6, when it is opened and never again.

**What it costs**: the kernel makes an event of each fork, of a process or a thread, and of whatever else befalls one. A
socket filter leaves only new processes (and this process's own threads, by which it is tried whether it works), so that
nothing else comes as far as here: 2 µs for each. More than there is room for in the socket are lost, which is told; and
so what a host costs that forks thousands of times a second is bounded.

**What goes wrong with it**: for two months in 2024 a kernel that had nobody to give an event to took that for there
being no listener, and fell silent (``c46bfba1337d``, reverted; in stable versions too), and before Linux 6.6 somebody
else's leaving may silence it as well. No event tells that. Whoever relies on this has to look, now and then, whether
there are processes that it hasn't told of.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import socket
import struct
import threading
import time
from pathlib import Path
from typing import Final, NamedTuple, Self

_NETLINK_CONNECTOR: Final = 11
"""``linux/netlink.h``."""
_CN_IDX_PROC: Final = 1
_CN_VAL_PROC: Final = 1
"""``linux/connector.h``."""
_LISTEN: Final = 1
"""``PROC_CN_MCAST_LISTEN``, ``linux/cn_proc.h``."""
_FORK: Final = 1
"""``PROC_EVENT_FORK``, likewise."""

_HEADER: Final = struct.Struct("=IHHII")
"""``struct nlmsghdr``: length, type, flags, sequence number, port; netlink(7)."""
_NLMSG_DONE: Final = 3
_MESSAGE: Final = struct.Struct("=IIIIHH")
"""``struct cn_msg``: index and value of who it concerns, sequence and acknowledgement number, length, flags."""
_OPERATION: Final = struct.Struct("=I")
_WHAT: Final = _HEADER.size + _MESSAGE.size
"""Where ``struct proc_event`` begins: what has happened, on which processor, when, and to whom."""
_EVENT: Final = struct.Struct("=IIQIIII")
_CHILD: Final = _WHAT + 24
_CHILD_PROCESS: Final = _WHAT + 28
"""Where the child's thread and its process stand in it."""

_SO_ATTACH_FILTER: Final = 26
_SO_RCVBUFFORCE: Final = 33
"""``asm-generic/socket.h``."""
_INSTRUCTION: Final = struct.Struct("=HBBI")
"""``struct sock_filter``, ``linux/filter.h``: operation, jumps if so and if not, operand."""
_LOAD, _TO_INDEX, _IF_EQUAL, _IF_EQUAL_INDEX, _RETURN = 0x20, 0x07, 0x15, 0x1D, 0x06

_BUFFER: Final = 512 * 1024
"""Bytes of the socket's buffer, which the kernel doubles: for some 1300 events."""
_SECONDS: Final = 0.5
"""For the event of a thread that has been started; it is there before the thread runs."""

_INITIAL_NAMESPACES: Final = {"pid": 0xEFFFFFFC, "user": 0xEFFFFFFD}
"""The inodes of those that the kernel boots with: ``linux/proc_ns.h``."""

_CONFIGURATION: Final = "run a kernel that is built with CONFIG_PROC_EVENTS"


class ForksUnavailable(Exception):
    """The kernel doesn't tell of forks here.

    Args:
        problem: what is wrong, a clause.
        remedy: the one thing to do about it, an imperative.
    """

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}; {remedy}")
        self.problem = problem
        self.remedy = remedy


class Fork(NamedTuple):
    """A new process."""

    pid: int
    parent: int
    """The pid of the process that has forked it."""
    at: float
    """When, in seconds of time.monotonic()."""


class ForkEvents:
    """Tells which processes have been forked since it was made; a context manager. Not to be shared between threads.

    Raises:
        ForksUnavailable: the kernel doesn't tell, which has been tried for real.
    """

    def __init__(self) -> None:
        for kind, inode in _INITIAL_NAMESPACES.items():
            with contextlib.suppress(OSError):
                if Path(f"/proc/self/ns/{kind}").stat().st_ino != inode:
                    raise ForksUnavailable(
                        f"the guard isn't in the host's own {kind} namespace, where the kernel tells of new processes",
                        f"run the guard in the host's {kind} namespace",
                    )
        try:
            self._socket = socket.socket(
                socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, _NETLINK_CONNECTOR
            )
        except OSError as error:
            raise ForksUnavailable(error.strerror or str(error), _CONFIGURATION) from error
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        try:
            self._listen()
            self._try()
        except OSError as error:
            self.close()
            raise _unavailable(error) from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Be told of nothing more."""
        self._socket.close()

    def are_there(self) -> bool:
        """Whether there is something to take. Takes a microsecond; for one thread, whichever takes it."""
        return bool(self._poll.poll(0))

    def take(self) -> tuple[list[Fork], bool]:
        """Take what has come: each new process, the first first; and whether others have been lost before them."""
        forks: list[Fork] = []
        lost = False
        receive = self._socket.recv
        while True:
            try:
                event = receive(_WHAT + 128)
            except BlockingIOError:
                return forks, lost
            except OSError as error:
                if self._socket.fileno() < 0:  # it has been closed
                    return forks, lost
                if error.errno != errno.ENOBUFS:
                    raise
                lost = True
                continue
            if len(event) < _WHAT + _EVENT.size:
                continue
            what, _, at, _, parent, tid, pid = _EVENT.unpack_from(event, _WHAT)
            if what == _FORK and tid == pid:
                forks.append(Fork(pid, parent, at / 1e9))

    def _listen(self) -> None:
        """Raises OSError."""
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
        except PermissionError:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        program = ctypes.create_string_buffer(_filter())
        size = (len(program) - 1) // _INSTRUCTION.size
        self._socket.setsockopt(
            socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", size, ctypes.addressof(program))
        )
        self._socket.bind((0, _CN_IDX_PROC))
        operation = _MESSAGE.pack(_CN_IDX_PROC, _CN_VAL_PROC, 0, 0, _OPERATION.size, 0) + _OPERATION.pack(_LISTEN)
        self._socket.send(_HEADER.pack(_HEADER.size + len(operation), _NLMSG_DONE, 0, 0, 0) + operation)

    def _try(self) -> None:
        """Start a thread, and see whether it is told of. Raises ForksUnavailable."""
        thread = threading.Thread(target=int)
        thread.start()
        thread.join()
        deadline = time.monotonic() + _SECONDS
        while self._poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            with contextlib.suppress(OSError):
                event = self._socket.recv(_WHAT + 128)
                if len(event) >= _WHAT + _EVENT.size:
                    what, _, _, _, _, tid, pid = _EVENT.unpack_from(event, _WHAT)
                    if (what, tid, pid) == (_FORK, thread.native_id, os.getpid()):
                        return
        raise ForksUnavailable("the kernel tells of no thread that is started", _CONFIGURATION)


def _filter() -> bytes:
    """A program that lets events of new processes through, and of this process's new threads: bpf(4), ``sk_filter()``.

    Numbers are loaded as those of a network are, whose first byte is the highest.
    """
    instructions = (
        (_LOAD, 0, 0, _WHAT),
        (_IF_EQUAL, 0, 6, socket.htonl(_FORK)),
        (_LOAD, 0, 0, _CHILD),
        (_TO_INDEX, 0, 0, 0),
        (_LOAD, 0, 0, _CHILD_PROCESS),
        (_IF_EQUAL_INDEX, 1, 0, 0),
        (_IF_EQUAL, 0, 1, socket.htonl(os.getpid())),
        (_RETURN, 0, 0, 0xFFFFFFFF),
        (_RETURN, 0, 0, 0),
    )
    return b"".join(_INSTRUCTION.pack(*one) for one in instructions)


def _unavailable(error: OSError) -> ForksUnavailable:
    match error.errno:
        case errno.EPERM | errno.EACCES:
            problem = "the kernel doesn't permit it, as Linux before 6.6 doesn't without CAP_NET_ADMIN"
            return ForksUnavailable(problem, "give the guard CAP_NET_ADMIN, or run Linux 6.6 or later")
        case errno.ECONNREFUSED:
            problem = "the guard isn't in the host's own network namespace, where the kernel tells of new processes"
            return ForksUnavailable(problem, "run the guard in the host's network namespace")
        case _:
            return ForksUnavailable(error.strerror or str(error), _CONFIGURATION)
