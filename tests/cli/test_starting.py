"""What a guard says as it starts: three short lines, and what is wrong."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from typing import TYPE_CHECKING

import psycopg
import pytest
import trio

from pgguard.proxy.addresses import Address, TcpAddress, UnixAddress, parse_listen, parse_upstream, unused_database_url
from pgguard.proxy.loops import LoopWatch
from pgguard.proxy.settings import Front, mistyped_variables
from tests.proxy.conftest import backend, running, until
from tests.proxy.fake_backend import converse, part
from tests.proxy.messages import TERMINATE, Client
from tests.proxy.spawned import Spawned, environment, spawned

if TYPE_CHECKING:
    from pathlib import Path

    from tests.proxy.fake_backend import FakeBackend

__all__ = ["backend"]

SSL_REQUEST = b"\0\0\0\x08\x04\xd2\x16\x2f"
GSSENC_REQUEST = b"\0\0\0\x08\x04\xd2\x16\x30"


def lines(guard: Spawned) -> list[str]:
    """What it has said up to when it was ready."""
    guard.wait_for(r"(ready on .*\n)")
    said = guard._said.decode().splitlines()
    return said[: next(n for n, line in enumerate(said) if line.startswith("pgguard: ready on ")) + 1]


def end(guard: Spawned) -> str:
    guard.signal(signal.SIGTERM)
    return guard.end()


@pytest.mark.parametrize("attribution", ["auto", "off"])
async def test_three_lines_at_most(backend: FakeBackend, attribution: str, tmp_path: Path) -> None:
    (tmp_path / "pgguard.toml").write_text(f"attribution = '{attribution}'\n")
    with spawned(f"host=127.0.0.1 port={backend.port} sslmode=disable", cwd=tmp_path) as guard:
        said = lines(guard)
        end(guard)
    assert len(said) == 2 + any("evidence" in line for line in said)
    assert said[-2:] == [
        f"pgguard: PostgreSQL is at 127.0.0.1:{backend.port}; settings are from {tmp_path}/pgguard.toml",
        f"pgguard: ready on 127.0.0.1:{guard.port}",
    ]
    for line in said[:-2]:
        assert re.fullmatch(
            r"pgguard: some evidence isn't available here: [\w' ,/]+; run pgguard doctor to see why", line
        )


def test_what_can_not_be_had_is_named_in_one_line(tmp_path: Path) -> None:
    command = ["setpriv", "--bounding-set=-net_admin", sys.executable, "-m", "pgguard", "serve"]
    command += ["--listen", "127.0.0.1:0", "--upstream", f"host=127.0.0.1 port={port_of_nobody()}"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE) as process:
        try:
            guard = Spawned(process)
            said = lines(guard)
            end(guard)
        finally:
            if process.poll() is None:
                process.kill()
    [line] = [line for line in said if "evidence" in line]
    assert "isn't available here: kernel senders on TCP" in line
    assert [line for line in said if "reached" not in line] == said[-3:]


# A server that can't be reached


def port_of_nobody() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


HOPE = "so clients get an error: check that it is running there, and that --upstream is right"


def test_a_server_that_can_not_be_reached_is_a_warning(tmp_path: Path) -> None:
    port = port_of_nobody()
    with spawned(f"host=127.0.0.1 port={port}", cwd=tmp_path) as guard:
        where = rf"127\.0\.0\.1:{port} \(Connection refused\)"
        guard.wait_for(rf"(pgguard: PostgreSQL can't be reached at {where}, {HOPE}\n)")
        end(guard)


@pytest.mark.parametrize(
    ("upstream", "why"),
    [
        ("host=/nowhere port=7", r"unix:/nowhere:7 \(No such file or directory\)"),
        ("host=nowhere.invalid", r"nowhere\.invalid:5432 \(.+\)"),
        ("host=192.0.2.1.2", r"192\.0\.2\.1\.2:5432 \(.+\)"),
    ],
)
async def test_it_says_why(upstream: str, why: str) -> None:
    async with running(upstream=upstream) as house:
        assert house.guard.unreachable() == [], "it hasn't been tried yet"
        assert await house.guard.find_loop() is None
        [said] = house.guard.unreachable()
        assert re.fullmatch(rf"PostgreSQL can't be reached at {why}, {HOPE}", said)


async def test_of_several_servers_those_that_can_not_be_reached(backend: FakeBackend, tmp_path: Path) -> None:
    port = port_of_nobody()
    with spawned(f"host=127.0.0.1,127.0.0.1 port={port},{backend.port} sslmode=disable", cwd=tmp_path) as guard:
        await backend.close_mark()
        await trio.to_thread.run_sync(
            guard.wait_for,
            rf"(PostgreSQL can't be reached at 127\.0\.0\.1:{port} \(Connection refused\), so only its other addresses "
            r"are used\n)",
        )
        end(guard)


async def test_of_a_server_that_can_be_reached_nothing_is_said(backend: FakeBackend, tmp_path: Path) -> None:
    with spawned(f"host=127.0.0.1 port={backend.port} sslmode=disable", cwd=tmp_path) as guard:
        await backend.close_mark()
        assert "reached" not in end(guard)


async def test_a_server_that_does_not_answer_holds_up_nothing() -> None:
    """Its backlog is full, so that its kernel doesn't answer: that is said when it is known."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        port = server.getsockname()[1]
        with closing(socket.create_connection(("127.0.0.1", port))):
            started = time.monotonic()
            upstream = parse_upstream(f"host=127.0.0.1 port={port}")
            watch = LoopWatch(Front(None, upstream, ()))
            with trio.fail_after(10):
                assert await watch.seek() is None
            if not watch.unreachable:
                pytest.skip("the kernel has taken the connection all the same")
            assert time.monotonic() - started < 9
            [error] = watch.unreachable.values()
            assert str(error).startswith("no answer within ")


# DATABASE_URL


URL = "postgresql://app:S3CRET@db.example:6000/app?sslmode=require"


@pytest.mark.parametrize(
    ("url", "instead"),
    [
        (URL, "postgresql://db.example:6000"),
        ("postgres://app:S3CRET@a,b:7/app", "postgresql://a:5432,b:7"),
        ("postgresql+asyncpg://app:S3CRET@[::2]/app", "postgresql://[::2]:5432"),
        ("host=db.example password=S3CRET", "postgresql://db.example:5432"),
        ("postgresql://app:S3CRET@/app?host=/run/pg", "'host=/run/pg port=5432'"),
        ("postgresql://app:S3CRET@127.0.0.1:6000/app", "postgresql://127.0.0.1:6000"),
    ],
)
def test_a_database_url_that_is_not_used_is_said(url: str, instead: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", url)
    upstream = parse_upstream("host=other")
    said = unused_database_url(upstream, [parse_listen("127.0.0.1:6544")])
    assert said == (
        "DATABASE_URL is set, but pgguard serve doesn't use it. To guard the server in DATABASE_URL instead of "
        f"other:5432, add --upstream {instead}"
    )


@pytest.mark.parametrize(
    "url",
    [
        "",
        "postgresql://app:S3CRET@other/app",
        "postgresql://app:S3CRET@127.0.0.1:6544/app",
        "postgresql://app:S3CRET@localhost:6544/app",
        "postgresql://app@/app?host=/run/pgguard",
        "mysql://app:S3CRET@db/app",
        "sqlite:///app.db",
        "postgresql://app:S3CRET@db:S3CRET/app",
    ],
)
def test_one_that_leads_to_the_guard_or_its_server_or_elsewhere_is_not(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is for clients, then, as it should be; or for another database."""
    monkeypatch.setenv("DATABASE_URL", url)
    listening: list[Address] = [TcpAddress("127.0.0.1", 6544), UnixAddress("/run/pgguard", 5432)]
    assert unused_database_url(parse_upstream("host=other"), listening) is None


@pytest.mark.parametrize("by", ["nobody", "file"])
def test_it_is_said_if_nothing_else_says_where_the_server_is(by: str, tmp_path: Path) -> None:
    variables = {"PGHOST": "127.0.0.1", "PGPORT": str(port_of_nobody()), "DATABASE_URL": URL, "PGGUARD_MODUS": "log"}
    upstream = f"host=127.0.0.1 port={port_of_nobody()}"
    if by == "file":
        (tmp_path / "pgguard.toml").write_text(f"upstream = '{upstream}'\n")
    with spawned(None, cwd=tmp_path, listen="127.0.0.1:0", descriptors=None, **variables) as guard:
        said = end(guard)
    assert ("DATABASE_URL is set, but" in said) is (by == "nobody")
    assert "pgguard: PGGUARD_MODUS is not used: did you mean PGGUARD_MODE?\n" in said
    assert "S3CRET" not in said


# Variables


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("PGGUARD_LISTNE", ["PGGUARD_LISTNE is not used: did you mean PGGUARD_LISTEN?"]),
        ("PGGUARD_FAULT", ["PGGUARD_FAULT is not used: did you mean PGGUARD_FAULTS?"]),
        (
            "PGGUARD_STARTUP_TIMEOUT",
            ["PGGUARD_STARTUP_TIMEOUT is not used: startup_timeout can only be set in the configuration file"],
        ),
        ("PGGUARD_LISTEN", []),
        ("PGGUARD_CONFIG", []),
        ("PGGUARD_SERVICE_HOST", []),
        ("PGGUARD_PORT_5432_TCP_ADDR", []),
        ("PGGUARD_REQUIRE_ALL", []),
        ("MY_PGGUARD_LISTNE", []),
    ],
)
def test_a_variable_that_is_mistyped_is_said(name: str, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """And others' variables aren't the guard's: Kubernetes has some for a service that is called pgguard."""
    for variable in os.environ:
        if variable.startswith("PGGUARD_"):
            monkeypatch.delenv(variable)
    monkeypatch.setenv(name, "x")
    assert mistyped_variables() == said


# Clients that insist on TLS


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgguard.proxy.declined._SECOND_TRY", 0.1)


def said_of_tls(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [message for message in caplog.messages if "hung up when told that there is none" in message]


async def ask(port: int, *requests: bytes) -> Client:
    client = await Client.connect(port)
    for request in requests:
        await client.send(request)
        await client.expect(b"N")
    return client


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("requests", [(SSL_REQUEST,), (GSSENC_REQUEST, SSL_REQUEST), (GSSENC_REQUEST,)])
async def test_a_client_that_leaves_as_there_is_no_tls_is_told_of_once(
    backend: FakeBackend, requests: tuple[bytes, ...], caplog: pytest.LogCaptureFixture
) -> None:
    async with running(backend) as house:
        for _ in range(2):
            await (await ask(house.port, *requests)).close()
        await until(lambda: bool(said_of_tls(caplog)) and not house.guard._receptions[None].declined._left)
        await (await ask(house.port, *requests)).close()
        await until(lambda: house.guard.sessions == 3 and not house.guard._roster.arriving)
        await until(lambda: not house.guard._receptions[None].declined._left)
        assert house.kinds == []
    [said] = said_of_tls(caplog)
    what = "TLS" if SSL_REQUEST in requests else "GSSAPI encryption"
    setting = "sslmode=prefer or sslmode=disable" if what == "TLS" else "gssencmode=disable"
    besides = r", or offer it TLS over TCP \(--tls-cert\)" if what == "TLS" else ""
    assert re.fullmatch(
        rf"session \d: 127\.0\.0\.1:\d+ asked for {what}, and hung up when told that there is none: "
        rf"set {setting} in the client{besides}",
        said,
    )


@pytest.mark.usefixtures("quick")
async def test_who_goes_on_says_goodbye_or_does_not_read_the_answer_does_not_insist(
    backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    """Prefers TLS; is a health check; has been cancelled meanwhile, before the answer came or after it."""
    async with running(backend) as house:
        client = await ask(house.port, SSL_REQUEST)
        server = await backend.let_in(client)
        await converse(client, server)
        await client.close()
        checked = await ask(house.port, SSL_REQUEST)
        await checked.send(TERMINATE)
        await checked.close()
        for answered in False, True:
            with socket.create_connection(("127.0.0.1", house.port)) as cancelled:
                cancelled.sendall(SSL_REQUEST)
                if answered:
                    await trio.to_thread.run_sync(lambda: cancelled.recv(1, socket.MSG_PEEK))
        await until(lambda: house.guard.sessions == 4)
        await until(lambda: not house.guard._receptions[None].declined._left)
        await trio.sleep(0.2)
    assert said_of_tls(caplog) == []


@pytest.mark.usefixtures("quick")
async def test_who_comes_again_without_does_not_insist(backend: FakeBackend, caplog: pytest.LogCaptureFixture) -> None:
    """As pgx does with its default, sslmode=prefer."""
    async with running(backend) as house:
        await (await ask(house.port, SSL_REQUEST)).close()
        await until(lambda: bool(house.guard._receptions[None].declined._left))
        client, server = await house.session()
        await until(lambda: not house.guard._receptions[None].declined._left)
        await part(client, server)
    assert said_of_tls(caplog) == []


async def test_a_real_client_that_insists(tmp_path: Path) -> None:
    """libpq, and which process it is in."""
    with spawned(f"host=127.0.0.1 port={port_of_nobody()}", cwd=tmp_path) as guard:
        with pytest.raises(psycopg.OperationalError, match="does not support SSL"):
            psycopg.connect(host="127.0.0.1", port=guard.port, sslmode="require")
        guard.wait_for(
            rf"(session 1: pid {os.getpid()} \(.+\) asked for TLS, and hung up when told that there is none: "
            r"set sslmode=prefer )"
        )
        end(guard)
