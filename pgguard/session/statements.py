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

from typing import TYPE_CHECKING, Final, final

from pgguard.session.quiet import QUIET, SIMPLY_QUIET, Effect, judge
from pgguard.wire.messages import NAME_LENGTH, TEXT_LIMIT, find_end, part

if TYPE_CHECKING:
    from mypy_extensions import i64

    from pgguard.session.requests import Request

_LIMIT: Final = 256
_PATIENCE: Final = 1000
"""Texts that are looked at in a session that prepares nothing by name."""
_LOOK: Final = 10
"""How many of them a simple Query counts for whose text takes a closer look."""
_NEVER: Final = -1
_PARENTHESIS: Final = ord("(")
_SEMICOLON: Final = ord(";")


class Statement:
    """The text of a Parse."""

    __slots__ = ("cut", "epoch", "in_doubt", "name", "quiet", "refused", "sql")

    def __init__(self, name: bytes, sql: bytes | None, cut: bool, epoch: int) -> None:
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
        self.in_doubt = False
        """If it is refused, its name may stand for a text that doesn't."""


@final
class Named(Statement):
    """One with a name, and whether that was free."""

    __slots__ = ("closed", "is_new")

    def __init__(self, name: bytes, sql: bytes | None, cut: bool, epoch: int) -> None:
        super().__init__(name, sql, cut, epoch)
        self.is_new = False
        """This session has made no statement of this name before, or closed it."""
        self.closed: Closing | None = None
        """The Close, if that is so."""


@final
class Closing:
    """The Close of a statement; of the unnamed one also a simple Query, which drops it."""

    __slots__ = ("epoch", "in_doubt", "refused")

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.refused = False
        """The server has discarded it."""
        self.in_doubt = False


_NONE: Final[dict[bytes, Statement | Closing]] = {}
"""Of sessions that have prepared nothing, which is never changed: a dict takes 64 bytes."""


@final
class Statements:
    """The prepared statements by name; the oldest is forgotten when they get too many."""

    __slots__ = ("_by_name", "_epoch", "_named", "_patience", "_sure", "_unsure", "watching")

    def __init__(self) -> None:
        self._by_name = _NONE
        self._epoch = 0
        """Counts what has made all names unsure."""
        self._unsure = False
        """Names that are not in the table may have been made."""
        self._sure = 0
        """The same for statements that are certain; ``_NEVER`` if what lasts may make or drop statements any time."""
        self._named = False
        """The session has prepared a statement by name, or closed one."""
        self._patience = _PATIENCE
        self.watching = True
        """What simple queries say matters."""

    # What the client sends

    def query(self, sql: bytes, *, cut: bool) -> None:
        """A simple Query has been sent. It drops the unnamed statement: ``exec_simple_query()`` in ``postgres.c``."""
        if b"" in self._by_name:
            _drop_text(self._by_name[b""])
            self._by_name[b""] = Closing(self._epoch)
        if self._sure == _NEVER:
            self.watching = bool(self._by_name)
            return
        self._count(1)
        simply = (
            not cut
            and sql
            and sql[0] in SIMPLY_QUIET
            and _PARENTHESIS not in sql
            and (_SEMICOLON not in sql or sql.find(_SEMICOLON, 0, len(sql) - 1) < 0)
        )
        if not simply:
            self._count(_LOOK)
            self._run(None if cut else sql)

    def parse(self, request: Request, chunk: bytes, body: i64, stop: i64) -> Statement | None:
        """Keep the text of a Parse, whose body is a name, NUL, the text, NUL, and parameter types."""
        text = body + 1 if body < stop and not chunk[body] else chunk.find(0, body, stop) + 1
        if text == 0:
            self._unsettle()
            return None
        stop = min(stop, text + TEXT_LIMIT)
        terminator = chunk.find(0, text, stop)
        cut = terminator < 0
        sql = part(chunk, text, stop if cut else terminator)
        if request.sql is None:
            request.sql, request.sql_cut = sql, cut
        statement: Statement
        self.watching = True
        if text == body + 1:
            before = self._by_name.get(b"")
            _drop_text(before)
            self._table()[b""] = statement = Statement(b"", sql, cut, self._epoch)
        else:
            name = part(chunk, body, min(text - 1, body + NAME_LENGTH))
            self._named = True
            before = self._by_name.pop(name, None)
            _drop_text(before)
            statement = named = Named(name, sql, cut, self._epoch)
            if isinstance(before, Closing):
                named.closed = before
            named.is_new = not isinstance(before, Statement)
            named.in_doubt = before is None and self._unsure
            self._keep(name, named)
        if before is not None:
            statement.in_doubt = not isinstance(before, Statement) or before.in_doubt or not before.quiet
        if self._sure != _NEVER:
            self._count(1)
            statement.quiet = not cut and judge(sql) is QUIET
        return statement

    def bind(self, request: Request, chunk: bytes, body: i64, stop: i64) -> Statement | None:
        """A Bind has been sent, whose body is a portal, NUL, a statement, NUL, and more.

        Returns the statement that it names, unless it isn't known. What it says will be executed.
        """
        # A message may end in front of its body, if what was said of its length has been overruled.
        has_portal = body < stop and chunk[body] != 0
        name = find_end(chunk, body, stop) + 1 if has_portal else body + 1
        if 0 < name < stop and not chunk[name]:
            found = self._by_name.get(b"")
        else:
            end = find_end(chunk, name, stop) if name else -1
            if end - name > NAME_LENGTH:
                end = name + NAME_LENGTH
            found = self._by_name.get(part(chunk, name, end)) if end >= 0 else None
        if not isinstance(found, Statement):
            self._unsettle()
            return None
        if request.sql is None and not found.refused:
            request.sql, request.sql_cut = found.sql, found.cut
        if (not found.quiet or (found.refused and found.in_doubt)) and self._sure != _NEVER:
            if has_portal:
                self._go_blind()  # a portal that has a name may be executed whenever
            else:
                self._unsettle()
        return found

    def describe(self, chunk: bytes, body: i64, stop: i64) -> Statement | None:
        """The Describe of a statement has been sent, whose body is ``S``, a name, and NUL; as :meth:`bind`."""
        found = self._by_name.get(_name(chunk, body, stop))
        return found if isinstance(found, Statement) else None

    def close(self, chunk: bytes, body: i64, stop: i64) -> Closing:
        """The Close of a statement has been sent, whose body is ``S``, a name, and NUL."""
        name = _name(chunk, body, stop)
        closing = Closing(self._epoch)
        self._named = self.watching = True
        _drop_text(self._by_name.pop(name, None))
        self._keep(name, closing)
        return closing

    def call(self) -> None:
        """A FunctionCall has been sent: of which function, only its number says."""
        self._unsettle()

    # What the server says

    def refuse(self, what: Statement | Closing) -> None:
        """The server has refused or discarded a Parse or Close."""
        what.refused = True
        if what.in_doubt:
            self._unsettle()  # another text may have been executed since, under its name

    def contradicts_existence(self, statement: Statement) -> bool:
        """Whether the server, if it says to a Parse that the name is taken, contradicts what this session has done."""
        if not isinstance(statement, Named) or not statement.is_new:
            return False
        closed = statement.closed
        if closed is None:
            return not self._unsure
        return not closed.refused and closed.epoch == self._sure

    def contradicts_absence(self, statement: Statement) -> bool:
        """Whether the server, if it says that a statement isn't there, contradicts what this session has done."""
        # No text drops the unnamed statement but by being a simple Query.
        return not statement.refused and (statement.epoch == self._sure or not statement.name)

    # What is sure

    def _run(self, sql: bytes | None) -> None:
        """A text will be executed; ``None`` if it isn't known whole."""
        effect, name = (Effect.ANY, b"") if sql is None else judge(sql)
        if effect is Effect.ONE_NAME:
            unsure = Named(name, None, False, self._epoch)
            unsure.refused = unsure.in_doubt = True
            _drop_text(self._by_name.pop(name, None))
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

    def _table(self) -> dict[bytes, Statement | Closing]:
        """The statements by name, to be changed."""
        if self._by_name is _NONE:
            self._by_name = {}
        return self._by_name

    def _keep(self, name: bytes, what: Statement | Closing) -> None:
        by_name = self._table()
        if len(by_name) >= _LIMIT:
            forgotten = by_name.pop(next(iter(by_name)))
            self._unsure = True
            _drop_text(forgotten)
        by_name[name] = what

    def _count(self, cost: int) -> None:
        """A session that prepares nothing by name is not looked at for ever."""
        if not self._named:
            self._patience -= cost
            if self._patience < 0:
                self._go_blind()


def _drop_text(replaced: Statement | Closing | None) -> None:
    """Of one that nobody can name any more, what the server still owes for it keeps no more than its name."""
    if isinstance(replaced, Statement):
        replaced.sql = None


def _name(chunk: bytes, body: i64, stop: i64) -> bytes:
    """The name in a Describe or Close, behind the byte that says what it is of."""
    start = body + 1
    end = find_end(chunk, start, stop)
    return part(chunk, start, min(end if end >= 0 else stop, start + NAME_LENGTH))
