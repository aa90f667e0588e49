"""SARIF 2.1.0, for code scanning: https://docs.oasis-open.org/sarif/sarif/v2.1.0/sarif-v2.1.0.html.

A result is a place in the sources. So only a cause of which somebody was seen in the application's own code is one:
GitHub refuses a whole file for one result without a physical location. The file tells of the others as notifications of
the tool, and whoever asks for it learns how many there are.

Where everybody was who took part stands in ``codeFlows``, a thread flow each, of the application's own calls alone; the
whole stacks stand in ``stacks``. What a result is known by from one run to the next (``partialFingerprints``) has no
pid, time or line in it.
"""

from __future__ import annotations

import hashlib
import json
import re
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pgguard.faults.catalogue import CATALOGUE, Severity
from pgguard.faults.text import printable, shorten
from pgguard.reporting.places import places
from pgguard.reporting.record import rfc3339
from pgguard.reporting.words import extent, opened_at, programs, sides

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pgguard.attribution.frames import Frame
    from pgguard.faults.catalogue import Entry
    from pgguard.faults.fault import Fault
    from pgguard.reporting.places import Place, Sources
    from pgguard.reporting.recorded import RecordedCause, Recording

LIMIT: Final = 2_000_000
"""Bytes of a file, at most. GitHub takes 10 MB, compressed, and shows 5,000 results."""

_ROOT: Final = "%SRCROOT%"
"""What the root of the sources is called, by convention: SARIF, section 3.14.14."""
_SCHEMA: Final = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_FINGERPRINT: Final = "pgguardCause/v1"
_LEVELS: Final = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "note"}
_PROBLEMS: Final = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "recommendation"}
"""The same in GitHub's words."""
_CALLS: Final = 100
"""Calls of a stack that are told, the innermost ones."""
_TEXT: Final = 4000
"""Characters of a text, at most."""
_MOST: Final = (1 << 31) - 1
_PLACEHOLDER: Final = re.compile(r"\{(\d+)\}")


class Sarif(NamedTuple):
    """A SARIF file, and what isn't in it."""

    text: str
    placeless: int
    """Causes that are no results, as nobody was seen in the application's own code."""
    left_out: int
    """Causes for which there was no room."""


def to_sarif(recording: Recording, sources: Sources, *, limit: int = LIMIT) -> Sarif:
    """The causes of a recording as a SARIF file, the gravest first.

    Args:
        recording: What has been recorded.
        sources: Where the application's sources are: files there have relative names.
        limit: Bytes that it may have.
    """
    results: list[dict[str, Any]] = []
    notifications: list[dict[str, Any]] = []
    log = _log(sources, results, notifications)
    room = limit - len(_dump(log))
    placeless = left_out = 0
    for cause in recording.causes:
        fault = cause.fault
        # GitHub shows what lies in the repository.
        seen = sorted(places(fault), key=lambda place: sources.relative(place.frame.file) is None)
        placeless += not seen
        if left_out:
            left_out += 1
            continue
        made = _result(cause, fault, seen, sources) if seen else _notification(cause, fault)
        room -= len(_dump(made)) + 1
        if room < 0:
            left_out += 1
        else:
            (results if seen else notifications).append(made)
    return Sarif(_dump(log), placeless, left_out)


def _dump(value: object) -> str:
    # In ASCII, characters are bytes.
    return json.dumps(value, separators=(",", ":"))


def _log(sources: Sources, results: list[dict[str, Any]], notifications: list[dict[str, Any]]) -> dict[str, Any]:
    release = version("pgguard")
    driver = {
        "name": "pgguard",
        "version": release,
        "semanticVersion": release,
        "rules": [_rule(entry) for entry in CATALOGUE.values()],
    }
    run = {
        "tool": {"driver": driver},
        "automationDetails": {"id": "pgguard/"},
        "originalUriBaseIds": {_ROOT: {"uri": sources.uri}},
        "columnKind": "unicodeCodePoints",
        "invocations": [{"executionSuccessful": True, "toolExecutionNotifications": notifications}],
        "results": results,
    }
    return {"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}


def _rule(entry: Entry) -> dict[str, Any]:
    advice = entry.advice
    explain = f"pgguard explain {entry.kind}"
    text = (
        f"{entry.meaning}\n\nHow it happens: {entry.cause}\n\nWhat to change: {advice.title}. {advice.text}\n\n"
        f"For code to paste, run {explain} --for FRAMEWORK."
    )
    sources = "".join(f"\n- <{source}>" for source in advice.sources)
    markdown = (
        f"{entry.meaning}\n\n## How it happens\n\n{entry.cause}\n\n## What to change\n\n**{advice.title}.** "
        f"{advice.text}\n\nFor code to paste, run `{explain} --for FRAMEWORK`.\n{sources}"
    )
    return {
        "id": str(entry.kind),
        "name": "".join(word.capitalize() for word in entry.kind.split("-")),
        "shortDescription": {"text": f"{entry.title[0].upper()}{entry.title[1:]}"},
        "fullDescription": {"text": entry.meaning},
        "help": {"text": text, "markdown": markdown},
        "defaultConfiguration": {"level": _LEVELS[entry.severity]},
        "properties": {"tags": ["correctness", "postgresql"], "problem.severity": _PROBLEMS[entry.severity]},
    }


def _result(cause: RecordedCause, fault: Fault, seen: Sequence[Place], sources: Sources) -> dict[str, Any]:
    where = _location(seen[0].frame, sources, seen[0].who)
    others = [_location(place.frame, sources, place.who) | {"id": n} for n, place in enumerate(seen[1:], 1)]
    return {
        "ruleId": str(fault.kind),
        "ruleIndex": list(CATALOGUE).index(fault.kind),
        "level": _LEVELS[fault.severity],
        "message": _message(_told(cause, fault)),
        "locations": [where],
        "relatedLocations": others,
        "codeFlows": [{"threadFlows": [_thread_flow(n, place, sources) for n, place in enumerate(seen, 1)]}],
        "stacks": list(_stacks(fault, sources)),
        "partialFingerprints": {_FINGERPRINT: _fingerprint(fault, seen[0], sources)},
        "occurrenceCount": min(max(cause.times, 1), _MOST),
        "properties": _properties(cause),
    }


def _notification(cause: RecordedCause, fault: Fault) -> dict[str, Any]:
    return {
        "descriptor": {"id": "no-place-in-the-sources"},
        "associatedRule": {"id": str(fault.kind), "index": list(CATALOGUE).index(fault.kind)},
        "level": _LEVELS[fault.severity],
        "message": _message(_told(cause, fault)),
        "properties": _properties(cause),
    }


def _properties(cause: RecordedCause) -> dict[str, Any]:
    return {
        "times": cause.times,
        "sessions": cause.sessions,
        "processes": cause.processes,
        "firstSeen": rfc3339(cause.first_at),
        "lastSeen": rfc3339(cause.last_at),
    }


def _told(cause: RecordedCause, fault: Fault) -> str:
    how_far = extent(cause.times, cause.sessions, cause.processes)
    advice = fault.advice
    return f"{fault.headline} ({how_far}). What to change: {advice.title}. {advice.text}"


def _message(text: str) -> dict[str, Any]:
    """A message, in which nothing that others say is taken for a link or a placeholder: sections 3.11.5 and 3.11.6."""
    plain = printable(shorten(text, _TEXT))
    if "](" in plain:
        plain = plain.replace("\\", r"\\").replace("[", r"\[").replace("]", r"\]")
    return {"text": _PLACEHOLDER.sub(r"{{\1}}", plain)}


def _location(frame: Frame, sources: Sources, who: str | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"logicalLocations": [{"fullyQualifiedName": printable(frame.function)}]}
    if not frame.file.startswith("<") and frame.file:
        uri, relative = sources.uri_of(frame.file)
        artifact = {"uri": uri} | ({"uriBaseId": _ROOT} if relative else {})
        found["physicalLocation"] = {"artifactLocation": artifact, "region": {"startLine": max(frame.line, 1)}}
    if who is not None:
        found["message"] = _message(who)
    return found


def _thread_flow(n: int, place: Place, sources: Sources) -> dict[str, Any]:
    """How one side came to where it was, by the application's own calls."""
    calls = [frame for frame in place.stack[:_CALLS] if frame.application and not frame.file.startswith("<")]
    steps = [
        {"location": _location(frame, sources, frame.function), "nestingLevel": level}
        for level, frame in enumerate(reversed(calls))
    ]
    return {"id": str(n), "message": _message(place.who), "locations": steps}


def _stacks(fault: Fault, sources: Sources) -> Iterator[dict[str, Any]]:
    for side in sides(fault):
        thread = None if side.culprit is None else side.culprit.tid
        if side.stack:
            yield _stack(side.text, side.stack, sources, thread)
        if side.opening:
            yield _stack(f"{side.text}; {opened_at(side.opening)}", side.opening, sources)


def _stack(text: str, frames: Sequence[Frame], sources: Sources, thread: int | None = None) -> dict[str, Any]:
    of_thread = {} if thread is None else {"threadId": thread}
    calls = [{"location": _location(frame, sources)} | of_thread for frame in frames[:_CALLS]]
    return {"message": _message(text), "frames": calls}


def _fingerprint(fault: Fault, place: Place, sources: Sources) -> str:
    """What a cause is known by in every run: its kind, the programs, and the function in the application."""
    file = sources.uri_of(place.frame.file)[0]
    known_by = [str(fault.kind), str(fault.severity), *programs(fault), fault.advice.title, file, place.frame.function]
    return hashlib.sha256("\0".join(known_by).encode("utf-8", "replace")).hexdigest()
