"""The account of a soak: what was compared, what the guard said, and whether all is well."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from tests.guard_process import Fault
    from tests.soak.workloads import Workload

_ROWS: Final = re.compile(rb'"rows": ?(\d+)|\b(\d+) rows ')
"""How the programs say how many rows a line of theirs stands for."""
_KILLED: Final = "unclean-close"


@dataclass(slots=True)
class Entry:
    """What has become of one workload."""

    runs: int = 0
    lines: int = 0
    rows: int = 0
    direct_seconds: float = 0.0
    guarded_seconds: float = 0.0
    connections_killed: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    """Those that were to be expected, by kind, each time that they happened."""


class Account:
    """Kept while the soak runs.

    Args:
        workloads: all that are run.
    """

    def __init__(self, workloads: Iterable[Workload]) -> None:
        self._workloads = {workload.user: workload for workload in workloads}
        self.entries = {workload.name: Entry() for workload in self._workloads.values()}
        self.wrong: list[str] = []
        """Everything that isn't as it should be."""

    def compare(self, workload: Workload, directly: Path, guarded: Path, where: str) -> None:
        """Compare what a program got both ways, line by line."""
        entry = self.entries[workload.name]
        kept = workload.kept
        with directly.open("rb") as first, guarded.open("rb") as second:
            n = 0
            while True:
                line, other = first.readline(), second.readline()
                if not line and not other:
                    return
                n += 1
                if kept is not None and kept.match(line) is None and kept.match(other) is None:
                    continue
                entry.lines += 1
                entry.rows += sum(int(count or other_count) for count, other_count in _ROWS.findall(line)) or 1
                if line != other:
                    self.wrong.append(f"{where}: line {n} differs: {line[:500]!r} directly, {other[:500]!r} through it")
                    return

    def take(self, fault: Fault) -> bool:
        """Enter a record; False if it is a false fault."""
        workload = self._workloads.get(fault["session"]["user"] or "")
        kind, severity = fault["kind"], fault["severity"]
        if workload is not None and ((kind, severity) in workload.expects or (workload.is_killed and kind == _KILLED)):
            self.entries[workload.name].faults[kind] += 1 + fault["suppressed"]
            return True
        self.wrong.append(f"a false {severity}: {fault['summary']} ({fault['session']})")
        return False

    def close(self) -> None:
        """Check what can be checked at the end alone."""
        for name, entry in self.entries.items():
            if entry.connections_killed != entry.faults[_KILLED]:
                self.wrong.append(
                    f"{name}: {entry.connections_killed} connections were killed,"
                    f" and {entry.faults[_KILLED]} recorded as {_KILLED}"
                )

    @property
    def runs(self) -> int:
        return sum(entry.runs for entry in self.entries.values())

    @property
    def rows(self) -> int:
        return sum(entry.rows for entry in self.entries.values())

    def table(self) -> Table:
        """What has become of each workload."""
        table = Table("workload", "runs", "lines", "rows", "directly s", "guarded s", "expected faults")
        for name, entry in self.entries.items():
            faults = ", ".join(f"{count} {kind}" for kind, count in entry.faults.items())
            times = (f"{entry.direct_seconds:.1f}", f"{entry.guarded_seconds:.1f}")
            table.add_row(name, str(entry.runs), str(entry.lines), str(entry.rows), *times, faults)
        return table
