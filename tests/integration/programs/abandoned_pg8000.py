"""Has pg8000 leave an answer unread; in a process without libpq, as its users have it.

Says ``{}`` when the answer has been abandoned, waits for a line, and says what it got next, as JSON; twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from typing import Any

import pg8000.native


class Alarm(Exception):
    """Raised from outside, in the middle of whatever is going on."""


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def wait() -> None:
    say()
    sys.stdin.readline()


def raise_in(seconds: float) -> None:
    def ring(*_: object) -> None:
        raise Alarm

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def connect() -> pg8000.native.Connection:
    host, port = os.environ["PGHOST"], int(os.environ["PGPORT"])
    where: dict[str, Any] = (
        {"unix_sock": f"{host}/.s.PGSQL.{port}"} if host.startswith("/") else {"host": host, "port": port}
    )
    return pg8000.native.Connection(os.environ["PGUSER"], **where)


def alarm() -> None:
    """From here on each query gets the answer to the one before."""
    connection = connect()
    raise_in(0.2)
    with contextlib.suppress(Alarm):
        connection.run("SELECT pg_sleep(0.5)::text, 'first'")
    wait()
    say(got=connection.run("SELECT 'second'"))
    wait()
    say(got=connection.run("SELECT 'third'"))


def correct() -> None:
    """After the alarm it closes the connection, and takes a new one."""
    connection = connect()
    raise_in(0.2)
    try:
        connection.run("SELECT pg_sleep(0.5)::text, 'first'")
    except Alarm:
        connection.close()
    connection = connect()
    wait()
    say(got=connection.run("SELECT 'second'"))
    connection.close()


if __name__ == "__main__":
    globals()[sys.argv[1]]()
