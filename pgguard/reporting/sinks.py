"""Where faults go, one behind the other, none of them able to hurt a session."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from pgguard.faults.text import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pgguard.faults.fault import Fault

_QUIET: Final = 60.0
"""Seconds between two times that the same is said of a sink, at least."""
_LOSING: Final = "faults are being lost"
_WAITING: Final = "faults are kept until they can be written"
_AGAIN: Final = "faults are being written again"


class Sink(Protocol):
    """Something that takes faults. It must not block: it is called between two chunks of a session.

    Its ``str`` is what people call it: the file's name, for example.
    """

    def record(self, fault: Fault) -> None:
        """Take a fault; may raise anything."""

    def close(self) -> None:
        """Let go of everything; no faults come after this."""


class SinkError(Exception):
    """A sink can't be opened or has failed; the message is one line for the user.

    Args:
        message: That line.
        lost: How many faults are lost with it; 0 if what could not be recorded is kept, to be tried again.
    """

    def __init__(self, message: str, *, lost: int = 1) -> None:
        super().__init__(message)
        self.lost = lost


@dataclass(slots=True)
class _Trouble:
    """What has gone wrong with one sink."""

    lost: int = 0
    """Faults, since the guard started."""
    said: str | None = None
    """What has been said of it since it last worked."""
    quiet_until: dict[str, float] = field(default_factory=dict)
    """By what can be said, until when it isn't, on the monotonic clock."""


class Fanout:
    """Hands each fault to every sink, in order. Whatever a sink raises is counted, and said for each sink.

    It is said when a sink begins to fail and when it works again, each once a minute at most.

    Args:
        sinks: Those that get the faults.
        complain: Called with one line, without ``pgguard:``, for that and, with the number of faults that a sink has
            lost, when it is closed. What it raises is ignored.
    """

    def __init__(self, sinks: Iterable[Sink], complain: Callable[[str], None]) -> None:
        self._sinks = tuple(sinks)
        self._complain = complain
        self._troubles = [_Trouble() for _ in self._sinks]

    @property
    def lost(self) -> int:
        """How many faults have been lost, counted for each sink."""
        return sum(trouble.lost for trouble in self._troubles)

    def record(self, fault: Fault) -> None:
        """Hand a fault to every sink; never raises."""
        for sink, trouble in zip(self._sinks, self._troubles, strict=True):
            try:
                self._hand(sink, fault)
            except Exception as error:
                lost = error.lost if isinstance(error, SinkError) else 1
                trouble.lost += lost
                self._note(trouble, _LOSING if lost else _WAITING, f": {_in_one_line(error)}")
            else:
                if trouble.said is not None:
                    lost_so_far = f"; {counted(trouble.lost, 'fault')} lost so far" if trouble.lost else ""
                    self._note(trouble, _AGAIN, lost_so_far)
                    trouble.said = None

    @staticmethod
    def _hand(sink: Sink, fault: Fault) -> None:
        try:
            sink.record(fault)
        except (SinkError, OSError):
            raise
        except Exception:
            # It is about something that stands in the fault, which is better told in part than not.
            sink.record(fault.outlined())

    def close(self) -> None:
        """Close every sink; never raises."""
        for sink, trouble in zip(self._sinks, self._troubles, strict=True):
            try:
                sink.close()
            except Exception as error:
                if isinstance(error, SinkError):
                    trouble.lost += error.lost
                if trouble.said is None or not isinstance(error, SinkError):
                    self._say(_in_one_line(error))
            if trouble.lost:
                self._say(f"{counted(trouble.lost, 'fault')} could not be written to {sink}")

    def _note(self, trouble: _Trouble, what: str, details: str) -> None:
        if trouble.said == what or time.monotonic() < trouble.quiet_until.get(what, 0.0):
            return
        trouble.said = what
        trouble.quiet_until[what] = time.monotonic() + _QUIET
        self._say(what + details)

    def _say(self, line: str) -> None:
        # If complaining fails, nobody is left to be told.
        with contextlib.suppress(Exception):
            self._complain(line)


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
