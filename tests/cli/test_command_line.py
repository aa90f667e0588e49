"""The command line as people expect it: version, help with examples, completion, exit statuses, progress."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import pytest

from pgguard.cli.explain import software_names
from pgguard.cli.progress import progress
from pgguard.cli.statuses import STATUSES
from pgguard.compiled import form
from pgguard.faults.policy import Mode
from pgguard.session.verdicts import Kind
from tests.cli.pasted import pasted
from tests.proxy.spawned import environment, run

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMANDS = ("serve", "run", "report", "demo", "explain", "doctor")


def test_version(tmp_path: Path) -> None:
    done = run("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"pgguard {version('pgguard')} ({form()})\n", "")


@pytest.fixture(scope="module")
def helps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The help text of each command, and under an empty name that of all."""
    directory = tmp_path_factory.mktemp("helps")
    found = {}
    for command in ("", *COMMANDS):
        done = run(*command.split(), "--help", cwd=directory, variables={"COLUMNS": "80"})
        assert (done.returncode, done.stderr) == (0, "")
        found[command] = done.stdout
    return found


def test_what_runs_a_guard_is_loaded_only_by_what_runs_one() -> None:
    """Each press of the tab key starts a process that reads the command line and nothing else."""
    code = "import sys, pgguard.cli.main; sys.exit('trio' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("command", ["", "serve"])
def test_a_short_option_for_help(command: str, helps: dict[str, str], tmp_path: Path) -> None:
    done = run(*command.split(), "-h", cwd=tmp_path, variables={"COLUMNS": "80"})
    assert (done.returncode, done.stdout) == (0, helps[command])


def test_the_help_names_the_variable_of_each_option(helps: dict[str, str]) -> None:
    names = ("upstream", "listen", "mode", "faults", "config", "attribution", "sql", "evidence-budget", "user")
    for name in names:
        assert f"--{name}" in helps["serve"]
        assert f"PGGUARD_{name.replace('-', '_').upper()}" in helps["serve"]


def test_options_without_a_value_show_none(helps: dict[str, str]) -> None:
    for text in helps.values():
        assert "<bool>" not in text
        assert "[[" not in text


@pytest.mark.parametrize("columns", [40, 60])
def test_a_narrow_terminal_cuts_nothing_off_the_help(columns: int, helps: dict[str, str], tmp_path: Path) -> None:
    done = run("serve", "--help", cwd=tmp_path, variables={"COLUMNS": str(columns)})
    assert "…" not in done.stdout
    words = "".join(done.stdout.split())
    assert all(name in words for name in re.findall(r"--[a-z-]+|PGGUARD_[A-Z_]+", helps["serve"]))
    assert examples(done.stdout) == examples(helps["serve"])


def examples(help_text: str) -> list[str]:
    """What stands under "Examples:", as it is copied from a terminal."""
    text = "\n".join(line.removeprefix(" ").rstrip() for line in help_text.splitlines())
    text = text.partition("Examples:\n")[2].partition("Exit status:")[0]
    return [example.strip() for example in text.split("\n\n") if example.strip()]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_each_help_has_examples(command: str, helps: dict[str, str]) -> None:
    found = examples(helps[command])
    assert found
    assert all(f"pgguard {command}".strip() in example for example in found)
    for line in "\n".join(found).splitlines():
        assert len(line) <= 58, "a narrow terminal would break it, and what is broken can't be pasted"


def test_the_examples_work_as_they_are_pasted(helps: dict[str, str], tmp_path: Path) -> None:
    """But for the demonstration and what may be run behind a guard, which have tests of their own."""
    shown = dict.fromkeys(example for text in helps.values() for example in examples(text))
    found = [example for example in shown if "pgguard run" not in example]
    (tmp_path / "home").mkdir()
    (tmp_path / "home/faults.jsonl").touch()
    said = pasted("\n".join(example for example in found if example != "pgguard demo"), tmp_path)
    assert said.count("pgguard: ready on ") == sum("pgguard serve" in example for example in found) == 3
    assert (tmp_path / "home/faults.jsonl").exists()


def test_the_exit_statuses_are_in_help_and_readme(helps: dict[str, str]) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    for status, meaning in STATUSES:
        assert f"| `{status}` | {meaning} |" in readme
        assert re.search(rf"^ +{re.escape(status)} +{re.escape(meaning.split(';')[0])}", helps[""], re.MULTILINE)


def test_ctrl_c_is_told_by_the_status(tmp_path: Path) -> None:
    code = "from pgguard.cli import main; main.explain = lambda *_: signal.raise_signal(signal.SIGINT); main.main()"
    command = [sys.executable, "-c", f"import signal, sys; sys.argv = ['pgguard', 'explain']; {code}"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=20, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


# Completion


def completed(line: str, cwd: Path, shell: str = "bash") -> list[str]:
    """What the shell is told to offer."""
    words = line.split(" ")
    variables = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), "_PGGUARD_COMPLETE": f"complete_{shell}"}
    variables |= {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    done = run(cwd=cwd, variables=variables)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_completion_of_commands_options_and_values(tmp_path: Path) -> None:
    assert set(COMMANDS) <= set(completed("pgguard ", tmp_path))
    assert completed("pgguard serve --evid", tmp_path) == ["--evidence-budget"]
    assert completed("pgguard serve --mode ", tmp_path) == list(Mode)
    assert completed("pgguard serve --attribution e", tmp_path) == ["ebpf"]
    assert completed("pgguard report x --format ", tmp_path) == ["text", "junit", "github", "sarif"]
    assert completed("pgguard report x --fail-on w", tmp_path) == ["warning"]


def test_completion_waits_for_nothing_that_it_has_no_use_for(tmp_path: Path) -> None:
    """Half of what a guard imports."""
    program = "import sys; import pgguard.cli.main; print({'psycopg', 'pydantic', 'trio'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    assert completed("pgguard explain ", tmp_path) == list(Kind)
    assert completed("pgguard explain unr", tmp_path) == ["unread-answer"]
    assert completed("pgguard explain unread-answer --for ", tmp_path) == software_names()
    assert [line.split("\t")[0] for line in completed("pgguard explain unr", tmp_path, "fish")] == ["unread-answer"]


def test_completion_is_installed_for_the_shell_that_asks(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    script = """
    pgguard --show-completion > shown
    pgguard --install-completion > installed
    source .bash_completions/pgguard.sh
    COMP_WORDS=(pgguard serve --mode re)
    COMP_CWORD=3
    _pgguard_completion pgguard
    echo "${COMPREPLY[*]}"
    """
    variables = environment(HOME=str(tmp_path), PATH=path)
    done = subprocess.run(
        ["bash", "-e", "-c", script],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("reject\n", "")
    assert (tmp_path / "shown").read_text() == (tmp_path / ".bash_completions/pgguard.sh").read_text() + "\n"
    assert "source '" in (tmp_path / ".bashrc").read_text()


# Progress


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, TextIO]]:
    """What a terminal shows, and the file that it is."""
    monkeypatch.setenv("TERM", "xterm-256color")
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with os.fdopen(theirs, "w", encoding="utf-8") as stderr:
        yield ours, stderr
    os.close(ours)


@pytest.mark.parametrize("moving", [True, False])
def test_on_a_terminal_it_says_what_is_going_on_while_it_does(
    terminal: tuple[int, TextIO], monkeypatch: pytest.MonkeyPatch, *, moving: bool
) -> None:
    shows, stderr = terminal
    monkeypatch.setattr(sys, "stderr", stderr)
    with progress("Cooking", moving=moving) as say:
        say("Eating")
    os.set_blocking(shows, False)
    shown = b""
    with suppress(BlockingIOError):
        while True:
            shown += os.read(shows, 65536)
    assert "Eating…".encode() in shown
    assert shown.endswith(b"\x1b[2K"), "the line is gone"


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_what_can_not_move_the_cursor_is_spared(
    terminal: tuple[int, TextIO], term: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shows, stderr = terminal
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("TERM", term)
    with progress("Cooking"):
        pass
    os.set_blocking(shows, False)
    with pytest.raises(BlockingIOError):
        os.read(shows, 1)


def test_elsewhere_it_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    for moving in True, False:
        with progress("Cooking", moving=moving) as say:
            say("Eating")
    assert capfd.readouterr() == ("", "")


def test_a_guard_on_a_terminal_says_that_it_is_starting(tmp_path: Path) -> None:
    """And it gives up its rights all the same, for which it must have started no thread."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        upstream = f"host=127.0.0.1 port={free.getsockname()[1]}"
    command = [sys.executable, "-m", "pgguard", "serve", "--listen", "127.0.0.1:0", "--upstream", upstream]
    variables = environment(TERM="xterm-256color")
    with subprocess.Popen(command, cwd=tmp_path, env=variables, stdin=subprocess.DEVNULL, stderr=theirs) as guard:
        os.close(theirs)
        shown = b""
        while b"ready on" not in shown:
            shown += os.read(ours, 65536)
        guard.send_signal(signal.SIGTERM)
    os.close(ours)
    assert guard.returncode == 0
    assert "pgguard: starting…".encode() in shown
    assert b"rights" not in shown
