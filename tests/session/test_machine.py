"""A session, step by step, beside an account of it that is kept by somebody who knows nothing of ledgers.

The account is short: what was sent and isn't answered yet, by whom, and how much of the first answer is still to come.
Either side may do what is right or what isn't at every step, a verdict may be ruled on at once or after the other side
has gone on, and the account says which verdicts have to fall. COPY FROM STDIN with Syncs in between is left to
:mod:`tests.session.model`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Final

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pgguard.session.states import Owes
from pgguard.session.verdicts import Kind
from pgguard.wire.messages import HEADER_SIZE
from tests.fuzz.player import Player
from tests.fuzz.script import SENDERS, Do, Rule, Step
from tests.session.protocol import BACKEND, DESCRIBE_STATEMENT, FRONTEND, LOGIN, error, message
from tests.wire.test_startup import STARTUP

if TYPE_CHECKING:
    from collections.abc import Callable

    from pgguard.session.tracker import Tracker

_OPENER: Final = 1
_WHO: Final = st.sampled_from([_OPENER, _OPENER, _OPENER, 0, 5, 7])
"""Senders by their numbers; 0 is one who isn't known."""
_SIMPLE: Final = "QF"
_ASKING: Final = "QFS"
_WORK: Final = "QFE"
_ANSWERS: Final = {
    "Q": ("CZ", "IZ", "TDCZ", "TDDCTCZ", "EZ", "TDEZ", "HdcCZ", "G"),
    "F": ("VZ", "EZ"),
    "P": ("1", "E"),
    "B": ("2", "E"),
    "C": ("3",),
    "D": ("n", "T", "E"),
    "*": ("tn", "tT", "E", "tE"),
    "E": ("C", "DDC", "Ds", "I", "E", "DE", "HdcC", "G"),
    "S": ("Z", "Z", "EZ"),
}
_STRAY: Final = sorted(set(BACKEND) - set("NSA"))
_NEVER_AN_ANSWER: Final = "RKv"
_BY_HEADER: Final = "EF"
"""Messages that are judged when their header has come."""


class Judged(Enum):
    """What has been judged of a message."""

    NOTHING = 0
    SENDER = 1
    ALL = 2


@dataclass(eq=False)
class Due:
    """A message of the client's that isn't answered to its end."""

    letter: str
    pid: int | None
    asked: bool
    """The client waits for the answer, and doesn't only expect it."""


class Guarded(RuleBasedStateMachine):
    """A client, a server, and the account."""

    def __init__(self) -> None:
        super().__init__()
        self._begin()

    def _begin(self) -> None:
        self.player = Player()
        self.expected: list[Kind] = []
        self.due: list[Due] = []
        self.rest = ""
        """What is still to come of the answer to the first message that is due."""
        self.copying = False
        """That waits for copy data."""
        self.skipping = False
        """The server discards what comes, up to a Sync."""
        self.unsynced: int | None = None
        """By whom there are extended messages that no Sync has ended, by number."""
        self.simple: Due | None = None
        """The last simple request."""
        self.status = "I"
        self.over = False
        self.latest = _pid(_OPENER)
        self.known = {self.latest}
        self.ruling = Rule.OVERRULE
        self.held: tuple[str, int, Judged] | None = None
        """A message of the client's that waits for a ruling: its letter, its sender, and what has been judged of it."""
        self.server_held = False
        self.torn_by_client: tuple[Step, Callable[[], None]] | None = None
        """The rest of a message, and what it does when it is whole."""
        self.torn_by_server: Step | None = None

    @property
    def tracker(self) -> Tracker:
        assert self.player.tracker is not None
        return self.player.tracker

    def client_is_free(self) -> bool:
        return not (self.over or self.held or self.torn_by_client or self.torn_by_server)

    def server_is_free(self) -> bool:
        return not (self.over or self.server_held or self.torn_by_server)

    def nobody_waits(self) -> bool:
        return self.client_is_free() and self.server_is_free()

    @initialize()
    def log_in(self) -> None:
        self.player.do(Step(Do.CLIENT, _OPENER, STARTUP))
        self.player.do(Step(Do.SERVER, 0, LOGIN))

    # The client

    @precondition(lambda self: self.client_is_free() and not self.copying)
    @rule(
        letter=st.sampled_from("QQFPBCD*EEHSSS"),
        who=_WHO,
        cut=st.integers(0, 30),
        ruling=st.sampled_from([Rule.OVERRULE, Rule.WAIT]),
    )
    def ask(self, letter: str, who: int, cut: int, ruling: Rule) -> None:
        self._rule(ruling)
        data = DESCRIBE_STATEMENT if letter == "*" else FRONTEND[letter]
        judge = partial(self._judge, letter, who, Judged.NOTHING)
        if not 0 < cut < len(data):
            self.player.do(Step(Do.CLIENT, who, data))
            judge()
            return
        self.player.do(Step(Do.CLIENT, who, data[:cut]))
        rest = Step(Do.CLIENT, who, data[cut:])
        if letter in _BY_HEADER and cut >= HEADER_SIZE:
            judge()
            self.torn_by_client = rest, _nothing
        else:
            self.torn_by_client = rest, judge

    @precondition(lambda self: self.torn_by_client and not self.torn_by_server)
    @rule()
    def send_the_rest(self) -> None:
        assert self.torn_by_client is not None
        (step, judge), self.torn_by_client = self.torn_by_client, None
        self.player.do(step)
        judge()

    @precondition(lambda self: self.nobody_waits() and self.copying)
    @rule(letter=st.sampled_from("ddddHcf"), who=st.sampled_from([_OPENER, 0, 5]))
    def copy(self, letter: str, who: int) -> None:
        self._rule(Rule.OVERRULE)
        self.player.do(Step(Do.CLIENT, who, FRONTEND[letter]))
        self._judge_sender(who)
        if letter == "H":
            self._ask_for_all()
        elif letter in "cf":
            self.copying = False
            self.rest = ("C" if letter == "c" else "E") + ("Z" if self.due[0].letter == "Q" else "")

    @precondition(lambda self: self.nobody_waits() and not self.copying)
    @rule(who=_WHO, swallowed=st.booleans())
    def say_goodbye(self, who: int, swallowed: bool) -> None:
        self._rule(Rule.SWALLOW if swallowed else Rule.OVERRULE)
        self.player.do(Step(Do.CLIENT, who, FRONTEND["X"]))
        pid = _pid(who)
        if pid not in (None, _pid(_OPENER)):
            self.expected.append(Kind.FOREIGN_TERMINATE)
            self.over = not swallowed
        else:
            if any(due.pid not in (None, pid) for due in self.due):
                self._judge_sender(who)
            self.over = True

    @precondition(lambda self: self.nobody_waits())
    @rule()
    def leave(self) -> None:
        self.player.do(Step(Do.CLIENT_ENDS))
        self.expected.append(Kind.UNCLEAN_CLOSE)
        assert self.player.verdicts[-1].open_request is any(due.letter in _WORK for due in self.due)
        assert self.player.verdicts[-1].open_transaction is (self.status != "I")
        self.over = True

    # The server

    @precondition(lambda self: self.server_is_free() and self.due and not self.copying)
    @rule(data=st.data(), cut=st.integers(0, 30), status=st.sampled_from("IITE"))
    def answer(self, data: st.DataObject, cut: int, status: str) -> None:
        """Some of the answer that is next."""
        self._rule(Rule.OVERRULE)
        first = self.due[0]
        alone = len(self.due) == 1 and not self.held and not self.torn_by_client
        # Who sends something else before a COPY than its data is dealt with elsewhere.
        possible = [answer for answer in _ANSWERS[first.letter] if alone or answer != "G"]
        rest = self.rest or data.draw(st.sampled_from(possible))
        said = rest[: data.draw(st.integers(1, len(rest)))]
        self.rest = rest[len(said) :]
        self._say(b"".join(message("Z", status.encode()) if one == "Z" else BACKEND[one] for one in said), cut)
        if "Z" in said:
            self.status = status
        if said.endswith("G"):
            self.copying = True
        elif "E" in said and first.letter not in _ASKING:
            self._skip()
        elif not self.rest:
            self.due.pop(0)

    @precondition(lambda self: self.server_is_free() and self.copying)
    @rule()
    def fail_in_copy(self) -> None:
        self._rule(Rule.OVERRULE)
        self._say(BACKEND["E"], 0)
        self.copying = False
        if self.due[0].letter == "Q":
            self.rest = "Z"
        else:
            self._skip()

    @precondition(lambda self: self.server_is_free())
    @rule(letter=st.sampled_from("NSA"), cut=st.integers(0, 30))
    def mention(self, letter: str, cut: int) -> None:
        """What may be said at any time."""
        self._say(BACKEND[letter], cut)

    @precondition(lambda self: self.server_is_free())
    @rule(
        letter=st.sampled_from(_STRAY),
        other=st.sampled_from(_NEVER_AN_ANSWER),
        cut=st.integers(0, 30),
        ruling=st.sampled_from(Rule),
    )
    def say_what_nobody_asked_for(self, letter: str, other: str, cut: int, ruling: Rule) -> None:
        self._rule(ruling)
        waits = self.ruling >= Rule.WAIT
        if self.due or waits:
            letter = other  # what fits an answer is one to what the client goes on to ask
        elif letter == "E" and self.unsynced is not None:
            return  # it may be the error that a Flush brings
        self._say(BACKEND[letter], cut)
        self.expected.append(Kind.UNEXPECTED_RESPONSE if self.due else Kind.MESSAGE_WHILE_IDLE)
        self.server_held = waits
        if letter == "Z" and self.ruling is Rule.OVERRULE:
            self.status = "I"

    @precondition(lambda self: self.torn_by_server)
    @rule()
    def say_the_rest(self) -> None:
        assert self.torn_by_server is not None
        self.player.do(self.torn_by_server)
        self.torn_by_server = None

    @precondition(lambda self: self.nobody_waits())
    @rule()
    def end_it(self) -> None:
        self._say(error("FATAL", "57P01"), 0)
        self.over = True

    # The guard

    @precondition(lambda self: self.over)
    @rule()
    def connect_again(self) -> None:
        self._begin()
        self.log_in()

    @precondition(lambda self: (self.held or self.server_held) and not self.torn_by_server)
    @rule()
    def go_on(self) -> None:
        self.player.do(Step(Do.GO_ON))
        self.server_held = False
        held, self.held = self.held, None
        self._rule(Rule.OVERRULE)
        if held is not None:
            self._judge(*held)

    # What has to hold after every step

    @invariant()
    def the_account_is_right(self) -> None:
        self.player.look_at_the_books()
        if self.player.tracker is None or self.torn_by_server:
            return
        tracker = self.tracker
        assert [verdict.kind for verdict in self.player.verdicts] == self.expected
        assert tracker.lost is None
        if self.over:
            return
        assert tracker.idle is not bool(self.due)
        assert sum(owes != Owes.COPY_END for owes, *_ in tracker.ledger.queue()) == len(self.due)
        assert tracker.ledger.skipping is self.skipping
        assert tracker.ledger.copying_in is self.copying
        assert (tracker.unsynced is None) is (self.unsynced is None)
        assert tracker.transaction_status == self.status
        assert tracker.at_rest is (not self.due and self.unsynced is None and tracker.requests > 0)
        assert tracker.fullness() < 1

    # How the account is kept

    def _rule(self, ruling: Rule) -> None:
        """Have what is judged from now on ruled on like that, unless something still waits for its ruling."""
        if not self.held and not self.server_held:
            self.ruling = ruling
            self.player.do(Step(Do.RULE, ruling))

    def _say(self, data: bytes, cut: int) -> None:
        if 0 < cut < len(data):
            self.player.do(Step(Do.SERVER, 0, data[:cut]))
            self.torn_by_server = Step(Do.SERVER, 0, data[cut:])
        else:
            self.player.do(Step(Do.SERVER, 0, data))

    def _skip(self) -> None:
        """An error: the server discards everything up to a Sync."""
        self.rest = ""
        while self.due and self.due[0].letter != "S":
            self.due.pop(0)
        self.skipping = not self.due

    def _ask_for_all(self) -> None:
        for due in self.due:
            due.asked = True

    def _judge_sender(self, who: int) -> bool:
        """Whether it is a fault that this one sends."""
        pid = _pid(who)
        if pid is None or pid == self.latest:
            return False
        waiting = any(due.pid not in (None, pid) for due in self.due)
        once_and_for_all = not waiting and pid not in self.known and len(self.known) == 1
        self.expected.append(Kind.INHERITED_CONNECTION if once_and_for_all else Kind.SHARED_BY_PROCESSES)
        self.latest = pid
        self.known.add(pid)
        return True

    def _judge(self, letter: str, who: int, judged: Judged) -> None:
        """A message has come: what is wrong with it, and, unless it waits for a ruling on that, what it does."""
        waits = self.ruling >= Rule.WAIT
        if judged is Judged.NOTHING and self._judge_sender(who) and waits:
            self.held = letter, who, Judged.SENDER
            return
        if judged is not Judged.ALL and self._is_too_early(letter, who):
            self.expected.append(Kind.REQUEST_WHILE_BUSY)
            if waits:
                self.held = letter, who, Judged.ALL
                return
        self._take(letter, who)

    def _goes_on(self, who: int) -> bool:
        """Whether it may be the same who has sent the extended messages so far."""
        return self.unsynced is not None and _may_be_one(_pid(self.unsynced), _pid(who))

    def _is_too_early(self, letter: str, who: int) -> bool:
        """Whether its sender waits for another answer, as far as that is known."""
        pid = _pid(who)
        if letter in _SIMPLE:
            return any(due.asked and _may_be_one(due.pid, pid) for due in self.due)
        if letter == "H" or self._goes_on(who):
            return False
        return any(due is self.simple and _may_be_one(due.pid, pid) for due in self.due)

    def _take(self, letter: str, who: int) -> None:
        """It takes its effect: it is due, unless the server discards it."""
        if letter == "H":
            self._ask_for_all()
            return
        goes_on = letter not in _SIMPLE and self._goes_on(who)
        sender = self.unsynced if goes_on and self.unsynced is not None else who
        self.skipping = self.skipping and letter != "S"
        due = Due(letter, _pid(sender), letter in _ASKING)
        if not self.skipping:
            self.due.append(due)
        if letter in _ASKING:
            self._ask_for_all()
        if letter in _SIMPLE:
            self.simple = due
        self.unsynced = None if letter in _ASKING else sender


def _may_be_one(one: int | None, other: int | None) -> bool:
    """Whether two may be the same process, as far as they are known."""
    return one is None or other is None or one == other


def _nothing() -> None:
    """A message that was judged by its header does no more when it is whole."""


def _pid(who: int) -> int | None:
    sender = SENDERS[who]
    return None if sender is None else sender.pid


TestGuarded = Guarded.TestCase
TestGuarded.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
