"""Connects and becomes a daemon, by the book: forks twice, and both times the parent exits.

The daemon says who is who, and uses the connection so many seconds later as its argument says, if it says so. Then it
waits to be told to end, and closes the connection. The second argument is how long the first process stays.
"""

from __future__ import annotations

import json
import os
import sys
import time

import psycopg


def main(after: float | None, stays: float) -> None:
    connection = psycopg.connect("", autocommit=True, prepare_threshold=None)
    opener = os.getpid()
    if os.fork() != 0:
        time.sleep(stays)
        os._exit(0)
    os.setsid()
    if os.fork() != 0:
        os._exit(0)
    if after is not None:
        time.sleep(after)
        connection.execute("SELECT 1")
    print(json.dumps({"opener": opener, "daemon": os.getpid()}), flush=True)
    sys.stdin.readline()
    if after is not None:
        connection.execute("SELECT 1")
    connection.close()
    os._exit(0)


if __name__ == "__main__":
    main(None if sys.argv[1] == "never" else float(sys.argv[1]), float(sys.argv[2]))
