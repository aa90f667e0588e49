"""What pgguard was started with, and what a command that it starts is to have as well. It imports nothing slow.

A process inherits far more than its environment: fork(2), execve(2). Whatever pgguard, or Python, has changed of it for
itself is noted here before that, so that the command finds everything as it would have without a guard.
"""

from __future__ import annotations

import os
import resource
import signal
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

STANDARD_STREAMS: Final = (0, 1, 2)
_COERCED: Final = "LC_CTYPE"
"""Set by Python itself where the locale is C: PEP 538."""


class Inheritance(NamedTuple):
    """What a command is to have that pgguard starts."""

    environment: dict[str, str]
    closed: frozenset[int]
    """The standard streams that are closed."""
    open_files: int
    """The soft limit on open files."""
    mask: frozenset[int]
    """The signals that are blocked."""
    ignores_children: bool = False
    """SIGCHLD is ignored, which pgguard can't have: it would never know how the command has ended, waitpid(2)."""


_noted: list[Inheritance] = []


def note() -> None:
    """Take note of it; to be called before anything is changed."""
    _noted[:] = [_taken()]


def noted() -> Inheritance:
    """What has been taken note of; if nothing has, what there is now."""
    return _noted[0] if _noted else _taken()


def _taken() -> Inheritance:
    return Inheritance(
        environment=_environment(),
        closed=frozenset(fd for fd in STANDARD_STREAMS if not _is_open(fd)),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        mask=frozenset(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        ignores_children=signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN,
    )


def _environment() -> dict[str, str]:
    environment = dict(os.environ)
    if _COERCED in environment:
        with suppress(OSError):
            # What the process was started with, whatever it has set since: proc_pid_environ(5).
            begun = Path("/proc/self/environ").read_bytes().split(b"\0")
            values = [entry.partition(b"=")[2] for entry in begun if entry.startswith(f"{_COERCED}=".encode())]
            if values:
                environment[_COERCED] = os.fsdecode(values[0])
            elif any(begun):
                del environment[_COERCED]
    return environment


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
