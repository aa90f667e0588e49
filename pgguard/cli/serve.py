"""``pgguard serve``: the guard put together and run."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import trio

from pgguard.attribution import privileges, scout
from pgguard.attribution.capabilities import check
from pgguard.attribution.ebpf.probe import ProbeUnavailable
from pgguard.attribution.privileges import Right, RightsError
from pgguard.attribution.transparency import start as start_probe
from pgguard.attribution.trust import user_name
from pgguard.attribution.witness import Witness
from pgguard.faults.docket import Docket
from pgguard.proxy.errors import ConfigurationError
from pgguard.proxy.guard import Guard
from pgguard.proxy.interpreter import tune
from pgguard.proxy.losses import Loss, keep_going, remarks, spared
from pgguard.proxy.settings import Settings, load_settings, reload_settings
from pgguard.proxy.upstream import barred
from pgguard.reporting.console import ConsoleSink
from pgguard.reporting.jsonl import JsonLines
from pgguard.reporting.log import BoundedLog
from pgguard.reporting.sinks import Fanout, SinkError
from pgguard.reporting.summary import summary_lines

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from pathlib import Path

    from pgguard.attribution.capabilities import Capability
    from pgguard.attribution.ebpf.probe import SenderProbe
    from pgguard.attribution.privileges import Account

_TRIAL: Final = 20.0
"""Seconds to try which evidence can be had: it takes tenths of one, unless somebody's process hangs."""

_LOOK_FIRST: Final = 0.5
"""Seconds for a server to ignore a CancelRequest before clients are told that the guard is ready."""

_TENDING: Final = 1.0
"""Seconds between two looks at what waits to be written or said."""

logger = logging.getLogger(__name__)


class _Voice:
    """Says what is logged, without holding anybody up.

    It is held back until the guard can run as it was told to: else the user gets one line, which says why not.
    """

    def __init__(self, console: ConsoleSink) -> None:
        self._console = console
        self._held: list[str] | None = []

    def __call__(self, text: str) -> None:
        if self._held is None:
            self._console.say(text)
        else:
            self._held.append(text)

    def begin(self) -> None:
        """Say what has been held back, and from now on everything at once; the console gets its thread."""
        held, self._held = self._held or [], None
        self._console.start()
        for text in held:
            self._console.say(text)


class _Hangups:
    """Takes note of SIGHUP until somebody listens: whoever sends it early wants it obeyed, and not the guard's end."""

    def __init__(self) -> None:
        self.early = False

    def __enter__(self) -> _Hangups:
        self._before = signal.signal(signal.SIGHUP, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGHUP, self._before)

    def _note(self, *_: object) -> None:
        self.early = True


class _Reloader:
    """Does what SIGHUP asks for: reopens the file of faults, and reads the configuration anew.

    Args:
        guard: Whose settings are changed.
        settings: Those that it has been started with.
        given: What options and environment say, which comes before the file.
        config: The file, if one was named.
        recorder: What appends to the file of faults, if there is one.
    """

    def __init__(
        self, guard: Guard, settings: Settings, given: dict[str, Any], config: Path | None, recorder: JsonLines | None
    ) -> None:
        self._guard = guard
        self._settings = settings
        self._given = given
        self._config = config
        self._recorder = recorder

    async def reload(self) -> None:
        """Say what has been changed, and what can't be; with an error nothing is. Never raises but for cancellation."""
        try:
            reloaded = await trio.to_thread.run_sync(
                reload_settings, self._settings, self._given, self._config, abandon_on_cancel=True
            )
            self._reopen(reloaded.settings)
            self._guard.reload(reloaded.settings)
        except ConfigurationError as error:
            logger.error("SIGHUP: nothing has been changed: %s", error)  # noqa: TRY400 - it is the user's
            return
        except Exception:
            logger.exception("SIGHUP: nothing has been changed")
            return
        self._settings = reloaded.settings
        for remark in reloaded.remarks:
            logger.info("SIGHUP: %s", remark)
        if not reloaded.remarks:
            logger.info("SIGHUP: the settings are as they were")

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
            logger.error("SIGHUP: %s; it goes on with what it has open", error)  # noqa: TRY400 - it is the user's
        else:
            logger.info("SIGHUP: reopened %s", settings.faults)


def serve(given: dict[str, Any], config: Path | None) -> int:
    """Run a guard until it is told to stop; returns the exit status.

    Args:
        given: settings from options and environment.
        config: the configuration file, if one was named.

    Raises:
        ConfigurationError: the guard can't run like that.
    """
    with _Hangups() as hangups:
        return _run(given, config, hangups)


def _run(given: dict[str, Any], config: Path | None, hangups: _Hangups) -> int:
    settings = load_settings(given, config)
    account = settings.account()
    docket = Docket()
    console = ConsoleSink(sys.stderr.fileno(), wait=True)
    voice = _Voice(console)
    log = BoundedLog(voice)
    logging.basicConfig(level=logging.INFO, handlers=[log])
    recorder = _recorder(settings, account)
    sinks = Fanout([console] if recorder is None else [recorder, console], complain=logger.error)
    try:
        witness = None if settings.attribution == "off" else Witness()
        guard = Guard(settings, sinks=sinks, docket=docket, witness=witness)
        reloader = _Reloader(guard, settings, given, config, recorder)
        tended = [log.settle] if recorder is None else [log.settle, recorder.tend]
        trio.run(_until_signalled, guard, settings, account, voice.begin, hangups, reloader, tended)
        with spared(Loss.RECORD):
            for fault in docket.close_all(at=time.time()):
                sinks.record(fault)
        log.close()
        with spared(Loss.WORDS):
            for line in summary_lines(guard.sessions, docket.counts()):
                console.say(line)
        with spared(Loss.WORDS):
            for remark in guard.remarks():
                console.say(f"pgguard: attribution: {remark}")
        for remark in remarks():
            console.say(f"pgguard: failed inside the guard: {remark}")
    finally:
        sinks.close()
    return 0


def _recorder(settings: Settings, account: Account | None) -> JsonLines | None:
    if settings.faults is None:
        return None
    try:
        return JsonLines(settings.faults, owner=None if account is None else (account.uid, account.gid))
    except SinkError as error:
        raise ConfigurationError(f"--faults: {error}") from error


def _missing_capabilities(settings: Settings) -> list[Capability]:
    """What attribution, where it is wanted, must do without on this host.

    Raises:
        ConfigurationError: it must not.
    """
    if settings.attribution == "off":
        return []
    missing = [capability for capability in check(probe=False) if not capability.available]
    if settings.attribution in ("proc", "ebpf"):
        for capability in missing:
            if capability.essential:
                raise ConfigurationError(
                    f"--attribution {settings.attribution}: {capability.name}: {capability.explanation}; "
                    "or use --attribution auto"
                )
    return missing


def _start_probe(attribution: str, listeners: Sequence[tuple[str, int]]) -> SenderProbe | None:
    """Have the kernel say who sends on TCP, if it is wanted and can be had.

    Raises:
        ConfigurationError: it must be had, and can't.
    """
    if attribution == "off" or not listeners:
        return None
    insisted = attribution == "ebpf"
    try:
        probe, comparison = start_probe(listeners, insist=insisted)
    except ProbeUnavailable as error:
        if insisted:
            raise ConfigurationError(f"--attribution ebpf: {error}; or use --attribution auto") from error
        logger.warning("attribution does without kernel senders on TCP: %s", error)
        return None
    logger.info("attribution: on TCP the kernel names every sender by process and thread")
    for limit in probe.limits:
        logger.warning("attribution: %s", limit)
    if not comparison.alike:
        logger.warning("attribution: as is insisted on, clients are watched though %s", comparison)
    return probe


def _give_up_rights(guard: Guard, settings: Settings, account: Account | None, probe: SenderProbe | None) -> None:
    """Keep the rights that a guard takes which has everything that it needs to begin, and no others.

    To be called before any thread is started, and after everything is opened that takes more.

    Raises:
        ConfigurationError: it must be another user's, and can't.
    """
    if not privileges.has_any():
        return
    kept: set[int] = set()
    reserve: frozenset[int] = frozenset()
    if settings.attribution != "off":
        kept |= privileges.looking()
        if guard.is_for_neighbours:
            reserve = privileges.ENTERING
    with privileges.only(kept):
        if probe is not None and probe.takes_rights:
            kept.add(Right.CAP_BPF)
        if account is None and barred(guard.upstream):
            kept.add(Right.CAP_DAC_OVERRIDE)
    try:
        gone = privileges.give_up(kept, reserve, account)
    except RightsError as error:
        if account is not None:
            raise ConfigurationError(
                f"--user {account.name}: {error}: that takes CAP_SETUID, CAP_SETGID and CAP_SETPCAP"
            ) from error
        logger.warning("rights: more of them are kept than are needed: %s", error)
        return
    if account is not None:
        _check_reach(guard, account)
    has = sorted(privileges.rights() | reserve)
    logger.info(
        "rights: as %s, with %s; %d other capabilities are given up",
        user_name(os.geteuid()),
        privileges.names(has) or "no capabilities",
        len(gone),
    )


def _check_reach(guard: Guard, account: Account) -> None:
    """See whether the user that has been changed to can do what the guard goes on to do.

    Raises:
        ConfigurationError: it can't.
    """
    for program in (__file__, os.__file__):
        if not os.access(program, os.R_OK, effective_ids=True):
            raise ConfigurationError(
                f"--user {account.name}: it may not read {program}, which is the guard's: install pgguard where it may"
            )
    for address in barred(guard.upstream):
        raise ConfigurationError(
            f"--user {account.name}: it may not connect to the server at {address}: have the socket's group be one "
            "of its own, or give the server's TCP address"
        )


async def _look_around(settings: Settings) -> list[Capability]:
    """As :func:`_missing_capabilities`, with the rights that the guard has by now. Raises ConfigurationError."""
    with trio.move_on_after(_TRIAL):
        if settings.attribution != "off":
            await trio.to_thread.run_sync(scout.start, abandon_on_cancel=True)
        return await trio.to_thread.run_sync(_missing_capabilities, settings, abandon_on_cancel=True)
    logger.warning("what attribution can have here could not be found out within %g s", _TRIAL)
    return []


async def _until_signalled(
    guard: Guard,
    settings: Settings,
    account: Account | None,
    begin_to_log: Callable[[], None],
    hangups: _Hangups,
    reloader: _Reloader,
    tended: Sequence[Callable[[], None]],
) -> None:
    """Serve; the first SIGINT or SIGTERM lets sessions finish, the second doesn't; SIGHUP reloads."""
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM))
        reloads = stack.enter_context(trio.open_signal_receiver(signal.SIGHUP))
        addresses = await guard.listen()
        stack.callback(guard.close)
        probe = _start_probe(settings.attribution, guard.tcp_listeners())
        if probe is not None:
            stack.callback(probe.close)
            guard.use_probe(probe)
        _give_up_rights(guard, settings, account, probe)
        missing = await _look_around(settings)
        room = guard.look_for_room()

        def announce() -> None:
            begin_to_log()
            for capability in missing:
                logger.warning("attribution does without %s: %s", capability.name, capability.explanation)
            for remark in (settings.remark, *guard.listener_remarks, guard.upstream.remark, room):
                if remark is not None:
                    logger.warning("%s", remark)
            logger.info("PostgreSQL is at %s", guard.upstream)
            logger.info("ready on %s", ", ".join(map(str, addresses)))

        tasks: list[Callable[[], Awaitable[None]]] = [
            partial(_tend, tended),
            partial(_reload, reloads, reloader, hangups.early),
            tune,
        ]
        await _serve(guard, signals, announce, tasks)


async def _serve(
    guard: Guard,
    signals: AsyncIterator[int],
    announce: Callable[[], None],
    tasks: Sequence[Callable[[], Awaitable[None]]],
) -> None:
    """Serve, announce it and begin the tasks beside it, unless it is found out that the guard is in front of itself.

    Raises:
        ConfigurationError: it is.
    """
    loops: list[str] = []
    looked = trio.Event()
    async with trio.open_nursery() as nursery:

        async def serve() -> None:
            await guard.serve()
            nursery.cancel_scope.cancel()

        async def look() -> None:
            with spared(Loss.STEP):
                if (loop := await guard.find_loop()) is not None:
                    loops.append(loop)
                    nursery.cancel_scope.cancel()
            looked.set()

        nursery.start_soon(_obey, signals, guard, nursery.cancel_scope)
        nursery.start_soon(serve)
        nursery.start_soon(look)
        with trio.move_on_after(_LOOK_FIRST):
            await looked.wait()
        if not loops:
            announce()
            for task in tasks:
                nursery.start_soon(keep_going, task)
    for loop in loops:
        raise ConfigurationError(loop)


async def _reload(reloads: AsyncIterator[int], reloader: _Reloader, early: bool) -> None:
    if early:
        await reloader.reload()
    async for _ in reloads:
        await reloader.reload()


async def _tend(tended: Sequence[Callable[[], None]]) -> None:
    """Have what waits to be written or said looked after, now and then."""
    while True:
        await trio.sleep(_TENDING)
        for tend in tended:
            with spared(Loss.STEP):
                tend()


async def _obey(signals: AsyncIterator[int], guard: Guard, everything: trio.CancelScope) -> None:
    await anext(signals)
    guard.stop()
    await anext(signals)
    everything.cancel()
