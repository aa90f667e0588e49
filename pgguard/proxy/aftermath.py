"""What becomes of a session that is over, while its client isn't: it is told, heard, waited for, and listened to.

The relay (:mod:`pgguard.proxy.relay`) moves the bytes of a session as long as it is relayed. From then on it goes
through the phases of :class:`pgguard.proxy.ends.Phase`, and what they take is done here:

*Rejecting*: the query that runs upstream is cancelled, the client is brought to the end of the message that it is just
being sent, and told. If it asks for something more, as drivers do to clean up, it is told again.

*Lingering*: a client that has been sent everything is given time to close its side. What it still sends is for nobody.

*Listening*: when several processes have the client's end open, it is kept for a while, to hear which of them goes on to
use it. That one learns what it would from the server's host, by an RST.
"""

from __future__ import annotations

import socket
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Protocol, TypeVarTuple

import trio

from pgguard.proxy.ends import Phase
from pgguard.proxy.losses import Loss, note, spared
from pgguard.session.farewell import Farewell, asks, farewell
from pgguard.session.verdicts import TLS_RECORD, Direction, MessageSeen

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from pgguard.identity import Sender
    from pgguard.proxy.ends import End
    from pgguard.proxy.judge import Judge, Ruling
    from pgguard.proxy.relay import Relay
    from pgguard.proxy.session import ProxiedSession
    from pgguard.session.verdicts import Verdict

_LINGER: Final = 2.0
"""Seconds for a client to close its side after the server's has ended."""
_ALONE: Final = 0.2
"""Seconds after which it is looked who else has a connection open that has been ended: by then most are closed."""
_LISTENING: Final = 3600.0
"""Seconds for which it is listened to who uses a connection that has been ended and that several processes had open."""
_LISTENED: Final = 256
"""Connections that are listened to at once, the latest: each takes a descriptor."""
_RESET: Final = struct.pack("ii", 1, 0)
"""``struct linger`` with which close(2) resets a TCP connection: socket(7)."""

_LAST_WORDS: Final = 2.0
"""Seconds to reach the end of the message that a rejected client is just being sent."""
_READ: Final = 128 * 1024
"""Bytes of it that are read at once."""
_SILENCE: Final = 1.0
"""Seconds after which a rejected client that says nothing has nothing more to clean up."""
_HEARING: Final = 5.0
"""Seconds for which it may go on to send."""

Ts = TypeVarTuple("Ts")


class Judging(Protocol):
    """Whoever deals with verdicts, and with what takes time."""

    def start(self, session: ProxiedSession, function: Callable[[*Ts], Awaitable[None]], *args: *Ts) -> None:
        """Do for a session what takes time. What goes wrong with that leaves its bytes alone."""

    async def have_ruled(self, session: ProxiedSession, verdict: Verdict) -> Ruling:
        """Have a verdict ruled on."""


class Endings(Protocol):
    """Whoever sees to the ends of streams, and closes what is over."""

    def finish(self, session: ProxiedSession) -> None:
        """Close both of its sockets; nothing happens if they are closed already."""

    def pass_end_on(self, end: End) -> None:
        """End the stream to it, as everything has been written and its peer will send no more."""

    def end_server_side(self, session: ProxiedSession) -> None:
        """Close the server's connection; the client gets what waits for it, then the end of its stream."""


class Aftermath:
    """Sees sessions off that are over.

    Args:
        relay: moves the bytes.
        endings: sees to the ends of streams.
        judging: deals with verdicts.
        judge: rules on verdicts.
        cancel: starts to cancel what a session's backend is doing, without waiting for it.
    """

    def __init__(
        self,
        relay: Relay,
        endings: Endings,
        judging: Judging,
        judge: Judge,
        *,
        cancel: Callable[[ProxiedSession], None],
    ) -> None:
        self._relay = relay
        self._endings = endings
        self._judging = judging
        self._judge = judge
        self._cancel = cancel
        self._listened: dict[ProxiedSession, None] = {}
        """Those that are listened to, the first first."""
        self.stopping = False
        """The guard is about to end."""

    def forget(self, session: ProxiedSession) -> None:
        """Its sockets are closed."""
        self._listened.pop(session, None)

    def cut_off(self, session: ProxiedSession) -> None:
        """Have the server give up what it may be doing for a session that is being ended."""
        if _is_busy(session):
            with spared(Loss.STEP, session):
                self._cancel(session)

    # Rejecting

    async def reject(self, session: ProxiedSession, ruling: Ruling) -> None:
        """Tell the client, cancel what runs upstream, close both connections."""
        self.cut_off(session)
        session.flow.phase = Phase.CONDEMNED
        self._relay.take_out(session.flow)
        finished = False
        with spared(Loss.WORDS, session), trio.move_on_after(_LAST_WORDS), suppress(OSError, trio.ClosedResourceError):
            finished = await self._finish_message(session)
        if session.done.is_set():
            return
        if finished and ruling.response is not None:
            last = self._farewell(session, ruling.response)
            session.client.append(last.words)
            if last.again:
                session.farewell = last
                self._judging.start(session, self._hear_out, session)
        self._endings.end_server_side(session)

    @staticmethod
    def _farewell(session: ProxiedSession, error: bytes) -> Farewell:
        """What a rejected client is sent last, in the form that fits what it waits for."""
        tracker, held = session.tracker, session.client.held
        if tracker is None:
            return Farewell(error)
        try:
            asked = chr(held[0]) if held and not tracker.frontend_rest else None
            return farewell(tracker, error, asked)
        except Exception:
            note(Loss.WORDS, session)
            return Farewell(error)

    @staticmethod
    async def _finish_message(session: ProxiedSession) -> bool:
        """Bring the client to the end of the message that it is being sent, so that another can follow.

        Returns False if the server never sent that end, or nobody knows where it is.

        Raises:
            OSError: one of the connections broke.
            trio.ClosedResourceError: the session was closed meanwhile.
        """
        if session.tracker is None:
            return False
        client, server = session.client, session.server
        rest = session.inside_message
        while rest and not server.eof:
            await trio.lowlevel.wait_readable(server.fd)
            data = server.receive(min(rest, _READ))
            if data is not None:  # otherwise TLS has had something to say, and the server hasn't
                data = data[:rest]
                rest -= len(data)
                if not data:
                    server.end_stream()
                client.append(data)
            while client.outgoing:
                await trio.lowlevel.wait_writable(client.fd)
                client.write()
        return not rest

    def hear(self, session: ProxiedSession, data: bytes) -> None:
        """Take note of what a client says that was rejected, and tell it again if it asks for something."""
        session.heard = True
        last = session.farewell
        with spared(Loss.WORDS, session):
            if last is not None and asks(data):
                session.farewell = last.repeated()
                self._relay.send(session.client, last.words)

    async def _hear_out(self, session: ProxiedSession) -> None:
        """Let a client that was rejected come to the end of what it sends and cleans up, and end its stream then."""
        with trio.move_on_after(_HEARING):
            while session.farewell is not None and not session.done.is_set():
                session.heard = False
                with trio.move_on_after(_SILENCE):
                    await session.done.wait()
                if not session.heard:
                    break
        if session.farewell is not None and not session.done.is_set():
            session.farewell = None
            if not session.client.outgoing:
                self._endings.pass_end_on(session.client)

    # Lingering and listening

    def end_of_stream(self, session: ProxiedSession) -> None:
        """The client has been sent everything, and the end of the stream: wait for it to close its side."""
        if session.phase is Phase.ENDED:
            session.flow.phase = Phase.LINGERING
        self._judging.start(session, self._linger, session)

    async def _linger(self, session: ProxiedSession) -> None:
        """Let a client that has been sent everything close its side.

        Closing a TCP socket with unread data resets it, and what the server said last would be lost on the way. With a
        Unix socket it isn't. If another process has the client's end open, it is waited longer for that to close, or to
        send: see :meth:`note_late`.
        """
        patience = _LINGER
        if session.phase is Phase.LINGERING:
            with trio.move_on_after(_ALONE):
                await session.done.wait()
            if session.done.is_set():
                return
            is_shared = False
            with spared(Loss.EVIDENCE, session):
                is_shared = not self.stopping and await self._judge.is_shared(session)
            if is_shared:
                patience = _LISTENING
                self._listen(session)
            elif session.transport == "unix":
                patience = 0
        with trio.move_on_after(patience):
            await session.done.wait()
        self._endings.finish(session)

    def _listen(self, session: ProxiedSession) -> None:
        """Keep a session that is over, to hear who goes on to use its connection; the one kept longest makes room."""
        if not session.done.is_set():
            self._listened[session] = None
            if len(self._listened) > _LISTENED:
                self._endings.finish(next(iter(self._listened)))

    def make_room(self) -> bool:
        """End the one that has been listened to for longest; False if there is none."""
        longest = next(iter(self._listened), None)
        if longest is not None:
            self._endings.finish(longest)
        return longest is not None

    def stop_lingering(self, sessions: Iterable[ProxiedSession]) -> None:
        """Close those of the sessions that are over already, and from now on listen to none that is."""
        self.stopping = True
        for session in [session for session in sessions if session.phase is Phase.LINGERING]:
            self._endings.finish(session)

    def note_late(self, end: End, data: bytes, now: float) -> None:
        """Take what a client sends when its session is over as the server's host would, with an RST; judge who sends.

        PostgreSQL has closed its socket by then, and the kernel resets a connection on which something comes for nobody
        (``tcp_rcv_state_process()`` in ``tcp_input.c``). Over a Unix socket the client would be told at once, by EPIPE,
        without the guard's knowing who it was; as long as it is listened to, it is told when it writes once more.
        """
        session = end.session
        tracker = session.afterwards
        verdict = None
        if tracker is not None:
            done = len(data)
            with spared(Loss.STEP, session):
                done = tracker.frontend(data, 0, len(data), end.sender, now)
            verdict = tracker.verdict
            if verdict is None and done < len(data):
                end.held = data[done:]
                return
        self._reset(end, verdict)

    def note_unreadable(self, end: End, sender: Sender | None, size: int) -> None:
        """The same of something that can't be decrypted: whoever else has ended the session has ended TLS as well.

        Args:
            end: the client's.
            sender: who has sent it, if that is known.
            size: how many bytes.
        """
        session = end.session
        verdict = None
        if session.afterwards is not None:
            with spared(Loss.STEP, session):
                message = MessageSeen(Direction.FRONTEND, None, TLS_RECORD, size)
                verdict = session.afterwards.judge_late(message, sender)
        self._reset(end, verdict)

    def _reset(self, end: End, verdict: Verdict | None) -> None:
        """Do as the kernel does where nobody is left, and have a verdict ruled on if there is one."""
        session = end.session
        with suppress(OSError):
            end.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._endings.finish(session)
        if verdict is not None:
            self._judging.start(session, self._judge_late, session, verdict)

    async def _judge_late(self, session: ProxiedSession, verdict: Verdict) -> None:
        """Have a verdict ruled on about a session of which nothing is left."""
        await self._judging.have_ruled(session, verdict)


def _is_busy(session: ProxiedSession) -> bool:
    """Whether something may run upstream. Where that isn't known, a cancel that comes too late does no harm."""
    if session.tracker is None:
        return session.protocol is not None and session.afterwards is None
    try:
        return not session.tracker.idle
    except Exception:
        note(Loss.STEP, session)
        return True
