"""Connections to PostgreSQL."""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import trio

from pgguard.faults.text import printable, shorten
from pgguard.proxy.addresses import Address, TcpAddress, UnixAddress, Upstream
from pgguard.proxy.dialling import BACKLOG_PAUSE, Dial, Progress, family_of, is_direct
from pgguard.proxy.losses import Loss, spared
from pgguard.proxy.remedies import hints, is_want
from pgguard.wire.fields import parse_fields, parse_severity
from pgguard.wire.messages import HEADER_SIZE
from pgguard.wire.startup import DECLINED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pgguard.wire.startup import CancelKey

_CANCEL_TIMEOUT: Final = 10.0
"""Seconds for the server to take a CancelRequest and close its connection."""
_REFUSAL_TIMEOUT: Final = 10.0
"""Seconds for the server to refuse a client."""
_REFUSAL_LIMIT: Final = 16 * 1024
"""Bytes in which it does."""
_REASON_LENGTH: Final = 200
"""Characters of a server's own words that are passed on, at most."""
_ERROR_RESPONSE: Final = b"E"
_CANNOT_CONNECT_NOW: Final = "57P03"
_NOT_NOW_SECONDS: Final = 1.0
"""For a server to say so, where there is another one to go on to."""
_ENCRYPTS: Final = (b"S", b"G")
"""The answer to a request for encryption that there is some: SSLRequest and GSSENCRequest in "Message Flow"."""


class UpstreamUnavailable(OSError):
    """No address of the upstream could be connected to; the message says why, for each of them.

    Args:
        failures: what was tried, with what went wrong.
    """

    def __init__(self, failures: Sequence[tuple[Address | Upstream, BaseException]]) -> None:
        self.failures = failures
        told = "no address of it can be connected to"
        with spared(Loss.WORDS):
            told = printable("; ".join(f"{address}: {reason(error)}" for address, error in failures))
        super().__init__(told)
        self.exhausted = any(is_want(error, ipv4=_is_ipv4(address)) for address, error in failures)
        """One of them failed because this host had run out of something: descriptors, memory, local ports."""

    @property
    def hint(self) -> str:
        """What may be the matter, and what to change: sentences."""
        found = [
            hint
            for address, error in self.failures
            for hint in hints(error, unix=isinstance(address, UnixAddress), ipv4=_is_ipv4(address))
        ]
        return " ".join(dict.fromkeys(found))


def barred(upstream: Upstream) -> list[UnixAddress]:
    """The server's Unix sockets that the calling thread has no right to connect to, by their modes: unix(7).

    One that isn't there, or not yet, isn't among them.
    """
    return [address for address in upstream.addresses if isinstance(address, UnixAddress) and _is_barred(address.path)]


def _is_barred(path: str) -> bool:
    if path.startswith("\0"):
        return False
    try:
        status = os.stat(path)  # noqa: PTH116 - beside the modes of stat
    except PermissionError:
        return True  # a directory on the way lets nobody through
    except OSError:
        return False
    if status.st_uid == os.geteuid():
        return not status.st_mode & stat.S_IWUSR
    if status.st_gid in {os.getegid(), *os.getgroups()}:
        return not status.st_mode & stat.S_IWGRP
    return not status.st_mode & stat.S_IWOTH


async def connect_upstream(upstream: Upstream) -> tuple[trio.socket.SocketType, Address]:
    """Connect to the first address that accepts, in the order in which they are given.

    Raises:
        UpstreamUnavailable: none does.
    """
    failures: list[tuple[Address, BaseException]] = []
    for address in upstream.addresses:
        try:
            return await connect_to(address, upstream.connect_timeout), address
        except (OSError, UnicodeError) as error:  # UnicodeError: no name that the DNS could know
            failures.append((address, error))
    raise UpstreamUnavailable(failures)


async def introduce(upstream: Upstream, startup: bytes) -> tuple[trio.socket.SocketType, Address, bytes]:
    """Connect a client to the first address that accepts, and that doesn't turn everybody away just now.

    A server that is starting, stopping or recovering says so at once (57P03). Where several hosts are given libpq goes
    on to the next one then, since version 14: ``PQconnectPoll()`` in ``fe-connect.c``.

    Args:
        upstream: the server.
        startup: the client's StartupMessage.

    Returns:
        The connection, of whose answer nothing has been read; where it leads; and what of ``startup`` is still to be
        sent.

    Raises:
        UpstreamUnavailable: no address can be connected to.
    """
    *others, last = upstream.addresses
    failures: list[tuple[Address, BaseException]] = []
    for address in others:
        try:
            sock = await connect_to(address, upstream.connect_timeout)
            try:
                rest, refusal = await _start(sock, startup)
            except BaseException:
                sock.close()
                raise
            if refusal is None:
                return sock, address, rest
            sock.close()
            failures.append((address, ConnectionRefusedError(refusal)))
        except (OSError, UnicodeError) as error:
            failures.append((address, error))
    try:
        sock, address = await connect_upstream(replace(upstream, addresses=(last,)))
    except UpstreamUnavailable as error:
        raise UpstreamUnavailable([*failures, *error.failures]) from None
    return sock, address, startup


async def _start(sock: trio.socket.SocketType, startup: bytes) -> tuple[bytes, str | None]:
    """Begin a session; returns what is still to be sent, and in whose words the server turns everybody away if it does.

    It is waited for the answer for a moment, and left unread.
    """
    with trio.move_on_after(_NOT_NOW_SECONDS):
        startup = startup[await sock.send(startup) :]
        with suppress(OSError):  # whoever reads it next is told again that it has ended
            answer = await sock.recv(_REFUSAL_LIMIT, socket.MSG_PEEK)
            if answer[:1] == _ERROR_RESPONSE and parse_severity(answer[HEADER_SIZE:]).sqlstate == _CANNOT_CONNECT_NOW:
                return startup, parse_fields(answer[HEADER_SIZE:]).get("M", _CANNOT_CONNECT_NOW)
    return startup, None


async def connect_to(address: Address, seconds: float) -> trio.socket.SocketType:
    """Connect to one address.

    Raises:
        OSError: it can't be connected to, or not within so many seconds (TimeoutError).
        UnicodeError: it is no name that the DNS could know.
    """
    with trio.move_on_after(seconds):
        if isinstance(address, TcpAddress) and not is_direct(address):
            return await _connect_by_name(address)
        return await _connect_directly(address)
    raise TimeoutError(f"no answer within {seconds:g} s")


async def _connect_by_name(address: TcpAddress) -> trio.socket.SocketType:
    sock = (await trio.open_tcp_stream(address.host, address.port)).socket
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # as of what is dialled
    return sock


async def _connect_directly(address: Address) -> trio.socket.SocketType:
    """Connect without a task, which trio takes for each of the addresses that a name may have. Raises OSError."""
    dial = Dial(address)
    try:
        while (progress := dial.step()) is not Progress.MADE:
            if progress is Progress.UNDER_WAY:
                await trio.lowlevel.wait_writable(dial.sock)
            else:
                await trio.sleep(BACKLOG_PAUSE)
        return trio.socket.from_stdlib_socket(dial.sock)
    except BaseException:
        dial.close()
        raise


def reason(error: BaseException) -> str:
    """Why a connection could not be made, in the system's words, or the server's: one line."""
    if isinstance(error, socket.gaierror):
        return error.strerror or str(error)
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    if isinstance(error.__cause__, BaseExceptionGroup):  # trio's, of all that a name resolves to
        return ", ".join(dict.fromkeys(reason(cause) for cause in error.__cause__.exceptions))
    told = type(error).__name__
    with spared(Loss.WORDS):
        told = shorten(printable(str(error)), _REASON_LENGTH)
    return told  # noqa: RET504 - its name, if that fails


def _is_ipv4(address: Address | Upstream) -> bool:
    """Whether it certainly is one: a name may stand for addresses of several kinds."""
    return isinstance(address, TcpAddress) and family_of(address.host) == socket.AF_INET


async def relay_cancel(upstream: Upstream, packet: bytes) -> None:
    """Pass a CancelRequest on untouched, and wait until the server has taken it.

    The server answers with nothing but the end of the connection, once it has signalled the backend: "Canceling
    Requests in Progress" in the protocol chapter. A key that it doesn't know it ignores, so the request goes to
    every address where several are given.

    Raises:
        UpstreamUnavailable: no address has taken it.
    """
    failures: list[tuple[Address, BaseException]] = []
    for address in upstream.addresses:
        try:
            sock = await connect_to(address, upstream.connect_timeout)
            with sock, trio.fail_after(_CANCEL_TIMEOUT):
                await trio.SocketStream(sock).send_all(packet)
                while await sock.recv(1024):
                    pass
        except trio.TooSlowError:
            failures.append((address, TimeoutError(f"the CancelRequest was not taken within {_CANCEL_TIMEOUT:g} s")))
        except ConnectionResetError:
            continue  # an end of the connection as well as any
        except (OSError, UnicodeError, trio.BrokenResourceError) as error:
            failures.append((address, error))
    if len(failures) == len(upstream.addresses):
        raise UpstreamUnavailable(failures)


async def ask(upstream: Upstream, before: Sequence[bytes], last: bytes) -> bytes | None:
    """Have the server say what it says to a client that it has declined encryption to, and that is to be refused.

    Args:
        upstream: the server.
        before: the requests for encryption that it declines.
        last: what it refuses the client for; a request for encryption that is declined first, or is one too many.

    Returns:
        All that it says to ``last``, until it ends the connection. ``None``: it would offer encryption, or does not
        behave like a server: it says something else before, or nothing in time, or resets the connection.

    Raises:
        UpstreamUnavailable: no address can be connected to.
    """
    sock, _ = await connect_upstream(upstream)
    stream = trio.SocketStream(sock)
    said = bytearray()
    async with stream:
        with trio.move_on_after(_REFUSAL_TIMEOUT), suppress(trio.BrokenResourceError):
            for request in before:
                await stream.send_all(request)
                if await stream.receive_some(1) != DECLINED:
                    return None
            await stream.send_all(last)
            while len(said) < _REFUSAL_LIMIT and (data := await stream.receive_some(_REFUSAL_LIMIT)):
                said += data
                if bytes(said[:1]) in _ENCRYPTS:
                    return None
            return bytes(said)
    return bytes(said) or None


async def cancel_query(address: Address, connect_timeout: float, key: CancelKey) -> None:
    """Cancel what runs on the backend with this key.

    Raises:
        UpstreamUnavailable: the server has not taken the request.
    """
    await relay_cancel(Upstream((address,), connect_timeout), key.packet)
