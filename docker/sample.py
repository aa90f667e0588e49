"""A small preforking application with the mistake that pgguard is about: it connects first, and forks then.

Both workers write to, and read from, one socket, so that each is shown the other's rows now and then.
"""

from __future__ import annotations

import os
import random
import time

import psycopg

USERS = {1: "Alice", 2: "Bob"}
LOOKUP = "SELECT name FROM (VALUES (1, 'Alice'), (2, 'Bob')) AS users (id, name) WHERE id = {}"


def connect() -> psycopg.Connection:
    """Connect as soon as the guard and the server are there."""
    while True:
        try:
            return psycopg.connect(os.environ["DATABASE_URL"], autocommit=True, prepare_threshold=None)
        except psycopg.OperationalError as error:
            print(f"waiting: {error}".splitlines()[0], flush=True)
            time.sleep(1)


def serve(user: int, connection: psycopg.Connection) -> None:
    """Look up one user's name, over and over; with an error, start over."""
    while True:
        [name] = connection.execute(LOOKUP.format(user)).fetchone() or [None]
        if name != USERS[user]:
            print(f"worker {os.getpid()}: asked for {USERS[user]}, was shown {name}", flush=True)
        time.sleep(random.uniform(0, 1))


def main() -> None:
    """Fork the workers, wait until they have failed, and fork others."""
    while True:
        connection = connect()
        for user in USERS:
            if os.fork() == 0:
                try:
                    serve(user, connection)
                except psycopg.Error as error:
                    print(f"worker {os.getpid()}: {error}", flush=True)
                finally:
                    os._exit(1)
        for _ in USERS:
            os.wait()


if __name__ == "__main__":
    main()
