"""``--admin`` on the command line: what it says, and what is refused."""

from __future__ import annotations

import os
import socket
import sys
import urllib.request
from typing import TYPE_CHECKING

import pytest

from tests.cli.conftest import Refused
from tests.proxy.spawned import environment, run, spawned

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("9187", "--admin 9187: write HOST:PORT, as in 127.0.0.1:9187"),
        ("127.0.0.1:x", "--admin 127.0.0.1:x: the port is not a port number"),
        ("::1:80", "--admin ::1:80: put the IPv6 address in brackets"),
        ("[::1]", "--admin [::1]: write HOST:PORT, as in 127.0.0.1:9187"),
        ("http://127.0.0.1:9187/", ": write HOST:PORT, as in 127.0.0.1:9187"),
        ("unix:/tmp", "--admin unix:/tmp: write HOST:PORT, as in 127.0.0.1:9187"),
        ("0.0.0.0:0", "other hosts can reach this address: name a file with a token in --admin-token-file"),
        ("198.51.100.1:1", "this host has no such address"),
        ("no such host:1", "--admin no such host:1: "),
    ],
)
def test_an_address_that_will_not_do_is_said(address: str, says: str, refused: Refused) -> None:
    refused("serve", "--upstream", "host=127.0.0.1 port=1", "--listen", "127.0.0.1:0", "--admin", address, says=says)


def test_a_token_alone_means_nothing(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hunter2")
    token = ("serve", "--admin-token-file", str(tmp_path / "token"))
    refused(*token, says="--admin-token-file: say by --admin HOST:PORT")
    refused(*token, "--admin", "127.0.0.1:0", says="token should be 16 letters, digits or signs at least")


@pytest.mark.parametrize("module", ["starlette", "hypercorn", "prometheus_client"])
@pytest.mark.parametrize(
    "command", [["serve"], ["run", "--upstream", "host=127.0.0.1 port=1", "--", "true"]], ids=["serve", "run"]
)
def test_what_is_not_installed_is_said_with_how_to_install_it(module: str, command: list[str], tmp_path: Path) -> None:
    (tmp_path / module).mkdir()
    missing = f"raise ModuleNotFoundError(\"No module named '{module}'\", name='{module}')\n"
    (tmp_path / module / "__init__.py").write_text(missing)
    path = os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])
    done = run(*command, cwd=tmp_path, variables={"PYTHONPATH": path, "PGGUARD_ADMIN": "127.0.0.1:0"})
    assert done.returncode == 2
    assert done.stderr == (f"pgguard: --admin 127.0.0.1:0: {module} is not installed: pip install 'pgguard[admin]'\n")


def test_it_says_where_the_page_is_before_it_is_ready(tmp_path: Path) -> None:
    with spawned("host=127.0.0.1 port=1", cwd=tmp_path, PGGUARD_ADMIN="localhost:0") as guard:
        page = guard.wait_for(r"the live page is at (http://127\.0\.0\.1:\d+/)")
        guard.wait_for(r"(ready on)")
        with urllib.request.urlopen(page + "healthz", timeout=30) as answer:
            assert answer.status == 200
        with urllib.request.urlopen(page, timeout=30) as answer:
            assert b"<script src=" in answer.read()


def test_a_command_is_watched_while_it_runs(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        page = f"127.0.0.1:{probe.getsockname()[1]}"
    code = f"import urllib.request; print(urllib.request.urlopen('http://{page}/api/figures').read().decode())"
    upstream = ["--upstream", "host=127.0.0.1 port=1"]
    done = run("run", *upstream, "--admin", page, "--", sys.executable, "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"the live page is at http://{page}/" in done.stderr
    assert '"clients":0' in done.stdout
