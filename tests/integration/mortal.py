"""A PostgreSQL that a test may stop in every way, kill, and start again."""

from __future__ import annotations

import os
import pwd
import shlex
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from psycopg import pq

from pgguard.demo.postgres import running_cluster
from tests.servers import Address, Server, free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

SECONDS: Final = 60.0
"""How long it may take to start or to stop."""

MODES: Final = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}
"""The ways to shut a server down, and which signal stands for each: "Shutting Down the Server"."""


class Mortal:
    """The server, at the same addresses whenever it runs."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._data = Path(server.unix.host) / "data"
        self._started: subprocess.Popen[bytes] | None = None

    @property
    def postmaster(self) -> int:
        return int((self._data / "postmaster.pid").read_text().split()[0])

    def signal(self, number: int) -> int:
        """Send the postmaster a signal; returns its pid, to wait for."""
        postmaster = self.postmaster
        os.kill(postmaster, number)
        return postmaster

    def limit_processes(self, number: str) -> str:
        """Say how many processes its user may have if it is to be able to fork; returns what that was before."""
        limits = Path(f"/proc/{self.postmaster}/limits").read_text()
        before = limits.partition("Max processes")[2].split()[0]
        command = ["prlimit", f"--pid={self.postmaster}", f"--nproc={number}:"]
        subprocess.run(command, check=True, **self._identity())
        return before

    def _identity(self) -> dict[str, Any]:
        """Of the user that it runs as, for :mod:`subprocess`."""
        if os.geteuid() != 0:
            return {}
        account = pwd.getpwuid(self._data.stat().st_uid)
        return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}

    def wait_ended(self, postmaster: int) -> None:
        self._until(lambda: not _runs(postmaster), "the server never ended")
        if self._started is not None and self._started.pid == postmaster:
            self._started.wait()

    def stop(self, mode: str = "fast") -> None:
        self.wait_ended(self.signal(MODES[mode]))

    def start(self, *, wait: bool = True) -> None:
        """Start it again, as it was started first.

        After its postmaster was killed that takes until the last backend has noticed.
        """
        command = shlex.split((self._data / "postmaster.opts").read_text())
        deadline = time.monotonic() + SECONDS
        while True:
            with (self._data.parent / "log").open("ab") as log:
                self._started = subprocess.Popen(
                    command,
                    cwd=self._data.parent,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    **self._identity(),
                )
            while self._started.poll() is None and (wait or not (self._data / "postmaster.pid").exists()):
                if self.accepts():
                    return
                time.sleep(0.02)
            if not wait and self._started.poll() is None:
                return
            assert time.monotonic() < deadline, (self._data.parent / "log").read_text(errors="replace")

    def accepts(self) -> bool:
        return pq.PGconn.ping(self.server.unix.conninfo.encode()) == pq.Ping.OK

    def wait_accepts(self) -> None:
        self._until(self.accepts, "the server never accepted connections again")

    def end(self) -> None:
        """End what :meth:`start` has started."""
        if self._started is not None and self._started.poll() is None:
            self._started.send_signal(signal.SIGQUIT)
            try:
                self._started.wait(SECONDS)
            except subprocess.TimeoutExpired:
                self._started.kill()
                self._started.wait()

    @staticmethod
    def _until(condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, what
            time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


@contextmanager
def mortal_server(bindir: Path, settings: Mapping[str, str] | None = None) -> Iterator[Mortal]:
    """Run a server that can be stopped and started."""
    addresses = {"listen_addresses": "127.0.0.1"}
    with running_cluster(bindir, port=free_port(), settings=addresses | dict(settings or {}), timeout=60) as cluster:
        tcp, unix = Address("127.0.0.1", cluster.port), Address(str(cluster.socket_dir), cluster.port)
        mortal = Mortal(Server(cluster.bindir, tcp, unix))
        try:
            yield mortal
        finally:
            mortal.end()
