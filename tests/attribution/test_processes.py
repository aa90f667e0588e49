from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from pgguard.attribution.processes import ProcessBook, parse_stat, read_process, read_stat
from tests.attribution.puppets import Puppet

Puppets = Callable[[], Puppet]

SET_NAME = "open('/proc/self/comm', 'w').write({!r})"


def test_a_process_is_described_as_it_is(puppet: Puppets) -> None:
    before = time.time()
    process = read_process(puppet().pid)
    assert process is not None
    assert process.ppid == os.getpid()
    assert process.cmdline[1] == "-c"
    assert before - 1 <= process.started_at <= time.time() + 1


def test_a_name_with_parentheses_and_spaces_does_not_shift_the_fields(puppet: Puppets) -> None:
    child = puppet()
    before = read_process(child.pid)
    child.do(SET_NAME.format("a) R 1 (b"))
    process = read_process(child.pid)
    assert before is not None
    assert process is not None
    assert process.name == "a) R 1 (b"
    assert (process.started, process.ppid) == (before.started, before.ppid)


def test_a_line_of_stat_is_decoded_by_its_last_parenthesis() -> None:
    stat = parse_stat(b"7 (a) R 1 (\xff) S 6 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 0 0" + b" 0" * 27 + b" 9\n")
    assert stat == ("a) R 1 (\ufffd", "S", 6, 4194560, 1, 1, 4711, 9)


def test_a_process_in_a_pid_namespace_of_its_own_is_known_by_the_pid_that_it_has_there(puppet: Puppets) -> None:
    """By that one the container's own logs speak of it."""
    parent = puppet()
    if parent.do("__import__('ctypes').CDLL(None).unshare(0x20000000)") != 0:  # CLONE_NEWPID
        pytest.skip("no pid namespace can be made here")
    init = parent.do("fork()")
    inner = parent.do("[fork() for _ in range(2)]")
    seen = [read_process(pid) for pid in (parent.pid, init, *inner)]
    assert [process and process.namespace_pid for process in seen] == [None, 1, 2, 3]


def test_within_a_pid_namespace_pids_are_what_they_are_there() -> None:
    script = (
        "import os; from pgguard.attribution.processes import read_process; process = read_process(os.getpid()); "
        "print(process.pid, process.namespace_pid, process.ppid)"
    )
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable, "-c", script]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no pid namespace can be made here: {error}")
    assert done.stdout == "1 None None\n"


def test_the_pid_in_another_namespace_is_told_without_ptrace_rights_too(puppet: Puppets) -> None:
    parent, guard = puppet(), puppet()
    if parent.do("__import__('ctypes').CDLL(None).unshare(0x20000000)") != 0:
        pytest.skip("no pid namespace can be made here")
    init = parent.do("fork()")
    # The interpreter may be where only root can import from, so whatever is needed is imported before.
    guard.do(f"from pgguard.attribution.processes import read_process; read_process({init}); become_nobody()")
    assert guard.do(f"[read_process(pid).namespace_pid for pid in ({init}, {parent.pid}, os.getpid())]") == [
        1,
        None,
        None,
    ]


def test_nobody_is_found_where_nobody_is(puppet: Puppets) -> None:
    child = puppet()
    child.end()
    assert read_process(child.pid) is None


def test_a_kernel_thread_and_a_zombie_hold_no_files(puppet: Puppets) -> None:
    parent = puppet()
    zombie = parent.do("fork()")
    parent.do(f"os.close(holds.pop({zombie})); os.waitid(os.P_PID, {zombie}, os.WEXITED | os.WNOWAIT)")
    stat = read_stat(zombie)
    assert stat is not None
    assert stat.holds_no_files
    own = read_stat(os.getpid())
    assert own is not None
    assert not own.holds_no_files


def test_a_process_is_remembered_by_its_latest_name_when_it_is_gone(puppet: Puppets) -> None:
    """Preforking servers name their workers after the fork, and the name is gone with them."""
    book = ProcessBook()
    child = puppet()
    first = book.look(child.pid)
    assert first is not None
    child.do(SET_NAME.format("worker 1"))
    assert book.refresh(first).name == "worker 1"
    child.end()
    assert book.refresh(first).name == "worker 1"


def test_a_zombie_keeps_the_command_line_that_it_had(puppet: Puppets) -> None:
    book = ProcessBook()
    parent = puppet()
    child = parent.do("fork()")
    alive = book.look(child)
    parent.do(f"os.close(holds.pop({child})); os.waitid(os.P_PID, {child}, os.WEXITED | os.WNOWAIT)")
    dead = book.look(child)
    assert alive is not None
    assert dead is not None
    assert dead.cmdline == alive.cmdline != ()


def test_a_reused_pid_is_not_taken_for_the_process_that_had_it(puppet: Puppets) -> None:
    """Whoever has the pid now, the one that is gone stays who it was."""
    book = ProcessBook()
    now = book.look(puppet().pid)
    assert now is not None
    gone = type(now)(now.pid, now.started - 1, now.started_at, "gone", ("gone",), now.ppid)
    assert book.refresh(gone) == gone


def test_a_book_forgets_the_processes_that_it_has_not_seen_for_longest(puppet: Puppets) -> None:
    book = ProcessBook(limit=1)
    first, second = puppet(), puppet()
    old = book.look(first.pid)
    assert old is not None
    first.do(SET_NAME.format("renamed"))
    book.refresh(old)
    book.look(second.pid)
    first.end()
    assert book.refresh(old) == old
