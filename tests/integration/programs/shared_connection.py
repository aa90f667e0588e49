"""One connection, opened by a parent and inherited by its children: each way to misuse it, and one not to.

Names the processes on its first line, as JSON, parent first. Then it plays the scenario named by its argument,
prints ``done``, and keeps everybody's sockets open until its standard input ends.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from collections.abc import Callable

import psycopg

END = b"\xff"
OPENED: list[psycopg.Connection] = []
"""Keeps connections from being closed, with a Terminate, by the process that happens to let go of them first."""


class Child:
    """A forked process that runs one of its actions each time it is told to, and says when it is done."""

    def __init__(self, *actions: Callable[[], object]) -> None:
        orders, self._orders = os.pipe()
        self._answers, answers = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._orders)
            while (order := os.read(orders, 1)) not in {b"", END}:
                actions[order[0]]()
                os.write(answers, order)
            os._exit(0)
        os.close(orders)
        os.close(answers)

    def do(self, action: int = 0) -> None:
        self.begin(action)
        self.wait()

    def begin(self, action: int = 0) -> None:
        os.write(self._orders, bytes([action]))

    def wait(self) -> None:
        if not os.read(self._answers, 1):
            raise ChildProcessError(f"child {self.pid} ended")

    def end(self) -> None:
        # Said, and not just hung up: a later child has inherited the other end of the pipe as well.
        os.write(self._orders, END)
        os.waitpid(self.pid, 0)


def connect() -> psycopg.Connection:
    connection = psycopg.connect("", autocommit=True, prepare_threshold=None)
    OPENED.append(connection)
    return connection


def overlapping() -> None:
    """The child asks while the answer to the parent is outstanding; the parent reads both. Three times.

    libpq would lose count after the first time, and each process refuse to go on, so its socket is used without it.
    """
    connection = connect()
    socket = connection.pgconn.socket
    child = Child(lambda: ask(socket, "SELECT 2 AS child"))
    announce(child)
    for _ in range(3):
        ask(socket, "SELECT 1 AS parent FROM pg_sleep(0.3)")
        child.do()
        read_answers(socket, 2)
    hold()
    child.end()
    connection.close()


def in_turn() -> None:
    """Parent and child wait for each other's answers to be complete: nothing overlaps, and nothing goes wrong yet."""
    connection = connect()
    child = Child(lambda: connection.execute("SELECT 2 AS child"))
    announce(child)
    for _ in range(3):
        connection.execute("SELECT 1 AS parent")
        child.do()
    hold()
    child.end()
    connection.close()


def listening() -> None:
    """The parent waits for notifications while the child queries, and asks something itself afterwards.

    The child may read its answer before the parent has woken, which sleeps on then.
    """
    connection = connect()
    connection.execute("LISTEN news")
    child = Child(lambda: connection.execute("SELECT 2 AS child FROM pg_sleep(0.4)"))
    announce(child)
    for _ in range(2):
        child.begin()
        select.select([connection.pgconn.socket], [], [], 1)
        child.wait()
        connection.execute("SELECT 1 AS parent")
    hold()
    child.end()
    connection.close()


def third_process() -> None:
    """Two children, one after the other, on what their parent opened and never used."""
    connection = connect()
    first, second = (Child(lambda: connection.execute("SELECT 1")) for _ in range(2))
    announce(first, second)
    first.do()
    second.do()
    hold()
    first.end()
    second.end()
    connection.close()


def handed_over() -> None:
    """The child alone uses what the parent opened, and closes it when the parent has let go."""
    connection = connect()
    child = Child(lambda: connection.execute("SELECT 1"), connection.close)
    announce(child)
    for _ in range(5):
        child.do(0)
    hold()
    os.close(connection.pgconn.socket)
    child.do(1)
    child.end()


def connect_after_fork() -> None:
    """The corrected program: every process connects for itself, and closes what it opened."""

    def work() -> None:
        with connect() as own:
            for _ in range(20):
                own.execute("SELECT 1")

    children = [Child(work), Child(work)]
    announce(*children)
    for child in children:
        child.do()
    work()
    hold()
    for child in children:
        child.end()


class Own:
    """A connection of a child's own."""

    connection: psycopg.Connection

    def open(self) -> None:
        self.connection = connect()
        self.connection.execute("SELECT 1")

    def close(self) -> None:
        self.connection.close()


def forgotten() -> None:
    """Two children forget what they have inherited and open their own; the third has not had to do anything yet."""
    connection = connect()
    owns = Own(), Own()
    active = [Child(own.open, own.close) for own in owns]
    idle = Child()
    announce(idle, *active)
    for child in active:
        child.do(0)
    hold()
    for child in active:
        child.do(1)
        child.end()
    idle.end()
    connection.close()


def forgotten_and_used() -> None:
    """A child opens a connection of its own, and uses its parent's all the same when SIGUSR1 comes."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    connection = connect()
    own = Own()
    child = Child(own.open, lambda: connection.execute("SELECT 1"), own.close)
    announce(child)
    child.do(0)
    print("done", flush=True)
    signal.sigwait([signal.SIGUSR1])
    child.do(1)
    sys.stdin.read()
    child.do(2)
    child.end()
    connection.close()


def idle_heir() -> None:
    """A child has its parent's connection open and does nothing."""
    connection = connect()
    child = Child()
    announce(child)
    hold()
    child.end()
    connection.close()


def ask(socket: int, sql: str) -> None:
    """Send a Query message."""
    text = sql.encode() + b"\0"
    os.write(socket, b"Q" + (4 + len(text)).to_bytes(4) + text)


def read_answers(socket: int, count: int) -> None:
    """Read until so many ReadyForQuery messages have come, whosesoever they are."""
    data = b""
    while data.count(b"Z\x00\x00\x00\x05I") < count:
        if not select.select([socket], [], [], 10)[0]:
            raise TimeoutError(data)
        if not (block := os.read(socket, 65536)):
            raise ConnectionError(data)
        data += block


def announce(*children: Child) -> None:
    print(json.dumps([os.getpid(), *(child.pid for child in children)]), flush=True)


def hold() -> None:
    print("done", flush=True)
    sys.stdin.read()


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        overlapping,
        in_turn,
        listening,
        third_process,
        handed_over,
        connect_after_fork,
        forgotten,
        forgotten_and_used,
        idle_heir,
    )
}

if __name__ == "__main__":
    SCENARIOS[sys.argv[1]]()
    # Without the interpreter's own tidying up, which would close the connection that a child has been handed.
    os._exit(0)
