from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from pgguard.attribution.forks import Fork, ForkEvents, ForksUnavailable

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may enter other namespaces")


@pytest.fixture
def events() -> Iterator[ForkEvents]:
    try:
        opened = ForkEvents()
    except ForksUnavailable as error:
        pytest.skip(str(error))
    with opened:
        yield opened


def _own(events: ForkEvents) -> list[Fork]:
    """Those that this process has forked; others on this machine fork as well."""
    forks, _ = events.take()
    return [fork for fork in forks if fork.parent == os.getpid()]


def _fork() -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def test_it_is_told_of_each_process_with_its_parent_though_both_may_be_gone(events: ForkEvents) -> None:
    began = time.monotonic()
    pids = [_fork() for _ in range(3)]
    told = _own(events)
    assert [fork.pid for fork in told] == pids
    assert began <= told[0].at <= told[1].at <= told[2].at <= time.monotonic()
    assert _own(events) == []


def test_it_is_not_told_of_threads(events: ForkEvents) -> None:
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()
    assert thread.native_id not in {fork.pid for fork in events.take()[0]}


def test_there_is_something_as_soon_as_a_child_runs(events: ForkEvents) -> None:
    events.take()
    _fork()
    assert events.are_there()


def test_that_there_were_more_than_there_is_room_for_is_told_once(events: ForkEvents) -> None:
    events._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    events.take()
    for _ in range(20):
        _fork()
    forks, lost = events.take()
    assert lost
    assert len(forks) < 20
    pid = _fork()
    assert pid in {fork.pid for fork in _own(events)}


def test_one_that_is_closed_tells_of_nothing(events: ForkEvents) -> None:
    events.close()
    assert events.take() == ([], False)


@needs_root
@pytest.mark.parametrize(("option", "kind"), [("--net", "network"), ("--pid", "pid"), ("--user", "user")])
def test_in_another_namespace_it_says_what_to_change(option: str, kind: str) -> None:
    program = (
        "from pgguard.attribution.forks import ForkEvents, ForksUnavailable\n"
        "try:\n"
        "    ForkEvents()\n"
        "except ForksUnavailable as error:\n"
        "    print(error.problem, error.remedy, sep=': ')\n"
    )
    done = subprocess.run(
        ["unshare", option, "--fork", sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    problem = f"the guard isn't in the host's own {kind} namespace, where the kernel tells of new processes"
    assert done.stdout == f"{problem}: run the guard in the host's {kind} namespace\n"
