"""Severities, and what is said about each kind, as the contract's table has them."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from pgguard.attribution.evidence import Driver
from pgguard.faults.catalogue import CATALOGUE, OVERLAP, Severity, severity_of
from pgguard.faults.text import printable
from pgguard.session.verdicts import Kind
from tests.faults.samples import QUERY, verdict

SEVERITIES = {
    Kind.MESSAGE_WHILE_IDLE: Severity.ERROR,
    Kind.UNEXPECTED_RESPONSE: Severity.ERROR,
    Kind.SHARED_BY_PROCESSES: Severity.ERROR,
    Kind.SHARED_BY_THREADS: Severity.ERROR,
    Kind.REQUEST_WHILE_BUSY: Severity.ERROR,
    Kind.UNREAD_ANSWER: Severity.WARNING,
    Kind.INHERITED_CONNECTION: Severity.WARNING,
    Kind.FOREIGN_TERMINATE: Severity.ERROR,
    Kind.UNCLEAN_CLOSE: Severity.WARNING,
    Kind.IDLE_IN_TRANSACTION: Severity.WARNING,
    Kind.LEAKED_CONNECTION: Severity.WARNING,
    Kind.SESSION_STATE_LOST: Severity.WARNING,
    Kind.CONNECTION_EXHAUSTION: Severity.ERROR,
    Kind.PROTOCOL_VIOLATION: Severity.ERROR,
    Kind.TLS_CORRUPTION: Severity.ERROR,
    Kind.UNTRACKED: Severity.INFO,
}


@pytest.mark.parametrize("kind", Kind)
def test_every_kind_has_the_severity_that_the_contract_says(kind: Kind) -> None:
    assert CATALOGUE[kind].kind is kind
    assert CATALOGUE[kind].severity is SEVERITIES[kind]
    assert severity_of(verdict(kind), Driver.LIBPQ) is SEVERITIES[kind]


@pytest.mark.parametrize(
    ("driver", "severity"),
    [
        (Driver.LIBPQ, Severity.ERROR),
        (Driver.ASYNCPG, Severity.ERROR),
        (Driver.PYTHON, Severity.ERROR),
        (Driver.PGJDBC, Severity.WARNING),
        (Driver.JAVA, Severity.WARNING),
        (Driver.NODE_POSTGRES, Severity.WARNING),
        (Driver.POSTGRES_JS, Severity.WARNING),
        (Driver.NODE, Severity.WARNING),
        (Driver.DOTNET, Severity.WARNING),
        (Driver.LIB_PQ, Severity.ERROR),
        (Driver.PGX, Severity.WARNING),
        (Driver.GO, Severity.WARNING),
        (Driver.TOKIO_POSTGRES, Severity.WARNING),
        (Driver.UNKNOWN, Severity.WARNING),
    ],
)
def test_overlap_is_an_error_only_for_drivers_that_never_pipeline(driver: Driver, severity: Severity) -> None:
    """Otherwise ``reject`` would kill a correct application."""
    assert severity_of(verdict(Kind.REQUEST_WHILE_BUSY), driver) is severity


@pytest.mark.parametrize("driver", Driver)
def test_each_row_on_who_may_overlap_names_its_source(driver: Driver) -> None:
    assert re.search(r"\w\(\)|\.(js|go|pyx|py|java)\b|https://\S+", OVERLAP[driver].source)


@pytest.mark.parametrize("driver", Driver)
def test_overlap_between_processes_is_an_error_whatever_the_driver(driver: Driver) -> None:
    assert OVERLAP[driver].reason
    assert severity_of(verdict(Kind.SHARED_BY_PROCESSES), driver) is Severity.ERROR


def test_an_heir_that_has_followed_the_advice_is_only_information() -> None:
    inherited = verdict(Kind.INHERITED_CONNECTION)
    assert severity_of(replace(inherited, settled=True), Driver.LIBPQ) is Severity.INFO


@pytest.mark.parametrize(
    ("request_open", "transaction", "severity"),
    [
        (False, False, Severity.WARNING),
        (True, False, Severity.ERROR),
        (False, True, Severity.ERROR),
        (True, True, Severity.ERROR),
    ],
)
def test_a_close_is_grave_when_work_is_lost(request_open: bool, transaction: bool, severity: Severity) -> None:
    closed = verdict(Kind.UNCLEAN_CLOSE, open_request=request_open, open_transaction=transaction)
    assert severity_of(closed, Driver.UNKNOWN) is severity


@pytest.mark.parametrize("driver", Driver)
def test_an_unread_answer_is_grave_when_something_is_sent_on_top(driver: Driver) -> None:
    assert severity_of(verdict(Kind.UNREAD_ANSWER), driver) is Severity.WARNING
    assert severity_of(verdict(Kind.UNREAD_ANSWER, message=QUERY), driver) is Severity.ERROR


def test_only_messages_that_nobody_waits_for_can_be_dropped() -> None:
    """Swallowing any other would leave an answer owed that never comes, or a request unanswered."""
    assert {kind for kind in Kind if CATALOGUE[kind].can_drop} == {Kind.MESSAGE_WHILE_IDLE, Kind.FOREIGN_TERMINATE}


def test_a_client_that_has_gone_or_is_being_refused_can_not_be_told() -> None:
    cannot = {Kind.UNCLEAN_CLOSE, Kind.CONNECTION_EXHAUSTION, Kind.TLS_CORRUPTION, Kind.UNTRACKED}
    assert {kind for kind in Kind if not CATALOGUE[kind].can_reject} == cannot


@pytest.mark.parametrize("kind", Kind)
def test_texts_are_single_lines_and_complete(kind: Kind) -> None:
    """They go into one line of an ErrorResponse and are wrapped by whoever shows them: no stray line breaks or gaps."""
    entry = CATALOGUE[kind]
    sentences = (entry.meaning, entry.cause, entry.advice.text, *entry.fixes)
    for text in (entry.title, entry.severity_rule, entry.advice.title, *sentences):
        assert text
        assert text == " ".join(text.split())
        assert text == printable(text)
    assert all(text.endswith(".") for text in sentences)


def test_severities_are_ordered() -> None:
    assert Severity.ERROR.rank > Severity.WARNING.rank > Severity.INFO.rank
