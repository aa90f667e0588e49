"""A collector that takes OTLP over HTTP: the messages are decoded by the protocol's own package."""

from __future__ import annotations

import gzip
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SECONDS = 40.0


class Collector(ThreadingHTTPServer):
    """Keeps what it is sent.

    Args:
        port: Where it listens on the loopback address; 0: the system chooses.
    """

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.port = int(self.server_address[1])
        self.status = 200
        self.more: dict[str, str] = {}
        self.answer = b""
        """What it answers: status, headers, body."""
        self.attempts = 0
        self.headers: list[dict[str, str]] = []
        self._requests: list[tuple[str, bytes]] = []
        self.changed = threading.Condition()

    def take(self, path: str, headers: dict[str, str], body: bytes) -> int:
        with self.changed:
            self.attempts += 1
            if self.status == 200:
                self.headers.append(headers)
                self._requests.append((path, body))
            self.changed.notify_all()
            return self.status

    def wait(self, is_so: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(is_so, SECONDS), self.logs

    @property
    def logs(self) -> list[dict[str, Any]]:
        """The log records that have come, each with what is said of who has sent it."""
        requests = [ExportLogsServiceRequest.FromString(body) for path, body in self._requests if path == "/v1/logs"]
        return [
            {
                "resource": _values(batch.resource.attributes),
                "scope": (scoped.scope.name, scoped.scope.version),
                "event": record.event_name,
                "at": record.time_unix_nano,
                "severity": (record.severity_number, record.severity_text),
                "body": record.body.string_value,
                "trace": (record.trace_id.hex(), record.span_id.hex(), record.flags),
                "attributes": _values(record.attributes),
            }
            for request in requests
            for batch in request.resource_logs
            for scoped in batch.scope_logs
            for record in scoped.log_records
        ]

    @property
    def metrics(self) -> dict[str, list[tuple[dict[str, Any], float]]]:
        """By name, the latest points of each metric."""
        found = {}
        for path, body in list(self._requests):
            if path != "/v1/metrics":
                continue
            for batch in ExportMetricsServiceRequest.FromString(body).resource_metrics:
                for scoped in batch.scope_metrics:
                    for metric in scoped.metrics:
                        if metric.WhichOneof("data") == "sum":
                            found[metric.name] = [
                                (_values(point.attributes), point.as_int or point.as_double)
                                for point in metric.sum.data_points
                            ]
        return found

    @property
    def histograms(self) -> list[Any]:
        """All of them that have come, as they were sent."""
        return [
            metric
            for path, body in list(self._requests)
            if path == "/v1/metrics"
            for batch in ExportMetricsServiceRequest.FromString(body).resource_metrics
            for scoped in batch.scope_metrics
            for metric in scoped.metrics
            if metric.WhichOneof("data") == "histogram"
        ]


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.send_response(self.server.take(self.path, dict(self.headers.items()), body))
        for name, value in self.server.more.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(self.server.answer)))
        self.end_headers()
        self.wfile.write(self.server.answer)

    def log_message(self, *_: object) -> None:
        pass


def _values(attributes: Any) -> dict[str, Any]:
    return {one.key: _value(one.value) for one in attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(one) for one in value.array_value.values]
    return getattr(value, kind)


@contextmanager
def collecting(port: int = 0) -> Iterator[Collector]:
    collector = Collector(port)
    thread = threading.Thread(target=collector.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield collector
    finally:
        collector.shutdown()
        thread.join()
        collector.server_close()
