"""A guard with the rights of the DaemonSet's, and no others, names processes of any user."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from tests.guard_process import running_guard
from tests.integration.running import every_transport
from tests.integration.test_fork_misuse import culprits, pids_named, scenario

if TYPE_CHECKING:
    from tests.guard_process import Fault
    from tests.servers import Server, Transport

MANIFEST = Path(__file__).parents[2] / "docker" / "kubernetes" / "daemonset.yaml"

pytestmark = [
    pytest.mark.parametrize("server", ["embedded"], indirect=True, scope="session"),
    pytest.mark.skipif(os.geteuid() != 0, reason="rights are root's, and another user runs the programs"),
]


def with_the_rights_of_the_node() -> list[str]:
    """What a command begins with that gets what the manifest's container gets."""
    [manifest] = [one for one in yaml.safe_load_all(MANIFEST.read_text()) if one["kind"] == "DaemonSet"]
    [container] = manifest["spec"]["template"]["spec"]["containers"]
    security = container["securityContext"]
    assert (security["privileged"], security["allowPrivilegeEscalation"]) == (False, False)
    assert security["capabilities"]["drop"] == ["ALL"]
    kept = ",".join(f"+{name.lower()}" for name in security["capabilities"]["add"])
    return ["setpriv", "--no-new-privs", "--inh-caps=-all", f"--bounding-set=-all,{kept}"]


BECOMES_NOBODY = (
    "import ctypes, pathlib, sys, os, psycopg\n"
    "program, sys.argv = compile(pathlib.Path(sys.argv[2]).read_text(), sys.argv[2], 'exec'), sys.argv[2:]\n"
    "sys.path.insert(0, os.path.dirname(sys.argv[0]))\n"
    "os.setgroups([]); os.setgid(65534); os.setuid(65534); ctypes.CDLL(None).prctl(4, 1)\n"  # PR_SET_DUMPABLE
    "exec(program)"
)
AS_NOBODY = (sys.executable, "-c", BECOMES_NOBODY)
"""The interpreter may be where only root can go."""


@every_transport
def test_processes_of_another_user_are_named(server: Server, transport: Transport) -> None:
    seen: list[Fault] = []
    program = (*with_the_rights_of_the_node(), sys.executable, "-m", "pgguard")
    with running_guard(server.tcp, program=program, probe=transport != "sampled") as guard:
        Path(guard.unix.host).chmod(0o755)
        for n in range(1, 6):  # a busy machine may leave no time to look
            with scenario("in_turn", guard.at(transport), before=AS_NOBODY) as (parent, child):
                inherited = guard.wait_for("inherited-connection", count=n)
                if transport != "sampled" and n == 1:
                    shared = guard.wait_for("shared-by-processes")[0]
                    assert culprits(shared)["intruder"] == [(child, "kernel-sender")]
                    assert (parent, "kernel-sender") in culprits(shared)["owner"]
            if seen := [fault for fault in inherited if pids_named(fault) == {parent, child}]:
                break
    assert seen
    assert all(culprit["process"]["cmdline"] for culprit in seen[0]["culprits"])
