"""What attribution knows about one session's client at one moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from pgguard.attribution.evidence import Driver, Evidence, Process
from pgguard.attribution.fates import Fate
from pgguard.attribution.frames import Frame
from pgguard.attribution.runtime import Language, Runtime
from pgguard.attribution.stacks import Stacks
from pgguard.attribution.threads import Sleep, Thread, Waiting, Waits


class Activity(Enum):
    """What a connection is being used for at one moment."""

    BUSY = "a request is outstanding"
    IDLE = "idle"
    IDLE_IN_TRANSACTION = "idle, with a transaction open"
    UNKNOWN = "not known"


class Share(NamedTuple):
    """How many of the connections that count one process has open."""

    process: Process | None
    """``None``: those of clients that could not be found, on another host for one."""
    connections: int
    idle: int = 0
    """How many of them were idle, but not in a transaction."""
    idle_in_transaction: int = 0
    evidence: Evidence = Evidence.UNKNOWN
    """How the process is known to have them open: of the weakest."""


class Slots(NamedTuple):
    """The connections that count toward a limit, each once, though several processes may have it open."""

    connections: int
    idle: int
    """How many of them were idle, but not in a transaction."""
    idle_in_transaction: int


@dataclass(frozen=True, slots=True)
class Findings:
    """What is known; what is not known is ``None`` or absent."""

    opener: Process | None = None
    """The process that opened the connection, remembered even when it is gone."""
    opener_evidence: Evidence = Evidence.UNKNOWN
    connected: tuple[int, int | None] | None = None
    """The process, and over TCP the thread, that opened it, as the kernel named them: known from when the connection
    is accepted, and even if they could not be looked at."""
    thread_names: Mapping[tuple[int, int], str] = field(default_factory=dict)
    """By pid and tid, what the threads that have sent are called."""
    holders: tuple[Process, ...] | None = None
    """The processes that have the client's socket open, as far as they could be found; ``None`` if nobody was found."""
    holders_complete: bool = True
    """There is certainly no other."""
    senders: Mapping[int, Process] = field(default_factory=dict)
    """The processes that are known to have sent, by pid, as far as they could still be looked at."""
    driver: Driver = Driver.UNKNOWN
    """What speaks on the connection: the driver of the process that opened it, when it did."""
    waits: Waits = field(default_factory=Waits)
    """The threads that were blocked on the socket when evidence was taken."""
    before: frozenset[Sleep] = frozenset()
    """Those of them that were seen to wait already before what is judged had come."""
    throughout: frozenset[Sleep] = frozenset()
    """Sleeps that threads were in when everything that had been sent was known, and what is judged hadn't been."""
    restless: Mapping[int, Mapping[int, Sleep | None]] = field(default_factory=dict)
    """By pid, where that was looked at: the threads that have run since then, and so may have sent it, by tid, with the
    sleep that they are in now if they are in one."""
    watchers: frozenset[Thread] = frozenset()
    """Threads that wait on the connection whether or not an answer is due."""
    stacks: Stacks = field(default_factory=Stacks)
    """What Python threads were doing."""
    opening_stack: tuple[Frame, ...] | None = None
    """What the thread was doing that opened the connection while it did, the innermost call first."""
    only_threads: Mapping[int, Sleep] = field(default_factory=dict)
    """By pid, the sleep of the only thread of a process that has no other."""
    sleeps: Mapping[tuple[int, int], Sleep] = field(default_factory=dict)
    """By pid and tid, the sleep of threads that have sent, where it matters what they do now."""
    calls: Mapping[Sleep, str] = field(default_factory=dict)
    """The system calls that those, and only threads, are blocked in, whatever they wait for, where it matters."""
    runtimes: Mapping[int, Runtime] = field(default_factory=dict)
    """By pid, what the processes run."""
    opener_stays: bool = False
    """The opener has the socket open still, and none of its threads was about to close it, as they all slept, not in an
    event loop with the socket in it."""
    last_sole_holder: Process | None = None
    """The process that was alone with the connection when that was looked at before."""
    survivors: tuple[Process, ...] = ()
    """Of a connection that has been ended: who went on to have it open when the opener had let go."""
    departed: tuple[Process, ...] = ()
    """Those that had the socket open lately and have not any more."""
    fate: Fate | None = None
    """Of a connection that has ended, what has become of the only process that it may have been."""
    was_reset: bool = False
    """Of a connection that has ended, that it was reset instead of closed."""
    shares: tuple[Share, ...] | None = None
    """Who has how many of the connections open that count, the most first."""
    slots: Slots | None = None
    """The same, of all together."""
    declared: Mapping[str, str] = field(default_factory=dict)
    """What the client says of itself."""

    @property
    def opener_pid(self) -> int | None:
        """The pid of the process that opened the connection, even if nothing else is known of that."""
        if self.connected is not None:
            return self.connected[0]
        return None if self.opener is None else self.opener.pid

    @property
    def language(self) -> Language | None:
        """Of the process that opened the connection."""
        runtime = None if self.opener is None else self.runtimes.get(self.opener.pid)
        return None if runtime is None else runtime.language

    @property
    def sole_holder(self) -> Process | None:
        """The process that alone has the socket open."""
        return self.holders[0] if self.holders_complete and self.holders and len(self.holders) == 1 else None

    @property
    def waiting(self) -> tuple[Waiting, ...]:
        """The threads that waited to read from this connection and for nothing else: see ``Waiting.others``."""
        return tuple(one for one in self.waits.threads if one.readable and not one.others)
