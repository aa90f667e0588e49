"""Asks Ruby processes what their threads do, through named pipes in a directory that is closed to other users.

Each Ruby process that has loaded ``pgguard_ruby_stacks.rb`` has a pipe there, which is called by its pid namespace and
its pid in that. A question names a pipe that the answer is to be written to. Both are opened without waiting, and
whatever comes is data from a program that somebody else may control: so much at most, and of the types that are
expected.

Only the guard's user and root can reach the directory. So whoever answers is one of that user's processes. That it is
the one with that pid is as certain as what processes say about themselves is; who sends on a connection never depends
on it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pgguard.attribution.dumps import Dump, NoDump, Seen
from pgguard.attribution.frames import Frame
from pgguard.attribution.ruby.frames import told_apart

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from pgguard.attribution.evidence import Process

NOT_ASKED: Final = "Ruby's stacks are read if pgguard run --ruby-stacks starts the program"
"""Why there is none of a Ruby process where none is asked for them."""
SILENT: Final = (
    "it can't be asked: only CRuby 3.1 or later can, if it runs as the user and with the RUBYOPT that pgguard run has "
    "started it with"
)
"""Why there is none of one that hasn't loaded the file."""

_ANSWER_LIMIT: Final = 1 << 21
"""Bytes: twice what the Ruby file allows itself, but for its last thread."""
_HEAD: Final = 16
"""Bytes, more than the length of an answer takes."""
_PIECE: Final = 65536
_THREADS: Final = 64
"""Threads that are named in one question; for more than these, all are asked for."""
_FRAMES: Final = 512
_TEXT: Final = 1024
"""Bytes of a name."""
_NEW: Final = 60.0
"""Seconds for which a pipe that nobody has open is left alone: somebody may be about to open it."""
_OPEN: Final = os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
_OWN_NAMESPACE: Final = "/proc/self/ns/pid"
_NAMESPACE_IDS: Final = re.compile(rb"^NSpid:(?:\t\d+)*\t(\d+)$", re.MULTILINE)
"""In ``/proc/PID/task/TID/status``, the thread's id in its own pid namespace: proc_pid_status(5)."""


class RubyPipes:
    """The directory in which Ruby processes can be asked: made by :meth:`open`. Thread-safe."""

    def __init__(self) -> None:
        self._directory: Path | None = None

    @property
    def directory(self) -> Path:
        """Where it is."""
        if self._directory is None:
            raise RuntimeError("it has not been made")
        return self._directory

    def open(self) -> None:
        """Make the directory, as the user that the guard is from now on. Raises OSError."""
        self._directory = Path(tempfile.mkdtemp(prefix="pgguard-ruby-")).absolute()

    def close(self) -> None:
        """Remove it with all that is in it. The processes find that out, and stop waiting for questions."""
        if self._directory is not None:
            for _ in range(2):  # a process may start, and put its pipe there, meanwhile
                shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def can_ask(self, process: Process) -> bool:
        """Whether a process waits for questions."""
        try:
            os.close(self._open_questions(process))
        except NoDump:
            return False
        return True

    def ask(self, process: Process, tids: Collection[int] = ()) -> Question:
        """Ask a process what these of its threads do, or all of them; returns at once. Raises NoDump."""
        questions = self._open_questions(process)
        try:
            return Question(self._reached(), questions, process, tids)
        except OSError as error:
            raise NoDump(f"it can't be asked: {error.strerror}") from None
        finally:
            os.close(questions)

    def sweep(self) -> None:
        """Remove the pipes of processes that have ended without doing so. Raises OSError."""
        directory = self._directory
        if directory is None:
            return
        with os.scandir(directory) as entries:
            for entry in entries:
                if time.time() - entry.stat(follow_symlinks=False).st_mtime >= _NEW and _is_abandoned(entry.path):
                    with contextlib.suppress(FileNotFoundError):
                        Path(entry.path).unlink()

    def _reached(self) -> Path:
        """The directory, for a thread that nobody waits for any more when it is closed. Raises NoDump."""
        directory = self._directory
        if directory is None:
            raise NoDump(SILENT)
        return directory

    def _open_questions(self, process: Process) -> int:
        try:
            descriptor = os.open(self._reached() / _name_of(process), os.O_WRONLY | _OPEN)
        except OSError:
            raise NoDump(SILENT) from None
        if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise NoDump(SILENT)
        return descriptor


class Question(Dump):
    """A question that a process has been asked.

    Args:
        directory: where the pipe for the answer is made.
        questions: what the question is written to; not closed.
        process: who is asked.
        tids: the threads, in the guard's own pid namespace; none: all.

    Raises:
        OSError: it can't be asked.
    """

    def __init__(self, directory: Path, questions: int, process: Process, tids: Collection[int]) -> None:
        self._process = process
        self._answer = bytearray()
        self._has_hung_up = False
        self._path = directory / f"answer-{secrets.token_hex(8)}"
        self._ids = _inner_ids(process)
        os.mkfifo(self._path, 0o600)
        try:
            self._pipe = os.open(self._path, os.O_RDONLY | _OPEN)
        except OSError:
            self._path.unlink()
            raise
        inner = [self._ids.get(tid, tid) for tid in tids] if len(tids) <= _THREADS else []
        try:
            os.write(questions, " ".join([self._path.name, *map(str, inner)]).encode() + b"\n")
        except OSError:
            self.end()
            raise

    @property
    def pipes(self) -> Collection[int]:
        """The pipe that the answer comes through."""
        return [self._pipe] if self._pipe >= 0 else []

    @property
    def is_over(self) -> bool:
        """Whether all of the answer is there, or too much, or no more can come."""
        if self._has_hung_up or len(self._answer) > _ANSWER_LIMIT:
            return True
        head, newline, _ = self._answer[:_HEAD].partition(b"\n")
        if not newline:
            return len(head) == _HEAD
        return not head.isdigit() or len(self._answer) > len(head) + int(head)

    def hear(self, pipe: int) -> None:
        """Take what there is."""
        while len(self._answer) <= _ANSWER_LIMIT:
            try:
                data = os.read(pipe, _PIECE)
            except BlockingIOError:
                return
            if not data:
                self._has_hung_up = True  # nothing is to be heard before somebody has opened it
                return
            self._answer += data

    def result(self) -> Mapping[int, Seen]:
        """What it has answered."""
        if len(self._answer) > _ANSWER_LIMIT:
            raise NoDump("its stacks are too large")
        head, _, body = bytes(self._answer).partition(b"\n")
        outer = {inner: tid for tid, inner in self._ids.items()}
        try:
            return {outer.get(tid, tid): seen for tid, seen in _threads(head, body).items()}
        except (ValueError, StopIteration):
            raise NoDump("its answer can't be read") from None

    def end(self) -> float:
        """Wait for no answer any more. What the process has taken to answer isn't known, some hundred microseconds."""
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1
            with contextlib.suppress(OSError):
                self._path.unlink()
        return 0.0


def _threads(head: bytes, body: bytes) -> dict[int, Seen]:
    """The threads of an answer, as ``describe`` in the Ruby file writes them. Raises ValueError, StopIteration."""
    if len(body) != _number(head):
        raise ValueError("another length than was announced")
    found = {}
    fields = iter(body.split(b"\0")) if body else iter(())
    for first in fields:
        tid, name, calls = _number(first), _text(next(fields)), _number(next(fields))
        if calls > _FRAMES:
            raise ValueError("too many")
        frames = [Frame(_text(next(fields)), _text(next(fields)), _number(next(fields))) for _ in range(calls)]
        if frames:
            found[tid] = Seen(told_apart(frames), name or None)
    return found


def _number(field: bytes) -> int:
    if not field.isdigit() or len(field) > 9:
        raise ValueError("no number")
    return int(field)


def _text(field: bytes) -> str:
    return field[:_TEXT].decode(errors="replace")


def _name_of(process: Process) -> str:
    """What a process calls its pipe."""
    try:
        link = os.readlink(f"/proc/{process.pid}/ns/pid")  # noqa: PTH115 - as in processes.py
    except OSError:
        link = str(Path(_OWN_NAMESPACE).readlink())
    namespace = "".join(filter(str.isdigit, link))
    return f"{namespace}-{process.pid if process.namespace_pid is None else process.namespace_pid}"


def _inner_ids(process: Process) -> dict[int, int]:
    """By tid, what the threads of a process in another pid namespace are called there; empty for all others."""
    ids: dict[int, int] = {}
    if process.namespace_pid is not None:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{process.pid}/task").iterdir():
                found = _NAMESPACE_IDS.search((task / "status").read_bytes())
                if found is not None:
                    ids[int(task.name)] = int(found[1])
    return ids


def _is_abandoned(path: str) -> bool:
    """Whether nobody has a pipe open to read from it."""
    try:
        os.close(os.open(path, os.O_WRONLY | _OPEN))
    except OSError as error:
        return error.errno == errno.ENXIO
    return False
