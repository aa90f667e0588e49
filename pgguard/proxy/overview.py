"""What a guard's sessions are doing, for whoever looks at it from outside; and word of each that comes or goes.

It is there to be shown, and so without the secrets on command lines and in what clients have set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pgguard.attribution.findings import Activity
from pgguard.faults.build import discreet_facts
from pgguard.faults.text import discreet

if TYPE_CHECKING:
    from pgguard.attribution.evidence import Process
    from pgguard.faults.fault import SessionFacts
    from pgguard.proxy.addresses import Address
    from pgguard.proxy.session import ProxiedSession
    from pgguard.session.tracker import Tracker


@dataclass(frozen=True, slots=True)
class SessionSnapshot:
    """One session that is open, as it was at one moment."""

    facts: SessionFacts
    activity: Activity
    requests: int | None
    """How many its client has made; ``None`` if it isn't followed."""
    opener: Process | None
    """The process that opened it, if that is known."""
    holders: tuple[Process, ...]
    """The processes that had its socket open when that was last looked at."""
    upstream: Address | None
    """Which of the server's addresses it is connected to."""


class SessionListener(Protocol):
    """Is told of sessions. It must not block: it is called on the relay's thread. What it raises costs nothing else."""

    def opened(self, session: SessionFacts) -> None:
        """A client has been introduced to the server."""

    def closed(self, session: SessionFacts) -> None:
        """One that was opened is over, and its sockets are closed."""


def snapshot(session: ProxiedSession) -> SessionSnapshot:
    """What is known of a session at this moment, without looking at anything."""
    tracker = session.tracker
    opener = None if session.opening is None else session.opening.opener
    return SessionSnapshot(
        facts=discreet_facts(session.facts()),
        activity=activity(tracker),
        requests=None if tracker is None else tracker.requests,
        opener=None if opener is None else discreet(opener),
        holders=tuple(discreet(holder) for holder in session.sightings.holders),
        upstream=session.upstream,
    )


def activity(tracker: Tracker | None) -> Activity:
    """What a session is doing, by what follows it."""
    if tracker is None:
        return Activity.UNKNOWN
    if not tracker.idle:
        return Activity.BUSY
    return Activity.IDLE_IN_TRANSACTION if tracker.in_transaction else Activity.IDLE
