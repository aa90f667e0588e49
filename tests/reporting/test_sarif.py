"""SARIF: valid by its published schema, a place in the sources for each result, and the same result in each run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import jsonschema
import pytest

from pgguard.attribution.frames import Frame
from pgguard.faults.catalogue import CATALOGUE, Severity
from pgguard.faults.fault import Fault, Role, Spread
from pgguard.reporting.places import Sources
from pgguard.reporting.sarif import LIMIT, to_sarif
from pgguard.session.verdicts import Kind
from tests.faults.samples import MASTER, NOW, WORKER_1, fault, verdict
from tests.reporting.gathered import LIBRARYS, MAIN, SERVE, STACK, causes, recorded, seen

APP = Sources("/srv/app")
VALIDATOR = jsonschema.Draft4Validator(
    json.loads((Path(__file__).parent / "schemas/sarif-schema-2.1.0.json").read_text()),
    format_checker=jsonschema.Draft4Validator.FORMAT_CHECKER,
)
BOTH = replace(seen(roles=(Role.INTRUDER, Role.REQUESTER), opening=(LIBRARYS, MAIN)), id=1, cause=1, run="0")


def run_of(*faults: Fault, sources: Sources = APP) -> dict[str, Any]:
    log = json.loads(to_sarif(recorded(*faults), sources).text)
    VALIDATOR.validate(log)
    [run] = log["runs"]
    return dict(run)


def result_of(what: Fault, sources: Sources = APP) -> dict[str, Any]:
    [result] = run_of(what, sources=sources)["results"]
    return dict(result)


def place_of(location: dict[str, Any]) -> tuple[str, int]:
    """Where a location is in the sources."""
    found = location["physicalLocation"]
    assert found["artifactLocation"].get("uriBaseId") == "%SRCROOT%"
    return found["artifactLocation"]["uri"], found["region"]["startLine"]


def test_a_cause_is_a_result_in_the_line_where_it_was_seen() -> None:
    again = replace(BOTH, id=2, repeat_of=1, suppressed=40, spread=Spread(42, 11, 4, NOW))
    run = run_of(BOTH, again)
    [result] = run["results"]
    assert (result["ruleId"], result["level"], result["occurrenceCount"]) == ("shared-by-processes", "error", 42)
    assert run["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] == "shared-by-processes"
    assert result["message"]["text"].startswith(
        f"{BOTH.summary} (42 times in 11 sessions, 4 processes involved). What "
    )
    assert [place_of(one) for one in result["locations"]] == [("src/app.py", 36)]
    assert result["properties"]["firstSeen"] == "2026-11-22T11:52:07.120402Z"
    root = run["originalUriBaseIds"]["%SRCROOT%"]["uri"]
    assert urljoin(root, "src/app.py") == "file:///srv/app/src/app.py"
    assert run["automationDetails"]["id"] == "pgguard/"


def test_the_other_side_and_the_opening_are_told_with_their_stacks() -> None:
    result = result_of(BOTH)
    related = [(one["message"]["text"], place_of(one)) for one in result["relatedLocations"]]
    assert related == [
        ("pid 4866 (puma: cluster worker 0), thread 4871", ("src/app.py", 36)),
        ("pid 4864 (puma 6.4.2 (tcp://0.0.0.0:9292) [app]), opening the connection", ("src/app.py", 58)),
    ]
    [flow] = result["codeFlows"]
    steps = [[place_of(step["location"]) for step in thread["locations"]] for thread in flow["threadFlows"]]
    both = [("src/app.py", 58), ("src/app.py", 36)]
    assert steps == [both, both, [("src/app.py", 58)]], "the application's own calls, the outermost first"
    functions = [[one["location"]["logicalLocations"][0]["fullyQualifiedName"] for one in stack["frames"]]
                 for stack in result["stacks"]]  # fmt: skip
    assert functions == [["Connection.wait", "serve", "main"]] * 2 + [["Connection.wait", "main"]]
    assert [stack["frames"][0].get("threadId") for stack in result["stacks"]] == [4880, 4871, None]
    elsewhere = result_of(seen((LIBRARYS._replace(file="/usr/lib/psycopg.py"), *STACK[1:])))["stacks"][0]["frames"][0]
    assert elsewhere["location"]["physicalLocation"]["artifactLocation"] == {"uri": "file:///usr/lib/psycopg.py"}


def test_what_lies_in_the_sources_comes_first() -> None:
    plugin = Frame("work", "/opt/plugin.py", 3, application=True)
    result = result_of(seen((plugin,), opening=(LIBRARYS, MAIN)))
    assert [place_of(one) for one in result["locations"]] == [("src/app.py", 58)]
    [other] = result["relatedLocations"]
    assert other["physicalLocation"]["artifactLocation"] == {"uri": "file:///opt/plugin.py"}


def test_a_cause_that_was_seen_nowhere_is_a_notification_and_no_result() -> None:
    """GitHub refuses a whole file for one result without a physical location."""
    nowhere = replace(fault(verdict(Kind.IDLE_IN_TRANSACTION)), id=2, cause=2, run="0")
    made = to_sarif(recorded(BOTH, nowhere), APP)
    assert (made.placeless, made.left_out) == (1, 0)
    run = run_of(BOTH, nowhere)
    assert [result["ruleId"] for result in run["results"]] == ["shared-by-processes"]
    [told] = run["invocations"][0]["toolExecutionNotifications"]
    assert (told["associatedRule"]["id"], told["level"]) == ("idle-in-transaction", "warning")
    assert "locations" not in told
    for result in run["results"]:
        assert all(place_of(location) for location in (*result["locations"], *result["relatedLocations"]))


@pytest.mark.parametrize(
    ("severity", "level"), [(Severity.ERROR, "error"), (Severity.WARNING, "warning"), (Severity.INFO, "note")]
)
def test_the_severity_decides_on_the_level(severity: Severity, level: str) -> None:
    assert result_of(replace(BOTH, severity=severity))["level"] == level


def test_each_kind_is_a_rule_with_its_help() -> None:
    driver = run_of()["tool"]["driver"]
    assert [rule["id"] for rule in driver["rules"]] == list(CATALOGUE)
    shared = driver["rules"][list(CATALOGUE).index(Kind.SHARED_BY_PROCESSES)]
    assert shared["name"] == "SharedByProcesses"
    assert shared["help"]["text"].count("pgguard explain shared-by-processes --for FRAMEWORK") == 1
    assert "\n## What to change\n" in shared["help"]["markdown"]
    assert run_of()["results"] == []


def test_a_result_is_known_again_in_the_next_run_and_after_a_line_was_added_above_it() -> None:
    def fingerprint(what: Fault) -> str:
        return str(result_of(what)["partialFingerprints"]["pgguardCause/v1"])

    known = fingerprint(BOTH)
    worker = replace(WORKER_1, pid=77, started_at=NOW, cmdline=("puma: cluster worker 3: 4711 [app]",), ppid=4711)
    others = tuple(
        replace(one, pid=77, tid=78, process=worker) if one.role is Role.INTRUDER else one for one in BOTH.culprits
    )
    moved = (LIBRARYS._replace(line=1), SERVE._replace(line=40), MAIN)
    again = seen(moved, opening=(LIBRARYS, MAIN), of=replace(BOTH, culprits=others, at=NOW + 99, id=5, run="1"))
    assert fingerprint(again) == known
    elsewhere = [
        replace(BOTH, kind=Kind.REQUEST_WHILE_BUSY),
        seen((SERVE._replace(function="other"),), of=BOTH),
        seen((SERVE._replace(file="/srv/app/src/b.py"),), of=BOTH),
        replace(BOTH, culprits=tuple(replace(one, process=MASTER) for one in BOTH.culprits)),
    ]
    assert len({known, *map(fingerprint, elsewhere)}) == 5


@pytest.mark.parametrize(
    "text", ["[a](1) {0} \\", "]]>\x00\x1b[2J\u202e\udcff", "</script>\n%SRCROOT%", "x" * 9000], ids=lambda t: t[:9]
)
def test_whatever_others_say_the_file_is_valid(text: str) -> None:
    frame = Frame(text, f"/srv/app/{text}.py", 0, application=True)
    worker = replace(WORKER_1, cmdline=(text,), name=text)
    what = seen((frame, frame._replace(file="<string>"), frame._replace(file="")), opening=(frame,))
    culprits = tuple(replace(one, process=worker, thread_name=text) for one in what.culprits)
    result = result_of(replace(what, culprits=culprits, summary=text, libpq=text))
    said = result["message"]["text"]
    assert said.isprintable()
    assert len(said) <= 4100
    assert "[a](1)" not in said, "it would be a link"
    assert "{0}" not in said.replace("{{0}}", ""), "it would be a placeholder"
    assert result["locations"][0]["physicalLocation"]["region"] == {"startLine": 1}


def test_what_has_no_room_is_counted() -> None:
    made = to_sarif(recorded(*causes(40, BOTH)), APP, limit=100_000)
    assert len(made.text) <= 100_000
    log = json.loads(made.text)
    VALIDATOR.validate(log)
    assert made.left_out > 0
    assert len(log["runs"][0]["results"]) == 40 - made.left_out > 0
    assert LIMIT < 10_000_000, "GitHub takes no more"
