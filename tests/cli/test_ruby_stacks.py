"""What ``pgguard run --ruby-stacks`` adds to a command's environment, and when it can't. That takes no server."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pgguard.attribution.ruby.loading import FILE
from pgguard.attribution.ruby.pipes import RubyPipes
from pgguard.cli import run as cli_run
from pgguard.proxy.errors import ConfigurationError
from pgguard.proxy.settings import Settings
from pgguard.reporting.sinks import Fanout
from pgguard.running import running_guard
from tests.proxy.spawned import SECONDS, environment

NOWHERE = "postgresql://app:secret@127.0.0.1:1/app"
SAYS = """
import json, os, stat
names = ("RUBYOPT", "RUBYLIB", "PGGUARD_RUBY_STACKS_DIR")
at = os.environ.get(names[2])
mode = None if at is None else stat.S_IMODE(os.stat(at).st_mode)
print(json.dumps([{name: os.environ[name] for name in names if name in os.environ}, mode]))
"""


def run(*options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pgguard", "run", *options, "--", sys.executable, "-c", SAYS]
    environ = environment(DATABASE_URL=NOWHERE, **variables)
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=SECONDS, check=False)


def test_ruby_is_told_to_load_the_file_and_nothing_is_left_behind() -> None:
    done = run("--ruby-stacks", RUBYOPT="-W0", RUBYLIB="/srv/lib")
    added, mode = json.loads(done.stdout)
    directory = Path(added.pop("PGGUARD_RUBY_STACKS_DIR"))
    assert (added, mode) == ({"RUBYOPT": f"-W0 -r{FILE}", "RUBYLIB": "/srv/lib"}, 0o700)
    assert not directory.exists()
    assert f"pgguard: Ruby programs of the command were told to load {FILE} (--ruby-stacks)\n" in done.stderr


def test_without_the_option_nothing_is_added() -> None:
    done = run(RUBYOPT="-W0")
    assert json.loads(done.stdout) == [{"RUBYOPT": "-W0"}, None]
    assert "uby" not in done.stderr


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--attribution", "off"], "--ruby-stacks: nobody's stacks are looked at with --attribution off"),
        (
            ["--keep-env", "RUBYOPT"],
            "--keep-env RUBYOPT: --ruby-stacks adds to that variable, and keeps what stands in it",
        ),
    ],
)
def test_what_can_not_be_is_said_in_one_line(options: list[str], complaint: str) -> None:
    done = run("--ruby-stacks", *options)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"pgguard: {complaint}\n")


@pytest.mark.parametrize(
    ("user", "closed", "remarks"),
    [
        (0, Path("/root"), 1),
        (0, None, 0),
        (1000, Path("/root"), 0),
    ],
)
def test_root_is_told_where_other_users_can_not_load_the_file(
    user: int, closed: Path | None, remarks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: user)
    monkeypatch.setattr(cli_run, "closed_to_others", lambda: closed)
    found = list(cli_run._ruby_remarks())
    assert [remark.startswith("other users can't read /root, so that Ruby doesn't start") for remark in found] == (
        [True] * remarks
    )


async def test_where_no_directory_can_be_made_a_guard_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> str:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.mkdtemp", fail)
    settings = Settings(upstream=NOWHERE, listen=["127.0.0.1:0"])
    with pytest.raises(ConfigurationError, match=r"^--ruby-stacks: no directory .* Read-only file system: set TMPDIR"):
        async with running_guard(settings, Fanout([], complain=print), ruby=RubyPipes()):
            pass
