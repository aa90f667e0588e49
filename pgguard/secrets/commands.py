"""Command lines without their secrets."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from pgguard.secrets.names import is_secret_name, word_list
from pgguard.secrets.options import secret_parts
from pgguard.secrets.text import HIDDEN, redact

if TYPE_CHECKING:
    from collections.abc import Sequence

CUT_OFF: Final = 4096
"""Bytes of a command line from which on it may be only the beginning of one: as many are read of it."""

_NAME_LENGTH: Final = 15
"""Bytes of a process's or a thread's name, at most: ``TASK_COMM_LEN``, less its terminator."""

_SHELLS: Final = word_list("ash bash dash fish ksh runuser sh ssh su watch zsh")
"""Programs that run a command that they are given in an argument."""
_NAMED: Final = re.compile(r"(?P<name>-{0,2}[^\W\d][\w.-]*)=(?P<value>.*)", re.DOTALL)
_SETTINGS: Final = re.compile(
    r"(?:'(?:\\.|[^'\\])*+'|(?:\\.|[^\s'\\])++)"
    r"(?:\s+(?:application_name|channel_binding|connect_timeout|dbname|fallback_application_name|host|hostaddr|options"
    r"|passfile|port|replication|require_auth|service|ssl[a-z_]+|target_session_attrs|user)"
    r"\s*=\s*(?:'(?:\\.|[^'\\])*+'|(?:\\.|[^\s'\\])*+))++\s*",
    re.DOTALL,
)
"""What follows the first name of a conninfo string: a value and more settings."""
_AUTHORITY: Final = r"\A(?P<before>(?:[\w.+-]++[=:])*+//[^/?#@:\s]*:)"
_URL: Final = re.compile(rf"{_AUTHORITY}.*(?=@[^\s@]*\Z)", re.DOTALL)
"""The password of a URL that is an argument by itself, and so may have blanks in it."""
_CUT_URL: Final = re.compile(rf"{_AUTHORITY}(?!\d{{1,5}}[/?#,])[^@]*\Z", re.DOTALL)
"""The same of one that has been cut off within it."""


def redact_command(arguments: Sequence[str]) -> list[str]:
    """A process's arguments without passwords and other secrets, whichever way they are passed.

    Those alone in their argument, behind ``NAME=`` or the option that takes them, are hidden whole, blanks and all.
    """
    return list(_redact(tuple(arguments)))


def redact_name(name: str) -> str:
    """A process's or a thread's name without secrets; programs give themselves any, of which 15 bytes are kept."""
    return redact(name, cut=len(name.encode("utf-8", "replace")) >= _NAME_LENGTH)


@lru_cache(256)
def _redact(arguments: tuple[str, ...]) -> tuple[str, ...]:
    # Processes of a kind come again and again, and titles of workers differ.
    size = sum(len(argument.encode("utf-8", "replace")) + 1 for argument in arguments)
    cut = size >= CUT_OFF
    offsets = {part.word: part.offset for part in secret_parts(arguments, positional=len(arguments) > 1, cut=cut)}
    scripts = _scripts(arguments)
    last = len(arguments) - 1
    return tuple(
        _argument(argument, offsets.get(number), command=number in scripts, cut=cut and number == last)
        for number, argument in enumerate(arguments)
    )


def _scripts(arguments: tuple[str, ...]) -> set[int]:
    """Which arguments are commands themselves: a title, and what a shell is given, by whatever program."""
    if len(arguments) == 1:
        return {0}
    shells = [number for number, argument in enumerate(arguments) if argument.rpartition("/")[2] in _SHELLS]
    return set(range(shells[0] + 1, len(arguments))) if shells else set()


def _argument(argument: str, offset: int | None, *, command: bool, cut: bool) -> str:
    if offset is not None:
        return argument[:offset] + HIDDEN
    named = _NAMED.fullmatch(argument)
    if named is not None and is_secret_name(named["name"]) and not _has_more_settings(named):
        value = redact(argument, command=command, cut=cut)
        return value if value == argument else f"{named['name']}={HIDDEN}"
    url = _CUT_URL if cut and "@" not in argument else _URL
    return redact(url.sub(rf"\g<before>{HIDDEN}", argument), command=command, cut=cut)


def _has_more_settings(named: re.Match[str]) -> bool:
    """Whether it is a conninfo string, which goes on behind a password that stands first."""
    return named["name"].islower() and "-" not in named["name"] and _SETTINGS.fullmatch(named["value"]) is not None
