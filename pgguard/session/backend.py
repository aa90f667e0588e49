"""The server's stream: each message is paid against the ledger, or there is a verdict on it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final, final

from pgguard.session import libpq
from pgguard.session.ledger import NOTHING
from pgguard.session.refusals import REFUSAL_LOOK, TOO_MANY_CONNECTIONS, reason_of, refusal_of
from pgguard.session.session import ill_formed, seen, torn_end
from pgguard.session.statements import Named, Statement
from pgguard.session.states import ANSWERS, ASYNCHRONOUS, COPY_IN, Owes
from pgguard.session.verdicts import Direction, Kind, MessageSeen, Party, RequestState
from pgguard.wire.fields import parse_fields, parse_severity
from pgguard.wire.messages import BACKEND, HEADER_SIZE, READY_SIZE, SHORT, UNKNOWN, by_code, parse_header

if TYPE_CHECKING:
    from mypy_extensions import i64

    from pgguard.session.session import Session
    from pgguard.session.verdicts import Verdict

# The tables, compiled for the loop: indexed by state and type byte instead of dictionaries of characters. They are
# bytes where numbers are small: a line of the processor's cache holds those of all common messages.

_MESSAGES: Final = by_code(BACKEND)

_PAID: Final[i64] = int(Owes.PAID)
_SKIP: Final[i64] = int(Owes.SKIP)
_UNDUE: Final = 0xFF
_SPECIAL: Final = 0xFE
_READY: Final = 0xFD

_EXISTS: Final = "42P05"
_DOES_NOT_EXIST: Final = "26000"
_ABOUT_STATEMENTS: Final = frozenset({_EXISTS, _DOES_NOT_EXIST})
"""duplicate_prepared_statement and invalid_sql_statement_name: PostgreSQL documentation, appendix A."""
_STATUS: Final = [chr(code) for code in range(256)]
_APPLICATION_NAME: Final = b"application_name\0"
"""What the ParameterStatus of the one parameter begins with that is of interest here."""
_ERROR_RESPONSE: Final[i64] = ord("E")
_BACKEND_KEY_DATA: Final[i64] = ord("K")
_PARAMETER_STATUS: Final[i64] = ord("S")
_READY_FOR_QUERY: Final[i64] = ord("Z")

_FOLLOWS: Final = [
    bytes(
        int(state) if chr(code) in ASYNCHRONOUS else int(ANSWERS.get(state, {}).get(chr(code), _UNDUE))
        for code in range(256)
    )
    for state in Owes
]
"""The state that follows, ``_PAID``, ``_SKIP`` or ``_UNDUE``."""


def _plain(state: Owes, code: i64) -> int:
    """What follows, as far as that takes no closer look.

    ``_READY`` is ``_PAID`` by a ReadyForQuery; ``_SPECIAL`` is all that isn't due, is looked into, is in doubt, or
    begins or ends a COPY FROM STDIN.
    """
    follows = _FOLLOWS[state][code]
    if code == _READY_FOR_QUERY and follows == _PAID and state != Owes.MAYBE_SYNC:
        return _READY
    if follows == _UNDUE or chr(code) in "EKSZ":
        return _SPECIAL
    if follows != state and (state in COPY_IN or follows in COPY_IN):
        return _SPECIAL
    return follows


_ROWS: Final = bytes(_plain(state, code) for state in Owes for code in range(256))
"""What follows, by state and type byte: a row of 256 for each state."""
_LEAST: Final = bytes(message.least for message in _MESSAGES)
_MOST: Final[list[i64]] = [message.most for message in _MESSAGES]
"""The limits of the length word."""
_SHORT: Final = bytes(min(message.most, 0xFF) for message in _MESSAGES)
"""The upper one, or what nearly all messages keep to."""

_COPYING_IN: Final = bytes(state in COPY_IN for state in Owes)
_LOGIN: Final[i64] = int(Owes.LOGIN)
_PARSE: Final[i64] = int(Owes.PARSE)
_USES: Final = (int(Owes.BIND), int(Owes.DESCRIBE_STATEMENT))
_FUNCTION_CALL: Final[i64] = int(Owes.FUNCTION_CALL)


def _seen(code: i64, length: i64) -> MessageSeen:
    """One of these messages for a verdict."""
    return seen(Direction.BACKEND, _MESSAGES[code], code, length)


@final
class BackendStream:
    """Follows the server's messages of one session; see :class:`pgguard.session.tracker.Tracker`."""

    __slots__ = ("_code", "_ledger", "_length", "_session", "_unframed", "overruled", "rest")

    def __init__(self, session: Session) -> None:
        self.rest: i64 = 0
        """Bytes still to come of a message that has been judged."""
        self._code: i64 = 0
        self._length: i64 = 0
        """The type and the length word of the last of which there were any."""
        self.overruled: Kind | None = None
        """The next message is to be taken whatever is wrong with it: the kind of the verdict that was overruled."""
        self._unframed = False
        """It refuses its client in a text without a length, and that is all that comes."""
        self._session = session
        self._ledger = session.ledger

    # A call for each kind of message would take 50 ns of each, uncompiled.
    def follow(self, chunk: bytes, start: i64, end: i64, most: i64, apart: bool) -> i64:  # noqa: C901, PLR0912, PLR0915
        """Follow ``chunk[start:end]``, messages that begin in ``most`` bytes; returns how far it is in order."""
        pos = start + self.rest
        session = self._session
        ledger = self._ledger
        state = ledger.state
        row = state << 8
        last = end - HEADER_SIZE
        if last - start >= most:
            last = start + most - 1
        code: i64 = -1  # no message has been looked at
        length: i64 = 0
        same: i64 = -1  # the type of the one in front of it, if that has changed nothing, as a row doesn't
        least: i64 = 0
        longest: i64 = 0
        count: i64 = 0
        while pos <= last:
            code, length = parse_header(chunk, pos)
            count += 1
            if code == same and least <= length <= longest:
                pos += 1 + length
                continue
            follows: i64 = _ROWS[row | code]
            least = _LEAST[code]
            fits = least <= length and (length <= _SHORT[code] or length <= _MOST[code])
            if follows == state and fits:
                same, longest = code, _MOST[code]
                pos += 1 + length
                continue
            same = -1
            if follows == _SPECIAL or not fits:
                if not self._special(chunk, pos, end, code, length):
                    count -= 1
                    break
            elif follows == _PAID:
                ledger.pay()
            elif follows == _READY:
                if end - pos < READY_SIZE:
                    count -= 1
                    break  # its status is still to come
                session.transaction_status = _STATUS[chunk[pos + HEADER_SIZE]]
                ledger.pay()
            else:
                ledger.state = follows
            state = ledger.state
            row = state << 8
            if code == _READY_FOR_QUERY:
                session.answer_ended = session.position + pos - start + READY_SIZE
                if apart:
                    pos += 1 + length
                    break
            pos += 1 + length
        session.backend_messages += count
        if pos <= end:
            self.rest = 0
            session.position += pos - start
            return pos
        self.rest = pos - end
        session.position += end - start
        if code >= 0:
            self._code, self._length = code, length
        return end

    def swallow(self, message: MessageSeen) -> None:
        """Pass over a message that was judged, as if it had never been sent."""
        self.rest = message.size
        self._code, self._length = ord(message.type or "\0"), message.size - 1
        self._session.position -= message.size

    def end(self, held_back: int) -> Verdict | None:
        """The stream has ended: a verdict if that was in the middle of a message, with the client still there."""
        session = self._session
        session.over = True
        if session.left or session.terminated or self._unframed or not (self.rest or held_back):
            return None
        reason, message = torn_end("server", self.rest, _seen(self._code, self._length), held_back)
        verdict = session.judge(Kind.PROTOCOL_VIOLATION, reason, message, libpq=libpq.CLOSED)
        return replace(verdict, by=Party.SERVER, ends=True)

    def _special(self, chunk: bytes, pos: i64, end: i64, code: i64, length: i64) -> bool:
        """Take a message that takes more than its row.

        Returns False when it can't be taken: there is a verdict on it, the session is lost, or more of it is needed.
        """
        session = self._session
        ledger = self._ledger
        refused = code == _ERROR_RESPONSE and ledger.state == _LOGIN
        if refused and length > SHORT:  # libpq takes it for a text as well: PQconnectPoll() in fe-connect.c
            self._unframed = True
            session.goodbye = session.over = True
            ledger.clear()
            return True
        message = _MESSAGES[code]
        well_formed = message.least <= length <= message.most
        if not well_formed and not self._accept_frame(pos, code, length):
            return False
        size = min(1 + length, HEADER_SIZE + REFUSAL_LOOK if refused else message.look)
        if end - pos < size:
            return False
        follows = _FOLLOWS[ledger.state][code]
        while follows == _UNDUE and ledger.step_aside():
            follows = _FOLLOWS[ledger.state][code]
        body = chunk[pos + HEADER_SIZE : pos + size] if well_formed else b""
        if code == _READY_FOR_QUERY:
            taken = self._ready_for_query(body, pos, follows)
        elif code == _ERROR_RESPONSE:
            taken = self._error_response(body, pos, length, follows)
        elif code == _PARAMETER_STATUS:
            taken = True
            if body.startswith(_APPLICATION_NAME):
                value = body[len(_APPLICATION_NAME) :].partition(b"\0")[0]
                session.application_name = value.decode("utf-8", "replace") or None
        elif follows == _UNDUE:
            taken = self._accept_undue(pos, code, length)
        else:
            taken = True
            if code == _BACKEND_KEY_DATA and body:
                session.key_data = body
            self._move_head(follows)
        if taken:
            self.overruled = None
        return taken

    def _move_head(self, follows: i64) -> None:
        ledger = self._ledger
        state = ledger.state
        if _COPYING_IN[follows] and follows != state:
            ledger.enter_copy_in(follows)
            return
        if _COPYING_IN[state] and follows != state:
            ledger.leave_copy_in()
            self._session.copied = True
        if follows == _PAID:
            ledger.pay()
        else:
            ledger.state = follows

    def _ready_for_query(self, status: bytes, pos: i64, follows: i64) -> bool:
        ledger = self._ledger
        session = self._session
        if follows == _PAID:
            if not ledger.ready():
                session.lost = (
                    "a COPY failed, and the guard can't tell whether the server executed what was sent after it"
                )
                return False
        elif not self._accept_undue(pos, _READY_FOR_QUERY, 5):
            return False
        elif ledger.state != NOTHING:
            # It came too early: take it for the end of the request at the head.
            request = ledger.first()
            while ledger.state != NOTHING and ledger.first() is request:
                ledger.pay()
        if status:
            session.transaction_status = chr(status[0])
        return True

    def _error_response(self, body: bytes, pos: i64, length: i64, follows: i64) -> bool:
        ledger = self._ledger
        session = self._session
        severity = parse_severity(body)
        if ledger.state == _LOGIN and severity.sqlstate == TOO_MANY_CONNECTIONS and self.overruled is None:
            self._refuse(body, pos, length)
            return False
        if ledger.state == _LOGIN or severity.ends_session:
            session.goodbye = session.over = True
            ledger.clear()
            return True
        if (
            severity.sqlstate in _ABOUT_STATEMENTS
            and follows == _SKIP
            and self._contradicts(severity.sqlstate, pos, length)
        ):
            return False
        if follows != _UNDUE:
            ledger.first().ended = RequestState.FAILED
        elif ledger.state == NOTHING and session.unsynced is not None:
            follows = _SKIP  # the error that is reported when a Flush is read
        else:
            return self._accept_undue(pos, _ERROR_RESPONSE, length)
        session.copy_over = True
        if follows == _SKIP:
            ledger.skip_to_sync(session.statements.refuse)
        else:
            ledger.state = follows
        return True

    def _refuse(self, body: bytes, pos: i64, length: i64) -> None:
        """Judge a login that is refused because no slot is left."""
        session = self._session
        fields = parse_fields(body)
        refusal = refusal_of(fields, user=session.user, database=session.database, replication=session.replication)
        verdict = session.judge(
            Kind.CONNECTION_EXHAUSTION,
            reason_of(refusal, fields.get("M", "")),
            _seen(_ERROR_RESPONSE, length),
            pos,
            open_request=False,
        )
        session.verdict = replace(verdict, by=Party.CLIENT, ends=True, refusal=refusal)

    def _contradicts(self, sqlstate: str, pos: i64, length: i64) -> bool:
        """Whether an error about a prepared statement contradicts what this session has done: a verdict, then."""
        owes, _, named = next(self._ledger.queue())
        if self.overruled is not None or not isinstance(named, Statement):
            return False
        statements = self._session.statements
        name = named.name.decode("utf-8", "replace")
        if sqlstate == _EXISTS and owes == _PARSE and statements.contradicts_existence(named):
            done = "has closed it" if isinstance(named, Named) and named.closed is not None else "never made it"
            text = f'prepared statement "{name}" already exists'
            reason = f"the server says that {text}, but this session {done}"
        elif sqlstate == _DOES_NOT_EXIST and owes in _USES and statements.contradicts_absence(named):
            what = f'prepared statement "{name}"' if name else "unnamed prepared statement"
            text = f"{what} does not exist"
            made = "but this session made it and has not closed it"
            reason = f"the server says that {'' if name else 'the '}{text}, {made}"
        else:
            return False
        session = self._session
        message = _seen(_ERROR_RESPONSE, length)
        session.verdict = session.judge(Kind.SESSION_STATE_LOST, reason, message, pos, libpq=text)
        return True

    def _accept_undue(self, pos: i64, code: i64, length: i64) -> bool:
        """Judge a message that the head's row doesn't have: True to pass it over."""
        session = self._session
        ledger = self._ledger
        if self.overruled is not None or session.goodbye or (ledger.uncounted and code == _READY_FOR_QUERY):
            return True
        message = _seen(code, length)
        if ledger.state == NOTHING:
            session.verdict = session.judge(
                Kind.MESSAGE_WHILE_IDLE,
                f"the server sent {message.name} while no request was outstanding",
                message,
                pos,
                libpq=libpq.while_idle(message.type),
            )
            return False
        head = ledger.first()
        text: str | None = None
        owner = "the login"
        if ledger.state != _LOGIN:
            owner = f"request {head.n} ({head.messages})"
            text = libpq.while_busy(chr(code), function_call=ledger.state == _FUNCTION_CALL)
        session.verdict = session.judge(
            Kind.UNEXPECTED_RESPONSE,
            f"the server sent {message.name}, which can't belong to the answer to {owner}",
            message,
            pos,
            libpq=text,
        )
        return False

    def _accept_frame(self, pos: i64, code: i64, length: i64) -> bool:
        """Judge a message of unknown type or impossible length: True to go on with it all the same."""
        session = self._session
        known = _MESSAGES[code] is not UNKNOWN
        framed = HEADER_SIZE - 1 <= length <= max(_MESSAGES[code].most, SHORT)
        message = _seen(code, length)
        what = ill_formed(message, length, known=known)
        if self.overruled is not None or session.goodbye:
            if not framed:
                session.lost = f"the server sent {what}, after which message boundaries can't be found"
            return framed
        if known or not framed:
            text: str | None = libpq.lost_synchronization(chr(code), length)
        elif self._ledger.state == NOTHING:
            text = libpq.while_idle(chr(code))
        else:
            text = libpq.while_busy(chr(code), function_call=False)
        session.verdict = session.judge(Kind.PROTOCOL_VIOLATION, f"the server sent {what}", message, pos, libpq=text)
        return False
