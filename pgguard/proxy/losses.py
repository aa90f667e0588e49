"""What is lost when something fails inside the guard: what it was for, and nothing besides.

No exception ends the guard or a session, keeps a byte, or keeps a fault from being recorded and acted on. Wherever the
relay calls what it can go on without (the session core, attribution, faults, reporting), and in whatever goes on beside
it, here stands what an exception costs:

================================  ==========================================================================
what fails                        what it costs
================================  ==========================================================================
following a session               the session goes on, untracked, and that is recorded
finding out who sends             it isn't known of these bytes; of all that come, if their count is lost
finding out who opened it         it isn't known
evidence of a verdict             it is missing in the record, and changes neither fault nor ruling; a kind
                                  that evidence alone shows to be a fault isn't one
drawing conclusions from it       the verdict stands as the wire shows it
building a record                 a plain one is made: kind, session, message, action, who sent
knowing a fault again             it is recorded in full once more
handing a record on               that sink's record; the others get theirs
words for a client                the plain ones that there are for that
one round of a watch, one client  that one; the task goes on, after a pause that grows if it goes on failing
tidying up                        what is left behind
================================  ==========================================================================

What isn't an :class:`Exception` goes through: trio's cancellation, a keyboard interrupt, the end of the process. What
goes wrong with a session's own sockets is no exception in this sense, but what there is to be relayed.

Each exception, by its type and the place in the guard's code, is logged once. After that it is counted, cheaply, as it
may come with every message; how often is said at intervals (:func:`note`), and in the end (:func:`remarks`). That its
traceback is said once alone is the log's affair (:mod:`pgguard.reporting.log`).
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from sys import exc_info
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVarTuple

import trio

from pgguard.faults.text import counted

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from pgguard.proxy.session import ProxiedSession

_PAUSE: Final = 0.1
"""Seconds until a task that has failed begins anew."""
_LONGEST_PAUSE: Final = 10.0
"""The same, when it has failed again and again."""
_STEADY: Final = 30.0
"""Seconds after which a task counts as one that works."""
_INTERVAL: Final = 60.0
"""Seconds between two lines about one exception, at least."""
_PACKAGE: Final = str(Path(__file__).parent.parent)

Ts = TypeVarTuple("Ts")

logger = logging.getLogger(__name__)


class Loss(Enum):
    """What an exception costs, as the log says it."""

    TRACKING = "internal error while following the session: it goes on, but is no longer checked"
    SENDER = "internal error while finding out who sent something"
    OPENER = "internal error while finding out who opened a connection"
    EVIDENCE = "internal error while collecting evidence"
    CONCLUSION = "internal error while judging the evidence"
    RECORD = "internal error while making a record: parts of it may be missing"
    MEMORY = "internal error while looking up whether a fault is a repeat"
    SINKS = "internal error: a fault could not be recorded"
    WORDS = "internal error while writing a message: parts of it may be missing"
    STEP = "internal error in something that sessions don't depend on"
    ROUND = "internal error in a periodic check"
    ARRIVAL = "internal error: a client could not be connected to the server"
    SESSION = "internal error while relaying the session: it had to be closed"
    TIDINESS = "internal error while cleaning up: something may be left behind"


class _Place(NamedTuple):
    """What makes two exceptions the same: the type, and the last line of the guard's own that it went through."""

    type: type[BaseException]
    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.type.__name__} at {self.file.removeprefix(_PACKAGE).lstrip('/')}:{self.line}"


_times: Counter[_Place] = Counter()
"""How often each exception has been noted."""
_costs: Counter[Loss] = Counter()
"""How often each has been lost."""
_said: dict[_Place, tuple[float, int]] = {}
"""When it was last said of each how often that was, in seconds of time.monotonic(), and how often it was then."""


def note(loss: Loss, session: ProxiedSession | None = None) -> None:
    """Say what an exception that is being handled has cost, the first time; count it, and say at times how often.

    Never raises. In any thread.

    Args:
        loss: what.
        session: whose it is, if it is one's.
    """
    with suppress(Exception):
        error = exc_info()[1]
        if error is None:
            return
        place = _place(error)
        _times[place] += 1
        _costs[loss] += 1
        said_at, before = _said.get(place, (0.0, 0))
        now = time.monotonic()
        if not before or now - said_at >= _INTERVAL:
            _said[place] = now, _times[place]
            whose = "" if session is None else f"{session}: "
            times = _times[place] - before
            more = f", {times} more {'time' if times == 1 else 'times'}" if before else ""
            logger.error("%s", f"{whose}{loss.value}{more}", exc_info=error)


def remarks() -> list[str]:
    """What has failed so far, and how often: clauses for the end, none if nothing has."""
    return [f"{place}, {counted(count, 'time')}" for place, count in _times.most_common()]


def losses() -> dict[Loss, int]:
    """How often each has been lost so far."""
    return {loss: _costs[loss] for loss in Loss}


def _place(error: BaseException) -> _Place:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    file, line = "", 0
    trace = error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if name.startswith(_PACKAGE):
            file, line = name, trace.tb_lineno
        trace = trace.tb_next
    return _Place(type(error), file, line)


@contextmanager
def spared(loss: Loss, session: ProxiedSession | None = None) -> Iterator[None]:
    """Let an exception of what is done in this context cost what ``loss`` says, and nothing besides."""
    try:
        yield
    except Exception:
        note(loss, session)


async def keep_going(task: Callable[[*Ts], Awaitable[None]], *args: *Ts) -> None:
    """Run a task that goes on until it is cancelled, and begin it anew whenever it fails.

    It is left alone for a moment then, which grows while it fails at once each time, so that it doesn't spin.
    """
    pause = _PAUSE
    while True:
        began = trio.current_time()
        try:
            await task(*args)
        except Exception:
            note(Loss.ROUND)
        else:
            return
        if trio.current_time() - began > _STEADY:
            pause = _PAUSE
        await trio.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
