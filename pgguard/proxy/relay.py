"""The relay: it moves the bytes of all sessions, and hands on whatever is unusual about them.

It is plain, synchronous code, which :mod:`pgguard.proxy.sweep` calls again and again: one ``epoll_wait`` yields all
sockets that are ready, each is read once, the session core follows what it had, and that is written to its peer at
once. What takes more than that is others' affair: verdicts, and whatever has to be found out before something is
forwarded (:mod:`pgguard.proxy.judging`), and the ends of streams (:mod:`pgguard.proxy.endings`).

Back-pressure: what a socket has no room for is kept with it, and its peer is not read until it is gone. A session
buffers at most one chunk in each direction. A client that makes more requests than the session core keeps account of
(:meth:`pgguard.session.session.Session.fullness`) is not read either until the server has answered some. Answers are
always read, as long as there is room for them on the way to the client.

Slices: a chunk may hold tens of thousands of small messages, or one known fault after the other. Some of its messages
are followed at once, and more as long as the round has taken less than a slice of time. What is left waits for its
turn, one slice of one end in each round, behind all that has come meanwhile.

In line: what may take long to deal with keeps nobody waiting whose turn would come behind it. That is the end of a
stream, unless there is time left in this round, and while somebody is judged, or stands in line, whatever a client
sends while an answer to it is due. These ends are taken out of the epoll, and dealt with one after the other, for a
moment in each round. So when a process has been killed that had a thousand connections, or asks on all of them out of
turn, others are served meanwhile.

TLS: what is encrypted is opened at once, by the sender, and then followed as anything else. But a record of another
process than the one that an answer is due to, which most likely uses the same TLS session, isn't opened before that
answer is complete, nor is any of a contested session. If it fails its integrity check, nothing more can be sent to the
client, and a server doesn't read it before it has answered either.

Holding: when a verdict falls on what one end has sent, that end isn't read until the ruling, and what it has sent
waits. The other direction flows on: two answers that would have reached the client one after the other must not reach
it together, or one of two readers swallows both, and the other waits for ever, in a program that would have ended
without the guard.
"""

from __future__ import annotations

import select
from collections import deque
from time import monotonic, time
from typing import TYPE_CHECKING, Any, Final, Protocol, final

from pgguard.identity import Sender
from pgguard.proxy.ends import CHUNK, CONTESTED, End, Phase, Reading, Writing
from pgguard.proxy.losses import Loss, note
from pgguard.session.session import FEW
from pgguard.wire.messages import HEADER_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable

    from mypy_extensions import i64

    from pgguard.attribution.ebpf.account import Segment
    from pgguard.proxy.ends import Flow
    from pgguard.proxy.kernel_senders import KernelSenders, TcpAccount
    from pgguard.proxy.session import ProxiedSession
    from pgguard.proxy.transport import Tls
    from pgguard.session.tracker import Tracker
    from pgguard.session.verdicts import Verdict

_EVENTS: Final = 32
"""Sockets that are served before it is looked whether it is the turn of others: a verdict takes many times as long as a
message that is in order."""
_CROWD: Final = 256
"""The same, while somebody is judged or stands in line: among many who are to do so one is looked for who isn't."""
_HEARD: Final = 0.004
"""Seconds after which it is heard again of senders, so that there is room for what the kernel says of others."""
_HURRY: Final = 0.02
"""Seconds for a client that arrives, or is judged, to get through trio's tasks."""
_REQUESTS_AT_ONCE: Final = 1024
_REQUESTS_IN_DEPTH: Final = 256
_ANSWERS_AT_ONCE: Final = 2048
_ANSWERS_IN_DEPTH: Final = 16384
"""Bytes of which the messages are followed before it is looked at the clock: the first of a chunk, and those behind
them. A message has five at least. A client's may stand behind thousands of others; most of a server's are rows."""
_ROOM: Final = 0.5
"""How full the ledger may be for a client to be read again that has filled it."""
_BYE: Final = HEADER_SIZE
"""Bytes of a Terminate. Whoever else has the connection open may say it as well, and does no harm."""
FAILED: Final = "pgguard had an internal error, and stopped checking this session: its log has more"

_RELAYED: Final = Phase.RELAYED
_OPEN: Final = Reading.OPEN
_CHOKED: Final = Reading.CHOKED
_ENDING: Final = Reading.ENDING
_ENDED: Final = Reading.ENDED
_WRITABLE: Final = Writing.OPEN
_GONE: Final = Writing.GONE

_IN: Final[i64] = select.EPOLLIN
_OUT: Final[i64] = select.EPOLLOUT
_OVER: Final[i64] = select.EPOLLHUP | select.EPOLLERR
"""Reported whether it was asked for or not: epoll_ctl(2)."""
_END: Final[i64] = select.EPOLLRDHUP
"""The peer has ended its stream."""
_ENDS: Final[i64] = _END | _OVER
_TO_READ: Final[i64] = _IN | _OVER
_TO_WRITE: Final[i64] = _OUT | _OVER
_READS: Final[i64] = _IN | _END


class Poll(Protocol):
    """What the relay waits with: :class:`pgguard.proxy.sockets.Epoll`."""

    def register(self, fd: int, eventmask: int, whose: object, /) -> None:
        """Report a descriptor's events, each with an object."""

    def modify(self, fd: int, eventmask: int, /) -> None:
        """Report others of it."""

    def unregister(self, fd: int, /) -> None:
        """Report none any more."""

    def poll(self, timeout: float, maxevents: int, /) -> list[Any]:
        """Wait for events, for some seconds; returns whose they are, each with what it is ready for behind it.

        None: that was in vain, or a signal has come.
        """


class Judging(Protocol):
    """Whoever deals with verdicts, and with what has to be found out before something is forwarded.

    Nothing of it raises or takes long: what takes time is begun, and goes on when it is known.
    """

    def meet(self, end: End) -> None:
        """Somebody else sends now than before: :attr:`End.sender`."""

    def stir(self, client: End) -> None:
        """A client has sent something, several of its threads or processes at once."""

    def has_to_wait(self, end: End, data: bytes, *, whole: bool, now: float) -> bool:
        """Look at what an end has sent of which something is of interest: :attr:`End.heed`.

        Returns True if it waits until more is known; it is held then, and gone on with.

        Args:
            end: which.
            data: what it has sent.
            whole: nothing of it had been held back before.
            now: in seconds since the epoch.
        """

    def note_mixed(self, end: End, begun_by: Sender, sender: Sender) -> None:
        """A record of TLS was begun by one process, and completed by another."""

    def is_late(self, server: End) -> bool:
        """Whether the system has kept the relay waiting for a processor, lately."""

    def settles(self, session: ProxiedSession, verdict: Verdict, now: float) -> bool:
        """Deal with a verdict for which nothing needs to be held; False if something does, and it is left."""

    def adjudicate(self, end: End, verdict: Verdict) -> None:
        """Have a verdict ruled on that is about what is held of ``end``, and go on with it."""

    def let_read(self, server: End) -> None:
        """Let one of several readers take an answer before the next one follows, which is held."""

    def let_last_be_read(self, server: End) -> None:
        """Keep what has come in the meantime from catching up with an answer."""

    def lost(self, session: ProxiedSession, reason: str, now: float) -> None:
        """A session can't be followed any more."""


class Endings(Protocol):
    """Whoever sees to the ends of streams, and closes what is over. Nothing of it raises or takes long."""

    def end_of_stream(self, end: End, *, reset: bool) -> None:
        """Nothing more will come from ``end``; with ``reset`` its connection is broken."""

    def pass_end_on(self, end: End) -> None:
        """Everything has been written to ``end``, and its peer will send no more."""

    def hear(self, end: End, data: bytes) -> None:
        """A client whose session is over has sent something."""

    def note_late(self, end: End, data: bytes, now: float) -> None:
        """A client has sent something that has been sent all there was, and the end of the stream."""

    def note_unreadable(self, end: End, sender: Sender | None, size: int) -> None:
        """The same of something that can't be decrypted, and says more than that there is nothing more."""

    def finish(self, session: ProxiedSession) -> None:
        """Close both sockets of a session."""


@final
class Relay:
    """Moves the bytes of all sessions that have been added to it.

    Args:
        epoll: what it waits with.
        wake: has :meth:`run` called, as something waits for its turn.
        seconds: for which messages are followed before others get their turn.
    """

    _judging: Judging
    _endings: Endings

    def __init__(self, epoll: Poll, *, wake: Callable[[], None], seconds: float) -> None:
        self._epoll = epoll
        self._wake = wake
        self._slice = seconds
        self._slice_ends = 0.0
        """When who still has something to be followed has to wait for its turn."""
        self._round_began = 0.0
        """When what is served had come, or been found to have come."""
        self._epoch = 0.0
        """What the wall clock is ahead of the monotonic one: they are read together once in each :meth:`run`."""
        self.took = 0.0
        """Seconds that it took in the last :meth:`run` to serve all that had come first; 0: nothing came."""
        self.from_clients: i64 = 0
        self.from_servers: i64 = 0
        """Bytes that have been passed on."""
        self._watched: dict[int, Callable[[int], None]] = {}
        """By descriptor, who is told of the events of what isn't a session's own."""
        self._backlog: deque[End] = deque()
        """Those that wait for their turn, with something held."""
        self._line: deque[End] = deque()
        """Those that are read when it is their turn."""
        self._turn_ends = 0.0
        """When it is trio's other tasks' turn."""
        self._errands = 0
        """Tasks of trio's that somebody waits for."""
        self._hurried_until = 0.0
        """When it may keep trio's other tasks waiting again."""
        self._runs = False
        self._senders: KernelSenders | None = None
        """Who sends on TCP, where the kernel says it."""

    def hand_on_to(self, judging: Judging, endings: Endings) -> None:
        """Say who deals with what is unusual; before there is any session."""
        self._judging = judging
        self._endings = endings

    def name_senders(self, senders: KernelSenders) -> None:
        """Have the kernel say who sends on TCP, from now on."""
        self._senders = senders

    # Rounds

    def run(self, until: float, patience: float) -> bool:
        """Move what there is to be moved, until a time of time.monotonic(), and as long as something comes.

        Returns True when it is ``until``, or others are to have their turn; False when nothing has come for
        ``patience`` seconds, and there is nothing to do any more.
        """
        self._runs = True
        self._turn_ends = until
        self.took = 0.0
        try:
            self._hear_of_senders()
            began = heard = monotonic()
            self._epoch = time() - began
            if not self._go_round(began, patience):
                return False
            began = monotonic()
            self.took = began - self._round_began
            while began <= self._turn_ends and began >= self._hurried_until:
                if began > heard + _HEARD:
                    self._hear_of_senders()
                    heard = began
                served = self._go_round(began, patience)
                if not served:
                    return False
                # To have served one alone takes little longer than to read the clock, and is mostly followed by a wait.
                began = self._round_began if served == 1 else monotonic()
            return True
        finally:
            self._runs = False

    def _hear_of_senders(self) -> None:
        """Take in who has sent what, so that there is room for more of that; what is read asks for itself."""
        if self._senders is not None:
            try:
                self._senders.feed()
            except Exception:
                note(Loss.SENDER)

    def _go_round(self, began: float, patience: float) -> i64:
        """Serve all that is ready, and one of those that wait for their turn; returns how many were served."""
        backlog, line = self._backlog, self._line
        crowded = began < self._hurried_until or len(line) > 0
        events = self._epoll.poll(0.0 if crowded or backlog else patience, _CROWD if crowded else _EVENTS)
        served: i64 = len(events) // 2
        if not served and not backlog and not line:
            return 0
        if crowded:
            events = self._without_interrupters(events)
        self._round_began = monotonic()
        self._slice_ends = self._round_began + self._slice
        now = self._epoch + self._round_began
        for at in range(0, len(events), 2):
            end = events[at]
            mask: i64 = events[at + 1]
            if not isinstance(end, End):
                self._tell(end, mask)
                continue
            if end.interest < 0:  # it has been held, or its session closed, by an earlier event
                continue
            try:
                if mask == _IN:
                    self._read(end, now)
                else:
                    self._read_and_flush(end, mask, now)
            except Exception:
                note(Loss.SESSION, end.session)
                self._endings.finish(end.session)
        if backlog:
            served += 1
            self._take_turn(backlog.popleft())
        if line:
            served += 1
            self._read_in_line()
        return served

    def _tell(self, fd: int | None, mask: int) -> None:
        """Tell whoever watches a descriptor, if somebody does, of its events."""
        on_event = None if fd is None else self._watched.get(fd)
        if on_event is not None:
            try:
                on_event(mask)
            except Exception:
                note(Loss.STEP)

    def _read_and_flush(self, end: End, mask: int, now: float) -> None:
        if mask & _ENDS and self._may_wait(end) and (self._line or monotonic() > self._slice_ends):
            self._put_in_line(end)
            mask &= ~_TO_READ
        # That it is over is reported of an end whose peer is stuffed as well, and it must not be read for that.
        if mask & _TO_READ and (end.wants(_IN) or end.reading is _ENDED):
            self._read(end, now)
            if mask & _ENDS and end.reading is _OPEN and end.wants(_IN):
                self._read(end, now)  # most often nothing but the end is behind what it has said last
        if mask & _TO_WRITE and end.wants(_OUT):
            self.flush(end)

    def _without_interrupters(self, events: list[Any]) -> list[Any]:
        """Put in line who has sent something while an answer to it is due; the other events are returned."""
        others: list[Any] = []
        for at in range(0, len(events), 2):
            end = events[at]
            if (
                isinstance(end, End)
                and end.is_client
                and events[at + 1] == _IN
                and _is_busy(end.flow, end.session)
                and self._may_wait(end)
            ):
                self._put_in_line(end)
            else:
                others += events[at : at + 2]
        return others

    def _may_wait(self, end: End) -> bool:
        return end.wants(_IN) and end.flow.phase is _RELAYED

    def _put_in_line(self, end: End) -> None:
        end.reading = Reading.QUEUED
        self.arm(end)
        self._line.append(end)

    def _read_in_line(self) -> None:
        """Read who has waited for it for longest, and more of them as long as there is time for it."""
        line = self._line
        stops = monotonic() + self._slice
        while line:
            end = line.popleft()
            if end.flow.phase is _RELAYED:
                try:
                    self.resume(end)
                    if end.wants(_IN):
                        self._slice_ends = monotonic() + self._slice
                        self._read(end, time())
                except Exception:
                    note(Loss.SESSION, end.session)
                    self._endings.finish(end.session)
            if monotonic() > stops:
                return

    def _take_turn(self, end: End) -> None:
        """Go on with an end that has waited for it, if its session is still relayed."""
        if end.flow.phase is not _RELAYED:
            return
        self._slice_ends = monotonic() + self._slice
        try:
            self.go_on(end)
            if end.late:
                self._judging.let_last_be_read(end)
        except Exception:
            note(Loss.SESSION, end.session)
            self._endings.finish(end.session)

    def _queue(self, end: End) -> None:
        """Have an end wait for its turn."""
        self.hold(end, Reading.QUEUED)
        self._backlog.append(end)
        if not self._runs:
            self._wake()

    def hurry(self) -> None:
        """Don't keep trio's other tasks waiting for a moment: a client waits for one of them."""
        self._hurried_until = monotonic() + _HURRY

    def give_way(self) -> None:
        """Let trio's other tasks have their turn as soon as what has come is served."""
        self._turn_ends = 0.0

    def begin_errand(self) -> None:
        """A task of trio's has been begun that somebody waits for, until :meth:`end_errand`."""
        self._errands += 1
        self.give_way()

    def end_errand(self) -> None:
        """It is done."""
        self._errands -= 1

    @property
    def is_waited_for(self) -> bool:
        """Whether somebody waits for one of trio's other tasks."""
        return self._errands > 0

    def queued(self) -> set[End]:
        """Those that wait for their turn."""
        return {*self._backlog, *self._line}

    # Into and out of the epoll

    def begin(self, flow: Flow, startup: bytes, answer: bytes = b"") -> None:
        """Move a session's bytes.

        Args:
            flow: it.
            startup: what is still to be sent to the server of its StartupMessage.
            answer: what has been read of what the server has said to that.
        """
        client, server = flow.client, flow.server
        if client.pieces or (client.tls is not None and client.tls.is_over):  # what it has sent behind that
            self._queue(client)
        server.append(startup)
        self.flush(server)
        if server.outgoing:
            self.arm(server)
            self.arm(client)
        if answer:
            now = time()
            if not self._judging.has_to_wait(server, answer, whole=True, now=now):
                self._examine(server, answer, now)
        if server.tls is not None and flow.phase is _RELAYED:
            self._end_encrypted(server, server.tls)

    def watch(self, fd: int, events: int, on_event: Callable[[int], None]) -> None:
        """Watch another descriptor, too: see :meth:`pgguard.proxy.sweep.Sweep.watch`."""
        self._epoll.register(fd, events, fd)
        self._watched[fd] = on_event

    def unwatch(self, fd: int) -> bool:
        """Tell nobody of a descriptor's events any more; False if it isn't watched."""
        return self._watched.pop(fd, None) is not None

    def arm(self, end: End) -> None:
        """Register for what can be done: reading unless the peer is stuffed, writing if something waits."""
        if end.is_client and end.writing is _GONE:
            # Gone for good, it would be reported again and again until what it sent has been written.
            self.disarm(end)
            return
        is_read = end.reading is _OPEN and not end.peer.outgoing and not end.is_stuffed
        interest = _READS if is_read else 0  # itself, and no number of each end's
        if end.outgoing:
            interest |= _OUT
        if not interest and end.reading is not _ENDED:
            # Its peer is stuffed, or it is held. Whether it is over is found out when it is its turn to be read again.
            self.disarm(end)
        elif end.interest < 0:
            self._epoll.register(end.fd, interest, end)
            end.interest = interest
        elif end.interest != interest:
            self._epoll.modify(end.fd, interest)
            end.interest = interest

    def disarm(self, end: End) -> None:
        """Register for nothing of an end's any more."""
        if end.interest >= 0:
            self._epoll.unregister(end.fd)
            end.interest = -1

    def take_out(self, flow: Flow) -> None:
        """Neither read from a session's sockets nor write to them any more."""
        self.disarm(flow.client)
        self.disarm(flow.server)

    def hold(self, end: End, why: Reading) -> None:
        """Read nothing more from ``end`` until :meth:`resume`; what goes to it goes on."""
        end.reading = _ENDING if end.reading is _ENDED else why
        self.arm(end)

    def resume(self, end: End) -> None:
        """Read an end again that was held."""
        end.reading = _ENDED if end.reading is _ENDING or end.reading is _ENDED else _OPEN
        self.arm(end)

    # Bytes

    def _read(self, end: End, now: float) -> None:  # noqa: C901, PLR0912 - a call for one costs each message
        tls = end.tls
        pid: i64 = -1
        try:
            if tls is not None:
                data = self._receive_encrypted(end, tls, now)
            elif end.names_senders:
                named = end.receive_named_from(end.sock, CHUNK)
                if named is None:
                    return
                data, pid = named
            else:
                data = end.receive_from(end.sock, CHUNK)
        except OSError as error:
            end.failure = error.errno
            self._endings.end_of_stream(end, reset=True)
            return
        if data is None:
            return
        if pid >= 0 and pid != end.pid:
            end.pid = pid
            self._meet(end, Sender(pid) if pid else None)
        if not len(data):
            self._endings.end_of_stream(end, reset=end.reading is _ENDED)
            return
        account = end.kernel_account
        if account is not None and tls is None and not self._is_of_one(end, account, data, now):
            return
        whole = len(end.held) == 0
        if not whole:
            data = end.held + data
            end.held = b""
        if end.heed or (account is not None and account.unread is not None):
            if self._judging.has_to_wait(end, data, whole=whole, now=now):
                return
        elif not end.is_client:
            tracker = end.flow.tracker
            if tracker is not None and tracker.several_read:
                end.late = self._judging.is_late(end)
        self._examine(end, data, now)
        if tls is not None:
            self._end_encrypted(end, tls)

    def _receive_encrypted(self, end: End, tls: Tls, now: float) -> bytes | None:
        """Receive what one has sent, who is met, and decrypt it.

        Returns no bytes if its stream has ended, and ``None`` if there is nothing to be followed now.

        Raises:
            OSError: the connection is broken.
        """
        raw = end.receive_from(end.sock, CHUNK)
        if not raw:
            return raw
        account = end.kernel_account
        sender = end.sender
        if account is not None:
            pieces = self._whose(end, account, len(raw))
            if pieces is None:
                sender = account.account.sender
            elif len(pieces) == 1:
                sender = pieces[0][1]
            else:
                self._judging.stir(end)
                tls.unopened.extend(_parted(raw, pieces))
                self._open_waiting(end, tls, now)
                return None
        if (sender is not end.sender or end.heed & CONTESTED) and self._may_break(end, sender, now):
            tls.unopened.append((raw, sender))
            self.hold(end, _CHOKED)
            return None
        data = self._open(end, tls, raw, sender)
        if tls.failure is None:  # otherwise it is told when that has been ruled on
            self.say_for(end, tls)
        if not data:
            if end.flow.phase is not Phase.CLOSED:
                self._end_encrypted(end, tls)
            return None
        if sender is not end.sender:
            self._meet(end, sender)
        return data

    def _whose(self, end: End, account: TcpAccount, size: int) -> list[Segment] | None:
        """Who has sent what has been read; ``None``: the account's :attr:`Account.sender`, all of it."""
        try:
            if self._senders is not None:
                return None if self._senders.take(account, size) else account.account.split(size)
        except Exception:
            self._lose_account(end, account)
        return [(size, None)]

    def _may_break(self, end: End, sender: Sender | None, now: float) -> bool:
        """Whether what has come may be another process's record, while an answer is due that can still be sent."""
        tracker = end.flow.tracker
        if tracker is None or not end.is_client or end.flow.phase is not _RELAYED:
            return False
        last = tracker.last_request
        asked = None if last is None else last.sender
        if not end.contested and (sender is None or asked is None or asked.pid == sender.pid):
            return False
        try:
            return tracker.is_answering
        except Exception:
            self._lose_track(end, now)
            return False

    def _open_waiting(self, end: End, tls: Tls, now: float) -> None:
        """Decrypt what has waited for that, and follow it, for a slice of time."""
        first = True
        while tls.unopened and end.reading is _OPEN:
            if not first and monotonic() > self._slice_ends:
                self._queue(end)
                return
            first = False
            raw, sender = tls.unopened[0]
            if self._may_break(end, sender, now):
                self.hold(end, _CHOKED)
                return
            tls.unopened.popleft()
            data = self._open(end, tls, raw, sender)
            if end.flow.phase is Phase.CLOSED:
                return
            if tls.failure is None:
                self.say_for(end, tls)
            if data:
                if sender is not end.sender:
                    self._meet(end, sender)
                held, end.held = end.held, b""
                self._examine(end, held + data, now)
        self._end_encrypted(end, tls)

    def _open(self, end: End, tls: Tls, raw: bytes, sender: Sender | None) -> bytes:
        """Decrypt what one has sent."""
        if tls.is_over or end.flow.phase is Phase.LINGERING:
            return self._open_late(end, tls, raw, sender)
        data = tls.open(raw, sender)
        begun_by = tls.mixed
        if begun_by is not None and sender is not None and begun_by.pid != sender.pid and tls.failure is None:
            self._judging.note_mixed(end, begun_by, sender)
        return data

    def _open_late(self, end: End, tls: Tls, raw: bytes, sender: Sender | None) -> bytes:
        """Decrypt what is sent by a client whose session is over, if it can be."""
        data = tls.open(raw, sender)
        if not data and tls.is_over and end.flow.phase is Phase.LINGERING and not tls.says_no_more_than(_BYE, raw):
            self._endings.note_unreadable(end, sender, len(raw))
        return data

    def say_for(self, end: End, tls: Tls) -> None:
        """Send what TLS has to say because of what has come."""
        words = tls.words()
        if words and end.writing is _WRITABLE:
            end.append_raw(words)
            self.arm(end)
            self.flush(end)

    def _end_encrypted(self, end: End, tls: Tls) -> None:
        """See to the end of a stream that TLS has told, when everything in front of it has been dealt with.

        Whoever has said Terminate says that as well, and others may have the connection open still.
        """
        if tls.is_over and end.reading is _OPEN and not end.pieces:
            tls.unopened.clear()
            if end.is_client and tls.failure is None and _is_terminated(end.flow):
                return
            self._endings.end_of_stream(end, reset=False)

    def _is_of_one(self, end: End, account: TcpAccount, data: bytes, now: float) -> bool:
        """Whether one alone has sent what has been read, who is met; otherwise it is dealt with, piece by piece."""
        pieces = self._whose(end, account, len(data))
        if pieces is None:
            sender = account.account.sender
        elif len(pieces) == 1:
            sender = pieces[0][1]
        else:
            self._judging.stir(end)
            if end.pieces is None:
                end.pieces = deque()
            end.pieces.extend(_parted(data, pieces))
            self._examine_pieces(end, now)
            return False
        if sender is not end.sender:
            self._meet(end, sender)
        return True

    @staticmethod
    def _lose_account(end: End, account: TcpAccount) -> None:
        """Who sends won't be known any more: the account may be of other bytes from now on."""
        note(Loss.SENDER, end.session)
        account.is_lost = True
        end.kernel_account = None

    def _meet(self, end: End, sender: Sender | None) -> None:
        """Somebody else sends now than before."""
        end.sender = sender
        self._judging.meet(end)

    def _examine_pieces(self, end: End, now: float) -> None:
        """Follow what several have sent, one after the other, as far as it is in order and for a slice of time."""
        first = True
        while end.pieces:
            if end.reading is not _OPEN:
                return
            if not first and monotonic() > self._slice_ends:
                self._queue(end)
                return
            first = False
            piece, sender = end.pieces.popleft()
            self._meet(end, sender)
            held, end.held = end.held, b""
            self._examine(end, held + piece, now)
        if end.tls is not None:
            self._open_waiting(end, end.tls, now)

    def go_on(self, end: End) -> None:
        """Go on with what is held of ``end``."""
        self.resume(end)
        now = time()
        held, end.held = end.held, b""
        if held:
            self._examine(end, held, now)
        self._examine_pieces(end, now)

    def _examine(self, end: End, data: bytes, now: float) -> None:
        """Follow what an end has sent for a slice of time, and forward it as far as it is in order."""
        tracker = end.flow.tracker
        size = len(data)
        if tracker is None:
            self._pass_on(end, data, now)
            return
        try:
            if end.is_client:
                done = tracker.frontend(data, 0, size, end.sender, now, _REQUESTS_AT_ONCE)
            else:
                done = tracker.backend(data, 0, size, _ANSWERS_AT_ONCE, apart=end.late)
        except Exception:
            self._lose_track(end, now)
            self._pass_on(end, data, now)
            return
        if done == size:
            self._forward(end, data, 0, size)
            if end.peer.reading is _CHOKED or (end.is_client and len(tracker.ledger.entries) >= FEW):
                self._balance(end, tracker, now)
        else:
            self._examine_on(end, tracker, data, done, now)

    def _examine_on(self, end: End, tracker: Tracker, data: bytes, done: int, now: float) -> None:
        """Go on with what an end has sent, when some of it, or nothing, has been followed."""
        stop = len(data)
        pos = 0
        while done != stop:
            verdict = tracker.verdict
            if verdict is not None:
                if not self._judging.settles(end.session, verdict, now):
                    self._set_aside(end, tracker, now)
                    self._keep(end, data, done, Reading.HELD)
                    self._judging.adjudicate(end, verdict)
                    return
                self._overrule(end, tracker, now)
            elif tracker.lost is not None:
                self.lose(end.flow, end.session, tracker.lost, now)
            elif done != pos and end.late and self._ends_answer(end, tracker, now):
                self.hurry()
                self._keep(end, data, done, Reading.HELD)
                self._judging.let_read(end)
                return
            elif done == pos:  # the rest is too little to be judged
                self._forward(end, data, 0, done)
                end.held = data[done:]
                self._balance(end, tracker, now)
                return
            if end.flow.tracker is None:
                self._pass_on(end, data, now)
                return
            if monotonic() > self._slice_ends or self._is_full(end, tracker, now):
                self._keep(end, data, done, Reading.HELD)
                self._balance(end, tracker, now)
                if end.reading is not _CHOKED:
                    self._queue(end)
                return
            pos = done
            done = self._follow(end, tracker, data, pos, now)
        self._forward(end, data, 0, stop)
        self._balance(end, tracker, now)

    def _follow(self, end: End, tracker: Tracker, data: bytes, pos: int, now: float) -> int:
        """Follow some more messages; the position returned is how far they are in order."""
        try:
            if end.is_client:
                return tracker.frontend(data, pos, len(data), end.sender, now, _REQUESTS_IN_DEPTH)
            return tracker.backend(data, pos, len(data), _ANSWERS_IN_DEPTH, apart=end.late)
        except Exception:
            self._lose_track(end, now)
            return len(data)

    def _ends_answer(self, end: End, tracker: Tracker, now: float) -> bool:
        try:
            return tracker.at_answers_end
        except Exception:
            self._lose_track(end, now)
            return False

    def _pass_on(self, end: End, data: bytes, now: float) -> None:
        """Deal with what an end has sent whose session isn't followed."""
        if end.flow.phase is Phase.LINGERING:
            self._endings.note_late(end, data, now)
        else:
            self._forward(end, data, 0, len(data))

    def _keep(self, end: End, data: bytes, done: int, why: Reading) -> None:
        """Forward what is in order, and hold an end with what is left of its chunk."""
        self._forward(end, data, 0, done)
        end.held = data[done:]
        self.hold(end, why)

    # What a client has the server owe it

    def _is_full(self, end: End, tracker: Tracker, now: float) -> bool:
        """Whether a client has the server owe it too much."""
        try:
            return end.is_client and tracker.fullness() >= 1
        except Exception:
            self._lose_track(end, now)
            return False

    def _balance(self, end: End, tracker: Tracker, now: float) -> None:
        """Read a client no more that has the server owe it too much, and again when that has answered some of it."""
        if tracker is not end.flow.tracker:
            return  # it has failed, and nobody would say that there is room again
        if end.is_client:
            if self._is_full(end, tracker, now):
                self.hold(end, _CHOKED)
        elif end.peer.reading is _CHOKED and self._has_room(end, tracker, now):
            self._queue(end.peer)

    def _has_room(self, end: End, tracker: Tracker, now: float) -> bool:
        tls = end.peer.tls
        try:
            if tls is not None and tls.unopened and tracker.is_answering:
                return False
            return tracker.fullness() <= _ROOM
        except Exception:
            self._lose_track(end, now)
            return False

    # Verdicts

    def _overrule(self, end: End, tracker: Tracker, now: float) -> None:
        try:
            tracker.overrule()
        except Exception:
            self._lose_track(end, now)

    def _set_aside(self, end: End, tracker: Tracker, now: float) -> None:
        try:
            tracker.set_aside()
        except Exception:
            self._lose_track(end, now)

    def _lose_track(self, end: End, now: float) -> None:
        """The tracker has failed."""
        note(Loss.TRACKING, end.session)
        self.lose(end.flow, end.session, FAILED, now)

    def lose(self, flow: Flow, session: ProxiedSession, reason: str, now: float) -> None:
        """Go on forwarding a session that can't be followed any more."""
        if flow.tracker is None:
            return
        flow.tracker = None
        if flow.client.reading is _CHOKED:
            self._queue(flow.client)
        self._judging.lost(session, reason, now)

    # To the other side

    def _forward(self, end: End, data: bytes, begin: i64, stop: i64) -> None:
        """Send what an end has sent, ``data[begin:stop]``, to its peer."""
        if end.swallow:
            swallowed: i64 = min(end.swallow, stop - begin)
            end.swallow -= swallowed
            begin += swallowed
        peer = end.peer
        if begin == stop or peer.writing is not _WRITABLE:
            return
        if not end.is_client:
            self.from_servers += stop - begin
        elif end.flow.phase is _RELAYED:
            self.from_clients += stop - begin
        else:
            self._endings.hear(end, data[begin:stop])
            return
        if len(peer.outgoing):
            peer.append(memoryview(data)[begin:stop])  # when there is room
            return
        if peer.tls is not None:
            data = peer.tls.seal(data if begin == 0 and stop == len(data) else memoryview(data)[begin:stop])
            begin, stop = 0, len(data)
            if not stop:  # it is of no use any more
                return
        try:
            sent: i64 = peer.send_to(peer.sock, data, begin, stop)
        except OSError:
            # The reading side tells the end of it: what the peer sent before it went is still to be read.
            peer.writing = Writing.BROKEN
            return
        if begin + sent != stop:
            peer.outgoing, peer.written = data[:stop], begin + sent
            self.arm(peer)
            self.arm(end)

    def forward_held(self, end: End) -> bool:
        """Send all that is held of ``end`` to its peer; False if there is nothing."""
        held, end.held = end.held, b""
        if held:
            self._forward(end, held, 0, len(held))
        return bool(held)

    def send(self, end: End, words: bytes) -> None:
        """Send an end something more, now or when there is room."""
        end.append(words)
        self.arm(end)
        self.flush(end)

    def flush(self, end: End) -> None:
        """Write what waits for ``end``, and when it is all gone go on with what waited for that."""
        if end.outgoing:
            try:
                end.write()
            except OSError:
                end.drop_outgoing()
                if end.writing is _WRITABLE:
                    end.writing = Writing.BROKEN
            if end.outgoing:
                return
        if end.peer.reading is _ENDED:
            self._endings.pass_end_on(end)
        if end.flow.phase is not Phase.CLOSED:
            self.arm(end)
            if not (end.is_client and end.flow.phase is not _RELAYED):
                self.arm(end.peer)


def _parted(data: bytes, pieces: list[Segment]) -> list[tuple[bytes, Sender | None]]:
    """What several have sent, one piece after the other, each with who has sent it."""
    parted: list[tuple[bytes, Sender | None]] = []
    at = 0
    for length, whose in pieces:
        parted.append((data[at : at + length], whose))
        at += length
    return parted


def _is_terminated(flow: Flow) -> bool:
    """Whether a client's session is over, by its own doing or the server's."""
    tracker = flow.tracker
    return flow.phase is not _RELAYED or (tracker is not None and tracker.terminated)


def _is_busy(flow: Flow, session: ProxiedSession) -> bool:
    """Whether the server owes its client an answer; False if that isn't known."""
    try:
        return flow.tracker is not None and not flow.tracker.idle
    except Exception:
        note(Loss.STEP, session)
        return False
