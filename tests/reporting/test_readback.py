"""A fault read back from its record: the same fault, as far as the record tells, whatever else stands there."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgguard.faults.causes import Told
from pgguard.faults.fault import Spread
from pgguard.reporting.jsonl import encode
from pgguard.reporting.readback import NoRecordError, from_record
from pgguard.reporting.record import to_record
from tests.faults.samples import NOW, fault
from tests.reporting.test_hostile_text import HOSTILE, hostile_faults

if TYPE_CHECKING:
    from pgguard.faults.fault import Fault

FULL = to_record(fault(cause=2, run="ab12"))


def read_back(what: Fault) -> Fault:
    return from_record(json.loads(encode(what)))


@pytest.mark.parametrize("text", [*HOSTILE.values(), "an ordinary name"], ids=[*HOSTILE, "nothing of that"])
def test_a_record_tells_all_of_its_fault_that_can_be_told(text: str) -> None:
    for what in islice(hostile_faults(text), 2, None, 4):
        assert to_record(read_back(what)) == to_record(what)


def test_a_repeat_says_how_far_its_cause_has_spread() -> None:
    again = replace(fault(), repeat_of=3, suppressed=41, spread=Spread(44, 11, 4, NOW))
    assert read_back(again).spread == Told(again, Spread(44, 11, 4, NOW)).spread
    assert to_record(read_back(again)) == to_record(again)


def test_a_record_of_an_older_version_is_one() -> None:
    """It has no cause, says less of a request, and nothing of whose doing it was."""
    old = {key: value for key, value in FULL.items() if key not in {"cause", "run", "by", "over", "tracing"}}
    old["requests"] = [{k: v for k, v in request.items() if k != "at_rest"} for request in FULL["requests"]]
    found = from_record(old)
    assert (found.cause, found.run, found.over, found.requests[0].at_rest) == (0, None, False, None)
    assert found.summary == fault().summary


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"id": None}, "it has no 'id'"),
        ({"id": "7"}, "its 'id' makes no sense"),
        ({"id": True}, "its 'id' makes no sense"),
        ({"at": "yesterday"}, "its 'at' makes no sense"),
        ({"at": "0001-01-01T00:00:00+14:00"}, "its 'at' makes no sense"),
        ({"at": "9999-12-31T23:59:59.999999Z"}, "its 'at' makes no sense"),  # as a float it is in the next year
        ({"kind": "shared-by-aliens"}, "there is no kind of fault 'shared-by-aliens' in this version of pgguard"),
        ({"kind": ["x"]}, "its 'kind' makes no sense"),
        ({"severity": "grave"}, "its 'severity' makes no sense"),
    ],
)
def test_without_what_every_record_has_there_is_no_fault(change: dict[str, Any], says: str) -> None:
    with pytest.raises(NoRecordError) as raised:
        from_record(FULL | change)
    assert str(raised.value) == says


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(sorted(FULL)), inner, max_size=3),
    max_leaves=6,
)


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a record."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(one for key, item in inner for one in paths(item, (*path, key)))]


ESSENTIAL = {("id",), ("at",), ("kind",), ("severity",)}


@given(st.sampled_from([path for path in paths(FULL) if path and path not in ESSENTIAL]), ANYTHING)
def test_whatever_else_stands_in_it_is_taken_for_unknown(path: tuple[Any, ...], value: object) -> None:
    record = json.loads(json.dumps(FULL))
    place = record
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    found = from_record(record)
    json.dumps(to_record(found))
    assert found.kind == FULL["kind"]
