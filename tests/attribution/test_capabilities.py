from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pgguard.attribution.capabilities import check
from tests.attribution.puppets import Puppet

Puppets = Callable[[], Puppet]


def test_what_the_other_tests_rest_on_is_available_here() -> None:
    assert [capability.name for capability in check() if capability.essential and not capability.available] == []


def test_processes_that_can_not_be_looked_at_are_reported_with_what_to_do(puppet: Puppets) -> None:
    secretive, guard = puppet(), puppet()
    secretive.do("set_dumpable(0)")
    # The interpreter may be where only root can import from, so whatever a check needs is imported before.
    guard.do("from pgguard.attribution.capabilities import check; check(); become_nobody()")
    others = guard.do("[[c.available, c.explanation] for c in check() if not c.essential]")
    assert len(others) == 1
    assert others[0][0] is False
    assert "run the guard as root" in others[0][1]


def test_a_sandbox_without_netlink_is_reported_with_what_to_do(puppet: Puppets) -> None:
    """RestrictAddressFamilies= and the like make socket(2) fail."""
    guard = puppet()
    guard.do(
        "import errno\n"
        "from pgguard.attribution import sockets, capabilities\n"
        "class Sandboxed(socket.socket):\n"
        "    def __init__(self, family=-1, *args, **kwargs):\n"
        "        if family == socket.AF_NETLINK: raise OSError(errno.EAFNOSUPPORT, 'no such family')\n"
        "        super().__init__(family, *args, **kwargs)\n"
        "socket.socket = Sandboxed"
    )
    checked = guard.do("{c.name: [c.available, c.explanation] for c in capabilities.check()}")
    assert checked["/proc"][0] is True
    for name in "sock_diag for TCP", "sock_diag for Unix sockets":
        available, explanation = checked[name]
        assert not available
        assert explanation.startswith("no such family; allow AF_NETLINK")


def test_the_check_leaves_nothing_open() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    check()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
