"""The certificate that clients are shown: renewed while sessions run, and refused if it is of no use."""

from __future__ import annotations

import os
import shutil
import signal
import ssl
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Final

import pytest

from tests.proxy.messages import TERMINATE
from tests.tls.bare import TlsClient
from tests.tls.certificates import Pair
from tests.tls.conftest import tls_guard
from tests.tls.servers import outcome

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.guard_process import GuardProcess
    from tests.tls.servers import Papers, TlsServer

_SECONDS: Final = 30.0


def _install(pair: Pair, at: Pair) -> None:
    """Put a certificate and its key where those are that are in use."""
    for new, old in ((pair.cert, at.cert), (pair.key, at.key)):
        fresh = old.with_suffix(".new")
        shutil.copy(new, fresh)
        fresh.replace(old)


def _shown(client: TlsClient) -> bytes | None:
    return client.tls.getpeercert(binary_form=True)


def _der(pair: Pair) -> bytes:
    return ssl.PEM_cert_to_DER_cert(pair.cert.read_text())


def _wait_until(condition: Callable[[], bool], guard: GuardProcess) -> None:
    deadline = time.monotonic() + _SECONDS
    while not condition():
        assert time.monotonic() < deadline, guard.stderr
        time.sleep(0.02)


def _newcomer_is_shown(guard: GuardProcess, pair: Pair) -> bool:
    client = TlsClient(guard.tcp)
    try:
        client.log_in()
        client.send(TERMINATE)
        return _shown(client) == _der(pair)
    finally:
        client.close()


def test_a_renewed_certificate_is_for_new_sessions(tls_server: TlsServer, papers: Papers, tmp_path: Path) -> None:
    used = Pair(tmp_path / "used.crt", tmp_path / "used.key")
    _install(papers.server, used)
    with tls_guard(tls_server, "sslmode=require", used) as guard:
        client = TlsClient(guard.tcp)
        client.log_in()
        _install(papers.renewed, used)
        os.kill(guard.pid, signal.SIGHUP)
        _wait_until(lambda: _newcomer_is_shown(guard, papers.renewed), guard)
        # What is of no use isn't used, and it is said why.
        shutil.copy(papers.client.key, used.key)
        os.kill(guard.pid, signal.SIGHUP)
        _wait_until(lambda: str(used.key) in guard.stderr, guard)
        assert _newcomer_is_shown(guard, papers.renewed)
        assert b"42" in client.ask("SELECT 42"), "who was there before has noticed nothing"
        client.send(TERMINATE)
        client.close()
        guard.assert_no_faults()


def _refusal(server: TlsServer, *options: str | Path) -> str:
    """What a guard says that doesn't start."""
    command = [sys.executable, "-m", "pgguard", "serve", "--listen", "127.0.0.1:0", *map(str, options)]
    command += ["--upstream", f"host={server.tcp.host} port={server.tcp.port}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    [said] = done.stderr.splitlines()
    return said


@pytest.mark.parametrize("mode", [0o644, 0o660])
def test_a_key_that_others_can_read_is_refused(
    mode: int, tls_server: TlsServer, papers: Papers, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    shutil.copy(papers.server.key, key)
    key.chmod(mode)
    said = _refusal(tls_server, "--tls-cert", papers.server.cert, "--tls-key", key)
    assert str(key) in said
    assert "0600" in said


def test_what_is_of_no_use_is_refused(tls_server: TlsServer, papers: Papers) -> None:
    said = _refusal(tls_server, "--tls-cert", papers.expired.cert, "--tls-key", papers.expired.key)
    assert "expired" in said
    said = _refusal(tls_server, "--tls-cert", papers.server.cert, "--tls-key", papers.renewed.key)
    assert str(papers.renewed.key) in said
    said = _refusal(
        tls_server, "--tls-cert", papers.client_with_password.cert, "--tls-key", papers.client_with_password.key
    )
    assert "passphrase" in said


def test_clients_certificates_are_checked_if_there_is_somebody_to_vouch_for_them(
    tls_server: TlsServer, papers: Papers
) -> None:
    with tls_guard(tls_server, "sslmode=require", papers.server, "--tls-ca", str(papers.ca)) as guard:

        def made(pair: Pair | None) -> bool:
            shown = {} if pair is None else {"sslcert": pair.cert, "sslkey": pair.key}
            return outcome(guard.tcp, sslmode="require", **shown).is_made

        assert made(None)
        assert made(papers.client)
        assert not made(papers.client_of_stranger)
        assert not made(papers.client_expired)


def test_a_certificate_of_its_own(tls_server: TlsServer) -> None:
    with tls_guard(tls_server, "sslmode=require", None, "--tls-cert", "self-signed") as guard:
        client = TlsClient(guard.tcp)
        client.log_in()
        assert b"42" in client.ask("SELECT 42")
        client.send(TERMINATE)
        client.close()
        guard.assert_no_faults()
