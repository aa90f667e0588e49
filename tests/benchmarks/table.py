"""What was measured, and the table that it makes."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterable

PEERS = ("pgbouncer", "HAProxy")


@dataclass(slots=True)
class Row:
    """One quantity, measured several times for each contender."""

    scenario: str
    quantity: str
    unit: str
    more_is_better: bool = False
    goal: float | None = None
    """What a guard is to reach: of the better peer if it is a quantity to compare, or else by itself."""
    absolute: bool = False
    """The goal is in the unit, and no share of the better peer's."""
    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, contender: str, value: float) -> None:
        self.values.setdefault(contender, []).append(value)

    def median(self, contender: str) -> float:
        return statistics.median(self.values[contender])

    def spread(self, contender: str) -> float:
        """Half of the range that the middle half of the values lies in."""
        values = self.values[contender]
        if len(values) < 2:
            return 0.0
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return (high - low) / 2

    @property
    def better_peer(self) -> str | None:
        there = [peer for peer in PEERS if peer in self.values]
        if not there:
            return None
        return (max if self.more_is_better else min)(there, key=self.median)

    def ratio(self, contender: str, other: str) -> float:
        """How many times the other's it is: the median over the rounds.

        Each compares what was measured soon one after the other.
        """
        pairs = zip(self.values[contender], self.values[other], strict=False)
        return statistics.median(mine / its for mine, its in pairs if its) if self.median(other) else 0.0

    def meets(self, contender: str) -> bool | None:
        """Whether a guard reaches the goal; ``None`` if there is none, or no peer to compare it with."""
        peer = self.better_peer
        if self.goal is None or (peer is None and not self.absolute):
            return None
        value = self.median(contender) if self.absolute else self.ratio(contender, peer or "")
        return value >= self.goal if self.more_is_better else value <= self.goal

    def goal_text(self) -> str:
        if self.goal is None:
            return ""
        sign = "≥" if self.more_is_better else "≤"
        return f"{sign} {self.goal:g}" if self.absolute else f"{sign} {self.goal:g} x"


class Results:
    """All rows, in the order in which they were begun."""

    def __init__(self, twin: tuple[str, str] | None) -> None:
        """Args: twin: the two names under which the same guard is measured twice."""
        self.twin = twin
        self.rows: dict[tuple[str, str], Row] = {}
        self.remarks: list[str] = []

    def remark(self, text: str) -> None:
        """Say something about what was measured, once."""
        if text not in self.remarks:
            self.remarks.append(text)

    def row(
        self,
        scenario: str,
        quantity: str,
        unit: str,
        *,
        more_is_better: bool = False,
        goal: float | None = None,
        absolute: bool = False,
    ) -> Row:
        fresh = Row(scenario, quantity, unit, more_is_better, goal, absolute)
        return self.rows.setdefault((scenario, quantity), fresh)

    def table(self, rows: Iterable[Row], contenders: list[str]) -> Table:
        """These rows, with a column for each contender and one for the control."""
        rows = list(rows)
        control = None if self.twin is None else self.twin[1]
        shown = [one for one in contenders if one != control and any(one in row.values for row in rows)]
        table = Table(box=box.MARKDOWN)
        for title in ("", "unit", *shown, "goal", *([] if control is None else ["A/A"])):
            table.add_column(title, justify="right" if title in {*shown, "A/A"} else "left", no_wrap=True)
        for row in rows:
            cells = [row.quantity, row.unit, *(self._cell(row, one) for one in shown), row.goal_text()]
            if self.twin is not None and control is not None:
                both = all(one in row.values for one in self.twin)
                cells.append(f"{row.ratio(control, self.twin[0]):.3f} x" if both else "")
            table.add_row(*cells)
        return table

    def _cell(self, row: Row, contender: str) -> str:
        if contender not in row.values:
            return ""
        text = _short(row.median(contender))
        if len(row.values[contender]) > 1:
            text += f" ±{_short(row.spread(contender))}"
        peer = row.better_peer
        if contender in (*PEERS, "direct") or (peer is None and not row.absolute):
            return text
        if peer is not None and not row.absolute:
            text += f"  {row.ratio(contender, peer):.2f} x"
        return text + {None: "", True: " ✓", False: " ✗"}[row.meets(contender)]

    def as_json(self) -> list[dict[str, Any]]:
        return [
            {
                "scenario": row.scenario,
                "quantity": row.quantity,
                "unit": row.unit,
                "values": row.values,
                "medians": {one: row.median(one) for one in row.values},
                "goal": row.goal_text() or None,
                "meets": {one: row.meets(one) for one in row.values if one not in (*PEERS, "direct")},
            }
            for row in self.rows.values()
        ]


def _short(value: float) -> str:
    """Three digits that count, and all of those in front of the point."""
    size = abs(value)
    return f"{value:,.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"
