"""What has become of processes, real ones that end in all ways."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest

from pgguard.attribution.fates import Fate, State, fate_of
from pgguard.attribution.processes import read_stat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SECONDS = 10.0
SOON = 0.005


@pytest.fixture
def children() -> Iterator[list[int]]:
    """Those that are to be killed and collected in the end."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            continue


def fork(children: list[int], do: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            do()
        finally:
            os._exit(99)
    children.append(pid)
    return pid


def started(pid: int) -> int:
    stat = read_stat(pid)
    assert stat is not None
    return stat.started


@pytest.mark.parametrize(
    ("how", "fate"),
    [
        (lambda: os._exit(0), Fate(State.EXITED, 0)),
        (lambda: os._exit(7), Fate(State.EXITED, 7)),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), Fate(State.KILLED, signal.SIGKILL)),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), Fate(State.KILLED, signal.SIGTERM)),
    ],
)
def test_a_process_that_nobody_has_collected_shows_how_it_ended(
    how: Callable[[], None], fate: Fate, children: list[int]
) -> None:
    pid = fork(children, how)
    assert fate_of(pid, started(pid), None, seconds=SECONDS) == fate
    assert fate_of(pid, None, None, seconds=SECONDS) == fate


def test_of_a_process_that_was_collected_nobody_knows_how_it_ended(children: list[int]) -> None:
    pid = fork(children, lambda: os._exit(7))
    at = started(pid)
    os.waitpid(pid, 0)
    assert fate_of(pid, at, None, seconds=SECONDS) == Fate(State.ENDED)
    assert fate_of(os.getpid(), at - 1, None, seconds=SECONDS) == Fate(State.ENDED), "the pid is another's"
    assert fate_of(os.getpid(), None, None, opened=0.0, seconds=SECONDS) == Fate(State.ENDED), "and so is this one"


def test_a_process_that_lives_may_have_the_socket_open(children: list[int]) -> None:
    one, two = socket.socketpair()
    with one, two:
        inode = os.fstat(one.fileno()).st_ino
        pid = fork(children, lambda: time.sleep(60))
        assert fate_of(pid, started(pid), inode, seconds=SOON) == Fate(State.ALIVE, None, True)
        assert fate_of(pid, started(pid), None, seconds=SOON) == Fate(State.ALIVE, None, None)
        assert fate_of(pid, started(pid), 1, seconds=SOON) == Fate(State.ALIVE, None, False)


def test_a_process_that_is_about_to_end_is_waited_for(children: list[int]) -> None:
    def end_soon() -> None:
        time.sleep(0.2)
        os._exit(3)

    pid = fork(children, end_soon)
    assert fate_of(pid, started(pid), None, seconds=SECONDS) == Fate(State.EXITED, 3)


def test_a_process_whose_first_thread_has_ended_lives_on(children: list[int]) -> None:
    def lose_the_first_thread() -> None:
        import ctypes  # noqa: PLC0415

        threading.Thread(target=time.sleep, args=(60,)).start()
        ctypes.CDLL(None).pthread_exit(None)

    pid = fork(children, lose_the_first_thread)
    deadline = time.monotonic() + SECONDS
    while (stat := read_stat(pid)) is not None and stat.state != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert fate_of(pid, started(pid), None, seconds=SOON) == Fate(State.ALIVE, None, None)


@pytest.mark.skipif(os.geteuid() != 0, reason="it takes root to become somebody else")
def test_whoever_may_not_trace_it_is_not_told_how_it_ended(children: list[int]) -> None:
    pid = fork(children, lambda: os._exit(0))
    assert fate_of(pid, started(pid), None, seconds=SECONDS) == Fate(State.EXITED, 0)
    read, write = os.pipe()

    def ask_as_nobody() -> None:
        os.setgid(65534)
        os.setuid(65534)
        os.write(write, repr(fate_of(pid, None, None, seconds=SECONDS)).encode())
        os._exit(0)

    fork(children, ask_as_nobody)
    assert os.read(read, 1000).decode() == repr(Fate(State.ENDED))
    os.close(read)
    os.close(write)
