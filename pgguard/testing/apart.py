"""A guard in a process of its own, as the tests' process sees it.

It is asked over a socket of which no other process has the tests' end: what a test forks closes it at once, and what it
starts doesn't get it. It ends when the tests' process does, however that ends: until then connections may be open that
are closed as the interpreter ends.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from pgguard.testing.wire import Answer, Question, encode

if TYPE_CHECKING:
    from pathlib import Path
    from typing import IO

_libc: Final = ctypes.CDLL(None)
_PR_SET_PTRACER: Final = 0x59616D61
"""``linux/prctl.h``; "Yama" in the kernel's documentation of security modules."""
_START: Final = 60.0
"""Seconds for the guard's process to start, and to put a guard in front of a server."""
_GRACE: Final = 20.0
"""Seconds for an answer, beyond those that it may take: the machine may be busy with something else."""
_END: Final = 10.0
"""Seconds for it to end."""
_PIECE: Final = 1 << 16
_FORKS: Final = 1024
"""Forks between two questions of which it is known when they were: the latest."""
_LAST_WORDS: Final = 2000
"""Characters of what it has said before it ended, the last ones."""


class GuardLostError(Exception):
    """The guard's process has ended, or doesn't answer any more; the message is a sentence that says so."""


class GuardApart:
    """That process, started. It may be asked by any thread of the tests' process, and by no other process.

    Args:
        leftovers: A file for what it couldn't tell if the tests' process ends without a word; ``None``: none.
    """

    def __init__(self, leftovers: Path | None = None) -> None:
        self._lock = threading.Lock()
        self._output: IO[bytes] = tempfile.TemporaryFile(prefix="pgguard-")  # noqa: SIM115 - closed with it
        self._sock, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "pgguard.testing.process", str(theirs.fileno()), str(os.getpid())]
            command.append("" if leftovers is None else str(leftovers))
            self._process = subprocess.Popen(  # noqa: S603 - our own program
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self.pid = self._process.pid
        self._owner = os.getpid()
        self._rest = b""
        allow_looking(self.pid)
        self._forks: deque[float] = deque(maxlen=_FORKS)
        """When this process has forked since it was last asked, in seconds since the epoch."""
        os.register_at_fork(before=self._note_fork, after_in_child=self._let_go)
        # Whatever is registered after this is done before it.
        atexit.register(self.close)

    @property
    def is_ours(self) -> bool:
        """Whether this is the tests' process, and not one that has been forked from it."""
        return os.getpid() == self._owner

    def ask(self, question: Question) -> Answer:
        """Ask it something.

        Raises:
            GuardLostError: There is no answer.
        """
        if not self.is_ours:
            raise GuardLostError("only the process that runs the tests can ask the guard, and none forked from it")
        with self._lock:
            return self._asked(question)

    def close(self) -> None:
        """End it; nothing happens if that has been done, or in another process than the tests'."""
        if not self.is_ours:
            return
        self._sock.close()
        try:
            self._process.wait(_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._output.close()

    def _asked(self, question: Question) -> Answer:
        seconds = (_START if question["do"] == "front" else _GRACE) + question.get("seconds", 0.0)
        deadline = time.monotonic() + seconds
        try:
            self._sock.settimeout(seconds)
            self._sock.sendall(encode({**question, "forks": self._taken_forks()}))
            while b"\n" not in self._rest:
                self._sock.settimeout(max(0.001, deadline - time.monotonic()))
                piece = self._sock.recv(_PIECE)
                if not piece:
                    raise self._lost()
                self._rest += piece
        except TimeoutError:
            raise GuardLostError(f"the guard's process (pid {self.pid}) hasn't answered for {seconds:g} s") from None
        except OSError:
            raise self._lost() from None
        line, _, self._rest = self._rest.partition(b"\n")
        answer: Answer = json.loads(line)
        return answer

    def _lost(self) -> GuardLostError:
        status: int | None = None
        with suppress(subprocess.TimeoutExpired):
            status = self._process.wait(1.0)
        how = "" if status is None else f" by signal {-status}" if status < 0 else f" with status {status}"
        last = ""
        with suppress(OSError, ValueError):
            self._output.seek(0)
            last = self._output.read().decode(errors="replace").strip()[-_LAST_WORDS:]
        return GuardLostError(f"the guard's process (pid {self.pid}) has ended{how}{': ' if last else ''}{last}")

    def _note_fork(self) -> None:
        if self.is_ours:
            self._forks.append(time.time())

    def _taken_forks(self) -> list[float]:
        forks = []
        while self._forks:  # other threads may fork meanwhile
            forks.append(self._forks.popleft())
        return forks

    def _let_go(self) -> None:
        """In a process that has been forked: leave the guard alone, but let it look at this one too."""
        if self._sock.fileno() >= 0:
            self._sock.close()
            allow_looking(self.pid)


def allow_looking(pid: int) -> None:
    """Let a process look at the threads of this one, which isn't its child, where the kernel restricts that.

    That is where Yama's ``ptrace_scope`` is 1. It doesn't hold for a process that this one forks.
    """
    _libc.prctl(_PR_SET_PTRACER, pid, 0, 0, 0)
