"""What signals do to each command, from the first import on."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from pgguard.cli.entry import ENDING, UNUSED
from pgguard.cli.signals import Signals, name_of
from tests.proxy.conftest import backend
from tests.proxy.spawned import SECONDS, Spawned, environment, spawned

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.proxy.fake_backend import FakeBackend

__all__ = ["backend"]


@contextmanager
def program(code: str, *arguments: str, cwd: Path) -> Iterator[subprocess.Popen[bytes]]:
    """``pgguard`` with these arguments, and with some code before it begins."""
    begin = f"import sys; sys.argv = ['pgguard', *sys.argv[1:]]\n{code}\nfrom pgguard.cli.entry import main\nmain()"
    with subprocess.Popen(
        [sys.executable, "-c", begin, *arguments],
        cwd=cwd,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


WHILE_IMPORTING = """
import signal
class Finder:
    def find_spec(self, name, *_):
        if name == {module!r}:
            sys.meta_path.remove(self)
            for number in {numbers}:
                signal.raise_signal(number)
sys.meta_path.insert(0, Finder())
"""


def test_a_signal_while_it_imports_ends_it_without_a_word(tmp_path: Path) -> None:
    cases = [
        (signal.SIGINT, "pgguard.cli.main", "explain"),
        (signal.SIGINT, "typer", "serve"),
        (signal.SIGINT, "trio", "serve"),
        (signal.SIGTERM, "pydantic", "serve"),
        (signal.SIGINT, "pgguard.attribution.capabilities", "doctor"),
        (signal.SIGINT, "pgguard.demo.postgres", "demo"),
        (signal.SIGTERM, "rich.console", "--help"),
    ]
    wrong = []
    for number, module, command in cases:
        code = WHILE_IMPORTING.format(module=module, numbers=[int(number)])
        with program(code, command, cwd=tmp_path) as process:
            said = process.communicate(timeout=SECONDS)
            if (process.returncode, said) != (-number, (b"", b"")):
                wrong.append((number, module, command, process.returncode, said))
    assert not wrong


def test_what_does_not_end_a_guard_does_not_while_it_imports_either(tmp_path: Path) -> None:
    numbers = [int(number) for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGALRM)]
    code = WHILE_IMPORTING.format(module="pgguard.cli.main", numbers=numbers)
    options = ["serve", "--listen", "127.0.0.1:0", "--upstream", "host=127.0.0.1 port=1"]
    with program(code, *options, cwd=tmp_path) as process:
        guard = Spawned(process)
        guard.wait_for("(SIGHUP: no setting has changed\n)")
        guard.signal(signal.SIGTERM)
        said = guard.end()
    assert "pgguard: SIGUSR1 is ignored: SIGHUP " in said
    assert "pgguard: SIGALRM is ignored: SIGHUP " in said


WAITING = """
import pgguard.running, trio
async def wait(_):
    print("waiting", file=sys.stderr, flush=True)
    await trio.sleep_forever()
pgguard.running._look_around = wait
"""


@pytest.mark.parametrize("number", ENDING)
def test_a_guard_that_is_not_ready_yet_ends_at_once(number: signal.Signals, tmp_path: Path) -> None:
    options = ["serve", "--listen", "127.0.0.1:0", "--upstream", "host=127.0.0.1 port=1"]
    with program(WAITING, *options, cwd=tmp_path) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == b"waiting\n"
        process.send_signal(number)
        _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 0
    assert said.decode() == f"pgguard: stopped by {number.name} before it was ready\n"


def upstream(backend: FakeBackend) -> str:
    return f"host=127.0.0.1 port={backend.port} sslmode=disable"


async def test_what_means_nothing_is_said_and_ends_nothing(backend: FakeBackend, tmp_path: Path) -> None:
    """By default each of them would end it at once, with all sessions, and leave its sockets behind."""
    with spawned(upstream(backend), "--attribution", "off", cwd=tmp_path) as guard:
        client, server = await backend.session(guard.port)
        taken = _signals(guard.pid, "SigCgt")
        assert taken >= {*UNUSED, *ENDING, signal.SIGHUP}
        for number in UNUSED[:3]:
            guard.signal(number)
            await trio.to_thread.run_sync(guard.wait_for, f"({name_of(number)} is ignored: SIGHUP)")
        for _ in range(100):
            guard.signal(UNUSED[-1])
        await client.close()
        await server.close()
        guard.signal(signal.SIGTERM)
        said = guard.end()
    assert said.count("is ignored: SIGHUP") <= 10, "it is counted then"


async def test_sigquit_ends_it_at_once_and_in_order(backend: FakeBackend, short_directory: Path) -> None:
    with spawned(upstream(backend), "--listen", f"unix:{short_directory}:1", cwd=short_directory) as guard:
        client, server = await backend.session(guard.port)
        began = time.monotonic()
        guard.signal(signal.SIGQUIT)
        said = guard.end()
        assert time.monotonic() - began < 5, "it doesn't wait for sessions"
        assert await client.rest() == b""
        assert await server.rest() == b""
    assert "pgguard: 1 session, no faults\n" in said
    assert not (short_directory / ".s.PGSQL.1").exists()


async def test_a_second_signal_counts_however_soon_it_comes(backend: FakeBackend, tmp_path: Path) -> None:
    """As soon as the kernel has delivered the first one: until then it keeps one of a kind."""
    with spawned(upstream(backend), "--attribution", "off", cwd=tmp_path) as guard:
        client, server = await backend.session(guard.port)
        began = time.monotonic()
        guard.signal(signal.SIGTERM)
        while signal.SIGTERM in _signals(guard.pid, "ShdPnd"):
            pass
        guard.signal(signal.SIGTERM)
        guard.end()
        assert time.monotonic() - began < 5
        await client.close()
        await server.close()


def _signals(pid: int, which: str) -> set[int]:
    return _in(Path(f"/proc/{pid}/status").read_text(), which)


def _in(status: str, which: str) -> set[int]:
    found = re.search(rf"^{which}:\s+([0-9a-f]+)$", status, re.MULTILINE)
    mask = 0 if found is None else int(found[1], 16)
    return {number for number in range(1, 65) if mask >> (number - 1) & 1}


# How they are counted


async def test_equal_signals_are_told_one_by_one() -> None:
    with Signals(signal.SIGUSR1, signal.SIGUSR2) as signals:
        signal.raise_signal(signal.SIGUSR1)
        with signals.listening():
            for number in (signal.SIGUSR2, signal.SIGUSR1, signal.SIGUSR1):
                signal.raise_signal(number)
            with trio.fail_after(SECONDS):
                came = [await signals.wait() for _ in range(4)]
            assert came == [signal.SIGUSR1, signal.SIGUSR2, signal.SIGUSR1, signal.SIGUSR1]
            with trio.move_on_after(0.05) as scope:
                await signals.wait()
            assert scope.cancelled_caught, "none is told twice"
        signal.raise_signal(signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


async def test_those_are_too_that_come_while_another_thread_has_the_interpreter() -> None:
    """Python's own handler runs once for all of them."""
    libc = ctypes.PyDLL(None)  # which keeps the interpreter
    status = os.open(f"/proc/self/task/{threading.get_native_id()}/status", os.O_RDONLY)
    text = ctypes.create_string_buffer(4096)
    main = threading.get_ident()
    before = sys.getswitchinterval()

    def send() -> None:
        for _ in range(2):
            signal.pthread_kill(main, signal.SIGUSR1)
            libc.pread(status, text, len(text) - 1, 0)
            while _in(text.value.decode(), "SigPnd"):
                libc.pread(status, text, len(text) - 1, 0)

    with Signals(signal.SIGUSR1) as signals, signals.listening():
        sys.setswitchinterval(60)
        try:
            thread = threading.Thread(target=send)
            thread.start()
            with trio.fail_after(SECONDS):
                assert await signals.wait() == signal.SIGUSR1
                assert await signals.wait() == signal.SIGUSR1
        finally:
            sys.setswitchinterval(before)
            thread.join()
            os.close(status)


def test_what_is_ignored_stays_so_in_other_commands(tmp_path: Path) -> None:
    """As of a command that a shell's script runs in the background."""
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    code += WHILE_IMPORTING.format(module="typer", numbers=[int(signal.SIGINT)])
    with program(code, "--version", cwd=tmp_path) as process:
        said, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0
    assert said.startswith(b"pgguard ")


def test_a_command_that_waits_for_a_reader_can_be_ended(tmp_path: Path) -> None:
    reader, writer = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(writer, False)
    written = 0
    try:
        while True:
            written += os.write(writer, bytes(4096))
    except BlockingIOError:
        os.set_blocking(writer, True)
    command = [sys.executable, "-m", "pgguard", "explain"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=writer, stderr=subprocess.PIPE) as process:
        try:
            call = Path(f"/proc/{process.pid}/syscall")
            deadline = time.monotonic() + SECONDS
            while not call.read_text().startswith("1 0x1 "):  # write to 1
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=SECONDS)
        finally:
            process.kill()
            os.close(reader)
            os.close(writer)
    assert (process.returncode, said) == (-signal.SIGINT, b"")
