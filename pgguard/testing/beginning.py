"""The beginning of a run of tests with a guard: who runs the tests, where PostgreSQL is, and what leads there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from pgguard.testing.apart import GuardApart, GuardLostError
from pgguard.testing.marks import Choice, kinds, severity
from pgguard.testing.run import Controller, GuardedRun

if TYPE_CHECKING:
    from pgguard.testing.wire import Answer, Question

_CONTROLLER: Final = "PGGUARD_PYTEST_CONTROLLER"
"""In the environment of pytest-xdist's workers, the pid of the process that has started them, and a directory."""
_SAY_WHERE: Final = ("PGGUARD_UPSTREAM", "DATABASE_URL", "PGHOST", "PGHOSTADDR", "PGPORT", "PGSERVICE")


class Beginning:
    """What has been begun.

    Args:
        config: pytest's, as it is before the first conftest.py.

    Raises:
        pytest.UsageError: The guard can't run like that.
    """

    def __init__(self, config: pytest.Config) -> None:
        known = config.known_args_namespace
        fail_on = known.pgguard_fail_on or config.getini("pgguard_fail_on") or "error"
        choice = Choice(kinds(config.getini("pgguard_allow"), "pgguard_allow"), severity(fail_on, "--pgguard-fail-on"))
        upstream = known.pgguard_upstream or os.environ.get("PGGUARD_UPSTREAM") or config.getini("pgguard_upstream")
        records = str(config.invocation_params.dir / known.pgguard_records) if known.pgguard_records else ""
        unix = config.getini("pgguard_unix") if known.pgguard_unix is None else known.pgguard_unix
        fronts: Question = {"do": "front", "records": records, "unix": unix}
        self._before: dict[str, str | None] = {}
        self._run: GuardedRun | None = None
        controller, _, directory = os.environ.pop(_CONTROLLER, "").partition(" ")
        is_worker = controller == str(os.getppid())
        if not is_worker and _distributes(config):
            _check(upstream)
            leftovers = tempfile.TemporaryDirectory(prefix="pgguard-", ignore_cleanup_errors=True)
            config.add_cleanup(leftovers.cleanup)
            self._set({_CONTROLLER: f"{os.getpid()} {leftovers.name}"})
            self.plugin: GuardedRun | Controller = Controller(config, Path(leftovers.name))
            return
        guard = GuardApart(Path(directory, os.environ.get("PYTEST_XDIST_WORKER", "")) if is_worker else None)
        try:
            front = _first_front(guard, {**fronts, "upstream": upstream, "environment": dict(os.environ)})
        except BaseException:
            guard.close()
            raise
        self.plugin = self._run = GuardedRun(config, guard, choice, front, fronts)
        if front is not None:
            self._set(front["changed"])

    @property
    def run(self) -> GuardedRun:
        """The plugin in the process that runs tests. Raises RuntimeError in one that doesn't."""
        if self._run is None:
            raise RuntimeError("no test runs in this process")
        return self._run

    def undo(self) -> None:
        """Put the environment back as it was."""
        self._set(self._before)
        self._before = {}

    def _set(self, variables: dict[str, str | None]) -> None:
        for name, value in variables.items():
            self._before.setdefault(name, os.environ.get(name))
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _first_front(guard: GuardApart, question: Question) -> Answer | None:
    """Put a guard in front of the server; ``None`` if nothing says where that is. Raises pytest.UsageError."""
    try:
        answer = guard.ask(question)
    except GuardLostError as error:
        raise pytest.UsageError(f"--pgguard: {error}") from None
    problem = answer.get("error")
    if problem is None:
        return answer
    _complain(problem, question["upstream"])
    return None


def _check(upstream: str) -> None:
    """See to it that guards can be put in front of the server, as far as that shows. Raises pytest.UsageError."""
    # No test runs in this process.
    from pgguard.proxy.errors import ConfigurationError  # noqa: PLC0415
    from pgguard.testing.process import settings_for  # noqa: PLC0415

    try:
        settings_for(upstream, Path("/")).server()
    except ConfigurationError as error:
        _complain(str(error), upstream)


def _complain(problem: str, upstream: str) -> None:
    """Raise pytest.UsageError, unless all that is wrong is that nothing says where the server is."""
    if upstream:
        raise pytest.UsageError(problem.replace("--upstream", "--pgguard-upstream"))
    if any(map(os.environ.get, _SAY_WHERE)) or problem.startswith("--pgguard"):
        raise pytest.UsageError(problem if problem.startswith("--") else f"--pgguard: {problem}")


def _distributes(config: pytest.Config) -> bool:
    """Whether pytest-xdist has other processes run the tests. It hasn't settled its options yet."""
    known = config.known_args_namespace
    workers = getattr(known, "numprocesses", None)
    if getattr(known, "collectonly", False) or workers == 0:
        return False
    if workers in ("auto", "logical") and getattr(known, "usepdb", False):
        return False
    return bool(workers) or (bool(getattr(known, "tx", None)) and getattr(known, "dist", "no") != "no")
