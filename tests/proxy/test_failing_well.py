"""Whatever breaks inside the guard, the bytes get through."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import trio

from pgguard.attribution.witness import Witness
from pgguard.faults.docket import Docket
from pgguard.proxy.judge import Judge
from pgguard.proxy.session import ProxiedSession
from pgguard.reporting.record import to_record
from pgguard.reporting.sinks import Fanout
from pgguard.session.tracker import Tracker
from tests.proxy.conftest import House, fail_to_read, running, until
from tests.proxy.messages import ANSWER, COLUMNS, FAILED, TERMINATE, message, query

if TYPE_CHECKING:
    from tests.proxy.fake_backend import BackendConnection, FakeBackend
    from tests.proxy.messages import Client


def fail(*_: Any, **__: Any) -> Any:
    raise RuntimeError("injected")


@pytest.fixture
def rule(monkeypatch: pytest.MonkeyPatch) -> trio.Event:
    """No ruling is made before this."""
    event = trio.Event()
    ruled = Judge.rule

    async def wait(self: Judge, *args: Any) -> Any:
        await event.wait()
        return await ruled(self, *args)

    monkeypatch.setattr(Judge, "rule", wait)
    return event


async def converse(client: Client, server: BackendConnection) -> None:
    await client.send(query("select 1"))
    await server.expect(query("select 1"))
    await server.send(ANSWER)
    await client.expect(ANSWER)


def break_tracker(session: ProxiedSession) -> None:
    """Have a session's tracker raise IndexError at the next message: it is in a state that doesn't exist."""
    assert session.tracker is not None
    session.tracker.ledger.state = 1000


@pytest.mark.parametrize("stream", ["frontend", "backend"])
@pytest.mark.parametrize("mode", ["log", "reject"])
async def test_a_tracker_that_fails(backend: FakeBackend, mode: str, stream: str) -> None:
    async with running(backend, mode=mode) as house:
        client, server = await house.session()
        [session] = house.guard._sessions.values()
        if stream == "backend":
            await client.send(query("select 1"))
            await server.expect(query("select 1"))
            break_tracker(session)
            await server.send(ANSWER)
            await client.expect(ANSWER)
        else:
            break_tracker(session)
        await converse(client, server)
        await converse(client, server)
        await client.close()
        assert await server.rest() == b""
        await house.recorded("untracked")


@pytest.mark.parametrize("who", ["client", "server"])
async def test_a_tracker_that_fails_in_the_end(house: House, who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    other = await house.session()
    client, server = await house.session()
    monkeypatch.setattr(Tracker, "frontend_eof", fail)
    monkeypatch.setattr(Tracker, "backend_eof", fail)
    await (client.close() if who == "client" else server.close())
    await (server.rest() if who == "client" else client.rest())
    await house.recorded("untracked")
    await converse(*other)


async def test_a_fault_of_which_nothing_can_be_said_is_recorded_plainly(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, server = await house.session()
    monkeypatch.setattr("pgguard.proxy.judge.build_fault", fail)
    await server.send(COLUMNS)
    await client.expect(COLUMNS)
    [session] = house.guard._sessions.values()
    break_tracker(session)
    await converse(client, server)
    await client.send(TERMINATE)
    await server.expect(TERMINATE)
    await house.recorded("message-while-idle", "untracked")
    record = to_record(house.faults[0])
    assert (record["session"]["id"], record["message"]["name"]) == (1, "RowDescription")
    assert (record["severity"], record["action"]) == ("error", "logged")


@pytest.mark.parametrize("broken", ["build_fault", "conclude", "severity_of", "rejection", "known_at_once", "facts"])
async def test_what_fails_on_the_way_to_a_record_changes_nothing_about_a_rejection(
    backend: FakeBackend, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if broken == "facts":
        monkeypatch.setattr(ProxiedSession, "facts", fail)
    else:
        monkeypatch.setattr(f"pgguard.proxy.judge.{broken}", fail)
    async with running(backend, mode="reject") as house:
        await is_rejected(house)


@pytest.mark.parametrize("method", ["known", "enter", "equate"])
async def test_a_docket_that_fails_changes_nothing_about_a_rejection(
    backend: FakeBackend, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Docket, method, fail)
    async with running(backend, mode="reject") as house:
        await is_rejected(house)


async def test_threads_that_can_not_be_started_change_nothing_about_a_rejection(
    backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("can't start new thread")

    async with running(backend, witness=Witness(), mode="reject") as house:
        monkeypatch.setattr(trio.to_thread, "run_sync", refuse)
        await is_rejected(house)


async def is_rejected(house: House) -> None:
    """A client that sends what has no place is told so, and it is recorded."""
    client, server = await house.session(unix=True)
    await client.send(query("select pg_sleep(60)"))
    await server.expect(query("select pg_sleep(60)"))
    await client.send(message("p", b"out of place\0"))
    assert (await client.message()).fields["C"] == "08P01"
    assert await server.rest() == b""
    assert [(str(fault.kind), str(fault.action)) for fault in house.faults] == [("protocol-violation", "rejected")]


async def test_a_ruling_that_fails_is_made_plainly(backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Judge, "rule", fail)
    async with running(backend, mode="reject") as house:
        await is_rejected(house)


async def test_an_error_that_nobody_foresaw_costs_one_session(house: House) -> None:
    other = await house.session()
    client, _ = await house.session()
    session = max(house.guard._sessions.values(), key=lambda one: one.id)
    fail_to_read(session.client, ZeroDivisionError("injected"))
    await client.send(query("select 1"))
    await client.rest()
    await converse(*other)


async def test_a_sink_that_fails(backend: FakeBackend) -> None:
    class Broken:
        record = fail
        close = fail

    async with running(backend, sinks=Fanout([Broken()], complain=fail)) as house:
        client, server = await house.session()
        await server.send(COLUMNS)
        await client.expect(COLUMNS)
        await converse(client, server)


@pytest.mark.parametrize("budget", [0.0, 1.0])
async def test_a_session_is_held_for_as_long_as_the_budget_says(
    backend: FakeBackend, budget: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    def hang(*_: Any, **__: Any) -> None:
        go_on.wait(30)

    monkeypatch.setattr(Witness, "findings", hang)
    try:
        async with running(backend, witness=Witness(), evidence_budget=budget) as house:
            client, server = await house.session(unix=True)
            [session] = house.guard._sessions.values()
            await session.opening_known.wait()
            started = time.monotonic()
            await server.send(COLUMNS)
            await client.expect(COLUMNS)
            held = time.monotonic() - started
            await house.recorded("message-while-idle")
    finally:
        go_on.set()
    assert budget <= held < budget + 10


@pytest.mark.parametrize("method", ["opened_many", "watch", "findings", "sender", "waits", "runtimes"])
async def test_a_witness_that_fails(backend: FakeBackend, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Witness, method, fail)
    monkeypatch.setattr("pgguard.proxy.watch._EARLY_INTERVAL", 0.01)
    async with running(backend, witness=Witness()) as house:
        client, server = await house.session(unix=True)
        await server.send(COLUMNS)
        await client.expect(COLUMNS)
        await converse(client, server)
        await trio.sleep(0.05)
        await converse(client, server)


HANGS = 30.0
"""Seconds for which a witness doesn't answer; the guard waits for a fraction of one."""


@pytest.mark.parametrize("method", ["opened_many", "watch", "findings", "sender", "waits", "runtimes"])
async def test_a_witness_that_hangs(backend: FakeBackend, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It delays a session by no more than the budget, and neither the other sessions nor the guard's end at all."""
    go_on = threading.Event()

    def hang(*_: Any) -> None:
        go_on.wait(HANGS)

    monkeypatch.setattr(Witness, method, hang)
    monkeypatch.setattr("pgguard.proxy.watch._EARLY_INTERVAL", 0.01)
    try:
        async with running(backend, witness=Witness(), evidence_budget=0.25) as house:
            client, server = await house.session(unix=True)
            started = time.monotonic()
            await server.send(COLUMNS)
            await client.expect(COLUMNS)
            assert time.monotonic() - started < HANGS / 2
            await converse(client, server)
            await until(lambda: house.kinds == ["message-while-idle"])
            started = time.monotonic()
        assert time.monotonic() - started < HANGS / 2
    finally:
        go_on.set()


@pytest.mark.parametrize("method", ["opened_many", "findings", "sender", "waits", "runtimes", "holding"])
@pytest.mark.parametrize("how", ["fails", "hangs"])
async def test_evidence_that_can_not_be_had_changes_nothing_about_a_rejection(
    backend: FakeBackend, how: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(Witness, method, fail if how == "fails" else lambda *_, **__: go_on.wait(HANGS))
    try:
        async with running(backend, witness=Witness(), evidence_budget=0.25, mode="reject") as house:
            client, server = await house.session(unix=True)
            await client.send(query("select pg_sleep(60)"))
            await server.expect(query("select pg_sleep(60)"))
            await client.send(message("p", b"out of place\0"))
            assert (await client.message()).fields["C"] == "08P01"
            await client.expect(FAILED)
            assert await server.rest() == b""
            assert [str(fault.action) for fault in house.faults] == ["rejected"]
    finally:
        go_on.set()


async def test_what_is_judged_waits_and_nothing_else_does(backend: FakeBackend, rule: trio.Event) -> None:
    """Until the ruling nothing moves that the server sends; what its client sends does, and all that is others'."""
    async with running(backend) as house:
        other = await house.session()
        client, server = await house.session()
        await server.send(COLUMNS + ANSWER)
        await client.nothing()
        await client.send(query("select 1"))
        await server.expect(query("select 1"))
        await client.nothing()
        for _ in range(10):
            await converse(*other)
        rule.set()
        await client.expect(COLUMNS + ANSWER)
        await server.send(ANSWER)
        await client.expect(ANSWER)
        await converse(client, server)


async def test_answers_come_as_they_are_while_a_request_is_judged(house: House, rule: trio.Event) -> None:
    """Kept back with the request, and let go with its own answer, two readers' answers would reach one of them."""
    client, server = await house.session()
    await client.send(query("select 1"))
    await server.expect(query("select 1"))
    await client.send(query("select 2"))
    await server.nothing()
    await server.send(ANSWER)
    await client.expect(ANSWER)
    rule.set()
    await server.expect(query("select 2"))
    await server.send(ANSWER)
    await client.expect(ANSWER)


async def test_a_server_that_ends_while_a_request_is_judged(house: House, rule: trio.Event) -> None:
    """Its end is passed on at once; the ruling finds nothing to go on with, and leaves nothing behind."""
    client, server = await house.session()
    await client.send(query("select 1"))
    await server.expect(query("select 1"))
    await client.send(query("select 2"))
    await server.nothing()
    await server.close()
    assert (await client.message()).fields["C"] == "08006"
    await client.close()
    await house.empty()
    rule.set()
    await house.recorded("request-while-busy")
    await until(lambda: not house.docket._sessions)


async def test_a_client_that_ends_while_an_answer_is_judged(house: House, rule: trio.Event) -> None:
    client, server = await house.session()
    await server.send(COLUMNS)
    await client.nothing()
    await client.reset()
    rule.set()
    assert await server.rest() == b""
    await server.close()
    await house.empty()
    await house.recorded("message-while-idle")
    await until(lambda: not house.docket._sessions)


@pytest.mark.parametrize("stopped", [True, False], ids=["stopped", "cancelled"])
async def test_a_guard_that_ends_while_a_session_is_judged(
    backend: FakeBackend, stopped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*_: Any) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(Judge, "rule", never)
    async with running(backend, shutdown_timeout=0) as house:
        client, server = await house.session()
        await server.send(COLUMNS)
        await client.nothing()
        if stopped:
            house.guard.stop()
            assert (await client.message()).fields["C"] == "57P01"
            assert await client.rest() == b""
            await house.empty()
    assert await server.rest() == b""
    await house.empty()


@pytest.mark.parametrize("method", ["sample", "look"])
@pytest.mark.parametrize("how", ["raises", "hangs"])
async def test_a_witness_that_fails_to_see_who_sends_costs_a_contested_session_nothing(
    backend: FakeBackend, method: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each request is held back for no longer than the budget, and then arrives complete and in order."""
    go_on = threading.Event()

    def hang(*_: Any, **__: Any) -> Any:
        go_on.wait(HANGS)

    monkeypatch.setattr(Witness, method, fail if how == "raises" else hang)
    monkeypatch.setattr("pgguard.proxy.watch._EARLY", 0)
    monkeypatch.setattr("pgguard.proxy.watch._HEIRS_INTERVAL", 1000)  # nobody looks who contests it: the test says so
    try:
        async with running(backend, witness=Witness()) as house:
            client, server = await house.session()
            [session] = house.guard._sessions.values()
            await session.opening_known.wait()
            session.client.contest(True)
            started = time.monotonic()
            for n in range(5):
                request = query(f"select {n}" + " " * 300_000)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(client.send, request)
                    await server.expect(request)
                await server.send(ANSWER)
                await client.expect(ANSWER)
            assert time.monotonic() - started < HANGS
            await client.send(TERMINATE)
            await server.expect(TERMINATE)
    finally:
        go_on.set()
