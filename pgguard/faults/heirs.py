"""Whether it is a fault that a fork took a connection along, before anything has gone wrong.

What inherits a connection either forgets it and opens one of its own, which is what the advice says, or is going to use
it, or does neither. All look alike just after the fork. So an heir isn't judged at once:

- If it uses the connection, that is judged at its first message, and not here (:mod:`pgguard.session.senders`).
- If it has opened a connection of its own and never used this one, it has followed the advice: *info*.
- If it has done neither, it is given time: two seconds from when it was first seen with the connection, and ten if it
  was forked by a server, whose workers wait to be given something to do. After that it is a *warning*.
- But while another child of the same parent has followed the advice, it is taken to run the same code and to have had
  no occasion yet, and nothing is said of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from pgguard.attribution.holders import Holding

PATIENCE: Final = 2.0
SERVERS_PATIENCE: Final = 10.0
"""Seconds for which an heir may have had a connection open and have done nothing, the second of a server's workers."""


class Heirs(NamedTuple):
    """What those who have inherited a connection have made of it, by their pids; who has used it is not among them."""

    settled: frozenset[int]
    """They have connections of their own."""
    idle: frozenset[int]
    """They have done nothing, and have had the time."""
    parents: frozenset[int]
    """Those of the settled ones."""


def judge_heirs(
    holdings: Iterable[Holding],
    *,
    used_by: Collection[int],
    have_opened: Collection[int],
    settled_parents: Collection[int],
    patience: float,
) -> Heirs:
    """Tell what the heirs of one connection are; of whom it can't be told yet, in neither set.

    Args:
        holdings: the heirs, and since when they have it open.
        used_by: the pids of those who have sent on the connection.
        have_opened: the pids of those who have opened connections of their own.
        settled_parents: the pids of those who have had a child that followed the advice.
        patience: how long an heir may do nothing, in seconds.
    """
    heirs = [holding for holding in holdings if holding.process.pid not in used_by]
    settled = [holding.process for holding in heirs if holding.process.pid in have_opened]
    parents = frozenset(process.ppid for process in settled if process.ppid is not None)
    idle = [
        holding.process.pid
        for holding in heirs
        if holding.process.pid not in have_opened
        and holding.process.ppid not in parents
        and holding.process.ppid not in settled_parents
        and holding.seen - holding.since >= patience
    ]
    return Heirs(frozenset(process.pid for process in settled), frozenset(idle), parents)
