"""What a guard has done so far, in numbers: for whoever watches it from outside.

Numbers are counted where something happens anyway that takes far longer: a client comes, a verdict falls, the relay's
turn is over. What each message or chunk brings about is counted by who follows and forwards them, and added up when it
is asked for.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pgguard.attribution.findings import Activity
    from pgguard.proxy.losses import Loss

_MICROSECOND: Final = 1e-6
_BUCKETS: Final = 24

BOUNDS: Final = tuple(_MICROSECOND * 2**n for n in range(_BUCKETS))
"""Seconds that a duration is shorter than, of each bucket of :class:`Durations`; it goes into the first that has room.
Longer ones are in a bucket of their own behind these."""


class Turnaway(StrEnum):
    """Why a client that has come never got as far as to be logged in."""

    NO_ROOM = "no-room"
    """There were no descriptors for it, or whatever else this host had run out of."""
    NO_SERVER = "no-server"
    """No server could be connected to."""
    LATE = "late"
    """It didn't say in time what it wants."""
    NO_POSTGRESQL = "not-postgresql"
    """What it said isn't a start-up packet."""
    ENCRYPTION = "encryption"
    """It wanted encryption that it can't have, and left, or a handshake for TLS with it failed."""
    LOGIN = "login"
    """The server refused its login, or it left before it was logged in."""


class Measured(NamedTuple):
    """How long something has taken, each time so far."""

    times: tuple[int, ...]
    """How often it took less than each of :data:`BOUNDS`, and not less than the one before; at last, longer."""
    seconds: float
    """All in all."""


class Durations:
    """Counts how long something takes each time."""

    __slots__ = ("_seconds", "_times")

    def __init__(self) -> None:
        self._times = [0] * (_BUCKETS + 1)
        self._seconds = 0.0

    def note(self, seconds: float) -> None:
        """Count one more."""
        self._times[min(int(seconds * 1_000_000).bit_length(), _BUCKETS)] += 1
        self._seconds += seconds

    def measured(self) -> Measured:
        """What there was so far."""
        return Measured(tuple(self._times), self._seconds)


class Unnamed(NamedTuple):
    """What the kernel didn't say of senders on TCP, where it does."""

    reports: int
    """Its reports that got lost as they came too fast."""
    connections: int
    """TCP connections of this host's whose senders it didn't name, or not to the end."""
    contradictions: int
    """Its reports that contradicted others."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What a guard has done since it started; but for the open sessions, no number ever becomes smaller."""

    at: float
    """Seconds since the epoch."""
    open: Mapping[Activity, int]
    """The sessions that are open, by what they are used for."""
    capacity: int
    """How many there can be."""
    clients: int
    """That have come."""
    introduced: int
    """Those of them that were connected to the server."""
    turned_away: Mapping[Turnaway, int]
    server_answers: Mapping[str | None, bool]
    """By the name of the database, whether its server could be connected to for the last client; those that weren't
    tried aren't in it."""
    requests: int
    """That clients have made: simple queries, extended ones with all their messages, function calls."""
    messages: tuple[int, int]
    """That clients have sent, behind their StartupMessages, and that servers have: those that were passed on."""
    from_clients: int
    """Bytes that were passed on to the server, without StartupMessages."""
    from_servers: int
    """Bytes that were passed on to clients."""
    added: Measured
    """For how long what has come waited at most until it was passed on: of one round in each turn of the relay's, of
    which it takes a thousand a second at most. What a ruling holds isn't among it."""
    evidence: Measured
    """How long it took to look into faults that needed it. Nothing or one message of one session was held meanwhile."""
    losses: Mapping[Loss, int]
    """Internal errors, by what they have cost, of the whole process."""
    unnamed: Unnamed | None
    """``None`` where the kernel isn't asked who sends on TCP."""


class Counters:
    """What is counted where it happens."""

    def __init__(self) -> None:
        self.introduced = 0
        self.requests = 0
        self.messages = (0, 0)
        """As of :class:`Figures`, of sessions that are over."""
        self.server_answers: dict[str | None, bool] = {}
        """As of :class:`Figures`."""
        self.added = Durations()
        self.evidence = Durations()
        self._turned_away: Counter[Turnaway] = Counter()

    def turn_away(self, why: Turnaway) -> None:
        """Count a client that isn't let in."""
        self._turned_away[why] += 1

    def turn_back(self, through: str | None, *, exhausted: bool) -> None:
        """Count a client for which its server could not be connected to.

        Args:
            through: the name of the database that it has come to.
            exhausted: it is this host that has run out of something.
        """
        if not exhausted:
            self.server_answers[through] = False
        self.turn_away(Turnaway.NO_ROOM if exhausted else Turnaway.NO_SERVER)

    def introduce(self, through: str | None) -> None:
        """Count a client that has been connected to the server of a database."""
        self.introduced += 1
        self.server_answers[through] = True

    def finish(self, requests: int, messages: tuple[int, int], *, logged_in: bool) -> None:
        """Count a session that is over.

        Args:
            requests: how many its client has made.
            messages: how many its client has sent, and its server.
            logged_in: it had come so far.
        """
        self.requests += requests
        self.messages = (self.messages[0] + messages[0], self.messages[1] + messages[1])
        if not logged_in:
            self._turned_away[Turnaway.LOGIN] += 1

    @property
    def turned_away(self) -> Mapping[Turnaway, int]:
        """How many clients weren't let in, for each reason."""
        return {why: self._turned_away[why] for why in Turnaway}
