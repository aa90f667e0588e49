"""A burst gets through to the server as fast as that answers, and a server that doesn't answer keeps nobody waiting."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
import trio
import trio.lowlevel

from pgguard.proxy import gate as gates
from pgguard.proxy.addresses import TcpAddress, UnixAddress
from pgguard.proxy.dialling import is_on_this_host
from pgguard.proxy.gate import Gate
from tests.proxy.messages import LOGGED_IN, SECONDS, startup

if TYPE_CHECKING:
    from pgguard.proxy.addresses import Address
    from tests.proxy.conftest import House
    from tests.proxy.messages import Client

AT_ONCE = 64
PROCESSES = min(max(2, len(os.sched_getaffinity(0))), AT_ONCE)


class Crowd:
    """Clients at a gate, each of which goes in and, if it is answered, out after that many seconds."""

    def __init__(self, *, answered_after: float | None, shares_processors: bool = False) -> None:
        self._gate = Gate(lambda: self.slow.append(trio.current_time()), shares_processors=shares_processors)
        self._answered_after = answered_after
        self.slow: list[float] = []
        self.entered: list[tuple[float, int]] = []
        self.inside = self.most = 0

    async def come(self, size: int) -> None:
        async with trio.open_nursery() as keeping:
            keeping.start_soon(self._gate.keep)
            async with trio.open_nursery() as nursery:
                for number in range(size):
                    nursery.start_soon(self._come, number)
                    await trio.lowlevel.checkpoint()
            keeping.cancel_scope.cancel()

    async def _come(self, number: int) -> None:
        is_in = trio.Event()

        def go_in() -> None:
            self.entered.append((trio.current_time(), number))
            self.inside += 1
            self.most = max(self.most, self.inside)
            is_in.set()

        if self._gate.ask(number, go_in):
            go_in()
        await is_in.wait()
        if self._answered_after is not None:
            await trio.sleep(self._answered_after)
            self.inside -= 1
            self._gate.leave(number)
            self._gate.leave(number)


@pytest.mark.parametrize(("is_here", "at_once"), [(False, AT_ONCE), (True, PROCESSES)])
async def test_in_their_order_and_no_more_than_so_many_at_once(
    autojump_clock: object, is_here: bool, at_once: int
) -> None:
    del autojump_clock
    crowd = Crowd(answered_after=0.01, shares_processors=is_here)
    started = trio.current_time()
    await crowd.come(1000)
    assert crowd.most == at_once
    assert [number for _, number in crowd.entered] == list(range(1000))
    assert trio.current_time() - started < 1000 / at_once * 0.01 + 0.1
    assert not crowd.slow


async def test_a_server_that_does_not_answer_lets_so_many_through_each_second(autojump_clock: object) -> None:
    del autojump_clock
    crowd = Crowd(answered_after=None)
    started = trio.current_time()
    await crowd.come(5 * AT_ONCE)
    assert trio.current_time() - started < 4.5
    assert [number for _, number in crowd.entered] == list(range(5 * AT_ONCE))
    assert crowd.slow


async def test_a_server_here_that_waits_for_something_else_than_a_processor_is_given_more(
    autojump_clock: object,
) -> None:
    """It looks a name up for each, say: seconds for one, and none for a thousand more."""
    del autojump_clock
    crowd = Crowd(answered_after=0.9, shares_processors=True)
    started = trio.current_time()
    await crowd.come(20 * PROCESSES)
    assert trio.current_time() - started < 20 * 0.1 + 0.9 + 0.1
    assert [number for _, number in crowd.entered] == list(range(20 * PROCESSES))


async def test_a_loop_is_suspected_after_a_second_in_which_nobody_is_answered(autojump_clock: object) -> None:
    del autojump_clock
    crowd = Crowd(answered_after=None, shares_processors=True)
    started = trio.current_time()
    await crowd.come(20 * PROCESSES)
    assert [number for _, number in crowd.entered] == list(range(20 * PROCESSES))
    assert 1.0 <= crowd.slow[0] - started < 1.2


def test_what_is_on_this_host() -> None:
    here: list[Address] = [UnixAddress("/tmp", 5432)]
    here += [TcpAddress(host, 5432) for host in ("localhost", "127.0.0.1", "127.1.2.3", "::1")]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, suppress(OSError):
        sock.connect(("198.51.100.1", 9))  # the address from which the world is reached, if any is
        here.append(TcpAddress(sock.getsockname()[0], 5432))
    assert all(map(is_on_this_host, here))
    elsewhere = ["198.51.100.1", "2001:db8::1", "db.example", "localhost.example", "fe80::1%lo"]
    assert not any(is_on_this_host(TcpAddress(host, 5432)) for host in elsewhere)


@pytest.mark.parametrize("waits", [True, False])
async def test_who_gives_up_makes_way(waits: bool) -> None:
    """In line, cancelled; or of who asks and goes."""
    gate = Gate(lambda: None, shares_processors=False)
    for number in range(AT_ONCE):
        await gate.enter(number)
    if waits:
        with trio.move_on_after(0.01) as impatient:
            await gate.enter(1000)
        assert impatient.cancelled_caught
    else:
        assert not gate.ask(1000, lambda: None)
        gate.leave(1000)
    gate.leave(0)
    with trio.fail_after(SECONDS):
        await gate.enter(1001)


async def test_who_is_in_is_in() -> None:
    """Who looks up first where to go, and asks once more."""
    gate = Gate(lambda: None, shares_processors=False)
    for number in range(AT_ONCE):
        assert gate.ask(number, lambda: None)
    assert gate.ask(0, lambda: None)
    assert not gate.ask(1000, lambda: None)


@pytest.fixture
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long an answer takes, it is waited for."""
    monkeypatch.setattr(gates, "_PROCESS_PATIENCE", SECONDS)


@pytest.mark.usefixtures("_patient")
async def test_the_next_ones_are_introduced_when_the_first_have_been_answered(house: House) -> None:
    clients: list[Client] = []

    async def come() -> None:
        client = await house.connect()
        clients.append(client)
        await client.send(startup())

    for _ in range(PROCESSES + 3):
        await come()
    servers = [await house.backend.accept() for _ in range(PROCESSES)]
    await house.backend.accept_nobody()
    await servers[0].log_in()  # answered
    servers.append(await house.backend.accept())
    await clients[1].close()  # gone
    await servers[1].packet()
    assert await servers[1].rest() == b""
    await servers[1].close()
    servers.append(await house.backend.accept())
    await servers[2].close()  # refused
    servers.append(await house.backend.accept())
    await clients[0].expect(LOGGED_IN)
