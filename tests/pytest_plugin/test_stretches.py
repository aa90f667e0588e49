"""A fault belongs to the stretch of time in which it was done, and to none if that isn't certain."""

from __future__ import annotations

import pytest

from pgguard.testing import stretches
from pgguard.testing.stretches import Stretches

BEGINNING = 1000.0


@pytest.fixture
def three() -> Stretches:
    """They begin at 1000, 1010 and 1020, and are numbered from 7."""
    three = Stretches(7, BEGINNING)
    three.begin(8, BEGINNING + 10)
    three.begin(9, BEGINNING + 20)
    return three


@pytest.mark.parametrize(
    ("since", "until", "expected"),
    [
        (0, 0, 7),
        (9.9, 9.9, 7),
        (10, 10, 8),
        (10, 19.9, 8),
        (25, 1e9, 9),
        (-1, -1, None),
        (9.99, 10.01, None),
        (5, 25, None),
    ],
)
def test_what_was_done_in_one_belongs_to_it(three: Stretches, since: float, until: float, expected: int | None) -> None:
    assert three.of(BEGINNING + since, BEGINNING + until) == expected


@pytest.mark.parametrize(
    ("forks", "expected"),
    [([9.99], 7), ([10.004], 8), ([9.97, 10.001, 10.003, 19.0], 8), ([9.995, 10.005], None), ([], None)],
)
def test_of_a_child_s_start_it_is_known_by_its_fork(three: Stretches, forks: list[float], expected: int | None) -> None:
    three.note_forks(BEGINNING + at for at in forks)
    assert three.of(BEGINNING + 9.99, BEGINNING + 10.01, forked=True) == expected
    assert three.of(BEGINNING + 9.99, BEGINNING + 10.01) is None
    assert three.of(BEGINNING + 15, BEGINNING + 15.02, forked=True) == 8


def test_a_clock_that_is_set_back_makes_no_earlier_one_of_it(three: Stretches) -> None:
    three.begin(10, BEGINNING - 500)
    assert three.of(BEGINNING + 15, BEGINNING + 15) == 8
    assert three.of(BEGINNING + 20, BEGINNING + 20) == 10
    assert three.of(BEGINNING - 500, BEGINNING - 500) is None


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stretches, "KEPT", 10)
    many = Stretches(0, 0.0)
    for n in range(1, 100):
        many.begin(n, float(n))
    assert [many.of(n, n) for n in (85.5, 99.5)] == [85, 99]
    assert many.of(1.5, 1.5) is None
