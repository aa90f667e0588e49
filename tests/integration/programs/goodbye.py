"""A goodbye on a connection that two processes have open, in the scenario and with the driver that the arguments name.

Says both processes, and whether the one that was left could go on.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

PAUSE = float(os.environ["PAUSE"])
"""Seconds after which whoever is left tries to go on."""


class Family:
    """A parent that has connected, and asked; :attr:`ask` returns the number of rows, none if that failed."""

    def __init__(self, driver_name: str) -> None:
        driver: Any = import_module(driver_name)
        self._error = driver.Error
        self.connection = driver.connect("")
        self.connection.autocommit = True
        self.ask()
        self.parent = os.getpid()

    def ask(self) -> int:
        try:
            cursor = self.connection.cursor()
            cursor.execute("SELECT 1")
            return len(cursor.fetchall())
        except self._error:
            return 0

    def fork(self, *actions: Callable[[], object]) -> int:
        """Fork a child that does one thing after another, and wait for it."""
        child = os.fork()
        if child == 0:
            for action in actions:
                action()
            os._exit(0)
        os.waitpid(child, 0)
        return child

    def become_daemon(self, *last: Callable[[], object]) -> int:
        """Go on as the child, after the parent has done its last and ended."""
        if os.fork() != 0:
            for action in last:
                action()
            os._exit(0)
        while os.getppid() == self.parent:
            time.sleep(0.01)
        return os.getpid()

    def tell(self, child: int, alive: int) -> None:
        print(json.dumps({"parent": self.parent, "child": child, "alive": alive}), flush=True)


def linger() -> None:
    """Live long enough for a guard that isn't told who sends to look who has the socket."""
    time.sleep(PAUSE)


# Misused


def last_user(family: Family) -> None:
    """A child asks something, and says goodbye; its parent wants to go on."""
    child = family.fork(family.ask, linger, family.connection.close)
    time.sleep(PAUSE)
    family.tell(child, family.ask())


def between_turns(family: Family) -> None:
    """They have taken turns before."""
    child = family.fork(family.ask)
    family.ask()
    other = family.fork(family.ask, linger, family.connection.close)
    time.sleep(PAUSE)
    family.tell(other, family.ask())
    assert child != other


def daemon(family: Family) -> None:
    """The parent says goodbye, and its child wants to go on."""
    linger()
    child = family.become_daemon(family.connection.close)
    time.sleep(PAUSE)
    family.tell(child, family.ask())


def hasty_daemon(family: Family) -> None:
    """The same, without a pause: the server may still be ending the session."""
    child = family.become_daemon(family.connection.close)
    family.tell(child, family.ask())


def late_daemon(family: Family) -> None:
    """The same, after a long time."""
    linger()
    child = family.become_daemon(family.connection.close)
    time.sleep(2)
    family.tell(child, family.ask())


def heir_of_many(family: Family) -> None:
    """The parent says goodbye and lives on; of two children one wants to go on."""
    orders, give = os.pipe()
    if os.fork() == 0:  # who keeps the connection open and does nothing with it
        os.close(give)
        os.read(orders, 1)
        os._exit(0)
    child = os.fork()
    if child == 0:
        os.close(give)
        time.sleep(2 * PAUSE)
        family.tell(os.getpid(), family.ask())
        os._exit(0)
    time.sleep(PAUSE)
    family.connection.close()
    os.waitpid(child, 0)
    os.close(give)
    os.wait()


# Used as it may be


def forgotten(family: Family) -> None:
    """The parent says goodbye, and its child, which has never used the connection, ends without a word."""
    linger()
    child = family.become_daemon(family.connection.close)
    time.sleep(PAUSE)
    family.tell(child, 0)


def twice(family: Family) -> None:
    """Parent and child both say goodbye on their way out."""
    linger()
    child = family.become_daemon(family.connection.close)
    time.sleep(PAUSE)
    family.connection.close()
    family.tell(child, 0)


def launcher(family: Family) -> None:
    """A child takes the connection over and lets go of it without a word; its parent says goodbye."""
    child = family.fork(family.ask, family.ask)
    time.sleep(PAUSE)
    family.connection.close()
    family.tell(child, 0)


def released(family: Family) -> None:
    """A child takes the connection over from a parent that lets go of it without a word, and says goodbye."""
    descriptor = family.connection.fileno()
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(ready, 1)
        time.sleep(PAUSE)
        family.ask()
        family.connection.close()
        os._exit(0)
    os.close(descriptor)
    os.write(tell, b"x")
    os.waitpid(child, 0)
    family.tell(child, 0)


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        last_user, between_turns, daemon, hasty_daemon, late_daemon, heir_of_many,
        forgotten, twice, launcher, released,
    )
}  # fmt: skip

if __name__ == "__main__":
    SCENARIOS[sys.argv[1]](Family(sys.argv[2]))
    # Without the interpreter's own tidying up, which would close the connection once more.
    os._exit(0)
