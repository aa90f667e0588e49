"""What two ways of playing one conversation are compared by: the verdicts, and the state that is left."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pgguard.session.tracker import Tracker
    from pgguard.session.verdicts import Verdict


def outcome(tracker: Tracker) -> tuple[object, ...]:
    """All of a session's state that can make a difference later on, and what is counted of it."""
    return (
        tracker.idle,
        tracker.transaction_status,
        tracker.terminated,
        tracker.goodbye,
        tracker.lost,
        tracker.backend_rest,
        tracker.ledger.state,
        tracker.ledger.skipping,
        tracker.copy_over,
        tracker.unsynced is None,
        (tracker.frontend_messages, tracker.backend_messages),
        [(owes, request.n) for owes, request, _ in tracker.ledger.queue()],
        [(r.n, r.messages, r.sql, r.sql_cut, r.state) for r in tracker.requests_seen()],
    )


def told(verdicts: Iterable[Verdict]) -> list[tuple[object, ...]]:
    """Of each, what is said to have happened."""
    return [
        (v.kind, v.reason, v.message, v.libpq, v.open_request, v.open_transaction, [(r.n, r.state) for r in v.requests])
        for v in verdicts
    ]


def named(verdicts: Iterable[Verdict]) -> list[tuple[object, ...]]:
    """Of each, who is said to have done what."""
    return [(v.intruder, v.requesters, v.sender, [r.sender for r in v.requests], v.ends) for v in verdicts]
