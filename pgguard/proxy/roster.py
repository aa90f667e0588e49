"""Who is here: each client from when it has come until nothing of it is left."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from pgguard.attribution.sockets import client_socket
from pgguard.faults.build import discreet_facts
from pgguard.proxy.addresses import written
from pgguard.proxy.losses import Loss, note
from pgguard.proxy.session import ProxiedSession

if TYPE_CHECKING:
    from pgguard.attribution.sockets import ClientSocket
    from pgguard.proxy.figures import Counters
    from pgguard.proxy.judge import Judge
    from pgguard.proxy.kernel_senders import KernelSenders, TcpAccount
    from pgguard.proxy.listeners import Listener, Peer
    from pgguard.proxy.overview import SessionListener
    from pgguard.proxy.registrar import Registrar
    from pgguard.proxy.sockets import Stream
    from pgguard.proxy.watch import Watch


class Roster:
    """Knows the sessions, and has each looked after from its beginning to its end.

    Args:
        sessions: those that the sweep has, by their numbers: kept here.
        judge: rules on verdicts.
        watch: looks for what no message shows.
        registrar: finds out who opened them; ``None`` with attribution off.
        counters: what is counted of them.
    """

    def __init__(
        self,
        sessions: dict[int, ProxiedSession],
        *,
        judge: Judge,
        watch: Watch,
        registrar: Registrar | None,
        counters: Counters,
    ) -> None:
        self.sessions = sessions
        self.arriving: set[int] = set()
        """The numbers of those that have been admitted, and are on their way to the sweep."""
        self.last_number = 0
        """How many clients have come so far."""
        self.senders: KernelSenders | None = None
        """Who sends on TCP, where the kernel says it."""
        self._judge = judge
        self._watch = watch
        self._registrar = registrar
        self.counters = counters
        self._listeners: list[SessionListener] = []

    def tell(self, listener: SessionListener) -> None:
        """Have somebody told of each session that is opened or closed from now on."""
        self._listeners.append(listener)

    def come(
        self, sock: Stream, peer: Peer, listener: Listener, through: str | None, *, is_admitted: bool
    ) -> ProxiedSession:
        """Take note of a client that has just been accepted.

        Args:
            sock: its socket.
            peer: its address, as accept(2) has told it.
            listener: where it has come.
            through: the name of the database that it has come to.
            is_admitted: there is room for it.
        """
        self.last_number += 1
        try:
            self._watch.arrival()
        except Exception:
            note(Loss.STEP)
        is_tcp = listener.transport == "tcp"
        kernel_account = described = None
        if is_admitted:
            kernel_account, described = self._look_at(sock, peer, is_tcp=is_tcp)
        session = ProxiedSession(
            self.last_number,
            transport=listener.transport,
            client_name=written(peer[0], peer[1]) if is_tcp else None,
            client_socket=described,
            opened_at=time.time(),
            through=through,
        )
        session.kernel_account = kernel_account
        if self._registrar is not None and session.client_socket is not None:
            self._registrar.enroll(session)
        if is_admitted:
            self.arriving.add(session.id)
        return session

    def _look_at(self, sock: Stream, peer: Peer, *, is_tcp: bool) -> tuple[TcpAccount | None, ClientSocket | None]:
        """Begin the kernel's account of who sends, and write down whose socket is at the other end."""
        own = kernel_account = described = None
        connected: tuple[int | None, int | None] = (None, None)
        try:
            if self.senders is not None and is_tcp:
                own = sock.getsockname()
                kernel_account = self.senders.open(sock, peer, own)
                opener = kernel_account.account.opener
                if opener is not None:
                    connected = opener.pid, opener.tid
        except Exception:
            note(Loss.SENDER)
        try:
            if self._registrar is not None:
                described = client_socket(sock, peer, connected, own)
        except Exception:
            note(Loss.OPENER)
        return kernel_account, described

    def enter(self, session: ProxiedSession) -> None:
        """Its client has been introduced to the server."""
        self.sessions[session.id] = session
        self.arriving.discard(session.id)
        self.counters.introduce(session.through)
        try:
            self._watch.enter(session)
        except Exception:
            note(Loss.STEP, session)
        for listener in self._listeners:
            try:
                listener.opened(discreet_facts(session.facts()))
            except Exception:
                note(Loss.STEP, session)

    def leave(self, session: ProxiedSession) -> bool:
        """It is over, and its sockets are closed; False if that has been said before."""
        entered = self.sessions.pop(session.id, None) is not None
        if not entered and session.id not in self.arriving:
            return False
        self.arriving.discard(session.id)
        self.settle(session)
        if entered:
            try:
                self.counters.finish(session.requests, session.messages, logged_in=session.logged_in)
            except Exception:
                note(Loss.TIDINESS, session)
            for listener in self._listeners:
                try:
                    listener.closed(discreet_facts(session.facts()))
                except Exception:
                    note(Loss.STEP, session)
        return True

    def settle(self, session: ProxiedSession) -> None:
        """Do what is left to be done for one that is over."""
        try:
            self._watch.leave(session)
        except Exception:
            note(Loss.TIDINESS, session)
        try:
            self._judge.closed(session)
        except Exception:
            note(Loss.TIDINESS, session)
        try:
            if self._registrar is not None:
                self._registrar.strike_off(session)
        except Exception:
            note(Loss.TIDINESS, session)
        account = session.kernel_account
        if self.senders is not None and account is not None:
            try:
                self.senders.close(account)
            except Exception:
                note(Loss.TIDINESS, session)
