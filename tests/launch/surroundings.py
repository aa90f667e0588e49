"""An environment's rewriting, as the tests of this directory ask for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pgguard.launch.environment import Rewritten, rewrite
from pgguard.proxy.addresses import Address, TcpAddress, UnixAddress, Upstream

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

DB = TcpAddress("db.internal", 5432)
HERE = TcpAddress("localhost", 5432)
SOCKET = UnixAddress("/srv/pg", 5432)
GUARD = TcpAddress("127.0.0.1", 40123)
GUARD_ON_UNIX = UnixAddress("/run/guard dir", 6000)
PRIVATE = Path("/nowhere/private")

NAMES = {"db.internal": {"10.0.0.5"}, "db": {"10.0.0.5"}, "mine": {"127.0.0.1", "::1"}, "other": {"10.0.0.6"}}
"""What the DNS knows."""


def resolve(name: str) -> frozenset[str]:
    return frozenset(NAMES.get(name, set()))


def rewritten(
    environment: Mapping[str, str],
    *upstream: Address,
    guard: Sequence[Address] = (GUARD,),
    add: Sequence[str] = (),
    keep: Sequence[str] = (),
) -> Rewritten:
    """With a server at ``db.internal:5432`` unless another one is given, and with no file in the user's directory."""
    server = Upstream(upstream or (DB,), 10.0)
    before = {"HOME": "/nowhere", "PGSYSCONFDIR": "/nowhere", **environment}
    result = rewrite(before, server, guard, directory=PRIVATE, add=add, keep=keep, resolve=resolve)
    assert set(result.names) == {
        name for name in {*before, *result.environment} if before.get(name) != result.environment.get(name)
    }
    return result


def value(text: str, *upstream: Address, name: str = "SOMETHING", guard: Sequence[Address] = (GUARD,)) -> str:
    """What becomes of a variable's value where ``PGHOST`` is another server."""
    elsewhere = {"PGHOST": "elsewhere"} if "PG" not in name else {}
    return rewritten({name: text, **elsewhere}, *upstream, guard=guard).environment[name]
