"""Where faults go, one behind the other, none of them able to hurt a session."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pgguard.faults.fault import Fault


class Sink(Protocol):
    """Something that takes faults. It must not block: it is called between two chunks of a session."""

    def record(self, fault: Fault) -> None:
        """Take a fault; may raise anything."""

    def close(self) -> None:
        """Let go of everything; no faults come after this."""


class SinkError(Exception):
    """A sink can't be opened or has failed; the message is one line for the user."""


class Fanout:
    """Hands each fault to every sink, in order. Whatever a sink raises is counted, and said once for each sink.

    Args:
        sinks: Those that get the faults.
        complain: Called with one line, without ``pgguard:``, when a sink fails for the first time and, with the number
            of faults that it has lost, when it is closed. What it raises is ignored.
    """

    def __init__(self, sinks: Iterable[Sink], complain: Callable[[str], None]) -> None:
        self._sinks = tuple(sinks)
        self._complain = complain
        self._lost: dict[int, int] = {}

    @property
    def lost(self) -> int:
        """How many times a sink has failed to take a fault."""
        return sum(self._lost.values())

    def record(self, fault: Fault) -> None:
        """Hand a fault to every sink; never raises."""
        for number, sink in enumerate(self._sinks):
            try:
                self._hand(sink, fault)
            except Exception as error:
                before = self._lost.get(number, 0)
                self._lost[number] = before + 1
                if not before:
                    self._say(f"faults are being lost: {_in_one_line(error)}")

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
        for number, sink in enumerate(self._sinks):
            lost = self._lost.get(number, 0)
            try:
                sink.close()
            except Exception as error:
                self._say(_in_one_line(error))
            if lost:
                self._say(f"{lost} fault{'' if lost == 1 else 's'} could not be recorded by {type(sink).__name__}")

    def _say(self, line: str) -> None:
        # If complaining fails, nobody is left to be told.
        with contextlib.suppress(Exception):
            self._complain(line)


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
