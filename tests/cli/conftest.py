"""Fixtures for tests of the command line."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Protocol

import pytest

from pgguard.attribution import privileges
from pgguard.cli.main import main
from tests.proxy.conftest import short_directory

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["short_directory"]


class Refused(Protocol):
    """Run ``pgguard`` with these arguments, and see that it ends with status 2 and one line that says this."""

    def __call__(self, *arguments: str, says: str, **variables: str) -> None: ...


def _keep(*_: object) -> None:
    """The test's own process would lose its rights: a guard that gets as far as this has to be a process of its own."""
    pytest.fail("it wasn't refused")


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Refused:
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith("PG"):
            monkeypatch.delenv(name)

    def run(*arguments: str, says: str, **variables: str) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["pgguard", *arguments])
            for name, value in variables.items():
                patch.setenv(name, value)
            patch.setattr(privileges, "give_up", _keep)
            with pytest.raises(SystemExit) as raised:
                main()
        assert raised.value.code == 2
        said = capfd.readouterr()
        assert said.out == ""
        assert said.err.startswith("pgguard: ")
        assert said.err.count("\n") == 1, said.err
        assert says in said.err

    return run
