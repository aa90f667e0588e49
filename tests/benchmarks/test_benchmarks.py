"""That the benchmark itself works: a tiny round of it, and what it makes of what it measures."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.benchmarks.clock import cost
from tests.benchmarks.programs import CannotMeasureError, find
from tests.benchmarks.table import Results, Row
from tests.servers import installations, needs

_TINY = (
    *("--no-control", "--over", "tcp", "--protocol", "prepared", "--clients", "1", "--rounds", "1", "--seconds", "0.1"),
    *("--idle", "30", "--busy", "4", "--settle", "0"),
)
_PLACES = os.environ.get("PATH", "") + ":/usr/sbin"
_PROGRAMS = ("pgbouncer", "haproxy", "gcc")


def _benchmark(*options: str, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", *options],
        cwd=Path(__file__).parents[2],
        env=os.environ | (environ or {}),
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
    )


@needs("pgbouncer, HAProxy or gcc", found=all(shutil.which(program, path=_PLACES) for program in _PROGRAMS))
@needs("PostgreSQL with pgbench", found=any(installations().values()))
def test_a_tiny_round(tmp_path: Path) -> None:
    parts = ("crowd", "pgbench")
    only = [argument for part in parts for argument in ("--only", part)]
    done = _benchmark(*only, *_TINY, "--attribution", "auto", "--json", str(tmp_path / "values"))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "values").read_text())
    assert {row["scenario"] for row in rows} == set(parts)
    for row in rows:
        assert set(row["values"]) == {"pgbouncer", "HAProxy", "pgguard"}, row
        assert row["quantity"] in done.stdout
    assert all(value > 0 for row in rows if "CPU" in row["quantity"] for value in row["medians"].values())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--only", "nothing"), "--only: no nothing; there are exact, pgbench,"),
        (("--guard", "old"), "--guard old: it takes NAME=PYTHON"),
        (("--guard", "old=/nowhere/python"), "it takes NAME=PYTHON"),
        (("--server", "debian-1", "--only", "exact"), "apt-get install postgresql (debian-1 isn't there)"),
    ],
)
def test_what_cannot_be_measured_is_said(options: tuple[str, ...], said: str) -> None:
    done = _benchmark(*options, environ={"COLUMNS": "300"})
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in done.stdout + done.stderr


def test_it_is_said_what_to_install() -> None:
    with pytest.raises(
        CannotMeasureError, match="no-such-proxy is needed, and not installed: apt-get install its-package"
    ):
        find("no-such-proxy", "its-package")


def test_cost_counts_what_a_process_has_done() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            before = cost(busy.pid)
            while cost(busy.pid).total - before.total < 50_000:
                time.sleep(0.01)
            spent = cost(busy.pid) - before
        finally:
            busy.kill()
    assert spent.total == pytest.approx(spent.user + spent.system, abs=30_000)


def test_a_guard_is_compared_with_the_better_peer() -> None:
    row = Row("pgbench", "CPU a transaction", "µs", goal=1.1)
    for name, values in {
        "pgbouncer": [10.0, 20.0],
        "HAProxy": [12.0, 24.0],
        "a": [11.0, 21.0],
        "b": [12.0, 23.0],
    }.items():
        for value in values:
            row.add(name, value)
    assert row.better_peer == "pgbouncer"
    assert row.ratio("a", "pgbouncer") == pytest.approx(1.075)  # round by round
    assert (row.meets("a"), row.meets("b")) == (True, False)


def test_more_may_be_better() -> None:
    row = Row("pgbench", "transactions a second", "1/s", more_is_better=True, goal=0.95)
    for name, value in {"pgbouncer": 90.0, "HAProxy": 100.0, "a": 95.0, "b": 94.0}.items():
        row.add(name, value)
    assert row.better_peer == "HAProxy"
    assert (row.meets("a"), row.meets("b")) == (True, False)


def test_a_goal_may_be_one_by_itself() -> None:
    row = Results(None).row("connections", "CPU a connection", "µs", goal=350, absolute=True)
    row.add("a", 349.0)
    row.add("b", 351.0)
    assert row.better_peer is None
    assert (row.meets("a"), row.meets("b")) == (True, False)
