"""Messages of PostgreSQL's protocol, built for tests, and a conversation that is fed to a tracker."""

from __future__ import annotations

import struct
from sys import maxsize
from typing import TYPE_CHECKING

from pgguard.identity import Sender
from pgguard.session.tracker import Tracker
from pgguard.session.verdicts import Direction, Kind, Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

MODEL = Sender(100, 100)


def message(type_: str, body: bytes = b"") -> bytes:
    return type_.encode() + struct.pack("!I", 4 + len(body)) + body


def error(severity: str = "ERROR", sqlstate: str = "42601") -> bytes:
    body = f"S{severity}\0V{severity}\0C{sqlstate}\0Mno\0\0"
    return message("E", body.encode())


# One well-formed message of every type, by its letter.

FRONTEND = {
    "B": message("B", b"\0\0\0\0\0\0\0\0"),
    "C": message("C", b"Sname\0"),
    "d": message("d", b"1\t2\n"),
    "c": message("c"),
    "f": message("f", b"enough\0"),
    "D": message("D", b"P\0"),
    "E": message("E", b"\0\0\0\0\0"),
    "H": message("H"),
    "F": message("F", struct.pack("!IHHIH", 1, 0, 0, 0, 0)),
    "P": message("P", b"\0SELECT 1\0\0\0"),
    "p": message("p", b"secret\0"),
    "Q": message("Q", b"SELECT 1\0"),
    "S": message("S"),
    "X": message("X"),
}
DESCRIBE_STATEMENT = message("D", b"S\0")

BACKEND = {
    "R": message("R", struct.pack("!I", 0)),
    "K": message("K", struct.pack("!II", 4865, 7)),
    "2": message("2"),
    "3": message("3"),
    "C": message("C", b"SELECT 1\0"),
    "d": message("d", b"1\t2\n"),
    "c": message("c"),
    "G": message("G", b"\0\0\0"),
    "H": message("H", b"\0\0\0"),
    "W": message("W", b"\0\0\0"),
    "D": message("D", b"\0\1\0\0\0\0011"),
    "I": message("I"),
    "E": error(),
    "V": message("V", struct.pack("!i", -1)),
    "v": message("v", struct.pack("!II", 196608, 0)),
    "n": message("n"),
    "N": message("N", b"SNOTICE\0VNOTICE\0C00000\0Mhm\0\0"),
    "A": message("A", b"\0\0\1\0channel\0\0"),
    "t": message("t", b"\0\0"),
    "S": message("S", b"TimeZone\0UTC\0"),
    "1": message("1"),
    "s": message("s"),
    "Z": message("Z", b"I"),
    "T": message("T", b"\0\1a\0\0\0\0\0\0\0\0\0\0\x17\0\4\xff\xff\xff\xff\0\0"),
}
IN_TRANSACTION = message("Z", b"T")
LOGIN = b"".join(BACKEND[letter] for letter in "RSKZ")


def query(sql: str) -> bytes:
    return message("Q", sql.encode() + b"\0")


def parse(sql: str, name: str = "") -> bytes:
    return message("P", name.encode() + b"\0" + sql.encode() + b"\0\0\0")


def bind(name: str = "", portal: str = "") -> bytes:
    return message("B", portal.encode() + b"\0" + name.encode() + b"\0\0\0\0\0\0\0")


def describe(name: str = "") -> bytes:
    return message("D", b"S" + name.encode() + b"\0")


def close(name: str = "") -> bytes:
    return message("C", b"S" + name.encode() + b"\0")


def spell(direction: Direction, letters: str) -> bytes:
    """Messages by their letters; in the frontend's, ``*`` is the Describe of a statement."""
    if direction is Direction.BACKEND:
        return b"".join(BACKEND[letter] for letter in letters)
    return b"".join(DESCRIBE_STATEMENT if letter == "*" else FRONTEND[letter] for letter in letters)


class Conversation:
    """Feeds a tracker as the relay does, and collects verdicts, each of them overruled.

    Args:
        sender: who has opened the connection.
        login: whether it has logged in.
        most: the messages that begin in so many bytes are followed at once.
    """

    def __init__(self, sender: Sender | None = MODEL, *, login: bool = True, most: int = maxsize) -> None:
        self._most = most
        self.tracker = Tracker({"user": "app"}, sender)
        self.sender = sender
        self.verdicts: list[Verdict] = []
        self._held = {Direction.FRONTEND: b"", Direction.BACKEND: b""}
        self.now = 1000.0
        if login:
            self.backend(LOGIN)

    def frontend(self, data: bytes | str, sender: Sender | None = None, *, known: bool = True) -> list[Verdict]:
        """Returns the verdicts that this brings; ``known=False`` for bytes of an unknown sender."""
        if isinstance(data, str):
            data = spell(Direction.FRONTEND, data)
        return self.feed(Direction.FRONTEND, data, (sender or self.sender) if known else None)

    def backend(self, data: bytes | str) -> list[Verdict]:
        if isinstance(data, str):
            data = spell(Direction.BACKEND, data)
        return self.feed(Direction.BACKEND, data, None)

    def feed(self, direction: Direction, data: bytes, sender: Sender | None) -> list[Verdict]:
        tracker = self.tracker
        padding = b"\xff" * 3  # positions are not always those of the buffer
        buffer = padding + self._held[direction] + data + b"\xff" * 7
        pos, end = len(padding), len(buffer) - 7
        new: list[Verdict] = []
        while pos < end and tracker.lost is None:
            if direction is Direction.FRONTEND:
                done = tracker.frontend(buffer, pos, end, sender, self.now, self._most)
            else:
                done = tracker.backend(buffer, pos, end, self._most)
            assert pos <= done <= end
            before, pos = pos, done
            if tracker.verdict is None:
                if pos != before:
                    continue
                break
            assert tracker.verdict.start == pos or tracker.verdict.message is None
            new.append(tracker.verdict)
            tracker.overrule()
        self._held[direction] = buffer[pos:end]
        self.verdicts += new
        return new

    def held(self, direction: Direction) -> int:
        return len(self._held[direction])

    def talk(self, script: str) -> list[Verdict]:
        """A whole conversation: ``> PBES < 12DCZ``; returns the verdicts."""
        new: list[Verdict] = []
        for part in script.replace("<", "\n<").replace(">", "\n>").split("\n"):
            direction, letters = part[:1], part[1:].replace(" ", "")
            if direction == ">":
                new += self.frontend(letters)
            elif direction == "<":
                new += self.backend(letters)
        return new


def kinds(verdicts: Sequence[Verdict]) -> list[Kind]:
    return [verdict.kind for verdict in verdicts]
