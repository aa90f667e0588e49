"""What the relay calls the system by, in whichever form is installed: both keep to this."""

from __future__ import annotations

import array
import errno
import fcntl
import gc
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
import warnings
import weakref
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from pgguard.proxy.ends import CHUNK
from pgguard.proxy.sockets import Epoll, Stream, accept, unconnected

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def pair() -> Iterator[tuple[Stream, socket.socket]]:
    """What the relay has of a connection, and its other end."""
    ours, theirs = socket.socketpair()
    stream = Stream(ours)
    with theirs:
        yield stream, theirs
    stream.close()


@pytest.mark.parametrize("size", [1, 16384, 16385, CHUNK - 1, CHUNK])
def test_what_has_come_is_received_and_then_nothing_and_the_end(size: int, pair: tuple[Stream, socket.socket]) -> None:
    stream, other = pair
    for byte in b"ab":
        sent = bytes([byte]) * size
        other.sendall(sent)
        got = stream.receive(CHUNK)
        assert got == sent
        assert sys.getsizeof(got) == sys.getsizeof(sent)
    assert stream.receive(CHUNK) is None
    other.close()
    assert stream.receive(CHUNK) == b""


def test_no_more_is_received_than_was_asked_for_and_what_was_received_before_stays(
    pair: tuple[Stream, socket.socket],
) -> None:
    stream, other = pair
    sent = os.urandom(60_000)
    other.sendall(sent)
    sizes = [20_000, 3, 30_000, CHUNK]
    got = [stream.receive(size) for size in sizes]
    assert got == [sent[:20_000], sent[20_000:20_003], sent[20_003:50_003], sent[50_003:]]
    with pytest.raises(ValueError, match="negative"):
        stream.receive(-1)


def test_as_much_is_sent_as_there_is_room_for(pair: tuple[Stream, socket.socket]) -> None:
    stream, other = pair
    data = os.urandom(1_000_000)
    begin, got = 10, b""
    sent = stream.send(data, begin, len(data))
    assert 0 < sent < len(data)
    while stream.send(data, begin + sent, begin + sent + 1):
        sent += 1
    while len(got) < sent:
        got += other.recv(1 << 20)
    assert got == data[begin : begin + sent]
    assert stream.send(data, 3, 3) == 0
    assert stream.send(data, len(data) - 1, len(data)) == 1
    assert other.recv(2) == data[-1:]


@pytest.mark.parametrize(("begin", "stop"), [(-1, 2), (0, 4), (2, 1), (4, 4), (0, 1 << 62)])
def test_bytes_that_are_not_there_are_not_sent(begin: int, stop: int, pair: tuple[Stream, socket.socket]) -> None:
    stream, other = pair
    with pytest.raises(ValueError, match="there are no such bytes"):
        stream.send(b"abc", begin, stop)
    with pytest.raises(BlockingIOError):
        other.recv(1, socket.MSG_DONTWAIT)


def test_who_has_sent_is_told_and_what_else_was_sent_along_is_not_let_in() -> None:
    ours, theirs = socket.socketpair()
    stream = Stream(ours)
    with theirs, closing(stream):
        theirs.sendall(b"a")
        assert stream.receive_named(CHUNK) == (b"a", -1)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        before = set(Path("/proc/self/fd").iterdir())
        theirs.sendmsg([b"b"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
        assert stream.receive_named(CHUNK) == (b"b", os.getpid())
        assert set(Path("/proc/self/fd").iterdir()) == before
        large = os.urandom(100_000)
        theirs.sendall(large)
        assert stream.receive_named(CHUNK) == (large, os.getpid())
        assert stream.receive_named(CHUNK) is None
        theirs.close()
        ended = stream.receive_named(CHUNK)
        assert ended is not None
        assert ended[0] == b""


def test_what_is_broken_is_an_error_of_its_kind() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    with closing(Stream(ours)) as stream:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        theirs.close()
        with pytest.raises(ConnectionResetError) as broken:
            stream.receive(CHUNK)
        assert broken.value.errno == errno.ECONNRESET
        with pytest.raises(BrokenPipeError):  # and no signal
            stream.send(b"a", 0, 1)


def test_what_is_closed_is_not_met_again_by_its_number(pair: tuple[Stream, socket.socket]) -> None:
    stream, _ = pair
    fd = stream.fileno()
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 5000)
    assert stream.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 10_000
    timeout = struct.pack("@ll", 3, 0)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
    assert stream.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16) == timeout
    stream.shutdown(socket.SHUT_WR)
    stream.close()
    stream.close()
    other, far = socket.socketpair()
    with other, far:
        assert fd in (other.fileno(), far.fileno())
        for call in (lambda: stream.receive(1), lambda: stream.receive_named(1), lambda: stream.send(b"a", 0, 1)):
            with pytest.raises(OSError, match="Bad file descriptor"):
                call()
        assert stream.fileno() == -1


@pytest.mark.parametrize(
    "call",
    [
        lambda stream: stream.send("abc", 0, 3),
        lambda stream: stream.send(b"abc", 0),
        lambda stream: stream.send(b"abc", None, 3),
        lambda stream: stream.receive("1"),
        lambda stream: stream.receive_named(None),
        lambda stream: stream.shutdown(),
        lambda stream: stream.setsockopt(1, 2, "3"),
        lambda stream: stream.connect_ex(1),
    ],
)
def test_what_makes_no_sense_is_refused(call: Any, pair: tuple[Stream, socket.socket]) -> None:
    with pytest.raises(TypeError):
        call(pair[0])


@pytest.mark.parametrize(
    ("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"), (socket.AF_UNIX, "")]
)
def test_who_connects_is_accepted_and_both_know_whom_they_have(
    family: socket.AddressFamily, host: str, short_directory: Path
) -> None:
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setblocking(False)
        listener.bind((host, 0) if host else f"{short_directory}/s")
        listener.listen(1)
        assert accept(listener) is None
        target = listener.getsockname()
        client = unconnected(family)
        assert client.connect_ex(target) in (0, errno.EINPROGRESS)
        accepted = accept(listener)
        assert accepted is not None
        server, peer = accepted
        for end in client, server:
            assert not os.get_inheritable(end.fileno())
            assert not os.get_blocking(end.fileno())
        if host:
            assert peer == client.getsockname() == server.getpeername()
            assert client.getpeername() == server.getsockname() == target
        else:
            assert not peer
            assert isinstance(server.getsockname(), str)
        assert client.send(b"hello", 0, 5) == 5
        assert server.receive(CHUNK) == b"hello"
        client.close()
        assert server.receive(CHUNK) == b""
        with socket.socket(fileno=server.detach()) as detached:
            assert (detached.family, server.fileno()) == (family, -1)
        listener.close()
        refused = unconnected(family)
        number = refused.connect_ex(target)
        if number == errno.EINPROGRESS:
            number = refused.connect_ex(target)
        assert number == errno.ECONNREFUSED
        refused.close()


def test_where_nothing_can_be_is_not_connected_to() -> None:
    with closing(unconnected(socket.AF_UNIX)) as stream:
        assert stream.connect_ex("/nowhere/at/all") == errno.ENOENT
        assert stream.connect_ex("\0pgguard-nobody") == errno.ECONNREFUSED
        with pytest.raises(OSError, match="path too long"):
            stream.connect_ex("/" + "a" * 108)
    with pytest.raises(OSError, match="not supported"):
        unconnected(-2)
    with socket.socket() as deaf, pytest.raises(OSError, match="Invalid argument"):
        accept(deaf)


def test_nothing_is_left_of_what_is_gone() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        stream = Stream(ours)
        fd = stream.fileno()
        theirs.sendall(b"a" * 40_000)
        assert stream.receive(CHUNK)
        for wrong in ((b"a", 2, 3), (b"a", "", 3), (b"a",)):
            with pytest.raises((TypeError, ValueError)):
                stream.send(*cast("Any", wrong))
        with warnings.catch_warnings(action="ignore"):
            del stream
            gc.collect()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_events_are_told_with_whose_they_are() -> None:
    epoll = Epoll()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        epoll.register(ours.fileno(), select.EPOLLIN | select.EPOLLRDHUP, "ours")
        with pytest.raises(FileExistsError):
            epoll.register(ours.fileno(), select.EPOLLIN, "another")
        assert epoll.poll(0, 10) == []
        began = time.monotonic()
        assert epoll.poll(0.0201, 10) == []
        assert 0.02 <= time.monotonic() - began < 5
        theirs.sendall(b"a")
        assert epoll.poll(60.0, 10) == ["ours", select.EPOLLIN]
        epoll.modify(ours.fileno(), select.EPOLLOUT)
        epoll.register(theirs.fileno(), select.EPOLLOUT | select.EPOLLET, "theirs")
        both = epoll.poll(-1, 10)
        assert ({*both[::2]}, both[1::2]) == ({"ours", "theirs"}, [select.EPOLLOUT] * 2)
        assert epoll.poll(60.0, 1) == ["ours", select.EPOLLOUT]
        epoll.unregister(ours.fileno())
        with pytest.raises(FileNotFoundError):
            epoll.unregister(ours.fileno())
        with pytest.raises(FileNotFoundError):
            epoll.modify(ours.fileno(), select.EPOLLIN)
        assert epoll.poll(0, 10) == []
    fd = epoll.fileno()
    assert not os.get_inheritable(fd)
    closed = [epoll.closed]
    epoll.close()
    epoll.close()
    assert [*closed, epoll.closed] == [False, True]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    for call in (
        lambda: epoll.poll(0, 1),
        lambda: epoll.register(0, 1, None),
        lambda: epoll.unregister(0),
        epoll.fileno,
    ):
        with pytest.raises(ValueError, match="closed epoll"):
            call()


class Whose:
    """What events belong to."""

    epoll: Epoll | None = None


def test_what_events_belong_to_is_kept_as_long_as_it_is_registered() -> None:
    epoll = Epoll()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        fds = [ours.fileno(), theirs.fileno()]
        fds += [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, least) for fd, least in zip(fds, (700, 900), strict=True)]
        whose = [Whose() for _ in fds]
        for fd, one in zip(fds, whose, strict=True):
            epoll.register(fd, select.EPOLLOUT, one)
        assert {*epoll.poll(60.0, 10)[::2]} == {*whose}
        kept = [weakref.ref(one) for one in whose]
        del one, whose
        epoll.unregister(fds[0])
        gc.collect()
        assert [ref() is None for ref in kept] == [True, False, False, False]
        epoll.close()
        assert all(ref() is None for ref in kept)

        around = Epoll()  # what it keeps may keep it
        another = Whose()
        another.epoll = around
        around.register(fds[0], select.EPOLLOUT, another)
        last = weakref.ref(another)
        del around, another
        gc.collect()
        assert last() is None
        for fd in fds[2:]:
            os.close(fd)


def test_a_descriptor_that_cannot_be_registered_changes_nothing() -> None:
    epoll = Epoll()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        epoll.register(ours.fileno(), select.EPOLLOUT, "ours")
        for wrong in 2**31 - 1, theirs.fileno() + 1000:
            with pytest.raises(OSError, match="Bad file descriptor"):
                epoll.register(wrong, select.EPOLLOUT, "another's")
        with pytest.raises((TypeError, ValueError)):
            epoll.register(cast("Any", "no number"), select.EPOLLOUT, "another's")
        assert epoll.poll(60.0, 10) == ["ours", select.EPOLLOUT]
    epoll.close()


def test_a_file_that_is_closed_here_and_open_elsewhere_is_nobodys() -> None:
    epoll = Epoll()
    ours, theirs = socket.socketpair()
    with theirs, ours.dup():
        fd = ours.fileno()
        epoll.register(fd, select.EPOLLOUT, "ours")
        ours.close()
        os.dup2(theirs.fileno(), fd)  # another file has its number
        epoll.register(fd, select.EPOLLIN, "another's")
        epoll.unregister(fd)
        assert epoll.poll(60.0, 10) == [None, select.EPOLLOUT]
        os.close(fd)
    epoll.close()


def test_who_waits_lets_others_run_and_hears_signals() -> None:
    """Signals' handlers run while it waits, and what they raise ends it."""

    class Heard(Exception):
        pass

    def hear(_: int, __: object) -> None:
        raise Heard

    before = signal.signal(signal.SIGUSR1, hear)
    epoll = Epoll()
    try:
        main = threading.main_thread().ident
        assert main is not None
        timer = threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGUSR1))
        timer.start()
        with pytest.raises(Heard):
            epoll.poll(60.0, 1)
        timer.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
        epoll.close()
