"""What the tests' process and the guard's say to each other: JSON, a line each, over a socket that only they have.

The tests ask and the guard answers, one question after the other. It is for both of them, and so imports nothing that
a test may want to import first, in its own way.
"""

from __future__ import annotations

import json
from typing import Any, Literal, TypedDict


class Question(TypedDict, total=False):
    """What the tests want to know, or to have done."""

    do: Literal["front", "settle", "end"]
    upstream: str
    """Of a front, where PostgreSQL is: a connection string; empty: as the guard's own environment says."""
    environment: dict[str, str]
    """Of a front, the variables of which those are to be changed that lead to the server."""
    urls: list[str]
    """Of those, the ones that are to be changed in any case."""
    unix: bool
    """Of a front, whether the guard listens on a Unix socket, wherever PostgreSQL is."""
    records: str
    """Of a front, the file that faults are appended to; empty: none."""
    forks: list[float]
    """When the tests' process has forked since it last asked, in seconds since the epoch."""
    stretch: int
    """The number of the stretch that begins when everything has been judged."""
    name: str
    """What it is called."""
    anew: bool
    """A test begins with it: what has happened before in another one is to be told in full again."""
    awaited: str
    """A kind of fault to wait for, unless one has come that hasn't been told of."""
    seconds: float
    """How long all that may take."""


class Happened(TypedDict):
    """How often a fault has come in one stretch since that was last said."""

    stretch: int | None
    """``None``: it isn't certain in which."""
    fault: str
    """The key of what is told of it."""
    times: int


class Told(TypedDict):
    """A fault, as it is told to people and to programs."""

    record: dict[str, Any]
    headline: str
    """One line."""
    report: str
    cause: str
    """What it has come from: the same for all guards, in front of whichever server."""


class LeftOver(TypedDict):
    """A fault that the tests couldn't be told of any more."""

    where: str
    """The name of the stretch that it belongs to."""
    told: Told
    times: int


class Leaving(TypedDict):
    """What a guard leaves behind whose tests' process has ended without a word."""

    faults: list[LeftOver]
    sessions: int
    """How many clients had connected."""


class Answer(TypedDict, total=False):
    """What the guard says."""

    error: str
    """Why it can't do that: one line that says what to change."""
    address: str
    """Where it listens."""
    url: str
    """The same as libpq takes it."""
    upstream: str
    """Where PostgreSQL is."""
    changed: dict[str, str | None]
    """The variables that lead to the guard now; ``None``: not set any more."""
    missing: list[str]
    """Which evidence isn't available here."""
    judged: bool
    """Everything has been judged that had come."""
    happened: list[Happened]
    faults: dict[str, Told]
    """Those that haven't been told of yet, by their keys."""
    sessions: int
    """How many clients have connected."""
    said: list[str]
    """What it has logged."""


def encode(what: Question | Answer) -> bytes:
    """One of them as a line."""
    return json.dumps(what).encode() + b"\n"
