"""Where ``pgguard`` begins. It imports nothing that takes time before it is ready for signals and for odd streams.

By default a signal ends a process silently, and SIGINT ends Python with a traceback of whatever it was importing.
Here it ends the process as it would any other program until a command is there that has something to put in order:
:func:`unwinding` and :mod:`pgguard.cli.signals` are for those. A guard takes note of the signals that are not meant to
end it from the very beginning.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from pgguard.cli import streams
from pgguard.launch import inheritance
from pgguard.reporting.width import tidy_environment

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)
"""Signals that a guard ends at."""
_LEFT: Final = frozenset(
    {
        *(signal.SIGKILL, signal.SIGSTOP),  # nobody can take these
        *(signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGCONT),  # a shell's job control
        *(signal.SIGCHLD, signal.SIGURG, signal.SIGWINCH),  # end nothing
        *(signal.SIGPIPE, signal.SIGXFSZ),  # Python ignores them: it raises OSError
        *(signal.SIGILL, signal.SIGTRAP, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGSEGV, signal.SIGSYS),
        signal.SIGXCPU,  # it has had the time that it may take
    }
)
UNUSED: Final = tuple(sorted(signal.valid_signals() - _LEFT - {*ENDING, signal.SIGHUP}))
"""Signals that mean nothing to it, and that would end it by default: signal(7), "Standard signals"."""

_WITH_A_GUARD: Final = ("serve", "run")

early: Final[list[int]] = []
"""Those that a guard has been sent before it could obey them."""


def main() -> None:
    """Run the command line, and end the process with its exit status."""
    inheritance.note()
    command = _command()
    _begin(serving=command == "serve")
    streams.open_missing()
    streams.watch()
    tidy_environment()
    with importing():
        from pgguard.cli.main import main as run  # noqa: PLC0415 - it takes a quarter of a second

    try:
        run()
    finally:
        if command in _WITH_A_GUARD:
            # It has done what it was told to, and ends with the status that it has.
            for number in (*ENDING, signal.SIGHUP, *UNUSED):
                signal.signal(number, signal.SIG_IGN)
        # What there is goes with the process. Python would look through it for garbage first, for a tenth of a second.
        gc.freeze()


@contextmanager
def importing() -> Iterator[None]:
    """Look for no garbage meanwhile: what modules make lasts, and to go through it again and again takes a while."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _command() -> str | None:
    return next((word for word in sys.argv[1:] if not word.startswith("-")), None)


def _begin(*, serving: bool) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)
    if serving:
        for number in (signal.SIGHUP, *UNUSED):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _note)


def _end(number: int, _frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    # The first process of a container isn't ended by a signal that it sends itself: pid_namespaces(7).
    os._exit(128 + number)


def _note(number: int, _frame: FrameType | None) -> None:
    early.append(number)


@contextmanager
def unwinding() -> Iterator[None]:
    """Have SIGINT, SIGTERM and SIGHUP raise an exception, so that what the context has begun is put in order.

    Raises:
        KeyboardInterrupt: At SIGINT.
        SystemExit: At the others, with 128 and the signal's number.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else _raise)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _raise(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
