"""The guard: it puts together what receives clients, what moves their bytes, and what watches over them.

The tasks, all children of :meth:`Guard.serve`:

- the sweep (:mod:`pgguard.proxy.sweep`), with a task for each session that is being judged; in its rounds clients are
  accepted, too (:mod:`pgguard.proxy.door`), and come through to the server (:mod:`pgguard.proxy.arrival`);
- one that keeps the time of those who arrive (:mod:`pgguard.proxy.lobby`), some that keep their order
  (:mod:`pgguard.proxy.gate`), and one for each of them for which something is to be done that takes long;
- the registrar, which finds out who opened new connections (:mod:`pgguard.proxy.registrar`);
- the watch over what no message shows (:mod:`pgguard.proxy.watch`);
- one that has accounted for what was suppressed of the records.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import resource
import select
import time
from itertools import chain
from typing import TYPE_CHECKING, Final

import trio

from pgguard.attribution.findings import Activity
from pgguard.attribution.vigil import BEAT
from pgguard.faults.text import counted
from pgguard.proxy import looking
from pgguard.proxy.addresses import TcpAddress
from pgguard.proxy.admission import Admission
from pgguard.proxy.door import Door
from pgguard.proxy.errors import ConfigurationError
from pgguard.proxy.figures import Counters, Figures
from pgguard.proxy.judge import Judge
from pgguard.proxy.kernel_senders import KernelSenders
from pgguard.proxy.listeners import BACKLOG, Listener, open_listeners
from pgguard.proxy.lobby import Lobby
from pgguard.proxy.losses import Loss, keep_going, losses, note, spared
from pgguard.proxy.openers import OpenerStacks
from pgguard.proxy.overview import activity, overview, snapshot
from pgguard.proxy.reception import Reception
from pgguard.proxy.registrar import Registrar
from pgguard.proxy.remedies import HOW_TO_RAISE
from pgguard.proxy.roster import Roster
from pgguard.proxy.session import ProxiedSession
from pgguard.proxy.sweep import Sweep
from pgguard.proxy.turns import GLANCES, Stint
from pgguard.proxy.unread import UnreadWatch
from pgguard.proxy.watch import Watch
from pgguard.wire.fields import build_error_response

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from pgguard.attribution.ebpf.probe import SenderProbe
    from pgguard.attribution.witness import Witness
    from pgguard.faults.docket import Docket
    from pgguard.proxy.addresses import Address
    from pgguard.proxy.ends import End
    from pgguard.proxy.overview import Overview, SessionListener, SessionSnapshot, Wanted
    from pgguard.proxy.settings import Front, Settings
    from pgguard.proxy.unread import ReadingAlarm
    from pgguard.reporting.sinks import Fanout

_ROUNDS: Final = 8
"""Turns of trio's tasks in which a client who has come is let in, and what it has said is heard."""

logger = logging.getLogger(__name__)


class Guard:
    """A guard in front of one PostgreSQL, or of several, which share everything but their listeners and their policies.

    Args:
        settings: what to guard, where to listen, what to do about faults.
        sinks: where the faults go; not closed by the guard.
        docket: numbers and counts the faults.
        witness: attribution, ``None`` for none.

    Raises:
        ConfigurationError: the settings contradict themselves or can't be understood.
    """

    def __init__(self, settings: Settings, *, sinks: Fanout, docket: Docket, witness: Witness | None) -> None:
        self._settings = settings
        self._fronts = settings.fronts()
        self._offer = settings.tls()
        self._listeners: dict[str | None, list[Listener]] = {}
        """By the name of the database whose clients they are for."""
        self._witness = witness
        self._docket = docket
        self._sessions: dict[int, ProxiedSession] = {}
        """Those in the sweep, by their numbers."""
        self._counters = Counters()
        self._judge = Judge(
            policies=settings.policies(),
            sql_mode=settings.sql,
            docket=docket,
            sinks=sinks,
            witness=witness,
            sessions=self._sessions.values,
            evidence_budget=settings.evidence_budget,
            took=self._counters.evidence,
        )
        self._unread = UnreadWatch(settings.unread_answer)
        self._sweep = Sweep(
            self._judge,
            added=self._counters.added,
            cancel=self._cancel,
            answered=self._answered,
            closed=self._forget,
            stirred=self._stir,
            unread=self._unread,
        )
        self._openers = None if witness is None else OpenerStacks(witness, settings.evidence_budget)
        self._watch = Watch(self._sessions, accuse=self._sweep.accuse)
        self._watch.limit_idleness(settings.idle_in_transaction)
        self._all_gone = trio.Event()
        self._stopping = trio.Event()
        self._registrar = (
            None if witness is None else Registrar(witness, known=self._look_after, give_way=self._sweep.give_way)
        )
        self._nursery: trio.Nursery
        self._roster = Roster(
            self._sessions,
            judge=self._judge,
            watch=self._watch,
            registrar=self._registrar,
            counters=self._counters,
        )
        self._lobby = Lobby(self._sweep)
        self._receptions = {
            front.name: Reception(
                front,
                lobby=self._lobby,
                roster=self._roster,
                sweep=self._sweep,
                judge=self._judge,
                openers=self._openers,
                seconds=settings.startup_timeout,
                over=self._forget,
            )
            for front in self._fronts
        }
        for reception in self._receptions.values():
            reception.offer_tls(self._offer)
        self._admission = Admission(evidence=witness is not None, extras=self._sweep.alarms)
        self._door = Door(self._admission, make_room=self._sweep.make_room, lobby=self._lobby)

    @property
    def fronts(self) -> list[Front]:
        """The servers, each with where the guard listens for its clients: with the ports that the system has chosen."""
        return [
            front._replace(addresses=tuple(one.address for one in self._listeners.get(front.name, ())))
            for front in self._fronts
        ]

    @property
    def offered(self) -> str | None:
        """The certificate that clients are shown, for people; ``None``: they are offered no TLS."""
        return None if self._offer is None else self._offer.certificate.said

    @property
    def sessions(self) -> int:
        """How many clients have connected so far."""
        return self._roster.last_number

    def snapshot(self) -> list[SessionSnapshot]:
        """The sessions that are open, in the order in which they came."""
        return [snapshot(session) for _, session in sorted(self._sessions.items())]

    async def figures(self) -> Figures:
        """What it has done so far, in numbers. Others have their turn meanwhile, if there are many sessions."""
        counters, stint = self._counters, Stint()
        requests = counters.requests  # and then of those that are open now, also if they are over by the time
        frontend, backend = counters.messages
        activities = dict.fromkeys(Activity, 0)
        for number, session in enumerate(list(self._sessions.values()), 1):
            requests += session.requests
            sent, answered = session.messages
            frontend += sent
            backend += answered
            activities[activity(session.tracker)] += 1
            if number % GLANCES == 0:
                await stint.rest()
        from_clients, from_servers = self._sweep.passed_on
        return Figures(
            at=time.time(),
            open=activities,
            capacity=self._admission.capacity,
            clients=self._roster.last_number,
            introduced=counters.introduced,
            turned_away=counters.turned_away,
            server_answers=self.server_answers,
            requests=requests,
            messages=(frontend, backend),
            from_clients=from_clients,
            from_servers=from_servers,
            added=counters.added.measured(),
            evidence=counters.evidence.measured(),
            losses=losses(),
            unnamed=None if self._roster.senders is None else self._roster.senders.unnamed(),
        )

    async def go_round(self) -> None:
        """Wait until the relay has come round, which shows that it does. There is no end to it if it doesn't."""
        await self._sweep.pass_mark()

    def why_not_ready(self) -> str | None:
        """Why a client that comes now isn't let in: a clause; ``None`` if it is."""
        if self._stopping.is_set():
            return "it is about to end"
        if all(reception.loops.found is not None for reception in self._receptions.values()):
            return "the server's address leads back to it"
        if not self._door.is_open or not self._admission.has_room():
            return self._admission.why_full()
        return None

    async def overview(self, wanted: Wanted) -> Overview:
        """Some of the sessions that are open, and how many there are. Others have their turn meanwhile."""
        return await overview(list(self._sessions.values()), wanted, self._settings.sql, self._docket.causes_of)

    @property
    def server_answers(self) -> Mapping[str | None, bool]:
        """By the name of the database, whether its server could be connected to for its last client, if one came."""
        return dict(self._counters.server_answers)

    def tell(self, listener: SessionListener) -> None:
        """Have somebody told of each session that is opened or closed from now on."""
        self._roster.tell(listener)

    def leave_open(self, numbers: Collection[int], over: str) -> set[int]:
        """Have sessions judged that are still open although what they belong to, ``over``, has ended.

        Returns the numbers of those that are, or have been.
        """
        found = {number: self._sessions[number] for number in numbers if number in self._sessions}
        return {number for number, session in found.items() if self._watch.leave_open(session, over)}

    async def listen(self) -> list[Address]:
        """Open the listeners: from now on the system takes connections, and :meth:`serve` answers them.

        Returns:
            Where it listens, with the ports that the system has chosen.

        No thread is started, and nothing of it takes a right that is given up afterwards: it is for the process's only
        thread.

        Raises:
            ConfigurationError: it can't listen where it is told to.
        """
        _raise_descriptor_limit()
        try:
            self._prepare_door()
            for front in self._fronts:
                opened = self._listeners.setdefault(front.name, [])
                for address in front.addresses:
                    try:
                        opened += await open_listeners(address, pass_credentials=self._witness is not None)
                    except ConfigurationError as error:
                        if front.name is None:
                            raise
                        told = str(error).removeprefix("--listen")
                        raise ConfigurationError(f"databases.{front.name}.listen{told}") from error
        except BaseException:
            self.close()
            raise
        return [listener.address for listener in self._all_listeners()]

    def _all_listeners(self) -> Iterator[Listener]:
        return chain.from_iterable(self._listeners.values())

    @property
    def listener_remarks(self) -> list[str]:
        """What is to be said of where it listens: sentences for the log."""
        return [listener.remark for listener in self._all_listeners() if listener.remark is not None]

    @property
    def is_for_neighbours(self) -> bool:
        """Whether clients in other network namespaces of this host can reach it over TCP."""
        hosts = [host.partition("%")[0] for host, _ in self.tcp_listeners()]
        return not all(ipaddress.ip_address(host).is_loopback for host in hosts)

    def _prepare_door(self) -> None:
        try:
            self._door.take_in_hand()
        except OSError as error:
            raise ConfigurationError(f"{error.strerror}: {HOW_TO_RAISE}") from error

    def keep_back(self, descriptors: int) -> None:
        """Keep so many descriptors from sessions, for something that goes on beside them."""
        self._admission.keep_back(descriptors)

    def look_for_room(self) -> str | None:
        """See how many sessions there can be at once; to be called when all is open that the guard needs for itself.

        Returns:
            What to say about that if they are fewer than can come at once.

        Raises:
            ConfigurationError: there can be none.
        """
        self._admission.count_others()
        capacity, why = self._admission.capacity, self._admission.why_full()
        if not capacity:
            raise ConfigurationError(f"{why}: {HOW_TO_RAISE}")
        return None if capacity >= BACKLOG else f"{why}. {HOW_TO_RAISE}"

    def tcp_listeners(self) -> list[tuple[str, int]]:
        """The IP addresses and ports that it listens on."""
        return [
            (listener.address.host, listener.address.port)
            for listener in self._all_listeners()
            if isinstance(listener.address, TcpAddress)
        ]

    def use_probe(self, probe: SenderProbe) -> None:
        """Have the kernel name the senders on TCP connections that are made from now on; not closed by the guard."""
        self._roster.senders = KernelSenders(probe)
        self._sweep.name_senders(self._roster.senders)

    def remarks(self) -> list[str]:
        """What the kernel couldn't say about senders on TCP: clauses for the end, none if all was known."""
        return [] if self._roster.senders is None else self._roster.senders.remarks()

    async def serve(self) -> None:
        """Relay until :meth:`stop`, then until the sessions are done or time is up.

        Cancelling it closes everything at once.
        """
        self._admission.count_others()
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self._lobby.open()
                nursery.start_soon(self._sweep.run)
                nursery.start_soon(keep_going, self._lobby.run)
                for reception in self._receptions.values():
                    reception.open(nursery)
                    nursery.start_soon(reception.run)
                nursery.start_soon(keep_going, self._judge.settle_accounts)
                nursery.start_soon(keep_going, self._judge.count_waiting)
                nursery.start_soon(keep_going, self._judge.write_what_waits)
                nursery.start_soon(keep_going, self._watch.over_transactions)
                if self._witness is not None and self._registrar is not None:
                    nursery.start_soon(keep_going, looking.over_hangs)
                    nursery.start_soon(keep_going, _stay_awake, self._witness)
                    nursery.start_soon(keep_going, self._registrar.run)
                    nursery.start_soon(keep_going, self._judge.look_at_strangers, self._witness)
                    nursery.start_soon(keep_going, self._watch.over_heirs, self._witness)
                    nursery.start_soon(keep_going, self._watch.over_readers, self._witness)
                    nursery.start_soon(keep_going, self._watch_unread, self._witness)
                self._door.open(
                    {one: self._receptions[name] for name, listeners in self._listeners.items() for one in listeners}
                )
                await self._stopping.wait()
                self.close()
                await self._finish_sessions()
                nursery.cancel_scope.cancel()
        finally:
            with spared(Loss.RECORD):
                self._judge.count_rest()
            self.close()
            for reception in self._receptions.values():
                reception.close()
            self._lobby.close()

    def close(self) -> None:
        """Stop listening, if that has been begun; sessions go on. Can be called again."""
        self._door.close()
        for listener in self._all_listeners():
            listener.close()
        self._listeners.clear()

    def reload(self, settings: Settings) -> None:
        """Go on by other settings: those that :func:`pgguard.proxy.settings.reload_settings` lets change.

        Raises:
            ConfigurationError: they contradict themselves; nothing has changed.
        """
        self._judge.follow(settings.policies(), settings.sql, settings.evidence_budget)
        if self._openers is not None:
            self._openers.limit(settings.evidence_budget)
        self._settings = settings
        for reception in self._receptions.values():
            reception.limit(settings.startup_timeout)
        self._watch.limit_idleness(settings.idle_in_transaction)
        self._unread.limit(settings.unread_answer)

    async def renew_certificate(self) -> str | None:
        """Read the certificate again that clients are shown, for those that come from now on.

        Returns:
            What it is now, for people, if it is another one.

        Raises:
            ConfigurationError: it can't be shown; the one before goes on to be.
        """
        if self._offer is None:
            return None
        found = await trio.to_thread.run_sync(self._offer.read_again, abandon_on_cancel=True)
        return found.said if found is not None and self._offer.show(found) else None

    async def read_server_files(self, front: Front) -> bool:
        """Read the files again that are for TLS to one of the servers, for connections that are made from now on.

        Returns False if there are none.

        Raises:
            ConfigurationError: one can't be used; what they said before goes on to be.
        """
        tls = front.upstream.tls
        if tls is None:
            return False
        try:
            found = await trio.to_thread.run_sync(tls.read_again, abandon_on_cancel=True)
        except ConfigurationError as error:
            raise ConfigurationError(f"{front.setting}{str(error).removeprefix('--upstream')}") from error
        tls.follow(found)
        return tls.has_files

    def stop(self) -> None:
        """Accept nobody any more, and end when the sessions are done, or after the settings' ``shutdown_timeout``.

        Sessions that aren't done by then are cut off, and so are all that are left if :meth:`serve` is cancelled after
        this; the queries that run for them are cancelled on the server.
        """
        for reception in self._receptions.values():
            reception.end()
        self._stopping.set()

    async def settled(self) -> None:
        """Wait until everything has been judged, and its faults recorded, that had come when this was called.

        It goes on meanwhile, and what comes then isn't waited for. There is no end to it if a client is held for
        something that doesn't come: give it a deadline.
        """
        await self._let_in()
        await self._sweep.come_round()
        await self._judge.settled()

    async def _let_in(self) -> None:
        """Let those clients in who have come, and hear what they have said, if that is nothing that takes time."""
        seen, rounds = (0, 0), _ROUNDS
        while rounds and (self._roster.arriving or any(map(_has_clients, self._all_listeners()))):
            await trio.lowlevel.checkpoint()
            # If none comes in any more there is no room for them; if none gets any further they have said nothing.
            before, seen = seen, (self._roster.last_number, len(self._sessions))
            rounds = rounds - 1 if seen == before else _ROUNDS

    async def _finish_sessions(self) -> None:
        self._sweep.stop_lingering()
        if self._sessions:
            timeout = self._settings.shutdown_timeout
            with spared(Loss.STEP):
                logger.info("waiting up to %g s for %s to finish", timeout, counted(len(self._sessions), "session"))
            with trio.move_on_after(timeout):
                await self._all_gone.wait()
        farewell = build_error_response(
            "pgguard: terminating connection because the guard is shutting down",
            sqlstate="57P01",
        )
        for session in list(self._sessions.values()):
            self._sweep.dismiss(session, farewell)

    async def _watch_unread(self, witness: Witness) -> None:
        await self._unread.run(witness, accuse=self._sweep.accuse, set_alarm=self._set_alarm)

    def _set_alarm(self, client: End) -> ReadingAlarm:
        """Be told when a client reads, if there is a descriptor to spare for that. Raises OSError."""
        if not self._admission.has_room(1):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return self._sweep.set_alarm(client)

    # In front of itself

    async def find_loop(self) -> str | None:
        """Find out whether connections to a server come back to the guard, which has to be serving.

        Returns what is wrong, for people, or ``None``. Takes as long as the servers take to ignore a CancelRequest.
        """
        found: list[str] = []

        async def look(reception: Reception) -> None:
            with spared(Loss.STEP):
                if (loop := await reception.loops.find()) is not None:
                    found.append(loop)
                    nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for reception in self._receptions.values():
                nursery.start_soon(look, reception)
        return found[0] if found else None

    def unreachable(self) -> list[str]:
        """What to say of addresses that could not be connected to when it was last looked for a loop."""
        said = [reception.loops.what_is_unreachable() for reception in self._receptions.values()]
        return [one for one in said if one is not None]

    def encryption(self, name: str | None = None) -> str | None:
        """How a server is connected to, where there may be TLS, as far as that is known: a few words for people.

        Args:
            name: what it is called, if there are several.
        """
        return self._receptions[name].loops.how_it_is_encrypted()

    # What the sweep wants done

    def _cancel(self, session: ProxiedSession) -> None:
        self._nursery.start_soon(self._receptions[session.through].cancel_query, session)

    def _answered(self, session: ProxiedSession) -> None:
        self._receptions[session.through].gate.leave(session.id)

    def _stir(self, session: ProxiedSession) -> None:
        """Its client has sent something, for the first time since one of the watches has found it at rest."""
        self._unread.stir(session)
        self._watch.stir(session)

    def _look_after(self, session: ProxiedSession) -> None:
        """It is known by now who opened it, or that it can't be known."""
        if session.id in self._sessions:
            self._stir(session)

    def _forget(self, session: ProxiedSession) -> None:
        """It is over, and its sockets are closed."""
        if self._roster.leave(session):
            try:
                self._unread.leave(session)
            except Exception:
                note(Loss.TIDINESS, session)
            self._receptions[session.through].gate.leave(session.id)
            # There are two descriptors more.
            self._admission.vacate()
            self._door.somebody_left()
            if self._stopping.is_set() and not self._sessions:
                self._all_gone.set()


async def _stay_awake(witness: Witness) -> None:
    """Let attribution know when the guard wasn't awake; until cancelled."""
    while True:
        with spared(Loss.EVIDENCE):
            witness.stay_awake()
        await trio.sleep(BEAT)


def _has_clients(listener: Listener) -> bool:
    """Whether somebody waits to be let in."""
    ready = select.poll()
    ready.register(listener.socket, select.POLLIN)
    return bool(ready.poll(0))


def _raise_descriptor_limit() -> None:
    """A session takes two descriptors, and the usual soft limit of 1024 is there for select(2), which isn't used."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
