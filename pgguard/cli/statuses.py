"""Exit statuses: what each one means, for the help and whoever tests what the README says."""

from __future__ import annotations

from typing import Final

DONE: Final = 0
MISSING: Final = 1
CANNOT: Final = 2
FAULT_SEEN: Final = 66

STATUSES: Final = (
    (str(DONE), "done; serve: it was told to end"),
    (str(MISSING), "doctor: something essential is missing; demo: it went wrong"),
    (str(CANNOT), "it can't be done as asked; standard error says what to change"),
    (str(FAULT_SEEN), "kept for pgguard run, which is to come: a fault was seen"),
    ("128+N", "signal N ended it: 130 for Ctrl-C"),
)
"""Each status and its meaning, as the README has them too."""
