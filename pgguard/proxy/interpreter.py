"""What the relay asks of the interpreter, which it shares with the threads that take evidence, and of the system.

That is of malloc, and of the scheduler.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from contextlib import suppress
from typing import Final

import trio

from pgguard.proxy.scheduling import short_slices

_SWITCH_INTERVAL: Final = 0.0001
"""Seconds for which one thread keeps the interpreter from another that wants it: ``sys.setswitchinterval()``. The relay
gives it up with each system call, and so waits for as long several times with each message while another one computes:
with a millisecond, or Python's five, a round over many sessions would take tens of them."""
_YOUNG: Final = (700, 10)
"""Objects after which the youngest are looked at, and how often that is until those that have survived it are."""
_NEVER: Final = 1_000_000
_INTERVAL: Final = 30.0
"""Seconds between two looks at all objects."""
_WORTHWHILE: Final = 100
"""How often younger objects have been looked at by then, so that there may be something to be found."""
_ARENA_MAX: Final = -8
"""``M_ARENA_MAX`` of glibc's ``malloc.h``."""


def share_heap() -> None:
    """Have threads that are started from now on share the heap that there is, as long as the process lasts.

    glibc would give each of the first ones a heap of its own: mallopt(3). What a thread has used there as it looked at
    thousands of connections nobody else can use: 0.6 kB for each of 2,000 sessions. Heaps of their own are for threads
    that compute at the same time; the interpreter has one do so. Does nothing where there is another C library.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_ARENA_MAX, 1)


async def tune() -> None:
    """Have the interpreter keep nobody waiting for long, nor the scheduler; until cancelled, when all is as before.

    To look at all objects for such as refer to each other, and are garbage otherwise, takes tens of milliseconds: a
    microsecond for two of them, and there are 60,000 when the guard starts. It is done just when many objects are made.
    So those that are there are left out from now on, and the others are looked at now and then and not in the middle
    of a storm. Most garbage is none of that kind, or dies young.
    """
    interval, thresholds = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(_SWITCH_INTERVAL)
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_YOUNG, _NEVER)
    try:
        with short_slices():
            while True:
                await trio.sleep(_INTERVAL)
                if gc.get_count()[2] >= _WORTHWHILE:
                    gc.collect()
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*thresholds)
        gc.unfreeze()
