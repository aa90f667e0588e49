"""What a process has cost so far: processor time, and memory."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

_TICK = 1_000_000 / os.sysconf("SC_CLK_TCK")
_SCHED = 2
"""CPUCLOCK_SCHED of ``include/linux/posix-timers.h``: what the scheduler has accounted, exactly."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Processor time of a process and all its threads, those that have ended included; microseconds."""

    total: float
    """Exact."""
    user: float
    """To a tick of the kernel's, a hundredth of a second."""
    system: float
    """Likewise."""

    def __sub__(self, earlier: Cost) -> Cost:
        return Cost(self.total - earlier.total, self.user - earlier.user, self.system - earlier.system)


def cost(pid: int) -> Cost:
    """Read what a process has cost: clock_getcpuclockid(3), proc(5).

    Raises:
        OSError: there is no such process.
    """
    total = time.clock_gettime(~pid << 3 | _SCHED) * 1_000_000
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return Cost(total, int(fields[11]) * _TICK, int(fields[12]) * _TICK)


def memory(pid: int) -> float:
    """The memory of a process in kB, of what it shares with others its share: ``Pss`` of proc(5)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("Pss:")))
