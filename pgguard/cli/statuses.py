"""Exit statuses: what each one means, for the help and whoever tests what the README says."""

from __future__ import annotations

from typing import Final

DONE: Final = 0
MISSING: Final = 1
CANNOT: Final = 2
FAULT_SEEN: Final = 66

STATUSES: Final = (
    (str(DONE), "success; serve: a signal stopped it"),
    (str(MISSING), "doctor: something essential missing; demo: failed"),
    (str(CANNOT), "wrong usage or setting (see standard error)"),
    (str(FAULT_SEEN), "run, report: a fault of at least --fail-on severity was seen"),
    ("128+N", "ended by signal N: 130 for Ctrl-C"),
)
"""Each status and its meaning, as the README has them too."""
