# SPDX-License-Identifier: Apache-2.0
"""An assembler for the few dozen eBPF instructions that the probe needs.

It knows no more of the instruction set than :mod:`programs` uses. Every instruction is a ``struct bpf_insn`` of
``linux/bpf.h``: an opcode, two registers of four bits, a signed 16-bit offset and a signed 32-bit immediate; the
opcodes are those of ``Documentation/bpf/standardization/instruction-set.rst``. Registers are plain numbers: the
caller's arguments arrive in :data:`R1` to ``R5``, which a call destroys together with ``R0``, its result; ``R6`` to
``R9`` survive calls; :data:`FRAME` points behind 512 bytes of stack.

What is assembled wrongly does no harm: the kernel's verifier proves memory safety and termination before it accepts a
program, and says at which instruction it can't.
"""

from __future__ import annotations

import struct
import sys
from dataclasses import dataclass

R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, FRAME = range(11)

_LITTLE = sys.byteorder == "little"
_INSTRUCTION = struct.Struct("=BBhi")
"""``struct bpf_insn``. In which half of the second byte the destination register is follows the byte order."""

_SIZES = {1: 0x10, 2: 0x08, 4: 0x00, 8: 0x18}
"""``BPF_B``, ``BPF_H``, ``BPF_W``, ``BPF_DW``."""

_LOAD = 0x61
"""``BPF_LDX | BPF_MEM``."""
_STORE_REGISTER = 0x63
"""``BPF_STX | BPF_MEM``, without the size that is or-ed to it, as in those around."""
_STORE_CONSTANT = 0x62
"""``BPF_ST | BPF_MEM``."""
_ATOMIC_ADD = 0xC3
"""``BPF_STX | BPF_ATOMIC``, with ``BPF_ADD`` (0) as the immediate, which was ``BPF_XADD`` before there were others."""
_FETCH = 0x01
"""``BPF_FETCH``, or-ed to that immediate: since Linux 5.12."""
_WIDE = 0x18
"""``BPF_LD | BPF_DW | BPF_IMM``: the only instruction of two slots."""
_CALL = 0x85
_EXIT = 0x95
_JUMP = 0x05
_SWAP_TO_BIG = 0xDC
"""``BPF_ALU | BPF_END | BPF_TO_BE``."""

_COMPARISONS = {"==": 0x15, "!=": 0x55, "&": 0x45, "<": 0xA5, "<=": 0xB5, "signed <": 0xC5}
"""``BPF_JMP`` against an immediate: ``BPF_JEQ``, ``BPF_JNE``, ``BPF_JSET``, ``BPF_JLT``, ``BPF_JLE``, ``BPF_JSLT``."""
_ARITHMETIC = {"+": 0x00, "-": 0x10, "&": 0x50, "<<": 0x60, ">>": 0x70, "=": 0xB0}
"""``BPF_ADD``, ``BPF_SUB``, ``BPF_AND``, ``BPF_LSH``, ``BPF_RSH``, ``BPF_MOV``."""
_ALU32, _ALU64, _FROM_REGISTER = 0x04, 0x07, 0x08

_PSEUDO_MAP_FD, _PSEUDO_MAP_VALUE = 1, 2
"""What the source register of a wide load says of its immediate: it is a map; it is the address of a map's value."""


@dataclass(frozen=True, slots=True)
class _Slot:
    opcode: int
    destination: int = 0
    source: int = 0
    offset: int = 0
    immediate: int = 0
    target: str | None = None
    """The label that a jump's offset is to be computed from."""

    def encode(self, offset: int) -> bytes:
        low, high = (self.destination, self.source) if _LITTLE else (self.source, self.destination)
        return _INSTRUCTION.pack(self.opcode, high << 4 | low, offset, self.immediate)


class Assembler:
    """Collects instructions; :meth:`assemble` gives the program.

    Addresses are given as a register and an offset in bytes; sizes in bytes are 1, 2, 4 or 8.
    """

    def __init__(self) -> None:
        self._slots: list[_Slot] = []
        self._labels: dict[str, int] = {}

    def label(self, name: str) -> None:
        """Name the next instruction, to be jumped to from before it: the verifier of Linux 5.8 takes no loops."""
        if name in self._labels:
            raise ValueError(f"the label {name!r} exists twice")
        self._labels[name] = len(self._slots)

    def load(self, destination: int, base: int, offset: int, size: int) -> None:
        """``destination = *(size *)(base + offset)``, the upper bits cleared."""
        self._add(_LOAD | _SIZES[size], destination, base, offset)

    def store(self, base: int, offset: int, source: int, size: int) -> None:
        """``*(size *)(base + offset) = source``."""
        self._add(_STORE_REGISTER | _SIZES[size], base, source, offset)

    def store_constant(self, base: int, offset: int, value: int, size: int) -> None:
        """``*(size *)(base + offset) = value``, a signed 32-bit constant that is sign-extended to 8 bytes."""
        self._add(_STORE_CONSTANT | _SIZES[size], base, 0, offset, value)

    def add_atomically(self, base: int, offset: int, source: int) -> None:
        """``*(u64 *)(base + offset) += source``, at once on all processors."""
        self._add(_ATOMIC_ADD | _SIZES[8], base, source, offset)

    def fetch_and_add(self, base: int, offset: int, source: int) -> None:
        """The same, and ``source`` = what was there before."""
        self._add(_ATOMIC_ADD | _SIZES[8], base, source, offset, _FETCH)

    def compute(self, destination: int, operation: str, source: int, *, bits: int = 64) -> None:
        """``destination operation= source``, two registers; with 32 bits, the upper half of the result is zero."""
        self._add(_ARITHMETIC[operation] | (_ALU64 if bits == 64 else _ALU32) | _FROM_REGISTER, destination, source)

    def compute_constant(self, destination: int, operation: str, value: int, *, bits: int = 64) -> None:
        """``destination operation= value``, a signed 32-bit constant."""
        self._add(_ARITHMETIC[operation] | (_ALU64 if bits == 64 else _ALU32), destination, immediate=value)

    def to_big_endian(self, register: int, bits: int) -> None:
        """Put the lowest 16 or 32 bits of a register in network order, and clear the others."""
        self._add(_SWAP_TO_BIG, register, immediate=bits)

    def load_map(self, destination: int, descriptor: int) -> None:
        """``destination = map``, as helpers expect it: the kernel replaces the descriptor, and holds the map."""
        self._add(_WIDE, destination, _PSEUDO_MAP_FD, immediate=descriptor)
        self._add(0)

    def load_map_value(self, destination: int, descriptor: int) -> None:
        """``destination = address of an array map's first value``, without a look-up and so never null."""
        self._add(_WIDE, destination, _PSEUDO_MAP_VALUE, immediate=descriptor)
        self._add(0)

    def load_constant(self, destination: int, value: int) -> None:
        """``destination = value``, an unsigned constant of 64 bits."""
        halves = struct.unpack("=ii", struct.pack("=Q", value))
        low, high = halves if _LITTLE else halves[::-1]
        self._add(_WIDE, destination, immediate=low)
        self._add(0, immediate=high)

    def jump(self, target: str) -> None:
        """Go on at a label."""
        self._slots.append(_Slot(_JUMP, target=target))

    def jump_if(self, register: int, comparison: str, value: int, target: str) -> None:
        """Go on at a label if a register compares to a constant; ``&`` asks for a common bit."""
        self._slots.append(_Slot(_COMPARISONS[comparison], register, immediate=value, target=target))

    def jump_if_register(self, register: int, comparison: str, other: int, target: str) -> None:
        """Go on at a label if a register compares to another one."""
        opcode = _COMPARISONS[comparison] | _FROM_REGISTER
        self._slots.append(_Slot(opcode, register, other, target=target))

    def call(self, helper: int) -> None:
        """``R0 = helper(R1, …)``."""
        self._add(_CALL, immediate=helper)

    def exit(self) -> None:
        """Return ``R0``."""
        self._add(_EXIT)

    def assemble(self) -> bytes:
        """Encode the program. Raises KeyError for a jump to a label that doesn't exist."""
        return b"".join(
            slot.encode(slot.offset if slot.target is None else self._labels[slot.target] - index - 1)
            for index, slot in enumerate(self._slots)
        )

    def _add(self, opcode: int, destination: int = 0, source: int = 0, offset: int = 0, immediate: int = 0) -> None:
        self._slots.append(_Slot(opcode, destination, source, offset, immediate))
