"""Where the guard listens, and what it does about sockets that others use or have left behind."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest
import trio

from pgguard.proxy.addresses import TcpAddress, UnixAddress, parse_listen
from pgguard.proxy.errors import ConfigurationError
from pgguard.proxy.listeners import open_listeners
from tests.proxy.conftest import running
from tests.proxy.fake_backend import FakeBackend
from tests.proxy.messages import LOGGED_IN, Client, startup


async def test_several_at_once_each_under_its_own_address(backend: FakeBackend, short_directory: Path) -> None:
    listen = ["127.0.0.1:0", "[::1]:0", f"unix:{short_directory}:1", f"unix:@{short_directory}:2"]
    async with running(backend, listen=listen) as house:
        four, six, unix, abstract = [listener.address for listener in house.guard._listeners]
        assert isinstance(four, TcpAddress)
        assert isinstance(six, TcpAddress)
        assert isinstance(unix, UnixAddress)
        assert isinstance(abstract, UnixAddress)
        assert re.fullmatch(r"127\.0\.0\.1:[1-9]\d*", str(four))
        assert re.fullmatch(r"\[::1\]:[1-9]\d*", str(six))
        assert unix.path == f"{short_directory}/.s.PGSQL.1"
        streams = [await trio.open_tcp_stream(address.host, address.port) for address in (four, six)]
        clients = [
            *map(Client, streams),
            await Client.connect_unix(unix.path),
            await Client.connect_unix(abstract.path),
        ]
        for client in clients:
            await client.send(startup())
            server = await backend.accept()
            await server.log_in()
            await client.expect(LOGGED_IN)
            await client.close()
    assert not exists(unix.path)


def exists(path: str) -> bool:
    return Path(path).exists()


def remove(path: str) -> None:
    Path(path).unlink()


async def open_and_close(text: str) -> None:
    for listener in await open_listeners(parse_listen(text), pass_credentials=True):
        listener.close()


async def test_a_socket_that_nobody_listens_on_any_more_is_replaced(short_directory: Path) -> None:
    path = short_directory / ".s.PGSQL.1"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    await open_and_close(f"unix:{short_directory}:1")
    assert not path.exists()


@pytest.mark.parametrize("backlog_full", [False, True])
async def test_a_socket_in_use_is_left_alone(short_directory: Path, backlog_full: bool) -> None:
    path = short_directory / ".s.PGSQL.1"
    with socket.socket(socket.AF_UNIX) as other, socket.socket(socket.AF_UNIX) as waiting:
        other.bind(str(path))
        other.listen(0)
        if backlog_full:
            waiting.connect(str(path))
        with pytest.raises(ConfigurationError, match="another server listens"):
            await open_and_close(f"unix:{short_directory}:1")
        assert path.is_socket()


async def test_what_is_no_socket_is_left_alone(short_directory: Path) -> None:
    path = short_directory / ".s.PGSQL.1"
    path.write_text("precious")
    with pytest.raises(ConfigurationError, match="something that is no socket stands at"):
        await open_and_close(f"unix:{short_directory}:1")
    assert path.read_text() == "precious"


async def test_a_socket_that_another_guard_has_put_in_its_place_is_left_alone(short_directory: Path) -> None:
    address = parse_listen(f"unix:{short_directory}:1")
    assert isinstance(address, UnixAddress)
    (listener,) = await open_listeners(address, pass_credentials=False)
    remove(address.path)
    (successor,) = await open_listeners(address, pass_credentials=False)
    listener.close()
    assert exists(address.path)
    successor.close()
    assert not exists(address.path)


async def test_a_port_in_use(backend: FakeBackend) -> None:
    with pytest.raises(ConfigurationError, match=rf"--listen 127.0.0.1:{backend.port}: Address already in use: "):
        await open_and_close(f"127.0.0.1:{backend.port}")


async def test_that_one_of_several_is_in_use_closes_the_others(backend: FakeBackend, short_directory: Path) -> None:
    listen = [f"unix:{short_directory}:1", f"127.0.0.1:{backend.port}"]
    with pytest.raises(ConfigurationError):
        async with running(backend, listen=listen):
            pass
    assert not exists(f"{short_directory}/.s.PGSQL.1")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("unix:/nowhere/at/all", "create the directory /nowhere/at/all"),
        ("unix:/sys:1", "use a directory in which pgguard may create /sys/.s.PGSQL.1"),
        ("nowhere.invalid:1", "Name or service not known|Temporary failure in name resolution|No address"),
        ("x" * 64 + ".example:1", "there can be no such host name"),
        ("192.0.2.1:1", "it is no address of this machine"),
    ],
)
async def test_where_it_can_not_listen_it_says_what_to_change(text: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says) as raised:
        await open_and_close(text)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5432",
        ":5432",
        "127.0.0.1",
        "127.0.0.1:",
        "127.0.0.1:x",
        "127.0.0.1:65536",
        "127.0.0.1:-1",
        "::1:5432",
        "127.0.0.1:\N{ARABIC-INDIC DIGIT FIVE}",
        "unix:",
        "unix::1",
        "unix:/tmp:x",
        "unix:" + "x" * 108,
        "127.0.0.1:1,127.0.0.1:2",
    ],
)
def test_what_is_no_address_to_listen_on(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^--listen "):
        parse_listen(text)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.2"])
async def test_a_guard_is_not_put_in_front_of_itself(backend: FakeBackend, host: str) -> None:
    port = backend.port
    backend.close()
    with pytest.raises(ConfigurationError, match="pgguard itself listens"):
        async with running(backend, listen=[f"0.0.0.0:{port}"], upstream=f"host={host} port={port}"):
            pass


async def test_a_guard_is_not_put_in_front_of_its_own_unix_socket(backend: FakeBackend, short_directory: Path) -> None:
    link = short_directory / "link"
    link.symlink_to(short_directory)
    with pytest.raises(ConfigurationError, match="pgguard itself listens"):
        async with running(backend, listen=[f"unix:{short_directory}:7"], upstream=f"host={link} port=7"):
            pass


async def test_the_same_port_on_another_address_is_another_server(backend: FakeBackend) -> None:
    async with running(backend, listen=[f"127.0.0.2:{backend.port}"]):
        pass
