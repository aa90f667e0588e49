"""What the programs in Python have in common: they read steps, do them, and write down what they got."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

Step = dict[str, Any]
Rows = Iterable[Iterable[object]]

_SHORT = 5


def given() -> Iterator[Step]:
    """The steps to do."""
    for line in sys.stdin:
        yield json.loads(line)


def write(step: Step, got: object) -> None:
    print(json.dumps({"n": step["n"], "do": step["do"], "got": got}), flush=True)


def play(do: Callable[[Step], object]) -> None:
    """Do one step after the other."""
    for step in given():
        write(step, do(step))


def digest(rows: Rows) -> dict[str, object]:
    """How many rows there are, and what they are: as they stand, or hashed if they are many."""
    count = 0
    first: list[list[str]] = []
    hashed = hashlib.sha256()
    for row in rows:
        count += 1
        values = [repr(value) for value in row]
        if count <= _SHORT:
            first.append([value[:80] for value in values])
        hashed.update("\0".join(values).encode() + b"\n")
    return {"rows": count, "first": first, "sha256": hashed.hexdigest()}


def with_marks(sql: str, mark: str) -> str:
    """The statement with another mark in place of ``$n``; with ``%s`` its other percent signs are doubled."""
    return re.sub(r"\$\d+", mark, sql.replace("%", "%%") if mark == "%s" else sql)


def values_of(step: Step) -> list[str]:
    """The values of a step with one statement."""
    if step["do"] == "big":
        return [step["letter"] * step["size"]] * 2
    return list(step.get("values", ()))


def channel_of(step: Step) -> str:
    """A channel for notifications that no other program has."""
    return f"{step['channel']}_{os.getpid()}"


def copy_lines(rows: Iterable[Sequence[str]]) -> str:
    """Rows in the text format of COPY."""
    return "".join("\t".join(row) + "\n" for row in rows)
