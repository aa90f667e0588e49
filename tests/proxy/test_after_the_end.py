"""A session that is over, and a client that isn't: what it experiences is what it would without a guard."""

from __future__ import annotations

import socket
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import trio

from pgguard.attribution.witness import Witness
from tests.attribution.puppets import Puppet
from tests.proxy.conftest import House, running, until
from tests.proxy.messages import LOGGED_IN, SECONDS, TERMINATE, message, query, startup

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.proxy.fake_backend import BackendConnection, FakeBackend

SELECT = query("select 1")
GOODBYE = message("E", b"SFATAL\0VFATAL\0C57P01\0Mterminating connection due to administrator command\0\0")

CLIENT = f"""
import errno, select, time

def outcome(act):
    try:
        result = act()
    except OSError as error:
        return errno.errorcode[error.errno]
    return result.hex() if isinstance(result, bytes) else result

def hears():
    "Waits, and says what has come: bytes, or the end."
    select.select([c], [], [], {SECONDS})
    return outcome(lambda: c.recv(65536))

def says(data):
    result = outcome(lambda: c.send(data))
    time.sleep(0.3)  # for whoever is at the other end to say that it is over
    return result

def log_in(family, address):
    global c
    c = socket.socket(family)
    c.connect(address)
    c.sendall({startup()!r})
    while not c.recv(4096).endswith({LOGGED_IN[-6:]!r}):
        pass

def goes_on():
    "Says something twice when it has come to the end, and says how it was."
    last = b""
    while data := c.recv(65536):
        last += data
    return [last.hex(), says({SELECT!r}), hears(), says({SELECT!r}), hears()]

def child_does(act):
    "Has a child do something, and returns the result."
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writing, json.dumps(act()).encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as answers:
        result = json.loads(answers.read())
    os.waitpid(pid, 0)
    return pid, result
"""


@pytest.fixture
def application() -> Iterator[Puppet]:
    with Puppet() as application:
        application.do(CLIENT)
        yield application


@contextmanager
def directly(family: socket.AddressFamily, address: Any, *, goodbye: bool) -> Iterator[object]:
    """Run a server for one client, which ends the session when it is asked for anything, or told Terminate."""
    listener = socket.socket(family)

    def serve() -> None:
        accepted, _ = listener.accept()
        accepted.recv(4096)
        accepted.sendall(LOGGED_IN)
        assert accepted.recv(4096) == (SELECT if goodbye else TERMINATE)
        if goodbye:
            accepted.sendall(GOODBYE)
        accepted.close()

    with listener:
        listener.bind(address)
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()
        thread.join()


class Family:
    """A process that has logged in through the guard, and the server's end."""

    def __init__(self, house: House, application: Puppet, *, unix: bool) -> None:
        self._house = house
        self._application = application
        self._unix = unix
        self.server: BackendConnection

    async def do(self, code: str) -> Any:
        return await trio.to_thread.run_sync(self._application.do, code)

    async def log_in(self) -> None:
        address = (
            (socket.AF_UNIX, self._house.unix) if self._unix else (socket.AF_INET, ("127.0.0.1", self._house.port))
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.do, f"log_in({int(address[0])}, {address[1]!r})")
            self.server = await self._house.backend.accept()
            await self.server.log_in()

    async def end(self, *, goodbye: bool) -> None:
        """The session is ended by the server, as the process asks for something, or by the process."""
        said = SELECT if goodbye else TERMINATE
        await self.do(f"c.send({said!r})")
        await self.server.expect(said)
        if goodbye:
            await self.server.send(GOODBYE)
        await self.server.close()


by_either = pytest.mark.parametrize("goodbye", [False, True], ids=["terminate", "goodbye"])


def errors(house: House) -> list[str]:
    return [str(fault.kind) for fault in house.faults if fault.severity == "error"]


def experience(application: Puppet, family: socket.AddressFamily, address: Any, *, goodbye: bool) -> list[object]:
    """What the process experiences that goes on to use a connection to a server without a guard."""
    with directly(family, address, goodbye=goodbye) as at:
        application.do(f"log_in({int(family)}, {at!r})")
        application.do(f"c.send({SELECT if goodbye else TERMINATE!r})")
        found: list[object] = application.do("goes_on()")
    return found


@pytest.mark.parametrize("shared", [False, True])
@by_either
async def test_over_tcp_it_is_reset_as_soon_as_it_says_anything(
    backend: FakeBackend, application: Puppet, goodbye: bool, shared: bool
) -> None:
    expected = experience(application, socket.AF_INET, ("127.0.0.1", 0), goodbye=goodbye)
    assert expected[-2:] == ["EPIPE", ""]
    async with running(backend, witness=Witness()) as house:
        family = Family(house, application, unix=False)
        await family.log_in()
        if shared:
            await family.do("fork()")
        await family.end(goodbye=goodbye)
        assert await family.do("goes_on()") == expected
        await house.empty()
        assert errors(house) == []


async def test_a_child_that_says_goodbye_twice_at_once_is_dropped_twice(
    backend: FakeBackend, application: Puppet
) -> None:
    """The second was taken for the parent's own, and ended its session."""
    async with running(backend, witness=Witness(), kinds={"foreign-terminate": "drop"}) as house:
        family = Family(house, application, unix=True)
        await family.log_in()
        child, _ = await family.do(f"child_does(lambda: c.send({TERMINATE * 2!r}))")
        await house.recorded("foreign-terminate", "foreign-terminate")
        await family.do(f"c.send({SELECT!r})")
        await family.server.expect(SELECT)
        assert {fault.action for fault in house.faults} == {"dropped"}
        intruders = {one.pid for fault in house.faults for one in fault.culprits if one.role == "intruder"}
        assert intruders == {child}
        await family.end(goodbye=False)
        await house.empty()


@by_either
async def test_over_a_unix_socket_it_is_told_at_once_if_nobody_else_has_it_open(
    backend: FakeBackend, application: Puppet, short_directory: Path, goodbye: bool
) -> None:
    expected = experience(application, socket.AF_UNIX, str(short_directory / "s"), goodbye=goodbye)
    assert expected[1] == "EPIPE"
    async with running(backend, witness=Witness()) as house:
        family = Family(house, application, unix=True)
        await family.log_in()
        await family.end(goodbye=goodbye)
        await house.empty()
        assert await family.do("goes_on()") == expected
        assert errors(house) == []


@by_either
async def test_over_a_unix_socket_that_others_have_open_it_is_told_when_it_goes_on_to_write(
    backend: FakeBackend, application: Puppet, short_directory: Path, goodbye: bool
) -> None:
    """The first write succeeds, as it does over TCP: it is what tells who goes on. Nothing answers it."""
    expected = experience(application, socket.AF_UNIX, str(short_directory / "s"), goodbye=goodbye)
    async with running(backend, witness=Witness()) as house:
        family = Family(house, application, unix=True)
        await family.log_in()
        await family.do("fork()")
        await family.end(goodbye=goodbye)
        await until(lambda: bool(house.guard._sweep._endings.aftermath._listened))
        assert await family.do("goes_on()") == [expected[0], len(SELECT), *expected[2:]]
        await house.empty()
        assert errors(house) == []


# Who goes on


@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
async def test_a_child_that_goes_on_when_its_parent_has_said_terminate(
    backend: FakeBackend, application: Puppet, unix: bool
) -> None:
    async with running(backend, witness=Witness()) as house:
        family = Family(house, application, unix=unix)
        await family.log_in()
        await family.do("lingering = fork()")
        await family.end(goodbye=False)
        await until(lambda: bool(house.guard._sweep._endings.aftermath._listened))
        child, _ = await family.do(f"child_does(lambda: says({SELECT!r}))")
        await house.empty()
        if unix:
            await until(lambda: errors(house) == ["shared-by-processes"])
            [fault] = [fault for fault in house.faults if fault.severity == "error"]
            assert [one.pid for one in fault.culprits if one.role == "intruder"] == [child]
            assert (fault.action, fault.over) == ("logged", True)
        else:
            assert errors(house) == [], "over TCP nobody has said who it was, and the parent has it open still"


async def test_a_child_that_goes_on_when_the_server_has_ended_the_session(
    backend: FakeBackend, application: Puppet
) -> None:
    """It has had no part in it until then."""
    async with running(backend, witness=Witness()) as house:
        family = Family(house, application, unix=True)
        await family.log_in()
        await family.do("fork()")
        await family.end(goodbye=True)
        await until(lambda: bool(house.guard._sweep._endings.aftermath._listened))
        child, _ = await family.do(f"child_does(lambda: says({SELECT!r}))")
        await until(lambda: any(fault.message is not None for fault in house.faults))
        [fault] = [fault for fault in house.faults if fault.message is not None]
        assert (fault.kind, fault.culprits[0].pid) == ("inherited-connection", child)


@by_either
async def test_a_child_that_only_says_terminate_as_well(
    backend: FakeBackend, application: Puppet, goodbye: bool
) -> None:
    async with running(backend, witness=Witness()) as house:
        family = Family(house, application, unix=True)
        await family.log_in()
        await family.do("fork()")
        await family.end(goodbye=goodbye)
        await until(lambda: bool(house.guard._sweep._endings.aftermath._listened))
        await family.do(f"child_does(lambda: says({TERMINATE!r}))")
        await house.empty()
        assert [fault for fault in house.faults if fault.message is not None] == []


# Bounds


async def listened(house: House, application: Puppet) -> None:
    """Leave a connection behind that is listened to."""
    family = Family(house, application, unix=True)
    await family.log_in()
    await family.do("fork()")
    number = len(house.guard._sweep._endings.aftermath._listened)
    await family.end(goodbye=False)
    await until(lambda: len(house.guard._sweep._endings.aftermath._listened) != number or number == 2)


async def test_the_latest_are_listened_to(
    backend: FakeBackend, application: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgguard.proxy.aftermath._LISTENED", 2)
    async with running(backend, witness=Witness()) as house:
        for _ in range(3):
            await trio.to_thread.run_sync(
                application.do, "kept = globals().setdefault('kept', []); kept.append(globals().get('c'))"
            )
            await listened(house, application)
        await until(lambda: not any(one.facts.id == 1 for one in house.guard.snapshot()))
        await until(lambda: len(house.guard._sweep._endings.aftermath._listened) == 2)


async def test_nobody_is_listened_to_for_ever(
    backend: FakeBackend, application: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgguard.proxy.aftermath._LISTENING", 0.3)
    async with running(backend, witness=Witness()) as house:
        await listened(house, application)
        await house.empty()


async def test_a_guard_that_stops_does_not_wait_for_what_is_over(backend: FakeBackend, application: Puppet) -> None:
    async with running(backend, witness=Witness(), shutdown_timeout=100) as house:
        await listened(house, application)
        house.guard.stop()
        await house.empty()
