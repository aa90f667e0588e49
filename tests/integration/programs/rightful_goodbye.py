"""A connection that two processes have open is closed by the one that may: the scenario named by its argument.

Says who closed it, and who else there was.
"""

from __future__ import annotations

import json
import os
import sys
import time

import psycopg


def parent_closes() -> None:
    """The process that connected says goodbye, while its child still has the socket and does nothing with it."""
    connection = psycopg.connect("", autocommit=True)
    connection.execute("SELECT 1")
    child = os.fork()
    if child == 0:
        time.sleep(1)
        os._exit(0)
    time.sleep(0.5)
    connection.close()
    print(json.dumps({"closer": os.getpid(), "other": child}), flush=True)
    os.waitpid(child, 0)


def daemon_closes() -> None:
    """A daemon connects before it detaches itself: the process that connected is gone, and left it the connection."""
    connection = psycopg.connect("", autocommit=True)
    connection.execute("SELECT 1")
    parent = os.getpid()
    if os.fork() != 0:
        os._exit(0)
    os.setsid()
    while os.getppid() == parent:
        time.sleep(0.01)
    time.sleep(0.3)
    connection.execute("SELECT 1")
    connection.close()
    print(json.dumps({"closer": os.getpid(), "other": parent}), flush=True)


SCENARIOS = {scenario.__name__: scenario for scenario in (parent_closes, daemon_closes)}

if __name__ == "__main__":
    SCENARIOS[sys.argv[1]]()
    os._exit(0)
