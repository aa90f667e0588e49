"""Who sends: two processes on one connection are found out by their bytes' senders, and by those alone."""

from __future__ import annotations

import pytest

from pgguard.identity import Sender
from pgguard.session.verdicts import Direction, Kind, RequestState
from tests.session.protocol import FRONTEND, Conversation, bind, kinds, parse, query

PARENT = Sender(4866, 4866)
CHILD = Sender(4867, 4880)
OTHER = Sender(4868, 4868)

SELECT = query("SELECT pg_backend_pid()")


@pytest.fixture
def conversation() -> Conversation:
    return Conversation(PARENT)


def test_overlap(conversation: Conversation) -> None:
    """The fork bug as it is best known: the child asks while the parent waits."""
    conversation.frontend(SELECT)
    [verdict] = conversation.frontend(SELECT, CHILD)
    assert verdict.kind is Kind.SHARED_BY_PROCESSES
    assert verdict.reason == "while the answer to another process was outstanding"
    assert verdict.intruder == CHILD
    assert verdict.requesters == (PARENT,)
    assert verdict.libpq == "message type 0x54 arrived from server while idle"
    assert verdict.message is not None
    assert (verdict.message.type, verdict.message.name, verdict.message.size) == ("Q", "Query", len(SELECT))
    assert verdict.open_request
    [request] = verdict.requests
    assert (request.n, request.sender, request.state) == (1, PARENT, RequestState.WAITING)
    assert conversation.backend("TDCZTDCZ") == [], "the server answers both in order, and is innocent"
    assert conversation.tracker.requests_seen()[-1].sender == CHILD


def test_overlap_while_the_answer_is_on_its_way(conversation: Conversation) -> None:
    conversation.frontend(SELECT)
    conversation.backend("TD")
    [verdict] = conversation.frontend(SELECT, CHILD)
    assert verdict.requests[0].state is RequestState.ANSWERING


def test_overlap_in_a_pipeline(conversation: Conversation) -> None:
    """Within one process this is what pipelines look like; between two it never is one."""
    conversation.frontend("PBES")
    [verdict] = conversation.frontend("PBES", CHILD)
    assert verdict.kind is Kind.SHARED_BY_PROCESSES
    assert verdict.libpq == "message type 0x31 arrived from server while idle"


def test_one_way_hand_over(conversation: Conversation) -> None:
    """Forked, then used by one child alone, as pg_basebackup does."""
    conversation.talk("> Q < TDCZ")
    [verdict] = conversation.frontend(SELECT, CHILD)
    assert verdict.kind is Kind.INHERITED_CONNECTION
    assert verdict.libpq is None
    assert (verdict.intruder, verdict.requesters) == (CHILD, (PARENT,))
    conversation.backend("TDCZ")
    assert conversation.frontend(SELECT, CHILD) == [], "once said, it is said"


def test_hand_over_before_any_request(conversation: Conversation) -> None:
    """The parent has only connected; its StartupMessage was its turn."""
    assert kinds(conversation.frontend(SELECT, CHILD)) == [Kind.INHERITED_CONNECTION]


def test_hand_over_during_the_login() -> None:
    conversation = Conversation(PARENT, login=False)
    assert kinds(conversation.frontend("p", CHILD)) == [Kind.SHARED_BY_PROCESSES]


def test_taking_turns(conversation: Conversation) -> None:
    """Two that take perfect turns never overlap, and only the return of the first one shows it."""
    conversation.talk("> Q < TDCZ")
    conversation.frontend(SELECT, CHILD)
    conversation.backend("TDCZ")
    [verdict] = conversation.frontend(SELECT, PARENT)
    assert verdict.kind is Kind.SHARED_BY_PROCESSES
    assert verdict.reason == "after another process had used the connection in between"
    assert (verdict.intruder, verdict.requesters) == (PARENT, (CHILD,))


def test_third_process(conversation: Conversation) -> None:
    """A child each for two tasks: neither returns, and yet it is no hand-over."""
    conversation.talk("> Q < TDCZ")
    conversation.frontend(SELECT, CHILD)
    conversation.backend("TDCZ")
    [verdict] = conversation.frontend(SELECT, OTHER)
    assert verdict.kind is Kind.SHARED_BY_PROCESSES
    assert verdict.reason == "on a connection that several other processes had used"
    assert verdict.requesters == (CHILD, PARENT), "the latest first"


def test_of_very_many_the_opener_and_the_latest_are_remembered(conversation: Conversation) -> None:
    """A job runner whose connection every child uses, one after the other."""
    for pid in range(10_000, 11_000):
        conversation.frontend(SELECT, Sender(pid))
        conversation.backend("TDCZ")
    verdict = conversation.verdicts[-1]
    assert verdict.kind is Kind.SHARED_BY_PROCESSES
    assert verdict.reason == "on a connection that several other processes had used"
    known = [sender.pid for sender in verdict.requesters]
    assert known == [*range(10_998, 10_743, -1), PARENT.pid]
    [verdict] = conversation.frontend(SELECT, Sender(10_000))
    assert verdict.kind is Kind.SHARED_BY_PROCESSES, "whom it has forgotten is a stranger again"


def test_whose_turn_it_was_comes_first(conversation: Conversation) -> None:
    conversation.frontend(SELECT, PARENT)
    conversation.frontend(SELECT, CHILD)
    [verdict] = conversation.frontend(SELECT, OTHER)
    assert verdict.requesters == (PARENT, CHILD)


def test_an_opener_that_does_not_wait_is_told_of_the_last_that_waits(conversation: Conversation) -> None:
    """It has a right to its connection, so the other is the intruder: the latest."""
    conversation.frontend(SELECT, CHILD)
    conversation.frontend(SELECT, OTHER)
    [verdict] = conversation.frontend(SELECT, PARENT)
    assert verdict.reason == "while the answer to another process was outstanding"
    assert (verdict.intruder, verdict.requesters) == (PARENT, (OTHER, CHILD))


def test_both_say_goodbye(conversation: Conversation) -> None:
    assert conversation.frontend("X") == []
    assert conversation.frontend("X", CHILD) == []


class TestTornMessages:
    def test_in_the_middle_of_a_body(self, conversation: Conversation) -> None:
        insert = query("INSERT INTO t VALUES ('" + "x" * 5000 + "')")
        assert conversation.frontend(insert[:2000]) == []
        [verdict] = conversation.frontend(SELECT, CHILD)
        assert verdict.kind is Kind.SHARED_BY_PROCESSES
        assert verdict.reason == "in the middle of another process's Query"
        assert verdict.libpq is None
        assert verdict.message is not None
        assert verdict.message.size == len(insert)

    def test_in_the_middle_of_a_header(self, conversation: Conversation) -> None:
        """Bytes that were held back are their sender's, though they are presented together with another's."""
        assert conversation.frontend(SELECT[:3]) == []
        [verdict] = conversation.frontend(SELECT, CHILD)
        assert verdict.kind is Kind.SHARED_BY_PROCESSES
        assert verdict.reason == "in the middle of another process's Query"
        assert (verdict.intruder, verdict.requesters) == (CHILD, (PARENT,))

    @pytest.mark.parametrize("torn_at", [1, 4, 5, 9])
    @pytest.mark.parametrize("piece", [1, 3, len(SELECT)])
    def test_tells_of_the_message_what_its_own_bytes_tell(
        self, conversation: Conversation, torn_at: int, piece: int
    ) -> None:
        """A length word that two processes have written says nothing, however the second one's bytes come."""
        assert conversation.frontend(SELECT[:torn_at]) == []
        verdict = conversation.frontend(SELECT[:piece], CHILD)[0]
        assert verdict.message is not None
        assert (verdict.message.name, verdict.message.size) == ("Query", len(SELECT) if torn_at >= 5 else torn_at)

    def test_by_a_few_bytes_that_are_no_message_yet(self, conversation: Conversation) -> None:
        assert conversation.frontend(SELECT[:2]) == []
        [verdict] = conversation.frontend(SELECT[:1], CHILD)
        assert verdict.reason == "in the middle of another process's Query"

    def test_after_a_few_bytes_that_are_no_message_yet(self, conversation: Conversation) -> None:
        """The child's first bytes are too few to say anything about; then the parent's come."""
        assert conversation.frontend(SELECT[:2], CHILD) == []
        [verdict] = conversation.frontend(SELECT, PARENT)
        assert verdict.reason == "in the middle of another process's Query"
        assert (verdict.intruder, verdict.requesters) == (PARENT, (CHILD,))

    def test_whose_message_was_torn_comes_first(self, conversation: Conversation) -> None:
        conversation.frontend(SELECT, PARENT)
        conversation.frontend(query("x" * 5000)[:2000], CHILD)
        [verdict] = conversation.frontend(SELECT, OTHER)
        assert verdict.reason == "in the middle of another process's Query"
        assert verdict.requesters == (CHILD, PARENT)


class TestUnknownSenders:
    def test_are_not_another_process(self, conversation: Conversation) -> None:
        """Where the kernel doesn't say who sent, nobody is accused."""
        for _ in range(2):
            assert conversation.frontend(SELECT, known=False) == []
            conversation.backend("TDCZ")
            assert conversation.frontend(SELECT, PARENT) == []
            conversation.backend("TDCZ")

    def test_are_recorded_as_unknown(self, conversation: Conversation) -> None:
        conversation.frontend(SELECT, known=False)
        assert conversation.tracker.requests_seen()[0].sender is None

    def test_wait_for_nobody_in_particular(self, conversation: Conversation) -> None:
        """Known bytes behind an unknown's unanswered request may be the same process's."""
        conversation.frontend(SELECT, known=False)
        inherited, busy = conversation.frontend(SELECT, CHILD)
        assert inherited.kind is Kind.INHERITED_CONNECTION, "the parent has connected, and waits for nothing"
        assert (busy.kind, busy.intruder) == (Kind.REQUEST_WHILE_BUSY, CHILD)

    def test_in_between_hide_no_change(self, conversation: Conversation) -> None:
        conversation.talk("> Q < TDCZ")
        conversation.frontend(SELECT, known=False)
        conversation.backend("TDCZ")
        assert kinds(conversation.frontend(SELECT, CHILD)) == [Kind.INHERITED_CONNECTION]

    def test_from_the_beginning(self) -> None:
        """The first one known is not an intruder; the second is."""
        conversation = Conversation(None)
        conversation.talk("> Q < TDCZ")
        assert conversation.frontend(SELECT, PARENT) == []
        conversation.backend("TDCZ")
        [verdict] = conversation.frontend(SELECT, CHILD)
        assert verdict.kind is Kind.INHERITED_CONNECTION
        assert verdict.requesters == (PARENT,)

    def test_overlap_of_unknowns_is_the_clients(self) -> None:
        conversation = Conversation(None)
        conversation.frontend(SELECT)
        [verdict] = conversation.frontend(SELECT)
        assert verdict.kind is Kind.REQUEST_WHILE_BUSY
        assert (verdict.intruder, verdict.requesters) == (None, ())


class TestThreads:
    """Drivers connect on one thread and query on another: differing threads alone prove nothing."""

    FIRST = Sender(4866, 1)
    SECOND = Sender(4866, 2)

    def test_that_take_turns(self) -> None:
        conversation = Conversation(self.FIRST)
        for thread in (self.SECOND, self.FIRST, self.SECOND):
            assert conversation.frontend(SELECT, thread) == []
            conversation.backend("TDCZ")

    def test_that_take_turns_are_told_by_the_last(self) -> None:
        """The thread to look at is the one that sent, not the one that connected."""
        conversation = Conversation(self.FIRST)
        conversation.frontend(SELECT, self.SECOND)
        conversation.backend("TDCZ")
        [verdict] = conversation.frontend(SELECT, CHILD._replace(pid=1))
        assert verdict.requesters == (self.SECOND,)

    def test_that_share_a_pipeline(self) -> None:
        """Npgsql multiplexes; each thread's messages are a request of their own."""
        conversation = Conversation(self.FIRST)
        assert conversation.frontend("PBES", self.FIRST) == []
        assert conversation.frontend("PBES", self.SECOND) == []
        assert conversation.frontend("PB", self.FIRST) == []
        assert conversation.frontend("ES", self.SECOND) == []
        requests = conversation.tracker.requests_seen()
        assert [(r.messages, r.sender) for r in requests] == [
            ("PBES", self.FIRST),
            ("PBES", self.SECOND),
            ("PB", self.FIRST),
            ("ES", self.SECOND),
        ]

    def test_that_overlap_with_simple_queries(self) -> None:
        """No pipelining; the rooms above see from the threads' ids that there were two."""
        conversation = Conversation(self.FIRST)
        conversation.frontend(SELECT, self.FIRST)
        [verdict] = conversation.frontend(SELECT, self.SECOND)
        assert verdict.kind is Kind.REQUEST_WHILE_BUSY
        assert verdict.intruder == self.SECOND
        assert self.FIRST in {request.sender for request in verdict.requests}

    def test_split_message_of_two_threads_is_no_torn_one(self) -> None:
        conversation = Conversation(self.FIRST)
        assert conversation.frontend(SELECT[:9], self.FIRST) == []
        assert conversation.frontend(SELECT[9:], self.SECOND) == []


def test_too_few_bytes_wait_for_the_rest(conversation: Conversation) -> None:
    """The verdict on a change of sender names the message, so it falls when that can be told, and only then."""
    conversation.talk("> Q < TDCZ")
    for byte in SELECT[:-1]:
        assert conversation.frontend(bytes([byte]), CHILD) == []
    assert conversation.held(Direction.FRONTEND) == len(SELECT) - 1
    assert kinds(conversation.frontend(SELECT[-1:], CHILD)) == [Kind.INHERITED_CONNECTION]
    assert conversation.backend("TDCZ") == []


@pytest.mark.parametrize("piece", [1200, 3000])
def test_what_libpq_will_print_is_told_by_as_much_as_is_always_there(conversation: Conversation, piece: int) -> None:
    """SELECT INTO returns no rows: seen or not, depending on how the text came in pieces."""
    conversation.frontend(SELECT)
    text = query("SELECT '" + "x" * 1500 + "' INTO t")
    [verdict] = conversation.frontend(text[:piece], CHILD)
    assert verdict.libpq == "message type 0x54 arrived from server while idle"


def test_change_of_sender_is_no_licence(conversation: Conversation) -> None:
    """Overruled or not, the message that the new sender came with is judged by itself."""
    conversation.talk("> Q < TDCZ")
    assert kinds(conversation.frontend("d", CHILD)) == [Kind.INHERITED_CONNECTION, Kind.PROTOCOL_VIOLATION]


@pytest.mark.parametrize("again", ["Q", "PBES"])
def test_own_overlap_of_an_intruder(conversation: Conversation, again: str) -> None:
    """That it shares the connection has been said; that it doesn't wait for its own answers has not."""
    conversation.frontend(SELECT)
    assert kinds(conversation.frontend(SELECT, CHILD)) == [Kind.SHARED_BY_PROCESSES]
    [verdict] = conversation.frontend(again, CHILD)
    assert verdict.kind is Kind.REQUEST_WHILE_BUSY
    assert verdict.reason.endswith("before the answer to request 2 (Q) was complete")


def test_extended_messages_of_two_processes_are_two_requests(conversation: Conversation) -> None:
    """A torn pipeline: the child's Bind lands between the parent's Parse and Bind."""
    conversation.frontend(parse("SELECT 1"))
    [verdict] = conversation.frontend(bind(), CHILD)
    assert verdict.kind is Kind.SHARED_BY_PROCESSES
    conversation.frontend("BES", PARENT)
    assert [r.messages for r in conversation.tracker.requests_seen()] == ["P", "B", "BES"]
    assert conversation.tracker.requests_seen()[1].sender == CHILD


def test_sender_object_need_not_be_the_same(conversation: Conversation) -> None:
    conversation.frontend(FRONTEND["P"], Sender(4866, 4866))
    conversation.frontend(FRONTEND["S"], Sender(4866, 4866))
    assert [r.messages for r in conversation.tracker.requests_seen()] == ["PS"]
