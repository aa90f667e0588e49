"""``pgguard doctor``: what it prints is for people and programs, and its exit status for scripts."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest

from pgguard.attribution.capabilities import KERNEL_SENDERS, Capability
from pgguard.cli import doctor as command
from pgguard.cli import serve
from pgguard.cli.doctor import doctor
from pgguard.cli.main import main
from pgguard.proxy.errors import ConfigurationError
from pgguard.proxy.settings import Settings
from tests.proxy.spawned import run

if TYPE_CHECKING:
    from pathlib import Path

PROC = Capability("/proc", "names processes", essential=True, unix_instead=False)
SENDERS = Capability(KERNEL_SENDERS, "names senders", essential=False, unix_instead=False)
NO_TCP = Capability(
    "sock_diag for TCP", "finds sockets", essential=True, unix_instead=True, problem="no such family", remedy="allow it"
)
NO_THREADS = Capability(
    "waiting threads",
    "tells which threads wait",
    essential=False,
    unix_instead=True,
    problem="the guard has no ptrace rights over it",
    remedy="sysctl kernel.yama.ptrace_scope=0 (it is 1), or run the guard as root with CAP_SYS_PTRACE "
    "(cap_add: [SYS_PTRACE] in compose)",
)
HINT = "Unix socket instead of a TCP port"


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("FORCE_COLOR", raising=False)


def _say(
    *capabilities: Capability, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    monkeypatch.setattr(command, "check", lambda: capabilities)
    status = doctor(as_json=False)
    return status, capsys.readouterr().out


def test_on_this_machine(tmp_path: Path) -> None:
    done = run("doctor", cwd=tmp_path, variables={"COLUMNS": "80"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout, "colours are for terminals"
    assert max(map(len, done.stdout.splitlines())) <= 80
    for name in "/proc", "sock_diag for TCP", KERNEL_SENDERS, "waiting threads", "Python stacks":
        assert f" {name}: " in done.stdout


def test_the_same_as_json(tmp_path: Path) -> None:
    done = run("doctor", "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    checked = json.loads(done.stdout)
    assert {"name", "available", "essential", "purpose", "problem", "remedy", "unix_instead"} == set(checked[0])
    essential = [one for one in checked if one["essential"]]
    assert essential
    assert all(one["available"] for one in essential)


def test_nothing_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = _say(PROC, SENDERS, monkeypatch=monkeypatch, capsys=capsys)
    assert status == 0
    assert [line.rstrip() for line in said.splitlines()] == [
        "ok  /proc: names processes",
        "ok  kernel senders on Unix sockets: names senders",
        "",
        "Nothing is missing.",
    ]


def test_something_missing_that_is_not_essential(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said = _say(PROC, SENDERS, NO_THREADS, monkeypatch=monkeypatch, capsys=capsys)
    assert status == 0
    assert [line.rstrip() for line in said.splitlines()] == [
        "ok       /proc: names processes",
        "ok       kernel senders on Unix sockets: names senders",
        "missing  waiting threads: tells which threads wait",
        "           problem: the guard has no ptrace rights over it",
        "           to do: sysctl kernel.yama.ptrace_scope=0 (it is 1), or run the guard",
        "           as root with CAP_SYS_PTRACE (cap_add: [SYS_PTRACE] in compose)",
        "",
        "Everything essential is there. Missing: waiting threads.",
        "Or give the application a Unix socket instead of a TCP port (--listen unix:DIR):",
        "there the kernel names the sender of every byte, whatever is missing of waiting",
        "threads.",
    ]


def test_something_essential_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = _say(PROC, SENDERS, NO_TCP, NO_THREADS, monkeypatch=monkeypatch, capsys=capsys)
    assert status == 1
    said = " ".join(said.split())
    assert "Something essential is missing, without which clients can't be found: sock_diag for TCP." in said
    assert HINT in said


def test_a_unix_socket_is_not_recommended_where_it_would_not_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_senders = Capability(KERNEL_SENDERS, "x", essential=False, unix_instead=False, problem="y", remedy="z")
    assert HINT not in _say(PROC, no_senders, NO_TCP, monkeypatch=monkeypatch, capsys=capsys)[1]
    no_stacks = Capability("Python stacks", "x", essential=False, unix_instead=False, problem="y", remedy="z")
    assert HINT not in _say(PROC, SENDERS, no_stacks, monkeypatch=monkeypatch, capsys=capsys)[1]


def test_the_command_ends_with_its_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "check", lambda: (NO_TCP,))
    for arguments in [], ["--json"]:
        monkeypatch.setattr(sys, "argv", ["pgguard", "doctor", *arguments])
        with pytest.raises(SystemExit) as raised:
            main()
        assert raised.value.code == 1
    assert "no such family" in capsys.readouterr().out


def test_a_guard_does_without_what_is_missing_unless_it_is_told_to_insist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "check", lambda: (PROC, SENDERS, NO_TCP, NO_THREADS))
    assert serve._missing_capabilities(Settings(attribution="auto")) == [NO_TCP, NO_THREADS]
    assert serve._missing_capabilities(Settings(attribution="off")) == []
    with pytest.raises(ConfigurationError) as raised:
        serve._missing_capabilities(Settings(attribution="proc"))
    assert str(raised.value) == (
        "--attribution proc: sock_diag for TCP: no such family; allow it; or use --attribution auto"
    )
    monkeypatch.setattr(serve, "check", lambda: (PROC, SENDERS, NO_THREADS))
    assert serve._missing_capabilities(Settings(attribution="proc")) == [NO_THREADS]
