"""Before login a client can't tell the guard from the server, and what isn't PostgreSQL's protocol is one line."""

from __future__ import annotations

import http.client
import os
import pwd
import re
import shutil
import socket
import ssl
import struct
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest

from pgguard.demo.postgres import running_cluster
from tests.guard_process import GuardProcess, running_guard
from tests.integration.knocks import KNOCKS, READY, START, USER, Knock, Outcome, knock_at
from tests.integration.running import PROGRAMS
from tests.languages import node_directory
from tests.proxy.messages import SSL_REQUEST, TERMINATE, cancel_request, query, startup
from tests.servers import Address, Server, installations, not_installed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.conftest import StartGuard
    from tests.servers import Transport

_AT_ONCE = 8
_SECONDS = 40.0
_OWN_FIELDS = re.compile(rb"(?<=\0)[FLR][^\0]+\0|to 3\.\d")
"""Of an ErrorResponse: where in the server's source it comes from, and which versions that server speaks."""


def _outcomes(address: Callable[[Knock], Address], knocks: Sequence[Knock]) -> Iterator[Outcome]:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        yield from pool.map(lambda knock: knock_at(address(knock), knock), knocks)


def _rows(server: Address) -> list[Knock]:
    with psycopg.connect(server.conninfo) as connection:
        version = connection.info.server_version // 10_000
    return [knock for knock in KNOCKS if knock.since <= version]


def test_a_client_can_not_tell_it_from_the_server(server: Server, guard: GuardProcess, transport: Transport) -> None:
    rows = _rows(server.unix)
    directly = list(_outcomes(lambda knock: server.at("unix" if knock.gss else transport), rows))
    for knock, outcome in zip(rows, directly, strict=True):
        assert outcome.end == knock.end, knock.name
        assert knock.says in outcome.received, knock.name
        assert knock.says or not outcome.received, knock.name
    guarded = _outcomes(lambda _: guard.at(transport), rows)
    differing = [
        f"{knock.name}: {outcome} directly, {other} through the guard"
        for knock, outcome, other in zip(rows, directly, guarded, strict=True)
        if outcome != other
    ]
    assert not differing, "\n".join(differing)


@pytest.mark.parametrize("version", [(3, 0), (3, 2)], ids=["3.0", "3.2"])
def test_a_real_query_is_cancelled(guard: GuardProcess, version: tuple[int, int]) -> None:
    """With the key that the server gave out, which is longer since protocol 3.2 where the server knows that."""
    with socket.create_connection((guard.tcp.host, guard.tcp.port), timeout=_SECONDS) as client:
        client.sendall(startup(version, user=USER))
        login = _until(client, READY)
        at = login.rindex(b"K\0\0")
        key = login[at + 5 : at + 1 + int.from_bytes(login[at + 1 : at + 5], "big")]
        # A request that comes before the server has begun would cancel nothing.
        client.sendall(query("DO $$ BEGIN RAISE NOTICE 'begun'; PERFORM pg_sleep(60); END $$"))
        notice = _until(client, b"\0\0")
        assert b"Mbegun\0" in notice, notice
        for secret in (bytes(len(key) - 4), key[4:]):  # the first one is wrong, and no answer to either says so
            with socket.create_connection((guard.tcp.host, guard.tcp.port), timeout=_SECONDS) as other:
                other.sendall(cancel_request(int.from_bytes(key[:4], "big"), secret))
                assert other.recv(1) == b""
        assert b"57014" in _until(client, READY)
        client.sendall(TERMINATE)
        assert client.recv(1) == b""
    guard.assert_no_faults()


def _until(client: socket.socket, end: bytes) -> bytes:
    received = b""
    while not received.endswith(end):
        data = client.recv(65536)
        assert data, received
        received += data
    return received


@pytest.fixture(scope="module")
def encrypting() -> Iterator[Server]:
    """Debian's server, with TLS over TCP, and GSSAPI encryption, which it was built with."""
    bindir = next((bindir for name, bindir in installations().items() if name != "embedded"), None)
    if bindir is None:
        not_installed("Debian's PostgreSQL")
    if shutil.which("openssl") is None:
        not_installed("openssl")
    with tempfile.TemporaryDirectory(prefix="pgguard-test-") as name, socket.socket() as probe:
        key, certificate = Path(name) / "key.pem", Path(name) / "certificate.pem"
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "1"]
        subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
        if os.geteuid() == 0:  # the server runs as another user then
            Path(name).chmod(0o755)
            os.chown(key, 0, pwd.getpwnam("nobody").pw_gid)
            key.chmod(0o640)
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        settings = {
            "listen_addresses": "127.0.0.1",
            "ssl": "on",
            "ssl_key_file": str(key),
            "ssl_cert_file": str(certificate),
        }
        with running_cluster(bindir, port=port, settings=settings, timeout=60) as cluster:
            yield Server(bindir, Address("127.0.0.1", port), Address(str(cluster.socket_dir), port))


def test_what_encryption_the_server_offers_changes_nothing(encrypting: Server) -> None:
    """The guard offers none to its clients, as a server does over a Unix socket."""
    assert _ask_for_tls(encrypting.tcp) == b"S"
    rows = [knock for knock in _rows(encrypting.unix) if knock.says]
    with running_guard(encrypting.tcp) as guard:
        directly = _outcomes(lambda _: encrypting.unix, rows)
        guarded = _outcomes(lambda _: guard.tcp, rows)
        for knock, outcome, other in zip(rows, directly, guarded, strict=True):
            assert other.end == outcome.end, knock.name
            assert _texts(other.received) == _texts(outcome.received), knock.name


def _ask_for_tls(address: Address) -> bytes:
    with socket.create_connection((address.host, address.port), timeout=_SECONDS) as sock:
        sock.sendall(SSL_REQUEST)
        return sock.recv(1)


def _texts(received: bytes) -> list[bytes]:
    return [_OWN_FIELDS.sub(b"", part) for part in re.split(rb"E\0\0\0.", received, flags=re.DOTALL)]


def test_node_postgres_that_ends_before_it_is_connected(server: Server, guard: GuardProcess) -> None:
    """Its first bytes are Terminate; an answer that it doesn't get directly would end the program."""
    environment = {"NODE_PATH": str(node_directory() / "node_modules")}
    for address in (server.tcp, guard.tcp):
        done = subprocess.run(
            ["node", PROGRAMS / "ends_early.js"],
            env=address.environ() | environment,
            check=False,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "ended\n", "")
    guard.assert_no_faults()


def _close(sock: socket.socket, *, reset: bool) -> None:
    if reset:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def test_scans_and_health_checks_are_silent(server: Server, guard: GuardProcess) -> None:
    before = guard.stderr
    said = [(b"", b""), (SSL_REQUEST, b""), (SSL_REQUEST, b"N"), (TERMINATE, b""), (START, b"")]
    for data, answer in said * 3:
        for reset in (False, True):
            sock = socket.create_connection((guard.tcp.host, guard.tcp.port), timeout=_SECONDS)
            sock.sendall(data)
            if answer:
                assert sock.recv(1) == answer
            _close(sock, reset=reset)
    for address in (guard.tcp, guard.unix):
        command: list[str | Path] = [server.bindir / "pg_isready", "--host", address.host, "--port", str(address.port)]
        assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    with psycopg.connect(guard.tcp.conninfo) as connection:  # what came before it has been dealt with
        connection.execute("SELECT 1")
    guard.assert_no_faults()
    assert guard.stderr.removeprefix(before).startswith("pgguard: ")


def _speak_http(address: Address) -> None:
    connection = http.client.HTTPConnection(address.host, address.port, timeout=_SECONDS)
    connection.request("GET", "/metrics?token=secret")
    with pytest.raises(http.client.RemoteDisconnected):
        connection.getresponse()
    connection.close()


def _speak_tls(address: Address, alpn: str | None) -> None:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if alpn is not None:
        context.set_alpn_protocols([alpn])
    sock = socket.create_connection((address.host, address.port), timeout=_SECONDS)
    with sock, pytest.raises((ssl.SSLError, ConnectionError)):
        context.wrap_socket(sock)


def _say(address: Address, data: bytes) -> None:
    with socket.create_connection((address.host, address.port), timeout=_SECONDS) as sock:
        sock.sendall(data)
        assert sock.recv(1) == b""


_ANYTHING = "not with PostgreSQL's startup packet"


_STRANGERS: tuple[tuple[Callable[[Address], None], str], ...] = (
    (_speak_http, f"HTTP, {_ANYTHING}"),
    (partial(_speak_tls, alpn=None), "a TLS hello, but this port offers no TLS"),
    (
        partial(_speak_tls, alpn="postgresql"),
        "a TLS hello, but this port offers no TLS: connect with sslmode=disable or prefer",
    ),
    (partial(_say, data=b"SSH-2.0-OpenSSH_9.2\r\n"), f"SSH, {_ANYTHING}"),
    (partial(_say, data=b"*1\r\n$4\r\nPING\r\n"), f"Redis, {_ANYTHING}"),
    (partial(_say, data=b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n"), f"the PROXY protocol, {_ANYTHING}"),
    (partial(_say, data=b"my secret password"), f"the bytes 6d 79 20 73, {_ANYTHING}"),
)


@pytest.mark.parametrize("mode", ["log", "reject"])
def test_another_protocol_is_for_information_and_one_line(start_guard: StartGuard, mode: str) -> None:
    """And as it is always the same program here, another line when some time has passed."""
    guard = start_guard("--mode", mode)
    before = guard.stderr
    for n, (speak, says) in enumerate(_STRANGERS):
        speak(guard.tcp)
        fault = guard.wait_for("protocol-violation", count=n + 1)[n]
        assert (fault["severity"], fault["action"], fault["message"]) == ("info", "logged", None)
        assert fault["reason"].startswith(f"the connection began with {says}")
        assert re.match(rf"pid {os.getpid()}( \(.*\))?: .* began with ", fault["summary"]), fault["summary"]
        assert says in fault["summary"]
        assert fault["culprits"]
        for culprit in fault["culprits"]:
            assert culprit["role"] in ("owner", "holder")
            assert culprit["pid"] == os.getpid()
        assert guard.first_of_cause(fault)["advice"]["title"] == "Find out what connects to this port, and why"
    guard.stop()
    first, *others = guard.faults()
    assert first["repeat_of"] is None
    assert {fault["repeat_of"] for fault in others} == {first["id"]}
    said = guard.stderr.removeprefix(before)
    line, *again = [line for line in said.splitlines() if line.startswith("SUMMARY: pgguard: protocol-violation: ")]
    assert first["summary"] in line
    assert all(f"fault {first['id']} again: " in line for line in again)
    assert len(again) < len(others)
    assert f"protocol-violation, {len(_STRANGERS)} times in {len(_STRANGERS)} sessions" in said
    assert "=====" not in guard.stderr
    assert "secret" not in guard.stderr.removeprefix(before)


def test_postgresqls_own_messages_before_login_are_an_error(guard: GuardProcess) -> None:
    """They come from somebody who believes that he has logged in."""
    _say(guard.tcp, query("select 'secret'"))
    [fault] = guard.wait_for("protocol-violation")
    assert (fault["severity"], fault["message"]["name"]) == ("error", "Query")
    assert fault["reason"] == "the client sent Query as its first message, instead of a startup packet"
    assert "secret" not in str(fault)


def test_data_behind_a_request_for_encryption_is_an_error(guard: GuardProcess) -> None:
    knock = next(knock for knock in KNOCKS if knock.name == "SSLRequest with a start behind it")
    assert b"received unencrypted data after SSL request" in knock_at(guard.tcp, knock).received
    [fault] = guard.wait_for("protocol-violation")
    assert (fault["severity"], fault["message"]["name"]) == ("error", "SSLRequest")
    assert fault["reason"] == f"the client sent SSLRequest and {len(START)} bytes more without waiting for the answer"
