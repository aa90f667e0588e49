"""Several servers behind one guard, with TLS to one and none to the other: each is connected to as its entry says."""

from __future__ import annotations

import json
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, cast

import pytest
import trio

from pgguard.cli.doctor import doctor
from tests.proxy.conftest import until
from tests.proxy.fake_backend import FakeBackend, converse, part
from tests.proxy.messages import (
    BACKEND_PID,
    LOGGED_IN,
    SECONDS,
    SECRET,
    SSL_REQUEST,
    TERMINATE,
    Client,
    cancel_request,
    startup,
)
from tests.proxy.spawned import spawned
from tests.proxy.test_databases import ENTRY, Street, street
from tests.proxy.tls_backend import answer_once, encrypt, showing
from tests.proxy.tls_client import TlsStream
from tests.tls.certificates import Authority

if TYPE_CHECKING:
    from pathlib import Path

    from tests.proxy.fake_backend import BackendConnection
    from tests.tls.certificates import Pair

pytestmark = pytest.mark.usefixtures("empty_home")


async def by_tls(there: Street, name: str) -> Client:
    """A client that has TLS."""
    plain = await there.connect(name)
    await plain.send(SSL_REQUEST)
    await plain.expect(b"S")
    stream = TlsStream(plain.stream)
    await stream.shake_hands()
    return Client(cast("trio.SocketStream", stream))


async def accept(there: Street, name: str, pair: Pair) -> BackendConnection:
    """A connection of the guard's to a server; to that of orders, with TLS."""
    return await (encrypt(there.backends[name], pair) if name == "orders" else there.backends[name].accept())


async def test_each_is_connected_to_as_its_entry_says(pair: Pair, authority: Authority) -> None:
    """And clients of both are shown the guard's one certificate, if they ask for it."""
    orders = {"upstream": f"sslmode=verify-full sslrootcert={authority.cert}"}
    async with street({"tls_cert": "self-signed"}, orders=orders, audit={}) as there:
        for name in there.backends:
            for encrypted in True, False:
                client = await (by_tls(there, name) if encrypted else there.connect(name))
                await client.send(startup())
                server = await accept(there, name, pair)
                assert await server.log_in() == startup()
                await client.expect(LOGGED_IN)
                await converse(client, server)
                [one] = there.guard.snapshot()
                assert (one.facts.through, one.facts.tls) == (name, encrypted)
                await part(client, server)
                await until(lambda: not there.guard.snapshot())
            canceller = await there.connect(name)
            await canceller.send(cancel_request(BACKEND_PID, SECRET))
            server = await accept(there, name, pair)
            assert await server.packet() == cancel_request(BACKEND_PID, SECRET)
            await server.close()
        assert there.faults == []


async def test_what_is_to_be_changed_is_that_entry(caplog: pytest.LogCaptureFixture) -> None:
    async with street(orders={"upstream": "sslmode=require"}, audit={}) as there:
        client = await there.connect("orders")
        await client.send(startup())
        server = await there.backends["orders"].accept()
        await server.expect(SSL_REQUEST)
        await server.send(b"N")
        fields = (await client.message()).fields
        assert "server does not support SSL, but SSL was required" in fields["M"]
        assert fields["H"].endswith("set sslmode=prefer or sslmode=disable in databases.orders.upstream.")
        client, server = await there.backends["audit"].session(there.ports["audit"])
        await converse(client, server)
    [said] = [one for one in caplog.messages if "could not connect" in one]
    assert said.startswith("session 1 through orders: could not connect to the server: ")


def configured(directory: Path, orders: str, audit: str) -> None:
    """Write a file with two databases, of which it is said where they are."""
    entries = ENTRY.format("orders", orders, "127.0.0.1:0") + ENTRY.format("audit", audit, "127.0.0.1:0")
    (directory / "pgguard.toml").write_text(f'attribution = "off"\nshutdown_timeout = 0.1\n{entries}')


async def test_what_is_said_of_each_at_the_start_and_when_files_are_renewed(
    backend: FakeBackend, pair: Pair, authority: Authority, tmp_path: Path
) -> None:
    other = FakeBackend()
    await other.listen()
    roots = tmp_path / "roots.crt"
    roots.write_bytes(authority.cert.read_bytes())
    orders = f"host=127.0.0.1 port={backend.port} sslmode=verify-ca sslrootcert={roots}"
    configured(tmp_path, orders, f"host=127.0.0.1 port={other.port} sslmode=disable")
    how = "by TLSv1.3 with TLS_AES_256_GCM_SHA384, its certificate is verified"
    with spawned(None, listen=None, cwd=tmp_path) as guard:
        with suppress(trio.BrokenResourceError):
            mark = await encrypt(backend, pair)  # to see whether it leads back to itself
            await mark.packet()
            await mark.close()
        await trio.to_thread.run_sync(guard.wait_for, rf"PostgreSQL (?:\(orders\) )?at .*{how}()")
        port = int(guard.wait_for(r"database orders: clients of 127\.0\.0\.1:(\d+) come to PostgreSQL at "))
        roots.write_text("nonsense")
        guard.signal(signal.SIGHUP)
        guard.wait_for(
            r"SIGHUP: TLS to the server of orders stays as it is: databases\.orders\.upstream: sslrootcert: ()"
        )
        client = await backend.connect(port)
        await client.send(startup())
        server = await encrypt(backend, pair)
        await server.log_in()
        await client.expect(LOGGED_IN)
        await client.send(TERMINATE)
        await server.expect(TERMINATE)
        await server.close()
        roots.write_bytes(authority.cert.read_bytes())
        guard.signal(signal.SIGHUP)
        guard.wait_for("SIGHUP: read the files again that are for TLS to the server of orders()")
        guard.signal(signal.SIGTERM)
        said = guard.end()
    assert "the server of audit" not in said
    await other.close_all()


def test_the_doctor_says_it_of_each(
    pair: Pair,
    authority: Authority,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("pgguard.cli.doctor.check", list)
    monkeypatch.chdir(tmp_path)
    with (
        socket.create_server(("127.0.0.1", 0)) as one,
        socket.create_server(("127.0.0.1", 0)) as other,
        ThreadPoolExecutor(2) as pool,
    ):
        ports = [listener.getsockname()[1] for listener in (one, other)]
        served = [pool.submit(answer_once, *given, showing(pair)) for given in ((one, b"S"), (other, b"N"))]
        configured(
            tmp_path,
            f"host=127.0.0.1 port={ports[0]} sslmode=verify-full sslrootcert={authority.cert}",
            f"host=127.0.0.1 port={ports[1]} sslmode=require",
        )
        doctor(as_json=True)
        for each in served:
            each.result(SECONDS)
    found = {said["name"]: said for said in json.loads(capsys.readouterr().out)}
    orders, audit = found["TLS to the server of orders"], found["TLS to the server of audit"]
    assert orders["available"]
    assert orders["purpose"].endswith("its certificate and its name are verified")
    assert not audit["available"]
    assert audit["problem"] == "server does not support SSL, but SSL was required"
    assert audit["remedy"].endswith("set sslmode=prefer or sslmode=disable in databases.audit.upstream")
