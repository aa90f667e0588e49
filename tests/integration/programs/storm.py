"""Many connections that are misused at one moment: those of one process, or of what it forks.

Opens as many as its second argument says, says that it is ready, waits for a line, does what its first argument says,
says so, and waits for another line. Speaks the protocol by itself, so that a thousand connections cost it little.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import struct
import sys
import time

SLOW = "SELECT pg_sleep(600)"


def message(kind: bytes, body: bytes = b"") -> bytes:
    return kind + struct.pack("!I", len(body) + 4) + body


def query(sql: str) -> bytes:
    return message(b"Q", sql.encode() + b"\0")


TERMINATE = message(b"X")


class Connection:
    """One connection, logged in."""

    def __init__(self) -> None:
        self.sock = dial()
        self.begin()

    def begin(self) -> None:
        user, database = os.environ["PGUSER"].encode(), os.environ["PGDATABASE"].encode()
        body = struct.pack("!I", 196608) + b"user\0" + user + b"\0database\0" + database + b"\0\0"
        self.sock.sendall(struct.pack("!I", len(body) + 4) + body)
        self.answer()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def answer(self) -> bytes:
        """Read up to the next ReadyForQuery, or to the end; return the types of what has come."""
        types = b""
        while not types.endswith(b"Z"):
            head = self._exactly(5)
            if len(head) < 5:
                break
            self._exactly(struct.unpack("!I", head[1:])[0] - 4)
            types += head[:1]
        return types

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                part = self.sock.recv(size - len(data))
            except ConnectionError:
                part = b""
            if not part:
                break
            data += part
        return data


def dial() -> socket.socket:
    host, port = os.environ["PGHOST"], int(os.environ["PGPORT"])
    if host.startswith("/"):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(f"{host}/.s.PGSQL.{port}")
        return sock
    sock = socket.create_connection((host, port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def say(**what: object) -> None:
    print(json.dumps(what), flush=True)


def told() -> None:
    sys.stdin.readline()


def ended(connections: list[Connection], seconds: float) -> dict[str, object]:
    """Wait until all have ended, and say how long the first and the last took."""
    poll = select.poll()
    left = {one.sock.fileno(): one.sock for one in connections}
    for fd in left:
        poll.register(fd, select.POLLIN)
    began, took = time.monotonic(), [0.0]
    while left and time.monotonic() - began < seconds:
        for fd, _ in poll.poll(100):
            try:
                data = left[fd].recv(65536)
            except ConnectionError:
                data = b""
            if not data:
                took.append(time.monotonic() - began)
                poll.unregister(fd)
                del left[fd]
    return {"ended": len(took) - 1, "last": took[-1]}


def busy(number: int) -> None:
    """Ask on each while its answer is outstanding."""
    connections = [Connection() for _ in range(number)]
    for one in connections:
        one.send(query(SLOW))
    say(pid=os.getpid())
    told()
    for one in connections:
        one.send(query("SELECT 2"))
    say(**ended(connections, float(os.environ.get("STORM_SECONDS", "0"))))
    told()


def terminate(number: int) -> None:
    """Have a child say Terminate on each."""
    connections = [Connection() for _ in range(number)]
    go, begun = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(go, 1)
        for one in connections:
            one.send(TERMINATE)
        signal.pause()
    say(pid=os.getpid(), child=child)
    told()
    os.write(begun, b"!")
    say(**ended(connections, float(os.environ.get("STORM_SECONDS", "0"))))
    told()
    os.kill(child, signal.SIGKILL)


def goodbye(number: int) -> None:
    """Say Terminate on each as it should be: no misuse at all."""
    connections = [Connection() for _ in range(number)]
    say(pid=os.getpid())
    told()
    for one in connections:
        one.send(TERMINATE)
        one.sock.close()
    say()
    told()


def heirs(number: int, children: int = 300, *, asks: bool = False) -> None:
    """Have many children inherit each, and do nothing with it."""
    connections = [Connection() for _ in range(number)]
    say(pid=os.getpid())
    told()
    pids = []
    for _ in range(children):
        pid = os.fork()
        if pid == 0:
            signal.pause()
        pids.append(pid)
    say()
    if asks:
        until = time.monotonic() + 30
        while time.monotonic() < until and not select.select([0], [], [], 0)[0]:
            for one in connections:
                one.send(query("SELECT pg_sleep(0.02)"))
            for one in connections:
                one.answer()
    told()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def querying_heirs(number: int, children: int = 300) -> None:
    """The same, while the parent uses them."""
    heirs(number, children, asks=True)


def exits(number: int, children: int = 20) -> None:
    """Have workers inherit a pool, each use some of it, and exit one after the other."""
    connections = [Connection() for _ in range(number)]
    say(pid=os.getpid())
    told()
    pids = []
    for n in range(children):
        pid = os.fork()
        if pid == 0:
            for one in connections[n::children]:
                one.send(query("SELECT 3"))
            for one in connections[n::children]:
                one.answer()
            for one in connections:
                one.send(TERMINATE)
            os._exit(0)
        pids.append(pid)
    say()
    for pid in pids:
        os.waitpid(pid, 0)
    told()


def close(number: int) -> None:
    """Close each without a word, with a request open."""
    connections = [Connection() for _ in range(number)]
    for one in connections:
        one.send(query(SLOW))
    say(pid=os.getpid())
    told()
    for one in connections:
        one.sock.close()
    say()
    told()


def killed(number: int) -> None:
    """Have it killed with a request open on each."""
    connections = [Connection() for _ in range(number)]
    for one in connections:
        one.send(query(SLOW))
    say(pid=os.getpid())
    told()
    say()
    os.kill(os.getpid(), signal.SIGKILL)


def transaction(number: int) -> None:
    """Leave a transaction open on each."""
    connections = [Connection() for _ in range(number)]
    say(pid=os.getpid())
    told()
    for one in connections:
        one.send(query("BEGIN"))
    for one in connections:
        one.answer()
    say()
    told()


def unread(number: int) -> None:
    """Ask on each and read no answer."""
    connections = [Connection() for _ in range(number)]
    say(pid=os.getpid())
    told()
    for one in connections:
        one.send(query("SELECT 4"))
    say()
    told()


def refused(number: int) -> None:
    """Connect as often at once, where there are no slots left."""
    held = []
    while True:
        one = Connection.__new__(Connection)
        one.sock = dial()
        held.append(one)
        body = struct.pack("!I", 196608) + b"user\0" + os.environ["PGUSER"].encode() + b"\0\0"
        one.send(struct.pack("!I", len(body) + 4) + body)
        if not one.answer().endswith(b"Z"):
            break
    say(pid=os.getpid(), held=len(held) - 1)
    told()
    logins(number)


def logins(number: int) -> None:
    """Connect as often at once."""
    if not any(arg == "refused" for arg in sys.argv):
        say(pid=os.getpid())
        told()
    body = struct.pack("!I", 196608) + b"user\0" + os.environ["PGUSER"].encode() + b"\0\0"
    packet = struct.pack("!I", len(body) + 4) + body
    began = time.monotonic()
    poll = select.poll()
    socks = {}
    failed = 0
    for _ in range(number):
        try:
            sock = dial()
            sock.sendall(packet)
        except OSError:
            failed += 1
            continue
        socks[sock.fileno()] = sock
        poll.register(sock.fileno(), select.POLLIN)
    waiting, got, over = set(socks), dict.fromkeys(socks, b""), 0
    while waiting and time.monotonic() - began < 30:
        for fd, _ in poll.poll(100):
            try:
                data = socks[fd].recv(65536)
            except ConnectionError:
                data = b""
            got[fd] += data
            if not data or got[fd][-6:-1] == b"Z\0\0\0\5":
                over += not data
                waiting.discard(fd)
                poll.unregister(fd)
    say(failed=failed, over=over, waiting=len(waiting), seconds=time.monotonic() - began)
    told()


def idle(number: int) -> None:
    """Connect, and wait: the storm comes from elsewhere."""
    connections = [Connection() for _ in range(number)]
    say(pid=os.getpid())
    told()
    say(**ended(connections, float(os.environ.get("STORM_SECONDS", "0"))))
    told()


STORMS = {
    storm.__name__: storm
    for storm in (
        busy,
        terminate,
        goodbye,
        heirs,
        querying_heirs,
        exits,
        close,
        killed,
        transaction,
        unread,
        refused,
        logins,
        idle,
    )
}

if __name__ == "__main__":
    STORMS[sys.argv[1]](*map(int, sys.argv[2:]))
