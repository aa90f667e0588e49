"""The ledger: what the server still owes, who is waiting for it, and what becomes of it.

The theory is in :mod:`pgguard.session.states`; here is what happens to the queue when an answer is complete, when
one fails, and when a COPY begins and ends.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Final

from pgguard.session.states import CAN_BECOME_COPY, COPY_IN, NO_REQUEST, UNASKED, WORK, Owes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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

Entry = tuple[int, "Request", "Statement | Closing | None"]
"""A debt, :attr:`Owes.COPY_END` being none, whose it is, and which prepared statement it is about, as far as that is
certain. One that has begun to be paid stands unchanged."""


class Ledger:
    """A queue of what the server owes, and how far it has come with the entry at the head.

    Args:
        login: stands for the StartupMessage, whose answer is owed first.
    """

    __slots__ = ("_flushed", "_marks", "discarding", "entries", "skipping", "state", "uncounted")

    def __init__(self, login: Request) -> None:
        self.entries: deque[Entry] = deque([(int(Owes.LOGIN), login, None)])
        self.state = int(Owes.LOGIN)
        """What is owed for the head, as far as it has come; ``NOTHING`` if there is none."""
        self.skipping = False
        """The server discards messages, and the Sync that will end that has not been sent yet."""
        self.discarding = False
        """The server discards messages unless the head, a Sync that it may have discarded, has ended that."""
        self._flushed: Entry | None = None
        """What stood last when a Flush was sent: the client has asked for the answers up to it."""
        self.uncounted = False
        """There have been more Syncs that may have been answered than are counted."""
        self._marks = 0
        """Entries that are marks, :attr:`Owes.COPY_END`."""

    # What there is

    @property
    def copying_in(self) -> bool:
        """Whether the server reads copy data, and the client has not said yet that this is all."""
        return self.state in COPY_IN and not self._marked()

    @property
    def may_copy_in(self) -> bool:
        """Whether copy data has a place here, or may turn out to have."""
        if self.state in CAN_BECOME_COPY:
            return True
        return any(index and owes in CAN_BECOME_COPY for index, (owes, *_) in enumerate(self.entries))

    def outstanding(self) -> Iterator[Request]:
        """The requests that wait for an answer, one for each entry, in order."""
        return (request for owes, request, _ in self.entries if owes not in NO_REQUEST)

    def asked(self) -> Iterator[Request]:
        """Those of :meth:`outstanding` of which the client has asked for the answer.

        Of extended-protocol messages it does so with a Sync or Flush; of those without, the answers come with the next
        that it asks for.
        """
        entries = self.entries
        count = len(entries)
        while count and entries[count - 1] is not self._flushed and entries[count - 1][0] in UNASKED:
            count -= 1
        return (request for owes, request, _ in islice(entries, count) if owes not in NO_REQUEST)

    def works(self) -> bool:
        """Whether anything is outstanding that is lost with the connection: the other debts change no data."""
        return any(entry[0] in WORK for entry in self.entries)

    def answering(self) -> Request | None:
        """The request at the head, if the answer to the very message that the head stands for has begun."""
        return self.entries[0][1] if self.entries and self.state != self.entries[0][0] else None

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
        if len(self.entries) < _COUNTED:
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
        self._flushed = self.entries[-1] if self.entries else None

    def compact(self) -> int:
        """Have equal entries share one object, and return how many objects they are.

        A client that asks for no answers may send many messages before the server answers any.
        """
        shared: dict[Entry, Entry] = {}
        flushed = self._flushed
        self.entries = deque(entry if entry is flushed else shared.setdefault(entry, entry) for entry in self.entries)
        return len(shared)

    def pay(self) -> int:
        """The head is complete: the next entry that owes something is the head. Returns the new state."""
        entries = self.entries
        entries.popleft()[1].begun = True
        while entries:
            state = entries[0][0]
            if state != COPY_END:
                self.state = state
                return state
            entries.popleft()
            self._marks -= 1
        self.state = NOTHING
        return NOTHING

    def ready(self) -> bool:
        """A ReadyForQuery has come that the head owes.

        Returns False if nobody can tell any more what is owed: it came from a Sync that may have been discarded, and so
        may all have been that stands behind it.
        """
        in_doubt = self.state == MAYBE_SYNC
        discarding, self.discarding = self.discarding, False
        self.pay()
        if in_doubt:
            for index, (owes, request, _) in enumerate(self.entries):
                if owes == SYNC:
                    self.entries[index] = (MAYBE_SYNC, request, None)
                    if index == 0:
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
        while entries:
            owes, request, named = entries[0]
            if owes in _SYNCS:
                self.state = owes
                self.discarding = owes == MAYBE_SYNC
                return
            if owes == COPY_END:
                self._marks -= 1
            else:
                request.skip()
            if named is not None and owes in _NAMING:
                refuse(named)
            entries.popleft()
        self.state = NOTHING
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
        for index in range(1, len(entries)):
            owes, request, _ = entries[index]
            if owes == COPY_END:
                return
            if owes == SYNC:
                entries[index] = (MAYBE_SYNC, request, None)

    def leave_copy_in(self) -> None:
        """The head's COPY has been completed: each Sync in front of its CopyDone has been discarded for certain."""
        entries = self.entries
        if self._marked():
            while entries[1][0] == MAYBE_SYNC:
                del entries[1]
            if entries[1][0] == COPY_END:
                del entries[1]
                self._marks -= 1

    def clear(self) -> None:
        """Nothing more will come."""
        self.entries.clear()
        self.state = NOTHING
        self._marks = 0
