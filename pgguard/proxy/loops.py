"""Whether the guard stands in front of itself: for each connection that it accepts it would make one to itself.

Addresses don't tell. ``0``, ``0.0.0.0``, ``::ffff:127.0.0.1`` and any name of this host may lead to the guard, and so
may another guard, or whatever else passes connections on, on this host or elsewhere. So it is tried. A mark is sent to
where the server is supposed to be, and if it arrives at the guard, it has come round, over however many stations.

The mark is a CancelRequest, which guards and proxies pass on as it is, before any login, with a random key and the pid
of no process. PostgreSQL ignores it: "Canceling Requests in Progress" in the protocol chapter. It leaves one line in
the server's log: ``PID 2147483647 in cancel request did not match any process``.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import trio

from pgguard.attribution.sockets import peer_pid
from pgguard.proxy.addresses import TcpAddress
from pgguard.proxy.errors import LeadsBackError, SilentServerError, UnfitServerError
from pgguard.proxy.remedies import hints
from pgguard.proxy.upstream import UpstreamUnavailable, dial_to, post, reason
from pgguard.wire.startup import CancelKey

if TYPE_CHECKING:
    from pgguard.proxy.addresses import Address
    from pgguard.proxy.settings import Front
    from pgguard.proxy.sockets import Stream

_NOBODY: Final = 2**31 - 1
"""A pid that no process has: Linux's go up to 2**22, ``PID_MAX_LIMIT`` in ``linux/threads.h``."""
_SECONDS: Final = 3.0
"""For a mark to come round. Without a loop it takes as long as the server takes to ignore it: some milliseconds."""
_CONNECTING: Final = 0.8
"""The share of it in which a server has to accept a connection."""
_AGAIN: Final = 1.0
"""Seconds after which it is tried again whether a loop is still there, when a client comes."""
_SUSPICIONS: Final = 10.0
"""Seconds between two marks for which a slow server is the only reason."""

logger = logging.getLogger(__name__)


class LoopWatch:
    """Finds out whether connections to the server come back.

    Args:
        front: where the server is supposed to be.
    """

    def __init__(self, front: Front) -> None:
        self._upstream = front.upstream
        self._name = front.name
        self._setting = front.setting
        self._server = "PostgreSQL" if front.name is None else f"PostgreSQL ({front.name})"
        self._mark = b""
        self._sent_from: set[str] = set()
        self._looking = trio.Lock()
        self._looked = self._suspected = -math.inf
        self._back = trio.Event()
        self.found: str | None = None
        """How a mark came back, as a clause about the server's address; ``None``: none has."""
        self.unreachable: dict[Address, Exception] = {}
        """The addresses that could not be connected to when it was looked last, and why."""
        self.encryption: dict[Address, str] = {}
        """How the others are connected to, where there may be TLS: a few words for people."""

    def recognizes(self, packet: bytes) -> bool:
        """Whether a packet is the mark that was sent last."""
        return packet == self._mark

    def is_from_here(self, sock: Stream) -> bool:
        """Whether a client that has brought the mark is the guard itself. Raises OSError if it is gone."""
        name = sock.getpeername()
        return _name(name) in self._sent_from if isinstance(name, tuple) else peer_pid(sock) == os.getpid()

    def came_back(self, how: str) -> None:
        """The mark has arrived."""
        self.found = how
        self._back.set()

    async def find(self) -> str | None:
        """Find out whether connections to the server come back to the guard, which has to be serving.

        Returns what is wrong, for people, or ``None``. Takes as long as the server takes to ignore a CancelRequest.
        """
        found = await self.seek()
        return None if found is None else f"{self._setting} {self._upstream}: {found}: name PostgreSQL's own address"

    def what_is_unreachable(self) -> str | None:
        """What to say of addresses that could not be connected to when it was last looked for a loop."""
        failures = self.unreachable
        if not failures:
            return None
        where = ", ".join(f"{address} ({reason(error)})" for address, error in failures.items())
        if len(failures) < len(self._upstream.addresses):
            return f"{self._server} can't be reached at {where}, so only its other addresses are used"
        may_last = self._upstream.connect_timeout is None
        if may_last and all(isinstance(error, SilentServerError) for error in failures.values()):
            return (
                f"{self._server} says nothing at {where}, so clients wait until it does: check that it isn't stopped, "
                f"and that {self._setting} is right"
            )
        unfit = [error for error in failures.values() if isinstance(error, UnfitServerError)]
        remedies = (hint for error in unfit for hint in hints(error, through=self._name, unix=False, ipv4=False))
        advice = (
            " ".join(dict.fromkeys(remedies)).removesuffix(".")
            or f"check that it is running there, and that {self._setting} is right"
        )
        return f"{self._server} can't be reached at {where}, so clients get an error: {advice}"

    def how_it_is_encrypted(self) -> str | None:
        """What is to be said of TLS to the server, as far as that is known: a few words for people."""
        if len(set(self.encryption.values())) > 1:
            return "; ".join(f"{address} {said}" for address, said in self.encryption.items())
        return next(iter(self.encryption.values()), None)

    async def refuse(self) -> None:
        """Let nobody through who would come back.

        Raises:
            UpstreamUnavailable: a mark has come back, and still does.
        """
        if self.found is not None and (found := await self.seek_again()) is not None:
            raise UpstreamUnavailable([(self._upstream, LeadsBackError(found))])

    async def seek(self) -> str | None:
        """Find out; returns :attr:`found`. A server that can't be reached, or doesn't answer, leads nowhere."""
        async with self._looking:
            self._mark = CancelKey(_NOBODY, secrets.token_bytes(4)).packet
            self._sent_from.clear()
            self.unreachable.clear()
            self.encryption.clear()
            self._back = trio.Event()
            with trio.move_on_after(_SECONDS):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._send_to_all, nursery.cancel_scope)
                    await self._back.wait()
                    nursery.cancel_scope.cancel()
            self._looked = trio.current_time()
            if not self._back.is_set():
                self.found = None
        return self.found

    async def seek_again(self) -> str | None:
        """As :meth:`seek`, but not more often than every second."""
        if trio.current_time() - self._looked < _AGAIN or self._looking.locked():
            return self.found
        return await self.seek()

    async def suspect(self) -> None:
        """Look for a loop as the server doesn't answer, if it is worth another line in its log; say so if there is."""
        if self._looking.locked() or trio.current_time() - self._suspected < _SUSPICIONS:
            return
        self._suspected = trio.current_time()
        found = await self.seek()
        if found is not None:
            logger.error("clients are refused until this is corrected: %s %s: %s", self._setting, self._upstream, found)

    async def _send_to_all(self, done: trio.CancelScope) -> None:
        async with trio.open_nursery() as nursery:
            for address in self._upstream.addresses:
                nursery.start_soon(self._send, address)
        done.cancel()

    async def _send(self, address: Address) -> None:
        """Send the mark and wait until whoever has got it is done with it."""
        seconds = min(_SECONDS * _CONNECTING, self._upstream.seconds_to_connect)
        try:
            dial = await dial_to(address, replace(self._upstream, connect_timeout=seconds))
        except (OSError, UnicodeError) as error:
            self.unreachable[address] = error
            return
        if (encryption := dial.encryption) is not None:
            self.encryption[address] = encryption
        if isinstance(address, TcpAddress):
            self._sent_from.add(_name(dial.sock.getsockname()))
        with suppress(OSError, trio.BrokenResourceError):
            await post(dial, self._mark)


def _name(address: tuple[str, int]) -> str:
    """An IPv4 address is the same one in IPv6's clothes."""
    host, port = address[:2]
    return str(TcpAddress(host.removeprefix("::ffff:"), port))
