"""The guard from outside, in the middle of a soak: what it takes, and what it says."""

from __future__ import annotations

import json
import os
import statistics
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from tests.soak.counted_guard import SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.guard_process import Fault

_TICKS: Final = os.sysconf("SC_CLK_TCK")
_MEGABYTE: Final = 1_000_000
_WARM: Final = 0.2
"""Of the time, until memory has to have come to rest."""
_LEAST_SAMPLES: Final = 40
_GROWTH: Final = 8.0
"""Megabytes by which it may grow after that in one run, or a tenth: what a heap in pieces does by itself."""


class Sample(NamedTuple):
    """What the guard takes at one moment."""

    at: float
    """Seconds of time.monotonic()."""
    megabytes: float
    """Memory that is resident."""
    descriptors: int
    threads: int
    tasks: int
    """trio's."""
    cpu: float
    """Seconds of processor time so far."""


def sample(pid: int, tasks: Path) -> Sample:
    """Look at a guard now."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return Sample(
        time.monotonic(),
        int(status["VmRSS"].split()[0]) * 1024 / _MEGABYTE,
        sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()),
        int(status["Threads"]),
        int(struct.unpack("q", tasks.read_bytes()[:SIZE])[0]),
        cpu_seconds(pid),
    )


def cpu_seconds(pid: int, *, of_children: bool = False) -> float:
    """Processor time that a process has taken, and if so asked the children that it has waited for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return sum(map(int, fields[11 : 15 if of_children else 13])) / _TICKS


@dataclass(frozen=True, slots=True)
class Growth:
    """How memory has developed since it had to have come to rest."""

    megabytes: float
    """By how much a straight line through the samples rises."""
    per_hour: float
    allowed: float


def growth(samples: Sequence[Sample]) -> Growth | None:
    """Fit a line to what came after the warm-up; ``None`` if that is too little to say anything."""
    if not samples:
        return None
    warm = samples[0].at + _WARM * (samples[-1].at - samples[0].at)
    rest = [one for one in samples if one.at >= warm]
    if len(rest) < _LEAST_SAMPLES:
        return None
    slope, _ = statistics.linear_regression([one.at for one in rest], [one.megabytes for one in rest])
    allowed = max(_GROWTH, 0.1 * statistics.median(one.megabytes for one in rest))
    return Growth(slope * (rest[-1].at - rest[0].at), slope * 3600, allowed)


class Records:
    """The file that a guard appends its faults to, read as it grows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0

    def new(self) -> Iterator[Fault]:
        """What has come since it was last asked."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._position)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # it is just being written
                self._position += len(line)
                yield json.loads(line)
