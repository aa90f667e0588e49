"""The guard: listeners, one task for each client that is just arriving, and the sweep for all that have arrived.

The tasks, all children of :meth:`Guard.serve`:

- one for each listener, accepting;
- one for each new client, until it has been introduced to the server (:mod:`pgguard.proxy.greeting`);
- the sweep (:mod:`pgguard.proxy.sweep`), with a task for each session that is being judged;
- the registrar, which finds out who opened new connections;
- the watch over what no message shows (:mod:`pgguard.proxy.watch`).
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import math
import resource
import socket
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import trio

from pgguard.attribution.holders import sole_holder
from pgguard.attribution.sockets import TcpClient, client_socket
from pgguard.proxy.addresses import TcpAddress
from pgguard.proxy.greeting import Dismissed, as_plain, greet, refusal, send_last
from pgguard.proxy.judge import Judge
from pgguard.proxy.kernel_senders import KernelSenders
from pgguard.proxy.listeners import Listener, open_listeners, refuse_loop
from pgguard.proxy.losses import Loss, keep_going, note, spared
from pgguard.proxy.session import ProxiedSession
from pgguard.proxy.sweep import TRACKER_FAILED, Sweep
from pgguard.proxy.unread import UnreadWatch
from pgguard.proxy.upstream import DECLINED, UpstreamUnavailable, ask, cancel_query, connect_upstream, relay_cancel
from pgguard.proxy.watch import Watch
from pgguard.session.tracker import Tracker
from pgguard.wire.fields import build_error_response
from pgguard.wire.startup import PacketKind

if TYPE_CHECKING:
    from pgguard.attribution.ebpf.probe import SenderProbe
    from pgguard.attribution.sockets import ClientSocket
    from pgguard.attribution.witness import Witness
    from pgguard.faults.docket import Docket
    from pgguard.proxy.addresses import Address, Upstream
    from pgguard.proxy.greeting import Greeting
    from pgguard.proxy.kernel_senders import TcpAccount
    from pgguard.proxy.settings import Settings
    from pgguard.reporting.sinks import Fanout

_TRACKED_MAJOR: Final = 3
_OUT_OF_DESCRIPTORS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_GONE: Final = frozenset({errno.ENOTCONN, errno.EINVAL, errno.ECONNRESET, errno.EPIPE})
"""What the kernel says of a connection that has been reset before it was accepted."""
_ACCEPT_PAUSE: Final = 0.1
"""Seconds to wait for descriptors to become free."""
_ACCEPT_COMPLAINTS: Final = 60.0
"""Seconds between two complaints that there are none."""

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
        self._judge = Judge(
            policy=settings.policy(),
            sql_mode=settings.sql,
            docket=docket,
            sinks=sinks,
            witness=witness,
            sessions=self._sessions.values,
        )
        self._unread = UnreadWatch(settings.unread_answer)
        self._sweep = Sweep(self._judge, cancel=self._cancel, closed=self._forget, unread=self._unread)
        self._watch = Watch(self._sessions, accuse=self._sweep.accuse)
        self._senders: KernelSenders | None = None
        self._last_number = 0
        self._all_gone = trio.Event()
        self._stopping = trio.Event()
        self._openings_send, self._openings = trio.open_memory_channel[ProxiedSession](1024)
        self._nursery: trio.Nursery

    @property
    def upstream(self) -> Upstream:
        """Where PostgreSQL is."""
        return self._upstream

    @property
    def sessions(self) -> int:
        """How many clients have connected so far."""
        return self._last_number

    async def listen(self) -> list[Address]:
        """Open the listeners: from now on the system takes connections, and :meth:`serve` answers them.

        Returns:
            Where it listens, with the ports that the system has chosen.

        No thread is started, and nothing of it takes a right that is given up afterwards: it is for the process's only
        thread. :meth:`refuse_loop` comes next.

        Raises:
            ConfigurationError: it can't listen where it is told to.
        """
        try:
            for address in self._addresses:
                self._listeners += await open_listeners(address, pass_credentials=self._witness is not None)
        except BaseException:
            self.close()
            raise
        return [listener.address for listener in self._listeners]

    async def refuse_loop(self) -> None:
        """See to it that the server isn't the guard itself; the listeners are closed if it is.

        Raises:
            ConfigurationError: an address of the upstream is one that it listens on.
        """
        try:
            await refuse_loop(self._listeners, self._upstream)
        except BaseException:
            self.close()
            raise

    @property
    def listener_remarks(self) -> list[str]:
        """What is to be said of where it listens: sentences for the log."""
        return [listener.remark for listener in self._listeners if listener.remark is not None]

    @property
    def is_for_neighbours(self) -> bool:
        """Whether clients in other network namespaces of this host can reach it over TCP."""
        hosts = [host.partition("%")[0] for host, _ in self.tcp_listeners()]
        return not all(ipaddress.ip_address(host).is_loopback for host in hosts)

    def tcp_listeners(self) -> list[tuple[str, int]]:
        """The IP addresses and ports that it listens on."""
        return [
            listener.socket.getsockname()[:2]
            for listener in self._listeners
            if isinstance(listener.address, TcpAddress)
        ]

    def use_probe(self, probe: SenderProbe) -> None:
        """Have the kernel name the senders on TCP connections that are made from now on; not closed by the guard."""
        self._senders = self._sweep.senders = KernelSenders(probe)

    def remarks(self) -> list[str]:
        """What the kernel couldn't say about senders on TCP: clauses for the end, none if all was known."""
        return [] if self._senders is None else self._senders.remarks()

    async def serve(self) -> None:
        """Relay until :meth:`stop`, then until the sessions are done or time is up.

        Cancelling it closes everything at once.
        """
        _raise_descriptor_limit()
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._sweep.run)
                nursery.start_soon(keep_going, self._watch.over_transactions, self._settings.idle_in_transaction)
                if self._witness is not None:
                    nursery.start_soon(keep_going, self._register, self._witness)
                    nursery.start_soon(keep_going, self._judge.look_at_strangers, self._witness)
                    nursery.start_soon(keep_going, self._watch.over_heirs, self._witness)
                    nursery.start_soon(keep_going, self._watch.over_readers, self._witness)
                    nursery.start_soon(keep_going, self._watch_unread, self._witness)
                async with trio.open_nursery() as accepting:
                    for listener in self._listeners:
                        accepting.start_soon(self._accept, listener)
                    await self._stopping.wait()
                    accepting.cancel_scope.cancel()
                self.close()
                await self._finish_sessions()
                nursery.cancel_scope.cancel()
        finally:
            self.close()

    def close(self) -> None:
        """Stop listening, if that has been begun; sessions go on. Can be called again."""
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()

    def stop(self) -> None:
        """Accept nobody any more, and end when the sessions are done, or after the settings' ``shutdown_timeout``."""
        self._stopping.set()

    async def _finish_sessions(self) -> None:
        self._sweep.stop_lingering()
        if self._sessions:
            timeout = self._settings.shutdown_timeout
            logger.info("waiting up to %g s for sessions to finish: %d open", timeout, len(self._sessions))
            with trio.move_on_after(timeout):
                await self._all_gone.wait()
        farewell = build_error_response(
            "pgguard: terminating connection because the guard is shutting down",
            sqlstate="57P01",
        )
        for session in list(self._sessions.values()):
            self._sweep.dismiss(session, farewell)

    async def _watch_unread(self, witness: Witness) -> None:
        await self._unread.run(witness, accuse=self._sweep.accuse, set_alarm=self._sweep.set_alarm)

    # Arriving clients

    async def _accept(self, listener: Listener) -> None:
        quiet_until = -math.inf
        while True:
            try:
                sock, _ = await listener.socket.accept()
            except OSError as error:
                if error.errno in _OUT_OF_DESCRIPTORS:
                    if trio.current_time() >= quiet_until:
                        logger.error("can't accept connections: %s; raise the limit (ulimit -n)", error.strerror)  # noqa: TRY400
                        quiet_until = trio.current_time() + _ACCEPT_COMPLAINTS
                    await trio.sleep(_ACCEPT_PAUSE)
                # Anything else is about the one connection, which is gone: accept(2), "Error handling".
                continue
            self._nursery.start_soon(self._receive, sock, listener)

    async def _receive(self, sock: trio.socket.SocketType, listener: Listener) -> None:
        """Introduce one client to the server, or tell it why not. Whatever happens to it happens to it alone."""
        with spared(Loss.ARRIVAL), sock:
            try:
                session = self._new_session(sock, listener)
            except OSError:
                return  # gone before it could be asked who it was
            try:
                await self._greet(sock, session)
            finally:
                if session.id not in self._sessions:
                    self._settle(session)

    async def _greet(self, sock: trio.socket.SocketType, session: ProxiedSession) -> None:
        self._sweep.hurry()
        try:
            with trio.move_on_after(self._settings.startup_timeout) as limit:
                greeting = await greet(sock, session, senders=self._senders)
            if limit.cancelled_caught:
                logger.info("session %d: %s said nothing in time", session.id, _who(session))
            else:
                await self._oblige(sock, session, greeting)
        except Dismissed as dismissed:
            if dismissed.verdict is not None:
                await self._judge.rule_surely(session, dismissed.verdict)
        except UpstreamUnavailable as error:
            logger.warning("session %d: could not connect to the server: %s", session.id, error)
            await send_last(sock, _unavailable(str(error)))
        except (OSError, trio.BrokenResourceError) as error:
            logger.info("session %d: %s: %s", session.id, _who(session), error)

    async def _oblige(self, sock: trio.socket.SocketType, session: ProxiedSession, greeting: Greeting) -> None:
        if greeting.verdict is not None:
            await self._judge.rule_surely(session, greeting.verdict)
        if greeting.packet.kind is PacketKind.CANCEL_REQUEST:
            await relay_cancel(self._upstream, greeting.packet.packet)
        elif greeting.packet.encrypts:
            answer = await ask(self._upstream, greeting.before, greeting.packet.packet + greeting.behind)
            await trio.SocketStream(sock).send_all(refusal(greeting) if answer is None else answer)
        else:
            await self._introduce(sock, session, greeting)

    def _new_session(self, sock: trio.socket.SocketType, listener: Listener) -> ProxiedSession:
        self._last_number += 1
        with spared(Loss.STEP):
            self._watch.arrival()
        client_name = None
        if isinstance(listener.address, TcpAddress):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            host, port = sock.getpeername()[:2]
            client_name = str(TcpAddress(host, port))
        kernel_account = self._open_account(sock) if client_name is not None else None
        session = ProxiedSession(
            self._last_number,
            transport=listener.transport,
            client_name=client_name,
            client_socket=_describe(sock, kernel_account) if self._witness is not None else None,
            opened_at=time.time(),
        )
        session.kernel_account = kernel_account
        if session.client_socket is not None:
            try:
                self._openings_send.send_nowait(session)
            except trio.WouldBlock:
                logger.warning("session %d: too many connections at once to find out who opens them", session.id)
                session.opening_known.set()
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
            self._judge.closed(session)
        with spared(Loss.TIDINESS, session):
            if self._senders is not None and account is not None:
                self._senders.close(account)

    async def _introduce(self, sock: trio.socket.SocketType, session: ProxiedSession, greeting: Greeting) -> None:
        packet = greeting.packet
        major, minor = packet.version
        untracked = (
            None if major == _TRACKED_MAJOR else f"it speaks protocol {major}.{minor}, which pgguard doesn't follow"
        )
        parameters, tracker = {}, None
        try:
            parameters = packet.parameters
            tracker = None if untracked else Tracker(parameters, greeting.sender)
        except Exception:
            note(Loss.TRACKING, session)
            untracked = TRACKER_FAILED
        self._sweep.hurry()
        server, session.upstream = await connect_upstream(self._upstream)
        session.settings = parameters
        session.connect(_detach(sock), _detach(server), tracker)
        session.client.sender = greeting.sender
        session.preamble = len(greeting.before) * len(DECLINED)
        self._sessions[session.id] = session
        if untracked is not None and greeting.verdict is None:
            with spared(Loss.RECORD, session):
                self._judge.lost(session, untracked, time.time())
        self._sweep.add(session, packet.packet)

    # What the sweep wants done

    def _cancel(self, session: ProxiedSession) -> None:
        self._nursery.start_soon(self._cancel_query, session)

    async def _cancel_query(self, session: ProxiedSession) -> None:
        key = session.protocol.cancel_key if session.protocol is not None else None
        if key is None or session.upstream is None:
            return
        try:
            await cancel_query(session.upstream, self._upstream.connect_timeout, key)
        except UpstreamUnavailable as error:
            logger.warning("session %d: its query could not be cancelled: %s", session.id, error)
        except Exception:
            note(Loss.STEP, session)

    def _forget(self, session: ProxiedSession) -> None:
        self._settle(session)
        self._sessions.pop(session.id, None)
        if self._stopping.is_set() and not self._sessions:
            self._all_gone.set()

    # Attribution, beside the relay

    async def _register(self, witness: Witness) -> None:
        """Find out who opened the connections that have come in, as many at a time as have come."""
        async for first in self._openings:
            sessions = [first]
            while True:
                try:
                    sessions.append(self._openings.receive_nowait())
                except trio.WouldBlock:
                    break
            try:
                await self._find_openers(witness, sessions)
            finally:
                for session in sessions:
                    session.opening_known.set()

    async def _find_openers(self, witness: Witness, sessions: list[ProxiedSession]) -> None:
        clients = [session.client_socket for session in sessions if session.client_socket is not None]
        try:
            openings = await trio.to_thread.run_sync(witness.opened_many, clients, abandon_on_cancel=True)
        except Exception:
            note(Loss.OPENER)
            return
        for session, opening in zip(sessions, openings, strict=True):
            with spared(Loss.OPENER, session):
                session.opening = opening
                session.last_sole_holder = sole_holder(opening.holders)
                session.tell_tracker()


def _who(session: ProxiedSession) -> str:
    return session.client_name or "a client on a Unix socket"


def _unavailable(why: str) -> bytes:
    return build_error_response(
        f"pgguard: could not connect to the server: {why}",
        sqlstate="08001",
        hint="Check that PostgreSQL is running there, and what --upstream or PGGUARD_UPSTREAM says.",
    )


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
