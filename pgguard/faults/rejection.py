"""What a client is told when its session is rejected: the texts of a FATAL ErrorResponse."""

from __future__ import annotations

from typing import Final, NamedTuple

from pgguard.faults.catalogue import CATALOGUE
from pgguard.faults.fault import Fault, Request, Role
from pgguard.faults.text import listed, named, printable, shorten
from pgguard.session.verdicts import OUTSTANDING

SQLSTATE: Final = "08P01"
"""protocol_violation: PostgreSQL documentation, appendix A."""

_CLOSING: Final = "terminating connection"
"""PostgreSQL's own words, by which SQLAlchemy knows in psycopg2's errors that a connection is of no more use."""
PLAIN_REJECTION: Final = f"pgguard: {_CLOSING}: the connection was misused"
"""The message for a client of which nothing more can be told than that."""
_SQL_LENGTH: Final = 200
_REQUESTS: Final = 3

_ROLES: Final = {
    Role.REQUESTER: ("used this connection before", "used this connection before"),
    Role.OWNER: ("opened it", "opened it"),
    Role.HOLDER: ("has it open as well", "have it open as well"),
}


class Rejection(NamedTuple):
    """The fields M, D and H of an ErrorResponse: single lines, no control characters."""

    message: str
    detail: str
    hint: str


def rejection(fault: Fault) -> Rejection:
    """What happened, who did it, and what to change, for whoever reads the error: in psql or in a log."""
    told = [f"This is {fault.kind}: {CATALOGUE[fault.kind].title}."]
    outstanding = [request for request in fault.requests if request.state in OUTSTANDING]
    told.extend(_outstanding(request) for request in outstanding[:_REQUESTS])
    owners = {culprit.pid for culprit in fault.culprits if culprit.role is Role.OWNER}
    for role, (one, many) in _ROLES.items():
        # That the owner has it open goes without saying.
        unsaid = {None} if role is not Role.HOLDER else {None, *owners}
        people = [named(c.pid, c.process) for c in fault.culprits if c.role is role and c.pid not in unsaid and c.pid]
        if people:
            told.append(f"{listed(people)} {one if len(people) == 1 else many}.")
    if fault.unnamed:
        told.append(f"And {fault.unnamed} more.")
    cancelled = " and its query cancelled" if outstanding else ""
    told.append(f"The session was closed{cancelled} (pgguard fault {fault.id}).")
    return Rejection(
        message=f"pgguard: {_CLOSING}: {fault.summary}",
        detail=printable(" ".join(told)),
        hint=f"{fault.advice.title}. {fault.advice.text}",
    )


def _outstanding(request: Request) -> str:
    sql = "" if request.sql is None else f": {shorten(request.sql, _SQL_LENGTH)}"
    sender = "" if request.pid is None else f" (sent by pid {request.pid})"
    return f"Request {request.n} was outstanding{sql}{sender}."
