"""Connections whose opener has ended: whether one of those who have them open uses them.

A daemon connects, forks, and its first process exits: the child that goes on with the connection has been handed it,
and however long it then leaves it idle, nothing is leaked. What is leaked is held by processes that don't know of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from pgguard.attribution.evidence import Process
    from pgguard.session.verdicts import RequestSeen

_TICK: Final = 0.02
"""Seconds: start times are known to the clock tick."""


def is_used(holders: Collection[Process], senders: Collection[int], requests: Iterable[RequestSeen]) -> bool:
    """Whether one of those who have a connection open has used it, or may have.

    A request of which it isn't known who sent it may be that of any process that was there by then.

    Args:
        holders: those who have it open, its opener not among them.
        senders: the pids of those who are known to have sent on it.
        requests: its latest requests.
    """
    if any(holder.pid in senders for holder in holders):
        return True
    born = min((holder.started_at for holder in holders), default=0.0)
    return any(request.sender is None and request.at > born - _TICK for request in requests)
