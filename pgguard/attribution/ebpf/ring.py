# SPDX-License-Identifier: Apache-2.0
"""The consumer's side of a BPF ring buffer: ``kernel/bpf/ringbuf.c``, ``Documentation/bpf/ringbuf.rst``.

The kernel maps a page with the consumer's position, which is ours to write; a page with the producers' position; and
the data twice in a row, so that a record that wraps around can be read in one piece. A record is a header of 8 bytes,
the first 4 of which are its length and two flags, and its data, padded to 8 bytes. Positions only grow. A producer
reserves room and writes the length under a lock, fills the room without, and then clears the busy flag.

**Busy records are passed over.** A producer may be interrupted between reserving and submitting, by the guard even,
which then must not wait for it. Its record's length is known, so what is behind it is read, and it itself at a later
call. The events of one connection stay in order all the same: the producer holds that connection's lock, so there are
no later events of the same connection, nor any bytes that this one is about, until it is done.

**Memory order.** The kernel releases (``smp_store_release``) the position after the header is written, and the header
after the data is. x86-64 keeps the order of loads, and CPython doesn't reorder them. arm64 may load data before the
flag that says that it's there, unless there is a fence in between (:mod:`progress`). (Tried on x86-64 only.)
"""

from __future__ import annotations

import mmap
import struct
from typing import TYPE_CHECKING, Final, final

from pgguard.attribution.ebpf.programs import EVENT_SIZE, KEY_SIZE, WORDS_SIZE
from pgguard.attribution.ebpf.progress import Progress, fence

if TYPE_CHECKING:
    from collections.abc import Callable

    from mypy_extensions import i64

_BUSY: Final = 1 << 31
"""``BPF_RINGBUF_BUSY_BIT``."""
_DISCARDED: Final = 1 << 30
"""``BPF_RINGBUF_DISCARD_BIT``."""
_HEADER: Final = 8
"""``BPF_RINGBUF_HDR_SZ``."""

_unpack: Final = struct.Struct(f"=QIIIIII{KEY_SIZE}sII4xQ").unpack_from

Event = tuple[int, int, int, int, int, int, int, bytes, int, int, int]
"""Something that happened to a connection; what its ``kind`` says. A plain tuple, which is made in half the time:

0. ``position`` of the next byte in what the client sends over this connection, from 0;
1. ``size``;
2. ``kind``, a :class:`~pgguard.attribution.ebpf.programs.Kind`, as a plain number;
3. ``tid`` of the thread that ran, in the guard's pid namespace (of the initial one: any thread there is); else 0;
4. ``pid`` of its process; 0 likewise;
5. ``origin``, the TCP sequence number of the first byte. Two connections of one key differ in it, but for one in 2**32;
6. ``ticket``: of a send, under which :meth:`Ring.reached` tells how far this thread goes on; 0: under none;
7. ``key``, which connection: see :func:`~pgguard.attribution.ebpf.probe.connection_key`;
8. ``read``: of a send, the sequence number of the next byte that its process would have read, in the other direction;
   of the guard's own end (``ACCEPTED``) that of its first byte;
9. ``received``: of a send, the sequence number of the next byte that was to come;
10. ``reached``: of a send, up to which position the one had gone on who had been said to send last; 0: no further.
"""


@final
class Ring:
    """Reads events from a ring buffer; for one thread.

    Args:
        ring: descriptor of the ring buffer.
        size: its size in bytes.
        lost: descriptor of the mmapable array with the count of events lost.
        words: descriptor of that of :data:`~pgguard.attribution.ebpf.programs.WORDS_SIZE` bytes, if there is one.

    Raises:
        OSError: it can't be mapped.
    """

    def __init__(self, ring: int, size: int, lost: int, words: int | None = None) -> None:
        page = mmap.PAGESIZE
        self._mask = size - 1
        self._consumer = mmap.mmap(ring, page)
        self._producer = mmap.mmap(ring, page + 2 * size, prot=mmap.PROT_READ, offset=page)
        self._lost = mmap.mmap(lost, page, prot=mmap.PROT_READ)
        # One 8-byte load or store each: CPython copies an item of a memoryview with a memcpy of constant size.
        self._consumed = memoryview(self._consumer).cast("Q")
        self._losses = memoryview(self._lost).cast("Q")
        self._mapped_words: mmap.mmap | None = None
        if words is not None:
            self._mapped_words = mmap.mmap(words, WORDS_SIZE + page - 1 & -page, prot=mmap.PROT_READ)
        self._progress = Progress(self._producer, self._mapped_words)
        self.reached: Callable[[int], int] = self._progress.reached
        self.glance: Callable[[int], int] = self._progress.glance
        """:meth:`Progress.reached` and :meth:`Progress.glance` themselves, as they are called often."""
        self._data = memoryview(self._producer)[page:]
        self._words = self._data.cast("I")
        self._next: i64 = self._consumed[0]
        """Up to where records have been looked at."""
        self._progress.taken = self._next
        self._busy: list[int] = []
        """Positions before that of records that weren't ready."""
        self._lost_in_all = 0

    @property
    def lost(self) -> int:
        """How many events found no room, and were lost; after the end, how many in all."""
        return self._lost_in_all if self._lost.closed else self._losses[0]

    def read(self) -> list[Event]:
        """Take all events that are there, those of any one connection in order. Never waits, nor makes a system call.

        All events are there that are about bytes which have been read before the call.
        """
        produced: i64 = self._progress.produced()
        if produced == self._next and not self._busy:
            return []
        events: list[Event] = []
        busy: list[int] = []
        for position in self._busy:
            self._take(position, events, busy)
        position = self._next
        while position < produced:
            position += self._take(position, events, busy)
        self._busy, self._next = busy, position  # when all have been read: who fails reads them again
        self._progress.taken = -1 if busy else position
        self._consumed[0] = busy[0] if busy else position
        return events

    def close(self) -> None:
        """Unmap everything; nothing can be read then."""
        self._lost_in_all = self._losses[0]
        self._progress.close()
        for view in (self._consumed, self._losses, self._words, self._data):
            view.release()
        for mapped in (self._consumer, self._producer, self._lost, self._mapped_words):
            if mapped is not None:
                mapped.close()

    def _take(self, position: i64, events: list[Event], busy: list[int]) -> i64:
        """Read the record at a position, or remember it as busy; returns its length."""
        at = position & self._mask
        header: i64 = self._words[at >> 2]
        length = header & ~(_BUSY | _DISCARDED)
        if header & _BUSY:
            busy.append(position)
        elif not header & _DISCARDED and length == EVENT_SIZE:
            fence()
            events.append(_unpack(self._data, at + _HEADER))
        return _HEADER + (length + 7 & ~7)
