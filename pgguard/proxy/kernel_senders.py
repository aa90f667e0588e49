"""Who sends on TCP, as the kernel says: the probe's accounts, for the guard that opens them and the sweep."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING, Any, final

from pgguard.attribution.ebpf.account import Account, Accounts, Segment, Tally
from pgguard.attribution.ebpf.bpf import BpfError
from pgguard.attribution.ebpf.probe import key_between
from pgguard.proxy.figures import Unnamed

if TYPE_CHECKING:
    from pgguard.attribution.ebpf.probe import SenderProbe
    from pgguard.proxy.sockets import Stream


@final
class TcpAccount:
    """One connection's account, and what the guard knows of it."""

    __slots__ = ("account", "is_lost", "key", "unread")

    def __init__(self, key: bytes, account: Account) -> None:
        self.key = key
        self.account = account
        self.unread: tuple[int, int] | None = None
        """What lay unread when the bytes were sent that have just been read: see :meth:`Account.unread`."""
        self.is_lost = False
        """It isn't known any more of which bytes it speaks."""

    @property
    def is_kept(self) -> bool:
        """Whether the kernel reports what is sent on this connection."""
        return self.account.cookie is not None and self.account.problem is None and not self.is_lost


@final
class KernelSenders:
    """The accounts of all TCP connections.

    Args:
        probe: reports who sends; not closed here.
    """

    def __init__(self, probe: SenderProbe) -> None:
        self._probe = probe
        self._accounts = Accounts(probe)
        self._tally = Tally()

    def feed(self) -> None:
        """Take what the kernel has reported into account. Costs a tenth of a microsecond when that is nothing."""
        self._accounts.feed()

    def open(self, accepted: Stream, client: tuple[Any, ...], own: tuple[Any, ...]) -> TcpAccount:
        """Begin the account of a connection that has just been accepted and not been read from.

        That its client is gone already doesn't show.

        Args:
            accepted: its socket.
            client: the client's address, as accept(2) has told it.
            own: the guard's, as getsockname(2) tells it.
        """
        # Urgent data would be taken out of the stream, and positions in it be off.
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        key = key_between(client, own)
        # On an address that this host has got since it began to listen on all of them, the next connection is watched.
        with contextlib.suppress(BpfError):
            self._probe.add(own[0], own[1])
        self.feed()
        return TcpAccount(key, self._accounts.open(key))

    def close(self, kernel_account: TcpAccount) -> None:
        """End an account."""
        self._tally.count(kernel_account.account)
        self._accounts.close(kernel_account.key, kernel_account.account)

    def remarks(self) -> list[str]:
        """What wasn't known of the connections that are closed, and what can't be: clauses, none if all was."""
        return [*self._probe.limits, *self._tally.remarks(self._probe.lost)]

    def unnamed(self) -> Unnamed:
        """What wasn't known of the connections that are closed, in numbers."""
        return Unnamed(self._probe.lost, self._tally.unwatched.total(), self._tally.contradictions)

    def take(self, kernel_account: TcpAccount, size: int) -> bool:
        """Tell whether the bytes that have just been read are all one's: :attr:`Account.sender`'s, then.

        If they aren't, :meth:`Account.split` is to be asked.
        """
        account = kernel_account.account
        if account.problem is not None:
            if account.cookie is not None:
                self._probe.release(account.cookie)
                account.cookie = None
        elif not account.covers(size):
            # They came after the last look at what was reported; their report was there before them.
            self._accounts.catch_up(account)
        kernel_account.unread = account.unread()
        return account.take(size)

    def pieces(self, kernel_account: TcpAccount, size: int) -> list[Segment]:
        """Tell who sent the bytes that have just been read, in pieces by different threads."""
        account = kernel_account.account
        return [(size, account.sender)] if self.take(kernel_account, size) else account.split(size)
