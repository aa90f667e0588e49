"""The probe on the kernel that runs the tests: whose bytes they are, byte for byte, and that nothing is left behind."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import json
import mmap
import os
import random
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pgguard.attribution.ebpf import bpf
from pgguard.attribution.ebpf.account import Account, Accounts, Segment
from pgguard.attribution.ebpf.assembler import Assembler
from pgguard.attribution.ebpf.probe import ProbeUnavailable, SenderProbe, _find_cgroup, connection_key
from pgguard.attribution.ebpf.programs import TICKETS, WORDS_SIZE, Kind, Way
from pgguard.attribution.ebpf.ring import Event
from pgguard.identity import Sender

try:
    with SenderProbe([]) as best:
        CALLED_BACK = best.way is Way.CALLBACK
except ProbeUnavailable as unavailable:
    pytest.skip(str(unavailable), allow_module_level=True)

SECONDS = 40.0


class Watched:
    """A listener with a probe, and accounts of what it accepts."""

    def __init__(self, probe: SenderProbe, listener: socket.socket) -> None:
        self.probe = probe
        self.listener = listener
        self.accounts = Accounts(self)
        self.kinds: Counter[Kind] = Counter()

    @property
    def port(self) -> int:
        return int(self.listener.getsockname()[1])

    def read(self) -> list[Event]:
        events = self.probe.read()
        self.kinds.update(Kind(event[2]) for event in events)
        return events

    def reached(self, ticket: int) -> int:
        return self.probe.reached(ticket)

    def glance(self, ticket: int) -> int:
        return self.probe.glance(ticket)

    def split(self, account: Account, length: int) -> list[Segment]:
        """Who sent what has been read."""
        self.accounts.catch_up(account)
        return account.split(length)

    def accept(self) -> tuple[socket.socket, Account]:
        self.listener.settimeout(SECONDS)
        accepted = self.listener.accept()[0]
        accepted.settimeout(SECONDS)
        self.accounts.feed()
        return accepted, self.accounts.open(connection_key(accepted))

    def connect(self, host: str = "127.0.0.1") -> tuple[socket.socket, socket.socket, Account]:
        client = socket.create_connection((host, self.port), SECONDS)
        client.settimeout(None)
        return client, *self.accept()

    def receive(self, accepted: socket.socket, account: Account, length: int) -> list[tuple[bytes, Sender | None]]:
        """Read exactly so many bytes; returns them by sender."""
        found: list[tuple[bytes, Sender | None]] = []
        while length:
            data = accepted.recv(min(length, 1 << 18))
            assert data
            length -= len(data)
            at = 0
            for size, sender in self.split(account, len(data)):
                part = data[at : at + size]
                at += size
                if found and found[-1][1] == sender:
                    found[-1] = found[-1][0] + part, sender
                else:
                    found.append((part, sender))
        return found


@contextlib.contextmanager
def watching(host: str = "127.0.0.1", **options: Any) -> Iterator[Watched]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family, dualstack_ipv6=host == "::") as listener:
        address = listener.getsockname()
        with SenderProbe([(address[0], address[1])], **{"blocking": True, **options}) as probe:
            yield Watched(probe, listener)


WAYS = pytest.mark.parametrize("way", [way for way in Way if way is Way.MAP or CALLED_BACK])


@pytest.fixture(params=[way for way in Way if way is Way.MAP or CALLED_BACK])
def watched(request: pytest.FixtureRequest) -> Iterator[Watched]:
    with watching(way=request.param) as one:
        yield one


def me() -> Sender:
    return Sender(os.getpid(), threading.get_native_id())


def in_child(action: Callable[[], object]) -> int:
    """Fork, act, and exit at once; returns the pid."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        finally:
            os._exit(0)
    return pid


def join(pid: int) -> None:
    os.waitpid(pid, 0)


def test_parent_and_child_in_strict_turns(watched: Watched) -> None:
    client, accepted, account = watched.connect()
    with client, accepted:
        assert account.opener == me()
        gate, answer = socket.socketpair()

        def child() -> None:
            gate.close()
            while answer.recv(1):
                client.sendall(b"child")
                answer.send(b".")

        pid = in_child(child)
        answer.close()
        expected: list[tuple[bytes, Sender | None]] = []
        for _ in range(100):
            client.sendall(b"parent")
            gate.send(b".")
            gate.recv(1)
            expected += [(b"parent", me()), (b"child", Sender(pid, pid))]
        gate.close()
        join(pid)
        assert watched.receive(accepted, account, 1100) == expected


def test_two_threads_that_alternate(watched: Watched) -> None:
    client, accepted, account = watched.connect()
    with client, accepted:
        senders: list[Sender] = []
        barrier = threading.Barrier(2)

        def thread(own: bytes, turn: int) -> None:
            senders.append(me())
            for index in range(100):
                barrier.wait()
                if index % 2 == turn:
                    client.sendall(own)

        threads = [threading.Thread(target=thread, args=(own, turn)) for turn, own in enumerate([b"a", b"bb"])]
        for one in threads:
            one.start()
            while len(senders) < len(threads) and one is threads[0] and not senders:
                time.sleep(0.001)
        for one in threads:
            one.join()
        assert watched.receive(accepted, account, 150) == [(b"a", senders[0]), (b"bb", senders[1])] * 50


def test_a_child_that_sends_and_exits_and_an_opener_that_has_exited(watched: Watched) -> None:
    def child() -> None:
        client = socket.create_connection(("127.0.0.1", watched.port))
        client.sendall(b"X\0\0\0\4")

    pid = in_child(child)
    join(pid)
    accepted, account = watched.accept()
    with accepted:
        assert account.opener == Sender(pid, pid)
        assert watched.receive(accepted, account, 5) == [(b"X\0\0\0\4", Sender(pid, pid))]
        assert accepted.recv(1) == b""


SIZES = ((0.9, 5, 200), (0.99, 200, 8_192), (0.999, 8_192, 65_536), (1.0, 65_536, 1_000_000))


def random_size(rng: random.Random) -> int:
    chance = rng.random()
    return next(rng.randint(low, high) for limit, low, high in SIZES if chance < limit)


@pytest.mark.parametrize("blocking", [True, False])
def test_each_send_says_how_far_its_sender_had_read(watched: Watched, *, blocking: bool) -> None:
    """However soon it reads behind it, and however late the guard looks."""
    with socket.create_connection(watched.listener.getsockname()) as client, watched.listener.accept()[0] as accepted:
        watched.accounts.feed()
        account = watched.accounts.open(connection_key(accepted))
        accepted.sendall(b"N")
        assert client.recv(1) == b"N"
        accepted.sendall(b"x" * 500)
        assert len(client.recv(500, socket.MSG_PEEK | socket.MSG_WAITALL)) == 500
        client.setblocking(blocking)
        expected = []
        read = 1
        for size in (0, 100, 150, 0, 250):
            client.recv(size)
            read += size
            client.send(b"request")
            expected.append((read, 501) if read < 501 else None)
        client.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            client.recv(500)
        found = []
        for _ in expected:
            assert accepted.recv(7, socket.MSG_WAITALL) == b"request"
            watched.accounts.catch_up(account)
            found.append(account.unread())
            assert account.split(7) == [(7, me())]
        assert found == expected


@pytest.mark.parametrize(("mode", "total"), [("free", 100_000), ("turns", 20_000), ("unblocking", 20_000)])
def test_every_byte_of_six_senders_in_three_processes(watched: Watched, mode: str, total: int) -> None:
    """Every sender sends bytes of one value, its own, so that the stream itself says for each byte whose it is."""
    client, accepted, account = watched.connect()
    log_read, log_write = os.pipe()
    turn = threading.Lock()

    def send_all(mark: int) -> None:
        rng = random.Random(mark)
        sent = 0
        sends = total // 6
        for _ in range(sends):
            data = bytes([mark]) * random_size(rng)
            with turn if mode == "turns" else contextlib.nullcontext():
                if mode != "unblocking":
                    client.sendall(data)
                    sent += len(data)
                    continue
                # As event loops do: what fits, now, and the rest when there is room.
                rest = memoryview(data)
                while rest:
                    try:
                        taken = client.send(rest, socket.MSG_DONTWAIT)
                    except BlockingIOError:
                        select.select([], [client], [])
                        continue
                    rest = rest[taken:]
                    sent += taken
        os.write(log_write, json.dumps([mark, *me()[:2], sent]).encode() + b"\n")

    def process(first: int) -> None:
        threads = [threading.Thread(target=send_all, args=(mark,)) for mark in (first, first + 1)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()

    pids = [in_child(functools.partial(process, first)) for first in (1, 3, 5)]
    client.close()
    os.close(log_write)
    log = os.fdopen(log_read)
    named: Counter[tuple[int, Sender | None]] = Counter()
    with accepted:
        while data := accepted.recv(1 << 18):
            at = 0
            for size, sender in watched.split(account, len(data)):
                part = data[at : at + size]
                at += size
                counts = Counter({part[0]: len(part)}) if part.count(part[0]) == len(part) else Counter(part)
                for mark, count in counts.items():
                    named[mark, sender] += count
    for pid in pids:
        join(pid)
    entries = [json.loads(line) for line in log]
    log.close()
    senders = {mark: Sender(pid, tid) for mark, pid, tid, _ in entries}
    assert len(set(senders.values())) == 6
    wrong = {who: count for who, count in named.items() if who[1] not in (senders[who[0]], None)}
    assert wrong == {}
    assert account.contradictions == 0
    for mark, _, _, sent in entries:
        assert named[mark, senders[mark]] + named[mark, None] == sent
    whole = sum(named.values())
    unknown = sum(count for (_, sender), count in named.items() if sender is None)
    print(
        f"{mode}: {whole / 1e6:.1f} MB, unknown {unknown / whole:.4%}, lost {watched.probe.lost}, "
        + ", ".join(f"{kind.name} {count}" for kind, count in watched.kinds.items())
    )
    # How much is unknown depends on how often the buffer is full, and that on who runs when; a callback can't tell
    # apart those that wait for room. Where there is room, the tests of strict turns want every byte named.
    assert unknown < (0.3 if watched.probe.way is Way.MAP else 0.9) * whole


TCP_NOTSENT_LOWAT = 25
"""``linux/tcp.h``."""


@pytest.mark.parametrize(
    ("option", "total"),
    [
        (None, 40_000_000),
        ((socket.SOL_SOCKET, socket.SO_SNDBUF, 10_000), 4_000_000),
        ((socket.SOL_SOCKET, socket.SO_SNDBUF, 200_000), 20_000_000),
        ((socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, 4_000), 10_000_000),
        ((socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, 200_000), 20_000_000),
        ((socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1_400), 20_000_000),
        ((socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536), 10_000_000),
        ((socket.IPPROTO_TCP, socket.TCP_CORK, 1), 20_000_000),
    ],
)
@pytest.mark.parametrize("size", [3_000, 300_000])
def test_two_threads_that_block_on_a_full_buffer(
    watched: Watched, option: tuple[int, int, int] | None, total: int, size: int
) -> None:
    """The kernel skips the program for some of these: see programs.py."""
    with socket.socket() as client:
        if option is not None:
            client.setsockopt(*option)
        client.connect(("127.0.0.1", watched.port))
        accepted, account = watched.accept()
        senders: dict[int, Sender] = {}
        sends = total // size // 2

        def thread(mark: int) -> None:
            senders[mark] = me()
            for _ in range(sends):
                client.sendall(bytes([mark]) * size)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # pushes what is corked

        threads = [threading.Thread(target=thread, args=(mark,)) for mark in (1, 2)]
        for one in threads:
            one.start()
        rest = whole = sends * size * 2
        found: list[tuple[bytes, Sender | None]] = []
        with accepted:
            while rest:
                length = min(rest, 250_000)
                found += watched.receive(accepted, account, length)
                rest -= length
                time.sleep(0.0005)
            for one in threads:
                one.join()
        unknown = sum(len(part) for part, sender in found if sender is None)
        print(f"{option}, sends of {size}: unknown {unknown / whole:.3%} of {whole / 1e6} MB; {dict(watched.kinds)}")
        for part, sender in found:
            assert sender is None or part == bytes([1 if sender == senders[1] else 2]) * len(part)
            assert sender is None or sender in senders.values()
        assert account.contradictions == 0


def test_a_send_that_is_cut_short_does_not_name_who_comes_next(watched: Watched) -> None:
    """A full buffer and no wait leave the kernel with a verdict for the next sender, who is skipped."""
    client, accepted, account = watched.connect()
    with client, accepted:
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                sent += client.send(b"p" * 1_000_000, socket.MSG_DONTWAIT)
        pid = in_child(lambda: client.sendall(b"c" * 3_000_000))
        found = watched.receive(accepted, account, sent + 3_000_000)
        join(pid)
        client.sendall(b"p" * 100)
        found += watched.receive(accepted, account, 100)
        whose: Counter[tuple[str, Sender | None]] = Counter()
        for part, sender in found:
            for byte, count in Counter(part).items():
                whose[chr(byte), sender] += count
        assert set(whose) <= {("p", me()), ("c", Sender(pid, pid)), ("p", None), ("c", None)}
        if watched.probe.way is Way.MAP:
            assert whose["p", None] + whose["c", None] < 1_500_000
        if watched.probe.way is Way.CALLBACK:  # the buffer was full when it was last looked at; now it isn't
            client.sendall(b"p" * 100)
            found += watched.receive(accepted, account, 100)
        assert found[-1] == (b"p" * 100, me())


def test_other_ways_of_sending(watched: Watched, tmp_path: Path) -> None:
    client, accepted, account = watched.connect()
    path = tmp_path / "data"
    path.write_bytes(b"f" * 100_000)
    with client, accepted, path.open("rb") as file:
        os.writev(client.fileno(), [b"one", b"two"])
        client.sendmsg([b"three", b"four"])
        os.write(client.fileno(), b"five")
        assert watched.receive(accepted, account, 19) == [(b"onetwothreefourfive", me())]
        assert os.sendfile(client.fileno(), file.fileno(), 0, 100_000) == 100_000
        assert watched.receive(accepted, account, 100_000) == [(b"f" * 100_000, me())]
        reader, writer = os.pipe()
        os.write(writer, b"s" * 5000)
        assert os.splice(reader, client.fileno(), 5000) == 5000
        assert watched.receive(accepted, account, 5000) == [(b"s" * 5000, me())]
        pid = in_child(lambda: os.sendfile(client.fileno(), file.fileno(), 0, 1000))
        assert watched.receive(accepted, account, 1000) == [(b"f" * 1000, Sender(pid, pid))]
        join(pid)


def test_zero_copy_sends_are_unknown_and_nothing_after_is_shifted(watched: Watched) -> None:
    so_zerocopy, msg_zerocopy = 60, 0x4000000
    client, accepted, account = watched.connect()
    with client, accepted:
        client.setsockopt(socket.SOL_SOCKET, so_zerocopy, 1)
        assert client.send(b"z" * 50_000, msg_zerocopy) == 50_000
        assert watched.receive(accepted, account, 50_000) == [(b"z" * 50_000, None)]
        client.setsockopt(socket.SOL_SOCKET, so_zerocopy, 0)
        client.sendall(b"plain")
        if watched.probe.way is Way.CALLBACK:  # what was before it was not certain, and so neither what has come since
            assert watched.receive(accepted, account, 5) == [(b"plain", None)]
            client.sendall(b"plain")
        assert watched.receive(accepted, account, 5) == [(b"plain", me())]


def test_a_multipath_client_is_never_named_wrongly(watched: Watched) -> None:
    try:
        client = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)
    except OSError as error:
        pytest.skip(str(error))
    with client:
        client.connect(("127.0.0.1", watched.port))
        accepted, account = watched.accept()
        with accepted:
            client.sendall(b"hello")
            assert watched.receive(accepted, account, 5) in ([(b"hello", me())], [(b"hello", None)])
            print("MPTCP:", account.problem, watched.kinds)


@pytest.mark.skipif(not CALLED_BACK, reason="this kernel's TCP calls nobody back")
def test_what_was_sent_by_one_that_was_refused_the_rest_is_not_called_the_next_ones() -> None:
    """TCP calls nobody back for a send that got a part of its bytes in, all of them on their way already."""
    with watching() as watched:
        client, accepted, account = watched.connect()
        with client, accepted:
            found: list[tuple[bytes, Sender | None]] = []
            for _ in range(50):
                sent = 0
                with contextlib.suppress(BlockingIOError):
                    while True:
                        sent += client.send(b"p" * 700_000, socket.MSG_DONTWAIT)
                half = sent // 2
                found += watched.receive(accepted, account, half)
                pid = in_child(lambda: client.sendall(b"c" * 10))
                found += watched.receive(accepted, account, sent - half + 10)
                join(pid)
                client.sendall(b"p")
                client.sendall(b"p")
                found += watched.receive(accepted, account, 2)
                for part, sender in found:
                    assert b"p" not in part or sender in {None, me()}
                    assert b"c" not in part or sender in {None, Sender(pid, pid)}
                assert found[-1][1] == me()
                found.clear()


def test_urgent_data_shifts_nothing_where_it_is_read_in_line(watched: Watched) -> None:
    client, accepted, account = watched.connect()
    with client, accepted:
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        client.sendall(b"ab")
        client.send(b"!", socket.MSG_OOB)
        pid = in_child(lambda: client.sendall(b"cd"))
        join(pid)
        assert watched.receive(accepted, account, 5) == [(b"ab!", me()), (b"cd", Sender(pid, pid))]


def test_a_socket_that_was_shut_down_or_refused_a_send_names_nobody_else(watched: Watched) -> None:
    client, accepted, account = watched.connect()
    with client, accepted:
        client.sendall(b"one")
        client.shutdown(socket.SHUT_WR)
        with pytest.raises(BrokenPipeError):
            client.send(b"two", socket.MSG_NOSIGNAL)
        assert watched.receive(accepted, account, 3) == [(b"one", me())]
        assert accepted.recv(1) == b""


def test_io_uring_sends_are_the_submitters(watched: Watched) -> None:
    """One IORING_OP_SEND through the bare system calls."""
    libc = ctypes.CDLL(None, use_errno=True)
    params = ctypes.create_string_buffer(120)
    ring = libc.syscall(425, 4, params)
    if ring < 0:
        pytest.skip(f"io_uring: {os.strerror(ctypes.get_errno())}")
    fields = struct.unpack_from("=10I", params.raw)
    sq = struct.unpack_from("=10I", params.raw, 40)
    client, accepted, account = watched.connect()
    with (
        client,
        accepted,
        mmap.mmap(ring, sq[6] + fields[0] * 4, offset=0) as queue,
        mmap.mmap(ring, fields[0] * 64, offset=0x10000000) as entries,
    ):
        data = ctypes.create_string_buffer(b"uring", 5)
        request = struct.pack("=BBHiQQII", 26, 0, 0, client.fileno(), 0, ctypes.addressof(data), 5, 0)
        entries[:64] = request.ljust(64, b"\0")
        queue[sq[6] : sq[6] + 4] = struct.pack("=I", 0)
        tail = struct.unpack_from("=I", queue, sq[1])[0]
        queue[sq[1] : sq[1] + 4] = struct.pack("=I", tail + 1)
        assert libc.syscall(426, ring, 1, 1, 1, None, 0) == 1
        assert watched.receive(accepted, account, 5) == [(b"uring", me())]
    os.close(ring)


@pytest.mark.parametrize(
    ("listen", "connect"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("127.0.0.1", "::ffff:127.0.0.1"),
        ("0.0.0.0", "127.0.0.1"),
        ("0.0.0.0", "127.3.2.1"),
        ("0.0.0.0", "::ffff:127.0.0.1"),
        ("::1", "::1"),
        ("::", "::1"),
        ("::", "127.0.0.1"),
        ("::", "::ffff:127.0.0.9"),
    ],
)
def test_addresses(listen: str, connect: str) -> None:
    with watching(listen) as watched:
        client, accepted, account = watched.connect(connect)
        with client, accepted:
            client.sendall(b"hello")
            assert account.opener == me()
            assert watched.receive(accepted, account, 5) == [(b"hello", me())]


def test_an_address_of_this_hosts_interfaces() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("there is no interface but the loopback")
        own = probe.getsockname()[0]
    with watching("0.0.0.0") as watched:
        client, accepted, account = watched.connect(own)
        with client, accepted:
            client.sendall(b"hello")
            assert watched.receive(accepted, account, 5) == [(b"hello", me())]


CONTAINER = r"""
set -e
unshare -n sleep 20 & other=$!
trap 'kill $other' EXIT
sleep 0.2
ip link set lo up
ip link add v0 type veth peer name v1 || exit 77
ip addr add 10.9.0.1/24 dev v0; ip link set v0 up
ip link set v1 netns $other
nsenter -t $other -n sh -c 'ip addr add 10.9.0.2/24 dev v1; ip link set v1 up'
"$@" $other
"""
BRIDGED = """
import socket, subprocess, sys
from pgguard.attribution.ebpf.account import Accounts
from pgguard.attribution.ebpf.probe import SenderProbe, connection_key
client = "import os,socket;socket.create_connection(('10.9.0.1',7777)).send(b'hello');print(os.getpid())"
listener = socket.create_server(("0.0.0.0", 7777))
with SenderProbe([listener.getsockname()], blocking=True) as probe:
    accounts = Accounts(probe)
    command = ["nsenter", "-t", sys.argv[1], "-n", sys.executable, "-c", client]
    child = subprocess.Popen(command, stdout=subprocess.PIPE)
    accepted = listener.accept()[0]
    assert accepted.recv(5) == b"hello"
    accounts.feed()
    account = accounts.open(connection_key(accepted))
    ((_, sender),) = account.split(5)
    assert sender == account.opener
    assert sender.pid == int(child.communicate()[0])
    print("right")
"""


def test_a_client_in_another_network_namespace_is_named() -> None:
    """As in a container that reaches the guard over a bridge."""
    done = subprocess.run(
        ["unshare", "-n", "sh", "-c", CONTAINER, "sh", sys.executable, "-c", BRIDGED],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if done.returncode == 77:
        pytest.skip("there are no veth interfaces")
    assert done.stdout == "right\n", done.stderr


def test_connections_to_other_ports_are_left_alone(watched: Watched) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        socket.create_connection(other.getsockname()) as client,
        other.accept()[0] as accepted,
    ):
        client.sendall(b"hello")
        assert accepted.recv(5) == b"hello"
        assert watched.read() == []


def test_a_connection_in_another_network_namespace_is_not_the_guards(watched: Watched) -> None:
    script = (
        f"import socket;l=socket.create_server(('127.0.0.1',{watched.port}));"
        "c=socket.create_connection(l.getsockname());c.send(b'x');assert l.accept()[0].recv(1)==b'x'"
    )
    subprocess.run(
        ["unshare", "-n", "sh", "-c", f'ip link set lo up && exec {sys.executable} -c "{script}"'], check=True
    )
    assert watched.read() == []


def test_more_connections_than_a_map_has_room_for_are_unknown_and_room_comes_back() -> None:
    with watching(max_connections=8, way=Way.MAP) as watched:
        connections = [watched.connect() for _ in range(10)]
        for client, accepted, account in connections:
            client.sendall(b"hello")
            sender = me() if account.problem is None else None
            assert account.problem in (None, errno.E2BIG)
            assert account.opener == me()
            assert watched.receive(accepted, account, 5) == [(b"hello", sender)]
        assert sum(account.problem is None for _, _, account in connections) == 8
        for client, accepted, _ in connections:
            client.close()
            accepted.close()
        deadline = time.monotonic() + 30
        while True:  # sockets leave the map when they are destroyed, a moment after they were closed
            client, accepted, account = watched.connect()
            with client, accepted:
                if account.problem is None:
                    break
            assert time.monotonic() < deadline


def test_events_that_are_lost_make_bytes_unknown_and_nothing_else(watched: Watched) -> None:
    client, accepted, account = watched.connect()
    with client, accepted:
        accepted.sendall(b"unread")
        for _ in range(20_000):
            client.sendall(b"12345")
        assert watched.probe.lost > 0
        found = watched.receive(accepted, account, 100_000)
        assert [sender for _, sender in found] == [me(), None]
        client.sendall(b"again")
        assert watched.receive(accepted, account, 5) == [(b"again", me())]


@pytest.mark.skipif(not CALLED_BACK, reason="this kernel's TCP calls nobody back")
def test_a_thread_that_goes_on_is_reported_once_and_who_comes_next_too() -> None:
    with watching() as watched:
        client, accepted, account = watched.connect()
        with client, accepted:
            for _ in range(100):
                client.sendall(b"parent")
            assert watched.receive(accepted, account, 300) == [(b"parent" * 50, me())]

            def child() -> None:
                for _ in range(100):
                    client.sendall(b"child")

            join(pid := in_child(child))
            client.sendall(b"parent")
            expected = [(b"parent" * 50, me()), (b"child" * 100, Sender(pid, pid)), (b"parent", me())]
            assert watched.receive(accepted, account, 806) == expected
            assert watched.kinds[Kind.SENDING] == 3


@pytest.mark.skipif(not CALLED_BACK, reason="this kernel's TCP calls nobody back")
def test_connections_that_are_given_the_same_word_are_not_taken_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    maps: dict[str, int] = {}
    create = bpf.create_map

    def remember(kind: bpf.MapType, key: int, value: int, entries: int, name: str, flags: int = 0) -> int:
        maps[name] = create(kind, key, value, entries, name, flags)
        return maps[name]

    monkeypatch.setattr(bpf, "create_map", remember)
    with watching() as watched:
        connections = [watched.connect() for _ in range(2)]
        with mmap.mmap(maps["pgguard_words"], WORDS_SIZE + mmap.PAGESIZE - 1 & -mmap.PAGESIZE) as words:
            given = 0
            for turn in range(20):
                for client, accepted, account in connections:
                    given = int.from_bytes(words[8 * TICKETS : WORDS_SIZE], sys.byteorder)
                    if turn < 10:  # the next ticket is for the word of the last one
                        given += TICKETS - 1
                        words[8 * TICKETS : WORDS_SIZE] = given.to_bytes(8, sys.byteorder)
                    client.sendall(b"parent")
                    assert watched.receive(accepted, account, 6) == [(b"parent", me())]
                    join(pid := in_child(functools.partial(client.sendall, b"child")))
                    client.sendall(b"parent")
                    client.sendall(b"parent")
                    expected = [(b"child", Sender(pid, pid)), (b"parent" * 2, me())]
                    assert watched.receive(accepted, account, 17) == expected
            assert given > 20 * TICKETS
        for client, accepted, _ in connections:
            client.close()
            accepted.close()


@pytest.mark.skipif(not CALLED_BACK, reason="this kernel's TCP calls nobody back")
def test_a_socket_that_is_connected_a_second_time_begins_anew() -> None:
    with watching() as watched:
        client, accepted, account = watched.connect()
        with client:
            with accepted:
                client.sendall(b"x" * 1000)
                assert watched.receive(accepted, account, 1000) == [(b"x" * 1000, me())]
                unspecified = ctypes.create_string_buffer(16)
                assert ctypes.CDLL(None).connect(client.fileno(), unspecified, 16) == 0
            client.connect(watched.listener.getsockname())
            again, account = watched.accept()
            with again:
                client.sendall(b"once")
                join(pid := in_child(functools.partial(client.sendall, b"child")))
                client.sendall(b"more")
                expected = [(b"once", me()), (b"child", Sender(pid, pid)), (b"more", me())]
                assert watched.receive(again, account, 13) == expected


def test_openers_are_unknown_where_the_kernel_does_not_let_programs_ask(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched.probe.close()
    load = bpf.load_program
    refused: list[str] = []

    def refuse_first(kind: bpf.ProgramType, code: bytes, attach: bpf.AttachType, name: str) -> int:
        if kind is bpf.ProgramType.SOCK_OPS and not refused:
            refused.append(name)
            raise bpf.BpfError(errno.EINVAL, "loading", "unknown func bpf_get_current_pid_tgid#14")
        return load(kind, code, attach, name)

    monkeypatch.setattr(bpf, "load_program", refuse_first)
    with SenderProbe([("127.0.0.1", watched.port)], blocking=True, way=watched.probe.way) as probe:
        assert not probe.openers
        assert [limit for limit in probe.limits if "the kernel doesn't say who opens a TCP connection" in limit]
        watched.probe = probe
        client, accepted, account = watched.connect()
        with client, accepted:
            client.sendall(b"hello")
            assert account.opener is None
            assert watched.receive(accepted, account, 5) == [(b"hello", me())]


def test_many_connections(watched: Watched) -> None:
    connections = [watched.connect() for _ in range(300)]
    for client, accepted, account in connections:
        client.sendall(b"hello")
        assert watched.receive(accepted, account, 5) == [(b"hello", me())]
    for client, accepted, _ in connections:
        client.close()
        accepted.close()


def test_closing_the_probe_leaves_connections_as_they_are(watched: Watched) -> None:
    client, accepted, account = watched.connect()
    with client, accepted:
        client.sendall(b"one")
        assert watched.receive(accepted, account, 3) == [(b"one", me())]
        watched.probe.close()
        watched.probe.close()
        client.sendall(b"two")
        assert accepted.recv(3) == b"two"
        accepted.sendall(b"three")
        assert client.recv(5) == b"three"


def existing(command: int) -> set[int]:
    """Ids of all programs (11), maps (12), or links (31): BPF_…_GET_NEXT_ID."""
    found: set[int] = set()
    current = 0
    while True:
        attributes = ctypes.create_string_buffer(struct.pack("=III", current, 0, 0), 12)
        if bpf._syscall(321 if os.uname().machine == "x86_64" else 280, command, ctypes.addressof(attributes), 12) < 0:
            return found
        current = struct.unpack_from("=I", attributes.raw, 4)[0]
        found.add(current)


def held_by(pid: int, kind: str) -> set[int]:
    """The ids of the programs, maps, or links that a process has open: proc_pid_fdinfo(5)."""
    infos = "".join(info.read_text() for info in Path(f"/proc/{pid}/fdinfo").iterdir())
    return {int(number) for number in re.findall(rf"^{kind}_id:\s+(\d+)$", infos, re.MULTILINE)}


GUARD = """
import socket, sys, threading
from pgguard.attribution.ebpf.probe import SenderProbe
from pgguard.attribution.ebpf.programs import Way
listener = socket.create_server(("127.0.0.1", 0))
probe = SenderProbe([listener.getsockname()], blocking=True, way=Way(sys.argv[1]))
print(listener.getsockname()[1], flush=True)
while True:
    connection = listener.accept()[0]
    while connection.recv(65536):
        probe.read()
"""


@WAYS
def test_a_guard_that_is_killed_leaves_nothing_behind(way: Way) -> None:
    with subprocess.Popen([sys.executable, "-c", GUARD, way], stdout=subprocess.PIPE, text=True) as guard:
        assert guard.stdout is not None
        port = int(guard.stdout.readline())
        made = [held_by(guard.pid, kind) for kind in ("prog", "map", "link")]
        with socket.create_connection(("127.0.0.1", port), SECONDS) as client:
            errors: list[OSError] = []

            def send() -> None:
                try:
                    while True:
                        client.sendall(b"x" * 10_000)
                except OSError as error:
                    errors.append(error)

            sender = threading.Thread(target=send)
            sender.start()
            time.sleep(0.3)
            guard.send_signal(signal.SIGKILL)
            guard.wait()
            sender.join(30)
            assert not sender.is_alive()
            assert errors[0].errno in (errno.ECONNRESET, errno.EPIPE)
    assert [len(ids) for ids in made] == [*((1, 5) if way is Way.CALLBACK else (2, 4)), 1]
    deadline = time.monotonic() + 30
    while any(existing(command) & ids for command, ids in zip((11, 12, 31), made, strict=True)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


REPORT = """
from pgguard.attribution.ebpf.probe import SenderProbe, ProbeUnavailable
try:
    SenderProbe([])
except ProbeUnavailable as error:
    print(error)
else:
    print("available")
"""


@pytest.mark.parametrize(
    ("wrapper", "expected"),
    [
        (
            ["setpriv", "--bounding-set=-all"],
            "the guard lacks CAP_NET_ADMIN, CAP_PERFMON, CAP_BPF; run the guard ",
        ),
        (["setpriv", "--bounding-set=-bpf,-sys_admin"], "the guard lacks CAP_BPF; "),
        (["unshare", "-Ur"], "the guard is in a user namespace"),
        (["unshare", "-m", "sh", "-c", 'umount -a -t cgroup2 && exec "$@"', "sh"], "no cgroup v2 hierarchy is mounted"),
        (["unshare", "-pf", "--mount-proc"], "available"),
    ],
)
def test_what_is_missing_is_said(wrapper: list[str], expected: str) -> None:
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(
            [*wrapper, sys.executable, "-c", REPORT], capture_output=True, text=True, check=False, cwd=elsewhere
        )
    assert expected in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (bpf.BpfError(errno.EPERM, "creating the map x"), "allow bpf(2) in the guard's sandbox"),
        (bpf.BpfError(errno.EPERM, "attaching to the cgroup"), "remove the program that claims the cgroup"),
        (bpf.BpfError(errno.EINVAL, "creating the map x"), "run the guard on Linux 5.10 or later"),
        (bpf.BpfError(errno.EINVAL, "loading the program x", "unknown func"), "(unknown func); run the guard on Linux"),
        (bpf.BpfError(errno.ENOSYS, "creating the map x"), "run the guard on Linux itself"),
        (bpf.BpfError(errno.ENOMEM, "creating the map x"), "more memory"),
    ],
)
def test_what_the_kernel_refuses_comes_with_one_thing_to_do(
    monkeypatch: pytest.MonkeyPatch, error: bpf.BpfError, expected: str
) -> None:
    def refuse(*_: object) -> int:
        raise error

    monkeypatch.setattr(bpf, "create_map", refuse)
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(ProbeUnavailable, match=re.escape(expected)):
        SenderProbe([])
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


def test_a_program_that_is_refused_comes_with_the_verifiers_log() -> None:
    code = Assembler()
    code.exit()
    with pytest.raises(bpf.BpfError, match="R0 !read_ok"):
        bpf.load_program(bpf.ProgramType.SK_MSG, code.assemble(), bpf.AttachType.SK_MSG_VERDICT, "wrong")


def test_a_limit_for_tcps_memory_makes_senders_unknown(watched: Watched) -> None:
    """TCP then waits where the buffer has room, and in a map would wait forever for a send as large as the limit."""
    cgroup = Path(f"/sys/fs/cgroup/memory/pgguard-test-{os.getpid()}")
    limit = cgroup / "memory.kmem.tcp.limit_in_bytes"
    try:
        cgroup.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup of version 1 can be made: {error}")
    try:
        if not limit.exists():
            pytest.skip("there is no such limit")
        limit.write_text("100000")
        go, going = os.pipe()

        def child() -> None:
            (cgroup / "cgroup.procs").write_text(str(os.getpid()))
            client = socket.create_connection(("127.0.0.1", watched.port))
            os.read(go, 1)
            client.sendall(b"x" * 1_000_000)

        pid = in_child(child)
        accepted, account = watched.accept()
        os.write(going, b".")
        with accepted:
            assert {sender for _, sender in watched.receive(accepted, account, 1_000_000)} == {None}
            assert account.opener == Sender(pid, pid)
            assert account.problem == errno.ENOMEM
        join(pid)
    finally:
        cgroup.rmdir()


SCOPE = """
import os, socket, sys
from pgguard.attribution.ebpf.probe import SenderProbe
listener = socket.create_server(("127.0.0.1", 0))
with SenderProbe([listener.getsockname()], blocking=True) as probe:
    print(probe.scope, listener.getsockname()[1], flush=True)
    sys.stdin.readline()
    outside = len(probe.read())
    socket.create_connection(listener.getsockname()).send(b"x")
    print(outside, len(probe.read()))
"""


def test_a_cgroup_that_is_not_the_whole_tree_is_said(tmp_path: Path) -> None:
    """As in a container: only sockets made in its cgroup or below are seen."""
    cgroup = _find_cgroup() / f"pgguard-test-{os.getpid()}"
    try:
        cgroup.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made: {error}")
    try:
        inner = f'umount -a -t cgroup2; mount -t cgroup2 none {tmp_path} && exec "$@"'
        command = ["sh", "-c", f"echo $$ > {cgroup}/cgroup.procs && exec unshare -Cm sh -c '{inner}' sh \"$@\"", "sh"]
        with subprocess.Popen(
            [*command, sys.executable, "-c", SCOPE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as guard:
            assert guard.stdin is not None
            assert guard.stdout is not None
            scope, port = guard.stdout.readline().split()
            assert scope == str(tmp_path)
            with socket.create_connection(("127.0.0.1", int(port))) as client:
                client.sendall(b"outside")
                guard.stdin.write("\n")
                guard.stdin.close()
                outside, inside = guard.stdout.readline().split()
        # Outside of the cgroup nobody is seen, and of the guard's own end nothing but that it is there.
        assert (int(outside), int(inside)) == (1, 4)
    finally:
        cgroup.rmdir()


NAMESPACE = """
import os, socket, sys
from pgguard.attribution.ebpf.probe import SenderProbe
from pgguard.attribution.ebpf.programs import Kind, Way
listener = socket.create_server(("127.0.0.1", 0))
with SenderProbe([listener.getsockname()], blocking=True) as probe:
    client = socket.create_connection(listener.getsockname())
    accepted = listener.accept()[0]
    client.send(b"a")
    pid = os.fork()
    if pid == 0:
        client.send(b"b")
        os._exit(0)
    os.wait()
    found = [event[4] for event in probe.read() if event[2] in (Kind.OPENED, Kind.SENDING)]
    assert os.getpid() < 10, os.getpid()
    assert found == [os.getpid(), os.getpid(), pid], found
    print("right")
"""


def test_in_a_pid_namespace_pids_are_its_own() -> None:
    done = subprocess.run(
        ["unshare", "-pf", "--mount-proc", sys.executable, "-c", NAMESPACE], capture_output=True, text=True, check=False
    )
    assert done.stdout == "right\n", done.stderr


# Sockets that block


def test_a_client_that_blocks_is_not_put_into_a_map_unless_it_is_asked_for() -> None:
    """It would be told EAGAIN where it waits, as soon as a signal comes: a real driver breaks of it."""
    with (
        watching(blocking=False, way=Way.MAP) as watched,
        socket.create_connection(watched.listener.getsockname()) as client,
    ):
        accepted, account = watched.accept()
        with accepted:
            client.sendall(b"x" * 10)
            assert accepted.recv(100) == b"x" * 10
            watched.accounts.feed()
            assert account.problem == errno.EWOULDBLOCK
            assert account.split(10) == [(10, None)]
            with interrupted_after(0.05):
                threading.Timer(0.2, accepted.send, [b"y"]).start()
                assert client.recv(100) == b"y"


@pytest.mark.skipif(not CALLED_BACK, reason="this kernel's TCP calls nobody back")
def test_a_client_that_blocks_is_called_back_for_and_waits_on_as_ever() -> None:
    with watching(blocking=False) as watched, socket.create_connection(watched.listener.getsockname()) as client:
        accepted, account = watched.accept()
        with accepted:
            client.sendall(b"x" * 10)
            assert watched.receive(accepted, account, 10) == [(b"x" * 10, me())]
            with interrupted_after(0.05):
                threading.Timer(0.2, accepted.send, [b"y"]).start()
                assert client.recv(100) == b"y"


def test_a_client_that_does_not_block_is_in_the_map_until_it_does() -> None:
    with watching(blocking=False, way=Way.MAP) as watched, socket.socket() as client:
        client.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            client.connect(watched.listener.getsockname())
        accepted, account = watched.accept()
        with accepted:
            client.send(b"x" * 10)
            assert accepted.recv(100) == b"x" * 10
            watched.accounts.feed()
            assert account.split(10) == [(10, me())]
            client.setblocking(True)
            client.send(b"y" * 10)
            assert accepted.recv(100) == b"y" * 10
            watched.accounts.feed()
            assert account.problem == errno.EWOULDBLOCK
            assert account.split(10) == [(10, None)]
            assert account.cookie is not None
            watched.probe.release(account.cookie)
            with interrupted_after(0.05):
                threading.Timer(0.2, accepted.send, [b"z"]).start()
                assert client.recv(100) == b"z"


@contextlib.contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Have a signal arrive whose handler does nothing."""
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
