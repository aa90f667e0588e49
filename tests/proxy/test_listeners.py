"""Where the guard listens, and what it does about sockets that others use or have left behind."""

from __future__ import annotations

import os
import re
import resource
import socket
import stat
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio

from pgguard.proxy.addresses import TcpAddress, UnixAddress, parse_listen
from pgguard.proxy.errors import ConfigurationError
from pgguard.proxy.listeners import open_listeners
from tests.proxy.conftest import running
from tests.proxy.fake_backend import FakeBackend
from tests.proxy.messages import LOGGED_IN, Client, startup

NOBODY = 65534
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give directories away")


async def test_several_at_once_each_under_its_own_address(backend: FakeBackend, short_directory: Path) -> None:
    listen = ["127.0.0.1:0", "[::1]:0", f"unix:{short_directory}:1", f"unix:@{short_directory}:2"]
    async with running(backend, listen=listen) as house:
        four, six, unix, abstract = [address for front in house.guard.fronts for address in front.addresses]
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


def change_mode(path: Path, mode: int) -> None:
    path.chmod(mode)


def threads() -> set[str]:
    return {task.name for task in Path("/proc/self/task").iterdir()}


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
    with pytest.raises(ConfigurationError, match="exists and is not a socket"):
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


async def test_everybody_may_connect_whatever_the_umask(short_directory: Path) -> None:
    before = os.umask(0o077)
    try:
        (listener,) = await open_listeners(parse_listen(f"unix:{short_directory}:1"), pass_credentials=True)
        mode = stat.S_IMODE((short_directory / ".s.PGSQL.1").stat().st_mode)
        listener.close()
        assert mode == 0o777
        assert os.umask(0o077) == 0o077
    finally:
        os.umask(before)


class _Replaced(socket.socket):
    """A socket in a directory of somebody who puts a link in its place at once."""

    target = ""

    def bind(self, address: object) -> None:
        super().bind(address)  # type: ignore[arg-type]
        remove(str(address))
        Path(str(address)).symlink_to(self.target)


async def test_a_link_in_the_sockets_place_is_not_followed(
    short_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody who can write to the directory would have root make any file everybody's."""
    secret = short_directory / "secret"
    secret.touch(0o600)
    _Replaced.target = str(secret)
    monkeypatch.setattr(socket, "socket", _Replaced)
    with pytest.raises(ConfigurationError, match="somebody moved the socket"):
        await open_and_close(f"unix:{short_directory}:1")
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600


async def test_a_link_is_left_alone_wherever_it_leads(short_directory: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(short_directory / "elsewhere"))
    link = short_directory / ".s.PGSQL.1"
    link.symlink_to(short_directory / "elsewhere")
    with pytest.raises(ConfigurationError, match="exists and is not a socket"):
        await open_and_close(f"unix:{short_directory}:1")
    assert link.is_symlink()
    assert (short_directory / "elsewhere").is_socket()


async def test_what_is_removed_at_the_end_is_the_guards_own_wherever_its_directory_went(short_directory: Path) -> None:
    ours, theirs = short_directory / "d", short_directory / "other"
    ours.mkdir()
    theirs.mkdir()
    (listener,) = await open_listeners(parse_listen(f"unix:{ours}:1"), pass_credentials=True)
    os.link(ours / ".s.PGSQL.1", theirs / ".s.PGSQL.1")
    ours.rename(short_directory / "moved")
    ours.symlink_to(theirs)
    listener.close()
    assert not exists(f"{short_directory}/moved/.s.PGSQL.1")
    assert (theirs / ".s.PGSQL.1").is_socket()


@pytest.mark.parametrize(
    ("mode", "says"),
    [(0o700, None), (0o755, None), (0o1777, None), (0o777, "anybody can write to it")],
    ids=["own", "readable", "sticky", "everybodys"],
)
async def test_who_else_can_put_a_socket_there_is_said(short_directory: Path, mode: int, says: str | None) -> None:
    change_mode(short_directory, mode)
    (listener,) = await open_listeners(parse_listen(f"unix:{short_directory}:1"), pass_credentials=True)
    remark = listener.remark
    listener.close()
    if says is None:
        assert remark is None
    else:
        assert remark == (
            f"other users can replace the socket unix:{short_directory}:1, because {says}: "
            "use a directory that belongs to the guard's user, or make this one sticky (chmod +t)"
        )


@only_root
async def test_who_owns_the_directory_can_replace_the_socket_even_if_it_is_sticky(short_directory: Path) -> None:
    change_mode(short_directory, 0o1755)
    os.chown(short_directory, 65534, 65534)
    (listener,) = await open_listeners(parse_listen(f"unix:{short_directory}:1"), pass_credentials=True)
    remark = listener.remark
    listener.close()
    assert "because it belongs to user nobody: use a directory that belongs to" in (remark or "")


def _nobodys(directory: Path) -> Path:
    """A directory that an ordinary user can lead elsewhere, as the one above it is his."""
    (directory / "theirs" / "d").mkdir(parents=True)
    change_mode(directory, 0o755)
    os.chown(directory / "theirs", NOBODY, NOBODY)
    return directory / "theirs" / "d"


class _Led(socket.socket):
    """A socket that is bound when its directory's user has just put a link in the directory's place."""

    target = ""

    def bind(self, address: object) -> None:
        directory = Path(str(address)).parent
        directory.rename(f"{directory}.before")
        directory.symlink_to(self.target)
        # Nobody could do that, but for this process's own user by now.
        super().bind(address)  # type: ignore[arg-type]


@only_root
async def test_root_makes_no_socket_where_a_user_leads_its_path(
    short_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """He may not write there himself."""
    directory = _nobodys(short_directory)
    os.chown(directory, NOBODY, NOBODY)
    (short_directory / "roots").mkdir(0o755)
    _Led.target = str(short_directory / "roots")
    monkeypatch.setattr(socket, "socket", _Led)
    with pytest.raises(ConfigurationError, match="Permission denied: user nobody can replace the directory"):
        await open_and_close(f"unix:{directory}:1")
    assert list((short_directory / "roots").iterdir()) == []
    assert os.geteuid() == 0


@only_root
async def test_root_follows_a_users_link_no_further_than_the_user_may_go(short_directory: Path) -> None:
    directory = _nobodys(short_directory)
    (short_directory / "roots").mkdir(0o755)
    (short_directory / "his").mkdir(0o755)
    os.chown(short_directory / "his", NOBODY, NOBODY)
    link = directory.parent / "link"
    link.symlink_to(short_directory / "roots")
    with pytest.raises(ConfigurationError, match="use a directory that nobody else can move or replace"):
        await open_and_close(f"unix:{link}:1")
    assert list((short_directory / "roots").iterdir()) == []
    link.unlink()
    link.symlink_to(short_directory / "his")
    (listener,) = await open_listeners(parse_listen(f"unix:{link}:1"), pass_credentials=True)
    assert (short_directory / "his" / ".s.PGSQL.1").stat().st_uid == NOBODY
    assert listener.remark is not None
    listener.close()
    assert list((short_directory / "his").iterdir()) == [], "it is removed as ever"


@only_root
async def test_who_can_put_another_directory_in_its_place_is_said(short_directory: Path) -> None:
    directory = _nobodys(short_directory)
    change_mode(directory, 0o1777)
    (listener,) = await open_listeners(parse_listen(f"unix:{directory}:1"), pass_credentials=True)
    remark = listener.remark
    listener.close()
    assert remark == (
        f"other users can replace the socket unix:{directory}:1, because user nobody can replace the directory "
        f"{directory}: use a directory that nobody else can move or replace"
    )


@only_root
async def test_root_makes_no_socket_by_a_path_that_anybody_can_lead_elsewhere(short_directory: Path) -> None:
    above = short_directory / "everybodys"
    (above / "d").mkdir(parents=True)
    change_mode(above, 0o777)
    with pytest.raises(
        ConfigurationError,
        match=r"other users .* \(.*everybodys isn't safe: anybody can write to it\): use a directory that",
    ):
        await open_and_close(f"unix:{above}/d:1")
    change_mode(above, 0o1777)
    await open_and_close(f"unix:{above}/d:1")


async def test_a_directory_in_which_it_may_not_be_removed_any_more_ends_nothing(short_directory: Path) -> None:
    """Whoever has changed to another user may not; the next one clears it away."""
    (listener,) = await open_listeners(parse_listen(f"unix:{short_directory}:1"), pass_credentials=True)
    listener._place.clear = _refuse  # type: ignore[union-attr, method-assign]
    listener.close()
    assert exists(f"{short_directory}/.s.PGSQL.1")
    await open_and_close(f"unix:{short_directory}:1")
    assert not exists(f"{short_directory}/.s.PGSQL.1")


def _refuse() -> None:
    raise PermissionError


async def test_no_thread_is_left_that_would_keep_the_rights_of_root() -> None:
    """Names are looked up where the system keeps them, in the thread that waits for that."""
    before = threads()
    for listener in await open_listeners(parse_listen("localhost:0"), pass_credentials=True):
        listener.close()
    assert threads() <= before


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
        ("x" * 64 + ".example:1", "this can't be a host name"),
        ("192.0.2.1:1", "this host has no such address"),
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


def system_limit() -> int:
    return int(Path("/proc/sys/net/core/somaxconn").read_text())


@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
async def test_as_many_may_wait_as_the_system_lets_wait(short_directory: Path, unix: bool) -> None:
    """Nobody accepts them yet. Over a Unix socket the next one would have EAGAIN, over TCP it would try again later."""
    many = min(system_limit(), 1200)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, many + 200)), hard))
    text = f"unix:{short_directory}:1" if unix else "127.0.0.1:0"
    [listener] = await open_listeners(parse_listen(text), pass_credentials=False)
    try:
        with ExitStack() as stack:
            for _ in range(many):
                sock = stack.enter_context(socket.socket(socket.AF_UNIX if unix else socket.AF_INET))
                sock.settimeout(5)
                sock.connect(listener.socket.getsockname())
    finally:
        listener.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
