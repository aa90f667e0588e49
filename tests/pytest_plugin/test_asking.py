"""What tests can ask of the guard, and say of it: fixtures, markers, options and settings."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.pytest_plugin.conftest import outcomes
from tests.pytest_plugin.projects import MISDEEDS, RECORDER

if TYPE_CHECKING:
    from tests.pytest_plugin.conftest import Run

OFF = "pgguard is off: run pytest with --pgguard"


def test_a_test_asks_for_its_faults_expects_and_allows_them(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(
        misdeeds=MISDEEDS,
        test_asking="""
        import os
        import pathlib
        import subprocess
        import sys
        import time

        import psycopg
        import pytest

        from misdeeds import *


        def kinds(faults):
            return [(fault.kind, fault.severity) for fault in faults]


        SHARED = [("shared-by-processes", "error")]


        def test_sees_its_own(pgguard):
            assert pgguard.faults == ()
            pgguard.expect_none()
            with connect() as connection:
                share(connection)
                [fault] = pgguard.faults
                assert kinds([fault]) == SHARED
                assert fault.session.application_name == "tests"
                assert {culprit.pid for culprit in fault.culprits} > {os.getpid()}
                share(connection)
                assert kinds(pgguard.faults) == SHARED
            with pytest.raises(pytest.fail.Exception, match="shared-by-processes"):
                pgguard.expect_none()


        def test_sees_no_other_tests(pgguard):
            pgguard.expect_none()


        def test_expects_some(pgguard):
            with pgguard.expect("shared-by-processes") as found:
                share_with_child()
            assert kinds(found) == SHARED
            pgguard.expect_none()


        def test_expects_what_is_noticed_late(pgguard):
            with psycopg.connect(os.environ["DATABASE_URL"]) as connection:
                with pgguard.expect("idle-in-transaction") as found:
                    connection.execute("select 1")
                assert kinds(found) == [("idle-in-transaction", "warning")]


        def test_expects_others(pgguard):
            with pgguard.expect("unclean-close", within=0.2):
                share_with_child()


        def test_expects_some_and_goes_on(pgguard):
            with connect() as connection:
                with pgguard.expect("shared-by-processes"):
                    share(connection)
                share(connection)


        @pytest.mark.pgguard(allow="shared-by-processes")
        def test_allows_a_kind():
            share_with_child()


        @pytest.mark.pgguard(allow=["shared-by-threads", "unclean-close"])
        def test_allows_others():
            share_with_child()


        @pytest.mark.pgguard(allow="unclean-close")
        class TestClass:
            def test_is_allowed_it(self):
                die_with_work_open()

            @pytest.mark.pgguard(allow="shared-by-processes")
            def test_is_allowed_more(self):
                share_with_child()
                die_with_work_open()

            @pytest.mark.pgguard(fail_on="never")
            def test_is_allowed_everything(self):
                share_with_child()

        def test_has_a_program_connect_as_it_does(pgguard):
            assert pgguard.env["DATABASE_URL"] == os.environ["DATABASE_URL"]
            assert pgguard.url.removeprefix("postgresql://") in os.environ["DATABASE_URL"]
            program = "import os, psycopg; psycopg.connect(os.environ['DATABASE_URL']).close()"
            subprocess.run([sys.executable, "-c", program], check=True, env=dict(pgguard.env))


        def test_asks_from_a_child(pgguard):
            def work():
                try:
                    pgguard.faults
                except Exception as error:
                    pathlib.Path("child").write_text(str(error))

            in_child(work)
        """,
    )
    pytester.makeconftest(RECORDER)
    result = run("--pgguard", PGGUARD_IDLE_IN_TRANSACTION="0.3")
    found, told = outcomes(pytester)
    assert {name for name, phases in found.items() if phases} == {
        "test_sees_its_own",
        "test_expects_others",
        "test_expects_some_and_goes_on",
        "test_allows_others",
    }, result.stdout.str()
    assert told["test_expects_others"][0] == (
        "pgguard: expected unclean-close, which didn't come within 0.2 s; there has been shared-by-processes"
    )
    assert told["test_allows_a_kind"][0] == "None"
    assert "ERROR: shared-by-processes" in told["test_allows_a_kind"][1][0]
    assert (pytester.path / "child").read_text().startswith("a process that a test has forked can't ask the guard")


@pytest.mark.parametrize(
    ("marker", "problem"),
    [
        ('allow="shared-by-thread"', "there is no kind of fault 'shared-by-thread': did you mean shared-by-threads?"),
        ('allow=["unclean-close", "x"]', "there is no kind of fault 'x': pgguard explain lists them"),
        ('alow="unclean-close"', "there is no 'alow': it can say allow and fail_on"),
        ('fail_on="warn"', "'warn' is none of error, warning, never"),
        ('"unclean-close"', "write what it says by name, as in allow='unclean-close'"),
    ],
)
def test_a_marker_that_says_what_there_isn_t_is_an_error(pytester: pytest.Pytester, marker: str, problem: str) -> None:
    pytester.makepyfile(f"import pytest\n\n\n@pytest.mark.pgguard({marker})\ndef test_nothing():\n    pass\n")
    result = pytester.runpytest_inprocess("--strict-markers", "-p", "no:asyncio")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert any(line.startswith("ERROR: test_a_marker") and problem in line for line in result.errlines), result.errlines


def test_without_being_asked_for_it_does_nothing(pytester: pytest.Pytester, run: Run, url: str) -> None:
    pytester.makepyfile(
        test_off=f"""
        import os
        import sys

        import pytest

        BEFORE = set(sys.modules)


        @pytest.mark.pgguard(allow="unclean-close")
        def test_marked():
            assert os.environ["DATABASE_URL"] == {url!r}


        def test_nothing_is_imported():
            # The marker above has had its kinds looked up.
            pgguards = {{name for name in sys.modules if name.startswith("pgguard.")}}
            assert "pgguard.pytest_plugin" in pgguards
            assert not {{"pgguard.testing.run", "pgguard.proxy", "trio", "psycopg", "rich"}} & set(sys.modules)


        def test_asks(pgguard):
            raise AssertionError


        def test_puts_no_guard_in_front_of_others(pgguard_session):
            assert pgguard_session.front("postgresql://h/d") == "postgresql://h/d"
        """
    )
    result = run("--strict-markers", "-rs")
    result.assert_outcomes(passed=3, skipped=1)
    assert result.ret == 0
    result.stdout.fnmatch_lines([f"SKIPPED * {OFF}"])
    result.stdout.no_fnmatch_line("*pgguard: *")
    blocked = run("-p", "no:pgguard", "-k", "test_marked", "-W", "ignore", plugins=None)
    blocked.assert_outcomes(passed=1, deselected=3)


def test_importing_it_takes_nothing_of_pgguards() -> None:
    program = "import sys, pgguard.pytest_plugin; print(*[name for name in sys.modules if name.startswith('pgguard')])"
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert found.stdout.split() == ["pgguard", "pgguard.pytest_plugin"]


def test_settings_of_the_project_are_read_and_options_come_first(pytester: pytest.Pytester, run: Run, url: str) -> None:
    pytester.makepyfile(
        misdeeds=MISDEEDS,
        test_settings="""
        from misdeeds import *


        def test_shares():
            share_with_child()


        def test_dies():
            die_with_work_open()
        """,
    )
    pytester.makepyprojecttoml(
        f"""
        [tool.pytest.ini_options]
        pgguard = true
        pgguard_upstream = "{url}"
        pgguard_fail_on = "never"
        pgguard_allow = ["unclean-close"]
        """
    )
    result = run()
    result.assert_outcomes(passed=2)
    assert result.ret == 0
    result.stdout.fnmatch_lines(["ERROR shared-by-processes, once: *", "ERROR unclean-close, once: *"])
    result = run("--pgguard-fail-on=error")
    result.assert_outcomes(passed=1, failed=1)
    result = run("--no-pgguard")
    result.assert_outcomes(passed=2)
    result.stdout.no_fnmatch_line("*pgguard: *")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--pgguard-fail-on=bad",), "--pgguard-fail-on: 'bad' is none of error, warning, never"),
        (("--pgguard-upstream=host=a port=b",), "--pgguard-upstream: *port*"),
        (("-n", "2", "--pgguard-fail-on=bad"), "--pgguard-fail-on: 'bad' is none of error, warning, never"),
    ],
)
def test_a_guard_that_can_t_run_is_said_in_one_line(
    pytester: pytest.Pytester, run: Run, arguments: tuple[str, ...], problem: str
) -> None:
    pytester.makepyfile("def test_nothing():\n    pass\n")
    result = run("--pgguard", *arguments, plugins=["xdist"])
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert len(result.errlines) <= 2, result.errlines
    result.stderr.fnmatch_lines([f"ERROR: {problem}"])
