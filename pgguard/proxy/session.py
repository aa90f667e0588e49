"""One proxied session: its two sockets, what is on its way between them, and what is known about it."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Literal

from pgguard.attribution.drivers import tell_driver
from pgguard.attribution.evidence import Driver
from pgguard.attribution.runtime import Runtime
from pgguard.faults.fault import SessionFacts
from pgguard.identity import Sender
from pgguard.proxy.ends import End, Flow, Phase, Writing
from pgguard.proxy.losses import Loss, note
from pgguard.proxy.milestone import Milestone
from pgguard.proxy.scram import Login, stands_between
from pgguard.proxy.sightings import Sightings
from pgguard.session.verdicts import Kind, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pgguard.attribution.evidence import Process
    from pgguard.attribution.frames import Frame
    from pgguard.attribution.sockets import ClientSocket
    from pgguard.attribution.witness import Opening
    from pgguard.proxy.addresses import Address
    from pgguard.proxy.ends import Socket
    from pgguard.proxy.kernel_senders import TcpAccount
    from pgguard.proxy.transport import Tls
    from pgguard.proxy.unread import Leftover
    from pgguard.session.farewell import Farewell
    from pgguard.session.tracker import Tracker


_FRESH: Final = 1.0
"""Seconds for which a pid is certainly the same process's: no host gives out all the others in that time."""
_SENDERS: Final = 256
"""Processes that have sent of which it is kept what was seen of them: the latest."""
_NOBODY: Final[Mapping[int, Process]] = MappingProxyType({})
_GOES_ON: Final = (Phase.RELAYED, Phase.CONDEMNED)  # a set would have their hashes computed, in Python


class ProxiedSession:
    """A client's connection, the upstream connection made for it, and the tracker of what passes between them."""

    __slots__ = (
        "_met",
        "afterwards",
        "arrived",
        "client_name",
        "client_socket",
        "done",
        "farewell",
        "flow",
        "heard",
        "id",
        "is_encrypted",
        "kernel_account",
        "last_sole_holder",
        "leftover",
        "login",
        "opened_at",
        "opening",
        "opening_known",
        "opening_stack",
        "preamble",
        "protocol",
        "senders",
        "settings",
        "sightings",
        "through",
        "transport",
        "upstream",
        "want_opening",
    )

    def __init__(  # noqa: PLR0915 - all there is
        self,
        number: int,
        *,
        transport: Literal["tcp", "unix"],
        client_name: str | None,
        client_socket: ClientSocket | None,
        opened_at: float,
        through: str | None = None,
    ) -> None:
        self.id = number
        self.through = through
        """The name of the database whose listener its client has come to; ``None``: there is only one."""
        self.transport = transport
        self.client_name = client_name
        self.client_socket = client_socket
        """The client's end for attribution to look up; ``None`` with attribution off."""
        self.opened_at = opened_at
        """Seconds since the epoch, for records."""
        self.arrived = time.monotonic()
        """The same for whatever is due some time later, in seconds of time.monotonic()."""
        self.preamble = 0
        """Bytes that the client has been sent before the first of the server's: one for each encryption declined."""
        self.opening: Opening | None = None
        """Who opened it, once that has been found out."""
        self.opening_stack: tuple[Frame, ...] | None = None
        """What the thread was doing that opened it while it did, if that was looked at: see
        :mod:`pgguard.proxy.openers`."""
        self.last_sole_holder: Process | None = None
        """The process that was alone with it when anybody was last seen to have it open."""
        self.opening_known = Milestone()
        """It has been found out who opened it, or can't be."""
        self.want_opening: Callable[[ProxiedSession], None] | None = None
        """Says that somebody waits for that."""
        self.login: Login | None = None
        """What edits its login, until that is over."""
        self.settings: Mapping[str, str] = {}
        """What its client asked for as it connected: the parameters of its StartupMessage, in their order."""
        self.kernel_account: TcpAccount | None = None
        """The kernel's account of who sends on its TCP connection."""
        self.senders: Mapping[int, Process] = _NOBODY
        """The processes that the kernel has named as senders, as they were when they were first looked at: the latest.
        Written by :meth:`remember` and :meth:`forget` alone."""
        self._met: dict[int, float] | None = None
        """The pids of those that have sent on it, and when one last began to, in seconds of time.monotonic()."""
        self.sightings = Sightings()
        self.leftover: Leftover | None = None
        """Its last answer, while it isn't known to have been read."""
        self.is_encrypted = False
        """Its client speaks TLS."""
        self.upstream: Address | None = None
        self.flow = Flow()
        """What the relay knows of it."""
        self.protocol: Tracker | None = None
        """What follows it, kept for what it had learned when it lost its way."""
        self.afterwards: Tracker | None = None
        """What has followed it, when it is over: who uses the connection still?"""
        self.farewell: Farewell | None = None
        """What a client that was rejected is told again, if it asks for something before its stream ends."""
        self.heard = False
        """That client has sent something lately."""
        self.done = Milestone()
        """Both sockets are closed."""

    def __str__(self) -> str:
        """What the log calls it."""
        return f"session {self.id}" if self.through is None else f"session {self.id} through {self.through}"

    @property
    def client(self) -> End:
        """The client's end."""
        return self.flow.client

    @property
    def server(self) -> End:
        """The server's."""
        return self.flow.server

    @property
    def tracker(self) -> Tracker | None:
        """What follows it; ``None`` when it isn't followed, or not any more."""
        return self.flow.tracker

    @property
    def phase(self) -> Phase:
        """How far it has come."""
        return self.flow.phase

    @property
    def client_gone(self) -> bool:
        """Whether the client can be neither read nor written any more."""
        return self.client.writing is Writing.GONE

    @property
    def draining(self) -> bool:
        """The server's side is over; what the client still sends is thrown away until it ends too."""
        return self.flow.phase not in _GOES_ON

    @property
    def requests(self) -> int:
        """How many its client has made, as far as it has been followed."""
        return 0 if self.protocol is None else self.protocol.requests

    @property
    def messages(self) -> tuple[int, int]:
        """How many messages have come that are in order: of the client's and of the server's."""
        protocol = self.protocol
        return (0, 0) if protocol is None else (protocol.frontend_messages, protocol.backend_messages)

    @property
    def logged_in(self) -> bool:
        """Whether its client has been logged in; True if that isn't known."""
        return self.protocol is None or self.protocol.lost is not None or self.protocol.logged_in

    @property
    def inside_message(self) -> int:
        """How many bytes the client is still to get of a message of the server's; none of one that is swallowed."""
        tracker = self.tracker
        return 0 if tracker is None or self.server.swallow else tracker.backend_rest

    @property
    def connected(self) -> tuple[int, int | None] | None:
        """The process and the thread that opened it, if the kernel has named them: without looking at anything."""
        return None if self.client_socket is None else self.client_socket.connected

    def connect(
        self,
        client: Socket,
        server: Socket,
        tracker: Tracker | None,
        *,
        sender: Sender | None = None,
        client_tls: Tls | None = None,
        server_tls: Tls | None = None,
    ) -> None:
        """Give it its two sockets, which it owns from then on.

        Args:
            client: the client's.
            server: the one to the server.
            tracker: what follows it; ``None`` if it can't be followed.
            sender: who has sent the StartupMessage, if the kernel said so.
            client_tls: what the client's connection is encrypted with; ``None``: it is plain.
            server_tls: likewise, the server's.
        """
        account = self.kernel_account
        flow = self.flow
        flow.client = End(
            self,
            flow,
            client,
            is_client=True,
            names_senders=self.has_credentials,
            kernel_account=None if account is None or account.is_lost else account,
            sender=sender,
            tls=client_tls,
        )
        flow.server = End(self, flow, server, is_client=False, tls=server_tls)
        self.is_encrypted = client_tls is not None
        flow.client.peer, flow.server.peer = flow.server, flow.client
        flow.client.attend()
        flow.server.attend()
        flow.tracker = self.protocol = tracker
        try:
            self.tell_tracker()
        except Exception:
            note(Loss.OPENER, self)

    def see_login(self, shown: bytes | None) -> None:
        """Have its login edited, if what the client would bind of TLS isn't what the server expects.

        Args:
            shown: the certificate that the client has been shown, in DER; ``None``: it has no TLS.
        """
        tls = self.server.tls
        if tls is not None and stands_between(shown, tls.ssl_object.getpeercert(binary_form=True) or b""):
            self.login = Login()
            self.client.watch_login(True)
            self.server.watch_login(True)

    def end_login(self) -> bytes:
        """Edit nothing more of its login; returns what has been kept of the server's stream, and is to be passed on."""
        login, self.login = self.login, None
        self.client.watch_login(False)
        self.server.watch_login(False)
        return b"" if login is None else login.leave()

    async def wait_for_opening(self) -> None:
        """Wait until it is known who opened it, or that it can't be known; that isn't put off any more."""
        self.ask_for_opening()
        await self.opening_known.wait()

    def ask_for_opening(self) -> None:
        """Have it found out who opened it as soon as can be, also if it is over by then."""
        if self.want_opening is not None and not self.opening_known.is_set():
            self.want_opening(self)

    def tell_tracker(self) -> None:
        """Tell what follows the session what attribution knows and the kernel doesn't say with each read."""
        opening, tracker = self.opening, self.tracker
        if tracker is None or self.names_senders:
            return
        if self.connected is not None:
            tracker.introduce(Sender(self.connected[0], sampled=True), asks_goodbye=False)
        if opening is not None and opening.opener is not None:
            opener = Sender(opening.opener.pid, sampled=True)
            tracker.introduce(opener, asks_goodbye=self.driver is Driver.LIBPQ)

    def meets(self, pid: int) -> bool:
        """Take note of who begins to send.

        Returns True if that one isn't known, or hasn't begun to for so long that the pid may be another's by now.
        """
        now = time.monotonic()
        if self._met is None:
            self._met = {}
        before = self._met.get(pid, -math.inf)
        if before == -math.inf and len(self._met) >= _SENDERS:
            self._met.clear()
        self._met[pid] = now
        return now - before > _FRESH

    def forget(self, pid: int) -> Process | None:
        """Take a process that has sent for unknown until it has been looked at again; returns what was seen of it."""
        known = self.senders.get(pid)
        if known is not None:
            self.senders = {other: process for other, process in self.senders.items() if other != pid}
        return known

    def remember(self, processes: Mapping[int, Process]) -> None:
        """Keep what was seen of processes that have sent, by pid."""
        senders = {**self.senders, **processes}
        while len(senders) > _SENDERS:
            del senders[next(iter(senders))]
        self.senders = senders

    def concern(self, kind: Kind, reason: str) -> Verdict:
        """Say that something is wrong with it that no message of its shows."""
        if self.protocol is None:
            return self.dated(Verdict(kind=kind, reason=reason, message=None, requests=()))
        return self.dated(self.protocol.judge(kind, reason))

    def dated(self, verdict: Verdict) -> Verdict:
        """A verdict that no message has brought about, with the time of what it is about: of the last request."""
        return replace(verdict, since=verdict.requests[-1].at if verdict.requests else self.opened_at)

    @property
    def driver(self) -> Driver:
        """What speaks on the connection, whoever inherits it."""
        opening = self.opening
        if opening is None:
            return tell_driver(Driver.UNKNOWN, Runtime(), self.settings)
        return tell_driver(opening.driver, opening.runtime, self.settings)

    @property
    def has_credentials(self) -> bool:
        """The kernel says with every read from the client who sent it."""
        return self.transport == "unix" and self.client_socket is not None

    @property
    def names_senders(self) -> bool:
        """The kernel says who sends, with every read or in an account of its own."""
        return self.has_credentials or self.names_threads

    @property
    def names_threads(self) -> bool:
        """The kernel says not only which process sends, but which of its threads."""
        return self.kernel_account is not None and self.kernel_account.is_kept

    def facts(self) -> SessionFacts:
        """What records say of it."""
        protocol = self.protocol
        key = protocol.cancel_key if protocol else None
        return SessionFacts(
            id=self.id,
            user=protocol.user if protocol else None,
            database=protocol.database if protocol else None,
            application_name=protocol.application_name if protocol else None,
            transport=self.transport,
            client=self.client_name,
            backend_pid=None if key is None else key.backend_pid,
            opened_at=self.opened_at,
            tls=self.is_encrypted,
            through=self.through,
        )
