"""The programs that are measured, and those that measure."""

from __future__ import annotations

import os
import pwd
import re
import resource
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tests.servers import free_port
from tests.tls.certificates import self_signed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.tls.certificates import Pair

Hops = Literal["tcp", "unix", "tls"]
"""What both ways are over: from the client to the proxy, and from there to the server. TLS is over TCP."""

_START_SECONDS = 40.0
_LOAD = Path(__file__).parent / "load"
_OTHER_DESCRIPTORS = 300
"""What a proxy has open, or keeps back, beside the sessions' own."""
_SHOWN = "certificate"
FEW = 400
"""More sessions than are open at once where it isn't about many."""


class CannotMeasureError(Exception):
    """What a benchmark needs is not there, or fails; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where something accepts connections."""

    directory: Path
    """Of its Unix socket."""
    port: int

    def host(self, hops: Hops) -> str:
        return str(self.directory) if hops == "unix" else "127.0.0.1"

    def address(self, hops: Hops) -> str:
        """As the load program takes it."""
        return f"{self.directory}/.s.PGSQL.{self.port}" if hops == "unix" else str(self.port)


@dataclass(frozen=True, slots=True)
class Guard:
    """A guard to be measured: the Python that it is installed for, and its attribution."""

    name: str
    python: str
    attribution: str

    @property
    def title(self) -> str:
        return self.name if self.attribution == "auto" else f"{self.name}, {self.attribution}"


@dataclass(frozen=True, slots=True)
class Contender:
    """What stands between the clients and the server, running."""

    name: str
    pid: int | None
    """``None``: nothing stands there."""
    place: Place
    log: Path | None = field(default=None, compare=False)

    def complaint(self) -> str:
        """What it has said, for whoever wonders why it doesn't do what it should."""
        return "" if self.log is None else self.log.read_text(errors="replace")[-2000:]


def find(program: str, package: str) -> str:
    """The path of a program; some of them are where only root looks.

    Raises:
        CannotMeasureError: it isn't there.
    """
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    if found := shutil.which(program, path=path):
        return found
    raise CannotMeasureError(f"{program} is needed, and not installed: apt-get install {package}")


def compiled(name: str, into: Path) -> str:
    """Compile one of the load programs.

    Raises:
        CannotMeasureError: there is no compiler.
    """
    program = into / name
    if not program.exists():
        compiler = find("gcc", "gcc libc6-dev")
        command = [compiler, "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(program), str(_LOAD / f"{name}.c")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CannotMeasureError(
                f"{name}.c can't be compiled; it takes: apt-get install gcc libc6-dev\n{done.stderr}"
            )
    return str(program)


def clean_environment() -> dict[str, str]:
    """The environment, without anything that leads a program to another server, or a guard to other options."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PG", "PYTHON"))}


def environment(hops: Hops) -> dict[str, str]:
    """The environment of a program that uses libpq."""
    return clean_environment() | {"PGSSLMODE": "require" if hops == "tls" else "disable"}


def room_for_sessions() -> int:
    """How many sessions a proxy can hold that is started from here: as many as there are pairs of descriptors.

    The limit is raised first, as far as it goes.
    """
    for limit in (_nr_open(), resource.getrlimit(resource.RLIMIT_NOFILE)[1]):
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
            break
    return (resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _OTHER_DESCRIPTORS) // 2


def _nr_open() -> int:
    """What no limit can be above: ``/proc/sys/fs/nr_open`` of proc(5), or what is enough."""
    return min(1 << 17, int(Path("/proc/sys/fs/nr_open").read_text()))


def accepts(contender: Contender, hops: Hops, client: str) -> bool:
    """Whether a client gets an answer through it."""
    command = [client, contender.place.address(hops), "hold", "1", "1"]
    done = subprocess.run(command, input="\n", capture_output=True, text=True, check=False)
    return done.stdout == "1\n"


def start(command: Sequence[str], directory: Path, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            cwd=directory,
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )


@contextmanager
def running(
    name: str, command: Sequence[str], place: Place, hops: Hops, client: str, directory: Path
) -> Iterator[Contender]:
    """Run a proxy until the context is left; wait for it to let the first client through."""
    log = directory / "log"
    process = start(command, directory, log)
    contender = Contender(name, process.pid, place, log)
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not accepts(contender, hops, client):
            if process.poll() is not None or time.monotonic() > deadline:
                raise CannotMeasureError(f"{name} does not start:\n{contender.complaint()}")
            time.sleep(0.05)
        yield contender
    finally:
        process.kill()
        process.wait()


def _made(parent: Path, name: str) -> Path:
    directory = parent / re.sub(r"\W+", "-", name)
    directory.mkdir(exist_ok=True)
    directory.chmod(0o755)
    return directory


def certificate(directory: Path, *, of_nobody: bool) -> Pair:
    """A certificate to be shown, and its key, made anew; the key is of the user as whom some run that root starts."""
    pair = self_signed(directory, _SHOWN, "localhost", ("localhost", "127.0.0.1"))
    if of_nobody and os.geteuid() == 0:
        os.chown(pair.key, pwd.getpwnam("nobody").pw_uid, -1)
    return pair


@contextmanager
def pgbouncer(upstream: Place, hops: Hops, client: str, parent: Path, *, sessions: int = FEW) -> Iterator[Contender]:
    """Run pgbouncer in session mode, with a server connection for each client's if it takes that many.

    Each client gets a new connection to the server, as it does from the other proxies. One that had been another
    client's would be quicker at first: the server's process has its caches filled.

    Args:
        upstream: the server.
        hops: what both ways are over.
        client: the load program.
        parent: where its files are.
        sessions: how many it lets in at once.
    """
    directory = _made(parent, "pgbouncer")
    place = Place(directory, free_port())
    encrypts = ""
    if hops == "tls":
        shown = certificate(directory, of_nobody=True)
        encrypts = (
            f"client_tls_sslmode = allow\nclient_tls_cert_file = {shown.cert}\nclient_tls_key_file = {shown.key}\n"
            "server_tls_sslmode = require\n"
        )
    (directory / "users").write_text('"postgres" ""\n')
    (directory / "ini").write_text(
        f"[databases]\n* = host={upstream.host(hops)} port={upstream.port}\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {place.port}\nunix_socket_dir = {directory}\n"
        f"auth_type = trust\nauth_file = {directory}/users\npool_mode = session\n"
        f"max_client_conn = {sessions}\ndefault_pool_size = {sessions}\n"
        f"server_lifetime = 0\n{encrypts}"
    )
    command = [find("pgbouncer", "pgbouncer"), "-q", str(directory / "ini")]
    if os.geteuid() == 0:  # as which it refuses to run
        account = pwd.getpwnam("nobody")
        os.chown(directory, account.pw_uid, account.pw_gid)
        command = [find("setpriv", "util-linux"), f"--reuid={account.pw_uid}", "--clear-groups", *command]
    with running("pgbouncer", command, place, hops, client, directory) as contender:
        yield contender


@contextmanager
def haproxy(upstream: Place, hops: Hops, client: str, parent: Path, *, sessions: int = FEW) -> Iterator[Contender]:
    """Run HAProxy in TCP mode; as Debian sets it up, with a thread for each processor."""
    directory = _made(parent, "haproxy")
    place = Place(directory, free_port())
    local = f"unix@{place.address('unix')}"
    server = f"unix@{upstream.address('unix')}" if hops == "unix" else f"127.0.0.1:{upstream.port}"
    (directory / "cfg").write_text(
        f"global\n maxconn {sessions}\n"
        f"defaults\n mode tcp\n timeout connect 5s\n timeout client 1h\n timeout server 1h\n"
        f"listen postgresql\n bind 127.0.0.1:{place.port}\n bind {local} mode 666\n server postgresql {server}\n"
    )
    command = [find("haproxy", "haproxy"), "-f", str(directory / "cfg")]
    with running("HAProxy", command, place, hops, client, directory) as contender:
        yield contender


@contextmanager
def guard(
    guard: Guard, upstream: Place, hops: Hops, client: str, parent: Path, *, name: str | None = None
) -> Iterator[Contender]:
    """Run pgguard as its users do, with its faults in a file."""
    directory = _made(parent, name or guard.title)
    place = Place(directory, free_port())
    server = f"host={upstream.host(hops)} port={upstream.port} sslmode={'require' if hops == 'tls' else 'disable'}"
    command = [guard.python, "-m", "pgguard", "serve", "--upstream", server, "--attribution", guard.attribution]
    command += ["--listen", f"127.0.0.1:{place.port}", "--listen", f"unix:{directory}:{place.port}"]
    command += ["--faults", str(directory / "faults")]
    if hops == "tls":
        shown = certificate(directory, of_nobody=False)
        command += ["--tls-cert", str(shown.cert), "--tls-key", str(shown.key)]
    with running(name or guard.title, command, place, hops, client, directory) as contender:
        yield contender
        if (said := directory / "faults").exists() and said.stat().st_size:
            raise CannotMeasureError(
                f"{contender.name} has found faults where there are none:\n{said.read_text()[:2000]}"
            )


@contextmanager
def fake_server(program: str, parent: Path) -> Iterator[Place]:
    """The small server of ``load/``."""
    directory = _made(parent, "sessions")
    process = subprocess.Popen(
        [program, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sys.stderr, text=True
    )
    assert process.stdout is not None
    try:
        yield Place(directory, int(process.stdout.readline()))
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
