"""What the relay asks of the scheduler, and that it takes it back."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from pgguard.proxy import scheduling
from pgguard.proxy.scheduling import ordinary_slices, short_slices

_FIRST = (6, 12)
"""The kernel that takes notice."""
_ASK = "from pgguard.proxy import scheduling; print(scheduling._read().runtime)"

pytestmark = pytest.mark.skipif(scheduling._read() is None, reason="the system call isn't known here")


def slice_() -> int:
    attributes = scheduling._read()
    assert attributes is not None
    return attributes.runtime


def slice_of_a_child() -> int:
    return int(subprocess.run([sys.executable, "-c", _ASK], check=True, capture_output=True).stdout)


def test_a_slice_is_short_only_within_the_context() -> None:
    before, nice = slice_(), os.nice(0)
    with short_slices():
        takes_notice = tuple(map(int, platform.release().split(".")[:2])) >= _FIRST
        assert slice_() == (100_000 if takes_notice else before)
        assert os.nice(0) == nice
        with ordinary_slices():
            assert slice_() == slice_of_a_child() == before
    assert slice_() == before


def test_other_policies_are_left_alone() -> None:
    """As that of a program that was told to run when nothing else does."""
    code = (
        "import os; os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))\n"
        "from pgguard.proxy.scheduling import _read, short_slices\n"
        "before = _read()\n"
        "with short_slices():\n    assert _read() == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_machine_whose_numbers_are_not_known_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = slice_()
    monkeypatch.setattr(scheduling, "_SET", {})
    with short_slices(), ordinary_slices():
        monkeypatch.undo()
        assert slice_() == before
