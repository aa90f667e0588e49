"""What a client is told when its session is rejected: the texts of a FATAL ErrorResponse."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from pgguard.faults.catalogue import CATALOGUE
from pgguard.faults.fault import Fault, Request, Role
from pgguard.faults.text import listed, named, printable, shorten
from pgguard.session.verdicts import OUTSTANDING

if TYPE_CHECKING:
    from collections.abc import Iterator

SQLSTATE: Final = "08P01"
"""protocol_violation: PostgreSQL documentation, appendix A."""

_CLOSING: Final = "terminating connection"
"""PostgreSQL's own words, by which SQLAlchemy knows in psycopg2's errors that a connection is of no more use."""
PLAIN_REJECTION: Final = f"pgguard: {_CLOSING}: the connection was misused"
"""The message for a client of which nothing more can be told than that."""
_SQL_LENGTH: Final = 200
_REQUESTS: Final = 3


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
    told.extend(_others(fault))
    if fault.unnamed:
        told.append(f"And {fault.unnamed} more process{'' if fault.unnamed == 1 else 'es'}.")
    cancelled = " and its query cancelled" if outstanding else ""
    told.append(f"The session was closed{cancelled} (pgguard fault {fault.id}).")
    return Rejection(
        message=f"pgguard: {_CLOSING}: {fault.summary}",
        detail=printable(" ".join(told)),
        hint=f"{fault.advice.title}. {fault.advice.text}",
    )


def _others(fault: Fault) -> Iterator[str]:
    """Who else has to do with the connection, each process once. That the owner has it open goes without saying."""
    users, owners, holders = (
        {c.pid: named(c.pid, c.process) for c in fault.culprits if c.role is role and c.pid is not None}
        for role in (Role.REQUESTER, Role.OWNER, Role.HOLDER)
    )
    for pids, one, many in (
        (owners.keys() & users.keys(), *["opened this connection and used it before"] * 2),
        (users.keys() - owners.keys(), *["used this connection before"] * 2),
        (owners.keys() - users.keys(), *["opened this connection"] * 2),
        (
            holders.keys() - owners.keys() - users.keys(),
            "has this connection open as well",
            "have this connection open as well",
        ),
    ):
        names = [name for pid, name in (users | owners | holders).items() if pid in pids]
        if names:
            yield f"{listed(names)} {one if len(names) == 1 else many}."


def _outstanding(request: Request) -> str:
    sql = "" if request.sql is None else f": {shorten(request.sql, _SQL_LENGTH)}"
    sender = "" if request.pid is None else f" (sent by pid {request.pid})"
    return f"Request {request.n} was outstanding{sql}{sender}."
