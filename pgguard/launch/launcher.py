"""A command and its guard: started, kept together, and ended.

The guard is there before the command is, and longer. It is the command's parent, and in its process group. What a
terminal does reaches both of them; what is sent to the guard alone is meant for the command, and passed on. Whatever
becomes of the guard, the command goes on, and nobody but a signal's sender ends it.
"""

from __future__ import annotations

import logging
import signal
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from pgguard.launch.arrivals import BY_KERNEL, STOPS, is_ignored, stop_as_told
from pgguard.launch.child import Child
from pgguard.launch.left_behind import LeftBehind
from pgguard.launch.lingering import Lingering
from pgguard.proxy.errors import ConfigurationError
from pgguard.proxy.losses import Loss, keep_going
from pgguard.running import running_guard, tend

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from pgguard.attribution.ruby.pipes import RubyPipes
    from pgguard.launch.arrivals import Arrival, Arrivals
    from pgguard.launch.child import Ended
    from pgguard.launch.companion import Companion
    from pgguard.launch.inheritance import Inheritance
    from pgguard.proxy.settings import Settings
    from pgguard.reporting.live.server import Admin
    from pgguard.reporting.sinks import Fanout
    from pgguard.running import RunningGuard

_ENDING: Final = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
"""Signals that end what goes on while the command doesn't run."""
_PATIENCE: Final = 1.0
"""Seconds for which no signal cuts off what is told in the end."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be run."""

    command: Sequence[str]
    inheritance: Inheritance
    prepare: Callable[[RunningGuard], Awaitable[Mapping[str, str]]]
    """Says what there is to say when the guard is ready, and gives the command's environment."""
    go_on: Callable[[], None]
    """Is called when the command has ended, or the guard has."""
    say: Callable[[str], None]
    """Takes a line that is said after the command has ended, while the guard goes on."""
    linger: float | None = None
    """Seconds for which the guard goes on at most when the command has ended; ``None``: as long as it is needed."""
    tended: Sequence[Callable[[], None]] = field(default=())
    """What is to be called about once a second."""
    ruby: RubyPipes | None = None
    """What the guard asks Ruby programs through, if it does."""
    admin: Admin | None = None
    """What shows how the guard is doing, if anything does."""


@dataclass(slots=True)
class Outcome:
    """What has become of it."""

    guard: RunningGuard | None = None
    """The guard, for what it has counted; ``None`` if it was not ready when a signal ended it."""
    ended: Ended | None = None
    """How the command has ended; ``None`` if it was never started."""
    stopped_by: int | None = None
    """The signal that has ended it before the command was started."""


class Launcher:
    """Runs a command behind a guard.

    Args:
        settings: The guard's.
        sinks: Where its faults go.
        order: What is run.
        arrivals: The signals that come.
        companion: Tells who has got them besides.
    """

    def __init__(
        self, settings: Settings, sinks: Fanout, order: Order, arrivals: Arrivals, companion: Companion
    ) -> None:
        # Sessions are waited for while it lingers, and not again when it ends.
        self._settings = settings.model_copy(update={"shutdown_timeout": 0.0})
        self._sinks = sinks
        self._order = order
        self._arrivals = arrivals
        self._companion = companion
        self.outcome = Outcome()
        """What has become of it so far."""
        self._starting = trio.CancelScope()
        self._child: Child | None = None
        self._child_ended = trio.Event()
        self._lingering: Lingering | None = None
        self._telling: float | None = None
        """Since when what there is to tell is told."""
        self._last_words = trio.CancelScope()

    async def run(self, tell: Callable[[Outcome], Awaitable[None]]) -> Outcome:
        """Run it, and then tell what there is to tell, which a signal cuts off.

        Args:
            tell: Tells it.

        Raises:
            ConfigurationError: The guard can't run like that; the command has not been started.
            NotStarted: The command can't be run.
        """
        failures: list[Exception] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_going, self._obey)
            try:
                await self._run()
                self._telling = trio.current_time()
                with self._last_words:
                    await tell(self.outcome)
            except Exception as error:
                failures.append(error)  # to be raised as it is, and not in a group
            finally:
                if self._child is not None:
                    self._child.forget()
            nursery.cancel_scope.cancel()
        for failure in failures:
            raise failure
        return self.outcome

    async def _run(self) -> None:
        try:
            with self._starting:
                await self._run_guarded()
        except Exception as error:
            if self._child is None:
                raise
            # What the user can change takes no traceback.
            trace = None if isinstance(error, ConfigurationError) else error
            logger.error("the guard has failed: %s; %s goes on without it", error, self._child.name, exc_info=trace)  # noqa: TRY400 - likewise
        if self._child is not None:
            await self._child_ended.wait()

    async def _run_guarded(self) -> None:
        async with running_guard(self._settings, self._sinks, ruby=self._order.ruby, admin=self._order.admin) as guard:
            left_behind = LeftBehind()
            environment = await self._order.prepare(guard)
            await self._companion.forget()
            await trio.lowlevel.checkpoint()  # from here to where it has started, no signal calls it off
            self._child = child = Child(self._order.command, environment, self._order.inheritance)
            self.outcome.guard = guard
            await self._look(child)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(keep_going, tend, Loss.TIDINESS, [partial(left_behind.reap, child.pid)])
                nursery.start_soon(keep_going, tend, Loss.STEP, self._order.tended)
                await self._child_ended.wait()
                self._order.go_on()
                self._lingering = Lingering(guard, child, left_behind, limit=self._order.linger, say=self._order.say)
                await self._lingering.run()
                nursery.cancel_scope.cancel()

    # Signals

    async def _obey(self) -> None:
        """Do what signals ask for, for ever."""
        while True:
            arrival = await self._arrivals.wait()
            child = self._child
            if child is None:
                self._obey_before(arrival)
            elif arrival.number == signal.SIGCHLD:
                await self._look(child)
            elif child.ended is None:
                await self._pass_on(arrival, child)
            else:
                self._obey_after(arrival)

    async def _look(self, child: Child) -> None:
        """See what has become of the command."""
        ended = child.look()
        if ended is not None:
            self.outcome.ended = ended
            self._child_ended.set()
        elif (number := child.stopped_by_terminal()) is not None:
            for stop in STOPS:  # they have done what they can, and don't undo what may be sent to the guard alone
                await self._companion.forget(stop)
            if child.is_stopped():
                # The shell that has started this looks at this process alone, and waits until it stops too.
                self._stop(number)

    def _stop(self, number: int) -> None:
        stop_as_told(number)
        self._arrivals.forget_stops()

    def _obey_before(self, arrival: Arrival) -> None:
        if arrival.number in STOPS:
            self._stop(arrival.number)
        elif arrival.number in _ENDING and not is_ignored(arrival.number):
            self.outcome.stopped_by = self.outcome.stopped_by or arrival.number
            self._starting.cancel()

    async def _pass_on(self, arrival: Arrival, child: Child) -> None:
        """Send the command what was meant for it, unless it has got it already."""
        if arrival.is_sent and arrival.pid == child.pid:
            return  # it is for whoever has started it, and not for itself
        if await self._is_for_the_group(arrival) and child.is_in_our_group:
            self._arrivals.forget(arrival.number)  # the companion has got just one of them, and forgotten it
            return
        child.send(arrival.number)

    async def _is_for_the_group(self, arrival: Arrival) -> bool:
        has_got = await self._companion.has_got(arrival.number)
        return arrival.code == BY_KERNEL if has_got is None else has_got

    def _obey_after(self, arrival: Arrival) -> None:
        if arrival.number in STOPS:
            self._stop(arrival.number)
        elif arrival.number not in _ENDING or is_ignored(arrival.number):
            return
        elif self._telling is not None:
            # What has ended the command may come twice; but somebody may not read what is told.
            if trio.current_time() - self._telling >= _PATIENCE:
                self._last_words.cancel()
        elif self._lingering is not None:
            self._lingering.end()
