"""Reads that somebody else can make hang, and what keeps them from taking the guard's threads, one after the other.

What the kernel answers out of its own memory (``/proc/PID/stat``, ``fd``, ``syscall``, sock_diag(7)) comes at once. But
some of what is looked at is under the control of the process that is looked at:

- its memory, for the command line, the mapped files and the sets of descriptors that it polls: a page may have to come
  from a file system first, and whoever changes the memory's layout has it locked meanwhile;
- its program and its working directory, which may be in a file system that takes its time, or never answers: see
  :mod:`pgguard.attribution.scout`;
- an epoll set, which is locked while one of its members is asked, by whatever that is.

No time limit ends such a read. So each is announced here, for as long as it takes: :class:`reading`. Where one takes
longer than :data:`PATIENCE` nobody else looks at that process any more until it has ended, nor, when there are several
of them, at any process of that user. That is refused as a TimeoutError, as if the read had been tried and had failed.
Who waits for a thread that hangs is told so, and goes on without its answer: :func:`hanging`.
"""

from __future__ import annotations

import errno
import math
import subprocess
import threading
import time
from pathlib import Path
from typing import Self

PATIENCE = 0.5
"""Seconds after which a read hangs. It takes microseconds, or milliseconds of a disk, but a thread may lie idle on a
busy machine in the middle of it."""
_EACH = 3
"""Reads of one user's processes that may hang before none of them is looked at any more."""
_ALL = 16
"""Reads that may hang before only the guard's own user's processes, and root's, are looked at."""

_END = 0.1
"""Seconds in which a child ends that is killed, if it can."""

_left: dict[subprocess.Popen[bytes], None] = {}
"""Children that have been killed and have not ended."""
_reads: dict[object, tuple[int, float]] = {}
"""By the thread that reads, or by what else does, the process that it reads about, and since when."""


class reading:  # noqa: N801 - a context manager, read as a phrase
    """Announces a read about a process: a context manager. Costs a microsecond.

    Raises:
        TimeoutError: it isn't to be tried, as others hang.
    """

    __slots__ = ("_before", "_pid")

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._before: tuple[int, float] | None = None

    def __enter__(self) -> Self:
        now = time.monotonic()
        if _reads:
            check(self._pid)
        thread = threading.get_ident()
        self._before = _reads.get(thread)
        _reads[thread] = self._pid, now
        return self

    def __exit__(self, *exc: object) -> None:
        if self._before is None:
            _reads.pop(threading.get_ident(), None)
        else:
            _reads[threading.get_ident()] = self._before


def check(pid: int) -> None:
    """Raises TimeoutError: a process isn't to be looked at, as others hang that have begun to, or look at its likes."""
    _collect()
    if _is_refused(pid, time.monotonic()):
        raise TimeoutError(errno.ETIMEDOUT, "reading the files of its user's processes in /proc hangs")


def leave(child: subprocess.Popen[bytes], pid: int) -> None:
    """End a child that reads about a process, without waiting for it if that hangs: then it ends when it doesn't."""
    child.kill()
    try:
        child.wait(_END)
    except subprocess.TimeoutExpired:
        _left[child] = None
        _reads[child] = pid, -math.inf


def _collect() -> None:
    """Forget the children that have ended by now."""
    for child in list(_left):
        if child.poll() is not None:
            _left.pop(child, None)
            _reads.pop(child, None)


def hanging() -> dict[object, int]:
    """What hangs at this moment, threads by threading.get_ident(), each with the pid that it reads about."""
    _collect()
    now = time.monotonic()
    return {reader: pid for reader, (pid, since) in list(_reads.items()) if now - since > PATIENCE}


def _is_refused(pid: int, now: float) -> bool:
    own = threading.get_ident()
    hung = {one for reader, (one, since) in list(_reads.items()) if now - since > PATIENCE and reader != own}
    if not hung:
        return False
    if pid in hung:
        return True
    user = _user_of(pid)
    if len(hung) >= _ALL:
        return user not in {0, _user_of("self")}
    return user is not None and sum(_user_of(one) == user for one in hung) >= _EACH


def _user_of(pid: int | str) -> int | None:
    """The real user of a process; ``None`` if it is gone. It doesn't depend on whether it is dumpable."""
    try:
        for line in Path(f"/proc/{pid}/status").read_bytes().splitlines():
            if line.startswith(b"Uid:"):
                return int(line.split()[1])
    except OSError:
        pass
    return None
