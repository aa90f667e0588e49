"""Faults that come while one like them is looked into: they wait for nothing, and are counted with it."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import trio

from pgguard.attribution.witness import Witness
from pgguard.faults.conclude import conclude
from pgguard.faults.policy import Mode
from pgguard.proxy.alike import Alike, Waiting
from pgguard.proxy.turns import Desk
from pgguard.session.verdicts import Kind, Refusal
from tests.proxy.conftest import running, until
from tests.proxy.messages import SECONDS, query

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from pgguard.attribution.findings import Findings
    from pgguard.session.verdicts import Verdict
    from tests.proxy.conftest import House
    from tests.proxy.fake_backend import BackendConnection, FakeBackend
    from tests.proxy.messages import Client

OTHERS = 5


class SlowWitness(Witness):
    """Looks at who has a connection open only when the test lets it, and marks what it has found."""

    def __init__(self) -> None:
        super().__init__()
        self.may_look = threading.Event()
        self.looks = 0

    def findings(self, *args: Any, **more: Any) -> Findings:
        self.looks += 1
        assert self.may_look.wait(SECONDS)
        return replace(super().findings(*args, **more), was_reset=True)


@pytest.fixture
def witness() -> SlowWitness:
    return SlowWitness()


@pytest.fixture(autouse=True)
def _there_is_a_crowd(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that there is no time to look into each of those that a look may make something else of."""
    monkeypatch.setattr(Desk, "is_crowded", True)


@pytest.fixture
async def house(backend: FakeBackend, witness: SlowWitness) -> AsyncIterator[House]:
    async with running(backend, witness=witness) as house:
        yield house
        witness.may_look.set()


Session = tuple["Client", "BackendConnection"]


async def busy(house: House) -> Session:
    """A session in which an answer is due, of a client that is known."""
    client, server = await house.session(unix=True)
    await client.send(query("select 1"))
    await server.expect(query("select 1"))
    await until(lambda: all(one.opening is not None for one in house.guard._sessions.values()))
    return client, server


async def misuse(house: House, witness: SlowWitness) -> list[Session]:
    """Have one misused, and when that is being looked into the others; return all of them."""
    sessions = [await busy(house) for _ in range(1 + OTHERS)]
    await sessions[0][0].send(query("select 2"))
    await until(lambda: witness.looks == 1)
    for client, _ in sessions[1:]:
        await client.send(query("select 2"))
    return sessions


def counts(house: House) -> dict[str, int]:
    found: dict[str, int] = {}
    for one in house.docket.counts():
        found[str(one.kind)] = found.get(str(one.kind), 0) + one.faults + one.repeats
    return found


async def test_one_of_many_is_looked_into_and_the_others_wait_for_nothing(house: House, witness: SlowWitness) -> None:
    (_, held), *others = await misuse(house, witness)
    for _, server in others:
        await server.expect(query("select 2"))
    await held.nothing()
    assert house.faults == []
    witness.may_look.set()
    await held.expect(query("select 2"))
    await until(lambda: counts(house) == {"request-while-busy": 1 + OTHERS})
    assert witness.looks == 1
    first = house.faults[0]
    assert first.repeat_of is None
    assert [told.spread.sessions for told in house.docket.causes()] == [1 + OTHERS]
    # What they did is known of each of them from now on.
    for client, server in others:
        await client.send(query("select 3"))
        await server.expect(query("select 3"))
    assert counts(house) == {"request-while-busy": 1 + 2 * OTHERS}
    assert witness.looks == 1


async def test_the_same_session_may_do_it_several_times_meanwhile(house: House, witness: SlowWitness) -> None:
    _, (client, server), *_ = await misuse(house, witness)
    await server.expect(query("select 2"))
    for _ in range(3):
        await client.send(query("select 3"))
        await server.expect(query("select 3"))
    witness.may_look.set()
    await until(lambda: counts(house) == {"request-while-busy": 1 + OTHERS + 3})
    assert [(one.faults, one.repeats) for one in house.docket.counts()] == [(1 + OTHERS, 3)]


async def test_nothing_is_left_of_those_that_have_ended_meanwhile(house: House, witness: SlowWitness) -> None:
    (_, held), *others = await misuse(house, witness)
    for client, server in others:
        await server.expect(query("select 2"))
        await server.close()
        await client.close()
    await until(lambda: len(house.guard.snapshot()) == 1)
    witness.may_look.set()
    await held.expect(query("select 2"))
    await until(lambda: counts(house).get("request-while-busy") == 1 + OTHERS)
    assert len(house.docket._sessions) == 1


async def test_what_is_different_is_looked_into_for_itself(house: House, witness: SlowWitness) -> None:
    _, *others = await misuse(house, witness)
    client, server = await busy(house)
    await client.close()
    await until(lambda: witness.looks == 2)
    for _, other in others:
        await other.expect(query("select 2"))
    witness.may_look.set()
    await server.rest()
    await server.close()
    await until(lambda: counts(house) == {"request-while-busy": 1 + OTHERS, "unclean-close": 1})


async def test_if_the_first_turns_out_to_be_something_else_the_others_are_told_for_themselves(
    house: House, witness: SlowWitness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As two of its threads are seen to wait: nobody has looked at the threads of the others."""

    def concluded(verdict: Verdict, findings: Findings) -> Verdict | None:
        if findings.was_reset:
            return replace(verdict, kind=Kind.SHARED_BY_THREADS)
        return conclude(verdict, findings)

    monkeypatch.setattr("pgguard.proxy.judge.conclude", concluded)
    await misuse(house, witness)
    witness.may_look.set()
    await until(lambda: counts(house) == {"shared-by-threads": 1, "request-while-busy": OTHERS})
    assert [told.spread.sessions for told in house.docket.causes()] == [OTHERS, 1]


async def test_who_is_to_be_rejected_waits_for_a_ruling_of_its_own(backend: FakeBackend, witness: SlowWitness) -> None:
    kinds = {"request-while-busy": "reject"}
    async with running(backend, witness=witness, kinds=kinds) as house:
        sessions = await misuse(house, witness)
        for _, server in sessions:
            await server.nothing()
        witness.may_look.set()
        for client, server in sessions:
            assert (await client.message()).fields["C"] == "08P01"
            assert await server.rest() == b""
            await server.close()
        assert counts(house) == {"request-while-busy": 1 + OTHERS}


async def test_where_there_is_time_to_look_each_is_looked_into_that_may_be_something_else(
    house: House, witness: SlowWitness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Desk, "is_crowded", False)
    first, second = [await busy(house) for _ in range(2)]
    for client, _ in (first, second):
        await client.send(query("select 2"))
    await until(lambda: witness.looks == 2)
    witness.may_look.set()
    for _, server in (first, second):
        await server.expect(query("select 2"))
    await until(lambda: counts(house) == {"request-while-busy": 2})


async def test_what_was_let_go_on_is_recorded_as_that_whatever_the_settings_are_by_then(
    house: House, witness: SlowWitness
) -> None:
    (first, held), *others = await misuse(house, witness)
    for _, server in others:
        await server.expect(query("select 2"))
    strict = house.guard._settings.model_copy(update={"mode": Mode.REJECT})
    house.guard.reload(strict)
    witness.may_look.set()
    assert (await first.message()).fields["C"] == "08P01"
    assert await held.rest() == b""
    await held.close()
    await until(lambda: counts(house) == {"request-while-busy": 1 + OTHERS})
    actions = {(str(one.action), one.faults) for one in house.docket.counts()}
    assert actions == {("rejected", 1), ("logged", OTHERS)}


async def test_the_first_one_goes_on_before_the_others_are_counted(
    house: House, witness: SlowWitness, monkeypatch: pytest.MonkeyPatch
) -> None:
    (_, held), *_ = await misuse(house, witness)
    may_count = trio.Event()

    async def openers(*_: Any) -> dict[int, Any]:
        await may_count.wait()
        return {}

    monkeypatch.setattr(house.guard._judge, "_look_at_openers", openers)
    witness.may_look.set()
    await held.expect(query("select 2"))
    assert counts(house) == {"request-while-busy": 1}
    may_count.set()
    await until(lambda: counts(house) == {"request-while-busy": 1 + OTHERS})


async def test_they_are_counted_though_the_guard_ends(backend: FakeBackend, witness: SlowWitness) -> None:
    async with running(backend, witness=witness) as house:
        _, *others = await misuse(house, witness)
        for _, server in others:
            await server.expect(query("select 2"))
    witness.may_look.set()
    assert counts(house)["request-while-busy"] >= OTHERS


# By itself

LIKENESS = Refusal(None, "one")


def test_nobody_joins_but_those_that_are_like_one_that_is_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgguard.proxy.alike.WAITING", 2)
    alike = Alike()
    one: Waiting = ...  # type: ignore[assignment]
    assert not alike.join(LIKENESS, one)
    for _ in range(2):
        with alike.leading(LIKENESS) as waiting:
            assert not alike.join(Refusal(None, "another"), one)
            assert alike.join(LIKENESS, one)
            with alike.leading(LIKENESS) as nobody:
                assert alike.join(LIKENESS, one)
                assert not alike.join(LIKENESS, one), "too many wait"
            assert not nobody
            with alike.leading(None) as nobody:
                pass
            assert not nobody
        assert list(waiting) == [one, one]
        assert not alike.join(LIKENESS, one)
        alike.release()
        alike.release()
