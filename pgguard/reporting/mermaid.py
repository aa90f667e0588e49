"""The sequence of a fault as a Mermaid ``sequenceDiagram``, which GitHub and others draw where it stands in Markdown.

Other people's text is in its labels. What means something to Mermaid there is written by its number, ``#59;`` for a
semicolon: https://mermaid.js.org/syntax/sequenceDiagram.html#entity-codes-to-escape-characters. A line never begins
with it, and what are lines of a label here stands between ``<br/>``.
"""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING, Final, NamedTuple

from pgguard.faults.text import printable, shorten
from pgguard.reporting.sequence import Gap, What, duration, sequence_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pgguard.faults.fault import Fault
    from pgguard.reporting.sequence import Sequence as Story
    from pgguard.reporting.sequence import Step

LIMIT: Final = 50_000
"""Characters of a diagram that Mermaid draws unless it is told otherwise: ``maxTextSize``."""
ARROWS: Final = 500
"""The same of arrows: ``maxEdges``."""

_SPECIAL: Final = re.compile(r"""[#;%{}<>&$`\\ﬂ°¶ß]""")
"""What ends a label, begins a comment, a directive, a tag or a formula; and the marks that Mermaid itself puts in the
place of numbers while it reads (``encodeEntities()`` in its ``utils.ts``)."""
_COLONS: Final = re.compile("style|classDef|wrap")
"""Words with which a colon means something: behind the first two Mermaid takes the semicolon of a number away
(``encodeEntities()`` likewise); the last one begins a label that is to be wrapped, or not to be."""
_WIDTH: Final = 40
"""Columns of a label's line."""
_TEXT: Final = 160
"""Characters of a label, at most."""
_SHADE: Final = "rect rgba(255, 0, 0, 0.15)"
"""What is wrong stands on this, on a dark ground as well as on a light one."""


class Diagram(NamedTuple):
    """A diagram, and what is to be said below it."""

    lines: list[str]
    unknown: tuple[str, ...]
    """What the record doesn't say, a sentence each."""


def diagram(fault: Fault) -> Diagram | None:
    """The diagram of a fault; ``None`` if its record doesn't tell of anything but the fault itself."""
    story = sequence_of(fault)
    if not fault.requests and len(story.steps) < 3:
        return None
    head = ["sequenceDiagram", *_lanes(story)]
    drawn = [list(_item(story, item)) for item in story.items]
    # Of what goes beyond the limits the beginning is left out: what is wrong comes last.
    left_out = False
    while drawn and (_size(head, drawn) > LIMIT or _arrows(drawn) > ARROWS):
        drawn.pop(0)
        left_out = True
    if left_out:
        drawn.insert(0, [f"    {_over(story)}: what came before is left out"])
    return Diagram([*head, *(line for item in drawn for line in item)], story.unknown)


def _size(head: Sequence[str], drawn: Sequence[Sequence[str]]) -> int:
    return sum(len(line) + 1 for item in (head, *drawn) for line in item) + 100


def _arrows(drawn: Sequence[Sequence[str]]) -> int:
    return sum(">>" in line or "-x" in line for item in drawn for line in item)


def label(text: str) -> str:
    """Other people's text as Mermaid shows it unchanged: in lines of a label."""
    lines = textwrap.wrap(shorten(printable(text), _TEXT), _WIDTH, break_on_hyphens=False) or [" "]
    return "<br/>".join(map(_escaped, lines))


def _escaped(text: str) -> str:
    escaped = _SPECIAL.sub(lambda found: f"#{ord(found.group())};", text)
    return escaped.replace(":", "#58;") if _COLONS.search(text) else escaped


def _lanes(story: Story) -> Iterator[str]:
    for n, lane in enumerate(story.lanes):
        title = "<br/>".join(_escaped(printable(part)) for part in (lane.name, lane.program, lane.thread) if part)
        yield f"    participant {_id(n)} as {title}"


def _id(lane: int) -> str:
    return f"L{lane}"


def _over(story: Story, lanes: Sequence[int] = ()) -> str:
    """A note over some lanes, or over all."""
    first, last = (min(lanes), max(lanes)) if lanes else (0, story.server)
    return f"Note over {_id(first)}" if first == last else f"Note over {_id(first)},{_id(last)}"


def _item(story: Story, item: Step | Gap) -> Iterator[str]:
    if isinstance(item, Gap):
        yield f"    {_over(story)}: {duration(item.seconds)} later"
        return
    lines = list(_step(story, item))
    if item.offending:
        yield f"    {_SHADE}"
        yield from (f"        {line}" for line in lines)
        yield "    end"
    else:
        yield from (f"    {line}" for line in lines)


def _step(story: Story, step: Step) -> Iterator[str]:
    text = " ".join(part for part in (story.time(step), step.text) if part)
    if step.sql:
        text += f": {step.sql}"
    if step.what is What.ANSWER and step.source is not None:
        # Whoever reads first gets it.
        for n, target in enumerate(step.targets):
            yield f"{_id(step.source)}-->>{_id(target)}: {label(text if n == 0 else 'or here')}"
    elif step.source is None or not step.targets:
        yield f"{_over(story, step.targets)}: {label(text)}"
    elif step.stopped:
        yield f"{_id(step.source)}-x{_id(story.guard)}: {label(text)}"
    elif step.what is What.INHERITED:
        yield f"{_id(step.source)}->>{_id(step.targets[0])}: {label(text)}"
    else:
        for target in step.targets:
            yield f"{_id(step.source)}->>{_id(target)}: {label(text)}"
    if step.detail:
        about = [lane for lane in (step.source, *step.targets) if lane is not None and lane < story.guard]
        yield f"{_over(story, about)}: {label(step.detail)}"
