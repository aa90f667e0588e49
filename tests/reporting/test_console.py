"""The report on the terminal: complete, safe to look at, greppable, and never in a session's way."""

from __future__ import annotations

import errno
import io
import os
import re
import select
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from pgguard.attribution.evidence import Driver, Evidence
from pgguard.attribution.findings import Findings, Share
from pgguard.attribution.frames import Frame
from pgguard.attribution.runtime import Language, Runtime
from pgguard.attribution.stacks import Stacks
from pgguard.attribution.threads import Waits
from pgguard.faults.catalogue import Severity
from pgguard.faults.causes import CAUSES
from pgguard.faults.fault import OUTLINED, Spread
from pgguard.faults.policy import Action
from pgguard.faults.sql import SqlMode
from pgguard.identity import Sender
from pgguard.reporting.console import BACKLOG, ConsoleSink, Given, print_fault, render, summary_line
from pgguard.session.verdicts import Kind, Party, RequestState
from tests.faults.samples import (
    DATA_ROW,
    FACTS,
    KERNEL,
    MASTER,
    NOW,
    OUTSTANDING,
    OVERLAP,
    QUERY,
    TERMINATE,
    WORKER_0,
    WORKER_1,
    asleep,
    fault,
    process,
    verdict,
    waiting,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from rich.console import RenderableType

    from pgguard.faults.fault import Fault
    from pgguard.session.verdicts import Verdict

SUMMARY = (
    "SUMMARY: pgguard: shared-by-processes: pid 4867 (puma: cluster worker 1) sent Query while the answer to pid 4866"
    " was outstanding (fault 7, session 3)"
)
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


def printed(what: Fault, *, width: int = 120, terminal: bool = False, given: Given | None = None) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, legacy_windows=False)
    print_fault(console, what, given)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


REPORT = f"""\
{"=" * 100}
pgguard: ERROR: shared-by-processes: two processes use one connection
  pid 4867 (puma: cluster worker 1) sent Query while the answer to pid 4866 was outstanding
  (2026-11-22T11:52:07.120402Z; logged only)

  Who:
    Intruder: pid 4867 (puma: cluster worker 1), thread 4880: the kernel named it as the sender
      sent Query, 61 bytes, at 11:52:07.120402
      command: puma: cluster worker 1: 4864 [app]
    Used by: pid 4866 (puma: cluster worker 0), thread 4871: the kernel named it as the sender
      its request 41, sent at 11:52:07.119402, was being answered
      command: puma: cluster worker 0: 4864 [app]
    Opened by: pid 4864 (puma 6.4.2 (tcp://0.0.0.0:9292) [app]): it was the only process with the
    socket open then
      still has the connection open

  Session 3:
    user app, database app, application_name "puma", over TCP from 127.0.0.1:53984, backend pid
    4865, opened 2026-11-22T11:51:54.620402Z

  How the socket came to be shared:
    pid 4864 (puma 6.4.2 (tcp://0.0.0.0:9292) [app]), child of 1: started at 11:51:47.120402, opened
    the connection at 11:51:54.620402, has it open
    ├── pid 4866 (puma: cluster worker 0): inherited the socket at 11:51:58.120402
    └── pid 4867 (puma: cluster worker 1): inherited the socket at 11:51:59.120402

  Recent requests:
    #41  11:52:07.119402  pid 4866, thread 4871  Q  answering  SELECT $1 AS pid

  What to look for in the logs of clients that use libpq:
    message type 0x54 arrived from server while idle

  What to change:
    Close the pool before forking. In before_fork.
    See https://www.postgresql.org/docs/current/libpq-connect.html

{SUMMARY}"""


def test_a_report_shows_both_sides_and_how_the_socket_came_to_be_shared() -> None:
    brief = fault(advice=fault().advice._replace(text="In before_fork."))
    assert printed(brief, width=100) == REPORT


@pytest.mark.parametrize(
    ("what", "action", "says"),
    [
        (verdict(Kind.SHARED_BY_PROCESSES), Action.LOGGED, "logged only"),
        (verdict(Kind.FOREIGN_TERMINATE, message=TERMINATE), Action.LOGGED, "logged only; the session has ended"),
        (verdict(Kind.FOREIGN_TERMINATE, message=TERMINATE), Action.DROPPED, "message dropped"),
        (verdict(Kind.FOREIGN_TERMINATE, message=TERMINATE), Action.REJECTED, "session rejected"),
        (replace(verdict(Kind.UNCLEAN_CLOSE), ends=True), Action.LOGGED, "logged only; the session has ended"),
        (
            replace(verdict(Kind.PROTOCOL_VIOLATION, message=DATA_ROW), by=Party.SERVER, ends=True),
            Action.LOGGED,
            "logged only; the session has ended",
        ),
        (
            replace(verdict(Kind.PROTOCOL_VIOLATION, message=DATA_ROW), by=Party.SERVER),
            Action.LOGGED,
            "logged only",
        ),
    ],
)
def test_a_session_that_has_ended_does_not_go_on(what: Verdict, action: Action, says: str) -> None:
    assert f"; {says})" in printed(fault(what, action=action), width=400)


def test_what_the_opener_sent_stands_beside_the_opener() -> None:
    """Its message has shown the sharing, and the intruder is the one that used the connection before."""
    swapped = replace(OVERLAP, intruder=Sender(4866, 4871), requesters=(Sender(4864, 4864),), sender=Sender(4864, 4864))
    lines = [line.strip() for line in printed(fault(swapped), width=400).splitlines()]
    intruder = next(n for n, line in enumerate(lines) if line.startswith("Intruder: pid 4866"))
    opener = next(n for n, line in enumerate(lines) if line.startswith("Used by: pid 4864"))
    assert lines[intruder + 1].startswith("its request 41, sent at")
    assert lines[opener + 1].startswith("sent Query, 61 bytes, at")
    assert lines[opener + 2].startswith("opened the connection: ")


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (RequestState.WAITING, "was waiting for its answer"),
        (RequestState.ANSWERED, "was answered"),
        (RequestState.FAILED, "was answered with an error"),
        (RequestState.SKIPPED, "was skipped"),
    ],
)
def test_what_has_become_of_an_intruders_request_is_a_sentence(state: RequestState, says: str) -> None:
    request = replace(OUTSTANDING, state=state)
    swapped = replace(OVERLAP, requests=(request,), intruder=Sender(4866, 4871), requesters=(), sender=Sender(4864))
    assert f"its request 41, sent at 11:52:07.119402, {says}\n" in printed(fault(swapped), width=400)


def test_culprits_that_a_record_leaves_out_are_counted() -> None:
    assert "And 12 more processes\n" in printed(fault(unnamed=12))


def test_a_process_in_two_roles_is_told_of_once() -> None:
    own = replace(OVERLAP, intruder=Sender(4867, 4880), requesters=(Sender(4864, 4871),))
    lines = printed(fault(own, replace(KERNEL, connected=(4864, 4864))), width=400).splitlines()
    [start] = [n for n, line in enumerate(lines) if line.startswith("    Used by: pid 4864 ")]
    assert lines[start + 1].strip() == "opened the connection in thread 4864: the kernel named it when it connected"
    assert not [line for line in lines if line.startswith(("    Opened by:", "    Also open in: pid 4864"))]


def test_a_request_is_told_of_the_thread_that_sent_it() -> None:
    """The other thread of the same process has sent another one, or it isn't known which has."""
    other = replace(OUTSTANDING, n=42, sender=Sender(4866, 4872))
    unknown = replace(OUTSTANDING, n=43, sender=Sender(4866))
    threads = replace(
        OVERLAP,
        kind=Kind.SHARED_BY_THREADS,
        requests=(OUTSTANDING, other, unknown),
        intruder=Sender(4866, 4872),
        requesters=(Sender(4866, 4871),),
    )
    text = printed(fault(threads), width=400)
    assert re.findall(r"its request (\d+),", text) == ["41"]
    alone = replace(threads, kind=Kind.REQUEST_WHILE_BUSY, intruder=Sender(4866, 4871), requesters=(), sender=None)
    assert "thread 4871" in printed(fault(alone))
    one = replace(OVERLAP, requests=(unknown,))
    assert re.findall(r"its request (\d+),", printed(fault(one), width=400)) == ["43"], "there is no other thread"


def test_who_misuses_its_own_connection_is_no_intruder() -> None:
    busy = replace(OVERLAP, kind=Kind.REQUEST_WHILE_BUSY, intruder=Sender(4866, 4871), requesters=())
    text = printed(fault(busy))
    assert "Sent by: pid 4866" in text
    assert "Intruder" not in text


def test_the_servers_words_are_not_said_to_be_libpqs() -> None:
    """Every driver passes them on."""
    error = 'prepared statement "s" does not exist'
    text = printed(fault(verdict(Kind.SESSION_STATE_LOST, libpq=error), replace(KERNEL, driver=Driver.ASYNCPG)))
    assert f"What to look for in your logs:\n    {error}\n" in text
    assert "libpq" not in text.partition("What to change")[0]


def test_a_child_that_is_older_than_the_connection_has_not_inherited_it() -> None:
    handed = process(4870, 4864, "python", "worker.py", age=15)
    text = printed(fault(verdict(Kind.INHERITED_CONNECTION), replace(KERNEL, holders=(MASTER, handed))), width=400)
    assert "pid 4870 (python worker.py): started at 11:51:52.120402, has it open" in text


LONG_SQL = b"SELECT alpha, beta FROM orders JOIN customers USING (customer_id) WHERE placed_at > now() AND total > 10"
EVERYTHING = (
    fault(
        replace(
            OVERLAP,
            requests=tuple(
                replace(OUTSTANDING, n=n, messages="PBDES", sql=LONG_SQL, sender=Sender(4_194_300 + n, 4_194_200 + n))
                for n in range(8, 12)
            ),
            intruder=Sender(4867, 4880),
        ),
        replace(
            KERNEL,
            holders=(MASTER, WORKER_0, WORKER_1, process(4868, 4867, "python3", "app.py", age=3)),
            waits=Waits((waiting(WORKER_1, 4880, name="puma srv tp 002", call="ppoll"),)),
            stacks=Stacks(problems={4867: "py-spy is not installed"}),
            runtimes={4867: Runtime(Language.PYTHON)},
        ),
    ),
    fault(
        verdict(Kind.CONNECTION_EXHAUSTION),
        replace(KERNEL, shares=(Share(WORKER_0, 90, idle=40, idle_in_transaction=7), Share(None, 2))),
    ),
)


@pytest.mark.parametrize("what", EVERYTHING, ids=lambda what: str(what.kind))
def test_at_every_width_everything_is_there_in_order(what: Fault) -> None:
    """What has no room beside something else stands below it: no pid, no thread, no word of SQL is cut."""
    shown = printed(what, width=200)
    assert "#8  11:52:07.119402  pid 4194308, thread 4194208  PBDES  answering  SELECT alpha," in shown or what.shares
    # Where there is no room for a tree it is said whose child each process is.
    child = re.compile(r",\s+child\s+of\s+\d+")
    shown = child.sub("", shown)
    everything = re.sub(r"[\s,=├└│─]+", "", shown)
    for width in range(20, 200):
        text = child.sub("", printed(what, width=width))
        assert re.sub(r"[\s,=├└│─]+", "", text) == everything, width
        words = re.findall(r"\w+", text)
        assert [word for word in words if word.isdigit()] == re.findall(r"\b\d+\b", shown), width


@pytest.mark.parametrize("width", [20, 40, 80, 120, 400])
@pytest.mark.parametrize("terminal", [False, True])
def test_the_summary_is_one_plain_line_at_any_width(width: int, terminal: bool) -> None:
    assert printed(fault(), width=width, terminal=terminal).splitlines()[-1] == SUMMARY


@pytest.mark.parametrize("width", [40, 80, 120])
def test_nothing_is_cut_off_at_the_margin(width: int) -> None:
    text = printed(fault(), width=width)
    assert all(len(line) <= width for line in text.splitlines()[:-1] if not line.startswith("    See http"))
    assert [f"    See {source}" for source in fault().advice.sources] == re.findall("^ *See http.*", text, re.MULTILINE)
    advice = fault().advice.text
    assert "".join(advice.split()) in "".join(text.split())


@pytest.mark.parametrize(
    ("spread", "says"),
    [
        (Spread(311, 37, 4, NOW), "36 more sessions, 4 processes; 311 times since 11:52:07"),
        (Spread(2, 2, 2, NOW), "1 more session, 2 processes; 2 times since 11:52:07"),
        (Spread(43, 1, 2, NOW), "2 processes; 43 times since 11:52:07"),
        (Spread(43, 1, 1, NOW), "43 times since 11:52:07"),
    ],
)
def test_a_repeat_is_one_line_that_says_how_far_it_has_spread(spread: Spread, says: str) -> None:
    again = fault(id=9, repeat_of=7, suppressed=12, spread=spread)
    assert printed(again) == f"SUMMARY: pgguard: shared-by-processes: fault 7 again: {says} (fault 9, session 3)"


def test_colour_is_for_terminals() -> None:
    assert CONTROL.search(printed(fault())) is None
    assert "\x1b[" in printed(fault(), terminal=True)


def test_no_escape_sequence_of_a_process_or_of_its_sql_reaches_the_terminal() -> None:
    """A command line or a comment in SQL could clear the screen, rename the window, or fake a report."""
    evil = "\x1b]0;owned\x07\x1b[2J\r\u202e\x9b[red]x[/red]\nSUMMARY: pgguard: fake"
    worker = process(4867, 4864, evil, name=evil)
    request = replace(OUTSTANDING, sql=f'SELECT "{evil}"'.encode(), messages=evil)
    what = replace(OVERLAP, requests=(request,), libpq=evil, reason=evil)
    findings = replace(KERNEL, opener=worker, holders=(worker,), senders={4866: worker, 4867: worker})
    facts = replace(fault().session, user=evil, database=evil, application_name=evil, client=evil)
    for mode in (SqlMode.FULL, SqlMode.NORMALIZED):
        text = printed(fault(what, findings, facts=facts, sql_mode=mode))
        assert CONTROL.search(text) is None
        assert "\u202e" not in text
        # Nor is rich's markup interpreted.
        assert "[red]x[/red]" in text.replace("\n    ", "")
        assert [line for line in text.splitlines() if line.startswith("SUMMARY:")] == [text.splitlines()[-1]]


def test_what_is_not_known_is_said_to_be_unknown() -> None:
    busy = verdict(Kind.REQUEST_WHILE_BUSY, message=OVERLAP.message, requests=(replace(OUTSTANDING, sender=None),))
    facts = replace(fault().session, user=None, transport="unix", client=None, application_name=None, tls=True)
    text = printed(fault(busy, Findings(), facts=facts))
    assert "Sent by: a process that could not be identified" in text
    assert "unknown user, database app, over a Unix socket with TLS, backend pid 4865" in text
    assert "How the socket came" not in text
    text = printed(fault(verdict(Kind.UNCLEAN_CLOSE), Findings()))
    assert "Nobody could be identified: the kernel named no sender" in text
    assert "Recent requests" not in text
    assert "libpq" not in text


def test_a_process_of_other_parents_is_not_said_to_have_got_the_socket_by_a_fork() -> None:
    stranger = process(7, 1, "nc", "-U", name="nc")
    text = printed(fault(verdict(Kind.INHERITED_CONNECTION), replace(KERNEL, holders=(stranger,))))
    assert "pid 7 (nc), child of 1: started at 11:51:58.120402, has it open" in text


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("evidence", Evidence)
@pytest.mark.parametrize("action", Action)
def test_everything_can_be_printed(kind: Kind, evidence: Evidence, action: Action) -> None:
    findings = replace(KERNEL, opener_evidence=evidence)
    text = printed(fault(verdict(kind, message=DATA_ROW), findings, action=action))
    assert f": {kind}: " in text


WAITING = waiting(WORKER_1, 4880, name="puma srv tp 002", call="ppoll")
BY_WORKER_1 = replace(OVERLAP, intruder=Sender(4867))


def test_a_thread_is_shown_with_its_name_its_call_and_the_innermost_of_its_frames() -> None:
    frames = tuple(Frame(f"function_{n}", "/app/models.py", n) for n in range(20))
    findings = replace(
        KERNEL,
        waits=Waits((WAITING,)),
        stacks=Stacks({WAITING.sleep: frames}),
        runtimes={4867: Runtime(Language.PYTHON)},
    )
    text = printed(fault(BY_WORKER_1, findings))
    assert (
        'Intruder: pid 4867 (puma: cluster worker 1), thread 4880 "puma srv tp 002": the kernel named it as the sender;'
        " the thread was seen waiting on the socket"
    ) in " ".join(text.split())
    assert "      blocked in ppoll, waiting for this connection\n" in text
    assert "        #0 function_0 /app/models.py:0\n        #1 function_1 /app/models.py:1\n" in text
    assert "#7 function_7" in text
    assert "#8" not in text
    assert "no stack" not in text


SITE = "/venv/lib/python3.12/site-packages"
DJANGO = (
    Frame("wait", f"{SITE}/psycopg/waiting.py", 99),
    Frame("Cursor.execute", f"{SITE}/psycopg/cursor.py", 97),
    *(Frame(f"compile_{n}", f"{SITE}/django/db/models/sql/compiler.py", n) for n in range(9)),
    Frame("QuerySet.get", f"{SITE}/django/db/models/query.py", 646),
    Frame("load_user", "/srv/shop/users.py", 23, application=True),
    Frame("profile", "/srv/shop/views.py", 7, application=True),
    *(Frame(f"respond_{n}", f"{SITE}/django/core/handlers/base.py", n) for n in range(9)),
)
STACKED = replace(KERNEL, waits=Waits((WAITING,)), stacks=Stacks({WAITING.sleep: DJANGO}))


def test_of_a_deep_stack_the_applications_own_calls_are_shown_and_marked() -> None:
    text = printed(fault(BY_WORKER_1, STACKED))
    expected = """
        #0 wait psycopg/waiting.py:99
        #1 Cursor.execute psycopg/cursor.py:97
        … 9 calls in libraries
        #11 QuerySet.get django/db/models/query.py:646
      > #12 load_user /srv/shop/users.py:23
      > #13 profile /srv/shop/views.py:7
"""
    assert expected in text
    assert "respond" not in text


def test_the_place_in_the_application_stands_in_the_summary() -> None:
    one = fault(BY_WORKER_1, STACKED)
    assert "; seen at users.py:23 in load_user (fault 7, session 3)" in summary_line(one)
    assert "; seen at users.py:23 in load_user" in " ".join(printed(one).split())


@pytest.mark.parametrize("owner_is_intruder", [True, False])
def test_where_the_connection_was_opened_is_told_of_the_opener(owner_is_intruder: bool) -> None:
    opening = (
        Frame("connect", f"{SITE}/psycopg/connection.py", 117),
        Frame("pool", "/srv/shop/db.py", 11, application=True),
        Frame("<module>", "/srv/shop/wsgi.py", 3, application=True),
    )
    what = replace(OVERLAP, intruder=Sender(4864)) if owner_is_intruder else OVERLAP
    text = printed(fault(what, replace(KERNEL, senders={4864: MASTER, **KERNEL.senders}, opening_stack=opening)))
    expected = """
      opened at db.py:11 in pool:
        #0 connect psycopg/connection.py:117
      > #1 pool /srv/shop/db.py:11
      > #2 <module> /srv/shop/wsgi.py:3
"""
    assert text.count(expected) == 1
    assert text.index("pid 4864") < text.index(expected)


def test_where_it_was_opened_is_shown_too_if_no_call_is_the_applications() -> None:
    opening = (Frame("connect", f"{SITE}/psycopg/connection.py", 117),)
    text = printed(fault(OVERLAP, replace(KERNEL, opening_stack=opening)))
    assert "      opened at:\n        #0 connect psycopg/connection.py:117\n" in text


@pytest.mark.parametrize("width", [40, 60, 80, 140])
def test_a_stack_is_whole_whatever_the_width(width: int) -> None:
    text = "".join(printed(fault(BY_WORKER_1, replace(STACKED, opening_stack=DJANGO)), width=width).split())
    assert text.count(">#12load_user/srv/shop/users.py:23") == 2
    assert text.count("#11QuerySet.getdjango/db/models/query.py:646") == 2


def test_why_there_is_no_stack_is_shown() -> None:
    findings = replace(
        KERNEL,
        waits=Waits((WAITING,)),
        stacks=Stacks(problems={4867: "py-spy is not installed"}),
        runtimes={4867: Runtime(Language.PYTHON)},
    )
    assert "no stack: py-spy is not installed" in printed(fault(BY_WORKER_1, findings))


def test_the_thread_of_a_process_that_has_no_other_goes_without_saying() -> None:
    findings = replace(KERNEL, only_threads={4867: asleep(WORKER_1)})
    text = printed(fault(BY_WORKER_1, findings))
    assert "Intruder: pid 4867 (puma: cluster worker 1): the kernel named it as the sender" in text
    assert "thread 4867" not in text


def test_code_of_an_advice_is_shown_as_it_is_to_be_pasted_with_its_sources() -> None:
    code = "# config/puma.rb\nbefore_fork do\n  " + "x" * 150 + "\nend\n"
    advice = fault().advice._replace(code=code, sources=("https://example.org/one", "https://example.org/two"))
    text = printed(fault(advice=advice), width=100)
    for line in code.splitlines():
        assert f"\n      {line}\n" in text, "neither wrapped nor cropped"
    assert "See https://example.org/one\n    See https://example.org/two\n" in text


def test_advice_that_has_been_printed_lately_is_not_printed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """One fork shows itself in many ways, and what to do about it is the same."""
    first = fault()
    first = replace(first, advice=first.advice._replace(title="Do so", text="As follows. At once.", code="reconnect()"))
    given = Given()
    assert printed(first, given=given) == printed(first)
    second = replace(first, id=8, kind=Kind.FOREIGN_TERMINATE)
    assert "What to change:\n    Do so: see fault 7.\n\nSUMMARY" in printed(second, given=given)
    more = replace(first, id=9, advice=first.advice._replace(text="As follows. At once. Then leave."))
    assert "What to change:\n    Do so: see fault 7. Then leave.\n\nSUMMARY" in printed(more, given=given)
    advice = first.advice
    others = (
        advice._replace(text="It is another matter."),
        advice._replace(code="retry()"),
        advice._replace(title="No"),
    )
    for n, other in enumerate(others, start=11):
        what = replace(first, id=n, advice=other)
        assert printed(what, given=given) == printed(what)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 3600)
    assert printed(second, given=given) == printed(second), "the first one has long scrolled away"


def test_information_gives_no_advice() -> None:
    given = Given()
    printed(fault(severity=Severity.INFO), given=given)
    assert given.find(fault().advice) is None


def test_of_many_requests_the_latest_are_told_and_those_still_to_be_answered() -> None:
    answered = replace(fault().requests[0], state=RequestState.ANSWERED)
    waiting = replace(answered, n=3, state=RequestState.WAITING)
    requests = tuple(waiting if n == 3 else replace(answered, n=n) for n in range(1, 12))
    shown = printed(fault(requests=requests)).partition("Recent requests:")[2]
    assert re.findall(r"^    +#(\d+)", shown, re.MULTILINE) == ["3", "7", "8", "9", "10", "11"]


def test_a_narrow_terminal_says_whose_child_a_process_is() -> None:
    assert "child of 4864" not in printed(fault(), width=100)
    assert "child of 4864: inherited the socket at" in " ".join(printed(fault(), width=50).split())


def test_a_command_that_the_process_is_called_by_is_not_told_twice() -> None:
    worker = process(4867, 4864, "gunicorn: worker [app]")
    shown = printed(fault(findings=replace(KERNEL, senders={4866: WORKER_0, 4867: worker})))
    assert "Intruder: pid 4867 (gunicorn: worker [app])" in shown
    assert "command: gunicorn: worker [app]" not in shown
    assert "command: puma: cluster worker 0: 4864 [app]" in shown


def test_who_has_how_many_connections_is_shown() -> None:
    full = verdict(Kind.CONNECTION_EXHAUSTION)
    text = printed(fault(full, replace(KERNEL, shares=(Share(WORKER_0, 90), Share(None, 2)))))
    table = "Connections through this guard that count toward the limit:\n    90  pid 4866 (puma: cluster worker 0)\n"
    assert table in text
    assert "     2  clients that could not be identified\n" in text
    many = printed(fault(full, replace(KERNEL, shares=tuple(Share(WORKER_0, n) for n in range(30, 0, -1)))))
    assert "    15  pid 4866 (puma: cluster worker 0)\n    105  14 other processes\n" in many
    assert "Connections through" not in printed(fault(full, replace(KERNEL, shares=())))


def test_a_pid_in_a_container_is_shown_too() -> None:
    inside = replace(WORKER_1, namespace_pid=17)
    text = printed(fault(OVERLAP, replace(KERNEL, senders={4867: inside})))
    assert "in its own container it is pid 17" in text


def test_a_client_known_by_its_own_account_is_shown_with_it() -> None:
    text = printed(fault(verdict(Kind.IDLE_IN_TRANSACTION), Findings(declared={"controller": "users\x1b[2J"})))
    shown = "Opened by: a client whose process can't be seen from here. It says about itself:\n      controller: users"
    assert f"{shown}\\x1b[2J\n" in text


# The sink


class Pipe:
    """A pipe whose reading end can be drained until what is awaited has come."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        self.received = ""

    def read_until(self, end: str) -> str:
        while end not in self.received:
            self.received += os.read(self.reader, 1 << 20).decode()
        return self.received

    def read_all(self) -> None:
        while data := os.read(self.reader, 1 << 20):
            self.received += data.decode()

    def close_reader(self) -> None:
        os.close(self.reader)
        self.reader = -1

    def close_writer(self) -> None:
        os.close(self.writer)
        self.writer = -1

    def close(self) -> None:
        for fd in (self.reader, self.writer):
            if fd != -1:
                os.close(fd)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


def test_reports_are_printed_as_faults_happen(pipe: Pipe) -> None:
    sink = ConsoleSink(pipe.writer)
    sink.record(fault())
    text = pipe.read_until(SUMMARY + "\n")
    assert "Close the pool before forking" in text
    assert re.search(" $", text, re.MULTILINE) is None
    sink.close()


def test_a_report_that_can_not_be_printed_is_outlined_and_the_next_ones_are_printed(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fussy(what: Fault, given: Given | None = None) -> RenderableType:
        if what.culprits:
            raise KeyError("secret")
        return render(what, given)

    monkeypatch.setattr("pgguard.reporting.console.render", fussy)
    sink = ConsoleSink(pipe.writer)
    sink.record(fault(id=1))
    sink.record(replace(fault(id=2), culprits=()))
    text = pipe.read_until("(fault 2, session 3)\n")
    sink.close()
    assert "pgguard: a report can't be printed in full: KeyError\n" in text
    assert "secret" not in text
    assert [line for line in text.splitlines() if line.startswith("SUMMARY: ")] == [
        f"SUMMARY: pgguard: shared-by-processes: {OUTLINED} (fault 1, session 3)",
        SUMMARY.replace("fault 7", "fault 2"),
    ]


def test_a_pipe_that_nobody_reads_holds_up_nothing_and_what_was_left_out_is_said(pipe: Pipe) -> None:
    sink = ConsoleSink(pipe.writer)
    begun = time.monotonic()
    # 64 KiB fill the pipe, the backlog fills up behind it.
    for n in range(BACKLOG * 2):
        sink.record(fault(id=n))
    sink.close(deadline=0.1)
    assert time.monotonic() - begun < 5
    # Somebody begins to read, and gets the backlog.
    reader = threading.Thread(target=pipe.read_all)
    reader.start()
    sink.close(deadline=60)
    pipe.close_writer()
    reader.join()
    left_out = re.findall(r"^pgguard: (\d+) reports? left out", pipe.received, re.MULTILINE)
    assert left_out
    assert pipe.received.count("SUMMARY: ") + sum(map(int, left_out)) == BACKLOG * 2


def test_close_waits_for_what_is_left(pipe: Pipe) -> None:
    sink = ConsoleSink(pipe.writer)
    for n in range(5):
        sink.record(fault(id=n))
    sink.close()
    assert os.read(pipe.reader, 1 << 20).count(b"SUMMARY: ") == 5


INHERITED = fault(verdict(Kind.INHERITED_CONNECTION, "on a connection", message=QUERY), id=5, cause=5)


def test_what_is_but_the_beginning_of_something_graver_is_told_in_that() -> None:
    """A child uses the connection that it has inherited, and a moment later its parent does."""
    for graver in (fault(cause=1), fault(cause=1, session=replace(FACTS, id=9))):
        pipe = Pipe()
        sink = ConsoleSink(pipe.writer)
        sink.record(INHERITED)
        sink.record(graver)
        text = pipe.read_until(summary_line(graver) + "\n")
        sink.close()
        pipe.close()
        assert text.splitlines()[0] == summary_line(INHERITED)
        assert text.count("What to change") == 1


@pytest.mark.parametrize(
    "other",
    [
        fault(verdict(Kind.UNREAD_ANSWER), cause=1),
        fault(findings=replace(KERNEL, opener=WORKER_0), facts=replace(FACTS, id=9), cause=1),
    ],
)
def test_what_nothing_graver_follows_is_told_in_full_after_a_moment(pipe: Pipe, other: Fault) -> None:
    sink = ConsoleSink(pipe.writer)
    sink.record(INHERITED)
    sink.record(other)
    text = pipe.read_until(summary_line(INHERITED) + "\n")
    assert text.count("What to change") == 2
    sink.record(replace(INHERITED, id=6, cause=6))
    sink.say("the end")
    text = pipe.read_until("the end\n")
    assert text.count("What to change") == 3, "what is said comes behind what has happened"
    sink.record(replace(INHERITED, id=7, cause=7))
    sink.close()
    pipe.close_writer()
    pipe.read_all()
    assert pipe.received.count("What to change") == 4


def repeat(n: int, *, cause: int = 1) -> Fault:
    return fault(id=n, repeat_of=7, cause=cause, spread=Spread(n, 1, 2, NOW))


def test_of_repeats_there_is_a_line_now_and_then(pipe: Pipe) -> None:
    """One cause gave 333 lines in ten seconds."""
    sink = ConsoleSink(pipe.writer, again=(0.1, 3600))
    sink.record(fault(cause=1))
    for n in range(8, 50):
        sink.record(repeat(n))
    pipe.read_until(" again: ")
    for n in range(50, 100):
        sink.record(repeat(n))
    sink.say("the end")
    sink.close()
    assert pipe.read_until("the end").count(" again: ") == 1


def test_each_cause_has_its_own_lines_and_nothing_has_to_come_for_the_last_of_them(pipe: Pipe) -> None:
    sink = ConsoleSink(pipe.writer, again=(0.1, 0.2, 0.3))
    for cause in (1, 2):
        sink.record(fault(cause=cause))
        for n in range(1, 6):
            sink.record(repeat(10 * cause + n, cause=cause))
    pipe.read_until("(fault 15, session 3)\n")
    pipe.read_until("(fault 25, session 3)\n")
    sink.close()


def test_what_is_remembered_of_causes_is_bounded(pipe: Pipe) -> None:
    sink = ConsoleSink(pipe.writer, again=(3600,))
    for cause in range(1, CAUSES + 100):
        while sink._queue.qsize() > BACKLOG / 2:
            time.sleep(0.001)
        sink.record(repeat(cause, cause=cause))
    sink.close()
    assert len(sink._spreading) == CAUSES


def test_what_can_not_be_printed_is_counted_and_said_when_it_can_be_again(tmp_path: Path) -> None:
    """A reader that has gone may come back, to a FIFO; as a full disk has room again some day."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(path, os.O_WRONLY)
    os.close(reader)
    sink = ConsoleSink(writer)
    for _ in range(2):
        sink.record(fault())
    sink.say("lost")
    while not (sink._unprinted == 3 and sink._queue.empty()):
        time.sleep(0.001)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    sink.say("here again")
    sink.close()
    assert os.read(reader, 4096) == (
        b"pgguard: 3 reports or lines could not be printed here: Broken pipe\nhere again\n"
    )
    os.close(reader)
    os.close(writer)


def test_a_line_that_is_torn_is_ended(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    room = [5, 0, 1 << 20]

    def write(fd: int, data: bytes) -> int:
        if fd != pipe.writer:
            return real(fd, data)
        if not (taken := room.pop(0)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data[:taken])

    real = os.write
    monkeypatch.setattr(os, "write", write)
    sink = ConsoleSink(pipe.writer, wait=True)
    sink.say("a line that is torn")
    sink.say("the next one")
    sink.close()
    said = pipe.read_until("the next one\n")
    assert said == (
        "a lin\npgguard: 1 report or line could not be printed here: No space left on device\nthe next one\n"
    )


def test_a_descriptor_that_others_made_non_blocking_loses_nothing(pipe: Pipe) -> None:
    """Node.js does that to a standard error that it shares."""
    os.set_blocking(pipe.writer, False)
    sink = ConsoleSink(pipe.writer)
    for n in range(60):
        sink.record(fault(id=n, summary="x" * 2000))  # more than a pipe holds
    while select.select([], [pipe.writer], [], 0)[1]:
        time.sleep(0.001)
    time.sleep(0.05)
    assert sink._thread.is_alive()
    text = pipe.read_until("(fault 59, session 3)\n")
    assert text.count("SUMMARY: ") == 60
    sink.close()


def test_a_terminal_gets_colour_and_its_own_width() -> None:
    controller, terminal = os.openpty()
    sink = ConsoleSink(terminal, width=60)
    sink.record(fault())
    received = ""
    while "session 3)" not in received:
        received += os.read(controller, 1 << 16).decode()
    sink.close()
    os.close(controller)
    os.close(terminal)
    assert "\x1b[1;31m" in received
    assert "\n" + summary_line(fault()) in received.replace("\r", "")


@pytest.mark.parametrize("findings", [KERNEL, Findings()])
def test_what_the_server_did_is_not_said_of_its_client(findings: Findings) -> None:
    reason = "the server's stream ended 505 bytes before the end of a DataRow message"
    torn = replace(verdict(Kind.PROTOCOL_VIOLATION, reason, message=DATA_ROW), by=Party.SERVER, ends=True)
    shown = printed(fault(torn, findings), width=200)
    server = "This came from the server, or from something in front of it, and not from the client.\n"
    assert f"  Who:\n    {server}" in shown
    assert "identified" not in shown
    assert "Intruder" not in shown
    assert "What to change:\n    Look into the server's log at this time." in shown


def test_a_stranger_is_named_or_else_where_it_came_from_is_said() -> None:
    reason = "the connection began with HTTP, not with PostgreSQL's startup packet"
    what = replace(verdict(Kind.PROTOCOL_VIOLATION, reason), by=Party.STRANGER, ends=True)
    said = "SUMMARY: pgguard: protocol-violation: "
    unknown = printed(fault(what, Findings()))
    assert unknown == f"{said}{reason} (fault 7, session 3 from 127.0.0.1:53984)"
    known = printed(fault(what, Findings(opener=process(77, 1, "curl", name="curl"))))
    assert known == f"{said}pid 77 (curl): {reason} (fault 7, session 3)"
