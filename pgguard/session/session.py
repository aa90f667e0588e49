"""What both directions of a session share, and what a verdict on either is made from."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Final

from pgguard.identity import Sender
from pgguard.session import libpq as symptoms
from pgguard.session.ledger import NOTHING, Ledger
from pgguard.session.refusals import replication_asked
from pgguard.session.requests import Request
from pgguard.session.senders import Senders
from pgguard.session.statements import Statements
from pgguard.session.states import Owes
from pgguard.session.verdicts import Direction, Kind, MessageSeen, Party, RequestSeen, Verdict
from pgguard.wire.messages import FRONTEND, HEADER_SIZE, by_code
from pgguard.wire.startup import parse_backend_key_data

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mypy_extensions import i64

    from pgguard.wire.messages import Message
    from pgguard.wire.startup import CancelKey

_RECENT: Final = 8
"""Requests that are remembered beyond their answer, for the timeline of a record; a power of two."""
_OUTSTANDING: Final = 16
"""Unanswered requests that a verdict shows."""
FEW: Final = 256
"""Entries of the ledger up to which it is not full for certain."""
_MOST_ENTRIES: Final = 4096
_MOST_REQUESTS: Final = 1024
"""Entries, and requests, at which it is. Each takes a few hundred bytes at most, and a text of up to a kilobyte."""
_MOST_UNASKED: Final = 131_072
"""Entries at which it is, as long as no answer has been asked for; they take eight bytes each."""
_MOST_DIFFERENT: Final = 8192
"""Entries of those that are not alike, and so take more."""
_FRONTEND: Final = by_code(FRONTEND)
_NO_TRANSACTION: Final = ("I", "")
_COPY_BOTH: Final[i64] = int(Owes.QUERY_COPY_BOTH)


class Session:
    """The state of one session that its two streams read and change.

    Args:
        parameters: the StartupMessage's parameters.
        sender: who sent the StartupMessage, if the kernel said so.
    """

    __slots__ = (
        "_compact_at",
        "_different",
        "_recent",
        "answer_began",
        "answer_ended",
        "application_name",
        "asks_goodbye",
        "backend_messages",
        "copied",
        "copy_over",
        "database",
        "frontend_messages",
        "goodbye",
        "key_data",
        "last_request",
        "ledger",
        "left",
        "lost",
        "over",
        "pipelines",
        "position",
        "replication",
        "requests",
        "senders",
        "several_read",
        "statements",
        "terminated",
        "terminator",
        "transaction_status",
        "unsynced",
        "user",
        "verdict",
    )

    def __init__(self, parameters: Mapping[str, str], sender: Sender | None) -> None:  # noqa: PLR0915 - all there is
        # What every message has to do with comes first: compiled, it lies side by side, in few cache lines.
        self.ledger = Ledger(Request(0, 0.0, sender, 0, True))
        self.over = False
        """Nothing that the client still sends can have an effect."""
        self.terminated = False
        """The client has sent Terminate."""
        self.copied = False
        """There has been a COPY FROM STDIN, of which something may come late."""
        self.copy_over = False
        """The last request has failed: if it was a COPY, what the client still sends of it is ignored."""
        self.several_read = False
        """Several read the answers, as far as that is known."""
        self.pipelines = False
        """The client has made a request while another one was outstanding."""
        self.unsynced: Request | None = None
        """The extended query that more messages may be added to, until its Sync."""
        self.last_request: Request | None = None
        """The latest that has been made."""
        self._recent: list[Request] = []
        """The latest of them, in a ring."""
        self.requests: i64 = 0
        """How many the client has made."""
        self.position: i64 = 0
        """Bytes of the server's stream that are in order, and have been forwarded."""
        self.answer_began: i64 = 0
        """Where in it the answer to the first request begins that was made when nothing was outstanding."""
        self.answer_ended: i64 = 0
        """Where in it the last ReadyForQuery ended."""
        self.frontend_messages: i64 = 0
        self.backend_messages: i64 = 0
        """How many have come that are in order: of the client, behind its StartupMessage, and of the server."""
        self.transaction_status = ""
        """``I``, ``T`` or ``E`` as the last ReadyForQuery said; empty before the first."""
        self.statements = Statements()

        self.user: str | None = parameters.get("user")
        self.database: str | None = parameters.get("database") or self.user
        self.application_name: str | None = parameters.get("application_name") or None
        self.replication = replication_asked(parameters.get("replication", ""))
        """Whether it streams WAL, of one database or of all, instead of running queries."""
        self.key_data = b""
        """The content of BackendKeyData, once it has come."""
        self.terminator: Sender | None = None
        """Who has, if that is known."""
        self.left = False
        """The client's stream has ended."""
        self.goodbye = False
        """The server has said that it ends the session."""
        self.verdict: Verdict | None = None
        self.lost: str | None = None
        """Why the session can't be followed any further, once that is so; nothing may be fed after it."""
        self.asks_goodbye = False
        """A Terminate of which nobody knows who sent it is a foreign-terminate until it has been looked into."""
        self.senders = Senders(sender)
        self._compact_at = _MOST_ENTRIES
        """Entries at which those that are alike are put together, while no answer has been asked for."""
        self._different = 0
        """How many of them were not alike then."""

    def introduce(self, opener: Sender, *, asks_goodbye: bool) -> None:
        """Say who opened the connection, where the kernel doesn't name senders.

        Args:
            opener: the process, and so the first that used the connection.
            asks_goodbye: a Terminate of which nobody knows who sent it is worth looking into.
        """
        self.senders.introduce(opener)
        self.asks_goodbye = asks_goodbye

    @property
    def cancel_key(self) -> CancelKey | None:
        """What a CancelRequest takes, and which backend it is, once the server has said so."""
        return parse_backend_key_data(self.key_data) if self.key_data else None

    @property
    def idle(self) -> bool:
        """Whether no request is outstanding."""
        return self.ledger.state == NOTHING or next(self.ledger.outstanding(), None) is None

    @property
    def is_answering(self) -> bool:
        """Whether an answer is due that the server gives without waiting for anything more from its client."""
        if self.idle or not self.logged_in or self.unsynced is not None:
            return False
        return not self.ledger.copying_in and self.ledger.state != _COPY_BOTH

    @property
    def logged_in(self) -> bool:
        """Whether the first ReadyForQuery has come."""
        return bool(self.transaction_status)

    @property
    def in_transaction(self) -> bool:
        """Whether the last ReadyForQuery said that a transaction block was open."""
        return self.transaction_status not in _NO_TRANSACTION

    @property
    def at_rest(self) -> bool:
        """Whether the last answer is complete, and nothing of another request has been sent."""
        return self.ledger.state == NOTHING and self.unsynced is None and self.requests > 0

    def new_request(self, code: i64, at: float, sender: Sender | None) -> Request:
        """A message has been sent that begins a request."""
        before = self.requests
        self.requests = before + 1
        at_rest = self.ledger.state == NOTHING
        if at_rest:
            self.answer_began = self.position
        else:
            self.pipelines = True
        request = self.last_request = Request(before + 1, at, sender, code, at_rest)
        if before < _RECENT:
            self._recent.append(request)
        else:
            self._recent[before & _RECENT - 1] = request
        return request

    def fullness(self) -> float:
        """How full the ledger is: from 1 on no more is to be read of the client until the server has answered.

        That keeps nobody waiting for ever: whatever the client has asked for, the server answers without hearing more
        of it. Where it may have to hear more first, the ledger is never full: in copy-in mode, where it reads the data;
        and as long as no answer has been asked for, by a Sync above all, nearly never: PostgreSQL holds back 8 KB of
        them at most (``PQ_SEND_BUFFER_SIZE`` in ``pqcomm.c``), of at least five bytes each, and what stands in its
        place half a megabyte.
        """
        ledger = self.ledger
        count = ledger.count
        if count < FEW or ledger.copying_in:
            return 0.0
        head = ledger.first()
        if head is not self.unsynced:
            return max(count / _MOST_ENTRIES, (self.requests - head.n) / _MOST_REQUESTS)
        if count < _MOST_ENTRIES:
            self._compact_at, self._different = _MOST_ENTRIES, 0
        elif count >= self._compact_at:
            self._different = ledger.compact()
            self._compact_at = 2 * count
        return max(count / _MOST_UNASKED, self._different / _MOST_DIFFERENT)

    def requests_seen(self) -> tuple[RequestSeen, ...]:
        """The outstanding requests and a few before them, oldest first."""
        # A client that sends without end and reads nothing may have any number of them.
        outstanding = list(islice(self.ledger.outstanding(), _OUTSTANDING))
        requests = {request.n: request for request in (*self._recent, *outstanding)}
        # Answers come in order: whatever was sent behind an outstanding request is outstanding too.
        first = outstanding[0].n if outstanding else self.requests + 1
        answering = self.ledger.answering()
        return tuple(
            requests[n].seen(outstanding=n >= first, begun=requests[n].begun or requests[n] is answering)
            for n in sorted(requests)
        )

    def judge(
        self,
        kind: Kind,
        reason: str,
        message: MessageSeen | None = None,
        start: int = 0,
        *,
        intruder: Sender | None = None,
        requesters: tuple[Sender, ...] | None = None,
        libpq: str | None = None,
        open_request: bool | None = None,
    ) -> Verdict:
        """Put what is wrong together with all that is known of the session; the arguments are the verdict's fields.

        A message of the server's is the server's doing.
        """
        from_server = message is not None and message.direction is Direction.BACKEND
        return Verdict(
            kind=kind,
            reason=reason,
            message=message,
            requests=self.requests_seen(),
            intruder=intruder,
            requesters=self.senders.others(intruder) if requesters is None else requesters,
            libpq=libpq,
            open_request=not self.idle if open_request is None else open_request,
            open_transaction=self.in_transaction,
            by=Party.SERVER if from_server else Party.CLIENT,
            start=start,
        )

    def judge_readers(
        self,
        kind: Kind,
        reason: str,
        *,
        intruder: Sender | None,
        requesters: tuple[Sender, ...],
        pending: bytes = b"",
    ) -> Verdict:
        """Put together what is known of the session when several are seen to read from it.

        Args:
            kind: As in a verdict.
            reason: As in a verdict.
            intruder: As in a verdict.
            requesters: As in a verdict.
            pending: A request that is held back, from its beginning on.
        """
        request = next(self.ledger.outstanding(), None)
        if request is not None:
            answer = symptoms.first_answer(request.messages[:1], request.sql)
        else:
            answer = symptoms.first_answer(chr(pending[0]), pending[HEADER_SIZE:]) if pending else None
        return self.judge(kind, reason, intruder=intruder, requesters=requesters, libpq=symptoms.while_idle(answer))

    def judge_hidden_overlap(self, *, sender: Sender | None, pending: bytes) -> Verdict:
        """Say that a request had been sent before the last answer came, though it has come to be read only after that.

        Args:
            sender: Who sent it, if that is known.
            pending: The request, from its beginning on.
        """
        length = int.from_bytes(pending[1:HEADER_SIZE], "big")
        message = seen(Direction.FRONTEND, _FRONTEND[pending[0]], pending[0], length)
        last = self.last_request
        which = "" if last is None else f" to request {last.n} ({last.messages})"
        return self.judge(
            Kind.REQUEST_WHILE_BUSY,
            f"{message.name} was sent before the answer{which} was complete",
            message,
            intruder=sender,
            requesters=self.senders.others(sender, first=None if last is None else last.sender),
        )

    def judge_unread(self, reason: str, *, sender: Sender | None, pending: bytes = b"", libpq: str | None) -> Verdict:
        """Put together what is known of the session when the last answer has been left unread.

        Args:
            reason: As in a verdict.
            sender: Who sent ``pending``, if that is known.
            pending: The request that is sent on top of it, from its beginning on.
            libpq: As in a verdict.
        """
        last = self.last_request
        message = None
        if pending:
            length = int.from_bytes(pending[1:HEADER_SIZE], "big")
            message = seen(Direction.FRONTEND, _FRONTEND[pending[0]], pending[0], length)
        before = None if last is None else last.sender
        return self.judge(
            Kind.UNREAD_ANSWER,
            reason,
            message,
            intruder=sender,
            requesters=() if before is None or before == sender else (before,),
            libpq=libpq,
        )


def seen(direction: Direction, message: Message, code: int, length: int) -> MessageSeen:
    """A message for a verdict, of which its header is known."""
    return MessageSeen(direction, chr(code), message.name, 1 + length)


def ill_formed(message: MessageSeen, length: int, *, known: bool) -> str:
    """What is wrong with a message's header."""
    if not known:
        return f"a message of unknown type {message.type!r}"
    signed = length - (1 << 32) if length >= 1 << 31 else length
    return f"{message.name} with an impossible length of {signed}"


def torn_end(side: str, rest: int, partial: MessageSeen | None, held_back: int) -> tuple[str, MessageSeen | None]:
    """How a stream ended in the middle of a message, and the message where that is known."""
    if rest and partial is not None:
        return f"the {side}'s stream ended {rest} bytes before the end of a {partial.name} message", partial
    return f"the {side}'s stream ended {held_back} bytes into a message", None
