"""That the soak itself works, and finds what is wrong: a short one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.soak.account import Account
from tests.soak.steps import ALL, steps
from tests.soak.watched import Sample, growth
from tests.soak.workloads import WORKLOADS

_SECONDS = 220
_FEW = ("psycopg", "asyncpg", "psql", "connects", "forks", "killed")


@pytest.mark.timeout(_SECONDS + 20)
def test_a_short_one() -> None:
    only = [argument for name in _FEW for argument in ("--only", name)]
    options = ["--minutes", "0.06", "--share", "2", "--server", "embedded", "--seed", "7"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.soak", *options, *only],
        cwd=Path(__file__).parents[2],
        check=False,
        capture_output=True,
        text=True,
        timeout=_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all is well" in done.stdout
    assert "too short to say whether memory grows" in done.stdout


def test_steps_are_the_same_each_time() -> None:
    assert list(steps(7, 50, ALL)) == list(steps(7, 50, ALL))
    assert {step["do"] for step in steps(8, 50, ALL)} == set(ALL)
    assert list(steps(7, 50, ALL)) != list(steps(8, 50, ALL))


@pytest.mark.parametrize("other", ['{"rows": 2}\n{"rows": 4}\n', '{"rows": 2}\n', ""])
def test_a_row_that_differs_is_found(tmp_path: Path, other: str) -> None:
    account = Account(WORKLOADS)
    directly, guarded = tmp_path / "directly", tmp_path / "guarded"
    directly.write_text('{"rows": 2}\n{"rows": 3}\n')
    guarded.write_text(other)
    account.compare(WORKLOADS[0], directly, guarded, "here")
    [wrong] = account.wrong
    assert "differs" in wrong
    account.wrong.clear()
    account.compare(WORKLOADS[0], directly, directly, "here")
    assert account.wrong == []
    assert account.rows >= 5


def _fault(workload: str, kind: str, severity: str, suppressed: int = 0) -> dict[str, object]:
    user = next(one.user for one in WORKLOADS if one.name == workload)
    return {"kind": kind, "severity": severity, "summary": "", "suppressed": suppressed, "session": {"user": user}}


def test_faults_are_false_unless_a_program_brings_them_about() -> None:
    account = Account(WORKLOADS)
    assert account.take(_fault("forks", "inherited-connection", "info"))
    assert not account.take(_fault("forks", "inherited-connection", "warning"))
    assert not account.take(_fault("psycopg", "unclean-close", "warning"))
    account.entries["killed"].connections_killed = 7
    assert account.take(_fault("killed", "unclean-close", "error", suppressed=6))
    assert len(account.wrong) == 2
    account.close()
    assert len(account.wrong) == 2
    account.entries["killed"].connections_killed = 8
    account.close()
    assert len(account.wrong) == 3


def test_memory_that_grows_is_found() -> None:
    def samples(per_sample: float) -> list[Sample]:
        return [Sample(5.0 * n, 60 + per_sample * n, 10, 2, 9, 0.0) for n in range(200)]

    still, grows = growth(samples(0.0)), growth(samples(0.1))
    assert still is not None
    assert grows is not None
    assert abs(still.megabytes) < 0.1
    assert grows.megabytes > grows.allowed
    assert growth(samples(1.0)[:10]) is None
