"""How to see which code sent a request, where no stack says it; and what requests say of themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pgguard.attribution.declared import declared
from pgguard.attribution.findings import Findings
from pgguard.attribution.frames import Frame
from pgguard.attribution.runtime import Language, Library, Runtime
from pgguard.attribution.stacks import Stacks
from pgguard.attribution.threads import Waits
from pgguard.faults.advice.tracing import TRACEABLE, tracing_for
from pgguard.faults.causes import cause_key
from pgguard.faults.sql import SqlMode
from pgguard.identity import Sender
from pgguard.reporting.record import to_record
from pgguard.session.verdicts import Kind, Verdict
from tests.faults.samples import KERNEL, OUTSTANDING, OVERLAP, WORKER_1, fault, waiting

TAGGED = b"SELECT 1 /*action='show',controller='users',source_location='app%2Fmodels%2Fuser.rb%3A23'*/"
SAID = {"action": "show", "controller": "users", "source_location": "app/models/user.rb:23"}
SENT = replace(OVERLAP, requests=(replace(OUTSTANDING, n=40, sql=TAGGED, sender=Sender(4867, 4880)), OUTSTANDING))


def said(what: Verdict, pid: int) -> object:
    record = to_record(fault(what))
    return next(culprit["declared"] for culprit in record["culprits"] if culprit["pid"] == pid)


def test_what_its_own_requests_say_is_told_of_a_culprit() -> None:
    assert said(SENT, 4867) == SAID
    assert said(SENT, 4866) is None, "the other one's request says nothing"
    assert said(SENT, 4864) is None


def test_of_a_text_that_was_cut_off_the_end_is_not_known() -> None:
    cut = replace(OUTSTANDING, sql=TAGGED, sql_cut=True, sender=Sender(4867, 4880))
    assert said(replace(OVERLAP, requests=(cut,)), 4867) is None


def test_another_threads_requests_say_nothing_of_this_one() -> None:
    other = replace(OUTSTANDING, n=40, sql=TAGGED, sender=Sender(4867, 4999))
    assert said(replace(OVERLAP, requests=(other,)), 4867) is None


def test_what_requests_say_makes_no_other_cause_of_it() -> None:
    unknown = replace(KERNEL, senders={})
    assert cause_key(SENT, fault(SENT, unknown)) == cause_key(OVERLAP, fault(OVERLAP, unknown))


def test_in_mode_none_only_what_libraries_write_is_told() -> None:
    text = b"SELECT 1 /*controller='users',customer='Alice'*/"
    what = replace(OVERLAP, requests=(replace(OUTSTANDING, sql=text, sender=Sender(4867, 4880)),))
    record = to_record(fault(what, sql_mode=SqlMode.NONE))
    assert record["culprits"][0]["declared"] == {"controller": "users"}


@pytest.mark.parametrize(
    ("statement", "pairs"),
    [
        (
            b"SELECT * FROM albums WHERE (id = 1) LIMIT 1 -- model:Album,method_type:class,method:[]\n",
            {"model": "Album", "method_type": "class", "method": "[]"},
        ),
        (
            b"SELECT * FROM artists -- model:Album,method_type:association_load,association:artist\n\0",
            {"model": "Album", "method_type": "association_load", "association": "artist"},
        ),
        (b"SELECT 'a -- model:Album,method:first'", {}),
        (b"SELECT $$ -- model:Album,method:first$$", {}),
        (b"SELECT 1 -- the first one: of all\n", {}),
        (b"SELECT 1 -- model:Album,method:first\n + 1", {}),
    ],
)
def test_sequels_comments_are_understood(statement: bytes, pairs: dict[str, str]) -> None:
    assert declared(None, [statement]) == pairs


RUNS = [Runtime(language) for language in Language if language is not Language.PYTHON]


@pytest.mark.parametrize("runtime", RUNS, ids=lambda runtime: str(runtime.language))
@pytest.mark.parametrize("kind", sorted(TRACEABLE))
def test_there_is_something_for_every_language_without_stacks(kind: Kind, runtime: Runtime) -> None:
    tracing = tracing_for(kind, runtime)
    assert tracing is not None
    assert all(source.startswith("https://") for source in tracing.sources)
    assert tracing.text.endswith(".")


@pytest.mark.parametrize(
    ("library", "line"),
    [
        (Library.ACTIVE_RECORD, "config.active_record.query_log_tags_enabled = true"),
        (Library.SEQUEL, "Sequel::Model.plugin :sql_comments"),
        (None, "connection.exec("),
    ],
)
def test_what_has_a_line_for_it_is_told_that(library: Library | None, line: str) -> None:
    tracing = tracing_for(
        Kind.SHARED_BY_PROCESSES, Runtime(Language.RUBY, None, frozenset({library} if library else ()))
    )
    assert tracing is not None
    assert line in tracing.code


@pytest.mark.parametrize("kind", sorted(set(Kind) - TRACEABLE))
def test_it_is_of_no_use_where_no_request_is_to_be_found(kind: Kind) -> None:
    assert tracing_for(kind, Runtime(Language.RUBY)) is None


RUBY = replace(KERNEL, runtimes={4867: Runtime(Language.RUBY)})
WAITING = waiting(WORKER_1, 4880)
READ = replace(
    KERNEL,
    waits=Waits((WAITING,)),
    stacks=Stacks({WAITING.sleep: (Frame("work", "/srv/app.py", 7, application=True),)}),
    runtimes={4867: Runtime(Language.PYTHON)},
)


@pytest.mark.parametrize(
    ("what", "findings", "is_told"),
    [
        pytest.param(OVERLAP, RUBY, True, id="nothing says it"),
        pytest.param(SENT, RUBY, False, id="its requests do"),
        pytest.param(OVERLAP, READ, False, id="its stack does"),
        pytest.param(OVERLAP, KERNEL, False, id="it isn't known what it runs"),
    ],
)
def test_a_report_says_it_where_nothing_else_says_which_code_it_was(
    what: Verdict, findings: Findings, is_told: bool
) -> None:
    record = to_record(fault(what, findings))
    assert (record["tracing"] is not None) is is_told
