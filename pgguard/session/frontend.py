"""The client's stream: each message that has an answer is entered into the ledger, or there is a verdict on it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final, final

from pgguard.identity import Sender
from pgguard.session import libpq
from pgguard.session.ledger import NOTHING
from pgguard.session.session import ill_formed, seen, torn_end
from pgguard.session.states import COPY_IN, IN_COPY_IN, NO_REQUEST, OWED, Owes
from pgguard.session.verdicts import AFTER_END, Direction, Kind, MessageSeen, RequestState
from pgguard.wire.messages import FRONTEND, HEADER_SIZE, SMALL, UNKNOWN, by_code, parse_header, part

if TYPE_CHECKING:
    from mypy_extensions import i64

    from pgguard.session.requests import Request
    from pgguard.session.session import Session
    from pgguard.session.statements import Closing, Statement
    from pgguard.session.verdicts import Verdict

# The tables, compiled for the loop: indexed by type byte instead of dictionaries of characters, and bytes where numbers
# are small, as in :mod:`pgguard.session.backend`.

_MESSAGES: Final = by_code(FRONTEND)
_UNANSWERED: Final = 0
_SIMPLE: Final = 1
_EXTENDED: Final = 2


def _way(code: str) -> int:
    """How a message is taken."""
    return _SIMPLE if code in "QF" else _EXTENDED if code in "PBCDES" else _UNANSWERED


_LEAST: Final = bytes(message.least for message in _MESSAGES)
_MOST: Final[list[i64]] = [message.most for message in _MESSAGES]
"""The limits of the length word."""
_SHORT: Final = bytes(min(message.most, 0xFF) for message in _MESSAGES)
"""The upper one, or what nearly all messages keep to."""
_LOOK: Final[list[i64]] = [message.look for message in _MESSAGES]
"""How many bytes are looked at."""
_SHORT_LOOK: Final = bytes(min(message.look, 0xFF) for message in _MESSAGES)
"""The same, where that is less than 255."""
_WAYS: Final = bytes(_way(chr(code)) for code in range(256))
"""How it is taken."""
_OWED: Final = bytes(OWED.get(chr(code), Owes.NOTHING) for code in range(256))
_COPYING_IN: Final = bytes(state in COPY_IN for state in Owes)
_IN_COPY_IN: Final = bytes(chr(code) in IN_COPY_IN for code in range(256))

_COPY_BOTH: Final[i64] = int(Owes.QUERY_COPY_BOTH)
_LOGIN: Final[i64] = int(Owes.LOGIN)
_DESCRIBE_STATEMENT: Final[i64] = int(Owes.DESCRIBE_STATEMENT)

_BIND: Final[i64] = ord("B")
_CLOSE: Final[i64] = ord("C")
_COPY_DATA: Final[i64] = ord("d")
_DESCRIBE: Final[i64] = ord("D")
_EXECUTE: Final[i64] = ord("E")
_FLUSH: Final[i64] = ord("H")
_PARSE: Final[i64] = ord("P")
_PASSWORD_MESSAGE: Final[i64] = ord("p")
_QUERY: Final[i64] = ord("Q")
_SYNC: Final[i64] = ord("S")
_STATEMENT: Final[i64] = ord("S")
_PORTAL: Final[i64] = ord("P")
_TERMINATE_CODE: Final[i64] = ord("X")


_NOBODY: Final[frozenset[int | None]] = frozenset()
_FLUSHES: Final = b"H\0\0\0\4" * 64


def _seen(code: i64, length: i64) -> MessageSeen:
    """One of these messages for a verdict."""
    return seen(Direction.FRONTEND, _MESSAGES[code], code, length)


def _flushes_behind(chunk: bytes, pos: i64, end: i64) -> int:
    """How many bytes of more Flushes there are behind one: they ask for what has been asked for.

    The server needs less time for one than it takes to look at it here.
    """
    first = stop = pos + HEADER_SIZE
    while chunk.startswith(_FLUSHES, stop, end):
        stop += len(_FLUSHES)
    return stop - first


@final
class FrontendStream:
    """Follows the client's messages of one session; see :class:`pgguard.session.tracker.Tracker`.

    Args:
        session: what it shares with the other direction.
        sender: who sent the StartupMessage, if the kernel said so.
    """

    __slots__ = (
        "_code",
        "_fed",
        "_held",
        "_held_by",
        "_late",
        "_late_by",
        "_ledger",
        "_length",
        "_sender",
        "_session",
        "_simple",
        "_statements",
        "_swallowing",
        "overruled",
        "rest",
    )

    def __init__(self, session: Session, sender: Sender | None) -> None:
        self.rest: i64 = 0
        """Bytes still to come of a message that has been judged."""
        self._code: i64 = 0
        self._length: i64 = 0
        """The type and the length word of the last of which there were any."""
        self.overruled: Kind | None = None
        """The next message is to be taken whatever is wrong with it: the kind of the verdict that was overruled."""
        self._session = session
        self._ledger = session.ledger
        self._statements = session.statements
        self._sender = sender
        """Who sent the chunk that is being followed; ``None`` if the kernel didn't say."""
        self._held_by: Sender | None = None
        """Who sent the bytes that were left with the caller."""
        self._held: i64 = 0
        """How many they were."""
        self._swallowing = False
        """What is still to come of a message is kept from the server."""
        self._simple: Request | None = None
        """The last simple Query or FunctionCall."""
        self._fed: Request | None = None
        """The request that stood first when the last CopyData was sent, until CopyDone or CopyFail is."""
        self._late: frozenset[int | None] = _NOBODY
        """The pids of those that have used the connection after its end: judged once each."""
        self._late_by: int | None = None
        """Who sent what was last followed after the end: the next messages of another begin with its own bytes."""

    def follow(  # noqa: C901, PLR0912, PLR0915 - as of the server's stream
        self, chunk: bytes, start: i64, end: i64, sender: Sender | None, at: float, most: i64
    ) -> i64:
        """Follow ``chunk[start:end]``, messages that begin in ``most`` bytes; returns how far it is in order."""
        session = self._session
        ledger = self._ledger
        if session.over or self._swallowing:
            return self._pass_by(chunk, start, end, sender)
        if (sender is not self._sender or self._held_by is not None) and not self._accept_sender(
            chunk, start, end, sender
        ):
            return start
        pos = start + self.rest
        last = end - HEADER_SIZE
        if last - start >= most:
            last = start + most - 1
        code: i64 = -1  # no message has been looked at
        length: i64 = 0
        count: i64 = 0
        while pos <= last:
            code, length = parse_header(chunk, pos)
            way = _WAYS[code]
            if not _LEAST[code] <= length <= _SHORT[code] and not self._accept_length(pos, code, length):
                break
            look: i64 = _SHORT_LOOK[code]
            if look == 0xFF:
                look = _LOOK[code]
            stop = pos + (look if length >= look else 1 + length)
            if stop > end:
                break
            if _COPYING_IN[ledger.state] and not _IN_COPY_IN[code] and ledger.copying_in:
                text = libpq.invalid_type(code, copy_in=True)
                taken = self._out_of_place(pos, code, length, "while the server expected COPY data", text)
            elif way == _EXTENDED:
                taken = self._extended_message(chunk, pos, stop, code, length, at)
            elif way == _SIMPLE:
                taken = self._simple_request(chunk, pos, stop, code, length, at)
            else:
                taken = self._unanswered_message(pos, code, length)
                if code == _FLUSH:
                    behind = _flushes_behind(chunk, pos, end)
                    pos += behind
                    count += behind // HEADER_SIZE
            if not taken:
                break
            self.overruled = None
            pos += 1 + length
            count += 1
            if code == _TERMINATE_CODE:
                break  # nobody reads what is behind it
        session.frontend_messages += count
        if pos <= end:
            self.rest = 0
            self._held_by = sender if pos < end else None
            self._held = end - pos
            return self._follow_late(chunk, pos, end, sender) if session.terminated else pos
        self.rest = pos - end
        self._held_by = None
        if code >= 0:
            self._code, self._length = code, length
        return end

    def swallow(self, message: MessageSeen) -> None:
        """Pass over a message that was judged, as if it had never been sent, by whomever."""
        self.rest = message.size
        self._swallowing = True
        self._code, self._length = ord(message.type or "\0"), message.size - 1
        self._sender = self._session.senders.latest
        self._held_by = None
        self._held = 0

    def _pass_by(self, chunk: bytes, start: i64, end: i64, sender: Sender | None) -> int:
        """Go on with what has no effect: a message that is swallowed, up to its end, or what comes too late."""
        if not self._swallowing:
            return self._follow_late(chunk, start, end, sender)
        passed = min(self.rest, end - start)
        self.rest -= passed
        self._swallowing = self.rest > 0
        return start + passed

    def end(self, held_back: int, *, reset: bool) -> list[Verdict]:
        """The stream has ended: what was wrong with that."""
        session = self._session
        session.left = True
        if session.over or not session.logged_in:
            return []
        state = self._ledger.state
        if reset and (session.requests == 0 or state in (Owes.QUERY_COPY_BOTH, Owes.QUERY_COPIED_BOTH)):
            return []
        verdicts: list[Verdict] = []
        open_request = self._ledger.works()
        if self.rest or held_back:
            open_request = True
            reason, message = torn_end("client", self.rest, _seen(self._code, self._length), held_back)
            verdicts.append(session.judge(Kind.PROTOCOL_VIOLATION, reason, message, 0, intruder=self._sender))
        if open_request:
            when = "in the middle of a request"
        elif session.in_transaction:
            when = "with a transaction open"
        elif not session.idle:
            when = "with no work in progress, before its last messages were answered"
        else:
            when = "between two requests"
        verdicts.append(
            session.judge(
                Kind.UNCLEAN_CLOSE,
                f"the client's side ended without Terminate, {when}",
                None,
                0,
                intruder=self._sender,
                open_request=open_request,
            )
        )
        return [replace(verdict, ends=True) for verdict in verdicts]

    # Messages

    def _unanswered_message(self, pos: i64, code: i64, length: i64) -> bool:
        """Take a message that nothing is owed for; False when there is a verdict on it instead."""
        if code in b"dcf":
            return self._copy_message(pos, code, length)
        if code == _FLUSH:
            self._ledger.flush()
            return True
        if code == _PASSWORD_MESSAGE:
            if self._ledger.state != _LOGIN:
                text = libpq.invalid_type(code, copy_in=False)
                return self._out_of_place(pos, code, length, "although no authentication was in progress", text)
        elif code == _TERMINATE_CODE:
            if self._is_foreign_goodbye(pos, length) or self._cuts_copy_short(pos, length):
                return False
            self._session.terminated = self._session.over = True
            self._session.terminator = self._sender
        return True

    def _follow_late(self, chunk: bytes, start: i64, end: i64, sender: Sender | None) -> int:
        """Follow what comes when the session is over, and can have no effect: who else uses the connection still?

        Terminate is no use: several that have the connection open may all say it, as pg_basebackup and its child do
        when they exit, and only the first does harm.
        """
        session = self._session
        pid = None if sender is None else sender.pid
        pos = start
        if self._held_by is not None and self._held_by.pid != pid:
            pos += self._held
        elif self._late_by == pid:
            pos += self.rest
        self._late_by = pid
        self._held_by = None
        if not self._is_late(sender):
            self.rest = 0
            return end
        while end - pos >= HEADER_SIZE:
            code, length = parse_header(chunk, pos)
            if code != _TERMINATE_CODE or not _LEAST[code] <= length <= _MOST[code]:
                self._late |= {pid}
                session.verdict = self._judge_late(_seen(code, length), pos, sender)
                return pos
            pos += 1 + length
        self.rest = max(0, pos - end)
        if pos < end:
            self._held_by = sender
            self._held = end - pos
        return min(pos, end)

    def _is_late(self, sender: Sender | None) -> bool:
        """Whether somebody who uses the connection after the session's end has no right to, and isn't known to."""
        session = self._session
        if sender is None:
            return session.asks_goodbye and session.terminated and None not in self._late
        last = session.terminator if session.terminated else session.senders.latest
        return last is not None and last.pid != sender.pid and sender.pid not in self._late

    def judge_late(self, message: MessageSeen, sender: Sender | None) -> Verdict | None:
        """The verdict on what has come after the session's end and can't be followed, if it is one on its sender."""
        if not self._is_late(sender):
            return None
        self._late |= {None if sender is None else sender.pid}
        return self._judge_late(message, 0, sender)

    def _judge_late(self, message: MessageSeen, pos: i64, sender: Sender | None) -> Verdict:
        senders = self._session.senders
        if self._session.terminated or sender is None:
            kind, reason = Kind.SHARED_BY_PROCESSES, AFTER_END
            requesters = senders.others(sender, first=self._session.terminator)
        else:
            kind, reason, requesters = senders.change(sender, waiting=None, torn=None, first=None)
        verdict = self._session.judge(
            kind, reason, message, pos, intruder=sender, requesters=requesters, libpq=libpq.CLOSED
        )
        return replace(verdict, ends=True)

    def _is_foreign_goodbye(self, pos: i64, length: i64) -> bool:
        """Whether a Terminate is one that whoever sent it may have no right to: a verdict, then."""
        if self.overruled is not None or not self._may_be_foreign(self._sender):
            return False
        self._session.verdict = self.judge_goodbye(_seen(_TERMINATE_CODE, length), pos, self._sender)
        return True

    def judge_goodbye(self, message: MessageSeen, pos: i64, sender: Sender | None) -> Verdict | None:
        """The verdict on what ends the session, if whoever sent it may have no right to."""
        if not self._may_be_foreign(sender):
            return None
        return self._session.judge(
            Kind.FOREIGN_TERMINATE,
            f"{message.name} came from a process other than the one that opened the connection",
            message,
            pos,
            intruder=sender,
            libpq=libpq.CLOSED,
        )

    def _may_be_foreign(self, sender: Sender | None) -> bool:
        """Whether this one may have no right to end the session."""
        session = self._session
        return session.asks_goodbye if sender is None else session.senders.is_strange(sender)

    def _cuts_copy_short(self, pos: i64, length: i64) -> bool:
        """Whether a Terminate comes in the middle of copy data: a verdict, then.

        The server takes it for an error, and none of what it has read is kept: ``CopyGetData()`` in
        ``copyfromparse.c``. That a client stops a stream of replication with it is the usual end of one.
        """
        session = self._session
        ledger = self._ledger
        if ledger.state == _COPY_BOTH or not ledger.copying_in or ledger.first() is not self._fed:
            return False
        # One from a stranger has been judged. One of which nobody knows who sent it may have been acquitted.
        if self.overruled is not None and (self.overruled is not Kind.FOREIGN_TERMINATE or self._sender is not None):
            return False
        session.verdict = session.judge(
            Kind.UNCLEAN_CLOSE,
            "Terminate came in the middle of COPY data, which the server throws away",
            _seen(_TERMINATE_CODE, length),
            pos,
            intruder=self._sender,
            open_request=True,
        )
        return True

    def _simple_request(self, chunk: bytes, pos: i64, stop: i64, code: i64, length: i64, at: float) -> bool:
        ledger = self._ledger
        session = self._session
        if ledger.state != NOTHING:
            busy = next((other for other in ledger.asked() if not self._elsewhere(other.sender)), None)
            if busy is not None and self._overlaps(busy, chunk, pos, stop, length):
                return False
        request = self._simple = session.new_request(code, at, self._sender)
        if code == _QUERY:
            request.sql_cut = cut = chunk[stop - 1] != 0
            request.sql = sql = part(chunk, pos + HEADER_SIZE, stop if cut else stop - 1)
            if self._statements.watching:
                self._statements.query(sql, cut=cut)
        else:
            self._statements.call()
        session.unsynced = None
        session.copy_over = False
        ledger.enter(_OWED[code], request)
        return True

    def _extended_message(  # noqa: C901, PLR0912 - as above
        self, chunk: bytes, pos: i64, stop: i64, code: i64, length: i64, at: float
    ) -> bool:
        owes = _OWED[code]
        target: i64 = 0
        if code == _DESCRIBE or code == _CLOSE:  # noqa: SIM109, PLR1714 - in a tuple takes longer
            target = chunk[pos + HEADER_SIZE] if stop - pos > HEADER_SIZE else 0
            if target == _STATEMENT:
                owes = _DESCRIBE_STATEMENT if code == _DESCRIBE else owes
            elif target != _PORTAL:
                why = "with neither a statement nor a portal to act on"
                if not self._out_of_place(pos, code, length, why, None):
                    return False
        ledger = self._ledger
        session = self._session
        request = session.unsynced
        if request is not None and (request.sender is self._sender or not self._another(request.sender)):
            request.add(code)
        else:
            busy = None if self._simple is None else self._busy_with_simple()
            if busy is not None and self._overlaps(busy, chunk, pos, stop, length):
                return False
            continued = request is not None
            request = session.unsynced = session.new_request(code, at, self._sender)
            if code != _SYNC and not continued:
                session.copy_over = False
        named: Statement | Closing | None = None
        if code == _SYNC:
            session.unsynced = None
            ledger.skipping = False
            if _COPYING_IN[ledger.state] and ledger.copying_in:
                ledger.enter_in_copy(request)
                return True
        elif code != _EXECUTE and target != _PORTAL and not ledger.skipping:
            statements = self._statements
            body = pos + HEADER_SIZE
            if code == _BIND:
                named = statements.bind(request, chunk, body, stop)
            elif code == _PARSE:
                named = statements.parse(request, chunk, body, stop)
            elif code == _DESCRIBE:
                named = statements.describe(chunk, body, stop)
            else:
                named = statements.close(chunk, body, stop)
        ledger.enter(owes, request, named)
        return True

    def _copy_message(self, pos: i64, code: i64, length: i64) -> bool:
        """CopyData, CopyDone or CopyFail: in place while a COPY is, or may be, or has just been, going on."""
        ledger = self._ledger
        if ledger.may_copy_in:
            if code == _COPY_DATA:
                self._fed = ledger.first()
            else:
                self._fed = None
                ledger.end_copy_data()
            return True
        if self._session.copy_over or self._session.copied or ledger.skipping:
            return True
        return self._out_of_place(pos, code, length, "although no COPY was in progress", None)

    def _busy_with_simple(self) -> Request | None:
        """The last simple Query or FunctionCall, if the server is still to answer it and not reading its copy data."""
        simple = self._simple
        if simple is None or simple.begun or simple.ended is RequestState.SKIPPED or self._ledger.copying_in:
            return None
        return None if self._elsewhere(simple.sender) else simple

    def _overlaps(self, busy: Request, chunk: bytes, pos: i64, stop: i64, length: i64) -> bool:
        """Whether a request sent before ``busy`` has been answered is a fault: a verdict, then."""
        session = self._session
        if self.overruled is not None:
            return False
        sender = self._sender
        code = chunk[pos]
        message = _seen(code, length)
        session.verdict = session.judge(
            Kind.REQUEST_WHILE_BUSY,
            f"{message.name} was sent before the answer to request {busy.n} ({busy.messages}) was complete",
            message,
            pos,
            intruder=sender,
            requesters=session.senders.others(sender, first=busy.sender),
            libpq=libpq.while_idle(libpq.first_answer(chr(code), chunk[pos + HEADER_SIZE : stop])),
        )
        return True

    def _out_of_place(self, pos: i64, code: i64, length: i64, why: str, text: str | None) -> bool:
        """A message that is not allowed here: a verdict, unless that has been overruled."""
        session = self._session
        if self.overruled is not None:
            return True
        message = _seen(code, length)
        reason = f"the client sent {message.name} {why}"
        session.verdict = session.judge(
            Kind.PROTOCOL_VIOLATION, reason, message, pos, intruder=self._sender, libpq=text
        )
        return False

    def _accept_length(self, pos: i64, code: i64, length: i64) -> bool:
        """Judge a message that isn't short: True to go on with it."""
        return _LEAST[code] <= length <= _MOST[code] or self._accept_frame(pos, code, length)

    def _accept_frame(self, pos: i64, code: i64, length: i64) -> bool:
        """Judge a message of unknown type or impossible length: True to go on with it all the same."""
        session = self._session
        known = _MESSAGES[code] is not UNKNOWN
        message = _seen(code, length)
        what = ill_formed(message, length, known=known)
        if self.overruled is not None:
            framed = known and HEADER_SIZE - 1 <= length <= max(_MESSAGES[code].most, SMALL)
            if not framed:
                session.lost = f"the client sent {what}, after which message boundaries can't be found"
            return framed
        text = None if known else libpq.invalid_type(code, copy_in=self._ledger.copying_in)
        session.verdict = session.judge(
            Kind.PROTOCOL_VIOLATION, f"the client sent {what}", message, pos, intruder=self._sender, libpq=text
        )
        return False

    # Who sends

    def _elsewhere(self, other: Sender | None) -> bool:
        """Whether the current sender is another process than that one: judged when its bytes arrived."""
        return self._sender is not None and other is not None and self._sender.pid != other.pid

    def _another(self, other: Sender | None) -> bool:
        """Whether the current sender is another thread than that one, as far as both are known."""
        sender = self._sender
        if sender is None or other is None:
            return False
        return sender.pid != other.pid or (None not in (sender.tid, other.tid) and sender.tid != other.tid)

    def _accept_sender(self, chunk: bytes, start: i64, end: i64, sender: Sender | None) -> bool:
        """Take note that these bytes have another sender than the last: False when that is a verdict."""
        session = self._session
        held_by = self._held_by
        split = sender is not None and held_by is not None and held_by.pid != sender.pid
        if sender is None or not (session.senders.changes(sender) or split):
            self._sender = sender
            return True
        torn = None
        least = length = most = look = code = 0
        first = session.senders.latest
        if self.rest:
            message = _seen(self._code, self._length)
            torn = message.name
        elif split:
            first = held_by
            # Of a header that is torn itself only so much is known as there is of it.
            whole = self._held >= HEADER_SIZE
            code, length = parse_header(chunk, start) if whole else (chunk[start], self._held - 1)
            message = _seen(code, length)
            torn = message.name
        elif end - start < HEADER_SIZE:
            return True  # too little to say what is sent: judged when more is there
        else:
            code, length = parse_header(chunk, start)
            least, most, look = _LEAST[code], _MOST[code], _LOOK[code]
            if least <= length <= most and end - start < min(1 + length, look):
                return True
            if code == _TERMINATE_CODE and (session.senders.is_strange(sender) or self._waiting(sender) is None):
                self._sender = sender
                return True  # not a use, but an end: judged as such, or when somebody goes on
            message = _seen(code, length)
        waiting = self._waiting(sender)
        session.several_read = True
        change = session.senders.change(sender, waiting=waiting, torn=torn, first=first if torn else waiting)
        self._sender = self._held_by = sender
        answer = None
        if torn is None and change.kind is Kind.SHARED_BY_PROCESSES and least <= length <= most:
            answer = libpq.first_answer(chr(code), chunk[start + HEADER_SIZE : start + min(1 + length, look)])
        session.verdict = session.judge(
            change.kind,
            change.reason,
            message,
            start,
            intruder=sender,
            requesters=change.requesters,
            libpq=libpq.while_idle(answer),
        )
        return False

    def _waiting(self, sender: Sender) -> Sender | None:
        """The first other process that an answer is due to; the last, if it is the opener that doesn't wait for it."""
        opener = self._session.senders.opener
        entries = list(self._ledger.queue())
        for owes, request, _ in reversed(entries) if opener is not None and opener.pid == sender.pid else entries:
            if owes == _LOGIN or owes not in NO_REQUEST:
                other = request.sender
                if other is not None and other.pid != sender.pid:
                    return other
        return None
