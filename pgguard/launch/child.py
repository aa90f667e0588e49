"""The command: a child that has everything as pgguard had it, and what becomes of it.

It stays in pgguard's process group, and keeps its standard streams and its terminal: so it can read from the terminal,
and Ctrl-C, Ctrl-Z and a terminal that is closed reach it as if pgguard weren't there.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import shutil
import signal
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from pgguard.launch.arrivals import STOPS
from pgguard.launch.statuses import NOT_EXECUTABLE, NOT_FOUND
from pgguard.proxy.scheduling import ordinary_slices

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pgguard.launch.inheritance import Inheritance

NOT_KNOWN: Final = 255
"""Exit status for one that nobody was told."""
_SHELL: Final = "/bin/sh"
_CHANGED_BY_PYTHON: Final = (signal.SIGPIPE, signal.SIGXFSZ)
"""Signals that Python ignores for itself, and a program expects not to be."""

logger = logging.getLogger(__name__)


class NotStarted(Exception):
    """The command can't be run; the message says why, in one line.

    Args:
        message: That line.
        status: The exit status for it.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def look_for(name: str) -> None:
    """See whether a command is there, as execvp(3) looks for it; what it may have to say later is another matter.

    Raises:
        NotStarted: It isn't, or it isn't a program.
    """
    places = [""] if "/" in name else os.get_exec_path()
    found = [Path(place, name) for place in places if name]
    there = [path for path in found if os.access(path, os.F_OK)]
    if not there:
        raise NotStarted(f"{name}: {os.strerror(errno.ENOENT)}", NOT_FOUND)
    if not any(path.is_file() and os.access(path, os.X_OK) for path in there):
        raise NotStarted(f"{name}: {os.strerror(errno.EACCES)}", NOT_EXECUTABLE)


class Ended(NamedTuple):
    """How the command has ended."""

    status: int
    """As a shell has it: its own, or 128 and the number of the signal that has ended it."""
    signal: int | None

    def __str__(self) -> str:
        if self.signal is None:
            return f"exit status {self.status}"
        try:
            return signal.Signals(self.signal).name
        except ValueError:
            return f"signal {self.signal}"


class Child:
    """The command, as it runs.

    Args:
        command: Its name or path, and its arguments.
        environment: Its environment.
        inheritance: What else it is to have.

    Raises:
        NotStarted: It can't be run.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], inheritance: Inheritance) -> None:
        self.name = command[0]
        try:
            self.pid = _spawned(command, environment, inheritance)
        except OSError as error:
            status = NOT_FOUND if error.errno == errno.ENOENT else NOT_EXECUTABLE
            raise NotStarted(f"{command[0]}: {error.strerror}", status) from error
        self.ended: Ended | None = None

    def look(self) -> Ended | None:
        """How it has ended; ``None`` while it runs. Until :meth:`forget` it goes on to be known to the kernel."""
        if self.ended is None:
            try:
                found = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                # It was forgotten as it ended, before _spawned() was over.
                logger.error("%s has ended, and it isn't known with which exit status: SIGCHLD is ignored", self.name)  # noqa: TRY400 - nothing is wrong here
                self.ended = Ended(NOT_KNOWN, None)
                return self.ended
            if found is not None:
                exited = found.si_code == os.CLD_EXITED
                self.ended = Ended(
                    found.si_status if exited else 128 + found.si_status, None if exited else found.si_status
                )
        return self.ended

    def stopped_by_terminal(self) -> int | None:
        """The signal of a terminal that has stopped it since this was last asked.

        One that was stopped by SIGSTOP hasn't been by a terminal: what stops it means to continue it, and the processes
        that it has started go on meanwhile.
        """
        found = os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOHANG)
        return None if found is None or found.si_status not in STOPS else found.si_status

    def is_stopped(self) -> bool:
        """Whether it is stopped now, and isn't just continued."""
        with suppress(OSError):
            return Path(f"/proc/{self.pid}/stat").read_bytes().rpartition(b") ")[2][:1] == b"T"
        return True

    @property
    def is_in_our_group(self) -> bool:
        """Whether what is sent to pgguard's process group is sent to it too."""
        with suppress(OSError):
            return os.getpgid(self.pid) == os.getpgrp()
        return False

    def send(self, number: int) -> None:
        """Send it a signal, if it is there."""
        # Its pid is no other process's before it has been forgotten.
        with suppress(OSError):
            os.kill(self.pid, number)

    def forget(self) -> None:
        """Let the kernel forget it, when it has ended."""
        if self.look() is not None:
            with suppress(ChildProcessError):
                os.waitpid(self.pid, 0)


def _spawned(command: Sequence[str], environment: Mapping[str, str], inheritance: Inheritance) -> int:
    """Start a command as execvp(3) does. Raises OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (inheritance.open_files, hard))
    if inheritance.ignores_children:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        try:
            return _spawn(command[0], command, environment, inheritance)
        except OSError as error:
            if error.errno != errno.ENOEXEC:
                raise
            # A script that doesn't say what is to run it.
            path = command[0] if "/" in command[0] else shutil.which(command[0]) or command[0]
            return _spawn(_SHELL, [_SHELL, path, *command[1:]], environment, inheritance)
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _spawn(file: str, command: Sequence[str], environment: Mapping[str, str], inheritance: Inheritance) -> int:
    with ordinary_slices():
        return os.posix_spawnp(
            file,
            list(command),
            environment,
            file_actions=[(os.POSIX_SPAWN_CLOSE, fd) for fd in inheritance.closed],
            setsigmask=inheritance.mask,
            setsigdef=_CHANGED_BY_PYTHON,
        )
