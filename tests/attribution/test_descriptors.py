"""Who descends from a process, and whether that still runs its program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pgguard.attribution import descriptors
from pgguard.attribution.descriptors import find_sockets, is_fork, list_children
from pgguard.attribution.processes import read_stat

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.attribution.puppets import Puppet


@pytest.fixture
def parent(puppet: Callable[[], Puppet]) -> Puppet:
    return puppet()


def test_children_are_listed_and_not_their_children(parent: Puppet) -> None:
    first = parent.do("fork()")
    second = parent.do("fork(fork)")
    assert sorted(list_children(parent.pid)) == sorted([first, second])
    [grandchild] = list_children(second)
    stat = read_stat(grandchild)
    assert stat is not None
    assert stat.ppid == second


def test_children_of_another_thread_are_children_too(parent: Puppet) -> None:
    """Each thread has a list of its own: threaded servers fork wherever they are."""
    parent.do("import threading; forked = []; held = threading.Event()")
    parent.do(
        "thread = threading.Thread(target=lambda: (forked.append(fork()), held.wait()), daemon=True)\n"
        "thread.start()\n"
        "while not forked: pass"
    )
    assert list_children(parent.pid) == parent.do("forked")


def test_a_zombie_is_a_child_until_it_is_reaped(parent: Puppet) -> None:
    child = parent.do("fork()")
    parent.do(f"os.close(holds.pop({child})); os.waitid(os.P_PID, {child}, os.WEXITED | os.WNOWAIT)")
    assert list_children(parent.pid) == [child]
    assert not is_fork(child, parent.pid)
    parent.do(f"os.waitpid({child}, 0)")
    assert list_children(parent.pid) == []


def test_a_process_without_children_or_that_is_gone_has_none(parent: Puppet) -> None:
    assert list_children(parent.pid) == []
    parent.end()
    assert list_children(parent.pid) == []
    assert not is_fork(parent.pid, os.getpid())


def test_a_fork_runs_the_same_program_until_it_executes_another(parent: Puppet) -> None:
    child = parent.do("fork()")
    assert is_fork(child, parent.pid)
    parent.do("other = subprocess.Popen(['sleep', '60'])")
    pid = parent.do("other.pid")
    assert list_children(parent.pid).count(pid) == 1
    assert not is_fork(pid, parent.pid)
    parent.do("other.kill(); other.wait()")


def test_the_same_program_started_anew_is_no_fork(parent: Puppet) -> None:
    """As a multiprocessing child by spawn is: the file is the same, but what was open is closed."""
    parent.do(f"again = subprocess.Popen([{sys.executable!r}, '-c', 'input()'], stdin=subprocess.PIPE)")
    assert not is_fork(parent.do("again.pid"), parent.pid)
    parent.do("again.stdin.close(); again.wait()")


def test_of_very_many_descriptors_the_latest_are_looked_at(parent: Puppet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the others it isn't said that they are no sockets: nobody can be alone with one then."""
    monkeypatch.setattr(descriptors, "_DESCRIPTORS", 10)
    parent.do("first = socket.socket(); more = [os.dup(0) for _ in range(20)]; last = socket.socket()")
    first, last = (parent.do(f"os.fstat({name}.fileno()).st_ino") for name in ("first", "last"))
    assert set(find_sockets(parent.pid, {last})) == {last}
    with pytest.raises(PermissionError):
        find_sockets(parent.pid, {first, last})
    assert find_sockets(parent.pid, ()) == {}


ALONE = ["setpriv", "--no-new-privs", "--bounding-set=-all,+sys_ptrace", "--inh-caps=-all"]
"""What a command begins with that root has CAP_SYS_PTRACE for, and no other right."""
ASKS = (
    "import json, sys; from pgguard.attribution.descriptors import find_sockets, has_socket\n"
    "pid, inode, fd = map(int, sys.argv[1:])\n"
    "wanted = {inode, inode + 10**9}\n"
    "print(json.dumps([find_sockets(pid, wanted), find_sockets(pid, ()), has_socket(pid, fd, inode), "
    "has_socket(pid, 0, inode), has_socket(pid, fd, inode + 1), has_socket(pid, 9999, inode)]))"
)


@pytest.mark.skipif(
    os.geteuid() != 0 or tuple(map(int, os.uname().release.split(".")[:2])) < (5, 14), reason="see the module"
)
def test_another_users_sockets_are_found_with_the_right_to_trace_alone(parent: Puppet) -> None:
    parent.do("import socket; one = socket.socket(); become_nobody()")
    fd, inode = parent.do("(one.fileno(), os.fstat(one.fileno()).st_ino)")
    command = [*ALONE, sys.executable, "-c", ASKS, str(parent.pid), str(inode), str(fd)]
    environment = os.environ | {"PYTHONPATH": str(Path(descriptors.__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=environment)
    assert json.loads(done.stdout) == [{str(inode): fd}, {}, True, False, False, False]


@pytest.mark.skipif(os.geteuid() != 0, reason="another user takes root")
def test_nothing_is_seen_of_another_user_without_it(parent: Puppet) -> None:
    parent.do("import socket; one = socket.socket(); become_nobody()")
    command = [*ALONE[:2], "--bounding-set=-all", ALONE[3], sys.executable, "-c", ASKS, str(parent.pid), "1", "1"]
    environment = os.environ | {"PYTHONPATH": str(Path(descriptors.__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment)
    assert "PermissionError" in done.stderr
