from __future__ import annotations

import array
import logging
import os
import resource
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest

from pgguard.attribution.descriptors import find_sockets
from pgguard.attribution.evidence import Process
from pgguard.attribution.forks import Fork, ForkEvents, ForksUnavailable
from pgguard.attribution.holders import LASTING, Holders, HolderWatch
from pgguard.attribution.processes import TICKS_PER_SECOND, ProcessBook
from tests.attribution.puppets import Puppet, outlive_a_tick

Puppets = Callable[[], Puppet]

INODE = "os.fstat({}.fileno()).st_ino"


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


@pytest.fixture(params=["told", "listed"], autouse=True)
def forks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ForkEvents | None]:
    """Where the kernel tells of new processes, what does; every watch here gets it."""
    if request.param == "listed":
        yield None
        return
    try:
        events = ForkEvents()
    except ForksUnavailable as error:
        pytest.skip(str(error))
    with events:
        monkeypatch.setattr(sys.modules[__name__], "HolderWatch", partial(HolderWatch, forks=events))
        yield events


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _as_it_began(client: Puppet) -> float:
    process = ProcessBook().look(client.pid)
    assert process is not None
    return process.started / TICKS_PER_SECOND


def _pids(holders: Holders) -> set[int]:
    return {process.pid for process in holders.processes}


def test_the_only_holder_is_found_among_all_processes_and_again_as_a_known_client(
    listener: socket.socket, puppet: Puppets
) -> None:
    client = puppet()
    outlive_a_tick()
    watch = HolderWatch(ProcessBook())
    for name in "c", "d":
        with client.connect(listener, name):
            inode = client.do(INODE.format(name))
            holders = watch.find({inode: _now()})[inode]
            assert _pids(holders) == {client.pid}
            assert holders.complete


def test_one_walk_tells_the_connections_of_many_clients_apart(listener: socket.socket, puppet: Puppets) -> None:
    clients = [puppet() for _ in range(3)]
    outlive_a_tick()
    watch = HolderWatch(ProcessBook())
    with ExitStack() as accepted:
        for client in clients:
            accepted.enter_context(client.connect(listener))
        inodes = [client.do(INODE.format("c")) for client in clients]
        found = watch.find(dict.fromkeys(inodes, _now()))
        assert [_pids(found[inode]) for inode in inodes] == [{client.pid} for client in clients]


def test_a_fork_is_seen_by_the_watch_and_its_closing_too(listener: socket.socket, puppet: Puppets) -> None:
    client = puppet()
    watch = HolderWatch(ProcessBook())
    with client.connect(listener):
        inode = client.do(INODE.format("c"))
        watch.find({inode: _now()})
        child = client.do("fork()")
        assert _pids(watch.watch([inode])[inode]) == {client.pid, child}
        client.do(f"release({child})")
        assert _pids(watch.watch([inode])[inode]) == {client.pid}
        client.do("c.close()")
        assert watch.watch([inode])[inode] == Holders()


def test_a_grandchild_whose_parent_is_gone_is_seen(listener: socket.socket, puppet: Puppets) -> None:
    client = puppet()
    watch = HolderWatch(ProcessBook())
    with client.connect(listener):
        inode = client.do(INODE.format("c"))
        watch.find({inode: _now()})
        # The daemon's double fork: it is nobody's child any more, and ends with the pipe that its origin holds.
        client.do(
            "report, hold = os.pipe(), os.pipe()\n"
            "pid = os.fork()\n"
            "if pid == 0:\n"
            "    os.close(hold[1])\n"
            "    if os.fork() == 0:\n"
            "        os.write(report[1], b'%d' % os.getpid()); os.read(hold[0], 1)\n"
            "    os._exit(0)\n"
            "os.waitpid(pid, 0)\n"
            "os.close(hold[0])\n"
            "orphan = int(os.read(report[0], 20))"
        )
        orphan = client.do("orphan")
        assert _pids(watch.watch([inode])[inode]) == {client.pid, orphan}


def test_a_child_forked_before_its_connection_was_asked_about_is_seen(listener: socket.socket, puppet: Puppets) -> None:
    """Another session's question may list the child as a process while this connection isn't known yet."""
    client = puppet()
    watch = HolderWatch(ProcessBook())
    with client.connect(listener):
        opened = _now()
        outlive_a_tick()
        child = client.do("fork()")
        watch.watch([])
        inode = client.do(INODE.format("c"))
        assert _pids(watch.find({inode: opened})[inode]) == {client.pid, child}


def test_a_child_that_has_closed_the_connection_is_no_holder(listener: socket.socket, puppet: Puppets) -> None:
    client = puppet()
    watch = HolderWatch(ProcessBook())
    with client.connect(listener):
        inode = client.do(INODE.format("c"))
        watch.find({inode: _now()})
        client.do("fork(c.close)")
        assert _pids(watch.watch([inode])[inode]) == {client.pid}


def test_a_program_started_with_close_on_exec_is_no_holder_and_one_without_is(
    listener: socket.socket, puppet: Puppets
) -> None:
    client = puppet()
    watch = HolderWatch(ProcessBook())
    run = "subprocess.Popen(['cat'], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, pass_fds={})"
    echo = "{0}.stdin.write(b'x'); {0}.stdout.read(1)"
    with client.connect(listener):
        inode = client.do(INODE.format("c"))
        watch.find({inode: _now()})
        client.do(f"p = {run.format('()')}; {echo.format('p')}")
        assert _pids(watch.watch([inode])[inode]) == {client.pid}
        client.do(f"q = {run.format('[c.fileno()]')}; {echo.format('q')}")
        assert _pids(watch.watch([inode])[inode]) == {client.pid, client.do("q.pid")}
        client.do("p.communicate(); q.communicate()")


def test_a_lasting_holder_is_told_from_a_passing_one(listener: socket.socket, puppet: Puppets) -> None:
    client = puppet()
    watch = HolderWatch(ProcessBook())
    with client.connect(listener):
        inode = client.do(INODE.format("c"))
        watch.find({inode: _now()})
        child = client.do("fork()")
        first = watch.watch([inode])[inode]
        holding = first.holdings[-1]
        assert holding.process.pid == child
        outlive_a_tick()
        again = watch.watch([inode])[inode]
        assert again.holdings[-1].since == holding.since
        had_it_for = again.holdings[-1].seen - holding.since
        assert child in {process.pid for process in again.lasting(had_it_for)}
        assert child not in {process.pid for process in first.lasting(had_it_for)}


class InterruptedBook(ProcessBook):
    """Lets something happen at the moment when a certain process has just been seen to hold a socket."""

    def __init__(self) -> None:
        super().__init__()
        self.interrupt: dict[int, Callable[[], object]] = {}

    def look(self, pid: int) -> Process | None:
        process = super().look(pid)
        if pid in self.interrupt:
            self.interrupt.pop(pid)()
        return process


def test_holders_that_are_reported_together_hold_it_together(listener: socket.socket, puppet: Puppets) -> None:
    """A child that closes the connection while its parent is still being searched for is no holder any more."""
    client, book = puppet(), InterruptedBook()
    outlive_a_tick()
    watch = HolderWatch(book)
    with client.connect(listener):
        opened = _now()
        inode = client.do(INODE.format("c"))
        outlive_a_tick()
        child = client.do("fork()")
        book.interrupt[client.pid] = lambda: client.do(f"release({child})")
        assert _pids(watch.find({inode: opened})[inode]) == {client.pid}


def test_an_heir_is_not_taken_for_the_only_holder_while_the_opener_is_searched_for(
    listener: socket.socket, puppet: Puppets
) -> None:
    client, book = puppet(), InterruptedBook()
    outlive_a_tick()
    watch = HolderWatch(book)
    meanwhile: dict[int, Holders] = {}
    with client.connect(listener):
        opened = _now()
        inode = client.do(INODE.format("c"))
        outlive_a_tick()
        child = client.do("fork()")
        book.interrupt[client.pid] = lambda: meanwhile.update(watch.watch([inode]))
        assert watch.find({inode: opened})[inode].complete
    assert _pids(meanwhile[inode]) == {child}
    assert not meanwhile[inode].complete


def test_a_zombie_of_another_user_is_not_taken_for_a_process_that_hides_its_files(puppet: Puppets) -> None:
    guard, parent = puppet(), puppet()
    zombie = parent.do("fork()")
    parent.do(f"os.close(holds.pop({zombie})); os.waitid(os.P_PID, {zombie}, os.WEXITED | os.WNOWAIT)")
    guard.do("from pgguard.attribution.descriptors import find_sockets; become_nobody()")
    assert guard.do(f"find_sockets({zombie}, ())") == {}


def test_a_socket_that_was_handed_over_is_found_by_a_walk(puppet: Puppets) -> None:
    """SCM_RIGHTS gives a connection to a process that is older than it."""
    ours, theirs = socket.socketpair()
    keeper = puppet()
    watch = HolderWatch(ProcessBook())
    with ours, theirs, socket.socket(socket.AF_UNIX) as channel:
        channel.bind("")
        channel.listen()
        address = channel.getsockname()
        keeper.do(f"k = socket.socket(socket.AF_UNIX); k.connect({address!r})")
        with channel.accept()[0] as link:
            link.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [theirs.fileno()]))])
            keeper.do("data, fds, _, _ = socket.recv_fds(k, 1, 1)")
        inode = os.fstat(theirs.fileno()).st_ino
        assert _pids(watch.walk({inode: _now()})[inode]) == {keeper.pid}


def test_the_guard_itself_is_never_a_holder() -> None:
    watch = HolderWatch(ProcessBook())
    with socket.socket() as own:
        inode = os.fstat(own.fileno()).st_ino
        assert watch.walk({inode: _now()})[inode] == Holders()


def test_threads_that_ask_at_once_all_get_the_whole_answer(listener: socket.socket, puppet: Puppets) -> None:
    client = puppet()
    watch = HolderWatch(ProcessBook())
    names = [f"c{n}" for n in range(20)]
    with ExitStack() as accepted:
        for name in names:
            accepted.enter_context(client.connect(listener, name))
        inodes = [client.do(INODE.format(name)) for name in names]
        opened = _now()
        outlive_a_tick()
        child = client.do("fork()")
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda inode: watch.find({inode: opened})[inode], inodes * 5))
            answers += [found for watched in pool.map(watch.watch, [inodes] * 5) for found in watched.values()]
    assert {frozenset(_pids(answer)) for answer in answers} == {frozenset({client.pid, child})}


GUARD = """
import time
from pgguard.attribution.holders import HolderWatch
from pgguard.attribution.processes import TICKS_PER_SECOND, ProcessBook
become_nobody()
watch = HolderWatch(ProcessBook())
def state(found):
    return [sorted(p.pid for p in found.processes), found.complete]
def find(inode):
    return state(watch.find({inode: time.clock_gettime(time.CLOCK_BOOTTIME)})[inode])
"""


def test_processes_of_other_users_put_only_the_connections_in_doubt_that_they_can_hold(
    listener: socket.socket, puppet: Puppets
) -> None:
    """An ordinary user can't look at root's processes, and yet is told that a process is alone with its connection."""
    guard, client, stranger = puppet(), puppet(), puppet()
    stranger.do("set_dumpable(0)")
    client.do("become_nobody()")
    guard.do(GUARD)
    outlive_a_tick()
    with client.connect(listener):
        inode = client.do(INODE.format("c"))
        assert guard.do(f"find({inode})") == [[client.pid], True]
        outlive_a_tick()
        stranger.do("fork()")
        assert guard.do(f"state(watch.watch([{inode}])[{inode}])") == [[client.pid], True]
        child = client.do("fork(lambda: set_dumpable(0))")
        assert guard.do(f"state(watch.watch([{inode}])[{inode}])") == [[client.pid], False]
        client.do(f"release({child})")
        assert guard.do(f"state(watch.watch([{inode}])[{inode}])") == [[client.pid], True]


def test_an_heir_is_not_taken_for_the_only_holder_while_its_parent_can_not_be_looked_at(
    listener: socket.socket, puppet: Puppets
) -> None:
    guard, client = puppet(), puppet()
    client.do("become_nobody(); set_dumpable(0)")
    guard.do(GUARD)
    outlive_a_tick()
    with client.connect(listener):
        inode = client.do(INODE.format("c"))
        assert guard.do(f"find({inode})") == [[], False]
        outlive_a_tick()
        child = client.do("fork(lambda: set_dumpable(1))")
        assert guard.do(f"state(watch.watch([{inode}])[{inode}])") == [[child], False]


def test_a_lone_heir_is_the_only_holder_when_its_parent_is_seen_to_have_closed(
    listener: socket.socket, puppet: Puppets
) -> None:
    guard, client = puppet(), puppet()
    client.do("become_nobody()")
    guard.do(GUARD)
    outlive_a_tick()
    with client.connect(listener):
        inode = client.do(INODE.format("c"))
        assert guard.do(f"find({inode})") == [[client.pid], True]
        outlive_a_tick()
        child = client.do("fork()")
        client.do("c.close()")
        assert guard.do(f"state(watch.watch([{inode}])[{inode}])") == [[child], True]


@contextmanager
def no_descriptors() -> Iterator[None]:
    """Let this process open nothing: all that it has open is beyond its limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_without_descriptors_a_known_holder_is_seen_still_and_nobody_is_taken_for_gone(
    listener: socket.socket, puppet: Puppets
) -> None:
    client = puppet()
    outlive_a_tick()
    watch = HolderWatch(ProcessBook())
    with client.connect(listener):
        inode = client.do(INODE.format("c"))
        [opener] = watch.find({inode: _now()})[inode].processes
        child = client.do("fork()")
        with no_descriptors():
            found = watch.find({inode: _now()})[inode]
            let_go = watch.has_let_go(inode, opener)
            confirmed = watch.confirmed(inode)
        assert (_pids(found), found.complete) == ({client.pid}, False)  # it is not known of the child
        assert not let_go
        assert confirmed == (opener,)
        found = watch.watch([inode])[inode]
        assert (_pids(found), found.complete) == ({client.pid, child}, True)
        client.do("c.close()")
        with no_descriptors():
            found = watch.watch([inode])[inode]
            assert watch.has_let_go(inode, opener)
        assert _pids(found) <= {client.pid, child}
        assert not found.complete


# Many at once


class Readings:
    """Whose descriptors are read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pids: list[int] = []

        def reading(pid: int, wanted: Collection[int]) -> dict[int, int]:
            self.pids.append(pid)
            return find_sockets(pid, wanted)

        monkeypatch.setattr("pgguard.attribution.holders.find_sockets", reading)


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> Readings:
    return Readings(monkeypatch)


def _connections(client: Puppet, listener: socket.socket, stack: ExitStack, names: str) -> list[int]:
    for name in names:
        stack.enter_context(client.connect(listener, name))
    inodes: list[int] = client.do("[" + ", ".join(INODE.format(name) for name in names) + "]")
    return inodes


@pytest.mark.parametrize("ask", ["find", "holding"])
def test_a_process_is_read_once_for_all_of_its_connections_that_are_asked_about(
    listener: socket.socket, puppet: Puppets, readings: Readings, ask: str
) -> None:
    client = puppet()
    outlive_a_tick()
    watch = HolderWatch(ProcessBook())
    with ExitStack() as accepted:
        inodes = _connections(client, listener, accepted, "cdefgh")
        opened = dict.fromkeys(inodes, _now())
        watch.find(opened)
        readings.pids.clear()
        since = time.monotonic()
        for inode in inodes:
            if ask == "find":
                holders = watch.find({inode: opened[inode]}, since=since)[inode]
                assert (_pids(holders), holders.complete) == ({client.pid}, True)
            else:
                [holder] = watch.holding(inode, opened[inode], [client.pid], since)
                assert holder.pid == client.pid
        assert readings.pids.count(client.pid) == 1


def test_what_was_seen_before_it_counts_is_looked_at_again(
    listener: socket.socket, puppet: Puppets, readings: Readings
) -> None:
    client = puppet()
    outlive_a_tick()
    watch = HolderWatch(ProcessBook())
    with ExitStack() as accepted:
        [inode, _] = inodes = _connections(client, listener, accepted, "cd")
        opened = dict.fromkeys(inodes, _now())
        watch.find(opened)
        before = time.monotonic()
        assert _pids(watch.find(opened, since=before)[inode]) == {client.pid}
        client.do("c.close()")
        child = client.do("fork()")
        after = time.monotonic()
        readings.pids.clear()
        found = watch.find(opened, since=after)
        assert [_pids(found[inode]) for inode in inodes] == [set(), {client.pid, child}]
        assert {client.pid, child} <= set(readings.pids)


def test_everybody_is_read_once_for_all_connections_that_nobody_has_open_any_more(
    listener: socket.socket, puppet: Puppets, readings: Readings
) -> None:
    client, other = puppet(), puppet()
    outlive_a_tick()
    watch = HolderWatch(ProcessBook())
    with ExitStack() as accepted:
        inodes = _connections(client, listener, accepted, "cdefgh")
        opened = dict.fromkeys(inodes, _now())
        watch.find(opened)
        client.end()
        readings.pids.clear()
        since = time.monotonic()
        for inode in inodes:
            assert watch.find({inode: opened[inode]}, since=since)[inode] == Holders()
        assert readings.pids.count(other.pid) == 1


def test_what_a_walk_for_many_connections_takes_is_not_multiplied_by_the_processes(
    listener: socket.socket, puppet: Puppets
) -> None:
    """A process that had a thousand connections has been killed: each process is read once, and compared once."""
    client = puppet()
    looked_up: list[int] = []

    class Inode(int):
        def __hash__(self) -> int:
            looked_up.append(self)
            return super().__hash__()

    outlive_a_tick()
    watch = HolderWatch(ProcessBook())
    with ExitStack() as accepted:
        inodes: list[int] = [*map(Inode, _connections(client, listener, accepted, "cdefgh"))]
        opened = dict.fromkeys(inodes, _now())
        watch.find(opened)
        client.end()
        looked_up.clear()
        assert set(watch.find(opened, since=time.monotonic()).values()) == {Holders()}
        assert len(looked_up) < 20 * len(inodes), "there are more processes than that"


def test_an_heir_that_is_known_is_not_read_again(listener: socket.socket, puppet: Puppets, readings: Readings) -> None:
    """Hundreds of children have inherited many connections, and a fault of one is looked into."""
    client = puppet()
    outlive_a_tick()
    watch = HolderWatch(ProcessBook())
    with ExitStack() as accepted:
        [first, second] = _connections(client, listener, accepted, "cd")
        opened = {first: _now(), second: _now()}
        watch.find(opened)
        child = client.do("fork()")
        assert _pids(watch.find({first: opened[first]})[first]) == {client.pid, child}
        readings.pids.clear()
        assert _pids(watch.find({first: opened[first]})[first]) == {client.pid, child}
        assert child not in readings.pids
        assert _pids(watch.find(opened)[second]) == {client.pid, child}, "it wasn't known to hold this one"
        client.do(f"release({child})")
        assert _pids(watch.find({first: opened[first]})[first]) == {client.pid}


def test_a_connection_that_becomes_known_later_is_looked_for_all_the_same(
    listener: socket.socket, puppet: Puppets
) -> None:
    client = puppet()
    outlive_a_tick()
    watch = HolderWatch(ProcessBook())
    with ExitStack() as accepted:
        inodes = _connections(client, listener, accepted, "cd")
        opened = dict.fromkeys(inodes, _now())
        since = time.monotonic()
        for inode in inodes:
            assert _pids(watch.find({inode: opened[inode]}, since=since)[inode]) == {client.pid}


def test_a_new_process_is_read_once_until_there_are_new_connections(
    listener: socket.socket, puppet: Puppets, readings: Readings
) -> None:
    client = puppet()
    watch = HolderWatch(ProcessBook())
    with ExitStack() as accepted:
        [first] = _connections(client, listener, accepted, "c")
        watch.find({first: _now()})
        child = client.do("fork()")
        for _ in range(3):
            assert _pids(watch.watch([first])[first]) == {client.pid, child}
        assert readings.pids.count(child) == 1
        [second] = _connections(client, listener, accepted, "d")
        watch.find({second: _now()})
        watch.watch([first, second])
        assert readings.pids.count(child) > 1


@pytest.mark.parametrize("ask", ["find", "watch"])
def test_who_cannot_have_inherited_anything_is_not_read(
    listener: socket.socket, puppet: Puppets, readings: Readings, ask: str
) -> None:
    """A server begins a process for each connection, of which none is a client's. The heirs beside them are seen."""
    client, server = puppet(), puppet()
    outlive_a_tick()
    watch = HolderWatch(ProcessBook())
    with ExitStack() as accepted:
        [first] = _connections(client, listener, accepted, "c")
        watch.find({first: _now()}, [client.pid], openers=True)
        other, heir = server.do("fork()"), client.do("fork()")
        if ask == "watch":
            assert _pids(watch.watch([first])[first]) == {client.pid, heir}
        else:
            [second] = _connections(client, listener, accepted, "d")
            assert _pids(watch.find({second: _now()}, [client.pid], openers=True)[second]) == {client.pid}
        assert heir in readings.pids
        assert other not in readings.pids


def test_a_program_that_connects_as_it_begins_is_not_searched_for_where_the_kernel_has_named_it(
    listener: socket.socket, puppet: Puppets, readings: Readings
) -> None:
    """By its age alone it could be an heir. Who has inherited the connection from it is seen all the same."""
    others = [puppet() for _ in range(3)]
    watch = HolderWatch(ProcessBook())
    client = puppet()
    with ExitStack() as accepted:
        [inode] = _connections(client, listener, accepted, "c")
        opened = _as_it_began(client)
        heir = client.do("fork()")
        readings.pids.clear()
        assert _pids(watch.find({inode: opened}, [client.pid], openers=True)[inode]) == {client.pid, heir}
        assert not {other.pid for other in others} & set(readings.pids)


def test_an_heir_of_one_that_the_kernel_has_named_and_that_has_let_go_is_found(
    listener: socket.socket, puppet: Puppets
) -> None:
    watch = HolderWatch(ProcessBook())
    client = puppet()
    with ExitStack() as accepted:
        [inode] = _connections(client, listener, accepted, "c")
        opened = _as_it_began(client)
        heir = client.do("fork()")
        client.do("c.close()")
        assert _pids(watch.find({inode: opened}, [client.pid], openers=True)[inode]) == {heir}


def test_a_new_process_may_have_opened_what_nobody_is_known_to_have(listener: socket.socket, puppet: Puppets) -> None:
    """As a backend does that connects to another database: its parent never had a connection."""
    server = puppet()
    watch = HolderWatch(ProcessBook())
    child = server.do(f"fork(lambda: globals().__setitem__('c', socket.create_connection({listener.getsockname()!r})))")
    accepted, _ = listener.accept()
    with accepted:
        [inode] = _sockets(child)
        assert _pids(watch.find({inode: _now()})[inode]) == {child}


def test_an_heir_of_one_that_has_ended_is_read_though_its_new_parent_never_had_a_connection(
    listener: socket.socket, puppet: Puppets
) -> None:
    """Init, or whatever adopts orphans in its place, is an ancestor of the client."""
    outer = puppet()
    watch = HolderWatch(ProcessBook())
    outer.do("import time; ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)")  # PR_SET_CHILD_SUBREAPER
    outer.do(
        "report, hold = os.pipe(), os.pipe()\n"
        "client = os.fork()\n"
        "if client == 0:\n"
        "    os.close(hold[1])\n"
        f"    c = socket.create_connection({listener.getsockname()!r})\n"
        "    os.write(report[1], b'%20d' % os.fstat(c.fileno()).st_ino); os.read(hold[0], 1)\n"
        "    if os.fork() == 0:\n"
        "        between = os.getpid()\n"
        "        if os.fork() == 0:\n"
        "            while os.getppid() == between: time.sleep(0.001)\n"  # it has the connection open until then
        "            os.write(report[1], b'%20d' % os.getpid()); os.read(hold[0], 1)\n"
        "        os._exit(0)\n"
        "    os.wait(); os.read(hold[0], 1); os._exit(0)\n"
        "os.close(hold[0])"
    )
    accepted, _ = listener.accept()
    with accepted:
        inode = outer.do("int(os.read(report[0], 20))")
        client = outer.do("client")
        assert _pids(watch.find({inode: _now()}, [client], openers=True)[inode]) == {client}
        outer.do("os.write(hold[1], b'x')")
        orphan = outer.do("int(os.read(report[0], 20))")
        assert _pids(watch.watch([inode])[inode]) == {client, orphan}


def _sockets(pid: int) -> list[int]:
    """The inodes of the sockets that a process has open."""
    links = [str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()]
    return [int(link.removeprefix("socket:[").rstrip("]")) for link in links if link.startswith("socket:")]


def test_a_connection_that_is_kept_is_not_looked_at_and_not_forgotten(
    listener: socket.socket, puppet: Puppets, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = puppet()
    outlive_a_tick()
    watch = HolderWatch(ProcessBook())
    clock, passed = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock() + passed[0])
    with ExitStack() as accepted:
        [kept, over, forgotten] = _connections(client, listener, accepted, "cde")
        opened = dict.fromkeys([kept, over, forgotten], _now())
        watch.find(opened)
        assert watch.watch([]).keys() == opened.keys()
        told = watch.watch([], keep={kept: opened[kept], over: opened[over]})
        assert told.keys() == {kept, over}, "it may have changed before anybody was there to be told"
        for _ in range(3):
            passed[0] += 20
            assert watch.watch([]) == {}
        found = watch.watch([kept, over, forgotten], over=[over])
        assert [_pids(found[inode]) for inode in (kept, over, forgotten)] == [{client.pid}, set(), set()]


# New processes


def test_who_has_inherited_a_connection_is_told_without_being_asked_and_once(
    listener: socket.socket, puppet: Puppets
) -> None:
    client = puppet()
    outlive_a_tick()
    watch = HolderWatch(ProcessBook())
    with ExitStack() as accepted:
        inodes = _connections(client, listener, accepted, "cdef")
        opened = dict.fromkeys(inodes, _now())
        watch.find(opened)
        watch.watch([], keep=opened)
        child = client.do("fork(d.close)")
        assert watch.has_news()
        told = watch.watch([])
        assert told.keys() == opened.keys() - {inodes[1]}
        assert all(_pids(holders) == {client.pid, child} for holders in told.values())
        assert watch.watch([]) == {}
        client.do(f"release({child})")
        assert _pids(watch.watch(inodes)[inodes[0]]) == {client.pid}


def test_a_new_process_is_looked_at_when_it_is_past_its_exec_and_has_had_what_it_has_since_its_fork(
    listener: socket.socket, puppet: Puppets, readings: Readings
) -> None:
    client = puppet()
    outlive_a_tick()
    watch = HolderWatch(ProcessBook())
    with client.connect(listener):
        inode, opened = client.do(INODE.format("c")), _now()
        watch.find({inode: opened})
        watch.watch([], keep={inode: opened})
        outlive_a_tick()
        began = time.monotonic()
        child = client.do("fork()")
        assert watch.watch([], age=60.0) == {}
        assert child not in readings.pids
        assert watch.has_news()
        while not (told := watch.watch([], age=LASTING)):
            time.sleep(0.01)
        assert time.monotonic() - began >= LASTING
        assert readings.pids.count(child) == 1
        assert child in {process.pid for process in told[inode].lasting(LASTING)}


def test_what_is_done_does_not_depend_on_how_many_connections_there_are(
    listener: socket.socket, puppet: Puppets, readings: Readings, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = puppet()
    outlive_a_tick()
    watch = HolderWatch(ProcessBook())
    with ExitStack() as accepted:
        inodes = _connections(client, listener, accepted, "abcdefghijklmnopqrstuvw")
        opened = dict.fromkeys(inodes, _now())
        watch.find(opened)
        watch.watch([], keep=opened)
        readings.pids.clear()
        monkeypatch.delattr("pgguard.attribution.holders.has_socket")
        for _ in range(20):
            assert watch.watch([], age=LASTING) == {}
        assert client.pid not in readings.pids


def test_heirs_of_whom_the_kernel_could_not_tell_are_found_all_the_same(
    listener: socket.socket, puppet: Puppets, forks: ForkEvents | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There was no room for more events: it says so, and all processes are listed once."""
    client = puppet()
    watch = HolderWatch(ProcessBook())
    with client.connect(listener):
        inode = client.do(INODE.format("c"))
        watch.find({inode: _now()})
        child = client.do("fork()")
        if forks is not None:
            lost: list[tuple[list[Fork], bool]] = [([], True)]
            take = forks.take
            take()
            monkeypatch.setattr(forks, "take", lambda: lost.pop() if lost else take())
        assert _pids(watch.watch([inode])[inode]) == {client.pid, child}
        heir = client.do("fork()")
        assert _pids(watch.watch([inode])[inode]) == {client.pid, child, heir}


@pytest.mark.parametrize("forks", ["told"], indirect=True)
def test_processes_are_listed_from_the_moment_on_at_which_the_kernel_is_found_to_have_fallen_silent(
    listener: socket.socket,
    puppet: Puppets,
    forks: ForkEvents | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert forks is not None
    client = puppet()
    watch = HolderWatch(ProcessBook())
    with client.connect(listener):
        inode, opened = client.do(INODE.format("c")), _now()
        watch.find({inode: opened})
        watch.watch([], keep={inode: opened})
        child = client.do("fork()")
        time.sleep(1.1)
        forks.take()
        nothing: tuple[list[Fork], bool] = ([], False)
        monkeypatch.setattr(forks, "take", lambda: nothing)
        monkeypatch.setattr(forks, "are_there", lambda: False)
        assert _pids(watch.watch([inode])[inode]) == {client.pid}
        assert not watch.has_news()
        clock = time.monotonic
        monkeypatch.setattr(time, "monotonic", lambda: clock() + 60)
        assert watch.has_news()
        with caplog.at_level(logging.WARNING):
            assert _pids(watch.watch([inode])[inode]) == {client.pid, child}
        assert "the kernel does not tell of new processes any more" in caplog.text
        heir = client.do("fork()")
        assert watch.has_news()
        assert _pids(watch.watch([inode])[inode]) == {client.pid, child, heir}
