from __future__ import annotations

import os
import platform
import re
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pgguard.attribution import threads
from pgguard.attribution.evidence import Process
from pgguard.attribution.processes import Stat, read_process
from pgguard.attribution.threads import AARCH64, X86_64, Obstacle, Waiting, Waits, waiting_threads
from tests.attribution.puppets import Puppet
from tests.servers import not_installed

Puppets = Callable[[], Puppet]

_CALLS = {"x86_64": X86_64, "aarch64": AARCH64}[platform.machine()]
_FUTEX = {"x86_64": 202, "aarch64": 98}[platform.machine()]
_NUMBERS = {name: number for number, name in _CALLS.items()} | {"futex": _FUTEX}
_IO_URING_SETUP = 425

_PRELUDE = """
import ctypes, select, threading
libc = ctypes.CDLL(None, use_errno=True)
other, other_end = socket.socketpair()

def poll(*sockets, events=select.POLLIN, timeout=None):
    poll = select.poll()
    for each in sockets:
        poll.register(each, events)
    poll.poll(timeout)

def ppoll(*sockets):
    class pollfd(ctypes.Structure):
        _fields_ = [("fd", ctypes.c_int), ("events", ctypes.c_short), ("revents", ctypes.c_short)]
    libc.ppoll((pollfd * len(sockets))(*[(s.fileno(), 1, 0) for s in sockets]), len(sockets), None, None)

def epoll(*sockets, events=select.EPOLLIN):
    with select.epoll() as epoll:
        for each in sockets:
            epoll.register(each, events)
        epoll.poll()

def fill(sock):
    sock.setblocking(False)
    try:
        while sock.send(bytes(65536)):
            pass
    except BlockingIOError:
        sock.setblocking(True)

def start(target, name=None):
    "Starts a thread that dies with the process, and returns its tid."
    def run():
        if name:
            open(f"/proc/self/task/{threading.get_native_id()}/comm", "w").write(name)
        target()
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread.native_id
"""


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


@pytest.fixture
def client(listener: socket.socket, puppet: Puppets) -> Iterator[Puppet]:
    """A process connected as ``c``, with another socket ``other``, on which nothing arrives either."""
    client = puppet()
    client.do(_PRELUDE)
    with client.connect(listener):
        yield client


def _process(pid: int) -> Process:
    process = read_process(pid)
    assert process is not None
    return process


def _inode(client: Puppet) -> int:
    inode = client.do("os.fstat(c.fileno()).st_ino")
    assert isinstance(inode, int)
    return inode


def _look(client: Puppet) -> Waits:
    """Look at a process that has just taken an order: that its main thread may run still says nothing."""
    waits = waiting_threads([_process(client.pid)], _inode(client), seconds=5)
    return replace(waits, running=frozenset())


def _start(client: Puppet, code: str, *calls: str, pid: int | None = None) -> int:
    """Start a thread that runs ``code``, and return its tid when it is blocked in one of ``calls``."""
    tid = client.do(f"start(lambda: {code})")
    assert isinstance(tid, int)
    _until_blocked(pid or client.pid, tid, *calls)
    return tid


def _until_blocked(pid: int, tid: int, *calls: str) -> None:
    numbers = {str(_NUMBERS[call]) for call in calls if call in _NUMBERS}
    _until(lambda: Path(f"/proc/{pid}/task/{tid}/syscall").read_text().split()[0] in numbers)


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def _the_one(waits: Waits, tid: int) -> Waiting:
    assert waits.complete
    assert [waiting.thread.tid for waiting in waits.threads] == [tid]
    return waits.threads[0]


@pytest.mark.parametrize(
    ("code", "calls"),
    [
        pytest.param("c.recv(1)", ("recvfrom",), id="recvfrom"),
        pytest.param("c.recvmsg(1)", ("recvmsg",), id="recvmsg"),
        pytest.param("os.read(c.fileno(), 1)", ("read",), id="read"),
        pytest.param("os.readv(c.fileno(), [bytearray(1)])", ("readv",), id="readv"),
        pytest.param("libc.recvmmsg(c.fileno(), bytes(64), 1, 0, None)", ("recvmmsg",), id="recvmmsg"),
        pytest.param("poll(c)", ("poll", "ppoll"), id="poll"),
        pytest.param("poll(c, timeout=600_000)", ("poll", "ppoll"), id="poll with a time-out"),
        pytest.param("ppoll(c)", ("ppoll",), id="ppoll"),
        pytest.param("select.select([c], [], [])", ("select", "pselect6"), id="select"),
        pytest.param("epoll(c)", ("epoll_wait", "epoll_pwait"), id="epoll"),
    ],
)
def test_a_thread_that_waits_to_read_from_this_socket_alone_is_seen_whatever_it_waits_in(
    client: Puppet, code: str, calls: tuple[str, ...]
) -> None:
    tid = _start(client, code, *calls)
    waiting = _the_one(_look(client), tid)
    assert waiting.call in calls
    assert (waiting.readable, waiting.writable, waiting.others) == (True, False, 0)


@pytest.mark.parametrize(
    ("code", "calls"),
    [
        pytest.param("c.send(b'x')", ("sendto",), id="sendto"),
        pytest.param("c.sendmsg([b'x'])", ("sendmsg",), id="sendmsg"),
        pytest.param("os.write(c.fileno(), b'x')", ("write",), id="write"),
        pytest.param("os.writev(c.fileno(), [b'x'])", ("writev",), id="writev"),
        pytest.param("poll(c, events=select.POLLOUT)", ("poll", "ppoll"), id="poll"),
        pytest.param("select.select([], [c], [])", ("select", "pselect6"), id="select"),
        pytest.param("epoll(c, events=select.EPOLLOUT)", ("epoll_wait", "epoll_pwait"), id="epoll"),
    ],
)
def test_a_thread_that_waits_to_write_is_told_from_one_that_waits_to_read(
    client: Puppet, code: str, calls: tuple[str, ...]
) -> None:
    client.do("c.close(); c = other; fill(c)")  # TCP's buffers may still grow when they seem to be full
    tid = _start(client, code, *calls)
    waiting = _the_one(_look(client), tid)
    assert (waiting.readable, waiting.writable, waiting.others) == (False, True, 0)


@pytest.mark.parametrize(
    ("code", "calls"),
    [
        pytest.param("other.recv(1)", ("recvfrom",), id="recvfrom"),
        pytest.param("poll(other)", ("poll", "ppoll"), id="poll"),
        pytest.param("poll(c, events=select.POLLPRI)", ("poll", "ppoll"), id="poll for urgent data only"),
        pytest.param("ppoll(other)", ("ppoll",), id="ppoll"),
        pytest.param("select.select([other], [], [])", ("select", "pselect6"), id="select"),
        pytest.param("select.select([], [], [c])", ("select", "pselect6"), id="select for urgent data only"),
        pytest.param("epoll(other)", ("epoll_wait", "epoll_pwait"), id="epoll"),
        pytest.param("epoll(c, events=0)", ("epoll_wait", "epoll_pwait"), id="epoll for its end only"),
        pytest.param("[each.acquire() for each in [threading.Lock()] * 2]", ("futex",), id="lock"),
    ],
)
def test_a_thread_that_waits_for_something_else_is_not_taken_for_one_that_waits_for_the_socket(
    client: Puppet, code: str, calls: tuple[str, ...]
) -> None:
    _start(client, code, *calls)
    assert _look(client) == Waits()


@pytest.mark.parametrize(
    ("code", "calls"),
    [
        pytest.param("poll(other, c, other_end, c)", ("poll", "ppoll"), id="poll, c twice"),
        pytest.param("ppoll(other, c, other_end)", ("ppoll",), id="ppoll"),
        pytest.param("select.select([other, c], [], [other, other_end])", ("select", "pselect6"), id="select"),
        pytest.param("epoll(other, c, other_end)", ("epoll_wait", "epoll_pwait"), id="epoll"),
    ],
)
def test_who_waits_for_other_things_too_is_seen_with_how_many(
    client: Puppet, code: str, calls: tuple[str, ...]
) -> None:
    tid = _start(client, code, *calls)
    assert _the_one(_look(client), tid).others == 2


@pytest.mark.parametrize(
    "waker",
    [
        pytest.param("os.eventfd(0)", id="an eventfd"),
        pytest.param("os.pipe()[0]", id="a pipe"),
    ],
)
@pytest.mark.parametrize("wait", ["poll", "ppoll", "select"])
def test_who_can_be_woken_by_its_own_runtime_waits_for_this_socket_alone(client: Puppet, wait: str, waker: str) -> None:
    """Ruby polls an eventfd beside the socket, by which its threads wake one another."""
    client.do(f"waker = {waker}\nclass Waker:\n    fileno = lambda self: waker")
    code, calls = {
        "poll": ("poll(Waker(), c)", ("poll", "ppoll")),
        "ppoll": ("ppoll(c, Waker())", ("ppoll",)),
        "select": ("select.select([Waker(), c], [], [])", ("select", "pselect6")),
    }[wait]
    tid = _start(client, code, *calls)
    waiting = _the_one(_look(client), tid)
    assert waiting.others == 0
    assert waiting.blocked is (wait != "select")


def test_two_sockets_are_two_whatever_else_is_in_the_set(client: Puppet) -> None:
    tid = _start(client, "poll(c, other, os.eventfd(0))", "poll", "ppoll")
    waiting = _the_one(_look(client), tid)
    assert (waiting.others, waiting.blocked) == (1, False)


@pytest.mark.parametrize(
    ("code", "calls", "blocked"),
    [
        pytest.param("c.recv(1)", ("recvfrom",), True, id="a read"),
        pytest.param("poll(c)", ("poll", "ppoll"), True, id="libpq's poll"),
        pytest.param("select.select([c], [], [])", ("select", "pselect6"), False, id="a watch for notifications"),
        pytest.param("epoll(c)", ("epoll_wait", "epoll_pwait"), False, id="an event loop with nothing else in it"),
        pytest.param("poll(c, other)", ("poll", "ppoll"), False, id="an event loop over poll"),
    ],
)
def test_blocked_is_who_can_do_nothing_but_read_its_answer(
    client: Puppet, code: str, calls: tuple[str, ...], blocked: bool
) -> None:
    tid = _start(client, code, *calls)
    assert _the_one(_look(client), tid).blocked is blocked


def test_a_process_with_one_thread_is_told_from_one_with_several(client: Puppet) -> None:
    child = client.do("fork()")
    assert threads.has_one_thread(_process(child))
    _until(lambda: threads.only_thread(_process(child)) is not None)
    sleep = threads.only_thread(_process(child))
    assert sleep is not None
    assert (sleep.thread.pid, sleep.thread.tid) == (child, child)
    assert threads.sleeps_still(sleep)
    _start(client, "c.recv(1)", "recvfrom")
    assert not threads.has_one_thread(_process(client.pid))
    assert threads.only_thread(_process(client.pid)) is None


def test_a_thread_is_not_the_only_one_if_another_has_ended_that_may_have_sent(client: Puppet) -> None:
    process = _process(client.pid)
    _until(lambda: threads.only_thread(process) is not None)
    client.do("one = threading.Thread(target=c.sendall, args=(b'x',)); one.start(); one.join()")
    _until(lambda: threads.all_asleep(process))
    assert threads.has_one_thread(process)
    assert threads.only_thread(process) is None


def test_the_only_thread_of_a_process_that_has_ended_is_nobody(client: Puppet) -> None:
    process = _process(client.pid)
    client.end()
    assert threads.only_thread(process) is None
    assert not threads.has_one_thread(process)
    assert not threads.all_asleep(process)


def test_a_process_that_sleeps_is_told_from_one_of_which_a_thread_runs(client: Puppet) -> None:
    _start(client, "c.recv(1)", "recvfrom")
    _until(lambda: threads.all_asleep(_process(client.pid)))
    client.do("def spin():\n    while True: pass")
    client.do("start(spin)")
    assert not threads.all_asleep(_process(client.pid))
    assert waiting_threads([_process(client.pid)], _inode(client), seconds=5).running == {client.pid}


def test_a_sleep_ends_when_the_thread_runs(client: Puppet) -> None:
    client.do("c.close(); c = other; held = threading.Lock(); held.acquire()")
    tid = _start(client, "(c.recv(1), held.acquire())", "recvfrom")
    sleep = _the_one(_look(client), tid).sleep
    assert threads.sleeps_still(sleep)
    client.do("other_end.send(b'x')")
    _until_blocked(client.pid, tid, "futex")
    assert not threads.sleeps_still(sleep)


def test_threads_that_have_run_are_told_from_those_that_sleep_on(client: Puppet) -> None:
    client.do("held, free = threading.Lock(), threading.Lock(); held.acquire(); free.acquire()")
    reader = _start(client, "c.recv(1)", "recvfrom")
    idle = _start(client, "held.acquire()", "futex")
    worker = _start(client, "(free.acquire(), held.acquire())", "futex")
    process = _process(client.pid)
    sleeps = threads.sleeps_of(process)
    assert {reader, idle, worker} <= {sleep.thread.tid for sleep in sleeps}
    client.do("free.release()")  # which runs the main thread too
    new = _start(client, "held.acquire()", "futex")
    _until(lambda: threads.restless_threads(process, sleeps).get(worker) is not None)
    restless = threads.restless_threads(process, sleeps)
    assert set(restless) == {client.pid, worker, new}
    sleep = restless[new]
    assert sleep is not None
    assert sleep.thread.tid == new


def test_of_a_process_with_very_many_threads_the_sleeps_are_not_told_apart(
    client: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    _start(client, "c.recv(1)", "recvfrom")
    monkeypatch.setattr(threads, "_SLEEPERS", 1)
    assert threads.sleeps_of(_process(client.pid)) == frozenset()


def test_of_a_process_that_has_ended_nobody_has_run(client: Puppet) -> None:
    process = _process(client.pid)
    client.end()
    assert threads.sleeps_of(process) == frozenset()
    assert threads.restless_threads(process, frozenset()) == {}


@pytest.mark.parametrize("call", ["recvfrom", "poll"])
def test_the_end_of_a_unix_socket_that_is_read_from_wakes_its_reader_for_nothing(client: Puppet, call: str) -> None:
    """And nobody who polls. It is then found in another sleep, and has done nothing in between."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")  # the kernel chooses: unix(7), "Autobind feature"
        listener.listen()
        with client.connect(listener) as ours:
            client.do("c.send(b'x')")
            tid = _start(client, "c.recv(1)" if call == "recvfrom" else "poll(c)", call)
            before = _the_one(_look(client), tid)
            assert ours.recv(1) == b"x"
            _until(lambda: [one.sleep for one in _look(client).threads] == [before.when_read_from])
            assert (before.when_read_from == before.sleep) is (call == "poll")


def test_each_of_several_threads_is_told_by_name_from_the_others(client: Puppet) -> None:
    reader = client.do("start(lambda: c.recv(1), 'puma srv tp 001')")
    poller = client.do("start(lambda: poll(c), 'puma srv tp 002')")
    _until_blocked(client.pid, reader, "recvfrom")
    _until_blocked(client.pid, poller, "poll", "ppoll")
    _start(client, "other.recv(1)", "recvfrom")
    names = {waiting.thread.tid: waiting.name for waiting in _look(client).threads}
    assert names == {reader: "puma srv tp 001", poller: "puma srv tp 002"}


def test_parent_and_child_on_one_socket_are_both_seen_in_one_look(client: Puppet) -> None:
    """The bug itself: both wait for their answers, and one of them gets the other's."""
    child = client.do("fork(lambda: start(lambda: c.recv(1)))")
    tid = _start(client, "poll(c)", "poll", "ppoll")
    processes = [_process(client.pid), _process(child)]
    inode = _inode(client)
    _until(lambda: len(waiting_threads(processes, inode).threads) == 2)
    waits = waiting_threads(processes, inode)
    assert [(w.thread.pid, w.call in {"poll", "ppoll"}) for w in waits.threads] == [(client.pid, True), (child, False)]
    assert waits.threads[0].thread.tid == tid


def test_a_duplicate_of_the_descriptor_is_the_same_socket(client: Puppet) -> None:
    """Drivers that wait through another library duplicate the descriptor, and so does Ruby's IO.for_fd(…).dup."""
    tid = _start(client, "poll(socket.socket(fileno=os.dup(c.fileno())), c, other)", "poll", "ppoll")
    assert _the_one(_look(client), tid).others == 1


def test_an_epoll_set_goes_by_the_file_and_not_by_the_number_that_it_was_added_under(client: Puppet) -> None:
    """The set keeps a socket whose descriptor has been closed, as long as a duplicate is open."""
    client.do(
        "first = os.dup(c.fileno()); ep = select.epoll(); ep.register(first, select.EPOLLIN)\n"
        "os.dup2(other.fileno(), first)"
    )
    tid = _start(client, "ep.poll()", "epoll_wait", "epoll_pwait")
    assert _the_one(_look(client), tid).others == 0
    client.do("fresh = select.epoll(); fresh.register(first, select.EPOLLIN)")
    _start(client, "fresh.poll()", "epoll_wait", "epoll_pwait")
    _the_one(_look(client), tid)


def test_an_entry_of_an_epoll_set_that_has_fired_once_for_all_is_no_wait(client: Puppet) -> None:
    """EPOLLONESHOT: the entry stays in the set, disarmed."""
    client.do(
        "ep = select.epoll(); ep.register(c, select.EPOLLOUT | select.EPOLLONESHOT); ep.poll()\n"
        "ep.register(other, select.EPOLLIN)"
    )
    _start(client, "ep.poll()", "epoll_wait", "epoll_pwait")
    assert _look(client) == Waits()


def test_one_wait_is_told_from_the_next_one_like_it(client: Puppet) -> None:
    """Who waited before the offending bytes came is the victim, so a thread that came back must not look the same."""
    client.do("def forever(sock):\n    while True: sock.recv(1)")
    client.do("c.close(); c = other")
    tid = _start(client, "forever(c)", "recvfrom")
    first, second = _the_one(_look(client), tid), _the_one(_look(client), tid)
    assert first.sleep == second.sleep
    client.do("other_end.send(b'x')")
    _until(lambda: any(w.sleep.switches > first.sleep.switches for w in _look(client).threads))
    third = _the_one(_look(client), tid)
    assert third.thread == first.thread
    assert third.sleep != first.sleep


def test_a_poll_that_was_interrupted_and_resumed_is_still_seen(client: Puppet) -> None:
    """Stopped and continued, as by job control or a debugger, it becomes restart_syscall and hides its name."""
    polling = _start(client, "poll(c)", "poll", "ppoll")
    sleeping = _start(
        client, "threading.Lock().acquire() and [t.acquire(timeout=600) for t in [threading.Lock()] * 2]", "futex"
    )
    os.kill(client.pid, signal.SIGSTOP)
    _until(lambda: Path(f"/proc/{client.pid}/task/{polling}/stat").read_text().split()[2] == "T")
    os.kill(client.pid, signal.SIGCONT)
    _until_blocked(client.pid, polling, "restart_syscall", "ppoll")
    _until_blocked(client.pid, sleeping, "restart_syscall", "futex")
    assert _the_one(_look(client), polling).call in {"poll", "ppoll"}


def test_a_thread_that_runs_waits_for_nothing(client: Puppet) -> None:
    client.do("def spin():\n    while True: pass")
    client.do("start(spin)")
    assert _look(client) == Waits()


def test_a_process_that_may_not_be_looked_at_is_told_from_one_where_nobody_waits(
    client: Puppet, puppet: Puppets
) -> None:
    _start(client, "c.recv(1)", "recvfrom")
    client.do("set_dumpable(0)")
    guard = puppet()
    # The interpreter may be where only root can import from, so whatever a look needs is imported before.
    guard.do(
        "from pgguard.attribution.threads import waiting_threads\n"
        "from pgguard.attribution.processes import read_process\n"
        "def look(pid, inode):\n"
        "    waits = waiting_threads([read_process(pid)], inode)\n"
        "    return [len(waits.threads), dict(waits.obstacles)]\n"
        f"look({client.pid}, 1)\n"
        "become_nobody()"
    )
    answer = guard.do(f"look({client.pid}, {_inode(client)})")
    assert answer == [0, {str(client.pid): str(Obstacle.NOT_PERMITTED)}]


def test_a_process_that_is_gone_waits_for_nothing_and_neither_does_the_next_one_with_its_pid(client: Puppet) -> None:
    _start(client, "c.recv(1)", "recvfrom")
    process, inode = _process(client.pid), _inode(client)
    assert waiting_threads([replace(process, started=process.started - 1)], inode) == Waits()
    client.end()
    assert waiting_threads([process], inode) == Waits()


def test_a_zombie_waits_for_nothing(client: Puppet) -> None:
    zombie = client.do("fork()")
    client.do(f"os.close(holds.pop({zombie})); os.waitid(os.P_PID, {zombie}, os.WEXITED | os.WNOWAIT)")
    assert waiting_threads([_process(zombie)], _inode(client)) == Waits()


def test_a_process_whose_main_thread_has_ended_still_shows_its_others(client: Puppet) -> None:
    """The main thread is a zombie then, without program and descriptors."""
    client.do(
        "leaving = os.fork()\n"
        "if leaving == 0:\n"
        "    start(lambda: c.recv(1))\n"
        "    libc.syscall({'x86_64': 60, 'aarch64': 93}[os.uname().machine], 0)"  # exit(2), of this thread alone
    )
    pid = client.do("leaving")
    process, inode = _process(pid), _inode(client)
    _until(lambda: len(waiting_threads([process], inode).threads) == 1)
    assert waiting_threads([process], inode).complete
    os.kill(pid, signal.SIGKILL)
    client.do("os.waitpid(leaving, 0)")


def test_io_uring_is_something_that_can_not_be_told(client: Puppet) -> None:
    ring = client.do(f"libc.syscall({_IO_URING_SETUP}, 1, ctypes.create_string_buffer(120))")
    if ring < 0:
        pytest.skip("this kernel or sandbox offers no io_uring")
    _start(client, f"libc.syscall({_NUMBERS['io_uring_enter']}, {ring}, 0, 1, 1, None, 0)", "io_uring_enter")
    assert _look(client) == Waits((), {client.pid: Obstacle.IO_URING})


@pytest.mark.skipif(platform.machine() != "x86_64", reason="runs i386 code")
def test_a_32_bit_process_is_not_misread(tmp_path: Path) -> None:
    """Its waitpid(2) has the number that poll(2) has for 64-bit processes, its read(2) that of close(2)."""
    # mov eax, 3 (read); xor ebx, ebx; lea ecx, [esp - 64]; mov edx, 1; int 0x80; mov eax, 1 (exit); int 0x80
    code = bytes.fromhex("b803000000 31db 8d4c24c0 ba01000000 cd80 b801000000 cd80")
    base, offset = 0x08048000, 52 + 32
    header = struct.pack(
        "<4sBBB9xHHIIIIIHHHHHH", b"\x7fELF", 1, 1, 1, 2, 3, 1, base + offset, 52, 0, 0, 52, 32, 1, 0, 0, 0
    )
    segment = struct.pack("<8I", 1, 0, base, base, offset + len(code), offset + len(code), 5, 0x1000)
    program = tmp_path / "i386"
    program.write_bytes(header + segment + code)
    program.chmod(0o755)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        try:
            process = subprocess.Popen([program], stdin=theirs.fileno())
        except OSError:
            pytest.skip("this kernel runs no 32-bit programs")
        with process:
            _until(lambda: Path(f"/proc/{process.pid}/syscall").read_text().startswith("3 "))
            waits = waiting_threads([_process(process.pid)], os.fstat(theirs.fileno()).st_ino)
            ours.send(b"x")
    assert waits == Waits((), {process.pid: Obstacle.UNKNOWN_ABI})
    assert process.returncode == 0


def test_a_set_too_large_to_look_at_is_something_that_can_not_be_told(client: Puppet) -> None:
    """The time that a look takes must not be the application's to choose."""
    client.do(
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)\n"
        "many = bytes().join((-1).to_bytes(8, 'little', signed=True) for _ in range(4096))\n"
        "last = (c.fileno() | 1 << 32).to_bytes(8, 'little')"
    )
    if client.do("resource.getrlimit(resource.RLIMIT_NOFILE)[0]") < 4097:
        pytest.skip("no process may poll that many descriptors here")
    _start(client, "libc.ppoll(many + last, 4097, None, None)", "ppoll")
    assert _look(client) == Waits((), {client.pid: Obstacle.LARGE_SET})
    tid = _start(client, "libc.ppoll(many[8:] + last, 4096, None, None)", "ppoll")
    assert [(waiting.thread.tid, waiting.others) for waiting in _look(client).threads] == [(tid, 0)]


def test_a_thread_that_moves_on_while_it_is_looked_at_is_not_taken_for_one_that_waits(
    client: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is concluded from several files must have been true at one moment."""
    client.do("c.close(); c = other; held = threading.Lock(); held.acquire()")
    tid = _start(client, "(c.recv(1), held.acquire())", "recvfrom")
    assert _the_one(_look(client), tid).call == "recvfrom"
    identify = threads._identity

    def let_it_move_on(task: threads._Task) -> Stat:
        if task.tid == tid:
            client.do("other_end.send(b'x')")
            _until_blocked(client.pid, tid, "futex")
        return identify(task)

    monkeypatch.setattr(threads, "_identity", let_it_move_on)
    assert _look(client) == Waits()


def test_a_look_ends_when_its_time_is_over_and_says_so(client: Puppet) -> None:
    client.do("[start(lambda: c.recv(1)) for _ in range(8)]")
    waits = waiting_threads([_process(client.pid)], _inode(client), seconds=0)
    assert (waits.threads, waits.obstacles) == ((), {client.pid: Obstacle.OUT_OF_TIME})


def test_a_look_leaves_nothing_open(client: Puppet) -> None:
    _start(client, "epoll(c, other)", "epoll_wait", "epoll_pwait")
    before = len(list(Path("/proc/self/fd").iterdir()))
    _look(client)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize(
    ("header", "calls"),
    [("x86_64-linux-gnu/asm/unistd_64.h", X86_64), ("asm-generic/unistd.h", AARCH64)],
)
def test_the_numbers_of_the_system_calls_are_those_of_the_kernels_headers(header: str, calls: dict[int, str]) -> None:
    path = Path("/usr/include", header)
    if not path.exists():
        not_installed("the kernel's headers")
    defined = dict(re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)$", path.read_text(), re.MULTILINE))
    assert {name: int(defined[name]) for name in calls.values()} == {name: number for number, name in calls.items()}


@pytest.mark.parametrize(
    "code", ["libc.select(2**31 - 1, None, None, None, None)", "libc.select(262144, bits, None, None, None)"]
)
def test_a_select_of_any_number_takes_no_time(client: Puppet, code: str) -> None:
    """The kernel cuts the number down to how many descriptors there can be; what it shows is what it was told."""
    client.do("bits = ctypes.create_string_buffer(1 << 20); bits[3] = 1")
    client.do("os.dup2(other.fileno(), 24)")
    _start(client, code, "select", "pselect6")
    process, inode = _process(client.pid), _inode(client)
    began = time.thread_time()
    waits = waiting_threads([process], inode, seconds=5)
    assert time.thread_time() - began < 0.5
    assert (waits.threads, waits.complete) == ((), True)


def test_a_select_of_more_descriptors_than_are_looked_at_is_an_obstacle(client: Puppet) -> None:
    client.do(
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (8192, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))\n"
        "for fd in range(100, 6100): os.dup2(other.fileno(), fd)\n"
        "bits = ctypes.create_string_buffer(1024)\n"
        "for fd in range(100, 6100): bits[fd // 8] = ord(bits[fd // 8]) | 1 << fd % 8"
    )
    _start(client, "libc.select(8192, bits, None, None, None)", "select", "pselect6")
    assert _look(client).obstacles == {client.pid: Obstacle.LARGE_SET}


def test_a_set_whose_memory_would_have_to_come_from_a_file_is_not_read(client: Puppet, tmp_path: Path) -> None:
    """The file system may never answer. The process has let go of the page when the kernel had read it."""
    client.do(
        "import mmap\n"
        f"file = open({str(tmp_path / 'set')!r}, 'wb+'); file.write(bytes(mmap.PAGESIZE)); file.flush()\n"
        "mapped = mmap.mmap(file.fileno(), mmap.PAGESIZE, access=mmap.ACCESS_COPY)\n"
        "import struct; file.seek(0); file.write(struct.pack('ihh', c.fileno(), select.POLLIN, 0)); file.flush()\n"
        "entry = ctypes.c_char.from_buffer(mapped)"
    )
    tid = _start(client, "libc.poll(ctypes.byref(entry), 1, -1)", "poll", "ppoll")
    _the_one(_look(client), tid)
    client.do("mapped.madvise(mmap.MADV_DONTNEED)")
    assert _look(client).obstacles == {client.pid: Obstacle.UNREADABLE}
