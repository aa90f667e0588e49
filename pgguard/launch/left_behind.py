"""Processes that the command has left behind: those that go on when it has ended, daemons for one.

A process whose parent has ended becomes the child of the next of its ancestors that has asked for it, and else of init:
``PR_SET_CHILD_SUBREAPER`` in prctl(2). pgguard asks for it. So it goes on to be an ancestor of whatever the command has
started, which gives it the right to look at their threads where ptrace is restricted to that (Yama's ``ptrace_scope``),
and knows whether anything of it still runs. What a process can tell is that its ``getppid()`` is pgguard's pid, where
otherwise it would be 1, or a service manager's.
"""

from __future__ import annotations

import ctypes
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from pgguard.attribution import scout

_PR_SET_CHILD_SUBREAPER: Final = 36
_REAPED_AFTER: Final = 5.0
"""Seconds for which a child is a zombie before it is reaped here: whoever has started it, be it a part of the guard,
looks at its exit status long before. Meanwhile the guard can see how a client has ended."""


class LeftBehind:
    """Those processes.

    To be made before the command is started: what is a child of this process by then is no part of it. From then on
    this process takes on all that have lost their parents among its descendants.
    """

    def __init__(self) -> None:
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._own = frozenset(_children())
        self._zombies: dict[int, float] = {}
        """By pid, when a child was first seen to be one."""

    def running(self, command: int) -> list[int]:
        """The pids of those that run; of a whole tree of them its root. The command is none of them."""
        kept = {*self._own, command, scout.pid()}
        return [pid for pid in _children() if pid not in kept and not _is_zombie(pid)]

    def reap(self, command: int) -> None:
        """Let go of those that have ended some time ago; to be called now and then."""
        now = time.monotonic()
        zombies = {pid: self._zombies.get(pid, now) for pid in _children() if pid != command and _is_zombie(pid)}
        for pid, since in zombies.items():
            if now - since >= _REAPED_AFTER:
                with suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
        self._zombies = zombies


def _children() -> list[int]:
    """The children of this process, in the order in which it got them; none where the kernel doesn't list them."""
    found: list[int] = []
    # Each of its threads has its own: proc_pid_task(5) says "children" under proc_tid_children(5).
    for task in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):
            found += map(int, task.read_bytes().split())
    return found


def _is_zombie(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return True
    return stat.rpartition(b") ")[2][:1] in b"ZX"
