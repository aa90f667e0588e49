"""What the relay hands on of a session that goes on: what is held until it is ruled on, or until more is known of it.

What takes time is a task of trio's. Meanwhile the end that it is about isn't read, or nothing is held at all; then the
relay goes on with what was held. Whatever goes wrong costs what it was for (:mod:`pgguard.proxy.losses`), and leaves
the bytes alone.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, TypeVarTuple

import trio

from pgguard.faults.policy import Action
from pgguard.proxy.corruption import mixture
from pgguard.proxy.endings import Endings
from pgguard.proxy.ends import ATTENTIVE, LOGIN, End, Phase, Reading
from pgguard.proxy.judge import Ruling
from pgguard.proxy.lateness import Lateness
from pgguard.proxy.losses import Loss, keep_going, note, spared
from pgguard.proxy.refused import tell_refusal
from pgguard.proxy.relay import FAILED
from pgguard.session.states import OWED, WANTED
from pgguard.wire.messages import HEADER_SIZE

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from pgguard.identity import Sender
    from pgguard.proxy.judge import Judge
    from pgguard.proxy.relay import Relay
    from pgguard.proxy.session import ProxiedSession
    from pgguard.proxy.unread import Unread, UnreadWatch
    from pgguard.session.verdicts import Verdict

_ERROR_RESPONSE: Final = ord("E")
_APART: Final = 0.1
"""Seconds for which an answer is kept from one that hasn't been read, where several read."""

_REQUESTS: Final = frozenset(map(ord, OWED))
"""The messages of a client that are answered, by their types."""
_WANTED: Final = frozenset(map(ord, WANTED))
"""Those whose answers somebody wants."""

Ts = TypeVarTuple("Ts")


class Judging:
    """Deals with what the relay can't do in passing.

    Args:
        relay: moves the bytes.
        judge: rules on verdicts.
        unread: looks after what has been answered.
        cancel: starts to cancel what a session's backend is doing, without waiting for it.
        answered: is told of every session that the server has begun to answer.
        closed: is told of every session whose sockets have been closed.
        stirred: is told of a session whose client sends something for the first time since it was attended to.
    """

    def __init__(
        self,
        relay: Relay,
        judge: Judge,
        unread: UnreadWatch,
        *,
        cancel: Callable[[ProxiedSession], None],
        answered: Callable[[ProxiedSession], None],
        closed: Callable[[ProxiedSession], None],
        stirred: Callable[[ProxiedSession], None],
    ) -> None:
        self._relay = relay
        self._judge = judge
        self._unread = unread
        self._answered = answered
        self._stirred = stirred
        self.endings = Endings(relay, self, judge, cancel=cancel, answered=answered, closed=closed)
        """How sessions end."""
        self._accused: set[ProxiedSession] = set()
        """Those about which a verdict is being ruled on that is not about a message."""
        self._lateness: Lateness | None = None
        """Of the thread that relays."""
        self._nursery: trio.Nursery

    def open(self, nursery: trio.Nursery) -> None:
        """Begin, in the thread that relays; what takes time is done in a nursery."""
        self._nursery = nursery
        nursery.start_soon(keep_going, self.endings.check_clients)
        with spared(Loss.EVIDENCE):
            self._lateness = Lateness()

    def close(self) -> None:
        """End."""
        with spared(Loss.TIDINESS):
            if self._lateness is not None:
                self._lateness.close()

    def start(self, session: ProxiedSession, function: Callable[[*Ts], Awaitable[None]], *args: *Ts) -> None:
        """Do for a session what takes time. What goes wrong with that leaves its bytes alone."""
        held = next((arg for arg in args if isinstance(arg, End)), None)
        work = self._judge.work
        number = None if held is None else work.begin()

        async def run() -> None:
            try:
                await function(*args)
            except Exception:
                note(Loss.STEP, session)
                self._carry_on(session, held)
            finally:
                self._relay.end_errand()
                if number is not None:
                    work.end(number)
            if session.done.is_set():
                with spared(Loss.TIDINESS, session):
                    self._judge.closed(session)  # of what has been recorded since it ended

        self._relay.begin_errand()
        self._nursery.start_soon(run, name=function)

    def _carry_on(self, session: ProxiedSession, held: End | None) -> None:
        """Let a session's bytes go on when something that was to be done for it has failed.

        Args:
            session: the session.
            held: what has sent the bytes that waited for it, if any did.
        """
        try:
            if session.phase is not Phase.RELAYED:
                self.endings.finish(session)
            elif held is not None:
                self._relay.lose(session.flow, session, FAILED, time.time())
                self._relay.go_on(held)
                if held.eof:
                    self.endings.after_end(held)
        except Exception:
            note(Loss.SESSION, session)
            self.endings.finish(session)

    # Who sends, and what is of interest

    def meet(self, end: End) -> None:
        """Somebody else sends now than before."""
        try:
            self._judge.meet(end.session, end.sender)
        except Exception:
            note(Loss.SENDER, end.session)

    def stir(self, client: End) -> None:
        """A client has sent something, several of its threads or processes at once."""
        if client.heed & ATTENTIVE:
            client.heed &= ~ATTENTIVE
            try:
                self._stirred(client.session)
            except Exception:
                note(Loss.EVIDENCE, client.session)

    def note_mixed(self, end: End, begun_by: Sender, sender: Sender) -> None:
        """A record of TLS was begun by one process, and completed by another: however that came about, both use it."""
        session = end.session
        try:
            self.accuse(session, mixture(session, begun_by, sender))
        except Exception:
            note(Loss.SENDER, session)

    def has_to_wait(self, end: End, data: bytes, *, whole: bool, now: float) -> bool:
        """Look at what an end has sent of which something is of interest; True if it waits until more is known."""
        session, account = end.session, end.kernel_account
        try:
            attended = end.heed & ATTENTIVE or (account is not None and account.unread is not None)
            if attended and self._attend(end, data, whole=whole, now=now):
                return True
            if end.heed & LOGIN and self._log_in(end, data, whole=whole):
                return True
            if end.contested and self._begins_request(end, data):
                self._hold(end, data)
                self.start(session, self._sample, end)
                return True
        except Exception:
            note(Loss.EVIDENCE, session)
            end.held = b""
            self._relay.resume(end)
        return False

    def _log_in(self, end: End, data: bytes, *, whole: bool) -> bool:
        """See how a login goes on; True if it has been gone on with, or more of what the server has sent is needed."""
        session = end.session
        login = session.login
        if login is None:
            return False
        kept = login.kept
        edited = data
        try:
            if end.is_client:
                login.from_client(data, again=not whole)
            else:
                edited = login.from_server(data)
            is_over = login.is_over
        except Exception:
            note(Loss.TRACKING, session)
            edited = data if end.is_client else kept + data
            is_over = True
        if is_over:
            session.end_login()
        if edited == data:
            return False
        end.held = edited
        self._relay.go_on(end)
        return True

    def _hold(self, end: End, data: bytes) -> None:
        end.held = data
        self._relay.hold(end, Reading.HELD)

    @staticmethod
    def _begins_request(end: End, data: bytes) -> bool:
        """Whether the chunk begins with a message that its sender will wait for the answer to."""
        tracker = end.session.tracker
        end.sender = None
        return tracker is not None and not tracker.frontend_rest and data[0] in _REQUESTS

    def _attend(self, end: End, data: bytes, *, whole: bool, now: float) -> bool:
        """A client sends for the first time since its last answer was looked after, or on top of something unread.

        Or the server sends for the first time.

        Returns True if what a client sends has to wait, since it may have been sent on top of the last answer.
        """
        session, tracker = end.session, end.session.tracker
        end.heed &= ~ATTENTIVE
        if not end.is_client:
            self._answered(session)
            if data[0] == _ERROR_RESPONSE:
                try:
                    tell_refusal(session, data)
                except Exception:
                    note(Loss.WORDS, session)
            return False
        self._stirred(session)
        if tracker is None or not whole or len(data) < HEADER_SIZE or end.contested:
            return False
        if tracker.frontend_rest or data[0] not in _WANTED:
            return False
        if not self._unread.is_suspect(session, data[0]):
            return False
        unread = self._unread.known_unread(session)
        if not (self._unread.was_seen_unread(session) if unread is None else unread.size):
            return False
        if unread is not None:
            verdict = self._unread.sent_on_top(session, tracker, unread, data[:HEADER_SIZE])
            if self.settles(session, verdict, now):
                return False
        self._hold(end, data)
        self.start(session, self._weigh, end, unread)
        return True

    async def _weigh(self, end: End, unread: Unread | None) -> None:
        """Find out whether the request that is held back was sent on top of the last answer, and go on with it.

        Args:
            end: the client's.
            unread: how much of that was unread, if it is known without a look.
        """
        session = end.session
        self._relay.hurry()
        verdict: Verdict | None = None
        with spared(Loss.EVIDENCE, session):
            if unread is None:
                unread = await self._unread.still_unread(session)
            tracker = session.tracker
            if unread.size and tracker is not None:
                verdict = self._unread.sent_on_top(session, tracker, unread, end.held[:HEADER_SIZE])
        if (
            verdict is not None
            and not self.settles(session, verdict, time.time())
            and not await self._rule(session, verdict)
        ):
            return
        if session.phase is Phase.RELAYED:
            self._relay.go_on(end)

    async def _sample(self, end: End) -> None:
        """Find out who has sent the request that is held back, and go on with it."""
        session = end.session
        self._relay.hurry()
        verdict: Verdict | None = None
        with spared(Loss.SENDER, session):
            end.sender, verdict = await self._judge.sample(session)
        if session.phase is Phase.RELAYED and (verdict is None or await self._rule(session, verdict)):
            self._relay.go_on(end)

    # Several readers

    def is_late(self, server: End) -> bool:
        """Whether the system has kept the relay waiting for a processor, lately."""
        try:
            return self._lateness is not None and self._lateness.has_grown()
        except Exception:
            note(Loss.EVIDENCE, server.session)
            return False

    def let_read(self, server: End) -> None:
        """Let one of several readers take an answer before the next one follows, which is held.

        The relay was woken late and has read both at once. On time it would have passed on the one before the other
        had come; together they would reach the same reader.
        """
        self.start(server.session, self._let_read, server)

    async def _let_read(self, server: End) -> None:
        await self._until_read(server.session)
        if server.session.phase is Phase.RELAYED:
            self._relay.go_on(server)
            self.let_last_be_read(server)

    def let_last_be_read(self, server: End) -> None:
        """Keep what has come in the meantime from catching up with an answer, if nothing else is waited for.

        That is one more answer that was read with it, the rest of a long one, or something that is wrong with it.
        """
        if not server.waits:
            self._relay.hold(server, Reading.HELD)
            self.start(server.session, self._catch_up, server)

    async def _catch_up(self, server: End) -> None:
        await self._until_read(server.session)
        if server.session.phase is Phase.RELAYED:
            server.late = False
            self._relay.go_on(server)

    async def _until_read(self, session: ProxiedSession) -> None:
        with spared(Loss.EVIDENCE, session):
            await self._unread.until_read(session, _APART)

    # Verdicts

    def lost(self, session: ProxiedSession, reason: str, now: float) -> None:
        """A session can't be followed any more."""
        with spared(Loss.RECORD, session):
            self._judge.lost(session, reason, now)

    def settles(self, session: ProxiedSession, verdict: Verdict, now: float) -> bool:
        """Deal with a verdict for which nothing needs to be held; False if something does, and it is left."""
        try:
            return self._judge.is_repeat(session, verdict, now)
        except Exception:
            note(Loss.MEMORY, session)
            return False

    def adjudicate(self, end: End, verdict: Verdict) -> None:
        """Have a verdict ruled on that is about what is held of ``end``, do as the ruling says, and go on with it."""
        self.start(end.session, self._adjudicate, end, verdict)

    async def _adjudicate(self, end: End, verdict: Verdict) -> None:
        session = end.session
        ruling = await self.have_ruled(session, verdict)
        if session.phase is not Phase.RELAYED:
            return
        if ruling.action is Action.REJECTED:
            await self.endings.aftermath.reject(session, ruling)
            return
        tracker = session.tracker
        dropped = ruling.action is Action.DROPPED and verdict.message is not None
        if dropped and verdict.message is not None:
            end.swallow = verdict.message.size
        if tracker is not None:
            try:
                tracker.take_up(verdict)
                if dropped:
                    tracker.swallow()
                else:
                    tracker.overrule()
            except Exception:
                note(Loss.TRACKING, session)
                self._relay.lose(session.flow, session, FAILED, time.time())
        self._relay.go_on(end)

    async def have_ruled(self, session: ProxiedSession, verdict: Verdict) -> Ruling:
        """Have a verdict ruled on, even if the guard is to end meanwhile, as it may when the session has."""
        self._relay.hurry()
        ruling = Ruling(None)
        with trio.CancelScope(shield=verdict.ends):
            ruling = await self._judge.rule_surely(session, verdict)
        return ruling  # noqa: RET504 - a scope that is cancelled ends its block

    def adjudicate_end(self, end: End, verdicts: list[Verdict]) -> None:
        """Have verdicts ruled on about the end of a stream, which is held, and go on with it."""
        self.start(end.session, self._adjudicate_end, end, verdicts)

    async def _adjudicate_end(self, end: End, verdicts: list[Verdict]) -> None:
        for verdict in verdicts:
            if not await self._rule(end.session, verdict):
                return
        self._relay.resume(end)
        self.endings.after_end(end)

    def accuse(self, session: ProxiedSession, verdict: Verdict) -> bool:
        """Have a verdict ruled on that no message has brought about. Nothing is held for it.

        Returns False, and nothing is done, if another one about the session is being ruled on, or it is over.
        """
        if not self.endings.is_open(session) or session in self._accused or session.phase is not Phase.RELAYED:
            return False
        if not self.settles(session, verdict, time.time()):
            self._accused.add(session)
            self.start(session, self._try, session, verdict)
        return True

    async def _try(self, session: ProxiedSession, verdict: Verdict) -> None:
        try:
            await self._rule(session, verdict)
        finally:
            self._accused.discard(session)

    async def _rule(self, session: ProxiedSession, verdict: Verdict) -> bool:
        """Have a verdict ruled on that is not about a message; False if the session doesn't go on."""
        ruling = await self.have_ruled(session, verdict)
        if session.phase is not Phase.RELAYED:
            return False
        if ruling.action is Action.REJECTED:
            await self.endings.aftermath.reject(session, ruling)
            return False
        return True
