"""Other people's file systems are looked into by a process of its own, which can be left where it is.

A process's program and working directory may be in a file system that another process runs (FUSE). If that one doesn't
answer, whoever has asked can't go on, nor be ended with SIGKILL: ``request_wait_answer()`` in ``fs/fuse/dev.c``. Were
it a thread of the guard, the guard could never end either, and would keep its sockets. So nothing that is in a client's
file system is opened, or even looked up, in the guard: a child does it, which has none of the guard's descriptors,
takes one question at a time, and is replaced when it doesn't answer.

What comes out of it is small and plain: names of modules, a piece of text. What makes it so, the parsing of files that
anybody can have written, happens there too.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from pgguard.attribution import hangs
from pgguard.attribution.gobinary import go_modules
from pgguard.attribution.trust import open_regular

_SECONDS = 1.0
"""For which an answer is waited for. It takes a fifth of a millisecond, or what a disk takes."""
_START_SECONDS = 5.0
"""For which it is waited until a child has started, which takes a tenth of a second of the processor's time."""
_TEXT_LIMIT = 1 << 18
"""Bytes of a text."""
_ANSWER_LIMIT = 1 << 21
"""Bytes of an answer, more than there can be."""

_SCRIPT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from pgguard.attribution.scout import serve; serve()"
)


class Findings(NamedTuple):
    """What there is of what was asked for; nothing that can't be read is there."""

    modules: frozenset[str] | None = None
    """Those that the process's program was linked from; ``None`` if Go hasn't built it, or that wasn't asked."""
    files: frozenset[str] = frozenset()
    """Names of regular files."""
    text: str = ""
    """The beginning of a file."""


def look_into(pid: int, *, modules: bool = False, files: Sequence[str] = (), text: str | None = None) -> Findings:
    """Look at a process's program, or into its working directory. For worker threads; one at a time.

    Args:
        pid: the process.
        modules: whether to see which Go modules its program was linked from.
        files: names, relative to its working directory, of which it is told which are regular files.
        text: the name of a file there to read the beginning of, if the process's user may read it.

    Raises:
        OSError: nobody can be sent to look; TimeoutError if looking hangs, or isn't tried as others hang.
    """
    return _scouts.ask(pid, {"pid": pid, "modules": modules, "files": list(files), "text": text})


class _Scout:
    """One child. Raises OSError: it can't be started."""

    def __init__(self) -> None:
        path = [str(Path(entry).absolute()) for entry in sys.path]
        self._socket, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = subprocess.Popen(  # noqa: S603 - our own script
                    [sys.executable, "-I", "-S", "-c", _SCRIPT, json.dumps(path)],
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                )
        except BaseException:
            self._socket.close()
            raise
        try:
            self._receive(_START_SECONDS)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, question: dict[str, object]) -> Any:
        """Raises OSError: it has ended; TimeoutError: it doesn't answer; ValueError: the answer isn't one."""
        self._socket.sendall(json.dumps(question).encode() + b"\n")
        return json.loads(self._receive(_SECONDS))

    def _receive(self, seconds: float) -> bytes:
        deadline = time.monotonic() + seconds
        received = bytearray()
        while not received.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(errno.ETIMEDOUT, "looking at it hangs")
            self._socket.settimeout(left)
            data = self._socket.recv(65536)
            received += data
            if not data or len(received) > _ANSWER_LIMIT:
                raise OSError(errno.EIO, "the helper process that looks at it has ended")
        return bytes(received)

    def leave(self, pid: int) -> None:
        """Let it go: it ends at once, or when what it waits for, about a process, answers or goes away itself."""
        self._socket.close()
        hangs.leave(self._process, pid)

    def close(self) -> None:
        """End it, while it does nothing."""
        self._socket.close()
        self._process.kill()
        self._process.wait()


class _Scouts:
    """The child that is there now. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._scout: _Scout | None = None

    def ask(self, pid: int, question: dict[str, object]) -> Findings:
        with self._lock:
            hangs.check(pid)
            if self._scout is None:
                self._scout = _Scout()
            scout = self._scout
            try:
                answer = scout.ask(question)
            except (OSError, ValueError) as error:
                self._scout = None
                scout.leave(pid)
                if isinstance(error, OSError):
                    raise
                raise OSError(errno.EIO, "the answer of the helper process can't be read") from error
        modules = answer["modules"]
        return Findings(None if modules is None else frozenset(modules), frozenset(answer["files"]), answer["text"])

    def start(self) -> None:
        """Have a child ready, if one can be started."""
        with self._lock, contextlib.suppress(OSError):
            if self._scout is None:
                self._scout = _Scout()

    @property
    def pid(self) -> int | None:
        scout = self._scout
        return None if scout is None else scout.pid

    def close(self) -> None:
        with self._lock:
            scout, self._scout = self._scout, None
            if scout is not None:
                scout.close()


_scouts = _Scouts()
atexit.register(_scouts.close)


def start() -> None:
    """Have a child ready for the first question, with the rights that the guard has now. Raises nothing."""
    _scouts.start()


def pid() -> int | None:
    """The child's pid; ``None`` if there is none just now."""
    return _scouts.pid


def close() -> None:
    """End the child; the next question starts another one."""
    _scouts.close()


def serve(questions: TextIO | None = None, answers: TextIO | None = None) -> None:
    """Be the child: answer questions until there are no more."""
    questions, answers = questions or sys.stdin, answers or sys.stdout
    print(file=answers, flush=True)
    for line in questions:
        print(json.dumps(_answer(json.loads(line))), file=answers, flush=True)


def _answer(question: dict[str, Any]) -> dict[str, object]:
    process = Path(f"/proc/{question['pid']}")
    directory = process / "cwd"
    modules = go_modules(process / "exe") if question["modules"] else None
    return {
        "modules": None if modules is None else sorted(modules),
        "files": [name for name in question["files"] if _is_file(directory / name)],
        "text": "" if question["text"] is None else _text(directory / question["text"], process),
    }


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def _text(path: Path, process: Path) -> str:
    """The beginning of a regular file that a process's user may read; empty if it is none, or can't be read."""
    try:
        with os.fdopen(open_regular(path, reader=process.stat().st_uid), "rb") as file:
            return file.read(_TEXT_LIMIT).decode(errors="replace")
    except OSError:
        return ""
