"""What a card says of one cause, and what the page says of all of them together."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pgguard.attribution.evidence import Evidence
from pgguard.attribution.frames import place, short_path
from pgguard.faults.catalogue import CATALOGUE, Severity
from pgguard.faults.fault import Role
from pgguard.faults.policy import Action
from pgguard.faults.text import counted, listed, shorten
from pgguard.reporting.page.drawing import Diagram, draw
from pgguard.reporting.page.explanations import CONSEQUENCES, EVIDENCE, MESSAGES, OPENERS_EVIDENCE
from pgguard.reporting.record import rfc3339
from pgguard.reporting.sequence import Sequence, What, sequence_of
from pgguard.reporting.words import (
    NAME_LENGTH,
    PLACE_LENGTH,
    done,
    known_by,
    opened_at,
    session_words,
    share_words,
    sides,
    stack_lines,
    where_to_look,
    who,
)
from pgguard.session.verdicts import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pgguard.attribution.frames import Frame
    from pgguard.faults.advice.tracing import Tracing
    from pgguard.faults.catalogue import Advice, Entry
    from pgguard.faults.fault import Culprit, Fault
    from pgguard.reporting.recorded import RecordedCause, Recording
    from pgguard.reporting.words import Side, StackLine

SYMBOLS: Final = {Severity.ERROR: "✖", Severity.WARNING: "▲", Severity.INFO: "●"}
"""So that a severity isn't told by its colour alone."""

_SUMMARY: Final = 600
"""Characters of a sentence, at most."""
_CODE: Final = 8000
"""Characters of what is to be pasted, at most."""
_CALLS: Final = 60
"""Calls of a stack that are told, at most."""
_STACKS: Final = 6
"""Stacks, at most."""
_RECORD: Final = 40_000
"""Characters of a record as it is shown, at most."""
_STRING: Final = 2000
"""Characters of a text in it, at most."""
_SHARES: Final = 24
"""Processes whose connections are told, at most."""

_DONE: Final = {
    Action.LOGGED: "pgguard only recorded it",
    Action.REJECTED: "pgguard ended the session with an error",
    Action.DROPPED: "pgguard dropped the message",
}


class Person(NamedTuple):
    """One of those who took part."""

    text: str
    facts: tuple[str, ...]


class Stack(NamedTuple):
    """What a thread was doing."""

    heading: str
    place: str
    """Where in the application that was."""
    lines: tuple[StackLine, ...]
    """The calls that tell most, the innermost first."""
    calls: tuple[tuple[str, bool], ...]
    """All calls, and whether they are the application's own."""
    more: int
    """Calls that are left out even there."""


class Said(NamedTuple):
    """A step in words."""

    time: str
    text: str
    offending: bool


class Card(NamedTuple):
    """One cause."""

    number: int
    fault: Fault
    entry: Entry
    symbol: str
    verdict: str
    consequence: str
    facts: tuple[tuple[str, str], ...]
    diagram: Diagram | None
    said: tuple[Said, ...]
    unknown: tuple[str, ...]
    caption: str
    people: tuple[Person, ...]
    evidence: tuple[tuple[str, str], ...]
    """How they are known, in the words that stand there, and what that means."""
    stacks: tuple[Stack, ...]
    advice: Advice
    tracing: Tracing | None
    libpq: str | None
    where_to_look: str
    shares: tuple[tuple[int, str], ...]
    more_shares: int
    session: str
    record: str
    in_full: bool


class Outline(NamedTuple):
    """One cause in a row of a table."""

    number: int
    severity: Severity
    symbol: str
    kind: Kind
    title: str
    summary: str
    times: int
    sessions: int
    first_at: str
    last_at: str


def card_of(number: int, cause: RecordedCause) -> Card:
    """What there is to be said of a cause, which has this place among them."""
    fault = cause.fault
    entry = CATALOGUE[fault.kind]
    told = sides(fault)
    sequence = sequence_of(fault)
    shown = cause.in_full and len(sequence.steps) > 1
    shares = fault.shares or ()
    return Card(
        number=number,
        fault=fault,
        entry=entry,
        symbol=SYMBOLS[fault.severity],
        verdict=_sentence(shorten(fault.headline, _SUMMARY)),
        consequence=CONSEQUENCES[fault.kind],
        facts=tuple(_facts(cause, fault)),
        diagram=draw(sequence) if shown else None,
        said=tuple(Said(sequence.time(step), sequence.sentence(step), step.offending) for step in sequence.steps)
        if shown
        else (),
        unknown=sequence.unknown,
        caption=_caption(sequence),
        people=tuple(_person(side) for side in told),
        evidence=tuple(dict(_evidence(told)).items()),
        stacks=tuple(islice(_stacks(told), _STACKS)),
        advice=fault.advice._replace(
            title=shorten(fault.advice.title, _SUMMARY),
            text=shorten(fault.advice.text, _CODE),
            code=None if fault.advice.code is None else shorten(fault.advice.code, _CODE),
            sources=tuple(shorten(source, _SUMMARY) for source in fault.advice.sources[:12]),
        ),
        tracing=None
        if fault.tracing is None
        else fault.tracing._replace(
            text=shorten(fault.tracing.text, _CODE),
            code=shorten(fault.tracing.code, _CODE),
            sources=tuple(shorten(source, _SUMMARY) for source in fault.tracing.sources[:12]),
        ),
        libpq=None if fault.libpq is None else shorten(fault.libpq, _SUMMARY),
        where_to_look=where_to_look(fault.kind),
        shares=tuple((share.connections, share_words(share)) for share in shares[:_SHARES]),
        more_shares=sum(share.connections for share in shares[_SHARES:]),
        session=session_words(fault.session),
        record=_pretty(cause.record),
        in_full=cause.in_full,
    )


def outline_of(number: int, cause: RecordedCause) -> Outline:
    """What there is to be said of a cause in one row."""
    fault = cause.fault
    return Outline(
        number,
        cause.severity,
        SYMBOLS[cause.severity],
        cause.kind,
        CATALOGUE[cause.kind].title,
        shorten(fault.headline, 240),
        cause.times,
        cause.sessions,
        _moment(cause.first_at),
        _moment(cause.last_at),
    )


def sights(recording: Recording) -> list[str]:
    """What the guard could see and couldn't, as far as the records tell: sentences."""
    told: list[str] = []
    seen = recording.evidence
    if Evidence.KERNEL_SENDER in seen:
        told.append(
            "The Linux kernel named who sent what, in some of the causes at least: that is the strongest evidence."
        )
    weaker = [one for one in (Evidence.THREAD_SAMPLE, Evidence.SOLE_HOLDER, Evidence.SOCKET_HOLDER) if one in seen]
    if weaker and Evidence.KERNEL_SENDER not in seen:
        told.append(
            "The kernel named no senders here. pgguard looked at who had the connection open and who was waiting on it "
            "instead; pgguard doctor says which evidence a host allows."
        )
    if Evidence.DECLARED in seen:
        told.append(
            "Some clients run where pgguard can't see their processes: of those it knows what they say themselves."
        )
    for problem, times in recording.stack_problems[:6]:
        told.append(f"Of {counted(times, 'thread')} it isn't known what the code was doing: {problem}.")
    untracked = [count.times for count in recording.counts if count.kind is Kind.UNTRACKED]
    if untracked:
        told.append(f"pgguard stopped following a session {counted(sum(untracked), 'time')}: faults in it go unseen.")
    return told


def _facts(cause: RecordedCause, fault: Fault) -> Iterator[tuple[str, str]]:
    yield "First seen", _moment(cause.first_at)
    if cause.last_at > cause.first_at:
        yield "Last seen", _moment(cause.last_at)
    yield "How often", "once" if cause.times == 1 else f"{cause.times:,} times"
    spread = [counted(cause.sessions, "database session")] if cause.sessions else []
    if cause.processes:
        spread.append(counted(cause.processes, "process", "processes"))
    if spread:
        yield "Where", f"in {' and '.join(spread)}"
    if cause.runs > 1:
        yield "Runs", f"seen in {cause.runs} runs of pgguard"
    done_so_far = [_DONE[action] for action in Action if cause.actions[action]]
    over = "; the session has ended" if done(fault).endswith("has ended") else ""
    yield "What was done", f"{listed(done_so_far)}{over}"
    if fault.message is not None:
        meaning = MESSAGES.get(fault.message.name)
        name = f"{shorten(fault.message.name, NAME_LENGTH)}, {counted(fault.message.size, 'byte')}"
        yield "The message", name if meaning is None else f"{name}: {meaning}"


def _moment(at: float) -> str:
    """A moment as people read it: the date, the time to the millisecond, and the time zone."""
    text = rfc3339(at)
    return f"{text[:10]} {text[11:23]} UTC"


def _sentence(text: str) -> str:
    text = text.strip()
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith(('.', '…', '!', '?')) else '.'}"


def _caption(sequence: Sequence) -> str:
    steps = [step for step in sequence.steps if step.what is What.REQUEST]
    lanes = listed(list(dict.fromkeys(lane.name for lane in sequence.lanes[:-2])))
    requests = f", with {counted(len(steps), 'request')} before the fault" if steps else ""
    return f"What went over this connection, from top to bottom, between {lanes}, pgguard and PostgreSQL{requests}."


def _person(side: Side) -> Person:
    return Person(shorten(side.text, _SUMMARY), tuple(shorten(fact, _SUMMARY) for fact in side.facts))


def _evidence(told: list[Side]) -> Iterator[tuple[str, str]]:
    for side in told:
        culprit = side.culprit
        if culprit is None or culprit.pid is None:
            continue
        process = known_by(replace(culprit, tid_evidence=None))
        meanings = OPENERS_EVIDENCE if culprit.role is Role.OWNER else EVIDENCE
        yield process, meanings[culprit.evidence]
        thread = known_by(culprit).removeprefix(process).removeprefix("; ")
        if thread and culprit.tid_evidence is not None:
            yield thread, EVIDENCE[culprit.tid_evidence]


def _stacks(told: list[Side]) -> Iterator[Stack]:
    for side in told:
        if side.stack and side.culprit is not None:
            yield _stack(_heading(side.culprit), side.stack)
        if side.opening and side.culprit is not None:
            pid = side.culprit.pid
            yield _stack(f"pid {pid}, {opened_at(side.opening).removesuffix(':')}", side.opening)


def _heading(culprit: Culprit) -> str:
    doing = "opened the connection" if culprit.role is Role.OWNER else culprit.role.value
    return f"{who(culprit)} ({doing})"


def _stack(heading: str, frames: tuple[Frame, ...]) -> Stack:
    calls = [
        (
            f"#{n} {shorten(frame.function, NAME_LENGTH)} {shorten(short_path(frame), PLACE_LENGTH)}:{frame.line}",
            frame.application,
        )
        for n, frame in enumerate(frames[:_CALLS])
    ]
    where = place(frames)
    return Stack(
        shorten(heading, _SUMMARY),
        "" if where is None else shorten(where, PLACE_LENGTH),
        tuple(stack_lines(frames)),
        tuple(calls),
        max(0, len(frames) - _CALLS),
    )


def _pretty(record: dict[str, Any]) -> str:
    """A record as it stood in the file, in lines, without what is too long."""
    text = json.dumps(_brief(record), ensure_ascii=False, indent=2)
    if len(text) <= _RECORD:
        return text
    return f"{text[:_RECORD]}\n… ({len(text) - _RECORD:,} more characters: see the file)"


def _brief(value: object, depth: int = 0) -> object:
    if isinstance(value, str):
        more = len(value) - _STRING
        return value if more <= 0 else f"{value[:_STRING]}… ({more:,} more characters)"
    if depth > 12:
        return "…"
    if isinstance(value, dict):
        return {str(key)[:200]: _brief(item, depth + 1) for key, item in islice(value.items(), 500)}
    if isinstance(value, list):
        return [_brief(item, depth + 1) for item in value[:500]]
    return value
