"""Connects, says who it is, and when it is told to lets the connection end without Terminate, as its argument says."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from typing import NoReturn

import psycopg


def closes(connection: psycopg.Connection) -> None:
    """The process lives on: something has closed a descriptor that wasn't its own."""
    os.close(connection.fileno())
    sys.stdin.readline()


def shuts_down(connection: psycopg.Connection) -> None:
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.shutdown(socket.SHUT_RDWR)
        sys.stdin.readline()


def exits(_: psycopg.Connection) -> NoReturn:
    os._exit(3)


def is_killed(_: psycopg.Connection) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def is_asked_to_end(_: psycopg.Connection) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def crashes(_: psycopg.Connection) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def says(pid: int) -> None:
    print(json.dumps({"pid": pid}), flush=True)
    sys.stdin.readline()


def ends_unseen() -> None:
    """How it has ended is told to nobody: its parent doesn't want to know."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    if os.fork() == 0:
        connection = connect()
        says(os.getpid())
        exits(connection)
    time.sleep(60)


def is_inherited() -> None:
    """Its opener is gone, and leaves the connection to a child that doesn't know of it."""
    connection = connect()
    if os.fork() == 0:
        says(os.getpid())
        exits(connection)
    time.sleep(0.5)
    os._exit(0)


def connect() -> psycopg.Connection:
    connection = psycopg.connect("", autocommit=True)
    connection.execute("SELECT 1")
    return connection


ENDINGS = {ending.__name__: ending for ending in (closes, shuts_down, exits, is_killed, is_asked_to_end, crashes)}
FORKS = {fork.__name__: fork for fork in (ends_unseen, is_inherited)}

if __name__ == "__main__":
    if sys.argv[1] in FORKS:
        FORKS[sys.argv[1]]()
    else:
        opened = connect()
        says(os.getpid())
        ENDINGS[sys.argv[1]](opened)
    os._exit(0)
