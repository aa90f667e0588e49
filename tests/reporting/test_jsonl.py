"""Faults in a file: whole lines, in it at once, and never a guard that hangs or falls over one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from pathlib import Path

import pytest

from pgguard.attribution.findings import Findings
from pgguard.reporting.jsonl import JsonLines, encode
from pgguard.reporting.sinks import SinkError
from tests.faults.samples import OVERLAP, fault, process

LARGE = fault(libpq="x" * 200_000)
"""More than a pipe holds: 64 KiB, pipe(7)."""


def test_each_fault_is_in_the_file_as_a_line_before_record_returns(tmp_path: Path) -> None:
    path = tmp_path / "faults.jsonl"
    sink = JsonLines(path)
    for n in (1, 2):
        sink.record(fault(id=n))
        lines = path.read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == [fault(id=m).to_record() for m in range(1, n + 1)]
    sink.close()


def test_each_line_is_a_single_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """O_APPEND keeps two guards' lines apart only if each is written at once."""
    sink = JsonLines(tmp_path / "faults.jsonl")
    writes: list[bytes] = []

    def write(_fd: int, data: bytes) -> int:
        writes.append(data)
        return len(data)

    monkeypatch.setattr(os, "write", write)
    sink.record(LARGE)
    assert writes == [encode(LARGE)]
    sink.close()


def test_a_file_that_is_there_is_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "faults.jsonl"
    path.write_text("{}\n", encoding="utf-8")
    sink = JsonLines(path)
    sink.record(fault())
    sink.close()
    assert path.read_bytes() == b"{}\n" + encode(fault())


def test_a_new_file_is_not_for_everybody(tmp_path: Path) -> None:
    path = tmp_path / "faults.jsonl"
    JsonLines(path).close()
    assert stat.S_IMODE(path.stat().st_mode) & stat.S_IRWXO == 0


def test_no_program_that_the_guard_starts_inherits_the_file(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "faults.jsonl")
    assert not os.get_inheritable(sink._fd)
    sink.close()


def test_names_that_are_not_utf8_are_still_json() -> None:
    worker = process(4867, 4864, "na\udcefve \u2028 \x1b日本\n")
    line = encode(fault(OVERLAP, Findings(senders={4867: worker})))
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert json.loads(line.decode())["culprits"][0]["process"]["cmdline"] == ["na?ve \u2028 \x1b日本\n"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("directory", "Is a directory"),
        ("nowhere/faults.jsonl", "No such file or directory"),
        ("file/faults.jsonl", "Not a directory"),
        ("fifo", "no process has this FIFO open for reading"),
    ],
)
def test_what_can_not_be_opened_is_one_line_for_the_user(tmp_path: Path, name: str, why: str) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(SinkError, match=f"^can't append faults to {re.escape(str(tmp_path / name))}: {why}$"):
        JsonLines(tmp_path / name)


def test_a_fifo_whose_reader_stalls_never_blocks_and_never_tears_a_line(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    sink = JsonLines(path)
    sink.record(LARGE)
    # The rest of that line has to wait, and the next has no place behind it.
    with pytest.raises(SinkError, match="Resource temporarily unavailable"):
        sink.record(fault(id=8))
    received = b""
    for n in range(9, 20):
        received += os.read(reader, 1 << 20)
        with contextlib.suppress(SinkError):
            sink.record(fault(id=n))
    sink.close()
    received += os.read(reader, 1 << 20)
    os.close(reader)
    lines = [json.loads(line) for line in received.splitlines()]
    assert lines[0] == LARGE.to_record()
    assert len(lines) > 1
    assert all(line == fault(id=line["id"]).to_record() for line in lines[1:])


def test_a_line_that_stays_torn_is_said_when_the_file_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    sink = JsonLines(path)
    sink.record(LARGE)
    with pytest.raises(SinkError, match="Resource temporarily unavailable"):
        sink.close()
    os.close(reader)


def test_a_full_disk_is_an_error_and_not_the_end() -> None:
    """/dev/full answers each write with ENOSPC: full(4)."""
    sink = JsonLines(Path("/dev/full"))
    for _ in range(2):
        with pytest.raises(SinkError, match=r"^can't append faults to /dev/full: No space left on device$"):
            sink.record(fault())
    sink.close()


def test_standard_output_takes_faults() -> None:
    """``--faults /dev/stdout``, here a pipe by way of its /proc name."""
    reader, writer = os.pipe()
    sink = JsonLines(Path(f"/proc/self/fd/{writer}"))
    sink.record(fault())
    assert os.read(reader, 1 << 16) == encode(fault())
    # Opened anew, so that the descriptor that others share stays blocking.
    assert os.get_blocking(writer)
    sink.close()
    os.close(reader)
    os.close(writer)
