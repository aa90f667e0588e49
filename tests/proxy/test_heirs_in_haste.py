"""Whoever inherits a connection is named even if the guard has no time to look around for others that have it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from pgguard.attribution.evidence import Driver
from pgguard.attribution.evidence import Evidence as Strength
from pgguard.attribution.findings import Findings
from pgguard.faults.culprits import find_culprits, last_holder
from pgguard.faults.docket import Docket
from pgguard.proxy.investigation import Evidence, Investigation, known_at_once
from pgguard.proxy.sightings import Sightings
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


def test_heirs_that_the_watch_has_seen_are_named_though_there_is_no_time_for_a_look() -> None:
    sightings = Sightings()
    sightings.note_holders((MASTER, WORKER_0), (MASTER, WORKER_0))
    session: Any = SimpleNamespace(
        senders={},
        opening=SimpleNamespace(opener=MASTER, runtime=None, evidence=Strength.SOLE_HOLDER, connected=None),
        connected=None,
        driver=Driver.LIBPQ,
        last_sole_holder=None,
        opening_stack=None,
        sightings=sightings,
    )
    inherited = verdict(Kind.INHERITED_CONNECTION)
    culprits = find_culprits(inherited, known_at_once(session, inherited))
    assert {one.pid for one in culprits} == {MASTER.pid, WORKER_0.pid}
    assert known_at_once(session, verdict(Kind.FOREIGN_TERMINATE)).holders is None, "they may have let go by now"


@pytest.mark.parametrize(("kind", "closer"), [(Kind.UNCLEAN_CLOSE, WORKER_0.pid), (Kind.FOREIGN_TERMINATE, None)])
def test_who_had_a_connection_last_is_known_when_there_is_time_for_a_look(kind: Kind, closer: int | None) -> None:
    """The watch has seen the heir alone with it, and then nobody, for longer than it remembers."""
    sightings = Sightings()
    sightings.note_holders((WORKER_0,), (WORKER_0,))
    session: Any = SimpleNamespace(
        senders={},
        opening=SimpleNamespace(opener=MASTER, runtime=None, evidence=None, connected=None),
        connected=None,
        driver=None,
        last_sole_holder=None,
        opening_stack=None,
        sightings=sightings,
    )
    ended = verdict(kind)
    evidence = Evidence(known_at_once(session, ended))
    session.sightings = Sightings()
    witness: Any = HurriedWitness()
    found = Investigation(witness, session, ended, evidence, (), 0.25, Docket(), account=lambda _: None)
    found.note_known()
    assert last_holder(ended, evidence.findings) == (closer or MASTER.pid)
    assert bool(evidence.findings.departed) is (closer is not None)
