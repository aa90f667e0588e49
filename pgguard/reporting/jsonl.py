"""Faults as JSON Lines: one object a line, in the file before anything else happens to the session."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from typing import TYPE_CHECKING

from pgguard.reporting.sinks import SinkError

if TYPE_CHECKING:
    from pathlib import Path

    from pgguard.faults.fault import Fault

_MODE = 0o640
"""Of a new file: its records name users, databases and SQL."""


class JsonLines:
    """Appends each fault to a file with a single write(2), so that a crash of the guard loses none.

    O_APPEND makes writes to a regular file by several guards follow one another whole: write(2). A pipe or terminal,
    ``/dev/stdout`` among them, is written to without waiting; what doesn't fit when nobody reads is lost, and
    counted by whoever catches the error. A line of which only a part could be written is completed before the next one
    begins, so there are no torn lines as long as the guard lives.

    Args:
        path: The file, which is created if it isn't there.

    Raises:
        SinkError: It can't be opened for appending; the message says why.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rest = b""
        try:
            # O_NONBLOCK: a FIFO that nobody reads is an error (ENXIO) and not a guard that hangs, open(2).
            self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, _MODE)
        except OSError as error:
            raise SinkError(f"can't append faults to {path}: {_why(path, error)}") from error

    def record(self, fault: Fault) -> None:
        """Append a fault.

        Raises:
            SinkError: It could not be written, not even its beginning.
        """
        line = encode(fault)
        try:
            self._complete()
            written = os.write(self._fd, line)
        except OSError as error:
            raise self._failure(error) from error
        self._rest = line[written:]
        # What doesn't fit now is completed before the next line.
        with contextlib.suppress(OSError):
            self._complete()

    def close(self) -> None:
        """Complete the last line, and close the file.

        Raises:
            SinkError: The last line stays torn.
        """
        try:
            self._complete()
        except OSError as error:
            raise self._failure(error) from error
        finally:
            os.close(self._fd)

    def _complete(self) -> None:
        while self._rest:
            self._rest = self._rest[os.write(self._fd, self._rest) :]

    def _failure(self, error: OSError) -> SinkError:
        return SinkError(f"can't append faults to {self._path}: {_reason(error)}")


def encode(fault: Fault) -> bytes:
    """A fault as one line of JSON in UTF-8, with its line feed."""
    text = json.dumps(fault.to_record(), ensure_ascii=False, separators=(",", ":"))
    # Names of processes can hold bytes that aren't UTF-8: lone surrogates, which UTF-8 can't encode.
    return text.encode("utf-8", "replace") + b"\n"


def _why(path: Path, error: OSError) -> str:
    if error.errno == errno.ENXIO:
        try:
            fifo = stat.S_ISFIFO(path.stat().st_mode)
        except OSError:
            fifo = False
        return "no process has this FIFO open for reading" if fifo else "it is a socket; give a file"
    return _reason(error)


def _reason(error: OSError) -> str:
    return str(error) if error.errno is None else os.strerror(error.errno)
