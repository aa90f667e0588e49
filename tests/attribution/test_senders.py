from __future__ import annotations

import array
import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from pgguard.attribution.privileges import Right, rights
from pgguard.attribution.senders import CREDENTIALS_SPACE, ask_for_credentials, sender_pid
from pgguard.attribution.sockets import client_socket
from tests.attribution.puppets import Puppet

Puppets = Callable[[], Puppet]


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    ask_for_credentials(listener)
    return listener


def _receive(sock: socket.socket) -> tuple[bytes, int | None]:
    buffer = bytearray(1024)
    size, ancdata, _, _ = sock.recvmsg_into([buffer], CREDENTIALS_SPACE)
    assert len(ancdata) == 1
    return bytes(buffer[:size]), sender_pid(ancdata[0][2])


def test_each_read_carries_the_bytes_of_one_sender_and_its_pid(tmp_path: Path, puppet: Puppets) -> None:
    with _listen(tmp_path / "s") as listener:
        parent = puppet()
        parent.do(f"c = socket.socket(socket.AF_UNIX); c.connect({listener.getsockname()!r}); c.sendall(b'early')")
        with listener.accept()[0] as accepted:
            child = parent.do("fork(lambda: c.sendall(b'child'))")
            parent.do("c.sendall(b'parent')")
            assert _receive(accepted) == (b"early", parent.pid)
            assert _receive(accepted) == (b"child", child)
            assert _receive(accepted) == (b"parent", parent.pid)


def test_descriptors_that_a_client_sends_along_are_not_opened_in_the_guard(tmp_path: Path) -> None:
    with _listen(tmp_path / "s") as listener, socket.socket(socket.AF_UNIX) as client:
        client.connect(listener.getsockname())
        with listener.accept()[0] as accepted:
            before = len(list(Path("/proc/self/fd").iterdir()))
            client.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [client.fileno()]))])
            assert _receive(accepted) == (b"x", os.getpid())
            assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_sender_without_a_pid_here_is_unknown() -> None:
    assert sender_pid(bytes(12)) is None


def _claim(puppet: Puppet, pid: int) -> int | None:
    """Have a process send on ``c`` in the name of another one; returns the errno if it may not."""
    puppet.do(
        "import struct\n"
        "claimed = None\n"
        "try:\n"
        f"    data = struct.pack('iII', {pid}, os.getuid(), os.getgid())\n"
        "    c.sendmsg([b'claimed'], [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, data)])\n"
        "except OSError as error:\n"
        "    claimed = error.errno"
    )
    number: int | None = puppet.do("claimed")
    return number


def test_who_is_root_can_send_in_the_name_of_another_but_not_connect(tmp_path: Path, puppet: Puppets) -> None:
    """What evidence can't exclude. Anybody else is refused by the kernel."""
    if Right.CAP_SYS_ADMIN not in rights():
        pytest.skip("it takes CAP_SYS_ADMIN")
    with _listen(tmp_path / "s") as listener:
        (tmp_path / "s").chmod(0o777)
        bad, good = puppet(), puppet()
        bad.do(f"c = socket.socket(socket.AF_UNIX); c.connect({listener.getsockname()!r})")
        with listener.accept()[0] as accepted:
            assert _claim(bad, good.pid) is None
            assert _receive(accepted) == (b"claimed", good.pid)
            client = client_socket(accepted)
            assert client.connected_by == bad.pid
            bad.do("become_nobody()")
            assert _claim(bad, good.pid) == errno.EPERM
            assert _claim(bad, bad.pid) is None
            assert _receive(accepted) == (b"claimed", bad.pid)
