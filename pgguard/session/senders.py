"""Who sends: whether a process that is not the one that sent last has a right to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from pgguard.session.verdicts import Kind

if TYPE_CHECKING:
    from pgguard.identity import Sender


_REMEMBERED: Final = 256
"""Processes that are remembered to have sent on one connection: the one that opened it, and the latest. A job runner
whose connection every child uses has any number of them."""


class Change(NamedTuple):
    """What another process's bytes amount to."""

    kind: Kind
    reason: str
    requesters: tuple[Sender, ...]
    """The other processes that have sent: the one whose turn it was, then the latest first."""


class Senders:
    """The processes that have sent on a connection.

    One process alone may; another may take over from it once and for all, as a child does that a launcher forks.
    Whatever else happens between two processes is sharing.

    Args:
        opener: who sent the StartupMessage, if the kernel said so.
    """

    __slots__ = ("_seen", "latest", "opener", "shared")

    def __init__(self, opener: Sender | None) -> None:
        self._seen: list[Sender] = [] if opener is None else [opener]
        self.opener = opener
        """Who opened the connection, where that is known."""
        self.latest = opener
        """The last that is known to have sent."""

    def introduce(self, opener: Sender) -> None:
        """Say who opened the connection, and so used it first, where the kernel hasn't."""
        if self.opener is None:
            self.opener = opener
            if all(other.pid != opener.pid for other in self._seen):
                self._seen.insert(0, opener)
            if self.latest is None:
                self.latest = opener

    @property
    def pids(self) -> frozenset[int]:
        """Who has sent, or opened the connection."""
        return frozenset(sender.pid for sender in self._seen)

    def is_strange(self, sender: Sender) -> bool:
        """Whether ``sender`` hasn't opened the connection: it may not end the session if another one has it open."""
        return self.opener is not None and sender.pid != self.opener.pid

    def changes(self, sender: Sender) -> bool:
        """Whether ``sender`` is another process than the last that sent; if it isn't, it is the latest now."""
        latest = self.latest
        if latest is not None and latest.pid != sender.pid:
            return True
        if latest is None:
            self._seen.append(sender)
        else:
            self._seen[-1] = sender
        self.latest = sender
        return False

    def change(self, sender: Sender, *, waiting: Sender | None, torn: str | None, first: Sender | None) -> Change:
        """Another process has sent.

        Args:
            sender: which.
            waiting: the first other process that the server owes an answer, if it does.
            torn: the name of the message of another process's that these bytes stand in the middle of, if they do.
            first: whose turn it was, if that is known.
        """
        known = any(other.pid == sender.pid for other in self._seen)
        requesters = self.others(sender, first=first)
        self._seen = [other for other in self._seen if other.pid != sender.pid]
        self._seen.append(sender)
        self._forget()
        self.latest = sender
        kind = Kind.SHARED_BY_PROCESSES
        if torn is not None:
            reason = f"in the middle of another process's {torn}"
        elif waiting is not None:
            reason = "while the answer to another process was outstanding"
        elif known:
            reason = "after another process had used the connection in between"
        elif len(requesters) > 1:
            reason = "on a connection that several other processes had used"
        else:
            kind, reason = Kind.INHERITED_CONNECTION, "on a connection that another process had used"
        return Change(kind, reason, requesters)

    def _forget(self) -> None:
        """Keep the latest, and the opener."""
        if len(self._seen) > _REMEMBERED:
            del self._seen[1 if self.opener is not None and self._seen[0].pid == self.opener.pid else 0]

    def others(self, sender: Sender | None, *, first: Sender | None = None) -> tuple[Sender, ...]:
        """Who else has sent, the latest first, but ``first`` in front of all."""
        others = [other for other in reversed(self._seen) if sender is None or other.pid != sender.pid]
        if first is not None and first != sender:
            others = [first, *(other for other in others if other.pid != first.pid)]
        return tuple(others)
