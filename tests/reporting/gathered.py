"""Faults as they come back from a file, and the stacks of an application in them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pgguard.attribution.frames import Frame
from pgguard.faults.fault import Event, Role
from pgguard.reporting.recorded import Gatherer
from tests.faults.samples import fault

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pgguard.faults.fault import Fault
    from pgguard.reporting.recorded import Recording

LIBRARYS = Frame("Connection.wait", "/srv/app/.venv/lib/python3.11/site-packages/psycopg/connection.py", 495)
SERVE = Frame("serve", "/srv/app/src/app.py", 36, application=True)
MAIN = Frame("main", "/srv/app/src/app.py", 58, application=True)
STACK = (LIBRARYS, SERVE, MAIN)


def recorded(*faults: Fault) -> Recording:
    """What a file says that has these in it."""
    gatherer = Gatherer("faults.jsonl")
    for one in faults:
        gatherer.record(one)
    return gatherer.recording()


def seen(
    stack: Sequence[Frame] = STACK,
    *,
    roles: Sequence[Role] = (Role.INTRUDER,),
    opening: Sequence[Frame] | None = None,
    of: Fault | None = None,
) -> Fault:
    """A fault of which those in these roles, and the opener, were seen at places in the application."""
    what = fault() if of is None else of
    culprits = tuple(replace(one, stack=tuple(stack)) if one.role in roles else one for one in what.culprits)
    story = tuple(
        replace(chapter, stack=None if opening is None else tuple(opening))
        if chapter.event is Event.OPENED
        else chapter
        for chapter in what.story
    )
    return replace(what, culprits=culprits, story=story)


def causes(number: int, of: Fault | None = None) -> list[Fault]:
    """The first faults of so many causes."""
    what = fault() if of is None else of
    return [replace(what, id=n, cause=n, run="0") for n in range(1, number + 1)]
