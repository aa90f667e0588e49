"""The requests of a session: what records tell of who sent what, and how far the server came with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, final

from pgguard.session.verdicts import RequestSeen, RequestState

if TYPE_CHECKING:
    from mypy_extensions import i64

    from pgguard.identity import Sender

_MESSAGES_LIMIT: Final = 32
_SIX: Final = 1 << 48


@final
class Request:
    """One sender's messages from one ReadyForQuery's worth of work to the next.

    A simple Query or FunctionCall is a request by itself; extended-protocol messages belong together up to and
    including their Sync. Mutable, as it grows with each message, and made for each request: what records tell of it is
    put together when one is written (:attr:`messages`, :meth:`seen`).

    Args:
        n: counts the session's requests, from 1; 0 is the login.
        at: when its first message arrived, in seconds since the epoch.
        sender: who sent it, if that is known.
        code: the type of its first message; 0 if that has none.
        at_rest: nothing was outstanding when it came.
    """

    __slots__ = ("_codes", "_first", "at", "at_rest", "begun", "ended", "n", "sender", "sql", "sql_cut")

    def __init__(self, n: i64, at: float, sender: Sender | None, code: i64, at_rest: bool) -> None:
        self.n = n
        self.at = at
        self.at_rest = at_rest
        self.sender = sender
        self._codes: i64 = code
        """The types of its latest messages, up to seven, a byte each."""
        self._first = ""
        """Those in front of them."""
        self.begun = False
        """An entry of the ledger has been paid for it."""
        self.ended: RequestState | None = None
        """``FAILED`` or ``SKIPPED``, if it ended badly."""
        self.sql: bytes | None = None
        self.sql_cut = False

    def add(self, code: i64) -> None:
        """Count one more message of an extended query."""
        if self._codes >= _SIX:
            if len(self._first) <= _MESSAGES_LIMIT:
                self._first += _spelled(self._codes)
            self._codes = 0
        self._codes = self._codes << 8 | code

    @property
    def messages(self) -> str:
        """The types of its messages in order, cut off with ``…`` when there are many."""
        messages = self._first + _spelled(self._codes)
        return messages if len(messages) <= _MESSAGES_LIMIT else messages[:_MESSAGES_LIMIT] + "…"

    def skip(self) -> None:
        """The server discards one of its messages, or all that are left."""
        if self.ended is None and not self.begun:
            self.ended = RequestState.SKIPPED

    def seen(self, *, outstanding: bool, begun: bool) -> RequestSeen:
        """The request as it stands, given what the ledger knows of it."""
        if self.ended is not None:
            state = self.ended
        elif not outstanding:
            state = RequestState.ANSWERED
        else:
            state = RequestState.ANSWERING if begun else RequestState.WAITING
        return RequestSeen(
            n=self.n,
            at=self.at,
            messages=self.messages,
            sql=self.sql,
            sql_cut=self.sql_cut,
            sender=self.sender,
            state=state,
            at_rest=self.at_rest,
        )


def _spelled(codes: int) -> str:
    """Types of messages as characters."""
    return codes.to_bytes(8, "big").lstrip(b"\0").decode("latin-1")
