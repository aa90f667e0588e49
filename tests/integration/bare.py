"""A client that is nothing but a socket: what a server says last, it gets to the byte."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Literal, NamedTuple

from tests.proxy.messages import READY, query, startup

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.servers import Address

SECONDS = 30.0
"""How long anything that has to come may take."""
USER = "postgres"

End = Literal["fin", "reset", "none"]


class Words(NamedTuple):
    """An ErrorResponse or a NoticeResponse."""

    type: str
    severity: str
    sqlstate: str
    text: str


def connect(address: Address) -> socket.socket:
    """Connect, and say nothing yet."""
    if address.host.startswith("/"):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(SECONDS)
        try:
            sock.connect(f"{address.host}/.s.PGSQL.{address.port}")
        except OSError:
            sock.close()
            raise
        return sock
    return socket.create_connection((address.host, address.port), timeout=SECONDS)


class Bare:
    """A connection that has sent its StartupMessage.

    Args:
        address: where it connects to.
        parameters: of the StartupMessage, beside user and database.
    """

    def __init__(self, address: Address, **parameters: str) -> None:
        self.socket = connect(address)
        self.socket.sendall(startup((3, 0), **{"user": USER, "database": USER} | parameters))
        self._received = bytearray()

    @classmethod
    def logged_in(cls, address: Address, **parameters: str) -> Bare:
        """One that has been let in."""
        client = cls(address, **parameters)
        client.until(READY)
        return client

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def ask(self, sql: str, end: bytes = READY) -> bytes:
        """Send a simple query, and wait until what comes ends like that."""
        self.send(query(sql))
        return self.until(end)

    def until(self, end: bytes) -> bytes:
        """Everything that comes until it ends like that."""
        while not self._received.endswith(end):
            data = self.socket.recv(65536)
            assert data, f"the connection ended after {bytes(self._received)!r}"
            self._received += data
        taken = bytes(self._received)
        self._received.clear()
        return taken

    def receive(self, size: int) -> bytes:
        """So many bytes."""
        while len(self._received) < size:
            data = self.socket.recv(size - len(self._received))
            assert data, f"the connection ended after {bytes(self._received)!r}"
            self._received += data
        taken = bytes(self._received)
        self._received.clear()
        return taken

    def rest(self) -> bytes:
        """Everything until the end of the connection."""
        return self.outcome()[0]

    def outcome(self, quiet: float = SECONDS) -> tuple[bytes, End]:
        """Everything until the end of the connection, or until nothing comes for so many seconds, and which it was."""
        self.socket.settimeout(quiet)
        try:
            while data := self.socket.recv(65536):
                self._received += data
        except ConnectionResetError:
            return bytes(self._received), "reset"
        except TimeoutError:
            return bytes(self._received), "none"
        return bytes(self._received), "fin"

    def close(self) -> None:
        self.socket.close()


def messages(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Take apart what a server has sent, from the beginning of a message on; the last may be torn."""
    at = 0
    while at + 5 <= len(data):
        size = 1 + int.from_bytes(data[at + 1 : at + 5], "big")
        yield chr(data[at]), data[at + 5 : at + size]
        at += size


def words(data: bytes) -> list[Words]:
    """The errors and notices in what a server has sent."""
    found = []
    for kind, body in messages(data):
        if kind in "EN":
            fields = {part[:1]: part[1:].decode(errors="replace") for part in body.split(b"\0") if part}
            found.append(Words(kind, fields.get(b"V", ""), fields.get(b"C", ""), fields.get(b"M", "")))
    return found
