"""A run of tests with a guard beside it: each fault is told with the test that it belongs to.

*Which test.* When a phase of a test (its set-up, its call, its teardown) is over, the guard is asked whether everything
has been judged that has come by then, and answers with the faults that it has found. A fault belongs to the phase in
which that was done what it is about, whenever it was noticed: a connection that a child has inherited is noticed after
two seconds, a transaction that sits idle after a minute. If that test is over by then, it is reported once more, as one
that has failed. Where it isn't certain which phase it was, or it was none, it is told at the end, and the run has
failed.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import pytest

from pgguard.testing import account, elsewhere
from pgguard.testing.apart import GuardLostError
from pgguard.testing.marks import Choice, choice_of

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence
    from pathlib import Path

    from pgguard.testing.apart import GuardApart
    from pgguard.testing.wire import Answer, Happened, Leaving, Question, Told

DEADLINE: Final = 5.0
"""Seconds for the guard to have judged everything when a phase is over. What it finds later on is told later on."""
_LEFTOVERS: Final = 20.0
"""Seconds for the guard of a worker that has crashed to write down what it has found."""
_PAUSE: Final = 0.05
_LATE: Final = "This was found when the test was over, and belongs to its"
_BEGINNINGS: Final = frozenset({"inherited-connection"})
_ENDS: Final = frozenset({"shared-by-processes", "foreign-terminate"})
"""Kinds that go without saying where there is one of the others on the same session."""
_TCP_SENDERS: Final = "kernel senders on TCP"
_UNIX_INSTEAD: Final = (
    "so a connection that is shared only for a moment may not be noticed, unless the tests use a Unix socket: add "
    "--pgguard-unix if their driver can"
)
_OTHERS: Final = "other users' processes"
"""What tests can do without."""
_UNKNOWN: Final = "a fault of which no more is known by now"

Phase = Literal["setup", "call", "teardown"]
_NEXT: Final[Mapping[Phase, Phase | None]] = {"setup": "call", "call": "teardown", "teardown": None}
_COLOURS: Final = {"error": {"red": True}, "warning": {"yellow": True}}
_NO_CONNECTION: Final = (
    "no connection came through the guard. Tests that have their address from elsewhere than the environment can put a "
    "guard in front of it: pgguard_session.front(URL)"
)


class Sighting(NamedTuple):
    """A fault of a test that has come a number of times."""

    told: Told
    phase: Phase
    times: int

    @property
    def kind(self) -> str:
        """Its kind's name."""
        return str(self.told["record"]["kind"])

    @property
    def severity(self) -> str:
        """Its severity's name."""
        return str(self.told["record"]["severity"])

    @property
    def session(self) -> tuple[str | None, int]:
        """Which session of which guard it has come on."""
        return self.told["record"]["run"], self.told["record"]["session"]["id"]


@dataclass(slots=True, eq=False)
class _Test:
    """One run of one test."""

    nodeid: str
    location: tuple[str, int | None, str]
    choice: Choice
    is_over: bool = False
    sightings: list[Sighting] = field(default_factory=list)
    """Those that haven't been told with one of its phases."""
    so_far: list[Sighting] = field(default_factory=list)
    """All of them, but for those that were expected."""

    def fails_for(self, sighting: Sighting) -> bool:
        """Whether a fault fails it."""
        return self.choice.fails(sighting.kind, sighting.severity)


class Stretch(NamedTuple):
    """A stretch of time."""

    test: _Test | None
    """``None``: no test was running."""
    phase: Phase | None
    name: str


_BETWEEN: Final = Stretch(None, None, "between two tests")
_AFTER: Final = Stretch(None, None, "after the last test")


class GuardedRun:
    """The plugin in a process that runs tests.

    Args:
        config: pytest's.
        guard: The guard's process.
        usual: What is made of a test's faults, unless its markers say otherwise.
        front: Where the guard is that was there from the beginning; ``None`` if nothing says where the server is.
        fronts: What a guard is asked with to be put in front of one more.
    """

    def __init__(
        self, config: pytest.Config, guard: GuardApart, usual: Choice, front: Answer | None, fronts: Question
    ) -> None:
        self._config = config
        self._guard = guard
        self._usual = usual
        self._front = front
        self._fronts_question = fronts
        self._fronts: dict[str, Answer] = {}
        """Further guards, by what was given to say where the server is."""
        self._stretches = {0: Stretch(None, None, "before the first test")}
        self._now = self._stretches[0]
        self._tests: dict[str, _Test] = {}
        """The latest run of each test."""
        self._told: dict[str, Told] = {}
        self._late: dict[_Test, list[Sighting]] = {}
        """Faults of tests that are over."""
        self._unreported: list[pytest.TestReport] = []
        self._unjudged = 0
        """How often not everything had been judged in time."""
        self.account = account.Account()
        if front is not None:
            self.account.hear(front.get("said", []))

    # Asking the guard

    def _ask(self, question: Question) -> Answer | None:
        """What it answers; ``None`` if there is no guard any more, which is told at the end."""
        try:
            answer = self._guard.ask(question)
        except GuardLostError as error:
            if self._guard.is_ours and str(error) not in self.account.failures:
                self.account.failures.append(str(error))
            return None
        self.account.hear(answer.get("said", []))
        if (problem := answer.get("error")) is not None:
            self.account.failures.append(problem)
        return answer

    def _settle(self, stretch: Stretch | None = None, **more: Any) -> None:
        """Have everything judged that has come, and take what has been found; another stretch begins then."""
        question: dict[str, Any] = {"do": "settle", "seconds": DEADLINE, **more}
        if stretch is not None:
            question |= {"stretch": len(self._stretches), "name": stretch.name}
            self._stretches[len(self._stretches)] = self._now = stretch
        answer = self._ask(question)  # type: ignore[arg-type] # the keys of one
        if answer is not None:
            self._told |= answer.get("faults", {})
            self._unjudged += not answer.get("judged")
            self.account.sessions = answer.get("sessions", self.account.sessions)
            for one in answer.get("happened", []):
                self._place(one)

    def _place(self, one: Happened) -> None:
        """Give a fault to the test that it belongs to."""
        told = self._told.get(one["fault"])
        number = one["stretch"]
        stretch = None if number is None else self._stretches[number]
        if told is None:
            self.account.failures.append(_UNKNOWN)
            return
        if stretch is None or stretch.test is None or stretch.phase is None:
            where = "during one of several tests" if stretch is None else stretch.name
            self.account.note(told, where, one["times"])
            record = told["record"]
            if self._usual.fails(record["kind"], record["severity"]):
                self.account.loose.append((f"{where}: it belongs to no single test, and fails the run", told["report"]))
            return
        test, sighting = stretch.test, Sighting(told, stretch.phase, one["times"])
        if test.is_over:
            self._late.setdefault(test, []).append(sighting)
        else:
            test.sightings.append(sighting)
            test.so_far.append(sighting)

    # Phases of tests

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, object, object]:
        """Begin a test, and tell what has come of its set-up."""
        test = _Test(item.nodeid, item.location, choice_of(item, self._usual))
        self._tests[item.nodeid] = test
        self.account.tests += 1
        return (yield from self._phase(item, test, "setup"))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        """Tell what has come of it."""
        return (yield from self._phase(item, self._tests[item.nodeid], "call"))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, object, object]:
        """Tell what has come of it, and that the test is over."""
        return (yield from self._phase(item, self._tests[item.nodeid], "teardown"))

    def _phase(self, item: pytest.Item, test: _Test, phase: Phase) -> Generator[None, object, object]:
        if self._now != (here := _stretch(test, phase)):
            self._settle(here, anew=phase == "setup")
        try:
            result = yield
        except (KeyboardInterrupt, pytest.exit.Exception):
            raise
        except BaseException as error:
            failing = self._end_phase(item, test, phase)
            if failing and isinstance(error, pytest.skip.Exception):
                raise pytest.fail.Exception(self.failure(failing), pytrace=False) from None
            raise
        if failing := self._end_phase(item, test, phase):
            pytest.fail(self.failure(failing), pytrace=False)
        return result

    def _end_phase(self, item: pytest.Item, test: _Test, phase: Phase) -> list[Sighting]:
        """Tell what has come of a phase; returns the faults that fail it."""
        following = _NEXT[phase]
        self._settle(_BETWEEN if following is None else _stretch(test, following))
        test.is_over = following is None
        found, test.sightings = _gravest_first(test.sightings), []
        self._note(test, found)
        if found:
            item.add_report_section(phase, "pgguard", reports(found))
            item.user_properties.append(("pgguard", reports(found)))
        return [one for one in found if test.fails_for(one)]

    def _note(self, test: _Test, found: Sequence[Sighting]) -> None:
        for one in found:
            self.account.note(one.told, _stretch(test, one.phase).name, one.times)

    def failure(self, found: Sequence[Sighting]) -> str:
        """What a test is told to have failed for."""
        lines = []
        for one in found:
            record = one.told["record"]
            often = "" if one.times == 1 else f" ({one.times} times)"
            lines.append(f"pgguard: {one.kind}: {one.told['headline']}{often}")
            if (advice := record.get("advice")) is not None:
                lines.append(f"  What to change: {advice['title']}. {advice['text']}")
        return "\n".join(lines)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Tell what has come of tests that are over."""
        is_forked = self._config.getoption("forked", False) or item.get_closest_marker("forked") is not None
        test = _Test(item.nodeid, item.location, choice_of(item, self._usual), is_over=True)
        if is_forked:
            # Its phases are another process's.
            self._settle(_stretch(test, "call"), anew=True)
            self.account.tests += 1
        result = yield
        if self._guard.is_ours:
            if is_forked:
                self._settle(_BETWEEN)
            self._report_late()
        return result

    # Tests that are over

    def _report_late(self) -> None:
        """Report tests once more that are over, and have failed for what has been found since."""
        late, self._late = self._late, {}
        for test, sightings in late.items():
            found = _gravest_first(sightings)
            self._note(test, found)
            failing = [one for one in found if test.fails_for(one)]
            if not failing:
                continue
            report = pytest.TestReport(
                nodeid=test.nodeid,
                location=test.location,
                keywords={},
                outcome="failed",
                longrepr=f"{self.failure(failing)}\n({_LATE} {failing[0].phase})",
                when="teardown",
                sections=[("pgguard", reports(found))],
            )
            if hasattr(self._config, "workeroutput"):
                self._unreported.append(report)
            else:
                self._config.hook.pytest_runtest_logreport(report=report)

    # What tests and fixtures ask for

    def faults_so_far(self) -> list[Sighting]:
        """The faults of the test that is running, as far as they aren't expected; everything has been judged then.

        Raises:
            GuardLostError: This process isn't the tests', but was forked from it.
        """
        if not self._guard.is_ours:
            raise GuardLostError("a process that a test has forked can't ask the guard: ask in the test's own process")
        self._settle()
        if self._now.test is None:
            return []
        once = {id(one.told): one for one in reversed(self._now.test.so_far)}
        return _gravest_first(list(reversed(once.values())))

    def take(self, kind: str, within: float) -> list[Sighting]:
        """Take the faults of a kind away from the test that is running.

        Args:
            kind: Its name.
            within: Seconds to wait for one, unless there is one that hasn't been asked for.
        """
        self._settle(awaited=kind, seconds=within)
        test = self._now.test
        if test is None:
            return []
        taken = [one for one in test.sightings if one.kind == kind]
        # What they have begun with goes with them.
        others = [one for one in test.sightings if one.kind != kind]
        gone = [one for one in _without_beginnings([*taken, *others]) if one not in taken]
        test.sightings = [one for one in others if one in gone]
        test.so_far = [one for one in test.so_far if one not in taken and (one in gone or one not in others)]
        return taken

    def lead(self, host: str, port: str) -> tuple[str, int]:
        """Put a guard in front of a server, unless it is one already; returns where that is."""
        if self._front is not None and elsewhere.parted(self._front["address"]) == (host, int(port or 0)):
            return host, int(port)
        try:
            return elsewhere.parted(self._front_of(elsewhere.conninfo(host, port))["address"])
        except ValueError as error:
            raise pytest.UsageError(f"--pgguard: {error}") from None

    def front(self, url: str) -> str:
        """Put a guard in front of a server, and return its URL as it leads there."""
        changed = self._front_of(url).get("changed", {})
        return changed.get("URL") or url

    def _front_of(self, url: str) -> Answer:
        known = self._fronts.get(url)
        if known is not None:
            return known
        url_of: Question = {"upstream": url, "environment": {"URL": url}, "urls": ["URL"]}
        answer = self._guard.ask({**self._fronts_question, **url_of})
        if (error := answer.get("error")) is not None:
            raise ValueError(error.replace("--upstream", "front()"))
        self.account.hear(answer.get("said", []))
        self._fronts[url] = answer
        return answer

    @property
    def url(self) -> str:
        """Where the guard is: the first one."""
        fronts = [*([] if self._front is None else [self._front]), *self._fronts.values()]
        if not fronts:
            raise ValueError("there is no guard yet: set DATABASE_URL, or use pgguard_session.front()")
        return fronts[0]["url"]

    @property
    def environment(self) -> dict[str, str]:
        """The variables that lead to it."""
        changed = {} if self._front is None else self._front["changed"]
        return {name: value for name, value in changed.items() if value is not None}

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Generator[None, object, object]:
        """Put a guard in front of a server that another plugin has started."""
        result = yield
        elsewhere.lead_executor(fixturedef, result, self.lead)
        return result

    # The beginning and the end

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self) -> None:
        """Lead the databases to the guard whose addresses stand in Django's settings."""
        elsewhere.lead_django(self.lead)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Tell what there is left to be told."""
        if not self._guard.is_ours:
            return
        interrupted = self._now.test
        self._settle(_AFTER, do="end")
        self._report_late()
        if interrupted is not None and not interrupted.is_over:
            found = _gravest_first(interrupted.sightings)
            self._note(interrupted, found)
            self.account.loose += [(f"{interrupted.nodeid} was interrupted:", one.told["report"]) for one in found]
        if self._unjudged:
            often = "once" if self._unjudged == 1 else f"{self._unjudged} times"
            self.account.said.append(f"not everything had been judged within {DEADLINE:g} s of a test's end, {often}")
        output = getattr(self._config, "workeroutput", None)
        if output is None:
            fail(session, self.account)
            return
        serialize = self._config.hook.pytest_report_to_serializable
        output["pgguard"] = {
            "account": self.account.as_plain(),
            "reports": [serialize(config=self._config, report=report) for report in self._unreported],
        }

    def pytest_report_header(self) -> list[str]:
        """Say where the guard is."""
        if self._front is None:
            return ["pgguard: nothing says where PostgreSQL is: guarding what fixtures start"]
        names = sorted(self._front["changed"])
        lead = f", where {_listed(names)} {'leads' if len(names) == 1 else 'lead'} now" if names else ""
        lines = [f"pgguard: guarding {self._front['upstream']} on {self._front['address']}{lead}"]
        if missing := [name for name in self._front["missing"] if name != _OTHERS]:
            lines.append(f"pgguard: some evidence isn't available here: {_listed(missing)}; pgguard doctor says why")
        if _TCP_SENDERS in missing:
            lines.append(f"pgguard: {_UNIX_INSTEAD}")
        return lines

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Tell what has happened."""
        tell(terminalreporter, self.account)


class Controller:
    """The plugin in a process that has others run the tests, with a guard each.

    Args:
        config: pytest's.
        directory: Where the guards of those leave what they couldn't tell them any more.
    """

    def __init__(self, config: pytest.Config, directory: Path) -> None:
        self._config = config
        self._directory = directory
        self.account = account.Account()

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Take what a worker has to tell."""
        name = node.gateway.id
        output = getattr(node, "workeroutput", {}).get("pgguard")
        if output is None:
            self._look_after(name)
            return
        self.account.add(output["account"], name)
        for plain in output["reports"]:
            report = self._config.hook.pytest_report_from_serializable(config=self._config, data=plain)
            report.node = node
            self._config.hook.pytest_runtest_logreport(report=report)

    def _look_after(self, name: str) -> None:
        """Tell what the guard of a worker has found that has crashed: it leaves that when the worker has ended."""
        path, deadline = self._directory / name, time.monotonic() + _LEFTOVERS
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(_PAUSE)
        try:
            left: Leaving = json.loads(path.read_text())
        except (OSError, ValueError):
            self.account.failures.append(f"{name} has crashed, and with it what its guard had found of its last test")
            return
        self.account.sessions += left["sessions"]
        for one in left["faults"]:
            self.account.note(one["told"], one["where"], one["times"])
            self.account.loose.append((f"{name} has crashed; {one['where']}:", one["told"]["report"]))

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Have the run fail if something is wrong that no test has failed for."""
        fail(session, self.account)

    def pytest_report_header(self) -> str:
        """Say where the guards are."""
        return "pgguard: a guard for each worker"

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Tell what has happened."""
        tell(terminalreporter, self.account)


def _stretch(test: _Test, phase: Phase) -> Stretch:
    return Stretch(test, phase, test.nodeid if phase == "call" else f"{test.nodeid} ({phase})")


def _without_beginnings(found: Sequence[Sighting]) -> list[Sighting]:
    """Faults without those that are only the beginning of a graver one: a child has inherited what it then shares."""
    grave = {one.session for one in found if one.kind in _ENDS}
    return [one for one in found if one.kind not in _BEGINNINGS or one.session not in grave]


def _gravest_first(found: Sequence[Sighting]) -> list[Sighting]:
    return sorted(_without_beginnings(found), key=lambda one: account.RANKS[one.severity])


def reports(found: Sequence[Sighting]) -> str:
    """Faults as they are told in full."""
    return "\n".join(f"{one.told['report'].rstrip()}{_often(one)}\n" for one in found)


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _often(sighting: Sighting) -> str:
    return "" if sighting.times == 1 else f"\n  It came {sighting.times} times here."


def fail(session: pytest.Session, told: account.Account) -> None:
    """Have a run fail if something is wrong that no test has failed for, or has been found too late to count."""
    passed = session.exitstatus in {pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED}
    if passed and (told.has_failed or session.testsfailed):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def tell(terminal: Any, told: account.Account) -> None:
    """Write the section of the summary."""
    lines = told.lines()
    if lines:
        terminal.write_sep("=", "pgguard")
        for line, severity in lines:
            terminal.write_line(line, **_COLOURS.get(severity, {}))
    if not told.tests:
        return
    if not told.sessions and not told.failures:
        terminal.write_line(f"pgguard: {_NO_CONNECTION}", yellow=True)
    elif terminal.verbosity >= 0 or lines:
        terminal.write_line(f"pgguard: {told.sentence()}")
