"""A session's prepared statements: their texts, for records, and which of them there certainly are.

The server's sessions may be swapped under a client: a pooler in transaction mode gives each transaction the next one
that is free. What the client has prepared is gone then, and what others have prepared is there. An error that says so
contradicts what this session has done, and two of them say so, in answer to Parse, Bind or the Describe of a statement:
42P05, duplicate_prepared_statement, for a name that it never made, and 26000, invalid_sql_statement_name, for one that
it made and has not closed (``StorePreparedStatement()`` and ``FetchPreparedStatement()`` in ``prepare.c``).

Certain is only what is done by the protocol's own messages. What texts do (:mod:`pgguard.session.quiet`) makes a name
*unsure*, or all of them, and so does a table that has grown too large; an error about a name that is unsure says
nothing.

Everything here is done in the order in which the client sends, which is the order in which the server reads; what the
server refuses or discards of it is known, at the latest, when its error about a message behind it arrives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pgguard.session.quiet import SIMPLY_QUIET, Effect, judge
from pgguard.wire.messages import TEXT_LIMIT

if TYPE_CHECKING:
    from pgguard.session.requests import Request

_LIMIT: Final = 256
_LONGEST: Final = 63
"""Bytes by which the server tells names apart: NAMEDATALEN - 1."""
_PATIENCE: Final = 1000
"""Simple texts that are looked at in a session that prepares nothing by name."""
_LOOK: Final = 10
"""How many of them a text counts for that takes a closer look."""
_NEVER: Final = -1
_PARENTHESIS: Final = ord("(")
_SEMICOLON: Final = ord(";")


class Statement:
    """The text of a Parse."""

    __slots__ = ("cut", "epoch", "name", "quiet", "refused", "sql")

    def __init__(self, name: bytes, sql: bytearray | None, *, cut: bool, epoch: int) -> None:
        self.name = name
        """As much of it as the server tells names apart by."""
        self.sql = sql
        self.cut = cut
        self.epoch = epoch
        """When it was made, as counted by what made all names unsure."""
        self.refused = False
        """The server has not parsed it, or that isn't sure: its name may stand for another text, which isn't known."""
        self.quiet = False
        """To execute it leaves the names of statements alone."""


class Named(Statement):
    """One with a name, and whether that was certainly free."""

    __slots__ = ("closed", "is_new")

    def __init__(self, name: bytes, sql: bytearray | None, *, cut: bool, epoch: int) -> None:
        super().__init__(name, sql, cut=cut, epoch=epoch)
        self.is_new = False
        """There was certainly no statement of this name before, unless :attr:`closed` has been discarded."""
        self.closed: Closing | None = None
        """The Close that has made the name free."""

    @property
    def contradicts_existence(self) -> bool:
        """Whether the server, if it says that the name is taken, contradicts what this session has done."""
        return self.is_new and (self.closed is None or not self.closed.refused)


class Closing:
    """The Close of a statement."""

    __slots__ = ("epoch", "refused")

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.refused = False
        """The server has discarded it."""


class Statements:
    """The prepared statements by name; the oldest is forgotten when they get too many."""

    __slots__ = ("_by_name", "_epoch", "_named", "_patience", "_sure", "_unsure", "watching")

    def __init__(self) -> None:
        self._by_name: dict[bytes, Statement | Closing] = {}
        self._epoch = 0
        """Counts what has made all names unsure."""
        self._unsure = False
        """Names that are not in the table may have been made."""
        self._sure = 0
        """The same for statements that are certain; ``_NEVER`` if what lasts may make or drop statements any time."""
        self._named = False
        """The session has prepared a statement by name."""
        self._patience = _PATIENCE
        self.watching = True
        """What simple queries say matters."""

    # What the client sends

    def query(self, sql: bytearray, *, cut: bool) -> None:
        """A simple Query has been sent. It drops the unnamed statement: ``exec_simple_query()`` in ``postgres.c``."""
        self._by_name.pop(b"", None)
        if self._sure == _NEVER or (self._unsure and not self._named):
            self.watching = bool(self._by_name)
            return
        self._count(1)
        simply = (
            not cut
            and sql
            and sql[0] in SIMPLY_QUIET
            and _PARENTHESIS not in sql
            and sql.find(_SEMICOLON, 0, len(sql) - 1) < 0
        )
        if not simply:
            self._count(_LOOK)
            self._run(None if cut else bytes(sql))

    def parse(self, request: Request, buffer: bytearray, body: int, stop: int) -> Statement | None:
        """Keep the text of a Parse, whose body is a name, NUL, the text, NUL, and parameter types."""
        text = buffer.find(0, body, stop) + 1
        if text == 0:
            self._unsettle()
            return None
        stop = min(stop, text + TEXT_LIMIT)
        terminator = buffer.find(0, text, stop)
        cut = terminator < 0
        sql = buffer[text : stop if cut else terminator]
        if request.sql is None:
            request.sql, request.sql_cut = sql, cut
        statement: Statement
        if text == body + 1:
            self._by_name[b""] = statement = Statement(b"", sql, cut=cut, epoch=self._epoch)
        else:
            statement = self._parse_named(bytes(buffer[body : min(text - 1, body + _LONGEST)]), sql, cut=cut)
        if self._named or not self._unsure:
            self._count(_LOOK)
            statement.quiet = not cut and judge(bytes(sql)).effect is Effect.NONE
        return statement

    def _parse_named(self, name: bytes, sql: bytearray, *, cut: bool) -> Named:
        statement = Named(name, sql, cut=cut, epoch=self._epoch)
        self._named = self.watching = True
        before = self._by_name.pop(name, None)
        if before is None:
            statement.is_new = not self._unsure
        elif isinstance(before, Closing):
            statement.is_new = before.epoch == self._sure
            statement.closed = before
        self._keep(name, statement)
        return statement

    def bind(self, request: Request, buffer: bytearray, body: int, stop: int) -> Statement | None:
        """A Bind has been sent, whose body is a portal, NUL, a statement, NUL, and more.

        Returns the statement that it names, if that is certainly there unless its Parse fails. What it says will be
        executed.
        """
        name = buffer.find(0, body, stop) + 1 if buffer[body] else body + 1
        if 0 < name < stop and not buffer[name]:
            found = self._by_name.get(b"")
        else:
            end = buffer.find(0, name, stop) if name else -1
            if end - name > _LONGEST:
                end = name + _LONGEST
            found = self._by_name.get(bytes(buffer[name:end])) if end >= 0 else None
        if not isinstance(found, Statement):
            self._unsettle()
            return None
        if request.sql is None and not found.refused:
            request.sql, request.sql_cut = found.sql, found.cut
        certain = found if found.epoch == self._sure or not found.name else None
        if not found.quiet and (self._named or not self._unsure):
            if buffer[body]:
                self._go_blind()  # a portal that has a name may be executed whenever
            else:
                self._unsettle()
        return certain

    def describe(self, _: Request, buffer: bytearray, body: int, stop: int) -> Statement | None:
        """The Describe of a statement has been sent, whose body is ``S``, a name, and NUL; as :meth:`bind`."""
        found = self._by_name.get(_name(buffer, body, stop))
        return found if isinstance(found, Statement) and self._is_certain(found) else None

    def close(self, _: Request, buffer: bytearray, body: int, stop: int) -> Closing:
        """The Close of a statement has been sent, whose body is ``S``, a name, and NUL."""
        name = _name(buffer, body, stop)
        closing = Closing(self._epoch)
        self._by_name.pop(name, None)
        self._keep(name, closing)
        return closing

    def call(self) -> None:
        """A FunctionCall has been sent: of which function, only its number says."""
        self._unsettle()

    # What is sure

    def _is_certain(self, statement: Statement) -> bool:
        # No text drops the unnamed statement but by being a simple Query.
        return statement.epoch == self._sure or not statement.name

    def _run(self, sql: bytes | None) -> None:
        """A text will be executed; ``None`` if it isn't known whole."""
        effect, name = (Effect.ANY, b"") if sql is None else judge(sql)
        if effect is Effect.ONE_NAME:
            unsure = Named(name, None, cut=False, epoch=self._epoch)
            unsure.refused = True
            self._by_name.pop(name, None)
            self._keep(name, unsure)
        elif effect is Effect.LASTING:
            self._go_blind()
        elif effect is Effect.ANY:
            self._unsettle()

    def _unsettle(self) -> None:
        """Any statement may be gone, and any may be there."""
        self._unsure = True
        self._epoch += 1
        if self._sure != _NEVER:
            self._sure = self._epoch

    def _go_blind(self) -> None:
        self._unsure = True
        self._sure = _NEVER

    def _keep(self, name: bytes, what: Statement | Closing) -> None:
        by_name = self._by_name
        if len(by_name) >= _LIMIT:
            forgotten = by_name.pop(next(iter(by_name)))
            self._unsure = True
            if isinstance(forgotten, Statement):
                forgotten.sql = None  # what the server still owes for it keeps no more than its name
        by_name[name] = what

    def _count(self, cost: int) -> None:
        """A session that prepares nothing by name is not looked at for ever."""
        if not self._named:
            self._patience -= cost
            if self._patience < 0:
                self._unsure = True


def _name(buffer: bytearray, body: int, stop: int) -> bytes:
    """The name in a Describe or Close, behind the byte that says what it is of."""
    start = body + 1
    end = buffer.find(0, start, stop)
    return bytes(buffer[start : min(end if end >= 0 else stop, start + _LONGEST)])
