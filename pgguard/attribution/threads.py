"""Which threads of a process are blocked on one very socket, at this moment.

``/proc/PID/task/TID/syscall`` shows the system call that a thread is blocked in, with its arguments:
proc_pid_syscall(5). They hold the descriptor, point to a set of descriptors in the thread's memory (poll, select), or
name an epoll set that the kernel lists in ``/proc/PID/fdinfo``. A thread that runs shows none: whoever is found here is
asleep. The call is read again after everything that was concluded from it, and counts only if the thread hasn't run.

**How much a waiting thread says.** One that is blocked in a read, or in a poll of this socket alone, does nothing but
wait for it. One in an event loop waits for whatever comes: the socket is in its set whether or not an answer is
expected. :attr:`Waiting.others` tells them apart.

**Comparing.** Who waited before some bytes came, and who waits since? :class:`Thread` identifies a thread for good,
and :class:`Sleep` one stay of it in the kernel: who is found in the same sleep again hasn't run in between.

What isn't seen: a set within a set (an epoll set that is itself polled), splice(2), a thread that waits for another one
which reads for it, and one that is told by a signal. A descriptor that is closed and used anew while a thread is still
blocked on what it was before is taken for what it is now.
"""
# ruff: noqa: PTH208 - a process is pinned by an open directory, and paths relative to one are beyond Path

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import re
import socket
import struct
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum, auto
from pathlib import Path
from typing import NamedTuple

from pgguard.attribution.descriptors import link_to
from pgguard.attribution.evidence import Process
from pgguard.attribution.hangs import reading
from pgguard.attribution.processes import Stat, parse_stat
from pgguard.attribution.ruby.loading import ANSWERING

_SET_LIMIT = 4096
"""Descriptors of one set that are looked at: four times what select(2) can hold."""

_SLEEPERS = 32
"""Threads of one process whose sleeps are told apart."""
_LOOKED_AT = 1024
"""Threads of one process that are looked at one after the other, 100 µs each, where it takes all of them."""

_ATTEMPTS = 3
"""How often a thread is looked at that goes from one blocking call to another meanwhile."""

_FILE_SIZE = 8192
"""Bytes, more than any file has that is read at once."""

_UINT = 0xFFFFFFFF


class Thread(NamedTuple):
    """Identifies a thread for as long as the machine runs: pids and tids are reused, their start times differ."""

    pid: int
    started: int
    """The process's start, as in :class:`Process`."""
    tid: int
    thread_started: int
    """The thread's own start in the same unit: field 22 of ``/proc/PID/task/TID/stat``."""


class Sleep(NamedTuple):
    """Identifies the time from when a thread blocks until it runs again."""

    thread: Thread
    switches: int
    """How often it has blocked in its life: ``voluntary_ctxt_switches``, proc_pid_status(5)."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A thread that is blocked in a system call which the socket would end."""

    sleep: Sleep
    name: str
    """``/proc/PID/task/TID/comm``, which the thread can change."""
    call: str
    """The system call's name: ``recvfrom``, ``ppoll``…"""
    readable: bool
    """It waits for something to read, or for the end of the stream."""
    writable: bool
    """It waits for room to write."""
    others: int
    """How many other descriptors it waits for: with 0, it waits for this socket and nothing else.

    In a poll or select, pipes and eventfds don't count: with one of them a runtime wakes its own threads, as Ruby does
    one of those that wait (``rb_sigwait_fd_get`` in ``thread_pthread.c``).
    """

    within_libpq: bool = False
    """It polls for errors too, as only libpq's own wait for an answer does: ``pqSocketPoll()`` in ``fe-misc.c``."""

    @property
    def thread(self) -> Thread:
        """Who waits."""
        return self.sleep.thread

    @property
    def polls(self) -> bool:
        """It asks to be told when there is something to read, and reads then, or has somebody else read."""
        return self.call in _POLLING

    @property
    def when_read_from(self) -> Sleep:
        """The sleep that it is in, without having done anything, when the other end of a Unix socket has read once.

        There is room to write then, of which a thread that is blocked in a read is told as well: it wakes, finds
        nothing and blocks again (``unix_write_space()`` in ``net/unix/af_unix.c``). If it had done more it would have
        blocked more often. One that polls isn't woken for what it didn't ask for, and TCP tells nobody who reads.
        """
        reads = self.readable and _KINDS[self.call] is _Kind.READ
        return self.sleep._replace(switches=self.sleep.switches + 1) if reads else self.sleep

    @property
    def blocked(self) -> bool:
        """It waits to read from this socket and nothing else, as libpq does with poll(2), and others with recv(2).

        select(2) doesn't count: a thread may watch for notifications with it, as PostgreSQL's own examples do
        (``src/test/examples/testlibpq2.c``), and read only when it has its turn.
        """
        return self.readable and not self.others and self.call not in _WATCHING


class Obstacle(StrEnum):
    """Why it can't be told of all threads of a process whether they wait for the socket; a clause that stands alone."""

    NOT_PERMITTED = "the guard has no ptrace rights over it"
    """See ptrace(2), "Ptrace access mode checking": another user, a process that isn't dumpable, or Yama."""
    UNKNOWN_ABI = "it uses the system calls of another architecture than x86-64 or arm64"
    """A 32-bit process on a 64-bit kernel among others: the numbers of its system calls mean something else."""
    IO_URING = "a thread waits in io_uring_enter, and the kernel doesn't show what for"
    RESTARTED = "a thread's system call was interrupted, and the kernel doesn't show which one it will resume"
    LARGE_SET = f"a thread waits for more than {_SET_LIMIT} descriptors"
    UNREADABLE = "/proc doesn't show what its threads are doing"
    """A kernel or sandbox without ``/proc/PID/syscall``, or an epoll set listed without inodes (before Linux 4.13)."""
    OUT_OF_TIME = "it has too many threads to look at in the time available"


@dataclass(frozen=True, slots=True)
class Waits:
    """What one look at some processes has found."""

    threads: tuple[Waiting, ...] = ()
    """In the order of the processes, and within a process the oldest thread first, mostly."""
    obstacles: Mapping[int, Obstacle] = field(default_factory=dict)
    """By pid, why there may be more: the first reason met. A process that has ended is none: nobody waits there."""
    running: frozenset[int] = frozenset()
    """The pids of those of which a thread was seen to run, or to be about to."""

    @property
    def complete(self) -> bool:
        """No other thread of these processes was blocked on the socket."""
        return not self.obstacles


class _Kind(Enum):
    """What the arguments of a system call say it waits for."""

    READ = auto()
    """The first is a descriptor to read from."""
    WRITE = auto()
    """The first is a descriptor to write to."""
    POLL = auto()
    """An array of ``struct pollfd``, its length: poll(2)."""
    SELECT = auto()
    """One more than the highest descriptor, then three bitmaps: select(2)."""
    EPOLL = auto()
    """The first is the descriptor of an epoll set: epoll_wait(2)."""
    RESTART = auto()
    """Those of the call that is being resumed, after a stop by a signal or a tracer: restart_syscall(2)."""
    IO_URING = auto()
    """Nothing that can be read from outside."""


_KINDS = {
    "read": _Kind.READ,
    "readv": _Kind.READ,
    "preadv2": _Kind.READ,
    "recvfrom": _Kind.READ,
    "recvmsg": _Kind.READ,
    "recvmmsg": _Kind.READ,
    "write": _Kind.WRITE,
    "writev": _Kind.WRITE,
    "pwritev2": _Kind.WRITE,
    "sendto": _Kind.WRITE,
    "sendmsg": _Kind.WRITE,
    "sendmmsg": _Kind.WRITE,
    "poll": _Kind.POLL,
    "ppoll": _Kind.POLL,
    "select": _Kind.SELECT,
    "pselect6": _Kind.SELECT,
    "epoll_wait": _Kind.EPOLL,
    "epoll_pwait": _Kind.EPOLL,
    "epoll_pwait2": _Kind.EPOLL,
    "restart_syscall": _Kind.RESTART,
    "io_uring_enter": _Kind.IO_URING,
}

_POLLING = frozenset(name for name, kind in _KINDS.items() if kind is _Kind.POLL)
_WATCHING = frozenset(name for name, kind in _KINDS.items() if kind in {_Kind.SELECT, _Kind.EPOLL})

X86_64 = {
    0: "read",
    1: "write",
    7: "poll",
    19: "readv",
    20: "writev",
    23: "select",
    44: "sendto",
    45: "recvfrom",
    46: "sendmsg",
    47: "recvmsg",
    219: "restart_syscall",
    232: "epoll_wait",
    270: "pselect6",
    271: "ppoll",
    281: "epoll_pwait",
    299: "recvmmsg",
    307: "sendmmsg",
    327: "preadv2",
    328: "pwritev2",
    426: "io_uring_enter",
    441: "epoll_pwait2",
}
"""``arch/x86/entry/syscalls/syscall_64.tbl``. x32 sets bit 30 of its numbers, which therefore mean nothing here."""

AARCH64 = {
    22: "epoll_pwait",
    63: "read",
    64: "write",
    65: "readv",
    66: "writev",
    72: "pselect6",
    73: "ppoll",
    128: "restart_syscall",
    206: "sendto",
    207: "recvfrom",
    211: "sendmsg",
    212: "recvmsg",
    243: "recvmmsg",
    269: "sendmmsg",
    286: "preadv2",
    287: "pwritev2",
    426: "io_uring_enter",
    441: "epoll_pwait2",
}
"""``include/uapi/asm-generic/unistd.h``: the newer architectures never had poll, select and epoll_wait."""

SLEEPING_X86_64 = {
    34: "pause",
    35: "nanosleep",
    42: "connect",
    43: "accept",
    61: "wait4",
    65: "semop",
    70: "msgrcv",
    72: "fcntl",
    73: "flock",
    74: "fsync",
    75: "fdatasync",
    128: "rt_sigtimedwait",
    130: "rt_sigsuspend",
    202: "futex",
    208: "io_getevents",
    220: "semtimedop",
    230: "clock_nanosleep",
    243: "mq_timedreceive",
    247: "waitid",
    257: "openat",
    288: "accept4",
}
"""System calls that threads sleep in without waiting for a descriptor to read from, from the same tables."""

SLEEPING_AARCH64 = {
    4: "io_getevents",
    25: "fcntl",
    32: "flock",
    56: "openat",
    82: "fsync",
    83: "fdatasync",
    95: "waitid",
    98: "futex",
    101: "nanosleep",
    115: "clock_nanosleep",
    133: "rt_sigsuspend",
    137: "rt_sigtimedwait",
    183: "mq_timedreceive",
    188: "msgrcv",
    192: "semtimedop",
    193: "semop",
    202: "accept",
    203: "connect",
    242: "accept4",
    260: "wait4",
}

_WORD = struct.Struct("=Q")
"""Half of an entry of ``/proc/PID/auxv``, of a 64-bit program: proc_pid_auxv(5). The program's own file would say the
same, but may be in a file system that never answers."""
_AT_PHENT, _PHENT_64 = 4, 56
"""``linux/auxvec.h``: the size of a program header, that of a 64-bit program. An i386 or x32 one has 32."""
_ABIS = {"x86_64": X86_64, "aarch64": AARCH64}
"""Of 64-bit programs, by the machine."""
_NAMES = (X86_64 | SLEEPING_X86_64, AARCH64 | SLEEPING_AARCH64)

_SWAPPED = 62
"""The lower one of the two bits of a page that is in swap space or present."""

_POLLFD = struct.Struct("=ihh")
"""``struct pollfd``: descriptor, events waited for, events returned. poll(2)."""
_POLLIN = 0x001 | 0x040
"""POLLIN, POLLRDNORM; EPOLLIN and EPOLLRDNORM are the same: ``asm-generic/poll.h``, ``linux/eventpoll.h``."""
_POLLOUT = 0x004 | 0x100
"""POLLOUT, POLLWRNORM; EPOLLOUT and EPOLLWRNORM likewise."""
_POLLERR = 0x008

_TARGET = re.compile(rb"^tfd: *\d+ events: *([0-9a-f]+) .* ino:([0-9a-f]+) sdev:([0-9a-f]+)$", re.MULTILINE)
"""A line of an epoll set's fdinfo: proc_pid_fdinfo(5). The number is the one that the descriptor had when it was added,
perhaps in another process; the inode is that of the file itself. All in hexadecimal but the number."""
_TARGET_SIZE = 128
"""Bytes, more than such a line has."""

_RUNNING = b"running"
"""What ``/proc/PID/task/TID/syscall`` says of a thread that isn't blocked: proc_pid_syscall(5)."""

_WAKERS = ("pipe:", "anon_inode:[eventfd]")
"""What the links of descriptors begin with by which threads are woken: proc_pid_fd(5)."""

_SWITCHES = re.compile(rb"^voluntary_ctxt_switches:\t(\d+)$", re.MULTILINE)


class _Call(NamedTuple):
    name: str
    kind: _Kind
    args: tuple[int, ...]


class _Events(NamedTuple):
    """What of a descriptor a thread waits for."""

    readable: bool
    writable: bool
    errors: bool = False
    """It asks for errors as well, which it would be told of anyway: poll(2)."""


class _Watched(NamedTuple):
    """One of the descriptors that a thread waits for."""

    is_socket: bool
    """It is the socket that is asked about."""
    events: _Events
    wakes: bool = False
    """It is a pipe or an eventfd."""


class _Unclear(Exception):
    def __init__(self, obstacle: Obstacle) -> None:
        super().__init__(obstacle)
        self.obstacle = obstacle


def waiting_threads(processes: Iterable[Process], inode: int, seconds: float = 0.02) -> Waits:
    """Look which threads of ``processes`` are blocked on a socket right now.

    For worker threads: it reads ``/proc``, for 20 µs a thread, 100 µs more for one that waits on the socket, and 5 µs
    more for each descriptor in a set. It waits for nobody, and the processes don't notice.

    Args:
        processes: those that may have the socket open. Whoever has by now the pid of one that is gone isn't taken
            for it.
        inode: the socket's. It is found under whatever descriptors it is open.
        seconds: at most, for all together; where time was too short, that is an obstacle.
    """
    deadline = time.monotonic() + seconds
    threads: list[Waiting] = []
    obstacles: dict[int, Obstacle] = {}
    running: set[int] = set()
    for process in processes:
        look = _Look(process, inode, deadline)
        threads += look.threads()
        if look.obstacle is not None:
            obstacles[process.pid] = look.obstacle
        if look.runs:
            running.add(process.pid)
    return Waits(tuple(threads), obstacles, frozenset(running))


def has_one_thread(process: Process) -> bool:
    """Whether a process has a single thread at this moment, but for one that answers the guard."""
    return len(_of_its_own(process.pid, _tids(process.pid))) == 1


def only_thread(process: Process) -> Sleep | None:
    """Identify the sleep that the only thread of a process is in; ``None`` if it has several, runs, or has ended.

    ``None`` too if the process has had another thread, which may have done what is looked into before it ended. One
    that answers the guard doesn't count.
    """
    tids = _tids(process.pid)
    own = _of_its_own(process.pid, tids)
    if len(own) != 1:
        return None
    sleep = find_sleep(process.pid, process.started, int(own[0]))
    return sleep if sleep is not None and _have_been_alone(process.pid, tids) else None


def _have_been_alone(pid: int, tids: Collection[str]) -> bool:
    """Whether these are the only threads that a process has ever had; False too if that can't be seen.

    A thread can hardly run without a page fault, on its new stack for one. A process's count of them keeps those of the
    threads that have ended: ``__exit_signal()`` in ``kernel/exit.c``, ``do_task_stat()`` in ``fs/proc/array.c``.
    """
    try:
        *threads, process = (
            parse_stat(Path(f"/proc/{pid}/{stat}").read_bytes())
            for stat in (*(f"task/{tid}/stat" for tid in tids), "stat")
        )
    except OSError:
        return False
    return sum(thread.minor_faults for thread in threads) == process.minor_faults


def all_asleep(process: Process) -> bool:
    """Whether all threads of a process are blocked at the same moment.

    False too when that can't be seen, when the process has ended, and when it has very many.
    """
    # They are seen one after the other, twice: who is in the same sleep again was asleep when the others were seen.
    if len(_tids(process.pid)) > _LOOKED_AT:
        return False
    first, second = ([find_sleep(process.pid, process.started, int(tid)) for tid in _tids(process.pid)] for _ in "12")
    return bool(first) and None not in first and first == second


def sleeps_of(process: Process) -> frozenset[Sleep]:
    """Identify the sleeps of all threads of a process that are blocked, one after the other.

    Takes 100 µs a thread; of a process that has very many, none is returned.
    """
    tids = _tids(process.pid)
    if len(tids) > _SLEEPERS:
        return frozenset()
    sleeps = (find_sleep(process.pid, process.started, int(tid)) for tid in tids)
    return frozenset(sleep for sleep in sleeps if sleep is not None)


def restless_threads(process: Process, sleeps: Collection[Sleep]) -> dict[int, Sleep | None]:
    """Tell which threads of a process are not in one of these sleeps, as they have run, or are new.

    Returns:
        By tid, the sleep that each is in now, ``None`` if it runs; empty if the process is gone, or has very many.
    """
    tids = _tids(process.pid)
    if len(tids) > _LOOKED_AT:
        return {}
    tids = _of_its_own(process.pid, tids)
    now = {int(tid): find_sleep(process.pid, process.started, int(tid)) for tid in tids}
    return {tid: sleep for tid, sleep in now.items() if sleep not in sleeps}


def system_call(sleep: Sleep) -> str | None:
    """Name the system call that a thread is blocked in, whatever it waits for; ``None`` if it can't be told.

    That is so too if the thread has run since it was seen in this sleep.
    """
    thread = sleep.thread
    try:
        directory = os.open(f"/proc/{thread.pid}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            calls = _system_calls(thread.pid, directory, [str(thread.tid)])
            number = _Task(directory, thread.pid, thread.tid).read("syscall").partition(b" ")[0]
        finally:
            os.close(directory)
    except (OSError, _Unclear):
        return None
    names = next((names for names in _NAMES if calls and calls.items() <= names.items()), {})
    name = names.get(int(number)) if number.isdigit() else None
    return name if sleeps_still(sleep) else None


def sleeps_still(sleep: Sleep) -> bool:
    """Whether a thread has been asleep ever since it was seen in this sleep."""
    thread = sleep.thread
    return find_sleep(thread.pid, thread.started, thread.tid) == sleep


def _tids(pid: int) -> list[str]:
    try:
        return os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []


def _of_its_own(pid: int, tids: list[str]) -> list[str]:
    """Leave out the thread that answers the guard: its process runs nothing else in it."""
    return [tid for tid in tids if tid == str(pid) or _thread_name(pid, tid) != ANSWERING] if len(tids) > 1 else tids


def _thread_name(pid: int, tid: str) -> str | None:
    try:
        return Path(f"/proc/{pid}/task/{tid}/comm").read_text(errors="replace").rstrip("\n")
    except OSError:
        return None


def epoll_watches(pid: int, fd: int, inode: int) -> bool | None:
    """Whether an epoll set, the descriptor ``fd`` of a process, watches a socket for something to read.

    ``None`` if that can't be told. It says so also while no thread waits on the set. A descriptor that was added for
    one event and has had it isn't watched any more: EPOLLONESHOT, epoll_ctl(2).
    """
    try:
        directory = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            watched = _epoll_set(_Task(directory, pid, pid), fd, inode)
        finally:
            os.close(directory)
    except (OSError, _Unclear):
        return None
    return any(one.is_socket and one.events.readable for one in watched)


def find_sleep(pid: int, started: int, tid: int) -> Sleep | None:
    """Identify the sleep that a thread is in at this moment, whatever it waits for.

    ``None`` if it runs, has ended, or can't be looked at; and if the process didn't start at ``started``, as in
    :class:`Process`, and so is another one. Takes 100 µs.
    """
    try:
        directory = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            task = _Task(directory, pid, tid)
            if _identity(_Task(directory, pid, pid)).started != started:
                return None
            sleep = Sleep(Thread(pid, started, tid, _identity(task).started), _count_switches(task))
            # If it has run since the count was read it is another sleep, and none if it runs still.
            asleep = not task.read("syscall").startswith(_RUNNING) and _count_switches(task) == sleep.switches
        finally:
            os.close(directory)
    except (OSError, _Unclear):
        return None
    return sleep if asleep else None


class _Task:
    """A thread's files in ``/proc``, reached through a descriptor of its process's directory."""

    def __init__(self, directory: int, pid: int, tid: int) -> None:
        self.pid = pid
        self.tid = tid
        self._directory = directory
        self._path = f"task/{tid}/"

    def read(self, name: str, size: int = _FILE_SIZE) -> bytes:
        """Read a file that the kernel gives in one piece."""
        with self.opened(name) as file:
            return os.read(file, size)

    def read_all(self, name: str, limit: int) -> bytes | None:
        """Read a file of any size; ``None`` if it is larger than ``limit``."""
        content = b""
        with self.opened(name) as file:
            while part := os.read(file, limit):
                content += part
                if len(content) > limit:
                    return None
        return content

    def link(self, name: str) -> str:
        return os.readlink(self._path + name, dir_fd=self._directory)

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[int]:
        file = os.open(self._path + name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._directory)
        try:
            yield file
        finally:
            os.close(file)


class _Look:
    """One look at one process, through a descriptor of its directory in ``/proc``: that never becomes another's."""

    def __init__(self, process: Process, inode: int, deadline: float) -> None:
        self.obstacle: Obstacle | None = None
        """What kept it from seeing everything; the first thing, if there were several."""
        self.runs = False
        """A thread has been seen to run."""
        self._process = process
        self._inode = inode
        self._deadline = deadline
        self._others: dict[int, str] = {}
        """Descriptors that were something else a moment ago, not to be looked at again for each thread."""

    def threads(self) -> list[Waiting]:
        """Find those that wait; none, and no obstacle, if the process has ended."""
        found: list[Waiting] = []
        try:
            directory = os.open(f"/proc/{self._process.pid}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                if _identity(_Task(directory, self._process.pid, self._process.pid)).started == self._process.started:
                    self._collect(directory, found)
            finally:
                os.close(directory)
        except (FileNotFoundError, ProcessLookupError):
            if _is_hidden(self._process.pid):
                self._note(Obstacle.NOT_PERMITTED)
        except PermissionError:
            self._note(Obstacle.NOT_PERMITTED)
        except OSError:
            self._note(Obstacle.UNREADABLE)
        except _Unclear as unclear:
            self._note(unclear.obstacle)
        return found

    def _collect(self, directory: int, found: list[Waiting]) -> None:
        tids = _list_tasks(directory)
        calls = _system_calls(self._process.pid, directory, tids)
        shown = False
        for tid in tids:
            if time.monotonic() > self._deadline:
                raise _Unclear(Obstacle.OUT_OF_TIME)
            try:
                waiting = self._examine(_Task(directory, self._process.pid, int(tid)), calls)
            except (FileNotFoundError, ProcessLookupError):
                continue
            except _Unclear as unclear:
                self._note(unclear.obstacle)
            else:
                if waiting is not None:
                    found.append(waiting)
            shown = True
        if not shown:
            # Raises if the process has ended, as is likely.
            _identity(_Task(directory, self._process.pid, self._process.pid))
            raise _Unclear(Obstacle.UNREADABLE)

    def _examine(self, task: _Task, calls: Mapping[int, str]) -> Waiting | None:
        # Most threads wait for something else. That they do needs no proof, as it accuses nobody.
        line = task.read("syscall")
        self.runs = self.runs or line.startswith(_RUNNING)
        call = _parse(line, calls)
        if call is None or not self._concerns(call, task):
            return None
        for _ in range(_ATTEMPTS):
            switches, line = _count_switches(task), task.read("syscall")
            call = _parse(line, calls)
            if call is None:
                return None
            problem = None
            watched: list[_Watched] = []
            try:
                call, watched = self._watched(call, task)
            except _Unclear as unclear:
                problem = unclear
            identity = _identity(task)
            # The same line again may be the next call on the same set; with the same count it is not.
            if (_count_switches(task), task.read("syscall")) != (switches, line):
                continue
            if problem is not None:
                raise problem
            thread = Thread(self._process.pid, self._process.started, task.tid, identity.started)
            return _conclude(Sleep(thread, switches), identity.name, call.name, watched)
        return None

    def _concerns(self, call: _Call, task: _Task) -> bool:
        """True if a call may be waiting for the socket."""
        try:
            _, watched = self._watched(call, task)
        except _Unclear:
            return True
        return any(one.is_socket for one in watched)

    def _watched(self, call: _Call, task: _Task) -> tuple[_Call, list[_Watched]]:
        """Tell which call it really is, and list what it waits for, each descriptor once. Raises _Unclear."""
        if call.kind is _Kind.RESTART:
            call = _resumed(call, task)
        match call.kind:
            case _Kind.READ:
                wanted = {_int(call.args[0]): _Events(readable=True, writable=False)}
            case _Kind.WRITE:
                wanted = {_int(call.args[0]): _Events(readable=False, writable=True)}
            case _Kind.POLL:
                wanted = _poll_set(task, *call.args[:2])
            case _Kind.SELECT:
                wanted = _select_set(task, *call.args[:4])
            case _Kind.EPOLL:
                return call, _epoll_set(task, _int(call.args[0]), self._inode)
            case _Kind.IO_URING:
                raise _Unclear(Obstacle.IO_URING)
            case _:
                return call, []
        return call, [self._identified(task, fd, events) for fd, events in wanted.items()]

    def _identified(self, task: _Task, fd: int, events: _Events) -> _Watched:
        link = self._others.get(fd)
        if link is None:
            try:
                link = task.link(f"fd/{fd}")
            except FileNotFoundError:
                link = ""
            if link == link_to(self._inode):
                return _Watched(True, events)
            self._others[fd] = link
        return _Watched(False, events, link.startswith(_WAKERS))

    def _note(self, obstacle: Obstacle) -> None:
        if self.obstacle is None:
            self.obstacle = obstacle


def _conclude(sleep: Sleep, name: str, call: str, watched: list[_Watched]) -> Waiting | None:
    asked = [one.events for one in watched if one.is_socket]
    readable = any(events.readable for events in asked)
    writable = any(events.writable for events in asked)
    if not readable and not writable:
        return None
    others = sum(not one.is_socket and not one.wakes for one in watched)
    return Waiting(sleep, name, call, readable, writable, others, any(events.errors for events in asked))


def _system_calls(pid: int, directory: int, tids: Iterable[str]) -> Mapping[int, str]:
    """Return the numbers of the system calls of interest, for the program that the process runs. Raises _Unclear."""
    for tid in tids:
        # A main thread may have ended and left the process to the others; it then shows no program.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            vector = _Task(directory, pid, int(tid)).read("auxv")
            words = [word for (word,) in _WORD.iter_unpack(vector[: len(vector) // 16 * 16])]
            entries = dict(zip(words[::2], words[1::2], strict=True))
            calls = _ABIS.get(os.uname().machine) if entries.get(_AT_PHENT) == _PHENT_64 else None
            if calls is None:
                raise _Unclear(Obstacle.UNKNOWN_ABI)
            return calls
    return {}


def _parse(line: bytes, calls: Mapping[int, str]) -> _Call | None:
    """Decode a line of ``/proc/PID/task/TID/syscall``; ``None`` for a call that can't be waiting for a socket.

    It is ``running``, or ``-1`` and two addresses for a thread that is blocked elsewhere than in a system call, or
    the number of the call, six arguments, stack pointer and program counter: proc_pid_syscall(5).
    """
    number, *args = line.split()
    name = calls.get(int(number)) if number.isdigit() else None
    if name is None:
        return None
    return _Call(name, _KINDS[name], tuple(int(arg, 16) for arg in args[:6]))


def _resumed(call: _Call, task: _Task) -> _Call:
    """Tell what restart_syscall resumes; itself if that waits for no descriptor. Raises _Unclear.

    The arguments are still those of the call, its number is not. Only a poll, a sleep and a futex's wait with a
    time-out are ever resumed like this: the callers of ``set_restart_fn`` in the kernel. ``/proc/PID/wchan`` has the
    function that the thread sleeps in: poll_schedule_timeout, hrtimer_nanosleep, futex_wait_queue.
    """
    function = task.read("wchan")
    if function in {b"", b"0"}:
        raise _Unclear(Obstacle.RESTARTED)
    return _Call("poll", _Kind.POLL, call.args) if b"poll" in function else call


def _poll_set(task: _Task, address: int, count: int) -> dict[int, _Events]:
    count &= _UINT
    masks: dict[int, int] = {}
    for fd, events, _ in _POLLFD.iter_unpack(_memory(task, address, count, _POLLFD.size)):
        if fd >= 0:  # a negative one is to be ignored: poll(2)
            masks[fd] = masks.get(fd, 0) | events
    return {
        fd: _Events(bool(mask & _POLLIN), bool(mask & _POLLOUT), bool(mask & _POLLERR)) for fd, mask in masks.items()
    }


def _select_set(task: _Task, count: int, *addresses: int) -> dict[int, _Events]:
    count = max(0, _int(count))
    # Bitmaps of whole longs, fd 0 in the lowest bit: on a little-endian machine they are in the order of their bytes.
    # The number may be any; without a bitmap nobody has to have made room for it.
    longs = -(-count // 64) if any(addresses) else 0
    sets = [_memory(task, address, longs, 8) if address else bytes(longs * 8) for address in addresses]
    found: dict[int, _Events] = {}
    for at, (readable, writable, exceptional) in enumerate(zip(*sets, strict=True)):
        either = readable | writable | exceptional
        for bit in range(8) if either else ():
            if either >> bit & 1 and at * 8 + bit < count:
                found[at * 8 + bit] = _Events(bool(readable >> bit & 1), bool(writable >> bit & 1))
    if len(found) > _SET_LIMIT:
        raise _Unclear(Obstacle.LARGE_SET)
    return found


def _memory(task: _Task, address: int, count: int, size: int) -> bytes:
    """Read ``count`` things of ``size`` from a thread's memory. Raises _Unclear."""
    if not count:
        return b""
    if count * size > _SET_LIMIT * _POLLFD.size:
        raise _Unclear(Obstacle.LARGE_SET)
    try:
        with reading(task.pid):
            _check_presence(task, address, count * size)
            with task.opened("mem") as memory:
                content = os.pread(memory, count * size, address)
    except (PermissionError, ProcessLookupError, FileNotFoundError):
        raise
    except (OverflowError, OSError):
        content = b""
    if len(content) < count * size:
        raise _Unclear(Obstacle.UNREADABLE)
    return content


def _check_presence(task: _Task, address: int, size: int) -> None:
    """Raises _Unclear unless the pages are in memory, or in swap space.

    A system call has just read them, so they are, unless the process has let go of them since: they would have to come
    from a file then, which may be in a file system that never answers. The high bits of ``/proc/PID/pagemap`` say so:
    ``Documentation/admin-guide/mm/pagemap.rst``.
    """
    first, last = address // mmap.PAGESIZE, (address + size - 1) // mmap.PAGESIZE
    with task.opened("pagemap") as pagemap:
        content = os.pread(pagemap, (last - first + 1) * _WORD.size, first * _WORD.size)
    pages = [page for (page,) in _WORD.iter_unpack(content[: len(content) // 8 * 8])]
    if len(pages) != last - first + 1 or not all(page >> _SWAPPED & 3 for page in pages):
        raise _Unclear(Obstacle.UNREADABLE)


def _epoll_set(task: _Task, fd: int, inode: int) -> list[_Watched]:
    """List what an epoll set watches. Raises _Unclear."""
    with reading(task.pid):
        lines = task.read_all(f"fdinfo/{fd}", _SET_LIMIT * _TARGET_SIZE)
    if lines is None:
        raise _Unclear(Obstacle.LARGE_SET)
    targets = _TARGET.findall(lines)
    if len(targets) < lines.count(b"tfd:"):
        raise _Unclear(Obstacle.UNREADABLE)
    socket_file = inode, _socket_device()
    watched = []
    for mask, target_inode, device in targets:
        events = int(mask, 16)
        is_socket = (int(target_inode, 16), int(device, 16)) == socket_file
        watched.append(_Watched(is_socket, _Events(bool(events & _POLLIN), bool(events & _POLLOUT))))
    return watched


@functools.cache
def _socket_device() -> int:
    """Return the device number that every socket has, as the kernel writes it: ``MKDEV`` in ``linux/kdev_t.h``."""
    with socket.socket(socket.AF_UNIX) as one:
        device = os.fstat(one.fileno()).st_dev
    return os.major(device) << 20 | os.minor(device)


def _identity(task: _Task) -> Stat:
    """Read who a thread is. A process starts with its main thread."""
    return parse_stat(task.read("stat"))


def _count_switches(task: _Task) -> int:
    found = _SWITCHES.search(task.read("status"))
    if found is None:
        raise _Unclear(Obstacle.UNREADABLE)
    return int(found[1])


def _is_hidden(pid: int) -> bool:
    """True if there is such a process, though ``/proc`` doesn't show it: ``hidepid``, proc(5)."""
    try:
        os.kill(pid, 0)  # sends nothing: kill(2)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _int(argument: int) -> int:
    """Return an argument of type int: the kernel ignores the upper half of its register."""
    argument &= _UINT
    return argument - (1 << 32) if argument >> 31 else argument


def _list_tasks(directory: int) -> list[str]:
    tasks = os.open("task", os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        return os.listdir(tasks)
    finally:
        os.close(tasks)
