"""A fault holds no secret, whichever of its parts others have written: so nobody who shows it can give one away."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from pgguard.attribution.evidence import Driver
from pgguard.attribution.findings import Findings, Share
from pgguard.attribution.frames import Frame
from pgguard.attribution.stacks import Stacks
from pgguard.faults.build import build_instance
from pgguard.faults.rejection import rejection
from pgguard.faults.sql import SqlMode
from pgguard.faults.text import discreet, discreet_setting
from pgguard.identity import Sender
from pgguard.reporting.console import print_fault
from pgguard.reporting.record import to_record
from pgguard.session.verdicts import Kind, Limit, Party, Refusal, RequestSeen, RequestState
from tests.faults.samples import FACTS, KERNEL, NOW, OVERLAP, WORKER_0, WORKER_1, asleep, fault, process, verdict

SECRET = "Geh3imnis"
_TELLING = process(4867, 4864, "app", "--token", SECRET, f"postgres://u:{SECRET}@db/app", name=f"pw={SECRET}")
_FACTS = replace(FACTS, user=f"u:{SECRET}@db", database=f"password={SECRET}", application_name=f"app --token {SECRET}")
_REQUEST = RequestSeen(
    41,
    NOW,
    "Q",
    f"ALTER ROLE joe PASSWORD {SECRET} /*password='{SECRET}'*/".encode(),
    False,
    Sender(4867, 4880),
    RequestState.ANSWERING,
)
_SLEEP = asleep(_TELLING, 4880)
_FINDINGS = replace(
    KERNEL,
    holders=(WORKER_0, _TELLING),
    senders={4866: WORKER_0, 4867: _TELLING},
    thread_names={(4867, 4880): f"pw={SECRET}"},
    sleeps={(4867, 4880): _SLEEP},
    stacks=Stacks({_SLEEP: (Frame("run", f"<postgres://u:{SECRET}@db>", 3),)}),
    shares=(Share(_TELLING, 3), Share(None, 1)),
)


@pytest.mark.parametrize("mode", SqlMode)
def test_no_part_of_a_fault_holds_a_secret(mode: SqlMode) -> None:
    reason = f'the server says that prepared statement "token={SECRET}" does not exist'
    told = fault(
        replace(OVERLAP, reason=reason, requests=(_REQUEST,), libpq=f"password={SECRET}"),
        _FINDINGS,
        facts=_FACTS,
        sql_mode=mode,
    )
    printed = io.StringIO()
    print_fault(Console(file=printed, width=10000), told)
    shown = "\n".join([json.dumps(to_record(told)), repr(told), printed.getvalue(), *rejection(told)])
    assert "***" in shown
    for length in range(4, len(SECRET)):
        assert SECRET[-length:] not in shown
        assert SECRET[:length] not in shown


def test_nor_does_a_repeat_of_its_own() -> None:
    what = verdict(Kind.CONNECTION_EXHAUSTION, f'"password={SECRET}"', refusal=Refusal(Limit.SERVER))
    findings = Findings(opener=_TELLING, declared={"token": SECRET})
    instance = build_instance(what, _FACTS, findings, sql_mode=SqlMode.NORMALIZED)
    assert SECRET not in repr(instance)


@pytest.mark.parametrize(
    ("mode", "shown"),
    [
        (SqlMode.NORMALIZED, {"controller": "users", "db_url": "postgresql://u:***@h", "password": "***", "job": "a"}),
        (SqlMode.NONE, {"controller": "users", "job": "a"}),
    ],
)
def test_what_a_client_says_of_itself(mode: SqlMode, shown: dict[str, str]) -> None:
    declared = {"controller": "users", "db_url": f"postgresql://u:{SECRET}@h", "password": SECRET, "job": "a"}
    findings = Findings(declared=declared | {"application_name": "puma"}, driver=Driver.UNKNOWN)
    told = fault(verdict(Kind.PROTOCOL_VIOLATION, by=Party.CLIENT), findings, sql_mode=mode)
    [record] = [one["declared"] for one in to_record(told)["culprits"] if one["declared"] is not None]
    assert record == shown | {"application_name": "puma"}


def test_a_process_without_secrets_is_the_same() -> None:
    assert discreet(WORKER_1) is WORKER_1


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (r"\xd0\xbf\xd0\xb0\xd1\x80\xd0\xbe\xd0\xbb\xd1\x8c=hunter2 x", "пароль=*** x"),
        (r"caf\xc3\xa9 \xff", r"caf\xc3\xa9 \xff"),
        ("????????????=hunter2 x", "????????????=***"),
        ("what? a=b", "what? a=b"),
    ],
)
def test_letters_that_a_server_has_replaced_may_name_a_secret(name: str, shown: str) -> None:
    assert discreet_setting(name) == shown


def test_what_is_cut_off_by_the_kernel_or_the_server_may_be_half_of_a_secret() -> None:
    assert discreet(process(1, None, name="postgres://u:12")).name == "postgres://u:***"
    assert discreet(process(1, None, name="tcp://h:12")).name == "tcp://h:12"
    name = "x" * 44 + " postgresql://u:123"
    told = fault(facts=replace(FACTS, application_name=name))
    assert told.session.application_name == "x" * 44 + " postgresql://u:***"
