"""What a guard has recorded of a real program, turned into each kind of report."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest

from pgguard.attribution.stacks import find_py_spy
from pgguard.faults.catalogue import Severity
from pgguard.reporting.github import to_github
from pgguard.reporting.junit import to_junit
from pgguard.reporting.places import Sources
from pgguard.reporting.recorded import read_recording
from pgguard.reporting.sarif import to_sarif
from pgguard.reporting.text import to_text
from tests.integration.running import PROGRAMS, running
from tests.reporting.test_junit import SCHEMA
from tests.reporting.test_sarif import VALIDATOR, place_of
from tests.servers import not_installed

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import StartGuard
    from tests.servers import Transport

pytestmark = pytest.mark.parametrize("server", ["embedded"], indirect=True, scope="session")


def line_of(beginning: str) -> int:
    """The line of the program that begins like that."""
    lines = (PROGRAMS / "two_sides.py").read_text().splitlines()
    [number] = [n for n, line in enumerate(lines, 1) if line.strip().startswith(beginning)]
    return number


@pytest.mark.parametrize("transport", ["unix"], indirect=True)
def test_a_file_of_faults_says_what_the_guard_said_in_each_form(
    start_guard: StartGuard, transport: Transport, tmp_path: Path
) -> None:
    if find_py_spy() is None:
        not_installed("py-spy")
    guard = start_guard("--evidence-budget", "3")
    with running((sys.executable, PROGRAMS / "two_sides.py"), guard.at(transport), tmp_path) as program:
        program.read()
        guard.wait_for("shared-by-processes")
    guard.stop()
    recording, sources = read_recording(guard.records), Sources(str(PROGRAMS))
    text = "".join(to_text(recording, terminal=False))

    # From the file nothing is told otherwise than when it happened, but for advice that had been given before.
    begins = text.index("pgguard: ERROR: shared-by-processes")
    assert text[begins : text.index("  What to change:", begins)] in guard.stderr
    whole, *_ = text.rpartition("\n\n")[2].splitlines()
    [said] = [line for line in guard.stderr.splitlines() if line.startswith("pgguard: 1 session, ")]
    assert said == whole.replace("pgguard: ", "pgguard: 1 session, ")

    SCHEMA.validate(to_junit(recording, fail_on=Severity.ERROR))
    asks = line_of("connection.execute(")
    assert f"::error file=two_sides.py,line={asks},title=shared-by-processes%3A " in to_github(recording, sources).text
    log = json.loads(to_sarif(recording, sources).text)
    VALIDATOR.validate(log)
    [result] = [one for one in log["runs"][0]["results"] if one["ruleId"] == "shared-by-processes"]
    places = [place_of(one) for one in (*result["locations"], *result["relatedLocations"])]
    assert places[:2] == [("two_sides.py", asks)] * 2
    assert places[-1] == ("two_sides.py", line_of("return psycopg.connect("))
