"""Who opened a connection is known at once where the kernel says it, however long it takes to look for that one."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import trio

from pgguard.attribution.ebpf.probe import ProbeUnavailable, SenderProbe
from pgguard.attribution.witness import Witness
from pgguard.proxy.investigation import known_at_once
from pgguard.session.verdicts import Kind
from tests.attribution.puppets import THREADS, Puppet
from tests.faults.samples import verdict
from tests.proxy.conftest import running, until
from tests.proxy.messages import LOGGED_IN, TERMINATE, startup

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.proxy.conftest import House
    from tests.proxy.fake_backend import BackendConnection, FakeBackend


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nobody gets to the end of a walk through all processes."""
    go_on = threading.Event()

    def hang(*_: Any, **__: Any) -> Any:
        go_on.wait(30)
        raise TimeoutError

    for method in ("opened_many", "findings"):
        monkeypatch.setattr(Witness, method, hang)
    yield
    go_on.set()


@pytest.fixture(params=["tcp", "unix"])
def house_address(request: pytest.FixtureRequest) -> str:
    if request.param == "tcp":
        try:
            SenderProbe([]).close()
        except ProbeUnavailable as unavailable:
            pytest.skip(str(unavailable))
    return str(request.param)


def connecting(house: House, transport: str) -> str:
    address = repr(house.unix) if transport == "unix" else f"('127.0.0.1', {house.port})"
    family = "socket.AF_UNIX" if transport == "unix" else "socket.AF_INET"
    return f"c = socket.socket({family}); c.connect({address}); c.sendall({startup()!r})"


async def log_in(house: House, application: Puppet, transport: str) -> BackendConnection:
    await trio.to_thread.run_sync(application.do, THREADS + connecting(house, transport))
    server = await house.backend.accept()
    await server.log_in()
    await trio.to_thread.run_sync(application.do, f"len(c.recv({len(LOGGED_IN)}, socket.MSG_WAITALL))")
    return server


@pytest.mark.usefixtures("blind")
@pytest.mark.parametrize("child_says", [TERMINATE, b""], ids=["terminate", "nothing"])
async def test_a_goodbye_is_foreign_though_nobody_has_found_the_opener(
    backend: FakeBackend, house_address: str, child_says: bytes
) -> None:
    """The opener's own is nobody's fault."""
    with Puppet() as application:
        async with running(backend, witness=Witness(), evidence_budget=0.25) as house:
            with SenderProbe(house.guard.tcp_listeners(), blocking=True) as probe:
                house.guard.use_probe(probe)
                server = await log_in(house, application, house_address)
                [session] = house.guard._sessions.values()
                assert session.opening is None
                known = known_at_once(session, verdict(Kind.UNREAD_ANSWER))
                assert (known.opener_pid, known.opener) == (application.pid, None)
                if child_says:
                    child = await trio.to_thread.run_sync(application.do, f"fork(lambda: c.sendall({child_says!r}))")
                    await until(lambda: bool(house.faults))
                    [fault] = house.faults
                    assert fault.kind == "foreign-terminate"
                    roles = {(str(one.role), one.pid, str(one.evidence)) for one in fault.culprits}
                    assert {
                        ("intruder", child, "kernel-sender"),
                        ("owner", application.pid, "kernel-sender"),
                    } <= roles
                    assert fault.story[0].pid == application.pid
                else:
                    await trio.to_thread.run_sync(application.do, f"c.sendall({TERMINATE!r})")
                await server.expect(TERMINATE)
                if not child_says:
                    assert house.faults == []
