"""Each command where something about it is odd: output that can't be written, a terminal's size that is no number."""

from __future__ import annotations

import io
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

import pytest
import trio

from pgguard.attribution.evidence import Evidence
from pgguard.cli.statuses import CANNOT, DONE, MISSING
from pgguard.cli.streams import _Errors, _Output
from pgguard.faults.fault import Chapter, Event
from pgguard.reporting.jsonl import encode
from tests.faults.samples import NOW, fault
from tests.proxy.conftest import backend, until
from tests.proxy.fake_backend import converse
from tests.proxy.messages import COLUMNS, Client
from tests.proxy.spawned import SECONDS, environment

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.proxy.fake_backend import FakeBackend

__all__ = ["backend"]

NOBODY_READS: Final = 141
"""128 and the number of SIGPIPE."""

FULL: Final = "pgguard: can't write to standard output: No space left on device\n"
CLOSED: Final = "pgguard: can't write to standard output: Bad file descriptor\n"
MISTYPED: Final = "pgguard: No such option: --mod: did you mean --mode?\n"


@dataclass(frozen=True)
class Case:
    """A command line, and what is odd about it."""

    arguments: str
    stdout: str = "pipe"
    stderr: str = "pipe"
    variables: Mapping[str, str] = field(default_factory=dict)
    status: int = DONE
    says: str | None = ""
    """On standard error, if that can be written to; ``None``: whatever."""

    def run(self, cwd: Path) -> str | None:
        """Run it; what is wrong about it."""
        redirected = {"full": "/dev/full", "closed": "&-"}
        ends = [f"{fd}>{redirected[how]}" for fd, how in ((1, self.stdout), (2, self.stderr)) if how in redirected]
        command = ["sh", "-c", f'exec "$@" {" ".join(ends)}', "sh", sys.executable, "-m", "pgguard"]
        gone, writer = os.pipe()
        os.close(gone)
        try:
            done = subprocess.run(
                [*command, *self.arguments.split()],
                cwd=cwd,
                env=environment(PYTHONUNBUFFERED="", **self.variables),
                stdin=subprocess.DEVNULL,
                stdout=writer if self.stdout == "gone" else subprocess.PIPE,
                stderr=writer if self.stderr == "gone" else subprocess.PIPE,
                timeout=SECONDS,
                check=False,
            )
        finally:
            os.close(writer)
        said = (done.stderr or b"").decode(errors="replace")
        shown = (done.stdout or b"").decode(errors="replace")
        if done.returncode not in ({DONE, MISSING} if self.status == DONE else {self.status}):
            return f"{self}: status {done.returncode}, {said}"
        if self.says is not None and said != self.says:
            return f"{self}: {said!r}"
        return f"{self}: {said}" if "Traceback" in said + shown or "Exception ignored" in said + shown else None


def check(cases: list[Case], cwd: Path) -> None:
    with ThreadPoolExecutor(3) as threads:
        wrong = [problem for problem in threads.map(lambda case: case.run(cwd), cases) if problem is not None]
    assert not wrong, "\n".join(wrong)


def test_standard_output_that_can_not_be_written_to(tmp_path: Path) -> None:
    """As ripgrep and grep do, it ends with 2, unless nobody reads what it says: then as the signal would end it."""
    check(
        [
            *(
                Case(arguments, stdout="full", status=CANNOT, says=FULL)
                for arguments in (
                    "",
                    "--help",
                    "--version",
                    "explain untracked --for Django",
                    "doctor",
                    "doctor --json",
                )
            ),
            *(Case(arguments, stdout="closed", status=CANNOT, says=CLOSED) for arguments in ("serve -h", "explain")),
            *(Case(arguments, stdout="gone", status=NOBODY_READS) for arguments in ("-h", "--version", "explain")),
        ],
        tmp_path,
    )


def test_standard_error_that_can_not_be_written_to_changes_no_status(tmp_path: Path) -> None:
    check(
        [
            Case("serve --mod reject", status=CANNOT, says=MISTYPED),
            *(Case("serve --mod reject", stderr=how, status=CANNOT, says=None) for how in ("full", "closed", "gone")),
            Case("explain", stdout="full", stderr="full", status=CANNOT, says=None),
            Case("explain", stdout="closed", stderr="closed", status=CANNOT, says=None),
        ],
        tmp_path,
    )


SIZES: Final = [
    *({"COLUMNS": size, "LINES": size, "TERMINAL_WIDTH": size} for size in ("²", "-1", "0", "99999999", "9" * 5000)),
    {"COLUMNS": "1", "TERM": "dumb", "FORCE_COLOR": "1"},
]
ENCODINGS: Final = [
    {"PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"LANG": "", "LC_ALL": "", "TERM": ""},
]


def test_sizes_that_are_no_sizes_and_terminals_with_few_letters(tmp_path: Path) -> None:
    odd = [*SIZES, *ENCODINGS]
    commands = ["--help", "explain unclean-close", "serve --help"]
    cases = [Case(commands[n % len(commands)], variables=variables) for n, variables in enumerate(odd)]
    cases.append(Case("doctor", variables={**SIZES[3], **ENCODINGS[0]}))
    cases.append(Case("explain ħ", variables=ENCODINGS[1], status=CANNOT, says=None))
    inherited = Chapter(Event.INHERITED, NOW, 4866, 4864, Evidence.SOCKET_HOLDER)
    (tmp_path / "faults.jsonl").write_bytes(encode(fault(story=(inherited,))))
    cases += [Case("report faults.jsonl", variables=variables) for variables in ENCODINGS]
    check(cases, tmp_path)


@pytest.mark.parametrize("stream", [_Output, _Errors])
def test_a_pipe_that_others_have_made_non_blocking_is_waited_for(stream: type[io.FileIO]) -> None:
    """Node.js does that to one that it shares."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    full = 0
    with suppress(BlockingIOError):
        while True:
            full += os.write(writer, bytes(1024))
    with os.fdopen(reader, "rb") as pipe, stream(writer, "wb") as output:
        thread = threading.Timer(0.1, pipe.read, [full])
        thread.start()
        assert output.write(b"x") == 1
        thread.join()
        assert os.read(reader, 2) == b"x"


def test_what_standard_error_does_not_take_is_lost_at_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgguard.cli.streams._PATIENCE", 10)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(1024))
    with _Errors(writer, "wb") as output:
        assert output.write(b"xy") == 2
        os.close(reader)
        assert output.write(b"xy") == 2


# A guard


def launched(command: list[str], cwd: Path, stderr: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, cwd=cwd, env=environment(), stderr=stderr)


async def connected(path: Path) -> Client:
    """Connect to a guard's Unix socket as soon as it listens on it: the file is there a moment before that."""
    with trio.fail_after(SECONDS):
        while True:
            with suppress(FileNotFoundError, ConnectionRefusedError):
                return await Client.connect_unix(str(path))
            await trio.sleep(0.01)


ODD: Final = {"full": ">/dev/full 2>/dev/full", "closed": "<&- >&- 2>&-"}


@pytest.mark.parametrize("streams", ODD)
async def test_a_guard_goes_on_whatever_its_streams_are(
    streams: str, backend: FakeBackend, short_directory: Path
) -> None:
    """And its faults are recorded."""
    upstream = f"host=127.0.0.1 port={backend.port} sslmode=disable"
    guard = [sys.executable, "-m", "pgguard", "serve", "--upstream", upstream, "--listen", f"unix:{short_directory}:1"]
    command = ["sh", "-c", f'exec "$@" {ODD[streams]}', "sh", *guard, "--faults", "faults.jsonl"]
    path = short_directory / ".s.PGSQL.1"
    with launched(command, short_directory) as process:
        try:
            client = await connected(path)
            server = await backend.let_in(client)
            await server.send(COLUMNS)
            await client.expect(COLUMNS)
            await converse(client, server)
            await client.close()
            await server.close()
            process.send_signal(signal.SIGTERM)
            assert await trio.to_thread.run_sync(process.wait, SECONDS) == DONE
        finally:
            process.kill()
    assert "message-while-idle" in (short_directory / "faults.jsonl").read_text()


async def test_a_log_on_a_disk_that_was_full_goes_on_and_says_what_is_missing(
    backend: FakeBackend, tmp_path: Path
) -> None:
    """The disk is full when its file may not grow: setrlimit(2), RLIMIT_FSIZE."""
    log = tmp_path / "log"
    upstream = f"host=127.0.0.1 port={backend.port} sslmode=disable"
    command = [sys.executable, "-m", "pgguard", "serve", "--upstream", upstream, "--listen", "127.0.0.1:0"]
    with log.open("wb") as stderr, launched(command, tmp_path, stderr=stderr) as process:
        try:
            await until(lambda: "ready on" in log.read_text())
            size = log.stat().st_size
            _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size + 10, hard))
            process.send_signal(signal.SIGUSR1)
            await until(lambda: log.stat().st_size == size + 10)
            process.send_signal(signal.SIGUSR2)
            await trio.sleep(0.1)
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (hard, hard))
            process.send_signal(signal.SIGTERM)
            assert await trio.to_thread.run_sync(process.wait, SECONDS) == DONE
        finally:
            process.kill()
    rest = log.read_text()[size:]
    assert re.match(r"pgguard: S\npgguard: [12] reports? or lines? could not be printed here: File too large\n", rest)
    assert rest.endswith("\npgguard: 0 sessions, no faults\n")


@pytest.mark.parametrize("descriptors", [8, 11, 14])
def test_with_too_few_descriptors_to_begin_with_the_limit_to_raise_is_named(descriptors: int, tmp_path: Path) -> None:
    command = ["prlimit", f"--nofile={descriptors}", sys.executable, "-m", "pgguard", "serve", "--upstream", "port=1"]
    done = subprocess.run(
        [*command, "--listen", "127.0.0.1:0"], check=False, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith("pgguard: Too many open files: ")
    assert "ulimit -n" in done.stderr
    assert done.stderr.count("\n") == 1
