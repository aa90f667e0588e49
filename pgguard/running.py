"""A guard with its sinks, started and ended: for whoever runs one, on the command line or inside a program.

What it takes, in this order: the kernel is asked to tell of forks, the listeners are opened, the kernel is asked to
name senders, rights that aren't needed any more are given up, it is found out which evidence is available, and whether
the guard stands in front of itself.

Rights are given up for good, by the whole process, and by all that it starts afterwards. So that is done only where the
process is there for the guard alone, and says so. No thread is left by then, as rights are a thread's own.
"""

from __future__ import annotations

import logging
import os
import time
from contextlib import ExitStack, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from pgguard.attribution import privileges, scout
from pgguard.attribution.capabilities import check, without_fork_events, without_tcp_senders
from pgguard.attribution.ebpf.probe import ProbeUnavailable
from pgguard.attribution.forks import ForkEvents, ForksUnavailable
from pgguard.attribution.privileges import Right, RightsError
from pgguard.attribution.ruby.pipes import RubyPipes
from pgguard.attribution.transparency import start as start_probe
from pgguard.attribution.witness import Witness
from pgguard.faults.docket import Docket
from pgguard.proxy.errors import ConfigurationError
from pgguard.proxy.guard import Guard
from pgguard.proxy.interpreter import share_heap, tune
from pgguard.proxy.losses import Loss, keep_going, spared
from pgguard.proxy.upstream import barred

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence

    from pgguard.attribution.capabilities import Capability
    from pgguard.attribution.ebpf.probe import SenderProbe
    from pgguard.attribution.privileges import Account
    from pgguard.faults.causes import Told
    from pgguard.faults.docket import Count, Occurrence
    from pgguard.faults.fault import Fault
    from pgguard.proxy.addresses import Address
    from pgguard.proxy.figures import Figures
    from pgguard.proxy.overview import Overview, SessionListener, SessionSnapshot, Wanted
    from pgguard.proxy.settings import Front, Settings
    from pgguard.reporting.live.server import Admin
    from pgguard.reporting.sinks import Fanout

_TRIAL: Final = 20.0
"""Seconds to try which evidence is available: it takes tenths of one, unless somebody's process hangs."""

_LOOK_FIRST: Final = 0.5
"""Seconds for a server to ignore a CancelRequest before clients are told that the guard is ready."""

_SWEEP: Final = 30.0
"""Seconds between two looks for what Ruby processes have left behind."""

_TENDING: Final = 1.0
"""Seconds between two looks at what is to be looked after."""

logger = logging.getLogger(__name__)


class Course(NamedTuple):
    """How a guard goes on that accepts connections."""

    nursery: trio.Nursery
    """What everything is done in, and is cancelled to end it at once."""
    looked: trio.Event
    """It has been looked at the servers."""
    ended: trio.Event
    """It has been stopped, and no session is left."""


class RunningGuard:
    """A guard that accepts connections; made by :func:`running_guard`.

    Args:
        guard: That guard.
        docket: Counts its faults.
        sinks: Where they go.
        course: How it goes on.
        addresses: Where it listens, with the ports that the system has chosen.
        missing: What attribution, where it is wanted, lacks on this host.
        warnings: What else is to be said as it starts: sentences.
    """

    def __init__(
        self,
        guard: Guard,
        docket: Docket,
        sinks: Fanout,
        course: Course,
        *,
        addresses: Sequence[Address],
        missing: Sequence[Capability],
        warnings: Sequence[str],
    ) -> None:
        self._guard = guard
        self._docket = docket
        self._sinks = sinks
        self._course = course
        self.addresses = tuple(addresses)
        self.missing = tuple(missing)
        self.warnings = tuple(warnings)

    @property
    def fronts(self) -> list[Front]:
        """The servers that it is in front of, in the order in which they are configured: one at least."""
        return self._guard.fronts

    @property
    def offered(self) -> str | None:
        """The certificate that clients are shown over TCP, for people; ``None``: they are offered no TLS."""
        return self._guard.offered

    @property
    def sessions(self) -> int:
        """How many clients have connected so far."""
        return self._guard.sessions

    def snapshot(self) -> list[SessionSnapshot]:
        """The sessions that are open, in the order in which they came."""
        return self._guard.snapshot()

    def tell(self, listener: SessionListener) -> None:
        """Have somebody told of each session that is opened or closed from now on."""
        self._guard.tell(listener)

    async def figures(self) -> Figures:
        """What the guard has done so far, in numbers. Others have their turn meanwhile, if there are many sessions."""
        return await self._guard.figures()

    async def overview(self, wanted: Wanted) -> Overview:
        """Some of the sessions that are open, and how many there are. Others have their turn meanwhile."""
        return await self._guard.overview(wanted)

    async def go_round(self) -> None:
        """Wait until the relay has come round, which shows that it does. There is no end to it if it doesn't."""
        await self._guard.go_round()

    def why_not_ready(self) -> str | None:
        """Why a client that comes now isn't let in: a clause; ``None`` if it is."""
        return self._guard.why_not_ready()

    @property
    def server_answers(self) -> Mapping[str | None, bool]:
        """By the name of the database, whether its server could be connected to for its last client, if one came."""
        return self._guard.server_answers

    @property
    def lost_records(self) -> int:
        """How many faults could not be recorded so far, counted for each sink."""
        return self._sinks.lost

    def counts(self) -> list[Count]:
        """What has happened so far, the gravest first."""
        return self._docket.counts()

    def causes(self) -> list[Told]:
        """What it has come from, the gravest cause first; those that are remembered."""
        return self._docket.causes()

    def remarks(self) -> list[str]:
        """What the kernel couldn't say about senders so far: clauses, none if all was known."""
        return self._guard.remarks()

    async def settled(self) -> None:
        """Wait until everything has been judged, and its faults recorded, that had come when this was called.

        There may be no end to it: give it a deadline.
        """
        await self._guard.settled()

    def hear(self, heard: Callable[[Occurrence], None]) -> None:
        """Have somebody told, on trio's thread, of each time that a fault comes from now on, recorded or not."""
        self._docket.tell(heard)

    def begin_anew(self) -> None:
        """Take every fault for news from now on, and its cause too: the next of each is recorded in full."""
        _record_all(self._docket.begin_anew(at=time.time()), self._sinks)

    def leave_open(self, numbers: Collection[int], over: str) -> set[int]:
        """Have sessions judged (``leaked-connection``) that outlive what they belong to.

        Args:
            numbers: The sessions' own.
            over: What has ended: ``the command``, for example.

        Returns:
            The numbers of those that are judged now, or have been; of others it isn't the time, or they are over.
        """
        return self._guard.leave_open(numbers, over)

    def reload(self, settings: Settings) -> None:
        """Go on by other settings: those that :func:`pgguard.proxy.settings.reload_settings` lets change.

        Raises:
            ConfigurationError: They contradict themselves; nothing has changed.
        """
        self._guard.reload(settings)

    async def renew_certificate(self) -> str | None:
        """Read the certificate again that clients are shown, for those that come from now on.

        Returns:
            What it is now, for people, if it is another one.

        Raises:
            ConfigurationError: It can't be shown; the one before goes on to be.
        """
        return await self._guard.renew_certificate()

    async def read_server_files(self, front: Front) -> bool:
        """Read the files again that are for TLS to one of the servers, for connections that are made from now on.

        Returns False if there are none.

        Raises:
            ConfigurationError: One can't be used; what they said before goes on to be.
        """
        return await self._guard.read_server_files(front)

    def stop(self) -> None:
        """Accept nobody any more, and end when the sessions are done or the settings' ``shutdown_timeout`` is over."""
        self._guard.stop()

    def cut_off(self) -> None:
        """End at once, whatever its sessions are doing; the block is cancelled too."""
        self._course.nursery.cancel_scope.cancel()

    def encryption(self, front: Front) -> str | None:
        """How a server is connected to, where there may be TLS, as far as that is known: a few words for people."""
        return self._guard.encryption(front.name)

    async def wait_looked(self) -> None:
        """Wait until it is known how each server is connected to, or that it can't be."""
        await self._course.looked.wait()

    async def wait_ended(self) -> None:
        """Wait until it has been stopped and no session is left."""
        await self._course.ended.wait()


@asynccontextmanager
async def running_guard(
    settings: Settings,
    sinks: Fanout,
    *,
    give_up_rights: bool = False,
    account: Account | None = None,
    ruby: RubyPipes | None = None,
    admin: Admin | None = None,
) -> AsyncIterator[RunningGuard]:
    """Run a guard for as long as the block takes, which is entered once it accepts connections.

    When the block is left the guard accepts nobody any more, and the context waits until the sessions are done, or for
    the settings' ``shutdown_timeout``; cancelling it cuts them off at once. Then every fault has been handed to the
    sinks, and what was suppressed is accounted for.

    Args:
        settings: What to guard, where to listen, what to do about faults.
        sinks: Where the faults go; not closed.
        give_up_rights: Whether the process gives up, for good, all rights that the guard doesn't need once all is
            set up. For a process that does nothing else, and has only this thread. A program that has other things to
            do, before or after, keeps the rights that it has.
        account: The user to become once everything is set up, of a guard that is started as root; the rights are given
            up then too.
        ruby: Where Ruby processes are asked for their stacks, if they are to be; opened and closed here. Those can be
            asked that are started with :func:`pgguard.attribution.ruby.loading.ruby_variables` in their environment.
        admin: What shows how it is doing, if anything does; opened and closed here. Its feed is one of the sinks.

    Raises:
        ConfigurationError: The guard can't run like that: raised on entering, or out of the block when it is found out
            only then that the guard is in front of itself.
    """
    share_heap()
    docket = Docket()
    missing: list[Capability] = []
    with ExitStack() as stack:
        forks = None if settings.attribution == "off" else _listen_for_forks(stack, missing)
        witness = None if settings.attribution == "off" else Witness(ruby, forks)
        guard = Guard(settings, sinks=sinks, docket=docket, witness=witness)
        addresses = await guard.listen()
        stack.callback(guard.close)
        if admin is not None:
            await admin.listen()
            stack.callback(admin.close)
            guard.keep_back(admin.descriptors)
        probe = _start_probe(settings.attribution, guard.tcp_listeners(), missing)
        if probe is not None:
            stack.callback(probe.close)
            guard.use_probe(probe)
        if give_up_rights or account is not None:
            _give_up_rights(guard, settings, account, probe)
        if ruby is not None:
            stack.callback(ruby.close)
            _open(ruby)
        missing += await _look_around(settings)
        room = guard.look_for_room()
        remarks = [*guard.listener_remarks, *(_remark(one) for one in guard.fronts)]
        said = (settings.remark, settings.tls_remark, *remarks, room)
        warnings = [remark for remark in said if remark is not None]
        stack.callback(_account, docket, sinks)
        async with _serving(guard, ruby) as course:
            running = RunningGuard(
                guard, docket, sinks, course, addresses=addresses, missing=missing, warnings=warnings
            )
            if admin is not None:
                course.nursery.start_soon(keep_going, admin.serve, running)
            yield running


@asynccontextmanager
async def _serving(guard: Guard, ruby: RubyPipes | None) -> AsyncIterator[Course]:
    """Serve, unless it is found out that the guard is in front of itself: that raises ConfigurationError."""
    ended = trio.Event()
    loops: list[str] = []
    failures: list[Exception] = []
    looked = trio.Event()
    async with trio.open_nursery() as nursery:

        async def serve() -> None:
            await guard.serve()
            ended.set()

        async def look() -> None:
            with spared(Loss.STEP):
                if (loop := await guard.find_loop()) is not None:
                    loops.append(loop)
                    nursery.cancel_scope.cancel()
                else:
                    for problem in guard.unreachable():
                        logger.warning("%s", problem)
            looked.set()

        nursery.start_soon(serve)
        nursery.start_soon(look)
        nursery.start_soon(keep_going, tune)
        if ruby is not None:
            nursery.start_soon(keep_going, _sweep, ruby)
        with trio.move_on_after(_LOOK_FIRST):
            await looked.wait()
        if not loops:
            try:
                yield Course(nursery, looked, ended)
            except Exception as error:
                failures.append(error)  # to be raised as it is, and not in a group
            guard.stop()
            await ended.wait()
            nursery.cancel_scope.cancel()
    for loop in loops:
        raise ConfigurationError(loop)
    for failure in failures:
        raise failure


def _remark(front: Front) -> str | None:
    """What was made of where a server is said to be, if that has to be said: a sentence without its stop."""
    name, remark = front.name, front.upstream.remark
    return remark if remark is None or name is None else f"databases.{name}: {remark}"


def _open(ruby: RubyPipes) -> None:
    """Make the directory of the pipes. Raises ConfigurationError."""
    try:
        ruby.open()
    except OSError as error:
        raise ConfigurationError(
            f"--ruby-stacks: no directory for Ruby's answers can be made: {error.strerror}: set TMPDIR to one that the "
            "guard can write to"
        ) from error


async def _sweep(ruby: RubyPipes) -> None:
    """Remove what processes have left behind that had no time to do so, until cancelled."""
    while True:
        await trio.sleep(_SWEEP)
        with suppress(OSError):  # somebody else has removed the directory
            await trio.to_thread.run_sync(ruby.sweep, abandon_on_cancel=True)


def _account(docket: Docket, sinks: Fanout) -> None:
    """Account for what was suppressed, as nothing more comes."""
    with spared(Loss.RECORD):
        _record_all(docket.close_all(at=time.time()), sinks)


def _record_all(faults: Iterable[Fault], sinks: Fanout) -> None:
    for fault in faults:
        sinks.record(fault)


def _missing_capabilities(settings: Settings) -> list[Capability]:
    """What attribution, where it is wanted, lacks on this host.

    Raises:
        ConfigurationError: it lacks what it has been told to have.
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


def _listen_for_forks(stack: ExitStack, missing: list[Capability]) -> ForkEvents | None:
    """Have the kernel tell of forks, if it does.

    Args:
        stack: closes it.
        missing: where it is added if it doesn't.
    """
    try:
        return stack.enter_context(ForkEvents())
    except ForksUnavailable as error:
        missing.append(without_fork_events(error.problem, error.remedy))
        return None


def _start_probe(
    attribution: str, listeners: Sequence[tuple[str, int]], missing: list[Capability]
) -> SenderProbe | None:
    """Have the kernel say who sends on TCP, if that is wanted and possible.

    Args:
        attribution: what is wanted.
        listeners: where clients connect.
        missing: where what isn't available is added.

    Raises:
        ConfigurationError: it is demanded, and isn't available.
    """
    if attribution == "off" or not listeners:
        return None
    insisted = attribution == "ebpf"
    try:
        probe, comparison = start_probe(listeners, insist=insisted)
    except ProbeUnavailable as error:
        if insisted:
            raise ConfigurationError(f"--attribution ebpf: {error}; or use --attribution auto") from error
        missing.append(without_tcp_senders(error.problem, error.remedy))
        return None
    if probe.limits:
        missing.append(without_tcp_senders("; ".join(probe.limits), "run a newer kernel", altogether=False))
    if not comparison.alike:
        logger.warning("clients are watched, as --attribution ebpf demands, although %s", comparison)
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
        if account is None and any(barred(one.upstream) for one in guard.fronts):
            kept.add(Right.CAP_DAC_OVERRIDE)
    try:
        privileges.give_up(kept, reserve, account)
    except RightsError as error:
        if account is not None:
            raise ConfigurationError(
                f"--user {account.name}: {error}: to change users pgguard needs CAP_SETUID, CAP_SETGID and CAP_SETPCAP"
            ) from error
        logger.warning("the guard keeps more rights than it needs: %s", error)
        return
    if account is not None:
        _check_reach(guard, account)


def _check_reach(guard: Guard, account: Account) -> None:
    """See whether the user that has been changed to can do what the guard goes on to do.

    Raises:
        ConfigurationError: it can't.
    """
    for program in (__file__, os.__file__):
        if not os.access(program, os.R_OK, effective_ids=True):
            raise ConfigurationError(
                f"--user {account.name}: this user can't read {program}: install pgguard where it can"
            )
    for front in guard.fronts:
        for address in barred(front.upstream):
            raise ConfigurationError(
                f"--user {account.name}: this user can't connect to the server at {address}: add it to the socket's "
                f"group, or name the server's TCP address in {front.setting}"
            )


async def _look_around(settings: Settings) -> list[Capability]:
    """As :func:`_missing_capabilities`, with the rights that the guard has by now. Raises ConfigurationError."""
    with trio.move_on_after(_TRIAL):
        if settings.attribution != "off":
            await trio.to_thread.run_sync(scout.start, abandon_on_cancel=True)
        return await trio.to_thread.run_sync(_missing_capabilities, settings, abandon_on_cancel=True)
    logger.warning("could not find out within %g s which evidence this host allows", _TRIAL)
    return []


async def tend(costs: Loss, tended: Sequence[Callable[[], None]]) -> None:
    """Have what is beside a guard looked after about once a second, as what waits to be written; until cancelled.

    Args:
        costs: What is lost when one of them fails.
        tended: What is to be called.
    """
    while True:
        await trio.sleep(_TENDING)
        for one in tended:
            with spared(costs):
                one()
