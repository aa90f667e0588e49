"""The list of modules in a program that Go built, and what is no such program."""

from __future__ import annotations

import shutil
import struct
import subprocess
from typing import TYPE_CHECKING

import pytest

from pgguard.attribution.gobinary import go_modules
from tests.integration.running import PROGRAMS
from tests.languages import go_program
from tests.servers import needs

if TYPE_CHECKING:
    from pathlib import Path


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
