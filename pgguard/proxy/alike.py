"""Faults that come at the same moment and are alike: one of them is looked into, and the others are counted with it.

A process that is killed ends all its connections, and one that misuses a pool misuses many. To look into each would
take the processors from everybody else, and find out the same again. So those that come while the first one is looked
into wait in a list, if they are only to be logged; their bytes wait for nothing.
"""

from __future__ import annotations

from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pgguard.attribution.findings import Findings
    from pgguard.faults.docket import Family
    from pgguard.proxy.session import ProxiedSession
    from pgguard.session.verdicts import Refusal, Verdict

    Likeness = Refusal | Family
    """What faults have in common of which one is looked into."""

WAITING: Final = 8192
"""Faults that may wait at once; whichever comes then is looked into for itself."""


class Waiting(NamedTuple):
    """A fault that waits for another one to be looked into."""

    session: ProxiedSession
    verdict: Verdict
    """What the session core says."""
    concluded: Verdict
    """What that is in the light of what is known without looking."""
    findings: Findings
    """What was known of its session without looking when it came: later on its pids may be others'."""
    at: float
    """When it came, in seconds since the epoch."""


class Alike:
    """The faults that are being looked into, each with those that wait for it."""

    def __init__(self) -> None:
        self._led: dict[Likeness, deque[Waiting]] = {}
        self._number = 0

    def join(self, likeness: Likeness, one: Waiting) -> bool:
        """Let a fault wait for one that is like it; False if none is being looked into, or too many wait."""
        led = self._led.get(likeness)
        if led is None or self._number >= WAITING:
            return False
        led.append(one)
        self._number += 1
        return True

    @contextmanager
    def leading(self, likeness: Likeness | None) -> Iterator[deque[Waiting]]:
        """Have those wait that are like the one that is being looked into.

        Args:
            likeness: ``None``: nothing is like it.

        Yields:
            Those that wait. When the block is left nobody joins them any more, and they are to be counted: see
            :meth:`resume`.
        """
        led: deque[Waiting] = deque()
        if likeness is None or likeness in self._led:
            yield led
            return
        self._led[likeness] = led
        try:
            yield led
        finally:
            del self._led[likeness]

    def release(self) -> None:
        """Make room for another one: one that waited has been counted."""
        self._number -= 1
