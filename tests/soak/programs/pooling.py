"""What the programs with pools have in common: steps that any connection can do, many of them at a time."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

from tests.soak.programs.playing import Step, given, values_of, write

SIZE = 4
"""Connections of a pool."""
_AT_ONCE = 8


def lists_of(step: Step) -> list[list[str]]:
    """The values of each time that its statement is executed."""
    return step["lists"] if step["do"] == "prepared" else [values_of(step)]


def in_threads(do: Callable[[Step], object]) -> None:
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        steps = given()
        while some := list(itertools.islice(steps, 2 * _AT_ONCE)):
            for step, got in zip(some, threads.map(do, some), strict=True):
                write(step, got)


async def in_tasks(do: Callable[[Step], Awaitable[object]]) -> None:
    steps = given()
    while some := list(itertools.islice(steps, 2 * _AT_ONCE)):
        for step, got in zip(some, await asyncio.gather(*map(do, some)), strict=True):
            write(step, got)
