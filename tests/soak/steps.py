"""What the programs are told to do: steps from a seed, one JSON object a line, the same each time.

A step names what is to be done (:data:`Do`) and with what. Values are given as text, and SQL makes of them what it
needs; each ``$n`` stands once, and in order, so that it can be written as ``?`` or ``%s``. Everything happens in
temporary tables: who runs beside whom makes no difference to what anybody gets.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any, Final, Literal, get_args

Do = Literal["rows", "prepared", "error", "transaction", "copy", "cursor", "pipeline", "cancel", "notify", "big", "say"]
"""
``rows``
    one statement, with values: its rows.
``prepared``
    one statement, prepared, and executed with each of several lists of values.
``error``
    one statement that fails: its SQLSTATE.
``transaction``
    several statements, of which some fail: rows and SQLSTATEs.
``copy``
    rows are copied into a temporary table, and out of it, as text and as binary.
``cursor``
    rows through a cursor of the server, some at a time.
``pipeline``
    several statements without waiting for the answers.
``cancel``
    a statement that takes a minute is cancelled.
``notify``
    notifications from another connection.
``big``
    a value of some megabytes goes there and comes back.
``say``
    a statement that brings notices or changed parameters along.
"""
ALL: Final[tuple[Do, ...]] = get_args(Do)
STATELESS: Final[tuple[Do, ...]] = ("rows", "prepared", "error", "big")
"""What can be done on any connection of a pool."""
PLAIN: Final[tuple[Do, ...]] = ("rows", "prepared", "error", "transaction", "big", "say")
"""What every driver can."""

Step = dict[str, Any]

_WORDS: Final = (
    "",
    "word",
    "Grüße",
    "tab\there",
    "line\nbreak",
    "back\\slash",
    "'quoted'",
    "\U0001f418" * 3,
    "x" * 300,
)
_ERRORS: Final = (
    "SELECT 1 / 0",
    "SELECT nonsense",
    "SELEKT 1",
    "SELECT 'x'::int",
    "SELECT * FROM nowhere",
    "DO $$ BEGIN RAISE EXCEPTION 'raised' USING ERRCODE = 'UE001'; END $$",
    "SELECT generate_series(1, 500) / (generate_series(1, 500) - 400)",
)
_SAYINGS: Final = (
    "DO $$ BEGIN RAISE NOTICE 'noticed'; RAISE WARNING 'warned'; END $$",
    "SET TimeZone = 'Europe/Berlin'",
    "SET TimeZone = 'UTC'",
    "SET application_name = 'renamed'",
    "RESET application_name",
    "SET IntervalStyle = 'iso_8601'",
    "CREATE TEMP TABLE IF NOT EXISTS kept (n int)",
)
_MEGABYTE: Final = 1_000_000


def steps(seed: int, count: int, kinds: tuple[Do, ...]) -> Iterator[Step]:
    """So many steps of those kinds; each kind comes."""
    chance = random.Random(seed)
    chosen = list(kinds)[:count] + [chance.choice(kinds) for _ in range(count - len(kinds))]
    chance.shuffle(chosen)
    for n, kind in enumerate(chosen):
        yield {"n": n, "do": kind} | _MAKE[kind](chance)


def _word(chance: random.Random) -> str:
    return chance.choice(_WORDS) + str(chance.randrange(1000))


def _statement(chance: random.Random) -> Step:
    count = str(chance.choice((0, 1, 3, 40, 700)))
    return chance.choice(
        (
            {"sql": "SELECT n, md5(n::text) FROM generate_series(1, $1::text::int) AS n", "values": [count]},
            {"sql": "SELECT $1::text AS a, length($2::text) AS b", "values": [_word(chance), _word(chance)]},
            {"sql": "SELECT 1 AS one", "values": []},
            {
                "sql": "SELECT n::text, nullif(n % 3, 0), n * 1.5, n > 7, repeat($1::text, n % 5)"
                " FROM generate_series(1, $2::text::int) AS n",
                "values": [_word(chance), count],
            },
            {"sql": "SELECT repeat($1::text, 2000) FROM generate_series(1, 20)", "values": [_word(chance)]},
        )
    )


def _prepared(chance: random.Random) -> Step:
    return {
        "sql": "SELECT n, md5(n || $1::text) FROM generate_series(1, $2::text::int) AS n",
        "lists": [[_word(chance), str(chance.randrange(1, 50))] for _ in range(chance.randrange(1, 8))],
    }


def _transaction(chance: random.Random) -> Step:
    inside = [
        "CREATE TEMP TABLE within (n int PRIMARY KEY) ON COMMIT DROP",
        "INSERT INTO within SELECT generate_series(1, 99)",
    ]
    if chance.random() < 0.5:
        inside += ["SAVEPOINT here", "INSERT INTO within VALUES (1)", "SELECT 1 AS fails", "ROLLBACK TO here"]
    inside.append("SELECT count(*), sum(n) FROM within")
    if chance.random() < 0.3:
        inside.append("SELECT 1 / 0")
    return {"statements": ["BEGIN", *inside, chance.choice(("COMMIT", "ROLLBACK"))]}


def _copy(chance: random.Random) -> Step:
    return {
        "rows": [[str(n), chance.choice(("some", "text", "Grüße"))] for n in range(chance.choice((0, 1, 50, 3000)))],
        "fails": chance.random() < 0.2,
    }


def _cursor(chance: random.Random) -> Step:
    return {"sql": f"SELECT n, md5(n::text) FROM generate_series(1, {chance.choice((1, 100, 999))}) AS n", "size": 50}


def _pipeline(chance: random.Random) -> Step:
    return {"statements": [_statement(chance) for _ in range(chance.randrange(2, 40))], "fails": chance.random() < 0.3}


def _notify(chance: random.Random) -> Step:
    return {"channel": f"news_{chance.randrange(1 << 60)}", "payloads": [_word(chance) for _ in range(3)]}


def _big(chance: random.Random) -> Step:
    size = chance.choice((70_000, 300_000, _MEGABYTE, 4 * _MEGABYTE))
    return {"sql": "SELECT md5($1::text), $2::text", "letter": chance.choice("abc"), "size": size}


_MAKE: Final[dict[Do, Callable[[random.Random], Step]]] = {
    "rows": _statement,
    "prepared": _prepared,
    "error": lambda chance: {"sql": chance.choice(_ERRORS)},
    "transaction": _transaction,
    "copy": _copy,
    "cursor": _cursor,
    "pipeline": _pipeline,
    "cancel": lambda _: {},
    "notify": _notify,
    "big": _big,
    "say": lambda chance: {"sql": chance.choice(_SAYINGS)},
}
