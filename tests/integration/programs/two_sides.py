"""One connection, opened before a fork and used on both sides of it at once, from functions that a report is to name.

Says who they are, as JSON: parent and child. Plays until its standard input ends.
"""

from __future__ import annotations

import json
import os
import select
import sys

import psycopg


def open_shop() -> psycopg.Connection:
    return psycopg.connect("", autocommit=True, prepare_threshold=None)


def load_user(connection: psycopg.Connection) -> None:
    ask(connection)


def save_order(connection: psycopg.Connection) -> None:
    ask(connection)


def ask(connection: psycopg.Connection) -> None:
    """Libpq would soon lose count, and refuse to go on, so what goes wrong is passed over."""
    try:
        connection.execute("SELECT pg_sleep(0.05)")
    except psycopg.Error:
        os._exit(0)


def main() -> None:
    connection = open_shop()
    child = os.fork()
    if child == 0:
        parent = os.getppid()
        while os.getppid() == parent:
            load_user(connection)
    else:
        print(json.dumps({"parent": os.getpid(), "child": child}), flush=True)
        while not select.select([sys.stdin], [], [], 0)[0]:
            save_order(connection)
    os._exit(0)


if __name__ == "__main__":
    main()
