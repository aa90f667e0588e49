"""Annotations for GitHub: one a cause, in the line of the application, no more than are shown, and no other command."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from pgguard.attribution.frames import Frame
from pgguard.faults.catalogue import Severity
from pgguard.reporting.github import EACH, harmless, to_github
from pgguard.reporting.places import Sources
from pgguard.session.verdicts import Kind
from tests.faults.samples import fault, process, verdict
from tests.reporting.gathered import LIBRARYS, MAIN, causes, recorded, seen

APP = Sources("/srv/app")
COMMAND = re.compile(r"::(\w+) (.*?)::(.*)")


def annotated(text: str) -> list[tuple[str, dict[str, str], str]]:
    """What the runner makes of what a step prints: ``ActionCommand.TryParseV2()`` in its ``Runner.Common``."""
    found = []
    for line in text.splitlines():
        match = COMMAND.fullmatch(line.lstrip())
        if match is None:
            continue
        pairs = [pair.split("=", 1) for pair in match[2].split(",")]
        properties = {name: _unescaped(_unescaped(value, ":3A", ",2C")) for name, value in pairs}
        found.append((match[1], properties, _unescaped(match[3])))
    return found


def _unescaped(text: str, *more: str) -> str:
    for character, number in [(one[0], one[1:]) for one in more] or [("\r", "0D"), ("\n", "0A"), ("%", "25")]:
        text = text.replace(f"%{number}", character)
    return text


def test_a_cause_is_annotated_in_the_line_where_it_was_seen() -> None:
    made = to_github(recorded(seen()), APP)
    [(command, properties, told)] = annotated(made.text)
    title = "shared-by-processes: two processes use one connection"
    assert (command, properties) == ("error", {"file": "src/app.py", "line": "36", "title": title})
    first, how_far, intruder, *_, advice = told.split("\n")
    assert first == fault().summary
    assert how_far == "It came once, 2 processes involved."
    assert intruder.startswith("Intruder: pid 4867 (puma: cluster worker 1), thread 4880: the kernel named it")
    assert advice.startswith("What to change: Close the pool before forking. ")
    assert made.left_out == 0


def test_a_file_outside_of_the_workspace_is_not_named_but_the_other_side_may_be() -> None:
    [(_, properties, _)] = annotated(to_github(recorded(seen()), Sources("/elsewhere")).text)
    assert properties.keys() == {"title"}
    outside = Frame("work", "/opt/plugin.py", 3, application=True)
    [(_, properties, _)] = annotated(to_github(recorded(seen((outside,), opening=(LIBRARYS, MAIN))), APP).text)
    assert (properties["file"], properties["line"]) == ("src/app.py", "58")


@pytest.mark.parametrize(
    ("severity", "command"), [(Severity.ERROR, "error"), (Severity.WARNING, "warning"), (Severity.INFO, "notice")]
)
def test_the_severity_decides_on_the_level(severity: Severity, command: str) -> None:
    assert annotated(to_github(recorded(fault(severity=severity)), APP).text)[0][0] == command


def test_no_more_are_made_than_a_step_shows_of_each_level() -> None:
    warning = fault(verdict(Kind.IDLE_IN_TRANSACTION))
    many = [*causes(EACH + 3), *(replace(one, cause=99 + one.id) for one in causes(EACH + 2, warning))]
    made = to_github(recorded(*many), APP)
    assert [command for command, *_ in annotated(made.text)] == ["error"] * EACH + ["warning"] * EACH
    assert made.left_out == 5


HOSTILE = (
    "a\n::stop-commands::x",
    "\r\n::set-output name=x::y",
    "%0A::error::x",
    "x::warning file=/etc/passwd::y",
    "a,line=7,file=b:c",
    "##[set-env name=PATH]x",
    "\x1b[2J\u202e\u2028::debug::x",
)


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_whatever_others_say_it_is_no_command(text: str) -> None:
    frame = Frame(text, f"/srv/app/{text}.py", 3, application=True)
    worker = process(4867, 4864, text)
    what = seen((frame,), of=replace(fault(), summary=f"{text} sent"))
    what = replace(what, culprits=tuple(replace(one, process=worker) for one in what.culprits))
    printed = to_github(recorded(what), APP).text
    assert printed.count("\n") == 1
    [(command, properties, told)] = annotated(printed)
    assert command == "error"
    assert properties.keys() <= {"file", "line", "title"}
    assert properties["line"] == "3"
    assert told.split("\n")[1] == "It came once, 2 processes involved."


def test_no_line_of_the_log_is_a_command() -> None:
    assert harmless("pgguard: ##[stop-commands]x ##[") == "pgguard: ## [stop-commands]x ## ["
