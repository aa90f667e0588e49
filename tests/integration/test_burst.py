"""Many more clients at once than the server's backlog holds: each has an answer, the server's own."""

from __future__ import annotations

import resource
import selectors
import socket
import struct
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import StartGuard
    from tests.servers import Address, Transport

CLIENTS = 300
"""More than the server's backlog holds, 200 to 240."""
_SECONDS = 100.0
_PARAMETERS = b"user\0postgres\0database\0postgres\0\0"
_STARTUP = struct.pack("!IHH", len(_PARAMETERS) + 8, 3, 0) + _PARAMETERS
_TERMINATE = b"X\0\0\0\4"


@dataclass
class Client:
    sock: socket.socket
    heard: bytes = b""
    connected: bool = False

    @property
    def answer(self) -> str | None:
        """Ready, or the SQLSTATE of a refusal; ``None``: neither yet."""
        if self.heard.endswith(b"Z\0\0\0\5I"):
            return "ready"
        if self.heard[:1] == b"E" and self.heard.endswith(b"\0\0"):
            return self.heard.split(b"\0C")[1][:5].decode()
        return None


@contextmanager
def many_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 2 * CLIENTS)), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def burst(address: Address, transport: Transport) -> Counter[str]:
    """Connect with all of them before any has an answer; returns how often there was which."""
    answers: Counter[str] = Counter()
    clients: list[Client] = []
    deadline = time.monotonic() + _SECONDS
    where = f"{address.host}/.s.PGSQL.{address.port}" if transport == "unix" else (address.host, address.port)
    with selectors.DefaultSelector() as selector:
        try:
            for _ in range(CLIENTS):
                client = Client(socket.socket(socket.AF_UNIX if transport == "unix" else socket.AF_INET))
                clients.append(client)
                client.sock.setblocking(False)
                try:
                    client.sock.connect(where)
                except BlockingIOError as error:
                    if transport == "unix":  # nothing has been begun: connect(2)
                        answers[str(error)] += 1
                        continue
                selector.register(client.sock, selectors.EVENT_WRITE, client)
            while selector.get_map() and time.monotonic() < deadline:
                for key, _ in selector.select(1):
                    go_on(key.data, selector, answers)
            answers["nothing"] += len(selector.get_map())
        finally:
            for client in clients:
                client.sock.close()
    return +answers


def go_on(client: Client, selector: selectors.BaseSelector, answers: Counter[str]) -> None:
    try:
        if not client.connected:
            client.connected = True
            client.sock.sendall(_STARTUP)
            selector.modify(client.sock, selectors.EVENT_READ, client)
            return
        data = client.sock.recv(65536)
    except OSError as error:
        answer: str | None = str(error)
    else:
        client.heard += data
        answer = client.answer if data else "end"
    if answer is not None:
        answers[answer] += 1
        selector.unregister(client.sock)
        if answer == "ready":
            client.sock.sendall(_TERMINATE)


def test_all_have_an_answer(start_guard: StartGuard, transport: Transport) -> None:
    guard = start_guard()
    before = guard.descriptors
    with many_descriptors():
        answers = burst(guard.at(transport), transport)
    assert answers["ready"] >= 90
    assert answers["ready"] + answers["53300"] == CLIENTS, answers
    deadline = time.monotonic() + _SECONDS
    while guard.descriptors > before:
        assert time.monotonic() < deadline, "descriptors are left open"
        time.sleep(0.05)
    guard.assert_no_faults(except_kinds={"connection-exhaustion"})
