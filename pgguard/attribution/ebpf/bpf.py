# SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0-only
"""The bpf(2) system call, as far as the probe needs it.

Every object is a file descriptor (close-on-exec, as the kernel makes them) and lives as long as that, or as something
that it is attached to, does. Nothing is pinned, so everything is gone with the process, however it ends.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from enum import IntEnum

_SYSCALLS = {"x86_64": 321, "aarch64": 280}
"""The number of bpf(2): ``arch/x86/entry/syscalls/syscall_64.tbl``, ``include/uapi/asm-generic/unistd.h``."""

_NO_ROOM = 1 << 20
"""Bytes for the verifier's log of a program that it has refused: ours take some ten KiB."""

_LOG_LINES = 12
"""How much of the end of a log goes into an error: the instruction refused, and what led to it."""

_LICENSE = b"Dual MIT/GPL\0"
"""Of the programs: some functions that they call the kernel offers to GPL-compatible programs only, and this is one of
the strings that it takes for that (``license_is_gpl_compatible``, ``linux/license.h``). See LICENSE beside this."""


class MapType(IntEnum):
    """``enum bpf_map_type``."""

    HASH = 1
    ARRAY = 2
    SOCKHASH = 18
    SK_STORAGE = 24
    RINGBUF = 27


class ProgramType(IntEnum):
    """``enum bpf_prog_type``."""

    SOCK_OPS = 13
    SK_MSG = 16


class AttachType(IntEnum):
    """``enum bpf_attach_type``."""

    CGROUP_SOCK_OPS = 3
    SK_MSG_VERDICT = 7


class _Command(IntEnum):
    """``enum bpf_cmd``."""

    MAP_CREATE = 0
    MAP_UPDATE_ELEM = 2
    MAP_DELETE_ELEM = 3
    PROG_LOAD = 5
    PROG_ATTACH = 8
    BTF_LOAD = 18
    LINK_CREATE = 28


MMAPABLE = 1 << 10
"""``BPF_F_MMAPABLE``: a map flag, since Linux 5.5."""


class BpfError(OSError):
    """The kernel refused a bpf(2) call; ``errno`` says why, and the message what it was for."""

    def __init__(self, error: int, purpose: str, log: str = "") -> None:
        super().__init__(error, f"{purpose}: {os.strerror(error)}{f' ({log})' if log else ''}")
        self.log = log
        """The end of the verifier's log, for a program; empty if it had nothing to say."""


def create_map(kind: MapType, key: int, value: int, entries: int, name: str, flags: int = 0) -> int:
    """Create a map of ``entries`` entries with keys and values of so many bytes; returns its descriptor.

    Of a ring buffer, ``entries`` is its size in bytes, a power of two and a multiple of the page size.

    Raises:
        BpfError: EPERM without CAP_BPF, or beyond RLIMIT_MEMLOCK before Linux 5.11; EINVAL for a kind of map that
            the kernel doesn't have; ENOMEM.
    """
    attributes = struct.pack("=IIIIIII16s", kind, key, value, entries, flags, 0, 0, name.encode())
    return _bpf(_Command.MAP_CREATE, attributes, f"creating the map {name}")


NO_PREALLOC = 1
"""``BPF_F_NO_PREALLOC``: a map flag, which storage with sockets must have."""

_BTF = struct.pack(
    "=HBBIIIII" + "4I" * 2 + "6I" + "5s",
    *(0xEB9F, 1, 0, 24, 0, 56, 56, 5),  # a header, and where types and strings are behind it
    *(1, 1 << 24, 4, 32),  # 1: an integer of 32 bits, called u32
    *(1, 1 << 24, 8, 64),  # 2: one of 64 bits; names needn't differ
    *(0, 3 << 24, 0, 2, 1, 0),  # 3: an array of the second, with as many elements as are filled in
    b"\0u32\0",
)
_BTF_ELEMENTS = len(_BTF) - 5 - 4
"""Where in it the number of elements stands."""


def create_socket_storage(size: int, name: str) -> int:
    """Create a map that keeps ``size`` bytes, a multiple of 8, with each socket for as long as both exist.

    For such maps the kernel wants to know the types of keys and values. Returns its descriptor.

    Raises:
        BpfError: as for :func:`create_map`; since Linux 5.2.
    """
    types = bytearray(_BTF)
    struct.pack_into("=I", types, _BTF_ELEMENTS, size // 8)
    data, where = _buffer(bytes(types))
    btf = _bpf(_Command.BTF_LOAD, struct.pack("=QQIII", where, 0, len(types), 0, 0), f"loading the types of {name}")
    del data
    try:
        attributes = struct.pack("=IIIIIII16s", MapType.SK_STORAGE, 4, size, 0, NO_PREALLOC, 0, 0, name.encode())
        attributes += struct.pack("=IIII", 0, btf, 1, 3)  # map_ifindex, then BTF: the object, key's and value's types
        return _bpf(_Command.MAP_CREATE, attributes, f"creating the map {name}")
    finally:
        os.close(btf)


def put(map_fd: int, key: bytes, value: bytes) -> None:
    """Set an entry of a map, new or not. Raises BpfError: E2BIG if the map is full."""
    data, where = _buffer(key + value)
    _bpf(_Command.MAP_UPDATE_ELEM, struct.pack("=IxxxxQQQ", map_fd, where, where + len(key), 0), "filling a map")
    del data


def remove(map_fd: int, key: bytes) -> None:
    """Remove an entry of a map. Raises BpfError: ENOENT if there is none."""
    data, where = _buffer(key)
    _bpf(_Command.MAP_DELETE_ELEM, struct.pack("=IxxxxQQQ", map_fd, where, 0, 0), "removing from a map")
    del data


def load_program(kind: ProgramType, code: bytes, attach_type: AttachType, name: str) -> int:
    """Have a program verified and compiled; returns its descriptor.

    Args:
        kind: which says what context the program gets and what it may call.
        code: what the assembler returns.
        attach_type: what it will be attached as.
        name: shows in bpftool; at most 15 characters.

    Raises:
        BpfError: with the end of the verifier's log if it refused the program (EACCES, EINVAL); EPERM without
            CAP_BPF and, for these programs, CAP_NET_ADMIN and CAP_PERFMON.
    """
    try:
        return _load(kind, code, attach_type, name, None)
    except BpfError:
        pass
    # A log costs time and, if its buffer is too small, success: so only now that there is something to say.
    return _load(kind, code, attach_type, name, bytearray(_NO_ROOM))


def _load(kind: ProgramType, code: bytes, attach_type: AttachType, name: str, log: bytearray | None) -> int:
    data, where = _buffer(code)
    text, license_at = _buffer(_LICENSE)
    log_at = 0 if log is None else ctypes.addressof(ctypes.c_char.from_buffer(log))
    attributes = struct.pack(
        "=IIQQIIQII16sII",
        kind,
        len(code) // 8,
        where,
        license_at,
        int(log is not None),  # log_level
        0 if log is None else len(log),
        log_at,
        0,  # kern_version, not looked at since Linux 5.0
        0,  # prog_flags
        name.encode(),
        0,  # prog_ifindex
        attach_type,
    )
    try:
        return _bpf(_Command.PROG_LOAD, attributes, f"loading the program {name}")
    except BpfError as error:
        if log is None or error.errno is None:
            raise
        lines = log.split(b"\0", 1)[0].decode(errors="replace").splitlines()
        raise BpfError(error.errno, f"loading the program {name}", "; ".join(lines[-_LOG_LINES:])) from None
    finally:
        del data, text


def attach_to_map(program_fd: int, map_fd: int) -> None:
    """Have a program run at every send on the sockets in a sockhash, for as long as the map exists.

    A link would do no more and exists since Linux 6.10 only. Raises BpfError.
    """
    attributes = struct.pack("=IIII", map_fd, program_fd, AttachType.SK_MSG_VERDICT, 0)
    _bpf(_Command.PROG_ATTACH, attributes, "attaching to the map of sockets")


def attach_to_cgroup(program_fd: int, cgroup_fd: int) -> int:
    """Attach a program to a cgroup and all below it, beside those that are there; returns the link's descriptor.

    When that is closed the program is detached. Raises BpfError: EPERM if another program is attached to that cgroup
    in a way that excludes all others; EBADF if that is no cgroup of version 2.
    """
    attributes = struct.pack("=IIII", program_fd, cgroup_fd, AttachType.CGROUP_SOCK_OPS, 0)
    return _bpf(_Command.LINK_CREATE, attributes, "attaching to the cgroup")


def _bpf(command: _Command, attributes: bytes, purpose: str) -> int:
    number = _SYSCALLS.get(platform.machine())
    if number is None:
        raise BpfError(errno.ENOSYS, f"{purpose} on {platform.machine()}")
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    result: int = _syscall(number, int(command), ctypes.addressof(buffer), len(attributes))
    if result < 0:
        raise BpfError(ctypes.get_errno(), purpose)
    return result


def _buffer(data: bytes) -> tuple[object, int]:
    """Copy data to where it stays as long as the first thing returned does; the second is its address."""
    buffer = ctypes.create_string_buffer(data, len(data))
    return buffer, ctypes.addressof(buffer)


_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_long]
_syscall.restype = ctypes.c_long
