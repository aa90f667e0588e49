"""What lies unread in a client's socket, and what those do who have it open: asked of the kernel, of real processes."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pgguard.attribution.attention import Attention, attention
from pgguard.attribution.ebpf.probe import ProbeUnavailable, SenderProbe
from pgguard.attribution.evidence import Process
from pgguard.attribution.processes import read_process
from pgguard.attribution.sockets import SockDiag, client_socket
from pgguard.attribution.threads import find_sleep, system_call
from tests.attribution.puppets import THREADS, Puppet

Puppets = Callable[[], Puppet]

FAMILIES = [
    pytest.param((socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "127.0.0.1"), id="IPv4"),
    pytest.param((socket.AF_INET6, "::1"), (socket.AF_INET6, "::1"), id="IPv6"),
    pytest.param((socket.AF_INET6, "::"), (socket.AF_INET, "127.0.0.1"), id="IPv4 to a dual-stack listener"),
    pytest.param((socket.AF_INET6, "::"), (socket.AF_INET6, "::ffff:127.0.0.1"), id="IPv4-mapped on both ends"),
]


def _inode(sock: socket.socket) -> int:
    return os.fstat(sock.fileno()).st_ino


def _unread(accepted: socket.socket, client: socket.socket) -> int | None:
    with SockDiag() as diag:
        return diag.unread(client_socket(accepted), _inode(client))


def _check_counts(accepted: socket.socket, client: socket.socket) -> None:
    """Everything that has come and has not been read counts, whatever is done to look at it."""
    assert _unread(accepted, client) == 0
    accepted.sendall(b"x" * 500)
    assert len(client.recv(500, socket.MSG_PEEK)) == 500
    assert _unread(accepted, client) == 500
    assert len(client.recv(100)) == 100
    assert _unread(accepted, client) == 400
    accepted.sendall(b"y" * 10)
    assert client.recv(400) == b"x" * 400
    assert _unread(accepted, client) == 10
    assert client.recv(100) == b"y" * 10
    assert _unread(accepted, client) == 0


@pytest.mark.parametrize(("listen_on", "connect_to"), FAMILIES)
def test_what_a_tcp_client_has_not_read_is_counted_in_every_family(
    listen_on: tuple[socket.AddressFamily, str], connect_to: tuple[socket.AddressFamily, str]
) -> None:
    family, host = listen_on
    dual = family == socket.AF_INET6 and host == "::"
    with (
        socket.create_server((host, 0), family=family, dualstack_ipv6=dual) as listener,
        socket.socket(connect_to[0]) as client,
    ):
        client.connect((connect_to[1], listener.getsockname()[1]))
        with listener.accept()[0] as accepted:
            _check_counts(accepted, client)


@pytest.fixture
def unix_listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        yield listener


def test_what_a_unix_client_has_not_read_is_counted(unix_listener: socket.socket) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(unix_listener.getsockname())
        with unix_listener.accept()[0] as accepted:
            _check_counts(accepted, client)


def test_a_socket_that_the_probe_watches_is_counted_like_any_other() -> None:
    try:
        probe = SenderProbe([], blocking=True)
    except ProbeUnavailable as unavailable:
        pytest.skip(str(unavailable))
    with probe, socket.create_server(("127.0.0.1", 0)) as listener:
        probe.add(*listener.getsockname())
        with socket.create_connection(listener.getsockname()) as client, listener.accept()[0] as accepted:
            client.send(b"x")
            assert accepted.recv(1) == b"x"
            assert [pid for _, size, _, _, pid, *_ in probe.read() if size == 1] == [os.getpid()]
            _check_counts(accepted, client)


def test_nothing_is_said_of_a_socket_that_was_closed_or_is_another_one(unix_listener: socket.socket) -> None:
    with socket.create_server(("127.0.0.1", 0)) as tcp:
        for listener in (tcp, unix_listener):
            client = socket.socket(listener.family)
            client.connect(listener.getsockname())
            with listener.accept()[0] as accepted, SockDiag() as diag:
                described, inode = client_socket(accepted), _inode(client)
                if listener is tcp:
                    assert diag.unread(described, inode + 1) is None
                client.close()
                assert diag.unread(described, inode) is None


# What the holders do


class Client:
    """A process with a connection in which something lies unread."""

    def __init__(self, puppet: Puppet, accepted: socket.socket) -> None:
        self.puppet = puppet
        self.accepted = accepted
        process = read_process(puppet.pid)
        assert process is not None
        self.process: Process = process
        self.inode: int = puppet.do("os.fstat(c.fileno()).st_ino")
        puppet.do(THREADS)
        accepted.sendall(b"x" * 100)

    def becomes(self, *wanted: Attention) -> None:
        """Wait until that is what is seen."""
        deadline = time.monotonic() + 30
        while (seen := attention([self.process], self.inode)) not in wanted:
            assert time.monotonic() < deadline, seen


@pytest.fixture
def client(puppet: Puppets) -> Iterator[Client]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = puppet()
        with one.connect(listener) as accepted:
            yield Client(one, accepted)


def test_a_process_that_waits_for_something_else_is_elsewhere(client: Client) -> None:
    client.becomes(Attention.ELSEWHERE)
    client.puppet.do("start(lambda: time.sleep(100)); start(lambda: poll(other)); start(threading.Lock().acquire)")
    client.becomes(Attention.ELSEWHERE)


@pytest.mark.parametrize("stop", [signal.SIGSTOP, signal.SIGTSTP])
def test_a_process_that_is_stopped_is_not_elsewhere(client: Client, stop: signal.Signals) -> None:
    os.kill(client.puppet.pid, stop)
    client.becomes(Attention.STOPPED)
    os.kill(client.puppet.pid, signal.SIGCONT)
    client.becomes(Attention.ELSEWHERE)


def test_a_process_that_is_being_debugged_is_not_elsewhere(client: Client, puppet: Puppets) -> None:
    debugger = puppet()
    debugger.do("libc = ctypes.CDLL(None, use_errno=True)")
    if debugger.do(f"libc.ptrace(16, {client.puppet.pid}, None, None)"):  # PTRACE_ATTACH
        pytest.skip("ptrace is not allowed here")
    client.becomes(Attention.STOPPED)
    debugger.end()
    os.kill(client.puppet.pid, signal.SIGCONT)
    client.becomes(Attention.ELSEWHERE)


def test_a_process_in_a_frozen_cgroup_is_not_elsewhere(client: Client) -> None:
    mounted = re.search(r"^\S+ (\S+) cgroup2 ", Path("/proc/mounts").read_text(), re.MULTILINE)
    if mounted is None:
        pytest.skip("no cgroup v2 hierarchy is mounted")
    group = Path(mounted[1], f"pgguard-test-{os.getpid()}")
    before = re.search(r"^0::(.*)$", Path(f"/proc/{client.puppet.pid}/cgroup").read_text(), re.MULTILINE)
    assert before is not None
    try:
        group.mkdir()
        (group / "cgroup.procs").write_text(str(client.puppet.pid))
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"no cgroup can be made here: {error}")
    try:
        (group / "cgroup.freeze").write_text("1")
        client.becomes(Attention.STOPPED)
        (group / "cgroup.freeze").write_text("0")
        client.becomes(Attention.ELSEWHERE)
    finally:
        (group / "cgroup.freeze").write_text("0")
        Path(mounted[1] + before[1], "cgroup.procs").write_text(str(client.puppet.pid))
        group.rmdir()


def test_a_process_that_computes_may_be_on_its_way(client: Client) -> None:
    client.puppet.do("pid = os.fork() or spin()")
    busy = read_process(client.puppet.do("pid"))
    assert busy is not None
    client.process = busy
    client.becomes(Attention.RUNS)
    client.puppet.do("os.kill(pid, 9)")


@pytest.mark.parametrize("events", ["select.EPOLLIN", "select.EPOLLIN | select.EPOLLET"])
def test_an_event_loop_that_watches_the_socket_will_read_however_long_it_is_kept_from_it(
    client: Client, events: str
) -> None:
    client.puppet.do(f"loop = select.epoll(); loop.register(c, {events})")
    client.becomes(Attention.READS)
    client.puppet.do("loop.modify(c, select.EPOLLOUT)")
    client.becomes(Attention.ELSEWHERE)


def test_an_event_loop_that_wanted_one_event_and_has_had_it_watches_no_more(client: Client) -> None:
    """As GHC's does, whose threads ask anew each time that they wait."""
    client.puppet.do("loop = select.epoll(); loop.register(c, select.EPOLLIN | select.EPOLLONESHOT)")
    client.becomes(Attention.READS)
    client.puppet.do("loop.poll(0)")
    client.becomes(Attention.ELSEWHERE)


def test_an_event_loop_for_other_sockets_does_not_watch_this_one(client: Client) -> None:
    client.puppet.do("loop = select.epoll(); loop.register(other, select.EPOLLIN)")
    client.becomes(Attention.ELSEWHERE)


def test_a_process_that_is_gone_is_not_elsewhere(client: Client) -> None:
    client.puppet.end()
    client.becomes(Attention.UNKNOWN)
    assert attention([], client.inode) is Attention.UNKNOWN


def test_of_several_processes_one_that_may_read_is_enough(client: Client) -> None:
    client.puppet.do("pid = fork(lambda: globals().update(loop=select.epoll()) or loop.register(c, select.EPOLLIN))")
    child = read_process(client.puppet.do("pid"))
    assert child is not None
    assert attention([client.process, child], client.inode) is Attention.READS
    os.kill(client.puppet.pid, signal.SIGSTOP)
    client.becomes(Attention.STOPPED)
    assert attention([client.process, child], client.inode) is Attention.STOPPED
    os.kill(client.puppet.pid, signal.SIGCONT)


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("time.sleep(100)", "clock_nanosleep"),
        ("(lock := threading.Lock()).acquire() and lock.acquire()", "futex"),
        ("poll(other)", "poll"),
    ],
)
def test_what_a_thread_sleeps_in_has_a_name_whatever_it_waits_for(client: Client, code: str, name: str) -> None:
    tid = client.puppet.do(f"start(lambda: {code})")
    deadline = time.monotonic() + 30
    while True:
        sleep = find_sleep(client.process.pid, client.process.started, tid)
        if sleep is not None and system_call(sleep) in {name, name.replace("poll", "ppoll")}:
            break
        assert time.monotonic() < deadline, sleep and system_call(sleep)


def test_a_thread_that_has_run_since_is_in_no_such_sleep(client: Client) -> None:
    tid = client.puppet.do("start(lambda: [time.sleep(0.001) for _ in range(10**6)])")
    sleep = None
    while sleep is None:
        sleep = find_sleep(client.process.pid, client.process.started, tid)
    time.sleep(0.05)
    assert system_call(sleep) is None
