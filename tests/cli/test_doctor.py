"""``pgguard doctor``: what it prints is for people and programs, and its exit status for scripts."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pgguard import running
from pgguard.attribution.capabilities import KERNEL_SENDERS, Capability
from pgguard.attribution.ebpf.probe import ProbeUnavailable, SenderProbe
from pgguard.attribution.transparency import Comparison
from pgguard.cli import doctor as command
from pgguard.cli.doctor import doctor
from pgguard.cli.main import main
from pgguard.compiled import Form, form
from pgguard.proxy.errors import ConfigurationError
from pgguard.proxy.settings import Settings
from tests.proxy.conftest import backend
from tests.proxy.fake_backend import converse, part
from tests.proxy.spawned import Spawned, environment, run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.proxy.fake_backend import FakeBackend

__all__ = ["backend"]

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
COMPILED = Form(("pgguard.session.ledger", "pgguard.session.tracker"), (), stale=False)
HINT = "instead of a TCP port"


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("FORCE_COLOR", raising=False)


def _say(
    *capabilities: Capability,
    form: Form = COMPILED,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> tuple[int, str]:
    monkeypatch.setattr(command, "check", lambda: capabilities)
    monkeypatch.setattr(command, "form", lambda: form)
    status = doctor(as_json=False)
    return status, capsys.readouterr().out


def test_on_this_machine(tmp_path: Path) -> None:
    done = run("doctor", cwd=tmp_path, variables={"COLUMNS": "80"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout, "colours are for terminals"
    assert max(map(len, done.stdout.splitlines())) <= 80
    names = "/proc", "sock_diag for TCP", KERNEL_SENDERS, "kernel senders on TCP", "waiting threads", "Python stacks"
    for name in (*names, "fork events"):
        assert f" {name}: " in done.stdout
    said = " ".join(done.stdout.split())
    assert "To see other users' processes the guard needs CAP_DAC_READ_SEARCH and CAP_SYS_PTRACE." in said
    assert "A guard that is started as root gives up every other capability, except" in said


def test_the_same_as_json(tmp_path: Path) -> None:
    done = run("doctor", "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    checked = json.loads(done.stdout)
    assert {"name", "available", "essential", "purpose", "problem", "remedy", "unix_instead", "rights"} == set(
        checked[0]
    )
    [compiled] = [one for one in checked if one["name"] == "compiled code"]
    assert compiled["available"] == (str(form()) == "compiled by mypyc")
    rights = {one["name"]: one["rights"] for one in checked}
    assert rights["waiting threads"] == ["CAP_DAC_READ_SEARCH", "CAP_SYS_PTRACE"]
    assert rights["kernel senders on TCP"] == ["CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON"]
    assert rights["fork events"] == ["CAP_NET_ADMIN"]
    assert rights["/proc"] == []
    essential = [one for one in checked if one["essential"]]
    assert essential
    assert all(one["available"] for one in essential)


def test_nothing_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = _say(PROC, SENDERS, monkeypatch=monkeypatch, capsys=capsys)
    assert status == 0
    assert [line.rstrip() for line in said.splitlines()] == [
        "ok  /proc: names processes",
        "ok  kernel senders on Unix sockets: names senders",
        "ok  compiled code: follows and forwards messages at a fraction of the CPU time",
        "",
        "Everything works.",
    ]


@pytest.mark.parametrize(
    ("form", "problem"),
    [
        (Form((), COMPILED.compiled, stale=False), "pgguard is pure Python"),
        (
            Form(COMPILED.compiled[:1], COMPILED.compiled[1:], stale=False),
            "pgguard is compiled by mypyc, but for pgguard.session.tracker",
        ),
        (
            Form(COMPILED.compiled, (), stale=True),
            "pgguard is compiled by mypyc, from sources that have changed since",
        ),
    ],
    ids=["pure", "mixed", "stale"],
)
def test_it_says_how_pgguard_was_built(
    form: Form, problem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said = _say(PROC, SENDERS, form=form, monkeypatch=monkeypatch, capsys=capsys)
    assert status == 0
    said = " ".join(said.split())
    assert (
        f"missing compiled code: follows and forwards messages at a fraction of the CPU time problem: {problem} "
        in said
    )
    assert "PGGUARD_BUILD=compiled" in said
    assert said.endswith("Everything essential works. Missing: compiled code.")


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
        "           fix: sysctl kernel.yama.ptrace_scope=0 (it is 1), or run the guard as",
        "           root with CAP_SYS_PTRACE (cap_add: [SYS_PTRACE] in compose)",
        "ok       compiled code: follows and forwards messages at a fraction of the CPU",
        "         time",
        "",
        "Everything essential works. Missing: waiting threads.",
        "If you can't fix that, have the application connect to a Unix socket (--listen",
        "unix:DIR) instead of a TCP port: there the kernel names the sender of every byte",
        "anyway.",
    ]


def test_what_would_harm_a_terminal_is_spelled_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names of processes are in it, and of files."""
    problem = "1 can't be looked at: 5 (\x1b[2J\u202eevil)"
    hidden = Capability("others", "x", essential=False, unix_instead=False, problem=problem, remedy="\x1b]0;y\x07")
    said = _say(PROC, hidden, monkeypatch=monkeypatch, capsys=capsys)[1]
    assert r"5 (\x1b[2J\u202eevil)" in said
    assert r"\x1b]0;y\x07" in said


def test_something_essential_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = _say(PROC, SENDERS, NO_TCP, NO_THREADS, monkeypatch=monkeypatch, capsys=capsys)
    assert status == 1
    said = " ".join(said.split())
    assert "Something essential is missing, so client processes can't be found: sock_diag for TCP." in said
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
    monkeypatch.setattr(running, "check", lambda **_: (PROC, SENDERS, NO_TCP, NO_THREADS))
    assert running._missing_capabilities(Settings(attribution="auto")) == [NO_TCP, NO_THREADS]
    assert running._missing_capabilities(Settings(attribution="off")) == []
    with pytest.raises(ConfigurationError) as raised:
        running._missing_capabilities(Settings(attribution="proc"))
    assert str(raised.value) == (
        "--attribution proc: sock_diag for TCP: no such family; allow it; or use --attribution auto"
    )
    monkeypatch.setattr(running, "check", lambda **_: (PROC, SENDERS, NO_THREADS))
    assert running._missing_capabilities(Settings(attribution="proc")) == [NO_THREADS]


# What keeps the kernel from naming senders on TCP, and what a guard and the doctor make of it

NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all,+dac_read_search"]
"""May read wherever the interpreter is, and nothing else."""
NOBODY.append("--ambient-caps=+dac_read_search")

WITHOUT = pytest.mark.parametrize(
    ("wrapper", "problem", "remedy"),
    [
        pytest.param(
            NOBODY,
            "the guard lacks CAP_NET_ADMIN, CAP_PERFMON, CAP_BPF",
            "run the guard as root, or give it all of CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN",
            id="nobody",
        ),
        pytest.param(
            ["setpriv", "--bounding-set=-net_admin"],
            "the guard lacks CAP_NET_ADMIN",
            "run the guard as root, or give it all of CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN",
            id="one capability",
        ),
        pytest.param(
            ["unshare", "-Ur"],
            "the guard is in a user namespace, where its capabilities don't allow loading BPF programs",
            "run it outside: as root of the host, or in a container that is not rootless",
            id="user namespace",
        ),
        pytest.param(
            ["unshare", "-m", "sh", "-c", 'umount -a -t cgroup2 && exec "$@"', "sh"],
            "no cgroup v2 hierarchy is mounted",
            "mount one: mkdir /run/pgguard-cgroup && mount -t cgroup2 none /run/pgguard-cgroup",
            id="no cgroup v2",
        ),
    ],
)


def _wrapped(wrapper: list[str], *arguments: str, cwd: Path) -> list[str]:
    """The command line, if ``wrapper`` works here and what it leaves can run an interpreter."""
    try:
        tried = subprocess.run(
            [*wrapper, sys.executable, "-c", ""], check=False, capture_output=True, text=True, cwd=cwd, timeout=60
        )
    except OSError as error:
        pytest.skip(str(error))
    if tried.returncode:
        pytest.skip(f"{' '.join(wrapper)}: {tried.stderr.strip()}")
    if os.geteuid() != 0 or "bounding" in wrapper[1] or "-m" in wrapper:
        try:
            SenderProbe([]).close()
        except ProbeUnavailable as unavailable:
            pytest.skip(f"something else is missing here: {unavailable}")
    return [*wrapper, sys.executable, "-m", "pgguard", *arguments]


@WITHOUT
def test_a_guard_that_insists_on_the_probe_says_what_is_missing_and_the_one_thing_to_do(
    wrapper: list[str], problem: str, remedy: str
) -> None:
    with tempfile.TemporaryDirectory() as name:  # that anybody may enter, other than pytest's
        Path(name).chmod(0o755)
        arguments = ("serve", "--listen", "127.0.0.1:0", "--upstream", "host=127.0.0.1 port=1", "--attribution", "ebpf")
        command_line = _wrapped(wrapper, *arguments, cwd=Path(name))
        done = subprocess.run(
            command_line, check=False, cwd=name, env=environment(), capture_output=True, text=True, timeout=60
        )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith(f"pgguard: --attribution ebpf: {problem}; {remedy}")
    assert done.stderr.endswith("; or use --attribution auto\n")
    assert done.stderr.count("\n") == 1


@contextmanager
def _running(wrapper: list[str], backend: FakeBackend) -> Iterator[Spawned]:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        arguments = (
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--upstream",
            f"host=127.0.0.1 port={backend.port} sslmode=disable",
        )
        command_line = _wrapped(wrapper, *arguments, cwd=Path(name))
        with subprocess.Popen(command_line, cwd=name, env=environment(), stderr=subprocess.PIPE) as process:
            try:
                yield Spawned(process)
            finally:
                if process.poll() is None:
                    process.kill()


@WITHOUT
async def test_a_guard_that_may_do_without_the_probe_says_so_and_works(
    wrapper: list[str], problem: str, remedy: str, backend: FakeBackend
) -> None:
    """What is wrong at length is the doctor's to say."""
    with _running(wrapper, backend) as guard:
        client, server = await backend.session(guard.port)
        await converse(client, server)
        await part(client, server)
        guard.signal(signal.SIGTERM)
        said = guard.end()
    [line] = [line for line in said.splitlines() if "kernel senders on TCP" in line]
    assert line.startswith("pgguard: some evidence isn't available here: ")
    assert line.endswith("; run pgguard doctor to see why")
    assert problem not in said
    assert remedy not in said
    assert "1 session, no faults" in said


@WITHOUT
def test_the_doctor_says_the_same_of_the_probe_as_the_guard(wrapper: list[str], problem: str, remedy: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        command_line = _wrapped(wrapper, "doctor", "--json", cwd=Path(name))
        done = subprocess.run(
            command_line, check=False, cwd=name, env=environment(), capture_output=True, text=True, timeout=30
        )
    assert done.stderr == ""
    [checked] = [one for one in json.loads(done.stdout) if one["name"] == "kernel senders on TCP"]
    assert not checked["available"]
    assert not checked["essential"]
    assert checked["unix_instead"]
    assert checked["problem"] == problem
    assert checked["remedy"].startswith(remedy)


class _Probe:
    """One that the kernel of this machine may not be able to give."""

    def __init__(self, *limits: str) -> None:
        self.limits = limits


@pytest.mark.parametrize("limits", [(), ("who opens a connection on TCP the kernel does not say",)])
@pytest.mark.parametrize(
    ("attribution", "comparison", "said"),
    [
        ("auto", Comparison(), None),
        (
            "ebpf",
            Comparison(("FIONREAD", "splice")),
            "on this kernel a watched socket behaves differently from others (FIONREAD, splice)",
        ),
        (
            "ebpf",
            Comparison(problem="no route"),
            "pgguard could not test whether watched sockets behave like others (no route)",
        ),
    ],
)
def test_what_the_probe_can_not_do_here_is_said_at_the_start(
    attribution: str,
    comparison: Comparison,
    said: str | None,
    limits: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    insisted: list[bool] = []

    def start(_: object, *, insist: bool) -> tuple[_Probe, Comparison]:
        insisted.append(insist)
        return _Probe(*limits), comparison

    monkeypatch.setattr(running, "start_probe", start)
    missing: list[Capability] = []
    assert running._start_probe(attribution, [("127.0.0.1", 1)], missing) is not None
    assert insisted == [attribution == "ebpf"]
    assert [one.name for one in missing] == ["some kernel senders on TCP"] * len(limits)
    assert caplog.messages == (
        [] if said is None else [f"clients are watched, as --attribution ebpf demands, although {said}"]
    )


def test_without_a_tcp_listener_no_probe_is_missed() -> None:
    missing: list[Capability] = []
    assert running._start_probe("ebpf", [], missing) is None
    assert running._start_probe("off", [("127.0.0.1", 1)], missing) is None
    assert missing == []


def test_insisting_on_what_proc_gives_is_part_of_insisting_on_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "check", lambda **_: (PROC, SENDERS, NO_TCP))
    with pytest.raises(ConfigurationError, match=re.escape("--attribution ebpf: sock_diag for TCP: no such family")):
        running._missing_capabilities(Settings(attribution="ebpf"))


def test_what_tls_clients_are_offered(tmp_path: Path) -> None:
    variables = {"PGGUARD_UPSTREAM": "host=127.0.0.1 port=1"}
    assert "TLS for clients" not in run("doctor", cwd=tmp_path, variables=variables).stdout
    variables |= {"PGGUARD_TLS_CERT": "self-signed"}
    said = json.loads(run("doctor", "--json", cwd=tmp_path, variables=variables).stdout)
    [offered] = [one for one in said if one["name"] == "TLS for clients"]
    assert offered["available"] is True
    assert offered["purpose"].endswith(", with a certificate of pgguard's own (self-signed)")
    variables |= {"PGGUARD_TLS_CERT": "nowhere.pem", "PGGUARD_TLS_KEY": "nowhere.key"}
    said = json.loads(run("doctor", "--json", cwd=tmp_path, variables=variables).stdout)
    [offered] = [one for one in said if one["name"] == "TLS for clients"]
    assert (offered["available"], offered["essential"]) == (False, True)
    assert "nowhere.pem" in offered["problem"]
    assert offered["remedy"]
    done = run("doctor", cwd=tmp_path, variables=variables)
    assert done.returncode == 1
    assert "essential is missing, so pgguard serve doesn't start: TLS for clients." in done.stdout
