"""Terminate: whose it is to say, and what becomes of one that another process has said."""

from __future__ import annotations

import pytest

from pgguard.identity import Sender
from pgguard.session.senders import Senders
from pgguard.session.tracker import Tracker
from pgguard.session.verdicts import AFTER_END, Direction, Kind, RequestState
from tests.session.protocol import LOGIN, Conversation, error, kinds, message, query

PARENT = Sender(4866, 4866)
CHILD = Sender(4867, 4880)
OTHER = Sender(4868, 4868)

SELECT = query("SELECT pg_backend_pid()")
TERMINATE = message("X")
REASON = "Terminate came from a process other than the one that opened the connection"


@pytest.fixture
def conversation() -> Conversation:
    return Conversation(PARENT)


class Relay:
    """Feeds a tracker as the relay does, but leaves the ruling to the test."""

    def __init__(self, sender: Sender | None = PARENT) -> None:
        self.tracker = Tracker({"user": "app"}, sender)
        assert self.tracker.backend(LOGIN, 0, len(LOGIN)) == len(LOGIN)

    def send(self, data: bytes, sender: Sender | None) -> int:
        """Present a chunk; returns how much of it is in order."""
        return self.tracker.frontend(data, 0, len(data), sender, 1000.0)

    def swallows(self, data: bytes, sender: Sender | None) -> None:
        """Present a chunk whose only message is a foreign-terminate, and have it swallowed."""
        assert self.send(data, sender) == 0
        verdict = self.tracker.verdict
        assert verdict is not None
        assert verdict.kind is Kind.FOREIGN_TERMINATE
        self.tracker.swallow()
        assert self.send(data, sender) == len(data), "what is swallowed is no longer judged"
        assert self.tracker.frontend_rest == 0


class TestOfANamedSender:
    def test_that_never_used_the_connection_names_both(self, conversation: Conversation) -> None:
        """A destructor in a child: the very message that ends the session tells who ended it."""
        conversation.talk("> Q < TDCZ")
        [verdict] = conversation.frontend("X", CHILD)
        assert (verdict.kind, verdict.reason) == (Kind.FOREIGN_TERMINATE, REASON)
        assert (verdict.intruder, verdict.requesters) == (CHILD, (PARENT,))
        assert verdict.message is not None
        assert (verdict.message.name, verdict.message.size) == ("Terminate", 5)
        assert verdict.libpq == "server closed the connection unexpectedly"
        assert not verdict.open_request
        assert conversation.tracker.terminated
        assert conversation.tracker.over

    def test_leaves_bytes_after_the_end_to_the_owner(self, conversation: Conversation) -> None:
        conversation.frontend("X", CHILD)
        [verdict] = conversation.frontend(SELECT, PARENT)
        assert verdict.kind is Kind.SHARED_BY_PROCESSES
        assert verdict.message is not None
        assert (verdict.message.type, verdict.message.name) == ("Q", "Query")
        assert verdict.reason == AFTER_END
        assert (verdict.intruder, verdict.requesters) == (PARENT, (CHILD,))

    def test_while_an_answer_is_due_to_the_opener(self, conversation: Conversation) -> None:
        conversation.frontend(SELECT)
        [verdict] = conversation.frontend("X", CHILD)
        assert verdict.kind is Kind.FOREIGN_TERMINATE
        assert verdict.open_request
        assert [(request.sender, request.state) for request in verdict.requests] == [(PARENT, RequestState.WAITING)]

    def test_that_opened_the_connection_is_its_right(self, conversation: Conversation) -> None:
        assert conversation.talk("> Q < TDCZ > X") == []

    def test_of_another_thread_of_the_opener_is_its_right(self, conversation: Conversation) -> None:
        """A pool closes its connections on whichever thread it is told to."""
        conversation.talk("> Q < TDCZ")
        assert conversation.frontend("X", PARENT._replace(tid=9)) == []

    def test_that_was_the_last_to_use_the_connection_has_not_opened_it(self, conversation: Conversation) -> None:
        """Whether the opener has it open still, and so loses it, is for the rooms above to find out."""
        conversation.talk("> Q < TDCZ")
        assert kinds(conversation.frontend(SELECT, CHILD)) == [Kind.INHERITED_CONNECTION]
        conversation.backend("TDCZ")
        [verdict] = conversation.frontend("X", CHILD)
        assert (verdict.kind, verdict.intruder, verdict.requesters) == (Kind.FOREIGN_TERMINATE, CHILD, (PARENT,))

    def test_that_has_taken_turns_is_not(self, conversation: Conversation) -> None:
        conversation.talk("> Q < TDCZ")
        for sender in (CHILD, PARENT, CHILD):
            conversation.frontend(SELECT, sender)
            conversation.backend("TDCZ")
        [verdict] = conversation.frontend("X", CHILD)
        assert (verdict.kind, verdict.intruder) == (Kind.FOREIGN_TERMINATE, CHILD)

    def test_of_the_opener_is_its_right_whoever_has_used_the_connection(self, conversation: Conversation) -> None:
        """It does harm only if somebody goes on to use it."""
        conversation.talk("> Q < TDCZ")
        conversation.frontend(SELECT, CHILD)
        conversation.backend("TDCZ")
        assert conversation.frontend("X", PARENT) == []
        assert conversation.tracker.terminated

    def test_of_the_opener_while_an_answer_is_due_to_another_is_a_use_out_of_turn(
        self, conversation: Conversation
    ) -> None:
        conversation.talk("> Q < TDCZ")
        conversation.frontend(SELECT, CHILD)
        [verdict] = conversation.frontend("X", PARENT)
        assert (verdict.kind, verdict.requesters) == (Kind.SHARED_BY_PROCESSES, (CHILD,))
        assert conversation.tracker.terminated

    def test_of_a_third_process_after_a_hand_over(self, conversation: Conversation) -> None:
        conversation.talk("> Q < TDCZ")
        conversation.frontend(SELECT, CHILD)
        conversation.backend("TDCZ")
        [verdict] = conversation.frontend("X", OTHER)
        assert (verdict.kind, verdict.requesters) == (Kind.FOREIGN_TERMINATE, (CHILD, PARENT))

    def test_where_the_opener_is_not_known_is_nobodys_fault(self) -> None:
        """Who has merely been the first to be named need not have opened it."""
        conversation = Conversation(None)
        conversation.frontend(SELECT, CHILD)
        conversation.backend("TDCZ")
        assert Kind.FOREIGN_TERMINATE not in kinds(conversation.frontend("X", OTHER))

    @pytest.mark.parametrize("cut", [1, 2, 3, 4])
    def test_torn_over_two_chunks_is_one_fault(self, conversation: Conversation, cut: int) -> None:
        assert conversation.frontend(TERMINATE[:cut], CHILD) == []
        assert conversation.held(Direction.FRONTEND) == cut
        [verdict] = conversation.frontend(TERMINATE[cut:], CHILD)
        assert (verdict.kind, verdict.intruder) == (Kind.FOREIGN_TERMINATE, CHILD)
        assert conversation.tracker.terminated

    def test_behind_a_first_query_in_the_same_chunk(self, conversation: Conversation) -> None:
        found = conversation.frontend("QX", CHILD)
        assert kinds(found) == [Kind.INHERITED_CONNECTION, Kind.FOREIGN_TERMINATE]
        assert conversation.tracker.terminated

    def test_behind_a_query_out_of_turn_in_the_same_chunk(self, conversation: Conversation) -> None:
        conversation.frontend(SELECT)
        found = conversation.frontend("QX", CHILD)
        assert kinds(found) == [Kind.SHARED_BY_PROCESSES, Kind.FOREIGN_TERMINATE]
        assert found[1].message is not None
        assert found[1].start == found[0].start + len(message("Q", b"SELECT 1\0"))

    def test_in_the_middle_of_a_message_of_the_openers(self, conversation: Conversation) -> None:
        """It is no Terminate then, whatever its bytes say."""
        conversation.frontend(query("x" * 5000)[:2000])
        [verdict] = conversation.frontend("X", CHILD)
        assert (verdict.kind, verdict.reason) == (Kind.SHARED_BY_PROCESSES, "in the middle of another process's Query")

    def test_behind_the_openers_own_does_no_harm(self, conversation: Conversation) -> None:
        """As pg_basebackup and its child both run the same exit handler."""
        assert conversation.frontend("X") == []
        assert conversation.frontend("X", CHILD) == []

    @pytest.mark.parametrize("cut", [1, 2, 3, 4])
    @pytest.mark.parametrize("terminate", [TERMINATE, message("X", b"bye")])
    def test_behind_the_openers_own_does_no_harm_in_two_pieces_either(
        self, conversation: Conversation, terminate: bytes, cut: int
    ) -> None:
        """It was an inherited-connection when it arrived split, and nothing when whole."""
        assert conversation.frontend(terminate) == []
        assert conversation.frontend(terminate[:cut], CHILD) == []
        assert conversation.frontend(terminate[cut:] + terminate, CHILD) == []
        [verdict] = conversation.frontend(SELECT, CHILD)
        assert (verdict.reason, verdict.message and verdict.message.size) == (AFTER_END, len(SELECT))

    @pytest.mark.parametrize("left", [b"", SELECT[:3], SELECT[:7], TERMINATE[:4]])
    def test_what_the_opener_leaves_unfinished_behind_its_own_is_no_part_of_anothers(
        self, conversation: Conversation, left: bytes
    ) -> None:
        assert conversation.frontend(TERMINATE + left) == []
        [verdict] = conversation.frontend(SELECT, CHILD)
        assert verdict.message is not None
        assert (verdict.message.name, verdict.message.size) == ("Query", len(SELECT))

    def test_behind_the_servers_goodbye_does_no_harm(self, conversation: Conversation) -> None:
        conversation.backend(error("FATAL", "57P01"))
        assert conversation.frontend("X", CHILD) == []
        assert conversation.frontend("X", PARENT) == []


class TestBehindTheEnd:
    """Who uses a connection on which somebody else has said Terminate, or that the server has ended?"""

    @pytest.fixture
    def ended(self, conversation: Conversation) -> Conversation:
        """The opener has said Terminate."""
        assert conversation.talk("> Q < TDCZ > X") == []
        return conversation

    def test_another_process_names_both(self, ended: Conversation) -> None:
        [verdict] = ended.frontend(SELECT, CHILD)
        assert (verdict.kind, verdict.reason) == (Kind.SHARED_BY_PROCESSES, AFTER_END)
        assert (verdict.intruder, verdict.requesters) == (CHILD, (PARENT,))
        assert verdict.message is not None
        assert (verdict.message.name, verdict.message.size) == ("Query", len(SELECT))
        assert verdict.libpq == "server closed the connection unexpectedly"
        assert verdict.ends

    def test_another_process_is_judged_once(self, ended: Conversation) -> None:
        assert len(ended.frontend(SELECT, CHILD)) == 1
        assert ended.frontend(SELECT + SELECT, CHILD._replace(tid=9)) == []
        assert len(ended.frontend(SELECT, OTHER)) == 1

    def test_another_process_that_had_used_it_before(self, conversation: Conversation) -> None:
        """The last to send, but for the end."""
        conversation.talk("> Q < TDCZ")
        conversation.frontend(SELECT, CHILD)
        conversation.backend("TDCZ")
        assert conversation.frontend("X", PARENT) == []
        [verdict] = conversation.frontend(SELECT, CHILD)
        assert (verdict.kind, verdict.intruder, verdict.requesters) == (Kind.SHARED_BY_PROCESSES, CHILD, (PARENT,))

    @pytest.mark.parametrize("cuts", [(), (1,), (2, 4), (1, 2, 3, 4), (5,)])
    @pytest.mark.parametrize("behind", ["", "S", "QS"])
    def test_in_whatever_pieces_it_comes(self, ended: Conversation, cuts: tuple[int, ...], behind: str) -> None:
        """It says Terminate as well, which is no use; what comes behind is one."""
        data = TERMINATE + b"".join(message(code, b"\0" if code == "Q" else b"") for code in behind)
        found = []
        for start, stop in zip((0, *cuts), (*cuts, len(data)), strict=True):
            found += ended.frontend(data[start:stop], CHILD)
        assert [(one.kind, one.message and one.message.type) for one in found] == [
            (Kind.SHARED_BY_PROCESSES, code) for code in behind[:1]
        ]

    def test_the_same_process_says_what_it_likes(self, ended: Conversation) -> None:
        assert ended.frontend(SELECT + TERMINATE, PARENT) == []
        assert ended.frontend(SELECT, PARENT._replace(tid=9)) == []

    def test_of_an_unnamed_sender_is_asked_about(self) -> None:
        relay = TestOfAnUnnamedSender().relay()
        assert relay.send(TERMINATE, None) == 0
        relay.tracker.overrule()
        assert relay.send(TERMINATE, None) == len(TERMINATE)
        assert relay.send(TERMINATE, None) == len(TERMINATE)
        assert relay.send(SELECT, None) == 0
        verdict = relay.tracker.verdict
        assert verdict is not None
        assert (verdict.kind, verdict.reason, verdict.intruder) == (Kind.SHARED_BY_PROCESSES, AFTER_END, None)
        relay.tracker.overrule()
        assert relay.send(SELECT, None) == len(SELECT), "once"

    def test_of_an_unnamed_sender_is_not_asked_about_where_that_would_tell_nothing(self) -> None:
        relay = TestOfAnUnnamedSender().relay(asks=False)
        assert relay.send(TERMINATE, None) == len(TERMINATE)
        assert relay.send(SELECT, None) == len(SELECT)

    @pytest.mark.parametrize("goodbye", [True, False])
    def test_of_the_servers_is_judged_as_ever(self, conversation: Conversation, goodbye: bool) -> None:
        """Its end is nobody's fault, and whoever sends next finds out. Another process hasn't to."""
        conversation.talk("> Q < TDCZ")
        if goodbye:
            conversation.backend(error("FATAL", "57P01"))
        assert conversation.tracker.backend_eof(0) == []
        assert conversation.frontend(SELECT, PARENT) == []
        [verdict] = conversation.frontend(SELECT, CHILD)
        assert (verdict.kind, verdict.intruder, verdict.ends) == (Kind.INHERITED_CONNECTION, CHILD, True)
        [verdict] = conversation.frontend(SELECT, PARENT)
        assert (verdict.kind, verdict.requesters, verdict.ends) == (Kind.SHARED_BY_PROCESSES, (CHILD,), True)

    def test_of_the_servers_says_nothing_of_who_is_not_known(self) -> None:
        relay = TestOfAnUnnamedSender().relay()
        relay.tracker.backend_eof(0)
        assert relay.send(SELECT, None) == len(SELECT)


class TestOfAnUnnamedSender:
    """Over TCP the kernel names nobody: whether it was the opener is for the rooms above to find out."""

    def relay(self, *, asks: bool = True) -> Relay:
        relay = Relay(None)
        relay.tracker.introduce(Sender(4866, sampled=True), asks_goodbye=asks)
        return relay

    def test_is_asked_about(self) -> None:
        relay = self.relay()
        assert relay.send(TERMINATE, None) == 0
        verdict = relay.tracker.verdict
        assert verdict is not None
        assert (verdict.kind, verdict.intruder) == (Kind.FOREIGN_TERMINATE, None)
        assert verdict.requesters == (Sender(4866, sampled=True),)

    def test_is_not_asked_about_where_that_would_tell_nothing(self) -> None:
        relay = self.relay(asks=False)
        assert relay.send(TERMINATE, None) == len(TERMINATE)
        assert relay.tracker.terminated

    def test_is_asked_about_once(self) -> None:
        relay = self.relay()
        assert relay.send(TERMINATE, None) == 0
        relay.tracker.overrule()
        assert relay.send(TERMINATE, None) == len(TERMINATE)
        assert relay.tracker.verdict is None
        assert relay.tracker.terminated

    def test_is_asked_about_behind_other_messages(self) -> None:
        relay = self.relay()
        assert relay.send(SELECT + TERMINATE, None) == len(SELECT)
        assert relay.tracker.verdict is not None
        assert relay.tracker.verdict.open_request

    def test_is_not_asked_about_when_it_was_seen_to_be_the_openers(self) -> None:
        relay = self.relay()
        assert relay.send(SELECT + TERMINATE, Sender(4866, 4866, sampled=True)) == len(SELECT + TERMINATE)

    @pytest.mark.parametrize("cut", [1, 4])
    def test_torn_over_two_chunks_is_asked_about_when_it_is_whole(self, cut: int) -> None:
        relay = self.relay()
        assert relay.send(TERMINATE[:cut], None) == 0
        assert relay.tracker.verdict is None
        assert relay.send(TERMINATE, None) == 0
        assert relay.tracker.verdict is not None

    def test_behind_the_end_is_not_asked_about(self) -> None:
        relay = self.relay()
        goodbye = error("FATAL", "57P01")
        assert relay.tracker.backend(goodbye, 0, len(goodbye)) == len(goodbye)
        assert relay.send(TERMINATE, None) == len(TERMINATE)
        assert relay.tracker.verdict is None


class TestSwallowed:
    """The configuration says ``drop``: the session of its owner lives on."""

    def test_never_happened(self) -> None:
        relay = Relay()
        relay.swallows(TERMINATE, CHILD)
        assert not relay.tracker.terminated
        assert not relay.tracker.over
        assert relay.tracker.idle

    @pytest.mark.parametrize("times", [1, 2])
    def test_leaves_the_owner_as_if_nothing_had_been(self, times: int) -> None:
        """Each of several children says goodbye at its exit, and the parent has not been interrupted by any of them."""
        relay = Relay()
        assert relay.send(SELECT, PARENT) == len(SELECT)
        for child in range(times):
            relay.swallows(TERMINATE, Sender(5000 + child))
        answer = b"".join(message(*one) for one in (("C", b"SELECT 1\0"), ("Z", b"I")))
        assert relay.tracker.backend(answer, 0, len(answer)) == len(answer)
        assert relay.send(SELECT + TERMINATE, PARENT) == len(SELECT + TERMINATE)
        assert relay.tracker.verdict is None
        assert relay.tracker.terminated
        assert [request.sender for request in relay.tracker.requests_seen()] == [PARENT, PARENT]

    def test_of_an_unnamed_sender_leaves_no_trace_either(self) -> None:
        relay = Relay(None)
        relay.tracker.introduce(Sender(4866, sampled=True), asks_goodbye=True)
        relay.swallows(TERMINATE, None)
        assert relay.send(SELECT, None) == len(SELECT)
        assert relay.tracker.verdict is None

    def test_then_the_child_asks_and_is_judged_as_an_heir(self) -> None:
        """Its goodbye was no use of the connection, and its next message is: it must not go unseen."""
        relay = Relay()
        relay.swallows(TERMINATE, CHILD)
        assert relay.send(SELECT, CHILD) == 0
        assert relay.tracker.verdict is not None
        assert relay.tracker.verdict.kind is Kind.INHERITED_CONNECTION

    @pytest.mark.parametrize(
        ("behind", "kind"), [(TERMINATE, Kind.FOREIGN_TERMINATE), (SELECT, Kind.INHERITED_CONNECTION)]
    )
    def test_what_stands_behind_it_in_the_chunk_is_its_senders_too(self, behind: bytes, kind: Kind) -> None:
        """It was taken for the owner's: a second goodbye went through, and ended the session."""
        relay = Relay()
        assert relay.send(TERMINATE + behind, CHILD) == 0
        relay.tracker.swallow()
        assert relay.send(TERMINATE + behind, CHILD) == len(TERMINATE)
        assert relay.send(behind, CHILD) == 0
        verdict = relay.tracker.verdict
        assert verdict is not None
        assert (verdict.kind, verdict.intruder, verdict.requesters) == (kind, CHILD, (PARENT,))
        assert not relay.tracker.terminated

    def test_that_is_long_and_comes_in_pieces_is_swallowed_whole(self) -> None:
        relay = Relay()
        long = message("X", bytes(100))
        assert relay.send(long[:20], CHILD) == 0
        relay.tracker.swallow()
        for piece in (long[:20], long[20:50], long[50:]):
            assert relay.send(piece, CHILD) == len(piece)
            assert relay.tracker.verdict is None
        assert relay.send(SELECT, PARENT) == len(SELECT)
        assert relay.tracker.verdict is None
        assert [request.sender for request in relay.tracker.requests_seen()] == [PARENT]

    def test_behind_a_query_in_the_same_chunk_takes_nothing_else_along(self) -> None:
        """Only the five bytes of Terminate are kept from the server."""
        relay = Relay()
        answer = message("C", b"SELECT 1\0") + message("Z", b"I")
        for sender in (PARENT, CHILD, PARENT):
            if relay.send(SELECT, sender) == 0:
                relay.tracker.overrule()
                assert relay.send(SELECT, sender) == len(SELECT)
            assert relay.tracker.backend(answer, 0, len(answer)) == len(answer)
        assert relay.send(SELECT + TERMINATE, CHILD) == 0
        relay.tracker.overrule()
        assert relay.send(SELECT + TERMINATE, CHILD) == len(SELECT)
        relay.swallows(TERMINATE, CHILD)
        assert relay.tracker.backend(answer, 0, len(answer)) == len(answer)
        assert not relay.tracker.over


class TestSenders:
    def test_the_first_that_is_named_is_the_opener_if_the_startup_message_was_named(self) -> None:
        senders = Senders(PARENT)
        assert senders.opener == PARENT
        senders.introduce(OTHER)
        assert senders.opener == PARENT, "the kernel's word stands"
        assert senders.others(None) == (PARENT,)

    def test_introduced_opener_has_used_the_connection_first(self) -> None:
        senders = Senders(None)
        senders.introduce(PARENT)
        assert (senders.opener, senders.latest) == (PARENT, PARENT)
        change = senders.change(CHILD, waiting=None, torn=None, first=None)
        assert (change.kind, change.requesters) == (Kind.INHERITED_CONNECTION, (PARENT,))

    def test_introduced_late_comes_before_who_was_seen_to_send(self) -> None:
        senders = Senders(None)
        assert not senders.changes(CHILD)
        senders.introduce(PARENT)
        assert senders.latest == CHILD
        assert senders.others(None) == (CHILD, PARENT), "the latest first"

    @pytest.mark.parametrize("sender", [PARENT, CHILD, OTHER])
    def test_nobody_is_strange_where_the_opener_is_not_known(self, sender: Sender) -> None:
        senders = Senders(None)
        assert not senders.is_strange(sender)
        senders.changes(PARENT)
        assert not senders.is_strange(sender)

    @pytest.mark.parametrize(("turns", "strange"), [
        ([], {CHILD, OTHER}),
        ([CHILD], {CHILD, OTHER}),
        ([CHILD, PARENT], {CHILD, OTHER}),
        ([CHILD, PARENT, CHILD], {CHILD, OTHER}),
        ([CHILD, OTHER], {CHILD, OTHER}),
    ])  # fmt: skip
    def test_who_is_strange(self, turns: list[Sender], strange: set[Sender]) -> None:
        """The opener never is, whatever has been; and every other process is."""
        senders = Senders(PARENT)
        for sender in turns:
            assert senders.changes(sender)
            senders.change(sender, waiting=None, torn=None, first=None)
        assert {sender for sender in (PARENT, CHILD, OTHER) if senders.is_strange(sender)} == strange

    def test_a_thread_that_was_sampled_and_one_that_the_kernel_named_are_the_same_process(self) -> None:
        """How a sender is known makes no difference to whether it is another one."""
        conversation = Conversation(None)
        conversation.tracker.senders.introduce(Sender(4866, sampled=True))
        assert conversation.frontend(SELECT, Sender(4866, 4866, sampled=True)) == []
        conversation.backend("TDCZ")
        assert conversation.frontend(SELECT, Sender(4866, 4866)) == []
        conversation.backend("TDCZ")
        [verdict] = conversation.frontend(SELECT, Sender(4867, 4867, sampled=True))
        assert verdict.intruder is not None
        assert verdict.intruder.sampled
        assert verdict.requesters == (Sender(4866, 4866),)


class TestReaders:
    """Several threads are seen to wait for one answer: a verdict that no message brings about."""

    FIRST = Sender(4866, 1, sampled=True)
    SECOND = Sender(4866, 2, sampled=True)

    def test_verdict_has_the_outstanding_request_and_what_libpq_will_print(self, conversation: Conversation) -> None:
        conversation.frontend(SELECT)
        verdict = conversation.tracker.judge_readers(
            Kind.SHARED_BY_THREADS, "wait", intruder=self.SECOND, requesters=(self.FIRST,)
        )
        assert (verdict.kind, verdict.reason, verdict.message) == (Kind.SHARED_BY_THREADS, "wait", None)
        assert (verdict.intruder, verdict.requesters) == (self.SECOND, (self.FIRST,))
        assert verdict.libpq == "message type 0x54 arrived from server while idle"
        assert verdict.open_request
        assert [request.n for request in verdict.requests] == [1]
        assert conversation.tracker.verdict is None, "the stream is in order"

    def test_requesters_are_those_that_were_seen_and_nobody_else(self, conversation: Conversation) -> None:
        verdict = conversation.tracker.judge_readers(
            Kind.SHARED_BY_PROCESSES, "wait", intruder=None, requesters=(self.FIRST, CHILD)
        )
        assert verdict.requesters == (self.FIRST, CHILD)
        assert (verdict.libpq, verdict.open_request) == (None, False)

    def test_extended_request_begins_with_another_answer(self, conversation: Conversation) -> None:
        conversation.frontend("PBES")
        verdict = conversation.tracker.judge_readers(Kind.SHARED_BY_THREADS, "wait", intruder=None, requesters=())
        assert verdict.libpq == "message type 0x31 arrived from server while idle"
