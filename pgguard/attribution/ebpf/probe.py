# SPDX-License-Identifier: Apache-2.0
"""The kernel says which thread sends: loads the programs, attaches them, and reads what they report.

**Why assembled in Python.** The programs are some six hundred instructions that consist of loads, stores and calls,
written down in :mod:`programs` with their reasons; what is there is what runs. A compiled object would have to be
rebuilt to be trusted, by someone who has clang; a library (bcc, libbpf) is a compiler, or a shared object that must be
where the guard runs. The price is an assembler of a hundred lines, and bpf(2) through ctypes.

**What it takes**: Linux 5.10 (``bpf_skc_to_tcp_sock`` for these programs) on x86-64 or arm64, built with
CONFIG_DEBUG_INFO_BTF; CAP_BPF, CAP_NET_ADMIN (programs about networking) and CAP_PERFMON (the kernel's structures) in
the initial user namespace, and no lockdown for confidentiality; a cgroup v2 hierarchy, mounted anywhere, used or not.
Before Linux 6.10 sock_ops programs may not ask who runs, so that openers are unknown, and the guard must be in the
initial pid namespace. (Versions are from the kernel's history; tried on 6.18, x86-64.)

**What it changes**: where TCP can call back at sends (:attr:`Way.CALLBACK`, Linux 6.15), nothing: the socket has one
bit more set, and a few bytes of ours. On older kernels (:attr:`Way.MAP`) the client's socket is put into a map, and
then sends and receives through other functions of the kernel's, which answer differently in ways that depend on the
kernel: :mod:`pgguard.attribution.transparency` compares them at each start, and where a program can tell, nobody is
watched, unless it is insisted on. Of all such kernels ``tcp_bpf_sendmsg`` copies what would have been sent without
copying (sendfile, splice, MSG_ZEROCOPY); and a client that asks for MSG_ZEROCOPY, as no PostgreSQL client does, gets a
notification for each of the pieces that a send was cut into, rather than one for it all.

**What it leaves**: nothing. The program for connections is attached through a link that is a file descriptor, the one
for a map of sockets to that map, which it holds; all goes when the process does. The sockets in the map are ordinary
ones again, and have what lies unread in them (what is received stays in the socket's own queue all the time). The bit
in the socket stays set, for no program to be called.

**What it doesn't see**: connections that existed before; clients on other hosts; processes outside of the cgroup that
is mounted, if that isn't the whole tree (:attr:`SenderProbe.scope`); sockets that another program has put into a map
with an sk_msg program of its own, as Cilium's socket acceleration does, those of Multipath TCP, those of cgroups with a
limit for TCP's memory; in a map also those beyond ``max_connections``, and, unless it is told to, those that block (all
``UNWATCHED``). Their bytes have no sender, never a wrong one.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import mmap
import os
import re
import resource
import socket
import struct
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pgguard.attribution.ebpf import bpf
from pgguard.attribution.ebpf.bpf import AttachType, BpfError, MapType, ProgramType
from pgguard.attribution.ebpf.btf import Btf
from pgguard.attribution.ebpf.programs import (
    LISTENER_KEY_SIZE,
    LOOPBACK_NETWORK,
    SAME_NAMESPACE,
    STORAGE_SIZE,
    WORDS_SIZE,
    Maps,
    Namespaces,
    Programs,
    Way,
)
from pgguard.attribution.ebpf.ring import Ring
from pgguard.attribution.privileges import LOADING, Right, rights

if TYPE_CHECKING:
    from pgguard.attribution.sockets import Connected

_RING_SIZE = 1 << 20
"""Bytes: 10,900 events, what two busy senders make in some 20 ms that send by turns. Larger than any L2 cache has no
use."""
_MAX_CONNECTIONS = 65_536
"""More than a PostgreSQL server takes. An entry's memory is taken when it is used; 1 MiB is for the map itself."""
_MAX_LISTENERS = 4096
"""Addresses times ports."""

_INITIAL_USER_NAMESPACE = 0xEFFFFFFD
_INITIAL_PID_NAMESPACE = 0xEFFFFFFC
"""``linux/proc_ns.h``."""

_CAP_ADD = "cap_add: [BPF, PERFMON, NET_ADMIN] in compose, --cap-add with docker"
_RELEASE = "run the guard on Linux 5.10 or later"

# linux/rtnetlink.h, linux/if_addr.h
_RTM_NEWADDR, _RTM_GETADDR = 20, 22
_NLM_F_REQUEST_DUMP = 0x301
_NLMSG_DONE = 3
_NETLINK_HEADER = struct.Struct("=IHHII")
_ADDRESS_HEADER = struct.Struct("=BBBBI")
_ATTRIBUTE_HEADER = struct.Struct("=HH")
_IFA_ADDRESS, _IFA_LOCAL = 1, 2

_PORTS = struct.Struct("!HH")


class ProbeUnavailable(Exception):
    """The kernel can't be asked who sends on TCP."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}; {remedy}")
        self.problem = problem
        """What is wrong, a clause."""
        self.remedy = remedy
        """The one thing to do about it, an imperative."""


def connection_key(accepted: Connected) -> bytes:
    """Return the key, in events, of a connection that the guard has accepted. Raises OSError: it is gone (ENOTCONN)."""
    return key_between(accepted.getpeername(), accepted.getsockname())


def key_between(client: tuple[Any, ...], guard: tuple[Any, ...]) -> bytes:
    """Return the same of the connection between two addresses, as accept(2) and getsockname(2) tell them."""
    return _packed(client[0]) + _packed(guard[0]) + _PORTS.pack(client[1], guard[1])


@lru_cache(maxsize=256)  # many connections are from, and to, the same
def _packed(host: str) -> bytes:
    """Return an address as 16 bytes, as IPv6 has it. Raises ValueError."""
    try:
        if ":" in host:
            return socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
        return LOOPBACK_NETWORK[:12] + socket.inet_pton(socket.AF_INET, host)
    except OSError as error:
        raise ValueError(f"{host!r} is no IP address") from error


class SenderProbe:
    """Watches the connections of this host's processes to some TCP addresses, from when it is made until it is closed.

    A context manager; for one thread. It takes a fifth of a second to make, most of it for reading the kernel's types.
    There is nothing to wait on: who has read bytes asks, and what is said of them is there. A process that is
    forked and doesn't execute another program keeps the probe alive for as long as it lives.

    Attributes:
        way: how the kernel is asked.

    Args:
        addresses: of the guard's listeners, IP address and port. ``0.0.0.0`` stands for all of this host's IPv4
            addresses, ``::`` for those of both families.
        max_connections: how many connections a map has room for; clients beyond that are not kept from connecting, nor
            from sending, but unknown.
        blocking: whether to put sockets that block into a map too. A recv(2) in which one waits can then fail with
            EAGAIN when a signal arrives: see :meth:`Programs._watch`.
        way: how to ask the kernel; ``None`` for the best that it offers.

    Raises:
        ProbeUnavailable: what is missing, and the one thing to do about it.
        ValueError: something isn't an IP address.
    """

    def __init__(
        self,
        addresses: Iterable[tuple[str, int]],
        *,
        max_connections: int = _MAX_CONNECTIONS,
        blocking: bool = False,
        way: Way | None = None,
    ) -> None:
        self._stack = contextlib.ExitStack()
        self._wanted = way
        self._blocking = blocking
        with contextlib.ExitStack() as stack:
            self.openers = True
            """Who calls connect(2) is reported."""
            try:
                _check_privileges()
                cgroup = _find_cgroup()
            except OSError as error:
                problem = f"{error.filename}: {error.strerror}"
                raise ProbeUnavailable(problem, "run the guard on Linux, with /proc mounted") from error
            self.scope = None if _is_whole_tree(cgroup) else str(cgroup)
            """``None`` if all of this host's processes are seen; else the cgroup whose sockets are, as it is mounted
            here. In a container that usually is the container itself: see :func:`scope_remedy`."""
            self._listeners = self._sockets = -1
            self._ring = self._load(stack, cgroup, max_connections)
            self.read = self._ring.read
            """Takes the events that there are: :meth:`Ring.read` itself, as what comes from it is called often."""
            self.reached = self._ring.reached
            self.glance = self._ring.glance
            """:meth:`Ring.reached` and :meth:`Ring.glance`, likewise."""
            self._known: set[bytes] = set()
            try:
                for host, port in addresses:
                    self.add(host, port)
            except BpfError as error:
                raise ProbeUnavailable(str(error.strerror), "listen on fewer addresses") from error
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Detach and free everything: senders notice nothing, and go on unobserved. Can be called again."""
        self._stack.close()

    def add(self, host: str, port: int) -> None:
        """Watch connections to another address of the guard's that are made from now on.

        A wildcard stands for the addresses that this host has now. So this is also for what a connection was accepted
        on, to know of addresses that the host has got since; that costs a microsecond if it is known.

        Raises:
            BpfError: there are too many (E2BIG).
            ValueError: it isn't an IP address.
        """
        if _packed(host) + struct.pack("!Hxx", port) in self._known:
            return
        for address in _expand(host):
            entry = address + struct.pack("!Hxx", port)
            if entry not in self._known:
                bpf.put(self._listeners, entry, struct.pack("=I", SAME_NAMESPACE if _is_loopback(address) else 0))
                self._known.add(entry)

    def remove(self, host: str, port: int) -> None:
        """Take back what :meth:`add` has said of an address that is no wildcard. Raises BpfError: it was never said."""
        entry = _packed(host) + struct.pack("!Hxx", port)
        bpf.remove(self._listeners, entry)
        self._known.discard(entry)

    @property
    def takes_rights(self) -> bool:
        """Whether it takes CAP_BPF to change what is watched, which the calling thread has not: before Linux 5.19."""
        try:
            bpf.remove(self._listeners, bytes(LISTENER_KEY_SIZE))
        except BpfError as error:
            return error.errno == errno.EPERM
        return False

    @property
    def watches_blocking(self) -> bool:
        """Clients whose sockets block are watched as well."""
        return self._blocking or self.way is Way.CALLBACK

    def release(self, cookie: int) -> None:
        """Watch a connection no more; nothing happens if it isn't any more.

        Args:
            cookie: what :attr:`Account.cookie` says.
        """
        if self.way is Way.CALLBACK:
            return
        with contextlib.suppress(BpfError):
            bpf.remove(self._sockets, struct.pack("=Q", cookie))

    @property
    def limits(self) -> tuple[str, ...]:
        """What it can't do here, and what would help: clauses, to be said where it is put to use."""
        limits = []
        if self.scope is not None:
            limits.append(f"on TCP only senders in the cgroup {self.scope} are seen: {scope_remedy()}")
        if not self.openers:
            limits.append("the kernel doesn't say who opens a TCP connection: Linux 6.10 and later do")
        if not self.watches_blocking:
            limits.append(
                "TCP senders whose sockets block (pg8000, PHP's streams; not libpq or asyncio) are not seen, because "
                "watching them would let a signal interrupt their reads: --attribution ebpf watches them anyway"
            )
        return tuple(limits)

    @property
    def lost(self) -> int:
        """How many events found no room in the ring buffer: see :attr:`Ring.lost`, which this is."""
        return self._ring.lost

    def _load(self, stack: contextlib.ExitStack, cgroup: Path, max_connections: int) -> Ring:
        """Create and attach everything, the program that sees connections last. Raises ProbeUnavailable."""
        try:
            btf = Btf()
        except (OSError, ValueError) as error:
            problem = f"this kernel has no usable BTF type information ({error})"
            raise ProbeUnavailable(
                problem, "run a kernel built with CONFIG_DEBUG_INFO_BTF, as those of distributions are"
            ) from error
        try:
            return self._attach(stack, btf, cgroup, max_connections)
        except KeyError as error:
            raise ProbeUnavailable(f"this kernel's structures are different: {error.args[0]}", _RELEASE) from error
        except BpfError as error:
            raise _explained(error) from error
        except OSError as error:
            raise ProbeUnavailable(f"{error.filename or 'mapping memory'}: {error.strerror}", _CAP_ADD) from error

    def _attach(self, stack: contextlib.ExitStack, btf: Btf, cgroup: Path, max_connections: int) -> Ring:
        def held(descriptor: int) -> int:
            stack.callback(os.close, descriptor)
            return descriptor

        def create(kind: MapType, key: int, value: int, entries: int, name: str, flags: int = 0) -> int:
            return held(bpf.create_map(kind, key, value, entries, name, flags))

        self.way = self._wanted or (Way.CALLBACK if _calls_back(btf) else Way.MAP)
        sockets = (
            held(bpf.create_socket_storage(STORAGE_SIZE, "pgguard_sockets"))
            if self.way is Way.CALLBACK
            else create(MapType.SOCKHASH, 8, 4, max_connections, "pgguard_sockets")
        )
        words: int | None = None
        if self.way is Way.CALLBACK:
            words = create(MapType.ARRAY, 4, WORDS_SIZE, 1, "pgguard_words", bpf.MMAPABLE)
        maps = Maps(
            ring=create(MapType.RINGBUF, 0, 0, _RING_SIZE, "pgguard_events"),
            lost=create(MapType.ARRAY, 4, 8, 1, "pgguard_lost", bpf.MMAPABLE),
            listeners=create(MapType.HASH, LISTENER_KEY_SIZE, 4, _MAX_LISTENERS, "pgguard_listen"),
            sockets=sockets,
            words=words,
        )
        self._listeners, self._sockets = maps.listeners, maps.sockets
        ring = Ring(maps.ring, _RING_SIZE, maps.lost, words)
        stack.callback(ring.close)
        programs = Programs(btf, maps, _namespaces(), way=self.way, blocking=self._blocking)
        if self.way is Way.MAP:
            code = programs.sk_msg()
            sends = bpf.load_program(ProgramType.SK_MSG, code, AttachType.SK_MSG_VERDICT, "pgguard_sending")
            bpf.attach_to_map(held(sends), maps.sockets)
        connections = held(self._load_sock_ops(programs))
        directory = held(os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        held(bpf.attach_to_cgroup(connections, directory))
        return ring

    def _load_sock_ops(self, programs: Programs) -> int:
        def load(*, pids: bool) -> int:
            code = programs.sock_ops(pids=pids)
            return bpf.load_program(ProgramType.SOCK_OPS, code, AttachType.CGROUP_SOCK_OPS, "pgguard_connect")

        try:
            return load(pids=True)
        except BpfError:
            descriptor = load(pids=False)
            self.openers = False
            return descriptor


def _calls_back(btf: Btf) -> bool:
    """Whether this kernel's TCP can call programs at sends: Linux 6.15, "bpf: Add BPF_SOCK_OPS_TSTAMP_SENDMSG_CB"."""
    try:
        btf.offset("sock", "sk_bpf_cb_flags")
    except KeyError:
        return False
    return True


def scope_remedy() -> str:
    """Say how the guard gets to see all of the host's processes, where :attr:`SenderProbe.scope` says it doesn't."""
    return (
        "give the container the host's cgroup tree: cgroup: host in compose, --cgroupns host with docker, "
        "and /sys/fs/cgroup:/sys/fs/cgroup:ro as a volume"
    )


def _namespaces() -> Namespaces:
    own = Path("/proc/self/ns")
    pid = (own / "pid").stat()
    # Where the guard is in the initial one it sees those in all others. Elsewhere the kernel translates only pids of
    # processes in the very same one.
    return Namespaces(
        net=(own / "net").stat().st_ino,
        pid=None if pid.st_ino == _INITIAL_PID_NAMESPACE else (pid.st_dev, pid.st_ino),
    )


def _find_cgroup() -> Path:
    """Find where cgroup v2 is mounted, beside version 1 perhaps: proc_pid_mountinfo(5). Raises ProbeUnavailable."""
    found: list[tuple[str, str]] = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, filesystem = line.partition(" - ")
        if filesystem.startswith("cgroup2 "):
            fields = mount.split(" ")
            found.append((_unescaped(fields[3]), _unescaped(fields[4])))
    if not found:
        raise ProbeUnavailable(
            "no cgroup v2 hierarchy is mounted",
            "mount one: mkdir /run/pgguard-cgroup && mount -t cgroup2 none /run/pgguard-cgroup",
        )
    # Of several, the one whose root is least deep in the tree: "/" is all of it, or all of this cgroup namespace.
    return Path(min(found, key=lambda mounted: len(mounted[0]))[1])


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _is_whole_tree(cgroup: Path) -> bool:
    """Tell the root from other cgroups, all of which have a type: ``Documentation/admin-guide/cgroup-v2.rst``."""
    return not (cgroup / "cgroup.type").exists()


def _check_privileges() -> None:
    """Say which capability is missing. Raises ProbeUnavailable."""
    own = rights()
    admin = Right.CAP_SYS_ADMIN in own
    # CAP_SYS_ADMIN stands for the two others as well: capabilities(7).
    missing = [right.name for right in sorted(LOADING - own) if not (admin and right is not Right.CAP_NET_ADMIN)]
    if missing:
        remedy = f"run the guard as root, or give it all of CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN ({_CAP_ADD})"
        raise ProbeUnavailable(f"the guard lacks {', '.join(missing)}", remedy)
    if Path("/proc/self/ns/user").stat().st_ino != _INITIAL_USER_NAMESPACE:
        raise ProbeUnavailable(
            "the guard is in a user namespace, where its capabilities don't allow loading BPF programs",
            "run it outside: as root of the host, or in a container that is not rootless",
        )


def _explained(error: BpfError) -> ProbeUnavailable:
    text = str(error.strerror)
    if error.errno == errno.ENOSYS:
        return ProbeUnavailable(text, "run the guard on Linux itself, on x86-64 or arm64")
    if error.errno in (errno.EPERM, errno.EACCES) and not error.log:
        if "cgroup" in text:
            return ProbeUnavailable(text, "remove the program that claims the cgroup for itself: bpftool cgroup tree")
        if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] < 1 << 26 and _before((5, 11)):
            return ProbeUnavailable(text, "raise the limit of locked memory: ulimit -l unlimited")
        remedy = f"allow bpf(2) in the guard's sandbox (seccomp, AppArmor, SELinux, lockdown); {_CAP_ADD}"
        return ProbeUnavailable(text, remedy)
    if error.errno == errno.ENOMEM:
        return ProbeUnavailable(text, "give the guard, or its cgroup, more memory")
    return ProbeUnavailable(f"Linux {os.uname().release} refuses: {text}", _RELEASE)


def _before(version: tuple[int, int]) -> bool:
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return found is not None and (int(found[1]), int(found[2])) < version


def _expand(host: str) -> Iterator[bytes]:
    """Yield the addresses that one to listen on stands for, as in the map of listeners. Raises ValueError."""
    address = _packed(host)
    wildcards = {bytes(16): True, _packed("0.0.0.0"): False}  # noqa: S104 - compared to, not bound to
    if address not in wildcards:
        yield address
        return
    for local in _local_addresses():
        if wildcards[address] or local[:12] == LOOPBACK_NETWORK[:12]:
            yield local
    yield LOOPBACK_NETWORK


def _is_loopback(address: bytes) -> bool:
    parsed = ipaddress.IPv6Address(address)
    return (parsed.ipv4_mapped or parsed).is_loopback


def _local_addresses() -> Iterator[bytes]:
    """Yield the addresses of this network namespace's interfaces: rtnetlink(7), RTM_GETADDR.

    Yields only those of the loopback interface if the kernel can't be asked.
    """
    yield _packed("127.0.0.1")
    yield _packed("::1")
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as netlink,
    ):
        netlink.settimeout(1.0)
        request = _ADDRESS_HEADER.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
        length = _NETLINK_HEADER.size + len(request)
        netlink.send(_NETLINK_HEADER.pack(length, _RTM_GETADDR, _NLM_F_REQUEST_DUMP, 1, 0) + request)
        while True:
            answer = netlink.recv(mmap.PAGESIZE * 16)
            at = 0
            while at < len(answer):
                length, kind, _, _, _ = _NETLINK_HEADER.unpack_from(answer, at)
                if kind != _RTM_NEWADDR:  # NLMSG_DONE, or an error
                    return
                address = _interface_address(answer[at + _NETLINK_HEADER.size : at + length])
                if address is not None:
                    yield address
                at += length + 3 & ~3


def _interface_address(message: bytes) -> bytes | None:
    """Decode a ``struct ifaddrmsg`` and its attributes; IFA_ADDRESS is the far end's on point-to-point interfaces."""
    found: dict[int, bytes] = {}
    at = _ADDRESS_HEADER.size
    while at + _ATTRIBUTE_HEADER.size <= len(message):
        length, kind = _ATTRIBUTE_HEADER.unpack_from(message, at)
        found[kind] = message[at + _ATTRIBUTE_HEADER.size : at + length]
        at += max(length + 3 & ~3, _ATTRIBUTE_HEADER.size)
    address = found.get(_IFA_LOCAL, found.get(_IFA_ADDRESS))
    if address is None or len(address) not in (4, 16):
        return None
    return address if len(address) == 16 else LOOPBACK_NETWORK[:12] + address
