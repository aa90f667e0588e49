"""In which form a client is told that its session is over, so that its driver shows that to its user.

PostgreSQL sends an ErrorResponse of severity FATAL and closes. Many drivers go on to read until ReadyForQuery, find the
end of the stream in its place, and report that instead: ``server closed the connection unexpectedly``. So a client that
waits for an answer gets the ReadyForQuery as well. Which drivers need it, tried with each in the middle of a simple
query, of an extended one, of rows and of a COPY FROM STDIN, and with the connection idle:

========================  =============================================  ==============================================
driver                    ErrorResponse, end of stream                   ErrorResponse, ReadyForQuery, end of stream
========================  =============================================  ==============================================
psycopg2 (PQexec)         the end of the stream alone                    all of it
asyncpg                   the message alone; idle: nothing               all of it; idle: asyncio logs a failed callback
pg8000                    "network error"; after a Bind it hangs         all of it
postgres.js               CONNECTION_CLOSED                              all of it; idle: it connects anew
Go's lib/pq, simple       "driver: bad connection"                       all of it
Go's lib/pq, extended     "driver: bad connection"                       the same: it keeps no FATAL to a Parse or Bind
pgjdbc, COPY              it hangs                                       all of it
DBD::Pg, PDO              the texts, with the end of the stream's        all of it, with the SQLSTATE
ruby-pg                   the texts, as ``PG::ConnectionBad``            all of it, as ``PG::ProtocolViolation``
psycopg 3, pgjdbc, psql,  all of it                                      all of it
pgbench, node-postgres
any, logging in           all of it                                      all of it
========================  =============================================  ==============================================

A driver that has read ReadyForQuery hasn't seen yet that the connection is closed. The status in it decides whether it
finds out at once:

- A client that waits is told ``E``, a failed transaction, whether or not it had one. All that a driver or a pool may do
  then is to roll back, which shows that the connection is of no use any more: psycopg's and SQLAlchemy's pools discard
  it. That clean-up fails, and its error is what the user would see instead of the first (psycopg2's ``with``, asyncpg's
  pool, SQLAlchemy), so it is answered with the same words again, and the stream ends after that. Nor does it end
  while the client is still sending: libpq reads nothing before all of a COPY is sent, unless that fails.
- A client that has asked nothing may come for its answer much later, when nobody is there to repeat it. It is told
  ``I``, so that nothing needs to be rolled back, and nothing hides what it was told.

Sources: "Message Flow" in the PostgreSQL documentation; ``PQexecFinish()`` in ``fe-exec.c``, which keeps the last of
several results; ``errRecover()`` in lib/pq's ``error.go``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from pgguard.session.states import OWED, Owes
from pgguard.wire.fields import build_ready_for_query
from pgguard.wire.messages import HEADER_SIZE, parse_header

if TYPE_CHECKING:
    from pgguard.session.session import Session

_ANSWERED: Final = frozenset(OWED.keys() | {"H"})
"""The messages of a client that an ErrorResponse may be the answer to; Flush asks for one as well."""

_MESSAGES: Final = 256
"""Up to so many at once are a request: who cleans up sends a few."""
_CLEAN_UPS: Final = 2
"""Of a transaction, and of the connection as it goes back to its pool."""


class Farewell(NamedTuple):
    """What a client is sent last."""

    words: bytes
    again: int = 0
    """To how many requests more it is the answer, should they come soon; none if the stream is to end at once."""

    def repeated(self) -> Farewell | None:
        """What is left of it when it has been said once more."""
        return self._replace(again=self.again - 1) if self.again > 1 else None


def farewell(session: Session, error: bytes, asked: str | None = None) -> Farewell:
    """Say that a session is over, in the form that fits what its client is waiting for.

    Args:
        session: what is known of the session, of which the client has been sent nothing but whole messages.
        error: the ErrorResponse.
        asked: the type of a message of the client's that is kept from the server; ``None`` if there is none.
    """
    if session.ledger.state == Owes.LOGIN:
        return Farewell(error)
    if session.idle and (asked is None or asked not in _ANSWERED):
        return Farewell(error + build_ready_for_query("I"))
    words = error + build_ready_for_query("E")
    return Farewell(words, again=_CLEAN_UPS)


def asks(data: bytes) -> bool:
    """Whether bytes that a client has sent are a request: whole messages, of which the first can be answered.

    That they begin with a message isn't known: a client that was interrupted may go on with what it was sending.
    """
    pos, end = 0, len(data)
    for _ in range(_MESSAGES):
        if end - pos < HEADER_SIZE:
            break
        code, length = parse_header(data, pos)
        if length < HEADER_SIZE - 1 or (pos == 0 and chr(code) not in _ANSWERED):
            return False
        pos += 1 + length
    return 0 < pos == end
