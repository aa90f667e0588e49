from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from pgguard.attribution.sockets import SockDiag, TcpClient, UnixClient, client_socket


def _inode(sock: socket.socket) -> int:
    return os.fstat(sock.fileno()).st_ino


def _client_inode(accepted: socket.socket) -> int | None:
    with SockDiag() as diag:
        return diag.client_inode(client_socket(accepted))


@pytest.mark.parametrize(
    ("listen_on", "connect_to"),
    [
        pytest.param((socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "127.0.0.1"), id="IPv4"),
        pytest.param((socket.AF_INET6, "::1"), (socket.AF_INET6, "::1"), id="IPv6"),
        pytest.param((socket.AF_INET6, "::"), (socket.AF_INET, "127.0.0.1"), id="IPv4 to a dual-stack listener"),
        pytest.param((socket.AF_INET6, "::"), (socket.AF_INET6, "::ffff:127.0.0.1"), id="IPv4-mapped on both ends"),
        pytest.param((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::ffff:127.0.0.1"), id="IPv4-mapped to IPv4"),
    ],
)
def test_a_tcp_client_is_told_from_its_neighbours_in_every_family(
    listen_on: tuple[socket.AddressFamily, str], connect_to: tuple[socket.AddressFamily, str]
) -> None:
    family, host = listen_on
    dual = family == socket.AF_INET6 and host == "::"
    with (
        socket.create_server((host, 0), family=family, dualstack_ipv6=dual) as listener,
        socket.socket(connect_to[0]) as first,
        socket.socket(connect_to[0]) as second,
    ):
        for client in first, second:
            client.connect((connect_to[1], listener.getsockname()[1]))
            with listener.accept()[0] as accepted:
                assert _client_inode(accepted) == _inode(client)


def test_a_unix_client_is_told_from_its_neighbours_and_named_by_pid(tmp_path: Path) -> None:
    with (
        socket.socket(socket.AF_UNIX) as listener,
        socket.socket(socket.AF_UNIX) as first,
        socket.socket(socket.AF_UNIX) as second,
    ):
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        for client in first, second:
            client.connect(str(tmp_path / "s"))
            with listener.accept()[0] as accepted:
                assert _client_inode(accepted) == _inode(client)
                described = client_socket(accepted)
                assert isinstance(described, UnixClient)
                assert described.connected_by == os.getpid()


def test_a_client_that_has_closed_its_socket_has_no_inode(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "s"))
        unix.listen()
        for listener in tcp, unix:
            client = socket.socket(listener.family)
            client.connect(listener.getsockname())
            with listener.accept()[0] as accepted:
                described = client_socket(accepted)
                client.close()
                with SockDiag() as diag:
                    assert diag.client_inode(described) is None


def test_a_listener_on_the_port_of_a_client_that_is_gone_is_not_taken_for_it() -> None:
    """The kernel answers with a listener where no connection matches, and somebody else holds that."""
    with socket.create_server(("127.0.0.1", 0)) as elsewhere, SockDiag() as diag:
        loopback = bytes([127, 0, 0, 1])
        gone = TcpClient(loopback, elsewhere.getsockname()[1], loopback, 1, 0, 0.0)
        assert diag.client_inode(gone) is None


def test_describing_a_connection_that_is_gone_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        with listener.accept()[0] as accepted:
            accepted.setblocking(True)
            accepted.settimeout(5)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.close()
            with pytest.raises(ConnectionResetError):
                accepted.recv(1)
            with pytest.raises(OSError, match="not connected"):
                client_socket(accepted)
