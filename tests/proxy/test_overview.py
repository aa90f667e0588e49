"""What can be seen of a guard from outside: its sessions, and word of each that comes or goes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from pgguard.attribution.evidence import Process
from pgguard.attribution.findings import Activity
from pgguard.faults.fault import SessionFacts
from pgguard.proxy.overview import snapshot
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
