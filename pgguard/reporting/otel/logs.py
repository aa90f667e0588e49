"""Faults as log records, sent to a collector by a thread of their own: nobody waits for it but the end of the guard.

OpenTelemetry's own batch processor drops what its queue has no room for, and a batch that can't be exported, without
saying so to whoever has emitted it. Here a batch stays until the collector has taken it, and what there is no room for
is the latest, and counted. What is sent in which form, and where to, is the SDK's and its exporter's affair, and so are
the variables that say it: "Environment Variable Specification" and "OTLP Exporter" in OpenTelemetry's specification.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Final

from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceResponse
from opentelemetry.sdk._logs import ReadableLogRecord, ReadWriteLogRecord
from opentelemetry.sdk._logs.export import LogRecordExportResult
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

from pgguard.faults.catalogue import Severity
from pgguard.faults.text import counted, printable, shorten
from pgguard.reporting.otel.attributes import EVENT, attributes_of, trace_of
from pgguard.reporting.otel.wire import Wire, line
from pgguard.reporting.sinks import SinkError

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope

    from pgguard.faults.fault import Fault
    from pgguard.reporting.otel.attributes import Trace

ROOM: Final = 2048
"""Faults that are kept until they are sent, at most, unless OTEL_BLRP_MAX_QUEUE_SIZE says otherwise."""
_BATCH: Final = 512
_DELAY: Final = 1.0
"""The same of how many are sent at once (OTEL_BLRP_MAX_EXPORT_BATCH_SIZE), and for how many seconds the first of them
waits for others (OTEL_BLRP_SCHEDULE_DELAY, in milliseconds)."""
_AGAIN: Final = 5.0
"""Seconds until it is tried once more, where the exporter has given up, unless the collector asks for more."""
FLUSH: Final = 2.0
"""Seconds in the end for what is left to be sent."""
_SEVERITIES: Final = {
    Severity.ERROR: SeverityNumber.ERROR,
    Severity.WARNING: SeverityNumber.WARN,
    Severity.INFO: SeverityNumber.INFO,
}
_NANOSECONDS: Final = 1_000_000_000

logger = logging.getLogger(__name__)


class OtelLogs:
    """Sends each fault to a collector.

    Args:
        resource: What is said of the guard.
        scope: The guard and its version.
    """

    def __init__(self, resource: Resource, scope: InstrumentationScope) -> None:
        self._resource = resource
        self._scope = scope
        self._room = _number("OTEL_BLRP_MAX_QUEUE_SIZE", ROOM)
        self._batch = _number("OTEL_BLRP_MAX_EXPORT_BATCH_SIZE", _BATCH)
        self._delay = _number("OTEL_BLRP_SCHEDULE_DELAY", round(_DELAY * 1000)) / 1000
        self._wire = Wire()
        self._exporter = OTLPLogExporter(session=self._wire)
        self._kept: deque[Fault] = deque()
        """What the collector hasn't taken; only the thread takes anything out."""
        self._wake = threading.Event()
        self._is_closing = False
        self._at_once = self._batch
        """Fewer, where the collector has not taken as many."""
        self._is_away = False
        """It has not taken what was sent last."""
        self._refused = 0
        """Faults that it doesn't take though it is there; the thread counts them, and has told why of the last one."""
        self._why_refused = ""
        self._told_refused = 0
        """Those of them that have been told of."""
        self._thread = threading.Thread(target=self._run, name="pgguard otel", daemon=True)

    def __str__(self) -> str:
        return f"the OpenTelemetry collector at {self._exporter._endpoint}"  # noqa: SLF001 - nothing else tells it

    def start(self) -> None:
        """Begin to send, unless that has been done."""
        if self._thread.ident is None:
            self._thread.start()

    def record(self, fault: Fault) -> None:
        """Have a fault sent; returns at once.

        Raises:
            SinkError: There is no room for it, or the collector has refused others.
        """
        if len(self._kept) >= self._room:
            raise SinkError(f"{self} has not taken the last {counted(self._room, 'fault')}: {self._wire.why}")
        self._kept.append(fault)
        self._wake.set()
        self._tell_of_refused()

    def _tell_of_refused(self) -> None:
        refused = self._refused - self._told_refused
        if refused:
            self._told_refused += refused
            raise SinkError(f"{self} refuses {counted(refused, 'fault')}: {self._why_refused}", lost=refused)

    def end(self) -> None:
        """Begin to send what is left, at once; :meth:`close` waits for it."""
        self._is_closing = True
        self._wake.set()
        self.start()

    def close(self, *, deadline: float = FLUSH) -> None:
        """Send what is left, within so many seconds.

        Raises:
            SinkError: Not all of it was taken.
        """
        self.end()
        self._thread.join(deadline)
        if self._thread.is_alive():
            # It wakes the exporter, which may wait to try once more.
            self._exporter.shutdown()  # type: ignore[no-untyped-call]
        if self._kept:
            lost = len(self._kept) + self._refused - self._told_refused
            raise SinkError(f"{self} has not taken {counted(lost, 'fault')}: {self._wire.why}", lost=lost)
        self._tell_of_refused()

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            if not self._is_closing:
                self._pause(self._delay)  # others may come, which are sent along
            while self._kept:
                if self._send(list(islice(self._kept, self._at_once))):
                    continue
                if self._is_closing:
                    return
                self._pause(max(_AGAIN, self._wire.rest))
            if self._is_closing:
                self._exporter.shutdown()  # type: ignore[no-untyped-call]
                return

    def _pause(self, seconds: float) -> None:
        """Wait, but not when it is to end."""
        until = time.monotonic() + seconds
        while not self._is_closing and (left := until - time.monotonic()) > 0:
            self._wake.wait(left)
            self._wake.clear()

    def _send(self, faults: list[Fault]) -> bool:
        """Send some faults, the first that are kept; returns whether the collector has taken them."""
        try:
            records = [self._record(fault) for fault in faults]
            taken = self._exporter.export(records) is LogRecordExportResult.SUCCESS
        except Exception:
            logger.exception("faults could not be sent to %s", self)
            taken = False
        if taken:
            for _ in faults:
                self._kept.popleft()
            self._note_refused(*self._left_out())
            self._at_once = min(2 * self._at_once, self._batch)
        elif len(faults) > 1:
            self._at_once = max(1, len(faults) // 2)
        elif self._wire.refuses:
            # It would be refused again and again, and keep all others waiting.
            self._kept.popleft()
            self._note_refused(1, self._wire.why)
        if taken is self._is_away:
            self._is_away = not taken
            if taken:
                logger.warning("%s takes faults again", self)
            else:
                logger.warning(
                    "%s can't be reached: %s; faults are kept until it can, %d at most",
                    self,
                    self._wire.why,
                    self._room,
                )
        return taken

    def _note_refused(self, faults: int, why: str) -> None:
        if faults > 0:
            self._why_refused = why
            self._refused += faults

    def _left_out(self) -> tuple[int, str]:
        """How many it has left out of what it has taken, and why ("Partial Success" in OTLP's specification)."""
        try:
            partial = ExportLogsServiceResponse.FromString(self._wire.answer).partial_success
        except Exception:  # it has answered something else
            return 0, ""
        return partial.rejected_log_records, line(partial.error_message) or "it doesn't say why"

    def _record(self, fault: Fault) -> ReadableLogRecord:
        try:
            return self._made(fault)
        except Exception:
            # It is about something that stands in the fault, which is better told in part than not.
            return self._made(fault.outlined())

    def _made(self, fault: Fault) -> ReadableLogRecord:
        trace = trace_of(fault)
        record = LogRecord(
            timestamp=round(fault.at * _NANOSECONDS),
            observed_timestamp=time.time_ns(),
            context=Context() if trace is None else _context(trace),
            severity_text=fault.severity.upper(),
            severity_number=_SEVERITIES[fault.severity],
            body=printable(fault.headline),
            attributes=attributes_of(fault),
            event_name=EVENT,
        )
        limited = ReadWriteLogRecord(record, self._resource, self._scope)
        return ReadableLogRecord(limited.log_record, self._resource, self._scope, limited.limits)


def _context(trace: Trace) -> Context:
    """What the SDK takes a record's trace from."""
    span = SpanContext(trace.trace_id, trace.span_id, is_remote=True, trace_flags=TraceFlags(trace.flags))
    return set_span_in_context(NonRecordingSpan(span), Context())


def _number(variable: str, default: int) -> int:
    """What a variable of OpenTelemetry's says, if that is a number above zero."""
    text = os.environ.get(variable, "").strip()
    if not text:
        return default
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number > 0:
        return number
    logger.warning("%s should be a number above 0, not %s: it is taken for %d", variable, shorten(text, 40), default)
    return default
