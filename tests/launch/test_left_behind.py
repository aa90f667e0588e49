"""Processes that have lost their parents are this process's from then on, and are let go of in time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.proxy.spawned import SECONDS, environment

ADOPTS = """
import json, os, subprocess, sys, time
from pgguard.launch import left_behind
from pgguard.launch.left_behind import LeftBehind

def until(condition):
    while not condition():
        time.sleep(0.01)

left_behind._REAPED_AFTER = 0.2
own = subprocess.Popen(["sleep", "60"])
watched = LeftBehind()
helper = subprocess.Popen(["sh", "-c", "exit 7"])
command = subprocess.Popen(["sh", "-c", "sleep 60 & echo $!; exit 3"], stdout=subprocess.PIPE)
orphan = int(command.stdout.readline())
until(lambda: command.poll() is not None)
until(lambda: watched.running(command.pid) == [orphan])
parent = int(open(f"/proc/{orphan}/stat").read().rpartition(") ")[2].split()[1])
watched.reap(command.pid)
# What somebody waits for is theirs.
statuses = [command.wait(), helper.wait()]
os.kill(orphan, 9)
until(lambda: watched.running(command.pid) == [])
zombie = os.path.exists(f"/proc/{orphan}")
until(lambda: watched.reap(command.pid) or not os.path.exists(f"/proc/{orphan}"))
own.kill()
print(json.dumps([parent == os.getpid(), statuses, zombie, own.wait()]))
"""


def test_an_orphan_is_adopted_and_reaped_a_while_after_it_has_ended(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ADOPTS],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=True,
    )
    assert json.loads(done.stdout) == [True, [3, 7], True, -9]
