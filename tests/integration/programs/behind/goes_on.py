"""Leaves a process behind that has a connection of its own, and goes on until a file is there.

As a daemon, or as a child that stays in the session of the terminal; which uses its connection all the time, or leaves
it idle. It ends when the connection does.
"""

from __future__ import annotations

import os
import select
import sys
import time
from pathlib import Path

import psycopg


def main(end: Path, *, daemon: bool, works: bool) -> None:
    ready, write = os.pipe()
    if os.fork():
        os.close(write)
        os.read(ready, 1)
        return
    if daemon:
        os.setsid()
        if os.fork():
            os._exit(0)
    connection = psycopg.connect(os.environ["DATABASE_URL"], autocommit=True)
    os.close(write)
    while not end.exists():
        if works:
            try:
                connection.execute("SELECT 1")
            except psycopg.OperationalError:
                return
        elif select.select([connection], [], [], 0)[0]:
            return
        time.sleep(0.1)
    print("done", os.getppid(), flush=True)
    connection.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), daemon="daemon" in sys.argv, works="works" in sys.argv)
