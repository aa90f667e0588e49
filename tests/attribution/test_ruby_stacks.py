"""What Ruby processes tell of their threads, who can ask them, and what they notice of it: nothing."""

from __future__ import annotations

import json
import os
import pwd
import select
import signal
import socket
import stat
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pgguard.attribution.dumps import NoDump
from pgguard.attribution.ruby import pipes as pipes_module
from pgguard.attribution.ruby.loading import ANSWERING, FILE
from pgguard.attribution.ruby.pipes import NOT_ASKED, SILENT, RubyPipes
from pgguard.attribution.stacks import StackReader, Wanted
from pgguard.attribution.threads import find_sleep, has_one_thread, only_thread, restless_threads, sleeps_of
from tests.attribution.ruby_programs import answer, environment, process_of, ruby, wait_until
from tests.integration.running import interpreter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pgguard.attribution.threads import Sleep

WAITS = """
def fetch(io)
  io.sysread(1)
end
"""


@pytest.fixture
def pipes() -> Iterator[RubyPipes]:
    made = RubyPipes()
    made.open()
    yield made
    made.close()


def asleep(pid: int, tid: int, call: str) -> Sleep:
    """Wait for a thread to be in a sleep that its ``wchan`` names."""
    found: list[Sleep] = []

    def sleeps() -> bool:
        one = find_sleep(pid, process_of(pid).started, tid)
        if one is not None and call in Path(f"/proc/{pid}/task/{tid}/wchan").read_text():
            found.append(one)
        return len(found) > 1 and found[-1] == found[-2]

    wait_until(sleeps)
    return found[-1]


class TestAnswers:
    def test_each_thread_is_told_with_its_calls_its_name_and_its_id(self, pipes: RubyPipes) -> None:
        script = (
            f"{WAITS}\nreader, = IO.pipe\n"
            "thread = Thread.new { Thread.current.name = 'a rather long name'; fetch(reader) }\n"
            "sleep 0.001 until thread.status == 'sleep'\nputs thread.native_thread_id\ngets"
        )
        with ruby(script, environment(pipes)) as program:
            tid = int(program.read())
            asleep(program.pid, program.pid, "pipe_read")
            told = answer(pipes.ask(process_of(program.pid)))
        assert set(told) == {program.pid, tid}
        assert told[tid].name == "a rather long name"
        assert [(*frame[:3], frame.application) for frame in told[tid].frames] == [
            ("sysread", "-e", 4, False),
            ("fetch", "-e", 4, True),
            ("block in <main>", "-e", 8, True),
        ]
        assert told[program.pid].name is None
        assert [frame.line for frame in told[program.pid].frames] == [11, 11, 11]

    def test_only_the_threads_that_are_asked_for_are(self, pipes: RubyPipes) -> None:
        with ruby("Thread.new { sleep }; puts 1; gets", environment(pipes)) as program:
            program.read()
            assert set(answer(pipes.ask(process_of(program.pid), [program.pid, 1]))) == {program.pid}

    @pytest.mark.parametrize(
        "fork",
        [
            "fork { run }",
            "IO.popen('-') || run",
            "Process.daemon(true, true); run",
            "fork { fork { run } }",
            "trap(:USR1) { fork { run } }; Process.kill(:USR1, $$)",
            "Thread.new { fork { run } }",
        ],
        ids=["fork", "popen", "daemon", "grandchild", "signal", "thread"],
    )
    def test_a_child_answers_by_itself(self, fork: str, pipes: RubyPipes) -> None:
        script = f"def run = (File.write(3, $$.to_s) rescue $stderr.puts($!); sleep 60)\n{fork}\nsleep 60"
        read, write = os.pipe()
        script = script.replace(
            "File.write(3, $$.to_s) rescue $stderr.puts($!)", f"IO.for_fd({write}, 'w').syswrite($$.to_s)"
        )
        os.set_inheritable(write, True)
        command = [interpreter("ruby"), "-e", script]
        with subprocess.Popen(command, env=environment(pipes), close_fds=False, start_new_session=True) as parent:
            try:
                child = int(os.read(read, 20))
                found = answer(pipes.ask(process_of(child)))
            finally:
                os.close(read)
                os.close(write)
                for one in {child, parent.pid}:
                    os.kill(one, signal.SIGKILL)
        assert set(found) == {child}, "in a child the thread that has forked is its main one, with an id of its own"
        assert "run" in {frame.function for frame in found[child].frames}

    def test_what_a_process_executes_answers_in_its_place(self, pipes: RubyPipes) -> None:
        with ruby(
            "exec 'ruby', '-e', 'def other; puts 1; gets; end; $stdout.sync = true; other'", environment(pipes)
        ) as program:
            program.read()
            told = answer(pipes.ask(process_of(program.pid)))
        assert "other" in {frame.function for frame in told[program.pid].frames}

    def test_one_that_has_closed_all_descriptors_answers_again(self, pipes: RubyPipes) -> None:
        closing = "(3..64).each { |n| IO.for_fd(n).close rescue next }"
        with ruby(f"{closing}; puts 1; gets", environment(pipes)) as program:
            program.read()
            wait_until(lambda: pipes.can_ask(process_of(program.pid)))
            assert set(answer(pipes.ask(process_of(program.pid)))) == {program.pid}

    @pytest.mark.skipif(os.geteuid() != 0, reason="it takes root's rights")
    def test_a_process_in_a_pid_namespace_of_its_own_is_told_by_the_ids_that_the_guard_knows(
        self, pipes: RubyPipes
    ) -> None:
        script = "thread = Thread.new { sleep }; sleep 0.001 until thread.stop?; puts Process.pid; $stdout.flush; gets"
        command = ["unshare", "--pid", "--fork", "--kill-child", interpreter("ruby"), "-e", script]
        with subprocess.Popen(
            command, env=environment(pipes), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as parent:
            assert parent.stdout is not None
            assert parent.stdout.readline() == "1\n"
            [child] = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
            process = process_of(int(child))
            told = answer(pipes.ask(process))
            assert set(answer(pipes.ask(process, [process.pid]))) == {process.pid}
            tasks = {int(task.name) for task in Path(f"/proc/{child}/task").iterdir()}
            parent.kill()
        assert process.namespace_pid == 1
        assert process.pid in told
        assert len(told) == 2
        assert set(told) < tasks

    def test_a_deep_stack_is_cut_at_its_outer_end(self, pipes: RubyPipes) -> None:
        with ruby("def deep(n) = n == 0 ? (puts(1); gets) : deep(n - 1)\ndeep(5000)", environment(pipes)) as program:
            program.read()
            told = answer(pipes.ask(process_of(program.pid)))
        frames = told[program.pid].frames
        assert (len(frames), frames[-1].function) == (256, "deep")

    def test_odd_names_arrive_as_far_as_they_are_text(self, pipes: RubyPipes) -> None:
        script = 'def caf\u00e9 = (puts 1; gets)\nThread.current.name = "n\\xE4me\\e[31m\\n"\ncaf\u00e9'
        with ruby(script, environment(pipes, {**os.environ, "LC_ALL": "C.UTF-8"})) as program:
            program.read()
            asleep(program.pid, program.pid, "pipe_read")
            told = answer(pipes.ask(process_of(program.pid)))[program.pid]
        assert (told.name, told.frames[2].function) == ("n\ufffdme\x1b[31m\n", "café")


class TestReading:
    def test_a_thread_is_read_in_its_sleep_and_does_not_notice(self, pipes: RubyPipes) -> None:
        ours, theirs = socket.socketpair()
        script = f"{WAITS}\nputs 1\nio = IO.for_fd({theirs.fileno()})\nfetch(io)"
        theirs.set_inheritable(True)
        command = [interpreter("ruby"), "-e", script]
        with (
            ours,
            theirs,
            subprocess.Popen(command, env=environment(pipes), stdout=subprocess.PIPE, close_fds=False) as program,
        ):
            sleep = asleep(program.pid, program.pid, "unix_stream")
            process, until = process_of(program.pid), time.monotonic() + 20
            with StackReader(os.fstat(theirs.fileno()).st_ino, ruby=pipes) as reader:
                for _ in reader.read([Wanted(process, {program.pid: sleep})], until=until, returning=until):
                    pass
            assert find_sleep(program.pid, process.started, program.pid) == sleep
            program.kill()
        assert reader.found.problems == {}
        assert [frame.function for frame in reader.found.frames[sleep]] == ["sysread", "fetch", "<main>"]

    @pytest.mark.parametrize("asks", [True, False])
    def test_of_one_that_can_not_be_asked_it_is_said_why(self, asks: bool, pipes: RubyPipes) -> None:
        plain = {name: value for name, value in os.environ.items() if not name.startswith("RUBY")}
        with ruby("puts 1; gets", plain) as program:
            program.read()
            until = time.monotonic() + 20
            with StackReader(None, ruby=pipes if asks else None) as reader:
                wanted = Wanted(process_of(program.pid), {program.pid: None})
                for _ in reader.read([wanted], until=until, returning=until):
                    pass
            assert not pipes.can_ask(process_of(program.pid))
        assert reader.found.problems == {program.pid: SILENT if asks else NOT_ASKED}

    def test_the_thread_that_answers_does_not_count_as_one_of_the_programs(self, pipes: RubyPipes) -> None:
        with ruby("puts 1; gets; Thread.new { sleep }; puts 2; gets", environment(pipes)) as program:
            program.read()
            process = process_of(program.pid)
            wait_until(lambda: ANSWERING in comms(program.pid))
            sleep = asleep(program.pid, program.pid, "pipe_read")
            assert has_one_thread(process)
            assert only_thread(process) == sleep
            before = sleeps_of(process)
            answer(pipes.ask(process))
            assert restless_threads(process, before) == {}
            program.go_on()
            program.read()
            assert not has_one_thread(process)
            assert only_thread(process) is None


def comms(pid: int) -> list[str]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):  # it has ended
            found.append((task / "comm").read_text().rstrip("\n"))
    return found


class Impostor:
    """Takes the place of a Ruby process, and answers whatever a test likes, in this process's name."""

    def __init__(self, pipes: RubyPipes, respond: Callable[[int], object]) -> None:
        self._pipes = pipes
        namespace = "".join(filter(str.isdigit, os.readlink("/proc/self/ns/pid")))  # noqa: PTH115
        self._path = pipes.directory / f"{namespace}-{os.getpid()}"
        os.mkfifo(self._path)
        self._fd = os.open(self._path, os.O_RDWR)
        self._respond = respond
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        name = os.read(self._fd, 4096).split()[0].decode()
        pipe = os.open(self._pipes.directory / name, os.O_WRONLY)
        try:
            self._respond(pipe)
        except BrokenPipeError:
            pass
        finally:
            os.close(pipe)
            os.close(self._fd)


def framed(body: bytes) -> bytes:
    return b"%d\n%s" % (len(body), body)


class TestHostileAnswers:
    @pytest.mark.parametrize(
        ("said", "problem"),
        [
            (b"", "its answer can't be read"),
            (b"\n", "its answer can't be read"),
            (b"nonsense\n", "its answer can't be read"),
            (b"x" * 100, "its answer can't be read"),
            (b"-5\nabcde", "its answer can't be read"),
            (b"999\ntoo short", "its answer can't be read"),
            (b"3\nlonger than it says", "its answer can't be read"),
            (framed(b"1\0name"), "its answer can't be read"),
            (framed(b"x\0name\0000"), "its answer can't be read"),
            (framed(b"1\0name\0" + b"1\0f\0a.rb\0x"), "its answer can't be read"),
            (framed(b"1\0name\0002\0f\0a.rb\0001"), "its answer can't be read"),
            (framed(b"1\0name\000999999999"), "its answer can't be read"),
            (framed(b"1\0name\0" + "²".encode() + b"\0f\0a.rb\0001"), "its answer can't be read"),
            (b"9" * 15 + b"\n" + b"x" * (3 << 20), "its stacks are too large"),
        ],
    )
    def test_what_makes_no_sense_is_no_stack(self, said: bytes, problem: str, pipes: RubyPipes) -> None:
        def respond(pipe: int) -> None:
            rest = memoryview(said)
            while rest:
                rest = rest[os.write(pipe, rest) :]

        impostor = Impostor(pipes, respond)
        with pytest.raises(NoDump, match=f"^{problem}$"):
            answer(pipes.ask(process_of(os.getpid())))
        impostor.thread.join()

    def test_long_texts_are_cut(self, pipes: RubyPipes) -> None:
        body = b"\0".join([b"7", b"n" * 9999, b"1", b"f" * 9999, b"/a\xff" + b"b" * 9999, b"3"])
        impostor = Impostor(pipes, lambda pipe: os.write(pipe, framed(body)))
        seen = answer(pipes.ask(process_of(os.getpid())))[7]
        impostor.thread.join()
        [frame] = seen.frames
        assert seen.name is not None
        assert [len(seen.name), len(frame.function), len(frame.file)] == [1024, 1024, 1024]
        assert frame.file.startswith("/a\ufffdb")

    def test_one_that_does_not_answer_costs_no_more_time_than_there_is(self, pipes: RubyPipes) -> None:
        done = threading.Event()
        impostor = Impostor(pipes, lambda _: done.wait(30))
        question = pipes.ask(process_of(os.getpid()))
        [pipe] = question.pipes
        assert select.select([pipe], [], [], 0.05)[0] == []
        assert not question.is_over
        question.end()
        done.set()
        impostor.thread.join()
        assert list(pipes.directory.glob("answer-*")) == []

    def test_what_is_no_pipe_is_not_written_to(self, pipes: RubyPipes) -> None:
        namespace = "".join(filter(str.isdigit, os.readlink("/proc/self/ns/pid")))  # noqa: PTH115
        file = pipes.directory / f"{namespace}-{os.getpid()}"
        file.write_text("")
        with pytest.raises(NoDump, match=r"^it can't be asked"):
            pipes.ask(process_of(os.getpid()))
        assert file.read_text() == ""


class TestPrivacy:
    def test_when_it_is_closed_nobody_is_asked(self) -> None:
        pipes = RubyPipes()
        pipes.open()
        pipes.close()
        pipes.sweep()
        assert not pipes.can_ask(process_of(os.getpid()))
        with pytest.raises(NoDump):
            pipes.ask(process_of(os.getpid()))

    def test_nobody_but_the_guards_user_reaches_the_pipes(self, pipes: RubyPipes) -> None:
        assert stat.S_IMODE(pipes.directory.stat().st_mode) == 0o700
        with ruby("puts 1; gets", environment(pipes)) as program:
            program.read()
            [pipe] = pipes.directory.iterdir()
            assert (stat.S_IMODE(pipe.stat().st_mode), pipe.is_fifo()) == (0o600, True)
            if os.geteuid() == 0:
                nobody = pwd.getpwnam("nobody")
                command = ["dd", f"of={pipe}", "oflag=nonblock", "conv=notrunc"]
                tried = subprocess.run(
                    command, user=nobody.pw_uid, group=nobody.pw_gid, extra_groups=[], input=b"x", check=False
                )
                assert tried.returncode != 0

    def test_nothing_is_left_behind(self, pipes: RubyPipes, monkeypatch: pytest.MonkeyPatch) -> None:
        directory = pipes.directory
        with ruby("puts 1; gets; sleep 0.1", environment(pipes)) as program:
            program.read()
            wait_until(lambda: ANSWERING in comms(program.pid))
            program.go_on()
            program.popen.wait(30)
            assert list(directory.iterdir()) == []
        with ruby("puts 1; gets", environment(pipes)) as killed, ruby("puts 1; gets", environment(pipes)) as living:
            killed.read()
            living.read()
            killed.popen.kill()
            killed.popen.wait(30)
            pipes.sweep()
            assert len(list(directory.iterdir())) == 2, "what is new may be about to be opened"
            monkeypatch.setattr(pipes_module, "_NEW", 0.0)
            pipes.sweep()
            assert [one.name.rpartition("-")[2] for one in directory.iterdir()] == [str(living.pid)]
            pipes.close()
            assert not directory.exists()
            wait_until(lambda: ANSWERING not in comms(living.pid))


OBSERVED = """
require "json"
child = IO.pipe
pid = fork { child[1].write [Thread.list.size, ThreadGroup::Default.list.size].inspect; child[1].close }
child[1].close
Process.wait(pid)
trapped = %w[INT TERM HUP PIPE USR1 CHLD].to_h { |name| [name, trap(name, "DEFAULT").to_s] }
puts JSON.generate(
  list: Thread.list.size, group: ThreadGroup::Default.list.size, alive: Thread.main.alive?, child: child[0].read,
  loaded: $LOADED_FEATURES.map { |name| File.basename(name) } - ["pgguard_ruby_stacks.rb"],
  gems: Gem.loaded_specs.keys, socket: defined?(Socket).inspect, trapped: trapped, verbose: $VERBOSE,
  abort: Thread.abort_on_exception, report: Thread.report_on_exception, warnings: Warning[:deprecated],
  status: $?.exitstatus, error: $!.inspect, globals: global_variables.size, path: $LOAD_PATH,
  constants: Object.constants.sort - [:PgguardRubyStacks], methods: Kernel.private_instance_methods(false).size,
  name: Thread.current.name, locals: binding.local_variables.size
)
Thread.new { raise "seen" }.join rescue $stderr.puts($!.message)
"""


class TestTransparency:
    def run(self, script: str, environ: dict[str, str], *options: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [interpreter("ruby"), *options, "-e", script],
            env=environ,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    def test_a_program_finds_nothing_changed(self, pipes: RubyPipes) -> None:
        plain = {name: value for name, value in os.environ.items() if not name.startswith("RUBY")}
        without = self.run(OBSERVED, plain, "-w")
        status, said, complained = self.run(OBSERVED, environment(pipes, plain), "-w")
        assert json.loads(said) == json.loads(without[1])
        assert (status, complained.count("\n"), "seen" in complained) == (without[0], without[2].count("\n"), True)

    @pytest.mark.parametrize(
        ("script", "status"),
        [
            ("exit 3", 3),
            ("exit! 4", 4),
            ("at_exit { exit 5 }; raise 'x'", 5),
            ("Process.kill(:INT, $$); sleep", -signal.SIGINT),
            ("Process.kill(:TERM, $$); sleep", -signal.SIGTERM),
            ("trap(:INT) { exit 6 }; Process.kill(:INT, $$); sleep", 6),
            ("trap(:PIPE, 'SYSTEM_DEFAULT'); 3.times { sleep 0.1 }; exit 7", 7),
            ("Thread.abort_on_exception = true; sleep 1.2; exit 8", 8),
            ("(Thread.list - [Thread.current]).each(&:join); exit 9", 9),
        ],
    )
    def test_it_ends_as_it_would_and_at_once(self, script: str, status: int, pipes: RubyPipes) -> None:
        began = time.monotonic()
        assert self.run(script, environment(pipes))[0] == status
        assert time.monotonic() - began < 20

    def test_a_deadlock_is_found_and_what_only_waits_is_left_alone(self, pipes: RubyPipes) -> None:
        scripts = {
            "dead": "lock = Queue.new; Thread.new { lock.pop }.join",
            "waits": "Thread.new { sleep 2.5; exit! 7 }; Queue.new.pop",
            "sleeps": 'trap(:ALRM) { exit! 8 }; Process.spawn("sleep 2.5; kill -ALRM #{$$}"); sleep',
        }
        environ = environment(pipes)
        running = {
            name: subprocess.Popen([interpreter("ruby"), "-e", script], env=environ, stderr=subprocess.PIPE, text=True)
            for name, script in scripts.items()
        }
        said = {name: process.communicate(timeout=60)[1] for name, process in running.items()}
        assert {name: process.returncode for name, process in running.items()} == {"dead": 1, "waits": 7, "sleeps": 8}
        assert "No live threads left. Deadlock? (fatal)" in said["dead"]

    @pytest.mark.parametrize(
        "other",
        [
            "Object.send(:remove_const, :RUBY_ENGINE); RUBY_ENGINE = 'jruby'",
            "class << Process; undef_method(:_fork); end",
            "ENV['PGGUARD_RUBY_STACKS_DIR'] = '/nowhere'",
            "ENV.delete('PGGUARD_RUBY_STACKS_DIR')",
        ],
        ids=["JRuby", "Ruby 3.0", "a guard that has ended", "no guard"],
    )
    def test_elsewhere_it_does_nothing(self, other: str, pipes: RubyPipes) -> None:
        plain = {**os.environ, "PGGUARD_RUBY_STACKS_DIR": str(pipes.directory)}
        alone = "p Dir.children('/proc/self/task').size, Thread.list.size"
        script = f"{other}; load '{FILE}'; sleep 0.1; {alone}"
        assert self.run(script, plain) == self.run(alone, plain)
        assert list(pipes.directory.iterdir()) == []

    def test_where_no_thread_can_be_started_nobody_waits_for_an_answer(self, pipes: RubyPipes) -> None:
        script = "class << Thread; def start = raise(ThreadError); end; exit!(Process.wait2(fork { puts 1; sleep })[1])"
        with ruby(script, environment(pipes)) as program:
            program.read()
            assert pipes.can_ask(process_of(program.pid))
            [child] = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
            assert not pipes.can_ask(process_of(int(child)))
            os.kill(int(child), signal.SIGKILL)

    def test_bundler_finds_nothing_activated(self, pipes: RubyPipes, tmp_path: Path) -> None:
        interpreter("ruby", "-rpg", "-rbundler")
        (tmp_path / "Gemfile").write_text('gem "pg"\n')
        plain = {name: value for name, value in os.environ.items() if not name.startswith("RUBY")}
        script = "require 'pg'; puts Gem.loaded_specs.keys; $stderr.puts ENV['RUBYOPT'].split.size"
        bundle = 'ARGV.replace(%w[exec ruby -e] + ARGV); load Gem.bin_path("bundler", "bundle")'
        found = []
        for environ in plain, plain, environment(pipes, plain):  # the first one resolves what is in the bundle
            command = [interpreter("ruby"), "-e", bundle, "--", script]
            environ["BUNDLE_GEMFILE"] = str(tmp_path / "Gemfile")
            done = subprocess.run(
                command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
            )
            found.append((done.stdout, int(done.stderr)))
        _, (without, options), (gems, more) = found
        assert "pg" in gems
        assert (gems, more) == (without, options + 1)
