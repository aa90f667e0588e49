"""How processes and other people's text appear in what the guard says."""

from __future__ import annotations

import difflib
import re
from dataclasses import replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Final

from pgguard.secrets.commands import redact_command, redact_name
from pgguard.secrets.text import HIDDEN, redact

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pgguard.attribution.evidence import Process

LABEL_LENGTH: Final = 48
"""Characters of a process's label, at most."""

LISTED: Final = 8
"""Names in a list, at most: a preforking server can have hundreds of workers."""

_INTERPRETER: Final = re.compile(r"(?:python|pypy|ruby|node|perl|php|java|bash|sh)[\d.]*")
_SHELLS: Final = re.compile(r"(?:bash|sh)[\d.]*")
_CODE: Final = (
    (re.compile(r"(?:python|pypy)[\d.]*"), re.compile(r"(-[bBdEhiIOPqRsStuvVx]*c).*", re.DOTALL)),
    (_SHELLS, re.compile(r"(-[A-Za-z]*c)")),
    (re.compile(r"(?:perl|ruby)[\d.]*"), re.compile(r"(-[0acilnpstuwTUW]*[eE]).*", re.DOTALL)),
    (re.compile(r"node[\d.]*"), re.compile(r"(-e|-p|-pe|--eval|--print)(?:=.*)?", re.DOTALL)),
    (re.compile(r"php[\d.]*"), re.compile(r"(-r).*", re.DOTALL)),
)
"""Interpreters, and the options of each that a program follows, in the same argument or in the next one."""
_OPTIONS_WITH_VALUE: Final = frozenset(
    {"-W", "-X", "-r", "-I", "-cp", "-classpath", "--class-path", "--require", "--import"}
)

_DOING: Final = re.compile(
    r"(?<=\S)\s+\W*(?:active|executing|forked|idle|listening|paused|performing|processing|reserving|running"
    r"|shutting|starting|stopping|waiting|working)\b.*",
    re.IGNORECASE | re.DOTALL,
)
"""What a process says in its title that it is doing: Resque and RQ name the job there."""

_CLEANED: Final = re.compile(r"(?:\\x[0-9a-f]{2})+")
_UNREADABLE_NAME: Final = re.compile(r"(?<!\?)(\?{3,}+\s*+[=:]\s*+)\S.*", re.DOTALL)
_SETTING_LENGTH: Final = 63
"""Bytes of names and of an ``application_name`` that a server keeps, unless it was built otherwise: ``NAMEDATALEN``."""

DECLARED_LENGTH: Final = 255
"""Characters of what a client declares in comments, at most."""


def printable(text: str) -> str:
    """Text that can be shown on a terminal: control, format and lone surrogate characters are spelled out.

    What is left can neither move the cursor nor reorder or hide what stands beside it, and is one line.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """A number and what it counts, ``1 fault`` or ``2 faults``; the plural if it isn't made with an ``s``."""
    return f"{number} {noun if number == 1 else plural or f'{noun}s'}"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """What somebody most likely meant who wrote a name that there isn't; ``None`` if none is much like it.

    Upper and lower case, and what stands between words, make no difference.
    """
    by_letters = {_letters(one): one for one in known}
    found = difflib.get_close_matches(_letters(name), by_letters, n=1)
    return by_letters[found[0]] if found else None


def _letters(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.lower())


def shorten(text: str, length: int) -> str:
    """The beginning of a text that is too long, with an ellipsis; ``length`` characters at most."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def discreet(process: Process) -> Process:
    """A process as it may be shown: without the secrets on its command line, or in its name."""
    name, cmdline = redact_name(process.name), tuple(redact_command(process.cmdline))
    if (name, cmdline) == (process.name, process.cmdline):
        return process
    return replace(process, name=name, cmdline=cmdline)


def discreet_setting(value: str | None, length: int = _SETTING_LENGTH) -> str | None:
    r"""What a client has set, its ``application_name`` for one, as it may be shown.

    Of that a server keeps ASCII alone: other bytes are written ``\xd0`` since PostgreSQL 16, and ``?`` before
    (``pg_clean_ascii()`` in ``src/common/string.c``), so that the name of a secret may be there in such letters.

    Args:
        value: It, of which a start-up packet has room for thousands of characters.
        length: Characters that are looked at, and shown: by default as many bytes as a server keeps.
    """
    if value is None:
        return None
    if len(value) > length:
        return f"{discreet_setting(value[:length], length)}…"
    cut = len(value.encode("utf-8", "replace")) >= _SETTING_LENGTH
    if "\\x" in value:
        as_given = _CLEANED.sub(
            lambda found: bytes.fromhex(found.group().replace("\\x", "")).decode(errors="replace"), value
        )
        if (shown := redact(as_given, cut=cut)) != as_given:
            return shown
    return redact(_UNREADABLE_NAME.sub(rf"\1{HIDDEN}", value), cut=cut)


def title(cmdline: Sequence[str]) -> str | None:
    """The title that a process gave itself, without what it says that it is doing; ``None`` if it has a command line.

    A title is a command line in one piece with a space in it: setproctitle(3), ``$0 =`` in Ruby and Perl.
    """
    arguments = [argument for argument in cmdline if argument]
    if len(arguments) != 1 or " " not in arguments[0]:
        return None
    return _DOING.sub("", arguments[0].strip()).rstrip(":")


def process_label(process: Process) -> str:
    """What to call a process: the title it gave itself, or its program and script (``python3 app.py``).

    A title that goes on to name its parent's pid, as Puma's does, is cut off there.
    """
    process = discreet(process)
    arguments = [a for a in process.cmdline if a]
    if not arguments:
        label = process.name
    elif (given := title(arguments)) is not None:
        label = given if process.ppid is None else given.split(f": {process.ppid}", 1)[0]
    else:
        program = PurePosixPath(arguments[0]).name
        script = _script(program, arguments[1:]) if _INTERPRETER.fullmatch(program) else ""
        label = f"{program} {script}".strip()
    return shorten(printable(label), LABEL_LENGTH)


def _script(program: str, arguments: Sequence[str]) -> str:
    """What an interpreter runs, from its own arguments; ``-`` if it is standard input."""
    code = next((option for interpreter, option in _CODE if interpreter.fullmatch(program)), None)
    is_shell = _SHELLS.fullmatch(program) is not None
    rest = iter(arguments)
    for argument in rest:
        if argument in {"-m", "-jar"}:
            return f"{argument} {next(rest, '')}".rstrip()
        if code is not None and (found := code.fullmatch(argument)):
            return f"{found[1]} …"
        # A shell takes "-" for the end of its options: dash(1), bash(1).
        if argument == ("-s" if is_shell else "-"):
            return argument
        if argument in _OPTIONS_WITH_VALUE:
            next(rest, None)
        elif not argument.startswith("-"):
            return PurePosixPath(argument).name
    return ""


def named(pid: int, process: Process | None) -> str:
    """``pid 4867 (puma: cluster worker 1)``, or the pid alone where the process is not known."""
    return f"pid {pid}" if process is None else f"pid {pid} ({process_label(process)})"


def all_named(processes: Sequence[Process]) -> str:
    """Processes in a list; of very many, those that it leaves out aren't looked at."""
    if len(processes) <= LISTED:
        return listed([named(process.pid, process) for process in processes])
    some = [named(process.pid, process) for process in processes[: LISTED - 1]]
    return f"{', '.join(some)} and {len(processes) - LISTED + 1} more"


def listed(items: Sequence[str]) -> str:
    """``a``; ``a and b``; ``a, b and c``; of more than eight, seven and how many there are besides."""
    if len(items) > LISTED:
        items = [*items[: LISTED - 1], f"{len(items) - LISTED + 1} more"]
    return " and ".join(filter(None, [", ".join(items[:-1]), *items[-1:]]))
