"""Connections in every state, and then it waits to be killed: says how many there are when all have come so far."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time

import psycopg

from tests.soak.programs.psycopg_steps import connect

LEFT = "soak_left"
"""A table in which nothing may be left of what was not committed."""


def main(seed: int) -> None:
    idle, transaction, failed, busy, copying, answered, listening = connections = [connect() for _ in range(7)]
    idle.execute("SELECT 1")
    transaction.execute("BEGIN")
    transaction.execute(f"INSERT INTO {LEFT} VALUES ({seed})")
    failed.execute("BEGIN")
    with contextlib.suppress(psycopg.errors.DivisionByZero):
        failed.execute("SELECT 1 / 0")
    send(busy, "SELECT pg_sleep(6)")
    copying.pgconn.exec_(f"COPY {LEFT} FROM STDIN".encode())
    copying.pgconn.put_copy_data(f"{seed}\n".encode() * 100)
    copying.pgconn.flush()
    send(answered, "SELECT repeat('x', 1000) FROM generate_series(1, 1000000)")
    answered.pgconn.consume_input()  # a part of it; the rest stays in the sockets on the way
    listening.execute("LISTEN soak")
    print(json.dumps({"connections": len(connections)}), flush=True)
    while True:
        signal.pause()


def send(connection: psycopg.Connection, sql: str) -> None:
    connection.pgconn.send_query(sql.encode())
    while connection.pgconn.flush():
        time.sleep(0.01)


if __name__ == "__main__":
    main(int(sys.argv[1]))
