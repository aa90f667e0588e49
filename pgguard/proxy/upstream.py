"""Connections to PostgreSQL."""

from __future__ import annotations

import math
import os
import socket
import stat
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from pgguard.faults.text import printable, shorten
from pgguard.proxy.addresses import Address, TcpAddress, UnixAddress, Upstream
from pgguard.proxy.dialling import BACKLOG_PAUSE, CANNOT_CONNECT_NOW, Dial, Progress, family_of, is_direct
from pgguard.proxy.errors import SilentServerError, UnfitServerError
from pgguard.proxy.losses import Loss, spared
from pgguard.proxy.remedies import hints, is_want
from pgguard.proxy.sockets import Stream
from pgguard.wire.fields import parse_fields, parse_severity
from pgguard.wire.messages import HEADER_SIZE
from pgguard.wire.startup import DECLINED

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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

    def hint(self, through: str | None) -> str:
        """What may be the matter, and what to change: sentences.

        Args:
            through: the name of the database; ``None``: there is only one.
        """
        found = [
            hint
            for address, error in self.failures
            for hint in hints(error, through=through, unix=isinstance(address, UnixAddress), ipv4=_is_ipv4(address))
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
    """Connect to the first address that accepts, in the order in which they are given; without TLS.

    Raises:
        UpstreamUnavailable: none does.
    """
    dial, address = await _dial_first(upstream, is_plain=True)
    return _for_trio(dial.sock), address


def _for_trio(sock: Stream) -> trio.socket.SocketType:
    return trio.socket.from_stdlib_socket(socket.socket(fileno=sock.detach()))


async def introduce(upstream: Upstream, startup: bytes) -> tuple[Dial, Address]:
    """Connect a client to the first address that accepts, and that doesn't turn everybody away just now.

    A server that is starting, stopping or recovering says so at once (57P03). Where several hosts are given libpq goes
    on to the next one then, since version 14: ``PQconnectPoll()`` in ``fe-connect.c``.

    Args:
        upstream: the server.
        startup: the client's StartupMessage.

    Returns:
        The connection, with what has been read of the first answer; and where it leads.

    Raises:
        UpstreamUnavailable: no address can be connected to.
    """
    return await _dial_first(upstream, startup)


async def _dial_first(upstream: Upstream, startup: bytes = b"", *, is_plain: bool = False) -> tuple[Dial, Address]:
    *others, last = upstream.addresses
    failures: list[tuple[Address, BaseException]] = []
    for address in upstream.addresses:
        try:
            dial = await dial_to(address, upstream, startup, listens=bool(others), is_plain=is_plain)
        except (OSError, UnicodeError) as error:  # UnicodeError: no name that the DNS could know
            failures.append((address, error))
            continue
        refusal = _refusal(dial.answer) if address is not last else None
        if refusal is None:
            return dial, address
        dial.close()
        failures.append((address, ConnectionRefusedError(refusal)))
    raise UpstreamUnavailable(failures)


def _refusal(answer: bytes) -> str | None:
    """In whose words a server turns everybody away just now, if it does."""
    if answer[:1] != _ERROR_RESPONSE or parse_severity(answer[HEADER_SIZE:]).sqlstate != CANNOT_CONNECT_NOW:
        return None
    return parse_fields(answer[HEADER_SIZE:]).get("M", CANNOT_CONNECT_NOW)


async def dial_to(
    address: Address,
    upstream: Upstream,
    startup: bytes = b"",
    *,
    listens: bool = False,
    is_plain: bool = False,
) -> Dial:
    """Connect to one address.

    What has accepted the connection may take as long as it likes if the upstream has no ``connect_timeout``.

    Args:
        address: where to.
        upstream: how.
        startup: the client's StartupMessage, if it is for a client.
        listens: there is another address to go on to: its answer is waited for, for a moment.
        is_plain: without TLS, whatever the upstream says.

    Raises:
        OSError: it can't be connected to, or not in time (TimeoutError), or says nothing in time (SilentServerError),
            or isn't used (UnfitServerError).
        UnicodeError: it is no name that the DNS could know.
    """
    dial: Dial | None = None
    is_made = False
    seconds = upstream.seconds_to_connect
    try:
        with trio.move_on_after(seconds) as limit:
            make = partial(Dial, address, upstream, startup, listens=listens, is_plain=is_plain)
            if isinstance(address, TcpAddress) and not is_direct(address):
                dial = await _dial_by_name(address, make)
            else:
                dial = make()
            await _go_on(dial, upstream, limit, _NOT_NOW_SECONDS if listens else seconds)
            is_made = True
        is_made = is_made or (dial is not None and dial.make_do())
    finally:
        if dial is not None and not is_made:
            dial.close()
    if dial is None or not is_made:
        raise too_late(upstream, dial)
    return dial


def too_late(upstream: Upstream, dial: Dial | None) -> TimeoutError:
    """Why a connection is given up that hasn't been made in time."""
    error = SilentServerError if dial is not None and dial.is_accepted else TimeoutError
    return error(f"no answer within {upstream.seconds_to_connect:g} s")


async def _dial_by_name(address: TcpAddress, make: Callable[..., Dial]) -> Dial:
    stream = await trio.open_tcp_stream(address.host, address.port)
    sock = Stream(socket.socket(fileno=stream.socket.detach()))
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # as of what is dialled
        return make(sock=sock)
    except BaseException:
        sock.close()
        raise


async def _go_on(dial: Dial, upstream: Upstream, limit: trio.CancelScope, patience: float) -> None:
    """Go on with a connection without a task, which trio takes for each of the addresses that a name may have.

    Args:
        dial: the connection.
        upstream: how long it may take.
        limit: ends it when it has taken so long.
        patience: seconds to wait for the first answer. Without it the connection is made as well.

    Raises:
        OSError: it can't be made.
    """
    may_last = upstream.connect_timeout is None
    while (progress := dial.step()) is not Progress.MADE:
        if may_last and dial.is_accepted:
            limit.deadline = math.inf
        if progress is Progress.UNDER_WAY:
            await trio.lowlevel.wait_writable(dial.sock.fileno())
        elif progress is Progress.WAITING:
            with trio.move_on_after(patience) as moment:
                await trio.lowlevel.wait_readable(dial.sock.fileno())
            if moment.cancelled_caught and dial.make_do():
                return
        elif progress is Progress.ANEW:
            dial.renew()
            if may_last:
                limit.deadline = trio.current_time() + upstream.seconds_to_connect
        else:
            await trio.sleep(BACKLOG_PAUSE)


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
        told = printable(str(error))
        told = told if isinstance(error, UnfitServerError) else shorten(told, _REASON_LENGTH)
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
            with trio.fail_after(upstream.seconds_to_connect + _CANCEL_TIMEOUT):
                await post(await dial_to(address, upstream), packet)
        except trio.TooSlowError:
            failures.append((address, TimeoutError(f"the CancelRequest was not taken within {_CANCEL_TIMEOUT:g} s")))
        except (OSError, UnicodeError, trio.BrokenResourceError) as error:
            failures.append((address, error))
    if len(failures) == len(upstream.addresses):
        raise UpstreamUnavailable(failures)


async def post(dial: Dial, packet: bytes) -> None:
    """Send a packet that is answered with nothing but the end of the connection, and wait for that.

    Args:
        dial: a connection that has been made; it is closed.
        packet: that.

    Raises:
        trio.BrokenResourceError: it couldn't be sent.
    """
    with _for_trio(dial.sock) as sock:
        await trio.SocketStream(sock).send_all(packet if dial.tls is None else dial.tls.seal(packet))
        with suppress(ConnectionResetError):  # an end of the connection as well as any
            while await sock.recv(1024):
                pass


async def ask(upstream: Upstream, before: Sequence[bytes], last: bytes) -> bytes | None:
    """Have the server say what it says to a client that it has declined encryption to, and that is to be refused.

    Args:
        upstream: the server.
        before: the requests for encryption that it declines.
        last: what it refuses the client for; a request for encryption that is declined first, or is one too many.

    Returns:
        All that it says to ``last``, until it ends the connection. ``None``: it would offer encryption, or is not to be
        sent anything without, or does not behave like a server: it says something else before, or nothing in time, or
        resets the connection.

    Raises:
        UpstreamUnavailable: no address can be connected to.
    """
    if upstream.tls is not None and not upstream.tls.settings.may_be_plain:
        return None
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


async def ask_by_tls(upstream: Upstream, request: bytes) -> bytes | None:
    """Have the server say what it says to a client that has TLS and asks for encryption again.

    Args:
        upstream: the server.
        request: for encryption; a server that has no TLS declines it once.

    Returns:
        All that it says, until it ends the connection. ``None``: it doesn't refuse it, or says nothing in time.

    Raises:
        UpstreamUnavailable: no address can be connected to.
    """
    said = bytearray()
    if upstream.tls is None:
        return await ask(upstream, (request,), request)
    with trio.move_on_after(_REFUSAL_TIMEOUT):
        dial, _ = await _dial_first(upstream)
        tls = dial.tls
        if tls is None:
            dial.sock.close()
            return await ask(upstream, (request,), request)
        with _for_trio(dial.sock) as sock, suppress(OSError, trio.BrokenResourceError):
            await trio.SocketStream(sock).send_all(tls.seal(request))
            while len(said) < _REFUSAL_LIMIT and not tls.is_over and (raw := await sock.recv(_REFUSAL_LIMIT)):
                said += tls.open(raw)
    return bytes(said) if said[:1] == _ERROR_RESPONSE else None


async def cancel_query(upstream: Upstream, address: Address, key: CancelKey) -> None:
    """Cancel what runs on the backend with this key.

    Args:
        upstream: how to connect to it.
        address: where it is.
        key: that.

    Raises:
        UpstreamUnavailable: the server has not taken the request.
    """
    await relay_cancel(replace(upstream, addresses=(address,)), key.packet)
