"""What can be seen of a guard from outside: its sessions, and word of each that comes or goes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
import trio

from pgguard.attribution.evidence import Process
from pgguard.attribution.findings import Activity
from pgguard.faults.fault import SessionFacts
from pgguard.faults.sql import SqlMode
from pgguard.proxy.overview import Order, Wanted, overview, snapshot
from pgguard.reporting.record import process_record, session_record
from tests.proxy.conftest import until
from tests.proxy.fake_backend import part
from tests.proxy.messages import BACKEND_PID, COLUMNS, LOGGED_IN, ONE_ROW, READY, SELECTED, message, query, startup

if TYPE_CHECKING:
    from pgguard.proxy.session import ProxiedSession
    from tests.proxy.conftest import House

BEGUN = message("C", b"BEGIN\0") + message("Z", b"T")


class Listener:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []

    def opened(self, session: SessionFacts) -> None:
        self.told.append(("opened", session.id))

    def closed(self, session: SessionFacts) -> None:
        self.told.append(("closed", session.id))


class Failing(Listener):
    def opened(self, session: SessionFacts) -> None:
        raise RuntimeError(session)

    closed = opened


def activities(house: House) -> list[Activity]:
    return [one.activity for one in house.guard.snapshot()]


async def test_a_snapshot_says_what_each_session_is_doing(house: House) -> None:
    assert house.guard.snapshot() == []
    client, server = await house.session()
    other, its_server = await house.session(unix=True)
    await until(lambda: activities(house) == [Activity.IDLE, Activity.IDLE])
    await client.send(query("select 1"))
    await server.expect(query("select 1"))
    await server.send(COLUMNS + ONE_ROW)
    await client.expect(COLUMNS + ONE_ROW)
    await other.send(query("begin"))
    await its_server.expect(query("begin"))
    await its_server.send(BEGUN)
    await other.expect(BEGUN)
    first, second = house.guard.snapshot()
    assert (first.activity, second.activity) == (Activity.BUSY, Activity.IDLE_IN_TRANSACTION)
    assert (first.requests, second.requests) == (1, 1)
    assert (first.facts.id, first.facts.transport, first.facts.backend_pid) == (1, "tcp", BACKEND_PID)
    assert str(first.upstream) == f"127.0.0.1:{house.backend.port}"
    await server.send(SELECTED + READY)
    await client.expect(SELECTED + READY)
    await part(client, server)
    await until(lambda: [one.facts.id for one in house.guard.snapshot()] == [2])


SECRET = "s3cret"
URL = f"postgresql://app:{SECRET}@db/app"


async def test_what_can_be_seen_holds_no_secret(house: House) -> None:
    """And is a record's session, key by key."""
    told: list[SessionFacts] = []

    class Noting(Listener):
        def opened(self, session: SessionFacts) -> None:
            told.append(session)

        closed = opened

    house.guard.tell(Noting())
    client = await house.connect()
    await client.send(startup(user="app", database="app", application_name=URL))
    server = await house.backend.accept()
    await server.log_in()
    await client.expect(LOGGED_IN)
    [seen] = house.guard.snapshot()
    assert SECRET not in repr(seen)
    assert list(session_record(seen.facts)) == [
        *("id", "user", "database", "application_name", "transport", "client", "backend_pid", "opened_at", "tls"),
        "through",
    ]
    await part(client, server)
    await until(lambda: len(told) == 2)
    assert SECRET not in repr(told)
    assert "app:***@db" in str(told[0].application_name)


def test_nor_do_the_processes_in_it() -> None:
    process = Process(7, 1, 0.0, "python3", ("python3", "app.py", "--dsn", URL), 1)
    facts = SessionFacts(1, "app", "app", "app", "tcp", "127.0.0.1:5", 7, 0.0, tls=False)
    opening, sightings = SimpleNamespace(opener=process), SimpleNamespace(holders=(process,))
    session = SimpleNamespace(facts=lambda: facts, tracker=None, opening=opening, sightings=sightings, upstream=None)
    seen = snapshot(cast("ProxiedSession", session))
    assert seen.opener is not None
    assert seen.opener.cmdline[:3] == ("python3", "app.py", "--dsn")
    shown = [process_record(one) for one in (seen.opener, *seen.holders)]
    assert SECRET not in repr(shown)
    keys = ["name", "cmdline", "ppid", "namespace_pid", "started_at", "container", "pod"]
    assert [list(one or ()) for one in shown] == [keys] * 2


async def test_listeners_are_told_of_sessions_that_come_and_go(house: House) -> None:
    listener = Listener()
    house.guard.tell(Failing())
    house.guard.tell(listener)
    client, server = await house.session()
    assert listener.told == [("opened", 1)]
    await house.session(unix=True)
    await part(client, server)
    await until(lambda: len(listener.told) == 3)
    assert listener.told == [("opened", 1), ("opened", 2), ("closed", 1)]


async def test_a_client_that_never_logs_in_is_no_session(house: House) -> None:
    listener = Listener()
    house.guard.tell(listener)
    stranger = await house.connect()
    await stranger.send(b"GET / HTTP/1.0\r\n\r\n")
    await stranger.close()
    client, _ = await house.session()
    assert listener.told == [("opened", 2)]
    assert [one.facts.id for one in house.guard.snapshot()] == [2]
    await client.close()


def many(count: int) -> list[ProxiedSession]:
    """Sessions of which every tenth is busy, the later the longer; one has a secret in what its client calls itself."""
    made = []
    for number in range(1, count + 1):
        name = URL if number == 7 else f"worker {number}"
        through = "audit" if number > 98 else "orders"
        facts = SessionFacts(
            number, "app", "app", name, "tcp", f"127.0.0.1:{number}", number, 0.0, tls=False, through=through
        )
        process = Process(100_000 + number, 1, 0.0, "ruby", ("puma", str(number)), 1)
        seen = SimpleNamespace(
            n=1, at=float(count - number), messages="Q", sql=b"SELECT 1", sql_cut=False, state="answered", sender=None
        )
        tracker = SimpleNamespace(
            idle=number % 10 != 0,
            in_transaction=number % 10 == 1,
            requests=1,
            last_request=seen,
            requests_seen=lambda seen=seen: (seen,),
        )
        made.append(
            SimpleNamespace(
                id=number,
                facts=lambda facts=facts: facts,
                tracker=tracker,
                opened_at=0.0,
                opening=SimpleNamespace(opener=process),
                sightings=SimpleNamespace(holders=()),
                upstream=None,
            )
        )
    return cast("list[ProxiedSession]", made)


def causes_of(session_id: int) -> tuple[int, ...]:
    return (1, 2) if session_id in {3, 4} else ()


@pytest.mark.parametrize(
    ("wanted", "found", "matching"),
    [
        (Wanted(limit=3), [1, 2, 3], 100),
        (Wanted(limit=3, order=Order.NEWEST), [100, 99, 98], 100),
        (Wanted(limit=3, order=Order.ACTIVE), [1, 2, 3], 100),
        (Wanted(limit=3, order=Order.WAITING), [100, 90, 80], 100),
        (Wanted(limit=12, order=Order.WAITING), [100, 90, 80, 70, 60, 50, 40, 30, 20, 10, 99, 98], 100),
        (Wanted(activity=Activity.BUSY, limit=2), [10, 20], 10),
        (Wanted(cause=2), [3, 4], 2),
        (Wanted(cause=3), [], 0),
        (Wanted(behind=98), [99, 100], 2),
        (Wanted(search="WORKER 99"), [99], 1),
        (Wanted(search="pid 100042"), [42], 1),
        (Wanted(search="Audit"), [99, 100], 2),
        (Wanted(search="127.0.0.1:10", limit=1), [10], 2),
        (Wanted(limit=0), [], 100),
        (Wanted(search=SECRET), [], 0),
    ],
)
async def test_those_are_told_of_that_are_wanted(wanted: Wanted, found: list[int], matching: int) -> None:
    seen = await overview(many(100), wanted, SqlMode.NORMALIZED, causes_of)
    assert [one.session.facts.id for one in seen.sessions] == found
    assert (seen.matching, seen.total) == (matching, 100)
    assert (seen.open[Activity.BUSY], seen.open[Activity.IDLE], seen.open[Activity.IDLE_IN_TRANSACTION]) == (10, 80, 10)
    assert SECRET not in repr(seen)


async def test_a_secret_can_not_be_searched_for_either() -> None:
    told = await overview(many(10), Wanted(search="postgresql://app:***@db"), SqlMode.NORMALIZED, causes_of)
    assert [one.session.facts.id for one in told.sessions] == [7]


@pytest.mark.parametrize("search", ["", "worker 9999"])
async def test_ten_thousand_sessions_hold_up_nobody(search: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever else has something to do has its turn each time that a slice of time is over, here at once."""
    monkeypatch.setattr("pgguard.proxy.turns.SLICE", 0.0)
    turns = 0

    async def take_turns() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    sessions = many(10_000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(take_turns)
        seen = await overview(sessions, Wanted(search=search), SqlMode.NORMALIZED, causes_of)
        nursery.cancel_scope.cancel()
    assert seen.total == 10_000
    assert turns >= (9_000 if search else 200)  # one each time, or nearly so: who comes first is up to trio
