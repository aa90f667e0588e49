"""Commands as people paste them into a shell, with nothing of this machine's that they could touch or meet."""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import pytest

from tests.proxy.spawned import environment
from tests.servers import not_installed

_SECONDS: Final = 30.0
_APART: Final = (
    "ip link set lo up; mount -t tmpfs none /run; mount -t tmpfs none /var/log; "
    "mount -t tmpfs none {home}; mkdir {home}/upper {home}/work {home}/home; "
    "mount -t overlay -o lowerdir=/etc,upperdir={home}/upper,workdir={home}/work none /etc; cd {home}/home; "
)
"""A network without anybody, and system directories of its own, all gone when the last process is."""


def pasted(commands: str, directory: Path, *, root: bool = False, path: str | None = None, ctrl_c: bool = True) -> str:
    """Run commands in a shell where ``pgguard`` is on the ``PATH``; returns what they have said.

    A guard that they start is told to end once it is ready, as with Ctrl-C, unless it ends by itself. Fails if one of
    them does.

    Args:
        commands: As they are pasted: all lines at once.
        directory: Where it is done; also the home.
        root: They need root, and a system of their own to change; without it they have a network of their own.
        path: The ``PATH``, where it is theirs to put ``pgguard`` there.
        ctrl_c: Guards are told to end.
    """
    for program in "unshare", "ip":
        if shutil.which(program) is None:
            not_installed(program)
    if os.geteuid() != 0:
        pytest.skip("only root can set up a network that nobody is in")
    home = directory / "home"
    home.mkdir(exist_ok=True)
    apart = _APART.format(home=home) if root else f"ip link set lo up; cd {home}; "
    set_apart = ["unshare", "--net", "--mount", "bash", "-e", "-c"]
    tried = subprocess.run([*set_apart, apart], cwd=directory, check=False, capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no system of its own can be set up here: {tried.stderr.strip()}")
    variables = environment(PATH=path or f"{Path(sys.executable).parent}:{os.environ['PATH']}", HOME=str(home))
    with subprocess.Popen(
        [*set_apart, f"{apart}{commands}\n"],
        cwd=directory,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as shell:
        try:
            said = _until_done(shell, ctrl_c=ctrl_c)
        finally:
            if shell.poll() is None:
                os.killpg(shell.pid, signal.SIGKILL)
    assert shell.returncode == 0, said
    return said


def _until_done(shell: subprocess.Popen[bytes], *, ctrl_c: bool) -> str:
    assert shell.stdout is not None
    said = b""
    ready = 0
    deadline = time.monotonic() + _SECONDS
    while True:
        readable, _, _ = select.select([shell.stdout], [], [], max(0.0, deadline - time.monotonic()))
        assert readable, f"it never ended: {said.decode()}"
        data = os.read(shell.stdout.fileno(), 65536)
        if not data:
            shell.wait(_SECONDS)
            return said.decode()
        said += data
        if (now := len(re.findall(rb"^pgguard: ready on ", said, re.MULTILINE))) > ready:
            ready = now
            if ctrl_c:
                os.killpg(shell.pid, signal.SIGINT)
