"""Looks in worker threads, none of which waits for ever: some of what is looked at is in other people's hands.

A look that hangs (:mod:`pgguard.attribution.hangs`) is begun again, in another thread, which passes by what has made it
hang. The thread that hangs is left to itself, and doesn't count among those that may look at the same time.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import threading
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

import trio

from pgguard.attribution.hangs import PATIENCE, hanging

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

_ATTEMPTS: Final = 8
"""Looks at the same thing. Each passes by one more that hangs; of one user's processes a few do, and then no others."""
_INTERVAL: Final = PATIENCE / 2
"""Seconds between two rounds of looking for threads that hang."""

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Job:
    """A look that goes on in some thread."""

    scope: trio.CancelScope
    limiter: trio.CapacityLimiter
    hangs: bool = False


_jobs: dict[object, _Job] = {}
"""By the thread that looks, threading.get_ident()."""


async def look(function: Callable[..., T], *arguments: object, limiter: trio.CapacityLimiter | None = None) -> T:
    """Return what ``function`` returns, or raise what it raises, in a worker thread; it is left there if cancelled.

    Args:
        function: looks at something. It may be called several times, where a thread hangs.
        arguments: its arguments.
        limiter: of how many look at the same time; by default trio's.

    Raises:
        TimeoutError: each attempt has hung.
    """
    if limiter is None:
        limiter = trio.to_thread.current_default_thread_limiter()
    token = trio.lowlevel.current_trio_token()
    for _ in range(_ATTEMPTS):
        with trio.CancelScope() as scope:
            job = _Job(scope, limiter)
            return await trio.to_thread.run_sync(
                _run, partial(function, *arguments), job, token, limiter=limiter, abandon_on_cancel=True
            )
    raise TimeoutError(errno.ETIMEDOUT, "what is looked at hangs")


def _run(function: Callable[[], T], job: _Job, token: trio.lowlevel.TrioToken) -> T:
    thread = threading.get_ident()
    _jobs[thread] = job
    try:
        return function()
    finally:
        del _jobs[thread]
        if job.hangs:
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(_make_room, job.limiter, -1)


def _make_room(limiter: trio.CapacityLimiter, more: int) -> None:
    limiter.total_tokens += more


async def over_hangs() -> None:
    """Look for looks that hang, and have them begun again; until cancelled."""
    told: set[int] = set()
    while True:
        await trio.sleep(_INTERVAL)
        found = hanging()
        for reader, pid in found.items():
            job = _jobs.get(reader)
            if job is not None and not job.hangs:
                job.hangs = True
                _make_room(job.limiter, 1)
                job.scope.cancel()
            if pid not in told:
                told.add(pid)
                logger.warning("pid %d can't be looked at: reading its files in /proc hangs", pid)
        told &= set(found.values())
