"""Exit statuses: what each one means, for the help and whoever tests what the README says."""

from __future__ import annotations

from typing import Final

from pgguard.launch.statuses import NOT_EXECUTABLE, NOT_FOUND

DONE: Final = 0
MISSING: Final = 1
CANNOT: Final = 2
FAULT_SEEN: Final = 66

STATUSES: Final = (
    (str(DONE), "success; serve: a signal stopped it; run: its command's own status"),
    (str(MISSING), "doctor: something essential missing; demo: failed"),
    (str(CANNOT), "wrong usage or setting (see standard error)"),
    (str(FAULT_SEEN), "run, report: a fault of at least --fail-on severity was seen"),
    (str(NOT_EXECUTABLE), "run: the command can't be executed"),
    (str(NOT_FOUND), "run: there is no such command"),
    ("128+N", "ended by signal N: 130 for Ctrl-C; run: its command was"),
)
"""Each status and its meaning, as the README has them too."""
