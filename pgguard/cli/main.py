"""The command line."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import textwrap
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

from pgguard.cli import options
from pgguard.cli.entry import importing
from pgguard.cli.explain import explain, software_names
from pgguard.cli.statuses import CANNOT, STATUSES
from pgguard.cli.streams import OutputError, drop_output
from pgguard.compiled import form
from pgguard.faults.text import nearest, printable
from pgguard.proxy.errors import ConfigurationError
from pgguard.proxy.remedies import is_exhaustion, remedy
from pgguard.secrets.text import may_hold_a_password, redact
from pgguard.session.verdicts import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator

_NAME: Final = "pgguard"
_NO_THREAD: Final = "can't start new thread"
"""What Python says then."""
_NO_COMMAND: Final = re.compile(r"No such command '(.*)'\.", re.DOTALL)
_SINGLE: Final = re.compile(r"-[^-]+")
_FRAMED_WIDTH: Final = 72
"""Columns that a command's help takes at least if its options are to stand in a frame."""


def _examples(*examples: str) -> str:
    """The end of a help text. No line of it may be so long that a narrow terminal breaks it: it couldn't be pasted."""
    return escape("\n".join(["Examples:", *(f"\n{example}" for example in examples)]))


def _without_types_of_flags(params: Any) -> Any:
    """Parameters, of which those that take no value show no type in a help text."""
    for param in params:
        if getattr(param, "is_flag", False):
            param.metavar = ""
    return params


class _Group(TyperGroup):
    def get_params(self, ctx: Any) -> Any:
        return _without_types_of_flags(super().get_params(ctx))


class _Command(TyperCommand):
    """Its help loses nothing on a narrow terminal, where a frame around columns would cut off names of options."""

    def get_params(self, ctx: Any) -> Any:
        return _without_types_of_flags(super().get_params(ctx))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        if shutil.get_terminal_size().columns < _FRAMED_WIDTH:
            self.rich_markup_mode = None
        super().format_help(ctx, formatter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002 - as it is called
        formatter.write(f"\n{textwrap.indent(self.epilog or '', ' ')}\n")


_STATUSES: Final = "\n".join(f"  {status:5}  {meaning}" for status, meaning in STATUSES)

app = typer.Typer(
    name=_NAME,
    cls=_Group,
    help="A transparent guard in front of PostgreSQL that catches misused connections and names who did it.",
    epilog=_examples(
        "pgguard demo",
        "pgguard serve --upstream postgresql://db.example.com",
        "pgguard report faults.jsonl --html report.html",
        "pgguard explain shared-by-processes --for gunicorn",
    )
    + f"\n\nExit status:\n\n{_STATUSES}",
    no_args_is_help=True,
    suggest_commands=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"{_NAME} {version(_NAME)} ({form()})")  # noqa: T201 - the answer
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, and exit."),
    ] = False,
) -> None:
    pass


@app.command(
    "serve",
    cls=_Command,
    help="Run the guard in front of one PostgreSQL, until Ctrl-C or SIGTERM.\n\n"
    "Open sessions may then finish; a second Ctrl-C or SIGTERM, or SIGQUIT, ends them at once. SIGHUP reopens the "
    "file that faults are written to, and rereads the configuration file and the certificate.",
    epilog=_examples(
        "pgguard serve --upstream postgresql://db.example.com",
        "pgguard serve --upstream 'host=db.example.com port=5432' \\\n  --faults faults.jsonl --mode reject",
        "mkdir -p ~/pgguard\npgguard serve --upstream postgresql://db.example.com \\\n"
        "  --listen 127.0.0.1:6544 --listen unix:$HOME/pgguard",
    ),
)
def serve_command(  # noqa: PLR0913, PLR0917 - one for each option
    upstream: options.Upstream = "",
    listen: options.Listen = None,
    tls_cert: options.TlsCert = "",
    tls_key: options.TlsKey = None,
    tls_ca: options.TlsCa = None,
    mode: options.ModeChoice = "",
    faults: options.Faults = None,
    admin: options.Admin = "",
    admin_token_file: options.AdminTokenFile = None,
    otel: options.Otel = None,
    config: options.Config = None,
    attribution: options.Attribution = "",
    sql: options.Sql = "",
    idle_in_transaction: options.IdleInTransaction = "",
    unread_answer: options.UnreadAnswer = "",
    evidence_budget: options.EvidenceBudget = "",
    user: options.User = "",
) -> None:
    """Run the guard in front of one PostgreSQL, until Ctrl-C or SIGTERM."""
    with importing():
        from pgguard.cli.serve import serve  # noqa: PLC0415 - whoever completes a command needn't wait for it

    given = {
        "upstream": upstream,
        "listen": listen,
        "tls_cert": tls_cert,
        "tls_key": tls_key,
        "tls_ca": tls_ca,
        "mode": mode,
        "faults": faults,
        "admin": admin,
        "admin_token_file": admin_token_file,
        "otel": otel,
        "attribution": attribution,
        "sql": sql,
        "idle_in_transaction": idle_in_transaction,
        "unread_answer": unread_answer,
        "evidence_budget": evidence_budget,
        "user": user,
    }
    raise typer.Exit(serve(given, config))


@app.command(
    "run",
    cls=_Command,
    help="Run a command behind a guard of its own, and print a report when it has ended.\n\n"
    "The guard stands in front of the PostgreSQL that DATABASE_URL or libpq's variables lead to, and the command gets "
    "variables that lead to the guard. Streams, terminal, signals and exit status are the command's own.",
    epilog=_examples(
        "pgguard run -- pytest",
        "pgguard run --ruby-stacks -- bundle exec puma",
        "pgguard run --upstream postgresql://db.example.com \\\n  --fail-on warning -- python3 app.py",
    ),
    context_settings={"allow_interspersed_args": False},
    options_metavar="[OPTIONS] --",
)
def run_command(  # noqa: PLR0913, PLR0917 - one for each option
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="CMD [ARG]", help="The command, and its arguments.", show_default=False),
    ] = None,
    upstream: options.Upstream = "",
    listen: options.Listen = None,
    tls_cert: options.TlsCert = "",
    tls_key: options.TlsKey = None,
    tls_ca: options.TlsCa = None,
    mode: options.ModeChoice = "",
    faults: options.Faults = None,
    admin: options.Admin = "",
    admin_token_file: options.AdminTokenFile = None,
    otel: options.Otel = None,
    config: options.Config = None,
    attribution: options.Attribution = "",
    sql: options.Sql = "",
    idle_in_transaction: options.IdleInTransaction = "",
    unread_answer: options.UnreadAnswer = "",
    evidence_budget: options.EvidenceBudget = "",
    env: options.Env = None,
    keep_env: options.KeepEnv = None,
    html: options.Html = None,
    css: options.Css = None,
    markdown: options.Markdown = None,
    fail_on: options.RunFailOn = "error",
    ruby_stacks: options.RubyStacks = False,
    quiet: options.Quiet = False,
    linger: options.Linger = "",
) -> None:
    """Run a command behind a guard of its own."""
    with importing():
        from pgguard.cli.outputs import Outputs  # noqa: PLC0415 - likewise
        from pgguard.cli.run import Wishes, run, seconds_to_linger  # noqa: PLC0415 - likewise

    given = {
        "upstream": upstream,
        "listen": listen,
        "tls_cert": tls_cert,
        "tls_key": tls_key,
        "tls_ca": tls_ca,
        "mode": mode,
        "faults": faults,
        "admin": admin,
        "admin_token_file": admin_token_file,
        "otel": otel,
        "attribution": attribution,
        "sql": sql,
        "idle_in_transaction": idle_in_transaction,
        "unread_answer": unread_answer,
        "evidence_budget": evidence_budget,
    }
    wishes = Wishes(
        command or (),
        env=env or (),
        keep_env=keep_env or (),
        outputs=Outputs(html, css, markdown),
        fail_on=options.threshold(fail_on),
        ruby_stacks=ruby_stacks,
        quiet=quiet,
        linger=seconds_to_linger(linger),
    )
    raise typer.Exit(run(given, config, wishes))


@app.command("demo", cls=_Command, epilog=_examples("pgguard demo"))
def demo_command() -> None:
    """Show in less than a minute what pgguard does, with a real PostgreSQL and an application that misuses it."""
    from pgguard.demo.demonstration import run_demo  # noqa: PLC0415 - its extra need not be installed for the other commands

    raise typer.Exit(run_demo())


@app.command(
    "explain",
    cls=_Command,
    epilog=_examples(
        "pgguard explain",
        "pgguard explain shared-by-processes",
        "pgguard explain shared-by-processes \\\n  --for gunicorn --for Django",
    ),
)
def explain_command(
    kind: Annotated[
        str | None,
        typer.Argument(
            metavar="KIND",
            help="The kind of fault. Leave it out to list all kinds.",
            show_default=False,
            autocompletion=options.completing(list(Kind)),
        ),
    ] = None,
    software: Annotated[
        list[str] | None,
        typer.Option(
            "--for",
            metavar="FRAMEWORK",
            help="Show the fix for this framework, library or language. Repeat it for several that run in one process.",
            show_default=False,
            autocompletion=options.completing(software_names()),
        ),
    ] = None,
) -> None:
    """Explain a kind of fault: what it means, how it happens, and how to fix it."""
    raise typer.Exit(explain(kind, software or ()))


@app.command(
    "report",
    cls=_Command,
    help="Turn recorded faults into a report: for people, for CI, for code scanning.\n\n"
    "FAULTS.jsonl is a file that --faults has written, also of several runs, or compressed with gzip; - is standard "
    "input. Without an option the report is printed.",
    epilog=_examples(
        "pgguard report faults.jsonl",
        "pgguard report faults.jsonl --html report.html",
        "pgguard report faults.jsonl --markdown report.md",
        "pgguard report faults.jsonl --format junit > faults.xml",
    ),
)
def report_command(
    faults: Annotated[
        Path | None,
        typer.Argument(metavar="FAULTS.jsonl", help="The file of faults; -: standard input.", show_default=False),
    ] = None,
    html: options.Html = None,
    css: options.Css = None,
    markdown: options.Markdown = None,
    form: options.Format = None,
    fail_on: options.ReportFailOn = None,
    root: options.Root = None,
) -> None:
    """Turn recorded faults into a report."""
    from pgguard.cli.outputs import Outputs  # noqa: PLC0415 - whoever completes a command needn't wait for it
    from pgguard.cli.report import report  # noqa: PLC0415 - likewise

    if faults is None:
        raise ConfigurationError("name the file that --faults has written: pgguard report FAULTS.jsonl")
    status = report(faults, Outputs(html, css, markdown), form=form, fail_on=fail_on, root=root)
    raise typer.Exit(status)


@app.command("doctor", cls=_Command, epilog=_examples("pgguard doctor", "pgguard doctor --json"))
def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON array instead of a table.")] = False,
) -> None:
    """Try every kind of evidence on this host; say which ones work, and how to get the others."""
    from pgguard.cli.doctor import doctor  # noqa: PLC0415 - likewise

    raise typer.Exit(doctor(as_json=as_json))


def main() -> None:
    """Run the command line: exit status 2 and one line on standard error for what can't be understood, or printed."""
    try:
        try:
            status = _run()
        finally:
            sys.stdout.flush()
    except OutputError as error:
        drop_output()
        if error.nobody_reads:
            sys.exit(128 + signal.SIGPIPE)  # as of a program that the signal ends, which Python ignores
        _complain(f"can't write to standard output: {error}")
        sys.exit(CANNOT)
    sys.exit(status)


def _run() -> int:
    try:
        status: int = app(prog_name=_NAME, standalone_mode=False)
    except ConfigurationError as error:
        _complain(str(error))
        return CANNOT
    except OSError as error:
        if not is_exhaustion(error.errno):
            raise
        _complain(f"{os.strerror(error.errno)}: {remedy(error.errno)}")
        return CANNOT
    except RuntimeError as error:
        if str(error) != _NO_THREAD:
            raise
        _complain(
            "the system doesn't let pgguard start another thread: raise the limit on processes (ulimit -u), or the "
            "cgroup's pids.max (TasksMax= in a systemd unit)"
        )
        return CANNOT
    except typer.TyperException as error:
        if str(error):  # it is empty when no command was given and the help has been printed
            _complain(f"{str(error).rstrip('.')}: {_what_to_do(error)}")
        return CANNOT
    return status


def _what_to_do(error: typer.TyperException) -> str:
    """What to say to somebody who has mistyped a name: the nearest one that exists, or which help to read."""
    context: typer.Context | None = getattr(error, "ctx", None)
    if context is None:
        command = next((word for word in sys.argv[1:] if word in _commands()), None)
        return f"see {' '.join(filter(None, (_NAME, command)))} --help"
    if typed := _NO_COMMAND.fullmatch(str(error)):
        meant = _command_meant(typed[1])
    else:
        meant = _option_meant(getattr(error, "option_name", None), context)
    return f"see {context.command_path} --help" if meant is None else f"did you mean {meant}?"


def _commands() -> list[str]:
    return [str(command.name) for command in app.registered_commands]


def _command_meant(typed: str) -> str | None:
    commands = {command: f"{_NAME} {command}" for command in _commands()}
    commands |= {"help": f"{_NAME} --help", "version": f"{_NAME} --version"}
    close = nearest(typed, commands)
    return None if close is None else commands[close]


def _option_meant(typed: str | None, context: typer.Context) -> str | None:
    if typed is None:
        return None
    if _SINGLE.fullmatch(typed):
        # One hyphen before a long name: of that only the first letter is taken for the option.
        words = [argument.partition("=")[0] for argument in sys.argv[1:] if argument.startswith(typed)]
        typed = next((f"-{word}" for word in words if len(word) > 2), typed)
    long = [name for parameter in context.command.get_params(context) for name in parameter.opts if name[:2] == "--"]
    if (close := nearest(typed, long)) is not None:
        return close
    for name, command in getattr(context.find_root().command, "commands", {}).items():
        if any(typed in parameter.opts for parameter in command.params):
            return f"{_NAME} {name} {typed}"
    return None


def _complain(text: str) -> None:
    # It may quote what was given in the wrong place, and mistyped, so that no end of a password in it is certain.
    for given in _given():
        if may_hold_a_password(given):
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
