"""What happens between the end of the command and the end of its guard.

A program that daemonises ends at once, and is at work from then on. So the guard goes on for as long as a connection is
open through it; and a process that the command has left behind has a moment to open one.
"""

from __future__ import annotations

import math
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import trio

from pgguard.faults.text import all_named, counted, listed
from pgguard.proxy.watch import UNUSED

if TYPE_CHECKING:
    from collections.abc import Callable

    from pgguard.launch.child import Child
    from pgguard.launch.left_behind import LeftBehind
    from pgguard.proxy.overview import SessionSnapshot
    from pgguard.running import RunningGuard

GRACE: Final = 2.0
"""Seconds for a process that has been left behind to open a connection, while there is none, unless a limit is set."""
_SETTLING: Final = 0.3
"""Seconds in which connections end that processes had which have ended together with the command."""
_SILENCE: Final = 1.0
"""Seconds for which it goes on without a word."""
_INTERVAL: Final = 0.2
"""Seconds between two looks at whether processes are left."""
_JUDGING: Final = 3.0
"""Seconds for what has been found in the end to be recorded."""


class Lingering:
    """Lets a guard go on for as long as it is needed.

    Args:
        guard: It.
        child: The command, which has ended.
        left_behind: What it has left behind.
        limit: Seconds that it may take; ``None`` for no limit while a connection is open, and :data:`GRACE` while none
            is.
        say: Takes the line that says what is waited for.
    """

    def __init__(
        self,
        guard: RunningGuard,
        child: Child,
        left_behind: LeftBehind,
        *,
        limit: float | None,
        say: Callable[[str], None],
    ) -> None:
        self._guard = guard
        self._child = child
        self._left_behind = left_behind
        self._limit = limit
        self._is_over = False
        self._say = say
        self._changed = trio.Event()
        self._began = trio.current_time()
        self._before = {session.facts.id: session.requests for session in guard.snapshot()}
        """By session that is open when the command has ended, how many requests it had made."""
        self._used: set[int] = set()
        """Those that have been used since, that have begun since, or that aren't followed."""
        self._told: set[int] = set()
        """Those that have been judged."""

    def opened(self, _: object) -> None:
        """A session has begun."""
        self._changed.set()

    def closed(self, _: object) -> None:
        """A session has ended."""
        self._changed.set()

    def end(self) -> None:
        """Wait no longer."""
        self._is_over = True
        self._changed.set()

    async def run(self) -> None:
        """Wait until the guard isn't needed any more; sessions that are open then are judged."""
        self._guard.tell(self)
        began = alone_since = self._began
        limit = math.inf if self._limit is None else self._limit
        ends = began + max(limit, _SETTLING)
        grace = GRACE if self._limit is None else limit
        has_said = False
        while not self._is_over and (now := trio.current_time()) < ends:
            sessions = self._guard.snapshot()
            left = self._left_behind.running(self._child.pid)
            if sessions:
                alone_since = now
                self._note_use(sessions, now)
            elif not left or now - alone_since >= grace:
                return
            if not has_said and now - began >= _SILENCE and (sessions or self._limit is not None):
                has_said = True
                self._say(self._announcement(sessions, left))
            await self._pause(min(_INTERVAL, ends - now))
        await self._judge_the_rest()

    async def _pause(self, seconds: float) -> None:
        """Wait until a session has begun or ended, it is to end, or time is up."""
        self._changed = trio.Event()
        with trio.move_on_after(seconds):
            await self._changed.wait()

    def _announcement(self, sessions: list[SessionSnapshot], left: list[int]) -> str:
        if sessions:
            known = {one.pid: one for session in sessions for one in session.holders or (session.opener,) if one}
            whose = f" by {all_named(list(known.values()))}" if known else ""
            one = len(sessions) == 1
            what = f"{counted(len(sessions), 'connection')} {'is' if one else 'are'} still open{whose}"
            until = f"until {'it is' if one else 'they are'} closed"
        else:
            what = f"{listed([f'pid {pid}' for pid in left])} of it {'runs' if len(left) == 1 else 'run'} on"
            until = "in case of a connection from there"
        most = "" if self._limit is None else f", for {self._limit:g} s at most"
        ended = f"{self._child.name} has ended ({self._child.ended})"
        return f"{ended}, but {what}: the guard goes on {until}{most}; Ctrl-C ends it"

    # Sessions that are left open

    def _note_use(self, sessions: list[SessionSnapshot], now: float) -> None:
        """Take note of which are used. Those that nobody uses for long enough are judged."""
        for session in sessions:
            requests = self._before.get(session.facts.id)
            if requests is None or requests != session.requests:
                self._used.add(session.facts.id)
        if now - self._began >= UNUSED:
            self._judge(sessions)

    def _judge(self, sessions: list[SessionSnapshot]) -> bool:
        """Have those judged that nobody uses; returns whether all of them are."""
        numbers = {one.facts.id for one in sessions if not self._is_daemons(one)} - self._used - self._told
        if numbers:
            self._told |= self._guard.leave_open(numbers, "the command")
        return numbers <= self._told

    async def _judge_the_rest(self) -> None:
        """Judge the sessions that are open as the guard ends, and wait until that is recorded."""
        with trio.move_on_after(_JUDGING):
            while True:
                sessions = self._guard.snapshot()
                self._note_use(sessions, trio.current_time())
                if self._judge(sessions):
                    break
                await trio.sleep(_INTERVAL / 10)  # something else is being judged about one of them
            await self._guard.settled()

    def _is_daemons(self, session: SessionSnapshot) -> bool:
        """Whether a process has it open that has cut itself loose from the command, as a daemon does: setsid(2).

        If it isn't known who has it open, it may be any process that has been left behind.
        """
        ours = {os.getsid(0), self._child.pid}
        pids = [holder.pid for holder in session.holders] or self._left_behind.running(self._child.pid)
        for pid in pids:
            with suppress(OSError):
                if os.getsid(pid) not in ours:
                    return True
        return False
