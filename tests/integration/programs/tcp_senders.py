"""Connections whose senders the kernel names: one of the scenarios below, named by the first argument.

Every statement carries a comment with the thread that sends it, ``/* pid:tid */``, and its number, so that whatever a
record says of who sent it can be compared to the truth. What a scenario has to say goes to standard output, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable

import asyncpg
import psycopg

ROUNDS = 30
SIZES = ((0.9, 20, 300), (0.99, 300, 8_192), (0.998, 8_192, 65_536), (1.0, 65_536, 1_000_000))


def say(**what: object) -> None:
    print(json.dumps(what), flush=True)


def signed(sql: str) -> str:
    """Add who sends it."""
    return f"/* {os.getpid()}:{threading.get_native_id()} */ {sql}"


def connect() -> psycopg.Connection:
    return psycopg.connect("", autocommit=True, prepare_threshold=None)


def leave(status: int = 0) -> None:
    """End without a goodbye on any connection."""
    sys.stdout.flush()
    os._exit(status)


class Child:
    """A forked process that acts each time it is told to."""

    def __init__(self, action: Callable[[], object]) -> None:
        orders, self._orders = os.pipe()
        self._answers, answers = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._orders)
            while os.read(orders, 1):
                action()
                os.write(answers, b".")
            os._exit(0)
        os.close(orders)
        os.close(answers)

    def act(self) -> None:
        os.write(self._orders, b".")
        if not os.read(self._answers, 1):
            raise ChildProcessError(f"child {self.pid} ended")

    def end(self) -> None:
        os.close(self._orders)
        os.waitpid(self.pid, 0)


def turns() -> None:
    """Parent and child wait for each other's answers to be complete."""
    connection = connect()

    def ask() -> None:
        connection.execute(signed("SELECT 1"))

    child = Child(ask)
    for _ in range(ROUNDS):
        ask()
        child.act()
    say(parent=os.getpid(), child=child.pid)
    child.end()
    leave()


def threads() -> None:
    """Two threads alternate under a lock."""
    connection = connect()
    lock = threading.Lock()
    tids: list[int] = []
    turn = [0]

    def work(number: int) -> None:
        tids.append(threading.get_native_id())
        done = 0
        while done < ROUNDS:
            with lock:
                if turn[0] == number:
                    connection.execute(signed("SELECT 1"))
                    turn[0] = 1 - number
                    done += 1
                    continue
            time.sleep(0.0002)

    workers = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    connection.execute("BEGIN")
    say(pid=os.getpid(), first=tids[0], second=tids[1])
    leave()


def event_loop() -> None:
    """An asyncio application, on epoll; it leaves without a goodbye."""

    async def main() -> None:
        connection = await asyncpg.connect(statement_cache_size=0)
        for number in range(ROUNDS):
            assert await connection.fetchval(signed("SELECT $1::int"), number) == number
        await connection.execute("BEGIN")
        say(pid=os.getpid(), tid=threading.get_native_id())
        leave()

    asyncio.run(main())


def forked_loop() -> None:
    """An asyncio application forks when it has connected, and both go on with the same transport."""

    async def main() -> None:
        _, writer = await asyncio.open_connection(sock=log_in(open_socket()))
        writer.write(simple(signed("SELECT 0")))
        mine, its = socket.socketpair()
        parent = os.getpid()
        child = os.fork()
        say_in_turns(writer, mine if child else its, first=not child)
        if child:
            say(parent=parent, child=child)
        leave()

    asyncio.run(main())


def say_in_turns(writer: asyncio.StreamWriter, other: socket.socket, *, first: bool) -> None:
    for turn in range(3):
        if turn or not first:
            other.recv(1)
        writer.write(simple(signed("SELECT 1")))
        time.sleep(0.05)
        other.send(b".")


def simple(sql: str) -> bytes:
    data = sql.encode() + b"\0"
    return b"Q" + struct.pack("!I", len(data) + 4) + data


def hasty_child() -> None:
    """A child says Terminate on its parent's connection, and exits at once."""
    connection = connect()
    connection.execute(signed("SELECT 1"))
    sock = connection.pgconn.socket
    child = os.fork()
    if child == 0:
        os.write(sock, b"X\0\0\0\4")
        os._exit(0)
    os.waitpid(child, 0)
    say(parent=os.getpid(), child=child)
    time.sleep(0.3)
    leave()


def hasty_opener() -> None:
    """A process connects, leaves the socket to its child, and has exited before the server answers."""
    go, going = os.pipe()
    opener = os.fork()
    if opener == 0:
        sock = open_socket()
        heir = os.fork()
        if heir:
            os._exit(0)
        os.read(go, 1)  # the opener has been reaped
        log_in(sock)
        sock.sendall(simple(signed("SELECT 1")))
        expect_ready(sock)
        say(heir=os.getpid())
        os.read(go, 1)
        os._exit(0)
    os.waitpid(opener, 0)
    say(opener=opener)
    os.write(going, b".")
    sys.stdin.readline()
    os.write(going, b".")
    leave()


def open_socket() -> socket.socket:
    """Connect without a driver, which would say goodbye when it is let go of."""
    return socket.create_connection((os.environ["PGHOST"], int(os.environ["PGPORT"])))


def log_in(sock: socket.socket) -> socket.socket:
    parameters = f"user\0{os.environ['PGUSER']}\0database\0{os.environ['PGDATABASE']}\0\0".encode()
    sock.sendall(struct.pack("!II", len(parameters) + 8, 3 << 16) + parameters)
    expect_ready(sock)
    return sock


def expect_ready(sock: socket.socket) -> None:
    """Read until the server is ready for the next query."""
    received = b""
    while not received.endswith(b"Z\0\0\0\5I"):
        data = sock.recv(65536)
        if not data:
            raise ConnectionError(f"the connection ended after {received!r}")
        received += data


def many() -> None:
    """Six threads of three processes send statements of all sizes on connections that they share, round after round.

    A statement is sent under a lock of its connection, and nobody waits for answers, which the parent reads. At the end
    of a round all is closed without a goodbye.
    """
    rounds, count, sends = map(int, sys.argv[2:5])
    for number in range(rounds):
        connections = [(log_in(open_socket()), lock()) for _ in range(count)]
        pids = [fork_senders(connections, 6 * number + 2 * process, sends) for process in range(3)]
        drainer = threading.Thread(target=drain, args=([sock for sock, _ in connections],), daemon=True)
        drainer.start()
        for pid in pids:
            os.waitpid(pid, 0)
        for sock, pipe in connections:
            sock.shutdown(socket.SHUT_WR)
            for fd in pipe:
                os.close(fd)
        drainer.join()
        for sock, _ in connections:
            sock.close()
    say(sent=rounds * 6 * sends)


Lock = tuple[int, int]


def lock() -> Lock:
    """A pipe with one byte in it, for whoever takes it: a lock between threads and processes."""
    taken, given = os.pipe()
    os.write(given, b".")
    return taken, given


def fork_senders(connections: list[tuple[socket.socket, Lock]], seed: int, sends: int) -> int:
    """Fork a process of two threads that send; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    workers = [threading.Thread(target=send, args=(connections, seed + half, sends)) for half in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    os._exit(0)


def send(connections: list[tuple[socket.socket, Lock]], seed: int, sends: int) -> None:
    rng = random.Random(seed)
    for _ in range(sends):
        sock, (taken, given) = rng.choice(connections)
        chance = rng.random()
        size = next(rng.randint(low, high) for limit, low, high in SIZES if chance < limit)
        data = simple(signed(f"SELECT {seed} --{'x' * size}"))
        os.read(taken, 1)
        sock.sendall(data)
        os.write(given, b".")


def drain(socks: list[socket.socket]) -> None:
    """Read from all connections until they have ended."""
    left = set(socks)
    while left:
        for sock in select.select(list(left), [], [])[0]:
            if not sock.recv(1 << 18):
                left.discard(sock)


def traffic() -> None:
    """Clients in traffic, until their connections end: says how many have, and when the last of them has noticed."""
    ended: list[float] = []
    started = threading.Semaphore(0)

    def work() -> None:
        connection = connect()
        started.release()
        try:
            while True:
                connection.execute(signed(f"SELECT 1 -- {'x' * 1000}"))
        except psycopg.OperationalError:
            ended.append(time.time())

    workers = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    for worker in workers:
        worker.start()
    for _ in workers:
        started.acquire()
    say(pid=os.getpid())
    for worker in workers:
        worker.join(10)
    say(ended=len(ended), last=max(ended, default=0))


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (turns, threads, event_loop, forked_loop, hasty_child, hasty_opener, many, traffic)
}

if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    SCENARIOS[sys.argv[1]]()
