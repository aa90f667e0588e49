"""Many sessions that are misused at one moment: no other waits for them, no fault is lost, and all are rejected.

How long others wait is told by the work that the guard's tasks do between two looks at the sockets: in processor time,
so that it is the same on a machine that is busy with something else.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import trio

from pgguard.attribution.witness import Witness
from pgguard.faults.build import build_instance
from pgguard.proxy.interpreter import tune
from tests.proxy.conftest import running, until
from tests.proxy.messages import ANSWER, LOGGED_IN, SELECTED, message, query, startup
from tests.proxy.test_refusals import REFUSAL

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from pgguard.faults.causes import Instance
    from tests.proxy.conftest import House
    from tests.proxy.fake_backend import BackendConnection, FakeBackend
    from tests.proxy.messages import Client, Peer

MANY = 300
LONGEST = 0.06
"""Seconds of work after which others have waited for too long; it would be 0.3 s with so many, and a second with a
thousand, if they didn't."""
IN_TRANSACTION = message("Z", b"T")


class Work(trio.abc.Instrument):
    """Measures how long the tasks work that one task has begun, in each round of trio's loop."""

    def __init__(self, root: trio.lowlevel.Task) -> None:
        self._root = root
        self._round = self._began = 0.0
        self.longest = 0.0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        del task
        self._began = time.thread_time()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if self._is_ours(task):
            self._round += time.thread_time() - self._began

    def before_io_wait(self, timeout: float) -> None:
        del timeout
        self.longest = max(self.longest, self._round)
        self._round = 0.0

    def _is_ours(self, task: trio.lowlevel.Task | None) -> bool:
        while task is not None and task is not self._root:
            nursery = task.parent_nursery
            task = None if nursery is None else nursery.parent_task
        return task is not None


def _serving() -> trio.lowlevel.Task:
    """The task that is the guard."""
    [task] = [
        task
        for nursery in trio.lowlevel.current_task().child_nurseries
        for task in nursery.child_tasks
        if task.name.endswith("Guard.serve")
    ]
    return task


@asynccontextmanager
async def measured() -> AsyncIterator[Work]:
    """Measure what the guard does in this context, the interpreter being tuned as in a process of its own."""
    work = Work(_serving())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(tune)
        await trio.testing.wait_all_tasks_blocked()
        trio.lowlevel.add_instrument(work)
        try:
            yield work
        finally:
            trio.lowlevel.remove_instrument(work)
            nursery.cancel_scope.cancel()


async def sessions(house: House, number: int = MANY, *, unix: bool = True) -> list[tuple[Client, BackendConnection]]:
    return [await house.session(unix=unix) for _ in range(number)]


def send_at_once(peers: Iterable[Peer], data: bytes) -> None:
    """Send so that nobody has a turn in between."""
    for peer in peers:
        assert os.write(peer.stream.socket.fileno(), data) == len(data)


def end_at_once(peers: Iterable[Peer]) -> None:
    """Have connections end so that nobody has a turn in between."""
    for peer in peers:
        with socket.socket(fileno=os.dup(peer.stream.socket.fileno())) as sock:
            sock.shutdown(socket.SHUT_RDWR)


def counted(house: House) -> int:
    """How many faults there have been, recorded or not."""
    return sum(one.faults for one in house.docket.counts())


async def all_are_counted(house: House) -> None:
    """Wait until there have been as many as sessions, and the first is recorded, which waits for stacks."""
    await until(lambda: counted(house) == MANY and bool(house.faults))


@pytest.mark.parametrize("attributed", [True, False])
async def test_many_that_ask_while_they_are_busy_hold_up_nobody(backend: FakeBackend, attributed: bool) -> None:
    async with running(backend, witness=Witness() if attributed else None) as house:
        many = await sessions(house)
        for client, server in many:
            await client.send(query("select 1"))
            await server.expect(query("select 1"))
        async with measured() as work:
            send_at_once((client for client, _ in many), query("select 2"))
            for _, server in many:
                await server.expect(query("select 2"))
            await all_are_counted(house)
        assert set(house.kinds) == {"request-while-busy"}
        assert work.longest < LONGEST


async def test_many_that_misuse_are_all_rejected(backend: FakeBackend) -> None:
    async with running(backend, witness=Witness(), mode="reject", kinds={"request-while-busy": "reject"}) as house:
        many = await sessions(house)
        for client, server in many:
            await client.send(query("select 1"))
            await server.expect(query("select 1"))
        bystander, its_server = (await sessions(house, 1))[0]
        async with measured() as work:
            send_at_once((client for client, _ in many), query("select 2"))
            for client, server in many:
                assert (await client.message()).fields["C"] == "08P01"
                assert await server.rest() == b""
                await server.close()
        assert counted(house) == MANY
        assert work.longest < LONGEST
        await bystander.send(query("select 3"))
        await its_server.expect(query("select 3"))
        await its_server.send(ANSWER)
        await bystander.expect(ANSWER)


async def test_many_that_end_without_a_word_hold_up_nobody(backend: FakeBackend) -> None:
    async with running(backend, witness=Witness()) as house:
        many = await sessions(house)
        for client, server in many:
            await client.send(query("select 1"))
            await server.expect(query("select 1"))
        async with measured() as work:
            end_at_once(client for client, _ in many)
            for _, server in many:
                assert await server.rest() == b""
                await server.close()
            await house.empty()
            await all_are_counted(house)
        assert set(house.kinds) == {"unclean-close"}
        assert work.longest < LONGEST


async def test_many_transactions_that_sit_idle_hold_up_nobody(backend: FakeBackend) -> None:
    async with running(backend, witness=Witness(), idle_in_transaction=5.0) as house:
        many = await sessions(house)
        for client, server in many:
            await client.send(query("begin"))
            await server.expect(query("begin"))
        send_at_once((server for _, server in many), SELECTED + IN_TRANSACTION)
        async with measured() as work:
            await all_are_counted(house)
        assert set(house.kinds) == {"idle-in-transaction"}
        assert work.longest < LONGEST


async def test_many_that_the_server_ends_hold_up_nobody(backend: FakeBackend) -> None:
    async with running(backend, witness=Witness()) as house:
        many = await sessions(house)
        async with measured() as work:
            end_at_once(server for _, server in many)
            for client, _ in many:
                await client.rest()
                await client.close()
            await house.empty()
        assert house.faults == []
        assert work.longest < LONGEST


async def test_openers_of_many_that_log_in_at_once_are_found(backend: FakeBackend) -> None:
    async with running(backend, witness=Witness()) as house, trio.open_nursery() as nursery, measured() as work:
        logged_in = []

        async def log_in() -> None:
            client = await house.connect(unix=True)
            await client.send(startup())
            await client.expect(LOGGED_IN)
            logged_in.append(client)

        for _ in range(MANY):
            nursery.start_soon(log_in)
        for _ in range(MANY):
            server = await backend.accept()
            await server.log_in()
        await until(lambda: len(logged_in) == MANY)
        await until(lambda: all(one.opening is not None for one in house.guard._sessions.values()))
        assert work.longest < LONGEST


async def test_many_that_are_refused_at_once_hold_up_nobody(
    backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = []

    def describing(*args: Any, **more: Any) -> Instance:
        described.append(args)
        return build_instance(*args, **more)

    monkeypatch.setattr("pgguard.proxy.judge.build_instance", describing)
    async with running(backend, witness=Witness()) as house, trio.open_nursery() as nursery, measured() as work:

        async def be_refused() -> None:
            client = await house.connect(unix=True)
            await client.send(startup())
            await client.expect(REFUSAL)
            await client.close()

        for _ in range(MANY):
            nursery.start_soon(be_refused)
        for _ in range(MANY):
            server = await backend.accept()
            await server.packet()
            await server.send(REFUSAL)
            await server.close()
        await until(lambda: sum(one.faults + one.repeats for one in house.docket.counts()) == MANY)
        assert set(house.kinds) == {"connection-exhaustion"}
        assert len(described) < len(house.faults), "who is only counted isn't described"
        assert work.longest < LONGEST
