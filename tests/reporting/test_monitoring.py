"""The alert rules and the dashboard: what Prometheus' own checker says of them, and that they ask for what there is."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.reporting.test_metrics import scraped
from tests.servers import not_installed

DOCKER = Path(__file__).parents[2] / "docker"
RULES = DOCKER / "prometheus-rules.yml"
DASHBOARD: dict[str, Any] = json.loads((DOCKER / "grafana-dashboard.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
NAME = re.compile(r"\b(?:pgguard|process)_[a-z_]+\b")

SCENARIO = """
rule_files: [{rules}]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
{series}
    promql_expr_test:
      - expr: sum by (job, instance, kind, reason) (ALERTS{{alertname="{alert}", alertstate="firing"}})
        eval_time: 20m
        exp_samples: [{expected}]
"""
FIRING = [
    (
        "ConnectionMisused",
        "pgguard_faults_total",
        "kind: shared-by-processes, severity: error",
        "0x15 1x10",
        ', kind="shared-by-processes"',
    ),
    (
        "ConnectionAtRisk",
        "pgguard_faults_total",
        "kind: unclean-close, severity: warning",
        "0x10 1x20",
        ', kind="unclean-close"',
    ),
    ("GuardRefusesClients", "pgguard_clients_refused_total", "reason: no-server", "0+1x30", ', reason="no-server"'),
    ("GuardLosesTrack", "pgguard_internal_errors_total", "cost: tracking", "0x10 1x20", ""),
    ("GuardLosesTrack", "pgguard_faults_total", "kind: untracked, severity: info", "0x10 1x20", ""),
    ("GuardNearlyFull", "pgguard_sessions", "state: idle", "901x30", ""),
    ("GuardDown", "up", "", "1x5 0x30", ""),
]
SILENT = [
    ("ConnectionMisused", "pgguard_faults_total", "kind: shared-by-processes, severity: error", "7x30"),
    ("ConnectionMisused", "pgguard_faults_total", "kind: unclean-close, severity: warning", "0x15 1x10"),
    ("GuardRefusesClients", "pgguard_clients_refused_total", "reason: login", "0+1x30"),
    ("GuardNearlyFull", "pgguard_sessions", "state: idle", "1000x30"),
]


@pytest.fixture(scope="session")
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        not_installed("promtool")
    return found


def run(promtool: str, *arguments: str | Path) -> str:
    done = subprocess.run([promtool, *arguments], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def series(name: str, labels: str, values: str) -> str:
    spelled = "".join(f', {key}="{value}"' for key, value in (one.split(": ") for one in labels.split(", ") if one))
    return f"      - series: '{name}{{job=\"pgguard\", instance=\"a:1\"{spelled}}}'\n        values: '{values}'\n"


def test_the_rules_are_some(promtool: str) -> None:
    assert "7 rules found" in run(promtool, "check", "rules", RULES)


def test_the_dashboards_queries_can_be_asked(promtool: str, tmp_path: Path) -> None:
    asked = [query.replace("$__rate_interval", "5m").replace("$__range", "1h") for query in QUERIES]
    rules = [{"record": f"query:{n}", "expr": query} for n, query in enumerate(asked)]
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"{len(QUERIES)} rules found" in run(promtool, "check", "rules", tmp_path / "rules.yml")


def test_metrics_are_as_prometheus_wants_them(promtool: str) -> None:
    done = subprocess.run(
        [promtool, "check", "metrics"], input=scraped()[1], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(("alert", "name", "labels", "values", "told"), FIRING)
def test_an_alert_fires(
    alert: str, name: str, labels: str, values: str, told: str, promtool: str, tmp_path: Path
) -> None:
    expected = f'{{labels: \'{{job="pgguard", instance="a:1"{told}}}\', value: 1}}'
    told_series = series(name, labels, values) + series("pgguard_sessions_limit", "", "1000x30")
    scenario = SCENARIO.format(rules=RULES, series=told_series, alert=alert, expected=expected)
    (tmp_path / "test.yml").write_text(scenario)
    run(promtool, "test", "rules", tmp_path / "test.yml")


@pytest.mark.parametrize(("alert", "name", "labels", "values"), SILENT)
def test_an_alert_keeps_silent(alert: str, name: str, labels: str, values: str, promtool: str, tmp_path: Path) -> None:
    told = series(name, labels, values) + series("pgguard_sessions_limit", "", "10000x30")
    (tmp_path / "test.yml").write_text(SCENARIO.format(rules=RULES, series=told, alert=alert, expected=""))
    run(promtool, "test", "rules", tmp_path / "test.yml")


def test_they_ask_for_what_there_is() -> None:
    there = set(re.findall(r"^# TYPE (\S+) ", scraped()[1], re.MULTILINE))
    there |= {f"{name}_{suffix}" for name in there for suffix in ("bucket", "sum", "count")}
    for query in (*QUERIES, *re.findall(r"expr: (?:>-\n)?(.*?)\n +(?:for|labels):", RULES.read_text(), re.DOTALL)):
        names = set(NAME.findall(query))
        assert names <= there, query


def test_the_dashboard_is_one() -> None:
    assert (DASHBOARD["uid"], DASHBOARD["title"]) == ("pgguard", "pgguard")
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(numbers)) == len(numbers)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not own & taken, panel["title"]
        taken |= own
        assert all("$job" in target["expr"] and "$instance" in target["expr"] for target in panel["targets"])
    assert {one["name"] for one in DASHBOARD["templating"]["list"]} == {"datasource", "job", "instance"}
