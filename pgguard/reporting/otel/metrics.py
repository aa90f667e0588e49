"""A guard's figures as metrics, sent to a collector as often as OTEL_METRIC_EXPORT_INTERVAL says.

They are sums since the start of the guard, so that a collector that was away has missed nothing when it is back. No
attribute of theirs is a pid, a name that a client has chosen, or SQL.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.metrics import Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricExportResult, PeriodicExportingMetricReader

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
        reader = PeriodicExportingMetricReader(_Exporter())
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

    def _observing(self, observe: _Observe) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observations(_: CallbackOptions) -> Iterable[Observation]:
            figures = self._figures
            return [] if figures is None else observe(figures, self._counts, self._lost)

        return observations


class _Exporter(OTLPMetricExporter):
    """Says when the collector doesn't take metrics, and when it does again."""

    def __init__(self) -> None:
        self._wire = Wire()
        super().__init__(session=self._wire)
        self._is_away = False

    def export(self, *args: Any, **kwargs: Any) -> MetricExportResult:
        result = super().export(*args, **kwargs)
        is_away = result is not MetricExportResult.SUCCESS
        if is_away is not self._is_away:
            self._is_away = is_away
            where = f"the OpenTelemetry collector at {self._endpoint}"
            if is_away:
                logger.warning("%s can't be reached: %s; the next metrics tell it all", where, self._wire.why)
            else:
                logger.warning("%s takes metrics again", where)
        return result


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


def _turned_away(figures: Figures, _: Sequence[Count], __: int) -> list[Observation]:
    return [Observation(times, {"pgguard.reason": why.value}) for why, times in figures.turned_away.items()]


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
    ("pgguard.io", "By", "Bytes from clients (receive) and to clients (transmit)", _bytes),
    (
        "pgguard.delay",
        "s",
        "For how long what was passed on had waited",
        lambda one, _, __: [Observation(one.added.seconds)],
    ),
    ("pgguard.evidence", "s", "How long evidence took", lambda one, _, __: [Observation(one.evidence.seconds)]),
    ("pgguard.errors", "{error}", "Internal errors, by what they have cost", _losses),
    ("pgguard.senders.unnamed", "{report}", "What the kernel didn't say of senders on TCP", _unnamed),
)
_LEVELS: Final[Sequence[tuple[str, str, str, _Observe]]] = (
    ("pgguard.sessions", "{session}", "Open sessions, by what they are used for", _open),
    ("pgguard.sessions.limit", "{session}", "How many there can be", lambda one, _, __: [Observation(one.capacity)]),
)
