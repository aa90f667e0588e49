"""What can be seen of a guard from outside: its sessions, and word of each that comes or goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pgguard.attribution.findings import Activity
from tests.proxy.conftest import until
from tests.proxy.fake_backend import part
from tests.proxy.messages import BACKEND_PID, COLUMNS, ONE_ROW, READY, SELECTED, message, query

if TYPE_CHECKING:
    from pgguard.faults.fault import SessionFacts
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
