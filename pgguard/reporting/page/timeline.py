"""Which process had which connection open, and when: where things are in that drawing.

A row is a process, a bar the time for which it is known to have had one session's connection open, and a mark a fault.
A session that has a bar in two rows is one that two processes had.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Final, NamedTuple

from pgguard.faults.catalogue import Severity
from pgguard.faults.text import counted, process_label, shorten
from pgguard.reporting.page.drawing import CHARACTER, fitting
from pgguard.reporting.record import rfc3339
from pgguard.reporting.sequence import duration

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pgguard.reporting.recorded import Presence, RecordedSession

PROCESSES: Final = 24
"""Rows, at most."""
BARS: Final = 240
"""Bars, at most."""
_DEEP: Final = 6
"""Bars of one process below one another, at most: what comes on top is drawn over the last of them."""
_WIDTH: Final = 1000
_NAMES: Final = 250
"""Pixels of the names of processes."""
_BAR: Final = 14
_STEP: Final = 18
"""Pixels from one bar to the next."""
_TOP: Final = 30
_LEAST: Final = 4
"""Pixels of a bar at least."""
_MARKS: Final = 12
"""Marks on one bar, at most."""
_FOLD: Final = 120
"""Pixels of a long time in which nobody is known to have had a connection open."""
_LONG: Final = 0.5
"""Of all the time in which somebody is known to have had one, what is long."""
_FOLDS: Final = 4
"""At most; the longest."""
_SHORTEST: Final = 60
"""Pixels of the times between two of those, at least."""
_STEPS: Final = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 21600, 43200, 86400)
"""Seconds from one tick to the next."""


class Bar(NamedTuple):
    """A process's time with one session's connection."""

    x: float
    y: float
    width: float
    label: str
    title: str
    opened: bool
    """The process has opened it."""
    ended: bool
    """It is known to have let go of it at its end, or the session was over; otherwise it had it for longer, maybe."""


class Cross(NamedTuple):
    """A fault."""

    x: float
    y: float
    severity: Severity
    title: str


class Row(NamedTuple):
    """A process."""

    y: float
    name: str
    program: str


class Tick(NamedTuple):
    """A moment on the axis."""

    x: float
    text: str


class Fold(NamedTuple):
    """A long time in which nobody is known to have had a connection open."""

    x: float
    text: str


class Timeline(NamedTuple):
    """The drawing."""

    width: float
    height: float
    rows: tuple[Row, ...]
    bars: tuple[Bar, ...]
    crosses: tuple[Cross, ...]
    ticks: tuple[Tick, ...]
    folds: tuple[Fold, ...]
    shared: int
    """Sessions that more than one process had."""
    left_out: tuple[str, ...]
    """What isn't drawn, a clause each."""
    began: str
    ended: str


class _Owner(NamedTuple):
    """A process, of which the pid may have been another's before."""

    pid: int
    started: int


class _Held(NamedTuple):
    session: RecordedSession
    presence: Presence


def timeline_of(sessions: Sequence[RecordedSession], more_sessions: int = 0) -> Timeline | None:
    """The drawing of these sessions; ``None`` if of none of them a process is known."""
    known: dict[int, set[int]] = {}
    for session in sessions:
        for presence in session.processes.values():
            if presence.process is not None:
                known.setdefault(presence.pid, set()).add(presence.process.started)
    held: dict[_Owner, list[_Held]] = {}
    for session in sessions:
        for presence in session.processes.values():
            # One that couldn't be looked at is the one that could be, as long as no other has had its pid.
            starts = known.get(presence.pid, set()) if presence.process is None else {presence.process.started}
            started = next(iter(starts)) if len(starts) == 1 else 0
            held.setdefault(_Owner(presence.pid, started), []).append(_Held(session, presence))
    if not held:
        return None
    gravest = sorted(
        held, key=lambda owner: (-max(one.session.severity.rank for one in held[owner]), -len(held[owner]))
    )
    rows = sorted(gravest[:PROCESSES], key=lambda owner: (min(one.presence.since for one in held[owner]), owner))
    left_out = [counted(len(held) - len(rows), "more process", "more processes")] if len(held) > len(rows) else []
    drawn = {id(one.session): one for owner in rows for one in held[owner]}
    missing = len(sessions) - len(drawn) + more_sessions
    if missing:
        left_out.append(counted(missing, "more session"))
    return _Drawer([(owner, held[owner]) for owner in rows], left_out).timeline()


class _Drawer:
    def __init__(self, rows: list[tuple[_Owner, list[_Held]]], left_out: list[str]) -> None:
        everything = [one for _, held in rows for one in held]
        self._rows = rows
        self._left_out = left_out
        self._axis = _Axis(
            [
                (one.presence.since, max(one.presence.until, *(mark.at for mark in one.session.marks)))
                for one in everything
            ]
        )
        self._room = BARS
        self._many_runs = len({one.session.run for one in everything}) > 1

    def timeline(self) -> Timeline:
        rows: list[Row] = []
        bars: list[Bar] = []
        crosses: list[Cross] = []
        y = float(_TOP)
        for owner, held in self._rows:
            process = next((one.presence.process for one in held if one.presence.process is not None), None)
            own = list(self._bars(owner, held, y))
            for bar, one in own:
                faults = list(self._crosses(owner, one, bar))
                crosses += faults
                hidden = any(cross.x < bar.x + len(bar.label) * CHARACTER + 14 for cross in faults)
                bars.append(bar._replace(label="") if hidden else bar)
            deep = max((round((bar.y - y) / _STEP) for bar, _ in own), default=0) + 1
            program = "" if process is None else process_label(process)
            rows.append(Row(y, f"pid {owner.pid}", fitting(program, _NAMES - 20)))
            y += max(deep * _STEP + 10, 44)
        owners: dict[int, int] = {}
        for _, held in self._rows:
            for one in held:
                owners[id(one.session)] = owners.get(id(one.session), 0) + 1
        return Timeline(
            _WIDTH,
            y + 8,
            tuple(rows),
            tuple(bars),
            tuple(crosses),
            tuple(self._axis.ticks()),
            tuple(self._axis.folds()),
            sum(count > 1 for count in owners.values()),
            tuple(self._left_out),
            rfc3339(self._axis.began),
            rfc3339(self._axis.ended),
        )

    def _bars(self, owner: _Owner, held: list[_Held], top: float) -> Iterator[tuple[Bar, _Held]]:
        """The bars of one process, each where no other is at that time, as long as there is room below one another."""
        ends = [-math.inf] * _DEEP
        for one in sorted(held, key=lambda one: one.presence.since):
            if not self._room:
                return
            self._room -= 1
            presence, session = one.presence, one.session
            x = self._axis.x(presence.since)
            width = max(self._axis.x(presence.until) - x, _LEAST)
            place = next((n for n, end in enumerate(ends) if end + 2 <= x), _DEEP - 1)
            crowded = ends[place] > x
            ends[place] = max(ends[place], x + width)
            number = f"session {session.facts.id}" + (f" of run {session.run}" if self._many_runs else "")
            had = "opened" if presence.opened else "had"
            title = (
                f"{number}: pid {owner.pid} {had} its connection, known from {rfc3339(presence.since)} to "
                f"{rfc3339(presence.until)}; {counted(session.times, 'recorded fault')}"
            )
            label = number if width > len(number) * CHARACTER + 8 and not crowded else ""
            bar = Bar(
                x,
                top + 6 + place * _STEP,
                width,
                label,
                title,
                presence.opened,
                presence.left or (session.over and presence.until >= session.last_at),
            )
            yield bar, one

    def _crosses(self, owner: _Owner, one: _Held, bar: Bar) -> Iterator[Cross]:
        """The faults of a session, in the row of whoever did it, or of the process that had it first."""
        first = next(iter(one.session.processes))
        own = [mark for mark in one.session.marks if (first if mark.pid is None else mark.pid) == owner.pid]
        last = -math.inf
        told = 0
        for mark in sorted(own, key=lambda mark: mark.at):
            x = self._axis.x(mark.at)
            if x - last < 7 or told >= _MARKS:
                continue
            last, told = x, told + 1
            yield Cross(x, bar.y + _BAR / 2, mark.severity, f"{mark.severity}: {mark.kind} at {rfc3339(mark.at)}")


class _Stretch(NamedTuple):
    """A time in which there is always somebody who has a connection open, or nearly so, and where it is drawn."""

    began: float
    ended: float
    left: float
    right: float


class _Axis:
    """Where moments are; long times in which nobody is known to have had a connection open are folded.

    Args:
        times: From when to when somebody had one.
    """

    def __init__(self, times: list[tuple[float, float]]) -> None:
        self.began = min(began for began, _ in times)
        self.ended = max(ended for _, ended in times)
        merged = _merged(times)
        long = max(_LONG * sum(ended - began for began, ended in merged), 1.0)
        gaps = [(after[0] - before[1], after[0]) for before, after in pairwise(merged)]
        folded = {until for gap, until in sorted(gaps)[-_FOLDS:] if gap >= long}
        self._stretches = list(self._drawn(_merged(times, folded)))

    @staticmethod
    def _drawn(merged: list[tuple[float, float]]) -> Iterator[_Stretch]:
        room = _WIDTH - _NAMES - 14 - _FOLD * (len(merged) - 1) - _SHORTEST * len(merged)
        total = sum(ended - began for began, ended in merged)
        left = float(_NAMES)
        for began, ended in merged:
            share = (ended - began) / total if total else 1 / len(merged)
            right = left + _SHORTEST + share * room
            yield _Stretch(began, ended, left, right)
            left = right + _FOLD

    def x(self, at: float) -> float:
        """Where a moment is."""
        stretch = next((one for one in self._stretches if at <= one.ended), self._stretches[-1])
        length = max(stretch.ended - stretch.began, 1e-3)
        share = min(max((at - stretch.began) / length, 0.0), 1.0)
        return stretch.left + share * (stretch.right - stretch.left)

    def folds(self) -> Iterator[Fold]:
        """Where a long time is folded."""
        for before, after in pairwise(self._stretches):
            yield Fold((before.right + after.left) / 2, f"{duration(after.began - before.ended)} later")

    def ticks(self) -> Iterator[Tick]:
        """Moments to read the times from; where something is folded, that says it, and there are none behind it."""
        first = self._stretches[0]
        if len(self._stretches) > 1 and first.right - first.left < _NAMES:
            yield Tick(first.left, "0")
            return
        span = max(first.ended - first.began, 1e-3)
        step = _step(span / 6)
        for n in range(math.floor(span / step) + 1):
            yield Tick(self.x(self.began + n * step), f"+{_short(n * step)}" if n else "0")


def _merged(times: list[tuple[float, float]], folded: set[float] | None = None) -> list[tuple[float, float]]:
    """Times of which those are one that overlap, or between which nothing is folded, as that is known by its end."""
    merged: list[tuple[float, float]] = []
    for began, ended in sorted(times):
        apart = bool(merged) and began > merged[-1][1]
        if merged and not (apart and (folded is None or began in folded)):
            merged[-1] = (merged[-1][0], max(ended, merged[-1][1]))
        else:
            merged.append((began, ended))
    return merged


def _step(wanted: float) -> float:
    """A round time span that is no shorter."""
    if wanted >= 1:
        return next((one for one in _STEPS if one >= wanted), 0) or math.ceil(wanted / 86400) * 86400
    exponent: float = 10.0 ** math.floor(math.log10(wanted))
    return next(factor * exponent for factor in (1, 2, 5, 10) if factor * exponent >= wanted)


def _short(seconds: float) -> str:
    """A round time span: ``20 ms``, ``5 s``, ``10 min``."""
    if seconds < 1:
        return f"{shorten(f'{seconds * 1000:g}', 6)} ms"
    if seconds < 60:
        return f"{seconds:g} s"
    if seconds < 3600:
        return f"{seconds / 60:g} min"
    return duration(seconds)
