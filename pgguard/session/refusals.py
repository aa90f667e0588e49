"""Logins that a server refuses because no slot is left, SQLSTATE 53300: which limit it was, as the server says.

An ErrorResponse names the function that raised it (field ``R``, "Error and Notice Message Fields" in the PostgreSQL
documentation), which is the same whatever language the server speaks (``lc_messages``) and nearly the same in all its
versions; its text is neither. Poolers and other servers that use the SQLSTATE name no function of PostgreSQL's: which
limit they mean isn't known then.
"""

from __future__ import annotations

from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from pgguard.session.verdicts import Limit, Refusal

if TYPE_CHECKING:
    from collections.abc import Mapping

TOO_MANY_CONNECTIONS: Final = "53300"
"""``too_many_connections``: PostgreSQL documentation, appendix A."""
REFUSAL_LOOK: Final = 1024
"""Bytes of an ErrorResponse that are looked at while a login is answered: the function stands behind a text that may be
translated and name a role."""


class Replication(Enum):
    """What the parameter ``replication`` of a StartupMessage asks for: "Streaming Replication Protocol"."""

    NONE = "an ordinary session"
    PHYSICAL = "a WAL sender of no database"
    LOGICAL = "a WAL sender that is connected to a database too"


def replication_asked(value: str) -> Replication:
    """Read the parameter as ``ProcessStartupPacket()`` does: ``database``, or what ``parse_bool()`` takes for true."""
    if value == "database":
        return Replication.LOGICAL
    value = value.lower()
    asked = value in ("on", "1") or (value != "" and ("true".startswith(value) or "yes".startswith(value)))
    return Replication.PHYSICAL if asked else Replication.NONE


_LIMITS: Final[Mapping[str, Limit]] = MappingProxyType(
    {
        "ProcessStartupPacket": Limit.SERVER,  # up to 16: twice as many processes as max_connections, postmaster.c
        "BackendInitialize": Limit.SERVER,  # the same from 17 on, backend_startup.c
        "SharedInvalBackendInit": Limit.SERVER,  # up to 16, sinvaladt.c
        "InitProcess": Limit.SERVER,  # proc.c; of a WAL sender see refusal_of()
        "InitPostgres": Limit.RESERVED,  # postinit.c
        "InitializeSessionUserId": Limit.ROLE,  # miscinit.c
        "CheckMyDatabase": Limit.DATABASE,  # postinit.c
        "InitWalSenderSlot": Limit.WAL_SENDERS,  # up to 11, walsender.c
    }
)
"""By the function that refuses."""


def refusal_of(
    fields: Mapping[str, str], *, user: str | None, database: str | None, replication: Replication
) -> Refusal:
    """Tell which limit a login was refused for.

    Args:
        fields: The ErrorResponse's, by their codes.
        user: The StartupMessage's.
        database: The StartupMessage's.
        replication: The StartupMessage's.
    """
    routine = fields.get("R", "")
    limit = _LIMITS.get(routine)
    if routine == "InitProcess" and replication is not Replication.NONE:
        # WAL senders have had slots of their own since 12; a setting's name isn't translated.
        limit = Limit.WAL_SENDERS if "max_wal_senders" in fields.get("M", "") else None
    return Refusal(limit, {Limit.ROLE: user, Limit.DATABASE: database}.get(limit) if limit else None)


def reason_of(refusal: Refusal, text: str) -> str:
    """Why a connection was refused, as a verdict's reason.

    Args:
        refusal: Why.
        text: What the server said, for what it doesn't say otherwise.
    """
    name, limit = refusal.name, refusal.limit
    why = f'"{text}" (it doesn\'t say which limit it means)' if limit is None else _REASONS[limit].format(name=name)
    return f"the server refused the connection: {why}"


_REASONS: Final[Mapping[Limit, str]] = MappingProxyType(
    {
        Limit.SERVER: "all its slots are taken (max_connections)",
        Limit.RESERVED: "all its slots are taken, except reserved ones (superuser_reserved_connections, "
        "reserved_connections)",
        Limit.ROLE: 'role "{name}" has as many connections as its CONNECTION LIMIT allows',
        Limit.DATABASE: 'database "{name}" has as many connections as its CONNECTION LIMIT allows',
        Limit.WAL_SENDERS: "all its slots for replication are taken (max_wal_senders)",
    }
)
