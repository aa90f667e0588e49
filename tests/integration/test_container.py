"""What the container image relies on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.proxy.conftest import short_directory
from tests.proxy.spawned import run, spawned

if TYPE_CHECKING:
    from tests.guard_process import GuardProcess

__all__ = ["short_directory"]

DOCKER = Path(__file__).parents[2] / "docker"
HEALTHCHECK = DOCKER / "healthcheck.py"


def check(listen: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, HEALTHCHECK],
        env=os.environ | {"PGGUARD_LISTEN": listen},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_the_health_check_tells_a_guard_from_a_closed_port_and_is_no_fault_itself(guard: GuardProcess) -> None:
    listen = f"0.0.0.0:{guard.tcp.port}"
    alive = check(listen)
    assert (alive.returncode, alive.stderr) == (0, "")
    guard.assert_no_faults()
    assert check(listen).returncode == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone is as careful as that")
def test_records_in_a_pods_volume(short_directory: Path) -> None:
    """It is refused as Kubernetes makes it, and taken when what the documentation says has been done to it."""
    volume = short_directory / "faults"
    volume.mkdir()
    volume.chmod(0o777)
    readme = (DOCKER / "README.md").read_text()
    [command] = re.findall(r"^ *command: (\[.*\])$", readme, re.MULTILINE)
    [records] = re.findall(r"name: PGGUARD_FAULTS, value: ([^}]*)}", readme)
    told = {"PGGUARD_FAULTS": records.replace("/faults/", f"{volume}/")}
    upstream = "host=127.0.0.1 port=1"
    refused = run("serve", "--upstream", upstream, "--listen", "127.0.0.1:0", cwd=short_directory, variables=told)
    assert refused.returncode == 2
    assert "anybody can replace it" in refused.stderr
    assert "anybody can replace it" in readme
    subprocess.run([word.replace("/faults", str(volume)) for word in json.loads(command)], check=True)
    with spawned(upstream, cwd=short_directory, **told) as guard:
        guard.signal(signal.SIGTERM)
        guard.end()
    assert Path(told["PGGUARD_FAULTS"]).exists()
