"""A guard inside the test's own process, between a client and a server that are both in the test's hands."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
import trio

from pgguard.faults.docket import Docket
from pgguard.proxy.addresses import TcpAddress, UnixAddress
from pgguard.proxy.ends import End
from pgguard.proxy.guard import Guard
from pgguard.proxy.settings import Settings
from pgguard.reporting.sinks import Fanout
from tests.proxy.fake_backend import BackendConnection, FakeBackend
from tests.proxy.messages import SECONDS, Client
from tests.proxy.tls_backend import TlsBackend
from tests.proxy.tls_client import start_tls
from tests.tls.certificates import Authority

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from pgguard.attribution.witness import Witness
    from pgguard.faults.fault import Fault
    from pgguard.proxy.ends import Socket
    from pgguard.proxy.sockets import Epoll
    from tests.tls.certificates import Pair


class ListSink:
    """Keeps the faults for the test to look at."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []

    def record(self, fault: Fault) -> None:
        self.faults.append(fault)

    def close(self) -> None:
        pass


class House:
    """A guard and the fake server behind it."""

    def __init__(self, guard: Guard, backend: FakeBackend, sink: ListSink, docket: Docket, tcp: int, unix: str) -> None:
        self.guard = guard
        self.backend = backend
        self.faults = sink.faults
        self.docket = docket
        self.port = tcp
        self.unix = unix
        """The path of its socket."""

    async def connect(self, *, unix: bool = False) -> Client:
        client = await (Client.connect_unix(self.unix) if unix else Client.connect(self.port))
        self.backend.keep(client)
        if self.backend.encrypts and not unix:
            client, _ = await start_tls(client)
        return client

    async def session(self, *, unix: bool = False) -> tuple[Client, BackendConnection]:
        """A session that has logged in."""
        client = await self.connect(unix=unix)
        return client, await self.backend.let_in(client)

    @property
    def kinds(self) -> list[str]:
        return [str(fault.kind) for fault in self.faults]

    async def recorded(self, *kinds: str) -> None:
        """Wait until exactly these faults have been recorded."""
        await until(lambda: len(self.kinds) >= len(kinds))
        assert self.kinds == list(kinds)

    async def empty(self) -> None:
        """Wait until no session is left, and nothing of any."""
        await until(lambda: not self.guard.snapshot())
        sweep = self.guard._sweep
        assert not [whose for whose in kept_by(sweep._epoll) if isinstance(whose, End)]
        assert not sweep._endings._sessions


def kept_by(epoll: Epoll) -> list[object]:
    """What it has been given with descriptors, in either form, and what else it keeps."""
    kept = gc.get_referents(epoll)
    return [*kept, *(whose for one in kept if isinstance(one, dict) for whose in one.values())]


def fail_to_read(end: End, error: Exception) -> None:
    """Have the relay's reading of one end of a session fail from now on."""

    def receive(_sock: Socket, _size: int) -> NoReturn:
        raise error

    end.receive_from = end.receive_named_from = receive


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        await trio.sleep(0.005)


async def at_rest(spent: Callable[[], float]) -> None:
    """Wait until what has to do nothing takes next to none of the processor's time, which it has spent so far.

    Something that is reported to it again and again never does.
    """
    deadline = time.monotonic() + SECONDS
    while True:
        before = spent()
        await trio.sleep(0.5)
        if (took := spent() - before) < 0.05:
            return
        assert time.monotonic() < deadline, f"it takes {took} s of half a second"


@asynccontextmanager
async def running(
    backend: FakeBackend | None = None, *, witness: Witness | None = None, sinks: Fanout | None = None, **settings: Any
) -> AsyncIterator[House]:
    """Run a guard in front of ``backend``, or of what the settings name; leaving the context cancels it.

    It has time for evidence, so that what it says of a fault is the same on a busy machine.
    """
    sink = ListSink()
    with tempfile.TemporaryDirectory(prefix="pgguard-test-") as directory:
        if backend is None:
            backend = FakeBackend()
            backend.close()
        defaults: dict[str, Any] = {"listen": ["127.0.0.1:0", f"unix:{directory}:1"], "evidence_budget": 5.0}
        settings = backend.settings | defaults | settings
        docket = Docket()
        guard = Guard(
            Settings(**settings), sinks=sinks or Fanout([sink], complain=print), docket=docket, witness=witness
        )
        addresses = await guard.listen()
        tcp = [address.port for address in addresses if isinstance(address, TcpAddress)]
        unix = [address.path for address in addresses if isinstance(address, UnixAddress)]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guard.serve)
            house = House(guard, backend, sink, docket, (*tcp, 0)[0], (*unix, "")[0])
            try:
                yield house
            finally:
                nursery.cancel_scope.cancel()


Serve = Callable[..., Awaitable[House]]


plain_and_encrypted = pytest.mark.parametrize("backend", ["plain", "tls"], indirect=True)
"""Plays something without TLS, and with TLS on both sides."""


@pytest.fixture
async def backend(request: pytest.FixtureRequest) -> AsyncIterator[FakeBackend]:
    is_plain = getattr(request, "param", "plain") == "plain"
    backend = FakeBackend() if is_plain else TlsBackend(request.getfixturevalue("pair"))
    await backend.listen()
    yield backend
    await backend.close_all()


@pytest.fixture
async def house(backend: FakeBackend) -> AsyncIterator[House]:
    """A guard in ``log`` mode."""
    async with running(backend) as house:
        yield house


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"), "authority")


@pytest.fixture(scope="module")
def pair(authority: Authority) -> Pair:
    """A server's certificate, and its key."""
    return authority.issue("server", "server", ("localhost", "127.0.0.1"))


@pytest.fixture
def empty_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A home directory without libpq's files."""
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture(autouse=True)
def _no_socket_is_left_open() -> Iterator[None]:
    """A socket that is left for the garbage collector is warned about, and warnings are errors."""
    before = len(_descriptors())
    yield
    deadline = time.monotonic() + SECONDS  # a thread that was abandoned may have one open for a moment
    while len(now := _descriptors()) > before:
        assert time.monotonic() < deadline, now
        gc.collect()
        time.sleep(0.01)


def _descriptors() -> dict[str, str]:
    """What each open descriptor is."""
    found = {}
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile, as the one is that lists them
            found[link.name] = str(link.readlink())
    return found


@pytest.fixture
def short_directory() -> Iterator[Path]:
    """Not pytest's tmp_path: the path of a Unix socket has at most 107 bytes, unix(7)."""
    with tempfile.TemporaryDirectory(prefix="pgguard-test-") as name:
        yield Path(name)
