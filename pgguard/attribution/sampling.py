"""Who has just sent, told by who has just begun to wait: the kernel names nobody over TCP.

A client that has sent a request waits for the answer, so a thread that wasn't blocked on the socket before the request
came and is now may well be the one that sent it. It is, if it waits for this socket alone, where one in an event loop
waits for whatever comes; if it isn't one that waits for this socket anyhow, as a watcher for notifications does; if
nobody else has begun to wait; and if nobody else who has the socket open runs, who may be on the way from the send to
the wait. That takes a moment, so one looks again until it is so, or gives up: then nobody is named. Nothing is
concluded from what isn't seen.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from typing import NamedTuple

from pgguard.attribution.evidence import Process
from pgguard.attribution.threads import Sleep, Thread, Waiting, Waits, sleeps_still, waiting_threads

_PAUSE = 0.0003
"""Seconds for a thread to come from its send to its wait."""


class Sample(NamedTuple):
    """What was seen of the processes that have a socket open when bytes had come from one of them."""

    pid: int | None
    """The process that has sent them, if that can be told."""
    tid: int | None
    """Its thread, if it can be told as well."""
    waits: Waits
    """All that wait."""

    @property
    def asleep(self) -> frozenset[Sleep]:
        """What tells the next sample who has waited since this one."""
        return frozenset(one.sleep for one in self.waits.threads)

    @property
    def blocked(self) -> tuple[Waiting, ...]:
        """The threads that were blocked reading at the same moment; none unless there are several.

        They were seen one after the other. Who is in the same sleep afterwards was in it when the last one was seen.
        """
        blocked = [one for one in self.waits.threads if one.blocked]
        same = [one for one in blocked if len(blocked) > 1 and sleeps_still(one.sleep)]
        return tuple(same) if len(same) > 1 else ()


def sample_sender(
    processes: Collection[Process],
    inode: int,
    *,
    before: frozenset[Sleep],
    busy: Iterable[tuple[int, int | None]] = (),
    watchers: Collection[Thread] = (),
    seconds: float,
) -> Sample:
    """Find out which thread of ``processes`` has sent the bytes that have just come. For worker threads.

    Args:
        processes: those that have the socket open.
        inode: the socket's.
        before: who waited already when these bytes hadn't come: :attr:`Sample.asleep` of the sample before.
        busy: pid and tid of those that an answer is due to; without a tid, it may be any thread of the process. They
            wait for that, and wake for each part of it.
        watchers: threads that wait whether or not an answer is due.
        seconds: how long to look for somebody who begins to wait.
    """
    waiting_for_answers = set(busy)
    deadline = time.monotonic() + seconds
    while True:
        waits = waiting_threads(processes, inode)
        fresh = [one for one in waits.threads if one.readable and one.sleep not in before]
        ours = [
            one
            for one in fresh
            if one.thread not in watchers
            and waiting_for_answers.isdisjoint({(one.thread.pid, one.thread.tid), (one.thread.pid, None)})
        ]
        last = time.monotonic() >= deadline
        if any(one.others for one in fresh) or len(ours) > 1:
            return Sample(None, None, waits)
        if ours and waits.complete:
            [one] = ours
            if not waits.running:
                return Sample(one.thread.pid, one.thread.tid, waits)
            if last and waits.running == {one.thread.pid}:
                return Sample(one.thread.pid, None, waits)
        if last:
            return Sample(None, None, waits)
        time.sleep(_PAUSE)
