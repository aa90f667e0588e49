"""Standard streams that can't be written to: full disks, readers that have gone, descriptors that are closed."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_PATIENCE: Final = 1000
"""Milliseconds for which standard error may take nothing."""


class OutputError(Exception):
    """Standard output can't be written to; the message says why.

    Args:
        error: What write(2) has answered.
    """

    def __init__(self, error: OSError) -> None:
        super().__init__(error.strerror or str(error))
        self.nobody_reads = error.errno == errno.EPIPE


class _Output(io.FileIO):
    """Standard output, whose failures can be told from those of everything else."""

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            while (written := super().write(data)) is None:
                _wait(self.fileno())
        except OSError as error:
            raise OutputError(error) from error
        return written


class _Errors(io.FileIO):
    """Standard error. Nobody can be told what it doesn't take, and nobody is to fail for that."""

    def write(self, data: ReadableBuffer, /) -> int:
        with contextlib.suppress(OSError):
            if (written := super().write(data)) is None and _wait(self.fileno(), _PATIENCE):
                written = super().write(data)
            if written is not None:
                return written
        return memoryview(data).nbytes


def _wait(fd: int, milliseconds: int | None = None) -> bool:
    """Wait until a descriptor can be written to that whoever shares it has made non-blocking."""
    ready = select.poll()
    ready.register(fd, select.POLLOUT)
    return bool(ready.poll(milliseconds))


def open_missing() -> None:
    """Open the standard streams that are closed: their numbers must not become a socket's.

    Nothing comes from standard input then, writing to standard output fails as it would have, and what is said on
    standard error is lost.
    """
    for fd, flags in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            with contextlib.suppress(OSError):
                os.set_inheritable(os.open(os.devnull, flags), True)  # the lowest number that is free


def watch() -> None:
    """Have standard output raise :class:`OutputError` where it can't be written to, and standard error nothing.

    A character that the terminal's encoding doesn't have is printed as a question mark.
    """
    sys.stdout = _text(_Output(1, "wb", closefd=False), sys.stdout, "replace")
    sys.stderr = _text(_Errors(2, "wb", closefd=False), sys.stderr, "backslashreplace")


def _text(raw: io.FileIO, before: object, errors: str) -> io.TextIOWrapper:
    if not isinstance(before, io.TextIOWrapper):  # it is None where the stream was closed
        return io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", errors, line_buffering=True)
    # In the locale C Python only has an answer for what was no text when it was read.
    errors = errors if before.errors in ("strict", "surrogateescape") else before.errors or errors
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        before.encoding,
        errors,
        line_buffering=before.line_buffering,
        write_through=before.write_through,
    )


def drop_output() -> None:
    """Let what standard output hasn't taken go nowhere, so that nothing fails again as the process ends."""
    with contextlib.suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.close(null)
