"""Which clients are kept waiting for a moment, to see where in their programs they connect: few, and not for long."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, cast

import pytest

from pgguard.attribution.evidence import Driver, Evidence, Process
from pgguard.attribution.frames import Frame
from pgguard.attribution.holders import Holders
from pgguard.attribution.runtime import Language, Runtime
from pgguard.attribution.sockets import UnixClient
from pgguard.attribution.witness import Opening, Witness
from pgguard.proxy import openers
from pgguard.proxy.openers import OpenerStacks
from pgguard.proxy.session import ProxiedSession

if TYPE_CHECKING:
    from collections.abc import Callable

FRAMES = (Frame("connect", "/srv/app.py", 7, application=True),)
BUDGET = 20.0
"""Seconds, as nothing is to depend on the time that it takes unless a test says so."""


class Seeing:
    """Takes the place of attribution: notes whom it was asked about."""

    def __init__(self) -> None:
        self.pids: list[int] = []
        self.answers: set[int] = set()
        """The Ruby processes that can be asked."""
        self.go_on = threading.Event()
        self.go_on.set()

    @property
    def asks_ruby(self) -> bool:
        return bool(self.answers)

    def can_ask(self, process: Process) -> bool:
        return process.pid in self.answers

    def opening_stack(
        self, opening: Opening, *, until: float, account: Callable[[float], None]
    ) -> tuple[Frame, ...] | None:
        assert opening.opener is not None
        assert until > time.monotonic()
        self.pids.append(opening.opener.pid)
        account(0.001)
        self.go_on.wait(30)
        return FRAMES


@pytest.fixture
def seeing(monkeypatch: pytest.MonkeyPatch) -> Seeing:
    monkeypatch.setattr(openers, "find_py_spy", lambda: "/usr/bin/py-spy")
    return Seeing()


def stacks(seeing: Seeing, budget: float = BUDGET) -> OpenerStacks:
    return OpenerStacks(cast("Witness", seeing), budget)


def opening(pid: int, *, named: bool = True) -> ProxiedSession:
    """A session whose opener nobody has found yet."""
    client = UnixClient(1, pid if named else None, 0.0)
    return ProxiedSession(1, transport="unix", client_name=None, client_socket=client, opened_at=0.0)


def opened(
    pid: int, program: str = "/srv/app.py", *, named: bool = True, runs: Language = Language.PYTHON
) -> ProxiedSession:
    session = opening(pid, named=named)
    assert session.client_socket is not None
    process = Process(pid, pid, 0.0, "python3", ("python3", program), 1)
    evidence = Evidence.KERNEL_SENDER if named else Evidence.SOLE_HOLDER
    session.opening = Opening(session.client_socket, 1, process, evidence, Holders(), Driver.LIBPQ, Runtime(runs))
    session.opening_known.set()
    return session


async def looks(where: OpenerStacks, *sessions: ProxiedSession) -> list[bool]:
    for session in sessions:
        if where.wants(session):
            await where.look(session)
    return [session.opening_stack == FRAMES for session in sessions]


async def test_of_a_process_the_first_connections_are_looked_at_and_then_fewer_and_fewer(seeing: Seeing) -> None:
    found = await looks(stacks(seeing), *(opened(4000) for _ in range(20)))
    assert [n for n, one in enumerate(found, 1) if one] == [1, 2, 4, 8, 16]


async def test_a_connection_that_was_not_looked_at_is_not_told_where_another_was_opened(seeing: Seeing) -> None:
    third = [opened(4000) for _ in range(3)][-1]
    where = stacks(seeing)
    await looks(where, opened(4000), opened(4000), third)
    assert third.opening_stack is None


async def test_of_a_program_so_many_processes_are_looked_at(seeing: Seeing) -> None:
    found = await looks(stacks(seeing), *(opened(4000 + n, f"/srv/app.py --job {n}") for n in range(20)))
    assert found == [True] * 8 + [False] * 12


async def test_another_program_is_looked_at_all_the_same(seeing: Seeing) -> None:
    where = stacks(seeing)
    await looks(where, *(opened(4000 + n) for n in range(20)))
    assert await looks(where, opened(5000, "/srv/other.py")) == [True]


@pytest.mark.parametrize("named", [True, False])
async def test_other_languages_are_left_alone(named: bool, seeing: Seeing) -> None:
    assert await looks(stacks(seeing), opened(4000, named=named, runs=Language.RUBY)) == [False]
    assert seeing.pids == []


@pytest.mark.parametrize("named", [True, False])
async def test_ruby_that_can_be_asked_is_looked_at(
    named: bool, seeing: Seeing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openers, "find_py_spy", lambda: None)
    seeing.answers = {4000}
    rubies = [opened(pid, named=named, runs=Language.RUBY) for pid in (4000, 4001)]
    assert await looks(stacks(seeing), *rubies, opened(4002, named=named)) == [True, False, False]


async def test_the_guards_own_process_is_left_alone(seeing: Seeing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getpid", lambda: 4000)
    assert await looks(stacks(seeing), opened(4000)) == [False]


async def test_without_a_budget_nobody_waits(seeing: Seeing) -> None:
    where = stacks(seeing, 0.0)
    assert await looks(where, opened(4000)) == [False]
    where.limit(BUDGET)
    assert await looks(where, opened(4000)) == [True]


async def test_without_py_spy_nobody_waits(seeing: Seeing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openers, "find_py_spy", lambda: None)
    assert await looks(stacks(seeing), opened(4000)) == [False]
    assert seeing.pids == []


async def test_a_client_whose_process_is_to_be_found_first_is_looked_at_too(seeing: Seeing) -> None:
    assert await looks(stacks(seeing), opened(4000, named=False), opened(4001, named=False)) == [True, True]


async def test_such_a_client_does_not_wait_where_that_has_led_to_nobody_new(seeing: Seeing) -> None:
    where = stacks(seeing)
    others = [opened(4000, named=False, runs=Language.RUBY) for _ in range(3)]
    await looks(where, others[0])
    assert await looks(where, opened(5000, named=False)) == [False]
    assert await looks(where, opened(5001)) == [True], "of one whose process is named it is known at once"


async def test_a_client_waits_no_longer_than_the_budget(seeing: Seeing) -> None:
    seeing.go_on.clear()
    session, began = opened(4000), time.monotonic()
    await stacks(seeing, 0.05).look(session)
    assert 0.05 <= time.monotonic() - began < 10
    seeing.go_on.set()
    assert session.opening_stack is None


async def test_who_can_not_be_found_costs_no_more_either(seeing: Seeing) -> None:
    session = opening(4000)
    await stacks(seeing, 0.05).look(session)
    assert session.opening_stack is None


async def test_looks_have_an_allowance(seeing: Seeing, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "_SHARE", "_SAVINGS":  # a look takes more than both, and leaves a debt for longer than the test takes
        monkeypatch.setattr(openers, name, 1e-6)
    where = stacks(seeing)
    assert await looks(where, opened(4000, "a"), opened(4001, "b")) == [True, False]


async def test_what_fails_costs_nothing_but_what_it_was_for(seeing: Seeing, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(seeing, "opening_stack", fail)
    assert await looks(stacks(seeing), opened(4000)) == [False]
