"""The live page's own server: Hypercorn, on trio, in front of :mod:`.app`.

Hypercorn speaks HTTP. What it leaves open is closed here: how many connections there may be, how long a client may take
to take what it is sent, and that none of them keeps the guard from ending. For Hypercorn sends whatever it sends to the
end, also if it is cancelled.
"""

from __future__ import annotations

import logging
import socket
import time
from functools import partial
from typing import TYPE_CHECKING, Final, cast

import anyio
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState

from pgguard.proxy.addresses import TcpAddress
from pgguard.proxy.listeners import open_tcp
from pgguard.proxy.losses import keep_going
from pgguard.proxy.turns import Turns
from pgguard.reporting.live.access import access_to, read_token
from pgguard.reporting.live.app import Site
from pgguard.reporting.live.feed import Feed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from hypercorn.typing import ASGIFramework

    from pgguard.reporting.live.access import Access
    from pgguard.reporting.live.api import Watched

CONNECTIONS: Final = 48
"""Connections at the same time, at most; who comes then waits for its turn."""
_QUIET: Final = 60.0
"""Seconds after which a connection is broken off over which nothing goes, whatever its client may wait for: HTTP/2 and
WebSockets, which Hypercorn speaks too, have no such limit. Whoever follows is sent something more often."""
_BACKLOG: Final = 64
_PAUSE: Final = 0.5
"""Seconds to wait when nobody can be accepted."""
_PIECE: Final = 64 * 1024
_TAKING: Final = 10.0
"""Bytes that are sent at once, and seconds for a client to make room for them."""
_SILENCE: Final = 5.0
"""Seconds for a client to say what it wants, and for which it is kept when it has been answered."""
_TICK: Final = 1.0
"""Seconds between two sets of numbers for those who follow."""

logger = logging.getLogger(__name__)


class _Stream(trio.abc.HalfCloseableStream):
    """A client's connection, as Hypercorn takes it.

    Args:
        stream: It.
        turns: Let one client be heard in each round of trio's loop, and the relay have its turn in between.
    """

    def __init__(self, stream: trio.SocketStream, turns: Turns) -> None:
        self._stream = stream
        self._turns = turns
        self.socket = stream.socket
        self._active = trio.current_time()
        """When something was last sent or received."""

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send, or break the connection off if the client doesn't take it."""
        whole = memoryview(data)
        for begin in range(0, len(whole), _PIECE):
            with trio.move_on_after(_TAKING) as scope:
                await self._stream.send_all(whole[begin : begin + _PIECE])
            if scope.cancelled_caught:
                self.break_off()
                raise trio.BrokenResourceError
            self._active = trio.current_time()

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """Receive, or break the connection off if nothing goes over it in either direction."""
        while (ends := self._active + _QUIET) > trio.current_time():
            with trio.move_on_at(ends):
                received = await self._stream.receive_some(max_bytes)
                self._active = trio.current_time()
                await self._turns.come()
                return received
        self.break_off()
        raise trio.BrokenResourceError

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()

    def break_off(self) -> None:
        """Close it at once: whoever sends or receives gets an error."""
        self.socket.close()


class Admin:
    """The live page, the API and the metrics of one guard, which is a sink of its, too: :attr:`feed`.

    Args:
        address: Where they are.
        token_file: What holds the token, if one is needed.

    Raises:
        ConfigurationError: It holds none.
    """

    def __init__(self, address: TcpAddress, token_file: Path | None) -> None:
        self._address = address
        self._token = None if token_file is None else read_token(token_file)
        self.feed = Feed("the guard that runs")
        self.addresses: list[TcpAddress] = []
        """Where it is, with the ports that the system has chosen."""
        self._sockets: list[socket.socket] = []
        self._access: Access
        self._turns = Turns()
        self._streams: set[_Stream] = set()
        self._has_left = trio.Event()
        """One of them is gone; it is another event each time."""
        self._started_at = time.time()

    @property
    def descriptors(self) -> int:
        """How many it may take beyond those that it listens on."""
        return CONNECTIONS

    async def listen(self) -> None:
        """Open the sockets. No thread is started.

        Raises:
            ConfigurationError: That can't be, or everybody could see everything.
        """
        try:
            for sock in await open_tcp(self._address, "--admin", backlog=_BACKLOG):
                self._sockets.append(sock)
                self.addresses.append(TcpAddress(*sock.getsockname()[:2]))
            self._access = access_to(self.addresses, self._token)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the sockets; nothing happens the second time."""
        for sock in self._sockets:
            sock.close()
        self._sockets.clear()

    async def serve(self, guard: Watched) -> None:
        """Answer, until cancelled; then every connection is broken off."""
        site = Site(guard, self.feed, self._access, self._access.hosts(self.addresses), started_at=self._started_at)
        answer = partial(TCPServer, ASGIWrapper(cast("ASGIFramework", site.app)), _config(), WorkerContext(None))
        async with anyio.create_task_group():
            pass  # so that what answers need is loaded by now
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._break_off_at_the_end)
            nursery.start_soon(keep_going, self._tick, site)
            for sock in self._sockets:
                listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
                nursery.start_soon(keep_going, self._accept, listener, answer, nursery)

    async def _break_off_at_the_end(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            self.feed.close()
            for stream in self._streams:
                stream.break_off()

    async def _accept(
        self, listener: trio.SocketListener, answer: Callable[..., Awaitable[None]], nursery: trio.Nursery
    ) -> None:
        while True:
            while len(self._streams) >= CONNECTIONS:
                await self._has_left.wait()
            try:
                stream = _Stream(await listener.accept(), self._turns)
            except OSError as error:
                logger.warning("--admin: can't accept connections: %s", error.strerror)
                await trio.sleep(_PAUSE)
                continue
            self._streams.add(stream)
            nursery.start_soon(self._handle, stream, answer)

    async def _handle(self, stream: _Stream, answer: Callable[..., Awaitable[None]]) -> None:
        try:
            await answer(ConnectionState({}), stream)
        except Exception as error:
            logger.info("--admin: a connection has failed: %r", error)
        finally:
            stream.break_off()
            self._streams.discard(stream)
            self._has_left.set()
            self._has_left = trio.Event()

    async def _tick(self, site: Site) -> None:
        """Tell those who follow how the guard is doing."""
        while True:
            await self.feed.has_followers.wait()
            self.feed.tell_figures(await site.figures())
            await trio.sleep(_TICK)


def _config() -> Config:
    config = Config()
    config.accesslog = None
    config.errorlog = logger
    config.include_server_header = False
    config.keep_alive_timeout = _SILENCE
    return config
