"""What is done about a fault."""

from __future__ import annotations

import re

import pytest

from pgguard.faults.catalogue import CATALOGUE, Severity
from pgguard.faults.policy import Action, KindAction, Mode, Policy, PolicyError
from pgguard.session.verdicts import Kind

ERROR, WARNING, INFO = Severity.ERROR, Severity.WARNING, Severity.INFO


@pytest.mark.parametrize(
    ("mode", "given", "kind", "severity", "action"),
    [
        (Mode.LOG, None, Kind.SHARED_BY_PROCESSES, ERROR, Action.LOGGED),
        (Mode.REJECT, None, Kind.SHARED_BY_PROCESSES, ERROR, Action.REJECTED),
        (Mode.REJECT, None, Kind.REQUEST_WHILE_BUSY, WARNING, Action.LOGGED),
        (Mode.REJECT, None, Kind.INHERITED_CONNECTION, WARNING, Action.LOGGED),
        (Mode.REJECT, None, Kind.UNTRACKED, INFO, Action.LOGGED),
        # The client has gone: there is nobody to be rejected.
        (Mode.REJECT, None, Kind.UNCLEAN_CLOSE, ERROR, Action.LOGGED),
        (Mode.REJECT, KindAction.LOG, Kind.SHARED_BY_PROCESSES, ERROR, Action.LOGGED),
        (Mode.LOG, KindAction.REJECT, Kind.SHARED_BY_PROCESSES, ERROR, Action.REJECTED),
        (Mode.LOG, KindAction.REJECT, Kind.INHERITED_CONNECTION, WARNING, Action.REJECTED),
        (Mode.REJECT, KindAction.DROP, Kind.MESSAGE_WHILE_IDLE, ERROR, Action.DROPPED),
        (Mode.REJECT, KindAction.IGNORE, Kind.SHARED_BY_PROCESSES, ERROR, None),
    ],
)
def test_decisions(mode: Mode, given: KindAction | None, kind: Kind, severity: Severity, action: Action | None) -> None:
    per_kind = {} if given is None else {kind: given}
    assert Policy(mode, per_kind).decide(kind, severity) is action


@pytest.mark.parametrize("kind", [kind for kind in Kind if not CATALOGUE[kind].can_drop])
def test_drop_is_refused_where_it_would_break_the_session(kind: Kind) -> None:
    says = f"^{kind} can't be dropped, only message-while-idle and foreign-terminate can: use (.*)"
    with pytest.raises(PolicyError, match=says) as refused:
        Policy(per_kind={kind: KindAction.DROP})
    for instead in re.findall(r"log|reject|ignore", str(refused.value).partition(": use ")[2]):
        Policy(per_kind={kind: KindAction(instead)})


@pytest.mark.parametrize("kind", [Kind.UNCLEAN_CLOSE, Kind.CONNECTION_EXHAUSTION, Kind.UNTRACKED])
def test_reject_is_refused_where_it_would_do_nothing(kind: Kind) -> None:
    with pytest.raises(PolicyError, match=f"^{kind} can't be rejected"):
        Policy(per_kind={kind: KindAction.REJECT})
