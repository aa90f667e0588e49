"""The relay by itself, with TLS on either side: everything that a socket could do happens as a test says so."""

from __future__ import annotations

import select
import ssl
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import pytest

from pgguard.attribution.ebpf.account import Account
from pgguard.attribution.ebpf.programs import Kind as Report
from pgguard.identity import Sender
from pgguard.proxy.ends import CHUNK, Phase, Reading, Writing
from pgguard.proxy.kernel_senders import KernelSenders, TcpAccount
from tests.proxy.messages import ANSWER, COLUMNS, LOGGED_IN, TERMINATE, message, query, row
from tests.proxy.test_relay_alone import FakeSocket, Scene, Stage, stage
from tests.proxy.tls_peers import Peer

if TYPE_CHECKING:
    from pgguard.attribution.ebpf.probe import SenderProbe
    from pgguard.attribution.ebpf.ring import Event

__all__ = ["stage"]

IN, OUT = select.EPOLLIN, select.EPOLLOUT
PARENT, CHILD = Sender(1, 1), Sender(2, 2)
ORIGIN, KEY = 7, b"key"


class Probe:
    """What it would report is put into the account by the test."""

    def read(self) -> list[Event]:
        return []

    def reached(self, _ticket: int) -> int:
        return 0

    def glance(self, _ticket: int) -> int:
        return 0


@dataclass
class Encrypted:
    """A session that speaks TLS on both sides, or on one."""

    stage: Stage
    scene: Scene
    client: Peer | None
    server: Peer | None
    account: Account = field(default_factory=lambda: Account(ORIGIN))
    received: int = 0
    """Bytes from the client since its senders are named."""

    def client_sends(self, *data: bytes) -> None:
        """Say things, each in one packet."""
        self.raw(self.scene.client, *(data if self.client is None else map(self.client.say, data)))

    def server_sends(self, *data: bytes) -> None:
        self.raw(self.scene.server, *(data if self.server is None else map(self.server.say, data)))

    def raw(self, sock: FakeSocket, *data: bytes) -> None:
        for packet in data:
            sock.given.append(packet)
            self.stage.run([(sock.fileno(), IN)])

    @property
    def client_heard(self) -> bytes:
        return self._heard(self.scene.client, self.client)

    @property
    def server_heard(self) -> bytes:
        return self._heard(self.scene.server, self.server)

    @staticmethod
    def _heard(sock: FakeSocket, peer: Peer | None) -> bytes:
        sent, sock.sent = sock.sent, b""
        return sent if peer is None else peer.hear(sent)

    def name_senders(self) -> None:
        """Have the kernel say from now on who sends."""
        self.stage.relay.name_senders(KernelSenders(cast("SenderProbe", Probe())))
        self.scene.flow.client.kernel_account = TcpAccount(KEY, self.account)

    def sent_by(self, *pieces: tuple[bytes, Sender]) -> None:
        """Receive raw bytes, at once, each piece from another sender."""
        for raw, (pid, tid, _) in pieces:
            self.account.apply((self.received, len(raw), int(Report.SENDING), tid or pid, pid, ORIGIN, 0, KEY, 0, 0, 0))
            self.received += len(raw)
        self.raw(self.scene.client, b"".join(raw for raw, _ in pieces))


def begin(stage: Stage, sides: str = "both", *, tracked: bool = True) -> Encrypted:
    client = Peer(server_side=False) if sides in ("both", "client") else None
    server = Peer(server_side=True) if sides in ("both", "server") else None
    scene = stage.session(
        tracked=tracked,
        client_tls=None if client is None else client.tls,
        server_tls=None if server is None else server.tls,
    )
    encrypted = Encrypted(stage, scene, client, server)
    if tracked:
        encrypted.server_sends(LOGGED_IN)
        assert encrypted.client_heard == LOGGED_IN
    return encrypted


@pytest.mark.parametrize("sides", ["both", "client", "server"])
def test_what_one_side_sends_reaches_the_other(stage: Stage, sides: str) -> None:
    session = begin(stage, sides)
    for _ in range(3):
        session.client_sends(query("select 1"))
        assert session.server_heard == query("select 1")
        session.server_sends(ANSWER)
        assert session.client_heard == ANSWER
    assert not stage.others.told
    assert session.scene.session.facts().tls is (sides != "server")


@pytest.mark.parametrize("sides", ["both", "client", "server"])
def test_nothing_that_is_decrypted_waits_for_something_more_to_come(stage: Stage, sides: str) -> None:
    """The epoll doesn't know of it: one read has to be enough for all that is in it."""
    session = begin(stage, sides)
    session.client_sends(query("select large"))
    assert session.server_heard
    data = COLUMNS + row(bytes(100_000))
    raw = data if session.server is None else session.server.say(data)
    assert len(raw) < CHUNK
    session.raw(session.scene.server, raw)
    assert session.client_heard == data


@pytest.mark.parametrize("sides", ["both", "client", "server"])
def test_who_has_no_room_stops_the_other_and_loses_nothing(stage: Stage, sides: str) -> None:
    session = begin(stage, sides)
    session.client_sends(query("select 1"))
    assert session.server_heard
    data = COLUMNS + row(bytes(300_000))
    client, server = session.scene.client, session.scene.server
    client.room = 1000
    server.given.append(data if session.server is None else session.server.say(data))
    stage.run([(server.fileno(), IN)])
    assert server.fileno() not in stage.poll.registered
    assert stage.poll.registered[client.fileno()] & OUT
    assert session.scene.flow.client.unsent <= CHUNK + 4096
    for _ in range(4):
        client.room = 1 << 30
        stage.run([(client.fileno(), OUT)], [(server.fileno(), IN)])
    assert session.client_heard == data


def test_a_record_that_is_torn_waits_for_its_end(stage: Stage) -> None:
    session = begin(stage)
    assert session.client is not None
    raw = session.client.say(query("select 1"))
    for n in range(len(raw) - 1):
        session.raw(session.scene.client, raw[n : n + 1])
    assert session.server_heard == b""
    assert session.scene.flow.client.reading is Reading.OPEN
    session.raw(session.scene.client, raw[-1:])
    assert session.server_heard == query("select 1")
    assert not stage.others.told


def test_records_are_whose_bytes_have_completed_them(stage: Stage) -> None:
    session = begin(stage)
    session.name_senders()
    assert session.client is not None
    first, second = session.client.say(query("select 1")), session.client.say(query("select 2"))
    session.sent_by((first[:9], PARENT))
    assert not stage.others.told
    stage.others.known = True
    session.sent_by((first[9:], PARENT), (second, CHILD))
    assert session.server_heard == query("select 1")
    session.server_sends(ANSWER)
    stage.run()
    assert session.server_heard == query("select 2")
    assert stage.others.told == ["stir", f"meet {PARENT}", f"meet {CHILD}"]
    [verdict] = stage.others.verdicts
    assert verdict.intruder == CHILD
    assert verdict.requesters == (PARENT,)


def test_another_ones_record_is_not_opened_before_the_answer_is_there_that_it_would_cost(stage: Stage) -> None:
    """Nothing can be encrypted any more when one has failed, and a server would have answered before it read it."""
    session = begin(stage)
    session.name_senders()
    assert session.client is not None
    request = session.client.say(query("select 1"))
    session.sent_by((request, PARENT))
    session.sent_by((request, CHILD))
    assert session.server_heard == query("select 1")
    client = session.scene.flow.client
    assert client.reading is Reading.CHOKED
    session.server_sends(ANSWER[:-2])
    assert session.client_heard
    assert client.reading is Reading.CHOKED
    session.server_sends(ANSWER[-2:])
    stage.run()
    assert session.client_heard
    assert stage.others.told[-1] == "end_of_stream"


def test_what_waits_for_a_server_that_waits_itself_is_opened(stage: Stage) -> None:
    session = begin(stage)
    session.name_senders()
    assert session.client is not None
    session.sent_by((session.client.say(query("copy t from stdin")), PARENT))
    session.sent_by((session.client.say(message("d", b"1\n")), CHILD))
    assert session.scene.flow.client.reading is Reading.CHOKED
    stage.others.known = True
    session.server_sends(message("G", b"\0\0\0"))
    stage.run()
    assert session.server_heard.endswith(message("d", b"1\n"))


def test_a_contested_sessions_records_wait_as_well(stage: Stage) -> None:
    """Nobody says whose they are."""
    session = begin(stage)
    assert session.client is not None
    session.scene.flow.client.contest(True)
    session.client_sends(query("select 1"))
    assert session.server_heard == query("select 1")
    session.scene.flow.client.contest(True)
    session.client_sends(query("select 2"))
    assert session.server_heard == b""
    session.server_sends(ANSWER)
    stage.run()
    assert session.client_heard == ANSWER
    assert session.server_heard == query("select 2")


def test_a_record_of_two_processes_is_told_of_and_passed_on(stage: Stage) -> None:
    session = begin(stage)
    session.name_senders()
    assert session.client is not None
    raw = session.client.say(query("select 1"))
    session.sent_by((raw[:9], PARENT))
    session.sent_by((raw[9:], CHILD))
    assert session.server_heard == query("select 1")
    assert stage.others.told == ["mixed 1 2", f"meet {CHILD}"]


def test_a_record_of_two_threads_is_not(stage: Stage) -> None:
    """A runtime may have another thread go on with what the first has had no room for."""
    session = begin(stage)
    session.name_senders()
    assert session.client is not None
    raw = session.client.say(query("select 1"))
    session.sent_by((raw[:9], PARENT))
    session.sent_by((raw[9:], Sender(1, 7)))
    assert session.server_heard == query("select 1")
    assert stage.others.told == [f"meet {Sender(1, 7)}"]


def test_a_stream_that_breaks_ends_behind_what_was_in_order(stage: Stage) -> None:
    session = begin(stage)
    assert session.client is not None
    raw = session.client.say(query("select 1"))
    session.raw(session.scene.client, raw + raw)
    assert session.server_heard == query("select 1")
    assert stage.others.told == ["end_of_stream"]
    assert session.scene.client.sent == b"", "it is told when it has been ruled on"
    session.stage.relay.say_for(session.scene.flow.client, session.client.tls)
    with pytest.raises(ssl.SSLError, match="bad record mac"):
        session.client.hear(session.scene.client.sent)


def test_a_stream_that_breaks_behind_what_is_held_ends_when_that_has_gone_on(stage: Stage) -> None:
    session = begin(stage)
    assert session.client is not None
    first, second = session.client.say(query("select 1")), session.client.say(query("select 2"))
    session.raw(session.scene.client, first + second + first)
    assert stage.others.told == ["adjudicate"]
    client, tracker = session.scene.flow.client, session.scene.flow.tracker
    assert client.reading is Reading.HELD
    assert tracker is not None
    tracker.take_up(stage.others.verdicts[0])
    tracker.overrule()
    stage.relay.go_on(client)
    assert session.server_heard == query("select 1") + query("select 2")
    assert stage.others.told == ["adjudicate", "end_of_stream"]


@pytest.mark.parametrize("clean", [True, False])
def test_the_end_of_a_stream_is_told_once_and_may_be_told_by_tls(stage: Stage, clean: bool) -> None:
    session = begin(stage)
    assert session.server is not None
    if clean:
        session.raw(session.scene.server, session.server.end())
    else:
        session.raw(session.scene.server, b"")
    assert stage.others.told == ["end_of_stream"]
    assert session.server.tls.is_closed is clean


def test_who_says_terminate_has_not_ended_its_connection_by_saying_that_tls_is_over(stage: Stage) -> None:
    """Somebody else may have it open, and go on to use it: who, is heard as without TLS."""
    session = begin(stage)
    assert session.client is not None
    session.raw(session.scene.client, session.client.say(TERMINATE) + session.client.end())
    assert session.server_heard == TERMINATE
    assert not stage.others.told
    session.raw(session.scene.client, b"")
    assert stage.others.told == ["end_of_stream"]


def test_what_another_one_sends_when_the_session_is_over_is_told_though_it_can_not_be_read(stage: Stage) -> None:
    session = begin(stage)
    session.name_senders()
    assert session.client is not None
    bye = session.client.say(TERMINATE)
    use = bytes([0x17, 3, 3, 0, 40]) + bytes(40)
    session.sent_by((bye + session.client.end(), PARENT))
    flow = session.scene.flow
    flow.phase, flow.tracker = Phase.LINGERING, None
    session.sent_by((bye, CHILD))
    assert stage.others.told == [f"meet {PARENT}"], "that does no harm"
    session.sent_by((use, CHILD))
    assert stage.others.told[1:] == ["note_unreadable 2"]


def test_keys_may_change(stage: Stage) -> None:
    """TLS has something to say when it reads, to whoever has sent."""
    session = begin(stage)
    assert session.client is not None
    session.scene.flow.client.append_raw(b"")
    words = b"\x15 some words of TLS"
    tls = session.client.tls
    tls._outgoing.write(words)
    raw = session.client.say(query("select 1"))
    session.raw(session.scene.client, raw[:9])
    session.raw(session.scene.client, raw[9:])
    assert session.scene.client.sent == words
    assert session.server_heard == query("select 1")


def test_who_can_not_be_written_to_is_still_read(stage: Stage) -> None:
    session = begin(stage)
    session.client_sends(query("select 1"))
    session.scene.client.broken = True
    session.server_sends(ANSWER)
    assert session.scene.flow.client.writing is Writing.BROKEN
    session.client_sends(query("select 2"))
    assert session.server_heard == query("select 1") + query("select 2")
