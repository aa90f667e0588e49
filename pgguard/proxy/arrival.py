"""One client on its way from the door to the sweep.

It comes from one state to the next as its sockets become ready, in the sweep's round and without a task of its own:

=================  =================================================================================================
heard              what it says is read, until it is known what it wants (:mod:`pgguard.proxy.greeting`); if it may
                   have TLS, and wants it, there is a handshake in between (:mod:`pgguard.proxy.transport`)
in line            it waits for its turn to be let through to the server (:mod:`pgguard.proxy.gate`)
being connected    the server is dialled (:mod:`pgguard.proxy.dialling`), for as long as the client waits for it if
                   the upstream has no ``connect_timeout``
introduced         the sweep has it
seen off           it is told the last that it gets, and given a moment to read it and to close
=================  =================================================================================================

What isn't the common way may take longer, and is done in a task: a cancel request, a request for encryption that the
server is to refuse, a host that has to be looked up, several hosts, whatever is to be recorded of it, a look where in
its program it is opened. Meanwhile nobody listens to it.

Whatever happens to a client while it arrives happens to it alone.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import select
import socket
import sys
import termios
from collections import deque
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from pgguard.faults.text import named
from pgguard.identity import Sender
from pgguard.proxy.admission import too_many
from pgguard.proxy.dialling import BACKLOG_PAUSE, Dial, Progress
from pgguard.proxy.endings import check_peer
from pgguard.proxy.figures import Turnaway
from pgguard.proxy.greeting import Conversation, Dismissal, Encryption, Step, refusal
from pgguard.proxy.losses import Loss, note, spared
from pgguard.proxy.relay import FAILED
from pgguard.proxy.transport import Handshake, HandshakeFailed
from pgguard.proxy.upstream import UpstreamUnavailable, ask, ask_by_tls, introduce, relay_cancel, too_late
from pgguard.session.tracker import Tracker
from pgguard.wire.fields import build_error_response
from pgguard.wire.startup import ACCEPTED, DECLINED, PROTOCOL, RECEIVE_BUFFER, PacketKind

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from pgguard.proxy.addresses import Address
    from pgguard.proxy.greeting import Greeting
    from pgguard.proxy.listeners import Listener
    from pgguard.proxy.offer import Certificate
    from pgguard.proxy.reception import Reception
    from pgguard.proxy.session import ProxiedSession
    from pgguard.proxy.sockets import Stream
    from pgguard.proxy.transport import Tls
    from pgguard.session.verdicts import Verdict

_UNAVAILABLE: Final = build_error_response("pgguard: could not connect to the server", sqlstate="08001")
"""For a client that can't be told why."""
_FAREWELL: Final = 2.0
"""Seconds for a client that is refused to read why."""
_INTRODUCTION: Final = 0.25
"""Seconds to find out who has brought a mark back."""
_TRACKED_MAJOR: Final = 3
_IN: Final = select.EPOLLIN
_OUT: Final = select.EPOLLOUT
_END: Final = select.EPOLLRDHUP
_OVER: Final = select.EPOLLHUP | select.EPOLLERR
_TERMINATE: Final = b"X\0\0\0\x04"
_REST: Final = 65536
"""Bytes that are read at once of what a client still says that is seen off."""

_UNTRUSTED: Final = "it doesn't trust the certificate that it is shown: set its sslrootcert, or sslmode=require"
_MEANINGS: Final = (
    ("alert unknown ca", _UNTRUSTED),
    ("alert bad certificate", _UNTRUSTED),
    ("alert certificate unknown", _UNTRUSTED),
    ("alert certificate expired", "the certificate that it is shown has expired"),
    ("certificate verify failed", "its own certificate isn't from a CA in --tls-ca"),
    ("unsupported protocol", "it doesn't know TLS 1.2 or later"),
    ("wrong version number", "that was no TLS"),
    ("http request", "that was HTTP"),
)
"""What OpenSSL's reasons mean where they don't say it; ``alert`` is what the client has said: ``sslerr.h``."""

logger = logging.getLogger(__name__)


class Arrival:
    """A client that has been accepted.

    Args:
        reception: what it takes to receive it.
        sock: its socket.
        session: what it is to become.
        listener: where it has come.
        response: what it is told as there is no room for it; ``None``: there is.
        on_over: is called when nothing becomes of it, and its socket is closed.
    """

    __slots__ = (
        "_awaits",
        "_dial",
        "_encryption",
        "_errand",
        "_from",
        "_greeting",
        "_handshake",
        "_heard",
        "_is_over",
        "_last_words",
        "_next",
        "_offer",
        "_on_over",
        "_reception",
        "_response",
        "_shown",
        "_sock",
        "_talk",
        "_tls",
        "_unsaid",
        "session",
    )

    def __init__(
        self,
        reception: Reception,
        sock: Stream,
        session: ProxiedSession,
        listener: Listener,
        response: bytes | None,
        on_over: Callable[[Arrival], None] | None,
    ) -> None:
        self._reception = reception
        self._sock = sock
        self.session = session
        self._from = listener
        self._response = response
        self._on_over = on_over
        self._next: Callable[[], None] = self._hear
        """The step to be taken when what it waits for has come about."""
        self._awaits = 0
        """The events of its socket that it waits for."""
        self._offer = reception.offer if session.transport == "tcp" else None
        """The TLS that it can have."""
        self._talk = Conversation(offers_tls=self._offer is not None)
        self._heard: list[tuple[int, Sender | None]] = []
        """Who has sent what was read last, in pieces."""
        self._unsaid = b""
        """What it is still to be told, before it is listened to again."""
        self._encryption: Encryption
        """How it has asked for TLS, if it has."""
        self._handshake: Handshake | None = None
        """While that goes on."""
        self._tls: Tls | None = None
        """What it speaks by, if it has TLS."""
        self._shown: bytes | None = None
        """The certificate that it has been shown, in DER."""
        self._greeting: Greeting
        """What it wants, once it has been heard."""
        self._dial: Dial | None = None
        """The connection to the server, while it is being made."""
        self._errand: trio.CancelScope | None = None
        """Of the task that does something for it."""
        self._last_words = b""
        self._is_over = False

    @property
    def is_over(self) -> bool:
        """Whether it has been handed over, or its socket is closed."""
        return self._is_over

    def begin(self, seconds: float) -> None:
        """Hear what it wants. It has so many seconds to say it."""
        self.go_on()
        lobby = self._reception.lobby
        # It hasn't said it at once; and it isn't being seen off, for which it has been given its own time.
        if self._awaits and not lobby.limits(self):
            lobby.give(self, seconds, self._come_too_late)

    def go_on(self, _: int = 0) -> None:
        """Take the next step, if any is left to be taken."""
        if not self._is_over:
            try:
                self._next()
            except Exception as error:
                self._note(error)

    def _note(self, error: Exception) -> None:
        """Do what is left to be done after an exception, which is being handled."""
        if isinstance(error, UpstreamUnavailable):
            self._turn_back(error)
        elif isinstance(error, OSError | trio.BrokenResourceError):
            logger.info("%s: %s: %s", self.session, _client_of(self.session), error)
            self.leave()
        else:
            note(Loss.ARRIVAL, self.session)
            self.leave()

    def _turn_back(self, error: UpstreamUnavailable) -> None:
        """Tell it that the server can't be connected to."""
        logger.warning("%s: could not connect to the server: %s", self.session, error)
        self._reception.roster.counters.turn_back(self.session.through, exhausted=error.exhausted)
        words = _UNAVAILABLE
        with spared(Loss.WORDS, self.session):
            words = _unavailable(error, self.session.through)
        try:
            self._see_off(words)
        except OSError:
            self.leave()

    def _wait(self, events: int, then: Callable[[], None]) -> None:
        """Take a step as soon as the client's socket is ready for it."""
        self._next = then
        if self._awaits != events:
            self._reception.lobby.watch(self._sock.fileno(), events, self.go_on)
            self._awaits = events

    def _wait_no_more(self) -> None:
        if self._awaits:
            self._reception.lobby.unwatch(self._sock.fileno())
            self._awaits = 0

    def _take_time(self, errand: Callable[[], Awaitable[None]]) -> None:
        """Have something done in a task that takes more than a step."""
        self._wait_no_more()
        self._reception.lobby.lift(self)
        self._reception.start(self._run, errand)

    async def _run(self, errand: Callable[[], Awaitable[None]]) -> None:
        if self._is_over:
            return
        with trio.CancelScope() as self._errand:
            try:
                await errand()
            except Exception as error:
                self._note(error)

    def leave(self) -> None:
        """Close its socket: nothing becomes of it. Nothing happens the second time."""
        if not self._is_over:
            self._end()
            tls = self._tls
            last = self._unsaid if tls is None else self._unsaid + tls.farewell()
            if last:
                with suppress(OSError):
                    self._sock.send(last, 0, len(last))
            self._sock.close()
            self._reception.forget(self, is_admitted=self._response is None)
            if self._on_over is not None:
                self._on_over(self)

    def _end(self) -> None:
        """Nothing more is done for it here."""
        self._is_over = True
        self._next = _stay  # a step of its own would refer back to it, and keep it until garbage is looked for
        self._reception.lobby.lift(self)
        self._wait_no_more()
        self._hang_up()
        if self._errand is not None:
            self._errand.cancel()

    # Heard

    def _come_too_late(self) -> None:
        logger.info("%s: %s did not send a startup packet in time", self.session, _client_of(self.session))
        self._reception.roster.counters.turn_away(Turnaway.LATE)
        self.leave()

    def _hear(self) -> None:
        """Read what it says, and do as it wants when it is known what that is."""
        try:
            chunk = self._take_in()
        except OSError as error:
            if error.errno not in (errno.ECONNRESET, errno.ETIMEDOUT):
                raise
            self._part(has_read_all=False)
            return
        if chunk is None:
            self._wait(_IN, self._hear)
        elif not chunk:
            self._part(has_read_all=self._has_read_all())
        elif self._handshake is not None:
            self._go_on_with_handshake(self._handshake, _pieces(chunk, self._heard))
        elif self._tls is not None:
            self._decrypt(self._tls, _pieces(chunk, self._heard))
        else:
            self._understand(chunk)

    def _understand(self, chunk: bytes) -> None:
        """Take in what it has said."""
        outcome = self._talk.hear(chunk, self._heard[0][1])
        if isinstance(outcome, Step):
            self._reply(DECLINED if outcome is Step.DECLINE else b"")
        elif isinstance(outcome, Encryption):
            if self._offer is not None:
                self._begin_handshake(outcome, self._offer.certificate)
        elif isinstance(outcome, Dismissal):
            self._dismiss(outcome)
        else:
            self._greeting = outcome
            self._reception.lobby.lift(self)
            self._wait_no_more()
            if outcome.verdict is None:
                self._oblige()
            else:
                self._take_time(partial(self._rule, outcome.verdict, self._oblige))

    def _reply(self, words: bytes) -> None:
        """Tell it something, if there is anything, and listen to what it says then."""
        self._unsaid += words if self._tls is None or not words else self._tls.seal(words)
        self._speak()

    def _speak(self) -> None:
        if self._unsaid:
            self._unsaid = self._unsaid[self._sock.send(self._unsaid, 0, len(self._unsaid)) :]
        self._wait(*((_OUT, self._speak) if self._unsaid else (_IN, self._hear)))

    # TLS

    def _begin_handshake(self, encryption: Encryption, certificate: Certificate) -> None:
        """It goes on with a handshake, in which it is shown a certificate."""
        answer = b"" if encryption.request is None else ACCEPTED
        before = self._talk.declined * len(DECLINED) + len(answer)
        self._encryption = encryption
        self._shown = certificate.der
        self._unsaid = answer
        self._handshake = Handshake(certificate.context, server_side=True, before=before)
        self._go_on_with_handshake(self._handshake, _pieces(encryption.begun, self._heard))

    def _go_on_with_handshake(self, handshake: Handshake, pieces: list[tuple[bytes, Sender | None]]) -> None:
        """Go on with the handshake by what has come, in pieces of one sender each."""
        behind: list[tuple[bytes, Sender | None]] = []
        for raw, sender in pieces:
            if handshake.is_done:
                behind.append((raw, sender))
                continue
            try:
                self._unsaid += handshake.hear(raw, sender)
            except HandshakeFailed as error:
                if raw.startswith(_TERMINATE):
                    self.leave()  # it has changed its mind, as a health check that has seen that there is somebody
                else:
                    self._refuse_tls(error)
                return
        if not handshake.is_done:
            self._speak()
            return
        self._handshake = None
        self._tls = tls = handshake.tls
        self.session.is_encrypted = True
        if self._encryption.request is None and tls.ssl_object.selected_alpn_protocol() != PROTOCOL:
            self._dismiss(self._encryption.without_protocol)
        else:
            self._decrypt(tls, behind or [(b"", None)])

    def _refuse_tls(self, error: HandshakeFailed) -> None:
        """There is no TLS, and nothing else."""
        client, why = _client_of(self.session), _explained(str(error))
        logger.warning("%s: no TLS with %s: %s", self.session, client, why)
        self._reception.roster.counters.turn_away(Turnaway.ENCRYPTION)
        failed = self._encryption.failed
        if failed.verdict is None:
            self._see_off(error.words)
        else:
            self._take_time(partial(self._rule, failed.verdict, partial(self._see_off, error.words)))

    def _decrypt(self, tls: Tls, pieces: list[tuple[bytes, Sender | None]]) -> None:
        """Take in what it has said by TLS."""
        said = [(tls.open(raw, sender), sender) for raw, sender in pieces]
        self._unsaid += tls.words()
        self._heard = [(len(data), sender) for data, sender in said if data]
        if self._heard:
            self._understand(b"".join(data for data, _ in said))
        elif tls.is_over:
            self._part(has_read_all=True)
        else:
            self._speak()

    def _take_in(self) -> bytes | None:
        """What comes next; no bytes: the client has closed; ``None``: nothing has come. Raises OSError."""
        session = self.session
        if session.has_credentials:
            named = self._sock.receive_named(RECEIVE_BUFFER)
            if named is None:
                return None
            chunk, pid = named
            self._heard = [(len(chunk), Sender(pid) if pid > 0 else None)]
            return chunk
        received = self._sock.receive(RECEIVE_BUFFER)
        if received is None:
            return None
        self._heard = [(len(received), None)]
        account, senders = session.kernel_account, self._reception.roster.senders
        if received and senders is not None and account is not None and not account.is_lost:
            try:
                self._heard = senders.pieces(account, len(received))
            except Exception:
                note(Loss.SENDER, session)
                account.is_lost = True
        return received

    def _part(self, *, has_read_all: bool) -> None:
        """It has closed its side."""
        if self._talk.is_halfway:
            logger.info("%s: the client left after an incomplete startup packet", self.session)
        self._dismiss(self._talk.end(has_read_all=has_read_all))

    def _has_read_all(self) -> bool:
        """Whether a client that has closed its side had read all that was sent to it.

        If it closes with something unread, the kernel resets the connection: that isn't seen here. What hadn't come yet
        when it closed isn't acknowledged: SIOCOUTQ in tcp(7). On a Unix socket there is no way in between.
        """
        if self.session.transport == "unix":
            return True
        return not int.from_bytes(fcntl.ioctl(self._sock.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)

    def _dismiss(self, dismissal: Dismissal) -> None:
        reception = self._reception
        if dismissal.insists_on is not None:
            reception.roster.counters.turn_away(Turnaway.ENCRYPTION)
            self.session.ask_for_opening()
            reception.note_declined(self.session, dismissal.insists_on)
        if dismissal.verdict is None:
            self.leave()
        else:
            reception.roster.counters.turn_away(Turnaway.NO_POSTGRESQL)
            self._take_time(partial(self._rule, dismissal.verdict, self.leave))

    async def _rule(self, verdict: Verdict, then: Callable[[], None]) -> None:
        """Have something recorded of it, and go on."""
        with spared(Loss.RECORD, self.session):  # an OSError of that isn't the client's
            await self._reception.judge.rule_surely(self.session, verdict)
        then()

    def _oblige(self) -> None:
        """Do as it wants."""
        reception, packet = self._reception, self._greeting.packet
        if packet.kind is PacketKind.CANCEL_REQUEST:
            self._take_time(self._pass_cancel_on)
        elif self._response is not None:
            reception.roster.counters.turn_away(Turnaway.NO_ROOM)
            self._see_off(refusal(self._greeting) if packet.encrypts else self._response)
        elif not packet.encrypts and reception.wants_to_look(self.session):
            self._take_time(self._be_looked_at)
        else:
            self._line_up()

    async def _be_looked_at(self) -> None:
        """Let it be seen where in its program it is opened."""
        await self._reception.look(self.session)
        self._line_up()

    async def _pass_cancel_on(self) -> None:
        reception, session, packet = self._reception, self.session, self._greeting.packet.packet
        if reception.loops.recognizes(packet):
            await self._note_loop()
        else:
            await reception.cancel_gate.enter(session.id)
            try:
                await reception.loops.refuse()
                await relay_cancel(reception.upstream, packet)
            finally:
                reception.cancel_gate.leave(session.id)
        self.leave()

    async def _note_loop(self) -> None:
        """A mark has come round."""
        loops = self._reception.loops
        if loops.is_from_here(self._sock):
            loops.came_back("that is where pgguard itself listens")
        else:
            bringer = await _bringer(self.session)
            loops.came_back(f"it leads back to {self._from.address}, where pgguard itself listens, through {bringer}")

    # In line

    def _line_up(self) -> None:
        """Wait for its turn to be let through to the server."""
        self._next = self._be_connected
        if self._reception.gate.ask(self.session.id, self._come_in):
            self._be_connected()

    def _come_in(self) -> None:
        self._reception.lobby.in_turn(self.go_on)

    # Being connected

    def _be_connected(self) -> None:
        reception = self._reception
        if self._greeting.packet.encrypts or not reception.is_direct or reception.loops.found is not None:
            self._take_time(self._connect_at_leisure)
        else:
            self._dial_on()

    def _dial_on(self) -> None:
        """Come closer to the one address that the server has."""
        lobby, upstream = self._reception.lobby, self._reception.upstream
        [address] = upstream.addresses
        begins = self._next != self._dial_on
        try:
            dial = self._dial
            if dial is None:
                dial = self._dial = Dial(address, upstream, self._greeting.packet.packet)
            while (progress := dial.step()) is Progress.ANEW:
                lobby.unwatch(dial.sock.fileno())
                dial.renew()
                begins = begins or upstream.connect_timeout is None
        except OSError as error:
            raise UpstreamUnavailable([(address, error)]) from error
        if progress is Progress.MADE:
            self._introduce(dial, address)
            return
        if begins:
            self._next = self._dial_on
            lobby.give(self, upstream.seconds_to_connect, self._run_out_of_time)
        if progress is Progress.NO_ROOM:
            lobby.give(dial, BACKLOG_PAUSE, self.go_on)
        else:
            lobby.watch(dial.sock.fileno(), _IN if progress is Progress.WAITING else _OUT, self.go_on)

    def _run_out_of_time(self) -> None:
        """There is no more time to connect it, unless the server may take as long as the client waits."""
        lobby, upstream, dial = self._reception.lobby, self._reception.upstream, self._dial
        [address] = upstream.addresses
        if dial is not None:
            lobby.unwatch(dial.sock.fileno())
            if dial.make_do():
                self._introduce(dial, address)
                return
            if dial.is_accepted and upstream.connect_timeout is None:
                lobby.give(self, upstream.seconds_to_connect, self._run_out_of_time)
                self._watch_client()
                self.go_on()
                return
        self._turn_back(UpstreamUnavailable([(address, too_late(upstream, dial))]))

    def _watch_client(self) -> None:
        """See to it that the server isn't waited for when the client is gone."""
        if not self._awaits:
            self._awaits = _END
            self._reception.lobby.watch(self._sock.fileno(), _END, self._see_end)

    def _see_end(self, events: int) -> None:
        """The client has ended its stream, or is gone."""
        if events & _OVER:
            logger.info("%s: the client left before the server had answered", self.session)
            self.leave()
        else:
            self._reception.lobby.watch(self._sock.fileno(), 0, self._see_end)  # that it is gone is told anyway
            check_peer(self._sock)

    def _hang_up(self) -> None:
        """Give up the connection to the server."""
        if self._dial is not None:
            self._reception.lobby.lift(self._dial)
            self._reception.lobby.unwatch(self._dial.sock.fileno())
            self._dial.close()
            self._dial = None

    async def _connect_at_leisure(self) -> None:
        """Where a name has to be looked up, there are several hosts, or the server is to refuse it."""
        reception, greeting = self._reception, self._greeting
        packet = greeting.packet.packet
        await reception.loops.refuse()
        if greeting.packet.encrypts:
            if not self._talk.is_encrypted:
                answer = await ask(reception.upstream, greeting.before, packet + greeting.behind)
            elif greeting.again:
                answer = await ask_by_tls(reception.upstream, packet)
            else:
                answer = None
            reception.roster.counters.turn_away(Turnaway.ENCRYPTION)
            self._see_off(refusal(greeting) if answer is None else answer)
        else:
            reception.lobby.give(self, reception.upstream.seconds_to_connect, self._watch_client)
            self._dial, address = await introduce(reception.upstream, packet)
            self._introduce(self._dial, address)

    # Introduced

    def _introduce(self, dial: Dial, address: Address) -> None:
        """Hand it over to the sweep, with the connection that has been made to the server."""
        reception, session, greeting = self._reception, self.session, self._greeting
        session.upstream = address
        packet = greeting.packet
        if not greeting.before and self._tls is None:
            reception.declined.arrived_plain(session)
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
        session.settings = parameters
        session.connect(
            self._sock,
            dial.sock,
            tracker,
            sender=greeting.sender,
            client_tls=self._tls,
            server_tls=dial.tls,
        )
        if self._unsaid:
            session.client.append_raw(self._unsaid)
        try:
            session.see_login(self._shown)
        except Exception:
            note(Loss.TRACKING, session)
        if greeting.behind:
            session.client.pieces = deque(_pieces(greeting.behind, self._heard))
        session.preamble = len(greeting.before) * len(DECLINED)
        reception.lobby.unwatch(dial.sock.fileno())
        reception.lobby.lift(dial)
        self._dial = None
        self._end()
        reception.hand_over(self, dial, untracked if greeting.verdict is None else None)

    # Seen off

    def _see_off(self, words: bytes) -> None:
        """Tell it the last that it gets, and give it a moment to read it and to close."""
        self._hang_up()
        self._reception.gate.leave(self.session.id)
        tls = self._tls
        self._last_words = self._unsaid + (words if tls is None else tls.seal(words) + tls.farewell())
        self._unsaid = b""
        self._reception.lobby.give(self, _FAREWELL, self.leave)
        self._tell()

    def _tell(self) -> None:
        self._last_words = self._last_words[self._sock.send(self._last_words, 0, len(self._last_words)) :]
        if self._last_words:
            self._wait(_OUT, self._tell)
        else:
            self._sock.shutdown(socket.SHUT_WR)
            self._wait(_IN, self._listen_out)

    def _listen_out(self) -> None:
        """Throw away what it still says: were it left unread, the kernel would reset the connection."""
        try:
            rest = self._sock.receive(_REST)
        except OSError:
            rest = b""  # it has closed, and left unread what TLS says last, as libpq does
        if rest == b"":
            self.leave()


def _stay() -> None:
    """The step that is left to a client of which nothing more is to become."""


def _pieces(behind: bytes, heard: list[tuple[int, Sender | None]]) -> list[tuple[bytes, Sender | None]]:
    """What stands at the end of what was heard, in pieces of one sender each."""
    pieces = []
    begin = len(behind) - sum(size for size, _ in heard)
    for size, sender in heard:
        end = begin + size
        if end > 0:
            pieces.append((behind[max(0, begin) : end], sender))
        begin = end
    return pieces


def _client_of(session: ProxiedSession) -> str:
    return session.client_name or "a client on a Unix socket"


async def _bringer(session: ProxiedSession) -> str:
    """Who has brought a mark round, as far as it can be told quickly."""
    if session.client_socket is not None:
        with trio.move_on_after(_INTRODUCTION):
            await session.wait_for_opening()
    opener = None if session.opening is None else session.opening.opener
    return _client_of(session) if opener is None else named(opener.pid, opener)


def _unavailable(error: UpstreamUnavailable, through: str | None) -> bytes:
    if error.exhausted:
        return too_many(str(error), error.hint(through))
    text = f"pgguard: could not connect to the server: {error}"
    return build_error_response(text, sqlstate="08001", hint=error.hint(through))


def _explained(reason: str) -> str:
    """Why a client has no TLS, in OpenSSL's words, and what these mean."""
    meaning = next((meaning for words, meaning in _MEANINGS if words in reason), None)
    return reason if meaning is None else f"{reason} ({meaning})"
