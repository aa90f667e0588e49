"""``pgguard run`` and its command: everything as without a guard, but for the guard. No server is needed for that."""

from __future__ import annotations

import fcntl
import json
import os
import re
import resource
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pgguard.launch.arrivals import TAKEN
from tests.cli.test_signals import program
from tests.proxy.spawned import SECONDS, environment
from tests.servers import not_installed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


NOWHERE = "postgresql://app:secret@127.0.0.1:1/app"
"""Nobody listens there, and nobody connects."""
OPTIONS = ("run", "--attribution", "off")
PGGUARD = (sys.executable, "-m", "pgguard", *OPTIONS)


def variables(**more: str) -> dict[str, str]:
    return environment(DATABASE_URL=NOWHERE, **more)


def run(*command: str, cwd: Path, options: Sequence[str] = (), **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PGGUARD, *options, "--", *command],
        check=False,
        cwd=cwd,
        env=variables(**more),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


# What the command finds

LOOKS_AROUND = """
import json, os, re, resource, signal, sys
status = open("/proc/self/status").read()
def opened(fd):
    try: return re.sub(r"\\d{3,}", "N", os.readlink(f"/proc/self/fd/{fd}")), os.get_inheritable(fd)
    except OSError: return None
print(json.dumps({
    "environment": dict(os.environ),
    "descriptors": {fd: opened(fd) for fd in range(1024) if opened(fd)},
    # But for two of the C library's own, which posix_spawn(3) has ignored.
    "signals": {name: int(mask, 16) & ~(3 << 31) for name, mask in re.findall(r"(S\\w+):\\s+(\\w{16})\\n", status)},
    "limits": {name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name[:7] == "RLIMIT_"},
    "place": [os.getcwd(), os.getsid(0), os.getpgrp(), os.umask(0), os.getuid(), os.getgroups(), os.getpriority(0, 0)],
    "rights": re.findall(r"(Cap\\w+|NoNewPrivs|Seccomp):\\s+(\\w+)", status),
    "arguments": sys.argv[1:],
}), file=open(os.environ["SAYS"], "w"))
"""


def found(command: Sequence[str], directory: Path) -> dict[str, Any]:
    """What a program finds that is started by somebody with odd habits."""
    says = directory / "says.json"
    extra = os.open(directory, os.O_RDONLY)

    def prepare() -> None:
        os.setsid()
        os.close(0)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, signal.SIGTERM})
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.umask(0o027)

    try:
        done = subprocess.run(
            command,
            cwd=directory,
            env={**variables(SAYS=str(says), COLUMNS="wide", LINES="007", EMPTY="", ODD="\udcff\n="), "LC_ALL": ""},
            capture_output=True,
            pass_fds=[extra],
            preexec_fn=prepare,
            timeout=SECONDS,
            check=False,
        )
    finally:
        os.close(extra)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(says.read_text()))


def test_a_command_finds_everything_as_it_would_without_a_guard(tmp_path: Path) -> None:
    """But for its parent, and for where the server is."""
    looks = [sys.executable, "-I", "-X", "utf8", "-c", LOOKS_AROUND, "--", "-q", "", "a b"]
    without, behind = found(looks, tmp_path), found([*PGGUARD, "--", *looks], tmp_path)
    # Its own session and group, which its parent began.
    assert behind["place"][1] == behind["place"][2]
    for one in (without, behind):
        one["place"][1:3] = []
    url = behind["environment"].pop("DATABASE_URL")
    assert re.fullmatch(r"postgresql://app:secret@127\.0\.0\.1:\d+/app", url)
    assert url != without["environment"].pop("DATABASE_URL")
    assert behind == without


# How it ends


def test_the_exit_status_is_the_commands_own(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("echo $0 $1; exit 9")
    (tmp_path / "script").write_text("exit 8")
    (tmp_path / "script").chmod(0o755)
    killed = [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV, signal.SIGINT, signal.SIGRTMIN + 1]
    expected: dict[tuple[str, ...], int] = {
        ("true",): 0,
        ("sh", "-c", "exit 7"): 7,
        ("sh", "-c", "exit 66"): 66,
        ("./script",): 8,
        **{("sh", "-c", f"ulimit -c 0; kill -{int(number)} $$"): 128 + number for number in killed},
        ("./plain",): 126,
        (str(tmp_path),): 126,
        ("./nowhere",): 127,
        ("no-such-command",): 127,
        ("",): 127,
    }
    done = {command: run(*command, cwd=tmp_path) for command in expected}
    assert {command: one.returncode for command, one in done.items()} == expected
    assert done["no-such-command",].stderr == "pgguard: no-such-command: No such file or directory\n"
    assert done["./plain",].stderr == "pgguard: ./plain: Permission denied\n"
    assert all(one.stdout == "" for one in done.values())


def test_what_it_prints_is_its_own_and_the_guard_speaks_before_and_afterwards(tmp_path: Path) -> None:
    done = run("sh", "-c", "echo out; echo err >&2", cwd=tmp_path)
    assert done.stdout == "out\n"
    said = re.fullmatch(r"(.*\n)err\n(.*)", done.stderr, re.DOTALL)
    assert said is not None, done.stderr
    ready = r"^pgguard: ready on 127\.0\.0\.1:\d+, in front of PostgreSQL at 127\.0\.0\.1:1; .*DATABASE_URL"
    assert re.search(ready, said[1], re.MULTILINE)
    assert (
        "pgguard: PostgreSQL can't be reached at 127.0.0.1:1 (Connection refused), so clients get an error" in said[1]
    )
    assert said[2].startswith("pgguard: no connection came through the guard on 127.0.0.1:")
    assert "a file or its own arguments" in said[2]
    assert "--listen HOST:PORT" in said[2]
    assert "--listen unix:DIR" in said[2]
    assert "secret" not in done.stderr


def test_a_page_says_that_nobody_came(tmp_path: Path) -> None:
    """Otherwise it would look as if nothing were wrong."""
    run("true", cwd=tmp_path, options=["--html", "out.html"])
    page = (tmp_path / "out.html").read_text()
    assert "No connection came through the guard, so there was nothing to see; rewritten for the command: " in page
    assert "secret" not in page


def test_a_user_in_the_configuration_file_is_said_to_be_none_of_its_settings(tmp_path: Path) -> None:
    (tmp_path / "pgguard.toml").write_text('user = "nobody"')
    done = run("id", "-un", cwd=tmp_path)
    assert done.stdout != "nobody\n"
    assert "pgguard: user is not used by pgguard run" in done.stderr


def test_databases_in_the_configuration_file_are_said_to_be_none_of_its_settings(tmp_path: Path) -> None:
    (tmp_path / "pgguard.toml").write_text(
        '[[databases]]\nname = "orders"\nupstream = "host=orders.example"\nlisten = "127.0.0.1:6544"\nmode = "reject"\n'
    )
    done = run("sh", "-c", "echo $PGPORT", cwd=tmp_path)
    assert done.returncode == 0
    assert "6544" not in done.stdout
    assert "pgguard: databases is for pgguard serve: the guard of pgguard run is in front of one server" in done.stderr


def test_a_collector_that_there_is_no_need_for_keeps_nobody_waiting(tmp_path: Path) -> None:
    done = run("true", cwd=tmp_path, options=["--otel"])
    assert done.returncode == 0
    assert "OpenTelemetry" not in done.stderr


def test_quiet_leaves_the_summary(tmp_path: Path) -> None:
    done = run("sh", "-c", "echo err >&2", cwd=tmp_path, options=["--quiet"])
    assert done.stderr.startswith("err\npgguard: no connection came through the guard on ")


def test_a_report_that_can_not_be_written_is_told_and_the_commands_own_failure_comes_first(tmp_path: Path) -> None:
    for status, expected in ((0, 2), (5, 5)):
        command = [*PGGUARD, "--markdown", "-", "--", "sh", "-c", f"exit {status}"]
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                command,
                cwd=tmp_path,
                env=variables(),
                stdout=full,
                stderr=subprocess.PIPE,
                timeout=SECONDS,
                check=False,
            )
        assert done.returncode == expected
        assert b"pgguard: can't write to standard output: No space left on device\n" in done.stderr
    refused = run("touch", "started", cwd=tmp_path, options=["--html", "nowhere/report.html"])
    assert refused.returncode == 2
    assert refused.stderr.startswith("pgguard: --html nowhere/report.html: there is no directory nowhere")
    assert not (tmp_path / "started").exists()


def test_a_guard_behind_a_guard(tmp_path: Path) -> None:
    done = run(*PGGUARD, "--", "sh", "-c", "exit 4", cwd=tmp_path)
    assert done.returncode == 4
    ready = r"^pgguard: ready on 127\.0\.0\.1:(\d+), in front of PostgreSQL at 127\.0\.0\.1:(\d+)"
    [(outer, server), (_, between)] = re.findall(ready, done.stderr, re.MULTILINE)
    assert (server, between) == ("1", outer)


def test_processes_that_are_left_running_have_a_moment_or_as_long_as_it_is_told_and_are_not_ended(
    tmp_path: Path,
) -> None:
    """Two seconds, without a word; and with ``--linger`` so long, which is said."""
    left = 'exec >&- 2>&-; sleep 60 & echo $! > "$0"'
    briefly = run("sh", "-c", left, "briefly", cwd=tmp_path, options=["--quiet"])
    longer = run("sh", "-c", left, "longer", cwd=tmp_path, options=["--linger", "2.5"])
    for name, done in (("briefly", briefly), ("longer", longer)):
        assert done.returncode == 0
        pid = (tmp_path / name).read_text().strip()
        said = f"sh has ended (exit status 0), but pid {pid} of it runs on: the guard goes on in case of a connection"
        assert (said in done.stderr) == (name == "longer")
        os.kill(int(pid), signal.SIGKILL)


# Signals

COUNTS = """
import os, signal, sys, threading, time
def came(number, frame):
    os.write(1, f"{signal.Signals(number).name}\\n".encode())
for number in map(int, sys.argv[1:]):
    signal.signal(number, came)
os.write(1, b"ready\\n")
while True:
    signal.pause()
"""


class Behind:
    """A command behind a guard that says each signal that it gets."""

    def __init__(self, process: subprocess.Popen[bytes], fd: int) -> None:
        self.process = process
        self._fd = fd
        self._said = b""

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Read until it has said so; what is read isn't read again."""
        deadline = time.monotonic() + SECONDS
        while (found := re.search(pattern, self._said.decode(errors="replace"))) is None:
            ready, _, _ = select.select([self._fd], [], [], max(0, deadline - time.monotonic()))
            data = os.read(self._fd, 65536) if ready else b""
            assert data, f"it never said {pattern}: {self._said.decode()}"
            self._said += data
        self._said = self._said.decode(errors="replace")[found.end() :].encode()
        return found

    def said_nothing_else(self) -> str:
        """What it has said since, within a moment."""
        while select.select([self._fd], [], [], 0.05)[0]:
            self._said += os.read(self._fd, 65536)
        return self._said.decode()


@contextmanager
def behind(*command: str, cwd: Path, options: Sequence[str] = ()) -> Iterator[Behind]:
    with subprocess.Popen(
        [*PGGUARD, *options, "--", *command],
        cwd=cwd,
        env=variables(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        try:
            yield Behind(process, process.stdout.fileno())
        finally:
            end_session(process.pid)


def end_session(leader: int) -> None:
    """End what runs in a session: commands at once, so that their guards can put their things in order."""
    deadline = time.monotonic() + SECONDS / 3
    while running := [pid for pid in processes() if is_of(pid, leader)]:
        patient = time.monotonic() < deadline
        for pid in running:
            with suppress(OSError):
                if not patient or b"-m\0pgguard" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def processes() -> Iterator[int]:
    return (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())


def is_of(pid: int, leader: int) -> bool:
    """Whether a process that hasn't ended is of a session."""
    with suppress(OSError):
        return os.getsid(pid) == leader and state(pid) not in "ZX"
    return False


PASSED_ON = [
    number for number in sorted(TAKEN) if number not in {signal.SIGCHLD, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}
]


def test_a_signal_reaches_the_command_once_whether_the_guard_was_meant_or_the_group(tmp_path: Path) -> None:
    numbers = [int(number) for number in PASSED_ON if number <= signal.SIGRTMIN]
    with behind(sys.executable, "-c", COUNTS, *map(str, numbers), cwd=tmp_path) as guarded:
        guarded.wait_for("ready\n")
        for number in numbers:
            name = signal.Signals(number).name
            guarded.process.send_signal(number)
            guarded.wait_for(f"^{name}\n")
            os.killpg(guarded.process.pid, number)
            guarded.wait_for(f"^{name}\n")
        # Several at once, as a terminal that is closed sends two.
        for number in (signal.SIGHUP, signal.SIGCONT, signal.SIGTERM):
            os.killpg(guarded.process.pid, number)
        assert sorted(guarded.wait_for(r"^(?:\w+\n){3}")[0].split()) == ["SIGCONT", "SIGHUP", "SIGTERM"]
        # Had one of them come twice, it would have been in the way.
        assert guarded.said_nothing_else() == ""


def test_signals_that_the_group_gets_in_quick_succession_reach_the_command_once_each(tmp_path: Path) -> None:
    """As when a service is ended (SIGTERM, SIGCONT), or a terminal is closed (SIGHUP, SIGCONT)."""
    numbers = [signal.SIGTERM, signal.SIGCONT, signal.SIGHUP, signal.SIGUSR1]
    all_numbers = [str(int(number)) for number in (*numbers, signal.SIGUSR2)]
    with behind(sys.executable, "-c", COUNTS, *all_numbers, cwd=tmp_path) as guarded:
        guarded.wait_for("ready\n")
        for _ in range(3):
            for number in numbers:
                os.killpg(guarded.process.pid, number)
            came = sorted(guarded.wait_for(r"^SIG\w+\n")[0].strip() for _ in numbers)
            assert came == sorted(number.name for number in numbers)
            # What is sent to the guard alone shows that it has dealt with those before.
            guarded.process.send_signal(signal.SIGUSR2)
            guarded.wait_for("^SIGUSR2\n")
        assert guarded.said_nothing_else() == ""


def test_a_signal_that_the_group_gets_twice_at_once_does_not_reach_the_command_three_times(tmp_path: Path) -> None:
    numbers = [str(int(number)) for number in (signal.SIGINT, signal.SIGUSR2)]
    with behind(sys.executable, "-c", COUNTS, *numbers, cwd=tmp_path) as guarded:
        guarded.wait_for("ready\n")
        for _ in range(20):
            os.killpg(guarded.process.pid, signal.SIGINT)
            time.sleep(0.001)  # so that it mostly comes twice, and not once
            os.killpg(guarded.process.pid, signal.SIGINT)
            guarded.wait_for(r"^SIGINT\n")
            guarded.process.send_signal(signal.SIGUSR2)
            guarded.wait_for(r"^(SIGINT\n)?SIGUSR2\n")
        assert guarded.said_nothing_else() == ""


def test_what_the_command_sends_to_whoever_started_it_does_not_come_back(tmp_path: Path) -> None:
    code = COUNTS.replace("while True", "os.kill(os.getppid(), signal.SIGUSR1)\nwhile True")
    with behind(
        sys.executable, "-c", code, str(int(signal.SIGUSR1)), str(int(signal.SIGUSR2)), cwd=tmp_path
    ) as guarded:
        guarded.wait_for("ready\n")
        guarded.process.send_signal(signal.SIGUSR2)
        guarded.wait_for("^SIGUSR2\n")
        assert guarded.said_nothing_else() == ""


def test_a_command_that_left_the_group_gets_what_the_terminal_or_anybody_sends(tmp_path: Path) -> None:
    code = COUNTS.replace("import os", "import os; os.setpgid(0, 0)\nimport os")
    with behind(sys.executable, "-c", code, str(int(signal.SIGINT)), cwd=tmp_path) as guarded:
        guarded.wait_for("ready\n")
        for _ in range(2):
            os.killpg(guarded.process.pid, signal.SIGINT)
            guarded.wait_for("^SIGINT\n")
        assert guarded.said_nothing_else() == ""


@pytest.mark.parametrize("group", [False, True])
def test_a_signal_that_ends_the_command_ends_the_guard_behind_it(group: bool, tmp_path: Path) -> None:
    with behind("sh", "-c", "echo ready; exec sleep 60", cwd=tmp_path) as guarded:
        guarded.wait_for("ready\n")
        (os.killpg if group else os.kill)(guarded.process.pid, signal.SIGTERM)
        _, said = guarded.process.communicate(timeout=SECONDS)
        assert guarded.process.returncode == 128 + signal.SIGTERM
        assert b"no connection came through" in said


def test_a_command_that_is_stopped_stays_so_until_it_is_continued(tmp_path: Path) -> None:
    """And what stops it alone doesn't stop the guard, which other processes of it may need."""
    with behind("sh", "-c", "echo $$; kill -STOP $$; echo on; exit 5", cwd=tmp_path) as guarded:
        pid = int(guarded.wait_for(r"(\d+)\n")[1])
        wait_for_state(pid, "T")
        assert state(guarded.process.pid) != "T"
        os.kill(pid, signal.SIGCONT)
        guarded.wait_for("on\n")
        assert guarded.process.wait(SECONDS) == 5


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]


def wait_for_state(pid: int, wanted: str) -> None:
    deadline = time.monotonic() + SECONDS
    while state(pid) != wanted:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_before_the_command_has_started_keeps_it_from_starting(number: signal.Signals, tmp_path: Path) -> None:
    code = """
import os, signal, pgguard.running, trio
async def wait(_):
    os.kill(os.getpid(), SIGNAL)
    await trio.sleep_forever()
pgguard.running._look_around = wait
""".replace("SIGNAL", str(int(number)))
    with program(code, *OPTIONS, "--upstream", NOWHERE, "--", "touch", "started", cwd=tmp_path) as process:
        assert process.communicate(timeout=SECONDS) == (b"", b"")
    assert process.returncode == 128 + number
    assert not (tmp_path / "started").exists()


def test_a_guard_that_can_not_start_is_told_by_a_status_of_its_own(tmp_path: Path) -> None:
    fails = "import {0}; {0}.{1} = lambda *_: 1 / 0"
    full = "import os, errno\ndef fork(): raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))\nos.fork = fork"
    cases = (
        (fails.format("pgguard.running", "_look_around"), "ZeroDivisionError"),
        (full, "pgguard: the system doesn't let pgguard start another process: Resource temporarily unavailable: "),
    )
    for code, says in cases:
        with program(code, *OPTIONS, "--upstream", NOWHERE, "--", "touch", "started", cwd=tmp_path) as process:
            _, said = process.communicate(timeout=SECONDS)
        assert process.returncode == 2
        assert says in said.decode()
        assert not (tmp_path / "started").exists()


def test_what_the_command_has_done_is_not_lost_when_the_report_fails(tmp_path: Path) -> None:
    code = "import pgguard.cli.run; pgguard.cli.run._Telling.end = lambda *_: 1 / 0"
    with program(code, *OPTIONS, "--upstream", NOWHERE, "--", "sh", "-c", "exit 5", cwd=tmp_path) as process:
        _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 5
    assert b"ZeroDivisionError" in said


def test_the_command_goes_on_when_the_guard_fails(tmp_path: Path) -> None:
    code = """
import pgguard.running, trio
async def fail(*_):
    while not __import__("os").path.exists("started"):
        await trio.sleep(0.01)
    raise RuntimeError("no more")
pgguard.running.Guard.serve = fail
"""
    shell = "touch started; while [ ! -e failed ]; do sleep 0.05; done; echo on; exit 3"
    with program(code, *OPTIONS, "--upstream", NOWHERE, "--", "sh", "-c", shell, cwd=tmp_path) as process:
        time.sleep(0.5)
        (tmp_path / "failed").touch()
        out, said = process.communicate(timeout=SECONDS)
    assert (process.returncode, out) == (3, b"on\n")
    assert b"pgguard: the guard has failed: " in said
    assert b"sh goes on without it" in said


def test_a_command_that_is_gone_before_its_end_could_be_seen_is_not_waited_for(tmp_path: Path) -> None:
    """Where SIGCHLD is ignored, the kernel forgets at once how a process has ended that has one inherit this."""
    code = """
import os, signal, time, pgguard.launch.child as child
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
spawn = child._spawn
def slowly(*arguments):
    pid = spawn(*arguments)
    while os.path.exists(f"/proc/{pid}"):
        time.sleep(0.01)
    return pid
child._spawn = slowly
"""
    with program(code, *OPTIONS, "--upstream", NOWHERE, "--", "true", cwd=tmp_path) as process:
        _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 255
    assert b"true has ended, and it isn't known with which exit status" in said


# On a terminal


class Terminal:
    """A terminal with a program on it, as somebody has it who types."""

    def __init__(self, *command: str, cwd: Path) -> None:
        self._fd, end = os.openpty()
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env=variables(PS1="$ ", TERM="dumb", HISTFILE=""),
            stdin=end,
            stdout=end,
            stderr=end,
            preexec_fn=self._take,  # noqa: PLW1509 - there is one thread
            start_new_session=True,
        )
        os.close(end)
        self.said = ""

    @staticmethod
    def _take() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def wait_for(self, pattern: str) -> re.Match[str]:
        deadline = time.monotonic() + SECONDS
        while (found := re.search(pattern, self.said)) is None:
            ready, _, _ = select.select([self._fd], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"it never said {pattern!r}: {self.said}"
            self.said += os.read(self._fd, 65536).decode(errors="replace").replace("\r\n", "\n")
        self.said = self.said[found.end() :]
        return found

    def close(self) -> None:
        """End everything that runs on it, whatever group it is in."""
        end_session(self.process.pid)
        self.process.wait(SECONDS)
        os.close(self._fd)


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Terminal]:
    """A shell that a person types into, with job control."""
    if (bash := shutil.which("bash")) is None:
        not_installed("bash")
    terminal = Terminal(bash, "--norc", "--noediting", "-i", cwd=tmp_path)
    try:
        terminal.wait_for(r"\$ ")
        yield terminal
    finally:
        terminal.close()


def typed(*command: str) -> str:
    return " ".join(f"'{part}'" for part in (*PGGUARD, "--", *command)) + "\n"


READS = """
import os, signal, sys
def came(number, frame):
    print("got", signal.Signals(number).name, flush=True)
for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGWINCH, signal.SIGCONT):
    signal.signal(number, came)
print("ttys", [os.isatty(fd) for fd in range(3)], os.ttyname(0), os.tcgetpgrp(0) == os.getpgrp(), flush=True)
for line in sys.stdin:
    print("read", line.strip().upper(), flush=True)
    if line == "end\\n":
        sys.exit(4)
"""


def test_on_a_terminal_it_reads_and_is_stopped_and_continued_and_interrupted_as_without_a_guard(
    shell: Terminal, tmp_path: Path
) -> None:
    (tmp_path / "reads.py").write_text(READS)
    shell.type(typed(sys.executable, "reads.py"))
    shell.wait_for(r"ttys \[True, True, True\] /dev/pts/\d+ True\n")
    shell.type("hello\n")
    shell.wait_for("read HELLO\n")
    shell.type("\x03")
    shell.wait_for("got SIGINT\n")
    shell.type("\x1c")
    shell.wait_for("got SIGQUIT\n")
    shell.resize(30, 100)
    shell.wait_for("got SIGWINCH\n")
    for n in range(2):
        shell.type("\x1a")
        shell.wait_for(r"Stopped.*\n")
        shell.type(f"echo $((6 * 7 + {n}))\n")
        shell.wait_for(f"{42 + n}\n")
        shell.type("fg\n")
        shell.wait_for("got SIGCONT\n")
        shell.type("again\n")
        shell.wait_for("read AGAIN\n")
    assert "got" not in shell.said
    shell.type("end\n")
    shell.wait_for("read END\n")
    assert "got" not in shell.said
    shell.wait_for("pgguard: no connection came through")
    shell.wait_for(r"\$ ")
    shell.type("echo status $?\n")
    shell.wait_for("status 4\n")


def test_in_the_background_it_stops_when_it_reads_the_terminal_and_goes_on_in_front(
    shell: Terminal, tmp_path: Path
) -> None:
    (tmp_path / "reads.py").write_text(READS)
    shell.type("set -o notify\n")
    shell.type(typed(sys.executable, "reads.py").replace("\n", " &\n"))
    shell.wait_for(r"ttys \[True, True, True\] /dev/pts/\d+ False\n")
    shell.wait_for("Stopped")
    shell.type("fg\n")
    shell.type("hello\n")
    shell.wait_for("read HELLO\n")
    shell.type("end\n")
    shell.wait_for("pgguard: no connection came through")


def test_a_program_that_stops_itself_alone_stops_the_guard_with_it(shell: Terminal) -> None:
    """As less(1) does at Ctrl-Z, which reaches it as a character."""
    shell.type(typed("sh", "-c", "trap : INT; kill -TSTP $$; echo back; exit 6"))
    shell.wait_for(r"Stopped.*\n")
    shell.type("fg; echo status $?\n")
    shell.wait_for("back\n")
    shell.wait_for("status 6\n")


def test_a_shell_behind_it_has_job_control_of_its_own(shell: Terminal) -> None:
    shell.type(typed("bash", "--norc", "--noediting", "-i"))
    shell.wait_for("pgguard: ready on")
    shell.wait_for(r"\$ ")
    for seconds, key, said in ((60, "\x03", r"\^C"), (1, "\x1a", "Stopped")):
        shell.type(f"{sys.executable} -c 'import time; print(\"now\", flush=True); time.sleep({seconds})'\n")
        shell.wait_for(r"\nnow\n")
        shell.type(key)
        shell.wait_for(said)
        shell.wait_for(r"\$ ")
    shell.type("fg\n")
    shell.wait_for(r"\$ ")
    shell.type("exit 3\n")
    shell.wait_for("pgguard: no connection came through")
    shell.wait_for(r"\$ ")
    shell.type("echo status $?\n")
    shell.wait_for("status 3\n")


def test_a_terminal_that_is_closed_ends_it(tmp_path: Path) -> None:
    """The kernel tells the first process of the terminal alone, which is the guard here, and would be the command."""
    (tmp_path / "hangs.py").write_text(
        COUNTS.replace("os.write(1, f", "open('came', 'a').write(f").replace(".encode()", "", 1)
    )
    terminal = Terminal(*PGGUARD, "--", sys.executable, "hangs.py", str(int(signal.SIGHUP)), cwd=tmp_path)
    try:
        terminal.wait_for("ready\n")
    finally:
        os.close(terminal._fd)
    deadline = time.monotonic() + SECONDS
    while not (tmp_path / "came").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.1)
    assert (tmp_path / "came").read_text() == "SIGHUP\n"
    end_session(terminal.process.pid)
    terminal.process.wait(SECONDS)
