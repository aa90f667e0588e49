"""What the container image relies on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.guard_process import GuardProcess

HEALTHCHECK = Path(__file__).parents[2] / "docker" / "healthcheck.py"


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
