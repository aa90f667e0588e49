from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from ctypes.util import find_library

import pytest

from pgguard.attribution.drivers import driver_of
from pgguard.attribution.evidence import Driver
from tests.attribution.puppets import Puppet

Puppets = Callable[[], Puppet]


@pytest.mark.parametrize("module", ["asyncpg", "pg8000"])
def test_python_without_libpq_is_python(module: str, puppet: Puppets) -> None:
    child = puppet()
    child.do(f"import {module}")
    assert driver_of(child.pid) is Driver.PYTHON


@pytest.mark.parametrize("module", ["psycopg", "psycopg2"])
def test_libpq_is_seen_in_a_wheel_and_wins_over_everything_else(module: str, puppet: Puppets) -> None:
    child = puppet()
    child.do(f"import asyncpg, {module}")
    assert driver_of(child.pid) is Driver.LIBPQ


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_node_is_node() -> None:
    program = "process.stdout.write('x'); process.stdin.resume()"
    assert _driver_when_running("node", "-e", program) is Driver.NODE


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
@pytest.mark.skipif(find_library("pq") is None, reason="libpq is not installed")
def test_a_program_that_may_pipeline_is_not_sure_to_use_the_libpq_that_it_shows() -> None:
    """Some other library of its may have brought it along, and overlap would be called an error."""
    program = "process.stdout.write('x'); process.stdin.resume()"
    assert _driver_when_running("env", f"LD_PRELOAD={find_library('pq')}", "node", "-e", program) is Driver.NODE


@pytest.mark.skipif(shutil.which("cat") is None, reason="cat is not installed")
def test_a_program_that_shows_no_sign_is_unknown() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"x")
        process.stdin.flush()
        process.stdout.read(1)
        assert driver_of(process.pid) is Driver.UNKNOWN


def test_a_process_that_is_gone_is_unknown(puppet: Puppets) -> None:
    child = puppet()
    child.end()
    assert driver_of(child.pid) is Driver.UNKNOWN


def _driver_when_running(*command: str) -> Driver:
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"x"
        return driver_of(process.pid)
