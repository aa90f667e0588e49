"""The ledger: what the server still owes, who is waiting for it, and what becomes of it.

The theory is in :mod:`pgguard.session.states`; here is what happens to the queue when an answer is complete, when
one fails, and when a COPY begins and ends.
"""

from __future__ import annotations

from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Final, final

from pgguard.session.states import CAN_BECOME_COPY, COPY_IN, NO_REQUEST, UNASKED, WORK, Owes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mypy_extensions import i64

    from pgguard.session.requests import Request
    from pgguard.session.statements import Closing, Statement

NOTHING: Final[i64] = int(Owes.NOTHING)
SYNC: Final[i64] = int(Owes.SYNC)
MAYBE_SYNC: Final[i64] = int(Owes.MAYBE_SYNC)
COPY_END: Final[i64] = int(Owes.COPY_END)

_COUNTED: Final = 4096
"""Entries up to which it is counted what is sent in copy-in mode that the server needn't answer."""
# mypyc never sets a constant that is a tuple of i64.
_SYNCS: Final[tuple[int, ...]] = (SYNC, MAYBE_SYNC)
_NAMING: Final = (int(Owes.PARSE), int(Owes.CLOSE))
_NO_DEBTS: Final[tuple[int, ...]] = (MAYBE_SYNC, COPY_END)
_TAKEN_KEPT: Final = 64
"""Entries that have been the head and stay in front of the others, half of all at most, so that the next moves none."""
_UNFLUSHED: Final = -1
"""Less than any number of entries that have been the head."""
_RUN_LIMIT: Final = 56
"""Bits of a number of the processor's that are used for debts, a byte each."""

Entry = tuple[int, "Request", "Statement | Closing | None"]
"""A debt, :attr:`Owes.COPY_END` being none, whose it is, and which prepared statement it is about, as far as that is
certain."""


@final
class Ledger:
    """A queue of what the server owes, and how far it has come with the entry at the head.

    The head stands by itself. Behind it, and in front of all other entries, a few debts of the same request are kept in
    one number, its *run*. A client that waits for each answer has no more than those, and no object is made. Whoever
    asks for more than the head has the run made into entries first (:meth:`_spread`).

    Args:
        login: stands for the StartupMessage, whose answer is owed first.
    """

    __slots__ = (
        "_flushed",
        "_head",
        "_marks",
        "_named",
        "_owes",
        "_run",
        "_run_bits",
        "_taken",
        "discarding",
        "entries",
        "skipping",
        "state",
        "uncounted",
    )

    def __init__(self, login: Request) -> None:
        self.state: i64 = int(Owes.LOGIN)
        """What is owed for the head, as far as it has come; ``NOTHING`` if there is none."""
        self._owes: i64 = self.state
        """What was owed for it when it was entered."""
        self._head = login
        """Whose it is."""
        self._named: Statement | Closing | None = None
        """Which prepared statement it is about."""
        self._run: i64 = 0
        """What is owed behind it for the same request, a byte each, the next one lowest; about no statement."""
        self._run_bits: i64 = 0
        """How many bits of it are in use."""
        self.entries: list[Entry] = []
        """Those behind the head and its run, and in front of them some that were, and have been the head. A deque takes
        700 bytes, and compiled ten times as long."""
        self._taken: i64 = 0
        """How many have been."""
        self.skipping = False
        """The server discards messages, and the Sync that will end that has not been sent yet."""
        self.discarding = False
        """The server discards messages unless the head, a Sync that it may have discarded, has ended that."""
        self._flushed: i64 = _UNFLUSHED
        """How many entries there were when a Flush was sent: the client has asked for the answers to them, and for the
        head's. If that is less than how many have been the head, it hasn't asked for the head's either."""
        self.uncounted = False
        """There have been more Syncs that may have been answered than are counted."""
        self._marks = 0
        """Entries that are marks, :attr:`Owes.COPY_END`."""

    # What there is

    @property
    def count(self) -> int:
        """How many entries there are."""
        return 0 if self.state == NOTHING else 1 + self._run_bits // 8 + len(self.entries) - self._taken

    def queue(self) -> Iterator[Entry]:
        """All of them, from the head on."""
        if self.state == NOTHING:
            return iter(())
        return chain([(self._owes, self._head, self._named)], self._behind())

    def _behind(self) -> Iterator[Entry]:
        """Those behind the head."""
        self._spread()
        return islice(self.entries, self._taken, None)

    def first(self) -> Request:
        """Whose the head is, of which there is one."""
        return self._head

    @property
    def copying_in(self) -> bool:
        """Whether the server reads copy data, and the client has not said yet that this is all."""
        return self.state in COPY_IN and not self._marked()

    @property
    def may_copy_in(self) -> bool:
        """Whether copy data has a place here, or may turn out to have."""
        if self.state in CAN_BECOME_COPY:
            return True
        return any(owes in CAN_BECOME_COPY for owes, _, _ in self._behind())

    def outstanding(self) -> Iterator[Request]:
        """The requests that wait for an answer, one for each entry, in order."""
        return (request for owes, request, _ in self.queue() if owes not in NO_REQUEST)

    def asked(self) -> Iterator[Request]:
        """Those of :meth:`outstanding` of which the client has asked for the answer.

        Of extended-protocol messages it does so with a Sync or Flush; of those without, the answers come with the next
        that it asks for.
        """
        self._spread()
        entries = self.entries
        stop = len(entries)
        first = max(self._taken, self._flushed)
        while stop > first and entries[stop - 1][0] in UNASKED:
            stop -= 1
        asked = stop - self._taken
        if not asked and self._flushed < self._taken and self._owes in UNASKED:
            return iter(())
        return (request for owes, request, _ in islice(self.queue(), 1 + asked) if owes not in NO_REQUEST)

    def works(self) -> bool:
        """Whether anything is outstanding that is lost with the connection: the other debts change no data."""
        return any(owes in WORK for owes, _, _ in self.queue())

    def answering(self) -> Request | None:
        """The request at the head, if the answer to the very message that the head stands for has begun."""
        return self._head if self.state not in (NOTHING, self._owes) else None

    def _marked(self) -> bool:
        return self._marks > 0

    # What happens to it

    def enter(self, owes: i64, request: Request, named: Statement | Closing | None = None) -> None:
        """A message has been sent that has an answer."""
        if self.skipping:
            request.skip()
            return
        if self.state == NOTHING:
            self.state = self._owes = owes
            self._head = request
            self._named = named
        elif (
            request is self._head
            and named is None
            and self._run_bits < _RUN_LIMIT
            and len(self.entries) == 0
            and self._flushed == _UNFLUSHED
        ):
            self._run |= owes << self._run_bits
            self._run_bits += 8
        else:
            self.entries.append((owes, request, named))

    def _spread(self) -> None:
        """Make the run into entries."""
        if not self._run_bits:
            return
        run: int = self._run
        self.entries[:0] = [(owes, self._head, None) for owes in run.to_bytes(self._run_bits // 8, "little")]
        self._run = self._run_bits = 0

    def enter_in_copy(self, request: Request) -> None:
        """A Sync has been sent in copy-in mode: the server discards it, unless the COPY has failed by then.

        It may do so for ever, so that they can't be kept waiting until some are answered. Those beyond a number are not
        counted: then a ReadyForQuery too many is none.
        """
        if self.count < _COUNTED:
            self.enter(MAYBE_SYNC, request)
        else:
            self.uncounted = True

    def end_copy_data(self) -> None:
        """CopyDone or CopyFail has been sent behind what stands in the ledger, which is something."""
        if self._marks < _COUNTED:
            self._marks += 1
            self._spread()
            last = self.entries[-1][1] if self.count > 1 else self._head
            self.entries.append((COPY_END, last, None))

    def flush(self) -> None:
        """A Flush has been sent: what stands in the ledger is asked for."""
        if self.state != NOTHING:
            self._spread()
            self._flushed = len(self.entries)

    def compact(self) -> int:
        """Have equal entries share one object, and return how many objects they are, the head counted.

        A client that asks for no answers may send many messages before the server answers any.
        """
        self._forget_taken()
        return 1 + _share(self.entries)

    def pay(self) -> None:
        """The head is complete: the next entry that owes something is the head."""
        self._head.begun = True
        self._take_next()

    def _take_next(self) -> None:
        """Nothing is owed for the head any more."""
        if self._run_bits:
            self.state = self._owes = self._run & 0xFF
            self._run >>= 8
            self._run_bits -= 8
            self._named = None
            return
        entries = self.entries
        while self._taken < len(entries):
            owes, request, named = entries[self._taken]
            self._taken += 1
            if owes != COPY_END:
                self.state = self._owes = owes
                self._head = request
                self._named = named
                if self._taken > _TAKEN_KEPT and 2 * self._taken > len(entries):
                    self._forget_taken()
                return
            self._marks -= 1
        self._empty()

    def _forget_taken(self) -> None:
        """Take away what stands in front of what is behind the head."""
        del self.entries[: self._taken]
        self._flushed -= self._taken
        self._taken = 0

    def _empty(self) -> None:
        """All that was owed has been paid, or won't be."""
        if len(self.entries):
            self.entries.clear()
        self._run = self._run_bits = 0
        self._taken = 0
        self._flushed = _UNFLUSHED
        self._named = None
        self.state = NOTHING

    def ready(self) -> bool:
        """A ReadyForQuery has come that the head owes.

        Returns False if nobody can tell any more what is owed: it came from a Sync that may have been discarded, and so
        may all have been that stands behind it.
        """
        in_doubt = self.state == MAYBE_SYNC
        discarding, self.discarding = self.discarding, False
        self.pay()
        if in_doubt and self.state != NOTHING:
            if self.state == SYNC:
                self.state = self._owes = MAYBE_SYNC
                return True
            if self.state != MAYBE_SYNC:
                return not discarding
            self._spread()
            entries = self.entries
            for index in range(self._taken, len(entries)):
                owes, request, _ = entries[index]
                if owes == SYNC:
                    entries[index] = (MAYBE_SYNC, request, None)
                if owes not in _NO_DEBTS:
                    return owes == SYNC or not discarding
        return True

    def skip_to_sync(self, refuse: Callable[[Statement | Closing], None]) -> None:
        """An error in the extended query protocol: drop what the server discards, up to the next Sync.

        Args:
            refuse: is told of each Parse and Close among it.
        """
        while self.state != NOTHING:
            if self._owes in _SYNCS:
                self.state = self._owes
                self.discarding = self.state == MAYBE_SYNC
                return
            self._head.skip()
            if self._named is not None and self._owes in _NAMING:
                refuse(self._named)
            self._take_next()
        self.skipping = True

    def step_aside(self) -> bool:
        """Something came that the head doesn't owe: True if that is a Sync which must have been discarded, then."""
        if self.state != MAYBE_SYNC:
            return False
        self.discarding = False
        self.pay()
        return True

    def enter_copy_in(self, state: int) -> None:
        """The head has begun to read copy data: it discards each Sync in front of the CopyDone."""
        self.state = state
        self._spread()
        entries = self.entries
        for index in range(self._taken, len(entries)):
            owes, request, _ = entries[index]
            if owes == COPY_END:
                return
            if owes == SYNC:
                entries[index] = (MAYBE_SYNC, request, None)

    def leave_copy_in(self) -> None:
        """The head's COPY has been completed: each Sync in front of its CopyDone has been discarded for certain."""
        self._spread()
        entries = self.entries
        behind = self._taken
        if self._marked():
            while entries[behind][0] == MAYBE_SYNC:
                self._drop(behind)
            if entries[behind][0] == COPY_END:
                self._drop(behind)
                self._marks -= 1

    def _drop(self, index: int) -> None:
        """An entry that is not at the head is owed no longer."""
        del self.entries[index]
        if index < self._flushed:
            self._flushed -= 1

    def clear(self) -> None:
        """Nothing more will come."""
        self._empty()
        self._marks = 0


def _share(entries: list[Any]) -> int:
    """Put one object in place of equal ones; returns how many objects that makes."""
    # The types say nothing of tuples: compiled, one that is known as such is made anew each time it is looked at.
    shared: dict[Any, Any] = {}
    entries[:] = [shared.setdefault(entry, entry) for entry in entries]
    return len(shared)
