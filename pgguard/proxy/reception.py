"""What it takes to receive clients, from when they are accepted until the sweep has them, or they are gone."""

from __future__ import annotations

import logging
import math
import time
from typing import TYPE_CHECKING, Final, TypeVarTuple

import trio

from pgguard.proxy.arrival import Arrival
from pgguard.proxy.declined import DeclinedClients
from pgguard.proxy.dialling import is_direct, is_on_this_host
from pgguard.proxy.gate import Gate
from pgguard.proxy.loops import LoopWatch
from pgguard.proxy.losses import Loss, keep_going, note, spared
from pgguard.proxy.upstream import UpstreamUnavailable, cancel_query

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from pgguard.proxy.dialling import Dial
    from pgguard.proxy.judge import Judge
    from pgguard.proxy.listeners import Listener, Peer
    from pgguard.proxy.lobby import Lobby
    from pgguard.proxy.offer import Offer
    from pgguard.proxy.openers import OpenerStacks
    from pgguard.proxy.roster import Roster
    from pgguard.proxy.session import ProxiedSession
    from pgguard.proxy.settings import Front
    from pgguard.proxy.sockets import Stream
    from pgguard.proxy.sweep import Sweep
    from pgguard.wire.startup import PacketKind

_LAST_CANCEL: Final = 1.0
"""Seconds in which queries are cancelled whose sessions are cut off as the guard ends."""
_HASTE: Final = 2.0
"""Seconds for a client to say who it is that is to be told that there is no room."""

Ts = TypeVarTuple("Ts")

logger = logging.getLogger(__name__)


class Reception:
    """Receives the clients of one server.

    Args:
        front: the server, and what it is called.
        lobby: where they wait.
        roster: who is here.
        sweep: takes those over who have been introduced to the server.
        judge: rules on what is wrong with others.
        openers: sees where some are opened; ``None`` with attribution off.
        seconds: for a client to say who it is.
        over: is told of each that had been admitted, and of which nothing became.
    """

    def __init__(
        self,
        front: Front,
        *,
        lobby: Lobby,
        roster: Roster,
        sweep: Sweep,
        judge: Judge,
        openers: OpenerStacks | None,
        seconds: float,
        over: Callable[[ProxiedSession], None],
    ) -> None:
        self.upstream = upstream = front.upstream
        self.offer: Offer | None = None
        """The TLS that clients are offered over TCP; ``None`` for none."""
        self.is_direct = len(upstream.addresses) == 1 and is_direct(upstream.addresses[0])
        """The server has one address, and nothing has to be looked up to connect to it."""
        self.roster = roster
        self.judge = judge
        self.loops = LoopWatch(front)
        """Whether the server is the guard itself."""
        self.lobby = lobby
        is_here = any(map(is_on_this_host, upstream.addresses))
        self.gate = Gate(self._suspect_loop, shares_processors=is_here)
        self.cancel_gate = Gate(self._suspect_loop, shares_processors=is_here)
        self.declined = DeclinedClients()
        self._nursery: trio.Nursery
        """For what takes time."""
        self._name = front.name
        self._sweep = sweep
        self._openers = openers
        self._seconds = seconds
        self._over = over
        self._is_ending = False
        self._arrivals: set[Arrival] = set()

    def offer_tls(self, offer: Offer | None) -> None:
        """Offer clients that come from now on TLS over TCP; ``None``: none."""
        self.offer = offer

    def limit(self, seconds: float) -> None:
        """Give those who come from now on so many seconds to say who they are."""
        self._seconds = seconds

    def end(self) -> None:
        """The guard is about to end."""
        self._is_ending = True

    def open(self, nursery: trio.Nursery) -> None:
        """Be ready for clients. What takes time is done in tasks of the nursery's."""
        self._nursery = nursery

    async def run(self) -> None:
        """See to it that nobody waits too long for their turn, until cancelled."""
        async with trio.open_nursery() as nursery:
            for task in self.gate.keep, self.cancel_gate.keep:
                nursery.start_soon(keep_going, task)

    def close(self) -> None:
        """Let everybody go who is arriving."""
        for arrival in list(self._arrivals):
            arrival.leave()

    def start(self, function: Callable[[*Ts], Awaitable[None]], *args: *Ts) -> None:
        """Have done in a task what takes time. A client waits for it."""

        async def run() -> None:
            try:
                await function(*args)
            finally:
                self._sweep.end_errand()

        self._sweep.hurry()
        self._sweep.begin_errand()
        self._nursery.start_soon(run, name=function)

    def note_declined(self, session: ProxiedSession, insists_on: PacketKind) -> None:
        """Consider a client that has been told that there is no encryption, and whether that is to be recorded."""
        self._nursery.start_soon(self.declined.consider, session, insists_on)

    def receive(
        self,
        sock: Stream,
        peer: Peer,
        listener: Listener,
        response: bytes | None = None,
        on_over: Callable[[Arrival], None] | None = None,
    ) -> Arrival | None:
        """Take in a client that has been accepted. What goes wrong with that is no affair of anybody else's.

        Args:
            sock: its socket.
            peer: its address, as accept(2) tells it.
            listener: where it has come.
            response: what it is told, if there is no room for it.
            on_over: is called when it has been told.

        Returns:
            The client; ``None`` if that has failed, and its socket is closed.
        """
        try:
            session = self.roster.come(sock, peer, listener, self._name, is_admitted=response is None)
        except Exception:
            note(Loss.ARRIVAL)
            sock.close()
            return None
        arrival = Arrival(self, sock, session, listener, response, on_over)
        self._arrivals.add(arrival)
        arrival.begin(self._seconds if response is None else min(_HASTE, self._seconds))
        return arrival

    def wants_to_look(self, session: ProxiedSession) -> bool:
        """Whether it is to be seen where in its program a session is opened, before it is connected."""
        try:
            return self._openers is not None and self._openers.wants(session)
        except Exception:
            note(Loss.OPENER, session)
            return False

    async def look(self, session: ProxiedSession) -> None:
        """See where in its program a session is opened."""
        if self._openers is not None:
            with spared(Loss.OPENER, session):
                await self._openers.look(session)

    def hand_over(self, arrival: Arrival, dial: Dial, untracked: str | None) -> None:
        """A client has been introduced to the server: the sweep takes it over.

        Args:
            arrival: the client.
            dial: the connection to the server, which is the session's by now.
            untracked: why it isn't followed, if that is to be recorded.
        """
        session = arrival.session
        self._arrivals.discard(arrival)
        try:
            self.roster.enter(session)
            if untracked is not None:
                with spared(Loss.RECORD, session):
                    self.judge.lost(session, untracked, time.time())
            self._sweep.add(session, dial.unsent, dial.answer)
        except Exception:
            note(Loss.ARRIVAL, session)
            self._sweep.finish(session)

    def forget(self, arrival: Arrival, *, is_admitted: bool) -> None:
        """A client's socket is closed, and nothing has become of it."""
        self._arrivals.discard(arrival)
        if is_admitted:
            self._over(arrival.session)
        else:
            self.roster.settle(arrival.session)

    async def cancel_query(self, session: ProxiedSession) -> None:
        """Cancel what the server is doing for a session, as soon as it is its turn to ask for that."""
        protocol, address = session.protocol, session.upstream
        if protocol is None or not protocol.key_data or address is None:
            return
        if not self._is_ending:
            await self.cancel_gate.enter(session.id)
        try:
            # A guard that ends waits for it for a moment, and for no longer.
            seconds = _LAST_CANCEL if self._is_ending else math.inf
            with trio.CancelScope(shield=self._is_ending, deadline=trio.current_time() + seconds):
                if (key := protocol.cancel_key) is not None:
                    await cancel_query(self.upstream, address, key)
        except UpstreamUnavailable as error:
            logger.warning("%s: its query could not be cancelled: %s", session, error)
        except Exception:
            note(Loss.STEP, session)
        finally:
            self.cancel_gate.leave(session.id)

    def _suspect_loop(self) -> None:
        """The server doesn't answer: is that because it is the guard that has been connected to?"""
        self._nursery.start_soon(self._look_for_loop)

    async def _look_for_loop(self) -> None:
        with spared(Loss.STEP):
            await self.loops.suspect()
