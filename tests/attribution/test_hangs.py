"""Reads that hang, and what is refused because of them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from pgguard.attribution import hangs
from pgguard.attribution.hangs import hanging, reading
from pgguard.attribution.processes import read_process
from tests.attribution.puppets import Puppet

Puppets = Callable[[], Puppet]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hangs, "PATIENCE", 0.0)


@contextmanager
def hung(pid: int) -> Iterator[int]:
    """A thread that hangs as it reads about a process; yields its identity."""
    begun, end = threading.Event(), threading.Event()

    def hang() -> None:
        with reading(pid):
            begun.set()
            end.wait()

    thread = threading.Thread(target=hang)
    thread.start()
    begun.wait()
    try:
        assert thread.ident is not None
        yield thread.ident
    finally:
        end.set()
        thread.join()


def _is_refused(pid: int) -> bool:
    try:
        with reading(pid):
            return False
    except TimeoutError:
        return True


def test_what_hangs_is_not_looked_at_again_until_it_has_ended(puppet: Puppets) -> None:
    one, other = puppet(), puppet()
    with hung(one.pid) as thread:
        assert hanging() == {thread: one.pid}
        assert _is_refused(one.pid)
        assert read_process(one.pid) is None
        assert read_process(other.pid) is not None
    assert hanging() == {}
    assert read_process(one.pid) is not None


def test_a_read_that_is_in_time_keeps_nobody_waiting(puppet: Puppets, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hangs, "PATIENCE", 60.0)
    pid = puppet().pid
    with hung(pid):
        assert hanging() == {}
        assert not _is_refused(pid)


def test_a_thread_is_in_nobodys_way_but_others(puppet: Puppets) -> None:
    pid = puppet().pid
    with reading(pid), reading(pid):
        assert not _is_refused(pid)
        assert list(hanging().values()) == [pid]
    assert hanging() == {}


@pytest.mark.skipif(os.geteuid() != 0, reason="it takes processes of another user")
def test_one_user_can_make_a_few_hang_and_no_more(puppet: Puppets) -> None:
    """Nobody else loses anything by it."""
    bad, good = [puppet() for _ in range(4)], puppet()
    for process in bad:
        process.do("become_nobody()")
    with ExitStack() as stack:
        for process in bad[:3]:
            assert not _is_refused(bad[3].pid)
            stack.enter_context(hung(process.pid))
        assert _is_refused(bad[3].pid)
        assert not _is_refused(good.pid)
    assert not _is_refused(bad[3].pid)


@pytest.mark.skipif(os.geteuid() != 0, reason="it takes processes of another user")
def test_many_users_can_not_make_more_hang_than_there_is_room_for(puppet: Puppets) -> None:
    ours, theirs = puppet(), puppet()
    theirs.do("become_nobody()")
    with ExitStack() as stack:
        for n in range(16):
            assert not _is_refused(theirs.pid)
            stack.enter_context(hung(-1 - n))  # processes that are gone
        assert _is_refused(theirs.pid)
        assert not _is_refused(ours.pid)
    assert not _is_refused(theirs.pid)
