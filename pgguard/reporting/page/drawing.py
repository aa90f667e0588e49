"""Where things are in the drawings: lines, boxes and texts in pixels; templates make SVG of them.

There is no measuring of text here: characters have an average width, and what may not fit is shortened. Whatever is
shortened stands in full in the words beside a drawing.
"""

from __future__ import annotations

import textwrap
import unicodedata
from typing import TYPE_CHECKING, Final, NamedTuple

from pgguard.faults.fault import Role
from pgguard.faults.text import printable, shorten
from pgguard.reporting.sequence import Gap, LaneKind, Sequence, Step, What, duration

if TYPE_CHECKING:
    from collections.abc import Iterator

CHARACTER: Final = 7.0
"""Pixels of a character of the size that texts have here, on the average."""
_TIMES: Final = 118
"""Pixels of the column of times."""
_LANE: Final = 178
"""Pixels of a lane, where there is room for all of them on a page that is :data:`_PAGE` pixels wide."""
_NARROW: Final = 134
"""Pixels of a lane at least."""
_PAGE: Final = 1120
_HEAD: Final = 84
"""Pixels of the boxes with the lanes' names."""
_LINE: Final = 16
"""Pixels from one line of text to the next."""
_GAP: Final = 34

_ROLES: Final = {
    Role.INTRUDER: "the intruder",
    Role.CLOSER: "ended it",
    Role.OWNER: "opened it",
    Role.REQUESTER: "used it",
    Role.HOLDER: "has it open",
}


class Box(NamedTuple):
    """A lane's name."""

    x: float
    """Of its middle."""
    left: float
    width: float
    lines: tuple[str, ...]
    """What it is called; the first line stands out."""
    role: str
    kind: str


class Life(NamedTuple):
    """A lane's line."""

    x: float
    top: float
    since: float
    """Where the process is known to have the connection from."""
    bottom: float


class Label(NamedTuple):
    """A text at a place."""

    x: float
    y: float
    text: str
    anchor: str
    style: str


class Arrow(NamedTuple):
    """Something that is sent."""

    y: float
    start: float
    end: float
    style: str
    """``request``, ``answer``, ``fork`` or ``offence``."""
    head: str
    """``left``, ``right``, or ``cross`` where it is stopped."""
    via: float | None
    """Where it passes the guard."""
    readers: tuple[float, ...]
    """Where it may have been read, if that is in several places."""


class Note(NamedTuple):
    """A box across lanes."""

    x: float
    y: float
    width: float
    height: float
    lines: tuple[Label, ...]
    style: str


class Fold(NamedTuple):
    """A time in which nothing happened."""

    y: float
    text: str


class Diagram(NamedTuple):
    """A sequence diagram."""

    width: float
    height: float
    boxes: tuple[Box, ...]
    lives: tuple[Life, ...]
    arrows: tuple[Arrow, ...]
    notes: tuple[Note, ...]
    folds: tuple[Fold, ...]
    labels: tuple[Label, ...]


def fitting(text: str, pixels: float) -> str:
    """As much of a text as there is room for; a wide character takes the room of two."""
    text = printable(text)
    room = max(4, int(pixels / CHARACTER))
    if len(text) <= room // 2:
        return text
    taken = 0
    for n, character in enumerate(text):
        taken += 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if taken > room:
            return shorten(text, max(2, n))
    return text


def draw(sequence: Sequence) -> Diagram:
    """The diagram of a sequence."""
    return _Drawer(sequence).diagram()


class _Drawer:
    def __init__(self, sequence: Sequence) -> None:
        self._sequence = sequence
        self._lane = min(_LANE, max(_NARROW, (_PAGE - _TIMES) // len(sequence.lanes)))
        self._y = float(_HEAD + 14)
        self._arrows: list[Arrow] = []
        self._notes: list[Note] = []
        self._folds: list[Fold] = []
        self._labels: list[Label] = []
        self._since: dict[int, float] = {}
        """By lane, where the process is known to have the connection from."""

    def diagram(self) -> Diagram:
        lanes = self._sequence.lanes
        width = _TIMES + self._lane * len(lanes)
        for item in self._sequence.items:
            if isinstance(item, Gap):
                self._fold(item)
            else:
                self._step(item)
        bottom = self._y + 12
        lives = tuple(
            Life(self._x(n), _HEAD, self._since.get(n, _HEAD) if lane.pid is not None else _HEAD, bottom)
            for n, lane in enumerate(lanes)
        )
        return Diagram(
            width,
            bottom + 8,
            tuple(self._boxes()),
            lives,
            tuple(self._arrows),
            tuple(self._notes),
            tuple(self._folds),
            tuple(self._labels),
        )

    def _x(self, lane: int) -> float:
        return _TIMES + self._lane * lane + self._lane / 2

    def _boxes(self) -> Iterator[Box]:
        room = self._lane - 24
        for n, lane in enumerate(self._sequence.lanes):
            program = [fitting(lane.program, room)] if lane.thread else _in_lines(lane.program, room, 2)
            # How many others there are has no program below it.
            name = [fitting(lane.name, room - 14)] if lane.program else _in_lines(lane.name, room - 14, 2)
            thread = [fitting(lane.thread, room)] if lane.thread else []
            lines = [*name, *filter(None, program), *thread]
            role = next((_ROLES[one] for one in _ROLES if one in lane.roles), "")
            if self._sequence.refused and role:
                role = "asked for it"
            kind = "guard" if lane.kind is LaneKind.GUARD else "server" if lane.kind is LaneKind.SERVER else "client"
            if Role.INTRUDER in lane.roles or Role.CLOSER in lane.roles:
                kind = "intruder"
            yield Box(self._x(n), self._x(n) - self._lane / 2 + 8, self._lane - 16, tuple(lines), role, kind)

    def _fold(self, gap: Gap) -> None:
        self._folds.append(Fold(self._y + _GAP / 2, f"{duration(gap.seconds)} later"))
        self._y += _GAP

    def _step(self, step: Step) -> None:
        for lane in (*([] if step.source is None else [step.source]), *step.targets):
            self._since.setdefault(lane, self._y + 8 if step.what in (What.INHERITED, What.RECEIVED) else _HEAD)
        time = self._sequence.time(step)
        if step.source is None or step.what is What.OUTCOME:
            self._note(step, time)
        elif step.what is What.INHERITED:
            self._fork(step, time)
        else:
            self._arrow(step, time)

    def _time(self, time: str, y: float, *, offending: bool) -> None:
        if time:
            self._labels.append(Label(_TIMES - 10, y, time, "end", "time"))
        if offending:
            self._labels.append(Label(_TIMES - 10, y + (_LINE if time else 0), "the fault", "end", "fault"))

    def _fork(self, step: Step, time: str) -> None:
        source, target = self._x(step.source or 0), self._x(step.targets[0])
        left, right = min(source, target), max(source, target)
        self._labels.append(Label((left + right) / 2, self._y + 12, "fork", "middle", "label"))
        y = self._y + 20
        self._arrows.append(Arrow(y, source, target, "fork", "right" if target > source else "left", None, ()))
        text = fitting(step.text, max(self._lane * 2, right - left))
        self._labels.append(Label((left + right) / 2, y + 15, text, "middle", "small"))
        self._time(time, y + 4, offending=False)
        self._y += 48

    def _arrow(self, step: Step, time: str) -> None:
        """A message from one side to the other, with what it is above its line, and its SQL below."""
        sequence = self._sequence
        guard = self._x(sequence.guard)
        source = self._x(step.source or 0)
        answer = step.source == sequence.server
        ends = [self._x(n) for n in step.targets]
        end = min(ends) if answer else max(ends)
        label = step.text.removeprefix("sends ")
        room = abs(end - source) - 16
        if answer:
            # Beside the guard's line and the server's there is always room.
            self._labels.append(Label(source - 8, self._y + 12, fitting(label, room), "end", "label"))
        else:
            self._labels.append(Label(source + 8, self._y + 12, fitting(label, room), "start", "label"))
        y = self._y + 19
        style = "offence" if step.offending else "answer" if answer else "request"
        head = "cross" if step.stopped else "left" if answer else "right"
        readers = tuple(ends) if len(ends) > 1 else ()
        self._arrows.append(Arrow(y, source, guard if step.stopped else end, style, head, guard, readers))
        self._time(time, y + 4, offending=step.offending)
        below = y
        for text, kind in ((step.sql, "sql"), (step.detail, "small")):
            if text:
                below += _LINE
                lines = [fitting(text, room)] if kind == "sql" else _in_lines(text, room)
                anchor, x = ("end", source - 8) if answer else ("start", source + 8)
                for n, line in enumerate(lines):
                    below += _LINE if n else 0
                    self._labels.append(Label(x, below - 1, line, anchor, kind))
        self._y = below + 16

    def _note(self, step: Step, time: str) -> None:
        """A box across the lanes that it is about."""
        xs = [self._x(n) for n in (*step.targets, *([] if step.source is None else [step.source]))]
        left, right = min(xs) - self._lane / 2 + 12, max(xs) + self._lane / 2 - 12
        text = step.text if not step.detail else f"{step.text} ({step.detail})"
        lines = _in_lines(text, right - left - 16)
        if len(lines) > 3 and right - left < 2 * self._lane:
            # A text of several lines in a single lane is hard to read.
            room = _TIMES + self._lane * len(self._sequence.lanes) - 12
            right = min(left + 2 * self._lane, room)
            left = max(_TIMES, min(left, right - 2 * self._lane + 24))
            lines = _in_lines(text, right - left - 16)
        height = _LINE * len(lines) + 10
        style = "fault" if step.offending else "outcome" if step.what is What.OUTCOME else "remark"
        middle = (left + right) / 2
        texts = tuple(Label(middle, self._y + 16 + _LINE * n, line, "middle", "label") for n, line in enumerate(lines))
        self._notes.append(Note(left, self._y + 2, right - left, height, texts, style))
        self._time(time, self._y + 16, offending=step.offending)
        self._y += height + 14 + (_LINE if step.offending and time and len(lines) == 1 else 0)


def _in_lines(text: str, pixels: float, most: int = 5) -> list[str]:
    """A text in as many lines as it takes, or as there may be."""
    room = max(8, int(pixels / CHARACTER))
    lines = textwrap.wrap(printable(text), room) or [""]
    if len(lines) > most:
        lines[most - 1 :] = [" ".join(lines[most - 1 :])]
    return [fitting(line, pixels + CHARACTER) for line in lines]
