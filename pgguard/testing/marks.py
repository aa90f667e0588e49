"""What is to be made of a test's faults: ``@pytest.mark.pgguard``, options and settings, checked as they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterable

NAME: Final = "pgguard"
FAIL_ON: Final = ("error", "warning", "never")
"""From which severity on a fault fails its test."""
_RANKS: Final = {"info": 0, "warning": 1, "error": 2, "never": 3}
_SAYS: Final = ("allow", "fail_on")
"""What the marker can say."""


class Choice(NamedTuple):
    """What is made of a test's faults."""

    allowed: frozenset[str]
    """Kinds that don't fail it."""
    fail_on: str

    def fails(self, kind: str, severity: str) -> bool:
        """Whether a fault fails it."""
        return kind not in self.allowed and _RANKS[severity] >= _RANKS[self.fail_on]


USUAL: Final = Choice(frozenset(), "error")


def choice_of(item: pytest.Item, usual: Choice) -> Choice:
    """What the markers of a test, its class and its module say; where they don't, ``usual`` holds.

    Raises:
        pytest.UsageError: They say something that there isn't.
    """
    allowed, fail_on = usual.allowed, None
    for mark in item.iter_markers(NAME):
        where = f"{item.nodeid}: @pytest.mark.{NAME}"
        if mark.args:
            raise pytest.UsageError(f"{where}: write what it says by name, as in allow={mark.args[0]!r}")
        for name, value in mark.kwargs.items():
            if name not in _SAYS:
                raise pytest.UsageError(f"{where}: there is no {name!r}: it can say {' and '.join(_SAYS)}")
            if name == "allow":
                allowed |= kinds(value, f"{where}: allow")
            elif fail_on is None:  # the nearest comes first
                fail_on = severity(value, f"{where}: fail_on")
    return Choice(allowed, fail_on or usual.fail_on)


def kinds(value: object, where: str) -> frozenset[str]:
    """Kinds of faults, of one or several names.

    Raises:
        pytest.UsageError: One of them isn't one.
    """
    # What a test imports for itself isn't imported for it.
    from pgguard.faults.catalogue import kind_hint  # noqa: PLC0415 - likewise
    from pgguard.session.verdicts import Kind  # noqa: PLC0415

    names: Iterable[object] = value if isinstance(value, list | tuple | set | frozenset) else [value]
    found = set()
    for name in names:
        try:
            found.add(Kind(str(name)).value)
        except ValueError:
            raise pytest.UsageError(
                f"{where}: there is no kind of fault {str(name)!r}: {kind_hint(str(name))}"
            ) from None
    return frozenset(found)


def severity(value: object, where: str) -> str:
    """From which severity on a fault fails its test.

    Raises:
        pytest.UsageError: It isn't one.
    """
    if value not in FAIL_ON:
        raise pytest.UsageError(f"{where}: {value!r} is none of {', '.join(FAIL_ON)}")
    return str(value)
