"""A model of PostgreSQL and of its clients, to generate conversations that are legitimate and can look any way.

The server follows ``PostgresMain()`` in ``postgres.c`` (errors, skipping to Sync), ``CopyGetData()`` in
``copyfromparse.c`` (copy-in mode) and ``WalSndLoop()`` in ``walsender.c`` (replication), and knows nothing of ledgers.
What it will say to each message is drawn beforehand and travels with the message. The two sides run at their own pace:
a client may be any number of messages ahead, and an answer may come any time after its request has been read.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from hypothesis import strategies as st

from pgguard.session.verdicts import Direction
from tests.session.protocol import BACKEND, DESCRIBE_STATEMENT, FRONTEND, error

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from hypothesis.strategies import DrawFn


@dataclass(frozen=True)
class Copy:
    """A COPY FROM STDIN, that fails after so many messages have been read in copy-in mode, or not by itself."""

    fails_after: int | None
    refused: bool = False
    """It fails before copy-in mode is entered."""


@dataclass(frozen=True)
class Sent:
    """A message of the client's and what the server is going to make of it."""

    letter: str
    answers: str = ""
    """What it says, by letters, if all goes as drawn; for a Query without its ReadyForQuery."""
    copies: tuple[Copy, ...] = ()
    """In the order of the ``G`` in ``answers``."""

    @property
    def data(self) -> bytes:
        return DESCRIBE_STATEMENT if self.letter == "*" else FRONTEND[self.letter]


class Mode(Enum):
    MAIN = "main"
    COPY_IN = "copy-in"
    COPY_BOTH = "copy-both"


class Server:
    """What one backend process does with what it reads."""

    def __init__(self) -> None:
        self.inbox: deque[Sent] = deque()
        self.outbox: deque[bytes] = deque()
        self.ignoring_till_sync = False
        self.mode = Mode.MAIN
        self.gone = False
        self._simple = False
        self._answers = ""
        self._copies: tuple[Copy, ...] = ()
        self._read_in_copy = 0
        self._sent_copy_done = False
        self._uncommitted = False
        """There is something that a Sync would commit, and so can fail to."""

    @property
    def quiescent(self) -> bool:
        """Nothing is left to do, and it waits for the next request."""
        waiting = self.inbox or self.outbox or self.ignoring_till_sync
        return not waiting and self.mode is Mode.MAIN

    def can_step(self) -> bool:
        if self.gone:
            return False
        return bool(self.inbox) or self._must_fail() or self.mode is Mode.COPY_BOTH

    def step(self, streaming: str) -> None:
        """Read a message and deal with it; ``streaming`` is what a replication sends when it has read nothing."""
        if self.mode is Mode.COPY_IN:
            self._step_in_copy_in()
        elif self.mode is Mode.COPY_BOTH:
            self._step_in_copy_both(streaming)
        else:
            self._step_in_main()

    def _say(self, letters: str) -> None:
        self.outbox.extend(BACKEND[letter] for letter in letters)

    def _step_in_main(self) -> None:
        sent = self.inbox.popleft()
        if sent.letter == "X":
            self.gone = True
        if sent.letter == "S":
            self.ignoring_till_sync = False
        if self.ignoring_till_sync or sent.letter in "HdcfX":
            return
        self._simple = sent.letter in "QFS"
        self._answers, self._copies = sent.answers, sent.copies
        if sent.letter == "S" and not self._uncommitted:
            self._answers = ""
        self._uncommitted = not self._simple
        self._go_on()

    def _go_on(self) -> None:
        """Say what was drawn, up to its end, an error, or a COPY that needs the client."""
        while self._answers:
            letter, self._answers = self._answers[0], self._answers[1:]
            if letter == "G" and self._copies[0].refused:
                letter = "E"
            self._say(letter)
            if letter == "E":
                self._fail()
                return
            if letter == "G":
                self.mode, self._read_in_copy = Mode.COPY_IN, 0
                return
            if letter == "W":
                self.mode, self._sent_copy_done = Mode.COPY_BOTH, False
                return
        self.mode = Mode.MAIN
        if self._simple:
            self._say("Z")

    def _fail(self) -> None:
        self.mode, self._answers, self._uncommitted = Mode.MAIN, "", False
        if self._simple:
            self._say("Z")
        else:
            self.ignoring_till_sync = True

    def _must_fail(self) -> bool:
        return self.mode is Mode.COPY_IN and self._copies[0].fails_after == self._read_in_copy

    def _step_in_copy_in(self) -> None:
        if self._must_fail():
            self._say("E")
            self._fail()
            return
        sent = self.inbox.popleft()
        self._read_in_copy += 1
        if sent.letter == "c":
            self._say("C")
            self._copies = self._copies[1:]
            self._go_on()
        elif sent.letter == "f":
            self._say("E")
            self._fail()
        else:
            assert sent.letter in "dHS", "the model client sent what no client would"

    def _step_in_copy_both(self, streaming: str) -> None:
        if not self.inbox:
            if streaming == "E":
                self._say("E")
                self._fail()
            elif not self._sent_copy_done:
                self._say(streaming)
                self._sent_copy_done = streaming == "c"
            return
        sent = self.inbox.popleft()
        if sent.letter == "X":
            self.gone = True
        elif sent.letter == "c":
            if not self._sent_copy_done:
                self._say("c")
            self._go_on()


def result() -> st.SearchStrategy[tuple[str, tuple[Copy, ...]]]:
    """One result of a Query."""
    return st.one_of(
        st.sampled_from([("C", ()), ("I", ()), ("TC", ()), ("TDDDC", ()), ("TDTDC", ()), ("HddcC", ()), ("HcC", ())]),
        st.tuples(st.just("G"), st.tuples(copies())),
    )


def copies() -> st.SearchStrategy[Copy]:
    return st.builds(Copy, st.one_of(st.none(), st.integers(0, 6)), st.sampled_from([False, False, False, True]))


@st.composite
def simple_requests(draw: DrawFn) -> Sent:
    if draw(st.integers(0, 7)) == 0:
        return Sent("F", draw(st.sampled_from(["V", "E"])))
    results = draw(st.lists(result(), min_size=1, max_size=3))
    answers = "".join(letters for letters, _ in results)
    ending = draw(st.sampled_from(["", "", "", "E", "TDE", "TE", "HdE"]))
    return Sent("Q", answers + ending, tuple(copy for _, copies_ in results for copy in copies_))


@st.composite
def extended_messages(draw: DrawFn) -> list[Sent]:
    """A pipeline, without the Sync that ends it, but perhaps with others."""
    sent: list[Sent] = []
    for _ in range(draw(st.integers(1, 5))):
        letter = draw(st.sampled_from("PBCD*EEESHG"))
        if letter == "G":
            sent += _copy_in_pipeline(draw)
            continue
        answers = {
            "P": ["1", "1", "E"],
            "B": ["2", "2", "E"],
            "C": ["3"],
            "D": ["T", "n", "E"],
            "*": ["tT", "tn", "E", "tE"],
            "E": ["C", "DDC", "DDs", "I", "E", "DE", "HddcC", "HE", "HdE", "HcE"],
            "S": ["", "", "E"],
            "H": [""],
        }[letter]
        sent.append(Sent(letter, draw(st.sampled_from(answers))))
    return sent


def _copy_in_pipeline(draw: DrawFn) -> list[Sent]:
    """Execute of a COPY FROM STDIN, and behind it whatever a client may send before it ends the copy.

    A client that has sent Sync in front of the data sends it behind them too: no other can be followed.
    """
    ignored = [Sent(letter) for letter in draw(st.text("SH", max_size=2))]
    data = [Sent(letter) for letter in draw(st.text("dddSH", max_size=6))]
    end = Sent(draw(st.sampled_from("cccf")))
    early = any(sent.letter == "S" for sent in ignored + data)
    sync = [Sent("S")] if early or draw(st.booleans()) else []
    return [Sent("E", "G", (draw(copies()),)), *ignored, *data, end, *sync]


class Scene:
    """A client and a server talking; :attr:`events` is what a guard between them saw."""

    def __init__(self, draw: DrawFn) -> None:
        self.draw = draw
        self.server = Server()
        self.events: list[tuple[Direction, bytes]] = []
        self.seen_by_client: list[str] = []

    def send(self, sent: Sent) -> None:
        """The guard sees a message, perhaps in two parts, and the server can read it when it is whole."""
        data = sent.data
        if self.draw(st.integers(0, 9)) == 0:
            cut = self.draw(st.integers(1, len(data) - 1))
            self.events.append((Direction.FRONTEND, data[:cut]))
            data = data[cut:]
            self.meanwhile(2)
        self.events.append((Direction.FRONTEND, data))
        self.server.inbox.append(sent)

    def deliver(self) -> None:
        data = self.server.outbox.popleft()
        self.events.append((Direction.BACKEND, data))
        self.seen_by_client.append(chr(data[0]))
        if self.draw(st.integers(0, 15)) == 0:
            letter = self.draw(st.sampled_from("NSA"))
            self.events.append((Direction.BACKEND, BACKEND[letter]))

    def meanwhile(self, most: int) -> None:
        """Some of what can happen without the client."""
        for _ in range(self.draw(st.integers(0, most))):
            steps = [
                step for step, can in ((self.step, self.server.can_step()), (self.deliver, self.server.outbox)) if can
            ]
            if not steps:
                return
            steps[self.draw(st.integers(0, len(steps) - 1))]()

    def step(self) -> None:
        self.server.step("d")

    def settle(self) -> None:
        """Everything that has been sent is dealt with and has arrived, as far as the server needs no more."""
        while True:
            if self.server.outbox:
                self.deliver()
            elif self.server.can_step() and self.server.mode is not Mode.COPY_BOTH:
                self.step()
            else:
                return

    # What clients do

    def simple(self) -> None:
        """Send a simple request and wait until the answer is complete, as libpq does."""
        sent = self.draw(simple_requests())
        ahead = bool(sent.copies) and sent.answers[0] == "G" and self.draw(st.integers(0, 3)) == 0
        self.seen_by_client.clear()
        self.send(sent)
        if ahead:
            self.copy_data("dddddH", heed_errors=False)
        while True:
            self.meanwhile(3)
            if self.server.mode is Mode.COPY_IN and not self.server.outbox and not self.server.inbox:
                self.copy_data("dddddH", heed_errors=self.draw(st.booleans()))
            self.settle()
            if self.server.quiescent:
                assert self.seen_by_client[-1] in "ZNSA"
                return

    def copy_data(self, letters: str, *, heed_errors: bool) -> None:
        for letter in self.draw(st.text(letters, max_size=5)):
            self.send(Sent(letter))
            self.meanwhile(2)
            if heed_errors and "E" in self.seen_by_client:
                return
        self.send(Sent(self.draw(st.sampled_from("cccf"))))

    def pipeline(self, *, wait: bool) -> None:
        """Send extended-protocol messages up to a Sync, without waiting for anything."""
        for sent in [*self.draw(extended_messages()), Sent("S", self.draw(st.sampled_from(["", "", "E"])))]:
            self.send(sent)
            self.meanwhile(2)
        if wait:
            self.settle()

    def left_behind(self) -> None:
        """Send extended-protocol messages that ask for no answer, and a simple request behind them.

        If one of them fails, the server discards the request too; a client that doesn't want to wait for ever sends a
        Sync then.
        """
        for letter in self.draw(st.text("PBCD*E", min_size=1, max_size=3)):
            answers = {"P": "1E", "B": "2E", "C": "3", "D": "nE", "*": "t", "E": "CIE"}[letter]
            answer = self.draw(st.sampled_from(answers))
            self.send(Sent(letter, "tn" if answer == "t" else answer))
            self.meanwhile(2)
        self.send(self.draw(simple_requests().filter(lambda sent: not sent.copies)))
        self.meanwhile(3)
        self.settle()
        if self.server.ignoring_till_sync:
            self.send(Sent("S"))
            self.settle()

    def libpq_copy(self) -> None:
        """An extended COPY as libpq does it: Sync behind Execute, and again behind the data's end."""
        self.settle()
        for letter, answers in zip("PBD", "12n", strict=True):
            self.send(Sent(letter, answers))
        self.send(Sent("E", "G", (self.draw(copies()),)))
        self.send(Sent("S"))
        self.settle()
        if self.server.mode is Mode.COPY_IN or self.server.ignoring_till_sync:
            self.seen_by_client.clear()
            self.copy_data("dddddSH", heed_errors=True)
            self.send(Sent("S"))
            self.settle()

    def replication(self) -> None:
        self.send(Sent("Q", self.draw(st.sampled_from(["W", "WTD"])) + "CC"))
        self.settle()
        server_ends = self.draw(st.sampled_from(["", "", "c", "E"]))
        for _ in range(self.draw(st.integers(0, 6))):
            if self.draw(st.booleans()):
                self.send(Sent("d"))
            self.meanwhile(3)
        while self.server.inbox and self.server.mode is Mode.COPY_BOTH:
            self.step()
        if server_ends and self.server.mode is Mode.COPY_BOTH:
            self.server.step(server_ends)
        self.meanwhile(1)
        for letter in "d" * self.draw(st.integers(0, 2)) + "c":
            self.send(Sent(letter))
        while self.server.inbox:
            self.step()
        self.settle()


@dataclass(frozen=True)
class Recording:
    """What passed between a client and a server, in the order in which a guard between them saw it."""

    events: tuple[tuple[Direction, bytes], ...]
    terminated: bool = False

    def runs(self) -> list[tuple[Direction, bytes]]:
        """The same with neighbours of one direction put together."""
        runs: list[tuple[Direction, bytes]] = []
        for direction, data in self.events:
            if runs and runs[-1][0] is direction:
                runs[-1] = (direction, runs[-1][1] + data)
            else:
                runs.append((direction, data))
        return runs


@st.composite
def recordings(draw: DrawFn, *, most: int = 5, terminate: bool = True) -> Recording:
    """A legitimate conversation behind the login, at whose end the server owes nothing."""
    scene = Scene(draw)
    for _ in range(draw(st.integers(1, most))):
        match draw(st.sampled_from(["simple", "simple", "pipeline", "pipelines", "left", "copy", "replication"])):
            case "simple":
                scene.simple()
            case "pipeline":
                scene.pipeline(wait=True)
            case "pipelines":
                for _ in range(draw(st.integers(1, 3))):
                    scene.pipeline(wait=False)
                scene.settle()
            case "left":
                scene.left_behind()
            case "copy":
                scene.libpq_copy()
            case _:
                scene.replication()
    scene.settle()
    assert scene.server.quiescent
    end = draw(st.sampled_from(["", "X", "FATAL"])) if terminate else ""
    if end == "X":
        scene.send(Sent("X"))
    elif end == "FATAL":
        scene.events.append((Direction.BACKEND, error("FATAL", "57P01")))
    return Recording(tuple(scene.events), terminated=end == "X")


@st.composite
def cuts(draw: DrawFn, data: bytes) -> list[bytes]:
    """The same bytes in pieces: all at once, one at a time, or anything in between."""
    if not data:
        return []
    how = draw(st.sampled_from(["whole", "bytes", "pieces"]))
    if how == "whole":
        return [data]
    if how == "bytes":
        return [data[i : i + 1] for i in range(len(data))]
    marks = sorted(set(draw(st.lists(st.integers(0, len(data)), max_size=12))) | {0, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(marks)]


def split_messages(data: Sequence[int] | bytes) -> Generator[bytes]:
    """The messages that make up a stream."""
    stream = bytes(data)
    pos = 0
    while pos < len(stream):
        stop = pos + 1 + int.from_bytes(stream[pos + 1 : pos + 5], "big")
        yield stream[pos:stop]
        pos = stop
