"""A server's Unix socket is pointed out to who reaches it over TCP, if it is certain that it is that server's."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pgguard.cli.doctor import doctor
from pgguard.cli.serve import _point_out_shortcuts
from pgguard.proxy.addresses import UnixAddress, parse_upstream
from pgguard.proxy.settings import Front
from pgguard.proxy.shortcut import shortcut

if TYPE_CHECKING:
    from tests.servers import Server

NAME = "Unix socket to the server"


@pytest.fixture(autouse=True)
def _nothing_is_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in "PGHOST", "PGPORT", "PGHOSTADDR", "PGSERVICE", "PGGUARD_UPSTREAM":
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def look_in(directory: str | Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgguard.proxy.shortcut.SOCKET_DIRECTORIES", (str(directory),))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_the_same_server_has_a_unix_socket(host: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    look_in(server.unix.host, monkeypatch)
    expected = UnixAddress(server.unix.host, server.unix.port)
    assert shortcut(parse_upstream(f"host={host} port={server.tcp.port}")) == expected


async def test_it_is_said_once_the_guard_runs(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    look_in(server.unix.host, monkeypatch)
    await _point_out_shortcuts([Front(None, parse_upstream(f"host=127.0.0.1 port={server.tcp.port}"), ())])
    [said] = caplog.messages
    there = f"'host={server.unix.host} port={server.unix.port}'"
    assert said.startswith("the server also has a Unix socket, which takes less CPU time: use --upstream ")
    assert said.endswith(f" {there}, if the server's pg_hba.conf lets its clients log in there")
    caplog.clear()
    await _point_out_shortcuts([Front(None, parse_upstream(server.unix.conninfo), ())])
    assert caplog.messages == []


def test_the_doctor_says_it_of_the_server_that_would_be_guarded(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    look_in(server.unix.host, monkeypatch)
    monkeypatch.setattr("pgguard.cli.doctor.check", list)

    def said() -> list[dict[str, str | bool]]:
        assert doctor(as_json=True) == 0
        return [one for one in json.loads(capsys.readouterr().out) if one["name"] == NAME]

    assert said() == []
    monkeypatch.setenv("PGGUARD_UPSTREAM", f"host=127.0.0.1 port={server.tcp.port}")
    [found] = said()
    there = f"unix:{server.unix.host}:{server.unix.port}"
    assert found["problem"] == f"the guard reaches it at 127.0.0.1:{server.tcp.port}, and it also listens at {there}"
    assert not found["essential"]
    monkeypatch.setenv("PGGUARD_UPSTREAM", "port=no")
    assert said() == []


def listening(directory: Path, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(f"{directory}/.s.PGSQL.{port}")
    sock.listen()
    return sock


def test_another_process_listens_on_a_socket_of_that_name(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    look_in(tmp_path, monkeypatch)
    upstream = parse_upstream(f"host=127.0.0.1 port={server.tcp.port}")
    assert shortcut(upstream) is None
    with listening(tmp_path, server.tcp.port):
        assert shortcut(upstream) is None
    assert Path(tmp_path, f".s.PGSQL.{server.tcp.port}").exists()
    assert shortcut(upstream) is None, "nobody listens there any more"


def test_it_is_certain_of_one_address_of_this_host_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    look_in(tmp_path, monkeypatch)
    with socket.create_server(("0.0.0.0", 0)) as tcp:
        port = tcp.getsockname()[1]
        with listening(tmp_path, port):
            assert shortcut(parse_upstream(f"host=127.0.0.1 port={port}")) == UnixAddress(str(tmp_path), port)
            assert shortcut(parse_upstream(f"host=127.0.0.2 port={port}")) is not None, "it accepts any"
            assert shortcut(parse_upstream(f"host=192.0.2.1 port={port}")) is None, "who knows who has that one"
            assert shortcut(parse_upstream(f"host=127.0.0.1,127.0.0.2 port={port}")) is None
            assert shortcut(parse_upstream(f"host=no.such.host.invalid port={port}")) is None
    assert shortcut(parse_upstream(f"host=127.0.0.1 port={port}")) is None


def test_who_may_not_see_what_the_server_has_open_is_told_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    look_in(tmp_path, monkeypatch)
    with socket.create_server(("127.0.0.1", 0)) as tcp, listening(tmp_path, tcp.getsockname()[1]):
        upstream = parse_upstream(f"host=127.0.0.1 port={tcp.getsockname()[1]}")
        assert shortcut(upstream) is not None
        monkeypatch.setattr("pgguard.proxy.shortcut.find_sockets", refuse)
        assert shortcut(upstream) is None
