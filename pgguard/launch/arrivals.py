"""Signals as they arrive: each with who has sent it, and none of them doing anything by itself.

They are blocked and read from a descriptor: signalfd(2). So their dispositions stay as they were, and a command that is
started meanwhile inherits those; and what has sent a signal is known, which a handler in Python isn't told.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

if TYPE_CHECKING:
    from typing import Self

_libc: Final = ctypes.CDLL(None, use_errno=True)
_CLOEXEC_NONBLOCK: Final = os.O_CLOEXEC | os.O_NONBLOCK
_RECORD: Final = struct.Struct("=IiiI112x")
"""``struct signalfd_siginfo``: number, errno, code, pid, and what isn't used here."""
_LONG: Final = 8 * ctypes.sizeof(ctypes.c_ulong)

LEFT: Final = frozenset(
    {
        *(signal.SIGKILL, signal.SIGSTOP),  # nobody can take these
        *(signal.SIGPIPE, signal.SIGXFSZ),  # Python ignores them: it raises OSError
        *(signal.SIGILL, signal.SIGTRAP, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGSEGV, signal.SIGSYS),
        signal.SIGXCPU,  # it has had the time that it may take, and so has the command
    }
)
TAKEN: Final = frozenset(signal.valid_signals()) - LEFT
"""Signals that are meant for the command, or tell about it."""
STOPS: Final = (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
"""Signals of a terminal that a process is stopped by."""
BY_KERNEL: Final = 0x80
"""``SI_KERNEL``: the code of what a terminal has sent, for one: sigaction(2)."""


class Arrival(NamedTuple):
    """A signal that has come."""

    number: int
    code: int
    """What has brought it: zero or less if a process has sent it, sigaction(2)."""
    pid: int
    """Who has sent it; 0 if that was the kernel, or a process of another pid namespace."""

    @property
    def is_sent(self) -> bool:
        """Whether a process has sent it."""
        return self.code <= 0


class Arrivals:
    """Takes signals while its context is open; in the only thread that there is, as every thread has a mask.

    Those that have come by the end are dropped.
    """

    def __init__(self) -> None:
        self._fd = -1
        self._came: deque[Arrival] = deque()
        self._before: set[int] = set()

    def __enter__(self) -> Self:
        self._before = set(signal.pthread_sigmask(signal.SIG_BLOCK, TAKEN))
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # of children whose end is ignored nobody learns how they ended
        longs = (ctypes.c_ulong * (1024 // _LONG))()
        for taken in TAKEN:
            longs[(taken - 1) // _LONG] |= 1 << (taken - 1) % _LONG
        self._fd = _libc.signalfd(-1, ctypes.byref(longs), _CLOEXEC_NONBLOCK)
        if self._fd < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return self

    def __exit__(self, *_: object) -> None:
        while self._read():
            self._came.clear()
        os.close(self._fd)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._before)

    async def wait(self) -> Arrival:
        """Wait for the next one; to be called in trio."""
        await trio.lowlevel.checkpoint()
        while not self._came:
            if not self._read():
                await trio.lowlevel.wait_readable(self._fd)
        return self._came.popleft()

    def forget(self, number: int) -> None:
        """Drop those of a number that have come so far, as the kernel makes one of those that come at once: signal(7).

        Real-time signals, which it keeps apart, stay.
        """
        if number < signal.SIGRTMIN:
            while self._read():
                pass
            self._came = deque(arrival for arrival in self._came if arrival.number != number)

    def forget_stops(self) -> None:
        """Drop those that a process is stopped by, as the kernel does when it is continued: signal(7), "SIGCONT"."""
        self._came = deque(arrival for arrival in self._came if arrival.number not in STOPS)

    def _read(self) -> bool:
        with suppress(BlockingIOError):
            self._came.extend(Arrival(*_fields(record)) for record in _RECORD.iter_unpack(os.read(self._fd, 4096)))
            return True
        return False


def _fields(record: tuple[int, ...]) -> tuple[int, int, int]:
    number, _, code, pid = record
    return number, code, pid


def is_ignored(number: int) -> bool:
    """Whether a signal does nothing to a program that hasn't said otherwise: pgguard was started so, as by nohup(1)."""
    return signal.getsignal(number) is signal.SIG_IGN


def stop_as_told(number: int) -> None:
    """Stop this process, as a terminal's job control does, until it is continued.

    Nothing happens where a terminal's stop signals do nothing: they are ignored, or no shell is there that could
    continue it (an orphaned process group).

    Args:
        number: One of :data:`STOPS`.
    """
    # Every other thread has it blocked, so that it has been delivered when kill() returns: kill(2), "Notes". If the
    # terminal's own is there still, that stops this process as it is unblocked, and another would do so once more.
    is_there = number in signal.sigpending()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    try:
        if not is_there:
            os.kill(os.getpid(), number)
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, {number})
