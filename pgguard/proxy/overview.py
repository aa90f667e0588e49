"""What a guard's sessions are doing, for whoever looks at it from outside; and word of each that comes or goes.

It is there to be shown, and so without the secrets on command lines and in what clients have set.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from heapq import heappush, heappushpop
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from pgguard.attribution.findings import Activity
from pgguard.faults.build import discreet_facts
from pgguard.faults.sql import SqlMode, SqlText
from pgguard.faults.text import discreet
from pgguard.proxy.turns import GLANCES, Stint
from pgguard.secrets.text import HIDDEN

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pgguard.attribution.evidence import Process
    from pgguard.faults.fault import SessionFacts
    from pgguard.identity import Sender
    from pgguard.proxy.addresses import Address
    from pgguard.proxy.session import ProxiedSession
    from pgguard.session.tracker import Tracker
    from pgguard.session.verdicts import RequestState

_LEFT_OUT: Final = HIDDEN[0]
"""What stands in the place of a secret."""
_REMEMBERED: Final = 1024
"""Processes, and what clients have set, of which it is remembered how they are shown."""


@dataclass(frozen=True, slots=True)
class LastRequest:
    """The latest request of a session."""

    n: int
    at: float
    """Seconds since the epoch."""
    messages: str
    """The types of its messages, in order."""
    text: SqlText
    state: RequestState
    sender: Sender | None
    """Who has sent it, if the kernel said so."""


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
    last_request: LastRequest | None
    """``None`` if there was none, or it isn't followed."""


class Order(StrEnum):
    """Which sessions come first."""

    OLDEST = "oldest"
    NEWEST = "newest"
    ACTIVE = "active"
    """Those with the latest request."""
    WAITING = "waiting"
    """Those whose request is outstanding, the oldest request first; then the others."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which sessions are to be told of."""

    limit: int = 100
    """How many, at most."""
    order: Order = Order.OLDEST
    activity: Activity | None = None
    """Only those that are used for this."""
    cause: int | None = None
    """Only those that have had faults of this cause."""
    search: str = ""
    """Only those in whose client, user, database, application name, pids or programs this stands, in any case; or in
    the name of the database that the guard has them go to."""
    behind: int = 0
    """Only those with a larger number."""


class Seen(NamedTuple):
    """A session, and the numbers of the causes that it has had faults of."""

    session: SessionSnapshot
    causes: tuple[int, ...]


class Overview(NamedTuple):
    """Some of the sessions that are open."""

    total: int
    """How many are open."""
    open: dict[Activity, int]
    """The same, by what they are used for."""
    matching: int
    """How many of them are wanted."""
    sessions: list[Seen]
    """The first of those."""


class SessionListener(Protocol):
    """Is told of sessions. It must not block: it is called on the relay's thread. What it raises costs nothing else."""

    def opened(self, session: SessionFacts) -> None:
        """A client has been introduced to the server."""

    def closed(self, session: SessionFacts) -> None:
        """One that was opened is over, and its sockets are closed."""


def snapshot(session: ProxiedSession, sql_mode: SqlMode = SqlMode.NONE) -> SessionSnapshot:
    """What is known of a session at this moment, without looking at anything.

    Args:
        session: The session.
        sql_mode: How its last request's text is shown.
    """
    tracker, opener = session.tracker, _opener(session)
    return SessionSnapshot(
        facts=_discreet_facts(session.facts()),
        activity=activity(tracker),
        requests=None if tracker is None else tracker.requests,
        opener=None if opener is None else _discreet(opener),
        holders=tuple(_discreet(holder) for holder in session.sightings.holders),
        upstream=session.upstream,
        last_request=None if tracker is None else _last_request(tracker, sql_mode),
    )


def activity(tracker: Tracker | None) -> Activity:
    """What a session is doing, by what follows it."""
    if tracker is None:
        return Activity.UNKNOWN
    if not tracker.idle:
        return Activity.BUSY
    return Activity.IDLE_IN_TRANSACTION if tracker.in_transaction else Activity.IDLE


def _last_request(tracker: Tracker, sql_mode: SqlMode) -> LastRequest | None:
    if tracker.last_request is None:
        return None
    seen = tracker.requests_seen()[-1]
    text = SqlText(seen.sql, sql_mode, cut=seen.sql_cut)
    return LastRequest(seen.n, seen.at, seen.messages, text, seen.state, seen.sender)


@lru_cache(_REMEMBERED)
def _discreet(process: Process) -> Process:
    return discreet(process)


def _discreet_facts(facts: SessionFacts) -> SessionFacts:
    """A session's facts as they may be shown; what many clients set alike is looked at once."""
    shown = _discreet_settings(replace(facts, id=0, client=None, backend_pid=None, opened_at=0.0))
    return replace(facts, user=shown.user, database=shown.database, application_name=shown.application_name)


@lru_cache(_REMEMBERED)
def _discreet_settings(facts: SessionFacts) -> SessionFacts:
    return discreet_facts(facts)


async def overview(
    sessions: Sequence[ProxiedSession],
    wanted: Wanted,
    sql_mode: SqlMode,
    causes_of: Callable[[int], tuple[int, ...]],
) -> Overview:
    """Choose among sessions, and tell of those that are wanted. Others have their turn meanwhile.

    Args:
        sessions: Those that are open, the oldest first.
        wanted: Which.
        sql_mode: How the texts of requests are shown.
        causes_of: Tells the causes that a session has had faults of, by its number.
    """
    stint = Stint()
    activities = dict.fromkeys(Activity, 0)
    first: list[tuple[float, int, ProxiedSession]] = []
    """A heap, of those that come first the last one in front."""
    matching = 0
    search = wanted.search.casefold()
    for number, session in enumerate(sessions, 1):
        used_for = activity(session.tracker)
        activities[used_for] += 1
        if (
            (wanted.activity is None or used_for is wanted.activity)
            and session.id > wanted.behind
            and (wanted.cause is None or wanted.cause in causes_of(session.id))
            and (not search or _is_found(session, search))
        ):
            matching += 1
            one = (-_rank(session, used_for, wanted.order), -session.id, session)
            if len(first) < wanted.limit:
                heappush(first, one)
            else:
                heappushpop(first, one)
        if search or number % GLANCES == 0:
            await stint.rest()
    told = []
    for *_, session in sorted(first, key=lambda one: one[:2], reverse=True):
        told.append(Seen(snapshot(session, sql_mode), causes_of(session.id)))
        await stint.rest()
    return Overview(len(sessions), activities, matching, told)


def _rank(session: ProxiedSession, used_for: Activity, order: Order) -> float:
    """Where a session stands: the smaller, the further in front."""
    if order is Order.OLDEST:
        return session.id
    if order is Order.NEWEST:
        return -session.id
    last = None if session.tracker is None else session.tracker.last_request
    at = session.opened_at if last is None else last.at
    if order is Order.ACTIVE:
        return -at
    return at - (1e12 if used_for is Activity.BUSY else 0.0)


def _is_found(session: ProxiedSession, search: str) -> bool:
    """Whether a text stands in what is shown of a session.

    What is shown is what there is, less its secrets: only where a text stands in the one it is looked for in the other.
    """
    facts = session.facts()
    if _stands_in(search, _told(facts)) and _stands_in(search, _told(_discreet_facts(facts)), shown=True):
        return True
    processes = (_opener(session), *session.sightings.holders)
    return any(
        one is not None
        and _stands_in(search, _spelled(one))
        and _stands_in(search, _spelled(_discreet(one)), shown=True)
        for one in processes
    )


def _stands_in(search: str, text: str, *, shown: bool = False) -> bool:
    """Whether a text stands in another, or, unless that is what is shown, may do so with a secret left out."""
    return search in text.casefold() or (not shown and _LEFT_OUT in search)


def _told(facts: SessionFacts) -> str:
    known = (facts.client, facts.user, facts.database, facts.application_name, facts.through, facts.backend_pid)
    return f"session {facts.id} {' '.join(str(one) for one in known if one is not None)}"


def _spelled(process: Process) -> str:
    return f"pid {process.pid} {process.name} {' '.join(process.cmdline)}"


def _opener(session: ProxiedSession) -> Process | None:
    return None if session.opening is None else session.opening.opener
