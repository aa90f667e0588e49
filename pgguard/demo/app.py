"""A preforking application: two workers that look up their own user's name, over and over.

By default it makes the mistake that this demonstration is about: it connects before it forks, so that both
workers write to, and read from, one socket. With ``--fixed`` each worker connects for itself.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import sys
import time

import psycopg

USERS = {1: "Alice", 2: "Bob"}
LOOKUP = "SELECT name FROM (VALUES (1, 'Alice'), (2, 'Bob')) AS users (id, name) WHERE id = {}"
SECONDS = 2.5

log = logging.getLogger("app")


def connect() -> psycopg.Connection:
    """Connect, and log what libpq itself has to say."""
    connection = psycopg.connect(os.environ["DATABASE_URL"], autocommit=True, prepare_threshold=None)
    connection.add_notice_handler(lambda notice: log.warning("libpq: %s", notice.message_primary))
    return connection


def serve(user: int, connection: psycopg.Connection) -> None:
    """Look up one user's name until the time is up."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        row = connection.execute(LOOKUP.format(user)).fetchone()
        if row != (USERS[user],):
            log.error("asked for %s, was shown %s", USERS[user], row and row[0])
        time.sleep(random.uniform(0, 0.002))  # noqa: S311 - the rest of a request's work


def connect_and_serve(user: int) -> None:
    """Do the same on a connection of one's own."""
    with connect() as connection:
        serve(user, connection)


def main() -> None:
    """Fork the workers, and give up on one that is still waiting when its time is long over."""
    logging.basicConfig(stream=sys.stdout, format="pid %(process)d: %(message)s")
    fork = multiprocessing.get_context("fork")
    if "--fixed" in sys.argv:
        workers = [fork.Process(target=connect_and_serve, args=(user,)) for user in USERS]
    else:
        connection = connect()
        workers = [fork.Process(target=serve, args=(user, connection)) for user in USERS]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(SECONDS + 1)
        if worker.is_alive():
            log.error("killed worker %d: it was still waiting for an answer", worker.pid)
            worker.kill()
            worker.join()


if __name__ == "__main__":
    main()
