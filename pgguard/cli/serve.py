"""``pgguard serve``: the guard put together and run."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

import trio

from pgguard.attribution.capabilities import check
from pgguard.attribution.ebpf.probe import ProbeUnavailable
from pgguard.attribution.transparency import start as start_probe
from pgguard.attribution.witness import Witness
from pgguard.faults.docket import Docket
from pgguard.faults.text import redact
from pgguard.proxy.errors import ConfigurationError
from pgguard.proxy.guard import Guard
from pgguard.proxy.losses import Loss, remarks, spared
from pgguard.proxy.settings import Settings, load_settings
from pgguard.reporting.console import ConsoleSink
from pgguard.reporting.jsonl import JsonLines
from pgguard.reporting.sinks import Fanout, Sink, SinkError
from pgguard.reporting.summary import summary_lines

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from pgguard.attribution.capabilities import Capability
    from pgguard.attribution.ebpf.probe import SenderProbe

logger = logging.getLogger(__name__)


class _ConsoleHandler(logging.Handler):
    """Hands the log to the one who writes to standard error without holding anybody up."""

    def __init__(self, console: ConsoleSink) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = redact(self.format(record))
        except Exception:
            text = f"pgguard: {record.msg}"
        self._console.say(text)


def serve(given: dict[str, Any], config: Path | None) -> int:
    """Run a guard until it is told to stop; returns the exit status.

    Args:
        given: settings from options and environment.
        config: the configuration file, if one was named.

    Raises:
        ConfigurationError: the guard can't run like that.
    """
    settings = load_settings(given, config)
    docket = Docket()
    console = ConsoleSink(sys.stderr.fileno())
    logging.basicConfig(level=logging.INFO, format="pgguard: %(message)s", handlers=[_ConsoleHandler(console)])
    sinks = Fanout([*_recorders(settings), console], complain=logger.error)
    try:
        missing = _missing_capabilities(settings)
        witness = None if settings.attribution == "off" else Witness()
        guard = Guard(settings, sinks=sinks, docket=docket, witness=witness)
        trio.run(_until_signalled, guard, missing, settings.attribution)
        with spared(Loss.RECORD):
            for fault in docket.close_all(at=time.time()):
                sinks.record(fault)
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


def _recorders(settings: Settings) -> list[Sink]:
    if settings.faults is None:
        return []
    try:
        return [JsonLines(settings.faults)]
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


async def _until_signalled(guard: Guard, missing: Sequence[Capability], attribution: str) -> None:
    """Serve; the first SIGINT or SIGTERM lets sessions finish, the second doesn't."""
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals, contextlib.ExitStack() as stack:
        addresses = await guard.listen()
        probe = _start_probe(attribution, guard.tcp_listeners())
        if probe is not None:
            stack.callback(probe.close)
            guard.use_probe(probe)
        for capability in missing:
            logger.warning("attribution does without %s: %s", capability.name, capability.explanation)
        if guard.upstream.remark is not None:
            logger.warning("%s", guard.upstream.remark)
        logger.info("PostgreSQL is at %s", guard.upstream)
        logger.info("ready on %s", ", ".join(map(str, addresses)))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_obey, signals, guard, nursery.cancel_scope)
            await guard.serve()
            nursery.cancel_scope.cancel()


async def _obey(signals: AsyncIterator[int], guard: Guard, everything: trio.CancelScope) -> None:
    await anext(signals)
    guard.stop()
    await anext(signals)
    everything.cancel()
