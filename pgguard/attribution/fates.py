"""What has become of a process whose connection has ended: it lives, or how it ended as far as the kernel says that.

A process closes its files on its way out before it is anybody's zombie: ``do_exit()`` in ``kernel/exit.c`` calls
``exit_files()`` first and ``exit_notify()`` later. So whoever learns of an end from the socket is a moment early, and
has to wait; and when the parent has collected the exit status, nobody else can know it any more. In between the
status stands in ``/proc/PID/stat``, for those who may trace the process: proc_pid_stat(5), field 52.
"""

from __future__ import annotations

import os
import time
from enum import Enum
from typing import Final, NamedTuple

from pgguard.attribution.descriptors import find_sockets
from pgguard.attribution.holders import is_younger
from pgguard.attribution.processes import read_stat

_PF_EXITING: Final = 0x4
"""In field 9 of ``/proc/PID/stat``: ``include/linux/sched.h``."""
_PAUSE: Final = 0.001
"""Seconds between two looks."""


class State(Enum):
    """What has become of a process."""

    ALIVE = "it lives"
    EXITED = "it has called exit, or returned from its main function"
    KILLED = "a signal has ended it"
    ENDED = "it has ended, and whether by itself isn't known"


class Fate(NamedTuple):
    """What has become of a process, and of its end of the connection."""

    state: State
    code: int | None = None
    """The exit status of one that has exited, the number of the signal that has killed it."""
    has_socket: bool | None = None
    """Of one that lives, whether it has the socket open still; ``None`` if that can't be seen."""


def fate_of(
    pid: int, started: int | None, inode: int | None, *, opened: float | None = None, seconds: float
) -> Fate | None:
    """Find out what has become of a process whose connection has just ended.

    Args:
        pid: the process.
        started: as in :class:`pgguard.attribution.evidence.Process`; ``None`` if it was never looked at.
        inode: its socket's.
        opened: of a process that has opened the connection, when, in seconds of CLOCK_BOOTTIME.
        seconds: how long to wait for a process that lives, as it may be about to end.

    Returns:
        ``None`` if that can't be told.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            found = _look(pid, started, opened)
        except PermissionError:
            return None
        if found is not None and found.state is not State.ALIVE:
            return found
        if time.monotonic() >= deadline:
            return None if found is None else Fate(State.ALIVE, None, _has_socket(pid, inode))
        time.sleep(_PAUSE)


def _look(pid: int, started: int | None, opened: float | None) -> Fate | None:
    """One look; ``None`` while the process is ending. Raises PermissionError where ``/proc`` hides it."""
    stat = read_stat(pid)
    if stat is None:
        return Fate(State.ENDED)
    if (started is not None and stat.started != started) or (opened is not None and is_younger(stat.started, opened)):
        return Fate(State.ENDED)  # the pid is another's by now
    if stat.state in "ZXx":
        # Its other threads may live on without the first one.
        return _status(pid, stat.exit_status) if stat.threads <= 1 else Fate(State.ALIVE)
    return None if stat.flags & _PF_EXITING else Fate(State.ALIVE)


def _status(pid: int, status: int) -> Fate:
    """Decode a wait status, which the kernel shows as 0 to those who may not trace the process."""
    if status == 0 and not _may_trace(pid):
        return Fate(State.ENDED)
    if os.WIFSIGNALED(status):
        return Fate(State.KILLED, os.WTERMSIG(status))
    return Fate(State.EXITED, os.WEXITSTATUS(status))


def _may_trace(pid: int) -> bool:
    """Whether a zombie may be traced: its program, which is gone, is said to be gone only to those who may."""
    try:
        os.readlink(f"/proc/{pid}/exe")  # noqa: PTH115 - only the error matters
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _has_socket(pid: int, inode: int | None) -> bool | None:
    if inode is None:
        return None
    try:
        return bool(find_sockets(pid, {inode}))
    except PermissionError:
        return None
