"""Connects, does what its argument says, says who it is, and waits to be told to go on, or to be killed."""

from __future__ import annotations

import json
import os
import sys
import threading
import time

import psycopg


def idle(connection: psycopg.Connection) -> None:
    connection.execute("SELECT 1")
    say(pid=os.getpid())
    sys.stdin.readline()


def transaction(connection: psycopg.Connection) -> None:
    """Leave a transaction open, idle."""
    connection.execute("BEGIN")
    connection.execute("SELECT 1")
    say(pid=os.getpid())
    sys.stdin.readline()
    connection.execute("COMMIT")


def request(connection: psycopg.Connection) -> None:
    """Wait for an answer all the time."""
    threading.Timer(0.3, lambda: say(pid=os.getpid())).start()
    connection.execute("SELECT pg_sleep(2)")


def leak(_connection: psycopg.Connection) -> None:
    """Exit and leave the connection to a child that doesn't know of it: a helper that some library has started."""
    child = os.fork()
    if child == 0:
        sys.stdin.readline()
        os._exit(0)
    say(pid=os.getpid(), child=child)
    time.sleep(0.8)
    os._exit(0)


def say(**what: int) -> None:
    print(json.dumps(what), flush=True)


SCENARIOS = {scenario.__name__: scenario for scenario in (idle, transaction, request, leak)}

if __name__ == "__main__":
    with psycopg.connect("", autocommit=True) as own:
        SCENARIOS[sys.argv[1]](own)
