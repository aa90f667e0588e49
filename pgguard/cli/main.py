"""The command line."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from pgguard.cli.doctor import doctor
from pgguard.cli.explain import explain
from pgguard.cli.serve import serve
from pgguard.faults.text import printable
from pgguard.proxy.errors import ConfigurationError
from pgguard.secrets.text import redact

if TYPE_CHECKING:
    from collections.abc import Iterator

_CONFIGURATION_ERROR: Final = 2
_NO_THREAD: Final = "can't start new thread"
"""What Python says then."""
_MAY_HOLD_A_PASSWORD: Final = re.compile(r"://|passw|^(?!unix:).*:.*@", re.IGNORECASE | re.DOTALL)

app = typer.Typer(
    name="pgguard",
    help="A transparent guard in front of PostgreSQL that catches misused connections and names who did it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command("serve")
def serve_command(  # noqa: PLR0913, PLR0917 - one for each option
    upstream: Annotated[
        str,
        typer.Option(
            envvar="PGGUARD_UPSTREAM",
            metavar="URL",
            help="Where PostgreSQL is: a libpq connection string or URI. Default: libpq's PG* variables.",
            show_default=False,
        ),
    ] = "",
    listen: Annotated[
        list[str] | None,
        typer.Option(
            envvar="PGGUARD_LISTEN",
            metavar="ADDR",
            help="HOST:PORT or unix:DIR[:PORT]; repeatable, and separated by spaces in the environment. "
            "Default: 127.0.0.1:6544.",
            show_default=False,
        ),
    ] = None,
    mode: Annotated[
        str,
        typer.Option(
            envvar="PGGUARD_MODE",
            metavar="log|reject",
            help="What an error does to its session. Default: log.",
            show_default=False,
        ),
    ] = "",
    faults: Annotated[
        Path | None,
        typer.Option(
            envvar="PGGUARD_FAULTS",
            metavar="PATH",
            help="Append every fault to PATH as JSON Lines.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            envvar="PGGUARD_CONFIG",
            metavar="PATH",
            help="A configuration file in TOML. Default: pgguard.toml if there is one.",
            show_default=False,
        ),
    ] = None,
    attribution: Annotated[
        str,
        typer.Option(
            envvar="PGGUARD_ATTRIBUTION",
            metavar="auto|ebpf|proc|off",
            help="Whether processes are named: as far as this host allows; on pain of an error, by the kernel on TCP "
            "too or by /proc; or not. Default: auto.",
            show_default=False,
        ),
    ] = "",
    sql: Annotated[
        str,
        typer.Option(
            envvar="PGGUARD_SQL",
            metavar="normalized|full|none",
            help="How SQL text appears in records. Default: normalized.",
            show_default=False,
        ),
    ] = "",
    idle_in_transaction: Annotated[
        str,
        typer.Option(
            envvar="PGGUARD_IDLE_IN_TRANSACTION",
            metavar="SECONDS",
            help="How long a transaction may sit idle; 0: for ever. Default: 60.",
            show_default=False,
        ),
    ] = "",
    unread_answer: Annotated[
        str,
        typer.Option(
            envvar="PGGUARD_UNREAD_ANSWER",
            metavar="SECONDS",
            help="How long a complete answer may lie unread in the client's socket; 0: for ever. Default: 5.",
            show_default=False,
        ),
    ] = "",
    user: Annotated[
        str,
        typer.Option(
            envvar="PGGUARD_USER",
            metavar="NAME",
            help="An ordinary user to become once everything is set up, for a guard that is started as root.",
            show_default=False,
        ),
    ] = "",
) -> None:
    """Run the guard in front of one PostgreSQL until SIGINT or SIGTERM; a second signal ends it at once."""
    given = {
        "upstream": upstream,
        "listen": listen,
        "mode": mode,
        "faults": faults,
        "attribution": attribution,
        "sql": sql,
        "idle_in_transaction": idle_in_transaction,
        "unread_answer": unread_answer,
        "user": user,
    }
    raise typer.Exit(serve(given, config))


@app.command("demo")
def demo_command() -> None:
    """Show in less than a minute what pgguard is for: a real PostgreSQL, a real misuse, and who did it."""
    from pgguard.demo.demonstration import run_demo  # noqa: PLC0415 - its extra need not be installed for the other commands

    raise typer.Exit(run_demo())


@app.command("explain")
def explain_command(
    kind: Annotated[
        str | None,
        typer.Argument(metavar="[KIND]", help="A kind of fault. Default: list them all.", show_default=False),
    ] = None,
) -> None:
    """Say what a kind of fault means, how it comes about and how to fix it."""
    raise typer.Exit(explain(kind))


@app.command("doctor")
def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON array instead of a table.")] = False,
) -> None:
    """Say which kinds of evidence this host allows, and how to get the others; exit status 1 if one is essential."""
    raise typer.Exit(doctor(as_json=as_json))


def main() -> None:
    """Run the command line: exit status 2 and one line on standard error for what can't be understood."""
    _open_missing_streams()
    try:
        status = app(standalone_mode=False)
    except ConfigurationError as error:
        _complain(str(error))
        sys.exit(_CONFIGURATION_ERROR)
    except RuntimeError as error:
        if str(error) != _NO_THREAD:
            raise
        _complain("no thread can be started: raise the limit on processes, RLIMIT_NPROC or pids.max of the cgroup")
        sys.exit(_CONFIGURATION_ERROR)
    except typer.TyperException as error:
        if str(error):  # it is empty when the help has been printed for want of a command
            # Typer names the nearest options, the nearest first, of one that doesn't exist.
            nearest = next(iter(getattr(error, "possibilities", None) or ()), None)
            what_to_do = "see pgguard --help" if nearest is None else f"did you mean {nearest}?"
            _complain(f"{str(error).rstrip('.')}: {what_to_do}")
        sys.exit(_CONFIGURATION_ERROR)
    sys.exit(status)


def _open_missing_streams() -> None:
    """A supervisor may start the guard with standard streams closed; their numbers must not become a socket's."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - it stays open
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - it stays open


def _complain(text: str) -> None:
    # It may quote what was given in the wrong place, and mistyped, so that no end of a password in it is certain.
    for given in _given():
        if _MAY_HOLD_A_PASSWORD.search(given):
            for quoted in (given, repr(given)[1:-1], str(Path(given))):
                text = text.replace(quoted, "…")
    line = printable(redact(" ".join(text.split())))
    print(f"pgguard: {line}", file=sys.stderr)  # noqa: T201 - the one line that a user gets


def _given() -> Iterator[str]:
    """What was given by options, arguments, and the guard's and libpq's variables."""
    for argument in sys.argv[1:]:
        yield argument.partition("=")[2] if argument.startswith("--") else argument
    for name, value in os.environ.items():
        if name.startswith("PG"):
            yield value
