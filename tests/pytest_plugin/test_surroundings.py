"""What the guard is to its surroundings: the environment, other processes, other plugins, other ways to run tests."""

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

from tests.pytest_plugin.conftest import ALONE, SECONDS, outcomes
from tests.pytest_plugin.projects import MISDEEDS, RECORDER

if TYPE_CHECKING:
    from tests.pytest_plugin.conftest import Run
    from tests.servers import Server


def test_the_environment_leads_to_the_guard_from_the_first_conftest_to_the_last_fixture(
    pytester: pytest.Pytester, run: Run, url: str, database: Server
) -> None:
    pytester.makeconftest(
        """
        import atexit
        import json
        import os
        import pathlib

        import psycopg
        import pytest

        NAMES = ("DATABASE_URL", "SQLALCHEMY_DATABASE_URI", "PGHOST", "PGPORT", "OTHER_URL")


        def note(when):
            with pathlib.Path("environment.jsonl").open("a") as file:
                print(json.dumps([when, {name: os.environ.get(name) for name in NAMES}]), file=file)


        note("conftest")
        # It is closed when everything else is, and still there until then.
        kept = psycopg.connect(os.environ["DATABASE_URL"], autocommit=True)


        def close():
            kept.execute("select 'the end'")
            kept.close()
            note("exit")


        atexit.register(close)


        @pytest.fixture(scope="session", autouse=True)
        def whole_session():
            yield
            note("session")


        def pytest_unconfigure():
            note("unconfigured")
        """
    )
    pytester.makepyfile("def test_nothing():\n    pass\n")
    port = str(database.tcp.port)
    sqlalchemy = url.replace("postgresql:", "postgresql+asyncpg:")
    result = run(
        "--pgguard", SQLALCHEMY_DATABASE_URI=sqlalchemy, PGHOST="127.0.0.1", PGPORT=port, OTHER_URL="redis://h:1"
    )
    result.assert_outcomes(passed=1)
    assert result.ret == 0
    led = "DATABASE_URL, PGPORT and SQLALCHEMY_DATABASE_URI"
    result.stdout.fnmatch_lines(
        [
            f"pgguard: guarding 127.0.0.1:{port} on 127.0.0.1:*, where {led} lead now",
            "pgguard: 1 connection, no faults",
        ]
    )
    noted = [json.loads(line) for line in (pytester.path / "environment.jsonl").read_text().splitlines()]
    assert [when for when, _ in noted] == ["conftest", "session", "unconfigured", "exit"]
    before = noted[-1][1]
    assert before == {
        "DATABASE_URL": url,
        "SQLALCHEMY_DATABASE_URI": sqlalchemy,
        "PGHOST": "127.0.0.1",
        "PGPORT": port,
        "OTHER_URL": "redis://h:1",
    }
    during = noted[0][1]
    assert noted[1][1] == during
    new = during["PGPORT"]
    assert new != port
    assert during == {name: value.replace(port, new) for name, value in before.items()}


def test_tests_that_don_t_come_through_it_are_told_how_to(
    pytester: pytest.Pytester, run: Run, database: Server
) -> None:
    pytester.makepyfile(
        f"""
        import psycopg
        import pytest


        @pytest.fixture(scope="session")
        def url():
            return "postgresql://postgres@127.0.0.1:{database.tcp.port}/postgres"


        def test_connects_past_it(url):
            psycopg.connect(url).close()


        @pytest.fixture(scope="session")
        def led(pgguard_session, url):
            led = pgguard_session.front(url)
            assert pgguard_session.front(url) == led != url
            return led


        def test_connects_through_one_of_its_own(led, pgguard):
            with pgguard.expect("unclean-close"):
                connection = psycopg.connect(led, autocommit=True)
                with pytest.raises(psycopg.OperationalError):
                    connection.execute("select pg_terminate_backend(pg_backend_pid())")
                import os, socket
                connection = psycopg.connect(led)
                connection.execute("select 1")
                socket.socket(fileno=os.dup(connection.fileno())).shutdown(socket.SHUT_RDWR)


        def test_names_a_server_wrongly(pgguard_session):
            with pytest.raises(ValueError, match="^front\\(\\): mysql: is not a PostgreSQL URL"):
                pgguard_session.front("mysql://h/d")
        """
    )
    past = "pgguard: no connection came through the guard. *pgguard_session.front(URL)"
    result = run("--pgguard", "-k", "past")
    assert result.ret == 0
    result.stdout.fnmatch_lines([past])
    result = run("--pgguard", "-k", "past", DATABASE_URL=None)
    assert result.ret == 0
    result.stdout.fnmatch_lines([past])
    result.stdout.fnmatch_lines(["pgguard: nothing says where PostgreSQL is: guarding what fixtures start"])
    result = run("--pgguard", "-k", "not past", DATABASE_URL=None)
    result.assert_outcomes(passed=2, deselected=1)
    result.stdout.fnmatch_lines(["pgguard: 2 connections, no faults"])


def test_what_belongs_to_no_test_fails_the_run_and_none_of_them(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(
        misdeeds=MISDEEDS,
        test_innocent="from misdeeds import *\n\nshare_with_child()\n\n\ndef test_nothing():\n    pass\n",
    )
    for arguments in ((), ("-n", "1")):
        result = run("--pgguard", "--pgguard-records=faults.jsonl", *arguments, plugins=["xdist"])
        result.assert_outcomes(passed=1)
        assert result.ret == pytest.ExitCode.TESTS_FAILED
        result.stdout.fnmatch_lines(
            [
                "ERROR shared-by-processes, once: *",
                "    before the first test",
                "*before the first test: it belongs to no single test, and fails the run",
                "pgguard: ERROR: shared-by-processes: two processes use one connection",
            ]
        )
    recorded = [json.loads(line) for line in (pytester.path / "faults.jsonl").read_text().splitlines()]
    assert [one["kind"] for one in recorded].count("shared-by-processes") == 2
    assert len({one["run"] for one in recorded}) == 2


def test_what_a_test_has_done_that_is_interrupted_is_told_at_the_end(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(
        misdeeds=MISDEEDS,
        test_interrupted="""
        from misdeeds import *


        def test_is_interrupted():
            share_with_child()
            raise KeyboardInterrupt
        """,
    )
    result = run("--pgguard")
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(
        [
            "ERROR shared-by-processes, once: *",
            "    test_interrupted.py::test_is_interrupted",
            "test_interrupted.py::test_is_interrupted was interrupted:",
            "pgguard: ERROR: shared-by-processes: two processes use one connection",
        ]
    )


def test_what_the_guard_of_a_worker_has_found_is_told_though_that_has_crashed(
    pytester: pytest.Pytester, run: Run
) -> None:
    pytester.makepyfile(
        misdeeds=MISDEEDS,
        test_crashing="""
        import signal

        from misdeeds import *


        def test_crashes():
            share_with_child()
            os.kill(os.getpid(), signal.SIGKILL)


        def test_goes_on():
            pass
        """,
    )
    result = run("--pgguard", "-n", "1", plugins=["xdist"])
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        [
            "ERROR shared-by-processes, once: *",
            "    test_crashing.py::test_crashes",
            "gw0 has crashed; test_crashing.py::test_crashes:",
            "pgguard: ERROR: shared-by-processes: two processes use one connection",
            "pgguard: 1 connection, *",
        ]
    )


def processes_of(parent: int) -> list[int]:
    """The guards' processes beside the tests of a process."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            stat = path.read_text().rpartition(") ")[2].split()
            command = path.with_name("cmdline").read_bytes()
        except OSError:
            continue
        if int(stat[1]) == parent and b"pgguard.testing.process" in command:
            found.append(int(path.parent.name))
    return found


def test_the_guard_ends_with_the_tests_process_also_when_that_is_killed(pytester: pytest.Pytester, url: str) -> None:
    pytester.makepyfile(
        """
        import os
        import pathlib
        import time


        def test_is_killed():
            if not os.fork():
                time.sleep(600)  # with whatever it has inherited
            pathlib.Path("ready").write_text(str(os.getpid()))
            time.sleep(600)
        """
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "PYTEST"))}
    command = [sys.executable, "-m", "pytest", "--pgguard"]
    with subprocess.Popen(
        command, cwd=pytester.path, env=environment | ALONE | {"DATABASE_URL": url}, start_new_session=True
    ) as process:
        try:
            deadline = time.monotonic() + SECONDS
            while not (pytester.path / "ready").exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
            [guard] = processes_of(process.pid)
            process.kill()
            process.wait()
            while Path(f"/proc/{guard}").exists():
                assert time.monotonic() < deadline, "it has outlived its tests"
                time.sleep(0.02)
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_guard_that_is_lost_is_said_and_fails_the_run(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(
        """
        import os
        import signal


        def test_kills_it(pgguard):
            os.kill(pgguard._run._guard.pid, signal.SIGKILL)


        def test_goes_on():
            pass
        """
    )
    result = run("--pgguard")
    result.assert_outcomes(passed=2)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["the guard's process (pid *) has ended by signal 9"])


def test_what_the_guard_says_names_the_option_that_there_is(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(
        """
        import os

        import psycopg


        def test_connects():
            psycopg.connect(os.environ["DATABASE_URL"])
        """
    )
    result = run("--pgguard", DATABASE_URL="postgresql://somebody@127.0.0.1:1/postgres")
    result.assert_outcomes(failed=1)
    says = "the guard says: PostgreSQL can't be reached at 127.0.0.1:1 (Connection refused), *: check "
    result.stdout.fnmatch_lines([f"{says}that it is running there, and that --pgguard-upstream is right"])


def test_who_isn_t_root_has_the_kernel_name_senders_over_a_unix_socket(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    for name, value in (ALONE | {"DATABASE_URL": url}).items():
        monkeypatch.setenv(name, value)
    pytester.makepyfile(
        misdeeds=MISDEEDS,
        test_moments="from misdeeds import *\n\n\ndef test_shares():\n    share_with_child()\n\n\n"
        "def test_is_innocent():\n    give_child_its_own()\n",
    )
    rights = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    command = [*rights, sys.executable, "-m", "pytest", "--pgguard"]
    result = pytester.run(*command, "-k", "innocent", timeout=SECONDS)
    result.stdout.fnmatch_lines(
        ["pgguard: some evidence isn't available here: *", "pgguard: so *: add --pgguard-unix *"]
    )
    result = pytester.run(*command, "--pgguard-unix", timeout=SECONDS)
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["pgguard: guarding 127.0.0.1:* on unix:/*", "pgguard: shared-by-processes: *"])
    result.stdout.no_fnmatch_line("pgguard: some evidence*")


OTHERS = """
import os
import unittest

import psycopg
import pytest

from misdeeds import *

times = [0]


@pytest.mark.flaky(reruns=2)
def test_shares_at_first():
    times[0] += 1
    if times[0] < 2:
        share_with_child()


@pytest.mark.timeout(60)
def test_within_a_time():
    share_with_child()


async def share_asynchronously():
    async with await psycopg.AsyncConnection.connect(os.environ["DATABASE_URL"], autocommit=True) as connection:
        await connection.execute("select 1")
        share_with_child()


@pytest.mark.asyncio
async def test_in_asyncio():
    await share_asynchronously()


class TestCase(unittest.TestCase):
    def test_in_a_test_case(self):
        share_with_child()

    def test_gives_its_child_its_own(self):
        give_child_its_own()


def test_with_subtests(subtests):
    for n in range(3):
        with subtests.test(n=n):
            assert n != 1
    share_with_child()
"""


def test_other_plugins_go_on_to_work(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(misdeeds=MISDEEDS, test_others=OTHERS)
    pytester.makeconftest(RECORDER)
    arguments = ("--pgguard", "-p", "no:trio", "-W", "ignore")
    result = run(*arguments, plugins=None)
    found, _ = outcomes(pytester)
    assert {name: phases for name, phases in found.items() if phases} == {
        "test_shares_at_first": {"call": "rerun"},
        "test_within_a_time": {"call": "failed"},
        "test_in_asyncio": {"call": "failed"},
        "TestCase::test_in_a_test_case": {"call": "failed"},
        "test_with_subtests": {"call": "failed"},
    }, result.stdout.str()
    again = run(*arguments, "--lf", "-x", plugins=None)
    again.assert_outcomes(failed=1, deselected=1)
