"""What is done about a fault: log it, reject its session, drop its message, or nothing at all."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from pgguard.faults.catalogue import CATALOGUE, Severity
from pgguard.faults.text import listed
from pgguard.session.verdicts import Kind

if TYPE_CHECKING:
    from collections.abc import Mapping


class Mode(StrEnum):
    """What happens to the session of a fault whose kind the configuration doesn't mention."""

    LOG = "log"
    REJECT = "reject"


class KindAction(StrEnum):
    """What the configuration can say about one kind of fault."""

    LOG = "log"
    REJECT = "reject"
    IGNORE = "ignore"
    DROP = "drop"


class Action(StrEnum):
    """What was done, as it stands in the record."""

    LOGGED = "logged"
    REJECTED = "rejected"
    DROPPED = "dropped"


def possible_actions(kind: Kind) -> tuple[Action, ...]:
    """What can be done about a kind of fault, however the guard is configured."""
    entry = CATALOGUE[kind]
    can = {Action.LOGGED: True, Action.REJECTED: entry.can_reject, Action.DROPPED: entry.can_drop}
    return tuple(action for action in Action if can[action])


class PolicyError(ValueError):
    """The configuration asks for what can't be done; the message is one line that says what to change."""


@dataclass(frozen=True, slots=True)
class Policy:
    """The mode, and the actions that override it for single kinds.

    In mode ``reject`` an error rejects its session; warnings and info are only recorded. An action given for a kind is
    the user's own judgement about that kind and holds whatever the severity: ``reject`` for ``inherited-connection``
    rejects, though it is only a warning, and ``log`` spares a kind in mode ``reject``.

    Raises:
        PolicyError: ``drop`` or ``reject`` is asked for a kind that can't be dropped or rejected. A client that has
            gone can't be told, and a session that the guard has lost track of has no place for an ErrorResponse.
    """

    mode: Mode = Mode.LOG
    per_kind: Mapping[Kind, KindAction] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind, action in self.per_kind.items():
            if action is KindAction.DROP and not CATALOGUE[kind].can_drop:
                droppable = listed([k for k in Kind if CATALOGUE[k].can_drop])
                instead = "log, reject or ignore" if CATALOGUE[kind].can_reject else "log or ignore"
                raise PolicyError(f"{kind} can't be dropped, only {droppable} can: use {instead}")
            if action is KindAction.REJECT and not CATALOGUE[kind].can_reject:
                raise PolicyError(f"{kind} can't be rejected: use log or ignore")

    def decide(self, kind: Kind, severity: Severity) -> Action | None:
        """What to do about a fault; ``None``: take no notice of it."""
        match self.per_kind.get(kind):
            case None:
                graver = self.mode is Mode.REJECT and severity is Severity.ERROR and CATALOGUE[kind].can_reject
                return Action.REJECTED if graver else Action.LOGGED
            case KindAction.LOG:
                return Action.LOGGED
            case KindAction.REJECT:
                return Action.REJECTED
            case KindAction.DROP:
                return Action.DROPPED
            case KindAction.IGNORE:
                return None
