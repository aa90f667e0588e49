"""The relay by itself: no socket, no trio, and everything that happens to it in the order in which a test says so."""

# ruff: noqa: ARG002 - who does nothing needs no arguments

from __future__ import annotations

import select
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from pgguard.identity import Sender
from pgguard.proxy.ends import CHUNK, End, Flow, Phase, Reading, Writing
from pgguard.proxy.relay import Relay
from pgguard.proxy.session import ProxiedSession
from pgguard.session.tracker import Tracker
from pgguard.session.verdicts import Verdict
from tests.proxy.messages import ANSWER, COLUMNS, LOGGED_IN, query, row

if TYPE_CHECKING:
    from pgguard.proxy.transport import Tls

IN, OUT, ENDED = select.EPOLLIN, select.EPOLLOUT, select.EPOLLRDHUP
RESET = ConnectionResetError(104, "reset")


class FakeSocket:
    """Has what the test gives it, and keeps what is sent."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.given: deque[bytes | OSError] = deque()
        self.sent = b""
        self.room = 1 << 30
        self.sends = 0
        self.broken = False
        self.fails = False
        """It has an error of its own."""
        self.pid = -1

    def fileno(self) -> int:
        return self._fd

    def receive(self, size: int) -> bytes | None:
        if not self.given:
            return None
        found = self.given.popleft()
        if isinstance(found, OSError):
            raise found
        if len(found) > size:
            self.given.appendleft(found[size:])
        return found[:size]

    def receive_named(self, size: int) -> tuple[bytes, int] | None:
        data = self.receive(size)
        return None if data is None else (data, self.pid)

    def send(self, data: bytes, begin: int, stop: int) -> int:
        if self.fails:
            raise KeyError("injected")
        if self.broken:
            raise BrokenPipeError
        sent = data[begin:stop][: self.room]
        self.sends += 1 if sent else 0
        self.room -= len(sent)
        self.sent += sent
        return len(sent)

    def shutdown(self, how: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def setsockopt(self, level: int, option: int, value: int | bytes) -> None:
        raise NotImplementedError

    def getsockopt(self, level: int, option: int) -> int:
        raise NotImplementedError


class FakePoll:
    """Reports what the test has it report, of descriptors that are registered for it."""

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.whose: dict[int, object] = {}
        self.rounds: deque[list[tuple[int, int]]] = deque()
        self.waited = 0.0
        """How long it may have waited last, in seconds."""

    def register(self, fd: int, eventmask: int, whose: object) -> None:
        assert fd not in self.registered
        self.registered[fd] = eventmask
        self.whose[fd] = whose

    def modify(self, fd: int, eventmask: int) -> None:
        assert fd in self.registered
        self.registered[fd] = eventmask

    def unregister(self, fd: int) -> None:
        del self.registered[fd]

    def poll(self, timeout: float, maxevents: int) -> list[object]:
        self.waited = timeout
        events: list[object] = []
        for fd, mask in self.rounds.popleft() if self.rounds else []:
            if self.registered.get(fd, 0) & mask:
                events += (self.whose[fd], mask & self.registered[fd])
        return events


@dataclass
class Others:
    """Those whom the relay hands on what is unusual: they note it, and do nothing."""

    known: bool = False
    """The verdicts are repeats."""
    waits: bool = False
    """What is of interest has to wait."""
    late: bool = False
    told: list[str] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)

    def meet(self, end: End) -> None:
        self.told.append(f"meet {end.sender}")

    def stir(self, client: End) -> None:
        self.told.append("stir")

    def has_to_wait(self, end: End, data: bytes, *, whole: bool, now: float) -> bool:
        self.told.append("has_to_wait")
        end.heed = 0
        return self.waits

    def note_mixed(self, end: End, begun_by: Sender, sender: Sender) -> None:
        self.told.append(f"mixed {begun_by.pid} {sender.pid}")

    def is_late(self, server: End) -> bool:
        return self.late

    def settles(self, session: ProxiedSession, verdict: Verdict, now: float) -> bool:
        self.verdicts.append(verdict)
        return self.known

    def adjudicate(self, end: End, verdict: Verdict) -> None:
        self.told.append("adjudicate")

    def let_read(self, server: End) -> None:
        self.told.append("let_read")

    def let_last_be_read(self, server: End) -> None:
        self.told.append("let_last_be_read")

    def lost(self, session: ProxiedSession, reason: str, now: float) -> None:
        self.told.append("lost")

    def end_of_stream(self, end: End, *, reset: bool) -> None:
        end.end_stream()
        self.told.append("reset" if reset else "end_of_stream")

    def pass_end_on(self, end: End) -> None:
        self.told.append("pass_end_on")

    def hear(self, end: End, data: bytes) -> None:
        self.told.append("hear")

    def note_late(self, end: End, data: bytes, now: float) -> None:
        self.told.append("note_late")

    def note_unreadable(self, end: End, sender: Sender | None, size: int) -> None:
        self.told.append(f"note_unreadable {None if sender is None else sender.pid}")

    def finish(self, session: ProxiedSession) -> None:
        session.flow.phase = Phase.CLOSED
        self.told.append("finish")


class Stage:
    """A relay, and sessions whose sockets the test has in its hands."""

    def __init__(self, *, seconds: float = 10.0) -> None:
        self.poll = FakePoll()
        self.others = Others()
        self.woken = 0
        self.relay = Relay(self.poll, wake=self.wake, seconds=seconds)
        self.relay.hand_on_to(self.others, self.others)
        self._fds = iter(range(100, 1000))

    def wake(self) -> None:
        self.woken += 1

    def session(self, *, tracked: bool = True, client_tls: Tls | None = None, server_tls: Tls | None = None) -> Scene:
        number = next(self._fds)
        session = ProxiedSession(number, transport="tcp", client_name="here:1", client_socket=None, opened_at=0.0)
        client, server = FakeSocket(next(self._fds)), FakeSocket(next(self._fds))
        tracker = Tracker({"user": "u"}) if tracked else None
        session.connect(client, server, tracker, client_tls=client_tls, server_tls=server_tls)
        self.relay.begin(session.flow, b"")
        scene = Scene(self, session, client, server)
        session.client.heed = session.server.heed = 0
        if tracked and client_tls is None and server_tls is None:
            scene.server_sends(LOGGED_IN)
            assert scene.client.sent == LOGGED_IN
            scene.client.sent = b""
        return scene

    def run(self, *rounds: list[tuple[int, int]]) -> bool:
        self.poll.rounds.extend(rounds)
        now = time.monotonic()
        return self.relay.run(now + 60, 61)


@dataclass
class Scene:
    stage: Stage
    session: ProxiedSession
    client: FakeSocket
    server: FakeSocket

    @property
    def flow(self) -> Flow:
        return self.session.flow

    def client_sends(self, *data: bytes | OSError) -> None:
        self._sends(self.client, *data)

    def server_sends(self, *data: bytes | OSError) -> None:
        self._sends(self.server, *data)

    def _sends(self, sock: FakeSocket, *data: bytes | OSError) -> None:
        sock.given.extend(data)
        self.stage.run([(sock.fileno(), IN)])


@pytest.fixture
def stage() -> Stage:
    return Stage()


def test_what_one_side_sends_reaches_the_other_in_one_piece(stage: Stage) -> None:
    scene = stage.session()
    scene.client_sends(query("select 1"))
    scene.server_sends(ANSWER)
    assert (scene.server.sent, scene.client.sent) == (query("select 1"), ANSWER)
    assert (scene.server.sends, scene.client.sends) == (1, 2)
    assert not stage.others.told


def test_nothing_to_do_is_said_and_so_is_that_it_is_time_for_others(stage: Stage) -> None:
    scene = stage.session()
    assert not stage.run()
    assert stage.poll.waited == 61
    stage.poll.rounds.append([(scene.client.fileno(), IN)])
    assert stage.relay.run(0.0, 0.0)
    stage.relay.hurry()
    stage.poll.rounds.append([(scene.client.fileno(), IN)])
    assert stage.run()
    assert stage.poll.waited == 0


@pytest.mark.parametrize("end", ["client", "server"])
def test_who_has_no_room_stops_the_other_and_loses_nothing(stage: Stage, end: str) -> None:
    scene = stage.session()
    scene.client_sends(query("select 1"))
    data = COLUMNS + row(bytes(3000)) if end == "client" else query("select " + "1" * 3000)
    to, by = (scene.client, scene.server) if end == "client" else (scene.server, scene.client)
    stage.others.known = True
    to.sent, to.room = b"", 1000
    scene._sends(by, data)
    assert to.sent == data[:1000]
    assert by.fileno() not in stage.poll.registered
    assert stage.poll.registered[to.fileno()] & OUT
    to.room = 1000
    stage.run([(to.fileno(), OUT)])
    assert to.sent == data[:2000]
    to.room = 1 << 30
    stage.run([(to.fileno(), OUT)])
    assert to.sent == data
    assert stage.poll.registered[by.fileno()] & IN
    assert not stage.poll.registered[to.fileno()] & OUT


def test_what_is_large_goes_through_in_chunks(stage: Stage) -> None:
    scene = stage.session()
    scene.client_sends(query("select large"))
    data = COLUMNS + row(bytes(1_000_000))
    scene.server.given.append(data)
    scene.client.sends = 0
    stage.run(*[[(scene.server.fileno(), IN)]] * 10)
    assert scene.client.sent == data
    assert scene.client.sends == -(-len(data) // CHUNK)


def test_a_message_that_is_cut_waits_for_its_head_and_for_nothing_else(stage: Stage) -> None:
    scene = stage.session()
    request = query("select 1")
    scene.client_sends(request[:3])
    assert scene.server.sent == b""
    scene.client_sends(request[3:])
    assert scene.server.sent == request
    scene.server_sends(ANSWER[:40])
    assert scene.client.sent
    scene.server_sends(ANSWER[40:])
    assert scene.client.sent == ANSWER


def test_what_is_judged_is_held_and_the_other_direction_flows_on(stage: Stage) -> None:
    scene = stage.session()
    scene.client_sends(query("select 1"))
    scene.client_sends(query("select 2"))
    assert scene.server.sent == query("select 1")
    assert stage.others.told == ["adjudicate"]
    assert scene.flow.client.reading is Reading.HELD
    assert scene.flow.client.held == query("select 2")
    assert scene.client.fileno() not in stage.poll.registered
    scene.server_sends(ANSWER)
    assert scene.client.sent == ANSWER
    tracker = scene.flow.tracker
    assert tracker is not None
    tracker.take_up(stage.others.verdicts[0])
    tracker.overrule()
    stage.relay.go_on(scene.flow.client)
    assert scene.server.sent == query("select 1") + query("select 2")
    assert scene.client.fileno() in stage.poll.registered


def test_a_fault_that_is_known_holds_nothing(stage: Stage) -> None:
    scene = stage.session()
    stage.others.known = True
    scene.client_sends(query("select 1"), query("select 2"))
    stage.run([(scene.client.fileno(), IN)])
    assert scene.server.sent == query("select 1") + query("select 2")
    assert len(stage.others.verdicts) == 1
    assert not stage.others.told


def test_many_messages_wait_for_their_turn_behind_what_others_send() -> None:
    stage = Stage(seconds=0.0)
    scene, other = stage.session(), stage.session()
    stage.others.known = True
    many = query("select 1") * 1000
    scene.client.given.append(many)
    other.client.given.append(query("select 2"))
    stage.poll.rounds.append([(scene.client.fileno(), IN)])
    assert stage.relay.run(0.0, 0.0)
    assert scene.flow.client.reading is Reading.QUEUED
    assert 0 < len(scene.server.sent) < len(many)
    stage.poll.rounds.append([(other.client.fileno(), IN)])
    assert stage.relay.run(0.0, 0.0)
    assert other.server.sent == query("select 2")
    stage.run()
    assert scene.server.sent == many
    assert stage.woken == 0


def test_what_is_held_by_another_than_the_relay_itself_has_it_woken(stage: Stage) -> None:
    scene = stage.session()
    scene.flow.client.reading = Reading.CHOKED
    stage.relay.lose(scene.flow, scene.session, "because", 0.0)
    assert stage.woken == 1
    assert stage.relay.queued() == {scene.flow.client}
    assert not stage.run()
    assert scene.flow.client.reading is Reading.OPEN


def test_ends_of_streams_are_dealt_with_one_after_the_other_and_each_is_told_once(stage: Stage) -> None:
    scenes = [stage.session() for _ in range(3)]
    for scene in scenes:
        scene.client.given.append(b"")
    stage.run([(scene.client.fileno(), IN | ENDED) for scene in scenes])
    assert stage.others.told == ["end_of_stream"] * 3
    for scene in scenes:
        scene.server_sends(RESET)
    assert stage.others.told[3:] == ["reset"] * 3
    assert [scene.flow.server.failure for scene in scenes] == [104] * 3


def test_who_interrupts_stands_in_line_while_somebody_is_judged(stage: Stage) -> None:
    scene, other = stage.session(), stage.session()
    scene.client_sends(query("select 1"))
    scene.client.given.append(query("select 2"))
    other.client.given.append(query("select 3"))
    stage.relay.hurry()
    stage.poll.rounds.append([(scene.client.fileno(), IN), (other.client.fileno(), IN)])
    assert stage.run()
    assert other.server.sent == query("select 3")
    assert scene.server.sent == query("select 1")
    assert stage.others.told == ["adjudicate"]


def test_what_is_of_interest_is_looked_at_once(stage: Stage) -> None:
    scene = stage.session()
    scene.flow.client.attend()
    scene.client_sends(query("select 1"))
    assert stage.others.told == ["has_to_wait"]
    assert scene.server.sent == query("select 1")
    stage.others.waits = True
    scene.flow.client.contest(True)
    scene.client_sends(query("select 2"))
    assert scene.server.sent == query("select 1")


def test_answers_are_kept_apart_where_several_read_and_the_relay_is_late(stage: Stage) -> None:
    scene = stage.session()
    tracker = scene.flow.tracker
    assert tracker is not None
    tracker.expect_readers()
    stage.others.known = True
    scene.client_sends(query("select 1") * 2)
    scene.server_sends(ANSWER * 2)
    assert scene.client.sent == ANSWER * 2
    scene.client_sends(query("select 1") * 2)
    scene.client.sent, stage.others.late = b"", True
    scene.server_sends(ANSWER * 2)
    assert scene.client.sent == ANSWER
    assert stage.others.told == ["let_read"]
    stage.relay.go_on(scene.flow.server)
    assert scene.client.sent == ANSWER * 2


def test_a_message_that_is_dropped_is_swallowed_to_its_end(stage: Stage) -> None:
    scene = stage.session(tracked=False)
    scene.flow.server.swallow = len(COLUMNS)
    scene.server_sends(COLUMNS[:7])
    scene.server_sends(COLUMNS[7:] + ANSWER)
    assert scene.client.sent == ANSWER


def test_who_can_not_be_written_to_is_still_read(stage: Stage) -> None:
    scene = stage.session()
    scene.client_sends(query("select 1"))
    scene.client.broken = True
    scene.server_sends(ANSWER)
    assert scene.flow.client.writing is Writing.BROKEN
    scene.client_sends(query("select 2"))
    assert scene.server.sent == query("select 1") + query("select 2")


def test_what_a_client_sends_behind_the_end_is_heard_and_not_passed_on(stage: Stage) -> None:
    scene = stage.session(tracked=False)
    for phase, told in ((Phase.REJECTED, "hear"), (Phase.ENDED, "hear"), (Phase.LINGERING, "note_late")):
        scene.flow.phase = phase
        scene.client_sends(query("select 1"))
        assert stage.others.told[-1] == told
    assert scene.server.sent == b""


def test_an_error_costs_one_session(stage: Stage) -> None:
    scene, other = stage.session(), stage.session()
    scene.server.fails = True
    scene.client.given.append(query("select 1"))
    other.client.given.append(query("select 2"))
    stage.run([(scene.client.fileno(), IN), (other.client.fileno(), IN)])
    assert stage.others.told == ["finish"]
    assert other.server.sent == query("select 2")


def test_a_change_of_sender_is_told_once(stage: Stage) -> None:
    scene = stage.session()
    scene.flow.client.names_senders = True
    for pid in (7, 7, -1, 0, 0):
        scene.client.pid = pid
        scene.client_sends(query("select 1"))
        scene.server_sends(ANSWER)
    assert stage.others.told == [f"meet {Sender(7)}", "meet None"]
