"""``pgguard run``: a command behind a guard of its own, and a report when it has ended."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import trio

from pgguard.attribution.ruby.loading import FILE, UnloadableError, closed_to_others, ruby_variables
from pgguard.attribution.ruby.pipes import RubyPipes
from pgguard.cli.outputs import Outputs
from pgguard.cli.progress import progress
from pgguard.cli.serve import admin_for, lacking_evidence, otel_for, recorder_for, where_to_look
from pgguard.cli.statuses import CANNOT, DONE, FAULT_SEEN
from pgguard.cli.streams import OutputError, drop_output
from pgguard.faults.catalogue import Severity
from pgguard.faults.text import counted, listed, printable
from pgguard.launch.arrivals import Arrivals
from pgguard.launch.child import NotStarted, look_for
from pgguard.launch.companion import Companion
from pgguard.launch.environment import rewrite, write_files
from pgguard.launch.inheritance import noted
from pgguard.launch.launcher import Launcher, Order
from pgguard.launch.upstream import located, private_directory
from pgguard.proxy.errors import ConfigurationError
from pgguard.proxy.losses import Loss, remarks, spared
from pgguard.proxy.settings import load_settings, mistyped_variables
from pgguard.reporting.console import ConsoleSink, reports_of
from pgguard.reporting.log import BoundedLog
from pgguard.reporting.recorded import Gatherer
from pgguard.reporting.sinks import Fanout
from pgguard.reporting.summary import summary_lines
from pgguard.reporting.text import first_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pgguard.launch.environment import Rewritten
    from pgguard.launch.launcher import Outcome
    from pgguard.proxy.settings import Settings
    from pgguard.reporting.live.server import Admin
    from pgguard.reporting.recorded import Recording
    from pgguard.running import RunningGuard

_IN_FULL: Final = 32
"""Causes of which the report is printed: the gravest ones. Of others there is the summary."""
_READING: Final = 3600.0
"""Seconds for standard error to take what is printed in the end; a signal cuts it off."""
_WAYS_OUT: Final = (
    (
        "pgguard: if the command has the address from a file or its own arguments: let the guard listen on it, by "
        "--listen HOST:PORT, and say by --upstream where the server is"
    ),
    "pgguard: or let it listen in a directory, by --listen unix:DIR, and name that to the command in place of the host",
)
_RUBY_TOLD: Final = "Ruby programs of the command were told to load"
_NO_DATABASES: Final = (
    "databases is for pgguard serve: the guard of pgguard run is in front of one server, and has its policy from mode "
    "and kinds"
)
_NO_USER: Final = "user is not used by pgguard run: the guard is the command's parent, and stays the user that it is"
_LONGEST: Final = 1e9
"""Seconds for which the guard may be told to go on, at most."""

logger = logging.getLogger(__name__)


class Wishes(NamedTuple):
    """What ``pgguard run`` is told beside the guard's settings."""

    command: Sequence[str]
    env: Sequence[str] = ()
    """Variables to rewrite besides."""
    keep_env: Sequence[str] = ()
    """Variables to leave as they are."""
    outputs: Outputs = Outputs()
    """Files to write a report to."""
    fail_on: Severity | None = Severity.ERROR
    """From which severity of fault on it is a failure, though the command has succeeded."""
    ruby_stacks: bool = False
    """Whether Ruby programs are to tell what their threads do."""
    quiet: bool = False
    linger: float | None = None


def seconds_to_linger(text: str) -> float | None:
    """Read ``--linger``; ``None`` if it isn't given. Raises ConfigurationError."""
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= _LONGEST:  # nor is it NaN
        raise ConfigurationError(f"--linger should be a number of seconds, 0 or more, not {printable(repr(text))}")
    return seconds


def run(given: dict[str, Any], config: Path | None, wishes: Wishes) -> int:
    """Run a command behind a guard; returns the exit status.

    Args:
        given: The guard's settings from options and environment.
        config: The configuration file, if one was named.
        wishes: What else it is told.

    Raises:
        ConfigurationError: The guard can't run like that, and the command isn't started.
    """
    if not wishes.command:
        raise ConfigurationError("name the command to run, as in pgguard run -- pytest")
    try:
        look_for(wishes.command[0])
    except NotStarted as error:
        return _not_started(error)
    with Arrivals() as arrivals, Companion() as companion, ExitStack() as stack:
        starting = stack.enter_context(ExitStack())
        if not wishes.quiet:
            starting.enter_context(progress("pgguard: starting", moving=False))
        directory = stack.enter_context(private_directory())
        settings = located(load_settings(given, config), directory)
        wishes.outputs.check(("--faults", settings.faults))
        ruby = _ruby_pipes(settings, wishes)
        admin = admin_for(settings)
        telling = _Telling(settings, wishes, directory, starting, ruby, admin)
        stack.callback(telling.sinks.close)
        order = Order(
            wishes.command,
            noted(),
            prepare=telling.begin,
            go_on=telling.go_on,
            say=telling.say,
            linger=wishes.linger,
            tended=telling.tended,
            ruby=ruby,
            admin=admin,
        )
        launcher = Launcher(settings.model_copy(update={"databases": []}), telling.sinks, order, arrivals, companion)
        try:
            outcome = trio.run(launcher.run, telling.end)
        except NotStarted as error:
            starting.close()
            return _not_started(error)
        except ConfigurationError:
            raise
        except Exception:
            # Python's own status for that is one that a command may have too.
            starting.close()
            traceback.print_exc()
            return CANNOT if launcher.outcome.ended is None else launcher.outcome.ended.status
        status = _status(outcome, wishes.fail_on)
        return CANNOT if telling.has_failed and status == DONE else status


def _not_started(error: NotStarted) -> int:
    print(printable(f"pgguard: {error}"), file=sys.stderr)  # noqa: T201 - the one line that a user gets
    return error.status


def _ruby_pipes(settings: Settings, wishes: Wishes) -> RubyPipes | None:
    """What Ruby programs are asked through, if they are to be. Raises ConfigurationError: they can't be."""
    if not wishes.ruby_stacks:
        return None
    if settings.attribution == "off":
        raise ConfigurationError("--ruby-stacks: nobody's stacks are looked at with --attribution off")
    if "RUBYOPT" in wishes.keep_env:
        raise ConfigurationError("--keep-env RUBYOPT: --ruby-stacks adds to that variable, and keeps what stands in it")
    try:
        ruby_variables(noted().environment, Path())
    except UnloadableError as error:
        raise ConfigurationError(f"--ruby-stacks: {error}") from error
    return RubyPipes()


def _status(outcome: Outcome, fail_on: Severity | None) -> int:
    if outcome.ended is None:
        return 128 + (outcome.stopped_by or 0)
    return FAULT_SEEN if _is_failed(outcome, fail_on) else outcome.ended.status


def _is_failed(outcome: Outcome, fail_on: Severity | None) -> bool:
    """Whether the command has succeeded, and the guard complains."""
    if outcome.ended is None or outcome.ended.status != DONE or outcome.guard is None or fail_on is None:
        return False
    return any(count.severity.rank >= fail_on.rank for count in outcome.guard.counts())


class _Telling:
    """Tells the user what there is to be told: before the command begins, when it has ended, and not meanwhile.

    Both have one terminal, and what the command draws there is not to be torn. What is logged while it runs is held.

    Args:
        settings: The guard's.
        wishes: What else was asked for.
        directory: For files that the command's variables name.
        starting: The line that says that the guard is starting, which goes then.
        ruby: What Ruby programs are asked through, if they are.
        admin: What shows how the guard is doing, if anything does.

    Raises:
        ConfigurationError: Faults can't be written to the file that is named.
    """

    def __init__(
        self,
        settings: Settings,
        wishes: Wishes,
        directory: Path,
        starting: ExitStack,
        ruby: RubyPipes | None,
        admin: Admin | None,
    ) -> None:
        self._admin = admin
        self._user = settings.user
        self._has_databases = bool(settings.databases)
        self._wishes = wishes
        self._ruby = ruby
        self._directory = directory
        self._starting = starting
        self._fd = sys.stderr.fileno()
        self._console = ConsoleSink(self._fd, wait=True)
        self._log = BoundedLog(self._log_line)
        logging.basicConfig(level=logging.ERROR if wishes.quiet else logging.WARNING, handlers=[self._log])
        self._gatherer = Gatherer("pgguard run")
        recorder, self._otel = recorder_for(settings), otel_for(settings)
        feed = None if admin is None else admin.feed
        sinks = [one for one in (recorder, self._otel, self._gatherer, feed) if one is not None]
        self.sinks = Fanout(sinks, complain=logger.error)
        self.tended = [self._log.settle] if recorder is None else [self._log.settle, recorder.tend]
        self._rewritten = ""
        self.has_failed = False
        """A report could not be written."""

    def say(self, text: str) -> None:
        """Say a line, unless only the summary is wanted."""
        if not self._wishes.quiet:
            self._console.say(printable(f"pgguard: {text}"))

    def _log_line(self, text: str) -> None:
        self._console.say(text)

    async def begin(self, guard: RunningGuard) -> Mapping[str, str]:
        """Say what is to be known before the command begins, and give it its environment."""
        if self._otel is not None:
            self._otel.start(metrics=False)
        rewritten = await trio.to_thread.run_sync(self._rewrite, guard, abandon_on_cancel=True)
        self._rewritten = rewritten.line
        self._starting.close()
        if self._wishes.quiet:
            return rewritten.environment
        ignored = [*([_NO_USER] if self._user else []), *([_NO_DATABASES] if self._has_databases else [])]
        for warning in (*guard.warnings, *ignored, *mistyped_variables(), *rewritten.remarks):
            logger.warning("%s", warning)
        if (lacking := lacking_evidence(guard.missing)) is not None:
            logger.warning("%s", lacking)
        there = ", ".join(map(str, guard.addresses))
        ruby = "" if self._ruby is None else f"; Ruby is told by RUBYOPT to load {FILE.name}"
        tls = "" if guard.offered is None else f"; clients are offered TLS over TCP, with {guard.offered}"
        live = "" if self._admin is None else f"; {where_to_look(self._admin)}"
        [front] = guard.fronts
        self.say(f"ready on {there}, in front of PostgreSQL at {front.upstream}{tls}; {self._rewritten}{ruby}{live}")
        first, self._console = self._console, ConsoleSink(self._fd, wait=True)
        await trio.to_thread.run_sync(first.close, abandon_on_cancel=True)
        return rewritten.environment

    def _rewrite(self, guard: RunningGuard) -> Rewritten:
        [front] = guard.fronts
        rewritten = rewrite(
            noted().environment,
            front.upstream,
            front.addresses,
            directory=self._directory,
            add=self._wishes.env,
            keep=self._wishes.keep_env,
        )
        write_files(rewritten.files)
        if self._ruby is None:
            return rewritten
        added = ruby_variables(rewritten.environment, self._ruby.directory)
        return rewritten._replace(
            environment={**rewritten.environment, **added}, remarks=(*rewritten.remarks, *_ruby_remarks())
        )

    def go_on(self) -> None:
        """The command has ended: say what has been held, and from now on everything at once."""
        self._console.start()

    async def end(self, outcome: Outcome) -> None:
        """Tell the end of it, and write the reports."""
        self._starting.close()
        self.sinks.close()
        self._log.close()
        if outcome.guard is not None:
            with spared(Loss.WORDS):
                self._tell(outcome, outcome.guard)
            notes = _notes(outcome.guard, self._rewritten)
            if self._ruby is not None:
                notes.append(f"{_RUBY_TOLD} {FILE} (--ruby-stacks).")
            await trio.to_thread.run_sync(self._write, notes, abandon_on_cancel=True)
        for remark in remarks():
            self._console.say(f"pgguard: internal error: {remark}")
        await trio.to_thread.run_sync(partial(self._console.close, deadline=_READING), abandon_on_cancel=True)

    def _tell(self, outcome: Outcome, guard: RunningGuard) -> None:
        if not self._wishes.quiet and (told := self._recording().causes[:_IN_FULL]):
            faults = [first_of(cause) for cause in told]
            self._console.say(reports_of(faults, terminal=os.isatty(self._fd)).rstrip("\n"))
        counts, causes = guard.counts(), guard.causes()
        lines = summary_lines(guard.sessions, counts, causes) if guard.sessions else self._nobody_came(guard)
        lines += [printable(f"pgguard: attribution: {remark}") for remark in guard.remarks()]
        if _is_failed(outcome, self._wishes.fail_on):
            lines.append(f"pgguard: the command has succeeded, but the exit status is {FAULT_SEEN} (see --fail-on)")
        if self._ruby is not None:
            lines.append(printable(f"pgguard: {_RUBY_TOLD} {FILE} (--ruby-stacks)"))
        for line in lines:
            self._console.say(line)

    def _recording(self) -> Recording:
        return self._gatherer.recording()

    def _write(self, notes: Sequence[str]) -> None:
        """Write the reports that are wanted."""
        try:
            written = self._wishes.outputs.write(self._recording(), notes)
            sys.stdout.flush()
        except ConfigurationError as error:
            self.has_failed = True
            self._console.say(printable(f"pgguard: {error}"))
        except OutputError as error:
            self.has_failed = True
            self._console.say(f"pgguard: can't write to standard output: {error}")
            drop_output()
        else:
            if written:
                self.say(f"see {listed([str(path) for path in written])}")

    def _nobody_came(self, guard: RunningGuard) -> list[str]:
        there = ", ".join(map(str, guard.addresses))
        return [
            printable(f"pgguard: no connection came through the guard on {there}; {self._rewritten}"),
            *_WAYS_OUT,
        ]


def _notes(guard: RunningGuard, rewritten: str) -> list[str]:
    """What a page says at its top of what could be seen: sentences."""
    if guard.sessions:
        notes = [f"{counted(guard.sessions, 'connection')} went through the guard; {rewritten}."]
    else:
        notes = [f"No connection came through the guard, so there was nothing to see; {rewritten}."]
    if guard.missing:
        names = listed([capability.name for capability in guard.missing])
        notes.append(f"Some evidence wasn't available on this host: {names}. pgguard doctor says why.")
    return [*notes, *(f"Of who sent what: {remark}." for remark in guard.remarks())]


def _ruby_remarks() -> Iterator[str]:
    """What root should know whose command starts Ruby as another user: a sentence without its stop."""
    if os.geteuid() == 0 and (closed := closed_to_others()) is not None:
        yield (
            f"other users can't read {closed}, so that Ruby doesn't start if the command runs it as one of them "
            "(--ruby-stacks); install pgguard where they can"
        )
