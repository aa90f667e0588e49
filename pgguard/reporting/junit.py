"""JUnit's XML, which every CI server reads: a test case for each cause, of which those fail that are grave enough.

There is no standard but what its readers take; this is the form of Jenkins' xUnit plugin (``junit-10.xsd``), which
pytest checks its own files against. A test case has the same name in each run, without pids and numbers, so that a
server knows it again. If there was no fault, a single one passes: many servers take a file without any for a mistake.
"""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final
from xml.etree import ElementTree as ET

from pgguard.faults.catalogue import CATALOGUE
from pgguard.faults.text import counted, printable, shorten
from pgguard.reporting.console import report_of
from pgguard.reporting.record import rfc3339
from pgguard.reporting.words import extent, programs

if TYPE_CHECKING:
    from pgguard.faults.catalogue import Severity
    from pgguard.reporting.recorded import RecordedCause, Recording

LIMIT: Final = 1_900_000
"""Characters of a file, about: what has no room is one test case together."""
IN_FULL: Final = 256
"""Causes that have their whole report with them, at most."""

_SUITE: Final = "pgguard"
_MORE: Final = "more causes"
_NAME_LENGTH: Final = 120
_MESSAGE_LENGTH: Final = 1000


def to_junit(recording: Recording, *, fail_on: Severity | None) -> str:
    """The causes of a recording as a file of JUnit's, the gravest first.

    Args:
        recording: What has been recorded.
        fail_on: From which severity on a cause is a test case that fails; ``None``: none does. The others pass, with
            their report as what they have printed.
    """
    cases: list[ET.Element] = []
    names: Counter[str] = Counter()
    failures = 0
    room = LIMIT
    for n, cause in enumerate(recording.causes):
        fails = fail_on is not None and cause.severity.rank >= fail_on.rank
        case = _case(cause, names, fails=fails, in_full=n < IN_FULL)
        room -= len(ET.tostring(case, encoding="unicode"))
        if room < 0:
            # The gravest come first, so that it is known by this one whether any of the others fails.
            case = _rest(len(recording.causes) - n, fails=fails)
        cases.append(case)
        failures += fails
        if room < 0:
            break
    if not cases:
        cases.append(ET.Element("testcase", name="no connection was misused", classname=_SUITE, time="0"))
    counts = {"tests": str(len(cases)), "failures": str(failures), "errors": "0"}
    root = ET.Element("testsuites", {"name": _SUITE, "time": "0", **counts})
    suite = ET.SubElement(root, "testsuite", {"name": _SUITE, "skipped": "0", "time": "0", **counts})
    if recording.first_at is not None:
        suite.set("timestamp", datetime.fromtimestamp(recording.first_at, UTC).strftime("%Y-%m-%dT%H:%M:%S"))
    suite.append(_properties(recording))
    suite.extend(cases)
    if recording.troubles:
        ET.SubElement(suite, "system-err").text = "\n".join(printable(trouble) for trouble in recording.troubles)
    ET.indent(root)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def _case(cause: RecordedCause, names: Counter[str], *, fails: bool, in_full: bool) -> ET.Element:
    fault = cause.fault
    doer, opener = programs(fault)
    whose = shorten(printable(doer or opener), _NAME_LENGTH)
    name = CATALOGUE[fault.kind].title + (f" ({whose})" if whose else "")
    names[name] += 1
    numbered = name if names[name] == 1 else f"{name} [{names[name]}]"
    case = ET.Element("testcase", name=numbered, classname=f"{_SUITE}.{fault.kind}", time="0")
    headline = shorten(printable(fault.headline), _MESSAGE_LENGTH)
    how_far = f"{fault.kind}, {extent(cause.times, cause.sessions, cause.processes)}"
    between = f"first seen {rfc3339(cause.first_at)}, last seen {rfc3339(cause.last_at)}"
    told = f"\n{how_far}; {between}\n\n{report_of(fault) if in_full else headline}\n"
    _end(case, str(fault.kind), headline, told, fails=fails)
    return case


def _rest(number: int, *, fails: bool) -> ET.Element:
    case = ET.Element("testcase", name=_MORE, classname=_SUITE, time="0")
    told = f"There was no room for {counted(number, 'more cause')}."
    _end(case, _MORE, told, told, fails=fails)
    return case


def _end(case: ET.Element, kind: str, headline: str, told: str, *, fails: bool) -> None:
    if fails:
        ET.SubElement(case, "failure", type=kind, message=headline).text = told
    else:
        ET.SubElement(case, "system-out").text = told


def _properties(recording: Recording) -> ET.Element:
    facts = {"faults": recording.times, "causes": len(recording.causes), "runs of the guard": recording.runs}
    properties = ET.Element("properties")
    for name, value in facts.items():
        ET.SubElement(properties, "property", name=name, value=str(value))
    return properties
