"""Of the sessions that are open, which count toward a limit of the server's, and what each is doing.

What counts is what PostgreSQL counts, as far as it goes through the guard: ``InitProcess()`` in ``proc.c``,
``CountUserBackends()`` and ``CountDBConnections()`` in ``procarray.c``. A session counts once it has logged in: one
that is still on its way may be refused as well, and one that has said goodbye has given its slot back.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from pgguard.attribution.evidence import Evidence
from pgguard.attribution.findings import Activity, Share, Slots
from pgguard.attribution.holders import Holders, sole_holder
from pgguard.proxy.overview import activity
from pgguard.session.refusals import Replication
from pgguard.session.verdicts import Limit

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from pgguard.attribution.evidence import Process
    from pgguard.attribution.witness import Opening, Witness
    from pgguard.proxy.session import ProxiedSession
    from pgguard.session.tracker import Tracker
    from pgguard.session.verdicts import Refusal


_STRENGTH: Final = tuple(Evidence)
"""Kinds of evidence, the strongest first."""


class Counted(NamedTuple):
    """A session that counts."""

    session: ProxiedSession
    activity: Activity


def call_roll(
    refused: ProxiedSession, refusal: Refusal | None, sessions: Iterable[ProxiedSession]
) -> tuple[Counted, ...]:
    """Find the sessions that count toward the limit for which a session has been refused.

    Args:
        refused: the session.
        refusal: which limit it was. Of one that isn't known, all sessions count.
        sessions: all that there are.
    """
    limit = None if refusal is None else refusal.limit
    return tuple(
        Counted(session, activity(session.tracker))
        for session in sessions
        if session is not refused
        and session.upstream == refused.upstream
        and not session.draining
        and session.protocol is not None
        and _counts(session.protocol, limit, None if refusal is None else refusal.name)
    )


def _counts(protocol: Tracker, limit: Limit | None, name: str | None) -> bool:
    if not protocol.logged_in or protocol.over:
        return False
    match limit:
        case Limit.ROLE:
            return protocol.user == name
        case Limit.DATABASE:
            return protocol.database == name and protocol.replication is not Replication.PHYSICAL
        case Limit.WAL_SENDERS:
            return protocol.replication is not Replication.NONE
        case Limit.SERVER | Limit.RESERVED:
            return protocol.replication is Replication.NONE
        case None:
            return True


def count(witness: Witness, counted: Sequence[Counted]) -> tuple[tuple[Share, ...], Slots]:
    """Count sessions by who has them open, one that is shared for each of them; in a worker thread.

    Returns:
        Who has how many, the most first, and how many there are.
    """
    openings = [one.session.opening for one in counted]
    held = witness.watch(opening.inode for opening in openings if opening is not None and opening.inode is not None)
    tallies: dict[tuple[int, int] | None, _Tally] = {}
    for one, opening in zip(counted, openings, strict=True):
        for process, evidence in _holders(witness, opening, held):
            key = None if process is None else (process.pid, process.started)
            tallies.setdefault(key, _Tally(process)).add(one.activity, evidence)
    doing = Counter(one.activity for one in counted)
    shares = sorted((tally.share() for tally in tallies.values()), key=lambda share: -share.connections)
    return tuple(shares), Slots(len(counted), doing[Activity.IDLE], doing[Activity.IDLE_IN_TRANSACTION])


def _holders(
    witness: Witness, opening: Opening | None, held: Mapping[int, Holders]
) -> list[tuple[Process | None, Evidence]]:
    """Who has a session's connection open, and how that is known; ``None`` if it is not known who."""
    if opening is not None:
        holders = Holders() if opening.inode is None else held[opening.inode]
        if holders.processes:
            evidence = Evidence.SOCKET_HOLDER if sole_holder(holders) is None else Evidence.SOLE_HOLDER
            return [(process, evidence) for process in holders.processes]
        if opening.opener is not None and not witness.is_gone(opening.opener):
            return [(opening.opener, opening.evidence)]
    return [(None, Evidence.UNKNOWN)]


@dataclass(slots=True)
class _Tally:
    """The connections of one process, as they are being counted."""

    process: Process | None
    doing: Counter[Activity] = field(default_factory=Counter)
    weakest: Evidence = Evidence.KERNEL_SENDER

    def add(self, activity: Activity, evidence: Evidence) -> None:
        self.doing[activity] += 1
        self.weakest = max(self.weakest, evidence, key=_STRENGTH.index)

    def share(self) -> Share:
        doing = self.doing
        return Share(
            self.process, doing.total(), doing[Activity.IDLE], doing[Activity.IDLE_IN_TRANSACTION], self.weakest
        )
