"""Connections that are made and given up in every phase, refused, or used for a moment: nothing to find fault with."""

from __future__ import annotations

import os
import random
import socket
import struct
import sys

import psycopg

from tests.proxy.messages import SSL_REQUEST, TERMINATE, cancel_request, startup

_SECONDS = 60.0


def main(seed: int, count: int) -> None:
    chance = random.Random(seed)
    for n in range(count):
        do = chance.choice((used, used, used, refused, no_database, looked, asked, half, gave_up, cancelled))
        print(n, do.__name__, do(), flush=True)


def used() -> object:
    with psycopg.connect("", autocommit=True) as connection:
        return connection.execute("SELECT 1").fetchone()


def refused() -> object:
    return _refusal("user=nobody_of_that_name")


def no_database() -> object:
    return _refusal("dbname=nowhere")


def _refusal(conninfo: str) -> str:
    try:
        psycopg.connect(conninfo).close()
    except psycopg.OperationalError as error:
        return str(error).partition("FATAL")[2]
    return "it was let in"


def looked() -> object:
    _socket().close()
    return None


def asked() -> object:
    with _socket() as sock:
        sock.sendall(SSL_REQUEST)
        return sock.recv(1) in (b"N", b"S")


def half() -> object:
    with _socket() as sock:
        sock.sendall(startup(user=os.environ["PGUSER"])[:-3])
    return None


def gave_up() -> object:
    """Gone while it logs in, with a reset where there are some."""
    with _socket() as sock:
        sock.sendall(startup(user=os.environ["PGUSER"], database=os.environ["PGDATABASE"]))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return None


def cancelled() -> object:
    """A CancelRequest for nobody, and a client that says goodbye before it has said who it is."""
    for said in (cancel_request(1, b"key!"), TERMINATE):
        with _socket() as sock:
            sock.sendall(said)
            assert sock.recv(1) == b""
    return None


def _socket() -> socket.socket:
    host, port = os.environ["PGHOST"], os.environ["PGPORT"]
    if host.startswith("/"):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(_SECONDS)
        sock.connect(f"{host}/.s.PGSQL.{port}")
        return sock
    return socket.create_connection((host, int(port)), timeout=_SECONDS)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
