"""Which processes have a socket open, and how surely it is all of them.

``/proc/PID/fd`` tells it for one process; reading it for every process takes longer with each process on the
machine. What keeps that rare is how a process comes to have somebody else's connection open at all: it is forked,
after the connection was opened, from a process that has it. Every heir is therefore a process that is *new*,
and a new process has its whole inheritance from the moment on at which it becomes visible. So:

- Whatever is asked, processes that have appeared in the last seconds are looked at, if they can be heirs: of a process
  it is read once who its parent is. A parent that has had no connection has none to leave, unless it has adopted the
  child: an orphan goes to an ancestor of the parent that it had, see ``PR_SET_CHILD_SUBREAPER`` in prctl(2). So a
  new process can be an heir if its parent has had a connection, or is an ancestor of one that has, or is gone, or is
  new and can be an heir itself; and so can whoever has a parent that can't be looked at.
- The process that opened a connection is searched for once, first among those that opened others.
- From then on, what has been seen is only seen again: one readlink(2) for each holder and connection.

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
import math
import os
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from pgguard.attribution.descriptors import find_sockets, has_socket, is_shortage, link_to, list_processes
from pgguard.attribution.evidence import Process
from pgguard.attribution.processes import TICKS_PER_SECOND, ProcessBook, read_stat

_NEW = 5.0
"""Seconds for which a process counts as new. It must cover the time from when a connection is opened to when it is
first asked about, and that from a process's start to its first connection makes searches short."""

_TURN = 0.02
"""Seconds for which one waits for another that looks for all."""

_KEPT = 15.0
"""Seconds for which a connection is remembered that nobody asks about."""


@dataclass(frozen=True, slots=True)
class Holding:
    """A process that has the socket open."""

    process: Process
    since: float
    """When it was first seen to have it open, never to be seen without it since: seconds of time.monotonic()."""
    seen: float
    """When it was last seen to have it open.

    A child between its fork and its exec has every socket of its parent open for a moment, close-on-exec or not.
    Only who has been seen twice, some time apart, is there to stay.
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
        """Who was seen to have it open at two moments at least ``seconds`` apart."""
        return tuple(holding.process for holding in self.holdings if holding.seen - holding.since >= seconds)


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


@dataclass(slots=True)
class _Seen:
    """A process in the list of processes."""

    entry: int
    """The inode of ``/proc/PID``: another one when the pid has been reused."""
    at: float
    """When it was first listed, seconds of time.monotonic(); long ago for those that were there at the start."""
    read: float = -math.inf
    """When a reading of its descriptors began that looked for every connection known by then."""
    parent: int | None = None
    """Its parent's pid when it was first looked for; ``None`` before that."""


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
    entry: int
    """As in :class:`_Seen`."""
    fd: str
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
    asked: float
    """When it was last asked about."""
    searched: bool = False
    """Its opener has been searched for: until then, heirs may be all that is known."""
    walked: float = -math.inf
    """When a walk through all processes began that looked for it."""
    holds: dict[int, _Hold] = field(default_factory=dict)
    """By pid."""


class HolderWatch:
    """Finds, and keeps an eye on, the processes that have sockets open.

    One for a guard, made before it accepts its first connection: processes that are there already when it is made
    can't have inherited one. Thread-safe; threads wait for each other only while one lists the
    processes. The calling process itself is never a holder.

    Without a descriptor left, nobody new is found; whether those that are known have a socket open still is seen all
    the same, as readlink(2) and stat(2) take none.
    """

    def __init__(self, book: ProcessBook) -> None:
        self._book = book
        self._lock = threading.Lock()
        self._seen: dict[int, _Seen] = {}
        self._unreadable: dict[int, _Unreadable] = {}
        self._clients: dict[int, frozenset[int]] = {}
        """Processes that have had a connection of ours open, the latest last; with their own pids and those of their
        ancestors when that was first seen."""
        self._connections: dict[int, _Connection] = {}
        self._links: Mapping[str, int] | None = None
        """Their inodes, each under what the link of a descriptor says; ``None`` if they have changed since."""
        self._held: dict[int, set[int]] = {}
        """By pid, the inodes of those of them that a process holds."""
        self._hidden = False
        """Other users' processes aren't even listed: ``hidepid``, see proc(5); or none is, as no descriptor is left."""
        self._listed = -math.inf
        """When the processes were last listed."""
        self._crowd = threading.Lock()
        """Held by the one of several that looks for all of them."""
        for pid in self._list(time.monotonic() - _NEW):
            self._read(pid, {})

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
        new = self._begin(opened)
        unsearched = self._unsearched(opened)
        if any(now - opened[inode] > _NEW for inode in unsearched):
            return self.walk(opened)
        self._look(opened, [*likely, *(self._possible_heirs(new, likely) if openers else new)])
        held = {inode for inode, _ in self._holds(opened)}
        self._search({inode: opened[inode] for inode in unsearched | (opened.keys() - held)}, skip=new)
        return self._report(opened)

    def watch(self, inodes: Iterable[int], *, keep: Iterable[int] = ()) -> dict[int, Holders]:
        """Look again at who holds sockets that :meth:`find` was asked for; to be called every few seconds.

        Takes a time that depends on how many processes are new and how many holders are known, and very little on
        how many processes there are. A new process is read once, and again when there are new connections: what it
        has inherited, it has from its first moment on.

        Args:
            inodes: the sockets. One that isn't known has an empty entry.
            keep: others that will be asked about later on. One that is in neither for 15 seconds is forgotten.
        """
        asked = list(inodes)
        with self._lock:
            known = {inode: c.opened for inode in asked if (c := self._connections.get(inode))}
            kept = {inode: c.opened for inode in keep if (c := self._connections.get(inode))}
            latest = max((c.known for c in self._connections.values()), default=0.0)
        for pid in self._possible_heirs(self._begin(known | kept)):
            self._read_for_all(pid, latest)
        self._look(known, ())
        return self._report(asked)

    def walk(self, opened: Mapping[int, float]) -> dict[int, Holders]:
        """Find the holders of sockets by looking at every process; arguments and answer are those of :meth:`find`."""
        self._begin(opened)
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
                self._list(time.monotonic())
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
        now = time.monotonic()
        with self._lock:
            new = None if self._listed < since else self._new(now)
        if new is None:
            new = self._list(now)
        for pid in dict.fromkeys([*likely, *new, *(hold.process.pid for _, hold in self._holds(opened))]):
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
            wanted = self._all_links()
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
            connection = self._connections.get(inode)
            hold = None if connection is None else connection.holds.get(process.pid)
        return hold is not None and hold.process.started == process.started and not self._confirm(inode, hold)

    def confirmed(self, inode: int) -> tuple[Process, ...]:
        """Those that were seen to have a socket open and certainly have it open still; there may be others.

        Costs one readlink(2) each, and no descriptor.
        """
        return tuple(hold.process for _, hold in self._holds([inode]) if self._confirm(inode, hold))

    def _begin(self, opened: Mapping[int, float]) -> list[int]:
        """Take note of what is asked, and of who has come and gone; return the pids that are new."""
        now = time.monotonic()
        new = self._list(now)
        self._note_asked(opened, now)
        return new

    def _note_asked(self, opened: Mapping[int, float], since: float) -> float:
        """Take note of what is asked; return since when there can be an answer: when the last of it became known."""
        now = time.monotonic()
        with self._lock:
            for inode, at in opened.items():
                connection = self._connections.get(inode)
                if connection is None:
                    connection = self._connections[inode] = _Connection(at, now, now)
                    self._links = None
                connection.asked = now
                since = max(since, connection.known)
            for inode in [inode for inode, known in self._connections.items() if now - known.asked > _KEPT]:
                for pid in self._connections.pop(inode).holds:
                    self._release(pid, inode)
                self._links = None
        return since

    def _possible_heirs(self, new: Iterable[int], clients: Iterable[int] = ()) -> list[int]:
        """Those of new processes that can have inherited a connection; see the head of this module.

        Args:
            new: their pids.
            clients: others that have connections, beside those that are known to.
        """
        kin: set[int] = set()
        with self._lock:
            kin.update(*self._clients.values(), *(one.lineage for one in self._unreadable.values()))
            seen = {pid: one for pid in new if (one := self._seen.get(pid)) is not None}
            there = set(self._seen)
        kin.update(*[_known_lineage(pid) for pid in clients if pid not in kin])
        kin |= {0, 1, os.getpid()}  # who runs a guard may have connections too
        for pid, one in seen.items():
            if one.parent is None:
                one.parent = _parent(pid)

        def can_be(pid: int) -> bool:
            """A parent is older than its child: so this ends."""
            parent = seen[pid].parent
            return parent is None or parent in kin or parent not in there or (parent in seen and can_be(parent))

        return [pid for pid in seen if can_be(pid)]

    def _release(self, pid: int, inode: int) -> None:
        """A process doesn't hold a connection any more. With the lock."""
        self._held[pid].discard(inode)
        if not self._held[pid]:
            del self._held[pid]

    def _all_links(self) -> Mapping[str, int]:
        """Every known connection's inode under its link, not to be changed. With the lock."""
        if self._links is None:
            self._links = {link_to(inode): inode for inode in self._connections}
        return self._links

    def _list(self, now: float) -> list[int]:
        # Locked while listing: an older list that is compared after a newer one would undo it.
        with self._lock:
            began = time.monotonic()
            try:
                listed = list_processes()
                self._hidden = 1 not in listed
                self._listed = began
            except OSError:
                listed = self._without_listing()
                self._hidden = True
            listed.pop(os.getpid(), None)
            for pid in self._seen.keys() - listed.keys():
                self._drop(pid)
            for pid, entry in listed.items():
                seen = self._seen.get(pid)
                if seen is None or seen.entry != entry:
                    self._drop(pid)
                    self._seen[pid] = _Seen(entry, now)
            return self._new(now)

    def _new(self, now: float) -> list[int]:
        return [pid for pid, seen in self._seen.items() if now - seen.at < _NEW]

    def _without_listing(self) -> dict[int, int]:
        """Those of the processes known that are still there, as :func:`list_processes` lists them."""
        there = {}
        for pid in self._seen:
            with contextlib.suppress(OSError):
                there[pid] = os.stat(f"/proc/{pid}").st_ino  # noqa: PTH116 - as in list_processes()
        return there

    def _drop(self, pid: int) -> None:
        self._seen.pop(pid, None)
        self._unreadable.pop(pid, None)
        self._clients.pop(pid, None)

    def _look(self, inodes: Iterable[int], pids: Iterable[int]) -> None:
        """Look for the sockets in ``pids``, and see their known holders again.

        Of whoever is known to hold all of them it is only seen whether it does still, by one readlink(2) for each:
        hundreds of children may have inherited as many connections, of which one is asked about.
        """
        wanted = {link_to(inode): inode for inode in inodes}
        todo = dict.fromkeys(pids)
        kept: dict[int, list[_Hold]] = {}
        for inode, hold in self._holds(wanted.values()):
            if self._confirm(inode, hold):
                kept.setdefault(hold.process.pid, []).append(hold)
            else:
                todo[hold.process.pid] = None
        for pid in todo:
            holds = kept.get(pid)
            if holds is not None and len(holds) == len(wanted):
                self._describe_again(pid, wanted.values(), self._book.refresh(holds[0].process))
            else:
                self._read(pid, wanted)

    def _describe_again(self, pid: int, inodes: Iterable[int], process: Process) -> None:
        """Say what a process that holds sockets is called by now."""
        with self._lock:
            for inode in inodes:
                connection = self._connections.get(inode)
                hold = None if connection is None else connection.holds.get(pid)
                if connection is not None and hold is not None and hold.process.started == process.started:
                    connection.holds[pid] = hold._replace(process=process)

    def _search(self, opened: Mapping[int, float], skip: Collection[int]) -> None:
        """Look at one process after the other until the opener of each connection has turned up.

        Whoever is older than a connection and has it open has opened it. There is no need to go on then: others
        are heirs, and so they are new and have been looked at.
        """
        found = {inode for inode, hold in self._holds(opened) if is_older(hold.process.started, opened[inode])}
        wanted = {link_to(inode): inode for inode in opened if inode not in found}
        with self._lock:
            order = dict.fromkeys([*reversed(self._clients), *reversed(self._seen)])
        for pid in order:
            if not wanted:
                break
            if pid in skip:
                continue
            for inode, process in self._read(pid, wanted).items():
                if is_older(process.started, opened[inode]):
                    del wanted[link_to(inode)]
        self._set_searched(opened)

    def _unsearched(self, inodes: Iterable[int]) -> set[int]:
        with self._lock:
            return {inode for inode in inodes if not ((known := self._connections.get(inode)) and known.searched)}

    def _set_searched(self, inodes: Iterable[int]) -> None:
        with self._lock:
            for inode in inodes:
                if known := self._connections.get(inode):
                    known.searched = True

    def _read(self, pid: int, wanted: Mapping[str, int]) -> dict[int, Process]:
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
            return {}
        else:
            with self._lock:
                self._unreadable.pop(pid, None)
        process = self._book.look(pid) if found else None
        return self._note(pid, process, wanted, found, began)

    def _note(
        self, pid: int, process: Process | None, wanted: Mapping[str, int], found: Mapping[int, str], began: float
    ) -> dict[int, Process]:
        now = time.monotonic()
        noted: dict[int, Process] = {}
        with self._lock:
            seen = self._seen.get(pid)
            held = [inode for inode in self._held.get(pid, ()) if inode not in found and link_to(inode) in wanted]
            for inode in (*held, *found):
                connection = self._connections.get(inode)
                if connection is None:
                    continue
                before = connection.holds.pop(pid, None)
                if process is not None and seen is not None and inode in found:
                    same = before is not None and before.process.started == process.started
                    since = before.since if before is not None and same else now
                    connection.holds[pid] = _Hold(process, seen.entry, found[inode], since, began)
                    self._held.setdefault(pid, set()).add(inode)
                    noted[inode] = process
                elif before is not None:
                    self._release(pid, inode)
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
                if pid in self._seen:
                    self._clients[pid] = lineage

    def _note_unreadable(self, pid: int) -> None:
        try:
            stat = read_stat(pid)
            unreadable = _Unreadable(None if stat is None else stat.started, _lineage(pid))
        except OSError:
            unreadable = _Unreadable(None, frozenset())
        with self._lock:
            # What it descends from is best known when it is first seen: later on its parent may be gone.
            if pid in self._seen:
                self._unreadable.setdefault(pid, unreadable)

    def _holds(self, inodes: Iterable[int]) -> list[tuple[int, _Hold]]:
        with self._lock:
            return [
                (inode, hold)
                for inode in inodes
                if (connection := self._connections.get(inode))
                for hold in connection.holds.values()
            ]

    def _confirm(self, inode: int, hold: _Hold) -> bool:
        """See whether a process has the socket open at this very moment, by the descriptor it is known to have."""
        pid = hold.process.pid
        with self._lock:
            seen = self._seen.get(pid)
        return seen is not None and seen.entry == hold.entry and has_socket(pid, hold.fd, inode)

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
    return not any(process.may_be_heir(family, opened) for process in unreadable.values())


def _elder(pid: int, opened: float) -> int | None:
    """Return the nearest ancestor that is older than the connection; ``None`` if that can't be told."""
    with contextlib.suppress(PermissionError):
        stat = read_stat(pid)
        while stat is not None and stat.ppid:
            pid = stat.ppid
            stat = read_stat(pid)
            if stat is not None and is_older(stat.started, opened):
                return pid
    return None


def _parent(pid: int) -> int | None:
    """Return the pid of a process's parent; ``None`` if it can't be told."""
    with contextlib.suppress(OSError):
        stat = read_stat(pid)
        return None if stat is None else stat.ppid
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
