"""The guard's own log on the terminal: what happens in ten thousand sessions is said a few times, and counted."""

from __future__ import annotations

import logging
import time
import traceback
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pgguard.faults.text import counted, printable
from pgguard.secrets.text import redact

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

SAID: Final = 5
WINDOW: Final = 3600.0
"""Times that the same is said, and the seconds after which it is said as often again."""
SUMMARY_INTERVAL: Final = 10.0
SHARE_OF_AGE: Final = 1 / 6
"""Seconds between two lines that say how often it has come since, at least; and that share of the time for which it has
come, when that is more."""
KINDS: Final = 512
"""Things to be said that are told apart; what comes on top is taken for the same."""
_PREFIX: Final = "pgguard: "


@dataclass(slots=True, eq=False)
class _Remark:
    """One thing that is said again and again."""

    began: float
    """Times are those of the monotonic clock."""
    said: int = 0
    counted_at: float = 0.0
    """When it was last said, or how often it has come."""
    unsaid: int = 0
    last: str = ""
    """As it was the last time, in one line."""

    def is_due(self, now: float) -> bool:
        """Whether it is time to say how often it has come."""
        pause = max(SUMMARY_INTERVAL, (self.counted_at - self.began) * SHARE_OF_AGE)
        return self.unsaid > 0 and now - self.counted_at >= pause

    def summary(self, now: float) -> str:
        """How often it has come since that was last said."""
        text = f"{_PREFIX}{counted(self.unsaid, 'more time')} in {now - self.counted_at:.0f} s, the last: {self.last}"
        self.counted_at, self.unsaid = now, 0
        return text


class BoundedLog(logging.Handler):
    """Says each kind of thing that is logged a few times, and after that now and then how often it has come.

    Two lines are of a kind if they come from the same template and, with an exception, from the same place. A traceback
    is said once. Control characters, and what else could do harm on a terminal, are spelled out.

    Args:
        say: Takes what is to be said, lines in one string; called by whichever thread logs.
        clock: Tells the time, in seconds.
        unbounded: The logger, and those below it, of which everything is said.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        unbounded: str = "pgguard.cli",
    ) -> None:
        super().__init__()
        self._say = say
        self._clock = clock
        self._unbounded = unbounded
        self._remarks: OrderedDict[Hashable, _Remark] = OrderedDict()

    def emit(self, record: logging.LogRecord) -> None:
        """Say a line, or count it."""
        try:
            text = record.getMessage()
        except Exception:
            text = str(record.msg)
        error = record.exc_info[1] if record.exc_info else None
        if record.name == self._unbounded or record.name.startswith(f"{self._unbounded}."):
            self._say(_safe(_PREFIX + text + _traceback(error)))
            return
        now = self._clock()
        kind = _kind(record)
        if kind not in self._remarks and len(self._remarks) >= KINDS:
            kind = None
        remark = self._remarks.setdefault(kind, _Remark(now))
        if now - remark.began >= WINDOW and not remark.unsaid:
            self._remarks[kind] = remark = _Remark(now)
        short = text if error is None else f"{text}: {type(error).__name__}: {error}"
        if remark.said >= SAID:
            remark.unsaid += 1
            remark.last = _safe(" ".join(short.split()))
            if remark.is_due(now):
                self._say(remark.summary(now))
            return
        text = short if remark.said else text + _traceback(error)
        remark.said += 1
        remark.counted_at = now
        self._say(_safe(_PREFIX + text))

    def settle(self) -> None:
        """Say how often has come what it is time to; to be called about once a second."""
        now = self._clock()
        self._summarize(lambda remark: remark.is_due(now))

    def close(self) -> None:
        """Say what has been counted and not said."""
        self._summarize(lambda remark: remark.unsaid > 0)
        super().close()

    def _summarize(self, is_due: Callable[[_Remark], bool]) -> None:
        now = self._clock()
        self.acquire()
        try:
            for text in [remark.summary(now) for remark in self._remarks.values() if is_due(remark)]:
                self._say(text)
        finally:
            self.release()


def _kind(record: logging.LogRecord) -> Hashable:
    if not record.exc_info or record.exc_info[1] is None:
        return record.name, record.levelno, record.msg
    error = record.exc_info[1]
    places = traceback.extract_tb(error.__traceback__, limit=-1)
    return record.name, record.levelno, record.msg, type(error), *((place.filename, place.lineno) for place in places)


def _traceback(error: BaseException | None) -> str:
    """What is said behind a line that comes with an exception."""
    return "" if error is None else f"\n{''.join(traceback.format_exception(error)).rstrip()}"


def _safe(text: str) -> str:
    """Text that can do no harm. All lines but the first are indented, so that none passes for something else."""
    return "\n  ".join(printable(line) for line in redact(text).split("\n"))
