"""A guard's figures as metrics, sent to a collector as often as OTEL_METRIC_EXPORT_INTERVAL says.

They are sums and histograms since the start of the guard, so that a collector that was away has missed nothing when it
is back; unless OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE asks for what has been added to them each time. No
attribute of theirs is a pid, a name that a client has chosen, or SQL.

The guard's histograms are ready by the time that they are sent, and the SDK has no instrument that takes such. So they
are put beside what its instruments have yielded.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.metrics import Observation
from opentelemetry.sdk.metrics import Histogram as Instrument
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricExportResult,
    MetricsData,
    PeriodicExportingMetricReader,
)

from pgguard.proxy.figures import BOUNDS, Measured
from pgguard.reporting.otel.wire import Wire

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import TypeAlias

    from opentelemetry.metrics import CallbackOptions
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope

    from pgguard.faults.docket import Count
    from pgguard.proxy.figures import Figures

    _Observe: TypeAlias = Callable[[Figures, Sequence[Count], int], Iterable[Observation]]

_UNKNOWN: Final[Any] = None
"""The least and the most that there was: both are optional in the protocol."""

logger = logging.getLogger(__name__)


class OtelMetrics:
    """Sends a guard's figures to a collector.

    Args:
        resource: What is said of the guard.
        scope: The guard and its version.
    """

    def __init__(self, resource: Resource, scope: InstrumentationScope) -> None:
        self._figures: Figures | None = None
        self._counts: Sequence[Count] = ()
        self._lost = 0
        # It begins a thread.
        reader = PeriodicExportingMetricReader(_Exporter(self._durations))
        self._provider = MeterProvider([reader], resource=resource, shutdown_on_exit=False)
        meter = self._provider.get_meter(scope.name, scope.version)
        for name, unit, text, observe in _SUMS:
            meter.create_observable_counter(name, [self._observing(observe)], unit, text)
        for name, unit, text, observe in _LEVELS:
            meter.create_observable_up_down_counter(name, [self._observing(observe)], unit, text)

    def show(self, figures: Figures, counts: Sequence[Count], lost: int) -> None:
        """Send these from now on.

        Args:
            figures: The guard's.
            counts: How often which faults have come.
            lost: How many of them couldn't be recorded.
        """
        self._figures, self._counts, self._lost = figures, counts, lost

    def close(self, *, deadline: float) -> None:
        """Send them once more, within so many seconds. Never raises."""
        try:
            self._provider.shutdown(timeout_millis=deadline * 1000)
        except Exception as error:  # it raises what its reader does, and whatever that is, the guard ends
            logger.warning("the last metrics could not be sent: %s", error)

    def _durations(self) -> list[tuple[str, str, Measured]]:
        figures = self._figures
        return [] if figures is None else [(name, text, measured(figures)) for name, text, measured in _DURATIONS]

    def _observing(self, observe: _Observe) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observations(_: CallbackOptions) -> Iterable[Observation]:
            figures = self._figures
            return [] if figures is None else observe(figures, self._counts, self._lost)

        return observations


class _Exporter(OTLPMetricExporter):
    """Adds the histograms, and says when the collector doesn't take metrics, and when it does again.

    Args:
        durations: Tells what they are made of: of each its name, what it is, and what there was so far.
    """

    def __init__(self, durations: Callable[[], list[tuple[str, str, Measured]]]) -> None:
        self._wire = Wire()
        super().__init__(session=self._wire)
        self._durations = durations
        preferred = self._preferred_temporality or {}
        self._adds = preferred.get(Instrument) is AggregationTemporality.DELTA
        """What has been added since the last time is to be sent."""
        self._sent: dict[str, Measured] = {}
        self._sent_at = time.time_ns()
        self._is_away = False

    def export(self, metrics_data: MetricsData, *args: Any, **kwargs: Any) -> MetricExportResult:
        durations, now = self._durations(), time.time_ns()
        made = [self._histogram(name, text, measured, now) for name, text, measured in durations]
        result = super().export(_with(metrics_data, made), *args, **kwargs)
        if self._adds and result is MetricExportResult.SUCCESS:
            self._sent, self._sent_at = {name: measured for name, _, measured in durations}, now
        is_away = result is not MetricExportResult.SUCCESS
        if is_away is not self._is_away:
            self._is_away = is_away
            where = f"the OpenTelemetry collector at {self._endpoint}"
            if is_away:
                logger.warning("%s can't be reached: %s; the next metrics tell it all", where, self._wire.why)
            else:
                logger.warning("%s takes metrics again", where)
        return result

    def _histogram(self, name: str, text: str, measured: Measured, now: int) -> Metric:
        before = self._sent.get(name, Measured((0,) * len(measured.times), 0.0))
        times = [number - sent for number, sent in zip(measured.times, before.times, strict=True)]
        point = HistogramDataPoint(
            attributes={},
            start_time_unix_nano=self._sent_at,
            time_unix_nano=now,
            count=sum(times),
            sum=measured.seconds - before.seconds,
            bucket_counts=times,
            explicit_bounds=BOUNDS,
            min=_UNKNOWN,
            max=_UNKNOWN,
        )
        kind = AggregationTemporality.DELTA if self._adds else AggregationTemporality.CUMULATIVE
        return Metric(name, text, "s", Histogram([point], kind))


def _with(data: MetricsData, metrics: list[Metric]) -> MetricsData:
    """The same with more metrics, which are the guard's as all of them are."""
    resource, *resources = data.resource_metrics
    scope, *scopes = resource.scope_metrics
    scope = replace(scope, metrics=[*scope.metrics, *metrics])
    return replace(data, resource_metrics=[replace(resource, scope_metrics=[scope, *scopes]), *resources])


def _faults(_: Figures, counts: Sequence[Count], __: int) -> list[Observation]:
    return [
        Observation(
            count.faults + count.repeats,
            {
                "pgguard.fault.kind": count.kind.value,
                "pgguard.fault.severity": count.severity.value,
                "pgguard.fault.action": count.action.value,
            },
        )
        for count in counts
    ]


def _bytes(figures: Figures, _: Sequence[Count], __: int) -> list[Observation]:
    return [
        Observation(figures.from_clients, {"network.io.direction": "receive"}),
        Observation(figures.from_servers, {"network.io.direction": "transmit"}),
    ]


def _messages(figures: Figures, _: Sequence[Count], __: int) -> list[Observation]:
    return [
        Observation(number, {"network.io.direction": direction})
        for direction, number in zip(("receive", "transmit"), figures.messages, strict=True)
    ]


def _turned_away(figures: Figures, _: Sequence[Count], __: int) -> list[Observation]:
    return [Observation(times, {"pgguard.reason": why.value}) for why, times in figures.turned_away.items()]


def _up(figures: Figures, _: Sequence[Count], __: int) -> list[Observation]:
    return [
        Observation(int(answers), {} if name is None else {"pgguard.session.through": name})
        for name, answers in figures.server_answers.items()
    ]


def _open(figures: Figures, _: Sequence[Count], __: int) -> list[Observation]:
    return [
        Observation(sessions, {"pgguard.session.activity": activity.name.lower().replace("_", "-")})
        for activity, sessions in figures.open.items()
    ]


def _losses(figures: Figures, _: Sequence[Count], __: int) -> list[Observation]:
    return [
        Observation(times, {"pgguard.cost": loss.name.lower().replace("_", "-")})
        for loss, times in figures.losses.items()
    ]


def _unnamed(figures: Figures, _: Sequence[Count], __: int) -> list[Observation]:
    unnamed = figures.unnamed
    if unnamed is None:
        return []
    return [Observation(times, {"pgguard.reason": why}) for why, times in unnamed._asdict().items()]


_SUMS: Final[Sequence[tuple[str, str, str, _Observe]]] = (
    ("pgguard.faults", "{fault}", "Faults, recorded or not", _faults),
    ("pgguard.records.lost", "{record}", "Records that could not be written", lambda _, __, lost: [Observation(lost)]),
    ("pgguard.clients", "{client}", "Clients that have come", lambda one, _, __: [Observation(one.clients)]),
    ("pgguard.clients.turned_away", "{client}", "Clients that never got as far as to be logged in", _turned_away),
    (
        "pgguard.requests",
        "{request}",
        "Requests that clients have made",
        lambda one, _, __: [Observation(one.requests)],
    ),
    ("pgguard.messages", "{message}", "Messages from clients (receive) and to clients (transmit)", _messages),
    ("pgguard.io", "By", "Bytes from clients (receive) and to clients (transmit)", _bytes),
    ("pgguard.errors", "{error}", "Internal errors, by what they have cost", _losses),
    ("pgguard.senders.unnamed", "{report}", "What the kernel didn't say of senders on TCP", _unnamed),
)
_DURATIONS: Final[Sequence[tuple[str, str, Callable[[Figures], Measured]]]] = (
    ("pgguard.delay", "For how long what was passed on had waited", lambda one: one.added),
    ("pgguard.evidence", "How long it took to look into faults that needed it", lambda one: one.evidence),
)
_LEVELS: Final[Sequence[tuple[str, str, str, _Observe]]] = (
    ("pgguard.sessions", "{session}", "Open sessions, by what they are used for", _open),
    ("pgguard.server.up", "{server}", "Whether the server could be connected to for the last client", _up),
    ("pgguard.sessions.limit", "{session}", "How many there can be", lambda one, _, __: [Observation(one.capacity)]),
)
