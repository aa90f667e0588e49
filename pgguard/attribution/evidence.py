"""The values that attribution hands out: who, and how that is known."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, NamedTuple

Attribution = Literal["auto", "ebpf", "proc", "off"]
"""How it is to be found out who: with all evidence that there is; so, but not without the kernel's, or without that of
processes; or not at all."""


class Evidence(StrEnum):
    """How a process was tied to a connection, strongest first."""

    KERNEL_SENDER = "kernel-sender"
    """The kernel named the sender of exactly these bytes. On a Unix socket a sender with CAP_SYS_ADMIN can have it name
    another: :mod:`pgguard.attribution.senders`."""
    SOLE_HOLDER = "sole-holder"
    """Only this process has the socket open."""
    THREAD_SAMPLE = "thread-sample"
    """This thread was seen waiting on the socket at that moment."""
    SOCKET_HOLDER = "socket-holder"
    """One of several processes that have the socket open."""
    ONLY_THREAD = "only-thread"
    """Of a thread: its process, which is known for one of the reasons above, has no other, or none that can have done
    it."""
    DECLARED = "declared"
    """The client said so: ``application_name`` or an SQL comment."""
    UNKNOWN = "unknown"


class Driver(StrEnum):
    """What a client speaks PostgreSQL's protocol with, as far as what it runs and what it says about itself tell.

    Those of a language stand for all of its drivers that nothing tells apart.
    """

    LIBPQ = "libpq"
    ASYNCPG = "asyncpg"
    PYTHON = "python"
    """A Python interpreter without libpq: pg8000 for one."""
    PGJDBC = "pgjdbc"
    JAVA = "java"
    NODE_POSTGRES = "node-postgres"
    POSTGRES_JS = "postgres.js"
    NODE = "node"
    DOTNET = "dotnet"
    LIB_PQ = "lib/pq"
    """Go's, which has nothing of libpq."""
    PGX = "pgx"
    GO = "go"
    TOKIO_POSTGRES = "tokio-postgres"
    UNKNOWN = "unknown"


class Container(NamedTuple):
    """A container that a process runs in."""

    id: str
    """As its runtime calls it: 64 hexadecimal digits."""
    runtime: str | None
    """``docker``, ``containerd``, ``cri-o`` or ``podman``; ``None`` if its control group's name doesn't tell."""


class Pod(NamedTuple):
    """A pod of Kubernetes that a process runs in; what isn't known is ``None``."""

    name: str | None = None
    namespace: str | None = None
    uid: str | None = None
    node: str | None = None
    """The name of the machine."""


@dataclass(frozen=True, slots=True)
class Process:
    """A process as it was when it was last looked at; ``(pid, started)`` identifies it, as pids are reused."""

    pid: int
    """In the guard's own pid namespace."""
    started: int
    """Clock ticks between boot and its start: field 22 of ``/proc/PID/stat``, proc_pid_stat(5)."""
    started_at: float
    """The same in seconds since the epoch."""
    name: str
    """``/proc/PID/comm``."""
    cmdline: tuple[str, ...]
    """Empty for a kernel thread or a zombie."""
    ppid: int | None
    namespace_pid: int | None = None
    """Its pid as it and its logs know it, in its own pid namespace; ``None`` if that is the guard's own, as it is
    outside of containers."""
    container: Container | None = None
    """The innermost one that it runs in; ``None`` if it runs in none, or that can't be told."""
    pod: Pod | None = None
    """Likewise."""
