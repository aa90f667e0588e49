"""What sends a guard's faults and figures to an OpenTelemetry collector, put together as the variables say."""

from __future__ import annotations

import os
import secrets
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from pgguard.faults.text import printable, shorten
from pgguard.proxy.errors import ConfigurationError
from pgguard.reporting.otel.attributes import own_attributes
from pgguard.reporting.otel.logs import FLUSH, OtelLogs
from pgguard.reporting.otel.metrics import OtelMetrics
from pgguard.reporting.otel.wire import keep_quiet

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from pgguard.faults.docket import Count
    from pgguard.faults.fault import Fault
    from pgguard.proxy.figures import Figures

_NAME: Final = "pgguard"
_SIGNALS: Final = ("LOGS", "METRICS")
_PROTOCOL: Final = "http/protobuf"
_INTERVAL: Final = "OTEL_METRIC_EXPORT_INTERVAL"


class Otel:
    """Sends faults as log records, and figures as metrics; a sink.

    No thread begins before :meth:`start`. It is the variables that say what is sent, and where to.

    Raises:
        ConfigurationError: They ask for what can't be done.
    """

    def __init__(self) -> None:
        wanted = _wanted(os.environ)
        _check(os.environ, wanted)
        self._resource = _resource(os.environ)
        self._scope = InstrumentationScope(_NAME, version(_NAME))
        try:
            self._logs = OtelLogs(self._resource, self._scope) if "LOGS" in wanted else None
        except Exception as error:  # of a certificate that isn't there, a number that isn't one, whatever that raises
            raise ConfigurationError(
                f"--otel: {shorten(printable(str(error)), 300)}: see the OTEL_… variables"
            ) from error
        self._sends_metrics = "METRICS" in wanted
        self._metrics: OtelMetrics | None = None

    def __str__(self) -> str:
        return str(self._logs) if self._logs is not None else "OpenTelemetry"

    def start(self, *, metrics: bool = True) -> None:
        """Begin to send, faults alone or metrics too, unless that has been done."""
        if self._logs is not None:
            self._logs.start()
        if metrics and self._sends_metrics and self._metrics is None:
            self._metrics = OtelMetrics(self._resource, self._scope)
        keep_quiet()

    def record(self, fault: Fault) -> None:
        """Have a fault sent; returns at once. Raises SinkError: some can't be."""
        if self._logs is not None:
            self._logs.record(fault)

    def show(self, figures: Figures, counts: Sequence[Count], lost: int) -> None:
        """Send a guard's figures from now on; arguments as of :meth:`.OtelMetrics.show`."""
        if self._metrics is not None:
            self._metrics.show(figures, counts, lost)

    def close(self) -> None:
        """Send what is left, for some seconds at most, faults and figures at once. Raises SinkError: some can't be."""
        keep_quiet()
        until = time.monotonic() + FLUSH
        if self._logs is not None:
            self._logs.end()
        if self._metrics is not None:
            self._metrics.close(deadline=FLUSH)
        if self._logs is not None:
            self._logs.close(deadline=max(0.0, until - time.monotonic()))


def _wanted(variables: Mapping[str, str]) -> frozenset[str]:
    """Which signals are to be sent. Raises ConfigurationError: in a way that there isn't."""
    if variables.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return frozenset()
    wanted = set()
    for signal in _SIGNALS:
        exporter = f"OTEL_{signal}_EXPORTER"
        how = variables.get(exporter, "").strip() or "otlp"
        if how == "none":
            continue
        if how != "otlp":
            raise ConfigurationError(f"{exporter}: pgguard can only send to otlp: use otlp or none")
        for name in (f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
            if protocol := variables.get(name, "").strip():
                if protocol != _PROTOCOL:
                    raise ConfigurationError(f"{name}: pgguard speaks {_PROTOCOL} alone: use that, and its port, 4318")
                break
        wanted.add(signal)
    return frozenset(wanted)


def _check(variables: Mapping[str, str], wanted: Collection[str]) -> None:
    """See to what the SDK would find out only when something is to be sent. Raises ConfigurationError."""
    for prefix in ("OTEL_EXPORTER_OTLP_", *(f"OTEL_EXPORTER_OTLP_{signal}_" for signal in sorted(wanted))):
        endpoint = variables.get(f"{prefix}ENDPOINT", "").strip()
        if endpoint and not _is_url(endpoint):
            raise ConfigurationError(f"{prefix}ENDPOINT should be a URL, as http://localhost:4318")
        for name in ("CERTIFICATE", "CLIENT_CERTIFICATE", "CLIENT_KEY"):
            path = variables.get(f"{prefix}{name}", "").strip()
            if path and not Path(path).exists():
                raise ConfigurationError(f"{prefix}{name}: {shorten(printable(path), 200)}: there is no such file")
    interval = variables.get(_INTERVAL, "").strip()
    if "METRICS" in wanted and interval and not (interval.isascii() and interval.isdigit() and int(interval) > 0):
        raise ConfigurationError(f"{_INTERVAL} should be a number of milliseconds above 0, not {shorten(interval, 40)}")


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _resource(variables: Mapping[str, str]) -> Resource:
    """What is said of the guard: by the variables, and behind that by itself."""
    own = own_attributes(variables, version=version(_NAME), run=secrets.token_hex(8))
    said = dict(Resource.create().attributes)
    if "service.name" in own:
        del said["service.name"]  # it has one for every service
    return Resource({**own, **said})
