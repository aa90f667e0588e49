"""Opens as many connections as its first argument says, leaves them as its second says, and waits to be told to end.

A third argument is added to the connection string. With ``retry`` it tries to connect again and again instead, as often
as the first says, and says how often it was refused and how long that took.
"""

from __future__ import annotations

import json
import os
import sys
import time

import psycopg


def keep(count: int, how: str, conninfo: str) -> None:
    connections = [psycopg.connect(conninfo, autocommit=True) for _ in range(count)]
    if how == "transaction":
        for connection in connections:
            connection.execute("BEGIN")
    print(json.dumps({"pid": os.getpid()}), flush=True)
    sys.stdin.readline()
    for connection in connections:
        connection.close()


def retry(count: int, conninfo: str) -> None:
    began = time.monotonic()
    refused = 0
    for _ in range(count):
        try:
            psycopg.connect(conninfo).close()
        except psycopg.OperationalError:
            refused += 1
    print(json.dumps({"pid": os.getpid(), "refused": refused, "seconds": time.monotonic() - began}), flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    number, doing, more = int(sys.argv[1]), sys.argv[2], " ".join(sys.argv[3:])
    if doing == "retry":
        retry(number, more)
    else:
        keep(number, doing, more)
