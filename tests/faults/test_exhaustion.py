"""Advice on refused connections: by the limit, by what those that are held do, and by who holds them."""

from __future__ import annotations

import pytest

from pgguard.attribution.findings import Slots
from pgguard.attribution.runtime import Language, Library, Runtime
from pgguard.faults.advice import advice_for
from pgguard.faults.advice.exhaustion import advice_on_exhaustion
from pgguard.session.verdicts import Kind, Limit

SQLALCHEMY = Runtime(Language.PYTHON, None, frozenset({Library.SQLALCHEMY, Library.PSYCOPG}))
BUSY, IDLE, STUCK = Slots(10, 5, 5), Slots(10, 6, 0), Slots(10, 0, 6)


@pytest.mark.parametrize("limit", [None, Limit.SERVER])
@pytest.mark.parametrize("runtimes", [(), (SQLALCHEMY,)])
def test_of_the_servers_own_limit_the_pools_are_the_advice(limit: Limit | None, runtimes: tuple[Runtime, ...]) -> None:
    for slots in (None, BUSY):
        assert advice_on_exhaustion(limit, slots, runtimes) == advice_for(Kind.CONNECTION_EXHAUSTION, runtimes)


@pytest.mark.parametrize(
    ("limit", "says"),
    [
        (Limit.RESERVED, "superuser_reserved_connections"),
        (Limit.ROLE, "ALTER ROLE"),
        (Limit.DATABASE, "ALTER DATABASE"),
    ],
)
def test_of_another_limit_it_is_said_where_that_is_set(limit: Limit, says: str) -> None:
    general, special = advice_on_exhaustion(limit, None, ()), advice_on_exhaustion(limit, None, (SQLALCHEMY,))
    assert says in general.text
    assert says in special.text
    assert "pool size by processes" in general.text
    assert "pool_size" in special.text
    assert special.code == advice_for(Kind.CONNECTION_EXHAUSTION, (SQLALCHEMY,)).code


def test_wal_senders_have_no_pools() -> None:
    advice = advice_on_exhaustion(Limit.WAL_SENDERS, IDLE, (SQLALCHEMY,))
    assert "max_wal_senders" in advice.text
    assert "pool" not in advice.text


@pytest.mark.parametrize("limit", [None, *(limit for limit in Limit if limit is not Limit.WAL_SENDERS)])
def test_if_most_sit_idle_in_a_transaction_that_is_to_be_ended(limit: Limit | None) -> None:
    advice = advice_on_exhaustion(limit, STUCK, (SQLALCHEMY,))
    idle = advice_for(Kind.IDLE_IN_TRANSACTION, (SQLALCHEMY,))
    assert (advice.title, advice.code) == (idle.title, idle.code)
    assert advice.text.startswith("Most of the connections that count toward the limit sat idle in a transaction")


@pytest.mark.parametrize("limit", [None, Limit.SERVER, Limit.ROLE])
def test_if_most_sit_idle_the_pools_are_too_large(limit: Limit | None) -> None:
    assert "sat idle: the pools are larger" in advice_on_exhaustion(limit, IDLE, ()).text
