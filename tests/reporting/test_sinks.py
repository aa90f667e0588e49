"""Sinks behind one another: whatever one does, neither the others nor the session notice."""

from __future__ import annotations

from pgguard.faults.fault import Fault
from pgguard.reporting.sinks import Fanout, SinkError
from tests.faults.samples import fault


class Kept:
    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.closed = False

    def record(self, fault: Fault) -> None:
        self.faults.append(fault)

    def close(self) -> None:
        self.closed = True


class Broken:
    def record(self, fault: Fault) -> None:
        raise SinkError(f"can't append\nfault {fault.id}: No space left on device")

    def close(self) -> None:
        raise ZeroDivisionError


def test_a_sink_that_fails_costs_nobody_else_a_fault() -> None:
    said: list[str] = []
    before, after = Kept(), Kept()
    fanout = Fanout([before, Broken(), after], said.append)
    for n in range(3):
        fanout.record(fault(id=n))
    fanout.close()
    assert [f.id for f in before.faults] == [f.id for f in after.faults] == [0, 1, 2]
    assert before.closed
    assert after.closed


def test_a_failing_sink_is_counted_and_said_once() -> None:
    said: list[str] = []
    fanout = Fanout([Broken(), Broken()], said.append)
    for _ in range(3):
        fanout.record(fault())
    assert said == ["faults are being lost: can't append fault 7: No space left on device"] * 2
    assert fanout.lost == 6
    fanout.close()
    assert said[2:] == ["ZeroDivisionError", "3 faults could not be recorded by Broken"] * 2


def test_complaining_can_fail_as_well() -> None:
    def complain(line: str) -> None:
        raise BrokenPipeError(line)

    fanout = Fanout([Broken()], complain)
    fanout.record(fault())
    fanout.close()
    assert fanout.lost == 1


def test_what_works_says_nothing() -> None:
    said: list[str] = []
    fanout = Fanout([Kept()], said.append)
    fanout.record(fault())
    fanout.close()
    assert (said, fanout.lost) == ([], 0)
