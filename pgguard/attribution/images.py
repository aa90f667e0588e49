"""What a process runs, read once from ``/proc/PID``: for telling its driver and its runtime.

Only files that name what is running are read: the mapped files, the program and the command line. Never the
environment, where secrets are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pgguard.attribution.hangs import reading

_DELETED = " (deleted)"
"""What the kernel appends to the path of a file that an upgrade has replaced: proc_pid_exe(5)."""

_CMDLINE_LIMIT = 4096
"""Bytes of a command line that are looked at."""
_MAPS_LIMIT = 1 << 24
"""Bytes of ``/proc/PID/maps`` that are read: 65,530 mappings, the most that there usually are, have a few millions. A
process that maps files with long names can make it 270 millions."""
_PATHS_LIMIT = 1 << 18
"""Bytes that the names of different files may take: those of large applications take 60,000. All patterns are searched
for in them, and nothing else of the guard's runs meanwhile."""


@dataclass(frozen=True, slots=True)
class Image:
    """What a process runs at one moment.

    Not to be remembered for long: a process may load a library, or execute another program, at any time.
    """

    pid: int
    mapped: str
    """The files in ``/proc/PID/maps``, one a line, each once."""
    program: str
    """``/proc/PID/exe``."""
    cmdline: str
    """``/proc/PID/cmdline``, one blank between the arguments."""

    @property
    def proc(self) -> Path:
        """``/proc/PID``: by now that of another process if this one has ended."""
        return Path(f"/proc/{self.pid}")


def read_image(pid: int) -> Image | None:
    """Read what ``pid`` runs; ``None`` if it is gone, can't be looked at, or maps more than is looked at.

    Takes from 0.1 ms to a few milliseconds, depending on how many files are mapped.
    """
    proc = Path(f"/proc/{pid}")
    try:
        with reading(pid):
            with (proc / "maps").open("rb") as file:
                mapped = _mapped(file)
            program = str((proc / "exe").readlink()).removesuffix(_DELETED)
            with (proc / "cmdline").open("rb") as file:
                cmdline = file.read(_CMDLINE_LIMIT)
    except OSError:
        return None
    if mapped is None:
        return None
    return Image(pid, mapped, program, cmdline.rstrip(b"\0 ").replace(b"\0", b" ").decode(errors="replace"))


def _mapped(file: Iterable[bytes]) -> str | None:
    """The names of the mapped files, one a line; ``None`` if they are too many. What isn't seen may be what matters."""
    names: set[bytes] = set()
    size = paths = 0
    for line in file:
        size += len(line)
        # address, permissions, offset, device, inode, path: proc_pid_maps(5)
        fields = line.rstrip(b"\n").split(None, 5)
        if len(fields) == 6 and fields[5] not in names:
            names.add(fields[5])
            paths += len(fields[5]) + 1
        if size > _MAPS_LIMIT or paths > _PATHS_LIMIT:
            return None
    return "\n".join(name.decode(errors="replace").removesuffix(_DELETED) for name in names)


def library(name: str) -> re.Pattern[str]:
    """A pattern for :attr:`Image.mapped`: a shared library, with or without a version behind ``.so``."""
    return re.compile(rf"/{name}\.so[\d.]*$", re.MULTILINE)


def program(name: str) -> re.Pattern[str]:
    """A pattern for :attr:`Image.program`, whatever its directory."""
    return re.compile(rf"/(?:{name})$")
