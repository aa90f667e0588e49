"""Hostile clients and servers on TLS: nothing hangs, nothing fails in the guard, and others are served meanwhile."""

from __future__ import annotations

import os
import socket
import ssl
import struct
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import pytest

from tests.fuzz.hostile_tls import attack_tls
from tests.guard_process import running_guard
from tests.integration.bare import Bare, words
from tests.integration.running import named
from tests.proxy.messages import ANSWER, LOGGED_IN, SSL_REQUEST, TERMINATE, message, query, startup
from tests.tls.bare import TlsClient
from tests.tls.conftest import tls_guard

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.guard_process import GuardProcess
    from tests.servers import Address
    from tests.tls.conftest import StartTlsGuard
    from tests.tls.servers import Papers, TlsServer

_SECONDS: Final = 30.0
_ATTACKS: Final = 2.0
_LONGEST: Final = 5.0
"""Seconds for which a bystander may wait, on a machine that is busy with other tests."""
_TAKE_TWO: Final = {"tls-corruption", "shared-by-processes", "shared-by-threads", "foreign-terminate"}
"""What takes two."""


@pytest.mark.parametrize("probe", [True, False], ids=["probed", "sampled"])
def test_hostile_clients(probe: bool, tls_server: TlsServer, papers: Papers) -> None:
    with tls_guard(tls_server, "sslmode=require", papers.server, probe=probe) as guard:
        report = attack_tls(guard, 13, _ATTACKS)
        corrupted = guard.faults("tls-corruption")
    assert not report.wrong, "\n".join(report.wrong)
    assert report.attacks
    assert report.longest < _LONGEST
    assert not report.faults.keys() & (_TAKE_TWO if probe else _TAKE_TWO - {"tls-corruption"})
    # Where nobody says who has sent a record that fails its check, it may have been one who is gone; nobody is accused.
    assert all("bad record mac" in fault["reason"] for fault in corrupted)
    assert named(corrupted, "intruder") == set()


# What openssl can that Python can't


@pytest.mark.parametrize("order", ["K", "k"])
def test_new_keys_in_the_middle(order: str, kept_guard: StartTlsGuard, papers: Papers) -> None:
    """TLS 1.3 may change keys at any time, for one direction (k) or both (K)."""
    guard = kept_guard("sslmode=require", papers.server)
    command = ["openssl", "s_client", "-starttls", "postgres", "-connect", f"{guard.tcp.host}:{guard.tcp.port}"]
    with subprocess.Popen(
        [*command, "-tls1_3"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        stop = threading.Timer(_SECONDS, client.kill)
        stop.start()
        client.stdin.write(startup(user="postgres", database="postgres"))
        client.stdin.flush()
        received = _until(client.stdout.fileno(), b"Z\0\0\0\5I")
        for n in range(3):
            client.stdin.write(f"{order}\n".encode())
            client.stdin.flush()
            _until(client.stdout.fileno(), b"KEYUPDATE")
            sql = f"SELECT 'after {order} {n}'".encode()
            parse = message("P", b"\0" + sql + b"\0\0\0")
            bind = message("B", bytes(8))
            client.stdin.write(parse + bind + message("E", b"\0\0\0\0\0") + message("S"))
            client.stdin.flush()
            received = _until(client.stdout.fileno(), b"Z\0\0\0\5I")
            assert f"after {order} {n}".encode() in received
        client.stdin.write(b"Q\n")
        client.stdin.flush()
        client.wait(_SECONDS)
        stop.cancel()


def test_a_renegotiation_is_declined(kept_guard: StartTlsGuard, papers: Papers) -> None:
    guard = kept_guard("sslmode=require", papers.server)
    command = [
        "openssl",
        "s_client",
        "-tls1_2",
        "-starttls",
        "postgres",
        "-connect",
        f"{guard.tcp.host}:{guard.tcp.port}",
    ]
    done = subprocess.run(command, input=b"R\n", capture_output=True, timeout=_SECONDS, check=False)
    assert b"no renegotiation" in done.stderr
    _serves_others(guard.tcp)


def _until(fd: int, end: bytes) -> bytes:
    received = b""
    while end not in received:
        data = os.read(fd, 65536)
        assert data, received
        received += data
    return received


# Hostile servers

_Misbehaviour = Callable[[socket.socket, ssl.SSLContext], None]


def _says(*what: bytes, waits: bool = False) -> _Misbehaviour:
    """Answer SSLRequest like that, and close, or wait for the client to."""

    def serve(sock: socket.socket, _: ssl.SSLContext) -> None:
        for one in what:
            sock.sendall(one)
        if waits:
            while sock.recv(65536):
                pass

    return serve


def _shakes_hands(then: Callable[[ssl.SSLSocket], None]) -> _Misbehaviour:
    """Let a client in, answer one request of it, and do something then."""

    def serve(sock: socket.socket, context: ssl.SSLContext) -> None:
        sock.sendall(b"S")
        with context.wrap_socket(sock, server_side=True) as tls:
            tls.recv(65536)
            tls.sendall(LOGGED_IN)
            tls.recv(65536)
            then(tls)

    return serve


def _raw(tls: ssl.SSLSocket, data: bytes) -> None:
    """Send something around TLS."""
    with socket.socket(fileno=tls.detach()) as sock:
        sock.sendall(data)


def _reset(tls: ssl.SSLSocket) -> None:
    with socket.socket(fileno=tls.detach()) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _end_tls(tls: ssl.SSLSocket) -> None:
    """Say that no more will come, and hear what else the client has to say."""
    with tls.unwrap() as sock:
        while sock.recv(65536):
            pass


def _garbled_handshake(sock: socket.socket, _: ssl.SSLContext) -> None:
    sock.sendall(b"S")
    sock.recv(65536)
    sock.sendall(bytes.fromhex("160303007a 02000076 0303") + bytes(116))
    sock.recv(65536)


def _half_handshake(sock: socket.socket, context: ssl.SSLContext) -> None:
    sock.sendall(b"S")
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_side=True)
    incoming.write(sock.recv(65536))
    with suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    sock.sendall(outgoing.read()[:200])


BEFORE: Final[dict[str, _Misbehaviour]] = {
    "no TLS": _says(b"N", waits=True),
    "nothing": _says(),
    "silence": _says(waits=True),
    "an odd answer": _says(b"X", waits=True),
    "an error": _says(message("E", b"SFATAL\0C53300\0Mtoo many\0\0")),
    "half an error": _says(b"E\0\0"),
    "something behind the answer": _says(b"S" + LOGGED_IN, waits=True),
    "TLS that ends": _says(b"S"),
    "TLS that is none": _says(b"S", b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    "TLS that is silent": _says(b"S", waits=True),
    "an alert": _says(b"S", b"\x15\x03\x03\x00\x02\x02\x28"),
    "a huge record": _says(b"S", b"\x16\x03\x03\xff\xff" + bytes(70_000)),
    "a garbled handshake": _garbled_handshake,
    "half a handshake": _half_handshake,
}
"""What a server does before there is TLS: the client is told that it can't be connected to."""
LATER: Final[dict[str, _Misbehaviour]] = {
    "the end": _shakes_hands(lambda tls: tls.close()),
    "the end of TLS": _shakes_hands(_end_tls),
    "a reset": _shakes_hands(_reset),
    "half an answer": _shakes_hands(lambda tls: tls.sendall(ANSWER[:-3])),
    "no TLS any more": _shakes_hands(lambda tls: _raw(tls, ANSWER)),
    "a corrupt record": _shakes_hands(lambda tls: _raw(tls, b"\x17\x03\x03\x00\x40" + bytes(64))),
    "half a record": _shakes_hands(lambda tls: _raw(tls, b"\x17\x03\x03\x00\x40" + bytes(30))),
    "a huge record": _shakes_hands(lambda tls: _raw(tls, b"\x17\x03\x03\xff\xff" + bytes(70_000))),
    "an alert": _shakes_hands(lambda tls: _raw(tls, b"\x15\x03\x03\x00\x02\x02\x28")),
}
"""What a server does in the middle of a session, which is over then."""
TORN: Final = {"half an answer"}
"""Where there is no room for words, as the client waits for the rest of a message."""


class _Server:
    """A server that does with its next client what it is told to, and with all others what is right."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.next: _Misbehaviour | None = None
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                sock.settimeout(_SECONDS)
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, suppress(OSError):
            if sock.recv(len(SSL_REQUEST)) != SSL_REQUEST:
                return
            misbehave, self.next = self.next, None
            if misbehave is not None:
                misbehave(sock, self._context)
                return
            sock.sendall(b"S")
            with self._context.wrap_socket(sock, server_side=True) as tls:
                tls.recv(65536)
                tls.sendall(LOGGED_IN)
                while (data := tls.recv(65536)) and data != TERMINATE:
                    tls.sendall(ANSWER)


@pytest.fixture(scope="module")
def hostile_server(papers: Papers) -> Iterator[_Server]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(papers.server.cert, papers.server.key)
    server = _Server(context)
    yield server
    server.close()


@pytest.fixture(scope="module")
def guarded(hostile_server: _Server, papers: Papers, _heated: None) -> Iterator[GuardProcess]:
    """A guard in front of it."""
    upstream = f"host=127.0.0.1 port={hostile_server.port} sslmode=require connect_timeout=2"
    with running_guard(upstream, "--tls-cert", str(papers.server.cert), "--tls-key", str(papers.server.key)) as guard:
        yield guard


def _serves_others(address: Address) -> None:
    client = TlsClient(address)
    client.log_in()
    client.ask("SELECT 1")
    client.send(TERMINATE)
    client.close()


@pytest.mark.parametrize("what", BEFORE)
def test_a_server_that_misbehaves_before_there_is_tls(
    what: str, hostile_server: _Server, guarded: GuardProcess
) -> None:
    hostile_server.next = BEFORE[what]
    client = Bare(guarded.tcp)
    [said] = words(client.rest())
    client.close()
    assert said.text.startswith("pgguard: could not connect to the server") or "too many" in said.text
    _serves_others(guarded.tcp)


@pytest.mark.parametrize("what", LATER)
def test_a_server_that_misbehaves_in_the_middle(what: str, hostile_server: _Server, guarded: GuardProcess) -> None:
    hostile_server.next = LATER[what]
    client = TlsClient(guarded.tcp)
    client.log_in()
    client.send(query("SELECT 1"))
    said = client.rest()
    client.close()
    assert (b"pgguard: " in said) is (what not in TORN), said
    _serves_others(guarded.tcp)


def test_a_hostile_server_is_no_fault_of_anybody(guarded: GuardProcess) -> None:
    kinds = {fault["kind"] for fault in guarded.faults()}
    assert not kinds & _TAKE_TWO
