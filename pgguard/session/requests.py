"""The requests of a session: what records tell of who sent what, and how far the server came with it."""

from __future__ import annotations

from typing import Final

from pgguard.session.verdicts import RequestSeen, RequestState, Sender
from pgguard.wire.messages import TEXT_LIMIT

_MESSAGES_LIMIT: Final = 32
_STATEMENTS_LIMIT: Final = 256


class Request:
    """One sender's messages from one ReadyForQuery's worth of work to the next.

    A simple Query or FunctionCall is a request by itself; extended-protocol messages belong together up to and
    including their Sync. Mutable, as it grows with each message; :meth:`seen` gives what verdicts carry.
    """

    __slots__ = ("at", "begun", "ended", "messages", "n", "parsed", "sender", "sql", "sql_cut")

    def __init__(self, n: int, at: float, sender: Sender | None, message: str) -> None:
        self.n = n
        self.at = at
        self.sender = sender
        self.messages = message
        self.begun = False
        """An entry of the ledger has been paid for it."""
        self.ended: RequestState | None = None
        """``FAILED`` or ``SKIPPED``, if it ended badly."""
        self.sql: bytearray | None = None
        self.sql_cut = False
        self.parsed: list[Statement] | None = None
        """What it had the server parse."""

    def add(self, code: int) -> None:
        """Count one more message of an extended query."""
        if len(self.messages) < _MESSAGES_LIMIT:
            self.messages += chr(code)
        elif len(self.messages) == _MESSAGES_LIMIT:
            self.messages += "…"

    def skip(self, *, parse: bool) -> None:
        """The server discards one of its messages, or all that are left; ``parse`` if it is a Parse."""
        if self.ended is None and not self.begun:
            self.ended = RequestState.SKIPPED
        if parse and self.parsed:
            self.parsed.pop().refused = True

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
        )


class Statement:
    """The text of a Parse."""

    __slots__ = ("cut", "refused", "sql")

    def __init__(self, sql: bytearray, *, cut: bool) -> None:
        self.sql = sql
        self.cut = cut
        self.refused = False
        """The server has not parsed it: its name may stand for another text, which isn't known."""


class Statements:
    """The texts of a session's prepared statements by name; the oldest is forgotten when they get too many."""

    __slots__ = ("_by_name",)

    def __init__(self) -> None:
        self._by_name: dict[bytes, Statement] = {}

    def parse(self, request: Request, buffer: bytearray, body: int, stop: int) -> None:
        """Keep the text of a Parse, whose body is a name, NUL, the text, NUL, and parameter types."""
        text = buffer.find(0, body, stop) + 1
        if text == 0:
            return
        stop = min(stop, text + TEXT_LIMIT)
        terminator = buffer.find(0, text, stop)
        cut = terminator < 0
        sql = buffer[text : stop if cut else terminator]
        if request.sql is None:
            request.sql, request.sql_cut = sql, cut
        statements = self._by_name
        name = bytes(buffer[body : text - 1])
        statements.pop(name, None)
        if request.parsed is None:
            request.parsed = []
        if len(request.parsed) >= _STATEMENTS_LIMIT:
            return
        if len(statements) >= _STATEMENTS_LIMIT:
            del statements[next(iter(statements))]
        statements[name] = statement = Statement(sql, cut=cut)
        request.parsed.append(statement)

    def bind(self, request: Request, buffer: bytearray, body: int, stop: int) -> None:
        """Find the text of the statement that a Bind names, whose body is a portal, NUL, a statement, NUL, and more."""
        name = buffer.find(0, body, stop) + 1
        end = buffer.find(0, name, stop)
        if name == 0 or end < 0:
            return
        statement = self._by_name.get(bytes(buffer[name:end]))
        if statement is not None and not statement.refused:
            request.sql, request.sql_cut = statement.sql, statement.cut
