"""Faults and figures for OpenTelemetry, as a collector gets them."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsPartialSuccess, ExportLogsServiceResponse

from pgguard.attribution.evidence import Container, Pod
from pgguard.faults.catalogue import Severity
from pgguard.faults.fault import Fault
from pgguard.faults.policy import Action
from pgguard.proxy.errors import ConfigurationError
from pgguard.proxy.figures import BOUNDS, Durations
from pgguard.reporting.otel import logs, sink, wire
from pgguard.reporting.otel.attributes import attributes_of, own_attributes, trace_of
from pgguard.reporting.otel.sink import Otel
from pgguard.reporting.record import to_record
from pgguard.reporting.sinks import Fanout, SinkError
from pgguard.session.verdicts import Kind
from tests.faults.samples import NOW, WORKER_1, fault
from tests.proxy.conftest import backend
from tests.proxy.fake_backend import FakeBackend
from tests.proxy.messages import COLUMNS
from tests.proxy.spawned import run, spawned
from tests.reporting.collector import Collector, collecting
from tests.reporting.test_metrics import figures

__all__ = ["backend"]

UID = "ac04f3f2-1f2c-11e9-b015-1ebee232acfa"
INSIDE = replace(
    WORKER_1,
    namespace_pid=17,
    container=Container("4f" * 32, "containerd"),
    pod=Pod("web-0", "shop", UID, "node-1"),
)
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with collecting() as one:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{one.port}")
        monkeypatch.setenv("OTEL_BLRP_SCHEDULE_DELAY", "1")
        monkeypatch.setattr(logs, "_AGAIN", 0.05)
        yield one


def inside(**changes: object) -> Fault:
    first, *others = fault().culprits
    return replace(fault(), culprits=(replace(first, process=INSIDE), *others), **changes)  # type: ignore[arg-type]


# Attributes


def test_what_a_convention_has_a_name_for_is_called_by_it() -> None:
    told = attributes_of(inside())
    expected = {
        "db.system.name": "postgresql",
        "db.namespace": "app",
        "network.transport": "tcp",
        "client.address": "127.0.0.1",
        "client.port": 53984,
        "process.pid": 4867,
        "process.parent_pid": 4864,
        "process.vpid": 17,
        "process.executable.name": "ruby",
        "process.command_args": ("puma: cluster worker 1: 4864 [app]",),
        "thread.id": 4880,
        "container.id": "4f" * 32,
        "container.runtime.name": "containerd",
        "k8s.pod.name": "web-0",
        "k8s.namespace.name": "shop",
        "k8s.pod.uid": UID,
        "k8s.node.name": "node-1",
        "pgguard.fault.kind": "shared-by-processes",
        "pgguard.fault.action": "logged",
        "pgguard.session.user": "app",
        "pgguard.culprit.role": "intruder",
        "pgguard.culprit.evidence": "kernel-sender",
    }
    assert {key: told.get(key) for key in expected} == expected
    assert json.loads(str(told["pgguard.fault.record"])) == to_record(inside())


def test_what_is_not_known_is_left_out() -> None:
    bare = replace(
        fault(), culprits=(), requests=(), session=replace(fault().session, user=None, database=None, client=None)
    )
    told = attributes_of(bare)
    assert None not in told.values()
    assert not {"db.namespace", "client.address", "process.pid", "db.query.text"} & told.keys()


@pytest.mark.parametrize(
    ("kind", "action", "libpq", "code"),
    [
        (Kind.SHARED_BY_PROCESSES, Action.LOGGED, None, None),
        (Kind.SHARED_BY_PROCESSES, Action.REJECTED, None, "08P01"),
        (Kind.CONNECTION_EXHAUSTION, Action.LOGGED, None, "53300"),
        (Kind.SESSION_STATE_LOST, Action.LOGGED, 'prepared statement "s1" already exists', "42P05"),
        (Kind.SESSION_STATE_LOST, Action.LOGGED, 'prepared statement "s1" does not exist', "26000"),
    ],
)
def test_the_sqlstate_that_the_client_has_got(kind: Kind, action: Action, libpq: str | None, code: str | None) -> None:
    assert attributes_of(replace(fault(), kind=kind, action=action, libpq=libpq)).get("db.response.status_code") == code


@pytest.mark.parametrize(
    ("said", "is_one"),
    [
        (TRACE, True),
        (f"{TRACE}-more", True),  # of a later version
        ("00-00000000000000000000000000000000-00f067aa0ba902b7-01", False),
        (TRACE.upper(), False),
        ("***", False),
        ("", False),
    ],
)
def test_the_trace_that_a_request_says_that_it_is_part_of(said: str, is_one: bool) -> None:
    first, *others = fault().culprits
    trace = trace_of(replace(fault(), culprits=(replace(first, declared={"traceparent": said}), *others)))
    expected = (0x4BF92F3577B34DA6A3CE929D0E0E4736, 0x00F067AA0BA902B7, 1)
    assert trace == (expected if is_one else None)


def test_what_variables_say_of_the_guard_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_attributes({}, version="1", run="x")["service.name"] == "pgguard"
    for variable, value in (("OTEL_SERVICE_NAME", "mine"), ("OTEL_RESOURCE_ATTRIBUTES", "a=b, service.name=mine")):
        monkeypatch.setenv(variable, value)
        assert sink._resource(os.environ).attributes["service.name"] == "mine"
        monkeypatch.delenv(variable)
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "k8s.pod.name=given,service.version=9")
    told = sink._resource(os.environ).attributes
    assert (told["service.name"], told["service.version"], told["k8s.pod.name"]) == ("pgguard", "9", "given")


# What comes out at the other end


@pytest.fixture
def otel() -> Iterator[Callable[[], Otel]]:
    source = logging.getLogger("opentelemetry")
    before = source.propagate, list(source.handlers)
    yield Otel
    source.propagate, source.handlers = before


def test_a_fault_as_a_log_record(collector: Collector, otel: Callable[[], Otel]) -> None:
    first, *others = inside().culprits
    one = replace(inside(), culprits=(replace(first, declared={"traceparent": TRACE}), *others))
    sent = otel()
    sent.start(metrics=False)
    sent.record(one)
    collector.wait(lambda: bool(collector.logs))
    sent.close()
    [record] = collector.logs
    assert record["body"] == one.headline
    assert (record["event"], record["severity"]) == ("pgguard.fault", (17, "ERROR"))
    assert record["at"] == round(NOW * 1e9)
    assert record["trace"] == ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", 1)
    assert record["scope"][0] == record["resource"]["service.name"] == "pgguard"
    told = {key: list(value) if isinstance(value, tuple) else value for key, value in attributes_of(one).items()}
    assert record["attributes"] == told


@pytest.mark.parametrize(("severity", "number"), [(Severity.WARNING, 13), (Severity.INFO, 9)])
def test_how_grave_it_is(severity: Severity, number: int, collector: Collector, otel: Callable[[], Otel]) -> None:
    sent = otel()
    sent.record(replace(fault(), severity=severity))
    sent.close()
    assert [record["severity"][0] for record in collector.logs] == [number]


def test_a_collector_that_is_away_for_a_while_misses_nothing(
    collector: Collector, otel: Callable[[], Otel], caplog: pytest.LogCaptureFixture
) -> None:
    collector.status = 403  # it is there, but nothing that the exporter itself would try again
    sent = otel()
    sent.start(metrics=False)
    for n in range(3):
        sent.record(fault(id=n))
    collector.wait(lambda: collector.attempts >= 3)
    collector.status = 200
    sent.record(fault(id=3))
    collector.wait(lambda: len(collector.logs) == 4)
    sent.close()
    assert [record["attributes"]["pgguard.fault.id"] for record in collector.logs] == [0, 1, 2, 3]
    away, again = caplog.messages
    assert "can't be reached: it answers 403 Forbidden; faults are kept until it can, 2048 at most" in away
    assert again.endswith("/v1/logs takes faults again")


def test_what_there_is_no_room_for_is_counted_and_said(
    collector: Collector, otel: Callable[[], Otel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BLRP_MAX_QUEUE_SIZE", "4")
    collector.status = 403
    said: list[str] = []
    sent = otel()
    fanout = Fanout([sent], said.append)
    for n in range(10):
        fanout.record(fault(id=n))
    assert fanout.lost == 6
    assert len(said) == 1
    assert "faults are being lost: the OpenTelemetry collector at http://127.0.0.1:" in said[0]
    assert "has not taken the last 4 faults" in said[0]
    sent.start(metrics=False)
    collector.wait(lambda: collector.attempts > 0)
    collector.status = 200
    collector.wait(lambda: len(collector.logs) == 4)
    fanout.record(fault(id=10))
    fanout.close()
    # The first ones are kept, as what a cause begins with is told in full.
    assert [record["attributes"]["pgguard.fault.id"] for record in collector.logs] == [0, 1, 2, 3, 10]
    assert said[1:] == [
        "faults are being written again; 6 faults lost so far",
        f"6 faults could not be written to {sent}",
    ]


def test_a_record_that_is_refused_keeps_no_other_waiting(collector: Collector, otel: Callable[[], Otel]) -> None:
    sent = otel()
    collector.status = 400
    sent.start(metrics=False)
    sent.record(fault(id=1))
    collector.wait(lambda: collector.attempts >= 1)
    deadline = time.monotonic() + 40
    while sent._logs is not None and not sent._logs._refused and time.monotonic() < deadline:
        time.sleep(0.01)
    collector.status = 200
    with pytest.raises(SinkError, match="refuses 1 fault: it answers 400") as raised:
        sent.record(fault(id=2))
    assert raised.value.lost == 1
    collector.wait(lambda: bool(collector.logs))
    sent.close()
    assert [record["attributes"]["pgguard.fault.id"] for record in collector.logs] == [2]


def test_what_a_collector_leaves_out_of_a_batch_is_counted(collector: Collector, otel: Callable[[], Otel]) -> None:
    partial = ExportLogsPartialSuccess(rejected_log_records=2, error_message="too\nold")
    collector.more = {"Content-Type": "application/x-protobuf"}
    collector.answer = ExportLogsServiceResponse(partial_success=partial).SerializeToString()
    sent = otel()
    for n in range(3):
        sent.record(fault(id=n))
    with pytest.raises(SinkError, match="refuses 2 faults: too old") as raised:
        sent.close()
    assert raised.value.lost == 2
    assert len(collector.logs) == 3


@pytest.mark.parametrize(("kind", "answer"), [("text/html", b"\x0a\x02\x08\x05"), ("application/x-protobuf", b"\xff<")])
def test_an_answer_that_is_none_means_nothing(
    kind: str, answer: bytes, collector: Collector, otel: Callable[[], Otel]
) -> None:
    collector.more, collector.answer = {"Content-Type": kind}, answer
    sent = otel()
    sent.record(fault())
    sent.close()
    assert len(collector.logs) == 1


def test_a_collector_that_asks_for_rest_gets_it(
    collector: Collector, otel: Callable[[], Otel], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(logs, "_AGAIN", 0.01)
    pause = logs.OtelLogs._pause

    def noted(own: logs.OtelLogs, seconds: float) -> None:
        pauses.append(seconds)
        pause(own, min(seconds, 0.01))

    monkeypatch.setattr(logs.OtelLogs, "_pause", noted)
    collector.status, collector.more = 429, {"Retry-After": "120"}
    sent = otel()
    sent.start(metrics=False)
    sent.record(fault())
    collector.wait(lambda: collector.attempts > 1)
    collector.status, collector.more = 200, {}
    collector.wait(lambda: bool(collector.logs))
    sent.close()
    assert 120.0 in pauses


@pytest.mark.parametrize(
    ("asked", "seconds"),
    [
        ("0", 0),
        ("7", 7),
        ("99999999", 300),
        ("", 0),
        ("soon", 0),
        ("-3", 0),
        ("1e999", 0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
        ("Wed, 21 Oct 2599 07:28:00 GMT", 300),
    ],
)
def test_for_how_long_it_asks(asked: str, seconds: float) -> None:
    assert wire._rest(asked) == seconds


def test_in_the_end_faults_do_not_wait_for_figures(
    collector: Collector, otel: Callable[[], Otel], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(logs, "_DELAY", 60)
        monkeypatch.delenv("OTEL_BLRP_SCHEDULE_DELAY")
        sent = otel()
        sent.start()
        sent.show(figures(), [], 0)
        sent.record(fault())
        closing = threading.Thread(target=sent.close)
        closing.start()
        collector.wait(lambda: bool(collector.logs))
        assert sent._metrics is not None
        closing.join(60)
        assert not closing.is_alive()


def histograms(collector: Collector) -> list[tuple[int, int, float, int, list[int]]]:
    """Those of the time added: since when, how often, how long all in all, of which kind; and the buckets."""
    return [
        (point.start_time_unix_nano, point.count, point.sum, one.histogram.aggregation_temporality, counts)
        for one in collector.histograms
        if one.name == "pgguard.delay" and one.unit == "s"
        for point in one.histogram.data_points
        if list(point.explicit_bounds) == list(BOUNDS) and not point.HasField("max")
        for counts in [list(point.bucket_counts)]
    ]


@pytest.mark.parametrize("preference", ["", "delta"])
def test_durations_are_histograms(
    preference: str, collector: Collector, otel: Callable[[], Otel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "50")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", preference)
    sent = otel()
    sent.start()
    sent.show(figures(), [], 0)
    collector.wait(lambda: len(histograms(collector)) > 2)
    durations = Durations()
    for seconds in (0.5e-6, 3e-6, 3e-6, 1e9, 3e-6):
        durations.note(seconds)
    sent.show(replace(figures(), added=durations.measured()), [], 0)
    sent.close()
    told = histograms(collector)
    assert {one[3] for one in told} == {1 if preference else 2}
    assert len({one[0] for one in told}) == (len(told) if preference else 1)
    counts = [one[1] for one in told]
    assert counts == sorted(counts) if not preference else (sum(counts) == 5 and counts[0] == 4)
    assert told[0][4] == list(figures().added.times)
    assert (told[-1] if not preference else next(one for one in told[1:] if one[1]))[4][2] == (1 if preference else 3)


def test_in_the_end_it_is_not_waited_for_long(otel: Callable[[], Otel], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody answers at all: the connection is taken by the kernel alone."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        sent = otel()
        sent.start(metrics=False)
        for n in range(3):
            sent.record(fault(id=n))
        began = time.monotonic()
        with pytest.raises(SinkError, match="has not taken 3 faults") as raised:
            sent.close()
        assert raised.value.lost == 3
        assert time.monotonic() - began < 20


def test_something_in_a_fault_that_can_not_be_told_costs_that_alone(
    collector: Collector, otel: Callable[[], Otel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def attributes(one: Fault) -> dict[str, object]:
        if one.summary == fault().summary:
            raise ValueError("hostile")
        return dict(attributes_of(one))

    monkeypatch.setattr(logs, "attributes_of", attributes)
    sent = otel()
    sent.record(fault())
    sent.close()
    [record] = collector.logs
    assert record["attributes"]["pgguard.fault.kind"] == "shared-by-processes"


# Variables


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "OTEL_EXPORTER_OTLP_PROTOCOL: pgguard speaks http/protobuf alone"),
        ({"OTEL_EXPORTER_OTLP_LOGS_PROTOCOL": "http/json"}, "OTEL_EXPORTER_OTLP_LOGS_PROTOCOL: pgguard speaks"),
        ({"OTEL_LOGS_EXPORTER": "console"}, "OTEL_LOGS_EXPORTER: pgguard can only send to otlp: use otlp or none"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4318"}, "OTEL_EXPORTER_OTLP_ENDPOINT should be a URL, as http://"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://[::x"}, "OTEL_EXPORTER_OTLP_ENDPOINT should be a URL, as http://"),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://x:99999"}, "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT should be a"),
        ({"OTEL_EXPORTER_OTLP_CERTIFICATE": "/no/such"}, "OTEL_EXPORTER_OTLP_CERTIFICATE: /no/such: there is no such"),
        ({"OTEL_EXPORTER_OTLP_LOGS_CLIENT_KEY": "/no/key"}, "OTEL_EXPORTER_OTLP_LOGS_CLIENT_KEY: /no/key: there is no"),
        (
            {"OTEL_METRIC_EXPORT_INTERVAL": "0"},
            "OTEL_METRIC_EXPORT_INTERVAL should be a number of milliseconds above 0",
        ),
        (
            {"OTEL_METRIC_EXPORT_INTERVAL": "1 s"},
            "OTEL_METRIC_EXPORT_INTERVAL should be a number of milliseconds above",
        ),
    ],
)
def test_variables_that_ask_for_what_there_is_not(
    variables: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError) as raised:
        Otel()
    assert str(raised.value).startswith(says)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "variables",
    [
        {"OTEL_METRICS_EXPORTER": "none", "OTEL_METRIC_EXPORT_INTERVAL": "0"},
        {"OTEL_LOGS_EXPORTER": "none", "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT": "nonsense"},
    ],
)
def test_what_is_not_sent_is_not_asked_for(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    Otel().close()


def test_a_variable_that_is_mistyped_is_said(
    caplog: pytest.LogCaptureFixture, otel: Callable[[], Otel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "zip")
    monkeypatch.setenv("OTEL_BLRP_MAX_QUEUE_SIZE", "many")
    otel().close()
    assert "OTEL_BLRP_MAX_QUEUE_SIZE should be a number above 0, not many: it is taken for 2048" in caplog.messages
    assert any("zip" in said for said in caplog.messages)


def test_variables_that_are_obeyed(
    collector: Collector, otel: Callable[[], Otel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20x")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_LOGS_PROTOCOL", "http/protobuf")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    sent = otel()
    sent.start()
    sent.record(fault())
    sent.close()
    assert len(collector.logs) == 1
    [headers] = collector.headers
    lower = {key.lower(): value for key, value in headers.items()}
    assert (lower["authorization"], lower["content-encoding"]) == ("Bearer x", "gzip")
    assert collector.metrics == {}


@pytest.mark.parametrize("variables", [{"OTEL_SDK_DISABLED": "true"}, {"OTEL_LOGS_EXPORTER": "none"}])
def test_nothing_is_sent_that_is_switched_off(
    variables: dict[str, str], collector: Collector, otel: Callable[[], Otel], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    sent = otel()
    sent.start(metrics=False)
    sent.record(fault())
    sent.close()
    assert collector.attempts == 0


# The guard


async def test_a_guard_that_sends_what_it_finds(backend: FakeBackend, tmp_path: Path) -> None:
    with collecting() as collector:
        variables = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.port}",
            "OTEL_METRIC_EXPORT_INTERVAL": "200",
            "PGGUARD_OTEL": "1",
            "PGGUARD_ATTRIBUTION": "off",
            "POD_NAME": "guard-0",
        }
        (tmp_path / "pgguard.toml").write_text("shutdown_timeout = 0\n")
        with spawned(f"host=127.0.0.1 port={backend.port} sslmode=disable", cwd=tmp_path, **variables) as guard:  # type: ignore[arg-type]
            _, server = await backend.session(guard.port)
            await server.send(COLUMNS)
            collector.wait(lambda: bool(collector.logs) and "pgguard.sessions" in collector.metrics)
            guard.signal(signal.SIGTERM)
            said = guard.end()
    [record] = collector.logs
    assert record["attributes"]["pgguard.fault.kind"] == "message-while-idle"
    assert record["resource"]["k8s.pod.name"] == "guard-0"
    # They are sent once more in the end.
    [(labels, times)] = collector.metrics["pgguard.faults"]
    assert (labels["pgguard.fault.kind"], times) == ("message-while-idle", 1)
    assert collector.metrics["pgguard.clients"] == [({}, 1)]
    assert "OpenTelemetry" not in said


async def test_a_guard_without_a_collector_says_so_and_goes_on(backend: FakeBackend, tmp_path: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
    variables = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
        "OTEL_EXPORTER_OTLP_TIMEOUT": "1",
        "OTEL_METRICS_EXPORTER": "none",
    }
    (tmp_path / "pgguard.toml").write_text("shutdown_timeout = 0\notel = true\nattribution = 'off'\n")
    with spawned(f"host=127.0.0.1 port={backend.port} sslmode=disable", cwd=tmp_path, **variables) as guard:  # type: ignore[arg-type]
        client, server = await backend.session(guard.port)
        await server.send(COLUMNS)
        await client.expect(COLUMNS)
        guard.wait_for(r"pgguard: the OpenTelemetry collector at http://127.0.0.1:\d+/v1/logs can't be reached: ()")
        guard.signal(signal.SIGTERM)
        said = guard.end()
    assert "pgguard: 1 fault could not be written to the OpenTelemetry collector at " in said


def test_without_the_extra_it_is_said_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "opentelemetry").mkdir()
    (tmp_path / "opentelemetry" / "__init__.py").write_text("raise ImportError('no', name='opentelemetry.sdk')")
    done = run("serve", "--otel", cwd=tmp_path, variables={"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"})
    assert (done.returncode, done.stdout) == (2, "")
    says = "--otel: opentelemetry.sdk is not installed: install pgguard[otel] (pip install 'pgguard[otel]')"
    assert done.stderr == f"pgguard: {says}\n"


def test_a_guard_that_sends_nothing_imports_nothing_for_it() -> None:
    code = (
        "import sys, pgguard.cli.serve, pgguard.cli.run; print([one for one in sys.modules if 'opentelemetry' in one])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"
