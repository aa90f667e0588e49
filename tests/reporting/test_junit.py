"""JUnit's XML: valid, the same test cases in each run, and opened by what reads it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from junitparser import JUnitXml, TestSuite
from xmlschema import XMLSchema

from pgguard.faults.catalogue import Severity
from pgguard.faults.fault import Role
from pgguard.reporting.console import report_of
from pgguard.reporting.junit import IN_FULL, to_junit
from pgguard.session.verdicts import Kind
from tests.faults.samples import MASTER, fault, process, verdict
from tests.reporting.gathered import causes, recorded

TestSuite.__test__ = False  # it is none of pytest's
SCHEMA = XMLSchema(Path(__file__).parent / "schemas/junit-10.xsd")

SHARED = replace(fault(), id=1, cause=1, run="0")
IDLE = replace(fault(verdict(Kind.IDLE_IN_TRANSACTION)), id=2, cause=2, run="0")


def cases(text: str) -> dict[str, ET.Element]:
    SCHEMA.validate(text)
    return {case.attrib["name"]: case for case in ET.fromstring(text).iter("testcase")}


def test_an_error_is_a_test_that_fails_and_a_warning_one_that_passes_with_output() -> None:
    text = to_junit(recorded(SHARED, IDLE), fail_on=Severity.ERROR)
    failed, passed = cases(text).values()
    failure = failed.find("failure")
    assert failure is not None
    assert failure.attrib == {"type": "shared-by-processes", "message": SHARED.summary}
    assert report_of(SHARED) in (failure.text or "")
    assert passed.find("failure") is None
    assert report_of(IDLE) in (passed.findtext("system-out") or "")
    assert (failed.attrib["classname"], passed.attrib["classname"]) == (
        "pgguard.shared-by-processes",
        "pgguard.idle-in-transaction",
    )


@pytest.mark.parametrize(("fail_on", "failures"), [(Severity.WARNING, 2), (Severity.ERROR, 1), (None, 0)])
def test_what_fails_is_what_is_asked_for(fail_on: Severity | None, failures: int) -> None:
    text = to_junit(recorded(SHARED, IDLE), fail_on=fail_on)
    opened = JUnitXml.fromstring(text.encode())
    [suite] = opened
    assert isinstance(suite, TestSuite)
    assert (opened.tests, opened.failures, opened.errors) == (2, failures, 0)
    assert (suite.tests, suite.failures, suite.timestamp) == (2, failures, "2026-11-22T11:52:07")
    assert sum(bool(case.result) for case in suite) == failures


def test_without_faults_one_test_passes() -> None:
    """Servers take a file that has none for a mistake."""
    text = to_junit(recorded(), fail_on=Severity.ERROR)
    assert list(cases(text)) == ["no connection was misused"]
    assert JUnitXml.fromstring(text.encode()).failures == 0


def test_a_cause_has_the_same_name_in_each_run_and_no_two_have_the_same() -> None:
    """A server knows it again."""
    other = tuple(
        replace(one, pid=1, process=process(1, 2, f"puma: cluster worker 7: {one.pid} [app]"))
        if one.role is Role.INTRUDER
        else one
        for one in SHARED.culprits
    )
    name = "two processes use one connection (puma: cluster worker #: # [app])"
    assert list(cases(to_junit(recorded(SHARED), fail_on=None))) == [name]
    assert list(cases(to_junit(recorded(replace(SHARED, culprits=other)), fail_on=None))) == [name]
    assert list(cases(to_junit(recorded(*causes(2)), fail_on=None))) == [name, f"{name} [2]"]


def test_whatever_others_say_the_file_is_xml() -> None:
    hostile = (
        "".join(map(chr, [*range(0x20), 0x7F, 0x85, 0x2028, 0xDCFF, 0xD800, 0xFFFE, 0xFFFF])) + ']]><failure/>&amp;"'
    )
    worker = replace(MASTER, cmdline=(hostile,), name=hostile)
    culprits = tuple(replace(one, process=worker) for one in SHARED.culprits)
    text = to_junit(recorded(replace(SHARED, culprits=culprits, summary=hostile)), fail_on=Severity.ERROR)
    [(name, case)] = cases(text).items()
    assert re.search(r"\\x00\\x01.*\\udcff\\ud800\\ufffe\\uffff\]\]><failure/>&amp;", case[0].attrib["message"])
    assert name.isprintable()
    assert len(case) == 1


def test_of_very_many_causes_only_some_have_their_report_with_them() -> None:
    many = cases(to_junit(recorded(*causes(IN_FULL + 2)), fail_on=Severity.ERROR))
    lengths = [len(case[0].text or "") for case in many.values()]
    assert len(lengths) == IN_FULL + 2
    assert max(lengths[IN_FULL:]) < 400 < min(lengths[:IN_FULL])


def test_what_has_no_room_is_one_test_that_fails_if_any_of_them_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgguard.reporting.junit.LIMIT", 20_000)
    idle = [replace(IDLE, id=99 + n, cause=99 + n) for n in range(9)]
    text = to_junit(recorded(*causes(9), *idle), fail_on=Severity.ERROR)
    assert len(text) < 22_000
    *_, last = cases(text).values()
    assert last.attrib["name"] == "more causes"
    told = re.fullmatch(r"There was no room for (\d+) more causes\.", last[0].text or "")
    assert told is not None
    assert int(told[1]) == 18 - len(cases(text)) + 1
    assert last[0].tag == "failure", "the gravest come first, and not all errors had room"
    passing = to_junit(recorded(*causes(2), *idle), fail_on=Severity.ERROR)
    assert [*cases(passing).values()][-1][0].tag == "system-out"
