"""The requests of a session: what records tell of who sent what, and how far the server came with it."""

from __future__ import annotations

from typing import Final

from pgguard.identity import Sender
from pgguard.session.verdicts import RequestSeen, RequestState

_MESSAGES_LIMIT: Final = 32


class Request:
    """One sender's messages from one ReadyForQuery's worth of work to the next.

    A simple Query or FunctionCall is a request by itself; extended-protocol messages belong together up to and
    including their Sync. Mutable, as it grows with each message; :meth:`seen` gives what verdicts carry.
    """

    __slots__ = ("at", "at_rest", "begun", "ended", "messages", "n", "sender", "sql", "sql_cut")

    def __init__(self, n: int, at: float, sender: Sender | None, message: str, *, at_rest: bool) -> None:
        self.n = n
        self.at = at
        self.at_rest = at_rest
        """Nothing was outstanding when it came."""
        self.sender = sender
        self.messages = message
        self.begun = False
        """An entry of the ledger has been paid for it."""
        self.ended: RequestState | None = None
        """``FAILED`` or ``SKIPPED``, if it ended badly."""
        self.sql: bytes | bytearray | None = None
        self.sql_cut = False

    def add(self, code: int) -> None:
        """Count one more message of an extended query."""
        if len(self.messages) < _MESSAGES_LIMIT:
            self.messages += chr(code)
        elif len(self.messages) == _MESSAGES_LIMIT:
            self.messages += "…"

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
            sql=None if self.sql is None else bytes(self.sql),
            sql_cut=self.sql_cut,
            sender=self.sender,
            state=state,
            at_rest=self.at_rest,
        )
