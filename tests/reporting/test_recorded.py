"""Recorded faults: grouped by cause, whatever runs of the guard they are from, and whatever has become of the file."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
import threading
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pgguard.attribution.evidence import Evidence
from pgguard.faults.catalogue import Severity
from pgguard.faults.docket import Docket
from pgguard.faults.fault import Fault
from pgguard.identity import Sender
from pgguard.reporting import recorded
from pgguard.reporting.jsonl import JsonLines, encode
from pgguard.reporting.record import to_record
from pgguard.reporting.recorded import Gatherer, Recording, RecordingError, read_recording
from pgguard.session.verdicts import Kind
from tests.faults.samples import FACTS, KERNEL, NOW, OVERLAP, TERMINATE, fault, process, verdict

ORDINARY = json.loads(encode(fault(cause=1, run="a", id=1)))


def record(**changes: Any) -> dict[str, Any]:
    """The record of a shared connection, with changes; the first of its cause."""
    return {**ORDINARY, **changes}


def repeat(number: int, **changes: Any) -> dict[str, Any]:
    """A repeat of it."""
    brief: dict[str, Any] = {"repeat_of": 1, "advice": None, "tracing": None, "requests": [], "story": []}
    return record(id=number, **(brief | changes))


def lines(*records: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in records)


def read(tmp_path: Path, content: bytes) -> Recording:
    path = tmp_path / "faults.jsonl"
    path.write_bytes(content)
    return read_recording(path)


OTHER = json.loads(encode(fault(verdict(Kind.FOREIGN_TERMINATE, "x", message=TERMINATE), cause=2, run="a", id=2)))


class TestCauses:
    def test_records_of_one_cause_are_one(self, tmp_path: Path) -> None:
        found = read(tmp_path, lines(record(), OTHER, repeat(3), repeat(4)))
        assert [(cause.kind, cause.times, cause.fault.id) for cause in found.causes] == [
            (Kind.SHARED_BY_PROCESSES, 3, 1),
            (Kind.FOREIGN_TERMINATE, 1, 2),
        ]
        assert found.causes[0].record == record()
        assert found.causes[0].in_full
        assert (found.records, found.times, found.runs, found.troubles) == (4, 4, 1, ())

    @pytest.mark.parametrize("value", [[], {}, ["intruder"], 7, None])
    def test_a_role_that_is_no_word_is_nobodys(self, value: object, tmp_path: Path) -> None:
        culprits = [one | {"role": value, "evidence": value} for one in record()["culprits"]]
        for kind in ("shared-by-processes", "connection-exhaustion"):
            [cause] = read(tmp_path, lines(record(culprits=culprits, kind=kind))).causes
            assert (cause.times, cause.processes, cause.fault.culprits) == (1, 0, ())

    def test_the_gravest_is_the_first_and_then_the_most_frequent(self, tmp_path: Path) -> None:
        kinds = [
            ("inherited-connection", "warning", 50),
            ("untracked", "info", 90),
            ("foreign-terminate", "error", 0),
            ("shared-by-threads", "error", 7),
        ]
        found = read(
            tmp_path,
            lines(
                *(
                    record(id=n, cause=n, kind=kind, severity=severity, suppressed=suppressed)
                    for n, (kind, severity, suppressed) in enumerate(kinds, 1)
                )
            ),
        )
        order = ["shared-by-threads", "foreign-terminate", "inherited-connection", "untracked"]
        assert [cause.kind for cause in found.causes] == order
        assert [(count.kind, count.times) for count in found.counts] == list(zip(order, (8, 1, 51, 91), strict=True))

    def test_what_was_suppressed_counts(self, tmp_path: Path) -> None:
        [cause] = read(tmp_path, lines(record(), repeat(2, suppressed=41), repeat(3, suppressed=5))).causes
        assert cause.times == 3 + 41 + 5

    def test_what_a_repeat_has_counted_counts_if_it_is_more(self, tmp_path: Path) -> None:
        """The file begins in the middle: an older part of it has been removed."""
        so_far = {"times": 400, "sessions": 31, "processes": 5, "since": "2026-11-22T10:00:00.000000Z"}
        found = read(tmp_path, lines(repeat(900, suppressed=3, so_far=so_far)))
        [cause] = found.causes
        assert (cause.times, cause.sessions, cause.processes, cause.in_full) == (400, 31, 5, False)
        assert cause.first_at < cause.last_at
        assert found.times == 400

    def test_a_first_record_takes_the_place_of_a_repeat(self, tmp_path: Path) -> None:
        """That one's first was in a file before this one; it has come again in another run."""
        [cause] = read(tmp_path, lines(repeat(900), record(run="b", id=5, cause=9))).causes
        assert (cause.fault.id, cause.in_full, cause.times, cause.runs) == (5, True, 2, 2)

    def test_sessions_processes_and_times_are_those_that_are_named(self, tmp_path: Path) -> None:
        again = repeat(2, at="2026-11-22T11:53:00.000000Z", session=ORDINARY["session"] | {"id": 4})
        [cause] = read(tmp_path, lines(record(), again)).causes
        assert (cause.sessions, cause.processes) == (2, 2)
        assert [cause.first_at, cause.last_at] == pytest.approx([NOW, NOW + 52.879598])

    @pytest.mark.parametrize("named", [True, False], ids=["the runs have names", "an older version's"])
    def test_the_numbers_of_another_run_are_others(self, named: bool, tmp_path: Path) -> None:
        """In each the first cause has number 1."""
        runs = (
            [record(), repeat(2)],
            [OTHER | {"id": 1, "cause": 1, "run": "b"}, repeat(2, kind=OTHER["kind"], run="b")],
        )
        records = [one if named else {**one, "run": None} for run in runs for one in run]
        found = read(tmp_path, lines(*records))
        assert [(cause.kind, cause.times) for cause in found.causes] == [
            (Kind.SHARED_BY_PROCESSES, 2),
            (Kind.FOREIGN_TERMINATE, 2),
        ]
        assert found.runs == 2

    def test_two_guards_can_append_to_one_file_at_the_same_time(self, tmp_path: Path) -> None:
        other = {"run": "b", "kind": OTHER["kind"]}
        found = read(
            tmp_path,
            lines(record(), OTHER | {"id": 1, "cause": 1, "run": "b"}, repeat(2), repeat(2, **other), repeat(3)),
        )
        assert [(cause.kind, cause.times) for cause in found.causes] == [
            (Kind.SHARED_BY_PROCESSES, 3),
            (Kind.FOREIGN_TERMINATE, 2),
        ]

    def test_what_comes_again_in_another_run_is_the_same(self, tmp_path: Path) -> None:
        """By the same programs, whatever their pids."""
        elsewhere = json.loads(json.dumps(record(run="b", cause=5, id=9)).replace("486", "598"))
        [cause] = read(tmp_path, lines(record(), repeat(2, suppressed=3), elsewhere)).causes
        assert (cause.times, cause.runs, cause.sessions) == (6, 2, 2)

    def test_what_another_program_does_is_not(self, tmp_path: Path) -> None:
        elsewhere = json.loads(json.dumps(record(run="b")).replace("puma: cluster worker", "sidekiq"))
        assert len(read(tmp_path, lines(record(), elsewhere)).causes) == 2

    def test_what_the_guard_has_told_apart_stays_so(self, tmp_path: Path) -> None:
        """It knows more than the record says."""
        assert len(read(tmp_path, lines(record(), record(id=2, cause=2))).causes) == 2

    def test_an_older_version_does_not_say_which_cause(self, tmp_path: Path) -> None:
        old = [{key: value for key, value in one.items() if key not in {"cause", "run"}} for one in (record(), OTHER)]
        again = {**old[0], "id": 3, "repeat_of": 1, "suppressed": 4, "advice": None}
        found = read(tmp_path, lines(old[0], old[1], again))
        assert [(cause.kind, cause.times) for cause in found.causes] == [
            (Kind.SHARED_BY_PROCESSES, 6),
            (Kind.FOREIGN_TERMINATE, 1),
        ]

    def test_what_a_guard_records_is_what_it_has_counted(self, tmp_path: Path) -> None:
        docket, sink = Docket(), JsonLines(tmp_path / "faults.jsonl")
        for n in range(500):
            facts = replace(FACTS, id=1 + n % 7)
            one = replace(OVERLAP, intruder=Sender(4867, 4880))
            at = NOW + n / 100
            if docket.known(facts.id, one, at=at) is None:
                for entered in docket.enter(one, replace(fault(facts=facts), id=0, at=at)).records:
                    sink.record(entered)
            elif (again := docket.repeat(facts.id, one, at=at)) is not None:
                sink.record(again)
        for rest in docket.close_all(at=NOW + 5):
            sink.record(rest)
        sink.close()
        [cause], [told] = read_recording(tmp_path / "faults.jsonl").causes, docket.causes()
        assert (cause.times, cause.sessions, cause.processes) == told.spread[:3] == (500, 7, 2)
        assert cause.first_at == pytest.approx(told.spread.since)

    def test_a_guard_can_hand_over_its_faults_itself(self) -> None:
        gatherer = Gatherer("this run")
        gatherer.record(fault(cause=1, run="a"))
        gatherer.record(replace(fault(cause=1, run="a", id=8), repeat_of=7, suppressed=2))
        gatherer.close()
        [cause] = gatherer.recording().causes
        assert (cause.times, cause.fault.id) == (4, 7)


class TestSessions:
    def test_who_had_the_connection_and_when(self, tmp_path: Path) -> None:
        [session] = read(tmp_path, lines(record(), repeat(2, at="2026-11-22T11:53:00.000000Z"))).sessions
        had_it = session.processes.values()
        assert [(one.pid, one.opened) for one in had_it] == [(4867, False), (4866, False), (4864, True)]
        assert [one.since - NOW for one in had_it] == pytest.approx([-8, -9, -12.5])
        assert [one.until - NOW for one in had_it] == pytest.approx([52.879598] * 3), "the opener has it open too"
        assert [(mark.pid, mark.severity) for mark in session.marks] == [(4867, Severity.ERROR)] * 2

    def test_whoever_has_only_opened_it_may_have_let_go_of_it(self, tmp_path: Path) -> None:
        alone = to_record(fault(OVERLAP, replace(KERNEL, holders=None), cause=1, run="a"))
        [session] = read(tmp_path, lines(alone)).sessions
        assert session.processes[4864].until == pytest.approx(NOW - 12.5)

    def test_who_is_no_child_is_known_to_have_had_it_only_then(self, tmp_path: Path) -> None:
        stranger = process(9999, 1, "python stranger.py")
        known = replace(KERNEL, senders={4866: KERNEL.senders[4866], 4867: stranger}, holders=None)
        told = to_record(fault(replace(OVERLAP, intruder=Sender(9999, 9999)), replace(known, senders={9999: stranger})))
        [session] = read(tmp_path, lines(told)).sessions
        assert session.processes[9999].since == session.processes[9999].until == pytest.approx(NOW)

    @pytest.mark.parametrize("ends", [{"over": True}, {"action": "rejected"}])
    def test_a_session_is_over_with_what_ends_it(self, ends: dict[str, Any], tmp_path: Path) -> None:
        assert [session.over for session in read(tmp_path, lines(record())).sessions] == [False]
        assert [session.over for session in read(tmp_path, lines(record(), repeat(2, **ends))).sessions] == [True]

    def test_those_with_the_gravest_faults_are_told_of(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(recorded, "SESSIONS", 3)
        warnings = [record(id=n, cause=1, severity="warning", session={"id": n}) for n in range(1, 9)]
        errors = [record(id=n, cause=2, session={"id": n}) for n in (8, 9, 10)]
        found = read(tmp_path, lines(*warnings, *errors))
        assert {one.facts.id for one in found.sessions if one.severity is Severity.ERROR} == {8, 9, 10}
        assert len(found.sessions) == 6
        assert found.more_sessions == 5

    def test_why_there_is_no_stack(self, tmp_path: Path) -> None:
        people = [one | {"stack_problem": "py-spy is not installed"} for one in ORDINARY["culprits"][:2]]
        found = read(tmp_path, lines(record(culprits=people), repeat(2)))
        assert found.stack_problems == (("py-spy is not installed", 2),)
        assert found.evidence == {Evidence.KERNEL_SENDER}


class TestFiles:
    def test_a_torn_last_line_is_said_and_left_out(self, tmp_path: Path) -> None:
        found = read(tmp_path, lines(record(), repeat(2)) + json.dumps(repeat(3)).encode()[:200])
        assert found.records == 2
        assert found.troubles == ("line 3, the last one, is cut off, and left out",)

    def test_a_last_line_without_its_line_feed_is_whole(self, tmp_path: Path) -> None:
        found = read(tmp_path, lines(record(), repeat(2))[:-1])
        assert (found.records, found.troubles) == (2, ())

    def test_what_the_next_run_has_written_behind_a_torn_line_is_read(self, tmp_path: Path) -> None:
        torn = json.dumps(repeat(2)).encode()
        for cut in (1, 20, 300, len(torn) - 1):
            next_one = encode(replace(fault(), id=1, cause=1, run="b"))
            found = read(tmp_path, lines(record()) + torn[:cut] + next_one + lines(OTHER))
            assert (found.records, found.runs) == (3, 2)
            assert found.troubles == ("line 2: the record at its beginning is cut off, and left out",)

    @pytest.mark.parametrize(
        ("line", "says"),
        [
            (b"Traceback (most recent call last):", "it isn't JSON: Expecting value at character 1"),
            (b"[1, 2]", "it is no JSON object"),
            (b'{"level": "info"}', "it has no 'id'"),
            (b'{"id": 1, "at": "2026-11-22T11:52:07Z", "kind": "x", "severity": "error"}', "no kind of fault 'x'"),
            (b"\xff\xfe\x00", "it isn't JSON"),
            (b"[" * 100_000, "it isn't JSON"),
            (b"9" * 10_000, "it isn't JSON"),
        ],
    )
    def test_a_line_that_is_no_record_is_said_and_the_others_are_read(
        self, line: bytes, says: str, tmp_path: Path
    ) -> None:
        found = read(tmp_path, lines(record()) + line + b"\n\n" + lines(repeat(2)))
        assert found.records == 2
        [trouble] = found.troubles
        assert trouble.startswith("line 2 is left out: ")
        assert says in trouble
        assert "\n" not in trouble

    def test_of_very_many_a_few_are_said(self, tmp_path: Path) -> None:
        found = read(tmp_path, b"x\n" * 1000 + lines(record()))
        assert len(found.troubles) == 21
        assert found.troubles[-1] == "so it is with 980 more lines"

    def test_what_is_not_utf_8_costs_no_record(self, tmp_path: Path) -> None:
        content = b"\xef\xbb\xbf" + lines(record(libpq="caf\xe9")).replace(b"caf\\u00e9", b"caf\xe9")
        found = read(tmp_path, content)
        assert (found.records, found.causes[0].fault.libpq) == (1, "caf\ufffd")

    def test_a_line_without_end_is_left_out(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(recorded, "LONGEST", 1 << 20)
        found = read(tmp_path, lines(record()) + b"x" * (5 << 20) + b"\n" + lines(repeat(2)))
        assert found.records == 2
        assert found.troubles == ("line 2 is left out: it is longer than 1 MiB",)

    def test_a_file_that_has_been_compressed(self, tmp_path: Path) -> None:
        found = read(tmp_path, gzip.compress(lines(record(), repeat(2))))
        assert (found.records, found.troubles) == (2, ())

    def test_one_that_ends_too_early(self, tmp_path: Path) -> None:
        """What has been read until then counts."""
        many = lines(*(repeat(n, cause=n) for n in range(1, 400)))
        found = read(tmp_path, gzip.compress(many, mtime=0)[:-20])
        assert 300 < found.records < 400
        assert "can't be decompressed any further" in found.troubles[-1]

    def test_standard_input_and_a_pipe(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "fifo")
        writer = threading.Thread(target=lambda: (tmp_path / "fifo").write_bytes(lines(record(), repeat(2))))
        writer.start()
        assert read_recording(tmp_path / "fifo").records == 2
        writer.join()
        program = "from pathlib import Path; from pgguard.reporting.recorded import read_recording as r; "
        program += "found = r(Path('-')); print(found.records, found.name)"
        told = subprocess.run(
            [sys.executable, "-c", program], input=lines(record()), capture_output=True, check=True, timeout=60
        )
        assert told.stdout == b"1 standard input\n"

    def test_an_empty_file_is_a_recording_of_no_fault(self, tmp_path: Path) -> None:
        found = read(tmp_path, b"")
        assert (found.causes, found.times, found.first_at) == ((), 0, None)

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (b"hello\nworld\n", "no line of it is a record of a fault: line 1 is left out: it isn't JSON"),
            (b'{"level": "info"}\n', "it has no 'id'; name a file that --faults has written"),
            (b'{"id": 1, "at": "20', "line 1, the last one, is cut off"),
        ],
    )
    def test_a_file_of_something_else_is_an_error_in_one_line(self, content: bytes, says: str, tmp_path: Path) -> None:
        with pytest.raises(RecordingError, match=re.escape(says)) as raised:
            read(tmp_path, content)
        assert "\n" not in str(raised.value)

    def test_a_file_that_cannot_be_read(self, tmp_path: Path) -> None:
        with pytest.raises(RecordingError, match=r"^can't read .*/missing: No such file or directory$"):
            read_recording(tmp_path / "missing")
        with pytest.raises(RecordingError, match="Is a directory"):
            read_recording(tmp_path)


class TestBounds:
    def test_memory_is_bounded_by_causes_and_not_by_lines(self) -> None:
        def grown(count: int) -> int:
            gatherer = Gatherer("x")
            tracemalloc.start()
            for n in range(2, count):
                gatherer.take(json.dumps(repeat(n, session={"id": n % 5})).encode(), n)
            kept = tracemalloc.get_traced_memory()[0]
            tracemalloc.stop()
            return kept

        assert grown(1200) < grown(400) + 50_000

    def test_of_too_many_causes_the_rest_is_counted(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(recorded, "CAUSES", 10)
        found = read(tmp_path, lines(*(record(id=n, cause=n, suppressed=1) for n in range(1, 31))))
        assert len(found.causes) == 10
        assert found.times == sum(count.times for count in found.counts) == 60

    def test_of_too_much_the_gravest_is_kept_in_full(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(recorded, "KEPT", 60_000)
        large = {"libpq": "x" * 10_000}
        warnings = [record(id=n, cause=n, severity="warning", **large) for n in range(1, 9)]
        errors = [record(id=n, cause=n, **large) for n in range(9, 12)]
        found = read(tmp_path, lines(*warnings, *errors))
        in_full = [cause for cause in found.causes if cause.in_full]
        assert [cause.severity for cause in in_full] == [Severity.ERROR] * 3 + [Severity.WARNING]
        brief = found.causes[-1].fault
        assert (brief.summary, brief.libpq) == (ORDINARY["summary"], None)
        assert isinstance(brief, Fault)
        assert sum(len(cause.line) for cause in found.causes) < 70_000
