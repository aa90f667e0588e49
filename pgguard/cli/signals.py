"""Signals that a command obeys by itself, in trio: all of them, and each as often as it has come.

:func:`trio.open_signal_receiver` makes one of equal signals that come before it is asked again, and so do Python's own
handlers as long as another thread has the interpreter. The C handler below them writes a byte for each:
:func:`signal.set_wakeup_fd`. What is left is the kernel, which keeps one of a kind that it has not delivered yet:
signal(7), "Queueing and delivery semantics for standard signals".
"""

from __future__ import annotations

import os
import signal
from collections import deque
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import trio

from pgguard.cli import entry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType
    from typing import Any, Self


class Signals:
    """Takes signals while its context is open, and so keeps them from ending the process; in the main thread alone.

    What has come before, since the process began, is taken first.

    Args:
        numbers: Which.
    """

    def __init__(self, *numbers: int) -> None:
        self._numbers = frozenset(numbers)
        self._handlers: dict[int, Any] = {}
        self._came: deque[int] = deque()
        self._reader = -1
        """The descriptor from which the numbers of those come that come in trio; -1 outside of it."""

    def __enter__(self) -> Self:
        for number in self._numbers:
            self._handlers[number] = signal.signal(number, self._note)
        self._came.extend(number for number in entry.early if number in self._numbers)
        entry.early.clear()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self._reader < 0:
            self._came.append(number)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Have :meth:`wait` wait; to be entered in trio."""
        reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            with self._held():
                before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
                self._reader = reader
            try:
                yield
            finally:
                with self._held():
                    signal.set_wakeup_fd(before)
                    self._reader = -1
        finally:
            os.close(reader)
            os.close(writer)

    async def wait(self) -> int:
        """Wait for the next one: its number."""
        await trio.lowlevel.checkpoint()
        while not self._came:
            await trio.lowlevel.wait_readable(self._reader)
            with suppress(BlockingIOError):
                self._came.extend(number for number in os.read(self._reader, 4096) if number in self._numbers)
        return self._came.popleft()

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Keep signals pending, so that one which comes meanwhile is counted once; Python's handlers have run then."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, self._numbers)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def name_of(number: int) -> str:
    """What a signal is called."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
