"""Preforking programs on TLS: what breaks if they connect before they fork, who did it, and that advice cures it."""

from __future__ import annotations

import re
import shutil
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import pytest

from tests.integration.running import PROGRAMS, Program, running
from tests.integration.test_pasted_advice import CASES, paste
from tests.tls.conftest import tls_guard
from tests.tls.servers import TlsAddress

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.guard_process import Fault, GuardProcess
    from tests.integration.test_pasted_advice import Case
    from tests.tls.servers import Papers, TlsServer

BAD_RECORD: Final = re.compile(r"bad record mac")
"""What an application's log has of it: of a record that another one was to get, or by an alert of the guard's."""
_SECONDS: Final = 40.0
_AT_A_TIME: Final = 10.0


@contextmanager
def _started(case: Case, directory: Path, guard: GuardProcess) -> Iterator[Program]:
    address = TlsAddress(guard.tcp.host, guard.tcp.port)
    where = f"postgresql://postgres@{address.host}:{address.port}/postgres?sslmode=require"
    environ = {"DATABASE_URL": where}
    with running(case.command(), address, directory.parent, cwd=directory, environ=environ) as program:
        yield program


def _corrupted(case: Case, directory: Path, guard: GuardProcess) -> tuple[Fault, str]:
    """Have workers use the master's connection until two have; returns the record, and their log."""
    deadline = time.monotonic() + _SECONDS
    log = ""
    while time.monotonic() < deadline:  # a second one may have noticed before it asks something
        with _started(case, directory, guard) as program:

            def is_seen(program: Program = program) -> bool:
                """The guard may see it before, and where the client that has found it says nothing of it."""
                return bool(guard.faults("tls-corruption")) and BAD_RECORD.search(program.log) is not None

            again = time.monotonic() + _AT_A_TIME
            while not is_seen() and time.monotonic() < again:
                case.occupy(program, is_seen)
                time.sleep(0.05)
            log = program.log
        if guard.faults("tls-corruption") and BAD_RECORD.search(log):
            return guard.faults("tls-corruption")[0], log
    pytest.fail(f"{guard.faults()}\n{log}")


@pytest.mark.parametrize("probe", [True, False], ids=["probed", "sampled"])
@pytest.mark.parametrize("name", ["gunicorn_psycopg2", "puma_pg", "celery_sqlalchemy"])
def test_both_are_named_and_the_advice_cures_it(
    name: str, probe: bool, tls_server: TlsServer, papers: Papers, tmp_path: Path
) -> None:
    case = CASES[name]
    directory = tmp_path / name
    shutil.copytree(PROGRAMS / "advice" / name, directory)
    with tls_guard(tls_server, "sslmode=require", papers.server, probe=probe) as guard:
        fault, _ = _corrupted(case, directory, guard)
    assert fault["severity"] == "error"
    assert fault["session"]["tls"] is True
    assert "bad record mac" in fault["libpq"]
    evidence = {"kernel-sender"} if probe else {"socket-holder", "sole-holder"}
    who = {culprit["pid"] for culprit in fault["culprits"] if culprit["evidence"] in evidence}
    assert len(who) >= 2, fault

    paste(fault["advice"]["code"], directory)
    with tls_guard(tls_server, "sslmode=require", papers.server, probe=probe) as guard:
        with _started(case, directory, guard) as program:
            case.occupy(program, lambda: False)
            case.worked(program)
            assert case.ends is not None
            program.send_signal(case.ends)
            program.wait()
            log = program.log
        guard.stop()
        assert not BAD_RECORD.search(log), log
        assert [fault for fault in guard.faults() if fault["severity"] != "info"] == []
