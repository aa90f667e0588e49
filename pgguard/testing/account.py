"""What there is to be told when all tests have run: each cause once, with its tests."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pgguard.testing.wire import Told

RANKS: Final = {"error": 0, "warning": 1, "info": 2}
"""Orders severities: the gravest first."""
_TESTS: Final = 10
"""Tests of one cause that are named."""
_SAID: Final = 20
"""Lines of the guard's log that are shown."""


@dataclass(slots=True)
class Cause:
    """What several faults have come from."""

    severity: str
    kind: str
    headline: str
    """The first one's."""
    times: int = 0
    where: Counter[str] = field(default_factory=Counter)
    """How often in which test, or between which."""


@dataclass(slots=True)
class Account:
    """What has happened by now."""

    causes: dict[str, Cause] = field(default_factory=dict)
    loose: list[tuple[str, str]] = field(default_factory=list)
    """Faults that fail the run, and of which no test tells: a heading, and what they are."""
    tests: int = 0
    """How many have been run."""
    sessions: int = 0
    """How many clients have connected."""
    said: list[str] = field(default_factory=list)
    """What the guards have logged."""
    failures: list[str] = field(default_factory=list)
    """Why a guard hasn't seen everything: sentences."""

    def hear(self, lines: Iterable[str]) -> None:
        """Take note of what a guard has logged, with the name that its option has here."""
        self.said += [line.removeprefix("pgguard: ").replace("--upstream", "--pgguard-upstream") for line in lines]

    def note(self, told: Told, where: str, times: int) -> None:
        """Take note of a fault that has come so often."""
        record = told["record"]
        cause = self.causes.setdefault(told["cause"], Cause(record["severity"], record["kind"], told["headline"]))
        cause.times += times
        cause.where[where] += times

    def as_plain(self) -> dict[str, Any]:
        """It in what can be sent to another process."""
        return {
            "causes": {
                key: [one.severity, one.kind, one.headline, one.times, dict(one.where)]
                for key, one in self.causes.items()
            },
            "loose": [list(one) for one in self.loose],
            "tests": self.tests,
            "sessions": self.sessions,
            "said": self.said,
            "failures": self.failures,
        }

    def add(self, plain: Mapping[str, Any], whose: str) -> None:
        """Add what another process has sent.

        Args:
            plain: That.
            whose: What that is called.
        """
        for key, (severity, kind, headline, times, where) in plain["causes"].items():
            cause = self.causes.setdefault(key, Cause(severity, kind, headline))
            cause.times += times
            cause.where.update(where)
        self.loose += [(f"{whose}: {heading}", report) for heading, report in plain["loose"]]
        self.tests += plain["tests"]
        self.sessions += plain["sessions"]
        self.said += [f"{whose}: {line}" for line in plain["said"]]
        self.failures += [f"{whose}: {line}" for line in plain["failures"]]

    @property
    def has_failed(self) -> bool:
        """Whether there is something wrong that no test has failed for."""
        return bool(self.loose or self.failures)

    def lines(self) -> list[tuple[str, str]]:
        """What is told of it, line by line, each with its severity; empty for none."""
        told: list[tuple[str, str]] = []
        for cause in sorted(self.causes.values(), key=lambda one: (RANKS[one.severity], -one.times)):
            often = "once" if cause.times == 1 else f"{cause.times} times"
            told.append((f"{cause.severity.upper()} {cause.kind}, {often}: {cause.headline}", cause.severity))
            told += [(f"    {place}{_often(times)}", "") for place, times in cause.where.most_common(_TESTS)]
            if (more := len(cause.where) - _TESTS) > 0:
                told.append((f"    and {more} more", ""))
        for heading, report in self.loose:
            told += [("", ""), (heading, "error")]
            told += [(line, "") for line in report.splitlines()]
        told += [(line, "error") for line in self.failures]
        told += [(f"the guard says: {line}", "") for line in self.said[:_SAID]]
        if (more := len(self.said) - _SAID) > 0:
            told.append((f"and {more} lines more", ""))
        return told

    def sentence(self) -> str:
        """All of it in a few words."""
        connections = f"{self.sessions} connection{'' if self.sessions == 1 else 's'}"
        times = sum(cause.times for cause in self.causes.values())
        if not times:
            return f"{connections}, no faults"
        faults = f"{times} fault{'' if times == 1 else 's'}"
        return f"{connections}, {faults} from {len(self.causes)} cause{'' if len(self.causes) == 1 else 's'}"


def _often(times: int) -> str:
    return "" if times == 1 else f", {times} times"
