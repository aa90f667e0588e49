"""What is read of the threads of one process at one moment, whatever reads it: py-spy, or the process itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from pgguard.attribution.frames import Frame


class Seen(NamedTuple):
    """What one thread does."""

    frames: tuple[Frame, ...]
    """The innermost call first."""
    name: str | None = None
    """What it is called in its own language, if it has a name there."""


class NoDump(Exception):
    """Why there is none: a clause that can stand alone."""


class Dump(ABC):
    """What is being read of one process. Whoever has begun it calls :meth:`end`, once."""

    begins_slowly = False
    """It takes long before it reads: who has run meanwhile is better waited for than read."""

    @property
    @abstractmethod
    def is_over(self) -> bool:
        """Whether nothing more is to come."""

    @property
    @abstractmethod
    def pipes(self) -> Collection[int]:
        """The descriptors that it may still be heard on."""

    @abstractmethod
    def hear(self, pipe: int) -> None:
        """Take what has come on one of them, without waiting. How much that is, somebody else decides."""

    @abstractmethod
    def result(self) -> Mapping[int, Seen]:
        """What was read, by tid, when it is over. Raises NoDump."""

    @abstractmethod
    def end(self) -> float:
        """End it, over or not. Returns how much of a processor's time it has taken, in seconds."""
