"""A Puma cluster whose workers share the connection that their master opened, in the values that the rooms exchange."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pgguard.attribution.evidence import Driver, Evidence, Process
from pgguard.attribution.findings import Findings
from pgguard.attribution.threads import Sleep, Thread, Waiting
from pgguard.faults.build import build_fault
from pgguard.faults.fault import Fault, SessionFacts
from pgguard.faults.policy import Action
from pgguard.faults.sql import SqlMode
from pgguard.identity import Sender
from pgguard.session.verdicts import Direction, Kind, MessageSeen, RequestSeen, RequestState, Verdict

NOW = 1795348327.120402
"""2026-11-22T11:52:07.120402Z."""


def process(pid: int, ppid: int | None, *cmdline: str, name: str = "ruby", age: float = 9.0) -> Process:
    return Process(pid, round((NOW - age) * 100), NOW - age, name, cmdline, ppid)


MASTER = process(4864, 1, "puma 6.4.2 (tcp://0.0.0.0:9292) [app]", age=20)
WORKER_0 = process(4866, 4864, "puma: cluster worker 0: 4864 [app]")
WORKER_1 = process(4867, 4864, "puma: cluster worker 1: 4864 [app]", age=8)

FACTS = SessionFacts(
    id=3,
    user="app",
    database="app",
    application_name="puma",
    transport="tcp",
    client="127.0.0.1:53984",
    backend_pid=4865,
    opened_at=NOW - 12.5,
    tls=False,
)

QUERY = MessageSeen(Direction.FRONTEND, "Q", "Query", 61)
TERMINATE = MessageSeen(Direction.FRONTEND, "X", "Terminate", 5)
DATA_ROW = MessageSeen(Direction.BACKEND, "D", "DataRow", 30)

OUTSTANDING = RequestSeen(
    41, NOW - 0.001, "Q", b"SELECT 4866 AS pid", False, Sender(4866, 4871), RequestState.ANSWERING
)

OVERLAP = Verdict(
    Kind.SHARED_BY_PROCESSES,
    "while the answer to another process was outstanding",
    QUERY,
    (OUTSTANDING,),
    intruder=Sender(4867, 4880),
    requesters=(Sender(4866, 4871),),
    libpq="message type 0x54 arrived from server while idle",
    open_request=True,
)

KERNEL = Findings(
    opener=MASTER,
    opener_evidence=Evidence.SOLE_HOLDER,
    holders=(MASTER, WORKER_0, WORKER_1),
    senders={4866: WORKER_0, 4867: WORKER_1},
    driver=Driver.LIBPQ,
)


def verdict(kind: Kind, reason: str = "for a reason", **changes: Any) -> Verdict:
    """A verdict of which nothing is known but what is given."""
    given: dict[str, Any] = {"message": None, "requests": ()} | changes
    return Verdict(kind=kind, reason=reason, **given)


def asleep(who: Process, tid: int | None = None, *, switches: int = 1) -> Sleep:
    """A thread in its sleep; the main one unless said otherwise."""
    return Sleep(Thread(who.pid, who.started, who.pid if tid is None else tid, who.started), switches)


def waiting(who: Process, tid: int | None = None, **changes: Any) -> Waiting:
    """A thread that waits to read from the connection alone, as libpq does."""
    given: dict[str, Any] = {"name": "ruby", "call": "poll", "readable": True, "writable": False, "others": 0}
    given["within_libpq"] = True
    switches = changes.pop("switches", 1)
    return Waiting(asleep(who, tid, switches=switches), **(given | changes))


def fault(
    what: Verdict = OVERLAP,
    findings: Findings = KERNEL,
    *,
    facts: SessionFacts = FACTS,
    action: Action = Action.LOGGED,
    sql_mode: SqlMode = SqlMode.NORMALIZED,
    **changes: Any,
) -> Fault:
    """The fault of a verdict, number 7 unless said otherwise."""
    built = build_fault(what, facts, findings, fault_id=7, at=NOW, action=action, sql_mode=sql_mode)
    return replace(built, **changes)
