"""A conversation that fails, made as small as it still fails in the same way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.fuzz.player import check
from tests.fuzz.script import joined, messages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.fuzz.script import Step


def failure(steps: list[Step]) -> str | None:
    """How it fails: the kind of exception, and where; ``None`` if it doesn't."""
    try:
        check(steps)
    except Exception as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        where = "" if trace is None else f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        return f"{type(error).__name__} at {where}"
    return None


def minimized(steps: list[Step], how: Callable[[list[Step]], str | None] = failure) -> list[Step]:
    """Leave out steps, messages and bytes as long as it fails as it does."""
    wanted = how(steps)
    if wanted is None:
        raise ValueError("it doesn't fail")
    smaller = True
    while smaller:
        smaller = False
        for candidate in _smaller(steps):
            if how(candidate) == wanted:
                steps, smaller = candidate, True
                break
    return steps


def _smaller(steps: list[Step]) -> Iterator[list[Step]]:
    together = joined(steps)
    if len(together) < len(steps):
        yield together
    size = len(steps) // 2
    while size:
        for at in range(0, len(steps), size):
            yield steps[:at] + steps[at + size :]
        size //= 2
    for at, step in enumerate(steps):
        for data in _shorter(step.data):
            yield [*steps[:at], step._replace(data=data), *steps[at + 1 :]]
    for at in range(1, len(steps)):
        one, other = steps[at - 1 : at + 1]
        if one.do is other.do and one.how == other.how and one.data and other.data:
            yield [*steps[: at - 1], one._replace(data=one.data + other.data), *steps[at + 1 :]]


def _shorter(data: bytes) -> Iterator[bytes]:
    """Without some of its messages, or without some of their bodies' bytes."""
    parts = messages(data)
    if len(parts) > 1:
        for at in range(len(parts)):
            yield b"".join(parts[:at] + parts[at + 1 :])
    for at, part in enumerate(parts):
        body = part[5:]
        size = len(body)
        while size:
            for start in range(0, len(body), size):
                rest = body[:start] + body[start + size :]
                for length in ((4 + len(rest)).to_bytes(4, "big"), part[1:5]):
                    yield b"".join([*parts[:at], part[:1] + length + rest, *parts[at + 1 :]])
            size //= 2
