"""What the rows of the tables of advice are made of."""

from __future__ import annotations

import textwrap
from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple

from pgguard.session.verdicts import Kind

if TYPE_CHECKING:
    from pgguard.attribution.runtime import Language, Library, Server
    from pgguard.faults.catalogue import Advice


class Side(Enum):
    """Where code runs."""

    PARENT = "in the parent, before the fork"
    CHILD = "in the child, after the fork"


class Hook(NamedTuple):
    """A place that runs around every fork."""

    language: Language
    server: Server | None
    """``None``: whatever forks."""
    side: Side
    text: str
    """A clause that ends in where to do it, to be followed by what to call."""
    code: str
    """With a line ``{calls}`` for the calls, and where children leave without closing anything a line ``{closing}``."""
    sources: tuple[str, ...]
    anew: str | None = None
    """The code for what doesn't connect anew by itself, with a line ``{anew}`` as well."""


class Call(NamedTuple):
    """How a library lets go of connections, or makes new ones."""

    language: Language
    library: Library
    side: Side
    text: str
    """A clause that follows a hook's: what to call, and why."""
    code: str
    sources: tuple[str, ...]
    elsewhere: str | None = None
    """Code that another file needs for this to work, with that file's name in a comment."""
    server: Server | None = None
    """The server that it is mostly met with."""
    closing: str | None = None
    """How a process closes, before it leaves, what it has opened itself."""
    anew: str | None = None
    """How a process connects, where nothing does so when it is needed."""
    only: bool = True
    """That the library shows is enough to tell that it owns the connections; if it isn't, as others build upon it and
    needn't show, this is offered beside what they need."""


class Answer(NamedTuple):
    """Advice as a whole, for whatever shows all that is asked for here; ``None`` asks for nothing."""

    kinds: frozenset[Kind]
    language: Language
    library: Library | None
    advice: Advice


TAKEN_ALONG: Final = frozenset(
    {
        Kind.SHARED_BY_PROCESSES,
        Kind.INHERITED_CONNECTION,
        Kind.FOREIGN_TERMINATE,
        Kind.LEAKED_CONNECTION,
        Kind.TLS_CORRUPTION,
    }
)
"""The kinds that come of a fork."""


def code(text: str) -> str:
    """Code to paste, as it is written indented in a table."""
    return textwrap.dedent(text).strip("\n")
