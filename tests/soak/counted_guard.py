"""``pgguard``, with its trio tasks counted: how many there are stands in a file that the soak reads.

Everything else is what users run.
"""

from __future__ import annotations

import functools
import mmap
import os
import struct
from pathlib import Path

import trio

from pgguard.cli.main import main

SIZE = 8
"""Bytes of the count."""
VARIABLE = "SOAK_TASKS"
"""Names the file, in the environment."""


class Tasks(trio.abc.Instrument):
    """Counts the tasks that there are."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(SIZE))
        with path.open("r+b") as file:
            self._shared = mmap.mmap(file.fileno(), SIZE)
        self._count = 0

    def task_spawned(self, task: trio.lowlevel.Task) -> None:  # noqa: ARG002 - trio's interface
        self._count += 1
        self._shared[:SIZE] = struct.pack("q", self._count)

    def task_exited(self, task: trio.lowlevel.Task) -> None:  # noqa: ARG002 - trio's interface
        self._count -= 1
        self._shared[:SIZE] = struct.pack("q", self._count)


if __name__ == "__main__":
    tasks = Tasks(Path(os.environ[VARIABLE]))
    setattr(trio, "run", functools.partial(trio.run, instruments=[tasks]))  # noqa: B010 - its type is another
    main()
