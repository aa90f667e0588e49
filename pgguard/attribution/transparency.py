"""Whether a socket that is watched answers as one that isn't: tried at each start, on this very kernel.

What a program can ask of its socket must not depend on whether it is looked at, and whether it does depends on the
kernel. Of a socket in a map, for one, FIONREAD says 0 whatever lies unread, since commit 929e30f93125 (Linux 6.6.128,
6.12.75, 6.18.14, 6.19.4) and until 04af4efde58a. So nothing is concluded from versions: for each behaviour in the table
two connections to ourselves are made, one of which is watched, and what they answer is compared. That takes ten
milliseconds of the processor.

**To mend it** was tried and left: a program for what is received (sk_skb) on the same map makes FIONREAD right again,
for 1.6 µs a transaction. But it takes what is received out of the socket; when the socket leaves the map, and so when
the guard ends, what lies unread is lost, and nothing can be read from it ever after. So where answers differ, the
kernel isn't asked in that way.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import select
import signal
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pgguard.attribution.ebpf.account import Accounts
from pgguard.attribution.ebpf.bpf import BpfError
from pgguard.attribution.ebpf.probe import ProbeUnavailable, SenderProbe, connection_key
from pgguard.attribution.ebpf.programs import Way
from pgguard.attribution.sockets import SockDiag, client_socket

_SECONDS = 1.0
"""How long anything may take that takes microseconds."""
_TRIES = 3
"""An answer differs if it does as many times: a busy machine may be late once."""

_DISTURBING = signal.SIGRTMAX - 1
"""A signal that nobody else uses."""

_SIOCATMARK = 0x8905
_TCP_INQ = 36
"""``linux/sockios.h``, ``linux/tcp.h``."""
_SPLICE_F_NONBLOCK = 2

Answer = object


class Pair(NamedTuple):
    """A connection to ourselves."""

    client: socket.socket
    guard: socket.socket


class Behaviour(NamedTuple):
    """Something that a program may ask of its socket."""

    name: str
    ask: Callable[[Pair], Answer]
    """Returns what can be compared. Raises OSError, which is compared too."""
    blocks: bool = False
    """Only sockets that block can tell."""


def _arrived(pair: Pair) -> None:
    """Wait until the client can read something."""
    poll = select.poll()
    poll.register(pair.client, select.POLLIN)
    if not poll.poll(_SECONDS * 1000):
        raise TimeoutError(errno.ETIMEDOUT, "nothing arrives")


def _polled(pair: Pair) -> list[int]:
    poll = select.poll()
    poll.register(pair.client, select.POLLIN | select.POLLPRI | select.POLLOUT | select.POLLRDHUP)
    return [event for _, event in poll.poll(0)]


def _send(pair: Pair, size: int) -> None:
    pair.guard.sendall(bytes(range(256)) * (size // 256) + bytes(range(size % 256)))
    _arrived(pair)


def _unread(pair: Pair) -> int:
    return int(struct.unpack("=i", fcntl.ioctl(pair.client, termios.FIONREAD, bytes(4)))[0])


def _fionread(pair: Pair) -> Answer:
    answers = [_unread(pair)]
    _send(pair, 500)
    answers.append(_unread(pair))
    pair.client.recv(100)
    answers.append(_unread(pair))
    pair.client.recv(1000)
    return [*answers, _unread(pair)]


def _poll(pair: Pair) -> Answer:
    answers = [_polled(pair)]
    _send(pair, 500)
    answers.append(_polled(pair))
    pair.client.recv(1000)
    return [*answers, _polled(pair)]


def _select(pair: Pair) -> Answer:
    answers = []
    for size in (0, 500):
        if size:
            _send(pair, size)
        answers.append([len(ready) for ready in select.select([pair.client], [pair.client], [pair.client], 0)])
    return answers


def _epoll(pair: Pair, events: int) -> Answer:
    with select.epoll() as epoll:
        epoll.register(pair.client, select.EPOLLIN | select.EPOLLRDHUP | events)

        def ready() -> list[int]:
            return [event for _, event in epoll.poll(0)]

        answers = [ready()]
        _send(pair, 500)
        answers += [ready(), ready()]
        pair.client.recv(100)
        answers.append(ready())
        before = len(pair.client.recv(1000, socket.MSG_PEEK))
        _send(pair, 10)
        deadline = time.monotonic() + _SECONDS
        while len(pair.client.recv(1000, socket.MSG_PEEK)) == before and time.monotonic() < deadline:
            time.sleep(0.0001)
        answers += [ready(), ready()]
        pair.client.recv(1000)
        answers.append(ready())
        pair.guard.shutdown(socket.SHUT_WR)
        _arrived(pair)
        return [*answers, ready(), ready()]


def _peek(pair: Pair) -> Answer:
    _send(pair, 500)
    peek = socket.MSG_PEEK
    steps = ((100, peek), (1000, peek), (100, 0), (9, peek), (1000, 0))
    return [pair.client.recv(size, flags) for size, flags in steps]


def _truncate(pair: Pair) -> Answer:
    """With MSG_TRUNC bytes are thrown away: tcp(7)."""
    _send(pair, 500)
    return [len(pair.client.recv(100, socket.MSG_TRUNC)), pair.client.recv(1000)]


class _MessageVector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _MessageHeader(ctypes.Structure):
    """``struct msghdr``."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint),
        ("vectors", ctypes.POINTER(_MessageVector)),
        ("vector_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Message(ctypes.Structure):
    """``struct mmsghdr``."""

    _fields_ = (("header", _MessageHeader), ("length", ctypes.c_uint))


def _other_calls(pair: Pair) -> Answer:
    """read(2), readv(2), recvmsg(2), recvmmsg(2)."""
    _send(pair, 500)
    client = pair.client
    answers: list[object] = [os.read(client.fileno(), 100)]
    parts = [bytearray(30), bytearray(70)]
    answers += [os.readv(client.fileno(), parts), *parts]
    answers.append(client.recvmsg(100, 100)[:3])
    buffers = [ctypes.create_string_buffer(50) for _ in range(2)]
    vectors = [_MessageVector(ctypes.addressof(buffer), 50) for buffer in buffers]
    headers = [_MessageHeader(vectors=ctypes.pointer(vector), vector_count=1) for vector in vectors]
    messages = (_Message * 2)(*(_Message(header) for header in headers))
    answers.append(_libc.recvmmsg(client.fileno(), messages, 2, socket.MSG_DONTWAIT, None))
    return [*answers, [message.length for message in messages], [buffer.raw for buffer in buffers], client.recv(1000)]


def _rcvlowat(pair: Pair) -> Answer:
    pair.client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 100)
    pair.guard.sendall(bytes(50))
    deadline = time.monotonic() + _SECONDS
    while not _peeked(pair) and time.monotonic() < deadline:
        time.sleep(0.0001)
    answers: list[object] = [_polled(pair)]
    pair.guard.sendall(bytes(60))
    _arrived(pair)
    return [*answers, _polled(pair), pair.client.recv(1000)]


def _peeked(pair: Pair) -> int:
    try:
        return len(pair.client.recv(1000, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except BlockingIOError:
        return 0


def _splice(pair: Pair) -> Answer:
    _send(pair, 500)
    reader, writer = os.pipe()
    try:
        moved = os.splice(pair.client.fileno(), writer, 1000, flags=_SPLICE_F_NONBLOCK)
        return [moved, os.read(reader, moved)]
    finally:
        os.close(reader)
        os.close(writer)


def _in_queue(pair: Pair) -> Answer:
    """TCP_INQ: how much is left, with what is received."""
    pair.client.setsockopt(socket.IPPROTO_TCP, _TCP_INQ, 1)
    _send(pair, 500)
    return pair.client.recvmsg(100, 100)[:3]


def _receive_queue(pair: Pair) -> Answer:
    """What the kernel tells the guard of what nobody has read: :meth:`SockDiag.unread`."""
    inode = os.fstat(pair.client.fileno()).st_ino
    described = client_socket(pair.guard)
    answers = []
    with SockDiag() as diag:
        for size in (500, 0, 0):
            if size:
                _send(pair, size)
            answers.append(diag.unread(described, inode))
            pair.client.recv(100)
    return answers


def _urgent(pair: Pair) -> Answer:
    pair.guard.send(b"ab!", socket.MSG_OOB)
    _arrived(pair)
    answers: list[object] = [_polled(pair), pair.client.recv(1, socket.MSG_OOB), pair.client.recv(10)]
    return [*answers, struct.unpack("=i", fcntl.ioctl(pair.client, _SIOCATMARK, bytes(4)))]


def _empty(pair: Pair) -> Answer:
    return [_error(lambda: pair.client.recv(10)), pair.client.recv(0)]


def _end(pair: Pair) -> Answer:
    """The guard's end is closed behind something unread, and the client's direction goes on."""
    _send(pair, 10)
    pair.guard.shutdown(socket.SHUT_WR)
    answers: list[object] = [pair.client.recv(5), pair.client.recv(10)]
    _arrived(pair)
    answers += [_polled(pair), pair.client.recv(10), pair.client.recv(10)]
    answers.append(pair.client.send(b"x"))
    return [*answers, pair.guard.recv(1)]


def _reset(pair: Pair) -> Answer:
    """The guard ends as with SIGKILL, with something of the client's unread."""
    _send(pair, 10)
    pair.guard.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
    pair.guard.close()
    poll = select.poll()
    poll.register(pair.client, 0)
    poll.poll(_SECONDS * 1000)  # until it is hung up
    answers: list[object] = [_polled(pair), pair.client.recv(100)]
    answers.append([_error(lambda: pair.client.recv(10)), pair.client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)])
    return [*answers, _error(lambda: pair.client.send(b"x", socket.MSG_NOSIGNAL)), _error(lambda: pair.client.recv(10))]


def _own_end(pair: Pair) -> Answer:
    """The client closes its direction, and reads on."""
    pair.client.shutdown(socket.SHUT_WR)
    answers = [pair.guard.recv(10), _error(lambda: pair.client.send(b"x", socket.MSG_NOSIGNAL))]
    _send(pair, 10)
    return [*answers, pair.client.recv(10), _polled(pair)]


def _sending(pair: Pair) -> Answer:
    """What sends return; what they take when the buffer is full isn't settled."""
    client = pair.client
    answers: list[object] = [client.send(b"a" * 100), client.sendmsg([b"b", b"c"]), os.writev(client.fileno(), [b"d"])]
    answers.append(client.send(b"e", socket.MSG_MORE))
    answers.append(client.send(b"f"))
    got = b""
    while len(got) < 105:
        got += pair.guard.recv(1000)
    return [*answers, got]


def _error(call: Callable[[], object]) -> object:
    try:
        return call()
    except OSError as error:
        return error.errno


def _blocked(pair: Pair, size: int, flags: int, disturb: Callable[[int], None]) -> Answer:
    """Have a thread wait in recv(2), do something about that, and return what it got."""
    pair.client.setblocking(True)
    buffer = ctypes.create_string_buffer(size)
    answers: list[object] = []

    def receive() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {_DISTURBING})  # this process may have blocked all
        received = _libc.recv(pair.client.fileno(), buffer, size, flags)
        answers.extend([received, ctypes.get_errno() if received < 0 else buffer.raw[:received]])

    thread = threading.Thread(target=receive, daemon=True)
    thread.start()
    tid = thread.native_id
    if tid is None or not _is_asleep(tid):
        raise TimeoutError(errno.ETIMEDOUT, "a thread did not begin to wait")
    disturb(tid)
    thread.join(_SECONDS)
    if thread.is_alive():
        pair.client.shutdown(socket.SHUT_RDWR)
        thread.join(_SECONDS)
        answers.append("it hangs")
    return answers


def _is_asleep(tid: int) -> bool:
    deadline = time.monotonic() + _SECONDS
    while time.monotonic() < deadline:
        call = Path(f"/proc/self/task/{tid}/syscall").read_text()
        if call.split(" ", 1)[0] == _RECVFROM:
            return True
        time.sleep(0.0002)
    return False


def _sleeps(tid: int) -> str | None:
    """How often a thread has gone to sleep, ``None`` if it has ended: proc_pid_status(5)."""
    try:
        lines = Path(f"/proc/self/task/{tid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return next(line for line in lines if line.startswith("voluntary_ctxt_switches"))


_RECVFROM = {"x86_64": "45", "aarch64": "207"}.get(os.uname().machine, "")
"""The number of recvfrom(2), as ``/proc/PID/syscall`` shows it."""


def _read(pair: Pair) -> Answer:
    return _blocked(pair, 100, 0, lambda _: pair.guard.sendall(b"x" * 50))


def _wait_for_all(pair: Pair) -> Answer:
    """MSG_WAITALL: in two pieces."""

    def send_in_two(_: int) -> None:
        pair.guard.sendall(b"x" * 50)
        time.sleep(0.001)
        pair.guard.sendall(b"y" * 50)

    return _blocked(pair, 100, socket.MSG_WAITALL, send_in_two)


def _interrupted(pair: Pair) -> Answer:
    """A signal whose handler does nothing, and doesn't end system calls: signal(7), SA_RESTART."""
    before = _libc.signal(_DISTURBING, ctypes.cast(_libc.getpid, ctypes.c_void_p))
    try:

        def interrupt(tid: int) -> None:
            slept = _sleeps(tid)
            _libc.tgkill(os.getpid(), tid, _DISTURBING)
            deadline = time.monotonic() + _SECONDS
            while (now := _sleeps(tid)) is not None and now == slept and time.monotonic() < deadline:
                time.sleep(0.0002)  # until it has ended, or sleeps again
            pair.guard.sendall(b"x" * 50)

        return _blocked(pair, 100, 0, interrupt)
    finally:
        _libc.signal(_DISTURBING, before)


def _timeout(pair: Pair) -> Answer:
    """SO_RCVTIMEO, with nothing to read, and with something."""
    pair.client.setblocking(True)
    pair.client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("=qq", 0, 2000))
    answers = [_error(lambda: pair.client.recv(10))]
    pair.guard.sendall(b"x")
    return [*answers, pair.client.recv(10)]


BEHAVIOURS = (
    Behaviour("FIONREAD", _fionread),
    Behaviour("poll", _poll),
    Behaviour("select", _select),
    Behaviour("epoll", lambda pair: _epoll(pair, 0)),
    Behaviour("edge-triggered epoll", lambda pair: _epoll(pair, select.EPOLLET)),
    Behaviour("MSG_PEEK", _peek),
    Behaviour("MSG_TRUNC", _truncate),
    Behaviour("read, readv, recvmsg or recvmmsg", _other_calls),
    Behaviour("SO_RCVLOWAT", _rcvlowat),
    Behaviour("splice", _splice),
    Behaviour("TCP_INQ", _in_queue),
    Behaviour("idiag_rqueue", _receive_queue),
    Behaviour("urgent data", _urgent),
    Behaviour("recv with nothing to read", _empty),
    Behaviour("the end of the stream", _end),
    Behaviour("a reset", _reset),
    Behaviour("shutdown", _own_end),
    Behaviour("what sends return", _sending),
    Behaviour("a recv that blocks", _read, blocks=True),
    Behaviour("MSG_WAITALL", _wait_for_all, blocks=True),
    Behaviour("a recv that a signal interrupts", _interrupted, blocks=True),
    Behaviour("SO_RCVTIMEO", _timeout, blocks=True),
)
"""What is compared at each start."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a watched socket answers differently."""

    differing: tuple[str, ...] = ()
    """The names of behaviours; of all sockets that are watched."""
    problem: str | None = None
    """Why it could not be tried, a clause; then nothing is known."""

    @property
    def alike(self) -> bool:
        """No difference is to be noticed."""
        return not self.differing and self.problem is None

    def __str__(self) -> str:
        """What is wrong, a clause."""
        if self.problem is not None:
            return f"pgguard could not test whether watched sockets behave like others ({self.problem})"
        return f"on this kernel a watched socket behaves differently from others ({', '.join(self.differing)})"


def compare(probe: SenderProbe, behaviours: tuple[Behaviour, ...] = BEHAVIOURS) -> Comparison:
    """Compare what sockets answer that are watched to what others do; raises nothing.

    To be called before the probe has its listeners: what it reports meanwhile is thrown away.
    """
    try:
        with _Bench(probe) as bench:
            wanted = [behaviour for behaviour in behaviours if probe.watches_blocking or not behaviour.blocks]
            return Comparison(tuple(behaviour.name for behaviour in wanted if bench.differs(behaviour)))
    except (OSError, RuntimeError) as error:
        return Comparison(problem=str(error))


class _Bench:
    """Two listeners of ourselves, one of which the probe watches connections to."""

    def __init__(self, probe: SenderProbe) -> None:
        self._probe = probe
        self._accounts = Accounts(probe)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> _Bench:
        with contextlib.ExitStack() as stack:
            self._watched = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            self._other = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            for listener in (self._watched, self._other):
                listener.settimeout(_SECONDS)
            host, port = self._watched.getsockname()
            self._probe.add(host, port)
            stack.callback(self._leave, host, port)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _leave(self, host: str, port: int) -> None:
        with contextlib.suppress(BpfError):
            self._probe.remove(host, port)
        self._probe.read()

    def differs(self, behaviour: Behaviour) -> bool:
        """Whether a watched socket's answer differs again and again. Raises OSError: it can't be tried."""
        return all(self._ask(behaviour, self._watched) != self._ask(behaviour, self._other) for _ in range(_TRIES))

    def _ask(self, behaviour: Behaviour, listener: socket.socket) -> Answer:
        with self._connected(listener) as pair:
            try:
                return behaviour.ask(pair)
            except OSError as error:
                return error.errno

    @contextlib.contextmanager
    def _connected(self, listener: socket.socket) -> Iterator[Pair]:
        with socket.socket() as client:
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                client.connect(listener.getsockname())
            with listener.accept()[0] as guard:
                guard.settimeout(_SECONDS)
                guard.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if listener is self._watched:
                    self._check(guard)
                yield Pair(client, guard)

    def _check(self, guard: socket.socket) -> None:
        """Raises OSError unless the kernel watches this connection's client."""
        self._accounts.feed()
        key = connection_key(guard)
        account = self._accounts.open(key)
        self._accounts.close(key, account)
        if account.cookie is None or account.problem is not None:
            reason = "for an unknown reason" if account.problem is None else os.strerror(account.problem)
            raise OSError(account.problem or errno.EIO, f"a connection is not watched: {reason}")


def start(addresses: Iterable[tuple[str, int]], *, insist: bool) -> tuple[SenderProbe, Comparison]:
    """Make a probe that changes nothing for who is watched.

    Args:
        addresses: of the guard's listeners: see :class:`SenderProbe`.
        insist: to have one that changes something rather than none, and clients watched whose sockets block too.

    Raises:
        ProbeUnavailable: what is missing, and the one thing to do about it.
        ValueError: something isn't an IP address.
    """
    tried: list[tuple[SenderProbe, Comparison]] = []
    chosen: SenderProbe | None = None
    try:
        _try_ways(tried, blocking=insist)
        probe, comparison = min(tried, key=_by_what_is_noticed)
        if not (comparison.alike or insist):
            remedy = "run Linux 6.15 or later, where watching changes nothing, or accept it with --attribution ebpf"
            raise ProbeUnavailable(str(comparison), remedy)
        for host, port in addresses:
            probe.add(host, port)
        chosen = probe
    except BpfError as error:
        raise ProbeUnavailable(str(error.strerror), "listen on fewer addresses") from error
    finally:
        for other, _ in tried:
            if other is not chosen:
                other.close()
    return probe, comparison


def _try_ways(tried: list[tuple[SenderProbe, Comparison]], *, blocking: bool) -> None:
    """Make probes, the best first, until one changes nothing. Raises ProbeUnavailable: none works."""
    refused: list[ProbeUnavailable] = []
    for way in (None, Way.MAP):
        try:
            probe = SenderProbe([], blocking=blocking, way=way)
        except ProbeUnavailable as error:
            refused.append(error)
            continue
        tried.append((probe, compare(probe)))
        if tried[-1][1].alike or probe.way is Way.MAP:
            break
    if not tried:
        raise refused[0]


def _by_what_is_noticed(tried: tuple[SenderProbe, Comparison]) -> tuple[bool, int]:
    comparison = tried[1]
    return comparison.problem is not None, len(comparison.differing)


_libc = ctypes.CDLL(None, use_errno=True)
_libc.recv.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.recv.restype = ctypes.c_ssize_t
_libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
_libc.signal.restype = ctypes.c_void_p
