"""Advice on connections that are refused because no slot is left: by the limit, and by what those that have them do.

What a framework's own advice says about the size of its pool holds whatever the limit. Connections that mostly sit idle
in a transaction are another matter: they are kept, not needed, and no pool is too large for that.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from pgguard.faults.advice import advice_for
from pgguard.faults.catalogue import Advice
from pgguard.session.verdicts import Kind, Limit

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pgguard.attribution.findings import Slots
    from pgguard.attribution.runtime import Runtime

_DOCUMENTATION: Final = "https://www.postgresql.org/docs/current/"

_IN_TRANSACTIONS: Final = (
    "Most of the connections that count toward the limit sat idle in a transaction, and nobody else can use one of "
    "these until its transaction ends."
)
_IDLE: Final = (
    "Most of the connections that count toward the limit sat idle: the pools are larger than they need to be."
)

_WAL_SENDERS: Final = Advice(
    "Count the replication connections",
    "Each standby, each pg_receivewal, each logical subscription and each other reader of a replication slot takes one "
    "of max_wal_senders, and pg_basebackup with --wal-method=stream takes two: pg_stat_replication shows who is "
    "connected. One that was cut off keeps its slot until wal_sender_timeout. If you need more, raise "
    "max_wal_senders, which takes a restart.",
    sources=(f"{_DOCUMENTATION}runtime-config-replication.html#GUC-MAX-WAL-SENDERS",),
)

_LIMITS: Final[Mapping[Limit, Advice]] = MappingProxyType(
    {
        Limit.RESERVED: Advice(
            "Make all pools together fit into max_connections",
            "The last slots are reserved for administrators (superuser_reserved_connections and, since PostgreSQL 16, "
            "reserved_connections), so the pools have to fit into max_connections minus those.",
            sources=(f"{_DOCUMENTATION}runtime-config-connection.html#GUC-SUPERUSER-RESERVED-CONNECTIONS",),
        ),
        Limit.ROLE: Advice(
            "Make the pools of this role fit into its limit",
            "The role's own limit was reached, which is independent of max_connections: SELECT rolconnlimit FROM "
            "pg_roles shows it, ALTER ROLE … CONNECTION LIMIT sets it, and -1 means no limit. All connections of this "
            "role count, to any database.",
            sources=(f"{_DOCUMENTATION}sql-alterrole.html",),
        ),
        Limit.DATABASE: Advice(
            "Make the pools of this database fit into its limit",
            "The database's own limit was reached, which is independent of max_connections: SELECT datconnlimit FROM "
            "pg_database shows it, ALTER DATABASE … CONNECTION LIMIT sets it, and -1 means no limit. All connections "
            "to this database count, of any role.",
            sources=(f"{_DOCUMENTATION}sql-alterdatabase.html",),
        ),
    }
)

CASES: Final[Mapping[str, Advice]] = MappingProxyType(
    {
        "If only reserved slots are left": _LIMITS[Limit.RESERVED],
        "If it is a role's limit": _LIMITS[Limit.ROLE],
        "If it is a database's limit": _LIMITS[Limit.DATABASE],
        "If it is the limit for replication": _WAL_SENDERS,
    }
)
"""The advice there is for other limits than the server's, by the limit."""

_POOLS: Final = (
    "Multiply pool size by processes by hosts, allow for deployments, and size the pools so that the total stays below "
    "the limit: a process needs as many connections as it has threads that run queries at once. A process that has "
    "many more connections than its pool's size is leaking them."
)


def advice_on_exhaustion(limit: Limit | None, slots: Slots | None, runtimes: Sequence[Runtime]) -> Advice:
    """What to change when the server refuses connections.

    Args:
        limit: The limit that was reached; ``None`` if that isn't known.
        slots: What the connections that count were doing, as far as they go through the guard.
        runtimes: What the processes that hold them run, the most telling first.
    """
    if limit is Limit.WAL_SENDERS:
        return _WAL_SENDERS
    if slots is not None and 2 * slots.idle_in_transaction > slots.connections:
        advice = advice_for(Kind.IDLE_IN_TRANSACTION, runtimes)
        return advice._replace(text=f"{_IN_TRANSACTIONS} {advice.text}")
    general = advice_for(Kind.CONNECTION_EXHAUSTION, ())
    advice = advice_for(Kind.CONNECTION_EXHAUSTION, runtimes)
    about = None if limit is None else _LIMITS.get(limit)
    texts = [advice.text]
    if about is not None:
        if advice == general:
            advice = advice._replace(title=about.title, sources=())
            texts = [_POOLS]
        texts.insert(0, about.text)
        advice = advice._replace(sources=(*about.sources, *advice.sources))
    if slots is not None and 2 * slots.idle > slots.connections:
        texts.insert(0, _IDLE)
    return advice._replace(text=" ".join(texts))
