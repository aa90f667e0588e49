"""The state machine, as tables that can be read beside the protocol chapter.

Theory of operation
===================

PostgreSQL answers a connection's messages strictly in order, so the state of a session is a queue: the *ledger* of
what the server still owes. Each frontend message that has an answer adds one entry (:data:`OWED`), and each backend
message is paid against the entry at the head. What the server may send next depends on the head alone, and
:data:`ANSWERS` says so: for every state of the head, the messages that may come and the state that follows.

Two results are not states but things that happen to the ledger, and :mod:`pgguard.session.ledger` does them:

``PAID``
    the head is complete, and the next entry becomes the head (or :attr:`Owes.NOTHING`, with an empty ledger);
``SKIP``
    an error in the extended query protocol: the server has begun to discard messages until it reads a Sync, so
    every entry in front of the next Sync is dropped, and if there is no Sync yet, what arrives before it adds none.

Independent of all that are the :data:`ASYNCHRONOUS` messages, which may come anywhere, even between two rows, and
change nothing; and an ErrorResponse of severity FATAL or PANIC, which may come anywhere too and ends the session.

What the tables can't say
-------------------------

*A Sync that may or may not be answered.* In copy-in mode the server discards Sync. One that was sent behind an
Execute before the client knew that this starts a COPY is discarded when the server reads it in copy-in mode, and
answered when the COPY failed before. From outside the two look alike, so such a Sync is entered as
:attr:`Owes.MAYBE_SYNC`: it takes a ReadyForQuery that comes, and steps aside for anything else. When a COPY has
failed, the first ReadyForQuery may also be that of the Sync behind the copy data, so the doubt moves on to that. A
client that sends more than copy data and its end between the two, as no driver is known to, can't be followed: the
server has discarded or executed that, and which of them only later answers would tell.

*Copy data in flight.* A client may go on sending CopyData, CopyDone or CopyFail after the server has given up the
COPY, and postgres.js sends a CopyFail behind its own CopyDone, some time; the server reads and ignores them.
A client may also begin to send them before it has seen CopyInResponse.

*Flush.* Nothing is owed for it, yet a statement timeout that struck while the server waited for the client is
reported when the next message has been read (``ProcessInterrupts()`` in ``postgres.c``). If that is a Flush, an
ErrorResponse comes with nothing outstanding, and begins to skip like any other.

*A refusal in protocol 2's words.* Before login a server that can't start a backend says so in a text without a length,
since no protocol has been agreed on (``report_fork_failure_to_client()``): an ``E``, the text, a NUL, and the end. What
would be its length is far more than any ErrorResponse's.

*Pipelining.* Extended-protocol messages may be sent while earlier ones are unanswered; that is what they were made
for, and every driver with a pipeline or batch mode does it. A simple Query or FunctionCall behind an unanswered
request, or anything behind an unanswered Query, is no pipelining that libpq knows.

*What was never asked for.* Extended-protocol messages without a Sync or Flush behind them ask for no answer
(:data:`UNASKED`), and a simple Query behind them brings theirs along: libpq leaves a Parse behind when its Bind can't
be sent (``PQsendQueryGuts()`` in ``fe-exec.c``). If one of them fails, the server discards the Query as well, up to a
Sync that the client doesn't know it has to send.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final


class Owes(IntEnum):
    """What the server still owes for one message of the frontend, or what becomes of the ledger."""

    NOTHING = 0
    """The ledger is empty: whatever the server sends, nobody asked for it."""

    LOGIN = 1
    """StartupMessage: authentication, parameters, key, ReadyForQuery."""

    QUERY = 2
    """Query: at least one result, then ReadyForQuery."""
    QUERY_ROWS = 3
    QUERY_COPY_IN = 4
    QUERY_COPY_OUT = 5
    QUERY_COPY_BOTH = 6
    QUERY_COPIED = 7
    """The server's CopyDone has come; a result is still to be completed."""
    QUERY_COPIED_BOTH = 8
    """The same after CopyBoth, where more data may be behind it."""
    QUERY_MORE = 9
    """A result is complete; another may follow, or ReadyForQuery."""

    FUNCTION_CALL = 10

    PARSE = 11
    BIND = 12
    CLOSE = 13
    DESCRIBE_STATEMENT = 14
    DESCRIBE_PORTAL = 15
    """Also what remains of a described statement when its ParameterDescription has come."""
    EXECUTE = 16
    EXECUTE_ROWS = 17
    EXECUTE_COPY_IN = 18
    EXECUTE_COPY_OUT = 19
    EXECUTE_COPIED = 20

    SYNC = 21
    MAYBE_SYNC = 22
    """A Sync that the server may have read in copy-in mode, where it discards it."""
    READY = 23
    """ReadyForQuery and nothing else, as after an error in a simple Query."""

    COPY_END = 24
    """No debt: marks where in the ledger the client's CopyDone or CopyFail was sent."""

    PAID = 25
    SKIP = 26


OWED: Final[dict[str, Owes]] = {
    "Q": Owes.QUERY,
    "F": Owes.FUNCTION_CALL,
    "P": Owes.PARSE,
    "B": Owes.BIND,
    "C": Owes.CLOSE,
    "D": Owes.DESCRIBE_PORTAL,  # or DESCRIBE_STATEMENT: its first body byte says which
    "E": Owes.EXECUTE,
    "S": Owes.SYNC,
}
"""What a frontend message adds to the ledger. Flush, Terminate, CopyData and passwords add nothing."""

WANTED: Final = frozenset(OWED.keys() - {"C", "S"})
"""Those of them whose answers somebody wants: Close and Sync have none that would be missed."""

ASYNCHRONOUS: Final = frozenset("NSA")
"""NoticeResponse, ParameterStatus, NotificationResponse: "Asynchronous Operations" in the protocol chapter."""

ANSWERS: Final[dict[Owes, dict[str, Owes]]] = {
    Owes.NOTHING: {},
    # Start-up
    Owes.LOGIN: {"R": Owes.LOGIN, "v": Owes.LOGIN, "K": Owes.LOGIN, "Z": Owes.PAID},
    # Simple query. A rule can make one statement return several row sets (the commands of CREATE RULE), so that a
    # RowDescription may follow rows directly.
    Owes.QUERY: {
        "T": Owes.QUERY_ROWS,
        "C": Owes.QUERY_MORE,
        "I": Owes.QUERY_MORE,
        "G": Owes.QUERY_COPY_IN,
        "H": Owes.QUERY_COPY_OUT,
        "W": Owes.QUERY_COPY_BOTH,
        "E": Owes.READY,
    },
    Owes.QUERY_ROWS: {"D": Owes.QUERY_ROWS, "C": Owes.QUERY_MORE, "T": Owes.QUERY_ROWS, "E": Owes.READY},
    Owes.QUERY_COPY_IN: {"C": Owes.QUERY_MORE, "E": Owes.READY},
    Owes.QUERY_COPY_OUT: {"d": Owes.QUERY_COPY_OUT, "c": Owes.QUERY_COPIED, "E": Owes.READY},
    # A server that shuts down completes the command in the middle of the stream, and closes (WalSndDone).
    Owes.QUERY_COPY_BOTH: {
        "d": Owes.QUERY_COPY_BOTH,
        "c": Owes.QUERY_COPIED_BOTH,
        "C": Owes.QUERY_MORE,
        "E": Owes.READY,
    },
    # Replication commands go on behind a COPY without completing it: START_REPLICATION with the next timeline,
    # BASE_BACKUP with where the WAL ends, and before PostgreSQL 15 with a COPY for each tablespace.
    Owes.QUERY_COPIED: {
        "C": Owes.QUERY_MORE,
        "T": Owes.QUERY_ROWS,
        "H": Owes.QUERY_COPY_OUT,
        "E": Owes.READY,
    },
    # A walsender answers the client's CopyDone with its own as soon as it sees it (ProcessRepliesIfAny), which may be
    # in the middle of a transaction that it is decoding, and sends the rest of that.
    Owes.QUERY_COPIED_BOTH: {
        "d": Owes.QUERY_COPIED_BOTH,
        "C": Owes.QUERY_MORE,
        "T": Owes.QUERY_ROWS,
        "E": Owes.READY,
    },
    Owes.QUERY_MORE: {
        "T": Owes.QUERY_ROWS,
        "C": Owes.QUERY_MORE,
        "I": Owes.QUERY_MORE,
        "G": Owes.QUERY_COPY_IN,
        "H": Owes.QUERY_COPY_OUT,
        "W": Owes.QUERY_COPY_BOTH,
        "E": Owes.READY,
        "Z": Owes.PAID,
    },
    # Function call
    Owes.FUNCTION_CALL: {"V": Owes.READY, "E": Owes.READY},
    # Extended query
    Owes.PARSE: {"1": Owes.PAID, "E": Owes.SKIP},
    Owes.BIND: {"2": Owes.PAID, "E": Owes.SKIP},
    Owes.CLOSE: {"3": Owes.PAID, "E": Owes.SKIP},
    Owes.DESCRIBE_STATEMENT: {"t": Owes.DESCRIBE_PORTAL, "E": Owes.SKIP},
    Owes.DESCRIBE_PORTAL: {"T": Owes.PAID, "n": Owes.PAID, "E": Owes.SKIP},
    Owes.EXECUTE: {
        "D": Owes.EXECUTE_ROWS,
        "C": Owes.PAID,
        "s": Owes.PAID,
        "I": Owes.PAID,
        "G": Owes.EXECUTE_COPY_IN,
        "H": Owes.EXECUTE_COPY_OUT,
        "E": Owes.SKIP,
    },
    Owes.EXECUTE_ROWS: {"D": Owes.EXECUTE_ROWS, "C": Owes.PAID, "s": Owes.PAID, "E": Owes.SKIP},
    Owes.EXECUTE_COPY_IN: {"C": Owes.PAID, "E": Owes.SKIP},
    Owes.EXECUTE_COPY_OUT: {"d": Owes.EXECUTE_COPY_OUT, "c": Owes.EXECUTE_COPIED, "E": Owes.SKIP},
    Owes.EXECUTE_COPIED: {"C": Owes.PAID, "E": Owes.SKIP},
    # Sync commits, and so can fail (a deferred constraint) before its ReadyForQuery.
    Owes.SYNC: {"Z": Owes.PAID, "E": Owes.READY},
    Owes.MAYBE_SYNC: {"Z": Owes.PAID},
    # What is done after an error, aborting the transaction above all, can fail in turn.
    Owes.READY: {"Z": Owes.PAID, "E": Owes.READY},
}
"""For every state of the head, what the server may send and what it then owes."""

COPY_IN: Final = frozenset({Owes.QUERY_COPY_IN, Owes.EXECUTE_COPY_IN, Owes.QUERY_COPY_BOTH})
"""States in which the server reads copy data, and takes for an error all but :data:`IN_COPY_IN`."""

IN_COPY_IN: Final = frozenset("dcfHSX")
"""What a client may send in copy-in mode; Flush and Sync are discarded there: "COPY Operations"."""

CAN_BECOME_COPY: Final = frozenset(
    {
        Owes.QUERY,
        Owes.QUERY_ROWS,
        Owes.QUERY_MORE,
        Owes.QUERY_COPY_IN,
        Owes.QUERY_COPY_OUT,
        Owes.QUERY_COPY_BOTH,
        Owes.QUERY_COPIED,
        Owes.QUERY_COPIED_BOTH,
        Owes.EXECUTE,
        Owes.EXECUTE_COPY_IN,
    }
)
"""Debts whose answer may still ask for copy data, so that copy data may be on its way already."""

UNASKED: Final = frozenset(
    {
        Owes.PARSE,
        Owes.BIND,
        Owes.CLOSE,
        Owes.DESCRIBE_STATEMENT,
        Owes.DESCRIBE_PORTAL,
        Owes.EXECUTE,
        Owes.COPY_END,
    }
)
"""Entries for messages that ask for no answer by themselves: a Sync or a Flush behind them does."""

WORK: Final = frozenset({Owes.QUERY, Owes.FUNCTION_CALL, Owes.EXECUTE})
"""What is owed for messages that can change data, copy it included."""

NO_REQUEST: Final = frozenset({Owes.LOGIN, Owes.MAYBE_SYNC, Owes.COPY_END})
"""Entries that keep no client waiting for the answer to a request."""
