"""Conversations as bytes: what a fuzzer changes, and what the corpus keeps.

A file is a row of steps. The first byte of each says in its low bits what happens, and in its high ones by whom or how.
Where bytes are sent, their number follows, in two bytes, and then they do. Any bytes at all are a file.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Final, NamedTuple

from pgguard.identity import Sender

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from random import Random

LONGEST: Final = 0xFFFF
"""Bytes in one step."""

SENDERS: Final = (
    None,
    Sender(100, 100),
    Sender(100, 101),
    Sender(100),
    Sender(100, 100, sampled=True),
    Sender(200, 200),
    Sender(200),
    Sender(300, 301),
)
"""Who may send, by number; the first is one whom nobody names."""


class Do(IntEnum):
    """What happens in a step."""

    CLIENT = 0
    """Bytes of the client's, sent by who has this number, are read at once."""
    SERVER = 1
    CLIENT_ENDS = 2
    """Its stream ends; if ``how`` is odd, by a reset."""
    SERVER_ENDS = 3
    RULE = 4
    """From now on ``how``, of a :class:`Rule`, says what becomes of verdicts."""
    GO_ON = 5
    """What waits for a ruling gets it."""
    INTRODUCE = 6
    """It is found out who has opened the connection; from number 8 on, a goodbye of unknown origin is looked into."""
    ASK = 7
    """The guard has what it may need of a session made; the bytes are a request that it holds back, or a body."""


class Rule(IntEnum):
    """What becomes of the message that a verdict is about."""

    OVERRULE = 0
    SWALLOW = 1
    """Where messages of that kind can be: the others are let through."""
    WAIT = 2
    """Its direction is held until :attr:`Do.GO_ON`, and it is let through then."""
    WAIT_AND_SWALLOW = 3


class Step(NamedTuple):
    """Something happens."""

    do: Do
    how: int = 0
    data: bytes = b""


_WITH_DATA: Final = frozenset({Do.CLIENT, Do.SERVER, Do.ASK})
_DO: Final = tuple(Do(number & 7) for number in range(256))


def decode(file: bytes) -> list[Step]:
    """Read a file; what its last step lacks isn't missed."""
    steps: list[Step] = []
    at, end = 0, len(file)
    while at < end:
        do, how = _DO[file[at]], file[at] >> 4
        at += 1
        data = b""
        if do in _WITH_DATA:
            size = int.from_bytes(file[at : at + 2], "big")
            data = file[at + 2 : at + 2 + size]
            at += 2 + size
        steps.append(Step(do, how, data))
    return steps


def encode(steps: Iterable[Step]) -> bytes:
    """Write a file."""
    parts: list[bytes] = []
    for do, how, data in steps:
        if do not in _WITH_DATA:
            parts.append(bytes([do | how << 4]))
            continue
        for start in range(0, len(data) or 1, LONGEST):
            piece = data[start : start + LONGEST]
            parts.append(bytes([do | how << 4]) + len(piece).to_bytes(2, "big") + piece)
    return b"".join(parts)


def joined(steps: Iterable[Step]) -> list[Step]:
    """The same, with what one sender sends without a break read at once."""
    found: list[Step] = []
    for step in steps:
        if step.do in (Do.CLIENT, Do.SERVER):
            if not step.data:
                continue
            if found and found[-1].do is step.do and found[-1].how == step.how:
                found[-1] = found[-1]._replace(data=found[-1].data + step.data)
                continue
        found.append(step)
    return found


def cut_in_bytes(steps: Iterable[Step]) -> Iterator[Step]:
    """The same, with each byte read alone."""
    for step in steps:
        if step.do in (Do.CLIENT, Do.SERVER):
            for byte in step.data:
                yield step._replace(data=bytes([byte]))
        else:
            yield step


def cut_anywhere(steps: Iterable[Step], rng: Random) -> Iterator[Step]:
    """The same, with what is read cut at random, and most often near the beginning or end of a message's header."""
    for step in steps:
        data = step.data
        if len(data) < 2 or step.do not in (Do.CLIENT, Do.SERVER):
            yield step
            continue
        marks = {int(rng.random() * len(data)) for _ in range(int(rng.random() * 4))}
        at = 0
        for message in messages(data):
            if rng.random() < 0.1:
                marks.add(min(at + (1, 4, 5, 6, len(message) - 1)[int(rng.random() * 5)], len(data)))
            at += len(message)
        start = 0
        for stop in sorted(marks - {0, len(data)}):
            yield step._replace(data=data[start:stop])
            start = stop
        yield step._replace(data=data[start:])


def messages(data: bytes) -> list[bytes]:
    """What a stream seems to consist of; behind a length that can't be, all is one."""
    found: list[bytes] = []
    at, end = 0, len(data)
    while at < end:
        length = int.from_bytes(data[at + 1 : at + 5], "big")
        stop = at + 1 + length if length >= 4 and end - at >= 5 else end
        found.append(data[at:stop])
        at = stop
    return found


def show(steps: Iterable[Step]) -> Iterator[str]:
    """A line for each step."""
    for step in steps:
        match step.do:
            case Do.CLIENT:
                sender = SENDERS[step.how & 7]
                who = "somebody" if sender is None else f"{sender.pid}" + (f".{sender.tid}" if sender.tid else "")
                yield f"> {who}: {step.data!r}"
            case Do.SERVER:
                yield f"< {step.data!r}"
            case Do.RULE:
                yield f"rule: {Rule(step.how & 3).name.lower().replace('_', ' ')}"
            case Do.ASK:
                yield f"ask: {step.data!r}"
            case _:
                yield f"{step.do.name.lower().replace('_', ' ')} {step.how or ''}".rstrip()
