"""SCRAM between two connections: what is edited of a login, which is nothing else of what passes through the guard.

A server whose connection has TLS offers two mechanisms, SCRAM-SHA-256 and SCRAM-SHA-256-PLUS. The second one binds the
login to the channel: the client's proof covers the certificate that it was shown (``tls-server-end-point``, RFC 5929),
and the server compares that with its own. So it depends on what each of them sees of the guard:

======  ======  ============  =======================================================================================
client  server  certificates  what is done
======  ======  ============  =======================================================================================
plain   plain                 nothing: without TLS the server doesn't offer PLUS
TLS     plain                 nothing: likewise. A client that could have bound its channel says so (``y``), and may
plain   TLS                   PLUS is taken out of AuthenticationSASL: libpq refuses it where there is no TLS
TLS     TLS     the same      nothing: what the client binds is what the server expects
TLS     TLS     others        PLUS is taken out. To a server that has offered it ``y`` is a downgrade attack, and it
                              refuses the login (28000). ``y`` can't be edited: the client's proof covers it. The
                              refusal is told in words that say what to set
======  ======  ============  =======================================================================================

A client that insists on a bound channel (``channel_binding=require``) says itself that it isn't offered, or that it has
no TLS.

Sources: ``pg_SASL_init()`` in ``fe-auth.c``, ``build_client_first_message()`` in ``fe-auth-scram.c``,
``scram_get_mechanisms()`` and ``read_client_first_message()`` in ``auth-scram.c``.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from pgguard.wire.fields import build_error_response, parse_fields
from pgguard.wire.messages import HEADER_SIZE, SHORT, parse_header
from pgguard.wire.sasl import AUTHENTICATION, SASL, SASL_HEAD, Channel, authentication_code, channel_of, without_binding

_LONGEST_OFFER: Final = 2000
"""What libpq takes for the length of an Authentication message, at most: ``PQconnectPoll()`` in ``fe-connect.c``."""
_CHOICE: Final = 64
"""Bytes of SASLInitialResponse in which a mechanism of SCRAM is named, and what is said of the channel."""
_SASL_RESPONSE: Final = ord("p")
_ERROR_RESPONSE: Final = ord("E")
_BEFORE_OFFER: Final = frozenset(b"vN")
"""What may come in front of the first Authentication message: NegotiateProtocolVersion, NoticeResponse."""
_REFUSED: Final = "28000"
"""``invalid_authorization_specification``: PostgreSQL documentation, appendix A."""
_SHOWN: Final = 200
"""Characters of the server's own words that are passed on, at most."""


class _Stage(Enum):
    BEGUN = "the server hasn't said yet how it authenticates"
    OFFERED = "it has offered PLUS, which has been taken out; it is seen what the client makes of that"
    OVER = "nothing more is edited"


def stands_between(shown: bytes | None, server: bytes | None) -> bool:
    """Whether a channel that the server would have bound isn't the one that the client would bind.

    Args:
        shown: The certificate that the client was shown, in DER; ``None``: it has no TLS.
        server: The server's own; likewise.
    """
    return server is not None and server != shown


class Login:
    """Edits a login where the guard :func:`stands_between`; to be asked until it :attr:`is_over`."""

    __slots__ = ("_choice", "_kept", "_passing", "_stage")

    def __init__(self) -> None:
        self._stage = _Stage.BEGUN
        self._kept = b""
        """A message of the server's of which more is needed."""
        self._passing = 0
        """Bytes still to come of one that is passed on."""
        self._choice = b""
        """The beginning of what the client has said since the offer."""

    @property
    def is_over(self) -> bool:
        """Whether nothing more is edited, and nothing is kept."""
        return self._stage is _Stage.OVER

    @property
    def kept(self) -> bytes:
        """What has been kept of the server's stream until there is more of it."""
        return self._kept

    def leave(self) -> bytes:
        """Edit nothing more; returns what has been kept of the server's stream, and is to be passed on."""
        kept, self._kept = self._kept, b""
        self._stage = _Stage.OVER
        return kept

    def from_client(self, data: bytes, *, again: bool = False) -> None:
        """Take note of something that the client has sent.

        Args:
            data: that.
            again: it begins with what has been said before, from the beginning of a message on.
        """
        if self._stage is _Stage.OFFERED and len(self._choice) < _CHOICE:
            self._choice = data[:_CHOICE] if again else self._choice + data[: _CHOICE - len(self._choice)]

    def from_server(self, data: bytes) -> bytes:
        """What the client gets of something that the server has sent; nothing while more of it is needed."""
        data, self._kept = self._kept + data, b""
        passed = []
        while data and not self.is_over:
            if self._passing:
                passed.append(data[: self._passing])
                data = data[self._passing :]
                self._passing -= len(passed[-1])
                continue
            taken = self._take(data)
            if taken is None:
                self._kept, data = data, b""
                break
            size, words = taken
            passed.append(words)
            data = data[size:]
        return b"".join((*passed, data))

    def _take(self, data: bytes) -> tuple[int, bytes] | None:
        """Take a message, or the beginning of one that is passed on; ``None`` if more of it is needed.

        Returns how much has been taken, and what the client gets instead.
        """
        if len(data) < HEADER_SIZE:
            return None
        code, length = parse_header(data, 0)
        message = data[: 1 + length]
        is_whole = len(message) == 1 + length
        if self._stage is _Stage.OFFERED:
            if code == _ERROR_RESPONSE and length <= SHORT and self._has_said_unoffered():
                return (len(message), self._refusal(message)) if is_whole else None
        elif code == AUTHENTICATION and SASL_HEAD <= 1 + length <= _LONGEST_OFFER:
            return (len(message), self._offer(message)) if is_whole else None
        elif code in _BEFORE_OFFER and HEADER_SIZE - 1 <= length <= SHORT:
            self._passing = 1 + length - len(message)
            return len(message), message
        self._stage = _Stage.OVER
        return 0, b""

    def _offer(self, message: bytes) -> bytes:
        edited = message if authentication_code(message) != SASL else without_binding(message)
        self._stage = _Stage.OVER if edited == message else _Stage.OFFERED
        return edited

    def _has_said_unoffered(self) -> bool:
        return self._choice[:1] == bytes([_SASL_RESPONSE]) and channel_of(self._choice) is Channel.UNOFFERED

    def _refusal(self, message: bytes) -> bytes:
        self._stage = _Stage.OVER
        fields = parse_fields(message[HEADER_SIZE:])
        if fields.get("C") != _REFUSED:
            return message
        return build_error_response(
            "pgguard: the client can't bind its login to the server's TLS channel, as pgguard stands between them: "
            "set channel_binding=disable in the client",
            sqlstate=_REFUSED,
            detail="The client could bind its channel, and so could the server, but theirs isn't one. The server "
            "refused the login: "
            f"{fields.get('M', '')[:_SHOWN]}",
            hint="Set channel_binding=disable (pgjdbc: channelBinding=disable; node-postgres: enableChannelBinding: "
            "false). Or have pgguard show its clients the server's own certificate (--tls-cert, --tls-key), so that "
            "what they bind is what the server expects.",
        )
