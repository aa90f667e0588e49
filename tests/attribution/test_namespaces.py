"""Clients in network namespaces of their own, connected with the test's by a pair of virtual Ethernet interfaces."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from pgguard.attribution import namespaces
from pgguard.attribution.holders import HolderWatch
from pgguard.attribution.namespaces import NetworkNamespaces, find_in_namespace, in_a_new_thread, read_tables
from pgguard.attribution.processes import ProcessBook
from pgguard.attribution.sockets import SockDiag, TcpClient, client_socket
from tests.attribution.puppets import Puppet, outlive_a_tick
from tests.servers import not_installed

Puppets = Callable[[], Puppet]

_SETNS = """
import ctypes
def enter(path):
    with open(path) as namespace:
        assert ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0x40000000) == 0, ctypes.get_errno()
"""


@dataclass(frozen=True)
class Container:
    """A network namespace, and the addresses of the test's end of the wire that leads there."""

    path: Path
    ipv4: str
    ipv6: str
    link_local: str = "fe80::1"

    def enter(self, puppet: Puppet) -> Puppet:
        puppet.do(_SETNS)
        puppet.do(f"enter({str(self.path)!r})")
        return puppet


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False, timeout=60)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def _lay_wire(stack: ExitStack, *, address: int) -> Container:
    name = f"pgg{secrets.token_hex(4)}"
    outer, inner = f"{name}o", f"{name}i"
    _ip("netns", "add", name)
    stack.callback(_ip, "netns", "del", name)
    _ip("link", "add", outer, "type", "veth", "peer", "name", inner, "netns", name)
    stack.callback(_ip, "link", "del", outer)
    # 198.18.0.0/15 is set aside for testing: RFC 2544. nodad: usable at once.
    for n, device, prefix in (1, outer, []), (2, inner, ["-n", name]):
        _ip(*prefix, "link", "set", device, "addrgenmode", "none")
        _ip(*prefix, "address", "add", f"198.18.{address}.{n}/24", "dev", device)
        for ipv6 in f"fd00:198:18:{address}::{n}/64", f"fe80::{n}/64":
            _ip(*prefix, "address", "add", ipv6, "dev", device, "nodad")
        _ip(*prefix, "link", "set", device, "up")
    return Container(Path("/run/netns", name), f"198.18.{address}.1", f"fd00:198:18:{address}::1")


@pytest.fixture
def containers() -> Iterator[Callable[[], Container]]:
    """Makes network namespaces, which are gone with their interfaces when the test is over."""
    if shutil.which("ip") is None:
        not_installed("iproute2")
    with ExitStack() as stack:
        addresses = iter(range(secrets.randbelow(200), 256))

        def make() -> Container:
            try:
                return _lay_wire(stack, address=next(addresses))
            except OSError as error:
                pytest.skip(f"no network namespace can be made here: {error}")

        yield make


@pytest.fixture
def container(containers: Callable[[], Container]) -> Container:
    return containers()


def _listen(host: str, family: int = socket.AF_INET) -> socket.socket:
    dual = host == "::"
    return socket.create_server((host, 0), family=family, dualstack_ipv6=dual)


def _describe(accepted: socket.socket) -> TcpClient:
    described = client_socket(accepted)
    assert isinstance(described, TcpClient)
    return described


def ask_in_namespace(pid: int, clients: Sequence[TcpClient]) -> list[int | None]:
    return in_a_new_thread(lambda: namespaces.ask_in_namespace(pid, clients))


def _inode(client: Puppet) -> int:
    inode = client.do("os.fstat(c.fileno()).st_ino")
    assert isinstance(inode, int)
    return inode


def _connect(client: Puppet, family: int, host: str, listener: socket.socket) -> socket.socket:
    port = listener.getsockname()[1]
    address = f"{host!r}, {port}"
    if host.startswith("fe80:"):
        address += ", 0, [index for index, name in socket.if_nameindex() if name != 'lo'][0]"
    client.do(f"c = socket.socket({int(family)}); c.settimeout(10); c.connect(({address}))")
    return listener.accept()[0]


CASES = [
    pytest.param(socket.AF_INET, "{ipv4}", socket.AF_INET, "{ipv4}", id="IPv4"),
    pytest.param(socket.AF_INET6, "{ipv6}", socket.AF_INET6, "{ipv6}", id="IPv6"),
    pytest.param(socket.AF_INET6, "::", socket.AF_INET, "{ipv4}", id="IPv4 to a dual-stack listener"),
    pytest.param(socket.AF_INET6, "::", socket.AF_INET6, "::ffff:{ipv4}", id="IPv4-mapped on both ends"),
    pytest.param(socket.AF_INET, "{ipv4}", socket.AF_INET6, "::ffff:{ipv4}", id="IPv4-mapped to IPv4"),
    pytest.param(socket.AF_INET6, "::", socket.AF_INET6, "{link_local}", id="IPv6, link-local"),
]


@pytest.mark.parametrize(("listen_family", "listen_on", "family", "connect_to"), CASES)
def test_a_client_in_another_network_namespace_is_told_from_its_neighbours_in_every_family(
    listen_family: int, listen_on: str, family: int, connect_to: str, container: Container, puppet: Puppets
) -> None:
    places = {"ipv4": container.ipv4, "ipv6": container.ipv6, "link_local": container.link_local}
    first, second = container.enter(puppet()), container.enter(puppet())
    target = connect_to.format(**places)
    with _listen(listen_on.format(**places), listen_family) as listener:
        for client in first, second:
            with _connect(client, family, target, listener) as accepted:
                described = _describe(accepted)
                inode = _inode(client)
                with SockDiag() as diag:
                    assert diag.client_inode(described) is None
                assert NetworkNamespaces().client_inodes([described]) == [inode]
                assert ask_in_namespace(client.pid, [described]) == [inode]
                assert read_tables(client.pid, [described]) == [inode]


def test_who_holds_the_socket_is_found_by_its_inode_like_anybody_else(container: Container, puppet: Puppets) -> None:
    watch, client = HolderWatch(ProcessBook()), container.enter(puppet())
    outlive_a_tick()
    with _listen(container.ipv4) as listener, _connect(client, socket.AF_INET, container.ipv4, listener) as accepted:
        described = _describe(accepted)
        assert client.do("ctypes.CDLL(None).unshare(0x20000000)") == 0  # CLONE_NEWPID
        child = client.do("fork()")
        (inode,) = NetworkNamespaces().client_inodes([described])
        assert inode is not None
        holders = watch.find({inode: described.opened})[inode]
        assert {process.pid: process.namespace_pid for process in holders.processes} == {client.pid: None, child: 1}


def test_clients_here_there_and_nowhere_are_told_apart_in_one_call(container: Container, puppet: Puppets) -> None:
    here, there = puppet(), container.enter(puppet())
    nowhere = TcpClient(bytes([192, 0, 2, 1]), 50000, bytes([192, 0, 2, 2]), 5432, 0, 0.0)
    with (
        _listen(container.ipv4) as listener,
        _connect(here, socket.AF_INET, container.ipv4, listener) as one,
        _connect(there, socket.AF_INET, container.ipv4, listener) as two,
    ):
        inodes = NetworkNamespaces().client_inodes([_describe(two), nowhere, _describe(one)])
        assert inodes == [_inode(there), None, _inode(here)]


def test_where_two_namespaces_have_such_a_socket_neither_is_believed(
    containers: Callable[[], Container], puppet: Puppets
) -> None:
    """Private addresses are used again and again; here a second wire has the first one's addresses."""
    container, twin = containers(), containers()
    first, second = container.enter(puppet()), twin.enter(puppet())
    with _listen(container.ipv4) as listener, _connect(first, socket.AF_INET, container.ipv4, listener) as accepted:
        described = _describe(accepted)
        address, port = accepted.getpeername()
        guard_port = listener.getsockname()[1]
        # A namespace's loopback interface takes any address, so that both ends of this connection are within.
        subprocess.run(["ip", "-n", twin.path.name, "link", "set", "lo", "up"], check=True)
        for one in address, container.ipv4:
            subprocess.run(["ip", "-n", twin.path.name, "address", "add", f"{one}/32", "dev", "lo"], check=True)
        second.do(
            f"listener = socket.create_server(({container.ipv4!r}, {guard_port}))\n"
            f"c = socket.create_connection(({container.ipv4!r}, {guard_port}), 10, ({address!r}, {port}))"
        )
        assert ask_in_namespace(first.pid, [described]) == [_inode(first)]
        assert ask_in_namespace(second.pid, [described]) == [_inode(second)]
        assert NetworkNamespaces().client_inodes([described]) == [None]


def test_without_the_right_to_enter_the_tables_are_read(
    container: Container, puppet: Puppets, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(namespaces, "_enter", refuse)
    client = container.enter(puppet())
    with _listen(container.ipv4) as listener, _connect(client, socket.AF_INET, container.ipv4, listener) as accepted:
        described = _describe(accepted)
        with pytest.raises(PermissionError):
            ask_in_namespace(client.pid, [described])
        assert NetworkNamespaces().client_inodes([described]) == [_inode(client)]


@pytest.mark.parametrize("may_enter", [True, False])
@pytest.mark.parametrize(("listen_family", "listen_on", "family", "connect_to"), CASES)
def test_what_lies_unread_in_another_namespace_is_counted(
    container: Container,
    puppet: Puppets,
    monkeypatch: pytest.MonkeyPatch,
    listen_family: int,
    listen_on: str,
    family: int,
    connect_to: str,
    *,
    may_enter: bool,
) -> None:
    def refuse(_: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not may_enter:
        monkeypatch.setattr(namespaces, "_enter", refuse)
    client = container.enter(puppet())
    places = {"ipv4": container.ipv4, "ipv6": container.ipv6, "link_local": "fe80::1"}
    with (
        _listen(listen_on.format(**places), listen_family) as listener,
        _connect(client, family, connect_to.format(**places), listener) as accepted,
    ):
        look = _describe(accepted), _inode(client), [os.getpid(), client.pid]
        accepted.sendall(b"x" * 500)
        assert client.do("len(c.recv(500, socket.MSG_PEEK | socket.MSG_WAITALL))") == 500
        assert client.do("len(c.recv(100))") == 100
        assert NetworkNamespaces().unread([look]) == [400]
        client.do("c.close()")
        assert NetworkNamespaces().unread([look]) == [None]


def test_a_process_without_the_right_to_enter_is_told_so(container: Container, puppet: Puppets) -> None:
    """What the kernel says to an ordinary user, who can read the tables all the same."""
    client, guard = container.enter(puppet()), puppet()
    with _listen(container.ipv4) as listener, _connect(client, socket.AF_INET, container.ipv4, listener) as accepted:
        described = _describe(accepted)
        # The interpreter may be where only root can import from, so whatever is needed is imported before.
        guard.do(
            "from pgguard.attribution import namespaces, sockets\n"
            f"client = sockets.{described!r}\n"
            "become_nobody()\n"
            "def attempt():\n"
            "    try: return namespaces.ask_in_namespace(os.getpid(), [client])\n"
            "    except PermissionError: return 'not permitted'"
        )
        assert guard.do("attempt()") == "not permitted"
        assert guard.do(f"namespaces.read_tables({client.pid}, [client])") == [_inode(client)]


def test_the_way_in_may_be_any_process_that_is_still_there(container: Container, puppet: Puppets) -> None:
    gone, client = container.enter(puppet()), container.enter(puppet())
    with _listen(container.ipv4) as listener, _connect(client, socket.AF_INET, container.ipv4, listener) as accepted:
        described = _describe(accepted)
        gone.end()
        for pids, inode in ([gone.pid, client.pid], _inode(client)), ([gone.pid], None):
            assert in_a_new_thread(partial(find_in_namespace, pids, [described])) == [inode]
        with pytest.raises(FileNotFoundError):
            ask_in_namespace(gone.pid, [described])
        with pytest.raises(FileNotFoundError):
            read_tables(gone.pid, [described])


def test_a_client_that_has_closed_its_socket_is_found_nowhere(container: Container, puppet: Puppets) -> None:
    client = container.enter(puppet())
    with _listen(container.ipv4) as listener, _connect(client, socket.AF_INET, container.ipv4, listener) as accepted:
        described = _describe(accepted)
        client.do("c.close()")
        assert ask_in_namespace(client.pid, [described]) == [None]
        assert read_tables(client.pid, [described]) == [None]
        assert NetworkNamespaces().client_inodes([described]) == [None]


def test_only_the_exact_socket_counts(container: Container, puppet: Puppets) -> None:
    """As where addresses are translated: the port is right, the address isn't, or the other way round."""
    client = container.enter(puppet())
    with _listen(container.ipv4) as listener, _connect(client, socket.AF_INET, container.ipv4, listener) as accepted:
        described = _describe(accepted)
        others = [
            described._replace(address=bytes([198, 51, 100, 1])),
            described._replace(port=described.port ^ 1),
            described._replace(guard_address=bytes([198, 51, 100, 1])),
            described._replace(guard_port=described.guard_port ^ 1),
        ]
        assert ask_in_namespace(client.pid, others) == [None] * 4
        assert read_tables(client.pid, others) == [None] * 4


def test_a_client_of_the_guards_own_namespace_costs_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        pytest.fail("the namespaces were listed")

    monkeypatch.setattr(namespaces, "_list_namespaces", fail)
    found = NetworkNamespaces()
    for family, host in (socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"):
        with _listen(host, family) as listener, socket.socket(family) as client:
            client.connect(listener.getsockname()[:2])
            with listener.accept()[0] as accepted:
                described = _describe(accepted)
                assert found.client_inodes([described]) == [os.fstat(client.fileno()).st_ino]
                client.close()
                assert found.client_inodes([described]) == [None]


def test_remote_clients_have_the_namespaces_listed_now_and_then_only(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = 0

    def count() -> dict[str, list[int]]:
        nonlocal listed
        listed += 1
        return {}

    monkeypatch.setattr(namespaces, "_list_namespaces", count)
    monkeypatch.setattr(namespaces, "_FRESH", 600.0)
    elsewhere = TcpClient(bytes([192, 0, 2, 1]), 50000, bytes([192, 0, 2, 2]), 5432, 0, 0.0)
    found = NetworkNamespaces()
    monkeypatch.setattr(found, "_listed_at", time.monotonic() - 601)
    for _ in range(100):
        assert found.client_inodes([elsewhere]) == [None]
    assert listed == 1


def test_no_more_namespaces_are_asked_than_is_allowed_those_that_had_clients_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []
    home = 7

    def find(pids: list[int], clients: list[TcpClient]) -> list[int | None]:
        asked.extend(pids)
        return [4711 if pids == [home] else None for _ in clients]

    monkeypatch.setattr(namespaces, "_list_namespaces", lambda: {f"net:[{n}]": [n] for n in range(10)})
    monkeypatch.setattr(namespaces, "find_in_namespace", find)
    elsewhere = TcpClient(bytes([192, 0, 2, 1]), 50000, bytes([192, 0, 2, 2]), 5432, 0, 0.0)
    found = NetworkNamespaces(limit=8, seconds=60)
    assert found.client_inodes([elsewhere]) == [4711]
    assert asked == [0, 1, 2, 3, 4, 5, 6, 7]
    asked.clear()
    assert found.client_inodes([elsewhere]) == [4711]
    assert asked == [7, 0, 1, 2, 3, 4, 5, 6]
    asked.clear()
    hasty = NetworkNamespaces(seconds=-1)
    assert hasty.client_inodes([elsewhere]) == [None]
    assert asked == []


def test_a_look_into_another_namespace_leaves_the_guard_where_it_is_and_nothing_behind(
    container: Container, puppet: Puppets
) -> None:
    client = container.enter(puppet())
    with _listen(container.ipv4) as listener, _connect(client, socket.AF_INET, container.ipv4, listener) as accepted:
        described = _describe(accepted)
        before = threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
        own = Path("/proc/thread-self/ns/net").readlink()
        assert NetworkNamespaces().client_inodes([described]) == [_inode(client)]
        assert Path("/proc/thread-self/ns/net").readlink() == own
        assert (threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))) == before
