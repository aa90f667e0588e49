"""How the server is connected to with TLS, and what comes of what goes wrong, with one that does what a test says."""

from __future__ import annotations

import errno
import json
import os
import pwd
import shutil
import signal
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from pgguard.cli.doctor import doctor
from pgguard.proxy.addresses import TcpAddress
from pgguard.proxy.arrival import Arrival
from pgguard.proxy.dialling import Dial, Progress
from tests.proxy.conftest import House, running, until
from tests.proxy.fake_backend import BackendConnection, FakeBackend, part
from tests.proxy.messages import (
    COLUMNS,
    LOGGED_IN,
    ONE_ROW,
    READY,
    SECONDS,
    SELECTED,
    SSL_REQUEST,
    TERMINATE,
    cancel_request,
    message,
    query,
    startup,
)
from tests.proxy.spawned import spawned
from tests.proxy.tls_backend import answer_once, encrypt, shake_hands, showing
from tests.servers import is_open_to_others
from tests.tls.certificates import Authority, self_signed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.proxy.messages import Client
    from tests.tls.certificates import Pair

pytestmark = pytest.mark.usefixtures("empty_home")

STARTUP = startup(user="someone")
LONG_ANSWER = COLUMNS + ONE_ROW * 100_000 + SELECTED + READY
REFUSED = message("E", b"SFATAL\0VFATAL\0C28000\0Mno pg_hba.conf entry\0\0")


def _where(backend: FakeBackend, rest: str) -> str:
    return f"host=127.0.0.1 port={backend.port} connect_timeout=5 {rest}"


async def _said_to_client(house: House) -> dict[str, str]:
    client = await house.connect()
    await client.send(STARTUP)
    return (await client.message()).fields


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@pytest.mark.parametrize("mode", ["prefer", "require", "verify-ca", "verify-full"])
@pytest.mark.parametrize("most", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_session_over_tls(
    backend: FakeBackend, pair: Pair, authority: Authority, mode: str, host: str, most: ssl.TLSVersion
) -> None:
    where = f"host={host} port={backend.port} sslmode={mode} sslrootcert={authority.cert}"
    async with running(backend, upstream=where) as house:
        client = await house.connect()
        await client.send(STARTUP)
        server = await encrypt(backend, pair, most=most)
        await server.expect(STARTUP)
        await server.send(LOGGED_IN)
        await client.expect(LOGGED_IN)
        await client.send(query("select 1"))
        await server.expect(query("select 1"))
        await server.send(LONG_ANSWER)
        await client.expect(LONG_ANSWER)
        await client.send(TERMINATE)
        await server.expect(TERMINATE)
        assert house.kinds == []


async def test_prefer_goes_on_without_on_the_same_connection(backend: FakeBackend) -> None:
    async with running(backend, upstream=_where(backend, "")) as house:
        client = await house.connect()
        await client.send(STARTUP)
        server = await backend.accept()
        await server.expect(SSL_REQUEST)
        await server.send(b"N")
        await server.expect(STARTUP)
        await server.send(LOGGED_IN)
        await client.expect(LOGGED_IN)
        await backend.accept_nobody()


async def test_disable_and_allow_ask_for_none(backend: FakeBackend) -> None:
    for mode in "disable", "allow":
        async with running(backend, upstream=_where(backend, f"sslmode={mode}")) as house:
            client = await house.connect()
            await client.send(STARTUP)
            server = await backend.accept()
            await server.expect(STARTUP)
            await server.send(LOGGED_IN)
            await client.expect(LOGGED_IN)


@pytest.mark.parametrize("mode", ["require", "verify-ca"])
async def test_a_server_without_tls(backend: FakeBackend, mode: str, authority: Authority) -> None:
    where = _where(backend, f"sslmode={mode} sslrootcert={authority.cert}")
    async with running(backend, upstream=where) as house, trio.open_nursery() as nursery:

        @nursery.start_soon
        async def decline() -> None:
            server = await backend.accept()
            await server.expect(SSL_REQUEST)
            await server.send(b"N")
            assert await server.rest() == b"", "it is told nothing more"

        said = await _said_to_client(house)
    assert said["C"] == "08001"
    assert said["M"].endswith(f"127.0.0.1:{backend.port}: server does not support SSL, but SSL was required")
    assert "Set ssl = on in postgresql.conf" in said["H"]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"E", "server sent an error response during SSL exchange"),
        (b"X", "received invalid response to SSL negotiation: b'X'"),
        (b"", "it closed the connection when it was asked for TLS"),
    ],
)
async def test_a_server_that_does_not_say_whether_it_has_tls(backend: FakeBackend, answer: bytes, says: str) -> None:
    """As libpq the guard tries nothing else then."""
    async with running(backend, upstream=_where(backend, "")) as house, trio.open_nursery() as nursery:

        @nursery.start_soon
        async def reply() -> None:
            server = await backend.accept()
            await server.expect(SSL_REQUEST)
            await server.send(answer)
            await server.close()

        said = await _said_to_client(house)
        await backend.accept_nobody()
    assert says in said["M"]


async def test_a_server_that_does_not_say_in_time_whether_it_has_tls(backend: FakeBackend) -> None:
    async with running(backend, upstream=_where(backend, "connect_timeout=1")) as house:
        client = await house.connect()
        await client.send(STARTUP)
        server = await backend.accept()
        await server.expect(SSL_REQUEST)
        said = (await client.message()).fields
    assert said["M"].endswith(f"127.0.0.1:{backend.port}: no answer within 1 s")


_BY_NUMBER_AND_NAME = pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
"""What has to be looked up is connected to in a task of its own."""


@asynccontextmanager
async def _silence(
    backend: FakeBackend, monkeypatch: pytest.MonkeyPatch, host: str
) -> AsyncIterator[tuple[House, Client, BackendConnection]]:
    """A client whose server has been asked for TLS, and hasn't answered for longer than it takes to connect."""
    monkeypatch.setattr("pgguard.proxy.addresses._TO_CONNECT", 0.4)
    async with running(backend, upstream=f"host={host} port={backend.port}") as house:
        client = await house.connect()
        await client.send(STARTUP)
        server = await backend.accept()
        await server.expect(SSL_REQUEST)
        await client.nothing(0.6)
        yield house, client, server


@_BY_NUMBER_AND_NAME
@pytest.mark.parametrize("then", ["declines", "encrypts", "half-closed"])
async def test_without_a_limit_a_server_is_waited_for_as_long_as_its_client_waits(
    backend: FakeBackend, pair: Pair, monkeypatch: pytest.MonkeyPatch, host: str, then: str
) -> None:
    """As libpq waits, and as it does for one that has no TLS."""
    async with _silence(backend, monkeypatch, host) as (_, client, server):
        if then == "half-closed":  # it says no more, and listens
            await client.stream.send_eof()
            await client.nothing(0.6)
        if then == "encrypts":
            await server.send(b"S")
            await client.nothing(0.6)  # nor does it have to be quick to shake hands
            await shake_hands(server, showing(pair))
        else:
            await server.send(b"N")
        await server.expect(STARTUP)
        await server.send(LOGGED_IN)
        await client.expect(LOGGED_IN)


@_BY_NUMBER_AND_NAME
@pytest.mark.parametrize("how", ["is reset", "closes"])
async def test_a_client_that_leaves_ends_the_waiting(
    backend: FakeBackend, monkeypatch: pytest.MonkeyPatch, host: str, how: str
) -> None:
    """The end of its stream may be the end of its side alone: the kernel is asked whether there is anybody still."""
    monkeypatch.setattr("pgguard.proxy.endings._CHECK_SECONDS", 1)
    async with _silence(backend, monkeypatch, host) as (house, client, server):
        client.stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_LINGER2, 1)
        await (client.reset() if how == "is reset" else client.close())
        assert await server.rest() == b""
        await until(lambda: not house.guard._roster.arriving)


async def test_without_a_limit_a_server_still_has_to_accept_each_connection(
    backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the second one, for which there was no TLS, however long the first one has taken."""
    async with _silence(backend, monkeypatch, "127.0.0.1") as (_, client, server):
        monkeypatch.setattr(Dial, "_begin", _not_accepted)
        await server.send(b"S")
        await server.receive(100)
        await server.send(b"no TLS")
        said = (await client.message()).fields
    assert said["M"].endswith(f"127.0.0.1:{backend.port}: no answer within 0.4 s")


def _not_accepted(_: Dial) -> Progress:
    return Progress.NO_ROOM


async def test_of_a_server_that_says_nothing_it_is_said_at_the_start(
    backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgguard.proxy.loops._SECONDS", 0.3)
    async with running(backend, upstream=f"host=127.0.0.1 port={backend.port}") as house:
        assert await house.guard.find_loop() is None
        [said] = house.guard.unreachable()
    assert f"says nothing at 127.0.0.1:{backend.port} (no answer within 0.24 s), so clients wait until it does" in said


async def test_what_comes_behind_the_answer_in_the_clear_is_not_believed(backend: FakeBackend) -> None:
    """CVE-2021-23222."""
    async with running(backend, upstream=_where(backend, "sslmode=require")) as house, trio.open_nursery() as nursery:

        @nursery.start_soon
        async def smuggle() -> None:
            server = await backend.accept()
            await server.expect(SSL_REQUEST)
            await server.send(b"S" + LOGGED_IN)
            await server.rest()

        said = await _said_to_client(house)
    assert said["C"] == "08001"
    assert "SSL error: wrong version number" in said["M"]


async def _refuse(server: BackendConnection) -> None:
    await server.expect(STARTUP)
    await server.send(REFUSED[:9])
    await trio.sleep(0.01)
    await server.send(REFUSED[9:])


async def test_prefer_tries_without_if_it_is_refused_with(backend: FakeBackend, pair: Pair) -> None:
    """``hostnossl``: the server says so only when it knows who the client is."""
    async with running(backend, upstream=_where(backend, "")) as house:
        client = await house.connect()
        await client.send(STARTUP)
        await _refuse(await encrypt(backend, pair))
        server = await backend.accept()
        await server.expect(STARTUP)
        await server.send(LOGGED_IN)
        await client.expect(LOGGED_IN)


async def test_allow_tries_with_tls_if_it_is_refused_without(backend: FakeBackend, pair: Pair) -> None:
    """``hostssl``."""
    async with running(backend, upstream=_where(backend, "sslmode=allow")) as house:
        client = await house.connect()
        await client.send(STARTUP)
        await _refuse(await backend.accept())
        server = await encrypt(backend, pair)
        await server.expect(STARTUP)
        await server.send(LOGGED_IN)
        await client.expect(LOGGED_IN)


@pytest.mark.parametrize("then", ["is down", "declines", "refuses"])
async def test_who_is_refused_both_ways_is_told_so_by_the_server(backend: FakeBackend, pair: Pair, then: str) -> None:
    async with running(backend, upstream=_where(backend, "sslmode=allow")) as house:
        client = await house.connect()
        await client.send(STARTUP)
        first = await backend.accept()
        if then == "is down":
            backend.close()
        await _refuse(first)
        if then == "declines":
            server = await backend.accept()
            await server.expect(SSL_REQUEST)
            await server.send(b"N")
        elif then == "refuses":
            await _refuse(await encrypt(backend, pair))
        await client.expect(REFUSED)
        watched = house.guard._lobby._watched.values()
        assert not [one for one in watched if isinstance(getattr(one, "__self__", None), Arrival)], (
            "nothing is left of it"
        )


@pytest.mark.parametrize("sqlstate", ["53300", "57P03", "57P01"])
async def test_what_has_nothing_to_do_with_tls_is_passed_on(backend: FakeBackend, pair: Pair, sqlstate: str) -> None:
    error = message("E", f"SFATAL\0VFATAL\0C{sqlstate}\0Mnot now\0\0".encode())
    async with running(backend, upstream=_where(backend, "")) as house:
        client = await house.connect()
        await client.send(STARTUP)
        server = await encrypt(backend, pair)
        await server.expect(STARTUP)
        await server.send(error)
        await client.expect(error)
        await backend.accept_nobody()


async def test_with_require_there_is_nothing_to_try(backend: FakeBackend, pair: Pair) -> None:
    async with running(backend, upstream=_where(backend, "sslmode=require")) as house:
        client = await house.connect()
        await client.send(STARTUP)
        server = await encrypt(backend, pair)
        await _refuse(server)
        await client.expect(REFUSED)
        await server.close()
        assert await client.rest() == b""


async def test_an_error_that_comes_later_is_passed_on(backend: FakeBackend, pair: Pair) -> None:
    """The client has had a part in what led to it."""
    request = message("R", b"\0\0\0\3")
    async with running(backend, upstream=_where(backend, "")) as house:
        client = await house.connect()
        await client.send(STARTUP)
        server = await encrypt(backend, pair)
        await server.expect(STARTUP)
        await server.send(request)
        await client.expect(request)
        await client.send(message("p", b"wrong\0"))
        await server.expect(message("p", b"wrong\0"))
        await server.send(REFUSED)
        await client.expect(REFUSED)
        await backend.accept_nobody()


async def test_prefer_tries_without_if_the_handshake_fails(backend: FakeBackend, tmp_path: Path) -> None:
    """Also if that is for a certificate that isn't trusted, where there are roots: as libpq."""
    foreign = self_signed(tmp_path, "foreign", "localhost", ["localhost"])
    where = _where(backend, f"sslrootcert={foreign.cert}")
    other = self_signed(tmp_path, "other", "localhost", ["localhost"])
    async with running(backend, upstream=where) as house:
        client = await house.connect()
        await client.send(STARTUP)
        with pytest.raises(trio.BrokenResourceError):
            await encrypt(backend, other)
        server = await backend.accept()
        await server.expect(STARTUP)
        await server.send(LOGGED_IN)
        await client.expect(LOGGED_IN)


async def test_a_first_answer_that_does_not_come_is_not_waited_for_for_ever(backend: FakeBackend, pair: Pair) -> None:
    async with running(backend, upstream=_where(backend, "connect_timeout=1")) as house:
        client = await house.connect()
        await client.send(STARTUP)
        server = await encrypt(backend, pair)
        await server.expect(STARTUP)
        await client.nothing(1.3)
        await server.send(LOGGED_IN)
        await client.expect(LOGGED_IN)


@pytest.mark.parametrize(
    ("names", "lasts", "settings", "says", "advises"),
    [
        (("localhost",), 30, "sslmode=verify-ca", "unable to get local issuer certificate", "sslrootcert=PATH"),
        (("localhost",), -1, "sslmode=verify-ca", "certificate has expired", "Renew the server's certificate"),
        (("elsewhere.example",), 30, "sslmode=verify-full", 'does not match host name "localhost"', "host=NAME"),
        ((), 30, "sslmode=verify-full", 'does not match host name "localhost"', "host=NAME"),
        (("localhost",), 30, "sslmode=verify-ca revoked", "certificate revoked", "sslcrl=PATH"),
        (("localhost",), 30, "sslmode=require ssl_min_protocol_version=TLSv1.3", "alert protocol version", "ssl_min_"),
    ],
)
async def test_what_is_wrong_with_the_server_is_said_with_what_to_do(
    backend: FakeBackend,
    tmp_path: Path,
    names: tuple[str, ...],
    lasts: int,
    settings: str,
    says: str,
    advises: str,
) -> None:
    authority, other = Authority(tmp_path, "authority"), Authority(tmp_path, "other")
    pair = authority.issue("server", "db", names, lasts=lasts)
    trusted = other if "issuer" in says else authority
    settings = settings.replace("revoked", f"sslcrl={authority.revoke('list', pair)}")
    where = f"host=localhost hostaddr=127.0.0.1 port={backend.port} {settings} sslrootcert={trusted.cert}"
    async with running(backend, upstream=where) as house, trio.open_nursery() as nursery:

        @nursery.start_soon
        async def fail() -> None:
            with suppress(trio.BrokenResourceError):
                server = await encrypt(backend, pair, most=ssl.TLSVersion.TLSv1_2)
                assert await server.rest() == b"", "it is told nothing more"

        said = await _said_to_client(house)
    assert said["C"] == "08001"
    assert says in said["M"]
    assert "\n" not in said["M"]
    assert advises in said["H"]
    if "alert" not in says:
        assert "its certificate (for db" in said["M"]
        assert ", signed by authority, valid until " in said["M"]


async def test_direct_negotiation(backend: FakeBackend, pair: Pair) -> None:
    where = _where(backend, "sslmode=require sslnegotiation=direct")
    async with running(backend, upstream=where) as house:
        client = await house.connect()
        await client.send(STARTUP)
        server = await backend.accept()
        assert (await shake_hands(server, showing(pair))).selected_alpn_protocol() == "postgresql"
        await server.expect(STARTUP)
        await server.send(LOGGED_IN)
        await client.expect(LOGGED_IN)


@pytest.mark.parametrize("how", ["no ALPN", "closes"])
async def test_direct_negotiation_with_a_server_that_does_not_know_it(
    backend: FakeBackend, pair: Pair, how: str
) -> None:
    where = _where(backend, "sslmode=require sslnegotiation=direct")
    async with running(backend, upstream=where) as house, trio.open_nursery() as nursery:

        @nursery.start_soon
        async def serve() -> None:
            server = await backend.accept()
            if how == "closes":
                await server.receive(8)
                await server.close()
            else:
                await shake_hands(server, showing(pair, alpn=False))
                await server.rest()

        said = await _said_to_client(house)
    assert ("without ALPN" if how == "no ALPN" else "closed the connection") in said["M"] or "reset" in said["M"]
    assert "sslnegotiation=direct" in said["H"]


async def test_a_name_is_told_and_an_address_is_not(backend: FakeBackend, pair: Pair) -> None:
    for host, expected in ("localhost", "localhost"), ("127.0.0.1", None):
        told: list[str | None] = []
        context = showing(pair)
        context.sni_callback = lambda _, name, __, told=told: told.append(name)
        where = f"host={host} hostaddr=127.0.0.1 port={backend.port} sslmode=require"
        async with running(backend, upstream=where) as house:
            client = await house.connect()
            await client.send(STARTUP)
            server = await backend.accept()
            await server.expect(SSL_REQUEST)
            await server.send(b"S")
            await shake_hands(server, context)
            await server.expect(STARTUP)
        assert told == [expected]


@pytest.mark.parametrize("asked", [ssl.CERT_NONE, ssl.CERT_REQUIRED])
@pytest.mark.parametrize("shown", ["", "allow", "require", "disable"])
@pytest.mark.parametrize("most", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_the_certificate_that_the_server_is_shown(
    backend: FakeBackend, pair: Pair, authority: Authority, asked: ssl.VerifyMode, shown: str, most: ssl.TLSVersion
) -> None:
    """In TLS 1.3 the server says only after the handshake that it wants one."""
    own = authority.issue("own", "client")
    where = _where(backend, "sslmode=require")
    if shown:
        where += f" sslcert={own.cert} sslkey={own.key} sslcertmode={shown}"
    context = showing(pair, most=most)
    context.verify_mode = asked
    context.load_verify_locations(authority.cert)
    seen: list[object] = []
    fits = shown == "allow" or (shown == "require" and asked) or (shown in {"", "disable"} and not asked)
    async with running(backend, upstream=where) as house, trio.open_nursery() as nursery:

        @nursery.start_soon
        async def serve() -> None:
            server = await backend.accept()
            await server.expect(SSL_REQUEST)
            await server.send(b"S")
            try:
                seen.append((await shake_hands(server, context)).getpeercert())
                await server.expect(STARTUP)
            except (trio.BrokenResourceError, AssertionError):
                assert not fits
            else:
                await server.send(LOGGED_IN)
                await server.rest()

        client = await house.connect()
        await client.send(STARTUP)
        if fits:
            await client.expect(LOGGED_IN)
            assert bool(seen[0]) is bool(asked and shown in {"allow", "require"})
        else:
            said = (await client.message()).fields
            if shown == "require":
                assert "server did not request an SSL certificate" in said["M"]
                assert "ssl_ca_file" in said["H"]
            else:
                assert "Name a certificate that the server accepts" in said["H"]
        nursery.cancel_scope.cancel()


async def test_a_cancel_request_is_encrypted_too(backend: FakeBackend, pair: Pair) -> None:
    packet = cancel_request(4711, b"key!")
    async with running(backend, upstream=_where(backend, "sslmode=require")) as house:
        client = await house.connect()
        await client.send(packet)
        server = await encrypt(backend, pair)
        await server.expect(packet)
        await client.nothing()
        await server.close()
        assert await client.rest() == b""


async def test_of_several_hosts_the_one_is_used_whose_certificate_is_in_order(
    backend: FakeBackend, pair: Pair, authority: Authority, tmp_path: Path
) -> None:
    foreign = self_signed(tmp_path, "foreign", "localhost", ["localhost"])
    second = FakeBackend()
    await second.listen()
    where = f"host=127.0.0.1,127.0.0.1 port={backend.port},{second.port} sslmode=verify-ca sslrootcert={authority.cert}"
    async with running(backend, upstream=where) as house:
        client = await house.connect()
        await client.send(STARTUP)
        with pytest.raises(trio.BrokenResourceError):
            await encrypt(backend, foreign)
        server = await encrypt(second, pair)
        await server.expect(STARTUP)
        await server.send(LOGGED_IN)
        await client.expect(LOGGED_IN)
    await second.close_all()


@pytest.mark.parametrize("required", ["its own", "another"])
async def test_whose_socket_it_has_to_be(short_directory: Path, backend: FakeBackend, required: str) -> None:
    """``requirepeer``, for Unix sockets."""
    listener = trio.socket.socket(trio.socket.AF_UNIX)
    await listener.bind(f"{short_directory}/.s.PGSQL.9")
    listener.listen()
    backend._socket.close()
    backend._socket = listener
    own = pwd.getpwuid(os.geteuid()).pw_name
    user = own if required == "its own" else "somebody"
    async with running(backend, upstream=f"host={short_directory} port=9 requirepeer={user}") as house:
        client = await house.connect()
        await client.send(STARTUP)
        if user == own:
            server = await backend.accept()
            await server.expect(STARTUP)
        else:
            said = (await client.message()).fields
            assert f'requirepeer specifies "somebody", but actual peer user name is "{own}"' in said["M"]
            assert "requirepeer in --upstream" in said["H"]


async def test_how_the_server_is_connected_to_is_known_at_the_start(
    backend: FakeBackend, pair: Pair, authority: Authority
) -> None:
    where = _where(backend, f"sslmode=verify-full sslrootcert={authority.cert}")
    async with running(backend, upstream=where) as house, trio.open_nursery() as nursery:
        nursery.start_soon(house.guard.find_loop)
        sock, _ = await backend._socket.accept()
        server = BackendConnection(trio.SocketStream(sock))
        await server.expect(SSL_REQUEST)
        await server.send(b"S")
        await shake_hands(server, showing(pair))
        assert (await server.packet())[4:8] == bytes.fromhex("04d2162e")
        await server.close()
    assert house.guard.encryption() == (
        "by TLSv1.3 with TLS_AES_256_GCM_SHA384, its certificate and its name are verified"
    )


async def test_why_it_can_not_be_connected_to_is_said_at_the_start(backend: FakeBackend) -> None:
    async with running(backend, upstream=_where(backend, "sslmode=require")) as house, trio.open_nursery() as nursery:
        nursery.start_soon(house.guard.find_loop)
        sock, _ = await backend._socket.accept()
        server = BackendConnection(trio.SocketStream(sock))
        await server.expect(SSL_REQUEST)
        await server.send(b"N")
        await server.close()
    [said] = house.guard.unreachable()
    assert f"127.0.0.1:{backend.port} (server does not support SSL, but SSL was required)" in said
    assert "so clients get an error: Set ssl = on" in said


def test_an_address_is_the_same_whatever_it_is_called() -> None:
    assert TcpAddress("192.0.2.1", 1, named="a") == TcpAddress("192.0.2.1", 1, named="b")


def test_the_doctor_says_which_tls_the_server_gives(
    pair: Pair,
    authority: Authority,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("pgguard.cli.doctor.check", list)
    context = showing(pair)

    def said(answer: bytes, settings: str, *, essential: bool = False) -> list[tuple[object, ...]]:
        with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
            port = listener.getsockname()[1]
            served = pool.submit(answer_once, listener, answer, context)
            monkeypatch.setenv("PGGUARD_UPSTREAM", f"host=localhost hostaddr=127.0.0.1 port={port} {settings}")
            assert doctor(as_json=True) == int(essential)
            with suppress(ssl.SSLError):  # it hasn't been trusted
                served.result(SECONDS)
        found = [one for one in json.loads(capsys.readouterr().out) if one["name"] == "TLS to the server"]
        assert [one for one in found if one["essential"]] == (found if essential else [])
        return [(one["available"], one["purpose"], one["problem"], one["remedy"]) for one in found]

    roots = f"sslrootcert={authority.cert}"
    [(available, purpose, _, _)] = said(b"S", f"sslmode=verify-full {roots}")
    assert available
    assert str(purpose).endswith(", by TLSv1.3 with TLS_AES_256_GCM_SHA384, its certificate and its name are verified")
    [(available, _, problem, remedy)] = said(b"N", "sslmode=require", essential=True)
    assert not available
    assert problem == "server does not support SSL, but SSL was required"
    assert str(remedy).startswith("Set ssl = on")
    assert said(b"N", "") == []
    # Where there has to be none, it is done without.
    other = self_signed(tmp_path, "other", "localhost", ["localhost"])
    [(available, _, problem, _)] = said(b"S", f"sslmode=prefer sslrootcert={other.cert}")
    assert not available
    assert str(problem).startswith("the server is connected to without TLS (sslmode=prefer), as that fails: ")
    [(available, _, problem, _)] = said(b"S", f"sslmode=verify-ca sslrootcert={other.cert}", essential=True)
    assert "not trusted" in str(problem)
    [(available, purpose, _, _)] = said(b"S", "")
    assert available
    assert str(purpose).endswith("its certificate is not verified")


async def test_files_that_are_renewed_hold_from_sighup_on(
    backend: FakeBackend, pair: Pair, authority: Authority, tmp_path: Path
) -> None:
    """For sessions that begin then; one that can't be read changes nothing."""
    roots = tmp_path / "roots.crt"
    roots.write_bytes(Authority(tmp_path, "former").cert.read_bytes())
    options = "--attribution", "off", "--listen", "127.0.0.1:0"
    with spawned(_where(backend, f"sslmode=verify-ca sslrootcert={roots}"), *options, cwd=tmp_path) as guard:

        async def reload(says: str) -> None:
            guard.signal(signal.SIGHUP)
            await trio.to_thread.run_sync(guard.wait_for, f"({says}.*\n)")

        async def is_believed() -> bool:
            client = await backend.connect(guard.port)
            await client.send(STARTUP)
            try:
                server = await encrypt(backend, pair)
            except trio.BrokenResourceError:
                assert "not trusted" in (await client.message()).fields["M"]
                return False
            await server.expect(STARTUP)
            await server.send(LOGGED_IN)
            await client.expect(LOGGED_IN)
            await part(client, server)
            return True

        with suppress(trio.BrokenResourceError):
            await encrypt(backend, pair)  # to see whether it leads back to itself
        assert not await is_believed()
        roots.write_text("nonsense")
        await reload(f"SIGHUP: TLS to the server stays as it is: --upstream: sslrootcert: {roots} holds no certificate")
        assert not await is_believed()
        roots.write_bytes(authority.cert.read_bytes())
        await reload("SIGHUP: read the files again that are for TLS to the server")
        assert await is_believed()
        guard.signal(signal.SIGTERM)
        guard.end()


@pytest.mark.parametrize(
    ("sqlstate", "text", "advises"),
    [
        ("28000", 'no pg_hba.conf entry for host "h", user "u", database "d", no encryption', "hostssl lines are for"),
        ("28000", 'pg_hba.conf rejects connection for host "h", user "u", database "d", SSL encryption', "hostnossl"),
        ("28000", "connection requires a valid client certificate", "Name a certificate that the server accepts"),
        ("28000", 'certificate authentication failed for user "u"', "Check the certificate in sslcert"),
        ("28000", 'role "no encryption" is not permitted to log in', None),
        ("53300", "sorry, no encryption", None),
    ],
)
async def test_what_to_set_is_said_of_a_client_that_is_refused_for_the_guards_connection(
    backend: FakeBackend, caplog: pytest.LogCaptureFixture, sqlstate: str, text: str, advises: str | None
) -> None:
    """It is told what the server says."""
    refusal = message("E", f"SFATAL\0VFATAL\0C{sqlstate}\0M{text}\0Fauth.c\0\0".encode())
    async with running(backend) as house:
        client = await house.connect()
        await client.send(STARTUP)
        server = await backend.accept()
        await server.expect(STARTUP)
        await server.send(refusal)
        await server.close()
        assert await client.rest() == refusal
    said = [record.message for record in caplog.records if "refused the client" in record.message]
    if advises is None:
        assert said == []
    else:
        [line] = said
        assert f"session 1: the server at 127.0.0.1:{backend.port} refused the client: {text}. " in line
        assert advises in line


async def test_who_is_refused_is_told_so_if_there_is_no_descriptor_to_try_it_otherwise(
    backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(backend, upstream=_where(backend, "sslmode=allow")) as house:
        client = await house.connect()
        await client.send(STARTUP)
        server = await backend.accept()

        def refuse(_: socket.AddressFamily) -> socket.socket:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        monkeypatch.setattr("pgguard.proxy.dialling.unconnected", refuse)
        await _refuse(server)
        await client.expect(REFUSED)


@pytest.mark.skipif(
    os.geteuid() != 0
    or not is_open_to_others()
    or not all(directory.stat().st_mode & 0o001 for directory in Path(os.__file__).parents),
    reason="it takes root's rights, and an installation that others can run",
)
def test_as_another_user_the_guard_reads_what_that_one_may_read(authority: Authority, short_directory: Path) -> None:
    """At the start it is root still."""
    nobody = pwd.getpwnam("nobody")
    short_directory.chmod(0o755)
    own = authority.issue("roots", "client")
    cert, key = (Path(shutil.copy(file, short_directory)) for file in (own.cert, own.key))
    upstream = f"host=127.0.0.1 port=1 sslcert={cert} sslkey={key}"
    with spawned(upstream, "--attribution", "off", "--user", nobody.pw_name, cwd=short_directory) as guard:
        guard.signal(signal.SIGHUP)
        guard.wait_for(
            rf"(TLS to the server stays as it is: .*the private key in {key} can't be read: Permission denied)"
        )
        os.chown(key, nobody.pw_uid, nobody.pw_gid)
        guard.signal(signal.SIGHUP)
        guard.wait_for("(SIGHUP: read the files again that are for TLS to the server)")
        guard.signal(signal.SIGTERM)
        guard.end()


async def test_a_server_that_asks_for_a_group_is_offered_nothing_else_until_that_fails(
    backend: FakeBackend, pair: Pair
) -> None:
    """PostgreSQL's default before version 18 is this one, and OpenSSL's another: each time it would ask for it."""
    hellos: list[int] = []
    async with running(backend, upstream=_where(backend, "sslmode=require")) as house:
        for curve, tries, expected in (
            ("prime256v1", 1, 2),  # it asks
            ("prime256v1", 1, 1),
            ("secp384r1", 2, 3),  # it has been set up anew: it refuses what it is offered, then it asks
            ("secp384r1", 1, 2),  # for what isn't remembered
            ("prime256v1", 1, 2),
            ("prime256v1", 1, 1),
        ):
            hellos.clear()
            context = showing(pair)
            context.set_ecdh_curve(curve)
            context._msg_callback = partial(_count_hellos, hellos)  # type: ignore[attr-defined]
            client = await house.connect()
            await client.send(STARTUP)
            for _ in range(tries - 1):
                with pytest.raises(trio.BrokenResourceError):
                    await _encrypt(await backend.accept(), context)
            server = await backend.accept()
            await _encrypt(server, context)
            await server.expect(STARTUP)
            await server.send(LOGGED_IN)
            await client.expect(LOGGED_IN)
            assert len(hellos) == expected, curve


async def _encrypt(server: BackendConnection, context: ssl.SSLContext) -> None:
    await server.expect(SSL_REQUEST)
    await server.send(b"S")
    await shake_hands(server, context)


def _count_hellos(hellos: list[int], _: object, direction: str, *message: object) -> None:
    if direction == "read" and message[2] == 1:  # ClientHello: RFC 8446, appendix B.3
        hellos.append(1)
