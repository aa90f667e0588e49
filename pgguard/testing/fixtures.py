"""What the fixtures ``pgguard`` and ``pgguard_session`` are."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import pytest

from pgguard.testing.marks import kinds

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pgguard.faults.fault import Fault
    from pgguard.testing.run import GuardedRun, Sighting

PATIENCE: Final = 10.0
"""Seconds for a fault to come that a test expects: some are noticed after a while."""


class TestsGuard:
    """The guard, as a test sees it: the fixture ``pgguard``.

    It tells of the test's own faults alone: of its set-up, as far as that is its own, and of its call so far.
    """

    __test__ = False  # it is no test, whatever it is called

    def __init__(self, run: GuardedRun) -> None:
        self._run = run

    @property
    def faults(self) -> tuple[Fault, ...]:
        """The faults so far, each kind of which has been judged that had come: the first of each cause.

        Those that were expected aren't among them.
        """
        return tuple(_fault(one) for one in self._run.faults_so_far())

    def expect_none(self) -> None:
        """Fail now if there has been a fault so far, however grave, that isn't mere information."""
        found = [one for one in self._run.faults_so_far() if one.severity != "info"]
        if found:
            pytest.fail(self._run.failure(found), pytrace=False)

    @contextmanager
    def expect(self, kind: str, *, within: float = PATIENCE) -> Iterator[list[Fault]]:
        """Expect a kind of fault of what is done in this context: it doesn't fail the test then, and its absence does.

        Args:
            kind: Its name, ``shared-by-processes`` for example.
            within: Seconds for it to be noticed when the context is left.

        Yields:
            The faults of that kind: empty until the context is left.
        """
        [name] = kinds(kind, "pgguard.expect()")
        found: list[Fault] = []
        self._run.faults_so_far()
        yield found
        taken = self._run.take(name, within)
        if not taken:
            others = sorted({one.kind for one in self._run.faults_so_far()})
            instead = f"; there has been {' and '.join(others)}" if others else ""
            pytest.fail(f"pgguard: expected {name}, which didn't come within {within:g} s{instead}", pytrace=False)
        found += map(_fault, taken)

    @property
    def url(self) -> str:
        """Where the guard is, as a URL for libpq without user, password and database: those are the client's own."""
        return self._run.url

    @property
    def env(self) -> Mapping[str, str]:
        """The variables that lead to the guard, for a program that is started with an environment of its own."""
        return self._run.environment


class TestsSession:
    """The guard, as the whole run sees it: the fixture ``pgguard_session``."""

    __test__ = False

    def __init__(self, run: GuardedRun | None) -> None:
        self._run = run

    def front(self, url: str) -> str:
        """Put a guard in front of one more server, for as long as the tests run.

        For a server that a fixture starts, whose address is known only then. The same address gets the same guard.

        Args:
            url: Where it is: a connection string, or a URL of libpq's or another library's.

        Returns:
            The same, leading to the guard: with its user, password, database and parameters.

        Raises:
            ValueError: It isn't one; the message says what to change.
        """
        return url if self._run is None else self._run.front(url)


def _fault(sighting: Sighting) -> Fault:
    from pgguard.reporting.readback import from_record  # noqa: PLC0415 - only for who asks

    return from_record(sighting.told["record"])
