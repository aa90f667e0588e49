"""Connections over TCP that several real processes have open: who sends is found out, and no byte pays for it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio

from pgguard.attribution.sampling import Sample
from pgguard.attribution.threads import Waits
from pgguard.attribution.witness import Witness
from tests.attribution.puppets import THREADS, Puppet
from tests.proxy.conftest import running, until
from tests.proxy.messages import ANSWER, LOGGED_IN, message, query, startup

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pgguard.faults.fault import Fault
    from tests.proxy.conftest import House
    from tests.proxy.fake_backend import BackendConnection, FakeBackend

SELECT = query("select 1")

CLIENT = f"""
def take(size):
    while size:
        size -= len(c.recv(size))

def ask():
    c.sendall({SELECT!r})
    take({len(ANSWER)})
"""


@pytest.fixture
def application() -> Iterator[Puppet]:
    with Puppet() as application:
        yield application


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine a client may take its time to come from its send to its wait."""
    monkeypatch.setattr("pgguard.proxy.judge._SAMPLING_BUDGET", 5.0)
    monkeypatch.setattr("pgguard.proxy.judge._SAMPLING_LIMIT", 6.0)


class Family:
    """A parent that has logged in, and its child."""

    def __init__(self, house: House, parent: Puppet) -> None:
        self.house = house
        self.parent = parent
        self.child = 0
        self.server: BackendConnection

    async def do(self, code: str) -> Any:
        return await trio.to_thread.run_sync(self.parent.do, code)

    async def log_in(self) -> None:
        await self.do(THREADS + CLIENT)
        await self.do(f"c = socket.create_connection(('127.0.0.1', {self.house.port})); c.sendall({startup()!r})")
        self.server = await self.house.backend.accept()
        await self.server.log_in()
        await self.do(f"take({len(LOGGED_IN)})")

    async def fork(self) -> None:
        """Fork, and wait until the guard has noticed."""
        self.child = await self.do("fork_puppet()")
        [session] = self.house.guard._sessions.values()
        await until(lambda: session.client.contested)

    async def ask(self, *, child: bool = False) -> int:
        """One of them asks and waits for its answer on a thread of its own; returns the tid."""
        tid: int = await self.do(f"order({self.child}, 'ask()')" if child else "start(ask)")
        await self.server.expect(SELECT)
        await self.server.send(ANSWER)
        pid = self.child if child else self.parent.pid
        await until(lambda: not _exists(pid, tid))
        return tid


def _exists(pid: int, tid: int) -> bool:
    return Path(f"/proc/{pid}/task/{tid}").exists()


def roles(fault: Fault) -> set[tuple[str, int | None, int | None, str]]:
    return {(str(one.role), one.pid, one.tid, str(one.evidence)) for one in fault.culprits}


@pytest.mark.usefixtures("patient")
async def test_taking_turns_is_convicted_with_process_and_thread(backend: FakeBackend, application: Puppet) -> None:
    """Nothing overlaps on the wire, and over TCP the kernel names nobody."""
    async with running(backend, witness=Witness()) as house:
        family = Family(house, application)
        await family.log_in()
        await family.ask()
        await family.fork()
        first = await family.ask(child=True)
        tid = await family.ask()
        await until(lambda: "shared-by-processes" in house.kinds)
        [fault] = [fault for fault in house.faults if fault.kind == "shared-by-processes"]
        assert fault.reason == "after another process had used the connection in between"
        assert ("intruder", family.child, first, "thread-sample") in roles(fault)
        assert ("requester", application.pid, tid, "thread-sample") in roles(fault), "it is the opener's by right"
        assert fault.sent_by is not None
        assert (fault.sent_by.pid, fault.sent_by.tid) == (application.pid, tid)
        assert fault.culprits[1].system_call == "recvfrom"


@pytest.mark.usefixtures("patient")
async def test_a_one_way_hand_over_is_an_inheritance_and_nothing_worse(
    backend: FakeBackend, application: Puppet
) -> None:
    async with running(backend, witness=Witness()) as house:
        family = Family(house, application)
        await family.log_in()
        await family.ask()
        await family.fork()
        for _ in range(3):
            await family.ask(child=True)
        assert set(house.kinds) == {"inherited-connection"}
        [used] = [fault for fault in house.faults if fault.message is not None and fault.repeat_of is None]
        assert (used.culprits[0].pid, str(used.culprits[0].evidence)) == (family.child, "thread-sample")


# Bytes


def script(rng: random.Random) -> list[bytes]:
    """Messages of all sizes, cut anywhere: in headers, in bodies, behind several messages."""
    messages = [
        query("select '" + "x" * rng.choice([0, 10, 5000, 300_000]) + "'"),
        message("P", b"\0select 1\0\0\0"),
        message("B", b"\0\0\0\0\0\0\0\0"),
        message("E", b"\0\0\0\0\0"),
        message("S"),
        message("d", rng.randbytes(rng.choice([0, 4, 70_000]))),
        message("c"),
    ]
    rng.shuffle(messages)
    stream = b"".join(messages)
    cuts = sorted({rng.randrange(1, len(stream)) for _ in range(6)} | {1, 3, len(stream) - 2})
    return [stream[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True)]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("names", ["nobody", "somebody", "strangers"])
async def test_requests_arrive_complete_and_in_order_whatever_the_sampling_says(
    backend: FakeBackend, names: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)

    def sample(*_: Any, **__: Any) -> tuple[Sample, tuple[()]]:
        pid = {"nobody": None, "somebody": 1, "strangers": rng.choice([None, 1, 2, 3])}[names]
        return Sample(pid, pid, Waits()), ()

    monkeypatch.setattr(Witness, "sample", sample)
    monkeypatch.setattr("pgguard.proxy.watch._EARLY", 0)
    monkeypatch.setattr("pgguard.proxy.watch._HEIRS_INTERVAL", 1000)  # nobody looks who contests it: the test says so
    async with running(backend, witness=Witness()) as house:
        client, server = await house.session()
        [session] = house.guard._sessions.values()
        await session.opening_known.wait()
        session.client.contest(True)
        pieces = script(rng)

        async def send() -> None:
            for piece in pieces:
                await client.send(piece)
                await trio.sleep(0.002)  # so that the pieces are read one by one

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await server.expect(b"".join(pieces))
        assert not session.client.waits
