"""The pytest plugin: ``pytest --pgguard``. Nothing of pgguard's is imported unless it is asked for.

A guard stands in front of the test database, and the very test during which a fault arises fails. How that is done
stands in :mod:`pgguard.testing`; here is what pytest has to know beforehand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator

    from pgguard.testing.beginning import Beginning  # noqa: F401 - named in a text
    from pgguard.testing.fixtures import TestsGuard, TestsSession

_BEGUN: Final = pytest.StashKey["Beginning"]()
_OFF: Final = "pgguard is off: run pytest with --pgguard"
_NO_RUN: Final = ("collectonly", "help", "version", "markers", "showfixtures", "show_fixtures_per_test", "setupplan")
"""Options with which no test runs."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options and the settings of ``pytest.ini`` and ``pyproject.toml``."""
    group = parser.getgroup("pgguard", "pgguard: misused database connections")
    group.addoption(
        "--pgguard",
        action="store_true",
        dest="pgguard",
        default=None,
        help="Put a guard in front of the test database, and fail each test that misuses its connections.",
    )
    group.addoption("--no-pgguard", action="store_false", dest="pgguard", help="Don't, whatever the settings say.")
    group.addoption(
        "--pgguard-upstream",
        metavar="URL",
        help="Where PostgreSQL is: a libpq connection string or URI. Default: PGGUARD_UPSTREAM, DATABASE_URL, or "
        "libpq's variables, such as PGHOST.",
    )
    group.addoption(
        "--pgguard-fail-on",
        metavar="SEVERITY",
        help="From which severity on a fault fails its test: error, warning or never. Default: error.",
    )
    group.addoption(
        "--pgguard-unix",
        action="store_true",
        default=None,
        help="Lead the tests to the guard over a Unix socket, if their driver can use one: there the kernel names the "
        "sender of every byte, whoever runs the tests.",
    )
    group.addoption(
        "--pgguard-records",
        metavar="PATH",
        help="Append faults to this file, one line of JSON each, for pgguard report.",
    )
    parser.addini("pgguard", "Put a guard in front of the test database.", type="bool", default=False)
    parser.addini("pgguard_upstream", "Where PostgreSQL is, as for --pgguard-upstream.", default="")
    parser.addini("pgguard_fail_on", "As for --pgguard-fail-on.", default="")
    parser.addini("pgguard_unix", "As for --pgguard-unix.", type="bool", default=False)
    parser.addini("pgguard_allow", "Kinds of faults that fail no test.", type="args", default=[])


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> Generator[None, object, object]:
    """Begin, before a conftest.py, or Django's settings, can have read an address from the environment."""
    known = early_config.known_args_namespace
    wanted = early_config.getini("pgguard") if known.pgguard is None else known.pgguard
    if wanted and not any(getattr(known, option, False) for option in _NO_RUN):
        from pgguard.testing.beginning import Beginning  # noqa: PLC0415 - only if it is asked for

        beginning = early_config.stash[_BEGUN] = Beginning(early_config)
        early_config.add_cleanup(beginning.undo)
    return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Register the marker, and what there is to be done if a guard was asked for."""
    config.addinivalue_line(
        "markers",
        "pgguard(allow=KIND, fail_on=SEVERITY): kinds of faults that don't fail the test, one or a list of them; from "
        "which severity on the others do: error, warning or never (pytest --pgguard)",
    )
    beginning = config.stash.get(_BEGUN, None)
    if beginning is not None:
        config.pluginmanager.register(beginning.plugin, "pgguard run")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """See to it that each marker says something that there is, also where no guard is asked for."""
    for item in items:
        if item.get_closest_marker("pgguard") is not None:
            from pgguard.testing.marks import USUAL, choice_of  # noqa: PLC0415 - only where there is one

            choice_of(item, USUAL)


@pytest.fixture
def pgguard(request: pytest.FixtureRequest) -> TestsGuard:
    """The guard in front of the test database: which faults there have been in this test, and which are expected.

    Without ``--pgguard`` the test is skipped.
    """
    from pgguard.testing.fixtures import TestsGuard  # noqa: PLC0415 - likewise

    beginning = request.config.stash.get(_BEGUN, None)
    if beginning is None:
        pytest.skip(_OFF)
    return TestsGuard(beginning.run)


@pytest.fixture(scope="session")
def pgguard_session(request: pytest.FixtureRequest) -> TestsSession:
    """Puts a guard in front of a server that a fixture has started: ``pgguard_session.front(url)``.

    Without ``--pgguard`` it gives back what it is given.
    """
    from pgguard.testing.fixtures import TestsSession  # noqa: PLC0415 - likewise

    beginning = request.config.stash.get(_BEGUN, None)
    return TestsSession(None if beginning is None else beginning.run)
