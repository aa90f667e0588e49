"""Following one session: its two streams of messages, checked against the ledger, and who sends.

:class:`Tracker` is fed the chunks of both directions as they arrive. It keeps no bytes: a message that can't be
judged yet, because its first few bytes are not all there, is left with the caller, who presents those bytes again
with the next ones. So at most :data:`pgguard.wire.messages.LOOK_LIMIT` bytes are ever held back, and a message of
a gigabyte passes in chunks.

Where to look: the state machine, and the theory of it, is :mod:`pgguard.session.states`; what happens to the queue
of what the server owes is :mod:`pgguard.session.ledger`; a server's message is judged in
:mod:`pgguard.session.backend`, a client's in :mod:`pgguard.session.frontend`, and what two processes may do on one
connection in :mod:`pgguard.session.senders`.
"""

from __future__ import annotations

from sys import maxsize
from typing import TYPE_CHECKING, Final, final

from pgguard.session.backend import BackendStream
from pgguard.session.frontend import FrontendStream
from pgguard.session.session import Session
from pgguard.session.verdicts import Direction, Kind

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pgguard.identity import Sender
    from pgguard.session.verdicts import MessageSeen, Verdict

_ABOUT_SENDERS: Final = frozenset({Kind.SHARED_BY_PROCESSES, Kind.INHERITED_CONNECTION})
"""Kinds of verdict that are not about a message, though one brings them about."""


@final
class Tracker(Session):
    """The protocol state of one session, from its StartupMessage on.

    ``frontend`` and ``backend`` take a chunk and return a position in it: the bytes before it are in order and may be
    forwarded. When that is not the chunk's end, either :attr:`verdict` is set, and the message at that position is
    what is wrong, or :attr:`lost` is, or the bytes from there on are not enough to be judged and are to be presented
    again, in front of the next ones. A call may be limited to the messages that begin in so many bytes of the chunk,
    and one that gets behind a message that is swallowed stops there; then it may also be that there are more: another
    call, from that position on, tells, as it comes no further if not.

    After a verdict the caller says what becomes of the message: :meth:`overrule` (it is forwarded) or
    :meth:`swallow` (it is not), and presents the chunk again from that position. Nothing is forwarded twice.

    Args:
        parameters: the StartupMessage's parameters.
        sender: who sent the StartupMessage, if the kernel said so.
    """

    __slots__ = ("_backend", "_frontend")

    def __init__(self, parameters: Mapping[str, str], sender: Sender | None = None) -> None:
        super().__init__(parameters, sender)
        self._frontend = FrontendStream(self, sender)
        self._backend = BackendStream(self)

    def frontend(
        self, chunk: bytes, start: int, end: int, sender: Sender | None, at: float, most: int = maxsize
    ) -> int:
        """Follow a chunk of the client's, ``chunk[start:end]``; see the class for what is returned.

        Args:
            chunk: where it is.
            start: its beginning, in front of which nothing is looked at.
            end: its end.
            sender: who sent it, ``None`` if the kernel didn't say. The same sender is best given as the same object.
            at: now, in seconds since the epoch.
            most: only messages that begin in so many bytes are looked at.
        """
        return self._frontend.follow(chunk, start, end, sender, at, most)

    def backend(self, chunk: bytes, start: int, end: int, most: int = maxsize, *, apart: bool = False) -> int:
        """Follow a chunk of the server's, ``chunk[start:end]``; see the class for what is returned.

        With ``apart`` it stops behind each answer: :attr:`at_answers_end` says so. ``most`` is as for the client's.
        """
        return self._backend.follow(chunk, start, end, most, apart)

    def expect_readers(self) -> None:
        """Say that several processes or threads have been seen to read the answers."""
        self.several_read = True

    @property
    def at_answers_end(self) -> bool:
        """The server's stream has been followed to the end of an answer."""
        return self.position == self.answer_ended

    def frontend_eof(self, held_back: int, *, reset: bool = False) -> list[Verdict]:
        """The client's stream has ended.

        Args:
            held_back: how many bytes are left over that were too few to be judged.
            reset: the connection was reset, as the kernel does when a socket is closed that still has bytes to read
                (tcp(7), and the same for Unix sockets). Of a client that has made no request these are the answer to
                its login, which it abandoned. While a stream is replicated there always are such bytes, and the
                client's Terminate may be lost in the reset. Neither is a fault.
        """
        return self._frontend.end(held_back, reset=reset)

    def backend_eof(self, held_back: int) -> list[Verdict]:
        """The server's stream has ended, with ``held_back`` bytes left over that were too few to be judged."""
        verdict = self._backend.end(held_back)
        return [] if verdict is None else [verdict]

    def judge_goodbye(self, message: MessageSeen, sender: Sender | None) -> Verdict | None:
        """Say whether ``sender``, ``None`` if that isn't known, may have no right to end the session as it does."""
        return self._frontend.judge_goodbye(message, 0, sender)

    def judge_late(self, message: MessageSeen, sender: Sender | None) -> Verdict | None:
        """Say whether ``sender``, ``None`` if that isn't known, is another one than who has ended the session.

        Args:
            message: what it has sent since, which can't be followed. A use of the connection, not another end.
            sender: who.
        """
        return self._frontend.judge_late(message, sender)

    def set_aside(self) -> Verdict:
        """Take :attr:`verdict` away while it is ruled on: the other direction may be followed meanwhile.

        Nothing more may be fed of the direction that it is about before :meth:`take_up`.

        Raises:
            ValueError: there is none.
        """
        verdict, self.verdict = self.verdict, None
        if verdict is None:
            raise ValueError("there is no verdict")
        return verdict

    def take_up(self, verdict: Verdict) -> None:
        """Put a verdict back that was set aside: what becomes of its message is to be said now."""
        self.verdict = verdict

    def overrule(self) -> None:
        """The message that :attr:`verdict` is about is forwarded all the same, and takes its effect."""
        verdict, self.verdict = self.verdict, None
        # A change of sender is judged once, when it happens; the message itself is still to be judged.
        if verdict is not None and verdict.kind not in _ABOUT_SENDERS:
            self._stream(verdict).overruled = verdict.kind

    def swallow(self) -> None:
        """The message that :attr:`verdict` is about is kept from the other side, and has no effect.

        Raises:
            ValueError: there is no such message, or its beginning has been forwarded already.
        """
        verdict = self.verdict
        if verdict is None or verdict.message is None:
            raise ValueError("there is no message to swallow")
        stream = self._stream(verdict)
        if stream.rest:
            raise ValueError("the message has been forwarded in part")
        self.verdict = None
        stream.swallow(verdict.message)

    def _stream(self, verdict: Verdict) -> FrontendStream | BackendStream:
        """The stream that a verdict's message is of."""
        message = verdict.message
        backend = message is not None and message.direction is Direction.BACKEND
        return self._backend if backend else self._frontend

    @property
    def frontend_rest(self) -> int:
        """Bytes still to come of a message of the client's that has been judged."""
        return self._frontend.rest

    @property
    def backend_rest(self) -> int:
        """Bytes still to come of a message of the server's that has been judged."""
        return self._backend.rest
