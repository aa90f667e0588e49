"""Whether a signal was sent to the guard alone, or to its whole process group, as a terminal does.

A process isn't told that, and what its command has got already must not be sent to it once more: a second Ctrl-C makes
many programs give up what they were about to put in order. So there is a process in the group that does nothing but
keep all signals pending. What is pending there as well was sent to the group.
"""

from __future__ import annotations

import gc
import os
import re
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from pgguard.launch.arrivals import STOPS
from pgguard.proxy.errors import ConfigurationError

if TYPE_CHECKING:
    from typing import Self

_PENDING: Final = re.compile(rb"^ShdPnd:\s*([0-9a-f]+)$", re.MULTILINE)
_PATIENCE: Final = 0.005
"""Seconds for a signal that the kernel hands to one process of a group after the other: ``__kill_pgrp_info()`` in
``kernel/signal.c``. It begins with the youngest, and so the guard is the last."""
_UNDONE_BY: Final[dict[int, tuple[signal.Signals, ...]]] = {
    signal.SIGCONT: STOPS,
    **dict.fromkeys(STOPS, (signal.SIGCONT,)),
}
"""What a signal is undone by wherever it is pending: ``prepare_signal()`` in ``kernel/signal.c``."""
_ALL: Final = 0
"""In the place of a signal's number."""
_CLEARING: Final = 0.5
"""Seconds for it to forget what is pending."""


class Companion:
    """That process; to be started before there is a second thread, and while nothing is open that must be closed.

    It ends with this process at the latest.

    Raises:
        ConfigurationError: The system has no room for it.
    """

    def __init__(self) -> None:
        try:
            asked, self._ask = os.pipe2(os.O_CLOEXEC)
            self._answered, answer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            self.pid = os.fork()
        except OSError as error:
            raise ConfigurationError(
                f"the system doesn't let pgguard start another process: {error.strerror}: raise the limit on processes "
                "(ulimit -u), or the cgroup's pids.max (TasksMax= in a systemd unit)"
            ) from error
        if self.pid == 0:
            try:
                gc.disable()
                _accompany(asked, answer)
            finally:
                os._exit(0)
        os.close(asked)
        os.close(answer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._ask)
        os.close(self._answered)

    async def has_got(self, number: int) -> bool | None:
        """Whether it has got a signal too since it was last asked, or one that undoes it, as SIGTSTP and SIGCONT do.

        ``None`` if that can't be seen.
        """
        try:
            if not self._is_pending(number):
                await trio.sleep(_PATIENCE)
            return self._is_pending(number)
        except OSError:
            return None
        finally:
            await self.forget(number)

    def _is_pending(self, number: int) -> bool:
        found = _PENDING.search(Path(f"/proc/{self.pid}/status").read_bytes())
        pending = 0 if found is None else int(found[1], 16)
        return any(pending >> (each - 1) & 1 for each in (number, *_UNDONE_BY.get(number, ())))

    async def forget(self, number: int = _ALL) -> None:
        """Have it forget that it has got a signal, once if it was several times; by default all that it has got."""
        try:
            os.write(self._ask, bytes([number]))
            with trio.move_on_after(_CLEARING):
                await trio.lowlevel.wait_readable(self._answered)
                os.read(self._answered, 16)
        except OSError:
            return


def _accompany(asked: int, answer: int) -> None:
    """Be it: forget what is pending whenever that is asked for, until nobody can ask any more."""
    everything = signal.valid_signals()
    signal.pthread_sigmask(signal.SIG_BLOCK, everything)
    # What it has open is somebody else's: a pipe's reader, for one, waits for it to be closed.
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    first, last = sorted((asked, answer))
    for low, high in ((3, first), (first + 1, last), (last + 1, os.sysconf("SC_OPEN_MAX"))):
        os.closerange(low, high)
    while asks := os.read(asked, 1):
        if asks[0] != _ALL:
            signal.sigtimedwait({asks[0]}, 0)
        else:
            while signal.sigtimedwait(everything, 0) is not None:
                pass
        os.write(answer, b".")
