"""What a program that Go has built says about itself: that Go built it, and of which modules.

``.note.go.buildid`` tells that it is Go's (``cmd/internal/buildid/note.go`` in Go's sources), and ``.go.buildinfo``,
which survives strip(1), which modules were linked in: what ``go version -m`` prints (``debug/buildinfo``). Programs
that were built before Go 1.18, or without modules, list none. Only a bounded part of the file is read, and no number in
it is believed: anybody can write such a file, with any number in any place, and run it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pgguard.attribution.trust import open_regular

_ELF64 = struct.Struct("<4sBB26xQQ6xHHHHH")
"""``Elf64_Ehdr``: magic, class, byte order; where the program headers and the section headers are; the size of a
program header, how many, the size of a section header, how many, which one has the sections' names. elf(5)."""
_PROGRAM_HEADER = struct.Struct("<I4xQ16xQ")
"""``Elf64_Phdr``: type, offset in the file, and, after two addresses, size in the file."""
_SECTION_HEADER = struct.Struct("<I20xQQ")
"""``Elf64_Shdr``: name, and, after type, flags and address, offset in the file and size."""
_NOTE = struct.Struct("<III")
"""``Elf64_Nhdr``: size of the name, size of the content, type. Both follow, filled up to four bytes."""
_PT_NOTE = 4
_GO_NOTE = b"Go\0\0", 4
_PROGRAMS_LIMIT = 64
"""Program headers that are looked at; Go writes some ten, the kernel takes 1170: ``load_elf_phdrs()``."""
_NOTES_LIMIT = 65536
"""Bytes of all notes together."""
_SECTIONS_LIMIT = 256
_NAMES_LIMIT = 16384

_BUILD_INFO = b".go.buildinfo\0"
_BUILD_INFO_HEAD = struct.Struct("<14sBB16x")
"""Magic, size of a pointer, flags; the strings follow: ``buildInfoHeaderSize`` in ``debug/buildinfo/buildinfo.go``."""
_BUILD_INFO_MAGIC = b"\xff Go buildinf:"
_STRINGS_FOLLOW = 2
"""The flag of Go 1.18 and later: what follows is not pointers."""
_BUILD_INFO_LIMIT = 1 << 18
_LENGTH_BITS = 63
"""Of the length of a string, at most; a file may go on with it to its end."""
_FENCE = 16
"""Bytes that stand around the list of modules: ``runtime/debug/mod.go``."""


class _Header(NamedTuple):
    programs: int
    program_size: int
    program_count: int
    sections: int
    section_size: int
    section_count: int
    names: int


def go_modules(path: Path) -> frozenset[str] | None:
    """The import paths of the modules in a program that Go built; ``None`` if it is none, or can't be read."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            header = _header(file)
            if header is None or _GO_NOTE not in _notes(file, header):
                return None
            return frozenset(_modules(_build_info(file, header)))
    except (OSError, struct.error, OverflowError, ValueError):  # the last two: a place where nothing can be
        return None


def _header(file: BinaryIO) -> _Header | None:
    """Read the header of a 64-bit little-endian program; ``None`` if it is something else."""
    magic, kind, order, programs, sections, *rest = _ELF64.unpack(file.read(_ELF64.size))
    if (magic, kind, order) != (b"\x7fELF", 2, 1):
        return None
    program_size, program_count, section_size, section_count, names = rest
    return _Header(programs, program_size, program_count, sections, section_size, section_count, names)


def _notes(file: BinaryIO, header: _Header) -> Iterator[tuple[bytes, int]]:
    """Yield the name and type of each note; struct.error if the program is cut off."""
    left = _NOTES_LIMIT
    for n in range(min(header.program_count, _PROGRAMS_LIMIT)):
        file.seek(header.programs + n * header.program_size)
        kind, at, length = _PROGRAM_HEADER.unpack(file.read(_PROGRAM_HEADER.size))
        if kind != _PT_NOTE:
            continue
        file.seek(at)
        notes = file.read(min(length, left))
        left -= len(notes)
        position = 0
        while position + _NOTE.size <= len(notes):
            name_size, content_size, note_kind = _NOTE.unpack_from(notes, position)
            position += _NOTE.size
            yield notes[position : position + name_size], note_kind
            position += -(-name_size // 4) * 4 + -(-content_size // 4) * 4


def _build_info(file: BinaryIO, header: _Header) -> bytes:
    """Read the section of that name; empty if there is none."""
    sections: list[tuple[int, int, int]] = []
    for n in range(min(header.section_count, _SECTIONS_LIMIT)):
        file.seek(header.sections + n * header.section_size)
        sections.append(_SECTION_HEADER.unpack(file.read(_SECTION_HEADER.size)))
    if header.names >= len(sections):
        return b""
    _, at, size = sections[header.names]
    file.seek(at)
    names = file.read(min(size, _NAMES_LIMIT))
    for name, at, size in sections:
        if names.startswith(_BUILD_INFO, name):
            file.seek(at)
            return file.read(min(size, _BUILD_INFO_LIMIT))
    return b""


def _modules(info: bytes) -> Iterator[str]:
    if len(info) < _BUILD_INFO_HEAD.size:
        return
    magic, _, flags = _BUILD_INFO_HEAD.unpack_from(info)
    if magic != _BUILD_INFO_MAGIC or not flags & _STRINGS_FOLLOW:
        return
    _, position = _string(info, _BUILD_INFO_HEAD.size)  # the version of Go
    modules, _ = _string(info, position)
    for line in modules[_FENCE:-_FENCE].decode(errors="replace").splitlines():
        # dep, import path, version, checksum: BuildInfo.String() in runtime/debug/mod.go
        fields = line.split("\t")
        if fields[0] in {"mod", "dep"} and len(fields) > 1:
            yield fields[1]


def _string(data: bytes, position: int) -> tuple[bytes, int]:
    """Read a string behind its length, which is written as ``encoding/binary.Uvarint`` reads it; and where it ends."""
    size = shift = 0
    while position < len(data):
        byte = data[position]
        position += 1
        size |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80 or shift >= _LENGTH_BITS:
            break
    return data[position : position + size], position + size
