"""Whoever inherits a connection is named even if the guard has no time to look around for others that have it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from pgguard.attribution.findings import Findings
from pgguard.faults.docket import Docket
from pgguard.proxy.investigation import Evidence, Investigation
from pgguard.session.verdicts import Kind
from tests.faults.samples import MASTER, WORKER_0, WORKER_1, verdict

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pgguard.attribution.evidence import Process


class HurriedWitness:
    """Looks at those whom it is asked about; all of them have the connection open."""

    def holding(self, _: object, pids: Iterable[int], *, since: float | None) -> tuple[Process, ...]:
        assert since is None
        known = {one.pid: one for one in (MASTER, WORKER_0, WORKER_1)}
        return tuple(known[pid] for pid in pids)


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        (Kind.INHERITED_CONNECTION, (MASTER, WORKER_0, WORKER_1)),
        # Of this one it is the opener that matters.
        (Kind.IDLE_IN_TRANSACTION, (MASTER,)),
    ],
)
def test_heirs_that_the_watch_has_seen_are_looked_at_first(kind: Kind, named: tuple[Process, ...]) -> None:
    session: Any = SimpleNamespace(
        senders={},
        opening=None,
        connected=(MASTER.pid, None),
        driver=None,
        client_socket=object(),
        sightings=SimpleNamespace(holders=(WORKER_0, WORKER_1)),
    )
    evidence = Evidence(Findings())
    witness: Any = HurriedWitness()
    found = Investigation(witness, session, verdict(kind), evidence, (), 0.25, Docket(), account=lambda _: None)
    found.look_at_named()
    assert evidence.findings.holders == named
    assert not evidence.findings.holders_complete, "there may be others"
