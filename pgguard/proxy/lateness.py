"""How late the relay is: whether the system has kept it waiting for a processor.

A relay that is woken late finds together what the server has sent piece by piece. The kernel counts how long a thread
has been ready to run and hasn't run: the second number of ``/proc/thread-self/schedstat``, in nanoseconds
(``Documentation/scheduler/sched-stats.rst``).
"""

from __future__ import annotations

import os
from typing import Final

_LATE: Final = 4_000_000
"""Nanoseconds of waiting for a processor: far more than lies between the answers to two short queries, which often
reach their readers together without a relay as well."""


class Lateness:
    """Says of the thread that made it whether it has been kept waiting lately. One call takes a microsecond.

    Where the kernel doesn't count (without CONFIG_SCHED_INFO), it never has.
    """

    def __init__(self) -> None:
        try:
            self._file = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._file = -1
        self._waited = self._read()

    def has_grown(self) -> bool:
        """Whether the thread has waited for a processor, for some milliseconds, since this was last asked."""
        before, self._waited = self._waited, self._read()
        return self._waited - before >= _LATE

    def close(self) -> None:
        """Close its file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _read(self) -> int:
        if self._file < 0:
            return 0
        fields = os.pread(self._file, 64, 0).split()
        return int(fields[1]) if len(fields) > 1 else 0
