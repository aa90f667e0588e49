"""Rights are given up by the whole process, and for good; so each of these is done by a process of its own."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from pgguard.attribution import privileges
from pgguard.attribution.privileges import LOOKING, Right, names, only, raised, rights
from tests.proxy.conftest import short_directory

__all__ = ["short_directory"]

pytestmark = pytest.mark.skipif(not {*LOOKING, Right.CAP_SETPCAP} <= rights(), reason="it takes root's rights")

_PRELUDE = """
import ctypes, json, os, subprocess, sys, threading
from pathlib import Path
from pgguard.attribution import privileges
from pgguard.attribution.privileges import Account, ENTERING, LOOKING, Right, RightsError, give_up, only, raised, rights

def sets(which="self"):
    status = dict(line.split(":\\t", 1) for line in Path(f"/proc/{which}/status").read_text().splitlines())
    kinds = {kind: int(status[kind], 16) for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}
    ids = {kind: status[kind].split() for kind in ("Uid", "Gid", "Groups", "NoNewPrivs")}
    return {**kinds, **ids}

def started():
    "The same, of a program that is started"
    script = "print(open('/proc/self/status').read())"
    text = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, check=True).stdout
    return dict(line.split(":\\t", 1) for line in text.splitlines() if line.startswith("Cap"))

def fails(call):
    try:
        call()
    except OSError as error:
        return error.errno
"""
MASK = sum(1 << right for right in LOOKING)


def _run(script: str) -> Any:
    """What the last line of a script evaluates to."""
    *lines, last = textwrap.dedent(script).strip().splitlines()
    code = "\n".join([_PRELUDE, *lines, f"print(json.dumps({last}))"])
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_root_keeps_what_is_named_and_nothing_else() -> None:
    gone, found = _run(
        """
        before = sets()["CapPrm"]
        gone = give_up(LOOKING)
        [gone == {n for n in range(64) if before >> n & 1} - LOOKING, sets()]
        """
    )
    assert gone is True
    assert (found["CapPrm"], found["CapEff"], found["CapBnd"], found["CapAmb"]) == (MASK, MASK, MASK, 0)
    assert found["Uid"] == ["0"] * 4
    assert found["NoNewPrivs"] == ["1"]


def test_what_root_starts_gets_no_more_back() -> None:
    found = _run(
        """
        give_up(LOOKING, ENTERING)
        started()
        """
    )
    assert int(found["CapEff"], 16) == int(found["CapPrm"], 16) == MASK


def test_an_ordinary_user_has_what_is_named_and_hands_it_on() -> None:
    nobody = pwd.getpwnam("nobody")
    found, child, back, dumpable = _run(
        f"""
        give_up(LOOKING, (), Account("nobody", {nobody.pw_uid}, {nobody.pw_gid}))
        back = [fails(lambda: os.setuid(0)), fails(lambda: os.setgroups([0])), fails(lambda: open("/etc/x", "w"))]
        [sets(), started(), back, ctypes.CDLL(None).prctl(3)]
        """
    )
    assert found["Uid"] == [str(nobody.pw_uid)] * 4
    assert found["Gid"] == [str(nobody.pw_gid)] * 4
    assert "0" not in found["Groups"]
    assert (found["CapPrm"], found["CapEff"], found["CapBnd"], found["CapAmb"]) == (MASK, MASK, MASK, MASK)
    assert int(child["CapEff"], 16) == MASK
    assert back == [1, 1, 13], "EPERM, EPERM, EACCES"
    assert dumpable == 0


def test_threads_that_are_started_later_have_no_more() -> None:
    found = _run(
        """
        give_up(LOOKING, ENTERING)
        found = []
        def run():
            own = f"self/task/{threading.get_native_id()}"
            found.append(sets(own)["CapEff"])
            with raised(Right.CAP_SYS_ADMIN):
                found.append(sets(own)["CapEff"])
            found.append(sets(own)["CapEff"])
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        [found, sets()["CapEff"], sets()["CapBnd"]]
        """
    )
    admin = 1 << Right.CAP_SYS_ADMIN
    assert found == [[MASK, MASK | admin, MASK], MASK, MASK]


def test_with_threads_it_is_refused_as_they_would_keep_theirs() -> None:
    said, same = _run(
        """
        privileges._ALONE = 0.05
        before = sets()
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        said = None
        try:
            give_up(LOOKING)
        except RightsError as error:
            said = str(error)
        [said, sets() == before]
        """
    )
    assert said.startswith("threads have been started already: ")
    assert same is True


def test_threads_that_are_about_to_end_are_waited_for() -> None:
    assert (
        _run(
            """
        threading.Timer(0.2, lambda: None).start()
        give_up(LOOKING)
        sets()["CapPrm"]
        """
        )
        == MASK
    )


def test_what_it_has_not_it_does_not_get() -> None:
    found = _run(
        """
        give_up([Right.CAP_SYS_PTRACE])
        give_up(LOOKING, ENTERING)
        sets()
        """
    )
    assert found["CapPrm"] == 1 << Right.CAP_SYS_PTRACE


def test_without_the_right_to_change_the_user_it_is_an_error() -> None:
    said = _run(
        """
        give_up(LOOKING)
        said = None
        try:
            give_up(LOOKING, (), Account("nobody", 65534, 65534))
        except RightsError as error:
            said = str(error)
        said
        """
    )
    assert said == "Operation not permitted"


def test_one_thread_can_do_without_for_a_while() -> None:
    before = rights()
    with only(LOOKING):
        assert rights() == LOOKING
        with raised(Right.CAP_SETPCAP):
            assert rights() == {*LOOKING, Right.CAP_SETPCAP}
        assert rights() == LOOKING
    assert rights() == before


def test_they_are_named() -> None:
    assert names([Right.CAP_SYS_PTRACE, Right.CAP_BPF, 60]) == "CAP_BPF, CAP_SYS_PTRACE and capability 60"
    assert privileges.has_any()


def test_what_is_kept_in_reserve_enters_other_network_namespaces() -> None:
    """As the guard goes about it, in a thread of its own."""
    if Right.CAP_SYS_ADMIN not in rights():
        pytest.skip("it takes CAP_SYS_ADMIN")
    with_it, without = (
        _run(
            f"""
            from pgguard.attribution import namespaces
            from pgguard.attribution.capabilities import _try_network_namespaces
            namespaces.TABLE_LIMIT = 1 << 24  # other tests leave thousands of sockets in TIME-WAIT for a minute
            give_up(LOOKING, {reserve})
            _try_network_namespaces()
            """
        )
        for reserve in ("ENTERING", "()")
    )
    assert with_it is None
    assert without == "finds TCP clients in containers of this host, but slowly (milliseconds) without CAP_SYS_ADMIN"


class TestWhatTakesWhat:
    """What may be seen of another user's process, with which rights: why these two are kept."""

    @pytest.mark.parametrize(
        ("kept", "seen"),
        [
            ((), set()),
            ((Right.CAP_SYS_PTRACE,), {"maps", "exe", "ns/net"}),
            ((Right.CAP_DAC_READ_SEARCH,), set()),
            (tuple(LOOKING), {"fd", "maps", "exe", "mem", "task", "ns/net"}),
        ],
        ids=["neither", "ptrace", "search", "both"],
    )
    def test_it(self, kept: tuple[Right, ...], seen: set[str]) -> None:
        with subprocess.Popen(
            ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(b"x")
            process.stdin.flush()
            process.stdout.read(1)  # it has changed its user
            with only(kept):
                assert {what for what in _LOOKS if _can(what, process.pid)} == seen
            process.stdin.close()


_LOOKS = ("fd", "maps", "exe", "mem", "task", "ns/net")


def _can(what: str, pid: int) -> bool:
    path = Path(f"/proc/{pid}/{what}")
    try:
        match what:
            case "fd":
                (path / "0").readlink()
            case "exe" | "ns/net":
                path.readlink()
            case "task":
                (path / str(pid) / "syscall").read_bytes()
            case "mem":
                os.close(os.open(path, os.O_RDONLY))
            case _:
                path.read_bytes()
    except PermissionError:
        return False
    return True


@pytest.mark.parametrize("kept", ["LOOKING", "[]"])
def test_py_spy_in_a_directory_that_the_user_may_not_enter(kept: str, tmp_path: Path) -> None:
    """With what a guard keeps it is found and run; without, it is said what is in the way."""
    nobody = pwd.getpwnam("nobody")
    directory = tmp_path / "closed"
    directory.mkdir(mode=0o700)
    program = directory / "py-spy"
    program.write_text("#!/bin/sh\necho ran\n")
    program.chmod(0o755)
    found, ran, lack = _run(
        f"""
        from pgguard.attribution import stacks
        sys.executable = "/nowhere/python"
        os.environ["PATH"] = {str(directory)!r}
        give_up({kept}, (), Account("nobody", {nobody.pw_uid}, {nobody.pw_gid}))
        found = stacks.find_py_spy()
        ran = None if found is None else subprocess.run([found], capture_output=True, text=True, env={{}}).stdout
        [found, ran, stacks.lack_of_py_spy()]
        """
    )
    if kept == "LOOKING":
        assert (found, ran) == (str(program), "ran\n")
        return
    closed = next(one for one in reversed(program.parents) if not one.stat().st_mode & 0o001)
    assert (found, ran) == (None, None)
    assert lack == [
        f"py-spy is not installed, unless it is in {directory}: user nobody can't enter {closed}",
        "pip install 'pgguard[stacks]' where user nobody can run it",
    ]


def test_py_spy_that_the_user_may_not_execute(short_directory: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    short_directory.chmod(0o755)
    program = short_directory / "py-spy"
    program.touch()
    program.chmod(0o744)
    found, lack = _run(
        f"""
        from pgguard.attribution import stacks
        sys.executable = "/nowhere/python"
        os.environ["PATH"] = {str(short_directory)!r}
        before = stacks.find_py_spy()
        give_up(LOOKING, (), Account("nobody", {nobody.pw_uid}, {nobody.pw_gid}))
        [[before, stacks.find_py_spy()], stacks.lack_of_py_spy()]
        """
    )
    assert found == [str(program), None]
    assert lack == [f"py-spy at {program} is not used: user nobody can't execute it", f"chmod a+rx {program}"]
