"""The very test during which a fault arises fails, in the very phase, and no other one does."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING

import pytest

from tests.pytest_plugin.conftest import outcomes
from tests.pytest_plugin.projects import MISDEEDS, RECORDER

if TYPE_CHECKING:
    from tests.pytest_plugin.conftest import Run

TESTS = """
import time

import pytest
from misdeeds import *


def test_shares_with_a_child():
    share_with_child()


def test_gives_its_child_a_connection_of_its_own():
    give_child_its_own()


def test_shares_between_threads():
    share_between_threads()


def test_takes_turns_in_threads():
    take_turns_in_threads()


def test_leaves_work_open_and_dies():
    die_with_work_open()


@pytest.fixture
def sharing():
    share_with_child()


@pytest.fixture
def leaving_work_open():
    yield
    die_with_work_open()


def test_has_a_bad_beginning(sharing):
    pass


def test_has_a_bad_end(leaving_work_open):
    give_child_its_own()


def test_fails_by_itself():
    share_with_child()
    assert not "itself"


@pytest.mark.xfail(reason="it is known to")
def test_is_expected_to_fail():
    share_with_child()


def test_is_skipped():
    share_with_child()
    pytest.skip("but it has shared")


def test_idles_in_a_transaction():
    global idle
    idle = psycopg.connect(os.environ["DATABASE_URL"])
    idle.execute("select 'idle'")


def test_runs_while_that_is_noticed(pgguard):
    deadline = time.monotonic() + 60
    while not pgguard._run._late:
        assert time.monotonic() < deadline
        time.sleep(0.05)
        assert pgguard.faults == ()


def test_puts_that_in_order():
    idle.close()
"""

OUTCOMES = {
    "test_shares_with_a_child": {"call": "failed"},
    "test_gives_its_child_a_connection_of_its_own": {},
    "test_shares_between_threads": {"call": "failed"},
    "test_takes_turns_in_threads": {},
    "test_leaves_work_open_and_dies": {"call": "failed"},
    "test_has_a_bad_beginning": {"setup": "failed"},
    "test_has_a_bad_end": {"teardown": "failed"},
    "test_fails_by_itself": {"call": "failed"},
    "test_is_expected_to_fail": {"call": "skipped"},
    "test_is_skipped": {"call": "failed"},
    "test_idles_in_a_transaction": {"teardown": "failed"},
    "test_runs_while_that_is_noticed": {},
    "test_puts_that_in_order": {},
}
"""Which phases of which test don't pass. A test that has been over for a while is reported once more, as at its end."""


@pytest.mark.parametrize("workers", ["0", "2"], ids=["alone", "xdist"])
def test_each_fault_fails_its_own_test(pytester: pytest.Pytester, run: Run, workers: str) -> None:
    pytester.makepyfile(misdeeds=MISDEEDS, test_deeds=TESTS)
    pytester.makeconftest(RECORDER)
    arguments = (
        "--pgguard",
        "--pgguard-fail-on=warning",
        "-n",
        workers,
        "--dist=loadfile",
        "-rA",
        "--junitxml=o.xml",
    )
    result = run(*arguments, plugins=["xdist"], PGGUARD_IDLE_IN_TRANSACTION="0.5")
    found, told = outcomes(pytester)
    assert found == OUTCOMES, result.stdout.str()
    assert result.ret == pytest.ExitCode.TESTS_FAILED

    longrepr, sections = told["test_shares_with_a_child"]
    assert longrepr.startswith("pgguard: shared-by-processes: pid "), longrepr
    assert "What to change: Reconnect after forking" in longrepr
    [report] = sections
    assert "ERROR: shared-by-processes: two processes use one connection" in report
    assert "Intruder: pid" in report
    assert "SUMMARY: pgguard: shared-by-processes" in report
    for name, kind in [
        ("test_shares_between_threads", "shared-by-threads"),
        ("test_leaves_work_open_and_dies", "unclean-close"),
        ("test_has_a_bad_beginning", "shared-by-processes"),
        ("test_has_a_bad_end", "unclean-close"),
        ("test_is_skipped", "shared-by-processes"),
        ("test_idles_in_a_transaction", "idle-in-transaction"),
    ]:
        assert told[name][0].startswith(f"pgguard: {kind}: "), (name, told[name][0])
    own, sections = told["test_fails_by_itself"]
    assert "assert not" in own
    assert "shared-by-processes" in sections[0]
    assert "This was found when the test was over, and belongs to its call" in told["test_idles_in_a_transaction"][0]

    result.stdout.fnmatch_lines(
        [
            "*Captured pgguard call*",
            "*= pgguard =*",
            "ERROR shared-by-processes, 5 times: pid *",
            "    *test_deeds.py::test_shares_with_a_child",
            "WARNING idle-in-transaction, once: *",
            "    *test_deeds.py::test_idles_in_a_transaction",
            "pgguard: * connections, * faults from * causes",
        ]
    )
    failures = {
        case.get("name"): failure.text or ""
        for case in ET.parse(pytester.path / "o.xml").iter("testcase")
        for failure in [*case.findall("failure"), *case.findall("error")]
    }
    assert set(failures) == {name for name, phases in OUTCOMES.items() if "failed" in phases.values()}
    assert "pgguard: shared-by-processes" in failures["test_shares_with_a_child"]
    properties = {
        case.get("name"): [one.get("value", "") for one in case.iter("property")]
        for case in ET.parse(pytester.path / "o.xml").iter("testcase")
    }
    assert "Intruder: pid" in properties["test_shares_with_a_child"][0]


def test_the_next_test_is_not_blamed_for_what_it_shows(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(
        misdeeds=MISDEEDS,
        test_turns="""
        import pytest
        from misdeeds import *


        @pytest.fixture(scope="session")
        def connection():
            with connect() as connection:
                yield connection


        def test_opens_it(connection):
            connection.execute("select 1")


        def test_uses_it_in_a_child(connection):
            in_child(lambda: connection.execute("select 'child'"))


        def test_uses_it_then(connection):
            connection.execute("select 2")


        def test_uses_it_again(connection):
            connection.execute("select 3")
        """,
    )
    result = run("--pgguard")
    result.assert_outcomes(passed=4, errors=1)
    result.stdout.fnmatch_lines(["ERROR test_turns.py::test_uses_it_in_a_child*"])


def test_what_children_have_is_the_test_s_that_has_left_it_to_them(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(
        misdeeds=MISDEEDS,
        test_children="""
        import signal
        import time

        import pytest
        from misdeeds import *


        @pytest.fixture(scope="session")
        def connection():
            with connect() as connection:
                yield connection


        def test_opens_it(connection):
            connection.execute("select 1")


        def test_leaves_a_child_behind(connection):
            global child
            child = os.fork()
            if not child:
                time.sleep(600)
                os._exit(0)
            time.sleep(0.1)


        def test_runs_while_that_is_noticed(pgguard):
            deadline = time.monotonic() + 60
            while not pgguard._run._late:
                assert time.monotonic() < deadline
                time.sleep(0.05)
                assert pgguard.faults == ()


        def test_puts_that_in_order():
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


        def serve(*, closes):
            # A child that opens a connection, and is there until the tests have ended.
            ready, said = os.pipe()
            tests = os.getpid()
            if not os.fork():
                own = connect()
                own.execute("select 1")
                if closes:
                    own.close()
                os.write(said, b"!")
                while os.getppid() == tests:
                    time.sleep(0.05)
                os._exit(0)
            os.read(ready, 1)


        def test_leaves_a_connection_behind():
            serve(closes=False)


        def test_leaves_a_child_behind_that_closes_its_connection():
            serve(closes=True)


        @pytest.fixture(scope="module")
        def kept():
            return connect()


        def test_keeps_a_connection_of_its_own_process(kept):
            kept.execute("select 1")
        """,
    )
    pytester.makeconftest(RECORDER)
    result = run("--pgguard", "--pgguard-fail-on=warning")
    found, told = outcomes(pytester)
    assert {name: phases for name, phases in found.items() if phases} == {
        "test_leaves_a_child_behind": {"teardown": "failed"},
        "test_leaves_a_connection_behind": {"teardown": "failed"},
    }, result.stdout.str()
    assert told["test_leaves_a_child_behind"][0].startswith("pgguard: inherited-connection: ")
    leaked = told["test_leaves_a_connection_behind"][0]
    assert leaked.startswith("pgguard: leaked-connection: the connection that pid "), leaked
    assert "was still open when the tests had ended" in leaked
