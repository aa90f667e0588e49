"""Where in their programs connections are opened: the root cause of a connection that several processes share.

That can only be seen while it happens. A client that has sent its start-up packet waits for the server's answer, and
its thread sleeps in the call that opens the connection. So some clients are kept waiting for a moment before the server
is connected to, while the stack of the one thread that waits for this connection is read: by py-spy, or by asking a
Ruby process that ``pgguard run --ruby-stacks`` has started.
What is seen is told of that session alone: another one of the same program may have been opened elsewhere.

Who is looked at, so that few clients ever wait:

- Python's processes alone, other than the guard's own, if py-spy is there, and Ruby's that can be asked;
- of each process the first, second, fourth, eighth… connection that it opens, as what is opened early is what a server
  has when it forks;
- of each program (a command line without its numbers) so many at most that its siblings add nothing, and after that
  one now and then;
- within an allowance, for all together, and no longer than the evidence of a fault may take.

Where the kernel hasn't named who connects, it takes a moment to find that out, which is waited for only as long as it
keeps leading to somebody new.
"""

from __future__ import annotations

import math
import os
import time
from collections import OrderedDict, deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

import trio

from pgguard.attribution.runtime import Language
from pgguard.attribution.stacks import find_py_spy
from pgguard.faults.causes import program
from pgguard.proxy import looking
from pgguard.proxy.losses import Loss, spared
from pgguard.proxy.turns import Allowance

if TYPE_CHECKING:
    from pgguard.attribution.evidence import Process
    from pgguard.attribution.witness import Opening, Witness
    from pgguard.proxy.session import ProxiedSession

T = TypeVar("T")

_AT_A_TIME: Final = 2
"""Clients that are looked at at the same time."""
_LINE: Final = 4
"""Those that may wait for that; who comes then isn't kept waiting."""
_SHARE: Final = 0.05
_SAVINGS: Final = 1.0
"""Of a processor, what reading stacks takes in the long run at most; and seconds of it that it may take at once."""
_LAST_WORDS: Final = 0.01
"""Seconds of the budget that are left for what was found to be taken over."""
_EACH: Final = 8
"""Looks at one program before they become rare."""
_RARELY: Final = 60.0
"""Seconds between two looks at one program, then."""
_PROCESSES: Final = 1024
_PROGRAMS: Final = 256
"""Of how many it is remembered how often they have been looked at: those that have come lately."""
_FORGOTTEN_AFTER: Final = 600.0
"""Seconds after which a pid that has opened nothing meanwhile is taken for a new process's."""
_FRUITLESS: Final = 0.05
_FRUITLESS_AT_MOST: Final = 60.0
"""Seconds in which no other client is looked at whose process isn't known, after one that wasn't worth it: twice as
many each time."""


@dataclass(slots=True)
class _Looked:
    """What has been looked at."""

    occasions: int = 0
    """How many connections a process has opened; or how often a program has been looked at."""
    at: float = -math.inf
    """When that was last so, in seconds of time.monotonic()."""


class OpenerStacks:
    """Sees where some sessions are opened. Does nothing where no stacks can be read.

    Args:
        witness: attribution.
        budget: seconds for which a client may be kept waiting; 0: not at all.
    """

    def __init__(self, witness: Witness, budget: float) -> None:
        self._witness = witness
        self._budget = budget
        self._has_py_spy = find_py_spy() is not None
        self._threads = trio.CapacityLimiter(_AT_A_TIME)
        self._allowance = Allowance(_SHARE, _SAVINGS)
        self._taken: deque[float] = deque()
        """What has been taken of it and is not accounted for yet."""
        self._processes: OrderedDict[int, _Looked] = OrderedDict()
        """By pid; the one first that has opened nothing for longest."""
        self._programs: OrderedDict[str, _Looked] = OrderedDict()
        self._unnamed_next = -math.inf
        self._pause = _FRUITLESS

    def limit(self, budget: float) -> None:
        """Keep clients waiting for no longer than this from now on."""
        self._budget = budget

    def wants(self, session: ProxiedSession) -> bool:
        """Whether it is to be seen where a session is being opened; to be asked once."""
        if not (self._has_py_spy or self._witness.asks_ruby) or not self._budget or session.client_socket is None:
            return False
        while self._taken:
            self._allowance.spend(self._taken.popleft())
        if not self._allowance.has_any():
            return False
        connected = session.connected
        if connected is not None:
            return connected[0] != os.getpid() and self._opens(connected[0])
        return time.monotonic() >= self._unnamed_next

    async def look(self, session: ProxiedSession) -> None:
        """See where a session is being opened of which that :meth:`wants` to be known.

        To be called when its client waits for the answer to its start-up packet. Never raises but for cancellation.
        """
        until = time.monotonic() + self._budget - _LAST_WORDS
        with spared(Loss.OPENER, session), trio.move_on_after(self._budget):
            await session.wait_for_opening()
            opening = session.opening
            if opening is None or not self._is_worthwhile(session, opening):
                return
            read = partial(self._witness.opening_stack, opening, until=until, account=self._taken.append)
            session.opening_stack = await looking.look(read, limiter=self._threads)

    def _opens(self, pid: int) -> bool:
        """Take note that a process opens a connection; returns whether it is one that is looked at."""
        now = time.monotonic()
        seen = _recalled(self._processes, pid, _PROCESSES)
        if now - seen.at >= _FORGOTTEN_AFTER:
            seen.occasions = 0
        seen.occasions += 1
        seen.at = now
        return seen.occasions & (seen.occasions - 1) == 0

    def _is_worthwhile(self, session: ProxiedSession, opening: Opening) -> bool:
        opener = opening.opener
        is_legible = opener is not None and self._is_legible(opener, opening.runtime.language)
        if session.connected is None and (opener is None or not is_legible or not self._opens(opener.pid)):
            self._unnamed_next = time.monotonic() + self._pause
            self._pause = min(self._pause * 2, _FRUITLESS_AT_MOST)
            return False
        if opener is None or not is_legible or opener.pid == os.getpid():
            return False
        self._pause, self._unnamed_next = _FRUITLESS, -math.inf
        if self._threads.statistics().tasks_waiting >= _LINE:
            return False
        now, name = time.monotonic(), program(opener.cmdline)
        looked = _recalled(self._programs, name, _PROGRAMS)
        if looked.occasions >= _EACH and now - looked.at < _RARELY:
            return False
        looked.occasions += 1
        looked.at = now
        return True

    def _is_legible(self, opener: Process, language: Language | None) -> bool:
        """Whether the stacks of a process can be read."""
        if language is Language.RUBY:
            return self._witness.can_ask(opener)
        return language is Language.PYTHON and self._has_py_spy


def _recalled(known: OrderedDict[T, _Looked], key: T, most: int) -> _Looked:
    """What is remembered of this one, as of the one that has come last; of so many at most."""
    looked = known.pop(key, None) or _Looked()
    known[key] = looked
    if len(known) > most:
        known.popitem(last=False)
    return looked
