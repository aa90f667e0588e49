"""Where in the server's stream the last answer is, so that it can be told whether it has been read."""

from __future__ import annotations

import random

import pytest

from pgguard.identity import Sender
from pgguard.session.verdicts import Direction, Kind
from tests.session.protocol import BACKEND, LOGIN, MODEL, Conversation, query, spell

START = len(LOGIN)


def size(letters: str) -> int:
    return len(spell(Direction.BACKEND, letters))


def answer(conversation: Conversation) -> tuple[int, int]:
    tracker = conversation.tracker
    return tracker.answer_began, tracker.answer_ended


@pytest.mark.parametrize(
    ("script", "letters"),
    [
        ("> Q < TDDCZ", "TDDCZ"),
        ("> Q < E Z", "EZ"),
        ("> PBES < 12DCZ", "12DCZ"),
        ("> PBDES < 12T > > < DCZ", "12TDCZ"),
        ("> P*H < 1tT > BES < 2DCZ", "1tT2DCZ"),
        ("> F < VZ", "VZ"),
        ("> Q < G > dc < CZ", "GCZ"),
    ],
)
def test_the_last_answer_is_what_came_since_the_request(script: str, letters: str) -> None:
    conversation = Conversation()
    conversation.talk("> Q < CZ")
    conversation.talk(script)
    before = START + size("CZ")
    assert answer(conversation) == (before, before + size(letters))
    assert conversation.tracker.position == before + size(letters)
    assert conversation.tracker.at_rest


@pytest.mark.parametrize("letters", ["A", "NSA", "AAAA"])
def test_what_comes_unasked_is_no_answer(letters: str) -> None:
    conversation = Conversation()
    conversation.talk(f"> Q < TDCZ{letters}")
    assert answer(conversation) == (START, START + size("TDCZ"))
    assert conversation.tracker.position == START + size("TDCZ" + letters)
    conversation.talk("> Q")
    assert conversation.tracker.answer_began == START + size("TDCZ" + letters)


@pytest.mark.parametrize(
    "script", ["", "> Q", "> Q < TDC", "> PBE", "> PBE < 12D", "> PBH < 12", "> PBES < E", "> Q < CZ > P"]
)
def test_a_session_that_has_asked_for_nothing_or_waits_is_not_at_rest(script: str) -> None:
    conversation = Conversation()
    conversation.talk(script)
    assert not conversation.tracker.at_rest


def test_requests_that_overlap_show_a_client_that_pipelines() -> None:
    conversation = Conversation()
    conversation.talk("> PBES < 12CZ > PBES < 12CZ")
    assert not conversation.tracker.pipelines
    conversation.talk("> PBES > PBES < 12CZ 12CZ")
    assert conversation.tracker.pipelines


@pytest.mark.parametrize("seed", range(10))
def test_it_does_not_matter_how_the_stream_is_cut(seed: int) -> None:
    rng = random.Random(seed)
    conversation = Conversation()
    expected = START
    for _ in range(20):
        rows = rng.randrange(5)
        letters = "T" + "D" * rows + "CZ"
        data, unasked = spell(Direction.BACKEND, letters), spell(Direction.BACKEND, "A" * rng.randrange(3))
        conversation.frontend(query("select 1"))
        stream = data + unasked
        while stream:
            cut = rng.randrange(1, len(stream) + 1)
            conversation.backend(stream[:cut])
            stream = stream[cut:]
        assert answer(conversation) == (expected, expected + len(data))
        expected += len(data + unasked)
        assert conversation.tracker.position == expected


def test_a_message_that_was_swallowed_is_in_no_answer() -> None:
    conversation = Conversation()
    tracker = conversation.tracker
    stray = BACKEND["D"]
    assert tracker.backend(stray, 0, len(stray)) == 0
    tracker.swallow()
    assert tracker.backend(stray, 0, len(stray)) == len(stray)
    assert tracker.position == START


def test_a_copy_whose_sync_is_in_doubt_ends_its_answer_too() -> None:
    conversation = Conversation()
    conversation.talk("> PBES < 12G > dcS < CZ")
    assert answer(conversation) == (START, START + size("12GCZ"))


def test_the_verdict_says_what_was_sent_on_top_and_by_whom() -> None:
    conversation = Conversation()
    conversation.talk("> Q < TDCZ")
    other = Sender(MODEL.pid, 4711)
    verdict = conversation.tracker.judge_unread("why", sender=other, pending=query("select 2")[:5], libpq=None)
    assert verdict.kind is Kind.UNREAD_ANSWER
    assert verdict.message is not None
    assert (verdict.message.name, verdict.message.size) == ("Query", len(query("select 2")))
    assert (verdict.intruder, verdict.requesters) == (other, (MODEL,))
    verdict = conversation.tracker.judge_unread("why", sender=MODEL, pending=query("select 2")[:5], libpq=None)
    assert (verdict.intruder, verdict.requesters) == (MODEL, ())
    verdict = conversation.tracker.judge_unread("why", sender=None, libpq="text")
    assert (verdict.message, verdict.intruder, verdict.requesters, verdict.libpq) == (None, None, (MODEL,), "text")
