"""No secret in anything that a guard writes, whatever clients do with theirs, and however they log in."""

from __future__ import annotations

import json
import random
import string
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from pgguard.secrets.names import STEM
from tests.guard_process import LIMITED, UNLIMITED, GuardProcess, running_guard
from tests.integration.running import PROGRAMS, running
from tests.proxy.spawned import run
from tests.secrets.surroundings import COMMANDS, SQL, TEXTS, Place, pieces_of, raw
from tests.servers import REQUIRE_ALL, Server, installations, not_installed, running_server

if TYPE_CHECKING:
    from collections.abc import Iterator

_METHODS = {"md5": "md5", "scram-sha-256": "scram-sha-256", "password": "scram-sha-256"}
"""How clients log in, and how the server keeps their passwords."""
_SIGNS = "".join((string.ascii_letters, string.digits, string.punctuation)).replace("*", "")
"""What secrets are made of: but for what stands in the place of one that is hidden."""
_MODES = {"normalized": UNLIMITED, "full": UNLIMITED, "none": LIMITED}
"""How guards show SQL. Those that do record all of it, however often its cause comes; the other one makes repeats."""
_PROGRAMS = 6
_CONNECTIONS = 3
_STATEMENTS = 4
_PLAIN = Place(("{}",), raw)


class _Secrets:
    """Makes secrets up, and remembers where each of them stands."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.told: list[tuple[Place, str]] = []

    def holding(self, place: Place) -> tuple[str, ...]:
        secret = "".join(self.random.choices(_SIGNS, k=20))
        while STEM.search(secret) is not None:  # without quotes it would be the name of a column that holds one
            secret = "".join(self.random.choices(_SIGNS, k=20))
        self.told.append((place, f"x{secret}"))
        return place.holding(f"x{secret}")

    def plain(self) -> str:
        return self.holding(_PLAIN)[0]


@contextmanager
def _demanding_server(bindir: Path, passwords: dict[str, str]) -> Iterator[Server]:
    """A server with a user for each method of authentication, that insists on it."""
    with running_server(bindir) as server, psycopg.connect(server.unix.conninfo, autocommit=True) as admin:
        admin.execute("CREATE TABLE users (name text, password text UNIQUE)")
        admin.execute("GRANT ALL ON users TO PUBLIC")
        for method, kept in _METHODS.items():
            admin.execute(sql.SQL("SET password_encryption = {}").format(sql.Literal(kept)))
            password = sql.Literal(passwords[method])
            admin.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(method), password))
        [[path]] = admin.execute("SHOW hba_file").fetchall()
        rules = "".join(f'local all "{method}" {method}\n' for method in _METHODS)
        Path(path).write_text(f"local all postgres trust\n{rules}")
        admin.execute("SELECT pg_reload_conf()")
        yield server


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _task(secrets: _Secrets, guards: list[GuardProcess], passwords: dict[str, str]) -> dict[str, Any]:
    connections = []
    for guard in guards:
        for _ in range(_CONNECTIONS):
            method = secrets.random.choice(list(_METHODS))
            conninfo = make_conninfo(
                host=guard.tcp.host,
                port=guard.tcp.port,
                dbname="postgres",
                user=method,
                password=passwords[method],
                application_name=secrets.holding(secrets.random.choice(TEXTS))[0].replace("\n", " "),
                options=f"-c app.jwt={secrets.random.randbytes(9).hex()}",
            )
            statements = [secrets.holding(place)[0] for place in secrets.random.sample(SQL, _STATEMENTS)]
            connections.append({"conninfo": conninfo, "statements": statements, "secret": secrets.plain()})
    secrets.random.shuffle(connections)
    return {"name": f"pw={secrets.plain()}"[:15], "connections": connections}


def _other_commands(secrets: _Secrets, cwd: Path) -> list[str]:
    """What the other commands say, in an environment with secrets, and of what they can't understand."""
    url = f"postgres://u:{quote(secrets.plain(), safe='')}@h/db"
    variables = {"PGPASSWORD": secrets.plain(), "PGGUARD_UPSTREAM": url, "DATABASE_URL": url, "COLUMNS": "100000"}
    said = []
    for arguments in (["doctor"], ["doctor", "--json"], ["explain"], ["explain", "unread-answer"], ["explain", url]):
        done = run(*arguments, cwd=cwd, variables=variables)
        assert done.returncode == (2 if url in arguments else 0), done.stderr
        assert (done.stderr if url in arguments else done.stdout) != ""
        said += [done.stdout, done.stderr]
    return said


def _wait_for(guard: GuardProcess, number: int) -> None:
    """Wait until so many connections have ended uncleanly, recorded each or counted with the next one of its cause."""
    deadline = time.monotonic() + 40
    while sum(1 + fault["suppressed"] for fault in guard.faults("unclean-close")) < number:
        assert time.monotonic() < deadline, f"{guard.faults()}\n{guard.stderr}"
        time.sleep(0.02)


@pytest.mark.flaky(reruns=0)
@pytest.mark.parametrize("installation", installations())
def test_no_secret_is_in_anything_that_a_guard_writes(installation: str, tmp_path: Path) -> None:
    bindir = installations()[installation]
    if bindir is None:
        not_installed(f"{installation} PostgreSQL")
    seed = 2026 if REQUIRE_ALL else random.randrange(1 << 32)
    print(f"seed {seed}")
    secrets = _Secrets(seed)
    passwords = {method: secrets.plain() for method in _METHODS}
    with ExitStack() as stack:
        server = stack.enter_context(_demanding_server(bindir, passwords))
        guards = [
            stack.enter_context(
                running_guard(server.unix, "--sql", mode, program=program, environ={"COLUMNS": "1000000"})
            )
            for mode, program in _MODES.items()
        ]
        commands = list(COMMANDS)
        said_besides: list[str] = []
        secrets.random.shuffle(commands)
        for number in range(_PROGRAMS):
            arguments = [word for place in commands[number::_PROGRAMS] for word in ("--", *secrets.holding(place))]
            command = [sys.executable, str(PROGRAMS / "tells_secrets.py"), *arguments]
            task = _task(secrets, guards, passwords)
            with running(command, guards[0].tcp, tmp_path, f"program-{number}") as program:
                program.say(json.dumps(task))
                program.read()
                for guard in guards:
                    _wait_for(guard, _CONNECTIONS * (number + 1))
                if number == 0:
                    said_besides = _other_commands(secrets, tmp_path)
                program.go_on()
        for guard, mode in zip(guards, _MODES, strict=True):
            guard.stop()
            faults = guard.faults()
            requests = [request for fault in faults for request in fault["requests"]]
            assert len([request for request in requests if request["sql"]]) > (0 if mode == "none" else 50) - 1
            known = [one["process"] for fault in faults for one in fault["culprits"] if one["process"] is not None]
            assert any("***" in process["cmdline"] for process in known)
            assert {process["name"] for process in known} == {"pw=***"}
            assert any(fault["repeat_of"] for fault in faults) is (mode == "none")
            texts = [guard.stderr, *said_besides, *(text for fault in faults for text in _strings(fault))]
            written = pieces_of("\n".join(texts))
            leaks = {str(place): found for place, secret in secrets.told if (found := place.leaks(secret, written))}
            assert leaks == {}
