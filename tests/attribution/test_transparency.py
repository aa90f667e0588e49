"""A watched socket answers as any other does: compared at each start, and here with more than there is time for."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import socket
import struct
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pgguard.attribution import transparency
from pgguard.attribution.ebpf import bpf
from pgguard.attribution.ebpf.probe import ProbeUnavailable, SenderProbe
from pgguard.attribution.ebpf.programs import Way
from pgguard.attribution.ebpf.ring import Ring
from pgguard.attribution.transparency import BEHAVIOURS, Behaviour, Comparison, Pair, compare, start

if TYPE_CHECKING:
    from collections.abc import Iterator

try:
    with SenderProbe([]) as best:
        CALLED_BACK = best.way is Way.CALLBACK
except ProbeUnavailable as unavailable:
    pytest.skip(str(unavailable), allow_module_level=True)

F_SETSIG, F_SETOWN_EX = 10, 15
"""``linux/fcntl.h``."""


@pytest.fixture(params=[way for way in Way if way is Way.MAP or CALLED_BACK])
def probe(request: pytest.FixtureRequest) -> Iterator[SenderProbe]:
    with SenderProbe([], way=request.param, blocking=True) as probe:
        yield probe


def unread_in(pair: Pair) -> int:
    """FIONREAD."""
    return int(struct.unpack("=i", fcntl.ioctl(pair.client, 0x541B, bytes(4)))[0])


def _sigio(pair: Pair) -> object:
    """Asynchronous notification, to this very thread: fcntl(2), F_SETOWN_EX."""
    number = signal.SIGRTMIN + 3
    signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    try:
        fcntl.fcntl(pair.client, F_SETSIG, number)
        fcntl.fcntl(pair.client, F_SETOWN_EX, struct.pack("=ii", 0, threading.get_native_id()))
        fcntl.fcntl(pair.client, fcntl.F_SETFL, fcntl.fcntl(pair.client, fcntl.F_GETFL) | os.O_ASYNC)
        while signal.sigtimedwait([number], 0):
            pass
        pair.guard.sendall(b"x")
        told = signal.sigtimedwait([number], 1)
        fcntl.fcntl(pair.client, fcntl.F_SETFL, fcntl.fcntl(pair.client, fcntl.F_GETFL) & ~os.O_ASYNC)
        while signal.sigtimedwait([number], 0):
            pass
        return told is not None and told.si_signo == number
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])


def _much(pair: Pair) -> object:
    """A megabyte, read in pieces of all sizes while it is sent."""
    data = os.urandom(1) * 1_000_000
    sender = threading.Thread(target=pair.guard.sendall, args=(data,))
    sender.start()
    got = bytearray()
    pair.client.settimeout(10)
    while len(got) < len(data):
        got += pair.client.recv(1 + len(got) % 70_000)
    sender.join()
    return bytes(got) == data


MORE = (
    Behaviour("SIGIO", _sigio),
    Behaviour("a megabyte", _much),
)


@pytest.mark.skipif(not CALLED_BACK, reason="this kernel's TCP calls nobody back")
@pytest.mark.parametrize("behaviour", BEHAVIOURS + MORE, ids=lambda behaviour: behaviour.name)
def test_a_socket_that_is_called_back_for_answers_as_any_other(behaviour: Behaviour) -> None:
    with SenderProbe([], way=Way.CALLBACK) as probe:
        assert compare(probe, (behaviour,)) == Comparison()


@pytest.mark.parametrize("behaviour", MORE, ids=lambda behaviour: behaviour.name)
def test_what_is_the_same_in_a_map_as_well(behaviour: Behaviour) -> None:
    with SenderProbe([], way=Way.MAP, blocking=True) as probe:
        assert compare(probe, (behaviour,)) == Comparison()


def test_what_a_socket_in_a_map_answers_differently_is_found() -> None:
    """Whether FIONREAD is among it depends on the kernel; that a signal ends a wait doesn't, so far."""
    found: list[int] = []

    def ask(pair: Pair) -> object:
        pair.guard.sendall(bytes(500))
        pair.client.setblocking(True)
        pair.client.recv(1, socket.MSG_PEEK)
        found.append(unread_in(pair))
        return None

    with SenderProbe([], way=Way.MAP, blocking=True) as probe:
        assert compare(probe, (Behaviour("what it is", ask),)) == Comparison()
        watched, other = found[:2]
        assert other == 500
        fionread = () if watched == other else ("FIONREAD",)
        assert compare(probe) == Comparison((*fionread, "a recv that a signal interrupts"))
    with SenderProbe([], way=Way.MAP) as probe:
        assert compare(probe) == Comparison(fionread)


def _descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_it_takes_little_of_the_processor_and_leaves_nothing_behind(probe: SenderProbe) -> None:
    threads, descriptors = threading.active_count(), _descriptors()
    before = time.process_time()
    comparison = compare(probe)
    took = time.process_time() - before
    assert comparison.problem is None
    assert took < 0.1
    assert probe.read() == []
    assert (threading.active_count(), _descriptors()) == (threads, descriptors)
    # Whoever gets the port next is nobody's business.
    assert probe._known == set()
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as client,
    ):
        client.send(b"x")
        assert probe.read() == []


def test_a_machine_that_is_late_once_makes_no_difference(probe: SenderProbe) -> None:
    asked: list[int] = []

    def ask(_: Pair) -> object:
        asked.append(1)
        return len(asked) if len(asked) < 3 else 0

    assert compare(probe, (Behaviour("late", ask),)) == Comparison()
    assert len(asked) == 4


def test_an_error_is_an_answer(probe: SenderProbe) -> None:
    def fail(_: Pair) -> object:
        raise OSError(errno.EIO, "as it was made")

    def differ(pair: Pair) -> object:
        ports.append(pair.guard.getsockname()[1])
        if ports[-1] == ports[0]:
            raise OSError(errno.EIO, "when it is watched")
        return None

    ports: list[int] = []
    assert compare(probe, (Behaviour("failing", fail), Behaviour("differing", differ))) == Comparison(("differing",))


# What is decided


class TestStart:
    @staticmethod
    def _comparing(monkeypatch: pytest.MonkeyPatch, answers: dict[Way, Comparison]) -> list[SenderProbe]:
        probes: list[SenderProbe] = []

        def compare(probe: SenderProbe) -> Comparison:
            probes.append(probe)
            return answers.get(probe.way, Comparison(("FIONREAD",)))

        monkeypatch.setattr(transparency, "compare", compare)
        return probes

    def test_a_probe_that_changes_nothing_is_taken(self) -> None:
        """On this very kernel, if it has one."""
        if not CALLED_BACK:
            pytest.skip("this kernel's TCP calls nobody back")
        probe, comparison = start([], insist=False)
        with probe:
            assert probe.way is Way.CALLBACK
            assert comparison == Comparison()
            assert probe.watches_blocking
            assert not [limit for limit in probe.limits if "block" in limit]

    def test_the_map_is_taken_where_the_callback_changes_something(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._comparing(monkeypatch, {Way.MAP: Comparison()})
        probe, comparison = start([], insist=False)
        with probe:
            assert probe.way is Way.MAP
            assert comparison == Comparison()
            assert not probe.watches_blocking
            assert [limit for limit in probe.limits if limit.startswith("TCP senders whose sockets block")]

    def test_nobody_is_watched_where_watching_shows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        probes = self._comparing(monkeypatch, dict.fromkeys(Way, Comparison(("FIONREAD", "splice"))))
        with pytest.raises(ProbeUnavailable) as refused:
            start([], insist=False)
        assert str(refused.value) == (
            "on this kernel a watched socket behaves differently from others (FIONREAD, splice); "
            "run Linux 6.15 or later, where watching changes nothing, or accept it with --attribution ebpf"
        )
        for probe in probes:
            with pytest.raises(ValueError, match=r"released|closed"):
                probe.read()

    def test_nobody_is_watched_where_it_can_not_be_tried(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(transparency, "_SECONDS", 0.05)
        monkeypatch.setattr(Ring, "read", lambda _: [])
        with pytest.raises(
            ProbeUnavailable, match=r"pgguard could not test whether .* \(.*a connection is not watched"
        ):
            start([], insist=False)

    def test_a_kernel_that_refuses_the_program_for_callbacks_is_asked_for_the_map(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        load = bpf.load_program

        def refuse(kind: bpf.ProgramType, code: bytes, attach: bpf.AttachType, name: str) -> int:
            if made[-1] is None and kind is bpf.ProgramType.SOCK_OPS:
                raise bpf.BpfError(errno.EINVAL, "loading the program")
            return load(kind, code, attach, name)

        make = SenderProbe.__init__
        made: list[Way | None] = []

        def init(probe: SenderProbe, addresses: Any, *, blocking: bool = False, way: Way | None = None) -> None:
            made.append(way)
            make(probe, addresses, blocking=blocking, way=way)

        self._comparing(monkeypatch, {Way.MAP: Comparison()})
        monkeypatch.setattr(bpf, "load_program", refuse)
        monkeypatch.setattr(SenderProbe, "__init__", init)
        probe, comparison = start([], insist=False)
        with probe:
            assert (probe.way, comparison) == (Way.MAP, Comparison())
        assert made == [None, Way.MAP]

    def test_who_insists_gets_what_shows_least(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._comparing(monkeypatch, {Way.CALLBACK: Comparison(problem="no"), Way.MAP: Comparison(("splice",))})
        probe, comparison = start([], insist=True)
        with probe:
            assert (probe.way, comparison) == (Way.MAP, Comparison(("splice",)))

    def test_who_insists_gets_it_and_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        told = Comparison(("FIONREAD",))
        self._comparing(monkeypatch, dict.fromkeys(Way, told))
        probe, comparison = start([("127.0.0.1", 1)], insist=True)
        with probe:
            assert comparison is told
            assert probe.watches_blocking
            assert len(probe._known) == 1


def test_nothing_is_said_of_this_processs_signals() -> None:
    """The signal that interrupts is restored, and no thread has it blocked."""
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    with SenderProbe([], way=Way.MAP, blocking=True) as probe:
        compare(probe, tuple(one for one in BEHAVIOURS if "signal" in one.name))
    assert signal.getsignal(signal.SIGRTMAX - 1) is signal.SIG_DFL
    assert libc.signal(signal.SIGRTMAX - 1, ctypes.c_void_p(0)) is None


def test_it_is_the_same_in_a_process_that_has_blocked_its_signals(probe: SenderProbe) -> None:
    """As one does that passes them on to a command."""
    interrupted = tuple(one for one in BEHAVIOURS if "signal" in one.name)
    expected = compare(probe, interrupted)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        began = time.monotonic()
        assert compare(probe, interrupted) == expected
        assert time.monotonic() - began < 1, "no signal is waited for in vain"
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
