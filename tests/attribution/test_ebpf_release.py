"""No byte is lost, and nobody hangs, when a socket is watched no more: whatever lies unread in it at that moment.

In a map a socket receives through ``tcp_bpf_recvmsg``, but what it receives stays in its own queue, as there is no
program that would take it out (see :mod:`pgguard.attribution.transparency` for one that does, and loses it). Each test
does it hundreds of times, from all sides.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

import pytest

from pgguard.attribution.ebpf import bpf
from pgguard.attribution.ebpf.account import Account, Accounts
from pgguard.attribution.ebpf.probe import ProbeUnavailable, SenderProbe, connection_key
from pgguard.attribution.ebpf.programs import Way

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

try:
    with SenderProbe([]) as best:
        WAYS = [way for way in Way if way is Way.MAP or best.way is Way.CALLBACK]
except ProbeUnavailable as unavailable:
    pytest.skip(str(unavailable), allow_module_level=True)

SECONDS = 40.0
ways = pytest.mark.parametrize("way", WAYS)


class Bench(NamedTuple):
    """A probe and what it watches."""

    probe: SenderProbe
    listener: socket.socket
    accounts: Accounts

    def connect(self) -> tuple[socket.socket, socket.socket, Account]:
        client = socket.create_connection(self.listener.getsockname(), SECONDS)
        client.settimeout(SECONDS)
        accepted = self.listener.accept()[0]
        accepted.settimeout(SECONDS)
        self.accounts.feed()
        account = self.accounts.open(connection_key(accepted))
        assert account.cookie is not None
        return client, accepted, account


@contextlib.contextmanager
def bench(way: Way) -> Iterator[Bench]:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        SenderProbe([listener.getsockname()], way=way, blocking=True) as probe,
    ):
        yield Bench(probe, listener, Accounts(probe))


def releases(made: Bench) -> list[Callable[[Account], object]]:
    """The ways out: as the guard does for one socket; and without asking whether it is there."""

    def by_guard(account: Account) -> None:
        assert account.cookie is not None
        made.probe.release(account.cookie)

    def by_map(account: Account) -> None:
        assert account.cookie is not None
        if made.probe.way is Way.MAP:
            bpf.remove(made.probe._sockets, struct.pack("=Q", account.cookie))

    return [by_guard, by_map]


def receive(client: socket.socket, size: int) -> bytes:
    found = bytearray()
    while len(found) < size:
        data = client.recv(size - len(found))
        assert data, f"{size - len(found)} bytes are missing"
        found += data
    return bytes(found)


@ways
def test_what_lies_in_the_receive_queue_stays_there(way: Way) -> None:
    """Unread, or read in part; more comes after."""
    rng = random.Random(1)
    with bench(way) as made:
        for number in range(1000):
            client, accepted, account = made.connect()
            with client, accepted:
                data = rng.randbytes(rng.choice([1, 100, 5_000, 200_000]))
                accepted.sendall(data)
                read = receive(client, rng.randrange(len(data) + 1)) if number % 2 else b""
                releases(made)[number % 4 // 2](account)
                accepted.sendall(b"more")
                assert read + receive(client, len(data) - len(read)) == data
                assert receive(client, 4) == b"more"
                client.sendall(b"back")
                assert accepted.recv(100) == b"back"


@ways
def test_a_reader_that_waits_goes_on_waiting_and_gets_all(way: Way) -> None:
    with bench(way) as made:
        for number in range(300):
            client, accepted, account = made.connect()
            with client, accepted:
                got: list[bytes] = []
                client.setblocking(True)
                reader = threading.Thread(target=lambda: got.append(receive(client, 1000)))  # noqa: B023
                reader.start()
                if number % 3:
                    time.sleep(0.0005)
                releases(made)[number % 2](account)
                accepted.sendall(b"a" * 400)
                accepted.sendall(b"b" * 600)
                reader.join(SECONDS)
                assert got == [b"a" * 400 + b"b" * 600]


@ways
def test_streams_in_both_directions_are_whole(way: Way) -> None:
    """While two threads send and two read, the socket is let go of at any moment."""
    rng = random.Random(2)
    with bench(way) as made:
        for number in range(150):
            client, accepted, account = made.connect()
            with client, accepted:
                data = rng.randbytes(300_000)
                got: dict[str, bytes] = {}

                def read(name: str, end: socket.socket) -> None:
                    got[name] = receive(end, len(data))  # noqa: B023

                threads = [
                    threading.Thread(target=client.sendall, args=(data,)),
                    threading.Thread(target=accepted.sendall, args=(data,)),
                    threading.Thread(target=read, args=("client", client)),
                    threading.Thread(target=read, args=("accepted", accepted)),
                ]
                for thread in threads:
                    thread.start()
                time.sleep(rng.random() * 0.0005)
                releases(made)[number % 2](account)
                for thread in threads:
                    thread.join(SECONDS)
                    assert not thread.is_alive()
                assert got == {"client": data, "accepted": data}


@ways
def test_the_end_of_a_probe_takes_nothing_along(way: Way) -> None:
    """Unread, read in part, and waited for, on three dozen connections at a time."""
    rng = random.Random(3)
    for _ in range(8):
        with bench(way) as made:
            connections = [made.connect() for _ in range(36)]
            data = rng.randbytes(50_000)
            got: list[bytes] = []
            readers = []
            for number, (client, accepted, _) in enumerate(connections):
                if number % 3 == 2:
                    reader = threading.Thread(target=lambda one=client: got.append(receive(one, len(data) + 4)))  # noqa: B023
                    reader.start()
                    readers.append(reader)
                else:
                    accepted.sendall(data)
                    if number % 3:
                        assert receive(client, 1000) == data[:1000]
            made.probe.close()
            for number, (client, accepted, _) in enumerate(connections):
                if number % 3 == 2:
                    accepted.sendall(data)
                accepted.sendall(b"more")
                if number % 3 != 2:
                    rest = data[1000:] if number % 3 else data
                    assert receive(client, len(rest) + 4) == rest + b"more"
            for reader in readers:
                reader.join(SECONDS)
            assert got == [data + b"more"] * 12
            for client, accepted, _ in connections:
                client.close()
                accepted.close()


GUARD = """
import os, socket, sys
from pgguard.attribution.ebpf.probe import SenderProbe
from pgguard.attribution.ebpf.programs import Way
listener = socket.create_server(("127.0.0.1", 0), backlog=64)
probe = SenderProbe([listener.getsockname()], blocking=True, way=Way(sys.argv[1]))
print(listener.getsockname()[1], flush=True)
kept = []
for number in range(int(sys.argv[2])):
    connection = listener.accept()[0]
    connection.sendall(bytes([number]) * 40_000)
    kept.append(connection)
print("sent", flush=True)
sys.stdin.read()
"""


@ways
def test_a_guard_that_is_killed_takes_nothing_along(way: Way) -> None:
    """What it has sent can be read; then there is the end, and nobody waits for ever."""
    count = 60
    for _ in range(4):
        with (
            subprocess.Popen(
                [sys.executable, "-c", GUARD, way, str(count)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            ) as guard,
            contextlib.ExitStack() as stack,
        ):
            stack.callback(guard.kill)
            assert guard.stdout is not None
            port = int(guard.stdout.readline())
            clients = []
            for _ in range(count):
                client = stack.enter_context(socket.create_connection(("127.0.0.1", port), SECONDS))
                clients.append(client)
            assert guard.stdout.readline() == "sent\n"
            read = [receive(client, 7 * (number % 3)) for number, client in enumerate(clients)]
            os.kill(guard.pid, signal.SIGKILL)
            guard.wait()
            for number, client in enumerate(clients):
                assert read[number] + receive(client, 40_000 - len(read[number])) == bytes([number]) * 40_000
                with contextlib.suppress(ConnectionResetError):
                    assert client.recv(1) == b""
