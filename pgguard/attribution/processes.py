"""Processes as ``/proc`` shows them, and a memory of how they were last seen.

A pid alone names nobody for long, because pids are reused; a pid together with its start time does. Everything
here hands out and compares both.
"""

from __future__ import annotations

import functools
import os
import re
import threading
import time
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from pgguard.attribution.containers import find_place
from pgguard.attribution.evidence import Process
from pgguard.attribution.hangs import reading

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
"""The unit of the times in ``/proc/PID/stat``: sysconf(3)."""

CMDLINE_LIMIT = 4096
"""Bytes of a command line that are kept; the kernel allows some two million."""

_PF_KTHREAD = 0x00200000
"""The flag of kernel threads in field 9 of ``/proc/PID/stat``: ``include/linux/sched.h``."""

_NAMESPACE_PIDS = re.compile(rb"^NSpid:((?:\t\d+)+)$", re.MULTILINE)
"""In ``/proc/PID/status``: the process's pid in the pid namespace of ``/proc``, then in each namespace nested within
it, down to the process's own. proc_pid_status(5)."""

_REMEMBERED = 1024
"""Processes that a :class:`ProcessBook` remembers unless told otherwise: about a megabyte of ordinary ones."""


class Stat(NamedTuple):
    """The fields of ``/proc/PID/stat`` that attribution needs: proc_pid_stat(5)."""

    name: str
    """Field 2, the same as ``/proc/PID/comm``."""
    state: str
    """Field 3."""
    ppid: int
    """Field 4; 0 if the parent lives outside of this pid namespace."""
    flags: int
    """Field 9."""
    minor_faults: int
    """Field 10: a thread's own; of a process those of all its threads, the ones that have ended too."""
    threads: int
    """Field 20."""
    started: int
    """Field 22, clock ticks between boot and the process's start."""
    exit_status: int
    """Field 52, as waitpid(2) has it; 0 for those who may not trace the process."""

    @property
    def holds_no_files(self) -> bool:
        """True for a kernel thread, and for a process that has ended: neither has a file open."""
        return bool(self.flags & _PF_KTHREAD) or self.state in "ZXx"


def read_stat(pid: int) -> Stat | None:
    """Read ``/proc/PID/stat``; ``None`` if there is no such process.

    Raises:
        PermissionError: ``/proc`` is mounted with ``hidepid`` and the process is another user's.
    """
    try:
        line = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return parse_stat(line)


def parse_stat(line: bytes) -> Stat:
    """Decode the content of ``/proc/PID/stat``, or of a thread's ``/proc/PID/task/TID/stat``."""
    # The name is put in parentheses and may itself hold spaces and parentheses, but what follows it can't.
    name, rest = line[line.index(b"(") + 1 :].rsplit(b")", 1)
    fields = rest.split()
    return Stat(
        name=name.decode(errors="replace"),
        state=fields[0].decode(),
        ppid=int(fields[1]),
        flags=int(fields[6]),
        minor_faults=int(fields[7]),
        threads=int(fields[17]),
        started=int(fields[19]),
        exit_status=int(fields[49]),
    )


def read_process(pid: int) -> Process | None:
    """Read who ``pid`` is now; ``None`` if there is no such process, or ``/proc`` doesn't show it to us.

    What is returned belongs to one process: if the pid changes hands while it is being read, it is read again. It
    may be a zombie, which has a name and a parent but no command line any more. Costs about 60 µs, and 20 µs more if
    it is in another pid namespace.
    """
    try:
        stat = read_stat(pid)
        while stat is not None:
            with reading(pid), Path(f"/proc/{pid}/cmdline").open("rb") as file:
                cmdline = file.read(CMDLINE_LIMIT)
            namespace_pid = _read_namespace_pid(pid)
            after = read_stat(pid)
            if after is not None and after.started == stat.started:
                return _process(pid, after, cmdline, namespace_pid)
            stat = after
    except OSError:
        pass
    return None


def _read_namespace_pid(pid: int) -> int | None:
    """Read a process's pid in its own pid namespace; ``None`` if that is the guard's. Raises OSError."""
    link = f"/proc/{pid}/ns/pid"
    try:
        # Nearly every process is in the guard's own, and this takes a quarter of the time that the list takes.
        if os.readlink(link) == _own_pid_namespace():  # noqa: PTH115 - a Path would double the time
            return None
    except OSError:
        pass  # it needs ptrace rights, which the list doesn't
    found = _NAMESPACE_PIDS.search(Path(f"/proc/{pid}/status").read_bytes())
    pids = found[1].split() if found is not None else []
    return int(pids[-1]) if len(pids) > 1 else None


@functools.cache
def _own_pid_namespace() -> str:
    """Return what the guard's own link says; a process never leaves its pid namespace: pid_namespaces(7)."""
    return str(Path("/proc/self/ns/pid").readlink())


def _process(pid: int, stat: Stat, cmdline: bytes, namespace_pid: int | None) -> Process:
    # A process that sets its title overwrites its arguments and leaves the rest of their room zeroed or blank.
    text = cmdline.rstrip(b"\0 ").decode(errors="replace")
    return Process(
        pid=pid,
        started=stat.started,
        started_at=_boot.time() + stat.started / TICKS_PER_SECOND,
        name=stat.name,
        cmdline=tuple(text.split("\0")) if text else (),
        ppid=stat.ppid or None,
        namespace_pid=namespace_pid,
    )


class _Boot:
    """When the machine was booted, in seconds since the epoch.

    The kernel's own figure (``btime`` in ``/proc/stat``) is cut to whole seconds. This one stays the same from call
    to call, so that a process is given one start time, until somebody sets the clock.
    """

    def __init__(self) -> None:
        self._at = 0.0

    def time(self) -> float:
        at = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
        if abs(at - self._at) > 1:
            self._at = at
        return self._at


_boot = _Boot()


class ProcessBook:
    """Remembers processes as they were last seen, so that they can be named when they are gone.

    It is found out once of each in which container it runs. Thread-safe. Holds the ``limit`` most recently seen
    processes and forgets the others.
    """

    def __init__(self, limit: int = _REMEMBERED) -> None:
        self._limit = limit
        self._seen: OrderedDict[tuple[int, int], Process] = OrderedDict()
        self._lock = threading.Lock()

    def look(self, pid: int) -> Process | None:
        """Read who ``pid`` is now, and remember it; ``None`` if it is gone, whoever it may have been before."""
        process = read_process(pid)
        if process is None:
            return None
        with self._lock:
            before = self._seen.get((pid, process.started))
        if before is None:
            container, pod = find_place(pid)
            after = read_stat(pid) if container is not None or pod is not None else None
            if after is not None and after.started == process.started:
                process = replace(process, container=container, pod=pod)
        else:
            process = replace(process, container=before.container, pod=before.pod)
        return self._remember(process)

    def refresh(self, process: Process) -> Process:
        """Return ``process`` as it is now, or as it was last seen if it is gone or its pid is another's by now."""
        now = self.look(process.pid)
        if now is not None and now.started == process.started:
            return now
        with self._lock:
            return self._seen.get((process.pid, process.started), process)

    def _remember(self, process: Process) -> Process:
        key = (process.pid, process.started)
        with self._lock:
            before = self._seen.get(key)
            if before is not None and not process.cmdline:
                # It has become a zombie; what it had been called is still the best name for it.
                process = replace(process, cmdline=before.cmdline)
            if process == before:
                process = before  # one object, of a kilobyte, for all who keep it
            self._seen[key] = process
            self._seen.move_to_end(key)
            if len(self._seen) > self._limit:
                self._seen.popitem(last=False)
        return process
