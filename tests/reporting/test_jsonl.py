"""Faults in a file: whole lines, in it at once, and never a guard that hangs or falls over one."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import resource
import stat
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgguard.attribution.findings import Findings
from pgguard.reporting.jsonl import BACKLOG, JsonLines, encode
from pgguard.reporting.record import to_record
from pgguard.reporting.sinks import SinkError
from tests.faults.samples import FACTS, OVERLAP, fault, process

if TYPE_CHECKING:
    from collections.abc import Iterator

LARGE = fault(libpq="x" * 200_000)
"""More than a pipe holds: 64 KiB, pipe(7)."""


def ids(path: Path) -> list[int]:
    """The faults in a file, each of them whole."""
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n") or not text
    return [json.loads(line)["id"] for line in text.splitlines()]


@pytest.fixture
def watchful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that happens to a file is overlooked because it was looked at a moment ago."""
    monkeypatch.setattr("pgguard.reporting.jsonl._LOOK_INTERVAL", 0.0)


def test_each_fault_is_in_the_file_as_a_line_before_record_returns(tmp_path: Path) -> None:
    path = tmp_path / "faults.jsonl"
    sink = JsonLines(path)
    for n in (1, 2):
        sink.record(fault(id=n))
        lines = path.read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == [to_record(fault(id=m)) for m in range(1, n + 1)]
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
    assert json.loads(line.decode())["culprits"][0]["process"]["cmdline"] == ["na\udcefve \u2028 \x1b日本\n"]


HARMFUL = [
    *range(0x20),
    *range(0x7F, 0xA1),
    *(0xAD, 0x61C, 0x180E, *range(0x200B, 0x2010), *range(0x2028, 0x2030), *range(0x2060, 0x2070), 0xFEFF),
    *(*range(0xFFF9, 0xFFFC), 0xD800, 0xDCEF, 0xDFFF, 0xE0001, 0xE0041, 0xE007F),
]


@pytest.mark.parametrize("code", HARMFUL, ids="U+{:04X}".format)
def test_no_control_character_reaches_the_file(code: int) -> None:
    """C0, C1, DEL, what ends a line for some readers, what reorders or hides text, and halves of characters."""
    text = f"a{chr(code)}b"
    line = encode(fault(summary=text)).decode("utf-8")
    assert line[:-1].isprintable()
    assert chr(code) not in line[:-1]
    assert ascii(json.loads(line)["summary"]) == ascii(text)


@given(st.text(st.characters(), max_size=40))
def test_every_record_is_one_line_for_every_reader_and_the_same_text_again(text: str) -> None:
    # Two halves beside each other are one character for whoever reads JSON; names have lower ones alone: PEP 383.
    text = (
        text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if max(text, default="") >= "\ud800"
        else text
    )
    what = fault(summary=text, facts=replace(FACTS, application_name=text, user=text))
    data = encode(what)
    line = data.decode("utf-8")
    assert line.splitlines() == [line[:-1]] == line.split("\n")[:-1]
    assert json.loads(data) == to_record(what)


def test_what_can_be_read_is_not_escaped() -> None:
    text = "naïve 日本語 Ελλάδα мир 😀 \\ \" '"
    line = encode(fault(summary=text)).decode()
    assert text.replace("\\", "\\\\").replace('"', '\\"') in line


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
    # The rest of that line has to wait, and the next behind it.
    with pytest.raises(SinkError, match="Resource temporarily unavailable") as raised:
        sink.record(fault(id=8))
    assert raised.value.lost == 0
    received = b""
    for n in range(9, 20):
        received += os.read(reader, 1 << 20)
        with contextlib.suppress(SinkError):
            sink.record(fault(id=n))
    sink.close()
    received += os.read(reader, 1 << 20)
    os.close(reader)
    lines = [json.loads(line) for line in received.splitlines()]
    assert lines == [to_record(LARGE), *(to_record(fault(id=n)) for n in range(8, 20))]


def test_a_line_that_stays_torn_is_said_when_the_file_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    sink = JsonLines(path)
    sink.record(LARGE)
    with pytest.raises(SinkError, match="Resource temporarily unavailable") as raised:
        sink.close()
    assert raised.value.lost == 1
    os.close(reader)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
def test_what_can_not_be_written_is_kept_and_written_when_it_can(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "faults.jsonl"
    sink = JsonLines(path)
    sink.record(fault(id=1))

    def write(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        for n in (2, 3):
            with pytest.raises(SinkError, match=f"^can't append faults to {path}: {os.strerror(number)}$") as raised:
                sink.record(fault(id=n))
            assert raised.value.lost == 0
        sink.tend()
    assert ids(path) == [1]
    sink.tend()
    assert ids(path) == [1, 2, 3]
    sink.record(fault(id=4))
    sink.close()
    assert ids(path) == [1, 2, 3, 4]


def test_a_full_disk_is_an_error_and_not_the_end() -> None:
    """/dev/full answers each write with ENOSPC: full(4)."""
    sink = JsonLines(Path("/dev/full"))
    for _ in range(2):
        with pytest.raises(SinkError, match=r"^can't append faults to /dev/full: No space left on device$"):
            sink.record(fault())
    with pytest.raises(SinkError) as raised:
        sink.close()
    assert raised.value.lost == 2


def test_what_is_kept_is_bounded_and_the_rest_is_counted() -> None:
    sink = JsonLines(Path("/dev/full"))
    lost = 0
    number = 3 * BACKLOG // len(encode(fault(id=1)))
    for n in range(number):
        with pytest.raises(SinkError) as raised:
            sink.record(fault(id=n))
        lost += raised.value.lost
    assert sum(map(len, sink._backlog)) <= BACKLOG
    assert lost > number // 2
    with pytest.raises(SinkError) as raised:
        sink.close()
    assert lost + raised.value.lost == number


@pytest.fixture
def small_files() -> Iterator[None]:
    """A file may have so many bytes and no more, as on a disk that is full: setrlimit(2)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * len(encode(fault(id=1))) + 100, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("rotated", [False, True], ids=["room is made", "the file is renamed"])
@pytest.mark.usefixtures("watchful")
def test_a_line_for_which_there_was_only_some_room_is_completed_or_written_anew(tmp_path: Path, rotated: bool) -> None:
    path = tmp_path / "faults.jsonl"
    sink = JsonLines(path)
    for n in (1, 2, 3):
        sink.record(fault(id=n))  # of the third a part
    with pytest.raises(SinkError, match="File too large"):
        sink.record(fault(id=4))
    torn = path.read_bytes()
    assert not torn.endswith(b"\n")
    if rotated:
        path.rename(tmp_path / "old")
    else:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10 * soft, hard))
    sink.tend()
    sink.close()
    assert ids(path) == ([3, 4] if rotated else [1, 2, 3, 4])


# Files that are rotated


@pytest.mark.usefixtures("watchful")
def test_a_file_that_was_renamed_or_removed_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "faults.jsonl"
    sink = JsonLines(path)
    sink.record(fault(id=1))
    path.rename(tmp_path / "faults.jsonl.1")
    sink.record(fault(id=2))
    path.unlink()
    sink.record(fault(id=3))
    path.rename(tmp_path / "faults.jsonl.2")
    path.touch()  # as logrotate does
    sink.record(fault(id=4))
    sink.close()
    assert ids(tmp_path / "faults.jsonl.1") == [1]
    assert ids(tmp_path / "faults.jsonl.2") == [3]
    assert ids(path) == [4]


@pytest.mark.usefixtures("watchful")
def test_it_is_noticed_without_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "faults.jsonl"
    sink = JsonLines(path)
    path.unlink()
    sink.tend()
    assert path.exists()
    sink.close()


def test_a_file_that_is_cut_to_nothing_begins_anew(tmp_path: Path) -> None:
    """As logrotate's copytruncate does."""
    path = tmp_path / "faults.jsonl"
    sink = JsonLines(path)
    sink.record(fault(id=1))
    os.truncate(path, 0)
    sink.record(fault(id=2))
    sink.close()
    assert ids(path) == [2]


@pytest.mark.usefixtures("watchful")
def test_a_directory_that_vanishes_is_waited_for(tmp_path: Path) -> None:
    directory = tmp_path / "log"
    directory.mkdir()
    path = directory / "faults.jsonl"
    sink = JsonLines(path)
    sink.record(fault(id=1))
    path.unlink()
    directory.rmdir()
    for n in (2, 3):
        with pytest.raises(SinkError, match=f"^can't append faults to {path}: No such file or directory$") as raised:
            sink.record(fault(id=n))
        assert raised.value.lost == 0
    directory.mkdir()
    sink.tend()
    assert ids(path) == [2, 3]
    sink.close()


@pytest.mark.usefixtures("watchful")
@pytest.mark.skipif(os.geteuid() != 0, reason="it takes root to plant another user's link")
@pytest.mark.usefixtures("watchful")
def test_what_can_not_be_begun_anew_goes_on_in_the_file_that_was_renamed(tmp_path: Path) -> None:
    path = tmp_path / "faults.jsonl"
    sink = JsonLines(path)
    path.rename(tmp_path / "old")
    path.symlink_to(tmp_path / "victim")
    os.chown(path, 65534, -1, follow_symlinks=False)
    sink.record(fault(id=1))
    with pytest.raises(SinkError, match="is a symbolic link of user nobody"):
        sink.reopen()
    path.unlink()
    sink.record(fault(id=2))
    sink.close()
    assert (ids(tmp_path / "old"), ids(path)) == ([1], [2])
    assert not (tmp_path / "victim").exists()


def test_a_pipe_is_not_reopened_for_its_name() -> None:
    reader, writer = os.pipe()
    sink = JsonLines(Path(f"/proc/self/fd/{writer}"))
    os.close(writer)
    sink.record(fault(id=1))
    assert os.read(reader, 1 << 16) == encode(fault(id=1))
    sink.close()
    os.close(reader)


def test_it_is_reopened_when_it_is_asked_to(tmp_path: Path) -> None:
    path = tmp_path / "faults.jsonl"
    sink = JsonLines(path)
    path.rename(tmp_path / "old")
    sink.reopen()
    sink.record(fault(id=1))
    sink.move(tmp_path / "other")
    sink.record(fault(id=2))
    with pytest.raises(SinkError, match="Is a directory"):
        sink.move(tmp_path)
    sink.record(fault(id=3))
    sink.close()
    assert (ids(tmp_path / "old"), ids(path), ids(tmp_path / "other")) == ([], [1], [2, 3])


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
