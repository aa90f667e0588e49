"""Why the server can't be reached: each reason that the system has, and what the client is told to do about it."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from pgguard.attribution.privileges import Right, rights
from tests.proxy.conftest import running
from tests.proxy.messages import startup
from tests.proxy.spawned import environment

if TYPE_CHECKING:
    from pathlib import Path

needs_namespace = pytest.mark.skipif(
    Right.CAP_SYS_ADMIN not in rights() or shutil.which("ip") is None, reason="it takes a network namespace of its own"
)

_PRELUDE = """
import json, os, socket, subprocess, sys, trio
from pathlib import Path
from pgguard.proxy.addresses import TcpAddress, UnixAddress, Upstream
from pgguard.proxy.upstream import UpstreamUnavailable, connect_upstream

def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True)

def leave_no_port():
    "Whoever connects is given a local port of this range."
    Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("40000 40001")
    for port in 40000, 40001:
        sock = socket.create_server(("0.0.0.0", port))
        sock.set_inheritable(True)
        sock.detach()

def why(address):
    try:
        trio.run(connect_upstream, Upstream((address,), 1))
    except UpstreamUnavailable as error:
        return [str(error).removeprefix(f"{address}: "), error.exhausted, error.hint(None)]
"""
_IN_A_NAMESPACE = """
ip("link", "set", "lo", "up")
ip("route", "add", "unreachable", "192.0.2.1")
ip("route", "add", "prohibit", "192.0.2.2")
hosts = ["127.0.0.1", "192.0.2.1", "192.0.2.2", "192.0.2.3", "::1"]
said = {host: why(TcpAddress(host, 7)) for host in hosts}
Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("1")
said["no IPv6"] = why(TcpAddress("::1", 7))
leave_no_port()
said["no port"] = why(TcpAddress("127.0.0.1", 7))
print(json.dumps(said))
"""
_EXHAUSTED_GUARD = """
ip("link", "set", "lo", "up")
leave_no_port()
os.execv(sys.executable, [sys.executable, "-m", "pgguard", "serve", *sys.argv[1:]])
"""


def _command(script: str, *arguments: str) -> list[str]:
    return ["unshare", "--net", sys.executable, "-c", _PRELUDE + script, *arguments]


def _run(command: list[str]) -> Any:
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_namespace
def test_over_tcp() -> None:
    said = _run(_command(_IN_A_NAMESPACE))
    expected = {
        "127.0.0.1": ("Connection refused", False, "Check that PostgreSQL is running there, "),
        "::1": ("Connection refused", False, "Check that PostgreSQL is running there, "),
        "192.0.2.1": ("No route to host", False, "This host has no route to that address: "),
        "192.0.2.2": ("Permission denied", False, "This host doesn't allow it: check its firewall "),
        "192.0.2.3": ("Network is unreachable", False, "This host has no route to that address: "),
        "no IPv6": ("Cannot assign requested address", False, "This host has no address of that kind (usually IPv6)"),
        "no port": ("Cannot assign requested address", True, "This host has no local port left "),
    }
    for what, (reason, exhausted, hint) in expected.items():
        assert said[what][:2] == [reason, exhausted], what
        assert said[what][2].startswith(hint), what


@needs_namespace
def test_a_client_that_no_local_port_is_left_for(short_directory: Path) -> None:
    """It isn't the server that is the matter."""
    options = ["--upstream", "host=127.0.0.1 port=7", "--listen", f"unix:{short_directory}:7"]
    command = _command(_EXHAUSTED_GUARD, *options)
    with subprocess.Popen(command, env=environment(), cwd=short_directory, stderr=subprocess.PIPE, text=True) as guard:
        try:
            assert guard.stderr is not None
            assert any("ready on" in line for line in guard.stderr)
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(20)
                client.connect(f"{short_directory}/.s.PGSQL.7")
                client.sendall(startup())
                said = b"".join(iter(lambda: client.recv(4096), b"")).decode()
            guard.send_signal(signal.SIGTERM)
            assert guard.wait(20) == 0
        finally:
            guard.kill()
    assert "\0C53300\0Mpgguard: too many connections: 127.0.0.1:7: Cannot assign requested address\0" in said
    assert "\0HThis host has no local port left for another connection to that address. " in said


_UNIX = """
directory = sys.argv[1]
if os.geteuid() == 0:
    os.setgroups([]), os.setgid(int(sys.argv[3])), os.setuid(int(sys.argv[2]))
print(json.dumps([why(UnixAddress(directory, port)) for port in range(1, 5)]))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="somebody else's socket has to be somebody else's")
def test_over_a_unix_socket(short_directory: Path) -> None:
    """There is none; nobody listens on it; it is another one's; it is one for datagrams."""
    nobody = pwd.getpwnam("nobody")
    short_directory.chmod(0o755)
    with (
        socket.socket(socket.AF_UNIX) as left,
        socket.socket(socket.AF_UNIX) as closed,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams,
    ):
        for port, sock in (2, left), (3, closed), (4, datagrams):
            path = short_directory / f".s.PGSQL.{port}"
            sock.bind(str(path))
            path.chmod(0o777 if port != 3 else 0o700)
        closed.listen()
        command = [sys.executable, "-c", _PRELUDE + _UNIX, str(short_directory), *map(str, nobody[2:4])]
        said = _run(command)
    expected = [
        ("No such file or directory", "There is no such socket. Check that PostgreSQL is running. "),
        ("Connection refused", "No server listens on that socket: "),
        ("Permission denied", "pgguard's user can't connect to that socket: "),
        ("Protocol wrong type for socket", "That socket isn't PostgreSQL's: it is of another type. "),
    ]
    for (reason, exhausted, hint), (expected_reason, expected_hint) in zip(said, expected, strict=True):
        assert (reason, exhausted) == (expected_reason, False)
        assert hint.startswith(expected_hint)


async def test_of_several_addresses_each_has_its_hint_and_none_twice(short_directory: Path) -> None:
    with socket.socket() as down, socket.socket() as also:
        for sock in down, also:
            sock.bind(("127.0.0.1", 0))
        hosts = f"127.0.0.1,127.0.0.1,{short_directory},nowhere.invalid"
        ports = f"{down.getsockname()[1]},{also.getsockname()[1]},7,7"
        async with running(upstream=f"host={hosts} port={ports}") as house:
            client = await house.connect()
            await client.send(startup())
            fields = (await client.message()).fields
            await client.close()
    assert fields["C"] == "08001"
    assert fields["H"].count("Check that PostgreSQL is running there, ") == 1
    assert "There is no such socket. " in fields["H"]
    assert "DNS" in fields["H"]
