"""The options of whatever runs a guard, each declared once: what it is called, what it may say, what it means.

Values stay text here: :mod:`pgguard.proxy.settings` reads them, those of the environment and of the configuration file
alike, and says what is wrong with them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from pgguard.faults.policy import Mode
from pgguard.faults.sql import SqlMode
from pgguard.proxy import settings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def completing(values: Sequence[str]) -> Callable[[str], list[str]]:
    """What completes a value that is one of these."""

    def complete(incomplete: str) -> list[str]:
        return [value for value in values if value.lower().startswith(incomplete.lower())]

    return complete


def _option(name: str, metavar: str, text: str, *, values: Sequence[str] | None = None) -> Any:
    """An option that has a variable beside it, and says its default in its help."""
    return typer.Option(
        f"--{name}",
        envvar=f"PGGUARD_{name.replace('-', '_').upper()}",
        metavar=metavar,
        help=text,
        show_default=False,
        autocompletion=None if values is None else completing(values),
    )


Upstream = Annotated[
    str,
    _option(
        "upstream",
        "URL",
        "Where PostgreSQL is: a libpq connection string or URI. Only where it leads is used; user, database and "
        "password are those that each client sends. Default: what libpq's variables say, PGHOST and the like.",
    ),
]
Listen = Annotated[
    list[str] | None,
    _option(
        "listen",
        "ADDR",
        "Where clients connect: HOST:PORT, or unix:DIR for a socket in DIR, or unix:DIR:PORT. Can be repeated; in the "
        "environment, put a space between two. Default: 127.0.0.1:6544.",
    ),
]
ModeChoice = Annotated[
    str,
    _option(
        "mode",
        "MODE",
        "What happens to a session with an error. log: the error is recorded, and the session goes on. reject: the "
        "session ends, with a message to its client that says what happened. Default: log.",
        values=list(Mode),
    ),
]
Faults = Annotated[Path | None, _option("faults", "PATH", "Append every fault to this file, one line of JSON each.")]
Config = Annotated[
    Path | None,
    _option("config", "PATH", "The configuration file, in TOML. Default: pgguard.toml, if there is one here."),
]
Attribution = Annotated[
    str,
    _option(
        "attribution",
        "HOW",
        "How to find out which process did it. auto: by every means that this host allows. ebpf: also end with an "
        "error unless the kernel names the senders on TCP. proc: end with an error unless processes and sockets can be "
        "looked at. off: not at all. Default: auto.",
        values=get_args(settings.Attribution),
    ),
]
Sql = Annotated[
    str,
    _option(
        "sql",
        "HOW",
        "How records show SQL. normalized: with a ? for each value. full: as it was sent. none: not at all. Secrets "
        "are never shown. Default: normalized.",
        values=list(SqlMode),
    ),
]
IdleInTransaction = Annotated[
    str,
    _option(
        "idle-in-transaction",
        "SECONDS",
        "How long a transaction may sit idle before that is a fault; 0: as long as it likes. Default: 60.",
    ),
]
UnreadAnswer = Annotated[
    str,
    _option(
        "unread-answer",
        "SECONDS",
        "How long a complete answer may lie unread in the client's socket before that is a fault; 0: as long as it "
        "likes. Default: 5.",
    ),
]
EvidenceBudget = Annotated[
    str,
    _option(
        "evidence-budget",
        "SECONDS",
        "For how long a session may be held while the first fault of a cause is looked into; 0: not at all. Default: "
        "0.25.",
    ),
]
User = Annotated[
    str,
    _option("user", "NAME", "The ordinary user to become once everything is set up, for a guard that root starts."),
]
