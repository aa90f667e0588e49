"""A PostgreSQL that does what a test says, also what a real one never would."""

from __future__ import annotations

import socket
import struct
from contextlib import suppress

import trio

from tests.proxy.messages import ANSWER, LOGGED_IN, SECONDS, TERMINATE, Client, Peer, query, startup

MARK = bytes.fromhex("00000010 04d2162e 7fffffff")
"""What a guard's mark begins with: a CancelRequest for a process that there can't be."""


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
        self.encrypts = False
        """It has TLS, and so have the clients of a guard in front of it."""
        self._peers: list[Peer] = []

    @property
    def settings(self) -> dict[str, str]:
        """Of a guard in front of it."""
        return {"upstream": f"host=127.0.0.1 port={self.port} sslmode=disable connect_timeout=5"}

    async def listen(self) -> None:
        await self._socket.bind(("127.0.0.1", 0))
        self._socket.listen(128)
        self.port = self._socket.getsockname()[1]

    async def accept(self) -> BackendConnection:
        with trio.fail_after(SECONDS):
            sock, _ = await self._socket.accept()
            while await self._is_mark(sock):
                sock.close()
                sock, _ = await self._socket.accept()
        connection = BackendConnection(trio.SocketStream(sock))
        self.keep(connection)
        return connection

    async def connect(self, port: int) -> Client:
        """A client of a guard's, which is closed when the test is over."""
        client = await Client.connect(port)
        self.keep(client)
        return client

    async def let_in(self, client: Client) -> BackendConnection:
        """Have a client log in; returns the server's end of its session."""
        await client.send(startup())
        server = await self.accept()
        await server.log_in()
        await client.expect(LOGGED_IN)
        return server

    async def session(self, port: int) -> tuple[Client, BackendConnection]:
        """A session of a guard's that has logged in."""
        client = await self.connect(port)
        return client, await self.let_in(client)

    def keep(self, peer: Peer) -> None:
        """Close this one, too, when the test is over."""
        self._peers.append(peer)

    async def close_mark(self) -> None:
        """Ignore a mark, as a server does."""
        with trio.fail_after(SECONDS):
            sock, _ = await self._socket.accept()
            assert await self._is_mark(sock)
        sock.close()

    @staticmethod
    async def _is_mark(sock: trio.socket.SocketType) -> bool:
        """Whether it is from a guard that has just been started, and sees whether it is in front of itself."""
        await trio.lowlevel.wait_readable(sock)
        with suppress(OSError):
            return await sock.recv(len(MARK), socket.MSG_PEEK) == MARK
        return False

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


async def converse(client: Client, server: BackendConnection) -> None:
    """A query and its answer."""
    await client.send(query("select 1"))
    await server.expect(query("select 1"))
    await server.send(ANSWER)
    await client.expect(ANSWER)


async def part(client: Client, server: BackendConnection) -> None:
    """End a session as clients do."""
    await client.send(TERMINATE)
    await client.close()
    await server.expect(TERMINATE)
    await server.close()
