from __future__ import annotations

import array
import os
import socket
from collections.abc import Callable
from pathlib import Path

from pgguard.attribution.senders import CREDENTIALS_SPACE, ask_for_credentials, sender_pid
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
