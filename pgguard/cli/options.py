"""The options of whatever runs a guard, each declared once: what it is called, what it may say, what it means.

Values stay text here: :mod:`pgguard.proxy.settings` reads them, those of the environment and of the configuration file
alike, and says what is wrong with them. It isn't imported here: that takes as long as all the rest of a command that
needs no settings, and whoever presses TAB waits.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from pgguard.attribution import evidence
from pgguard.faults.catalogue import Severity
from pgguard.faults.policy import Mode
from pgguard.faults.sql import SqlMode
from pgguard.faults.text import nearest
from pgguard.proxy.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def completing(values: Sequence[str]) -> Callable[[str], list[str]]:
    """What completes a value that is one of these."""

    def complete(incomplete: str) -> list[str]:
        return [value for value in values if value.lower().startswith(incomplete.lower())]

    return complete


FORMATS = ("text", "junit", "github", "sarif")
"""What ``pgguard report`` can print."""
FAIL_ON = (str(Severity.ERROR), str(Severity.WARNING), "never")
"""From which severity on faults matter to the exit status."""


def _plain_option(name: str, metavar: str, text: str, *, values: Sequence[str] | None = None) -> Any:
    """An option that has no variable."""
    return typer.Option(
        f"--{name}",
        metavar=metavar,
        help=text,
        show_default=False,
        autocompletion=None if values is None else completing(values),
    )


def one_of(option: str, given: str, values: Sequence[str]) -> str:
    """Read a value that is one of these.

    Args:
        option: What it was given for.
        given: It.
        values: Those.

    Raises:
        ConfigurationError: It is none of them.
    """
    if given in values:
        return given
    close = nearest(given, values)
    hint = f"did you mean {close}?" if close else f"choose {', '.join(values[:-1])} or {values[-1]}"
    raise ConfigurationError(f"{option}: there is no {given!r}: {hint}")


def threshold(fail_on: str) -> Severity | None:
    """The severity that ``--fail-on`` names; ``None`` if it is that there is none. Raises ConfigurationError."""
    given = one_of("--fail-on", fail_on, FAIL_ON)
    return None if given not in {*Severity} else Severity(given)


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
        "Where PostgreSQL is: a libpq connection string or URI. Only the host, the port, the timeout and what is about "
        "TLS are used: each client sends its own user, database and password. Default: libpq's variables, such as "
        "PGHOST; before them, in run, DATABASE_URL.",
    ),
]
Listen = Annotated[
    list[str] | None,
    _option(
        "listen",
        "ADDR",
        "Where clients connect: HOST:PORT, or unix:DIR or unix:DIR:PORT for a Unix socket in DIR. Can be repeated; in "
        "the environment variable, separate addresses by spaces. Default: 127.0.0.1:6544; in run, a free port.",
    ),
]
TlsCert = Annotated[
    str,
    _option(
        "tls-cert",
        "PATH",
        "Offer TLS to clients over TCP, with the certificate in this file (PEM; those that vouch for it behind it). "
        "self-signed: with one made at the start, for clients that don't check it (sslmode=require). Default: no TLS.",
        values=["self-signed"],
    ),
]
TlsKey = Annotated[Path | None, _option("tls-key", "PATH", "The private key of the certificate.")]
TlsCa = Annotated[
    Path | None,
    _option(
        "tls-ca",
        "PATH",
        "Ask clients for a certificate, and refuse those that one of these CAs hasn't signed. Default: don't ask.",
    ),
]
ModeChoice = Annotated[
    str,
    _option(
        "mode",
        "MODE",
        "What to do when a fault is an error. log: record it, and let the session go on. reject: also end the session, "
        "and tell its client why. Default: log.",
        values=list(Mode),
    ),
]
Faults = Annotated[Path | None, _option("faults", "PATH", "Append faults to this file, one line of JSON each.")]
Otel = Annotated[
    bool | None,
    typer.Option(
        "--otel",
        envvar="PGGUARD_OTEL",
        help="Send faults, and in serve metrics, to an OpenTelemetry collector, by OTLP over HTTP. OpenTelemetry's "
        "own variables say where it is; by default, at http://localhost:4318.",
        show_default=False,
    ),
]
Admin = Annotated[
    str,
    _option(
        "admin",
        "HOST:PORT",
        "Where to show a live page, an API and metrics for Prometheus (extra admin). If other hosts can reach it, a "
        "token is needed. Default: nowhere.",
    ),
]
AdminTokenFile = Annotated[
    Path | None,
    _option(
        "admin-token-file",
        "PATH",
        "A file with the token that the live page asks for, and that API and metrics take as Authorization: Bearer.",
    ),
]
Config = Annotated[
    Path | None,
    _option("config", "PATH", "The configuration file (TOML). Default: pgguard.toml in this directory, if it exists."),
]
Attribution = Annotated[
    str,
    _option(
        "attribution",
        "HOW",
        "How to find out which process did it. auto: with all the evidence that this host allows. ebpf: the same, but "
        "refuse to start unless the kernel names senders on TCP. proc: the same, but refuse to start unless processes "
        "and their sockets can be looked up. off: don't find out. Default: auto.",
        values=get_args(evidence.Attribution),
    ),
]
Sql = Annotated[
    str,
    _option(
        "sql",
        "HOW",
        "How to show SQL. normalized: with $1, $2 and so on in place of values. full: as it was sent. none: not at "
        "all. Secrets are never shown. Default: normalized.",
        values=list(SqlMode),
    ),
]
IdleInTransaction = Annotated[
    str,
    _option(
        "idle-in-transaction",
        "SECONDS",
        "How long a transaction may sit idle before it is reported. 0: no limit. Default: 60.",
    ),
]
UnreadAnswer = Annotated[
    str,
    _option(
        "unread-answer",
        "SECONDS",
        "How long a complete answer may lie unread in the client's socket before it is reported. 0: no limit. "
        "Default: 5.",
    ),
]
EvidenceBudget = Annotated[
    str,
    _option(
        "evidence-budget",
        "SECONDS",
        "How long a session may be held up, at most, while pgguard collects evidence of a fault that is new. 0: not at "
        "all. Default: 0.25.",
    ),
]
User = Annotated[
    str,
    _option("user", "NAME", "If root starts pgguard: the ordinary user to become once everything is set up."),
]

Html = Annotated[
    Path | None,
    _plain_option("html", "OUT.html", "Write the report as a page for browsers, which needs nothing else."),
]
Css = Annotated[
    Path | None,
    _plain_option(
        "css",
        "OUT.css",
        "Write the style of the page to this file, for servers that allow none within a page (Jenkins).",
    ),
]
Markdown = Annotated[
    Path | None,
    _plain_option("markdown", "OUT.md", "Write the report as Markdown, for an issue: at most 65,536 characters."),
]
Format = Annotated[
    str | None,
    _plain_option(
        "format",
        "HOW",
        "What to print. text: as serve does. junit: a test case for each cause. github: an annotation for each cause, "
        "and the rest in the summary of the job. sarif: for code scanning. Default: text, if no file is written.",
        values=FORMATS,
    ),
]
ReportFailOn = Annotated[
    str | None,
    _plain_option(
        "fail-on",
        "SEVERITY",
        "End with status 66 if there is a fault of at least this severity: error or warning; never: don't. In junit, "
        "it is also what fails. Default: never; in junit, errors fail.",
        values=FAIL_ON,
    ),
]
Root = Annotated[
    Path | None,
    _plain_option(
        "root",
        "DIR",
        "Where the application's sources are, as it is called where it runs (/app in a container): github and sarif "
        "name files relative to it. Default: $GITHUB_WORKSPACE, or this directory.",
    ),
]
Env = Annotated[
    list[str] | None,
    _plain_option(
        "env",
        "NAME",
        "A variable to rewrite although it doesn't lead to the server, as far as pgguard can tell. Can be repeated.",
    ),
]
KeepEnv = Annotated[
    list[str] | None,
    _plain_option("keep-env", "NAME", "A variable to leave as it is. Can be repeated."),
]
RunFailOn = Annotated[
    str,
    _plain_option(
        "fail-on",
        "SEVERITY",
        "End with status 66 if the command has succeeded, but there was a fault of at least this severity: error or "
        "warning; never: don't. Default: error.",
        values=FAIL_ON,
    ),
]
RubyStacks = Annotated[
    bool,
    typer.Option(
        "--ruby-stacks",
        help="Show the lines of code of Ruby programs, too: each Ruby loads a small file of pgguard's as it starts (by "
        "RUBYOPT), in which a thread tells pgguard what the others do.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but the summary at the end.")]
Linger = Annotated[
    str,
    _plain_option(
        "linger",
        "SECONDS",
        "How long the guard goes on, at most, when the command has ended: while a connection is still open, or a "
        "process runs that it has left behind. Default: as long as a connection is open.",
    ),
]
