"""The list of modules in a program that Go built, and what is no such program."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import time
from pathlib import Path

import pytest

from pgguard.attribution.gobinary import _string, go_modules
from tests.integration.running import PROGRAMS
from tests.languages import go_program
from tests.servers import needs

MODULES = frozenset({"example.com/asker", "github.com/lib/pq"})


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return go_program(PROGRAMS / "go", tmp_path_factory.mktemp("go"))


def test_what_a_program_was_linked_from_is_listed(program: Path) -> None:
    assert go_modules(program) == MODULES


@needs("strip", found=shutil.which("strip"))
def test_it_survives_strip(program: Path, tmp_path: Path) -> None:
    subprocess.run(["strip", "-o", tmp_path / "stripped", program], check=True)
    assert go_modules(tmp_path / "stripped") == MODULES


def test_where_the_list_is_missing_it_is_go_all_the_same(program: Path, tmp_path: Path) -> None:
    content = program.read_bytes()
    (tmp_path / "without").write_bytes(content.replace(b"\xff Go buildinf:", b"\xff no buildinf:"))
    assert go_modules(tmp_path / "without") == frozenset()
    (tmp_path / "unnamed").write_bytes(content.replace(b".go.buildinfo\0", b".no.buildinfo\0"))
    assert go_modules(tmp_path / "unnamed") == frozenset()


@pytest.mark.parametrize("size", [0, 3, 63, 64, 100, 4000, 1 << 20])
def test_a_program_that_is_cut_off_is_none_or_says_less(size: int, program: Path, tmp_path: Path) -> None:
    (tmp_path / "cut").write_bytes(program.read_bytes()[:size])
    assert go_modules(tmp_path / "cut") in {None, frozenset()}


def test_a_list_of_impossible_length_is_read_as_far_as_it_goes(program: Path, tmp_path: Path) -> None:
    content = bytearray(program.read_bytes())
    at = content.index(b"\xff Go buildinf:") + 32
    content[at : at + 8] = b"\xff" * 8
    (tmp_path / "long").write_bytes(content)
    assert go_modules(tmp_path / "long") == frozenset()


def test_what_is_no_program_of_gos_is_none(tmp_path: Path) -> None:
    assert go_modules(tmp_path / "missing") is None
    assert go_modules(tmp_path) is None
    (tmp_path / "text").write_text("#!/bin/sh\n")
    assert go_modules(tmp_path / "text") is None
    (tmp_path / "elf").write_bytes(struct.pack("<4sBB58x", b"\x7fELF", 2, 1))
    assert go_modules(tmp_path / "elf") is None


def _elf(path: Path, *, notes: int = 1, note: bytes = b"", sections: int = 0, tail: bytes = b"") -> Path:
    """A file that says it is Go's: the header, as many program headers, and what they all point to."""
    go_note = struct.pack("<III4s", 4, 0, 4, b"Go\0\0")
    at = 64 + 56 * (notes + 1)
    content = note + tail
    header = struct.pack(
        "<4sBB10xHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 2, 62, 1, 0, 64, sections, 0, 64, 56, notes + 1, 64, 2, 1
    )
    programs = struct.pack("<IIQQQQQQ", 4, 4, at + len(go_note), 0, 0, len(note), 0, 4) * notes
    programs += struct.pack("<IIQQQQQQ", 4, 4, at, 0, 0, len(go_note), 0, 4)
    path.write_bytes(header + programs + go_note + content)
    return path


def test_the_kernels_own_way_of_laying_it_out_is_understood(tmp_path: Path) -> None:
    assert go_modules(_elf(tmp_path / "program")) == frozenset()


@pytest.mark.parametrize("sections", [(1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_a_place_beyond_the_end_of_any_file_is_none(sections: int, tmp_path: Path) -> None:
    """The kernel runs such a program, as it doesn't look at the sections."""
    assert go_modules(_elf(tmp_path / "program", sections=sections)) is None


def test_notes_without_end_take_no_time(tmp_path: Path) -> None:
    """As many as the kernel takes, all of them the same 64 kB of notes: six million."""
    path = _elf(tmp_path / "program", notes=1169, note=struct.pack("<III", 0, 0, 1) * 5461)
    began = time.thread_time()
    assert go_modules(path) is None
    assert time.thread_time() - began < 0.5


def test_a_length_without_end_takes_no_time() -> None:
    """As of a section that is as large as one that is read may be, with nothing but digits in it."""
    began = time.thread_time()
    _string(b"\xff" * (1 << 18), 0)
    assert time.thread_time() - began < 0.5


def test_what_is_no_regular_file_is_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert go_modules(tmp_path / "pipe") is None
    assert go_modules(Path("/dev/zero")) is None
