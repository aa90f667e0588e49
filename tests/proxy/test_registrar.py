"""Who opened a connection is found out at a pace that leaves the relay its time, and at once where somebody waits."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, cast

import pytest
import trio

from pgguard.attribution.evidence import Driver, Evidence
from pgguard.attribution.holders import Holders
from pgguard.attribution.runtime import Runtime
from pgguard.attribution.witness import Opening, Witness
from pgguard.proxy import registrar as module
from pgguard.proxy.registrar import Registrar
from pgguard.proxy.session import ProxiedSession

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from pgguard.attribution.sockets import ClientSocket

FAR = 1_000_000.0


class Book(Witness):
    """Notes who is looked at together."""

    def __init__(self) -> None:
        self.looks: list[int] = []
        self.costs = 0.0

    def opened_many(self, clients: Sequence[ClientSocket]) -> list[Opening]:
        self.looks.append(len(clients))
        ends = time.thread_time() + self.costs
        while time.thread_time() < ends:
            pass
        return [
            Opening(client, None, None, Evidence.UNKNOWN, Holders(), Driver.UNKNOWN, Runtime()) for client in clients
        ]


def session(number: int) -> ProxiedSession:
    client = cast("ClientSocket", object())
    return ProxiedSession(number, transport="tcp", client_name=None, client_socket=client, opened_at=0.0)


@pytest.fixture
def book() -> Book:
    return Book()


@pytest.fixture
async def registrar(book: Book, nursery: trio.Nursery) -> AsyncIterator[Registrar]:
    registrar = Registrar(book, known=lambda _: None, give_way=lambda: None)
    nursery.start_soon(registrar.run)
    yield registrar
    nursery.cancel_scope.cancel()


def enroll(registrar: Registrar, *numbers: int) -> list[ProxiedSession]:
    sessions = [session(number) for number in numbers]
    for one in sessions:
        registrar.enroll(one)
    return sessions


async def known(*sessions: ProxiedSession) -> None:
    with trio.fail_after(30):
        for one in sessions:
            await one.opening_known.wait()


async def test_one_that_comes_alone_is_looked_at_as_it_comes(registrar: Registrar, book: Book) -> None:
    for number in range(3):
        [one] = enroll(registrar, number)
        await known(one)
        assert one.opening is not None
    assert book.looks == [1, 1, 1]


async def test_those_that_come_together_are_looked_at_together(registrar: Registrar, book: Book) -> None:
    await known(*enroll(registrar, *range(100)))
    assert book.looks == [100]


async def test_what_has_cost_too_much_is_made_up_for(registrar: Registrar, book: Book) -> None:
    """Those who come meanwhile wait, and are looked at together then; who has gone by then costs nothing."""
    book.costs = module._SAVINGS + 0.01
    await known(*enroll(registrar, 1))
    rested = trio.current_time()
    book.costs = 0.0
    later = enroll(registrar, *range(2, 100))
    for one in later[3:]:
        registrar.strike_off(one)
    await known(*later)
    assert book.looks == [1, 3]
    assert trio.current_time() - rested >= module._PAUSE * 0.9
    assert trio.current_time() - rested < 30


async def test_who_comes_and_goes_meanwhile_wakes_nobody(
    registrar: Registrar, book: Book, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PAUSE", FAR)
    monkeypatch.setattr(module, "_LONGEST_PAUSE", FAR)
    book.costs = module._SAVINGS + 0.01
    await known(*enroll(registrar, 1))
    [first] = enroll(registrar, 2)
    await trio.testing.wait_all_tasks_blocked()
    waits = registrar._changed
    for number in range(3, 1000):
        [one] = enroll(registrar, number)
        registrar.strike_off(one)
    await trio.testing.wait_all_tasks_blocked()
    assert registrar._changed is waits
    assert not waits.is_set()
    await first.wait_for_opening()
    assert book.looks == [1, 1]


async def test_who_is_waited_for_is_looked_at_at_once_and_the_others_wait_on(
    registrar: Registrar, book: Book, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registrar._allowance, "seconds_without", lambda: FAR)
    first, second, third = enroll(registrar, 1, 2, 3)
    with trio.fail_after(30):
        await second.wait_for_opening()
    assert second.opening is not None
    assert (first.opening, third.opening, book.looks) == (None, None, [1])


async def test_one_that_is_over_is_not_looked_at_unless_somebody_waits(
    registrar: Registrar, book: Book, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registrar._allowance, "seconds_without", lambda: FAR)
    first, second = enroll(registrar, 1, 2)
    registrar.strike_off(first)
    with trio.fail_after(30):
        await first.wait_for_opening()
    assert (first.opening, book.looks) == (None, [])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(second.wait_for_opening)
        await trio.testing.wait_all_tasks_blocked()
        registrar.strike_off(second)
    assert second.opening is not None


async def test_no_more_are_looked_at_together_than_a_thread_has_time_for(registrar: Registrar, book: Book) -> None:
    await known(*enroll(registrar, *range(module._AT_ONCE + 1)))
    assert book.looks == [module._AT_ONCE, 1]


async def test_a_look_that_fails_costs_only_what_it_would_have_told(
    registrar: Registrar, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Book, "opened_many", lambda *_: 1 / 0)
        [one] = enroll(registrar, 1)
        await known(one)
        assert one.opening is None
    [other] = enroll(registrar, 2)
    await known(other)
    assert other.opening is not None
