"""The protocol's messages, built and read by hand, so that no code of the guard's is trusted with them."""

from __future__ import annotations

import struct
from typing import NamedTuple

import trio

SECONDS = 30.0
"""How long anything that a test waits for may take."""


class Message(NamedTuple):
    type: str
    body: bytes

    @property
    def fields(self) -> dict[str, str]:
        """Of an ErrorResponse."""
        assert self.type == "E", self
        return {field[:1].decode(): field[1:].decode() for field in self.body.split(b"\0") if field}


def message(type: str, body: bytes = b"") -> bytes:  # noqa: A002
    return type.encode() + struct.pack("!I", len(body) + 4) + body


def startup(version: tuple[int, int] = (3, 0), **parameters: str) -> bytes:
    pairs = (parameters or {"user": "someone"}).items()
    body = b"".join(f"{name}\0{value}\0".encode() for name, value in pairs) + b"\0"
    return struct.pack("!IHH", len(body) + 8, *version) + body


SSL_REQUEST = struct.pack("!II", 8, 80877103)
GSSENC_REQUEST = struct.pack("!II", 8, 80877104)


def cancel_request(pid: int, secret: bytes) -> bytes:
    return struct.pack("!III", 12 + len(secret), 80877102, pid) + secret


def query(sql: str) -> bytes:
    return message("Q", sql.encode() + b"\0")


TERMINATE = message("X")

BACKEND_PID = 4711
SECRET = b"key!"
LOGGED_IN = message("R", bytes(4)) + message("K", struct.pack("!I", BACKEND_PID) + SECRET) + message("Z", b"I")

READY = message("Z", b"I")
FAILED = message("Z", b"E")
COLUMNS = message("T", struct.pack("!H", 1) + b"x\0" + struct.pack("!IHIhih", 0, 0, 25, -1, -1, 0))


def row(value: bytes) -> bytes:
    return message("D", struct.pack("!HI", 1, len(value)) + value)


ONE_ROW = row(b"1")
SELECTED = message("C", b"SELECT 1\0")
ANSWER = COLUMNS + ONE_ROW + SELECTED + READY


class Peer:
    """One end of a connection, in a test's hands."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._pending = bytearray()

    async def send(self, data: bytes) -> None:
        with trio.fail_after(SECONDS):
            await self.stream.send_all(data)

    async def receive(self, size: int) -> bytes:
        """Receive exactly so many bytes."""
        with trio.fail_after(SECONDS):
            while len(self._pending) < size:
                data = await self.stream.receive_some(262144)
                assert data, f"the connection ended after {bytes(self._pending)!r}"
                self._pending += data
        taken = bytes(self._pending[:size])
        del self._pending[:size]
        return taken

    async def expect(self, expected: bytes) -> None:
        assert await self.receive(len(expected)) == expected

    async def message(self) -> Message:
        head = await self.receive(5)
        (length,) = struct.unpack("!I", head[1:])
        return Message(chr(head[0]), await self.receive(length - 4))

    async def rest(self) -> bytes:
        """Everything until the end of the stream; a reset is an end, too."""
        with trio.fail_after(SECONDS):
            try:
                while data := await self.stream.receive_some(262144):
                    self._pending += data
            except trio.BrokenResourceError:
                pass
        taken = bytes(self._pending)
        self._pending.clear()
        return taken

    async def nothing(self, seconds: float = 0.05) -> None:
        """Nothing arrives for that long."""
        with trio.move_on_after(seconds):
            data = await self.stream.receive_some(262144)
            raise AssertionError(f"{data!r} has arrived")

    async def close(self) -> None:
        await self.stream.aclose()

    async def reset(self) -> None:
        """Close the connection with an RST."""
        stream = getattr(self.stream, "transport_stream", self.stream)  # what TLS is on top of
        stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, struct.pack("ii", 1, 0))
        await stream.aclose()


class Client(Peer):
    """A client that says exactly what the test says."""

    @classmethod
    async def connect(cls, port: int) -> Client:
        return cls(await trio.open_tcp_stream("127.0.0.1", port))

    @classmethod
    async def connect_unix(cls, path: str) -> Client:
        return cls(await trio.open_unix_socket(path))
