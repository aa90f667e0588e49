# SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0-only
"""The probe's programs: what runs in the kernel, when, and why what they report is certain.

**What runs**, in each of two ways (:class:`Way`). For sockets that aren't connected to the guard only the first program
runs, and there it does nothing but compare addresses, twice per connection.

======== ========================================== ===================================================================
program  runs                                       and reports
======== ========================================== ===================================================================
sock_ops when any TCP connection is made in the     ``OPENED`` by whom, in connect(2)'s caller; ``WATCHED`` when it is
         cgroup or below                            established, or ``UNWATCHED``; ``ACCEPTED`` for the guard's own end
sock_ops CALLBACK: at the end of every send on a    ``SENDING`` so many bytes from where the last send ended, or
         socket that is watched, in the sender's    ``UNCERTAIN``; or, if it is the same thread again, only up to
         context, under the socket's lock           where it has come, in a word of the connection's
sk_msg   MAP: the same, at the beginning            ``SENDING`` so many bytes from here on, or ``UNCERTAIN``
======== ========================================== ===================================================================

**By CALLBACK** (Linux 6.15, "bpf: Add BPF_SOCK_OPS_TSTAMP_SENDMSG_CB"). A bit in the socket, which only programs can
set, has ``tcp_sendmsg_locked`` (net/ipv4/tcp.c) call the program when it has taken what it takes, before it pushes the
last of it. Nothing else is different for that socket: made for time stamps, of which the program asks for none. So the
report is there before the bytes are; of a send of more than a segment (64 KiB on loopback) the first ones can be read
earlier, and then are unknown.

All that has been written into the stream since the program was called last is this thread's, unless there was a send
that gave up the lock, or ended, without a call: one that came to wait for room, and waits still; or that had got only
part of its bytes in and was refused the rest (O_NONBLOCK, a signal), when all that had been sent already, so that TCP
has no segment to show to the program. Either takes a full buffer. So it is remembered with each socket what its buffer
was like at the last call, and whether it can have been full since is computed from how much has been written (see
below, "What is"): if so, all of it is UNCERTAIN. Of a bulk transfer that keeps the buffer full that is much; of
requests that wait for answers nothing. As what is remembered stays in the kernel, a report may be lost.

**By CALLBACK: who goes on isn't reported again.** A client's thread sends thousands of times in a row. So it is
remembered as well who has been reported last, and when it is that one again, and nothing lay unread, the program only
writes down how far that one has come, in a word of an array that the guard has mapped. To read that takes the guard
half of what a report takes, and however long it is kept from reading, there are no reports to be lost. The report of
who sends is written before the word that goes on from it, both under the socket's lock. So whoever reads first the word
and then the reports has those of all who have sent something in front of where the word points, and it is the last one
of them who has come that far. When a report is lost, the word stays as it is, and the next send is reported, whoever
sends. Connections get their words with their first reports, in turn: each has a ticket, and the word what tells its
ticket from others of the same word. After 65,535 other connections another one is given the same word. Who had it
finds out at its next send, and gets another; if both write at one moment, what one of them has sent is unknown.

**By MAP: why sizes are not enough.** ``tcp_bpf_sendmsg`` (net/ipv4/tcp_bpf.c) takes the socket's lock, copies what is
to be sent, runs the sk_msg program on it, and hands it to TCP (``tcp_bpf_push``), with the verdict stored in the
socket, ``psock->eval``, until that has been done. If the socket's buffer fills up meanwhile, TCP gives the lock away
and waits. Another thread that gets the lock finds a verdict there already, skips the program, and sends bytes that
nobody reports, in the middle of those that were. If the send doesn't wait (O_NONBLOCK) or is interrupted, it ends with
fewer bytes than were reported, and since the verdict stays behind, the next sender is skipped. So sizes run ahead of
the stream, and behind it, and no sum reveals it when they do both by the same amount. Nor is it enough to report where
the stream stood at the beginning of a send, for a send of 1,000 bytes may end after 400 of them.

**By MAP: what is.** The program reports, under the lock: from this position in the stream on, so many bytes are this
thread's; and it reports no more than what TCP will take without waiting. Then nobody else gets the lock before they are
in the stream, and the report is true whatever happens before or after, and whichever other report is missing.

- The position is that of the byte that TCP writes next, computed from ``write_seq``, ``snd_una`` and ``bytes_acked``,
  none of which changes while the lock is held.
- ``tcp_sendmsg_locked`` (net/ipv4/tcp.c) waits where it needs a new segment and ``sk_stream_memory_free`` denies it: if
  ``sk_wmem_queued`` has reached ``sk_sndbuf``, or what isn't sent yet has reached TCP_NOTSENT_LOWAT. How far ``n`` more
  bytes can bring the former is bounded: by ``n``, and by what each new segment costs (see :data:`_OVERHEAD`). The
  program computes how many bytes fit for certain.
- If fewer fit than are to be sent, it asks with ``bpf_msg_apply_bytes`` to be run again after those that do. If next to
  none do, it reports one KiB as UNCERTAIN, which will wait, or won't, and asks to be run again after that. So of a bulk
  transfer only the last 10 KiB are unknown each time the buffer fills up.
- TCP may also be denied memory, and wait then (``__sk_mem_raise_allocated``, net/core/sock.c): if all sockets together
  have come to the limits of ``net.ipv4.tcp_mem``, before which "memory pressure" is declared, under which nothing is
  certain; or if the sender's cgroup has come to its limit for TCP (``memory.kmem.tcp.limit_in_bytes`` of version 1):
  sockets in one that has such a limit aren't watched.
- Where sends can fail or grow for other reasons the program reports nothing else than UNCERTAIN either: a socket with
  SO_ZEROCOPY (ENOBUFS), or with kernel TLS or anything of that kind on top.

What that is worth by MAP, measured with two threads that send 1 MB at a time, 40 MB in all, over one connection: adding
up the sizes reported names 28 % of the bytes wrongly (44 % if they don't block), positions and sizes 6 % (2 %), these
rules none, with 3 % unknown. By CALLBACK no name was wrong either: of six threads in three processes that keep the
buffer full, 44 % of the bytes are unknown (MAP: 2 %); of 6,000 requests of 40 bytes to 1 MB through the guard, none.
What it takes of the sender's processor: 0.2 µs a send (MAP: 0.5).

**What is assumed.** That a sender's cgroup which has used up its ``memory.max`` gets something back by reclaiming, or
has a process killed, before the kernel gives up on memory for TCP: if it gave up, TCP would wait. By MAP, that no
thread sends with MSG_FASTOPEN on a connection that is established: that fails with EISCONN after the program has run.
By CALLBACK, that no send fails in its middle for want of the memory that it sends from (EFAULT), nor splices pages with
next to nothing in each, and that nobody lowers the limits of the buffer and raises them again between two sends. In all
these cases it takes another thread that sends on the same connection next for a name to be wrong; by MAP
``Account.contradictions`` counts what shows it afterwards. (Programs at ``sk_stream_wait_memory`` and ``sk_msg_free``
would see it all; but not every kernel allows tracing programs: the one that this was written on doesn't.) No other
program can change what is sent: a socket that is in a map with an sk_msg program already can't be put into a second
one.

**What they rely on.** The positions are in ``struct tcp_sock``, none of whose stable views (``bpf_sock``,
``bpf_tcp_sock``, ``bpf_sock_ops``) has ``write_seq``. So fields are found through the kernel's own type information
when the programs are assembled (:mod:`btf`), and the verifier checks every access against the same. Both programs
read addresses from there too, so that they share one piece of code. Of the stable contexts only ``bpf_sock_ops.op``
and ``.sk`` and ``sk_msg_md.sk`` and ``.size`` are used.

Addresses and remote ports in ``struct sock`` are in network order, the local port (``skc_num``) is in host order; keys
have everything in network order, and IPv4 addresses in IPv6's form ``::ffff:a.b.c.d``, since a socket of either family
may be at either end.

A register keeps one meaning through a program: R6 the context, R7 the ``struct tcp_sock``, R8 the size, or by CALLBACK
what is remembered with the socket, R9 the event.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Final

from pgguard.attribution.ebpf.assembler import FRAME, R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, Assembler
from pgguard.attribution.ebpf.btf import Btf


class Way(StrEnum):
    """How the kernel is asked who sends."""

    CALLBACK = "callback"
    """TCP calls the sock_ops program at the end of every send, and all else is as it was: since Linux 6.15."""
    MAP = "map"
    """An sk_msg program, for which the socket must be in a map, and then receives in another way."""


class Kind(IntEnum):
    """What an event says."""

    OPENED = 1
    """This thread called connect(2)."""
    ACCEPTED = 2
    """The guard's end of the connection is established; who runs then is by chance."""
    UNWATCHED = 3
    """The client's socket is not watched; ``size`` is the errno. Its sends will go unreported."""
    SENDING = 4
    """The ``size`` bytes from ``position`` on are this thread's. This is certain, whatever else happens."""
    UNCERTAIN = 5
    """This thread wants to send, but how many of the next ``size`` bytes are its own can't be told."""
    WATCHED = 6
    """The client's socket is watched; ``position`` is its cookie, and its key in the map."""
    BLOCKING = 7
    """As UNCERTAIN; and the socket blocks, so that it should be taken out of the map. By MAP alone."""


EVENT_SIZE: Final = 88
POSITION, SIZE, KIND, TID, PID, ORIGIN, TICKET, KEY, READ, RECEIVED, REACHED = 0, 8, 12, 16, 20, 24, 28, 32, 68, 72, 80
"""Offsets in an event: an u64, six u32 in host order, the key, two u32, four bytes of nothing, and an u64."""

TICKET_SHIFT: Final = 16
"""In a ticket: which word, below; above that, what tells the connection from others that are given the same."""
TICKETS: Final = 1 << TICKET_SHIFT
"""Words in which the program writes how far the sender goes on that it has reported last, one for each connection."""
WORD_SHIFT: Final = 48
"""In a word: how far, below; above that, as in its ticket, for which connection."""
WORDS_SIZE = 8 * TICKETS + 8
"""Bytes: the words, and how many tickets have been given."""

KEY_SIZE = 36
"""The client's address, the guard's, 16 bytes each; the client's port, the guard's: all in network order."""
_CLIENT_ADDRESS, _GUARD_ADDRESS, _CLIENT_PORT, _GUARD_PORT = 0, 16, 32, 34

LISTENER_KEY_SIZE = 20
"""Of the map of listeners: an address, 16 bytes; a port, 2 bytes; two zeros."""
SAME_NAMESPACE = 1
"""The value, an u32, of a listener that is reached from the guard's own network namespace only."""
LOOPBACK_NETWORK = bytes(10) + b"\xff\xff\x7f\x00\x00\x00"
"""The address that stands in the map of listeners for all of 127.0.0.0/8."""

# Helper functions, as numbered in linux/bpf.h.
_MAP_LOOKUP_ELEM = 1
_GET_CURRENT_PID_TGID = 14
_GET_SOCKET_COOKIE = 46
_SETSOCKOPT = 49
_MSG_APPLY_BYTES = 61
_SOCK_HASH_UPDATE = 70
_SK_STORAGE_GET = 107
_PROBE_READ_KERNEL = 113
_GET_NS_CURRENT_PID_TGID = 120
_RINGBUF_RESERVE = 131
_RINGBUF_SUBMIT = 132
_SKC_TO_TCP_SOCK = 137

_NO_WAKEUP = 1
"""``BPF_RB_NO_WAKEUP``: nobody sleeps on the ring buffer, as whoever has read bytes looks into it anyway."""

# struct bpf_sock_ops, linux/bpf.h.
_OPS_OP, _OPS_SK = 0, 184
_TCP_CONNECT_CB, _ACTIVE_ESTABLISHED_CB, _PASSIVE_ESTABLISHED_CB = 3, 4, 5
_TSTAMP_SENDMSG_CB = 20

_SOL_SOCKET = 1
_SK_BPF_CB_FLAGS, _SK_BPF_CB_TX_TIMESTAMPING = 1009, 1
"""The socket option that only programs can set, and its bit: have TCP call back at sends. ``linux/bpf.h``."""

STORAGE_SIZE = 56
"""Of what is remembered with each socket that is watched: see the offsets."""
_TOLD, _LIMIT, _QUEUED, _UNSENT, _SENDER, _REACHED, _TICKET = range(0, STORAGE_SIZE, 8)
"""Offsets in it: up to where in the stream senders have been followed, and what the buffer was like then: its limit in
bytes (0: it may have had none to give), how many were queued in it, and how many of them not sent. Then who sent last,
as the event says it (0: that hasn't been said), up to where the last one goes of whom it has been said, and under
which ticket (0: none)."""
_TICKET_BITS = 31

# struct sk_msg_md, linux/bpf.h.
_MSG_SIZE, _MSG_SK = 68, 72
_SK_PASS = 1

_PAGE = 4096
"""Bytes."""
_MORSEL = 1024
"""Bytes. The least that it is worth being run again for, and what is sent at a time when the buffer is full.

After a send that ended early, the kernel skips the program until so many bytes have been sent, so this is also how
much is unknown then.
"""
_OVERHEAD = 8192
"""Bytes by which ``sk_wmem_queued`` may grow beyond what is in proportion to the bytes sent.

A segment's own memory, ``SKB_TRUESIZE(MAX_TCP_HEADER)``, is below 2 KiB. For n bytes TCP begins at most one segment per
piece of memory that they were copied to (``sk_msg_alloc``: pieces of at least a page, but for the first and the last),
at most one per maximum segment size, and one: n / 4096 + n / mss + 4 of them cover it. With the n bytes themselves that
is at most 2 n + 8 KiB for segments of a page or more, and less than 4 n + 8 KiB for those of 1 KiB or more.
"""
_SMALL_SEGMENT = 1024
"""Bytes. Below that, as on no real network, nothing is reported."""

_LARGE_SEGMENT = 32_768
"""Bytes. As on loopback: those that are queued can't be cut into so many that it takes a sixteenth more memory."""

_AF_INET, _AF_INET6 = 2, 10
_LOOPBACK_OCTET = 127
_IPV4_MAPPED = -0x10000
"""The bytes 0, 0, 0xff, 0xff in little-endian order, as both supported architectures have it."""

# The stack, as offsets from its end.
_STACK_KEY = -40
_STACK_LISTENER = -64
_STACK_PIDS = -72
_STACK_COOKIE = -80
_STACK_PRESSURE = -88
_STACK_START = -96
_STACK_SENT = -104
_STACK_ORIGIN = -112
_STACK_KIND = -120
_STACK_OPTION = -128
_STACK_WHO = -136


@dataclass(frozen=True, slots=True)
class Maps:
    """Descriptors of the maps that the programs share."""

    ring: int
    lost: int
    """An array of one u64: how many events didn't fit into the ring buffer."""
    listeners: int
    sockets: int
    """A sockhash for :attr:`Way.MAP`, storage that goes with each socket for :attr:`Way.CALLBACK`."""
    words: int | None
    """For :attr:`Way.CALLBACK`, an array of one value of :data:`WORDS_SIZE` bytes."""


@dataclass(frozen=True, slots=True)
class Namespaces:
    """Of the guard, as ``/proc/self/ns`` shows them."""

    net: int
    pid: tuple[int, int] | None
    """Device and inode; ``None`` for the initial one, in which every process has a pid."""


class _Fields:
    """Offsets in ``struct tcp_sock``, which begins with the ``struct sock`` that it is."""

    def __init__(self, btf: Btf) -> None:
        common = "inet_conn.icsk_inet.sk.__sk_common"
        self.family = btf.offset("tcp_sock", f"{common}.skc_family")
        self.remote_address = btf.offset("tcp_sock", f"{common}.skc_daddr")
        self.local_address = btf.offset("tcp_sock", f"{common}.skc_rcv_saddr")
        self.remote_port = btf.offset("tcp_sock", f"{common}.skc_dport")
        self.local_port = btf.offset("tcp_sock", f"{common}.skc_num")
        self.remote_address6 = btf.offset("tcp_sock", f"{common}.skc_v6_daddr")
        self.local_address6 = btf.offset("tcp_sock", f"{common}.skc_v6_rcv_saddr")
        self.namespace = btf.offset("tcp_sock", f"{common}.skc_net.net")
        self.namespace_inode = btf.offset("net", "ns.inum")
        self.upper_layer = btf.offset("tcp_sock", "inet_conn.icsk_ulp_ops")
        self.write_seq = btf.offset("tcp_sock", "write_seq")
        self.snd_una = btf.offset("tcp_sock", "snd_una")
        self.bytes_acked = btf.offset("tcp_sock", "bytes_acked")
        self.snd_nxt = btf.offset("tcp_sock", "snd_nxt")
        self.segment_size = btf.offset("tcp_sock", "mss_cache")
        self.buffer_limit = btf.offset("tcp_sock", "inet_conn.icsk_inet.sk.sk_sndbuf")
        self.buffered = btf.offset("tcp_sock", "inet_conn.icsk_inet.sk.sk_wmem_queued")
        self.unsent_limit = btf.offset("tcp_sock", "notsent_lowat")
        self.namespace_unsent_limit = btf.offset("net", "ipv4.sysctl_tcp_notsent_lowat")
        self.flags = btf.offset("tcp_sock", f"{common}.skc_flags")
        self.protocol = btf.offset("tcp_sock", f"{common}.skc_prot")
        self.memory_pressure = btf.offset("proto", "memory_pressure")
        self.memory_cgroup = _optional_offset(btf, "tcp_sock", "inet_conn.icsk_inet.sk.sk_memcg")
        self.tcp_limited = _optional_offset(btf, "mem_cgroup", "tcpmem_active")
        self.zero_copy = 1 << btf.enumerator("sock_flags", "SOCK_ZEROCOPY")
        self.rcv_nxt = btf.offset("tcp_sock", "rcv_nxt")
        self.copied_seq = btf.offset("tcp_sock", "copied_seq")
        self.socket = btf.offset("tcp_sock", "inet_conn.icsk_inet.sk.sk_socket")
        self.file = btf.offset("socket", "file")
        self.file_flags = btf.offset("file", "f_flags")


def _optional_offset(btf: Btf, structure: str, path: str) -> int | None:
    """Return the offset of a field that only some configurations of the kernel have."""
    try:
        return btf.offset(structure, path)
    except KeyError:
        return None


class Programs:
    """Assembles the programs for one kernel and one set of maps.

    Raises KeyError if the kernel's structures lack what they need.
    """

    def __init__(
        self, btf: Btf, maps: Maps, namespaces: Namespaces, *, way: Way = Way.MAP, blocking: bool = False
    ) -> None:
        self._way = way
        self._fields = _Fields(btf)
        self._maps = maps
        self._namespaces = namespaces
        self._words = -1 if maps.words is None else maps.words
        self._blocking = blocking
        """Sockets that block are put into the map too."""

    def sock_ops(self, *, pids: bool = True) -> bytes:
        """Assemble the program that finds connections to the guard.

        It always returns 1 and sets no reply, so that nothing changes for any connection, whatever other programs do.

        Args:
            pids: whether such programs may ask who runs, which they may since Linux 6.10. If not, OPENED says 0.
        """
        code = Assembler()
        code.compute(R6, "=", R1)
        code.load(R2, R6, _OPS_OP, 4)
        if self._way is Way.CALLBACK:
            code.jump_if(R2, "==", _TSTAMP_SENDMSG_CB, "sent")
        code.jump_if(R2, "==", _TCP_CONNECT_CB, "wanted")
        code.jump_if(R2, "==", _ACTIVE_ESTABLISHED_CB, "wanted")
        code.jump_if(R2, "!=", _PASSIVE_ESTABLISHED_CB, "end")  # TCP asks programs many things: not our business
        code.label("wanted")
        code.load(R1, R6, _OPS_SK, 8)
        code.jump_if(R1, "==", 0, "end")  # a request for a connection, not yet a socket
        self._tcp_socket(code, "end")
        code.load(R2, R6, _OPS_OP, 4)
        code.jump_if(R2, "==", _PASSIVE_ESTABLISHED_CB, "passive")

        self._key(code, client=True)
        self._match(code, "end")
        code.load(R2, R6, _OPS_OP, 4)
        code.jump_if(R2, "==", _ACTIVE_ESTABLISHED_CB, "established")
        self._reserve(code, Kind.OPENED, "end")
        self._who(code, R9, TID, known=pids)
        code.store_constant(R9, POSITION, 0, 8)  # whatever bytes_acked says: no connection is made yet
        code.load(R2, R7, self._fields.write_seq, 4)  # the number of the SYN,
        code.compute_constant(R2, "+", 1, bits=32)  # after which the first byte's comes
        code.store(R9, ORIGIN, R2, 4)
        code.store_constant(R9, SIZE, 0, 4)
        self._submit(code)
        code.jump("end")

        code.label("established")  # nothing can be sent before, as the socket isn't writable
        self._watch(code)
        code.jump("end")

        code.label("passive")
        self._key(code, client=False)
        self._own_namespace(code, "end")
        self._match(code, "end", prefix="passive ")
        self._accepted(code)
        if self._way is Way.CALLBACK:
            code.jump("end")
            code.label("sent")
            self._sent(code)

        code.label("end")
        code.compute_constant(R0, "=", 1)
        code.exit()
        return code.assemble()

    def _watch(self, code: Assembler) -> None:
        """Have the socket watched, or say why it isn't.

        One whose cgroup has a limit for TCP's memory is left alone: what is sent through a map is charged twice for a
        moment, so a send as large as the limit would wait forever. A socket's cgroup is settled when it is made.

        By MAP one that blocks is left alone as well. A socket in a map receives through ``tcp_bpf_recvmsg``, which
        waits once: woken without data, by a signal's handler for one, it returns EAGAIN where ``tcp_recvmsg`` would
        wait on. libpq and whoever has an event loop never block in it.
        """
        fields = self._fields
        if self._way is Way.CALLBACK:  # above TCP others send, as Multipath TCP does, and aren't called back for
            code.compute_constant(R8, "=", errno.EOPNOTSUPP)
            code.load(R2, R7, fields.upper_layer, 8)
            code.jump_if(R2, "!=", 0, "unwatched")
        elif not self._blocking:
            code.compute_constant(R8, "=", errno.EWOULDBLOCK)
            self._does_not_block(code, "unwatched")
        if fields.memory_cgroup is not None and fields.tcp_limited is not None:
            code.load(R2, R7, fields.memory_cgroup, 8)
            code.jump_if(R2, "==", 0, "unlimited")
            code.load(R2, R2, fields.tcp_limited, 1)
            code.compute_constant(R8, "=", errno.ENOMEM)
            code.jump_if(R2, "!=", 0, "unwatched")
            code.label("unlimited")
        code.compute(R1, "=", R6)
        code.call(_GET_SOCKET_COOKIE)  # addresses may occur twice, in two network namespaces; this doesn't
        code.store(FRAME, _STACK_COOKIE, R0, 8)
        if self._way is Way.MAP:
            self._put_into_map(code)
        else:
            self._ask_to_be_called(code)
        code.jump_if(R0, "!=", 0, "refused")
        self._reserve(code, Kind.WATCHED, "end")
        code.store_constant(R9, TID, 0, 8)
        self._position(code)
        code.load(R2, FRAME, _STACK_COOKIE, 8)
        code.store(R9, POSITION, R2, 8)
        code.store_constant(R9, SIZE, 0, 4)
        self._submit(code)
        code.jump("end")
        code.label("refused")
        code.compute_constant(R8, "=", 0)
        code.compute(R8, "-", R0)
        code.label("unwatched")
        self._reserve(code, Kind.UNWATCHED, "end")
        code.store_constant(R9, TID, 0, 8)
        self._position(code)
        code.store(R9, SIZE, R8, 4)
        self._submit(code)

    def _put_into_map(self, code: Assembler) -> None:
        """R0 = 0, or why not: E2BIG, the map is full; EBUSY, the socket is in somebody else's with such a program."""
        code.compute(R1, "=", R6)
        code.load_map(R2, self._maps.sockets)
        code.compute(R3, "=", FRAME)
        code.compute_constant(R3, "+", _STACK_COOKIE)
        code.compute_constant(R4, "=", 0)
        code.call(_SOCK_HASH_UPDATE)

    def _ask_to_be_called(self, code: Assembler) -> None:
        """R0 = 0, or why it can't be done. Remembers the socket, R7, and has TCP call back at its sends."""
        code.compute_constant(R0, "=", -errno.ENOMEM)
        self._storage(code, create=True, otherwise="refused")
        code.compute(R8, "=", R0)
        self._compute_position(code)
        code.store(R8, _TOLD, R4, 8)
        for field in (_SENDER, _REACHED, _TICKET):  # a socket may be connected a second time
            code.store_constant(R8, field, 0, 8)
        self._remember_buffer(code)
        code.store_constant(FRAME, _STACK_OPTION, _SK_BPF_CB_TX_TIMESTAMPING, 8)
        code.compute(R1, "=", R6)
        code.compute_constant(R2, "=", _SOL_SOCKET)
        code.compute_constant(R3, "=", _SK_BPF_CB_FLAGS)
        code.compute(R4, "=", FRAME)
        code.compute_constant(R4, "+", _STACK_OPTION)
        code.compute_constant(R5, "=", 4)
        code.call(_SETSOCKOPT)

    def _storage(self, code: Assembler, *, create: bool, otherwise: str) -> None:
        """R0 = the address of what is remembered with the context's socket."""
        code.load(R2, R6, _OPS_SK, 8)
        code.jump_if(R2, "==", 0, otherwise)
        code.load_map(R1, self._maps.sockets)
        code.compute_constant(R3, "=", 0)
        code.compute_constant(R4, "=", int(create))  # BPF_SK_STORAGE_GET_F_CREATE
        code.call(_SK_STORAGE_GET)
        code.jump_if(R0, "==", 0, otherwise)

    def _remember_buffer(self, code: Assembler) -> None:
        """Write down at R8 what the socket's buffer, R7's, is like; R2 and R3 are used."""
        fields = self._fields
        code.load(R2, R7, fields.buffer_limit, 4)
        code.store(R8, _LIMIT, R2, 8)
        code.load(R2, R7, fields.buffered, 4)
        code.store(R8, _QUEUED, R2, 8)
        code.load(R2, R7, fields.write_seq, 4)
        code.load(R3, R7, fields.snd_nxt, 4)
        code.compute(R2, "-", R3, bits=32)
        code.store(R8, _UNSENT, R2, 8)

    def _sent(self, code: Assembler) -> None:
        """Tell what has been sent since this was done last: a send has come to its end, under the socket's lock."""
        fields = self._fields
        code.load(R1, R6, _OPS_SK, 8)
        code.jump_if(R1, "==", 0, "end")
        self._tcp_socket(code, "end")
        self._storage(code, create=False, otherwise="end")
        code.compute(R8, "=", R0)
        self._compute_position(code)
        code.store(FRAME, _STACK_ORIGIN, R2, 8)
        code.load(R3, R8, _TOLD, 8)
        code.jump_if_register(R4, "==", R3, "end")  # those who went on while this one waited have told it all
        code.store(FRAME, _STACK_START, R3, 8)
        code.store(R8, _TOLD, R4, 8)
        code.compute(R4, "-", R3)
        code.store(FRAME, _STACK_SENT, R4, 8)
        code.store_constant(FRAME, _STACK_KIND, Kind.UNCERTAIN, 8)

        code.load(R2, R7, fields.upper_layer, 8)
        code.jump_if(R2, "!=", 0, "doubtful")
        code.load(R2, R7, fields.flags, 8)
        code.jump_if(R2, "&", fields.zero_copy, "doubtful")
        self._memory(code, "doubtful")
        self._room_since(code, "remembered")
        code.load(R4, FRAME, _STACK_SENT, 8)
        code.jump_if_register(R4, "<=", R2, "nobody else")
        code.jump("remembered")
        code.label("nobody else")
        code.store_constant(FRAME, _STACK_KIND, Kind.SENDING, 8)
        code.label("remembered")
        self._remember_buffer(code)
        code.jump("to tell")
        code.label("doubtful")
        code.store_constant(R8, _LIMIT, 0, 8)

        code.label("to tell")
        self._who(code, FRAME, _STACK_WHO)
        self._go_on(code, "to report")
        code.jump("end")
        code.label("to report")
        self._report_sent(code)

    def _report_sent(self, code: Assembler) -> None:
        """Report what has been found out about what has been sent; and how far that goes on, from then on."""
        self._key(code, client=True, prefix="sent ")
        code.store_constant(R8, _SENDER, 0, 8)  # the next one is reported in any case if this report is lost
        self._reserve(code, Kind.SENDING, "end")
        code.load(R2, FRAME, _STACK_KIND, 8)
        code.store(R9, KIND, R2, 4)
        code.load(R3, FRAME, _STACK_WHO, 8)
        code.store(R9, TID, R3, 8)
        code.load(R4, FRAME, _STACK_START, 8)
        code.store(R9, POSITION, R4, 8)
        code.load(R4, FRAME, _STACK_ORIGIN, 8)
        code.store(R9, ORIGIN, R4, 4)
        code.load(R4, FRAME, _STACK_SENT, 8)
        code.store(R9, SIZE, R4, 4)
        code.load(R4, R8, _REACHED, 8)
        code.store(R9, REACHED, R4, 8)
        self._reading(code)
        code.load(R2, FRAME, _STACK_KIND, 8)
        code.jump_if(R2, "!=", Kind.SENDING, "reported")
        code.jump_if(R3, "==", 0, "reported")  # the reader leaves it out, too
        code.store(R8, _SENDER, R3, 8)
        code.load(R4, R8, _TOLD, 8)
        code.store(R8, _REACHED, R4, 8)
        self._take_ticket(code)
        code.store(R9, TICKET, R5, 4)
        code.label("reported")
        self._submit(code)

        # Whoever finds in the word how far this one goes has to find the report of it as well.
        code.load(R2, R8, _SENDER, 8)
        code.jump_if(R2, "==", 0, "end")
        code.load(R5, R8, _TICKET, 8)
        code.jump_if(R5, "==", 0, "end")
        self._word(code)
        self._write_word(code, "end")

    def _go_on(self, code: Assembler, otherwise: str) -> None:
        """Write down how far the last one has come who was reported, if it is that one again, and nothing else is new.

        New is also that something lay unread when this was sent: whoever reads the stream is told of each such send.
        """
        fields = self._fields
        code.load(R2, FRAME, _STACK_KIND, 8)
        code.jump_if(R2, "!=", Kind.SENDING, otherwise)
        code.load(R2, FRAME, _STACK_WHO, 8)
        code.jump_if(R2, "==", 0, otherwise)
        code.load(R3, R8, _SENDER, 8)
        code.jump_if_register(R2, "!=", R3, otherwise)
        code.load(R2, R7, fields.copied_seq, 4)
        code.load(R3, R7, fields.rcv_nxt, 4)
        code.jump_if_register(R2, "!=", R3, otherwise)
        code.load(R5, R8, _TICKET, 8)
        code.jump_if(R5, "==", 0, otherwise)
        self._own_word(code, otherwise)
        self._write_word(code, otherwise)
        code.store(R8, _REACHED, R2, 8)

    def _word(self, code: Assembler) -> None:
        """R1 = the address of the word for the ticket R5, R4 = what makes it this connection's; R2 is used."""
        code.load_map_value(R1, self._words)
        code.compute(R2, "=", R5)
        code.compute_constant(R2, "&", TICKETS - 1)
        code.compute_constant(R2, "<<", 3)
        code.compute(R1, "+", R2)
        code.compute(R4, "=", R5)
        code.compute_constant(R4, ">>", TICKET_SHIFT)

    def _own_word(self, code: Assembler, otherwise: str) -> None:
        """As :meth:`_word`; go on if no other connection has been given that word since. R2 and R3 are used."""
        self._word(code)
        code.load(R3, R1, 0, 8)
        code.compute_constant(R3, ">>", WORD_SHIFT)
        code.jump_if_register(R3, "!=", R4, otherwise)

    def _write_word(self, code: Assembler, otherwise: str) -> None:
        """Say in the word of :meth:`_word` how far has been told; it is in R2 then, and R3 and R4 are used."""
        code.load(R2, R8, _TOLD, 8)
        code.compute(R3, "=", R2)
        code.compute_constant(R3, ">>", WORD_SHIFT)
        code.jump_if(R3, "!=", 0, otherwise)
        code.compute_constant(R4, "<<", WORD_SHIFT)
        code.compute(R4, "+", R2)
        code.store(R1, 0, R4, 8)

    def _take_ticket(self, code: Assembler) -> None:
        """R5 = the connection's ticket, another one if it has none or its word is another's; R1 to R4 are used."""
        code.load(R5, R8, _TICKET, 8)
        code.jump_if(R5, "==", 0, "without ticket")
        self._own_word(code, "without ticket")
        code.jump("with ticket")
        code.label("without ticket")
        code.load_map_value(R1, self._words)
        code.compute_constant(R1, "+", 8 * TICKETS)
        code.compute_constant(R5, "=", 1)
        code.fetch_and_add(R1, 0, R5)
        code.compute_constant(R5, "+", 1)
        code.compute_constant(R5, "&", (1 << _TICKET_BITS) - 1)
        code.store(R8, _TICKET, R5, 8)
        code.label("with ticket")

    def _room_since(self, code: Assembler, otherwise: str) -> None:
        """R2 = how many bytes could be sent since the last call without filling the buffer, whoever sent them.

        As in :meth:`_room`; and what was queued then may have been cut into as many segments as it fits into.
        """
        fields = self._fields
        code.load(R2, R8, _LIMIT, 8)
        code.load(R3, R7, fields.buffer_limit, 4)
        code.jump_if_register(R2, "<=", R3, "least limit")
        code.compute(R2, "=", R3)
        code.label("least limit")
        code.load(R3, R8, _QUEUED, 8)
        code.compute(R2, "-", R3)
        code.compute_constant(R2, "-", _OVERHEAD)
        code.load(R5, R7, fields.segment_size, 4)
        code.jump_if(R5, "<", _SMALL_SEGMENT, otherwise)
        code.jump_if(R5, "<", _PAGE, "small segments")
        code.jump_if(R5, "<", _LARGE_SEGMENT, "segments")
        code.compute_constant(R3, ">>", 3)
        code.label("segments")
        code.compute_constant(R3, ">>", 1)
        code.compute(R2, "-", R3)
        code.jump_if(R2, "signed <", 0, otherwise)
        code.compute_constant(R2, ">>", 1)
        code.jump("unsent since")
        code.label("small segments")
        code.compute(R3, "+", R3)
        code.compute(R2, "-", R3)
        code.jump_if(R2, "signed <", 0, otherwise)
        code.compute_constant(R2, ">>", 2)
        code.label("unsent since")
        self._unsent_limit(code)
        code.load(R4, R8, _UNSENT, 8)
        self._least(code, otherwise)

    def _does_not_block(self, code: Assembler, otherwise: str) -> None:
        """Go on if the socket's file has O_NONBLOCK; one without a file has been closed, or is the kernel's own."""
        fields = self._fields
        code.load(R2, R7, fields.socket, 8)
        code.jump_if(R2, "==", 0, otherwise)
        code.load(R2, R2, fields.file, 8)
        code.jump_if(R2, "==", 0, otherwise)
        code.load(R2, R2, fields.file_flags, 4)
        code.jump_if(R2, "&", os.O_NONBLOCK, "does not block")
        code.jump(otherwise)
        code.label("does not block")

    def _accepted(self, code: Assembler) -> None:
        """Report the guard's own end, R7."""
        self._reserve(code, Kind.ACCEPTED, "end")
        code.store_constant(R9, TID, 0, 8)
        code.store_constant(R9, POSITION, 0, 8)
        code.load(R2, R7, self._fields.rcv_nxt, 4)  # the client's first byte, seen from here
        code.store(R9, ORIGIN, R2, 4)
        code.store_constant(R9, SIZE, 0, 4)
        code.load(R2, R7, self._fields.write_seq, 4)  # the guard's first byte
        code.store(R9, READ, R2, 4)
        self._submit(code)

    def sk_msg(self) -> bytes:
        """Assemble the program that runs at every send on a socket in the map; it lets everything pass."""
        fields = self._fields
        code = Assembler()
        code.compute(R6, "=", R1)
        code.load(R8, R6, _MSG_SIZE, 4)
        code.load(R1, R6, _MSG_SK, 8)
        self._tcp_socket(code, "end")
        self._key(code, client=True)
        if not self._blocking:
            self._does_not_block(code, "blocking")
        code.load(R2, R7, fields.upper_layer, 8)
        code.jump_if(R2, "!=", 0, "uncertain")
        code.load(R2, R7, fields.flags, 8)
        code.jump_if(R2, "&", fields.zero_copy, "uncertain")
        self._memory(code, "uncertain")

        self._room(code, "full")
        code.jump_if_register(R8, "<=", R2, "all certain")  # as nearly always
        code.jump_if(R2, "<", _MORSEL, "full")
        code.compute(R8, "=", R2)
        self._run_again(code)
        code.jump("certain")
        code.label("all certain")
        self._run_for_the_next(code)
        code.label("certain")
        self._report(code, Kind.SENDING)
        code.jump("end")

        code.label("full")
        code.jump_if(R8, "<=", _MORSEL, "uncertain")
        code.compute_constant(R8, "=", _MORSEL)
        self._run_again(code)
        code.jump("not certain")
        code.label("uncertain")
        self._run_for_the_next(code)
        code.label("not certain")
        self._report(code, Kind.UNCERTAIN)
        code.jump("end")

        if not self._blocking:
            code.label("blocking")
            self._run_for_the_next(code)
            self._report(code, Kind.BLOCKING)

        code.label("end")
        code.compute_constant(R0, "=", _SK_PASS)
        code.exit()
        return code.assemble()

    def _report(self, code: Assembler, kind: Kind) -> None:
        """Report who sends, from where on in the stream, and how much, which is R8."""
        self._reserve(code, kind, "end")
        self._who(code, R9, TID)
        self._position(code)
        code.store(R9, SIZE, R8, 4)
        self._reading(code)
        self._submit(code)

    def _reading(self, code: Assembler) -> None:
        """Store how far the socket, R7, has read, and how far it has received, in the other direction's numbers.

        Neither changes while the lock is held: nobody reads meanwhile, and what arrives has to wait.
        """
        code.load(R2, R7, self._fields.copied_seq, 4)
        code.store(R9, READ, R2, 4)
        code.load(R2, R7, self._fields.rcv_nxt, 4)
        code.store(R9, RECEIVED, R2, 4)

    def _memory(self, code: Assembler, otherwise: str) -> None:
        """Go on if TCP is going to get memory. What is neither the socket's nor constant can't be followed by type."""
        fields = self._fields
        code.store_constant(FRAME, _STACK_PRESSURE, 1, 8)
        code.compute(R1, "=", FRAME)
        code.compute_constant(R1, "+", _STACK_PRESSURE)
        code.compute_constant(R2, "=", 8)
        code.load(R3, R7, fields.protocol, 8)
        code.load(R3, R3, fields.memory_pressure, 8)  # the address of an unsigned long: since when, in jiffies
        code.call(_PROBE_READ_KERNEL)
        code.load(R2, FRAME, _STACK_PRESSURE, 8)
        code.jump_if(R2, "!=", 0, otherwise)

    def _room(self, code: Assembler, otherwise: str) -> None:
        """R2 = how many bytes TCP takes for certain without waiting; R3 to R5 are used."""
        fields = self._fields
        code.load(R2, R7, fields.buffer_limit, 4)
        code.load(R3, R7, fields.buffered, 4)
        code.compute(R2, "-", R3)
        code.compute_constant(R2, "-", _OVERHEAD)
        code.jump_if(R2, "signed <", 0, otherwise)
        code.compute_constant(R2, ">>", 1)
        code.load(R3, R7, fields.segment_size, 4)
        code.jump_if(R3, "<", _SMALL_SEGMENT, otherwise)
        code.jump_if(R3, "<", _PAGE, "quarter")
        code.jump("unsent")
        code.label("quarter")
        code.compute_constant(R2, ">>", 1)

        code.label("unsent")
        self._unsent_limit(code)
        code.load(R4, R7, fields.write_seq, 4)
        code.load(R5, R7, fields.snd_nxt, 4)
        code.compute(R4, "-", R5, bits=32)
        self._least(code, otherwise)

    def _unsent_limit(self, code: Assembler) -> None:
        """R3 = TCP_NOTSENT_LOWAT: the socket's, or else its network namespace's."""
        fields = self._fields
        code.load(R3, R7, fields.unsent_limit, 4)
        code.jump_if(R3, "!=", 0, "own limit")
        code.load(R3, R7, fields.namespace, 8)
        code.load(R3, R3, fields.namespace_unsent_limit, 4)
        code.label("own limit")

    @staticmethod
    def _least(code: Assembler, otherwise: str) -> None:
        """Bring R2 down to how many bytes there may be until R3 are unsent, if R4 are."""
        code.compute(R3, "-", R4)
        code.compute_constant(R3, "-", 1)
        code.jump_if(R3, "signed <", 0, otherwise)
        code.jump_if_register(R2, "<=", R3, "fits")
        code.compute(R2, "=", R3)
        code.label("fits")

    @staticmethod
    def _run_again(code: Assembler) -> None:
        """Have TCP take only the first R8 bytes of what is to be sent, and the program run again then."""
        code.compute(R1, "=", R6)
        code.compute(R2, "=", R8)
        code.call(_MSG_APPLY_BYTES)

    @staticmethod
    def _run_for_the_next(code: Assembler) -> None:
        """Take back what an earlier run for the same message has asked for, which is remembered in the message.

        Otherwise the verdict would be kept for as many bytes again, of other messages too, and those go unreported.
        """
        code.compute(R1, "=", R6)
        code.compute_constant(R2, "=", 0)
        code.call(_MSG_APPLY_BYTES)

    @staticmethod
    def _tcp_socket(code: Assembler, otherwise: str) -> None:
        """R7 = the socket in R1 as TCP's, if it is that."""
        code.call(_SKC_TO_TCP_SOCK)
        code.jump_if(R0, "==", 0, otherwise)
        code.compute(R7, "=", R0)

    def _key(self, code: Assembler, *, client: bool, prefix: str | None = None) -> None:
        """Put the connection's key on the stack, R7 being its client's end, or the guard's."""
        fields = self._fields
        local, remote = (_CLIENT_ADDRESS, _GUARD_ADDRESS) if client else (_GUARD_ADDRESS, _CLIENT_ADDRESS)
        local_port, remote_port = (_CLIENT_PORT, _GUARD_PORT) if client else (_GUARD_PORT, _CLIENT_PORT)
        prefix = prefix or ("client " if client else "guard ")
        code.load(R2, R7, fields.family, 2)
        code.jump_if(R2, "==", _AF_INET6, f"{prefix}ipv6")
        for offset, where in ((fields.local_address, local), (fields.remote_address, remote)):
            code.store_constant(FRAME, _STACK_KEY + where, 0, 8)
            code.store_constant(FRAME, _STACK_KEY + where + 8, _IPV4_MAPPED, 4)
            code.load(R2, R7, offset, 4)
            code.store(FRAME, _STACK_KEY + where + 12, R2, 4)
        code.jump(f"{prefix}ports")
        code.label(f"{prefix}ipv6")
        for offset, where in ((fields.local_address6, local), (fields.remote_address6, remote)):
            for part in range(0, 16, 4):  # the members of struct in6_addr are words; the verifier takes no larger loads
                code.load(R2, R7, offset + part, 4)
                code.store(FRAME, _STACK_KEY + where + part, R2, 4)
        code.label(f"{prefix}ports")
        code.load(R2, R7, fields.local_port, 2)
        code.to_big_endian(R2, 16)
        code.store(FRAME, _STACK_KEY + local_port, R2, 2)
        code.load(R2, R7, fields.remote_port, 2)
        code.store(FRAME, _STACK_KEY + remote_port, R2, 2)

    def _match(self, code: Assembler, otherwise: str, prefix: str = "") -> None:
        """Go on if the key on the stack is of a connection to one of the guard's listeners."""
        for part in range(0, 16, 4):
            code.load(R2, FRAME, _STACK_KEY + _GUARD_ADDRESS + part, 4)
            code.store(FRAME, _STACK_LISTENER + part, R2, 4)
        code.load(R2, FRAME, _STACK_KEY + _GUARD_PORT, 2)
        code.store_constant(FRAME, _STACK_LISTENER + 16, 0, 4)
        code.store(FRAME, _STACK_LISTENER + 16, R2, 2)
        self._look_up(code)
        code.jump_if(R0, "!=", 0, f"{prefix}found")
        # Not an address that the guard knows: one in 127.0.0.0/8 perhaps, all of which are local?
        code.load(R2, FRAME, _STACK_LISTENER + 8, 4)
        code.compute_constant(R3, "=", _IPV4_MAPPED, bits=32)
        code.compute(R2, "-", R3)
        code.jump_if(R2, "!=", 0, otherwise)
        code.load(R2, FRAME, _STACK_LISTENER + 12, 1)
        code.jump_if(R2, "!=", _LOOPBACK_OCTET, otherwise)
        code.store_constant(FRAME, _STACK_LISTENER + 13, 0, 1)
        code.store_constant(FRAME, _STACK_LISTENER + 14, 0, 1)
        code.store_constant(FRAME, _STACK_LISTENER + 15, 0, 1)
        self._look_up(code)
        code.jump_if(R0, "==", 0, otherwise)
        code.label(f"{prefix}found")
        code.load(R2, R0, 0, 4)
        code.jump_if(R2, "==", 0, f"{prefix}matched")
        self._own_namespace(code, otherwise)  # a container has a loopback interface of its own
        code.label(f"{prefix}matched")

    def _look_up(self, code: Assembler) -> None:
        code.load_map(R1, self._maps.listeners)
        code.compute(R2, "=", FRAME)
        code.compute_constant(R2, "+", _STACK_LISTENER)
        code.call(_MAP_LOOKUP_ELEM)

    def _own_namespace(self, code: Assembler, otherwise: str) -> None:
        """Go on if the socket is in the guard's network namespace."""
        code.load(R2, R7, self._fields.namespace, 8)
        code.load(R2, R2, self._fields.namespace_inode, 4)
        code.load_constant(R3, self._namespaces.net)  # larger than the signed constants that comparisons take
        code.compute(R2, "-", R3)
        code.jump_if(R2, "!=", 0, otherwise)

    def _reserve(self, code: Assembler, kind: Kind, otherwise: str) -> None:
        """R9 = an event with kind and key, and the rest for the caller to fill in. If there is no room, count that."""
        code.load_map(R1, self._maps.ring)
        code.compute_constant(R2, "=", EVENT_SIZE)
        code.compute_constant(R3, "=", 0)
        code.call(_RINGBUF_RESERVE)
        code.jump_if(R0, "!=", 0, f"room for {kind.name}")
        code.load_map_value(R1, self._maps.lost)
        code.compute_constant(R2, "=", 1)
        code.add_atomically(R1, 0, R2)
        code.jump(otherwise)
        code.label(f"room for {kind.name}")
        code.compute(R9, "=", R0)
        code.store_constant(R9, KIND, kind, 4)
        code.store_constant(R9, TICKET, 0, 4)
        for part in range(0, 32, 8):
            code.load(R2, FRAME, _STACK_KEY + part, 8)
            code.store(R9, KEY + part, R2, 8)
        code.load(R2, FRAME, _STACK_KEY + 32, 4)
        code.store(R9, KEY + 32, R2, 4)
        code.store_constant(R9, READ, 0, 4)
        code.store_constant(R9, RECEIVED, 0, 8)
        code.store_constant(R9, REACHED, 0, 8)

    def _who(self, code: Assembler, base: int, offset: int, *, known: bool = True) -> None:
        """Store thread and process: tid, then pid, both 0 for who has none in the guard's namespace."""
        if not known:
            code.store_constant(base, offset, 0, 8)
        elif self._namespaces.pid is None:
            code.call(_GET_CURRENT_PID_TGID)  # the process in the upper half, the thread in the lower
            code.store(base, offset, R0, 8)
        else:
            device, inode = self._namespaces.pid
            code.store_constant(FRAME, _STACK_PIDS, 0, 8)
            code.load_constant(R1, device)
            code.load_constant(R2, inode)
            code.compute(R3, "=", FRAME)
            code.compute_constant(R3, "+", _STACK_PIDS)
            code.compute_constant(R4, "=", 8)
            code.call(_GET_NS_CURRENT_PID_TGID)  # struct bpf_pidns_info: the thread, the process; zeroed if it fails
            code.load(R2, FRAME, _STACK_PIDS, 8)
            code.store(base, offset, R2, 8)

    def _position(self, code: Assembler) -> None:
        """Store the position in the stream of the byte to be written next, and the sequence number of the first."""
        self._compute_position(code)
        code.store(R9, POSITION, R4, 8)
        code.store(R9, ORIGIN, R2, 4)

    def _compute_position(self, code: Assembler) -> None:
        """R4 = the position in the stream of the byte to be written next; R2 = the sequence number of the first.

        ``bytes_acked`` counts everything acknowledged, the SYN too; it and ``snd_una``, up to where that is, change
        together, so ``bytes_acked - 1`` is the position of ``snd_una``, in 64 bits that don't wrap around.
        """
        code.load(R2, R7, self._fields.snd_una, 4)
        code.load(R3, R7, self._fields.bytes_acked, 8)
        code.load(R4, R7, self._fields.write_seq, 4)
        code.compute(R4, "-", R2, bits=32)  # what is written and not acknowledged, modulo 2**32
        code.compute_constant(R3, "+", -1)
        code.compute(R4, "+", R3)
        code.compute(R2, "-", R3, bits=32)

    @staticmethod
    def _submit(code: Assembler) -> None:
        code.compute(R1, "=", R9)
        code.compute_constant(R2, "=", _NO_WAKEUP)
        code.call(_RINGBUF_SUBMIT)
