"""Plays a conversation to the session core as the relay does, and looks whether everything is in order.

What has to hold, whatever is played:

- nothing raises, and nothing goes on for ever: each call gets on, or says why not;
- what is forwarded, swallowed and held back of a stream is, put together, what was sent of it;
- what is held back is less than one look at a message, and the accounts are no longer than what was sent;
- a verdict is about the message that it stands at, names nobody who hasn't sent, and one process alone shares nothing;
- however it is cut, and in however small slices it is followed, verdicts and state are the same (:func:`check`).
"""

from __future__ import annotations

from collections import Counter, deque
from sys import maxsize
from typing import TYPE_CHECKING, Final, NamedTuple

from pgguard.session.farewell import asks, farewell
from pgguard.session.session import _OUTSTANDING, _RECENT
from pgguard.session.tracker import Tracker
from pgguard.session.verdicts import Direction, Kind, Party, Verdict
from pgguard.wire.fields import (
    build_error_response,
    parse_fields,
    parse_severity,
)
from pgguard.wire.messages import HEADER_SIZE, LOOK_LIMIT
from pgguard.wire.startup import (
    InvalidStartupPacket,
    PacketKind,
    parse_startup,
)
from pgguard.wire.strangers import recognize
from tests.fuzz.script import SENDERS, Do, Rule, Step, cut_in_bytes, joined, messages
from tests.session.outcomes import named, outcome, told

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pgguard.identity import Sender

_AT_ONE_PLACE: Final = 4
"""Verdicts on one message, at most: on its sender, on its frame, on its place."""
_SHARING: Final = frozenset({Kind.SHARED_BY_PROCESSES, Kind.INHERITED_CONNECTION, Kind.FOREIGN_TERMINATE})
_CAN_BE_SWALLOWED: Final = frozenset({Kind.MESSAGE_WHILE_IDLE, Kind.FOREIGN_TERMINATE})
_WORDS: Final = build_error_response("no", sqlstate="08P01")
_FRONT, _BEHIND = b"\xff" * 3, b"\xff" * 7
"""Positions are not always those of the buffer, and something may stand behind its end."""


class Way(NamedTuple):
    """How a conversation is followed."""

    most: int = maxsize
    """Messages that begin in so many bytes are followed at once."""
    apart: bool = False
    """Answers are followed one by one."""


WHOLE: Final = Way()
SLICED: Final = Way(most=7)
APART: Final = Way(apart=True)
BOTH: Final = Way(most=23, apart=True)


class _Stream:
    """One direction."""

    __slots__ = ("ended", "held", "passed", "sent", "verdict", "waiting")

    def __init__(self) -> None:
        self.held = b""
        self.sent = bytearray()
        self.passed = bytearray()
        """What has been forwarded, or swallowed."""
        self.ended = False
        self.verdict: tuple[Verdict, Sender | None] | None = None
        """What is being ruled on, and who has sent what is held for it."""
        self.waiting: deque[Step] = deque()
        """What happens behind it."""


class Player:
    """One conversation that is being followed."""

    def __init__(self, way: Way = WHOLE) -> None:
        self.way = way
        self.tracker: Tracker | None = None
        self.verdicts: list[Verdict] = []
        self.places: list[tuple[bool, int]] = []
        """Of each verdict on a message, which stream's it is, and where in it that begins."""
        self.never = ""
        """Why there is no session, if there will be none."""
        self._knocked = bytearray()
        self._rule = Rule.OVERRULE
        self._streams = {Direction.FRONTEND: _Stream(), Direction.BACKEND: _Stream()}
        self._pids: set[int] = set()
        self._asks_goodbye = False

    @property
    def outcome(self) -> tuple[object, ...]:
        """What has to be the same, however it is cut."""
        tracker = self.tracker
        state: tuple[object, ...] = ()
        if tracker is not None:
            state = (tracker.lost,) if tracker.lost is not None else outcome(tracker)
        return (self.never, self.places, told(self.verdicts), named(self.verdicts), state)

    def play(self, steps: Iterable[Step]) -> None:
        """Play all of it, and rule on what still waits in the end."""
        for step in steps:
            self.do(step)
        self._go_on()
        self.look_at_the_books()

    def do(self, step: Step) -> None:
        """Play a step."""
        match step.do:
            case Do.CLIENT | Do.CLIENT_ENDS:
                self._take(Direction.FRONTEND, step)
            case Do.SERVER | Do.SERVER_ENDS:
                self._take(Direction.BACKEND, step)
            case Do.RULE:
                self._rule = Rule(step.how & 3)
            case Do.GO_ON:
                self._go_on()
            case Do.INTRODUCE:
                opener = SENDERS[step.how & 7]
                if self.tracker is not None and opener is not None:
                    self._pids.add(opener.pid)
                    self._asks_goodbye = bool(step.how & 8)
                    self.tracker.introduce(opener, asks_goodbye=self._asks_goodbye)
            case Do.ASK:
                self._ask(step.data)

    def _take(self, direction: Direction, step: Step) -> None:
        """Something happens in a stream, now or when it is no longer held."""
        stream = self._streams[direction]
        if stream.ended:
            return
        if stream.verdict is not None:
            stream.waiting.append(step)
            return
        if step.do is Do.CLIENT_ENDS or step.do is Do.SERVER_ENDS:
            stream.ended = True
            if self.tracker is not None and self.tracker.lost is None:
                self._end(self.tracker, step, len(stream.held))
        elif self.tracker is not None and step.data:
            sender = SENDERS[step.how & 7] if direction is Direction.FRONTEND else None
            self._feed(self.tracker, direction, step.data, sender)
        elif self.tracker is None and direction is Direction.FRONTEND and not self.never:
            self._knock(step.data, SENDERS[step.how & 7])

    def _knock(self, data: bytes, sender: Sender | None) -> None:
        """Somebody speaks who hasn't said yet who it is."""
        self._knocked += data
        while True:
            assert isinstance(recognize(self._knocked), str)
            try:
                packet = parse_startup(self._knocked)
            except InvalidStartupPacket as invalid:
                self.never = str(invalid)
                return
            if packet is None:
                return
            assert self._knocked.startswith(packet.packet)
            assert isinstance(packet.is_postgres, bool)
            rest = bytes(self._knocked[len(packet.packet) :])
            if packet.kind is PacketKind.STARTUP_MESSAGE:
                if sender is not None:
                    self._pids.add(sender.pid)
                self.tracker = Tracker(packet.parameters, sender)
                if rest:
                    self._feed(self.tracker, Direction.FRONTEND, rest, sender)
                return
            if not packet.encrypts:
                self.never = packet.kind.value
                return
            self._knocked[:] = rest

    def _feed(self, tracker: Tracker, direction: Direction, data: bytes, sender: Sender | None) -> None:
        stream = self._streams[direction]
        stream.sent += data
        if sender is not None and data:
            self._pids.add(sender.pid)
        buffer = _FRONT + stream.held + data + _BEHIND
        pos, end = len(_FRONT), len(buffer) - len(_BEHIND)
        here = 0
        while pos < end and tracker.lost is None:
            if direction is Direction.FRONTEND:
                done = tracker.frontend(buffer, pos, end, sender, 0.0, self.way.most)
            else:
                done = tracker.backend(buffer, pos, end, self.way.most, apart=self.way.apart)
            assert pos <= done <= end, "a position that isn't in what is left of the chunk"
            verdict = tracker.verdict
            if done != pos:
                here = 0
                stream.passed += buffer[pos:done]
            elif verdict is None:
                break
            pos = done
            if verdict is not None:
                here += 1
                assert here <= _AT_ONE_PLACE, f"no end of verdicts: {verdict}"
                self._note(tracker, direction, verdict, pos, len(stream.passed))
                if self._rule >= Rule.WAIT:
                    stream.verdict = tracker.set_aside(), sender
                    break
                self._decide(tracker, verdict, swallow=self._rule is Rule.SWALLOW)
        if tracker.lost is not None:
            stream.held = b""
            stream.passed += buffer[pos:end]
        else:
            stream.held = buffer[pos:end]
            assert stream.verdict is not None or len(stream.held) < LOOK_LIMIT, "more is held back than it takes"

    def _note(self, tracker: Tracker, direction: Direction, verdict: Verdict, pos: int, place: int) -> None:
        assert tracker.lost is None
        assert verdict.start == pos or verdict.message is None, "a verdict on what stands elsewhere"
        assert verdict.message is None or verdict.message.direction is direction
        assert direction is Direction.BACKEND or verdict.by is Party.CLIENT
        self.places.append((direction is Direction.FRONTEND, place))
        self._look_at(verdict)

    def _look_at(self, verdict: Verdict) -> None:
        self.verdicts.append(verdict)
        named_pids = [sender.pid for sender in (verdict.intruder, verdict.sender, *verdict.requesters) if sender]
        assert self._pids.issuperset(named_pids), "somebody is named who has sent nothing"
        if verdict.kind in _SHARING and verdict.intruder is not None:
            assert named_pids.count(verdict.intruder.pid) == 1, "an intruder on itself"
        assert len(verdict.requests) <= _RECENT + _OUTSTANDING
        if len(self._pids) < 2 and not self._asks_goodbye:
            assert verdict.kind not in _SHARING, "one process shares with nobody"

    @staticmethod
    def _decide(tracker: Tracker, verdict: Verdict, *, swallow: bool) -> None:
        if swallow and verdict.kind in _CAN_BE_SWALLOWED and verdict.message is not None:
            tracker.swallow()
        else:
            tracker.overrule()
        assert tracker.verdict is None

    def _go_on(self) -> None:
        for direction, stream in self._streams.items():
            tracker = self.tracker
            while tracker is not None and stream.verdict is not None:
                (verdict, sender), stream.verdict = stream.verdict, None
                if tracker.lost is None:
                    tracker.take_up(verdict)
                    self._decide(tracker, verdict, swallow=self._rule is Rule.WAIT_AND_SWALLOW)
                self._feed(tracker, direction, b"", sender)
                waiting, stream.waiting = stream.waiting, deque()
                for step in waiting:
                    self._take(direction, step)

    def _end(self, tracker: Tracker, step: Step, held: int) -> None:
        if step.do is Do.CLIENT_ENDS:
            verdicts = tracker.frontend_eof(held, reset=bool(step.how & 1))
        else:
            verdicts = tracker.backend_eof(held)
        for verdict in verdicts:
            self._look_at(verdict)

    def _ask(self, data: bytes) -> None:
        """All that can be asked of a session leaves it as it is."""
        assert isinstance(asks(data), bool)
        assert isinstance(parse_severity(data).ends_session, bool)
        assert isinstance(parse_fields(data), dict)
        tracker = self.tracker
        if tracker is None or tracker.lost is not None:
            return
        before = outcome(tracker)
        assert tracker.fullness() >= 0
        for asked in (None, chr(data[0]) if data else "Q"):
            words = farewell(tracker, _WORDS, asked).words
            assert b"".join(messages(words)) == words
        pending = data if len(data) >= HEADER_SIZE else b""
        sender = SENDERS[1]
        for verdict in (
            tracker.judge_readers(Kind.SHARED_BY_THREADS, "", intruder=sender, requesters=(), pending=pending),
            tracker.judge_unread("", sender=sender, pending=pending, libpq=None),
        ):
            assert len(verdict.requests) <= _RECENT + _OUTSTANDING
        if pending:
            assert tracker.judge_hidden_overlap(sender=sender, pending=pending).message is not None
        assert isinstance(tracker.at_rest, bool)
        assert isinstance(tracker.senders.pids, frozenset)
        assert outcome(tracker) == before, "a question has changed the session"

    def look_at_the_books(self) -> None:
        """Whether every byte is accounted for, and no more is kept account of than was sent."""
        for stream in self._streams.values():
            assert stream.passed + stream.held == stream.sent, "bytes are lost, or others"
        tracker = self.tracker
        if tracker is not None:
            sent = len(self._streams[Direction.FRONTEND].sent) // HEADER_SIZE + 1
            assert tracker.ledger.count <= sent, "more is owed than was asked for"
            assert tracker.requests <= sent
            assert not tracker.ledger.count or tracker.ledger.state


def check(steps: list[Step]) -> Counter[Kind]:
    """Play a conversation as it is cut, cut in other ways, and in slices: nothing may differ.

    Returns the kinds of the verdicts.
    """
    together = joined(steps)
    expected = _played(together, WHOLE)
    for way in (WHOLE, SLICED, APART, BOTH):
        _compare(expected, _played(steps, way))
    _compare(expected, _played(cut_in_bytes(together), APART))
    return Counter(verdict.kind for verdict in expected.verdicts)


def check_once(steps: list[Step], way: Way) -> Counter[Kind]:
    """The same, but played in one other way."""
    expected = _played(joined(steps), WHOLE)
    _compare(expected, _played(steps, way))
    return Counter(verdict.kind for verdict in expected.verdicts)


def _played(steps: Iterable[Step], way: Way) -> Player:
    player = Player(way)
    player.play(steps)
    return player


def _compare(expected: Player, other: Player) -> None:
    assert other.outcome == expected.outcome, "cut otherwise, it is judged otherwise"
