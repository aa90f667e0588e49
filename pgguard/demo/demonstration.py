"""The demonstration: what runs, in which order, and how all of it ends.

The application runs twice over each of the guard's transports, nearly all at once: sharing one connection between its
workers, and with that mistake corrected. What each run printed is shown beside what the guard said about it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import trio
from psycopg.conninfo import make_conninfo
from rich.console import Console

from pgguard.cli.entry import ENDING, UNUSED
from pgguard.cli.progress import progress
from pgguard.cli.signals import Signals
from pgguard.demo.postgres import NotInstalledError, ServerFailedError, embedded_bindir, running_cluster
from pgguard.faults.text import listed
from pgguard.proxy.addresses import TcpAddress
from pgguard.proxy.errors import ConfigurationError
from pgguard.proxy.settings import Settings
from pgguard.reporting.console import ConsoleSink
from pgguard.reporting.jsonl import JsonLines
from pgguard.reporting.sinks import Fanout
from pgguard.running import running_guard

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
    from typing import TextIO, TypeAlias

    from pgguard.proxy.addresses import Address

    _Outcome: TypeAlias = "int | tuple[Sequence[_Run], _Findings]"
    """An exit status, or what is to be shown."""

_SECONDS = 16.0
"""How long everything may take before it is called off. Ending what was started takes at most 4 more."""

_POSTGRES_SECONDS = 10.0
_GUARD_STOP_SECONDS = 1.5
_APART = 1.0
"""Seconds from one transport's runs to the next one's, so that the stacks of either aren't read at the same time."""
_EVIDENCE_SECONDS = 1.0
"""More than by default, as the machine may be busy with something else, and shall show what there is to see."""

logger = logging.getLogger(__name__)

_GRAVITY = ("error", "warning", "info")
_APPLICATION = "app.py"
_FAULTS = "faults.jsonl"
_LOG = "guard.log"

_NEXT = """\
Put pgguard in front of your own PostgreSQL, on your application's host and as the same user:

    pgguard serve --upstream postgresql://db.example.com --faults faults.jsonl
    DATABASE_URL=postgresql://app@127.0.0.1:6544/app  your-application

Over a Unix socket the kernel names the sender of every byte, so use one if your application can:

    pgguard serve --upstream postgresql://db.example.com --listen unix:/tmp
    DATABASE_URL=postgresql://app@/app?host=/tmp  your-application

With --mode reject, pgguard ends a misused session before anybody gets another's answer."""


@dataclass(frozen=True, slots=True)
class _Run:
    """One run of the application, through one of the guard's listeners."""

    application: Path
    transport: str
    host: str
    port: int
    fixed: bool
    seen: Counter[str]
    """What it printed: each line, and how often."""

    @property
    def name(self) -> str:
        """What it calls itself to PostgreSQL, so that its sessions can be told from the other runs'."""
        return f"{'fixed' if self.fixed else 'misusing'} app, {self.transport}"

    @property
    def database_url(self) -> str:
        return make_conninfo(
            host=self.host, port=self.port, user="postgres", dbname="postgres", application_name=self.name
        )

    async def perform(self) -> None:
        command = [sys.executable, str(self.application), *(["--fixed"] if self.fixed else [])]
        done = await trio.run_process(
            command,
            env=os.environ | {"DATABASE_URL": self.database_url},
            capture_stdout=True,
            stderr=subprocess.STDOUT,
            check=False,
            start_new_session=True,
            deliver_cancel=_kill_session,
        )
        self.seen.update(done.stdout.decode(errors="replace").splitlines())


class _FailedError(Exception):
    """The demonstration can't go on; the message says why."""


def run_demo(console: Console | None = None) -> int:
    """Run the demonstration and print what it shows.

    It ends within 20 seconds whatever happens, and on every signal that would end it by default, and removes everything
    that it started or wrote before it prints anything.

    Returns:
        The exit status: 0 when the guard recorded the misuse over both transports and nothing about the
        corrected application, 1 when it did not or something went wrong, 2 when the embedded PostgreSQL is
        not installed, and 128 plus its number when a signal ended it.
    """
    console = console or Console(highlight=False)
    with Signals(*ENDING, signal.SIGHUP, *UNUSED) as signals:
        outcome = trio.run(_until_signalled, console.width, signals)
    return outcome if isinstance(outcome, int) else _show(console, *outcome)


async def _until_signalled(width: int, signals: Signals) -> _Outcome:
    outcome: _Outcome = 1

    async def wait_for_signal(cancel_scope: trio.CancelScope) -> None:
        nonlocal outcome
        outcome = 128 + await signals.wait()
        cancel_scope.cancel()

    with signals.listening():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_for_signal, nursery.cancel_scope)
            outcome = await _within_time(width)
            nursery.cancel_scope.cancel()
    return outcome


async def _within_time(width: int) -> _Outcome:
    status = 1
    try:
        with trio.fail_after(_SECONDS):
            return await _demonstrate(width)
    except NotInstalledError as error:
        complaint = str(error)
        status = 2
    except (ServerFailedError, _FailedError) as error:
        complaint = str(error)
    except trio.TooSlowError:
        complaint = f"stopped, because it took more than {_SECONDS:.0f} seconds"
    _show_plain(Console(stderr=True, highlight=False), f"pgguard: demo: {complaint}")
    return status


async def _demonstrate(width: int) -> tuple[Sequence[_Run], _Findings]:
    bindir = embedded_bindir()
    with ExitStack() as stack:
        say = stack.enter_context(progress("Starting PostgreSQL"))
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pgguard-demo-")))
        running = running_cluster(bindir, timeout=_POSTGRES_SECONDS)
        cluster = await trio.to_thread.run_sync(stack.enter_context, running)
        say("Starting the guard in front of it")
        async with _guarding(cluster.conninfo, directory, width) as listeners:
            say("Running an application that shares a connection between two workers, and a corrected one")
            runs = await _perform(directory, listeners)
        findings = _Findings.read(directory)
        say("Stopping PostgreSQL")
    return runs, findings


@asynccontextmanager
async def _guarding(upstream: str, directory: Path, width: int) -> AsyncIterator[list[tuple[str, str, int]]]:
    """Run a guard that writes what it finds and prints to a directory.

    Yields its listeners: transport, host and port of each.
    """
    with ExitStack() as stack:
        log = stack.enter_context((directory / _LOG).open("w"))
        stack.enter_context(_logging_to(log))
        printed = ConsoleSink(log.fileno(), width=width)
        sinks = Fanout([JsonLines(directory / _FAULTS), printed], complain=logger.error)
        stack.callback(sinks.close)
        settings = Settings(
            upstream=upstream,
            listen=["127.0.0.1:0", f"unix:{directory}"],
            evidence_budget=_EVIDENCE_SECONDS,
            shutdown_timeout=_GUARD_STOP_SECONDS,
        )
        try:
            async with running_guard(settings, sinks) as guard:
                yield [_place(address) for address in guard.addresses]
        except ConfigurationError as error:
            raise _FailedError(f"the guard did not start: {error}") from error


def _place(address: Address) -> tuple[str, str, int]:
    if isinstance(address, TcpAddress):
        return "TCP", address.host, address.port
    return "Unix socket", address.directory, address.port


@contextmanager
def _logging_to(log: TextIO) -> Iterator[None]:
    """Keep what a guard logs from what is shown."""
    handler = logging.StreamHandler(log)
    package = logging.getLogger("pgguard")
    package.addHandler(handler)
    package.propagate = False
    try:
        yield
    finally:
        package.propagate = True
        package.removeHandler(handler)


async def _kill_session(process: trio.Process) -> None:
    """End the application together with its workers, which have no other parent to end them."""
    os.killpg(process.pid, signal.SIGKILL)


async def _perform(directory: Path, listeners: Sequence[tuple[str, str, int]]) -> list[_Run]:
    runs = [
        _Run(_application(directory / transport.replace(" ", "-")), transport, host, port, fixed=fixed, seen=Counter())
        for fixed in (False, True)
        for transport, host, port in listeners
    ]
    async with trio.open_nursery() as nursery:
        for listener in listeners:
            for run in runs:
                if (run.transport, run.host, run.port) == listener:
                    nursery.start_soon(run.perform)
            await trio.sleep(_APART)
    return runs


def _application(directory: Path) -> Path:
    """The application's file in a directory of its own.

    Not where it is installed: what is there is a library's code, as far as a report can tell. And each transport has
    one of its own, as what the same program does over another one would be the same cause, with a single report.
    """
    directory.mkdir(exist_ok=True)
    return Path(shutil.copy(Path(__file__).with_name(_APPLICATION), directory))


@dataclass(frozen=True, slots=True)
class _Findings:
    """What the guard said."""

    faults: Sequence[dict[str, Any]]
    """Its record, in order."""
    reports: Mapping[int, str]
    """What it printed about a fault, by the fault's number."""

    @classmethod
    def read(cls, directory: Path) -> _Findings:
        """Read what a guard has left in its directory, when it has ended."""
        faults = [json.loads(line) for line in (directory / _FAULTS).read_text().splitlines()]
        # A report goes from a line of equals signs to its summary line, which ends with the fault's number.
        report = re.compile(r"^=+\n((?:(?!=+\n).*\n)*?SUMMARY: .*\(fault (\d+), session \d+\))$", re.MULTILINE)
        printed = report.finditer((directory / _LOG).read_text())
        return cls(faults, {int(found[2]): found[1] for found in printed})

    def of(self, run: _Run) -> list[dict[str, Any]]:
        """The faults in the sessions of one run of the application."""
        return [fault for fault in self.faults if fault["session"]["application_name"] == run.name]

    def report(self, fault: dict[str, Any]) -> str:
        return self.reports.get(fault["id"], fault["summary"])


def _show(console: Console, runs: Sequence[_Run], findings: _Findings) -> int:
    status = 0
    for run in runs:
        title = "The same application, corrected," if run.fixed else "One connection, two workers,"
        console.rule(f"{title} over {run.transport}", align="left")
        _show_seen(console, run)
        found = findings.of(run)
        told = found if run.fixed else sorted(found, key=_gravity)[:1]
        console.print()
        _show_prose(console, f"pgguard saw {_kinds(found) or 'nothing wrong'}.{_how_told(told, run)}")
        for fault in told:
            _show_plain(console, findings.report(fault))
        if run.fixed == bool(told):
            status = 1
        console.print()
    console.rule("What to do next", align="left")
    console.print()
    _show_prose(console, _NEXT)
    return status


def _gravity(fault: Mapping[str, Any]) -> int:
    return _GRAVITY.index(fault["severity"])


def _how_told(told: Sequence[Mapping[str, Any]], run: _Run) -> str:
    """What to say in front of what is told of a run."""
    if run.fixed or not told:
        return ""
    if told[0]["repeat_of"] is None:
        return " The most serious one:\n"
    return f" The most serious one has the same cause as fault {told[0]['repeat_of']}, and so no report of its own:\n"


def _show_seen(console: Console, run: _Run) -> None:
    if not run.seen:
        console.print("The application saw only its own answers.")
        return
    console.print("What the application saw:\n")
    for line, times in run.seen.items():
        said = f"{line} ({times} times)" if times > 1 else line
        _show_plain(console, fill(said, console.width, initial_indent=" " * 4, subsequent_indent=" " * 6))


def _show_prose(console: Console, text: str) -> None:
    """Print lines as broad as the terminal is, but for those that are indented, which are to be copied."""
    for line in text.split("\n"):
        _show_plain(console, line if line.startswith(" ") else fill(line, console.width))


def _show_plain(console: Console, text: str) -> None:
    """Print text that somebody else has laid out, or that is to be copied."""
    console.print(text, markup=False, soft_wrap=True)


def _kinds(faults: Sequence[dict[str, Any]]) -> str:
    """Which kinds of fault were seen. How often, a run doesn't tell: what comes again is counted for all runs."""
    return listed(list(dict.fromkeys(str(fault["kind"]) for fault in faults)))
