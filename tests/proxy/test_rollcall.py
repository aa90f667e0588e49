"""Which sessions count toward a limit, and who has them."""

from __future__ import annotations

import socket
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, cast

import pytest

from pgguard.attribution.evidence import Driver, Evidence, Process
from pgguard.attribution.findings import Activity, Share, Slots
from pgguard.attribution.holders import Holders, Holding
from pgguard.attribution.runtime import Runtime
from pgguard.attribution.sockets import TcpClient
from pgguard.attribution.witness import Opening, Witness
from pgguard.proxy.addresses import TcpAddress
from pgguard.proxy.ends import Phase
from pgguard.proxy.rollcall import Counted, call_roll, count
from pgguard.proxy.session import ProxiedSession
from pgguard.proxy.sockets import Stream
from pgguard.session.tracker import Tracker
from pgguard.session.verdicts import Limit, Refusal
from tests.proxy.messages import LOGGED_IN, SELECTED, message, query

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

HERE, THERE = TcpAddress("db1", 5432), TcpAddress("db2", 5432)
TERMINATE = message("X")


def process(pid: int) -> Process:
    return Process(pid, pid, 0.0, "app", ("app",), 1)


class Hall:
    """Sessions, made one after the other."""

    def __init__(self, stack: ExitStack) -> None:
        self.sessions: list[ProxiedSession] = []
        self._stack = stack

    def session(
        self, *, logged_in: bool = True, upstream: TcpAddress = HERE, sent: bytes = b"", got: bytes = b"", **said: str
    ) -> ProxiedSession:
        number = len(self.sessions) + 1
        session = ProxiedSession(number, transport="tcp", client_name="here:1", client_socket=None, opened_at=0.0)
        tracker = Tracker({"user": "app", "database": "shop"} | said)
        if logged_in:
            tracker.backend(LOGGED_IN, 0, len(LOGGED_IN))
        tracker.frontend(sent, 0, len(sent), None, 0.0)
        tracker.backend(got, 0, len(got))
        ends = [self._stack.enter_context(closing(Stream(end))) for end in socket.socketpair()]
        session.connect(ends[0], ends[1], tracker)
        session.upstream = upstream
        self.sessions.append(session)
        return session

    def count(self, limit: Limit | None, name: str | None = None) -> list[int]:
        """The numbers of the sessions that count; the first one has been refused."""
        return [one.session.id for one in call_roll(self.sessions[0], Refusal(limit, name), self.sessions)]


@pytest.fixture
def hall() -> Iterator[Hall]:
    with ExitStack() as stack:
        hall = Hall(stack)
        hall.session(logged_in=False)
        yield hall


@pytest.mark.parametrize(
    ("limit", "name", "numbers"),
    [
        (Limit.SERVER, None, [2, 3, 4]),
        (Limit.RESERVED, None, [2, 3, 4]),
        (Limit.ROLE, "app", [2, 3, 5, 6]),
        (Limit.ROLE, "nobody", []),
        (Limit.DATABASE, "shop", [2, 4, 5]),
        (Limit.WAL_SENDERS, None, [5, 6]),
        (None, None, [2, 3, 4, 5, 6]),
    ],
)
def test_what_counts_is_what_postgresql_counts(
    hall: Hall, limit: Limit | None, name: str | None, numbers: list[int]
) -> None:
    hall.session()
    hall.session(database="other")
    hall.session(user="other")
    hall.session(replication="database")
    hall.session(replication="true")
    assert hall.count(limit, name) == numbers


def test_who_has_not_got_in_or_is_on_its_way_out_does_not_count(hall: Hall) -> None:
    hall.session(logged_in=False)
    hall.session(sent=TERMINATE)
    hall.session(upstream=THERE)
    hall.session().flow.phase = Phase.ENDED
    hall.session().protocol = None
    there = hall.session()
    assert hall.count(Limit.SERVER) == [there.id]


def test_what_each_does_is_told(hall: Hall) -> None:
    asked = query("select 1")
    hall.session()
    hall.session(sent=asked)
    hall.session(sent=asked, got=SELECTED + message("Z", b"T"))
    hall.session(sent=asked, got=SELECTED + message("Z", b"E"))
    hall.session().flow.tracker = None
    roll = call_roll(hall.sessions[0], Refusal(Limit.SERVER), hall.sessions)
    stuck = Activity.IDLE_IN_TRANSACTION
    assert [one.activity for one in roll] == [Activity.IDLE, Activity.BUSY, stuck, stuck, Activity.UNKNOWN]


class Scripted:
    """A witness who says who has which socket open, and who has ended."""

    def __init__(self, holders: dict[int, tuple[Process, ...]], gone: set[Process]) -> None:
        self._holders = holders
        self._gone = gone

    def watch(self, inodes: Iterable[int]) -> dict[int, Holders]:
        return {
            inode: Holders(tuple(Holding(one, 0.0, 0.0) for one in self._holders.get(inode, ())), complete=True)
            for inode in inodes
        }

    def is_gone(self, process: Process) -> bool:
        return process in self._gone


ONE, TWO, GONE = process(101), process(102), process(103)
ADDRESS = TcpClient(bytes(4), 1, bytes(4), 2, 0, 0.0)


def test_who_holds_how_many_and_how_that_is_known(hall: Hall) -> None:
    def opened(inode: int | None, opener: Process | None, evidence: Evidence) -> ProxiedSession:
        session = hall.session()
        session.opening = Opening(ADDRESS, inode, opener, evidence, Holders(), Driver.LIBPQ, Runtime())
        return session

    sessions = [
        opened(1, ONE, Evidence.SOLE_HOLDER),
        opened(2, TWO, Evidence.SOLE_HOLDER),
        opened(3, TWO, Evidence.SOLE_HOLDER),  # shared by both
        opened(None, ONE, Evidence.KERNEL_SENDER),  # in another network namespace
        opened(4, GONE, Evidence.KERNEL_SENDER),  # not found, and who opened it has ended
        hall.session(),  # never found out
    ]
    witness = Scripted({1: (ONE,), 2: (TWO,), 3: (ONE, TWO)}, {GONE})
    doing = [Activity.IDLE, Activity.IDLE_IN_TRANSACTION, Activity.BUSY, Activity.IDLE, Activity.IDLE, Activity.UNKNOWN]
    shares, slots = count(cast("Witness", witness), list(map(Counted, sessions, doing)))
    assert shares == (
        Share(ONE, 3, 2, 0, Evidence.SOCKET_HOLDER),
        Share(TWO, 2, 0, 1, Evidence.SOCKET_HOLDER),
        Share(None, 2, 1, 0, Evidence.UNKNOWN),
    )
    assert slots == Slots(6, 3, 1)
