"""What the proxy asks about its clients: who opened a connection, who has it open, who sent on it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pgguard.attribution.attention import Attention, attention
from pgguard.attribution.descriptors import find_sockets, is_fork, list_children
from pgguard.attribution.drivers import driver_of
from pgguard.attribution.evidence import Driver, Evidence, Process
from pgguard.attribution.fates import Fate, fate_of
from pgguard.attribution.findings import Findings
from pgguard.attribution.forks import ForkEvents
from pgguard.attribution.frames import Frame
from pgguard.attribution.holders import NOBODY, Holders, HolderWatch, is_older, is_younger, sole_holder
from pgguard.attribution.images import read_image
from pgguard.attribution.namespaces import NetworkNamespaces
from pgguard.attribution.processes import ProcessBook, read_stat
from pgguard.attribution.ruby.pipes import RubyPipes
from pgguard.attribution.runtime import Runtime, runtime_of
from pgguard.attribution.sampling import Sample, sample_sender
from pgguard.attribution.sockets import ClientSocket
from pgguard.attribution.stacks import StackReader, Wanted
from pgguard.attribution.threads import (
    Sleep,
    Thread,
    Waiting,
    Waits,
    all_asleep,
    find_sleep,
    has_one_thread,
    only_thread,
    restless_threads,
    sleeps_of,
    system_call,
    waiting_threads,
)
from pgguard.attribution.vigil import Vigil

_CLIENTS = 1024
"""Processes of which it is remembered what they run."""
_WATCHING = 0.002
"""Seconds after which a thread waits on purpose that no answer is due to: one that was to get the last has got it."""
_COMING = 0.03
"""Seconds for which a thread is given to come from its send to its wait."""
_PAUSE = 0.0005
"""Seconds between two looks at what threads do."""


@dataclass(slots=True, eq=False)
class Opening:
    """What was found out about a connection's client when it connected; all but ``holders`` is left as it is."""

    client: ClientSocket
    inode: int | None
    """The inode of the client's socket; ``None`` if the client is on another host, or sock_diag doesn't tell."""
    opener: Process | None
    evidence: Evidence
    """How ``opener`` is known: UNKNOWN if and only if it is ``None``."""
    holders: Holders
    """Who had the socket open when it was looked for; empty if nobody was found, or when that has been taken note of:
    it takes 160 bytes."""
    driver: Driver
    """The opener's, by what it runs: :func:`pgguard.attribution.drivers.tell_driver` knows more."""
    runtime: Runtime
    """What the opener ran when it connected."""

    @property
    def connected(self) -> tuple[int, int | None] | None:
        """The process and the thread that connected, as the kernel named them, even if they are gone."""
        return self.client.connected


class Witness:
    """Attribution for one guard. Thread-safe; made before the guard accepts its first connection.

    Args:
        ruby: asks Ruby processes what their threads do; ``None``: they aren't asked.
        forks: tells of new processes; ``None``: they are looked for. Not closed here.

    Its methods read ``/proc`` and ask the kernel: they never wait for a client, but may take milliseconds, and so
    are for worker threads. They raise nothing for what can't be found out.
    """

    def __init__(self, ruby: RubyPipes | None = None, forks: ForkEvents | None = None) -> None:
        self._ruby = ruby
        self._book = ProcessBook()
        self._vigil = Vigil()
        self._watch = HolderWatch(self._book, forks)
        self._namespaces = NetworkNamespaces()
        self._lock = threading.Lock()
        self._clients: OrderedDict[tuple[int, int], tuple[Driver, Runtime]] = OrderedDict()

    def opened(self, client: ClientSocket) -> Opening:
        """Find out who opened one connection; see :meth:`opened_many`."""
        return self.opened_many([client])[0]

    def opened_many(self, clients: Sequence[ClientSocket]) -> list[Opening]:
        """Find out who opened connections that have just been accepted; in the order of ``clients``.

        The sooner this is called, the surer it tells: within five seconds it looks only where openers can be. For
        all of them together it costs one walk through ``/proc``, and most often much less.

        The opener is, in this order,

        - who the kernel says has connected it: of Unix sockets always, over TCP through the probe (KERNEL_SENDER);
        - the only process that has the socket open, unless it is younger than the connection (SOLE_HOLDER);
        - of several, the only one that is older than the connection, as the others must have inherited it
          (SOCKET_HOLDER);
        - nobody (UNKNOWN).

        Where the kernel has named a process that can't be looked at any more, the opener is nobody, and none of those
        that have the socket open: its pid stands in :attr:`Opening.connected`.
        """
        named = {client.connected_by for client in clients if client.connected_by is not None}
        processes = {pid: self._book.look(pid) for pid in named}
        connected_by = [_connected_by(client, processes) for client in clients]
        inodes = self._namespaces.client_inodes(clients)
        holders = self._watch.find(
            {inode: client.opened for client, inode in zip(clients, inodes, strict=True) if inode is not None},
            likely={process.pid for process in connected_by if process is not None},
            openers=None not in connected_by,
        )
        return [
            self._opening(client, inode, process, holders.get(inode, NOBODY) if inode is not None else NOBODY)
            for client, inode, process in zip(clients, inodes, connected_by, strict=True)
        ]

    def sender(self, pid: int) -> Process | None:
        """Look at a process that the kernel has just named as a sender, and remember it; ``None`` if it is gone.

        To be called when a pid first sends on a connection, and its answer kept with that connection: later on the
        process may be gone and its pid another's. If it may be so already, as the guard has slept meanwhile, that is
        ``None`` too: see :mod:`pgguard.attribution.vigil`.
        """
        process = self._book.look(pid)
        return process if process is not None and self._vigil.saw_begin(process.started) else None

    def stay_awake(self) -> None:
        """Take note that the guard is awake; to be called every :data:`pgguard.attribution.vigil.BEAT` seconds."""
        self._vigil.beat()

    def holding(self, client: ClientSocket, pids: Iterable[int], *, since: float | None = None) -> tuple[Process, ...]:
        """Tell which of some processes have a client's socket open at this moment.

        It doesn't matter how many others there are: it takes some 50 µs, and as much for each process.

        Args:
            client: whose socket it is.
            pids: the processes.
            since: where many ask at once, from when on what was seen holds for this question too, in seconds of
                time.monotonic().
        """
        [inode] = self._namespaces.client_inodes([client])
        if inode is None:
            return ()
        if since is not None:
            return self._watch.holding(inode, client.opened, pids, since)
        found = []
        for pid in dict.fromkeys(pids):
            with contextlib.suppress(PermissionError):
                process = self._book.look(pid) if find_sockets(pid, {inode}) else None
                if process is not None:
                    found.append(process)
        return tuple(found)

    def still_holding(self, opening: Opening) -> tuple[Process, ...]:
        """Those that were seen to have a connection open, as they were then, and certainly have it open still.

        See :meth:`HolderWatch.confirmed`.
        """
        return () if opening.inode is None else self._watch.confirmed(opening.inode)

    def have_opened(self, processes: Iterable[Process]) -> frozenset[int]:
        """Which of these processes have opened connections, by their pids, as far as that was found out."""
        with self._lock:
            return frozenset(process.pid for process in processes if (process.pid, process.started) in self._clients)

    def holders(self, opening: Opening) -> Holders:
        """Find out, by looking at every process, who has a connection's client socket open now.

        For about 50 µs a process on the machine it also finds who was handed the socket instead of inheriting it.
        """
        if opening.inode is None:
            return NOBODY
        return self._watch.walk({opening.inode: opening.client.opened})[opening.inode]

    def has_news(self) -> bool:
        """Whether :meth:`watch` may find a new holder: see :meth:`HolderWatch.has_news`. For any thread."""
        return self._watch.has_news()

    def watch(
        self,
        inodes: Iterable[int],
        *,
        keep: Mapping[int, float] | None = None,
        over: Iterable[int] = (),
        age: float = 0.0,
    ) -> dict[int, Holders]:
        """Find out who has become, and who still is, a holder of the sockets of live connections, by inode.

        See :meth:`HolderWatch.watch`. A connection that isn't kept is forgotten half a minute after it has last been
        asked about, and after that its holders are unknown here.
        """
        return self._watch.watch(inodes, keep=keep, over=over, age=age)

    def findings(self, opening: Opening, senders: Iterable[Process] = (), *, since: float | None = None) -> Findings:
        """Gather what is known about a connection's client now.

        Args:
            opening: what :meth:`opened` said about the connection.
            senders: what :meth:`sender` said about the processes that the kernel has named on it.
            since: as for :meth:`holding`.

        A process that is still there is described as it is now, one that is gone as it was last seen.
        """
        found = self._holders(opening, since)
        return Findings(
            opener=None if opening.opener is None else self._book.refresh(opening.opener),
            opener_evidence=opening.evidence,
            connected=opening.connected,
            holders=found.processes or None,
            holders_complete=found.complete,
            senders={process.pid: self._book.refresh(process) for process in senders},
            driver=opening.driver,
        )

    def sample(
        self,
        opening: Opening,
        holders: Collection[Process],
        *,
        before: frozenset[Sleep],
        busy: Iterable[tuple[int, int | None]],
        watchers: Collection[Thread],
        seconds: float,
    ) -> tuple[Sample, tuple[Waiting, ...]]:
        """Find out which thread has sent what has just come, and which are blocked reading at the same moment.

        See :func:`sample_sender` for the first, and :attr:`Sample.blocked` for the second.
        """
        if opening.inode is None:
            return Sample(None, None, Waits()), ()
        sample = sample_sender(holders, opening.inode, before=before, busy=busy, watchers=watchers, seconds=seconds)
        return sample, sample.blocked

    def waits(
        self, opening: Opening, processes: Collection[Process], *, enough: Callable[[Waits], bool], seconds: float
    ) -> Waits:
        """See which threads of ``processes`` are blocked on the connection.

        A client is often seen between its send and its wait: it is looked again until that is ``enough``, for
        ``seconds`` at most.
        """
        if opening.inode is None:
            return Waits()
        deadline = time.monotonic() + seconds
        while True:
            waits = waiting_threads(processes, opening.inode)
            if enough(waits) or time.monotonic() >= deadline:
                return waits
            time.sleep(_PAUSE)

    def look(self, opening: Opening, processes: Collection[Process]) -> tuple[Waits, tuple[Waiting, ...]]:
        """See which threads wait on the connection, and which of them are blocked reading it at the same moment.

        Takes 20 µs a thread of the processes, and 100 µs more for each that does.
        """
        if opening.inode is None:
            return Waits(), ()
        sample = Sample(None, None, waiting_threads(processes, opening.inode))
        return sample.waits, sample.blocked

    def unread(self, looks: Sequence[tuple[Opening, Sequence[Process]]]) -> list[int | None]:
        """See how many bytes lie unread in the clients' sockets; see :meth:`NetworkNamespaces.unread`.

        Args:
            looks: connections, and processes that have them open.
        """
        found: list[int | None] = [None] * len(looks)
        known = [(n, opening, opening.inode, pids) for n, (opening, pids) in enumerate(looks)]
        asked = [(n, opening.client, inode, pids) for n, opening, inode, pids in known if inode is not None]
        unread = self._namespaces.unread(
            [(client, inode, [process.pid for process in processes]) for _, client, inode, processes in asked]
        )
        for (n, *_), size in zip(asked, unread, strict=True):
            found[n] = size
        return found

    @staticmethod
    def attention(opening: Opening, processes: Collection[Process]) -> Attention:
        """See whether any of the processes that have a connection open is about to read from it."""
        return Attention.UNKNOWN if opening.inode is None else attention(processes, opening.inode)

    @staticmethod
    def sleeps(process: Process) -> frozenset[Sleep]:
        """See which sleeps the threads of a process are in: see :func:`sleeps_of`."""
        return sleeps_of(process)

    @staticmethod
    def restless(process: Process, sleeps: Collection[Sleep]) -> Mapping[int, Sleep | None]:
        """See which threads of a process have run since it was in these sleeps: see :func:`restless_threads`."""
        return restless_threads(process, sleeps)

    @staticmethod
    def has_one_thread(process: Process) -> bool:
        """Whether a process has a single thread at this moment. Takes 10 µs."""
        return has_one_thread(process)

    def has_closed(self, opening: Opening) -> bool:
        """Whether the opener, which had the connection open, hasn't any more. Takes 10 µs, whoever else has it."""
        opener = opening.opener
        return opener is not None and opening.inode is not None and self._watch.has_let_go(opening.inode, opener)

    def watchers(self, opening: Opening, processes: Collection[Process]) -> frozenset[Thread]:
        """See which threads wait on the connection and go on doing so, to be called while no answer is due.

        Takes 2 ms where there is something to see.
        """
        first, _ = self.look(opening, processes)
        if not first.threads:
            return frozenset()
        time.sleep(_WATCHING)
        again, _ = self.look(opening, processes)
        return frozenset(one.thread for one in first.threads) & frozenset(one.thread for one in again.threads)

    def stays(self, opening: Opening, *, seconds: float) -> bool:
        """Whether the opener, when somebody has just said Terminate, goes on to have the socket open.

        A client with libpq closes its socket as soon as it has said Terminate (``closePGconn()`` in
        ``fe-connect.c``). So if all its threads sleep and the socket is open still, it wasn't the opener that said it.
        Others, asyncpg for one, wait in their event loop for the server to close; whoever does that may have said it:
        this is to be asked of libpq's connections alone.
        """
        opener = opening.opener
        if opener is None or opening.inode is None:
            return False
        deadline = time.monotonic() + seconds
        while True:
            asleep = all_asleep(opener)
            # It is looked at again who has it open: a process that has closed it meanwhile sleeps as well.
            if all(holder.pid != opener.pid for holder in self._holders(opening).processes):
                return False
            if asleep:
                waits = waiting_threads([opener], opening.inode)
                return waits.complete and not any(one.others for one in waits.threads)
            if time.monotonic() >= deadline:
                return False
            time.sleep(_PAUSE)

    def heirs_of(self, opening: Opening) -> tuple[Process, ...]:
        """The opener's children that have once had the connection open, as their fork took it along.

        Those are all that it has forked since, but for what has executed a program, which closes libpq's sockets.
        """
        opener = opening.opener
        if opener is None:
            return ()
        children = [self._book.look(pid) for pid in list_children(opener.pid)]
        return tuple(
            child
            for child in children
            if child is not None
            and not is_older(child.started, opening.client.opened)
            and is_fork(child.pid, opener.pid)
        )

    @property
    def asks_ruby(self) -> bool:
        """Whether Ruby processes are asked what their threads do."""
        return self._ruby is not None

    def can_ask(self, process: Process) -> bool:
        """Whether that Ruby process can be asked."""
        return self._ruby is not None and self._ruby.can_ask(process)

    def stack_reader(self, opening: Opening, account: Callable[[float], None]) -> StackReader:
        """Get ready to find out what the threads do that use a connection: see :class:`StackReader`."""
        return StackReader(opening.inode, account, self._ruby)

    def opening_stack(
        self, opening: Opening, *, until: float, account: Callable[[float], None]
    ) -> tuple[Frame, ...] | None:
        """Find out what a thread does that is just opening a connection, the innermost call first.

        To be called while the client waits for the answer to its start-up packet. ``None`` unless exactly one thread of
        the opener waits for that, and for nothing else: of an event loop it isn't known for whom it waits.

        Args:
            opening: the connection.
            until: when to end in any case, in seconds of time.monotonic().
            account: is told how much of a processor's time it has taken.
        """
        opener, inode = opening.opener, opening.inode
        if opener is None or inode is None:
            return None
        deadline = min(until, time.monotonic() + _COMING)
        while not (waiting := waiting_threads([opener], inode).threads):
            if time.monotonic() >= deadline:
                return None
            time.sleep(_PAUSE)
        sleep, tid = waiting[0].sleep, waiting[0].thread.tid
        if len(waiting) > 1 or waiting[0].others or not waiting[0].readable:
            return None
        if opening.connected is not None and opening.connected[1] not in {None, tid}:
            return None
        with StackReader(inode, account, self._ruby) as reader:
            for _ in reader.read([Wanted(opener, {tid: sleep})], until=until, returning=until):
                pass
            found = reader.found
        again = found.again.get((opener.pid, tid))
        return found.frames.get(sleep if again is None else again.sleep)

    @staticmethod
    def thread_name(pid: int, tid: int) -> str | None:
        """What a thread is called, or ``None`` if it is gone; it is not made sure that it is still the same one."""
        try:
            return Path(f"/proc/{pid}/task/{tid}/comm").read_text(errors="replace").rstrip("\n")
        except OSError:
            return None

    @staticmethod
    def sleeps_by_thread(threads: Iterable[tuple[Process, int]]) -> Mapping[tuple[int, int], Sleep]:
        """By pid and tid, the sleep of those threads that sleep."""
        sleeps = (((one.pid, tid), find_sleep(one.pid, one.started, tid)) for one, tid in threads)
        return {key: sleep for key, sleep in sleeps if sleep is not None}

    @staticmethod
    def system_calls(sleeps: Iterable[Sleep]) -> Mapping[Sleep, str]:
        """The system calls that threads are blocked in, whatever they wait for, where they can be told."""
        calls = ((sleep, system_call(sleep)) for sleep in sleeps)
        return {sleep: call for sleep, call in calls if call is not None}

    def only_threads(self, processes: Iterable[Process]) -> Mapping[int, Sleep]:
        """By pid, the sleep of the only thread of those processes that have no other."""
        sleeps = ((process.pid, only_thread(process)) for process in processes)
        return {pid: sleep for pid, sleep in sleeps if sleep is not None}

    def runtimes(self, processes: Iterable[Process]) -> Mapping[int, Runtime]:
        """By pid, what processes run: as it is now, since many servers say so in a title that they set late."""
        found = {}
        for process in processes:
            runtime = runtime_of(process.pid)
            now = self._book.look(process.pid)
            if now is not None and now.started == process.started:
                found[process.pid] = runtime
        return found

    def fate(self, opening: Opening, pid: int, process: Process | None, *, seconds: float) -> Fate | None:
        """Find out what has become of a process whose connection has just ended: see :func:`fate_of`.

        Args:
            opening: the connection.
            pid: the process.
            process: the same, as far as it was looked at.
            seconds: how long to wait for it to end.
        """
        started = None if process is None else process.started
        opened = opening.client.opened if opening.connected is not None and opening.connected[0] == pid else None
        return fate_of(pid, started, opening.inode, opened=opened, seconds=seconds)

    def has_lost_opener(self, opening: Opening, holders: Collection[Process]) -> bool:
        """Whether the process that opened a connection has certainly ended, known from ``holders`` not to be there.

        Of one that nobody has had the time to look at it is enough that the kernel has named it.
        """
        opener, connected = opening.opener, opening.connected
        if opener is not None:
            return all(process.pid != opener.pid for process in holders) and self.is_gone(opener)
        if connected is None:
            return False
        try:
            stat = read_stat(connected[0])
        except PermissionError:
            return False
        return stat is None or stat.holds_no_files or is_younger(stat.started, opening.client.opened)

    @staticmethod
    def is_gone(process: Process) -> bool:
        """Whether a process has certainly ended, as a zombie has."""
        try:
            stat = read_stat(process.pid)
        except PermissionError:
            return False
        return stat is None or stat.started != process.started or stat.holds_no_files

    def _holders(self, opening: Opening, since: float | None = None) -> Holders:
        if opening.inode is None:
            return NOBODY
        return self._watch.find({opening.inode: opening.client.opened}, since=since)[opening.inode]

    def _opening(
        self, client: ClientSocket, inode: int | None, connected_by: Process | None, holders: Holders
    ) -> Opening:
        opener, evidence = _opener(client, connected_by, holders)
        # A fork runs what it was forked from.
        like = opener or (holders.processes[0] if client.connected is not None and holders.holdings else None)
        driver, runtime = (Driver.UNKNOWN, Runtime()) if like is None else self._client(like)
        return Opening(client, inode, opener, evidence, holders, driver, runtime)

    def _client(self, process: Process) -> tuple[Driver, Runtime]:
        """What runs in a process that has just opened a connection; looked for once in each process."""
        key = (process.pid, process.started)
        with self._lock:
            known = self._clients.get(key)
        if known is not None:
            return known
        image = read_image(process.pid)
        found = (Driver.UNKNOWN, Runtime()) if image is None else (driver_of(image), runtime_of(image))
        now = self._book.look(process.pid)
        if now is None or now.started != process.started:
            return Driver.UNKNOWN, Runtime()
        with self._lock:
            self._clients[key] = found
            if len(self._clients) > _CLIENTS:
                self._clients.popitem(last=False)
        return found


def _connected_by(client: ClientSocket, processes: Mapping[int, Process | None]) -> Process | None:
    """The process that has connected a socket, of those that have the pids now that the kernel has named."""
    process = None if client.connected_by is None else processes.get(client.connected_by)
    # If it is younger than the connection, who connected is gone and the pid is another's.
    if process is None or is_younger(process.started, client.opened):
        return None
    return process


def _opener(client: ClientSocket, connected_by: Process | None, holders: Holders) -> tuple[Process | None, Evidence]:
    if connected_by is not None:
        return connected_by, Evidence.KERNEL_SENDER
    if client.connected is not None:
        return None, Evidence.UNKNOWN
    if (holder := sole_holder(holders)) is not None:
        if is_younger(holder.started, client.opened):
            return None, Evidence.UNKNOWN  # it has inherited it, from somebody who has let go of it already
        return holder, Evidence.SOLE_HOLDER
    older = [process for process in holders.processes if is_older(process.started, client.opened)]
    if len(older) == 1:
        return older[0], Evidence.SOCKET_HOLDER
    return None, Evidence.UNKNOWN
