"""Whatever comes from outside, and wherever it is shown: it stays in its place, harmless, legible and short.

Names of processes and threads, command lines, frames, what clients call themselves, SQL, and a server's words are other
people's text. It may try to move the cursor, to rename the window, to reorder what stands beside it, to fake a line of
the guard's, to be taken for markup, or to bury everything else.
"""

from __future__ import annotations

import io
import json
import logging
import re
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from pgguard.attribution.capabilities import Capability
from pgguard.attribution.evidence import Driver
from pgguard.attribution.findings import Findings, Share, Slots
from pgguard.attribution.frames import Frame
from pgguard.attribution.runtime import Language, Runtime
from pgguard.attribution.stacks import Stacks
from pgguard.attribution.threads import Waits
from pgguard.cli import doctor, main
from pgguard.faults.catalogue import Severity
from pgguard.faults.causes import Told
from pgguard.faults.docket import Count
from pgguard.faults.fault import Spread
from pgguard.faults.rejection import rejection
from pgguard.faults.sql import SqlMode
from pgguard.identity import Sender
from pgguard.proxy.addresses import TcpAddress
from pgguard.proxy.upstream import UpstreamUnavailable
from pgguard.reporting.console import print_fault, summary_line
from pgguard.reporting.jsonl import encode
from pgguard.reporting.log import BoundedLog
from pgguard.reporting.summary import summary_lines
from pgguard.session.refusals import reason_of
from pgguard.session.verdicts import AFTER_END, Kind, Limit, Refusal
from tests.faults.samples import FACTS, NOW, OUTSTANDING, OVERLAP, QUERY, fault, process, verdict, waiting

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pgguard.faults.fault import Fault

HOSTILE = {
    "escape sequences": "\x1b]0;owned\x07\x1b[2J\x9b31m\r\x08",
    "marks that reorder text": "\u202etxt.\u2066abc\u2069\u200f\u061c",
    "ten thousand characters": "x" * 10_000,
    "other lines": "one\nSUMMARY: pgguard: fake\u2028pgguard: two\u2029\x85\v\f\x1c",
    "bytes that are no UTF-8": b"caf\xe9 \xff\xfe\xc3".decode(errors="surrogateescape"),
    "markup": "[red]x[/red] [/] [link=https://example.org]y[/link] {0} %s %(name)s \\N{dash}",
    "wide characters": "\u8868" * 2000,
    "combining characters": "e" + "\u0301\u0489" * 1000,
    "nothing that can be seen": "\u200b\ufeff\u2060\x00 \u3000",
}
CONSOLES = ((30, False), (60, True), (80, False), (140, True))
"""Columns, and whether it is a terminal."""


def hostile_faults(text: str) -> Iterator[Fault]:
    """Faults of all kinds, with a text in every place that somebody else fills."""
    worker = process(4867, 4866, text, f"--option={text}", text, name=text, age=8)
    titled = process(4866, 4864, f"{text} worker", name=text, age=9)
    owner = process(4864, 1, name=text, age=20)
    seen = waiting(worker, 4880, name=text, call="ppoll")
    frames = Frame(text, text, 1), Frame(f"{text}()", f"/app/{text}.py", 2)
    known = Findings(
        opener=owner,
        opening_stack=frames,
        holders=(owner, titled, worker),
        senders={4866: titled, 4867: worker},
        driver=Driver.LIBPQ,
        waits=Waits((seen,)),
        stacks=Stacks({seen.sleep: frames}),
        runtimes={4867: Runtime(Language.PYTHON)},
    )
    facts = replace(FACTS, user=text, database=text, application_name=text)
    comments = f"/* {text} */ /*controller='{text}',action='x'*/ -- {text}"
    sql = f'SELECT "{text}" {comments}'.encode(errors="surrogateescape")
    request = replace(OUTSTANDING, sql=sql)
    refused = Refusal(Limit.ROLE, text)
    # A statement is shown in the same way, whatever the fault is.
    yield fault(replace(OVERLAP, requests=(request,)), known, facts=facts, sql_mode=SqlMode.NORMALIZED)
    for what, findings in (
        *((replace(OVERLAP, kind=kind, requests=(request,), reason=f'because of "{text}"'), known) for kind in Kind),
        (replace(OVERLAP, requests=(request,), libpq=text), known),
        (replace(OVERLAP, reason=AFTER_END, requests=(request,)), known),
        (verdict(Kind.REQUEST_WHILE_BUSY, "x", message=QUERY, requests=(request,)), Findings(declared={text: text})),
        (
            verdict(Kind.CONNECTION_EXHAUSTION, reason_of(refused, text), refusal=refused),
            replace(known, shares=(Share(worker, 3), Share(titled, 2), Share(None, 1)), slots=Slots(6, 6, 0)),
        ),
        (verdict(Kind.CONNECTION_EXHAUSTION, reason_of(Refusal(None), text), refusal=Refusal(None)), known),
        (replace(verdict(Kind.INHERITED_CONNECTION), settled=True), known),
        (verdict(Kind.LEAKED_CONNECTION, "outlived the process that opened it"), replace(known, holders=(worker,))),
        (replace(OVERLAP, requesters=tuple(Sender(4866 - n) for n in range(20))), known),
    ):
        yield fault(what, findings, facts=facts, sql_mode=SqlMode.FULL)


def is_harmless(text: str) -> bool:
    """One line, of what can be seen and stays where it is put, and can be written."""
    return text.isprintable() and text.encode().decode() == text


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_whatever_comes_from_outside_is_harmless_wherever_it_is_shown(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for what in hostile_faults(text):
        for width, terminal in CONSOLES:
            _look_at_the_console(what, width, terminal=terminal)
        for field in rejection(what):
            assert is_harmless(field)
            assert len(field) < 2_500
        for told in (what.summary, what.reason, summary_line(what)):
            assert is_harmless(told)
            assert len(told) <= 1200
        last = summary_lines(
            3, [Count(what.kind, what.severity, what.action, 1, 1)], [Told(what, Spread(2, 1, 1, NOW))]
        )
        assert all(is_harmless(told) and len(told) < 1_200 for told in last)
        line = encode(what)
        assert line.count(b"\n") == 1
        assert is_harmless(line.decode().removesuffix("\n"))
        json.loads(line)
    _look_at_the_log(text)
    _look_at_doctor(text, capsys)
    _look_at_an_error(text, capsys)
    _look_at_what_a_client_is_told(text)


def _look_at_the_console(what: Fault, width: int, *, terminal: bool) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, legacy_windows=False)
    print_fault(console, what)
    assert isinstance(console.file, io.StringIO)
    shown = re.sub(r"\x1b\[[\d;]*m", "", console.file.getvalue()) if terminal else console.file.getvalue()
    lines = shown.removesuffix("\n").split("\n")
    assert all(map(is_harmless, lines))
    assert [line for line in lines if line.startswith("SUMMARY:")] == [summary_line(what)] == lines[-1:]
    assert not [line for line in lines[1:] if line.startswith("pgguard:") and f": {what.kind}:" not in line]
    assert len(shown) < 60_000
    if "[red]" in str(what.session.user) and what.severity is not Severity.INFO:
        assert "[red]x[/red]" in "".join(shown.split())


def _look_at_the_log(text: str) -> None:
    said: list[str] = []
    log = BoundedLog(said.append)
    error = UpstreamUnavailable([(TcpAddress(text, 5432), ConnectionRefusedError(text))])
    for exception in (None, error):
        record = logging.LogRecord("pgguard", logging.ERROR, "", 0, "%s: %s", (text, error), None)
        if exception is not None:
            try:
                raise exception
            except OSError as raised:
                record.exc_info = (type(raised), raised, raised.__traceback__)
        log.emit(record)
    log.close()
    for entry in said:
        first, *others = entry.split("\n")
        assert first.startswith("pgguard: ")
        assert all(line.startswith("  ") for line in others), "none passes for another one"
        assert all(map(is_harmless, (first, *others)))


def _look_at_doctor(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    problem = f"2 can't be looked at: 7 ({text})"
    broken = Capability("x", "y", essential=False, unix_instead=True, problem=problem, remedy=f"remove {text}")
    doctor._print([broken])
    shown = capsys.readouterr().out
    assert all(map(is_harmless, shown.split("\n")))
    assert not [line for line in shown.split("\n") if line.startswith("SUMMARY:")]


def _look_at_an_error(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    main._complain(f"--listen {text}: write HOST:PORT")
    shown = capsys.readouterr().err
    assert shown.startswith("pgguard: --listen ")
    assert is_harmless(shown.removesuffix("\n"))


def _look_at_what_a_client_is_told(text: str) -> None:
    """Of several servers one has said why it turns everybody away."""
    failures = [(TcpAddress("db", 5432), ConnectionRefusedError(text)), (TcpAddress(text[:63], 5432), OSError(text))]
    told = str(UpstreamUnavailable(failures))
    assert is_harmless(told)
    assert len(told) < 1_200


def test_a_text_that_is_harmless_is_shown_as_it_is() -> None:
    name = "Zoë's café — 東京 שלום"
    what = fault(facts=replace(FACTS, application_name=name))
    console = Console(file=io.StringIO(), width=140)
    print_fault(console, what)
    assert isinstance(console.file, io.StringIO)
    assert f'application_name "{name}"' in console.file.getvalue()
    assert json.loads(encode(what))["session"]["application_name"] == name
