"""Whatever events are missing, late or vague, no byte gets a wrong name."""

from __future__ import annotations

import errno
import os
import struct
import tracemalloc
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgguard.attribution.ebpf.account import Account, Accounts, Tally
from pgguard.attribution.ebpf.assembler import R0, R1, R2, Assembler
from pgguard.attribution.ebpf.programs import EVENT_SIZE, TICKETS, WORD_SHIFT, WORDS_SIZE, Kind
from pgguard.attribution.ebpf.ring import Event, Ring
from pgguard.compiled import form
from pgguard.identity import Sender

KEY, OTHER = b"k" * 36, b"o" * 36


def event(
    kind: Kind,
    position: int = 0,
    size: int = 0,
    who: int = 1,
    origin: int = 7,
    key: bytes = KEY,
    ticket: int = 0,
    reached: int = 0,
) -> Event:
    return position, size, kind, who, who, origin, ticket, key, 0, 0, reached


def sender(who: int) -> Sender:
    return Sender(who, who)


class Kernel:
    """What it reports, as the test says it."""

    def __init__(self) -> None:
        self.said: list[Event] = []
        self.went: dict[int, int] = {}
        """By ticket, how far its sender has gone on."""
        self.accounts = Accounts(self)

    def read(self) -> list[Event]:
        said, self.said = self.said, []
        return said

    def reached(self, ticket: int) -> int:
        return self.went.get(ticket, 0)

    def glance(self, ticket: int) -> int:
        reached = self.reached(ticket)
        return -1 if self.said else reached

    def feed(self, *events: Event) -> None:
        self.said += events
        self.accounts.feed()


def account_of(*events: Event) -> Account:
    kernel = Kernel()
    kernel.feed(event(Kind.OPENED), event(Kind.ACCEPTED), *events)
    return kernel.accounts.open(KEY)


def test_each_send_gets_its_sender_however_the_bytes_are_read() -> None:
    account = account_of(event(Kind.SENDING, 0, 5), event(Kind.SENDING, 5, 3, who=2), event(Kind.SENDING, 8, 2, who=2))
    assert account.split(0) == []
    assert account.split(7) == [(5, sender(1)), (2, sender(2))]
    assert account.split(3) == [(3, sender(2))]
    assert account.split(1) == [(1, None)]
    assert account.opener == sender(1)


def test_bytes_that_no_event_covers_shift_nothing() -> None:
    account = account_of(event(Kind.SENDING, 4, 2), event(Kind.UNCERTAIN, 6, 3), event(Kind.SENDING, 9, 1, who=2))
    assert account.split(10) == [(4, None), (2, sender(1)), (3, None), (1, sender(2))]


def test_bytes_of_one_sender_are_taken_as_such_and_all_others_are_left_to_be_split() -> None:
    account = account_of(event(Kind.SENDING, 0, 5), event(Kind.SENDING, 5, 3), event(Kind.SENDING, 8, 2, who=2))
    assert not account.take(9)
    assert account.split(9) == [(8, sender(1)), (1, sender(2))]
    assert account.take(1)
    assert account.sender == sender(2)
    assert not account.take(1), "nothing has been said of it"
    assert account.split(1) == [(1, None)]
    account.apply(event(Kind.SENDING, 12, 1, who=2))
    assert not account.take(2), "nothing has been said of the first"
    assert account.split(2) == [(1, None), (1, sender(2))]


def test_a_thread_that_goes_on_is_one_object_and_little_is_kept_of_it() -> None:
    account = account_of()
    named = set()
    tracemalloc.start()
    try:
        for n in range(10_000):
            account.apply(event(Kind.SENDING, 5 * n, 5, who=3))
            assert account.take(5)
            named.add(id(account.sender))
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(named) == 1
    assert taken < 1000


def test_a_sender_outside_of_the_pid_namespace_is_unknown() -> None:
    account = account_of(event(Kind.SENDING, 0, 2, who=0), event(Kind.SENDING, 2, 2, who=3))
    assert account.split(4) == [(2, None), (2, sender(3))]


def test_positions_need_more_than_32_bits() -> None:
    account = account_of()
    account.split(2**33)
    account.apply(event(Kind.SENDING, 2**33, 2))
    assert account.split(2) == [(2, sender(1))]


def test_what_contradicts_itself_is_unknown() -> None:
    account = account_of(event(Kind.SENDING, 0, 10), event(Kind.SENDING, 4, 2, who=2))
    assert account.contradictions == 1
    assert account.split(8) == [(4, sender(1)), (2, sender(2)), (2, None)]


def test_two_that_send_by_turns_while_nobody_reads_take_bounded_memory() -> None:
    """The senders of what is beyond that aren't known, and those of what comes later are again."""
    account = account_of()
    sends = 100_000
    tracemalloc.start()
    try:
        for n in range(sends):
            account.apply(event(Kind.SENDING, 5 * n, 5, who=1 + n % 2))
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken < 1_000_000
    assert account.split(10) == [(5, sender(1)), (5, sender(2))]
    *known, (_, unknown), last = account.split(5 * sends - 10)
    assert all(whose == sender(1 + n % 2) for n, (_, whose) in enumerate(known))
    assert unknown is None
    assert last == (5, sender(1 + (sends - 1) % 2))
    account.apply(event(Kind.SENDING, 5 * sends, 5, who=3))
    assert account.split(5) == [(5, sender(3))]


def test_what_was_not_known_is_counted_and_said_at_the_end() -> None:
    tally = Tally()
    assert tally.remarks(0) == []
    tally.count(account_of(event(Kind.WATCHED, 3), event(Kind.SENDING, 0, 10)))
    tally.count(Account())  # of a client on another host, whom the kernel can't know
    assert tally.remarks(0) == []
    tally.count(account_of(event(Kind.WATCHED, 4), event(Kind.SENDING, 0, 10), event(Kind.SENDING, 4, 2, who=2)))
    for problem in (errno.E2BIG, errno.EWOULDBLOCK, errno.E2BIG, errno.EPERM):
        tally.count(account_of(event(Kind.UNWATCHED, size=problem)))
    assert tally.remarks(17) == [
        (
            "on 4 of 6 TCP connections the kernel did not say who sent: 2 because the map of watched sockets was full, "
            "1 because the client's socket blocks, 1 (Operation not permitted)"
        ),
        "the kernel's reports came too fast, and 17 got lost: who sent those bytes is not known",
        "1 of the kernel's reports contradicted others: the senders named may be wrong",
    ]


def test_another_connection_of_the_same_addresses_counts_for_nothing() -> None:
    kernel = Kernel()
    accounts = kernel.accounts
    kernel.feed(
        event(Kind.OPENED),
        event(Kind.ACCEPTED),
        event(Kind.SENDING, 0, 4, who=9, origin=8),
        event(Kind.SENDING, 0, 2),
    )
    account = accounts.open(KEY)
    kernel.feed(event(Kind.SENDING, 2, 4, who=9, origin=8))
    assert account.split(6) == [(2, sender(1)), (4, None)]


def test_a_connection_that_reuses_a_port_has_an_account_of_its_own() -> None:
    kernel = Kernel()
    accounts = kernel.accounts
    kernel.feed(event(Kind.OPENED), event(Kind.ACCEPTED), event(Kind.SENDING, 0, 2))
    first = accounts.open(KEY)
    kernel.feed(
        event(Kind.OPENED, who=2, origin=9),
        event(Kind.ACCEPTED, origin=9),
        event(Kind.SENDING, 0, 1, who=2, origin=9),
    )
    assert first.split(2) == [(2, sender(1))]
    second = accounts.open(KEY)
    accounts.close(KEY, first)
    kernel.feed(event(Kind.SENDING, 1, 1, who=3, origin=9))
    assert second.split(2) == [(1, sender(2)), (1, sender(3))]
    accounts.close(KEY, second)
    kernel.feed(event(Kind.SENDING, 2, 1, who=3, origin=9))
    assert second.split(1) == [(1, None)]


def test_without_the_guards_own_end_nothing_is_believed() -> None:
    kernel = Kernel()
    accounts = kernel.accounts
    kernel.feed(event(Kind.OPENED), event(Kind.SENDING, 0, 2))
    assert accounts.open(KEY).split(2) == [(2, None)]


def test_who_comes_behind_a_report_that_was_left_out_is_unknown() -> None:
    """Before the connection is accepted not all reports are kept; the last one is."""
    kernel = Kernel()
    kernel.feed(event(Kind.OPENED), event(Kind.ACCEPTED))
    sends = [event(Kind.SENDING, 2 * n, 1, who=1 + n % 2, ticket=3, reached=2 * n) for n in range(50)]
    kernel.feed(*sends)
    kernel.went[3] = 110
    account = kernel.accounts.open(KEY)
    kernel.accounts.catch_up(account)
    *known, (length, unknown), last = account.split(110)
    assert known == [(2, sender(1 + n % 2)) for n in range(len(known) - 1)] + [(1, sender(2 - len(known) % 2))]
    assert (length, unknown, last) == (98 - 2 * len(known) + 1, None, (12, sender(2)))
    assert length > 30


def test_an_event_that_fails_names_nobody_and_costs_no_other_connection_anything() -> None:
    """Whoever had been reported before it doesn't go on, as it may have been about another one."""
    kernel = Kernel()
    kernel.feed(
        event(Kind.OPENED), event(Kind.ACCEPTED), event(Kind.OPENED, key=OTHER), event(Kind.ACCEPTED, key=OTHER)
    )
    account, other = kernel.accounts.open(KEY), kernel.accounts.open(OTHER)
    kernel.feed(event(Kind.SENDING, 0, 5, ticket=3))
    # What fails in compiled code, and what does in Python.
    odd = event(Kind.SENDING, 5, 2**70, who=2, ticket=3, reached=5)
    if not form().compiled:
        odd = cast("Event", (5, None, *odd[2:]))
    with pytest.raises((OverflowError, TypeError, ValueError)):
        kernel.feed(odd, event(Kind.SENDING, 0, 5, who=3, key=OTHER, ticket=4))
    kernel.went |= {3: 20, 4: 20}
    kernel.accounts.catch_up(account)
    kernel.accounts.catch_up(other)
    assert other.split(20) == [(20, sender(3))]
    assert account.split(20) == [(5, sender(1)), (15, None)]
    kernel.feed(event(Kind.SENDING, 20, 5, who=2, ticket=3, reached=20))
    kernel.went[3] = 40
    kernel.accounts.catch_up(account)
    assert account.split(20) == [(20, sender(2))]


def test_connections_that_are_never_accepted_take_bounded_memory() -> None:
    kernel = Kernel()
    accounts = kernel.accounts
    for number in range(10_000):
        kernel.feed(event(Kind.OPENED, key=number.to_bytes(36, "big")))
    for _ in range(10_000):
        kernel.feed(event(Kind.SENDING))
    assert len(accounts._early) <= 4096
    assert len(accounts._early[KEY]) <= 4096


Stretch = tuple[int, int, str]
"""Who sent it, how much, and what the kernel said of it."""


@given(
    stretches=st.lists(
        st.tuples(
            st.integers(1, 4), st.integers(1, 50), st.sampled_from(["said", "in parts", "vague", "lost", "skipped"])
        )
    ),
    reads=st.lists(st.integers(0, 80)),
    late=st.sets(st.integers(0, 30)),
)
def test_no_byte_ever_gets_a_wrong_name(stretches: list[Stretch], reads: list[int], late: set[int]) -> None:
    truth: list[int | None] = []
    named: list[int | None] = []
    events: list[tuple[int, Event]] = []
    """With how much can have been sent when they are made."""
    for who, size, said in stretches:
        position = len(truth)
        if said == "in parts":
            half = size // 2
            events.append((position, event(Kind.SENDING, position, half, who)))
            events.append((position + half, event(Kind.SENDING, position + half, size - half, who)))
        elif said == "said":
            events.append((position, event(Kind.SENDING, position, size, who)))
        elif said == "vague":
            events.append((position, event(Kind.UNCERTAIN, position, size + who, who)))
        truth += [who] * size
        named += [who if said in ("said", "in parts") else None] * size
    account = account_of()
    position = 0
    for number, length in enumerate([*reads, len(truth)]):
        length = min(length, len(truth) - position)  # noqa: PLW2901
        while events and number not in late and events[0][0] <= position + length:
            account.apply(events.pop(0)[1])
        found: list[int | None] = []
        for size, whose in account.split(length):
            found += [whose.pid if whose else None] * size
        assert len(found) == length
        for index, who_found in enumerate(found, position):
            assert who_found in (truth[index], None)
            assert late or who_found == named[index]
        position += length
    assert account.contradictions == 0


HOW = ("unread", "vague", "lost", "skipped", "stolen", "elsewhere", "early")
"""In which ways something is sent of which more, or less, is told than by the same again."""
Step = tuple[str, int, int]
"""Something that is sent, or read: who sends, or how much comes while the guard looks; and how many bytes."""


class Sending(Kernel):
    """Tells of what is sent as the program does: :mod:`pgguard.attribution.ebpf.programs`.

    What is sent "early" can be read before it is told.
    """

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self.steps = steps
        self.truth: list[int] = []
        self.certain: list[int | None] = []
        """By byte, who is known to have sent it, when everything has been told of it."""
        self.ticket = self.last = self.reached_so_far = 0
        self.racing = 0
        self.untold: tuple[int, int, int] | None = None

    def read(self) -> list[Event]:
        """What has been said; while others send."""
        self.go_on()
        return super().read()

    def reached(self, ticket: int) -> int:
        self.go_on()
        return super().reached(ticket)

    def glance(self, ticket: int) -> int:
        reached = Kernel.reached(self, ticket)
        self.go_on()
        return -1 if self.said else reached

    def go_on(self) -> None:
        self.tell()
        if self.racing and self.steps and self.steps[0][0] != "read":
            self.racing -= 1
            self.send(*self.steps.pop(0))

    def tell(self) -> None:
        if self.untold is not None:
            untold, self.untold = self.untold, None
            self.say("said", *untold)

    def send(self, how: str, who: int, size: int) -> None:
        self.tell()
        position = len(self.truth)
        self.truth += [who] * size
        self.certain += [who if how in {"said", "unread", "stolen"} else None] * size
        if how == "early":
            self.untold = who, size, position
        else:
            self.say(how, who, size, position)

    def say(self, how: str, who: int, size: int, position: int) -> None:
        if how == "skipped":
            self.last = 0
        elif how == "elsewhere":
            self.last = 0
            self.said.append(event(Kind.SENDING, position, size, 0, reached=self.reached_so_far))
        elif how == "said" and who == self.last and self.went.get(self.ticket) is not None:
            self.reached_so_far = self.went[self.ticket] = position + size
        elif how == "lost":
            self.last = 0
        elif how == "vague":
            self.last = 0
            self.said.append(event(Kind.UNCERTAIN, position, size, who, reached=self.reached_so_far))
        else:
            if how == "stolen":
                self.went.pop(self.ticket, None)
            if self.went.get(self.ticket) is None:
                self.ticket += 1
            self.said.append(event(Kind.SENDING, position, size, who, ticket=self.ticket, reached=self.reached_so_far))
            self.last, self.reached_so_far = who, position + size
            self.went[self.ticket] = self.reached_so_far


@given(
    st.lists(
        st.tuples(
            st.sampled_from([*["said"] * 5, *["read"] * 4, *HOW]),
            st.integers(1, 3),
            st.integers(1, 50),
        )
    )
)
def test_who_goes_on_is_known_without_a_report_and_nobody_else_is_taken_for_it(steps: list[Step]) -> None:
    kernel = Sending([*steps, ("read", 0, 10_000)])
    kernel.feed(event(Kind.OPENED), event(Kind.ACCEPTED))
    account = kernel.accounts.open(KEY)
    position = 0
    inexact = any(how in {"stolen", "early"} for how, *_ in steps)
    while kernel.steps:
        how, who, size = kernel.steps.pop(0)
        if how != "read":
            kernel.send(how, who, size)
            continue
        length = min(size, len(kernel.truth) - position)
        certain = kernel.certain[position : position + length]
        kernel.racing = who
        if size % 3 == 0:
            kernel.accounts.feed()
        if not account.covers(length):
            kernel.accounts.catch_up(account)
        found: list[int | None] = []
        if length and account.take(length):
            assert account.sender is not None
            found = [account.sender.pid] * length
        else:
            for some, whose in account.split(length):
                found += [whose.pid if whose else None] * some
        for index, who_found in enumerate(found):
            assert who_found in (kernel.truth[position + index], None)
            assert inexact or who_found == certain[index]
        position += length
    assert position == len(kernel.truth)
    assert account.contradictions == 0


def test_labels_and_byte_order_of_the_assembler() -> None:
    code = Assembler()
    code.load(R2, R1, -8, 4)
    code.jump_if(R2, "==", -1, "end")
    code.load_constant(R0, 0x1_0000_0002)
    code.label("end")
    code.exit()
    assert code.assemble().hex(" ", 8) == " ".join(
        ["6112f8ff00000000", "15020200ffffffff", "1800000002000000", "0000000001000000", "9500000000000000"]
    )
    with pytest.raises(ValueError, match="twice"):
        code.label("end")
    code.jump("nowhere")
    with pytest.raises(KeyError):
        code.assemble()


class FakeRing:
    """Memory laid out as the kernel's, in a file: the data is there twice, as a file can't be mapped onto itself."""

    SIZE = 4096

    def __init__(self) -> None:
        self.file = os.memfd_create("ring")
        os.ftruncate(self.file, 2 * 4096 + 2 * self.SIZE)
        self.lost = os.memfd_create("lost")
        os.ftruncate(self.lost, 4096)
        self.words = os.memfd_create("words")
        os.ftruncate(self.words, WORDS_SIZE + 4096)
        self.ring = Ring(self.file, self.SIZE, self.lost, self.words)
        self.produced = 0

    def produce(self, number: int, flags: int = 0) -> int:
        at = self.produced
        self.produced += EVENT_SIZE + 8
        data = struct.pack("=QIIIIII36s16x", number, 0, 0, 0, 0, 0, 0, KEY)
        self._write(at + 8, data)
        self.flag(at, flags)
        os.pwrite(self.file, struct.pack("=Q", self.produced), 4096)
        return at

    def flag(self, at: int, flags: int) -> None:
        self._write(at, struct.pack("=II", EVENT_SIZE | flags, 0))

    def consumed(self) -> int:
        return int.from_bytes(os.pread(self.file, 8, 0), "little")

    def read(self) -> list[int]:
        return [position for position, *_ in self.ring.read()]

    def close(self) -> None:
        self.ring.close()
        os.close(self.file)
        os.close(self.lost)
        os.close(self.words)

    def _write(self, at: int, data: bytes) -> None:
        for index, byte in enumerate(data):
            where = (at + index) % self.SIZE
            for copy in (0, self.SIZE):
                os.pwrite(self.file, bytes([byte]), 2 * 4096 + where + copy)


BUSY, DISCARDED = 1 << 31, 1 << 30


def test_the_ring_wraps_around_and_passes_over_what_is_not_ready() -> None:
    fake = FakeRing()
    assert fake.read() == []
    for number in range(200):
        fake.produce(number)
        assert fake.read() == [number]
        assert fake.consumed() == fake.produced
    busy = [fake.produce(200, BUSY), fake.produce(201), fake.produce(202, BUSY), fake.produce(203, DISCARDED)]
    assert fake.read() == [201]
    assert fake.consumed() == busy[0]
    fake.flag(busy[2], 0)
    fake.produce(204)
    assert fake.read() == [202, 204]
    assert fake.consumed() == busy[0]
    fake.flag(busy[0], 0)
    assert fake.read() == [200]
    assert fake.consumed() == fake.produced
    os.pwrite(fake.lost, struct.pack("=Q", 3), 0)
    assert fake.ring.lost == 3
    fake.close()
    assert fake.ring.lost == 3, "it is asked for at the end"


def test_a_word_counts_for_its_own_ticket_and_when_everything_in_front_of_it_has_been_read() -> None:
    fake = FakeRing()
    ticket = TICKETS * 5 + 3
    os.pwrite(fake.words, struct.pack("=Q", 5 << WORD_SHIFT | 2**40 + 1), 8 * 3)
    assert fake.ring.reached(ticket) == fake.ring.glance(ticket) == 2**40 + 1
    assert fake.ring.reached(ticket + TICKETS) == fake.ring.glance(ticket + 1) == fake.ring.glance(0) == 0
    fake.produce(1, BUSY)
    assert fake.ring.glance(ticket) == -1
    assert fake.read() == []
    assert fake.ring.glance(ticket) == -1, "it isn't there yet"
    assert fake.ring.reached(ticket) == 2**40 + 1
    reached, glance = fake.ring.reached, fake.ring.glance
    fake.close()
    for call in reached, glance:
        with pytest.raises(ValueError, match=r"released|let go"):
            call(ticket)


@pytest.mark.skipif(bool(form().compiled), reason="compiled code takes nothing but memory")
def test_the_word_is_read_before_it_is_looked_whether_something_has_been_reported() -> None:
    fake = FakeRing()
    os.pwrite(fake.words, struct.pack("=Q", 100), 8 * 3)

    class Racing:
        """As memory to which the kernel writes at the same time."""

        def __getitem__(self, n: int) -> int:
            assert n == 3
            fake.produce(1)
            return 100

        def release(self) -> None:
            pass

    assert fake.ring.glance(3) == 100
    fake.ring._progress._by_ticket = cast("memoryview", Racing())
    assert fake.ring.glance(3) == -1
    fake.close()


# What lay unread when something was sent


def sent(position: int, size: int, read: int, received: int) -> Event:
    return (*event(Kind.SENDING, position, size)[:8], read, received, 0)


def accepted(first: int) -> Event:
    return (*event(Kind.ACCEPTED)[:8], first, 0, 0)


def test_what_lay_unread_is_told_of_the_byte_that_was_sent_then() -> None:
    account = account_of(accepted(1000), sent(0, 10, 1100, 1100), sent(10, 10, 1100, 1500), sent(20, 10, 1600, 1600))
    for unread in (None, (100, 500), None):
        assert account.unread() == unread
        assert account.split(10) == [(10, sender(1))]


def test_of_what_is_sent_in_pieces_or_read_together_only_the_beginning_counts() -> None:
    account = account_of(accepted(0), sent(0, 10, 0, 5), sent(10, 10, 0, 6), sent(20, 10, 0, 7))
    assert account.unread() == (0, 5)
    account.split(15)
    assert account.unread() is None
    account.split(5)
    assert account.unread() == (0, 7)


def test_sequence_numbers_may_wrap_around() -> None:
    first = (1 << 32) - 100
    account = account_of(accepted(first), sent(0, 10, 20, 50))
    assert account.unread() == (120, 150)


def test_nothing_is_told_of_a_connection_whose_beginning_was_not_reported() -> None:
    kernel = Kernel()
    accounts = kernel.accounts
    account = Account(7)
    account.apply(sent(0, 10, 20, 50))
    assert account.unread() is None
    assert accounts.open(KEY).unread() is None


def test_a_client_that_pipelines_takes_a_bounded_amount_of_memory() -> None:
    account = account_of(accepted(0))
    for n in range(10_000):
        account.apply(sent(n * 10, 10, 0, 5 + n))
    assert len(account._unread_sends or ()) <= 64
