"""libpq's files that know servers by where they are: the service file, and the password file.

Both name a host and a port. When a client is led elsewhere, what they say has to be found there as well: in a copy of
its own, so that nothing changes for anybody else. Everything in a copy but for that stands as it did.

Sources: "The Connection Service File" and "The Password File" in the chapter on libpq; ``parseServiceFile()`` and
``passwordFromFile()`` in ``fe-connect.c``.
"""

from __future__ import annotations

import os
import re
import stat
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from pgguard.attribution.trust import UntrustedError, open_regular, open_trusted
from pgguard.launch.fields import Field, Style, text_of
from pgguard.proxy.addresses import UnixAddress

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from pgguard.proxy.addresses import Address

_LIMIT: Final = 1 << 20
"""Bytes of a file that are read, at most."""
_SYSTEM: Final = "/etc/postgresql-common"
"""Where Debian's libpq looks for the system's service file; others know only what PGSYSCONFDIR says."""
_HEADER: Final = re.compile(r"\s*\[(?P<name>[^\]]*)\]")
_SETTING: Final = re.compile(r"(?P<head>\s*(?P<name>\w+)=)(?P<raw>.*?)(?P<after>\s*)", re.DOTALL)
LINE: Final = Style("\n", str, {})
"""How a service's settings are written."""
_ENTRY: Final = re.compile(r"(?P<host>(?:\\.|[^:\\])*):(?P<port>(?:\\.|[^:\\])*)(?P<rest>:.*)", re.DOTALL)
_ESCAPED: Final = re.compile(r"\\(.)")
_DEFAULT_DIRECTORIES: Final = frozenset({"/var/run/postgresql", "/run/postgresql", "/tmp"})  # noqa: S108 - named, not used


class Section(NamedTuple):
    """One service."""

    file: int
    """Which file it is from."""
    start: int
    """Its first line behind its name."""
    end: int
    """The line behind its last one."""
    settings: dict[str, str]


class Services:
    """The services that libpq finds by that environment: the user's, and behind them the system's.

    Args:
        environment: Says where their files are.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        own = environment.get("PGSERVICEFILE") or os.path.join(_home(environment), ".pg_service.conf")  # noqa: PTH118
        system = Path(environment.get("PGSYSCONFDIR") or _SYSTEM, "pg_service.conf")
        self._lines = [_read_trusted(Path(own)).split("\n"), _read_trusted(system).split("\n")]
        self._sections: dict[str, Section] = {}
        for number, lines in enumerate(self._lines):
            self._add(number, lines)

    def _add(self, number: int, lines: list[str]) -> None:
        headers = [(n, found["name"]) for n, line in enumerate(lines) if (found := _HEADER.match(line))]
        for (start, name), (end, _) in pairwise([*headers, (len(lines), "")]):
            if any(line.lstrip().startswith("ldap") for line in lines[start + 1 : end]):
                continue  # where it leads is known to a directory server
            fields = [field for line in lines[start + 1 : end] if (field := _field(line)).name]
            settings = {field.name: field.value or "" for field in reversed(fields)}  # libpq takes the first of a kind
            self._sections.setdefault(name, Section(number, start + 1, end, settings))

    def settings(self, name: str) -> dict[str, str] | None:
        """What a service says; ``None`` if there is no such service."""
        section = self._sections.get(name)
        return None if section is None else section.settings

    def changed(
        self, change: Callable[[str, Mapping[str, str]], Callable[[list[Field]], list[Field]] | None]
    ) -> str | None:
        """A file in which services have changed; ``None`` if none has.

        Args:
            change: Gives what changes the settings of a service of that name, which says so much; ``None``: nothing.
        """
        changed: list[dict[int, tuple[int, list[str]]]] = [{}, {}]
        for name, section in self._sections.items():
            how = change(name, section.settings)
            if how is not None:
                lines = self._lines[section.file][section.start : section.end]
                changed[section.file][section.start] = section.end, _changed_lines(lines, how)
        if not any(changed):
            return None
        own, system = changed
        said: list[str] = []
        done = 0
        for start, (end, lines) in sorted(own.items()):
            said += [*self._lines[0][done:start], *lines]
            done = end
        said += self._lines[0][done:]
        for start, (_, lines) in sorted(system.items()):  # libpq still finds the others where they are
            said += [self._lines[1][start - 1], *lines]
        return "\n".join(said)


def _field(line: str) -> Field:
    found = None if line.lstrip().startswith("#") else _SETTING.fullmatch(line)
    if found is None:
        return Field("\n", line, "", "", None)
    return Field("\n", found["head"], found["raw"], found["name"], found["raw"])


def _changed_lines(lines: list[str], how: Callable[[list[Field]], list[Field]]) -> list[str]:
    blank = len(lines)
    while blank and not lines[blank - 1].strip():
        blank -= 1
    fields = how([_field(line) for line in lines[:blank]])
    return [*text_of(fields).split("\n"), *lines[blank:]]


class Login(NamedTuple):
    """By what a password file knows a server."""

    host: str
    port: str


def led_passwords(text: str, logins: Collection[Login], to: Address) -> str | None:
    """A password file in which what it says of a server is said of another address too; ``None`` if it says nothing.

    The first entry that fits counts, so each is followed by its copy.

    Args:
        text: What stands in it.
        logins: By what it knows the server.
        to: The other address.
    """
    host = to.directory if isinstance(to, UnixAddress) else to.host
    place = f"{_escape(host)}:{to.port}"
    said: list[str] = []
    copied = False
    for line in text.split("\n"):
        said.append(line)
        entry = None if line.startswith("#") else _ENTRY.fullmatch(line)
        if entry is None or not any(_fits(entry, login) for login in logins):
            continue
        if not _fits(entry, Login(host, str(to.port))):
            said.append(place + entry["rest"])
            copied = True
    return "\n".join(said) if copied else None


def _fits(entry: re.Match[str], login: Login) -> bool:
    hosts = {"*", login.host or "localhost"}
    if login.host in _DEFAULT_DIRECTORIES:
        hosts.add("localhost")
    return _ESCAPED.sub(r"\1", entry["host"]) in hosts and entry["port"] in {"*", login.port}


def _escape(host: str) -> str:
    return host.replace("\\", "\\\\").replace(":", "\\:")


def password_file(environment: Mapping[str, str]) -> str:
    """Where the password file is that libpq takes by that environment."""
    return environment.get("PGPASSFILE") or os.path.join(_home(environment), ".pgpass")  # noqa: PTH118


def passwords(path: str) -> str:
    """What stands in a password file; nothing if libpq wouldn't take it."""
    try:
        file = open_regular(Path(path))
        with os.fdopen(file, "rb") as opened:
            if os.fstat(file).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                return ""
            return os.fsdecode(opened.read(_LIMIT))
    except (OSError, ValueError):
        return ""


def _read_trusted(path: Path) -> str:
    """What stands in a service file; nothing if it isn't there, or others may have written it."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return ""
        with open_trusted(path) as file:
            return os.fsdecode(file.read(_LIMIT))
    except (OSError, UntrustedError, ValueError):
        return ""


def _home(environment: Mapping[str, str]) -> str:
    """The user's directory, as libpq finds it: ``pqGetHomeDirectory()``."""
    return environment.get("HOME") or os.path.expanduser("~")  # noqa: PTH111 - nothing fails where there is none
