"""What the guard may do that others may not: its user and its Linux capabilities, and how it gives up most of them.

A guard that is started as root needs root's rights to begin: for ports below 1024, for sockets in other users'
directories, for the kernel's probe. Once it runs it only looks, and for that two capabilities do: CAP_SYS_PTRACE, for
what ``/proc`` shows of other users' processes, and CAP_DAC_READ_SEARCH, for the directories and files there that belong
to these users. capabilities(7)

**Capabilities are each thread's own**, and a thread takes over those of the one that has started it. So what the first
thread gives up while it is the only one, everybody has given up. The C library makes all threads follow when the user
is changed (nptl(7)), but nobody does so for capabilities.

**What is started** (py-spy, the checks' own children) gets what the guard has and nothing more: a program that root
executes would otherwise get everything back, and one that an ordinary user executes would get nothing. So the bounding
set is cut down, what is kept is made ambient for an ordinary user, and no_new_privs is set, so that no set-user-ID
program changes that: prctl(2).

**Nobody else gets in.** A process with capabilities can only be traced by one that has them too: ptrace(2). It isn't
dumpable any more, so that what passes through its memory is in no core file.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path


class Right(IntEnum):
    """The capabilities that something in the guard takes: ``linux/capability.h``."""

    CAP_DAC_OVERRIDE = 1
    CAP_DAC_READ_SEARCH = 2
    CAP_SETPCAP = 8
    CAP_NET_ADMIN = 12
    CAP_SYS_PTRACE = 19
    CAP_SYS_ADMIN = 21
    CAP_PERFMON = 38
    CAP_BPF = 39


LOOKING = frozenset({Right.CAP_SYS_PTRACE, Right.CAP_DAC_READ_SEARCH})
"""What takes a look at other users' processes."""

ENTERING = frozenset({Right.CAP_SYS_ADMIN})
"""What enters their network namespaces: setns(2)."""

LOADING = frozenset({Right.CAP_BPF, Right.CAP_NET_ADMIN, Right.CAP_PERFMON})
"""What loads the kernel's probe, and isn't needed any more when it is there: bpf(2)."""

TELLING = frozenset({Right.CAP_NET_ADMIN})
"""What has the kernel tell of forks, before Linux 6.6, and isn't needed any more when it does:
:mod:`pgguard.attribution.forks`."""

_VERSION = 0x20080522
"""``_LINUX_CAPABILITY_VERSION_3``: two halves of 32 bits."""
_HEADER = struct.Struct("=Ii")
_SETS = struct.Struct("=6I")
"""``struct __user_cap_data_struct``, twice: effective, permitted and inheritable, the lower half of each first."""
_HIGHEST = 63
"""More than any kernel has."""

# linux/prctl.h
_PR_SET_DUMPABLE = 4
_PR_SET_KEEPCAPS = 8
_PR_CAPBSET_READ = 23
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_RAISE = 2

_ALONE = 2.0
"""Seconds for which it is waited for threads to end."""


class RightsError(Exception):
    """Rights can't be given up; the message is a clause that says why."""


@dataclass(frozen=True, slots=True)
class Account:
    """An ordinary user."""

    name: str
    uid: int
    gid: int


class _Sets:
    """The capabilities of the calling thread, as bits."""

    def __init__(self, effective: int, permitted: int, inheritable: int) -> None:
        self.effective = effective
        self.permitted = permitted
        self.inheritable = inheritable

    @classmethod
    def read(cls) -> _Sets:
        """Raises OSError."""
        header = ctypes.create_string_buffer(_HEADER.pack(_VERSION, 0))
        data = ctypes.create_string_buffer(_SETS.size)
        _checked(_libc.capget(header, data))
        low, high = (_SETS.unpack(data.raw)[half : half + 3] for half in (0, 3))
        return cls(*(one | other << 32 for one, other in zip(low, high, strict=True)))

    def write(self) -> None:
        """Raises OSError: EPERM if it is more than the thread has."""
        sets = self.effective, self.permitted, self.inheritable
        data = _SETS.pack(*(one & 0xFFFFFFFF for one in sets), *(one >> 32 for one in sets))
        _checked(
            _libc.capset(ctypes.create_string_buffer(_HEADER.pack(_VERSION, 0)), ctypes.create_string_buffer(data))
        )


def rights() -> frozenset[int]:
    """The numbers of the capabilities that the calling thread has and can make use of. Raises nothing."""
    try:
        return _numbers(_Sets.read().effective)
    except OSError:
        return frozenset()


def looking() -> frozenset[Right]:
    """Those of :data:`LOOKING`; where the second is missing, as in a container, the stronger one in its place."""
    if Right.CAP_DAC_READ_SEARCH in rights():
        return LOOKING
    return LOOKING - {Right.CAP_DAC_READ_SEARCH} | {Right.CAP_DAC_OVERRIDE}


def has_any() -> bool:
    """Whether the calling thread may do anything that an ordinary user may not. Raises nothing."""
    try:
        return bool(_Sets.read().permitted)
    except OSError:
        return False


def names(numbers: Collection[int]) -> str:
    """Name capabilities for people; there has to be one."""
    known = {int(right): right.name for right in Right}
    *others, last = sorted(known.get(number, f"capability {number}") for number in numbers)
    return f"{', '.join(others)} and {last}" if others else last


@contextlib.contextmanager
def only(kept: Collection[int]) -> Iterator[None]:
    """Do without all other capabilities for a while, in this thread, to see what works without them. Raises OSError."""
    before = _Sets.read()
    _Sets(before.effective & _mask(kept), before.permitted, before.inheritable).write()
    try:
        yield
    finally:
        before.write()


@contextlib.contextmanager
def raised(right: Right) -> Iterator[None]:
    """Make use of a capability, in this thread, that is kept in reserve; what takes it fails where there is none."""
    before = _Sets.read()
    if not before.permitted & ~before.effective & _mask([right]):
        yield
        return
    _Sets(before.effective | _mask([right]), before.permitted, before.inheritable).write()
    try:
        yield
    finally:
        before.write()


def give_up(kept: Collection[int], reserve: Collection[int] = (), account: Account | None = None) -> frozenset[int]:
    """Give up all capabilities but some, for good, and change to an ordinary user if one is named.

    To be called on the process's only thread. What it hasn't, it needn't give up: nothing is gained.

    Args:
        kept: what is kept, and handed on to programs that are started.
        reserve: what is kept for :func:`raised` alone.
        account: the user to become; the supplementary groups are that user's too.

    Returns:
        The numbers of those that it had, and has no more.

    Raises:
        RightsError: there are other threads; or the system refuses, in which case some may be gone.
    """
    if not _is_alone():
        raise RightsError(f"threads have been started already: {', '.join(_thread_names())}")
    before = _Sets.read()
    reserve_mask = before.permitted & _mask(reserve)
    kept_mask = before.permitted & _mask(kept) & ~reserve_mask
    try:
        if before.effective & _mask([Right.CAP_SETPCAP]):
            _cut_bounds(kept_mask)
        if account is not None:
            _become(account)
        _Sets(kept_mask, kept_mask | reserve_mask, kept_mask).write()
        if os.geteuid() != 0:
            for number in _numbers(kept_mask):
                _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, number)
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        _prctl(_PR_SET_DUMPABLE, 0)
    except OSError as error:
        raise RightsError(error.strerror or str(error)) from error
    after = _Sets.read()
    if after.permitted != kept_mask | reserve_mask or (account is not None and os.getresuid() != (account.uid,) * 3):
        raise RightsError("the system did not do what it was asked to")
    return _numbers(before.permitted & ~after.permitted)


def _become(account: Account) -> None:
    """Change the user, without losing what may be kept. Raises OSError."""
    _prctl(_PR_SET_KEEPCAPS, 1)
    os.setgroups(os.getgrouplist(account.name, account.gid))
    os.setresgid(account.gid, account.gid, account.gid)
    os.setresuid(account.uid, account.uid, account.uid)
    _prctl(_PR_SET_KEEPCAPS, 0)


def _cut_bounds(kept_mask: int) -> None:
    """Have nothing that is executed get more than this. Raises OSError."""
    for number in range(_HIGHEST + 1):
        if not kept_mask >> number & 1 and _libc.prctl(_PR_CAPBSET_READ, number, 0, 0, 0) == 1:
            _prctl(_PR_CAPBSET_DROP, number)


def _is_alone() -> bool:
    """Whether this is the only thread, once those that were about to end have ended."""
    deadline = time.monotonic() + _ALONE
    while len(_tids()) > 1:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


def _tids() -> list[str]:
    try:
        return os.listdir("/proc/self/task")  # noqa: PTH208 - only the names count
    except OSError:
        return [str(thread.native_id) for thread in threading.enumerate()]


def _thread_names() -> list[str]:
    found = []
    for tid in _tids():
        with contextlib.suppress(OSError):
            found.append(Path(f"/proc/self/task/{tid}/comm").read_text().strip())
    return found or [thread.name for thread in threading.enumerate()]


def _mask(numbers: Collection[int]) -> int:
    return sum(1 << number for number in set(numbers))


def _numbers(mask: int) -> frozenset[int]:
    return frozenset(number for number in range(_HIGHEST + 1) if mask >> number & 1)


def _prctl(option: int, argument: int, second: int = 0) -> None:
    _checked(_libc.prctl(option, argument, second, 0, 0))


def _checked(result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


_libc = ctypes.CDLL(None, use_errno=True)
_libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
_libc.capget.argtypes = _libc.capset.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
