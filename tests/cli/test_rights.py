"""What a guard may do that others may not, from when it is ready on: ``--user``, and what root gives up."""

from __future__ import annotations

import os
import pwd
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pgguard import running
from pgguard.attribution.ebpf.probe import ProbeUnavailable, SenderProbe
from pgguard.attribution.privileges import ENTERING, LOOKING, Account, Right, rights
from pgguard.faults.docket import Docket
from pgguard.proxy.errors import ConfigurationError
from pgguard.proxy.guard import Guard
from pgguard.proxy.settings import Settings
from pgguard.proxy.upstream import barred
from pgguard.reporting.sinks import Fanout
from tests.cli.conftest import Refused
from tests.proxy.conftest import backend
from tests.proxy.fake_backend import converse, part
from tests.proxy.messages import COLUMNS
from tests.proxy.spawned import Spawned, environment, spawned
from tests.servers import is_open_to_others

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.proxy.fake_backend import FakeBackend

__all__ = ["backend"]

NOBODY = pwd.getpwnam("nobody")
UPSTREAM = "host=127.0.0.1 port=1"

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not {*LOOKING, Right.CAP_SETPCAP} <= rights() or not is_open_to_others(),
    reason="it takes root's rights, and an installation that others can run",
)


def _threads(guard: Spawned) -> list[dict[str, list[str]]]:
    """What ``/proc`` says of each thread."""
    return [
        {line.split(":")[0]: line.split(":", 1)[1].split() for line in (task / "status").read_text().splitlines()}
        for task in Path(f"/proc/{guard.pid}/task").iterdir()
    ]


def _capabilities(thread: dict[str, list[str]], kind: str) -> set[int]:
    mask = int(thread[kind][0], 16)
    return {number for number in range(64) if mask >> number & 1}


@contextmanager
def _wrapped(wrapper: list[str], *options: str, cwd: Path) -> Iterator[Spawned]:
    """Run a guard by way of another program, which changes what it may do."""
    command = [*wrapper, sys.executable, "-m", "pgguard", "serve", "--listen", "127.0.0.1:0", *options]
    with subprocess.Popen(command, cwd=cwd, env=environment(), stderr=subprocess.PIPE) as process:
        try:
            yield Spawned(process)
        finally:
            if process.poll() is None:
                process.kill()


def _end(guard: Spawned) -> str:
    guard.signal(signal.SIGTERM)
    return guard.end()


async def _converse(guard: Spawned, backend: FakeBackend) -> None:
    client, server = await backend.session(guard.port)
    await converse(client, server)
    await part(client, server)


@needs_root
async def test_root_keeps_what_it_looks_with_on_all_threads(backend: FakeBackend, tmp_path: Path) -> None:
    with spawned(f"host=127.0.0.1 port={backend.port} sslmode=disable", cwd=tmp_path) as guard:
        await _converse(guard, backend)
        found = _threads(guard)
        said = _end(guard)
    assert len(found) > 1
    for thread in found:
        assert [_capabilities(thread, kind) for kind in ("CapPrm", "CapEff", "CapBnd")] == [LOOKING] * 3
        assert thread["NoNewPrivs"] == ["1"]
    assert "keeps more rights" not in said
    assert "1 session, no faults" in said


@needs_root
async def test_as_a_containers_root_it_does_with_what_it_has(backend: FakeBackend, tmp_path: Path) -> None:
    """Docker gives CAP_DAC_OVERRIDE to root, and not the weaker CAP_DAC_READ_SEARCH."""
    wrapper = ["setpriv", "--bounding-set=-dac_read_search"]
    upstream = f"host=127.0.0.1 port={backend.port} sslmode=disable"
    with _wrapped(wrapper, "--user", "nobody", "--upstream", upstream, cwd=tmp_path) as guard:
        await _converse(guard, backend)
        found = _threads(guard)
        said = _end(guard)
    for thread in found:
        assert _capabilities(thread, "CapEff") == {Right.CAP_SYS_PTRACE, Right.CAP_DAC_OVERRIDE}
    for missing in "waiting threads", "Python stacks":
        assert missing not in said


@needs_root
def test_for_neighbours_it_keeps_in_reserve_what_enters_their_namespaces(tmp_path: Path) -> None:
    with spawned(UPSTREAM, "--listen", "0.0.0.0:0", cwd=tmp_path) as guard:
        found = _threads(guard)
        _end(guard)
    for thread in found:
        assert _capabilities(thread, "CapPrm") == (LOOKING | ENTERING) & rights()
        assert _capabilities(thread, "CapEff") == _capabilities(thread, "CapBnd") == LOOKING


@needs_root
def test_without_attribution_it_keeps_nothing(tmp_path: Path) -> None:
    with spawned(UPSTREAM, "--attribution", "off", cwd=tmp_path) as guard:
        found = _threads(guard)
        _end(guard)
    assert all(_capabilities(thread, "CapPrm") == set() for thread in found)


@needs_root
@pytest.mark.parametrize("by", ["option", "environment", "file"])
async def test_it_becomes_another_user_on_all_threads(by: str, backend: FakeBackend, tmp_path: Path) -> None:
    """With that user's groups, nothing of root's but what it looks with, and no way back; sessions go on as ever."""
    if by == "file":
        (tmp_path / "pgguard.toml").write_text("user = 'nobody'\n")
    options = ["--user", "nobody"] if by == "option" else []
    in_environment = "nobody" if by == "environment" else ""
    faults = tmp_path / "faults.jsonl"
    upstream = f"host=127.0.0.1 port={backend.port} sslmode=disable"
    with spawned(upstream, *options, "--faults", str(faults), cwd=tmp_path, PGGUARD_USER=in_environment) as guard:
        await _converse(guard, backend)
        found = _threads(guard)
        not_dumpable = _owner(guard.pid)
        client, server = await backend.session(guard.port)
        await server.send(COLUMNS)
        await client.expect(COLUMNS)
        await client.close()
        await server.close()
        said = _end(guard)
    for thread in found:
        assert thread["Uid"] == [str(NOBODY.pw_uid)] * 4
        assert thread["Gid"] == [str(NOBODY.pw_gid)] * 4
        assert thread["Groups"] == [str(NOBODY.pw_gid)]
        assert [_capabilities(thread, kind) for kind in ("CapPrm", "CapEff", "CapBnd", "CapAmb")] == [LOOKING] * 4
        assert thread["NoNewPrivs"] == ["1"]
    assert not_dumpable == 0
    assert "Python stacks" not in said
    assert "message-while-idle" in _read(faults), "into a directory that is root's"


def _owner(pid: int) -> int:
    """Of what ``/proc`` shows of a process, which is root's if it isn't dumpable: proc(5)."""
    return Path(f"/proc/{pid}/environ").stat().st_uid


def _read(path: Path) -> str:
    return path.read_text()


@needs_root
async def test_an_evidence_that_it_insists_on_is_tried_with_the_rights_that_it_keeps(
    backend: FakeBackend, tmp_path: Path
) -> None:
    try:
        SenderProbe([]).close()
    except ProbeUnavailable as unavailable:
        pytest.skip(str(unavailable))
    options = ["--user", "nobody", "--attribution", "ebpf", "--listen", "0.0.0.0:0"]
    with spawned(f"host=127.0.0.1 port={backend.port} sslmode=disable", *options, cwd=tmp_path) as guard:
        await _converse(guard, backend)
        said = _end(guard)
    assert "here: kernel senders on TCP" not in said
    assert "of its senders" not in said


@needs_root
def test_a_socket_that_it_may_not_remove_any_more_is_left_for_the_next_one(short_directory: Path) -> None:
    """The directory is root's."""
    for _ in range(2):
        with spawned(UPSTREAM, "--user", "nobody", "--listen", f"unix:{short_directory}", cwd=short_directory) as guard:
            assert "Traceback" not in _end(guard)
        assert (short_directory / ".s.PGSQL.5432").is_socket()


@needs_root
def test_a_socket_in_its_own_directory_is_removed(short_directory: Path) -> None:
    os.chown(short_directory, NOBODY.pw_uid, NOBODY.pw_gid)
    with spawned(UPSTREAM, "--user", "nobody", "--listen", f"unix:{short_directory}", cwd=short_directory) as guard:
        said = _end(guard)
    assert not (short_directory / ".s.PGSQL.5432").exists()
    assert f"can replace the socket unix:{short_directory}:5432, because it belongs to user nobody: " in said


@pytest.mark.parametrize(
    ("user", "says"),
    [
        ("mallory", "--user mallory: there is no such user: create it (useradd --system), or name another"),
        ("root", "--user root: that is root: name an ordinary user, preferably one just for pgguard"),
        ("a\0b", "there is no such user"),
    ],
    ids=["unknown", "root", "nonsense"],
)
@needs_root
def test_who_is_nobody_to_become(user: str, says: str, refused: Refused) -> None:
    refused("serve", "--user", user, says=says)


def test_only_root_can_become_another(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    says = "--user nobody: only root can become another user: start pgguard as root, or leave --user out"
    refused("serve", "--user", "nobody", says=says)


@needs_root
def test_root_without_the_right_to_become_another(tmp_path: Path) -> None:
    command = ["setpriv", "--bounding-set=-setuid", sys.executable, "-m", "pgguard", "serve", "--user", "nobody"]
    command += ["--listen", "127.0.0.1:0", "--upstream", UPSTREAM]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "pgguard: --user nobody: Operation not permitted: to change users pgguard needs CAP_SETUID, "
        "CAP_SETGID and CAP_SETPCAP\n"
    )


# A program that runs a guard within itself

HOST = """
import sys, threading
import trio
from pgguard.proxy.settings import Settings
from pgguard.reporting.sinks import Fanout
from pgguard.running import running_guard

def rights():
    with open("/proc/thread-self/status") as file:
        return [line for line in file if line.startswith(("Cap", "NoNewPrivs", "Uid", "Groups"))]

async def guard():
    settings = Settings(upstream="host=127.0.0.1 port=1", listen=["127.0.0.1:0"])
    async with running_guard(settings, Fanout([], complain=print)):
        assert rights() == before

before = rights()
if "thread" in sys.argv:
    # An exception in a thread ends nothing, but is said on standard error.
    thread = threading.Thread(target=trio.run, args=(guard,))
    thread.start()
    thread.join()
else:
    trio.run(guard)
assert rights() == before
"""


@needs_root
@pytest.mark.parametrize("where", ["main", "thread"])
def test_a_program_that_runs_a_guard_within_itself_keeps_its_rights(where: str, tmp_path: Path) -> None:
    """What it starts later has them as well; and nothing is said of rights that the guard was never to give up."""
    done = subprocess.run(
        [sys.executable, "-c", HOST, where],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "rights" not in done.stderr
    assert "Traceback" not in done.stderr


# The server's own Unix socket


@contextmanager
def _server_socket(directory: Path, mode: int) -> Iterator[str]:
    """One that root may connect to for being root alone, as where the server's ``unix_socket_permissions`` are 0700."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(directory / ".s.PGSQL.1"))
        (directory / ".s.PGSQL.1").chmod(mode)
        os.chown(directory / ".s.PGSQL.1", 1, 1)
        server.listen()
        yield f"host={directory} port=1"


@needs_root
@pytest.mark.parametrize("attribution", ["auto", "off"])
def test_root_keeps_what_it_takes_to_connect_to_the_server(attribution: str, short_directory: Path) -> None:
    kept = LOOKING if attribution == "auto" else set()
    for mode, more in ((0o777, set()), (0o700, {Right.CAP_DAC_OVERRIDE})):
        directory = short_directory / f"{mode:o}"
        directory.mkdir()
        with (
            _server_socket(directory, mode) as upstream,
            spawned(upstream, "--attribution", attribution, cwd=short_directory) as guard,
        ):
            found = _threads(guard)
            _end(guard)
        assert all(_capabilities(thread, "CapPrm") == {*kept, *more} for thread in found)


@needs_root
def test_whom_the_server_lets_nobody_in_for_can_not_be_become(short_directory: Path) -> None:
    with _server_socket(short_directory, 0o770) as upstream:
        command = [sys.executable, "-m", "pgguard", "serve", "--user", "nobody", "--listen", "127.0.0.1:0"]
        done = subprocess.run(
            [*command, "--upstream", upstream],
            cwd=short_directory,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"pgguard: --user nobody: this user can't connect to the server at unix:{short_directory}:1: add it to the "
        "socket's group, or name the server's TCP address in --upstream\n"
    )


def test_whose_socket_may_be_connected_to_is_told_by_its_mode(short_directory: Path) -> None:
    upstream = Settings(upstream=f"host={short_directory} port=1").server()
    assert barred(upstream) == [], "it isn't there yet"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(short_directory / ".s.PGSQL.1"))
        path = short_directory / ".s.PGSQL.1"
        for mode, closed in ((0o777, False), (0o700, False), (0o577, True)):
            path.chmod(mode)
            assert bool(barred(upstream)) is closed
        path.chmod(stat.S_IWGRP)
        if os.geteuid() == 0:
            os.chown(path, 1, os.getegid())
            assert barred(upstream) == []
            os.chown(path, 1, 54321)
            assert barred(upstream) != []
    assert barred(Settings(upstream="host=127.0.0.1,@abstract port=1,2").server()) == []


# Where the code is


def test_a_user_that_may_not_read_the_guards_own_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    guard = Guard(Settings(upstream=UPSTREAM), sinks=Fanout([], complain=print), docket=Docket(), witness=None)
    with pytest.raises(ConfigurationError, match=r"this user can't read .*: install pgguard where it can"):
        running._check_reach(guard, Account("nobody", 1, 1))


def test_a_guard_without_rights_has_none_to_give_up() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become nobody")
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        wrapper = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all"]
        tried = subprocess.run(
            [*wrapper, sys.executable, "-c", "import pgguard"], check=False, capture_output=True, cwd=name
        )
        if tried.returncode:
            pytest.skip("the installation is where only root may read")
        command = [
            *wrapper,
            sys.executable,
            "-m",
            "pgguard",
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--upstream",
            UPSTREAM,
        ]
        with subprocess.Popen(command, cwd=name, env=environment(), stderr=subprocess.PIPE) as process:
            guard = Spawned(process)
            found = _threads(guard)
            said = _end(guard)
    assert "rights" not in said
    assert all(thread["NoNewPrivs"] == ["0"] for thread in found), "py-spy may have rights of its own"
