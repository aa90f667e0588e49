"""SIGHUP: the file of faults is reopened, and what can change at run time changes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from pgguard.faults.policy import KindAction, Mode
from pgguard.proxy.errors import ConfigurationError
from pgguard.proxy.settings import Reloaded, Settings, load_settings, reload_settings
from pgguard.session.verdicts import Kind
from tests.proxy.conftest import until
from tests.proxy.messages import ANSWER, COLUMNS, Client, message, query
from tests.proxy.spawned import Spawned, environment, spawned

if TYPE_CHECKING:
    from tests.proxy.fake_backend import BackendConnection, FakeBackend


class Scene:
    """A guard with a configuration file, and one session."""

    def __init__(self, guard: Spawned, backend: FakeBackend, directory: Path) -> None:
        self.guard = guard
        self.backend = backend
        self.directory = directory
        self.config = directory / "pgguard.toml"
        self.file = directory / "faults.jsonl"
        self._reloads = 0

    async def session(self) -> tuple[Client, BackendConnection]:
        return await self.backend.session(self.guard.port)

    def reload(self, config: str | None = None) -> None:
        """Change the configuration, and wait until that is known."""
        if config is not None:
            self.config.write_text(config)
        self._reloads += 1
        self.guard.signal(signal.SIGHUP)
        done = r"SIGHUP: (?:nothing has changed|no setting has changed|shutdown_timeout is now \S+)"
        self.guard.wait_for(rf"(?s)(?:{done}.*){{{self._reloads}}}()")

    def kinds(self, file: Path | None = None) -> list[str]:
        file = file or self.file
        return [json.loads(line)["kind"] for line in file.read_text().splitlines()] if file.exists() else []

    async def recorded(self, *kinds: str) -> None:
        await until(lambda: len(self.kinds()) >= len(kinds))
        assert self.kinds() == list(kinds)


async def misuse(client: Client, server: BackendConnection) -> None:
    """The server sends what nobody has asked for."""
    await server.send(COLUMNS)
    await client.expect(COLUMNS)


def start(backend: FakeBackend, directory: Path, *options: str) -> tuple[str, ...]:
    return (
        f"host=127.0.0.1 port={backend.port} sslmode=disable",
        *("--faults", str(directory / "faults.jsonl"), "--attribution", "off", *options),
    )


SOON = "shutdown_timeout = 0.1\n"
"""For tests that end while sessions are open."""


async def test_the_file_of_faults_is_reopened(backend: FakeBackend, tmp_path: Path) -> None:
    (tmp_path / "pgguard.toml").write_text(SOON)
    with spawned(*start(backend, tmp_path), cwd=tmp_path) as guard:
        scene = Scene(guard, backend, tmp_path)
        client, server = await scene.session()
        await misuse(client, server)
        await scene.recorded("message-while-idle")
        scene.file.rename(tmp_path / "old")
        scene.reload()
        assert scene.file.exists()
        await misuse(*await scene.session())
        await scene.recorded("message-while-idle")
        assert scene.kinds(tmp_path / "old") == ["message-while-idle"]
        guard.signal(signal.SIGTERM)
        said = guard.end()
    assert f"SIGHUP: reopened {scene.file}\n" in said


async def test_a_file_that_is_renamed_or_removed_is_begun_anew_without_a_signal(
    backend: FakeBackend, tmp_path: Path
) -> None:
    (tmp_path / "pgguard.toml").write_text(SOON)
    with spawned(*start(backend, tmp_path), cwd=tmp_path) as guard:
        scene = Scene(guard, backend, tmp_path)
        await misuse(*await scene.session())
        await scene.recorded("message-while-idle")
        for _ in range(2):
            scene.file.unlink()
            await until(scene.file.exists)
            await misuse(*await scene.session())
            await scene.recorded("message-while-idle")
        guard.signal(signal.SIGTERM)
        guard.end()


async def test_what_is_done_about_faults_changes_for_sessions_that_are_open_and_known_faults(
    backend: FakeBackend, tmp_path: Path
) -> None:
    quiet = "shutdown_timeout = {}\n"
    (tmp_path / "pgguard.toml").write_text(quiet.format(8))
    with spawned(*start(backend, tmp_path), cwd=tmp_path) as guard:
        scene = Scene(guard, backend, tmp_path)
        client, server = await scene.session()
        await misuse(client, server)
        scene.reload(quiet.format(7) + "[kinds]\nmessage-while-idle = 'drop'\n")
        await server.send(COLUMNS)
        await client.nothing()
        scene.reload(quiet.format(6) + "mode = 'reject'\n")
        await server.send(COLUMNS)
        assert (await client.message()).fields["C"] == "08P01"
        other, its_server = await scene.session()
        scene.reload(quiet.format(5) + "[kinds]\nmessage-while-idle = 'ignore'\n")
        await misuse(other, its_server)
        scene.reload(quiet.format(4))
        await misuse(other, its_server)
        for peer in (other, its_server, server):
            await peer.close()
        guard.signal(signal.SIGTERM)
        said = guard.end()
    records = [json.loads(line) for line in scene.file.read_text().splitlines()]
    assert sum(1 + record["suppressed"] for record in records) == 4
    assert [record["repeat_of"] for record in records] == [None] + [1] * (len(records) - 1)
    # They are of one cause and come fast, but what is done for the first time is recorded at once.
    assert [record["action"] for record in records][:3] == ["logged", "dropped", "rejected"]
    for line in (
        "kinds.message-while-idle is now drop (was not set)",
        "shutdown_timeout is now 7 (was 8)",
        "mode is now reject (was log)",
        "kinds.message-while-idle is now not set (was drop)",
    ):
        assert f"pgguard: SIGHUP: {line}\n" in said


async def test_thresholds_change(backend: FakeBackend, tmp_path: Path) -> None:
    (tmp_path / "pgguard.toml").write_text("idle_in_transaction = 0\n")
    with spawned(*start(backend, tmp_path), cwd=tmp_path) as guard:
        scene = Scene(guard, backend, tmp_path)
        client, server = await scene.session()
        await client.send(query("begin"))
        await server.expect(query("begin"))
        await server.send(message("C", b"BEGIN\0") + message("Z", b"T"))
        await client.message()
        await client.message()
        scene.reload("idle_in_transaction = 0.1\nshutdown_timeout = 7\n")
        await scene.recorded("idle-in-transaction")
        guard.signal(signal.SIGTERM)
        await client.close()
        await server.close()
        guard.end()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("mode = ", "pgguard.toml: it is not valid TOML"),
        ("moed = 'reject'\nmode = 'reject'", "pgguard.toml: moed: there is no such setting: did you mean mode?"),
        ("mode = 'reject'\n[kinds]\nunclean-close = 'drop'", r"\[kinds\]: unclean-close can't be dropped"),
    ],
)
async def test_a_file_with_an_error_changes_nothing_and_says_so(
    backend: FakeBackend, tmp_path: Path, text: str, says: str
) -> None:
    with spawned(*start(backend, tmp_path), cwd=tmp_path) as guard:
        scene = Scene(guard, backend, tmp_path)
        client, server = await scene.session()
        scene.reload(text)
        guard.wait_for(f"SIGHUP: nothing has changed: .*{says}()")
        await misuse(client, server)
        await scene.recorded("message-while-idle")
        await client.close()
        await server.close()
        guard.signal(signal.SIGTERM)
        guard.end()


async def test_as_it_shuts_down_and_again_and_again(backend: FakeBackend, tmp_path: Path) -> None:
    with spawned(*start(backend, tmp_path), cwd=tmp_path) as guard:
        scene = Scene(guard, backend, tmp_path)
        client, server = await scene.session()
        for _ in range(200):
            guard.signal(signal.SIGHUP)
        scene.reload()
        await client.send(query("select 1"))
        await server.expect(query("select 1"))
        guard.signal(signal.SIGTERM)
        guard.wait_for("waiting up to 8 s()")
        for _ in range(20):
            guard.signal(signal.SIGHUP)
            await trio.sleep(0.005)
        await server.send(ANSWER)
        await client.expect(ANSWER)
        await client.send(message("X"))
        await client.close()
        await server.close()
        guard.end()


def test_before_it_is_ready(tmp_path: Path) -> None:
    """While it reads its configuration, which here is a pipe; it is read once more then."""
    config = tmp_path / "config"
    os.mkfifo(config)
    command = [sys.executable, "-m", "pgguard", "serve", "--upstream", "host=127.0.0.1 port=1", "--config", str(config)]
    command += ["--listen", "127.0.0.1:0", "--attribution", "off"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE) as process:
        try:
            with config.open("w") as file:  # as soon as somebody reads it
                process.send_signal(signal.SIGHUP)
                time.sleep(0.1)
                file.write("mode = 'log'\n")
            guard = Spawned(process)
            config.write_text("mode = 'reject'\n")
            guard.wait_for(r"SIGHUP: mode is now reject \(was log\)()")
            guard.signal(signal.SIGTERM)
            guard.end()
        finally:
            if process.poll() is None:
                process.kill()


# The settings alone


def reloaded(directory: Path, before: str, after: str, **given: object) -> Reloaded:
    file = directory / "pgguard.toml"
    file.write_text(before)
    current = load_settings(given, file)
    file.write_text(after)
    return reload_settings(current, given, file)


def test_what_is_given_by_option_keeps_winning(tmp_path: Path) -> None:
    settings, remarks = reloaded(tmp_path, "sql = 'none'", "mode = 'reject'\nsql = 'full'", mode="log")
    assert (settings.mode, settings.sql) == (Mode.LOG, "full")
    assert remarks == ["sql is now full (was none)"]


def test_what_can_not_be_changed_is_said_each_time_and_stays(tmp_path: Path) -> None:
    after = "listen = ['127.0.0.1:2']\nupstream = 'host=b password=hunter2'\nattribution = 'off'\nmode = 'reject'"
    settings, remarks = reloaded(tmp_path, "listen = ['127.0.0.1:1']\nupstream = 'host=a'", after)
    expected = Settings(listen=["127.0.0.1:1"], upstream="host=a", mode=Mode.REJECT)
    assert settings.model_dump() == expected.model_dump()
    assert remarks == [
        "upstream stays as it is: restart pgguard to change it",
        "listen stays as it is: restart pgguard to change it",
        "mode is now reject (was log)",
        "attribution stays as it is: restart pgguard to change it",
    ]
    again = reload_settings(settings, {}, tmp_path / "pgguard.toml")
    assert [remark.split()[0] for remark in again.remarks] == ["upstream", "listen", "attribution"]


def test_the_file_of_faults_can_be_another_one_but_not_come_or_go(tmp_path: Path) -> None:
    settings, remarks = reloaded(tmp_path, "faults = 'a'", "faults = 'b'")
    assert (settings.faults, remarks) == (Path("b"), ["faults is now b (was a)"])
    settings, remarks = reloaded(tmp_path, "faults = 'a'", "")
    assert settings.faults == Path("a")
    settings, remarks = reloaded(tmp_path, "", "faults = 'a'")
    assert settings.faults is None
    assert remarks == ["faults stays as it is: restart pgguard to change it"]


@pytest.mark.parametrize(
    ("after", "says"),
    [
        ("mode = 'reject'\nlisten = ['nowhere']", "--listen nowhere: write HOST:PORT"),
        ("mode = 'reject'\nupstream = 'host'", '--upstream: missing "=" after "host"'),
    ],
)
def test_an_error_in_what_can_not_be_changed_is_an_error(tmp_path: Path, after: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        reloaded(tmp_path, "", after)


def test_kinds_come_and_go(tmp_path: Path) -> None:
    before = "[kinds]\nunclean-close = 'ignore'\nuntracked = 'log'"
    settings, remarks = reloaded(tmp_path, before, "[kinds]\nunclean-close = 'log'\nleaked-connection = 'ignore'")
    assert settings.policies()[None].per_kind == {
        Kind.UNCLEAN_CLOSE: KindAction.LOG,
        Kind.LEAKED_CONNECTION: KindAction.IGNORE,
    }
    assert remarks == [
        "kinds.unclean-close is now log (was ignore)",
        "kinds.leaked-connection is now ignore (was not set)",
        "kinds.untracked is now not set (was log)",
    ]


@pytest.mark.skipif(os.geteuid() != 0, reason="it takes root to give a file to somebody else")
def test_a_file_that_somebody_else_has_written_meanwhile_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "pgguard.toml"
    file.write_text("mode = 'reject'")
    monkeypatch.chdir(tmp_path)
    current = load_settings({}, None)
    assert current.mode is Mode.REJECT
    os.chown(file, 65534, -1)
    with pytest.raises(ConfigurationError, match="it belongs to user nobody"):
        reload_settings(current, {}, None)


def test_a_file_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was named is missed; the one that is there by chance leaves the defaults."""
    file = tmp_path / "pgguard.toml"
    file.write_text("mode = 'reject'")
    monkeypatch.chdir(tmp_path)
    named, by_chance = load_settings({}, file), load_settings({}, None)
    file.unlink()
    with pytest.raises(ConfigurationError, match="No such file"):
        reload_settings(named, {}, file)
    assert reload_settings(by_chance, {}, None).remarks == ["mode is now log (was reject)"]
