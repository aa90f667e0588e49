"""What a process runs, read once from ``/proc/PID``: for telling its driver and its runtime.

Only files that name what is running are read: the mapped files, the program and the command line. Never the
environment, where secrets are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_DELETED = " (deleted)"
"""What the kernel appends to the path of a file that an upgrade has replaced: proc_pid_exe(5)."""

_CMDLINE_LIMIT = 4096
"""Bytes of a command line that are looked at."""


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
    """Read what ``pid`` runs; ``None`` if it is gone or can't be looked at.

    Takes from 0.1 ms to a few milliseconds, depending on how many files are mapped.
    """
    proc = Path(f"/proc/{pid}")
    try:
        lines = (proc / "maps").read_text(errors="replace").splitlines()
        program = str((proc / "exe").readlink()).removesuffix(_DELETED)
        with (proc / "cmdline").open("rb") as file:
            cmdline = file.read(_CMDLINE_LIMIT)
    except OSError:
        return None
    # address, permissions, offset, device, inode, path: proc_pid_maps(5)
    mapped = {fields[5].removesuffix(_DELETED) for line in lines if len(fields := line.split(None, 5)) == 6}
    return Image(pid, "\n".join(mapped), program, cmdline.rstrip(b"\0 ").replace(b"\0", b" ").decode(errors="replace"))


def library(name: str) -> re.Pattern[str]:
    """A pattern for :attr:`Image.mapped`: a shared library, with or without a version behind ``.so``."""
    return re.compile(rf"/{name}\.so[\d.]*$", re.MULTILINE)


def program(name: str) -> re.Pattern[str]:
    """A pattern for :attr:`Image.program`, whatever its directory."""
    return re.compile(rf"/(?:{name})$")
