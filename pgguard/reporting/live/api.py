"""The shapes of what the API answers: the JSON Schema beside this file says what they mean."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final, Protocol

from pgguard.faults.catalogue import CATALOGUE
from pgguard.proxy.turns import Stint
from pgguard.reporting.metrics import STATES
from pgguard.reporting.record import process_record, rfc3339, session_record

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from pgguard.attribution.capabilities import Capability
    from pgguard.attribution.evidence import Process
    from pgguard.faults.causes import Told
    from pgguard.faults.docket import Count
    from pgguard.faults.fault import Spread
    from pgguard.proxy.figures import Figures
    from pgguard.proxy.overview import LastRequest, Overview, Seen, Wanted
    from pgguard.proxy.settings import Front
    from pgguard.reporting.live.feed import Feed, KnownCause, Record

_CAUSES: Final = 300
"""Causes that are told at once, at most: the gravest."""


class Watched(Protocol):
    """What is known of a guard from outside: see :class:`pgguard.running.RunningGuard`."""

    @property
    def missing(self) -> Sequence[Capability]:
        """What attribution lacks on this host."""

    @property
    def fronts(self) -> Sequence[Front]:
        """The servers, each with where it listens for its clients."""

    @property
    def server_answers(self) -> Mapping[str | None, bool]:
        """By the name of the database, whether its server could be connected to the last time, if that was tried."""

    @property
    def lost_records(self) -> int:
        """How many faults could not be recorded."""

    async def figures(self) -> Figures:
        """What it has done so far."""

    async def overview(self, wanted: Wanted) -> Overview:
        """Some of its sessions."""

    async def go_round(self) -> None:
        """Wait until its relay has come round."""

    def counts(self) -> list[Count]:
        """What has happened so far."""

    def causes(self) -> list[Told]:
        """What it has come from."""

    def why_not_ready(self) -> str | None:
        """Why a client that comes now isn't let in."""


def to_json(value: object) -> bytes:
    """A value in one line of JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


async def sessions_json(seen: Overview, at: float, ended: Collection[dict[str, Any]]) -> bytes:
    """Some of the sessions that are open. Others have their turn meanwhile.

    Args:
        seen: Those.
        at: When that was, in seconds since the epoch.
        ended: Those that were asked for, and are over.
    """
    stint = Stint()
    told: list[bytes] = []
    for one in seen.sessions:
        told.append(to_json(_session(one, at)))
        await stint.rest()
    head = {
        "at": rfc3339(at),
        "total": seen.total,
        "open": {state: seen.open[activity] for activity, state in STATES.items()},
        "matching": seen.matching,
        "ended": list(ended),
    }
    return to_json(head)[:-1] + b',"sessions":[' + b",".join(told) + b"]}"


def _session(seen: Seen, at: float) -> dict[str, Any]:
    session, causes = seen
    return {
        "session": session_record(session.facts),
        "state": STATES[session.activity],
        "age": round(max(0.0, at - session.facts.opened_at), 3),
        "requests": session.requests,
        "last_request": None if session.last_request is None else _request(session.last_request),
        "opener": None if session.opener is None else _process(session.opener),
        "holders": [_process(holder) for holder in session.holders],
        "server": None if session.upstream is None else str(session.upstream),
        "causes": list(causes),
    }


def _request(request: LastRequest) -> dict[str, Any]:
    return {
        "n": request.n,
        "at": rfc3339(request.at),
        "messages": request.messages,
        "sql": request.text.shown(),
        "state": request.state.value,
        "pid": None if request.sender is None else request.sender.pid,
        "tid": None if request.sender is None else request.sender.tid,
    }


def _process(process: Process) -> dict[str, Any]:
    return {"pid": process.pid, "process": process_record(process)}


def faults_json(records: Sequence[Record], feed: Feed, *, more: bool) -> bytes:
    """Some of the recorded faults.

    Args:
        records: Those.
        feed: Where they are from.
        more: There are more of them.
    """
    last = records[-1].place if records else feed.last
    head = {"last": feed.identifier(last), "more": more, "gone": feed.gone}
    return to_json(head)[:-1] + b',"faults":[' + b",".join(record.line for record in records) + b"]}"


def causes_record(told: Sequence[Told], feed: Feed) -> dict[str, Any]:
    """The causes of which something has been recorded, the gravest first.

    Args:
        told: How far they have spread by now, as who counts them says; of those that have been forgotten, what their
            last record says holds.
        feed: Where they are from.
    """
    spreads = {one.fault.cause: one.spread for one in told}
    causes = [(cause, spreads.get(cause.number, cause.spread)) for cause in feed.causes]
    causes.sort(key=lambda one: (-one[0].severity.rank, -one[1].times, one[0].number))
    return {
        "last": feed.identifier(feed.last),
        "total": len(causes),
        "causes": [_cause(cause, spread) for cause, spread in causes[:_CAUSES]],
    }


def _cause(cause: KnownCause, spread: Spread) -> dict[str, Any]:
    return {
        "cause": cause.number,
        "fault": cause.fault,
        "kind": cause.kind.value,
        "severity": cause.severity.value,
        "title": CATALOGUE[cause.kind].title,
        "summary": cause.summary,
        "times": spread.times,
        "sessions": spread.sessions,
        "processes": spread.processes,
        "first_at": rfc3339(cause.first_at),
        "last_at": rfc3339(cause.last_at),
    }


def servers_record(fronts: Sequence[Front], answers: Mapping[str | None, bool]) -> list[dict[str, Any]]:
    """The servers, and whether each could be connected to the last time."""
    return [{"name": front.name, "answers": answers.get(front.name)} for front in fronts]


def figures_record(
    figures: Figures, counts: Sequence[Count], fronts: Sequence[Front], lost_records: int
) -> dict[str, Any]:
    """What the guard has done so far, in numbers."""
    faults: dict[tuple[str, str, str], int] = {}
    for count in counts:
        faults[count.kind.value, count.severity.value, count.action.value] = count.faults + count.repeats
    return {
        "at": rfc3339(figures.at),
        "open": {state: figures.open[activity] for activity, state in STATES.items()},
        "limit": figures.capacity,
        "clients": figures.clients,
        "opened": figures.introduced,
        "refused": {why.value: times for why, times in figures.turned_away.items()},
        "servers": servers_record(fronts, figures.server_answers),
        "requests": figures.requests,
        "messages": dict(zip(("frontend", "backend"), figures.messages, strict=True)),
        "bytes": {"frontend": figures.from_clients, "backend": figures.from_servers},
        "faults": [
            {"kind": kind, "severity": severity, "action": action, "times": times}
            for (kind, severity, action), times in faults.items()
        ],
        "lost_records": lost_records,
        "internal_errors": sum(figures.losses.values()),
    }
