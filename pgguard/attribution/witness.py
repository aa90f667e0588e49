"""What the proxy asks about its clients: who opened a connection, who has it open, who sent on it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pgguard.attribution.drivers import driver_of
from pgguard.attribution.evidence import Driver, Evidence, Findings, Process
from pgguard.attribution.holders import Holders, HolderWatch, is_older
from pgguard.attribution.processes import TICKS_PER_SECOND, ProcessBook
from pgguard.attribution.sockets import ClientSocket, SockDiag, UnixClient

_DRIVERS = 1024
"""Processes whose drivers are remembered."""


@dataclass(frozen=True, slots=True)
class Opening:
    """What was found out about a connection's client when it connected."""

    client: ClientSocket
    inode: int | None
    """The inode of the client's socket; ``None`` if the client is on another host, or sock_diag doesn't tell."""
    opener: Process | None
    evidence: Evidence
    """How ``opener`` is known: UNKNOWN if and only if it is ``None``."""
    holders: Holders
    """Who had the socket open when it was looked for; empty if nobody was found."""
    driver: Driver
    """The opener's, and so what speaks on the connection, whoever inherits it."""


class Witness:
    """Attribution for one guard. Thread-safe; made before the guard accepts its first connection.

    Its methods read ``/proc`` and ask the kernel: they never wait for a client, but may take milliseconds, and so
    are for worker threads. They raise nothing for what can't be found out.
    """

    def __init__(self) -> None:
        self._book = ProcessBook()
        self._watch = HolderWatch(self._book)
        self._lock = threading.Lock()
        self._drivers: OrderedDict[tuple[int, int], Driver] = OrderedDict()

    def opened(self, client: ClientSocket) -> Opening:
        """Find out who opened one connection; see :meth:`opened_many`."""
        return self.opened_many([client])[0]

    def opened_many(self, clients: Sequence[ClientSocket]) -> list[Opening]:
        """Find out who opened connections that have just been accepted; in the order of ``clients``.

        The sooner this is called, the surer it tells: within five seconds it looks only where openers can be. For
        all of them together it costs one walk through ``/proc``, and most often much less.

        The opener is, in this order,

        - on a Unix socket, who the kernel says has connected it (KERNEL_SENDER);
        - the only process that has the socket open (SOLE_HOLDER);
        - of several, the only one that is older than the connection, as the others must have inherited it
          (SOCKET_HOLDER);
        - nobody (UNKNOWN).
        """
        connected_by = [self._connected_by(client) for client in clients]
        inodes = _inodes(clients)
        holders = self._watch.find(
            {inode: client.opened for client, inode in zip(clients, inodes, strict=True) if inode is not None},
            likely=[process.pid for process in connected_by if process is not None],
        )
        return [
            self._opening(client, inode, process, holders.get(inode, Holders()) if inode is not None else Holders())
            for client, inode, process in zip(clients, inodes, connected_by, strict=True)
        ]

    def sender(self, pid: int) -> Process | None:
        """Look at a process that the kernel has just named as a sender, and remember it; ``None`` if it is gone.

        To be called when a pid first sends on a connection, and its answer kept with that connection: later on the
        process may be gone and its pid another's.
        """
        return self._book.look(pid)

    def holders(self, opening: Opening) -> Holders:
        """Find out, by looking at every process, who has a connection's client socket open now.

        For about 50 µs a process on the machine it also finds who was handed the socket instead of inheriting it.
        """
        if opening.inode is None:
            return Holders()
        return self._watch.walk({opening.inode: opening.client.opened})[opening.inode]

    def watch(self, inodes: Iterable[int]) -> dict[int, Holders]:
        """Find out who has become, and who still is, a holder of the sockets of live connections, by inode.

        To be called every second or two with all of them: a connection that is left out for 15 seconds is forgotten,
        and after that its holders are unknown here. See :meth:`HolderWatch.watch` for what it costs.
        """
        return self._watch.watch(inodes)

    def findings(self, opening: Opening, senders: Iterable[Process] = ()) -> Findings:
        """Gather what is known about a connection's client now.

        Args:
            opening: what :meth:`opened` said about the connection.
            senders: what :meth:`sender` said about the processes that the kernel has named on it.

        A process that is still there is described as it is now, one that is gone as it was last seen.
        """
        found = self._holders(opening)
        holders = found.processes if found.complete or len(found.holdings) > 1 else None
        return Findings(
            opener=None if opening.opener is None else self._book.refresh(opening.opener),
            opener_evidence=opening.evidence,
            holders=holders,
            senders={process.pid: self._book.refresh(process) for process in senders},
            driver=opening.driver,
        )

    def _holders(self, opening: Opening) -> Holders:
        if opening.inode is None:
            return Holders()
        return self._watch.find({opening.inode: opening.client.opened})[opening.inode]

    def _connected_by(self, client: ClientSocket) -> Process | None:
        if not isinstance(client, UnixClient) or client.connected_by is None:
            return None
        process = self._book.look(client.connected_by)
        # If it is younger than the connection, who connected is gone and the pid is another's.
        if process is None or process.started > client.opened * TICKS_PER_SECOND:
            return None
        return process

    def _opening(
        self, client: ClientSocket, inode: int | None, connected_by: Process | None, holders: Holders
    ) -> Opening:
        opener, evidence = _opener(client, connected_by, holders)
        driver = Driver.UNKNOWN if opener is None else self._driver(opener)
        return Opening(client, inode, opener, evidence, holders, driver)

    def _driver(self, process: Process) -> Driver:
        """The driver of a process that has just opened a connection; looked for once in each process."""
        key = (process.pid, process.started)
        with self._lock:
            known = self._drivers.get(key)
        if known is not None:
            return known
        driver = driver_of(process.pid)
        now = self._book.look(process.pid)
        if now is None or now.started != process.started:
            return Driver.UNKNOWN
        with self._lock:
            self._drivers[key] = driver
            if len(self._drivers) > _DRIVERS:
                self._drivers.popitem(last=False)
        return driver


def _inodes(clients: Sequence[ClientSocket]) -> list[int | None]:
    try:
        with SockDiag() as diag:
            return [diag.client_inode(client) for client in clients]
    except OSError:
        return [None] * len(clients)


def _opener(client: ClientSocket, connected_by: Process | None, holders: Holders) -> tuple[Process | None, Evidence]:
    if connected_by is not None:
        return connected_by, Evidence.KERNEL_SENDER
    if holders.complete and len(holders.holdings) == 1:
        return holders.processes[0], Evidence.SOLE_HOLDER
    older = [process for process in holders.processes if is_older(process.started, client.opened)]
    if len(older) == 1:
        return older[0], Evidence.SOCKET_HOLDER
    return None, Evidence.UNKNOWN
