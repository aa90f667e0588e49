"""``pgguard`` as a process, for what :mod:`tests.guard_process` has no place for: limits, pipes, exit statuses."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

SECONDS = 30.0


def environment(**variables: str) -> dict[str, str]:
    """What tests were started with, without what it says about PostgreSQL and the guard."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    root = str(Path(__file__).parents[2])
    return kept | {"PYTHONPATH": root, "PYTHONUNBUFFERED": "1", "COLUMNS": "120"} | variables


def run(
    *arguments: str, cwd: Path, variables: Mapping[str, str] | None = None, descriptors: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``pgguard`` with arguments with which it ends by itself."""
    return subprocess.run(
        [*_limited(descriptors), sys.executable, "-m", "pgguard", *arguments],
        check=False,
        cwd=cwd,
        env=environment(**(variables or {})),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def _limited(descriptors: int | None) -> list[str]:
    """What a command begins with that may have no more than so many descriptors."""
    return [] if descriptors is None else ["prlimit", f"--nofile={descriptors}"]


class Spawned:
    """A guard whose standard error is a pipe that is read only when the test says so."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.pid = process.pid
        assert process.stderr is not None
        self._stderr = process.stderr
        self._said = b""
        self.port = int(self.wait_for(r"ready on (?:.*, )?127\.0\.0\.1:(\d+)"))

    def wait_for(self, pattern: str) -> str:
        """Read standard error until it says so; returns the pattern's group."""
        deadline = time.monotonic() + SECONDS
        while not (found := re.search(pattern, self._said.decode())):
            ready, _, _ = select.select([self._stderr], [], [], max(0, deadline - time.monotonic()))
            data = os.read(self._stderr.fileno(), 65536) if ready else b""
            assert data, f"it never said {pattern}: {self._said.decode()}"
            self._said += data
        return found.group(found.re.groups)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> str:
        """Wait until it has ended, as it should; returns all that it has said."""
        _, rest = self.process.communicate(timeout=SECONDS)
        self._said += rest
        said = self._said.decode()
        assert self.process.returncode == 0, said
        assert "Traceback" not in said, said
        return said

    def hang_up(self) -> None:
        """Nobody will read standard error any more."""
        self._stderr.close()

    def status(self) -> int:
        """Wait until it has ended, without reading what it says."""
        return self.process.wait(SECONDS)

    def resident(self) -> int:
        """Bytes of memory that it has needed so far at most."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))


@contextmanager
def spawned(
    upstream: str | None,
    *options: str,
    cwd: Path,
    listen: str | None = "127.0.0.1:0",
    descriptors: int | None = None,
    **variables: str,
) -> Iterator[Spawned]:
    """Run a guard; what is left of it when the context is left is killed."""
    command = [sys.executable, "-m", "pgguard", "serve", *options]
    if upstream is not None:
        command += ["--upstream", upstream]
    if listen is not None:
        command += ["--listen", listen]
    with started([*_limited(descriptors), *command], cwd, environment(**variables)) as guard:
        yield guard


@contextmanager
def started(command: Sequence[str | Path], directory: Path, variables: Mapping[str, str]) -> Iterator[Spawned]:
    """Run a guard by another command, with this environment; what is left of it is killed likewise."""
    process = subprocess.Popen(
        command,
        cwd=directory,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    with process:
        try:
            yield Spawned(process)
        finally:
            if process.poll() is None:
                process.kill()
