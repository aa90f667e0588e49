"""Tells secrets in every way it can, and goes without a word: what its arguments are makes no difference to it.

Reads one JSON object: the name to give itself, and a list of connections, each with a connection string, the statements
to send and a secret for a parameter, for a row that is there already, and for COPY data.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from pathlib import Path

import psycopg

told = json.loads(sys.stdin.readline())
Path("/proc/self/comm").write_text(told["name"])
for asked in told["connections"]:
    connection = psycopg.connect(asked["conninfo"], autocommit=True)
    for sql in asked["statements"]:
        connection.pgconn.exec_(sql.encode())
    for _ in range(2):
        with contextlib.suppress(psycopg.errors.UniqueViolation):
            connection.execute("INSERT INTO users (name, password) VALUES ('joe', %s)", [asked["secret"]])
    connection.pgconn.exec_(b"COPY users (name, password) FROM STDIN")
    connection.pgconn.put_copy_data(f"joe\t{asked['secret']}\n".encode())
    sock = socket.socket(fileno=os.dup(connection.fileno()))
    sock.shutdown(socket.SHUT_RDWR)
    sock.close()
print(json.dumps({}), flush=True)
sys.stdin.readline()
os._exit(0)
