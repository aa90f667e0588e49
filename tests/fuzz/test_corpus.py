"""Everything that is kept, and a little of what chance makes of it, is in order, however it is cut."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pgguard.session.tracker import Tracker
from pgguard.session.verdicts import Kind
from pgguard.wire.messages import HEADER_SIZE
from tests.fuzz.corpus import conversations, files
from tests.fuzz.many import Many, play_many
from tests.fuzz.minimizing import minimized
from tests.fuzz.player import check
from tests.fuzz.script import Do, Step, cut_in_bytes, decode, encode, joined
from tests.session.protocol import FRONTEND, LOGIN, message, query
from tests.wire.test_startup import STARTUP

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("path", files(), ids=lambda path: path.name)
def test_kept(path: Path) -> None:
    found = check(decode(path.read_bytes()))
    if path.name.startswith("recorded-"):
        assert found.keys() <= {Kind.CONNECTION_EXHAUSTION}, "a real driver and a real server do nothing wrong"


def test_mutated_at_random() -> None:
    account = play_many(seed=9, first=0, number=1500)
    assert not account.failed, account.failed[0][1]
    assert account.verdicts.keys() >= {
        Kind.SHARED_BY_PROCESSES,
        Kind.REQUEST_WHILE_BUSY,
        Kind.PROTOCOL_VIOLATION,
        Kind.MESSAGE_WHILE_IDLE,
        Kind.UNEXPECTED_RESPONSE,
        Kind.UNCLEAN_CLOSE,
    }
    assert account.faultless


def test_a_number_is_always_the_same_conversation() -> None:
    one, other = Many(9), Many(9)
    other.conversation(1)
    assert one.conversation(2) == other.conversation(2) != one.conversation(3)


def test_files_are_conversations_and_conversations_are_files() -> None:
    for steps in conversations():
        assert decode(encode(steps)) == steps
        assert joined(cut_in_bytes(steps)) == joined(steps)
    for n in range(256):
        decode(bytes([n, 0, 5, 1]))


def test_what_fails_is_made_small() -> None:
    """Of a long conversation what is left is what it takes."""
    steps = [Step(Do.CLIENT, 1, STARTUP), Step(Do.SERVER, 0, LOGIN * 3)]
    steps += [
        Step(Do.CLIENT, 1, query("SELECT 1") + FRONTEND["H"] * 3 + query("secret")),
        Step(Do.SERVER, 0, LOGIN),
    ] * 5

    def fails(steps: list[Step]) -> str | None:
        return "it fails" if any(b"secret" in step.data for step in steps) else None

    assert minimized(steps, fails) == [Step(Do.CLIENT, 1, message("Q", b"secret"))]


def test_what_is_judged_otherwise_when_cut_otherwise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A core that takes a piece of a header for something that is in order."""
    follow = Tracker.frontend

    def careless(self: Tracker, buffer: bytes, start: int, end: int, *rest: Any) -> int:
        return end if end - start < HEADER_SIZE else follow(self, buffer, start, end, *rest)

    steps = [Step(Do.CLIENT, 1, STARTUP), Step(Do.SERVER, 0, LOGIN), Step(Do.CLIENT, 1, query("SELECT 1"))]
    check(steps)
    monkeypatch.setattr(Tracker, "frontend", careless)
    with pytest.raises(AssertionError):
        check(steps)
