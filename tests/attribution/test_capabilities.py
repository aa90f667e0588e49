from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pgguard.attribution import capabilities, namespaces
from pgguard.attribution.capabilities import Capability, check
from pgguard.attribution.ebpf.probe import ProbeUnavailable
from pgguard.attribution.ebpf.ring import Event
from pgguard.attribution.processes import read_process
from pgguard.attribution.sockets import SockDiag
from pgguard.attribution.stacks import Stacks, find_py_spy
from pgguard.attribution.threads import Obstacle, Waits
from pgguard.attribution.transparency import Comparison, start
from tests.attribution.puppets import Puppet
from tests.servers import not_installed

Puppets = Callable[[], Puppet]


def _named(name: str) -> Capability:
    (found,) = (capability for capability in check() if capability.name == name)
    return found


def _children() -> set[int]:
    return {
        int(child) for task in Path("/proc/self/task").iterdir() for child in (task / "children").read_text().split()
    }


def test_what_the_other_tests_rest_on_is_available_here() -> None:
    assert [capability.name for capability in check() if capability.essential and not capability.available] == []


def test_the_essential_ones_are_those_that_attribution_proc_insists_on() -> None:
    essential = [capability.name for capability in check() if capability.essential]
    assert essential == ["/proc", "sock_diag for TCP", "sock_diag for Unix sockets"]


def test_whatever_is_missing_comes_with_what_to_do() -> None:
    for capability in check():
        assert capability.available == (capability.problem is None) == (capability.remedy is None)
        if capability.available:
            assert capability.explanation == capability.purpose
        else:
            assert capability.explanation == f"{capability.problem}; {capability.remedy}"


def test_processes_that_can_not_be_looked_at_are_reported_with_what_to_do(puppet: Puppets) -> None:
    secretive, guard = puppet(), puppet()
    secretive.do("set_dumpable(0)")
    # The interpreter may be where only root can import from, so whatever a check needs is imported before.
    guard.do("from pgguard.attribution.capabilities import check; check(); become_nobody()")
    found = guard.do("{c.name: [c.available, c.explanation] for c in check()}")
    available, explanation = found["other users' processes"]
    assert available is False
    assert "run the guard as root" in explanation


def test_no_secret_is_in_the_names_of_processes_that_can_not_be_looked_at(puppet: Puppets) -> None:
    """A process gives itself any name."""
    secretive, guard = puppet(), puppet()
    secretive.do("open('/proc/self/comm', 'w').write('pw=hunter2')")
    secretive.do("set_dumpable(0)")
    guard.do("from pgguard.attribution import capabilities; capabilities.check(); become_nobody()")
    guard.do("capabilities._NAMED = 1 << 20")
    problem = guard.do("{c.name: c.problem for c in capabilities.check()}")
    assert f"{secretive.pid} (pw=***)" in problem["other users' processes"]


def test_a_kernel_that_does_not_count_what_lies_unread_is_reported_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert _named("receive queues").available
    monkeypatch.setattr(SockDiag, "unread", lambda *_: 0)
    queues = _named("receive queues")
    assert queues.problem == "a test on pgguard's own processes failed"
    assert not queues.essential
    assert queues.remedy is not None
    assert "tcp_diag and unix_diag" in queues.remedy


def test_a_sandbox_without_netlink_is_reported_with_what_to_do(puppet: Puppets) -> None:
    """RestrictAddressFamilies= and the like make socket(2) fail."""
    guard = puppet()
    guard.do(
        "import errno\n"
        "from pgguard.attribution import sockets, capabilities\n"
        "class Sandboxed(socket.socket):\n"
        "    def __init__(self, family=-1, *args, **kwargs):\n"
        "        if family == socket.AF_NETLINK: raise OSError(errno.EAFNOSUPPORT, 'no such family')\n"
        "        super().__init__(family, *args, **kwargs)\n"
        "socket.socket = Sandboxed"
    )
    checked = guard.do("{c.name: [c.available, c.explanation] for c in capabilities.check()}")
    assert checked["/proc"][0] is True
    for name in "sock_diag for TCP", "sock_diag for Unix sockets", "receive queues":
        available, explanation = checked[name]
        assert not available
        assert explanation.startswith("no such family; allow AF_NETLINK")


def test_the_check_leaves_nothing_open_and_nobody_behind() -> None:
    before = len(list(Path("/proc/self/fd").iterdir())), _children()
    check()
    assert (len(list(Path("/proc/self/fd").iterdir())), _children()) == before


def test_where_no_process_can_be_started_that_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    for name in "kernel senders on Unix sockets", "waiting threads":
        explanation = _named(name).explanation
        assert explanation.startswith(
            "this could not be tested, because /nowhere/python can't be started: No such file or directory; "
        )


def test_a_child_that_ends_at_once_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert "it ended at once" in _named("waiting threads").explanation


def test_a_child_that_says_nothing_holds_nobody_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nexec sleep 600\n")
    silent.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(silent))
    monkeypatch.setattr(capabilities, "_SECONDS", 0.2)
    before = time.monotonic(), _children()
    assert "timed out" in _named("waiting threads").explanation
    assert time.monotonic() - before[0] < 10
    assert _children() == before[1]


def test_a_kernel_that_names_no_senders_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capabilities, "ask_for_credentials", lambda _: None)
    senders = _named(capabilities.KERNEL_SENDERS)
    assert senders.problem == "a test on pgguard's own processes failed"


class TestKernelSendersOnTcp:
    NAME = "kernel senders on TCP"

    def test_they_are_tried_on_ourselves_or_the_probes_own_reason_is_given(self) -> None:
        found = _named(self.NAME)
        expected: tuple[str | None, str | None] = None, None
        purpose = "names the process and the thread that sent each byte"
        try:
            probe, _ = start([], insist=False)
        except ProbeUnavailable as unavailable:
            expected = unavailable.problem, unavailable.remedy
        else:
            probe.close()
            purpose += (
                ""
                if probe.watches_blocking
                else " on sockets that don't block (on all of them with --attribution ebpf)"
            )
        assert (found.problem, found.remedy) == expected
        assert found.purpose == purpose

    def test_where_the_kernel_knows_less_it_is_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of sockets that block, and of who connects."""
        monkeypatch.setattr(capabilities, "start_probe", _start_blind)
        monkeypatch.setattr(capabilities, "_expect", lambda _: None)
        assert _named(self.NAME).purpose == (
            "names the process and the thread that sent each byte on sockets that don't block "
            "(on all of them with --attribution ebpf); Linux 6.10 or later would also name who opened the connection"
        )

    def test_they_are_not_essential_and_unix_sockets_do_instead(self) -> None:
        found = _named(self.NAME)
        assert not found.essential
        assert found.unix_instead

    def test_who_goes_on_to_use_the_probe_needs_no_check_of_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("it was tried")

        monkeypatch.setattr(capabilities, "start_probe", refuse)
        assert self.NAME not in [capability.name for capability in check(probe=False)]

    def test_a_probe_that_can_not_be_had_is_reported_with_what_to_do(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise ProbeUnavailable("the guard lacks CAP_BPF", "run the guard as root")

        monkeypatch.setattr(capabilities, "start_probe", refuse)
        assert _named(self.NAME).explanation == "the guard lacks CAP_BPF; run the guard as root"

    def test_a_probe_that_names_nobody_is_reported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(capabilities, "start_probe", _start_blind)
        found = _named(self.NAME)
        assert found.problem == "a test on pgguard's own processes failed"
        assert found.remedy is not None

    def test_a_probe_that_sees_only_a_part_of_the_host_is_reported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(capabilities, "start_probe", _start_blind)
        monkeypatch.setattr(capabilities, "_expect", lambda _: None)
        monkeypatch.setattr(_Blind, "scope", "/sys/fs/cgroup/inner")
        found = _named(self.NAME)
        assert found.problem == "it sees only the processes in the cgroup /sys/fs/cgroup/inner"
        assert (found.remedy or "").startswith("give the container the host's cgroup tree")


class _Blind:
    """A probe that reports nothing."""

    scope: str | None = None
    watches_blocking = False
    openers = False

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def add(self, *_: object) -> None:
        pass

    def read(self) -> list[Event]:
        return []

    def reached(self, _ticket: int) -> int:
        return 0

    def glance(self, _ticket: int) -> int:
        return 0


def _start_blind(_: object, *, insist: bool) -> tuple[_Blind, Comparison]:
    assert not insist
    return _Blind(), Comparison()


class TestPtraceRights:
    """What they are refused by isn't on this machine, maybe; so the refusals are made up."""

    @pytest.mark.parametrize(
        ("scope", "privileged", "remedy"),
        [
            (0, False, "run the guard as root with CAP_SYS_PTRACE (cap_add: [SYS_PTRACE] in compose)"),
            (0, True, "allow ptrace(2) in the guard's sandbox: seccomp, AppArmor, SELinux"),
            (1, False, "run sysctl kernel.yama.ptrace_scope=0 (it is 1), or run the guard as root with CAP_SYS_PTRACE"),
            (3, True, "reboot with kernel.yama.ptrace_scope below 3"),
        ],
    )
    def test_the_remedy_depends_on_who_refuses(
        self, scope: int, privileged: bool, remedy: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(capabilities, "_ptrace_scope", lambda: scope)
        monkeypatch.setattr(capabilities, "_has_capability", lambda _: privileged)
        monkeypatch.setattr(
            capabilities,
            "waiting_threads",
            lambda processes, *_: Waits((), {process.pid: Obstacle.NOT_PERMITTED for process in processes}),
        )
        found = _named("waiting threads")
        assert found.problem == Obstacle.NOT_PERMITTED
        assert (found.remedy or "").startswith(remedy)

    def test_who_sees_only_descendants_is_told_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Yama's ptrace_scope 1: the child of the guard that isn't the client's ancestor sees nothing of it."""
        monkeypatch.setattr(capabilities, "_STRANGER", "raise PermissionError")
        found = _named("waiting threads")
        assert found.problem == "only the threads of the guard's own children can be seen"

    def test_what_no_right_would_help_against_is_told_from_a_refusal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            capabilities,
            "waiting_threads",
            lambda processes, *_: Waits((), {process.pid: Obstacle.UNKNOWN_ABI for process in processes}),
        )
        assert _named("waiting threads").remedy == "run the guard on plain Linux for x86-64 or arm64"

    def test_a_thread_that_is_not_seen_is_not_waited_for_for_ever(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(capabilities, "waiting_threads", lambda *_: Waits())
        monkeypatch.setattr(capabilities, "find_py_spy", lambda: "py-spy")
        before = time.monotonic()
        checked = {capability.name: capability for capability in check()}
        assert time.monotonic() - before < 6
        for name in "waiting threads", "Python stacks":
            assert checked[name].problem == "a test on pgguard's own processes failed"

    def test_the_kernels_own_words_are_read(self, puppet: Puppets) -> None:
        guard = puppet()
        guard.do("from pgguard.attribution.capabilities import _has_capability; become_nobody()")
        if os.getuid() == 0:
            assert guard.do("_has_capability(19)") is False
        scope = Path("/proc/sys/kernel/yama/ptrace_scope")
        assert capabilities._ptrace_scope() == (int(scope.read_text()) if scope.exists() else 0)


class TestPythonStacks:
    def test_py_spy_is_tried(self) -> None:
        if find_py_spy() is None:
            not_installed("py-spy")
        assert _named("Python stacks").available

    def test_without_py_spy_it_is_said_how_to_get_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(capabilities, "find_py_spy", lambda: None)
        assert _named("Python stacks").explanation == "py-spy is not installed; pip install 'pgguard[stacks]'"

    @pytest.mark.parametrize(
        ("problem", "remedy"),
        [
            ("py-spy: Failed to open: Operation not permitted (os error 1)", None),
            ("py-spy's answer can't be read", "pip install --upgrade 'pgguard[stacks]'"),
        ],
    )
    def test_a_py_spy_that_is_refused_is_told_from_one_that_is_too_old(
        self, problem: str, remedy: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(capabilities, "find_py_spy", lambda: "py-spy")
        monkeypatch.setattr(
            capabilities, "python_stacks", lambda sleeps, _: Stacks({}, {sleep.thread.pid: problem for sleep in sleeps})
        )
        found = _named("Python stacks")
        assert found.problem == problem
        assert found.remedy == (remedy or capabilities._ptrace_remedy())


class TestNamespaces:
    def test_without_the_right_to_enter_network_namespaces_their_tables_do(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object, **__: object) -> list[int | None]:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(capabilities, "ask_in_namespace", refuse)
        # Other tests leave thousands of sockets in TIME-WAIT for a minute.
        monkeypatch.setattr(namespaces, "TABLE_LIMIT", 1 << 24)
        found = _named("other network namespaces")
        assert found.available
        assert "without CAP_SYS_ADMIN" in found.purpose
        monkeypatch.setattr(capabilities, "read_tables", refuse)
        assert _named("other network namespaces").problem == "Operation not permitted"

    @pytest.mark.parametrize(
        ("beside", "alone"),
        [
            pytest.param("", True, id="nobody"),
            pytest.param("sleep 600 &", False, id="an application"),
            pytest.param("(exec -a /usr/bin/pgguard sleep 600) &", True, id="another guard"),
        ],
    )
    def test_a_guard_in_a_pid_namespace_is_told_whether_it_is_alone_there(self, beside: str, alone: bool) -> None:
        script = (
            "from pgguard.attribution.capabilities import check; "
            "[print(c.available, c.explanation) for c in check() if 'pid' in c.name]"
        )
        # The first process is a shell that starts the guard; it isn't a client, and ends all when it ends.
        shell = f"{beside} sleep 0.1; '{sys.executable}' -c \"{script}\"; exit"
        command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "bash", "-c", shell]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no pid namespace can be made here: {error}")
        if alone:
            assert done.stdout.startswith("False the guard is alone in its pid namespace")
            assert "; share the application's pid namespace (" in done.stdout
        else:
            assert done.stdout == "True sees every process in the guard's pid namespace, and none outside it\n"

    def test_with_the_proc_of_another_pid_namespace_that_is_the_one_thing_to_change(self) -> None:
        script = (
            "from pgguard.attribution.capabilities import check; "
            "[print(c.name, c.explanation, sep=': ') for c in check() if not c.available]"
        )
        command = ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-c", script]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no pid namespace can be made here: {error}")
        remedy = "mount /proc for the pid namespace that the guard runs in"
        # Whoever has the guard's pid there is somebody else, and may be looked at or not.
        first, *others = done.stdout.splitlines()
        assert first.startswith("/proc: ")
        assert first.endswith(f"; {remedy}")
        assert others == [
            f"other users' processes: it needs /proc; {remedy}",
            f"fork events: it needs /proc; {remedy}",
            f"clients' pid namespace: it needs /proc; {remedy}",
            f"other network namespaces: it needs /proc; {remedy}",
            f"waiting threads: it needs /proc; {remedy}",
            f"Python stacks: it needs /proc; {remedy}",
        ]

    def test_the_hosts_own_pid_namespace_is_everything(self) -> None:
        if Path("/proc/self/ns/pid").stat().st_ino != 0xEFFFFFFC:
            pytest.skip("this is a container")
        found = _named("clients' pid namespace")
        assert found.available
        assert found.purpose == "sees every process on this host"


def test_a_guard_is_known_by_its_command_line() -> None:
    own = read_process(os.getpid())
    assert own is not None
    assert not capabilities._is_guard(own)
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()", "pgguard"], stdin=subprocess.PIPE
    ) as other:
        process = read_process(other.pid)
        other.communicate()
    assert process is not None
    assert not capabilities._is_guard(process), "an argument of its own is no name"


def test_a_connection_of_ones_own_is_as_a_clients() -> None:
    with capabilities._unix_connection() as (client, accepted):
        client.sendall(b"x")
        assert capabilities._receive(accepted) == os.getpid()
        client.shutdown(socket.SHUT_WR)
        with pytest.raises(ConnectionError):
            capabilities._receive(accepted)
