"""What the relay asks of the system's scheduler: to come soon, and for a little at a time.

Since Linux 6.12 a thread may say how long a slice of the processor it wants (``sched_runtime`` in sched_setattr(2),
``Documentation/scheduler/sched-eevdf.rst``). It gets the same share as before: who asks for less at a time has its
turn earlier. That is what the relay needs beside hundreds of the server's processes that begin or end at once. It
takes no right. Older kernels take no notice.
"""

from __future__ import annotations

import ctypes
import os
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

_SLICE: Final = 100_000
"""Nanoseconds: the least that the scheduler takes."""
_SET: Final = {"x86_64": 314, "aarch64": 274, "riscv64": 274, "loongarch64": 274, "ppc64le": 355, "s390x": 345}
"""The number of the system call sched_setattr(2), by machine; that of sched_getattr(2) is the next. glibc has had no
functions for them for long."""
_ORDINARY: Final = 0
"""SCHED_OTHER; of another policy's threads the field means something else."""
_ATTRIBUTES: Final = struct.Struct("=IIQiIQQQ")
"""``struct sched_attr`` in its first version."""


class _Attributes(NamedTuple):
    size: int
    policy: int
    flags: int
    nice: int
    priority: int
    runtime: int
    deadline: int
    period: int


def short_slices() -> AbstractContextManager[None]:
    """Have the calling thread scheduled early and for short, as long as the context lasts.

    Threads and processes that it starts meanwhile inherit that. Does nothing where it can't be had.
    """
    return _slices(_SLICE)


def ordinary_slices() -> AbstractContextManager[None]:
    """Within :func:`short_slices`, have what the calling thread starts scheduled as any other program is."""
    return _slices(0, instead_of=_SLICE)


@contextmanager
def _slices(nanoseconds: int, *, instead_of: int | None = None) -> Iterator[None]:
    before = _read()
    if before is None or before.policy != _ORDINARY or instead_of not in {None, before.runtime}:
        yield
        return
    _write(before._replace(runtime=nanoseconds))
    try:
        yield
    finally:
        _write(before)


def _read() -> _Attributes | None:
    """What holds for the calling thread; ``None`` if that can't be told."""
    number = _SET.get(os.uname().machine)
    if number is None:
        return None
    data = ctypes.create_string_buffer(_ATTRIBUTES.size)
    if ctypes.CDLL(None).syscall(number + 1, 0, data, _ATTRIBUTES.size, 0):
        return None
    return _Attributes(*_ATTRIBUTES.unpack(data.raw))


def _write(attributes: _Attributes) -> None:
    number = _SET[os.uname().machine]
    data = ctypes.create_string_buffer(_ATTRIBUTES.pack(*attributes._replace(size=_ATTRIBUTES.size)))
    ctypes.CDLL(None).syscall(number, 0, data, 0)
