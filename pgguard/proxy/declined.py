"""Clients that want encryption, are told that there is none, and leave: what to set for them is said, once a cause.

Of a client that leaves after ``N`` it isn't known whether it insists. Most drivers that only prefer encryption go on
without it on the same connection. pgx makes another connection, to try again without: its ``sslmode=prefer``, which is
its default, is a list of ways to connect ("fallbacks" in ``pgconn/config.go``). So it is waited for that for a moment.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import trio

from pgguard.faults.text import named, process_label
from pgguard.proxy.losses import Loss, spared
from pgguard.wire.startup import PacketKind

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pgguard.proxy.session import ProxiedSession

_SECOND_TRY: Final = 2.0
"""Seconds in which a client comes back that doesn't insist on encryption."""
_AT_ONCE: Final = 16
"""Clients that are waited for at the same time, and clients that come meanwhile."""
_CAUSES: Final = 64
"""Programs and hosts of which it is said."""
_WANTED: Final[Mapping[PacketKind, tuple[str, str]]] = {
    PacketKind.SSL_REQUEST: (
        "TLS",
        "set sslmode=prefer or sslmode=disable in the client, or offer it TLS over TCP (--tls-cert)",
    ),
    PacketKind.GSSENC_REQUEST: ("GSSAPI encryption", "set gssencmode=disable in the client"),
}
"""What each request asks for, and what to do so that its client doesn't insist."""

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Left:
    session: ProxiedSession
    plain: list[ProxiedSession] = field(default_factory=list)
    """Those that have come since, and asked for no encryption."""


class DeclinedClients:
    """Says of clients that insist on encryption what they have to set."""

    def __init__(self) -> None:
        self._left: list[_Left] = []
        self._told: set[str] = set()

    def arrived_plain(self, session: ProxiedSession) -> None:
        """A client has said who it is, and hasn't asked for encryption."""
        for one in self._left:
            if len(one.plain) <= _AT_ONCE:
                one.plain.append(session)

    async def consider(self, session: ProxiedSession, wanted: PacketKind) -> None:
        """Say what a client has to set that has left when it was told that there is no encryption, if it insists.

        Args:
            session: its session, which is over.
            wanted: what it has asked for.
        """
        if len(self._left) >= _AT_ONCE or len(self._told) >= _CAUSES:
            return
        left = _Left(session)
        self._left.append(left)
        try:
            await trio.sleep(_SECOND_TRY)
        finally:
            self._left.remove(left)
        with spared(Loss.STEP, session):
            self._say(left, *_WANTED[wanted])

    def _say(self, left: _Left, what: str, remedy: str) -> None:
        session = left.session
        cause = _cause(session)
        if cause in self._told or len(left.plain) > _AT_ONCE:
            return
        if any(_is_the_same(session, other) for other in left.plain):
            return
        self._told.add(cause)
        logger.warning(
            "%s: %s asked for %s, and hung up when told that there is none: %s",
            session,
            _who(session),
            what,
            remedy,
        )


def _is_the_same(session: ProxiedSession, other: ProxiedSession) -> bool:
    """Whether two sessions may be one client's: the process's, or where that isn't known, the host's."""
    first, second = (None if one.opening is None else one.opening.opener for one in (session, other))
    if first is not None and second is not None:
        return first.pid == second.pid
    return _host(session) == _host(other)


def _cause(session: ProxiedSession) -> str:
    opener = None if session.opening is None else session.opening.opener
    return _host(session) if opener is None else re.sub(r"\d+", "", process_label(opener))


def _host(session: ProxiedSession) -> str:
    return "" if session.client_name is None else session.client_name.rpartition(":")[0]


def _who(session: ProxiedSession) -> str:
    opener = None if session.opening is None else session.opening.opener
    if opener is not None:
        return named(opener.pid, opener)
    return session.client_name or "a client on a Unix socket"
