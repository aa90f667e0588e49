"""What a client says in the middle of something else: Terminate within a COPY, a Query behind a Parse."""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
from typing import TYPE_CHECKING

import psycopg
import pytest

from tests.integration.running import PROGRAMS, every_transport
from tests.session.protocol import bind, close, message, parse, query

if TYPE_CHECKING:
    from tests.guard_process import GuardProcess
    from tests.servers import Address, Server, Transport

_SECONDS = 30.0


def run(program: str, *arguments: str, address: Address) -> int:
    """Run a Python program of the tests to its end, and return its pid."""
    command = [sys.executable, str(PROGRAMS / program), *arguments]
    with subprocess.Popen(command, env=address.environ()) as process:
        assert process.wait(_SECONDS) == 0
        return process.pid


class Wire:
    """A connection that says exactly what the test says."""

    def __init__(self, address: Address) -> None:
        if address.host.startswith("/"):
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.connect(f"{address.host}/.s.PGSQL.{address.port}")
        else:
            self._socket = socket.create_connection((address.host, address.port))
        self._socket.settimeout(_SECONDS)
        self._stream = self._socket.makefile("rb")
        body = struct.pack("!HH", 3, 0) + b"user\0postgres\0database\0postgres\0\0"
        self.send(struct.pack("!I", len(body) + 4) + body)
        assert self.read("Z")[0] == "R"

    def send(self, *messages: bytes) -> None:
        self._socket.sendall(b"".join(messages))

    def read(self, last: str) -> str:
        """The types of the messages up to the next of this type."""
        types = ""
        while not types.endswith(last):
            type_, length = struct.unpack("!cI", self._stream.read(5))
            self._stream.read(length - 4)
            types += type_.decode()
        return types

    def close(self) -> None:
        self.send(message("X"))
        assert self._stream.read() == b""
        self.abandon()

    def abandon(self) -> None:
        """Close it without a word."""
        self._stream.close()
        self._socket.close()


@pytest.mark.parametrize("server", ["embedded"], indirect=True, scope="session")
class TestTerminateWithinCopy:
    @every_transport
    def test_in_the_middle_of_the_rows_throws_them_away(
        self, server: Server, guard: GuardProcess, transport: Transport
    ) -> None:
        pid = run("copy_cut_short.py", "cut", address=guard.at(transport))
        [fault] = guard.wait_for("unclean-close")
        guard.stop()
        assert len(guard.faults()) == 1
        assert (fault["severity"], fault["message"]["name"]) == ("error", "Terminate")
        assert "middle of COPY data" in fault["reason"]
        closer = fault["culprits"][0]
        assert (closer["role"], closer["pid"]) == ("closer", pid)
        assert "sent Terminate in the middle of COPY data" in fault["summary"]
        with psycopg.connect(server.unix.conninfo) as connection:
            assert connection.execute("SELECT count(*) FROM cut_short").fetchone() == (0,)

    @pytest.mark.parametrize("transport", ["sampled", "unix"], indirect=True)
    @pytest.mark.parametrize("how", ["nothing", "done", "failed", "refused"])
    def test_elsewhere_is_a_goodbye_like_any_other(self, how: str, guard: GuardProcess, transport: Transport) -> None:
        run("copy_cut_short.py", how, address=guard.at(transport))
        guard.assert_no_faults()


@pytest.mark.parametrize("server", ["embedded"], indirect=True, scope="session")
@pytest.mark.parametrize("transport", ["unix"], indirect=True)
@pytest.mark.parametrize(("left", "severity"), [
    ((close("s"), message("S")), "warning"),
    ((parse("SELECT 1"), message("D", b"S\0"), message("H")), "warning"),
    ((query("SELECT pg_sleep(0.5)"),), "error"),
    ((parse("SELECT pg_sleep(0.5)"), bind(), message("E", b"\0\0\0\0\0"), message("S")), "error"),
])  # fmt: skip
def test_a_close_without_terminate_is_an_error_only_with_work_open(
    left: tuple[bytes, ...], severity: str, guard: GuardProcess, transport: Transport
) -> None:
    """As tokio-postgres drops a statement, and is dropped itself."""
    wire = Wire(guard.at(transport))
    wire.send(parse("SELECT 1", "s"), message("S"))
    assert wire.read("Z") == "1Z"
    wire.send(*left)
    wire.abandon()
    [fault] = guard.wait_for("unclean-close")
    assert fault["severity"] == severity
    guard.assert_no_faults(except_kinds={"unclean-close"})


@pytest.mark.parametrize("transport", ["unix"], indirect=True)
class TestLeftBehind:
    def test_parse_whose_bind_libpq_cannot_send(self, guard: GuardProcess, transport: Transport) -> None:
        run("left_behind.py", address=guard.at(transport))
        guard.assert_no_faults()

    def test_query_behind_it_is_answered_or_discarded_as_the_server_does(
        self, guard: GuardProcess, transport: Transport
    ) -> None:
        """If the Parse fails, the server discards the Query too, and everything up to a Sync."""
        wire = Wire(guard.at(transport))
        wire.send(parse("SELECT 1"), query("SELECT 1"))
        assert wire.read("Z") == "1TDCZ"
        wire.send(parse("SELEKT 1"), query("SELECT 1"))
        assert wire.read("E") == "E"
        wire.send(query("SELECT 2"), message("S"))
        assert wire.read("Z") == "Z"
        wire.send(query("SELECT 3"))
        assert wire.read("Z") == "TDCZ"
        wire.close()
        guard.assert_no_faults()
