"""Forks that behave: a child opens its own connection, or its parent has closed its own, or it runs another program.

Reads steps with one statement, and does each in the parent and in a child.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import psycopg

from tests.soak.programs.playing import Step, digest, play, values_of
from tests.soak.programs.psycopg_steps import connect


class Parent:
    def __init__(self) -> None:
        self._connection = connect()

    def do(self, step: Step) -> object:
        before = execute(self._connection, step)
        match step["n"] % 3:
            case 0:
                child = in_child(step)
            case 1:
                self._connection.close()
                child = in_child(step)
                self._connection = connect()
            case _:
                done = subprocess.run([sys.executable, "-S", "-c", "print(1)"], check=True, capture_output=True)
                child = done.stdout.decode()
        return [before, child, execute(self._connection, step)]

    def close(self) -> None:
        self._connection.close()


def execute(connection: psycopg.Connection[Any], step: Step) -> object:
    try:
        return digest(connection.execute(step["sql"], values_of(step)))
    except psycopg.Error as error:
        return error.sqlstate


def in_child(step: Step) -> object:
    """Do it in a child that leaves what it has inherited alone."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with connect() as connection:
            got = json.dumps(execute(connection, step))
        os.write(writing, got.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as said:
        got = said.read()
    os.waitpid(child, 0)
    return json.loads(got)


if __name__ == "__main__":
    parent = Parent()
    play(parent.do)
    parent.close()
