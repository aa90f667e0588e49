from __future__ import annotations

import os
import time
from collections.abc import Callable

from pgguard.attribution.processes import ProcessBook, read_process, read_stat
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
