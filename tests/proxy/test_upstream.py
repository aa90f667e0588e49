"""Where PostgreSQL is, and getting there."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio

from pgguard.proxy.addresses import TcpAddress, UnixAddress, Upstream, parse_upstream
from pgguard.proxy.errors import ConfigurationError
from pgguard.proxy.upstream import UpstreamUnavailable, connect_upstream, relay_cancel
from tests.proxy.conftest import running
from tests.proxy.fake_backend import FakeBackend
from tests.proxy.messages import LOGGED_IN, cancel_request, message, startup


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "PGHOST",
        "PGHOSTADDR",
        "PGPORT",
        "PGSERVICE",
        "PGSERVICEFILE",
        "PGSYSCONFDIR",
        "PGSSLMODE",
        "PGCONNECT_TIMEOUT",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("conninfo", "addresses"),
    [
        ("host=db.example", (TcpAddress("db.example", 5432),)),
        ("postgresql://someone:secret@db.example:6000/app?sslmode=prefer", (TcpAddress("db.example", 6000),)),
        ("postgresql://[::1]/", (TcpAddress("::1", 5432),)),
        ("host=a,b port=1,2", (TcpAddress("a", 1), TcpAddress("b", 2))),
        ("host=a,b port=1", (TcpAddress("a", 1), TcpAddress("b", 1))),
        ("host=db.example hostaddr=192.0.2.7", (TcpAddress("192.0.2.7", 5432),)),
        ("host=a,b hostaddr=,192.0.2.7", (TcpAddress("a", 5432), TcpAddress("192.0.2.7", 5432))),
        ("hostaddr=::1,192.0.2.7 port=1,2", (TcpAddress("::1", 1), TcpAddress("192.0.2.7", 2))),
        ("postgresql+asyncpg://app:50%off@db.example", (TcpAddress("db.example", 5432),)),
        ("host=/run/pg port=7", (UnixAddress("/run/pg", 7),)),
        ("host=@pg", (UnixAddress("@pg", 5432),)),
        ("postgresql://%2Frun%2Fpg/app", (UnixAddress("/run/pg", 5432),)),
    ],
)
def test_a_connection_string_says_where_the_server_is(conninfo: str, addresses: tuple[object, ...]) -> None:
    assert parse_upstream(conninfo).addresses == addresses


def test_libpqs_variables_stand_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGHOST", "elsewhere.example")
    monkeypatch.setenv("PGPORT", "6001")
    monkeypatch.setenv("PGCONNECT_TIMEOUT", "3")
    assert parse_upstream("") == Upstream((TcpAddress("elsewhere.example", 6001),), 3)
    assert parse_upstream("host=db.example").addresses == (TcpAddress("db.example", 6001),)


@pytest.mark.parametrize("wanted", ["any", "read-write", "primary", "standby", "prefer-standby"])
def test_what_can_not_be_seen_to_is_said(wanted: str) -> None:
    remark = parse_upstream(f"host=a,b target_session_attrs={wanted}").remark
    if wanted == "any":
        assert remark is None
    else:
        assert remark is not None
        assert f"target_session_attrs={wanted} can't be checked without logging in" in remark
    both = parse_upstream("jdbc:postgresql://a,b/app?targetServerType=master&currentSchema=x").remark
    assert both is not None
    assert both.startswith("--upstream: pgguard ignores currentSchema; ")
    assert "target_session_attrs=primary" in both


@pytest.mark.parametrize("by", ["option", "environment"])
def test_a_service_file_does_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, by: str) -> None:
    (tmp_path / "services").write_text("[app]\nhost=service.example\nport=6002\n")
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
    if by == "environment":
        monkeypatch.setenv("PGSERVICE", "app")
    upstream = parse_upstream("service=app port=6003" if by == "option" else "port=6003")
    assert upstream.addresses == (TcpAddress("service.example", 6003),)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("variable", ["PGSERVICEFILE", "HOME", "PGSYSCONFDIR"])
def test_a_service_file_of_somebody_elses_does_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
) -> None:
    """Whoever may write it would have all passwords sent to him."""
    path = tmp_path / (".pg_service.conf" if variable == "HOME" else "pg_service.conf")
    path.write_text("[app]\nhost=service.example\nport=6002\n")
    monkeypatch.setenv(variable, str(path if variable == "PGSERVICEFILE" else tmp_path))
    assert parse_upstream("service=app").addresses == (TcpAddress("service.example", 6002),)
    os.chown(path, 65534, 65534)
    with pytest.raises(
        ConfigurationError, match=r"^--upstream: the service file .* is not read: it belongs to user nob"
    ):
        parse_upstream("service=app")
    parse_upstream("host=db.example")


@pytest.mark.parametrize(
    ("conninfo", "says"),
    [
        ("host", 'missing "="'),
        ("port=1 hots=db.example", 'invalid connection option "hots"'),
        ("postgresql://[::1/", "IPv6"),
        ("host=a,b port=1,2,3", "3 ports for 2 hosts: give one port, or one for each host"),
        ("host=a port=http", "'http' is not a port number"),
        ("host=a connect_timeout=soon", "connect_timeout=soon is not a number of seconds"),
        ("service=nowhere", 'definition of service "nowhere" not found'),
        ("host=a sslnegotiation=direct", "use sslmode=require, verify-ca or verify-full"),
        ("host=a gssencmode=require", "use gssencmode=disable"),
    ],
)
def test_what_can_not_be_is_refused(conninfo: str, says: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        parse_upstream(conninfo)
    assert str(raised.value).startswith("--upstream: ")
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


async def test_the_first_of_several_that_accepts(backend: FakeBackend) -> None:
    with socket.socket() as down:
        down.bind(("127.0.0.1", 0))
        ports = f"{down.getsockname()[1]},{backend.port}"
        async with running(backend, upstream=f"host=127.0.0.1,127.0.0.1 port={ports} sslmode=disable") as house:
            client, _ = await house.session()
            await client.send(b"")


@pytest.fixture
async def another() -> AsyncIterator[FakeBackend]:
    """The second of two hosts."""
    backend = FakeBackend()
    await backend.listen()
    yield backend
    await backend.close_all()


def _error(sqlstate: str) -> bytes:
    return message("E", f"SFATAL\0VFATAL\0C{sqlstate}\0Mnot now\0\0".encode())


@pytest.mark.parametrize("how", ["close", "reset", "stays"])
async def test_a_host_that_turns_everybody_away_just_now_is_passed_over(
    backend: FakeBackend, another: FakeBackend, how: str
) -> None:
    """As libpq does where it has several: the next one gets the very same StartupMessage."""
    ports = f"{backend.port},{another.port}"
    async with running(backend, upstream=f"host=127.0.0.1,127.0.0.1 port={ports} sslmode=disable") as house:
        client = await house.connect()
        await client.send(startup(user="someone"))
        first = await backend.accept()
        assert await first.packet() == startup(user="someone")
        await first.send(_error("57P03"))
        if how != "stays":
            await (first.close() if how == "close" else first.reset())
        server = await another.accept()
        assert await server.packet() == startup(user="someone")
        await server.send(LOGGED_IN)
        await client.expect(LOGGED_IN)
        assert house.kinds == []


@pytest.mark.parametrize("says", [_error("28000"), _error("57P03")[:20], LOGGED_IN, b"HTTP/1.1 400 Bad Request"])
async def test_whatever_else_the_first_host_says_is_for_the_client(
    backend: FakeBackend, another: FakeBackend, says: bytes
) -> None:
    ports = f"{backend.port},{another.port}"
    async with running(backend, upstream=f"host=127.0.0.1,127.0.0.1 port={ports} sslmode=disable") as house:
        client = await house.connect()
        await client.send(startup())
        server = await backend.accept()
        assert await server.packet() == startup()
        await server.send(says)
        await server.close()
        assert (await client.rest()).startswith(says)
        await another.accept_nobody()


async def test_a_host_that_says_nothing_is_waited_for(backend: FakeBackend, another: FakeBackend) -> None:
    """Longer than it is looked whether it turns everybody away; and what it then says is its own."""
    ports = f"{backend.port},{another.port}"
    async with running(backend, upstream=f"host=127.0.0.1,127.0.0.1 port={ports} sslmode=disable") as house:
        client = await house.connect()
        await client.send(startup())
        server = await backend.accept()
        assert await server.packet() == startup()
        await client.nothing(1.3)
        await server.send(_error("57P03"))
        await server.close()
        assert await client.rest() == _error("57P03")
        await another.accept_nobody()


@pytest.mark.parametrize("last", ["turns away", "is down"])
async def test_when_all_turn_away_the_client_is_told(backend: FakeBackend, another: FakeBackend, last: str) -> None:
    ports = f"{backend.port},{another.port}"
    async with running(backend, upstream=f"host=127.0.0.1,127.0.0.1 port={ports} sslmode=disable") as house:
        if last == "is down":
            another.close()
        client = await house.connect()
        await client.send(startup())
        for host in (backend, another) if last == "turns away" else (backend,):
            server = await host.accept()
            await server.packet()
            await server.send(_error("57P03"))
            await server.close()
        if last == "turns away":
            assert await client.rest() == _error("57P03")
        else:
            error = await client.message()
            assert error.fields["C"] == "08001"
            assert (
                f"127.0.0.1:{backend.port}: not now; 127.0.0.1:{another.port}: Connection refused" in error.fields["M"]
            )


async def test_a_host_name_that_resolves_to_two_addresses_of_which_one_accepts(
    backend: FakeBackend,
) -> None:
    class Resolver(trio.abc.HostnameResolver):
        async def getaddrinfo(self, host: object, port: object, *_: object) -> list[tuple[object, ...]]:  # type: ignore[override]
            assert host == b"db.example"
            tcp = socket.SOCK_STREAM, socket.IPPROTO_TCP, ""
            return [
                (socket.AF_INET6, *tcp, ("::1", port, 0, 0)),
                (socket.AF_INET, *tcp, ("127.0.0.1", port)),
            ]

        async def getnameinfo(self, *_: object) -> tuple[str, str]:
            raise NotImplementedError

    before = trio.socket.set_custom_hostname_resolver(Resolver())
    try:
        address = TcpAddress("db.example", backend.port)
        sock, where = await connect_upstream(Upstream((address,), 5))
        sock.close()
        assert where == address
        backend.close()
        with pytest.raises(UpstreamUnavailable, match=rf"^{address}: Connection refused$"):
            await connect_upstream(Upstream((address,), 5))
    finally:
        trio.socket.set_custom_hostname_resolver(before)


async def test_why_each_address_failed_is_said(short_directory: Path) -> None:
    addresses = (
        UnixAddress(str(short_directory), 1),
        TcpAddress("x" * 64 + ".example", 1),
        TcpAddress("nowhere.invalid", 1),
    )
    with pytest.raises(UpstreamUnavailable) as raised:
        await connect_upstream(Upstream(addresses, 5))
    reasons = str(raised.value).split("; ")
    assert reasons[0] == f"unix:{short_directory}:1: No such file or directory"
    assert [reason.split(": ")[0] for reason in reasons] == [str(address) for address in addresses]


async def test_a_unix_socket_whose_backlog_is_full_is_waited_for(short_directory: Path, autojump_clock: object) -> None:
    """connect(2) gives EAGAIN there, where a blocking client like libpq would wait, and nothing has been connected."""
    del autojump_clock
    address = UnixAddress(str(short_directory), 1)
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as first:
        server.bind(address.path)
        server.listen(0)
        first.connect(address.path)
        with pytest.raises(UpstreamUnavailable, match="no answer within 5 s"):
            await connect_upstream(Upstream((address,), 5))
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def connect() -> None:
                sock, _ = await connect_upstream(Upstream((address,), 5))
                sock.close()

            await trio.sleep(1)
            server.accept()[0].close()


async def test_upstream_over_a_unix_socket(short_directory: Path, backend: FakeBackend) -> None:
    listener = trio.socket.socket(trio.socket.AF_UNIX)
    await listener.bind(f"{short_directory}/.s.PGSQL.9")
    listener.listen()
    backend._socket.close()
    backend._socket = listener
    async with running(backend, upstream=f"host={short_directory} port=9") as house:
        client = await house.connect()
        await client.send(startup())
        server = await backend.accept()
        await server.log_in()
        await client.expect(LOGGED_IN)


async def test_a_host_that_never_answers_is_given_up(autojump_clock: object) -> None:
    """Its backlog full, a server's kernel leaves SYNs unanswered."""
    del autojump_clock
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for sock in (first, second):
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        address = TcpAddress(*full.getsockname())
        with pytest.raises(UpstreamUnavailable, match=f"^{address}: no answer within 7 s$"):
            await connect_upstream(Upstream((address,), 7))


async def test_a_cancel_request_goes_to_every_address_even_if_one_fails(backend: FakeBackend) -> None:
    packet = cancel_request(1, b"key!")
    with socket.socket() as down:
        down.bind(("127.0.0.1", 0))
        addresses = (TcpAddress(*down.getsockname()), TcpAddress("127.0.0.1", backend.port))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(relay_cancel, Upstream((*addresses, *addresses[1:]), 5), packet)
            for how in ("reset", "close"):
                server = await backend.accept()
                assert await server.packet() == packet
                await (server.reset() if how == "reset" else server.close())


async def test_a_server_that_never_takes_a_cancel_request(backend: FakeBackend) -> None:
    started = time.monotonic()
    with trio.move_on_after(0.2):
        await relay_cancel(Upstream((TcpAddress("127.0.0.1", backend.port),), 5), cancel_request(1, b"key!"))
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    ("family", "bound", "host"),
    [
        (socket.AF_INET, "127.0.0.1", "127.0.0.1"),
        (socket.AF_INET6, "::1", "::1"),
        (socket.AF_INET, "127.0.0.1", "localhost"),
    ],
)
async def test_a_server_is_connected_to_by_number_and_by_name(
    family: socket.AddressFamily, bound: str, host: str
) -> None:
    """It doesn't block, tells the system of a server that has vanished, and doesn't wait for more to send."""
    with socket.create_server((bound, 0), family=family) as listener:
        address = TcpAddress(host, listener.getsockname()[1])
        sock, found = await connect_upstream(Upstream((address,), 5))
        with sock, listener.accept()[0] as accepted:
            assert found == address
            assert not os.get_blocking(sock.fileno())
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            await sock.send(b"hello")
            assert accepted.recv(5) == b"hello"


async def test_a_server_that_takes_its_time_is_waited_for_as_long_as_was_said() -> None:
    """A backlog that is full answers no SYN, so the connection is neither made nor refused."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, ExitStack() as stack:
        address = listener.getsockname()
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(address)
        began = trio.current_time()
        with pytest.raises(UpstreamUnavailable, match="no answer within"):
            await connect_upstream(Upstream((TcpAddress(*address),), 0.2))
        assert trio.current_time() - began >= 0.2
