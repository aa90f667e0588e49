"""``pgguard serve``: the guard put together and run."""

from __future__ import annotations

import logging
import signal
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import trio

from pgguard.cli.entry import ENDING, UNUSED
from pgguard.cli.progress import progress
from pgguard.cli.signals import Signals, name_of
from pgguard.faults.text import counted, printable
from pgguard.proxy.addresses import unused_database_url
from pgguard.proxy.errors import ConfigurationError
from pgguard.proxy.losses import Loss, keep_going, remarks, spared
from pgguard.proxy.settings import Front, Settings, load_settings, mistyped_variables, reload_settings
from pgguard.proxy.shortcut import advice_on, shortcut
from pgguard.reporting.console import ConsoleSink
from pgguard.reporting.jsonl import JsonLines
from pgguard.reporting.log import BoundedLog
from pgguard.reporting.sinks import Fanout, SinkError
from pgguard.reporting.summary import summary_lines
from pgguard.running import running_guard, tend

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from pgguard.attribution.capabilities import Capability
    from pgguard.attribution.privileges import Account
    from pgguard.reporting.live.server import Admin
    from pgguard.reporting.otel.sink import Otel
    from pgguard.running import RunningGuard

_FIGURES: Final = 5.0
"""Seconds between two looks at the figures that are sent to a collector."""

logger = logging.getLogger(__name__)
bounded = logging.getLogger("pgguard.signals")
"""Says what anybody may make it say as often as they like: unlike the command's own logger it says it a few times, and
then how often."""


class _Voice:
    """Says what is logged, without holding anybody up.

    It is held back until the guard can run as it was told to: else the user gets one line, which says why not.

    Args:
        console: What it is said on.
        starting: The line that says that the guard is starting, which goes then.
    """

    def __init__(self, console: ConsoleSink, starting: ExitStack) -> None:
        self._console = console
        self._starting = starting
        self._held: list[str] | None = []

    def __call__(self, text: str) -> None:
        if self._held is None:
            self._console.say(text)
        else:
            self._held.append(text)

    def begin(self) -> None:
        """Say what has been held back, and from now on everything at once; the console gets its thread."""
        self._starting.close()
        held, self._held = self._held or [], None
        self._console.start()
        for text in held:
            self._console.say(text)


class _Reloader:
    """Does what SIGHUP asks for: reopens the file of faults, and reads configuration and certificate anew.

    Args:
        settings: Those that the guard has been started with.
        given: What options and environment say, which comes before the file.
        config: The file, if one was named.
        recorder: What appends to the file of faults, if there is one.
    """

    def __init__(
        self, settings: Settings, given: dict[str, Any], config: Path | None, recorder: JsonLines | None
    ) -> None:
        self._settings = settings
        self._given = given
        self._config = config
        self._recorder = recorder

    async def reload(self, guard: RunningGuard) -> None:
        """Reload a guard's settings and its certificate, and say what has been changed, and what can't be.

        With an error nothing is changed of what it is about. Never raises but for cancellation.
        """
        await self._reload_settings(guard)
        try:
            renewed = await guard.renew_certificate()
        except ConfigurationError as error:
            logger.error("SIGHUP: new clients are shown the old certificate: %s", error)  # noqa: TRY400 - likewise
        except Exception:
            logger.exception("SIGHUP: new clients are shown the old certificate")
        else:
            if renewed is not None:
                logger.info("SIGHUP: new clients are shown %s", renewed)
        for front in guard.fronts:
            try:
                if await guard.read_server_files(front):
                    logger.info("SIGHUP: read the files again that are for TLS to %s", front.server)
            except ConfigurationError as error:
                logger.error("SIGHUP: TLS to %s stays as it is: %s", front.server, error)  # noqa: TRY400 - likewise
            except Exception:
                logger.exception("SIGHUP: TLS to %s stays as it is", front.server)

    async def _reload_settings(self, guard: RunningGuard) -> None:
        try:
            reloaded = await trio.to_thread.run_sync(
                reload_settings, self._settings, self._given, self._config, abandon_on_cancel=True
            )
            self._reopen(reloaded.settings)
            guard.reload(reloaded.settings)
        except ConfigurationError as error:
            logger.error("SIGHUP: nothing has changed: %s", error)  # noqa: TRY400 - it is the user's
            return
        except Exception:
            logger.exception("SIGHUP: nothing has changed")
            return
        self._settings = reloaded.settings
        for remark in reloaded.remarks:
            logger.info("SIGHUP: %s", remark)
        if not reloaded.remarks:
            logger.info("SIGHUP: no setting has changed")

    def _reopen(self, settings: Settings) -> None:
        if self._recorder is None or settings.faults is None:
            return
        if settings.faults != self._settings.faults:
            try:
                self._recorder.move(settings.faults)
            except SinkError as error:
                raise ConfigurationError(f"faults: {error}") from error
            return
        try:
            self._recorder.reopen()
        except SinkError as error:
            logger.error("SIGHUP: %s; faults still go to the file that is open", error)  # noqa: TRY400 - likewise
        else:
            logger.info("SIGHUP: reopened %s", settings.faults)


class _Orders:
    """Does what signals ask for.

    SIGINT and SIGTERM let sessions finish; the second of them doesn't, nor does SIGQUIT. Each of the three ends a guard
    that isn't ready yet. SIGHUP reloads the settings, once it is. The others mean nothing.

    Args:
        signals: What has come and comes.
        reloader: Does what SIGHUP asks for.
        starting: What is cancelled to end a guard that isn't ready yet.
    """

    def __init__(self, signals: Signals, reloader: _Reloader, starting: trio.CancelScope) -> None:
        self._signals = signals
        self._reloader = reloader
        self._starting = starting
        self._guard: RunningGuard | None = None
        self._told = 0
        self._hung_up = trio.Event()
        self.ended_by: str | None = None
        """The first signal that has ended it."""

    async def obey(self) -> None:
        """Obey signals, for ever."""
        while True:
            number = await self._signals.wait()
            if number in ENDING:
                self._end(number)
            elif number == signal.SIGHUP:
                self._hung_up.set()
            else:
                bounded.warning(
                    "%s is ignored: SIGHUP reopens the --faults file and rereads the configuration file and the "
                    "certificate, SIGTERM stops pgguard",
                    name_of(number),
                )

    def _end(self, number: int) -> None:
        self._told += 1
        self.ended_by = self.ended_by or name_of(number)
        if self._guard is None:
            self._starting.cancel()
        elif number == signal.SIGQUIT or self._told > 1:
            self._guard.cut_off()
        else:
            self._guard.stop()

    def begin(self, guard: RunningGuard) -> None:
        """A guard is ready."""
        self._guard = guard

    async def reload(self, guard: RunningGuard) -> None:
        """Reload a guard's settings as often as that is asked for, or once for several times."""
        while True:
            await self._hung_up.wait()
            self._hung_up = trio.Event()
            await self._reloader.reload(guard)


def serve(given: dict[str, Any], config: Path | None) -> int:
    """Run a guard until it is told to stop; returns the exit status.

    Args:
        given: settings from options and environment.
        config: the configuration file, if one was named.

    Raises:
        ConfigurationError: the guard can't run like that.
    """
    with Signals(*ENDING, signal.SIGHUP, *UNUSED) as signals, ExitStack() as starting:
        # It starts no thread: they have to wait until the rights that aren't needed have been given up.
        starting.enter_context(progress("pgguard: starting", moving=False))
        return _run(given, config, signals, starting)


def _run(given: dict[str, Any], config: Path | None, signals: Signals, starting: ExitStack) -> int:
    settings = load_settings(given, config)
    account = settings.account()
    console = ConsoleSink(sys.stderr.fileno(), wait=True)
    voice = _Voice(console, starting)
    log = BoundedLog(voice)
    logging.basicConfig(level=logging.INFO, handlers=[log])
    recorder, otel, admin = recorder_for(settings, account), otel_for(settings), admin_for(settings)
    feed = None if admin is None else admin.feed
    sinks = Fanout([one for one in (recorder, otel, console, feed) if one is not None], complain=logger.error)
    try:
        reloader = _Reloader(settings, given, config, recorder)
        tended = [log.settle] if recorder is None else [log.settle, recorder.tend]
        setup = _Setup(settings, account, sinks, otel, admin)
        last = trio.run(_until_signalled, setup, voice, reloader, signals, tended)
        starting.close()
        log.close()
        for line in last:
            console.say(line)
        for remark in remarks():
            console.say(f"pgguard: internal error: {remark}")
    finally:
        sinks.close()
    return 0


def recorder_for(settings: Settings, account: Account | None = None) -> JsonLines | None:
    """What appends faults to the file that is named; ``None`` if none is. Raises ConfigurationError: it can't be."""
    if settings.faults is None:
        return None
    try:
        return JsonLines(settings.faults, owner=None if account is None else (account.uid, account.gid))
    except SinkError as error:
        raise ConfigurationError(f"--faults: {error}") from error


def otel_for(settings: Settings) -> Otel | None:
    """What sends faults and metrics to a collector; ``None`` if nothing is to. Raises ConfigurationError: it can't."""
    if not settings.otel:
        return None
    try:
        from pgguard.reporting.otel.sink import Otel  # noqa: PLC0415 - its extra need not be installed, and it takes time
    except ImportError as error:
        raise ConfigurationError(
            f"--otel: {error.name} is not installed: install pgguard[otel] (pip install 'pgguard[otel]')"
        ) from error
    return Otel()


def admin_for(settings: Settings) -> Admin | None:
    """What shows how the guard is doing; ``None`` if nothing is to. Raises ConfigurationError: it can't be."""
    address = settings.admin_address()
    if address is None:
        if settings.admin_token_file is not None:
            raise ConfigurationError("--admin-token-file: say by --admin HOST:PORT where the token is asked for")
        return None
    try:
        from pgguard.reporting.live.server import Admin  # noqa: PLC0415 - its extra need not be installed otherwise
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"--admin {settings.admin}: {error.name} is not installed: pip install 'pgguard[admin]'"
        ) from error
    return Admin(address, settings.admin_token_file)


class _Setup(NamedTuple):
    """What a guard is run with."""

    settings: Settings
    account: Account | None
    sinks: Fanout
    otel: Otel | None
    admin: Admin | None


async def _until_signalled(
    setup: _Setup,
    voice: _Voice,
    reloader: _Reloader,
    signals: Signals,
    tended: Sequence[Callable[[], None]],
) -> list[str]:
    """Serve until signals end it.

    Returns:
        What is to be said at the end.

    Raises:
        ConfigurationError: the guard can't run like that.
    """
    guard: RunningGuard | None = None
    failures: list[Exception] = []
    settings, otel, admin = setup.settings, setup.otel, setup.admin
    with signals.listening():
        async with trio.open_nursery() as nursery:
            orders = _Orders(signals, reloader, nursery.cancel_scope)
            nursery.start_soon(keep_going, orders.obey)
            try:
                async with running_guard(
                    settings, setup.sinks, give_up_rights=True, account=setup.account, admin=admin
                ) as guard:
                    voice.begin()
                    _announce(guard, settings, admin)
                    if otel is not None:
                        otel.start()
                        nursery.start_soon(keep_going, _measure, otel, guard)
                    orders.begin(guard)
                    nursery.start_soon(keep_going, tend, Loss.STEP, tended)
                    nursery.start_soon(keep_going, orders.reload, guard)
                    nursery.start_soon(_point_out_shortcuts, guard.fronts)
                    unknown = [one for one in guard.fronts if guard.encryption(one) is None]
                    if unknown:
                        nursery.start_soon(_tell_encryption, guard, unknown)
                    await guard.wait_ended()
            except Exception as error:
                failures.append(error)  # to be raised as it is, and not in a group
            nursery.cancel_scope.cancel()
    for failure in failures:
        raise failure
    if guard is None:
        return [f"pgguard: stopped by {orders.ended_by} before it was ready"]
    last: list[str] = []
    with spared(Loss.WORDS):
        last += summary_lines(guard.sessions, guard.counts(), guard.causes())
    with spared(Loss.WORDS):
        last += [printable(f"pgguard: attribution: {remark}") for remark in guard.remarks()]
    return last


def _announce(guard: RunningGuard, settings: Settings, admin: Admin | None) -> None:
    """Say what is wrong, and then what is to be known of a guard that runs: in a few lines, and one for each server."""
    for warning in (*guard.warnings, *mistyped_variables()):
        logger.warning("%s", warning)
    first = guard.fronts[0]
    is_assumed = first.name is None and not settings.upstream
    if is_assumed and (unused := unused_database_url(first.upstream, guard.addresses)) is not None:
        logger.warning("%s", unused)
    if (lacking := lacking_evidence(guard.missing)) is not None:
        logger.warning("%s", lacking)
    source = "" if settings.source is None else f"; settings are from {settings.source}"
    if first.name is None:
        logger.info("PostgreSQL is at %s%s%s", first.upstream, _encrypted(guard, first), source)
    else:
        logger.info("%s%s", counted(len(guard.fronts), "database"), source)
        for one in guard.fronts:
            there = ", ".join(map(str, one.addresses))
            logger.info(
                "database %s: clients of %s come to PostgreSQL at %s%s",
                one.name,
                there,
                one.upstream,
                _encrypted(guard, one),
            )
    if guard.offered is not None:
        logger.info("clients are offered TLS over TCP, with %s", guard.offered)
    if admin is not None:
        logger.info("%s", where_to_look(admin))
    logger.info("ready on %s", ", ".join(map(str, guard.addresses)))


def where_to_look(admin: Admin) -> str:
    """What to say of where a guard shows how it is doing."""
    return f"the live page is at {' and '.join(f'http://{address}/' for address in admin.addresses)}"


def _encrypted(guard: RunningGuard, front: Front) -> str:
    """How a server is connected to, if that is known and to be said: what follows its address."""
    encryption = guard.encryption(front)
    return "" if encryption is None else f", {encryption}"


async def _tell_encryption(guard: RunningGuard, fronts: Sequence[Front]) -> None:
    """Say how servers are connected to, when that is known; it has taken longer than the guard waits to be ready."""
    with spared(Loss.WORDS):
        await guard.wait_looked()
        for one in fronts:
            encryption = guard.encryption(one)
            if encryption is not None:
                server = "PostgreSQL" if one.name is None else f"PostgreSQL ({one.name})"
                logger.info("%s at %s is connected to %s", server, one.upstream, encryption)


async def _measure(otel: Otel, guard: RunningGuard) -> None:
    """Have a guard's figures sent as they are, until cancelled; then once more, as they have become."""
    try:
        while True:
            otel.show(await guard.figures(), guard.counts(), guard.lost_records)
            await trio.sleep(_FIGURES)
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _FIGURES):
            otel.show(await guard.figures(), guard.counts(), guard.lost_records)


async def _point_out_shortcuts(fronts: Sequence[Front]) -> None:
    """Say how servers can be reached with less effort, if that is certain. Never raises but for cancellation."""
    for one in fronts:
        with spared(Loss.WORDS):
            found = await trio.to_thread.run_sync(shortcut, one.upstream, abandon_on_cancel=True)
            if found is not None:
                advice = advice_on(found, one.setting)
                logger.info("the server also has a Unix socket, which takes less CPU time: %s", advice)


def lacking_evidence(missing: Sequence[Capability]) -> str | None:
    """What to say of the kinds of evidence that a guard lacks: a sentence without its stop; ``None`` if it has all."""
    if not missing:
        return None
    essential = [capability.name for capability in missing if capability.essential]
    what = "client processes can't be found here without" if essential else "some evidence isn't available here:"
    names = ", ".join(essential or (capability.name for capability in missing))
    return f"{what} {names}; run pgguard doctor to see why"
