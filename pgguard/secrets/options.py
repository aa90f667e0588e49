"""Secrets on command lines, told by the option before them and the program that takes it: ``--token X``, ``mysql -pX``.

Options have names, and those of secrets are known by :mod:`.names`; short ones mean something else to each program.
``-p`` is the one that is a password to some, and a port, a path or a process to others: where the program isn't known
what can be neither of these is taken for a password.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

from pgguard.secrets.names import is_secret_name, word_list

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_SHORT: Final = {
    program: letters
    for programs, letters in (
        ("mysql mysqldump mysqladmin mysqlimport mysqlpump mysqlcheck mysqlshow mysqlsh mariadb mariadb-dump", "p"),
        ("mariadb-admin mariadb-check mariadb-import mariadb-show sshpass cqlsh 7z 7za 7zr rar unrar rdesktop", "p"),
        ("mongo mongosh mongodump mongorestore mongoexport mongoimport mongostat mongotop", "p"),
        ("redis-cli valkey-cli keydb-cli", "a"),
        ("ldapsearch ldapadd ldapmodify ldapdelete ldappasswd ldapwhoami", "w"),
        ("sqlcmd bcp tsql isql zip unzip ipmitool mosquitto_pub mosquitto_sub", "P"),
        ("openssl", "kK"),
    )
    for program in programs.split()
}
"""Letters of the options that are followed by a password, by program."""
_NO_PASSWORD: Final = word_list("""
    cp docker g++ gcc install java mkdir mv nginx node patch perl pg_ctl podman ps psql pytest rsync ruby scp ssh tar
    xargs
""")
"""Programs whose ``-p`` is no password."""
_REGISTRIES: Final = word_list("buildah docker helm nerdctl oras podman skopeo")
"""Programs that log in to registries: their ``login`` takes a password behind ``-p``."""
_LOGIN: Final = word_list(
    "-a -u -U --auth --user --username --proxy-user --userpwd --proxy-userpwd --login --credentials"
)
"""Options that are followed by a user, and behind a colon or a percent sign by the password."""
_QUESTIONS: Final = word_list(
    "allow ask disable enable force has hide is no prompt read require show skip use with without"
)
"""Options that begin so are followed by nothing."""

_OPTION: Final = re.compile(r"-[A-Za-z]|--[a-z]+(?:-[a-z]+)*")
_NAME: Final = re.compile(r"[^\W\d][\w.-]*")
_NO_SECRET: Final = re.compile(r"\d+(?:[:/.-]\d+)*(?:/tcp|/udp)?|[./~].*|no:.*|\*{3}\W*", re.DOTALL)
"""A port, a pid, a mapping of ports, a path, one of pytest's plug-ins; or what has been hidden already."""
_LETTERS: Final = re.compile(r"[a-z_-]+(?:=.*)?", re.DOTALL)
"""Of ``-passive`` and its like."""


class Part(NamedTuple):
    """What is to be hidden of a word: everything from an offset on."""

    word: int
    offset: int


def secret_parts(words: Sequence[str], *, positional: bool, cut: bool) -> Iterator[Part]:
    """Which words of a command are secrets, or end in one. What is named within a word isn't looked for.

    Args:
        words: A command line: the program and its arguments.
        positional: The name of a secret without a dash, too, is taken for one that the secret follows.
        cut: The last word may be only the beginning of one: what it looks like says nothing.
    """
    reader = _Reader(positional=positional)
    last = len(words) - 1 if cut else -1
    for number, word in enumerate(words):
        offset = reader.read(word, cut=number == last)
        if offset is not None:
            yield Part(number, offset)


class _Reader:
    """Reads a command word by word, and remembers what the last one has led to expect."""

    def __init__(self, *, positional: bool) -> None:
        self._positional = positional
        self._letters: str | None = None
        self._secret = False
        self._login = False
        self._doubtful = False
        self._logs_in = False

    def read(self, word: str, *, cut: bool) -> int | None:
        """Take the next word; the offset from which on it is secret, or ``None``."""
        secret, login, doubtful = self._secret, self._login, self._doubtful
        self._secret = self._login = self._doubtful = False
        if (secret or doubtful) and (cut or not _OPTION.fullmatch(word)):
            return None if doubtful and not cut and _NO_SECRET.fullmatch(word) else 0
        if login and not word.startswith("-"):
            return _behind_user(word, 0, cut=cut)
        if word == "--":  # what follows may be another command
            self._letters = None
            self._logs_in = False
            return None
        if word.startswith("--"):
            return self._long(word, cut=cut)
        if word.startswith("-") and len(word) > 1:
            return self._short(word, cut=cut)
        if word.startswith("/p:"):  # xfreerdp
            return len("/p:")
        program = word.rpartition("/")[2]
        if word == "login" and self._logs_in:
            self._letters = "p"
        self._logs_in = self._logs_in or program in _REGISTRIES
        if program in _SHORT:
            self._letters = _SHORT[program]
        elif program in _NO_PASSWORD:
            self._letters = ""
        if self._positional and _NAME.fullmatch(word):
            self._secret = is_secret_name(word)
        return None

    def _long(self, word: str, *, cut: bool) -> int | None:
        name, equals, _ = word.partition("=")
        if equals:
            return _behind_user(word, len(name) + 1, cut=cut) if name in _LOGIN else None
        asks = name[2:].partition("-")[0] in _QUESTIONS
        self._secret = is_secret_name(name) and not asks
        self._login = name in _LOGIN
        return None

    def _short(self, word: str, *, cut: bool) -> int | None:
        letter, value = word[1], word[2:]
        if self._letters and letter in self._letters:
            self._secret = not value
            return 2 if value else None
        if len(value) > 1 and "=" not in word and is_secret_name(word):
            self._secret = True
            return None
        if word[:2] in _LOGIN:
            self._login = not value
            return _behind_user(word, 2, cut=cut) if value else None
        if letter == "p" and self._letters is None:
            self._doubtful = not value
            harmless = not cut and (_NO_SECRET.fullmatch(value) or _LETTERS.fullmatch(value))
            return 2 if value and not harmless else None
        return None


def _behind_user(word: str, start: int, *, cut: bool) -> int | None:
    """Where the password begins in ``user:password`` and ``user%password``; a port is none."""
    for offset in range(start, len(word)):
        if word[offset] in ":%":
            rest = word[offset + 1 :]
            return None if not rest or (not cut and _NO_SECRET.fullmatch(rest)) else offset + 1
    return None
