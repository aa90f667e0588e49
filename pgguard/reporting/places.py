"""Where in the application's sources a fault was seen, and how such a place is called in somebody's repository.

From the record alone: nothing is looked up on this machine, where the application may never have run. The frames are
those that :mod:`pgguard.attribution.frames` has marked as the application's own.
"""

from __future__ import annotations

import posixpath
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote

from pgguard.attribution.frames import innermost
from pgguard.faults.fault import Role
from pgguard.reporting.words import opening_stack, who

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pgguard.attribution.frames import Frame
    from pgguard.faults.fault import Fault

_FILELESS = "<"
"""What the names of code begin with that is in no file: ``<stdin>``."""


class Place(NamedTuple):
    """One side of a fault, seen in the application's own code."""

    who: str
    """Whose it is, and when it was there: ``pid 4867 (python3 app.py), thread 4880``."""
    frame: Frame
    """The innermost call there that is the application's own."""
    stack: tuple[Frame, ...]
    """All calls, the innermost first."""
    tid: int | None = None


def places(fault: Fault) -> list[Place]:
    """Where those who took part were seen in files of the application: who did it first, then the others.

    Behind them is where the connection was opened. Empty if nobody was seen there: what isn't a file, the text of
    ``python -c`` for one, is no place.
    """
    return list(_places(fault))


def _places(fault: Fault) -> Iterator[Place]:
    for culprit in fault.culprits:
        if culprit.stack and (frame := _own(culprit.stack)) is not None:
            yield Place(who(culprit), frame, culprit.stack, culprit.tid)
    opening = opening_stack(fault)
    if (frame := _own(opening)) is not None:
        owner = next((culprit for culprit in fault.culprits if culprit.role is Role.OWNER), None)
        opener = "" if owner is None else f"{who(owner)}, "
        yield Place(f"{opener}opening the connection", frame, opening)


def _own(stack: Sequence[Frame]) -> Frame | None:
    frame = innermost(stack)
    return None if frame is None or frame.file.startswith(_FILELESS) else frame


class Sources:
    """Where the sources are that a report is about: a repository's own directory.

    Args:
        root: The directory as it is called where the application runs, absolute.
    """

    def __init__(self, root: str) -> None:
        self._root = _normal(root)

    @property
    def uri(self) -> str:
        """It as a URI, with the slash at its end that makes it a directory."""
        return _uri(str(self._root).rstrip("/") + "/")

    def relative(self, file: str) -> str | None:
        """What a file is called within it, ``src/app.py``; ``None`` if it lies elsewhere.

        A relative name, as Ruby gives it for the script on its command line, counts from there.
        """
        path = _normal(file)
        if path.is_absolute():
            if not path.is_relative_to(self._root):
                return None
            path = path.relative_to(self._root)
        return None if ".." in path.parts or not path.parts else str(path)

    def uri_of(self, file: str) -> tuple[str, bool]:
        """A file as a URI reference, and whether that is relative to the root."""
        relative = self.relative(file)
        if relative is not None:
            # A colon in the first name would end a scheme: RFC 3986, section 4.2. It is quoted too.
            return _quote(relative), True
        return _uri(str(_normal(f"/{file}"))), False


def _normal(path: str) -> PurePosixPath:
    # Two slashes at the beginning are kept, and mean something of their own, by POSIX.
    return PurePosixPath(posixpath.normpath(f"/{path.lstrip('/')}" if path.startswith("/") else path))


def _uri(path: str) -> str:
    return f"file://{_quote(path)}"


def _quote(path: str) -> str:
    try:
        return quote(path, safe="/", errors="surrogateescape")
    except UnicodeEncodeError:  # half a character, which stands for no byte of a name
        return quote(path, safe="/", errors="replace")
