"""Which calls of a Python stack are the application's own, and where in it the application is.

Told by the files alone, as the interpreter knows them: what installers put somewhere is a library's, and so is
Python's own. All else is the application's. An editable install is told as what it is, its own sources. Where the
virtual environment or the interpreter is makes no difference, within the project's own directory for one. A frame
without a file (``<frozen runpy>``, ``<template>``) is nobody's, with two exceptions:

- what is piped into the interpreter, or typed at a prompt (``<stdin>``, ``<console>``), is the application's;
- ``<string>`` is what both ``python -c`` and code that a library has made are called. It is the application's where the
  program itself is that code: the outermost calls; and functions that the code of ``-c`` defines, in threads too.

What others start with ``-c`` is none of that: multiprocessing's children, for one.

The script that an installer puts into ``bin`` to start a program (gunicorn, celery) is none of the application's:
nothing happens there but a call. Such scripts have no extension, in directories that belong to an interpreter.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from pgguard.attribution.ruby.frames import HOME, LOOP, MAIN

if TYPE_CHECKING:
    from collections.abc import Sequence

MODULE = "<module>"
"""What the code of a file is called that is in no function."""


class Frame(NamedTuple):
    """A call that has not returned yet."""

    function: str
    """Its name; with Python 3.11 and newer its qualified name, and with Ruby 3.4 and newer its class's name too."""
    file: str
    """As the interpreter knows it: mostly an absolute path, in the process's own file system."""
    line: int
    application: bool = False
    """It is the application's own code."""


_LOOP = re.compile(
    rf"/(?:(?:asyncio/(?:base_events|runners)|trio/_core/_run|gevent/hub|eventlet/hubs/\w+)\.py|(?:{LOOP})\.rb)$"
)
"""Event loops: what has started one says nothing about what is being waited for in it."""
_FILELESS = "<"
_TYPED = re.compile(r"<(?:stdin|console|(?:b|i)?python-input-.*|doctest .*)>$")
"""Code that somebody has written without a file for it: pipes, prompts, examples in a docstring."""
_TEXT = "<string>"
_STARTED = re.compile(
    r"/(?:(?:multiprocess(?:ing)?|billiard)/(?:spawn|forkserver|resource_tracker|semaphore_tracker)|execnet/\w+)\.py$"
)
"""What is called by the ``-c`` that a library starts its own processes with."""
_SHELL = re.compile(r"/django/core/management/commands/shell\.py$")
"""What runs a text that a user has given it, as ``manage.py shell -c`` does."""
_CODE_OPTION = re.compile(r"-[bBdEhiIOPqRsStuvVx?]*([cm])(.*)", re.DOTALL)
"""``-c`` and ``-m`` with options in front of it, in one argument: "Command line and environment" in Python's manual."""
_VALUED = frozenset({"-W", "-X", "--check-hash-based-pycs"})
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


def told_apart(frames: Sequence[Frame], code: str | None = None) -> tuple[Frame, ...]:
    """The calls of one stack, the innermost first, with the application's own marked.

    Args:
        frames: The calls.
        code: What the process runs, if that is known and is a text: from :func:`code_of`.
    """
    own = [
        frame.file != "" and not frame.file.startswith(_FILELESS) and _LIBRARY.search(f"/{frame.file}") is None
        for frame in frames
    ]
    _mark_fileless(frames, code, own)
    if own and own[-1] and _is_launcher(frames):
        own[-1] = False
    return tuple(frame._replace(application=mark) for frame, mark in zip(frames, own, strict=True))


def code_of(cmdline: Sequence[str]) -> str | None:
    """The text that a Python interpreter runs, by its command line: ``python -c TEXT``; ``None`` if it runs none."""
    rest = iter(cmdline[1:])
    for argument in rest:
        if found := _CODE_OPTION.match(argument):
            option, joined = found.groups()
            return (joined or next(rest, None)) if option == "c" else None
        if argument in _VALUED:
            next(rest, None)
        elif argument == "-" or not argument.startswith("-"):
            return None
    return None


def _mark_fileless(frames: Sequence[Frame], code: str | None, own: list[bool]) -> None:
    """Mark those calls that are the application's own though they are in no file."""
    program = False
    for n in reversed(range(len(frames))):
        file, function = frames[n].file, frames[n].function
        if file != _TEXT:
            program = False
            own[n] = own[n] or _TYPED.match(file) is not None
            continue
        if n + 1 == len(frames) or frames[n + 1].file != _TEXT:
            # A run of such calls begins, which is a program if nobody has called it.
            is_called = n + 1 < len(frames) and _SHELL.search(frames[n + 1].file) is None
            program = function == MODULE and not is_called and not _starts_for_a_library(frames[: n + 1])
        if function == MODULE or code is None:
            own[n] = program
        else:
            own[n] = _defines(code, frames[n])


def _starts_for_a_library(frames: Sequence[Frame]) -> bool:
    """Whether the run of texts that these calls end with does nothing but call a library that has started it."""
    called = next((frame.file for frame in reversed(frames) if frame.file != _TEXT), "")
    return _STARTED.search(f"/{called}") is not None


def _defines(code: str, frame: Frame) -> bool:
    """Whether a function that is called is one of this text's: defined there, by the line that it is at."""
    name = frame.function.rpartition(".")[2]
    before = "\n".join(code.split("\n")[: frame.line])
    if frame.line > code.count("\n") + 1:
        return False
    if name.startswith("<"):
        return "lambda" in before if name == "<lambda>" else re.search(r"\bfor\b", before) is not None
    return re.search(rf"\b(?:def|class)\s+{re.escape(name)}\b", before) is not None


def _is_launcher(frames: Sequence[Frame]) -> bool:
    """Whether the outermost call is of a script that an installer has made."""
    found = _SCRIPT.match(frames[-1].file)
    if found is None or frames[-1].function != MODULE:
        return False
    prefixes = {prefix[1] for frame in frames if (prefix := _PREFIX.match(frame.file)) is not None}
    return found[1] in prefixes or found[1] in _SYSTEMS


def short_path(frame: Frame) -> str:
    """The file of a call; of a library's without the directory that libraries are in."""
    return frame.file if frame.application else HOME.sub("", _HOME.sub("", frame.file))


def innermost(frames: Sequence[Frame]) -> Frame | None:
    """Where the application is: its innermost call.

    ``None`` if no call is its own, or none within an event loop, which waits for whatever comes.
    """
    for frame in frames:
        if frame.application:
            return frame
        if _LOOP.search(frame.file):
            break
    return None


def place(frames: Sequence[Frame]) -> str | None:
    """The same in words: ``app.py:23 in load_user``."""
    frame = innermost(frames)
    return None if frame is None else _place(frame)


def _place(frame: Frame) -> str:
    directory, _, name = frame.file.rpartition("/")
    if name in _ANONYMOUS and directory:
        name = f"{directory.rpartition('/')[2]}/{name}"
    return f"{name}:{frame.line}" if frame.function in {MODULE, *MAIN} else f"{name}:{frame.line} in {frame.function}"
