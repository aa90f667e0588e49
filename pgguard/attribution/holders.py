"""Which processes have a socket open, and how surely it is all of them.

``/proc/PID/fd`` tells it for one process; reading it for every process takes longer with each process on the
machine. What keeps that rare is how a process comes to have somebody else's connection open at all: it is forked,
after the connection was opened, from a process that has it. Every heir is therefore a process that is *new*,
and a new process has its whole inheritance from the moment on at which it becomes visible. So:

- Whatever is asked, processes that have appeared in the last seconds are looked at, if they can be heirs. A parent
  that has had no connection has none to leave, unless it has adopted the child: an orphan goes to an ancestor of the
  parent that it had, see ``PR_SET_CHILD_SUBREAPER`` in prctl(2); and with ``CLONE_PARENT``, see clone(2), a child is
  its parent's sibling. So a new process can be an heir if its parent has had a connection, or is an ancestor of one
  that has, or is gone, or is new and can be an heir itself; and so can whoever has a parent that can't be looked at.
- Of new processes, and of their parents, the kernel tells: :mod:`pgguard.attribution.forks`. Where it doesn't, all
  processes are listed each time, and of a new one it is read once who its parent is. They are listed too where it has
  told of more than there was room for, and now and then in any case, as it may fall silent.
- The process that opened a connection is searched for once, first among those that opened others.
- From then on, what has been seen is only seen again: one readlink(2) for each holder and connection that is asked
  about. None is as long as its opener is alone with it: that it lets go of it shows in the connection's end, and who
  comes by it in a new process (:meth:`HolderWatch.watch`).

A descriptor can also be handed to an old process, through ``SCM_RIGHTS`` or pidfd_getfd(2). No database driver does
that; :meth:`HolderWatch.walk`, which looks at every process, sees it all the same.

**When are the known holders all of them?** Other users' processes can't be looked at without privileges, and some
are always there. Were each of them taken for a possible holder, an ordinary user could never be told that a process is
alone with its connection. By the rule above one of them matters only

- if it is a descendant of a holder, and younger than the connection (a child that has changed its user); or
- if every visible holder is younger than the connection, or as old as it, for then they may be heirs: if it is the
  ancestor that they can have inherited from, or a descendant of that one, younger than the connection.

What escapes this is a descendant that has changed its user *and* whose parent has died, so that it is nobody's
descendant any more.

**Many at once.** Who asks says since when what has been seen holds for the question: from now on, or from an earlier
moment, at which what it wants to know about had happened already. So where a thousand connections are asked about at
once, as they are all of one process that has been killed, that process is read once for all of them, and so is every
other if nobody has them open.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from pgguard.attribution.descriptors import find_sockets, has_socket, is_shortage, list_processes
from pgguard.attribution.evidence import Process
from pgguard.attribution.forks import ForkEvents
from pgguard.attribution.processes import TICKS_PER_SECOND, ProcessBook, read_stat

_NEW = 5.0
"""Seconds for which a process counts as new. It must cover the time from when a connection is opened to when it is
first asked about, and that from a process's start to its first connection makes searches short."""

_TURN = 0.02
"""Seconds for which one waits for another that looks for all."""

_KEPT = 30.0
"""Seconds for which a connection is remembered that nobody asks about, and that nobody has said is to be kept."""

LASTING = 0.2
"""Seconds for which a process must have a socket open to count as its heir: a child on its way to exec() has it open
for less. New processes that may be heirs are looked at when they are that old, unless somebody asks before."""

_LISTING = 30.0
"""Seconds after which all processes are listed in any case."""
_UNLISTED = 4096
"""New processes that the kernel has told of after which they are as well, as many may be gone by then."""
_SILENCE = 1.0
"""Seconds after which the kernel should have told of a new process."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Holding:
    """A process that has the socket open."""

    process: Process
    since: float
    """When it was first seen to have it open, never to be seen without it since; or, if it is younger than the
    connection, and so has inherited it, when it was first known to be there. Seconds of time.monotonic()."""
    seen: float
    """When it was last seen to have it open.

    A child between its fork and its exec has every socket of its parent open for a moment, close-on-exec or not.
    Only who has had it for some time is there to stay.
    """


@dataclass(frozen=True, slots=True)
class Holders:
    """The processes that have a socket open, the first seen first."""

    holdings: tuple[Holding, ...] = ()
    complete: bool = False
    """No other process has it open; see the head of this module for what that rests on. Never true of none."""

    @property
    def processes(self) -> tuple[Process, ...]:
        """Who has it open, passing children included."""
        return tuple(holding.process for holding in self.holdings)

    def lasting(self, seconds: float) -> tuple[Process, ...]:
        """Who has had it open for at least ``seconds``."""
        return tuple(holding.process for holding in self.holdings if holding.seen - holding.since >= seconds)


NOBODY = Holders()
"""Nobody is known to have it open."""


def sole_holder(holders: Holders) -> Process | None:
    """The process that certainly is the only one to have the socket open; ``None`` if there is no such."""
    return holders.processes[0] if holders.complete and len(holders.holdings) == 1 else None


def is_older(started: int, opened: float) -> bool:
    """True if a process is certainly older than a connection, so that it can't have inherited it.

    Start times are known to the tick, 10 ms; of a process that started in the same one it isn't certain.

    Args:
        started: as in :class:`Process`.
        opened: when the connection was opened, in seconds of CLOCK_BOOTTIME.
    """
    return started < int(opened * TICKS_PER_SECOND)


def is_younger(started: int, opened: float) -> bool:
    """True if a process is certainly younger than a connection, so that it can't have opened it; see above."""
    return started > opened * TICKS_PER_SECOND


@dataclass(slots=True, eq=False)
class _Seen:
    """A process that is there, or was lately; another one that has its pid has another object."""

    entry: int | None
    """The inode of ``/proc/PID``: another one when the pid has been reused. ``None``: it hasn't been listed yet."""
    at: float
    """When it was forked, or first listed: seconds of time.monotonic(); long ago for those that were there at the
    start."""
    read: float = -math.inf
    """When a reading of its descriptors began that looked for every connection known by then."""


class _Newcomers:
    """The processes that are new, by their parents."""

    def __init__(self) -> None:
        self._children: dict[int, list[int]] = {}
        self._came: deque[tuple[float, int, int]] = deque()
        """When each was heard of, its pid and its parent's; the first first."""

    def add(self, pid: int, parent: int, now: float) -> None:
        """Take note of one."""
        self._children.setdefault(parent, []).append(pid)
        self._came.append((now, pid, parent))

    def forget(self, before: float) -> None:
        """Forget those that were heard of before a moment."""
        while self._came and self._came[0][0] < before:
            _, pid, parent = self._came.popleft()
            siblings = self._children[parent]
            siblings.remove(pid)
            if not siblings:
                del self._children[parent]

    def descendants(self, is_ancestor: Callable[[int], bool]) -> list[int]:
        """Those among whose ancestors there is a certain one, the elder first."""
        found: dict[int, None] = {}
        parents = [parent for parent in self._children if is_ancestor(parent)]
        for parent in parents:
            for pid in self._children.get(parent, ()):
                if pid not in found:
                    found[pid] = None
                    parents.append(pid)
        return list(found)


class _Unreadable(NamedTuple):
    """A process whose descriptors can't be looked at."""

    started: int | None
    """As in :class:`Process`; ``None`` if even that is hidden."""
    lineage: frozenset[int]
    """Its pid and those of its ancestors, as they were when it was first seen."""

    def may_be_heir(self, holders: Collection[int], opened: float) -> bool:
        """True if it may have inherited, from one of ``holders``, a connection opened at ``opened``."""
        if self.started is None:
            return True
        return not is_older(self.started, opened) and not self.lineage.isdisjoint(holders)


class _Hold(NamedTuple):
    """One descriptor of one process."""

    process: Process
    of: _Seen
    fd: int
    since: float
    seen: float
    """As in :class:`Holding`, when the reading began that has shown it."""


@dataclass(slots=True)
class _Connection:
    """What is known about one socket; times are those of time.monotonic()."""

    opened: float
    """In seconds of CLOCK_BOOTTIME."""
    known: float
    """When it was first asked about."""
    kept: bool = False
    """It is remembered until it is over."""
    searched: bool = False
    """Its opener has been searched for: until then, heirs may be all that is known."""
    walked: float = -math.inf
    """When a walk through all processes began that looked for it."""
    holders: tuple[int, ...] = ()
    """The pids of those that hold it: see :attr:`HolderWatch._held`."""


class HolderWatch:
    """Finds, and keeps an eye on, the processes that have sockets open.

    One for a guard, made before it accepts its first connection: processes that are there already when it is made
    can't have inherited one. Thread-safe; threads wait for each other only while one lists the
    processes. The calling process itself is never a holder.

    Without a descriptor left, nobody new is found; whether those that are known have a socket open still is seen all
    the same, as readlink(2) and stat(2) take none.

    Args:
        book: remembers processes.
        forks: tells of new processes, and is closed by whoever has opened it; ``None``: they are listed.
    """

    def __init__(self, book: ProcessBook, forks: ForkEvents | None = None) -> None:
        self._book = book
        self._forks = forks
        self._lock = threading.Lock()
        self._seen: dict[int, _Seen] = {}
        self._unreadable: dict[int, _Unreadable] = {}
        self._clients: dict[int, frozenset[int]] = {}
        """Processes that have had a connection of ours open, the latest last; with their own pids and those of their
        ancestors when that was first seen."""
        self._kin: Counter[int] = Counter()
        """Those pids and those of the unreadable ones' lineages, and how often each is there."""
        self._newcomers = _Newcomers()
        self._to_look_at = False
        """There are newcomers that :meth:`watch` hasn't looked at."""
        self._connections: dict[int, _Connection] = {}
        self._passing: OrderedDict[int, float] = OrderedDict()
        """Those that aren't kept, and when each was last asked about; the first first."""
        self._connections_now: Mapping[int, object] | None = None
        """The same, not to be changed, as long as many processes are read; ``None`` if they have changed since."""
        self._latest = -math.inf
        """When the last of the connections became known."""
        self._changed: set[int] = set()
        """Those whose holders are others than when :meth:`watch` was last called."""
        self._held: dict[int, dict[int, _Hold]] = {}
        """By pid, and by the inodes of those of them that a process holds: there are fewer such processes than
        connections, of which most have one holder, and a dict of its own would take 224 bytes."""
        self._missed: set[int] = set()
        """The pids of those that couldn't be looked at for want of descriptors."""
        self._hidden = False
        """Other users' processes aren't even listed: ``hidepid``, see proc(5); or none is, as no descriptor is left."""
        self._listed = -math.inf
        """When the processes were last listed."""
        self._unlisted = 0
        """New processes that the kernel has told of since."""
        self._updated = -math.inf
        """Since when all that had come by then are known."""
        self._crowd = threading.Lock()
        """Held by the one of several that looks for all of them."""
        self._list(told=False)
        self._newcomers = _Newcomers()
        for pid, seen in list(self._seen.items()):
            seen.at = -math.inf
            self._read(pid, ())

    def find(
        self,
        opened: Mapping[int, float],
        likely: Collection[int] = (),
        *,
        openers: bool = False,
        since: float | None = None,
    ) -> dict[int, Holders]:
        """Find the holders of sockets that have just been connected, in one walk for all.

        Args:
            opened: by each socket's inode, when its connection was opened, in seconds of CLOCK_BOOTTIME.
            likely: pids to look at first.
            openers: each of the connections was certainly opened by one of these.
            since: where many ask at once, from when on what was seen holds for this question too, in seconds of
                time.monotonic(). Without it, everything is looked at again.

        Takes about a millisecond when new processes or known clients opened them all, a walk through all processes
        when not. Returns an entry for each inode, empty when no holder could be found. Asked again about a socket
        that it hasn't forgotten, it looks where :meth:`watch` does, and further only if nobody has it any more.
        """
        if since is not None:
            with self._one_for_all():
                return self._find_for_all(opened, likely, since)
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        self._begin(opened, listing=not openers)
        unsearched = self._unsearched(opened)
        if any(now - opened[inode] > _NEW for inode in unsearched):
            return self.walk(opened)
        looked_at = [*likely, *(self._possible_heirs(likely) if openers else self._new())]
        self._look(opened, looked_at)
        held = {inode for inode, _ in self._holds(opened)}
        missing = {inode: opened[inode] for inode in unsearched | (opened.keys() - held)}
        self._search(missing, skip=looked_at, openers=likely if openers else ())
        return self._report(opened)

    def has_news(self) -> bool:
        """Whether :meth:`watch` may find something new. Takes a microsecond, and waits for nobody."""
        forks = self._forks
        return forks is None or self._to_look_at or forks.are_there() or time.monotonic() - self._listed > _LISTING

    def watch(
        self,
        inodes: Iterable[int],
        *,
        keep: Mapping[int, float] | None = None,
        over: Iterable[int] = (),
        age: float = 0.0,
    ) -> dict[int, Holders]:
        """Look who has inherited a connection, and look again at who holds some of them.

        To be called again and again while :meth:`has_news`. Takes a time that depends on how many processes are new,
        and how many holders the connections have that are asked about, and neither on how many processes there are nor
        on how many connections. A new process is read once, and again when there are new connections: what it has
        inherited, it has from its first moment on.

        Args:
            inodes: the sockets that are asked about. One that isn't known has an empty entry.
            keep: others that are to be watched from now on until they are ``over``, and when their connections were
                opened, in seconds of CLOCK_BOOTTIME.
            over: those of them that are so no more.
            age: seconds after which new processes are looked at: of those that are younger there is still news.

        Returns:
            An entry for each that was asked about or is to be kept, and for each of which somebody has become, or
            ceased to be, a holder since this was last called.
        """
        self._update()
        self._note_asked(keep or {}, time.monotonic(), keep=True)
        self._forget(over)
        self._read_missed()
        now = time.monotonic()
        with self._lock:
            self._to_look_at = False
            self._changed.update(keep or ())
            latest, seen = self._latest, self._seen
        for pid in self._possible_heirs():
            if (one := seen.get(pid)) is not None and one.at + age > now:
                self._to_look_at = True
            else:
                self._read_for_all(pid, latest)
        with self._lock:
            self._newcomers.forget(now - _NEW)
            self._connections_now = None  # until many are read again: most often there is nothing to be seen
        asked = dict.fromkeys(inodes)
        self._look(asked, ())
        with self._lock:
            changed, self._changed = self._changed, set()
            asked |= dict.fromkeys(inode for inode in changed if inode in self._connections)
        return self._report(asked)

    def walk(self, opened: Mapping[int, float]) -> dict[int, Holders]:
        """Find the holders of sockets by looking at every process; arguments and answer are those of :meth:`find`."""
        self._begin(opened, listing=True)
        with self._lock:
            everybody = list(self._seen)
        self._look(opened, everybody)
        self._set_searched(opened)
        return self._report(opened)

    def holding(self, inode: int, opened: float, pids: Iterable[int], since: float) -> tuple[Process, ...]:
        """Tell which of some processes have had a socket open since a moment; arguments as of :meth:`find`."""
        asked = dict.fromkeys(pids)
        with self._one_for_all():
            since = self._note_asked({inode: opened}, since)
            if not asked.keys() <= self._seen.keys():
                self._list()
            for pid in asked:
                self._read_for_all(pid, since)
            return tuple(hold.process for _, hold in self._holds([inode]) if hold.process.pid in asked)

    @contextlib.contextmanager
    def _one_for_all(self) -> Iterator[None]:
        """Let one of several look first, so that the others find what it has seen; but not wait for one that hangs."""
        taken = self._crowd.acquire(timeout=_TURN)
        try:
            yield
        finally:
            if taken:
                self._crowd.release()

    def _find_for_all(self, opened: Mapping[int, float], likely: Iterable[int], since: float) -> dict[int, Holders]:
        """As :meth:`find`; what is read is read for every connection that is known."""
        since = self._note_asked(opened, since)
        if self._updated < since:
            self._update()
        heirs = self._possible_heirs(likely)
        for pid in dict.fromkeys([*likely, *heirs, *(hold.process.pid for _, hold in self._holds(opened))]):
            self._read_for_all(pid, since)
        missing = self._unsearched(opened) | (opened.keys() - {inode for inode, _ in self._holds(opened)})
        if not self._were_walked(missing, since):
            self._walk_for_all(since)
        return self._report(opened, since)

    def _were_walked(self, inodes: Iterable[int], since: float) -> bool:
        with self._lock:
            known = [self._connections.get(inode) for inode in inodes]
        return all(connection is not None and connection.walked >= since for connection in known)

    def _walk_for_all(self, since: float) -> None:
        """Look for every known connection in every process."""
        if self._listed < since:
            self._list()
        with self._lock:
            everybody = dict.fromkeys([*reversed(self._clients), *reversed(self._seen)])
            looked_for = list(self._connections.values())
        began = min((self._read_for_all(pid, since) for pid in everybody), default=since)
        for connection in looked_for:
            connection.walked = began
            connection.searched = True

    def _read_for_all(self, pid: int, since: float) -> float:
        """Look for every known connection among the descriptors of a process, unless that has been done since then.

        Returns:
            When the reading began that has told it.
        """
        began = time.monotonic()
        with self._lock:
            seen = self._seen.get(pid)
            if seen is not None and seen.read >= since:
                return seen.read
            if self._connections_now is None:
                self._connections_now = dict(self._connections)
            wanted = self._connections_now
        self._read(pid, wanted)
        with self._lock:
            if seen is not None and pid not in self._unreadable:
                seen.read = began
        return began

    def has_let_go(self, inode: int, process: Process) -> bool:
        """Whether a process that was seen to have a socket open certainly hasn't any more under that descriptor.

        By the descriptor alone it may have it open still, as another one. Costs one readlink(2).
        """
        with self._lock:
            hold = self._held.get(process.pid, {}).get(inode)
        return hold is not None and hold.process.started == process.started and not self._confirm(inode, hold)

    def confirmed(self, inode: int) -> tuple[Process, ...]:
        """Those that were seen to have a socket open and certainly have it open still; there may be others.

        Costs one readlink(2) each, and no descriptor.
        """
        return tuple(hold.process for _, hold in self._holds([inode]) if self._confirm(inode, hold))

    def _begin(self, opened: Mapping[int, float], *, listing: bool) -> None:
        """Take note of what is asked, and of who has come; and of who has gone, if all are listed."""
        if listing:
            self._list()
        else:
            self._update()
        self._note_asked(opened, time.monotonic())
        self._read_missed()

    def _read_missed(self) -> None:
        """Look again at who couldn't be looked at for want of descriptors."""
        for pid in list(self._missed):
            self._read_for_all(pid, self._latest)

    def _note_asked(self, opened: Mapping[int, float], since: float, *, keep: bool = False) -> float:
        """Take note of what is asked; return since when there can be an answer: when the last of it became known."""
        now = time.monotonic()
        with self._lock:
            for inode, at in opened.items():
                connection = self._connections.get(inode)
                if connection is None:
                    connection = self._connections[inode] = _Connection(at, now)
                    self._connections_now = None
                    self._latest = now
                connection.kept = connection.kept or keep
                if connection.kept:
                    self._passing.pop(inode, None)
                else:
                    self._passing[inode] = now
                    self._passing.move_to_end(inode)
                since = max(since, connection.known)
            while self._passing:
                inode, asked = next(iter(self._passing.items()))
                if now - asked <= _KEPT:
                    break
                self._forget_one(inode)
        return since

    def _forget(self, inodes: Iterable[int]) -> None:
        with self._lock:
            for inode in inodes:
                self._forget_one(inode)

    def _forget_one(self, inode: int) -> None:
        """With the lock."""
        self._passing.pop(inode, None)
        connection = self._connections.pop(inode, None)
        if connection is not None:
            self._connections_now = None
            for pid in connection.holders:
                self._let_go(pid, inode)

    def _possible_heirs(self, clients: Iterable[int] = ()) -> list[int]:
        """Those of new processes that can have inherited a connection; see the head of this module.

        Args:
            clients: processes that have connections, beside those that are known to.
        """
        with self._lock:
            unknown = [pid for pid in clients if pid not in self._kin]
        others = {0, 1, os.getpid()}.union(*map(_known_lineage, unknown))  # who runs a guard may have connections too
        with self._lock:
            return self._newcomers.descendants(lambda pid: pid in self._kin or pid in others)

    def _release(self, pid: int, inode: int) -> None:
        """A process doesn't hold a connection any more that is known. With the lock."""
        connection = self._connections[inode]
        connection.holders = tuple(holder for holder in connection.holders if holder != pid)
        self._let_go(pid, inode)

    def _let_go(self, pid: int, inode: int) -> None:
        """With the lock."""
        held = self._held[pid]
        del held[inode]
        if not held:
            del self._held[pid]

    def _new(self) -> list[int]:
        """All that were listed first in the last seconds."""
        since = time.monotonic() - _NEW
        with self._lock:
            return [pid for pid, seen in self._seen.items() if seen.at > since]

    def _update(self) -> None:
        """Take note of who has come."""
        began = time.monotonic()
        if self._forks is None or began - self._listed > _LISTING:
            self._list()
            return
        with self._lock:
            told = self._take_forks()
            if told and self._unlisted < _UNLISTED:
                self._updated = began
                return
        self._list(told=told)

    def _take_forks(self) -> bool:
        """Take note of those that the kernel has told of; whether that was all. With the lock."""
        if self._forks is None:
            return False
        try:
            forks, lost = self._forks.take()
        except OSError:
            self._do_without_events()
            return False
        now = time.monotonic()
        for pid, parent, at in forks:
            self._drop(pid)
            self._seen[pid] = _Seen(None, at)
            self._newcomers.add(pid, parent, now)
        if forks:
            self._to_look_at = True
        self._unlisted += len(forks)
        if lost:
            # Who has a pid now may be another one than was told.
            for pid in [pid for pid, seen in self._seen.items() if seen.entry is None]:
                self._drop(pid)
        return not lost

    def _do_without_events(self) -> None:
        """List the processes from now on. With the lock."""
        self._forks = None
        logger.warning("the kernel does not tell of new processes any more: the guard lists all of them instead")

    def _list(self, *, told: bool = True) -> None:
        """Take note of who has come and gone, by listing all processes.

        Args:
            told: the kernel has told of all that have come, if it does.
        """
        # Locked while listing: an older list that is compared after a newer one would undo it.
        with self._lock:
            told = self._take_forks() and told
            began = time.monotonic()
            try:
                listed = list_processes()
                self._hidden = 1 not in listed
                self._listed = self._updated = began
                self._unlisted = 0
            except OSError:
                listed = self._without_listing()
                self._hidden = True
                self._listed = -math.inf
            # Who has been listed, and was forked meanwhile, is told of now.
            told = self._take_forks() and told
            listed.pop(os.getpid(), None)
            for pid in [pid for pid, seen in self._seen.items() if pid not in listed and seen.at <= began]:
                self._drop(pid)
            new: list[tuple[int, bool]] = []
            for pid, entry in listed.items():
                seen = self._seen.get(pid)
                if seen is None:
                    new.append((pid, told))
                elif seen.entry is None:
                    seen.entry = entry
                elif seen.entry != entry:
                    self._drop(pid)
                    new.append((pid, False))  # it may be the same process still
            for pid, _ in new:
                self._seen[pid] = _Seen(listed[pid], began)
            for pid, was_told in new:
                self._note_newcomer(pid, began, told=was_told)

    def _note_newcomer(self, pid: int, now: float, *, told: bool) -> None:
        """Take note of a process that was listed for the first time. With the lock.

        Args:
            pid: the process.
            now: when.
            told: the kernel should have told of it, if it does.
        """
        stat = None
        with contextlib.suppress(OSError):
            stat = read_stat(pid)
        parent = 0 if stat is None or stat.ppid not in self._seen else stat.ppid
        self._newcomers.add(pid, parent, now)
        self._to_look_at = True
        if told and stat is not None and self._forks is not None:
            age = time.clock_gettime(time.CLOCK_BOOTTIME) - stat.started / TICKS_PER_SECOND
            if age > _SILENCE:
                self._do_without_events()

    def _without_listing(self) -> dict[int, int]:
        """Those of the processes known that are still there, as :func:`list_processes` lists them."""
        there = {}
        for pid in self._seen:
            with contextlib.suppress(OSError):
                there[pid] = os.stat(f"/proc/{pid}").st_ino  # noqa: PTH116 - as in list_processes()
        return there

    def _drop(self, pid: int) -> None:
        """A process is gone, or its pid is another's. With the lock."""
        self._seen.pop(pid, None)
        self._set_unreadable(pid, None)
        self._lose_kin(self._clients.pop(pid, ()))

    def _set_unreadable(self, pid: int, unreadable: _Unreadable | None) -> None:
        """With the lock."""
        before = self._unreadable.pop(pid, None)
        if before is not None:
            self._lose_kin(before.lineage)
        if unreadable is not None:
            self._unreadable[pid] = unreadable
            self._kin.update(unreadable.lineage)

    def _lose_kin(self, lineage: Iterable[int]) -> None:
        """With the lock."""
        for pid in lineage:
            self._kin[pid] -= 1
            if not self._kin[pid]:
                del self._kin[pid]

    def _look(self, inodes: Iterable[int], pids: Iterable[int]) -> None:
        """Look for the sockets in ``pids``, and see their known holders again.

        Of whoever is known to hold all of them it is only seen whether it does still, by one readlink(2) for each:
        hundreds of children may have inherited as many connections, of which one is asked about.
        """
        wanted = dict.fromkeys(inodes)
        todo = dict.fromkeys(pids)
        kept: dict[int, list[_Hold]] = {}
        for inode, hold in self._holds(wanted):
            if self._confirm(inode, hold):
                kept.setdefault(hold.process.pid, []).append(hold)
            else:
                todo[hold.process.pid] = None
        for pid in todo:
            holds = kept.get(pid)
            if holds is not None and len(holds) == len(wanted):
                self._describe_again(pid, wanted, self._book.refresh(holds[0].process))
            else:
                self._read(pid, wanted)

    def _describe_again(self, pid: int, inodes: Iterable[int], process: Process) -> None:
        """Say what a process that holds sockets is called by now."""
        with self._lock:
            held = self._held.get(pid, {})
            for inode in inodes:
                hold = held.get(inode)
                if hold is not None and hold.process.started == process.started:
                    held[inode] = hold._replace(process=process)

    def _search(self, opened: Mapping[int, float], skip: Collection[int], openers: Collection[int]) -> None:
        """Look at one process after the other until the opener of each connection has turned up.

        Whoever is older than a connection and has it open has opened it, or it is one of those who certainly have,
        however young it is. There is no need to go on then: others are heirs, and so they are new and have been looked
        at.
        """
        found = {
            inode
            for inode, hold in self._holds(opened)
            if hold.process.pid in openers or is_older(hold.process.started, opened[inode])
        }
        wanted = opened.keys() - found
        order: dict[int, None] = {}
        if wanted:
            if self._forks is not None:
                self._list()
            with self._lock:
                order = dict.fromkeys([*reversed(self._clients), *reversed(self._seen)])
        for pid in order:
            if not wanted:
                break
            if pid in skip:
                continue
            for inode, process in self._read(pid, wanted).items():
                if is_older(process.started, opened[inode]):
                    wanted.remove(inode)
        self._set_searched(opened)

    def _unsearched(self, inodes: Iterable[int]) -> set[int]:
        with self._lock:
            return {inode for inode in inodes if not ((known := self._connections.get(inode)) and known.searched)}

    def _set_searched(self, inodes: Iterable[int]) -> None:
        with self._lock:
            for inode in inodes:
                if known := self._connections.get(inode):
                    known.searched = True

    def _read(self, pid: int, wanted: Collection[int]) -> dict[int, Process]:
        """Look for sockets among one process's descriptors, note which it holds and return those."""
        began = time.monotonic()
        try:
            found = find_sockets(pid, wanted)
        except PermissionError:
            found = {}
            self._note_unreadable(pid)
        except OSError as error:
            if not is_shortage(error):
                raise
            # What it was seen to hold it may hold still.
            self._note_unreadable(pid)
            self._missed.add(pid)
            return {}
        else:
            with self._lock:
                self._set_unreadable(pid, None)
        self._missed.discard(pid)
        process = self._book.look(pid) if found else None
        return self._note(pid, process, wanted, found, began)

    def _note(
        self, pid: int, process: Process | None, wanted: Collection[int], found: Mapping[int, int], began: float
    ) -> dict[int, Process]:
        now = time.monotonic()
        noted: dict[int, Process] = {}
        with self._lock:
            seen = self._seen.get(pid)
            if process is None or seen is None:
                found = {}
            for inode in [one for one in self._held.get(pid, ()) if one not in found and one in wanted]:
                self._release(pid, inode)
                self._changed.add(inode)
            for inode, fd in found.items():
                connection = self._connections.get(inode)
                if connection is None or process is None or seen is None:
                    continue
                held = self._held.setdefault(pid, {})
                before = held.get(inode)
                if before is None:
                    connection.holders += (pid,)
                if before is not None and before.process.started == process.started:
                    since = before.since
                else:
                    since = seen.at if is_younger(process.started, connection.opened) else now
                    self._changed.add(inode)
                held[inode] = _Hold(process, seen, fd, since, began)
                noted[inode] = process
        if noted:
            self._note_client(pid)
        return noted

    def _note_client(self, pid: int) -> None:
        """A process has had a connection open."""
        with self._lock:
            lineage = self._clients.pop(pid, None)
            if lineage is not None:
                self._clients[pid] = lineage
        if lineage is None:
            lineage = _known_lineage(pid)
            with self._lock:
                if pid in self._seen and pid not in self._clients:
                    self._clients[pid] = lineage
                    self._kin.update(lineage)

    def _note_unreadable(self, pid: int) -> None:
        try:
            stat = read_stat(pid)
            unreadable = _Unreadable(None if stat is None else stat.started, _lineage(pid))
        except OSError:
            unreadable = _Unreadable(None, frozenset())
        with self._lock:
            # What it descends from is best known when it is first seen: later on its parent may be gone.
            if pid in self._seen and pid not in self._unreadable:
                self._set_unreadable(pid, unreadable)

    def _holds(self, inodes: Iterable[int]) -> list[tuple[int, _Hold]]:
        with self._lock:
            return [
                (inode, self._held[pid][inode])
                for inode in inodes
                if (connection := self._connections.get(inode))
                for pid in connection.holders
            ]

    def _confirm(self, inode: int, hold: _Hold) -> bool:
        """See whether a process has the socket open at this very moment, by the descriptor it is known to have."""
        pid = hold.process.pid
        with self._lock:
            seen = self._seen.get(pid)
        return seen is hold.of and has_socket(pid, hold.fd, inode)

    def _report(self, inodes: Iterable[int], since: float = math.inf) -> dict[int, Holders]:
        holds: dict[int, list[_Hold]] = {inode: [] for inode in inodes}
        for inode, hold in self._holds(holds):
            holds[inode].append(hold)
        for inode, several in holds.items():
            # Looking took a while, in which the first may have closed what the last has just been seen with.
            if len(several) > 1:
                holds[inode] = [hold for hold in several if hold.seen >= since or self._confirm(inode, hold)]
        now = time.monotonic()
        with self._lock:
            opened = {
                inode: known.opened for inode in holds if (known := self._connections.get(inode)) and known.searched
            }
            unreadable = None if self._hidden else dict(self._unreadable)
        return {
            inode: Holders(
                tuple(
                    Holding(hold.process, hold.since, now)
                    for hold in sorted(some, key=lambda hold: (hold.since, hold.process.started))
                ),
                complete=bool(some)
                and inode in opened
                and unreadable is not None
                and _are_all([hold.process for hold in some], opened[inode], unreadable),
            )
            for inode, some in holds.items()
        }


def _are_all(holders: Collection[Process], opened: float, unreadable: Mapping[int, _Unreadable]) -> bool:
    """True if none of the unreadable processes can hold what these do: see the head of this module."""
    if not unreadable:
        return True
    family = {process.pid for process in holders}
    if not any(is_older(process.started, opened) for process in holders):
        elders = {_elder(process.pid, opened) for process in holders}
        # Process 1 adopts orphans, so whom these have inherited from can't be told.
        if not elders.isdisjoint(unreadable) or not elders.isdisjoint((None, 1)):
            return False
        family.update(elder for elder in elders if elder is not None)
    return not any(
        process.may_be_heir(family, opened) and not _is_gone(pid, process.started)
        for pid, process in unreadable.items()
    )


def _is_gone(pid: int, started: int | None) -> bool:
    """Whether a process has certainly ended, or holds no files any more."""
    with contextlib.suppress(OSError):
        stat = read_stat(pid)
        return stat is None or stat.holds_no_files or started not in {None, stat.started}
    return False


def _elder(pid: int, opened: float) -> int | None:
    """Return the nearest ancestor that is older than the connection; ``None`` if that can't be told."""
    with contextlib.suppress(OSError):
        stat = read_stat(pid)
        while stat is not None and stat.ppid:
            pid = stat.ppid
            stat = read_stat(pid)
            if stat is not None and is_older(stat.started, opened):
                return pid
    return None


def _ancestry(pid: int) -> Iterator[int]:
    """Yield a process's pid and those of its ancestors, the nearest first. Raises OSError where one can't be told."""
    seen: set[int] = set()
    while pid and pid not in seen:
        yield pid
        seen.add(pid)
        stat = read_stat(pid)
        pid = 0 if stat is None else stat.ppid


def _lineage(pid: int) -> frozenset[int]:
    """Return a process's pid and those of its ancestors. Raises OSError."""
    return frozenset(_ancestry(pid))


def _known_lineage(pid: int) -> frozenset[int]:
    """Return a process's pid and those of its ancestors, as far as they can be told."""
    lineage: set[int] = set()
    with contextlib.suppress(OSError):
        lineage.update(_ancestry(pid))
    return frozenset(lineage)
