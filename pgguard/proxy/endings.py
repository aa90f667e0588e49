"""How streams and sessions end: what has come is passed on, what was wrong is judged, then both sockets are closed.

Each side of a session ends its stream for itself. When it has, and all that can be said about that is said, its peer is
written what is left, and then the end. A server that has ended its stream is gone, and its socket closed at once; what
becomes of its client then is :mod:`pgguard.proxy.aftermath`.
"""

from __future__ import annotations

import logging
import socket
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Protocol, TypeVarTuple

import trio

from pgguard.proxy.aftermath import Aftermath
from pgguard.proxy.corruption import last_words
from pgguard.proxy.ends import Phase, Reading, Writing
from pgguard.proxy.losses import Loss, note, spared
from pgguard.proxy.relay import FAILED
from pgguard.proxy.remedies import why_it_ended
from pgguard.wire.fields import build_error_response

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from pgguard.identity import Sender
    from pgguard.proxy.ends import End, Socket
    from pgguard.proxy.judge import Judge, Ruling
    from pgguard.proxy.relay import Relay
    from pgguard.proxy.session import ProxiedSession
    from pgguard.session.verdicts import Verdict

_HEALTH_CHECK: Final = 1.0
"""Seconds within which a client has gone again that logs in only to see whether it can, as HAProxy's pgsql-check."""

_CHECK_SECONDS: Final = 75
"""Seconds between two questions of the kernel's whether a client is there still: more than the 60 for which the kernel
of the client keeps what is left of a socket that was closed (``tcp_fin_timeout``)."""
_CHECKED_AFTER: Final = 5.0
"""Seconds after a client has ended its stream, twice as many at most, after which the kernel is to find out whether it
is there still, unless the server has ended its own as well."""

Ts = TypeVarTuple("Ts")

logger = logging.getLogger(__name__)


class Judging(Protocol):
    """Whoever deals with verdicts, and with what takes time."""

    def start(self, session: ProxiedSession, function: Callable[[*Ts], Awaitable[None]], *args: *Ts) -> None:
        """Do for a session what takes time. What goes wrong with that leaves its bytes alone."""

    def settles(self, session: ProxiedSession, verdict: Verdict, now: float) -> bool:
        """Deal with a verdict for which nothing needs to be held; False if something does, and it is left."""

    def adjudicate_end(self, end: End, verdicts: list[Verdict]) -> None:
        """Have verdicts ruled on about the end of a stream, and go on with it."""

    async def have_ruled(self, session: ProxiedSession, verdict: Verdict) -> Ruling:
        """Have a verdict ruled on."""


class Endings:
    """Sees to the ends of streams, and closes what is over.

    Args:
        relay: moves the bytes.
        judging: deals with verdicts.
        judge: rules on them.
        cancel: starts to cancel what a session's backend is doing, without waiting for it.
        answered: is told of every session that the server has answered as much as it ever will.
        closed: is told of every session whose sockets have been closed.
    """

    def __init__(
        self,
        relay: Relay,
        judging: Judging,
        judge: Judge,
        *,
        cancel: Callable[[ProxiedSession], None],
        answered: Callable[[ProxiedSession], None],
        closed: Callable[[ProxiedSession], None],
    ) -> None:
        self._relay = relay
        self._judging = judging
        self._answered = answered
        self._closed = closed
        self._sessions: dict[ProxiedSession, None] = {}  # a set of many takes twice as much
        self._half_over: dict[ProxiedSession, float] = {}
        """Those whose clients have ended their TCP streams lately, while the servers haven't, and when, in seconds of
        time.monotonic(); the first first."""
        self.aftermath = Aftermath(relay, self, judging, judge, cancel=cancel)
        """What becomes of those that are over."""

    # Sessions

    def begin(self, session: ProxiedSession) -> None:
        """A session is relayed from now on."""
        self._sessions[session] = None

    def is_open(self, session: ProxiedSession) -> bool:
        """Whether it has begun, and hasn't been closed."""
        return session in self._sessions

    @property
    def sessions(self) -> list[ProxiedSession]:
        """Those that have begun, and haven't been closed."""
        return list(self._sessions)

    def dismiss(self, session: ProxiedSession, farewell: bytes) -> None:
        """Close a session now, telling the client why if it isn't in the middle of a message. Doesn't wait for it.

        What the server is still doing for it is cancelled.
        """
        tracker = session.tracker
        self.aftermath.cut_off(session)
        if tracker is not None and not _is_inside_message(session) and not session.client.outgoing:
            with suppress(OSError):
                session.client.append(farewell)
                session.client.write()
                session.client.end_writing()
        self.finish(session)

    def finish(self, session: ProxiedSession) -> None:
        """Close both of its sockets; nothing happens if they are closed already."""
        if session.done.is_set():
            return
        if session.leftover is not None:
            with spared(Loss.TIDINESS, session):
                session.leftover.close()
            session.leftover = None
        flow = session.flow
        for end in (flow.client, flow.server):
            self._relay.disarm(end)
            if flow.phase is Phase.CONDEMNED:  # it is being brought to the end of a message
                trio.lowlevel.notify_closing(end.fd)
            end.sock.close()
        flow.phase = Phase.CLOSED
        session.done.set()
        self.aftermath.forget(session)
        self._sessions.pop(session, None)
        self._half_over.pop(session, None)
        self._closed(session)

    async def check_clients(self) -> None:
        """Have the kernel find out of clients that have ended their streams whether they are there; until cancelled.

        Mostly the server ends its own a moment later, and nobody is to be asked.
        """
        while True:
            await trio.sleep(_CHECKED_AFTER)
            due = time.monotonic() - _CHECKED_AFTER
            while self._half_over:
                session, since = next(iter(self._half_over.items()))
                if since > due:
                    break
                del self._half_over[session]
                check_peer(session.client.sock)

    # Ends of streams

    def end_of_stream(self, end: End, *, reset: bool) -> None:
        """Nothing more will come from ``end``; with ``reset`` its connection is broken."""
        session = end.session
        first = not end.eof
        end.end_stream()
        if session.login is not None and not end.is_client:
            end.held += session.end_login()
        if end.is_client and first and not reset and session.transport == "tcp":
            self._half_over[session] = time.monotonic()
        if end.is_client and reset:
            # What it sent is still for the server, which may not read it before it has got rid of its answers.
            end.writing = Writing.GONE
            end.drop_outgoing()
            if not session.draining:
                self._relay.arm(end.peer)
        verdicts = self._last_verdicts(end) if first and not session.draining else []
        if verdicts:
            verdicts = [verdict for verdict in verdicts if not self._judging.settles(session, verdict, time.time())]
        if verdicts:
            self._relay.hold(end, Reading.ENDING)
            self._judging.adjudicate_end(end, verdicts)
        else:
            self.after_end(end)

    def _last_verdicts(self, end: End) -> list[Verdict]:
        session = end.session
        tracker, tls = session.tracker, end.tls
        try:
            told = last_words(session, tls) if tls is not None and end.is_client else []
            if tracker is None or (tls is not None and tls.failure is not None and not tls.failure.is_told):
                return told  # how it would have gone on can't be known, nor what is left of a message
            held_back = len(end.held) + (0 if tls is None else tls.halfway)
            if end.is_client:
                # An error in writing to a socket that was reset is not told again in reading it.
                reset = end.writing is not Writing.OPEN or (not tracker.requests and self._has_only_looked(end))
                return [*told, *tracker.frontend_eof(held_back, reset=reset)]
            return tracker.backend_eof(held_back)
        except Exception:
            note(Loss.TRACKING, session)
            self._relay.lose(session.flow, session, FAILED, time.time())
            return []

    @staticmethod
    def _has_only_looked(end: End) -> bool:
        """Whether a client that has asked for nothing was a health check, or closed before its login was answered."""
        if time.monotonic() - end.session.arrived < _HEALTH_CHECK:
            return True
        return end.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0

    def after_end(self, end: End) -> None:
        """All that can be said about the end of ``end``'s stream is said: let its peer know."""
        session, tls = end.session, end.tls
        if tls is not None:
            self._relay.say_for(end, tls)
        if not end.is_client and self._is_wholly_over(session):
            session.afterwards, session.flow.tracker = session.flow.tracker, None
            self.finish(session)
            return
        if not end.is_client and not session.draining:
            was_inside = _is_inside_message(session)
            self._server_ended(session, torn=self._relay.forward_held(end) or was_inside)
            return
        self._relay.forward_held(end)
        if end.peer.outgoing and end.peer.writing is Writing.OPEN:
            self._relay.arm(end)
        else:
            self.pass_end_on(end.peer)
            if not session.done.is_set():
                self._relay.arm(end)

    @staticmethod
    def _is_wholly_over(session: ProxiedSession) -> bool:
        """Whether all that is left to be done for a session is to close it, as both its ends have ended.

        Nothing is to be passed on, and nobody to be told anything. That is how nearly all sessions end.
        """
        client, server = session.flow.client, session.flow.server
        return (
            session.flow.phase is Phase.RELAYED
            and client.eof
            and client.tls is None
            and not client.outgoing
            and not server.held
        )

    def pass_end_on(self, end: End) -> None:
        """Everything has been written to ``end``, and its peer will send no more."""
        session = end.session
        is_gone = session.client_gone
        if is_gone or (session.client.eof and session.server.eof):
            if end.tls is not None and end.is_client and not is_gone:
                _end_writing(end)  # it may have ended its own side alone, and is told what the server has said
            self.finish(session)
            return
        if session.farewell is not None:
            return  # it may ask for something more
        _end_writing(end)
        if session.draining:
            self.aftermath.end_of_stream(session)

    def _server_ended(self, session: ProxiedSession, *, torn: bool) -> None:
        tracker, client = session.tracker, session.client
        silently = (
            torn
            or tracker is None
            or tracker.goodbye
            or tracker.terminated
            or client.eof
            or client.writing is not Writing.OPEN
        )
        if not silently:
            logger.warning("%s: the server at %s closed the connection", session, session.upstream)
            with spared(Loss.WORDS, session):
                client.append(
                    build_error_response(
                        f"pgguard: the server at {session.upstream} closed the connection unexpectedly",
                        sqlstate="08006",
                        detail=_why_it_ended(session.server),
                        hint="Look into the server's log at this time.",
                    )
                )
        self.end_server_side(session)

    def end_server_side(self, session: ProxiedSession) -> None:
        """Close the server's connection; the client gets what waits for it, then the end of its stream."""
        flow, relay = session.flow, self._relay
        flow.phase = Phase.ENDED if flow.phase is Phase.RELAYED else Phase.REJECTED
        self._answered(session)  # as much as it ever will
        # What the client still sends isn't forwarded, and judged only by who sends it.
        session.afterwards, flow.tracker = flow.tracker, None
        client, server = flow.client, flow.server
        client.held = b""
        client.pieces = None
        if client.tls is not None:
            client.tls.unopened.clear()
        relay.disarm(server)
        server.sock.close()
        server.end_stream()
        server.drop_outgoing()
        relay.resume(client)
        relay.flush(client)

    # What is said of those that are over

    def hear(self, end: End, data: bytes) -> None:
        """A client whose session is over has sent something."""
        if end.session.farewell is not None:
            self.aftermath.hear(end.session, data)

    def note_late(self, end: End, data: bytes, now: float) -> None:
        """A client has sent something that has been sent all there was, and the end of the stream."""
        self.aftermath.note_late(end, data, now)

    def note_unreadable(self, end: End, sender: Sender | None, size: int) -> None:
        """The same of something that can't be decrypted, and says more than that there is nothing more."""
        self.aftermath.note_unreadable(end, sender, size)


def _end_writing(end: End) -> None:
    source = end.peer.tls
    try:
        # A stream that was cut off looks to the other side as it does here. A rejection is the guard's own doing.
        is_cut_off = source is not None and not source.is_closed and end.peer.eof
        end.end_writing(cleanly=not is_cut_off or end.flow.phase is Phase.REJECTED)
    except OSError:
        end.writing = Writing.BROKEN


def _why_it_ended(server: End) -> str:
    tls = server.tls
    if tls is not None and tls.failure is not None:
        told = "The server says that what it was sent is corrupt" if tls.failure.is_told else "What it sent is corrupt"
        return f"{told}: {tls.failure.reason}."
    return why_it_ended(server.failure)


def _is_inside_message(session: ProxiedSession) -> bool:
    """Whether the client has been sent part of a message of the server's; True if that isn't known."""
    try:
        return session.inside_message > 0
    except Exception:
        note(Loss.WORDS, session)
        return True


def check_peer(client: Socket | socket.socket) -> None:
    """Have the kernel find out whether who has ended a TCP stream is gone, or waits for what is still to come.

    Both end it with the same FIN. But of a socket that was closed nothing is left after a minute, and a keepalive
    probe is answered with an RST then; tcp(7), and ``tcp_keepalive_timer()`` in ``tcp_timer.c``. A server that has
    fallen silent would otherwise be waited for on behalf of each client that has given up on it.
    """
    with suppress(OSError):
        for option in (socket.TCP_KEEPINTVL, socket.TCP_KEEPIDLE):
            client.setsockopt(socket.IPPROTO_TCP, option, _CHECK_SECONDS)
