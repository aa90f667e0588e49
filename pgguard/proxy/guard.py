"""The guard: listeners, one task for each client that is just arriving, and the sweep for all that have arrived.

The tasks, all children of :meth:`Guard.serve`:

- one for each listener, accepting (:mod:`pgguard.proxy.door`);
- one for each new client, until it has been introduced to the server (:mod:`pgguard.proxy.greeting`);
- the sweep (:mod:`pgguard.proxy.sweep`), with a task for each session that is being judged;
- the registrar, which finds out who opened new connections (:mod:`pgguard.proxy.registrar`);
- the watch over what no message shows (:mod:`pgguard.proxy.watch`);
- one that has accounted for what was suppressed of the records.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import math
import os
import resource
import select
import socket
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from pgguard.attribution.sockets import TcpClient, client_socket
from pgguard.attribution.vigil import BEAT
from pgguard.faults.build import discreet_facts
from pgguard.faults.text import counted, named
from pgguard.proxy import looking
from pgguard.proxy.addresses import TcpAddress
from pgguard.proxy.admission import Admission, too_many
from pgguard.proxy.declined import DeclinedClients
from pgguard.proxy.door import Door
from pgguard.proxy.errors import ConfigurationError, LeadsBackError
from pgguard.proxy.gate import Gate
from pgguard.proxy.greeting import Dismissed, as_plain, greet, refusal, send_last
from pgguard.proxy.judge import Judge
from pgguard.proxy.kernel_senders import KernelSenders
from pgguard.proxy.listeners import BACKLOG, Listener, open_listeners
from pgguard.proxy.loops import LoopWatch
from pgguard.proxy.losses import Loss, keep_going, note, spared
from pgguard.proxy.openers import OpenerStacks
from pgguard.proxy.overview import snapshot
from pgguard.proxy.registrar import Registrar
from pgguard.proxy.relay import FAILED
from pgguard.proxy.remedies import HOW_TO_RAISE
from pgguard.proxy.session import ProxiedSession
from pgguard.proxy.sweep import Sweep
from pgguard.proxy.turns import Turns, Urgency
from pgguard.proxy.unread import UnreadWatch
from pgguard.proxy.upstream import DECLINED, UpstreamUnavailable, ask, cancel_query, introduce, reason, relay_cancel
from pgguard.proxy.watch import Watch
from pgguard.session.tracker import Tracker
from pgguard.wire.fields import build_error_response
from pgguard.wire.startup import PacketKind

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Mapping

    from pgguard.attribution.ebpf.probe import SenderProbe
    from pgguard.attribution.sockets import ClientSocket
    from pgguard.attribution.witness import Witness
    from pgguard.faults.docket import Docket
    from pgguard.proxy.addresses import Address, Upstream
    from pgguard.proxy.ends import End
    from pgguard.proxy.greeting import Greeting
    from pgguard.proxy.kernel_senders import TcpAccount
    from pgguard.proxy.overview import SessionListener, SessionSnapshot
    from pgguard.proxy.settings import Settings
    from pgguard.proxy.unread import ReadingAlarm
    from pgguard.reporting.sinks import Fanout

_TRACKED_MAJOR: Final = 3
_GONE: Final = frozenset({errno.ENOTCONN, errno.EINVAL, errno.ECONNRESET, errno.EPIPE})
"""What the kernel says of a connection that has been reset before it was accepted."""
_HASTE: Final = 2.0
"""Seconds for a client to say who it is that is to be told that there is no room."""
_INTRODUCTION: Final = 0.25
"""Seconds to find out who has brought a mark back."""
_LAST_CANCEL: Final = 1.0
"""Seconds in which queries are cancelled whose sessions are cut off as the guard ends."""

_ROUNDS: Final = 8
"""Turns of trio's tasks in which a client who has come is let in, and what it has said is heard."""

logger = logging.getLogger(__name__)


class Guard:
    """A guard in front of one PostgreSQL.

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
        self._upstream = settings.server()
        self._addresses = settings.addresses()
        self._listeners: list[Listener] = []
        self._witness = witness
        self._sessions: dict[int, ProxiedSession] = {}
        """Those in the sweep, by their numbers."""
        self._session_listeners: list[SessionListener] = []
        self._present: set[int] = set()
        """The numbers of those that have been admitted: also of those on their way to the sweep."""
        self._judge = Judge(
            policy=settings.policy(),
            sql_mode=settings.sql,
            docket=docket,
            sinks=sinks,
            witness=witness,
            sessions=self._sessions.values,
            evidence_budget=settings.evidence_budget,
        )
        self._unread = UnreadWatch(settings.unread_answer)
        self._sweep = Sweep(
            self._judge,
            cancel=self._cancel,
            answered=self._answered,
            closed=self._forget,
            stirred=self._stir,
            unread=self._unread,
        )
        self._openers = None if witness is None else OpenerStacks(witness, settings.evidence_budget)
        self._watch = Watch(self._sessions, accuse=self._sweep.accuse)
        self._watch.limit_idleness(settings.idle_in_transaction)
        self._senders: KernelSenders | None = None
        self._last_number = 0
        self._all_gone = trio.Event()
        self._stopping = trio.Event()
        self._registrar = None if witness is None else Registrar(witness)
        self._nursery: trio.Nursery
        self._admission = Admission(evidence=witness is not None, extras=lambda: self._sweep.alarms)
        self._door = Door(
            self._admission, make_room=self._sweep.make_room, receive=self._receive, turn_away=self._turn_away
        )
        self._declined = DeclinedClients()
        self._loops = LoopWatch(self._upstream)
        self._arrivals = Turns()
        self._gate = Gate(self._suspect_loop)
        self._cancel_gate = Gate(self._suspect_loop)

    @property
    def upstream(self) -> Upstream:
        """Where PostgreSQL is."""
        return self._upstream

    @property
    def sessions(self) -> int:
        """How many clients have connected so far."""
        return self._last_number

    def snapshot(self) -> list[SessionSnapshot]:
        """The sessions that are open, in the order in which they came."""
        return [snapshot(session) for _, session in sorted(self._sessions.items())]

    def tell(self, listener: SessionListener) -> None:
        """Have somebody told of each session that is opened or closed from now on."""
        self._session_listeners.append(listener)

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
            for address in self._addresses:
                self._listeners += await open_listeners(address, pass_credentials=self._witness is not None)
        except BaseException:
            self.close()
            raise
        return [listener.address for listener in self._listeners]

    @property
    def listener_remarks(self) -> list[str]:
        """What is to be said of where it listens: sentences for the log."""
        return [listener.remark for listener in self._listeners if listener.remark is not None]

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
            listener.socket.getsockname()[:2]
            for listener in self._listeners
            if isinstance(listener.address, TcpAddress)
        ]

    def use_probe(self, probe: SenderProbe) -> None:
        """Have the kernel name the senders on TCP connections that are made from now on; not closed by the guard."""
        self._senders = KernelSenders(probe)
        self._sweep.name_senders(self._senders)

    def remarks(self) -> list[str]:
        """What the kernel couldn't say about senders on TCP: clauses for the end, none if all was known."""
        return [] if self._senders is None else self._senders.remarks()

    async def serve(self) -> None:
        """Relay until :meth:`stop`, then until the sessions are done or time is up.

        Cancelling it closes everything at once.
        """
        self._admission.count_others()
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._sweep.run)
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
                async with trio.open_nursery() as accepting:
                    for listener in self._listeners:
                        accepting.start_soon(keep_going, self._door.open, listener, nursery)
                    await self._stopping.wait()
                    accepting.cancel_scope.cancel()
                self.close()
                await self._finish_sessions()
                nursery.cancel_scope.cancel()
        finally:
            with spared(Loss.RECORD):
                self._judge.count_rest()
            self.close()

    def close(self) -> None:
        """Stop listening, if that has been begun; sessions go on. Can be called again."""
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        self._door.give_up()

    def reload(self, settings: Settings) -> None:
        """Go on by other settings: those that :func:`pgguard.proxy.settings.reload_settings` lets change.

        Raises:
            ConfigurationError: they contradict themselves; nothing has changed.
        """
        self._judge.follow(settings.policy(), settings.sql, settings.evidence_budget)
        if self._openers is not None:
            self._openers.limit(settings.evidence_budget)
        self._settings = settings
        self._watch.limit_idleness(settings.idle_in_transaction)
        self._unread.limit(settings.unread_answer)

    def stop(self) -> None:
        """Accept nobody any more, and end when the sessions are done, or after the settings' ``shutdown_timeout``.

        Sessions that aren't done by then are cut off, and so are all that are left if :meth:`serve` is cancelled after
        this; the queries that run for them are cancelled on the server.
        """
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
        while rounds and (len(self._present) > len(self._sessions) or any(map(_has_clients, self._listeners))):
            await trio.lowlevel.checkpoint()
            # If none comes in any more there is no room for them; if none gets any further they have said nothing.
            before, seen = seen, (self._last_number, len(self._sessions))
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

    # Arriving clients

    async def _receive(self, sock: trio.socket.SocketType, listener: Listener) -> None:
        """Introduce one client to the server, or tell it why not. Whatever happens to it happens to it alone."""
        session: ProxiedSession | None = None
        try:
            with spared(Loss.ARRIVAL), sock:
                try:
                    session = self._new_session(sock, listener, is_admitted=True)
                except OSError:
                    return  # gone before it could be asked who it was
                self._present.add(session.id)
                self._sweep.hurry()
                seconds = self._settings.startup_timeout
                await self._attend(sock, session, seconds, partial(self._oblige, sock, session, listener))
        finally:
            if session is None:
                self._vacate()
            elif session.id not in self._sessions:
                self._forget(session)

    async def _turn_away(self, sock: trio.socket.SocketType, listener: Listener, response: bytes) -> None:
        """Tell one client that there is no room for it. What cancels something is passed on all the same."""
        with spared(Loss.ARRIVAL), sock:
            try:
                session = self._new_session(sock, listener, is_admitted=False)
            except OSError:
                return
            try:
                seconds = min(_HASTE, self._settings.startup_timeout)
                await self._attend(sock, session, seconds, partial(self._decline, sock, session, listener, response))
            finally:
                self._settle(session)

    async def _attend(
        self,
        sock: trio.socket.SocketType,
        session: ProxiedSession,
        seconds: float,
        oblige: Callable[[Greeting], Awaitable[None]],
    ) -> None:
        """Hear what a client wants, and do it.

        Args:
            sock: its socket.
            session: what it is to become.
            seconds: for it to say what it wants.
            oblige: what to do about it.
        """
        try:
            with trio.move_on_after(seconds) as limit:
                greeting = await greet(sock, session, senders=self._senders)
            await self._arrivals.step(Urgency.MESSAGE)
            if limit.cancelled_caught:
                logger.info("session %d: %s did not send a startup packet in time", session.id, _who(session))
            else:
                if greeting.verdict is not None:
                    await self._judge.rule_surely(session, greeting.verdict)
                await oblige(greeting)
        except Dismissed as dismissed:
            if dismissed.insists_on is not None:
                self._nursery.start_soon(self._declined.consider, session, dismissed.insists_on)
            if dismissed.verdict is not None:
                await self._judge.rule_surely(session, dismissed.verdict)
        except UpstreamUnavailable as error:
            logger.warning("session %d: could not connect to the server: %s", session.id, error)
            await send_last(sock, _unavailable(error))
        except (OSError, trio.BrokenResourceError) as error:
            logger.info("session %d: %s: %s", session.id, _who(session), error)

    async def _oblige(
        self, sock: trio.socket.SocketType, session: ProxiedSession, listener: Listener, greeting: Greeting
    ) -> None:
        if greeting.packet.kind is PacketKind.CANCEL_REQUEST:
            await self._pass_cancel_on(sock, session, listener, greeting.packet.packet)
            return
        if self._openers is not None and not greeting.packet.encrypts:
            with spared(Loss.OPENER, session):
                await self._openers.look(session)
        await self._gate.enter(session.id)
        await self._refuse_loop()
        if greeting.packet.encrypts:
            answer = await ask(self._upstream, greeting.before, greeting.packet.packet + greeting.behind)
            await trio.SocketStream(sock).send_all(refusal(greeting) if answer is None else answer)
        else:
            await self._introduce(sock, session, greeting)

    async def _decline(
        self,
        sock: trio.socket.SocketType,
        session: ProxiedSession,
        listener: Listener,
        response: bytes,
        greeting: Greeting,
    ) -> None:
        if greeting.packet.kind is PacketKind.CANCEL_REQUEST:
            await self._pass_cancel_on(sock, session, listener, greeting.packet.packet)
        else:
            await send_last(sock, refusal(greeting) if greeting.packet.encrypts else response)

    async def _pass_cancel_on(
        self, sock: trio.socket.SocketType, session: ProxiedSession, listener: Listener, packet: bytes
    ) -> None:
        if self._loops.recognizes(packet):
            await self._note_loop(sock, session, listener)
            return
        await self._cancel_gate.enter(session.id)
        try:
            await self._refuse_loop()
            await relay_cancel(self._upstream, packet)
        finally:
            self._cancel_gate.leave(session.id)

    def _new_session(self, sock: trio.socket.SocketType, listener: Listener, *, is_admitted: bool) -> ProxiedSession:
        self._last_number += 1
        with spared(Loss.STEP):
            self._watch.arrival()
        client_name = None
        if isinstance(listener.address, TcpAddress):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            host, port = sock.getpeername()[:2]
            client_name = str(TcpAddress(host, port))
        kernel_account = self._open_account(sock) if client_name is not None and is_admitted else None
        session = ProxiedSession(
            self._last_number,
            transport=listener.transport,
            client_name=client_name,
            client_socket=_describe(sock, kernel_account) if self._witness is not None and is_admitted else None,
            opened_at=time.time(),
        )
        session.kernel_account = kernel_account
        if self._registrar is not None and session.client_socket is not None:
            self._registrar.enroll(session)
        return session

    def _open_account(self, sock: trio.socket.SocketType) -> TcpAccount | None:
        if self._senders is None:
            return None
        try:
            return as_plain(sock, self._senders.open)
        except Exception as error:
            _note_unless_gone(error, Loss.SENDER)
            return None

    def _settle(self, session: ProxiedSession) -> None:
        """Do what is left to be done for a session that is over."""
        account = session.kernel_account
        with spared(Loss.TIDINESS, session):
            self._watch.leave(session)
        with spared(Loss.TIDINESS, session):
            self._judge.closed(session)
        with spared(Loss.TIDINESS, session):
            if self._registrar is not None:
                self._registrar.strike_off(session)
        with spared(Loss.TIDINESS, session):
            if self._senders is not None and account is not None:
                self._senders.close(account)

    # In front of itself

    async def find_loop(self) -> str | None:
        """Find out whether connections to the server come back to the guard, which has to be serving.

        Returns what is wrong, for people, or ``None``. Takes as long as the server takes to ignore a CancelRequest.
        """
        found = None
        with spared(Loss.STEP):
            found = await self._loops.seek()
        return None if found is None else f"--upstream {self._upstream}: {found}: name PostgreSQL's own address"

    def unreachable(self) -> str | None:
        """What to say of addresses that could not be connected to when it was last looked for a loop."""
        failures = self._loops.unreachable
        if not failures:
            return None
        where = ", ".join(f"{address} ({reason(error)})" for address, error in failures.items())
        outlook = (
            "so clients get an error: check that it is running there, and that --upstream is right"
            if len(failures) == len(self._upstream.addresses)
            else "so only its other addresses are used"
        )
        return f"PostgreSQL can't be reached at {where}, {outlook}"

    def _suspect_loop(self) -> None:
        """The server doesn't answer: is that because it is the guard that has been connected to?"""
        self._nursery.start_soon(self._look_for_loop)

    async def _look_for_loop(self) -> None:
        with spared(Loss.STEP):
            found = await self._loops.suspect()
            if found is not None:
                logger.error("clients are refused until this is corrected: --upstream %s: %s", self._upstream, found)

    async def _refuse_loop(self) -> None:
        if self._loops.found is not None and (found := await self._loops.seek_again()) is not None:
            raise UpstreamUnavailable([(self._upstream, LeadsBackError(found))])

    async def _note_loop(self, sock: trio.socket.SocketType, session: ProxiedSession, listener: Listener) -> None:
        """A mark has come round."""
        if self._loops.is_from_here(sock):
            how = "that is where pgguard itself listens"
        else:
            how = (
                f"it leads back to {listener.address}, where pgguard itself listens, through {await _bringer(session)}"
            )
        self._loops.came_back(how)

    # Into the sweep

    async def _introduce(self, sock: trio.socket.SocketType, session: ProxiedSession, greeting: Greeting) -> None:
        packet = greeting.packet
        if not greeting.before:
            self._declined.arrived_plain(session)
        major, minor = packet.version
        untracked = (
            None
            if major == _TRACKED_MAJOR
            else f"the client speaks protocol {major}.{minor}, which pgguard can't follow"
        )
        parameters: Mapping[str, str] = {}
        tracker = None
        try:
            parameters = packet.parameters
            tracker = None if untracked else Tracker(parameters, greeting.sender)
        except Exception:
            note(Loss.TRACKING, session)
            untracked = FAILED
        self._sweep.hurry()
        server, session.upstream, rest = await introduce(self._upstream, packet.packet)
        session.settings = parameters
        session.connect(_detach(sock), _detach(server), tracker, sender=greeting.sender)
        session.preamble = len(greeting.before) * len(DECLINED)
        self._sessions[session.id] = session
        for watching in self._session_listeners:
            with spared(Loss.STEP, session):
                watching.opened(discreet_facts(session.facts()))
        if untracked is not None and greeting.verdict is None:
            with spared(Loss.RECORD, session):
                self._judge.lost(session, untracked, time.time())
        with spared(Loss.STEP, session):
            self._watch.stir(session)
        self._sweep.add(session, rest)

    # What the sweep wants done

    def _cancel(self, session: ProxiedSession) -> None:
        self._nursery.start_soon(self._cancel_query, session)

    async def _cancel_query(self, session: ProxiedSession) -> None:
        key = session.protocol.cancel_key if session.protocol is not None else None
        if key is None or session.upstream is None:
            return
        # A guard that ends waits for it for a moment, and for no longer.
        ends = self._stopping.is_set()
        if not ends:
            await self._cancel_gate.enter(session.id)
        try:
            with trio.CancelScope(shield=ends, deadline=trio.current_time() + (_LAST_CANCEL if ends else math.inf)):
                await cancel_query(session.upstream, self._upstream.connect_timeout, key)
        except UpstreamUnavailable as error:
            logger.warning("session %d: its query could not be cancelled: %s", session.id, error)
        except Exception:
            note(Loss.STEP, session)
        finally:
            self._cancel_gate.leave(session.id)

    def _answered(self, session: ProxiedSession) -> None:
        self._gate.leave(session.id)

    def _stir(self, session: ProxiedSession) -> None:
        """Its client has sent something, for the first time since one of the watches has found it at rest."""
        self._unread.stir(session)
        self._watch.stir(session)

    def _forget(self, session: ProxiedSession) -> None:
        """It is over, and its sockets are closed."""
        if session.id not in self._present:
            return
        self._present.remove(session.id)
        self._gate.leave(session.id)
        self._settle(session)
        if self._sessions.pop(session.id, None) is not None:
            for watching in self._session_listeners:
                with spared(Loss.STEP, session):
                    watching.closed(discreet_facts(session.facts()))
        self._vacate()
        if self._stopping.is_set() and not self._sessions:
            self._all_gone.set()

    def _vacate(self) -> None:
        """There are two descriptors more."""
        self._admission.vacate()
        self._door.somebody_left()


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


def _who(session: ProxiedSession) -> str:
    return session.client_name or "a client on a Unix socket"


async def _bringer(session: ProxiedSession) -> str:
    """Who has brought a mark round, as far as it can be told quickly."""
    if session.client_socket is not None:
        with trio.move_on_after(_INTRODUCTION):
            await session.wait_for_opening()
    opener = None if session.opening is None else session.opening.opener
    return _who(session) if opener is None else named(opener.pid, opener)


def _unavailable(error: UpstreamUnavailable) -> bytes:
    if error.exhausted:
        return too_many(str(error), error.hint)
    text = f"pgguard: could not connect to the server: {error}"
    return build_error_response(text, sqlstate="08001", hint=error.hint)


def _describe(sock: trio.socket.SocketType, kernel_account: TcpAccount | None) -> ClientSocket | None:
    """Write down whose socket is at the other end of one that trio still has, and who connected it if that is known."""
    try:
        client = as_plain(sock, client_socket)
    except Exception as error:
        _note_unless_gone(error, Loss.OPENER)
        return None
    opener = None if kernel_account is None else kernel_account.account.opener
    if opener is None or not isinstance(client, TcpClient):
        return client
    return replace(client, connected_by=opener.pid, connected_on=opener.tid)


def _note_unless_gone(error: Exception, loss: Loss) -> None:
    """A client that is gone already is not looked at, and will be found out to be gone."""
    if not isinstance(error, OSError) or error.errno not in _GONE:
        note(loss)


def _detach(sock: trio.socket.SocketType) -> socket.socket:
    """Take a socket out of trio's hands, for the sweep."""
    return socket.socket(sock.family, sock.type, sock.proto, fileno=sock.detach())


def _raise_descriptor_limit() -> None:
    """A session takes two descriptors, and the usual soft limit of 1024 is there for select(2), which isn't used."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
