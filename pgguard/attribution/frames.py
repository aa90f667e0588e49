"""Which calls of a Python stack are the application's own, and where in it the application is.

Told by the files alone, as the interpreter knows them: what installers put somewhere is a library's, and so is
Python's own. All else is the application's. An editable install is told as what it is, its own sources. Where the
virtual environment or the interpreter is makes no difference, within the project's own directory for one. A frame
without a file (``<string>``, ``<frozen runpy>``) is nobody's.

The script that an installer puts into ``bin`` to start a program (gunicorn, celery) is none of the application's:
nothing happens there but a call. Such scripts have no extension, in directories that belong to an interpreter.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

MODULE = "<module>"
"""What the code of a file is called that is in no function."""


class Frame(NamedTuple):
    """A call that has not returned yet."""

    function: str
    """Its name; with Python 3.11 and newer its qualified name."""
    file: str
    """As the interpreter knows it: mostly an absolute path, in the process's own file system."""
    line: int
    application: bool = False
    """It is the application's own code."""


_LOOP = re.compile(r"/(?:asyncio/(?:base_events|runners)|trio/_core/_run|gevent/hub|eventlet/hubs/\w+)\.py$")
"""Event loops: what has started one says nothing about what is being waited for in it."""
_FILELESS = "<"
_LIBRARY = re.compile(
    r"""
      /(?:site|dist)-packages/                     # pip, Debian, whatever the prefix
    | /lib(?:32|64)?/(?:python|pypy)\d+\.\d+t?/    # the standard library: /usr, pyenv, uv, conda, a virtual environment
    | /lib-python/\d                               # PyPy's, before 3.8
    | /python\d+\.zip/                             # the standard library in one file
    | \.(?:egg|whl)/                               # buildout, pex
    | /__pypackages__/                             # PDM
    # What has no such directory around it, as of `pip install --target`, and checkouts: what speaks to PostgreSQL.
    | /(?:psycopg|psycopg_pool)/(?:_?[a-z]+_)?(?:base|async|connection|cursor|generators|pool|transaction|waiting)\.py$
    | /psycopg2/(?:__init__|extras|pool)\.py$
    | /asyncpg/(?:connect_utils|connection|pool|prepared_stmt|transaction)\.py$
    | /pg8000/(?:core|dbapi|legacy|native)\.py$
    | /sqlalchemy/(?:dialects|engine|orm|pool|sql)/
    | /django/db/(?:backends|models)/
    """,
    re.VERBOSE,
)
_HOME = re.compile(r"^.*/(?:(?:site|dist)-packages|(?:python|pypy)\d+\.\d+t?)/(?=.)")
"""What libraries, and the standard library's modules, are beneath."""
_PREFIX = re.compile(r"^(.*)/lib(?:32|64)?/(?:python|pypy)\d")
"""The directory that an interpreter or a virtual environment is in."""
_SCRIPT = re.compile(r"^(.*)/bin/[^/.]+$")
_SYSTEMS = frozenset({"", "/usr", "/usr/local"})
"""Prefixes of programs that everybody can run."""
_ANONYMOUS = frozenset({"__init__.py", "__main__.py"})
"""Names of files that say nothing without their directory's."""


def told_apart(frames: Sequence[Frame]) -> tuple[Frame, ...]:
    """The calls of one stack, the innermost first, with the application's own marked."""
    own = [
        frame.file != "" and not frame.file.startswith(_FILELESS) and _LIBRARY.search(f"/{frame.file}") is None
        for frame in frames
    ]
    if own and own[-1] and _is_launcher(frames):
        own[-1] = False
    return tuple(frame._replace(application=mark) for frame, mark in zip(frames, own, strict=True))


def _is_launcher(frames: Sequence[Frame]) -> bool:
    """Whether the outermost call is of a script that an installer has made."""
    found = _SCRIPT.match(frames[-1].file)
    if found is None or frames[-1].function != MODULE:
        return False
    prefixes = {prefix[1] for frame in frames if (prefix := _PREFIX.match(frame.file)) is not None}
    return found[1] in prefixes or found[1] in _SYSTEMS


def short_path(frame: Frame) -> str:
    """The file of a call; of a library's without the directory that libraries are in."""
    return frame.file if frame.application else _HOME.sub("", frame.file)


def place(frames: Sequence[Frame]) -> str | None:
    """Where the application is, its innermost call: ``app.py:23 in load_user``.

    ``None`` if no call is its own, or none within an event loop, which waits for whatever comes.
    """
    for frame in frames:
        if frame.application:
            return _place(frame)
        if _LOOP.search(frame.file):
            break
    return None


def _place(frame: Frame) -> str:
    directory, _, name = frame.file.rpartition("/")
    if name in _ANONYMOUS and directory:
        name = f"{directory.rpartition('/')[2]}/{name}"
    return f"{name}:{frame.line}" if frame.function == MODULE else f"{name}:{frame.line} in {frame.function}"
