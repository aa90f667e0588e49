"""A PostgreSQL that does what a test says, also what a real one never would."""

from __future__ import annotations

import struct

import trio

from tests.proxy.messages import LOGGED_IN, SECONDS, Peer


class BackendConnection(Peer):
    """The server's end of one upstream connection."""

    async def packet(self) -> bytes:
        """Receive a packet of the start-up phase."""
        head = await self.receive(4)
        (length,) = struct.unpack("!I", head)
        return head + await self.receive(length - 4)

    async def log_in(self, answer: bytes = LOGGED_IN) -> bytes:
        """Take a StartupMessage, and let its sender in."""
        packet = await self.packet()
        await self.send(answer)
        return packet


class FakeBackend:
    """A listening socket whose connections a test accepts when it likes.

    Args:
        receive_buffer: bytes that the kernel takes for a connection that isn't read; by default, as it pleases.
    """

    def __init__(self, *, receive_buffer: int | None = None) -> None:
        self._socket = trio.socket.socket()
        if receive_buffer is not None:
            self._socket.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_RCVBUF, receive_buffer)
        self.port = 0
        self._peers: list[Peer] = []

    async def listen(self) -> None:
        await self._socket.bind(("127.0.0.1", 0))
        self._socket.listen(128)
        self.port = self._socket.getsockname()[1]

    async def accept(self) -> BackendConnection:
        with trio.fail_after(SECONDS):
            sock, _ = await self._socket.accept()
        connection = BackendConnection(trio.SocketStream(sock))
        self.keep(connection)
        return connection

    def keep(self, peer: Peer) -> None:
        """Close this one, too, when the test is over."""
        self._peers.append(peer)

    async def accept_nobody(self, seconds: float = 0.05) -> None:
        """Nobody connects for that long."""
        with trio.move_on_after(seconds):
            await self._socket.accept()
            raise AssertionError("somebody has connected")

    def close(self) -> None:
        """Refuse connections from now on."""
        self._socket.close()

    async def close_all(self) -> None:
        self.close()
        for peer in self._peers:
            await peer.close()
