"""What went over one connection before a fault, in order: what a sequence diagram is drawn from, whatever draws it.

It is made of the record alone, and says no more than that. A request's time is when it came. When an answer was
complete isn't recorded, but for each request it is whether all those before it had been answered by then. So an answer
stands between two requests where that is certain; elsewhere a request only says what had become of it by the time of
the fault. Who has read an answer is never known. Where several had the connection's socket open, all of them may have.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final, NamedTuple

from pgguard.faults.fault import Chapter, Event, Role
from pgguard.faults.policy import Action
from pgguard.faults.text import counted, listed, process_label, shorten
from pgguard.session.verdicts import OUTSTANDING, Direction, Kind, Party, RequestState
from pgguard.wire.messages import FRONTEND

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pgguard.attribution.evidence import Process
    from pgguard.faults.fault import Culprit, Fault, Request

LANES: Final = 6
"""Processes and threads that get a lane of their own, at most."""
REQUESTS: Final = 24
"""Requests that are told, the latest ones."""
IDLE: Final = 0.1
"""Seconds from which on nothing happened for a while, which is folded."""
TICK: Final = 0.02
"""Seconds by which a process may have begun later than its start says: the kernel counts it in ticks."""
LABEL: Final = 40
"""Characters of a lane's name for the program and for the thread, at most."""
SQL: Final = 200
"""Characters of a request's text, at most."""

_NAMES: Final = {message.type: message.name for message in FRONTEND}
_MESSAGES: Final = 5
"""Messages of a request that are called by their names."""
_ORDER: Final = (Role.OWNER, Role.REQUESTER, Role.INTRUDER, Role.CLOSER, Role.HOLDER)
"""Who stands farther to the left."""
_RANK: Final = (Role.INTRUDER, Role.CLOSER, Role.OWNER, Role.REQUESTER, Role.HOLDER)
"""Whose lane matters most, where there are too many."""
_SHARED: Final = frozenset({Kind.SHARED_BY_PROCESSES, Kind.SHARED_BY_THREADS, Kind.REQUEST_WHILE_BUSY})


class LaneKind(StrEnum):
    """What a lane stands for."""

    CLIENT = "client"
    """A process on the client's side, or one of its threads."""
    OTHERS = "others"
    """Several of them, for which there are too few lanes."""
    UNKNOWN = "unknown"
    """Somebody on the client's side; it isn't known who."""
    GUARD = "guard"
    SERVER = "server"
    """The server's process for this session."""


class Lane(NamedTuple):
    """A column of the diagram; other people's text is in it."""

    kind: LaneKind
    name: str
    """What it is called: ``pid 4867``."""
    program: str = ""
    """What it runs: ``puma: cluster worker 1``."""
    thread: str = ""
    """Which of its threads it is: ``thread 4880 "puma srv tp 002"``."""
    pid: int | None = None
    tid: int | None = None
    roles: tuple[Role, ...] = ()

    @property
    def title(self) -> str:
        """All of that in one line."""
        program = f" ({self.program})" if self.program else ""
        return f"{self.name}{program}{', ' if self.thread else ''}{self.thread}"


class What(StrEnum):
    """What a step is."""

    OPENED = "opened"
    INHERITED = "inherited"
    RECEIVED = "received"
    LEFT = "left"
    REQUEST = "request"
    ANSWER = "answer"
    MESSAGE = "message"
    """The offending message, whichever side it is from."""
    FAULT = "fault"
    """The moment at which the fault was seen, where no message shows it."""
    OUTCOME = "outcome"
    """What has been done about it."""
    REMARK = "remark"


class Step(NamedTuple):
    """Something that happened; other people's text is in it."""

    what: What
    at: float | None
    """Seconds since the epoch; ``None`` if that isn't known, and it stands where it must have happened."""
    source: int | None
    """The lane that it comes from; ``None``: it is about those that it goes to."""
    targets: tuple[int, ...]
    """The lanes that it goes to: of an answer, all that may have read it."""
    text: str
    """In a few words, without who it is from and for."""
    detail: str = ""
    """A request's SQL, or what had become of it."""
    sql: str = ""
    offending: bool = False
    stopped: bool = False
    """The guard hasn't let it pass."""
    n: int | None = None
    """The number of the request that it is, or answers."""
    roughly: bool = False
    """It was by that time, and up to :data:`TICK` earlier."""


class Gap(NamedTuple):
    """A time of which nothing is known that happened in it."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Sequence:
    """The steps of one fault, and between whom."""

    lanes: tuple[Lane, ...]
    """Clients first, then the guard, and the server last."""
    items: tuple[Step | Gap, ...]
    """In the order in which it happened."""
    began: float
    """When the first of them did, in seconds since the epoch."""
    unknown: tuple[str, ...]
    """What the record doesn't say, a sentence each."""
    refused: bool = False
    """The server has refused the connection: nobody has ever had it."""

    @property
    def guard(self) -> int:
        """The guard's lane, which everything between a client and the server passes."""
        return len(self.lanes) - 2

    @property
    def server(self) -> int:
        """The server's lane."""
        return len(self.lanes) - 1

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps without the gaps."""
        return tuple(item for item in self.items if isinstance(item, Step))

    def time(self, step: Step) -> str:
        """When a step was, from the first one on; empty if that isn't known."""
        if step.at is None:
            return ""
        return f"{'by ' if step.roughly else ''}+{duration(step.at - self.began)}"

    def sentence(self, step: Step) -> str:
        """A step in words, for whoever can't see a diagram; other people's text is in it."""
        lanes = [self.lanes[n].title for n in step.targets]
        match step.what:
            case What.ANSWER if len(lanes) > 1:
                told = f"{step.text} goes to the connection's socket, which {listed(lanes)} have open"
            case What.ANSWER:
                told = f"{step.text} goes to {listed(lanes)}"
            case What.INHERITED if step.source is not None:
                told = f"{self.lanes[step.source].title} forks {listed(lanes)}, which {step.text}"
            case What.RECEIVED | What.LEFT | What.INHERITED:
                told = f"{listed(lanes)} {step.text}"
            case What.FAULT | What.REMARK | What.OUTCOME:
                told = step.text
            case _:
                told = f"{self.lanes[step.source].title if step.source is not None else 'somebody'} {step.text}"
        if step.sql:
            told += f": {step.sql}"
        return f"{told} ({step.detail})" if step.detail else told


def duration(seconds: float) -> str:
    """A time span as people say it: ``1.2 ms``, ``12.5 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if abs(seconds) < 1:
        return f"{seconds * 1000:.1f} ms"
    if abs(seconds) < 60:
        return f"{seconds:.2f} s"
    whole = round(abs(seconds))
    sign = "-" if seconds < 0 else ""
    if whole < 3600:
        return f"{sign}{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{sign}{whole // 3600} h {whole % 3600 // 60} min"
    return f"{sign}{counted(whole // 86400, 'day')} {whole % 86400 // 3600} h"


def sequence_of(fault: Fault) -> Sequence:
    """The sequence of a fault that is recorded in full; of any other there is little to be told."""
    return _Drawing(fault).sequence()


class _Drawing:
    """Puts the sequence of one fault together."""

    def __init__(self, fault: Fault) -> None:
        self._fault = fault
        self._culprits: dict[int, list[Culprit]] = {}
        for culprit in fault.culprits:
            if culprit.pid is not None and self._takes_part(culprit):
                self._culprits.setdefault(culprit.pid, []).append(culprit)
        self._requests = fault.requests[-REQUESTS:]
        self._owner = next((one.pid for one in fault.culprits if one.role is Role.OWNER), None)
        if self._owner is None:
            self._owner = next((one.pid for one in fault.story if one.event is Event.OPENED), None)
        self._story = (*fault.story, *self._heirs())
        self._lanes: list[Lane] = []
        self._by_thread: dict[tuple[int | None, int | None], int] = {}
        self._others: int | None = None
        self._unknown: list[str] = []
        self._steps: list[Step] = []
        self._since: dict[int, float] = {}
        """By pid, since when it is known to have had the connection."""
        self._make_lanes()

    def sequence(self) -> Sequence:
        self._tell()
        steps = self._steps
        began = min((step.at for step in steps if step.at is not None), default=self._fault.at)
        refused = self._fault.kind is Kind.CONNECTION_EXHAUSTION
        return Sequence(tuple(self._lanes), tuple(_fold(steps)), began, tuple(self._remarks()), refused)

    def _heirs(self) -> Iterator[Chapter]:
        """Who has inherited the connection, and let go of it before anybody looked who had it: it has used it."""
        known = {chapter.pid for chapter in self._fault.story} | {self._owner}
        had_it = known | self._culprits.keys()
        for pid, people in self._culprits.items():
            process = next((one.process for one in people if one.process is not None), None)
            if pid in known or process is None or process.ppid not in had_it:
                continue
            if process.started_at >= self._fault.session.opened_at - TICK:
                yield Chapter(Event.INHERITED, process.started_at, pid, process.ppid, people[0].evidence)

    # Lanes

    def _make_lanes(self) -> None:
        threads = self._threads()
        kept = sorted(threads, key=self._importance)[:LANES]
        shown = sorted(kept, key=lambda thread: self._place(thread, threads))
        for pid, tid in shown:
            self._by_thread[pid, tid] = len(self._lanes)
            self._lanes.append(self._lane(pid, tid))
        if left_out := [thread for thread in threads if thread not in kept]:
            self._others = len(self._lanes)
            pids = {pid for pid, _ in left_out} - {pid for pid, _ in kept}
            name = counted(len(pids), "other process", "other processes") if pids else "other threads"
            self._lanes.append(Lane(LaneKind.OTHERS, name))
        if self._needs_stranger():
            self._by_thread[None, None] = len(self._lanes)
            client = self._fault.session.client
            self._lanes.append(
                Lane(LaneKind.UNKNOWN, "the client", f"from {client}" if client else "", "not identified")
            )
        self._guard, self._server = len(self._lanes), len(self._lanes) + 1
        backend = self._fault.session.backend_pid
        self._lanes.append(Lane(LaneKind.GUARD, "pgguard", "stands in between"))
        self._lanes.append(Lane(LaneKind.SERVER, "PostgreSQL", "" if backend is None else f"backend pid {backend}"))

    def _threads(self) -> list[tuple[int, int | None]]:
        """Processes and threads that have a part in it, in the order in which they come up."""
        found: dict[tuple[int, int | None], None] = {}
        sender = self._fault.sent_by
        for request in self._requests:
            if request.pid is not None:
                found[request.pid, request.tid] = None
        if sender is not None:
            found[sender.pid, sender.tid] = None
        acting = {pid for pid, _ in found}
        for culprit in self._fault.culprits:
            if culprit.pid is None or not self._takes_part(culprit):
                continue
            if culprit.role in (Role.OWNER, Role.HOLDER):
                if culprit.pid not in {pid for pid, _ in found}:
                    found[culprit.pid, None] = None
            elif culprit.tid is not None or culprit.pid not in acting:
                found[culprit.pid, culprit.tid] = None
        for chapter in self._story:
            if chapter.pid not in {pid for pid, _ in found}:
                found[chapter.pid, None] = None
        known = {pid for pid, tid in found if tid is not None}
        # What a process does in a thread that isn't known has a lane of its own only if somebody did something there.
        sent = {(request.pid, request.tid) for request in self._requests}
        shown = [(pid, tid) for pid, tid in found if tid is not None or pid not in known or (pid, tid) in sent]
        return shown + [one for one in self._others_of(known, shown) if one not in shown]

    def _others_of(self, known: set[int], shown: list[tuple[int, int | None]]) -> Iterator[tuple[int, int | None]]:
        """Who opened the connection, or forked, in processes of which threads are shown: often it is none of those."""
        openers = {(one.pid, one.tid) for one in self._fault.culprits if one.role is Role.OWNER}
        forked = {(one.parent, None) for one in self._story if one.event is Event.INHERITED}
        for pid, tid in sorted(openers | forked, key=str):
            # A process whose main thread alone is shown is meant by that.
            is_meant = tid is None and {one for one in shown if one[0] == pid} == {(pid, pid)}
            if pid in known and not is_meant:
                yield pid, tid

    def _takes_part(self, culprit: Culprit) -> bool:
        """Whoever holds other connections has no part in one that was refused."""
        return culprit.role is not Role.HOLDER or self._fault.kind is not Kind.CONNECTION_EXHAUSTION

    def _importance(self, thread: tuple[int, int | None]) -> tuple[bool, int, int]:
        pid, tid = thread
        sender = self._fault.sent_by
        sent_it = sender is not None and (pid, tid) == (sender.pid, sender.tid)
        ranks = [_RANK.index(one.role) for one in self._culprits.get(pid, ()) if one.tid == tid or tid is None]
        latest = max((request.n for request in self._requests if (request.pid, request.tid) == thread), default=0)
        return not sent_it, min(ranks, default=len(_RANK)), -latest

    def _place(
        self, thread: tuple[int, int | None], threads: list[tuple[int, int | None]]
    ) -> tuple[bool, int, int, int]:
        """How far to the right a lane stands: whoever opened the connection first, an intruder last, kin together."""
        pid, tid = thread
        ranks = [_ORDER.index(one.role) for one in self._culprits.get(pid, ()) if one.role is not Role.HOLDER]
        first = next(n for n, one in enumerate(threads) if one[0] == pid)
        is_intruder = any(one.role in (Role.INTRUDER, Role.CLOSER) for one in self._culprits.get(pid, ()))
        rank = len(_ORDER) if is_intruder else min(ranks, default=len(_ORDER) - 1)
        own = [_ORDER.index(one.role) for one in self._culprits.get(pid, ()) if one.tid == tid]
        return pid != self._owner, rank, first, min(own, default=0 if tid is None else len(_ORDER))

    def _lane(self, pid: int, tid: int | None) -> Lane:
        people = self._culprits.get(pid, [])
        process: Process | None = next((one.process for one in people if one.process is not None), None)
        threads = [one[1] for one in self._threads() if one[0] == pid]

        def is_meant(whose: int | None) -> bool:
            # What is known of the process alone stands where it has a lane.
            return whose == tid or (whose not in threads and (tid is None or (whose is None and None not in threads)))

        roles = tuple(dict.fromkeys(one.role for one in people if is_meant(one.tid)))
        name = next((one.thread_name for one in people if one.tid == tid and one.thread_name), None)
        # The main thread is called what its process is.
        called = f' "{shorten(name, LABEL)}"' if name is not None and tid != pid else ""
        thread = "" if tid is None or threads == [pid] else f"thread {tid}{called}"
        program = "" if process is None else shorten(process_label(process), LABEL)
        return Lane(LaneKind.CLIENT, f"pid {pid}", program, thread, pid, tid, roles)

    def _needs_stranger(self) -> bool:
        fault = self._fault
        sent = fault.message is not None and fault.message.direction is Direction.FRONTEND
        nobody = not self._by_thread and self._others is None
        unknown = (sent and fault.sent_by is None) or any(request.pid is None for request in self._requests)
        return nobody or unknown or self._owner is None

    def _of(self, pid: int | None, tid: int | None = None) -> int:
        """The lane of a thread, or of the first that is known of its process."""
        lane = self._by_thread.get((pid, tid))
        if lane is None and pid is not None:
            lane = next((n for n, one in enumerate(self._lanes) if one.pid == pid), self._others)
        if lane is None:
            lane = self._by_thread.get((None, None))
        return 0 if lane is None else lane

    def _all_of(self, pid: int) -> tuple[int, ...]:
        """The lanes of a process: of its threads, if any are known."""
        lanes = [n for n, lane in enumerate(self._lanes) if lane.pid == pid]
        threads = [n for n in lanes if self._lanes[n].tid is not None]
        return tuple(threads or lanes) or (self._of(pid),)

    # Steps

    def _tell(self) -> None:
        fault = self._fault
        events: list[tuple[float, int, int, Request | None, Step]] = []
        opened_at = fault.session.opened_at
        opener = self._of(self._owner, next((c.tid for c in fault.culprits if c.role is Role.OWNER), None))
        if self._owner is not None:
            self._since[self._owner] = opened_at
        events.append((opened_at, 0, 0, None, Step(What.OPENED, opened_at, opener, (self._server,), "connects")))
        untimed: list[Step] = []
        for n, chapter in enumerate(self._story):
            if chapter.event is Event.OPENED or chapter.event is Event.LEFT:
                continue
            lanes = self._all_of(chapter.pid)
            if chapter.event is Event.INHERITED:
                source = None if chapter.parent is None else self._of(chapter.parent)
                if source in lanes:
                    source = None
                text = "inherits the open connection" if source is not None else "has inherited the open connection"
                step = Step(What.INHERITED, self._forked_at(chapter), source, lanes, text, roughly=True)
            else:
                step = Step(What.RECEIVED, chapter.at, None, lanes, "has the connection too: it was handed over")
            if step.at is None:
                untimed.append(step)
                self._since.setdefault(chapter.pid, opened_at)
            else:
                events.append((step.at, 1, n, None, step))
                self._since.setdefault(chapter.pid, step.at)
        for request in self._requests:
            events.append((request.at, 2, request.n, request, self._request(request)))
            if request.pid is not None:
                self._since[request.pid] = min(request.at, self._since.get(request.pid, request.at))
        events.sort(key=lambda event: event[:3])
        self._put(events)
        # When that was isn't known; that it was by now is.
        self._steps[1:1] = untimed
        self._tell_the_end()

    def _put(self, events: list[tuple[float, int, int, Request | None, Step]]) -> None:
        """Put steps down in order, each answer where it must have been."""
        due: list[Request] = []
        for *_, request, step in events:
            if request is not None and request.at_rest:
                self._steps += [self._answer(one, request.at) for one in due if one.state not in OUTSTANDING]
                due = []
            if request is not None:
                due.append(request)
            self._steps.append(step)
        if len(due) == 1 and due[0].at_rest is not None and due[0].state not in OUTSTANDING:
            self._steps.append(self._answer(due[0], self._fault.at))
            due = []
        if any(one.state not in OUTSTANDING for one in due):
            self._unknown.append(
                "In which order some of the answers came isn't known: those requests say what had become of them."
            )
        # Only a request whose answer isn't drawn has to say what had become of it.
        states = {one.n: _STATES[one.state] for one in due}
        self._steps = [
            step._replace(detail=states.get(step.n or 0, "")) if step.what is What.REQUEST else step
            for step in self._steps
        ]

    def _forked_at(self, chapter: Chapter) -> float | None:
        """By when a process was forked: in the ticks in which it seems to have begun, but before it sent anything."""
        if chapter.at is None:
            return None
        sent = [request.at for request in self._requests if request.pid == chapter.pid]
        return max(self._fault.session.opened_at, min([chapter.at + TICK, self._fault.at, *sent]))

    def _request(self, request: Request) -> Step:
        sql = "" if request.sql is None else shorten(" ".join(request.sql.split()), SQL)
        return Step(
            What.REQUEST,
            request.at,
            self._of(request.pid, request.tid),
            (self._server,),
            f"sends request {request.n}: {_message_names(request.messages)}",
            sql=sql,
            n=request.n,
        )

    def _answer(self, request: Request, by: float) -> Step:
        """The answer to a request, which had come by a time."""
        sender = self._of(request.pid, request.tid)
        others = [pid for pid, since in self._since.items() if pid != request.pid and since <= by]
        lanes = [lane for pid in others for lane in self._all_of(pid)]
        own = self._all_of(request.pid) if request.pid is not None else (sender,)
        text = "an error, the answer" if request.state is RequestState.FAILED else "the answer"
        if request.state is RequestState.SKIPPED:
            text = "nothing but the end of an answer"
        readers = tuple(dict.fromkeys((sender, *own, *lanes)))
        return Step(What.ANSWER, None, self._server, readers, f"{text} to request {request.n}", n=request.n)

    def _tell_the_end(self) -> None:
        fault = self._fault
        for chapter in self._story:
            if chapter.event is Event.LEFT:
                lanes = self._all_of(chapter.pid)
                self._steps.append(Step(What.LEFT, chapter.at, None, lanes, "has let go of the connection by now"))
        message = fault.message
        stopped = fault.action in (Action.REJECTED, Action.DROPPED)
        if message is None:
            lanes = self._concerned()
            self._steps.append(Step(What.FAULT, fault.at, None, lanes, fault.reason or fault.summary, offending=True))
        elif message.direction is Direction.FRONTEND:
            sender = fault.sent_by
            source = self._of(None) if sender is None else self._of(sender.pid, sender.tid)
            text = f"sends {message.name}"
            self._steps.append(
                Step(
                    What.MESSAGE, fault.at, source, (self._server,), text, fault.reason, offending=True, stopped=stopped
                )
            )
        else:
            owner = self._of(self._owner)
            text = f"sends {message.name}"
            targets = self._concerned() or (owner,)
            self._steps.append(
                Step(What.MESSAGE, fault.at, self._server, targets, text, fault.reason, offending=True, stopped=stopped)
            )
        due = sum(request.state in OUTSTANDING for request in self._requests)
        sharers = self._concerned()
        if fault.action is Action.REJECTED:
            text = "pgguard ends the session with an error that says who did it, before anybody gets another's answer"
            self._steps.append(Step(What.OUTCOME, None, self._guard, sharers, text))
        elif fault.action is Action.DROPPED:
            text = "pgguard has dropped the message, and the session goes on"
            self._steps.append(Step(What.OUTCOME, None, self._guard, sharers, text))
        elif fault.kind in _SHARED and due and len(sharers) > 1 and message is not None:
            text = "from here on, whoever reads first gets the next answer, no matter whose it is"
            self._steps.append(Step(What.REMARK, None, None, sharers, text))
        if fault.over and fault.action is not Action.REJECTED:
            self._steps.append(Step(What.OUTCOME, None, None, sharers, "the session has ended with this"))

    def _concerned(self) -> tuple[int, ...]:
        """The lanes of those who did it, or suffer it; of nobody in particular the opener's."""
        roles = (Role.INTRUDER, Role.REQUESTER, Role.CLOSER)
        people = [one for one in self._fault.culprits if one.pid is not None and one.role in roles]
        return tuple(sorted({self._of(one.pid, one.tid) for one in people})) or (self._of(self._owner),)

    def _remarks(self) -> Iterator[str]:
        fault = self._fault
        if any(step.what is What.ANSWER for step in self._steps):
            yield "When an answer was complete isn't recorded, only before which request."
        if any(step.roughly for step in self._steps):
            earlier = f"up to {duration(TICK)} before"
            yield f"A fork had happened by the time that is shown, {earlier}: maybe before what stands above it."
        yield from self._unknown
        if any(step.what is What.ANSWER and len(step.targets) > 1 for step in self._steps):
            yield "Who has read an answer can't be seen: whoever has the connection open could."
        if any(request.pid is None for request in self._requests):
            yield "Who sent some of the requests isn't known."
        if self._requests and (before := self._requests[0].n - 1) > 0:
            earlier = counted(before, "earlier request is", "earlier requests are")
            yield f"{earlier} not shown."
        if fault.unnamed:
            yield f"{counted(fault.unnamed, 'more process has', 'more processes have')} a part in it."
        if fault.by is Party.SERVER:
            yield "This came from the server, or from something in front of it, and not from the client."


_STATES: Final = {
    RequestState.WAITING: "still waiting for its answer at the time of the fault",
    RequestState.ANSWERING: "its answer had begun at the time of the fault, and wasn't complete",
    RequestState.ANSWERED: "answered by the time of the fault",
    RequestState.FAILED: "answered with an error by the time of the fault",
    RequestState.SKIPPED: "skipped by the server, because of an error before it",
}


def _message_names(letters: str) -> str:
    names = [_NAMES.get(letter, "…" if letter == "…" else "a message") for letter in letters]
    if len(names) > _MESSAGES:
        names = [*names[: _MESSAGES - 1], f"and {len(names) - _MESSAGES + 1} more"]
    return ", ".join(names) or "a message"


def _fold(steps: list[Step]) -> Iterator[Step | Gap]:
    """The steps, with what lies between them where that is long."""
    last: float | None = None
    for step in steps:
        if step.at is not None:
            if last is not None and step.at - last >= IDLE:
                yield Gap(step.at - last)
            last = step.at if last is None else max(last, step.at)
        yield step
