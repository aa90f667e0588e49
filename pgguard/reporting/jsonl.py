"""Faults as JSON Lines: one object a line, in the file before anything else happens to the session."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import time
from collections import deque
from typing import TYPE_CHECKING, Final

from pgguard.attribution.trust import UntrustedError
from pgguard.reporting.opening import open_for_appending
from pgguard.reporting.record import to_record
from pgguard.reporting.sinks import SinkError

if TYPE_CHECKING:
    from pathlib import Path

    from pgguard.faults.fault import Fault

BACKLOG: Final = 1 << 20
"""Bytes of lines that are kept while they can't be written, at most."""
_LOOK_INTERVAL: Final = 0.1
"""Seconds between two looks whether the file is still the one by its name."""


class JsonLines:
    """Appends each fault to a file with a single write(2), so that a crash of the guard loses none.

    O_APPEND makes writes to a regular file by several guards follow one another whole: write(2); and lets a file that
    is cut to nothing begin anew. A pipe or terminal, ``/dev/stdout`` among them, is written to without waiting.

    What can't be written now (the disk is full, nobody reads the pipe) is kept, up to :data:`BACKLOG` bytes, and
    written in order as soon as it can be; what doesn't fit is lost, and counted by whoever catches the errors. A line
    of which only a part could be written is completed before the next one begins, so there are no torn lines as long as
    the guard lives.

    When the file has been renamed or removed, as when logs are rotated, a new one is begun by its name. As long as that
    can't be, since its directory is gone or the guard may not create files in it, what follows goes into the renamed
    one, or is kept if there is none.

    Args:
        path: The file, which is created if it isn't there.
        owner: A user and a group, who get the file if it is created now: those that the guard is going to become.

    Raises:
        SinkError: It can't be opened for appending; the message says why.
    """

    def __init__(self, path: Path, *, owner: tuple[int, int] | None = None) -> None:
        self._path = path
        self._backlog: deque[bytes] = deque()
        self._kept = 0
        """Bytes in it."""
        self._torn = 0
        """Bytes of its first line that have been written."""
        self._moved = False
        """What has been written to is no longer the file by that name, and that can't be opened."""
        self._looked = time.monotonic()
        self._fd = self._open(owner)

    def __str__(self) -> str:
        return str(self._path)

    def record(self, fault: Fault) -> None:
        """Append a fault.

        Raises:
            SinkError: It could not be written, not even its beginning; the error says whether it has been kept.
        """
        line = encode(fault)
        error = self._attempt(line)
        if error is None or not self._backlog:
            return
        if self._backlog[-1] is line and self._torn and len(self._backlog) == 1:
            return  # its rest follows before the next one
        if self._kept <= BACKLOG or len(self._backlog) == 1:
            raise self._failure(error, lost=0) from error
        self._kept -= len(self._backlog.pop())
        raise self._failure(error, lost=1) from error

    def tend(self) -> None:
        """Write what could not be written, and see whether the file is still the one by its name.

        To be called about once a second, so that nothing waits for the next fault. It never raises: what goes wrong,
        the next fault is told of.
        """
        self._attempt(None)

    def reopen(self) -> None:
        """Open the file by its name anew, whatever has become of the one that is open.

        Raises:
            SinkError: It can't be opened; what was open stays so.
        """
        self._exchange(self._open())

    def move(self, path: Path) -> None:
        """Append to another file from now on.

        Raises:
            SinkError: It can't be opened; what was open stays so.
        """
        before, self._path = self._path, path
        try:
            self.reopen()
        except SinkError:
            self._path = before
            raise

    def close(self) -> None:
        """Write what could not be written, and close the file.

        Raises:
            SinkError: Some of it can't be.
        """
        error = self._attempt(None)
        os.close(self._fd)
        if error is not None and self._backlog:
            raise self._failure(error, lost=len(self._backlog)) from error

    def _attempt(self, line: bytes | None) -> OSError | None:
        """Write what waits, and a line behind it; returns what has kept that from being done whole."""
        if line is not None:
            self._backlog.append(line)
            self._kept += len(line)
        try:
            self._look_after()
            while self._backlog:
                first = self._backlog[0]
                self._torn += os.write(self._fd, first[self._torn :] if self._torn else first)
                if self._torn == len(first):
                    self._drop_first()
        except OSError as error:
            return error
        return None

    def _drop_first(self) -> None:
        self._kept -= len(self._backlog.popleft())
        self._torn = 0

    def _look_after(self) -> None:
        """Begin a new file if the old one isn't by its name any more; raises OSError if it can't be begun."""
        now = time.monotonic()
        if not self._moved and now - self._looked < _LOOK_INTERVAL:
            return
        self._looked = now
        self._moved = not self._is_by_its_name()
        if self._moved:
            try:
                self._exchange(self._open())
            except SinkError as error:
                if not os.fstat(self._fd).st_nlink:
                    raise OSError(str(error)) from error

    def _is_by_its_name(self) -> bool:
        facts = os.fstat(self._fd)
        if not stat.S_ISREG(facts.st_mode):
            return True
        try:
            return os.path.samestat(facts, self._path.stat())
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True  # it isn't known: it can't be looked at, for one

    def _exchange(self, fd: int) -> None:
        if self._torn:
            # Its line is completed where it was begun; if that can't be, it is written anew.
            with contextlib.suppress(OSError):
                self._torn += os.write(self._fd, self._backlog[0][self._torn :])
            if self._torn == len(self._backlog[0]):
                self._drop_first()
            self._torn = 0
        os.close(self._fd)
        self._fd = fd
        self._moved = False
        self._looked = time.monotonic()

    def _open(self, owner: tuple[int, int] | None = None) -> int:
        try:
            return open_for_appending(self._path, owner=owner)
        except UntrustedError as error:
            raise SinkError(f"can't append faults to {self._path}: {error}") from error
        except OSError as error:
            raise SinkError(f"can't append faults to {self._path}: {_why(self._path, error)}") from error

    def _failure(self, error: OSError, *, lost: int) -> SinkError:
        if isinstance(error.__cause__, SinkError):
            return SinkError(str(error.__cause__), lost=lost)
        return SinkError(f"can't append faults to {self._path}: {_reason(error)}", lost=lost)


def encode(fault: Fault) -> bytes:
    """A fault as one line of JSON, with its line feed.

    What isn't printable is escaped by its number: control characters and separators, of which readers take some for the
    end of a line, and what reorders or hides the text beside it on a screen. Lone surrogates, which stand for bytes of
    names that aren't UTF-8, are too.
    """
    text = json.dumps(to_record(fault), ensure_ascii=False, separators=(",", ":"))
    if not text.isprintable():
        text = "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)
    return text.encode() + b"\n"


def _why(path: Path, error: OSError) -> str:
    if error.errno == errno.ENXIO:
        try:
            fifo = stat.S_ISFIFO(path.stat().st_mode)
        except OSError:
            fifo = False
        return "no process has this FIFO open for reading" if fifo else "it is a socket: name a file"
    return _reason(error)


def _reason(error: OSError) -> str:
    return str(error) if error.errno is None else os.strerror(error.errno)
