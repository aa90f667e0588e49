"""What is legitimate although it looks odd: none of these conversations may be found fault with."""

from __future__ import annotations

import re
import struct

import pytest

from pgguard.session.tracker import Tracker
from pgguard.session.verdicts import Direction, Kind, RequestState
from pgguard.wire.messages import LOOK_LIMIT
from tests.session.protocol import BACKEND, LOGIN, MODEL, Conversation, error, kinds, message, query

FAULTLESS = {
    "a double Sync is answered twice": "> SS < ZZ",
    "several results": "> Q < TDDC C I TC Z",
    "the rows of a rule": "> Q < TDTDDC Z",
    "a COPY among several results": "> Q < TDC G > ddc < C H dd c C C Z",
    "two COPY FROM in one Query": "> Q < G > dc < C G > dc < C Z",
    "two COPY FROM in one Query, all data ahead": "> Q dc dc < G C G C Z",
    "an error behind results": "> Q < TDC E Z",
    "an error between rows": "> Q < TD E Z > Q < CZ",
    "a second error while the first is dealt with": "> Q < EEZ > PBES < EEZ",
    "an error in every part of an extended query": "> PBDES < EZ > PBDES < 1EZ > PBDES < 12EZ > PBDES < 12TDEZ",
    "a deferred constraint that fails at Sync": "> PBES < 12C EZ > Q < CZ",
    "a pipeline of which the middle fails": "> PBES PBES PBES < 12CZ 1E Z 12CZ",
    "a pipeline with one Sync that fails early": "> PBEPBEPBES < 12C 1E Z > Q < CZ",
    "what is on its way after an error is discarded": "> PBE < E > PBDEC S < Z > Q < CZ",
    "a Query on its way after an error is discarded too": "> PBE < E > Q S < Z > Q < CZ",
    "and a FunctionCall": "> PBE < E > F S < Z > F < VZ",
    "a Query ends an extended query without Sync": "> PBE < 12C > Q < CZ",
    "a Query behind a Parse that asked for no answer": "> P Q < 1 TDCZ > Q < CZ",
    "a FunctionCall behind an extended query that asked for none": "> PBDE F < 12TDC VZ > Q < CZ",
    "a Query behind messages that asked for none, behind others that did": "> PBES < 12CZ > PH < 1 > B Q < 2 CZ",
    "a Query behind an Execute that asked for none, behind a Bind that did": "> PS < 1Z > BHE < 2 > Q < C CZ > Q < CZ",
    "many Executes behind a Bind": "> PS < 1Z > BDEEEEEEEEEES < 2TCCCCCCCCCCZ > Q < CZ",
    "a pipeline behind a Parse that asked for no answer": "> P PBES < 1 12CZ > Q < CZ",
    "a Parse that asked for no answer fails, and the Query behind it is discarded": "> P Q < E > S < Z > Q < CZ",
    "the same, with the error in front of the Query": "> P < E > Q > S < Z > Q < CZ",
    "an Execute that asked for no answer fails, and two Queries are discarded": "> PBE Q < 12E > Q > S < Z > Q < CZ",
    "a COPY that asked for no answer": "> PBE dc Q < 12GC CZ > Q < CZ",
    "Flush brings answers before any Sync": "> P*H < 1tT > BEH < 2DC > S < Z",
    "Flush and nothing else": "> H > H > S < Z",
    "a timeout reported when a Flush is read": "> PH < 1 > H < E > S < Z",
    "a timeout reported when the Sync is read": "> PH < 1 > S < EZ",
    "a timeout reported when a Query is read": "> PH < 1 > Q < EZ",
    "a portal in portions": "> PBE H < 12DDs > E H < DDs > E S < D C Z",
    "an empty statement": "> PBES < 12IZ > Q < IZ",
    "Describe of both kinds, with rows and without": "> PBD*S < 12 n tn Z > P*BDES < 1tT 2T DC Z",
    "COPY TO in both protocols": "> Q < HdddcCZ > PBES < 12HdddcCZ",
    "an error in the middle of COPY TO": "> Q < HddEZ > PBES < 12HdEZ > Q < CZ",
    "COPY FROM as libpq sends it": "> PBDES < 12nG > ddd c S < CZ > Q < CZ",
    "COPY FROM as libpq sends it, and nothing behind": "> PBDES < 12nG > ddd c S < CZ",
    "a COPY that the server gives up": "> Q < G > dd < E > ddc < Z > Q < CZ",
    "and its data only come when all is over": "> Q < G > d < EZ > dddc > Q < CZ",
    "and the data's end": "> Q < G > d < EZ > f > Q < CZ",
    "a COPY that the client gives up": "> Q < G > df < EZ > PBDES < 12nG > dfS < EZ > Q < CZ",
    "a COPY refused while its data are on their way": "> Q dddc < EZ > Q < CZ",
    "the same in the extended protocol": "> PBES dddc S < 12E Z Z > Q < CZ",
    "or after its refusal": "> PBES < 12EZ > dddcS < Z > Q < CZ",
    "a CopyFail behind one's own CopyDone": "> Q < G > dc < CZ > PBDES f < 12nCZ > f > Q < CZ",
    "data before CopyInResponse": "> PBE ddd cS < 12 G C Z > Q < CZ",
    "Sync and Flush in a simple COPY": "> Q < G > dHSdSc < CZ > Q < CZ",
    "Sync and Flush in an extended COPY": "> PBEH < 12G > dHSdSHc S < CZ > Q < CZ",
    "COPY fails after the Sync in front was discarded": "> PBES < 12G > d < E > dcS < Z > Q < CZ",
    "COPY fails before the Sync in front was read": "> PBES < 12G E Z > dcS < Z > Q < CZ",
    "the same, all ahead": "> PBES ddc S < 12GE Z Z > Q < CZ > PBES < 12CZ",
    "a pipeline behind a COPY that succeeds": "> PBE ddc PBES < 12GC 12CZ > Q < CZ",
    "a pipeline behind a COPY that fails, discarded": "> PBE ddc PBES < 12GE Z > Q < TDCZ",
    "a pipeline behind a COPY that fails, executed": "> PBE ddc S PBES < 12GE Z 12CZ > Q < CZ",
    "a pipeline behind a COPY that fails, failing": "> PBE ddc S PBES < 12GE Z 1E Z > Q < CZ",
    "a pipeline behind a COPY that fails with an early Sync discarded": "> PBES ddc S PBES < 12GE Z 12CZ > Q < CZ",
    "a pipeline behind a COPY that fails with an early Sync answered": "> PBES ddc S PBES < 12GE ZZ 12CZ > Q < CZ",
    "several early Syncs in a COPY that fails": "> PBESS dSc S PBES < 12GE ZZ 1EZ > Q < CZ",
    "two copies in a pipeline": "> PBE dcS PBE dcS < 12GCZ 12GCZ > Q < CZ",
    "an early Sync in each of two copies in a pipeline": "> PBES dcS PBES dcS < 12GCZ 12GCZ > Q < CZ",
    "replication": "> Q < Wdddd > d < dd > d < d > dc < ddc CCZ > Q < TDCZ",
    "replication that the server ends": "> Q < Wddc > ddc < CCZ",
    "replication that goes on with the next timeline": "> Q < Wddc > c < TDCCZ",
    "replication with nothing to stream": "> Q < TDCCZ",
    "replication that fails": "> Q < WddE > ddc < Z > Q < CZ",
    "replication after whose end status still comes": "> Q < Wddc > ddc < CCZ > Q < CZ",
    "a transaction still being decoded when replication ends": "> Q < Wd > c < c dd C C Z",
    "Terminate during replication": "> Q < Wdd > dX < dd",
    "a server that shuts down during replication": "> Q < Wdd > d < C",
    "BASE_BACKUP": "> Q < TDC TDDC Hdddc TDC C Z",
    "BASE_BACKUP before PostgreSQL 15": "> Q < TDC TDDC Hddc Hddc TDC C Z",
    "UPLOAD_MANIFEST": "> Q < G > ddc < C Z",
    "asynchronous messages": "< NSA > Q < NTSDANDNCAZ < SNA > PBDES < N1A2STNDSCNZ > Q < GN > d < S > c < ACNZ",
    "Terminate while the server is still sending": "> QX < TDDCZ",
    "Terminate with a pipeline unanswered": "> PBESX < 12CZ",
    "Terminate at once": "> X",
}


@pytest.mark.parametrize("script", FAULTLESS.values(), ids=FAULTLESS)
def test_faultless(script: str) -> None:
    conversation = Conversation()
    assert conversation.talk(script) == []
    assert conversation.tracker.terminated or conversation.tracker.idle or script.endswith("C")


LASTING = {name: script for name, script in FAULTLESS.items() if "X" not in script and "shuts down" not in name}


@pytest.mark.parametrize("script", LASTING.values(), ids=LASTING)
def test_faultless_conversations_keep_count(script: str) -> None:
    """An answer too many is seen behind each of them: nothing lingers that would pay for it."""
    conversation = Conversation()
    conversation.talk(script)
    assert kinds(conversation.backend("C")) == [Kind.MESSAGE_WHILE_IDLE]


COMPLETED = {
    name: script for name, script in LASTING.items() if not any("E" in part for part in re.findall("<([^>]*)", script))
}


@pytest.mark.parametrize("script", COMPLETED.values(), ids=COMPLETED)
def test_conversations_without_an_error_leave_no_doubt(script: str) -> None:
    """A Sync that was discarded in a COPY which was completed does not wait for a ReadyForQuery any more."""
    conversation = Conversation()
    conversation.talk(script)
    assert kinds(conversation.backend("Z")) == [Kind.MESSAGE_WHILE_IDLE]


def test_what_cannot_be_told_apart_is_given_up() -> None:
    """A COPY fails, there was a Sync in front of its data and none behind: was the rest discarded or executed?"""
    conversation = Conversation()
    assert conversation.talk("> PBES dc PBES < 12GE Z") == []
    assert conversation.tracker.lost is not None


@pytest.mark.parametrize("request_", ["> Q < CZ", "> F < VZ", "> PBES < 12CZ"])
def test_copy_data_do_not_come_behind_the_next_request(request_: str) -> None:
    """What was in flight when a COPY failed stands in front of whatever the client does next."""
    conversation = Conversation()
    assert conversation.talk("> Q < G > d < EZ > d" + request_) == []
    assert kinds(conversation.frontend("d")) == [Kind.PROTOCOL_VIOLATION]


def test_doubt_does_not_outlive_its_sync() -> None:
    """A server that answered what it had to skip is faulty; what it does in a later COPY is not judged by that."""
    conversation = Conversation()
    assert kinds(conversation.talk("> PBES < 12GE D")) == [Kind.MESSAGE_WHILE_IDLE]
    assert conversation.talk("> Q < G > dSc < EZ > PBES < Z 12CZ") == []
    assert conversation.tracker.lost is None


class TestLogin:
    def test_messages_sent_before_it_is_complete(self) -> None:
        """With trust authentication a client need not wait, and some don't."""
        conversation = Conversation(login=False)
        assert conversation.talk("> Q < RSKZ TDCZ > X") == []

    def test_with_password_and_a_lower_protocol_version(self) -> None:
        conversation = Conversation(login=False)
        assert conversation.talk("< vR > p < R > p < RR SSSSKZ > Q < CZ") == []

    def test_refused(self) -> None:
        conversation = Conversation(login=False)
        assert conversation.talk("< R > p < E") == []
        assert conversation.tracker.goodbye
        assert not conversation.tracker.logged_in

    def test_refused_in_another_language(self) -> None:
        """Servers before 9.6 send the localized severity alone; during the login every error ends the session."""
        conversation = Conversation(login=False)
        assert conversation.backend(message("E", b"SFATAAL\0C28P01\0Mnee\0\0")) == []
        assert conversation.tracker.goodbye

    @pytest.mark.parametrize("size", [4, 32, 256])
    def test_cancel_keys_of_every_length(self, size: int) -> None:
        """Protocol 3.2 has keys of up to 256 bytes."""
        secret = bytes(range(256))[:size]
        conversation = Conversation(login=False)
        assert conversation.backend("R") == []
        assert conversation.backend(message("K", struct.pack("!I", 4865) + secret) + BACKEND["Z"]) == []
        key = conversation.tracker.cancel_key
        assert key is not None
        assert (key.backend_pid, key.secret) == (4865, secret)

    def test_key_that_comes_byte_by_byte_is_whole(self) -> None:
        conversation = Conversation(login=False)
        for byte in BACKEND["R"] + message("K", struct.pack("!I", 1) + b"k" * 256):
            assert conversation.backend(bytes([byte])) == []
        assert conversation.tracker.cancel_key is not None
        assert conversation.tracker.cancel_key.secret == b"k" * 256

    def test_application_name_as_the_server_reports_it(self) -> None:
        tracker = Tracker({"user": "app", "application_name": "asked for"})
        assert tracker.application_name == "asked for"
        for value, told in (b"granted", "granted"), (b"caf\xe9", "caf\N{REPLACEMENT CHARACTER}"), (b"", None):
            others = message("S", b"TimeZone\0UTC\0") + message("S", b"application_names\0no\0")
            data = BACKEND["R"] + message("S", b"application_name\0" + value + b"\0") + others + BACKEND["Z"]
            tracker = Tracker({"user": "app", "application_name": "asked for"})
            assert tracker.backend(data, 0, len(data)) == len(data)
            assert tracker.application_name == told
        assert tracker.database == tracker.user == "app", "the database is called like the user if none is named"


class TestGoodbye:
    @pytest.mark.parametrize("sqlstate", ["57P01", "57P05", "25P03"])
    def test_while_idle(self, sqlstate: str) -> None:
        conversation = Conversation()
        assert conversation.backend(error("FATAL", sqlstate)) == []
        assert conversation.frontend("Q") == [], "the client has not read it yet"

    def test_error_that_does_not_end_the_session_is_none(self) -> None:
        assert kinds(Conversation().backend("E")) == [Kind.MESSAGE_WHILE_IDLE]

    def test_error_then_fatal(self) -> None:
        """How PostgreSQL answers a Query in copy-in mode: it can't tell where the next message begins."""
        conversation = Conversation()
        conversation.talk("> Q < G")
        assert kinds(conversation.frontend("Q")) == [Kind.PROTOCOL_VIOLATION]
        assert conversation.backend(error() + error("FATAL", "08P01")) == []
        assert conversation.tracker.goodbye


class TestNeverAskedFor:
    """Extended-protocol messages without Sync or Flush ask for no answer, so a Query behind them is in order."""

    @pytest.mark.parametrize("script", [
        "> PH Q",
        "> PBEH B Q",
        "> PBES Q",
        "> PBES P Q",
        "> PBES PBE < 12CZ > PH < 12C > F",
        "> S P Q",
        "> Q < TDC > P Q",
    ])  # fmt: skip
    def test_behind_what_was_asked_for_it_is_busy(self, script: str) -> None:
        assert Kind.REQUEST_WHILE_BUSY in kinds(Conversation().talk(script))

    @pytest.mark.parametrize("letters", ["PQ", "PBQ", "PBDEQ", "CF"])
    def test_whichever_thread_sends_it(self, letters: str) -> None:
        """A pool hands the connection on to another thread, with the Parse that its driver left in it."""
        conversation = Conversation(MODEL)
        assert conversation.frontend(letters[:-1]) == []
        assert conversation.frontend(letters[-1], MODEL._replace(tid=2)) == []

    def test_the_rest_of_a_torn_pipeline_is_busy(self) -> None:
        """Another thread's Query has come in between: what goes on behind it doesn't wait for its answer."""
        conversation = Conversation(MODEL)
        assert conversation.frontend("PB") == []
        assert conversation.frontend("Q", MODEL._replace(tid=2)) == []
        assert kinds(conversation.frontend("ES")) == [Kind.REQUEST_WHILE_BUSY]

    def test_query_that_is_discarded_with_them_is_recorded_as_such(self) -> None:
        conversation = Conversation()
        conversation.talk("> P Q < E")
        states = [request.state for request in conversation.tracker.requests_seen()]
        assert states == [RequestState.FAILED, RequestState.SKIPPED]
        assert conversation.tracker.idle, "the server waits for a Sync, and owes nothing"
        assert kinds(conversation.backend("Z")) == [Kind.MESSAGE_WHILE_IDLE], "as it would answer only a Sync"


class TestPipelines:
    def test_of_a_thousand_requests(self) -> None:
        conversation = Conversation()
        assert conversation.frontend("PBDES" * 1000) == []
        assert conversation.backend("12TDCZ" * 1000) == []
        assert conversation.tracker.idle

    def test_without_sync_end_with_the_session(self) -> None:
        conversation = Conversation()
        assert conversation.frontend("PBE" * 100 + "H") == []
        assert conversation.backend("12C" * 100) == []
        assert conversation.tracker.idle


class TestHugeMessages:
    GIGABYTE = 1 << 30

    @pytest.mark.parametrize(("direction", "before", "header"), [
        (Direction.BACKEND, "> Q < T", "D"),
        (Direction.BACKEND, "> Q < H", "d"),
        (Direction.FRONTEND, "> Q < G", "d"),
        (Direction.FRONTEND, "", "Q"),
        (Direction.FRONTEND, "", "B"),
    ])  # fmt: skip
    def test_pass_in_chunks(self, direction: Direction, before: str, header: str) -> None:
        """A gigabyte costs as much as a byte: after its first bytes nothing is looked at, nor kept."""
        conversation = Conversation()
        conversation.talk(before)
        tracker = conversation.tracker
        size = self.GIGABYTE - 1024
        head = header.encode() + struct.pack("!I", size - 1)
        chunk = head.ljust(128 * 1024, b"x")
        rest = b"Xjunk" + chunk[5:]
        passed = 0
        while passed < size:
            end = min(len(chunk), size - passed)
            if direction is Direction.BACKEND:
                done = tracker.backend(chunk, 0, end)
                assert (tracker.backend_rest == 0) is (passed + end == size)
            else:
                done = tracker.frontend(chunk, 0, end, MODEL, 0.0)
            assert done == end
            assert tracker.verdict is None
            passed += end
            chunk = rest
        if before:
            conversation.talk("< CZ" if direction is Direction.BACKEND and header == "D" else "")
        assert tracker.requests_seen()[-1].sql is None or len(tracker.requests_seen()[-1].sql or b"") <= 1024

    def test_little_is_held_back(self) -> None:
        """Byte by byte, no more than LOOK_LIMIT bytes are ever left with the caller."""
        conversation = Conversation(login=False)
        script = [
            (Direction.BACKEND, LOGIN),
            (Direction.FRONTEND, query("SELECT '" + "x" * 5000 + "'")),
            (Direction.BACKEND, message("E", b"SERROR\0VERROR\0C22000\0M" + b"x" * 5000 + b"\0\0") + BACKEND["Z"]),
            (Direction.BACKEND, message("S", b"application_name\0" + b"x" * 5000 + b"\0")),
        ]
        most = 0
        for direction, data in script:
            for byte in data:
                assert conversation.feed(direction, bytes([byte]), None) == []
                most = max(most, conversation.held(direction))
        assert 0 < most < LOOK_LIMIT
        assert conversation.held(Direction.FRONTEND) == conversation.held(Direction.BACKEND) == 0
