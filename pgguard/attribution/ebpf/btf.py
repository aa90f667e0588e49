# SPDX-License-Identifier: Apache-2.0
"""Where the fields are in the running kernel's structures: its own type information, ``/sys/kernel/btf/vmlinux``.

That file is in every kernel built with CONFIG_DEBUG_INFO_BTF, as those of the distributions have been since 2020/21.
The format is ``Documentation/bpf/btf.rst`` in the kernel's source: a header, types one after the other, strings. Types
have no fixed size and refer to each other by number, so they are walked once, which takes a fiftieth of a second.
"""

from __future__ import annotations

import struct
from array import array
from pathlib import Path

KERNEL = Path("/sys/kernel/btf/vmlinux")

_HEADER = struct.Struct("=HBBIIIII")
"""``struct btf_header``: magic, version, flags, header's length, then offset and length of types and of strings."""
_MAGIC = 0xEB9F
_TYPE = struct.Struct("=III")
"""``struct btf_type``: name, kind and number of members, size or type."""
_MEMBER = struct.Struct("=III")
"""``struct btf_member``: name, type, offset in bits and, in its highest byte, the size of a bit field."""

_STRUCT, _UNION, _ENUM = 4, 5, 6
_ENUMERATOR = struct.Struct("=Ii")
"""``struct btf_enum``: name, value."""
_KINDS = range(32)
"""All that there is room for; those that mean something are 1 to 19."""
_TRAILERS = {1: 1, 3: 3, 14: 1, 17: 1}
"""Words of four bytes behind a type: an integer's encoding, an array's, a variable's linkage, a tag's component."""
_WORDS = [3 + _TRAILERS.get(kind, 0) if 1 <= kind <= 19 else 0 for kind in _KINDS]
"""Words of a type without its members, by kind; 0: there is no such kind."""
_TRAILERS_EACH = {4: 3, 5: 3, 6: 2, 13: 2, 15: 3, 19: 3}
"""The same for each member: of structures and unions, enumerations, parameters, sections, 64-bit enumerations."""
_WORDS_EACH = [_TRAILERS_EACH.get(kind, 0) for kind in _KINDS]
_QUALIFIERS = frozenset({8, 9, 10, 11, 18})
"""Kinds that stand before another type: typedef, volatile, const, restrict, a tag."""


class Btf:
    """The types of a kernel.

    Raises:
        OSError: the file doesn't exist, or can't be read.
        ValueError: it isn't BTF, or has a kind of type that this doesn't know.
    """

    def __init__(self, path: Path = KERNEL) -> None:
        self._data = path.read_bytes()
        magic, _, _, header, types, length, strings, _ = _HEADER.unpack_from(self._data)
        if magic != _MAGIC:
            raise ValueError(f"{path} is not BTF of this machine's byte order")
        self._strings = header + strings
        begin = header + types
        words = memoryview(self._data)[begin : begin + length].cast("I")
        fixed, each = _WORDS, _WORDS_EACH
        offsets = [0]
        named: dict[tuple[int, int], int] = {}
        at, end = 0, len(words)
        while at < end:
            info = words[at + 1]
            kind = info >> 24 & 0x1F
            if not fixed[kind]:
                raise ValueError(f"{path} has types of the unknown kind {kind}")
            if kind in (_STRUCT, _ENUM):
                named.setdefault((kind, words[at]), len(offsets))
            offsets.append(begin + 4 * at)
            at += fixed[kind] + each[kind] * (info & 0xFFFF)
        self._offsets = array("I", offsets)
        """By a type's number; number 0 is void."""
        self._named = named
        """Numbers of structures and enumerations by kind and name's offset."""

    def enumerator(self, enumeration: str, name: str) -> int:
        """Return the value of an enumeration's member. Raises KeyError: there is none."""
        at = self._offsets[self._number(_ENUM, enumeration)]
        count = _TYPE.unpack_from(self._data, at)[1] & 0xFFFF
        for index in range(count):
            member, value = _ENUMERATOR.unpack_from(self._data, at + 12 + 8 * index)
            if self._string(member) == name:
                return int(value)
        raise KeyError(f"enum {enumeration} has no {name}")

    def offset(self, structure: str, path: str) -> int:
        """Return the offset in bytes of a field, given as ``a.b.c``; anonymous structures on the way aren't named.

        Raises KeyError: there is no such field.
        """
        number = self._number(_STRUCT, structure)
        bits = 0
        for name in path.split("."):
            found = self._member(number, name)
            if found is None:
                raise KeyError(f"struct {structure} has no {path}")
            bits += found[0]
            number = found[1]
        return bits // 8

    def _number(self, kind: int, name: str) -> int:
        wanted = b"\0" + name.encode() + b"\0"
        at = self._data.find(wanted, self._strings)
        while at >= 0:
            number = self._named.get((kind, at + 1 - self._strings))
            if number is not None:
                return number
            at = self._data.find(wanted, at + 1)
        raise KeyError(f"the kernel's BTF has no {name}")

    def _member(self, number: int, name: str) -> tuple[int, int] | None:
        """Find a member's offset in bits, and its type's number."""
        at = self._offsets[number]
        _, info, target = _TYPE.unpack_from(self._data, at)
        while info >> 24 & 0x1F in _QUALIFIERS:
            at = self._offsets[target]
            _, info, target = _TYPE.unpack_from(self._data, at)
        if info >> 24 & 0x1F not in (_STRUCT, _UNION):
            return None
        for index in range(info & 0xFFFF):
            member, kind, bits = _MEMBER.unpack_from(self._data, at + 12 + 12 * index)
            if info >> 31:  # kind_flag: bit fields have their size in the highest byte
                bits &= 0xFFFFFF
            if member == 0 or self._string(member) == "":
                inner = self._member(kind, name)
                if inner is not None:
                    return bits + inner[0], inner[1]
            elif self._string(member) == name:
                return bits, kind
        return None

    def _string(self, offset: int) -> str:
        start = self._strings + offset
        return self._data[start : self._data.index(b"\0", start)].decode()
