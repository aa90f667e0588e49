"""Sinks behind one another: whatever one does, neither the others nor the session notice."""

from __future__ import annotations

from pgguard.faults.fault import OUTLINED, Fault
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
    def __str__(self) -> str:
        return "broken.jsonl"

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
    assert said[2:] == ["ZeroDivisionError", "3 faults could not be written to broken.jsonl"] * 2


class Fussy(Kept):
    """Can't take a fault for what stands in it."""

    def record(self, fault: Fault) -> None:
        if fault.culprits:
            raise ValueError("year 99999 is out of range")
        super().record(fault)


def test_a_fault_that_can_not_be_told_in_full_is_outlined() -> None:
    said: list[str] = []
    fussy, after = Fussy(), Kept()
    fanout = Fanout([fussy, after], said.append)
    fanout.record(fault(id=3))
    [outlined] = fussy.faults
    assert (outlined.id, outlined.kind, outlined.session.id) == (3, fault().kind, fault().session.id)
    assert outlined.summary == OUTLINED
    assert after.faults == [fault(id=3)]
    assert (said, fanout.lost) == ([], 0)


class Flaky:
    """Fails when it is told to."""

    def __init__(self) -> None:
        self.error: SinkError | None = None

    def record(self, fault: Fault) -> None:  # noqa: ARG002
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        pass


def test_what_is_kept_is_not_lost_and_that_it_works_again_is_said() -> None:
    said: list[str] = []
    flaky = Flaky()
    fanout = Fanout([flaky], said.append)
    flaky.error = SinkError("No space left on device", lost=0)
    for _ in range(3):
        fanout.record(fault())
    assert said == ["faults are kept until they can be written: No space left on device"]
    flaky.error = SinkError("No space left on device")
    for _ in range(3):
        fanout.record(fault())
    assert said[1:] == ["faults are being lost: No space left on device"]
    flaky.error = None
    for _ in range(3):
        fanout.record(fault())
    assert said[2:] == ["faults are being written again; 3 faults lost so far"]
    assert fanout.lost == 3


def test_a_sink_that_fails_and_works_by_turns_is_not_told_of_each_time() -> None:
    said: list[str] = []
    flaky = Flaky()
    fanout = Fanout([flaky], said.append)
    for n in range(1000):
        flaky.error = SinkError("Resource temporarily unavailable", lost=n % 4 // 2) if n % 2 else None
        fanout.record(fault())
    assert len(said) <= 6
    assert fanout.lost == 250


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
