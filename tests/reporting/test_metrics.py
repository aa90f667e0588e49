"""Metrics: their names and types, what labels can say, and that nothing of anybody's is in them."""

from __future__ import annotations

import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pgguard.attribution.findings import Activity
from pgguard.faults.catalogue import CATALOGUE, Severity
from pgguard.faults.docket import Count
from pgguard.faults.policy import Action
from pgguard.proxy.figures import BOUNDS, Durations, Figures, Turnaway, Unnamed
from pgguard.proxy.losses import Loss
from pgguard.reporting.metrics import exposition
from pgguard.session.verdicts import Kind

LABELS = {"kind", "severity", "action", "state", "reason", "database", "direction", "cost", "evidence", "le"}
BUILD = {"version", "form", "python_version"}


def figures(*, unnamed: Unnamed | None = Unnamed(5, 6, 7)) -> Figures:  # noqa: B008 - it is immutable
    added, evidence = Durations(), Durations()
    for seconds in (0.5e-6, 3e-6, 3e-6, 1e9):
        added.note(seconds)
    return Figures(
        at=1.0,
        open={Activity.BUSY: 1, Activity.IDLE: 2, Activity.IDLE_IN_TRANSACTION: 3, Activity.UNKNOWN: 4},
        capacity=100,
        clients=20,
        introduced=18,
        turned_away={why: 2 if why is Turnaway.LOGIN else 0 for why in Turnaway},
        server_answers={"orders": True, "audit": False},
        requests=1000,
        messages=(3000, 7000),
        from_clients=10,
        from_servers=11,
        added=added.measured(),
        evidence=evidence.measured(),
        losses={loss: int(loss is Loss.TRACKING) for loss in Loss},
        unnamed=unnamed,
    )


COUNTS = [
    Count(Kind.SHARED_BY_PROCESSES, Severity.ERROR, Action.LOGGED, 1, 41),
    Count(Kind.SHARED_BY_PROCESSES, Severity.ERROR, Action.REJECTED, 2, 0),
]


def scraped(accept: str = "", *, unnamed: Unnamed | None = Unnamed(5, 6, 7)) -> tuple[str, str]:  # noqa: B008 - likewise
    media_type, body = exposition(
        accept, figures(unnamed=unnamed), COUNTS, started_at=1.5, lost_records=3, missing=["thread names"]
    )
    return media_type, body.decode()


def samples(text: str) -> dict[str, float]:
    return {
        sample.name + "".join(f"{{{key}={value}}}" for key, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_what_is_counted_is_told() -> None:
    told = samples(scraped()[1])
    for name, value in {
        "pgguard_sessions{state=busy}": 1,
        "pgguard_sessions{state=idle-in-transaction}": 3,
        "pgguard_sessions_limit": 100,
        "pgguard_clients_total": 20,
        "pgguard_sessions_opened_total": 18,
        "pgguard_clients_refused_total{reason=login}": 2,
        "pgguard_server_up{database=orders}": 1,
        "pgguard_server_up{database=audit}": 0,
        "pgguard_requests_total": 1000,
        "pgguard_messages_total{direction=frontend}": 3000,
        "pgguard_messages_total{direction=backend}": 7000,
        "pgguard_forwarded_bytes_total{direction=frontend}": 10,
        "pgguard_forwarded_bytes_total{direction=backend}": 11,
        "pgguard_faults_total{action=logged}{kind=shared-by-processes}{severity=error}": 42,
        "pgguard_faults_total{action=rejected}{kind=shared-by-processes}{severity=error}": 2,
        "pgguard_faults_total{action=logged}{kind=untracked}{severity=info}": 0,
        "pgguard_lost_records_total": 3,
        "pgguard_internal_errors_total{cost=tracking}": 1,
        "pgguard_lost_sender_reports_total": 5,
        "pgguard_unnamed_connections_total": 6,
        "pgguard_contradicting_sender_reports_total": 7,
        "pgguard_missing_evidence{evidence=thread names}": 1,
        "process_start_time_seconds": 1.5,
    }.items():
        assert told[name] == value, name
    assert told["process_resident_memory_bytes"] > 1_000_000


def test_whatever_can_be_done_about_a_fault_is_counted_from_the_beginning() -> None:
    """Or the first one would be no increase, and no alert's affair: of a guard that rejects, too."""
    told = samples(scraped()[1])
    for kind in Kind:
        for severity in Severity:
            can = {
                action
                for action in Action
                if f"pgguard_faults_total{{action={action}}}{{kind={kind}}}{{severity={severity}}}" in told
            }
            assert Action.LOGGED in can
            assert (Action.REJECTED in can) is CATALOGUE[kind].can_reject
            assert (Action.DROPPED in can) is (kind in {Kind.MESSAGE_WHILE_IDLE, Kind.FOREIGN_TERMINATE})


def test_durations_are_a_histogram() -> None:
    told = samples(scraped()[1])
    buckets = [told[f"pgguard_added_seconds_bucket{{le={bound:.6f}}}"] for bound in BOUNDS]
    assert buckets[:4] == [1, 1, 3, 3]
    assert buckets == sorted(buckets)
    assert told["pgguard_added_seconds_bucket{le=+Inf}"] == told["pgguard_added_seconds_count"] == 4
    assert told["pgguard_added_seconds_sum"] == pytest.approx(1e9)
    assert told["pgguard_evidence_seconds_count"] == 0


def test_names_follow_the_conventions_and_labels_are_known_beforehand() -> None:
    """Prometheus, "Metric and label naming": base units, a suffix that says what is counted, ``_total``."""
    for family in text_string_to_metric_families(scraped()[1]):
        assert re.fullmatch(r"(pgguard|process)_[a-z]+(_[a-z]+)*", family.name)
        assert family.documentation.endswith((".", "1.", "why."))
        for sample in family.samples:
            assert set(sample.labels) <= (BUILD if family.name == "pgguard_build_info" else LABELS)
            if family.type == "counter":
                assert sample.name.endswith("_total")
    assert {family.type for family in text_string_to_metric_families(scraped()[1])} == {"counter", "gauge", "histogram"}


def test_where_the_kernel_is_not_asked_nothing_is_said_of_what_it_did_not_say() -> None:
    assert "sender_reports" not in scraped(unnamed=None)[1]


def test_openmetrics_is_told_to_who_asks_for_it() -> None:
    media_type, text = scraped("application/openmetrics-text;version=1.0.0,text/plain;q=0.5")
    assert media_type.startswith("application/openmetrics-text")
    assert text.endswith("# EOF\n")
    assert scraped("text/html")[0].startswith("text/plain; version=0.0.4")
