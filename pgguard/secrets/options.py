"""Secrets on command lines, told by the option before them and the program that takes it: ``--token X``, ``mysql -pX``.

Options have names, and those of secrets are known by :mod:`.names`; short ones mean something else to each program.
``-p`` is the one that is a password to some, and a port, a path or a process to others: where the program isn't known
what can be neither of these is taken for a password. Some programs take a secret that no option stands in front of.
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
        ("mongo mongosh mongodump mongorestore mongoexport mongoimport mongostat mongotop az cf ibmcloud oc", "p"),
        ("redis-cli valkey-cli keydb-cli", "a"),
        ("ldapsearch ldapadd ldapmodify ldapdelete ldapwhoami", "w"),
        ("ldappasswd", "asw"),
        ("sqlcmd bcp tsql isql zip unzip ipmitool mosquitto_pub mosquitto_sub", "P"),
        ("openssl", "kK"),
        ("curl", "b"),  # cookies
        (
            "snmpget snmpgetnext snmpbulkget snmpbulkwalk snmpset snmpwalk snmptable snmpstatus snmptrap snmpinform",
            "AXc",
        ),
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
_SUBCOMMANDS: Final = {
    program: secrets
    for programs, secrets in (
        ("redis-cli valkey-cli keydb-cli", {"auth": 1, "setuser": 2}),
        ("openssl", {"passwd": 1}),
        ("vault", {"login": 1}),
        ("ngrok", {"authtoken": 1, "add-authtoken": 1}),
        ("rabbitmqctl", {"add_user": 2, "authenticate_user": 2, "change_password": 2}),
        ("ejabberdctl prosodyctl", {"register": 3, "change_password": 3}),
        ("ipmitool", {"password": 2}),
    )
    for program in programs.split()
}
"""By program, and then by what it is to do, from which of the words behind that on they are secrets."""
_KEEPERS: Final = {"vault": word_list("put patch write")}
"""By program, what is followed by ``NAME=SECRET``, whatever the name. To others, ``secret`` and ``secrets`` are."""
_ORACLE: Final = word_list("exp expdp imp impdp rman sqlldr sqlplus")
"""Programs that log in with ``user/password@database``."""
_LOGIN: Final = word_list(
    "-a -u -U --auth --user --username --proxy-user --userpwd --proxy-userpwd --login --credentials"
)
"""Options that are followed by a user, and behind a colon or a percent sign by the password."""
_QUESTIONS: Final = word_list(
    "allow ask disable enable force has hide is no prompt read require show skip use with without"
)
"""Options that begin so are followed by nothing."""

_KEPT: Final = word_list("-b -v --body --from-literal --string-value --value")
"""Options that are followed by a secret, or by ``NAME=SECRET``, where a program is told to keep one."""
_CHANGES: Final = re.compile(r"(?:change|new|reset|set|update)[_-]?", re.IGNORECASE)
"""What begins so, and is the name of a secret, is followed by whose it is as well."""


class _Operands(NamedTuple):
    """Words without a dash that are secrets by their number."""

    first: int
    """The first that is one; the program is none of them."""
    flag: str = ""
    """The letter of an option without which there is no secret."""
    fewer: str = ""
    """The letter of one with which one word less stands in front of it."""
    valued: str = ""
    """Letters of options that are followed by a word of their own."""


_OPERANDS: Final = {
    "htpasswd": _Operands(3, flag="b", fewer="n", valued="C"),
    "htdbm": _Operands(3, flag="b", fewer="n", valued="T"),
    "mosquitto_passwd": _Operands(3, flag="b", valued="HI"),
    "isql": _Operands(3),
    "iusql": _Operands(3),
    "mkpasswd": _Operands(1, valued="mPRS"),
    "wpa_passphrase": _Operands(2),
}

_OPTION: Final = re.compile(r"-[A-Za-z]|--[a-z]+(?:-[a-z]+)*")
_CLUSTER: Final = re.compile(r"-[A-Za-z]{2,5}")
_ORACLE_LOGIN: Final = re.compile(r"(?:userid=)?[^/=@\s]+/")
_SLASH_OPTION: Final = re.compile(r"/[A-Za-z]+")
_NAME: Final = re.compile(r"[^\W\d][\w.-]*")
_NO_SECRET: Final = re.compile(r"\d+(?:[:/.-]\d+)*(?:/tcp|/udp)?|[./~].*|no:.*|\*{3}\W*", re.DOTALL)
"""A port, a pid, a mapping of ports, a path, one of pytest's plug-ins; or what has been hidden already."""
_LETTERS: Final = re.compile(r"[a-z_-]+(?:=.*)?", re.DOTALL)
"""Of ``-passive`` and its like."""


_PROGRAMS: Final = frozenset(
    {*_SHORT, *_NO_PASSWORD, *_REGISTRIES, *_SUBCOMMANDS, *_KEEPERS, *_ORACLE, *_OPERANDS, "lftp", "smbclient"}
)
"""Programs of which it is known where they take a secret, or that they don't."""


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
    """Reads a command word by word, and remembers what the last ones have led to expect."""

    def __init__(self, *, positional: bool) -> None:
        self._positional = positional
        self._first = True
        """The next word without a dash is the program, which is no name of a secret: ``pass``, ``auth``."""
        self._begin("")
        self._secret = False
        self._login = False
        self._doubtful = False
        self._pair = False

    def _begin(self, program: str) -> None:
        """A program's name, or that what follows may be another command."""
        self._program = program
        self._letters = _SHORT.get(program, "" if program in _NO_PASSWORD or program in _OPERANDS else None)
        self._logs_in = program in _REGISTRIES
        self._operands = _OPERANDS.get(program)
        self._flags = ""
        self._number = 0
        """Of the last word without a dash, behind the program or what it is to do."""
        self._from: int | None = None
        """The number from which on such words are secrets."""
        self._keeps = False

    def read(self, word: str, *, cut: bool) -> int | None:
        """Take the next word; the offset from which on it is secret, or ``None``."""
        secret, login, doubtful, pair = self._secret, self._login, self._doubtful, self._pair
        self._secret = self._login = self._doubtful = self._pair = False
        if (secret or doubtful) and (cut or not _OPTION.fullmatch(word)):
            return None if doubtful and not cut and _NO_SECRET.fullmatch(word) else 0
        if pair and not word.startswith("-"):
            return _behind_equals(word, 0)
        if login and not word.startswith("-"):
            return _behind_user(word, 0, self._signs, cut=cut)
        if word == "--":
            self._begin("")
            return None
        if self._awaits_secret() and word.startswith("-") and (cut or not _OPTION.fullmatch(word)):
            return 0
        if word.startswith("--"):
            return self._long(word, cut=cut)
        if word.startswith("-") and len(word) > 1:
            return self._short(word, cut=cut)
        return self._operand(word)

    @property
    def _signs(self) -> str:
        """What may stand between a user and a password."""
        return ":%," if self._program == "lftp" else ":%"

    def _operand(self, word: str) -> int | None:
        if word.startswith("/p:"):  # xfreerdp
            return len("/p:")
        if self._awaits_secret():
            return 0
        self._number += 1
        if self._keeps and "=" in word:
            return _behind_equals(word, 0)
        if self._program in _ORACLE and (login := _ORACLE_LOGIN.match(word)) is not None:
            return login.end()
        program = word.rpartition("/")[2]
        first = self._first
        self._first = False
        if program in _PROGRAMS:
            self._begin(program)
            return None
        from_which = _SUBCOMMANDS.get(self._program, {}).get(word.lower())
        if from_which is not None:
            self._number, self._from = 0, from_which
            return None
        if word == "login" and self._logs_in:
            self._letters = "p"
        self._keeps = self._keeps or word in _KEEPERS.get(self._program, ())
        self._secret = _SLASH_OPTION.fullmatch(word) is not None and is_secret_name(word[1:])
        self._secret = self._secret or (self._program == "smbclient" and word.startswith("//"))
        if self._positional and not first and _NAME.fullmatch(word) and is_secret_name(word):
            self._secret = True
            self._keeps = self._keeps or word.lower() in {"secret", "secrets"}
            if _CHANGES.match(word):
                self._number, self._from = 0, 1
        return None

    def _awaits_secret(self) -> bool:
        """Whether the next word without a dash is a secret by its number."""
        if self._from is not None:
            return self._number + 1 >= self._from
        if self._operands is None or self._operands.flag not in self._flags:
            return False
        fewer = self._operands.fewer
        return self._number + 1 >= self._operands.first - (fewer != "" and fewer in self._flags)

    def _long(self, word: str, *, cut: bool) -> int | None:
        name, equals, _ = word.partition("=")
        if equals:
            if name == "--from-literal" or (self._keeps and name in _KEPT):
                return _behind_equals(word, len(name) + 1)
            return _behind_user(word, len(name) + 1, self._signs, cut=cut) if name in _LOGIN else None
        asks = name[2:].partition("-")[0] in _QUESTIONS
        self._pair = name == "--from-literal"
        self._secret = not self._pair and not asks and (is_secret_name(name) or (self._keeps and name in _KEPT))
        self._login = name in _LOGIN
        return None

    def _short(self, word: str, *, cut: bool) -> int | None:
        letter, value = word[1], word[2:]
        self._flags += word[1:]
        if self._operands is not None and word[-1] in self._operands.valued:
            self._number -= 1
            return None
        if self._letters and letter in self._letters:
            self._secret = not value
            return 2 if value else None
        if word.startswith("-hp") and self._program in {"rar", "unrar"}:
            return len("-hp")
        if (value and "=" not in word and is_secret_name(word)) or (self._keeps and word in _KEPT):
            self._secret = True
            return None
        if _CLUSTER.fullmatch(word):
            # Several letters in one word, of which the last is followed by another one.
            self._login = word[-1] in "uU"
            self._secret = self._letters not in {None, "", "p"} and word[-1] in (self._letters or "")
        if word[:2] in _LOGIN:
            self._login = not value
            return _behind_user(word, 2, self._signs, cut=cut) if value else None
        if letter == "p" and self._letters is None:
            self._doubtful = not value
            harmless = not cut and (_NO_SECRET.fullmatch(value) or _LETTERS.fullmatch(value))
            return 2 if value and not harmless else None
        return None


def _behind_equals(word: str, start: int) -> int:
    """Where the secret begins in ``NAME=SECRET``; all of it if there is no name."""
    at = word.find("=", start)
    return start if at < 0 else at + 1


def _behind_user(word: str, start: int, signs: str, *, cut: bool) -> int | None:
    """Where the password begins in ``user:password`` and ``user%password``; a port is none."""
    for offset in range(start, len(word)):
        if word[offset] in signs:
            rest = word[offset + 1 :]
            return None if not rest or (not cut and _NO_SECRET.fullmatch(rest)) else offset + 1
    return None
