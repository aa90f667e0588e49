"""Programs that use PostgreSQL through the guard, run and watched by the tests."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.servers import not_installed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from tests.guard_process import Fault
    from tests.servers import Address

PROGRAMS = Path(__file__).parent / "programs"
_SECONDS = 30.0

every_transport = pytest.mark.parametrize("transport", ["probed", "sampled", "unix"], indirect=True)
"""For tests in which it matters who tells the guard who sends."""
named_transport = pytest.mark.parametrize("transport", ["probed", "unix"], indirect=True)
"""For tests in which the kernel does."""
sampled_transport = pytest.mark.parametrize("transport", ["sampled"], indirect=True)
"""For tests in which nobody does."""


def interpreter(name: str, *needs: str) -> str:
    """Find a language's interpreter, or skip the test; ``needs`` are the options that load what the program needs."""
    found = shutil.which(name)
    if found is None or not _loads(found, *needs):
        not_installed(" ".join([name, *needs]))
    return found


@functools.cache
def _loads(command: str, *needs: str) -> bool:
    run = ("-r", "1;") if Path(command).name == "php" else ("-e", "1")
    return subprocess.run([command, *needs, *run], capture_output=True, check=False).returncode == 0


def compiled(source: str, directory: Path) -> Path:
    """Compile a program in C and link it to libpq, or skip the test."""
    compiler, pg_config = shutil.which("gcc"), shutil.which("pg_config")
    if compiler is None or pg_config is None:
        not_installed("gcc or libpq-dev")
    headers, libraries = (
        subprocess.run([pg_config, option], check=True, capture_output=True, text=True).stdout.strip()
        for option in ("--includedir", "--libdir")
    )
    if not (Path(headers) / "libpq-fe.h").exists():
        not_installed("libpq-dev")
    program = directory / Path(source).stem
    command = [compiler, "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{headers}", "-o", str(program)]
    subprocess.run([*command, str(PROGRAMS / source), f"-L{libraries}", "-lpq"], check=True)
    return program


class Program:
    """A running program, with the processes that it has forked."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process = process
        self._log = log

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log(self) -> str:
        """What it has written to standard error so far."""
        return self._log.read_text(errors="replace")

    def read(self) -> dict[str, Any]:
        """Read the next line of its standard output, a JSON object; fail if it says nothing more."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"it ended early:\n{self.log}"
        said: dict[str, Any] = json.loads(line)
        return said

    def say(self, line: str) -> None:
        """Write a line to its standard input."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def go_on(self) -> None:
        """Let it go on: it waits for a line, or the end, of its standard input."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def wait_for(self, pattern: str, *, count: int = 1, seconds: float = 40.0) -> list[str]:
        """Wait until its log matches so many times, and return the matches' groups; fail when time is up."""
        deadline = time.monotonic() + seconds
        while len(found := re.findall(pattern, self.log)) < count:
            assert time.monotonic() < deadline, f"no {pattern} within {seconds} s:\n{self.log}"
            time.sleep(0.02)
        return found

    def send_signal(self, number: int) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        """End it without giving it a chance to say anything."""
        self._process.kill()
        self._process.wait(_SECONDS)

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def wait(self) -> int:
        return self._process.wait(_SECONDS)


@contextmanager
def running(
    command: Sequence[str | Path],
    address: Address,
    directory: Path,
    name: str = "program",
    *,
    cwd: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> Iterator[Program]:
    """Run a program, and end it with all the processes of its group.

    Args:
        command: what to run.
        address: where it connects to, in its environment.
        directory: where its log is kept.
        name: of the log.
        cwd: its working directory, if not the tests' own.
        environ: more of its environment.
    """
    log = directory / f"{name}.log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=address.environ() | dict(environ or {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
    with process:
        try:
            yield Program(process, log)
        finally:
            _end_group(process.pid)


@contextmanager
def running_redis(directory: Path) -> Iterator[str]:
    """Run a Redis for jobs, or skip the test, and yield its URL. Its files are in a directory, whose path is short."""
    command = shutil.which("redis-server") or not_installed("Redis")
    path = directory / "s"
    options = ("--port", "0", "--unixsocket", path, "--save", "", "--dir", directory)
    with subprocess.Popen([command, *options], stdout=subprocess.DEVNULL) as server:
        try:
            deadline = time.monotonic() + _SECONDS
            while not path.exists():
                assert time.monotonic() < deadline
                time.sleep(0.02)
            yield f"unix://{path}"
        finally:
            server.terminate()


def _end_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def named(faults: Sequence[Fault], role: str | None = None) -> set[int]:
    """The pids that records name, in one role or in any."""
    return {
        culprit["pid"]
        for fault in faults
        for culprit in fault["culprits"]
        if culprit["pid"] is not None and role in {None, culprit["role"]}
    }


def threads_named(faults: Sequence[Fault]) -> set[int]:
    """The threads that records name."""
    return {culprit["tid"] for fault in faults for culprit in fault["culprits"]} - {None}
