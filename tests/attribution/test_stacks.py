from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pgguard.attribution import hangs
from pgguard.attribution.processes import read_process
from pgguard.attribution.stacks import MOVED_ON, StackReader, Wanted, find_py_spy, lack_of_py_spy, python_stacks
from pgguard.attribution.threads import Obstacle, Sleep, Thread, find_sleep
from tests.attribution.puppets import Puppet
from tests.hung_files import hung_files
from tests.proxy.conftest import short_directory
from tests.servers import needs

__all__ = ["short_directory"]

Puppets = Callable[[], Puppet]

needs_py_spy = needs("py-spy", found=find_py_spy())

_PRELUDE = """
import threading
ours, theirs = socket.socketpair()
def fetch(): ours.recv(1)
def handle(): fetch()
def spin():
    while True: pass
def start(target):
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread.native_id
"""


@pytest.fixture
def application(puppet: Puppets) -> Puppet:
    application = puppet()
    application.do(_PRELUDE)
    return application


def _until_asleep(pid: int, tid: int, call: str = "") -> Sleep:
    """Wait for a thread to sleep in a system call that begins with ``call``."""
    process = read_process(pid)
    assert process is not None
    deadline = time.monotonic() + 30
    while True:
        line = Path(f"/proc/{pid}/task/{tid}/wchan").read_text()
        sleep = find_sleep(pid, process.started, tid)
        if call in line and sleep is not None and sleep == find_sleep(pid, process.started, tid):
            return sleep
        assert time.monotonic() < deadline
        time.sleep(0.001)


def _functions(sleep: Sleep) -> list[str]:
    stacks = python_stacks([sleep], seconds=10)
    assert stacks.problems == {}
    return [frame.function for frame in stacks.frames[sleep]]


@needs_py_spy
def test_a_sleeping_thread_is_seen_with_functions_and_lines_the_innermost_first(application: Puppet) -> None:
    tid = application.do("start(handle)")
    sleep = _until_asleep(application.pid, tid, "unix_stream")
    stacks = python_stacks([sleep], seconds=10)
    assert stacks.problems == {}
    inner, outer = stacks.frames[sleep][:2]
    assert inner[:2] == ("fetch", "<string>")
    assert outer[:2] == ("handle", "<string>")
    assert outer.line == inner.line + 1


@needs_py_spy
def test_both_processes_on_one_socket_are_seen_in_one_go(application: Puppet) -> None:
    """The thread that a fork leaves in the child has a tid of its own there."""
    child = application.do("fork(lambda: start(fetch))")
    tid = application.do("start(handle)")
    tids = [int(task.name) for task in Path(f"/proc/{child}/task").iterdir()]
    sleeps = [
        _until_asleep(application.pid, tid, "unix_stream"),
        _until_asleep(child, max(tids), "unix_stream"),
        _until_asleep(child, child, "pipe_read"),
    ]
    stacks = python_stacks(sleeps, seconds=10)
    assert stacks.problems == {}
    assert [stacks.frames[sleep][0].function for sleep in sleeps] == ["fetch", "fetch", "fork"]


@needs_py_spy
def test_a_stack_is_given_only_for_the_sleep_that_was_asked_about(application: Puppet) -> None:
    """A thread that has gone on meanwhile is doing something else, and what it did can't be known any more."""
    sleep = _until_asleep(application.pid, application.pid, "pipe_read")
    assert "<module>" in _functions(sleep)
    application.do("None")
    _until_asleep(application.pid, application.pid, "pipe_read")
    assert python_stacks([sleep], seconds=10).frames == {}


@needs_py_spy
def test_a_process_with_the_pid_of_the_one_that_was_asked_about_is_not_taken_for_it(application: Puppet) -> None:
    sleep = _until_asleep(application.pid, application.pid, "pipe_read")
    thread = sleep.thread._replace(started=sleep.thread.started - 1)
    assert python_stacks([sleep._replace(thread=thread)], seconds=10).frames == {}


@needs_py_spy
def test_the_process_does_not_notice(application: Puppet) -> None:
    """A stop by a tracer would end the sleep, and this one's count with it."""
    tid = application.do("start(handle)")
    sleep = _until_asleep(application.pid, tid, "unix_stream")
    for _ in range(3):
        assert _functions(sleep)[0] == "fetch"
    assert _until_asleep(application.pid, tid) == sleep


@needs_py_spy
def test_a_sleeping_thread_is_seen_among_others_that_run(application: Puppet) -> None:
    tid = application.do("start(handle)")
    sleep = _until_asleep(application.pid, tid, "unix_stream")
    application.do("start(spin)")
    assert _functions(sleep)[0] == "fetch"


def test_a_thread_that_runs_is_in_no_sleep(application: Puppet) -> None:
    tid = application.do("start(spin)")
    process = read_process(application.pid)
    assert process is not None
    # A thread that wants the interpreter's lock sleeps now and then; this one has it for most of the time.
    assert any(find_sleep(application.pid, process.started, tid) is None for _ in range(1000))


@needs_py_spy
def test_what_is_neither_python_nor_ruby_is_said_to_be_none() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        sleep = _until_asleep(process.pid, process.pid, "pipe_read")
        stacks = python_stacks([sleep])
        process.communicate()
    assert (stacks.frames, stacks.problems) == ({}, {process.pid: "it is neither Python nor Ruby"})


@needs_py_spy
def test_a_process_that_may_not_be_looked_at_is_said_to_be_so(application: Puppet, puppet: Puppets) -> None:
    application.do("set_dumpable(0)")
    guard = puppet()
    # The interpreter may be where only root can import from, so whatever is needed is imported before.
    guard.do(
        "from pgguard.attribution.stacks import python_stacks\n"
        "from pgguard.attribution import threads\n"
        f"sleep = threads.Sleep(threads.Thread({application.pid}, 1, {application.pid}, 1), 1)\n"
        "stacks = python_stacks([sleep])\n"
        "become_nobody()\n"
        "import shutil; shutil.which = lambda name, path=None: '/bin/true'\n"
        "stacks = python_stacks([sleep])"
    )
    assert guard.do("[len(stacks.frames), stacks.problems]") == [
        0,
        {str(application.pid): str(Obstacle.NOT_PERMITTED)},
    ]


@needs_py_spy
def test_a_process_that_is_gone_is_said_to_be_so(application: Puppet) -> None:
    sleep = _until_asleep(application.pid, application.pid, "pipe_read")
    application.end()
    stacks = python_stacks([sleep])
    assert (stacks.frames, stacks.problems) == ({}, {application.pid: "it has ended"})


def test_without_py_spy_that_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgguard.attribution.stacks.find_py_spy", lambda: None)
    nobody = Sleep(Thread(os.getpid(), 0, 0, 0), 0)
    assert python_stacks([nobody]).problems == {os.getpid(): "py-spy is not installed"}


def test_py_spy_beside_the_guards_own_python_comes_before_the_one_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that the optional extra has installed is of a version that fits."""
    beside, elsewhere = tmp_path / "venv" / "py-spy", tmp_path / "path" / "py-spy"
    for program in beside, elsewhere:
        program.parent.mkdir()
        program.touch(0o755)
    monkeypatch.setattr("sys.executable", str(beside.with_name("python")))
    monkeypatch.setenv("PATH", str(elsewhere.parent))
    assert find_py_spy() == str(beside)
    beside.unlink()
    assert find_py_spy() == str(elsewhere)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        pytest.param("while :; do :; done", "py-spy didn't answer in time", id="hangs"),
        pytest.param("echo surprise", "py-spy's answer can't be read", id="another format"),
        pytest.param(
            r"printf 'Error: It failed.\n\nCaused by:\n  0: why\n  1: root\n\nStack backtrace:\n  0: x\n' >&2; exit 1",
            "py-spy: It failed: root",
            id="fails",
        ),
        pytest.param("exit 3", "py-spy: failed", id="fails without a word"),
    ],
)
def test_a_py_spy_that_does_not_do_its_work_is_ended_and_the_reason_given(
    script: str, reason: str, application: Puppet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "py-spy"
    program.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr("pgguard.attribution.stacks.find_py_spy", lambda: str(program))
    sleep = _until_asleep(application.pid, application.pid, "pipe_read")
    before = time.monotonic()
    stacks = python_stacks([sleep], seconds=1)
    assert time.monotonic() - before < 5
    assert (stacks.frames, stacks.problems) == ({}, {application.pid: reason})
    assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists()


def test_a_py_spy_that_can_not_be_started_is_the_reason(
    application: Puppet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgguard.attribution.stacks.find_py_spy", lambda: str(tmp_path / "gone"))
    sleep = _until_asleep(application.pid, application.pid, "pipe_read")
    assert python_stacks([sleep]).problems == {application.pid: "py-spy can't be run: No such file or directory"}


class TestReader:
    """Of a thread that has run since it was seen, what counts is where it waits for the connection again."""

    @pytest.fixture
    def client(self, application: Puppet) -> Puppet:
        """Has one end of a connection."""
        application.do(
            "import os, select, time\n"
            "another, anothers_peer = socket.socketpair()\n"
            "def first(): ours.recv(1)\n"
            "def second(): ours.recv(1)\n"
            "def elsewhere(): another.recv(1)\n"
            "def both(): first(); second()\n"
            "def leave(): first(); elsewhere()\n"
            "length = 0.003\n"
            "def nap(): select.select([ours], [], [], length)\n"
            "def doze():\n"
            "    while True: nap()\n"
        )
        return application

    @staticmethod
    def inode(client: Puppet) -> int:
        return int(client.do("os.fstat(ours.fileno()).st_ino"))

    @staticmethod
    def wanted(client: Puppet, tid: int, sleep: Sleep | None) -> list[Wanted]:
        process = read_process(client.pid)
        assert process is not None
        return [Wanted(process, {tid: sleep})]

    @needs_py_spy
    def test_it_is_seen_where_it_waits_for_the_connection_again(self, client: Puppet) -> None:
        tid = client.do("start(both)")
        sleep = _until_asleep(client.pid, tid, "unix_stream")
        client.do("theirs.send(b'x')")
        until = time.monotonic() + 20
        with StackReader(self.inode(client)) as reader:
            for _ in reader.read(self.wanted(client, tid, sleep), until=until, returning=until):
                pass
        found = reader.found
        again = found.again[client.pid, tid]
        assert (again.readable, again.call, found.problems) == (True, "recvfrom", {})
        assert [frame.function for frame in found.frames[again.sleep][:2]] == ["second", "both"]
        assert sleep not in found.frames

    @needs_py_spy
    @pytest.mark.parametrize("began_before", [True, False])
    def test_it_is_seen_though_it_ran_while_py_spy_was_starting(self, began_before: bool, client: Puppet) -> None:
        tid = client.do("start(both)")
        sleep = _until_asleep(client.pid, tid, "unix_stream")
        wanted = self.wanted(client, tid, sleep if began_before else None)
        until = time.monotonic() + 20
        with StackReader(self.inode(client)) as reader:
            if began_before:
                reader.begin(wanted[0].process)
                client.do("theirs.send(b'x')")
            for _ in reader.read(wanted, until=until, returning=until):
                pass
        again = reader.found.again[client.pid, tid]
        expected = "second" if began_before else "first"
        assert reader.found.frames[again.sleep][0].function == expected

    @needs_py_spy
    def test_it_is_not_seen_where_it_waits_for_something_else(self, client: Puppet) -> None:
        tid = client.do("start(leave)")
        sleep = _until_asleep(client.pid, tid, "unix_stream")
        client.do("theirs.send(b'x')")
        now = time.monotonic()
        with StackReader(self.inode(client)) as reader:
            for _ in reader.read(self.wanted(client, tid, sleep), until=now + 20, returning=now + 0.1):
                pass
        assert (reader.found.frames, reader.found.again) == ({}, {})
        assert reader.found.problems == {client.pid: "it had moved on before it could be read"}

    @needs_py_spy
    def test_one_that_wakes_now_and_then_is_seen_if_it_is_read_twice_in_the_same_place(self, client: Puppet) -> None:
        """Psycopg 3 looks for signals ten times a second, and reading takes longer on a busy machine."""
        client.do("length = 0.02")  # on such a machine too it is asleep most of the time
        tid = client.do("start(doze)")
        until = time.monotonic() + 20
        with StackReader(self.inode(client)) as reader:
            for _ in reader.read(self.wanted(client, tid, None), until=until, returning=until):
                pass
        again = reader.found.again[client.pid, tid]
        assert [frame.function for frame in reader.found.frames[again.sleep][:2]] == ["nap", "doze"]

    def test_one_that_wakes_now_and_then_is_not_seen_if_it_is_elsewhere_each_time(
        self, client: Puppet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        program, count = tmp_path / "py-spy", tmp_path / "count"
        tid = client.do("start(doze)")
        frame = '{"name": "f", "filename": "/a.py", "line": '
        program.write_text(
            f"#!/bin/sh\necho x >>{count}\nset -- $(/usr/bin/wc -l {count})\n/bin/sleep 0.03\n"
            f"echo '[{{\"os_thread_id\": {tid}, \"frames\": [{frame}'$1'}}]}}]'\n"
        )
        program.chmod(0o755)
        monkeypatch.setattr("pgguard.attribution.stacks.find_py_spy", lambda: str(program))
        until = time.monotonic() + 20
        with StackReader(self.inode(client)) as reader:
            for _ in reader.read(self.wanted(client, tid, None), until=until, returning=until):
                pass
        assert len(count.read_text().splitlines()) > 1
        assert (reader.found.frames, reader.found.again) == ({}, {})
        assert reader.found.problems == {client.pid: "it had moved on before it could be read"}

    @needs_py_spy
    def test_what_there_was_no_time_for_is_read_later_if_it_is_in_the_same_sleep(
        self, client: Puppet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        program, begin = tmp_path / "py-spy", tmp_path / "begin"
        program.write_text(f'#!/bin/sh\nwhile ! [ -e {begin} ]; do :; done\nexec {find_py_spy()} "$@"\n')
        program.chmod(0o755)
        monkeypatch.setattr("pgguard.attribution.stacks.find_py_spy", lambda: str(program))
        tid = client.do("start(both)")
        sleep = _until_asleep(client.pid, tid, "unix_stream")
        with StackReader(self.inode(client)) as reader:
            [*_, found] = reader.read(self.wanted(client, tid, sleep), until=time.monotonic(), returning=0.0)
            assert (found.frames, found.problems) == ({}, {client.pid: "py-spy didn't answer in time"})
            assert list(reader.read_on(until=time.monotonic() + 20, is_wanted=lambda: False)) == []
            begin.touch()
            [*_, found] = reader.read_on(until=time.monotonic() + 20, is_wanted=lambda: True)
        assert not reader.has_any_left
        assert [frame.function for frame in found.frames[sleep][:2]] == ["first", "both"]
        assert found.problems == {}

    def test_nothing_is_waited_for_when_it_has_moved_on(
        self, client: Puppet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        program = tmp_path / "py-spy"
        program.write_text("#!/bin/sh\nwhile :; do :; done\n")
        program.chmod(0o755)
        monkeypatch.setattr("pgguard.attribution.stacks.find_py_spy", lambda: str(program))
        tid = client.do("start(leave)")
        sleep = _until_asleep(client.pid, tid, "unix_stream")
        with StackReader(self.inode(client)) as reader:
            for _ in reader.read(self.wanted(client, tid, sleep), until=time.monotonic(), returning=0.0):
                pass
            client.do("theirs.send(b'x')")
            began = time.monotonic()
            [*_, found] = reader.read_on(until=began + 20, is_wanted=lambda: True)
        assert time.monotonic() - began < 10
        assert (found.frames, found.problems) == ({}, {client.pid: MOVED_ON})

    @needs_py_spy
    def test_what_it_takes_is_accounted_for(self, client: Puppet) -> None:
        tid = client.do("start(both)")
        sleep = _until_asleep(client.pid, tid, "unix_stream")
        until, taken = time.monotonic() + 20, list[float]()
        with StackReader(self.inode(client), taken.append) as reader:
            for _ in reader.read(self.wanted(client, tid, sleep), until=until, returning=until):
                pass
        assert sum(taken) > 0.001

    @needs_py_spy
    def test_whoever_gives_up_leaves_nothing_behind(self, client: Puppet) -> None:
        tid = client.do("start(both)")
        sleep = _until_asleep(client.pid, tid, "unix_stream")
        with StackReader(self.inode(client)) as reader:
            [wanted] = self.wanted(client, tid, sleep)
            reader.begin(wanted.process, [tid])
        children = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()
        assert all("py-spy" not in Path(f"/proc/{child}/cmdline").read_text() for child in children)


class TestWhichProgram:
    """It gets the guard's rights, so nobody else may say which it is."""

    @pytest.fixture
    def program(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A py-spy on PATH, with none beside the interpreter."""
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
        directory = tmp_path / "bin"
        directory.mkdir(mode=0o755)
        program = directory / "py-spy"
        program.touch(0o755)
        monkeypatch.setenv("PATH", f"{directory}:/nowhere")
        return program

    def test_one_on_path_that_nobody_else_can_replace(self, program: Path) -> None:
        assert find_py_spy() == str(program)

    def test_not_one_in_a_directory_that_others_may_write(self, program: Path) -> None:
        program.parent.chmod(0o777)
        assert find_py_spy() is None
        reason = f"its directory {program.parent} isn't safe: anybody can write to it"
        assert lack_of_py_spy().problem == f"py-spy at {program} is not used: {reason}"

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
    def test_not_somebody_elses(self, program: Path) -> None:
        os.chown(program, 65534, 65534)
        assert find_py_spy() is None
        assert lack_of_py_spy().problem == f"py-spy at {program} is not used: it belongs to user nobody"
        sleep = Sleep(Thread(os.getpid(), 1, os.getpid(), 1), 1)
        assert python_stacks([sleep]).problems == {os.getpid(): lack_of_py_spy().problem}

    @pytest.mark.parametrize("path", ["", ".", "bin", ":/nowhere"])
    def test_not_one_in_the_working_directory(self, program: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(program.parent if path != "bin" else program.parent.parent)
        monkeypatch.setenv("PATH", path)
        assert find_py_spy() is None
        assert lack_of_py_spy().problem == "py-spy is not installed"

    def test_an_answer_without_end_is_cut_short(self, application: Puppet, program: Path) -> None:
        program.write_text("#!/bin/sh\nexec /usr/bin/tr '\\0' ' ' </dev/zero\n")
        sleep = _until_asleep(application.pid, application.pid, "pipe_read")
        assert python_stacks([sleep], seconds=10).problems == {application.pid: "its stacks are too large"}

    def test_one_that_can_not_be_ended_is_left(self, application: Puppet, program: Path, short_directory: Path) -> None:
        """It opens the interpreter's file, wherever that is; the process isn't looked at again while it hangs."""
        sleep = _until_asleep(application.pid, application.pid, "pipe_read")
        with hung_files(short_directory) as files:
            program.write_text(f"#!/bin/sh\nexec /bin/cat {files.directory}/python\n")
            began = time.monotonic()
            assert python_stacks([sleep], seconds=0.2).problems == {application.pid: "py-spy didn't answer in time"}
            assert list(hangs.hanging().values()) == [application.pid]
            again = python_stacks([sleep], seconds=10).problems
            assert again == {application.pid: "reading the files of its user's processes in /proc hangs"}
            assert time.monotonic() - began < 5
        deadline = time.monotonic() + 30
        while hangs.hanging():
            assert time.monotonic() < deadline
            time.sleep(0.01)
