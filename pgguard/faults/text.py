"""How processes and other people's text appear in what the guard says."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pgguard.attribution.evidence import Process

LABEL_LENGTH: Final = 48
"""Characters of a process's label, at most."""

LISTED: Final = 8
"""Names in a list, at most: a preforking server can have hundreds of workers."""

_INTERPRETER: Final = re.compile(r"(?:python|pypy|ruby|node|perl|php|java|bash|sh)[\d.]*")
_OPTIONS_WITH_VALUE: Final = frozenset(
    {"-W", "-X", "-r", "-I", "-cp", "-classpath", "--class-path", "--require", "--import"}
)

_URI_PASSWORD: Final = re.compile(r"((?<=://)[^/\s:@]*|(?<![\w/])[A-Za-z_][\w.+-]*(?=:[^/@])):\S*@")
"""Up to the last ``@``: a password may hold one itself, and a ``/`` that should have been encoded. The scheme may be
missing, but then what is behind the colon is neither a path nor the name of an abstract socket."""
_NAMED_PASSWORD: Final = re.compile(
    r"(\w*passw(?:or)?d\w*\s*[=:]\s*)(?:'(?:\\.|[^'\\])*'|\"[^\"]*\"|[^\s&;]+)", re.IGNORECASE
)
_SQL_PASSWORD: Final = re.compile(
    r"(\bpassword\s+)(?:e?'(?:''|\\.|[^'\\])*'?|\$(\w*)\$.*?(?:\$\2\$|$))", re.IGNORECASE | re.DOTALL
)
"""Of ``ALTER ROLE`` and its like, also if the text ends within it."""
_PASSWORD_OPTION: Final = re.compile(r"--?\w*passw(?:or)?d", re.IGNORECASE)
_HIDDEN: Final = "***"


def printable(text: str) -> str:
    """Text that can be shown on a terminal: control, format and lone surrogate characters are spelled out.

    What is left can neither move the cursor nor reorder or hide what stands beside it, and is one line.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def shorten(text: str, length: int) -> str:
    """The beginning of a text that is too long, with an ellipsis; ``length`` characters at most."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def redact(text: str) -> str:
    """Text without the passwords of connection URIs, of ``password=…`` settings and of SQL's ``PASSWORD '…'``."""
    text = _SQL_PASSWORD.sub(rf"\1{_HIDDEN}", _URI_PASSWORD.sub(rf"\1:{_HIDDEN}@", text))
    return _NAMED_PASSWORD.sub(rf"\1{_HIDDEN}", text)


def redact_command(arguments: Sequence[str]) -> list[str]:
    """A command line without passwords, those that follow a ``--password`` option included."""
    redacted: list[str] = []
    hide = False
    for argument in arguments:
        redacted.append(_HIDDEN if hide and not argument.startswith("-") else redact(argument))
        hide = _PASSWORD_OPTION.fullmatch(argument) is not None
    return redacted


def process_label(process: Process) -> str:
    """What to call a process: the title it gave itself, or its program and script (``python3 app.py``).

    A title is a command line in one piece with a space in it: setproctitle(3), ``$0 =`` in Ruby and Perl. One
    that goes on to name its parent's pid, as Puma's does, is cut off there.
    """
    arguments = [a for a in redact_command(process.cmdline) if a]
    if not arguments:
        label = process.name
    elif len(arguments) == 1 and " " in arguments[0]:
        label = arguments[0].strip()
        if process.ppid is not None:
            label = label.split(f": {process.ppid}", 1)[0]
    else:
        program = PurePosixPath(arguments[0]).name
        script = _script(arguments[1:]) if _INTERPRETER.fullmatch(program) else ""
        label = f"{program} {script}".strip()
    return shorten(printable(label), LABEL_LENGTH)


def _script(arguments: Sequence[str]) -> str:
    """What an interpreter runs, from its own arguments."""
    rest = iter(arguments)
    for argument in rest:
        if argument in {"-m", "-jar"}:
            return f"{argument} {next(rest, '')}".rstrip()
        if argument in {"-c", "-e"}:
            return f"{argument} …"
        if argument in _OPTIONS_WITH_VALUE:
            next(rest, None)
        elif not argument.startswith("-"):
            return PurePosixPath(argument).name
    return ""


def named(pid: int, process: Process | None) -> str:
    """``pid 4867 (puma: cluster worker 1)``, or the pid alone where the process is not known."""
    return f"pid {pid}" if process is None else f"pid {pid} ({process_label(process)})"


def listed(items: Sequence[str]) -> str:
    """``a``; ``a and b``; ``a, b and c``; of more than eight, seven and how many there are besides."""
    if len(items) > LISTED:
        items = [*items[: LISTED - 1], f"{len(items) - LISTED + 1} more"]
    return " and ".join(filter(None, [", ".join(items[:-1]), *items[-1:]]))
