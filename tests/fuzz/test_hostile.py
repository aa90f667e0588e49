"""Hostile clients and a hostile server, for a few seconds each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pgguard.faults.policy import Mode
from tests.fuzz.hostile import Report, attack_clients, attack_server
from tests.servers import installations, not_installed, running_server

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.servers import Server

_SECONDS = 2.0
_LONGEST = 5.0
"""Seconds for which a bystander may wait, on a machine that is busy with other tests."""


@pytest.fixture(scope="module")
def one_server() -> Iterator[Server]:
    bindir = next((bindir for bindir in installations().values() if bindir is not None), None)
    if bindir is None:
        not_installed("PostgreSQL")
    with running_server(bindir) as server:
        yield server


def _is_well(report: Report) -> None:
    assert not report.wrong, "\n".join(report.wrong)
    assert report.attacks
    assert report.faults
    assert report.longest < _LONGEST


@pytest.mark.parametrize("mode", Mode)
def test_clients(one_server: Server, mode: Mode) -> None:
    report = attack_server(one_server, 9, _SECONDS, mode)
    _is_well(report)
    assert bool(report.compared) is (mode is Mode.LOG)


@pytest.mark.parametrize("mode", Mode)
def test_servers(mode: Mode) -> None:
    _is_well(attack_clients(9, _SECONDS, mode))
