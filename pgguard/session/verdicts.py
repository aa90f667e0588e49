"""What the session core says when something is wrong: values alone, no behaviour.

A :class:`Verdict` is a statement about the protocol and about who sent what. Who those processes are, how
they came by the socket and what is done about it is decided by the rooms above.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from pgguard.identity import Sender


class Kind(StrEnum):
    """The kinds of fault, by the names under which they are recorded."""

    MESSAGE_WHILE_IDLE = "message-while-idle"
    UNEXPECTED_RESPONSE = "unexpected-response"
    SHARED_BY_PROCESSES = "shared-by-processes"
    SHARED_BY_THREADS = "shared-by-threads"
    REQUEST_WHILE_BUSY = "request-while-busy"
    UNREAD_ANSWER = "unread-answer"
    INHERITED_CONNECTION = "inherited-connection"
    FOREIGN_TERMINATE = "foreign-terminate"
    UNCLEAN_CLOSE = "unclean-close"
    IDLE_IN_TRANSACTION = "idle-in-transaction"
    LEAKED_CONNECTION = "leaked-connection"
    CONNECTION_EXHAUSTION = "connection-exhaustion"
    SESSION_STATE_LOST = "session-state-lost"
    PROTOCOL_VIOLATION = "protocol-violation"
    TLS_CORRUPTION = "tls-corruption"
    UNTRACKED = "untracked"


AFTER_END: Final = "after another process had ended the session"
"""The reason of a verdict on who uses a connection on which somebody else has said Terminate."""


TLS_RECORD: Final = "TLS record"
TLS_ALERT: Final = "TLS alert"
CLOSE_NOTIFY: Final = "close_notify"
"""What stands for a message where TLS has had to do with something that isn't one."""


class Direction(StrEnum):
    """Which side a message came from, in PostgreSQL's words."""

    FRONTEND = "frontend"
    BACKEND = "backend"


class Party(StrEnum):
    """Whose doing it is."""

    CLIENT = "client"
    """A process on the client's side, whichever."""
    SERVER = "server"
    """The server, or what stands before it: nobody on the client's side has done anything wrong."""
    STRANGER = "stranger"
    """Somebody who speaks another protocol, and has come to the wrong port."""


class RequestState(StrEnum):
    """How far the server has come with a request."""

    WAITING = "waiting"
    """Nothing of the answer has been seen."""
    ANSWERING = "answering"
    """The answer has begun and is not complete."""
    ANSWERED = "answered"
    FAILED = "failed"
    """Answered, with an ErrorResponse."""
    SKIPPED = "skipped"
    """The server discarded it, on its way to the Sync after an error."""


OUTSTANDING: Final = frozenset({RequestState.WAITING, RequestState.ANSWERING})
"""The states of a request that the server still owes an answer to."""


class Limit(StrEnum):
    """The limits for which a server refuses a connection."""

    SERVER = "server"
    """``max_connections``: every slot is taken."""
    RESERVED = "reserved"
    """The same, less the slots that ``superuser_reserved_connections`` and ``reserved_connections`` keep for others."""
    ROLE = "role"
    """``ALTER ROLE … CONNECTION LIMIT``."""
    DATABASE = "database"
    """``ALTER DATABASE … CONNECTION LIMIT``."""
    WAL_SENDERS = "wal-senders"
    """``max_wal_senders``, for replication connections."""


class Refusal(NamedTuple):
    """Why a server has refused a connection when it had no slot left."""

    limit: Limit | None
    """``None``: the server doesn't say which it was."""
    name: str | None = None
    """The role or the database whose limit it was."""
    server: str | None = None
    """Which of the guard's servers it was, by its name; ``None``: there is only one."""


@dataclass(frozen=True, slots=True)
class MessageSeen:
    """One message as it stood on the wire."""

    direction: Direction
    type: str | None
    """The type byte as a character; ``None`` for the untyped packets of the start-up phase, and for TLS's records."""
    name: str
    """The message's name in the PostgreSQL documentation."""
    size: int
    """Bytes on the wire, type byte and length word included."""


@dataclass(frozen=True, slots=True)
class RequestSeen:
    """One request of the session's recent past, as it stood when the verdict fell."""

    n: int
    """Counts the session's requests, from 1."""
    at: float
    """When its first message arrived, in seconds since the epoch."""
    messages: str
    """The types of its messages in order, cut off with ``…`` when there are many."""
    sql: bytes | None
    """The text of its Query or Parse as sent, or of the prepared statement that it binds; ``None`` if unseen."""
    sql_cut: bool
    """True when ``sql`` is only the beginning of the text."""
    sender: Sender | None
    state: RequestState
    at_rest: bool | None = None
    """Whether every answer before it was complete when it came."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Something is wrong with the session; everything that the session core knows about it."""

    kind: Kind
    reason: str
    """What was seen, in the protocol's words, without names of processes: a clause that can end a sentence."""
    message: MessageSeen | None
    """The message that broke the rule; ``None`` where the end of a stream did."""
    requests: tuple[RequestSeen, ...]
    """The outstanding requests and a few before them, oldest first."""
    intruder: Sender | None = None
    """Who used the connection out of turn, where that is known: whoever sent the offending message, but see
    ``sender``."""
    requesters: tuple[Sender, ...] = ()
    """Who else has sent on this connection, the one whose turn it was first."""
    libpq: str | None = None
    """The text that libpq prints for the symptom, where it has one."""
    open_request: bool = False
    """A request was still unanswered."""
    open_transaction: bool = False
    """The last ReadyForQuery said that a transaction block was open."""
    by: Party = Party.CLIENT
    ends: bool = False
    """The session is over with it, whatever is decided: nothing is left to be rejected."""
    settled: bool = False
    """Of an inherited connection: its heirs have others of their own, and have never used this one."""
    refusal: Refusal | None = None
    """Of a connection-exhaustion, which limit it was."""
    start: int = 0
    """Where the offending message begins in the chunk that was being examined."""
    sender: Sender | None = None
    """Who sent the offending message, where it isn't the intruder: the opener, whose message shows the sharing."""
    since: float | None = None
    """When was done what it is about, in seconds since the epoch, if that may be long before it was noticed."""
    parting: bool = False
    """Its message can't be read, and is no longer than a Terminate: most likely it is one."""

    @property
    def author(self) -> Sender | None:
        """Who sent the offending message, where that is known."""
        return self.sender or self.intruder
