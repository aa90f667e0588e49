"""The ledger: what the server still owes, who is waiting for it, and what becomes of it.

The theory is in :mod:`pgguard.session.states`; here is what happens to the queue when an answer is complete, when
one fails, and when a COPY begins and ends.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any, Final, final

from pgguard.session.states import CAN_BECOME_COPY, COPY_IN, NO_REQUEST, UNASKED, WORK, Owes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mypy_extensions import i64

    from pgguard.session.requests import Request
    from pgguard.session.statements import Closing, Statement

NOTHING: Final = int(Owes.NOTHING)
SYNC: Final = int(Owes.SYNC)
MAYBE_SYNC: Final = int(Owes.MAYBE_SYNC)
COPY_END: Final = int(Owes.COPY_END)

_COUNTED: Final = 4096
"""Entries up to which it is counted what is sent in copy-in mode that the server needn't answer."""
_SYNCS: Final = (SYNC, MAYBE_SYNC)
_NAMING: Final = (int(Owes.PARSE), int(Owes.CLOSE))
_NO_DEBTS: Final = (MAYBE_SYNC, COPY_END)
_PAID_KEPT: Final = 64
"""Entries that have been paid and stay in front of the others, half of all at most, so that paying one moves none."""

Entry = tuple[int, "Request", "Statement | Closing | None"]
"""A debt, :attr:`Owes.COPY_END` being none, whose it is, and which prepared statement it is about, as far as that is
certain. One that has begun to be paid stands unchanged."""


@final
class Ledger:
    """A queue of what the server owes, and how far it has come with the entry at the head.

    Args:
        login: stands for the StartupMessage, whose answer is owed first.
    """

    __slots__ = ("_flushed", "_marks", "_paid", "discarding", "entries", "skipping", "state", "uncounted")

    def __init__(self, login: Request) -> None:
        self.entries: list[Entry] = [(int(Owes.LOGIN), login, None)]
        """Those that have been paid, and then the queue. A deque takes 700 bytes, and compiled ten times as long."""
        self._paid: i64 = 0
        """How many have been; none if the queue is empty."""
        self.state: i64 = int(Owes.LOGIN)
        """What is owed for the head, as far as it has come; ``NOTHING`` if there is none."""
        self.skipping = False
        """The server discards messages, and the Sync that will end that has not been sent yet."""
        self.discarding = False
        """The server discards messages unless the head, a Sync that it may have discarded, has ended that."""
        self._flushed: i64 = 0
        """How many entries there were when a Flush was sent: the client has asked for the answers to them."""
        self.uncounted = False
        """There have been more Syncs that may have been answered than are counted."""
        self._marks = 0
        """Entries that are marks, :attr:`Owes.COPY_END`."""

    # What there is

    @property
    def count(self) -> int:
        """How many entries there are."""
        return len(self.entries) - self._paid

    def queue(self) -> Iterator[Entry]:
        """All of them, from the head on."""
        return islice(self.entries, self._paid, None)

    def first(self) -> Request:
        """Whose the head is, of which there is one."""
        return self.entries[self._paid][1]

    @property
    def copying_in(self) -> bool:
        """Whether the server reads copy data, and the client has not said yet that this is all."""
        return self.state in COPY_IN and not self._marked()

    @property
    def may_copy_in(self) -> bool:
        """Whether copy data has a place here, or may turn out to have."""
        if self.state in CAN_BECOME_COPY:
            return True
        return any(owes in CAN_BECOME_COPY for owes, _, _ in islice(self.entries, self._paid + 1, None))

    def outstanding(self) -> Iterator[Request]:
        """The requests that wait for an answer, one for each entry, in order."""
        return (request for owes, request, _ in self.queue() if owes not in NO_REQUEST)

    def asked(self) -> Iterator[Request]:
        """Those of :meth:`outstanding` of which the client has asked for the answer.

        Of extended-protocol messages it does so with a Sync or Flush; of those without, the answers come with the next
        that it asks for.
        """
        entries = self.entries
        stop = len(entries)
        first = max(self._paid, self._flushed)
        while stop > first and entries[stop - 1][0] in UNASKED:
            stop -= 1
        return (request for owes, request, _ in islice(entries, self._paid, stop) if owes not in NO_REQUEST)

    def works(self) -> bool:
        """Whether anything is outstanding that is lost with the connection: the other debts change no data."""
        return any(owes in WORK for owes, _, _ in self.queue())

    def answering(self) -> Request | None:
        """The request at the head, if the answer to the very message that the head stands for has begun."""
        if self.state == NOTHING:
            return None
        owes, request, _ = self.entries[self._paid]
        return request if owes != self.state else None

    def _marked(self) -> bool:
        return self._marks > 0

    # What happens to it

    def enter(self, owes: int, request: Request, named: Statement | Closing | None = None) -> None:
        """A message has been sent that has an answer."""
        if self.skipping:
            request.skip()
            return
        if self.state == NOTHING:
            self.state = owes
        self.entries.append((owes, request, named))

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
            self.entries.append((COPY_END, self.entries[-1][1], None))

    def flush(self) -> None:
        """A Flush has been sent: what stands in the ledger is asked for."""
        self._flushed = len(self.entries)

    def compact(self) -> int:
        """Have equal entries share one object, and return how many objects they are.

        A client that asks for no answers may send many messages before the server answers any.
        """
        del self.entries[: self._paid]
        self._flushed -= self._paid
        self._paid = 0
        return _share(self.entries)

    def pay(self) -> None:
        """The head is complete: the next entry that owes something is the head."""
        entries = self.entries
        at = self._paid
        entries[at][1].begun = True
        at += 1
        while at < len(entries):
            owes = entries[at][0]
            if owes != COPY_END:
                self.state = owes
                self._paid = at
                if at > _PAID_KEPT:
                    self._forget_paid()
                return
            self._marks -= 1
            at += 1
        self._empty()

    def _forget_paid(self) -> None:
        """Take away what stands in front of the head, if that is most of all."""
        if 2 * self._paid > len(self.entries):
            del self.entries[: self._paid]
            self._flushed -= self._paid
            self._paid = 0

    def _empty(self) -> None:
        """All that was owed has been paid, or won't be."""
        self.entries.clear()
        self._paid = self._flushed = 0
        self.state = NOTHING

    def ready(self) -> bool:
        """A ReadyForQuery has come that the head owes.

        Returns False if nobody can tell any more what is owed: it came from a Sync that may have been discarded, and so
        may all have been that stands behind it.
        """
        in_doubt = self.state == MAYBE_SYNC
        discarding, self.discarding = self.discarding, False
        self.pay()
        if in_doubt:
            entries = self.entries
            for index in range(self._paid, len(entries)):
                owes, request, _ = entries[index]
                if owes == SYNC:
                    entries[index] = (MAYBE_SYNC, request, None)
                    if index == self._paid:
                        self.state = MAYBE_SYNC
                if owes not in _NO_DEBTS:
                    return owes == SYNC or not discarding
        return True

    def skip_to_sync(self, refuse: Callable[[Statement | Closing], None]) -> None:
        """An error in the extended query protocol: drop what the server discards, up to the next Sync.

        Args:
            refuse: is told of each Parse and Close among it.
        """
        entries = self.entries
        for index in range(self._paid, len(entries)):
            owes, request, named = entries[index]
            if owes in _SYNCS:
                self.state = owes
                self._paid = index
                self._forget_paid()
                self.discarding = owes == MAYBE_SYNC
                return
            if owes == COPY_END:
                self._marks -= 1
            else:
                request.skip()
            if named is not None and owes in _NAMING:
                refuse(named)
        self._empty()
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
        entries = self.entries
        for index in range(self._paid + 1, len(entries)):
            owes, request, _ = entries[index]
            if owes == COPY_END:
                return
            if owes == SYNC:
                entries[index] = (MAYBE_SYNC, request, None)

    def leave_copy_in(self) -> None:
        """The head's COPY has been completed: each Sync in front of its CopyDone has been discarded for certain."""
        entries = self.entries
        behind = self._paid + 1
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
