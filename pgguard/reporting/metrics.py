"""What a guard has done, as Prometheus reads it.

Names follow Prometheus' conventions ("Metric and label naming" in its documentation), in the manner of
pgbouncer_exporter. What a label can say is known beforehand: kinds, severities, reasons; never a pid, a name that a
client has chosen, or SQL.

Numbers are put together when they are asked for: nothing is counted here.
"""

from __future__ import annotations

import os
import platform
import resource
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from pgguard.attribution.findings import Activity
from pgguard.compiled import form
from pgguard.faults.catalogue import Severity
from pgguard.faults.policy import possible_actions
from pgguard.proxy.figures import BOUNDS
from pgguard.session.verdicts import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from prometheus_client.core import Metric

    from pgguard.faults.docket import Count
    from pgguard.proxy.figures import Figures, Measured

STATES: Final[Mapping[Activity, str]] = {
    Activity.BUSY: "busy",
    Activity.IDLE: "idle",
    Activity.IDLE_IN_TRANSACTION: "idle-in-transaction",
    Activity.UNKNOWN: "unknown",
}
"""What the states of sessions are called, here and in the API."""

_PAGE: Final = resource.getpagesize()
_MEMORY: Final = Path("/proc/self/statm")


class _Numbers(Collector):
    """One set of them."""

    def __init__(
        self,
        figures: Figures,
        counts: Sequence[Count],
        *,
        started_at: float,
        lost_records: int,
        missing: Sequence[str],
    ) -> None:
        self._figures = figures
        self._counts = counts
        self._started_at = started_at
        self._lost_records = lost_records
        self._missing = missing

    def collect(self) -> Iterator[Metric]:
        """Tell them."""
        yield from self._guard()
        yield from self._sessions()
        yield from self._faults()
        yield from self._itself()
        yield from _process(self._started_at)

    def _guard(self) -> Iterator[Metric]:
        build = GaugeMetricFamily(
            "pgguard_build_info",
            "Which pgguard this is, and whether it runs compiled or as pure Python; always 1.",
            labels=("version", "form", "python_version"),
        )
        build.add_metric(_build(), 1.0)
        yield build
        missing = GaugeMetricFamily(
            "pgguard_missing_evidence",
            "Evidence of who did it that this host doesn't allow, each 1; pgguard doctor says why.",
            labels=("evidence",),
        )
        for name in self._missing:
            missing.add_metric((name,), 1.0)
        yield missing

    def _sessions(self) -> Iterator[Metric]:
        figures = self._figures
        sessions = GaugeMetricFamily(
            "pgguard_sessions", "Sessions that are open, by what they are used for.", labels=("state",)
        )
        for activity, state in STATES.items():
            sessions.add_metric((state,), figures.open[activity])
        yield sessions
        yield GaugeMetricFamily(
            "pgguard_sessions_limit",
            "Sessions that there can be at once, as the limit of open files allows.",
            figures.capacity,
        )
        yield CounterMetricFamily("pgguard_clients", "Clients that have connected to the guard.", figures.clients)
        yield CounterMetricFamily(
            "pgguard_sessions_opened", "Clients for which the server was connected to.", figures.introduced
        )
        refused = CounterMetricFamily(
            "pgguard_clients_refused", "Clients that were not logged in, by the reason.", labels=("reason",)
        )
        for why, times in figures.turned_away.items():
            refused.add_metric((why.value,), times)
        yield refused
        up = GaugeMetricFamily(
            "pgguard_server_up",
            "Whether the server could be connected to for the last client (1) or not (0), by the name of the database "
            "where there are several; nothing as long as none has come.",
            labels=("database",),
        )
        for name, answers in figures.server_answers.items():
            up.add_metric((name or "",), answers)
        yield up
        yield CounterMetricFamily(
            "pgguard_requests",
            "Requests that clients have made: simple queries, extended ones up to their Sync, function calls.",
            figures.requests,
        )
        messages = CounterMetricFamily(
            "pgguard_messages",
            "Messages of the protocol that were passed on and followed: of clients (frontend), behind their "
            "StartupMessages, and of servers (backend).",
            labels=("direction",),
        )
        for direction, number in zip(("frontend", "backend"), figures.messages, strict=True):
            messages.add_metric((direction,), number)
        yield messages
        passed = CounterMetricFamily(
            "pgguard_forwarded_bytes",
            "Bytes that were passed on: of clients (frontend), and of servers (backend).",
            labels=("direction",),
        )
        passed.add_metric(("frontend",), figures.from_clients)
        passed.add_metric(("backend",), figures.from_servers)
        yield passed
        yield _histogram(
            "pgguard_added_seconds",
            "Seconds for which what had come waited at most until it was passed on; of one round of the relay in "
            "a turn, a thousand a second at most. What a ruling held is not among it.",
            figures.added,
        )

    def _faults(self) -> Iterator[Metric]:
        faults = CounterMetricFamily(
            "pgguard_faults",
            "Faults, recorded or not, by kind, by severity, and by what was done.",
            labels=("kind", "severity", "action"),
        )
        # A series that begins with its first fault has no increase.
        times = {
            (kind, severity, action): 0 for kind in Kind for severity in Severity for action in possible_actions(kind)
        }
        for count in self._counts:
            times[count.kind, count.severity, count.action] = count.faults + count.repeats
        for (kind, severity, action), number in times.items():
            faults.add_metric((kind.value, severity.value, action.value), number)
        yield faults
        yield CounterMetricFamily(
            "pgguard_lost_records", "Faults that could not be recorded, counted for each sink.", self._lost_records
        )
        yield _histogram(
            "pgguard_evidence_seconds",
            "Seconds that it took to look into faults that needed it. Of a session, one message at most was held "
            "meanwhile.",
            self._figures.evidence,
        )

    def _itself(self) -> Iterator[Metric]:
        errors = CounterMetricFamily(
            "pgguard_internal_errors",
            "Internal errors, by what they have cost: tracking is a session that is no longer followed.",
            labels=("cost",),
        )
        for loss, times in self._figures.losses.items():
            errors.add_metric((loss.name.lower(),), times)
        yield errors
        unnamed = self._figures.unnamed
        if unnamed is not None:
            yield CounterMetricFamily(
                "pgguard_lost_sender_reports",
                "The kernel's reports of who sends on TCP that came too fast, and got lost.",
                unnamed.reports,
            )
            yield CounterMetricFamily(
                "pgguard_contradicting_sender_reports",
                "The kernel's reports of who sends on TCP that contradicted others.",
                unnamed.contradictions,
            )
            yield CounterMetricFamily(
                "pgguard_unnamed_connections",
                "TCP connections that are closed, and whose senders the kernel did not name to the end.",
                unnamed.connections,
            )


@cache
def _build() -> tuple[str, str, str]:
    """Which pgguard this is, in which form, and which Python: it takes time to find out."""
    return version("pgguard"), "compiled" if form().compiled else "pure", platform.python_version()


def _process(started_at: float) -> Iterator[Metric]:
    """What Prometheus expects of every process, as far as it costs next to nothing to tell."""
    used = os.times()
    yield CounterMetricFamily(
        "process_cpu_seconds", "Processor time that the guard has used, in seconds.", used.user + used.system
    )
    resident = int(_MEMORY.read_bytes().split()[1]) * _PAGE
    yield GaugeMetricFamily("process_resident_memory_bytes", "Memory that the guard takes, in bytes.", resident)
    yield GaugeMetricFamily(
        "process_start_time_seconds", "When the guard was started, in seconds since the epoch.", started_at
    )


def _histogram(name: str, documentation: str, measured: Measured) -> Metric:
    so_far = 0
    buckets: list[tuple[str, float]] = []
    for bound, times in zip((*(f"{bound:.6f}" for bound in BOUNDS), "+Inf"), measured.times, strict=True):
        so_far += times
        buckets.append((bound, so_far))
    family = HistogramMetricFamily(name, documentation)
    family.add_metric((), buckets, measured.seconds)
    return family


def exposition(
    accept: str,
    figures: Figures,
    counts: Sequence[Count],
    *,
    started_at: float,
    lost_records: int,
    missing: Sequence[str],
) -> tuple[str, bytes]:
    """All numbers, as they are scraped.

    Args:
        accept: The header of the request by that name, which says in which format.
        figures: What the guard has done.
        counts: Its faults.
        started_at: When it was started, in seconds since the epoch.
        lost_records: Faults that could not be recorded.
        missing: The names of the evidence that this host doesn't allow.

    Returns:
        The response's media type, and its body.
    """
    registry = CollectorRegistry()
    registry.register(_Numbers(figures, counts, started_at=started_at, lost_records=lost_records, missing=missing))
    encode, media_type = choose_encoder(accept)
    return media_type, encode(registry)
