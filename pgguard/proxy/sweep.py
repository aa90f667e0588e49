"""The relay: one trio task that sweeps the sockets of all established sessions through an epoll of its own.

A wake-up, an epoll_ctl and a task switch for each read are what make a proxy slow. So the sockets stay registered,
one epoll_wait yields all that are ready, each is read once and what it had is written to its peer at once; and when
all are done the epoll is asked again, for up to a millisecond, before the task goes back to trio to sleep. After
:data:`_TURN` seconds it yields to trio's other tasks, whatever the load.

Back-pressure: what a socket has no room for is kept with it, and its peer is not read until it is gone. A session
buffers at most one chunk in each direction. A client that makes more requests than the session core keeps account of
(:meth:`pgguard.session.session.Session.fullness`) is not read either until the server has answered some. Answers are
always read, as long as there is room for them on the way to the client.

Slices: a chunk may hold tens of thousands of small messages, or one known fault after the other. Some of its messages
are followed at once, and more as long as the round has taken less than :data:`_SLICE` seconds. What is left waits for
its turn, one slice of one end in each round, behind all that has come meanwhile.

In line: what may take long to deal with keeps nobody waiting whose turn would come behind it. That is the end of a
stream, and while somebody is judged, or stands in line, whatever a client sends while an answer to it is due. These
ends are taken out of the epoll, and dealt with one after the other, for a moment in each round. So when a process has
been killed that had a thousand connections, or asks on all of them out of turn, others are served meanwhile.

Holding: when a verdict falls on what one end has sent, that end isn't read until the ruling
(:mod:`pgguard.proxy.judge`), and what it has sent waits. The other direction flows on: two answers that would have
reached the client one after the other must not reach it together, or one of two readers swallows both, and the other
waits for ever, in a program that would have ended without the guard.

What becomes of a session that is over is :mod:`pgguard.proxy.aftermath`.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Final, TypeVarTuple

import trio

from pgguard.attribution.senders import CREDENTIALS_SPACE, sender_pid
from pgguard.faults.policy import Action
from pgguard.identity import Sender
from pgguard.proxy.aftermath import Aftermath
from pgguard.proxy.judge import Ruling
from pgguard.proxy.lateness import Lateness
from pgguard.proxy.losses import Loss, note, spared
from pgguard.proxy.remedies import why_it_ended
from pgguard.proxy.session import End, Phase
from pgguard.proxy.unread import ReadingAlarm
from pgguard.session.session import FEW
from pgguard.session.states import OWED, WANTED
from pgguard.wire.fields import build_error_response
from pgguard.wire.messages import HEADER_SIZE, LOOK_LIMIT

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from pgguard.proxy.judge import Judge
    from pgguard.proxy.kernel_senders import KernelSenders, TcpAccount
    from pgguard.proxy.session import ProxiedSession
    from pgguard.proxy.unread import Unread, UnreadWatch
    from pgguard.session.tracker import Tracker
    from pgguard.session.verdicts import Verdict

_CHUNK: Final = 128 * 1024
"""Bytes read at once, and so the most that one direction of a session buffers."""
_HEADROOM: Final = LOOK_LIMIT
"""Room in front of a chunk for the bytes that were held back from the one before."""
_EVENTS: Final = 32
"""Sockets that are served before it is looked whether it is the turn of others: a verdict takes many times as long as a
message that is in order."""
_CROWD: Final = 256
"""The same, while somebody is judged or stands in line: among many who are to do so one is looked for who isn't."""
_PATIENCE: Final = 0.001
"""Seconds to wait for the next event before the sweep goes to sleep in trio."""
_TURN: Final = 0.003
"""Seconds after which trio's other tasks get a turn."""
_HURRY: Final = 0.02
"""Seconds for a client that arrives, or is judged, to get through trio's tasks."""
_SLICE: Final = 0.00025
"""Seconds for which messages are followed before others get their turn."""
_REQUESTS_AT_ONCE: Final = 1024
_REQUESTS_IN_DEPTH: Final = 256
_ANSWERS_AT_ONCE: Final = 2048
_ANSWERS_IN_DEPTH: Final = 16384
"""Bytes of which the messages are followed before it is looked at the clock: the first of a chunk, and those behind
them. A message has five at least. A client's may stand behind thousands of others; most of a server's are rows."""
_ROOM: Final = 0.5
"""How full the ledger may be for a client to be read again that has filled it."""
_HEALTH_CHECK: Final = 1.0
"""Seconds within which a client has gone again that logs in only to see whether it can, as HAProxy's pgsql-check."""
FAILED: Final = "pgguard had an internal error, and stopped checking this session: its log has more"

_APART: Final = 0.1
"""Seconds for which an answer is kept from one that hasn't been read, where several read."""

_REQUESTS: Final = frozenset(map(ord, OWED))
"""The messages of a client that are answered, by their types."""
_WANTED: Final = frozenset(map(ord, WANTED))
"""Those whose answers somebody wants."""

_RELAYED: Final = Phase.RELAYED

_IN: Final = select.EPOLLIN
_OUT: Final = select.EPOLLOUT
_OVER: Final = select.EPOLLHUP | select.EPOLLERR
"""Reported whether it was asked for or not: epoll_ctl(2)."""
_ENDED: Final = select.EPOLLRDHUP
"""The peer has ended its stream."""
_ENDS: Final = _ENDED | _OVER
_READABLE: Final = _IN | _OVER
_WRITABLE: Final = _OUT | _OVER

Ts = TypeVarTuple("Ts")

logger = logging.getLogger(__name__)


class Sweep:
    """Moves the bytes of all sessions that have been added to it.

    Args:
        judge: rules on verdicts.
        cancel: starts to cancel what a session's backend is doing, without waiting for it.
        answered: is told of every session that the server has begun to answer.
        closed: is told of every session whose sockets have been closed.
        stirred: is told of a session whose client sends something for the first time since its ``attentive`` was set.
        unread: looks after what has been answered.
    """

    def __init__(
        self,
        judge: Judge,
        *,
        cancel: Callable[[ProxiedSession], None],
        answered: Callable[[ProxiedSession], None],
        closed: Callable[[ProxiedSession], None],
        stirred: Callable[[ProxiedSession], None],
        unread: UnreadWatch,
    ) -> None:
        self._judge = judge
        self._aftermath = Aftermath(self, judge, cancel=cancel)
        self._answered = answered
        self._closed = closed
        self._stirred = stirred
        self._unread = unread
        self._watched: dict[int, Callable[[int], None]] = {}
        """By descriptor, who is told of the events of what isn't a session's own."""
        self._alarms: set[ReadingAlarm] = set()
        """What tells that a client has read."""
        self._lateness: Lateness | None = None
        """Of the thread that sweeps."""
        self._epoll = select.epoll()
        self._ends: dict[int, End] = {}
        """Those that are registered with the epoll, by descriptor."""
        self._backlog: deque[End] = deque()
        """Those that wait for their turn, with something held."""
        self._line: deque[End] = deque()
        """Those that are read when it is their turn."""
        self._slice_ends = 0.0
        """When who still has something to be followed has to wait for its turn."""
        self._asleep = False
        self._wake: int
        """A descriptor in the epoll that says by its edges that there is a backlog."""
        self._sessions: set[ProxiedSession] = set()
        self._accused: set[ProxiedSession] = set()
        """Those about which a verdict is being ruled on that is not about a message."""
        self.senders: KernelSenders | None = None
        """Who sends on TCP, where the kernel says it."""
        self._hurried_until = 0.0
        """When it may keep trio's other tasks waiting again."""
        self._buffer = bytearray(_HEADROOM + _CHUNK + LOOK_LIMIT)
        self._view = memoryview(self._buffer)
        self._window = self._view[_HEADROOM : _HEADROOM + _CHUNK]
        self._windows = [self._window]
        self._nursery: trio.Nursery

    async def run(self) -> None:
        """Sweep until cancelled; then every session that is left is closed."""
        with spared(Loss.EVIDENCE):
            self._lateness = Lateness()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self._epoll.register(self._wake, select.EPOLLIN | select.EPOLLET)
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                while True:
                    self._asleep = True
                    await trio.lowlevel.wait_readable(self._epoll.fileno())
                    self._asleep = False
                    await self._sweep_while_busy()
        finally:
            for session in list(self._sessions):
                if self._aftermath.stopping:
                    self._aftermath.cut_off(session)
                self.finish(session)
            self._epoll.close()
            os.close(self._wake)
            with spared(Loss.TIDINESS):
                if self._lateness is not None:
                    self._lateness.close()

    async def _sweep_while_busy(self) -> None:
        ends, backlog, line = self._ends, self._backlog, self._line
        poll = self._epoll.poll
        clock = time.monotonic
        began = clock()
        turn_ends = began + _TURN
        while (
            (
                events := poll(
                    0 if backlog or line or began < self._hurried_until else _PATIENCE,
                    _CROWD if line or began < self._hurried_until else _EVENTS,
                )
            )
            or backlog
            or line
        ):
            if line or began < self._hurried_until:
                events = self._without_interrupters(events)
            now = time.time()
            self._slice_ends = clock() + _SLICE
            if self.senders is not None:
                try:
                    self.senders.feed()
                except Exception:
                    note(Loss.SENDER)
            for fd, mask in events:
                end = ends.get(fd)
                if end is None:  # it has been held, or its session closed, by an earlier event, or it is another's
                    self._tell(fd, mask)
                    continue
                try:
                    if mask == _IN:
                        self._read(end, now)
                    else:
                        self._read_and_flush(end, mask, now)
                except Exception:
                    note(Loss.SESSION, end.session)
                    self.finish(end.session)
            if backlog:
                self._take_turn(backlog.popleft())
            if line:
                self._read_in_line(line)
            began = clock()
            if began > turn_ends or began < self._hurried_until:
                await trio.lowlevel.checkpoint()
                began = clock()
                turn_ends = began + _TURN

    def _tell(self, fd: int, mask: int) -> None:
        """Tell whoever watches a descriptor of its events."""
        on_event = self._watched.get(fd)
        if on_event is not None:
            try:
                on_event(mask)
            except Exception:
                note(Loss.STEP)

    def _read_and_flush(self, end: End, mask: int, now: float) -> None:
        if mask & _ENDS and self._may_wait(end):
            self._put_in_line(end)
            mask &= ~_READABLE
        # That it is over is reported of an end whose peer is stuffed as well, and it must not be read for that.
        if mask & _READABLE and (end.wants(_IN) or (end.eof and not end.waits)):
            self._read(end, now)
        if mask & _WRITABLE and end.wants(_OUT):
            self._flush(end)

    def _without_interrupters(self, events: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Put in line who has sent something while an answer to it is due; the other events are returned."""
        others = []
        for event in events:
            end = self._ends.get(event[0])
            if end is not None and end.is_client and event[1] == _IN and _is_busy(end.session) and self._may_wait(end):
                self._put_in_line(end)
            else:
                others.append(event)
        return others

    def _may_wait(self, end: End) -> bool:
        return end.wants(_IN) and self._is_relayed(end.session)

    def _put_in_line(self, end: End) -> None:
        self._hold(end)
        self._line.append(end)

    def _read_in_line(self, line: deque[End]) -> None:
        """Read who has waited for it for longest, and more of them as long as there is time for it."""
        stops = time.monotonic() + _SLICE
        while line:
            end = line.popleft()
            if self._is_relayed(end.session):
                try:
                    self._release(end)
                    if end.wants(_IN):
                        self._slice_ends = time.monotonic() + _SLICE
                        self._read(end, time.time())
                except Exception:
                    note(Loss.SESSION, end.session)
                    self.finish(end.session)
            if time.monotonic() > stops:
                return

    def _take_turn(self, end: End) -> None:
        """Go on with an end that has waited for it, if its session is still relayed."""
        if not self._is_relayed(end.session):
            return
        self._slice_ends = time.monotonic() + _SLICE
        try:
            self._go_on(end)
            if end.late:
                self._let_last_be_read(end)
        except Exception:
            note(Loss.SESSION, end.session)
            self.finish(end.session)

    def _queue(self, end: End) -> None:
        """Have an end that is held wait for its turn."""
        self._backlog.append(end)
        if self._asleep:
            os.eventfd_write(self._wake, 1)

    def hurry(self) -> None:
        """Don't keep trio's other tasks waiting for a moment: a client waits for one of them."""
        self._hurried_until = time.monotonic() + _HURRY

    async def come_round(self) -> None:
        """Wait until everything has been read that had come when this was called, and judged as far as is no work.

        A session is left out whose peer has no room for what it sends.
        """
        await self._pass_mark()
        queued = {*self._backlog, *self._line}
        while not queued.isdisjoint((*self._backlog, *self._line)):
            await self._pass_mark()

    async def _pass_mark(self) -> None:
        """Wait for one's turn in the epoll, which hands out what is ready in the order in which that came."""
        self.hurry()
        mark = os.eventfd(1, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        passed = trio.Event()
        try:
            self.watch(mark, _IN | select.EPOLLET, lambda _: passed.set())
            await passed.wait()
        finally:
            self.unwatch(mark)
            os.close(mark)

    # What isn't a session's own

    def watch(self, fd: int, events: int, on_event: Callable[[int], None]) -> None:
        """Have the epoll watch another descriptor, too, until :meth:`unwatch`.

        Args:
            fd: the descriptor, which belongs to the caller, and is closed only after that.
            events: what of: ``select.EPOLL…``.
            on_event: is called in the sweep's round with each mask of events, in the order in which they came. It must
                not block, and can't be a coroutine. What it raises is noted, and costs only what it was about.

        Raises:
            OSError: it can't be watched: epoll_ctl(2).
            ValueError: the sweep has ended.
        """
        self._epoll.register(fd, events)
        self._watched[fd] = on_event

    def rewatch(self, fd: int, events: int) -> None:
        """Watch a descriptor of :meth:`watch` for other events from now on.

        One whose events were edges, or that was to be told of one alone, is told anew of what is so already.

        Raises:
            OSError: it isn't watched: epoll_ctl(2).
            ValueError: the sweep has ended.
        """
        self._epoll.modify(fd, events)

    def unwatch(self, fd: int) -> None:
        """Watch a descriptor no more; nothing happens if it isn't watched. No event that has come is told any more."""
        if self._watched.pop(fd, None) is not None and not self._epoll.closed:
            self._epoll.unregister(fd)

    # Into and out of the epoll

    def add(self, session: ProxiedSession, startup: bytes) -> None:
        """Take a session over; ``startup`` is what is still to be sent to the server of its StartupMessage."""
        if self._epoll.closed:  # the guard was cancelled while the session was being set up
            self.finish(session)
            return
        self._sessions.add(session)
        session.server.outgoing += startup
        self._arm(session.server)
        self._arm(session.client)
        self._flush(session.server)

    def _arm(self, end: End) -> None:
        """Register for what can be done: reading unless the peer is stuffed, writing if something waits."""
        if end.is_client and end.session.client_gone:
            # Gone for good, it would be reported again and again until what it sent has been written.
            self._disarm(end)
            return
        interest = (0 if end.eof or end.waits or end.peer.outgoing else _IN | _ENDED) | (_OUT if end.outgoing else 0)
        if not interest and (end.waits or not end.eof):
            # Its peer is stuffed, or it is held. Whether it is over is found out when it is its turn to be read again.
            self._disarm(end)
        elif end.interest is None:
            self._epoll.register(end.fd, interest)
            self._ends[end.fd] = end
            end.interest = interest
        elif end.interest != interest:
            self._epoll.modify(end.fd, interest)
            end.interest = interest

    def _disarm(self, end: End) -> None:
        if end.interest is not None:
            self._epoll.unregister(end.fd)
            del self._ends[end.fd]
            end.interest = None

    def take_out(self, session: ProxiedSession) -> None:
        """Neither read from its sockets nor write to them any more."""
        self._disarm(session.client)
        self._disarm(session.server)

    def _hold(self, end: End) -> None:
        """Read nothing more from ``end`` until :meth:`_release`; what goes to it goes on."""
        end.waits = True
        self._arm(end)

    def _release(self, end: End) -> None:
        end.waits = False
        self._arm(end)

    # Bytes

    def _read(self, end: End, now: float) -> None:
        try:
            if end.names_senders:
                size, ancillary, _, _ = end.receive_message(self._windows, CREDENTIALS_SPACE)
                if ancillary and ancillary[0][2] != end.credentials:
                    end.credentials = ancillary[0][2]
                    self._meet(end, _named(end, ancillary[0][2]))
            else:
                size = end.receive(self._window)
        except BlockingIOError:
            return
        except OSError as error:
            end.failure = error.errno
            self._end_of_stream(end, reset=True)
            return
        if not size:
            self._end_of_stream(end, reset=end.eof)
            return
        account = end.kernel_account
        if account is not None and self.senders is not None:
            try:
                pieces = self.senders.pieces(account, size)
            except Exception:
                pieces = self._lose_account(end, account, size)
            if len(pieces) > 1:
                self._stir(end)
                self._cut(end, pieces)
                self._examine_pieces(end, now)
                return
            if pieces[0][1] is not end.sender:
                self._meet(end, pieces[0][1])
        begin = self._put_in_front(end) if end.held else _HEADROOM
        if end.attentive or end.contested or (account is not None and account.unread):
            if self._has_to_wait(end, begin, size, now):
                return
        elif not end.is_client and end.session.tracker is not None and end.session.tracker.several_read:
            end.late = self._is_late(end)
        self._examine(end, begin, _HEADROOM + size, now)

    def _put_in_front(self, end: End) -> int:
        """Put what is held in front of the chunk that has just been read; returns where it begins."""
        begin = _HEADROOM - len(end.held)
        self._buffer[begin:_HEADROOM] = end.held
        end.held = b""
        return begin

    def _has_to_wait(self, end: End, begin: int, size: int, now: float) -> bool:
        """Whether what a client has sent waits until more is known of it."""
        try:
            account = end.kernel_account
            if (end.attentive or (account is not None and account.unread)) and self._attend(end, begin, size, now):
                return True
            if end.contested and self._begins_request(end, begin):
                end.held = bytes(self._view[begin : _HEADROOM + size])
                self._hold(end)
                self.start(end.session, self._sample, end)
                return True
        except Exception:
            note(Loss.EVIDENCE, end.session)
            end.held = b""
            end.waits = False
        return False

    def _is_late(self, server: End) -> bool:
        try:
            return self._lateness is not None and self._lateness.has_grown()
        except Exception:
            note(Loss.EVIDENCE, server.session)
            return False

    @staticmethod
    def _lose_account(end: End, account: TcpAccount, size: int) -> list[tuple[int, Sender | None]]:
        """Who sends couldn't be told, and won't be any more: the account may be of other bytes from now on."""
        note(Loss.SENDER, end.session)
        account.is_lost = True
        end.kernel_account = None
        return [(size, None)]

    def _meet(self, end: End, sender: Sender | None) -> None:
        """Somebody else sends now than before."""
        end.sender = sender
        try:
            self._judge.meet(end.session, sender)
        except Exception:
            note(Loss.SENDER, end.session)

    def set_alarm(self, client: End) -> ReadingAlarm:
        """Be told when a client takes something out of its end of a Unix connection. Raises OSError."""
        return ReadingAlarm(self, self._alarms, client)

    @property
    def alarms(self) -> int:
        """How many descriptors sessions have beyond their two."""
        return len(self._alarms)

    def _attend(self, end: End, begin: int, size: int, now: float) -> bool:
        """A client sends for the first time since its last answer was looked after, or on top of something unread.

        Or the server sends for the first time.

        Returns True if what a client sends has to wait, since it may have been sent on top of the last answer.
        """
        session, tracker = end.session, end.session.tracker
        end.attentive = False
        if not end.is_client:
            self._answered(session)
            return False
        self._stirred(session)
        if tracker is None or begin != _HEADROOM or size < HEADER_SIZE or end.contested:
            return False
        if tracker.frontend_rest or self._buffer[begin] not in _WANTED:
            return False
        if not self._unread.is_suspect(session, self._buffer[begin]):
            return False
        unread = self._unread.known_unread(session)
        if not (self._unread.was_seen_unread(session) if unread is None else unread.size):
            return False
        if unread is not None:
            header = bytes(self._view[begin : begin + HEADER_SIZE])
            if self._is_repeat(session, self._unread.sent_on_top(session, tracker, unread, header), now):
                return False
        end.held = bytes(self._view[begin : begin + size])
        self._hold(end)
        self.start(session, self._weigh, end, unread)
        return True

    async def _weigh(self, end: End, unread: Unread | None) -> None:
        """Find out whether the request that is held back was sent on top of the last answer, and go on with it.

        Args:
            end: the client's.
            unread: how much of that was unread, if it is known without a look.
        """
        session = end.session
        self.hurry()
        verdict: Verdict | None = None
        with spared(Loss.EVIDENCE, session):
            if unread is None:
                unread = await self._unread.still_unread(session)
            tracker = session.tracker
            if unread.size and tracker is not None:
                verdict = self._unread.sent_on_top(session, tracker, unread, end.held[:HEADER_SIZE])
        if (
            verdict is not None
            and not self._is_repeat(session, verdict, time.time())
            and not await self._rule(session, verdict)
        ):
            return
        if self._is_relayed(session):
            self._go_on(end)

    async def _let_read(self, server: End) -> None:
        """Let one of several readers take an answer before the next one follows.

        The relay was woken late and has read both at once. On time it would have passed on the one before the other
        had come; together they would reach the same reader.
        """
        await self._until_read(server.session)
        if self._is_relayed(server.session):
            self._go_on(server)
            self._let_last_be_read(server)

    def _let_last_be_read(self, server: End) -> None:
        """Keep what has come in the meantime from catching up with an answer, if nothing else is waited for.

        That is one more answer that was read with it, the rest of a long one, or something that is wrong with it.
        """
        if not server.waits:
            self._hold(server)
            self.start(server.session, self._catch_up, server)

    async def _catch_up(self, server: End) -> None:
        await self._until_read(server.session)
        if self._is_relayed(server.session):
            server.late = False
            self._release(server)

    async def _until_read(self, session: ProxiedSession) -> None:
        with spared(Loss.EVIDENCE, session):
            await self._unread.until_read(session, _APART)

    def _stir(self, end: End) -> None:
        """A client sends for the first time since its last answer was looked after; several of its threads do."""
        if end.attentive:
            end.attentive = False
            try:
                self._stirred(end.session)
            except Exception:
                note(Loss.EVIDENCE, end.session)

    def _cut(self, end: End, pieces: list[tuple[int, Sender | None]]) -> None:
        """Keep what has been read in pieces, each of one sender."""
        at = _HEADROOM
        for length, sender in pieces:
            end.pieces.append((bytes(self._view[at : at + length]), sender))
            at += length

    def _examine_pieces(self, end: End, now: float) -> None:
        """Follow what several have sent, one after the other, as far as it is in order and for a slice of time."""
        first = True
        while end.pieces:
            if end.waits:
                return
            if not first and time.monotonic() > self._slice_ends:
                self._hold(end)
                self._queue(end)
                return
            first = False
            piece, sender = end.pieces.popleft()
            self._meet(end, sender)
            held, end.held = end.held, b""
            begin, stop = _HEADROOM - len(held), _HEADROOM + len(piece)
            self._buffer[begin:stop] = held + piece
            self._examine(end, begin, stop, now)

    def _begins_request(self, end: End, begin: int) -> bool:
        """Whether the chunk begins with a message that its sender will wait for the answer to."""
        tracker = end.session.tracker
        end.sender = None
        return tracker is not None and not tracker.frontend_rest and self._buffer[begin] in _REQUESTS

    def _examine(self, end: End, begin: int, stop: int, now: float) -> None:
        """Follow what stands in the buffer for a slice of time, and forward it as far as it is in order."""
        tracker = end.session.tracker
        if tracker is None:
            self._pass_on(end, begin, stop, now)
            return
        try:
            if end.is_client:
                done = tracker.frontend(self._buffer, begin, stop, end.sender, now, _REQUESTS_AT_ONCE)
            else:
                done = tracker.backend(self._buffer, begin, stop, _ANSWERS_AT_ONCE, apart=end.late)
        except Exception:
            self._lose_track(end.session, now)
            self._pass_on(end, begin, stop, now)
            return
        if done == stop:
            self._forward(end, begin, stop)
            if end.peer.choked or (end.is_client and len(tracker.ledger.entries) >= FEW):
                self._balance(end, tracker, now)
        else:
            self._examine_on(end, tracker, begin, done, stop, now)

    def _examine_on(self, end: End, tracker: Tracker, begin: int, done: int, stop: int, now: float) -> None:
        """Go on with what stands in the buffer, when some of it, or nothing, has been followed."""
        session = end.session
        pos = begin
        while done != stop:
            verdict = tracker.verdict
            if verdict is not None:
                if not self._is_repeat(session, verdict, now):
                    self._forward(end, begin, done)
                    self._set_aside(session, tracker, now)
                    self._keep(end, done, stop)
                    self.start(session, self._adjudicate, end, verdict)
                    return
                self._overrule(session, tracker, now)
            elif tracker.lost is not None:
                self._lose(session, tracker.lost, now)
            elif done != pos and end.late and self._ends_answer(session, tracker, now):
                self.hurry()
                self._forward(end, begin, done)
                self._keep(end, done, stop)
                self.start(session, self._let_read, end)
                return
            elif done == pos:  # the rest is too little to be judged
                self._forward(end, begin, done)
                end.held = bytes(self._view[done:stop])
                self._balance(end, tracker, now)
                return
            if session.tracker is None:
                self._pass_on(end, begin, stop, now)
                return
            if time.monotonic() > self._slice_ends or self._is_full(end, tracker, now):
                self._forward(end, begin, done)
                self._keep(end, done, stop)
                self._balance(end, tracker, now)
                if not end.choked:
                    self._queue(end)
                return
            pos = done
            done = self._follow(end, tracker, pos, stop, now)
        self._forward(end, begin, stop)
        self._balance(end, tracker, now)

    def _follow(self, end: End, tracker: Tracker, pos: int, stop: int, now: float) -> int:
        """Follow some more messages; the position returned is how far they are in order."""
        try:
            if end.is_client:
                return tracker.frontend(self._buffer, pos, stop, end.sender, now, _REQUESTS_IN_DEPTH)
            return tracker.backend(self._buffer, pos, stop, _ANSWERS_IN_DEPTH, apart=end.late)
        except Exception:
            self._lose_track(end.session, now)
            return stop

    def _ends_answer(self, session: ProxiedSession, tracker: Tracker, now: float) -> bool:
        try:
            return tracker.at_answers_end
        except Exception:
            self._lose_track(session, now)
            return False

    def _pass_on(self, end: End, begin: int, stop: int, now: float) -> None:
        """Deal with what an end has sent whose session isn't followed."""
        if end.session.phase is Phase.LINGERING:
            self._aftermath.note_late(end, self._buffer, begin, stop, now)
        else:
            self._forward(end, begin, stop)

    def _keep(self, end: End, begin: int, stop: int) -> None:
        """Hold an end with what is left of its chunk."""
        end.held = bytes(self._view[begin:stop])
        self._hold(end)

    def _is_full(self, end: End, tracker: Tracker, now: float) -> bool:
        """Whether a client has the server owe it too much."""
        try:
            return end.is_client and tracker.fullness() >= 1
        except Exception:
            self._lose_track(end.session, now)
            return False

    def _balance(self, end: End, tracker: Tracker, now: float) -> None:
        """Read a client no more that has the server owe it too much, and again when that has answered some of it."""
        if tracker is not end.session.tracker:
            return  # it has failed, and nobody would say that there is room again
        if end.is_client:
            if self._is_full(end, tracker, now):
                end.choked = True
                self._hold(end)
        elif end.peer.choked and self._has_room(end.session, tracker, now):
            self._unchoke(end.peer)

    def _has_room(self, session: ProxiedSession, tracker: Tracker, now: float) -> bool:
        try:
            return tracker.fullness() <= _ROOM
        except Exception:
            self._lose_track(session, now)
            return False

    def _unchoke(self, client: End) -> None:
        """Go on with a client, when it is its turn."""
        client.choked = False
        self._queue(client)

    def _overrule(self, session: ProxiedSession, tracker: Tracker, now: float) -> None:
        try:
            tracker.overrule()
        except Exception:
            self._lose_track(session, now)

    def _set_aside(self, session: ProxiedSession, tracker: Tracker, now: float) -> None:
        try:
            tracker.set_aside()
        except Exception:
            self._lose_track(session, now)

    def _is_repeat(self, session: ProxiedSession, verdict: Verdict, now: float) -> bool:
        """Whether nothing needs to be held for a verdict, which has been dealt with then."""
        try:
            return self._judge.is_repeat(session, verdict, now)
        except Exception:
            note(Loss.MEMORY, session)
            return False

    def _forward(self, end: End, begin: int, stop: int) -> None:
        if end.swallow:
            swallowed = min(end.swallow, stop - begin)
            end.swallow -= swallowed
            begin += swallowed
        peer = end.peer
        if begin == stop or peer.broken:
            return
        if end.is_client and end.session.phase is not _RELAYED:
            if end.session.farewell is not None:
                self._aftermath.hear(end.session, self._view[begin:stop])
            return
        if peer.outgoing:
            peer.outgoing += self._view[begin:stop]
            return
        try:
            sent = peer.send(self._view[begin:stop])
        except BlockingIOError:
            sent = 0
        except OSError:
            # The reading side tells the end of it: what the peer sent before it went is still to be read.
            peer.broken = True
            return
        if begin + sent != stop:
            peer.outgoing += self._view[begin + sent : stop]
            self._arm(peer)
            self._arm(end)

    def _flush(self, end: End) -> None:
        """Write what waits for ``end``, and when it is all gone go on with what waited for that."""
        if end.outgoing:
            try:
                del end.outgoing[: end.send(end.outgoing)]
            except BlockingIOError:
                return
            except OSError:
                end.broken = True
                end.outgoing.clear()
            if end.outgoing:
                return
        if end.peer.eof and not end.peer.waits:
            self.pass_end_on(end)
        if not end.session.done.is_set():
            self._arm(end)
            if not (end.is_client and end.session.draining):
                self._arm(end.peer)

    def send(self, client: End, words: bytes) -> None:
        """Send a client something more, now or when there is room."""
        client.outgoing += words
        self._arm(client)
        self._flush(client)

    # Ends of streams

    def _end_of_stream(self, end: End, *, reset: bool) -> None:
        session = end.session
        first = not end.eof
        end.eof = True
        if end.is_client and first and not reset and session.transport == "tcp":
            end.check_peer()
        if end.is_client and reset:
            # What it sent is still for the server, which may not read it before it has got rid of its answers.
            session.client_gone = end.broken = True
            end.outgoing.clear()
            if not session.draining:
                self._arm(end.peer)
        verdicts = self._last_verdicts(end) if first and not session.draining else []
        verdicts = [verdict for verdict in verdicts if not self._is_repeat(session, verdict, time.time())]
        if verdicts:
            self._hold(end)
            self.start(session, self._adjudicate_end, end, verdicts)
        else:
            self._after_end(end)

    def _last_verdicts(self, end: End) -> list[Verdict]:
        session = end.session
        tracker = session.tracker
        if tracker is None:
            return []
        try:
            if end.is_client:
                # An error in writing to a socket that was reset is not told again in reading it.
                reset = end.broken or (not tracker.requests and self._has_only_looked(end))
                return tracker.frontend_eof(len(end.held), reset=reset)
            return tracker.backend_eof(len(end.held))
        except Exception:
            self._lose_track(session, time.time())
            return []

    @staticmethod
    def _has_only_looked(end: End) -> bool:
        """Whether a client that has asked for nothing was a health check, or closed before its login was answered."""
        if time.monotonic() - end.session.arrived < _HEALTH_CHECK:
            return True
        return end.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0

    def _after_end(self, end: End) -> None:
        """All that can be said about the end of ``end``'s stream is said: let its peer know."""
        session = end.session
        torn = bool(end.held) or _is_inside_message(session)
        self._forward_held(end)
        if not end.is_client and not session.draining:
            self._server_ended(session, torn=torn)
        elif end.peer.outgoing and not end.peer.broken:
            self._arm(end)
        else:
            self.pass_end_on(end.peer)
            if not session.done.is_set():
                self._arm(end)

    def _forward_held(self, end: End) -> None:
        held, end.held = end.held, b""
        if held:
            self._buffer[_HEADROOM : _HEADROOM + len(held)] = held
            self._forward(end, _HEADROOM, _HEADROOM + len(held))

    def pass_end_on(self, end: End) -> None:
        """Everything has been written to ``end``, and its peer will send no more."""
        session = end.session
        if session.client_gone or (session.client.eof and session.server.eof):
            self.finish(session)
            return
        if session.farewell is not None:
            return  # it may ask for something more
        try:
            end.sock.shutdown(socket.SHUT_WR)
        except OSError:
            end.broken = True
        if session.draining:
            self._aftermath.end_of_stream(session)

    def _server_ended(self, session: ProxiedSession, *, torn: bool) -> None:
        tracker = session.tracker
        silently = (
            torn
            or tracker is None
            or tracker.goodbye
            or tracker.terminated
            or session.client.eof
            or session.client.broken
        )
        if not silently:
            logger.warning("session %d: the server at %s closed the connection", session.id, session.upstream)
            with spared(Loss.WORDS, session):
                session.client.outgoing += build_error_response(
                    f"pgguard: the server at {session.upstream} closed the connection unexpectedly",
                    sqlstate="08006",
                    detail=why_it_ended(session.server.failure),
                    hint="Look into the server's log at this time.",
                )
        self.end_server_side(session)

    def end_server_side(self, session: ProxiedSession) -> None:
        """Close the server's connection; the client gets what waits for it, then the end of its stream."""
        session.phase = Phase.ENDED if session.phase is _RELAYED else Phase.REJECTED
        self._answered(session)  # as much as it ever will
        # What the client still sends isn't forwarded, and judged only by who sends it.
        session.afterwards, session.tracker = session.tracker, None
        session.client.held = b""
        session.client.pieces.clear()
        session.client.waits = session.client.choked = session.server.waits = False
        server = session.server
        self._disarm(server)
        server.sock.close()
        server.eof = True
        server.outgoing.clear()
        self._arm(session.client)
        self._flush(session.client)

    def make_room(self) -> bool:
        """End a session that is over and is only listened to; False if there is none."""
        return self._aftermath.make_room()

    def stop_lingering(self) -> None:
        """Close the sessions that are over already, and from now on wait for none that is."""
        self._aftermath.stop_lingering(self._sessions)

    def dismiss(self, session: ProxiedSession, farewell: bytes) -> None:
        """Close a session now, telling the client why if it isn't in the middle of a message. Doesn't wait for it.

        What the server is still doing for it is cancelled.
        """
        tracker = session.tracker
        self._aftermath.cut_off(session)
        if tracker is not None and not _is_inside_message(session) and not session.client.outgoing:
            with suppress(OSError):
                session.client.send(farewell)
        self.finish(session)

    def finish(self, session: ProxiedSession) -> None:
        """Close both of its sockets; nothing happens if they are closed already."""
        if session.done.is_set():
            return
        if session.leftover is not None:
            with spared(Loss.TIDINESS, session):
                session.leftover.close()
            session.leftover = None
        for end in (session.client, session.server):
            self._disarm(end)
            if session.phase is Phase.CONDEMNED:  # it is being brought to the end of a message
                trio.lowlevel.notify_closing(end.sock)
            end.sock.close()
        session.done.set()
        self._aftermath.forget(session)
        self._sessions.discard(session)
        self._closed(session)

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
                if number is not None:
                    work.end(number)
            if session.done.is_set():
                with spared(Loss.TIDINESS, session):
                    self._judge.closed(session)  # of what has been recorded since it ended

        self._nursery.start_soon(run)

    def _carry_on(self, session: ProxiedSession, held: End | None) -> None:
        """Let a session's bytes go on when something that was to be done for it has failed.

        Args:
            session: the session.
            held: what has sent the bytes that waited for it, if any did.
        """
        try:
            if not self._is_relayed(session):
                self.finish(session)
            elif held is not None:
                self._lose(session, FAILED, time.time())
                self._go_on(held)
                if held.eof:
                    self._after_end(held)
        except Exception:
            note(Loss.SESSION, session)
            self.finish(session)

    # Verdicts

    def _lose(self, session: ProxiedSession, reason: str, now: float) -> None:
        """Go on forwarding a session that can't be followed any more."""
        if session.tracker is None:
            return
        session.tracker = None
        if session.client.choked:
            self._unchoke(session.client)
        with spared(Loss.RECORD, session):
            self._judge.lost(session, reason, now)

    def _lose_track(self, session: ProxiedSession, now: float) -> None:
        """The tracker has failed."""
        note(Loss.TRACKING, session)
        self._lose(session, FAILED, now)

    async def _adjudicate(self, end: End, verdict: Verdict) -> None:
        """Have a verdict ruled on that is about what is held of ``end``, do as the ruling says, and go on with it."""
        session = end.session
        ruling = await self.have_ruled(session, verdict)
        if not self._is_relayed(session):
            return
        if ruling.action is Action.REJECTED:
            await self._aftermath.reject(session, ruling)
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
                self._lose_track(session, time.time())
        self._go_on(end)

    async def have_ruled(self, session: ProxiedSession, verdict: Verdict) -> Ruling:
        """Have a verdict ruled on, even if the guard is to end meanwhile, as it may when the session has."""
        self.hurry()
        ruling = Ruling(None)
        with trio.CancelScope(shield=verdict.ends):
            ruling = await self._judge.rule_surely(session, verdict)
        return ruling  # noqa: RET504 - a scope that is cancelled ends its block

    @staticmethod
    def _is_relayed(session: ProxiedSession) -> bool:
        """Whether it goes on after what has been waited for: it has not ended, and hasn't been rejected meanwhile."""
        return session.phase is _RELAYED and not session.done.is_set()

    def accuse(self, session: ProxiedSession, verdict: Verdict) -> bool:
        """Have a verdict ruled on that no message has brought about. Nothing is held for it.

        Returns False, and nothing is done, if another one about the session is being ruled on, or it is over.
        """
        if session not in self._sessions or session in self._accused or not self._is_relayed(session):
            return False
        if not self._is_repeat(session, verdict, time.time()):
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
        if not self._is_relayed(session):
            return False
        if ruling.action is Action.REJECTED:
            await self._aftermath.reject(session, ruling)
            return False
        return True

    async def _sample(self, end: End) -> None:
        """Find out who has sent the request that is held back, and go on with it."""
        session = end.session
        self.hurry()
        verdict: Verdict | None = None
        with spared(Loss.SENDER, session):
            verdict = await self._judge.sample(session)
        if self._is_relayed(session) and (verdict is None or await self._rule(session, verdict)):
            self._go_on(end)

    def _go_on(self, end: End) -> None:
        """Go on with what is held of ``end``."""
        self._release(end)
        held, end.held = end.held, b""
        if held:
            self._buffer[_HEADROOM : _HEADROOM + len(held)] = held
            self._examine(end, _HEADROOM, _HEADROOM + len(held), time.time())
        self._examine_pieces(end, time.time())

    async def _adjudicate_end(self, end: End, verdicts: list[Verdict]) -> None:
        for verdict in verdicts:
            if not await self._rule(end.session, verdict):
                return
        self._release(end)
        self._after_end(end)


def _named(end: End, credentials: bytes) -> Sender | None:
    """Whom the kernel has named."""
    try:
        pid = sender_pid(credentials)
    except Exception:
        note(Loss.SENDER, end.session)
        end.credentials = None
        return None
    return None if pid is None else Sender(pid)


def _is_busy(session: ProxiedSession) -> bool:
    """Whether the server owes its client an answer; False if that isn't known."""
    try:
        return session.tracker is not None and not session.tracker.idle
    except Exception:
        note(Loss.STEP, session)
        return False


def _is_inside_message(session: ProxiedSession) -> bool:
    """Whether the client has been sent part of a message of the server's; True if that isn't known."""
    try:
        return session.inside_message > 0
    except Exception:
        note(Loss.WORDS, session)
        return True
