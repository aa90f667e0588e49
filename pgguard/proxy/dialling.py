"""Connecting to one address, a step at a time: no step waits for anything.

A host is connected to that is given by its number, or a Unix socket. A name has to be looked up first, and may stand
for several addresses: see :mod:`pgguard.proxy.upstream`. What has been looked up and connected is gone on with here.

Over TCP there may be TLS, as :mod:`pgguard.proxy.server_tls` says, and libpq does it: ``PQconnectPoll()`` in
``fe-connect.c``. A connection comes through these states; each has a method of its name:

===============  ===================================================================================================
connecting       there is a socket, and it isn't connected yet
asking           the server is sent SSLRequest
being answered   it says in one byte whether it has TLS
shaking hands    TLS is begun; with ``sslnegotiation=direct`` at once
greeting         it is sent the client's StartupMessage
listening        what it says to that is waited for
===============  ===================================================================================================

*What is tried again.* With ``sslmode=allow`` or ``prefer`` a server may be connected to with TLS and without. Whichever
comes first may fail, in the handshake, or only when the server has got the StartupMessage: ``pg_hba.conf`` says for
whom there has to be TLS (``hostssl``), or must not be (``hostnossl``). libpq begins anew then, the other way. So does
the guard, as long as the client hasn't heard anything: if the server's first answer is an error, it gets the same
StartupMessage on another connection. That is libpq's rule, but for two things. An error that comes later, when a
password was wrong, is passed on: the client has had a part in what led to it. So is one that has nothing to do with TLS
(:data:`_OF_NO_USE`): no slot is left, the server is shutting down.

A handshake that fails in which a server was offered no more than it had asked for before is begun anew, too, with all
that there is: see :mod:`pgguard.proxy.server_tls`.

With TLS the first answer is waited for in any case. Only there a server says, in TLS 1.3, that it doesn't accept the
certificate that it was shown.
"""

from __future__ import annotations

import errno
import functools
import ipaddress
import os
import pwd
import socket
from contextlib import suppress
from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple

from pgguard.attribution.sockets import peer_user
from pgguard.proxy.addresses import Address, TcpAddress, UnixAddress
from pgguard.proxy.errors import Problem, UnfitServerError
from pgguard.proxy.server_tls import has_asked_for
from pgguard.proxy.sockets import unconnected
from pgguard.proxy.transport import HandshakeFailed
from pgguard.wire.fields import parse_fields, parse_severity
from pgguard.wire.messages import HEADER_SIZE, parse_header
from pgguard.wire.startup import ACCEPTED, DECLINED, SSL_REQUEST

if TYPE_CHECKING:
    from collections.abc import Callable

    from pgguard.proxy.addresses import Upstream
    from pgguard.proxy.server_tls import ServerTls
    from pgguard.proxy.sockets import Stream
    from pgguard.proxy.transport import Handshake, Tls

BACKLOG_PAUSE: Final = 0.01
"""Seconds to wait for room in the backlog of a Unix socket."""
_CHUNK: Final = 65536
"""Bytes that are read at once."""
_ERROR_RESPONSE: Final = b"E"
_REFUSAL_LIMIT: Final = 16 * 1024
"""Bytes of an ErrorResponse that is waited for until it is whole."""
CANNOT_CONNECT_NOW: Final = "57P03"
_OF_NO_USE: Final = ("53", "57")
"""Classes of errors for which it isn't tried another way: insufficient resources, operator intervention. "PostgreSQL
Error Codes", appendix A."""


class Progress(Enum):
    """How far a connection has come."""

    MADE = "it is there"
    UNDER_WAY = "it goes on, or has failed, when the socket is writable"
    WAITING = "it goes on when the socket is readable"
    NO_ROOM = "the server's backlog is full: it is to be tried again after a pause"
    ANEW = "it goes on with another socket: :meth:`Dial.renew`"


def is_direct(address: Address) -> bool:
    """Whether nothing has to be looked up to connect to it."""
    return isinstance(address, UnixAddress) or family_of(address.host) is not None


def is_on_this_host(address: Address) -> bool:
    """Whether it is certain that a server at an address shares this host's processors.

    A name that has to be looked up isn't, but for ``localhost``: RFC 6761.
    """
    if isinstance(address, UnixAddress) or address.host == "localhost":
        return True
    family = family_of(address.host)
    if family is None:
        return False
    if ipaddress.ip_address(address.host).is_loopback:
        return True
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
        # Sends nothing. The kernel reaches an address of its own from that very address.
        sock.connect((address.host, address.port))
        return bool(sock.getsockname()[0] == sock.getpeername()[0])
    return False


@functools.cache
def family_of(host: str) -> socket.AddressFamily | None:
    """The kind of a host's address; ``None`` if it is a name, or is of a certain interface: it has to be looked up."""
    try:
        number = ipaddress.ip_address(host)
    except ValueError:
        return None
    if number.version == 4:
        return socket.AF_INET
    return None if "%" in host else socket.AF_INET6


class _Refused(NamedTuple):
    """A connection on which the server has refused the client, kept for when it can't be made another way."""

    sock: Stream
    tls: Tls | None
    answer: bytes


class Dial:
    """A connection that is being made.

    Args:
        address: where to; one that :func:`is_direct`, unless there is a socket.
        upstream: how.
        startup: the client's StartupMessage, if it is for a client.
        listens: the first answer to that is waited for in any case.
        sock: one that has been connected.
        is_plain: no TLS, whatever the upstream says.

    Raises:
        OSError: there is no descriptor for it.
    """

    __slots__ = (
        "_address",
        "_asked",
        "_handshake",
        "_is_narrow",
        "_listens",
        "_methods",
        "_outgoing",
        "_peer",
        "_policy",
        "_refused",
        "_startup",
        "_step",
        "_target",
        "answer",
        "sock",
        "tls",
        "why_plain",
    )

    def __init__(
        self,
        address: Address,
        upstream: Upstream,
        startup: bytes = b"",
        *,
        listens: bool = False,
        sock: Stream | None = None,
        is_plain: bool = False,
    ) -> None:
        self._address = address
        self._policy: ServerTls | None = None
        self._methods = [False]
        """With TLS or without: what is tried, and what if that fails."""
        if upstream.tls is not None and not is_plain and isinstance(address, TcpAddress):
            self._policy = upstream.tls
            self._methods = list(upstream.tls.settings.methods)
        self._peer = upstream.peer
        self._startup = startup
        self._listens = listens
        self._target: str | tuple[str | int, ...]
        if sock is not None:
            self._target = sock.getpeername()
            self.sock = sock
        else:
            self._target = address.path if isinstance(address, UnixAddress) else (address.host, address.port)
            self.sock = unconnected(_family(self._target))
        """The connection's, which the caller closes when it is made. With :meth:`renew` there is another one."""
        self.tls: Tls | None = None
        """What it is encrypted by."""
        self.answer = b""
        """What the server has said to the StartupMessage, as far as that has been read."""
        self.why_plain: UnfitServerError | None = None
        """Why it isn't encrypted although that was tried."""
        self._handshake: Handshake | None = None
        self._asked = self._is_narrow = False
        """In the handshake the server has asked for what it could have been offered at once; and it was offered nothing
        else, as it had asked for that before: :mod:`pgguard.proxy.server_tls`."""
        self._outgoing = b""
        """What the server is still to be sent."""
        self._refused: _Refused | None = None
        # A method of its own would refer back to it, and keep it until garbage is looked for.
        self._step: Callable[[Dial], Progress | None] = Dial._begin if sock is None else Dial._settle_method
        """What comes next; it returns ``None`` if what follows doesn't wait."""

    @property
    def is_accepted(self) -> bool:
        """Whether there is somebody who has accepted it: what it waits for is what that one says."""
        return self._step not in (Dial._begin, Dial._connect)

    def close(self) -> None:
        """Give it up."""
        self.sock.close()
        self._drop_refused()

    def _drop_refused(self) -> None:
        if self._refused is not None:
            self._refused.sock.close()
            self._refused = None

    @property
    def unsent(self) -> bytes:
        """What of the StartupMessage the server is still to be sent, when the connection is made."""
        return self._outgoing

    @property
    def encryption(self) -> str | None:
        """How it is encrypted, when it is made: a few words for people; ``None``: there is to be no TLS."""
        if self._policy is None:
            return None
        if self.tls is not None:
            return f"by {self._policy.describe(self.tls.ssl_object)}"
        mode = f"sslmode={self._policy.settings.mode}"
        if self.why_plain is None:
            return f"without TLS unless the server insists on it ({mode})"
        if self.why_plain.problem is Problem.NO_TLS:
            return f"without TLS, which it doesn't have ({mode})"
        return f"without TLS ({mode}), as that fails: {self.why_plain}"

    def step(self) -> Progress:
        """Come as far as can be without waiting.

        Raises:
            OSError: it can't be connected to; or it is, and isn't used (UnfitServerError).
        """
        while True:
            try:
                progress = self._step(self)
            except OSError as error:
                progress = self._fail(error)
            if progress is not None:
                return progress

    def _fail(self, error: OSError) -> Progress:
        """It can't be made this way. Raises ``error`` if there is no other."""
        if self._is_narrow and self.tls is None and self._policy is not None and isinstance(self._address, TcpAddress):
            self._policy.forget(self._address)
            self._step = Dial._begin
            return Progress.ANEW
        if self._refused is not None:
            self._step = Dial._make
            return Progress.ANEW
        if len(self._methods) == 1 or not isinstance(error, UnfitServerError):
            raise error
        return self._try_another_way(error)

    def make_do(self) -> bool:
        """Take what there is, as there is no more time; its socket, which may be another one, isn't watched.

        Returns False if that isn't a connection.
        """
        return self._take_refused() or (self._step == Dial._listen and not self._outgoing)

    def _take_refused(self) -> bool:
        """Go back to the connection on which the client was refused: that counts, and not why there is no other."""
        if self._refused is None:
            return False
        self.sock.close()
        self.sock, self.tls, self.answer = self._refused
        self._refused = None
        self._outgoing = b""
        return True

    def _try_another_way(self, error: UnfitServerError) -> Progress:
        if self._methods.pop(0):
            self.why_plain = error
        self._step = Dial._begin
        return Progress.ANEW

    def renew(self) -> None:
        """Go on with another socket, as :meth:`step` has said; the one that there was isn't watched any more.

        Raises:
            OSError: there is no descriptor for it.
        """
        if self._step == Dial._make:
            self._take_refused()
            return
        if self._refused is None:
            self.sock.close()
        try:
            self.sock = unconnected(_family(self._target))
        except OSError:
            if self._refused is None:
                raise
            self.answer, self._refused = self._refused.answer, None
            self._step = Dial._make
            return
        self.tls = self._handshake = None
        self._asked = self._is_narrow = False
        self._outgoing = b""

    # Connecting

    def _begin(self) -> Progress | None:
        sock = self.sock
        error = sock.connect_ex(self._target)
        if isinstance(self._address, UnixAddress):
            # Nothing has been begun, as it has with TCP: the server's backlog is full, connect(2).
            if error == errno.EAGAIN:
                return Progress.NO_ROOM
        else:
            if error == errno.EINPROGRESS:
                # On one host it is connected by now: it is asked once more before it is waited for.
                error = sock.connect_ex(self._target)
            if error == errno.EALREADY:
                self._step = Dial._connect
                return Progress.UNDER_WAY
        return self._connected(error)

    def _connect(self) -> Progress | None:
        return self._connected(self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

    def _connected(self, error: int) -> Progress | None:
        if error not in (0, errno.EISCONN):
            raise OSError(error, os.strerror(error))
        if isinstance(self._address, UnixAddress):
            self._check_owner()
        else:
            # What PostgreSQL and libpq set on each connection: a peer that vanished is found out in the end.
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self._settle_method()

    def _check_owner(self) -> None:
        """See whether who listens on a Unix socket is who is required. Raises UnfitServerError."""
        if not self._peer:
            return
        uid = peer_user(self.sock)
        try:
            name = pwd.getpwuid(uid).pw_name
        except KeyError:
            name = str(uid)
        if name != self._peer:
            raise UnfitServerError(
                Problem.WRONG_USER, f'requirepeer specifies "{self._peer}", but actual peer user name is "{name}"'
            )

    def _settle_method(self) -> Progress | None:
        """Go on as it is to be connected first."""
        if self._policy is None or not self._methods[0]:
            return self._greet()
        self._step = Dial._begin_tls if self._policy.settings.is_direct else Dial._ask
        return None

    # TLS

    def _ask(self) -> Progress | None:
        self._outgoing = SSL_REQUEST
        self._step = Dial._be_answered
        return None

    def _be_answered(self) -> Progress | None:
        if not self._flush():
            return Progress.UNDER_WAY
        # No more than that: what came behind it in the clear would be taken for what is encrypted (CVE-2021-23222).
        answer = self.sock.receive(1)
        if answer is None:
            return Progress.WAITING
        if not answer:
            raise self._at_last(Problem.NO_ANSWER, "it closed the connection when it was asked for TLS")
        if answer == ACCEPTED:
            self._step = Dial._begin_tls
            return None
        if answer == DECLINED:
            error = UnfitServerError(Problem.NO_TLS, "server does not support SSL, but SSL was required")
            if len(self._methods) == 1:
                raise error
            self._methods.pop(0)
            self.why_plain = error
            return self._greet()
        if answer == _ERROR_RESPONSE:
            raise self._at_last(Problem.NO_ANSWER, "server sent an error response during SSL exchange")
        raise self._at_last(Problem.NO_ANSWER, f"received invalid response to SSL negotiation: {answer!r}")

    def _at_last(self, problem: Problem, told: str) -> UnfitServerError:
        """An error for which libpq doesn't try another way either."""
        del self._methods[1:]
        return UnfitServerError(problem, told)

    def _begin_tls(self) -> Progress | None:
        assert self._policy is not None and isinstance(self._address, TcpAddress)  # noqa: PT018, S101 - for mypy
        self._is_narrow = self._policy.remembers(self._address)
        self._handshake = self._policy.begin(self._address)
        self._outgoing = self._handshake.hear()
        self._step = Dial._shake_hands
        return None

    def _shake_hands(self) -> Progress | None:
        policy, handshake = self._policy, self._handshake
        assert policy is not None and handshake is not None and isinstance(self._address, TcpAddress)  # noqa: PT018, S101
        while True:
            # What is said last goes in front of the StartupMessage: one packet, for which the server wakes up once.
            if not (handshake.is_done and self._startup) and not self._flush():
                return Progress.UNDER_WAY
            if handshake.is_done:
                try:
                    policy.check(handshake.tls.ssl_object, self._address)
                except UnfitServerError:
                    self._flush()
                    raise
                if self._asked:
                    policy.remember(self._address)
                self.tls = handshake.tls
                return self._greet()
            raw = self._receive(_CHUNK)
            if raw is None:
                return Progress.WAITING
            self._asked = self._asked or has_asked_for(raw)
            try:
                self._outgoing = handshake.hear(raw)
            except HandshakeFailed as error:
                with suppress(OSError):  # the server is gone, or doesn't read
                    self.sock.send(error.words, 0, len(error.words))
                raise policy.explain(error, handshake.tls.ssl_object) from error

    # The first answer

    def _greet(self) -> Progress | None:
        """Send the StartupMessage, and see what comes of that if it may have to be sent again."""
        startup = self._startup
        if self.tls is None:
            self._outgoing = startup
        else:
            self.answer = self.tls.open(b"")
            self._outgoing += self.tls.seal(startup)
        if not startup or not (self.tls is not None or len(self._methods) > 1 or self._listens):
            return self._make()
        self._step = Dial._listen
        return None

    def _listen(self) -> Progress | None:
        if not self._flush():
            return Progress.UNDER_WAY
        try:
            raw = self.sock.receive(_CHUNK)
        except OSError:
            raw = b""  # whoever reads it next is told again that it has ended
        if raw is None:
            return Progress.WAITING
        if self.tls is None:
            self.answer += raw
        else:
            self.answer += self.tls.open(raw)
            if words := self.tls.words():
                with suppress(OSError):
                    self.sock.send(words, 0, len(words))
            if self.tls.failure is not None and not self.answer and self._policy is not None:
                error = self._policy.explain_alert(self.tls.failure.reason)
                raise self._at_last(error.problem, str(error))
        if raw and _may_be_more(self.answer):
            return None
        return self._consider()

    def _consider(self) -> Progress | None:
        """Decide whether it is tried another way."""
        if len(self._methods) > 1 and self.answer[:1] == _ERROR_RESPONSE:
            sqlstate = parse_severity(self.answer[HEADER_SIZE:]).sqlstate
            if not sqlstate.startswith(_OF_NO_USE):
                self._refused = _Refused(self.sock, self.tls, self.answer)
                self.answer = b""
                return self._try_another_way(UnfitServerError(Problem.REFUSED, _message(self._refused.answer)))
        return self._make()

    def _make(self) -> Progress:
        self._drop_refused()
        return Progress.MADE

    # Bytes

    def _flush(self) -> bool:
        """Send what is to be sent; False if there is no room for all of it. Raises OSError."""
        while self._outgoing:
            try:
                sent = self.sock.send(self._outgoing, 0, len(self._outgoing))
            except OSError as error:
                self._outgoing = b""
                if self._step == Dial._listen:
                    return True  # what it has said before that is still to be read
                raise self._hung_up(error) from error
            if not sent:
                return False
            self._outgoing = self._outgoing[sent:]
        return True

    def _receive(self, size: int) -> bytes | None:
        """Something of what the server says before it is greeted; ``None``: nothing yet. Raises UnfitServerError."""
        try:
            raw = self.sock.receive(size)
        except OSError as error:
            raise self._hung_up(error) from error
        if raw == b"":
            raise self._hung_up(None)
        return raw

    @staticmethod
    def _hung_up(error: OSError | None) -> UnfitServerError:
        why = "it closed the connection" if error is None else os.strerror(error.errno or errno.EIO)
        return UnfitServerError(Problem.HUNG_UP, f"no TLS: {why} before the handshake was over")


def _family(target: str | tuple[str | int, ...]) -> socket.AddressFamily:
    """The kind of a socket's address."""
    if isinstance(target, str):
        return socket.AF_UNIX
    return socket.AF_INET6 if ":" in str(target[0]) else socket.AF_INET


def _may_be_more(answer: bytes) -> bool:
    """Whether an answer has to be read on: it has none of an ErrorResponse's bytes yet, or not all of them."""
    if len(answer) >= _REFUSAL_LIMIT or (answer and answer[:1] != _ERROR_RESPONSE):
        return False
    if len(answer) < HEADER_SIZE:
        return True
    _, length = parse_header(answer, 0)
    return HEADER_SIZE - 4 <= length <= _REFUSAL_LIMIT and len(answer) < length + 1


def _message(answer: bytes) -> str:
    """An ErrorResponse's text."""
    return parse_fields(answer[HEADER_SIZE:]).get("M", "")
