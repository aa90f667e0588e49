"""What attribution this host, this user and these namespaces allow, found out by trying it on ourselves.

Nothing is concluded from versions, users or settings: a socket is connected and looked up, a child process is started
and looked at. Settings are read only to say what to change where that fails.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pgguard.attribution.descriptors import find_sockets, list_processes
from pgguard.attribution.ebpf.account import Accounts
from pgguard.attribution.ebpf.probe import ProbeUnavailable, connection_key, scope_remedy
from pgguard.attribution.evidence import Process
from pgguard.attribution.forks import ForkEvents, ForksUnavailable
from pgguard.attribution.namespaces import ask_in_namespace, in_a_new_thread, read_tables
from pgguard.attribution.privileges import ENTERING, LOADING, LOOKING, TELLING, Right, rights
from pgguard.attribution.processes import read_process
from pgguard.attribution.senders import CREDENTIALS_SPACE, ask_for_credentials, sender_pid
from pgguard.attribution.sockets import SockDiag, TcpClient, client_socket
from pgguard.attribution.stacks import find_py_spy, lack_of_py_spy, python_stacks
from pgguard.attribution.threads import Obstacle, Waiting, waiting_threads
from pgguard.attribution.transparency import start as start_probe
from pgguard.identity import Sender
from pgguard.secrets.commands import redact_name

_SECONDS = 2.0
"""How long each thing that is started for a check may take: many times what it does take."""

_INITIAL_PID_NAMESPACE = 0xEFFFFFFC
"""The inode of the namespace that the kernel boots with, ``PROC_PID_INIT_INO`` in ``linux/proc_ns.h``."""

_NAMED = 3
"""Processes that are named as examples."""

_BLIND = "a test on pgguard's own processes failed"

_CLIENT = """
import os, select
os.write(0, b"child")
poll = select.poll()
poll.register(0, select.POLLIN)
poll.poll()
"""
"""A client that inherits its connection, sends something, and waits until the connection ends."""

_STRANGER = """
import sys
with open(sys.argv[1], "rb") as file:
    sys.exit(not file.read())
"""
"""A guard that is no ancestor of the client."""

_MOUNT_PROC = "mount /proc for the pid namespace that the guard runs in"

_SHARE_PIDS = (
    'share the application\'s pid namespace (pid: "service:app" in compose, --pid container:APP with docker, '
    "shareProcessNamespace: true in a pod), or the host's (pid: host)"
)


@dataclass(frozen=True, slots=True)
class Capability:
    """One thing that attribution needs, and whether it is available."""

    name: str
    purpose: str
    """What it is for, and with what limits it is available: a clause without a subject."""
    essential: bool
    """Without it :attr:`consequence` is true, of one kind of socket at least."""
    unix_instead: bool
    """Clients that connect to a Unix socket can be named without it, by :attr:`KERNEL_SENDERS`."""
    problem: str | None = None
    """What is wrong, a clause; ``None`` if nothing is, and it is available."""
    remedy: str | None = None
    """The one thing to do about the problem, an imperative; ``None`` exactly if there is none."""
    rights: tuple[str, ...] = ()
    """The Linux capabilities that it takes, where clients are other users'. A guard that is started as root keeps them;
    those for the kernel's probe and its fork events only until it has these."""
    consequence: str = "client processes can't be found"
    """What is true if it is essential and missing: a clause."""

    @property
    def available(self) -> bool:
        """It works here."""
        return self.problem is None

    @property
    def explanation(self) -> str:
        """What it is for; where it isn't available, what is wrong and what to do. A clause, for after a colon."""
        return self.purpose if self.problem is None else f"{self.problem}; {self.remedy}"


KERNEL_SENDERS = "kernel senders on Unix sockets"
"""The capability that makes up for the lack of others."""
TCP_SENDERS = "kernel senders on TCP"
"""The one that the kernel's probe gives."""
FORK_EVENTS = "fork events"
"""The one that :mod:`pgguard.attribution.forks` gives."""


class _Missing(Exception):
    def __init__(self, problem: str, remedy: str | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.remedy = remedy
        """``None`` for what the check names anyway."""


@dataclass(frozen=True, slots=True)
class _Check:
    name: str
    purpose: str
    attempt: Callable[[], str | None]
    """Returns the purpose where it depends on what was found. Raises _Missing, or OSError."""
    remedy: str
    essential: bool = False
    unix_instead: bool = False
    rights: Collection[Right] = ()
    takes_proc: bool = False
    """Nothing can be said about it where ``/proc`` is missing, or isn't that of the guard's pid namespace."""

    def run(self, *, proc: bool) -> Capability:
        purpose, problem, remedy = self.purpose, None, None
        try:
            if self.takes_proc and not proc:
                raise _Missing("it needs /proc", _MOUNT_PROC)  # noqa: TRY301 - as if the attempt had said so
            purpose = self.attempt() or purpose
        except _Missing as missing:
            problem, remedy = missing.problem, missing.remedy or self.remedy
        except OSError as error:
            problem, remedy = error.strerror or str(error), self.remedy
        needed = tuple(sorted(right.name for right in self.rights))
        return Capability(self.name, purpose, self.essential, self.unix_instead, problem, remedy, needed)


def check(*, probe: bool = True) -> tuple[Capability, ...]:
    """Try everything that attribution needs from this host, the essential first.

    Args:
        probe: try the kernel's probe of TCP senders and its fork events too, which whoever has these needn't.

    It starts child processes and takes some tenths of a second, and a few seconds at the very worst; nothing is left
    behind. What is found holds for the calling process: it depends on its user, capabilities, namespaces and sandbox.
    """
    netlink = "allow AF_NETLINK sockets in the guard's sandbox, or load the kernel module"
    with _Client() as client:
        proc = _Check("/proc", "names processes", _try_proc, _MOUNT_PROC, essential=True).run(proc=True)
        checks = (
            _Check(
                "sock_diag for TCP",
                "finds a client's TCP socket",
                _try_tcp,
                f"{netlink} tcp_diag",
                essential=True,
                unix_instead=True,
            ),
            _Check(
                "sock_diag for Unix sockets",
                "finds a client's Unix socket",
                _try_unix,
                f"{netlink} unix_diag",
                essential=True,
            ),
            _Check(
                "receive queues",
                "shows how much of an answer a client has not read, on TCP and on Unix sockets",
                _try_receive_queues,
                f"{netlink}s tcp_diag and unix_diag",
            ),
            _Check(
                KERNEL_SENDERS,
                "names the process that sent each byte",
                client.try_senders,
                "run the guard on the host's own kernel, not in a sandbox that emulates one, such as gVisor",
            ),
            *([_TCP_SENDERS] if probe else []),
            _Check(
                "other users' processes",
                "finds clients of any user",
                _try_other_users,
                "run the guard as root with CAP_SYS_PTRACE",
                unix_instead=True,
                rights=LOOKING,
                takes_proc=True,
            ),
            *([_FORK_EVENTS] if probe else []),
            _Check(
                "clients' pid namespace",
                "sees every process on this host",
                _try_pid_namespace,
                _SHARE_PIDS,
                takes_proc=True,
            ),
            _Check(
                "other network namespaces",
                "finds TCP clients in containers of this host",
                _try_network_namespaces,
                "give the guard CAP_SYS_ADMIN, or run it in the application's network namespace",
                unix_instead=True,
                rights=LOOKING | ENTERING,
                takes_proc=True,
            ),
            _Check(
                "waiting threads",
                "shows which threads wait for an answer, and so which ones share a TCP connection",
                client.try_threads,
                _ptrace_remedy(),
                unix_instead=True,
                rights=LOOKING,
                takes_proc=True,
            ),
            _Check(
                "Python stacks",
                "shows what waiting Python threads are doing",
                client.try_stacks,
                _ptrace_remedy(),
                rights=LOOKING,
                takes_proc=True,
            ),
        )
        return (proc, *(one.run(proc=proc.available) for one in checks))


def without_tcp_senders(problem: str, remedy: str, *, altogether: bool = True) -> Capability:
    """The lack of :data:`TCP_SENDERS`, as whoever has tried the kernel's probe has found it.

    Args:
        problem: what is wrong, a clause.
        remedy: the one thing to do about it, an imperative.
        altogether: False: some of it works.
    """
    name = TCP_SENDERS if altogether else f"some {TCP_SENDERS}"
    return Capability(name, _TCP_SENDERS.purpose, essential=False, unix_instead=True, problem=problem, remedy=remedy)


def without_fork_events(problem: str, remedy: str) -> Capability:
    """The lack of :data:`FORK_EVENTS`; arguments as of :func:`without_tcp_senders`."""
    lacking = f"{problem}; all processes are listed instead, again and again"
    return Capability(
        FORK_EVENTS, _FORK_EVENTS.purpose, essential=False, unix_instead=False, problem=lacking, remedy=remedy
    )


def _try_fork_events() -> None:
    try:
        ForkEvents().close()
    except ForksUnavailable as error:
        lacking = without_fork_events(error.problem, error.remedy)
        raise _Missing(lacking.problem or error.problem, error.remedy) from error


_FORK_EVENTS = _Check(
    FORK_EVENTS,
    "tells of each new process, which may have inherited a connection",
    _try_fork_events,
    "run a kernel that is built with CONFIG_PROC_EVENTS",
    rights=TELLING,
    takes_proc=True,
)


def _try_tcp_senders() -> str | None:
    """Have the kernel name ourselves as the sender of a byte, by a probe that changes nothing."""
    try:
        probe, _ = start_probe([], insist=False)
    except ProbeUnavailable as error:
        raise _Missing(error.problem, error.remedy) from error
    with probe, socket.create_server(("127.0.0.1", 0)) as listener:
        probe.add(*listener.getsockname())
        with _connecting(listener.getsockname()) as client, _accepted(listener) as accepted:
            client.send(b"x")
            accepted.recv(1)
            accounts = Accounts(probe)
            accounts.feed()
            account = accounts.open(connection_key(accepted))
            _expect(account.split(1) == [(1, Sender(os.getpid(), threading.get_native_id()))])
        if probe.scope is not None:
            raise _Missing(f"it sees only the processes in the cgroup {probe.scope}", scope_remedy())
        purpose = _TCP_SENDERS.purpose
        if not probe.watches_blocking:
            purpose += " on sockets that don't block (on all of them with --attribution ebpf)"
        if not probe.openers:
            purpose += "; Linux 6.10 or later would also name who opened the connection"
    return purpose


@contextlib.contextmanager
def _connecting(address: tuple[str, int]) -> Iterator[socket.socket]:
    """Connect as libpq does: with a socket that doesn't block."""
    with socket.socket() as client:
        client.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            client.connect(address)
        yield client


_TCP_SENDERS = _Check(
    TCP_SENDERS,
    "names the process and the thread that sent each byte",
    _try_tcp_senders,
    "run the guard on the host's own kernel, not in a sandbox that emulates one, such as gVisor",
    unix_instead=True,
    rights=LOADING,
)


def _try_proc() -> None:
    with socket.socket() as probe:
        inode = _inode(probe)
        found = find_sockets(os.getpid(), {inode})
        _expect(inode in found and read_process(os.getpid()) is not None)


def _try_tcp() -> None:
    with _tcp_connection() as (client, accepted), SockDiag() as diag:
        _expect(diag.client_inode(client_socket(accepted)) == _inode(client))


def _try_unix() -> None:
    with _unix_connection() as (client, accepted), SockDiag() as diag:
        _expect(diag.client_inode(client_socket(accepted)) == _inode(client))


def _try_receive_queues() -> None:
    """Leave something unread, and look whether it is counted."""
    for connection in (_tcp_connection, _unix_connection):
        with connection() as (client, accepted), SockDiag() as diag:
            accepted.sendall(b"answer")
            client.recv(6, socket.MSG_PEEK | socket.MSG_WAITALL)
            _expect(diag.unread(client_socket(accepted), _inode(client)) == 6)


def _try_other_users() -> None:
    pids = list_processes()
    # Every pid namespace has a process 1, and nobody but root may look at it under hidepid: proc(5).
    if 1 not in pids:
        raise _Missing(
            "/proc hides them (hidepid), so the guard can't tell whether a process is alone with its connection",
            "run the guard as root, or with the group that /proc is mounted with (gid=)",
        )
    unreadable = [pid for pid in pids if not _readable(pid)]
    if unreadable:
        names = [
            f"pid {pid} ({redact_name(process.name)})" for pid in unreadable[:_NAMED] if (process := read_process(pid))
        ]
        more = ["…"] if len(unreadable) > len(names) else []
        raise _Missing(
            f"{len(unreadable)} of them can't be looked at: {', '.join(names + more)}",
            "make sure that none of them is a client; the guard has CAP_SYS_PTRACE, so something else hides them, such "
            "as AppArmor"
            if _has_capability(Right.CAP_SYS_PTRACE)
            else "run the guard as root with CAP_SYS_PTRACE, unless every client runs as the guard's user",
        )


def _readable(pid: int) -> bool:
    try:
        find_sockets(pid, ())
    except PermissionError:
        return False
    return True


def _try_pid_namespace() -> str | None:
    """Tell whose pid namespace this is, as far as that can be told.

    The kernel's first one has every process in it. In any other one the guard sees nothing outside, neither processes
    nor that there are any. Who shares it tells whether it is meant to be looked at: in a container of the guard's own
    there is nobody but the guard, what started it, and what it or another guard has started.
    """
    if Path("/proc/self/ns/pid").stat().st_ino == _INITIAL_PID_NAMESPACE:
        return None
    processes = {pid: process for pid in list_processes() if (process := read_process(pid)) is not None}
    guards = {os.getpid()} | {pid for pid, process in processes.items() if _is_guard(process)}
    own = set(_lineage(os.getpid(), processes))
    others = [pid for pid in processes if pid not in own and guards.isdisjoint(_lineage(pid, processes))]
    if not others and 1 in processes:
        raise _Missing("the guard is alone in its pid namespace, and sees only the processes that it starts itself")
    return "sees every process in the guard's pid namespace, and none outside it"


def _is_guard(process: Process) -> bool:
    """True for ``pgguard serve``, started by that name or as a module of an interpreter."""
    return "pgguard" in [Path(argument).name for argument in process.cmdline[:3]]


def _lineage(pid: int, processes: Mapping[int, Process]) -> Iterator[int]:
    """Yield a pid and those of its ancestors."""
    process = processes.get(pid)
    while process is not None:
        yield process.pid
        process = None if process.ppid is None else processes.get(process.ppid)


def _try_network_namespaces() -> str | None:
    """Look into the guard's own network namespace by the ways that lead into others."""
    with _tcp_connection() as (client, accepted):
        described = client_socket(accepted)
        if isinstance(described, TcpClient):
            with contextlib.suppress(OSError):
                _expect(in_a_new_thread(lambda: ask_in_namespace(os.getpid(), [described])) == [_inode(client)])
                return None
            _expect(read_tables(os.getpid(), [described]) == [_inode(client)])
    return "finds TCP clients in containers of this host, but slowly (milliseconds) without CAP_SYS_ADMIN"


class _Client:
    """A child process with a Unix connection to us that waits for something to read from it, as clients do."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._failure: OSError | None = None
        self._senders: list[int | None] = []
        self._inode = 0
        self._pid = 0
        self._waiting: Waiting | None = None
        self._blind: _Missing | None = None
        """Why the child can't be seen to wait, once that has been tried."""

    def __enter__(self) -> Self:
        try:
            self._start()
        except OSError as error:
            self._failure = error
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        client, accepted = self._stack.enter_context(_unix_connection())
        self._inode = _inode(client)
        client.sendall(b"guard")
        child = self._stack.enter_context(_child(_CLIENT, stdin=client.fileno()))
        self._pid = child.pid
        client.close()  # so that the connection ends with the child, should it do so too early
        self._senders = [_receive(accepted), _receive(accepted)]

    def _require(self) -> None:
        if self._failure is not None:
            reason = self._failure.strerror or self._failure
            raise _Missing(
                f"this could not be tested, because {sys.executable} can't be started: {reason}",
                "install the guard where its user can run Python, and let it start processes",
            )

    def try_senders(self) -> None:
        """Have the kernel name ourselves and, on the same connection, the child."""
        self._require()
        _expect(self._senders == [os.getpid(), self._pid])

    def try_threads(self) -> None:
        """See the child wait; and have another child, not an ancestor of the first, see it too."""
        self._require()
        try:
            self._waiting = self._find()
            self._have_a_stranger_look()
        except _Missing as missing:
            self._blind = missing
            raise

    def try_stacks(self) -> None:
        """Have py-spy show what the child does, once its threads have been tried: that takes the same rights."""
        self._require()
        if find_py_spy() is None:
            raise _Missing(*lack_of_py_spy())
        if self._waiting is None or self._blind is not None:
            raise self._blind or _Missing(_BLIND)
        stacks = python_stacks([self._waiting.sleep], _SECONDS)
        problem = stacks.problems.get(self._pid)
        if problem is not None:
            refused = problem == Obstacle.NOT_PERMITTED or "not permitted" in problem
            raise _Missing(problem, None if refused else "pip install --upgrade 'pgguard[stacks]'")
        _expect(bool(stacks.frames.get(self._waiting.sleep)))

    def _find(self) -> Waiting:
        """Find the child's thread when it has gone to sleep. Raises _Missing."""
        deadline = time.monotonic() + _SECONDS
        process = read_process(self._pid)
        while process is not None and time.monotonic() < deadline:
            waits = waiting_threads([process], self._inode, _SECONDS)
            if waits.threads:
                return waits.threads[0]
            for obstacle in waits.obstacles.values():
                permitted = obstacle is not Obstacle.NOT_PERMITTED
                raise _Missing(obstacle, "run the guard on plain Linux for x86-64 or arm64" if permitted else None)
            time.sleep(0.001)
        raise _Missing(_BLIND)

    def _have_a_stranger_look(self) -> None:
        """Raise _Missing if only an ancestor sees what the child does, which a guard seldom is of its clients.

        That is what Yama's ptrace_scope 1 means: ``Documentation/admin-guide/LSM/Yama.rst`` in the kernel.
        """
        if not _succeeds(_STRANGER, f"/proc/{self._pid}/syscall"):
            raise _Missing("only the threads of the guard's own children can be seen")


def _ptrace_remedy() -> str:
    """Say what gives ptrace rights over the processes of clients: ptrace(2), "Ptrace access mode checking"."""
    scope = _ptrace_scope()
    if scope >= 3:
        return f"reboot with kernel.yama.ptrace_scope below 3: it is {scope} and stays so until a reboot"
    if _has_capability(Right.CAP_SYS_PTRACE):
        return "allow ptrace(2) in the guard's sandbox: seccomp, AppArmor, SELinux"
    privilege = "run the guard as root with CAP_SYS_PTRACE (cap_add: [SYS_PTRACE] in compose)"
    return f"run sysctl kernel.yama.ptrace_scope=0 (it is {scope}), or {privilege}" if scope else privilege


def _ptrace_scope() -> int:
    """Read how far Yama restricts ptrace(2); 0 where it doesn't, or isn't in the kernel."""
    try:
        return int(Path("/proc/sys/kernel/yama/ptrace_scope").read_text())
    except (OSError, ValueError):
        return 0


def _has_capability(number: int) -> bool:
    """Tell whether the guard has a capability."""
    return number in rights()


@contextlib.contextmanager
def _tcp_connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Connect to ourselves; yields the client's end and the accepted one. Raises OSError."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname(), _SECONDS) as client,
        _accepted(listener) as accepted,
    ):
        yield client, accepted


@contextlib.contextmanager
def _unix_connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Connect to ourselves on a listener as the guard's are; yields both ends as above. Raises OSError."""
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        ask_for_credentials(listener)
        listener.bind("")  # an abstract address of the kernel's choice: unix(7), autobind
        listener.listen(1)
        client.connect(listener.getsockname())
        with _accepted(listener) as accepted:
            yield client, accepted


def _accepted(listener: socket.socket) -> socket.socket:
    listener.settimeout(_SECONDS)
    accepted = listener.accept()[0]
    accepted.settimeout(_SECONDS)
    return accepted


def _receive(accepted: socket.socket) -> int | None:
    """Read what one process has sent; returns its pid if the kernel says it. Raises OSError."""
    data, ancdata, _, _ = accepted.recvmsg(64, CREDENTIALS_SPACE)
    if not data:
        raise ConnectionError(errno.ECONNRESET, "it ended at once")
    return sender_pid(ancdata[0][2]) if ancdata else None


def _inode(sock: socket.socket) -> int:
    return os.fstat(sock.fileno()).st_ino


@contextlib.contextmanager
def _child(script: str, *arguments: str, stdin: int = subprocess.DEVNULL) -> Iterator[subprocess.Popen[bytes]]:
    """Start a script without the site's modules, which could say anything. Raises OSError."""
    with subprocess.Popen(  # noqa: S603 - our own scripts
        [sys.executable, "-I", "-S", "-c", script, *arguments],
        stdin=stdin,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as child:
        try:
            yield child
        finally:
            child.kill()


def _succeeds(script: str, *arguments: str) -> bool:
    try:
        with _child(script, *arguments) as child:
            return child.wait(_SECONDS) == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _expect(condition: bool) -> None:
    if not condition:
        raise _Missing(_BLIND)
