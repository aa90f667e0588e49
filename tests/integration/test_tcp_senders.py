"""Over TCP the kernel names who sent each request: process and thread, compared to what the program itself says."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import signal
import socket
import struct
import sys
import termios
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest

from pgguard.attribution.ebpf import bpf
from pgguard.attribution.ebpf.probe import ProbeUnavailable, SenderProbe
from pgguard.attribution.ebpf.programs import Way
from pgguard.attribution.transparency import start
from tests.integration.running import PROGRAMS, running

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.conftest import StartGuard
    from tests.guard_process import Fault, GuardProcess
    from tests.servers import Server

pytestmark = pytest.mark.parametrize("server", ["embedded"], indirect=True, scope="session")

PROGRAM = PROGRAMS / "tcp_senders.py"
SIGNED = re.compile(r"/\* (\d+):(\d+) \*/")


@pytest.fixture(autouse=True)
def _probed() -> None:
    """Skip where the probe can't be had."""
    try:
        SenderProbe([]).close()
    except ProbeUnavailable as unavailable:
        pytest.skip(str(unavailable))


INSISTING = ("--attribution", "ebpf", "--sql", "full")


@pytest.fixture
def guard(start_guard: StartGuard) -> GuardProcess:
    """A guard that insists on the probe, and quotes what it was asked."""
    return start_guard(*INSISTING)


def command(scenario: str, *arguments: int) -> list[str | Path]:
    return [sys.executable, PROGRAM, scenario, *map(str, arguments)]


class Comparison:
    """What records say of who sent each request, compared to what the request says."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.right = self.unknown = 0
        self.wrong: list[tuple[object, ...]] = []
        self.threads: set[tuple[int, int]] = set()
        for request in (request for fault in faults for request in fault["requests"]):
            signed = SIGNED.search(request["sql"] or "")
            if signed is None:
                continue
            truth = int(signed[1]), int(signed[2])
            if request["pid"] is None and request["tid"] is None:
                self.unknown += 1
            elif (request["pid"], request["tid"], request["evidence"]) == (*truth, "kernel-sender"):
                self.right += 1
                self.threads.add(truth)
            else:
                self.wrong.append((truth, request["pid"], request["tid"], request["evidence"]))

    @property
    def total(self) -> int:
        return self.right + self.unknown + len(self.wrong)


def culprits(fault: Fault) -> set[tuple[str, int | None, int | None, str]]:
    return {(one["role"], one["pid"], one["tid"], one["evidence"]) for one in fault["culprits"]}


def test_the_guard_says_that_the_kernel_names_senders(guard: GuardProcess) -> None:
    assert "here: kernel senders on TCP" not in guard.stderr


def test_parent_and_child_in_strict_turns(guard: GuardProcess, tmp_path: Path) -> None:
    with running(command("turns"), guard.at("tcp"), tmp_path) as program:
        said = program.read()
        program.wait()
    guard.stop()
    parent, child = said["parent"], said["child"]
    [shared] = [fault for fault in guard.faults("shared-by-processes") if fault["repeat_of"] is None]
    assert ("intruder", child, child, "kernel-sender") in culprits(shared)
    assert ("requester", parent, parent, "kernel-sender") in culprits(shared)
    found = Comparison(guard.faults())
    assert found.wrong == []
    assert found.unknown == 0
    assert found.threads == {(parent, parent), (child, child)}


def test_two_threads_that_alternate_under_a_lock_are_no_fault_and_each_request_has_its_own(
    guard: GuardProcess, tmp_path: Path
) -> None:
    """They leave a transaction open, and the record of that tells the requests before it."""
    with running(command("threads"), guard.at("tcp"), tmp_path) as program:
        said = program.read()
        program.wait()
    [fault] = guard.wait_for("unclean-close")
    guard.stop()
    assert [one["kind"] for one in guard.faults()] == ["unclean-close"]
    found = Comparison([fault])
    assert found.wrong == []
    assert found.unknown == 0
    assert found.threads == {(said["pid"], said["first"]), (said["pid"], said["second"])}


def test_an_event_loop_that_waits_for_everything_at_once(guard: GuardProcess, tmp_path: Path) -> None:
    with running(command("event_loop"), guard.at("tcp"), tmp_path) as program:
        said = program.read()
        program.wait()
    [fault] = guard.wait_for("unclean-close")
    guard.stop()
    assert [one["kind"] for one in guard.faults()] == ["unclean-close"]
    found = Comparison([fault])
    assert (found.wrong, found.unknown) == ([], 0)
    assert found.threads == {(said["pid"], said["tid"])}


def test_a_forked_asyncio_application_is_convicted_with_both_processes(guard: GuardProcess, tmp_path: Path) -> None:
    with running(command("forked_loop"), guard.at("tcp"), tmp_path) as program:
        said = program.read()
        program.wait()
    guard.stop()
    parent, child = said["parent"], said["child"]
    [first, *_] = guard.faults("shared-by-processes")
    assert first["severity"] == "error"
    named = {culprit[1:3] for culprit in culprits(first) if culprit[3] == "kernel-sender"}
    assert named == {(parent, parent), (child, child)}
    # Whose requests are among the last ones that records tell depends on who was quicker.
    found = Comparison(guard.faults())
    assert (found.wrong, found.unknown) == ([], 0)
    assert found.right


def test_a_child_that_says_terminate_and_exits_at_once_is_named(guard: GuardProcess, tmp_path: Path) -> None:
    for n in range(5):
        with running(command("hasty_child"), guard.at("tcp"), tmp_path) as program:
            said = program.read()
            program.wait()
        fault = guard.wait_for("foreign-terminate", count=n + 1)[-1]
        [intruder] = [culprit for culprit in culprits(fault) if culprit[0] == "intruder"]
        assert intruder == ("intruder", said["child"], said["child"], "kernel-sender")
        assert fault["severity"] == "error"
        assert said["parent"] in {culprit["pid"] for culprit in fault["culprits"]}
    guard.stop()
    assert len(guard.faults("foreign-terminate")) == 5


def test_an_opener_that_has_exited_before_anybody_could_look_is_named(guard: GuardProcess, tmp_path: Path) -> None:
    with running(command("hasty_opener"), guard.at("tcp"), tmp_path) as program:
        opener = program.read()["opener"]
        heir = program.read()["heir"]
        program.go_on()
        program.wait()
    [fault] = guard.wait_for("unclean-close")
    assert ("owner", opener, opener, "kernel-sender") in culprits(fault)
    assert (heir, heir, "kernel-sender") in {culprit[1:] for culprit in culprits(fault)}
    found = Comparison([fault])
    assert (found.wrong, found.unknown) == ([], 0)
    assert found.threads == {(heir, heir)}


def test_six_senders_of_three_processes_every_request_of_every_record_right_or_unknown(
    start_guard: StartGuard, tmp_path: Path
) -> None:
    """Six hundred requests a round, of 40 bytes to 1 MB; each record tells the last eight of its connection."""
    guard = start_guard(*INSISTING, unlimited=True)
    with running(command("many", 10, 6, 100), guard.at("tcp"), tmp_path) as program:
        sent = program.read()["sent"]
        program.wait()
    guard.stop()
    found = Comparison(guard.faults())
    print(
        f"{sent} sent, {found.total} in records: {found.right} right, {len(found.wrong)} wrong, {found.unknown} unknown"
    )
    assert found.wrong == []
    assert found.total > 300
    assert len(found.threads) > 30  # of sixty; on a busy machine some have nothing wrong with them
    assert found.unknown < 0.3 * found.total  # where the buffer was full: the guard may be late
    for fault in guard.faults():
        for culprit in fault["culprits"]:
            if culprit["evidence"] == "kernel-sender" and culprit["process"] is not None:
                # A process that has ended has none.
                assert str(PROGRAM) in (culprit["process"]["cmdline"] or [str(PROGRAM)])


def test_a_client_whose_socket_blocks_is_named_and_its_waits_are_left_alone(
    start_guard: StartGuard, tmp_path: Path
) -> None:
    """In a map each of the signals would end a wait with EAGAIN, and such clients are left out."""
    with start([], insist=False)[0] as probe:
        if not probe.watches_blocking:
            pytest.skip("this kernel's TCP calls nobody back")
    guard = start_guard()
    with running((sys.executable, PROGRAMS / "blocking_child.py"), guard.at("tcp"), tmp_path) as program:
        said = program.read()
        assert said["status"] == 0, program.log
        assert program.wait() == 0, program.log
    fault = guard.wait_for("inherited-connection")[-1]
    assert ("intruder", said["child"], said["child"], "kernel-sender") in culprits(fault)
    assert ("owner", said["parent"], said["parent"], "kernel-sender") in culprits(fault)


# The kernel's objects

OBJECTS = {"programs": 11, "maps": 12, "links": 31}
"""``linux/bpf.h``: BPF_PROG_GET_NEXT_ID, BPF_MAP_GET_NEXT_ID, BPF_LINK_GET_NEXT_ID."""
_MAP_LOOKUP_ELEM, _MAP_GET_FD_BY_ID, _OBJ_GET_INFO_BY_FD = 1, 14, 15
_SO_COOKIE = 57


def ask(command: int, attributes: bytes) -> tuple[int, bytes]:
    """Make a bpf(2) call; returns its result, and its attributes as they are then."""
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    number = 321 if os.uname().machine == "x86_64" else 280
    return bpf._syscall(number, command, ctypes.addressof(buffer), len(attributes)), buffer.raw


def existing() -> set[tuple[str, int]]:
    """All programs, maps and links that there are."""
    found: set[tuple[str, int]] = set()
    for kind, next_id in OBJECTS.items():
        current = 0
        while True:
            result, attributes = ask(next_id, struct.pack("=III", current, 0, 0))
            if result < 0:
                break
            current = struct.unpack_from("=I", attributes, 4)[0]
            found.add((kind, current))
    return found


def held_by(pid: int) -> set[tuple[str, int]]:
    """The programs, maps and links that a process has open: proc_pid_fdinfo(5)."""
    found = set()
    for info in Path(f"/proc/{pid}/fdinfo").iterdir():
        for kind, number in re.findall(r"^(prog|map|link)_id:\s+(\d+)$", info.read_text(), re.MULTILINE):
            found.add(({"prog": "programs", "map": "maps", "link": "links"}[kind], int(number)))
    return found


def map_of_sockets(objects: set[tuple[str, int]]) -> int:
    """Open the one map, among these, that is for what is watched; its descriptor."""
    for kind, number in objects:
        if kind != "maps":
            continue
        descriptor, _ = ask(_MAP_GET_FD_BY_ID, struct.pack("=III", number, 0, 0))
        assert descriptor >= 0
        info = ctypes.create_string_buffer(80)
        ask(_OBJ_GET_INFO_BY_FD, struct.pack("=IIQ", descriptor, 80, ctypes.addressof(info)))
        if info.raw[24:40].rstrip(b"\0") == b"pgguard_sockets":
            return descriptor
        os.close(descriptor)
    raise AssertionError("there is none")


def is_watched(descriptor: int, connection: psycopg.Connection, way: Way) -> bool:
    """Whether a client's socket is in the map, or has storage in it: it is asked for by cookie, or by descriptor."""
    key = cookie(connection) if way is Way.MAP else connection.pgconn.socket
    data = ctypes.create_string_buffer(struct.pack("=Q" if way is Way.MAP else "=i", key), 8)
    value = ctypes.create_string_buffer(64)
    attributes = struct.pack("=IxxxxQQQ", descriptor, ctypes.addressof(data), ctypes.addressof(value), 0)
    return ask(_MAP_LOOKUP_ELEM, attributes)[0] == 0


def cookie(connection: psycopg.Connection) -> int:
    with socket.socket(fileno=os.dup(connection.pgconn.socket)) as sock:
        return int(struct.unpack("=Q", sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8))[0])


def test_only_connections_to_the_guard_are_watched(start_guard: StartGuard, server: Server) -> None:
    guard = start_guard("--attribution", "ebpf")
    made = held_by(guard.pid)
    assert {kind for kind, _ in made} == set(OBJECTS)
    assert made <= existing()
    with SenderProbe([]) as probe:
        way = probe.way
    with (
        psycopg.connect(guard.at("tcp").conninfo) as through,
        psycopg.connect(server.at("tcp").conninfo) as direct,
    ):
        for connection in (through, direct):
            connection.execute("SELECT 1")
        descriptor = map_of_sockets(made)
        assert is_watched(descriptor, through, way)
        assert not is_watched(descriptor, direct, way)
        os.close(descriptor)
    guard.stop()
    gone(made)


def unread(connection: psycopg.Connection) -> int:
    """FIONREAD of a client that has an answer of more than 500 bytes to come."""
    deadline = time.monotonic() + 30
    while True:
        size = int(struct.unpack("=i", fcntl.ioctl(connection.pgconn.socket, termios.FIONREAD, bytes(4)))[0])
        if size > 500:
            return size
        assert time.monotonic() < deadline, size
        time.sleep(0.005)


def test_a_client_is_told_what_lies_unread_as_without_the_guard(start_guard: StartGuard, server: Server) -> None:
    """What available() of pgjdbc asks."""
    guard = start_guard()
    told = []
    for address in (server.at("tcp"), guard.at("tcp")):
        connection = psycopg.connect(address.conninfo)
        connection.pgconn.send_query(b"SELECT repeat('x', 500)")
        told.append(unread(connection))
        connection.close()
    assert told[0] == told[1]


def gone(made: set[tuple[str, int]]) -> None:
    """Wait until none of these is left; they are freed a moment after whoever held them has ended."""
    deadline = time.monotonic() + 30
    while existing() & made:
        assert time.monotonic() < deadline, f"left behind: {existing() & made}"
        time.sleep(0.05)


def test_killed_in_the_middle_of_traffic_it_leaves_nothing_behind_and_clients_do_not_hang(
    start_guard: StartGuard, tmp_path: Path
) -> None:
    guard = start_guard("--attribution", "ebpf")
    made = held_by(guard.pid)
    assert {kind for kind, _ in made} == set(OBJECTS)
    assert made <= existing()
    with running(command("traffic"), guard.at("tcp"), tmp_path) as program:
        program.read()
        time.sleep(0.5)
        killed = time.time()
        os.kill(guard.pid, signal.SIGKILL)
        guard._process.wait(30)
        said = program.read()
        assert program.wait() == 0, program.log
    assert said["ended"] == 4, "nobody hangs"
    assert said["last"] - killed < 10
    gone(made)
