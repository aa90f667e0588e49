"""Runs of pytest as their users have them: a project of its own, in a process of its own, in front of a real server."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from tests.servers import installations, not_installed, running_server

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.servers import Server

Run = Callable[..., pytest.RunResult]

SECONDS = 100.0

ALONE = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": "-p pgguard -p no:cacheprovider"}
"""An environment in which pytest has no plugin but this one: others take their time to be imported."""


@pytest.fixture(scope="session")
def database() -> Iterator[Server]:
    bindir = installations()["embedded"]
    if bindir is None:
        not_installed("the embedded PostgreSQL")
    with running_server(bindir) as server:
        yield server


@pytest.fixture
def url(database: Server) -> str:
    return f"postgresql://postgres:secret@127.0.0.1:{database.tcp.port}/postgres?application_name=tests"


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, url: str) -> Run:
    """Runs pytest in the project that ``pytester`` has made, with DATABASE_URL in its environment.

    ``plugins`` are those that it has beside this one; ``None``: whatever is installed. Other keywords are variables of
    the environment, ``None``: not set.
    """

    def run(*arguments: str, plugins: Sequence[str] | None = (), **variables: Any) -> pytest.RunResult:
        for name in [name for name in os.environ if name.startswith(("PG", "PYTEST_"))]:
            monkeypatch.delenv(name)
        alone = {} if plugins is None else ALONE
        for name, value in ({"DATABASE_URL": url} | alone | variables).items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        more = [f"-p{plugin}" for plugin in plugins or ()]
        return pytester.runpytest_subprocess(*more, *arguments, timeout=SECONDS)

    return run


def outcomes(pytester: pytest.Pytester) -> tuple[dict[str, dict[str, str]], dict[str, tuple[str, list[str]]]]:
    """By test, the phases that didn't pass; and of each test that something is told of, that and its sections."""
    found: dict[str, dict[str, str]] = {}
    told: dict[str, tuple[str, list[str]]] = {}
    for line in (pytester.path / "reports.jsonl").read_text().splitlines():
        nodeid, when, outcome, longrepr, sections = json.loads(line)
        name = nodeid.partition("::")[2]
        found.setdefault(name, {})
        if outcome != "passed":
            found[name][when] = outcome
        if outcome != "passed" or (sections and name not in told):
            told[name] = longrepr, sections
    return found, told
