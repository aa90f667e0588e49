"""The guard as its users run it: a process, started and stopped, watched from outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests import unlimited_guard, warm
from tests.servers import Address

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from tests.servers import Transport

Fault = dict[str, Any]

_READY = "pgguard: ready on "
_START_SECONDS = 40.0
_STOP_SECONDS = 40.0

LIMITED = (sys.executable, "-m", "pgguard")
"""What users run."""
UNLIMITED = (sys.executable, "-P", unlimited_guard.__file__)
"""A guard that records every fault in full; ``-P``, as some directories beside it are named like Python's modules."""
_WARM: dict[tuple[str, ...], str] = {LIMITED: "pgguard", UNLIMITED: unlimited_guard.__file__}
"""Those that needn't import anything any more when they start: what is run."""


class GuardProcess:
    """A running ``pgguard serve``."""

    def __init__(self, process: subprocess.Popen[bytes] | warm.WarmGuard, directory: Path) -> None:
        self._process = process
        self._faults = directory / "faults.jsonl"
        self._log = directory / "stderr"
        self.tcp, self.unix = self._addresses()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def records(self) -> Path:
        """The file that it appends its faults to."""
        return self._faults

    @property
    def stderr(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def descriptors(self) -> int:
        """How many descriptors it has open."""
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def at(self, transport: Transport) -> Address:
        return self.unix if transport == "unix" else self.tcp

    def faults(self, kind: str | None = None) -> list[Fault]:
        """What has been recorded so far, in order."""
        if not self._faults.exists():
            return []
        # Only whole lines: the last one may be in the middle of being written.
        lines = self._faults.read_text().split("\n")[:-1]
        faults: list[Fault] = [json.loads(line) for line in lines]
        return [fault for fault in faults if kind is None or fault["kind"] == kind]

    def first_of_cause(self, fault: Fault) -> Fault:
        """The record that tells in full what a fault's cause is: its own, or the one that it is a repeat of."""
        [first] = [one for one in self.faults() if one["id"] == (fault["repeat_of"] or fault["id"])]
        assert (first["cause"], first["kind"], first["repeat_of"]) == (fault["cause"], fault["kind"], None)
        return first

    def wait_for(self, kind: str, *, count: int = 1, timeout: float = 40.0) -> list[Fault]:
        """Wait until so many faults of a kind have been recorded, and return them all; fail when time is up."""
        deadline = time.monotonic() + timeout
        while len(found := self.faults(kind)) < count:
            assert time.monotonic() < deadline, f"no {kind} within {timeout} s: {self.faults()}\n{self.stderr}"
            time.sleep(0.02)
        return found

    def assert_no_faults(self, *, except_kinds: Collection[str] = ()) -> None:
        """Stop the guard, so that nothing is still to come, and fail if it recorded anything but those kinds."""
        self.stop()
        unexpected = [fault for fault in self.faults() if fault["kind"] not in except_kinds]
        assert not unexpected, json.dumps(unexpected, indent=1)

    def stop(self, *, failures: bool = False) -> None:
        """End the guard with SIGTERM, as a supervisor would; fail unless it ends well. Does nothing the second time.

        Args:
            failures: something is meant to have failed in it.
        """
        if self._process.returncode is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        status = self._process.wait(_STOP_SECONDS)
        assert status == 0, f"the guard ended with {status}:\n{self.stderr}"
        assert failures or "Traceback" not in self.stderr, self.stderr

    def _addresses(self) -> tuple[Address, Address]:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            for line in self.stderr.splitlines(keepends=True):
                if line.startswith(_READY) and line.endswith("\n"):
                    tcp, unix = line.removeprefix(_READY).strip().split(", ")
                    host, port = tcp.rsplit(":", 1)
                    directory, name = unix.removeprefix("unix:").rsplit(":", 1)
                    return Address(host, int(port)), Address(directory, int(name))
            assert self._process.poll() is None, f"the guard ended with {self._process.returncode}:\n{self.stderr}"
            assert time.monotonic() < deadline, f"the guard did not start:\n{self.stderr}"
            time.sleep(0.02)


@contextmanager
def running_guard(
    upstream: Address | str,
    *options: str,
    probe: bool = True,
    program: Sequence[str] = LIMITED,
    environ: Mapping[str, str] | None = None,
) -> Iterator[GuardProcess]:
    """Run a guard in front of a server, listening on the loopback address and on a Unix socket.

    Leaving the context stops it and fails unless it ends well.

    Args:
        upstream: the server, or a connection string that says where it is.
        options: more for ``pgguard serve``.
        probe: False: the kernel doesn't tell it who sends on TCP, for want of a capability.
        program: what is run as ``pgguard``.
        environ: more of its environment.
    """
    conninfo = upstream if isinstance(upstream, str) else upstream.conninfo
    # Not pytest's tmp_path: the path of a Unix socket has at most 107 bytes, unix(7).
    with tempfile.TemporaryDirectory(prefix="pgguard-test-") as name:
        directory = Path(name)
        before = [] if probe else ["setpriv", "--bounding-set=-net_admin"]
        arguments = ["serve", "--upstream", conninfo, "--listen", "127.0.0.1:0", "--listen", f"unix:{directory}:5432"]
        arguments += ["--faults", str(directory / "faults.jsonl"), *options]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        environment |= dict(environ or {})
        # The directory is one where no pgguard.toml is.
        process: subprocess.Popen[bytes] | warm.WarmGuard
        with (directory / "stderr").open("wb") as stderr:
            if (module := _WARM.get(tuple(program))) is not None:
                process = warm.start(before, module, arguments, cwd=directory, env=environment, stderr=stderr)
            else:
                process = subprocess.Popen(
                    [*before, *program, *arguments],
                    cwd=directory,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                )
        try:
            guard = GuardProcess(process, directory)
            yield guard
            guard.stop()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait(_STOP_SECONDS)
